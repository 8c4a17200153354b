"""DenseNet (Huang et al., arXiv 1608.06993): every layer reads, through a batch norm, all that came before it.

The defaults are DenseNet-121. One channel of a layer is one position in each of the concatenations behind it.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutput


class DenseNetConfig(PreTrainedConfig):
    r"""
    Args:
        growth_rate (`int`, *optional*, defaults to 32): channels that each layer adds.
        block_config (`list[int]`, *optional*): layers of each dense block.
        num_init_features (`int`, *optional*, defaults to 64): channels of the stem.
        bn_size (`int`, *optional*, defaults to 4): bottleneck channels of a layer, in growth rates.
        small_images (`bool`, *optional*, defaults to `True`):
            A 3 x 3 stem of stride 1, as in the CIFAR experiments; else 7 x 7 of stride 2 and pooling.
    """

    model_type = "densenet"

    num_channels: int = 3
    image_size: int = 32
    growth_rate: int = 32
    block_config: list[int] | tuple[int, ...] = (6, 12, 24, 16)
    num_init_features: int = 64
    bn_size: int = 4
    small_images: bool = True


class DenseLayer(nn.Module):
    """Norm, 1 x 1 bottleneck, norm, 3 x 3: (b, c, h, w) -> (b, growth_rate, h, w)."""

    def __init__(self, width: int, config: DenseNetConfig) -> None:
        super().__init__()
        inner = config.bn_size * config.growth_rate
        self.norm1 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, inner, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, config.growth_rate, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(F.relu(self.norm1(x)))
        return self.conv2(F.relu(self.norm2(x)))


class DenseBlock(nn.ModuleList):
    """Layers whose outputs are laid side by side: (b, c, h, w) -> (b, c + depth * growth_rate, h, w)."""

    def __init__(self, width: int, depth: int, config: DenseNetConfig) -> None:
        super().__init__(DenseLayer(width + i * config.growth_rate, config) for i in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self:
            x = torch.cat([x, layer(x)], 1)
        return x


class Transition(nn.Module):
    """Between two blocks: half the channels, half the resolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, width // 2, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.norm(x))), 2)


class DenseNet(PreTrainedModel):
    """Dense blocks with transitions between them, and a linear classifier."""

    config_class = DenseNetConfig
    main_input_name = "pixel_values"

    def __init__(self, config: DenseNetConfig) -> None:
        super().__init__(config)
        width = config.num_init_features
        if config.small_images:
            self.stem = nn.Conv2d(config.num_channels, width, 3, padding=1, bias=False)
        else:
            conv = nn.Conv2d(config.num_channels, width, 7, stride=2, padding=3, bias=False)
            self.stem = nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1))
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        for i, depth in enumerate(config.block_config):
            if i:
                self.transitions.append(Transition(width))
                width //= 2
            self.blocks.append(DenseBlock(width, depth, config))
            width += depth * config.growth_rate
        self.norm = nn.BatchNorm2d(width)
        self.classifier = nn.Linear(width, config.num_labels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # norms, the classifier
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ImageClassifierOutput:
        """pixel_values (b, num_channels, h, w) -> logits (b, num_labels)."""
        x = self.stem(pixel_values)
        for i, block in enumerate(self.blocks):
            x = block(self.transitions[i - 1](x) if i else x)
        logits = self.classifier(F.relu(self.norm(x)).mean((2, 3)))
        return ImageClassifierOutput(loss=None if labels is None else F.cross_entropy(logits, labels), logits=logits)
