"""What a target means for some axes: how many ZIGs of each may go, and how much has to go in all.

`limits_of` turns floors, multiples and ties into `Limits`, and `budget_of` turns the target into a `Budget`. choice.py
chooses the ZIGs by both. These are pure functions of arrays, without a model or an optimizer.

Worked example: an axis of 10 units of which a multiple of 4 has to stay loses 2 units first (8 stay), then 4 more (4
stay), then none, as at least one has to stay. So 6 units are removable. If 60 of 100 ZIGs are to be left in all, the
budget counts ZIGs, and its goal is 60.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from .cost import Work
from .zigs import PrunableAxis, ZIGPartition

FRACTIONS_REMOVED = ("target_group_sparsity", "target_per_axis")  # the other targets are fractions that are left


class Target(NamedTuple):
    """What a run is to reach."""

    kind: str  # the name of the argument
    value: Any  # a fraction; of target_per_axis fractions by regular expression


def the_target(targets: Mapping[str, Any]) -> Target:
    """The one target that is given, by the name of its argument; a group sparsity of 0.5 if none is given.

    Raises:
        ValueError: several targets are given, or the target is out of its range.
    """
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are both given: one target at a time")
    kind, value = next(iter(given.items()), ("target_group_sparsity", 0.5))
    if kind == "target_per_axis" and not isinstance(value, Mapping):
        raise ValueError(f"target_per_axis is {value!r}: it must be a dict, regular expression -> fraction")
    if kind == "target_per_axis":
        check_patterns(kind, value)
    fractions = value.values() if kind == "target_per_axis" else [value]
    for fraction in fractions:
        if not isinstance(fraction, Real) or isinstance(fraction, bool):
            raise ValueError(f"{kind} is {value!r}: {fraction!r} is no number")
        if kind in FRACTIONS_REMOVED and not 0 <= fraction < 1:
            raise ValueError(f"{kind} is {value}: it must be in [0, 1)")
        if kind not in FRACTIONS_REMOVED and not 0 < fraction <= 1:
            raise ValueError(f"{kind} is {value}: it must be in (0, 1]")
    return Target(kind, value)


def check_limits(min_keep: float, group_divisible: int | None) -> None:
    """Raises ValueError if one of these arguments is out of its range."""
    if not 0 <= min_keep < 1:
        raise ValueError(f"min_keep is {min_keep}: it must be in [0, 1)")
    if group_divisible is not None and not (type(group_divisible) is int and group_divisible >= 1):
        raise ValueError(f"group_divisible is {group_divisible!r}: it must be a whole number of at least 1")


def check_patterns(name: str, patterns: Iterable[str]) -> None:
    """Raises ValueError where an argument, by its name, holds what is no regular expression."""
    if not isinstance(patterns, Iterable):
        raise ValueError(f"{name} is {patterns!r}: it must be a list of regular expressions")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (TypeError, re.error) as error:
            raise ValueError(f"{name} has {pattern!r}, which is no regular expression: {error}") from error


@dataclass(frozen=True)
class Limits:
    """How many ZIGs of every axis may go. Arrays are (axes,).

    Attributes:
        sizes: ZIGs of every axis.
        kept_multiple: the number of ZIGs that stay is a multiple of this, unless all of them stay.
        removable: how many ZIGs may go at most.
        tie: the number of the first of those axes that keep equal fractions. An axis without a tie has its own number.
        is_bottleneck: whether all that the output learns of the inputs goes through the axis.
    """

    sizes: np.ndarray
    kept_multiple: np.ndarray
    removable: np.ndarray
    tie: np.ndarray
    is_bottleneck: np.ndarray

    @property
    def first_block(self) -> np.ndarray:
        """How many ZIGs have to go at first, so that a multiple of `kept_multiple` stays, (axes,)."""
        return (self.sizes - 1) % self.kept_multiple + 1

    def in_blocks(self, zigs: np.ndarray) -> np.ndarray:
        """How many blocks a number of ZIGs of every axis, (axes,), fills, (axes,); rounded up."""
        return -(-zigs // self.kept_multiple)

    def in_zigs(self, blocks: np.ndarray) -> np.ndarray:
        """How many ZIGs a number of first blocks of every axis, (axes,), holds, (axes,)."""
        of_later_blocks = (blocks - 1) * self.kept_multiple
        return np.where(blocks > 0, self.first_block + of_later_blocks, 0)

    @property
    def axis_of(self) -> np.ndarray:
        """The axis of every ZIG, (num_zigs,)."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    def count(self, zigs: np.ndarray) -> np.ndarray:
        """The sum of a vector over the ZIGs of every axis, (axes,)."""
        return np.bincount(self.axis_of, weights=zigs, minlength=len(self.sizes))


