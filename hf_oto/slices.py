"""Parameters seen as ZIGs: which ZIG every position of a parameter belongs to, whole or on the shards of this rank.

Sums over ZIGs, multiplying ZIGs and zeroing them need no more than that, and neither does a rank that holds one shard.

Worked example: of an axis of 3 heads, 2 channels wide each, and 3 positions that stay, `owner` is 0 0 1 1 2 2 3 3 3
(3, the number of ZIGs, stands for none). On 2 ranks the first holds 0 0 1 1 2 and the second 2 3 3 3.
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
    """One dimension of a parameter, with the ZIG that every position of it belongs to."""

    param: str
    dim: int
    owner: Tensor  # (n,), int32, ZIG numbers; num_zigs for a position of no ZIG


class Rows(NamedTuple):
    """The positions of a slice whose ZIGs are in some set of ZIGs."""

    slice: Slice
    index: Tensor  # (k,), on the parameter's device
    positions: list[int]  # the same numbers, to read one at a time without a copy from the device

    @property
    def key(self) -> tuple[str, int]:
        """The parameter and its dimension, which tell slices apart."""
        return self.slice.param, self.slice.dim


class Part(NamedTuple):
    """A tensor whose elements are to be added up ZIG by ZIG."""

    slice: Slice
    index: Tensor | None  # (k,), the positions of the slice that the values belong to; None: all
    values: Tensor


class Layout(NamedTuple):
    """Where the parts of a sum lie, and which process groups add them up."""

    device: torch.device
    groups: tuple[dist.ProcessGroup, ...] = ()  # empty for a parameter that every rank holds whole


def slices_of(
    axes: Sequence[PrunableAxis],
    members: Mapping[str, Sequence[Member]],
    params: Mapping[str, Tensor],
    known: dict[bytes, Tensor],
) -> tuple[Slice, ...]:
    """Members of axes as slices, one for each parameter dimension.

    Args:
        axes: all axes, whose ZIGs are numbered in this order.
        members: axis name -> those members of it that are wanted.
        params: parameter name -> parameter, unsharded or as a DTensor.
        known: owner as bytes -> owner. Equal owners, as those of a weight and its bias, are one tensor, in this dict.
    """
    num_zigs = sum(axis.size for axis in axes)
    owners: dict[tuple[str, int], np.ndarray] = {}  # one dimension may belong to several axes
    start = 0
    for axis in axes:
        zigs = np.arange(start, start + axis.size)[:, None]  # (size, 1)
        for m in members.get(axis.name, ()):
            nobody = np.full(params[m.param].shape[m.dim], num_zigs, np.int32)
            owner = owners.setdefault((m.param, m.dim), nobody)
            owner[m.positions(axis.size)] = zigs
        start += axis.size
    slices = []
    for (name, dim), owner in owners.items():
        shared_owner = known.setdefault(owner.tobytes(), torch.from_numpy(owner))
        slices.append(Slice(name, dim, shared_owner))
    return tuple(slices)


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
    others = [x for x in p.placements if type(x) not in (Shard, Replicate)]
    if others:
        raise OTOError(
            f"a parameter of shape {tuple(p.shape)} is placed as {others[0]}: tensor parallel is not supported, "
            "use FSDP2 or HSDP (fully_shard) alone, or DDP"
        )
    sharded_mesh_dims = [i for i, placement in enumerate(p.placements) if isinstance(placement, Shard)]
    groups = tuple(p.device_mesh.get_group(i) for i in sharded_mesh_dims)
    return Layout(p.to_local().device, groups)


def on_this_rank(slices: Iterable[Slice], params: Mapping[str, Tensor]) -> Iterator[tuple[Slice, Tensor]]:
    """Yields slices with their parameters, both reduced to what this rank holds of them."""
    for s in slices:
        p = params[s.param]
        owner = _owner_on_this_rank(s, p)
        yield s if owner is s.owner else s._replace(owner=owner), local(p)


def _owner_on_this_rank(s: Slice, p: Tensor) -> Tensor:
    """The owners of the positions that this rank holds; a DTensor is divided as by `torch.chunk`."""
    owner = s.owner
    if not isinstance(p, DTensor):
        return owner
    for i, placement in enumerate(p.placements):
        if isinstance(placement, Shard) and placement.dim == s.dim:
            chunks = owner.chunk(p.device_mesh.size(i))
            rank = p.device_mesh.get_local_rank(i)
            # there are fewer chunks than ranks where there are fewer positions: the last ranks hold nothing
            owner = chunks[rank] if rank < len(chunks) else owner[:0]
    return owner


def rows_of(zigs: Tensor, slices: Iterable[Slice], params: Mapping[str, Tensor]) -> list[Rows]:
    """The positions of a set of ZIGs on this rank, for every slice that has any.

    Args:
        zigs: the set, bool (num_zigs,).
    """
    padded = torch.cat([zigs, zigs.new_zeros(1)])  # the last element is for positions of no ZIG
    # alive until the end: by the ids of their owners the dict below knows which slices share one
    local_slices = list(on_this_rank(slices, params))
    index_of_owner: dict[tuple[int, torch.device], tuple[Tensor, list[int]]] = {}
    rows = []
    for s, p in local_slices:
        key = (id(s.owner), p.device)
        if key not in index_of_owner:
            index = padded.index_select(0, s.owner).nonzero().squeeze(1)  # (k,)
            index_of_owner[key] = (index.to(p.device), index.tolist())
        index, positions = index_of_owner[key]
        if positions:
            rows.append(Rows(s, index, positions))
    return rows


def per_position(values: Tensor, owner: Tensor, dim: int, like: Tensor) -> Tensor:
    """One number per position, to be multiplied with `like` along `dim`, from one number per ZIG.

    Args:
        values: (num_zigs,); a position of no ZIG gets 1.
        owner: the ZIG of every position, (n,).
        dim: the dimension of `like` that has these positions.
        like: any tensor of n positions along `dim`; the result has its dtype and device.
    """
    shape = [1] * like.dim()
    shape[dim] = -1
    padded = torch.cat([values, values.new_ones(1)])
    return padded.index_select(0, owner).view(shape).to(like.device, like.dtype)


def sum_over_zigs(many: Sequence[Iterable[Part]], params: Mapping[str, Tensor], num_zigs: int) -> Tensor:
    """Adds up tensors over everything but their ZIGs, over all ranks.

    Args:
        many: for each of the sums, the parts that it is made of.
        params: the parameters that parts may belong to; the same ones on every rank.

    Returns:
        the sums, (len(many), num_zigs), on the CPU, in float32 or a wider dtype.
    """
    dtype = torch.float32
    layouts: dict[str, Layout] = {}
    for name, p in params.items():
        real = p.dtype.to_real() if p.dtype.is_complex else p.dtype
        dtype = torch.promote_types(dtype, real)
        layouts[name] = layout_of(p)
    # all ranks have the same layouts in the same order, whatever they hold: they call all_reduce equally often
    sums: dict[Layout, Tensor] = {}
    for layout in layouts.values():
        sums[layout] = torch.zeros(len(many), num_zigs + 1, dtype=dtype, device="cpu")
    for k, parts in enumerate(many):
        _add_parts_({layout: sums_of_layout[k] for layout, sums_of_layout in sums.items()}, parts, layouts, dtype)
    total = torch.zeros(len(many), num_zigs + 1, dtype=dtype, device="cpu")
    for layout, sums_of_layout in sums.items():
        if layout.groups:
            sums_of_layout = sums_of_layout.to(layout.device)
            for group in layout.groups:
                dist.all_reduce(sums_of_layout, group=group)
        total += sums_of_layout.cpu()
    return total[:, :-1]  # without the positions of no ZIG


def _add_parts_(
    sums: Mapping[Layout, Tensor], parts: Iterable[Part], layouts: Mapping[str, Layout], dtype: torch.dtype
) -> None:
    """Adds parts to the sums, (num_zigs + 1,), of the layouts that they lie in."""
    pairs_of_layout: dict[Layout, list[tuple[Tensor, Tensor]]] = {layout: [] for layout in sums}
    for s, index, values in parts:
        others = [dim for dim in range(values.dim()) if dim != s.dim]
        row_sums = values.sum(others, dtype=dtype) if others else values.to(dtype, copy=True)  # (n,)
        owner = s.owner if index is None else s.owner[index.cpu()]  # (n,)
        pairs_of_layout[layouts[s.param]].append((owner, row_sums))
    for layout, pairs in pairs_of_layout.items():
        if not pairs:
            continue
        owners, row_sums = zip(*pairs, strict=True)
        # on the CPU the order of additions is always the same, so that replicas come to the same sums
        sums[layout].index_add_(0, torch.cat(owners), torch.cat(row_sums).cpu())


def agreed(t: Tensor, params: Iterable[Tensor], replicas: dist.ProcessGroup | None) -> Tensor:
    """A tensor as the first of the ranks has it that train these parameters together, on the CPU.

    Devices of different kinds round differently, and ranks that decide differently would train different models.

    Args:
        params: the parameters; DTensors know the ranks that train them.
        replicas: the ranks that hold plain parameters; None where there is one process.
    """
    params = list(params)
    meshes = dict.fromkeys(p.device_mesh for p in params if isinstance(p, DTensor))
    groups = [mesh.get_group(i) for mesh in meshes for i in range(mesh.ndim)]
    if not groups and replicas is not None:
        groups = [replicas]
    for group in groups:
        if dist.get_world_size(group) > 1:
            sent = t.to(local(params[0]).device)
            dist.broadcast(sent, group_src=0, group=group)
            t = sent.cpu()
    return t
