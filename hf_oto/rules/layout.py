"""Functions that only move elements: views, slices, concatenations, windows.

Worked example: x of shape (2, 12) viewed as (2, 3, 4) splits its second dimension into two factors. The algebra
records that position 4 i + j goes if and only if i or j goes, and the solver decides later which factor may go.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .. import reasons
from ..axes import Dim, Mark, size
from ..sizes import Ref
from ..trace import Call
from .others import unknown
from .state import Axes, Dims, either, first, not_zero, rule


@rule("view", "_unsafe_view", "reshape", "_reshape_alias")
def view(s: Axes, call: Call) -> Dims:
    """the same elements in row-major order under another shape"""
    dims = s.of(call.args[0])
    shape = call.outs[0].shape
    result = s.algebra.reshape(dims, shape)
    return [result]


@rule("permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "select", "unbind")
def strided(s: Axes, call: Call) -> Dims:
    """dimensions that change places, appear with size 1, disappear or grow from size 1 to one along which all is
    equal: the strides of an example show which dimension is where"""
    ref = call.args[0]
    dim_of_stride = dict(enumerate(s.of(ref), 1))
    # dimension d of the example has the stride d + 1, which tells where it is in the result
    example = torch.empty_strided(ref.shape, [*dim_of_stride], device="meta")
    moved = call.op(example, *call.args[1:], **call.kwargs)
    if not isinstance(moved, torch.Tensor):  # `unbind` gives several results, all alike
        moved = moved[0]

    strides_found = set()
    result = []
    for n, stride in zip(moved.shape, moved.stride(), strict=True):
        if n <= 1:  # torch may give such a dimension any stride
            result.append(())
        elif stride == 0:
            copies = s.new(n, marks=Mark.EXPANDED)
            result.append(copies)
        else:
            strides_found.add(stride)
            result.append(dim_of_stride[stride])
    for stride, dim in dim_of_stride.items():
        if stride not in strides_found:  # of a dimension that disappeared, one position was read by its number
            s.pin(dim, reasons.FIXED)
    return [result] * len(call.outs)


@rule("repeat")
def repeat(s: Axes, call: Call) -> Dims:
    """n -> r n, the copies outermost"""
    ref, repeats = call.args[:2]
    dims = s.of(ref, len(repeats))
    result = []
    for r, dim in zip(repeats, dims, strict=True):
        copies = s.new(r, marks=Mark.EXPANDED)
        result.append((*copies, *dim))
    return [result]


@rule("slice")
def slice_(s: Axes, call: Call) -> Dims:
    """positions start:stop:step of one dimension"""
    ref, d, start, stop, step = call.given.values()
    n = ref.shape[d]
    dims = s.of(ref)
    index = np.arange(n)[start:stop:step]
    is_one_of_every_step = n % step == 0 and len(index) == n // step
    if step > 1 and is_one_of_every_step:  # `step` positions in a row go together, as one position of the result
        dims[d], inner = s.factors(dims[d], n // step, step)
        s.pin(inner, reasons.FIXED)
        return [dims]
    if step > 1:
        s.pin(dims[d], reasons.STRIDE)
    result = s.take(ref, d, index)
    return [result]


@rule(
    *"split split_with_sizes unsafe_split chunk unsafe_chunk split_copy split_with_sizes_copy".split(),
)
def split(s: Axes, call: Call) -> Dims:
    """pieces of a dimension"""
    ref, _, d = call.given.values()
    lengths = [out.shape[d] for out in call.outs]
    ends = np.cumsum(lengths)
    positions = np.arange(ref.shape[d])
    pieces = np.split(positions, ends[:-1])
    return [s.take(ref, d, piece) for piece in pieces]


@rule("cat", "stack")
def cat(s: Axes, call: Call) -> Dims:
    """dimensions laid one after the other; those of `stack` are new and of size 1, and what they make can't be cut"""
    refs, d = call.given.values()
    ndim = len(call.outs[0].shape)
    d %= ndim
    is_stack = call.name == "stack"
    pieces = []  # dimension d of each operand
    operands = []  # the other dimensions of each
    for ref in refs:
        if ref.shape == (0,):  # torch.cat skips such a tensor, whatever the shape of the others
            continue
        s.produce(ref)
        dims = s.of(ref)
        piece = () if is_stack else dims.pop(d)
        pieces.append(piece)
        operands.append(dims)
    result, *others = operands
    for dims in others:
        pairs = zip(result, dims, strict=True)
        result = [s.unify(a, b) for a, b in pairs]
    laid_out = _cat(s, pieces)
    result.insert(d, laid_out)
    return [result]


