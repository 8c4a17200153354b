"""Widths that a stock config can say: which of its numbers makes which axes, and the stock model in the end.

With `uniform=True`, axes that one number makes lose equal shares, so that the compact model needs no record.

Worked example: `intermediate_size=3072` makes the 12 axes of 3072 FFN units of a model of 12 layers. They form one
`Tie` of 3072 steps: after half of each axis has gone, the config with intermediate_size=1536 builds the compact model.
The config wants the 12 heads to divide `hidden_size=768`, so that number goes in 64 steps of 12.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import PreTrainedConfig, PreTrainedModel

from .calls import Inputs
from .certificate import outputs_differ
from .cut import Cut, TrialCut, resolve
from .dense import stock_config, stock_model
from .modeling_oto import OTOError
from .zigs import PrunableAxis, PruningPlan, ZIGPartition

Path = tuple[str | int, ...]  # ("vision_config", "hidden_sizes", 2)
Numbers = Mapping[Path, int]
Shapes = dict[str, torch.Size]  # of the parameters of a model, by name

MANY = 32  # of more steps not every width is tried


class Tie(NamedTuple):
    """Axes that keep the same fraction, a multiple of 1 / `steps`, and the numbers of the config that say it."""

    numbers: Numbers
    axes: tuple[str, ...]
    steps: int


def find_ties(model: PreTrainedModel, partition: ZIGPartition, inputs: Inputs) -> tuple[Tie, ...]:
    """The ties of a model, found by trying.

    Numbers of the config are changed, one or two at a time, and the model is built without weights. The numbers and
    some axes are a tie if the shapes change exactly as a cut of these axes changes them. If the model has weights, its
    outputs must be those of the cut model, too. The steps of a tie are as small as the config allows, whatever widths
    the ties before it have; `in_steps` makes a partition keep to them.

    Raises:
        OTOError: the config can't say any width that can be cut.
    """
    ties: list[Tie] = []
    tied_axes: set[str] = set()
    for tie in _candidates(model, partition):
        if not tied_axes.isdisjoint(tie.axes):
            continue  # an axis belongs to one tie only
        tie = _in_valid_steps(model.config, tie, ties)
        if tie is None:
            continue
        if model.device.type == "meta" or _builds_the_cut_model(model, partition, tie, inputs):
            ties.append(tie)
            tied_axes.update(tie.axes)
    if not ties:
        class_name = type(model).__name__
        raise OTOError(
            f"uniform=True: no number in the config of {class_name} says a width that can be cut; without "
            "uniform=True every layer gets a width of its own, and the checkpoint a record of the widths"
        )
    return tuple(ties)


def in_steps(partition: ZIGPartition, ties: Sequence[Tie]) -> ZIGPartition:
    """A partition whose axes keep a multiple of the steps of their ties; the same one if they do already."""
    steps_of_axis: dict[str, int] = {}
    for tie in ties:
        steps_of_axis |= dict.fromkeys(tie.axes, tie.steps)
    axes = []
    for axis in partition.axes:
        zigs_of_step = axis.size // steps_of_axis.get(axis.name, axis.size)
        multiple = math.lcm(axis.multiple, zigs_of_step)
        axes.append(dataclasses.replace(axis, multiple=multiple))
    if tuple(axes) == partition.axes:
        return partition
    return dataclasses.replace(partition, axes=tuple(axes))


def _in_valid_steps(config: PreTrainedConfig, tie: Tie, others: Sequence[Tie]) -> Tie | None:
    """A tie in the smallest steps with which the config is valid, whatever the others keep; None: there are none."""
    if not _is_valid(config, []):
        return tie  # then it says nothing of other widths
    for steps in range(tie.steps, 1, -1):
        coarser = tie._replace(steps=steps)
        if tie.steps % steps == 0 and _are_valid_together(config, coarser, others):
            return coarser
    return None


def _are_valid_together(config: PreTrainedConfig, tie: Tie, others: Sequence[Tie]) -> bool:
    """Whether the config is valid with what a tie may keep, alone and with what each of the others may keep."""
    if not all(_is_valid(config, [(tie, share)]) for share in _shares(tie)):
        return False
    for other in others:
        pairs = itertools.chain(
            itertools.product(_shares(tie), _few_shares(other)), itertools.product(_few_shares(tie), _shares(other))
        )
        if not all(_is_valid(config, [(tie, share), (other, of_other)]) for share, of_other in pairs):
            return False
    return True


def _shares(tie: Tie) -> list[Fraction]:
    """What a tie may keep, or a good part of it where that is much."""
    numbers_kept = range(1, tie.steps, -(-tie.steps // MANY))
    return [Fraction(number, tie.steps) for number in numbers_kept] + _few_shares(tie)


def _few_shares(tie: Tie) -> list[Fraction]:
    """What a tie keeps after the first step, about half-way, and after the last step."""
    numbers_kept = {tie.steps - 1, tie.steps // 2, 1}
    return [Fraction(number, tie.steps) for number in sorted(numbers_kept)]


def _is_valid(config: PreTrainedConfig, kept: Iterable[tuple[Tie, Fraction]]) -> bool:
    """Whether a config can be saved in which some ties keep these shares."""
    scaled = copy.deepcopy(config)
    try:
        for tie, share in kept:
            _scale_numbers_(scaled, tie.numbers, share)
        _validate(scaled)
    except Exception:  # not every number is a possible one
        return False
    return True


def _validate(config: PreTrainedConfig) -> None:
    """Raises as saving does where numbers of a config don't go together, and as loading does for its parts."""
    config.validate()
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            _validate(value)


