"""New statistics for the batch norms of a model that was cut.

A batch norm returns (x - mean) / sqrt(variance + eps). In a cut model x is another one, so the old statistics no
longer suit it. The new ones give what the batch norm returns the mean and the variance that it has in the dense model.

Worked example: a channel has mean 2 and variance 1 in the dense model, which are its statistics there. In the cut
model it has mean 1 and variance 1 / 4, and these are its new statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .mixing import Normalization
from .ridge import HELD_OUT, TINY
from .wide import wide_dtype

FEWEST_VALUES = 100  # of which statistics are taken


class Statistics(NamedTuple):
    """What a batch norm in eval mode normalises its channels by."""

    mean: Tensor  # (channels,)
    variance: Tensor  # (channels,)
    eps: float

    def normalized(self, values: Tensor) -> Tensor:
        """(values, channels) -> what a batch norm returns of them, without its weight and bias."""
        return (values - self.mean) / (self.variance + self.eps).sqrt()

    def aligned(self, x: Tensor, y: Tensor) -> Statistics:
        """The statistics that give x the mean and the variance that y has by these.

        Args:
            x, y: (values, channels).
        """
        variance_of_y = y.var(0)
        # what is constant in the dense model says nothing of the scale
        ratio = torch.where(variance_of_y > TINY, x.var(0) / variance_of_y.clamp_min(TINY), 1.0)
        mean = x.mean(0) - (y.mean(0) - self.mean) * ratio.sqrt()
        variance = ratio * (self.variance + self.eps) - self.eps
        return Statistics(mean, variance.clamp_min(0), self.eps)


def aligned_statistics(
    in_small: Sequence[Normalization], in_dense: Sequence[Normalization], channels_left: Tensor
) -> Statistics | None:
    """The statistics by which a batch norm of the cut model returns values of the dense model's mean and variance.

    Where the dense model's statistics are those of the batches, the new ones are those of the batches, too. None: the
    old ones are as good on values that are held out, or there are too few values.

    Args:
        in_small, in_dense: what the batch norm of the cut and of the dense model has normalised, in all batches.
        channels_left: their positions in the dense model, (channels,).
    """
    wide = wide_dtype(channels_left.device)
    x = torch.cat([_values(each) for each in in_small]).to(wide)  # (values, channels)
    y = torch.cat([_values(each)[:, channels_left] for each in in_dense]).to(wide)
    if len(x) < FEWEST_VALUES or len(x) != len(y):
        return None
    old = _statistics(in_small[0], wide)
    of_dense = _statistics(in_dense[0], wide, channels_left)
    num_fitted = len(x) - len(x) // HELD_OUT
    wanted = of_dense.normalized(y[num_fitted:])

    def error(statistics: Statistics) -> Tensor:
        return (statistics.normalized(x[num_fitted:]) - wanted).square().mean()

    if error(of_dense.aligned(x[:num_fitted], y[:num_fitted])) < error(old):
        return of_dense.aligned(x, y)
    return None


def _statistics(seen: Normalization, dtype: torch.dtype, channels: Tensor | slice = slice(None)) -> Statistics:
    return Statistics(seen.mean[channels].to(dtype), seen.variance[channels].to(dtype), seen.eps)


def _values(seen: Normalization) -> Tensor:
    """What is normalised, (values, channels)."""
    num_channels = seen.input.shape[1]
    return seen.input.movedim(1, -1).reshape(-1, num_channels)
