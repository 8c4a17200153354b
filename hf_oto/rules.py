"""One short function per ATen op: how the dimensions it takes become the dimensions it gives.

`apply_rules` walks a trace once and fills the axis algebra; an op without a rule, or a rule that fails, pins.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import operator
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map_only

from . import reasons
from .axes import Algebra, Dim, Leaf, Mark, size, with_zero
from .reasons import Reason
from .trace import Call, Equation, Ref, Trace

logger = logging.getLogger(__name__)

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
        maker: value number -> the call that made it.
        aliases: value number -> the numbers of all tensors seen so far that share its memory, one set for all of them.
    """

    def __init__(self) -> None:
        self.algebra = Algebra()
        self.dims: dict[int, list[Dim]] = {}
        self.calls: list[Call] = []
        self.weights: dict[int, int] = {}
        self.maker: dict[int, Call] = {}
        self.aliases: dict[int, set[int]] = {}
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

    def why(self, reason: Reason) -> Reason:
        """A reason with the layer it comes from."""
        return reason.at(self.layer)

    def pin(self, dim: Dim, reason: Reason) -> None:
        """Pins with a reason."""
        self.algebra.pin(dim, self.why(reason))

    def unify(self, a: Dim, b: Dim, zero: Callable[[bool, bool], bool] = both) -> Dim:
        """The common dimension of two operands of an elementwise op; size 1 broadcasts."""
        if not a or not b:
            return tuple(Leaf(x.ids, zero(x.zero, False) if a else zero(False, x.zero)) for x in a or b)
        if size(a) != size(b):
            raise ValueError(f"sizes {size(a)} and {size(b)} don't match")
        pair = self.algebra.align(a, b, self.why(reasons.MEETS))
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
        pair = self.algebra.align(a, b, self.why(reasons.MEETS)) if a and b else None
        for x, y in zip(*pair, strict=True) if pair else ():
            weight, data = (x, y) if a_weight > b_weight else (y, x)
            if not (x.zero or y.zero):  # between activations, or a reader that can't be zeroed: a buffer, exp(weight)
                self.pin((x,), reasons.SUMMED)
            if a_weight or b_weight:
                self.algebra.mark((weight,), Mark.CONSUMER if data.zero else Mark.CONSUMER | Mark.NOT_ZERO)
            if a_weight and b_weight:
                self.algebra.mark((data,), Mark.PRODUCER)

    def produce(self, ref: Ref, dims: Sequence[Dim] | None = None) -> None:
        """Marks dimensions, all if not given, as made by a parameter, where the tensor comes from parameters."""
        for dim in (self.of(ref) if dims is None else dims) if self.weight(ref) else ():
            self.algebra.mark(dim, Mark.PRODUCER)
            if any((self.algebra.marks[leaf.ids] & Mark.NORMED).any() for leaf in dim):
                self.pin(dim, reasons.NORM)

    def share(self, call: Call) -> None:
        """Notes which results share memory with an argument; where zeros are overwritten, no alias holds them now."""
        for a in (a for a in call.op._schema.arguments if a.alias_info and isinstance(call.given[a.name], Ref)):
            old = call.given[a.name]
            together = self.aliases.setdefault(old.value, {old.value})
            for ref in call.outs if any(r.alias_info for r in call.op._schema.returns) else ():
                self.aliases[ref.value] = together
                together.add(ref.value)
            if a.alias_info.is_write and call.outs and call.outs[0].shape == old.shape:
                before, now = self.of(old), self.of(call.outs[0])
                if any(_is_zero(x) and not _is_zero(y) for x, y in zip(before, now, strict=True)):
                    for value in together & self.dims.keys():
                        self.dims[value] = [with_zero(dim, False) for dim in self.dims[value]]

    def take(self, ref: Ref, d: int, index: np.ndarray) -> list[Dim]:
        """The dimensions of a tensor with known positions of one, of which there may be none."""
        dims = self.of(ref)
        if len(index) == 0:
            dims[d] = self.algebra.fixed(0)
        elif not np.array_equal(index, np.arange(ref.shape[d])):
            dims[d] = self.algebra.take(dims[d], index)
        return dims


