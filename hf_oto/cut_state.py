"""An optimizer goes on with a model that was cut: new parameters in its groups, and its state cut as they are.

The optimizer stays the same object, because schedulers, scalers and accelerate hold it.

Worked example: AdamW has exp_avg and exp_avg_sq of the shape of a weight, (8, 3), and a step of one element. When rows
1 and 4 of the weight are cut out, both averages lose the same rows, and the step stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

Kept = Mapping[str, Mapping[int, Tensor]]  # parameter -> dimension -> the positions that stay, (n,), on the CPU


def why_uncuttable(optimizer: torch.optim.Optimizer) -> str | None:
    """Why an optimizer can't go on with smaller parameters, in words; None: it can."""
    name = type(optimizer).__name__
    known = ("param_groups", "state", "defaults")
    for attribute, value in vars(optimizer).items():
        if attribute not in known and _has_tensors(value):
            return f"{name} keeps tensors of its own, as {attribute}"
    for p, state in optimizer.state.items():
        for key, value in state.items():
            if not _follows(value, p):
                return f"{key} of {name} doesn't have the shape of its parameter"
    return None


def _has_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple, set)):
        return any(_has_tensors(item) for item in value)
    return isinstance(value, Tensor)


def _follows(value: Any, p: Tensor) -> bool:
    """Whether a value of a parameter's state can be cut as the parameter is, or needs no cut."""
    if not isinstance(value, Tensor):
        return not _has_tensors(value)
    is_ordinary = type(value) in (Tensor, nn.Parameter)
    return is_ordinary and (value.shape == p.shape or value.numel() == 1)


def cut_state_(optimizer: torch.optim.Optimizer, params: Mapping[str, nn.Parameter], kept: Kept) -> None:
    """Puts the parameters of a model that was cut in the place of the old ones, and cuts their state.

    Args:
        optimizer: one that `why_uncuttable` has nothing against; its groups have names.
        params: the new parameters by name; a parameter of another name stays.
        kept: what was left of the old ones.
    """
    for group in optimizer.param_groups:
        for i, name in enumerate(group["param_names"]):
            old = group["params"][i]
            new = params.get(name, old)
            if new is old:
                continue
            state = optimizer.state.pop(old, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == old.shape:
                    state[key] = only_kept(value, kept.get(name, {}))
            group["params"][i] = new
            if state:
                optimizer.state[new] = state


def replace_parameters_(optimizer: torch.optim.Optimizer, params: Mapping[str, nn.Parameter]) -> None:
    """Puts other parameters in the place of those of the same names, whose state is dropped."""
    for group in optimizer.param_groups:
        for i, name in enumerate(group["param_names"]):
            old = group["params"][i]
            if params.get(name, old) is not old:
                optimizer.state.pop(old, None)
                group["params"][i] = params[name]


def only_kept(tensor: Tensor, kept_of_dims: Mapping[int, Tensor]) -> Tensor:
    """The positions of a tensor that stay."""
    for dim, kept in kept_of_dims.items():
        tensor = tensor.index_select(dim, kept.to(tensor.device))
    return tensor
