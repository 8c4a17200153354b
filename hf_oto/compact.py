"""Cutting: slices parameters and buffers, sets the sizes modules keep, and fills the zeros in again.

Stands after training, when the plan says which ZIGs are zero; what it did is written into the model's config.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .modeling_oto import VERSION, OTOError, become_compact_, named_tensors, require, set_sizes_, sizes_of, validate
from .sizes import Attribute
from .zigs import Member, PrunableAxis, PruningPlan, Scale, ZIGPartition

logger = logging.getLogger(__name__)


def resolve(partition: ZIGPartition, plan: PruningPlan) -> tuple[np.ndarray, dict[Attribute, int]]:
    """What can be cut of a plan: removed ZIGs, bool (num_zigs,), and the module attributes that change.

    Where the sizes that modules keep contradict each other, those ZIGs stay as zeros: correct, only larger.
    """
    removed = plan.removed(partition)
    for axis, gone in partition.split(removed):
        gone[np.flatnonzero(gone)[: -int((~gone).sum()) % axis.multiple]] = False
    if partition.sizes is None:
        return removed, {}
    while True:
        attributes, conflicts = partition.sizes.solve(removed)
        if not conflicts:
            return removed, attributes
        back = partition.sizes.involved(conflicts, removed)
        layer = conflicts[0].layer or "forward"
        logger.warning("%d ZIGs stay as zeros: the sizes used in %s don't fit them", len(back), layer)
        removed[back] = False


def removed_positions(partition: ZIGPartition, removed: np.ndarray) -> dict[tuple[str, int], np.ndarray]:
    """(parameter, dim) -> the positions of it that go; `removed` is bool (num_zigs,)."""
    gone: dict[tuple[str, int], list[np.ndarray]] = {}
    for _, m, index in partition.slices(removed):
        gone.setdefault((m.param, m.dim), []).append(index)
    return {key: np.concatenate(found) for key, found in gone.items()}


def scale_factors(partition: ZIGPartition, removed: np.ndarray) -> dict[str, tuple[float, int]]:
    """How parameters change for the averages taken over what is cut, p -> (factor, offset) as in `scaled`; `removed`
    is bool (num_zigs,)."""
    factors: dict[str, tuple[float, int]] = {}
    for axis, gone in partition.split(removed):
        for name, power, offset in axis.scales if gone.any() else ():
            factor = factors.get(name, (1.0, 0))[0] * (axis.size / int((~gone).sum())) ** float(power)
            factors[name] = factor, offset
    return factors


def scaled(tensor: torch.Tensor, factor: float, offset: int) -> torch.Tensor:
    """(tensor + offset) * factor - offset, rounded once."""
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return (wide * factor + offset * (factor - 1)).to(tensor.dtype)


def cut_(model: nn.Module, partition: ZIGPartition, removed: np.ndarray, attributes: Mapping[Attribute, int]) -> None:
    """Cuts the ZIGs in `removed`, bool (num_zigs,), out of the tensors, and sets the attributes, in place; tied
    tensors stay tied."""
    old = named_tensors(model)
    new: dict[str, torch.Tensor] = {}
    for (name, dim), gone in removed_positions(partition, removed).items():
        cut = new.get(name, old[name].detach())
        keep = torch.from_numpy(np.delete(np.arange(cut.shape[dim]), gone))
        new[name] = cut.index_select(dim, keep.to(cut.device))
    for name, (factor, offset) in scale_factors(partition, removed).items():
        new[name] = scaled(new.get(name, old[name].detach()), factor, offset)
    for name, cut in new.items():
        if isinstance(old[name], nn.Parameter):
            new[name] = nn.Parameter(cut, old[name].requires_grad)
    put_(model, {id(old[name]): cut for name, cut in new.items()})
    for (path, name, index), value in attributes.items():
        module = model.get_submodule(path)
        if index is not None:
            values = list(vars(module)[name])
            values[index] = value
            value = type(vars(module)[name])(values)
        set_sizes_(module, {name: value})
    for module in model.modules():
        set_sizes_(module, own_sizes(module))


def put_(model: nn.Module, new: Mapping[int, torch.Tensor]) -> None:
    """Puts new tensors in the place of old ones, wherever these (by their id) are parameters or buffers."""
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if id(tensor) in new:
                    store[name] = new[id(tensor)]


OWN_SIZES = {  # what the first dimensions of a layer's weight are called; a subclass before its base
    nn.Linear: ("out_features", "in_features"),
    Conv1D: ("nx", "nf"),
    nn.Embedding: ("num_embeddings", "embedding_dim"),
    nn.modules.conv._ConvTransposeNd: ("in_channels", "out_channels"),
    nn.modules.conv._ConvNd: ("out_channels", "in_channels"),
    nn.modules.batchnorm._NormBase: ("num_features",),
    nn.GroupNorm: ("num_channels",),
}


def own_sizes(module: nn.Module) -> dict[str, int]:
    """The sizes that torch's layers keep for the reader, by their weights: `in_features`, `num_channels`, ..."""
    names = next((names for layer, names in OWN_SIZES.items() if isinstance(module, layer)), None)
    if names is None or module.weight is None:
        return {}
    sizes = dict(zip(names, module.weight.shape, strict=False))
    if isinstance(module, nn.modules.conv._ConvNd):
        sizes[names[1]] *= module.groups
    return sizes


