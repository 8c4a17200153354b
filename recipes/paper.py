"""Train a network of the OTO papers from scratch, dense and with OTO, and compare the two.

    python recipes/paper.py --system vgg16-bn --dataset NAME_OR_FOLDER --target-group-sparsity 0.6 --steps 4000
    python recipes/paper.py --system carn --smoke              # a tiny one on data made on the fly, in seconds

Both runs have the same steps, seed and optimizer. The score is accuracy; for carn, PSNR in dB on the Y channel of
whole test images. Images need the columns "image" and "label" (carn: "image", the high resolution), texts "sentence"
or "text" and "label". `--config` changes the size of a system, as in --config '{"hidden_size": 256}'.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, DatasetDict, load_dataset
from models import CARN, VGG, DemoNet, DenseNet, SmallResNetForImageClassification, StackedUnets
from PIL import Image, ImageOps
from quickstart import SIZE, accuracy, collate, splits
from transformers import (
    BertForSequenceClassification,
    BertTokenizer,
    ConvNextForImageClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_oto import OTOTrainer, OTOTrainingArguments
from hf_oto.report import table

SCALE = 2  # of super resolution
CROP = 96  # pixels a side of a high-resolution training crop


class Task(NamedTuple):
    """What a system is trained and scored on; `config` holds what its config has to know of the data."""

    train: Dataset
    test: Dataset
    collate: Callable[[list[dict]], Any]
    config: dict[str, Any]
    score: str = "accuracy"
    evaluate: Callable[[Trainer], float] = lambda trainer: trainer.evaluate()["eval_accuracy"]


def augmented(examples: dict[str, list]) -> dict[str, list]:
    """Random shifts by up to an eighth and random mirror images, as is usual for CIFAR."""
    images = []
    for image in examples["image"]:
        left, top = torch.randint(SIZE // 4 + 1, (2,)).tolist()
        image = ImageOps.expand(image.convert("RGB").resize((SIZE, SIZE)), SIZE // 8)
        image = image.crop((left, top, left + SIZE, top + SIZE))
        images.append(ImageOps.mirror(image) if torch.rand(()) < 0.5 else image)
    return examples | {"image": images}


def images(name: str | None, augment: bool) -> Task:
    """Image classification."""
    train, test, labels = splits(name)
    return Task(train.with_transform(augmented) if augment else train, test, collate, {"num_labels": labels})


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


class System(NamedTuple):
    """A network: its class, its task, its learning rate, its config, and what makes that tiny."""

    model: type[PreTrainedModel]
    task: Callable[[str | None, bool], Task]
    lr: float
    config: dict[str, Any]
    tiny: dict[str, Any]


TINY_VGG = {"hidden_sizes": [8, 8, 16], "depths": [1, 1, 2], "classifier_sizes": [16]}
TINY_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
TINY_CONVNEXT = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
TINY_BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
RESNET18 = {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}
CONVNEXT = {"patch_size": 2, "image_size": SIZE}  # a patch of 2 leaves 16 x 16 to the first stage

SYSTEMS = {
    "vgg16": System(VGG, images, 5e-4, {"batch_norm": False}, TINY_VGG),
    "vgg16-bn": System(VGG, images, 1e-3, {}, TINY_VGG),
    "densenet121": System(DenseNet, images, 1e-3, {}, {"growth_rate": 4, "block_config": [2, 2], "bn_size": 2}),
    "resnet18": System(SmallResNetForImageClassification, images, 1e-3, RESNET18, TINY_RESNET),
    "resnet50": System(SmallResNetForImageClassification, images, 1e-3, {}, TINY_RESNET),
    "convnext-tiny": System(ConvNextForImageClassification, images, 1e-3, CONVNEXT, TINY_CONVNEXT),
    "stacked-unets": System(StackedUnets, images, 1e-3, {}, {"hidden_sizes": [4, 8, 8]}),
    "demonet": System(DemoNet, images, 1e-3, {}, {"hidden_size": 8, "classifier_size": 16}),
    "carn": System(CARN, super_resolution, 5e-4, {}, {"hidden_size": 8, "group": 2, "recursive": True}),
    "bert": System(BertForSequenceClassification, texts, 1e-4, {}, TINY_BERT),
}


def main() -> None:
    """Runs the recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", choices=SYSTEMS, required=True)
    parser.add_argument("--dataset", help="a Hub name or a local folder")
    parser.add_argument("--target-group-sparsity", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, help="of AdamW; default: one for each system")
    parser.add_argument("--config", type=json.loads, default={}, help="JSON: fields of the system's config")
    parser.add_argument("--augment", action="store_true", help="crop and mirror classified images at random")
    parser.add_argument("--out", type=Path, default=Path("out/paper"))
    parser.add_argument("--smoke", action="store_true", help="20 steps of a tiny system; needs no dataset")
    options = parser.parse_args()
    if not (options.smoke or options.dataset):
        parser.error("--dataset is missing (or --smoke)")

    system, folder = SYSTEMS[options.system], options.out / options.system
    task = system.task(options.dataset, options.augment)
    fields = system.config | (system.tiny if options.smoke else {}) | options.config | task.config
    steps, batch_size = (20, 8) if options.smoke else (options.steps, options.batch_size)
    common = dict(
        max_steps=steps, per_device_train_batch_size=batch_size, per_device_eval_batch_size=256, weight_decay=0.01,
        learning_rate=options.learning_rate or system.lr, warmup_steps=0.05, logging_steps=max(10, steps // 10),
        save_strategy="no", report_to="none", seed=0, remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    data = dict(train_dataset=task.train, eval_dataset=task.test, data_collator=task.collate, compute_metrics=accuracy)

    def build() -> PreTrainedModel:
        set_seed(0)
        return system.model(system.model.config_class(**fields))

    dense = Trainer(build(), TrainingArguments(str(folder / "dense"), disable_tqdm=True, **common), **data)
    dense.train()
    before = task.evaluate(dense)

    args = OTOTrainingArguments(
        str(folder / "oto"), target_group_sparsity=options.target_group_sparsity, disable_tqdm=True, **common
    )
    trainer = OTOTrainer(build(), args, **data)
    trainer.train()
    after = task.evaluate(trainer)

    print(trainer.partition)
    print(table(trainer.report["before"] | {task.score: before}, trainer.report["after"] | {task.score: after}))
    print(f"group sparsity {trainer.report['group_sparsity']:.3f}, "
          f"zeroed full against compact: {trainer.report['max_output_difference']:.1e}")  # fmt: skip
    trainer.save_model(str(folder / "compact"))


if __name__ == "__main__":
    main()
