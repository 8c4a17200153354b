"""What a cut saves: parameters and MACs as sums of products of widths, from which ZIGs take positions.

Any amount is counted exactly, for any number of ZIGs of every axis, in time linear in the number of terms.

Worked example: a weight of 6 x 4 whose rows are the 3 heads of axis 0, 2 channels each, is the term 6 * 4 with the
width (6, ((0, 2.0),)). Without one head 4 * 4 is left, so that one head alone takes 8.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

# the number of positions, and (axis, number of positions that one ZIG of the axis takes) for each axis that takes some
Width = tuple[int, tuple[tuple[int, float], ...]]


class Work(NamedTuple):
    """An amount, of parameters or MACs, as a sum of products of widths that a cut makes smaller."""

    factors: np.ndarray  # (terms, k), numbers of the widths that a term multiplies; one more than the last is 1
    times: np.ndarray  # (terms,), the product of the widths of a term that no axis makes smaller
    full: np.ndarray  # (widths,), positions before the cut
    lost: np.ndarray  # (widths, axes), positions that one ZIG of an axis takes

    @classmethod
    def of(cls, terms: Iterable[Sequence[Width]], axes: int) -> Work:
        """The sum of the products of the given widths."""
        times: Counter[tuple[Width, ...]] = Counter()  # terms of the same widths, as those of equal layers, are one
        for term in terms:
            widths_cut = tuple(sorted(width for width in term if width[1]))
            times[widths_cut] += math.prod(n for n, lost_to_axes in term if not lost_to_axes)
        number_of_width: dict[Width, int] = {}
        for widths_cut in times:
            for width in widths_cut:
                number_of_width.setdefault(width, len(number_of_width))

        num_widths = len(number_of_width)
        longest = max(map(len, times), default=0)
        factors = np.full((len(times), longest), num_widths)
        for row, widths_cut in zip(factors, times, strict=True):
            row[: len(widths_cut)] = [number_of_width[width] for width in widths_cut]
        lost = np.zeros((num_widths, axes))
        for (_, lost_to_axes), number in number_of_width.items():
            for axis, n in lost_to_axes:
                lost[number, axis] = n
        full = np.array([n for n, _ in number_of_width], float)
        return cls(factors, np.array([*times.values()], float), full, lost)

    def left(self, gone: np.ndarray) -> float:
        """How much is left without `gone` ZIGs of every axis, (axes,)."""
        widths = np.append(self.full - self.lost @ gone, 1.0)  # (widths + 1,)
        return float(self.times @ widths[self.factors].prod(1))

    def without(self, gone: np.ndarray) -> Work:
        """The amount that is left without `gone` ZIGs of every axis, (axes,)."""
        return self._replace(full=self.full - self.lost @ gone)

    @property
    def alone(self) -> np.ndarray:
        """What one ZIG of every axis takes with it when it is the first to go, (axes,).

        A term a * b without n of the positions of a is (1 - n / a) of itself.
        """
        # width -> (axis, the fraction of the width that is left without one ZIG of the axis)
        axes_of_width: list[list[tuple[int, float]]] = [[] for _ in range(len(self.full) + 1)]  # the last one is 1
        for width, axis in zip(*np.nonzero(self.lost), strict=True):
            axes_of_width[width].append((axis, 1 - self.lost[width, axis] / self.full[width]))
        full_terms = self.times * np.append(self.full, 1.0)[self.factors].prod(1)  # (terms,)
        alone = np.zeros(self.lost.shape[1])
        for full_term, widths in zip(full_terms, self.factors, strict=True):
            fraction_left: dict[int, float] = {}  # of the term, without one ZIG of an axis
            for width in widths:
                for axis, fraction in axes_of_width[width]:
                    fraction_left[axis] = fraction_left.get(axis, 1.0) * fraction
            for axis, fraction in fraction_left.items():
                alone[axis] += full_term * (1 - fraction)
        return alone
