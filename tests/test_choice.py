"""Laws of the choice, and its literal twin on random cases: axes, multiples, floors, ties, budgets, what is gone."""

import itertools
import math
from typing import NamedTuple

import choice_reference as twin
import numpy as np
import pytest

from hf_oto.choice import OVERSHOOT, choose, weigh_survivors
from hf_oto.targets import Budget, Limits, Target, counts_exactly, limits_of
from hf_oto.zigs import Member, PrunableAxis, Work

SEEDS = range(400)


class Case(NamedTuple):
    """What a choice is made by, for hf_oto and for the twin."""

    limits: Limits
    budget: Budget
    min_keep: float
    axes: list[dict]
    terms: list

    @property
    def overshoot(self):
        """How far beyond its goal a choice may go: as far as the largest block does."""
        blocks = (cost * axis["multiple"] for axis, cost in zip(self.axes, self.budget.cost_of_zig, strict=True))
        ties = np.bincount(self.limits.tie, weights=list(blocks))
        return max(OVERSHOOT * self.budget.dense, ties.max())


def prunable(number, size, channels, multiple=1, bottleneck=False):
    producer = Member(f"weight{number}", 0, "producer", inner=channels)
    return PrunableAxis(f"axis{number}", "units", size, (producer,), multiple=multiple, bottleneck=bottleneck)


