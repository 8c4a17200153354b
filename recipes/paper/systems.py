"""The networks of the OTO papers, with what each of them is trained on, its usual config and a tiny one."""

from collections.abc import Callable
from typing import Any, NamedTuple

from transformers import BertForSequenceClassification, ConvNextForImageClassification, PreTrainedModel

from ..common import SIZE
from .models import CARN, VGG, DemoNet, DenseNet, SmallResNetForImageClassification, StackedUnets
from .tasks import Task, images, super_resolution, texts


class System(NamedTuple):
    """A network: its class, its task, its learning rate, its config, and what makes that tiny."""

    model: type[PreTrainedModel]
    task: Callable[[str | None, bool], Task]
    lr: float
    config: dict[str, Any]
    tiny: dict[str, Any]

    def built(self, is_tiny: bool, fields: dict[str, Any]) -> PreTrainedModel:
        """A fresh model, with these fields of its config instead of the usual ones."""
        tiny = self.tiny if is_tiny else {}
        return self.model(self.model.config_class(**(self.config | tiny | fields)))


TINY_VGG = {"hidden_sizes": [8, 8, 16], "depths": [1, 1, 2], "classifier_sizes": [16]}
TINY_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
TINY_CONVNEXT = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
TINY_BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
RESNET18 = {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}
CONVNEXT = {"patch_size": 2, "image_size": SIZE}  # a patch of 2 leaves 16 x 16 to the first stage

SYSTEMS = {
    "vgg16": System(VGG, images, 5e-4, {"batch_norm": False}, TINY_VGG),
    "vgg16-bn": System(VGG, images, 1e-3, {}, TINY_VGG),
    "densenet121": System(DenseNet, images, 1e-3, {}, {"growth_rate": 4, "block_config": [2, 2], "bn_size": 2}),
    "resnet18": System(SmallResNetForImageClassification, images, 1e-3, RESNET18, TINY_RESNET),
    "resnet50": System(SmallResNetForImageClassification, images, 1e-3, {}, TINY_RESNET),
    "convnext-tiny": System(ConvNextForImageClassification, images, 1e-3, CONVNEXT, TINY_CONVNEXT),
    "stacked-unets": System(StackedUnets, images, 1e-3, {}, {"hidden_sizes": [4, 8, 8]}),
    "demonet": System(DemoNet, images, 1e-3, {}, {"hidden_size": 8, "classifier_size": 16}),
    "carn": System(CARN, super_resolution, 5e-4, {}, {"hidden_size": 8, "group": 2, "recursive": True}),
    "bert": System(BertForSequenceClassification, texts, 1e-4, {}, TINY_BERT),
}
