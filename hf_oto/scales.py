"""How a cut stays exact where an average is taken over the cut axis, as every RMS norm does: weights are scaled.

Removed zeros leave a sum of squares as it is, but the compact model divides the sum by a smaller number of positions.
So let every tensor of the compact model be that of the dense model times (size / kept) ** exponent, for each axis.
The exponents follow the rules of units of measure: a product adds exponents, a sum demands equal exponents, an average
adds 1, and an operation that isn't linear demands the exponent 0. These demands are equations. Their solution says by
how much each parameter has to be scaled.

Worked example: in norm(x) * w, with x an embedding of 16 channels of which 4 stay, let x have the exponent a.
Then x ** 2 has 2 a, its average 2 a + 1, and adding eps demands 2 a + 1 = 0. So a is -1/2: the compact embedding is
scaled by (16 / 4) ** -1/2 = 1/2. The root of the average has the exponent 0, so x / root has -1/2. If the reader of
the norm's result demands the exponent 0, the weight w must have 1/2: w is scaled by 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from torch.utils._pytree import tree_iter

from .axes import Leaf
from .rules import RULES as AXIS_RULES
from .rules import Axes, contractions, layout, lookups, reduced_dims, reductions
from .sizes import Ref
from .trace import Call, Trace
from .zigs import Scale, ZIGPartition

# A linear expression: unknown -> coefficient, never 0. An unknown is the number of a parameter or of a new tensor;
# ~axis stands for the size / kept of that axis, of which the coefficient is the exponent itself.
Exponent = dict[int, Fraction]


def plus(one: Exponent, other: Exponent, times: int | Fraction = 1) -> Exponent:
    """one + times * other

    Example:
        >>> plus({0: Fraction(1)}, {0: Fraction(1), ~2: Fraction(1, 2)}, times=-1)
        {-3: Fraction(-1, 2)}
    """
    total = {}
    for key in one | other:
        addend = times * other.get(key, 0)
        coefficient = one.get(key, 0) + addend
        if coefficient:
            total[key] = coefficient
    return total


class Exponents:
    """The exponent of every tensor, and the equations between unknown exponents, each solved as soon as it is found.

    Attributes:
        found: the dimensions of every tensor.
        zig_of, axis_of: the ZIG and the axis of every index id, -1 for none, (count,).
        sizes: the number of ZIGs of every axis.
        of: tensor number -> its exponent; a tensor without an entry has exponent 0.
        solved: unknown -> what it equals.
        cost: unknown -> the number of its elements. An equation is solved for its unknown of the lowest cost.
        parameter_of_sum: number of a tensor p + n -> the parameter p, which is read in such sums alone. The sum can be
            scaled although n can't: p takes a scale and a shift.
        conflicts: axes that no exponents suit.
    """

    def __init__(self, found: Axes, zig_of: np.ndarray, sizes: Sequence[int], cost: dict[int, int]) -> None:
        self.found = found
        self.zig_of = zig_of
        self.sizes = sizes
        self.cost = cost
        axis_of_zig = np.repeat(np.arange(len(sizes)), sizes)
        self.axis_of = np.append(axis_of_zig, -1)[zig_of]  # zig -1 reads the appended last element
        self.of: dict[int, Exponent] = {}
        for unknown in cost:
            self.of[unknown] = {unknown: Fraction(1)}
        self.solved: dict[int, Exponent] = {}
        self.parameter_of_sum: dict[int, int] = {}
        self.conflicts: set[int] = set()

    def read(self, operand: Any) -> Exponent:
        """The exponent of a tensor in terms of what is still unknown; a number has exponent 0."""
        if not isinstance(operand, Ref):
            return {}
        exponent = self.of.get(operand.value, {})
        exponent = self.known(exponent)
        self.of[operand.value] = exponent  # so that the next reading has fewer unknowns to replace
        return exponent

    def known(self, exponent: Exponent) -> Exponent:
        """An exponent with its solved unknowns replaced."""
        while solved := exponent.keys() & self.solved.keys():
            for key in solved:
                others = dict(exponent)
                # the solution of another key may have cancelled this one
                coefficient = others.pop(key, 0)
                exponent = plus(others, self.solved[key], coefficient)
        return exponent

    def equate(self, one: Exponent, other: Exponent) -> None:
        """Makes two exponents equal: solves for one of their unknowns, or notes a conflict where they have none."""
        difference = self.known(plus(one, other, -1))
        unknowns = [key for key in difference if key >= 0]
        if not unknowns:
            self.conflicts |= {~key for key in difference}
            return
        pivot = min(unknowns, key=self._cost_and_number)
        coefficient_of_pivot = difference.pop(pivot)
        factor = -1 / coefficient_of_pivot
        self.solved[pivot] = plus({}, difference, factor)

    def _cost_and_number(self, unknown: int) -> tuple[int, int]:
        """The order of unknowns: the number of an unknown breaks a tie, so that a model always has one solution."""
        return self.cost[unknown], unknown

    def follow(self, call: Call) -> None:
        """Finds the exponents of the tensors that a call makes."""
        rule = RULES.get(call.name, none)
        # these three can make an exponent that isn't 0 of operands whose exponents are all 0
        may_begin = rule in (mean, rms_norm, filled)
        if not may_begin and not any(map(self.read, call.refs)):
            return
        first_out = call.outs[0].value if call.outs else None
        if first_out in self.parameter_of_sum:
            parameter = self.parameter_of_sum[first_out]
            self.of[first_out] = self.of[parameter]
            return
        try:
            result = rule(self, call)
        except Exception:  # the op was called in a way that the rule doesn't know
            result = none(self, call)
        self._equate_written(call, result)
        outs = call.outs
        if rule in (attention, rms_norm):  # the further results of these two are statistics, of no use to a forward
            outs = outs[:1]
        for ref in outs:
            self.of[ref.value] = result

    def _equate_written(self, call: Call, result: Exponent) -> None:
        """Gives the tensors that a call writes in place the exponent of its result."""
        for argument in call.op._schema.arguments:
            is_written = argument.alias_info and argument.alias_info.is_write
            written = call.given[argument.name]
            # the tensors that share memory with a tensor that is written in place hold the result, too
            if is_written and isinstance(written, Ref):
                self.equate(result, self.read(written))


# one short function per kind of op: the exponent of the result ---------------------------------------

VALUES = {  # the arguments of an op that its result is made of, where these are not its first one alone
    **dict.fromkeys("add sub rsub copy".split(), (0, 1)),
    **dict.fromkeys("masked_fill constant_pad_nd index_put masked_scatter".split(), (0, 2)),
    **dict.fromkeys("index_add index_copy index_fill scatter_add".split(), (0, 3)),
    "where": (1, 2),
}
OF_ANY_EXPONENT = (None, 0, math.inf, -math.inf)  # what scaling leaves as it is; None is an absent operand


def same(exponents: Exponents, call: Call) -> Exponent:
    """Sums and rearrangements demand equal exponents: 0 and infinity have any, every other number has 0."""
    if _makes_integers(call):
        return none(exponents, call)
    operands = []
    for i in VALUES.get(call.name, (0,)):
        operands += tree_iter(call.args[i : i + 1])  # an operand may be a list of tensors

    tensors: list[Ref] = []
    numbers: list[Any] = []
    for operand in operands:
        if isinstance(operand, Ref):
            is_empty = 0 in operand.shape
            if not is_empty:  # what holds nothing has any exponent
                tensors.append(operand)
        elif operand not in OF_ANY_EXPONENT:
            numbers.append(operand)

    # tensors stand first: where no scales suit, the result has the exponent of the first tensor
    found = [exponents.read(operand) for operand in [*tensors, *numbers]]
    if not found:
        return {}
    first, *others = found
    for other in others:
        exponents.equate(first, other)
    return first


def _makes_integers(call: Call) -> bool:
    """Whether a call is given a dtype for its result in which a scaled value would be rounded."""
    dtype = call.kwargs.get("dtype")
    return dtype is not None and not dtype.is_floating_point


def product(exponents: Exponents, call: Call) -> Exponent:
    """A product adds the exponents of its factors, and a bias must have the exponent of the result."""
    is_rounded = call.kwargs.get("rounding_mode") is not None
    if is_rounded:
        return none(exponents, call)
    bias: list[Ref] = []
    if call.name in ("mul", "div"):
        left, right = call.args[:2]
    elif "convolution" in call.name:
        left, right, *bias = call.refs
    else:
        *bias, left, right = call.refs
    sign = -1 if call.name == "div" else 1
    of_left = exponents.read(left)
    of_right = exponents.read(right)
    total = plus(of_left, of_right, sign)
    for ref in bias:
        exponents.equate(total, exponents.read(ref))
    return total


POWERS = {"square": 2, "sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1}


def power(exponents: Exponents, call: Call) -> Exponent:
    """A power by a number multiplies the exponent."""
    base = call.args[0]
    if call.name in POWERS:
        n = POWERS[call.name]
    else:
        n = call.args[1]
    is_number = isinstance(n, (int, float))
    if not isinstance(base, Ref) or not is_number:
        return none(exponents, call)
    return plus({}, exponents.read(base), Fraction(n))


def mean(exponents: Exponents, call: Call) -> Exponent:
    """An average adds 1 for each axis that it runs over."""
    ref = call.args[0]
    dims = reduced_dims(call)
    return averaged(exponents, ref, dims, exponents.read(ref))


def averaged(exponents: Exponents, ref: Ref, which: Iterable[int], total: Exponent) -> Exponent:
    """`total` with 1 more for each axis in the dimensions `which` of a tensor."""
    dims = exponents.found.of(ref)
    for d in which:
        for leaf in dims[d]:
            axes = set(exponents.axis_of[leaf.ids].tolist())
            if axes == {-1}:  # all positions stay
                continue
            axis = min(axes)
            is_one_axis = len(axes) == 1
            if is_one_axis and _has_every_zig_equally(exponents, leaf, axis):
                one_more = {~axis: Fraction(1)}
                total = plus(total, one_more)
            else:  # size / kept is then not by how much the number of positions shrinks
                exponents.conflicts |= axes - {-1}
    return total


def _has_every_zig_equally(exponents: Exponents, leaf: Leaf, axis: int) -> bool:
    """Whether each ZIG of the axis has equally many positions of a leaf whose positions all belong to the axis."""
    zig_of_position = exponents.zig_of[leaf.ids]  # (n,)
    zigs, counts = np.unique(zig_of_position, return_counts=True)
    is_every_zig_there = len(zigs) >= exponents.sizes[axis]
    is_count_equal = (counts == counts[0]).all()
    return is_every_zig_there and bool(is_count_equal)


def rms_norm(exponents: Exponents, call: Call) -> Exponent:
    """x / sqrt(mean(x ** 2) + eps) * weight: eps has exponent 0, so the average must have it, too"""
    ref, shape, weight = call.args[:3]
    ndim = len(ref.shape)
    normed_dims = range(ndim - len(shape), ndim)
    of_square = plus({}, exponents.read(ref), 2)
    of_average = averaged(exponents, ref, normed_dims, of_square)
    exponents.equate(of_average, {})
    return plus(exponents.read(ref), exponents.read(weight))


def attention(exponents: Exponents, call: Call) -> Exponent:
    """softmax(q k + mask) v: what the softmax takes must have exponent 0"""
    query, key, value = call.args[:3]
    of_query = exponents.read(query)
    of_key = exponents.read(key)
    of_scores = plus(of_query, of_key)
    exponents.equate(of_scores, {})
    for ref in call.refs[3:]:
        exponents.equate(exponents.read(ref), {})
    return exponents.read(value)


def filled(exponents: Exponents, call: Call) -> Exponent:
    """A new tensor: zeros have any exponent until something is added to them or written into them, numbers have 0."""
    has_no_number = "zeros" in call.name or "empty" in call.name
    is_zero = has_no_number or call.args[-1] in (0, False)
    if not is_zero:
        return {}
    if _makes_integers(call):
        return {}
    unknown = call.outs[0].value
    exponents.cost[unknown] = 0  # nothing has to be stored for it: equations are solved for it first
    return {unknown: Fraction(1)}


def none(exponents: Exponents, call: Call) -> Exponent:
    """An op that is not linear, or not known: every tensor that it takes must have exponent 0."""
    for ref in call.refs:
        exponents.equate(exponents.read(ref), {})
    return {}


Rule = Callable[[Exponents, Call], Exponent]
_NAMES: dict[Rule, str] = {
    same: """scatter_add index_put index_add index_copy index_fill alias detach clone contiguous copy _to_copy lift
        lift_fresh add sub where masked_fill neg abs sum cumsum tril triu""",
    product: "mul div",
    power: "pow square sqrt rsqrt reciprocal",
    mean: "mean",
    filled: """zeros new_zeros zeros_like empty new_empty empty_like ones new_ones ones_like full new_full full_like
        scalar_tensor""",
}
MOVES = (  # the axis rules of the ops that only move elements
    layout.view, layout.strided, layout.repeat, layout.slice_, layout.split, layout.cat, layout.roll, layout.rot90,
    layout.pad, layout.windows, layout.diagonal, layout.diag_embed, layout.pixel_shuffle, layout.pixel_unshuffle,
    layout.im2col, layout.col2im, layout.channel_shuffle, layout.as_complex,
    lookups.index_, lookups.gather, lookups.masked_scatter, lookups.packed,
)  # fmt: skip
_BY_AXIS_RULE = {
    contractions.mm: product,
    contractions.convolution: product,
    contractions.attention: attention,
    reductions.rms_norm: rms_norm,
    **dict.fromkeys(MOVES, same),
}
RULES: dict[str, Rule] = {}
for _name, _axis_rule in AXIS_RULES.items():
    if _axis_rule in _BY_AXIS_RULE:
        RULES[_name] = _BY_AXIS_RULE[_axis_rule]
# an op that stands in _NAMES has that rule, whatever its axis rule is
for _rule, _names in _NAMES.items():
    RULES |= dict.fromkeys(_names.split(), _rule)


# the exponents of the parameters ---------------------------------------------------------------------


def solve_scales(
    traced: Trace, found: Axes, partition: ZIGPartition, zig_of: np.ndarray
) -> tuple[dict[int, tuple[Scale, ...]], set[int]]:
    """Solves for the exponents of the parameters; only parameters that may be cut are ever scaled.

    Args:
        traced: the calls of the model.
        found: the dimensions of every tensor of the trace.
        partition: its axes.
        zig_of: the ZIG of every index id, -1 for none, (count,).

    Returns:
        The scales of every axis that an average is taken over, axis number -> `PrunableAxis.scales`, and the numbers
        of the axes that no scales suit.
    """
    may_be_scaled: set[str] = set()
    for axis in partition.axes:
        for member in axis.members:
            if member.role != "statistic":
                may_be_scaled.add(member.param)
    unknown_of: dict[str, int] = {}
    cost: dict[int, int] = {}
    for name, ref in traced.sources.items():
        if name in may_be_scaled:
            unknown_of[name] = ref.value
            cost[ref.value] = math.prod(ref.shape)

    sizes = [axis.size for axis in partition.axes]
    exponents = Exponents(found, zig_of, sizes, cost)
    parameter_of_sum, offset = _whole_sums(found.calls, cost)
    exponents.parameter_of_sum = parameter_of_sum
    for call in found.calls:
        exponents.follow(call)
    for ref in traced.outputs:
        exponents.equate(exponents.read(ref), {})

    scales: dict[int, tuple[Scale, ...]] = {}
    for name, unknown in unknown_of.items():
        exponent = exponents.known(exponents.of[unknown])
        for key, coefficient in exponent.items():
            is_axis = key < 0
            if not is_axis:  # an unknown that nothing determines is taken as 0
                continue
            axis_number = ~key
            scale = Scale(name, coefficient, offset.get(unknown, 0))
            scales_so_far = scales.get(axis_number, ())
            scales[axis_number] = (*scales_so_far, scale)
    return scales, exponents.conflicts


class WholeSums(NamedTuple):
    """The parameters p that are read as p + n alone, with one whole number n (a norm's 1 + weight, say)."""

    parameter_of_sum: dict[int, int]  # number of a tensor p + n -> p, where n is not 0
    offset: dict[int, int]  # p -> n, where n is 0 for a parameter that is read as it is


def _whole_sums(calls: Sequence[Call], parameters: Container[int]) -> WholeSums:
    """Finds the sums of a parameter and a whole number."""
    parameter_of_copy: dict[int, int] = {}
    addends: dict[int, dict[int, int]] = {}  # parameter -> the tensors made from it -> what was added
    for call in calls:
        for ref in call.refs:
            parameter = parameter_of_copy.get(ref.value, ref.value)
            if parameter not in parameters or not call.outs:
                continue
            out = call.outs[0].value
            if call.name in ("_to_copy", "detach", "alias"):
                parameter_of_copy[out] = parameter
            else:
                addends.setdefault(parameter, {})[out] = _whole_addend(call)

    sums = WholeSums({}, {})
    for parameter, addend_of in addends.items():
        addend, *others = set(addend_of.values())
        if others:  # no one offset makes all of these sums scale
            continue
        sums.offset[parameter] = addend
        if addend:
            sums.parameter_of_sum.update(dict.fromkeys(addend_of, parameter))
    return sums


def _whole_addend(call: Call) -> int:
    """The n of a call that adds a whole number n to a tensor, out of place; 0 for any other call."""
    is_in_place = call.op._schema.is_mutable
    if call.name != "add" or call.kwargs or is_in_place:
        return 0
    n = call.args[-1]
    if not isinstance(n, (int, float)):
        return 0
    return int(n) if float(n).is_integer() else 0
