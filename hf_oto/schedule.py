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

FIRST_SAMPLES = 6  # batches that the first choice is made by; later ones take as many fewer as they choose less
SHRINKS_PER_EVENT = 2
LITTLE_LEFT = 0.2  # fraction of the model below which pruning ends early: what stays then needs the time


@dataclass(frozen=True)
class Schedule:
    """The steps of a run after which something happens, counted from 1.

    Attributes:
        events: after each but the last of them redundant ZIGs are chosen, and after each but the first they are zero.
            Empty where nothing is pruned.
    """

    events: tuple[int, ...] = ()

    @classmethod
    def over(
        cls, total_steps: int, left: float, window: tuple[float, float] | None = None, num_events: int | None = None
    ) -> Schedule:
        """Events evenly over a window.

        Args:
            total_steps: optimizer steps of the whole run.
            left: fraction of the model that is left in the end, in [0, 1].
            window: fractions of the run at which pruning starts and ends; None: see `DHSPG`.
            num_events: choices in the window; None: see `DHSPG`.

        Raises:
            ValueError: no such window, or too few steps for it.
        """
        little = round(left, 2) <= LITTLE_LEFT
        count = num_events or (16 if little else 8)
        if window is None:
            end = min(0.6, max(0.25, 0.1 + (count + 2) / max(1, total_steps))) if little else 0.6
            window = (0.1, end)
        first, last = window
        if not 0 <= first < last <= 1:
            raise ValueError(f"window is {window}: it must be two fractions of the run, 0 <= start < end <= 1")
        begin, end = max(1, round(first * total_steps)), round(last * total_steps)
        if end - begin < count:
            needed = math.ceil((count + 2) / (last - first))
            raise ValueError(
                f"total_steps is {total_steps}, fewer training steps than the pruning window {window} with {count} "
                f"events needs: train for {needed} steps or more, or widen the window"
            )
        return cls(tuple(begin + round(i * (end - begin) / count) for i in range(count + 1)))

    def share_chosen_at(self, step: int) -> float | None:
        """How much of the way to the target is chosen once this step's choice is made, in (0, 1]; None at steps
        without a choice. A cubic: most goes early, while the rest has time to take over."""
        if step not in self.events[:-1]:
            return None
        return self._share(self.events.index(step) + 1)

    def _share(self, choices: int) -> float:
        return 1 - (1 - choices / (len(self.events) - 1)) ** 3

    @functools.cached_property
    def sample_steps(self) -> frozenset[int]:
        """The steps whose gradients count for salience, evenly spread before each choice."""
        steps: set[int] = set()
        for i, (previous, event) in enumerate(zip((0, *self.events), self.events[:-1], strict=False)):
            part = (self._share(i + 1) - self._share(i)) / self._share(1)
            count = min(max(1, round(FIRST_SAMPLES * part)), event - previous)
            steps |= {event - k * (event - previous) // count for k in range(count)}
        return frozenset(steps)

    @functools.cached_property
    def factors(self) -> dict[int, float]:
        """By what redundant ZIGs are multiplied after a step: linearly down to 0 at each event but the first."""
        factors = {}
        for previous, event in itertools.pairwise(self.events):
            length = event - previous
            steps = sorted(
                {previous + math.ceil(i * length / SHRINKS_PER_EVENT) for i in range(SHRINKS_PER_EVENT + 1)}
            )
            for before, now in itertools.pairwise(steps):
                factors[now] = (event - now) / (event - before)
        return factors
