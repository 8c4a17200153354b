"""What a cut does to weights that are whole one at a time: it zeroes them, fills them with noise, or cuts them.

certificate.py and cut.py do the same to all weights of a model at once.

Worked example: the cut removes unit 1 of Linear(3, 2), ReLU, Linear(2, 3). `zeroed()("0.weight", w)` is w with zeros
in row 1, and `cut()("2.weight", w)` is w without column 1. No change writes into the weight that it is given.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .certificate import is_free
from .cut import Cut, Scale, scaled, without_positions

Change = Callable[[str, Tensor], Tensor]  # (name of a weight, the whole of it) -> what a forward is to read


class Changes:
    """The changes that a cut makes.

    Args:
        first_names: name of a tensor -> the first of its names, by which weights are known here.
    """

    def __init__(self, cut: Cut, first_names: Mapping[str, str]) -> None:
        self._cut = cut
        self._first_names = first_names

    def zeroed(self) -> Change:
        """Zeroes what the cut removes."""
        zeros = self._positions(lambda axis, member: member in axis.group)

        def change(name: str, weight: Tensor) -> Tensor:
            for dim, index in zeros.get(name, ()):
                weight = weight.index_fill(dim, torch.from_numpy(index).to(weight.device), 0)
            return weight

        return change

    def noisy(self) -> Change:
        """Zeroes what the cut removes, and fills what reads it with noise."""
        noise = self._positions(lambda axis, member: is_free(axis, member, producers_too=False))
        zero = self.zeroed()

        def change(name: str, weight: Tensor) -> Tensor:
            generator = torch.Generator(weight.device)
            generator.manual_seed(zlib.crc32(name.encode()))  # all ranks draw the same noise
            for dim, index in noise.get(name, ()):
                shape = list(weight.shape)
                shape[dim] = len(index)
                values = torch.randn(shape, generator=generator, device=weight.device)
                weight = weight.index_copy(dim, torch.from_numpy(index).to(weight.device), values.to(weight))
            # zeros are written last, so that they win where a tensor is on both sides
            return zero(name, weight)

        return change

    def _positions(self, wanted: Callable[[Any, Any], bool]) -> dict[str, list[tuple[int, np.ndarray]]]:
        """Name of a weight -> (dimension, positions) of what the cut removes, of wanted members (axis, member)."""
        cut = self._cut
        positions = defaultdict(list)
        for axis, member, index in cut.partition.slices(cut.removed):
            # a statistic belongs to neither side
            if member.role != "statistic" and wanted(axis, member):
                positions[self._first_names[member.param]].append((member.dim, index))
        return positions

    def cut(self, but: Collection[str] = ()) -> Change:
        """Cuts a weight, and scales it.

        Args:
            but: the names of weights that are not scaled here.
        """
        positions = {}
        for name, gone_of_dims in self._cut.positions.items():
            positions[self._first_names[name]] = gone_of_dims
        scales = self.scales()

        def change(name: str, weight: Tensor) -> Tensor:
            weight = without_positions(weight, positions.get(name, {}))
            if name in scales and name not in but:
                weight = scaled(weight, *scales[name])
            return weight

        return change

    def scales(self) -> dict[str, Scale]:
        """How the cut scales weights, by their first names."""
        return {self._first_names[name]: scale for name, scale in self._cut.scales.items()}
