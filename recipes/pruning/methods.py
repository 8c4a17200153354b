"""The methods of bench_prune.py: from a dense model and some batches each makes one with a fraction of the MACs."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from time import process_time

from torch import nn
from transformers import set_seed

from hf_oto import PruningPlan, measure, prune

from . import simple
from .dense import Subject, scores
from .kcm import kcm
from .one_shot import one_shot

OURS = ("oto", "oto-8", "oto-reconstruct")
SIMPLE = {"cut": simple.cut, "statistics": simple.statistics, "mean": simple.mean}
TORCH_PRUNING = ("tp-magnitude", "tp-taylor", "tp-taylor-bottleneck")
RIVALS = dict.fromkeys(TORCH_PRUNING, one_shot) | {"kcm": kcm}
METHODS = ("dense", *OURS, *SIMPLE, *RIVALS)
WITHOUT = {  # task -> methods that would be another one there, or can't be run
    "resnet": ("mean", "tp-taylor-bottleneck", "kcm"),  # it has one bias, of the last layer, and no layer norm
    "vit": ("statistics", "kcm"),
    "text": ("statistics", "oto-8"),
    "llama": ("statistics", "mean", "oto-8", *TORCH_PRUNING, "kcm"),  # Torch-Pruning's graph of its heads never ends
}


@dataclass(frozen=True)
class PruneSetting:
    """All that a run depends on, beside the dense model.

    Attributes:
        target: MACs left.
        examples: how many the methods look at.
        reconstruct: steps in which the dense model is imitated.
    """

    task: str
    method: str
    target: float
    seed: int
    examples: int
    reconstruct: int


@dataclass
class Pruning:
    """Makes the runs of one task. `plans` are our choices by (seed, target), which the simple methods share."""

    subject_of: Callable[[int], Subject]
    checkouts: dict[str, str]
    plans: dict[tuple[int, float], PruningPlan] = field(default_factory=dict)

    def __call__(self, setting: PruneSetting) -> dict[str, float]:
        """Prunes one model, and scores what is left; CPU seconds of simple methods leave out the choice."""
        subject = self.subject_of(setting.seed)
        set_seed(setting.seed)
        if setting.method in SIMPLE and (setting.seed, setting.target) not in self.plans:
            self.ours(subject, replace(setting, reconstruct=0), rounds=1)
        start = process_time()
        model = self.pruned(subject, setting)
        cpu = process_time() - start
        dense, small = measure(subject.fresh(), model, inputs=subject.inputs, seconds=0)
        ratios = {name: small[name] / dense[name] for name in ("params", "macs")}
        return scores(model, subject.task) | ratios | {"cpu": cpu}

    def pruned(self, subject: Subject, setting: PruneSetting) -> nn.Module:
        method = setting.method
        if method == "dense":
            return subject.fresh()
        if method in OURS:
            return self.ours(subject, setting, rounds=8 if method == "oto-8" else 1)
        if method in SIMPLE:
            return SIMPLE[method](subject, self.plans[setting.seed, setting.target])
        return RIVALS[method](subject, method, setting.target, self.checkouts)

    def ours(self, subject: Subject, setting: PruneSetting, rounds: int) -> nn.Module:
        """`hf_oto.prune`; the plan of one round is kept."""
        model, report = prune(
            subject.fresh(),
            subject.batches,
            target_macs=setting.target,
            rounds=rounds,
            reconstruct=setting.reconstruct,
        )
        if rounds == 1:
            self.plans[setting.seed, setting.target] = report["plan"]
        return model
