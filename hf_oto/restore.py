"""A model as it was: everything its modules keep is remembered, and put back bit by bit, whatever was raised.

Stands under the trace, the rehearsal, the certificate and the measurements. Each of them changes a model for a moment
(its mode, its weights, its sizes, whatever its forward keeps), and `restored` is the one undo for all of that: nobody
copies the user's model.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import random
import signal
import sys
import threading
import types
import warnings
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

# these very types: what a subclass does when it is written to is its own affair
CONTAINERS = (dict, OrderedDict, defaultdict, list, deque, set)
NO_OBJECTS = (nn.Module, torch.Tensor, type, enum.Enum, types.ModuleType, types.FunctionType, types.MethodType)
DEPTH = 3  # of containers and objects inside a module's own: beyond may lie data sets, trainers, the world


class Contents(NamedTuple):
    """What a model's modules keep: every container with a shallow copy, and what lives in C++ as (setter, value)."""

    containers: list[tuple[Any, Any]]
    states: list[tuple[Callable[[Any], Any], Any]]


def contents(model: nn.Module, *owners: Any) -> Contents:
    """Remembers what the modules of a model keep; tensors are not copied.

    Args:
        owners: other objects, whose own attributes are remembered too, with the containers in them.
    """
    containers, generators = _kept_by(model, owners)
    states = [_generator_state(generator) for generator in generators]
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            states.append((functools.partial(setattr, module, "training"), module.training))
    return Contents([(container, container.copy()) for container in containers], states)


def _kept_by(model: nn.Module, owners: Sequence[Any] = ()) -> tuple[list[Any], list[Any]]:
    """Every container and every random generator that the modules keep, in their own attributes or deeper."""
    roots = [(vars(owner), False) for owner in owners] + [(vars(module), True) for module in model.modules()]
    containers, generators, seen = [], [], set()
    # A stack, no recursion: a closure that calls itself lives until the garbage collector comes, and tensors with it.
    waiting = [(container, DEPTH, objects) for container, objects in roots]
    while waiting:
        container, depth, objects = waiting.pop()
        if id(container) in seen:
            continue
        seen.add(id(container))
        containers.append(container)
        if depth == 0 or not isinstance(container, dict):  # lists are not entered: a data set may be one
            continue
        for value in container.values():
            kind = _kind(type(value))
            if kind == "container":
                waiting.append((value, depth - 1, objects))
            elif kind == "object" and objects and type(vars(value)) in CONTAINERS:
                waiting.append((vars(value), depth - 1, True))
            elif kind == "generator" and id(value) not in seen:
                seen.add(id(value))
                generators.append(value)
    return containers, generators


@functools.lru_cache(4096)
def _kind(cls: type) -> str:
    """What the values of a type are to us: asked of tens of thousands of values, and of few types."""
    if cls in CONTAINERS:
        return "container"
    if issubclass(cls, (torch.Generator, np.random.Generator, random.Random)):
        return "generator"
    return "object" if cls.__dictoffset__ and not issubclass(cls, NO_OBJECTS) else "other"


def put_back(kept: Contents) -> None:
    """Makes every container what it was, the same objects in the same order: that of parameters is that of
    `state_dict` and of the optimizer."""
    with uninterrupted():
        for container, before in kept.containers:
            if _is_same(container, before):
                continue
            container.clear()
            if isinstance(container, (dict, set)):
                container.update(before)
            else:
                container.extend(before)
        for restore, state in kept.states:
            restore(state)


