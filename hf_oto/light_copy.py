"""A copy of a model that shares its parameters with the model, so that both can run in turn.

Pruning without training runs the dense and the cut model side by side, which one model object can't do. Elsewhere
nothing copies the user's model.

Worked example: a light copy of Linear(3, 8), ReLU, Linear(8, 2) has modules of its own, and takes no memory. Once it
is cut to 4 units, it has weights of its own, of shapes (4, 3) and (2, 4). The model still has all of its.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from .modeling_oto import OTOError, named_tensors
from .restore import contents, places


def light_copy(model: nn.Module) -> nn.Module:
    """A copy of a model that shares its parameters. Buffers are its own, because a forward may write to them.

    Raises:
        OTOError: the model keeps something that can't be copied, or that leads from the copy back to the model.
    """
    # deepcopy takes what is in its memo for copied already
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    ids_of_buffers = {id(buffer) for buffer in model.buffers()}
    for container, _ in contents(model).containers:
        values = container.values() if isinstance(container, dict) else container
        for value in values:
            if isinstance(value, Tensor) and id(value) not in ids_of_buffers:
                memo[id(value)] = value
    try:
        copied = copy.deepcopy(model, memo)
    except (TypeError, RuntimeError) as error:
        name = type(model).__name__
        raise OTOError(
            f"{name} can't be copied: {error}; take what can't be off the model while it is pruned"
        ) from error
    _refuse_ways_back(copied, model)
    return copied


def _refuse_ways_back(copied: nn.Module, model: nn.Module) -> None:
    """Raises OTOError where a copy still leads to the model: functions are not copied with what they close over."""
    path_of_attributes = {id(vars(module)): path for path, module in model.named_modules()}
    for container, _ in contents(copied).containers:
        if id(container) in path_of_attributes:
            name = type(model).__name__
            path = path_of_attributes[id(container)] or "the model itself"
            raise OTOError(
                f"a hook, or a forward that was put in the place of another, leads to {path} in {name}, and would in "
                "its copy: take it off while the model is pruned"
            )


def unshare_(copied: nn.Module, model: nn.Module, names: Iterable[str]) -> None:
    """Gives a `light_copy` tensors of its own where it still shares these with the model."""
    tensors_of_model = named_tensors(model)
    tensors_of_copy = named_tensors(copied)
    places_of_id = places(copied)
    for name in names:
        shared = tensors_of_copy[name]
        if shared is not tensors_of_model[name]:
            continue
        own = shared.detach().clone()
        if isinstance(shared, nn.Parameter):
            own = nn.Parameter(own, shared.requires_grad)
        for place in places_of_id[id(shared)]:
            place.put(own)
