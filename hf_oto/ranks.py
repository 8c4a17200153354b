"""Several processes: what rank 0 computes for all, a sharded model put together again, set-ups that are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import (
    TrainingArguments,
)

from .modeling_oto import OTOError
from .restore import contents, put_back, replace_tensors_
from .trace import persistent_buffers

DEEPSPEED = "DeepSpeed is not supported, it flattens the parameters: train with FSDP2 (fsdp=True) or DDP instead"
FSDP1 = (
    "FSDP1 is not supported, it flattens the parameters: train with FSDP2 instead (fsdp_config={'version': 2}, or "
    "fsdp_version: 2 in the accelerate config), or with DDP"
)


def refuse_sharding(args: TrainingArguments | None) -> None:
    """DeepSpeed and FSDP1 flatten the parameters that ZIGs are made of."""
    if args is None:
        return
    if args.deepspeed:
        raise OTOError(DEEPSPEED)
    if args.fsdp and (int(args.fsdp_config.get("version", 2)) != 2 or args.fsdp_config.get("xla")):
        raise OTOError(FSDP1)


def of_rank_zero(compute: Callable[[], Any]) -> Any:
    """What rank 0 computes, or the exception it raises, on every rank: they never part, and never wait for ever."""
    found: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            found[0] = compute()
        except Exception as error:
            if PartialState().num_processes == 1:
                raise
            found[1] = error
    value, error = broadcast_object_list(found)
    if error is not None:
        raise error
    return value


class WholeModel:
    """A model as it is before FSDP2 shards it, without its weights: with them it is put together again in the end.

    It is the user's own object: FSDP2 changes the classes, hooks and parameters of its modules, and these are put
    back.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._classes = {module: type(module) for module in model.modules()}
        kept = contents(model)
        self._empty: dict[int, torch.nn.Parameter] = {}
        for _, before in kept.containers:
            for key, value in list(before.items()) if isinstance(before, dict) else []:
                if isinstance(value, torch.nn.Parameter):
                    if id(value) not in self._empty:
                        self._empty[id(value)] = torch.nn.Parameter(value.detach().to("meta"), value.requires_grad)
                    before[key] = self._empty[id(value)]
        self._kept = kept._replace(states=[])

    def gathered(self, sharded: torch.nn.Module) -> torch.nn.Module:
        """The same model, whole, on the CPU of every rank.

        Weights are gathered one by one: no device ever holds more than one of them whole.
        """
        model, weights, training = self._model, get_model_state_dict(sharded), sharded.training
        whole = {}
        for name, weight in weights.items():
            value = weight.full_tensor() if isinstance(weight, DTensor) else weight
            whole[name] = value.detach().to("cpu", copy=True)
        put_back(self._kept)
        for module, cls in self._classes.items():
            module.__class__ = cls
        new = {}
        for name, t in [*model.named_parameters(), *persistent_buffers(model).items()]:
            is_parameter = isinstance(t, torch.nn.Parameter)
            new[id(t)] = torch.nn.Parameter(whole[name], t.requires_grad) if is_parameter else whole[name]
        replace_tensors_(contents(model), new)
        return model.train(training)
