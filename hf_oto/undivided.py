"""A model as it was before FSDP2 or DeepSpeed divided its parameters among the ranks, without its weights.

Worked example: a Linear(2, 3) is divided among 2 ranks. Its class is FSDPLinear then, it has two hooks, and its weight
is a DTensor of which a rank holds 2 rows or 1. In the end it is a Linear again, without hooks, whose weight is on meta
or, after `filled`, has all 3 rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from .restore import contents, put_back, replace_tensors_
from .trace import persistent_buffers


class Undivided:
    """The user's own model, to be made plain again.

    FSDP2 and DeepSpeed change the classes, hooks and parameters of its modules. All of these are put back.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._classes = {module: type(module) for module in model.modules()}
        kept = contents(model)
        self._empty: dict[int, nn.Parameter] = {}  # id of a parameter -> the same without values
        # The copies of the containers would keep the weights alive beside the shards: they hold empty ones instead.
        for _, before in kept.containers:
            if isinstance(before, dict):
                for key, value in list(before.items()):
                    if isinstance(value, nn.Parameter):
                        before[key] = self._emptied(value)
        self._kept = kept._replace(states=[])

    def _emptied(self, parameter: nn.Parameter) -> nn.Parameter:
        """The parameter without values; the same one for all places where it is tied."""
        if id(parameter) not in self._empty:
            without_values = parameter.detach().to("meta")
            self._empty[id(parameter)] = nn.Parameter(without_values, parameter.requires_grad)
        return self._empty[id(parameter)]

    def _put_back(self) -> None:
        """Makes the model plain, with empty parameters."""
        put_back(self._kept)
        for module, cls in self._classes.items():
            module.__class__ = cls

    def filled(self, whole: Mapping[str, torch.Tensor]) -> nn.Module:
        """Makes the model plain and whole, on the CPU of every rank, and in the dtypes that it had.

        Args:
            whole: its parameters and persistent buffers, by name.
        """
        model = self._model
        training = model.training
        self._put_back()
        new: dict[int, torch.Tensor] = {}  # id of an empty parameter or a buffer -> what takes its place
        for name, tensor in [*model.named_parameters(), *persistent_buffers(model).items()]:
            value = whole[name].to(tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                value = nn.Parameter(value, tensor.requires_grad)
            new[id(tensor)] = value
        replace_tensors_(contents(model), new)
        return model.train(training)
