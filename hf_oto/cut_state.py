"""An optimizer goes on with a model that was cut: new parameters in its groups, and its state cut as they are.

The optimizer stays the same object, because schedulers, scalers and accelerate hold it.

Worked example: AdamW has exp_avg and exp_avg_sq of the shape of a weight, (8, 3), and a step of one element. When rows
1 and 4 of the weight are cut out, both averages lose the same rows, and the step stays.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .calls import raise_if_out_of_memory

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
    try:
        if not all(map(_moves_by_entries, _samples(optimizer))):
            return f"a step of {name} depends on the shape of a parameter"
    except Exception as error:  # an optimizer of any kind may raise anything
        raise_if_out_of_memory(error)
        return f"{name} can't be tried on one parameter ({type(error).__name__}: {error})"
    return None


class _Sample(NamedTuple):
    """A parameter of an optimizer, and one of its dimensions."""

    optimizer: torch.optim.Optimizer
    group: dict[str, Any]
    param: Tensor
    dim: int

    def moved(self, changed: Callable[[Tensor], Tensor]) -> Tensor:
        """The parameter after a step of a copy of the optimizer, which trains it alone.

        Args:
            changed: what is done to the parameter, its gradient and its state before.
        """
        p = nn.Parameter(changed(self.param.detach()))
        generator = torch.Generator().manual_seed(0)
        gradient = torch.randn(self.param.shape, generator=generator)
        p.grad = changed(gradient.to(p.device, p.dtype))
        state = {}
        for key, value in self.optimizer.state.get(self.param, {}).items():
            if isinstance(value, Tensor):
                state[key] = changed(value) if value.shape == self.param.shape else value.clone()
            else:
                state[key] = copy.copy(value)
        twin = object.__new__(type(self.optimizer))
        for name, value in vars(self.optimizer).items():
            # hooks, and the `step` that a scheduler puts on the instance, are meant for the optimizer itself
            if name != "step" and not name.startswith("_optimizer_"):
                vars(twin)[name] = copy.copy(value) if isinstance(value, (dict, list, set)) else value
        twin.param_groups = [{**self.group, "params": [p]}]
        twin.state = defaultdict(dict, {p: state})
        torch.optim.Optimizer.__setstate__(twin, {})  # makes the hooks, of which there are none
        devices = [p.device] if p.is_cuda else []
        with torch.random.fork_rng(devices):
            twin.step()
        return p.detach()


def _samples(optimizer: torch.optim.Optimizer) -> Iterator[_Sample]:
    """Of every group the smallest vector, the smallest matrix, ..., once with every dimension that may be cut."""
    for group in optimizer.param_groups:
        smallest: dict[int, Tensor] = {}
        for p in sorted(group["params"], key=torch.numel):
            if p.dim() and min(p.shape[:2]) > 1:
                smallest.setdefault(p.dim(), p)
        for p in smallest.values():
            for dim in range(min(2, p.dim())):
                yield _Sample(optimizer, group, p, dim)


def _moves_by_entries(sample: _Sample) -> bool:
    """Whether what is left of a parameter moves as it would have moved beside zeros, here a single position.

    An optimizer that scales its steps by a function of the shape, or by the mean over all entries, moves it otherwise.
    """

    def zeroed(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.narrow(sample.dim, 1, tensor.shape[sample.dim] - 1).zero_()
        return tensor

    def cut(tensor: Tensor) -> Tensor:
        return tensor.narrow(sample.dim, 0, 1).clone()

    before = cut(sample.param.detach())
    move = cut(sample.moved(zeroed)) - before
    move_of_cut = sample.moved(cut) - before
    return bool((move - move_of_cut).norm() <= 0.01 * move.norm())  # rounding apart


def _has_tensors(value: Any) -> bool:
    if isinstance(value, (torch.optim.Optimizer, nn.Module)):
        return True
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
