"""How good pruning methods are: the same model, data, steps, base optimizer and seeds, only the method differs.

    python recipes/bench_quality.py --task resnet --dataset CIFAR10_FOLDER --steps 4000
    python recipes/bench_quality.py --task text --dataset SST2_FOLDER --model MINILM_FOLDER --steps 650 --batch-size 32
    python recipes/bench_quality.py --smoke                     # every task and method, briefly; needs no dataset

Methods: dense; scheduled, the package's default; paper, OTOv2's update; magnitude, one shot at 10 % of the steps by
squared norm per parameter; hesso, the score of HESSO (arXiv 2409.09085) on this schedule, in its window; random
ZIGs on the default's schedule; distilled, the default taught by the dense model of the same seed, whose training comes
on top (Hinton et al., arXiv 1503.02531). All but paper share budget, floors and freezing. Paper knows group sparsity
alone and can miss it: compare it by what is left, or give all the same --sparsities by `--budget groups`. Accuracy is
that of the compact model on the test set, or, to select settings by, on held-out training examples (`--validation`).
Each run appends a JSON line to --out; runs already there are skipped.
"""

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_dataset
from models import SmallResNetForImageClassification
from quickstart import SIZE, digits, vit
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, normalize
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    PreTrainedModel,
    ResNetConfig,
    get_linear_schedule_with_warmup,
    set_seed,
)

from hf_oto import DHSPG, PruningPlan, ZIGPartition, compact, partition_zigs
from hf_oto.dhspg import Moments
from hf_oto.paper import PaperDHSPG, Penalty
from hf_oto.report import macs

UNRELATED = ("seeds", "methods", "targets", "sparsities", "out")  # options that a single run does not depend on
METHODS = ("dense", "scheduled", "paper", "magnitude", "hesso", "random", "distilled")
TEACHING, TEMPERATURE = 0.7, 2.0  # the teacher's part of the loss, and how soft both predictions are
LEARNING_RATES = {"resnet": (2e-3, 0.1), "vit": (1e-3, 0.05), "text": (3e-5, 1e-2)}  # of AdamW and SGD


def at_random(moments: Moments, generator: torch.Generator) -> Tensor:
    """No ZIG is more important than another; batches and dropout stay those of the other methods."""
    return torch.rand(len(moments.cost), generator=generator) * moments.cost


def magnitude(moments: Moments) -> Tensor:
    """Squared norm per parameter."""
    return moments.weight_squared / moments.elements * moments.cost


def hesso(moments: Moments) -> Tensor:
    """The mean of HESSO's five scores."""
    xg, xx, gg, elements, cost = moments
    cosine = torch.nan_to_num(-xg / (xx * gg).sqrt(), posinf=0.0, neginf=0.0)
    scores = xx.sqrt(), xx.sqrt() / elements, 1 + cosine, xg.abs(), xg.square() / 2
    return sum(normalize(score, dim=0) for score in scores) / len(scores) * cost


def optimizer_of(model: PreTrainedModel, partition: ZIGPartition, setting: dict[str, Any]) -> torch.optim.Optimizer:
    """The optimizer of a method, all of them around the same base."""
    method, steps, adam = setting["method"], setting["steps"], setting["base"] == "adamw"
    base = torch.optim.AdamW if adam else torch.optim.SGD
    common = {"lr": setting["learning_rate"]} | ({"weight_decay": 0.01} if adam else {"momentum": 0.9})
    if method == "dense":
        return base(model.parameters(), **common)
    cls, arguments = {
        "scheduled": (DHSPG, {}),
        "distilled": (DHSPG, {}),
        "paper": (PaperDHSPG, {"penalty": Penalty.released(base, epsilon=0.95)}),  # as in its tutorials
        # saliences are divided by the cost of a ZIG, which these three are not meant to know: they multiply by it
        "magnitude": (DHSPG, {"salience": magnitude, "window": (0.1, 0.1 + 1 / steps), "num_events": 1}),
        "hesso": (DHSPG, {"salience": hesso, "window": (0.1, 0.25), "num_events": 10}),  # as in its tutorials
        "random": (
            DHSPG,
            {"salience": functools.partial(at_random, generator=torch.Generator().manual_seed(setting["seed"]))},
        ),
    }[method]
    kind = "target_group_sparsity" if setting["budget"] == "groups" else f"target_{setting['budget']}"
    return cls(model, partition, base, total_steps=steps, **{kind: setting["target"]}, **arguments, **common)


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


