"""How important every ZIG is: sums over its parameters of products of weights and gradients.

Worked example: a ZIG with the weights (1, 2) and the gradients (3, -1) has the inner product 1. Without the ZIG the
loss would change by about -1, and the square of that, 1, is its salience.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .slices import Part, Slice, local, on_this_rank
from .zigs import PrunableAxis

PIECE = 2**20  # elements of a parameter that are multiplied at a time, because large temporary tensors are slow


class Moments(NamedTuple):
    """What one batch says of every ZIG: sums over its parameters x and their gradients g, each (num_zigs,)."""

    weight_times_gradient: Tensor
    weight_squared: Tensor
    gradient_squared: Tensor
    elements: Tensor  # the number of parameters of the ZIG
    cost: Tensor  # how much of the budget the ZIG takes; its salience is divided by that when ZIGs are chosen


def inner(x: Tensor, y: Tensor) -> Tensor:
    """The terms of the real inner product."""
    return (x.conj() * y).real if x.is_complex() else x * y


def weight_squared(weight: Tensor, gradient: Tensor) -> Tensor:
    """The terms of |x|^2."""
    return inner(weight, weight)


def gradient_squared(weight: Tensor, gradient: Tensor) -> Tensor:
    """The terms of |g|^2."""
    return inner(gradient, gradient)


def parts(
    group: Sequence[Slice], params: Mapping[str, Tensor], product: Callable[[Tensor, Tensor], Tensor]
) -> Iterator[Part]:
    """Yields a product of weights and gradients, piece by piece, of all parameters that have gradients."""
    for s, p in on_this_rank(group, params):
        grad = params[s.param].grad
        if grad is None or not p.numel():
            continue
        grad = local(grad)
        grad = grad.to_dense() if grad.is_sparse else grad
        positions_of_piece = max(1, PIECE * p.shape[s.dim] // p.numel())
        owners = s.owner.split(positions_of_piece)
        weights = p.split(positions_of_piece, s.dim)
        gradients = grad.split(positions_of_piece, s.dim)
        for owner, x, g in zip(owners, weights, gradients, strict=True):
            yield Part(s._replace(owner=owner), None, product(x, g))


def elements_of_zig(axes: Sequence[PrunableAxis], params: Mapping[str, Tensor]) -> Tensor:
    """The number of parameters of one ZIG of each axis, (axes,)."""
    counts = []
    for axis in axes:
        count = 0
        for m in axis.group:
            p = params[m.param]
            positions_of_zig = m.positions(axis.size).shape[1]
            count += positions_of_zig * p.numel() // p.shape[m.dim]
        counts.append(count)
    return torch.tensor(counts, dtype=torch.float32, device="cpu")
