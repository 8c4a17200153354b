"""Parameters seen as ZIGs: which ZIG each position of a parameter belongs to, of a whole parameter or of a shard.

ZIGs are summed up, multiplied and zeroed with no more than that, also by a rank that holds one shard.

Worked example: a dimension holds an axis of 3 heads, each 2 channels wide, and then 3 positions of no ZIG. Its `owner`
is 0 0 1 1 2 2 3 3 3, where 3, the number of ZIGs, stands for none. Of 2 ranks the first one holds 0 0 1 1 2, and the
second one 2 3 3 3.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from .cut import Positions, without_positions
from .modeling_oto import OTOError
from .zigs import Member, PrunableAxis

Tensors = Mapping[str, Tensor]  # by name


class Slice(NamedTuple):
    """One dimension of a parameter, with the ZIG that each of its positions belongs to."""

    param: str
    dim: int
    owner: Tensor  # (n,), int32, ZIG numbers; num_zigs for a position of no ZIG


class Rows(NamedTuple):
    """The positions of a slice whose ZIGs are in some set of ZIGs."""

    slice: Slice
    index: Tensor  # (k,), on the parameter's device
    positions: Tensor  # `index` on the CPU, where it is read without waiting for the device

    @property
    def key(self) -> tuple[str, int]:
        """The parameter and the dimension, by which slices are told apart."""
        return self.slice.param, self.slice.dim


class Part(NamedTuple):
    """A tensor whose elements are to be added up ZIG by ZIG."""

    slice: Slice
    index: Tensor | None  # (k,), on the CPU: positions of the slice that the values belong to; None: all positions
    values: Tensor


class Layout(NamedTuple):
    """Where the parts of a sum lie, and which process groups add them up."""

    device: torch.device
    groups: tuple[dist.ProcessGroup, ...] = ()  # empty for a parameter that every rank holds whole


def slices_of(
    axes: Sequence[PrunableAxis],
    members: Mapping[str, Sequence[Member]],
    params: Tensors,
    known: dict[bytes, Tensor],
) -> tuple[Slice, ...]:
    """Members of axes as slices, one for each parameter dimension.

    Args:
        axes: all axes, whose ZIGs are numbered in this order.
        members: axis name -> the members of the axis that are wanted.
        params: parameter name -> parameter, unsharded or as a DTensor.
        known: owner as bytes -> owner. Equal owners, as those of a weight and its bias, are one tensor, in this dict.
    """
    num_zigs = sum(axis.size for axis in axes)
    owners: dict[tuple[str, int], np.ndarray] = {}  # one dimension may belong to several axes
    start = 0
    for axis in axes:
        stop = start + axis.size
        zigs = np.arange(start, stop)[:, None]  # (size, 1)
        for member in members.get(axis.name, ()):
            num_positions = params[member.param].shape[member.dim]
            nobody = np.full(num_positions, num_zigs, np.int32)
            owner = owners.setdefault((member.param, member.dim), nobody)
            positions = member.positions(axis.size)  # (size, k)
            owner[positions] = zigs
        start = stop
    slices = []
    for (name, dim), owner in owners.items():
        as_tensor = torch.from_numpy(owner)
        shared_owner = known.setdefault(owner.tobytes(), as_tensor)
        slices.append(Slice(name, dim, shared_owner))
    return tuple(slices)


def slices_left(slices: Iterable[Slice], positions: Positions) -> tuple[Slice, ...]:
    """Slices of parameters that were cut, with the owners of the positions that stay.

    Args:
        positions: parameter -> dimension -> the positions that were cut out.
    """
    known: dict[bytes, Tensor] = {}  # equal owners are one tensor, as in `slices_of`
    left = []
    for s in slices:
        gone = positions.get(s.param, {}).get(s.dim)
        owner = s.owner if gone is None else without_positions(s.owner, {0: gone})
        left.append(s._replace(owner=known.setdefault(owner.numpy().tobytes(), owner)))
    return tuple(left)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, sharing its memory."""
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    return tensor


