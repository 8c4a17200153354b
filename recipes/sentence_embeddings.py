"""Fine-tune a sentence embedder on pairs with SentenceTransformerTrainer, and get a compact SentenceTransformer back.

    python recipes/sentence_embeddings.py --model NAME_OR_FOLDER   # pairs: halves of paragraphs of Python's reference
    python recipes/sentence_embeddings.py --dataset NAME_OR_FOLDER # pairs: the first two columns
    python recipes/sentence_embeddings.py --smoke                  # a tiny BERT, in seconds

The score: for how many of the first halves of the test set the nearest second half is their own.
"""

from dataclasses import dataclass, field

from common import Recipe, byte_pairs, metric, paragraphs, parse
from datasets import Dataset, DatasetDict, load_dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import BertConfig, BertModel, set_seed

from hf_oto import OTOArguments, OTOMixin

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


class OTOEmbedderTrainer(OTOMixin, SentenceTransformerTrainer):
    """`SentenceTransformerTrainer` that ends with a compact model."""


@dataclass
class OTOEmbedderArguments(OTOArguments, SentenceTransformerTrainingArguments):
    """`SentenceTransformerTrainingArguments` and what to prune."""


@dataclass
class SentenceEmbeddings(Recipe):
    """See `Recipe`."""

    model: str = field(default="sentence-transformers/all-MiniLM-L6-v2", metadata={"help": "A Hub name or a folder."})


def pairs(name: str | None) -> DatasetDict:
    """(first, second) of training and test set; of some 300 the score is."""
    if name is not None:
        data = load_dataset(name)
        return data if "test" in data else data["train"].train_test_split(300, seed=0)
    words = [text.split() for text in paragraphs()]
    halves = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in words]
    first, second = ([" ".join(half) for half in side] for side in zip(*halves, strict=True))
    return Dataset.from_dict({"first": first, "second": second}).train_test_split(300, seed=0)


def tiny(folder: str, texts: list[str]) -> str:
    """Saves a BERT with random weights and a tokenizer learned from the texts."""
    tokenizer = byte_pairs(texts, 512)
    BertModel(BertConfig(vocab_size=len(tokenizer), **TINY)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def nearest_is_own(model: SentenceTransformer, test: Dataset) -> float:
    """Share of the pairs, in [0, 1], whose second text is the nearest to the first of all second texts."""
    first, second = (model.encode(test[name][:], normalize_embeddings=True) for name in test.column_names[:2])
    nearest = (first @ second.T).argmax(1)  # (n,)
    return metric("accuracy").compute(predictions=nearest, references=range(len(nearest)))["accuracy"]


def main() -> None:
    """Runs the recipe."""
    options, args = parse(
        __doc__, SentenceEmbeddings, OTOEmbedderArguments, output_dir="out/sentence_embeddings", num_train_epochs=3,
        per_device_train_batch_size=32, learning_rate=5e-5, weight_decay=0.01, warmup_steps=0.06,
    )  # fmt: skip
    data = pairs(options.dataset)
    first = data["train"].column_names[0]
    base = tiny(f"{args.output_dir}/tiny", data["train"][first][:]) if options.smoke else options.model

    def trained(cls: type[SentenceTransformerTrainer]) -> SentenceTransformerTrainer:
        set_seed(args.seed)
        model = SentenceTransformer(base)
        model.max_seq_length = 64
        loss = MultipleNegativesRankingLoss(model)
        trainer = cls(model, args, train_dataset=data["train"], loss=loss)
        trainer.train()
        return trainer

    dense, compact = trained(SentenceTransformerTrainer), trained(OTOEmbedderTrainer)
    scores = [nearest_is_own(trainer.model, data["test"]) for trainer in (dense, compact)]
    print(f"nearest is their own: dense {scores[0]:.4f}, compact {scores[1]:.4f}")

    folder = f"{args.output_dir}/compact"
    compact.save_model(folder)
    again = SentenceTransformer(folder)  # the widths are in its config
    print(f"reloaded from {folder}: {nearest_is_own(again, data['test']):.4f}")


if __name__ == "__main__":
    main()
