"""Fine-tune a text model once and get a compact one back.

    python recipes/text_classification.py --model NAME_OR_FOLDER --dataset NAME_OR_FOLDER
    python recipes/text_classification.py --smoke                  # a tiny BERT on made-up texts, in seconds

A dense run and an OTO run of the same steps, a table of what changed, and the saved compact model loaded again by
another process. The dataset needs a text column ("text" or "sentence"), "label", and a "validation" or "test" split.
"""

from dataclasses import dataclass, field

from common import Recipe, accuracy, byte_pairs, parse, reload
from datasets import Dataset, load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    set_seed,
)

from hf_oto import OTOTrainer

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


@dataclass
class TextClassification(Recipe):
    """See `Recipe`; the dataset is SST-2 by default."""

    model: str = field(default="sentence-transformers/all-MiniLM-L6-v2", metadata={"help": "A Hub name or a folder."})
    max_length: int = field(default=64, metadata={"help": "Tokens of a text at most."})


def main() -> None:
    """Runs the recipe."""
    options, args = parse(
        __doc__, TextClassification, output_dir="out/text_classification", num_train_epochs=3,
        per_device_train_batch_size=32, per_device_eval_batch_size=128, learning_rate=5e-5, weight_decay=0.01,
        warmup_steps=0.06,
    )  # fmt: skip
    if options.smoke:
        texts = {"text": ["a good film", "a waste of time"] * 100, "label": [1, 0] * 100}
        data, tokenizer = Dataset.from_dict(texts).train_test_split(0.2, seed=0), byte_pairs(texts["text"], 300)
    else:
        data = load_dataset(options.dataset or "stanfordnlp/sst2")
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    column = next(name for name in ("text", "sentence") if name in data["train"].column_names)
    data = data.map(lambda e: tokenizer(e[column], truncation=True, max_length=options.max_length), batched=True)
    train, test = data["train"], data["validation"] if "validation" in data else data["test"]
    labels = len(set(train["label"]))

    def build() -> PreTrainedModel:
        set_seed(args.seed)
        if options.smoke:
            config = BertConfig(vocab_size=len(tokenizer), num_labels=labels, **TINY)
            return BertForSequenceClassification(config)
        return AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=labels)

    def trained(cls: type[Trainer]) -> Trainer:
        trainer = cls(
            build(), args, train_dataset=train, eval_dataset=test, data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=accuracy(), processing_class=tokenizer,
        )  # fmt: skip
        trainer.train()
        return trainer

    dense, compact = trained(Trainer), trained(OTOTrainer)
    scores = [trainer.evaluate()["eval_accuracy"] for trainer in (dense, compact)]
    print(f"accuracy dense {scores[0]:.4f}, compact {scores[1]:.4f}")

    folder = f"{args.output_dir}/compact"
    compact.save_model(folder)
    batch = tokenizer(["a gripping film", "a waste of time"], padding=True, return_tensors="pt")
    reload("AutoModelForSequenceClassification", folder, compact.model, dict(batch))


if __name__ == "__main__":
    main()
