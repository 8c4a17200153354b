"""Functions that sum over a shared dimension: products, convolutions, recurrent layers, attention.

Worked example: the call addmm(bias (8,), x (2, 3), w (3, 8)) contracts the 3 and produces the 8. So the rows of w
consume what made the columns of x, and the columns of w and the bias produce what the result has as its columns.
"""

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
    a_weight, b_weight = s.weight(a), s.weight(b)
    a_dims = s.of(a)
    b_dims = s.of(b)
    b_inner, *columns = b_dims[-2:]  # no columns where b is a vector
    batch = []
    for of_a, of_b in zip(a_dims[:-2], b_dims[:-2], strict=False):
        dim = s.unify(of_a, of_b, either)
        if not (a_weight or b_weight):  # activations by activations, one product for each head
            s.algebra.mark(dim, Mark.HEADS)
        batch.append(dim)
    s.contract(a_dims[-1], b_inner, a_weight, b_weight)
    s.produce(a, a_dims[:-1])
    s.produce(b, [*b_dims[:-2], *columns])
    rows = a_dims[-2:-1]
    return [s.join([*batch, *rows, *columns], *bias or [None])]


@rule("convolution", "_convolution")
def convolution(s: Axes, call: Call) -> Dims:
    """b (g i) x, (g o) i k -> b (g o) x; transposed, b (g i) x, (g i) o k -> b (g o) x"""
    x, weight, bias, *_, transposed, _, groups = call.args[:9]
    batch, channels, *space = s.of(x)
    outer, inner, *kernel = s.of(weight)
    for dim in (*space, *kernel):
        s.pin(dim, reasons.SPATIAL)
    groups_of_x, channels_of_group = s.algebra.reshape([channels], [groups, x.shape[1] // groups])
    groups_of_weight, outer = s.algebra.reshape([outer], [groups, weight.shape[0] // groups])
    read, produced = (outer, inner) if transposed else (inner, outer)
    group = s.unify(groups_of_x, groups_of_weight, either)
    s.contract(channels_of_group, read, s.weight(x), s.weight(weight))
    s.produce(weight, [groups_of_weight, produced])
    out = (*group, *produced)
    is_depthwise = weight.shape[1] == 1 and weight.shape[0] <= groups  # each channel is a group of its own
    if groups > 1 and not is_depthwise:
        s.algebra.mark(group, Mark.GROUPS)
    else:
        s.algebra.mark(out, Mark.CHANNELS)
    return [[batch, *s.join([out], bias), *s.fixed(call.outs[0].shape[2:])]]


@rule("_trilinear")
def trilinear(s: Axes, call: Call) -> Dims:
    """b i, o i j, b j -> b o: three tensors multiplied and summed; `expand` says which dimensions each lacks"""
    summed = call.given["sumdim"]
    operands = []  # (dimensions, weight) of each of the three
    for n, ref in enumerate(call.refs, 1):
        dims = s.of(ref)
        for d in call.given[f"expand{n}"]:
            dims.insert(d, ())
        operands.append((dims, s.weight(ref)))
        s.produce(ref, [dim for d, dim in enumerate(dims) if d not in summed])
    result = []
    ndim = len(operands[0][0])
    for d in range(ndim):
        operands_with_d = [(dims[d], weight) for dims, weight in operands if dims[d]]
        if d not in summed:
            dims_to_unify = [dim for dim, _ in operands_with_d]
            result.append(functools.reduce(lambda a, b: s.unify(a, b, either), dims_to_unify, ()))
        elif len(operands_with_d) == 2:
            (a, a_weight), (b, b_weight) = operands_with_d
            s.contract(a, b, a_weight, b_weight)
        else:  # a sum over one operand or three is no contraction that the algebra knows
            for dim, _ in operands_with_d:
                s.pin(dim, reasons.SUMMED)
    return [result]


@rule("_cdist_forward", "_euclidean_dist")
def distance(s: Axes, call: Call) -> Dims:
    """b i k, b j k -> b i j: a norm of differences over k, where zeros leave it alone"""
    *a_batch, i, a_inner = s.of(call.refs[0])
    *b_batch, j, b_inner = s.of(call.refs[1])
    is_changed_by_zeros = call.given.get("p", 2) < 0
    for leaf in s.unify(a_inner, b_inner):
        if not leaf.zero or is_changed_by_zeros:
            s.pin((leaf,), reasons.NORM)
    batch = [s.unify(a, b, lambda a, b: False) for a, b in zip(a_batch, b_batch, strict=True)]
    return [not_zero([*batch, i, j])]


@rule("mkldnn_rnn_layer")
def recurrent(s: Axes, call: Call) -> Dims:
    """t b i, (g h) i, (g h) h -> t b h: g gates lie together in the weights, and the state of size h is fed back"""
    x, w_input, w_state, *biases, hidden, cell = call.args[:7]
    time, batch, features = s.of(x)
    s.pin(time, reasons.STEPS)
    state_size = hidden.shape[-1]
    state = s.unify(s.of(hidden)[-1], s.of(cell)[-1])
    for ref in (w_input, w_state, *biases):
        rows = s.of(ref)[0]
        gates, units = s.algebra.reshape([rows], [ref.shape[0] // state_size, state_size])
        s.pin(gates, reasons.GATES)
        s.produce(ref, [units])
        # a unit whose first state, weights and biases are all zero stays zero at every step
        state = s.unify(state, units)
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
    q_batch, q_heads, q_positions, q_inner = s.of(q)
    k_batch, k_heads, k_positions, k_inner = s.of(k)
    v_batch, v_heads, v_positions, v_columns = s.of(v)
    batch = s.unify(s.unify(q_batch, k_batch), v_batch)
    # the query heads are (key-value heads, queries that share one): along the latter, keys and values are equal
    kv_heads, sharers = s.algebra.reshape([q_heads], [k.shape[1], q.shape[1] // k.shape[1]])
    s.algebra.mark(sharers, Mark.EXPANDED)
    kv_heads = s.unify(s.unify(v_heads, k_heads, first), kv_heads, first)
    heads = (*kv_heads, *with_zero(sharers, False))
    s.algebra.mark(heads, Mark.HEADS)
    s.contract(q_inner, k_inner, 0, 0)
    for dim in (k_positions, v_positions):
        s.pin(dim, reasons.ATTENTION)
    s.join([batch, heads, q_positions, k_positions], *mask or [None])
    return [[batch, heads, q_positions, v_columns], *stay(s, call)[1:]]


@rule("linalg_solve_triangular")
def solve_triangular(s: Axes, call: Call) -> Dims:
    """b n n, b n k -> b n k with ones on the diagonal: one triangular system for each of b"""
    if not (call.given["unitriangular"] and call.given["left"]):
        return unknown(s, call)
    matrix, right_side = (s.of(ref) for ref in call.args)
    for ref in call.args:
        s.produce(ref)
    for dim in (*matrix[-2:], right_side[-2]):
        s.pin(dim, reasons.SYSTEM)
    batch = [s.unify(b, a, first) for a, b in zip(matrix[:-2], right_side[:-2], strict=True)]
    return [[*batch, *right_side[-2:]]]


Factors = list[tuple[Ref, int]]  # (tensor, dimension) whose sizes are multiplied


def multiplications(call: Call) -> list[Factors]:
    """The multiply-accumulates of a call, as a sum of products of sizes of dimensions.

    Matrix products, convolutions and attention count, biases and elementwise operations don't.
    """
    rule = RULES.get(call.name)
    if rule is mm:
        a, b = call.refs[-2:]
        return [[*_all_dims(a), *_columns(b)]]
    if call.name == "_grouped_mm":
        a, b = call.refs[:2]
        return [[*_all_dims(a), *_columns(b)]]
    if rule is convolution:
        x, weight = call.refs[:2]
        transposed = call.args[6]
        image = x if transposed else call.outs[0]  # a transposed one multiplies once per input position
        return [[*_all_dims(image, but=1), *_all_dims(weight)]]
    if rule is recurrent:
        x, w_input, w_state = call.refs[:3]
        of_input = [*_all_dims(x), (w_input, 0)]
        of_state = [*_all_dims(x, but=2), *_all_dims(w_state)]
        return [of_input, of_state]
    if rule is attention:
        q, k, v = call.refs[:3]
        of_scores = [*_all_dims(q), (k, 2)]
        of_values = [*_all_dims(q, but=3), (k, 2), (v, 3)]
        return [of_scores, of_values]
    return []


def _all_dims(ref: Ref, but: int | None = None) -> Factors:
    return [(ref, d) for d in range(len(ref.shape)) if d != but]


def _columns(ref: Ref) -> Factors:
    """The last dimension of a matrix or a stack of them; a vector has no columns."""
    ndim = len(ref.shape)
    return [(ref, ndim - 1)] if ndim > 1 else []
