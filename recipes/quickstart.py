"""Train a ResNet and a small ViT once and get compact models back, on real images that need no download.

    python recipes/quickstart.py                                   # the digits that scikit-learn ships
    python recipes/quickstart.py --dataset NAME_OR_FOLDER          # any image classification dataset
    python recipes/quickstart.py --smoke                           # a few steps, to see that everything runs

For each model: the ZIG partition, a dense run and an OTO run of the same number of steps, a table of what changed, and
the saved compact model loaded again by another process with plain `from_pretrained`.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict, load_dataset
from PIL import Image
from sklearn.datasets import load_digits
from transformers import (
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from hf_oto import OTOTrainer, OTOTrainingArguments
from hf_oto.report import table

SIZE = 32  # pixels a side

RELOAD = """
import sys, numpy as np, torch, hf_oto
from transformers import AutoModelForImageClassification
folder = sys.argv[1]
model = AutoModelForImageClassification.from_pretrained(folder).eval()
pixels, logits = (torch.from_numpy(np.load(f"{folder}/{name}.npy")) for name in ("pixels", "logits"))
with torch.no_grad():
    print(f"reloaded by another process: max logit difference {(model(pixels).logits - logits).abs().max():.1e}")
"""


def digits() -> DatasetDict:
    """The 1,797 handwritten digits of scikit-learn, 8 x 8 pixels."""
    data = load_digits()
    images = [Image.fromarray((image * 15.9).astype(np.uint8)) for image in data.images]
    return Dataset.from_dict({"image": images, "label": data.target}).train_test_split(0.2, seed=0)


def splits(name: str | None) -> tuple[Dataset, Dataset, int]:
    """(train, test, number of labels), with the columns "image" and "label"."""
    data = digits() if name is None else load_dataset(name)
    test = data["test"] if "test" in data else data["validation"]
    return data["train"], test, len(set(test["label"]))


def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
    """PIL images -> pixel_values (b, 3, SIZE, SIZE) in about [-1, 1]."""
    pixels = [np.asarray(e["image"].convert("RGB").resize((SIZE, SIZE)), np.float32) / 127.5 - 1 for e in examples]
    return {
        "pixel_values": torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(),
        "labels": torch.tensor([e["label"] for e in examples]),
    }


def accuracy(prediction) -> dict[str, float]:
    """Share of right answers."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def resnet(labels: int) -> PreTrainedModel:
    """A ResNet of three stages, 0.7 M parameters."""
    config = ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64, 128], depths=[2, 2, 2], layer_type="basic", num_labels=labels
    )
    return ResNetForImageClassification(config)


def vit(labels: int) -> PreTrainedModel:
    """A ViT of four layers, 0.4 M parameters."""
    config = ViTConfig(
        image_size=SIZE, patch_size=8, hidden_size=96, num_hidden_layers=4, num_attention_heads=6,
        intermediate_size=384, num_labels=labels,
    )  # fmt: skip
    return ViTForImageClassification(config)


def main() -> None:
    """Runs the recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="a Hub name or a local folder; default: scikit-learn's digits")
    parser.add_argument("--target-group-sparsity", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("out/quickstart"))
    parser.add_argument("--smoke", action="store_true", help="30 steps")
    options = parser.parse_args()
    steps = 30 if options.smoke else options.steps
    train, test, labels = splits(options.dataset)

    for name, build, lr in (("ResNet", resnet, 2e-3), ("ViT", vit, 1e-3)):
        print(f"\n===== {name} =====")
        common = dict(
            max_steps=steps, per_device_train_batch_size=32, per_device_eval_batch_size=256, learning_rate=lr,
            weight_decay=0.01, warmup_steps=0.1, logging_steps=max(10, steps // 5), save_strategy="no", seed=0,
            report_to="none", remove_unused_columns=False, dataloader_pin_memory=torch.cuda.is_available(),
        )  # fmt: skip
        data = dict(train_dataset=train, eval_dataset=test, data_collator=collate, compute_metrics=accuracy)

        set_seed(0)
        dense = Trainer(
            build(labels), TrainingArguments(str(options.out / "dense"), disable_tqdm=True, **common), **data
        )
        dense.train()
        before = dense.evaluate()["eval_accuracy"]

        set_seed(0)
        args = OTOTrainingArguments(
            str(options.out / name), target_group_sparsity=options.target_group_sparsity, **common
        )
        trainer = OTOTrainer(build(labels), args, **data)
        trainer.train()
        after = trainer.evaluate()["eval_accuracy"]

        print(table({"accuracy": before}, {"accuracy": after}))

        folder = options.out / name / "compact"
        trainer.save_model(str(folder))
        pixels = collate([test[i] for i in range(16)])["pixel_values"]
        with torch.no_grad():
            logits = trainer.model.eval()(pixels.to(trainer.model.device)).logits.cpu()
        np.save(folder / "pixels.npy", pixels.numpy())
        np.save(folder / "logits.npy", logits.numpy())
        subprocess.run([sys.executable, "-c", RELOAD, str(folder)], check=True)


if __name__ == "__main__":
    main()
