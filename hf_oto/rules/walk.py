"""The walk over a trace that applies the rules.

`without_repeats` first takes out what train mode did just as eval mode did; `apply_rules` then goes through the calls
once, in their order, and fills `Axes`.
"""

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
from .state import RULES, Axes, Dims

logger = logging.getLogger(__name__)


def without_repeats(trace: Trace) -> Trace:
    """The trace without those calls of train mode that eval mode made too, of the same tensors: they say nothing new.

    The remaining calls of train mode take the results of eval mode in the place of those that are left out.
    """
    calls_of_eval = trace.calls[: trace.evaluated]
    calls_of_train = trace.calls[trace.evaluated :]
    known_values = {ref.value for call in trace.calls for ref in call.outs}
    known_values |= {ref.value for ref in trace.sources.values()}

    unmatched: dict[Any, deque[Call]] = {}  # what a call of eval mode says -> the calls that no twin was found of yet
    for call in calls_of_eval:
        unmatched.setdefault(_meaning(call, known_values), deque()).append(call)

    eval_value: dict[int, int] = {}  # number of a tensor of train mode -> the number of its twin of eval mode

    def in_eval(ref: Ref) -> Ref:
        return Ref(eval_value[ref.value], ref.shape) if ref.value in eval_value else ref

    def expr_in_eval(expr: Any) -> Any:
        kind = expr[0]
        if kind in ("const", "attribute"):
            return expr
        if kind == "span":
            return ("span", eval_value.get(expr[1], expr[1]), *expr[2:])
        return (kind, expr_in_eval(expr[1]), expr_in_eval(expr[2]))

    new_calls = []
    for original in calls_of_train:
        args = tree_map_only(Ref, in_eval, original.args)
        kwargs = tree_map_only(Ref, in_eval, original.kwargs)
        call = original._replace(args=args, kwargs=kwargs)
        twins = unmatched.get(_meaning(call, known_values))
        if not twins:
            new_calls.append(call)
            continue
        twin = twins.popleft()
        for ref, ref_of_twin in zip(call.outs, twin.outs, strict=False):
            if ref.shape == ref_of_twin.shape:
                eval_value[ref.value] = ref_of_twin.value

    equations = []
    for equation in trace.equations:
        left = expr_in_eval(equation.left)
        right = expr_in_eval(equation.right)
        equations.append(equation._replace(left=left, right=right))
    in_hand = {path: {eval_value.get(value, value) for value in values} for path, values in trace.in_hand.items()}
    returned = {mode: [in_eval(ref) for ref in refs] for mode, refs in trace.returned.items()}
    return trace._replace(calls=calls_of_eval + new_calls, returned=returned, equations=equations, in_hand=in_hand)


def _meaning(call: Call, known_values: set[int]) -> Any:
    """What a call says to the algebra, as something to compare."""
    if RULES.get(call.name) is batch_norm:  # it says the same of its own statistics and of the batch's
        return batch_norm, tuple(_frozen(call.refs, known_values))
    return call.op, _frozen(call.args, known_values), _frozen(call.kwargs, known_values)


def _frozen(value: Any, known_values: set[int]) -> Any:
    """Arguments as something to compare; a tensor from outside the trace (an input) is compared by its shape alone."""
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
        # a call without results, or one that writes in place, may change what is needed in a way that isn't seen here
        has_effect = not call.outs or call.op._schema.is_mutable
        if has_effect or any(ref.value in needed for ref in call.outs):
            live.append(call)
            needed |= {ref.value for ref in call.refs}
    return live[::-1]


def apply_rules(trace: Trace) -> Axes:
    """The dimensions of every tensor of the trace, unified and pinned as its calls demand."""
    s = Axes()
    for name, ref in trace.sources.items():
        is_parameter = name in trace.parameters  # a parameter is zero where it is removed, a buffer is not
        s.dims[ref.value] = [s.new(n, zero=is_parameter) for n in ref.shape]
        s.weights[ref.value] = 2
    # of several reasons the one numbered first is shown, and this is what a person should read above all others
    s.algebra.reason(reasons.OUTPUT)
    s.calls = _live(trace)
    names_told: set[str] = set()
    for call in s.calls:
        s.layer = call.layer
        outs, problem = _applied(s, call)
        if problem and call.outs and call.name not in names_told:
            names_told.add(call.name)
            logger.info("tensors of %s are pinned: %s, in %s", call.name, problem, call.layer)
        weight = _weight_of_result(s, call)
        for ref, dims in zip(call.outs, outs, strict=True):
            s.dims[ref.value] = dims
            s.weights[ref.value] = weight
            s.maker[ref.value] = call
        s.share(call)
    for ref in trace.outputs:
        for dim in s.of(ref):
            s.algebra.pin(dim, reasons.OUTPUT)
    for equation in trace.equations:
        _tie_parts(s, equation)
    return s


def _applied(s: Axes, call: Call) -> tuple[Dims, str]:
    """The dimensions of the results of a call, and what is wrong with its rule; "" if nothing is."""
    rule = RULES.get(call.name, elementwise if torch.Tag.pointwise in call.op.tags else unknown)
    try:
        outs = rule(s, call)
        for ref, dims in zip(call.outs, outs, strict=True):
            if 0 not in ref.shape and tuple(map(size, dims)) != ref.shape:
                raise ValueError(f"the rule gives {[size(dim) for dim in dims]} for {ref.shape}")
    except Exception as error:  # a rule that fails must pin, never raise and never guess
        return unknown(s, call), f"its rule failed ({type(error).__name__}: {error})"
    return outs, "it has no rule" if rule is unknown and call.name not in RULES else ""


def _weight_of_result(s: Axes, call: Call) -> int:
    """How much of a weight the results of a call are, see `Axes.weights`."""
    weights = [s.weight(ref) for ref in call.refs]
    if all(weight == 2 for weight in weights):
        return 2
    # the data, as an index or as nothing at all, chooses parts of what the call takes
    chooses_parts = call.name in ("index", "index_select", "gather") or len(weights) == 1
    return min(weights[0], 1) if chooses_parts else 0


def _tie_parts(s: Axes, equation: Equation) -> None:
    """Ties the equal parts of an axis that the model's code divides by a number, part = axis // number.

    If the code makes a tensor as large as a part, and this tensor is a part of the axis, then all parts have to stay
    equally large: their positions of equal place go together.
    """
    left, right, s.layer = equation
    if left[0] not in ("//", "*"):
        return
    whole, part = (left[1], right) if left[0] == "//" else (right, left[-1])
    if not whole[0] == part[0] == "span":
        return
    whole_ids = _ids_of_span(s, whole)
    part_ids = _ids_of_span(s, part)
    if not whole_ids.any() or not 0 < len(part_ids) < len(whole_ids) or len(whole_ids) % len(part_ids):
        return
    parts = whole_ids.reshape(-1, len(part_ids))  # (number, positions of a part)
    if (parts == part_ids).all(1).any():
        first_part = (Leaf(parts[0], False),)
        for other_part in parts[1:]:
            s.algebra.align(first_part, (Leaf(other_part, False),), s.why(reasons.MEETS))


def _ids_of_span(s: Axes, span: Any) -> np.ndarray:
    """The index ids of a stretch of a tensor's dimension; none if that is not one leaf."""
    _, value, d, start, stop = span
    dim = s.dims[value][d] if value in s.dims else ()
    return dim[0].ids[start:stop] if len(dim) == 1 else np.zeros(0)
