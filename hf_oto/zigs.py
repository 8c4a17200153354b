"""What is pruned: a ZIG partition names, for every prunable axis, the parameter slices that go together.

Stands between the axis algebra, which finds the axes, and everything that uses them (optimizer, cutting, report).
"""

from __future__ import annotations

import html
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
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


@dataclass(frozen=True)
class Member:
    """The part of one parameter or buffer that belongs to an axis.

    `p.narrow(dim, start, outer * size * inner).unflatten(dim, (outer, size, inner))` has the axis as its middle
    dimension. Positions that are not evenly strided are listed in `index` instead.

    Attributes:
        param: name of the parameter or buffer, as in `model.state_dict()`.
        dim: the dimension of it that the axis cuts.
        role: "producer" (its slice makes the structure), "consumer" (its slice reads it) or "statistic" (it is
            cut along but never zeroed: a buffer, or the direction of a weight whose norm is a parameter of its own).
        index: positions along `dim`, shape (size, k), or None.
    """

    param: str
    dim: int
    role: Role
    start: int = 0
    outer: int = 1
    inner: int = 1
    index: np.ndarray | None = field(default=None, compare=False)

    def positions(self, size: int) -> np.ndarray:
        """Positions along `dim` of every ZIG of an axis of `size`, shape (size, k)."""
        if self.index is not None:
            return self.index
        block = np.arange(self.outer * size * self.inner).reshape(self.outer, size, self.inner)
        return self.start + block.transpose(1, 0, 2).reshape(size, -1)

    def stop(self, size: int) -> int:
        """What `dim` must have at least, for an axis of `size`."""
        return self.start + self.outer * size * self.inner if self.index is None else int(self.index.max()) + 1


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
        multiple: a cut leaves a multiple of so many, some as zeros: kernels for stacked experts want aligned rows.
        zero_path: True if zero producers make the structure contribute exactly zero; else the consumers' slices are
            part of the ZIG too (zero queries still attend uniformly, and f(0) may not be 0).
        scales: parameters that cutting scales, because an average is taken over the axis.
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

    @property
    def group(self) -> tuple[Member, ...]:
        """The members whose slices are the ZIG: once they are zero, the position contributes exactly zero."""
        roles = ("producer",) if self.zero_path else ("producer", "consumer")
        return tuple(m for m in self.members if m.role in roles)


