"""Which ZIGs go, by their salience and cost; pure functions of arrays, without a model or an optimizer.

A choice takes blocks of ZIGs until the budget is met. The block with the least salience for its cost is taken first. A
block is what an axis, or several tied axes, may lose at a time.

Worked example of blocks: an axis of 10 units of which a multiple of 4 has to stay loses its 2 least salient units
first (8 stay), then 4 more (4 stay), then none, as at least one has to stay. Two tied axes, of 12 units of which a
multiple of 4 has to stay and of 6 heads, lose 4 units and 2 heads at a time.

Worked example of a budget: 60 of 100 ZIGs are to be left. At 0.4 of the way 16 ZIGs have to be zero. If 9 ZIGs are
zero, 7 more have to go. Suppose that the blocks hold 4, 8, 2 and 1 ZIGs, the least salient block first. The first two
blocks together would be 5 ZIGs too many, so the second block is left out, and 4, 2 and 1 ZIGs are chosen.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .targets import Budget, Limits

OVERSHOOT = 0.005  # fraction of the dense model by which a choice may exceed its budget before it tries other blocks
UNDER_A_NORM = 0.01  # an axis whose salience as a whole is less than this fraction of its ZIGs' is under a norm


def weigh_survivors(
    salience: np.ndarray, salience_of_axes: np.ndarray, zero: np.ndarray, limits: Limits
) -> np.ndarray:
    """Salience, (num_zigs,), that grows with the number of ZIGs that are gone, on bottlenecks and under norms.

    Two kinds of axes have last survivors that the salience of single ZIGs underrates. Before a norm, multiplying a
    whole axis by c changes nothing, so that a ZIG counts more the fewer there are. And without a bottleneck nothing
    is left of the model, which a gradient doesn't see before. There a ZIG is weighted by (size / left) ** 2: `left`
    is how many ZIGs of the axis there are when it goes, after all that are less salient, and `size` how many there
    are in the dense model. An axis counts as under a norm if its salience as a whole is next to nothing beside the
    salience of its ZIGs.

    On a small batch-normalised network this is worth 2.9 points where a tenth of the MACs is left, beside weights for
    norms alone that begin anew at every event (held-out images, three seeds; recipes/RESULTS.md).

    Worked example: an axis under a norm has 5 ZIGs, one of them zero. The 4 living ZIGs, the least salient one first,
    are weighted by (5 / 4) ** 2, (5 / 3) ** 2, (5 / 2) ** 2 and (5 / 1) ** 2.

    Args:
        salience: (num_zigs,).
        salience_of_axes: of every axis as a whole, (axes,); infinity where nobody knows it, and nothing is weighted.
        zero: (num_zigs,), bool: these are gone.
    """
    salience_of_zigs = limits.count(salience)  # (axes,)
    under_a_norm = salience_of_axes < UNDER_A_NORM * salience_of_zigs  # (axes,)
    is_known = np.isfinite(salience_of_axes)
    grows = under_a_norm | (limits.is_bottleneck & is_known)  # (axes,)
    order, rank = _order_in_axes(salience, zero, limits)
    axis = limits.axis_of[order]  # (num_zigs,), as all that follows
    size = limits.sizes[axis]
    left = size - rank
    grown_weight = (size / left) ** 2
    is_weighted = grows[axis] & ~zero[order]
    weighted = salience.copy()
    weighted[order] *= np.where(is_weighted, grown_weight, 1)
    return weighted


def _order_in_axes(salience: np.ndarray, zero: np.ndarray, limits: Limits) -> tuple[np.ndarray, np.ndarray]:
    """All ZIGs in order, and the rank of each in its axis, both (num_zigs,).

    The axes come one after the other. In each axis the zero ZIGs come first, then the living ones, the least salient
    one first.
    """
    zeros_first = np.where(zero, -np.inf, salience)
    order = np.lexsort((zeros_first, limits.axis_of))  # by the last key first
    start_of_axis = np.cumsum(limits.sizes) - limits.sizes  # (axes,)
    place = np.arange(len(order))
    rank = place - start_of_axis[limits.axis_of]
    return order, rank


class Blocks(NamedTuple):
    """The blocks of all axes, tie after tie; in each tie the blocks stand in the order in which they go.

    Worked example: there are two axes without a tie, one of 5 ZIGs, of which a multiple of 2 has to stay, and one of 2
    ZIGs. Blocks 0, 1 and 2 hold 1, 2 and 2 ZIGs of the first axis, blocks 3 and 4 the single ZIGs of the second axis.

    Attributes:
        zigs: all ZIGs in the order of `_order_in_axes`.
        block: the block of each of these ZIGs.
        tie: the tie of every block.
        number: the place of every block in its tie, from 0 on.
    """

    zigs: np.ndarray  # (num_zigs,)
    block: np.ndarray  # (num_zigs,)
    tie: np.ndarray  # (blocks,)
    number: np.ndarray  # (blocks,)

    @classmethod
    def of(cls, salience: np.ndarray, zero: np.ndarray, limits: Limits) -> Blocks:
        """The blocks in which the ZIGs of every axis go."""
        zigs, rank = _order_in_axes(salience, zero, limits)
        axis = limits.axis_of  # (num_zigs,)
        # the first block may be smaller than the others: the ranks that it lacks come before rank 0
        num_lacking = limits.kept_multiple - limits.first_block  # (axes,)
        padded_rank = rank + num_lacking[axis]
        number_of_zig = padded_rank // limits.kept_multiple[axis]  # (num_zigs,), in the tie of the ZIG
        ties = np.unique(limits.tie)
        blocks_of_axis = limits.in_blocks(limits.sizes)  # (axes,), equal for tied axes
        blocks_of_tie = blocks_of_axis[ties]  # a tie has the number of its first axis
        start_of_tie = np.zeros_like(blocks_of_axis)
        start_of_tie[ties] = np.cumsum(blocks_of_tie) - blocks_of_tie
        # a block of tied axes is the next block of each of them
        tie_of_zig = limits.tie[axis]
        block = start_of_tie[tie_of_zig] + number_of_zig
        tie = np.repeat(ties, blocks_of_tie)
        place = np.arange(len(tie))
        number = place - start_of_tie[tie]
        return cls(zigs, block, tie, number)

    def sums(self, of_zigs: np.ndarray) -> np.ndarray:
        """The sum of a vector, (num_zigs,), over the ZIGs of every block, (blocks,)."""
        num_blocks = len(self.tie)
        in_order = of_zigs[self.zigs]
        return np.bincount(self.block, weights=in_order, minlength=num_blocks)


def choose(
    salience: np.ndarray,
    zero: np.ndarray,
    may_go: np.ndarray,
    share: float,
    limits: Limits,
    budget: Budget,
) -> np.ndarray:
    """The living ZIGs of least salience for their cost that complete `share` of the way, together with the zero ones.

    The blocks that just meet the goal may go beyond it by more than OVERSHOOT of the dense model. Then the last of
    them is left out, and later blocks, more salient and smaller, are tried instead.

    Args:
        salience: (num_zigs,), what the loss would lose with a ZIG; ties are broken by position.
        zero: (num_zigs,), bool: these are gone.
        may_go: (axes,), bool: the other axes lose no ZIG now, and no axis that is tied to one of them loses any.
        share: fraction, in (0, 1], of the way from the dense model to the goal.
        limits: how many ZIGs of every axis may go.
        budget: how much work has to go.

    Returns:
        the ZIGs to be made zero next, bool (num_zigs,).
    """
    blocks = Blocks.of(salience, zero, limits)
    num_living = blocks.sums(~zero)  # (blocks,)
    begun = blocks.sums(zero) > 0  # (blocks,)
    stays = np.isin(limits.tie, limits.tie[~may_go])  # (axes,)
    removable_blocks = limits.in_blocks(limits.removable)  # (axes,)
    removable_blocks = np.where(stays, 0, removable_blocks)
    is_removable = blocks.number < removable_blocks[blocks.tie]  # (blocks,)
    candidates = np.flatnonzero(is_removable & (num_living > 0))
    per_cost = _salience_per_cost(salience, zero, blocks, limits, budget)  # (blocks,)
    # a block that is zero in part is completed before any other, so that one axis at most is out of step
    per_cost = np.where(begun, -np.inf, per_cost)
    order = np.argsort(per_cost[candidates], kind="stable")
    candidates = candidates[order]

    num_axes = len(limits.sizes)
    zero_zigs = limits.count(zero)  # (axes,)
    ties_of_zero_blocks = blocks.tie[num_living == 0]
    zero_blocks = np.bincount(ties_of_zero_blocks, minlength=num_axes)  # (axes,), at the number of the tie

    def left(taken: np.ndarray) -> float:
        """What is left of the budget's work without these blocks and without what is zero."""
        ties_of_taken = blocks.tie[taken]
        gone_blocks = zero_blocks + np.bincount(ties_of_taken, minlength=num_axes)
        gone_zigs = limits.in_zigs(gone_blocks[limits.tie])  # (axes,)
        # A state that was made with other limits may have zero ZIGs that fill no whole blocks, or more than may go.
        gone_zigs = np.maximum(zero_zigs, gone_zigs)
        return budget.work.left(gone_zigs)

    goal = _goal_at(share, budget)
    overshoot = OVERSHOOT * budget.dense
    taken = _fewest_blocks(candidates, blocks.tie, begun, left, goal, overshoot)
    return _zigs_of(taken, blocks, zero, share, budget)


