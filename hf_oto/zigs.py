"""What is pruned: a ZIG partition names, for every prunable axis, the parameter slices that go together.

Stands between the axis algebra, which finds the axes, and everything that uses them (optimizer, cutting, report).
"""

from __future__ import annotations

import functools
import html
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from .axes import Algebra, Dim, Mark
from .modeling_oto import OTOError, named_tensors
from .reasons import INSIDE, LONELY, STAYS, UNMADE, UNREAD, UNUSED, lift

Role = Literal["producer", "consumer", "statistic"]

SOME = " (some positions)"


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


Width = tuple[int, tuple[tuple[int, float], ...]]  # positions, and how many of them one ZIG of an (axis, n) takes


class Work(NamedTuple):
    """An amount, of parameters or MACs, as a sum of products of widths that a cut makes smaller."""

    factors: np.ndarray  # (terms, k), which widths each term multiplies; the last one is 1
    times: np.ndarray  # (terms,), what is no width of any axis
    full: np.ndarray  # (widths,)
    lost: np.ndarray  # (widths, axes), what one ZIG of an axis takes

    @classmethod
    def of(cls, terms: Iterable[Sequence[Width]], axes: int) -> Work:
        """The sum of the products of the given widths."""
        times: Counter[tuple[Width, ...]] = Counter()
        for term in terms:
            cut = tuple(sorted(width for width in term if width[1]))
            times[cut] += math.prod(n for n, zigs in term if not zigs)
        widths = {width: i for i, width in enumerate(dict.fromkeys(w for cut in times for w in cut))}
        longest = max(map(len, times), default=0)
        factors = np.full((len(times), longest), len(widths))
        for row, cut in zip(factors, times, strict=True):
            row[: len(cut)] = [widths[w] for w in cut]
        lost = np.zeros((len(widths), axes))
        for (_, zigs), i in widths.items():
            for axis, n in zigs:
                lost[i, axis] = n
        return cls(factors, np.array([*times.values()], float), np.array([n for n, _ in widths], float), lost)

    def left(self, gone: np.ndarray) -> float:
        """How much is left without so many ZIGs of every axis, (axes,)."""
        widths = np.append(self.full - self.lost @ gone, 1.0)
        return float(self.times @ widths[self.factors].prod(1))

    @property
    def alone(self) -> np.ndarray:
        """What one ZIG of every axis takes with it when it is the first to go, (axes,).

        A term a * b without n of the positions of a is (1 - n / a) of itself.
        """
        axes_of_width: list[list[tuple[int, float]]] = [[] for _ in range(len(self.full) + 1)]  # the last width is 1
        for width, axis in zip(*np.nonzero(self.lost), strict=True):
            axes_of_width[width].append((axis, 1 - self.lost[width, axis] / self.full[width]))
        terms = self.times * np.append(self.full, 1.0)[self.factors].prod(1)
        alone = np.zeros(self.lost.shape[1])
        for term, widths in zip(terms, self.factors, strict=True):
            stays: dict[int, float] = {}  # axis -> the fraction of the term that is left without one of its ZIGs
            for width in widths:
                for axis, fraction in axes_of_width[width]:
                    stays[axis] = stays.get(axis, 1.0) * fraction
            for axis, fraction in stays.items():
                alone[axis] += term * (1 - fraction)
        return alone


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
    pinned: Mapping[str, str]
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
        rows = self._rows()
        width = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [self._title()]
        for name, kind, *numbers in rows:
            right = "  ".join(f"{n:>{w}}" for n, w in zip(numbers, width[2:], strict=True))
            lines.append(f"  {name:{width[0]}}  {kind:{width[1]}}  {right}")
        pins = [line for why, names in self._pins() for line in (f"  {why}", f"      {names}")]
        return "\n".join(lines + (["", PINNED, *pins] if pins else []))

    def _repr_html_(self) -> str:
        """The same in a notebook."""
        pins = as_html([(PINNED, ""), *self._pins()])
        return f"<p>{self._title()}</p>{as_html(self._rows())}<details><summary>pinned</summary>{pins}</details>"

    def _title(self) -> str:
        return f"{len(self.axes)} prunable axes, {self.num_zigs:,} ZIGs"

    def _rows(self) -> list[tuple[str, ...]]:
        families: dict[tuple[str, str, int], list[PrunableAxis]] = {}
        for axis in self.axes:
            families.setdefault((fold(axis.name), axis.kind, axis.size), []).append(axis)
        rows = [("axis", "kind", "ZIGs", "parameters", "MACs")]
        total = (self.work.left(np.zeros(len(self.axes))) if self.work else 0) or 1
        for (_, kind, size), axes in families.items():
            params, macs = size * sum(a.params for a in axes), size * sum(a.macs for a in axes)
            share = f"{100 * macs / total:.0f} %"
            rows.append((_together([a.name for a in axes]), kind, f"{len(axes)} x {size}", f"{params:,}", share))
        return rows

    def _pins(self) -> list[tuple[str, str]]:
        """(why and what would lift it, what it keeps whole)."""
        reasons: dict[str, dict[str, list[str]]] = {}
        for name, why in self.pinned.items():
            why = re.sub(r" in [\w.]*$", "", why.removesuffix(SOME))
            reasons.setdefault(why, {}).setdefault(fold(name), []).append(name)
        pins = []
        for why, found in reasons.items():
            names = [_together(names) for names in found.values()]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            pins.append((f"{why} ({lift(why)})", f"{', '.join(names[:3])}{more}"))
        return pins

    def to_dict(self) -> dict[str, Any]:
        """Plain data for machines."""
        axes = []
        for axis in self.axes:
            given = [{k: v for k, v in vars(m).items() if v is not None} for m in axis.members]
            members = [m | {"index": m["index"].tolist()} if "index" in m else m for m in given]
            scales = [[s.param, *s.power.as_integer_ratio(), s.offset] for s in axis.scales]
            axes.append(vars(axis) | {"members": members, "scales": scales})
        return {"axes": axes, "pinned": dict(self.pinned)}


