"""Functions that choose or write positions by number: indexing, gather and scatter, embeddings, packed sequences."""

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
    ref, *which, index = call.args[: 2 + (call.name == "index_select")]
    dims, shape = s.of(ref), call.outs[0].shape
    if isinstance(index, Ref):
        index = [None] * (which[0] % len(dims) if which else 0) + [index]
    for dim in (dim for i in index if i is not None for dim in s.of(i)):
        s.pin(dim, reasons.INDEX)
    used = [k for k, i in enumerate(index) if i is not None]
    covered = len(index[used[0]].shape)
    if len(used) == 1 and len(shape) == len(dims) - covered + 1:  # a mask covers as many dimensions as it has
        used = list(range(used[0], used[0] + covered))
    for k in used:
        s.pin(dims[k], reasons.NUMBERED)
    rest = [dim for k, dim in enumerate(dims) if k not in used]
    if len(rest) > 1 and s.weight(ref):  # one matrix of several, an expert's: what it is used for says who produces
        for dim in rest:
            s.algebra.mark(dim, Mark.EXPERTS)
    else:
        s.produce(ref, rest)
    new = len(shape) - len(rest)
    at = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    return [[*rest[:at], *s.fixed(shape[at : at + new]), *rest[at:]]]


@rule("gather")
def gather(s: Axes, call: Call) -> Dims:
    """x[i, index[i, j]] -> i j: one dimension is looked up by number, the others go together"""
    ref, d, index = call.args[:3]
    dims, found = s.of(ref), s.of(index)
    for k, n in enumerate(index.shape):
        if k != d % len(dims) and n == ref.shape[k]:
            found[k] = s.unify(dims[k], found[k], first)
        else:
            s.pin(dims[k], reasons.NUMBERED)
            s.pin(found[k], reasons.INDEX)
    s.produce(ref)
    return [found]


@rule("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill", "index_reduce")
def write(s: Axes, call: Call) -> Dims:
    """x[i, index[i, j]] = y[i, j] (`index_*`: x[i, index[j]]): positions of one dimension are looked up by number, the
    others go together; added or reduced, zeros stay zeros as well"""
    ref, d, index, value = call.args[:4]
    dims, places, d = s.of(ref), s.of(index), d % len(ref.shape)
    s.produce(ref)
    each = "scatter" in call.name  # of its positions has an index of its own
    shapes = [index.shape] if each else []
    if isinstance(value, Ref) and value.shape:
        s.produce(value)
        shapes.append(value.shape)
        values = s.of(value)
    else:  # one number
        values, dims = [()] * len(dims), dims if value == 0 else not_zero(dims)
    result = []
    for k, dim in enumerate(dims):
        others = ([places[k]] if each else []) + [values[k]]
        if k != d and all(shape[k] == ref.shape[k] for shape in shapes):
            dim = s.unify(dim, values[k], both) if values[k] else dim
            dim = s.unify(dim, places[k], first) if each else dim
        else:
            for other in (dim, *others):
                s.pin(other, reasons.NUMBERED)
        result.append(dim)
    for dim in () if each else places:
        s.pin(dim, reasons.INDEX)
    return [result]


@rule("index_put", "_index_put_impl")
def index_put(s: Axes, call: Call) -> Dims:
    """x[i, j, ...] = y: the dimensions after the last that is indexed go together"""
    ref, index, value = call.args[:3]
    dims, values = s.of(ref), s.of(value)
    for whole in (ref, value):
        s.produce(whole)
    used = [k for k, i in enumerate(index) if i is not None]
    last = used[-1] + 1
    for dim in (dim for k in used for dim in s.of(index[k])):
        s.pin(dim, reasons.INDEX)
    shape = index[used[0]].shape
    if len(used) == 1 and shape == ref.shape[used[0] : used[0] + len(shape)]:
        last = used[0] + len(shape)  # it may be a mask, which covers as many dimensions as it has
    rest = len(dims) - last
    values = [()] * (rest - len(values)) + values
    for dim in (*dims[:last], *values[: len(values) - rest]):
        s.pin(dim, reasons.NUMBERED)
    together = zip(dims[last:], values[len(values) - rest :], strict=True)
    return [[*dims[:last], *[s.unify(a, b) for a, b in together]]]


@rule("masked_scatter")
def masked_scatter(s: Axes, call: Call) -> Dims:
    """x[mask] = y, row by row: exact along the last dimension where the mask is seen to be the same all along it"""
    ref, mask, value = call.args
    made = s.maker.get(mask.value)
    spread = made and made.name == "expand" and made.args[0].shape[-1:] == (1,)
    if not spread or mask.shape != ref.shape or value.shape[-1:] != ref.shape[-1:]:
        return unknown(s, call)
    dims, values, places = s.of(ref), s.of(value), s.of(mask)
    for dim in (*dims[:-1], *values[:-1], *places[:-1]):
        s.pin(dim, reasons.NUMBERED)
    for whole in (ref, value):
        s.produce(whole)
    return [[*dims[:-1], s.unify(s.unify(dims[-1], values[-1]), places[-1], first)]]


@rule("_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(s: Axes, call: Call) -> Dims:
    """v d, b i -> b d: a sum, average or maximum of rows that are looked up by number"""
    table, outs = call.args[0], stay(s, call)
    rows, columns = s.of(table)
    s.pin(rows, reasons.NUMBERED)
    s.produce(table, [columns])
    return [[outs[0][0], columns], *outs[1:]]


@rule("embedding_renorm")
def embedding_renorm(s: Axes, call: Call) -> Dims:
    """v d -> v d: rows that are looked up by number, made shorter; zeros leave their norms alone"""
    rows, columns = s.of(call.args[0])
    s.pin(rows, reasons.NUMBERED)
    return [[rows, columns]]


@rule("_pack_padded_sequence", "_pad_packed_sequence")
def packed(s: Axes, call: Call) -> Dims:
    """b t ... -> n ..., sequences without their padding, or (`_pad_packed_sequence`) back"""
    ahead = 1 if call.name == "_pad_packed_sequence" else 2
    dims, outs = s.of(call.args[0]), stay(s, call)
    for dim in dims[:ahead]:
        s.pin(dim, reasons.STEPS)
    rest = dims[ahead:] if call.given.get("padding_value", 0) == 0 else not_zero(dims[ahead:])
    return [[*outs[0][: 3 - ahead], *rest], *outs[1:]]
