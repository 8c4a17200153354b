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
    ref = call.args[0]
    dims = s.of(ref)
    indices = _indices(call)
    for index in indices:
        if index is not None:
            _pin_index(s, index)

    shape = call.outs[0].shape
    indexed = _indexed_dims(indices)
    start = indexed[0]
    mask_ndim = len(indices[start].shape)
    has_shape_of_mask = len(shape) == len(dims) - mask_ndim + 1  # its true elements become one dimension
    is_mask = len(indexed) == 1 and has_shape_of_mask
    if is_mask:  # a mask covers as many dimensions as it has
        indexed = list(range(start, start + mask_ndim))
    others = []
    for k, dim in enumerate(dims):
        if k in indexed:
            s.pin(dim, reasons.NUMBERED)
        else:
            others.append(dim)
    if len(others) > 1 and s.weight(ref):
        # the matrix of one expert of several: only the call that uses it says which dimension it produces
        for dim in others:
            s.algebra.mark(dim, Mark.EXPERTS)
    else:
        s.produce(ref, others)

    num_new = len(shape) - len(others)
    are_neighbours = indexed == list(range(start, indexed[-1] + 1))
    at = start if are_neighbours else 0  # torch puts the new dimensions first where they could be anywhere
    new_shape = shape[at : at + num_new]
    new_dims = s.fixed(new_shape)
    return [[*others[:at], *new_dims, *others[at:]]]


def _indices(call: Call) -> list[Ref | None]:
    """The index of each dimension, None for a dimension that is not indexed; dimensions at the end may be missing."""
    ref, *arguments = call.args
    if call.name == "index":
        return arguments[0]
    if call.name == "embedding":
        return [arguments[0]]
    d, index = arguments[:2]
    d %= len(ref.shape)
    return [None] * d + [index]


def _indexed_dims(indices: list[Ref | None]) -> list[int]:
    return [k for k, index in enumerate(indices) if index is not None]


def _pin_index(s: Axes, index: Ref) -> None:
    for dim in s.of(index):
        s.pin(dim, reasons.INDEX)


@rule("gather")
def gather(s: Axes, call: Call) -> Dims:
    """x[i, index[i, j]] -> i j: one dimension is looked up by number, the others go together"""
    ref, d, index = call.args[:3]
    dims = s.of(ref)
    d %= len(dims)
    result = s.of(index)
    for k, n in enumerate(index.shape):
        is_whole = n == ref.shape[k]  # an index may be shorter: it then reads the first positions only
        if k != d and is_whole:
            result[k] = s.unify(dims[k], result[k], first)
        else:
            s.pin(dims[k], reasons.NUMBERED)
            s.pin(result[k], reasons.INDEX)
    s.produce(ref)
    return [result]


@rule("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill", "index_reduce")
def write(s: Axes, call: Call) -> Dims:
    """x[i, index[i, j]] = y[i, j] (`index_*`: x[i, index[j]]): positions of one dimension are looked up by number, the
    others go together; zeros stay zeros where y is added or reduced, too"""
    ref, d, index, value = call.args[:4]
    d %= len(ref.shape)
    dims = s.of(ref)
    index_dims = s.of(index)
    s.produce(ref)
    index_has_all_dims = "scatter" in call.name  # an index for every element of y, not for every row of it
    shapes = [ref.shape]  # of operands that have all dimensions of x
    if index_has_all_dims:
        shapes.append(index.shape)
    if isinstance(value, Ref) and value.shape:
        s.produce(value)
        shapes.append(value.shape)
        value_dims = s.of(value)
    else:  # one number
        value_dims = [()] * len(dims)
        dims = dims if value == 0 else not_zero(dims)

    result = []
    for k, dim in enumerate(dims):
        sizes = {shape[k] for shape in shapes}
        goes_together = k != d and len(sizes) == 1
        if goes_together and value_dims[k]:
            dim = s.unify(dim, value_dims[k], both)
        if goes_together and index_has_all_dims:
            dim = s.unify(dim, index_dims[k], first)
        if not goes_together:
            s.pin(dim, reasons.NUMBERED)
            s.pin(value_dims[k], reasons.NUMBERED)
        if not goes_together and index_has_all_dims:
            s.pin(index_dims[k], reasons.NUMBERED)
        result.append(dim)
    if not index_has_all_dims:
        _pin_index(s, index)
    return [result]


