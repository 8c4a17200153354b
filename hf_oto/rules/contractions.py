"""Functions that sum over a shared dimension: products, convolutions, recurrent layers, attention."""

from __future__ import annotations

import functools

from .. import reasons
from ..axes import Mark, with_zero
from ..sizes import Ref
from ..trace import Call
from .others import stay, unknown
from .state import RULES, Axes, Dims, either, first, not_zero, rule


@rule("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "vdot")
def mm(s: Axes, call: Call) -> Dims:
    """... i k, ... k j -> ... i j: k is contracted; leading dimensions go together"""
    *bias, a, b = call.refs
    weights, da, db = (s.weight(a), s.weight(b)), s.of(a), s.of(b)
    inner, *columns = db[-2:]
    batch = [s.unify(x, y, either) for x, y in zip(da[:-2], db[:-2], strict=False)]
    for dim in batch if not any(weights) else ():
        s.algebra.mark(dim, Mark.HEADS)
    s.contract(da[-1], inner, *weights)
    s.produce(a, da[:-1])
    s.produce(b, [*db[:-2], *columns])
    return [s.join([*batch, *da[-2:-1], *columns], *bias or [None])]


@rule("convolution", "_convolution")
def convolution(s: Axes, call: Call) -> Dims:
    """b (g i) x, (g o) i k -> b (g o) x; transposed, b (g i) x, (g i) o k -> b (g o) x"""
    x, weight, bias, *_, transposed, _, groups = call.args[:9]
    batch, channels, *space = s.of(x)
    outer, inner, *kernel = s.of(weight)
    for dim in (*space, *kernel):
        s.pin(dim, reasons.SPATIAL)
    of_x, inside = s.algebra.reshape([channels], [groups, x.shape[1] // groups])
    of_weight, outer = s.algebra.reshape([outer], [groups, weight.shape[0] // groups])
    read, made = (outer, inner) if transposed else (inner, outer)
    group = s.unify(of_x, of_weight, either)
    s.contract(inside, read, s.weight(x), s.weight(weight))
    s.produce(weight, [of_weight, made])
    out = (*group, *made)
    if groups > 1 and (weight.shape[1] > 1 or weight.shape[0] > groups):
        s.algebra.mark(group, Mark.GROUPS)
    else:
        s.algebra.mark(out, Mark.CHANNELS)
    return [[batch, *s.join([out], bias), *s.fixed(call.outs[0].shape[2:])]]


@rule("_trilinear")
def trilinear(s: Axes, call: Call) -> Dims:
    """b i, o i j, b j -> b o: three tensors multiplied and summed; `expand` says which dimensions each lacks"""
    sides, given, out = [], call.given, []
    for n, ref in enumerate(call.refs, 1):
        dims = s.of(ref)
        for d in given[f"expand{n}"]:
            dims.insert(d, ())
        sides.append((dims, s.weight(ref)))
        s.produce(ref, [dim for d, dim in enumerate(dims) if d not in given["sumdim"]])
    for d in range(len(sides[0][0])):
        here = [(dims[d], weight) for dims, weight in sides if dims[d]]
        if d not in given["sumdim"]:
            out.append(functools.reduce(lambda a, b: s.unify(a, b, either), [dim for dim, _ in here], ()))
        elif len(here) == 2:
            (a, a_weight), (b, b_weight) = here
            s.contract(a, b, a_weight, b_weight)
        else:
            for dim, _ in here:
                s.pin(dim, reasons.SUMMED)
    return [out]


@rule("_cdist_forward", "_euclidean_dist")
def distance(s: Axes, call: Call) -> Dims:
    """b i k, b j k -> b i j: a norm of differences over k, where zeros leave it alone"""
    (*batch, i, left), (*others, j, right) = (s.of(ref) for ref in call.refs)
    for leaf in s.unify(left, right):
        if not leaf.zero or call.given.get("p", 2) < 0:
            s.pin((leaf,), reasons.NORM)
    batch = [s.unify(a, b, lambda a, b: False) for a, b in zip(batch, others, strict=True)]
    return [not_zero([*batch, i, j])]


@rule("mkldnn_rnn_layer")
def recurrent(s: Axes, call: Call) -> Dims:
    """t b i, (g h) i, (g h) h -> t b h: g gates lie together in the weights, and the state of size h is fed back"""
    x, w_input, w_state, *biases, hidden, cell = call.args[:7]
    time, batch, features = s.of(x)
    s.pin(time, reasons.STEPS)
    state = s.unify(s.of(hidden)[-1], s.of(cell)[-1])
    for ref in (w_input, w_state, *biases):
        gates, units = s.algebra.reshape([s.of(ref)[0]], [ref.shape[0] // hidden.shape[-1], hidden.shape[-1]])
        s.pin(gates, reasons.GATES)
        s.produce(ref, [units])
        state = s.unify(state, units)  # zero in all of these it is zero for ever
    s.contract(features, s.of(w_input)[1], s.weight(x), s.weight(w_input))
    s.contract(state, s.of(w_state)[1], 0, s.weight(w_state))
    states = [[*s.fixed(out.shape[:-1]), state] for out in call.outs[1:3]]
    return [[time, batch, state], *states, *stay(s, call)[3:]]


@rule(
    *"_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention".split(),
    *"_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention".split(),
    *"_scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math".split(),
)
def attention(s: Axes, call: Call) -> Dims:
    """b h q d, b h k d, b h k v -> b h q v: heads go together, d and k are contracted"""
    q, k, v, *mask = call.refs[:4]
    dq, dk, dv = s.of(q), s.of(k), s.of(v)
    batch = s.unify(s.unify(dq[0], dk[0]), dv[0])
    group, each = s.algebra.reshape([dq[1]], [k.shape[1], q.shape[1] // k.shape[1]])  # each: of grouped queries
    s.algebra.mark(each, Mark.EXPANDED)
    heads = (*s.unify(s.unify(dv[1], dk[1], first), group, first), *with_zero(each, False))
    s.algebra.mark(heads, Mark.HEADS)
    s.contract(dq[3], dk[3], 0, 0)
    for dim in (dk[2], dv[2]):
        s.pin(dim, reasons.ATTENTION)
    s.join([batch, heads, dq[2], dk[2]], *mask or [None])
    return [[batch, heads, dq[2], dv[3]], *stay(s, call)[1:]]


@rule("linalg_solve_triangular")
def solve_triangular(s: Axes, call: Call) -> Dims:
    """b n n, b n k -> b n k with ones on the diagonal: one triangular system for each of b"""
    if not (call.given["unitriangular"] and call.given["left"]):
        return unknown(s, call)
    matrix, known = (s.of(ref) for ref in call.args)
    for ref in call.args:
        s.produce(ref)
    for dim in (*matrix[-2:], known[-2]):
        s.pin(dim, reasons.SYSTEM)
    batch = [s.unify(b, a, first) for a, b in zip(matrix[:-2], known[:-2], strict=True)]
    return [[*batch, *known[-2:]]]


def multiplications(call: Call) -> list[list[tuple[Ref, int]]]:
    """The dimensions whose sizes, multiplied, are the multiply-accumulates of a call; a list per product, summed.

    Matrix products, convolutions and attention count, biases and elementwise operations don't.
    """

    def all_of(ref: Ref, *but: int) -> list[tuple[Ref, int]]:
        return [(ref, d) for d in range(len(ref.shape)) if d not in but]

    if RULES.get(call.name) is mm or call.name == "_grouped_mm":
        a, b = call.refs[:2] if call.name == "_grouped_mm" else call.refs[-2:]
        return [[*all_of(a), *all_of(b)[1:][-1:]]]
    if RULES.get(call.name) is convolution:
        x, weight = call.refs[:2]
        image = x if call.args[6] else call.outs[0]  # a transposed one multiplies once per input position
        return [[*all_of(image, 1), *all_of(weight)]]
    if RULES.get(call.name) is recurrent:
        x, w_input, w_state = call.refs[:3]
        return [[*all_of(x), (w_input, 0)], [*all_of(x, 2), *all_of(w_state)]]
    if RULES.get(call.name) is attention:
        q, k, v = call.refs[:3]
        return [[*all_of(q), (k, 2)], [*all_of(q, 3), (k, 2), (v, 3)]]
    return []
