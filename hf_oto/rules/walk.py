"""The walk over a trace that applies the rules."""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map_only

from .. import reasons
from ..axes import Leaf, size
from ..sizes import Equation, Ref
from ..trace import Call, Trace
from .elementwise import elementwise
from .others import unknown
from .reductions import batch_norm
from .state import RULES, Axes

logger = logging.getLogger(__name__)


def without_repeats(trace: Trace) -> Trace:
    """The trace without those calls of train mode that eval mode made too, of the same tensors: they say nothing new.

    What is left of train mode takes the results of eval mode in their place.
    """
    known_values = {ref.value for call in trace.calls for ref in call.outs}
    known_values |= {ref.value for ref in trace.sources.values()}

    def meaning(call: Call) -> Any:
        """What a call says to the algebra: a batch norm the same whether its statistics are its own or the batch's."""
        if RULES.get(call.name) is batch_norm:
            return batch_norm, tuple(_frozen(call.refs, known_values))
        return call.op, _frozen(call.args, known_values), _frozen(call.kwargs, known_values)

    made: dict[Any, deque[Call]] = {}
    for call in trace.calls[: trace.evaluated]:
        made.setdefault(meaning(call), deque()).append(call)
    twins: dict[int, int] = {}  # what train mode made -> what eval mode made

    def known(ref: Ref) -> Ref:
        return Ref(twins[ref.value], ref.shape) if ref.value in twins else ref

    def known_expr(expr: Any) -> Any:
        if expr[0] == "span":
            return ("span", twins.get(expr[1], expr[1]), *expr[2:])
        return expr if expr[0] in ("const", "attribute") else (expr[0], known_expr(expr[1]), known_expr(expr[2]))

    new = []
    for original in trace.calls[trace.evaluated :]:
        call = original._replace(
            args=tree_map_only(Ref, known, original.args), kwargs=tree_map_only(Ref, known, original.kwargs)
        )
        same = made.get(meaning(call))
        if same:
            pairs = zip(call.outs, same.popleft().outs, strict=False)
            twins |= {mine.value: its.value for mine, its in pairs if mine.shape == its.shape}
        else:
            new.append(call)
    return trace._replace(
        calls=trace.calls[: trace.evaluated] + new,
        returned={mode: [known(ref) for ref in refs] for mode, refs in trace.returned.items()},
        equations=[q._replace(left=known_expr(q.left), right=known_expr(q.right)) for q in trace.equations],
        in_hand={path: {twins.get(value, value) for value in values} for path, values in trace.in_hand.items()},
    )


def _frozen(value: Any, known_values: set[int]) -> Any:
    """Arguments as something to compare; of tensors that come from outside nothing counts but the shape."""
    if isinstance(value, Ref):
        return value.value if value.value in known_values else value.shape
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item, known_values) for item in value)
    if isinstance(value, dict):
        return tuple((key, _frozen(item, known_values)) for key, item in value.items())
    return value, type(value)


def _live(trace: Trace) -> list[Call]:
    """The calls that the outputs depend on: what is computed and thrown away decides nothing."""
    needed = {ref.value for ref in trace.outputs}
    live = []
    for call in reversed(trace.calls):
        if not call.outs or call.op._schema.is_mutable or any(ref.value in needed for ref in call.outs):
            live.append(call)
            needed |= {ref.value for ref in call.refs}
    return live[::-1]


def apply_rules(trace: Trace) -> Axes:
    """The dimensions of every tensor of the trace, unified and pinned as its calls demand."""
    s = Axes()
    for name, ref in trace.sources.items():  # a parameter is zero where it is removed, a buffer is not
        s.dims[ref.value] = [s.new(n, zero=name in trace.parameters) for n in ref.shape]
        s.weights[ref.value] = 2
    s.algebra.reason(reasons.OUTPUT)  # the first: what a person should read, if there are others too
    missing: set[str] = set()
    s.calls = _live(trace)
    for call in s.calls:
        s.layer = call.layer
        rule = RULES.get(call.name, elementwise if torch.Tag.pointwise in call.op.tags else unknown)
        problem = "it has no rule" if rule is unknown and call.name not in RULES else ""
        try:
            outs = rule(s, call)
            for ref, dims in zip(call.outs, outs, strict=True):
                if 0 not in ref.shape and tuple(map(size, dims)) != ref.shape:
                    raise ValueError(f"the rule gives {[size(dim) for dim in dims]} for {ref.shape}")
        except Exception as error:  # a rule that fails must pin, never raise and never guess
            outs, problem = unknown(s, call), f"its rule failed ({type(error).__name__}: {error})"
        if problem and call.outs and call.name not in missing:
            missing.add(call.name)
            logger.info("tensors of %s are pinned: %s, in %s", call.name, problem, call.layer)
        weights = [s.weight(ref) for ref in call.refs]
        chosen = call.name in ("index", "index_select", "gather") or len(weights) == 1
        weight = 2 if all(w == 2 for w in weights) else min(weights[0], 1) if chosen else 0
        for ref, dims in zip(call.outs, outs, strict=True):
            s.dims[ref.value] = dims
            s.weights[ref.value] = weight
            s.maker[ref.value] = call
        s.share(call)
    for dim in (dim for ref in trace.outputs for dim in s.of(ref)):
        s.algebra.pin(dim, reasons.OUTPUT)
    for equation in trace.equations:
        _tie_parts(s, equation)
    return s


def _tie_parts(s: Axes, equation: Equation) -> None:
    """Where the code divides an axis by a number, and what it makes of a part of that size is a part of the axis, all
    parts have to stay equal: the positions of equal place in them go together."""
    left, right, s.layer = equation
    whole, part = (left[1], right) if left[0] == "//" else (right, left[-1])
    if left[0] not in ("//", "*") or not whole[0] == part[0] == "span":
        return
    sides = []
    for _, value, d, start, stop in (whole, part):
        dim = s.dims[value][d] if value in s.dims else ()
        sides.append(dim[0].ids[start:stop] if len(dim) == 1 else np.zeros(0))
    positions, some = sides
    if not positions.any() or not 0 < len(some) < len(positions) or len(positions) % len(some):
        return
    parts = positions.reshape(-1, len(some))
    if (parts == some).all(1).any():
        for other in parts[1:]:
            s.algebra.align((Leaf(parts[0], False),), (Leaf(other, False),), s.why(reasons.MEETS))
