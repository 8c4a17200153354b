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
    """dimensions that change places, appear with size 1, disappear, or grow from size 1 to hold copies: the strides of
    an example show which dimension is where"""
    ref, *arguments = call.args
    dims = s.of(ref)
    # dimension d of the example has the stride d + 1, which tells where it is in the result
    dim_of_stride = dict(enumerate(dims, 1))
    strides = list(dim_of_stride)
    example = torch.empty_strided(ref.shape, strides, device="meta")
    moved = call.op(example, *arguments, **call.kwargs)
    if not isinstance(moved, torch.Tensor):  # `unbind` gives several results, all alike
        moved = moved[0]

    strides_found = set()
    result = []
    sizes_and_strides = zip(moved.shape, moved.stride(), strict=True)
    for n, stride in sizes_and_strides:
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
    positions = np.arange(n)
    index = positions[start:stop:step]
    num_steps = n // step
    has_whole_steps = n % step == 0
    is_one_of_every_step = has_whole_steps and len(index) == num_steps
    if step > 1 and is_one_of_every_step:  # `step` positions in a row go together, as one position of the result
        dims[d], inner = s.factors(dims[d], num_steps, step)
        s.pin(inner, reasons.FIXED)
        return [dims]
    if step > 1:  # steps that don't fill the dimension are no factor of it
        s.pin(dims[d], reasons.STRIDE)
    result = s.take(ref, d, index)
    return [result]


@rule(
    *"split split_with_sizes unsafe_split chunk unsafe_chunk split_copy split_with_sizes_copy".split(),
)
def split(s: Axes, call: Call) -> Dims:
    """pieces of a dimension"""
    ref, _, d = call.given.values()
    result = []
    start = 0
    for out in call.outs:
        stop = start + out.shape[d]
        piece = np.arange(start, stop)
        dims = s.take(ref, d, piece)
        result.append(dims)
        start = stop
    return result


@rule("cat", "stack")
def cat(s: Axes, call: Call) -> Dims:
    """dimensions laid one after the other; `stack` lays new ones of size 1, and the result of that can't be cut"""
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
        result = s.unify_all(result, dims)
    laid_out = _cat(s, pieces)
    result.insert(d, laid_out)
    return [result]


def _cat(s: Axes, parts: Sequence[Dim]) -> Dim:
    """Parts of a dimension laid one after the other, without those that are empty."""
    parts_with_positions = [part for part in parts if size(part)]
    return s.algebra.cat(parts_with_positions)


@rule("roll", "flip")
def roll(s: Axes, call: Call) -> Dims:
    """positions rotated or reversed (`flip`); a rotation is by a number, so what it moves over the end must stay"""
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
    why = s.why(reasons.WRAPS)
    for d, shift in zip(rolled_dims, shifts, strict=True):
        n = ref.shape[d]
        if shift % n == 0:
            continue
        dim = result[d]
        leaf = s.algebra.merge(dim)
        # a shift below 0 moves the first positions over the end
        over_the_end = leaf.ids[-shift:] if shift > 0 else leaf.ids[:-shift]
        s.algebra.pin_ids(over_the_end, why)
        positions = np.arange(n)
        rolled = np.roll(positions, shift)
        result[d] = s.algebra.take(dim, rolled)
    return [result]


def _reverse_(s: Axes, ref: Ref, dims: list[Dim], d: int) -> None:
    """Reverses dimension d in the list of a tensor's dimensions."""
    positions = np.arange(ref.shape[d])
    backwards = positions[::-1]
    reverse = s.algebra.take(dims[d], backwards)
    dims[d] = reverse


@rule("rot90")
def rot90(s: Axes, call: Call) -> Dims:
    """a plane turned by quarters: a flip, then a transposition"""
    ref, quarters, plane = call.given.values()
    result = s.of(ref)
    ndim = len(result)
    a, b = plane
    a %= ndim
    b %= ndim
    if quarters % 4 in (2, 3):
        _reverse_(s, ref, result, a)
    if quarters % 4 in (1, 2):
        _reverse_(s, ref, result, b)
    if quarters % 2:
        result[a], result[b] = result[b], result[a]
    return [result]


@rule("constant_pad_nd")
def pad(s: Axes, call: Call) -> Dims:
    """positions added at both ends; amounts below 0 take positions away by number, which a cut would change"""
    ref, amounts, value = call.given.values()
    if min(amounts) < 0:
        return unknown(s, call)
    result = s.of(ref)
    if value != 0:
        result = not_zero(result)
    before = amounts[::2]
    after = amounts[1::2]
    ends_of_dims = zip(before, after, strict=True)
    for d, ends in enumerate(ends_of_dims, 1):  # torch counts from the last dimension on
        start, end = s.fixed(ends)
        parts = [start, result[-d], end]
        result[-d] = _cat(s, parts)
    return [result]


@rule("unfold")
def windows(s: Axes, call: Call) -> Dims:
    """n -> windows ... size"""
    ref, d = call.args[:2]
    *shape, window_size = call.outs[0].shape
    d %= len(shape)
    num_windows = shape[d]
    result = s.of(ref)
    # windows may overlap, so that one position lies at several places of them
    s.pin(result[d], reasons.SPATIAL)
    windows_dim, window = s.fixed([num_windows, window_size])
    result[d] = windows_dim
    result.append(window)
    return [result]


@rule("diagonal")
def diagonal(s: Axes, call: Call) -> Dims:
    """... i i -> ... i: rows and columns go together"""
    ref = call.args[0]
    given = call.given
    dims = s.of(ref)
    ndim = len(dims)
    at = [given["dim1"] % ndim, given["dim2"] % ndim]
    rows, columns = (dims[d] for d in at)
    is_square = size(rows) == size(columns)
    if given["offset"] or not is_square:  # a row would go with a column of another number
        return unknown(s, call)
    s.produce(ref)
    # an element of the diagonal is zero if its row or its column is
    on_the_diagonal = s.unify(rows, columns, either)
    result = [dim for d, dim in enumerate(dims) if d not in at]
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
    # the gate is a sigmoid, which is not zero where its half is
    gated = s.unify(result[d], gate[d], first)
    result[d] = gated
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
    new_channels = (*channels, *shifts)
    plane = _plane_of_result(s, call)
    return [[*batch, new_channels, *plane]]


@rule("im2col")
def im2col(s: Axes, call: Call) -> Dims:
    """b c h w -> b (c k) n, for k positions of a kernel at n places"""
    ref, kernel_size = call.args[:2]
    *batch, channels, h, w = s.of(ref)
    for dim in (h, w):
        s.pin(dim, reasons.SPATIAL)
    kernel_height, kernel_width = kernel_size
    kernel_positions = kernel_height * kernel_width
    *_, num_places = call.outs[0].shape
    kernel, places = s.fixed([kernel_positions, num_places])
    columns = (*channels, *kernel)
    return [[*batch, columns, places]]


@rule("col2im")
def col2im(s: Axes, call: Call) -> Dims:
    """b (c k) n -> b c h w: values that are put at the same place are summed"""
    ref = call.args[0]
    *batch, columns, places = s.of(ref)
    kernel_height, kernel_width = call.given["kernel_size"]
    kernel_positions = kernel_height * kernel_width
    *_, num_channels, _, _ = call.outs[0].shape
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
    """the two parts of complex numbers as a last dimension (`view_as_real`), and back"""
    dims = s.of(call.args[0])
    if call.name == "view_as_real":
        parts = s.algebra.fixed(2)
        return [[*dims, parts]]
    *others, parts = dims
    s.pin(parts, reasons.COMPLEX)
    return [others]
