"""Short self-distillation: the weights of a cut model learn to return what the dense model does, without labels.

Each step takes one batch, in eval mode. Logits are compared by the KL divergence, other outputs by the squares of
their differences, as a fraction of their size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import Rows
from .calls import Forward, tensors_of
from .divergence import divergence
from .evaluating import evaluating

LEARNING_RATE = 3e-4


def reconstruct_(
    small: nn.Module, dense: nn.Module, forwards: Sequence[Forward], steps: int, told: Callable[[int], None]
) -> None:
    """Trains all weights of the cut model, in place.

    Args:
        small: the cut model, in eval mode; all its tensors are its own.
        dense: the model that it imitates.
        forwards: the batches, taken in turn.
        told: is called with 1 after each step.
    """
    weights = [weight for weight in small.parameters() if weight.is_floating_point()]
    asked_before = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / steps, steps)
        for step in range(steps):
            forward = forwards[step % len(forwards)]
            with evaluating(dense):
                wanted = forward.run(dense)
            with torch.enable_grad():
                loss = _difference(forward.run(small), wanted, Rows(forward))
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            decay.step()
            told(1)
    finally:
        for weight, asked in zip(weights, asked_before, strict=True):
            weight.requires_grad_(asked)
            weight.grad = None


def _difference(output: Any, wanted: Any, rows: Rows) -> Tensor:
    """How far an output is from the wanted one."""
    logits, wanted_logits = rows.of_classes(output), rows.of_classes(wanted)
    if logits is not None and wanted_logits is not None:
        return divergence(logits, wanted_logits, temperature=1.0).mean()
    total = torch.zeros(())
    for tensor, target in zip(tensors_of(output), tensors_of(wanted), strict=True):
        if tensor.is_floating_point() and tensor.requires_grad and tensor.shape == target.shape:
            size = target.float().square().mean().clamp_min(1e-30)
            total = total.to(tensor.device) + (tensor.float() - target.float()).square().mean() / size
    return total