@contextlib.contextmanager
def restored(model: nn.Module, *owners: Any) -> Iterator[Contents]:
    """While open, anything may be done to what the model's modules keep, and to the attributes of other objects; in
    the end all of it is as it was."""
    kept = contents(model, *owners)
    try:
        yield kept
    finally:
        put_back(kept)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """While open, Ctrl-C waits: what is being put back is put back whole."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals arrive in the main thread only
        return
    waiting: list[tuple[Any, ...]] = []
    handler = signal.signal(signal.SIGINT, lambda *given: waiting.append(given))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler or signal.SIG_DFL)
    if waiting and callable(handler):
        handler(*waiting[0])


class Place(NamedTuple):
    """Where a module keeps a tensor: `container[key]`, or there at this position of a tuple."""

    container: Any
    key: Any
    position: int | None

    def put(self, tensor: torch.Tensor) -> None:
        """Puts another tensor there."""
        if self.position is None:
            self.container[self.key] = tensor
            return
        whole = self.container[self.key]
        items = [*whole[: self.position], tensor, *whole[self.position + 1 :]]
        self.container[self.key] = type(whole)(*items) if hasattr(whole, "_fields") else tuple(items)


def places(model: nn.Module) -> dict[int, list[Place]]:
    """Where the modules keep every tensor, by its id: as parameter or buffer, under one name or several, as an
    attribute, in a list (the flat weights of recurrent layers)."""
    return _places(_kept_by(model)[0])


def _places(containers: Iterable[Any]) -> dict[int, list[Place]]:
    found: dict[int, list[Place]] = {}
    for container in containers:
        if isinstance(container, set):
            continue
        for key, value in container.items() if isinstance(container, dict) else enumerate(container):
            if _is_tensor(type(value)):
                found.setdefault(id(value), []).append(Place(container, key, None))
            elif isinstance(value, tuple):
                for position, inner in enumerate(value):
                    if _is_tensor(type(inner)):
                        found.setdefault(id(inner), []).append(Place(container, key, position))
    return found


@functools.lru_cache(4096)
def _is_tensor(cls: type) -> bool:
    return issubclass(cls, torch.Tensor)


def replace_tensors_(kept: Contents, new: Mapping[int, torch.Tensor]) -> None:
    """Puts new tensors in the place of old ones, wherever the modules keep these.

    Args:
        kept: the contents of the model.
        new: id of the old tensor -> the new one. The old ones must be alive.
    """
    for old, somewhere in _places(container for container, _ in kept.containers).items():
        for place in somewhere if old in new else ():
            place.put(new[old])


@contextlib.contextmanager
def evaluating(
    model: nn.Module, training: bool = False, weights: Mapping[int, torch.Tensor] | None = None
) -> Iterator[None]:
    """While open, the model is in eval mode, or in train mode without dropout; eager, and without gradients.

    Whatever a forward changes (what modules keep, buffers, random states) is undone in the end.

    Args:
        weights: other tensors to run with, as in `replace_tensors_`. None: its own, of which the forward gets copies
            of all that it might write to.
    """
    with contextlib.ExitStack() as stack:
        kept = stack.enter_context(restored(model))
        stack.enter_context(random_states_kept(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_eager())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # what a forward has to warn of, training will say
        replace_tensors_(kept, _writable(kept) if weights is None else weights)
        if training:
            stack.enter_context(_WithoutDropout())
        enter_mode_(model, training)
        yield


def enter_mode_(model: nn.Module, training: bool) -> None:
    """Eval or train mode, entered from the other one: that is when modules renew what they computed from weights."""
    model.train(not training)
    model.train(training)


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


def renew_caches_(model: nn.Module) -> None:
    """Lets every module renew what it computed from its weights, as it does when its mode changes."""
    modes = {module: module.training for module in model.modules()}
    enter_mode_(model, model.training)
    for module, training in modes.items():  # modules in one model may be in different modes
        if module.training != training:
            module.training = training


def _is_same(container: Any, before: Any) -> bool:
    if len(container) != len(before):
        return False
    if not before:
        return True
    if isinstance(container, dict):
        pairs: Iterable[tuple[Any, Any]] = zip(container.items(), before.items(), strict=True)
        return all(a[0] is b[0] and a[1] is b[1] for a, b in pairs)
    if isinstance(container, set):
        return container == before
    return all(a is b for a, b in zip(container, before, strict=True))


def _writable(kept: Contents) -> dict[int, torch.Tensor]:
    """A copy of every tensor that the modules keep and that is no parameter: statistics, caches, observers."""
    found: dict[int, torch.Tensor] = {}
    for container, _ in kept.containers:
        for value in container.values() if isinstance(container, dict) else container:
            if _is_tensor(type(value)) and not isinstance(value, nn.Parameter) and id(value) not in found:
                found[id(value)] = value.detach().clone()
    return found


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


def _device_state(device: torch.device) -> torch.Tensor:
    module = torch.get_device_module(device)
    return module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)


def _generator_state(generator: Any) -> tuple[Callable[[Any], Any], Any]:
    if isinstance(generator, torch.Generator):
        return generator.set_state, generator.get_state()
    if isinstance(generator, random.Random):
        return generator.setstate, generator.getstate()
    bits = generator.bit_generator
    return functools.partial(setattr, bits, "state"), bits.state
