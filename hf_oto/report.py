"""What a compact model is against the dense one: parameters, MACs, file size, latency, and a table of them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .partition import run_traced
from .rules import multiplications
from .trace import evaluating


def macs(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """Multiply-accumulates of one forward on `inputs`: matrix products, convolutions, attention."""
    calls = run_traced(model, inputs).calls
    return sum(math.prod(ref.shape[d] for ref, d in dims) for call in calls for dims in multiplications(call))


def measure(model: nn.Module, inputs: Mapping[str, Any], seconds: float = 1.0) -> dict[str, float]:
    """Parameters, MACs on `inputs`, bytes of the weights, and the median latency of a forward on them, in seconds.

    Args:
        seconds: how long to measure the latency; at least 3 and at most 50 forwards after one that warms up.
    """
    model_tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}.values()
    device = next(model.parameters()).device
    latency: list[float] = []
    with evaluating(model):
        while len(latency) < 4 or (len(latency) <= 50 and sum(latency) < seconds):
            start = time.perf_counter()
            model(**inputs)
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            latency.append(time.perf_counter() - start)
    return {
        "params": sum(p.numel() for p in {id(p): p for p in model.parameters()}.values()),
        "macs": macs(model, inputs),
        "bytes": sum(t.numel() * t.element_size() for t in model_tensors),
        "latency": statistics.median(latency[1:]),
    }


def table(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """The measurements of two models side by side, one line each; keys that both have, known ones with their units.

    Example:
        >>> print(table({"params": 2000000, "accuracy": 0.99}, {"params": 500000, "accuracy": 0.985}))
                       dense   compact   ratio
        parameters      2.0M    500.0k    25 %
        accuracy      0.9900    0.9850
    """
    rows = [("", "dense", "compact", "ratio")]
    for key in before:
        if key not in after:
            continue
        label, show = _SHOWN.get(key, (key, None))
        if show is None:
            rows.append((label, f"{before[key]:.4f}", f"{after[key]:.4f}", ""))
        else:
            rows.append(
                (label, show(before[key]), show(after[key]), f"{after[key] / before[key]:.0%}".replace("%", " %"))
            )
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"{a:{width}}  {b:>8}  {c:>8}  {d:>6}".rstrip() for a, b, c, d in rows)


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
}
