"""A cut: the part of a plan that can be removed from a model, for good or for a moment.

This file stands between the partition and everything that needs a smaller model. `resolve` decides once which ZIGs go,
`cut_` removes them, and `TrialCut` removes them for a moment only. compaction.py keeps a cut and records it.

Worked example: in Linear(3, 8), ReLU, Linear(8, 2) the plan {"0.weight[0]": [0, 2, 5]} removes 5 of 8 ZIGs. The cut
takes 5 rows from 0.weight, 5 elements from 0.bias and 5 columns from 2.weight, and sets the attributes
out_features of the first layer and in_features of the second to 3.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from .layers import own_sizes
from .modeling_oto import named_tensors, set_sizes_
from .restore import Place, contents, places, put_back, restored
from .sizes import Attribute, Equation, Sizes
from .wide import storage_of
from .zigs import PruningPlan, ZIGPartition

logger = logging.getLogger(__name__)


Positions = Mapping[str, Mapping[int, np.ndarray]]  # parameter or buffer -> dimension -> the positions of it that go
ScaleOfStorage = dict[int, tuple[float, float]]  # storage -> (factor, offset), as `WideArithmetic` takes them


class Scale(NamedTuple):
    """How a parameter changes because an average is taken over fewer ZIGs; see `scaled`."""

    factor: float
    offset: int


class Cut(NamedTuple):
    """What goes, resolved once: every use of it is the same cut.

    Attributes:
        partition: the ZIGs.
        removed: which of them go, bool (num_zigs,).
        attributes: the new values of the sizes that modules keep.
        scales: how parameters change that stand for averages over ZIGs, by name.
    """

    partition: ZIGPartition
    removed: np.ndarray
    attributes: Mapping[Attribute, int]
    scales: Mapping[str, Scale]

    @property
    def positions(self) -> Positions:
        """Parameter or buffer -> dimension -> the positions of it that go."""
        pieces: dict[tuple[str, int], list[np.ndarray]] = {}
        for _, member, index in self.partition.slices(self.removed):
            # several axes may lie on one dimension, each with positions of its own
            pieces_of_dim = pieces.setdefault((member.param, member.dim), [])
            pieces_of_dim.append(index)
        positions: dict[str, dict[int, np.ndarray]] = {}
        for (name, dim), pieces_of_dim in pieces.items():
            gone_of_dims = positions.setdefault(name, {})
            gone_of_dims[dim] = np.concatenate(pieces_of_dim)
        return positions

    @torch.no_grad()
    def of_tensors(self, tensors: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
        """Cuts copies of a model's tensors as the model was cut. Such a copy is an average of its weights, say.

        Args:
            tensors: copies from before the cut, by the names of the model's parameters and buffers.
            model: the model after the cut, which shows what names belong to one tied tensor.

        Returns:
            the cut copies; a copy that loses nothing is returned as it is.

        Raises:
            ValueError: the model has no tensor of a given name, or a copy hasn't the shape from before the cut.

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
        name_in_cut = {}  # id of a tensor of the model -> the one of its names that the cut knows
        for name in [*positions, *self.scales]:
            tensor_id = id(tensors_of_model[name])
            name_in_cut[tensor_id] = name
        cut_tensors = {}
        for name, tensor in tensors.items():
            if name not in tensors_of_model:
                raise ValueError(f"the model has no parameter or buffer {name!r}")
            of_model = tensors_of_model[name]
            known_name = name_in_cut.get(id(of_model), name)
            gone_of_dims = positions.get(known_name, {})
            shape = list(tensor.shape)
            shape_before = _shape_before(of_model, gone_of_dims)
            if shape != shape_before:
                raise ValueError(f"before the cut {name} had shape {shape_before}, and its copy has {shape}")
            cut_tensor = without_positions(tensor, gone_of_dims)
            scale = self.scales.get(known_name)
            if scale is not None:
                cut_tensor = scaled(cut_tensor, *scale)
            cut_tensors[name] = cut_tensor
        return cut_tensors


def _shape_before(tensor: torch.Tensor, gone_of_dims: Mapping[int, np.ndarray]) -> list[int]:
    """The shape that a tensor had before positions were cut out of it, dimension -> positions."""
    shape = list(tensor.shape)
    for dim, gone in gone_of_dims.items():
        shape[dim] += len(gone)
    return shape


