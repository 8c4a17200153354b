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
    weights = partition.tensors(model)
    trained = {name: weight for name, weight in weights.items() if weight.is_floating_point()}
    asked_before = {name: weight.requires_grad for name, weight in trained.items()}
    of_zigs = np.zeros(partition.num_zigs)
    of_axes = np.zeros(len(partition.axes))
    num_batches = 0
    try:
        for weight in trained.values():
            weight.requires_grad_(True)
        for forward in forwards:
            with evaluating(model), torch.enable_grad():
                seed_everything()
                loss = loss_of(forward.run(model), Rows(forward))
                if not loss.requires_grad:
                    raise OTOError(
                        f"the outputs of {type(model).__name__} have no gradient: use salience='activations'"
                    )
                gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
            sums = _sums_of_zigs(partition, trained, dict(zip(trained, gradients, strict=True)))
            of_zigs += sums**2
            of_axes += [part.sum() ** 2 for _, part in partition.split(sums)]
            num_batches += 1
    finally:
        for name, weight in trained.items():
            weight.requires_grad_(asked_before[name])
    return Salience(of_zigs / num_batches, of_axes / num_batches)


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
            products = inner(weights[member.param].detach(), gradient).movedim(member.dim, 0)
            of_positions = products.flatten(1).sum(1) if products.dim() > 1 else products
            positions = member.positions(axis.size)  # (size, k)
            of_axis += of_positions.double().cpu().numpy()[positions].sum(1)
    return sums


def _own_loss(output: Any, rows: Rows) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise OTOError(
            "salience='labels' needs the loss that a model returns for batches with labels: add them, or use "
            "salience='outputs'"
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


class _Variances:
    """The variances of what a matrix reads and returns."""

    def __init__(self) -> None:
        self._sums: list[Tensor | float] = [0.0] * 4
        self._num_rows = [0, 0]  # of what is read, and of what is returned
        self._has_bias = False

    def add(self, x: Tensor, y: Tensor, has_bias: bool) -> None:
        """Adds rows, (rows, features) and (rows, results)."""
        x, y = x.double(), y.double()
        for place, more in enumerate((x.sum(0), x.square().sum(0), y.sum(0), y.square().sum(0))):
            self._sums[place] = self._sums[place] + more
        self._num_rows[0] += len(x)
        self._num_rows[1] += len(y)
        self._has_bias = has_bias

    def energies(self, matrix: Tensor) -> Tensor:
        """How much of the variance of the results each feature makes, (features,).

        Args:
            matrix: (features x kernel, results).
        """
        num_x, num_y = (max(1, number) for number in self._num_rows)
        x, xx = (total / num_x for total in self._sums[:2])
        y, yy = (total / num_y for total in self._sums[2:])
        of_features = xx - x.square() if self._has_bias else xx
        of_results = (yy - y.square()).sum().clamp_min(1e-30)
        of_weights = matrix.double().square().reshape(len(of_features), -1).sum(1)
        return of_features * of_weights / of_results


def _of_activations(model: nn.Module, partition: ZIGPartition, forwards: Iterable[Forward]) -> Salience:
    read = {(member.param, member.dim) for axis in partition.axes for member in axis.members}
    variances: dict[Mixing, _Variances] = {}
    with evaluating(model):
        tensors = Tensors(model)
        for forward in forwards:
            rows = Rows(forward)

            def after(seen: Seen, output: Any, rows: Rows = rows) -> None:
                if not isinstance(seen, Product) or (seen.mixing.name, seen.mixing.in_dim) not in read:
                    return
                x, y = seen.inputs(), seen.results(output)
                counting_x = rows.counting(len(x), x.device)
                counting_y = rows.counting(len(y), y.device)  # places of a kernel, which may be fewer
                of_mixing = variances.setdefault(seen.mixing, _Variances())
                of_mixing.add(x[counting_x], y[counting_y], seen.added is not None)

            with Watched(tensors, after=after):
                forward.run(model)
    by_name = named_tensors(model)
    of_zigs = np.zeros(partition.num_zigs)
    unknown = np.ones(len(partition.axes), bool)
    for number, (axis, of_axis) in enumerate(partition.split(of_zigs)):
        for member in axis.members:
            positions = member.positions(axis.size)  # (size, k)
            for mixing, of_mixing in variances.items():
                if (mixing.name, mixing.in_dim) == (member.param, member.dim):
                    energies = of_mixing.energies(mixing.matrix(by_name[mixing.name]))
                    of_axis += energies.cpu().numpy()[positions].sum(1)
                    unknown[number] = False
        if unknown[number]:  # nothing that was seen reads it
            of_axis[:] = np.inf
    return Salience(of_zigs, np.full(len(partition.axes), np.inf))
