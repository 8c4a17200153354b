"""The way back: a compact model becomes the stock model of the same outputs, with zeros where something was cut.

The record of the compact model says which positions went, step by step; the last step is undone first.

Worked example: of a weight of 5 rows, one for each ZIG, the rows in the bits 0b10110 were kept. The 3 rows that are
left become rows 1, 2 and 4 again, and rows 0 and 3 are zeros.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Collection, Iterable
from itertools import groupby
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .modeling_oto import OTOError, RecordedCut, check_cuts, cuts_of, named_tensors, require, validate


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
        raise OTOError(f"to_dense needs a Transformers model, one with a config; this is a {type(model).__name__}")
    cuts: list[RecordedCut] = []
    if "oto" in vars(model.config):
        validate(model.config.oto)
        cuts = cuts_of(model.config.oto)
    config = copy.deepcopy(model.config)
    for ours in ("oto", "auto_map"):
        vars(config).pop(ours, None)
    dense = stock_model(model, config)
    state = model.state_dict(keep_vars=True)
    # Tied tensors have several names; a record has the first of them, which is set last here.
    first_name = {id(tensor): name for name, tensor in reversed(state.items())}
    tensors = {name: state[name].detach() for name in first_name.values()}
    dense_shapes = {name: tensor.shape for name, tensor in dense.state_dict().items()}
    _undo_(tensors, cuts, dense_shapes)
    dense_state = {name: tensors[first_name[id(tensor)]] for name, tensor in state.items()}
    dense.load_state_dict(dense_state)
    _copy_buffers_(dense, model, left_out=state.keys())
    return dense


def _copy_buffers_(dense: PreTrainedModel, model: PreTrainedModel, left_out: Collection[str]) -> None:
    """Gives a dense model the other buffers, those that are in no checkpoint, such as rotary frequencies."""
    buffers = dict(model.named_buffers())
    for name, buffer in dense.named_buffers():
        if name not in left_out and name in buffers and buffers[name].shape == buffer.shape:
            buffer.copy_(buffers[name])


def stock_model(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A new model of the stock class of another one, with weights that are not yet the other's.

    Args:
        model: gives the class, the dtypes, `requires_grad`, and the modes of the modules.
        config: of the new model.
    """
    with torch.random.fork_rng():  # weights nobody keeps must not move what training draws next
        stock_class = getattr(type(model), "_oto_stock", type(model))
        stock = stock_class(config)
    stock = stock.to(model.device)
    originals = named_tensors(model)
    for name, tensor in named_tensors(stock).items():
        if name in originals:
            tensor.requires_grad_(originals[name].requires_grad)
            tensor.data = tensor.data.to(originals[name].dtype)
    if model.can_generate():
        stock.generation_config = copy.deepcopy(model.generation_config)
    modes = {name: module.training for name, module in model.named_modules(remove_duplicate=False)}
    for name, module in stock.named_modules(remove_duplicate=False):
        module.training = modes.get(name, model.training)
    return stock


def _undo_(tensors: dict[str, torch.Tensor], cuts: list[RecordedCut], dense: dict[str, torch.Size]) -> None:
    """Replaces cut tensors by what they were before all cuts, with zeros in the places that were cut.

    Args:
        tensors: name -> tensor of the compact model.
        cuts: in the order they were made.
        dense: name -> shape in the stock model.

    Raises:
        OTOError: the cuts don't fit the tensors; nothing long has been allocated then.
    """
    left = check_cuts(cuts, dense)
    for name in tensors.keys() & dense.keys():
        expected = tuple(left.get((name, dim), size) for dim, size in enumerate(dense[name]))
        actual = tuple(tensors[name].shape)
        require(actual == expected, f"{name} has shape {actual}; the stock model's, after all cuts, is {expected}")
    steps = [list(step) for _, step in groupby(cuts, key=lambda cut: cut.step)]
    for step in reversed(steps):
        _undo_step_(tensors, step)


def _undo_step_(tensors: dict[str, torch.Tensor], cuts: Iterable[RecordedCut]) -> None:
    """Undoes cuts that were made together: scales weights back, then fills the places that were cut."""
    factors: dict[str, tuple[float, int]] = {}  # weight -> (factor, offset)
    lost: dict[tuple[str, int], list[np.ndarray]] = defaultdict(list)  # (weight, dim) -> positions that were cut
    fill: dict[tuple[str, int], int] = {}  # (weight, dim) -> 0, or 1 where zeros would not do (a variance)
    for cut in cuts:
        is_lost = _lost_zigs(cut)
        for name, dim, fill_value, *layout in cut.members:
            positions = _positions(cut.size, layout)
            lost[name, dim].append(positions[is_lost].reshape(-1))
            fill[name, dim] = fill_value
        for name, over, under, offset in cut.scales:
            earlier_factor, _ = factors.get(name, (1.0, 0))
            factors[name] = earlier_factor * (cut.size / cut.kept) ** (over / under), offset
    for name, (factor, offset) in factors.items():
        is_possible = name in tensors and 0 < factor < np.inf
        require(is_possible, f"{name} cannot be scaled by {factor}")
        tensors[name] = _scaled_back(tensors[name], factor, offset)
    for (name, dim), positions_of_cuts in lost.items():
        tensor = tensors[name]
        positions = np.concatenate(positions_of_cuts)
        shape = list(tensor.shape)
        shape[dim] += len(positions)
        stay = np.setdiff1d(np.arange(shape[dim]), positions)
        require(len(stay) == tensor.shape[dim], f"its cuts of {name}[{dim}] overlap")
        where = torch.from_numpy(stay).to(tensor.device)
        tensors[name] = tensor.new_full(shape, fill[name, dim]).index_copy_(dim, where, tensor)


def _lost_zigs(cut: RecordedCut) -> np.ndarray:
    """Whether each ZIG was cut, (size,)."""
    num_bytes = -(-cut.size // 8)
    kept = np.frombuffer(cut.bits.to_bytes(num_bytes, "little"), np.uint8)
    return np.unpackbits(kept, bitorder="little", count=cut.size) == 0


def _scaled_back(tensor: torch.Tensor, factor: float, offset: int) -> torch.Tensor:
    """What a weight was before it was scaled; computed in float32 at least."""
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return ((wide + offset) / factor - offset).to(tensor.dtype)


def _positions(size: int, layout: list[Any]) -> np.ndarray:
    """The positions of every ZIG along the dimension of a member, (size, positions of one)."""
    if len(layout) == 1:
        return np.array(layout[0])
    start, outer, inner = layout
    block = np.arange(outer * size * inner).reshape(outer, size, inner)
    return start + block.transpose(1, 0, 2).reshape(size, -1)
