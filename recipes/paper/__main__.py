"""Train a network of the OTO papers from scratch, dense and with OTO, and compare the two.

    python -m recipes.paper --system vgg16-bn --dataset NAME_OR_FOLDER --target-group-sparsity 0.6 --max-steps 4000
    python -m recipes.paper --system carn --smoke              # a tiny one on data made on the fly, in seconds

Both runs have the same steps, seed and optimizer. The score is accuracy; for carn, PSNR in dB on the Y channel of
whole test images. Images need the columns "image" and "label" (carn: "image", the high resolution), texts "sentence"
or "text" and "label". `--config` changes the size of a system, as in --config '{"hidden_size": 256}'.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from transformers import (
    BertForSequenceClassification,
    ConvNextForImageClassification,
    PreTrainedModel,
    Trainer,
    set_seed,
)

from hf_oto import OTOTrainer

from ..common import SIZE, Recipe, accuracy, parse
from .models import CARN, VGG, DemoNet, DenseNet, SmallResNetForImageClassification, StackedUnets
from .tasks import Task, images, super_resolution, texts


class System(NamedTuple):
    """A network: its class, its task, its learning rate, its config, and what makes that tiny."""

    model: type[PreTrainedModel]
    task: Callable[[str | None, bool], Task]
    lr: float
    config: dict[str, Any]
    tiny: dict[str, Any]


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


@dataclass
class Paper(Recipe):
    """See `Recipe`."""

    system: str = field(default="vgg16-bn", metadata={"choices": list(SYSTEMS)})
    config: str = field(default="{}", metadata={"help": "JSON: fields of the system's config."})
    augment: bool = field(default=False, metadata={"help": "Crop and mirror classified images at random."})


def main() -> None:
    """Runs the recipe."""
    options, args = parse(
        __doc__, Paper, output_dir="out/paper", max_steps=2000, per_device_train_batch_size=64,
        per_device_eval_batch_size=256, learning_rate=0.0, weight_decay=0.01, warmup_steps=0.05,
        remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    if not (options.smoke or options.dataset):
        raise SystemExit("--dataset is missing (or --smoke)")
    system = SYSTEMS[options.system]
    args.learning_rate = args.learning_rate or system.lr
    if options.smoke:
        args.max_steps, args.per_device_train_batch_size = 20, 8
    task = system.task(options.dataset, options.augment)
    fields = system.config | (system.tiny if options.smoke else {}) | json.loads(options.config) | task.config

    def trained(cls: type[Trainer]) -> Trainer:
        set_seed(args.seed)
        model = system.model(system.model.config_class(**fields))
        trainer = cls(
            model, args, train_dataset=task.train, eval_dataset=task.test, data_collator=task.collate,
            compute_metrics=accuracy(),
        )  # fmt: skip
        trainer.train()
        return trainer

    dense, compact = trained(Trainer), trained(OTOTrainer)
    print(compact.partition)
    print(compact.report)
    print(f"group sparsity {compact.report['group_sparsity']:.3f}")
    print(f"{task.score}: dense {task.evaluate(dense):.4f}, compact {task.evaluate(compact):.4f}")
    compact.save_model(f"{args.output_dir}/{options.system}/compact")


if __name__ == "__main__":
    main()
