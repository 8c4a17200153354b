"""What a cut saves: parameters and MACs as sums of products of widths, from which ZIGs take positions.

Every amount is counted exactly, for any number of ZIGs of every axis, in time linear in the number of terms.

Worked example: a weight of shape (6, 4), whose rows are the 3 heads of axis 0 with 2 channels each, is the term 6 * 4.
The width 6 is written (6, ((0, 2.0),)): each ZIG of axis 0 takes 2 of its positions. Without one head 4 * 4 is left,
so one head alone takes 8.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

LostToAxis = tuple[int, float]  # (axis, number of positions that one ZIG of the axis takes)
# (number of positions, one entry for each axis that takes some of them); no entry: a cut leaves the width as it is
Width = tuple[int, tuple[LostToAxis, ...]]


class Work(NamedTuple):
    """An amount of parameters or MACs: a sum of terms, each a product of widths that a cut makes smaller.

    Terms have different numbers of widths. The shorter ones are filled up with the number `widths`, one more than the
    last, which stands for a width of 1.
    """

    factors: np.ndarray  # (terms, longest), numbers of the widths that a term multiplies
    times: np.ndarray  # (terms,), the product of the widths of a term that no axis makes smaller
    full: np.ndarray  # (widths,), positions before the cut
    lost: np.ndarray  # (widths, axes), positions that one ZIG of an axis takes

    @classmethod
    def of(cls, terms: Iterable[Sequence[Width]], axes: int) -> Work:
        """The sum of the products of the given widths."""
        # terms of the same widths, as those of equal layers, become one term
        times_of_widths: Counter[tuple[Width, ...]] = Counter()
        for term in terms:
            times = 1
            widths_cut: list[Width] = []
            for width in term:
                n, lost_to_axes = width
                if lost_to_axes:
                    widths_cut.append(width)
                else:
                    times *= n
            times_of_widths[tuple(sorted(widths_cut))] += times

        number_of_width: dict[Width, int] = {}
        for widths in times_of_widths:
            for width in widths:
                number_of_width.setdefault(width, len(number_of_width))

        num_widths = len(number_of_width)
        num_terms = len(times_of_widths)
        longest = max(map(len, times_of_widths), default=0)
        factors = np.full((num_terms, longest), num_widths)
        for i, widths in enumerate(times_of_widths):
            for k, width in enumerate(widths):
                factors[i, k] = number_of_width[width]

        full = np.zeros(num_widths)
        lost = np.zeros((num_widths, axes))
        for (n, lost_to_axes), number in number_of_width.items():
            full[number] = n
            for axis, lost_positions in lost_to_axes:
                lost[number, axis] = lost_positions
        times_of_term = np.array([*times_of_widths.values()], float)
        return cls(factors, times_of_term, full, lost)

    def _products(self, widths: np.ndarray) -> np.ndarray:
        """The product of the widths of every term, (terms,), if the widths have these sizes, (widths,)."""
        widths_and_one = np.append(widths, 1.0)  # the last one is what fills up shorter terms
        return widths_and_one[self.factors].prod(1)

    def left(self, gone: np.ndarray) -> float:
        """The amount that is left after `gone` ZIGs of every axis are removed, shape (axes,)."""
        widths = self.full - self.lost @ gone
        return float(self.times @ self._products(widths))

    def without(self, gone: np.ndarray) -> Work:
        """The amount that is left without `gone` ZIGs of every axis, (axes,)."""
        return self._replace(full=self.full - self.lost @ gone)

    @property
    def alone(self) -> np.ndarray:
        """The amount that the first ZIG of every axis takes with it if the other axes stay whole, (axes,).

        If a term a * b loses n of the positions of a, then the fraction (1 - n / a) of the term is left.
        """
        num_axes = self.lost.shape[1]
        # number of a width -> {axis: the fraction of the width that is left without one ZIG of the axis}
        fractions_of_width: dict[int, dict[int, float]] = defaultdict(dict)
        for width, axis in np.argwhere(self.lost):
            lost_fraction = self.lost[width, axis] / self.full[width]
            fractions_of_width[width][axis] = 1 - lost_fraction

        alone = np.zeros(num_axes)
        full_terms = self.times * self._products(self.full)  # (terms,)
        for full_term, widths in zip(full_terms, self.factors, strict=True):
            fraction_of_term: dict[int, float] = defaultdict(lambda: 1.0)  # axis -> what is left of the term
            for width in widths:
                for axis, fraction in fractions_of_width[width].items():
                    fraction_of_term[axis] *= fraction
            for axis, fraction in fraction_of_term.items():
                alone[axis] += full_term * (1 - fraction)
        return alone
