"""What is pruned: a ZIG partition names, for every prunable axis, the parameter slices that go together.

These types stand between the axis algebra, which finds the axes, and all that uses them (optimizer, cut, report).

Worked example: in Linear(3, 8), ReLU, Linear(8, 2) the 8 hidden units are one axis of 8 ZIGs. Its members are

    0.weight  dim 0  producer    row j makes unit j
    0.bias    dim 0  producer    element j makes unit j
    2.weight  dim 1  consumer    column j reads unit j

ZIG j is row j of 0.weight and element j of 0.bias, 4 parameters: once they are zero, unit j is zero for every input.
A cut of ZIG j removes column j of 2.weight, too, and so saves 6 parameters. The 3 inputs and the 2 outputs are pinned.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from . import table
from .cost import Work
from .modeling_oto import OTOError, named_tensors
from .reasons import Reason
from .table import fold

Role = Literal["producer", "consumer", "statistic"]


def strided_positions(size: int, start: int, outer: int, inner: int) -> np.ndarray:
    """The positions of every ZIG in a block (outer, size, inner) that begins at `start`; (size, outer * inner)."""
    count = outer * size * inner
    block = np.arange(count).reshape(outer, size, inner)
    by_zig = block.transpose(1, 0, 2)  # (size, outer, inner)
    return start + by_zig.reshape(size, -1)


@dataclass(frozen=True)
class Member:
    """The part of one parameter or buffer that belongs to an axis.

    `p.narrow(dim, start, outer * size * inner).unflatten(dim, (outer, size, inner))` has the axis as its middle
    dimension. Positions that are not evenly strided are listed in `index` instead.

    Attributes:
        param: name of the parameter or buffer, as in `model.state_dict()`.
        dim: the dimension that the axis cuts.
        role: "producer" (its slice makes the structure), "consumer" (its slice reads the structure) or "statistic" (it
            is cut with the axis but never zeroed: a buffer, or the direction of a weight whose norm is a parameter).
        index: positions along `dim`, shape (size, k), or None.
    """

    param: str
    dim: int
    role: Role
    start: int = 0
    outer: int = 1
    inner: int = 1
    index: np.ndarray | None = field(default=None, compare=False)  # arrays compare entry by entry

    @classmethod
    def at(cls, param: str, dim: int, role: Role, positions: np.ndarray) -> Member:
        """The member with the given positions, (size, k): as an even stride where it is one, else as a list."""
        size, k = positions.shape
        start = int(positions[0, 0])
        # the first ZIG has `inner` positions in a row before it jumps
        inner = next((i for i in range(1, k) if positions[0, i] != start + i), k)
        strided = cls(param, dim, role, start, k // inner, inner)
        if k % inner == 0 and np.array_equal(strided.positions(size), positions):
            return strided
        return cls(param, dim, role, index=positions)

    def positions(self, size: int) -> np.ndarray:
        """The positions along `dim` of every ZIG of an axis of `size`, shape (size, k).

        Example:
            >>> Member("fc.weight", 0, "producer", start=0, outer=1, inner=2).positions(3).tolist()
            [[0, 1], [2, 3], [4, 5]]
        """
        if self.index is not None:
            return self.index
        return strided_positions(size, self.start, self.outer, self.inner)

    def stop(self, size: int) -> int:
        """The size that `dim` must have at least, for an axis of `size`."""
        if self.index is not None:
            last = int(self.index.max())
            return last + 1
        return self.start + self.outer * size * self.inner


class Scale(NamedTuple):
    """Cutting an axis makes a parameter p into (p + offset) * (size / kept) ** power - offset (scales.py)."""

    param: str
    power: Fraction
    offset: int = 0


@dataclass(frozen=True)
class PrunableAxis:
    """One prunable axis; position j along it is one zero-invariant group (ZIG).

    Attributes:
        name: stable name, the first producing matrix and its dimension: "encoder.layer.0.query.weight[0]".
        kind: what one position is: "channels", "units", "heads", "kv_groups" or "groups".
        size: number of ZIGs.
        members: every parameter and buffer slice that goes with a position.
        params: parameters that one ZIG alone takes with it.
        macs: multiply-accumulates of the traced forward that one ZIG alone takes with it.
        multiple: a cut leaves a multiple of this many ZIGs, some of them as zeros, because the kernels for stacked
            experts want aligned rows.
        zero_path: whether a position contributes exactly zero as soon as its producers are zero. If not (zero queries
            still attend, uniformly, and f(0) may not be 0), the consumers' slices are part of the ZIG, too.
        scales: parameters that a cut scales, because an average is taken over the axis.
        bottleneck: whether all that the output learns of the inputs goes through the axis (bottlenecks.py).
    """

    name: str
    kind: str
    size: int
    members: tuple[Member, ...]
    params: int = 0
    macs: int = 0
    multiple: int = 1
    zero_path: bool = True
    scales: tuple[Scale, ...] = ()
    bottleneck: bool = False

    @property
    def group(self) -> tuple[Member, ...]:
        """The members whose slices are the ZIG: once they are zero, the position contributes exactly zero."""
        roles = ("producer",) if self.zero_path else ("producer", "consumer")
        return tuple(member for member in self.members if member.role in roles)


@dataclass(frozen=True)
class PruningPlan:
    """Which positions of each axis stay: `{axis name: kept indices}`. Axes that are not named stay whole.

    Raises:
        ValueError: indices that are no whole numbers (a mask, say).

    Example:
        >>> PruningPlan.from_json(PruningPlan({"fc.weight[0]": [0, 2]}).to_json()).kept
        {'fc.weight[0]': (0, 2)}
    """

    kept: Mapping[str, Sequence[int]]

    def __post_init__(self) -> None:
        kept = {}
        for name, indices in self.kept.items():
            # arrays, tensors and lists become plain tuples of int, which JSON and == know
            array = np.asarray(indices)
            if array.size and array.dtype.kind not in "iu":
                raise ValueError(
                    f"{name}: the plan must say which positions stay, as whole numbers, not {array.dtype}"
                )
            kept[name] = tuple(array.astype(np.int64).tolist())
        object.__setattr__(self, "kept", kept)  # the class is frozen

    def to_json(self) -> str:
        """The plan as one JSON object."""
        return json.dumps(self.kept)

    @classmethod
    def from_json(cls, text: str) -> PruningPlan:
        """Reads what `to_json` wrote."""
        return cls(json.loads(text))

    @classmethod
    def from_zeros(cls, model: torch.nn.Module, partition: ZIGPartition) -> PruningPlan:
        """The plan that removes every ZIG that is exactly zero; an axis that is all zero keeps one ZIG."""
        kept = {}
        tensors = partition.tensors(model)
        for axis in partition.axes:
            alive = np.zeros(axis.size, bool)  # (size,)
            for member in axis.group:
                tensor = tensors[member.param]
                num_positions = tensor.shape[member.dim]
                is_nonzero = (tensor != 0).movedim(member.dim, 0)
                is_nonzero = is_nonzero.reshape(num_positions, -1)  # (n, elements of a position)
                position_alive = is_nonzero.any(1).cpu().numpy()  # (n,)
                positions = member.positions(axis.size)  # (size, k)
                alive |= position_alive[positions].any(1)
            if not alive.all():
                kept_indices = np.flatnonzero(alive).tolist()
                kept[axis.name] = kept_indices or [0]
        return cls(kept)

    @classmethod
    def removing(cls, removed: np.ndarray, partition: ZIGPartition) -> PruningPlan:
        """The plan that removes some ZIGs, bool (num_zigs,); of an axis that would lose all, one ZIG is kept."""
        kept = {}
        for axis, removed_of_axis in partition.split(removed):
            if removed_of_axis.any():
                kept[axis.name] = np.flatnonzero(~removed_of_axis).tolist() or [0]
        return cls(kept)

    def removed(self, partition: ZIGPartition) -> np.ndarray:
        """Which ZIGs are cut, bool, (num_zigs,); checks the plan against the partition.

        Raises:
            ValueError: unknown axis, index out of range, repeated index, or an axis left empty.
        """
        removed = np.zeros(partition.num_zigs, bool)
        removed_of_axis = {}  # axis name -> its part of `removed`, a view
        for axis, part in partition.split(removed):
            removed_of_axis[axis.name] = part
        for name, kept in self.kept.items():
            if name not in removed_of_axis:
                raise ValueError(f"the plan names {name!r}, which is no axis of this partition (see partition.axes)")
            part = removed_of_axis[name]
            size = len(part)
            if not kept:
                raise ValueError(f"the plan empties axis {name!r}: at least one of its {size} ZIGs must stay")
            if len(set(kept)) != len(kept):
                raise ValueError(f"the plan repeats an index of axis {name!r}")
            if min(kept) < 0 or max(kept) >= size:
                raise ValueError(f"the plan keeps an index outside [0, {size}) of axis {name!r}")
            part[:] = True
            part[list(kept)] = False
        return removed


@dataclass(frozen=True)
class ZIGPartition:
    """Every zero-invariant group of a model (OTOv2, arXiv 2303.06862, Sec. 3.1).

    Attributes:
        axes: the prunable axes; position j along an axis is one ZIG.
        pinned: "parameter[dim]" -> why that dimension may not be cut.
        work: multiply-accumulates of the traced forward, None in a partition that was not traced.
        sizes: the equations that tie the modules' own size attributes to the axes (sizes.py).
    """

    axes: tuple[PrunableAxis, ...]
    pinned: Mapping[str, Reason]
    work: Work | None = None
    sizes: Any = None

    @property
    def num_zigs(self) -> int:
        """Number of ZIGs over all axes."""
        return sum(axis.size for axis in self.axes)

    def tensors(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """The model's parameters and persistent buffers that members name, by name.

        Raises:
            OTOError: the model lacks one of them, or one is too small.
        """
        names = set()
        for axis in self.axes:
            names.update(member.param for member in axis.members)
        tensors = {}
        for name, tensor in named_tensors(model).items():
            if name in names:
                tensors[name] = tensor
        missing = names - tensors.keys()
        if missing:
            raise OTOError(f"the model has no parameter {min(missing)!r}: was this partition made for another model?")
        for axis in self.axes:
            for member in axis.members:
                shape = tensors[member.param].shape
                if member.dim >= len(shape) or shape[member.dim] < member.stop(axis.size):
                    raise OTOError(
                        f"{member.param} is smaller than this partition says: is the model compacted already?"
                    )
        return tensors

    def params(self, model: torch.nn.Module) -> Work:
        """The parameters of the model, tied ones once, as an amount that cuts make smaller."""
        # (parameter, dimension) -> {axis: positions that one ZIG takes}
        taken: dict[tuple[str, int], dict[int, int]] = {}
        for number, axis in enumerate(self.axes):
            for member in axis.members:
                taken_by_axis = taken.setdefault((member.param, member.dim), {})
                _, positions_of_zig = member.positions(axis.size).shape
                # an axis may have several members in one dimension: the query, key and value rows of a fused weight
                taken_by_axis[number] = taken_by_axis.get(number, 0) + positions_of_zig
        terms = []  # the size of a parameter is the product of its widths
        for name, parameter in model.named_parameters():
            widths = []
            for dim, size in enumerate(parameter.shape):
                taken_by_axis = taken.get((name, dim), {})
                widths.append((size, tuple(taken_by_axis.items())))
            terms.append(widths)
        return Work.of(terms, len(self.axes))

    def split(self, vector: np.ndarray) -> Iterator[tuple[PrunableAxis, np.ndarray]]:
        """Yields every axis with its part of a vector over all ZIGs, a view of shape (size,)."""
        start = 0
        for axis in self.axes:
            stop = start + axis.size
            yield axis, vector[start:stop]
            start = stop

    def slices(self, removed: np.ndarray) -> Iterator[tuple[PrunableAxis, Member, np.ndarray]]:
        """Yields (axis, member, positions of the member that are cut) for every axis that loses something.

        Args:
            removed: which ZIGs are cut, bool, (num_zigs,).
        """
        for axis, removed_of_axis in self.split(removed):
            if not removed_of_axis.any():
                continue
            for member in axis.members:
                positions = member.positions(axis.size)  # (size, k)
                yield axis, member, positions[removed_of_axis].reshape(-1)

    @torch.no_grad()
    def zero_(self, model: torch.nn.Module, plan: PruningPlan) -> None:
        """Zeroes, in place, the ZIGs that `plan` removes."""
        tensors = self.tensors(model)
        for axis, member, positions in self.slices(plan.removed(self)):
            # consumers are zeroed only where they are part of a ZIG: they read zeros
            if member in axis.group:
                tensor = tensors[member.param]
                index = torch.from_numpy(positions).to(tensor.device)
                tensor.index_fill_(member.dim, index, 0)

    def __str__(self) -> str:
        """A table: one line per family of axes (layers of equal structure folded), then the pins by reason."""
        return table.text(self.axes, self.pinned, self.work)

    def _repr_html_(self) -> str:
        """The same in a notebook."""
        return f"<pre>{html.escape(str(self))}</pre>"

    def to_dict(self) -> dict[str, Any]:
        """Axes and pins as plain data, for machines."""
        axes = []
        for axis in self.axes:
            members = [_member_as_data(member) for member in axis.members]
            scales = []
            for scale in axis.scales:
                # JSON knows no fractions
                numerator, denominator = scale.power.as_integer_ratio()
                scales.append([scale.param, numerator, denominator, scale.offset])
            axes.append(vars(axis) | {"members": members, "scales": scales})
        return {"axes": axes, "pinned": dict(self.pinned)}


def _member_as_data(member: Member) -> dict[str, Any]:
    """The fields of a member, without an index that is None, and with a list in the place of an array."""
    fields = dict(vars(member))
    if member.index is None:
        del fields["index"]
    else:
        fields["index"] = member.index.tolist()
    return fields


def random_half(partition: ZIGPartition, families: Collection[str] | None = None) -> PruningPlan:
    """A plan that removes at most half of every axis, each to a width of its own; always the same plan.

    Args:
        families: the folded names of the axes that may lose something; None: all.
    """
    # with less than half left, deep networks forget their input, and any cut looks right
    return _random_plan(partition, families, lambda size: ((size + 1) // 2, size))


def random_eighth(partition: ZIGPartition) -> PruningPlan:
    """A plan that keeps an eighth of every axis or a little more, each of a width of its own; always the same plan."""
    return _random_plan(partition, None, lambda size: (max(1, size // 8), max(2, size // 4)))


def _random_plan(
    partition: ZIGPartition, families: Collection[str] | None, bounds: Callable[[int], tuple[int, int]]
) -> PruningPlan:
    """A plan that keeps a random number of random ZIGs of every axis.

    Args:
        bounds: size of an axis -> the least number that is kept, and the first that is too many.
    """
    rng = np.random.default_rng(0)
    kept = {}
    for axis in partition.axes:
        # drawn for axes that stay whole, too, so that an axis loses the same ZIGs whichever others are cut
        shuffled = rng.permutation(axis.size)  # (size,)
        num_kept = rng.integers(*bounds(axis.size))
        if families is None or fold(axis.name) in families:
            kept[axis.name] = np.sort(shuffled[:num_kept])
    return PruningPlan(kept)
