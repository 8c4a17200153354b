"""How far the logits of a model are from those of its teacher, for every label that counts (arXiv 1503.02531).

Pure functions, for distillation.py. What is compared, and at which positions, follows from the shapes and dtypes of
the logits and the labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

NO_LABEL = -100  # a position with this label counts in no loss


def divergence(logits: Tensor, of_teacher: Tensor, temperature: float) -> Tensor:
    """T^2 times the KL divergence of the model's classes from the teacher's, at temperature T: (n, c), (n, c) -> (n,).

    The factor keeps its gradients as large as those of the hard labels, whatever T is (arXiv 1503.02531, section 2).

    Example:
        >>> divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]]), temperature=2.0)
        tensor([0.4438])
    """
    log_q = F.log_softmax(logits / temperature, -1)
    log_p = F.log_softmax(of_teacher / temperature, -1)
    # a class that is masked with -inf has no part in the sum, and its difference may be inf - inf
    differences = (log_p - log_q).masked_fill(log_p.isneginf(), 0.0)
    return temperature**2 * (log_p.exp() * differences).sum(-1)


def binary_divergence(logits: Tensor, of_teacher: Tensor, temperature: float) -> Tensor:
    """The same where every logit decides about a label of its own, yes or no: (n, c), (n, c) -> (n, c)."""
    either = torch.stack([logits, torch.zeros_like(logits)], -1)  # the softmax of (x, 0) is (sigmoid(x), 1 - that)
    either_of_teacher = torch.stack([of_teacher, torch.zeros_like(of_teacher)], -1)
    return divergence(either, either_of_teacher, temperature)


def squared_difference(logits: Tensor, of_teacher: Tensor, temperature: float) -> Tensor:
    """The same where logits are numbers: (n, c), (n, c) -> (n, c). T^2 cancels with the T that divides both."""
    return (logits - of_teacher) ** 2


Comparison = Callable[[Tensor, Tensor, float], Tensor]


def comparison(logits: Tensor, labels: Any, problem: str | None) -> Comparison:
    """How the logits of a model are compared with a teacher's; the result has one number for each label.

    Args:
        logits: (batch, c) or (batch, sequence, c).
        labels: whatever the trainer has as labels.
        problem: `problem_type` of the model's config, which tells several yes-or-no labels from several numbers.
    """
    are_numbers = isinstance(labels, Tensor) and labels.is_floating_point() and labels.shape == logits.shape
    if are_numbers and problem == "multi_label_classification":
        return binary_divergence
    if are_numbers or logits.shape[-1] == 1:
        return squared_difference
    return divergence


def labels_in(inputs: Mapping[str, Any], label_names: Iterable[str]) -> Any:
    """The labels of a batch: what it has under the first of these names that it knows."""
    for name in label_names:
        if inputs.get(name) is not None:
            return inputs[name]
    return None


def compared(shape: torch.Size, inputs: Mapping[str, Any], labels: Any, shifts: bool) -> Tensor | None:
    """The positions whose logits are compared, those that the trainer's own loss counts; None: nothing says which.

    They are bool, of the given shape.

    Args:
        shape: of the logits, without the classes: (batch,), or (batch, sequence).
        inputs: the batch, by name.
        labels: those of the batch, if it has any.
        shifts: whether the loss compares the logits of one position with the label of the next.

    Example:
        >>> labels = torch.tensor([[-100, -100, 5, 6]])
        >>> compared((1, 4), {}, labels, shifts=True).tolist(), compared((1, 4), {}, labels, shifts=False).tolist()
        ([[False, True, True, False]], [[False, False, True, True]])
    """
    if len(shape) > 2:
        return None  # the classes of an image's pixels are on another axis than the last one
    if inputs.get("shift_labels") is not None:
        labels = inputs["shift_labels"]
    elif shifts and isinstance(labels, Tensor):
        labels = F.pad(labels[..., 1:], (0, 1), value=NO_LABEL)
    if isinstance(labels, Tensor) and labels.numel() == torch.Size(shape).numel():
        return labels.reshape(shape) != NO_LABEL
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bool)
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == shape:
        return mask != 0
    return None