@rule("index_put", "_index_put_impl")
def index_put(s: Axes, call: Call) -> Dims:
    """x[i, j, ...] = y: the dimensions after the last indexed one go together"""
    ref, indices, value = call.args[:3]
    dims = s.of(ref)
    value_dims = s.of(value)
    for operand in (ref, value):
        s.produce(operand)
    indexed = _indexed_dims(indices)
    for k in indexed:
        _pin_index(s, indices[k])

    start = indexed[0]
    start_of_rest = indexed[-1] + 1
    index_shape = indices[start].shape
    end_of_mask = start + len(index_shape)
    may_be_mask = len(indexed) == 1 and index_shape == ref.shape[start:end_of_mask]
    if may_be_mask:  # a mask covers as many dimensions as it has
        start_of_rest = end_of_mask
    numbered = dims[:start_of_rest]
    rest = dims[start_of_rest:]
    num_missing = len(rest) - len(value_dims)
    value_dims = [()] * num_missing + value_dims  # the value may broadcast
    start_of_value_rest = len(value_dims) - len(rest)
    value_numbered = value_dims[:start_of_value_rest]
    value_rest = value_dims[start_of_value_rest:]
    for dim in (*numbered, *value_numbered):
        s.pin(dim, reasons.NUMBERED)
    rest = s.unify_all(rest, value_rest)
    return [[*numbered, *rest]]


@rule("masked_scatter")
def masked_scatter(s: Axes, call: Call) -> Dims:
    """x[mask] = y: whole rows are written where the mask is the same in a row, and then the columns go together"""
    ref, mask, value = call.args
    covers_all = mask.shape == ref.shape
    has_whole_rows = value.shape[-1:] == ref.shape[-1:]
    if not (_is_the_same_in_a_row(s, mask) and covers_all and has_whole_rows):
        return unknown(s, call)
    *rows, columns = s.of(ref)
    *value_rows, value_columns = s.of(value)
    *mask_rows, mask_columns = s.of(mask)
    for dim in (*rows, *value_rows, *mask_rows):
        s.pin(dim, reasons.NUMBERED)
    for operand in (ref, value):
        s.produce(operand)
    columns = s.unify(columns, value_columns)
    # the mask is the same in a row, so it says nothing about where the columns are zero
    columns = s.unify(columns, mask_columns, first)
    return [[*rows, columns]]


def _is_the_same_in_a_row(s: Axes, mask: Ref) -> bool:
    """Whether the call that made the mask expanded it along its last dimension."""
    maker = s.maker.get(mask.value)
    if maker is None or maker.name != "expand":
        return False
    expanded = maker.args[0]
    return expanded.shape[-1:] == (1,)


@rule("_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(s: Axes, call: Call) -> Dims:
    """v d, b i -> b d: a sum, average or maximum of rows that are looked up by number"""
    table = call.args[0]
    rows, columns = s.of(table)
    s.pin(rows, reasons.NUMBERED)
    # a sum, average or maximum of zeros is zero, so the columns go on as they are
    s.produce(table, [columns])
    result, *others = stay(s, call)
    bags, _ = result
    return [[bags, columns], *others]


@rule("embedding_renorm")
def embedding_renorm(s: Axes, call: Call) -> Dims:
    """v d -> v d: rows that are looked up by number and scaled down to a norm; zeros leave the norm alone"""
    rows, columns = s.of(call.args[0])
    s.pin(rows, reasons.NUMBERED)
    return [[rows, columns]]


@rule("_pack_padded_sequence", "_pad_packed_sequence")
def packed(s: Axes, call: Call) -> Dims:
    """b t ... -> n ...: sequences without their padding; `_pad_packed_sequence` puts it back"""
    num_step_dims, num_new_step_dims = 2, 1
    if call.name == "_pad_packed_sequence":
        num_step_dims, num_new_step_dims = 1, 2
    dims = s.of(call.args[0])
    step_dims = dims[:num_step_dims]
    rest = dims[num_step_dims:]
    for dim in step_dims:
        s.pin(dim, reasons.STEPS)
    padding_value = call.given.get("padding_value", 0)
    if padding_value != 0:  # padding lies in the place of the zeros, too
        rest = not_zero(rest)
    result, *others = stay(s, call)
    new_step_dims = result[:num_new_step_dims]
    return [[*new_step_dims, *rest], *others]