def train(
    task: Task, partition: ZIGPartition, setting: dict[str, Any], teacher: PreTrainedModel | None = None
) -> PreTrainedModel:
    """A model as a method trains it, not cut yet."""
    steps, size = setting["steps"], setting["batch_size"]
    set_seed(setting["seed"])
    build, (x, y), _ = task
    model = build().train()
    optimizer, generator = optimizer_of(model, partition, setting), torch.Generator().manual_seed(setting["seed"])
    rate = get_linear_schedule_with_warmup(optimizer, steps // 20, steps)
    order = torch.cat([torch.randperm(len(y), generator=generator) for _ in range(steps * size // len(y) + 1)])
    if x.dim() == 2:  # texts of about the same length go together, in random order
        length = (x != 0).sum(1)
        some = [part[length[part].argsort()].split(size) for part in order[: steps * size].split(32 * size)]
        batches = [part[i] for part in some for i in torch.randperm(len(part), generator=generator)]
    else:
        batches = order[: steps * size].split(size)
    for batch in batches:
        optimizer.zero_grad()
        inputs = inputs_of(x[batch], generator)
        output = model(**inputs, labels=y[batch])
        loss = output.loss
        if teacher is not None:
            with torch.no_grad():
                taught = log_softmax(teacher(**inputs).logits / TEMPERATURE, 1)
            soft = kl_div(log_softmax(output.logits / TEMPERATURE, 1), taught, reduction="batchmean", log_target=True)
            loss = (1 - TEACHING) * loss + TEACHING * TEMPERATURE**2 * soft
        loss.backward()
        optimizer.step()
        rate.step()
    return model


def run(task: Task, partition: ZIGPartition, setting: dict[str, Any]) -> dict[str, float]:
    """Trains one model, cuts it, and scores what is left."""
    start, (_, (x, _), test) = process_time(), task
    distilled = setting["method"] == "distilled"
    teacher = train(task, partition, setting | {"method": "dense"}).eval() if distilled else None
    model, probe = train(task, partition, setting, teacher), inputs_of(x[:1])
    dense = model.num_parameters(), macs(model, probe)
    plan = PruningPlan.from_zeros(model, partition)
    compact(model, partition, plan).eval()
    with torch.no_grad():
        tests = zip(*(t.split(250) for t in test), strict=True)
        hits = sum(int((model(**inputs_of(x)).logits.argmax(1) == y).sum()) for x, y in tests)
    return {"accuracy": hits / len(test[1]), "zero": plan.removed(partition).mean(), "cpu": process_time() - start,
            "params": model.num_parameters() / dense[0], "macs": macs(model, probe) / dense[1]}  # fmt: skip


def bench(options: argparse.Namespace) -> None:
    """Runs what is missing in --out, and prints method by target, means over the seeds."""
    rate = options.learning_rate or LEARNING_RATES[options.task][options.base == "sgd"]
    common = {k: v for k, v in vars(options).items() if k not in UNRELATED} | {"learning_rate": rate}
    targets = options.sparsities if options.budget == "groups" else options.targets
    special = {"dense": ("", [""]), "paper": ("groups", options.sparsities)}
    rows = [(method, *special.get(method, (options.budget, targets))) for method in options.methods]
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    done = {json.dumps(line.pop("setting")): line for line in map(json.loads, lines)}
    task = load(options)
    partition = partition_zigs(task[0](), inputs_of(task[1][0][:2]))
    print(f"{options.task:10} target        seeds  accuracy          params    MACs  zero ZIGs  CPU s")
    for method, budget, target in [(m, b, t) for m, b, many in rows for t in many]:
        results = []
        for seed in range(options.seeds):
            setting = common | {"method": method, "budget": budget, "target": target, "seed": seed}
            if (key := json.dumps(setting)) not in done:
                done[key] = run(task, partition, setting)
                options.out.parent.mkdir(parents=True, exist_ok=True)
                with options.out.open("a") as file:
                    file.write(json.dumps({"setting": setting} | done[key]) + "\n")
            results.append(done[key])
        mean = {name: np.mean([result[name] for result in results]) for name in results[0]}
        error = np.std([r["accuracy"] for r in results]) / (len(results) - 1 or np.nan) ** 0.5
        print(f"{method:10} {f'{budget} {target}':13} {len(results):5}  {100 * mean['accuracy']:5.2f} +- "
              f"{100 * error:4.2f}  {mean['params']:8.1%} {mean['macs']:7.1%} {mean['zero']:10.3f} "
              f"{mean['cpu']:6.0f}", flush=True)  # fmt: skip


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=LEARNING_RATES, default="resnet")
    parser.add_argument("--dataset", help="a Hub name or a folder; images: else scikit-learn's digits")
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="text: a name or a folder")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--budget", choices=("macs", "params", "groups"), default="macs", help="of all but paper")
    parser.add_argument("--targets", nargs="+", type=float, default=[0.5, 0.3], help="what is left")
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.7, 0.9], help="of ZIGs gone")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--train-examples", type=int, default=10**9, help="at most so many")
    parser.add_argument("--base", choices=("adamw", "sgd"), default="adamw")
    parser.add_argument("--learning-rate", type=float, help="default: one for each task and base")
    parser.add_argument("--validation", action="store_true", help="score on held-out training examples")
    parser.add_argument("--out", type=Path, default=Path("out/bench_quality.jsonl"))
    parser.add_argument("--smoke", action="store_true", help="70 steps, one seed, all tasks")
    options = parser.parse_args()
    if options.smoke:
        vars(options).update(seeds=1, steps=70, batch_size=4, targets=[0.5], sparsities=[0.5])
    for task in LEARNING_RATES if options.smoke else [options.task]:
        bench(argparse.Namespace(**vars(options) | {"task": task}))


if __name__ == "__main__":
    main()
