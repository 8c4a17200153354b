"""Torch-Pruning (Fang et al., arXiv 2301.12900; `pip install torch-pruning`), by its authors' code, while training.

It cuts the model in 8 events from 0.1 to 0.6 of the steps on a cubic schedule, as DHSPG does where more than a fifth
is left. Each event removes channels, a two-hundredth of the way at a time, until its goal in MACs is met. The
optimizer's state is dropped then, as its examples do by making a new optimizer.
"""

from typing import Any

import torch
from torch import Tensor

from .channels import cut_to_, macs, pruner_of
from .rivals import Rival

WINDOW, NUM_EVENTS = (0.1, 0.6), 8


class TorchPruning(Rival):
    """Iterative pruning by Taylor's score or the group norm, or by magnitude at once; methods are named "tp-...".

    The ends of the names: "local" removes the same fraction of every layer, "global" ranks all channels together,
    "isomorphic" those of equal structure (Fang et al., arXiv 2407.04616).
    """

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        _, self.score, scope = self.setting.method.split("-")
        self.pruner = pruner_of(self.model, self.inputs, self.score, scope)
        if self.score == "groupnorm":
            self.pruner.update_regularizer()
        self.dense = macs(self.model, self.inputs)
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        self.names = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
        first, last = (int(part * self.setting.steps) for part in WINDOW)
        self.events = [first + (last - first) * i // NUM_EVENTS for i in range(1, NUM_EVENTS + 1)]
        if self.score == "magnitude":
            self.events = [first]
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        step = self.state.global_step + 1
        if self.score == "groupnorm" and step <= self.events[-1]:
            self.pruner.regularize(self.model)
        if step in self.events:
            self.prune(step, (self.events.index(step) + 1) / len(self.events))
        return loss

    def prune(self, step: int, way: float) -> None:
        """Removes channels until the model has what DHSPG's schedule would leave after this fraction of the events."""
        goal = 1 - (1 - self.setting.target) * (1 - (1 - way) ** 3)
        left = cut_to_(goal, self.pruner, self.model, self.inputs, self.dense)
        if self.score == "groupnorm":
            self.pruner.update_regularizer()
        parameters = dict(self.model.named_parameters())
        for group, names in zip(self.optimizer.param_groups, self.names, strict=True):
            group["params"] = [parameters[name] for name in names]
        self.optimizer.state.clear()
        self.macs_since.append((step, left))
