"""Torch-Pruning (Fang et al., arXiv 2301.12900) at once, by its authors' code, without training."""

from quality.channels import cut_to_, macs, pruner_of
from torch import nn

from .dense import Subject
from .simple import statistics_anew_


def one_shot(subject: Subject, method: str, target: float, checkouts: dict[str, str]) -> nn.Module:
    """Its global pruning by magnitude, or by Taylor's score with the labels of all batches.

    Its ratio grows by a two-hundredth at a time until the target in MACs is met. The statistics of batch norms are
    taken anew, which `hf_oto.prune` does, too.
    """
    model = subject.fresh()
    _, score, *scope = method.split("-")
    for batch in subject.batches if score == "taylor" else []:
        (model(**batch).loss / len(subject.batches)).backward()
    pruner = pruner_of(model, subject.inputs, score, *scope or ["global"])
    cut_to_(target, pruner, model, subject.inputs, macs(model, subject.inputs))
    statistics_anew_(model, subject.batches)
    return model
