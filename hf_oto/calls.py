"""The calls of a model's forward that everything is found and proven on: given, recorded, or made from the config.

Stands at the beginning of the flow. A call is data, arguments as they came, that can be made again as often as it
takes: by the trace, the rehearsal, the certificate and the measurements.
"""

from __future__ import annotations

import contextlib
import copy
import enum
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
            tensor: what is passed in the place of a tensor.
        """
        args, kwargs = own_copy((self.args, dict(self.kwargs)), tensor)
        return model.get_submodule(self.path)(*args, **kwargs)


Call = Mapping[str, Any] | tuple[Any, ...] | torch.Tensor | Forward  # named arguments, those by position, or one
Inputs = Call | Sequence[Call]  # one batch, or several calls in a list


def as_forwards(inputs: Inputs) -> list[Forward]:
    """The calls that `inputs` says: one batch is the arguments of one call, by name, or by position in a tuple.

    Raises:
        ValueError: it says none, or something that can't be the arguments of a call.
    """
    several = inputs if isinstance(inputs, list) else [inputs]
    forwards = [_as_forward(call) for call in several]
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
    """A copy that shares nothing which a forward might change: tensors, containers, and objects that hold such (a
    cache, an encoded batch); modules, and what can't be copied, are shared.

    Args:
        tensor: makes the copy of a tensor.
    """
    return _own_copy(value, tensor, {})


def _own_copy(value: Any, tensor: Callable[[torch.Tensor], torch.Tensor], copies: dict[int, Any]) -> Any:
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, torch.Tensor):
        twin: Any = tensor(value.detach())
    elif isinstance(value, torch.Generator):
        twin = value.clone_state()
    elif isinstance(value, tuple):
        items = [_own_copy(item, tensor, copies) for item in value]
        named = hasattr(value, "_fields")
        twin = tuple(items) if type(value) is tuple else type(value)._make(items) if named else type(value)(items)
    elif type(value) in (list, deque, set):
        twin = type(value)(_own_copy(item, tensor, copies) for item in value)
    elif isinstance(value, types.MappingProxyType):
        twin = types.MappingProxyType({key: _own_copy(item, tensor, copies) for key, item in value.items()})
    elif isinstance(value, np.ndarray):
        twin = value.copy()
    elif isinstance(value, (nn.Module, type, enum.Enum, types.ModuleType, types.FunctionType, types.MethodType)):
        twin = value
    elif isinstance(value, (dict, list)) or hasattr(value, "__dict__") or slots_of(value):
        twin = _copy_of_object(value, tensor, copies)
    else:
        twin = value
    copies[id(value)] = twin
    return twin


def _copy_of_object(value: Any, tensor: Callable[[torch.Tensor], torch.Tensor], copies: dict[int, Any]) -> Any:
    try:
        twin = copy.copy(value)
    except Exception:  # a lock or a stream in it, say: then it is shared
        return value
    if isinstance(value, list):
        twin[:] = [_own_copy(item, tensor, copies) for item in value]
    elif isinstance(value, dict):
        for key, item in value.items():
            twin[key] = _own_copy(item, tensor, copies)
    for name, item in list(vars(twin).items()) if hasattr(twin, "__dict__") else ():
        object.__setattr__(twin, name, _own_copy(item, tensor, copies))
    for slot, item in slots_of(value):
        slot.__set__(twin, _own_copy(item, tensor, copies))
    return twin


@contextlib.contextmanager
def recorded(model: nn.Module) -> Iterator[list[Forward]]:
    """While open, notes the calls of the model's forward, as they come, in the list that it gives.

    The outermost call counts, whichever module it is of: code that goes past the model's own forward is noted call by
    call of the parts that it uses.
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
            if not isinstance(module, torch.jit.ScriptModule):  # these take no such hooks

                def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path) -> None:
                    enter(path, module, args, kwargs)

                stack.enter_context(module.register_forward_pre_hook(note, prepend=True, with_kwargs=True))
                stack.enter_context(module.register_forward_hook(leave, always_call=True))
        yield forwards


CACHES = "transformers"  # the package whose objects that are no mapping are caches


def tensors_of(output: Any) -> list[torch.Tensor]:
    """The tensors of a model's output, in order, those that objects in it hold, too; Transformers' caches are no
    outputs."""
    found: list[torch.Tensor] = []
    _collect(output, found, {})
    return found


def _collect(value: Any, found: list[torch.Tensor], seen: dict[int, Any]) -> None:
    if isinstance(value, torch.Tensor):
        found.append(value)
    elif isinstance(value, (list, tuple, deque)):
        for item in value:
            _collect(item, found, seen)
    elif isinstance(value, Mapping):
        for item in value.values():
            _collect(item, found, seen)
    elif value is None or isinstance(value, (int, float, str, bytes, nn.Module, type, enum.Enum, types.ModuleType)):
        return
    elif isinstance(value, CALLABLES):
        _collect(held(value), found, seen)
    elif id(value) not in seen and type(value).__module__.partition(".")[0] != CACHES:
        seen[id(value)] = value
        _collect(list(getattr(value, "__dict__", {}).values()), found, seen)
        _collect([item for _, item in slots_of(value)], found, seen)