PINNED = "pinned (kept whole), why, and what would lift it"


def as_html(rows: Iterable[Sequence[str]]) -> str:
    """Rows of text as an HTML table, the first one its head.

    Example:
        >>> as_html([("axis", "ZIGs"), ("a<b>", "4")])
        '<table><tr><th>axis</th><th>ZIGs</th></tr><tr><td>a&lt;b&gt;</td><td>4</td></tr></table>'
    """
    tags = itertools.chain(["th"], itertools.repeat("td"))
    lines = ("".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in row) for tag, row in zip(tags, rows, strict=False))
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


_NUMBER = r"(?<=\.)\d+(?=\.)"


def fold(name: str) -> str:
    """A name with its layer numbers folded: axes of layers of equal structure share it.

    Example:
        >>> fold("encoder.layer.11.query.weight[0]")
        'encoder.layer.*.query.weight[0]'
    """
    return re.sub(_NUMBER, "*", name)


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


def _together(names: Sequence[str]) -> str:
    """Names of one fold as one: "layer.{0..11}.query.weight[0]"."""
    numbers = zip(*(re.findall(_NUMBER, name) for name in names), strict=True)
    result = fold(names[0])
    for column in numbers:
        found = sorted({int(n) for n in column})
        whole = len(found) > 2 and found == list(range(found[0], found[-1] + 1))
        some = f"{found[0]}..{found[-1]}" if whole else ",".join(map(str, found))
        result = result.replace("*", str(found[0]) if len(found) == 1 else f"{{{some}}}", 1)
    return result


# solving -------------------------------------------------------------------------------------------


def solve(
    algebra: Algebra, sources: Mapping[str, Sequence[Dim]], buffers: Container[str] = ()
) -> tuple[ZIGPartition, np.ndarray]:
    """Solves the algebra into prunable axes, leaf by leaf.

    Args:
        sources: the dimensions of every parameter and buffer.
        buffers: which of them are buffers.

    Returns:
        axes and pins; the number of the ZIG that every index id belongs to, -1 for none, shape (count,).

    Pins spread through the products; of the factors that are still free the outermost goes (heads, not head_dim) and
    the inner ones are pinned; then a product is as good as an equation. Classes with the same members form one axis.
    """
    _spread_marks(algebra)
    for dims in sources.values():
        for leaf in (leaf for dim in dims for leaf in dim):
            if not (algebra.marks[leaf.ids] & (Mark.PRODUCER | Mark.CONSUMER | Mark.FOLLOWER)).any():
                algebra.pin_ids(leaf.ids, UNUSED)
    root = algebra.roots()
    reason = _earliest(root, algebra.pins)
    reason[0] = algebra.reason(STAYS)  # id 0 is pinned
    _settle_products(algebra, root, reason)
    reason = _earliest(algebra.roots(), reason[root])
    return _axes(algebra, sources, buffers, reason)


