"""Several processes: what rank 0 computes for all, and set-ups that are refused.

The trainer asks here wherever ranks have to agree, and with one process everything goes straight through.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, broadcast_object_list
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from .modeling_oto import OTOError
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


def refuse_set_up(accelerator: Accelerator, model: nn.Module, is_paper: bool) -> None:
    """Raises OTOError where `accelerate launch` or the model, rather than the arguments, ask for what can't be done.

    Args:
        is_paper: whether the paper's own rule is to be used.
    """
    if accelerator.distributed_type == DistributedType.MEGATRON_LM:
        raise OTOError(MEGATRON)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        refuse_config(accelerator.state.deepspeed_plugin.hf_ds_config.config)
        if is_paper:
            raise OTOError("under DeepSpeed there is no pruning_mode='paper': use the default, or train with FSDP2")
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise OTOError(FSDP1)
    if any(isinstance(p, DTensor) for p in model.parameters()):
        raise OTOError(
            "from_pretrained has sharded this model already, and ZIGs are found on whole ones: load it without a "
            "distributed_config and let the Trainer shard it (fsdp=True), or train with DDP"
        )


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
    value, error = _broadcast(value_and_error)
    if error is not None:
        raise error
    return value


def _broadcast(value_and_error: list[Any]) -> list[Any]:
    """What rank 0 has, on every rank; of an error that can't be sent, its text."""
    try:
        return broadcast_object_list(value_and_error)
    except Exception as why:
        _, error = value_and_error
        if not PartialState().is_main_process or error is None:
            raise
        # nothing has been sent yet, so that the others still wait
        text = f"{type(error).__name__}: {error} (it can't be sent to other ranks: {why})"
        return broadcast_object_list([None, RuntimeError(text)])