def compact(model: nn.Module, partition: ZIGPartition, plan: PruningPlan) -> nn.Module:
    """Cuts out what `plan` removes, in place; the output equals that of the model with those ZIGs zeroed.

    A Transformers model becomes an instance of a subclass of its own class and name that saves its widths in
    `config.oto`; `from_pretrained` reads them, and so does whatever is built from this config object: for a dense
    twin copy it before. (OTOv2, arXiv 2303.06862, Sec. 3.3)

    Args:
        model: the model the partition was made for.
        partition: its ZIGs.
        plan: kept positions per axis.

    Returns:
        the same model object.

    Raises:
        ValueError: the plan doesn't fit the partition.
        OTOError: the model isn't the one the partition was made for.

    Example:
        >>> from hf_oto import partition_zigs
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> partition = partition_zigs(model, {"input": torch.ones(1, 3)})
        >>> compact(model, partition, PruningPlan({"0.weight[0]": [0, 2, 5]}))[0]
        Linear(in_features=3, out_features=3, bias=True)
    """
    removed, attributes = resolve(partition, plan)
    partition.tensors(model)  # raises where the model is another one
    before = _sizes(model)
    cut_(model, partition, removed, attributes)
    if isinstance(model, PreTrainedModel) and removed.any():
        become_compact_(model, _record(model, partition, removed, before))
    return model


def _sizes(model: nn.Module) -> dict[tuple[str, str, str], Any]:
    """(module path, "attributes" or "shapes", name) -> size or sizes, under every name that something tied has: a
    model is built, and its record restored, before its weights are tied."""
    found = {(path, "attributes", n): v for path, module in model.named_modules() for n, v in sizes_of(module).items()}
    for name, tensor in named_tensors(model).items():
        path, _, leaf = name.rpartition(".")
        found[path, "shapes", leaf] = tensor.shape
    return found


def _record(model: nn.Module, partition: ZIGPartition, removed: np.ndarray, before: dict[tuple, Any]) -> dict:
    """What modeling_oto.py needs to build the compact model from a stock one, and `to_dense` to undo the cut."""
    modules: dict[str, dict[str, dict[str, Any]]] = {}
    for (path, part, name), now in _sizes(model).items():
        old = before.get((path, part, name), now)
        if now != old:
            value = list(now) if isinstance(now, (list, tuple)) else now
            if part == "shapes":
                value = [n if n != o else None for n, o in zip(now, old, strict=True)]
            modules.setdefault(path, {}).setdefault(part, {})[name] = value
    cut_before = vars(model.config).get("oto", {"cuts": []})["cuts"]
    step = max((cut["step"] for cut in cut_before), default=-1) + 1
    cuts = []
    for axis, gone in partition.split(removed):
        if gone.any():
            members = [
                [m.param, m.dim, int(m.role == "statistic")]  # a variance or direction must not be zero
                + ([m.start, m.outer, m.inner] if m.index is None else [m.index.tolist()])
                for m in axis.members
            ]
            bits = int.from_bytes(np.packbits(~gone, bitorder="little").tobytes(), "little")
            scales = [[s.param, *s.power.as_integer_ratio(), s.offset] for s in axis.scales]
            cuts.append({"step": step, "size": axis.size, "kept": f"{bits:x}", "members": members, "scales": scales})
    return {"version": VERSION, "modules": modules, "cuts": cuts}