def random_case(seed):
    """Up to 5 axes, of which each is read by the next; what counts is ZIGs, or products of neighbouring widths."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 6))
    sizes, channels = rng.choice([1, 2, 3, 5, 8, 12, 16, 24, 67], count), rng.choice([1, 1, 2, 3], count)
    shapes = list(zip(sizes.tolist(), channels.tolist(), rng.choice([1, 1, 2, 4], count).tolist(), strict=True))
    axes = [prunable(a, *shape, bottleneck=(seed + a) % 3 == 0) for a, shape in enumerate(shapes)]
    tied, order = None, rng.permutation(count)
    if rng.random() < 0.3:
        cut = int(rng.integers(0, count + 1))
        tied = [[f"axis{a}" for a in sorted(some)] for some in (order[:cut], order[cut:]) if len(some)]
    divisible, min_keep = [None, 1, 2, 4][rng.integers(4)], float(rng.choice([0, 0.1, 0.5]))
    if rng.random() < 0.5:
        kind, terms = "target_group_sparsity", [[(n, ((a, 1),))] for a, (n, _, _) in enumerate(shapes)]
    else:
        widths = [(n * c, ((a, c),)) for a, (n, c, _) in enumerate(shapes)]
        widths = [(int(rng.integers(1, 9)), ()), *widths, (int(rng.integers(1, 5)), ())]
        kind, terms = "target_macs", [*map(list, itertools.pairwise(widths)), *([width] for width in widths)]
    target = Target(kind, 0.5)
    limits, exact = limits_of(axes, target, min_keep, divisible, tied), counts_exactly(target, divisible, tied)
    work = Work.of(terms, count)
    dense, least = work.left(0 * limits.sizes), work.left(limits.removable)
    goal = dense - rng.random() * (dense - least)
    budget = Budget(work, math.ceil(goal) if kind == "target_group_sparsity" else goal, work.alone, exact)
    columns = (limits.sizes, limits.kept_multiple, limits.removable, limits.tie, budget.cost_of_zig)
    columns += (limits.is_bottleneck,)
    names = ("size", "multiple", "removable", "tie", "cost", "bottleneck")
    rows = [dict(zip(names, row, strict=True)) for row in zip(*(c.tolist() for c in columns), strict=True)]
    return Case(limits, budget, min_keep, rows, terms)


def random_salience(rng, count):
    """Smooth, with ties, all equal, or with infinite ones."""
    kind = rng.integers(4)
    if kind == 0:
        return rng.exponential(size=count)
    if kind == 1:
        return rng.integers(0, 3, count).astype(float)
    if kind == 2:
        return np.full(count, 0.1)
    return np.where(rng.random(count) < 0.2, np.inf, rng.exponential(size=count))


def random_moment(case, seed):
    """(salience, salience of the axes, what is zero, which axes may go, share of the way)."""
    rng = np.random.default_rng([seed, 1])
    count = int(case.limits.sizes.sum())
    salience = random_salience(rng, count)
    of_axes = rng.choice([0.0, 1e9, np.inf], len(case.axes), p=[0.4, 0.3, 0.3])  # 1e9: not under a norm
    zero = rng.random(count) < rng.choice([0, 0, 0.1, 0.4])
    return salience, of_axes, zero, rng.random(len(case.axes)) < 0.8, float(rng.choice([rng.random(), 1.0]))


def both(seed, weigh=None, **broken):
    """(weights, choice) of hf_oto, and the same of the twin."""
    case = random_case(seed)
    salience, of_axes, zero, may_go, share = random_moment(case, seed)
    weighted = weigh_survivors(salience, of_axes, zero, case.limits)
    chosen = choose(weighted, zero, may_go, share, case.limits, case.budget)
    theirs = twin.weigh_survivors(case.axes, salience.tolist(), of_axes.tolist(), zero.tolist(), **weigh or {})
    choice = twin.choose(
        case.axes, case.terms, theirs, zero.tolist(), may_go.tolist(), share, case.budget.goal, case.budget.exact,
        **broken,
    )  # fmt: skip
    return (weighted.tolist(), chosen.tolist()), (theirs, choice)


@pytest.mark.parametrize("seeds", [SEEDS[i::4] for i in range(4)], ids=str)
def test_the_choice_is_the_literal_twin(seeds):
    chosen = 0
    for seed in seeds:
        ours, theirs = both(seed)
        assert ours == theirs, seed
        chosen += sum(ours[1])
    assert chosen > 500


@pytest.mark.parametrize(
    "broken",
    [
        dict(weigh=dict(under_a_norm=0.0)),
        dict(weigh=dict(bottlenecks=False)),
        dict(overshoot=math.inf),  # a block that is too large is taken
        dict(finish=False),  # what was begun is not completed first
        dict(ties=False),
        dict(whole=False),  # the last block goes as a whole though a number is asked for
        dict(ordered=False),  # of equally salient blocks of one axis a later one may round to less, and go first
    ],
    ids=str,
)
def test_a_twin_of_other_rules_differs(broken):
    """Negative controls of the test above: every rule decides some case."""
    results = [both(seed, **broken) for seed in SEEDS[:200]]
    assert any(ours[1] != theirs[1] for ours, theirs in results)


# laws, over whole runs ----------------------------------------------------------------------


def run(seed, shares=(0.3, 0.6, 0.8, 0.9, 0.97, 1.0), some_stay=False, choice=choose):
    """Yields (case, share, zero before, chosen, which axes may go) for each event of a run."""
    case, rng = random_case(seed), np.random.default_rng([seed, 2])
    zero = np.zeros(case.limits.sizes.sum(), bool)
    for share in shares:
        salience = random_salience(rng, len(zero))
        may_go = rng.random(len(case.axes)) < (0.6 if some_stay else 1.1)
        chosen = choice(salience, zero, may_go, share, case.limits, case.budget)
        yield case, share, zero, chosen, may_go
        zero = zero | chosen


def goal_at(case, share):
    return case.budget.dense - (case.budget.dense - case.budget.goal) * share


def left(case, zero):
    return case.budget.work.left(case.limits.count(zero))


@pytest.mark.parametrize("some_stay", [False, True])
def test_limits_hold_in_every_event(some_stay):
    lost = partial = 0
    for seed in SEEDS:
        for case, _, zero, chosen, may_go in run(seed, some_stay=some_stay):
            gone = case.limits.count(zero | chosen)
            kept = case.limits.sizes - gone
            assert not (chosen & zero).any()  # no ZIG goes twice
            assert (gone <= case.limits.removable).all()
            assert (kept >= np.maximum(1, np.ceil(case.min_keep * case.limits.sizes))).all()
            assert (case.limits.count(chosen)[~may_go] == 0).all()
            odd = (gone > 0) & (kept % case.limits.kept_multiple > 0)
            # an exact number is met by a part of the last block; and an axis that stayed since may have kept its part
            assert odd.sum() <= (1 if case.budget.exact else 0) or (some_stay and case.budget.exact)
            for tie in np.unique(case.limits.tie):
                assert len(np.unique((gone / case.limits.sizes)[case.limits.tie == tie])) == 1
            lost, partial = lost + int(gone.sum()), partial + int(odd.sum())
    assert lost > 1000 and partial > 10


def without_limits(salience, zero, may_go, share, limits, budget):
    """Negative control: the first living ZIGs, whatever their axis."""
    living = ~zero
    return living & (np.cumsum(living) <= share * len(zero))


def test_limits_do_not_hold_by_themselves():
    events = [event for seed in SEEDS for event in run(seed, choice=without_limits)]
    gone = [(case.limits, case.limits.count(zero | chosen)) for case, _, zero, chosen, _ in events]
    assert any((n > limits.removable).any() for limits, n in gone)
    assert any(((limits.sizes - n) % limits.kept_multiple)[n > 0].any() for limits, n in gone)
    assert any((n / limits.sizes != (n / limits.sizes)[limits.tie]).any() for limits, n in gone)


@pytest.mark.parametrize("some_stay", [False, True])
def test_the_goal_is_met_or_all_is_gone(some_stay):
    """A share that is met is overshot by one block at most, whose cost is that in the dense model."""
    met = exhausted = 0
    for seed in SEEDS:
        for case, share, zero, chosen, may_go in run(seed, some_stay=some_stay):
            limits, now = case.limits, left(case, zero | chosen)
            may_go = ~np.isin(limits.tie, limits.tie[~may_go])
            if now > goal_at(case, share) + 0.5:
                gone = limits.count(zero | chosen)
                assert (gone == limits.removable)[may_go].all()
                exhausted += 1
            elif chosen.any():
                assert goal_at(case, share) - now <= case.overshoot + 0.5
                met += 1
            if not some_stay:
                assert now <= goal_at(case, share) + (0 if share == 1 else 0.5)
                if case.budget.exact:
                    asked = round(share * (case.budget.dense - case.budget.goal))
                    assert (zero | chosen).sum() == asked
    assert met > 300 and (exhausted > 20) == some_stay


def forgetful(salience, zero, *more):
    """Negative control: a choice that doesn't count what is zero already."""
    return choose(salience, np.zeros_like(zero), *more) & ~zero


