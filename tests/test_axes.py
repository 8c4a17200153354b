"""The axis algebra against brute force: positions are followed through random chains, cuts are enumerated."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_oto.axes import Algebra, Leaf, Mark, size
from hf_oto.reasons import Reason
from hf_oto.solve import solve

laws = settings(derandomize=True, max_examples=60, deadline=None)


# tensors twice: as dimensions of the algebra, and as an array that a mask travels through


def source(algebra, shape):
    """Dimensions of a parameter whose every position could go."""
    return [(algebra.new(n, zero=True, marks=Mark.PRODUCER | Mark.CONSUMER),) if n > 1 else () for n in shape]


def zigs_of(algebra, *sources):
    """The ZIG of every id, -1 for those that stay."""
    return solve(algebra.copy(), {f"w{i}": dims for i, dims in enumerate(sources)})


def kept(dims, zig_of, removed):
    """The mask of a tensor: a position stays if the ids of all its leaves do; `removed` is bool (num_zigs + 1,)."""
    mask = np.ones((), bool)
    for dim in dims:
        vector = np.ones(1, bool)
        for leaf in dim:
            alive = ~removed[zig_of[leaf.ids]]
            vector = (vector[:, None] & alive).reshape(-1)
        mask = mask[..., None] & vector
    return mask


def shapes_of(n):
    """Every way to write n as a product of up to four factors > 1, in order."""
    found = [(n,)] if n > 1 else []
    for first in range(2, n):
        if n % first == 0:
            found += [(first, *rest) for rest in shapes_of(n // first) if len(rest) < 4]
    return found


def apply(algebra, dims, array, op, argument):
    """One step of a chain on both; `argument` is a number in [0, 1) that chooses among what is possible."""
    shape = array.shape
    d = int(argument * len(shape))
    order = np.random.default_rng(int(argument * 1e6))
    if op == "reshape":
        options = shapes_of(array.size) or [()]
        new = options[int(argument * len(options))]
        return algebra.reshape(dims, new), array.reshape(new)
    if op == "permute":
        axes = order.permutation(len(shape))
        return [dims[a] for a in axes], array.transpose(axes)
    if op == "roll" or op == "flip":
        index = np.arange(shape[d])
        index = index[::-1] if op == "flip" else np.roll(index, 1 + int(argument * 97) % shape[d])
        dims = list(dims)
        dims[d] = algebra.take(dims[d], index)
        return dims, array.take(index, d)
    if op == "swap" and shape[d] >= 2:  # split, and cat the other way round
        at = int(order.integers(1, shape[d]))
        dims = list(dims)
        pieces = [algebra.take(dims[d], index) for index in (np.arange(at, shape[d]), np.arange(at))]
        dims[d] = algebra.cat(pieces)
        return dims, np.roll(array, -at, d)
    if op == "expand" and array.size <= 24:
        return [(algebra.new(2),), *dims], np.broadcast_to(array, (2, *shape))
    return dims, array


OPS = ["reshape", "permute", "roll", "flip", "swap", "expand"]
chains = st.lists(st.tuples(st.sampled_from(OPS), st.floats(0, 0.999)), max_size=7)
start = st.sampled_from([(12,), (4, 6), (2, 3, 4), (8,), (6, 1, 2), (3, 5)])


def run(algebra, dims, array, chain):
    for op, argument in chain:
        dims, array = apply(algebra, dims, array, op, argument)
    return dims, array


@laws
@given(start, chains, st.integers(0, 9))
def test_masks_travel_through_any_chain(shape, chain, seed):
    """What the algebra says is left of a tensor is what is left of it, position by position."""
    algebra = Algebra()
    dims = source(algebra, shape)
    places = np.arange(math.prod(shape)).reshape(shape)
    after, array = run(algebra, dims, places, chain)
    assert tuple(map(size, after)) == array.shape
    _, zig_of = zigs_of(algebra, dims)
    removed = np.append(np.random.default_rng(seed).random(zig_of.max() + 1) < 0.4, False)
    before = kept(dims, zig_of, removed).reshape(-1)
    assert np.array_equal(kept(after, zig_of, removed), before[array])


def test_masks_find_a_wrong_step():
    """Negative control: the same law with another shift does not hold."""
    algebra = Algebra()
    dims = source(algebra, (12,))
    after = [algebra.take(dims[0], np.roll(np.arange(12), 1))]
    _, zig_of = zigs_of(algebra, dims)
    assert zig_of.max() == 11
    removed = np.append(np.arange(12) % 3 == 0, False)
    assert np.array_equal(kept(after, zig_of, removed), np.roll(kept(dims, zig_of, removed), 1))
    assert not np.array_equal(kept(after, zig_of, removed), np.roll(kept(dims, zig_of, removed), 2))


def inverse(algebra, dims, array, chain):
    """The chain and then its steps undone, last first."""
    states = [(dims, array)]
    for op, argument in chain:
        states.append(apply(algebra, *states[-1], op, argument))
    dims, array = states[-1]
    for (op, argument), (_, before) in reversed(list(zip(chain, states[:-1], strict=True))):
        if op == "reshape":
            dims, array = algebra.reshape(dims, before.shape), array.reshape(before.shape)
        elif op == "permute":
            axes = np.argsort(np.random.default_rng(int(argument * 1e6)).permutation(len(before.shape)))
            dims, array = [dims[a] for a in axes], array.transpose(axes)
        elif array.shape == before.shape and not np.array_equal(array, before):
            d = int(argument * len(before.shape))
            row = np.arange(before.shape[d])
            moved = {
                "flip": row[::-1],
                "roll": np.roll(row, 1 + int(argument * 97) % len(row)),
                "swap": np.roll(row, -int(np.random.default_rng(int(argument * 1e6)).integers(1, max(len(row), 2)))),
            }[op]
            dims = list(dims)
            dims[d] = algebra.take(dims[d], np.argsort(moved))
            array = array.take(np.argsort(moved), d)
    return dims, array


def chain_of(*ops):
    return st.lists(st.tuples(st.sampled_from(ops), st.floats(0, 0.999)), max_size=5)


@laws
@given(start, chain_of("reshape", "permute") | chain_of("permute", "roll", "flip") | chain_of("reshape", "swap"))
def test_a_chain_undone_adds_nothing(shape, chain):
    """x and undo(chain(x)) are the same dimensions: adding them elementwise loses nothing of the chain's partition.

    It can win something: a piece of one block, read alone, keeps its block but not what is inside of it.
    """
    algebra = Algebra()
    dims = source(algebra, shape)
    places = np.arange(math.prod(shape)).reshape(shape)
    back, array = inverse(algebra, dims, places, chain)
    assert np.array_equal(array, places)
    alone = [zigs_of(algebra, dims)[1][leaf.ids] for dim in dims for leaf in dim]
    for a, b in zip(dims, back, strict=True):
        assert algebra.align(a, b, Reason("it meets what stays")) is not None
    together = [zigs_of(algebra, dims)[1][leaf.ids] for dim in dims for leaf in dim]
    for a, b in zip(alone, together, strict=True):
        assert np.array_equal(a, b) if "swap" not in dict(chain) else ((a < 0) | (b >= 0)).all()


@laws
@given(st.sampled_from([12, 24, 30]), st.data())
def test_reshape_back_gives_the_same_leaves(n, data):
    algebra = Algebra()
    dims = source(algebra, (n, 5))
    there = data.draw(st.sampled_from(shapes_of(n)))
    parts = algebra.reshape(dims, (*there, 5))
    assert algebra.reshape(parts, (*there, 5)) == parts
    flat = algebra.reshape(parts, (n * 5,))
    assert [leaf for dim in flat for leaf in dim] == [leaf for dim in parts for leaf in dim]
    again = algebra.reshape(algebra.reshape(flat, (n, 5)), (*there, 5))
    for a, b in zip(parts, again, strict=True):
        assert all(x.ids is y.ids for x, y in zip(a, b, strict=True))
    twice = algebra.reshape(dims, (*there, 5))  # the same leaf in the same factors: no second product
    assert all(x.ids is y.ids for a, b in zip(parts, twice, strict=True) for x, y in zip(a, b, strict=True))
    assert len(algebra.products) <= max(len(there) - 1, 0)


@laws
@given(st.lists(st.sampled_from([2, 3, 4]), min_size=2, max_size=3))
def test_merge_then_factor_is_the_identity(sizes):
    algebra = Algebra()
    dim = tuple(algebra.new(n, zero=True) for n in sizes)
    merged = algebra.merge(dim)
    assert len(merged.ids) == math.prod(sizes) and len(np.unique(merged.ids)) == math.prod(sizes)
    assert algebra.merge(dim) is not merged and np.array_equal(algebra.merge(dim).ids, merged.ids)
    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(algebra.factor(merged, sizes), dim, strict=True))
    assert len(algebra.products) == 1


@laws
@given(st.sampled_from([(2, 3), (3, 4), (2, 2, 3)]))
def test_factor_then_merge_is_the_same_axis(sizes):
    """Merging gives new ids, but solving finds them to be the old ones."""
    algebra = Algebra()
    (dim,) = source(algebra, (math.prod(sizes),))
    merged = algebra.merge(algebra.factor(dim[0], sizes))
    _, zig_of = zigs_of(algebra, [dim])
    assert (zig_of[merged.ids] >= 0).all()
    assert np.array_equal(zig_of[merged.ids], zig_of[dim[0].ids])


def test_what_stays_is_not_factored():
    algebra = Algebra()
    assert algebra.fixed(1) == ()
    (whole,) = algebra.fixed(6)
    assert [len(leaf.ids) for leaf in algebra.factor(whole, (2, 1, 3))] == [2, 3] and not algebra.products
    free = algebra.new(4)
    mixed = algebra.merge((Leaf(np.zeros(3, np.int64), False), free))
    assert np.array_equal(mixed.ids, np.tile(free.ids, 3)) and not algebra.products


def test_factors_that_do_not_fit_are_pinned():
    algebra = Algebra()
    a, b = ((algebra.new(2), algebra.new(6)) for _ in range(2))
    assert algebra.align(a, b, Reason("")) is not None
    assert algebra.align(a, (algebra.new(3), algebra.new(4)), Reason("")) is None
    assert (algebra.pins[np.concatenate([leaf.ids for leaf in a])] > 0).all()


@pytest.mark.parametrize("inner", [3, 4])
def test_whole_blocks_are_taken_from_the_outer_leaf(inner):
    """Heads picked out of (heads, head_dim) stay heads: no product of single positions is made."""
    algebra = Algebra()
    dim = (algebra.new(4, zero=True), algebra.new(inner, zero=True))
    taken = algebra.take(dim, np.concatenate([np.arange(inner) + inner * head for head in (2, 0)]))
    assert np.array_equal(taken[0].ids, dim[0].ids[[2, 0]]) and taken[1] is dim[1]
    assert algebra.take(dim, np.arange(inner, 2 * inner)) == dim[1:]
    assert (algebra.pins[dim[0].ids] > 0).all() and not algebra.pins[dim[1].ids].any()
    odd = algebra.take(dim, np.arange(1, inner + 1))
    assert len(odd) == 1 and size(odd) == inner


# union-find


@laws
@given(st.lists(st.tuples(st.lists(st.integers(1, 15), min_size=1, max_size=6), st.integers(0, 99)), max_size=8))
def test_unions_are_those_of_a_naive_twin(calls):
    algebra = Algebra()
    algebra.new(15)
    classes = [{i} for i in range(16)]
    for ids, seed in calls:
        a = np.array(ids)
        b = np.random.default_rng(seed).integers(1, 16, len(a))
        algebra.union(a, b)
        for x, y in zip(a, b, strict=True):
            both = next(c for c in classes if x in c) | next(c for c in classes if y in c)
            classes = [c for c in classes if not c & both] + [both]
    roots = algebra.roots()
    assert all(roots[i] == min(c) for c in classes for i in c)
    assert np.array_equal(algebra.copy().find(np.arange(16)), roots)


def test_a_copy_is_independent():
    algebra = Algebra()
    a, b = algebra.new(3), algebra.new(3)
    twin = algebra.copy()
    twin.union(a.ids, b.ids)
    twin.pin((a,), Reason("why"))
    twin.factor(twin.new(4), (2, 2))
    assert np.array_equal(algebra.roots(), np.arange(7)) and not algebra.pins.any()
    assert not algebra.products and algebra.reasons == [""]


def test_the_first_reason_stays():
    algebra = Algebra()
    leaf = algebra.new(3)
    algebra.pin_ids(leaf.ids[:1], Reason("first"))
    algebra.pin((leaf,), Reason("second"))
    assert [algebra.reasons[r] for r in algebra.pins[leaf.ids]] == ["first", "second", "second"]


# solving


def violations(algebra, removed):
    """How many constraints a set of removed ids, bool (count,), breaks: classes, pins, products."""
    roots = algebra.roots()
    broken = int((removed != removed[roots]).sum()) + int(removed[algebra.pins > 0].sum()) + int(removed[0])
    for parent, factors in algebra.products:
        any_factor = np.zeros(parent.shape, bool)
        for k, factor in enumerate(factors):
            any_factor |= removed[factor].reshape([-1 if i == k else 1 for i in range(parent.ndim)])
        broken += int((removed[parent] != any_factor).sum())
    return broken


@st.composite
def problems(draw):
    """An algebra with parameters that are viewed in several ways, unified and pinned at random."""
    algebra = Algebra()
    sources = [source(algebra, (draw(st.sampled_from([4, 6, 8, 12])),)) for _ in range(draw(st.integers(1, 3)))]
    views = []
    for (dim,) in sources:
        for _ in range(draw(st.integers(0, 2))):
            views += algebra.factor(dim[0], draw(st.sampled_from(shapes_of(size(dim)))))
    leaves = views + [leaf for (dim,) in sources for leaf in dim]
    for _ in range(draw(st.integers(0, 3))):
        a = leaves[draw(st.integers(0, len(leaves) - 1))]
        same = [leaf for leaf in leaves if len(leaf.ids) == len(a.ids)]
        b = same[draw(st.integers(0, len(same) - 1))]
        algebra.union(a.ids, b.ids[:: draw(st.sampled_from([1, -1]))])
    for _ in range(draw(st.integers(0, 1))):
        leaf = leaves[draw(st.integers(0, len(leaves) - 1))]
        algebra.pin_ids(leaf.ids[draw(st.integers(0, len(leaf.ids) - 1)) :], Reason("drawn"))
    return algebra, sources


@laws
@given(problems())
def test_every_zig_keeps_every_constraint_and_none_is_larger_than_it_must_be(problem):
    algebra, sources = problem
    solution, zig_of = zigs_of(algebra, *sources)
    count = zig_of.max() + 1
    assert count == sum(axis.size for axis in solution.axes)
    for chosen in itertools.chain(*(itertools.combinations(range(count), k) for k in (1, 2))):
        assert violations(algebra, np.isin(zig_of, chosen)) == 0
    roots = algebra.roots()
    for zig in range(min(count, 3)):
        classes = np.unique(roots[zig_of == zig])
        subsets = itertools.product([False, True], repeat=len(classes))
        for some in itertools.islice(subsets, 1, 255):
            removed = np.isin(roots, classes[np.array(some)])
            if removed.sum() < (zig_of == zig).sum():
                assert violations(algebra, removed) > 0


@laws
@given(problems())
def test_every_position_that_can_go_goes(problem):
    """Completeness, by brute force: of single positions of a leaf, those that can go with nothing else are ZIGs."""
    algebra, sources = problem
    _, zig_of = zigs_of(algebra, *sources)
    roots = algebra.roots()
    tied = np.concatenate([p.parent.reshape(-1) for p in algebra.products] or [np.zeros(0, int)])
    free = [i for (dim,) in sources for leaf in dim for i in leaf.ids if not np.isin(roots[tied], roots[i]).any()]
    possible = [i for i in free if violations(algebra, roots == roots[i]) == 0]
    alike = {}  # positions of the same members form an axis; one alone is none
    for i in np.unique(roots[possible]):
        counts = tuple(int((roots[leaf.ids] == i).sum()) for (dim,) in sources for leaf in dim)
        alike.setdefault(counts, []).append(i)
    expected = {i for ids in alike.values() for i in ids if len(ids) > 1}
    in_products = {roots[i] for i in np.flatnonzero(zig_of >= 0) if np.isin(roots[tied], roots[i]).any()}
    found = {roots[i] for i in np.flatnonzero(zig_of >= 0)} - in_products
    factors = {roots[i] for p in algebra.products for f in p.factors for i in f}
    assert expected - factors == found - factors


def test_solving_catches_a_broken_constraint():
    """Negative control of `violations`: a parent without its factor, a class in two halves, a pin."""
    algebra = Algebra()
    (dim,), (other,) = source(algebra, (6,)), source(algebra, (6,))
    heads, _ = algebra.factor(dim[0], (2, 3))
    algebra.union(dim[0].ids, other[0].ids)
    _, zig_of = zigs_of(algebra, [dim], [other])
    whole = zig_of == 0
    assert violations(algebra, whole) == 0
    for ids in (heads.ids[:1], dim[0].ids[:1], other[0].ids[1:2]):
        broken = whole.copy()
        broken[ids] = False
        assert violations(algebra, broken) > 0
    algebra.pin_ids(other[0].ids[:1], Reason("late"))
    assert violations(algebra, whole) > 0


def test_the_outermost_factor_goes():
    algebra = Algebra()
    (dim,) = source(algebra, (24,))
    heads, head_dim = algebra.factor(dim[0], (4, 6))
    solution, zig_of = zigs_of(algebra, [dim])
    (axis,) = solution.axes
    (member,) = axis.members
    assert (axis.size, member.start, member.outer, member.inner) == (4, 0, 1, 6)
    assert np.array_equal(zig_of[heads.ids], np.arange(4)) and (zig_of[head_dim.ids] == -1).all()
    algebra.pin((heads,), Reason("heads stay"))
    solution, _ = zigs_of(algebra, [dim])
    assert [(axis.size, axis.members[0].outer) for axis in solution.axes] == [(6, 4)]