@dataclass(frozen=True)
class Budget:
    """How much has to go.

    Attributes:
        work: what is counted: ZIGs, parameters or MACs.
        goal: how much of the work is left in the end.
        cost_of_zig: how much of the work one ZIG of every axis takes when it is the first to go, (axes,).
        exact: whether the goal is a number of ZIGs that is met exactly, even if one axis then keeps a number of ZIGs
            that is no multiple.
    """

    work: Work
    goal: float
    cost_of_zig: np.ndarray
    exact: bool

    @property
    def dense(self) -> float:
        """How much work the whole model is."""
        return self.work.left(np.zeros(self.work.lost.shape[1]))


def limits_of(
    axes: Sequence[PrunableAxis],
    target: Target,
    min_keep: float = 0.0,
    group_divisible: int | None = 1,
    tied: Sequence[Sequence[str]] | None = None,
) -> Limits:
    """The limits that floors, multiples and ties set; see `DHSPG` for the arguments.

    Raises:
        ValueError: an axis can't lose what `target_per_axis` asks for, or one of its patterns matches no axis.
    """
    sizes = np.array([axis.size for axis in axes], int)
    above_floor = []  # how many ZIGs of each axis are above its floor
    for axis in axes:
        floor = math.ceil(min_keep * axis.size - 1e-9)  # 0.07 * 100 is a little more than 7
        above_floor.append(axis.size - max(1, floor))
    if target.kind == "target_per_axis":
        above_floor = _asked_per_axis(axes, target.value, above_floor, min_keep)
    if counts_exactly(target, group_divisible, tied) and group_divisible:
        # axes that have a multiple of their own (stacked experts) may lose any number: the cut leaves some as zeros
        multiple = np.ones(len(axes), int)
    else:
        multiple = np.array([_kept_multiple(axis, group_divisible) for axis in axes], int)
    if tied is not None:
        return _tied(axes, sizes, multiple, above_floor, tied)
    removable = np.zeros(len(axes), int)
    for number, size in enumerate(sizes):
        first_block = (size - 1) % multiple[number] + 1
        if above_floor[number] >= first_block:
            later_blocks = (above_floor[number] - first_block) // multiple[number]
            removable[number] = first_block + later_blocks * multiple[number]
    no_ties = np.arange(len(axes))
    return Limits(sizes, multiple, removable, no_ties, _are_bottlenecks(axes))


def _are_bottlenecks(axes: Sequence[PrunableAxis]) -> np.ndarray:
    return np.array([axis.bottleneck for axis in axes], bool)


def counts_exactly(target: Target, group_divisible: int | None, tied: Sequence[Sequence[str]] | None) -> bool:
    """Whether the target is a number of ZIGs that is met exactly."""
    return target.kind == "target_group_sparsity" and group_divisible in (None, 1) and tied is None


def _asked_per_axis(
    axes: Sequence[PrunableAxis], wanted: Mapping[str, float], above_floor: Sequence[int], min_keep: float
) -> list[int]:
    """How many ZIGs of each axis `target_per_axis` wants to go; see `limits_of`.

    Args:
        wanted: regular expression -> fraction of the ZIGs.
        above_floor: how many ZIGs of each axis may go at most.
    """
    names = [axis.name for axis in axes]
    for pattern in wanted:
        if not any(re.search(pattern, name) for name in names):
            known = f"for example {names[0]!r}" if names else "and there is none"
            raise ValueError(f"target_per_axis: {pattern!r} matches no axis, {known}")
    asked = []
    for axis, limit in zip(axes, above_floor, strict=True):
        matching = [fraction for pattern, fraction in wanted.items() if re.search(pattern, axis.name)]
        fraction = matching[0] if matching else 0  # the first pattern that matches counts
        count = round(fraction * axis.size)
        if count > limit:
            # rounded down, so that the fraction that the message names is feasible itself
            feasible = math.floor(1000 * limit / axis.size) / 1000
            raise ValueError(
                f"target_per_axis is not feasible for {axis.name}: with min_keep={min_keep} "
                f"at most {feasible} of it can go"
            )
        asked.append(count)
    return asked


