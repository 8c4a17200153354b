"""One short function per ATen op: how the dimensions it takes become the dimensions it gives.

`apply_rules` walks a trace once and fills the axis algebra; an op without a rule, or a rule that fails, pins.
"""

from __future__ import annotations

import contextlib
import logging
import operator
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map_only

from .axes import Algebra, Dim, Leaf, Mark, size, with_zero
from .trace import Call, Ref, Trace

logger = logging.getLogger(__name__)

OUTPUT = "it is part of the model's output"
MEETS = "it meets a position that stays (of an input or an index, say)"

# Whether the result of two operands is zero where they (or not) are
both, either = operator.and_, operator.or_


def first(a: bool, b: bool) -> bool:
    return a


class Axes:
    """The dimensions of every tensor of a trace, filled in call order.

    Attributes:
        algebra: the union-find the dimensions live in.
        dims: value number -> its dimensions.
        calls: the calls that the outputs depend on.
        weights: value number -> how much of a weight it is: 2 for what depends on parameters and buffers only, 1 for
            parts of such that are chosen by the data (an expert's weights, say); activations have no entry.
    """

    def __init__(self) -> None:
        self.algebra = Algebra()
        self.dims: dict[int, list[Dim]] = {}
        self.calls: list[Call] = []
        self.weights: dict[int, int] = {}
        self.layer = ""

    def of(self, ref: Ref, ndim: int = 0) -> list[Dim]:
        """The dimensions of a tensor, broadcast to `ndim`; one the trace did not see made (an input) can't be cut."""
        if ref.value not in self.dims:
            self.dims[ref.value] = self.fixed(ref.shape)
        return [()] * (ndim - len(ref.shape)) + self.dims[ref.value]

    def new(self, n: int, zero: bool = False, marks: int = 0) -> Dim:
        """A dimension of fresh ids."""
        return (self.algebra.new(n, zero, marks),) if n > 1 else ()

    def fixed(self, shape: Sequence[int]) -> list[Dim]:
        """Dimensions that can't be cut."""
        return [self.algebra.fixed(n) for n in shape]

    def weight(self, ref: Ref) -> int:
        """How much of a weight a tensor is, see `weights`."""
        return self.weights.get(ref.value, 0)

    def why(self, text: str) -> str:
        """A reason with the layer it comes from."""
        return f"{text} in {self.layer}" if self.layer else text

    def pin(self, dim: Dim, text: str) -> None:
        """Pins with a reason."""
        self.algebra.pin(dim, self.why(text))

    def unify(self, a: Dim, b: Dim, zero: Callable[[bool, bool], bool] = both) -> Dim:
        """The common dimension of two operands of an elementwise op; size 1 broadcasts."""
        if not a or not b:
            return tuple(Leaf(x.ids, zero(x.zero, False) if a else zero(False, x.zero)) for x in a or b)
        if size(a) != size(b):
            raise ValueError(f"sizes {size(a)} and {size(b)} don't match")
        pair = self.algebra.align(a, b, self.why(MEETS))
        if pair is None:
            return self.algebra.fixed(size(a))
        return tuple(Leaf(x.ids, zero(x.zero, y.zero)) for x, y in zip(*pair, strict=True))

    def join(self, dims: list[Dim], ref: Any, zero: Callable[[bool, bool], bool] = both) -> list[Dim]:
        """`unify` with another operand, if there is one, that broadcasts to `dims`."""
        if not isinstance(ref, Ref):
            return dims
        self.produce(ref)
        return [self.unify(a, b, zero) for a, b in zip(dims, self.of(ref, len(dims)), strict=True)]

    def contract(self, a: Dim, b: Dim, a_weight: int, b_weight: int) -> None:
        """The summed dimension of a product: the weight's side consumes what the other side produces."""
        pair = self.algebra.align(a, b, self.why(MEETS)) if a and b else None
        for x, y in zip(*pair, strict=True) if pair else ():
            weight, data = (x, y) if a_weight > b_weight else (y, x)
            if not (x.zero or y.zero):  # between activations, or a reader that can't be zeroed: a buffer, exp(weight)
                self.pin((x,), "summed over, and neither side becomes zero")
            if a_weight or b_weight:
                self.algebra.mark((weight,), Mark.CONSUMER if data.zero else Mark.CONSUMER | Mark.NOT_ZERO)
            if a_weight and b_weight:
                self.algebra.mark((data,), Mark.PRODUCER)

    def produce(self, ref: Ref, dims: Sequence[Dim] | None = None) -> None:
        """Marks dimensions, all if not given, as made by a parameter, where the tensor comes from parameters."""
        for dim in (self.of(ref) if dims is None else dims) if self.weight(ref) else ():
            self.algebra.mark(dim, Mark.PRODUCER)
            if any((self.algebra.marks[leaf.ids] & Mark.NORMED).any() for leaf in dim):
                self.pin(dim, "a norm is taken over it")

    def take(self, ref: Ref, d: int, index: np.ndarray) -> list[Dim]:
        """The dimensions of a tensor with known positions of one, of which there may be none."""
        dims = self.of(ref)
        if len(index) == 0:
            dims[d] = self.algebra.fixed(0)
        elif not np.array_equal(index, np.arange(ref.shape[d])):
            dims[d] = self.algebra.take(dims[d], index)
        return dims


