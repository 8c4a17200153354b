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
from .calls import Forward, outermost_pretrained, raise_if_out_of_memory
from .cut import Cut, kept_positions
from .evaluating import evaluating
from .mixing import Mixing, Normalization, Product, Seen, Tensors, Watched
from .modeling_oto import OTOError, named_tensors
from .restore import places
from .ridge import Fit, Layer, Regression
from .walks import Stop, Walk

logger = logging.getLogger(__name__)

ROWS_PER_FEATURE = 32  # a regression looks at so many rows for each of its features; more change little
FEWEST_VALUES = 100  # of which statistics of a batch norm are taken


def light_copy(model: nn.Module) -> nn.Module:
    """A copy of a model that shares its parameters and buffers."""
    shared = {id(tensor): tensor for tensor in named_tensors(model).values()}
    return copy.deepcopy(model, shared)


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


def one_by_one_(model: nn.Module) -> None:
    """Lets experts run one after the other, each on its own tokens, in place."""
    for part in outermost_pretrained(model).values():
        part.set_experts_implementation("eager")


class Place(NamedTuple):
    """What one forward shows of a matrix: how often it multiplies by it, and the name of the bias that it adds."""

    times: int
    bias: str | None


class Compensation:
    """Gives a cut model new weights, in place.

    Attributes:
        weights: the matrices that are fitted.
        changed: the names of the parameters and buffers that this may change.
        fits: the last fit of every weight, by its name.
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
        self._places, self._statistics = _looked_at(dense, forwards[0])
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
        to_fit = [mixing for mixing in self._places if mixing.name not in cut.scales]
        together = [mixing for mixing in to_fit if self._places[mixing].times == 1 and not mixing.index]
        apart = [mixing for mixing in to_fit if mixing not in together]
        self._small.eval()
        with evaluating(self._dense):
            one_by_one_(self._dense)
            for group in _fitting_in_memory(apart, fitting):
                self._fit_on_dense_(group, fitting)
                told(len(group))
            self._fit_in_step_(set(together), fitting, told)
        self.fits |= fitting.fits

    def _fit_on_dense_(self, mixings: Sequence[Mixing], fitting: _Fitting) -> None:
        """Fits weights by what the dense model alone shows: of experts, which get other tokens in the cut model, and
        of weights that a forward uses more than once."""
        regressions = {mixing: Regression() for mixing in mixings}
        tensors = Tensors(self._dense)
        for forward, rows in zip(self._forwards, self._rows, strict=True):

            def after(product: Product, output: Tensor, rows: Rows = rows) -> None:
                regression = regressions.get(product.mixing)
                if regression is not None:
                    x = fitting.features_left(product.mixing, product.features())
                    y = fitting.results_left(product.mixing, product.results(output))
                    self._add(regression, x, y, rows)

            with Watched(tensors, after=after):
                forward.run(self._dense)
        for mixing, regression in regressions.items():
            fitting.fit_(mixing, regression)

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
            in_dense = Walk(_stopping_after(self._dense, forward, to_come))
            in_small = Walk(_stopping_before(self._small, forward, to_come, statistics))
            pairs.append(_Pair(in_dense, in_small, rows))
        try:
            for pair in pairs:
                pair.small.go_on()
            while waiting := [pair for pair in pairs if pair.small.at is not None]:
                place = waiting[0].place
                here = [pair for pair in waiting if pair.place == place]
                if isinstance(place, str):
                    _renew_statistics_([pair.small.at[1] for pair in here])
                    statistics.discard(place)
                else:
                    regression = Regression()
                    for pair in here:
                        x = pair.small.at[1].features()
                        y = pair.result_of_dense()
                        if y is not None and len(x) == len(y):
                            self._add(regression, x, fitting.results_left(place, y), pair.rows)
                    fitting.fit_(place, regression)
                    to_come.discard(place)
                    told(1)
                for pair in here:
                    pair.small.go_on()
        finally:
            for pair in pairs:
                pair.dense.end()
                pair.small.end()


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
        parameter = self._tensors[mixing.name]
        return len(mixing.matrix(parameter))

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

    def fit_(self, mixing: Mixing, regression: Regression) -> None:
        """Puts the weights of a regression into the cut model."""
        weight = self._tensors[mixing.name]
        name_of_bias = self._places[mixing].bias
        bias = None if name_of_bias is None else self._tensors[name_of_bias].data
        fit = regression.fit(Layer(mixing.matrix(weight), bias), mixing.name)
        mixing.write_(weight, fit.layer.weight)
        if bias is not None:
            bias.copy_(fit.layer.bias)
        self.fits[mixing.name] = fit


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
            self.dense.go_on()
            if self.dense.at is None:
                return None
            place, result = self.dense.at
            if place == self.place:
                return result


def _stopping_after(model: nn.Module, forward: Forward, places_to_stop: set[Mixing]) -> Callable[[Stop], Any]:
    """A forward that stops after some multiplications, with what they have returned."""

    def run(stop: Stop) -> Any:
        def after(product: Product, output: Tensor) -> None:
            if product.mixing in places_to_stop:
                stop((product.mixing, product.results(output)))

        with Watched(Tensors(model), after=after):
            return forward.run(model)

    return run


def _stopping_before(
    model: nn.Module, forward: Forward, places_to_stop: set[Mixing], statistics: set[str]
) -> Callable[[Stop], Any]:
    """A forward that stops before some multiplications and batch norms, with what they will be computed of."""
    tensors = Tensors(model)

    def run(stop: Stop) -> Any:
        def before(seen: Seen) -> None:
            if isinstance(seen, Product):
                if seen.mixing in places_to_stop:
                    stop((seen.mixing, seen))
            elif tensors.name_of(seen.mean) in statistics:
                stop((tensors.name_of(seen.mean), seen))

        with Watched(tensors, before):
            return forward.run(model)

    return run


def _renew_statistics_(seen: Sequence[Normalization]) -> None:
    """Puts the mean and the variance of what a batch norm takes in all batches into its buffers."""
    count = 0
    total: Tensor | float = 0.0
    squares: Tensor | float = 0.0
    for each in seen:
        values = each.input.movedim(1, -1).reshape(-1, each.input.shape[1]).float()
        count += len(values)
        total = total + values.sum(0)
        squares = squares + values.square().sum(0)
    if count >= FEWEST_VALUES:
        mean = total / count
        variance = (squares / count - mean.square()).clamp_min(0) * count / (count - 1)
        seen[0].mean.copy_(mean)
        seen[0].variance.copy_(variance)


def _looked_at(model: nn.Module, forward: Forward) -> tuple[dict[Mixing, Place], dict[str, str]]:
    """What a forward multiplies by, in order, and its batch norms: name of the means -> name of the variances."""
    found: dict[Mixing, Place] = {}
    statistics: dict[str, str] = {}
    with evaluating(model):
        one_by_one_(model)
        tensors = Tensors(model)

        def before(seen: Seen) -> None:
            if isinstance(seen, Normalization):
                mean, variance = tensors.name_of(seen.mean), tensors.name_of(seen.variance)
                if mean is not None and variance is not None:
                    statistics[mean] = variance
            else:
                times = found[seen.mixing].times if seen.mixing in found else 0
                found[seen.mixing] = Place(times + 1, tensors.name_of(seen.bias))

        with Watched(tensors, before):
            forward.run(model)
    refused = _used_otherwise(model, found)
    return {mixing: place for mixing, place in found.items() if mixing.name not in refused}, statistics


def _used_otherwise(model: nn.Module, mixings: Mapping[Mixing, Place]) -> set[str]:
    """The parameters that stay as they are cut: tied ones, and those that are read along several dimensions."""
    names_of_id: dict[int, list[str]] = {}
    for name, tensor in named_tensors(model).items():
        names_of_id.setdefault(id(tensor), []).append(name)
    refused = {name for names in names_of_id.values() if len(names) > 1 for name in names}
    dims_of_name: dict[str, set[tuple[int, int]]] = {}
    for mixing in mixings:
        dims_of_name.setdefault(mixing.name, set()).add((mixing.in_dim, mixing.out_dim))
    return refused | {name for name, dims in dims_of_name.items() if len(dims) > 1}


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
