"""Functions that sum over a shared dimension: products, convolutions, recurrent layers, attention.

Worked example: the call addmm(bias (8,), x (2, 3), w (3, 8)) contracts the 3 and produces the 8. So the rows of w
consume the columns of x, and the columns of w and the bias produce the columns of the result.
"""

from __future__ import annotations

from .. import reasons
from ..axes import Dim, Mark, with_zero
from ..sizes import Ref
from ..trace import Call
from .others import stay, unknown
from .state import RULES, Axes, Dims, either, first, never, not_zero, rule


@rule("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "vdot")
def mm(s: Axes, call: Call) -> Dims:
    """... i k, ... k j -> ... i j: k is contracted; leading dimensions go together"""
    *bias, a, b = call.refs
    a_weight = s.weight(a)
    b_weight = s.weight(b)
    a_dims = s.of(a)
    b_dims = s.of(b)
    a_batch = a_dims[:-2]
    b_batch = b_dims[:-2]
    rows = a_dims[-2:-1]  # none where a is a vector
    a_inner = a_dims[-1]
    b_inner, *columns = b_dims[-2:]  # no columns where b is a vector

    are_activations = not (a_weight or b_weight)
    batch = []
    for of_a, of_b in zip(a_batch, b_batch, strict=False):  # a matrix by a vector has no batch
        dim = s.unify(of_a, of_b, either)
        if are_activations:  # attention multiplies so, once for each head
            s.algebra.mark(dim, Mark.HEADS)
        batch.append(dim)
    s.contract(a_inner, b_inner, a_weight, b_weight)
    s.produce(a, [*a_batch, *rows])
    s.produce(b, [*b_batch, *columns])
    result = [*batch, *rows, *columns]
    for ref in bias:
        result = s.join(result, ref)
    return [result]


@rule("convolution", "_convolution")
def convolution(s: Axes, call: Call) -> Dims:
    """b (g i) x, (g o) i k -> b (g o) x; transposed, b (g i) x, (g i) o k -> b (g o) x"""
    x, weight, bias = call.args[:3]
    transposed = call.args[6]
    groups = call.args[8]
    batch, channels, *space = s.of(x)
    outer, inner, *kernel = s.of(weight)
    for dim in (*space, *kernel):
        s.pin(dim, reasons.SPATIAL)
    channels_in_group = x.shape[1] // groups
    outer_in_group = weight.shape[0] // groups
    groups_of_x, channels_of_group = s.factors(channels, groups, channels_in_group)
    groups_of_weight, outer = s.factors(outer, groups, outer_in_group)
    read, produced = inner, outer
    if transposed:
        read, produced = outer, inner
    group = s.unify(groups_of_x, groups_of_weight, either)
    x_weight = s.weight(x)
    kernel_weight = s.weight(weight)
    s.contract(channels_of_group, read, x_weight, kernel_weight)
    s.produce(weight, [groups_of_weight, produced])

    new_channels = (*group, *produced)
    rows, columns = weight.shape[:2]
    is_depthwise = columns == 1 and rows <= groups  # each channel is a group of its own
    has_wide_groups = groups > 1 and not is_depthwise
    if has_wide_groups:
        s.algebra.mark(group, Mark.GROUPS)
    else:
        s.algebra.mark(new_channels, Mark.CHANNELS)
    joined = s.join([new_channels], bias)
    _, _, *new_shape = call.outs[0].shape
    new_space = s.fixed(new_shape)
    return [[batch, *joined, *new_space]]


@rule("_trilinear")
def trilinear(s: Axes, call: Call) -> Dims:
    """b i, o i j, b j -> b o: three tensors multiplied and summed; `expand` says which dimensions each lacks"""
    given = call.given
    summed = given["sumdim"]
    operands = []  # (dimensions, how much of a weight) of each of the three
    for n, ref in enumerate(call.refs, 1):
        dims = s.of(ref)
        missing = given[f"expand{n}"]
        for d in missing:
            dims.insert(d, ())
        weight = s.weight(ref)
        operands.append((dims, weight))
        produced = [dim for d, dim in enumerate(dims) if d not in summed]
        s.produce(ref, produced)

    result = []
    first_dims, _ = operands[0]
    for d in range(len(first_dims)):
        operands_with_d = []
        for dims, weight in operands:
            if dims[d]:
                operands_with_d.append((dims[d], weight))
        if d in summed:
            _sum_of_products(s, operands_with_d)
            continue
        product = ()
        for dim, _ in operands_with_d:
            product = s.unify(product, dim, either)
        result.append(product)
    return [result]


def _sum_of_products(s: Axes, operands: list[tuple[Dim, int]]) -> None:
    """Sums over a dimension that some operands share, each given by that dimension and how much of a weight it is."""
    if len(operands) == 2:
        (a, a_weight), (b, b_weight) = operands
        s.contract(a, b, a_weight, b_weight)
        return
    # a sum over one operand or three is no contraction that the algebra knows
    for dim, _ in operands:
        s.pin(dim, reasons.SUMMED)


@rule("_cdist_forward", "_euclidean_dist")
def distance(s: Axes, call: Call) -> Dims:
    """b i k, b j k -> b i j: the norm of differences over k; zeros leave a norm alone"""
    a, b = call.refs[:2]
    *a_batch, i, a_inner = s.of(a)
    *b_batch, j, b_inner = s.of(b)
    inner = s.unify(a_inner, b_inner)
    power = call.given.get("p", 2)
    if power < 0:  # a zero more would make such a norm 0
        s.pin(inner, reasons.NORM)
    else:
        s.pin_where(inner, reasons.NORM, zero=False)
    batch = s.unify_all(a_batch, b_batch, never)
    result = not_zero([*batch, i, j])
    return [result]


@rule("mkldnn_rnn_layer")
def recurrent(s: Axes, call: Call) -> Dims:
    """t b i, (g h) i, (g h) h -> t b h: g gates lie together in the weights, and the state of size h is fed back"""
    x, w_input, w_state, *biases, hidden, cell = call.args[:7]
    time, batch, features = s.of(x)
    s.pin(time, reasons.STEPS)
    state_size = hidden.shape[-1]
    *_, hidden_units = s.of(hidden)
    *_, cell_units = s.of(cell)
    state = s.unify(hidden_units, cell_units)
    for ref in (w_input, w_state, *biases):
        rows, *_ = s.of(ref)
        num_gates = ref.shape[0] // state_size
        gates, units = s.factors(rows, num_gates, state_size)
        s.pin(gates, reasons.GATES)
        s.produce(ref, [units])
        # a unit whose first state, weights and biases are all zero stays zero at every step
        state = s.unify(state, units)
    _, input_columns = s.of(w_input)
    _, state_columns = s.of(w_state)
    x_weight = s.weight(x)
    input_weight = s.weight(w_input)
    state_weight = s.weight(w_state)
    s.contract(features, input_columns, x_weight, input_weight)
    s.contract(state, state_columns, 0, state_weight)

    every_step = [time, batch, state]
    last_states = []  # of the hidden state and of the cell
    for out in call.outs[1:3]:
        *outer_shape, _ = out.shape
        layers_and_batch = s.fixed(outer_shape)
        last_states.append([*layers_and_batch, state])
    others = stay(s, call)[3:]
    return [every_step, *last_states, *others]


@rule(
    *"_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention".split(),
    *"_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention".split(),
    *"_scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math".split(),
)
def attention(s: Axes, call: Call) -> Dims:
    """b h q d, b h k d, b h k v -> b h q v: heads go together, d and k are contracted"""
    q, k, v, *masks = call.refs[:4]  # one mask or none
    q_batch, q_heads, q_positions, q_inner = s.of(q)
    k_batch, k_heads, k_positions, k_inner = s.of(k)
    v_batch, v_heads, v_positions, v_columns = s.of(v)
    batch = s.unify(q_batch, k_batch)
    batch = s.unify(batch, v_batch)

    # the query heads are (key-value heads, queries that share one): along the queries, keys and values are equal
    num_kv_heads = k.shape[1]
    num_sharers = q.shape[1] // num_kv_heads
    kv_heads_of_q, sharers = s.factors(q_heads, num_kv_heads, num_sharers)
    s.algebra.mark(sharers, Mark.EXPANDED)
    # the values come first: where they are zero, so is the result, whatever the scores are
    kv_heads = s.unify(v_heads, k_heads, first)
    kv_heads = s.unify(kv_heads, kv_heads_of_q, first)
    sharers_of_result = with_zero(sharers, False)
    heads = (*kv_heads, *sharers_of_result)
    s.algebra.mark(heads, Mark.HEADS)
    s.contract(q_inner, k_inner, 0, 0)
    summed_positions = (k_positions, v_positions)
    for dim in summed_positions:
        s.pin(dim, reasons.ATTENTION)
    scores = [batch, heads, q_positions, k_positions]
    for mask in masks:
        s.join(scores, mask)
    result = [batch, heads, q_positions, v_columns]
    _, *others = stay(s, call)
    return [result, *others]


@rule("linalg_solve_triangular")
def solve_triangular(s: Axes, call: Call) -> Dims:
    """b n n, b n k -> b n k with ones on the diagonal: one triangular system for each of b"""
    given = call.given
    has_ones = given["unitriangular"]
    if not (has_ones and given["left"]):  # zeros on the diagonal would leave no solution
        return unknown(s, call)
    matrix, right_side = call.args
    *matrix_batch, rows, columns = s.of(matrix)
    *side_batch, unknowns, systems = s.of(right_side)
    for ref in call.args:
        s.produce(ref)
    for dim in (rows, columns, unknowns):
        s.pin(dim, reasons.SYSTEM)
    batch = s.unify_all(side_batch, matrix_batch, first)
    return [[*batch, unknowns, systems]]


Factors = list[tuple[Ref, int]]  # (tensor, dimension) whose sizes are multiplied


def multiplications(call: Call) -> list[Factors]:
    """The multiply-accumulates of a call, as a sum of products of sizes of dimensions.

    Matrix products, convolutions and attention count, biases and elementwise operations don't.
    """
    rule = RULES.get(call.name)
    is_matrix_product = rule is mm or call.name == "_grouped_mm"
    if is_matrix_product:
        return _of_matrices(call)
    if rule is convolution:
        return _of_convolution(call)
    if rule is recurrent:
        return _of_recurrent(call)
    if rule is attention:
        return _of_attention(call)
    if rule is trilinear:
        return _of_trilinear(call)
    return []


def _of_matrices(call: Call) -> list[Factors]:
    """Each element of a is multiplied by a row of b."""
    a, b = call.refs[-2:]  # after a bias
    if call.name == "_grouped_mm":
        a, b = call.refs[:2]  # before the offsets
    ndim = len(b.shape)
    factors = _all_dims(a)
    if ndim > 1:  # a vector has no columns
        columns = (b, ndim - 1)
        factors.append(columns)
    return [factors]


def _of_convolution(call: Call) -> list[Factors]:
    """Every position of the image takes the whole weight."""
    x, weight = call.refs[:2]
    is_transposed = call.args[6]
    image = x if is_transposed else call.outs[0]  # a transposed one multiplies once per input position
    positions = _all_dims(image, but=1)
    kernel = _all_dims(weight)
    return [[*positions, *kernel]]


def _of_recurrent(call: Call) -> list[Factors]:
    """Every step multiplies its input and the state before it."""
    x, w_input, w_state = call.refs[:3]
    rows = (w_input, 0)
    inputs = _all_dims(x)
    of_input = [*inputs, rows]
    steps = _all_dims(x, but=2)
    rows_and_columns = _all_dims(w_state)
    of_state = [*steps, *rows_and_columns]
    return [of_input, of_state]


def _of_attention(call: Call) -> list[Factors]:
    """Scores are queries by keys; the result is scores by values."""
    q, k, v = call.refs[:3]
    k_positions = (k, 2)
    queries = _all_dims(q)
    of_scores = [*queries, k_positions]
    q_positions = _all_dims(q, but=3)
    columns = (v, 3)
    of_values = [*q_positions, k_positions, columns]
    return [of_scores, of_values]


def _of_trilinear(call: Call) -> list[Factors]:
    """Each element of the product of all three tensors is added to a sum."""
    given = call.given
    factor_of_dim: dict[int, tuple[Ref, int]] = {}
    for n, ref in enumerate(call.refs, 1):
        missing = given[f"expand{n}"]
        num_dims = len(ref.shape) + len(missing)  # those of the product
        own_dims = [d for d in range(num_dims) if d not in missing]
        for own_dim, d in enumerate(own_dims):
            factor_of_dim.setdefault(d, (ref, own_dim))
    return [list(factor_of_dim.values())]


def _all_dims(ref: Ref, but: int | None = None) -> Factors:
    ndim = len(ref.shape)
    return [(ref, d) for d in range(ndim) if d != but]
