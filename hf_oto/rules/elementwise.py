"""Functions of single elements: operands broadcast against each other, and what is zero depends on the function.

Worked example: where channel 2 of x is removed, x[2] is zero. So x * y is zero there whatever y is (`either`), x + y
is zero if y is zero there as well (`both`), x / y is as x is (`first`), and exp(x) is not zero at all.
"""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from torch.utils._pytree import tree_map_only

from .. import reasons
from ..sizes import Ref
from ..trace import Call
from .others import stay, unknown
from .state import Axes, Dims, both, either, first, not_zero, rule

# functions of two operands that broadcast against each other; of a function that is not here, the result isn't zero
ZEROS = {
    **dict.fromkeys("add sub maximum minimum fmax fmin where lerp hypot logical_or bitwise_or complex".split(), both),
    **dict.fromkeys("mul logical_and bitwise_and linalg_cross".split(), either),
    **dict.fromkeys("div floor_divide remainder fmod copy polar _prelu_kernel rrelu_with_noise".split(), first),
}


def _never(a: bool, b: bool) -> bool:
    return False


@rule(
    *"_to_copy copy hardswish native_dropout alias detach lift_fresh lift contiguous rsub zeros_like".split(),
    *"ones_like full_like empty_like rand_like randn_like bernoulli fill zero _prelu_kernel".split(),
    *"rrelu_with_noise log_sigmoid_forward polar complex _conj floor_divide masked_fill normal".split(),
    *"uniform exponential geometric cauchy log_normal random poisson".split(),
)
def elementwise(s: Axes, call: Call) -> Dims:
    """... , ... -> ...: operands broadcast against each other; what is zero depends on the function"""
    refs = call.refs
    zero = ZEROS.get(call.name, _never)
    if call.name == "where":  # the condition comes last: it decides nothing about zeros
        refs = refs[1:] + refs[:1]
    if call.name == "copy":  # the result holds what is copied, not what was there
        refs = refs[::-1]
    if call.name == "masked_fill" and call.args[2] == 0:
        zero = first
    if call.name == "div" and isinstance(call.args[1], Ref):
        for dim in s.of(call.args[1]):
            for leaf in dim:
                if leaf.zero:
                    s.pin((leaf,), reasons.DIVISOR)
    result = s.of(refs[0], len(call.outs[0].shape))
    if len(refs) == 1:
        result = result if _keeps_zero(call) else not_zero(result)
    else:
        s.produce(refs[0])
    for i, ref in enumerate(refs[1:], 1):
        is_condition = call.name == "where" and i == 2
        result = s.join(result, ref, first if is_condition else zero)
    return [result] * len(call.outs)


def _keeps_zero(call: Call) -> bool:
    """Whether f(0) = 0 for a function f of one tensor, found by calling it."""
    if torch.Tag.nondeterministic_seeded in call.op.tags or call.name == "empty_like":
        return call.name == "native_dropout"
    kwargs = {name: value for name, value in call.kwargs.items() if name != "device"}
    for dtype in (torch.float32, torch.int64, torch.complex64):  # some functions take only one of them
        zeros = {ref: torch.zeros([1] * len(ref.shape), dtype=dtype) for ref in call.refs}
        args_with_zeros, kwargs_with_zeros = tree_map_only(Ref, zeros.get, (call.args, kwargs))
        with contextlib.suppress(Exception):
            return not call.op(*args_with_zeros, **kwargs_with_zeros).any()
    return False


@rule("linalg_cross")
def cross(s: Axes, call: Call) -> Dims:
    """... 3, ... 3 -> ... 3"""
    for ref in call.refs:
        s.pin(s.of(ref)[call.given["dim"]], reasons.ALONG.of("a cross product"))
    return elementwise(s, call)


@rule("tril", "triu")
def triangle(s: Axes, call: Call) -> Dims:
    """zeros above or below the diagonal of a matrix, which stay there if its rows and columns go together"""
    *batch, rows, columns = s.of(call.args[0])
    go_together = len(rows) == len(columns)
    for row_leaf, column_leaf in zip(rows, columns, strict=False):
        go_together = go_together and np.array_equal(row_leaf.ids, column_leaf.ids)
    if not (go_together and call.given["diagonal"] == 0):
        s.pin(rows, reasons.TRIANGLE)
        s.pin(columns, reasons.TRIANGLE)
    return [[*batch, rows, columns]]


@rule(
    *"fake_quantize_per_tensor_affine_cachemask fake_quantize_per_channel_affine_cachemask".split(),
    *"_fake_quantize_per_tensor_affine_cachemask_tensor_qparams".split(),
    *"_fake_quantize_learnable_per_tensor_affine".split(),
)
def fake_quantize(s: Axes, call: Call) -> Dims:
    """rounded to a grid that zero is a point of (observers see to that for zero points that are tensors); `channel`:
    each position of an axis to a grid of its own"""
    x, grid_step, zero_point = call.args[:3]
    given = call.given
    dims = s.of(x)
    if "axis" in given:
        d = given["axis"]
        for ref in (grid_step, zero_point):
            (dims[d],) = s.join([dims[d]], ref, first)
    elif isinstance(zero_point, int) and not given["quant_min"] <= zero_point <= given["quant_max"]:
        dims = not_zero(dims)
    return [dims, *stay(s, call)[1:]]


@rule("mse_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "soft_margin_loss")
def loss(s: Axes, call: Call) -> Dims:
    """elementwise where nothing is reduced, else a number that a zero more would change"""
    is_reduced = call.given["reduction"] != 0
    if is_reduced or len(call.refs) != 2:
        return unknown(s, call)
    return elementwise(s, call)