# elementwise ---------------------------------------------------------------------------------------

ZEROS = {  # of two operands that broadcast against each other; of the results of other functions it isn't known
    **dict.fromkeys("add sub maximum minimum where lerp hypot logical_or bitwise_or".split(), both),
    **dict.fromkeys("mul logical_and bitwise_and".split(), either),
    **dict.fromkeys("div floor_divide remainder fmod copy _prelu_kernel".split(), first),
}


def elementwise(s: Axes, call: Call) -> list[list[Dim]]:
    """... , ... -> ...: operands broadcast against each other; what is zero depends on the function"""
    refs, zero = call.refs, ZEROS.get(call.name, lambda a, b: False)
    if call.name == "where":  # the condition decides nothing about zeros
        refs = refs[1:] + refs[:1]
    if call.name == "copy":
        refs = refs[::-1]
    if call.name == "masked_fill" and call.args[2] == 0:
        zero = first
    result = s.of(refs[0], len(call.outs[0].shape))
    if len(refs) == 1:
        result = result if _keeps_zero(call) else [with_zero(dim, False) for dim in result]
    else:
        s.produce(refs[0])
    for i, ref in enumerate(refs[1:], 1):
        result = s.join(result, ref, first if call.name == "where" and i == 2 else zero)
    return [result] * len(call.outs)


def _keeps_zero(call: Call) -> bool:
    """Whether f(0) = 0, for a function of one tensor: tried out."""
    if torch.Tag.nondeterministic_seeded in call.op.tags or call.name == "empty_like":
        return call.name == "native_dropout"
    given = call.args, {name: value for name, value in call.kwargs.items() if name != "device"}
    for dtype in (torch.float32, torch.int64, torch.complex64):  # some functions are of one kind only
        zeros = {ref: torch.zeros([1] * len(ref.shape), dtype=dtype) for ref in call.refs}
        args, kwargs = tree_map_only(Ref, zeros.get, given)
        with contextlib.suppress(Exception):
            return not call.op(*args, **kwargs).any()
    return False


# layout --------------------------------------------------------------------------------------------


def view(s: Axes, call: Call) -> list[list[Dim]]:
    """the same elements in row-major order under another shape"""
    return [s.algebra.reshape(s.of(call.args[0]), call.outs[0].shape)]


def strided(s: Axes, call: Call) -> list[list[Dim]]:
    """dimensions that change places, appear with size 1, disappear or grow from size 1 to one along which all is
    equal: the strides of an example show which is which"""
    ref = call.args[0]
    example = torch.empty_strided(ref.shape, [*range(1, len(ref.shape) + 1)], device="meta")
    example = call.op(example, *call.args[1:], **call.kwargs)
    example = example if isinstance(example, torch.Tensor) else example[0]
    dims = dict(enumerate(s.of(ref), 1)) | {None: ()}  # stride -> dimension, None: of size 1
    strides = [stride if n > 1 else None for n, stride in zip(example.shape, example.stride(), strict=True)]
    for stride in dims.keys() - set(strides):
        s.pin(dims[stride], "a fixed position of it is read")
    pairs = zip(strides, example.shape, strict=True)
    return [[s.new(n, marks=Mark.EXPANDED) if stride == 0 else dims[stride] for stride, n in pairs]] * len(call.outs)


