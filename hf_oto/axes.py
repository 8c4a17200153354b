"""The axis algebra: what it means that two tensor dimensions are the same.

Every position of every tensor dimension has an index id, and positions with equal ids are cut together. The rules
(rules/) unify, pin and factor dimensions; solve.py solves the result into prunable axes.

Worked example: w of shape (2, 12) gets the ids 1, 2 along its rows and 3 to 14 along its columns. x of shape (5, 12)
is an input: its ids are all 0, the id of what can never be removed. In x @ w.T the columns of x meet those of w, so
ids 3 to 14 are pinned. The last dimension of the result has the ids 1, 2. It is then added to y of shape (5, 2), whose
last dimension has the ids 15, 16: now 1 and 15 are one class, and 2 and 16 are another.

A dimension may be a product. If columns with the ids 3 to 14 are viewed as (3, 4), they get the factors 17 to 19 and
20 to 23, and a `Product` says that id 3 + 4 i + j is removed if and only if 17 + i or 20 + j is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from typing import NamedTuple

import numpy as np

from .reasons import FACTORS, FIXED, Reason

ID = np.int32  # of index ids: a model has a few million
Ids = np.ndarray
ROOM = 1 << 12  # the number of ids that a new algebra has room for


class Mark:
    """What is known of an index id, as bits."""

    PRODUCER = 1  # a parameter dimension with this id makes the position
    CONSUMER = 2  # a parameter dimension with this id reads the position
    NOT_ZERO = 4  # the position is read where zero producers have not made it zero
    HEADS = 8  # activations are multiplied by activations at each position: attention
    EXPANDED = 16  # one of several positions that hold the same
    GROUPS = 32  # a group of a convolution or normalisation
    SHARED = 64  # other factors of its product are EXPANDED: a key-value head, which serves several queries
    CHANNELS = 128  # a channel of a convolution
    EXPERTS = 256  # of a weight that is one of several in a stack
    NORMED = 512  # a norm is taken over it
    FOLLOWER = 1024  # of a parameter dimension that is cut with the position, but must not be zeroed


class Leaf(NamedTuple):
    """One factor of a dimension of a tensor."""

    ids: Ids  # (n,), the index id of every position
    zero: bool  # whether the tensor is exactly zero at removed positions


Dim = tuple[Leaf, ...]  # the row-major product of its leaves; () is a dimension of size 1


class Product(NamedTuple):
    """Parent (i, j, ...) is removed if and only if one of factor[0][i], factor[1][j], ... is."""

    parent: np.ndarray  # (n0, n1, ...)
    factors: tuple[np.ndarray, ...]  # (n0,), (n1,), ...


def size(dim: Dim) -> int:
    """Number of positions of a dimension."""
    return math.prod(len(leaf.ids) for leaf in dim)


def with_zero(dim: Dim, zero: bool) -> Dim:
    """The same positions, with another claim on what removed ones hold."""
    leaves = [Leaf(leaf.ids, zero) for leaf in dim]
    return tuple(leaves)


def _fixed_leaf(n: int, zero: bool) -> Leaf:
    """A leaf of n positions that can't be removed."""
    ids = np.zeros(n, ID)
    return Leaf(ids, zero)


def _positions_in(blocks: np.ndarray, size_of_block: int) -> np.ndarray:
    """The positions of whole blocks, one block after the other, (blocks * size_of_block,)."""
    starts = blocks[:, None] * size_of_block
    positions = starts + np.arange(size_of_block)  # (blocks, size_of_block)
    return positions.reshape(-1)


def _doubled(array: np.ndarray) -> np.ndarray:
    """An array with as many zeros behind it, so that making room costs constant time for each id."""
    room = np.zeros_like(array)
    return np.append(array, room)


