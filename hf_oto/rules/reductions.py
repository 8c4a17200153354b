"""Norms, reductions, and functions that run along a dimension or over the image plane.

Worked example: of 16 channels 4 are removed, and these are zero. Their sum and their norm are those of the other 12,
so a sum or norm leaves the axis free. A mean divides by 12 in the place of 16, which scales.py makes up for. A
maximum may be one of the zeros, so it pins.
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
    """normalised over the last dimensions: their mean and variance would change"""
    x, shape, weight, bias = call.args[:4]
    dims = s.of(x)
    others, normed = dims[: -len(shape)], dims[-len(shape) :]
    for dim in normed:
        s.pin(dim, reasons.LAYER_NORM)
    normed = s.join(s.join(normed, weight), bias)
    return [[*not_zero(others), *normed], *stay(s, call)[1:]]


@rule("_fused_rms_norm")
def rms_norm(s: Axes, call: Call) -> Dims:
    """divided by the root of an average over the last dimensions; scales.py sees to the number of positions"""
    x, shape, weight = call.args[:3]
    dims = s.of(x)
    others, normed = dims[: -len(shape)], dims[-len(shape) :]
    for dim in normed:
        for leaf in dim:
            if not leaf.zero:
                s.pin((leaf,), reasons.AVERAGE)
    return [[*others, *s.join(normed, weight, either)], *stay(s, call)[1:]]


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
    return [[batch, _affine(s, channels, *vectors), *space], *stay(s, call)[1:]]


@rule("native_group_norm")
def group_norm(s: Axes, call: Call) -> Dims:
    """b (g c) x: each group by its own statistics, so that whole groups go"""
    x, weight, bias, _, channels, _, groups, _ = call.args
    batch, dim, *space = s.of(x)
    outer, inner = s.algebra.reshape([dim], [groups, channels // groups])
    s.pin(inner, reasons.GROUP_NORM)
    s.algebra.mark(outer, Mark.GROUPS)
    return [[batch, _affine(s, (*outer, *inner), weight, bias), *space], *stay(s, call)[1:]]


def _affine(s: Axes, channels: Dim, weight: Ref | None, bias: Ref | None, *statistics: Ref | None) -> Dim:
    """Channels times weight plus bias: a zero weight and bias silence a channel, whatever was normalised."""
    channels = with_zero(channels, weight is not None)
    for vector in (weight, bias, *statistics):
        (channels,) = s.join([channels], vector, first)
    return channels


@rule("_weight_norm_interface")
def weight_norm(s: Axes, call: Call) -> Dims:
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
    ndim = len(call.args[0].shape)
    if ndim == 0:
        return set()
    given = call.given.get("dim")  # one dimension, a list of them, or for all of them None or an empty list
    dims = [given] if isinstance(given, int) else given or range(ndim)
    return {d % ndim for d in dims}


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
    """over some dimensions, where zeros leave a sum or norm alone; of an average they change only the number of
    positions, and scales.py sees to that"""
    ref = call.args[0]
    reduced = reduced_dims(call)
    power = call.given.get("ord", call.given.get("p"))
    is_total = call.name in SUMS or (call.name in NORMS and (power is None or power >= 0))
    if is_total:
        s.produce(ref)
    # scales.py scales parameters, not what an average over the parameters themselves gives
    zeros_may_go = is_total or (call.name == "mean" and not s.weight(ref))
    why = REASON_OF_REDUCTION.get(call.name, reasons.TAKEN.of(call.name))
    dims = s.of(ref)
    for d in reduced:
        for leaf in dims[d]:
            if not (leaf.zero and zeros_may_go):
                s.pin((leaf,), why)

    keeps_dims = len(call.outs[0].shape) == len(dims)
    if keeps_dims:
        result = [() if d in reduced else dim for d, dim in enumerate(dims)]
    else:
        result = [dim for d, dim in enumerate(dims) if d not in reduced]
    if call.name in ("logsumexp", "argmax", "argmin"):  # of zeros it is not zero
        result = not_zero(result)
    # the second result is a mean, or else the place of a maximum
    second = result if "mean" in call.name else not_zero(result)
    return [result, *[second for _ in call.outs[1:]]]


@rule(
    *"_softmax _log_softmax _safe_softmax cumsum cumprod topk sort logcumsumexp cummax cummin".split(),
    *"_fft_c2c _fft_r2c _fft_c2r".split(),
)
def along(s: Axes, call: Call) -> Dims:
    """normalised, ordered, accumulated or transformed along some dimensions, which stay"""
    dims = s.of(call.args[0])
    given = call.given["dim"]
    for d in [given] if isinstance(given, int) else given:
        s.pin(dims[d], reasons.ALONG.of(call.name.strip("_")))
        dims[d] = s.algebra.fixed(call.outs[0].shape[d])
    if "softmax" in call.name or call.name == "logcumsumexp":  # of zeros it is not zero
        dims = not_zero(dims)
    return [dims, *[not_zero(dims)] * (len(call.outs) - 1)]


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
    """b c x -> b c y: pooling and resizing within the image plane, and back by the places that a maximum came from"""
    ndim = next(n for n in (1, 2, 3) if f"{n}d" in call.name)  # of the image plane
    dims = s.of(call.args[0])
    others = dims[:-ndim]
    for dim in dims[-ndim:]:
        s.pin(dim, reasons.NEIGHBOURS)
    if "unpool" in call.name:
        places = s.of(call.args[1])
        others = [s.unify(a, b, first) for a, b in zip(others, places[:-ndim], strict=True)]
    if "grid" in call.name:
        for dim in s.of(call.args[1])[1:]:
            s.pin(dim, reasons.INDEX)
    result = []
    for i, out in enumerate(call.outs):
        is_place = i > 0  # the second result of a pooling says where each maximum came from
        result.append([*(not_zero(others) if is_place else others), *s.fixed(out.shape[-ndim:])])
    return result
