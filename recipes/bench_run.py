"""What a whole run costs: CPU seconds of `OTOTrainer.train()` beside those of a dense `Trainer.train()`, same steps.

    python recipes/bench_run.py                             # ViT, BERT and Llama shapes, half and 30 % of the MACs
    python recipes/bench_run.py --models vit --targets 0.3 --pairs 3 --steps 200

Each run has a process and one thread of its own. A pair is a dense run and ours, one after the other, and a figure is
the median of the pairs' ratios. All that OTOTrainer does is in it: analysis, rehearsal, cuts, certificates, report.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time

import torch
import transformers as tf
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, set_seed

from hf_oto import OTOTrainer, OTOTrainingArguments

KINDS = ["vit", "bert", "llama"]
NUM_LABELS = 10
LENGTH = 64  # tokens of a text; an image has as many patches


class Examples(Dataset):
    """Random images or texts, each with a label that shows in it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __len__(self) -> int:
        return 100_000

    def __getitem__(self, i: int) -> dict:
        generator = torch.Generator().manual_seed(i)
        label = i % NUM_LABELS
        if self.kind == "vit":
            pixels = torch.randn(3, 32, 32, generator=generator) + label / NUM_LABELS
            return {"pixel_values": pixels, "labels": label}
        ids = torch.randint(NUM_LABELS, 1000, (LENGTH,), generator=generator)
        ids[1] = label
        return {"input_ids": ids, "labels": label}


def made(kind: str, hidden: int) -> tf.PreTrainedModel:
    """The model of a kind; from a hidden size of 256 on arithmetic takes most of the time."""
    set_seed(0)
    sizes = {"hidden_size": hidden, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 4 * hidden}
    if kind == "vit":
        config = tf.ViTConfig(**sizes, image_size=32, patch_size=4, num_labels=NUM_LABELS)
        return tf.ViTForImageClassification(config)
    sizes |= {"vocab_size": 1000, "num_labels": NUM_LABELS}
    if kind == "llama":
        config = tf.LlamaConfig(**sizes, num_key_value_heads=4, pad_token_id=NUM_LABELS)
        return tf.LlamaForSequenceClassification(config)
    return tf.BertForSequenceClassification(tf.BertConfig(**sizes))


def run(kind: str, target: float, options: argparse.Namespace) -> dict[str, float]:
    """One run in this process: a target of 1 is the dense `Trainer`."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"output_dir": folder, "max_steps": options.steps, "per_device_train_batch_size": 16}
        settings |= {"report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
        if target == 1:
            trainer = Trainer(made(kind, options.hidden), TrainingArguments(**settings), train_dataset=Examples(kind))
        else:
            args = OTOTrainingArguments(**settings, target_macs=target, shrink=not options.no_shrink)
            trainer = OTOTrainer(made(kind, options.hidden), args, train_dataset=Examples(kind))
        start = time.process_time()
        trainer.train()
        return {"seconds": time.process_time() - start}


def in_a_process(kind: str, target: float, options: argparse.Namespace) -> float:
    """The CPU seconds of a run in a process of its own."""
    command = [sys.executable, __file__, "--one", "--models", kind, "--targets", str(target)]
    command += ["--steps", str(options.steps), "--hidden", str(options.hidden)]
    if options.no_shrink:
        command.append("--no-shrink")
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(printed.splitlines()[-1])["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--targets", nargs="+", type=float, default=[0.5, 0.3], help="fractions of the MACs left")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--hidden", type=int, default=256, help="width of the models")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--no-shrink", action="store_true", help="cut at the end only")
    parser.add_argument("--one", action="store_true", help="make one run in this process, and print it")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run(options.models[0], options.targets[0], options)))
        return
    print("model  target_macs  dense s  ours s  ratio (each pair)")
    for kind in options.models:
        for target in options.targets:
            pairs = []
            for _ in range(options.pairs):
                dense = in_a_process(kind, 1.0, options)
                ours = in_a_process(kind, target, options)
                pairs.append((dense, ours))
            ratios = [ours / dense for dense, ours in pairs]
            dense, ours = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
            each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            ratio = statistics.median(ratios)
            print(f"{kind:5}  {target:11}  {dense:7.1f}  {ours:6.1f}  {ratio:.2f} ({each})", flush=True)


if __name__ == "__main__":
    main()
