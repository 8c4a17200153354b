"""What the rules fill: the dimensions of every tensor of a trace; and the one table in which all rules stand.

A rule takes the state `Axes` and a call, unifies, contracts and pins dimensions of the operands, and returns the
dimensions of the results.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .. import reasons
from ..axes import Algebra, Dim, Leaf, Mark, size, with_zero
from ..reasons import Reason
from ..sizes import Ref
from ..trace import Call

# whether the result is zero at a position, given whether each of the two operands is zero there
both, either = operator.and_, operator.or_


def first(a: bool, b: bool) -> bool:
    """The result is zero where the first operand is."""
    return a


class Axes:
    """The dimensions of every tensor of a trace, filled in call order.

    Attributes:
        algebra: the union-find the dimensions live in.
        dims: value number -> its dimensions.
        calls: the calls that the outputs depend on.
        weights: value number -> how much of a weight it is: 2 for what depends on parameters and buffers only, 1 for
            parts of such that are chosen by the data (an expert's weights, say); activations have no entry.
        maker: value number -> the call that made it.
        aliases: value number -> the numbers of all tensors seen so far that share its memory, one set for all of them.
        layer: path of the module whose forward is running.
    """

    def __init__(self) -> None:
        self.algebra = Algebra()
        self.dims: dict[int, list[Dim]] = {}
        self.calls: list[Call] = []
        self.weights: dict[int, int] = {}
        self.maker: dict[int, Call] = {}
        self.aliases: dict[int, set[int]] = {}
        self.layer = ""

    def of(self, ref: Ref, ndim: int = 0) -> list[Dim]:
        """The dimensions of a tensor, as a new list, broadcast to `ndim` dimensions.

        A tensor that no call of the trace made (an input) can't be cut.
        """
        if ref.value not in self.dims:
            self.dims[ref.value] = self.fixed(ref.shape)
        return [()] * (ndim - len(ref.shape)) + self.dims[ref.value]

    def new(self, n: int, zero: bool = False, marks: int = 0) -> Dim:
        """A dimension of n fresh ids."""
        return (self.algebra.new(n, zero, marks),) if n > 1 else ()

    def fixed(self, shape: Sequence[int]) -> list[Dim]:
        """Dimensions that can't be cut."""
        return [self.algebra.fixed(n) for n in shape]

    def weight(self, ref: Ref) -> int:
        """How much of a weight a tensor is, see `weights`."""
        return self.weights.get(ref.value, 0)

    def why(self, reason: Reason) -> Reason:
        """A reason together with the layer that is running."""
        return reason.at(self.layer)

    def pin(self, dim: Dim, reason: Reason) -> None:
        """Pins a dimension for a reason in the layer that is running."""
        self.algebra.pin(dim, self.why(reason))

    def unify(self, a: Dim, b: Dim, zero: Callable[[bool, bool], bool] = both) -> Dim:
        """The common dimension of two operands of an elementwise op; size 1 broadcasts.

        Args:
            zero: whether the result is zero at a position, given whether the first and the second operand are.
        """
        if not a:
            return tuple(Leaf(leaf.ids, zero(False, leaf.zero)) for leaf in b)
        if not b:
            return tuple(Leaf(leaf.ids, zero(leaf.zero, False)) for leaf in a)
        if size(a) != size(b):
            raise ValueError(f"sizes {size(a)} and {size(b)} don't match")
        aligned = self.algebra.align(a, b, self.why(reasons.MEETS))
        if aligned is None:
            return self.algebra.fixed(size(a))
        return tuple(Leaf(x.ids, zero(x.zero, y.zero)) for x, y in zip(*aligned, strict=True))

    def join(self, dims: list[Dim], ref: Any, zero: Callable[[bool, bool], bool] = both) -> list[Dim]:
        """`unify` with another operand, which broadcasts to `dims`; an operand that is no tensor changes nothing."""
        if not isinstance(ref, Ref):
            return dims
        self.produce(ref)
        return [self.unify(a, b, zero) for a, b in zip(dims, self.of(ref, len(dims)), strict=True)]

    def contract(self, a: Dim, b: Dim, a_weight: int, b_weight: int) -> None:
        """The summed dimension of a product: the weight's side consumes what the other side produces.

        Args:
            a_weight, b_weight: how much of a weight each operand is, see `weights`.
        """
        if not a or not b:
            return
        aligned = self.algebra.align(a, b, self.why(reasons.MEETS))
        if aligned is None:
            return
        for x, y in zip(*aligned, strict=True):
            weight, data = (x, y) if a_weight > b_weight else (y, x)
            # two activations, or a weight that can't be made zero (a buffer, exp(weight)): the sum would change
            if not (x.zero or y.zero):
                self.pin((x,), reasons.SUMMED)
            if a_weight or b_weight:
                self.algebra.mark((weight,), Mark.CONSUMER if data.zero else Mark.CONSUMER | Mark.NOT_ZERO)
            if a_weight and b_weight:
                self.algebra.mark((data,), Mark.PRODUCER)

    def produce(self, ref: Ref, dims: Sequence[Dim] | None = None) -> None:
        """Marks dimensions of a tensor that comes from parameters, all if none are given, as produced by these."""
        if not self.weight(ref):
            return
        for dim in self.of(ref) if dims is None else dims:
            self.algebra.mark(dim, Mark.PRODUCER)
            if any((self.algebra.marks[leaf.ids] & Mark.NORMED).any() for leaf in dim):
                self.pin(dim, reasons.NORM)

    def share(self, call: Call) -> None:
        """Notes which results share memory with an argument.

        Where a call writes something else over zeros of an argument, none of the tensors that share its memory is
        zero there from now on.
        """
        returns_alias = any(returned.alias_info for returned in call.op._schema.returns)
        for argument in call.op._schema.arguments:
            old = call.given[argument.name] if argument.alias_info else None
            if not isinstance(old, Ref):
                continue
            sharers = self.aliases.setdefault(old.value, {old.value})
            for ref in call.outs if returns_alias else ():
                self.aliases[ref.value] = sharers
                sharers.add(ref.value)
            if argument.alias_info.is_write and call.outs and call.outs[0].shape == old.shape:
                before, after = self.of(old), self.of(call.outs[0])
                if any(_is_zero(x) and not _is_zero(y) for x, y in zip(before, after, strict=True)):
                    for value in sharers & self.dims.keys():
                        self.dims[value] = not_zero(self.dims[value])

    def take(self, ref: Ref, d: int, index: np.ndarray) -> list[Dim]:
        """The dimensions of a tensor after dimension d was indexed with known positions, shape (m,), m >= 0."""
        dims = self.of(ref)
        if len(index) == 0:
            dims[d] = self.algebra.fixed(0)
        elif not np.array_equal(index, np.arange(ref.shape[d])):
            dims[d] = self.algebra.take(dims[d], index)
        return dims


def _is_zero(dim: Dim) -> bool:
    return all(leaf.zero for leaf in dim)


def not_zero(dims: Sequence[Dim]) -> list[Dim]:
    """The same dimensions, of a tensor that need not be zero where positions were removed."""
    return [with_zero(dim, False) for dim in dims]


Dims = list[list[Dim]]  # the dimensions of every result of a call
Rule = Callable[[Axes, Call], Dims]

RULES: dict[str, Rule] = {}  # ATen name, without overload and trailing underscore -> its rule


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Makes a function the rule of these ATen ops."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register
