"""New weights for a model that was cut, by which it returns again what the dense model does, without training.

Whatever multiplies features by a weight gets the weights of a ridge regression (ridge.py): from the features that it
reads in the cut model to what the dense model returns at the same place. This is done from the first layer to the
last, each time with the new weights before it, so that later layers make up for errors of earlier ones. The statistics
of batch norms are taken anew on the way (batch_norms.py).

For that all batches walk through both models together (walks.py), and stop wherever a weight is to be fitted.

Worked example: in Linear(3, 8), ReLU, Linear(8, 2) the cut takes 4 of 8 units. The first layer reads what it read
before, so its 4 rows stay. The second one reads 4 features, and gets the weights that make of them what it made of 8.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .batch_norms import aligned_statistics
from .calibration import Rows
from .calls import Forward, raise_if_out_of_memory
from .cut import Cut, kept_positions
from .evaluating import evaluating
from .fittable import Fittable, fittable_weights, one_by_one_
from .light_copy import unshare_
from .mixing import Mixing, Normalization, Product, Seen, Tensors, Watched
from .modeling_oto import OTOError, named_tensors
from .ridge import Fit, Layer, Regression
from .walks import Stop, Walk

logger = logging.getLogger(__name__)

Run = Callable[[Stop], None]  # a forward that can be stopped, and whose output nobody needs

ROWS_PER_FEATURE = 32  # a regression looks at so many rows for each of its features; more change little
BATCHES_LOOKED_AT = 4  # to find out which weights can be fitted


class Compensation:
    """Gives a cut model new weights, in place.

    Attributes:
        weights: the matrices that are fitted.
        changed: the names of the parameters and buffers that this may change.
        fits: the last fit of every weight, by its label.
    """

    def __init__(self, dense: nn.Module, small: nn.Module, forwards: Sequence[Forward]) -> None:
        """Looks at the dense model, once.

        Args:
            dense: the model before any cut; it stays as it is.
            small: a `light_copy` of it, which will be cut.
            forwards: all batches.
        """
        self._dense = dense
        self._small = small
        self._forwards = forwards
        self._rows = [Rows(forward, seed) for seed, forward in enumerate(forwards)]
        self._fittable, self._batch_norms = fittable_weights(dense, forwards[:BATCHES_LOOKED_AT])
        self.fits: dict[str, Fit] = {}
        self.changed = {*self._batch_norms, *self._batch_norms.values()}
        for mixing, fittable in self._fittable.items():
            self.changed.add(mixing.name)
            if fittable.bias is not None:
                self.changed.add(fittable.bias)

    @property
    def weights(self) -> list[Mixing]:
        return list(self._fittable)

    def fit_(self, cut: Cut, advance: Callable[[int], None] = lambda number: None) -> None:
        """Fits all weights anew after a cut.

        Args:
            cut: all that has been cut out of the dense model.
            advance: is called with the number of weights that were fitted.
        """
        unshare_(self._small, self._dense, self.changed)
        fitting = _Fitting(self._dense, self._small, cut, self._fittable)
        steady = {mixing for mixing, fittable in self._fittable.items() if fittable.is_steady}
        unsteady = [mixing for mixing in self._fittable if mixing not in steady]
        self._small.eval()
        with evaluating(self._dense):
            one_by_one_(self._dense)
            for group in fitting.groups_in_memory(unsteady):
                self._fit_on_dense_(group, fitting)
                advance(len(group))
            if steady or self._batch_norms:
                self._fit_in_step_(steady, fitting, advance)
        self.fits |= fitting.fits
        short = [name for name, fit in fitting.fits.items() if fit.is_short_of_rows]
        if short:
            logger.warning(
                "%d weights, %s for one, read more features than the batches have rows: they stay near what they "
                "were, or are fitted to these batches alone; pass more of them",
                len(short), short[0],
            )  # fmt: skip

    # on the dense model alone --------------------------------------------------------------------

    def _fit_on_dense_(self, mixings: Sequence[Mixing], fitting: _Fitting) -> None:
        """Fits weights by what the dense model alone shows: of experts, which get other tokens in the cut model, and
        of weights that a forward uses more than once."""
        regressions = {mixing: Regression() for mixing in mixings}
        tensors = Tensors(self._dense)
        for forward, rows in zip(self._forwards, self._rows, strict=True):

            def after(seen: Seen, output: Any, rows: Rows = rows) -> None:
                if isinstance(seen, Product) and seen.mixing in regressions:
                    x = fitting.features_left(seen.mixing, seen.features())
                    y = fitting.results_left(seen.mixing, self._results(seen, output))
                    self._add_rows(regressions[seen.mixing], x, y, rows)

            with Watched(tensors, after=after):
                forward.run(self._dense)
        for mixing, regression in regressions.items():
            fitting.fit_(mixing, regression)

    def _results(self, product: Product, output: Tensor) -> Tensor:
        """What a layer of the dense model returns, without what it adds, unless that is fitted."""
        results = product.results(output)
        if product.added is not None and self._fittable[product.mixing].bias is None:
            results = results - product.added
        return results

    def _add_rows(self, regression: Regression, x: Tensor, y: Tensor, rows: Rows) -> None:
        """Adds rows of one batch to a regression, so many that all batches together give it enough.

        Args:
            x: (rows, features). y: (rows, results).
        """
        num_features = x.shape[1]
        most = max(1, ROWS_PER_FEATURE * num_features // len(self._forwards))
        counting = rows.counting(len(x), x.device, most)
        regression.add(x[counting], y[counting])

    # on both models ------------------------------------------------------------------------------

    def _fit_in_step_(self, mixings: set[Mixing], fitting: _Fitting, advance: Callable[[int], None]) -> None:
        """Fits weights while all batches walk through both models."""
        one_by_one_(self._small)
        to_come = set(mixings)
        try:
            self._walk_(to_come, fitting, advance)
        except OTOError:
            raise
        except Exception as error:
            # a forward that keeps something in its modules may find what that of another batch has put there
            raise_if_out_of_memory(error)
            logger.info("batches can't walk together: %s: %s", type(error).__name__, error)
            self._fit_on_dense_(list(to_come), fitting)
            advance(len(to_come))

    def _walk_(self, to_come: set[Mixing], fitting: _Fitting, advance: Callable[[int], None]) -> None:
        """See `_fit_in_step_`; what has been fitted is taken out of `to_come`."""
        norms_to_come = set(self._batch_norms)
        pairs = []
        for forward, rows in zip(self._forwards, self._rows, strict=True):
            in_dense = Walk(self._stopping_after(forward, to_come, norms_to_come))
            in_small = Walk(self._stopping_before(forward, to_come, norms_to_come))
            pairs.append(_Pair(in_dense, in_small, rows))
        try:
            for pair in pairs:
                pair.small.go_on()
            while standing := [pair for pair in pairs if pair.small.at is not None]:
                stop = standing[0].stop
                together = [pair for pair in standing if pair.stop == stop]
                if isinstance(stop, str):
                    self._renew_(stop, together, fitting)
                    norms_to_come.discard(stop)
                else:
                    self._fit_at_stop_(stop, together, fitting)
                    to_come.discard(stop)
                    advance(1)
                for pair in together:
                    pair.small.go_on()
        finally:
            for pair in pairs:
                pair.dense.end()
                pair.small.end()

    def _renew_(self, name: str, pairs: Sequence[_Pair], fitting: _Fitting) -> None:
        """Takes the statistics of a batch norm anew, at which these batches have come together."""
        in_small = [pair.small.at[1] for pair in pairs]
        in_dense = [pair.result_of_dense() for pair in pairs]
        goes_the_same_way = all(seen is not None for seen in in_dense)
        if goes_the_same_way:
            fitting.renew_(name, in_small, in_dense)
        for pair in pairs:
            pair.dense.go_on()

    def _fit_at_stop_(self, mixing: Mixing, pairs: Sequence[_Pair], fitting: _Fitting) -> None:
        """Fits the weight before which these batches have come together."""
        regression = Regression()
        for pair in pairs:
            x = pair.small.at[1].features()
            y = pair.result_of_dense()
            if y is not None and len(x) == len(y):
                self._add_rows(regression, x, fitting.results_left(mixing, y), pair.rows)
            # results are large where they are logits, so those of one batch at a time are in memory
            del x, y
            pair.dense.go_on()
        fitting.fit_(mixing, regression)

    def _stopping_after(self, forward: Forward, products: set[Mixing], norms: set[str]) -> Run:
        """A forward of the dense model that stops after products, with their results, and after batch norms.

        It also stops before products, with None, so that the results of all batches are not in memory together.
        """
        tensors = Tensors(self._dense)

        def run(stop: Stop) -> None:
            def before(seen: Seen) -> None:
                if isinstance(seen, Product) and seen.mixing in products:
                    stop((seen.mixing, None))

            def after(seen: Seen, output: Any) -> None:
                if isinstance(seen, Normalization):
                    if tensors.named(seen.mean) in norms:
                        stop((tensors.named(seen.mean), seen))
                elif seen.mixing in products:
                    stop((seen.mixing, self._results(seen, output)))

            with Watched(tensors, before, after):
                forward.run(self._dense)

        return run

    def _stopping_before(self, forward: Forward, products: set[Mixing], norms: set[str]) -> Run:
        """A forward of the cut model that stops before products and batch norms, with what they are computed of."""
        tensors = Tensors(self._small)

        def run(stop: Stop) -> None:
            def before(seen: Seen) -> None:
                if isinstance(seen, Normalization):
                    if tensors.named(seen.mean) in norms:
                        stop((tensors.named(seen.mean), seen))
                elif seen.mixing in products:
                    stop((seen.mixing, seen))

            with Watched(tensors, before):
                forward.run(self._small)

        return run


class _Pair(NamedTuple):
    """The walks of one batch through both models, and which of its rows count."""

    dense: Walk
    small: Walk
    rows: Rows

    @property
    def stop(self) -> Mixing | str:
        """Where the walk through the cut model stands: before a product, or before a batch norm (its means' name)."""
        return self.small.at[0]

    def result_of_dense(self) -> Tensor | Normalization | None:
        """What the dense model returns where the cut one stands; None: it doesn't come there."""
        while True:
            if self.dense.at is not None:
                stop, result = self.dense.at
                if stop == self.stop and result is not None:
                    return result
            self.dense.go_on()
            if self.dense.at is None:
                return None


class _Fitting:
    """What is fitted after one cut.

    Args:
        fittable: what is known of each weight.

    Attributes:
        fits: by the label of the weight.
    """

    def __init__(self, dense: nn.Module, small: nn.Module, cut: Cut, fittable: Mapping[Mixing, Fittable]) -> None:
        self._dense_shapes = {name: tensor.shape for name, tensor in named_tensors(dense).items()}
        self._tensors = named_tensors(small)
        self._positions_gone = cut.positions
        self._fittable = fittable
        self.fits: dict[str, Fit] = {}

    def groups_in_memory(self, mixings: Sequence[Mixing]) -> list[list[Mixing]]:
        """Groups of weights whose moments together take no more memory than the cut model, or one weight each."""
        num_weights = sum(tensor.numel() for tensor in self._tensors.values())
        groups: list[list[Mixing]] = []
        num_moments = num_weights  # of the last group; the first weight opens one
        for mixing in mixings:
            num_features = mixing.num_features(self._tensors[mixing.name])
            needed = 2 * num_features**2  # of the rows that are fitted, and of those that are held out
            if num_moments + needed > num_weights:
                groups.append([])
                num_moments = 0
            groups[-1].append(mixing)
            num_moments += needed
        return groups

    def _positions_left(self, name: str, dim: int, device: torch.device) -> Tensor:
        """The positions that are left of a dimension of a parameter or buffer."""
        gone = self._positions_gone.get(name, {}).get(dim, np.empty(0, int))
        return kept_positions(self._dense_shapes[name][dim], gone, device)

    def features_left(self, mixing: Mixing, features: Tensor) -> Tensor:
        """Those of the dense model's features that are left, (rows, features x kernel)."""
        left = self._positions_left(mixing.name, mixing.in_dim, features.device)
        num_features = self._dense_shapes[mixing.name][mixing.in_dim]
        by_feature = features.reshape(len(features), num_features, -1)  # (rows, features, kernel)
        return by_feature[:, left].flatten(1)

    def results_left(self, mixing: Mixing, results: Tensor) -> Tensor:
        """Those of the dense model's results that are left, (rows, results)."""
        left = self._positions_left(mixing.name, mixing.out_dim, results.device)
        return results[:, left]

    def renew_(self, name: str, in_small: Sequence[Normalization], in_dense: Sequence[Normalization]) -> None:
        """Puts new statistics into a batch norm of the cut model.

        Args:
            name: of its means.
            in_small, in_dense: what it normalises in the cut and in the dense model, in all batches.
        """
        mean, variance = in_small[0].mean, in_small[0].variance
        left = self._positions_left(name, 0, mean.device)
        renewed = aligned_statistics(in_small, in_dense, left)
        if renewed is not None:
            mean.copy_(renewed.mean)
            variance.copy_(renewed.variance)

    def fit_(self, mixing: Mixing, regression: Regression) -> None:
        """Puts the weights of a regression into the cut model."""
        weight = self._tensors[mixing.name]
        name_of_bias = self._fittable[mixing].bias
        bias = None if name_of_bias is None else self._tensors[name_of_bias].data
        fit = regression.fit(Layer(mixing.matrix(weight), bias), mixing.name)
        mixing.write_(weight, fit.layer.weight)
        if bias is not None:
            bias.copy_(fit.layer.bias)
        self.fits[mixing.label] = fit._replace(layer=None)  # which is in the model now
