"""The way back: a compact model becomes the stock model of the same outputs, with zeros where something was cut.

The record of the compact model says which positions each step has cut; the last step is undone first.

Worked example: of a weight of 5 rows, one for each ZIG, the rows in the bits 0b10110 were kept. The 3 rows that are
left become rows 1, 2 and 4 again, and rows 0 and 3 are zeros.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Collection, Iterable
from itertools import groupby
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .calls import refuse_sharded
from .evaluating import random_states_kept
from .modeling_oto import OTOError, RecordedCut, check_cuts, cuts_of, named_tensors, require, validate
from .zigs import strided_positions

Tensors = dict[str, Tensor]  # by name
Dimension = tuple[str, int]  # (weight, dim)


@torch.no_grad()
def to_dense(model: PreTrainedModel) -> PreTrainedModel:
    """The stock model of the same outputs: dense widths again, with zeros where something was cut.

    Every tensor keeps its dtype and its `requires_grad`, every module its mode; all tensors lie on `model.device`.

    Args:
        model: a compact model; it is not changed.

    Returns:
        a model of the stock class, which saves and loads without hf_oto.

    Raises:
        OTOError: the model is no Transformers model, or its record does not fit it.

    Example:
        >>> from hf_oto import PruningPlan, compact, partition_zigs
        >>> from transformers import ViTConfig, ViTModel
        >>> config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        >>> model = ViTModel(config)
        >>> plan = PruningPlan({"layers.0.mlp.fc1.weight[0]": range(4)})
        >>> small = compact(model, partition_zigs(model), plan)
        >>> small.layers[0].mlp.fc1.out_features, to_dense(small).layers[0].mlp.fc1.out_features
        (4, 16)
    """
    if not isinstance(model, PreTrainedModel):
        class_name = type(model).__name__
        raise OTOError(f"to_dense needs a Transformers model, one with a config; this is a {class_name}")
    refuse_sharded(model, "save it with trainer.save_model, and load it in one process")
    cuts: list[RecordedCut] = []
    if "oto" in vars(model.config):
        record = model.config.oto
        validate(record)
        cuts = cuts_of(record)
    dense = stock_model(model, stock_config(model.config))
    dense_shapes: dict[str, torch.Size] = {}
    for name, tensor in dense.state_dict().items():
        dense_shapes[name] = tensor.shape
    compact_state = model.state_dict(keep_vars=True)  # the tensors themselves, so that tied ones have one id
    first_name: dict[int, str] = {}  # id of a tensor -> its name in the record, the first of its names
    for name, tensor in compact_state.items():
        first_name.setdefault(id(tensor), name)
    tensors: Tensors = {}
    for name in first_name.values():
        tensor = compact_state[name]
        tensors[name] = tensor.detach()
    _undo_(tensors, cuts, dense_shapes)
    dense_state: Tensors = {}
    for name, tensor in compact_state.items():
        recorded_name = first_name[id(tensor)]
        dense_state[name] = tensors[recorded_name]
    dense.load_state_dict(dense_state)
    _copy_buffers_(dense, model, left_out=compact_state.keys())
    return dense


def stock_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of the config of a compact model without what hf_oto has added to it."""
    stock = copy.deepcopy(config)
    values = vars(stock)
    values.pop("oto", None)
    values.pop("auto_map", None)
    return stock


def _copy_buffers_(dense: PreTrainedModel, model: PreTrainedModel, left_out: Collection[str]) -> None:
    """Gives a dense model the other buffers, those that are in no checkpoint, such as rotary frequencies."""
    buffers = dict(model.named_buffers())
    for name, dense_buffer in dense.named_buffers():
        if name in left_out or name not in buffers:
            continue
        buffer = buffers[name]
        if buffer.shape == dense_buffer.shape:
            dense_buffer.copy_(buffer)


