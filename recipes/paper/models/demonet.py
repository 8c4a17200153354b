"""DemoNet, after the example of the OTOv2 paper (arXiv 2303.06862): a little of everything that makes pruning hard.

Two batch norms of one tensor are summed with another branch; a batch norm runs over a concatenation; depthwise and
grouped convolutions stand inside a residual sum; a hidden linear layer follows.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutput


class DemoNetConfig(PreTrainedConfig):
    r"""
    Args:
        hidden_size (`int`, *optional*, defaults to 64): channels of the stem; later layers have 2 and 4 times as many.
        group (`int`, *optional*, defaults to 4): groups of the grouped convolution.
        classifier_size (`int`, *optional*, defaults to 128): units of the hidden linear layer.
    """

    model_type = "demonet"

    num_channels: int = 3
    image_size: int = 32
    hidden_size: int = 64
    group: int = 4
    classifier_size: int = 128


class DemoNet(PreTrainedModel):
    """A small classifier."""

    config_class = DemoNetConfig
    main_input_name = "pixel_values"

    def __init__(self, config: DemoNetConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.stem = nn.Conv2d(config.num_channels, width, 3, padding=1)
        self.norm_stem = nn.BatchNorm2d(width)
        self.left = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.right = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.norm_left = nn.ModuleList(nn.BatchNorm2d(2 * width) for _ in range(2))
        self.norm_cat = nn.BatchNorm2d(3 * width)
        self.reduce = nn.Conv2d(3 * width, 4 * width, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(4 * width, 4 * width, 3, padding=1, groups=4 * width)
        self.norm_depthwise = nn.BatchNorm2d(4 * width)
        self.squeeze = nn.Conv2d(4 * width, 2 * width, 1)
        self.grouped = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=config.group)
        self.norm_grouped = nn.BatchNorm2d(2 * width)
        self.widen = nn.Conv2d(2 * width, 4 * width, 1)
        self.hidden = nn.Linear(4 * width, config.classifier_size)
        self.classifier = nn.Linear(config.classifier_size, config.num_labels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # norms, zero biases, the classifier
        if isinstance(module, nn.Conv2d) or module is self.hidden:
            init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ImageClassifierOutput:
        """pixel_values (b, num_channels, h, w) -> logits (b, num_labels)."""
        stem = F.relu(self.norm_stem(self.stem(pixel_values)))
        left = self.left(stem)
        branches = sum((norm(left) for norm in self.norm_left), self.right(stem))
        x = self.reduce(F.relu(self.norm_cat(torch.cat([stem, branches], 1))))
        x = F.relu(x + F.relu(self.norm_depthwise(self.depthwise(x))))
        inner = F.relu(self.norm_grouped(self.grouped(F.relu(self.squeeze(x)))))
        x = F.relu(x + self.widen(inner))
        logits = self.classifier(F.relu(self.hidden(x.mean((2, 3)))))
        return ImageClassifierOutput(loss=None if labels is None else F.cross_entropy(logits, labels), logits=logits)
