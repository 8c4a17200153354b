"""The models and data that bench_quality.py trains: a small ResNet, a small ViT, and a pretrained text model."""

import argparse
from collections.abc import Callable

import numpy as np
import torch
from common import SIZE, digits, vit
from datasets import Dataset, load_dataset
from paper.models import SmallResNetForImageClassification
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, PreTrainedModel, ResNetConfig

Data = tuple[Tensor, Tensor]  # pixels, uint8 (n, 3, SIZE, SIZE), or token ids, (n, <= 64), padded with 0; labels (n,)
Task = tuple[Callable[[], PreTrainedModel], Data, Data]  # a maker of fresh models, what trains them, what scores them


def read(data: Dataset, model: str | None) -> Data:
    """All of a dataset: images, or texts in the tokens of a model."""
    labels = torch.tensor(data["label"][:])
    if model is None:
        pixels = np.stack([np.asarray(image.convert("RGB").resize((SIZE, SIZE))) for image in data["image"]])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels
    text = data[next(name for name in ("text", "sentence") if name in data.column_names)][:]
    tokenizer = AutoTokenizer.from_pretrained(model, model_max_length=64)
    tokens = tokenizer(text, truncation=True, padding=True, return_tensors="pt")
    by_length = tokens["attention_mask"].sum(1).argsort(stable=True)
    return (tokens["input_ids"] * tokens["attention_mask"])[by_length], labels[by_length]


def load(options: argparse.Namespace) -> Task:
    """One of the tasks; the text of the smoke test is made up."""
    model = options.model if options.task == "text" else None
    if model and options.smoke:
        y = torch.arange(256) % 2
        train = test = torch.full((256, 16), 5) + y[:, None], y
    else:
        data = load_dataset(options.dataset) if options.dataset else digits()
        known = "test" in data and min(data["test"]["label"]) >= 0  # GLUE keeps its own
        train, test = data["train"].shuffle(seed=0), data["test" if known else "validation"]
        if options.validation:
            train, test = train.train_test_split(min(5000, len(train) // 5), shuffle=False).values()
        train, test = read(train.take(min(options.train_examples, len(train))), model), read(test, model)
    labels = int(train[1].max()) + 1

    def build() -> PreTrainedModel:
        if options.task == "resnet":  # 0.2 M parameters; its stages have 16, 8 and 4 pixels a side
            shape = dict(hidden_sizes=[16, 32, 64], depths=[2] * 3, layer_type="basic", downsample_in_first_stage=True)
            return SmallResNetForImageClassification(ResNetConfig(embedding_size=16, num_labels=labels, **shape))
        if options.task == "vit":
            return vit(labels)
        if options.smoke:
            shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
            return AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=10, **shape))
        return AutoModelForSequenceClassification.from_pretrained(model, num_labels=labels)

    return build, train, test


def inputs_of(x: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """What the model takes; with a generator, half of the images are mirrored."""
    if x.dim() == 2:
        x = x[:, : int((x != 0).sum(1).max())]
        return {"input_ids": x, "attention_mask": (x != 0).long()}
    pixels = x.float() / 127.5 - 1
    if generator is not None:
        pixels = torch.where(torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5, pixels.flip(3), pixels)
    return {"pixel_values": pixels}
