"""Scales: how a cut stays exact where an average is taken over its axis, as every RMS norm does.

Zeros leave a sum of squares alone, but the average is over fewer. So let every tensor of the compact model be that of
the dense one times (size / kept) ** exponent, for each axis. As with units of measure, products add exponents, sums
want equal ones, an average adds 1, and what isn't linear wants 0: solved for the parameters, they say how to scale.
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

Exponent = dict[int, Fraction]  # unknown (the number of a parameter or new tensor) or ~axis -> coefficient, never 0


def plus(a: Exponent, b: Exponent, times: int | Fraction = 1) -> Exponent:
    """a + times * b"""
    return {key: n for key in a | b if (n := a.get(key, 0) + times * b.get(key, 0))}


class Exponents:
    """The exponent of every tensor, and the equations between the unknown ones, solved as they come.

    Attributes:
        zig_of, axis_of: the ZIG and the axis of every index id, -1 for none.
        of: tensor number -> its exponent; 0 for those without an entry.
        cost: unknown -> the number of its elements; of several the smallest is solved for.
        sums: number of p + n -> the parameter p that is read in no other way: it can be scaled as this sum.
        conflicts: axes that no exponents suit.
    """

    def __init__(self, found: Axes, zig_of: np.ndarray, sizes: Sequence[int], cost: dict[int, int]) -> None:
        self.found, self.zig_of, self.sizes, self.cost = found, zig_of, sizes, cost
        self.axis_of = np.append(np.repeat(np.arange(len(sizes)), sizes), -1)[zig_of]
        self.of: dict[int, Exponent] = {unknown: {unknown: Fraction(1)} for unknown in cost}
        self.solved: dict[int, Exponent] = {}
        self.sums: dict[int, int] = {}
        self.conflicts: set[int] = set()

    def read(self, ref: Ref) -> Exponent:
        """The exponent of a tensor in terms of what is still unknown."""
        exponent = self.of[ref.value] = self.known(self.of.get(ref.value, {}))
        return exponent

    def known(self, exponent: Exponent) -> Exponent:
        """The same with solved unknowns replaced."""
        while known := exponent.keys() & self.solved.keys():
            for key in known:
                exponent = plus(exponent, plus(self.solved[key], {key: Fraction(-1)}), exponent.get(key, 0))
        return exponent

    def equate(self, a: Exponent, b: Exponent) -> None:
        """Makes two exponents equal: solves for an unknown of theirs, or notes a conflict."""
        rest = self.known(plus(a, b, -1))
        unknown = [key for key in rest if key >= 0]
        if unknown:
            pivot = min(unknown, key=lambda key: (self.cost[key], key))
            factor = rest.pop(pivot)
            self.solved[pivot] = {key: -value / factor for key, value in rest.items()}
        else:
            self.conflicts |= {~key for key in rest}

    def follow(self, call: Call) -> None:
        """Finds the exponents of what a call makes."""
        rule = RULES.get(call.name, none)
        if rule not in (mean, rms_norm, filled) and not any(map(self.read, call.refs)):
            return
        if call.outs and call.outs[0].value in self.sums:
            self.of[call.outs[0].value] = self.of[self.sums[call.outs[0].value]]
            return
        try:
            result = rule(self, call)
        except Exception:  # a way of calling it that the rule doesn't know
            result = none(self, call)
        for a in call.op._schema.arguments:  # in place: the tensors that it is a view of hold it too
            if a.alias_info and a.alias_info.is_write and isinstance(call.given[a.name], Ref):
                self.equate(result, self.read(call.given[a.name]))
        outs = call.outs[:1] if rule in (attention, rms_norm) else call.outs  # the others are statistics
        self.of |= dict.fromkeys((ref.value for ref in outs), result)


# one short function per kind of op: the exponent of the result ---------------------------------------

VALUES = {  # the arguments of an op that the result is made of, where these are not its first alone
    **dict.fromkeys("add sub rsub copy".split(), (0, 1)),
    **dict.fromkeys("masked_fill constant_pad_nd index_put masked_scatter".split(), (0, 2)),
    **dict.fromkeys("index_add index_copy index_fill scatter_add".split(), (0, 3)),
    "where": (1, 2),
}


def same(x: Exponents, call: Call) -> Exponent:
    """Sums and rearrangements: equal exponents; 0 and infinity have any, other numbers 0."""
    dtype = call.kwargs.get("dtype")
    if dtype is not None and not dtype.is_floating_point:
        return none(x, call)
    which = VALUES.get(call.name, (0,))
    operands = [a for i in which for a in tree_iter(call.args[i : i + 1])]
    exponents = [x.read(a) for a in operands if isinstance(a, Ref) and 0 not in a.shape]
    exponents += [{} for a in operands if not isinstance(a, Ref) and a not in (None, 0, math.inf, -math.inf)]
    for other in exponents[1:]:
        x.equate(exponents[0], other)
    return exponents[0] if exponents else {}


def product(x: Exponents, call: Call) -> Exponent:
    """Products add exponents; a bias has those of the result."""
    bias: list[Ref] = []
    if call.name in ("mul", "div"):
        a, b = call.args[:2]
    elif "convolution" in call.name:
        a, b, *bias = call.refs
    else:
        *bias, a, b = call.refs
    if call.kwargs.get("rounding_mode") is not None:
        return none(x, call)
    left, right = (x.read(operand) if isinstance(operand, Ref) else {} for operand in (a, b))
    total = plus(left, right, -1 if call.name == "div" else 1)
    for ref in bias:
        x.equate(total, x.read(ref))
    return total


def power(x: Exponents, call: Call) -> Exponent:
    """Powers by a number multiply exponents."""
    n = {"square": 2, "sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1}.get(call.name) or call.args[1]
    if not (isinstance(call.args[0], Ref) and isinstance(n, (int, float))):
        return none(x, call)
    return plus({}, x.read(call.args[0]), Fraction(n))


def mean(x: Exponents, call: Call) -> Exponent:
    """An average adds 1 for each axis that it runs over."""
    return averaged(x, call.args[0], reduced_dims(call), x.read(call.args[0]))


def averaged(x: Exponents, ref: Ref, which: Iterable[int], total: Exponent) -> Exponent:
    """An exponent with 1 more for each axis of these dimensions of a tensor."""
    for leaf in (leaf for d in which for leaf in x.found.of(ref)[d]):
        axes = set(x.axis_of[leaf.ids].tolist())
        zigs, counts = np.unique(x.zig_of[leaf.ids], return_counts=True)
        if axes == {-1}:
            continue
        if len(axes) > 1 or len(zigs) < x.sizes[min(axes)] or (counts != counts[0]).any():
            x.conflicts |= axes - {-1}  # positions side by side that are not one axis, whole and evenly
        else:
            total = plus(total, {~axes.pop(): Fraction(1)})
    return total


def rms_norm(x: Exponents, call: Call) -> Exponent:
    """x / sqrt(mean(x ** 2) + eps) * weight: eps has exponent 0, and so has what it is added to"""
    ref, shape, weight = call.args[:3]
    n = len(ref.shape)
    x.equate(averaged(x, ref, range(n - len(shape), n), plus({}, x.read(ref), 2)), {})
    return plus(x.read(ref), x.read(weight)) if weight is not None else x.read(ref)


def attention(x: Exponents, call: Call) -> Exponent:
    """softmax(q k) v"""
    q, k, v = call.args[:3]
    x.equate(plus(x.read(q), x.read(k)), {})
    for ref in call.refs[3:]:
        x.equate(x.read(ref), {})
    return x.read(v)


def filled(x: Exponents, call: Call) -> Exponent:
    """A new tensor: zeros have any exponent, until something is added to them or written into them; numbers have 0."""
    zero = "zeros" in call.name or "empty" in call.name or call.args[-1] in (0, False)
    dtype = call.kwargs.get("dtype")
    if not zero or (dtype is not None and not dtype.is_floating_point):
        return {}
    x.cost[call.outs[0].value] = 0
    return {call.outs[0].value: Fraction(1)}


def none(x: Exponents, call: Call) -> Exponent:
    """Not linear, or not known: all that takes part has exponent 0."""
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
MOVES = (
    layout.view, layout.strided, layout.repeat, layout.slice_, layout.split, layout.cat, layout.roll, layout.rot90,
    layout.pad, layout.windows, layout.diagonal, layout.diag_embed, layout.pixel_shuffle, layout.pixel_unshuffle,
    layout.im2col, layout.col2im, layout.channel_shuffle, layout.as_complex,
    lookups.index_, lookups.gather, lookups.masked_scatter, lookups.packed,
)  # fmt: skip
_LIKE = {
    contractions.mm: product,
    contractions.convolution: product,
    contractions.attention: attention,
    reductions.rms_norm: rms_norm,
    **dict.fromkeys(MOVES, same),
}
RULES = {name: _LIKE[rule] for name, rule in AXIS_RULES.items() if rule in _LIKE}
RULES |= {name: rule for rule, names in _NAMES.items() for name in names.split()}


def solve_scales(
    traced: Trace, found: Axes, partition: ZIGPartition, zig_of: np.ndarray
) -> tuple[dict[int, tuple[Scale, ...]], set[int]]:
    """The scales of every axis that is averaged over, by its number, as in `PrunableAxis.scales`, and the axes that no
    scales suit. Only parameters that may be cut are ever scaled."""
    cut = {m.param for axis in partition.axes for m in axis.members if m.role != "statistic"}
    number = {name: ref.value for name, ref in traced.sources.items() if name in cut}
    cost = {value: math.prod(traced.sources[name].shape) for name, value in number.items()}
    x = Exponents(found, zig_of, [axis.size for axis in partition.axes], cost)
    x.sums, offset = _sums(found.calls, cost)
    for call in found.calls:
        x.follow(call)
    for ref in traced.outputs:
        x.equate(x.read(ref), {})
    scales: dict[int, list[Scale]] = {}
    for name, value in number.items():
        for key, power in x.known(x.of[value]).items():
            if key < 0:  # an unknown that is left is free: 0
                scales.setdefault(~key, []).append(Scale(name, power, offset.get(value, 0)))
    return {axis: tuple(some) for axis, some in scales.items()}, x.conflicts


def _sums(calls: Sequence[Call], parameters: Container[int]) -> tuple[dict[int, int], dict[int, int]]:
    """number of p + n -> p, and p -> n, for parameters that are read as this sum alone; n is a whole number."""
    copies: dict[int, int] = {}  # of a parameter -> it
    sums: dict[int, dict[int, int]] = {}  # parameter -> what it is read as -> what was added
    for call in calls:
        for ref in call.refs:
            p = copies.get(ref.value, ref.value)
            if p in parameters and call.name in ("_to_copy", "detach", "alias"):
                copies[call.outs[0].value] = p
            elif p in parameters and call.outs:
                n = call.args[-1] if call.name == "add" and not (call.kwargs or call.op._schema.is_mutable) else 0
                whole = isinstance(n, (int, float)) and float(n).is_integer()
                sums.setdefault(p, {})[call.outs[0].value] = int(n) if whole else 0
    offset = {p: min(read.values()) for p, read in sums.items() if len(set(read.values())) == 1}
    return {out: p for p, read in sums.items() if offset.get(p) for out in read}, offset
