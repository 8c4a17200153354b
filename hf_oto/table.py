"""The partition as text: one line per family of axes, then what is pinned, why, and what would lift it.

A family is axes of equal kind and size in layers of equal structure: 12 layers' heads are one line, `12 x 8`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .cost import Work
from .reasons import Reason

if TYPE_CHECKING:
    from .zigs import PrunableAxis

PINNED = "pinned (kept whole), why, and what would lift it"
LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
NAMES_SHOWN = 3  # of the families of dimensions that a reason keeps whole; the others are counted


def text(axes: Sequence[PrunableAxis], pinned: Mapping[str, Reason], work: Work | None) -> str:
    """The whole table."""
    rows = _rows(axes, work)
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [f"{len(axes)} prunable axes, {sum(axis.size for axis in axes):,} ZIGs"]
    for name, kind, *numbers in rows:
        aligned = [f"{number:>{width}}" for number, width in zip(numbers, widths[2:], strict=True)]
        lines.append(f"  {name:{widths[0]}}  {kind:{widths[1]}}  {'  '.join(aligned)}")
    if pinned:
        lines += ["", PINNED]
    for why, names in _pins(pinned):
        lines += [f"  {why}", f"      {names}"]
    return "\n".join(lines)


def _rows(axes: Sequence[PrunableAxis], work: Work | None) -> list[tuple[str, ...]]:
    families: dict[tuple[str, str, int], list[PrunableAxis]] = {}
    for axis in axes:
        families.setdefault((fold(axis.name), axis.kind, axis.size), []).append(axis)
    dense_macs = work.left(np.zeros(len(axes))) if work else 0
    dense_macs = dense_macs or 1  # without MACs every share is 0 %
    rows = [("axis", "kind", "ZIGs", "parameters", "MACs")]
    for (_, kind, size), family in families.items():
        name = unfold([axis.name for axis in family])
        params = size * sum(axis.params for axis in family)
        macs = size * sum(axis.macs for axis in family)
        share_of_macs = f"{100 * macs / dense_macs:.0f} %"
        rows.append((name, kind, f"{len(family)} x {size}", f"{params:,}", share_of_macs))
    return rows


def _pins(pinned: Mapping[str, Reason]) -> list[tuple[str, str]]:
    """Rows of two texts: a reason with what would lift it, and the dimensions that it keeps whole."""
    by_reason: dict[Reason, dict[str, list[str]]] = {}
    for name, why in pinned.items():
        by_reason.setdefault(why.anywhere, {}).setdefault(fold(name), []).append(name)
    rows = []
    for why, families in by_reason.items():
        names = [unfold(family) for family in families.values()]
        kept_whole = ", ".join(names[:NAMES_SHOWN])
        if len(names) > NAMES_SHOWN:
            kept_whole += f" and {len(names) - NAMES_SHOWN} more"
        rows.append((f"{why} ({why.lift})", kept_whole))
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
        numbers = sorted({int(number) for number in numbers_at_place})
        first, last = numbers[0], numbers[-1]
        if len(numbers) == 1:
            shown = str(first)
        elif len(numbers) > 2 and numbers == list(range(first, last + 1)):
            shown = f"{{{first}..{last}}}"
        else:
            shown = f"{{{','.join(map(str, numbers))}}}"
        result = result.replace("*", shown, 1)
    return result
