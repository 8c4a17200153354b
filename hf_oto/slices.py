"""Parameters seen as ZIGs: which ZIG every position of a parameter belongs to, whole or on the shards of this rank.

Worked example: of an axis of 3 heads, 2 channels wide each, and 3 positions that stay, `owner` is 0 0 1 1 2 2 3 3 3
(3, the number of ZIGs, stands for none).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from .modeling_oto import OTOError
from .zigs import Member, PrunableAxis


class Slice(NamedTuple):
    """Which ZIG every position of one parameter dimension belongs to."""

    param: str
    dim: int
    owner: Tensor  # (n,), int32, ZIG numbers; num_zigs where none


class Rows(NamedTuple):
    """The positions of a slice whose ZIG is in some set."""

    slice: Slice
    index: Tensor  # (k,), on the parameter's device
    positions: list[int]  # the same, for who wants one at a time

    @property
    def key(self) -> tuple[str, int]:
        """What tells slices apart: the parameter, and the dimension of it."""
        return self.slice.param, self.slice.dim


class Part(NamedTuple):
    """A tensor whose elements are to be added up ZIG by ZIG."""

    slice: Slice
    index: Tensor | None  # which positions of the slice the values are of; None: all
    values: Tensor


class Layout(NamedTuple):
    """Where the parts of a sum lie, and which process groups add them up; none for what every rank holds whole."""

    device: torch.device
    groups: tuple[dist.ProcessGroup, ...] = ()


def slices_of(
    axes: Sequence[PrunableAxis],
    members: Mapping[str, Sequence[Member]],
    params: Mapping[str, Tensor],
    known: dict[bytes, Tensor],
) -> tuple[Slice, ...]:
    """Members of the axes, {axis name: members}, as one slice per parameter dimension; equal owners, as those of a
    weight and its bias, are one tensor, which `known` keeps."""
    num_zigs = sum(axis.size for axis in axes)
    owners: dict[tuple[str, int], np.ndarray] = {}
    start = 0
    for axis in axes:
        zigs = np.arange(start, start + axis.size)[:, None]
        for m in members.get(axis.name, ()):
            nobody = np.full(params[m.param].shape[m.dim], num_zigs, np.int32)
            owner = owners.setdefault((m.param, m.dim), nobody)
            owner[m.positions(axis.size)] = zigs
        start += axis.size
    return tuple(
        Slice(name, dim, known.setdefault(owner.tobytes(), torch.from_numpy(owner)))
        for (name, dim), owner in owners.items()
    )


def local(t: Tensor) -> Tensor:
    """What this rank holds of a tensor, sharing its memory."""
    return t.to_local() if isinstance(t, DTensor) else t


def layout_of(p: Tensor) -> Layout:
    """Where a parameter lies, and which ranks hold the other parts of it.

    Raises:
        OTOError: it is placed in another way than FSDP2 and HSDP do it.
    """
    if not isinstance(p, DTensor):
        return Layout(p.device)
    if other := [x for x in p.placements if type(x) not in (Shard, Replicate)]:
        raise OTOError(
            f"a parameter of shape {tuple(p.shape)} is placed as {other[0]}: tensor parallel is not supported, "
            "use FSDP2 or HSDP (fully_shard) alone, or DDP"
        )
    sharded = [i for i, x in enumerate(p.placements) if isinstance(x, Shard)]
    return Layout(p.to_local().device, tuple(p.device_mesh.get_group(i) for i in sharded))


def on_this_rank(slices: Iterable[Slice], params: Mapping[str, Tensor]) -> Iterator[tuple[Slice, Tensor]]:
    """Slices and their parameters, both cut to what this rank holds of them."""
    for s in slices:
        p = params[s.param]
        owner = _owner_on_this_rank(s, p)
        yield s if owner is s.owner else s._replace(owner=owner), local(p)


def _owner_on_this_rank(s: Slice, p: Tensor) -> Tensor:
    """DTensors are cut as by `torch.chunk`."""
    owner = s.owner
    if isinstance(p, DTensor):
        for i, placement in enumerate(p.placements):
            if isinstance(placement, Shard) and placement.dim == s.dim:
                chunks = owner.chunk(p.device_mesh.size(i))
                rank = p.device_mesh.get_local_rank(i)
                owner = chunks[rank] if rank < len(chunks) else owner[:0]
    return owner


def rows_of(zigs: Tensor, slices: Iterable[Slice], params: Mapping[str, Tensor]) -> list[Rows]:
    """The positions of the ZIGs of a mask, bool (num_zigs,), on this rank; slices without any are left out."""
    padded = torch.cat([zigs, zigs.new_zeros(1)])  # the last one stands for no ZIG
    here = list(on_this_rank(slices, params))
    found: dict[tuple[int, torch.device], tuple[Tensor, list[int]]] = {}  # slices share owners, so they share these
    rows = []
    for s, p in here:
        key = (id(s.owner), p.device)
        if key not in found:
            index = padded.index_select(0, s.owner).nonzero().squeeze(1)
            found[key] = (index.to(p.device), index.tolist())
        index, positions = found[key]
        if positions:
            rows.append(Rows(s, index, positions))
    return rows


def per_position(values: Tensor, owner: Tensor, dim: int, like: Tensor) -> Tensor:
    """One number per ZIG, (num_zigs,) -> one per position, to be broadcast to `like` along `dim`."""
    shape = [-1 if d == dim else 1 for d in range(like.dim())]
    padded = torch.cat([values, values.new_ones(1)])
    return padded.index_select(0, owner).view(shape).to(like.device, like.dtype)


def sum_over_zigs(many: Sequence[Iterable[Part]], params: Mapping[str, Tensor], num_zigs: int) -> Tensor:
    """Adds up tensors over everything but their ZIGs, over all ranks: (len(many), num_zigs), on the CPU, in at least
    float32. `params`: those that parts may be of; on every rank the same."""
    dtype = torch.float32
    layouts = {}
    for name, p in params.items():
        real = p.dtype.to_real() if p.dtype.is_complex else p.dtype
        dtype = torch.promote_types(dtype, real)
        layouts[name] = layout_of(p)
    # the same layouts in the same order on all ranks, whatever these hold
    sums = {layout: torch.zeros(len(many), num_zigs + 1, dtype=dtype, device="cpu") for layout in layouts.values()}
    for k, parts in enumerate(many):
        found: dict[Layout, list[tuple[Tensor, Tensor]]] = {layout: [] for layout in sums}
        for s, index, values in parts:
            others = [dim for dim in range(values.dim()) if dim != s.dim]
            row_sums = values.sum(others, dtype=dtype) if others else values.to(dtype, copy=True)  # (n,)
            owner = s.owner if index is None else s.owner[index.cpu()]
            found[layouts[s.param]].append((owner, row_sums))
        for layout, pairs in found.items():
            if pairs:
                owner, row_sums = (torch.cat(x) for x in zip(*pairs, strict=True))
                # on the CPU the order of additions is always the same: replicas come to the same sums
                sums[layout][k].index_add_(0, owner, row_sums.cpu())
    total = torch.zeros(len(many), num_zigs + 1, dtype=dtype, device="cpu")
    for layout, part in sums.items():
        if layout.groups:
            part = part.to(layout.device)
            for group in layout.groups:
                dist.all_reduce(part, group=group)
        total += part.cpu()
    return total[:, :-1]


def agreed(t: Tensor, params: Iterable[Tensor], replicas: dist.ProcessGroup | None) -> Tensor:
    """A tensor as the first of the ranks has it that train these parameters together: unlike devices round
    differently, and ranks must never part. `replicas`: the group of the ranks that hold plain parameters."""
    params = list(params)
    groups = dict.fromkeys(p.device_mesh for p in params if isinstance(p, DTensor))
    over = [mesh.get_group(i) for mesh in groups for i in range(mesh.ndim)]
    if not over and replicas is not None:
        over = [replicas]
    for group in over:
        if dist.get_world_size(group) > 1:
            sent = t.to(local(params[0]).device)
            dist.broadcast(sent, group_src=0, group=group)
            t = sent.cpu()
    return t
