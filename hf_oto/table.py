"""The partition as text: one line per family of axes, then what is pinned, why, and what would lift the pin.

A family is a set of axes of equal kind and size in layers of equal structure. The heads of 12 layers, 8 in each, are
one line, `12 x 8`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .cost import Work
from .reasons import Reason

if TYPE_CHECKING:  # zigs.py imports this file
    from .zigs import PrunableAxis

PINNED = "pinned (kept whole), why, and what would lift it"
LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
NAMES_SHOWN = 3  # so many families of dimensions are named for each reason, the others are counted

Family = tuple[str, str, int]  # folded name, kind, size
Row = tuple[str, ...]  # cells of text


def text(axes: Sequence[PrunableAxis], pinned: Mapping[str, Reason], work: Work | None) -> str:
    """The whole table."""
    num_zigs = sum(axis.size for axis in axes)
    lines = [f"{len(axes)} prunable axes, {num_zigs:,} ZIGs"]
    lines += _aligned(_rows(axes, work))
    if pinned:
        lines += ["", PINNED]
    for why, names in _pins(pinned):
        lines += [f"  {why}", f"      {names}"]
    return "\n".join(lines)


def _aligned(rows: Sequence[Row]) -> list[str]:
    """Rows as lines of equal columns."""
    columns = []
    for number, cells in enumerate(zip(*rows, strict=True)):
        width = max(map(len, cells))
        # names and kinds begin, and numbers end, below each other
        justified = str.ljust if number < 2 else str.rjust
        columns.append([justified(cell, width) for cell in cells])
    lines = []
    for cells in zip(*columns, strict=True):
        line = "  ".join(cells)
        lines.append(f"  {line}")
    return lines


def _rows(axes: Sequence[PrunableAxis], work: Work | None) -> list[Row]:
    """A header, and a row for every family of axes."""
    families: dict[Family, list[PrunableAxis]] = defaultdict(list)
    for axis in axes:
        family = (fold(axis.name), axis.kind, axis.size)
        families[family].append(axis)
    dense_macs = 0.0
    if work is not None:
        nothing_gone = np.zeros(len(axes))
        dense_macs = work.left(nothing_gone)
    rows = [("axis", "kind", "ZIGs", "parameters", "MACs")]
    for (_, kind, size), axes_of_family in families.items():
        names = [axis.name for axis in axes_of_family]
        num_axes = len(axes_of_family)
        zigs = f"{num_axes} x {size}"
        # what each ZIG takes alone: two ZIGs that meet in a weight count its entry twice
        params = size * sum(axis.params for axis in axes_of_family)
        macs = size * sum(axis.macs for axis in axes_of_family)
        percent = 100 * macs / dense_macs if dense_macs else 0  # without MACs every share is 0 %
        row = (unfold(names), kind, zigs, f"{params:,}", f"{percent:.0f} %")
        rows.append(row)
    return rows


def _pins(pinned: Mapping[str, Reason]) -> list[tuple[str, str]]:
    """Rows of two texts: a reason with what would lift it, and the dimensions that it keeps whole."""
    # reason, without the layer where it arose -> folded name -> names
    by_reason: dict[Reason, dict[str, list[str]]] = {}
    for name, why in pinned.items():
        families = by_reason.setdefault(why.anywhere, {})
        family = fold(name)
        families.setdefault(family, []).append(name)
    rows = []
    for why, families in by_reason.items():
        names = [unfold(family) for family in families.values()]
        kept_whole = ", ".join(names[:NAMES_SHOWN])
        num_others = len(names) - NAMES_SHOWN
        if num_others > 0:
            kept_whole += f" and {num_others} more"
        reason = f"{why} ({why.lift})"
        rows.append((reason, kept_whole))
    return rows


def fold(name: str) -> str:
    """A name with its layer numbers folded, which the axes of layers of equal structure share.

    Example:
        >>> fold("encoder.layer.11.query.weight[0]")
        'encoder.layer.*.query.weight[0]'
    """
    return LAYER_NUMBER.sub("*", name)


def unfold(names: Sequence[str]) -> str:
    """One name for several names that `fold` makes equal.

    Example:
        >>> unfold([f"encoder.layer.{n}.query.weight[0]" for n in range(12)])
        'encoder.layer.{0..11}.query.weight[0]'
    """
    result = fold(names[0])
    numbers_of_names = [LAYER_NUMBER.findall(name) for name in names]
    for numbers_at_place in zip(*numbers_of_names, strict=True):
        shown = _shown({int(number) for number in numbers_at_place})
        result = result.replace("*", shown, 1)
    return result


def _shown(numbers: set[int]) -> str:
    """Layer numbers in a name: 3, or {0..11}, or {0,2,5}."""
    first, last = min(numbers), max(numbers)
    if first == last:
        return str(first)
    has_no_gap = len(numbers) == last - first + 1
    if has_no_gap and len(numbers) > 2:
        return f"{{{first}..{last}}}"
    listed = ",".join(map(str, sorted(numbers)))
    return f"{{{listed}}}"