def _cat(s: Axes, parts: Sequence[Dim]) -> Dim:
    """Parts of a dimension laid one after the other, without those that are empty."""
    parts_with_positions = [part for part in parts if size(part)]
    return s.algebra.cat(parts_with_positions)


@rule("roll", "flip")
def roll(s: Axes, call: Call) -> Dims:
    """positions rotated, or (`flip`) reversed; those that a rotation by a number moves over the end must all stay"""
    ref = call.args[0]
    rolled_dims = call.given["dims"]
    if not rolled_dims:  # torch then rolls the flattened tensor
        return unknown(s, call)
    result = s.of(ref)
    if call.name == "flip":
        for d in rolled_dims:
            _reverse_(s, ref, result, d)
        return [result]
    shifts = call.args[1]
    for d, shift in zip(rolled_dims, shifts, strict=True):
        n = ref.shape[d]
        index = np.arange(n)
        if shift % n == 0:
            continue
        over_the_end = index[-shift:] if shift > 0 else index[:-shift]
        leaf = s.algebra.merge(result[d])
        s.algebra.pin_ids(leaf.ids[over_the_end], s.why(reasons.WRAPS))
        rolled = np.roll(index, shift)
        result[d] = s.algebra.take(result[d], rolled)
    return [result]


def _reverse_(s: Axes, ref: Ref, dims: list[Dim], d: int) -> None:
    """Reverses dimension d in the list of a tensor's dimensions."""
    positions = np.arange(ref.shape[d])
    backwards = positions[::-1]
    dims[d] = s.algebra.take(dims[d], backwards)


@rule("rot90")
def rot90(s: Axes, call: Call) -> Dims:
    """a plane turned by quarters: a flip, then a transposition"""
    ref, quarters, plane = call.given.values()
    result = s.of(ref)
    a, b = (d % len(result) for d in plane)
    if quarters % 4 in (2, 3):
        _reverse_(s, ref, result, a)
    if quarters % 4 in (1, 2):
        _reverse_(s, ref, result, b)
    if quarters % 2:
        result[a], result[b] = result[b], result[a]
    return [result]


@rule("constant_pad_nd")
def pad(s: Axes, call: Call) -> Dims:
    """positions added at both ends; taken away (amounts below 0) they would be others after a cut"""
    ref, amounts, value = call.given.values()
    if min(amounts) < 0:
        return unknown(s, call)
    result = s.of(ref)
    if value != 0:
        result = not_zero(result)
    amounts_of_dims = zip(amounts[::2], amounts[1::2], strict=True)
    for d, ends in enumerate(amounts_of_dims, 1):  # torch counts from the last dimension on
        start, end = s.fixed(ends)
        result[-d] = _cat(s, [start, result[-d], end])
    return [result]


@rule("unfold")
def windows(s: Axes, call: Call) -> Dims:
    """n -> windows ... size"""
    ref, d = call.args[:2]
    *shape, window_size = call.outs[0].shape
    d %= len(shape)
    result = s.of(ref)
    s.pin(result[d], reasons.SPATIAL)
    result[d] = s.algebra.fixed(shape[d])
    window = s.algebra.fixed(window_size)
    return [[*result, window]]


@rule("diagonal")
def diagonal(s: Axes, call: Call) -> Dims:
    """... i i -> ... i: rows and columns go together"""
    ref = call.args[0]
    given = call.given
    dims = s.of(ref)
    ndim = len(dims)
    rows = given["dim1"] % ndim
    columns = given["dim2"] % ndim
    if given["offset"] or size(dims[rows]) != size(dims[columns]):
        return unknown(s, call)
    s.produce(ref)
    on_the_diagonal = s.unify(dims[rows], dims[columns], either)
    result = [dim for d, dim in enumerate(dims) if d not in (rows, columns)]
    result.append(on_the_diagonal)
    return [result]


