"""Sizes that modules keep to themselves (`num_heads`, say): what each must become for a cut model to run.

While the model is traced, these ints are tagged (`Size`), so that every size argument remembers where it came from;
what each torch function says of its size arguments (`SIZE_RULES`) becomes an `Equation`, "expression == what a cut
leaves of an axis". Solving the equations for a set of removed ZIGs gives the new attributes; a contradiction names the
ZIGs that can't be removed together.

Worked example: `x.view(b, n, self.num_heads, 64)` says num_heads == what is left of dimension 2 of the result. With 3
of 12 heads removed num_heads becomes 9. A 64 written in the code is a constant: if dimension 3 could lose something,
the equation 64 == what is left would contradict every cut of it, and it is pinned.
"""

from __future__ import annotations

import functools
import hashlib
import math
import operator
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from .modeling_oto import is_cut_size

# ("const", n) | ("attribute", path, name, index) | ("span", value, dim, start, stop) | (op, left, right), where the
# operations are those of arithmetic, and comparisons, which are 1 or 0
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


# tagged ints ---------------------------------------------------------------------------------------


class Size(int):
    """An int that remembers, as an expression, where it came from."""

    def __new__(cls, value: int, expr: Expr, equations: list[Equation]) -> Size:
        size = super().__new__(cls, value)
        size.expr, size.equations = expr, equations  # these receive what its later uses imply
        return size

    def _leave(self) -> int:
        """Leaves the algebra: from now on the expression has to keep its value."""
        self.equations.append(Equation(self.expr, ("const", plain(self)), ""))
        return plain(self)

    def __eq__(self, other: object) -> bool:
        equal = int.__eq__(self, other)
        if equal is True and isinstance(other, Size):
            if other.expr != self.expr:
                self.equations.append(Equation(self.expr, other.expr, ""))
        elif equal is not NotImplemented:
            self._note("==", other, equal)
        return equal

    def __ne__(self, other: object) -> bool:
        return not self == other

    # What is found by it in a table or set was compared with it; what isn't found there leaves no trace.
    __hash__ = int.__hash__

    def _note(self, comparison: str, other: Any, found: bool) -> None:
        """A comparison has to come out the same after a cut: code takes the other branch otherwise."""
        if isinstance(other, int):
            compared = (comparison, self.expr, expr_of(other))
            self.equations.append(Equation(compared, ("const", int(found)), ""))

    def __int__(self) -> int:
        return self._leave()

    def __float__(self) -> float:
        return float(self._leave())

    def __reduce__(self) -> tuple:
        return int, (plain(self),)


def _operation(name: str, op: str | None) -> Callable:
    """`Size.name`: the result is a size too, unless expressions have no such `op` or the other side is no int."""
    compute = getattr(int, name)

    def operate(self: Size, other: Any) -> Any:
        if op is None or not isinstance(other, int):
            return compute(self._leave(), other._leave() if isinstance(other, Size) else other)
        sides = (expr_of(other), self.expr) if name.startswith("__r") else (self.expr, expr_of(other))
        return Size(compute(plain(self), plain(other)), (op, *sides), self.equations)

    return operate


_OPS = {"add": "+", "sub": "-", "mul": "*", "floordiv": "//", "mod": "%", "truediv": None, "pow": None}
for _name, _op in [(f"__{side}{name}__", op) for name, op in _OPS.items() for side in ("", "r")]:
    setattr(Size, _name, _operation(_name, _op))


def _comparison(name: str, op: str) -> Callable:
    compute = getattr(int, name)

    def compare(self: Size, other: Any) -> bool:
        found = compute(self, other)
        if found is not NotImplemented:
            self._note(op, other, found)
        return found

    return compare


for _name, _op in {"__lt__": "<", "__le__": "<=", "__gt__": ">", "__ge__": ">="}.items():
    setattr(Size, _name, _comparison(_name, _op))


def plain(value: int) -> int:
    """The bare int, without a tag and without any consequence."""
    return int.__pos__(value)


def expr_of(value: int | Expr) -> Expr:
    """The expression a size came from; a plain int is a constant."""
    if isinstance(value, tuple):
        return value
    return value.expr if isinstance(value, Size) else ("const", value)


def span(ref: Ref, dim: int, start: int = 0, stop: int | None = None) -> Expr:
    """The number of positions in [start, stop) of a dimension that a cut leaves."""
    dim %= len(ref.shape)
    return ("span", ref.value, dim, start, ref.shape[dim] if stop is None else stop)


# what each function says of the sizes it is given: their arguments are those of torch's own ------------

Pairs = Iterator[tuple[int | Expr, Expr]]  # (a size as passed, what it must equal)


def _shape(ref: Callable, out: Any, sizes: Sequence[Any], first: int = 0) -> Pairs:
    for d, n in enumerate(sizes, first):
        if isinstance(n, int) and n != -1:
            yield n, span(ref(out), d)


def _ints(sizes: Sequence[Any]) -> Sequence[int]:
    return sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes


def _view(ref: Callable, out: Any, input: Any, *sizes: Any, shape: Any = (), size: Any = (), **_: Any) -> Pairs:
    return _shape(ref, out, _ints(sizes) or shape or size)


def _repeat(ref: Callable, out: Any, input: Any, *sizes: Any, repeats: Any = (), dims: Any = ()) -> Pairs:
    for d, n in enumerate(reversed(_ints(sizes) or repeats or dims), 1):
        yield n, ("//", span(ref(out), -d), span(ref(input), -d)) if d <= input.dim() else span(ref(out), -d)


