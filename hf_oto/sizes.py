"""Sizes that modules keep to themselves: which attribute must become what, so that a cut model still runs.

Every size argument seen in the trace gave an equation "expression == what a cut leaves of an axis". Solving them for a
set of removed ZIGs gives the new attributes; a contradiction names the ZIGs that can't be removed together.
"""

from __future__ import annotations

import functools
import hashlib
import math
import operator
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from .modeling_oto import is_cut_size
from .trace import Equation, Expr

Attribute = tuple[str, str, int | None]  # module path, name, index in a list
Values = Mapping[Attribute, int]
Spans = dict[tuple[int, int], tuple[np.ndarray, ...]]


class Sizes:
    """The size equations of a model that a cut can touch.

    Args:
        equations: as traced.
        spans: (value, dim) -> the ZIG of every position of each of its factors, -1 for those that stay; dimensions
            without any are left out.
        values: attribute -> its value in the dense model.
    """

    def __init__(self, equations: Sequence[Equation], spans: Spans, values: dict[Attribute, int]) -> None:
        self.values = values
        self.spans: dict[Expr, tuple[np.ndarray, ...]] = {}
        self._names: dict[int, bytes] = {}
        self.equations: list[Equation] = []
        seen = set()
        for equation in equations:
            left, right = self._bind(equation.left, spans), self._bind(equation.right, spans)
            if (left, right) in seen or left == right or left[0] == right[0] == "const":
                continue
            seen.add((left, right))
            self.equations.append(Equation(left, right, equation.layer))
        count = 1 + max((int(f.max()) for factors in self.spans.values() for f in factors), default=-1)
        self.equations = [e for e in self.equations if self._holds(e, values, np.zeros(count + 1, bool))]

    def _bind(self, expr: Expr, spans: Spans) -> Expr:
        """Spans that no cut touches become constants; equal ones become the same key."""
        if expr[0] == "span":
            _, value, dim, start, stop = expr
            factors = spans.get((value, dim))
            if factors is None:
                return ("const", stop - start)
            key = ("span", *map(self._name, factors), start, stop)
            self.spans[key] = factors
            return key
        if expr[0] in ("const", "attribute"):
            return expr
        left, right = self._bind(expr[1], spans), self._bind(expr[2], spans)
        if left[0] == right[0] == "const":
            return ("const", _compute(expr[0], left[1], right[1]))
        return (expr[0], left, right)

    def _name(self, factor: np.ndarray) -> bytes:
        """A short name of the contents of an array."""
        if id(factor) not in self._names:
            self._names[id(factor)] = hashlib.blake2b(factor.tobytes(), digest_size=16).digest()
        return self._names[id(factor)]

    def _value(self, expr: Expr, attributes: Values, removed: np.ndarray) -> float:
        """What an expression becomes; `removed` is bool (num_zigs + 1,), its last entry False."""
        if expr[0] == "const":
            return expr[1]
        if expr[0] == "attribute":
            return attributes[expr[1:]]
        if expr[0] == "span":
            whole = functools.reduce(np.logical_and.outer, (~removed[factor] for factor in self.spans[expr]))
            return int(whole.reshape(-1)[expr[-2] : expr[-1]].sum())
        return _compute(expr[0], *(self._value(e, attributes, removed) for e in expr[1:]))

    def _holds(self, equation: Equation, attributes: Values, removed: np.ndarray) -> bool:
        return self._value(equation.left, attributes, removed) == self._value(equation.right, attributes, removed)

    def solve(self, removed: np.ndarray) -> tuple[dict[Attribute, int], list[Equation]]:
        """The attributes that change when ZIGs are removed, and the equations that then can't hold.

        Args:
            removed: bool, shape (num_zigs,).
        """
        removed = np.append(removed, False)  # what -1 stands for
        attributes = dict(self.values)
        touched = {q: any(removed[f].any() for f in self._factors(q)) for q in self.equations}
        # a comparison has to come out as it did, but says nothing about what its sides should be
        pending = [q for q, yes in touched.items() if yes and not is_comparison(q)]
        # what an equation of no cut axis says of one attribute alone stays true
        fixed = {a for q, yes in touched.items() if not yes for a, other in _alone(q) if not _attributes(other)}

        def settle(equations: Sequence[Equation], ready: Callable[[Equation], bool]) -> None:
            """Fixes the attribute of every equation that has one unknown left, until there is none."""
            count = -1
            while count < len(fixed):
                count = len(fixed)
                for equation in equations:
                    unknown = _attributes(*equation[:2]) - fixed
                    if len(unknown) == 1 and ready(equation):
                        (attribute,) = unknown
                        value = self._fit(equation, attribute, attributes, removed)
                        if is_cut_size(self.values[attribute], value):
                            attributes[attribute] = value
                            fixed.add(attribute)

        settle(pending, lambda q: any(e[0] == "attribute" for e in q[:2]))  # what stands alone is certain
        settle(pending, lambda q: True)
        told = [q for q in self.equations if not is_comparison(q)]
        settle(told, lambda q: not self._holds(q, attributes, removed))  # of what has changed meanwhile
        changed = {a: v for a, v in attributes.items() if v != self.values[a]}
        asked = [q for q in self.equations if touched[q] or changed.keys() & _attributes(*q[:2])]
        return changed, [q for q in asked if not self._holds(q, attributes, removed)]

    def _fit(self, equation: Equation, attribute: Attribute, attributes: Values, removed: np.ndarray) -> float:
        """The value of one unknown attribute that satisfies an equation: the old one if it does, else the smallest."""
        for alone, other in _alone(equation):
            if alone == attribute:
                return self._value(other, attributes, removed)
        old = self.values[attribute]
        tries = ((n, ChainMap({attribute: n}, attributes)) for n in (old, *range(1, old)))
        return next((n for n, trial in tries if self._holds(equation, trial, removed)), math.nan)

    def _factors(self, equation: Equation) -> list[np.ndarray]:
        return [f for e in equation[:2] for s in spans_of(e) for f in self.spans[s]]

    def involved(self, equations: Sequence[Equation], removed: np.ndarray) -> np.ndarray:
        """The removed ZIGs that the equations speak of; where there are none, those of equations with the same
        attributes; where there are none of these either, all."""
        shared = _attributes(*(e for q in equations for e in q[:2]))
        for some in (equations, [q for q in self.equations if shared & _attributes(*q[:2])]):
            found = np.unique(np.concatenate([np.zeros(0, np.int64), *(f for q in some for f in self._factors(q))]))
            found = found[found >= 0]
            if removed[found].any():
                return found[removed[found]]
        return np.flatnonzero(removed)


