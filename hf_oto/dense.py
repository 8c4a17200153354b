"""tmp"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .cut import Cut, scaled
from .cut import _scale_factors as scale_factors
from .modeling_oto import OTOError, require, validate
from .zigs import Member, PrunableAxis, Scale, ZIGPartition


def removed_positions(partition, removed):
    return {(n, d): g for n, dims in Cut(partition, removed, {}, {}).positions.items() for d, g in dims.items()}


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
