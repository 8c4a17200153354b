"""The table of OTOv2 for CIFAR-10: networks trained as in its tutorials, beside the figures published there.

    python -m recipes.paper.table --dataset CIFAR10 --minutes 50      # go on for so long; call it again for the rest
    python -m recipes.paper.table --dataset CIFAR10 --networks resnet18 --modes scheduled --epochs 30
    python -m recipes.paper.table --smoke                             # tiny networks on the digits of scikit-learn

Modes: dense, a `Trainer` alone; scheduled, the package's default, at the tutorial's group sparsity; paper, OTOv2's
own update with the tutorial's constants. tutorials.py says what these are, where they come from, and what differs. A
command that was killed, or whose minutes are over, goes on from its last checkpoint as if nothing had happened: bit by
bit, where the kernels of the device are deterministic. A finished run is a line of `table.jsonl` in --out and is not
done again. Figures are in %; those of a run that isn't finished are of its last evaluation, one after each epoch.
"""

import argparse
import contextlib
import json
import math
import zlib
from pathlib import Path
from time import monotonic

import torch

from ..common import splits
from .images import Batches
from .training import Paused, finished, last_checkpoint
from .tutorials import EPOCHS, MEAN, STD, TUTORIALS

MODES = ("dense", "scheduled", "paper")
# figure -> how a trainer logs it, and what it is for a dense model
FIGURES = {
    "accuracy": ("eval_accuracy", None),
    "macs_left": ("oto/macs_left", 1.0),
    "params_left": ("oto/params_left", 1.0),
    "group_sparsity": ("oto/group_sparsity", 0.0),
}
UNRELATED = ("networks", "modes", "minutes", "save_minutes", "workers", "out")  # options a run does not depend on


def so_far(folder: Path) -> dict[str, float | None]:
    """The figures of the last evaluation before the last checkpoint, and the epoch of that checkpoint."""
    state = last_checkpoint(folder)[1]
    evaluations = [logged for logged in state.get("log_history", []) if "eval_accuracy" in logged]
    last = evaluations[-1] if evaluations else dict.fromkeys(key for key, _ in FIGURES.values())
    figures = {name: last.get(key, dense) for name, (key, dense) in FIGURES.items()}
    return figures | {"epoch": state.get("epoch", 0)}


def row(network: str, run: str, figures: dict[str, float | None], epochs: str) -> str:
    """A line of the table."""
    shown = ["-" if figures[name] is None else f"{100 * figures[name]:.2f}" for name in FIGURES]
    return "{:10}{:18}{:>9}{:>11}{:>13}{:>16}  {}".format(network, run, *shown, epochs)


def parsed(argv: list[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    card = torch.cuda.is_available()
    parser.add_argument("--dataset", help="a Hub name or a folder with the columns image and label")
    parser.add_argument("--networks", nargs="+", choices=TUTORIALS, default=list(TUTORIALS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="fewer have the same schedule, shortened")
    parser.add_argument("--examples", type=int, help="so many train and so many test, chosen at random")
    parser.add_argument("--config", default="{}", help="JSON: fields of the config of every network")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="bf16" if card else "fp32")
    parser.add_argument("--workers", type=int, default=2 if card else 0, help="processes that make batches")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many, not amid an evaluation")
    parser.add_argument("--save-minutes", type=float, default=10.0, help="a checkpoint every so many")
    parser.add_argument("--out", type=Path, default=Path("out/table"))
    parser.add_argument("--smoke", action="store_true", help="tiny networks, and four epochs of 640 digits")
    options = parser.parse_args(argv)
    if not (options.smoke or options.dataset):
        raise SystemExit("--dataset is missing (or --smoke)")
    if options.smoke:
        options.epochs, options.examples = 4, 640
    return options


def main(argv: list[str] | None = None) -> None:
    """Runs what is not finished, as far as time allows, and prints the table."""
    begin_s = monotonic()
    options = parsed(argv)
    train, test, _ = splits(options.dataset)
    if options.examples:
        train, test = (data.shuffle(seed=0).take(min(options.examples, len(data))) for data in (train, test))
    batches = Batches.of(train, test, augment=True, mean=MEAN, std=STD, seed=options.seed)
    setting = {name: value for name, value in vars(options).items() if name not in UNRELATED}
    digest = f"{zlib.crc32(json.dumps(setting).encode()):08x}"  # --out may have runs of other settings
    lines = options.out / "table.jsonl"
    done = {line["run"]: line for line in map(json.loads, lines.read_text().splitlines())} if lines.exists() else {}
    deadline_s = begin_s + 60 * options.minutes
    table = ["network   run                accuracy  MACs left  params left  group sparsity  epochs"]
    left = []
    for network in options.networks:
        for mode in options.modes:
            run = f"{network}-{mode}-{digest}"
            folder = options.out / run
            if run not in done and monotonic() < deadline_s:
                with contextlib.suppress(Paused):
                    figures = finished(folder, network, mode, batches, options, deadline_s)
                    done[run] = {"run": run} | setting | figures
                    with lines.open("a") as file:
                        file.write(json.dumps(done[run]) + "\n")
            figures = done.get(run) or so_far(folder)
            if run not in done:
                left.append(f"{network} {mode}")
            table.append(row(network, mode, figures, f"epoch {figures['epoch']:.4g} of {options.epochs}"))
        published = TUTORIALS[network]._asdict()
        dense = {name: value for name, (_, value) in FIGURES.items()} | {"accuracy": published["dense_accuracy"]}
        table.append(row(network, "published, dense", dense, "another training"))
        table.append(row(network, "published", published, f"epoch {EPOCHS} of {EPOCHS}"))
    print(*table, sep="\n")
    if left:
        print(f"not finished: {', '.join(left)}; the same command goes on")


if __name__ == "__main__":
    main()
