"""VGG16 for small images (Simonyan and Zisserman, arXiv 1409.1556), with and without batch norm.

Five halvings leave 512 x 1 x 1 of a 32-pixel image; two hidden layers of 512 follow, as in the OTO papers.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutput


class VGGConfig(PreTrainedConfig):
    r"""
    Args:
        hidden_sizes (`list[int]`, *optional*): channels of each stage; a 2 x 2 max pooling ends it.
        depths (`list[int]`, *optional*): convolutions of each stage.
        classifier_sizes (`list[int]`, *optional*): widths of the hidden layers behind them.
        batch_norm (`bool`, *optional*, defaults to `True`): VGG16-BN, else VGG16.
        dropout (`float`, *optional*, defaults to 0.5): after each hidden layer of the classifier.
    """

    model_type = "vgg"

    num_channels: int = 3
    image_size: int = 32
    hidden_sizes: list[int] | tuple[int, ...] = (64, 128, 256, 512, 512)
    depths: list[int] | tuple[int, ...] = (2, 2, 3, 3, 3)
    classifier_sizes: list[int] | tuple[int, ...] = (512, 512)
    batch_norm: bool = True
    dropout: float = 0.5


class VGG(PreTrainedModel):
    """Stages of 3 x 3 convolutions, then fully connected layers."""

    config_class = VGGConfig
    main_input_name = "pixel_values"

    def __init__(self, config: VGGConfig) -> None:
        super().__init__(config)
        layers: list[nn.Module] = []
        width = config.num_channels
        for size, depth in zip(config.hidden_sizes, config.depths, strict=True):
            for _ in range(depth):
                layers.append(nn.Conv2d(width, size, 3, padding=1))
                if config.batch_norm:
                    layers.append(nn.BatchNorm2d(size))
                layers.append(nn.ReLU())
                width = size
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1))
        layers = []
        for size in config.classifier_sizes:
            layers += [nn.Linear(width, size), nn.ReLU(), nn.Dropout(config.dropout)]
            width = size
        self.classifier = nn.Sequential(*layers, nn.Linear(width, config.num_labels))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # norms, and zero biases
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ImageClassifierOutput:
        """pixel_values (b, num_channels, image_size, image_size) -> logits (b, num_labels)."""
        logits = self.classifier(self.features(pixel_values).flatten(1))
        return ImageClassifierOutput(loss=None if labels is None else F.cross_entropy(logits, labels), logits=logits)
