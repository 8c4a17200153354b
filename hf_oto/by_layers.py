"""A model that runs while its weights are elsewhere: each layer has them for as long as its own forward takes.

The weights may be shards on many ranks, or whole ones that lie in the memory of the CPU while a card computes.

Worked example: a decoder of 80 layers takes 282 GB in float32. When layer 7 is called, its weights (3.4 GB) are
gathered, changed as a cut would change them, and put in their places, where tensors without values have been. When it
returns, these are there again, and the next layer is gathered. The embeddings and the head (8.4 GB), which belong to
no layer, are whole all the time.
"""

from __future__ import annotations

import contextlib
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from .calls import Forward, raise_if_out_of_memory
from .certificate import ONLY_AS_THEY_ARE, exact_outputs, own_outputs
from .changes import Change, Changes
from .cut import Cut, Scale, ScaleOfStorage, TrialCut
from .differences import largest_difference
from .evaluating import WeightsKept
from .modeling_oto import OTOError, named_tensors
from .operations import is_foreign, tensors_in
from .restore import Place, places, replace_tensors_, restored
from .shards import Shards, whole
from .wide import storage_of

logger = logging.getLogger(__name__)

CONTAINERS_OF_LAYERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


class Weight(NamedTuple):
    """A weight of a layer."""

    name: str
    shard: Tensor
    empty: nn.Parameter  # on meta: what is in its places while it isn't whole
    places: list[Place]


class WholeForNow:
    """Weights that are whole while this is open, or between two hooks.

    Args:
        device: where the model computes. None: where the weights are.
        change, to_scale, scales: see `LayerByLayer.running`.
    """

    def __init__(
        self,
        weights: Sequence[Weight],
        device: torch.device | None,
        change: Change,
        to_scale: Mapping[str, Scale],
        scales: ScaleOfStorage | None,
    ) -> None:
        self.weights = weights
        self._device = device
        self._change = change
        self._to_scale = to_scale
        self._scales = scales
        self._num_open = 0  # forwards that are running, one in the other

    @property
    def is_open(self) -> bool:
        """Whether the weights are whole now."""
        return self._num_open > 0

    def gather(self, *_: Any) -> None:
        """Gathers the weights, and puts them in their places."""
        self._num_open += 1
        if self._num_open > 1:
            return
        # the wide arithmetic is for what the model computes
        with torch.no_grad(), _disable_current_modes():
            for weight in self.weights:
                gathered = whole(weight.shard)
                if self._device is not None:
                    gathered = gathered.to(self._device)
                changed = self._change(weight.name, gathered)
                parameter = nn.Parameter(changed, requires_grad=False)
                for place in weight.places:
                    place.put(parameter)
                if weight.name in self._to_scale:
                    self._scales[storage_of(parameter)] = self._to_scale[weight.name]

    def drop(self, *_: Any) -> None:
        """Lets go of the weights."""
        self._num_open -= 1
        if self.is_open:
            return
        for weight in self.weights:
            if weight.name in self._to_scale:
                # another tensor may soon have the same storage
                del self._scales[storage_of(weight.places[0].tensor)]
            for place in weight.places:
                place.put(weight.empty)

    def __enter__(self) -> None:
        self.gather()

    def __exit__(self, *_: Any) -> None:
        self.drop()


def unchanged(_: str, weight: Tensor) -> Tensor:
    return weight


class _NoneIsReadElsewhere(TorchDispatchMode):
    """While open, operations take no weight whose layer isn't running.

    Some of torch's operations don't mind a tensor on meta among others: `F.linear` returns whatever lies in memory.
    And a weight that a layer returns is gone under FSDP2 when the next layer takes it.
    """

    supports_higher_order_operators = True

    def __init__(self, layers: Iterable[WholeForNow]) -> None:
        super().__init__()
        self._weight_of_storage: dict[int, tuple[str, WholeForNow | None]] = {}  # None: it is not there
        for layer in layers:
            for weight in layer.weights:
                self._weight_of_storage[storage_of(weight.empty)] = weight.name, None
                if not isinstance(weight.shard, DTensor):
                    self._weight_of_storage[storage_of(weight.shard)] = weight.name, layer

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in tensors_in((*args, *kwargs.values())):
            if is_foreign(tensor) or tensor.layout != torch.strided:
                continue
            name, layer = self._weight_of_storage.get(storage_of(tensor), ("", None))
            if name and not (layer and layer.is_open):
                raise OTOError(f"{name} is read while the forward of its layer isn't running")
        return func(*args, **kwargs)


