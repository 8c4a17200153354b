"""The attributes in which torch's own layers keep the sizes of their weights: `in_features`, `num_channels`, ...

Such an attribute is the size of a dimension of a parameter, and not a number of its own: a trace takes it for that
dimension, and a cut sets it by the weight that is left.
"""

from __future__ import annotations

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