def _salience_per_cost(
    salience: np.ndarray, zero: np.ndarray, blocks: Blocks, limits: Limits, budget: Budget
) -> np.ndarray:
    """The salience of the living ZIGs of every block for its cost, by which blocks are compared, (blocks,)."""
    of_living = np.where(zero, 0, salience)
    cost_of_zig = budget.cost_of_zig[limits.axis_of]  # (num_zigs,)
    per_cost = blocks.sums(of_living) / blocks.sums(cost_of_zig)
    # Each block is at least as salient as the one before it in its tie. But sums of equally salient ZIGs may round in
    # either direction, and even then no block may go before an earlier one.
    starts_of_ties = np.flatnonzero(blocks.number == 0)
    of_ties = np.split(per_cost, starts_of_ties[1:])
    growing = []
    for of_tie in of_ties:
        growing.append(np.maximum.accumulate(of_tie))
    return np.concatenate(growing)


def _goal_at(share: float, budget: Budget) -> float:
    """How much is left at `share` of the way from the dense model to the goal."""
    if share == 1:
        return budget.goal  # without rounding: it may be no whole number
    all_to_go = budget.dense - budget.goal
    return budget.dense - round(all_to_go * share)


def _fewest_blocks(
    blocks: np.ndarray,
    tie: np.ndarray,
    begun: np.ndarray,
    left: Callable[[np.ndarray], float],
    goal: float,
    overshoot: float,
) -> np.ndarray:
    """The shortest beginning of `blocks`, in their order, that meets the goal; all of them if no beginning does.

    If the beginning overshoots, its last block is left out, and later blocks are tried instead.

    Args:
        blocks: the numbers of the blocks that may go, in the order in which they go.
        tie: the tie of every block, (blocks,).
        begun: whether some ZIGs of a block are zero already, (blocks,). Such a block is never left out.
        left: how much is left without the given blocks.
        goal: how much is to be left at most.
        overshoot: how far below the goal the rest may be.
    """
    taken = best = blocks
    while left(taken) <= goal:
        num_taken = _fewest_that_meet(taken, left, goal)
        taken = taken[:num_taken]
        # both meet the goal: the better one leaves more
        best = max(best, taken, key=left)
        if num_taken == 0 or goal - left(taken) <= overshoot:
            break
        last = taken[-1]
        if begun[last]:
            break
        # later blocks of the same tie can't go before the block that is left out, so they are left out with it
        later = blocks[num_taken:]
        is_of_other_tie = tie[later] != tie[last]
        later = later[is_of_other_tie]
        taken = blocks = np.concatenate([taken[:-1], later])
    return best


