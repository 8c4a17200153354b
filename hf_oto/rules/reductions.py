"""Norms, reductions, and functions that run along a dimension or over the image plane.

Worked example: of 16 channels 4 are removed, and these are zero. Their sum and their norm are those of the other 12,
so a sum or norm leaves the axis free. A mean divides by 12 in the place of 16, and scales.py makes up for this. A
maximum may be one of the zeros, so a maximum pins.
"""

from __future__ import annotations

from .. import reasons
from ..axes import Dim, Mark, with_zero
from ..sizes import Ref
from ..trace import Call
from .others import stay
from .state import Axes, Dims, either, first, not_zero, rule


@rule("native_layer_norm")
def layer_norm(s: Axes, call: Call) -> Dims:
    """normalised over the last dimensions: a cut would change their mean and variance"""
    x, shape, weight, bias = call.args[:4]
    others, normed = _split_dims(s.of(x), len(shape))
    for dim in normed:
        s.pin(dim, reasons.LAYER_NORM)
    normed = s.join(normed, weight)
    normed = s.join(normed, bias)
    others = not_zero(others)  # a row of zeros becomes the bias
    result = [*others, *normed]
    _, *statistics = stay(s, call)
    return [result, *statistics]


def _split_dims(dims: list[Dim], num_last: int) -> tuple[list[Dim], list[Dim]]:
    """The first dimensions and the last ones, at least one."""
    return dims[:-num_last], dims[-num_last:]


@rule("_fused_rms_norm")
def rms_norm(s: Axes, call: Call) -> Dims:
    """divided by the root of an average over the last dimensions; scales.py makes up for the number of positions"""
    x, shape, weight = call.args[:3]
    others, normed = _split_dims(s.of(x), len(shape))
    for dim in normed:
        s.pin_where(dim, reasons.AVERAGE, zero=False)
    scaled = s.join(normed, weight, either)
    result = [*others, *scaled]
    _, *roots = stay(s, call)
    return [result, *roots]


@rule(
    *"native_batch_norm _native_batch_norm_legit_no_training _native_batch_norm_legit".split(),
    *"cudnn_batch_norm miopen_batch_norm _batch_norm_no_update _batch_norm_with_update".split(),
)
def batch_norm(s: Axes, call: Call) -> Dims:
    """b c x: each channel by its own statistics"""
    x, *vectors = call.args[:5]
    batch, channels, *space = s.of(x)
    for dim in (batch, *space):
        s.pin(dim, reasons.BATCH_NORM)
    channels = _affine(s, channels, *vectors)
    result = [batch, channels, *space]
    _, *statistics = stay(s, call)
    return [result, *statistics]


@rule("native_group_norm")
def group_norm(s: Axes, call: Call) -> Dims:
    """b (g c) x: each group by its own statistics, so that only whole groups may go"""
    x, weight, bias, _, channels, _, groups, _ = call.args
    batch, dim, *space = s.of(x)
    channels_of_group = channels // groups
    outer, inner = s.factors(dim, groups, channels_of_group)
    s.pin(inner, reasons.GROUP_NORM)  # a group's statistics run over all its channels
    s.algebra.mark(outer, Mark.GROUPS)
    dim = _affine(s, (*outer, *inner), weight, bias)
    result = [batch, dim, *space]
    _, *statistics = stay(s, call)
    return [result, *statistics]


def _affine(s: Axes, channels: Dim, weight: Ref | None, bias: Ref | None, *statistics: Ref | None) -> Dim:
    """Channels times weight plus bias: a zero weight and bias silence a channel, whatever was normalised."""
    has_weight = weight is not None  # without one, what was normalised stays whatever the bias is
    channels = with_zero(channels, has_weight)
    for vector in (weight, bias, *statistics):
        (channels,) = s.join([channels], vector, first)
    return channels


@rule("_weight_norm_interface")
def weight_norm(s: Axes, call: Call) -> Dims:
    """v g / |v|, the norm over all dimensions but one. Along that one a zero g silences, and a zero v gives 0 / 0.
    A parameter that reads along the others has to be zero, so that the norm stays."""
    v, g, d = call.given.values()
    dims = s.of(v)
    d %= len(dims)
    for k, dim in enumerate(dims):
        marks = Mark.FOLLOWER if k == d else Mark.NORMED | Mark.NOT_ZERO
        s.algebra.mark(dim, marks)
    dims_of_g = s.of(g)
    dims[d] = s.unify(dims_of_g[d], dims[d], first)
    _, *norms = stay(s, call)
    return [dims, *norms]


def reduced_dims(call: Call) -> set[int]:
    """The dimensions that a reduction runs over."""
    ndim = len(call.args[0].shape)
    if ndim == 0:
        return set()
    given = call.given.get("dim")  # one dimension, a list of them, or for all of them None or an empty list
    if isinstance(given, int):
        return {given % ndim}
    if not given:
        return set(range(ndim))
    return {d % ndim for d in given}


