"""From the filled algebra to prunable axes: which positions go together, and why the others stay.

`solve` decides for every class of index ids whether it may be removed, and then collects classes with the same
parameters into one `PrunableAxis`.

Worked example: an attention layer views 768 channels as (12 heads, 64). The product says that channel 64 h + d is
head h, position d. Nothing pins either factor, so the outermost factor, the heads, stays free, and the 64 positions
are pinned: heads go as a whole. Now every head equals its 64 channels, as if an equation said so. The rows of q, k
and v and the columns of the output are all viewed in this way, so together they are one axis of 12 ZIGs.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .axes import Algebra, Dim, Mark
from .reasons import INSIDE, LONELY, STAYS, UNMADE, UNREAD, UNUSED, Reason
from .zigs import Member, PrunableAxis, Role, ZIGPartition

# a product with the roots of its ids in the place of the ids: parent (n0, n1, ...), factors (n0,), (n1,), ...
RootedProduct = tuple[np.ndarray, list[np.ndarray]]


class ParamLeaf(NamedTuple):
    """One leaf of one dimension of a parameter or buffer."""

    param: str
    dim: int
    role: Role
    roots: np.ndarray  # (n,), the class of every position
    is_read: bool  # a parameter that consumes the leaf


def solve(
    algebra: Algebra, sources: Mapping[str, Sequence[Dim]], buffers: Container[str] = ()
) -> tuple[ZIGPartition, np.ndarray]:
    """Solves the algebra into prunable axes.

    First pins spread through the products. Of the factors of a product that are then still free, the outermost may
    go (heads) and the inner ones are pinned (positions in a head). With one free factor left, each product is an
    equation between its parent and that factor. Classes that have the same members form one axis.

    Args:
        algebra: filled by the rules; it is changed here.
        sources: parameter or buffer -> its dimensions.
        buffers: the names in `sources` that are buffers.

    Returns:
        The partition, with its axes and pins, and the number of the ZIG that every index id belongs to, shape
        (count,), where -1 stands for an id that stays.
    """
    _spread_marks(algebra)
    _pin_unused(algebra, sources)
    root = algebra.roots()
    reason = _reason_of_class(root, algebra.pins)
    reason[0] = algebra.reason(STAYS)  # id 0 is the position that can never be removed
    _settle_products(algebra, root, reason)
    # settling has joined classes, so that the reasons move to the new roots
    new_root = algebra.roots()
    reason = _reason_of_class(new_root, reason[root])

    leaves = _param_leaves(algebra, sources, buffers, new_root)
    _pin_without_weight(algebra, leaves, reason)
    classes_of_axis = _classes_of_axis(algebra, leaves, reason)
    zig_of_class = np.full(algebra.count, -1, np.int32)
    start = 0
    for classes in classes_of_axis:
        zig_of_class[classes] = np.arange(start, start + len(classes))
        start += len(classes)

    members, pinned = _members_and_pins(algebra, leaves, buffers, classes_of_axis, zig_of_class, reason)
    axes = _prunable_axes(algebra, sources, classes_of_axis, members, new_root)
    return ZIGPartition(axes, pinned), zig_of_class[new_root]


def _reason_of_class(root: np.ndarray, pins: np.ndarray) -> np.ndarray:
    """The smallest reason that any id of a class was given, stored at the root; 0 for a free class."""
    reason = np.zeros(len(root), np.int32)
    pinned_ids = np.flatnonzero(pins)
    reason[root[pinned_ids]] = np.iinfo(np.int32).max
    np.minimum.at(reason, root[pinned_ids], pins[pinned_ids])
    return reason


def _along(vector: np.ndarray, k: int, ndim: int) -> np.ndarray:
    """A vector (n,) with `ndim` dimensions, of which dimension k has size n and the others have size 1."""
    shape = [1] * ndim
    shape[k] = -1
    return vector.reshape(shape)


def _all_but(k: int, ndim: int) -> tuple[int, ...]:
    return tuple(i for i in range(ndim) if i != k)


# marks and pins spread -----------------------------------------------------------------------------


def _spread_marks(algebra: Algebra) -> None:
    """Gives the marks of a parent to its factors, and the marks of the factors to their parent."""
    marks = algebra.marks
    spreading = Mark.PRODUCER | Mark.CONSUMER | Mark.NOT_ZERO
    # forwards marks reach the products that come later, backwards those that come earlier
    for product in [*algebra.products, *reversed(algebra.products)]:
        ndim = product.parent.ndim
        for k, factor in enumerate(product.factors):
            marks_of_parent = np.bitwise_or.reduce(marks[product.parent], axis=_all_but(k, ndim))  # (len(factor),)
            marks[factor] |= marks_of_parent & spreading
        for k, factor in enumerate(product.factors):
            marks[product.parent] |= _along(marks[factor], k, ndim) & spreading


def _pin_unused(algebra: Algebra, sources: Mapping[str, Sequence[Dim]]) -> None:
    """Pins the leaves of parameters and buffers that no rule has marked."""
    used = Mark.PRODUCER | Mark.CONSUMER | Mark.FOLLOWER
    for dims in sources.values():
        for dim in dims:
            for leaf in dim:
                if not (algebra.marks[leaf.ids] & used).any():
                    algebra.pin_ids(leaf.ids, UNUSED)


def _settle_products(algebra: Algebra, root: np.ndarray, reason: np.ndarray) -> None:
    """Leaves each product one free factor at most, and makes the parent equal to that factor.

    Args:
        root: the class of every id, (count,).
        reason: the reason of every class, at its root, (count,); pins are added in place.
    """
    products = []
    for product in algebra.products:
        factors = [root[factor] for factor in product.factors]
        products.append((root[product.parent], factors))
    inside = algebra.reason(INSIDE)

    _spread_pins(products, reason, inside)
    for _, factors in products:
        inner_factors = _free_factors(factors, reason)[1:]  # all but the outermost free one
        for k in inner_factors:
            free = reason[factors[k]] == 0
            reason[factors[k][free]] = inside
    # more pins only take free factors away: after this, too, no product has two of them
    _spread_pins(products, reason, inside)

    expanded = np.zeros(len(root), bool)
    np.logical_or.at(expanded, root, (algebra.marks & Mark.EXPANDED) > 0)
    for product, (parent, factors) in zip(algebra.products, products, strict=True):
        for k in _free_factors(factors, reason):
            if any(expanded[factors[i]].any() for i in _all_but(k, len(factors))):
                algebra.marks[product.factors[k]] |= Mark.SHARED
            ids_of_factor = _along(product.factors[k], k, parent.ndim)
            algebra.union(product.parent, np.broadcast_to(ids_of_factor, parent.shape))


def _free_factors(factors: Sequence[np.ndarray], reason: np.ndarray) -> list[int]:
    """The numbers of the factors of which some position is not pinned."""
    return [k for k, factor in enumerate(factors) if (reason[factor] == 0).any()]


def _spread_pins(products: Sequence[RootedProduct], reason: np.ndarray, inside: int) -> None:
    """Pins a factor's position where any of its parents is pinned, and a parent where all of its factors are.

    Args:
        reason: the reason of every class, at its root, (count,); changed in place.
        inside: the number of the reason that positions inside a group have.
    """
    num_pinned = -1
    while num_pinned < np.count_nonzero(reason):
        num_pinned = np.count_nonzero(reason)
        for parent, factors in products:
            for k, factor in enumerate(factors):
                reason_of_parent = reason[parent].max(axis=_all_but(k, parent.ndim))  # (len(factor),)
                newly_pinned = (reason_of_parent > 0) & (reason[factor] == 0)
                reason[factor[newly_pinned]] = reason_of_parent[newly_pinned]

            reasons = [_along(reason[factor], k, parent.ndim) for k, factor in enumerate(factors)]
            all_pinned = functools.reduce(np.logical_and, [why > 0 for why in reasons])
            newly_pinned = all_pinned & (reason[parent] == 0)
            # "a position inside a head" says little: the parent takes it only if no other factor has a better reason
            reason_of_parent = functools.reduce(lambda a, b: np.where(a == inside, b, a), reasons)
            reason[parent[newly_pinned]] = np.broadcast_to(reason_of_parent, parent.shape)[newly_pinned]


# classes become axes -------------------------------------------------------------------------------


def _param_leaves(
    algebra: Algebra, sources: Mapping[str, Sequence[Dim]], buffers: Container[str], root: np.ndarray
) -> list[ParamLeaf]:
    """All leaves of parameters and buffers, in their order, with their roles."""
    leaves = []
    for name, dims in sources.items():
        for d, dim in enumerate(dims):
            for leaf in dim:
                marks = algebra.marks[leaf.ids]
                role: Role = "producer" if (marks & Mark.PRODUCER).any() else "consumer"
                if name in buffers or (marks & Mark.FOLLOWER).any():
                    role = "statistic"
                is_read = name not in buffers and bool((marks & Mark.CONSUMER).any())
                leaves.append(ParamLeaf(name, d, role, root[leaf.ids], is_read))
    return leaves


def _pin_without_weight(algebra: Algebra, leaves: Iterable[ParamLeaf], reason: np.ndarray) -> None:
    """Pins the classes that no parameter produces or that no parameter consumes: cutting them would save nothing."""
    produced = np.zeros(algebra.count, bool)
    consumed = np.zeros(algebra.count, bool)
    for leaf in leaves:
        produced[leaf.roots] |= leaf.role == "producer"
        consumed[leaf.roots] |= leaf.is_read
    reason[~produced & (reason == 0)] = algebra.reason(UNMADE)
    reason[~consumed & (reason == 0)] = algebra.reason(UNREAD)


def _classes_of_axis(algebra: Algebra, leaves: Iterable[ParamLeaf], reason: np.ndarray) -> list[np.ndarray]:
    """The free classes of every axis, each (size,): those that occur equally often in the same leaves.

    An axis of a single class is pinned. The axes come in the order of their first parameters.
    """
    # every leaf has a random number, and the signature of a class is the sum over the leaves that it occurs in:
    # two classes have the same signature if and only if (but for a chance of 2 ** -64) they have the same leaves
    rng = np.random.default_rng(0)
    signature = np.zeros(algebra.count, np.uint64)
    for leaf in leaves:
        free_roots = leaf.roots[reason[leaf.roots] == 0]
        classes, counts = np.unique(free_roots, return_counts=True)
        signature[classes] += rng.integers(1, 1 << 63, dtype=np.uint64) * counts.astype(np.uint64)

    classes = np.flatnonzero(signature)  # in the order of the first parameter, as a root is the smallest id
    _, first_class, axis_of_class = np.unique(signature[classes], return_index=True, return_inverse=True)
    first_class_of_axis = first_class[axis_of_class]  # (classes,), the same for all classes of an axis
    order = np.argsort(first_class_of_axis, kind="stable")
    starts = np.flatnonzero(np.diff(first_class_of_axis[order])) + 1
    groups = np.split(classes[order], starts)

    reason[[group[0] for group in groups if len(group) == 1]] = algebra.reason(LONELY)
    return [group for group in groups if len(group) > 1]


def _members_and_pins(
    algebra: Algebra,
    leaves: Iterable[ParamLeaf],
    buffers: Container[str],
    classes_of_axis: Sequence[np.ndarray],
    zig_of_class: np.ndarray,
    reason: np.ndarray,
) -> tuple[list[list[Member]], dict[str, Reason]]:
    """The members of every axis, and the pins: "parameter[dim]" -> the reason."""
    sizes = [len(classes) for classes in classes_of_axis]
    starts = np.cumsum([0, *sizes])  # the first ZIG of every axis
    members: list[list[Member]] = [[] for _ in sizes]
    pinned = {}
    for leaf in leaves:
        zigs = zig_of_class[leaf.roots]  # (n,)
        axis_of_position = np.searchsorted(starts, zigs, side="right") - 1  # (n,), -1 for positions that stay
        stays = axis_of_position < 0
        if stays.any() and leaf.param not in buffers:
            why = algebra.reasons[int(reason[leaf.roots[stays]][0])]
            pinned[f"{leaf.param}[{leaf.dim}]"] = why if stays.all() else why.partly()
        for axis in np.unique(axis_of_position[~stays]):
            positions = np.flatnonzero(axis_of_position == axis)
            by_zig = positions[np.argsort(zigs[positions], kind="stable")]
            index = by_zig.reshape(sizes[axis], -1)  # (size, positions of one ZIG)
            members[axis].append(Member.at(leaf.param, leaf.dim, leaf.role, index))
    return members, pinned


def _prunable_axes(
    algebra: Algebra,
    sources: Mapping[str, Sequence[Dim]],
    classes_of_axis: Sequence[np.ndarray],
    members_of_axis: Sequence[Sequence[Member]],
    root: np.ndarray,
) -> tuple[PrunableAxis, ...]:
    marks_of_class = np.zeros(algebra.count, np.uint16)
    np.bitwise_or.at(marks_of_class, root, algebra.marks)
    axes = []
    times_named: Counter[str] = Counter()
    for classes, members in zip(classes_of_axis, members_of_axis, strict=True):
        producers = [m for m in members if m.role == "producer"]
        # a matrix names an axis better than a bias, which may stand before it
        matrices = [m for m in producers if len(sources[m.param]) > 1]
        first = matrices[0] if matrices else producers[0]
        name = f"{first.param}[{first.dim}]"
        times_named[name] += 1
        if times_named[name] > 1:  # two axes on one dimension: a concatenation, say
            name = f"{name}#{times_named[name]}"
        marks = marks_of_class[classes]
        axes.append(
            PrunableAxis(
                name,
                _kind(marks[0]),
                len(classes),
                tuple(members),
                multiple=8 if marks[0] & Mark.EXPERTS else 1,
                zero_path=not (marks & Mark.NOT_ZERO).any(),
            )
        )
    return tuple(axes)


def _kind(marks: int) -> str:
    if marks & Mark.HEADS:
        return "kv_groups" if marks & Mark.SHARED else "heads"
    if marks & Mark.GROUPS:
        return "groups"
    return "channels" if marks & Mark.CHANNELS else "units"