def _fewest_that_meet(blocks: np.ndarray, left: Callable[[np.ndarray], float], goal: float) -> int:
    """How many of the blocks, from the first on, have to go so that no more than the goal is left."""

    def gone(num_blocks: int) -> float:
        return -left(blocks[:num_blocks])  # it grows with the number, as a bisection needs it

    numbers = range(len(blocks))
    return bisect.bisect_left(numbers, -goal, key=gone)


def _zigs_of(taken: np.ndarray, blocks: Blocks, zero: np.ndarray, share: float, budget: Budget) -> np.ndarray:
    """The living ZIGs of the taken blocks, bool (num_zigs,); of the last block only as many as an exact goal needs."""
    num_taken_blocks = len(taken)
    place_of_block = np.full(len(blocks.tie), num_taken_blocks)  # blocks that are not taken come last
    place_of_block[taken] = np.arange(num_taken_blocks)
    place = place_of_block[blocks.block]  # (num_zigs,)
    order = np.argsort(place, kind="stable")
    in_order = blocks.zigs[order]
    num_taken_zigs = (place < num_taken_blocks).sum()
    zigs = in_order[:num_taken_zigs]
    zigs = zigs[~zero[zigs]]
    if budget.exact:
        goal = _goal_at(share, budget)
        num_to_go = int(budget.dense - goal)
        num_zero = int(zero.sum())
        # more may be zero already than this event asks for, in a state that was loaded into another schedule
        num_missing = max(0, num_to_go - num_zero)
        zigs = zigs[:num_missing]
    chosen = np.zeros(len(zero), bool)
    chosen[zigs] = True
    return chosen