@pytest.mark.parametrize("choice", [choose, forgetful])
def test_a_goal_that_is_met_takes_no_more_zigs(choice):
    """A block that overshot an early goal is gone: no other is taken in its place."""
    idle = taken = 0
    for seed in SEEDS:
        for case, share, zero, chosen, _ in run(seed, choice=choice):
            if left(case, zero) <= goal_at(case, share) - 0.5:
                idle += 1
                taken += int(chosen.sum())
    assert idle > 20 and (taken > 0) == (choice is forgetful)


def test_a_larger_share_chooses_no_fewer():
    """An exact number grows with the share; of single ZIGs it chooses the same, and more."""
    shares, grown = (0.2, 0.5, 0.7, 1.0), 0
    for seed in SEEDS:
        case = random_case(seed)
        salience, _, zero, may_go, _ = random_moment(case, seed)
        masks = [choose(salience, zero, may_go, share, case.limits, case.budget) for share in shares]
        for smaller, larger in itertools.pairwise(masks if case.budget.exact else []):
            assert larger.sum() >= smaller.sum()
            assert (larger >= smaller).all() or (case.limits.kept_multiple > 1).any()
            grown += int(larger.sum() > smaller.sum())
    assert grown > 50


@pytest.mark.parametrize("asked", range(1, 15))
def test_the_least_salient_go(asked):
    """Of single ZIGs and equal costs: of all that may go. One of each axis stays, the most salient."""
    limits = limits_of([prunable(a, 8, 1) for a in range(2)], Target("target_group_sparsity", 0.5))
    budget = Budget(Work.of([[(8, ((a, 1),))] for a in range(2)], 2), 16.0 - asked, np.ones(2), True)
    salience = np.array([5, 1, 6, 2, 7, 3, 8, 4, 50, 10, 60, 20, 70, 30, 80, 40], float)
    none, all_may = np.zeros(16, bool), np.ones(2, bool)
    expected = [z for z in np.argsort(salience) if salience[z] not in (8, 80)][:asked]
    assert np.flatnonzero(choose(salience, none, all_may, 1.0, limits, budget)).tolist() == sorted(expected)
    other = np.flatnonzero(choose(-salience, none, all_may, 1.0, limits, budget)).tolist()  # negative control
    assert other != sorted(expected)
