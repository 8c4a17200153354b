"""How far the outputs of a cut model are from those of the dense one, on batches.

Worked example: of two examples a model returns 3 and 5, the cut one 3 and 4. The mean square of the differences is
1/2. Between the examples the model's outputs differ by a variance of 1, so the error is 1/2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import Rows
from .calls import Forward, tensors_of
from .evaluating import evaluating, seed_everything
from .modeling_oto import OTOError


def output_error(dense: nn.Module, small: nn.Module, forwards: Sequence[Forward]) -> float | None:
    """The mean squared difference of the outputs, as a fraction of what the dense model's differ by between examples.

    It is that of the logits, or of the first output where there are none. What all examples have in common (that one
    class is rare, say) is no part of the variance, as a model that ignores its inputs could return it.

    Returns:
        the fraction, infinity where the cut model returns no number and the dense one does; None if the models return
        nothing that can be compared (a loss alone, say).

    Raises:
        OTOError: the dense model returns no finite number.
    """
    squares = variance = 0.0
    num_compared = 0
    for forward in forwards:
        wanted = _compared(dense, forward)
        found = _compared(small, forward)
        if wanted is None or found is None or wanted.shape != found.shape:
            continue
        is_finite = wanted.isfinite()
        if not is_finite.any():
            raise OTOError(
                f"the outputs of {type(dense).__name__} are not finite numbers (NaN or infinity) on a batch"
            )
        # logits that are minus infinity stay so
        difference = (found - wanted)[is_finite].nan_to_num(nan=torch.inf)
        deviation = _deviations(wanted, is_finite)[is_finite]
        squares += float(difference.square().sum())
        variance += float(deviation.square().sum())
        num_compared += 1
    return squares / max(variance, 1e-30) if num_compared else None


def _compared(model: nn.Module, forward: Forward) -> Tensor | None:
    """What is compared of the outputs of a model, (examples, ...), in float32."""
    with evaluating(model):
        seed_everything()
        output = forward.run(model)
    logits = Rows(forward).of_classes(output)
    if logits is not None:
        return logits
    return _first_tensor(output)


def _first_tensor(output: Any) -> Tensor | None:
    for tensor in tensors_of(output):
        if tensor.is_floating_point() and tensor.numel() > 1:
            return tensor.float()
    return None


def _deviations(values: Tensor, is_finite: Tensor) -> Tensor:
    """How far values are from the mean of the examples, or from that of all values where there is one example."""
    dims = (0,) if len(values) > 1 else tuple(range(values.dim()))
    finite = torch.where(is_finite, values, 0.0)
    mean = finite.sum(dims, keepdim=True) / is_finite.sum(dims, keepdim=True).clamp_min(1)
    return values - mean
