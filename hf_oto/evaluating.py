"""How a model runs while it is looked at: in a mode, eager, without dropout and gradients, and nothing of it remains.

Stands on restore.py, which undoes what modules keep; here are the mode, the weights that a forward writes to, and the
random states.
"""

from __future__ import annotations

import contextlib
import random
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .restore import Contents, is_tensor, replace_tensors_, restored, uninterrupted
from .wide import is_foreign


@contextlib.contextmanager
def evaluating(
    model: nn.Module, training: bool = False, weights: Mapping[int, torch.Tensor] | None = None
) -> Iterator[None]:
    """While open, the model is in eval mode, or in train mode without dropout; eager, and without gradients.

    Whatever a forward changes (what modules keep, buffers, random states) is undone in the end.

    Args:
        weights: other tensors to run with, as in `replace_tensors_`. None: its own. Of what is no parameter, and not
            among them, the forward gets copies, since it might write to it.
    """
    with contextlib.ExitStack() as stack:
        kept = stack.enter_context(restored(model))
        stack.enter_context(random_states_kept(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_eager())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # what a forward has to warn of, training will say
        # what is no weight is a copy among fakes, too: there a write of a number into a tensor is carried out
        replace_tensors_(kept, _writable(kept) | dict(weights or {}))
        if training:
            stack.enter_context(_WithoutDropout())
        enter_mode_(model, training)
        yield


def _writable(kept: Contents) -> dict[int, torch.Tensor]:
    """A copy of every tensor that the modules keep and that is no parameter: statistics, caches, observers."""
    found: dict[int, torch.Tensor] = {}
    for container, _ in kept.containers:
        for value in container.values() if isinstance(container, dict) else container:
            if is_tensor(type(value)) and not isinstance(value, nn.Parameter) and id(value) not in found:
                found[id(value)] = value.detach().clone()
    return found


def enter_mode_(model: nn.Module, training: bool) -> None:
    """Eval or train mode, entered from the other one: that is when modules renew what they computed from weights."""
    model.train(not training)
    model.train(training)


def renew_caches_(model: nn.Module) -> None:
    """Lets every module renew what it computed from its weights, as it does when its mode changes."""
    modes = {module: module.training for module in model.modules()}
    enter_mode_(model, model.training)
    for module, training in modes.items():  # modules in one model may be in different modes: outer ones come first
        if module.training != training:
            module.train(training)
    for module, training in modes.items():  # a `train` of its own may have refused
        if module.training != training:
            module.training = training


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    """No compiled code and no fused path of inference: a trace would not see inside."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    # Importing dynamo takes seconds; where nobody has it, and no flex attention that will, nothing is compiled.
    compiled = {"torch._dynamo", "torch.nn.attention.flex_attention"} & sys.modules.keys()
    stance = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    try:
        with stance:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


DROPOUT = {  # functions that drop values at random while training -> where their probability stands
    **dict.fromkeys(
        ["dropout", "dropout_", "alpha_dropout", "alpha_dropout_", "feature_dropout", "feature_dropout_",
         "feature_alpha_dropout", "feature_alpha_dropout_", "dropout1d", "dropout2d", "dropout3d"],
        (1, "p"),
    ),
    "scaled_dot_product_attention": (4, "dropout_p"),
    "multi_head_attention_forward": (10, "dropout_p"),
}  # fmt: skip


class _WithoutDropout(TorchFunctionMode):
    """While open, train mode drops nothing, neither values nor (by a random number and a branch) whole layers."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        name, kwargs = func.__name__, kwargs or {}
        if name in DROPOUT:
            position, keyword = DROPOUT[name]
            given = len(args) > position
            args = (*args[:position], 0.0, *args[position + 1 :]) if given else args
            kwargs = kwargs if given else kwargs | {keyword: 0.0}
        out = func(*args, **kwargs)
        if name == "rand" and out.dim() == 0:
            # a constant, which FakeTensors can branch on
            return torch.tensor(1.0, dtype=out.dtype, device=out.device)
        return out


class WeightsKept(TorchDispatchMode):
    """While open, a forward may write into the model's weights (an embedding that shortens its rows does): in the end
    they are as they were. What is written is copied at that moment, and nothing else.

    Beside `evaluating`, which swaps what modules keep and can't see this; it costs microseconds per operation.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._weights = {p.untyped_storage()._cdata: p for p in model.parameters() if _has_storage(p)}
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.OpOverload) and func._schema.is_mutable:
            given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
            for argument in func._schema.arguments:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._keep(given.get(argument.name))
        return func(*args, **kwargs)

    def _keep(self, tensor: Any) -> None:
        if isinstance(tensor, (list, tuple)):
            for one in tensor:
                self._keep(one)
        elif isinstance(tensor, torch.Tensor) and _has_storage(tensor):
            weight = self._weights.pop(tensor.untyped_storage()._cdata, None)
            if weight is not None:
                self._kept.append((weight.data, weight.detach().clone()))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        with uninterrupted():
            for weight, before in self._kept:
                weight.copy_(before)


def _has_storage(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and not is_foreign(tensor)


@contextlib.contextmanager
def random_states_kept(model: nn.Module) -> Iterator[None]:
    """While open, numbers may be drawn: Python, numpy, torch and the model's own devices go on where they were."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = {t.device for t in [*model.parameters(), *model.buffers()]}
    states = [(device, _device_state(device)) for device in devices if device.type not in ("cpu", "meta")]
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for device, state in states:
            module = torch.get_device_module(device)
            module.set_rng_state(state) if device.type == "mps" else module.set_rng_state(state, device)


def seed_everything() -> None:
    """The same random numbers from here on, whoever draws them: torch, numpy and Python."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def _device_state(device: torch.device) -> torch.Tensor:
    module = torch.get_device_module(device)
    return module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)
