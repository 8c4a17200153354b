"""An optimizer goes on with a model that was cut: its groups get the new parameters, and its state is cut like them.

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
from .cut import Positions, without_positions

Params = Mapping[str, nn.Parameter]  # by name
Optimizer = torch.optim.Optimizer
KNOWN_ATTRIBUTES = ("param_groups", "state", "defaults")  # those of every optimizer
MAX_DEVIATION = 0.01  # of the move of a parameter, relative: more than rounding


def why_uncuttable(optimizer: Optimizer) -> str | None:
    """Why an optimizer can't go on with smaller parameters, in words; None: it can."""
    name = type(optimizer).__name__
    for attribute, value in vars(optimizer).items():
        if attribute not in KNOWN_ATTRIBUTES and _has_tensors(value):
            return f"{name} keeps tensors of its own, as {attribute}"
    for p, state in optimizer.state.items():
        for key, value in state.items():
            if not _follows(value, p):
                return f"{key} of {name} doesn't have the shape of its parameter"
    try:
        for sample in _samples(optimizer):
            if not _moves_by_entries(sample):
                return f"a step of {name} depends on the shape of a parameter"
    except Exception as error:  # an optimizer of any kind may raise anything
        raise_if_out_of_memory(error)
        return f"{name} can't be tried on one parameter ({type(error).__name__}: {error})"
    return None


def why_unflattenable(optimizer: Optimizer) -> str | None:
    """Why an optimizer can't step parts of flattened parameters instead of whole ones, in words; None: it can."""
    name = type(optimizer).__name__
    if optimizer.state:
        return f"{name} has made its state for whole parameters"
    why = why_uncuttable(optimizer)
    if why is None and not all(_moves_when_flat(sample) for sample in _samples(optimizer)):
        why = f"a step of {name} depends on the shape of a parameter"
    return why


