"""A cut: what of a plan can go, put on a model and taken off again, or kept.

It stands between the partition and everything that needs a smaller model. `resolve` decides once what goes; `TrialCut`
puts the cut on the user's own model for a moment; `compact` keeps it, tensor by tensor, and writes the record of it
into the model's config.

Worked example: in Linear(3, 8), ReLU, Linear(8, 2) the plan {"0.weight[0]": [0, 2, 5]} removes 5 of 8 ZIGs. The cut
takes 5 rows from 0.weight, 5 elements from 0.bias and 5 columns from 2.weight, and sets the attributes
out_features of the first layer and in_features of the second to 3.
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

from .calls import outermost_pretrained
from .evaluating import renew_caches_
from .layers import is_of_one_group, names_of_own_sizes
from .modeling_oto import VERSION, become_compact_, named_tensors, set_sizes_, sizes_of
from .restore import contents, places, put_back, restored
from .sizes import Attribute
from .wide import storage_of
from .zigs import PrunableAxis, PruningPlan, ZIGPartition

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
        pieces: dict[str, dict[int, list[np.ndarray]]] = {}  # one for each axis that lies on the dimension
        for _, member, index in self.partition.slices(self.removed):
            pieces.setdefault(member.param, {}).setdefault(member.dim, []).append(index)
        positions: dict[str, dict[int, np.ndarray]] = {}
        for name, pieces_of_dims in pieces.items():
            positions[name] = {dim: np.concatenate(arrays) for dim, arrays in pieces_of_dims.items()}
        return positions


def resolve(partition: ZIGPartition, plan: PruningPlan, warn: bool = True) -> Cut:
    """Decides what of a plan can be cut.

    Where the sizes that modules keep contradict each other, or a comparison of sizes would come out otherwise, some
    ZIGs stay as zeros: correct, only larger.

    Args:
        warn: whether to log a warning about ZIGs that stay; False where a plan is only tried.

    Raises:
        ValueError: the plan doesn't fit the partition.
    """
    removed = plan.removed(partition)
    attributes: Mapping[Attribute, int] = {}
    num_staying = 0
    layer_to_blame = ""
    while True:
        _keep_multiples_(partition, removed)
        if partition.sizes is None:
            break
        attributes, conflicts = partition.sizes.solve(removed)
        if not conflicts:
            break
        involved = partition.sizes.involved(conflicts, removed)
        put_back_now = involved[: (len(involved) + 1) // 2]  # half of them at a time: it may be enough
        removed[put_back_now] = False
        num_staying += len(put_back_now)
        layer_to_blame = layer_to_blame or conflicts[0].layer
    if num_staying and warn:
        layer_to_blame = layer_to_blame or "forward"
        logger.warning("%d ZIGs stay as zeros: the sizes used in %s don't fit them", num_staying, layer_to_blame)
    return Cut(partition, removed, attributes, _scale_factors(partition, removed))


def _keep_multiples_(partition: ZIGPartition, removed: np.ndarray) -> None:
    """Puts back, in place, as many ZIGs of every axis as it takes to keep a multiple of `axis.multiple`."""
    for axis, removed_of_axis in partition.split(removed):
        num_kept = int((~removed_of_axis).sum())
        num_missing = -num_kept % axis.multiple
        removed_of_axis[np.flatnonzero(removed_of_axis)[:num_missing]] = False


def _scale_factors(partition: ZIGPartition, removed: np.ndarray) -> dict[str, tuple[float, int]]:
    """Parameter -> (factor, offset), where the axes that a parameter lies on multiply the factor."""
    factors: dict[str, tuple[float, int]] = {}
    for axis, removed_of_axis in partition.split(removed):
        if not removed_of_axis.any():
            continue
        num_kept = int((~removed_of_axis).sum())
        for name, power, offset in axis.scales:
            factor_so_far, _ = factors.get(name, (1.0, 0))
            factors[name] = factor_so_far * (axis.size / num_kept) ** float(power), offset
    return factors


def scaled(tensor: torch.Tensor, factor: float, offset: int) -> torch.Tensor:
    """(tensor + offset) * factor - offset, rounded once."""
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return (wide * factor + offset * (factor - 1)).to(tensor.dtype)


def cut_(model: nn.Module, cut: Cut, widening: torch.dtype | None = None) -> dict[int, tuple[float, float]]:
    """Cuts the tensors of a model, one at a time, and sets the sizes of its modules, in place; ties stay ties.

    Args:
        widening: tensors that will be widened to this dtype before they are used are not scaled here, because scaling
            would round them.

    Returns:
        the scales that are still to be applied, by storage, as `WideArithmetic` takes them.
    """
    scales_to_apply: dict[int, tuple[float, float]] = {}
    positions = cut.positions
    places_of_id = places(model)
    id_of_name = {name: id(tensor) for name, tensor in named_tensors(model).items()}
    # a tied tensor has several names and is cut once, under the first of them
    name_of_id = {id_of_name[name]: name for name in reversed([*(positions | cut.scales)])}
    for tensor_id, name in reversed(name_of_id.items()):
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        old = module._parameters[leaf] if leaf in module._parameters else module._buffers[leaf]
        new = _without_positions(old.detach(), positions.get(name, {}))
        if name in cut.scales:
            if widening is None or new.dtype == widening:
                new = scaled(new, *cut.scales[name])
            else:
                if name not in positions:
                    new = new.clone()  # the scale belongs to a storage, and the full weight's is not to be scaled
                scales_to_apply[storage_of(new)] = cut.scales[name]
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, old.requires_grad)
        for place in places_of_id[tensor_id]:
            place.put(new)
        del old  # so that its memory is free before the next tensor is cut
    _set_sizes_(model, cut.attributes)
    return scales_to_apply


def _without_positions(tensor: torch.Tensor, positions: Mapping[int, np.ndarray]) -> torch.Tensor:
    """A tensor without some positions, dimension -> positions; the tensor itself where nothing goes."""
    for dim, gone in positions.items():
        kept = torch.from_numpy(np.delete(np.arange(tensor.shape[dim]), gone))
        tensor = tensor.index_select(dim, kept.to(tensor.device))
    return tensor


def _set_sizes_(model: nn.Module, attributes: Mapping[Attribute, int]) -> None:
    """Sets the sizes that modules keep to those of a model whose tensors have been cut."""
    for (path, name, index), value in attributes.items():
        module = model.get_submodule(path)
        if index is not None:  # one entry of a list or tuple of sizes
            whole = vars(module)[name]
            entries = list(whole)
            entries[index] = value
            value = type(whole)(entries)
        set_sizes_(module, {name: value})
    for module in model.modules():
        set_sizes_(module, own_sizes(module))
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()  # it knows its weights by their addresses, too


class TrialCut:
    """A cut that is put on a model and taken off again: `with TrialCut(model, cut): ...`, as often as it takes.

    Outside the `with` the model is as it was, bit by bit, whatever was raised inside. The trial holds a cut copy of
    every tensor that is cut, beside the full one; the tensors that are not cut are shared.

    Args:
        widening: see `cut_`.

    Attributes:
        scales: what `cut_` returned.
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
        except BaseException:  # a Ctrl-C that waited for `put_back` comes before the `with` that would undo it
            self.__exit__()
            raise
        return self.model

    def __exit__(self, *error: Any) -> None:
        put_back(self._full)
        del self._full


