"""Kwon et al. (arXiv 2204.09656) by their own code: which heads and units stay, and a factor for each.

    git clone https://github.com/WoosukKwon/retraining-free-pruning

It is written for a BERT of Transformers 4 on a GPU. Their search, their rearrangement and their least squares run as
they are; what they call is adapted here. Where a layer loses all heads or units, one stays that is multiplied by zero.
"""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor, nn

from hf_oto import PruningPlan, ZIGPartition, compact, partition_zigs

from .dense import Subject
from .older_bert import OlderBert

NAMES = ("prune", "utils", "efficiency", "cupy", "cupyx")  # the folders of the checkout, and what they import


def kcm(subject: Subject, method: str, target: float, checkouts: dict[str, str]) -> nn.Module:
    """The masks are multiplied into the layers that read heads and units, and what is zero is cut."""
    model = subject.fresh().requires_grad_(False)
    config = model.config
    heads, units = masks(checkouts[method], model, subject, target)
    for layer, of_heads, of_units in zip(model.base_model.encoder.layer, heads, units, strict=True):
        of_positions = of_heads.repeat_interleave(config.hidden_size // config.num_attention_heads)
        layer.attention.output.dense.weight *= of_positions
        layer.output.dense.weight *= of_units
    model.requires_grad_(True)
    partition = partition_zigs(model, subject.batches[:1])
    return compact(model, partition, unread(model, partition))


def masks(checkout: str, model: nn.Module, subject: Subject, target: float) -> tuple[Tensor, Tensor]:
    """The factors of all heads, (layers, heads), and of all units, (layers, units), as their main.py makes them."""
    config, older = model.config, OlderBert(model)
    length = subject.inputs["input_ids"].shape[1]  # on which MACs are counted
    full_heads = torch.ones(config.num_hidden_layers, config.num_attention_heads)
    full_units = torch.ones(config.num_hidden_layers, config.intermediate_size)
    batches = [dict(batch) for batch in subject.batches]  # they write to them
    with imported(checkout) as module:
        fisher, search = module("prune.fisher"), module("prune.search")
        rearrange_mask = module("prune.rearrange").rearrange_mask
        halfway = module("utils.schedule").get_pruning_schedule(target=target, num_iter=2)[0]
        grads = fisher.collect_mask_grads(older, full_heads, full_units, batches)
        teacher = search.search_mac(config, *grads, length, halfway)
        found = search.search_mac(config, *grads, length, target)
        student = [rearrange_mask(mask, grad) for mask, grad in zip(found, grads, strict=True)]
        return module("prune.rescale").rescale_mask(
            older, config, *teacher, *student, batches, classification_task=True
        )


def unread(model: nn.Module, partition: ZIGPartition) -> PruningPlan:
    """The plan that removes every ZIG which the layers after it multiply by zero."""
    tensors, kept = partition.tensors(model), {}
    for axis in partition.axes:
        is_read = torch.zeros(axis.size, dtype=torch.bool)
        for member in axis.members:
            if member.role == "consumer":
                of_position = (tensors[member.param].movedim(member.dim, 0).flatten(1) != 0).any(1)  # (positions,)
                is_read |= of_position[torch.from_numpy(member.positions(axis.size))].any(1)
        if not is_read.all():
            kept[axis.name] = is_read.nonzero().flatten().tolist() or [0]
    return PruningPlan(kept)


@contextlib.contextmanager
def imported(checkout: str) -> Iterator[Callable[[str], ModuleType]]:
    """Gives what imports their modules, with NumPy and SciPy for CuPy and the CPU for the GPU, in here alone."""
    cupy, linalg = ModuleType("cupy"), ModuleType("cupyx.scipy.sparse.linalg")
    cupy.asarray, cupy.asnumpy, linalg.lsmr = np.asarray, np.asarray, as_cupy
    parents = [ModuleType(name) for name in ("cupyx", "cupyx.scipy", "cupyx.scipy.sparse")]
    to = Tensor.to

    def to_here(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tensor if args[:1] == ("cuda",) else to(tensor, *args, **kwargs)

    on_path = patch.object(sys, "path", [checkout, *sys.path])
    with on_path, patch.object(Tensor, "cuda", lambda tensor: tensor), patch.object(Tensor, "to", to_here):
        forget()
        sys.modules.update({module.__name__: module for module in (cupy, *parents, linalg)})
        try:
            yield importlib.import_module
        finally:
            forget()


def as_cupy(A: np.ndarray, b: np.ndarray, damp: float) -> tuple:
    """SciPy's solver as CuPy's is: in float64, and five times as many iterations at most."""
    return scipy.sparse.linalg.lsmr(A.astype(np.float64), b.astype(np.float64), damp=damp, maxiter=5 * len(b))


def forget() -> None:
    """Lets no module of theirs, or of their names, be imported."""
    for name in [name for name in sys.modules if name.partition(".")[0] in NAMES]:
        del sys.modules[name]
