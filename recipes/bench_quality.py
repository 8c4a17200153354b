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
import copy
import json
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from common import metric
from quality.methods import METHODS
from quality.tasks import Task, inputs_of, load
from quality.training import train

from hf_oto import PruningPlan, ZIGPartition, compact, measure, partition_zigs

UNRELATED = ("seeds", "methods", "targets", "sparsities", "out")  # options that a single run does not depend on
LEARNING_RATES = {"resnet": (2e-3, 0.1), "vit": (1e-3, 0.05), "text": (3e-5, 1e-2)}  # of AdamW and SGD


def run(task: Task, partition: ZIGPartition, setting: dict[str, Any]) -> dict[str, float]:
    """Trains one model, cuts it, and scores what is left."""
    start, (_, (x, _), test) = process_time(), task
    distilled = setting["method"] == "distilled"
    teacher = train(task, partition, setting | {"method": "dense"}).eval() if distilled else None
    model = train(task, partition, setting, teacher)
    plan = PruningPlan.from_zeros(model, partition)
    small = compact(copy.deepcopy(model), partition, plan).eval()
    right = metric("accuracy")
    with torch.no_grad():
        for x, y in zip(*(t.split(250) for t in test), strict=True):
            right.add_batch(predictions=small(**inputs_of(x)).logits.argmax(1), references=y)
    cpu, zero = process_time() - start, float(plan.removed(partition).mean())
    ratios = {}
    for name, probe in (("params", x[:2]), ("macs", x[:2]), ("latency", x[-8:])):  # texts are sorted by length
        dense, left = measure(model.eval(), small, inputs=inputs_of(probe), seconds=float(name == "latency"))
        ratios[name] = left[name] / dense[name]
    return right.compute() | {"zero": zero, "cpu": cpu} | ratios


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
    print(f"{options.task:10} target        seeds  accuracy          params    MACs  latency  zero ZIGs  CPU s")
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
              f"{100 * error:4.2f}  {mean['params']:8.1%} {mean['macs']:7.1%} {mean['latency']:8.0%} "
              f"{mean['zero']:10.3f} {mean['cpu']:6.0f}", flush=True)  # fmt: skip


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