COMPARISONS = {"==": operator.eq, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "//": operator.floordiv, "%": operator.mod}
OPERATIONS |= COMPARISONS


def is_comparison(equation: Equation) -> bool:
    """Whether it only says how a comparison came out."""
    return equation.left[0] in COMPARISONS


def _compute(op: str, left: float, right: float) -> float:
    """The result, nan, which equals nothing, for one that does not exist."""
    return math.nan if op in ("//", "%") and right == 0 else OPERATIONS[op](left, right)


def _atoms(expr: Expr) -> list[Expr]:
    return [expr] if expr[0] in ("const", "attribute", "span") else [*_atoms(expr[1]), *_atoms(expr[2])]


def _attributes(*exprs: Expr) -> set[Attribute]:
    return {atom[1:] for expr in exprs for atom in _atoms(expr) if atom[0] == "attribute"}


def _alone(equation: Equation) -> list[tuple[Attribute, Expr]]:
    """An attribute that is one side of an equation by itself, and the other side, if it is not in that too."""
    sides = equation[:2], equation[1::-1]
    return [(a[1:], b) for a, b in sides if a[0] == "attribute" and a[1:] not in _attributes(b)]


def spans_of(expr: Expr) -> list[Expr]:
    """The spans in an expression."""
    return [atom for atom in _atoms(expr) if atom[0] == "span"]
