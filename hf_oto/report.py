"""A compact model beside the dense one: measurements of both, and a table of them."""

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

from .calls import Forward, Inputs, as_forwards, input_tensors, refuse_sharded
from .cut import Trial
from .evaluating import evaluating
from .rules import multiplications
from .trace import persistent_buffers, trace

# numbers -------------------------------------------------------------------------------------------


def macs(model: nn.Module, inputs: Inputs) -> int:
    """Multiply-accumulates of the forwards on `inputs`: matrix products, convolutions, attention."""
    count = 0
    forwards = as_forwards(inputs)
    # In evaluation mode alone: it is the one that `measure` times.
    traced = trace(model, forwards, modes=[False])
    for call in traced.calls:
        for dims in multiplications(call):
            # An operation multiplies once for every position of these dimensions.
            count += math.prod(ref.shape[dim] for ref, dim in dims)
    return count


def measure(*models: nn.Module | Trial, inputs: Inputs, seconds: float = 1.0) -> list[dict[str, Any]]:
    """Measures what each model takes, without gradients.

    The models run in turn, so that what else the machine does slows all of them alike.

    Args:
        models: models, or a change that is put on its model while that is measured.
        inputs: one batch, the keyword arguments of forward, or several calls.
        seconds: for how long each model runs. Of every model 3 to 50 runs are timed, each after two that warm up.

    Returns:
        For each model `params`; `macs`; the `bytes` of its weights in a file; the median `latency` of its forwards in
        seconds; the first and third of the `quartiles` of that; and what it was `measured_on`.
    """
    forwards = as_forwards(inputs)
    for model in models:
        if isinstance(model, nn.Module):
            refuse_sharded(model, "save it with trainer.save_model, and measure it in one process")
    opened = [model if isinstance(model, Trial) else contextlib.nullcontext(model) for model in models]
    latencies = _latencies(opened, forwards, seconds)
    measured = []
    for context, of_model in zip(opened, latencies, strict=True):
        with context as model:
            # The median, because a run that something else has slowed would raise the mean.
            low, median, high = statistics.quantiles(of_model)
            size_of_model = size(model)
            of_all = {
                "params": size_of_model["params"],
                "macs": macs(model, forwards),
                "bytes": size_of_model["bytes"],
                "latency": median,
                "quartiles": [low, high],
                "measured_on": _where(model, forwards),
            }
            measured.append(of_all)
    return measured


def _latencies(
    opened: Sequence[contextlib.AbstractContextManager], forwards: Sequence[Forward], seconds: float
) -> list[list[float]]:
    """For each model the seconds of its runs.

    Args:
        opened: contexts, in each of which there is one model.
        seconds: for how long each model runs.
    """
    latencies: list[list[float]] = [[] for _ in opened]
    budget = seconds * len(opened)
    start = benchmark.timer()
    for turn in range(50):
        # Quartiles need three runs, however long those take.
        is_over = benchmark.timer() - start >= budget
        if turn >= 3 and is_over:
            break
        for context, of_model in zip(opened, latencies, strict=True):
            with context as model, evaluating(model):
                latency = _latency(model, forwards)
                of_model.append(latency)
    return latencies


def _latency(model: nn.Module, forwards: Sequence[Forward]) -> float:
    """Seconds of the forwards.

    Each run has its own copies of their arguments, because a forward may write to them. The copies are made before the
    clock starts, two of them, because `timeit(1)` warms up with two runs.
    """

    def run(copies: Sequence[Forward]) -> None:
        for forward in copies:
            module = model.get_submodule(forward.path)
            module(*forward.args, **forward.kwargs)

    timer = benchmark.Timer(
        "run(copies.pop())",
        setup="copies = [[forward.copy_for(model) for forward in forwards] for _ in range(2)]",
        globals={"run": run, "model": model, "forwards": forwards},
        num_threads=torch.get_num_threads(),  # else one
    )
    return timer.timeit(1).mean


def size(model: nn.Module) -> dict[str, int]:
    """The number of `params` of a model, and the `bytes` of its weights in a file."""
    params = list(model.parameters())
    buffers = persistent_buffers(model).values()
    # A buffer that has several names is written once.
    saved = {id(tensor): tensor for tensor in [*params, *buffers]}
    num_bytes = 0
    for tensor in saved.values():
        num_bytes += tensor.numel() * tensor.element_size()
    num_params = sum(p.numel() for p in params)
    return {"params": num_params, "bytes": num_bytes}


