"""The axis algebra: what it means that two tensor dimensions are the same.

A dimension is an ordered list of leaves (row-major product), a leaf an array of index ids; equal ids are cut together.
The rules (rules.py) unify, pin and factor dimensions; zigs.py solves the result into prunable axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from typing import NamedTuple

import numpy as np

from .reasons import FACTORS, FIXED, Reason

ID = np.int32  # of index ids: a model has a few million


class Mark:
    """What is known of an index id, as bits."""

    PRODUCER = 1  # of a parameter dimension that makes it
    CONSUMER = 2  # of a parameter dimension that reads it
    NOT_ZERO = 4  # where it is read, zero producers have not made it zero
    HEADS = 8  # activations are multiplied position by position: attention
    EXPANDED = 16  # a dimension along which all is equal
    GROUPS = 32  # of a convolution or normalisation
    SHARED = 64  # other factors of its product were expanded: one for several
    CHANNELS = 128  # of a convolution
    EXPERTS = 256  # of weights that lie in a stack
    NORMED = 512  # a norm is taken over it
    FOLLOWER = 1024  # of a parameter dimension that is cut along, but must not be zero


class Leaf(NamedTuple):
    """Index ids of one factor of a dimension, shape (n,); `zero`: removed positions of the tensor are exactly zero."""

    ids: np.ndarray
    zero: bool


Dim = tuple[Leaf, ...]  # () is a dimension of size 1


class Product(NamedTuple):
    """Parent (i, j, ...) is removed if and only if one of factor[0][i], factor[1][j], ... is."""

    parent: np.ndarray  # (n0, n1, ...)
    factors: tuple[np.ndarray, ...]  # (n0,), (n1,), ...


def size(dim: Dim) -> int:
    """Number of positions of a dimension."""
    return math.prod(len(leaf.ids) for leaf in dim)


def with_zero(dim: Dim, zero: bool) -> Dim:
    """The same positions, with another claim on what removed ones hold."""
    return tuple(Leaf(leaf.ids, zero) for leaf in dim)


class Algebra:
    """Union-find over index ids with pins and product records. Id 0 is the position that can never be removed."""

    def __init__(self) -> None:
        self._parent = np.zeros(1 << 12, ID)
        self._pin = np.zeros(1 << 12, np.int32)  # index into reasons, 0: not pinned
        self._mark = np.zeros(1 << 12, np.uint16)
        self.count = 1
        self.reasons = [Reason("")]
        self._reason_of: dict[Reason, int] = {}
        self.products: list[Product] = []
        self._factored: dict[tuple[bytes, tuple[int, ...]], tuple[np.ndarray, ...]] = {}
        self._merged: dict[tuple[bytes, ...], np.ndarray] = {}

    def copy(self) -> Algebra:
        """An independent copy, to solve without spoiling this one."""
        twin = Algebra()
        vars(twin).update({name: copy(value) for name, value in vars(self).items()})
        return twin

    # ids -------------------------------------------------------------------------------------------

    def new(self, n: int, zero: bool = False, marks: int = 0) -> Leaf:
        """A leaf of n fresh ids."""
        start, self.count = self.count, self.count + n
        while self.count > len(self._parent):
            for array in ("_parent", "_pin", "_mark"):
                setattr(self, array, np.append(vars(self)[array], np.zeros_like(vars(self)[array])))
        ids = np.arange(start, self.count, dtype=ID)
        self._parent[start : self.count] = ids
        self._mark[start : self.count] = marks
        return Leaf(ids, zero)

    def fixed(self, n: int) -> Dim:
        """A dimension of n positions that can't be removed (an input's, an index's)."""
        return () if n == 1 else (Leaf(np.zeros(n, ID), False),)

    def find(self, ids: np.ndarray) -> np.ndarray:
        """The representative of each id's class: its smallest member."""
        root = self._parent[ids]
        while not np.array_equal(above := self._parent[root], root):
            root = above
        self._parent[ids] = root
        return root

    def union(self, a: np.ndarray, b: np.ndarray) -> None:
        """Makes positions of equal place in a and b one class. Both must be free of id 0."""
        while True:
            ra, rb = self.find(a), self.find(b)
            different = ra != rb
            if not different.any():
                return
            # of several writes to one root the last counts: reversed, that is mostly the smallest, and few rounds do
            ra, rb = ra[different][::-1], rb[different][::-1]
            self._parent[np.maximum(ra, rb)] = np.minimum(ra, rb)

    def pin(self, dim: Dim, why: Reason) -> None:
        """No position of dim may be removed."""
        for leaf in dim:
            self.pin_ids(leaf.ids, why)

    def reason(self, why: Reason) -> int:
        """The number of a reason; of several for one position the lowest is shown."""
        if why not in self._reason_of:
            self._reason_of[why] = len(self.reasons)
            self.reasons.append(why)
        return self._reason_of[why]

    def pin_ids(self, ids: np.ndarray, why: Reason) -> None:
        """`pin` for plain ids."""
        reason = self.reason(why)
        ids = ids[(ids != 0) & ((self._pin[ids] == 0) | (self._pin[ids] > reason))]
        self._pin[ids] = reason

    def mark(self, dim: Dim, marks: int) -> None:
        """Adds marks to every id of dim."""
        for leaf in dim:
            self._mark[leaf.ids] |= marks

    # dimensions ------------------------------------------------------------------------------------

    def factor(self, leaf: Leaf, sizes: Sequence[int]) -> Dim:
        """Splits a leaf of n = prod(sizes) positions into row-major factors and records the product."""
        sizes = tuple(s for s in sizes if s != 1)
        if len(sizes) <= 1:
            return (leaf,) if sizes else ()
        if not leaf.ids.any():
            return tuple(Leaf(np.zeros(s, ID), leaf.zero) for s in sizes)
        key = (leaf.ids.tobytes(), sizes)
        factors = self._factored.get(key)
        if factors is None:
            factors = self._factored[key] = tuple(self.new(s).ids for s in sizes)
            self.products.append(Product(leaf.ids.reshape(sizes), factors))
        return tuple(Leaf(f, leaf.zero) for f in factors)

    def merge(self, dim: Dim) -> Leaf:
        """One leaf for a whole dimension of more than one position: the inverse of `factor`."""
        if len(dim) == 1:
            return dim[0]
        zero, factors = all(leaf.zero for leaf in dim), tuple(leaf.ids for leaf in dim)
        if sum(map(np.any, factors)) <= 1:  # the others never go: a position goes with its one free factor
            return Leaf(sum(np.ix_(*factors)).reshape(-1), zero)
        key, sizes = tuple(ids.tobytes() for ids in factors), tuple(map(len, factors))
        if key not in self._merged:
            parent = self._merged[key] = self.new(math.prod(sizes)).ids
            self.products.append(Product(parent.reshape(sizes), factors))
            self._factored[parent.tobytes(), sizes] = factors
        return Leaf(self._merged[key], zero)

    def align(self, a: Dim, b: Dim, why: str) -> tuple[Dim, Dim] | None:
        """Unifies two dimensions of equal size and returns both, refined to the same leaf boundaries.

        None if their factors don't fit each other: both are pinned. `why`: for positions that meet one that stays.
        """
        left, right, pairs = list(a), list(b), []
        while left and right:
            na, nb = len(left[0].ids), len(right[0].ids)
            if na % nb and nb % na:
                self.pin((*a, *b), FACTORS)
                return None
            if na > nb:
                left[:1] = self.factor(left[0], (nb, na // nb))
            elif nb > na:
                right[:1] = self.factor(right[0], (na, nb // na))
            pairs.append((left.pop(0), right.pop(0)))
            x, y = (leaf.ids for leaf in pairs[-1])
            if not np.array_equal(x, y):
                stays = (x == 0) | (y == 0)
                if stays.any():
                    self.pin_ids(np.maximum(x, y)[stays], why)
                self.union(x[~stays], y[~stays])
        return tuple(x for x, _ in pairs), tuple(y for _, y in pairs)

    def reshape(self, dims: Sequence[Dim], shape: Sequence[int]) -> list[Dim]:
        """The dimensions of a tensor of the same elements in row-major order under another shape."""
        if 0 in shape:
            return [self.fixed(n) for n in shape]
        leaves = [leaf for dim in dims for leaf in dim]
        result: list[Dim] = []
        for need in shape:
            dim: list[Leaf] = []
            while need > 1:
                n = len(leaves[0].ids)
                if need % n == 0:
                    dim.append(leaves.pop(0))
                    need //= n
                elif n % need == 0:
                    leaves[:1] = self.factor(leaves[0], (need, n // need))
                else:
                    leaves[:2] = [self.merge(tuple(leaves[:2]))]
            result.append(tuple(dim))
        return result

    def take(self, dim: Dim, index: np.ndarray) -> Dim:
        """The dimension that indexing `dim` with known positions gives, shape (m,)."""
        if len(index) == 1:
            # One position of a dimension: it has to exist at that place ever after.
            self.pin(dim, FIXED)
            return ()
        if not dim:
            return self.fixed(len(index))
        inner = size(dim[1:])
        blocks = index[::inner] // inner
        if len(dim) > 1 and np.array_equal(index, (blocks[:, None] * inner + np.arange(inner)).reshape(-1)):
            return (*self.take(dim[:1], blocks), *dim[1:])
        leaf = self.merge(dim)
        return (Leaf(leaf.ids[index], leaf.zero),)

    def cat(self, dims: Sequence[Dim]) -> Dim:
        """Dimensions laid one after the other."""
        if len(dims) == 1:
            return dims[0]
        leaves = [self.merge(dim) if dim else Leaf(np.zeros(1, ID), False) for dim in dims]
        return (Leaf(np.concatenate([leaf.ids for leaf in leaves]), all(leaf.zero for leaf in leaves)),)

    # what the solver reads -------------------------------------------------------------------------

    def roots(self) -> np.ndarray:
        """The class of every id, shape (count,)."""
        return self.find(np.arange(self.count, dtype=ID))

    @property
    def pins(self) -> np.ndarray:
        """The reason given to every id itself, an index into `reasons`; 0 for none. Shape (count,)."""
        return self._pin[: self.count]

    @property
    def marks(self) -> np.ndarray:
        """The marks given to every id itself, shape (count,), writable."""
        return self._mark[: self.count]
