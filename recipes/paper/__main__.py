"""Train a network of the OTO papers from scratch, dense and with OTO, and compare the two.

    python -m recipes.paper --system vgg16-bn --dataset NAME_OR_FOLDER --target-group-sparsity 0.6 --max-steps 4000
    python -m recipes.paper --system carn --smoke              # a tiny one on data made on the fly, in seconds

Both runs have the same steps, seed and optimizer. The score is accuracy; for carn, PSNR in dB on the Y channel of
whole test images. Images need the columns "image" and "label" (carn: "image", the high resolution), texts "sentence"
or "text" and "label". `--config` changes the size of a system, as in --config '{"hidden_size": 256}'.
"""

import json
from dataclasses import dataclass, field

from transformers import Trainer, set_seed

from hf_oto import OTOTrainer

from ..common import Recipe, accuracy, parse
from .systems import SYSTEMS


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
    fields = json.loads(options.config) | task.config

    def trained(cls: type[Trainer]) -> Trainer:
        set_seed(args.seed)
        trainer = cls(
            system.built(options.smoke, fields), args, train_dataset=task.train, eval_dataset=task.test,
            data_collator=task.collate, compute_metrics=accuracy(),
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
