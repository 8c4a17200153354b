"""Functions that choose or write positions by number: indexing, gather and scatter, embeddings, packed sequences.

Worked example: embedding(table (40, 16), ids (2, 7)) looks the 40 rows up by number, so these are pinned: without row
3 the number 4 would mean another row. The 16 columns stay what they are, and the table produces them.
"""

from __future__ import annotations

from .. import reasons
from ..axes import Mark
from ..sizes import Ref
from ..trace import Call
from .others import stay, unknown
from .state import Axes, Dims, both, first, not_zero, rule


@rule("index", "index_select", "embedding")
def index_(s: Axes, call: Call) -> Dims:
    """x[i, j, ...]: indexed dimensions are looked up by number, the others stay; `index_select`s have one index"""
    dims = s.of(call.args[0])
    ref = call.args[0]
    if call.name == "index":
        indices = call.args[1]  # None for a dimension that is not indexed
    elif call.name == "index_select":
        d, index = call.args[1:3]
        indices = [None] * (d % len(dims)) + [index]
    else:
        indices = [call.args[1]]
    shape = call.outs[0].shape
    for index in indices:
        for dim in s.of(index) if index is not None else ():
            s.pin(dim, reasons.INDEX)

    indexed = [k for k, index in enumerate(indices) if index is not None]
    mask_ndim = len(indices[indexed[0]].shape)
    is_mask = len(indexed) == 1 and len(shape) == len(dims) - mask_ndim + 1
    if is_mask:  # a mask covers as many dimensions as it has
        indexed = list(range(indexed[0], indexed[0] + mask_ndim))
    for k in indexed:
        s.pin(dims[k], reasons.NUMBERED)
    others = [dim for k, dim in enumerate(dims) if k not in indexed]
    if len(others) > 1 and s.weight(ref):
        # one matrix of several, an expert's: only what it is used for says which dimension it produces
        for dim in others:
            s.algebra.mark(dim, Mark.EXPERTS)
    else:
        s.produce(ref, others)

    num_new = len(shape) - len(others)
    are_neighbours = indexed == list(range(indexed[0], indexed[-1] + 1))
    at = indexed[0] if are_neighbours else 0  # torch puts the new dimensions first where they could be anywhere
    return [[*others[:at], *s.fixed(shape[at : at + num_new]), *others[at:]]]


@rule("gather")
def gather(s: Axes, call: Call) -> Dims:
    """x[i, index[i, j]] -> i j: one dimension is looked up by number, the others go together"""
    ref, d, index = call.args[:3]
    dims = s.of(ref)
    result = s.of(index)
    for k, n in enumerate(index.shape):
        if k != d % len(dims) and n == ref.shape[k]:
            result[k] = s.unify(dims[k], result[k], first)
        else:
            s.pin(dims[k], reasons.NUMBERED)
            s.pin(result[k], reasons.INDEX)
    s.produce(ref)
    return [result]


@rule("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill", "index_reduce")
def write(s: Axes, call: Call) -> Dims:
    """x[i, index[i, j]] = y[i, j] (`index_*`: x[i, index[j]]): positions of one dimension are looked up by number, the
    others go together; added or reduced, zeros stay zeros as well"""
    ref, d, index, value = call.args[:4]
    d %= len(ref.shape)
    dims = s.of(ref)
    index_dims = s.of(index)
    s.produce(ref)
    index_has_all_dims = "scatter" in call.name  # an index for every element of y, not for every row of it
    shapes = [index.shape] if index_has_all_dims else []
    if isinstance(value, Ref) and value.shape:
        s.produce(value)
        shapes.append(value.shape)
        value_dims = s.of(value)
    else:  # one number
        value_dims = [()] * len(dims)
        dims = dims if value == 0 else not_zero(dims)

    result = []
    for k, dim in enumerate(dims):
        if k != d and all(shape[k] == ref.shape[k] for shape in shapes):
            if value_dims[k]:
                dim = s.unify(dim, value_dims[k], both)
            if index_has_all_dims:
                dim = s.unify(dim, index_dims[k], first)
        else:
            s.pin(dim, reasons.NUMBERED)
            if index_has_all_dims:
                s.pin(index_dims[k], reasons.NUMBERED)
            s.pin(value_dims[k], reasons.NUMBERED)
        result.append(dim)
    if not index_has_all_dims:
        for dim in index_dims:
            s.pin(dim, reasons.INDEX)
    return [result]


