"""Train a ResNet and a small ViT once and get compact models back, on real images that need no download.

    python recipes/quickstart.py                                   # the digits that scikit-learn ships
    python recipes/quickstart.py --dataset NAME_OR_FOLDER --models resnet --target-macs 0.3
    python recipes/quickstart.py --smoke                           # a few steps, to see that everything runs

For each model: a dense run and an OTO run of the same steps, what can be pruned, a table of what changed, and the
saved compact model loaded again by another process. Every training argument is an option (`--help`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from common import Recipe, accuracy, collate, parse, reload, splits, vit
from transformers import PreTrainedModel, ResNetConfig, ResNetForImageClassification, Trainer, set_seed

from hf_oto import OTOTrainer


@dataclass
class Quickstart(Recipe):
    """See `Recipe`."""

    models: list[str] = field(default_factory=lambda: ["resnet", "vit"], metadata={"help": "resnet, vit or both."})


def resnet(labels: int) -> PreTrainedModel:
    """A ResNet of three stages, 0.7 M parameters."""
    config = ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64, 128], depths=[2, 2, 2], layer_type="basic", num_labels=labels
    )
    return ResNetForImageClassification(config)


BUILD = {"resnet": resnet, "vit": vit}


def main() -> None:
    """Runs the recipe."""
    options, args = parse(
        __doc__, Quickstart, output_dir="out/quickstart", max_steps=500, per_device_train_batch_size=32,
        per_device_eval_batch_size=256, weight_decay=0.01, warmup_steps=0.1, remove_unused_columns=False,
        learning_rate=1e-3,
    )  # fmt: skip
    train, test, labels = splits(options.dataset)

    def trained(cls: type[Trainer], build: Callable[[int], PreTrainedModel]) -> Trainer:
        set_seed(args.seed)
        trainer = cls(
            build(labels), args, train_dataset=train, eval_dataset=test, data_collator=collate,
            compute_metrics=accuracy(),
        )  # fmt: skip
        trainer.train()
        return trainer

    for name in options.models:
        print(f"\n===== {name} =====", flush=True)
        dense, compact = trained(Trainer, BUILD[name]), trained(OTOTrainer, BUILD[name])
        scores = [trainer.evaluate()["eval_accuracy"] for trainer in (dense, compact)]
        print(f"{name}: accuracy dense {scores[0]:.4f}, compact {scores[1]:.4f}")

        folder = f"{args.output_dir}/{name}"
        compact.save_model(folder)
        pixels = collate([test[i] for i in range(16)])["pixel_values"]
        reload("AutoModelForImageClassification", folder, compact.model, {"pixel_values": pixels})


if __name__ == "__main__":
    main()