def _earliest(root: np.ndarray, pins: np.ndarray) -> np.ndarray:
    """The smallest reason given to any id of a class, at its root; 0 for a free class."""
    reason = np.zeros(len(root), np.int32)
    given = np.flatnonzero(pins)
    reason[root[given]] = np.iinfo(np.int32).max
    np.minimum.at(reason, root[given], pins[given])
    return reason


def _along(vector: np.ndarray, k: int, ndim: int) -> np.ndarray:
    return vector.reshape([-1 if i == k else 1 for i in range(ndim)])


def _spread_marks(algebra: Algebra) -> None:
    """What is known of a product is known of its factors, and the other way round."""
    marks, spread = algebra.marks, Mark.PRODUCER | Mark.CONSUMER | Mark.NOT_ZERO
    for product in [*algebra.products, *reversed(algebra.products)]:
        for k, factor in enumerate(product.factors):
            others = tuple(i for i in range(product.parent.ndim) if i != k)
            marks[factor] |= np.bitwise_or.reduce(marks[product.parent], axis=others) & spread
        for k, factor in enumerate(product.factors):
            marks[product.parent] |= _along(marks[factor], k, product.parent.ndim) & spread


def _settle_products(algebra: Algebra, root: np.ndarray, reason: np.ndarray) -> None:
    """Spreads pins through the products and pins all free factors of each but the outermost, which it then equals."""
    products = [(root[p.parent], [root[f] for f in p.factors]) for p in algebra.products]
    inner = algebra.reason(INSIDE)

    def spread() -> None:
        count = -1
        while count < np.count_nonzero(reason):
            count = np.count_nonzero(reason)
            for parent, factors in products:
                for k, factor in enumerate(factors):
                    why = reason[parent].max(axis=tuple(i for i in range(parent.ndim) if i != k))
                    new = (why > 0) & (reason[factor] == 0)
                    reason[factor[new]] = why[new]
                why = [_along(reason[f], k, parent.ndim) for k, f in enumerate(factors)]
                stay = functools.reduce(np.logical_and, [w > 0 for w in why]) & (reason[parent] == 0)
                # the outermost factor that is no inner position says why: heads that stay keep all of their positions
                said = functools.reduce(lambda a, b: np.where(a == inner, b, a), why)
                reason[parent[stay]] = np.broadcast_to(said, parent.shape)[stay]

    def free(factors: list[np.ndarray]) -> list[int]:
        return [k for k, factor in enumerate(factors) if (reason[factor] == 0).any()]

    spread()
    for _, factors in products:
        for k in free(factors)[1:]:
            reason[factors[k][reason[factors[k]] == 0]] = inner
    spread()  # what is free gets less only: no product has two free factors again
    expanded = np.zeros(len(root), bool)
    np.logical_or.at(expanded, root, (algebra.marks & Mark.EXPANDED) > 0)
    for product, (parent, factors) in zip(algebra.products, products, strict=True):
        for k in free(factors):
            if any(expanded[f].any() for i, f in enumerate(factors) if i != k):
                algebra.marks[product.factors[k]] |= Mark.SHARED
            ids = _along(product.factors[k], k, parent.ndim)
            algebra.union(product.parent, np.broadcast_to(ids, parent.shape))