@rule("index_put", "_index_put_impl")
def index_put(s: Axes, call: Call) -> Dims:
    """x[i, j, ...] = y: the dimensions after the last that is indexed go together"""
    ref, indices, value = call.args[:3]
    dims = s.of(ref)
    value_dims = s.of(value)
    for operand in (ref, value):
        s.produce(operand)
    indexed = [k for k, index in enumerate(indices) if index is not None]
    for k in indexed:
        for dim in s.of(indices[k]):
            s.pin(dim, reasons.INDEX)

    start_of_rest = indexed[-1] + 1
    index_shape = indices[indexed[0]].shape
    if len(indexed) == 1 and index_shape == ref.shape[indexed[0] : indexed[0] + len(index_shape)]:
        start_of_rest = indexed[0] + len(index_shape)  # it may be a mask, which covers as many dimensions as it has
    num_rest = len(dims) - start_of_rest
    value_dims = [()] * (num_rest - len(value_dims)) + value_dims  # it may broadcast
    value_rest = len(value_dims) - num_rest
    for dim in (*dims[:start_of_rest], *value_dims[:value_rest]):
        s.pin(dim, reasons.NUMBERED)
    rest = [s.unify(a, b) for a, b in zip(dims[start_of_rest:], value_dims[value_rest:], strict=True)]
    return [[*dims[:start_of_rest], *rest]]


@rule("masked_scatter")
def masked_scatter(s: Axes, call: Call) -> Dims:
    """x[mask] = y, row by row: exact along the last dimension where the mask is seen to be the same all along it"""
    ref, mask, value = call.args
    maker = s.maker.get(mask.value)
    is_expanded = maker and maker.name == "expand" and maker.args[0].shape[-1:] == (1,)
    if not is_expanded or mask.shape != ref.shape or value.shape[-1:] != ref.shape[-1:]:
        return unknown(s, call)
    *rows, columns = s.of(ref)
    *value_rows, value_columns = s.of(value)
    *mask_rows, mask_columns = s.of(mask)
    for dim in (*rows, *value_rows, *mask_rows):
        s.pin(dim, reasons.NUMBERED)
    for operand in (ref, value):
        s.produce(operand)
    columns = s.unify(s.unify(columns, value_columns), mask_columns, first)
    return [[*rows, columns]]


@rule("_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(s: Axes, call: Call) -> Dims:
    """v d, b i -> b d: a sum, average or maximum of rows that are looked up by number"""
    table = call.args[0]
    outs = stay(s, call)
    rows, columns = s.of(table)
    s.pin(rows, reasons.NUMBERED)
    s.produce(table, [columns])
    bags = outs[0][0]
    return [[bags, columns], *outs[1:]]


@rule("embedding_renorm")
def embedding_renorm(s: Axes, call: Call) -> Dims:
    """v d -> v d: rows that are looked up by number, made shorter; zeros leave their norms alone"""
    rows, columns = s.of(call.args[0])
    s.pin(rows, reasons.NUMBERED)
    return [[rows, columns]]


@rule("_pack_padded_sequence", "_pad_packed_sequence")
def packed(s: Axes, call: Call) -> Dims:
    """b t ... -> n ..., sequences without their padding, or (`_pad_packed_sequence`) back"""
    num_step_dims = 1 if call.name == "_pad_packed_sequence" else 2
    dims = s.of(call.args[0])
    outs = stay(s, call)
    for dim in dims[:num_step_dims]:
        s.pin(dim, reasons.STEPS)
    rest = dims[num_step_dims:]
    if call.given.get("padding_value", 0) != 0:
        rest = not_zero(rest)
    new_step_dims = outs[0][: 3 - num_step_dims]
    return [[*new_step_dims, *rest], *outs[1:]]
