"""How much a trained model would lose with each ZIG, measured on a few batches without training.

- "outputs": what the model says itself is drawn as labels, and the salience is E (sum of <x, gradient> over a ZIG)^2,
  as in training (Fisher information; Kwon et al., arXiv 2204.09656). What are no classes is projected at random.
- "labels": the same with the model's own loss, for which the batches must have labels.
- "activations": sum_i C_ii |W_i|^2 over the features i of a ZIG, for the weights W that read them, as a fraction of
  the variance of what W returns; C are the variances of the features. It needs no gradients, and so least memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .calibration import Rows
from .calls import Forward, tensors_of
from .evaluating import evaluating, seed_everything
from .mixing import Mixing, Product, Seen, Tensors, Watched
from .modeling_oto import OTOError, named_tensors
from .salience import inner
from .wide import wide_dtype
from .zigs import ZIGPartition

SALIENCES = ("outputs", "labels", "activations")


class Salience(NamedTuple):
    """Of every ZIG, (num_zigs,), and of every axis as a whole, (axes,): infinity where nobody knows it."""

    of_zigs: np.ndarray
    of_axes: np.ndarray


def measured(model: nn.Module, partition: ZIGPartition, forwards: Iterable[Forward], kind: str) -> Salience:
    """The salience of every ZIG; the model is left as it was.

    Args:
        kind: one of `SALIENCES`.

    Raises:
        OTOError: the batches have no labels, or the outputs no gradients.
    """
    if kind == "activations":
        return _of_activations(model, partition, forwards)
    return _of_gradients(model, partition, forwards, _own_loss if kind == "labels" else _loss_of_own_outputs)


# gradients -----------------------------------------------------------------------------------------


def _of_gradients(
    model: nn.Module, partition: ZIGPartition, forwards: Iterable[Forward], loss_of: Callable[[Any, Rows], Tensor]
) -> Salience:
    weights: dict[str, Tensor] = {}
    for name, weight in partition.tensors(model).items():
        if weight.is_floating_point():
            weights[name] = weight
    asked_before = {name: weight.requires_grad for name, weight in weights.items()}
    of_zigs = np.zeros(partition.num_zigs)
    of_axes = np.zeros(len(partition.axes))
    num_batches = 0
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        for forward in forwards:
            gradients = _gradients(model, forward, weights, loss_of)
            sums = _sums_of_zigs(partition, weights, gradients)
            of_zigs += sums**2
            of_axes += [of_axis.sum() ** 2 for _, of_axis in partition.split(sums)]
            num_batches += 1
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(asked_before[name])
    return Salience(of_zigs / num_batches, of_axes / num_batches)


def _gradients(
    model: nn.Module, forward: Forward, weights: Mapping[str, Tensor], loss_of: Callable[[Any, Rows], Tensor]
) -> dict[str, Tensor | None]:
    """Of the loss of one batch, by the name of the weight; None: the loss doesn't depend on it."""
    with evaluating(model), torch.enable_grad():
        # every batch draws the same random numbers, whatever has run before it
        seed_everything()
        loss = loss_of(forward.run(model), Rows(forward))
        if not loss.requires_grad:
            raise OTOError(f"the outputs of {type(model).__name__} have no gradient: use salience='activations'")
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    return dict(zip(weights, gradients, strict=True))


def _sums_of_zigs(
    partition: ZIGPartition, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None]
) -> np.ndarray:
    """The sum of <x, gradient> over every ZIG, (num_zigs,)."""
    sums = np.zeros(partition.num_zigs)
    for axis, of_axis in partition.split(sums):
        for member in axis.group:
            gradient = gradients.get(member.param)
            if gradient is None:
                continue
            products = inner(weights[member.param].detach(), gradient)
            products = products.movedim(member.dim, 0)
            of_positions = products.flatten(1).sum(1) if products.dim() > 1 else products  # (length of the dimension,)
            positions = member.positions(axis.size)  # (size, k)
            of_axis += of_positions.cpu().double().numpy()[positions].sum(1)
    return sums


def _own_loss(output: Any, rows: Rows) -> Tensor:
    """The loss that a forward returns: by its name, alone, or as the first of several outputs."""
    if isinstance(output, Mapping):
        loss = output.get("loss")
    elif isinstance(output, (list, tuple)):
        loss = output[0]
    else:
        loss = getattr(output, "loss", output)
    # of several devices each has a loss of its own
    is_loss = isinstance(loss, Tensor) and loss.dim() <= 1 and loss.is_floating_point()
    if not is_loss:
        raise OTOError(
            "salience='labels' needs the loss that a model returns, as 'loss' or first, for batches with labels: add "
            "them, or use salience='outputs'"
        )
    return loss.mean()