class LayerByLayer:
    """A model whose own weights are on meta, beside the weights that its layers get when they run.

    Args:
        weights: name of a parameter, the first one that it has -> the whole of it, or this rank's shard. Shards are
            gathered by all ranks together.
        layers: the modules that get weights of their own.
        device: where this rank computes. None: where the weights are.

    Attributes:
        model: the model. Its buffers are real.
    """

    def __init__(
        self, model: nn.Module, weights: Shards, layers: Sequence[nn.Module], device: torch.device | None
    ) -> None:
        self.model = model
        self._weights = weights
        self._layers = layers
        self._device = device

    @contextlib.contextmanager
    def running(
        self,
        change: Change = unchanged,
        to_scale: Mapping[str, Scale] | None = None,
        scales: ScaleOfStorage | None = None,
    ) -> Iterator[None]:
        """While open, the model can run.

        What belongs to no layer (embeddings, a head) is whole all the time. Whatever reads a weight of a layer that
        isn't running raises OTOError.

        Args:
            change: what is done to every weight after it was gathered.
            to_scale: name of a weight -> how it is to be scaled while it is widened.
            scales: the same of the weights that are whole now, by their storages, as `WideArithmetic` takes it.
        """
        for_now_of_layers = {}
        for layer, weights in self._weights_of_layers().items():
            for_now_of_layers[layer] = WholeForNow(weights, self._device, change, to_scale or {}, scales)
        with contextlib.ExitStack() as stack:
            always = for_now_of_layers.pop(None, None)
            if always is not None:
                stack.enter_context(always)
            stack.enter_context(_NoneIsReadElsewhere(for_now_of_layers.values()))
            for layer, for_now in for_now_of_layers.items():
                before = layer.register_forward_pre_hook(for_now.gather, prepend=True)
                after = layer.register_forward_hook(for_now.drop, always_call=True)
                stack.callback(before.remove)
                stack.callback(after.remove)
            yield

    def cut_difference(self, cut: Cut, forwards: Sequence[Forward]) -> tuple[float, float]:
        """`hf_oto.certificate.cut_difference`."""
        forwards = self._here(forwards)
        with self.running(self._changes(cut).zeroed()):
            exact, _ = exact_outputs(self.model, forwards)
        # the trial cuts buffers and sizes; of weights on meta it cuts the shapes
        with TrialCut(self.model, cut):
            exact_of_cut, tolerance = self._exact_outputs_of_cut(cut, forwards)
        return largest_difference(exact, exact_of_cut), tolerance

    def _exact_outputs_of_cut(self, cut: Cut, forwards: Sequence[Forward]) -> tuple[list[Tensor], float]:
        """`exact_outputs` within a `TrialCut`."""
        changes = self._changes(cut)
        # weights are scaled while they are widened: the certificate judges the cut, not how they are rounded
        widened = {} if self.model in ONLY_AS_THEY_ARE else changes.scales()
        scales: ScaleOfStorage = {}
        with self.running(changes.cut(but=widened), widened, scales):
            return exact_outputs(self.model, forwards, scales)

    def _here(self, forwards: Sequence[Forward]) -> list[Forward]:
        """Calls that were noted while the model lay elsewhere, for the device where this rank computes."""
        if self._device is None:
            return list(forwards)
        return [forward if forward.home is None else forward.copy_on(self._device) for forward in forwards]

    def _changes(self, cut: Cut) -> Changes:
        return Changes(cut, self._first_names())

    def _first_names(self) -> dict[str, str]:
        """Name of a tensor -> the first of the names that it has; a tied tensor has several."""
        first_of_id: dict[int, str] = {}
        first_names = {}
        for name, tensor in named_tensors(self.model).items():
            first_names[name] = first_of_id.setdefault(id(tensor), name)
        return first_names

    def _weights_of_layers(self) -> dict[nn.Module | None, list[Weight]]:
        """The weights that must be whole while a layer runs; those of no layer stand under None.

        Modules without parts (an embedding, a norm) are no layers, because others may read their weights, too.
        """
        weight_of_id: dict[int, Weight] = {}
        names = defaultdict(list)
        places_of_id = places(self.model)
        for name, tensor in named_tensors(self.model).items():
            names[id(tensor)].append(name)
            if name in self._weights:
                weight_of_id[id(tensor)] = Weight(name, self._weights[name], tensor, places_of_id[id(tensor)])
        layers = set(self._layers)
        layer_of_beginning = {}  # beginning of the names in a layer -> the layer
        for path, module in self.model.named_modules():
            if path and module in layers and any(True for _ in module.children()):
                layer_of_beginning[f"{path}."] = module
        weights: dict[nn.Module | None, list[Weight]] = defaultdict(list)
        for tensor_id, weight in weight_of_id.items():
            innermost = None
            for beginning in _beginnings(weight.name):  # not all layers: a model may have thousands of experts
                is_inside = all(name.startswith(beginning) for name in names[tensor_id])
                if is_inside and beginning in layer_of_beginning:
                    innermost = layer_of_beginning[beginning]
            weights[innermost].append(weight)
        return weights