def layout_of(parameter: Tensor) -> Layout:
    """Where a parameter lies, and which ranks hold the other parts of it.

    Raises:
        OTOError: the parameter is placed in another way than FSDP2 and HSDP place parameters.
    """
    if not isinstance(parameter, DTensor):
        return Layout(parameter.device)
    groups = []
    for i, placement in enumerate(parameter.placements):
        # exact types: what a subclass means is not known
        if type(placement) not in (Shard, Replicate):
            shape = tuple(parameter.shape)
            raise OTOError(
                f"a parameter of shape {shape} is placed as {placement}: tensor parallel is not supported, "
                "use FSDP2 or HSDP (fully_shard) alone, or DDP"
            )
        # ranks that replicate hold the same part, which must not be added twice
        if isinstance(placement, Shard):
            groups.append(parameter.device_mesh.get_group(i))
    device = local(parameter).device
    return Layout(device, tuple(groups))


def on_this_rank(slices: Iterable[Slice], params: Tensors) -> Iterator[tuple[Slice, Tensor]]:
    """Yields slices with their parameters, both reduced to what this rank holds of them."""
    for slice_ in slices:
        parameter = params[slice_.param]
        owner = _owner_on_this_rank(slice_, parameter)
        if owner is not slice_.owner:
            slice_ = slice_._replace(owner=owner)
        yield slice_, local(parameter)


def _owner_on_this_rank(slice_: Slice, parameter: Tensor) -> Tensor:
    """The owners of the positions that this rank holds; a DTensor is divided as by `torch.chunk`."""
    owner = slice_.owner
    if not isinstance(parameter, DTensor):
        return owner
    mesh = parameter.device_mesh
    for i, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard) and placement.dim == slice_.dim:
            chunks = owner.chunk(mesh.size(i))
            rank = mesh.get_local_rank(i)
            # with fewer positions than ranks there are fewer chunks, too: the last ranks hold nothing
            if rank < len(chunks):
                owner = chunks[rank]
            else:
                owner = owner[:0]
    return owner


def rows_of(zigs: Tensor, slices: Iterable[Slice], params: Tensors) -> list[Rows]:
    """The positions of a set of ZIGs on this rank, for every slice that has any.

    Args:
        zigs: the set, bool (num_zigs,).
    """
    no_zig = zigs.new_zeros(1)
    padded = torch.cat([zigs, no_zig])  # the last element is for positions of no ZIG
    # The list keeps the owners alive until the end: slices that share an owner are known by its id.
    local_slices = list(on_this_rank(slices, params))
    indices_of_owner: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}
    rows = []
    for slice_, parameter in local_slices:
        key = (id(slice_.owner), parameter.device)
        if key not in indices_of_owner:
            is_in_set = padded.index_select(0, slice_.owner)  # (n,)
            positions = is_in_set.nonzero().squeeze(1)  # (k,)
            index = positions.to(parameter.device)
            indices_of_owner[key] = (index, positions)
        index, positions = indices_of_owner[key]
        if len(positions):
            rows.append(Rows(slice_, index, positions))
    return rows


def per_position(values: Tensor, owner: Tensor, dim: int, like: Tensor) -> Tensor:
    """Spreads one number per ZIG over positions: a tensor to be multiplied with `like` along `dim`.

    Args:
        values: (num_zigs,); a position of no ZIG gets 1.
        owner: the ZIG of every position, (n,).
        dim: the dimension of `like` that has these positions.
        like: any tensor of n positions along `dim`; the result has its dtype and device.
    """
    shape = [1] * like.dim()
    shape[dim] = -1
    no_zig = values.new_ones(1)
    padded = torch.cat([values, no_zig])
    factors = padded.index_select(0, owner)  # (n,)
    return factors.view(shape).to(like.device, like.dtype)