def _loss_of_own_outputs(output: Any, rows: Rows) -> Tensor:
    """A loss whose gradients say how the outputs move."""
    logits = rows.of_classes(output)
    if logits is not None:
        if not logits.isfinite().all():
            raise OTOError("the logits are not finite numbers (NaN or infinity) on these batches")
        with torch.no_grad():
            classes = torch.multinomial(logits.softmax(-1), 1)[:, 0]
        return F.cross_entropy(logits, classes)
    total = torch.zeros(())
    for tensor in tensors_of(output):
        if tensor.is_floating_point() and tensor.requires_grad:
            noise = torch.randn(tensor.shape, device=tensor.device)
            size = tensor.detach().float().norm().clamp_min(1e-30)
            total = total.to(tensor.device) + (tensor.float() * noise).sum() / size
    return total


# activations ---------------------------------------------------------------------------------------


class _Moments:
    """Mean and variance of each column of the rows that are added."""

    def __init__(self) -> None:
        self._num_rows = 0
        self._sum: Tensor | float = 0.0  # (columns,)
        self._sum_of_squares: Tensor | float = 0.0  # (columns,)

    def add(self, rows: Tensor) -> None:
        """Adds rows, (rows, columns)."""
        rows = rows.to(wide_dtype(rows.device))
        self._num_rows += len(rows)
        self._sum = self._sum + rows.sum(0)
        self._sum_of_squares = self._sum_of_squares + rows.square().sum(0)

    def mean_square(self) -> Tensor:
        return self._sum_of_squares / max(1, self._num_rows)

    def variance(self) -> Tensor:
        mean = self._sum / max(1, self._num_rows)
        return self.mean_square() - mean.square()


class _Energies:
    """How much of what a matrix returns comes from each feature that it reads."""

    def __init__(self) -> None:
        self._features = _Moments()
        self._results = _Moments()
        self._has_bias = False

    def add(self, x: Tensor, y: Tensor, has_bias: bool) -> None:
        """Adds rows, (rows, features) and (rows, results)."""
        self._features.add(x)
        self._results.add(y)
        self._has_bias = has_bias

    def of_features(self, matrix: Tensor) -> Tensor:
        """The fraction of the variance of the results that each feature makes, (features,).

        Args:
            matrix: (features x kernel, results).
        """
        # a bias makes up for the mean of a feature that is gone
        of_features = self._features.variance() if self._has_bias else self._features.mean_square()
        of_weights = matrix.to(of_features.dtype).square().reshape(len(of_features), -1).sum(1)
        of_results = self._results.variance().sum().clamp_min(1e-30)
        return of_features * of_weights / of_results


def _of_activations(model: nn.Module, partition: ZIGPartition, forwards: Iterable[Forward]) -> Salience:
    energies = _energies(model, partition, forwards)
    weights = named_tensors(model)
    of_zigs = np.zeros(partition.num_zigs)
    for axis, of_axis in partition.split(of_zigs):
        is_read = False
        for member in axis.members:
            positions = member.positions(axis.size)  # (size, k)
            for mixing, of_mixing in energies.items():
                if (mixing.name, mixing.in_dim) == (member.param, member.dim):
                    of_features = of_mixing.of_features(mixing.matrix(weights[mixing.name]))
                    of_axis += of_features.cpu().numpy()[positions].sum(1)
                    is_read = True
        if not is_read:
            of_axis[:] = np.inf
    return Salience(of_zigs, np.full(len(partition.axes), np.inf))


def _energies(model: nn.Module, partition: ZIGPartition, forwards: Iterable[Forward]) -> dict[Mixing, _Energies]:
    """Those of all matrices that read a prunable axis."""
    reading = {(member.param, member.dim) for axis in partition.axes for member in axis.members}
    energies: dict[Mixing, _Energies] = {}
    with evaluating(model):
        tensors = Tensors(model)
        for forward in forwards:
            rows = Rows(forward)

            def after(seen: Seen, output: Any, rows: Rows = rows) -> None:
                if not isinstance(seen, Product) or (seen.mixing.name, seen.mixing.in_dim) not in reading:
                    return
                x, y = seen.inputs(), seen.results(output)
                counting_x = rows.counting(len(x), x.device)
                counting_y = rows.counting(len(y), y.device)  # places of a kernel, which may be fewer
                of_mixing = energies.setdefault(seen.mixing, _Energies())
                of_mixing.add(x[counting_x], y[counting_y], seen.added is not None)

            with Watched(tensors, after=after):
                forward.run(model)
    return energies
