"""Torch-Pruning (Fang et al., arXiv 2301.12900; `pip install torch-pruning`), by its authors' code, while training.

It cuts the model in 8 events from 0.1 to 0.6 of the steps on a cubic schedule, as DHSPG does where more than a fifth
is left. Each event removes channels, a two-hundredth of the way at a time, until its goal in MACs is met. The
optimizer's state is dropped then, as its examples do by making a new optimizer.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from hf_oto import measure

from .rivals import Rival

WINDOW, NUM_EVENTS = (0.1, 0.6), 8
NUM_PARTS = 200  # in which it may go from the dense model to the smallest one
SMALLEST = 0.95  # of every layer goes at most
GROUP_NORM = 1e-4  # the strength of its regulariser, which its examples set between 1e-5 and 1e-3


class TorchPruning(Rival):
    """Iterative pruning by Taylor's score or the group norm, or by magnitude at once; methods are named "tp-...".

    The ends of the names: "local" removes the same fraction of every layer, "global" ranks all channels together,
    "isomorphic" those of equal structure (Fang et al., arXiv 2407.04616).
    """

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        import torch_pruning as tp

        optimizer = super().create_optimizer(*args, **kwargs)
        _, self.score, scope = self.setting.method.split("-")
        importance = tp.importance.GroupTaylorImportance() if self.score == "taylor" else None
        cls, more = tp.pruner.BasePruner, {}
        if self.score == "groupnorm":
            cls, more = tp.pruner.GroupNormPruner, {"reg": GROUP_NORM}
        heads = heads_of(self.model)
        if heads and scope == "local":  # its local pruning of heads takes one at least at every step: dimensions go
            more |= {"num_heads": heads}
        elif heads:
            more |= {
                "num_heads": heads,
                "prune_num_heads": True,
                "prune_head_dims": False,
                "head_pruning_ratio": SMALLEST,
            }
        self.pruner = cls(
            self.model, self.inputs, importance or tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=SMALLEST,
            max_pruning_ratio=SMALLEST, global_pruning=scope != "local", isomorphic=scope == "isomorphic",
            iterative_steps=NUM_PARTS, ignored_layers=[m for m in self.model.modules() if is_last(m, self.model)],
            forward_fn=lambda model, inputs: model(**inputs).logits, **more,
        )  # fmt: skip
        if self.score == "groupnorm":
            self.pruner.update_regularizer()
        self.dense = self.macs()
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        self.names = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
        first, last = (int(part * self.setting.steps) for part in WINDOW)
        self.events = [first + (last - first) * i // NUM_EVENTS for i in range(1, NUM_EVENTS + 1)]
        if self.score == "magnitude":
            self.events = [first]
        return optimizer

    def macs(self) -> float:
        (measured,) = measure(self.model, inputs=self.inputs, seconds=0)
        return measured["macs"]

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
        params = sum(p.numel() for p in self.model.parameters())
        left = self.macs() / self.dense
        while left > goal and self.pruner.current_step < NUM_PARTS:
            with contextlib.suppress(UnboundLocalError):  # its own, where no head is due: the next part takes the rest
                self.pruner.step()
            for module in self.model.modules():
                if (query := query_of(module)) is not None:
                    module.num_attention_heads = self.pruner.num_heads[query]
                    dims = query.out_features // module.num_attention_heads
                    vars(module).update(
                        {name: dims for name in ("head_dim", "attention_head_size") if name in vars(module)}
                    )
            if (now := sum(p.numel() for p in self.model.parameters())) != params:
                params, left = now, self.macs() / self.dense
        if self.score == "groupnorm":
            self.pruner.update_regularizer()
        parameters = dict(self.model.named_parameters())
        for group, names in zip(self.optimizer.param_groups, self.names, strict=True):
            group["params"] = [parameters[name] for name in names]
        self.optimizer.state.clear()
        self.macs_since.append((step, left))


def query_of(module: nn.Module) -> nn.Module | None:
    """The query's projection of an attention."""
    return getattr(module, "q_proj", getattr(module, "query", None))


def heads_of(model: nn.Module) -> dict[nn.Module, int]:
    """How many heads the projections of every attention have."""
    names = ("q_proj", "k_proj", "v_proj", "query", "key", "value")
    attentions = [module for module in model.modules() if query_of(module) is not None]
    return {getattr(m, name): m.num_attention_heads for m in attentions for name in names if hasattr(m, name)}


def is_last(module: nn.Module, model: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and module.out_features == model.config.num_labels
