"""The way back: a compact model becomes the stock model of the same outputs, what was cut filled with zeros again.

Stands after the cut, beside loading: its record says which positions went, step by step, and the last step is undone
first.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable
from itertools import groupby
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .modeling_oto import OTOError, RecordedCut, check_cuts, cuts_of, named_tensors, require, validate


@torch.no_grad()
def to_dense(model: PreTrainedModel) -> PreTrainedModel:
    """The stock model of the same outputs: dense widths again, what was cut filled with zeros.

    Every tensor keeps its dtype and its `requires_grad`, every module its mode; all lie on `model.device`.

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
    first = {
        id(tensor): name for name, tensor in reversed(state.items())
    }  # the name by which a record has what is tied
    tensors = {name: state[name].detach() for name in first.values()}
    _undo_(tensors, cuts, {name: tensor.shape for name, tensor in dense.state_dict().items()})
    dense.load_state_dict({name: tensors[first[id(tensor)]] for name, tensor in state.items()})
    mine = dict(model.named_buffers())
    for name, buffer in dense.named_buffers():  # those that are not saved too: rotary frequencies, say
        if name not in state and name in mine and mine[name].shape == buffer.shape:
            buffer.copy_(mine[name])
    return dense


def stock_model(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A new model of the stock class of `model`, with this config, the dtypes, flags and modes of `model`, and weights
    not yet its own."""
    with torch.random.fork_rng():  # weights nobody keeps must not move what training draws next
        stock = getattr(type(model), "_oto_stock", type(model))(config)
    stock = stock.to(model.device)
    mine = named_tensors(model)
    for name, tensor in named_tensors(stock).items():
        if name in mine:
            tensor.requires_grad_(mine[name].requires_grad)
            tensor.data = tensor.data.to(mine[name].dtype)
    if model.can_generate():
        stock.generation_config = copy.deepcopy(model.generation_config)
    modes = {name: module.training for name, module in model.named_modules(remove_duplicate=False)}
    for name, module in stock.named_modules(remove_duplicate=False):
        module.training = modes.get(name, model.training)
    return stock


def _undo_(tensors: dict[str, torch.Tensor], cuts: list[RecordedCut], dense: dict[str, torch.Size]) -> None:
    """Puts in the place of cut tensors what they were before all cuts.

    Args:
        tensors: name -> tensor of the compact model.
        cuts: in the order they were made.
        dense: name -> shape in the stock model.

    Raises:
        OTOError: the cuts don't fit the tensors; nothing long has been allocated then.
    """
    left = check_cuts(cuts, dense)
    for name in tensors.keys() & dense.keys():
        undone = tuple(n if (name, dim) not in left else left[name, dim] for dim, n in enumerate(dense[name]))
        now = tuple(tensors[name].shape)
        require(now == undone, f"{name} has shape {now}; the stock model's, after all cuts, is {undone}")
    steps = [list(step) for _, step in groupby(cuts, key=lambda cut: cut.step)]
    for step in reversed(steps):
        _undo_step_(tensors, step)


def _undo_step_(tensors: dict[str, torch.Tensor], cuts: Iterable[RecordedCut]) -> None:
    """Undoes cuts that were made together: weights scaled back, zeros where something was cut, ones where zeros would
    not do (a variance)."""
    factors: dict[str, tuple[float, int]] = {}
    lost: dict[tuple[str, int], list[np.ndarray]] = defaultdict(list)
    fill: dict[tuple[str, int], int] = {}
    for cut in cuts:
        kept = np.frombuffer(cut.bits.to_bytes(-(-cut.size // 8), "little"), np.uint8)
        gone = np.unpackbits(kept, bitorder="little", count=cut.size) == 0  # (size,)
        for name, dim, one, *layout in cut.members:
            lost[name, dim].append(_positions(cut.size, layout)[gone].reshape(-1))
            fill[name, dim] = one
        for name, over, under, offset in cut.scales:
            factor = factors.get(name, (1.0, 0))[0] * (cut.size / cut.kept) ** (over / under)
            factors[name] = factor, offset
    for name, (factor, offset) in factors.items():
        require(name in tensors and 0 < factor < np.inf, f"{name} cannot be scaled by {factor}")
        narrow = tensors[name]
        wide = narrow.to(torch.promote_types(narrow.dtype, torch.float32))
        tensors[name] = ((wide + offset) / factor - offset).to(narrow.dtype)
    for (name, dim), positions in lost.items():
        narrow = tensors[name]
        back = np.concatenate(positions)
        shape = list(narrow.shape)
        shape[dim] += len(back)
        stay = np.setdiff1d(np.arange(shape[dim]), back)
        require(len(stay) == narrow.shape[dim], f"its cuts of {name}[{dim}] overlap")
        wide = narrow.new_full(shape, fill[name, dim])
        tensors[name] = wide.index_copy_(dim, torch.from_numpy(stay).to(narrow.device), narrow)


def _positions(size: int, layout: list[Any]) -> np.ndarray:
    """The positions of every ZIG along the dimension of a member, (size, positions of one)."""
    if len(layout) == 1:
        return np.array(layout[0])
    start, outer, inner = layout
    block = np.arange(outer * size * inner).reshape(outer, size, inner)
    return start + block.transpose(1, 0, 2).reshape(size, -1)
