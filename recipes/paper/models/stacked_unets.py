"""StackedUnets of the OTO papers: two U-nets (Ronneberger et al., arXiv 1505.04597), one behind the other.

The first halves with strided and doubles with transposed convolutions, the second with max pooling and bilinear
interpolation; the skip connections of both are concatenations. Used there to classify FashionMNIST.
"""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutput


class StackedUnetsConfig(PreTrainedConfig):
    r"""
    Args:
        hidden_sizes (`list[int]`, *optional*): channels at each resolution, the full one first.
    """

    model_type = "stacked_unets"

    num_channels: int = 3
    image_size: int = 32
    hidden_sizes: list[int] | tuple[int, ...] = (32, 64, 128, 256)


class DoubleConv(nn.Sequential):
    """Twice 3 x 3 convolution, batch norm, ReLU."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        for size in (width, out):
            self.append(nn.Conv2d(size, out, 3, padding=1, bias=False))
            self.append(nn.BatchNorm2d(out))
            self.append(nn.ReLU())


class Unet(nn.Module):
    """(b, width, h, w) -> (b, sizes[0], h, w); h and w must be multiples of 2 ** (len(sizes) - 1).

    Args:
        transposed: halve and double with convolutions, else with max pooling and bilinear interpolation.
    """

    def __init__(self, width: int, sizes: list[int] | tuple[int, ...], transposed: bool) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(sizes))  # (finer, coarser)
        self.first = DoubleConv(width, sizes[0])
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        for fine, coarse in pairs:
            self.down.append(nn.Conv2d(fine, fine, 3, stride=2, padding=1) if transposed else nn.MaxPool2d(2))
            if transposed:
                self.up.append(nn.ConvTranspose2d(coarse, fine, 2, stride=2))
            else:
                resize = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
                self.up.append(nn.Sequential(resize, nn.Conv2d(coarse, fine, 1)))
        self.encode = nn.ModuleList(DoubleConv(fine, coarse) for fine, coarse in pairs)
        self.decode = nn.ModuleList(DoubleConv(2 * fine, fine) for fine, _ in pairs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        skips = []
        for down, encode in zip(self.down, self.encode, strict=True):
            skips.append(x)
            x = encode(down(x))
        for up, decode in zip(reversed(self.up), reversed(self.decode), strict=True):
            x = decode(torch.cat([skips.pop(), up(x)], 1))
        return x


class StackedUnets(PreTrainedModel):
    """Two U-nets, an average over the image, and a linear classifier."""

    config_class = StackedUnetsConfig
    main_input_name = "pixel_values"

    def __init__(self, config: StackedUnetsConfig) -> None:
        super().__init__(config)
        sizes = config.hidden_sizes
        self.unet1 = Unet(config.num_channels, sizes, transposed=True)
        self.unet2 = Unet(sizes[0], sizes, transposed=False)
        self.classifier = nn.Linear(sizes[0], config.num_labels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # norms, zero biases, the classifier
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ImageClassifierOutput:
        """pixel_values (b, num_channels, h, w) -> logits (b, num_labels)."""
        logits = self.classifier(self.unet2(self.unet1(pixel_values)).mean((2, 3)))
        return ImageClassifierOutput(loss=None if labels is None else F.cross_entropy(logits, labels), logits=logits)
