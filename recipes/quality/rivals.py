"""Other pruning methods, each a `Trainer` that prunes between the gradients and the step."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_oto import DHSPG, PruningPlan, compact, partition_zigs

from .only_train_once import Hesso, LegacyDHSPG
from .runs import Setting


class Rival(Trainer):
    """What the benchmark asks of a method."""

    def __init__(
        self, *args: Any, setting: Setting, inputs: dict[str, Tensor], checkouts: dict[str, str], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.setting, self.inputs, self.checkouts = setting, inputs, checkouts
        self.macs_since = [(0, 1.0)]  # (step, fraction of the dense model's MACs that later steps take)

    @property
    def training_macs(self) -> float:
        """The MACs of the run as a fraction of those of the dense model."""
        ends = [step for step, _ in self.macs_since[1:]] + [self.setting.steps]
        taken = sum(left * (end - begin) for (begin, left), end in zip(self.macs_since, ends, strict=True))
        return taken / self.setting.steps

    def compacted(self) -> nn.Module:
        """What is left of the model."""
        return self.model


class RandomZIGs(Rival):
    """DHSPG on its own schedule, but no ZIG is more important than another: a control."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        base, generator = super().create_optimizer(*args, **kwargs), torch.Generator().manual_seed(self.setting.seed)
        self.partition = partition_zigs(self.model, self.inputs)
        self.optimizer = DHSPG(
            self.model, self.partition, base, total_steps=self.setting.steps, target_macs=self.setting.target,
            salience=lambda moments: torch.rand(len(moments.cost), generator=generator) * moments.cost,
        )  # fmt: skip
        return self.optimizer

    def compacted(self) -> nn.Module:
        return compact(self.model, self.partition, PruningPlan.from_zeros(self.model, self.partition))


class Released(Rival):
    """HESSO or OTOv2's DHSPG, whose optimizers do all that there is to do; they cut the model at the end."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        cls = {"hesso": Hesso, "dhspg": LegacyDHSPG}[self.setting.method]
        self.released = cls(self.checkouts[self.setting.method], self.model, self.inputs, asdict(self.setting))
        self.optimizer = self.released.optimizer
        return self.optimizer

    def compacted(self) -> nn.Module:
        return self.released.compacted()
