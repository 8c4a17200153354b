"""Widths that a stock config can say: which of its numbers makes which axes, and the plain model in the end.

Stands beside the optimizer: axes that one number makes lose equal shares, and the compact model needs no record.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .calls import Inputs
from .certificate import outputs_differ
from .cut import Cut, TrialCut, resolve
from .dense import stock_model
from .modeling_oto import OTOError
from .zigs import PruningPlan, ZIGPartition

Path = tuple[str | int, ...]  # ("vision_config", "hidden_sizes", 2)


class Tie(NamedTuple):
    """Axes that keep the same fraction, a multiple of 1 / `steps`, and the numbers of the config that say which."""

    numbers: Mapping[Path, int]
    axes: tuple[str, ...]
    steps: int


def find_ties(model: PreTrainedModel, partition: ZIGPartition, inputs: Inputs) -> tuple[Tie, ...]:
    """The ties of a model, by trying: numbers of the config are changed, one or two at a time, and the model is built
    without weights. Where all shapes change as the cut of some axes changes them, and with the weights the outputs
    too, the numbers and the axes are one.

    Raises:
        OTOError: the config can't say any width that can be cut.
    """
    found: list[Tie] = []
    if isinstance(model, PreTrainedModel) and "oto" not in vars(model.config):
        sizes = {axis.size for axis in partition.axes}
        numbers = {p: n for p, n in _numbers(model.config) if n > 1 and any(n % s == 0 or s % n == 0 for s in sizes)}
        singles = {path: _tie(model, partition, {path: n}) for path, n in numbers.items()}
        several = itertools.combinations([path for path, tie in singles.items() if tie is None], 2)
        pairs = (_tie(model, partition, {path: numbers[path] for path in pair}) for pair in several)
        for tie in filter(None, itertools.chain(singles.values(), pairs)):
            if {*tie.axes} & {name for other in found for name in other.axes}:
                continue
            half = {
                a.name: range(a.size * (tie.steps // 2) // tie.steps) for a in partition.axes if a.name in tie.axes
            }
            plan = PruningPlan(half)
            if model.device.type != "meta":
                with TrialCut(model, resolve(partition, plan, warn=False)) as small:
                    if plain(small, partition, plan, [tie], inputs) is None:
                        continue
            found.append(tie)
    if not found:
        raise OTOError(
            f"uniform=True: no number in the config of {type(model).__name__} says a width that can be cut; without "
            "it every layer gets a width of its own, and the checkpoint a record of them"
        )
    return tuple(found)


def plain(
    small: PreTrainedModel, partition: ZIGPartition, plan: PruningPlan, ties: Sequence[Tie], inputs: Inputs
) -> PreTrainedModel | None:
    """A stock model with the weights of a cut one, whose config says its widths; None if it isn't the same model."""
    config = copy.deepcopy(small.config)
    vars(config).pop("oto", None)
    for tie in ties:
        axis = next(axis for axis in partition.axes if axis.name == tie.axes[0])
        kept = len(plan.kept.get(axis.name, range(axis.size)))
        _set(config, {path: n * kept // axis.size for path, n in tie.numbers.items()})
    try:
        stock = stock_model(small, config)
        stock.load_state_dict(small.state_dict())
    except (RuntimeError, ValueError):  # the weights don't fit, or the config has other demands
        return None
    difference, tolerance = outputs_differ(small, stock, inputs)
    return stock if difference <= tolerance else None


def _tie(model: PreTrainedModel, partition: ZIGPartition, numbers: Mapping[Path, int]) -> Tie | None:
    """The axes that these numbers make, None if they make something else too, or nothing."""
    common = math.gcd(*numbers.values())
    prime = next((p for p in range(2, common + 1) if common % p == 0), 0)
    new = _shapes(model, numbers, Fraction(1, prime)) if prime else None
    old = {name: t.shape for name, t in model.named_parameters()}
    if new is None or new.keys() != old.keys() or any(len(new[name]) != len(old[name]) for name in old):
        return None
    moved = {(name, dim) for name in old for dim, n in enumerate(old[name]) if new[name][dim] < n}
    axes = [a for a in partition.axes if {(m.param, m.dim) for m in a.members if m.param in old} <= moved]
    steps = math.gcd(*numbers.values(), *(axis.size // axis.multiple for axis in axes))
    if not axes or steps < 2 or any(axis.size % axis.multiple for axis in axes):
        return None
    for share in {Fraction(steps // 2, steps), Fraction(steps - 1, steps)}:
        removed = PruningPlan({a.name: range(int(a.size * share)) for a in axes}).removed(partition)
        expected = {name: list(shape) for name, shape in old.items()}
        for name, dims in Cut(partition, removed, {}, {}).positions.items():
            for dim, gone in dims.items() if name in expected else ():
                expected[name][dim] -= len(gone)
        if _shapes(model, numbers, share) != {name: torch.Size(shape) for name, shape in expected.items()}:
            return None
    return Tie(numbers, tuple(axis.name for axis in axes), steps)


def _shapes(model: PreTrainedModel, numbers: Mapping[Path, int], share: Fraction) -> dict[str, torch.Size] | None:
    """The shapes of a model whose config has this share of some numbers, None where it can't be built."""
    config = copy.deepcopy(model.config)
    try:
        _set(config, {path: int(n * share) for path, n in numbers.items()})
        with torch.device("meta"):
            return {name: t.shape for name, t in type(model)(config).named_parameters()}
    except Exception:  # not every number is a possible one
        return None


def _numbers(config: PreTrainedConfig, path: Path = ()) -> Iterator[tuple[Path, int]]:
    """The ints of a config, of its lists and of its parts."""
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _numbers(value, (*path, name))
        elif not name.startswith("_"):
            items = enumerate(value) if isinstance(value, (list, tuple)) else [(None, value)]
            yield from (((*path, name, *[i] * (i is not None)), n) for i, n in items if type(n) is int)


def _set(config: PreTrainedConfig, numbers: Mapping[Path, int]) -> None:
    for path, n in numbers.items():
        names = [p for p in path if isinstance(p, str)]
        part = config
        for name in names[:-1]:
            part = getattr(part, name)
        if len(names) < len(path):
            values = list(getattr(part, names[-1]))
            values[path[-1]] = n
            n = values
        setattr(part, names[-1], n)
