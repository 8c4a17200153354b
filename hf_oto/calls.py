"""The calls of a model's forward that everything is found and proven on: given, recorded, or made from the config.

A call is data, the arguments as they came: the trace, the rehearsal, the certificate and the measurements, which all
come later, can make it as often as they like.

Worked example: the batch {"input_ids": ids} is Forward(kwargs={"input_ids": ids}), one call of the model itself, and
`Forward((pixels,), path="vision_tower")` is a call of a part of it.
"""

from __future__ import annotations

import contextlib
import copy
import enum
import functools
import inspect
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn
from torch.utils._pytree import tree_iter
from transformers import PreTrainedConfig, PreTrainedModel

from .evaluating import evaluating
from .modeling_oto import OTOError
from .restore import CALLABLES, held, slots_of


class Forward(NamedTuple):
    """One call of a module's forward: its arguments, and the module by its path in the model ("" is the model)."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = types.MappingProxyType({})
    path: str = ""

    def run(self, model: nn.Module, tensor: Callable[[torch.Tensor], torch.Tensor] = torch.clone) -> Any:
        """Makes the call, with arguments of its own: forwards take keys out of them and write into them.

        Args:
            tensor: makes what is passed in the place of a tensor.
        """
        args, kwargs = own_copy((self.args, dict(self.kwargs)), tensor)
        module = model.get_submodule(self.path)
        return module(*args, **kwargs)


Call = Mapping[str, Any] | tuple[Any, ...] | torch.Tensor | Forward  # named arguments, those by position, or one
Inputs = Call | Sequence[Call]  # one batch, or several calls in a list


def as_forwards(inputs: Inputs) -> list[Forward]:
    """The calls that inputs stand for: one batch is the arguments of one call, by name, or by position in a tuple.

    Raises:
        ValueError: there is no call, or something that can't be the arguments of a call.

    Example:
        >>> as_forwards({"input_ids": [1, 2]})
        [Forward(args=(), kwargs={'input_ids': [1, 2]}, path='')]
    """
    calls = inputs if isinstance(inputs, list) else [inputs]
    forwards = [_as_forward(call) for call in calls]
    if not forwards:
        raise ValueError("inputs is empty: pass one batch, the keyword arguments of forward, or a list of such")
    for forward in forwards:
        for value in (*forward.args, *forward.kwargs.values()):
            if isinstance(value, Iterator):
                raise ValueError(f"inputs hold a {type(value).__name__}, which can be read once only: pass a list")
    return forwards


def _as_forward(call: Call) -> Forward:
    if isinstance(call, Forward):
        return call
    if isinstance(call, Mapping):
        return Forward(kwargs=dict(call))
    if isinstance(call, torch.Tensor):
        return Forward(args=(call,))
    if type(call) is tuple:
        return Forward(args=call)
    raise ValueError(
        f"inputs hold a {type(call).__name__}: pass the arguments of forward, a dict by name or a tuple by position, "
        "or a list of such for several calls"
    )


def own_copy(value: Any, tensor: Callable[[torch.Tensor], torch.Tensor] = torch.clone) -> Any:
    """A copy that shares nothing which a forward might change.

    Tensors, containers, and objects that hold such (a cache, an encoded batch) are copied; modules, and what can't be
    copied, are shared.

    Args:
        tensor: makes the copy of a tensor.
    """
    return _Copies(tensor).of(value)


NEVER_COPIED = (nn.Module, type, enum.Enum, types.ModuleType, types.FunctionType, types.MethodType)


class _Copies:
    """The copies that belong to one call of `own_copy`: an object that is met twice is copied once.

    A class, as a closure that calls itself lives until the garbage collector comes, and tensors with it.
    """

    def __init__(self, copy_tensor: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._copy_tensor = copy_tensor
        self._copies: dict[int, Any] = {}  # id of the original -> its copy

    def of(self, value: Any) -> Any:
        """The copy of a value."""
        if id(value) not in self._copies:
            self._copies[id(value)] = self._copied(value)
        return self._copies[id(value)]

    def _copied(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._copy_tensor(value.detach())
        if isinstance(value, torch.Generator):
            return value.clone_state()
        if isinstance(value, tuple):
            return self._tuple(value)
        if type(value) in (list, deque, set):
            return type(value)(self.of(item) for item in value)
        if isinstance(value, types.MappingProxyType):
            return types.MappingProxyType({key: self.of(item) for key, item in value.items()})
        if isinstance(value, np.ndarray):
            return value.copy()
        if isinstance(value, NEVER_COPIED):
            return value
        if isinstance(value, (dict, list)) or hasattr(value, "__dict__") or slots_of(value):
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
        """A copy of an object and of all that it holds: items, if it is a container too, attributes and slots."""
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
            for name, item in list(vars(twin).items()):
                object.__setattr__(twin, name, self.of(item))  # frozen dataclasses refuse setattr
        for slot, item in slots_of(value):
            slot.__set__(twin, self.of(item))
        return twin


@contextlib.contextmanager
def recorded(model: nn.Module) -> Iterator[list[Forward]]:
    """While open, notes the calls of the model's forward, as they come, in the list that it gives.

    Only the outermost call counts, whichever module it is of: where code goes past the model's own forward, the calls
    of the parts that it uses are noted one by one.
    """
    forwards: list[Forward] = []
    running: list[nn.Module] = []

    def enter(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not running:
            forwards.append(Forward(own_copy(args), own_copy(kwargs), path))
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


def tensors_of(output: Any) -> list[torch.Tensor]:
    """The tensors of a model's output, in order, those that objects in it hold, too.

    Transformers' caches count as no outputs.
    """
    tensors: list[torch.Tensor] = []
    _collect(output, tensors, {})
    return tensors


def _collect(value: Any, tensors: list[torch.Tensor], seen: dict[int, Any]) -> None:
    """Adds the tensors in a value to `tensors`; `seen` keeps the objects that were entered alive, by their ids."""
    if isinstance(value, torch.Tensor):
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
    elif id(value) not in seen and type(value).__module__.partition(".")[0] != CACHES:
        seen[id(value)] = value
        attributes = list(getattr(value, "__dict__", {}).values())
        _collect(attributes, tensors, seen)
        _collect([item for _, item in slots_of(value)], tensors, seen)


def described(forwards: Sequence[Forward]) -> str:
    """The calls in words: the shapes of their tensors."""
    calls = []
    for forward in forwards:
        named = {name: _shown(value) for name, value in forward.kwargs.items()}
        if forward.args:
            calls.append(f"{forward.path} {[_shown(value) for value in forward.args]} {named}")
        else:
            calls.append(str(named))
    return "; ".join(calls)


def _shown(value: Any) -> Any:
    """An argument in an error message: a shape, a short value, or the name of a type."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, (int, float, str, type(None))):
        return value
    return type(value).__name__


