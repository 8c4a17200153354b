"""Functions that only move elements: views, slices, concatenations, windows."""

from __future__ import annotations

import numpy as np
import torch

from .. import reasons
from ..axes import Mark, size
from ..trace import Call
from .others import unknown
from .state import Axes, Dims, either, first, not_zero, rule


@rule("view", "_unsafe_view", "reshape", "_reshape_alias")
def view(s: Axes, call: Call) -> Dims:
    """the same elements in row-major order under another shape"""
    return [s.algebra.reshape(s.of(call.args[0]), call.outs[0].shape)]


@rule("permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "select", "unbind")
def strided(s: Axes, call: Call) -> Dims:
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


@rule("repeat")
def repeat(s: Axes, call: Call) -> Dims:
    """n -> r n, the copies outermost"""
    dims = s.of(call.args[0], len(call.outs[0].shape))
    return [[(*s.new(r, marks=Mark.EXPANDED), *dim) for r, dim in zip(call.args[1], dims, strict=True)]]


@rule("slice")
def slice_(s: Axes, call: Call) -> Dims:
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


@rule(
    *"split split_with_sizes unsafe_split chunk unsafe_chunk split_copy split_with_sizes_copy".split(),
)
def split(s: Axes, call: Call) -> Dims:
    """pieces of a dimension"""
    ref, _, d = call.given.values()
    ends = np.cumsum([out.shape[d] for out in call.outs])
    return [s.take(ref, d, index) for index in np.split(np.arange(ref.shape[d]), ends[:-1])]


@rule("cat", "stack")
def cat(s: Axes, call: Call) -> Dims:
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


@rule("roll", "flip")
def roll(s: Axes, call: Call) -> Dims:
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


@rule("rot90")
def rot90(s: Axes, call: Call) -> Dims:
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


@rule("constant_pad_nd")
def pad(s: Axes, call: Call) -> Dims:
    """positions added at both ends; taken away (amounts below 0) they would be others after a cut"""
    ref, amounts, value = call.given.values()
    if min(amounts) < 0:
        return unknown(s, call)
    result = s.of(ref) if value == 0 else not_zero(s.of(ref))
    for d, ends in enumerate(zip(amounts[::2], amounts[1::2], strict=True), 1):  # from the last dimension on
        start, end = s.fixed(ends)
        result[-d] = s.algebra.cat([part for part in (start, result[-d], end) if size(part)])
    return [result]


@rule("unfold")
def windows(s: Axes, call: Call) -> Dims:
    """n -> windows ... size"""
    *dims, last = call.outs[0].shape
    d = call.args[1] % len(dims)
    result = s.of(call.args[0])
    s.pin(result[d], reasons.SPATIAL)
    result[d] = s.algebra.fixed(dims[d])
    return [[*result, s.algebra.fixed(last)]]


@rule("diagonal")
def diagonal(s: Axes, call: Call) -> Dims:
    """... i i -> ... i: rows and columns go together"""
    dims, out = s.of(call.args[0]), call.outs[0].shape
    a, b = (call.given[d] % len(dims) for d in ("dim1", "dim2"))
    if call.given["offset"] or size(dims[a]) != size(dims[b]):
        return unknown(s, call)
    s.produce(call.args[0])
    both_ways = s.unify(dims[a], dims[b], either)
    return [[*[dim for d, dim in enumerate(dims) if d not in (a, b)], both_ways][: len(out)]]


@rule("diag_embed")
def diag_embed(s: Axes, call: Call) -> Dims:
    """... i -> ... i i: a row goes with its column"""
    if call.given["offset"]:
        return unknown(s, call)
    *result, last = s.of(call.args[0])
    s.produce(call.args[0])
    for d in sorted(call.given[name] % len(call.outs[0].shape) for name in ("dim1", "dim2")):
        result.insert(d, last)
    return [result]


@rule("glu")
def glu(s: Axes, call: Call) -> Dims:
    """two halves of a dimension, the first gated by the second"""
    ref, d = call.given.values()
    left, right = (s.take(ref, d, half) for half in np.split(np.arange(ref.shape[d]), 2))
    left[d] = s.unify(left[d], right[d], first)
    return [left]


@rule("pixel_shuffle")
def pixel_shuffle(s: Axes, call: Call) -> Dims:
    """n (c r r) h w -> n c (h r) (w r)"""
    ref, r = call.args
    *batch, channels, h, w = s.of(ref)
    inner = s.algebra.reshape([channels], [ref.shape[-3] // r**2, r, r])
    for dim in (*inner[1:], h, w):
        s.pin(dim, reasons.PLANE)
    return [[*batch, inner[0], *s.fixed(call.outs[0].shape[-2:])]]


@rule("pixel_unshuffle")
def pixel_unshuffle(s: Axes, call: Call) -> Dims:
    """n c (h r) (w r) -> n (c r r) h w"""
    ref, r = call.args
    *batch, channels, h, w = s.of(ref)
    for dim in (h, w):
        s.pin(dim, reasons.PLANE)
    return [[*batch, (*channels, *s.algebra.fixed(r**2)), *s.fixed(call.outs[0].shape[-2:])]]


@rule("im2col")
def im2col(s: Axes, call: Call) -> Dims:
    """b c h w -> b (c k) n, for k positions of a kernel at n places"""
    *batch, channels, h, w = s.of(call.args[0])
    for dim in (h, w):
        s.pin(dim, reasons.SPATIAL)
    kernel, places = call.args[1][0] * call.args[1][1], call.outs[0].shape[-1]
    return [[*batch, (*channels, *s.algebra.fixed(kernel)), s.algebra.fixed(places)]]


@rule("col2im")
def col2im(s: Axes, call: Call) -> Dims:
    """b (c k) n -> b c h w: what meets is summed"""
    *batch, columns, places = s.of(call.args[0])
    kernel, image = call.given["kernel_size"][0] * call.given["kernel_size"][1], call.outs[0].shape
    channels, each = s.algebra.reshape([columns], [image[-3], kernel])
    s.pin(each, reasons.KERNEL)
    s.pin(places, reasons.SPATIAL)
    return [[*batch, channels, *s.fixed(image[-2:])]]


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(s: Axes, call: Call) -> Dims:
    """n (g c) x -> n (c g) x"""
    ref, groups = call.args
    batch, channels, *space = s.of(ref)
    outer, inner = s.algebra.reshape([channels], [groups, ref.shape[1] // groups])
    s.pin(outer, reasons.FIXED)  # how many groups there are is written in the code
    return [[batch, (*inner, *outer), *space]]


@rule("view_as_real", "view_as_complex")
def as_complex(s: Axes, call: Call) -> Dims:
    """the two parts of complex numbers were, or after `view_as_real` are, a last dimension"""
    dims = s.of(call.args[0])
    if call.name == "view_as_real":
        return [[*dims, s.algebra.fixed(2)]]
    s.pin(dims[-1], reasons.COMPLEX)
    return [dims[:-1]]
