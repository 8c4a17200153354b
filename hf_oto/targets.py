"""What a target means for some axes: how many ZIGs of each may go, and how much has to go in all.

`limits_of` turns floors, multiples and ties into `Limits`, and `budget_of` turns the target into a `Budget`; choice.py
chooses the ZIGs by both. These are pure functions of arrays, without a model or an optimizer.

Worked example: an axis of 10 units of which a multiple of 4 has to stay loses 2 units first (8 stay), then 4 more (4
stay), then none, as at least one has to stay: 6 are removable. If 60 of 100 ZIGs are to be left in all, the budget
counts ZIGs, and its goal is 60.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .cost import Work
from .zigs import PrunableAxis, ZIGPartition

FRACTIONS_REMOVED = ("target_group_sparsity", "target_per_axis")  # the other targets are fractions that are left


class Target(NamedTuple):
    """What a run is to reach."""

    kind: str  # the name of the argument
    value: Any  # a fraction, or fractions by regular expression


def the_target(targets: Mapping[str, Any]) -> Target:
    """The one target that is given, by the name of its argument; a group sparsity of 0.5 if none is.

    Raises:
        ValueError: several are given, or one is out of its range.
    """
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are both given: one target at a time")
    kind, value = next(iter(given.items()), ("target_group_sparsity", 0.5))
    fractions = value.values() if kind == "target_per_axis" else [value]
    for fraction in fractions:
        if kind in FRACTIONS_REMOVED and not 0 <= fraction < 1:
            raise ValueError(f"{kind} is {value}: it must be in [0, 1)")
        if kind not in FRACTIONS_REMOVED and not 0 < fraction <= 1:
            raise ValueError(f"{kind} is {value}: it must be in (0, 1]")
    return Target(kind, value)


@dataclass(frozen=True)
class Limits:
    """What of every axis may go. Arrays are (axes,).

    Attributes:
        sizes: ZIGs of every axis.
        kept_multiple: the number of ZIGs that stay is a multiple of this, unless all of them stay.
        removable: how many ZIGs may go at most.
        tie: the number of the first of the axes that keep equal fractions; of an axis without a tie, its own number.
    """

    sizes: np.ndarray
    kept_multiple: np.ndarray
    removable: np.ndarray
    tie: np.ndarray

    @property
    def first_block(self) -> np.ndarray:
        """How many ZIGs have to go at first, so that a multiple of `kept_multiple` stays, (axes,)."""
        return (self.sizes - 1) % self.kept_multiple + 1

    def in_blocks(self, zigs: np.ndarray) -> np.ndarray:
        """Numbers of ZIGs, (axes,), that fill whole blocks, as numbers of blocks, (axes,)."""
        return -(-zigs // self.kept_multiple)

    def in_zigs(self, blocks: np.ndarray) -> np.ndarray:
        """How many ZIGs the first blocks of every axis hold, (axes,), for numbers of blocks, (axes,)."""
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
        exact: whether the goal is a number of ZIGs that is met exactly, even if no multiple of one axis stays then.
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
    for a, size in enumerate(sizes):
        first_block = (size - 1) % multiple[a] + 1
        if above_floor[a] >= first_block:
            later_blocks = (above_floor[a] - first_block) // multiple[a]
            removable[a] = first_block + later_blocks * multiple[a]
    return Limits(sizes, multiple, removable, np.arange(len(axes)))


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
            raise ValueError(
                f"target_per_axis: {pattern!r} matches no axis, for example {names[0]!r}"
                if names
                else f"target_per_axis: {pattern!r} matches no axis, and there is none"
            )
    asked = []
    for axis, limit in zip(axes, above_floor, strict=True):
        # the first pattern that matches counts
        fraction = next((value for pattern, value in wanted.items() if re.search(pattern, axis.name)), 0)
        count = round(fraction * axis.size)
        if count > limit:
            feasible = math.floor(1000 * limit / axis.size) / 1000
            raise ValueError(
                f"target_per_axis is not feasible for {axis.name}: with min_keep={min_keep} "
                f"at most {feasible} of it can go"
            )
        asked.append(count)
    return asked


def _kept_multiple(axis: PrunableAxis, group_divisible: int | None) -> int:
    """The number of ZIGs of which a multiple has to stay, so that the width that stays is divisible.

    A ZIG may be several channels wide: where the width must be a multiple of 8, a multiple of 4 ZIGs of 2 channels, or
    any number of heads of 64 channels, may stay.
    """
    producer = next(m for m in axis.members if m.role == "producer")
    channels_of_zig = producer.positions(axis.size).shape[1]
    divisible = group_divisible or (8 if channels_of_zig * axis.size >= 64 else 1)
    return math.lcm(axis.multiple, divisible // math.gcd(divisible, channels_of_zig))


def _tied(
    axes: Sequence[PrunableAxis],
    sizes: np.ndarray,
    multiple: np.ndarray,
    above_floor: Sequence[int],
    tied: Sequence[Sequence[str]],
) -> Limits:
    """The limits of axes that lose equal fractions of themselves, `tied`; an axis without a tie stays whole.

    Worked example: axes of 12 and of 6 ZIGs can keep k sixths of themselves. If a multiple of 4 has to stay of the
    first one, these are k = 2, 4, 6, so that the axes lose 4 and 2 ZIGs at a time.
    """
    tie = np.arange(len(axes))
    multiple = multiple.copy()
    removable = np.zeros(len(axes), int)
    number_of_axis = {axis.name: a for a, axis in enumerate(axes)}
    for names in tied:
        tied_axes = [number_of_axis[name] for name in names if name in number_of_axis]
        if len(tied_axes) < len(names):  # one of them doesn't train
            continue
        num_fractions = math.gcd(*(axes[a].size for a in tied_axes))  # each axis can keep any k / num_fractions
        steps = []  # k has to be a multiple of each of these
        for a in tied_axes:
            zigs_of_fraction = axes[a].size // num_fractions
            steps.append(int(multiple[a]) // math.gcd(multiple[a], zigs_of_fraction))
        step = math.lcm(*steps)
        if num_fractions % step:
            continue
        tie[tied_axes] = tied_axes[0]
        multiple[tied_axes] = [step * axes[a].size // num_fractions for a in tied_axes]
        num_blocks = min(above_floor[a] // multiple[a] for a in tied_axes)
        removable[tied_axes] = multiple[tied_axes] * num_blocks
    return Limits(sizes, multiple, removable, tie)


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
        zigs_of_axes = [[(int(n), ((a, 1),))] for a, n in enumerate(limits.sizes)]  # a term for each axis
        work = Work.of(zigs_of_axes, len(axes))
    else:
        whole = parameters if target.kind == "target_params" else partition.work
        if whole is None:
            raise ValueError("this partition doesn't know its MACs: target_macs needs one of partition_zigs")
        columns = [partition.axes.index(axis) for axis in axes]
        work = whole._replace(lost=whole.lost[:, columns])
    dense = work.left(0 * limits.sizes)
    least = work.left(limits.removable)
    if target.kind == "target_per_axis":
        goal = least
    elif target.kind == "target_group_sparsity":
        goal = dense - round(target.value * dense)
    else:
        goal = target.value * dense
    if goal < least:
        removes = target.kind in FRACTIONS_REMOVED
        if removes:
            bound = f"at most {math.floor(1000 * (1 - least / dense)) / 1000}"
        else:
            bound = f"at least {math.ceil(1000 * least / dense) / 1000}"
        raise ValueError(f"{target.kind}={target.value} is not feasible: with min_keep={min_keep} it can be {bound}")
    # salience is divided by this: a ZIG that costs next to nothing is to go last
    cost_of_zig = np.maximum(work.alone, 1e-9 * dense)
    return Budget(work, goal, cost_of_zig, exact)
