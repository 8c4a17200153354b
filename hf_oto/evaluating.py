"""How a model runs while it is analysed: in one mode, eager, without dropout and gradients; in the end all is undone.

restore.py undoes what modules keep; here are the mode, the weights that a forward writes to, and the random states.
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
        weights: other tensors to run with, as in `replace_tensors_`. None: its own. Tensors that are no parameters,
            and not among `weights`, are copied, since the forward might write to them.
    """
    with contextlib.ExitStack() as stack:
        kept = stack.enter_context(restored(model))
        stack.enter_context(random_states_kept(model))
        # in inference mode the operations that a model is made of don't show
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_eager())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # training will repeat what a forward has to warn of
        # Copies are needed on FakeTensors too: there a number that is written into a real tensor really is written.
        replace_tensors_(kept, _writable_copies(kept) | dict(weights or {}))
        if training:
            stack.enter_context(_WithoutDropout())
        enter_mode_(model, training)
        yield


def _writable_copies(kept: Contents) -> dict[int, torch.Tensor]:
    """A copy of every tensor that the modules keep and that is no parameter, by its id: statistics, caches."""
    copies: dict[int, torch.Tensor] = {}
    for container, _ in kept.containers:
        for value in container.values() if isinstance(container, dict) else container:
            if is_tensor(type(value)) and not isinstance(value, nn.Parameter) and id(value) not in copies:
                copies[id(value)] = value.detach().clone()
    return copies


def enter_mode_(model: nn.Module, training: bool) -> None:
    """Eval or train mode, entered from the other one: that is when modules renew what they computed from weights."""
    model.train(not training)
    model.train(training)


def renew_caches_(model: nn.Module) -> None:
    """Lets every module renew what it computed from its weights, as it does when its mode changes."""
    modes = {module: module.training for module in model.modules()}
    enter_mode_(model, model.training)
    # Modules in one model may be in different modes. The outer ones come first, as `train` changes inner ones too.
    for module, training in modes.items():
        if module.training != training:
            module.train(training)
    for module, training in modes.items():  # a module's own `train` may have refused
        if module.training != training:
            module.training = training


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    """No compiled code and no fused path of inference: a trace would not see inside."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    # Importing dynamo takes seconds. Nothing is compiled where nobody has imported it, or flex attention, which will.
    may_compile = {"torch._dynamo", "torch.nn.attention.flex_attention"} & sys.modules.keys()
    stance = torch.compiler.set_stance("force_eager") if may_compile else contextlib.nullcontext()
    try:
        with stance:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def take_off_autocast_(model: nn.Module) -> None:
    """Puts back the forward that `accelerator.prepare` has wrapped for mixed precision, if it has.

    accelerate (1.15) keeps it as `_original_forward`. Its own undo takes off whatever names what it wraps: the
    decorators of the class's forward, and the forward that others have put in its place on this object.
    """
    original = vars(model).pop("_original_forward", None)
    if original is not None:
        vars(model).pop("forward", None)
        vars(model).pop("_is_accelerate_prepared", None)  # it would not be wrapped again
        if original != model.forward:  # not the class's own, which is there again
            model.forward = original


_P_SECOND = (
    "dropout", "dropout_", "alpha_dropout", "alpha_dropout_", "feature_dropout", "feature_dropout_",
    "feature_alpha_dropout", "feature_alpha_dropout_", "dropout1d", "dropout2d", "dropout3d",
)  # fmt: skip
DROPOUT = {  # functions that drop values at random while training -> (position, name) of their probability
    **dict.fromkeys(_P_SECOND, (1, "p")),
    "scaled_dot_product_attention": (4, "dropout_p"),
    "multi_head_attention_forward": (10, "dropout_p"),
}


class _WithoutDropout(TorchFunctionMode):
    """While open, train mode drops no values, and skips no layers as a random number would have it."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        if name in DROPOUT:
            position, keyword = DROPOUT[name]
            if len(args) > position:
                args = (*args[:position], 0.0, *args[position + 1 :])
            else:
                kwargs = kwargs | {keyword: 0.0}
        out = func(*args, **kwargs)
        if name == "rand" and out.dim() == 0:
            # One random number decides whether a layer is skipped. FakeTensors can branch on a constant.
            return torch.tensor(1.0, dtype=out.dtype, device=out.device)
        return out


class WeightsKept(TorchDispatchMode):
    """While open, a forward may write into the model's weights: in the end the weights are as they were.

    An embedding that shortens its rows does so. A weight is copied at the moment when it is first written to, and no
    other weight is. `evaluating`, which swaps what modules keep, can't see such writes. Watching for them costs
    microseconds per operation.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._unwritten = {p.untyped_storage()._cdata: p for p in model.parameters() if _has_storage(p)}
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []  # (weight, how it was)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.OpOverload) and func._schema.is_mutable:
            for position, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    written = args[position] if position < len(args) else kwargs.get(argument.name)
                    self._keep(written)
        return func(*args, **kwargs)

    def _keep(self, written: Any) -> None:
        """Copies the weight that a tensor is a view of, if it is one that was not written to before."""
        if isinstance(written, (list, tuple)):
            for tensor in written:
                self._keep(tensor)
        elif isinstance(written, torch.Tensor) and _has_storage(written):
            weight = self._unwritten.pop(written.untyped_storage()._cdata, None)
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
    """While open, random numbers may be drawn: in the end all generators go on where they were.

    These are the generators of Python, numpy, torch, the model's own devices, and the card that this process uses: the
    model of FSDP2 lies on the CPU until training begins, and training draws on the card.
    """
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    devices = {t.device for t in [*model.parameters(), *model.buffers()]}
    if torch.cuda.is_initialized():  # else no number can have been drawn there
        devices.add(torch.device("cuda", torch.cuda.current_device()))
    states = [(device, _device_state(device)) for device in devices if device.type not in ("cpu", "meta")]
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for device, state in states:
            module = torch.get_device_module(device)
            if device.type == "mps":  # there is one device only, and no argument for it
                module.set_rng_state(state)
            else:
                module.set_rng_state(state, device)


def seed_everything() -> None:
    """Seeds torch, numpy and Python, so that the same random numbers follow."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def _device_state(device: torch.device) -> torch.Tensor:
    module = torch.get_device_module(device)
    return module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)
