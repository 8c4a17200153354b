"""What the rules fill: the dimensions of every tensor of a trace; and the one table in which all rules stand.

A rule takes the state `Axes` and a call. It unifies, contracts and pins dimensions of the operands, and returns the
dimensions of the results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .. import reasons
from ..axes import Algebra, Dim, Leaf, Mark, size, with_zero
from ..reasons import Reason
from ..sizes import Ref
from ..trace import Call

# (is the first operand zero at a position, is the second) -> is the result zero there
ZeroRule = Callable[[bool, bool], bool]


def both(a: bool, b: bool) -> bool:
    """The result is zero where both operands are."""
    return a and b


def either(a: bool, b: bool) -> bool:
    """The result is zero where one of the operands is."""
    return a or b


def first(a: bool, b: bool) -> bool:
    """The result is zero where the first operand is."""
    return a


def never(a: bool, b: bool) -> bool:
    """The result need not be zero where the operands are."""
    return False


class Axes:
    """The dimensions of every tensor of a trace, filled in call order.

    Attributes:
        algebra: the union-find that holds the ids of all dimensions.
        dims: value number -> its dimensions.
        calls: the calls that the outputs depend on.
        weights: value number -> how much of a weight the tensor is. 2 stands for a tensor that depends on parameters
            and buffers only, 1 for parts of such a tensor that the data choose (an expert's weights, say);
            activations have no entry.
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
        dims = self.dims[ref.value]
        num_missing = ndim - len(ref.shape)
        missing = [()] * num_missing
        return missing + dims

    def new(self, n: int, zero: bool = False, marks: int = 0) -> Dim:
        """A dimension of n fresh ids."""
        if n <= 1:
            return ()
        leaf = self.algebra.new(n, zero, marks)
        return (leaf,)

    def fixed(self, shape: Sequence[int]) -> list[Dim]:
        """Dimensions that can't be cut."""
        return [self.algebra.fixed(n) for n in shape]

    def factors(self, dim: Dim, *sizes: int) -> list[Dim]:
        """The row-major factors, of these sizes, of a dimension."""
        return self.algebra.reshape([dim], sizes)

    def weight(self, ref: Ref) -> int:
        """How much of a weight a tensor is, see `weights`."""
        return self.weights.get(ref.value, 0)

    # pins ------------------------------------------------------------------------------------------

    def why(self, reason: Reason) -> Reason:
        """A reason together with the layer that is running."""
        return reason.at(self.layer)

    def pin(self, dim: Dim, reason: Reason) -> None:
        """Pins a dimension for a reason in the layer that is running."""
        why = self.why(reason)
        self.algebra.pin(dim, why)

    def pin_where(self, dim: Dim, reason: Reason, *, zero: bool) -> None:
        """Pins those factors of a dimension that are zero, or those that are not, at removed positions."""
        for leaf in dim:
            if leaf.zero == zero:
                self.pin((leaf,), reason)

    # operands that meet ----------------------------------------------------------------------------

    def unify(self, a: Dim, b: Dim, zero: ZeroRule = both) -> Dim:
        """The common dimension of two operands of an elementwise op; size 1 broadcasts.

        Args:
            zero: whether the result is zero at a position, given whether the first and the second operand are.
        """
        # an operand that broadcasts holds the same at every position, removed ones too: it is not zero there
        if not a:
            pairs = zip(with_zero(b, False), b, strict=True)
        elif not b:
            pairs = zip(a, with_zero(a, False), strict=True)
        else:
            size_a, size_b = size(a), size(b)
            if size_a != size_b:
                raise ValueError(f"sizes {size_a} and {size_b} don't match")
            pairs = self._aligned(a, b)
            if pairs is None:
                return self.algebra.fixed(size_a)
        leaves = []
        for x, y in pairs:
            is_zero = zero(x.zero, y.zero)
            leaves.append(Leaf(x.ids, is_zero))
        return tuple(leaves)

    def _aligned(self, a: Dim, b: Dim) -> list[tuple[Leaf, Leaf]] | None:
        """The factors of two unified dimensions in pairs; None if their factors don't fit."""
        why = self.why(reasons.MEETS)
        aligned = self.algebra.align(a, b, why)
        if aligned is None:
            return None
        return list(zip(*aligned, strict=True))

    def unify_all(self, dims: list[Dim], others: list[Dim], zero: ZeroRule = both) -> list[Dim]:
        """`unify` for each pair of two equally long lists."""
        result = []
        for a, b in zip(dims, others, strict=True):
            dim = self.unify(a, b, zero)
            result.append(dim)
        return result

    def join(self, dims: list[Dim], ref: Any, zero: ZeroRule = both) -> list[Dim]:
        """`unify` with another operand, which broadcasts to `dims`; an operand that is no tensor changes nothing."""
        if not isinstance(ref, Ref):
            return dims
        self.produce(ref)
        operand = self.of(ref, len(dims))
        return self.unify_all(dims, operand, zero)

    def contract(self, a: Dim, b: Dim, a_weight: int, b_weight: int) -> None:
        """The summed dimension of a product: the weight's side consumes what the other side produces.

        Args:
            a_weight, b_weight: how much of a weight each operand is, see `weights`.
        """
        if not a or not b:
            return
        pairs = self._aligned(a, b)
        if pairs is None:
            return
        for x, y in pairs:
            weight, data = y, x  # of two activations, either may be called the weight
            if a_weight > b_weight:
                weight, data = x, y
            # two activations, or a weight that can't be made zero (a buffer, exp(weight)): the sum would change
            can_be_zero = x.zero or y.zero
            if not can_be_zero:
                self.pin((x,), reasons.SUMMED)
            has_weight = a_weight or b_weight
            if has_weight:
                marks = Mark.CONSUMER
                # the weight then has to be zero itself where the position is removed
                if not data.zero:
                    marks |= Mark.NOT_ZERO
                self.algebra.mark((weight,), marks)
            # of two weights one makes what the other reads, so the axis lies within their product
            if a_weight and b_weight:
                self.algebra.mark((data,), Mark.PRODUCER)

    def produce(self, ref: Ref, dims: Sequence[Dim] | None = None) -> None:
        """Marks dimensions, all if none are given, as produced by the parameters that the tensor comes from."""
        if not self.weight(ref):
            return
        if dims is None:
            dims = self.of(ref)
        for dim in dims:
            self.algebra.mark(dim, Mark.PRODUCER)
            is_normed = self._is_normed(dim)
            if is_normed:
                self.pin(dim, reasons.NORM)

    def _is_normed(self, dim: Dim) -> bool:
        for leaf in dim:
            marks = self.algebra.marks[leaf.ids]  # (size of the leaf,)
            normed = marks & Mark.NORMED
            if normed.any():
                return True
        return False

    # memory that tensors share ---------------------------------------------------------------------

    def share(self, call: Call) -> None:
        """Notes which results share memory with an argument.

        A call may write other values over the zeros of an argument. From then on no tensor that shares its memory
        counts as zero at removed positions.
        """
        schema = call.op._schema
        returns_alias = any(returned.alias_info for returned in schema.returns)
        for argument in schema.arguments:
            info = argument.alias_info
            if not info:
                continue
            old = call.given[argument.name]
            if not isinstance(old, Ref):
                continue
            alone = {old.value}
            sharers = self.aliases.setdefault(old.value, alone)
            if returns_alias:
                for ref in call.outs:
                    self.aliases[ref.value] = sharers
                    sharers.add(ref.value)
            # an operation that writes may return nothing, and then no dimensions say what it wrote
            if info.is_write and call.outs:
                new, *_ = call.outs
                self._overwrite(old, new, sharers)

    def _overwrite(self, old: Ref, new: Ref, sharers: set[int]) -> None:
        """Writes a tensor over an old one, and so over all tensors that share its memory."""
        if new.shape != old.shape:
            return
        loses_zeros = False
        dims_before = self.of(old)
        dims_after = self.of(new)
        pairs = zip(dims_before, dims_after, strict=True)
        for before, after in pairs:
            if _is_zero(before) and not _is_zero(after):
                loses_zeros = True
        if not loses_zeros:
            return
        # a sharer may have another shape, so nothing says which of its dimensions was written
        known_sharers = sharers & self.dims.keys()
        for value in known_sharers:
            dims = self.dims[value]
            self.dims[value] = not_zero(dims)

    # positions -------------------------------------------------------------------------------------

    def take(self, ref: Ref, d: int, index: np.ndarray) -> list[Dim]:
        """The dimensions of a tensor after dimension d was indexed with known positions, shape (m,), m >= 0."""
        dims = self.of(ref)
        all_positions = np.arange(ref.shape[d])  # (size of d,)
        if len(index) == 0:
            dims[d] = self.algebra.fixed(0)
        elif not np.array_equal(index, all_positions):
            whole = dims[d]
            dims[d] = self.algebra.take(whole, index)
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
        for name in names:
            RULES[name] = function
        return function

    return register
