"""Zeros stay zero: a ZIG that is zero and moves is found in the same step, and zeroed in this and every later step.

A loss alone moves no such ZIG: what reads the ZIG is zero too, and so are the gradients of the ZIG. But it is moved by
noise on the gradients, by a penalty on the distance to other weights, by a teacher of hidden states, and by a momentum
that can't be zeroed.

Worked example: ZIGs 3 and 7 become zero in step 100. In steps 100 and 101 all their weights are looked at. From step
102 on only one of their positions in each parameter is looked at, because a look at everything in each step would be
slow. If noise on the gradients moves the ZIGs in step 120, they are zeroed again in step 120 and in all later steps.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .slices import Part, Rows, Slice, Tensors, local, on_this_rank, other_dims, rows_of, sum_over_zigs
from .zigs import PrunableAxis

logger = logging.getLogger(__name__)

LOOK_ELSEWHERE = 50  # steps after which other zeros are looked at


# the positions of a parameter whose ZIGs are zero, and what this rank holds of the parameter
ZeroRows = tuple[Rows, Tensor]


def _weights(rows: Rows, parameter: Tensor) -> Tensor:
    """A copy of the weights at some positions."""
    return parameter.index_select(rows.slice.dim, rows.index)


def dead_zigs(axes: Sequence[PrunableAxis], slices: Sequence[Slice], params: Mapping[str, Tensor]) -> Tensor:
    """The ZIGs that no training can move, uint8 (num_zigs,), on the CPU.

    All that makes them is zero and all that reads them is zero, so that neither side gets a gradient: units that an
    earlier run has pruned, say. Where zeros don't make a position zero, what reads it gets a gradient and may live.

    Args:
        axes: all axes, whose ZIGs are numbered in this order.
        slices: what ZIGs are made of, and what reads them and trains.
        params: parameter name -> parameter, unsharded or as a DTensor.
    """
    possible = can_be_dead(axes, params)
    num_zigs = len(possible)
    params_of_slices = {s.param: params[s.param] for s in slices}
    if not possible.any() or any(p.is_meta for p in params_of_slices.values()):  # shapes alone have no values
        return torch.zeros(num_zigs, dtype=torch.uint8, device="cpu")
    nonzero = (Part(s, None, p != 0) for s, p in on_this_rank(slices, params))
    (num_nonzero,) = sum_over_zigs([nonzero], params_of_slices, num_zigs)  # (num_zigs,)
    dead = possible & (num_nonzero == 0)
    if dead.any():
        logger.info("%d ZIGs are zero already, for good: they count for the target", int(dead.sum()))
    return dead.to(torch.uint8)


def can_be_dead(axes: Sequence[PrunableAxis], trained: Container[str]) -> Tensor:
    """The ZIGs that get no gradient once they are zero with all that reads them, bool (num_zigs,), on the CPU.

    Args:
        axes: all axes, whose ZIGs are numbered in this order.
        trained: the names of the parameters that train.
    """
    is_silent_axis = []
    for axis in axes:
        consumers = [member for member in axis.members if member.role == "consumer"]
        all_train = all(member.param in trained for member in consumers)
        is_silent_axis.append(axis.zero_path and bool(consumers) and all_train)
    possible = np.repeat(np.array(is_silent_axis, bool), [axis.size for axis in axes])  # (num_zigs,)
    return torch.from_numpy(possible)


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
        self._mask: Tensor | None = None  # the mask that the rows were found for
        self._rows: list[Rows] = []
        self._full_looks = 0  # in how many steps more everything is looked at
        self._views_of: tuple[int, list[int]] = (0, [])  # the turn and the addresses that the views were made for
        self._views: list[Tensor] = []  # one zero position in each parameter

    def __getstate__(self) -> dict[str, Any]:
        """Without indices and views, which are found again."""
        return {"restless": self.restless, "_group": self._group}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    @property
    def nbytes(self) -> int:
        """Memory of the indices, in bytes."""
        indices: dict[int, Tensor] = {}  # slices may share an index, and on the CPU both are one tensor
        for rows in self._rows:
            indices |= {id(rows.index): rows.index, id(rows.positions): rows.positions}
        return sum(index.nbytes for index in indices.values())

    def is_idle(self, zero: Tensor) -> bool:
        """Whether this rank holds nothing that a mask says is zero, which was seen when it was last asked."""
        return self._mask is zero and not self._rows

    def _zero_rows(self, zero: Tensor, params: Tensors) -> list[ZeroRows]:
        """All zero positions, which are found once for each mask."""
        # a freeze, and loading a state, put another tensor in the place of the mask
        if self._mask is not zero:
            self._mask = zero
            self._rows = rows_of(zero.cpu() > 0, self._group, params)
            self._full_looks = 2
        zero_rows = []
        for rows in self._rows:
            parameter = local(params[rows.slice.param])
            zero_rows.append((rows, parameter))
        return zero_rows

    def moved(self, zero: Tensor, params: Tensors) -> Tensor:
        """Which ZIGs of a mask, uint8 (num_zigs,), are not zero in what this rank holds; bool, on the CPU."""
        zero_rows = self._zero_rows(zero, params)
        rows_moved = []
        for rows, parameter in zero_rows:
            is_nonzero = _weights(rows, parameter) != 0
            others = other_dims(is_nonzero, rows.slice.dim)
            row_moved = is_nonzero.any(dim=others) if others else is_nonzero  # (k,)
            rows_moved.append(row_moved)
        moved = torch.zeros(len(zero), dtype=torch.bool, device="cpu")
        for (rows, _), row_moved in zip(zero_rows, _on_cpu(rows_moved), strict=True):
            owner = rows.slice.owner[rows.positions]  # (k,)
            moved_zigs = owner[row_moved]
            moved[moved_zigs.long()] = True
        return moved

    def hold_(self, zero: Tensor, params: Tensors, now: int) -> None:
        """Zeroes again what moved, and remembers the parameters in which zeros move.

        All zero positions are looked at in the step of a freeze and in the next step, where a momentum that could not
        be zeroed shows. Later one position in every parameter is looked at, because what moves zeros (noise, a
        penalty) moves all of them.

        Args:
            zero: the mask, uint8 (num_zigs,).
            now: the number of the step.
        """
        zero_rows = self._zero_rows(zero, params)
        watched = []
        for rows, parameter in zero_rows:
            if rows.key not in self.restless:  # the others are zeroed in any case
                watched.append((rows, parameter))
        moved: list[ZeroRows] = []
        if self._full_looks > 0:
            self._full_looks -= 1
            flags = [_weights(rows, parameter).any().view(1) for rows, parameter in watched]
            moved = [row for row, flag in zip(watched, _on_cpu(flags), strict=True) if flag]
        elif self._one_of_each_moved(watched, now):
            moved = watched
        if moved:
            self.restless.update(rows.key for rows, _ in moved)
            rows, _ = moved[0]
            first = rows.slice.param
            num_others = len(moved) - 1
            logger.info(
                "something besides the loss moves ZIGs that are zero, of %s and %d other parameters (noise on "
                "gradients, a penalty, a momentum that can't be zeroed): they are zeroed after every step from now on",
                first, num_others,
            )  # fmt: skip
        for rows, parameter in zero_rows:
            if rows.key in self.restless:
                parameter.index_fill_(rows.slice.dim, rows.index, 0)

    def _one_of_each_moved(self, watched: list[ZeroRows], now: int) -> bool:
        """Looks at one position in each parameter, and says whether any of them is not zero.

        Every LOOK_ELSEWHERE steps another position is looked at.
        """
        turn = now // LOOK_ELSEWHERE
        addresses = [parameter.data_ptr() for _, parameter in watched]
        views_of = (turn, addresses)
        # in small models, making the views would cost more than looking at them
        if views_of != self._views_of:
            self._views = []
            for rows, parameter in watched:
                number = turn % len(rows.positions)
                view = parameter.select(rows.slice.dim, int(rows.positions[number]))
                if view.is_contiguous():
                    view = view.reshape(-1)
                self._views.append(view)
            self._views_of = views_of
        # one concatenation for all views that can be joined, and one look for all of a device
        views_alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
        for view in self._views:
            kind = (view.device, view.dtype)
            if view.dim() != 1:
                view = view.reshape(-1)  # a copy: the view isn't contiguous
            views_alike[kind].append(view)
        flags = [torch.cat(views).any().view(1) for views in views_alike.values()]
        return any(_on_cpu(flags))


def _on_cpu(flags: Sequence[Tensor]) -> list[Tensor]:
    """Vectors of bools, on the CPU. Only one of all that lie on one device is waited for."""
    numbers_of_device: dict[torch.device, list[int]] = defaultdict(list)
    for number, flag in enumerate(flags):
        numbers_of_device[flag.device].append(number)
    on_cpu = list(flags)
    for numbers in numbers_of_device.values():
        of_device = [flags[number] for number in numbers]
        joined = torch.cat(of_device).cpu()
        parts = joined.split([len(flag) for flag in of_device])
        for number, part in zip(numbers, parts, strict=True):
            on_cpu[number] = part
    return on_cpu
