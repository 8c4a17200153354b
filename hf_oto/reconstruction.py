"""Short self-distillation: the weights of a cut model learn to return what the dense model does, without labels.

Each step takes one batch, in eval mode. Logits are compared by the KL divergence, other outputs by the squares of
their differences, as a fraction of their size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import Rows
from .calls import Forward, tensors_of
from .divergence import divergence
from .evaluating import evaluating

logger = logging.getLogger(__name__)

LEARNING_RATE = 3e-4
WARM_UP = 0.1  # the fraction of the steps in which the learning rate grows; then it falls to zero
BATCHES_COMPARED = 8  # before and after, to see whether it helps


def reconstruct_(
    small: nn.Module, dense: nn.Module, forwards: Sequence[Forward], steps: int, advance: Callable[[int], None]
) -> None:
    """Trains all weights of the cut model, in place. If they get no nearer to the dense model, they stay as they were.

    Args:
        small: the cut model, in eval mode; all its tensors are its own.
        dense: the model that it imitates.
        forwards: the batches, taken in turn.
        advance: is called with 1 after each step.
    """
    imitation = _Imitation(small, dense)
    compared = forwards[:BATCHES_COMPARED]
    before = imitation.distance(compared)
    imitation.train_(forwards, steps, advance)
    after = imitation.distance(compared)
    if not after < before:
        logger.warning(
            "reconstruction is undone, because it brought the outputs no nearer to the dense model's: %.3g -> %.3g",
            before, after,
        )  # fmt: skip
        imitation.undo_()


class _Imitation:
    """A model that learns from another one."""

    def __init__(self, small: nn.Module, dense: nn.Module) -> None:
        self._small = small
        self._dense = dense
        weights = [weight for weight in small.parameters() if weight.is_floating_point()]
        # frozen weights stay, unless all are frozen, as those of a model that is only served may be
        self._weights = [weight for weight in weights if weight.requires_grad] or weights
        self._before = [weight.detach().clone() for weight in self._weights]

    def _loss(self, forward: Forward) -> Tensor:
        with evaluating(self._dense):
            wanted = forward.run(self._dense)
        output = forward.run(self._small)
        return _difference(output, wanted, Rows(forward))

    @torch.no_grad()
    def distance(self, forwards: Sequence[Forward]) -> float:
        """The mean loss of some batches."""
        return sum(float(self._loss(forward)) for forward in forwards) / len(forwards)

    def train_(self, forwards: Sequence[Forward], steps: int, advance: Callable[[int], None]) -> None:
        """Trains the weights."""
        asked_before = [weight.requires_grad for weight in self._weights]
        # in 16 bits steps would be lost in rounding, so copies in float32 take them
        copies = [weight.detach().float().clone() for weight in self._weights]
        optimizer = torch.optim.AdamW(copies, lr=LEARNING_RATE, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_up_and_decay(steps))
        try:
            for weight in self._weights:
                weight.requires_grad_(True)
            for step in range(steps):
                forward = forwards[step % len(forwards)]
                for copied, gradient in zip(copies, self._gradients(forward), strict=True):
                    copied.grad = None if gradient is None else gradient.float()
                optimizer.step()
                schedule.step()
                self._put_(copies)
                advance(1)
        finally:
            for weight, asked in zip(self._weights, asked_before, strict=True):
                weight.requires_grad_(asked)

    @torch.enable_grad()
    def _gradients(self, forward: Forward) -> tuple[Tensor | None, ...]:
        """One for each weight; None: the loss doesn't depend on it."""
        return torch.autograd.grad(self._loss(forward), self._weights, allow_unused=True)

    def undo_(self) -> None:
        """Puts the weights back."""
        self._put_(self._before)

    @torch.no_grad()
    def _put_(self, values: Sequence[Tensor]) -> None:
        for weight, value in zip(self._weights, values, strict=True):
            weight.copy_(value)


def _warm_up_and_decay(steps: int) -> Callable[[int], float]:
    """The factor of the learning rate, by the number of the step: it grows to 1, and then falls to 0."""
    num_warm_up = max(1, int(WARM_UP * steps))
    num_decay = max(1, steps - num_warm_up)

    def factor(step: int) -> float:
        growing = (step + 1) / num_warm_up
        falling = (steps - step) / num_decay
        return min(growing, falling)

    return factor


def _difference(output: Any, wanted: Any, rows: Rows) -> Tensor:
    """How far an output is from the wanted one."""
    logits, wanted_logits = rows.of_classes(output), rows.of_classes(wanted)
    if logits is not None and wanted_logits is not None:
        return divergence(logits, wanted_logits, temperature=1.0).mean()
    total = torch.zeros(())
    for tensor, target in zip(tensors_of(output), tensors_of(wanted), strict=True):
        if tensor.is_floating_point() and tensor.shape == target.shape:
            size = target.float().square().mean().clamp_min(1e-30)
            total = total.to(tensor.device) + (tensor.float() - target.float()).square().mean() / size
    return total
