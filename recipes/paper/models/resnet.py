"""The ResNet of Transformers with the stem that 32-pixel images need (He et al., arXiv 1512.03385, Sec. 4.2).

`ResNetConfig` has no option for it: the stock stem, 7 x 7 of stride 2 and pooling, leaves 8 x 8 to the first stage.
"""

from __future__ import annotations

from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification
from transformers.models.resnet.modeling_resnet import ResNetConvLayer


class SmallResNetForImageClassification(ResNetForImageClassification):
    """A 3 x 3 convolution of stride 1 is the whole stem; all else is stock.

    (Transformers chooses the loss by the end of the class name.)
    """

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__(config)
        stem = self.resnet.embedder
        stem.embedder = ResNetConvLayer(
            config.num_channels, config.embedding_size, kernel_size=3, activation=config.hidden_act
        )
        stem.pooler = nn.Identity()
        self.post_init()
