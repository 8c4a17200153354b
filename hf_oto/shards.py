"""Weights as shards: gathered one at a time, divided again, or put into files.

Worked example: of a weight of 5 rows, rank 0 of 2 holds rows 0 to 2, and rank 1 rows 3 and 4. `whole` gives both ranks
all 5 rows. After rows 1 and 2 were cut out, `divided` leaves the old rows 0 and 3 on rank 0, and row 4 on rank 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from .calls import outermost_pretrained
from .modeling_oto import OTOError
from .slices import local

Shards = dict[str, Tensor]  # name of a weight -> the part of it that this rank holds, as a DTensor
SMALL_FILE = 2**26  # bytes: weights that are no more stay in one file


def whole(shard: Tensor) -> Tensor:
    """The whole of a weight, on the device where this rank computes."""
    if not isinstance(shard, DTensor):  # FSDP2 was told to ignore it
        return shard
    # shards may have been moved to the CPU, where the ranks can't gather
    return shard.to(shard.device_mesh.device_type).full_tensor()


def divided(weight: Tensor, like: Tensor) -> Tensor:
    """The part of a whole weight that this rank holds, divided as another one; nothing is sent."""
    if not isinstance(like, DTensor):
        return weight
    # without a source rank each rank takes its part of what it has
    part = distribute_tensor(weight, like.device_mesh, like.placements, src_data_rank=None)
    return part.to(local(like).device)


def divided_by_rows(weight: Tensor, mesh: DeviceMesh) -> Tensor:
    """The rows of a whole weight that this rank holds, as FSDP2 divides; nothing is sent."""
    return distribute_tensor(weight, mesh, [Shard(0)], src_data_rank=None)


def of_all_ranks(value: Any) -> list[Any]:
    """What every rank has."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def whole_in_files(shards: Shards, make_folder: Callable[[], str] | None) -> Shards:
    """All weights, whole, each in a file of a folder; on a rank that makes no folder, nothing."""
    in_files: Shards = {}
    folder = ""
    error: Exception | None = None
    if make_folder is not None:
        try:
            folder = make_folder()
        except Exception as first_error:
            error = first_error
    for number, (name, shard) in enumerate(shards.items()):
        weight = whole(shard)
        # the other ranks go on to gather, whatever happens to the files of this one
        if folder and error is None:
            try:
                in_files[name] = _in_file(weight, Path(folder, str(number)))
            except Exception as first_error:
                error = first_error
        del weight  # before the next one is gathered
    text = None if error is None else f"{type(error).__name__}: {error}"
    for rank, text_of_rank in enumerate(of_all_ranks(text)):
        if text_of_rank is not None:
            raise OTOError(f"rank {rank} can't write the weights: {text_of_rank}")
    return in_files


def _in_file(tensor: Tensor, file: Path) -> Tensor:
    """A copy of a tensor that lies in a file; its memory is taken only while it is read."""
    if not tensor.numel():
        return tensor.cpu()
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    flat.view(torch.uint8).numpy().tofile(file)
    in_file = torch.from_file(str(file), shared=False, size=flat.numel(), dtype=flat.dtype)
    return in_file.view(tensor.shape)


def save_by_pieces_(model: nn.Module) -> None:
    """Lets a model be saved in files so small that reading one after the other takes little memory."""
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    size_of_file = max(SMALL_FILE, sum(sizes) // 8, *sizes)
    for part in outermost_pretrained(model).values():
        part.save_pretrained = functools.partial(part.save_pretrained, max_shard_size=size_of_file)
