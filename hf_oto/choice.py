"""Which ZIGs go, by their salience and cost; pure functions of arrays, without a model or an optimizer.

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
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .targets import Budget, Limits, Target, counts_exactly, limits_of, the_target

__all__ = [
    "Budget", "Limits", "Target", "choose", "counts_exactly", "limits_of", "the_target", "weigh_survivors",
]  # fmt: skip

OVERSHOOT = 0.005  # fraction of the dense model by which a choice may exceed its budget before it tries other blocks
UNDER_A_NORM = 0.01  # an axis whose salience as a whole is less than this fraction of its ZIGs' is under a norm


def weigh_survivors(
    salience: np.ndarray, salience_of_axes: np.ndarray, zero: np.ndarray, limits: Limits
) -> np.ndarray:
    """Salience that grows, along an axis under a norm, with what is gone of the axis; (num_zigs,).

    Before a norm, multiplying a whole axis by c changes nothing, so that the salience of its single ZIGs underrates
    the last survivors. The k-th living ZIG to go is weighted by (living / (living - k)) ** 2, k counted from 0. An
    axis is under a norm where its salience as a whole is next to nothing beside that of its ZIGs.

    Worked example: of an axis of 5 ZIGs under a norm one is zero. From the least salient on, the 4 living ones are
    weighted by 1, (4 / 3) ** 2, (4 / 2) ** 2 and (4 / 1) ** 2.

    Args:
        salience: (num_zigs,).
        salience_of_axes: of every axis as a whole, (axes,).
        zero: (num_zigs,), bool: these are gone.
    """
    under_a_norm = salience_of_axes < UNDER_A_NORM * limits.count(salience)  # (axes,)
    num_zero = limits.count(zero)  # (axes,)
    num_living = limits.sizes - num_zero
    order, rank = _order_in_axes(salience, zero, limits)
    axis = limits.axis_of[order]  # (num_zigs,), as all that follows
    gone_before = rank - num_zero[axis]  # zero ZIGs come first in the order
    weight = np.where(under_a_norm[axis], num_living[axis] / (num_living[axis] - gone_before), 1) ** 2
    weighted = salience.copy()
    weighted[order] *= np.where(zero[order], 1, weight)
    return weighted


def _order_in_axes(salience: np.ndarray, zero: np.ndarray, limits: Limits) -> tuple[np.ndarray, np.ndarray]:
    """All ZIGs, axis after axis, and the rank of each in its axis: the zero ones, then from the least salient on."""
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
        # the first block may be smaller than the others: the ranks that it lacks come before rank 0
        num_lacking = limits.kept_multiple - limits.first_block  # (axes,)
        number_of_zig = (rank + num_lacking[axis]) // limits.kept_multiple[axis]
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
        may_go: (axes,), bool: the other axes lose no ZIG now, and neither do the axes that are tied to them.
        share: fraction, in (0, 1], of the way from the dense model to the goal.
        limits: what may go of every axis.
        budget: how much has to go.

    Returns:
        the ZIGs to be made zero next, bool (num_zigs,).
    """
    blocks = Blocks.of(salience, zero, limits)
    num_living = blocks.sums(~zero)  # (blocks,)
    begun = blocks.sums(zero) > 0  # (blocks,)
    stays = np.isin(limits.tie, limits.tie[~may_go])  # (axes,)
    removable_blocks = np.where(stays, 0, limits.in_blocks(limits.removable))  # (axes,)
    candidates = np.flatnonzero((num_living > 0) & (blocks.number < removable_blocks[blocks.tie]))
    # a block that is zero in part is completed before any other, so that one axis at most is out of step
    per_cost = np.where(begun, -np.inf, _salience_per_cost(salience, zero, blocks, limits, budget))
    candidates = candidates[np.argsort(per_cost[candidates], kind="stable")]

    zero_zigs = limits.count(zero)  # (axes,)
    zero_blocks = np.bincount(blocks.tie[num_living == 0], minlength=len(limits.sizes))  # (ties,)

    def left(taken: np.ndarray) -> float:
        """What is left of the budget's work without these blocks and without what is zero."""
        gone_blocks = zero_blocks + np.bincount(blocks.tie[taken], minlength=len(limits.sizes))
        # the zero ZIGs may fill no whole blocks, or be more than may go: of a state with other limits, say
        gone = np.maximum(zero_zigs, limits.in_zigs(gone_blocks[limits.tie]))
        return budget.work.left(gone)

    taken = _fewest_blocks(candidates, blocks.tie, begun, left, _goal_at(share, budget), OVERSHOOT * budget.dense)
    return _zigs_of(taken, blocks, zero, share, budget)


