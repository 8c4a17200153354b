"""New weights for a model that was cut, by which it returns again what the dense model does, without training.

Whatever multiplies features by a weight gets the weights of a ridge regression (ridge.py): from the features that it
reads in the cut model to what the dense model returns at the same place. This is done from the first layer to the
last, each time with the new weights before it, so that later layers make up for errors of earlier ones. The statistics
of batch norms are taken anew on the way.

Worked example: in Linear(3, 8), ReLU, Linear(8, 2) the cut takes 4 of 8 units. The first layer reads what it read
before, so its 4 rows stay. The second one reads 4 features, and gets the weights that make of them what it made of 8.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .calibration import Rows
from .calls import Forward, raise_if_out_of_memory
from .cut import Cut, kept_positions
from .evaluating import evaluating
from .fittable import Place, looked_at, one_by_one_
from .mixing import Mixing, Normalization, Product, Seen, Tensors, Watched
from .modeling_oto import OTOError, named_tensors
from .restore import contents, places
from .ridge import HELD_OUT, TINY, Fit, Layer, Regression
from .walks import Stop, Walk
from .wide import wide_dtype

logger = logging.getLogger(__name__)

Run = Callable[[Stop], None]  # a forward that can be stopped, and whose output nobody needs

ROWS_PER_FEATURE = 32  # a regression looks at so many rows for each of its features; more change little
FEWEST_VALUES = 100  # of which statistics of a batch norm are taken
BATCHES_LOOKED_AT = 4


def light_copy(model: nn.Module) -> nn.Module:
    """A copy of a model that shares its parameters. Buffers are its own, because a forward may write to them.

    Raises:
        OTOError: the model keeps something that can't be copied.
    """
    shared: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    buffers = {id(buffer) for buffer in model.buffers()}
    for container, _ in contents(model).containers:
        for value in container.values() if isinstance(container, dict) else container:
            if isinstance(value, Tensor) and id(value) not in buffers:
                shared[id(value)] = value
    try:
        copied = copy.deepcopy(model, shared)
    except (TypeError, RuntimeError) as error:
        name = type(model).__name__
        raise OTOError(
            f"{name} can't be copied: {error}; take what can't be off the model while it is pruned"
        ) from error
    _refuse_ways_back(copied, model)
    return copied


def _refuse_ways_back(copied: nn.Module, model: nn.Module) -> None:
    """Raises OTOError where a copy still leads to the model: functions are not copied with what they close over."""
    modules = {id(vars(module)): path for path, module in model.named_modules()}
    for container, _ in contents(copied).containers:
        if id(container) in modules:
            name = type(model).__name__
            path = modules[id(container)] or "the model itself"
            raise OTOError(
                f"a hook, or a forward that was put in the place of another, leads to {path} in {name}, and would in "
                "its copy: take it off while the model is pruned"
            )


def own_(copied: nn.Module, model: nn.Module, names: Iterable[str]) -> None:
    """Gives a `light_copy` tensors of its own where it still shares these with the model."""
    of_model = named_tensors(model)
    of_copy = named_tensors(copied)
    places_of_id = places(copied)
    for name in names:
        shared = of_copy[name]
        if shared is not of_model[name]:
            continue
        own = shared.detach().clone()
        if isinstance(shared, nn.Parameter):
            own = nn.Parameter(own, shared.requires_grad)
        for place in places_of_id[id(shared)]:
            place.put(own)


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
        self._places, self._statistics = looked_at(dense, forwards[:BATCHES_LOOKED_AT])
        self.fits: dict[str, Fit] = {}
        self.changed = {*self._statistics, *self._statistics.values()}
        for mixing, place in self._places.items():
            self.changed.add(mixing.name)
            if place.bias is not None:
                self.changed.add(place.bias)

    @property
    def weights(self) -> list[Mixing]:
        return list(self._places)

    def fit_(self, cut: Cut, told: Callable[[int], None] = lambda number: None) -> None:
        """Fits all weights anew after a cut.

        Args:
            cut: all that has been cut out of the dense model.
            told: is called with the number of weights that were fitted.
        """
        own_(self._small, self._dense, self.changed)
        fitting = _Fitting(self._dense, self._small, cut, self._places)
        together = [mixing for mixing, place in self._places.items() if place.is_steady]
        apart = [mixing for mixing, place in self._places.items() if not place.is_steady]
        self._small.eval()
        with evaluating(self._dense):
            one_by_one_(self._dense)
            for group in _fitting_in_memory(apart, fitting):
                self._fit_on_dense_(group, fitting)
                told(len(group))
            if together or self._statistics:
                self._fit_in_step_(set(together), fitting, told)
        self.fits |= fitting.fits
        short = [name for name, fit in fitting.fits.items() if fit.is_short_of_rows]
        if short:
            logger.warning(
                "%d weights, %s for one, read more features than the batches have rows: they stay near what they "
                "were, or are fitted to these batches alone; pass more of them",
                len(short), short[0],
            )  # fmt: skip

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
                    self._add(regressions[seen.mixing], x, y, rows)

            with Watched(tensors, after=after):
                forward.run(self._dense)
        for mixing, regression in regressions.items():
            fitting.fit_(mixing, regression)

    def _results(self, product: Product, output: Tensor) -> Tensor:
        """What a layer of the dense model returns, without what it adds, unless that is fitted."""
        results = product.results(output)
        if product.added is not None and self._places[product.mixing].bias is None:
            results = results - product.added
        return results

    def _add(self, regression: Regression, x: Tensor, y: Tensor, rows: Rows) -> None:
        most = max(1, ROWS_PER_FEATURE * x.shape[1] // len(self._forwards))
        counting = rows.counting(len(x), x.device, most)
        regression.add(x[counting], y[counting])

    def _fit_in_step_(self, mixings: set[Mixing], fitting: _Fitting, told: Callable[[int], None]) -> None:
        """Fits weights while all batches walk through both models."""
        one_by_one_(self._small)
        to_come = set(mixings)
        try:
            self._walk_(to_come, fitting, told)
        except OTOError:
            raise
        except Exception as error:
            # a forward that keeps something in its modules may find what that of another batch has put there
            raise_if_out_of_memory(error)
            logger.info("batches can't walk together: %s: %s", type(error).__name__, error)
            rest = list(to_come)
            self._fit_on_dense_(rest, fitting)
            told(len(rest))

    def _walk_(self, to_come: set[Mixing], fitting: _Fitting, told: Callable[[int], None]) -> None:
        """See `_fit_in_step_`; what has been fitted is taken out of `to_come`."""
        statistics = set(self._statistics)
        pairs = []
        for forward, rows in zip(self._forwards, self._rows, strict=True):
            in_dense = Walk(self._stopping_after(forward, to_come, statistics))
            in_small = Walk(self._stopping_before(forward, to_come, statistics))
            pairs.append(_Pair(in_dense, in_small, rows))
        try:
            for pair in pairs:
                pair.small.go_on()
            while waiting := [pair for pair in pairs if pair.small.at is not None]:
                place = waiting[0].place
                here = [pair for pair in waiting if pair.place == place]
                if isinstance(place, str):
                    now = [pair.small.at[1] for pair in here]
                    fitting.renew_(place, now, [pair.result_of_dense() for pair in here])
                    statistics.discard(place)
                    for pair in here:
                        pair.dense.go_on()
                else:
                    regression = Regression()
                    for pair in here:
                        x = pair.small.at[1].features()
                        y = pair.result_of_dense()
                        if y is not None and len(x) == len(y):
                            self._add(regression, x, fitting.results_left(place, y), pair.rows)
                        del x, y
                        pair.dense.go_on()  # its results are large where they are logits
                    fitting.fit_(place, regression)
                    to_come.discard(place)
                    told(1)
                for pair in here:
                    pair.small.go_on()
        finally:
            for pair in pairs:
                pair.dense.end()
                pair.small.end()

    def _stopping_after(self, forward: Forward, places_to_stop: set[Mixing], statistics: set[str]) -> Run:
        """A forward of the dense model that stops after products, with their results, and after batch norms.

        It also stops before products, with None, so that the results of all batches are not in memory together.
        """
        tensors = Tensors(self._dense)

        def run(stop: Stop) -> None:
            def before(seen: Seen) -> None:
                if isinstance(seen, Product) and seen.mixing in places_to_stop:
                    stop((seen.mixing, None))

            def after(seen: Seen, output: Any) -> None:
                if isinstance(seen, Normalization):
                    if tensors.named(seen.mean) in statistics:
                        stop((tensors.named(seen.mean), seen))
                elif seen.mixing in places_to_stop:
                    stop((seen.mixing, self._results(seen, output)))

            with Watched(tensors, before, after):
                forward.run(self._dense)

        return run

    def _stopping_before(self, forward: Forward, places_to_stop: set[Mixing], statistics: set[str]) -> Run:
        """A forward of the cut model that stops before products and batch norms, with what they are computed of."""
        tensors = Tensors(self._small)

        def run(stop: Stop) -> None:
            def before(seen: Seen) -> None:
                if isinstance(seen, Normalization):
                    if tensors.named(seen.mean) in statistics:
                        stop((tensors.named(seen.mean), seen))
                elif seen.mixing in places_to_stop:
                    stop((seen.mixing, seen))

            with Watched(tensors, before):
                forward.run(self._small)

        return run


class _Fitting:
    """One cut, the places of what it leaves, and the fits after it."""

    def __init__(self, dense: nn.Module, small: nn.Module, cut: Cut, places_of: Mapping[Mixing, Place]) -> None:
        self._shapes = {name: tensor.shape for name, tensor in named_tensors(dense).items()}
        self._tensors = named_tensors(small)
        self._positions = cut.positions
        self._places = places_of
        self.fits: dict[str, Fit] = {}

    def num_features(self, mixing: Mixing) -> int:
        """How many features, each as often as the kernel has places, a weight reads after the cut."""
        return mixing.num_features(self._tensors[mixing.name])

    def _left(self, mixing: Mixing, dim: int, device: torch.device) -> Tensor:
        gone = self._positions.get(mixing.name, {}).get(dim, np.empty(0, int))
        return kept_positions(self._shapes[mixing.name][dim], gone, device)

    def features_left(self, mixing: Mixing, features: Tensor) -> Tensor:
        """Those of the dense model's features that are left, (rows, features x kernel)."""
        left = self._left(mixing, mixing.in_dim, features.device)
        num_features = self._shapes[mixing.name][mixing.in_dim]
        by_feature = features.reshape(len(features), num_features, -1)  # (rows, features, kernel)
        return by_feature[:, left].flatten(1)

    def results_left(self, mixing: Mixing, results: Tensor) -> Tensor:
        """Those of the dense model's results that are left, (rows, results)."""
        return results[:, self._left(mixing, mixing.out_dim, results.device)]

    def renew_(self, name: str, now: Sequence[Normalization], before: Sequence[Normalization | None]) -> None:
        """Puts new statistics into a batch norm of the cut model.

        Args:
            name: of its means.
            now, before: those of the cut and of the dense model, in all batches.
        """
        of_dense = [each for each in before if each is not None]
        if len(of_dense) < len(now):  # the models go different ways
            return
        gone = self._positions.get(name, {}).get(0, np.empty(0, int))
        left = kept_positions(self._shapes[name][0], gone, now[0].mean.device)
        renewed = _renewed(now, of_dense, left)
        if renewed is not None:
            now[0].mean.copy_(renewed[0])
            now[0].variance.copy_(renewed[1])

    def fit_(self, mixing: Mixing, regression: Regression) -> None:
        """Puts the weights of a regression into the cut model."""
        weight = self._tensors[mixing.name]
        name_of_bias = self._places[mixing].bias
        bias = None if name_of_bias is None else self._tensors[name_of_bias].data
        fit = regression.fit(Layer(mixing.matrix(weight), bias), mixing.name)
        mixing.write_(weight, fit.layer.weight)
        if bias is not None:
            bias.copy_(fit.layer.bias)
        self.fits[mixing.label] = fit._replace(layer=None)


