"""Bottlenecks: axes through which all goes that the model's output learns of its inputs.

Around the hidden units of a residual block the stream goes on, so that a model without any of them still works. A
stream itself, or a layer of a network without residual connections, is a bottleneck: without it the output knows
nothing of the inputs. A gradient, taken where all of the axis is still there, doesn't see that coming, so choice.py
gives the last ZIGs of a bottleneck more weight.

Worked example: y = fc3(x + fc2(relu(fc1(x)))). The units of fc1 are no bottleneck, since x itself reaches the sum.
Those of the stream x are one: `fc1` reads them, the sum has them, and fc3 reads the sum.
"""

from __future__ import annotations

import functools

import numpy as np

from .axes import Leaf
from .rules import Axes
from .sizes import Ref
from .trace import Trace

NONE = 0  # the set of no axis; sets are integers, whose bit number a stands for axis a


def bottlenecks(traced: Trace, unified: Axes, axis_of: np.ndarray) -> set[int]:
    """The numbers of the axes that are bottlenecks in eval mode.

    In doubt an axis is none: a product counts as two ways, as if each factor alone brought the inputs to the output.

    Args:
        traced: the calls of the model.
        unified: the dimensions of all their tensors.
        axis_of: the axis of every id of the algebra, -1 for none, (ids,).
    """
    axes_of_leaf: dict[int, int] = {}  # many tensors share a leaf

    def all_along(ref: Ref) -> int:
        """The axes without which nothing of a tensor is left."""
        found = NONE
        for leaves in unified.of(ref):
            for leaf in leaves:
                key = id(leaf.ids)
                if key not in axes_of_leaf:
                    axes_of_leaf[key] = _axis_along(leaf, axis_of)
                found |= axes_of_leaf[key]
        return found

    # number of a tensor that depends on the inputs -> the axes through which all ways from the inputs to it go
    passed: dict[int, int] = {}
    made = {ref.value for ref in traced.sources.values()}
    for call in traced.calls[: traced.evaluated]:
        ways = []
        for ref in call.refs:
            if ref.value not in made:
                passed.setdefault(ref.value, NONE)  # nothing made it: an input
            if ref.value in passed:
                ways.append(passed[ref.value])
        on_all_ways = functools.reduce(int.__and__, ways) if ways else NONE
        for ref in call.outs:
            made.add(ref.value)
            if ways and ref.value in unified.dims:
                passed[ref.value] = on_all_ways | all_along(ref)
    outputs = [passed[ref.value] for ref in traced.returned.get(False, []) if ref.value in passed]
    on_all_ways = functools.reduce(int.__and__, outputs) if outputs else NONE
    return {axis for axis in range(on_all_ways.bit_length()) if on_all_ways >> axis & 1}


def _axis_along(leaf: Leaf, axis_of: np.ndarray) -> int:
    """The axis on which all positions of a leaf lie, as a set."""
    axes = np.unique(axis_of[leaf.ids])
    if len(axes) != 1 or axes[0] < 0:
        return NONE
    return 1 << int(axes[0])