@torch.no_grad()
def to_dense(model: PreTrainedModel) -> PreTrainedModel:
    """The stock model of the same outputs: dense widths again, what was cut filled with zeros.

    Args:
        model: a compact model; it is not changed.

    Returns:
        a model of the stock class, which saves and loads without hf_oto.

    Raises:
        OTOError: the model is no Transformers model.

    Example:
        >>> from hf_oto import partition_zigs
        >>> from transformers import ViTConfig, ViTModel
        >>> config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        >>> model = ViTModel(config)
        >>> plan = PruningPlan({"layers.0.mlp.fc1.weight[0]": range(4)})
        >>> small = compact(model, partition_zigs(model), plan)
        >>> small.layers[0].mlp.fc1.out_features, to_dense(small).layers[0].mlp.fc1.out_features
        (4, 16)
    """
    if not isinstance(model, PreTrainedModel):
        raise OTOError(f"to_dense needs a Transformers model, one with a config; this is a {type(model).__name__}")
    if "oto" in vars(model.config):
        validate(model.config.oto)
    config = copy.deepcopy(model.config)
    cuts = vars(config).pop("oto", {"cuts": []})["cuts"]
    vars(config).pop("auto_map", None)
    state = model.state_dict(keep_vars=True)
    first = {id(t): name for name, t in reversed(state.items())}  # of what is tied the record knows the first name
    tensors = {name: state[name].detach() for name in first.values()}
    dense = stock_model(model, config)
    shapes = {name: tensor.shape for name, tensor in dense.state_dict().items()}
    for step in sorted({cut["step"] for cut in cuts}, reverse=True):
        tensors = _filled(tensors, [cut for cut in cuts if cut["step"] == step], shapes)
    for name in tensors.keys() & shapes.keys():
        now, stock = tuple(tensors[name].shape), tuple(shapes[name])
        require(now == stock, f"with all its cuts undone {name} has shape {now}, in the stock model {stock}")
    dense.load_state_dict({name: tensors[first[id(tensor)]] for name, tensor in state.items()})
    return dense


def stock_model(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A new model of the stock class of `model`, with this config and weights not yet `model`'s."""
    with torch.random.fork_rng():  # weights nobody keeps must not move what training draws next
        stock = getattr(type(model), "_oto_stock", type(model))(config)
    stock = stock.to(device=model.device, dtype=model.dtype)
    if model.can_generate():
        stock.generation_config = copy.deepcopy(model.generation_config)
    return stock.train(model.training)


def _filled(
    tensors: dict[str, torch.Tensor], cuts: list[dict[str, Any]], dense: Mapping[str, torch.Size]
) -> dict[str, torch.Tensor]:
    """The tensors before these cuts: scaled back, zeros where something was cut, ones where zeros would not do."""
    axes, removed = [], []
    for cut in cuts:
        size, members = cut["size"], []
        for name, dim, one, *layout in cut["members"]:
            layout = layout if len(layout) == 3 else [0, 1, 1, np.array(layout[0])]
            m = Member(name, dim, "statistic" if one else "producer", *layout)
            fits = name in tensors and dim < len(dense[name]) and m.stop(size) <= dense[name][dim]
            require(fits, f"the stock model has no {name}[{dim}] of {m.stop(size)} positions")
            members.append(m)
        scales = [Scale(name, Fraction(over, under), offset) for name, over, under, offset in cut["scales"]]
        axes.append(PrunableAxis("", "", size, tuple(members), scales=tuple(scales)))
        packed = np.frombuffer(int(cut["kept"], 16).to_bytes(-(-size // 8), "little"), np.uint8)
        removed.append(np.unpackbits(packed, bitorder="little", count=size) == 0)
    partition, gone = ZIGPartition(tuple(axes), {}), np.concatenate(removed)
    fill = {(m.param, m.dim): int(m.role == "statistic") for axis in axes for m in axis.members}
    filled = dict(tensors)
    for name, (factor, offset) in scale_factors(partition, gone).items():
        require(name in tensors and 0 < factor < np.inf, f"{name} cannot be scaled by {factor}")
        filled[name] = scaled(filled[name], 1 / factor, offset)
    for (name, dim), lost in removed_positions(partition, gone).items():
        old = filled[name]
        shape = list(old.shape)
        shape[dim] += len(lost)
        stay = np.setdiff1d(np.arange(shape[dim]), lost)
        fits = len(stay) == old.shape[dim] and shape[dim] <= dense[name][dim]
        require(fits, f"its cuts of {name}[{dim}], of size {old.shape[dim]} now, overlap or are too many")
        new = old.new_full(shape, fill[name, dim])
        filled[name] = new.index_copy_(dim, torch.from_numpy(stay).to(old.device), old)
    return filled
