"""Sizes that modules keep to themselves (`num_heads`, say): what each must become for a cut model to run.

While the model is traced, each of these ints is a `Size`, which remembers as an expression where it came from, and
what torch's functions say of such sizes (size_rules.py) becomes an `Equation`. `Sizes` solves the equations for a set
of removed ZIGs: the solution is the new attributes, a contradiction names the ZIGs that can't be removed together.

Worked example: `x.view(b, n, self.num_heads, 64)` says that num_heads equals what a cut leaves of dimension 2 of the
result. A cut that removes 3 of 12 heads makes num_heads 9. The 64 is written in the code, so it is a constant: a cut
that left 48 positions of dimension 3 would contradict the equation "64 equals what is left", so dimension 3 is pinned.
"""

from __future__ import annotations

import functools
import hashlib
import math
import operator
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .modeling_oto import is_cut_size

# An expression is one of these tuples:
#   ("const", number)
#   ("attribute", module path, name, index)      a size that a module keeps, as in `Attribute`
#   ("span", tensor number, dim, start, stop)    how many of the positions [start, stop) a cut leaves
#   (operation, left, right)                     arithmetic, or a comparison, which is 1 or 0
Expr = tuple


Attribute = tuple[str, str, int | None]  # module path, name, index in a list
Values = Mapping[Attribute, int]
Spans = dict[tuple[int, int], tuple[np.ndarray, ...]]


@dataclass(frozen=True)
class Ref:
    """A recorded tensor: its number and its shape at that time."""

    value: int
    shape: tuple[int, ...]


class Equation(NamedTuple):
    """`left == right` must hold before and after a cut."""

    left: Expr
    right: Expr
    layer: str

    @property
    def sides(self) -> tuple[Expr, Expr]:
        """Both expressions, without the layer."""
        return self.left, self.right


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

    def _leave(self) -> int:
        """Leaves the algebra: from now on the expression has to keep its value."""
        value = plain(self)
        self.equations.append(Equation(self.expr, ("const", value), ""))
        return value

    def __eq__(self, other: object) -> bool:
        equal = int.__eq__(self, other)
        if equal is NotImplemented:
            return equal
        if equal and isinstance(other, Size):
            # Code that has found two sizes equal uses one for the other, so they have to stay equal.
            if other.expr != self.expr:
                self.equations.append(Equation(self.expr, other.expr, ""))
        else:
            self._note("==", other, equal)
        return equal

    def __ne__(self, other: object) -> bool:
        return not self == other

    # A table or set compares a size only with entries of the same hash: a size that is not found leaves no equation.
    __hash__ = int.__hash__

    def _note(self, comparison: str, other: Any, outcome: bool) -> None:
        """A comparison has to come out the same after a cut: code takes the other branch otherwise."""
        if isinstance(other, int):
            compared = (comparison, self.expr, expr_of(other))
            self.equations.append(Equation(compared, ("const", int(outcome)), ""))

    def __int__(self) -> int:
        return self._leave()

    def __float__(self) -> float:
        return float(self._leave())

    def __reduce__(self) -> tuple:
        return int, (plain(self),)


def _operation(name: str, op: str | None) -> Callable:
    """The method `Size.name`, whose result is a size too.

    Args:
        op: the operation in expressions. None: expressions have no such operation, and the operands leave the algebra.
    """
    compute = getattr(int, name)
    is_reflected = name.startswith("__r")

    def operate(self: Size, other: Any) -> Any:
        if op is None or not isinstance(other, int):
            value = self._leave()
            if isinstance(other, Size):
                other = other._leave()
            return compute(value, other)
        mine, its = self.expr, expr_of(other)
        expr = (op, its, mine) if is_reflected else (op, mine, its)
        return Size(compute(plain(self), plain(other)), expr, self.equations)

    return operate


def _comparison(name: str, op: str) -> Callable:
    """The method `Size.name`, which notes how the comparison came out."""
    compute = getattr(int, name)

    def compare(self: Size, other: Any) -> bool:
        outcome = compute(self, other)
        if outcome is not NotImplemented:
            self._note(op, other, outcome)
        return outcome

    return compare