def sum_over_zigs(many: Sequence[Iterable[Part]], params: Tensors, num_zigs: int) -> Tensor:
    """Adds up tensors over everything but their ZIGs, over all ranks.

    Args:
        many: for each sum, the parts to be added up.
        params: the parameters that parts may belong to; the same parameters on every rank.

    Returns:
        the sums, (len(many), num_zigs), on the CPU, in float32 or a wider dtype.
    """
    dtype = torch.float32
    layouts: dict[str, Layout] = {}
    for name, parameter in params.items():
        real_dtype = parameter.dtype
        if real_dtype.is_complex:
            real_dtype = real_dtype.to_real()
        dtype = torch.promote_types(dtype, real_dtype)
        layouts[name] = layout_of(parameter)
    shape = (len(many), num_zigs + 1)  # the last column is for positions of no ZIG
    # all ranks have the same layouts in the same order, whatever they hold: they call all_reduce equally often
    sums: dict[Layout, Tensor] = {}
    for layout in layouts.values():
        sums[layout] = torch.zeros(shape, dtype=dtype, device="cpu")
    for k, parts in enumerate(many):
        row_of_layout = {}
        for layout, sums_of_layout in sums.items():
            row_of_layout[layout] = sums_of_layout[k]  # a view
        _add_parts_(row_of_layout, parts, layouts, dtype)
    total = torch.zeros(shape, dtype=dtype, device="cpu")
    for layout, sums_of_layout in sums.items():
        if layout.groups:
            sums_of_layout = sums_of_layout.to(layout.device)
            for group in layout.groups:
                dist.all_reduce(sums_of_layout, group=group)
        total += sums_of_layout.cpu()
    return total[:, :-1]


def _add_parts_(
    sums: Mapping[Layout, Tensor], parts: Iterable[Part], layouts: Mapping[str, Layout], dtype: torch.dtype
) -> None:
    """Adds every part to the sums, (num_zigs + 1,), of the layout of its parameter."""
    owners: dict[Layout, list[Tensor]] = defaultdict(list)
    sums_of_owners: dict[Layout, list[Tensor]] = defaultdict(list)
    for slice_, index, values in parts:
        others = other_dims(values, slice_.dim)
        # without dimensions torch would sum over all of them
        row_sums = values.sum(others, dtype=dtype) if others else values.to(dtype, copy=True)  # (n,)
        owner = slice_.owner  # (n,)
        if index is not None:
            owner = owner[index]
        layout = layouts[slice_.param]
        owners[layout].append(owner)
        sums_of_owners[layout].append(row_sums)
    for layout, owners_of_layout in owners.items():
        owner = torch.cat(owners_of_layout)
        row_sums = torch.cat(sums_of_owners[layout])
        # on the CPU the order of additions is always the same, so that replicas come to the same sums
        sums[layout].index_add_(0, owner, row_sums.cpu())


def other_dims(tensor: Tensor, dim: int) -> list[int]:
    """All dimensions of a tensor but one."""
    dims = list(range(tensor.dim()))
    dims.remove(dim)
    return dims


def agreed(tensor: Tensor, params: Iterable[Tensor], replicas: dist.ProcessGroup | None) -> Tensor:
    """A tensor, on the CPU, as the first of those ranks has it that train some parameters together.

    Devices of different kinds round differently, and ranks that decide differently would train different models.

    Args:
        params: the parameters. DTensors know the ranks that train them.
        replicas: the ranks that hold plain parameters; None if there is one process.
    """
    params = list(params)
    sharded = [parameter for parameter in params if isinstance(parameter, DTensor)]
    meshes = dict.fromkeys(parameter.device_mesh for parameter in sharded)  # a set in order, equal on all ranks
    groups = []
    for mesh in meshes:
        groups += [mesh.get_group(i) for i in range(mesh.ndim)]
    if not groups and replicas is not None:
        groups = [replicas]
    for group in groups:
        if dist.get_world_size(group) > 1:
            device = local(params[0]).device  # the backend of the group may send from nowhere else
            sent = tensor.to(device)
            dist.broadcast(sent, group_src=0, group=group)
            tensor = sent.cpu()
    return tensor