def _kept_multiple(axis: PrunableAxis, group_divisible: int | None) -> int:
    """The number of ZIGs of which a multiple has to stay, so that the width that stays is divisible.

    A ZIG may be several channels wide. If the width must be a multiple of 8, then of ZIGs of 2 channels a multiple of
    4 has to stay, and of heads of 64 channels any number may stay.
    """
    producer = next(member for member in axis.members if member.role == "producer")
    _, channels_of_zig = producer.positions(axis.size).shape
    divisible = group_divisible
    if not divisible:
        # hardware likes multiples of 8, but of narrower layers they would leave few widths to choose from
        divisible = 8 if channels_of_zig * axis.size >= 64 else 1
    zigs = divisible // math.gcd(divisible, channels_of_zig)
    return math.lcm(axis.multiple, zigs)


def _tied(
    axes: Sequence[PrunableAxis],
    sizes: np.ndarray,
    multiple: np.ndarray,
    above_floor: Sequence[int],
    tied: Sequence[Sequence[str]],
) -> Limits:
    """The limits if the axes in each entry of `tied` lose equal fractions; an axis without a tie stays whole.

    Worked example: axes of 12 and of 6 ZIGs can keep k sixths of themselves. If a multiple of 4 has to stay of the
    first one, these are k = 2, 4, 6, so that the axes lose 4 and 2 ZIGs at a time.
    """
    tie = np.arange(len(axes))
    multiple = multiple.copy()
    removable = np.zeros(len(axes), int)
    number_of_axis = {axis.name: number for number, axis in enumerate(axes)}
    for names in tied:
        tied_axes = [number_of_axis[name] for name in names if name in number_of_axis]
        if len(tied_axes) < len(names):  # one of them doesn't train
            continue
        tied_sizes = sizes[tied_axes].tolist()
        num_fractions = math.gcd(*tied_sizes)  # each axis can keep any k / num_fractions
        step = 1  # k has to be a multiple of this
        for number, size in zip(tied_axes, tied_sizes, strict=True):
            zigs_of_fraction = size // num_fractions
            own_multiple = int(multiple[number])
            step = math.lcm(step, own_multiple // math.gcd(own_multiple, zigs_of_fraction))
        if num_fractions % step:  # no fraction but the whole is possible for all of them
            continue
        tie[tied_axes] = tied_axes[0]
        multiple[tied_axes] = [step * size // num_fractions for size in tied_sizes]
        num_blocks = min(above_floor[number] // multiple[number] for number in tied_axes)
        removable[tied_axes] = multiple[tied_axes] * num_blocks
    return Limits(sizes, multiple, removable, tie, _are_bottlenecks(axes))


def budget_of(
    target: Target,
    limits: Limits,
    axes: Sequence[PrunableAxis],
    partition: ZIGPartition,
    parameters: Work,
    exact: bool,
    min_keep: float = 0.0,
) -> Budget:
    """What a target means for some axes of a partition.

    Args:
        axes: those that are pruned.
        parameters: the parameters of the whole model.
        exact: see `Budget`.

    Raises:
        ValueError: the target is not feasible; the message says which one would be.
    """
    if target.kind in FRACTIONS_REMOVED:
        terms = []  # one for each axis: its size, of which each ZIG takes 1
        for number, size in enumerate(limits.sizes.tolist()):
            width = (size, ((number, 1),))
            terms.append([width])
        work = Work.of(terms, len(axes))
    else:
        whole = parameters if target.kind == "target_params" else partition.work
        if whole is None:
            raise ValueError("this partition doesn't know its MACs: target_macs needs one of partition_zigs")
        columns = [partition.axes.index(axis) for axis in axes]
        work = whole._replace(lost=whole.lost[:, columns])
    dense = work.left(np.zeros_like(limits.sizes))
    least = work.left(limits.removable)
    if target.kind == "target_per_axis":
        goal = least
    elif target.kind == "target_group_sparsity":
        goal = dense - round(target.value * dense)
    else:
        goal = target.value * dense
    if goal < least:
        # rounded so that the fraction that the message names is feasible itself
        if target.kind in FRACTIONS_REMOVED:
            bound = f"at most {math.floor(1000 * (1 - least / dense)) / 1000}"
        else:
            bound = f"at least {math.ceil(1000 * least / dense) / 1000}"
        raise ValueError(
            f"{target.kind}={target.value} is not feasible: with min_keep={min_keep} it can be {bound}. Choose such a "
            "target, or let more go: a lower min_keep or group_divisible, less in protect, fewer frozen parameters"
        )
    # Salience is divided by this. A ZIG that costs next to nothing is to go last, and nothing is divided by 0.
    cost_of_zig = np.maximum(work.alone, 1e-9 * dense)
    return Budget(work, goal, cost_of_zig, exact)
