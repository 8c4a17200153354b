"""Functions that only move elements: views, slices, concatenations, windows.

Worked example: x of shape (2, 12) viewed as (2, 3, 4) splits its second dimension into two factors. The algebra
records that position 4 i + j goes if and only if i or j goes, and the solver decides later which factor may go.
"""

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
    ndim = len(ref.shape)
    # dimension d of the example has the stride d + 1, which tells where it is in the result
    example = torch.empty_strided(ref.shape, [*range(1, ndim + 1)], device="meta")
    result = call.op(example, *call.args[1:], **call.kwargs)
    result = result if isinstance(result, torch.Tensor) else result[0]
    dim_of_stride = dict(enumerate(s.of(ref), 1)) | {None: ()}  # None stands for a dimension of size 1
    strides = [stride if n > 1 else None for n, stride in zip(result.shape, result.stride(), strict=True)]
    for stride in dim_of_stride.keys() - set(strides):  # of what disappeared, one position was read
        s.pin(dim_of_stride[stride], reasons.FIXED)
    dims = []
    for stride, n in zip(strides, result.shape, strict=True):
        is_expanded = stride == 0
        dims.append(s.new(n, marks=Mark.EXPANDED) if is_expanded else dim_of_stride[stride])
    return [dims] * len(call.outs)


@rule("repeat")
def repeat(s: Axes, call: Call) -> Dims:
    """n -> r n, the copies outermost"""
    dims = s.of(call.args[0], len(call.outs[0].shape))
    return [[(*s.new(r, marks=Mark.EXPANDED), *dim) for r, dim in zip(call.args[1], dims, strict=True)]]


@rule("slice")
def slice_(s: Axes, call: Call) -> Dims:
    """positions start:stop:step of one dimension"""
    ref, d, start, stop, step = call.given.values()
    n = ref.shape[d]
    dims = s.of(ref)
    index = np.arange(n)[start:stop:step]
    is_one_of_every_step = n % step == 0 and len(index) == n // step
    if step > 1 and is_one_of_every_step:  # `step` positions in a row go together, as one position of the result
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
    pieces = np.split(np.arange(ref.shape[d]), ends[:-1])
    return [s.take(ref, d, index) for index in pieces]


@rule("cat", "stack")
def cat(s: Axes, call: Call) -> Dims:
    """dimensions laid one after the other; those of `stack` are new and of size 1, and what they make can't be cut"""
    refs, d = call.given.values()
    d %= len(call.outs[0].shape)
    refs = [ref for ref in refs if ref.shape != (0,)]  # torch.cat skips these, whatever the others' shape
    operands = [s.of(ref) for ref in refs]
    for ref, dims in zip(refs, operands, strict=True):
        s.produce(ref)
        if call.name == "stack":
            dims.insert(d, ())
    pieces = [dims.pop(d) for dims in operands]
    result = operands[0]
    for dims in operands[1:]:
        result = [s.unify(a, b) for a, b in zip(result, dims, strict=True)]
    result.insert(d, s.algebra.cat([piece for piece in pieces if size(piece)]))
    return [result]


@rule("roll", "flip")
def roll(s: Axes, call: Call) -> Dims:
    """positions rotated, or (`flip`) reversed; those that a rotation by a number moves over the end must all stay"""
    ref = call.args[0]
    rolled_dims = call.given["dims"]
    if not rolled_dims:
        return unknown(s, call)
    result = s.of(ref)
    for d, shift in zip(rolled_dims, call.args[1], strict=True):
        index = np.arange(ref.shape[d])
        if call.name == "flip":
            result[d] = s.algebra.take(result[d], index[::-1])
        elif shift % len(index):
            over_the_end = index[-shift:] if shift > 0 else index[:-shift]
            leaf = s.algebra.merge(result[d])
            s.algebra.pin_ids(leaf.ids[over_the_end], s.why(reasons.WRAPS))
            result[d] = s.algebra.take(result[d], np.roll(index, shift))
    return [result]


@rule("rot90")
def rot90(s: Axes, call: Call) -> Dims:
    """a plane turned by quarters: a flip, then a transposition"""
    ref, quarters, plane = call.given.values()
    result = s.of(ref)
    a, b = (d % len(result) for d in plane)
    if quarters % 4 in (2, 3):
        result[a] = s.algebra.take(result[a], np.arange(ref.shape[a])[::-1])
    if quarters % 4 in (1, 2):
        result[b] = s.algebra.take(result[b], np.arange(ref.shape[b])[::-1])
    if quarters % 2:
        result[a], result[b] = result[b], result[a]
    return [result]


