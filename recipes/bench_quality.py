"""How good pruning methods are: the same model, data, steps, optimizer, schedule and seeds, only the method differs.

    python recipes/bench_quality.py --task resnet --dataset CIFAR10_FOLDER --steps 800 --targets 0.5 0.3 0.1
    python recipes/bench_quality.py --task text --dataset SST2_FOLDER --model MINILM_FOLDER --steps 200 --batch-size 16
    python recipes/bench_quality.py --smoke                     # every task and method, briefly; needs no dataset

Methods: dense; oto, the package's default; oto-whole, the same without shrinking while it trains; oto-early, in an
earlier window; oto-taught, with the dense model of the same seed as its teacher, whose training comes on top; paper,
OTOv2's own update; scratch, a dense model all of whose widths are smaller; random, the default with ZIGs chosen at
random; and others by their authors' code: tp-..., Torch-Pruning (`pip install -e ".[bench]"`), and, if `--checkouts`
says where they lie, hesso and dhspg, OTOv2's own release (quality/only_train_once.py). Paper, hesso and dhspg know no
budget but a fraction of their groups, `--sparsities`: compare them at the MACs that they leave. Each run is a
`Trainer.train()`.

`--equal` gives every method the training MACs of a dense run of `--steps`: one that shrinks, or is small from the
start, makes more steps. How many, the same run at `--steps` says, so that is made first. Accuracy is that of the
compact model on the test set, or, to choose settings by, on held-out training examples (`--validation`). The last
column is the mean difference to "oto" over the seeds that both have. Each run appends a JSON line to --out; runs
already there are skipped.
"""

import argparse
import functools
from pathlib import Path

from quality.runs import Results, Runs, Setting, printed
from quality.tasks import images, texts
from quality.training import BY_SPARSITY, METHODS, RIVALS, SCHEDULES, run

LEARNING_RATES = {"resnet": (2e-3, 0.1), "vit": (1e-3, 0.05), "text": (3e-5, 1e-2)}  # of AdamW and SGD


def bench(options: argparse.Namespace) -> None:
    """Runs what is missing in --out, and prints a row for each method and target."""
    checkouts = dict(pair.split("=", 1) for pair in options.checkouts)
    task = texts(options) if options.task == "text" else images(options)
    runs = Runs(functools.partial(run, task, checkouts), options.out)
    names = ("task", "steps", "batch_size", "base", "schedule", "train_examples", "validation")
    common = {name: getattr(options, name) for name in names}
    rate = options.learning_rate or LEARNING_RATES[options.task][options.base == "sgd"]
    result = runs.at_equal_macs if options.equal else runs.result
    print(f"{options.task:20} target seeds  accuracy       loss   params   MACs  latency  training  CPU s  beside oto")
    of_ours: dict[float, Results] = {}
    for method in sorted(options.methods, key=METHODS.index):
        if method == "scratch" and not task.can_be_narrow:
            continue
        if method in ("hesso", "dhspg") and method not in checkouts:
            continue
        targets = [1.0] if method == "dense" else options.sparsities if method in BY_SPARSITY else options.targets
        for target in targets:
            results: Results = {}
            for seed in options.seeds:
                setting = Setting(method=method, target=target, seed=seed, learning_rate=rate, **common)
                try:
                    results[seed] = result(setting)
                except Exception as error:
                    if method not in RIVALS:
                        raise
                    print(f"{method:20} {target:6} can't: {type(error).__name__}: {error}", flush=True)
                    break
            if method == "oto":
                of_ours[target] = results
            if results:
                print(printed(method, target, results, of_ours.get(target, {})), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=LEARNING_RATES, default="resnet")
    parser.add_argument("--dataset", help="a Hub name or a folder; images: else scikit-learn's digits")
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="text: a name or a folder")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--targets", nargs="+", type=float, default=[0.5, 0.3], help="MACs left")
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.7], help="ZIGs gone, of paper")
    parser.add_argument("--checkouts", nargs="+", default=[], help="hesso=FOLDER dhspg=FOLDER")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--equal", action="store_true", help="as many steps as a dense run's training MACs pay for")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--train-examples", type=int, default=10**9, help="at most so many")
    parser.add_argument("--base", choices=("adamw", "sgd"), default="adamw")
    parser.add_argument("--schedule", choices=SCHEDULES, default="wsd", help="wsd: linear decay in the last quarter")
    parser.add_argument("--learning-rate", type=float, help="default: one for each task and base")
    parser.add_argument("--validation", action="store_true", help="score on held-out training examples")
    parser.add_argument("--out", type=Path, default=Path("out/bench_quality.jsonl"))
    parser.add_argument("--smoke", action="store_true", help="70 steps, one seed, all tasks")
    options = parser.parse_args()
    if options.smoke:
        vars(options).update(seeds=[0], steps=70, batch_size=4, targets=[0.5], sparsities=[0.5])
    for task in LEARNING_RATES if options.smoke else [options.task]:
        bench(argparse.Namespace(**vars(options) | {"task": task}))


if __name__ == "__main__":
    main()
