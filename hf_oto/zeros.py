"""Zeros stay zero: what moves a ZIG that is zero is found in the same step, and from then on undone after every step.

A loss alone moves none: what reads a zero ZIG is zero too, and so are its gradients. Noise on the gradients, a penalty
on the distance to other weights, a teacher of hidden states, or a momentum that can't be zeroed, do.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .slices import Rows, Slice, local, rows_of

logger = logging.getLogger(__name__)

LOOK_ELSEWHERE = 50  # steps after which other zeros are looked at

Pairs = list[tuple[Rows, Tensor]]  # zero positions of a parameter, and what this rank holds of it


class HeldZeros:
    """Looks after the zeros of an optimizer.

    Attributes:
        restless: (parameter, dimension) of slices whose zeros are written again after every step.
    """

    def __init__(self, group: tuple[Slice, ...], restless: Iterable[tuple[str, int]]) -> None:
        self.restless = set(restless)
        self._group = group
        self._forget()

    def _forget(self) -> None:
        self._mask: Tensor | None = None
        self._rows: list[Rows] = []
        self._full_looks = 0
        self._views_of: tuple[int, list[int]] = (0, [])
        self._views: list[Tensor] = []

    def __getstate__(self) -> dict[str, Any]:
        """Indices and views are found again."""
        return {"restless": self.restless, "_group": self._group}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    @property
    def nbytes(self) -> int:
        """Memory of the indices, in bytes."""
        indices = {id(rows.index): rows.index for rows in self._rows}
        return sum(index.numel() * index.element_size() for index in indices.values())

    def _pairs(self, zero: Tensor, params: Mapping[str, Tensor]) -> Pairs:
        """All zero positions, found once for each mask: a freeze, or loading, makes another tensor of it."""
        if self._mask is not zero:
            self._mask, self._rows = zero, rows_of(zero.cpu() > 0, self._group, params)
            self._full_looks = 2
        return [(rows, local(params[rows.slice.param])) for rows in self._rows]

    def moved(self, zero: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """Which ZIGs of a mask, uint8 (num_zigs,), are not zero in what this rank holds; bool, on the CPU."""
        moved = torch.zeros(len(zero), dtype=torch.bool, device="cpu")
        for rows, p in self._pairs(zero, params):
            lives = p.index_select(rows.slice.dim, rows.index) != 0
            others = [d for d in range(lives.dim()) if d != rows.slice.dim]
            lives = (lives.any(dim=others) if others else lives).cpu()
            moved[rows.slice.owner[rows.index.cpu()][lives].long()] = True
        return moved

    def hold_(self, zero: Tensor, params: Mapping[str, Tensor], now: int) -> None:
        """Zeroes again what moved, and remembers which parameters do that.

        All zero positions are looked at in the step of a freeze and in the next, in which momentum that could not be
        zeroed would show; later one ZIG of every parameter, as what moves zeros moves all of them.

        Args:
            zero: the mask, uint8 (num_zigs,).
            now: the number of the step.
        """
        pairs = self._pairs(zero, params)
        watched = [(rows, p) for rows, p in pairs if rows.key not in self.restless]
        if self._full_looks > 0:
            self._full_looks -= 1
            moved = [(rows, p) for rows, p in watched if p.index_select(rows.slice.dim, rows.index).any()]
        else:
            moved = watched if self._one_of_each_moved(watched, now) else []
        if moved:
            self.restless |= {rows.key for rows, _ in moved}
            logger.info(
                "something besides the loss moves ZIGs that are zero, of %s and %d other parameters (noise on "
                "gradients, a penalty, a momentum that can't be zeroed): they are zeroed after every step from now on",
                moved[0][0].slice.param, len(moved) - 1,
            )  # fmt: skip
        for rows, p in pairs:
            if rows.key in self.restless:
                p.index_fill_(rows.slice.dim, rows.index, 0)

    def _one_of_each_moved(self, watched: Sequence[tuple[Rows, Tensor]], now: int) -> bool:
        """Whether, of any parameter, one ZIG is not zero; which one changes every LOOK_ELSEWHERE steps."""
        turn = now // LOOK_ELSEWHERE
        views_of = (turn, [p.data_ptr() for _, p in watched])
        if views_of != self._views_of:  # views are made once: of small models these would cost more than the look
            ones = [p.select(rows.slice.dim, rows.positions[turn % len(rows.positions)]) for rows, p in watched]
            self._views = [one.reshape(-1) if one.is_contiguous() else one for one in ones]
            self._views_of = views_of
        alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for view in self._views:
            flat = view if view.dim() == 1 else view.reshape(-1)
            alike.setdefault((view.device, view.dtype), []).append(flat)
        return any(bool(torch.cat(views).any()) for views in alike.values())