def own_sizes(module: nn.Module) -> dict[str, int]:
    """The sizes that torch's layers keep for the reader, by their weights: `in_features`, `num_channels`, ..."""
    names = names_of_own_sizes(module)
    weight = _weight_in_eval_mode(module) if names else None
    if weight is None:
        return {}
    shape = list(weight.shape)
    is_computed_by_hook = "weight" in vars(module)
    if is_computed_by_hook:  # before every forward, so that this weight is still as large as in the last one
        parts = []
        for name, p in module._parameters.items():
            if name.startswith("weight_") and p.dim() == len(shape):
                parts.append(p.shape)
        shape = [max(sizes) for sizes in zip(*parts, strict=True)] or shape
    sizes = {}
    for dim, (name, size) in enumerate(zip(names, shape, strict=False)):
        sizes[name] = size * module.groups if is_of_one_group(module, dim) else size
    return sizes


def _weight_in_eval_mode(module: nn.Module) -> torch.Tensor | None:
    """The weight of a layer: reading a parametrised one computes it, which in train mode may change its state."""
    training_of = {part: part.training for part in module.modules()}
    module.eval()
    weight = module.weight
    for part, training in training_of.items():
        part.training = training
    return weight


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
    sizes_before = {path: _sizes(part) for path, part in recorded.items()}
    cut_(model, cut)
    renew_caches_(model)
    for path, part in recorded.items():
        prefix = f"{path}." if path else ""
        record = _record(part, cut, sizes_before[path], prefix)
        if record["cuts"]:
            become_compact_(part, record)