def input_tensors(forwards: Sequence[Forward]) -> list[torch.Tensor]:
    """The tensors that the calls take."""
    leaves = tree_iter([(forward.args, dict(forward.kwargs)) for forward in forwards])
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def outermost_pretrained(model: nn.Module) -> dict[str, PreTrainedModel]:
    """The Transformers models in a model that are part of no other one, by path: itself, if it is one."""
    outermost: dict[str, PreTrainedModel] = {}
    for path, module in model.named_modules():
        is_inside = any(not outer or path.startswith(f"{outer}.") for outer in outermost)
        if isinstance(module, PreTrainedModel) and not is_inside:
            outermost[path] = module
    return outermost


ADVICE = (
    "(hf_oto: the analysis of the model ran out of memory. Ways out: a smaller batch; a partition made before the "
    "optimizer, or on the meta device, partition_zigs(model, inputs), where a model without weights takes none)"
)


def raise_if_out_of_memory(error: Exception, advice: str = ADVICE) -> None:
    """Raises an error again, with advice, if memory ran out: that says nothing about a model, and is no answer."""
    # On a CPU torch raises a plain RuntimeError, which accelerate knows by its text.
    ran_out_on_cpu = isinstance(error, RuntimeError) and should_reduce_batch_size(RuntimeError(str(error)))
    # The very type of the error may take other arguments, as numpy's does.
    for kind in (torch.OutOfMemoryError, MemoryError):
        if isinstance(error, kind):
            raise kind(f"{error}\n{advice}") from error
    if ran_out_on_cpu:
        raise RuntimeError(f"{error}\n{advice}") from error


# made from the config ------------------------------------------------------------------------------


