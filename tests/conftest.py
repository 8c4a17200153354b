"""Every law runs on every row of the table; models and partitions are made once a session."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from typing import NamedTuple

import numpy as np
import pytest
import torch
from models import TABLE, make
from torch import nn

from hf_oto import PruningPlan, ZIGPartition, partition_zigs

torch.set_num_threads(1)


class Case(NamedTuple):
    """A model that no test may change, a batch, and its partition."""

    name: str
    model: nn.Module
    inputs: dict[str, torch.Tensor]
    partition: ZIGPartition


@pytest.fixture(scope="session", params=TABLE)
def case(request):
    model, inputs = make(request.param).eval(), TABLE[request.param].inputs(2)
    return Case(request.param, model, inputs, partition_zigs(model, inputs))


@pytest.fixture(scope="session")
def draw_plan():
    """(partition, seed) -> a plan that gives every axis a random width of its own.

    At least half of it, so that the model's activations live on, but never all.
    """

    def draw(partition, seed=0):
        rng = np.random.default_rng(seed)
        sizes = {axis.name: axis.size for axis in partition.axes}
        return PruningPlan({a: np.sort(rng.permutation(n)[: rng.integers((n + 1) // 2, n)]) for a, n in sizes.items()})

    return draw


@pytest.fixture(scope="session")
def outputs():
    """(model, inputs) -> the tensors a model returns in eval mode."""

    def run(model, inputs):
        was = model.training
        torch.manual_seed(0)  # some models mask at random
        with torch.no_grad():
            out = model.eval()(**{k: v.clone() for k, v in inputs.items()})
        model.train(was)
        return [t for t in _flat(out) if t.is_floating_point()]

    return run


def _flat(out):
    if isinstance(out, torch.Tensor):
        return [out]
    parts = out.values() if isinstance(out, dict) else out if isinstance(out, (list, tuple)) else []
    return [t for part in parts for t in _flat(part)]


@pytest.fixture(scope="session")
def difference():
    """Two lists of tensors -> their largest difference relative to each one's largest entry; inf if shapes differ."""

    def compare(a, b):
        if [t.shape for t in a] != [t.shape for t in b]:
            return float("inf")
        return max(float((x - y).abs().max() / x.abs().max()) for x, y in zip(a, b, strict=True))

    return compare
