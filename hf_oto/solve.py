"""From the solved algebra to prunable axes: which positions go together, and why the others stay.

Worked example: an attention layer views 768 channels as (12 heads, 64). The product says that channel 64 h + d is
head h, position d. Nothing pins either factor, so the outermost, the heads, stays free, and the 64 positions are
pinned: heads go as a whole. Then the product is an equation, every head equals its 64 channels, and q, k, v and the
output's columns, all viewed alike, are one axis of 12 ZIGs.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Container, Mapping, Sequence

import numpy as np

from .axes import Algebra, Dim, Mark
from .reasons import INSIDE, LONELY, STAYS, UNMADE, UNREAD, UNUSED
from .zigs import Member, PrunableAxis, Role, ZIGPartition


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
            why = algebra.reasons[int(reason[roots[axis < 0]][0])]
            pinned[f"{name}[{d}]"] = why if (axis < 0).all() else why.partly()
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
