"""The networks of the OTO papers as Transformers models: configs, `save_pretrained`, `from_pretrained`, no hf_oto."""

from .carn import CARN, CARNConfig
from .demonet import DemoNet, DemoNetConfig
from .densenet import DenseNet, DenseNetConfig
from .resnet import SmallResNetForImageClassification
from .stacked_unets import StackedUnets, StackedUnetsConfig
from .vgg import VGG, VGGConfig

__all__ = [
    "CARN",
    "VGG",
    "CARNConfig",
    "DemoNet",
    "DemoNetConfig",
    "DenseNet",
    "DenseNetConfig",
    "SmallResNetForImageClassification",
    "StackedUnets",
    "StackedUnetsConfig",
    "VGGConfig",
]