@rule("diag_embed")
def diag_embed(s: Axes, call: Call) -> Dims:
    """... i -> ... i i: a row goes with its column"""
    ref = call.args[0]
    given = call.given
    if given["offset"]:
        return unknown(s, call)
    *result, last = s.of(ref)
    s.produce(ref)
    out_ndim = len(call.outs[0].shape)
    rows = given["dim1"] % out_ndim
    columns = given["dim2"] % out_ndim
    for d in sorted([rows, columns]):  # the first must be in its place before the second is counted
        result.insert(d, last)
    return [result]


@rule("glu")
def glu(s: Axes, call: Call) -> Dims:
    """two halves of a dimension, the first gated by the second"""
    ref, d = call.given.values()
    positions = np.arange(ref.shape[d])
    first_half, second_half = np.split(positions, 2)
    result = s.take(ref, d, first_half)
    gate = s.take(ref, d, second_half)
    result[d] = s.unify(result[d], gate[d], first)
    return [result]


@rule("pixel_shuffle")
def pixel_shuffle(s: Axes, call: Call) -> Dims:
    """n (c r r) h w -> n c (h r) (w r)"""
    ref, r = call.args
    *batch, channels, h, w = s.of(ref)
    num_channels = ref.shape[-3] // r**2
    channels, *shifts = s.factors(channels, num_channels, r, r)
    for dim in (*shifts, h, w):
        s.pin(dim, reasons.PLANE)
    plane = _plane_of_result(s, call)
    return [[*batch, channels, *plane]]


def _plane_of_result(s: Axes, call: Call) -> list[Dim]:
    """Height and width of the result, which can't be cut."""
    out = call.outs[0]
    return s.fixed(out.shape[-2:])


@rule("pixel_unshuffle")
def pixel_unshuffle(s: Axes, call: Call) -> Dims:
    """n c (h r) (w r) -> n (c r r) h w"""
    ref, r = call.args
    *batch, channels, h, w = s.of(ref)
    for dim in (h, w):
        s.pin(dim, reasons.PLANE)
    shifts = s.algebra.fixed(r**2)
    plane = _plane_of_result(s, call)
    return [[*batch, (*channels, *shifts), *plane]]


@rule("im2col")
def im2col(s: Axes, call: Call) -> Dims:
    """b c h w -> b (c k) n, for k positions of a kernel at n places"""
    ref, kernel_size = call.args[:2]
    *batch, channels, h, w = s.of(ref)
    for dim in (h, w):
        s.pin(dim, reasons.SPATIAL)
    kernel_height, kernel_width = kernel_size
    kernel = s.algebra.fixed(kernel_height * kernel_width)
    num_places = call.outs[0].shape[-1]
    places = s.algebra.fixed(num_places)
    return [[*batch, (*channels, *kernel), places]]


@rule("col2im")
def col2im(s: Axes, call: Call) -> Dims:
    """b (c k) n -> b c h w: values that are put at the same place are summed"""
    *batch, columns, places = s.of(call.args[0])
    kernel_height, kernel_width = call.given["kernel_size"]
    kernel_positions = kernel_height * kernel_width
    num_channels = call.outs[0].shape[-3]
    channels, kernel = s.factors(columns, num_channels, kernel_positions)
    s.pin(kernel, reasons.KERNEL)
    s.pin(places, reasons.SPATIAL)
    plane = _plane_of_result(s, call)
    return [[*batch, channels, *plane]]


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(s: Axes, call: Call) -> Dims:
    """n (g c) x -> n (c g) x"""
    ref, groups = call.args
    batch, channels, *space = s.of(ref)
    channels_of_group = ref.shape[1] // groups
    outer, inner = s.factors(channels, groups, channels_of_group)
    s.pin(outer, reasons.FIXED)  # how many groups there are is written in the code
    shuffled = (*inner, *outer)
    return [[batch, shuffled, *space]]


@rule("view_as_real", "view_as_complex")
def as_complex(s: Axes, call: Call) -> Dims:
    """the two parts of complex numbers were, or after `view_as_real` are, a last dimension"""
    dims = s.of(call.args[0])
    if call.name == "view_as_real":
        parts = s.algebra.fixed(2)
        return [[*dims, parts]]
    *others, parts = dims
    s.pin(parts, reasons.COMPLEX)
    return [others]
