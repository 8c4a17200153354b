"""How far the outputs of two forwards are from each other, as one number.

Worked example: of the logits (10, 14) and (10, 14.5) the largest difference is 0.5. The spread of the first ones is 2
around their mean of 12, and so the difference is 0.25 of it. An offset of 1,000 on all logits would change neither.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

# Entries of an output that are compared at a time. Logits of a large vocabulary are as large as layers.
PIECE = 2**22


def largest_difference(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> float:
    """The largest difference between two lists of outputs, relative to the `_spread` of each output.

    A scalar has no spread. It may be a loss, which is a small difference of large numbers. So the difference of a
    scalar is relative to the largest spread of all outputs. Entries that are infinite or NaN are not compared.
    Integers, the sizes of very large outputs, have to be equal.

    Returns:
        inf where shapes, sizes or infinities differ; nan where nothing at all is finite.

    Example:
        >>> largest_difference([torch.tensor([10.0, 14.0])], [torch.tensor([10.0, 14.5])])  # spread 2 around 12
        0.25
    """
    shapes = [x.shape for x in first]
    if [y.shape for y in second] != shapes:
        return math.inf
    outputs = []
    differences = []
    for x, y in zip(first, second, strict=True):
        if not has_numbers(x):
            if not torch.equal(x, y):
                return math.inf
            continue
        x = _as_dense(x)
        y = _as_dense(y)
        difference = _difference(x, y)
        if difference == math.inf:
            return math.inf
        outputs.append(x)
        differences.append(difference)
    spreads = [_spread(x) for x in outputs]
    known = [spread for spread in spreads if spread is not None]
    if not known:
        return math.nan
    largest_spread = max(known)
    relative = []
    for x, spread, difference in zip(outputs, spreads, differences, strict=True):
        reference = spread if x.dim() else largest_spread
        reference = max(reference or 0.0, 1e-3)  # outputs that are zero, but for rounding, have no spread either
        relative.append(difference / reference)
    return max(relative)


def has_numbers(x: torch.Tensor) -> bool:
    """Whether a tensor is to be compared as numbers, and not as sizes."""
    return x.is_floating_point() or x.is_complex()


def _as_dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.layout == torch.strided else x.to_dense()


def _difference(x: torch.Tensor, y: torch.Tensor) -> float:
    """The largest difference of finite entries; inf if x and y are not finite in the same places."""
    largest = 0.0
    for part, other in zip(_pieces(x), _pieces(y), strict=True):
        finite = torch.isfinite(part)
        if not torch.equal(finite, torch.isfinite(other)):
            return math.inf
        difference = (part - other).masked_fill_(~finite, 0)
        largest = max(largest, _largest(difference))
    return largest


def _pieces(x: torch.Tensor) -> Iterator[torch.Tensor]:
    yield from x.reshape(-1).split(PIECE)


def _largest(x: torch.Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _spread(x: torch.Tensor) -> float | None:
    """How far finite entries are from their mean at most, None if no entry is finite.

    An offset common to all entries is no spread, so that it hides no difference. The spread is at least 1e-4 of the
    largest entry, so that rounding of a large offset is no difference.
    """
    wide = torch.promote_types(x.dtype, torch.float32)  # a sum of many halves would be infinite
    count = 0
    total: torch.Tensor | float = 0.0
    for part in _pieces(x):
        not_finite = ~torch.isfinite(part)
        count += part.numel() - int(not_finite.sum())
        total += part.masked_fill(not_finite, 0).sum(dtype=wide)
    if count == 0:
        return None
    mean = total / count if count > 1 else 0  # of a single entry the spread is the entry itself
    largest = 0.0
    farthest = 0.0
    for part in _pieces(x):
        # on a card it takes less memory to write zeros than to choose what is finite
        not_finite = ~torch.isfinite(part)
        largest = max(largest, _largest(part.masked_fill(not_finite, 0)))
        farthest = max(farthest, _largest((part - mean).masked_fill_(not_finite, 0)))
    return max(farthest, 1e-4 * largest)