def resolve(partition: ZIGPartition, plan: PruningPlan, warn: bool = True, gone: np.ndarray | None = None) -> Cut:
    """Decides what of a plan can be cut.

    Some ZIGs stay as zeros where the sizes that modules keep would contradict each other, or where a comparison of
    sizes would have another result. The model is then correct, only larger.

    Args:
        warn: whether to log a warning about ZIGs that stay; False where a plan is only tried.
        gone: the ZIGs that an earlier cut has removed, which can't come back, bool (num_zigs,); None: no ZIG.

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
        to_put_back = _zigs_to_put_back(partition.sizes, conflicts, removed, gone)
        removed[to_put_back] = False
        num_staying += len(to_put_back)
        layer_to_blame = layer_to_blame or conflicts[0].layer
    if num_staying and warn:
        layer_to_blame = layer_to_blame or "forward"
        logger.warning("%d ZIGs stay as zeros: the sizes used in %s don't fit them", num_staying, layer_to_blame)
    scales = scale_factors(partition, removed)
    return Cut(partition, removed, attributes, scales)


def _zigs_to_put_back(
    sizes: Sizes, conflicts: Sequence[Equation], removed: np.ndarray, gone: np.ndarray
) -> np.ndarray:
    """The numbers of removed ZIGs that stay after all, because equations of sizes can't hold without them.

    Args:
        removed, gone: bool (num_zigs,), see `resolve`.
    """
    involved = sizes.involved(conflicts, removed)
    # earlier cuts left no conflict: without the ZIGs that are gone there is always another one to put back
    candidates = np.setdiff1d(involved, np.flatnonzero(gone))
    if not len(candidates):
        candidates = np.flatnonzero(removed & ~gone)
    half = (len(candidates) + 1) // 2  # this may be enough; if it is not, the next round takes half of the others
    return candidates[:half]


def _keep_multiples_(partition: ZIGPartition, removed: np.ndarray, gone: np.ndarray) -> None:
    """Puts ZIGs of every axis back, in place, until their number is a positive multiple of `axis.multiple`.

    The earlier cuts left such a multiple too, so there are always enough ZIGs to put back.
    """
    removed_of_axes = partition.split(removed)
    gone_of_axes = partition.split(gone)
    for (axis, removed_of_axis), (_, gone_of_axis) in zip(removed_of_axes, gone_of_axes, strict=True):
        num_kept = int((~removed_of_axis).sum())
        num_missing = -num_kept % axis.multiple
        if num_kept == 0:  # a plan keeps one ZIG of every axis, but that one may be gone
            num_missing = axis.multiple
        may_return = np.flatnonzero(removed_of_axis & ~gone_of_axis)
        returning = may_return[:num_missing]
        removed_of_axis[returning] = False


def scale_factors(partition: ZIGPartition, removed: np.ndarray) -> dict[str, Scale]:
    """How a cut changes parameters, by name. The factors of all axes that a parameter lies on are multiplied."""
    scales: dict[str, Scale] = {}
    for axis, removed_of_axis in partition.split(removed):
        if not removed_of_axis.any():
            continue
        num_kept = int((~removed_of_axis).sum())
        ratio = axis.size / num_kept
        for name, power, offset in axis.scales:
            scale_so_far = scales.get(name, Scale(1.0, 0))
            factor = scale_so_far.factor * ratio ** float(power)
            scales[name] = Scale(factor, offset)
    return scales


def scaled(tensor: torch.Tensor, factor: float, offset: int) -> torch.Tensor:
    """(tensor + offset) * factor - offset, rounded once."""
    # in a narrow dtype each of the three operations would round
    wide_dtype = torch.promote_types(tensor.dtype, torch.float32)
    wide = tensor.to(wide_dtype)
    wide = wide * factor + offset * (factor - 1)
    return wide.to(tensor.dtype)


def cut_(model: nn.Module, cut: Cut, widening: torch.dtype | None = None) -> ScaleOfStorage:
    """Cuts the tensors of a model, one at a time, and sets the sizes of its modules, in place; ties stay ties.

    Args:
        widening: the dtype to which the caller widens tensors before every use. Tensors of other dtypes are not scaled
            here, because the result would be rounded.

    Returns:
        the scales that are still to be applied.
    """
    scales_to_apply: ScaleOfStorage = {}
    positions = cut.positions
    places_of_id = places(model)
    id_of_name = {name: id(tensor) for name, tensor in named_tensors(model).items()}
    name_of_id: dict[int, str] = {}
    for name in [*positions, *cut.scales]:
        # a tied tensor has several names and is cut once, under the first of them
        name_of_id.setdefault(id_of_name[name], name)
    for tensor_id, name in name_of_id.items():
        old = _tensor_of(model, name)
        new = without_positions(old.detach(), positions.get(name, {}))
        scale = cut.scales.get(name)
        if scale is not None and widening in (None, new.dtype):
            new = scaled(new, *scale)
        elif scale is not None:
            if name not in positions:
                new = new.clone()  # the scale belongs to a storage, and must not reach the full model's weight
            storage = storage_of(new)
            scales_to_apply[storage] = scale
        _replace_(old, new, places_of_id[tensor_id])
        del old  # so that its memory is free before the next tensor is cut
    _set_sizes_(model, cut.attributes)
    return scales_to_apply


def _tensor_of(model: nn.Module, name: str) -> torch.Tensor:
    """A parameter or buffer, as it is kept: reading the attribute would compute a parametrised one."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        return module._parameters[leaf]
    return module._buffers[leaf]


