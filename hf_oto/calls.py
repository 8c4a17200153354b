"""The calls of a model's forward on which everything is found and proven: given, or recorded.

batches.py makes them from the config where neither is at hand.

A call is data, the arguments as they came. The trace, the rehearsal, the certificate and the measurements come later,
and can make the call as often as they like.

Worked example: the batch {"input_ids": ids} is Forward(kwargs={"input_ids": ids}), one call of the model itself, and
`Forward((pixels,), path="vision_tower")` is a call of a part of it.
"""

from __future__ import annotations

import contextlib
import copy
import enum
import functools
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_iter
from transformers import PreTrainedModel

from .modeling_oto import OTOError
from .restore import CALLABLES, held, slots_of

CopyTensor = Callable[[Tensor], Tensor]


class Forward(NamedTuple):
    """One call of a module's forward: its arguments, and the module by its path in the model ("" is the model).

    Attributes:
        home: the device where the model lay when the call was noted. Arguments that lay there, too, follow the model
            to other devices; others stay where they are (lengths of sequences on the CPU, say). None: all stay.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = types.MappingProxyType({})
    path: str = ""
    home: torch.device | None = None

    def run(self, model: nn.Module, tensor: CopyTensor = torch.clone) -> Any:
        """Makes the call with a copy of the arguments: forwards take keys out of them and write into them.

        Args:
            tensor: makes, from a tensor, what is passed in its place.
        """
        args, kwargs, path, _ = self.copy_for(model, tensor)
        module = model.get_submodule(path)
        return module(*args, **kwargs)

    def copy_for(self, model: nn.Module, tensor: CopyTensor = torch.clone) -> Forward:
        """A copy, to be passed to the model where it lies now; `tensor` as for `run`."""
        device = None if self.home is None else device_of(model)
        return self.copy_on(self.home if device is None else device, tensor)

    def copy_on(self, device: torch.device | None, tensor: CopyTensor = torch.clone) -> Forward:
        """A copy for a model that lies on a device, which is its new home; `tensor` as for `run`."""

        def placed(original: Tensor) -> Tensor:
            follows = device != self.home and original.device == self.home
            return tensor(original.to(device) if follows else original)

        args, kwargs = own_copy((self.args, dict(self.kwargs)), placed)
        return self._replace(args=args, kwargs=kwargs, home=device)


Call = Mapping[str, Any] | tuple[Any, ...] | Tensor | Forward  # named arguments, those by position, or one
Inputs = Call | Sequence[Call]  # one batch, or several calls in a list


def as_forwards(inputs: Inputs) -> list[Forward]:
    """The calls that inputs stand for: one batch is the arguments of one call, by name, or by position in a tuple.

    Raises:
        ValueError: `inputs` holds no call, or something that can't be the arguments of a call.

    Example:
        >>> as_forwards({"input_ids": [1, 2]})
        [Forward(args=(), kwargs={'input_ids': [1, 2]}, path='', home=None)]
    """
    calls = inputs if isinstance(inputs, list) else [inputs]
    forwards = [_as_forward(call) for call in calls]
    if not forwards:
        raise ValueError("inputs is empty: pass one batch, the keyword arguments of forward, or a list of such")
    for forward in forwards:
        for value in (*forward.args, *forward.kwargs.values()):
            if isinstance(value, Iterator):
                kind = type(value).__name__
                raise ValueError(f"inputs hold a {kind}, which can be read once only: pass a list")
    return forwards


def _as_forward(call: Call) -> Forward:
    if isinstance(call, Forward):
        return call
    if isinstance(call, Mapping):
        return Forward(kwargs=dict(call))
    if isinstance(call, Tensor):
        return Forward(args=(call,))
    if type(call) is tuple:  # a named tuple may be a batch of some loader, whose fields are no positions
        return Forward(args=call)
    kind = type(call).__name__
    raise ValueError(
        f"inputs hold a {kind}: pass the arguments of forward, a dict by name or a tuple by position, "
        "or a list of such for several calls"
    )


def device_of(model: nn.Module) -> torch.device | None:
    """The device of a model's parameters; None where they lie on several devices, on meta, or where there are none."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        return None
    (device,) = devices
    return None if device.type == "meta" else device