def _axes(
    algebra: Algebra, sources: Mapping[str, Sequence[Dim]], buffers: Container[str], reason: np.ndarray
) -> tuple[ZIGPartition, np.ndarray]:
    root = algebra.roots()
    marks = np.zeros(algebra.count, np.uint16)
    np.bitwise_or.at(marks, root, algebra.marks)
    made, used = np.zeros(algebra.count, bool), np.zeros(algebra.count, bool)
    dims: list[tuple[str, int, Role, np.ndarray]] = []
    for name in sources:
        for d, leaf in ((d, leaf) for d, dim in enumerate(sources[name]) for leaf in dim):
            raw, roots = algebra.marks[leaf.ids], root[leaf.ids]
            role: Role = "producer" if (raw & Mark.PRODUCER).any() else "consumer"
            if name in buffers or (raw & Mark.FOLLOWER).any():
                role = "statistic"
            dims.append((name, d, role, roots))
            made[roots] |= role == "producer"
            used[roots] |= name not in buffers and bool((raw & Mark.CONSUMER).any())

    reason[~made & (reason == 0)] = algebra.reason(UNMADE)
    reason[~used & (reason == 0)] = algebra.reason(UNREAD)
    rng = np.random.default_rng(0)
    signature = np.zeros(algebra.count, np.uint64)
    for _, _, _, roots in dims:
        which, counts = np.unique(roots[reason[roots] == 0], return_counts=True)
        signature[which] += rng.integers(1, 1 << 63, dtype=np.uint64) * counts.astype(np.uint64)
    classes = np.flatnonzero(signature)  # roots are the smallest ids, so this is the order of the first parameter
    _, firsts, group = np.unique(signature[classes], return_index=True, return_inverse=True)
    order = np.argsort(firsts[group], kind="stable")
    groups = np.split(classes[order], np.flatnonzero(np.diff(firsts[group][order])) + 1)
    reason[[ids[0] for ids in groups if len(ids) == 1]] = algebra.reason(LONELY)
    groups = [ids for ids in groups if len(ids) > 1]
    starts = np.cumsum([0, *map(len, groups)])
    zig_of = np.full(algebra.count, -1, np.int32)
    for ids, start in zip(groups, starts, strict=False):
        zig_of[ids] = np.arange(start, start + len(ids))
    members: list[list[Member]] = [[] for _ in groups]
    pinned = {}
    for name, d, role, roots in dims:
        zig = zig_of[roots]
        axis = np.searchsorted(starts, zig, side="right") - 1  # -1 for those that stay
        if (axis < 0).any() and name not in buffers:
            first = int(reason[roots[axis < 0]][0])
            pinned[f"{name}[{d}]"] = algebra.reasons[first] + ("" if (axis < 0).all() else SOME)
        for a in np.unique(axis[axis >= 0]):
            where = np.flatnonzero(axis == a)
            order = where[np.argsort(zig[where], kind="stable")]
            members[a].append(_member(name, d, role, order.reshape(len(groups[a]), -1)))
    axes, names = [], Counter()
    for ids, found in zip(groups, members, strict=True):
        makers = [m for m in found if m.role == "producer"]
        first = next((m for m in makers if len(sources[m.param]) > 1), makers[0])
        name = f"{first.param}[{first.dim}]"
        names[name] += 1
        name += f"#{names[name]}" if names[name] > 1 else ""
        known = marks[ids[0]]
        kind = "channels" if known & Mark.CHANNELS else "units"
        if known & Mark.HEADS:
            kind = "kv_groups" if known & Mark.SHARED else "heads"
        elif known & Mark.GROUPS:
            kind = "groups"
        zero_path = not (marks[ids] & Mark.NOT_ZERO).any()
        multiple = 8 if known & Mark.EXPERTS else 1
        axes.append(PrunableAxis(name, kind, len(ids), tuple(found), multiple=multiple, zero_path=zero_path))
    return ZIGPartition(tuple(axes), pinned), zig_of[root]


def _member(name: str, dim: int, role: Role, index: np.ndarray) -> Member:
    """A member by its positions (size, k), as an even stride where it is one."""
    size, k = index.shape
    start = int(index[0, 0])
    inner = next((i for i in range(1, k) if index[0, i] != start + i), k)
    even = Member(name, dim, role, start, k // inner, inner)
    is_even = k % inner == 0 and np.array_equal(even.positions(size), index)
    return even if is_even else Member(name, dim, role, index=index)
