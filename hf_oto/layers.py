"""The attributes in which torch's own layers keep the sizes of their weights: `in_features`, `num_channels`, ...

Such an attribute is the size of a dimension of a parameter, and not a number of its own: a trace takes it for that
dimension, and a cut sets it by the weight that is left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

# for the first dimensions of the weight, in their order; a subclass stands before its base
OWN_SIZES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("out_features", "in_features"),
    Conv1D: ("nx", "nf"),
    nn.Embedding: ("num_embeddings", "embedding_dim"),
    nn.modules.conv._ConvTransposeNd: ("in_channels", "out_channels"),
    nn.modules.conv._ConvNd: ("out_channels", "in_channels"),
    nn.modules.batchnorm._NormBase: ("num_features",),
    nn.GroupNorm: ("num_channels",),
}


def names_of_own_sizes(module: nn.Module) -> tuple[str, ...]:
    """The attributes that hold the sizes of the first dimensions of a layer's weight; none for another module."""
    for layer, names in OWN_SIZES.items():
        if isinstance(module, layer):
            return names
    return ()


def is_of_one_group(module: nn.Module, dim: int) -> bool:
    """Whether a dimension of a layer's weight holds the channels of one group, and its attribute those of all."""
    return isinstance(module, nn.modules.conv._ConvNd) and dim == 1


def own_sizes(module: nn.Module) -> dict[str, int]:
    """The sizes that torch's layers keep for the reader, by their weights: `in_features`, `num_channels`, ..."""
    names = names_of_own_sizes(module)
    weight = _weight_in_eval_mode(module) if names else None
    if weight is None:
        return {}
    shape = list(weight.shape)
    is_computed_by_hook = "weight" in vars(module)
    if is_computed_by_hook:  # the hook runs before a forward: until the next one the weight has its old shape
        shape = _shape_by_factors(module, len(shape)) or shape
    sizes = {}
    for dim, (name, size) in enumerate(zip(names, shape, strict=False)):
        if is_of_one_group(module, dim):
            size *= module.groups
        sizes[name] = size
    return sizes


def _shape_by_factors(module: nn.Module, num_dims: int) -> list[int]:
    """The shape of a weight that is computed from parameters such as `weight_g` and `weight_v`; [] if from none."""
    shapes = []
    for name, p in module._parameters.items():
        if name.startswith("weight_") and p.dim() == num_dims:
            shapes.append(p.shape)
    # a factor has the size of the weight in a dimension, or 1
    return [max(sizes_of_dim) for sizes_of_dim in zip(*shapes, strict=True)]


def _weight_in_eval_mode(module: nn.Module) -> torch.Tensor | None:
    """The weight of a layer: reading a parametrised one computes it, which in train mode may change its state."""
    # by hand, because `train` of a module would set all its parts to one mode
    training_of = {part: part.training for part in module.modules()}
    module.eval()
    with _buffers_beside_weights(module):
        weight = module.weight
    for part, training in training_of.items():
        part.training = training
    return weight


@contextlib.contextmanager
def _buffers_beside_weights(module: nn.Module) -> Iterator[None]:
    """While open, the buffers of a layer whose weights are on meta are there too, since a weight may need both."""
    kept = []  # (buffers of a part, a copy of them)
    if any(p.is_meta for p in module.parameters()):
        for part in module.modules():
            kept.append((part._buffers, dict(part._buffers)))
            for name, buffer in part._buffers.items():
                part._buffers[name] = None if buffer is None else buffer.to("meta")
    try:
        yield
    finally:
        for buffers, before in kept:
            buffers.update(before)