def _where(model: nn.Module, forwards: Sequence[Forward]) -> str:
    """What a latency was measured on: the largest input, and the device."""
    shapes = [tuple(tensor.shape) for tensor in input_tensors(forwards)]
    largest = max(shapes, key=math.prod, default=())
    batch = " x ".join(map(str, largest))
    device = next(model.parameters()).device
    place = str(device)
    if device.type == "cpu":
        place = f"CPU, threads: {torch.get_num_threads()}"
    return f"a batch of {batch}, {place}"


def scores(logs: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of an evaluation that are numbers, among all that is logged."""
    of_time = ("_runtime", "_per_second", "_preparation_time")
    metrics = {}
    for key, value in logs.items():
        is_of_evaluation = key.startswith("eval_") and not key.endswith(of_time)
        if is_of_evaluation and isinstance(value, Real):
            metrics[key] = value
    return metrics


# text ----------------------------------------------------------------------------------------------


def table(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The measurements of two models side by side: a line for every key that both have, known ones with their units.

    Example:
        >>> print(table({"params": 2000000, "accuracy": 0.99}, {"params": 500000, "accuracy": 0.985}))
                       dense   compact   ratio
        parameters      2.0M    500.0k    25 %
        accuracy      0.9900    0.9850
    """
    rows = _rows(before, after)
    columns = list(zip(*rows, strict=True))
    label_width = max(map(len, columns[0]))
    # At least 8, so that the tables of most models look alike.
    before_width = max(8, *map(len, columns[1]))
    after_width = max(8, *map(len, columns[2]))
    lines = []
    for label, of_before, of_after, ratio in rows:
        line = f"{label:{label_width}}  {of_before:>{before_width}}  {of_after:>{after_width}}  {ratio:>6}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def _rows(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    rows = [("", "dense", "compact", "ratio")]
    for key, value in before.items():
        if key not in after or key == "measured_on":
            continue
        label, show = _SHOWN.get(key, (key, _score))
        new_value = after[key]
        ratio = ""
        # Only sizes and times are compared as ratios, and quartiles are two numbers.
        has_ratio = key in _SHOWN and key != "quartiles"
        if has_ratio and value:  # a model may have no MACs
            ratio = f"{100 * new_value / value:.0f} %"
        rows.append((label, show(value), show(new_value), ratio))
    return rows


def _score(value: float) -> str:
    return f"{value:.4f}"


def _count(number: float) -> str:
    for unit, size_of_unit in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size_of_unit:
            return f"{number / size_of_unit:.1f}{unit}"
    return f"{number:.0f}"


def _bytes(number: float) -> str:
    return f"{_count(number)}B"


def _milliseconds(seconds: float) -> str:
    return f"{_in_ms(seconds)} ms"


def _range(ends: Sequence[float]) -> str:
    return "-".join(map(_in_ms, ends)) + " ms"


def _in_ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"


# The key of a measurement -> its label, and how its value is shown.
_SHOWN = {
    "params": ("parameters", _count),
    "macs": ("MACs", _count),
    "bytes": ("file size", _bytes),
    "latency": ("latency", _milliseconds),
    "quartiles": ("quartiles", _range),
}


class Report(dict):
    """What `OTOTrainer.report` is: a dict that prints as a table, in a notebook too. See `OTOMixin` for its keys."""

    def __str__(self) -> str:
        rows = table(self["before"], self["after"])
        return "\n".join([rows, *self._notes()])

    def _repr_html_(self) -> str:
        # Names of metrics are the user's, and may hold any text.
        text = html.escape(str(self))
        return f"<pre>{text}</pre>"

    def _notes(self) -> list[str]:
        """The lines under the table."""
        notes = []
        # Models that could not be run have no latencies.
        if "measured_on" in self["after"]:
            notes.append(f"measured on {self['after']['measured_on']}")
        difference = f"max output difference, zeroed full against compact: {self['max_output_difference']:.1e}"
        if "max_output_difference_in_own_dtype" in self:
            difference += f" in double, {self['max_output_difference_in_own_dtype']:.1e} as it runs"
        notes.append(difference)
        if self.get("output_error") is not None:
            percent = 100 * self["output_error"]
            where = "a batch that was held out" if self["output_error_is_held_out"] else "the batches it was fitted to"
            notes.append(f"outputs are off the dense model's by {percent:.2g} % of their variance, on {where}")
        fraction = self["training_macs"]
        if fraction is not None and fraction < 1:
            percent = 100 * fraction
            notes.append(f"training took {percent:.0f} % of the MACs of a dense model")
        zeroed = self["metrics"]["zeroed"]
        for key, value in self["metrics"]["compact"].items():
            note = f"{key}: "
            if key in zeroed:
                note += f"{zeroed[key]:.4f} full with zeros, "
            notes.append(f"{note}{value:.4f} compact")
        return notes
