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

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .modeling_oto import OTOError
from .wide import wide_dtype

PULLS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, math.inf)  # lam; with infinity only the bias changes
HELD_OUT = 4  # one row of so many is held out
TINY = 1e-30  # a variance is not less, so that nothing is divided by zero


class Means(NamedTuple):
    """Averages over rows."""

    x: Tensor  # (features,)
    y: Tensor  # (results,)
    xx: Tensor  # (features, features), the covariances
    xy: Tensor  # (features, results), the covariances
    yy: Tensor  # (results,), the variances

    def uncentred(self) -> Means:
        """The same with the second moments in the place of the covariances."""
        return self._replace(
            xx=self.xx + torch.outer(self.x, self.x),
            xy=self.xy + torch.outer(self.x, self.y),
            yy=self.yy + self.y.square(),
        )


class Sums:
    """Sums over rows, in float32, of their differences from the first rows' means."""

    def __init__(self) -> None:
        self.num_rows = 0
        self._near: tuple[Tensor, Tensor] | None = None  # means of the first rows
        self._sums: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        """Adds rows, (rows, features) and (rows, results)."""
        if not len(x):
            return
        x, y = x.float(), y.float()
        if self._near is None:
            # squares of values that are far from zero would leave no digits for the variance
            self._near = x.mean(0), y.mean(0)
        x = x - self._near[0]
        y = y - self._near[1]
        of_rows = [x.sum(0), y.sum(0), x.t() @ x, x.t() @ y, y.square().sum(0)]
        self.num_rows += len(x)
        if not self._sums:
            self._sums = of_rows
            return
        for total, more in zip(self._sums, of_rows, strict=True):
            total += more

    def means(self) -> Means:
        """The averages, in double where the device has it."""
        wide = wide_dtype(self._sums[0].device)
        x, y, xx, xy, yy = (total.to(wide) / self.num_rows for total in self._sums)
        near_x, near_y = self._near
        return Means(
            x=x + near_x,
            y=y + near_y,
            xx=xx - torch.outer(x, x),
            xy=xy - torch.outer(x, y),
            yy=yy - y.square(),
        )


class Layer(NamedTuple):
    """The weights of a layer, (features, results), and its bias, (results,), or None."""

    weight: Tensor
    bias: Tensor | None

    def error(self, means: Means) -> float:
        """The mean squared difference of what the layer returns from y, as a fraction of the variance of y."""
        if self.bias is None:
            about = means.uncentred()
            offset = torch.zeros_like(means.y)
        else:
            about = means
            offset = self.bias + means.x @ self.weight - means.y
        # E |x W - y|^2 = tr(W^T xx W) - 2 tr(W^T xy) + tr(yy)
        squares = ((about.xx @ self.weight) * self.weight).sum()
        squares = squares - 2 * (self.weight * about.xy).sum()
        squares = squares + about.yy.sum() + offset.square().sum()
        return float(squares.clamp_min(0) / means.yy.sum().clamp_min(TINY))

    def fitted(self, means: Means, pull: float) -> Layer:
        """The least squares for y, drawn towards this layer; the layer itself where they can't be computed."""
        about = means.uncentred() if self.bias is None else means
        weight = self.weight
        if math.isfinite(pull):
            ridge = pull * about.xx.diagonal().mean().clamp_min(TINY)
            identity = torch.eye(len(about.xx), dtype=about.xx.dtype, device=about.xx.device)
            factor, failed = torch.linalg.cholesky_ex(about.xx + ridge * identity)
            if failed:
                return self
            weight = weight + torch.cholesky_solve(about.xy - about.xx @ weight, factor)
        # whatever the weight is, this bias makes the mean right
        bias = None if self.bias is None else means.y - means.x @ weight
        return Layer(weight, bias)

    def to(self, dtype: torch.dtype) -> Layer:
        """The same in another dtype."""
        return Layer(self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))


class Fit(NamedTuple):
    """The new weights of a layer, and how far it is from the dense one, as a fraction of the variance."""

    layer: Layer | None  # None once the weights are in the model
    error_before: float
    error: float
    is_short_of_rows: bool = False  # the batches show fewer rows than the layer has features


class Regression:
    """The regression of one layer, to which batches add their rows."""

    def __init__(self) -> None:
        self._fitted = Sums()
        self._held_out = Sums()
        self._num_small = 0  # batches that are too small to be divided

    def add(self, x: Tensor, y: Tensor) -> None:
        """Adds the rows of one batch, (rows, features) and (rows, results).

        The last rows of a batch are held out; of batches that are too small for that, every fourth one is.
        """
        num_fitted = len(x) - len(x) // HELD_OUT
        is_small = 0 < len(x) < HELD_OUT
        if is_small:
            self._num_small += 1
            if self._num_small % HELD_OUT == 0:
                num_fitted = 0
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
        if not (self._held_out.num_rows and self._fitted.num_rows):
            return Fit(layer, math.nan, math.nan, is_short_of_rows=True)
        for_fit, for_choice = self._fitted.means(), self._held_out.means()
        for means in (for_fit, for_choice):
            if not (means.xx.isfinite().all() and means.xy.isfinite().all()):
                raise OTOError(
                    f"what {name} takes or returns is not a finite number (NaN or infinity) on these batches"
                )
        old = layer.to(for_fit.xx.dtype)
        error_before = old.error(for_choice)
        best_error, best_pull = error_before, None
        for pull in PULLS:
            error = old.fitted(for_fit, pull).error(for_choice)
            if error < best_error:
                best_error, best_pull = error, pull
        if best_pull is None:
            return Fit(layer, error_before, error_before)
        # the pull is chosen, so the rows that were held out may teach, too
        num_rows = self._fitted.num_rows + self._held_out.num_rows
        of_all_rows = _of_both(for_fit, for_choice, self._held_out.num_rows / num_rows)
        new = old.fitted(of_all_rows, best_pull).to(layer.weight.dtype)
        return Fit(new, error_before, best_error, is_short_of_rows=num_rows < len(layer.weight))


def _of_both(first: Means, second: Means, share: float) -> Means:
    """The averages over the rows of both, of which the second ones are a share."""

    def mixed(a: Tensor, b: Tensor) -> Tensor:
        return (1 - share) * a + share * b

    between = share * (1 - share)
    x = second.x - first.x
    y = second.y - first.y
    return Means(
        x=mixed(first.x, second.x),
        y=mixed(first.y, second.y),
        xx=mixed(first.xx, second.xx) + between * torch.outer(x, x),
        xy=mixed(first.xy, second.xy) + between * torch.outer(x, y),
        yy=mixed(first.yy, second.yy) + between * y.square(),
    )