def _salience_per_cost(
    salience: np.ndarray, zero: np.ndarray, blocks: Blocks, limits: Limits, budget: Budget
) -> np.ndarray:
    """The salience of the living ZIGs of every block for its cost, by which blocks are compared, (blocks,)."""
    of_living = np.where(zero, 0, salience)
    per_cost = blocks.sums(of_living) / blocks.sums(budget.cost_of_zig[limits.axis_of])
    # Each block is at least as salient as the one before it in its tie. But sums of equally salient ZIGs may round in
    # either direction, and even then no block may go before an earlier one.
    of_ties = np.split(per_cost, np.flatnonzero(blocks.number == 0)[1:])
    return np.concatenate([np.maximum.accumulate(of_tie) for of_tie in of_ties])


def _goal_at(share: float, budget: Budget) -> float:
    """How much is left at `share` of the way from the dense model to the goal."""
    if share == 1:
        return budget.goal  # without rounding: it may be no whole number
    return budget.dense - round((budget.dense - budget.goal) * share)


def _fewest_blocks(
    blocks: np.ndarray,
    tie: np.ndarray,
    begun: np.ndarray,
    left: Callable[[np.ndarray], float],
    goal: float,
    overshoot: float,
) -> np.ndarray:
    """The shortest beginning of `blocks`, in their order, that meets the goal; all of them if none does.

    If the beginning overshoots, its last block is left out, and later ones are tried instead.

    Args:
        blocks: the numbers of the blocks that may go, in the order in which they go.
        tie: the tie of every block, (blocks,).
        begun: whether some ZIGs of a block are zero already, (blocks,): such a block is never left out.
        left: how much is left without the given blocks.
        goal: how much is to be left at most.
        overshoot: how much less than the goal may be left.
    """
    taken = best = blocks
    while left(taken) <= goal:
        beginning = bisect.bisect_left(range(len(taken)), -goal, key=lambda n: -left(taken[:n]))
        taken = taken[:beginning]
        best = max(best, taken, key=left)
        if not len(taken) or begun[taken[-1]] or goal - left(taken) <= overshoot:
            break
        # later blocks of the same tie can't go before the block that is left out, so they are left out with it
        too_much = taken[-1]
        later = blocks[len(taken) :]
        later = later[tie[later] != tie[too_much]]
        taken = blocks = np.concatenate([taken[:-1], later])
    return best


def _zigs_of(taken: np.ndarray, blocks: Blocks, zero: np.ndarray, share: float, budget: Budget) -> np.ndarray:
    """The living ZIGs of the taken blocks, bool (num_zigs,); of the last block only what an exact number needs."""
    place_of_block = np.full(len(blocks.tie), len(taken))  # blocks that are not taken come last
    place_of_block[taken] = np.arange(len(taken))
    place = place_of_block[blocks.block]  # (num_zigs,)
    in_order = blocks.zigs[np.argsort(place, kind="stable")]
    num_taken = (place < len(taken)).sum()
    zigs = in_order[:num_taken]
    zigs = zigs[~zero[zigs]]
    if budget.exact:
        num_gone = int(budget.dense - _goal_at(share, budget))
        # more may be zero already than this event asks for, in a state that was loaded into another schedule
        zigs = zigs[: max(0, num_gone - int(zero.sum()))]
    chosen = np.zeros(len(zero), bool)
    chosen[zigs] = True
    return chosen
