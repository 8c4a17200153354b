"""The Trainer: partitions on the first batch, trains with DHSPG, holds the compact model when `train()` returns."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import broadcast
from transformers import ProgressCallback, Seq2SeqTrainer, Trainer, TrainingArguments

from .compact import compact
from .dhspg import DHSPG
from .partition import check_zero_invariance, cut_difference, is_rounding, partition_zigs, tolerance
from .report import measure, table
from .zigs import OTOError, PruningPlan, ZIGPartition

logger = logging.getLogger(__name__)


@dataclass
class OTOTrainingArguments(TrainingArguments):
    """`TrainingArguments` and what to prune. A plain `TrainingArguments` works too and then means the defaults.

    Args:
        target_group_sparsity (`float`, *optional*, defaults to 0.5):
            Fraction of the ZIGs, in [0, 1), that is removed by the end of training.
        pruning_mode (`str`, *optional*, defaults to `"scheduled"`):
            `"scheduled"` reaches the target whatever the learning rate; `"paper"` is OTOv2's own update
            (arXiv 2303.06862), which reaches it only if the learning rate and the number of steps allow.
        pruning_window (`tuple[float, float]`, *optional*, defaults to `(0.1, 0.6)`):
            First and last moment of pruning as fractions of the optimizer steps (scheduled mode).
        min_keep (`float`, *optional*, defaults to 0.1):
            Fraction of every axis, at least one ZIG, that is never removed (scheduled mode).
        protect (`list[str]`, *optional*):
            Regular expressions; a parameter whose name one of them matches anywhere is not pruned.
    """

    target_group_sparsity: float = field(default=0.5, metadata={"help": "Fraction of ZIGs to remove, in [0, 1)."})
    pruning_mode: str = field(default="scheduled", metadata={"help": "scheduled or paper."})
    pruning_window: tuple[float, float] = field(default=(0.1, 0.6), metadata={"help": "Pruning starts and ends at."})
    min_keep: float = field(default=0.1, metadata={"help": "Fraction of every axis that always stays."})
    protect: list[str] = field(default_factory=list, metadata={"help": "Regular expressions of names not to prune."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.target_group_sparsity < 1:
            raise ValueError(f"target_group_sparsity is {self.target_group_sparsity}: it must be in [0, 1)")


DEFAULTS = {
    f.name: f.default if f.name != "protect" else ()
    for f in fields(OTOTrainingArguments)
    if f.name in ("target_group_sparsity", "pruning_mode", "pruning_window", "min_keep", "protect")
}


class OTOMixin:
    """Makes any `Trainer` train once and hold a compact model: `class MyTrainer(OTOMixin, SomeTrainer): pass`.

    After `train()`, `model`, `evaluate`, `predict`, `save_model` and `push_to_hub` are those of the compact model.

    Attributes:
        partition: the ZIGs, found on the first batch (`ZIGPartition`), or None before `train()`.
        plan: what was kept (`PruningPlan`), or None before the end of `train()`.
        report: dict with "before" and "after" (params, macs, bytes, latency in seconds), "group_sparsity" and
            "max_output_difference" (relative, of zeroed full and compact model on a real batch), or None.
    """

    def __init__(self, model: Any = None, args: TrainingArguments | None = None, *rest: Any, **kwargs: Any) -> None:
        self.partition: ZIGPartition | None = None
        self.plan: PruningPlan | None = None
        self.report: dict[str, Any] | None = None
        _refuse_sharding(args)
        super().__init__(model, args, *rest, **kwargs)
        if self.get_tp_size() > 1:
            raise OTOError("tensor parallel splits the groups that OTO prunes: train with DDP (torchrun) instead")
        if self.optimizer is not None and not isinstance(self.optimizer, DHSPG):
            raise OTOError(
                f"OTOTrainer builds DHSPG around {type(self.optimizer).__name__} itself: not optimizers=(...), pass "
                "optimizer_cls_and_kwargs=(class, kwargs) or args.optim; for your schedule override create_scheduler"
            )
        if self.optimizer is not None:
            raise OTOError("OTOTrainer makes the DHSPG optimizer itself, on the first batch: leave `optimizers` out")

    # training --------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`, and the compact model at its end.

        Raises:
            OTOError: the model was compacted by an earlier `train()`, or the certificate fails (the full model is
                saved first).
        """
        if self.report is not None and self.model_init is None:
            raise OTOError(
                "this trainer has compacted its model: to train that further make a Trainer(trainer.model, ...), "
                "to prune it again an OTOTrainer(trainer.model, ...)"
            )
        self.plan = self.report = None
        if self.model_init is not None:
            self.partition = None
        output = super().train(*args, **kwargs)
        self._compact()
        return output

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """DHSPG around the optimizer that the arguments ask for, with the same parameter groups."""
        model = self.model if model is None else model
        if self.optimizer is not None:
            return self.optimizer
        cls, kwargs = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, model)
        if (
            not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer))
            or {"params", "model", "optimizer_dict"} & kwargs.keys()
        ):
            raise OTOError(
                f"optim={self.args.optim!r} is no plain torch optimizer: use one such as adamw_torch_fused or sgd"
            )
        if self.partition is None:
            self.partition = partition_zigs(model, self._first_batch(2), protect=self._setting("protect"))
            if self.is_world_process_zero() and not self.args.disable_tqdm:
                print(self.partition)
        if not self.partition.axes and self._setting("target_group_sparsity"):
            raise OTOError(f"{type(model).__name__} has no prunable ZIG:\n{self.partition}")
        decay = set(self.get_decay_parameter_names(model))
        groups = [
            {"params": [(n, p) for n, p in model.named_parameters() if p.requires_grad and (n in decay) == decayed],
             "weight_decay": self.args.weight_decay if decayed else 0.0}
            for decayed in (True, False)
        ]  # fmt: skip
        steps = self.state.max_steps or self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]
        mode = self._setting("pruning_mode")
        scheduled = {"window": tuple(self._setting("pruning_window")), "min_keep": self._setting("min_keep")}
        self.optimizer = DHSPG(
            model,
            self.partition,
            base=cls,
            params=[group for group in groups if group["params"]],
            target_group_sparsity=self._setting("target_group_sparsity"),
            total_steps=steps,
            mode=mode,
            **(scheduled if mode == "scheduled" else {}),
            **kwargs,
        )
        return self.optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """`Trainer.log` with `group_sparsity`, the fraction of ZIGs that are zero, in every line and progress bar."""
        sparsity = self._group_sparsity()
        if sparsity is not None:
            logs["group_sparsity"] = round(sparsity, 4)
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                    callback.training_bar.set_postfix(group_sparsity=f"{sparsity:.2f}")
        super().log(logs, *args, **kwargs)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """No checkpoint from before the target can be the best one."""
        optimizer = self._dhspg()
        if optimizer is not None and not optimizer.target_reached:
            return False
        return super()._determine_best_metric(metrics, trial)

    # compacting ------------------------------------------------------------------------------------

    def _compact(self) -> None:
        optimizer = self._dhspg()
        model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False, keep_torch_compile=False)
        if self.accelerator.num_processes > 1:
            for buffer in model.buffers():  # batch norm statistics differ between ranks
                buffer.copy_(broadcast(buffer))
        if not optimizer.target_reached:
            logger.warning(
                "training ended at group sparsity %.3f, before its target of %.3f: only what is zero is cut out",
                optimizer.group_sparsity, self._setting("target_group_sparsity"),
            )  # fmt: skip
        self.plan = PruningPlan.from_zeros(model, self.partition)
        batch = self._first_batch(min(8, self.args.per_device_train_batch_size))
        before = measure(model, batch)
        moved = check_zero_invariance(model, self.partition, batch, self.plan)
        difference = max(moved, cut_difference(model, self.partition, self.plan, batch))
        if not is_rounding(difference, model, self.partition, self.plan, batch):
            path = os.path.join(self.args.output_dir, "dense")
            self.save_model(path)
            raise OTOError(
                f"the certificate failed: zeroed full and compact model differ by {difference:.1e} on a real batch "
                f"(allowed: {tolerance(model):.0e}). The model was not cut; the full one is saved in {path}"
            )
        sparsity = optimizer.group_sparsity
        model = compact(model, self.partition, self.plan)
        self.optimizer = self.lr_scheduler = None
        self.accelerator.free_memory()
        self.model = self.model_wrapped = model
        self.callback_handler.model, self.callback_handler.optimizer, self.callback_handler.lr_scheduler = (
            model,
            None,
            None,
        )
        self.model_wrapped = self.accelerator.prepare_model(model, evaluation_mode=True)
        after = measure(model, batch)
        self.report = {
            "before": before,
            "after": after,
            "group_sparsity": sparsity,
            "max_output_difference": difference,
        }
        if self.is_world_process_zero() and not self.args.disable_tqdm:
            print(table(before, after))
            print(f"max output difference, zeroed full against compact: {difference:.1e}")

    # what it reads ---------------------------------------------------------------------------------

    def _setting(self, name: str) -> Any:
        return vars(self.args).get(name, DEFAULTS[name])

    def _dhspg(self) -> DHSPG | None:
        optimizer = self.optimizer
        while isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        return optimizer

    def _group_sparsity(self) -> float | None:
        if self.report is not None:
            return self.report["group_sparsity"]
        return None if self._dhspg() is None else self._dhspg().group_sparsity

    def _first_batch(self, size: int) -> dict[str, Any]:
        """The first examples of the training set, collated, on the model's device; random states stay as they are."""
        with _same_random_state():
            loader = self.get_train_dataloader()
            if isinstance(loader.dataset, torch.utils.data.IterableDataset):
                examples = list(itertools.islice(loader.dataset, size))
            else:
                examples = [loader.dataset[i] for i in range(min(size, len(loader.dataset)))]
            batch = self._prepare_inputs(loader.collate_fn(examples))
        return dict(batch)


class OTOTrainer(OTOMixin, Trainer):
    """`transformers.Trainer` that trains once and ends with a compact model (OTOv2, arXiv 2303.06862)."""


class OTOSeq2SeqTrainer(OTOMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` that trains once and ends with a compact model. See `OTOMixin`."""


def _refuse_sharding(args: TrainingArguments | None) -> None:
    """DeepSpeed and FSDP flatten or shard the parameters that ZIGs are made of."""
    if args is None:
        return
    if args.deepspeed:
        raise OTOError("DeepSpeed is not supported, it flattens the parameters: train with DDP (torchrun) instead")
    if args.fsdp:
        raise OTOError("FSDP is not supported yet, it shards the parameters: train with DDP (torchrun) instead")


@contextlib.contextmanager
def _same_random_state() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
