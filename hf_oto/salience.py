"""How important every ZIG is: sums over its parameters of products of weights and gradients.

Worked example: a ZIG with the weights (1, 2) and the gradients (3, -1) has the inner product 1. Without the ZIG the
loss would change by about -1. The square of this change, 1, is the salience of the ZIG.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .slices import Part, Slice, local, on_this_rank
from .zigs import PrunableAxis

# Elements of a parameter that are multiplied at a time. On a CPU large temporary tensors are slow, and on a card many
# small operations are.
PIECE = 2**20
PIECE_ON_CARD = 2**24
Product = Callable[[Tensor, Tensor], Tensor]  # of a weight and its gradient, element by element
Params = Mapping[str, Tensor]  # by name


class Moments(NamedTuple):
    """What is known of every ZIG after one batch: sums over its parameters and their gradients, each (num_zigs,)."""

    weight_times_gradient: Tensor
    weight_squared: Tensor
    gradient_squared: Tensor
    elements: Tensor  # the number of parameters of the ZIG
    cost: Tensor  # how much of the budget the ZIG takes; its salience is divided by that when ZIGs are chosen


def inner(x: Tensor, y: Tensor) -> Tensor:
    """The terms of the real inner product."""
    if not x.is_complex():
        return x * y
    # a complex number counts as the vector of its two parts
    product = x.conj() * y
    return product.real


def weight_squared(weight: Tensor, gradient: Tensor) -> Tensor:
    """The terms of |x|^2."""
    return inner(weight, weight)


def gradient_squared(weight: Tensor, gradient: Tensor) -> Tensor:
    """The terms of |g|^2."""
    return inner(gradient, gradient)


def parts(group: Sequence[Slice], params: Params, product: Product) -> Iterator[Part]:
    """Yields a product of weights and gradients, piece by piece, of all parameters that have gradients."""
    for slice_, p in on_this_rank(group, params):
        grad = params[slice_.param].grad
        if grad is None or not p.numel():
            continue
        grad = local(grad)
        if grad.is_sparse:  # an embedding's may be
            grad = grad.to_dense()
        dim = slice_.dim
        piece_size = PIECE if p.device.type == "cpu" else PIECE_ON_CARD
        positions_of_piece = max(1, piece_size * p.shape[dim] // p.numel())
        owners = slice_.owner.split(positions_of_piece)
        weights = p.split(positions_of_piece, dim)
        gradients = grad.split(positions_of_piece, dim)
        for owner, weight, gradient in zip(owners, weights, gradients, strict=True):
            piece = slice_._replace(owner=owner)
            products = product(weight, gradient)
            yield Part(piece, None, products)


def elements_of_zig(axes: Sequence[PrunableAxis], params: Params) -> Tensor:
    """The number of parameters of one ZIG of each axis, (axes,)."""
    counts = []
    for axis in axes:
        count = 0
        for member in axis.group:
            p = params[member.param]
            positions = member.positions(axis.size)  # (size, k)
            positions_of_zig = positions.shape[1]
            count += positions_of_zig * p.numel() // p.shape[member.dim]
        counts.append(count)
    return torch.tensor(counts, dtype=torch.float32, device="cpu")