# the record ----------------------------------------------------------------------------------------

SizeKey = tuple[str, str, str]  # module path, "attributes" or "shapes", name of the attribute or tensor


def _sizes(model: nn.Module) -> dict[SizeKey, Any]:
    """All sizes and shapes that a model's modules have, under every name that something tied has.

    (A model is built, and its record restored, before its weights are tied.)
    """
    sizes: dict[SizeKey, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, value in sizes_of(module).items():
            sizes[path, "attributes", name] = value
    for name, tensor in named_tensors(model).items():
        path, _, leaf = name.rpartition(".")
        sizes[path, "shapes", leaf] = tensor.shape
    return sizes


def _record(model: PreTrainedModel, cut: Cut, sizes_before: dict[SizeKey, Any], prefix: str) -> dict[str, Any]:
    """What modeling_oto.py needs to build the compact model from a stock one, and `to_dense` to undo the cut.

    Args:
        sizes_before: `_sizes` of the model before the cut.
        prefix: of the names of its parameters in the model that was cut.
    """
    modules: dict[str, dict[str, dict[str, Any]]] = {}
    for key, now in _sizes(model).items():
        before = sizes_before.get(key, now)
        if now == before:
            continue
        path, part, name = key
        value = list(now) if isinstance(now, (list, tuple)) else now
        if part == "shapes":  # None for a dimension that stays
            value = [n if n != old else None for n, old in zip(now, before, strict=True)]
        modules.setdefault(path, {}).setdefault(part, {})[name] = value

    earlier_cuts = vars(model.config).get("oto", {"cuts": []})["cuts"]
    step = max((earlier["step"] for earlier in earlier_cuts), default=-1) + 1
    cuts = []
    for axis, removed in cut.partition.split(cut.removed):
        members = _recorded_members(axis, prefix)
        if not (removed.any() and members):
            continue
        kept_bits = int.from_bytes(np.packbits(~removed, bitorder="little").tobytes(), "little")
        scales = []
        for scale in axis.scales:
            if scale.param.startswith(prefix):
                scales.append([scale.param.removeprefix(prefix), *scale.power.as_integer_ratio(), scale.offset])
        cuts.append({"step": step, "size": axis.size, "kept": f"{kept_bits:x}", "members": members, "scales": scales})
    return {"version": VERSION, "modules": modules, "cuts": cuts}


def _recorded_members(axis: PrunableAxis, prefix: str) -> list[list[Any]]:
    """[parameter, dimension, whether a cut position is filled in again with something else than zero, positions]."""
    members = []
    for m in axis.members:
        if m.param.startswith(prefix):
            is_never_zero = int(m.role == "statistic")  # a variance, or the direction of a weight
            positions = [m.start, m.outer, m.inner] if m.index is None else [m.index.tolist()]
            members.append([m.param.removeprefix(prefix), m.dim, is_never_zero, *positions])
    return members
