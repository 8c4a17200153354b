"""Which ZIGs go: targets, floors, multiples and ties; pure functions of arrays, without a model or an optimizer.

A choice takes blocks of ZIGs, the least salient for their cost first, until the budget is met. A block is what an
axis (or several tied ones) may lose at a time. Worked example: an axis of 10 units of which a multiple of 4 has to
stay loses its 2 least salient units first (8 stay), then 4 more (4 stay), then none, as at least one has to stay.
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .cost import Work
from .zigs import PrunableAxis, ZIGPartition

OVERSHOOT = 0.005  # of the dense model: a choice goes no further beyond its budget, where it can help it
UNDER_A_NORM = 0.01  # how little of the salience of its ZIGs an axis as a whole has if a norm takes its scale away
FRACTIONS_REMOVED = ("target_group_sparsity", "target_per_axis")  # the other targets say what is left


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
    for fraction in value.values() if kind == "target_per_axis" else [value]:
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
        kept_multiple: what stays of an axis is a multiple of this, unless all of it stays.
        removable: how many ZIGs may go at most.
        tie: a number that axes share which keep equal fractions.
    """

    sizes: np.ndarray
    kept_multiple: np.ndarray
    removable: np.ndarray
    tie: np.ndarray

    @property
    def first_block(self) -> np.ndarray:
        """How many ZIGs have to go before a multiple stays, (axes,)."""
        return (self.sizes - 1) % self.kept_multiple + 1

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
        goal: how much of that is left in the end.
        cost_of_zig: how much of it one ZIG of every axis takes, (axes,).
        exact: whether the goal is a number of ZIGs to meet exactly, the last few of which need be no multiple.
    """

    work: Work
    goal: float
    cost_of_zig: np.ndarray
    exact: bool

    @property
    def dense(self) -> float:
        """What is counted of the whole model."""
        return self.work.left(np.zeros(self.work.lost.shape[1]))


# what may go, and how much has to ------------------------------------------------------------------


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
    most = [axis.size - max(1, math.ceil(min_keep * axis.size)) for axis in axes]
    if target.kind == "target_per_axis":
        most = _asked_per_axis(axes, target.value, most, min_keep)
    if counts_exactly(target, group_divisible, tied) and group_divisible:
        multiple = np.ones(len(axes), int)  # of some axes a multiple is left by the cut, a few as zeros
    else:
        multiple = np.array([_kept_multiple(axis, group_divisible) for axis in axes], int)
    if tied is not None:
        return _tied(axes, sizes, multiple, most, tied)
    first = (sizes - 1) % multiple + 1
    removable = [
        first[a] + (most[a] - first[a]) // multiple[a] * multiple[a] if most[a] >= first[a] else 0
        for a in range(len(axes))
    ]
    return Limits(sizes, multiple, np.array(removable, int), np.arange(len(axes)))


def counts_exactly(target: Target, group_divisible: int | None, tied: Sequence[Sequence[str]] | None) -> bool:
    """Whether the target is a number of ZIGs that is met exactly."""
    return target.kind == "target_group_sparsity" and group_divisible in (None, 1) and tied is None


def _asked_per_axis(
    axes: Sequence[PrunableAxis], wanted: Mapping[str, float], most: Sequence[int], min_keep: float
) -> list[int]:
    names = [axis.name for axis in axes]
    for pattern in wanted:
        if not any(re.search(pattern, name) for name in names):
            raise ValueError(
                f"target_per_axis: {pattern!r} matches no axis, for example {names[0]!r}"
                if names
                else f"target_per_axis: {pattern!r} matches no axis, and there is none"
            )
    asked = []
    for axis, limit in zip(axes, most, strict=True):
        fraction = next((value for pattern, value in wanted.items() if re.search(pattern, axis.name)), 0)
        count = round(fraction * axis.size)
        if count > limit:
            raise ValueError(
                f"target_per_axis is not feasible for {axis.name}: with min_keep={min_keep} "
                f"at most {math.floor(1000 * limit / axis.size) / 1000} of it can go"
            )
        asked.append(count)
    return asked


def _kept_multiple(axis: PrunableAxis, group_divisible: int | None) -> int:
    """Of how many ZIGs a multiple has to stay for the width to be divisible; one ZIG may be several channels wide."""
    producer = next(m for m in axis.members if m.role == "producer")
    channels_of_zig = producer.positions(axis.size).shape[1]
    divisible = group_divisible or (8 if channels_of_zig * axis.size >= 64 else 1)
    return math.lcm(axis.multiple, divisible // math.gcd(divisible, channels_of_zig))


def _tied(
    axes: Sequence[PrunableAxis],
    sizes: np.ndarray,
    multiple: np.ndarray,
    most: Sequence[int],
    tied: Sequence[Sequence[str]],
) -> Limits:
    """Tied axes lose equal fractions of themselves; an axis without a tie stays whole."""
    tie, multiple, removable = np.arange(len(axes)), multiple.copy(), np.zeros(len(axes), int)
    number = {axis.name: a for a, axis in enumerate(axes)}
    for names in tied:
        some = [number[name] for name in names if name in number]
        if len(some) < len(names):  # one of them doesn't train
            continue
        fractions = math.gcd(*(axes[a].size for a in some))  # the axes can keep any k / fractions of themselves
        step = math.lcm(*(int(multiple[a]) // math.gcd(multiple[a], axes[a].size // fractions) for a in some))
        if fractions % step:
            continue
        tie[some] = some[0]
        multiple[some] = [step * axes[a].size // fractions for a in some]
        removable[some] = multiple[some] * min(most[a] // multiple[a] for a in some)
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
    """What a target means for these axes, which may be some of the partition's; `parameters`: of the whole model.

    Raises:
        ValueError: the target is not feasible; the message says which one would be.
    """
    if target.kind in FRACTIONS_REMOVED:
        work = Work.of([[(int(n), ((a, 1),))] for a, n in enumerate(limits.sizes)], len(axes))  # ZIGs
    else:
        whole = parameters if target.kind == "target_params" else partition.work
        if whole is None:
            raise ValueError("this partition doesn't know its MACs: target_macs needs one of partition_zigs")
        columns = [partition.axes.index(axis) for axis in axes]
        work = whole._replace(lost=whole.lost[:, columns])
    dense, least = work.left(0 * limits.sizes), work.left(limits.removable)
    if target.kind == "target_per_axis":
        goal = least
    elif target.kind == "target_group_sparsity":
        goal = dense - round(target.value * dense)
    else:
        goal = target.value * dense
    if goal < least:
        removes = target.kind in FRACTIONS_REMOVED
        bound = math.floor(1000 * (1 - least / dense)) if removes else math.ceil(1000 * least / dense)
        raise ValueError(
            f"{target.kind}={target.value} is not feasible: with min_keep={min_keep} it can be "
            f"at {'most' if removes else 'least'} {bound / 1000}"
        )
    cost_of_zig = np.maximum(work.alone, 1e-9 * dense)  # what costs next to nothing goes last
    return Budget(work, goal, cost_of_zig, exact)


# the choice ----------------------------------------------------------------------------------------


def weigh_survivors(
    salience: np.ndarray, salience_of_axes: np.ndarray, zero: np.ndarray, limits: Limits
) -> np.ndarray:
    """Salience that grows, along an axis under a norm, with what is gone of the axis; (num_zigs,).

    Before a norm, multiplying a whole axis by c changes nothing, so that the salience of its single ZIGs underrates
    the last survivors. The k-th living ZIG to go is weighted by (living / (living - k)) ** 2, k counted from 0. An
    axis is under a norm where its salience as a whole, `salience_of_axes` (axes,), is next to nothing beside that of
    its ZIGs.
    """
    axis = limits.axis_of
    under_a_norm = salience_of_axes < UNDER_A_NORM * limits.count(salience)
    living = limits.sizes - limits.count(zero)
    order, rank = _order_in_axes(salience, zero, limits)
    gone_before = rank - (limits.sizes - living)[axis[order]]  # zero ZIGs come first in the order
    weight = np.where(under_a_norm[axis[order]], living[axis[order]] / (living[axis[order]] - gone_before), 1) ** 2
    weighted = salience.copy()
    weighted[order] *= np.where(zero[order], 1, weight)
    return weighted


def _order_in_axes(salience: np.ndarray, zero: np.ndarray, limits: Limits) -> tuple[np.ndarray, np.ndarray]:
    """All ZIGs axis after axis, in each the zero ones, then from the least salient on; and their ranks there."""
    order = np.lexsort((np.where(zero, -np.inf, salience), limits.axis_of))
    start_of_axis = np.cumsum(limits.sizes) - limits.sizes
    return order, np.arange(len(order)) - start_of_axis[limits.axis_of]


def choose(
    salience: np.ndarray,
    zero: np.ndarray,
    may_go: np.ndarray,
    share: float,
    limits: Limits,
    budget: Budget,
) -> np.ndarray:
    """The least salient living ZIGs for their cost, so that with them and the zero ones `share` of the way is gone.

    Where the blocks that just meet the goal go beyond it by more than OVERSHOOT of the dense model, the last of them
    is left out, and others, more salient and smaller, are tried instead.

    Args:
        salience: (num_zigs,), what the loss would lose with a ZIG; ties are broken by position.
        zero: (num_zigs,), bool: these are gone.
        may_go: (axes,), bool: others lose no ZIG now.
        share: fraction, in (0, 1], of the way from the dense model to the goal.
        limits: what may go of every axis.
        budget: how much has to go.

    Returns:
        the ZIGs to be made zero next, bool (num_zigs,).
    """
    order, rank = _order_in_axes(salience, zero, limits)
    score = np.where(zero, -np.inf, salience)[order]
    axis = limits.axis_of
    block = np.where(
        rank < limits.first_block[axis], 0, 1 + (rank - limits.first_block[axis]) // limits.kept_multiple[axis]
    )
    tie = limits.tie[axis]
    # a block of tied axes is the next block of each of them
    by_block = np.lexsort((rank, axis, block, tie))
    stays = np.isin(limits.tie, limits.tie[~may_go])
    gone_after = limits.first_block[axis] + block * limits.kept_multiple[axis]
    candidate = (gone_after <= limits.removable[axis]) & ~(stays[axis] & ~zero[order])
    by_block = by_block[candidate[by_block]]
    if not len(by_block):
        return np.zeros(len(salience), bool)
    order, score, axis, tie, block = order[by_block], score[by_block], axis[by_block], tie[by_block], block[by_block]
    starts = np.flatnonzero(np.diff(tie, prepend=-1) | np.diff(block, prepend=-1))
    salience_per_cost = np.add.reduceat(score, starts) / np.add.reduceat(budget.cost_of_zig[axis], starts)
    taken = _fewest_blocks(np.argsort(salience_per_cost, kind="stable"), tie[starts], share, limits, budget)
    # the ZIGs of the blocks, in the order in which these are taken
    place = np.full(len(starts), len(starts))
    place[taken] = np.arange(len(taken))
    place = np.repeat(place, np.diff(starts, append=len(order)))
    picked = order[np.argsort(place, kind="stable")][: (place < len(starts)).sum()]
    picked = picked[~zero[picked]]
    if budget.exact:
        # more may be zero already than this event asks for: a state that was loaded into another schedule
        picked = picked[: max(0, int(budget.dense - _goal_at(share, budget)) - int(zero.sum()))]
    chosen = np.zeros(len(salience), bool)
    chosen[picked] = True
    return chosen


def _goal_at(share: float, budget: Budget) -> float:
    """How much is left when `share` of the way is gone."""
    return budget.dense - round((budget.dense - budget.goal) * share)


def _fewest_blocks(blocks: np.ndarray, tie: np.ndarray, share: float, limits: Limits, budget: Budget) -> np.ndarray:
    """The shortest beginning of `blocks`, in their order, that meets the goal, rather without one that overshoots."""
    goal = _goal_at(share, budget)

    def left(taken: np.ndarray) -> float:
        count = np.bincount(tie[taken], minlength=len(limits.sizes))[limits.tie]  # blocks of every axis
        gone = np.where(count, limits.first_block + (count - 1) * limits.kept_multiple, 0)
        return budget.work.left(gone)

    taken = best = blocks
    while left(taken) <= goal:
        beginning = bisect.bisect_left(range(len(taken)), -goal, key=lambda n: -left(taken[:n]))
        taken = taken[:beginning]
        best = max(best, taken, key=left)
        if not len(taken) or goal - left(taken) <= OVERSHOOT * budget.dense:
            break
        too_much, others = taken[-1], blocks[len(taken) :]
        taken = blocks = np.concatenate([taken[:-1], others[tie[others] != tie[too_much]]])
    return best
