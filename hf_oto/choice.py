"""Which ZIGs go: targets, floors, multiples and ties; pure functions of arrays, without a model or an optimizer.

A choice takes blocks of ZIGs, the least salient for their cost first, until the budget is met. A block is what an
axis (or several tied ones) may lose at a time.

Worked example of blocks: an axis of 10 units of which a multiple of 4 has to stay loses its 2 least salient units
first (8 stay), then 4 more (4 stay), then none, as at least one has to stay. Two tied axes, of 12 units of which a
multiple of 4 has to stay and of 6 heads, lose 4 units and 2 heads at a time.

Worked example of a budget: 60 of 100 ZIGs are to be left. At 0.4 of the way 16 ZIGs have to be zero; if 9 are, 7 are
still to go. If the blocks hold 4, 8, 2 and 1 ZIGs, the least salient first, 4 and 8 would be 5 too many. So the
second block is left out, and 4, 2 and 1 ZIGs are chosen.
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Callable, Mapping, Sequence
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
        tie: the number of an axis, which stands for all that keep the same fraction as it does; without others, of
            the axis itself.
    """

    sizes: np.ndarray
    kept_multiple: np.ndarray
    removable: np.ndarray
    tie: np.ndarray

    @property
    def first_block(self) -> np.ndarray:
        """How many ZIGs have to go before a multiple stays, (axes,)."""
        return (self.sizes - 1) % self.kept_multiple + 1

    def in_blocks(self, zigs: np.ndarray) -> np.ndarray:
        """How many blocks so many ZIGs of every axis are, (axes,), where they are whole blocks."""
        return -(-zigs // self.kept_multiple)

    def in_zigs(self, blocks: np.ndarray) -> np.ndarray:
        """How many ZIGs the first so many blocks of every axis are, (axes,)."""
        return np.where(blocks > 0, self.first_block + (blocks - 1) * self.kept_multiple, 0)

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


class Blocks(NamedTuple):
    """The blocks of all axes, tie after tie, in each the one that goes first to the one that goes last.

    Worked example: an axis of 5 ZIGs, of which a multiple of 2 has to stay, and one of 2 ZIGs, both without a tie.
    Blocks 0, 1 and 2 hold 1, 2 and 2 ZIGs of the first axis, blocks 3 and 4 the single ZIGs of the second.

    Attributes:
        zigs: all ZIGs, axis after axis, in each the zero ones, then from the least salient on, (num_zigs,).
        block: the block of each of these, (num_zigs,).
        tie: the tie of every block, (blocks,).
        number: which of its tie a block is, from 0 on, (blocks,).
    """

    zigs: np.ndarray
    block: np.ndarray
    tie: np.ndarray
    number: np.ndarray

    @classmethod
    def of(cls, salience: np.ndarray, zero: np.ndarray, limits: Limits) -> Blocks:
        """The blocks in which the ZIGs of every axis go."""
        zigs, rank = _order_in_axes(salience, zero, limits)
        axis = limits.axis_of
        # the first block may be smaller than the others: its missing ranks come before rank 0
        number_of_zig = (rank + (limits.kept_multiple - limits.first_block)[axis]) // limits.kept_multiple[axis]
        ties = np.unique(limits.tie)
        blocks_of_tie = limits.in_blocks(limits.sizes)[ties]
        start_of_tie = np.zeros(len(limits.sizes), int)
        start_of_tie[ties] = np.cumsum(blocks_of_tie) - blocks_of_tie
        # a block of tied axes is the next block of each of them
        block = start_of_tie[limits.tie[axis]] + number_of_zig
        tie = np.repeat(ties, blocks_of_tie)
        return cls(zigs, block, tie, np.arange(len(tie)) - start_of_tie[tie])

    def sums(self, of_zigs: np.ndarray) -> np.ndarray:
        """The sum of a vector, (num_zigs,), over the ZIGs of every block, (blocks,)."""
        return np.bincount(self.block, weights=of_zigs[self.zigs], minlength=len(self.tie))


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
        may_go: (axes,), bool: others lose no ZIG now, nor do axes that are tied to others.
        share: fraction, in (0, 1], of the way from the dense model to the goal.
        limits: what may go of every axis.
        budget: how much has to go.

    Returns:
        the ZIGs to be made zero next, bool (num_zigs,).
    """
    blocks = Blocks.of(salience, zero, limits)
    living, begun = blocks.sums(~zero), blocks.sums(zero) > 0  # (blocks,)
    stays = np.isin(limits.tie, limits.tie[~may_go])
    removable_blocks = np.where(stays, 0, limits.in_blocks(limits.removable))  # (axes,)
    candidates = np.flatnonzero((living > 0) & (blocks.number < removable_blocks[blocks.tie]))
    # what is zero in part is completed before anything else, so that one axis at most is out of step
    per_cost = np.where(begun, -np.inf, _salience_per_cost(salience, zero, blocks, limits, budget))
    candidates = candidates[np.argsort(per_cost[candidates], kind="stable")]

    zero_zigs = limits.count(zero)  # (axes,)
    zero_blocks = np.bincount(blocks.tie[living == 0], minlength=len(limits.sizes))  # (ties,)

    def left(taken: np.ndarray) -> float:
        """What is left of the budget's work without these blocks and without what is zero."""
        gone_blocks = zero_blocks + np.bincount(blocks.tie[taken], minlength=len(limits.sizes))
        # what is zero may be no whole number of blocks, or more than may go: of a state with other limits, say
        gone = np.maximum(zero_zigs, limits.in_zigs(gone_blocks[limits.tie]))
        return budget.work.left(gone)

    taken = _fewest_blocks(candidates, blocks.tie, begun, left, _goal_at(share, budget), OVERSHOOT * budget.dense)
    return _zigs_of(taken, blocks, zero, share, budget)


def _salience_per_cost(
    salience: np.ndarray, zero: np.ndarray, blocks: Blocks, limits: Limits, budget: Budget
) -> np.ndarray:
    """By what blocks are compared, (blocks,)."""
    of_living = np.where(zero, 0, salience)
    per_cost = blocks.sums(of_living) / blocks.sums(budget.cost_of_zig[limits.axis_of])
    # sums of equally salient ZIGs may round in either direction: even then no block goes before the one before it
    of_ties = np.split(per_cost, np.flatnonzero(blocks.number == 0)[1:])
    return np.concatenate([np.maximum.accumulate(of_tie) for of_tie in of_ties])


def _goal_at(share: float, budget: Budget) -> float:
    """How much is left when `share` of the way is gone."""
    if share == 1:
        return budget.goal  # which may be no whole number
    return budget.dense - round((budget.dense - budget.goal) * share)


def _fewest_blocks(
    blocks: np.ndarray,
    tie: np.ndarray,
    begun: np.ndarray,
    left: Callable[[np.ndarray], float],
    goal: float,
    overshoot: float,
) -> np.ndarray:
    """The shortest beginning of `blocks`, in their order, that meets the goal, rather without one that overshoots.

    All of them where that doesn't meet the goal. What is begun, `begun` (blocks,), is never left out.
    """
    taken = best = blocks
    while left(taken) <= goal:
        beginning = bisect.bisect_left(range(len(taken)), -goal, key=lambda n: -left(taken[:n]))
        taken = taken[:beginning]
        best = max(best, taken, key=left)
        if not len(taken) or begun[taken[-1]] or goal - left(taken) <= overshoot:
            break
        # without its last block, and so without any later one of the same axis, which can't go before that
        too_much, others = taken[-1], blocks[len(taken) :]
        taken = blocks = np.concatenate([taken[:-1], others[tie[others] != tie[too_much]]])
    return best


def _zigs_of(taken: np.ndarray, blocks: Blocks, zero: np.ndarray, share: float, budget: Budget) -> np.ndarray:
    """The living ZIGs of the blocks, of the last one only what an exact number of ZIGs needs; bool (num_zigs,)."""
    place = np.full(len(blocks.tie), len(taken))
    place[taken] = np.arange(len(taken))
    place = place[blocks.block]  # (num_zigs,)
    in_order = blocks.zigs[np.argsort(place, kind="stable")]
    zigs = in_order[: (place < len(taken)).sum()]
    zigs = zigs[~zero[zigs]]
    if budget.exact:
        # more may be zero already than this event asks for: a state that was loaded into another schedule
        zigs = zigs[: max(0, int(budget.dense - _goal_at(share, budget)) - int(zero.sum()))]
    chosen = np.zeros(len(zero), bool)
    chosen[zigs] = True
    return chosen