def _replace_(old: torch.Tensor, new: torch.Tensor, places_of_old: Sequence[Place]) -> None:
    """Puts a tensor in all the places of another one; a parameter is replaced by a parameter."""
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, old.requires_grad)
        marks = vars(old)  # attributes that others have set on the parameter, who look for them again
        vars(new).update(marks)
    for place in places_of_old:
        place.put(new)


def grow_(model: nn.Module, cut: Cut) -> None:
    """Undoes a cut, in place. The weights that were cut come back as zeros, which change no output.

    Args:
        cut: a cut without scales.
    """
    sizes_before = {}
    if cut.partition.sizes is not None:
        # the cut has the new sizes only; its partition is of the model before, and has the old ones
        values_before = cut.partition.sizes.values
        sizes_before = {attribute: values_before[attribute] for attribute in cut.attributes}
    statistics = set()  # (name, dimension): a weight may be a direction along its rows, and yet read along its columns
    for axis in cut.partition.axes:
        for member in axis.members:
            if member.role == "statistic":
                statistics.add((member.param, member.dim))
    places_of_id = places(model)
    tensors = named_tensors(model)
    grown_ids = set()
    for name, gone_of_dims in cut.positions.items():
        old = tensors[name]
        tensor_id = id(old)
        if tensor_id in grown_ids:  # the tensor is tied, and has been grown under another name
            continue
        grown_ids.add(tensor_id)
        new = old.detach()
        for dim, gone in gone_of_dims.items():
            # a variance of zero would divide by zero
            fill = 1.0 if (name, dim) in statistics else 0.0
            new = _with_positions(new, dim, gone, fill)
        _replace_(old, new, places_of_id[tensor_id])
    _set_sizes_(model, sizes_before)


def _with_positions(tensor: torch.Tensor, dim: int, gone: np.ndarray, fill: float) -> torch.Tensor:
    """A tensor with the positions that were cut out of it. These hold one value, `fill`."""
    shape = _shape_before(tensor, {dim: gone})
    kept = kept_positions(shape[dim], gone, tensor.device)
    grown = tensor.new_full(shape, fill)
    return grown.index_copy_(dim, kept, tensor)


def kept_positions(size: int, gone: np.ndarray, device: torch.device) -> torch.Tensor:
    """The positions of a dimension that stay, (size - len(gone),)."""
    kept = np.delete(np.arange(size), gone)
    return torch.from_numpy(kept).to(device)


def without_positions(tensor: torch.Tensor, positions: Mapping[int, np.ndarray]) -> torch.Tensor:
    """A tensor without some positions, dimension -> positions; the tensor itself where nothing goes."""
    for dim, gone in positions.items():
        size = tensor.shape[dim]
        kept = kept_positions(size, gone, tensor.device)
        tensor = tensor.index_select(dim, kept)
    return tensor


def _set_sizes_(model: nn.Module, attributes: Mapping[Attribute, int]) -> None:
    """Sets the sizes that modules keep, after the tensors of the model have been cut or grown."""
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
            # the kernel reads the weights at addresses that the layer has noted
            module._init_flat_weights()


class Trial:
    """A change of a model that lasts as long as a `with trial: ...`, which may be opened any number of times.

    Outside the `with` the model is as it was, bit by bit, whatever was raised inside. The trial holds a second copy of
    every tensor that the change touches; the other tensors are shared.

    Args:
        change: a function that changes the model in place. It is called once.

    Attributes:
        result: what `change` returned.
    """

    def __init__(self, model: nn.Module, change: Callable[[nn.Module], Any]) -> None:
        self.model = model
        with restored(model):
            self.result = change(model)
            # `restored` then takes the change off again
            self._changed = contents(model)

    def __enter__(self) -> nn.Module:
        self._unchanged = contents(self.model)
        try:
            put_back(self._changed)
        except BaseException:
            # a Ctrl-C may be raised at the end of `put_back`, when the `with` has not begun and would undo nothing
            self.__exit__()
            raise
        return self.model

    def __exit__(self, *error: Any) -> None:
        put_back(self._unchanged)
        del self._unchanged


class TrialCut(Trial):
    """A cut that lasts as long as a `with`; see `Trial`.

    Args:
        widening: see `cut_`.
    """

    def __init__(self, model: nn.Module, cut: Cut, widening: torch.dtype | None = None) -> None:
        def change(model: nn.Module) -> ScaleOfStorage:
            return cut_(model, cut, widening)

        super().__init__(model, change)

    @property
    def scales(self) -> ScaleOfStorage:
        """The scales that are still to be applied, as `cut_` returned them."""
        return self.result
