"""What the recipes share: their command line, metrics, data that needs no download, and a check of what was saved."""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import evaluate
import numpy as np
import torch
from datasets import Dataset, DatasetDict, load_dataset
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)

from hf_oto import OTOTrainingArguments

SIZE = 32  # pixels a side
RELOAD = """
import sys, torch, transformers, hf_oto
from safetensors.torch import load_file
auto_class, folder, probe = sys.argv[1:]
model = getattr(transformers, auto_class).from_pretrained(folder).eval()
inputs = load_file(probe)
expected = inputs.pop("expected_logits")
with torch.no_grad():
    difference = (model(**inputs).logits - expected).abs().max()
print(f"reloaded by another process: max logit difference {difference:.1e}")
"""

# the command line ----------------------------------------------------------------------------------


@dataclass
class Recipe:
    """What a recipe is asked, beside the training arguments."""

    dataset: str | None = field(
        default=None, metadata={"help": "A Hub name or a folder; without it, data that needs no download."}
    )
    smoke: bool = field(default=False, metadata={"help": "A few steps, to see that everything runs."})


def parse(doc: str, recipe: type = Recipe, arguments: type = OTOTrainingArguments, **defaults: Any) -> tuple[Any, Any]:
    """The recipe's options and its training arguments; half of the MACs are left if the command says no target."""
    parser = HfArgumentParser((recipe, arguments), description=doc.partition("\n")[0])
    parser.set_defaults(
        save_strategy="no", report_to="none", logging_steps=50, dataloader_pin_memory=torch.cuda.is_available(),
        **defaults,
    )  # fmt: skip
    options, args = parser.parse_args_into_dataclasses()
    if not (args.target_group_sparsity is not None or args.target_params or args.target_per_axis or args.target_macs):
        args.target_macs = 0.5
    if options.smoke:
        args.max_steps, args.logging_steps = 30, 10
    return options, args


# metrics -------------------------------------------------------------------------------------------


def metric(name: str) -> evaluate.EvaluationModule:
    """A metric of the folder beside this file; where there is a network, `evaluate.load(name)` takes the Hub's."""
    return evaluate.load(str(Path(__file__).parent / "metrics" / name), keep_in_memory=True)


def accuracy() -> Callable[[EvalPrediction], dict[str, float]]:
    """`compute_metrics` of a classifier."""
    share = metric("accuracy")
    return lambda p: share.compute(predictions=p.predictions.argmax(-1), references=p.label_ids)


# data ----------------------------------------------------------------------------------------------


def digits() -> DatasetDict:
    """The 1,797 handwritten digits of scikit-learn, 8 x 8 pixels."""
    data = load_digits()
    images = [Image.fromarray((image * 15.9).astype(np.uint8)) for image in data.images]
    return Dataset.from_dict({"image": images, "label": data.target}).train_test_split(0.2, seed=0)


def splits(name: str | None) -> tuple[Dataset, Dataset, int]:
    """(train, test, number of labels) of images, with the columns "image" and "label"."""
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


def paragraphs() -> list[str]:
    """About 1,500 paragraphs of the Python reference, which every Python ships."""
    found = dict.fromkeys(text for topic in topics.values() for text in topic.split("\n\n"))
    return [" ".join(text.split()) for text in found if 80 < len(text) < 800 and "::=" not in text]


def byte_pairs(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `size` tokens at most, learned from the texts: bytes, and pairs that are frequent."""
    learned = ByteLevelBPETokenizer()
    learned.train_from_iterator(texts, size, show_progress=False, special_tokens=["<pad>", "<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=learned._tokenizer, pad_token="<pad>", eos_token="<end>")


# models --------------------------------------------------------------------------------------------


def vit(labels: int) -> PreTrainedModel:
    """A ViT of four layers, 0.4 M parameters."""
    config = ViTConfig(
        image_size=SIZE, patch_size=8, hidden_size=96, num_hidden_layers=4, num_attention_heads=6,
        intermediate_size=384, num_labels=labels,
    )  # fmt: skip
    return ViTForImageClassification(config)


@torch.no_grad()
def reload(auto_class: str, folder: str, model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> None:
    """Loads `folder` in another process, by plain `from_pretrained`, and prints how far its logits are from ours."""
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    with tempfile.TemporaryDirectory() as temporary:
        probe = f"{temporary}/probe.safetensors"
        save_file(inputs | {"expected_logits": model.eval()(**inputs).logits.contiguous()}, probe)
        subprocess.run([sys.executable, "-c", RELOAD, auto_class, folder, probe], check=True)