@dataclass(frozen=True)
class PruningPlan:
    """Which positions of each axis stay: `{axis name: kept indices}`. Axes that are not named stay whole.

    Example:
        >>> PruningPlan.from_json(PruningPlan({"fc.weight[0]": [0, 2]}).to_json()).kept
        {'fc.weight[0]': (0, 2)}
    """

    kept: Mapping[str, Sequence[int]]

    def __post_init__(self) -> None:
        plain = {name: tuple(np.asarray(kept, np.int64).tolist()) for name, kept in self.kept.items()}
        object.__setattr__(self, "kept", plain)

    def to_json(self) -> str:
        """The plan as one JSON object."""
        return json.dumps(self.kept)

    @classmethod
    def from_json(cls, text: str) -> PruningPlan:
        """Reads what `to_json` wrote."""
        return cls(json.loads(text))

    @classmethod
    def from_zeros(cls, model: torch.nn.Module, partition: ZIGPartition) -> PruningPlan:
        """The plan that removes every ZIG that is exactly zero; an axis never goes empty: one zero stays."""
        kept, tensors = {}, partition.tensors(model)
        for axis in partition.axes:
            alive = np.zeros(axis.size, bool)
            for m in axis.group:
                t = tensors[m.param]
                some = (t != 0).movedim(m.dim, 0).reshape(t.shape[m.dim], -1).any(1).cpu().numpy()  # (n,)
                alive |= some[m.positions(axis.size)].any(1)
            if not alive.all():
                kept[axis.name] = np.flatnonzero(alive).tolist() or [0]
        return cls(kept)

    def removed(self, partition: ZIGPartition) -> np.ndarray:
        """Which ZIGs go, bool, shape (num_zigs,); checks the plan against the partition.

        Raises:
            ValueError: unknown axis, index out of range, repeated index, or an axis left empty.
        """
        removed = np.zeros(partition.num_zigs, bool)
        parts = {axis.name: part for axis, part in partition.split(removed)}
        for name, kept in self.kept.items():
            if name not in parts:
                raise ValueError(f"the plan names {name!r}, which is no axis of this partition (see partition.axes)")
            size = len(parts[name])
            if not kept:
                raise ValueError(f"the plan empties axis {name!r}: at least one of its {size} ZIGs must stay")
            if len(set(kept)) != len(kept):
                raise ValueError(f"the plan repeats an index of axis {name!r}")
            if min(kept) < 0 or max(kept) >= size:
                raise ValueError(f"the plan keeps an index outside [0, {size}) of axis {name!r}")
            parts[name][:] = True
            parts[name][list(kept)] = False
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
        """The model's parameters and persistent buffers that members name, by name."""
        names = {m.param for axis in self.axes for m in axis.members}
        found = {name: t for name, t in named_tensors(model).items() if name in names}
        if missing := names - found.keys():
            raise OTOError(f"the model has no parameter {min(missing)!r}: was this partition made for another model?")
        for axis in self.axes:
            for m in axis.members:
                shape = found[m.param].shape
                if m.dim >= len(shape) or shape[m.dim] < m.stop(axis.size):
                    raise OTOError(f"{m.param} is smaller than this partition says: is the model compacted already?")
        return found

    def params(self, model: torch.nn.Module) -> Work:
        """The parameters of the model, tied ones once."""
        shapes = {name: [(n, {}) for n in p.shape] for name, p in model.named_parameters()}
        for a, axis in enumerate(self.axes):
            for m in axis.members:
                if m.param in shapes:
                    zigs = shapes[m.param][m.dim][1]
                    zigs[a] = zigs.get(a, 0) + m.positions(axis.size).shape[1]
        terms = ([(n, tuple(zigs.items())) for n, zigs in dims] for dims in shapes.values())
        return Work.of(terms, len(self.axes))

    def split(self, vector: np.ndarray) -> Iterator[tuple[PrunableAxis, np.ndarray]]:
        """Yields (axis, its part, a view of shape (size,)) of a vector over all ZIGs."""
        start = 0
        for axis in self.axes:
            yield axis, vector[start : start + axis.size]
            start += axis.size

    def slices(self, removed: np.ndarray) -> Iterator[tuple[PrunableAxis, Member, np.ndarray]]:
        """Yields (axis, member, positions along its dimension) of what goes; `removed` is bool, shape (num_zigs,)."""
        for axis, gone in self.split(removed):
            if gone.any():
                for m in axis.members:
                    yield axis, m, m.positions(axis.size)[gone].reshape(-1)

    @torch.no_grad()
    def zero_(self, model: torch.nn.Module, plan: PruningPlan) -> None:
        """Zeroes, in place, the ZIGs that `plan` removes."""
        tensors = self.tensors(model)
        for axis, m, index in self.slices(plan.removed(self)):
            if m in axis.group:
                t = tensors[m.param]
                t.index_fill_(m.dim, torch.from_numpy(index).to(t.device), 0)

    def __str__(self) -> str:
        """A table: one line per family of axes (layers of equal structure folded), then the pins by reason."""
        return table.text(self.axes, self.pinned, self.work)

    def _repr_html_(self) -> str:
        """The same in a notebook."""
        return f"<pre>{html.escape(str(self))}</pre>"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for machines."""
        axes = []
        for axis in self.axes:
            given = [{k: v for k, v in vars(m).items() if v is not None} for m in axis.members]
            members = [m | {"index": m["index"].tolist()} if "index" in m else m for m in given]
            scales = [[s.param, *s.power.as_integer_ratio(), s.offset] for s in axis.scales]
            axes.append(vars(axis) | {"members": members, "scales": scales})
        return {"axes": axes, "pinned": dict(self.pinned)}


def random_half(partition: ZIGPartition, families: Collection[str] | None = None) -> PruningPlan:
    """A plan that removes at most half of every axis, each to a width of its own, always the same.

    Args:
        families: the folded names of the axes that may lose something; None: all.
    """
    rng = np.random.default_rng(0)
    kept = {}
    for axis in partition.axes:
        # with less than half left, deep networks forget their input, and any cut looks right
        keep = np.sort(rng.permutation(axis.size)[: rng.integers((axis.size + 1) // 2, axis.size)])
        if families is None or fold(axis.name) in families:
            kept[axis.name] = keep
    return PruningPlan(kept)
