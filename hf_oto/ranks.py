"""Several processes: what rank 0 computes for all, a sharded model put together again, set-ups that are refused.

The trainer asks here wherever ranks have to agree, and with one process everything goes straight through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from .modeling_oto import OTOError
from .restore import contents, put_back, replace_tensors_
from .trace import persistent_buffers
from .zero import refuse_config

MEGATRON = "Megatron-LM is not supported, it splits the parameters: train with FSDP2 (fsdp=True) or DDP instead"
FSDP1 = (
    "FSDP1 is not supported, it flattens the parameters: train with FSDP2 instead (fsdp_config={'version': 2}, or "
    "fsdp_version: 2 in the accelerate config), or with DDP"
)


def refuse_sharding(args: TrainingArguments | None) -> None:
    """Raises OTOError for FSDP1, which flattens the parameters, and for what isn't supported of DeepSpeed."""
    if args is None:
        return
    if args.deepspeed:
        refuse_config(args.hf_deepspeed_config.config)
    if not args.fsdp:
        return
    version = int(args.fsdp_config.get("version", 2))
    if version != 2 or args.fsdp_config.get("xla"):
        raise OTOError(FSDP1)


def of_rank_zero(compute: Callable[[], Any]) -> Any:
    """What rank 0 computes, or the exception that it raises, on every rank.

    All ranks go on with the same value, or all raise: none is left waiting for another one that has failed.
    """
    value_and_error: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            value_and_error[0] = compute()
        except Exception as error:
            if PartialState().num_processes == 1:
                raise
            value_and_error[1] = error
    value, error = broadcast_object_list(value_and_error)
    if error is not None:
        raise error
    return value


def gathered(sharded: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a model that FSDP2 has sharded, whole, on the CPU of every rank.

    Weights are gathered one by one: no device ever holds more than one of them whole.
    """
    whole: dict[str, torch.Tensor] = {}
    for name, weight in get_model_state_dict(sharded).items():
        value = weight.full_tensor() if isinstance(weight, DTensor) else weight
        whole[name] = value.detach().to("cpu", copy=True)
    return whole


class WholeModel:
    """A model as it is before FSDP2 or DeepSpeed divide it, without its weights; in the end it is filled with them.

    It is the user's own object: they change the classes, hooks and parameters of its modules, and all of these are
    put back.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._classes = {module: type(module) for module in model.modules()}
        kept = contents(model)
        self._empty: dict[int, torch.nn.Parameter] = {}  # id of a parameter -> the same without values
        # The copies of the containers would keep the weights alive beside the shards: they hold empty ones instead.
        for _, before in kept.containers:
            if isinstance(before, dict):
                for key, value in list(before.items()):
                    if isinstance(value, torch.nn.Parameter):
                        before[key] = self._emptied(value)
        self._kept = kept._replace(states=[])

    def _emptied(self, parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        """The parameter without values; the same one for all places where it is tied."""
        if id(parameter) not in self._empty:
            without_values = parameter.detach().to("meta")
            self._empty[id(parameter)] = torch.nn.Parameter(without_values, parameter.requires_grad)
        return self._empty[id(parameter)]

    def filled(self, whole: Mapping[str, torch.Tensor]) -> torch.nn.Module:
        """The same model, whole, on the CPU of every rank, and in the dtypes that it had.

        Args:
            whole: its parameters and persistent buffers, by name.
        """
        model = self._model
        training = model.training
        put_back(self._kept)
        for module, cls in self._classes.items():
            module.__class__ = cls
        new: dict[int, torch.Tensor] = {}  # id of an empty parameter or a buffer -> what takes its place
        for name, tensor in [*model.named_parameters(), *persistent_buffers(model).items()]:
            if isinstance(tensor, torch.nn.Parameter):
                value = whole[name].to(tensor.dtype)
                new[id(tensor)] = torch.nn.Parameter(value, tensor.requires_grad)
            else:
                new[id(tensor)] = whole[name].to(tensor.dtype)
        replace_tensors_(contents(model), new)
        return model.train(training)
