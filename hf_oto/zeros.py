"""Zeros stay zero: a move of a ZIG that is zero is found in the same step, and from then on undone after every step.

A loss alone moves no such ZIG: what reads it is zero too, and so are its gradients. Noise on the gradients, a penalty
on the distance to other weights, a teacher of hidden states, or a momentum that can't be zeroed, do move it.

Worked example: ZIGs 3 and 7 become zero in step 100. In steps 100 and 101 all their weights are looked at. From step
102 on only one of their positions in each parameter is, because a look at everything in each step would be slow. If
noise on the gradients moves the ZIGs in step 120, they are zeroed again in this step and in all later ones.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .slices import Rows, Slice, local, rows_of

logger = logging.getLogger(__name__)

LOOK_ELSEWHERE = 50  # steps after which other zeros are looked at

ZeroRows = list[tuple[Rows, Tensor]]  # zero positions of a parameter, and what this rank holds of the parameter


class HeldZeros:
    """Looks after the zeros of an optimizer.

    Attributes:
        restless: (parameter, dimension) of every slice whose zeros are written again after every step.
    """

    def __init__(self, group: tuple[Slice, ...], restless: Iterable[tuple[str, int]]) -> None:
        self.restless = set(restless)
        self._group = group
        self._forget()

    def _forget(self) -> None:
        """Forgets everything that is derived from the mask and the parameters."""
        self._mask: Tensor | None = None  # the mask that the rows are of
        self._rows: list[Rows] = []
        self._full_looks = 0  # how many times more everything is looked at
        self._views_of: tuple[int, list[int]] = (0, [])  # the turn and the addresses that the views are of
        self._views: list[Tensor] = []  # one zero ZIG in each parameter

    def __getstate__(self) -> dict[str, Any]:
        """Without indices and views, which are found again."""
        return {"restless": self.restless, "_group": self._group}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    @property
    def nbytes(self) -> int:
        """Memory of the indices, in bytes."""
        indices = {id(rows.index): rows.index for rows in self._rows}
        return sum(index.numel() * index.element_size() for index in indices.values())

    def _zero_rows(self, zero: Tensor, params: Mapping[str, Tensor]) -> ZeroRows:
        """All zero positions, which are found once for each mask."""
        if self._mask is not zero:  # a freeze, and loading a state, put another tensor in the place of the mask
            self._mask = zero
            self._rows = rows_of(zero.cpu() > 0, self._group, params)
            self._full_looks = 2
        return [(rows, local(params[rows.slice.param])) for rows in self._rows]

    def moved(self, zero: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """Which ZIGs of a mask, uint8 (num_zigs,), are not zero in what this rank holds; bool, on the CPU."""
        moved = torch.zeros(len(zero), dtype=torch.bool, device="cpu")
        for rows, p in self._zero_rows(zero, params):
            is_nonzero = p.index_select(rows.slice.dim, rows.index) != 0
            others = [d for d in range(is_nonzero.dim()) if d != rows.slice.dim]
            row_moved = is_nonzero.any(dim=others) if others else is_nonzero  # (k,)
            owner = rows.slice.owner[rows.index.cpu()]  # (k,)
            moved[owner[row_moved.cpu()].long()] = True
        return moved

    def hold_(self, zero: Tensor, params: Mapping[str, Tensor], now: int) -> None:
        """Zeroes again what moved, and remembers the parameters in which zeros move.

        All zero positions are looked at in the step of a freeze and in the next one, in which a momentum that could
        not be zeroed would show. Later one ZIG of every parameter is looked at, because what moves zeros (noise, a
        penalty) moves all of them.

        Args:
            zero: the mask, uint8 (num_zigs,).
            now: the number of the step.
        """
        zero_rows = self._zero_rows(zero, params)
        watched = [(rows, p) for rows, p in zero_rows if rows.key not in self.restless]
        if self._full_looks > 0:
            self._full_looks -= 1
            moved = [(rows, p) for rows, p in watched if p.index_select(rows.slice.dim, rows.index).any()]
        elif self._one_of_each_moved(watched, now):
            moved = watched
        else:
            moved = []
        if moved:
            self.restless |= {rows.key for rows, _ in moved}
            logger.info(
                "something besides the loss moves ZIGs that are zero, of %s and %d other parameters (noise on "
                "gradients, a penalty, a momentum that can't be zeroed): they are zeroed after every step from now on",
                moved[0][0].slice.param, len(moved) - 1,
            )  # fmt: skip
        for rows, p in zero_rows:
            if rows.key in self.restless:
                p.index_fill_(rows.slice.dim, rows.index, 0)

    def _one_of_each_moved(self, watched: ZeroRows, now: int) -> bool:
        """Looks at one position in each parameter, and says whether any of these is not zero.

        Which position it is changes every LOOK_ELSEWHERE steps.
        """
        turn = now // LOOK_ELSEWHERE
        views_of = (turn, [p.data_ptr() for _, p in watched])
        if views_of != self._views_of:  # in small models, making the views would cost more than looking at them
            self._views = []
            for rows, p in watched:
                position = rows.positions[turn % len(rows.positions)]
                view = p.select(rows.slice.dim, position)
                self._views.append(view.reshape(-1) if view.is_contiguous() else view)
            self._views_of = views_of
        # one concatenation and one look for all views that can be joined
        views_alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for view in self._views:
            flat = view if view.dim() == 1 else view.reshape(-1)  # a copy, where the view isn't contiguous
            views_alike.setdefault((view.device, view.dtype), []).append(flat)
        return any(bool(torch.cat(views).any()) for views in views_alike.values())
