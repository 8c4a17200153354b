"""The pruning methods that bench_quality.py sets side by side, each an optimizer around the same base.

A salience takes what `DHSPG` says of one batch, `moments`: sums over the parameters of each ZIG, all (num_zigs,).
Saliences are divided by the cost of a ZIG, which the three here are not meant to know: they multiply by it.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from hf_oto import DHSPG, ZIGPartition
from hf_oto.paper import PaperDHSPG, Penalty

METHODS = ("dense", "scheduled", "paper", "magnitude", "hesso", "random", "distilled")


def at_random(moments: Any, generator: torch.Generator) -> Tensor:
    """No ZIG is more important than another; batches and dropout stay those of the other methods."""
    return torch.rand(len(moments.cost), generator=generator) * moments.cost


def magnitude(moments: Any) -> Tensor:
    """Squared norm per parameter."""
    return moments.weight_squared / moments.elements * moments.cost


def hesso(moments: Any) -> Tensor:
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
        "magnitude": (DHSPG, {"salience": magnitude, "window": (0.1, 0.1 + 1 / steps), "num_events": 1}),
        "hesso": (DHSPG, {"salience": hesso, "window": (0.1, 0.25), "num_events": 10}),  # as in its tutorials
        "random": (
            DHSPG,
            {"salience": functools.partial(at_random, generator=torch.Generator().manual_seed(setting["seed"]))},
        ),
    }[method]
    kind = "target_group_sparsity" if setting["budget"] == "groups" else f"target_{setting['budget']}"
    return cls(model, partition, base, total_steps=steps, **{kind: setting["target"]}, **arguments, **common)
