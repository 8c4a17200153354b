"""From the filled algebra to prunable axes: which positions go together, and why the others stay.

`solve` decides for every class of index ids whether it may be removed. Then it collects classes with the same
parameters into one `PrunableAxis`.

Worked example: an attention layer views 768 channels as (12 heads, 64). The product says that channel 64 h + d is
head h, position d. Nothing pins either factor, so the outermost factor, the heads, stays free, and the 64 positions
are pinned: heads go as a whole. Then each head is equal to its 64 channels, as if an equation said so. The rows of q,
k and v and the columns of the output are all viewed in this way, so together they are one axis of 12 ZIGs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .axes import Algebra, Dim, Mark, Product
from .reasons import INSIDE, LONELY, STAYS, UNMADE, UNREAD, UNUSED, Reason
from .zigs import Member, PrunableAxis, Role, ZIGPartition

Sources = Mapping[str, Sequence[Dim]]  # parameter or buffer -> its dimensions
Array = np.ndarray


class ParamLeaf(NamedTuple):
    """One leaf of one dimension of a parameter or buffer."""

    param: str
    dim: int
    role: Role
    roots: Array  # (n,), the class of every position
    is_read: bool  # a parameter that consumes the leaf


def solve(algebra: Algebra, sources: Sources, buffers: Container[str] = ()) -> tuple[ZIGPartition, Array]:
    """Solves the algebra into prunable axes.

    First pins spread through the products. If several factors of a product are then still free, the outermost stays
    free (heads) and the inner ones are pinned (positions in a head). With one free factor left, each product is an
    equation between its parent and that factor. Classes that have the same members form one axis.

    Args:
        algebra: filled by the rules; it is changed here.
        sources: parameter or buffer -> its dimensions.
        buffers: the names in `sources` that are buffers.

    Returns:
        The partition, with its axes and pins, and the number of the ZIG that every index id belongs to, shape
        (count,), where -1 stands for an id that stays.
    """
    # in this file, `root` is (count,): the class of every id; `reason` is (count,): the reason of every class, stored
    # at its root, 0 while the class is free
    _spread_marks(algebra)
    _pin_unused(algebra, sources)
    root = algebra.roots()
    reason = _reason_of_class(root, algebra.pins)
    reason[0] = algebra.reason(STAYS)  # id 0 is the position that can never be removed
    _settle_products(algebra, root, reason)
    # settling has joined classes, so the reasons move to the new roots
    reason_of_id = reason[root]
    root = algebra.roots()
    reason = _reason_of_class(root, reason_of_id)

    leaves = _param_leaves(algebra, sources, buffers, root)
    _pin_without_weight(algebra, leaves, reason)
    classes_of_axis = _classes_of_axis(algebra, leaves, reason)
    zig_of_class = np.full(algebra.count, -1, np.int32)
    start = 0  # the first ZIG of the axis
    for classes in classes_of_axis:
        stop = start + len(classes)
        zig_of_class[classes] = np.arange(start, stop)
        start = stop

    sizes = [len(classes) for classes in classes_of_axis]
    members = _members(leaves, sizes, zig_of_class)
    axes = _prunable_axes(algebra, sources, classes_of_axis, members, root)
    pinned = _pinned(algebra, leaves, buffers, zig_of_class, reason)
    return ZIGPartition(axes, pinned), zig_of_class[root]


def _reason_of_class(root: Array, pins: Array) -> Array:
    """The smallest reason that any id of a class was given, stored at the root; 0 for a free class."""
    reason = np.zeros(len(root), np.int32)
    pinned_ids = np.flatnonzero(pins)
    pinned_roots = root[pinned_ids]
    reason[pinned_roots] = np.iinfo(np.int32).max
    np.minimum.at(reason, pinned_roots, pins[pinned_ids])
    return reason


def _along(vector: Array, k: int, ndim: int) -> Array:
    """A vector (n,) with `ndim` dimensions, of which dimension k has size n and the others have size 1."""
    shape = [1] * ndim
    shape[k] = -1
    return vector.reshape(shape)


def _all_but(k: int, ndim: int) -> tuple[int, ...]:
    return tuple(i for i in range(ndim) if i != k)


def _any_has(algebra: Algebra, ids: Array, marks: int) -> bool:
    """Whether any of these ids has any of these marks."""
    found = algebra.marks[ids] & marks
    return bool(found.any())


# marks and pins spread -----------------------------------------------------------------------------


def _spread_marks(algebra: Algebra) -> None:
    """Gives the marks of a parent to its factors, and the marks of the factors to their parent."""
    marks = algebra.marks
    spreading = Mark.PRODUCER | Mark.CONSUMER | Mark.NOT_ZERO
    # forwards marks reach the products that come later, backwards those that come earlier
    for product in [*algebra.products, *reversed(algebra.products)]:
        parent, factors = product
        for k, factor in enumerate(factors):
            other_dims = _all_but(k, parent.ndim)
            marks_of_parent = np.bitwise_or.reduce(marks[parent], axis=other_dims)  # (len(factor),)
            marks[factor] |= marks_of_parent & spreading
        for k, factor in enumerate(factors):
            marks_of_factor = _along(marks[factor], k, parent.ndim)
            marks[parent] |= marks_of_factor & spreading


def _pin_unused(algebra: Algebra, sources: Sources) -> None:
    """Pins the leaves of parameters and buffers that no rule has marked."""
    used = Mark.PRODUCER | Mark.CONSUMER | Mark.FOLLOWER
    for dims in sources.values():
        for dim in dims:
            for leaf in dim:
                if not _any_has(algebra, leaf.ids, used):
                    algebra.pin_ids(leaf.ids, UNUSED)


def _settle_products(algebra: Algebra, root: Array, reason: Array) -> None:
    """Pins all but one of the free factors of each product, and makes the parent equal to the free factor.

    Pins are added to `reason` in place.
    """
    products = []
    for product in algebra.products:
        parent = root[product.parent]
        factors = tuple(root[factor] for factor in product.factors)
        products.append(Product(parent, factors))
    inside = algebra.reason(INSIDE)

    _spread_pins(products, reason, inside)
    for _, factors in products:
        inner_factors = _free_factors(factors, reason)[1:]  # all but the outermost free one
        for k in inner_factors:
            factor = factors[k]
            is_free = reason[factor] == 0  # (len(factor),)
            reason[factor[is_free]] = inside
    # more pins only take free factors away: after this, too, no product has two of them
    _spread_pins(products, reason, inside)

    is_expanded = np.zeros(len(root), bool)  # (count,), stored at the roots
    has_mark = (algebra.marks & Mark.EXPANDED) > 0
    np.logical_or.at(is_expanded, root, has_mark)
    for product in algebra.products:
        parent, factors = product
        roots_of_factors = [root[factor] for factor in factors]
        for k in _free_factors(roots_of_factors, reason):
            ids_of_factor = factors[k]
            for i in _all_but(k, parent.ndim):
                roots_of_other = roots_of_factors[i]
                if is_expanded[roots_of_other].any():
                    algebra.marks[ids_of_factor] |= Mark.SHARED
            along_parent = _along(ids_of_factor, k, parent.ndim)
            equal_to_parent = np.broadcast_to(along_parent, parent.shape)
            algebra.union(parent, equal_to_parent)


def _free_factors(factors: Sequence[Array], reason: Array) -> list[int]:
    """The numbers of the factors that have a position that is not pinned."""
    free_factors = []
    for k, factor in enumerate(factors):
        is_free = reason[factor] == 0
        if is_free.any():
            free_factors.append(k)
    return free_factors


def _spread_pins(products: Sequence[Product], reason: Array, inside: int) -> None:
    """Pins each factor position that has a pinned parent, and each parent position of which all factors are pinned.

    Args:
        reason: the reason of every class; changed in place.
        inside: the number of the reason that positions inside a group have.
    """
    num_pinned = -1
    # each round may pin what the next round spreads further
    while num_pinned < np.count_nonzero(reason):
        num_pinned = np.count_nonzero(reason)
        for product in products:
            _pin_factors(product, reason)
            _pin_parent(product, reason, inside)


def _pin_factors(product: Product, reason: Array) -> None:
    parent, factors = product
    for k, factor in enumerate(factors):
        other_dims = _all_but(k, parent.ndim)
        reason_of_parent = reason[parent].max(axis=other_dims)  # (len(factor),)
        is_free = reason[factor] == 0
        newly_pinned = is_free & (reason_of_parent > 0)
        reason[factor[newly_pinned]] = reason_of_parent[newly_pinned]


def _pin_parent(product: Product, reason: Array, inside: int) -> None:
    parent, factors = product
    all_pinned = np.ones(parent.shape, bool)
    # "a position inside a head" says little: the parent takes it only if no other factor has a better reason
    reason_of_factors = np.full(parent.shape, inside, np.int32)
    for k, factor in enumerate(factors):
        reason_of_factor = _along(reason[factor], k, parent.ndim)
        all_pinned &= reason_of_factor > 0
        says_little = reason_of_factors == inside
        reason_of_factors = np.where(says_little, reason_of_factor, reason_of_factors)
    is_free = reason[parent] == 0
    newly_pinned = is_free & all_pinned
    reason[parent[newly_pinned]] = reason_of_factors[newly_pinned]


# classes become axes -------------------------------------------------------------------------------


def _param_leaves(algebra: Algebra, sources: Sources, buffers: Container[str], root: Array) -> list[ParamLeaf]:
    """All leaves of parameters and buffers, in their order, with their roles."""
    leaves = []
    for name, dims in sources.items():
        is_buffer = name in buffers
        for d, dim in enumerate(dims):
            for leaf in dim:
                role = _role(algebra, leaf.ids, is_buffer)
                is_consumer = _any_has(algebra, leaf.ids, Mark.CONSUMER)
                is_read = is_consumer and not is_buffer
                roots = root[leaf.ids]
                param_leaf = ParamLeaf(name, d, role, roots, is_read)
                leaves.append(param_leaf)
    return leaves


def _role(algebra: Algebra, ids: Array, is_buffer: bool) -> Role:
    if is_buffer or _any_has(algebra, ids, Mark.FOLLOWER):
        return "statistic"
    if _any_has(algebra, ids, Mark.PRODUCER):
        return "producer"
    return "consumer"


def _pin_without_weight(algebra: Algebra, leaves: Iterable[ParamLeaf], reason: Array) -> None:
    """Pins the classes that no parameter produces or that no parameter consumes: cutting them would save nothing."""
    produced = np.zeros(algebra.count, bool)
    consumed = np.zeros(algebra.count, bool)
    for leaf in leaves:
        produced[leaf.roots] |= leaf.role == "producer"
        consumed[leaf.roots] |= leaf.is_read
    unmade = ~produced & (reason == 0)
    reason[unmade] = algebra.reason(UNMADE)
    unread = ~consumed & (reason == 0)
    reason[unread] = algebra.reason(UNREAD)


def _classes_of_axis(algebra: Algebra, leaves: Iterable[ParamLeaf], reason: Array) -> list[Array]:
    """The free classes of every axis, each (size,): those that occur equally often in the same leaves.

    An axis of a single class is pinned. The axes come in the order of their first parameters.
    """
    # every leaf has a random number, and the signature of a class is the sum over the leaves that it occurs in:
    # two classes have the same signature if and only if (but for a chance of 2 ** -64) they have the same leaves
    rng = np.random.default_rng(0)
    signature = np.zeros(algebra.count, np.uint64)
    for leaf in leaves:
        is_free = reason[leaf.roots] == 0
        free_roots = leaf.roots[is_free]
        classes, counts = np.unique(free_roots, return_counts=True)
        number_of_leaf = rng.integers(1, 1 << 63, dtype=np.uint64)
        signature[classes] += number_of_leaf * counts.astype(np.uint64)  # modulo 2 ** 64

    classes = np.flatnonzero(signature)  # in the order of the first parameter, as a root is the smallest id
    _, first_class, axis_of_class = np.unique(signature[classes], return_index=True, return_inverse=True)
    first_class_of_axis = first_class[axis_of_class]  # (classes,), the same for all classes of an axis
    order = np.argsort(first_class_of_axis, kind="stable")
    steps = np.diff(first_class_of_axis[order])  # not 0 where the next axis begins
    starts = np.flatnonzero(steps) + 1

    classes_of_axis = []
    lonely = algebra.reason(LONELY)
    for classes_of_one in np.split(classes[order], starts):
        if len(classes_of_one) > 1:
            classes_of_axis.append(classes_of_one)
        else:
            reason[classes_of_one] = lonely
    return classes_of_axis


def _members(leaves: Iterable[ParamLeaf], sizes: Sequence[int], zig_of_class: Array) -> list[list[Member]]:
    """The members of every axis.

    Args:
        sizes: the number of ZIGs of every axis.
        zig_of_class: the ZIG of every class, -1 for one that stays, (count,).
    """
    starts = np.cumsum([0, *sizes])  # the first ZIG of every axis
    members: list[list[Member]] = [[] for _ in sizes]
    for leaf in leaves:
        zigs = zig_of_class[leaf.roots]  # (n,)
        axis_of_position = np.searchsorted(starts, zigs, side="right") - 1  # (n,), -1 for positions that stay
        for axis in np.unique(axis_of_position):
            if axis < 0:
                continue
            positions = np.flatnonzero(axis_of_position == axis)
            order = np.argsort(zigs[positions], kind="stable")
            by_zig = positions[order]
            # each ZIG of an axis has equally many positions of a leaf, as the classes of an axis occur equally often
            index = by_zig.reshape(sizes[axis], -1)  # (size, positions of one ZIG)
            member = Member.at(leaf.param, leaf.dim, leaf.role, index)
            members[axis].append(member)
    return members


def _pinned(
    algebra: Algebra,
    leaves: Iterable[ParamLeaf],
    buffers: Container[str],
    zig_of_class: Array,
    reason: Array,
) -> dict[str, Reason]:
    """The pins of parameters: "parameter[dim]" -> the reason of its first position that stays."""
    pinned = {}
    for leaf in leaves:
        zigs = zig_of_class[leaf.roots]
        stays = zigs < 0  # (n,)
        if leaf.param in buffers or not stays.any():
            continue
        first_root = leaf.roots[stays][0]
        number = int(reason[first_root])
        why = algebra.reasons[number]
        if not stays.all():
            why = why.partly()
        name = _name_of_dim(leaf)
        pinned[name] = why
    return pinned


def _name_of_dim(part: ParamLeaf | Member) -> str:
    return f"{part.param}[{part.dim}]"


def _prunable_axes(
    algebra: Algebra,
    sources: Sources,
    classes_of_axis: Sequence[Array],
    members_of_axis: Sequence[Sequence[Member]],
    root: Array,
) -> tuple[PrunableAxis, ...]:
    marks_of_class = np.zeros(algebra.count, np.uint16)
    np.bitwise_or.at(marks_of_class, root, algebra.marks)
    axes = []
    times_named: Counter[str] = Counter()
    for classes, members in zip(classes_of_axis, members_of_axis, strict=True):
        name = _name(members, sources)
        times_named[name] += 1
        if times_named[name] > 1:  # two axes on one dimension: a concatenation, say
            name = f"{name}#{times_named[name]}"
        marks = marks_of_class[classes]  # (size,)
        first_marks = marks[0]
        kind = _kind(first_marks)
        multiple = 8 if first_marks & Mark.EXPERTS else 1
        is_not_zero = (marks & Mark.NOT_ZERO) > 0  # (size,)
        zero_path = not is_not_zero.any()
        axis = PrunableAxis(name, kind, len(classes), tuple(members), multiple=multiple, zero_path=zero_path)
        axes.append(axis)
    return tuple(axes)


def _name(members: Sequence[Member], sources: Sources) -> str:
    """The name of an axis: "parameter[dim]" of its first producer."""
    producers = [member for member in members if member.role == "producer"]
    for member in producers:
        ndim = len(sources[member.param])
        if ndim > 1:  # a matrix names an axis better than a bias, which may stand before it
            return _name_of_dim(member)
    return _name_of_dim(producers[0])


def _kind(marks: int) -> str:
    if marks & Mark.HEADS:
        return "kv_groups" if marks & Mark.SHARED else "heads"
    if marks & Mark.GROUPS:
        return "groups"
    if marks & Mark.CHANNELS:
        return "channels"
    return "units"