class _Sample(NamedTuple):
    """A parameter of an optimizer, and one of its dimensions."""

    optimizer: Optimizer
    group: dict[str, Any]
    param: Tensor
    dim: int

    def moved(self, changed: Callable[[Tensor], Tensor]) -> Tensor:
        """The parameter after one step. A copy of the optimizer makes the step and trains this parameter alone.

        Args:
            changed: a function that zeroes or cuts the parameter, its gradient and its state before the step.
        """
        param = self.param.detach()
        p = nn.Parameter(changed(param))
        generator = torch.Generator().manual_seed(0)  # every call gets the same gradient
        gradient = torch.randn(param.shape, generator=generator)
        gradient = gradient.to(p.device, p.dtype)
        p.grad = changed(gradient)
        twin = self._twin()
        group = self.group | {"params": [p]}
        twin.param_groups = [group]
        state = self._changed_state(changed)
        twin.state = defaultdict(dict, {p: state})
        Optimizer.__setstate__(twin, {})  # makes the hooks, of which there are none
        devices = [p.device] if p.is_cuda else []
        with torch.random.fork_rng(devices):
            twin.step()
        return p.detach()

    def _changed_state(self, changed: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """A copy of the parameter's state, in which every tensor of the parameter's shape is changed."""
        changed_state = {}
        state = self.optimizer.state.get(self.param, {})
        for key, value in state.items():
            if not isinstance(value, Tensor):
                value = copy.copy(value)
            elif value.shape == self.param.shape:
                value = changed(value)
            else:
                value = value.clone()
            changed_state[key] = value
        return changed_state

    def _twin(self) -> Optimizer:
        """An optimizer of the same class and with the same settings, whose step leaves the optimizer as it is."""
        cls = type(self.optimizer)
        twin = object.__new__(cls)
        for name, value in vars(self.optimizer).items():
            # hooks, and the `step` that a scheduler puts on the instance, are meant for the optimizer itself
            if name == "step" or name.startswith("_optimizer_"):
                continue
            is_container = isinstance(value, (dict, list, set))
            vars(twin)[name] = copy.copy(value) if is_container else value
        return twin


def _samples(optimizer: Optimizer) -> Iterator[_Sample]:
    """Of every group the smallest vector, the smallest matrix, ..., once with every dimension that may be cut."""
    for group in optimizer.param_groups:
        smallest: dict[int, Tensor] = {}  # number of dimensions -> parameter
        params_by_size = sorted(group["params"], key=torch.numel)
        for p in params_by_size:
            num_dims = p.dim()
            if num_dims and min(p.shape[:2]) > 1:  # one position alone has nothing that could be cut beside it
                smallest.setdefault(num_dims, p)
        for num_dims, p in smallest.items():
            # weights are cut along their rows and columns only
            for dim in range(min(2, num_dims)):
                yield _Sample(optimizer, group, p, dim)


def _moves_by_entries(sample: _Sample) -> bool:
    """Whether a parameter that was cut moves as the same entries move in the full parameter, beside zeros.

    The test leaves one position. The moves differ where an optimizer scales its steps by a function of the shape, or
    by a mean over all entries.
    """
    dim = sample.dim

    def zeroed(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        num_zero = tensor.shape[dim] - 1
        tensor.narrow(dim, 1, num_zero).zero_()
        return tensor

    def cut(tensor: Tensor) -> Tensor:
        return tensor.narrow(dim, 0, 1).clone()

    before = cut(sample.param.detach())
    full_after = sample.moved(zeroed)
    cut_after = sample.moved(cut)
    move = cut(full_after) - before
    move_of_cut = cut_after - before
    deviation = (move - move_of_cut).norm()
    return bool(deviation <= MAX_DEVIATION * move.norm())


def _moves_when_flat(sample: _Sample) -> bool:
    """Whether half of a flattened parameter moves as it moves in the whole parameter."""

    def half(tensor: Tensor) -> Tensor:
        flat = tensor.flatten()
        return flat[: len(flat) // 2].clone()

    before = half(sample.param.detach())
    move = half(sample.moved(torch.clone)) - before
    move_of_half = sample.moved(half) - before
    return bool((move - move_of_half).norm() <= MAX_DEVIATION * move.norm())


def _has_tensors(value: Any) -> bool:
    if isinstance(value, (Optimizer, nn.Module)):
        return True
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple, set)):
        return any(_has_tensors(item) for item in value)
    return isinstance(value, Tensor)


def _follows(value: Any, p: Tensor) -> bool:
    """Whether a value of a parameter's state can be cut like the parameter, or needs no cut."""
    if not isinstance(value, Tensor):
        return not _has_tensors(value)
    # a tensor of a subclass may pack several entries into one, which can't be cut apart
    is_ordinary = type(value) in (Tensor, nn.Parameter)
    has_same_shape = value.shape == p.shape
    is_scalar = value.numel() == 1
    return is_ordinary and (has_same_shape or is_scalar)


def cut_state_(optimizer: Optimizer, params: Params, positions: Positions) -> None:
    """Puts the parameters of a model that was cut in the place of the old ones, and cuts their state.

    Args:
        optimizer: an optimizer that `why_uncuttable` has nothing against; its groups have names.
        params: the new parameters; a parameter whose name is not among them stays.
        positions: the positions of the old parameters that were cut out.
    """
    for group in optimizer.param_groups:
        group_params = group["params"]
        for i, name in enumerate(group["param_names"]):
            old = group_params[i]
            new = params.get(name, old)
            if new is old:
                continue
            gone_of_dims = positions.get(name, {})
            state = optimizer.state.pop(old, {})
            for key, value in state.items():
                # a step count, say, has another shape and stays
                if isinstance(value, Tensor) and value.shape == old.shape:
                    state[key] = without_positions(value, gone_of_dims)
            group_params[i] = new
            if state:
                optimizer.state[new] = state


def replace_parameters_(optimizer: Optimizer, params: Params) -> None:
    """Puts other parameters in the place of those of the same names. The state of the old ones is dropped."""
    for group in optimizer.param_groups:
        group_params = group["params"]
        for i, name in enumerate(group["param_names"]):
            old = group_params[i]
            new = params.get(name, old)
            if new is not old:
                optimizer.state.pop(old, None)
                group_params[i] = new
