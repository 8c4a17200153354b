"""The walk over a trace that applies the rules.

`without_repeats` first takes out the calls of train mode that eval mode made too. `apply_rules` then goes through the
calls once, in their order, and fills `Axes`.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._pytree import tree_map_only

from .. import reasons
from ..axes import Dim, Leaf, size
from ..sizes import Equation, Expr, Ref
from ..trace import Call, Trace
from .elementwise import elementwise
from .others import unknown
from .reductions import batch_norm
from .state import RULES, Axes, Dims

logger = logging.getLogger(__name__)


def without_repeats(trace: Trace) -> Trace:
    """The trace without those calls of train mode that eval mode made on the same tensors: they say nothing new.

    The remaining calls of train mode take the results of eval mode in the place of those that are left out.
    """
    calls_of_eval = trace.calls[: trace.evaluated]
    calls_of_train = trace.calls[trace.evaluated :]
    known_values = {ref.value for ref in trace.sources.values()}
    for call in trace.calls:
        known_values |= {ref.value for ref in call.outs}
    unmatched: dict[
        Any, deque[Call]
    ] = {}  # meaning -> the calls of eval mode that no call of train mode has repeated yet
    for call in calls_of_eval:
        meaning = _meaning(call, known_values)
        unmatched.setdefault(meaning, deque()).append(call)

    twins = _Twins({})
    new_calls = []
    for original in calls_of_train:
        args, kwargs = tree_map_only(Ref, twins.of, (original.args, original.kwargs))
        call = original._replace(args=args, kwargs=kwargs)
        meaning = _meaning(call, known_values)
        calls_that_say_so = unmatched.get(meaning)
        if not calls_that_say_so:
            new_calls.append(call)
            continue
        # the first of them, as both modes make equal calls in the same order
        call_of_eval = calls_that_say_so.popleft()
        twins.note(call.outs, call_of_eval.outs)
    return trace._replace(
        calls=calls_of_eval + new_calls,
        returned={mode: [twins.of(ref) for ref in refs] for mode, refs in trace.returned.items()},
        equations=[twins.of_equation(equation) for equation in trace.equations],
        in_hand={path: twins.of_values(values) for path, values in trace.in_hand.items()},
    )


class _Twins(NamedTuple):
    """The tensors of train mode that are the same as tensors of eval mode.

    Attributes:
        value_in_eval: number of such a tensor -> the number of its twin.
    """

    value_in_eval: dict[int, int]

    def note(self, refs_of_train: Iterable[Ref], refs_of_eval: Iterable[Ref]) -> None:
        """Notes results of two calls that say the same."""
        # strict=False: batch norms of the two modes may give different numbers of results
        for ref, twin in zip(refs_of_train, refs_of_eval, strict=False):
            if ref.shape == twin.shape:
                self.value_in_eval[ref.value] = twin.value

    def of_value(self, value: int) -> int:
        """The number of the twin, or the number itself."""
        return self.value_in_eval.get(value, value)

    def of_values(self, values: set[int]) -> set[int]:
        """`of_value` of each."""
        return {self.of_value(value) for value in values}

    def of(self, ref: Ref) -> Ref:
        """The twin of a tensor, or the tensor itself."""
        value = self.value_in_eval.get(ref.value)
        if value is None:
            return ref
        return Ref(value, ref.shape)

    def of_equation(self, equation: Equation) -> Equation:
        """The equation with twins in the place of the tensors of train mode."""
        left = self._of_expr(equation.left)
        right = self._of_expr(equation.right)
        return equation._replace(left=left, right=right)

    def _of_expr(self, expr: Expr) -> Expr:
        kind, *operands = expr
        if kind in ("const", "attribute"):
            return expr
        if kind == "span":
            value, *bounds = operands
            twin = self.of_value(value)
            return (kind, twin, *bounds)
        left, right = operands
        return (kind, self._of_expr(left), self._of_expr(right))


def _meaning(call: Call, known_values: set[int]) -> Any:
    """What a call says to the algebra, in a form that can be compared."""
    if RULES.get(call.name) is batch_norm:  # it says the same of its own statistics and of the batch's
        operands = _frozen(call.refs, known_values)
        return batch_norm, operands
    args = _frozen(call.args, known_values)
    kwargs = _frozen(call.kwargs, known_values)
    return call.op, args, kwargs


def _frozen(value: Any, known_values: set[int]) -> Any:
    """Arguments in a form that can be compared; a tensor from outside the trace (an input) is its shape alone."""
    if isinstance(value, Ref):
        is_known = value.value in known_values
        return value.value if is_known else value.shape
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item, known_values) for item in value)
    if isinstance(value, dict):
        return tuple(value), _frozen([*value.values()], known_values)
    # 1, 1.0 and True are equal, but not the same argument
    return value, type(value)


def _live(trace: Trace) -> list[Call]:
    """The calls that the outputs depend on: a result that nothing uses decides nothing."""
    needed = {ref.value for ref in trace.outputs}
    live = []
    for call in reversed(trace.calls):
        # a call without results, or one that writes in place, may change what is needed in a way that isn't seen here
        has_effect = not call.outs or call.op._schema.is_mutable
        is_needed = any(ref.value in needed for ref in call.outs)
        if has_effect or is_needed:
            live.append(call)
            needed |= {ref.value for ref in call.refs}
    return live[::-1]


def apply_rules(trace: Trace) -> Axes:
    """The dimensions of every tensor of the trace, unified and pinned as its calls demand."""
    s = Axes()
    for name, ref in trace.sources.items():
        is_parameter = name in trace.parameters  # a parameter is zero where it is removed, a buffer is not
        dims = [s.new(n, zero=is_parameter) for n in ref.shape]
        s.dims[ref.value] = dims
        s.weights[ref.value] = 2
    # of several reasons the one numbered first is shown, and OUTPUT is the one that a person should read first
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
    rule = RULES.get(call.name)
    if rule is None:
        is_pointwise = torch.Tag.pointwise in call.op.tags
        rule = elementwise if is_pointwise else unknown
    try:
        outs = rule(s, call)
        for ref, dims in zip(call.outs, outs, strict=True):
            _check(ref, dims)
    except Exception as error:  # a rule that fails must pin, never raise and never guess
        kind = type(error).__name__
        return unknown(s, call), f"its rule failed ({kind}: {error})"
    if rule is unknown and call.name not in RULES:
        return outs, "it has no rule"
    return outs, ""


def _check(ref: Ref, dims: list[Dim]) -> None:
    """Raises an error where a rule gives a tensor dimensions of other sizes."""
    if 0 in ref.shape:  # an empty tensor has nothing to cut
        return
    sizes = [size(dim) for dim in dims]
    if sizes != list(ref.shape):
        raise ValueError(f"the rule gives {sizes} for {ref.shape}")


def _weight_of_result(s: Axes, call: Call) -> int:
    """How much of a weight the results of a call are, see `Axes.weights`."""
    weights = [s.weight(ref) for ref in call.refs]
    if all(weight == 2 for weight in weights):
        return 2
    # an index from the data chooses parts of the first operand; a lone operand is such a part, or activations
    is_lookup = call.name in ("index", "index_select", "gather")
    chooses_parts = is_lookup or len(weights) == 1
    if not chooses_parts:
        return 0
    return min(weights[0], 1)


def _tie_parts(s: Axes, equation: Equation) -> None:
    """Ties the equal parts of an axis that the model's code divides by a number, part = axis // number.

    If the code makes a tensor as large as a part, and this tensor is a part of the axis, then all parts have to stay
    equally large: positions at the same place of each part go together.
    """
    left, right, s.layer = equation
    operation, *operands = left
    if operation == "//":
        whole, part = operands[0], right
    elif operation == "*":
        whole, part = right, operands[-1]
    else:
        return
    if not whole[0] == part[0] == "span":
        return
    whole_ids = _ids_of_span(s, whole)  # (size of the axis,)
    part_ids = _ids_of_span(s, part)  # (size of a part,)
    part_size = len(part_ids)
    if not 0 < part_size < len(whole_ids):
        return
    has_whole_parts = len(whole_ids) % part_size == 0
    if not has_whole_parts or not whole_ids.any():
        return
    parts = whole_ids.reshape(-1, part_size)  # (number, size of a part)
    is_the_part = (parts == part_ids).all(1)  # (number,)
    if not is_the_part.any():
        return
    first_part, *other_parts = [(Leaf(ids, False),) for ids in parts]
    why = s.why(reasons.MEETS)
    for other_part in other_parts:
        s.algebra.align(first_part, other_part, why)


def _ids_of_span(s: Axes, span: Any) -> np.ndarray:
    """The index ids of a stretch of a tensor's dimension; none if that is not one leaf."""
    _, value, d, start, stop = span
    dim = s.dims[value][d] if value in s.dims else ()
    if len(dim) != 1:
        return np.zeros(0)
    (leaf,) = dim
    return leaf.ids[start:stop]
