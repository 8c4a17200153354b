"""Parameters that no traced call touched: whatever they might read, or add to, when they run one day has to stay.

Such are an auxiliary head, another task's head, a tower whose data the batch does not have. Their module is called, if
ever, where the forward of the module around it runs, and on tensors that this forward has in hand. So every run of
dimensions of these tensors stays that is as wide as a dimension of the parameter, or of which the parameter's
dimension is up to CONCATENATED in a row.

Worked example: 64 channels around an unused Linear(64, 10) stay, and so do 64 channels around an unused
Linear(128, 10), which may read their mean and their maximum side by side; 48 channels around it need not stay.
"""

from __future__ import annotations

import math

from .reasons import IDLE
from .rules import Axes
from .table import fold
from .trace import Trace

CONCATENATED = (1, 2, 3, 4)  # so many equal widths side by side may be what a head reads: u, v, |u - v|, u * v


def pin_around_what_never_ran(traced: Trace, unified: Axes) -> None:
    """Pins every dimension that an idle parameter might read, or add to, one day."""
    idle = _idle_parameters(traced, unified)
    if not idle:
        return
    widths_in = _idle_widths(idle, traced)
    in_hand = {path: set(values) for path, values in traced.in_hand.items()}
    for call in unified.calls:
        in_hand.setdefault(call.layer, set()).update(ref.value for ref in (*call.refs, *call.outs))
    weights = {ref.value for ref in traced.sources.values()}
    for path, widths in widths_in.items():
        known = in_hand.get(path, set()) & unified.dims.keys()
        for value in known - weights:
            _pin_readable(value, widths, unified)


def _idle_parameters(traced: Trace, unified: Axes) -> list[str]:
    used = {ref.value for call in unified.calls for ref in call.refs}
    return [name for name, ref in traced.sources.items() if name in traced.parameters and ref.value not in used]


def _idle_widths(idle: list[str], traced: Trace) -> dict[str, dict[int, str]]:
    """For every module that might call idle parts: each width that these have -> the parameter that has it."""
    working = {f"{name}." for name in traced.parameters - set(idle)}
    widths_in: dict[str, dict[int, str]] = {}
    for name in idle:
        widths = widths_in.setdefault(_caller(name, working, traced), {})
        for width in traced.sources[name].shape:
            if width > 1:
                widths.setdefault(width, name)
    return widths_in


def _caller(name: str, working: set[str], traced: Trace) -> str:
    """The path of the module whose forward would call the idle part that a parameter lies in."""
    path = name.rpartition(".")[0]
    # The idle part is the largest module around the parameter in which nothing works: go up to what is around it.
    while path and not any(other.startswith(f"{path}.") for other in working):
        path = path.rpartition(".")[0]
    # A list of modules has no forward: the module that holds the list calls its entries.
    while path and path not in traced.in_hand:
        path = path.rpartition(".")[0]
    return path


def _pin_readable(value: int, widths: dict[int, str], unified: Axes) -> None:
    """Pins every run of dimensions of one tensor that has one of these widths, or a small fraction of one."""
    dims = unified.dims[value]
    sizes = [math.prod(len(leaf.ids) for leaf in dim) for dim in dims]
    for start in range(len(dims)):
        for stop in range(start + 1, len(dims) + 1):
            size = math.prod(sizes[start:stop])
            if size == 1:  # every width is a multiple of 1
                continue
            reader = next((widths[k * size] for k in CONCATENATED if k * size in widths), None)
            if reader is None:
                continue
            for dim in dims[start:stop]:
                unified.algebra.pin(dim, IDLE.of(fold(reader)))
