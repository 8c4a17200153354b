"""Fine-tune a text model once and get a compact one back.

    python recipes/text_classification.py --model NAME_OR_FOLDER --dataset NAME_OR_FOLDER

A dense run and an OTO run of the same number of steps, a table of what changed, and the saved compact model loaded
again with plain `from_pretrained`. The dataset needs a text column ("text" or "sentence"), "label", and a "validation"
or "test" split.
"""

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

import hf_oto
from hf_oto.report import table


def accuracy(prediction) -> dict[str, float]:
    """Share of right answers."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main() -> None:
    """Runs the recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="a Hub name or a folder")
    parser.add_argument("--dataset", default="stanfordnlp/sst2", help="a Hub name or a folder")
    parser.add_argument("--target-group-sparsity", type=float, default=0.5)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--max-length", type=int, default=64, help="tokens")
    parser.add_argument("--out", type=Path, default=Path("out/text_classification"))
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    data = load_dataset(options.dataset)
    text = next(name for name in ("text", "sentence") if name in data["train"].column_names)
    data = data.map(lambda e: tokenizer(e[text], truncation=True, max_length=options.max_length), batched=True)
    train, test = data["train"], data["validation"] if "validation" in data else data["test"]
    labels = len(set(train["label"]))
    common = dict(
        num_train_epochs=options.epochs, max_steps=options.max_steps, per_device_train_batch_size=32,
        per_device_eval_batch_size=128, learning_rate=options.learning_rate, weight_decay=0.01, warmup_steps=0.06,
        logging_steps=50, save_strategy="no", report_to="none", seed=0,
        dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    inputs = dict(
        train_dataset=train, eval_dataset=test, data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy, processing_class=tokenizer,
    )  # fmt: skip

    def build():
        set_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=labels)

    dense = Trainer(build(), TrainingArguments(str(options.out / "dense"), **common), **inputs)
    dense.train()
    before = dense.evaluate()["eval_accuracy"]

    args = hf_oto.OTOTrainingArguments(
        str(options.out / "oto"), target_group_sparsity=options.target_group_sparsity, **common
    )
    trainer = hf_oto.OTOTrainer(build(), args, **inputs)
    trainer.train()
    after = trainer.evaluate()["eval_accuracy"]
    print(table({"accuracy": before}, {"accuracy": after}))

    folder = str(options.out / "compact")
    trainer.save_model(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    batch = tokenizer(["a gripping film", "a waste of time"], padding=True, return_tensors="pt")
    with torch.no_grad():
        again, saved = model(**batch).logits, trainer.model.cpu().eval()(**batch).logits
    print(f"reloaded from {folder}: max logit difference {(again - saved).abs().max():.1e}")


if __name__ == "__main__":
    main()
