"""When DHSPG acts: the optimizer steps at which it samples salience, chooses ZIGs, shrinks them, and freezes them.

Worked example: events (6, 10, 14) of a run. Up to step 6 salience is sampled; after step 6 the first ZIGs are chosen;
after steps 8 and 10 they are shrunk to a half and to zero; after step 10 the last ones are chosen, and after step 14
these are zero too. From then on the base optimizer trains the rest alone.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

FIRST_SAMPLES = 6  # batches that the first choice is made by; a later choice of half as many ZIGs needs half as many
SHRINKS_PER_EVENT = 2  # ZIGs are multiplied so many times, the last time by 0, on their way from the choice to zero
LITTLE_LEFT = 0.2  # where at most this fraction of the model is left, pruning ends early: the rest needs the time


@dataclass(frozen=True)
class Schedule:
    """The steps of a run after which something happens, counted from 1.

    Attributes:
        events: after each event but the last redundant ZIGs are chosen, and at the next event these become zero. There
            is none where nothing is pruned.
    """

    events: tuple[int, ...] = ()

    @classmethod
    def over(
        cls, total_steps: int, left: float, window: tuple[float, float] | None = None, num_events: int | None = None
    ) -> Schedule:
        """A schedule with its events spread evenly over a window.

        Args:
            total_steps: optimizer steps of the whole run.
            left: fraction of the model that is left in the end, in [0, 1].
            window: fractions of the run at which pruning starts and ends; None: see `DHSPG`.
            num_events: choices in the window; None: see `DHSPG`.

        Raises:
            ValueError: the window is none, or has fewer steps than events.
        """
        if total_steps < 1:
            raise ValueError("total_steps is missing: give the number of optimizer steps of the whole run")
        is_little_left = round(left, 2) <= LITTLE_LEFT
        count = num_events or (16 if is_little_left else 8)
        if window is None and is_little_left:
            shortest = (count + 2) / max(1, total_steps)  # a run may be too short for its events to end at 0.25
            window = (0.1, min(0.6, max(0.25, 0.1 + shortest)))
        elif window is None:
            window = (0.1, 0.6)
        start, end = window
        if not 0 <= start < end <= 1:
            raise ValueError(f"window is {window}: it must be two fractions of the run, 0 <= start < end <= 1")
        first_step = max(1, round(start * total_steps))
        last_step = round(end * total_steps)
        if last_step - first_step < count:
            needed = math.ceil((count + 2) / (end - start))
            raise ValueError(
                f"total_steps is {total_steps}, fewer training steps than the pruning window {window} with {count} "
                f"events needs: train for {needed} steps or more, or widen the window"
            )
        length = last_step - first_step
        return cls(tuple(first_step + round(i * length / count) for i in range(count + 1)))

    def share_chosen_at(self, step: int) -> float | None:
        """How much of the way to the target is chosen with the choice after this step, in (0, 1]; None without one.

        It is a cubic function of the number of choices: most ZIGs go early, while the rest has time to take over.
        """
        if step not in self.events[:-1]:
            return None
        return self._share(self.events.index(step) + 1)

    def _share(self, choices_made: int) -> float:
        num_choices = len(self.events) - 1
        return 1 - (1 - choices_made / num_choices) ** 3

    @functools.cached_property
    def sample_steps(self) -> frozenset[int]:
        """The steps whose gradients count for salience, evenly spread before each choice."""
        steps: set[int] = set()
        choices = self.events[:-1]
        for i, (previous, choice) in enumerate(zip((0, *self.events), choices, strict=False)):
            chosen_beside_first = (self._share(i + 1) - self._share(i)) / self._share(1)
            length = choice - previous
            count = min(max(1, round(FIRST_SAMPLES * chosen_beside_first)), length)
            steps |= {choice - k * length // count for k in range(count)}
        return frozenset(steps)

    @functools.cached_property
    def factors(self) -> dict[int, float]:
        """Step -> the factor by which redundant ZIGs are multiplied after it.

        The ZIGs shrink linearly and are 0 at the next event: after two equal stretches the factors are 1/2 and 0.
        """
        factors = {}
        for choice, event in itertools.pairwise(self.events):
            length = event - choice
            # a set, because a short stretch has fewer steps than SHRINKS_PER_EVENT
            steps = {choice + math.ceil(i * length / SHRINKS_PER_EVENT) for i in range(SHRINKS_PER_EVENT + 1)}
            for before, now in itertools.pairwise(sorted(steps)):
                factors[now] = (event - now) / (event - before)
        return factors