def stock_model(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A new model of the stock class of another one, with weights that are not yet the other's.

    Args:
        model: gives the class, the dtypes, `requires_grad`, and the modes of the modules.
        config: the config of the new model.
    """
    model_class = type(model)
    stock_class = getattr(model_class, "_oto_stock", model_class)
    with random_states_kept(model):  # weights nobody keeps must not move what training draws next
        stock = stock_class(config)
    stock = stock.to(model.device)
    originals = named_tensors(model)
    for name, tensor in named_tensors(stock).items():
        if name not in originals:
            continue
        original = originals[name]
        tensor.requires_grad_(original.requires_grad)
        tensor.data = tensor.data.to(original.dtype)
    if model.can_generate():
        stock.generation_config = copy.deepcopy(model.generation_config)
    # a module that has several names has a mode under each of them
    modes: dict[str, bool] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        modes[name] = module.training
    for name, module in stock.named_modules(remove_duplicate=False):
        module.training = modes.get(name, model.training)
    return stock


def _undo_(tensors: Tensors, cuts: list[RecordedCut], dense_shapes: dict[str, torch.Size]) -> None:
    """Replaces cut tensors by what they were before all cuts, with zeros in the places that were cut.

    Args:
        tensors: name -> tensor of the compact model.
        cuts: in the order they were made.
        dense_shapes: name -> shape in the stock model.

    Raises:
        OTOError: the cuts don't fit the tensors. No large tensor has been allocated by then.
    """
    sizes_after_cuts = check_cuts(cuts, dense_shapes)
    for name in tensors.keys() & dense_shapes.keys():
        expected_sizes = []
        for dim, dense_size in enumerate(dense_shapes[name]):
            dimension = (name, dim)
            size = sizes_after_cuts.get(dimension, dense_size)
            expected_sizes.append(size)
        expected = tuple(expected_sizes)
        actual = tuple(tensors[name].shape)
        require(actual == expected, f"{name} has shape {actual}; the stock model's, after all cuts, is {expected}")
    steps = []
    for _, cuts_of_step in groupby(cuts, key=attrgetter("step")):
        steps.append(list(cuts_of_step))
    for cuts_of_step in reversed(steps):
        _scale_back_(tensors, cuts_of_step)
        _fill_(tensors, cuts_of_step)


def _scale_back_(tensors: Tensors, cuts: Iterable[RecordedCut]) -> None:
    """Undoes the scaling of weights by cuts that were made together."""
    factors: dict[str, float] = {}
    offsets: dict[str, int] = {}
    for cut in cuts:
        for name, numerator, denominator, offset in cut.scales:
            ratio = cut.size / cut.kept
            power = numerator / denominator
            earlier_factor = factors.get(name, 1.0)
            factors[name] = earlier_factor * ratio**power
            offsets[name] = offset
    for name, factor in factors.items():
        # a damaged record may have a factor that no cut makes
        is_possible = name in tensors and 0 < factor < np.inf
        require(is_possible, f"{name} cannot be scaled by {factor}")
        tensor = tensors[name]
        tensors[name] = _scaled_back(tensor, factor, offsets[name])


def _scaled_back(tensor: Tensor, factor: float, offset: int) -> Tensor:
    """What a weight was before it was scaled; computed in float32 at least."""
    wide_dtype = torch.promote_types(tensor.dtype, torch.float32)
    scaled = tensor.to(wide_dtype) + offset
    before = scaled / factor - offset
    return before.to(tensor.dtype)


def _fill_(tensors: Tensors, cuts: Iterable[RecordedCut]) -> None:
    """Gives weights back the places that cuts made together have taken, filled with zeros or ones."""
    lost_at: dict[Dimension, list[np.ndarray]] = defaultdict(list)
    fill_values: dict[Dimension, int] = {}  # 0, or 1 where zeros would not do (a variance)
    for cut in cuts:
        is_lost = _lost_zigs(cut)  # (size,)
        for name, dim, fill_value, *layout in cut.members:
            positions = _positions(cut.size, layout)  # (size, positions of one ZIG)
            dimension = (name, dim)
            lost = positions[is_lost].reshape(-1)  # (n,)
            lost_at[dimension].append(lost)
            fill_values[dimension] = fill_value
    for dimension, lost_to_cuts in lost_at.items():
        name, dim = dimension
        tensor = tensors[name]
        lost = np.concatenate(lost_to_cuts)
        num_kept = tensor.shape[dim]
        num_dense = num_kept + len(lost)
        kept = np.setdiff1d(np.arange(num_dense), lost)
        # a position that two cuts take is counted twice in num_dense
        require(len(kept) == num_kept, f"its cuts of {name}[{dim}] overlap")
        shape = list(tensor.shape)
        shape[dim] = num_dense
        dense = tensor.new_full(shape, fill_values[dimension])
        index = torch.from_numpy(kept).to(tensor.device)
        dense.index_copy_(dim, index, tensor)
        tensors[name] = dense


def _lost_zigs(cut: RecordedCut) -> np.ndarray:
    """Whether each ZIG was cut, (size,)."""
    num_bytes = (cut.size + 7) // 8  # rounded up
    kept_bytes = cut.bits.to_bytes(num_bytes, "little")
    packed = np.frombuffer(kept_bytes, np.uint8)  # (num_bytes,)
    is_kept = np.unpackbits(packed, bitorder="little", count=cut.size)  # (size,)
    return is_kept == 0


def _positions(size: int, layout: list[Any]) -> np.ndarray:
    """The positions of every ZIG along the dimension of a member, (size, positions of one)."""
    if len(layout) == 1:
        (index,) = layout
        return np.array(index)
    start, outer, inner = layout
    return strided_positions(size, start, outer, inner)