SUMS = ("sum", "nansum")
NORMS = ("linalg_vector_norm", "norm")
AVERAGES = ("mean", "var", "std", "var_mean", "std_mean")
REASON_OF_REDUCTION = {
    **dict.fromkeys(SUMS, reasons.SUM),
    **dict.fromkeys(NORMS, reasons.NORM),
    **dict.fromkeys(AVERAGES, reasons.AVERAGE),
}


@rule(
    *"sum nansum linalg_vector_norm norm mean var std var_mean std_mean amax amin max min prod all".split(),
    *"any argmax argmin logsumexp median nanmedian kthvalue mode".split(),
)
def reduction(s: Axes, call: Call) -> Dims:
    """over some dimensions, where zeros leave a sum or norm alone; they change only the number of positions of an
    average, and scales.py makes up for that"""
    ref = call.args[0]
    is_total = _is_total(call)
    if is_total:
        s.produce(ref)
    # scales.py scales parameters; it can't scale the average of the parameters themselves
    is_scaled_mean = call.name == "mean" and not s.weight(ref)
    zeros_may_go = is_total or is_scaled_mean
    taken = reasons.TAKEN.of(call.name)
    why = REASON_OF_REDUCTION.get(call.name, taken)

    dims = s.of(ref)
    reduced = reduced_dims(call)
    for d in reduced:
        s.pin_where(dims[d], why, zero=False)
        if not zeros_may_go:
            s.pin(dims[d], why)
    out_ndim = len(call.outs[0].shape)
    keeps_dims = out_ndim == len(dims)
    result = []
    for d, dim in enumerate(dims):
        if d not in reduced:
            result.append(dim)
        elif keeps_dims:
            result.append(())

    if call.name in ("logsumexp", "argmax", "argmin"):  # of zeros it is not zero
        result = not_zero(result)
    if len(call.outs) == 1:
        return [result]
    # the second result is a mean, or else the place of a maximum
    second = result if "mean" in call.name else not_zero(result)
    return [result, second]


def _is_total(call: Call) -> bool:
    """Whether the reduction adds up: a zero more changes nothing."""
    if call.name in SUMS:
        return True
    if call.name not in NORMS:
        return False
    given = call.given
    power = given.get("ord", given.get("p"))
    return power is None or power >= 0  # a norm of negative power with a zero in it is 0


@rule(
    *"_softmax _log_softmax _safe_softmax cumsum cumprod topk sort logcumsumexp cummax cummin".split(),
    *"_fft_c2c _fft_r2c _fft_c2r".split(),
)
def along(s: Axes, call: Call) -> Dims:
    """normalised, ordered, accumulated or transformed along some dimensions, which stay"""
    dims = s.of(call.args[0])
    given = call.given["dim"]
    if isinstance(given, int):
        given = [given]
    name = call.name.strip("_")
    why = reasons.ALONG.of(name)
    shape = call.outs[0].shape
    for d in given:
        s.pin(dims[d], why)
        dims[d] = s.algebra.fixed(shape[d])
    if "softmax" in name or name == "logcumsumexp":  # of zeros it is not zero
        dims = not_zero(dims)
    if len(call.outs) == 1:
        return [dims]
    places = not_zero(dims)  # where each value of the first result was
    return [dims, places]


@rule(
    *"max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d".split(),
    *"avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_max_pool2d".split(),
    *"adaptive_max_pool3d max_unpool2d max_unpool3d upsample_nearest1d upsample_nearest2d".split(),
    *"upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d".split(),
    *"_upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d".split(),
    *"upsample_bicubic2d _upsample_bicubic2d_aa _upsample_bilinear2d_aa grid_sampler_2d".split(),
    *"grid_sampler_3d reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d".split(),
    *"replication_pad2d replication_pad3d".split(),
)
def spatial(s: Axes, call: Call) -> Dims:
    """b c x -> b c y: pooling and resizing within the image plane; unpooling puts values where the maxima were"""
    ndim = next(n for n in (1, 2, 3) if f"{n}d" in call.name)  # of the image plane
    dims = s.of(call.args[0])
    others, plane = _split_dims(dims, ndim)
    for dim in plane:
        s.pin(dim, reasons.NEIGHBOURS)
    if "unpool" in call.name:
        dims_of_places = s.of(call.args[1])
        others_of_places, _ = _split_dims(dims_of_places, ndim)
        others = s.unify_all(others, others_of_places, first)
    if "grid" in call.name:
        _, *grid = s.of(call.args[1])  # (batch, *image plane, coordinates)
        for dim in grid:
            s.pin(dim, reasons.INDEX)
    new_plane = s.fixed(call.outs[0].shape[-ndim:])
    result = [*others, *new_plane]
    if len(call.outs) == 1:
        return [result]
    places = [*not_zero(others), *new_plane]  # of each maximum of a pooling
    return [result, places]
