"""Widths that a stock config can say: which of its numbers makes which axes, and the stock model in the end.

With `uniform=True` axes that one number makes lose equal shares, so the compact model needs no record.

Worked example: `intermediate_size=3072` makes the 12 axes of 3072 FFN units of a model of 12 layers. They form one
`Tie` of 3072 steps: after half of each axis has gone, the config with intermediate_size=1536 builds the compact model.
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
from .zigs import PrunableAxis, PruningPlan, ZIGPartition

Path = tuple[str | int, ...]  # ("vision_config", "hidden_sizes", 2)


class Tie(NamedTuple):
    """Axes that keep the same fraction, a multiple of 1 / `steps`, and the numbers of the config that say which."""

    numbers: Mapping[Path, int]
    axes: tuple[str, ...]
    steps: int


def find_ties(model: PreTrainedModel, partition: ZIGPartition, inputs: Inputs) -> tuple[Tie, ...]:
    """The ties of a model, found by trying.

    Numbers of the config are changed, one or two at a time, and the model is built without weights. The numbers and
    some axes are a tie if all shapes change as the cut of these axes changes them and, where there are weights, the
    outputs are those of the cut model.

    Raises:
        OTOError: the config can't say any width that can be cut.
    """
    ties: list[Tie] = []
    tied: set[str] = set()  # the axes of these
    for tie in _candidates(model, partition):
        if tied & set(tie.axes):
            continue
        if model.device.type == "meta" or _builds_the_cut_model(model, partition, tie, inputs):
            ties.append(tie)
            tied |= set(tie.axes)
    if not ties:
        raise OTOError(
            f"uniform=True: no number in the config of {type(model).__name__} says a width that can be cut; without "
            "it every layer gets a width of its own, and the checkpoint a record of them"
        )
    return tuple(ties)


def _candidates(model: PreTrainedModel, partition: ZIGPartition) -> Iterator[Tie]:
    """The ties by shape alone: those of one number first, then those of two of the other numbers together."""
    if not isinstance(model, PreTrainedModel) or "oto" in vars(model.config):
        return
    axis_sizes = {axis.size for axis in partition.axes}
    numbers: dict[Path, int] = {}
    for path, number in _numbers(model.config):
        # A number that makes an axis counts its ZIGs, their positions, or groups of ZIGs.
        if number > 1 and any(number % size == 0 or size % number == 0 for size in axis_sizes):
            numbers[path] = number
    single_ties = {path: _tie(model, partition, {path: number}) for path, number in numbers.items()}
    yield from (tie for tie in single_ties.values() if tie is not None)
    untied = [path for path, tie in single_ties.items() if tie is None]
    for pair in itertools.combinations(untied, 2):
        tie = _tie(model, partition, {path: numbers[path] for path in pair})
        if tie is not None:
            yield tie


def _builds_the_cut_model(model: PreTrainedModel, partition: ZIGPartition, tie: Tie, inputs: Inputs) -> bool:
    """Whether the config with other numbers computes what the model does without half of the tied axes."""
    kept: dict[str, range] = {}
    for axis in partition.axes:
        if axis.name in tie.axes:
            kept[axis.name] = range(axis.size * (tie.steps // 2) // tie.steps)
    plan = PruningPlan(kept)
    with TrialCut(model, resolve(partition, plan, warn=False)) as small:
        return plain(small, partition, plan, [tie], inputs) is not None


def plain(
    small: PreTrainedModel, partition: ZIGPartition, plan: PruningPlan, ties: Sequence[Tie], inputs: Inputs
) -> PreTrainedModel | None:
    """A stock model with the weights of a cut one, whose config says its widths; None if it isn't the same model."""
    config = copy.deepcopy(small.config)
    vars(config).pop("oto", None)
    for tie in ties:
        axis = next(axis for axis in partition.axes if axis.name == tie.axes[0])
        num_kept = len(plan.kept.get(axis.name, range(axis.size)))
        _set(config, {path: number * num_kept // axis.size for path, number in tie.numbers.items()})
    try:
        stock = stock_model(small, config)
        stock.load_state_dict(small.state_dict())
    except (RuntimeError, ValueError):  # the weights don't fit, or the config has other demands
        return None
    difference, tolerance = outputs_differ(small, stock, inputs)
    return stock if difference <= tolerance else None


def _tie(model: PreTrainedModel, partition: ZIGPartition, numbers: Mapping[Path, int]) -> Tie | None:
    """The axes that these numbers make, None if they make something else too, or nothing."""
    axes = _axes_that_shrink(model, partition, numbers)
    steps = math.gcd(*numbers.values(), *(axis.size // axis.multiple for axis in axes))
    if not axes or steps < 2 or any(axis.size % axis.multiple for axis in axes):
        return None
    # Two shares: a number that is no width may fit one of them by chance.
    for share in {Fraction(steps // 2, steps), Fraction(steps - 1, steps)}:
        if _shapes(model, numbers, share) != _shapes_after_cut(model, partition, axes, share):
            return None
    return Tie(numbers, tuple(axis.name for axis in axes), steps)


def _axes_that_shrink(
    model: PreTrainedModel, partition: ZIGPartition, numbers: Mapping[Path, int]
) -> list[PrunableAxis]:
    """The axes whose weights all shrink when the numbers do, none if a weight comes or goes."""
    common = math.gcd(*numbers.values())
    prime = next((p for p in range(2, common + 1) if common % p == 0), None)
    if prime is None:
        return []
    shrunk = _shapes(model, numbers, Fraction(1, prime))
    dense = {name: p.shape for name, p in model.named_parameters()}
    if shrunk is None or shrunk.keys() != dense.keys():
        return []
    if any(len(shrunk[name]) != len(shape) for name, shape in dense.items()):
        return []
    smaller = set()
    for name, shape in dense.items():
        for dim, size in enumerate(shape):
            if shrunk[name][dim] < size:
                smaller.add((name, dim))
    axes = []
    for axis in partition.axes:
        slices = {(member.param, member.dim) for member in axis.members if member.param in dense}
        if slices <= smaller:
            axes.append(axis)
    return axes


def _shapes_after_cut(
    model: PreTrainedModel, partition: ZIGPartition, axes: Sequence[PrunableAxis], share: Fraction
) -> dict[str, torch.Size]:
    """The shapes of a model's parameters when this share of some axes is left."""
    plan = PruningPlan({axis.name: range(int(axis.size * share)) for axis in axes})
    cut = Cut(partition, plan.removed(partition), {}, {})
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    for name, lost_in_dims in cut.positions.items():
        if name in shapes:
            for dim, lost in lost_in_dims.items():
                shapes[name][dim] -= len(lost)
    return {name: torch.Size(shape) for name, shape in shapes.items()}


def _shapes(model: PreTrainedModel, numbers: Mapping[Path, int], share: Fraction) -> dict[str, torch.Size] | None:
    """The shapes of a model whose config has this share of some numbers, None where it can't be built."""
    config = copy.deepcopy(model.config)
    try:
        _set(config, {path: int(number * share) for path, number in numbers.items()})
        with torch.device("meta"):
            return {name: p.shape for name, p in type(model)(config).named_parameters()}
    except Exception:  # not every number is a possible one
        return None


def _numbers(config: PreTrainedConfig, path: Path = ()) -> Iterator[tuple[Path, int]]:
    """The ints of a config, of its lists and of its parts."""
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _numbers(value, (*path, name))
        elif name.startswith("_"):
            continue
        elif type(value) is int:
            yield (*path, name), value
        elif isinstance(value, (list, tuple)):
            for i, entry in enumerate(value):
                if type(entry) is int:
                    yield (*path, name, i), entry


def _set(config: PreTrainedConfig, numbers: Mapping[Path, int]) -> None:
    """Sets numbers in a config, in its lists and in its parts, in place."""
    for path, number in numbers.items():
        *parts, name = [step for step in path if isinstance(step, str)]
        owner = config
        for part in parts:
            owner = getattr(owner, part)
        index = path[-1]
        if isinstance(index, str):
            setattr(owner, name, number)
        else:
            entries = list(getattr(owner, name))
            entries[index] = number
            setattr(owner, name, entries)