class _Pair(NamedTuple):
    """The walks of one batch through both models, and which of its rows count."""

    dense: Walk
    small: Walk
    rows: Rows

    @property
    def place(self) -> Mixing | str:
        """Where the walk through the cut model has stopped."""
        return self.small.at[0]

    def result_of_dense(self) -> Tensor | None:
        """What the dense model returns where the cut one has stopped; None: it doesn't come there."""
        while True:
            if self.dense.at is not None:
                place, result = self.dense.at
                if place == self.place and result is not None:
                    return result
            self.dense.go_on()
            if self.dense.at is None:
                return None


def _renewed(
    now: Sequence[Normalization], before: Sequence[Normalization], left: Tensor
) -> tuple[Tensor, Tensor] | None:
    """The statistics by which a batch norm returns values of the same mean and variance as in the dense model.

    Where the dense model's statistics are those of the batches, the new ones are those of the batches, too. None: the
    old ones are as good on values that are held out, or there are too few values.

    Args:
        now, before: those of the cut and of the dense model, in all batches.
        left: the channels that are left, (channels,).
    """
    wide = wide_dtype(now[0].input.device)
    x = torch.cat([_values(each) for each in now]).to(wide)  # (values, channels)
    y = torch.cat([_values(each)[:, left] for each in before]).to(wide)
    num_fitted = len(x) - len(x) // HELD_OUT
    if len(x) < FEWEST_VALUES or len(x) != len(y):
        return None
    of_dense = before[0].mean[left].to(wide), before[0].variance[left].to(wide)
    eps = before[0].eps
    wanted = _normalized(y[num_fitted:], *of_dense, eps)
    old = now[0].mean.to(wide), now[0].variance.to(wide)
    fitted = _aligned(x[:num_fitted], y[:num_fitted], *of_dense, eps)
    errors = [(_normalized(x[num_fitted:], *each, eps) - wanted).square().mean() for each in (old, fitted)]
    return _aligned(x, y, *of_dense, eps) if errors[1] < errors[0] else None


