"""Cutting: slices parameters and buffers, and sets the sizes modules keep.

Stands after training, when the plan says which ZIGs are zero; what it did is written into the model's config.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .modeling_oto import VERSION, become_compact_, named_tensors, set_sizes_, sizes_of
from .sizes import Attribute
from .zigs import PruningPlan, ZIGPartition

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