def repeat(s: Axes, call: Call) -> list[list[Dim]]:
    """n -> r n, the copies outermost"""
    dims = s.of(call.args[0], len(call.outs[0].shape))
    return [[(*s.new(r, marks=Mark.EXPANDED), *dim) for r, dim in zip(call.args[1], dims, strict=True)]]


def slice_(s: Axes, call: Call) -> list[list[Dim]]:
    """positions start:stop:step of one dimension"""
    ref, d, start, stop, step = call.given.values()
    n, dims = ref.shape[d], s.of(ref)
    index = np.arange(n)[start:stop:step]
    if step > 1 and n % step == 0 and len(index) == n // step:  # one of every `step`: these go together
        dims[d], inner = s.algebra.reshape([dims[d]], [n // step, step])
        s.pin(inner, "a fixed position of it is read")
        return [dims]
    if step > 1:
        s.pin(dims[d], "its positions are read at a stride")
    return [s.take(ref, d, index)]


def split(s: Axes, call: Call) -> list[list[Dim]]:
    """pieces of a dimension"""
    ref, _, d = call.given.values()
    ends = np.cumsum([out.shape[d] for out in call.outs])
    return [s.take(ref, d, index) for index in np.split(np.arange(ref.shape[d]), ends[:-1])]


def cat(s: Axes, call: Call) -> list[list[Dim]]:
    """dimensions laid one after the other; those of `stack` are new and of size 1, and what they make can't be cut"""
    refs, d = call.given.values()
    d %= len(call.outs[0].shape)
    refs = [ref for ref in refs if ref.shape != (0,)]
    rows = [s.of(ref) for ref in refs]
    for ref, row in zip(refs, rows, strict=True):
        s.produce(ref)
        if call.name == "stack":
            row.insert(d, ())
    pieces = [row.pop(d) for row in rows]
    result = rows[0]
    for row in rows[1:]:
        result = [s.unify(a, b) for a, b in zip(result, row, strict=True)]
    result.insert(d, s.algebra.cat([piece for piece in pieces if size(piece)]))
    return [result]


def roll(s: Axes, call: Call) -> list[list[Dim]]:
    """positions rotated, or (`flip`) reversed"""
    ref, dims = call.args[0], call.given["dims"]
    if not dims:
        return unknown(s, call)
    result = s.of(ref)
    for d, shift in zip(dims, call.args[1], strict=True):
        index = np.arange(ref.shape[d])
        index = index[::-1] if call.name == "flip" else np.roll(index, shift)
        result[d] = s.algebra.take(result[d], index)
    return [result]


def pad(s: Axes, call: Call) -> list[list[Dim]]:
    """positions added at both ends; taken away (amounts below 0) they would be others after a cut"""
    ref, amounts = call.args[:2]
    if min(amounts) < 0:
        return unknown(s, call)
    result = s.of(ref)
    for d, ends in enumerate(zip(amounts[::2], amounts[1::2], strict=True), 1):  # from the last dimension on
        start, end = s.fixed(ends)
        result[-d] = s.algebra.cat([part for part in (start, result[-d], end) if size(part)])
    return [result]


def glu(s: Axes, call: Call) -> list[list[Dim]]:
    """two halves of a dimension, the first gated by the second"""
    ref, d = call.given.values()
    left, right = (s.take(ref, d, half) for half in np.split(np.arange(ref.shape[d]), 2))
    left[d] = s.unify(left[d], right[d], first)
    return [left]


def pixel_shuffle(s: Axes, call: Call) -> list[list[Dim]]:
    """n (c r r) h w -> n c (h r) (w r)"""
    ref, r = call.args
    *batch, channels, h, w = s.of(ref)
    inner = s.algebra.reshape([channels], [ref.shape[-3] // r**2, r, r])
    for dim in (*inner[1:], h, w):
        s.pin(dim, "it becomes part of the image plane")
    return [[*batch, inner[0], *s.fixed(call.outs[0].shape[-2:])]]


def as_complex(s: Axes, call: Call) -> list[list[Dim]]:
    """the two parts of complex numbers were, or after `view_as_real` are, a last dimension"""
    dims = s.of(call.args[0])
    if call.name == "view_as_real":
        return [[*dims, s.algebra.fixed(2)]]
    s.pin(dims[-1], "it holds the parts of a complex number")
    return [dims[:-1]]


# lookups -------------------------------------------------------------------------------------------

NUMBERED = "positions are looked up by number"


def index_(s: Axes, call: Call) -> list[list[Dim]]:
    """x[i, j, ...]: indexed dimensions are looked up by number, the others stay; `index_select`s have one index"""
    ref, *which, index = call.args[: 2 + (call.name == "index_select")]
    dims, shape = s.of(ref), call.outs[0].shape
    if isinstance(index, Ref):
        index = [None] * (which[0] % len(dims) if which else 0) + [index]
    for dim in (dim for i in index if i is not None for dim in s.of(i)):
        s.pin(dim, "it is an index")
    used = [k for k, i in enumerate(index) if i is not None]
    covered = len(index[used[0]].shape)
    if len(used) == 1 and len(shape) == len(dims) - covered + 1:  # a mask covers as many dimensions as it has
        used = list(range(used[0], used[0] + covered))
    for k in used:
        s.pin(dims[k], NUMBERED)
    rest = [dim for k, dim in enumerate(dims) if k not in used]
    if len(rest) > 1 and s.weight(ref):  # one matrix of several, an expert's: what it is used for says who produces
        for dim in rest:
            s.algebra.mark(dim, Mark.EXPERTS)
    else:
        s.produce(ref, rest)
    new = len(shape) - len(rest)
    at = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    return [[*rest[:at], *s.fixed(shape[at : at + new]), *rest[at:]]]


def gather(s: Axes, call: Call) -> list[list[Dim]]:
    """x[i, index[i, j]] -> i j: one dimension is looked up by number, the others go together"""
    ref, d, index = call.args[:3]
    dims, found = s.of(ref), s.of(index)
    for k, n in enumerate(index.shape):
        if k != d % len(dims) and n == ref.shape[k]:
            found[k] = s.unify(dims[k], found[k], first)
        else:
            s.pin(dims[k], NUMBERED)
            s.pin(found[k], "it is an index")
    s.produce(ref)
    return [found]


# contractions --------------------------------------------------------------------------------------


def mm(s: Axes, call: Call) -> list[list[Dim]]:
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


def convolution(s: Axes, call: Call) -> list[list[Dim]]:
    """b (g i) x, (g o) i k -> b (g o) x; transposed, b (g i) x, (g i) o k -> b (g o) x"""
    x, weight, bias, *_, transposed, _, groups = call.args[:9]
    batch, channels, *space = s.of(x)
    outer, inner, *kernel = s.of(weight)
    for dim in (*space, *kernel):
        s.pin(dim, "it is a spatial axis")
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


def attention(s: Axes, call: Call) -> list[list[Dim]]:
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
        s.pin(dim, "attention runs over it")
    s.join([batch, heads, dq[2], dk[2]], *mask or [None])
    return [[batch, heads, dq[2], dv[3]], *stay(s, call)[1:]]


def solve_triangular(s: Axes, call: Call) -> list[list[Dim]]:
    """b n n, b n k -> b n k with ones on the diagonal: one triangular system for each of b"""
    if not (call.given["unitriangular"] and call.given["left"]):
        return unknown(s, call)
    matrix, known = (s.of(ref) for ref in call.args)
    for ref in call.args:
        s.produce(ref)
    for dim in (*matrix[-2:], known[-2]):
        s.pin(dim, "a linear system is solved along it")
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
    if RULES.get(call.name) is attention:
        q, k, v = call.refs[:3]
        return [[*all_of(q), (k, 2)], [*all_of(q, 3), (k, 2), (v, 3)]]
    return []


# normalisations and reductions ---------------------------------------------------------------------


def layer_norm(s: Axes, call: Call) -> list[list[Dim]]:
    """normalised over the last dimensions: their mean and variance would change"""
    x, shape, weight, bias = call.args[:4]
    dims = s.of(x)
    kept, normed = dims[: -len(shape)], dims[-len(shape) :]
    for dim in normed:
        s.pin(dim, "a layer norm takes mean and variance over it")
    normed = s.join(s.join(normed, weight), bias)
    return [[*[with_zero(dim, False) for dim in kept], *normed], *stay(s, call)[1:]]


def batch_norm(s: Axes, call: Call) -> list[list[Dim]]:
    """b c x: each channel by its own statistics"""
    x, *vectors = call.args[:5]
    batch, channels, *space = s.of(x)
    for dim in (batch, *space):
        s.pin(dim, "a batch norm averages over it")
    return [[batch, _affine(s, channels, *vectors), *space], *stay(s, call)[1:]]


def group_norm(s: Axes, call: Call) -> list[list[Dim]]:
    """b (g c) x: each group by its own statistics, so that whole groups go"""
    x, weight, bias, _, channels, _, groups, _ = call.args
    batch, dim, *space = s.of(x)
    outer, inner = s.algebra.reshape([dim], [groups, channels // groups])
    s.pin(inner, "a group norm takes mean and variance over it")
    s.algebra.mark(outer, Mark.GROUPS)
    return [[batch, _affine(s, (*outer, *inner), weight, bias), *space], *stay(s, call)[1:]]


def _affine(s: Axes, channels: Dim, weight: Ref | None, bias: Ref | None, *statistics: Ref | None) -> Dim:
    """A zero weight and bias silence a channel, whatever was normalised."""
    channels = with_zero(channels, weight is not None)
    for vector in (weight, bias, *statistics):
        (channels,) = s.join([channels], vector, first)
    return channels


def weight_norm(s: Axes, call: Call) -> list[list[Dim]]:
    """v g / |v|, the norm over all dimensions but one: along that a zero g silences and a zero v gives 0 / 0; what
    reads along the others has to be zero, for the norm's sake"""
    v, g, d = call.given.values()
    dims = s.of(v)
    for k, dim in enumerate(dims):
        s.algebra.mark(dim, Mark.FOLLOWER if k == d % len(dims) else Mark.NORMED | Mark.NOT_ZERO)
    dims[d] = s.unify(s.of(g)[d], dims[d], first)
    return [dims, *stay(s, call)[1:]]


def reduced_dims(call: Call) -> set[int]:
    """The dimensions that a reduction runs over."""
    n, given = len(call.args[0].shape), call.given.get("dim")
    return {d % n for d in ([given] if isinstance(given, int) else given or range(n)) if n}


def reduction(s: Axes, call: Call) -> list[list[Dim]]:
    """over some dimensions, where zeros leave a sum or norm alone; of an average they change only the number of
    positions, and scales.py sees to that"""
    ref, name, which = call.args[0], call.name, reduced_dims(call)
    total = name in ("sum", "linalg_vector_norm")
    if total:
        s.produce(ref)
    why = {"sum": "it is summed over, and not zero", "linalg_vector_norm": "a norm is taken over it"}
    dims = s.of(ref)
    for leaf in (leaf for d in which for leaf in dims[d]):
        if not (leaf.zero and (total or (name == "mean" and not s.weight(ref)))):
            s.pin((leaf,), why.get(name, "an average is taken over it"))
    keep = len(call.outs[0].shape) == len(dims)
    dims = [() if d in which else dim for d, dim in enumerate(dims) if keep or d not in which]
    return [dims if total or "mean" in name else [with_zero(dim, False) for dim in dims]] * len(call.outs)


def along(s: Axes, call: Call) -> list[list[Dim]]:
    """normalised, ordered or accumulated along one dimension, which stays"""
    dims, d = s.of(call.args[0]), call.given["dim"]
    s.pin(dims[d], f"{call.name.strip('_')} runs along it")
    dims[d] = s.algebra.fixed(call.outs[0].shape[d])
    return [[with_zero(dim, False) for dim in dims]] * len(call.outs)


def spatial(s: Axes, call: Call) -> list[list[Dim]]:
    """b c x -> b c y: pooling and resizing within the image plane"""
    k = next(k for k in (1, 2, 3) if f"{k}d" in call.name)
    dims = s.of(call.args[0])
    for dim in dims[-k:]:
        s.pin(dim, "it is a spatial axis")
    return [[*dims[:-k], *s.fixed(out.shape[-k:])] for out in call.outs]


# new tensors and the rest --------------------------------------------------------------------------


def fill(s: Axes, call: Call) -> list[list[Dim]]:
    """a new tensor that is the same everywhere: its axes are whatever meets them"""
    return [[s.new(n) for n in out.shape] for out in call.outs]


def stay(s: Axes, call: Call) -> list[list[Dim]]:
    """a new tensor whose values are positions, or of which nothing is known"""
    return [s.fixed(out.shape) for out in call.outs]


def unknown(s: Axes, call: Call) -> list[list[Dim]]:
    """no rule, or positions found by number at run time: nothing that takes part may be cut"""
    why = NUMBERED if RULES.get(call.name) is unknown else f"{call.name} has no rule"
    for ref in call.refs:
        s.produce(ref)
        for dim in s.of(ref):
            s.pin(dim, why)
    return stay(s, call)


_NAMES: dict[Callable[[Axes, Call], list[list[Dim]]], str] = {
    elementwise: """_to_copy copy hardswish native_dropout alias detach lift_fresh lift contiguous rsub zeros_like
        ones_like full_like empty_like rand_like randn_like bernoulli fill zero _prelu_kernel
        tril triu _conj floor_divide masked_fill""",
    view: "view _unsafe_view reshape _reshape_alias",
    strided: "permute transpose t unsqueeze squeeze expand select unbind",
    split: "split split_with_sizes unsafe_split chunk unsafe_chunk split_copy split_with_sizes_copy",
    cat: "cat stack",
    as_complex: "view_as_real view_as_complex",
    roll: "roll flip",
    slice_: "slice",
    pad: "constant_pad_nd",
    weight_norm: "_weight_norm_interface",
    index_: "index index_select embedding",
    unknown: """scatter scatter_add index_put index_add index_copy bucketize searchsorted nonzero masked_select
        one_hot histc _local_scalar_dense""",
    mm: "mm addmm bmm baddbmm mv addmv dot",
    convolution: "convolution _convolution",
    attention: """_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention
        _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
        _scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math""",
    solve_triangular: "linalg_solve_triangular",
    layer_norm: "native_layer_norm",
    batch_norm: """native_batch_norm _native_batch_norm_legit_no_training _native_batch_norm_legit cudnn_batch_norm
        miopen_batch_norm _batch_norm_no_update""",
    group_norm: "native_group_norm",
    reduction: """sum linalg_vector_norm mean var std var_mean std_mean amax amin max min prod all any argmax argmin
        logsumexp""",
    along: "_softmax _log_softmax _safe_softmax cumsum cumprod topk sort logcumsumexp",
    spatial: """max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d
        avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_max_pool2d upsample_nearest1d
        upsample_nearest2d upsample_bilinear2d upsample_bicubic2d _upsample_bicubic2d_aa _upsample_bilinear2d_aa
        upsample_linear1d grid_sampler_2d reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d""",
    fill: """zeros ones full empty new_zeros new_ones new_full new_empty scalar_tensor rand randn empty_strided
        new_empty_strided""",
    stay: "arange linspace eye tril_indices triu_indices randint randperm",
}
LAYOUT = (view, strided, repeat, slice_, split, cat, roll, pad, as_complex, index_, gather)
RULES = {rule.__name__: rule for rule in (repeat, glu, pixel_shuffle, gather)}
RULES |= {name: rule for rule, names in _NAMES.items() for name in names.split()}


def without_repeats(trace: Trace) -> Trace:
    """The trace without those calls of train mode that eval mode made too, of the same tensors: they say nothing new.

    What is left of train mode takes the results of eval mode in their place.
    """
    made: dict[Any, deque[Call]] = {}
    for call in trace.calls[: trace.evaluated]:
        made.setdefault(_meaning(call), deque()).append(call)
    twins: dict[int, int] = {}  # what train mode made -> what eval mode made

    def known(ref: Ref) -> Ref:
        return Ref(twins[ref.value], ref.shape) if ref.value in twins else ref

    def known_expr(expr: Any) -> Any:
        if expr[0] == "span":
            return ("span", twins.get(expr[1], expr[1]), *expr[2:])
        return expr if expr[0] in ("const", "attribute") else (expr[0], known_expr(expr[1]), known_expr(expr[2]))

    new = []
    for original in trace.calls[trace.evaluated :]:
        call = original._replace(
            args=tree_map_only(Ref, known, original.args), kwargs=tree_map_only(Ref, known, original.kwargs)
        )
        same = made.get(_meaning(call))
        if same:
            pairs = zip(call.outs, same.popleft().outs, strict=False)
            twins |= {mine.value: its.value for mine, its in pairs if mine.shape == its.shape}
        else:
            new.append(call)
    return trace._replace(
        calls=trace.calls[: trace.evaluated] + new,
        returned={mode: [known(ref) for ref in refs] for mode, refs in trace.returned.items()},
        equations=[q._replace(left=known_expr(q.left), right=known_expr(q.right)) for q in trace.equations],
        in_hand={path: {twins.get(value, value) for value in values} for path, values in trace.in_hand.items()},
    )


def _meaning(call: Call) -> Any:
    """What a call says to the algebra: a batch norm the same whether its statistics are the batch's or its own."""
    if RULES.get(call.name) is batch_norm:
        return batch_norm, tuple(ref.value for ref in call.refs)
    return call.op, _frozen(call.args), _frozen(call.kwargs)


def _frozen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    if isinstance(value, dict):
        return tuple((key, _frozen(item)) for key, item in value.items())
    return value


def _live(trace: Trace) -> list[Call]:
    """The calls that the outputs depend on: what is computed and thrown away decides nothing."""
    needed = {ref.value for ref in trace.outputs}
    live = []
    for call in reversed(trace.calls):
        if not call.outs or call.op._schema.is_mutable or any(ref.value in needed for ref in call.outs):
            live.append(call)
            needed |= {ref.value for ref in call.refs}
    return live[::-1]


def apply_rules(trace: Trace) -> Axes:
    """The dimensions of every tensor of the trace, unified and pinned as its calls demand."""
    s = Axes()
    for name, ref in trace.sources.items():  # a parameter is zero where it is removed, a buffer is not
        s.dims[ref.value] = [s.new(n, zero=name in trace.parameters) for n in ref.shape]
        s.weights[ref.value] = 2
    s.algebra.reason(OUTPUT)  # the first: what a person should read, if there are others too
    missing: set[str] = set()
    s.calls = _live(trace)
    for call in s.calls:
        s.layer = call.layer
        rule = RULES.get(call.name, elementwise if torch.Tag.pointwise in call.op.tags else unknown)
        problem = "it has no rule" if rule is unknown and call.name not in RULES else ""
        try:
            outs = rule(s, call)
            for ref, dims in zip(call.outs, outs, strict=True):
                if 0 not in ref.shape and tuple(map(size, dims)) != ref.shape:
                    raise ValueError(f"the rule gives {[size(dim) for dim in dims]} for {ref.shape}")
        except Exception as error:  # a rule that fails must pin, never raise and never guess
            outs, problem = unknown(s, call), f"its rule failed ({type(error).__name__}: {error})"
        if problem and call.outs and call.name not in missing:
            missing.add(call.name)
            logger.info("tensors of %s are pinned: %s, in %s", call.name, problem, call.layer)
        weights = [s.weight(ref) for ref in call.refs]
        chosen = call.name in ("index", "index_select", "gather") or len(weights) == 1
        weight = 2 if all(w == 2 for w in weights) else min(weights[0], 1) if chosen else 0
        for ref, dims in zip(call.outs, outs, strict=True):
            s.dims[ref.value] = dims
            s.weights[ref.value] = weight
    for dim in (dim for ref in trace.outputs for dim in s.of(ref)):
        s.algebra.pin(dim, OUTPUT)
    return s