def described(forwards: Sequence[Forward]) -> str:
    """The calls in words: the shapes of their tensors."""

    def shown(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return tuple(value.shape)
        return value if isinstance(value, (int, float, str, type(None))) else type(value).__name__

    calls = []
    for forward in forwards:
        named = {name: shown(value) for name, value in forward.kwargs.items()}
        calls.append(f"{forward.path} {[shown(a) for a in forward.args]} {named}" if forward.args else str(named))
    return "; ".join(calls)


def input_tensors(forwards: Sequence[Forward]) -> list[torch.Tensor]:
    """The tensors that the calls take."""
    leaves = tree_iter([(forward.args, dict(forward.kwargs)) for forward in forwards])
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def outermost_pretrained(model: nn.Module) -> dict[str, PreTrainedModel]:
    """The Transformers models in a model that are part of no other one, by path: itself, if it is one."""
    found: dict[str, PreTrainedModel] = {}
    for path, module in model.named_modules():
        inside = any(not outer or path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, PreTrainedModel) and not inside:
            found[path] = module
    return found


ADVICE = (
    "(hf_oto: the analysis of the model ran out of memory. Ways out: a smaller batch; a partition made before the "
    "optimizer, or on the meta device, partition_zigs(model, inputs), where a model without weights takes none)"
)


def raise_if_out_of_memory(error: Exception, advice: str = ADVICE) -> None:
    """Memory that runs out says nothing about a model: it is raised again, with advice, never taken for an answer."""
    kinds = torch.OutOfMemoryError, MemoryError
    on_cpu = isinstance(error, RuntimeError) and should_reduce_batch_size(RuntimeError(str(error)))
    if isinstance(error, kinds) or on_cpu:
        # not the very type: numpy's, for one, takes other arguments
        kind = next((kind for kind in kinds if isinstance(error, kind)), RuntimeError)
        raise kind(f"{error}\n{advice}") from error


# made from the config ------------------------------------------------------------------------------


def make_inputs(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Small batches made from a Transformers config, of text, images or sound: first of all its forward takes, so that
    every tower runs (images have their places in the text, where the model wants that), then of its main input alone.

    Raises:
        OTOError: what the model reads is none of these.
    """
    made, main = {}, ""
    if isinstance(model, PreTrainedModel):
        accepted, main = inspect.signature(model.forward).parameters, model.main_input_name
        device = torch.device("cpu") if model.device.type == "meta" else model.device
        for name in ("input_ids", "pixel_values", "input_values", "input_features", "decoder_input_ids"):
            value = _made(name, model.config) if name in accepted else None
            if value is not None:
                made[name] = value.to(device, model.dtype if value.is_floating_point() else value.dtype)
    if {"input_ids", "pixel_values"} <= made.keys():
        yield from _with_images(model, made)
    if made:
        yield made
    if main not in made:
        raise OTOError(
            f"can't make a batch for {type(model).__name__} from its config: pass inputs, the arguments of its forward"
        )
    yield {name: value for name, value in made.items() if name in (main, "decoder_input_ids")}
    yield {main: made[main]}


def _with_images(model: PreTrainedModel, made: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Batches whose texts begin with a token for every feature of their image: to count these the images are encoded,
    in each of the forms that models take them in."""
    token, encode = _find(model.config, "image_token_id"), getattr(model, "get_image_features", None)
    if token is None or encode is None or model.device.type == "meta":
        return
    pixels, text = made["pixel_values"], made["input_ids"]
    forms = [{"pixel_values": pixels, "image_sizes": torch.tensor([pixels.shape[-2:]] * 2, device=pixels.device)}]
    forms += [{"pixel_values": pixels}, {"pixel_values": pixels[:, None]}]
    patch, merge = _find(model.config, "patch_size"), 2 * (_find(model.config, "spatial_merge_size") or 1)
    if isinstance(patch, int):
        size = pixels.shape[1] * (_find(model.config, "temporal_patch_size") or 1) * patch**2
        grid = torch.tensor([[1, merge, merge]] * 2, device=pixels.device)
        forms.insert(0, {"pixel_values": pixels.new_ones(2 * merge**2, size), "image_grid_thw": grid})
    for images in (form for form in forms if form.keys() <= inspect.signature(encode).parameters.keys()):
        try:
            with evaluating(model):
                features = encode(**images)
        except Exception as error:  # not its form
            raise_if_out_of_memory(error)
            continue
        features = tensors_of(getattr(features, "pooler_output", features))
        count = sum(t.numel() for t in features) // model.get_input_embeddings().weight.shape[1]
        text = torch.where(text == token, text - 1, text)
        batch = made | images | {"input_ids": torch.cat([text.new_full((2, count // 2), token), text], 1)}
        if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
            batch["mm_token_type_ids"] = (batch["input_ids"] == token).long()
        yield batch


def _find(config: PreTrainedConfig, key: str) -> Any:
    """What a config or one of its parts says, None if none does."""
    parts = [config, *(vars(config)[key] for key in config.sub_configs if vars(config).get(key) is not None)]
    return next((found for part in parts if (found := getattr(part, key, None)) is not None), None)


def _made(name: str, config: PreTrainedConfig) -> torch.Tensor | None:
    """One input, None if the config doesn't say how large it is."""
    generator, shape = torch.Generator().manual_seed(0), (4000,)
    if name.endswith("input_ids"):
        size = _find(config, "vocab_size")
        return torch.randint(3, size, (2, 16), generator=generator) if size else None
    if name == "pixel_values":
        size = _find(config, "image_size") or 64
        shape = (_find(config, "num_channels") or 3, *(size if isinstance(size, (list, tuple)) else (size, size)))
    if name == "input_features":
        shape = (_find(config, "num_mel_bins"), 2 * (_find(config, "max_source_positions") or 50))
    return torch.randn(2, *shape, generator=generator) if all(shape) else None
