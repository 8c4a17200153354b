"""New tensors, and functions that allow no cut of their operands, with the reasons.

A function that no rule describes is `unknown`: all dimensions of its operands and of its results are pinned.
"""

from __future__ import annotations

from .. import reasons
from ..trace import Call
from .state import RULES, Axes, Dims, rule


@rule(
    *"zeros ones full empty new_zeros new_ones new_full new_empty scalar_tensor rand randn".split(),
    *"empty_strided new_empty_strided".split(),
)
def fill(s: Axes, call: Call) -> Dims:
    """a new tensor that is the same everywhere: each of its axes may be cut with any axis that it meets"""
    return [[s.new(n) for n in out.shape] for out in call.outs]


@rule("arange", "linspace", "eye", "tril_indices", "triu_indices", "randint", "randperm")
def stay(s: Axes, call: Call) -> Dims:
    """a new tensor whose values are positions, or whose values nobody knows"""
    return [s.fixed(out.shape) for out in call.outs]


def unknown(s: Axes, call: Call) -> Dims:
    """no rule, or none that would leave an axis free: nothing that takes part may be cut"""
    # the reader knows `_ctc_loss` as ctc_loss
    name = call.name.strip("_")
    reason = REASON_OF_NAME.get(call.name, reasons.NO_RULE)
    why = reason.of(name)
    for ref in call.refs:
        s.produce(ref)
        for dim in s.of(ref):
            s.pin(dim, why)
    return stay(s, call)


# the ATen names of functions that allow no cut of their operands, by the reason
NAMES_BY_REASON = {
    reasons.NUMBERED: """put take bucketize searchsorted nonzero masked_select masked_scatter one_hot histc unique_dim
        _unique2 _local_scalar_dense""",
    reasons.FIXED: "constant_pad_nd diagonal diag_embed",
    reasons.BY_NUMBER: "flex_attention",
    reasons.MIXED: """linalg_inv_ex linalg_matrix_exp linalg_qr linalg_householder_product linalg_cholesky_ex
        _linalg_svd _linalg_eigh _linalg_det _linalg_slogdet _linalg_solve_ex linalg_eig linalg_lstsq linalg_lu
        linalg_lu_factor_ex linalg_lu_solve linalg_solve_triangular linalg_ldl_factor_ex geqrf ormqr cholesky
        cholesky_solve cholesky_inverse linalg_pinv trace roll renorm _pdist_forward""",
    reasons.MEMORY: "as_strided resize resize_as set",
    reasons.OBSERVED: "aminmax _fused_moving_avg_obs_fq_helper",
    reasons.RANDOM: "fractional_max_pool2d fractional_max_pool3d multinomial",
    reasons.LOSS: """nll_loss_forward nll_loss2d_forward mse_loss smooth_l1_loss huber_loss binary_cross_entropy
        soft_margin_loss multi_margin_loss multilabel_margin_loss_forward _ctc_loss""",
    reasons.FUSED: "_cudnn_rnn miopen_rnn _thnn_fused_lstm_cell _thnn_fused_gru_cell",
}
REASON_OF_NAME = {}
for _why, _names in NAMES_BY_REASON.items():
    REASON_OF_NAME |= dict.fromkeys(_names.split(), _why)
# some of these have a rule of their own, which falls back on `unknown` for the cases that it doesn't cover
for _name in REASON_OF_NAME:
    RULES.setdefault(_name, unknown)