def _beginnings(name: str) -> Iterator[str]:
    """What the names of all modules around a parameter make its name begin with, the outermost first."""
    parts = name.split(".")[:-1]
    for depth in range(1, len(parts) + 1):
        yield ".".join(parts[:depth]) + "."


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The entries of a model's outermost lists of modules: what all ranks run, whatever their examples are.

    (The experts in a block, say, are entries of a list too, and one rank may need an expert that another doesn't.)
    What shares a parameter with the rest of the model is left out.
    """
    names_of_id = defaultdict(list)
    for name, p in model.named_parameters(remove_duplicate=False):
        names_of_id[id(p)].append(name)
    blocks = []
    outermost: list[str] = []  # beginnings of the names in entries; what is in these are no blocks
    for path, module in model.named_modules():
        parent = model.get_submodule(path.rpartition(".")[0])
        is_inside = path.startswith(tuple(outermost))
        is_entry = path and isinstance(parent, CONTAINERS_OF_LAYERS)
        can_run = any(True for _ in module.children()) and not isinstance(module, (nn.ModuleList, nn.ModuleDict))
        if is_inside or not is_entry or not can_run:
            continue
        beginning = f"{path}."
        outermost.append(beginning)
        names_of_parameters = [names_of_id[id(p)] for p in module.parameters()]
        if all(name.startswith(beginning) for names in names_of_parameters for name in names):
            blocks.append(module)
    return blocks


def runs_by_blocks(model: nn.Module, forwards: Sequence[Forward]) -> bool:
    """Whether a model runs while only one of its blocks has its weights; else it reads weights of other blocks."""
    try:
        with taken_apart(model, layers=blocks_of(model)) as by_layers, by_layers.running():
            own_outputs(model, forwards)
    except Exception as error:
        raise_if_out_of_memory(error)
        logger.warning(
            "the blocks of %s don't run one by one (%s): in the end every rank gathers the whole model for a moment",
            type(model).__name__, error,
        )  # fmt: skip
        return False
    return True


@contextlib.contextmanager
def taken_apart(
    model: nn.Module, device: torch.device | None = None, layers: Sequence[nn.Module] | None = None
) -> Iterator[LayerByLayer]:
    """While open, the weights of a model are not in their places.

    Args:
        device: where the model computes, one layer after the other. None: where its weights are.
        layers: the modules that get weights of their own. None: the entries of its lists of modules.
    """
    with restored(model) as kept:
        weights: Shards = {}
        new: dict[int, Tensor] = {}  # id of a tensor -> what takes its place
        for name, p in model.named_parameters():
            weights[name] = p.detach()
            new[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        if device is not None:
            for buffer in model.buffers():
                new[id(buffer)] = buffer.to(device)
        if layers is None:
            layers = []
            for module in model.modules():
                if isinstance(module, CONTAINERS_OF_LAYERS):
                    layers += module.children()
        with WeightsKept(model):
            replace_tensors_(kept, new)
            yield LayerByLayer(model, weights, layers, device)
