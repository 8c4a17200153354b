"""A model as it was before FSDP2 or DeepSpeed divided its parameters among the ranks, without its weights.

Worked example: a Linear(2, 3) is divided among 2 ranks. Its class is FSDPLinear then, it has two hooks, and its weight
is a DTensor of which a rank holds 2 rows or 1. In the end it is a Linear again, without hooks, whose weight is on meta
or, after `filled`, has all 3 rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .restore import ATOMS, contents, places_in, put_back, replace_tensors_
from .trace import persistent_buffers

Tensors = Mapping[str, Tensor]  # by name


class Undivided:
    """The user's own model, to be made plain again.

    FSDP2 and DeepSpeed change the classes, hooks and parameters of its modules. All of these are put back. Plain
    values that training has written (a counter, a temperature) stay.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._classes = {module: type(module) for module in model.modules()}
        kept = contents(model)
        # The copies of the containers would keep the weights alive beside the shards: they hold empty ones instead.
        places_of_id = places_in(before for _, before in kept.containers)
        for parameter in model.parameters():
            empty = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
            # several where it is tied, or where a layer lists its weights; none in a scripted module
            for place in places_of_id.get(id(parameter), ()):
                place.put(empty)
        self._kept = kept._replace(states=[])

    def _put_back(self) -> None:
        """Makes the model plain, with empty parameters and the buffers from before."""
        others = vars(nn.Module()).keys() - {"training"}  # whoever divides the model writes to these
        written = []
        for module in self._classes:
            for name, value in vars(module).items():
                if type(value) in ATOMS and name not in others:
                    written.append((vars(module), name, value))
        put_back(self._kept)
        for attributes, name, value in written:
            if name in attributes and type(attributes[name]) in ATOMS:
                attributes[name] = value
        for module, cls in self._classes.items():
            module.__class__ = cls

    def filled(self, parameters: Tensors, buffers: Tensors) -> nn.Module:
        """Makes the model plain and whole, on the CPU of every rank, and in the dtypes that it had.

        Args:
            parameters: all of them, by name.
            buffers: the persistent ones.
        """
        model = self._model
        self._put_back()
        new: dict[int, Tensor] = {}  # id of an empty parameter or a buffer -> what takes its place
        for name, p in model.named_parameters():
            new[id(p)] = nn.Parameter(parameters[name].to(p.dtype), p.requires_grad)
        self._put_in(new, buffers, torch.device("cpu"))
        return model

    def _put_in(self, new: dict[int, Tensor], buffers: Tensors, device: torch.device) -> None:
        """Puts new tensors in the place of others, as `replace_tensors_` does, and buffers as training left them."""
        for name, buffer in persistent_buffers(self._model).items():
            new[id(buffer)] = buffers[name].to(device, buffer.dtype)
        replace_tensors_(contents(self._model), new)
