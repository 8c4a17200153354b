"""Prune a trained model without training, then adapt the compact model with LoRA, and merge and save it.

    python recipes/prune_then_adapt.py                                   # a ViT on the digits of scikit-learn
    python recipes/prune_then_adapt.py --dataset NAME_OR_FOLDER --target-macs 0.3
    python recipes/prune_then_adapt.py --smoke                           # a few steps, to see that everything runs

It needs `pip install peft`. The pruned base stays frozen while LoRA trains.
"""

from common import Recipe, accuracy, collate, parse, reload, splits, vit
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, set_seed

import hf_oto


def main() -> None:
    """Runs the recipe."""
    options, args = parse(
        __doc__, Recipe, output_dir="out/prune_then_adapt", max_steps=500, per_device_train_batch_size=32,
        per_device_eval_batch_size=256, weight_decay=0.01, warmup_steps=0.1, remove_unused_columns=False,
        learning_rate=1e-3, label_names=["labels"],
    )  # fmt: skip
    train, test, labels = splits(options.dataset)

    def trainer_of(model: PreTrainedModel) -> Trainer:
        common = {"train_dataset": train, "eval_dataset": test, "data_collator": collate}
        return Trainer(model, args, compute_metrics=accuracy(), **common)

    def tell(name: str, trainer: Trainer) -> None:
        print(f"{name}: accuracy {trainer.evaluate()['eval_accuracy']:.4f}", flush=True)

    set_seed(args.seed)
    dense = trainer_of(vit(labels))
    dense.train()
    tell("dense", dense)

    batches = DataLoader(train, batch_size=32, collate_fn=collate)
    compact, report = hf_oto.prune(dense.model, batches, target_macs=args.target_macs)
    print(report)
    tell("pruned", trainer_of(compact))

    adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", modules_to_save=["classifier"])
    adapted = trainer_of(get_peft_model(compact, adapter))
    adapted.train()
    tell("adapted", adapted)

    merged = adapted.model.merge_and_unload()
    merged.save_pretrained(f"{args.output_dir}/compact")
    pixels = collate([test[i] for i in range(16)])["pixel_values"]
    reload("AutoModelForImageClassification", f"{args.output_dir}/compact", merged, {"pixel_values": pixels})


if __name__ == "__main__":
    main()
