"""What can be done to a model whose ZIGs are chosen, short of new weights: nothing, new statistics, or new biases."""

import torch
from torch import Tensor, nn

from hf_oto import PruningPlan, ZIGPartition, compact, partition_zigs

from .dense import Subject


def cut(subject: Subject, plan: PruningPlan) -> nn.Module:
    """Nothing is done but the cut."""
    model = subject.fresh()
    return compact(model, partition_zigs(model, subject.batches[:1]), plan)


def statistics(subject: Subject, plan: PruningPlan) -> nn.Module:
    """The statistics of batch norms are taken anew after the cut."""
    model = cut(subject, plan)
    statistics_anew_(model, subject.batches)
    return model


def mean(subject: Subject, plan: PruningPlan) -> nn.Module:
    """Biases take over the means of what goes, as in FLAP (An et al., arXiv 2312.11983).

    FLAP adds a bias to layers that have none. A stock model has no place for it, so only biases that exist take part.
    """
    model = subject.fresh()
    partition = partition_zigs(model, subject.batches[:1])
    fold_means_(model, partition, plan, means(model, subject.batches))
    return compact(model, partition, plan)


@torch.no_grad()
def statistics_anew_(model: nn.Module, batches: list[dict[str, Tensor]]) -> None:
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over the batches
        norm.train()
    for batch in batches if norms else []:
        model(**batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


@torch.no_grad()
def means(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of what each linear layer with a bias reads, (in,), by the layer's name; padding doesn't count."""
    sums: dict[str, Tensor] = {}
    numbers: dict[str, int] = {}
    for batch in batches:
        mask = batch.get("attention_mask")

        def look(name: str, x: Tensor, mask: Tensor | None = mask) -> None:
            rows = x[mask != 0] if mask is not None and x.shape[:-1] == mask.shape else x.flatten(0, -2)
            sums[name] = sums.get(name, 0) + rows.sum(0)
            numbers[name] = numbers.get(name, 0) + len(rows)

        handles = [
            module.register_forward_pre_hook(lambda _, inputs, name=name, look=look: look(name, inputs[0]))
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module.bias is not None
        ]
        model(**batch)
        for handle in handles:
            handle.remove()
    return {name: total / numbers[name] for name, total in sums.items()}


@torch.no_grad()
def fold_means_(model: nn.Module, partition: ZIGPartition, plan: PruningPlan, means: dict[str, Tensor]) -> None:
    """Adds W[:, gone] @ mean[gone] to the bias of each layer that reads what goes."""
    for _, member, positions in partition.slices(plan.removed(partition)):
        name = member.param.removesuffix(".weight")
        if member.role == "consumer" and member.dim == 1 and name in means:
            layer = model.get_submodule(name)
            gone = torch.from_numpy(positions)
            layer.bias += layer.weight[:, gone] @ means[name][gone]