@rule("constant_pad_nd")
def pad(s: Axes, call: Call) -> Dims:
    """positions added at both ends; taken away (amounts below 0) they would be others after a cut"""
    ref, amounts, value = call.given.values()
    if min(amounts) < 0:
        return unknown(s, call)
    result = s.of(ref) if value == 0 else not_zero(s.of(ref))
    amounts_of_dims = zip(amounts[::2], amounts[1::2], strict=True)
    for d, ends in enumerate(amounts_of_dims, 1):  # torch counts from the last dimension on
        start, end = s.fixed(ends)
        result[-d] = s.algebra.cat([part for part in (start, result[-d], end) if size(part)])
    return [result]


@rule("unfold")
def windows(s: Axes, call: Call) -> Dims:
    """n -> windows ... size"""
    *shape, window_size = call.outs[0].shape
    d = call.args[1] % len(shape)
    result = s.of(call.args[0])
    s.pin(result[d], reasons.SPATIAL)
    result[d] = s.algebra.fixed(shape[d])
    return [[*result, s.algebra.fixed(window_size)]]


@rule("diagonal")
def diagonal(s: Axes, call: Call) -> Dims:
    """... i i -> ... i: rows and columns go together"""
    given = call.given
    dims = s.of(call.args[0])
    rows = given["dim1"] % len(dims)
    columns = given["dim2"] % len(dims)
    if given["offset"] or size(dims[rows]) != size(dims[columns]):
        return unknown(s, call)
    s.produce(call.args[0])
    on_the_diagonal = s.unify(dims[rows], dims[columns], either)
    others = [dim for d, dim in enumerate(dims) if d not in (rows, columns)]
    out_ndim = len(call.outs[0].shape)
    return [[*others, on_the_diagonal][:out_ndim]]


@rule("diag_embed")
def diag_embed(s: Axes, call: Call) -> Dims:
    """... i -> ... i i: a row goes with its column"""
    given = call.given
    if given["offset"]:
        return unknown(s, call)
    *result, last = s.of(call.args[0])
    s.produce(call.args[0])
    out_ndim = len(call.outs[0].shape)
    for d in sorted([given["dim1"] % out_ndim, given["dim2"] % out_ndim]):
        result.insert(d, last)
    return [result]


@rule("glu")
def glu(s: Axes, call: Call) -> Dims:
    """two halves of a dimension, the first gated by the second"""
    ref, d = call.given.values()
    first_half, second_half = np.split(np.arange(ref.shape[d]), 2)
    result = s.take(ref, d, first_half)
    gate = s.take(ref, d, second_half)
    result[d] = s.unify(result[d], gate[d], first)
    return [result]


@rule("pixel_shuffle")
def pixel_shuffle(s: Axes, call: Call) -> Dims:
    """n (c r r) h w -> n c (h r) (w r)"""
    ref, r = call.args
    *batch, channels, h, w = s.of(ref)
    channels, *shifts = s.algebra.reshape([channels], [ref.shape[-3] // r**2, r, r])
    for dim in (*shifts, h, w):
        s.pin(dim, reasons.PLANE)
    return [[*batch, channels, *s.fixed(call.outs[0].shape[-2:])]]


@rule("pixel_unshuffle")
def pixel_unshuffle(s: Axes, call: Call) -> Dims:
    """n c (h r) (w r) -> n (c r r) h w"""
    ref, r = call.args
    *batch, channels, h, w = s.of(ref)
    for dim in (h, w):
        s.pin(dim, reasons.PLANE)
    channels = (*channels, *s.algebra.fixed(r**2))
    return [[*batch, channels, *s.fixed(call.outs[0].shape[-2:])]]


@rule("im2col")
def im2col(s: Axes, call: Call) -> Dims:
    """b c h w -> b (c k) n, for k positions of a kernel at n places"""
    *batch, channels, h, w = s.of(call.args[0])
    for dim in (h, w):
        s.pin(dim, reasons.SPATIAL)
    kernel_height, kernel_width = call.args[1]
    num_places = call.outs[0].shape[-1]
    columns = (*channels, *s.algebra.fixed(kernel_height * kernel_width))
    return [[*batch, columns, s.algebra.fixed(num_places)]]


@rule("col2im")
def col2im(s: Axes, call: Call) -> Dims:
    """b (c k) n -> b c h w: what meets is summed"""
    *batch, columns, places = s.of(call.args[0])
    kernel_height, kernel_width = call.given["kernel_size"]
    image = call.outs[0].shape
    channels, kernel = s.algebra.reshape([columns], [image[-3], kernel_height * kernel_width])
    s.pin(kernel, reasons.KERNEL)
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
