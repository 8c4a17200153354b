"""What torch's functions say about the sizes that they are given: a short function for each, and one table.

Each rule gives pairs (a size as it was passed, the expression that it must equal); tagging.py makes equations of them.

Worked example: in `x.view(2, heads, 64)`, the rule of `view` says that `heads` equals the span of dimension 1 of the
result, that is, the number of positions that a cut leaves of that dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .sizes import Expr, Ref, plain, span

Pairs = Iterator[tuple[int | Expr, Expr]]  # (a size as passed, what it must equal)

# Every rule takes `ref` first, which gives the `Ref` of a tensor, and `out`, which the function returned. Then come
# the arguments of torch's function under torch's own names; their types are torch's, and not written down again.


def _shape(ref, out, sizes, first_dim=0) -> Pairs:
    """The sizes are those of `out`, from one dimension on; -1 stands for a size that torch finds out itself."""
    for dim, size in enumerate(sizes, first_dim):
        is_given = isinstance(size, int) and size != -1
        if is_given:
            yield size, span(ref(out), dim)


def _ints(sizes: Sequence[Any]) -> Sequence[int]:
    """Sizes that may be passed one by one or in one sequence: view(2, 3) is view((2, 3))."""
    if len(sizes) != 1:
        return sizes
    (only,) = sizes
    return only if isinstance(only, (tuple, list)) else sizes


def _view(ref, out, input, *sizes, shape=(), size=(), **_) -> Pairs:
    sizes = _ints(sizes) or shape or size
    return _shape(ref, out, sizes)


def _made(ref, out, *sizes, **named) -> Pairs:
    """As `_view`, for functions that take no tensor."""
    return _view(ref, out, None, *sizes, **named)


def _full(ref, out, size, *_, **__) -> Pairs:
    return _shape(ref, out, size)


def _new_full(ref, out, input, size, *_, **__) -> Pairs:
    return _shape(ref, out, size)


def _unflatten(ref, out, input, dim, sizes) -> Pairs:
    first_dim = dim % input.dim()
    return _shape(ref, out, sizes, first_dim)


def _normalized(ref, out, input, normalized_shape, *_, **__) -> Pairs:
    """Norms over the last dimensions."""
    first_dim = -len(normalized_shape)
    return _shape(ref, out, normalized_shape, first_dim)


def _affine_grid(ref, out, theta, size, *_, **__) -> Pairs:
    """The size is (n, c, *spatial), of which the channels c decide nothing; the grid is (n, *spatial, 2 or 3)."""
    batch, _, *spatial = size
    return _shape(ref, out, [batch, *spatial])


def _repeat(ref, out, input, *sizes, repeats=(), dims=()) -> Pairs:
    counts = _ints(sizes) or repeats or dims
    counts_from_the_end = reversed(counts)  # the result may have more dimensions in front than the input
    for dim, count in enumerate(counts_from_the_end, 1):
        repeated = span(ref(out), -dim)
        if dim <= input.dim():
            once = span(ref(input), -dim)
            yield count, ("//", repeated, once)
        else:
            yield count, repeated


def _repeat_interleave(ref, out, input, repeats, dim=None, **_) -> Pairs:
    is_by_number = isinstance(repeats, int)  # else the repeats of each position are the data of a tensor
    if is_by_number and dim is not None:
        repeated = span(ref(out), dim)
        once = span(ref(input), dim)
        yield repeats, ("//", repeated, once)


def _split(ref, out, input, split_size_or_sections, dim=0) -> Pairs:
    sizes = split_size_or_sections
    if isinstance(sizes, int):
        sizes = [sizes] * len(out)
    for size, piece in zip(sizes, out, strict=True):
        if piece.shape[dim] == size:  # the last piece may be smaller, and says nothing then
            yield size, span(ref(piece), dim)


def _chunk(ref, out, input, chunks, dim=0) -> Pairs:
    """The chunks stay equal, for the number of chunks is a constant."""
    count = ("const", len(out))
    one_chunk = span(ref(out[0]), dim)
    all_chunks = ("*", count, one_chunk)
    yield all_chunks, span(ref(input), dim)


def _slices(ref, out, input, index) -> Pairs:
    """The bounds of every slice in `input[index]`."""
    indices = index if isinstance(index, tuple) else (index,)
    num_consumed = sum(_consumed_dims(one) for one in indices)
    dim = 0  # of `input`, where the next index applies
    for one in indices:
        if _is_stretch(one):
            yield from _bounds(ref(input), dim, one.start, one.stop)
        if one is ...:  # it stands for all dimensions that the other indices leave
            dim += input.dim() - num_consumed
        else:
            dim += _consumed_dims(one)


def _is_stretch(index: Any) -> bool:
    """Whether an index is a slice of all positions between two bounds."""
    return isinstance(index, slice) and index.step in (None, 1)


def _consumed_dims(index: Any) -> int:
    """How many dimensions one index of several applies to; an ellipsis counts as 0."""
    if index is None or index is ...:
        return 0
    is_mask = isinstance(index, torch.Tensor) and index.dtype == torch.bool
    if is_mask:  # it covers as many dimensions as it has
        return index.dim()
    return 1


def _put_slices(ref, out, input, index, value) -> Pairs:
    return _slices(ref, out, input, index)


def _bounds(source: Ref, dim: int, start: int | None, stop: int | None) -> Pairs:
    """A bound counts the positions that a cut leaves before it; a bound from the end counts those left after it."""
    width = source.shape[dim]
    for bound in (start, stop):
        if not isinstance(bound, int):
            continue
        position = plain(bound)
        if 0 < position < width:
            yield bound, span(source, dim, 0, position)
        elif -width < position < 0:
            first_after = width + position
            yield 0 - bound, span(source, dim, first_after, width)


def _narrow(ref, out, input, dim, start, length) -> Pairs:
    if isinstance(start, int):
        dim %= input.dim()
        stop = start + length
        yield from _bounds(ref(input), dim, start, stop)


def _groups(ref, out, input, weight, *more, groups=1, **_) -> Pairs:
    """input (b, groups * i, ...), weight (o, i, ...)"""
    channels_dim = input.dim() - weight.dim() + 1  # 0 where the input has no batch
    channels = span(ref(input), channels_dim)
    channels_of_group = span(ref(weight), 1)
    if len(more) > 4:  # by position: bias, stride, padding, dilation, groups
        groups = more[4]
    yield groups, ("//", channels, channels_of_group)


def _transposed_groups(ref, out, input, *more, **named) -> Pairs:
    """out (b, groups * o, ...), weight (i, o, ...): as `_groups`, with the result in the place of the input"""
    return _groups(ref, input, out, *more, **named)


def _group_norm(ref, out, input, num_groups, *_, **__) -> Pairs:
    """Groups keep their width: a cut removes whole groups."""
    channels = span(ref(out), 1)
    num_plain = plain(num_groups)  # the division of a `Size` would leave an equation of its own
    channels_of_group = input.shape[1] // num_plain
    width = ("const", channels_of_group)
    yield num_groups, ("//", channels, width)


def _default_softmax_factor(ref, out, query, *_, scale=None, **__) -> Pairs:
    if scale is None:  # torch then takes 1 / sqrt(head_dim), with the query's last dimension as head_dim
        head_dim = query.shape[-1]
        yield head_dim, span(ref(query), -1)


def _all_heads(ref, out, query, *args, **named) -> Pairs:
    """Attention with all its projections in one function computes head_dim as embed_dim // num_heads, so every width
    that goes into this division stays whole."""
    in_proj_weight = args[4]
    dims_of_widths = [(query, -1), (in_proj_weight, 0)]
    for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        weight = named.get(name)
        dims_of_widths.append((weight, 0))
    for tensor, dim in dims_of_widths:
        if tensor is not None:
            width = tensor.shape[dim]
            yield width, span(ref(tensor), dim)


SIZE_RULES: dict[str, Callable[..., Pairs]] = {
    "view": _view,
    "reshape": _view,
    "expand": _view,
    "broadcast_to": _view,
    "new_zeros": _view,
    "new_ones": _view,
    "new_empty": _view,
    "zeros": _made,
    "ones": _made,
    "empty": _made,
    "rand": _made,
    "randn": _made,
    "full": _full,
    "new_full": _new_full,
    "unflatten": _unflatten,
    "layer_norm": _normalized,
    "rms_norm": _normalized,
    "_fused_rms_norm": _normalized,
    "repeat": _repeat,
    "tile": _repeat,
    "repeat_interleave": _repeat_interleave,
    "split": _split,
    "split_with_sizes": _split,
    "chunk": _chunk,
    "narrow": _narrow,
    "__getitem__": _slices,
    "__setitem__": _put_slices,
    "conv1d": _groups,
    "conv2d": _groups,
    "conv3d": _groups,
    "conv_transpose1d": _transposed_groups,
    "conv_transpose2d": _transposed_groups,
    "conv_transpose3d": _transposed_groups,
    "group_norm": _group_norm,
    "scaled_dot_product_attention": _default_softmax_factor,
    "multi_head_attention_forward": _all_heads,
    "affine_grid": _affine_grid,
    "affine_grid_generator": _affine_grid,
}