_OPERATORS = {"add": "+", "sub": "-", "mul": "*", "floordiv": "//", "mod": "%", "truediv": None, "pow": None}
for _word, _op in _OPERATORS.items():
    for _method in (f"__{_word}__", f"__r{_word}__"):
        setattr(Size, _method, _operation(_method, _op))

for _method, _op in {"__lt__": "<", "__le__": "<=", "__gt__": ">", "__ge__": ">="}.items():
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
        spans: (value, dim) -> the ZIG of every position of each of its factors, -1 for those that stay; dimensions
            that no cut touches are left out.
        values: attribute -> its value in the dense model.
    """

    def __init__(self, equations: Sequence[Equation], spans: Spans, values: dict[Attribute, int]) -> None:
        self.values = values
        self.spans: dict[Expr, tuple[np.ndarray, ...]] = {}
        self._names: dict[int, bytes] = {}
        bound = self._bound(equations, spans)
        largest_zig = -1
        for factors in self.spans.values():
            for zigs in factors:
                largest_zig = max(largest_zig, int(zigs.max()))
        nothing_removed = np.zeros(largest_zig + 2, bool)
        # An equation that does not even hold for the dense model was misunderstood, and says nothing of a cut.
        self.equations = [equation for equation in bound if self._holds(equation, values, nothing_removed)]

    def _bound(self, equations: Sequence[Equation], spans: Spans) -> list[Equation]:
        """The equations that say something of a cut, each once."""
        bound: list[Equation] = []
        seen: set[tuple[Expr, Expr]] = set()
        for equation in equations:
            left = self._bind(equation.left, spans)
            right = self._bind(equation.right, spans)
            is_of_constants = left[0] == right[0] == "const"
            if (left, right) in seen or left == right or is_of_constants:
                continue
            seen.add((left, right))
            bound.append(Equation(left, right, equation.layer))
        return bound

    def _bind(self, expr: Expr, spans: Spans) -> Expr:
        """The expression with spans that no cut touches as constants, and equal spans under equal keys."""
        kind = expr[0]
        if kind == "span":
            _, value, dim, start, stop = expr
            factors = spans.get((value, dim))
            if factors is None:
                return ("const", stop - start)
            key = ("span", *map(self._name, factors), start, stop)
            self.spans[key] = factors
            return key
        if kind in ("const", "attribute"):
            return expr
        left = self._bind(expr[1], spans)
        right = self._bind(expr[2], spans)
        if left[0] == right[0] == "const":
            return ("const", _compute(kind, left[1], right[1]))
        return (kind, left, right)

    def _name(self, zigs: np.ndarray) -> bytes:
        """A short name of the contents of an array."""
        if id(zigs) not in self._names:
            self._names[id(zigs)] = hashlib.blake2b(zigs.tobytes(), digest_size=16).digest()
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
            stays = [~removed[zigs] for zigs in self.spans[expr]]
            # A position of a dimension stays if its position in every factor stays.
            whole = functools.reduce(np.logical_and.outer, stays)
            return int(whole.reshape(-1)[start:stop].sum())
        left = self._value(expr[1], attributes, removed)
        right = self._value(expr[2], attributes, removed)
        return _compute(kind, left, right)

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
            if any(removed[zigs].any() for zigs in self._factors(equation)):
                touched.add(equation)
                continue
            # An attribute that an untouched equation sets equal to something known keeps its value.
            for attribute, other in _alone(equation):
                if not _attributes(other):
                    solution.fixed.add(attribute)
        # A comparison has to come out as it did, but says nothing about what its sides should be.
        telling = [equation for equation in self.equations if not is_comparison(equation)]
        pending = [equation for equation in telling if equation in touched]
        # Equations with an attribute alone on one side go first: they leave no choice.
        self._settle([equation for equation in pending if _has_bare_attribute(equation)], solution)
        self._settle(pending, solution)
        # Attributes that have changed meanwhile contradict equations that no removed ZIG touches.
        self._settle(telling, solution, only_broken=True)
        changed = {a: size for a, size in solution.attributes.items() if size != self.values[a]}
        conflicts = []
        for equation in self.equations:
            concerned = equation in touched or changed.keys() & _attributes(*equation.sides)
            if concerned and not self._holds(equation, solution.attributes, removed):
                conflicts.append(equation)
        return changed, conflicts

    def _settle(self, equations: Sequence[Equation], solution: _Solution, only_broken: bool = False) -> None:
        """Fixes the attribute of every equation that has one unknown attribute, until there is no such equation.

        Args:
            only_broken: leave equations alone that hold as things are.
        """
        removed, attributes, fixed = solution
        count = -1
        while count < len(fixed):
            count = len(fixed)
            for equation in equations:
                unknown = _attributes(*equation.sides) - fixed
                if len(unknown) != 1:
                    continue
                if only_broken and self._holds(equation, attributes, removed):
                    continue
                (attribute,) = unknown
                size = self._fit(equation, attribute, solution)
                if is_cut_size(self.values[attribute], size):
                    attributes[attribute] = size
                    fixed.add(attribute)

    def _fit(self, equation: Equation, attribute: Attribute, solution: _Solution) -> float:
        """The value of one attribute that satisfies an equation: the old value if it does, else the smallest; nan if
        none does."""
        for bare_attribute, other in _alone(equation):
            if bare_attribute == attribute:
                return self._value(other, solution.attributes, solution.removed)
        old = self.values[attribute]
        for size in (old, *range(1, old)):
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
        factors = [np.zeros(0, np.int64)]
        for equation in equations:
            factors += self._factors(equation)
        zigs = np.unique(np.concatenate(factors))
        zigs = zigs[zigs >= 0]
        return zigs[removed[zigs]]

    def involved(self, equations: Sequence[Equation], removed: np.ndarray) -> np.ndarray:
        """The removed ZIGs that have to answer for equations that can't hold.

        These are the removed ZIGs that the equations speak of. If the equations speak of none, they are those of all
        equations with the same attributes; if there are none of these either, all removed ZIGs.
        """
        zigs = self._removed_in(equations, removed)
        if len(zigs):
            return zigs
        attributes: set[Attribute] = set()
        for equation in equations:
            attributes |= _attributes(*equation.sides)
        related = [equation for equation in self.equations if attributes & _attributes(*equation.sides)]
        zigs = self._removed_in(related, removed)
        if len(zigs):
            return zigs
        return np.flatnonzero(removed)


# expressions ---------------------------------------------------------------------------------------

COMPARISONS = {"==": operator.eq, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "//": operator.floordiv, "%": operator.mod}
OPERATIONS |= COMPARISONS


def is_comparison(equation: Equation) -> bool:
    """Whether it only says how a comparison came out."""
    return equation.left[0] in COMPARISONS


def _compute(op: str, left: float, right: float) -> float:
    """The result of an operation; a division by zero gives nan, which equals nothing."""
    if op in ("//", "%") and right == 0:
        return math.nan
    return OPERATIONS[op](left, right)


def _atoms(expr: Expr) -> list[Expr]:
    """The constants, attributes and spans in an expression."""
    if expr[0] in ("const", "attribute", "span"):
        return [expr]
    return [*_atoms(expr[1]), *_atoms(expr[2])]


def _attributes(*exprs: Expr) -> set[Attribute]:
    """The attributes in expressions."""
    return {atom[1:] for expr in exprs for atom in _atoms(expr) if atom[0] == "attribute"}


def _has_bare_attribute(equation: Equation) -> bool:
    """Whether one side is an attribute and nothing else."""
    return equation.left[0] == "attribute" or equation.right[0] == "attribute"


def _alone(equation: Equation) -> list[tuple[Attribute, Expr]]:
    """(attribute, other side) of every side that is an attribute and nothing else.

    An attribute that stands in the other side too is left out, for that side does not tell its value.
    """
    left, right = equation.sides
    pairs = []
    for side, other in ((left, right), (right, left)):
        if side[0] == "attribute" and side[1:] not in _attributes(other):
            pairs.append((side[1:], other))
    return pairs


def spans_of(expr: Expr) -> list[Expr]:
    """The spans in an expression."""
    return [atom for atom in _atoms(expr) if atom[0] == "span"]
