"""How good models are that were pruned without training: the same dense models and examples, only the method differs.

    python recipes/bench_prune.py --task resnet --dataset CIFAR10_FOLDER
    python recipes/bench_prune.py --task vit --dataset FASHION_MNIST_FOLDER
    python recipes/bench_prune.py --task text --dataset SST2_FOLDER --model MINILM_FOLDER
    python recipes/bench_prune.py --task llama --dataset TEXT_FOLDER
    python recipes/bench_prune.py --smoke                          # every method, briefly; needs no dataset

A dense model is trained by a plain `Trainer` for each task and seed, and kept in `--models`. Each method gets it and
1,024 training examples, and leaves a fraction of its MACs. Methods: dense; oto, `hf_oto.prune` with its defaults;
oto-8, in 8 rounds; oto-reconstruct, with 200 steps (llama: 300) of imitation; cut, statistics and mean, which cut
what oto cuts and do less afterwards (pruning/simple.py); and others by their authors' code: tp-..., Torch-Pruning's
global pruning at once (`pip install -e ".[bench]"`), and, if `--checkouts` says where it lies, kcm (pruning/kcm.py).

Scored is what is left of the model, on the test set. CPU seconds are those of the method, with the examples in memory;
of cut, statistics and mean without the choice, which they take from oto. The last column is the mean difference to
"oto" over the seeds that both have, in points of accuracy (llama: of loss). Each run appends a JSON line to --out;
runs already there are skipped.
"""

import argparse
import functools
from pathlib import Path

from pruning.dense import NUM_EXAMPLES, TRAINING, subject, task_of
from pruning.methods import METHODS, RIVALS, WITHOUT, PruneSetting, Pruning
from quality.runs import Results, Runs, mean_and_error
from transformers.utils import logging

RECONSTRUCT = {"resnet": 200, "vit": 200, "text": 200, "llama": 300}  # steps of oto-reconstruct


def bench(options: argparse.Namespace) -> None:
    """Runs what is missing in --out, one seed after the other, and prints a row for each method and target."""
    checkouts = dict(pair.split("=", 1) for pair in options.checkouts)
    task = functools.cache(lambda: task_of(options))  # a table of done runs needs no data
    subject_of = functools.lru_cache(1)(lambda seed: subject(task(), options, seed))
    runs = Runs(Pruning(subject_of, checkouts), options.out)
    missing = [name for name in ("kcm",) if name not in checkouts]
    methods = [m for m in METHODS if m in options.methods and m not in (*WITHOUT[options.task], *missing)]
    results: dict[tuple[str, float], Results] = {}
    for seed in options.seeds:
        for target in options.targets:
            for method in methods:
                left = 1.0 if method == "dense" else target
                steps = options.reconstruct or RECONSTRUCT[options.task]
                setting = PruneSetting(
                    options.task, method, left, seed, options.examples, steps if method == "oto-reconstruct" else 0
                )
                try:
                    result = runs.result(setting)
                except Exception as error:
                    if method not in RIVALS:
                        raise
                    print(f"{method:20} {target:6} can't: {type(error).__name__}: {error}", flush=True)
                    continue
                results.setdefault((method, left), {})[seed] = result
    print(f"{options.task:20} target seeds        score   loss  params   MACs  CPU s  beside oto")
    for method, target in sorted(results, key=lambda key: (-key[1], METHODS.index(key[0]))):
        ours = results.get(("oto", target), {})
        print(row(options.task, method, target, results[method, target], ours), flush=True)


def row(task: str, method: str, target: float, results: Results, ours: Results) -> str:
    """A row of the table."""
    name, factor = ("loss", 1) if task == "llama" else ("accuracy", 100)
    columns = {name: [result[name] for result in results.values()] for name in next(iter(results.values()))}
    average = {name: mean_and_error(values)[0] for name, values in columns.items()}
    score, error = mean_and_error([factor * value for value in columns[name]])
    text = f"{method:20} {target:6} {len(results):5} {score:6.3f} +- {error:5.3f} {average['loss']:6.3f} "
    text += f"{average['params']:6.1%} {average['macs']:6.1%} {average['cpu']:6.0f}"
    differences = [factor * (results[seed][name] - ours[seed][name]) for seed in results.keys() & ours.keys()]
    if differences and results is not ours:
        difference, error = mean_and_error(differences)
        text += f"  {difference:+.3f} +- {error:.3f}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TRAINING, default="resnet")
    parser.add_argument("--dataset", help="a Hub name or a folder; else the digits of scikit-learn")
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="text: a name or a folder")
    parser.add_argument("--models", type=Path, default=Path("out/dense"), help="where dense models are kept")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--targets", nargs="+", type=float, default=[0.7, 0.5, 0.3], help="MACs left")
    parser.add_argument("--checkouts", nargs="+", default=[], help="kcm=FOLDER")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--examples", type=int, default=NUM_EXAMPLES, help="that the methods look at")
    parser.add_argument("--steps", type=int, help="of a dense model's training; default: one for each task")
    parser.add_argument("--reconstruct", type=int, help="steps of oto-reconstruct; default: 200, llama 300")
    parser.add_argument("--train-examples", type=int, default=10**9, help="at most so many")
    parser.add_argument("--out", type=Path, default=Path("out/bench_prune.jsonl"))
    parser.add_argument("--smoke", action="store_true", help="a few steps, one seed, all methods")
    options = parser.parse_args()
    options.validation = False  # the test set is what is scored on
    logging.disable_progress_bar()
    if options.smoke:
        vars(options).update(seeds=[0], steps=10, targets=[0.7], examples=32, reconstruct=4)
        options.models = options.out.parent / "dense"
    for task in ("resnet", "text", "llama") if options.smoke else [options.task]:
        bench(argparse.Namespace(**vars(options) | {"task": task}))


if __name__ == "__main__":
    main()