class Algebra:
    """Union-find over index ids, with pins, marks and products.

    Attributes:
        count: the number of ids. Id 0 is the position that can never be removed.
        reasons: the reasons of pins, by their numbers; number 0 stands for no reason.
        products: all products so far, in the order in which they were made.
    """

    def __init__(self) -> None:
        # arrays with an element for each id, and room for more
        self._parent = np.zeros(ROOM, ID)
        self._pin = np.zeros(ROOM, np.int32)  # number of a reason
        self._mark = np.zeros(ROOM, np.uint16)
        self.count = 1
        self.reasons = [Reason("")]
        self._reason_of: dict[Reason, int] = {}
        self.products: list[Product] = []
        # ids that were split or merged before are split or merged into the same ids again
        self._factors_of: dict[tuple, tuple[Ids, ...]] = {}  # the bytes of the parent, sizes -> factors
        self._parent_of: dict[tuple, Ids] = {}  # the bytes of each factor -> parent

    def copy(self) -> Algebra:
        """An independent copy: solving the copy leaves this algebra as it is."""
        twin = Algebra()
        for name, value in vars(self).items():
            setattr(twin, name, copy(value))
        return twin

    # ids -------------------------------------------------------------------------------------------

    def new(self, n: int, zero: bool = False, marks: int = 0) -> Leaf:
        """A leaf of n fresh ids."""
        start = self.count
        self.count += n
        while self.count > len(self._parent):
            self._parent = _doubled(self._parent)
            self._pin = _doubled(self._pin)
            self._mark = _doubled(self._mark)
        ids = np.arange(start, self.count, dtype=ID)
        self._parent[start : self.count] = ids
        self._mark[start : self.count] = marks
        return Leaf(ids, zero)

    def fixed(self, n: int) -> Dim:
        """A dimension of n positions that can't be removed (an input's, an index's)."""
        if n == 1:
            return ()
        return (_fixed_leaf(n, zero=False),)

    def find(self, ids: Ids) -> Ids:
        """The root of each id's class, which is the smallest id of the class."""
        root = self._parent[ids]
        while not np.array_equal(above := self._parent[root], root):
            root = above
        self._parent[ids] = root
        return root

    def union(self, a: Ids, b: Ids) -> None:
        """Joins the classes of a[i] and b[i], for every i. Id 0 must be in neither."""
        while True:
            root_a = self.find(a)
            root_b = self.find(b)
            different = root_a != root_b
            if not different.any():
                return
            # A root may get several new parents here, of which numpy keeps the last one written. In reversed order
            # that is mostly the smallest, so that few rounds are needed.
            root_a = root_a[different][::-1]
            root_b = root_b[different][::-1]
            smaller = np.minimum(root_a, root_b)
            larger = np.maximum(root_a, root_b)
            self._parent[larger] = smaller

    def pin(self, dim: Dim, why: Reason) -> None:
        """Pins a dimension: no position of it may be removed."""
        for leaf in dim:
            self.pin_ids(leaf.ids, why)

    def reason(self, why: Reason) -> int:
        """The number of a reason; of several reasons for one position, the one with the lowest number is shown."""
        if why not in self._reason_of:
            self._reason_of[why] = len(self.reasons)
            self.reasons.append(why)
        return self._reason_of[why]

    def pin_ids(self, ids: Ids, why: Reason) -> None:
        """Pins ids."""
        reason = self.reason(why)
        pins = self._pin[ids]
        is_better = (pins == 0) | (pins > reason)
        is_new = is_better & (ids != 0)  # id 0 stays anyway, and has no reason of its own
        newly_pinned = ids[is_new]
        self._pin[newly_pinned] = reason

    def mark(self, dim: Dim, marks: int) -> None:
        """Adds marks to every id of dim."""
        for leaf in dim:
            self._mark[leaf.ids] |= marks

    # dimensions ------------------------------------------------------------------------------------

    def factor(self, leaf: Leaf, sizes: Sequence[int]) -> Dim:
        """Splits a leaf of n = prod(sizes) positions into row-major factors and records the product."""
        sizes = tuple(n for n in sizes if n != 1)
        if len(sizes) == 0:
            return ()
        if len(sizes) == 1:  # nothing is split
            return (leaf,)
        if not leaf.ids.any():  # factors of what can't be removed can't be removed either
            return tuple(_fixed_leaf(n, leaf.zero) for n in sizes)
        key = (leaf.ids.tobytes(), sizes)
        factors = self._factors_of.get(key)
        if factors is None:
            factors = tuple(self.new(n).ids for n in sizes)
            self._factors_of[key] = factors
            parent = leaf.ids.reshape(sizes)
            self.products.append(Product(parent, factors))
        return tuple(Leaf(ids, leaf.zero) for ids in factors)

    def merge(self, dim: Dim) -> Leaf:
        """One leaf for a whole dimension of more than one position: the inverse of `factor`."""
        if len(dim) == 1:
            return dim[0]
        zero = all(leaf.zero for leaf in dim)
        factors = tuple(leaf.ids for leaf in dim)
        num_free = sum(map(np.any, factors))
        if num_free <= 1:
            # only one factor has ids that are not 0: each position has the id of its place in that factor
            ids = sum(np.ix_(*factors))  # (n0, n1, ...)
            return Leaf(ids.reshape(-1), zero)
        key = tuple(ids.tobytes() for ids in factors)
        if key not in self._parent_of:
            sizes = tuple(map(len, factors))
            n = math.prod(sizes)
            parent = self.new(n).ids
            self._parent_of[key] = parent
            self._factors_of[parent.tobytes(), sizes] = factors  # factoring the merged leaf gives its factors back
            product = Product(parent.reshape(sizes), factors)
            self.products.append(product)
        return Leaf(self._parent_of[key], zero)

    def align(self, a: Dim, b: Dim, why: str) -> tuple[Dim, Dim] | None:
        """Unifies two dimensions of equal size and returns both, refined to the same leaf boundaries.

        Args:
            why: the reason that is given to positions of one dimension where the other dimension has to stay.

        Returns:
            The two dimensions. None if the factors of one don't fit those of the other; then both are pinned.
        """
        rest_a = list(a)
        rest_b = list(b)
        aligned_a: list[Leaf] = []
        aligned_b: list[Leaf] = []
        while rest_a and rest_b:
            size_a = len(rest_a[0].ids)
            size_b = len(rest_b[0].ids)
            if size_a % size_b and size_b % size_a:
                self.pin(a, FACTORS)
                self.pin(b, FACTORS)
                return None
            if size_a > size_b:
                sizes = (size_b, size_a // size_b)
                rest_a[:1] = self.factor(rest_a[0], sizes)
            elif size_b > size_a:
                sizes = (size_a, size_b // size_a)
                rest_b[:1] = self.factor(rest_b[0], sizes)
            leaf_a = rest_a.pop(0)
            leaf_b = rest_b.pop(0)
            self._unify(leaf_a.ids, leaf_b.ids, why)
            aligned_a.append(leaf_a)
            aligned_b.append(leaf_b)
        return tuple(aligned_a), tuple(aligned_b)

    def _unify(self, a: Ids, b: Ids, why: str) -> None:
        """Joins a[i] and b[i]; where one of the two is id 0, the other one is pinned instead."""
        if np.array_equal(a, b):
            return
        stays = (a == 0) | (b == 0)
        if stays.any():
            other = np.maximum(a, b)  # the one that isn't 0
            self.pin_ids(other[stays], why)
        self.union(a[~stays], b[~stays])

    def reshape(self, dims: Sequence[Dim], shape: Sequence[int]) -> list[Dim]:
        """The dimensions of a tensor of the same elements in row-major order under another shape."""
        if 0 in shape:
            return [self.fixed(n) for n in shape]
        leaves = [leaf for dim in dims for leaf in dim]
        result: list[Dim] = []
        for size_needed in shape:
            dim: list[Leaf] = []
            while size_needed > 1:
                n = len(leaves[0].ids)
                if size_needed % n == 0:
                    dim.append(leaves.pop(0))
                    size_needed //= n
                elif n % size_needed == 0:
                    sizes = (size_needed, n // size_needed)
                    leaves[:1] = self.factor(leaves[0], sizes)
                else:  # neither divides the other: (4, 6) to (3, 8) goes by way of 24
                    first_two = tuple(leaves[:2])
                    leaves[:2] = [self.merge(first_two)]
            result.append(tuple(dim))
        return result

    def take(self, dim: Dim, index: np.ndarray) -> Dim:
        """The dimension that indexing `dim` with known positions gives, shape (m,)."""
        if len(index) == 1:
            # a single position is read by its number: it must be there, at that place, after every cut
            self.pin(dim, FIXED)
            return ()
        if not dim:
            return self.fixed(len(index))
        if len(dim) > 1:
            outermost, *inner = dim
            inner_size = size(inner)
            blocks = index[::inner_size] // inner_size  # positions of the outermost leaf
            if np.array_equal(index, _positions_in(blocks, inner_size)):
                taken = self.take((outermost,), blocks)
                return (*taken, *inner)
        leaf = self.merge(dim)
        return (Leaf(leaf.ids[index], leaf.zero),)

    def cat(self, dims: Sequence[Dim]) -> Dim:
        """Dimensions laid one after the other."""
        if len(dims) == 1:
            return dims[0]
        one_position = (_fixed_leaf(1, zero=False),)
        leaves = [self.merge(dim or one_position) for dim in dims]
        ids = np.concatenate([leaf.ids for leaf in leaves])
        zero = all(leaf.zero for leaf in leaves)
        return (Leaf(ids, zero),)

    # what the solver reads -------------------------------------------------------------------------

    def roots(self) -> np.ndarray:
        """The root of every id's class, shape (count,)."""
        return self.find(np.arange(self.count, dtype=ID))

    @property
    def pins(self) -> np.ndarray:
        """The reason given to every id itself, an index into `reasons`; 0 for none. Shape (count,)."""
        return self._pin[: self.count]

    @property
    def marks(self) -> np.ndarray:
        """The marks given to every id itself, shape (count,), writable."""
        return self._mark[: self.count]