def _is_zero(dim: Dim) -> bool:
    return all(leaf.zero for leaf in dim)


def not_zero(dims: Sequence[Dim]) -> list[Dim]:
    """The same dimensions of a tensor that need not be zero where positions were removed."""
    return [with_zero(dim, False) for dim in dims]


# elementwise ---------------------------------------------------------------------------------------

ZEROS = {  # of two operands that broadcast against each other; of the results of other functions it isn't known
    **dict.fromkeys("add sub maximum minimum fmax fmin where lerp hypot logical_or bitwise_or complex".split(), both),
    **dict.fromkeys("mul logical_and bitwise_and linalg_cross".split(), either),
    **dict.fromkeys("div floor_divide remainder fmod copy polar _prelu_kernel rrelu_with_noise".split(), first),
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
    if call.name == "div" and isinstance(call.args[1], Ref):
        for leaf in (leaf for dim in s.of(call.args[1]) for leaf in dim if leaf.zero):
            s.pin((leaf,), reasons.DIVISOR)
    result = s.of(refs[0], len(call.outs[0].shape))
    if len(refs) == 1:
        result = result if _keeps_zero(call) else not_zero(result)
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


def cross(s: Axes, call: Call) -> list[list[Dim]]:
    """... 3, ... 3 -> ... 3"""
    for ref in call.refs:
        s.pin(s.of(ref)[call.given["dim"]], reasons.ALONG.of("a cross product"))
    return elementwise(s, call)


def triangle(s: Axes, call: Call) -> list[list[Dim]]:
    """zeros above or below the diagonal of a matrix, which stay there if its rows and columns go together"""
    *batch, rows, columns = s.of(call.args[0])
    same = len(rows) == len(columns) and all(np.array_equal(a.ids, b.ids) for a, b in zip(rows, columns, strict=True))
    for dim in () if same and call.given["diagonal"] == 0 else (rows, columns):
        s.pin(dim, reasons.TRIANGLE)
    return [[*batch, rows, columns]]


def fake_quantize(s: Axes, call: Call) -> list[list[Dim]]:
    """rounded to a grid that zero is a point of (observers see to that for zero points that are tensors); `channel`:
    each position of an axis to a grid of its own"""
    x, scale, zero_point = call.args[:3]
    given, dims = call.given, s.of(x)
    if "axis" in given:
        for ref in (scale, zero_point):
            (dims[given["axis"]],) = s.join([dims[given["axis"]]], ref, first)
    elif isinstance(zero_point, int) and not given["quant_min"] <= zero_point <= given["quant_max"]:
        dims = not_zero(dims)
    return [dims, *stay(s, call)[1:]]


def loss(s: Axes, call: Call) -> list[list[Dim]]:
    """elementwise where nothing is reduced, else a number that a zero more would change"""
    if call.given["reduction"] == 0 and len(call.refs) == 2:
        return elementwise(s, call)
    return unknown(s, call)


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
        s.pin(dims[stride], reasons.FIXED)
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
        s.pin(inner, reasons.FIXED)
        return [dims]
    if step > 1:
        s.pin(dims[d], reasons.STRIDE)
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
    """positions rotated, or (`flip`) reversed; those that a rotation by a number moves over the end must all stay"""
    ref, dims = call.args[0], call.given["dims"]
    if not dims:
        return unknown(s, call)
    result = s.of(ref)
    for d, shift in zip(dims, call.args[1], strict=True):
        index = np.arange(ref.shape[d])
        if call.name == "flip":
            result[d] = s.algebra.take(result[d], index[::-1])
        elif shift % len(index):
            leaf = s.algebra.merge(result[d])
            s.algebra.pin_ids(leaf.ids[index[-shift:] if shift > 0 else index[:-shift]], s.why(reasons.WRAPS))
            result[d] = s.algebra.take(result[d], np.roll(index, shift))
    return [result]


def rot90(s: Axes, call: Call) -> list[list[Dim]]:
    """a plane turned by quarters: a flip, then a transposition"""
    ref, k, plane = call.given.values()
    result = s.of(ref)
    a, b = (d % len(result) for d in plane)
    for d, quarters in ((a, (2, 3)), (b, (1, 2))):
        if k % 4 in quarters:
            result[d] = s.algebra.take(result[d], np.arange(ref.shape[d])[::-1])
    if k % 2:
        result[a], result[b] = result[b], result[a]
    return [result]


def pad(s: Axes, call: Call) -> list[list[Dim]]:
    """positions added at both ends; taken away (amounts below 0) they would be others after a cut"""
    ref, amounts, value = call.given.values()
    if min(amounts) < 0:
        return unknown(s, call)
    result = s.of(ref) if value == 0 else not_zero(s.of(ref))
    for d, ends in enumerate(zip(amounts[::2], amounts[1::2], strict=True), 1):  # from the last dimension on
        start, end = s.fixed(ends)
        result[-d] = s.algebra.cat([part for part in (start, result[-d], end) if size(part)])
    return [result]


def windows(s: Axes, call: Call) -> list[list[Dim]]:
    """n -> windows ... size"""
    *dims, last = call.outs[0].shape
    d = call.args[1] % len(dims)
    result = s.of(call.args[0])
    s.pin(result[d], reasons.SPATIAL)
    result[d] = s.algebra.fixed(dims[d])
    return [[*result, s.algebra.fixed(last)]]


def diagonal(s: Axes, call: Call) -> list[list[Dim]]:
    """... i i -> ... i: rows and columns go together"""
    dims, out = s.of(call.args[0]), call.outs[0].shape
    a, b = (call.given[d] % len(dims) for d in ("dim1", "dim2"))
    if call.given["offset"] or size(dims[a]) != size(dims[b]):
        return unknown(s, call)
    s.produce(call.args[0])
    both_ways = s.unify(dims[a], dims[b], either)
    return [[*[dim for d, dim in enumerate(dims) if d not in (a, b)], both_ways][: len(out)]]


def diag_embed(s: Axes, call: Call) -> list[list[Dim]]:
    """... i -> ... i i: a row goes with its column"""
    if call.given["offset"]:
        return unknown(s, call)
    *result, last = s.of(call.args[0])
    s.produce(call.args[0])
    for d in sorted(call.given[name] % len(call.outs[0].shape) for name in ("dim1", "dim2")):
        result.insert(d, last)
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
        s.pin(dim, reasons.PLANE)
    return [[*batch, inner[0], *s.fixed(call.outs[0].shape[-2:])]]


def pixel_unshuffle(s: Axes, call: Call) -> list[list[Dim]]:
    """n c (h r) (w r) -> n (c r r) h w"""
    ref, r = call.args
    *batch, channels, h, w = s.of(ref)
    for dim in (h, w):
        s.pin(dim, reasons.PLANE)
    return [[*batch, (*channels, *s.algebra.fixed(r**2)), *s.fixed(call.outs[0].shape[-2:])]]


def im2col(s: Axes, call: Call) -> list[list[Dim]]:
    """b c h w -> b (c k) n, for k positions of a kernel at n places"""
    *batch, channels, h, w = s.of(call.args[0])
    for dim in (h, w):
        s.pin(dim, reasons.SPATIAL)
    kernel, places = call.args[1][0] * call.args[1][1], call.outs[0].shape[-1]
    return [[*batch, (*channels, *s.algebra.fixed(kernel)), s.algebra.fixed(places)]]


def col2im(s: Axes, call: Call) -> list[list[Dim]]:
    """b (c k) n -> b c h w: what meets is summed"""
    *batch, columns, places = s.of(call.args[0])
    kernel, image = call.given["kernel_size"][0] * call.given["kernel_size"][1], call.outs[0].shape
    channels, each = s.algebra.reshape([columns], [image[-3], kernel])
    s.pin(each, reasons.KERNEL)
    s.pin(places, reasons.SPATIAL)
    return [[*batch, channels, *s.fixed(image[-2:])]]


def channel_shuffle(s: Axes, call: Call) -> list[list[Dim]]:
    """n (g c) x -> n (c g) x"""
    ref, groups = call.args
    batch, channels, *space = s.of(ref)
    outer, inner = s.algebra.reshape([channels], [groups, ref.shape[1] // groups])
    s.pin(outer, reasons.FIXED)  # how many groups there are is written in the code
    return [[batch, (*inner, *outer), *space]]


def as_complex(s: Axes, call: Call) -> list[list[Dim]]:
    """the two parts of complex numbers were, or after `view_as_real` are, a last dimension"""
    dims = s.of(call.args[0])
    if call.name == "view_as_real":
        return [[*dims, s.algebra.fixed(2)]]
    s.pin(dims[-1], reasons.COMPLEX)
    return [dims[:-1]]


# lookups -------------------------------------------------------------------------------------------


def index_(s: Axes, call: Call) -> list[list[Dim]]:
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


def gather(s: Axes, call: Call) -> list[list[Dim]]:
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


def write(s: Axes, call: Call) -> list[list[Dim]]:
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


def index_put(s: Axes, call: Call) -> list[list[Dim]]:
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


def masked_scatter(s: Axes, call: Call) -> list[list[Dim]]:
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


def embedding_bag(s: Axes, call: Call) -> list[list[Dim]]:
    """v d, b i -> b d: a sum, average or maximum of rows that are looked up by number"""
    table, outs = call.args[0], stay(s, call)
    rows, columns = s.of(table)
    s.pin(rows, reasons.NUMBERED)
    s.produce(table, [columns])
    return [[outs[0][0], columns], *outs[1:]]


def embedding_renorm(s: Axes, call: Call) -> list[list[Dim]]:
    """v d -> v d: rows that are looked up by number, made shorter; zeros leave their norms alone"""
    rows, columns = s.of(call.args[0])
    s.pin(rows, reasons.NUMBERED)
    return [[rows, columns]]


def packed(s: Axes, call: Call) -> list[list[Dim]]:
    """b t ... -> n ..., sequences without their padding, or (`_pad_packed_sequence`) back"""
    ahead = 1 if call.name == "_pad_packed_sequence" else 2
    dims, outs = s.of(call.args[0]), stay(s, call)
    for dim in dims[:ahead]:
        s.pin(dim, reasons.STEPS)
    rest = dims[ahead:] if call.given.get("padding_value", 0) == 0 else not_zero(dims[ahead:])
    return [[*outs[0][: 3 - ahead], *rest], *outs[1:]]


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


def trilinear(s: Axes, call: Call) -> list[list[Dim]]:
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


def distance(s: Axes, call: Call) -> list[list[Dim]]:
    """b i k, b j k -> b i j: a norm of differences over k, where zeros leave it alone"""
    (*batch, i, left), (*others, j, right) = (s.of(ref) for ref in call.refs)
    for leaf in s.unify(left, right):
        if not leaf.zero or call.given.get("p", 2) < 0:
            s.pin((leaf,), reasons.NORM)
    batch = [s.unify(a, b, lambda a, b: False) for a, b in zip(batch, others, strict=True)]
    return [not_zero([*batch, i, j])]


def recurrent(s: Axes, call: Call) -> list[list[Dim]]:
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
        s.pin(dim, reasons.ATTENTION)
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


# normalisations and reductions ---------------------------------------------------------------------


def layer_norm(s: Axes, call: Call) -> list[list[Dim]]:
    """normalised over the last dimensions: their mean and variance would change"""
    x, shape, weight, bias = call.args[:4]
    dims = s.of(x)
    kept, normed = dims[: -len(shape)], dims[-len(shape) :]
    for dim in normed:
        s.pin(dim, reasons.LAYER_NORM)
    normed = s.join(s.join(normed, weight), bias)
    return [[*[with_zero(dim, False) for dim in kept], *normed], *stay(s, call)[1:]]


def rms_norm(s: Axes, call: Call) -> list[list[Dim]]:
    """divided by the root of an average over the last dimensions; scales.py sees to the number of positions"""
    x, shape, weight = call.args[:3]
    dims = s.of(x)
    kept, normed = dims[: -len(shape)], dims[-len(shape) :]
    for leaf in (leaf for dim in normed for leaf in dim if not leaf.zero):
        s.pin((leaf,), reasons.AVERAGE)
    return [[*kept, *s.join(normed, weight, either)], *stay(s, call)[1:]]


def batch_norm(s: Axes, call: Call) -> list[list[Dim]]:
    """b c x: each channel by its own statistics"""
    x, *vectors = call.args[:5]
    batch, channels, *space = s.of(x)
    for dim in (batch, *space):
        s.pin(dim, reasons.BATCH_NORM)
    return [[batch, _affine(s, channels, *vectors), *space], *stay(s, call)[1:]]


def group_norm(s: Axes, call: Call) -> list[list[Dim]]:
    """b (g c) x: each group by its own statistics, so that whole groups go"""
    x, weight, bias, _, channels, _, groups, _ = call.args
    batch, dim, *space = s.of(x)
    outer, inner = s.algebra.reshape([dim], [groups, channels // groups])
    s.pin(inner, reasons.GROUP_NORM)
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
    norm = name in ("linalg_vector_norm", "norm")
    power = call.given.get("ord", call.given.get("p"))
    total = name in ("sum", "nansum") or (norm and (power is None or power >= 0))
    if total:
        s.produce(ref)
    why = dict.fromkeys(("sum", "nansum"), reasons.SUM) | dict.fromkeys(("linalg_vector_norm", "norm"), reasons.NORM)
    why |= dict.fromkeys(("mean", "var", "std", "var_mean", "std_mean"), reasons.AVERAGE)
    dims = s.of(ref)
    for leaf in (leaf for d in which for leaf in dims[d]):
        if not (leaf.zero and (total or (name == "mean" and not s.weight(ref)))):
            s.pin((leaf,), why.get(name, reasons.TAKEN.of(name)))
    keep = len(call.outs[0].shape) == len(dims)
    dims = [() if d in which else dim for d, dim in enumerate(dims) if keep or d not in which]
    if name in ("logsumexp", "argmax", "argmin"):  # of zeros it is no zero
        dims = not_zero(dims)
    second = dims if "mean" in name else not_zero(dims)  # a mean, or the place of a maximum
    return [dims, *[second for _ in call.outs[1:]]]


def along(s: Axes, call: Call) -> list[list[Dim]]:
    """normalised, ordered, accumulated or transformed along some dimensions, which stay"""
    dims, which = s.of(call.args[0]), call.given["dim"]
    for d in [which] if isinstance(which, int) else which:
        s.pin(dims[d], reasons.ALONG.of(call.name.strip("_")))
        dims[d] = s.algebra.fixed(call.outs[0].shape[d])
    if "softmax" in call.name or call.name == "logcumsumexp":  # of zeros it is no zero
        dims = not_zero(dims)
    return [dims, *[not_zero(dims)] * (len(call.outs) - 1)]


def spatial(s: Axes, call: Call) -> list[list[Dim]]:
    """b c x -> b c y: pooling and resizing within the image plane, and back by the places that a maximum came from"""
    k = next(k for k in (1, 2, 3) if f"{k}d" in call.name)
    dims = s.of(call.args[0])
    kept = dims[:-k]
    for dim in dims[-k:]:
        s.pin(dim, reasons.NEIGHBOURS)
    if "unpool" in call.name:
        kept = [s.unify(a, b, first) for a, b in zip(kept, s.of(call.args[1])[:-k], strict=True)]
    if "grid" in call.name:
        for dim in s.of(call.args[1])[1:]:
            s.pin(dim, reasons.INDEX)
    return [[*(not_zero(kept) if i else kept), *s.fixed(out.shape[-k:])] for i, out in enumerate(call.outs)]


# new tensors and the rest --------------------------------------------------------------------------


def fill(s: Axes, call: Call) -> list[list[Dim]]:
    """a new tensor that is the same everywhere: its axes are whatever meets them"""
    return [[s.new(n) for n in out.shape] for out in call.outs]


def stay(s: Axes, call: Call) -> list[list[Dim]]:
    """a new tensor whose values are positions, or of which nothing is known"""
    return [s.fixed(out.shape) for out in call.outs]


def unknown(s: Axes, call: Call) -> list[list[Dim]]:
    """no rule, or none that would leave an axis free: nothing that takes part may be cut"""
    for ref in call.refs:
        s.produce(ref)
        for dim in s.of(ref):
            s.pin(dim, WHOLE.get(call.name, reasons.NO_RULE).of(call.name.strip("_")))
    return stay(s, call)


_NAMES: dict[Callable[[Axes, Call], list[list[Dim]]], str] = {
    elementwise: """_to_copy copy hardswish native_dropout alias detach lift_fresh lift contiguous rsub zeros_like
        ones_like full_like empty_like rand_like randn_like bernoulli fill zero _prelu_kernel rrelu_with_noise
        log_sigmoid_forward polar complex _conj floor_divide masked_fill normal uniform exponential geometric cauchy
        log_normal random poisson""",
    cross: "linalg_cross",
    triangle: "tril triu",
    fake_quantize: """fake_quantize_per_tensor_affine_cachemask fake_quantize_per_channel_affine_cachemask
        _fake_quantize_per_tensor_affine_cachemask_tensor_qparams _fake_quantize_learnable_per_tensor_affine""",
    loss: "mse_loss smooth_l1_loss huber_loss binary_cross_entropy soft_margin_loss",
    view: "view _unsafe_view reshape _reshape_alias",
    strided: "permute transpose t unsqueeze squeeze expand select unbind",
    split: "split split_with_sizes unsafe_split chunk unsafe_chunk split_copy split_with_sizes_copy",
    cat: "cat stack",
    as_complex: "view_as_real view_as_complex",
    roll: "roll flip",
    slice_: "slice",
    pad: "constant_pad_nd",
    windows: "unfold",
    channel_shuffle: "channel_shuffle native_channel_shuffle",
    weight_norm: "_weight_norm_interface",
    index_: "index index_select embedding",
    write: "scatter scatter_add scatter_reduce index_add index_copy index_fill index_reduce",
    index_put: "index_put _index_put_impl",
    embedding_bag: "_embedding_bag _embedding_bag_forward_only",
    packed: "_pack_padded_sequence _pad_packed_sequence",
    mm: "mm addmm bmm baddbmm mv addmv dot vdot",
    trilinear: "_trilinear",
    distance: "_cdist_forward _euclidean_dist",
    convolution: "convolution _convolution",
    recurrent: "mkldnn_rnn_layer",
    attention: """_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention
        _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
        _scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math""",
    solve_triangular: "linalg_solve_triangular",
    layer_norm: "native_layer_norm",
    rms_norm: "_fused_rms_norm",
    batch_norm: """native_batch_norm _native_batch_norm_legit_no_training _native_batch_norm_legit cudnn_batch_norm
        miopen_batch_norm _batch_norm_no_update _batch_norm_with_update""",
    group_norm: "native_group_norm",
    reduction: """sum nansum linalg_vector_norm norm mean var std var_mean std_mean amax amin max min prod all any
        argmax argmin logsumexp median nanmedian kthvalue mode""",
    along: """_softmax _log_softmax _safe_softmax cumsum cumprod topk sort logcumsumexp cummax cummin _fft_c2c _fft_r2c
        _fft_c2r""",
    spatial: """max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d
        avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_max_pool2d
        adaptive_max_pool3d max_unpool2d max_unpool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d
        _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d
        upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d _upsample_bicubic2d_aa _upsample_bilinear2d_aa
        grid_sampler_2d grid_sampler_3d reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d
        replication_pad2d replication_pad3d""",
    fill: """zeros ones full empty new_zeros new_ones new_full new_empty scalar_tensor rand randn empty_strided
        new_empty_strided""",
    stay: "arange linspace eye tril_indices triu_indices randint randperm",
}
LAYOUT = (
    view, strided, repeat, slice_, split, cat, roll, rot90, pad, windows, diagonal, diag_embed, pixel_shuffle,
    pixel_unshuffle, im2col, col2im, channel_shuffle, as_complex, index_, gather, masked_scatter, packed,
)  # fmt: skip
_OWN_NAME = (repeat, glu, rot90, diagonal, diag_embed, pixel_shuffle, pixel_unshuffle, im2col, col2im, gather,
    masked_scatter, embedding_renorm)  # fmt: skip
_WHOLE = {  # why nothing that these take may be cut
    reasons.NUMBERED: """put take bucketize searchsorted nonzero masked_select masked_scatter one_hot histc unique_dim
        _unique2 _local_scalar_dense""",
    reasons.FIXED: "constant_pad_nd diagonal diag_embed",
    reasons.BY_NUMBER: "flex_attention",
    reasons.MIXED: """linalg_inv_ex linalg_matrix_exp linalg_qr linalg_householder_product linalg_cholesky_ex
        _linalg_svd _linalg_eigh _linalg_det _linalg_slogdet _linalg_solve_ex linalg_eig linalg_lstsq linalg_lu
        linalg_lu_factor_ex linalg_lu_solve linalg_solve_triangular linalg_ldl_factor_ex geqrf ormqr cholesky
        cholesky_solve cholesky_inverse linalg_pinv trace roll renorm _pdist_forward""",
    reasons.MEMORY: "as_strided resize resize_as set",
    reasons.OBSERVED: "aminmax _fused_moving_avg_obs_fq_helper",
    reasons.RANDOM: "fractional_max_pool2d fractional_max_pool3d multinomial",
    reasons.LOSS: """nll_loss_forward nll_loss2d_forward mse_loss smooth_l1_loss huber_loss binary_cross_entropy
        soft_margin_loss multi_margin_loss multilabel_margin_loss_forward _ctc_loss""",
    reasons.FUSED: "_cudnn_rnn miopen_rnn _thnn_fused_lstm_cell _thnn_fused_gru_cell",
}
WHOLE = {name: why for why, names in _WHOLE.items() for name in names.split()}
RULES = dict.fromkeys(WHOLE, unknown) | {rule.__name__: rule for rule in _OWN_NAME}
RULES |= {name: rule for rule, names in _NAMES.items() for name in names.split()}


def without_repeats(trace: Trace) -> Trace:
    """The trace without those calls of train mode that eval mode made too, of the same tensors: they say nothing new.

    What is left of train mode takes the results of eval mode in their place.
    """
    known_values = {ref.value for call in trace.calls for ref in call.outs}
    known_values |= {ref.value for ref in trace.sources.values()}

    def meaning(call: Call) -> Any:
        """What a call says to the algebra: a batch norm the same whether its statistics are its own or the batch's."""
        if RULES.get(call.name) is batch_norm:
            return batch_norm, tuple(_frozen(call.refs, known_values))
        return call.op, _frozen(call.args, known_values), _frozen(call.kwargs, known_values)

    made: dict[Any, deque[Call]] = {}
    for call in trace.calls[: trace.evaluated]:
        made.setdefault(meaning(call), deque()).append(call)
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
        same = made.get(meaning(call))
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


def _frozen(value: Any, known_values: set[int]) -> Any:
    """Arguments as something to compare; of tensors that come from outside nothing counts but the shape."""
    if isinstance(value, Ref):
        return value.value if value.value in known_values else value.shape
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item, known_values) for item in value)
    if isinstance(value, dict):
        return tuple((key, _frozen(item, known_values)) for key, item in value.items())
    return value, type(value)


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
    s.algebra.reason(reasons.OUTPUT)  # the first: what a person should read, if there are others too
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
            s.maker[ref.value] = call
        s.share(call)
    for dim in (dim for ref in trace.outputs for dim in s.of(ref)):
        s.algebra.pin(dim, reasons.OUTPUT)
    for equation in trace.equations:
        _tie_parts(s, equation)
    return s


def _tie_parts(s: Axes, equation: Equation) -> None:
    """Where the code divides an axis by a number, and what it makes of a part of that size is a part of the axis, all
    parts have to stay equal: the positions of equal place in them go together."""
    left, right, s.layer = equation
    whole, part = (left[1], right) if left[0] == "//" else (right, left[-1])
    if left[0] not in ("//", "*") or not whole[0] == part[0] == "span":
        return
    sides = []
    for _, value, d, start, stop in (whole, part):
        dim = s.dims[value][d] if value in s.dims else ()
        sides.append(dim[0].ids[start:stop] if len(dim) == 1 else np.zeros(0))
    positions, some = sides
    if not positions.any() or not 0 < len(some) < len(positions) or len(positions) % len(some):
        return
    parts = positions.reshape(-1, len(some))
    if (parts == some).all(1).any():
        for other in parts[1:]:
            s.algebra.align((Leaf(parts[0], False),), (Leaf(other, False),), s.why(reasons.MEETS))
