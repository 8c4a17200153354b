"""Expressions of sizes, and the equations between them: the words in which sizes.py says what a cut model needs.

An expression is a tuple, and says how a size is computed from what a cut leaves and from what modules keep.

Worked example: ("*", ("attribute", "attention", "num_heads", None), ("const", 64)) is num_heads * 64, and ("span", 7,
2, 0, 768) is what a cut leaves of the 768 positions in dimension 2 of tensor 7. An `Equation` of the two says that
these numbers must be equal before and after a cut.
"""

from __future__ import annotations

import math
import operator
from typing import NamedTuple

# An expression is one of these tuples:
#   ("const", number)
#   ("attribute", module path, name, index)      a size that a module keeps, as in `Attribute`
#   ("span", tensor number, dim, start, stop)    how many of the positions [start, stop) a cut leaves
#   (operation, left, right)                     arithmetic, or a comparison, which is 1 or 0
Expr = tuple

Attribute = tuple[str, str, int | None]  # module path, name, index in a list

ARITHMETIC = {"+": operator.add, "-": operator.sub, "*": operator.mul, "//": operator.floordiv, "%": operator.mod}
COMPARISONS = {"==": operator.eq, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
OPERATIONS = ARITHMETIC | COMPARISONS


class Equation(NamedTuple):
    """`left == right` must hold before and after a cut."""

    left: Expr
    right: Expr
    layer: str

    @property
    def sides(self) -> tuple[Expr, Expr]:
        """Both expressions, without the layer."""
        return self.left, self.right


def is_comparison(equation: Equation) -> bool:
    """Whether the equation says only how a comparison came out."""
    return equation.left[0] in COMPARISONS


def compute(operation: str, left: float, right: float) -> float:
    """The result of an operation; a division by zero gives nan, which equals nothing."""
    if operation in ("//", "%") and right == 0:
        return math.nan
    return OPERATIONS[operation](left, right)


def _atoms(expr: Expr) -> list[Expr]:
    """The constants, attributes and spans in an expression."""
    if expr[0] in ("const", "attribute", "span"):
        return [expr]
    _, left, right = expr
    return _atoms(left) + _atoms(right)


def attributes_in(*exprs: Expr) -> set[Attribute]:
    """The attributes in expressions."""
    found = set()
    for expr in exprs:
        for atom in _atoms(expr):
            if atom[0] == "attribute":
                attribute = atom[1:]
                found.add(attribute)
    return found


def spans_of(expr: Expr) -> list[Expr]:
    """The spans in an expression."""
    return [atom for atom in _atoms(expr) if atom[0] == "span"]


def has_bare_attribute(equation: Equation) -> bool:
    """Whether one side is an attribute and nothing else."""
    return any(side[0] == "attribute" for side in equation.sides)


def bare_attributes(equation: Equation) -> list[tuple[Attribute, Expr]]:
    """(attribute, other side) of every side that is an attribute and nothing else.

    An attribute that stands in the other side too is left out, because that side does not tell its value.
    """
    left, right = equation.sides
    pairs = []
    for side, other in ((left, right), (right, left)):
        if side[0] != "attribute":
            continue
        attribute = side[1:]
        if attribute not in attributes_in(other):
            pairs.append((attribute, other))
    return pairs
