"""Ridge regression: the weights that make of the features that are left what the dense layer makes of all of them.

Let x be the features that are left, y what the dense layer returns, and W, b the weights that are left. Over the rows
of all batches, with C = cov(x, x) and K = cov(x, y), the new weights are

    W' = W + (C + lam * mean(diag C) * I)^-1 (K - C W),    b' = E[y] - E[x] W'.

They are the least squares for y, drawn towards W. Without a bias C and K are E[x^T x] and E[x^T y]. Rows that are held
out decide how strong the pull is, and whether W and b stay as they are.

Worked example: y = x1 + x2 with two features that are always equal, and the second one is cut. Then W is 1, C is 1,
K is 2, and without a pull W' is 2.
"""

from __future__ import annotations

import logging
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .modeling_oto import OTOError
from .wide import wide_dtype

logger = logging.getLogger(__name__)

PULLS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, math.inf)  # lam; with infinity only the bias changes
HELD_OUT = 4  # one row of so many is held out
TINY = 1e-30  # a variance is not less, so that nothing is divided by zero


class Means(NamedTuple):
    """Averages over rows."""

    x: Tensor  # (features,)
    y: Tensor  # (results,)
    xx: Tensor  # (features, features)
    xy: Tensor  # (features, results)
    yy: Tensor  # (results,), of squares

    def centred(self) -> Means:
        """The same with the covariances in the place of the second moments."""
        return self._replace(
            xx=self.xx - torch.outer(self.x, self.x),
            xy=self.xy - torch.outer(self.x, self.y),
            yy=self.yy - self.y.square(),
        )


class Sums:
    """Sums over rows, in float32."""

    def __init__(self) -> None:
        self.num_rows = 0
        self._sums: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        """Adds rows, (rows, features) and (rows, results)."""
        x, y = x.float(), y.float()
        new = [x.sum(0), y.sum(0), x.t() @ x, x.t() @ y, y.square().sum(0)]
        self.num_rows += len(x)
        if self._sums:
            for old, more in zip(self._sums, new, strict=True):
                old += more
        else:
            self._sums = new

    def means(self) -> Means:
        """The averages, in double where the device has it."""
        wide = wide_dtype(self._sums[0].device)
        return Means(*(total.to(wide) / self.num_rows for total in self._sums))


class Layer(NamedTuple):
    """The weights of a layer, (features, results), and its bias, (results,), or None."""

    weight: Tensor
    bias: Tensor | None

    def error(self, means: Means) -> float:
        """The mean squared difference of what the layer returns from y, as a fraction of the variance of y."""
        squares = means.yy.sum() - 2 * (self.weight * means.xy).sum()
        squares = squares + ((means.xx @ self.weight) * self.weight).sum()
        if self.bias is not None:
            of_weight = means.x @ self.weight
            squares = squares + (self.bias * (self.bias + 2 * (of_weight - means.y))).sum()
        variance = means.centred().yy.sum().clamp_min(TINY)
        return float(squares / variance)

    def fitted(self, means: Means, pull: float) -> Layer:
        """The least squares for y, drawn towards this layer; the layer itself where they can't be computed."""
        if self.bias is not None:
            means = means.centred()
        weight = self.weight
        if math.isfinite(pull):
            ridge = pull * means.xx.diagonal().mean().clamp_min(TINY)
            regular = means.xx + ridge * torch.eye(len(means.xx), dtype=means.xx.dtype, device=means.xx.device)
            factor, failed = torch.linalg.cholesky_ex(regular)
            if failed:
                return self
            weight = weight + torch.cholesky_solve(means.xy - means.xx @ weight, factor)
        return Layer(weight, None if self.bias is None else means.y - means.x @ weight)


class Fit(NamedTuple):
    """The new weights of a layer, and how far it is from the dense one, as a fraction of the variance."""

    layer: Layer
    error_before: float
    error: float


class Regression:
    """The regression of one layer, to which batches add their rows."""

    def __init__(self) -> None:
        self._fitted = Sums()
        self._held_out = Sums()

    def add(self, x: Tensor, y: Tensor) -> None:
        """Adds the rows of one batch, (rows, features) and (rows, results); the last of them are held out."""
        num_fitted = len(x) - len(x) // HELD_OUT
        self._fitted.add(x[:num_fitted], y[:num_fitted])
        self._held_out.add(x[num_fitted:], y[num_fitted:])

    def fit(self, layer: Layer, name: str) -> Fit:
        """The new weights.

        Args:
            layer: the weights that are left.
            name: of the weight, for messages.

        Raises:
            OTOError: a feature or a result isn't a finite number.
        """
        if not self._held_out.num_rows:
            return Fit(layer, math.nan, math.nan)
        for_fit, for_choice = self._fitted.means(), self._held_out.means()
        for means in (for_fit, for_choice):
            if not (means.xx.isfinite().all() and means.xy.isfinite().all()):
                raise OTOError(
                    f"what {name} takes or returns is not a finite number (NaN or infinity) on these batches"
                )
        wide = Layer(*(None if t is None else t.to(for_fit.xx.dtype) for t in layer))
        before = best = wide.error(for_choice)
        best_pull = None
        for pull in PULLS:
            error = wide.fitted(for_fit, pull).error(for_choice)
            if error < best:
                best, best_pull = error, pull
        if best_pull is None:
            return Fit(layer, before, before)
        num_features = len(layer.weight)
        num_rows = self._fitted.num_rows + self._held_out.num_rows
        if num_rows < num_features:
            logger.warning(
                "%s reads %d features, and the batches show only %d rows of them: its new weights stay near the old "
                "ones (lam=%g); pass more batches",
                name, num_features, num_rows, best_pull,
            )  # fmt: skip
        fitted = wide.fitted(self._of_all(), best_pull)
        new = Layer(*(None if t is None else t.to(old) for t, old in zip(fitted, layer, strict=True)))
        return Fit(new, before, best)

    def _of_all(self) -> Means:
        """The averages over all rows."""
        num_fitted, num_held_out = self._fitted.num_rows, self._held_out.num_rows
        share = num_held_out / (num_fitted + num_held_out)
        pairs = zip(self._fitted.means(), self._held_out.means(), strict=True)
        return Means(*((1 - share) * a + share * b for a, b in pairs))
