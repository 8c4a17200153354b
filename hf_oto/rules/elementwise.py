"""Functions of single elements: operands broadcast against each other, and what is zero depends on the function.

Worked example: where channel 2 of x is removed, x[2] is zero. So x * y is zero there whatever y is (`either`), x + y
is zero if y is zero there as well (`both`), x / y is as x is (`first`), and exp(x) is not zero at all.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map_only

from .. import reasons
from ..sizes import Ref
from ..trace import Call
from .others import stay, unknown
from .state import Axes, Dims, ZeroRule, both, either, first, never, not_zero, rule

# functions of two operands that broadcast against each other; the result of a function that is not here isn't zero
NAMES_BY_ZEROS = {
    both: "add sub maximum minimum fmax fmin where lerp hypot logical_or bitwise_or complex",
    either: "mul logical_and bitwise_and linalg_cross",
    first: "div floor_divide remainder fmod copy polar _prelu_kernel rrelu_with_noise",
}
ZEROS: dict[str, ZeroRule] = {}  # ATen name -> where its result is zero
for _zero, _names in NAMES_BY_ZEROS.items():
    ZEROS |= dict.fromkeys(_names.split(), _zero)


@rule(
    *"_to_copy copy hardswish native_dropout alias detach lift_fresh lift contiguous rsub zeros_like".split(),
    *"ones_like full_like empty_like rand_like randn_like bernoulli fill zero _prelu_kernel".split(),
    *"rrelu_with_noise log_sigmoid_forward polar complex _conj floor_divide masked_fill normal".split(),
    *"uniform exponential geometric cauchy log_normal random poisson".split(),
)
def elementwise(s: Axes, call: Call) -> Dims:
    """... , ... -> ...: operands broadcast against each other; what is zero depends on the function"""
    refs = call.refs
    zero = ZEROS.get(call.name, never)
    is_where = call.name == "where"
    if is_where:  # the condition goes to the end, as it decides nothing about zeros
        condition, *choices = refs
        refs = [*choices, condition]
    if call.name == "copy":  # the result holds what is copied, not what was there
        refs = refs[::-1]
    if call.name == "masked_fill" and call.args[2] == 0:
        zero = first
    if call.name == "div":
        _pin_zeros_of_divisor(s, call.args[1])

    x, *operands = refs
    out_ndim = len(call.outs[0].shape)
    result = s.of(x, out_ndim)
    if operands:
        s.produce(x)
    elif not _keeps_zero(call):
        result = not_zero(result)
    for i, ref in enumerate(operands, 1):
        is_condition = is_where and i == 2
        result = s.join(result, ref, first if is_condition else zero)
    return [result] * len(call.outs)


def _pin_zeros_of_divisor(s: Axes, divisor: Any) -> None:
    """Zeros would be divided by zeros where positions are removed; a divisor that is a number has none."""
    if isinstance(divisor, Ref):
        for dim in s.of(divisor):
            s.pin_where(dim, reasons.DIVISOR, zero=True)


def _keeps_zero(call: Call) -> bool:
    """Whether f(0) = 0 for a function f of one tensor, found by calling it."""
    # one call of a random function shows nothing, and neither does memory that was never written
    if call.name == "native_dropout":
        return True
    is_random = torch.Tag.nondeterministic_seeded in call.op.tags
    if is_random or call.name == "empty_like":
        return False
    kwargs = dict(call.kwargs)
    kwargs.pop("device", None)  # the zeros lie on the CPU
    for dtype in (torch.float32, torch.int64, torch.complex64):  # some functions take only one of them
        zeros = {}
        for ref in call.refs:
            shape = [1] * len(ref.shape)
            zeros[ref] = torch.zeros(shape, dtype=dtype)
        args_with_zeros, kwargs_with_zeros = tree_map_only(Ref, zeros.get, (call.args, kwargs))
        with contextlib.suppress(Exception):
            result = call.op(*args_with_zeros, **kwargs_with_zeros)
            return not result.any()
    return False


@rule("linalg_cross")
def cross(s: Axes, call: Call) -> Dims:
    """... 3, ... 3 -> ... 3"""
    d = call.given["dim"]
    why = reasons.ALONG.of("a cross product")
    for ref in call.refs:
        dims = s.of(ref)
        s.pin(dims[d], why)
    return elementwise(s, call)


@rule("tril", "triu")
def triangle(s: Axes, call: Call) -> Dims:
    """zeros above or below the diagonal of a matrix: they stay in their places if rows and columns go together"""
    *batch, rows, columns = s.of(call.args[0])
    go_together = len(rows) == len(columns)
    for row_leaf, column_leaf in zip(rows, columns, strict=False):
        has_same_ids = np.array_equal(row_leaf.ids, column_leaf.ids)
        go_together = go_together and has_same_ids
    starts_at_the_diagonal = call.given["diagonal"] == 0
    if not (go_together and starts_at_the_diagonal):
        s.pin(rows, reasons.TRIANGLE)
        s.pin(columns, reasons.TRIANGLE)
    return [[*batch, rows, columns]]


@rule(
    *"fake_quantize_per_tensor_affine_cachemask fake_quantize_per_channel_affine_cachemask".split(),
    *"_fake_quantize_per_tensor_affine_cachemask_tensor_qparams".split(),
    *"_fake_quantize_learnable_per_tensor_affine".split(),
)
def fake_quantize(s: Axes, call: Call) -> Dims:
    """rounded to a grid that zero is a point of (observers see to that where the zero point is a tensor); functions of
    channels round each position of an axis to a grid of its own"""
    x, grid_step, zero_point = call.args[:3]
    given = call.given
    dims = s.of(x)
    if "axis" in given:
        d = given["axis"]
        for ref in (grid_step, zero_point):
            (dims[d],) = s.join([dims[d]], ref, first)
    elif isinstance(zero_point, int):
        has_zero = given["quant_min"] <= zero_point <= given["quant_max"]
        if not has_zero:
            dims = not_zero(dims)
    _, *masks = stay(s, call)
    return [dims, *masks]


@rule("mse_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "soft_margin_loss")
def loss(s: Axes, call: Call) -> Dims:
    """elementwise if nothing is reduced; a reduced loss is a number that one more zero would change"""
    is_reduced = call.given["reduction"] != 0
    has_weights = len(call.refs) != 2  # beside the prediction and the target
    if is_reduced or has_weights:
        return unknown(s, call)
    return elementwise(s, call)
