"""A cut: what of a plan can go, put on a model and taken off again, or kept.

Stands between the partition and everything that needs a smaller model. `resolve` decides once what goes; `TrialCut`
puts that on the user's own model for a moment; `compact` keeps it, tensor by tensor, and writes the record of it into
the model's config.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .calls import outermost_pretrained
from .evaluating import renew_caches_
from .modeling_oto import VERSION, become_compact_, named_tensors, set_sizes_, sizes_of
from .restore import contents, places, put_back, restored
from .sizes import Attribute
from .wide import storage_of
from .zigs import PruningPlan, ZIGPartition

logger = logging.getLogger(__name__)


class Cut(NamedTuple):
    """What goes, resolved once: every use of it is the same cut.

    Attributes:
        partition: the ZIGs.
        removed: which of them go, bool (num_zigs,).
        attributes: the sizes that modules keep, as they become.
        scales: parameters that change for the averages taken over what goes: name -> (factor, offset), see `scaled`.
    """

    partition: ZIGPartition
    removed: np.ndarray
    attributes: Mapping[Attribute, int]
    scales: Mapping[str, tuple[float, int]]

    @property
    def positions(self) -> dict[str, dict[int, np.ndarray]]:
        """Parameter or buffer -> dimension -> the positions of it that go."""
        gone: dict[str, dict[int, list[np.ndarray]]] = {}
        for _, member, index in self.partition.slices(self.removed):
            gone.setdefault(member.param, {}).setdefault(member.dim, []).append(index)
        return {name: {dim: np.concatenate(some) for dim, some in dims.items()} for name, dims in gone.items()}


def resolve(partition: ZIGPartition, plan: PruningPlan, warn: bool = True) -> Cut:
    """What can be cut of a plan.

    Where the sizes that modules keep contradict each other, or a comparison of sizes would come out otherwise, some
    ZIGs stay as zeros: correct, only larger.

    Args:
        warn: whether to say so; not where a plan is only tried.

    Raises:
        ValueError: the plan doesn't fit the partition.
    """
    removed = plan.removed(partition)
    attributes: Mapping[Attribute, int] = {}
    staying, layer = 0, ""
    while True:
        for axis, gone in partition.split(removed):
            # of an axis that keeps a multiple, some that could go stay as zeros
            gone[np.flatnonzero(gone)[: -int((~gone).sum()) % axis.multiple]] = False
        attributes, conflicts = ({}, []) if partition.sizes is None else partition.sizes.solve(removed)
        if not conflicts:
            break
        back = partition.sizes.involved(conflicts, removed)
        back = back[: (len(back) + 1) // 2]  # half of them at a time: fewer may do
        removed[back] = False
        staying, layer = staying + len(back), layer or conflicts[0].layer
    if staying and warn:
        logger.warning("%d ZIGs stay as zeros: the sizes used in %s don't fit them", staying, layer or "forward")
    return Cut(partition, removed, attributes, _scale_factors(partition, removed))


def _scale_factors(partition: ZIGPartition, removed: np.ndarray) -> dict[str, tuple[float, int]]:
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


def cut_(model: nn.Module, cut: Cut, widening: torch.dtype | None = None) -> dict[int, tuple[float, float]]:
    """Cuts the tensors of a model, one at a time, and sets the sizes of its modules, in place; ties stay ties.

    Args:
        widening: what will be widened to this dtype before it is used is not scaled here, which would round it.

    Returns:
        the scales that are still to be applied, by storage, as `WideArithmetic` takes them.
    """
    to_scale: dict[int, tuple[float, float]] = {}
    positions, somewhere = cut.positions, places(model)
    ids = {name: id(tensor) for name, tensor in named_tensors(model).items()}
    names = {ids[name]: name for name in reversed([*(positions | cut.scales)])}  # what is tied is cut once
    for tied, name in reversed(names.items()):
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        old = module._parameters[leaf] if leaf in module._parameters else module._buffers[leaf]
        new = old.detach()
        for dim, gone in positions.get(name, {}).items():
            keep = torch.from_numpy(np.delete(np.arange(new.shape[dim]), gone))
            new = new.index_select(dim, keep.to(new.device))
        if name in cut.scales and (widening is None or new.dtype == widening):
            new = scaled(new, *cut.scales[name])
        elif name in cut.scales:
            new = new if name in positions else new.clone()  # the full weight's storage is not to be scaled
            to_scale[storage_of(new)] = cut.scales[name]
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, old.requires_grad)
        for place in somewhere[tied]:
            place.put(new)
        del old  # now it can go, before the next one is cut
    for (path, name, index), value in cut.attributes.items():
        module = model.get_submodule(path)
        if index is not None:
            values = list(vars(module)[name])
            values[index] = value
            value = type(vars(module)[name])(values)
        set_sizes_(module, {name: value})
    for module in model.modules():
        set_sizes_(module, own_sizes(module))
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()  # it knows its weights by their addresses, too
    return to_scale


class TrialCut:
    """A cut that is put on a model and taken off again: `with TrialCut(model, cut): ...`, as often as it takes.

    Outside the `with` the model is as it was, bit by bit, whatever was raised inside. It holds what the cut keeps
    beside the model, and no more; what is not cut, both share.

    Args:
        widening: see `cut_`.

    Attributes:
        scales: what it returns.
    """

    def __init__(self, model: nn.Module, cut: Cut, widening: torch.dtype | None = None) -> None:
        self.model = model
        with restored(model):
            self.scales = cut_(model, cut, widening)
            self._small = contents(model)

    def __enter__(self) -> nn.Module:
        self._full = contents(self.model)
        try:
            put_back(self._small)
        except BaseException:  # Ctrl-C, which waits until all is put, comes before the `with` that would undo it
            self.__exit__()
            raise
        return self.model

    def __exit__(self, *error: Any) -> None:
        put_back(self._full)
        del self._full


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
    if names is None:
        return {}
    # a parametrised weight is computed when it is read, which in train mode may move what it is computed with
    modes = {part: part.training for part in module.modules()}
    module.eval()
    weight = module.weight
    for part, training in modes.items():
        part.training = training
    if weight is None:
        return {}
    shape = list(weight.shape)
    if "weight" in vars(module):  # a hook computes it before every forward: it is still that of the last one
        parts = [
            p.shape for name, p in module._parameters.items() if name.startswith("weight_") and p.dim() == len(shape)
        ]
        shape = [max(sizes) for sizes in zip(*parts, strict=True)] or shape
    sizes = dict(zip(names, shape, strict=False))
    if isinstance(module, nn.modules.conv._ConvNd):
        sizes[names[1]] *= module.groups
    return sizes


def compact(model: nn.Module, partition: ZIGPartition, plan: PruningPlan) -> nn.Module:
    """Cuts out what `plan` removes, in place; the output equals that of the model with those ZIGs zeroed.

    A Transformers model, and every one inside another module, becomes an instance of a subclass of its own class and
    name that saves its widths in `config.oto`; `from_pretrained` reads them, and so does whatever is built from this
    config object: for a dense twin copy it before. (OTOv2, arXiv 2303.06862, Sec. 3.3)

    Tensors are cut one by one: the peak is the model and the largest of them.

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
    cut = resolve(partition, plan)
    partition.tensors(model)  # raises where the model is another one
    if cut.removed.any():
        compact_(model, cut)
    return model