def _repeat_interleave(ref: Callable, out: Any, input: Any, repeats: Any, dim: int | None = None, **_: Any) -> Pairs:
    if isinstance(repeats, int) and dim is not None:
        yield repeats, ("//", span(ref(out), dim), span(ref(input), dim))


def _split(ref: Callable, out: Any, input: Any, split_size_or_sections: Any, dim: int = 0) -> Pairs:
    for i, piece in enumerate(out):
        n = split_size_or_sections if isinstance(split_size_or_sections, int) else split_size_or_sections[i]
        if piece.shape[dim] == n:
            yield n, span(ref(piece), dim)


def _chunk(ref: Callable, out: Any, input: Any, chunks: int, dim: int = 0) -> Pairs:
    yield ("*", ("const", len(out)), span(ref(out[0]), dim)), span(ref(input), dim)


def _slices(ref: Callable, out: Any, input: Any, index: Any) -> Pairs:
    index = index if isinstance(index, tuple) else (index,)
    masks = [i.dim() if isinstance(i, torch.Tensor) and i.dtype == torch.bool else 1 for i in index]
    widths = [0 if i is None or i is ... else width for i, width in zip(index, masks, strict=True)]
    dim = 0
    for i, width in zip(index, widths, strict=True):
        if isinstance(i, slice) and i.step in (None, 1):
            yield from _bounds(ref(input), dim, i.start, i.stop)
        dim += input.dim() - sum(widths) if i is ... else width


def _bounds(source: Ref, dim: int, start: int | None, stop: int | None) -> Pairs:
    n = source.shape[dim]
    for bound in (start, stop):
        if isinstance(bound, int) and 0 < bound < n:
            yield bound, span(source, dim, 0, plain(bound))
        elif isinstance(bound, int) and -n < bound < 0:
            yield 0 - bound, span(source, dim, n + plain(bound), n)


def _narrow(ref: Callable, out: Any, input: Any, dim: int, start: Any, length: int) -> Pairs:
    if isinstance(start, int):
        yield from _bounds(ref(input), dim % input.dim(), start, start + length)


def _groups(ref: Callable, out: Any, input: Any, weight: Any, *more: Any, groups: int = 1, **_: Any) -> Pairs:
    """(b, g i) and (o, i); transposed, which has out for input, (b, g o) and (i, o)"""
    whole = span(ref(input), input.dim() - weight.dim() + 1)
    yield more[4] if len(more) > 4 else groups, ("//", whole, span(ref(weight), 1))


def _group_norm(ref: Callable, out: Any, input: Any, num_groups: int, *_: Any, **__: Any) -> Pairs:
    yield num_groups, ("//", span(ref(out), 1), ("const", input.shape[1] // plain(num_groups)))


def _default_scale(ref: Callable, out: Any, query: Any, *_: Any, scale: float | None = None, **__: Any) -> Pairs:
    if scale is None:  # 1 / sqrt(head_dim) is then read off the query
        yield query.shape[-1], span(ref(query), -1)


def _all_heads(ref: Callable, out: Any, query: Any, *args: Any, **named: Any) -> Pairs:
    """Of attention with all its projections in one function, head_dim is embed_dim // num_heads: it stays whole."""
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    for tensor, dim in ((query, -1), (args[4], 0), *((named.get(name), 0) for name in names)):
        if tensor is not None:
            yield tensor.shape[dim], span(ref(tensor), dim)


SIZE_RULES: dict[str, Callable[..., Pairs]] = {
    **dict.fromkeys(["view", "reshape", "expand", "broadcast_to", "new_zeros", "new_ones", "new_empty"], _view),
    **dict.fromkeys(
        ["zeros", "ones", "empty", "rand", "randn"],
        lambda ref, out, *sizes, **named: _view(ref, out, None, *sizes, **named),
    ),
    "full": lambda ref, out, size, *_, **__: _shape(ref, out, size),
    "new_full": lambda ref, out, input, size, *_, **__: _shape(ref, out, size),
    "unflatten": lambda ref, out, input, dim, sizes: _shape(ref, out, sizes, dim % input.dim()),
    **dict.fromkeys(
        ["layer_norm", "rms_norm", "_fused_rms_norm"],
        lambda ref, out, input, normalized_shape, *_, **__: _shape(ref, out, normalized_shape, -len(normalized_shape)),
    ),
    "repeat": _repeat, "tile": _repeat, "repeat_interleave": _repeat_interleave,
    "split": _split, "split_with_sizes": _split, "chunk": _chunk, "__getitem__": _slices, "narrow": _narrow,
    **dict.fromkeys(["conv1d", "conv2d", "conv3d"], _groups),
    **dict.fromkeys(
        ["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"],
        lambda ref, out, input, *more, **named: _groups(ref, input, out, *more, **named),
    ),
    "__setitem__": lambda ref, out, input, index, value: _slices(ref, out, input, index),
    "multi_head_attention_forward": _all_heads,
    **dict.fromkeys(
        ["affine_grid", "affine_grid_generator"],  # (n, c, h, w), of which the channels decide nothing
        lambda ref, out, theta, size, *_, **__: _shape(ref, out, [size[0], *size[2:]]),
    ),
    "group_norm": _group_norm, "scaled_dot_product_attention": _default_scale,
}  # fmt: skip


# solving -------------------------------------------------------------------------------------------


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
