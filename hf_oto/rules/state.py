"""What the rules fill: the dimensions of every tensor of a trace; and the one table in which they all stand."""

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

# Whether the result of two operands is zero where they (or not) are
both, either = operator.and_, operator.or_


def first(a: bool, b: bool) -> bool:
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
        """The dimensions of a tensor, broadcast to `ndim`; one the trace did not see made (an input) can't be cut."""
        if ref.value not in self.dims:
            self.dims[ref.value] = self.fixed(ref.shape)
        return [()] * (ndim - len(ref.shape)) + self.dims[ref.value]

    def new(self, n: int, zero: bool = False, marks: int = 0) -> Dim:
        """A dimension of fresh ids."""
        return (self.algebra.new(n, zero, marks),) if n > 1 else ()

    def fixed(self, shape: Sequence[int]) -> list[Dim]:
        """Dimensions that can't be cut."""
        return [self.algebra.fixed(n) for n in shape]

    def weight(self, ref: Ref) -> int:
        """How much of a weight a tensor is, see `weights`."""
        return self.weights.get(ref.value, 0)

    def why(self, reason: Reason) -> Reason:
        """A reason with the layer it comes from."""
        return reason.at(self.layer)

    def pin(self, dim: Dim, reason: Reason) -> None:
        """Pins with a reason."""
        self.algebra.pin(dim, self.why(reason))

    def unify(self, a: Dim, b: Dim, zero: Callable[[bool, bool], bool] = both) -> Dim:
        """The common dimension of two operands of an elementwise op; size 1 broadcasts."""
        if not a or not b:
            return tuple(Leaf(x.ids, zero(x.zero, False) if a else zero(False, x.zero)) for x in a or b)
        if size(a) != size(b):
            raise ValueError(f"sizes {size(a)} and {size(b)} don't match")
        pair = self.algebra.align(a, b, self.why(reasons.MEETS))
        if pair is None:
            return self.algebra.fixed(size(a))
        return tuple(Leaf(x.ids, zero(x.zero, y.zero)) for x, y in zip(*pair, strict=True))

    def join(self, dims: list[Dim], ref: Any, zero: Callable[[bool, bool], bool] = both) -> list[Dim]:
        """`unify` with another operand, if there is one, that broadcasts to `dims`."""
        if not isinstance(ref, Ref):
            return dims
        self.produce(ref)
        return [self.unify(a, b, zero) for a, b in zip(dims, self.of(ref, len(dims)), strict=True)]

    def contract(self, a: Dim, b: Dim, a_weight: int, b_weight: int) -> None:
        """The summed dimension of a product: the weight's side consumes what the other side produces."""
        pair = self.algebra.align(a, b, self.why(reasons.MEETS)) if a and b else None
        for x, y in zip(*pair, strict=True) if pair else ():
            weight, data = (x, y) if a_weight > b_weight else (y, x)
            if not (x.zero or y.zero):  # between activations, or a reader that can't be zeroed: a buffer, exp(weight)
                self.pin((x,), reasons.SUMMED)
            if a_weight or b_weight:
                self.algebra.mark((weight,), Mark.CONSUMER if data.zero else Mark.CONSUMER | Mark.NOT_ZERO)
            if a_weight and b_weight:
                self.algebra.mark((data,), Mark.PRODUCER)

    def produce(self, ref: Ref, dims: Sequence[Dim] | None = None) -> None:
        """Marks dimensions, all if not given, as made by a parameter, where the tensor comes from parameters."""
        for dim in (self.of(ref) if dims is None else dims) if self.weight(ref) else ():
            self.algebra.mark(dim, Mark.PRODUCER)
            if any((self.algebra.marks[leaf.ids] & Mark.NORMED).any() for leaf in dim):
                self.pin(dim, reasons.NORM)

    def share(self, call: Call) -> None:
        """Notes which results share memory with an argument; where zeros are overwritten, no alias holds them now."""
        for a in (a for a in call.op._schema.arguments if a.alias_info and isinstance(call.given[a.name], Ref)):
            old = call.given[a.name]
            together = self.aliases.setdefault(old.value, {old.value})
            for ref in call.outs if any(r.alias_info for r in call.op._schema.returns) else ():
                self.aliases[ref.value] = together
                together.add(ref.value)
            if a.alias_info.is_write and call.outs and call.outs[0].shape == old.shape:
                before, now = self.of(old), self.of(call.outs[0])
                if any(_is_zero(x) and not _is_zero(y) for x, y in zip(before, now, strict=True)):
                    for value in together & self.dims.keys():
                        self.dims[value] = [with_zero(dim, False) for dim in self.dims[value]]

    def take(self, ref: Ref, d: int, index: np.ndarray) -> list[Dim]:
        """The dimensions of a tensor with known positions of one, of which there may be none."""
        dims = self.of(ref)
        if len(index) == 0:
            dims[d] = self.algebra.fixed(0)
        elif not np.array_equal(index, np.arange(ref.shape[d])):
            dims[d] = self.algebra.take(dims[d], index)
        return dims


def _is_zero(dim: Dim) -> bool:
    return all(leaf.zero for leaf in dim)


def not_zero(dims: Sequence[Dim]) -> list[Dim]:
    """The same dimensions of a tensor that need not be zero where positions were removed."""
    return [with_zero(dim, False) for dim in dims]


Dims = list[list[Dim]]  # of every result of a call
Rule = Callable[[Axes, Call], Dims]

RULES: dict[str, Rule] = {}  # ATen name, without overload and trailing underscore -> its rule


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Makes a function the rule of these ATen ops."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register
