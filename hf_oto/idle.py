"""Idle parameters, which no traced call touched: the dimensions that they may read or add to one day have to stay.

The weights of an auxiliary head are idle, and so are those of another task's head, and those of a tower whose data the
batch lacks. The module around an idle module would call it, with tensors that its own forward has in hand. So a run of
dimensions of such a tensor stays if it is as wide as a dimension of an idle parameter, or a half, third or quarter of
that.

Worked example: 64 channels around an idle Linear(64, 10) stay. 64 channels around an idle Linear(128, 10) stay too,
because the layer may read their mean and their maximum side by side. 48 channels around either layer need not stay.
"""

from __future__ import annotations

import math
from collections import defaultdict

from .axes import size
from .reasons import IDLE
from .rules import Axes
from .table import fold
from .trace import Trace

CONCATENATED = (1, 2, 3, 4)  # so many equal widths may be read side by side: a head may take u, v, |u - v| and u * v


def pin_around_what_never_ran(traced: Trace, unified: Axes) -> None:
    """Pins every dimension that an idle parameter may read or add to one day."""
    idle = _idle_parameters(traced, unified)
    if not idle:
        return
    weights = {ref.value for ref in traced.sources.values()}
    in_hand = _tensors_in_hand(traced, unified)
    for path, widths in _idle_widths(idle, traced).items():
        with_dims = in_hand[path] & unified.dims.keys()
        activations = with_dims - weights  # no module takes the weights of another one as its input
        for value in activations:
            _pin_readable(value, widths, unified)


def _tensors_in_hand(traced: Trace, unified: Axes) -> dict[str, set[int]]:
    """Path of a module -> the numbers of the tensors that its forward has in hand."""
    in_hand: dict[str, set[int]] = defaultdict(set)
    for path, values in traced.in_hand.items():
        in_hand[path].update(values)
    for call in unified.calls:
        values = in_hand[call.layer]
        for ref in (*call.refs, *call.outs):
            values.add(ref.value)
    return in_hand


def _idle_parameters(traced: Trace, unified: Axes) -> list[str]:
    """The parameters that no call touched."""
    used: set[int] = set()  # numbers of tensors
    for call in unified.calls:
        used.update(ref.value for ref in call.refs)
    idle = []
    for name, ref in traced.sources.items():
        if name in traced.parameters and ref.value not in used:
            idle.append(name)
    return idle


def _idle_widths(idle: list[str], traced: Trace) -> dict[str, dict[int, str]]:
    """Path of a module that may call idle parts one day -> {a width of these parts: an idle parameter that has it}."""
    working = traced.parameters - set(idle)
    widths_of_caller: dict[str, dict[int, str]] = defaultdict(dict)
    for name in idle:
        caller = _caller(name, working, traced)
        for width in traced.sources[name].shape:
            if width > 1:
                widths_of_caller[caller].setdefault(width, name)
    return widths_of_caller


def _caller(name: str, working: set[str], traced: Trace) -> str:
    """The path of the module whose forward would call the idle part that a parameter lies in."""
    path = _parent(name)
    # the idle part is the largest module around the parameter in which no parameter works, and its parent calls it
    while path and not any(other.startswith(f"{path}.") for other in working):
        path = _parent(path)
    # a list of modules has no forward: the module that holds the list calls its entries
    while path and path not in traced.in_hand:
        path = _parent(path)
    return path


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _pin_readable(value: int, widths: dict[int, str], unified: Axes) -> None:
    """Pins every run of dimensions of one tensor that has one of these widths, or a small fraction of one.

    Args:
        value: the number of the tensor.
        widths: a width -> the idle parameter that has it.
    """
    dims = unified.dims[value]
    sizes = [size(dim) for dim in dims]  # (ndim,)
    for start in range(len(dims)):
        for stop in range(start + 1, len(dims) + 1):
            width_of_run = math.prod(sizes[start:stop])
            reader = _reader(width_of_run, widths)
            if reader is None:
                continue
            reason = IDLE.of(fold(reader))
            for dim in dims[start:stop]:
                unified.algebra.pin(dim, reason)


def _reader(width_of_run: int, widths: dict[int, str]) -> str | None:
    """An idle parameter that may read a run of dimensions of this width; None if there is none."""
    if width_of_run == 1:  # every width is a multiple of 1
        return None
    for times in CONCATENATED:
        width = times * width_of_run
        if width in widths:
            return widths[width]
    return None
