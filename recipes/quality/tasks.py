"""The models and data that bench_quality.py trains: a small ResNet, a small ViT, and a pretrained text model."""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers as tf
from common import SIZE, digits
from datasets import load_dataset
from paper.models import SmallResNetForImageClassification
from torch import Tensor
from torch.utils.data import Dataset

LENGTH = 64  # tokens of a text at most
TINY = {"vocab_size": 10, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


class Task(NamedTuple):
    """What is trained: `build` makes a fresh model, all of whose widths are a fraction of the usual ones."""

    build: Callable[[float], tf.PreTrainedModel]
    train: Any
    test: Any
    collate: Callable[[list[dict]], dict[str, Tensor]]
    can_be_narrow: bool  # whether a smaller model can be trained from scratch instead

    def inputs(self, num_examples: int) -> dict[str, Tensor]:
        """The first examples of the test set, as the model takes them."""
        batch = self.collate([self.test[i] for i in range(num_examples)])
        return {name: tensor for name, tensor in batch.items() if name != "labels"}


class Images(Dataset):
    """Images that are decoded once, uint8 (n, 3, SIZE, SIZE); those that train are mirrored at random."""

    def __init__(self, data: Any, mirrored: bool) -> None:
        pixels = [np.asarray(image.convert("RGB").resize((SIZE, SIZE))) for image in data["image"]]
        self.pixels = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
        self.labels = torch.tensor(data["label"][:])
        self.mirrored = mirrored

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        is_mirrored = self.mirrored and torch.rand(()) < 0.5
        pixels = self.pixels[i].flip(2) if is_mirrored else self.pixels[i]
        return {"pixel_values": pixels, "labels": self.labels[i]}


def stacked(examples: list[dict]) -> dict[str, Tensor]:
    """A batch of images in [-1, 1]."""
    batch = {name: torch.stack([example[name] for example in examples]) for name in examples[0]}
    return batch | {"pixel_values": batch["pixel_values"].float() / 127.5 - 1}


def images(options: argparse.Namespace) -> Task:
    """Image classification from scratch: by a ResNet of 0.18 M parameters, or a ViT of 0.47 M."""
    data = load_dataset(options.dataset) if options.dataset else digits()
    train, test = splits(data, options)
    num_labels = len(set(test["label"]))

    def resnet(width: float) -> tf.PreTrainedModel:  # its stages have 32, 16 and 8 pixels a side
        sizes = [round(width * size) for size in (16, 32, 64)]
        shape = {"depths": [2] * 3, "layer_type": "basic", "downsample_in_first_stage": True, "num_labels": num_labels}
        return SmallResNetForImageClassification(tf.ResNetConfig(embedding_size=sizes[0], hidden_sizes=sizes, **shape))

    def vit(width: float) -> tf.PreTrainedModel:
        hidden = 6 * round(width * 16)  # six heads
        shape = {"num_hidden_layers": 4, "num_attention_heads": 6, "image_size": SIZE, "patch_size": 8}
        shape |= {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_labels": num_labels}
        return tf.ViTForImageClassification(tf.ViTConfig(**shape))

    return Task(
        resnet if options.task == "resnet" else vit,
        Images(train, mirrored=True),
        Images(test, mirrored=False),
        stacked,
        True,
    )


def tiny(width: float) -> tf.PreTrainedModel:
    return tf.BertForSequenceClassification(tf.BertConfig(**TINY))


def texts(options: argparse.Namespace) -> Task:
    """Text classification by a pretrained model; that of the smoke test has random weights and made-up texts."""
    if options.smoke:
        made_up = [{"input_ids": [5 + i % 2] * 16, "labels": i % 2} for i in range(256)]
        return Task(tiny, made_up, made_up, tf.default_data_collator, False)
    tokenizer = tf.AutoTokenizer.from_pretrained(options.model, model_max_length=LENGTH)
    train, test = splits(load_dataset(options.dataset), options)
    column = "text" if "text" in train.column_names else "sentence"

    def tokens(data: Any) -> list[dict]:
        ids = tokenizer(data[column][:], truncation=True)["input_ids"]
        return [{"input_ids": i, "labels": label} for i, label in zip(ids, data["label"], strict=True)]

    def build(width: float) -> tf.PreTrainedModel:
        return tf.AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=len(set(test["label"])))

    return Task(build, tokens(train), tokens(test), tf.DataCollatorWithPadding(tokenizer), False)


def splits(data: Any, options: argparse.Namespace) -> tuple[Any, Any]:
    """What trains, and what is scored on: the test set, or training examples that are held out."""
    has_labels = "test" in data and min(data["test"]["label"]) >= 0  # GLUE keeps those of its test sets
    train, test = data["train"].shuffle(seed=0), data["test" if has_labels else "validation"]
    if options.validation:
        train, test = train.train_test_split(min(5000, len(train) // 5), shuffle=False).values()
    return train.take(min(options.train_examples, len(train))), test
