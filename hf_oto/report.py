"""What a compact model is against the dense one: what each takes, and a table of it."""

from __future__ import annotations

import contextlib
import html
import math
import statistics
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import nn
from torch.utils import benchmark

from .calls import Forward, Inputs, as_forwards, input_tensors, own_copy
from .cut import Trial
from .evaluating import evaluating
from .rules import multiplications
from .trace import persistent_buffers, trace

# numbers -------------------------------------------------------------------------------------------


def macs(model: nn.Module, inputs: Inputs) -> int:
    """Multiply-accumulates of the forwards on `inputs`: matrix products, convolutions, attention."""
    calls = trace(model, as_forwards(inputs), modes=[False]).calls
    return sum(math.prod(ref.shape[d] for ref, d in dims) for call in calls for dims in multiplications(call))


def measure(*models: nn.Module | Trial, inputs: Inputs, seconds: float = 1.0) -> list[dict[str, Any]]:
    """What each model takes, without gradients: `params`; `macs`; `bytes` of its weights in a file; the `latency` of
    its forwards in seconds, the median, and the `quartiles`; and `measured_on` what.

    The models run in turn, so that what else the machine does slows all of them alike.

    Args:
        models: models, or a change that is put on its model while that is measured.
        inputs: one batch, the keyword arguments of forward, or several calls.
        seconds: for how long each model runs. Of every model 3 to 50 runs are timed, after two more that warm it up.
    """
    forwards = as_forwards(inputs)
    opened = [m if isinstance(m, Trial) else contextlib.nullcontext(m) for m in models]
    latencies: list[list[float]] = [[] for _ in models]
    start = benchmark.timer()
    while (turns := len(latencies[0])) < 3 or (turns < 50 and benchmark.timer() - start < seconds * len(models)):
        for context, of_model in zip(opened, latencies, strict=True):
            with context as model, evaluating(model):
                of_model.append(_latency(model, forwards))
    measured = []
    for context, of_model in zip(opened, latencies, strict=True):
        with context as model:
            low, median, high = statistics.quantiles(of_model)
            measured.append(
                {
                    "params": size(model)["params"],
                    "macs": macs(model, forwards),
                    "bytes": size(model)["bytes"],
                    "latency": median,
                    "quartiles": [low, high],
                    "measured_on": _where(model, forwards),
                }
            )
    return measured


def _latency(model: nn.Module, forwards: Sequence[Forward]) -> float:
    """Seconds of the forwards. Each run has copies of their arguments, which it may write to, made before the clock
    starts: `timeit(1)` warms up with two runs."""

    def run(copies: Sequence[Forward]) -> None:
        for forward in copies:
            model.get_submodule(forward.path)(*forward.args, **forward.kwargs)

    timer = benchmark.Timer(
        "run(copies.pop())",
        setup="copies = [[own_copy(forward) for forward in forwards] for _ in range(2)]",
        globals={"run": run, "own_copy": own_copy, "forwards": forwards},
        num_threads=torch.get_num_threads(),  # else one
    )
    return timer.timeit(1).mean


def size(model: nn.Module) -> dict[str, int]:
    """Its `params`, and the `bytes` of its weights in a file."""
    saved = {id(t): t for t in [*model.parameters(), *persistent_buffers(model).values()]}.values()
    return {
        "params": sum(p.numel() for p in model.parameters()),
        "bytes": sum(t.numel() * t.element_size() for t in saved),
    }


def _where(model: nn.Module, forwards: Sequence[Forward]) -> str:
    """What a latency was measured on: the largest input, and the device."""
    largest = max((tuple(t.shape) for t in input_tensors(forwards)), key=math.prod, default=())
    device = next(model.parameters()).device
    place = f"CPU, threads: {torch.get_num_threads()}" if device.type == "cpu" else str(device)
    return f"a batch of {' x '.join(map(str, largest))}, {place}"


def scores(logs: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of an evaluation among what is logged, those that are numbers."""
    no = ("_runtime", "_per_second", "_preparation_time")
    numbers = {k: v for k, v in logs.items() if isinstance(v, Real)}
    return {k: v for k, v in numbers.items() if k.startswith("eval_") and not k.endswith(no)}


# text ----------------------------------------------------------------------------------------------


def table(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The measurements of two models side by side, one line each; keys that both have, known ones with their units.

    Example:
        >>> print(table({"params": 2000000, "accuracy": 0.99}, {"params": 500000, "accuracy": 0.985}))
                       dense   compact   ratio
        parameters      2.0M    500.0k    25 %
        accuracy      0.9900    0.9850
    """
    rows = _rows(before, after)
    a, b, c = (max(least, *(len(row[i]) for row in rows)) for i, least in enumerate((0, 8, 8)))
    return "\n".join(f"{row[0]:{a}}  {row[1]:>{b}}  {row[2]:>{c}}  {row[3]:>6}".rstrip() for row in rows)


def _rows(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    rows = [("", "dense", "compact", "ratio")]
    for key in before:
        if key in after and key != "measured_on":
            label, show = _SHOWN.get(key, (key, lambda x: f"{x:.4f}"))
            has_ratio = key in _SHOWN and key != "quartiles" and before[key]  # a model may have no MACs
            ratio = f"{100 * after[key] / before[key]:.0f} %" if has_ratio else ""
            rows.append((label, show(before[key]), show(after[key]), ratio))
    return rows


def _count(n: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.1f}{unit}"
    return f"{n:.0f}"


_SHOWN = {
    "params": ("parameters", _count),
    "macs": ("MACs", _count),
    "bytes": ("file size", lambda n: f"{_count(n)}B"),
    "latency": ("latency", lambda s: f"{s * 1e3:.1f} ms"),
    "quartiles": ("quartiles", lambda ends: "-".join(f"{s * 1e3:.1f}" for s in ends) + " ms"),
}


class Report(dict):
    """What `OTOTrainer.report` is: a dict that prints as a table, in a notebook too. See `OTOMixin` for its keys."""

    def __str__(self) -> str:
        return "\n".join([table(self["before"], self["after"]), *self._notes()])

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def _notes(self) -> list[str]:
        zeroed, compact = self["metrics"]["zeroed"], self["metrics"]["compact"]
        full = {k: f"{zeroed[k]:.4f} full with zeros, " if k in zeroed else "" for k in compact}
        both = (f"{k}: {full[k]}{compact[k]:.4f} compact" for k in compact)
        difference = f"max output difference, zeroed full against compact: {self['max_output_difference']:.1e}"
        if "max_output_difference_in_own_dtype" in self:
            difference += f" in double, {self['max_output_difference_in_own_dtype']:.1e} as it runs"
        where = [f"measured on {self['after']['measured_on']}"] if "measured_on" in self["after"] else []
        return [*where, difference, *both]