@contextlib.contextmanager
def trial_compact(model: nn.Module, cut: Cut) -> Iterator[None]:
    """While open, the model is what `compact` makes of it, class and config too."""
    classes = {part: type(part) for part in outermost_pretrained(model).values()}
    with restored(model):
        try:
            compact_(model, cut)
            yield
        finally:
            for part, cls in classes.items():
                part.__class__ = cls


def compact_(model: nn.Module, cut: Cut) -> None:
    """Keeps a cut: in tensors, sizes and caches, in the class and in the record of the config; see `compact`."""
    recorded = outermost_pretrained(model)
    before = {path: _sizes(part) for path, part in recorded.items()}
    cut_(model, cut)
    renew_caches_(model)
    for path, part in recorded.items():
        record = _record(part, cut, before[path], f"{path}." if path else "")
        if record["cuts"]:
            become_compact_(part, record)


def _sizes(model: nn.Module) -> dict[tuple[str, str, str], Any]:
    """(module path, "attributes" or "shapes", name) -> size or sizes, under every name that something tied has: a
    model is built, and its record restored, before its weights are tied."""
    found: dict[tuple[str, str, str], Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found |= {(path, "attributes", name): value for name, value in sizes_of(module).items()}
    for name, tensor in named_tensors(model).items():
        path, _, leaf = name.rpartition(".")
        found[path, "shapes", leaf] = tensor.shape
    return found


def _record(model: PreTrainedModel, cut: Cut, before: dict[tuple[str, str, str], Any], prefix: str) -> dict[str, Any]:
    """What modeling_oto.py needs to build the compact model from a stock one, and `to_dense` to undo the cut.

    Args:
        before: `_sizes` of the model before the cut.
        prefix: of its parameters in the model that was cut.
    """
    modules: dict[str, dict[str, dict[str, Any]]] = {}
    for (path, part, name), now in _sizes(model).items():
        old = before.get((path, part, name), now)
        if now != old:
            value = list(now) if isinstance(now, (list, tuple)) else now
            if part == "shapes":
                value = [n if n != o else None for n, o in zip(now, old, strict=True)]
            modules.setdefault(path, {}).setdefault(part, {})[name] = value
    cut_before = vars(model.config).get("oto", {"cuts": []})["cuts"]
    step = max((earlier["step"] for earlier in cut_before), default=-1) + 1
    cuts = []
    for axis, gone in cut.partition.split(cut.removed):
        members = [
            [m.param.removeprefix(prefix), m.dim, int(m.role == "statistic")]  # a variance or direction is never zero
            + ([m.start, m.outer, m.inner] if m.index is None else [m.index.tolist()])
            for m in axis.members
            if m.param.startswith(prefix)
        ]
        if gone.any() and members:
            bits = int.from_bytes(np.packbits(~gone, bitorder="little").tobytes(), "little")
            scales = [
                [scale.param.removeprefix(prefix), *scale.power.as_integer_ratio(), scale.offset]
                for scale in axis.scales
                if scale.param.startswith(prefix)
            ]
            cuts.append({"step": step, "size": axis.size, "kept": f"{bits:x}", "members": members, "scales": scales})
    return {"version": VERSION, "modules": modules, "cuts": cuts}
