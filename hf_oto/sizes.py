"""Sizes that modules keep to themselves (`num_heads`, say): what each must become for a cut model to run.

While the model is traced, each of these ints is a `Size`, which remembers where it came from as an expression. What
torch's functions say of such sizes (size_rules.py) becomes an `Equation`. `Sizes` solves the equations for a set of
removed ZIGs. The solution gives the new attributes, and a contradiction names the ZIGs that can't be removed together.

Worked example: `x.view(b, n, self.num_heads, 64)` says that num_heads equals what a cut leaves of dimension 2 of the
result. A cut that removes 3 of 12 heads makes num_heads 9. The 64 is written in the code, so it is a constant: a cut
that left 48 positions of dimension 3 would contradict the equation "64 equals what is left", so dimension 3 is pinned.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .expressions import (
    Attribute,
    Equation,
    Expr,
    attributes_in,
    bare_attributes,
    compute,
    has_bare_attribute,
    is_comparison,
    spans_of,
)
from .modeling_oto import is_cut_size

Values = Mapping[Attribute, int]
Factors = tuple[np.ndarray, ...]  # the ZIG of every position of each factor of a dimension, -1 for those that stay
Spans = dict[tuple[int, int], Factors]


@dataclass(frozen=True)
class Ref:
    """A recorded tensor: its number and its shape at that time."""

    value: int
    shape: tuple[int, ...]


# tagged ints ---------------------------------------------------------------------------------------


class Size(int):
    """An int that remembers, as an expression, where it came from.

    Attributes:
        expr: the expression.
        equations: the list that receives what later uses of the size imply.

    Example:
        >>> num_heads = Size(12, ("attribute", "attention", "num_heads", None), equations=[])
        >>> width = num_heads * 64
        >>> width, width.expr
        (768, ('*', ('attribute', 'attention', 'num_heads', None), ('const', 64)))
    """

    def __new__(cls, value: int, expr: Expr, equations: list[Equation]) -> Size:
        size = super().__new__(cls, value)
        size.expr = expr
        size.equations = equations
        return size

    def _demand(self, left: Expr, right: Expr) -> None:
        """Adds an equation. The layer that runs is not known here."""
        equation = Equation(left, right, "")
        self.equations.append(equation)

    def _leave(self) -> int:
        """Returns the bare int; because code uses it as a number, the expression has to keep its value."""
        value = plain(self)
        self._demand(self.expr, ("const", value))
        return value

    def __eq__(self, other: object) -> bool:
        equal = int.__eq__(self, other)
        if equal is NotImplemented:
            return equal
        if equal and isinstance(other, Size):
            # code that has found two sizes equal uses one for the other, so they have to stay equal
            if other.expr != self.expr:
                self._demand(self.expr, other.expr)
        else:
            self._note("==", other, equal)
        return equal

    def __ne__(self, other: object) -> bool:
        return not self == other

    # a table or set compares a size only with entries of the same hash: a size that is not found leaves no equation
    __hash__ = int.__hash__

    def _note(self, comparison: str, other: Any, outcome: bool) -> None:
        """Demands that a comparison comes out the same after a cut, so that code takes the same branch."""
        if isinstance(other, int):
            compared = (comparison, self.expr, expr_of(other))
            self._demand(compared, ("const", int(outcome)))

    def __int__(self) -> int:
        return self._leave()

    def __float__(self) -> float:
        return float(self._leave())

    def __reduce__(self) -> tuple:
        return int, (plain(self),)  # a copy must not demand anything of the model


def _operation(name: str, op: str | None) -> Callable:
    """The method `Size.name`, whose result is a size too.

    Args:
        op: the operation in expressions. None: expressions have no such operation, and the operands leave the algebra.
    """
    method_of_int = getattr(int, name)
    is_reflected = name.startswith("__r")

    def operate(self: Size, other: Any) -> Any:
        if op is None or not isinstance(other, int):
            value = self._leave()
            if isinstance(other, Size):
                other = other._leave()
            return method_of_int(value, other)
        if is_reflected:
            expr = (op, expr_of(other), self.expr)
        else:
            expr = (op, self.expr, expr_of(other))
        value = method_of_int(plain(self), plain(other))
        return Size(value, expr, self.equations)

    return operate


def _comparison(name: str, op: str) -> Callable:
    """The method `Size.name`, which notes how the comparison came out."""
    method_of_int = getattr(int, name)

    def compare(self: Size, other: Any) -> bool:
        outcome = method_of_int(self, other)
        if outcome is not NotImplemented:
            self._note(op, other, outcome)
        return outcome

    return compare


# the results of true division and of powers may be no ints
_OPERATORS = {"add": "+", "sub": "-", "mul": "*", "floordiv": "//", "mod": "%", "truediv": None, "pow": None}
for _word, _op in _OPERATORS.items():
    for _method in (f"__{_word}__", f"__r{_word}__"):
        setattr(Size, _method, _operation(_method, _op))

_COMPARISONS = {"__lt__": "<", "__le__": "<=", "__gt__": ">", "__ge__": ">="}
for _method, _op in _COMPARISONS.items():
    setattr(Size, _method, _comparison(_method, _op))


def plain(value: int) -> int:
    """The bare int, without a tag and without any consequence."""
    return int.__pos__(value)


def expr_of(value: int | Expr) -> Expr:
    """The expression that a size came from; an int without a tag is a constant."""
    if isinstance(value, tuple):
        return value
    if isinstance(value, Size):
        return value.expr
    return ("const", value)


def span(ref: Ref, dim: int, start: int = 0, stop: int | None = None) -> Expr:
    """The number of positions in [start, stop) of a dimension that a cut leaves."""
    dim %= len(ref.shape)
    if stop is None:
        stop = ref.shape[dim]
    return ("span", ref.value, dim, start, stop)


# solving -------------------------------------------------------------------------------------------


class _Solution(NamedTuple):
    """The attributes after a cut, as far as they are known.

    Attributes:
        removed: bool, shape (num_zigs + 1,); its last entry, False, is that of ZIG -1, "no ZIG".
        attributes: the new value of every attribute, the old one while nothing is known.
        fixed: the attributes whose new value is known.
    """

    removed: np.ndarray
    attributes: dict[Attribute, int]
    fixed: set[Attribute]


class Sizes:
    """The size equations of a model that a cut can touch.

    Args:
        equations: as traced.
        spans: (tensor number, dim) -> its factors; dimensions that no cut touches are left out.
        values: attribute -> its value in the dense model.
    """

    def __init__(self, equations: Sequence[Equation], spans: Spans, values: dict[Attribute, int]) -> None:
        self.values = values
        self.spans: dict[Expr, Factors] = {}
        self._names: dict[int, bytes] = {}
        bound = self._bound(equations, spans)
        largest_zig = -1
        for factors in self.spans.values():
            for zigs in factors:
                largest_zig = max(largest_zig, int(zigs.max()))
        nothing_removed = np.zeros(largest_zig + 2, bool)  # (ZIGs up to the largest + 1,), as `removed` of `_Solution`
        # an equation that does not even hold for the dense model was misunderstood, and says nothing of a cut
        self.equations: list[Equation] = []
        for equation in bound:
            if self._holds(equation, values, nothing_removed):
                self.equations.append(equation)

    def _bound(self, equations: Sequence[Equation], spans: Spans) -> list[Equation]:
        """The equations that say something of a cut, each once."""
        bound: list[Equation] = []
        seen: set[tuple[Expr, Expr]] = set()
        for equation in equations:
            left = self._bind(equation.left, spans)
            right = self._bind(equation.right, spans)
            is_of_constants = left[0] == right[0] == "const"
            says_nothing = left == right or is_of_constants
            if says_nothing or (left, right) in seen:
                continue
            seen.add((left, right))
            bound.append(Equation(left, right, equation.layer))
        return bound

    def _bind(self, expr: Expr, spans: Spans) -> Expr:
        """The expression in which untouched spans are constants, and spans with the same ZIGs have the same key."""
        kind = expr[0]
        if kind == "span":
            _, value, dim, start, stop = expr
            factors = spans.get((value, dim))
            if factors is None:
                return ("const", stop - start)
            names = [self._name(zigs) for zigs in factors]
            key = ("span", *names, start, stop)
            self.spans[key] = factors
            return key
        if kind in ("const", "attribute"):
            return expr
        left = self._bind(expr[1], spans)
        right = self._bind(expr[2], spans)
        if left[0] == right[0] == "const":
            number = compute(kind, left[1], right[1])
            return ("const", number)
        return (kind, left, right)

    def _name(self, zigs: np.ndarray) -> bytes:
        """A short name of the contents of an array."""
        # the caller keeps the arrays of all spans alive meanwhile, so no id stands for two of them
        if id(zigs) not in self._names:
            contents = hashlib.blake2b(zigs.tobytes(), digest_size=16)
            self._names[id(zigs)] = contents.digest()
        return self._names[id(zigs)]

    def _value(self, expr: Expr, attributes: Values, removed: np.ndarray) -> float:
        """What an expression becomes when ZIGs are removed; `removed` is that of `_Solution`."""
        kind = expr[0]
        if kind == "const":
            return expr[1]
        if kind == "attribute":
            return attributes[expr[1:]]
        if kind == "span":
            *_, start, stop = expr
            stays_in_factor = [~removed[zigs] for zigs in self.spans[expr]]  # each (size of the factor,)
            # a position of a dimension stays if its position in every factor stays
            stays = functools.reduce(np.logical_and.outer, stays_in_factor)
            stays_in_span = stays.reshape(-1)[start:stop]
            return int(stays_in_span.sum())
        left = self._value(expr[1], attributes, removed)
        right = self._value(expr[2], attributes, removed)
        return compute(kind, left, right)

    def _holds(self, equation: Equation, attributes: Values, removed: np.ndarray) -> bool:
        left = self._value(equation.left, attributes, removed)
        right = self._value(equation.right, attributes, removed)
        return left == right

    def solve(self, removed: np.ndarray) -> tuple[dict[Attribute, int], list[Equation]]:
        """The attributes that change when ZIGs are removed, and the equations that then can't hold.

        Args:
            removed: bool, shape (num_zigs,).
        """
        removed = np.append(removed, False)  # ZIG -1, "no ZIG", is never removed
        solution = _Solution(removed, dict(self.values), set())
        touched: set[Equation] = set()
        for equation in self.equations:
            if self._is_touched(equation, removed):
                touched.add(equation)
                continue
            # an attribute that an untouched equation sets equal to something known keeps its value
            for attribute, other in bare_attributes(equation):
                if not attributes_in(other):
                    solution.fixed.add(attribute)

        # a comparison has to come out as it did, but says nothing about what its sides should be
        telling = [equation for equation in self.equations if not is_comparison(equation)]
        pending = [equation for equation in telling if equation in touched]
        # equations with an attribute alone on one side go first: they leave no choice
        without_choice = [equation for equation in pending if has_bare_attribute(equation)]
        self._settle(without_choice, solution)
        self._settle(pending, solution)
        # attributes that have changed meanwhile may contradict equations that no removed ZIG touches
        self._settle(telling, solution, only_broken=True)

        changed: dict[Attribute, int] = {}
        for attribute, size in solution.attributes.items():
            if size != self.values[attribute]:
                changed[attribute] = size
        conflicts = []
        for equation in self.equations:
            changed_in_it = changed.keys() & attributes_in(*equation.sides)
            concerned = equation in touched or changed_in_it
            if concerned and not self._holds(equation, solution.attributes, removed):
                conflicts.append(equation)
        return changed, conflicts

    def _is_touched(self, equation: Equation, removed: np.ndarray) -> bool:
        """Whether a removed ZIG has positions in a span of the equation."""
        factors = self._factors(equation)
        return any(removed[zigs].any() for zigs in factors)

    def _settle(self, equations: Sequence[Equation], solution: _Solution, only_broken: bool = False) -> None:
        """Fixes the attribute of every equation that has one unknown attribute, until there is no such equation.

        Args:
            only_broken: leave equations alone that hold as things are.
        """
        removed, attributes, fixed = solution
        num_fixed = -1
        # a fixed attribute may leave another equation with one unknown attribute
        while num_fixed < len(fixed):
            num_fixed = len(fixed)
            for equation in equations:
                unknown = attributes_in(*equation.sides) - fixed
                if len(unknown) != 1:
                    continue
                if only_broken and self._holds(equation, attributes, removed):
                    continue
                (attribute,) = unknown
                size = self._fit(equation, attribute, solution)
                # else the attribute keeps its old value, and the equation becomes a conflict
                if is_cut_size(self.values[attribute], size):
                    attributes[attribute] = size
                    fixed.add(attribute)

    def _fit(self, equation: Equation, attribute: Attribute, solution: _Solution) -> float:
        """The value of one attribute that satisfies an equation.

        The old value is taken if it satisfies the equation, else the smallest value that does; nan if none does.
        """
        for bare_attribute, other in bare_attributes(equation):
            if bare_attribute == attribute:
                return self._value(other, solution.attributes, solution.removed)
        old = self.values[attribute]
        for size in (old, *range(1, old)):  # a cut makes no size larger
            trial = ChainMap({attribute: size}, solution.attributes)
            if self._holds(equation, trial, solution.removed):
                return size
        return math.nan

    def _factors(self, equation: Equation) -> list[np.ndarray]:
        """The arrays of ZIGs, one for each factor of each span in an equation."""
        factors: list[np.ndarray] = []
        for side in equation.sides:
            for key in spans_of(side):
                factors += self.spans[key]
        return factors

    def _removed_in(self, equations: Iterable[Equation], removed: np.ndarray) -> np.ndarray:
        """The removed ZIGs that equations speak of, in order."""
        factors = [np.zeros(0, np.int64)]  # numpy concatenates no empty list
        for equation in equations:
            factors += self._factors(equation)
        zigs = np.unique(np.concatenate(factors))
        zigs = zigs[zigs >= 0]  # -1 stands for positions that stay
        is_removed = removed[zigs]
        return zigs[is_removed]

    def involved(self, equations: Sequence[Equation], removed: np.ndarray) -> np.ndarray:
        """The removed ZIGs that are to blame for equations that can't hold.

        These are the removed ZIGs that the equations speak of. If the equations speak of no removed ZIG, then the ZIGs
        are to blame that any equation with one of their attributes speaks of. If there are none either, all removed
        ZIGs are.
        """
        zigs = self._removed_in(equations, removed)
        if len(zigs):
            return zigs
        attributes: set[Attribute] = set()
        for equation in equations:
            attributes |= attributes_in(*equation.sides)
        related = []
        for equation in self.equations:
            if attributes & attributes_in(*equation.sides):
                related.append(equation)
        zigs = self._removed_in(related, removed)
        if len(zigs):
            return zigs
        return np.flatnonzero(removed)
