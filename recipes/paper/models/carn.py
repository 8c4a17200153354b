"""CARN, a cascading residual network for super resolution (Ahn et al., arXiv 1803.08664).

Blocks and the layers inside them cascade: a 1 x 1 convolution reads the concatenation of all that came before. The
defaults are the CARN x2 of the OTO papers; `group` and `recursive` make it CARN-M.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ImageSuperResolutionOutput

CASCADE = 3  # blocks in the network, and residual blocks in each


class CARNConfig(PreTrainedConfig):
    r"""
    Args:
        hidden_size (`int`, *optional*, defaults to 64): channels of the stream.
        scale (`int`, *optional*, defaults to 2): 2, 3 or 4 times the resolution.
        group (`int`, *optional*, defaults to 1): more than 1: grouped 3 x 3 convolutions, as in CARN-M.
        recursive (`bool`, *optional*, defaults to `False`): the residual blocks of a cascade are one.
        rgb_mean (`list[float]`, *optional*): subtracted from the input and added to the output; DIV2K's.
    """

    model_type = "carn"

    num_channels: int = 3
    image_size: int = 48
    hidden_size: int = 64
    scale: int = 2
    group: int = 1
    recursive: bool = False
    rgb_mean: list[float] | tuple[float, ...] = (0.4488, 0.4371, 0.4040)

    def __post_init__(self, **kwargs: object) -> None:
        if self.scale not in (2, 3, 4):
            raise ValueError(f"scale is {self.scale}: it must be 2, 3 or 4")
        super().__post_init__(**kwargs)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions, or two grouped ones and a 1 x 1 that mixes the groups, around which the input goes."""

    def __init__(self, config: CARNConfig) -> None:
        super().__init__()
        width, group = config.hidden_size, config.group
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, groups=group)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=group)
        self.mix = nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 1)) if group > 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.mix(self.conv2(F.relu(self.conv1(x)))))


class Cascade(nn.Module):
    """Three parts in a row; after each, a 1 x 1 convolution reads the input and the outputs so far."""

    def __init__(self, parts: list[nn.Module], width: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.fuse = nn.ModuleList(nn.Conv2d((i + 2) * width, width, 1) for i in range(CASCADE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = x
        for i, fuse in enumerate(self.fuse):
            seen = torch.cat([seen, self.parts[i % len(self.parts)](x)], 1)
            x = F.relu(fuse(seen))
        return x


class CARN(PreTrainedModel):
    """Images in [0, 1] -> the same images, `scale` times as large."""

    config_class = CARNConfig
    main_input_name = "pixel_values"

    def __init__(self, config: CARNConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.register_buffer("mean", torch.tensor(config.rgb_mean).view(-1, 1, 1))
        self.entry = nn.Conv2d(config.num_channels, width, 3, padding=1)
        blocks = [
            Cascade([ResidualBlock(config) for _ in range(1 if config.recursive else CASCADE)], width)
            for _ in range(CASCADE)
        ]
        self.body = Cascade(blocks, width)
        upsample: list[nn.Module] = []
        for factor in (2, 2) if config.scale == 4 else (config.scale,):
            conv = nn.Conv2d(width, factor**2 * width, 3, padding=1, groups=config.group)
            upsample += [conv, nn.ReLU(), nn.PixelShuffle(factor)]
        self.upsample = nn.Sequential(*upsample)
        self.exit = nn.Conv2d(width, config.num_channels, 3, padding=1)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):  # torch's own, as the authors' code leaves it
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            bound = module.weight[0].numel() ** -0.5
            init.uniform_(module.bias, -bound, bound)
        elif module is self:
            init.copy_(self.mean, torch.tensor(self.config.rgb_mean).view(-1, 1, 1))

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ImageSuperResolutionOutput:
        """pixel_values (b, num_channels, h, w), labels (b, num_channels, scale h, scale w); the loss is L1."""
        x = self.body(self.entry(pixel_values - self.mean))
        x = self.exit(self.upsample(x)) + self.mean
        return ImageSuperResolutionOutput(loss=None if labels is None else F.l1_loss(x, labels), reconstruction=x)
