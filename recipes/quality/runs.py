"""What a run of bench_quality.py depends on, which runs are done, and how their results are shown."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

Result = dict[str, float]
Results = dict[int, Result]  # by seed


@dataclass(frozen=True)
class Setting:
    """All that a run depends on. `target`: MACs left, or ZIGs gone for those methods that know nothing else."""

    task: str
    method: str
    target: float
    seed: int
    steps: int
    batch_size: int
    learning_rate: float
    base: str
    schedule: str
    train_examples: int
    validation: bool


class Runs:
    """The runs of one task, which `run` makes; those that are done are lines of a file."""

    def __init__(self, run: Callable[[Setting], Result], out: Path) -> None:
        self.run, self.out = run, out
        out.parent.mkdir(parents=True, exist_ok=True)
        out.touch()

    def result(self, setting: Setting) -> Result:
        """What a run gives; it is made if it isn't done."""
        for line in self.out.read_text().splitlines():
            done = json.loads(line)
            if done["setting"] == asdict(setting):
                return done["result"]
        result = self.run(setting)
        with self.out.open("a") as file:
            file.write(json.dumps({"setting": asdict(setting), "result": result}) + "\n")
        return result

    def at_equal_macs(self, setting: Setting) -> Result:
        """The run that takes as many training MACs as the dense one takes in the setting's steps."""
        part = self.result(setting)["training_macs"]
        steps = round(setting.steps / part)
        result = self.result(replace(setting, steps=steps))
        return result | {"training_macs": result["training_macs"] * steps / setting.steps}


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean, and its standard error: nan of one value."""
    return float(np.mean(values)), float(np.std(values) / (len(values) - 1 or np.nan) ** 0.5)


def printed(method: str, target: float, results: Results, ours: Results) -> str:
    """A row of the table."""
    columns = {name: [result[name] for result in results.values()] for name in next(iter(results.values()))}
    mean = {name: float(np.mean(values)) for name, values in columns.items()}
    accuracy, error = mean_and_error([100 * value for value in columns["accuracy"]])
    differences = [100 * (results[s]["accuracy"] - ours[s]["accuracy"]) for s in results.keys() & ours.keys()]
    row = f"{method:20} {target:6} {len(results):5}  {accuracy:5.2f} +- {error:4.2f}  {mean['loss']:.3f} "
    row += f"{mean['params']:7.1%} {mean['macs']:6.1%} {mean['latency']:8.0%} {mean['training_macs']:9.0%} "
    row += f"{mean['cpu']:6.0f}"
    if differences and results is not ours:
        difference, error = mean_and_error(differences)
        row += f"  {difference:+.2f} +- {error:.2f}"
    return row
