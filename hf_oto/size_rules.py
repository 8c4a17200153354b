"""What torch's functions say of the sizes that they are given: a short function for each, and one table.

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

# Every rule takes `ref`, which gives the `Ref` of a tensor, then `out`, what the function returned, then the arguments
# of torch's function under torch's own names; the types of these are torch's, and not written down again.


def _shape(ref, out, sizes, first_dim=0) -> Pairs:
    """The sizes are those of `out`, from one dimension on; -1 stands for a size that torch finds out itself."""
    for dim, size in enumerate(sizes, first_dim):
        if isinstance(size, int) and size != -1:
            yield size, span(ref(out), dim)


def _ints(sizes: Sequence[Any]) -> Sequence[int]:
    """Sizes that may be passed one by one or in one sequence: view(2, 3) is view((2, 3))."""
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        return sizes[0]
    return sizes


def _view(ref, out, input, *sizes, shape=(), size=(), **_) -> Pairs:
    return _shape(ref, out, _ints(sizes) or shape or size)


def _made(ref, out, *sizes, **named) -> Pairs:
    """As `_view`, of functions that take no tensor."""
    return _view(ref, out, None, *sizes, **named)


def _full(ref, out, size, *_, **__) -> Pairs:
    return _shape(ref, out, size)


def _new_full(ref, out, input, size, *_, **__) -> Pairs:
    return _shape(ref, out, size)


def _unflatten(ref, out, input, dim, sizes) -> Pairs:
    return _shape(ref, out, sizes, dim % input.dim())


def _normalized(ref, out, input, normalized_shape, *_, **__) -> Pairs:
    """Norms over the last dimensions."""
    return _shape(ref, out, normalized_shape, -len(normalized_shape))


def _affine_grid(ref, out, theta, size, *_, **__) -> Pairs:
    """The size is (n, c, *spatial), of which the channels c decide nothing; the grid is (n, *spatial, 2 or 3)."""
    return _shape(ref, out, [size[0], *size[2:]])


def _repeat(ref, out, input, *sizes, repeats=(), dims=()) -> Pairs:
    counts = _ints(sizes) or repeats or dims
    # Dimensions are counted from the end, as the result may have more of them than the input.
    for dim, count in enumerate(reversed(counts), 1):
        repeated = span(ref(out), -dim)
        if dim <= input.dim():
            once = span(ref(input), -dim)
            yield count, ("//", repeated, once)
        else:
            yield count, repeated


def _repeat_interleave(ref, out, input, repeats, dim=None, **_) -> Pairs:
    if isinstance(repeats, int) and dim is not None:
        repeated = span(ref(out), dim)
        once = span(ref(input), dim)
        yield repeats, ("//", repeated, once)


def _split(ref, out, input, split_size_or_sections, dim=0) -> Pairs:
    for i, piece in enumerate(out):
        if isinstance(split_size_or_sections, int):
            size = split_size_or_sections
        else:
            size = split_size_or_sections[i]
        if piece.shape[dim] == size:  # the last piece may be smaller, and says nothing then
            yield size, span(ref(piece), dim)


def _chunk(ref, out, input, chunks, dim=0) -> Pairs:
    """The chunks stay equal, for the number of chunks is a constant."""
    count = ("const", len(out))
    one_chunk = span(ref(out[0]), dim)
    yield ("*", count, one_chunk), span(ref(input), dim)


def _slices(ref, out, input, index) -> Pairs:
    """The bounds of every slice in `input[index]`."""
    indices = index if isinstance(index, tuple) else (index,)
    consumed = [_consumed_dims(one) for one in indices]
    dim = 0  # of `input`, where the next index applies
    for one, count in zip(indices, consumed, strict=True):
        if isinstance(one, slice) and one.step in (None, 1):
            yield from _bounds(ref(input), dim, one.start, one.stop)
        # An ellipsis stands for all dimensions that the other indices leave.
        dim += input.dim() - sum(consumed) if one is ... else count


def _consumed_dims(index: Any) -> int:
    """How many dimensions one index of several applies to; an ellipsis counts as 0."""
    if index is None or index is ...:
        return 0
    if isinstance(index, torch.Tensor) and index.dtype == torch.bool:
        return index.dim()
    return 1


def _put_slices(ref, out, input, index, value) -> Pairs:
    return _slices(ref, out, input, index)


def _bounds(source: Ref, dim: int, start: int | None, stop: int | None) -> Pairs:
    """A bound inside a dimension is what a cut leaves before it; one from the end, what a cut leaves after it."""
    width = source.shape[dim]
    for bound in (start, stop):
        if not isinstance(bound, int):
            continue
        position = plain(bound)
        if 0 < position < width:
            yield bound, span(source, dim, 0, position)
        elif -width < position < 0:
            yield 0 - bound, span(source, dim, width + position, width)


def _narrow(ref, out, input, dim, start, length) -> Pairs:
    if isinstance(start, int):
        yield from _bounds(ref(input), dim % input.dim(), start, start + length)


def _groups(ref, out, input, weight, *more, groups=1, **_) -> Pairs:
    """input (b, groups * i, ...), weight (o, i, ...)"""
    channels = span(ref(input), input.dim() - weight.dim() + 1)
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
    channels_of_group = input.shape[1] // plain(num_groups)
    yield num_groups, ("//", channels, ("const", channels_of_group))


def _default_softmax_factor(ref, out, query, *_, scale=None, **__) -> Pairs:
    if scale is None:  # 1 / sqrt(head_dim) is then read off the query
        yield query.shape[-1], span(ref(query), -1)


def _all_heads(ref, out, query, *args, **named) -> Pairs:
    """Attention with all its projections in one function takes embed_dim // num_heads as head_dim, so all widths that
    this is computed from stay whole."""
    in_proj_weight = args[4]
    whole = [(query, -1), (in_proj_weight, 0)]
    for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        whole.append((named.get(name), 0))
    for tensor, dim in whole:
        if tensor is not None:
            yield tensor.shape[dim], span(ref(tensor), dim)


SIZE_RULES: dict[str, Callable[..., Pairs]] = {
    **dict.fromkeys(["view", "reshape", "expand", "broadcast_to", "new_zeros", "new_ones", "new_empty"], _view),
    **dict.fromkeys(["zeros", "ones", "empty", "rand", "randn"], _made),
    "full": _full,
    "new_full": _new_full,
    "unflatten": _unflatten,
    **dict.fromkeys(["layer_norm", "rms_norm", "_fused_rms_norm"], _normalized),
    "repeat": _repeat,
    "tile": _repeat,
    "repeat_interleave": _repeat_interleave,
    "split": _split,
    "split_with_sizes": _split,
    "chunk": _chunk,
    "narrow": _narrow,
    "__getitem__": _slices,
    "__setitem__": _put_slices,
    **dict.fromkeys(["conv1d", "conv2d", "conv3d"], _groups),
    **dict.fromkeys(["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"], _transposed_groups),
    "group_norm": _group_norm,
    "scaled_dot_product_attention": _default_softmax_factor,
    "multi_head_attention_forward": _all_heads,
    **dict.fromkeys(["affine_grid", "affine_grid_generator"], _affine_grid),
}
