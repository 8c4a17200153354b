"""What bench_prune.py prunes: dense models that were trained once, and the examples that the methods may look at."""

import argparse
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
import transformers as tf
from common import byte_pairs, paragraphs
from datasets import load_dataset
from quality.runs import Setting
from quality.tasks import Task, images, texts
from quality.training import trainer_of
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PrinterCallback, set_seed

CHARACTERS, TOKENS, VOCABULARY = 2000, 128, 512  # of a page, of a row, of the tokenizer
NUM_EXAMPLES = 1024  # that the methods look at
TRAINING = {  # task -> steps, batch size, learning rate
    "resnet": (2400, 64, 2e-3),
    "vit": (2400, 64, 1e-3),
    "text": (600, 16, 3e-5),
    "llama": (600, 16, 2e-3),
}


class Subject(NamedTuple):
    """A dense model and the calibration examples of one seed.

    Attributes:
        fresh: gives the dense model, a new object each time, in eval mode.
        batches: with labels.
        inputs: two examples without labels, on which MACs are counted.
    """

    task: Task
    fresh: Callable[[], tf.PreTrainedModel]
    batches: list[dict[str, Tensor]]
    inputs: dict[str, Tensor]


def language(options: argparse.Namespace) -> Task:
    """Next tokens, by a Llama of 3.2 M parameters; the last tenth of the pages is held out."""
    lines = load_dataset(options.dataset)["train"]["text"][:] if options.dataset else paragraphs()
    whole = "\n".join(lines)
    pages = [whole[i : i + CHARACTERS] for i in range(0, len(whole), CHARACTERS)]
    train, test = pages[: -len(pages) // 10], pages[-len(pages) // 10 :]
    tokenizer = byte_pairs(train, VOCABULARY)

    def rows(pages: list[str]) -> list[dict[str, Tensor]]:
        ids = torch.tensor(tokenizer("\n".join(pages))["input_ids"])
        whole_rows = [row for row in ids.split(TOKENS) if len(row) == TOKENS]
        return [{"input_ids": row, "labels": row} for row in whole_rows]

    def build(width: float) -> tf.PreTrainedModel:
        hidden, layers = (32, 2) if options.smoke else (256, 4)
        shape = {"hidden_size": hidden, "intermediate_size": 11 * hidden // 4, "num_hidden_layers": layers}
        shape |= {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": TOKENS}
        return tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=len(tokenizer), **shape))

    return Task(build, rows(train), rows(test), tf.default_data_collator, False)


def task_of(options: argparse.Namespace) -> Task:
    tasks = {"text": texts, "llama": language}
    task = tasks.get(options.task, images)(options)
    return task._replace(test=[task.test[i] for i in range(min(64, len(task.test)))]) if options.smoke else task


def subject(task: Task, options: argparse.Namespace, seed: int) -> Subject:
    """The dense model of a seed, trained if `--models` hasn't it, and the examples that this seed draws."""
    folder = Path(options.models, f"{options.task}-{seed}")
    steps, batch_size, rate = TRAINING[options.task]
    if not folder.exists():
        setting = Setting(
            task=options.task, method="dense", target=1.0, seed=seed, steps=options.steps or steps,
            batch_size=batch_size, learning_rate=rate, base="adamw", schedule="wsd",
            train_examples=options.train_examples, validation=False,
        )  # fmt: skip
        with TemporaryDirectory() as scratch:
            trainer = trainer_of(task, {}, setting, scratch)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        trainer.model.save_pretrained(folder)
    cls = type(task.build(1.0))
    set_seed(seed)  # images are mirrored at random
    drawn = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(seed))[: options.examples]
    batches = [dict(task.collate([task.train[i] for i in part.tolist()])) for part in drawn.split(batch_size)]
    inputs = {name: tensor[:2] for name, tensor in batches[0].items() if name != "labels"}
    return Subject(task, lambda: cls.from_pretrained(folder).eval(), batches, inputs)


@torch.no_grad()
def scores(model: nn.Module, task: Task) -> dict[str, float]:
    """Accuracy in [0, 1] and mean cross entropy over the test set, of labels or of next tokens."""
    model.eval()
    num_right, loss, number = 0, 0.0, 0
    for begin in range(0, len(task.test), 64):
        batch = task.collate([task.test[i] for i in range(begin, min(begin + 64, len(task.test)))])
        labels = batch.pop("labels")
        logits = model(**batch).logits
        if logits.dim() == 3:  # (rows, tokens, vocabulary): each token is the label of the one before it
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        num_right += int((logits.argmax(1) == labels).sum())
        loss += float(cross_entropy(logits, labels, reduction="sum"))
        number += len(labels)
    return {"accuracy": num_right / number, "loss": loss / number}
