"""What bench_quality.py measures of models: how good they are, and which width takes how many MACs."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from hf_oto import measure

from .tasks import Task


def narrow(task: Task, target: float) -> float:
    """The largest width, in hundredths of the usual one, that takes at most this fraction of the MACs."""
    for hundredths in range(100, 0, -1):
        dense, small = measure(task.build(1.0), task.build(hundredths / 100), inputs=task.inputs(2), seconds=0)
        if small["macs"] <= target * dense["macs"]:
            return hundredths / 100
    raise ValueError(f"no width takes {target:.0%} of the MACs")


@torch.no_grad()
def scores(model: nn.Module, task: Task) -> dict[str, float]:
    """Accuracy in [0, 1] and mean cross entropy."""
    model.eval()
    num_right, loss = 0, 0.0
    for begin in range(0, len(task.test), 250):
        batch = task.collate([task.test[i] for i in range(begin, min(begin + 250, len(task.test)))])
        labels = batch.pop("labels")
        logits = model(**batch).logits
        num_right += int((logits.argmax(1) == labels).sum())
        loss += float(cross_entropy(logits, labels, reduction="sum"))
    return {"accuracy": num_right / len(task.test), "loss": loss / len(task.test)}
