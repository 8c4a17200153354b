"""One training of bench_quality.py: the same batches for every method, a teacher where there is one."""

from typing import Any

import torch
from torch.nn.functional import kl_div, log_softmax
from transformers import PreTrainedModel, get_linear_schedule_with_warmup, set_seed

from hf_oto import ZIGPartition

from .methods import optimizer_of
from .tasks import Task, inputs_of

TEACHING, TEMPERATURE = 0.7, 2.0  # the teacher's part of the loss, and how soft both predictions are


def train(
    task: Task, partition: ZIGPartition, setting: dict[str, Any], teacher: PreTrainedModel | None = None
) -> PreTrainedModel:
    """A model as a method trains it, not cut yet."""
    steps, size = setting["steps"], setting["batch_size"]
    set_seed(setting["seed"])
    build, (x, y), _ = task
    model = build().train()
    optimizer, generator = optimizer_of(model, partition, setting), torch.Generator().manual_seed(setting["seed"])
    rate = get_linear_schedule_with_warmup(optimizer, steps // 20, steps)
    order = torch.cat([torch.randperm(len(y), generator=generator) for _ in range(steps * size // len(y) + 1)])
    if x.dim() == 2:  # texts of about the same length go together, in random order
        length = (x != 0).sum(1)
        some = [part[length[part].argsort()].split(size) for part in order[: steps * size].split(32 * size)]
        batches = [part[i] for part in some for i in torch.randperm(len(part), generator=generator)]
    else:
        batches = order[: steps * size].split(size)
    for batch in batches:
        optimizer.zero_grad()
        inputs = inputs_of(x[batch], generator)
        output = model(**inputs, labels=y[batch])
        loss = output.loss
        if teacher is not None:
            with torch.no_grad():
                taught = log_softmax(teacher(**inputs).logits / TEMPERATURE, 1)
            soft = kl_div(log_softmax(output.logits / TEMPERATURE, 1), taught, reduction="batchmean", log_target=True)
            loss = (1 - TEACHING) * loss + TEACHING * TEMPERATURE**2 * soft
        loss.backward()
        optimizer.step()
        rate.step()
    return model
