"""A cut: what of a plan can go, put on a model and taken off again.

It stands between the partition and everything that needs a smaller model. `resolve` decides once what goes; `TrialCut`
puts the cut on the user's own model for a moment; how a cut is kept, and recorded, is in compaction.py.

Worked example: in Linear(3, 8), ReLU, Linear(8, 2) the plan {"0.weight[0]": [0, 2, 5]} removes 5 of 8 ZIGs. The cut
takes 5 rows from 0.weight, 5 elements from 0.bias and 5 columns from 2.weight, and sets the attributes
out_features of the first layer and in_features of the second to 3.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from .layers import is_of_one_group, names_of_own_sizes
from .modeling_oto import named_tensors, set_sizes_
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
        pieces: dict[str, dict[int, list[np.ndarray]]] = {}  # one for each axis that lies on the dimension
        for _, member, index in self.partition.slices(self.removed):
            pieces.setdefault(member.param, {}).setdefault(member.dim, []).append(index)
        positions: dict[str, dict[int, np.ndarray]] = {}
        for name, pieces_of_dims in pieces.items():
            positions[name] = {dim: np.concatenate(arrays) for dim, arrays in pieces_of_dims.items()}
        return positions

    @torch.no_grad()
    def of_tensors(self, tensors: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
        """Cuts copies of a model's tensors, an average of its weights, say, as the model was cut.

        Args:
            tensors: copies from before the cut, by the names of the model's parameters and buffers.
            model: the model after the cut. It knows which names are those of one tied tensor.

        Returns:
            new tensors, and those that lose nothing as they are.

        Raises:
            ValueError: the model has no tensor of some name, or a copy hasn't the shape from before the cut.

        Example:
            >>> from hf_oto import compact, partition_zigs
            >>> from hf_oto.cut import resolve
            >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
            >>> copies = {"0.weight": model[0].weight.clone(), "2.bias": model[2].bias.clone()}
            >>> partition = partition_zigs(model, {"input": torch.ones(1, 3)})
            >>> plan = PruningPlan({"0.weight[0]": [0, 2, 5]})
            >>> cut = resolve(partition, plan)
            >>> copies = cut.of_tensors(copies, compact(model, partition, plan))
            >>> {name: tuple(tensor.shape) for name, tensor in copies.items()}
            {'0.weight': (3, 3), '2.bias': (2,)}
        """
        positions = self.positions
        tensors_of_model = named_tensors(model)
        name_in_cut = {id(tensors_of_model[name]): name for name in [*positions, *self.scales]}
        cut_tensors = {}
        for name, tensor in tensors.items():
            if name not in tensors_of_model:
                raise ValueError(f"the model has no parameter or buffer {name!r}")
            of_model = tensors_of_model[name]
            name_of_tied = name_in_cut.get(id(of_model), name)
            gone_of_dims = positions.get(name_of_tied, {})
            shape_before = list(of_model.shape)
            for dim, gone in gone_of_dims.items():
                shape_before[dim] += len(gone)
            if list(tensor.shape) != shape_before:
                raise ValueError(f"before the cut {name} had shape {shape_before}, and its copy has {[*tensor.shape]}")
            new = _without_positions(tensor, gone_of_dims)
            if name_of_tied in self.scales:
                new = scaled(new, *self.scales[name_of_tied])
            cut_tensors[name] = new
        return cut_tensors


def resolve(partition: ZIGPartition, plan: PruningPlan, warn: bool = True, gone: np.ndarray | None = None) -> Cut:
    """Decides what of a plan can be cut.

    Where the sizes that modules keep contradict each other, or a comparison of sizes would come out otherwise, some
    ZIGs stay as zeros: correct, only larger.

    Args:
        warn: whether to log a warning about ZIGs that stay; False where a plan is only tried.
        gone: the ZIGs that an earlier cut has taken, which can't stay, bool (num_zigs,); None: no ZIG.

    Raises:
        ValueError: the plan doesn't fit the partition.
    """
    if gone is None:
        gone = np.zeros(partition.num_zigs, bool)
    removed = plan.removed(partition) | gone
    attributes: Mapping[Attribute, int] = {}
    num_staying = 0
    layer_to_blame = ""
    while True:
        _keep_multiples_(partition, removed, gone)
        if partition.sizes is None:
            break
        attributes, conflicts = partition.sizes.solve(removed)
        if not conflicts:
            break
        # what is gone went without a conflict: there is always something else to put back
        involved = np.setdiff1d(partition.sizes.involved(conflicts, removed), np.flatnonzero(gone))
        if not len(involved):
            involved = np.flatnonzero(removed & ~gone)
        put_back_now = involved[: (len(involved) + 1) // 2]  # half of them at a time: it may be enough
        removed[put_back_now] = False
        num_staying += len(put_back_now)
        layer_to_blame = layer_to_blame or conflicts[0].layer
    if num_staying and warn:
        layer_to_blame = layer_to_blame or "forward"
        logger.warning("%d ZIGs stay as zeros: the sizes used in %s don't fit them", num_staying, layer_to_blame)
    return Cut(partition, removed, attributes, scale_factors(partition, removed))


def _keep_multiples_(partition: ZIGPartition, removed: np.ndarray, gone: np.ndarray) -> None:
    """Puts back, in place, as many ZIGs of every axis as it takes to keep a multiple of `axis.multiple`, and not none.

    What is gone left such a multiple, so that the others are enough.
    """
    parts = zip(partition.split(removed), partition.split(gone), strict=True)
    for (axis, removed_of_axis), (_, gone_of_axis) in parts:
        num_kept = int((~removed_of_axis).sum())
        num_missing = -num_kept % axis.multiple
        if num_kept == 0:  # the one ZIG that a plan kept may be gone
            num_missing = axis.multiple
        may_return = np.flatnonzero(removed_of_axis & ~gone_of_axis)
        removed_of_axis[may_return[:num_missing]] = False


def scale_factors(partition: ZIGPartition, removed: np.ndarray) -> dict[str, tuple[float, int]]:
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
            vars(new).update(vars(old))  # whoever has marked the parameter finds the mark again
        for place in places_of_id[tensor_id]:
            place.put(new)
        del old  # so that its memory is free before the next tensor is cut
    _set_sizes_(model, cut.attributes)
    return scales_to_apply


def grow_(model: nn.Module, cut: Cut) -> None:
    """Undoes a cut, in place, but for the weights that went: there are zeros, which change no output.

    Args:
        cut: one without scales.
    """
    sizes_before = {}
    if cut.partition.sizes is not None:
        sizes_before = {attribute: cut.partition.sizes.values[attribute] for attribute in cut.attributes}
    statistics = set()  # a direction of a weight is one along its rows only: along its columns it reads
    for axis in cut.partition.axes:
        statistics.update((m.param, m.dim) for m in axis.members if m.role == "statistic")
    places_of_id = places(model)
    tensors = named_tensors(model)
    grown = set()
    for name, gone_of_dims in cut.positions.items():
        old = tensors[name]
        if id(old) in grown:  # it is tied, and has been grown under another name
            continue
        grown.add(id(old))
        new = old.detach()
        for dim, gone in gone_of_dims.items():
            # a variance of zero would divide by zero
            new = _with_positions(new, dim, gone, fill=1.0 if (name, dim) in statistics else 0.0)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, old.requires_grad)
            vars(new).update(vars(old))
        for place in places_of_id[id(old)]:
            place.put(new)
    _set_sizes_(model, sizes_before)


def _with_positions(tensor: torch.Tensor, dim: int, gone: np.ndarray, fill: float) -> torch.Tensor:
    """A tensor that has positions again which were taken out of it, all with one value."""
    shape = list(tensor.shape)
    shape[dim] += len(gone)
    kept = torch.from_numpy(np.delete(np.arange(shape[dim]), gone))
    return tensor.new_full(shape, fill).index_copy_(dim, kept.to(tensor.device), tensor)


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


class Trial:
    """A change of a model that is put on and taken off again: `with trial: ...`, as often as it takes.

    Outside the `with` the model is as it was, bit by bit, whatever was raised inside. The trial holds a copy of every
    tensor that is changed, beside the one that the model has; the other tensors are shared.

    Args:
        change: what is done to the model, once.

    Attributes:
        result: what `change` returned.
    """

    def __init__(self, model: nn.Module, change: Callable[[nn.Module], Any]) -> None:
        self.model = model
        with restored(model):
            self.result = change(model)
            self._changed = contents(model)

    def __enter__(self) -> nn.Module:
        self._unchanged = contents(self.model)
        try:
            put_back(self._changed)
        except BaseException:  # a Ctrl-C that waited for `put_back` comes before the `with` that would undo it
            self.__exit__()
            raise
        return self.model

    def __exit__(self, *error: Any) -> None:
        put_back(self._unchanged)
        del self._unchanged


class TrialCut(Trial):
    """A cut that is put on a model and taken off again; see `Trial`.

    Args:
        widening: see `cut_`.
    """

    def __init__(self, model: nn.Module, cut: Cut, widening: torch.dtype | None = None) -> None:
        super().__init__(model, lambda model: cut_(model, cut, widening))

    @property
    def scales(self) -> dict[int, tuple[float, float]]:
        """What `cut_` returned."""
        return self.result


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
