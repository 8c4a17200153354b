"""How a cut stays exact where an average is taken over the cut axis, as every RMS norm does: weights are scaled.

Removed zeros leave a sum of squares as it is, but the compact model divides the sum by a smaller number of positions.
So let every tensor of the compact model be that of the dense model times (size / kept) ** exponent, for each axis.
The exponents follow the rules of units of measure: a product adds them, a sum wants equal ones, an average adds 1,
and what isn't linear wants 0. Solved for the parameters, they say by how much each parameter has to be scaled.

Worked example: in norm(x) * w, with x an embedding of 16 channels of which 4 stay, let x have the exponent a.
Then x ** 2 has 2 a, its average 2 a + 1, and adding eps demands 2 a + 1 = 0. So a is -1/2: the compact embedding is
scaled by (16 / 4) ** -1/2 = 1/2. The root of the average has the exponent 0, so x / root has -1/2. If what reads the
norm's result wants the exponent 0, the weight w must have 1/2: w is scaled by 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Sequence
from fractions import Fraction

import numpy as np
from torch.utils._pytree import tree_iter

from .rules import RULES as AXIS_RULES
from .rules import Axes, contractions, layout, lookups, reduced_dims, reductions
from .sizes import Ref
from .trace import Call, Trace
from .zigs import Scale, ZIGPartition

# A linear expression: unknown -> coefficient, never 0. An unknown is the number of a parameter or of a new tensor;
# ~axis stands for the size / kept of that axis, of which the coefficient is the exponent itself.
Exponent = dict[int, Fraction]


def plus(a: Exponent, b: Exponent, times: int | Fraction = 1) -> Exponent:
    """a + times * b

    Example:
        >>> plus({0: Fraction(1)}, {0: Fraction(1), ~2: Fraction(1, 2)}, times=-1)
        {-3: Fraction(-1, 2)}
    """
    total = {}
    for key in a | b:
        coefficient = a.get(key, 0) + times * b.get(key, 0)
        if coefficient:
            total[key] = coefficient
    return total


class Exponents:
    """The exponent of every tensor, and the equations between unknown exponents, which are solved as they come.

    Attributes:
        found: the dimensions of every tensor.
        zig_of, axis_of: the ZIG and the axis of every index id, -1 for none, (count,).
        sizes: the number of ZIGs of every axis.
        of: tensor number -> its exponent; a tensor without an entry has exponent 0.
        cost: unknown -> the number of its elements. An equation is solved for its smallest unknown.
        sums: number of a tensor p + n -> the parameter p, where p is read in this sum alone: then the sum can be
            scaled, by scaling and shifting p.
        conflicts: axes that no exponents suit.
    """

    def __init__(self, found: Axes, zig_of: np.ndarray, sizes: Sequence[int], cost: dict[int, int]) -> None:
        self.found = found
        self.zig_of = zig_of
        self.sizes = sizes
        self.cost = cost
        axis_of_zig = np.repeat(np.arange(len(sizes)), sizes)
        self.axis_of = np.append(axis_of_zig, -1)[zig_of]  # zig -1 reads the appended last element
        self.of: dict[int, Exponent] = {unknown: {unknown: Fraction(1)} for unknown in cost}
        self.solved: dict[int, Exponent] = {}
        self.sums: dict[int, int] = {}
        self.conflicts: set[int] = set()

    def read(self, ref: Ref) -> Exponent:
        """The exponent of a tensor in terms of what is still unknown."""
        exponent = self.known(self.of.get(ref.value, {}))
        self.of[ref.value] = exponent  # so that the next reading has fewer unknowns to replace
        return exponent

    def known(self, exponent: Exponent) -> Exponent:
        """An exponent with its solved unknowns replaced."""
        while solved := exponent.keys() & self.solved.keys():
            for key in solved:
                solution_minus_key = plus(self.solved[key], {key: Fraction(-1)})
                exponent = plus(exponent, solution_minus_key, exponent.get(key, 0))
        return exponent

    def equate(self, a: Exponent, b: Exponent) -> None:
        """Makes two exponents equal: solves for one of their unknowns, or notes a conflict where they have none."""
        difference = self.known(plus(a, b, -1))
        unknowns = [key for key in difference if key >= 0]
        if not unknowns:
            self.conflicts |= {~key for key in difference}
            return
        pivot = min(unknowns, key=lambda key: (self.cost[key], key))
        factor = difference.pop(pivot)
        self.solved[pivot] = {key: -coefficient / factor for key, coefficient in difference.items()}

    def follow(self, call: Call) -> None:
        """Finds the exponents of the tensors that a call makes."""
        rule = RULES.get(call.name, none)
        # these three can make an exponent that isn't 0 of operands whose exponents are all 0
        may_begin = rule in (mean, rms_norm, filled)
        if not may_begin and not any(map(self.read, call.refs)):
            return
        if call.outs and call.outs[0].value in self.sums:
            parameter = self.sums[call.outs[0].value]
            self.of[call.outs[0].value] = self.of[parameter]
            return
        try:
            result = rule(self, call)
        except Exception:  # the op was called in a way that the rule doesn't know
            result = none(self, call)
        for argument in call.op._schema.arguments:
            written = call.given[argument.name]
            # the tensors that share memory with a tensor that is written in place hold the result, too
            if argument.alias_info and argument.alias_info.is_write and isinstance(written, Ref):
                self.equate(result, self.read(written))
        # the further results of these two are statistics, of no use to a forward
        outs = call.outs[:1] if rule in (attention, rms_norm) else call.outs
        for ref in outs:
            self.of[ref.value] = result


# one short function per kind of op: the exponent of the result ---------------------------------------

VALUES = {  # the arguments of an op that its result is made of, where these are not its first one alone
    **dict.fromkeys("add sub rsub copy".split(), (0, 1)),
    **dict.fromkeys("masked_fill constant_pad_nd index_put masked_scatter".split(), (0, 2)),
    **dict.fromkeys("index_add index_copy index_fill scatter_add".split(), (0, 3)),
    "where": (1, 2),
}


def same(x: Exponents, call: Call) -> Exponent:
    """Sums and rearrangements want equal exponents: 0 and infinity have any, every other number has 0."""
    dtype = call.kwargs.get("dtype")
    if dtype is not None and not dtype.is_floating_point:
        return none(x, call)
    operands = []
    for i in VALUES.get(call.name, (0,)):
        operands += tree_iter(call.args[i : i + 1])  # an operand may be a list of tensors
    exponents = [x.read(a) for a in operands if isinstance(a, Ref) and 0 not in a.shape]
    for a in operands:
        if not isinstance(a, Ref) and a not in (None, 0, math.inf, -math.inf):
            exponents.append({})
    for other in exponents[1:]:
        x.equate(exponents[0], other)
    return exponents[0] if exponents else {}


def product(x: Exponents, call: Call) -> Exponent:
    """A product adds the exponents of its factors, and a bias must have the exponent of the result."""
    bias: list[Ref] = []
    if call.name in ("mul", "div"):
        a, b = call.args[:2]
    elif "convolution" in call.name:
        a, b, *bias = call.refs
    else:
        *bias, a, b = call.refs
    if call.kwargs.get("rounding_mode") is not None:
        return none(x, call)
    of_a = x.read(a) if isinstance(a, Ref) else {}
    of_b = x.read(b) if isinstance(b, Ref) else {}
    total = plus(of_a, of_b, -1 if call.name == "div" else 1)
    for ref in bias:
        x.equate(total, x.read(ref))
    return total


POWERS = {"square": 2, "sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1}


def power(x: Exponents, call: Call) -> Exponent:
    """A power by a number multiplies the exponent."""
    n = POWERS[call.name] if call.name in POWERS else call.args[1]
    if not (isinstance(call.args[0], Ref) and isinstance(n, (int, float))):
        return none(x, call)
    return plus({}, x.read(call.args[0]), Fraction(n))


def mean(x: Exponents, call: Call) -> Exponent:
    """An average adds 1 for each axis that it runs over."""
    return averaged(x, call.args[0], reduced_dims(call), x.read(call.args[0]))


def averaged(x: Exponents, ref: Ref, which: Iterable[int], total: Exponent) -> Exponent:
    """`total` with 1 more for each axis in the dimensions `which` of a tensor."""
    dims = x.found.of(ref)
    for d in which:
        for leaf in dims[d]:
            axes = set(x.axis_of[leaf.ids].tolist())
            if axes == {-1}:
                continue
            zigs, counts = np.unique(x.zig_of[leaf.ids], return_counts=True)
            is_whole_axis = len(axes) == 1 and len(zigs) >= x.sizes[min(axes)]
            if is_whole_axis and (counts == counts[0]).all():
                total = plus(total, {~axes.pop(): Fraction(1)})
            else:  # size / kept is then not by how much the number of positions shrinks
                x.conflicts |= axes - {-1}
    return total


def rms_norm(x: Exponents, call: Call) -> Exponent:
    """x / sqrt(mean(x ** 2) + eps) * weight: eps has exponent 0, so the average must have it, too"""
    ref, shape, weight = call.args[:3]
    ndim = len(ref.shape)
    normed_dims = range(ndim - len(shape), ndim)
    of_square = plus({}, x.read(ref), 2)
    x.equate(averaged(x, ref, normed_dims, of_square), {})
    return plus(x.read(ref), x.read(weight)) if weight is not None else x.read(ref)


def attention(x: Exponents, call: Call) -> Exponent:
    """softmax(q k + mask) v: what the softmax takes must have exponent 0"""
    q, k, v = call.args[:3]
    x.equate(plus(x.read(q), x.read(k)), {})
    for ref in call.refs[3:]:
        x.equate(x.read(ref), {})
    return x.read(v)


def filled(x: Exponents, call: Call) -> Exponent:
    """A new tensor: zeros have any exponent until something is added to them or written into them, numbers have 0."""
    is_zero = "zeros" in call.name or "empty" in call.name or call.args[-1] in (0, False)
    dtype = call.kwargs.get("dtype")
    if not is_zero or (dtype is not None and not dtype.is_floating_point):
        return {}
    unknown = call.outs[0].value
    x.cost[unknown] = 0  # nothing has to be stored for it: equations are solved for it first
    return {unknown: Fraction(1)}


def none(x: Exponents, call: Call) -> Exponent:
    """An op that is not linear, or not known: every tensor that it takes must have exponent 0."""
    for ref in call.refs:
        x.equate(x.read(ref), {})
    return {}


_NAMES: dict[Callable[[Exponents, Call], Exponent], str] = {
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
RULES = {name: _BY_AXIS_RULE[rule] for name, rule in AXIS_RULES.items() if rule in _BY_AXIS_RULE}
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
    may_be_scaled = set()
    for axis in partition.axes:
        may_be_scaled |= {m.param for m in axis.members if m.role != "statistic"}
    unknown_of = {name: ref.value for name, ref in traced.sources.items() if name in may_be_scaled}
    cost = {unknown: math.prod(traced.sources[name].shape) for name, unknown in unknown_of.items()}

    x = Exponents(found, zig_of, [axis.size for axis in partition.axes], cost)
    x.sums, offset = _sums(found.calls, cost)
    for call in found.calls:
        x.follow(call)
    for ref in traced.outputs:
        x.equate(x.read(ref), {})

    scales: dict[int, list[Scale]] = {}
    for name, unknown in unknown_of.items():
        for key, coefficient in x.known(x.of[unknown]).items():
            is_axis = key < 0  # an unknown that nothing determines is taken as 0
            if is_axis:
                scales.setdefault(~key, []).append(Scale(name, coefficient, offset.get(unknown, 0)))
    return {axis: tuple(scales_of_axis) for axis, scales_of_axis in scales.items()}, x.conflicts


def _sums(calls: Sequence[Call], parameters: Container[int]) -> tuple[dict[int, int], dict[int, int]]:
    """Finds the parameters p that are read as p + n alone, with a whole number n (a norm's 1 + weight, say).

    Returns:
        The number of every tensor p + n -> p, and p -> n, where n is 0 for a parameter that is read as it is.
    """
    parameter_of_copy: dict[int, int] = {}
    addends: dict[int, dict[int, int]] = {}  # parameter -> the tensors made from it -> what was added
    for call in calls:
        for ref in call.refs:
            p = parameter_of_copy.get(ref.value, ref.value)
            if p not in parameters:
                continue
            if call.name in ("_to_copy", "detach", "alias"):
                parameter_of_copy[call.outs[0].value] = p
            elif call.outs:
                addends.setdefault(p, {})[call.outs[0].value] = _whole_addend(call)
    offset = {}
    for p, addend_of in addends.items():
        if len(set(addend_of.values())) == 1:
            offset[p] = min(addend_of.values())
    sums = {}
    for p, addend_of in addends.items():
        if offset.get(p):
            sums |= dict.fromkeys(addend_of, p)
    return sums, offset


def _whole_addend(call: Call) -> int:
    """The n of a call that adds a whole number n to a tensor, out of place; 0 for any other call."""
    if call.name != "add" or call.kwargs or call.op._schema.is_mutable:
        return 0
    n = call.args[-1]
    is_whole = isinstance(n, (int, float)) and float(n).is_integer()
    return int(n) if is_whole else 0