def _values(seen: Normalization) -> Tensor:
    """What is normalised, (values, channels)."""
    return seen.input.movedim(1, -1).reshape(-1, seen.input.shape[1])


def _normalized(values: Tensor, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
    return (values - mean) / (variance + eps).sqrt()


def _aligned(x: Tensor, y: Tensor, mean: Tensor, variance: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Statistics that give x the mean and the variance that y has by the given ones."""
    variance_of_y = y.var(0)
    # what is constant in the dense model says nothing of the scale
    ratio = torch.where(variance_of_y > TINY, x.var(0) / variance_of_y.clamp_min(TINY), 1.0)
    new_mean = x.mean(0) - (y.mean(0) - mean) * ratio.sqrt()
    new_variance = ratio * (variance + eps) - eps
    return new_mean, new_variance.clamp_min(0)


def _fitting_in_memory(mixings: Sequence[Mixing], fitting: _Fitting) -> list[list[Mixing]]:
    """Groups of weights whose regressions together take no more memory than the weights of the model, or one each."""
    most = sum(tensor.numel() for tensor in fitting._tensors.values())
    groups: list[list[Mixing]] = []
    taken = most
    for mixing in mixings:
        needed = 2 * fitting.num_features(mixing) ** 2
        if taken + needed > most:
            groups.append([])
            taken = 0
        groups[-1].append(mixing)
        taken += needed
    return groups