def _candidates(model: PreTrainedModel, partition: ZIGPartition) -> Iterator[Tie]:
    """The ties by shape alone: those of one number first, then those of two of the other numbers together."""
    if not isinstance(model, PreTrainedModel) or "oto" in vars(model.config):
        return
    untied: dict[Path, int] = {}
    for path, number in _numbers(model.config):
        if not _may_make_an_axis(number, partition):
            continue
        tie = _tie(model, partition, {path: number})
        if tie is None:
            untied[path] = number
        else:
            yield tie
    for pair in itertools.combinations(untied.items(), 2):
        tie = _tie(model, partition, dict(pair))
        if tie is not None:
            yield tie


def _may_make_an_axis(number: int, partition: ZIGPartition) -> bool:
    """Whether a number may count the ZIGs of some axis, their positions, or groups of them."""
    if number < 2:
        return False
    sizes = {axis.size for axis in partition.axes}
    return any(number % size == 0 or size % number == 0 for size in sizes)


def _builds_the_cut_model(model: PreTrainedModel, partition: ZIGPartition, tie: Tie, inputs: Inputs) -> bool:
    """Whether the config with other numbers computes what the model does without half of the tied axes."""
    kept: dict[str, range] = {}
    for axis in partition.axes:
        if axis.name in tie.axes:
            zigs_of_step = axis.size // tie.steps
            kept[axis.name] = range(zigs_of_step * (tie.steps // 2))
    plan = PruningPlan(kept)
    cut = resolve(partition, plan, warn=False)
    with TrialCut(model, cut) as small:
        return plain(small, partition, plan, [tie], inputs) is not None


def plain(
    small: PreTrainedModel, partition: ZIGPartition, plan: PruningPlan, ties: Sequence[Tie], inputs: Inputs
) -> PreTrainedModel | None:
    """A stock model with the weights of a cut one, whose config says its widths.

    None if there is no such config (one may demand that heads divide a width), or if the outputs differ.
    """
    try:
        stock = built_by_config(small, partition, plan, ties)
        stock.load_state_dict(small.state_dict())
        _validate(stock.config)
    except (RuntimeError, ValueError, StrictDataclassClassValidationError):
        return None
    difference, tolerance = outputs_differ(small, stock, inputs)
    return stock if difference <= tolerance else None


def built_by_config(
    small: PreTrainedModel, partition: ZIGPartition, plan: PruningPlan, ties: Sequence[Tie]
) -> PreTrainedModel:
    """A stock model with the widths of a cut one, as its config says them; its weights are not yet the other's.

    Raises:
        RuntimeError, ValueError: no model can be built from the config.
    """
    size_of_axis = {axis.name: axis.size for axis in partition.axes}
    config = stock_config(small.config)
    for tie in ties:
        name = tie.axes[0]  # all of them keep the same fraction
        size = size_of_axis[name]
        num_kept = len(plan.kept[name]) if name in plan.kept else size
        _scale_numbers_(config, tie.numbers, Fraction(num_kept, size))
    return stock_model(small, config)


def _tie(model: PreTrainedModel, partition: ZIGPartition, numbers: Numbers) -> Tie | None:
    """The axes that these numbers make, None if they make something else too, or nothing."""
    axes = _axes_that_shrink(model, partition, numbers)
    steps = math.gcd(*numbers.values())
    for axis in axes:
        if axis.size % axis.multiple:
            return None
        steps = math.gcd(steps, axis.size // axis.multiple)
    if not axes or steps < 2:
        return None
    # Two shares: a number that is no width may fit one of them by chance.
    for num_steps_kept in {steps // 2, steps - 1}:
        share = Fraction(num_steps_kept, steps)
        shapes_after_cut = _shapes_after_cut(model, partition, axes, share)
        if _shapes(model, numbers, share) != shapes_after_cut:
            return None
    names = tuple(axis.name for axis in axes)
    return Tie(numbers, names, steps)


def _axes_that_shrink(model: PreTrainedModel, partition: ZIGPartition, numbers: Numbers) -> list[PrunableAxis]:
    """The axes whose weights all shrink when the numbers do, none if a weight appears or vanishes."""
    divisor = _smallest_divisor(math.gcd(*numbers.values()))
    if divisor is None:
        return []
    shrunk = _shapes(model, numbers, Fraction(1, divisor))
    dense = {name: parameter.shape for name, parameter in model.named_parameters()}
    if shrunk is None or shrunk.keys() != dense.keys():
        return []
    smaller: set[tuple[str, int]] = set()  # the dimensions of weights that the numbers make smaller
    for name, shape in dense.items():
        if len(shrunk[name]) != len(shape):
            return []
        for dim, size in enumerate(shape):
            if shrunk[name][dim] < size:
                smaller.add((name, dim))
    axes = []
    for axis in partition.axes:
        # buffers are not among the shapes
        in_weights = [member for member in axis.members if member.param in dense]
        if all((member.param, member.dim) in smaller for member in in_weights):
            axes.append(axis)
    return axes


def _smallest_divisor(number: int) -> int | None:
    """The smallest divisor above 1, None for the number 1."""
    for divisor in range(2, number + 1):
        if number % divisor == 0:
            return divisor
    return None


def _shapes_after_cut(
    model: PreTrainedModel, partition: ZIGPartition, axes: Sequence[PrunableAxis], share: Fraction
) -> Shapes:
    """The shapes of a model's parameters when this share of some axes is left."""
    kept = {}
    for axis in axes:
        num_kept = int(axis.size * share)
        kept[axis.name] = range(num_kept)
    removed = PruningPlan(kept).removed(partition)  # (num_zigs,)
    lost_positions = Cut(partition, removed, {}, {}).positions
    shapes: Shapes = {}
    for name, parameter in model.named_parameters():
        sizes = list(parameter.shape)
        for dim, lost in lost_positions.get(name, {}).items():
            sizes[dim] -= len(lost)
        shapes[name] = torch.Size(sizes)
    return shapes


def _shapes(model: PreTrainedModel, numbers: Numbers, share: Fraction) -> Shapes | None:
    """The shapes of a model whose config has this share of some numbers, None where it can't be built."""
    model_class = type(model)
    config = copy.deepcopy(model.config)
    try:
        _scale_numbers_(config, numbers, share)
        with torch.device("meta"):
            built = model_class(config)
    except Exception:  # not every number is a possible one
        return None
    return {name: parameter.shape for name, parameter in built.named_parameters()}


def _numbers(config: PreTrainedConfig, path: Path = ()) -> Iterator[tuple[Path, int]]:
    """The ints of a config, of its lists and of its parts."""
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _numbers(value, (*path, name))
        elif name.startswith("_"):
            continue  # what transformers notes for itself
        elif type(value) is int:  # a bool is an int, but no width
            yield (*path, name), value
        elif isinstance(value, (list, tuple)):
            for i, entry in enumerate(value):
                if type(entry) is int:
                    yield (*path, name, i), entry


def _scale_numbers_(config: PreTrainedConfig, numbers: Numbers, share: Fraction) -> None:
    """Sets this share of each number in a config, in its lists and in its parts, rounded down."""
    for path, number in numbers.items():
        scaled = int(number * share)
        *parts, name = [step for step in path if isinstance(step, str)]
        owner = config
        for part in parts:
            owner = getattr(owner, part)
        index = path[-1]
        if isinstance(index, str):
            setattr(owner, name, scaled)
        else:
            # a new list, as entries of a tuple can't be set
            entries = list(getattr(owner, name))
            entries[index] = scaled
            setattr(owner, name, entries)
