"""What the networks of the OTO papers are trained and scored on: images, pairs for super resolution, texts."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, DatasetDict, load_dataset
from PIL import Image
from transformers import BertTokenizer, DataCollatorWithPadding, Trainer

from ..common import splits
from .images import Batches

SCALE = 2  # of super resolution
CROP = 96  # pixels a side of a high-resolution training crop


class Task(NamedTuple):
    """What a system is trained and scored on; `config` holds what its config has to know of the data."""

    train: Sequence[Any]
    test: Sequence[Any]
    collate: Callable[[list[dict]], Any]
    config: dict[str, Any]
    score: str = "accuracy"
    evaluate: Callable[[Trainer], float] = lambda trainer: trainer.evaluate()["eval_accuracy"]


def images(name: str | None, augment: bool) -> Task:
    """Image classification; with `augment` images are cropped and mirrored at random, as is usual for CIFAR."""
    train, test, labels = splits(name)
    batches = Batches.of(train, test, augment=augment)
    return Task(batches.train, batches.test, batches, {"num_labels": labels})


def pairs(examples: list[dict]) -> dict[str, torch.Tensor]:
    """Random crops, labels (b, 3, CROP, CROP), and their bicubic halves, pixel_values, in [0, 1]."""
    large = []
    for example in examples:
        image = example["image"]
        left, top = (int(torch.randint(n - CROP + 1, ())) for n in image.size)
        large.append(image.convert("RGB").crop((left, top, left + CROP, top + CROP)))
    small = [image.resize((CROP // SCALE, CROP // SCALE), Image.BICUBIC) for image in large]
    return {"pixel_values": torch.stack([*map(to_tensor, small)]), "labels": torch.stack([*map(to_tensor, large)])}


def to_tensor(image: Image.Image) -> torch.Tensor:
    """(3, h, w) in [0, 1]"""
    return torch.from_numpy(np.array(image, np.float32) / 255).permute(2, 0, 1).contiguous()


@torch.no_grad()
def psnr(trainer: Trainer) -> float:
    """Mean PSNR in dB over whole test images, on the Y channel of YCbCr, a border of SCALE pixels left out."""
    model, values = trainer.model.eval(), []
    weights = torch.tensor([65.481, 128.553, 24.966]).view(3, 1, 1) / 255
    for example in trainer.eval_dataset:
        width, height = (n - n % SCALE for n in example["image"].size)
        large = example["image"].convert("RGB").crop((0, 0, width, height))
        small = to_tensor(large.resize((width // SCALE, height // SCALE), Image.BICUBIC))
        upscaled = model(small[None].to(model.device)).reconstruction[0].cpu().clamp(0, 1)
        error = (weights * (upscaled - to_tensor(large))).sum(0)[SCALE:-SCALE, SCALE:-SCALE]
        values.append(-10 * float(error.square().mean().log10()))
    return float(np.mean(values))


def super_resolution(name: str | None, augment: bool) -> Task:
    """Pairs of an image and its bicubic half."""
    if name is None:
        rng = np.random.default_rng(0)
        noise = [Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).resize((128, 128)) for _ in range(8)]
        data = DatasetDict(train=Dataset.from_dict({"image": noise}), test=Dataset.from_dict({"image": noise[:2]}))
    else:
        data = load_dataset(name)
    return Task(data["train"], data["test"], pairs, {"scale": SCALE}, "PSNR (Y, dB)", psnr)


def texts(name: str | None, augment: bool) -> Task:
    """Text classification; the vocabulary is learned from the training set."""
    if name is None:
        words = [["a good film", "a bad film"][i % 2] + " of its kind" * (i % 3) for i in range(200)]
        data = Dataset.from_dict({"sentence": words, "label": [i % 2 for i in range(200)]}).train_test_split(0.2)
    else:
        data = load_dataset(name)
    column = next(c for c in ("sentence", "text") if c in data["train"].column_names)
    tokenizer = BertTokenizer(model_max_length=128).train_new_from_iterator(data["train"][column], 8000)
    data = data.map(lambda e: tokenizer(e[column], truncation=True), batched=True, remove_columns=column)
    test = data["validation"] if "validation" in data else data["test"]
    config = {"num_labels": len(set(test["label"])), "vocab_size": len(tokenizer)}
    return Task(data["train"], test, DataCollatorWithPadding(tokenizer), config)
