"""Laws of the schedule: events in their window, samples before each choice, factors that end in zero."""

import itertools
import math
import re

import numpy as np
import pytest

from hf_oto.schedule import FIRST_SAMPLES, LITTLE_LEFT, Schedule


def random_runs(count=400):
    """(total steps, fraction left, window, events) that fit, and those that don't."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        total = int(rng.integers(1, 3000) if rng.random() < 0.7 else rng.integers(1, 60))
        window = None
        if rng.random() < 0.6:
            window = tuple(np.sort(rng.random(2)).tolist())
        yield total, float(rng.random()), window, [None, 1, 2, 5, 30][rng.integers(5)]


def schedules():
    for total, left, window, events in random_runs():
        try:
            yield total, left, window, events, Schedule.over(total, left, window, events)
        except ValueError:
            continue


def test_events_lie_in_their_window():
    """In order, as many as asked for, the first and the last at its ends."""
    found = 0
    for total, left, window, count, schedule in schedules():
        events = schedule.events
        assert list(events) == sorted(set(events)) and 1 <= events[0] and events[-1] <= total
        assert len(events) == 1 + (count or (16 if round(left, 2) <= LITTLE_LEFT else 8))
        first, last = window or (0.1, 0.6)
        assert events[0] == max(1, round(first * total))
        assert events[-1] == round(last * total) or (window is None and events[-1] <= math.ceil(last * total))
        gaps = np.diff(events)
        assert gaps.max() - gaps.min() <= 1  # evenly
        found += 1
    assert found > 150


def test_the_number_of_steps_that_an_error_asks_for_is_enough():
    refused = 0
    for total, left, window, events in random_runs():
        try:
            Schedule.over(total, left, window, events)
        except ValueError as error:
            needed = int(re.search(r"train for (\d+) steps", str(error)).group(1))
            Schedule.over(needed, left, window, events)
            assert needed > total
            refused += 1
    assert refused > 50


def test_the_share_ends_at_the_whole():
    """It grows with every choice, by ever less; there is none at any other step."""
    for total, *_, schedule in schedules():
        shares = [schedule.share_chosen_at(step) for step in range(total + 1)]
        assert [step for step, share in enumerate(shares) if share is not None] == list(schedule.events[:-1])
        given = [0.0] + [share for share in shares if share is not None]
        assert given[-1] == 1
        steps = np.diff(given)
        assert (steps > 0).all() and (np.diff(steps) < 0).all()


def test_every_choice_has_samples_before_it():
    """The last one at the step of the choice; the first choice has the most, and none comes after the last."""
    for *_, schedule in schedules():
        samples, choices = sorted(schedule.sample_steps), schedule.events[:-1]
        counts = [sum(a < s <= b for s in samples) for a, b in itertools.pairwise((0, *choices))]
        assert all(event in schedule.sample_steps for event in choices)
        assert sum(counts) == len(samples) and samples[0] >= 1
        assert counts[0] == min(FIRST_SAMPLES, choices[0])
        assert all(1 <= count <= FIRST_SAMPLES for count in counts)


def test_factors_shrink_linearly_to_zero_at_each_event():
    """What is left of a redundant ZIG falls along a line from the event that chose it to the next."""
    shrinks = 0
    for *_, schedule in schedules():
        events, factors = schedule.events, schedule.factors
        assert all(events[0] < step <= events[-1] for step in factors)
        for before, event in itertools.pairwise(events):
            left = 1.0
            for step in range(before + 1, event + 1):
                if step in factors:
                    left *= factors[step]
                    assert left == pytest.approx((event - step) / (event - before))
                    shrinks += left > 0
            assert factors[event] == 0 and left == 0
    assert shrinks > 500


def test_without_events_nothing_happens():
    for schedule in (Schedule(), Schedule((7,))):  # the second is that of OTOv2's own rule: one step, and no plan
        assert not schedule.sample_steps and not schedule.factors
        assert all(schedule.share_chosen_at(step) is None for step in range(20))
    some = Schedule((7, 9))  # negative control
    assert some.sample_steps and some.factors == {8: 0.5, 9: 0.0} and some.share_chosen_at(7) == 1


@pytest.mark.parametrize("window", [(0.5, 0.5), (0.6, 0.1), (-0.1, 0.5), (0.1, 1.1)])
def test_no_such_window(window):
    with pytest.raises(ValueError, match="0 <= start < end <= 1"):
        Schedule.over(1000, 0.5, window)