def at_home(forwards: Sequence[Forward], model: nn.Module) -> list[Forward]:
    """Calls that follow a model from where it lies now: FSDP2 takes it to a card only when training begins."""
    home = device_of(model)
    return [forward._replace(home=home) for forward in forwards]


def own_copy(value: Any, tensor: CopyTensor = torch.clone) -> Any:
    """A copy that shares nothing which a forward might change.

    Tensors, containers, and objects that hold tensors or containers (a cache, an encoded batch) are copied. Modules,
    and what can't be copied, are shared.

    Args:
        tensor: makes the copy of a tensor.
    """
    return _Copies(tensor).of(value)


NEVER_COPIED = (nn.Module, type, enum.Enum, types.ModuleType, types.FunctionType, types.MethodType)


class _Copies:
    """The copies that belong to one call of `own_copy`: an object that is met twice is copied once.

    This is a class, because a closure that calls itself lives until the garbage collector comes, with all its tensors.
    """

    def __init__(self, copy_tensor: CopyTensor) -> None:
        self._copy_tensor = copy_tensor
        self._copies: dict[int, Any] = {}  # id of the original -> its copy

    def of(self, value: Any) -> Any:
        """The copy of a value."""
        key = id(value)
        if key not in self._copies:
            self._copies[key] = self._copied(value)
        return self._copies[key]

    def _copied(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._copy_tensor(value.detach())
        if isinstance(value, torch.Generator):
            return value.clone_state()
        if isinstance(value, tuple):
            return self._tuple(value)
        if type(value) in (list, deque, set):
            return type(value)(self.of(item) for item in value)
        if isinstance(value, types.MappingProxyType):
            copies = {key: self.of(item) for key, item in value.items()}
            return types.MappingProxyType(copies)
        if isinstance(value, np.ndarray):
            return value.copy()
        if isinstance(value, NEVER_COPIED):
            return value
        holds_items = isinstance(value, (dict, list))
        if holds_items or hasattr(value, "__dict__") or slots_of(value):
            return self._object(value)
        return value

    def _tuple(self, value: tuple) -> tuple:
        items = [self.of(item) for item in value]
        if type(value) is tuple:
            return tuple(items)
        if hasattr(value, "_fields"):  # a named tuple, whose constructor takes the items one by one
            return type(value)._make(items)
        return type(value)(items)

    def _object(self, value: Any) -> Any:
        """A copy of an object and of all that it holds: attributes, slots, and the items of a list or dict."""
        try:
            twin = copy.copy(value)
        except Exception:  # an object that holds a lock or a stream, say, is shared
            return value
        if isinstance(value, list):
            twin[:] = [self.of(item) for item in value]
        elif isinstance(value, dict):
            for key, item in value.items():
                twin[key] = self.of(item)
        if hasattr(twin, "__dict__"):
            attributes = list(vars(twin).items())
            for name, item in attributes:
                object.__setattr__(twin, name, self.of(item))  # frozen dataclasses refuse setattr
        for slot, item in slots_of(value):
            slot.__set__(twin, self.of(item))
        return twin


@contextlib.contextmanager
def recorded(model: nn.Module) -> Iterator[list[Forward]]:
    """While open, notes the calls of the model's forward, as they come, in the list that it yields.

    Only an outermost call is noted, whichever module is called. If code goes past the model's own forward, the calls
    of the parts that the code uses are noted one by one.
    """
    forwards: list[Forward] = []
    running: list[nn.Module] = []

    def enter(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not running:
            # copied now, as the forward may write into its arguments
            forward = Forward(own_copy(args), own_copy(kwargs), path)
            forwards.append(forward)
        running.append(module)

    def leave(*_: Any) -> None:
        running.pop()

    with contextlib.ExitStack() as stack:
        for path, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):  # these take no such hooks
                continue
            note = functools.partial(enter, path)
            stack.enter_context(module.register_forward_pre_hook(note, prepend=True, with_kwargs=True))
            stack.enter_context(module.register_forward_hook(leave, always_call=True))
        yield forwards


CACHES = "transformers"  # the package whose objects that are no mapping are caches
HOLDS_NO_TENSOR = (int, float, str, bytes, nn.Module, type, enum.Enum, types.ModuleType)


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors of a model's output, in order, with those that objects in the output hold.

    Transformers' caches are no outputs.
    """
    tensors: list[Tensor] = []
    _collect(output, tensors, {})
    return tensors


def _collect(value: Any, tensors: list[Tensor], seen: dict[int, Any]) -> None:
    """Adds the tensors in a value to `tensors`.

    Args:
        seen: id -> object, of the objects that were entered. It keeps them alive, so that no id is used twice.
    """
    if isinstance(value, Tensor):
        tensors.append(value)
    elif isinstance(value, (list, tuple, deque)):
        for item in value:
            _collect(item, tensors, seen)
    elif isinstance(value, Mapping):
        for item in value.values():
            _collect(item, tensors, seen)
    elif value is None or isinstance(value, HOLDS_NO_TENSOR):
        return
    elif isinstance(value, CALLABLES):
        _collect(held(value), tensors, seen)
    elif id(value) not in seen and _package(value) != CACHES:
        seen[id(value)] = value
        attributes = getattr(value, "__dict__", {})
        _collect([*attributes.values()], tensors, seen)
        _collect([item for _, item in slots_of(value)], tensors, seen)


def _package(value: Any) -> str:
    """The package that has the class of an object."""
    package, _, _ = type(value).__module__.partition(".")
    return package


def described(forwards: Sequence[Forward]) -> str:
    """The calls in words: the shapes of their tensors."""
    calls = []
    for forward in forwards:
        named = {name: _shown(value) for name, value in forward.kwargs.items()}
        if forward.args:
            by_position = [_shown(value) for value in forward.args]
            calls.append(f"{forward.path} {by_position} {named}")
        else:
            calls.append(str(named))
    return "; ".join(calls)


def _shown(value: Any) -> Any:
    """An argument in an error message: a shape, a short value, or the name of a type."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, (int, float, str, type(None))):
        return value
    return type(value).__name__


def input_tensors(forwards: Sequence[Forward]) -> list[Tensor]:
    """The tensors that the calls take."""
    arguments = [(forward.args, dict(forward.kwargs)) for forward in forwards]
    leaves = tree_iter(arguments)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def outermost_pretrained(model: nn.Module) -> dict[str, PreTrainedModel]:
    """The Transformers models in a model that are part of no other one, by path: the model itself, if it is one."""
    outermost: dict[str, PreTrainedModel] = {}
    for path, module in model.named_modules():
        # the path of the model itself is "", and everything is inside of it
        is_inside = any(not outer or path.startswith(f"{outer}.") for outer in outermost)
        if isinstance(module, PreTrainedModel) and not is_inside:
            outermost[path] = module
    return outermost


def refuse_sharded(model: nn.Module, way_out: str) -> None:
    """Raises OTOError where the weights of a model are shards."""
    if any(isinstance(weight, DTensor) for weight in model.parameters()):
        raise OTOError(f"{type(model).__name__} is sharded already: {way_out}")


ADVICE = (
    "(hf_oto: the analysis of the model ran out of memory. Ways out: a smaller batch; a partition made before the "
    "optimizer, or on the meta device, partition_zigs(model, inputs), where a model without weights takes none)"
)


def raise_if_out_of_memory(error: Exception, advice: str = ADVICE) -> None:
    """Raises an error again, with advice, if memory ran out: such an error says nothing about the model."""
    text = f"{error}\n{advice}"
    # The very type of the error may take other arguments, as numpy's does.
    for kind in (torch.OutOfMemoryError, MemoryError):
        if isinstance(error, kind):
            raise kind(text) from error
    # On a CPU torch raises a plain RuntimeError, which accelerate knows by its text.
    if isinstance(error, RuntimeError) and should_reduce_batch_size(RuntimeError(str(error))):
        raise RuntimeError(text) from error
