"""What a cut saves: parameters and MACs as sums of products of widths, from which ZIGs take positions.

Worked example: a weight of 6 x 4 whose rows are the 3 heads of axis 0, 2 channels each, is the term 6 * 4 with the
width (6, ((0, 2.0),)). Without one head 4 * 4 is left, so that one head alone takes 8.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

Width = tuple[int, tuple[tuple[int, float], ...]]  # positions, and how many of them one ZIG of an (axis, n) takes


class Work(NamedTuple):
    """An amount, of parameters or MACs, as a sum of products of widths that a cut makes smaller."""

    factors: np.ndarray  # (terms, k), which widths each term multiplies; the last one is 1
    times: np.ndarray  # (terms,), what is no width of any axis
    full: np.ndarray  # (widths,)
    lost: np.ndarray  # (widths, axes), what one ZIG of an axis takes

    @classmethod
    def of(cls, terms: Iterable[Sequence[Width]], axes: int) -> Work:
        """The sum of the products of the given widths."""
        times: Counter[tuple[Width, ...]] = Counter()
        for term in terms:
            cut = tuple(sorted(width for width in term if width[1]))
            times[cut] += math.prod(n for n, zigs in term if not zigs)
        widths = {width: i for i, width in enumerate(dict.fromkeys(w for cut in times for w in cut))}
        longest = max(map(len, times), default=0)
        factors = np.full((len(times), longest), len(widths))
        for row, cut in zip(factors, times, strict=True):
            row[: len(cut)] = [widths[w] for w in cut]
        lost = np.zeros((len(widths), axes))
        for (_, zigs), i in widths.items():
            for axis, n in zigs:
                lost[i, axis] = n
        return cls(factors, np.array([*times.values()], float), np.array([n for n, _ in widths], float), lost)

    def left(self, gone: np.ndarray) -> float:
        """How much is left without so many ZIGs of every axis, (axes,)."""
        widths = np.append(self.full - self.lost @ gone, 1.0)
        return float(self.times @ widths[self.factors].prod(1))

    @property
    def alone(self) -> np.ndarray:
        """What one ZIG of every axis takes with it when it is the first to go, (axes,).

        A term a * b without n of the positions of a is (1 - n / a) of itself.
        """
        axes_of_width: list[list[tuple[int, float]]] = [[] for _ in range(len(self.full) + 1)]  # the last width is 1
        for width, axis in zip(*np.nonzero(self.lost), strict=True):
            axes_of_width[width].append((axis, 1 - self.lost[width, axis] / self.full[width]))
        terms = self.times * np.append(self.full, 1.0)[self.factors].prod(1)
        alone = np.zeros(self.lost.shape[1])
        for term, widths in zip(terms, self.factors, strict=True):
            stays: dict[int, float] = {}  # axis -> the fraction of the term that is left without one of its ZIGs
            for width in widths:
                for axis, fraction in axes_of_width[width]:
                    stays[axis] = stays.get(axis, 1.0) * fraction
            for axis, fraction in stays.items():
                alone[axis] += term * (1 - fraction)
        return alone