def make_inputs(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Small batches made from a Transformers config, of text, images or sound, one after the other to try.

    The first ones have all that the forward takes, so that every tower runs; images have their places in the text
    where the model wants that. The last one has the model's main input alone.

    Raises:
        OTOError: what the model reads is none of these.
    """
    made: dict[str, torch.Tensor] = {}
    main_input = ""
    if isinstance(model, PreTrainedModel):
        main_input = model.main_input_name
        accepted = inspect.signature(model.forward).parameters
        device = torch.device("cpu") if model.device.type == "meta" else model.device
        for name in ("input_ids", "pixel_values", "input_values", "input_features", "decoder_input_ids"):
            value = _made(name, model.config) if name in accepted else None
            if value is not None:
                dtype = model.dtype if value.is_floating_point() else value.dtype
                made[name] = value.to(device, dtype)
    if {"input_ids", "pixel_values"} <= made.keys():
        yield from _with_images(model, made)
    if made:
        yield made
    if main_input not in made:
        raise OTOError(
            f"can't make a batch for {type(model).__name__} from its config: pass inputs, the arguments of its forward"
        )
    yield {name: value for name, value in made.items() if name in (main_input, "decoder_input_ids")}
    yield {main_input: made[main_input]}


def _with_images(model: PreTrainedModel, made: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Batches whose texts begin with a token for every feature of their image.

    The images are encoded to count their features, in each of the forms that models take images in.
    """
    image_token = _in_config(model.config, "image_token_id")
    encode = getattr(model, "get_image_features", None)
    if image_token is None or encode is None or model.device.type == "meta":
        return
    encoder_takes = inspect.signature(encode).parameters.keys()
    model_takes = inspect.signature(model.forward).parameters
    for images in _forms_of_images(model.config, made["pixel_values"]):
        if not images.keys() <= encoder_takes:
            continue
        try:
            with evaluating(model):
                encoded = encode(**images)
        except Exception as error:  # the model takes images in another form
            raise_if_out_of_memory(error)
            continue
        features = tensors_of(getattr(encoded, "pooler_output", encoded))
        width = model.get_input_embeddings().weight.shape[1]
        num_features = sum(t.numel() for t in features) // width  # of both images
        text = made["input_ids"]
        text = torch.where(text == image_token, text - 1, text)  # no random token may stand for an image
        places = text.new_full((2, num_features // 2), image_token)
        ids = torch.cat([places, text], 1)
        batch = made | images | {"input_ids": ids}
        if "mm_token_type_ids" in model_takes:
            batch["mm_token_type_ids"] = (ids == image_token).long()
        yield batch


def _forms_of_images(config: PreTrainedConfig, pixels: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """The same two images, (2, channels, height, width), as the arguments that models of different kinds take."""
    sizes = torch.tensor([pixels.shape[-2:]] * 2, device=pixels.device)
    forms = [
        {"pixel_values": pixels, "image_sizes": sizes},
        {"pixel_values": pixels},
        {"pixel_values": pixels[:, None]},  # several images, or tiles of one, in each example
    ]
    patch_size = _in_config(config, "patch_size")
    if isinstance(patch_size, int):
        # Patches in rows, and a grid of (time, height, width) for each image, whose sides are multiples of the merge.
        side = 2 * (_in_config(config, "spatial_merge_size") or 1)
        frames = _in_config(config, "temporal_patch_size") or 1
        values_of_patch = pixels.shape[1] * frames * patch_size**2
        grid = torch.tensor([[1, side, side]] * 2, device=pixels.device)
        patches = pixels.new_ones(2 * side**2, values_of_patch)
        forms.insert(0, {"pixel_values": patches, "image_grid_thw": grid})
    return forms


def _in_config(config: PreTrainedConfig, key: str) -> Any:
    """What a config or one of its parts says, None if none does."""
    parts = [config]
    for name in config.sub_configs:
        part = vars(config).get(name)
        if part is not None:
            parts.append(part)
    for part in parts:
        value = getattr(part, key, None)
        if value is not None:
            return value
    return None


def _made(name: str, config: PreTrainedConfig) -> torch.Tensor | None:
    """One input of two examples, None if the config doesn't say how large it is."""
    generator = torch.Generator().manual_seed(0)
    if name.endswith("input_ids"):
        vocab_size = _in_config(config, "vocab_size")
        if not vocab_size:
            return None
        return torch.randint(3, vocab_size, (2, 16), generator=generator)  # below 3 are special tokens, mostly
    shape: tuple[int | None, ...] = (4000,)  # a quarter of a second of sound
    if name == "pixel_values":
        size = _in_config(config, "image_size") or 64
        sides = size if isinstance(size, (list, tuple)) else (size, size)
        shape = (_in_config(config, "num_channels") or 3, *sides)
    if name == "input_features":
        positions = _in_config(config, "max_source_positions") or 50
        shape = (_in_config(config, "num_mel_bins"), 2 * positions)  # the encoder halves the number of frames
    if not all(shape):
        return None
    return torch.randn(2, *shape, generator=generator)
