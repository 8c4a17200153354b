"""The Trainer: partitions on the first batch, trains with DHSPG, holds the compact model when `train()` returns.

`OTOMixin` is made of parts, each with a file of its own: first_calls.py takes the first examples, resume.py goes on
from checkpoints, rehearsal.py tries the end of a run before its first step, distillation.py asks a teacher,
shrinking.py cuts during training, keeping.py saves what was trained, ending.py cuts at the end, and hub.py pushes to
the Hub.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import (
    ProgressCallback,
    Seq2SeqTrainer,
    Trainer,
    TrainingArguments,
)

from .arguments import (
    TARGETS,
    setting,
)
from .by_layers import runs_by_blocks
from .calls import Forward, as_forwards, at_home, raise_if_out_of_memory
from .cost import Work
from .dhspg import DHSPG
from .distillation import Distilling
from .ending import Ending
from .evaluating import random_states_kept, take_off_autocast_
from .first_calls import FirstCalls
from .flat import make_whole_
from .hub import Hub, described_optimizer
from .keeping import Keeping
from .modeling_oto import OTOError
from .paper import PaperDHSPG
from .partition import partition_zigs
from .ranks import of_rank_zero, refuse_set_up, refuse_sharding
from .rehearsal import Rehearsing
from .report import scores
from .resume import Resuming
from .sharded import BeforeSharding, let_go_of_whole_weights
from .shrinking import Shrinking
from .undivided import Undivided
from .uniform import Tie, find_ties, in_steps
from .zero import ZeroDHSPG, models_stay_whole
from .zigs import ZIGPartition

logger = logging.getLogger(__name__)


class OTOMixin(FirstCalls, Resuming, Rehearsing, Distilling, Shrinking, Ending, Keeping, Hub):
    """Makes any `Trainer` train once and hold a compact model: `class MyTrainer(OTOMixin, SomeTrainer): pass`.

    After `train()`, `model`, `evaluate`, `predict`, `save_model` and `push_to_hub` are those of the compact model.
    Under FSDP2 it stays sharded, and no rank ever holds all of it; `save_model` writes it whole, weight by weight.
    After ZeRO-3 FSDP2 has sharded it, too; after ZeRO-1 and 2 it is plain, and whole on every rank. Both give it the
    dtype that the model had which was passed in.

    With `shrink=True` the model gets smaller during training: it stays the same module and gets new parameters. A
    callback that keeps copies of its tensors must cut them in the same way, in a method `on_compact(self, args, state,
    control, model, optimizer, cut, **kwargs)`: `self.copies = cut.of_tensors(self.copies, model)`. This method is
    called after every cut: during training before `on_step_end` of any callback, at the end after `on_train_end`, and
    when a run is resumed, before its weights are loaded, for all that had been cut.
    If a callback keeps tensors and has no such method, the model is cut at the end only.

    With `teacher=` the model learns from another one, too: see `hf_oto.distillation.Distilling`.

    Attributes:
        partition: the ZIGs, found on the first batch (`ZIGPartition`), or None before `train()`.
        plan: what was kept (`PruningPlan`), or None before the end of `train()`.
        report: dict with "before" and "after" (see `measure`), "group_sparsity" (of the ZIGs that were cut out),
            "max_output_difference_in_own_dtype" and, computed in double, "max_output_difference" (relative,
            of zeroed full and compact model on a real batch), "training_macs" (those of the run, as a fraction of what
            the dense model would have taken in the same steps), "pruning" (its first and last step) and "metrics" (of
            the last evaluation of the full model, if its weights were those that were cut, "zeroed" (not where the
            model had shrunk before), and of the first one after, "compact"), or None. It prints as a table.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.partition: ZIGPartition | None = None
        self._works: dict[str, Work] = {}  # parameters and MACs, of which the log shows the fraction that is left
        self._forwards: list[Forward] = []  # the calls that training makes of the model, on a few examples
        self._rehearsed: ZIGPartition | None = None  # the partition with which the end was tried
        self._ties: tuple[Tie, ...] | None = None
        self._steps_made = 0  # of the optimizer; `state.global_step` follows
        for given in (*args, *kwargs.values()):
            if isinstance(given, TrainingArguments):
                refuse_sharding(given)
        super().__init__(*args, **kwargs)
        if self.get_tp_size() > 1:
            raise OTOError("tensor parallel splits the groups that OTO prunes: train with FSDP2 or DDP instead")
        refuse_set_up(self.accelerator, self.model, is_paper=self._setting("pruning_mode") == "paper")
        if self.is_deepspeed_enabled:
            make_whole_(self.model)  # from_pretrained divides models where there are arguments for ZeRO-3 already

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`, and the compact model at its end.

        If something fails after the last step, the trained model is saved in the folder `trained` of the output
        folder, and the error names that folder. A call after an interrupted one begins the schedule anew, with the
        weights as they are.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A checkpoint to go on from, as if the run had never been interrupted; `True` is the newest complete
                one in the output folder.

        Raises:
            OTOError: the model was compacted by an earlier `train()`, the checkpoint is incomplete or another
                model's, or the certificate fails.
        """
        if self.report is not None and self.model_init is None:
            raise OTOError(
                "this trainer has compacted its model: to train that further make a Trainer(trainer.model, ...), "
                "to prune it again an OTOTrainer(trainer.model, ...); a model that is sharded has to be saved and "
                "loaded before"
            )
        if resume_from_checkpoint:
            resume_from_checkpoint = self._complete_checkpoint(resume_from_checkpoint)
        self.plan = self.report = self._saved_in = self._trained = None
        self._last_saved = (0, "")
        self._others_failed = False
        if self.is_fsdp_enabled:
            let_go_of_whole_weights(self.model)
        if self.model_init is not None:
            self.partition = self._ties = None
            self._forwards = []
            self.is_deepspeed_enabled = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        if self.is_deepspeed_enabled and isinstance(self.optimizer, AcceleratedOptimizer):
            raise OTOError("DeepSpeed's engine is left from a training that was interrupted: make a new trainer")
        was_cut = self._dhspg() is not None and self._has_shrunk  # as the model of a checkpoint, before a failure
        if was_cut or isinstance(self.optimizer, AcceleratedOptimizer):
            self._forget_earlier_training()
        if self.model_init is not None:
            self._compaction = None  # it is of an earlier model
        earlier = self.state  # training makes a new one when it begins
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
            self._meet_after_training()
            self._compact()
        except BaseException as error:
            if self.state is earlier or not self._is_trained():
                raise
            where = self._where_trained_is_safe(error)
            self._shard_again()
            if where is None:
                raise
            if not isinstance(error, Exception):  # Ctrl-C must reach the caller as a KeyboardInterrupt
                logger.error("%s after the last step: %s", type(error).__name__, where)
                raise
            raise_if_out_of_memory(error, where)
            raise OTOError(f"after the last step: {type(error).__name__}: {error}; {where}") from error
        finally:
            self._loader = None
        return output

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """DHSPG around the optimizer that the trainer makes or was given, whatever its parameter groups are."""
        self._steps_made = 0
        if self._dhspg() is None:
            before = self.optimizer
            try:
                super().create_optimizer(*args, **kwargs)
                self._take_over_optimizer(args[0] if args else kwargs.get("model"))
            except BaseException:
                # else the next try would take the one that the trainer has made for one that the user gave
                self.optimizer = before
                raise
        return self.optimizer

    def _wrap_model(self, model: Any, training: bool = True, *args: Any, **kwargs: Any) -> Any:
        """`Trainer`'s (private, of 5.23), which training calls between `create_optimizer` and `prepare`."""
        # evaluation alone also wraps, and has no optimizer
        if training and self.is_in_train:
            if self._dhspg() is None:  # a subclass has made its optimizer without asking us
                self._take_over_optimizer(None)
            take_off_autocast_(self.model)  # an earlier try with a larger batch has put it on
        return super()._wrap_model(model, training, *args, **kwargs)

    def _take_over_optimizer(self, model: torch.nn.Module | None) -> None:
        model = self.model if model is None else model
        base = self.optimizer
        if not isinstance(base, torch.optim.Optimizer):
            raise OTOError(f"{type(base).__name__} is no torch optimizer, which makes the steps: use one that is")
        take_off_autocast_(model)  # an evaluation may have put it on; training puts it on again
        if self.is_deepspeed_enabled:
            model.to(self.args.device)  # where the first batch will be; DeepSpeed would move the model a moment later
        plugin = self.accelerator.state.deepspeed_plugin
        whole = contextlib.nullcontext() if plugin is None else models_stay_whole(plugin.hf_ds_config)
        with whole, random_states_kept(model):  # training goes on with the numbers it would have drawn
            self._analyse(model)
            self.optimizer = self._dhspg_around(base, model)
            self._begin_whole(model)
        self._optimizer_text = described_optimizer(base)
        self._loader = None
        self.optimizer.register_step_post_hook(self._note_step)

    def _note_step(self, *_: Any) -> None:
        self._steps_made = self.state.global_step + 1

    def _analyse(self, model: torch.nn.Module) -> None:
        """Finds the ZIGs, and tries before the first step what has to be possible after the last one."""
        of_rank_zero(lambda: self._refuse_adapters(model))
        if not self._forwards:
            self._forwards = at_home(as_forwards(self.trace_calls()), model)
        if self.partition is None:
            protect = self._setting("protect")
            # a model that FSDP2 will shard still lies on the CPU, where it would take minutes or hours to run
            device = self.args.device if self.is_fsdp_enabled else None
            self.partition = of_rank_zero(lambda: partition_zigs(model, self._forwards, protect, device))
            if self.is_world_process_zero() and not self.args.disable_tqdm:
                print(self.partition)
        if self._setting("uniform"):
            self._ties = of_rank_zero(lambda: find_ties(model, self.partition, self._forwards))
            self.partition = in_steps(self.partition, self._ties)
        if not self.partition.axes and self._setting("target_group_sparsity") != 0:
            raise OTOError(f"{type(model).__name__} has no prunable ZIG:\n{self.partition}")
        if self._rehearsed is not self.partition:
            of_rank_zero(lambda: self._rehearse_the_end(model))
            self._rehearsed = self.partition
        works = {"params": self.partition.params(model), "macs": self.partition.work}
        self._works = {name: work for name, work in works.items() if work is not None}
        if self._is_divided and not any(isinstance(p, DTensor) for p in model.parameters()):
            plugin = self.accelerator.state.deepspeed_plugin
            if self.is_fsdp_enabled:
                self._before_sharding = BeforeSharding(model)
            else:
                self._before_sharding = None  # of an earlier model
                if plugin.zero_stage == 3:
                    self._runs_by_blocks = of_rank_zero(lambda: runs_by_blocks(model, self._forwards))
                    self._undivided = BeforeSharding(model)
                else:
                    self._undivided = Undivided(model)
            # only with gloo a barrier says which rank is missing
            self._meeting = torch.distributed.new_group(backend="gloo")

    def _dhspg_around(self, base: torch.optim.Optimizer, model: torch.nn.Module) -> DHSPG:
        steps = self.state.max_steps or self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]
        common = {"base": base, "total_steps": steps}
        targets = {name: self._setting(name) for name in TARGETS if self._setting(name) is not None}
        if self._setting("pruning_mode") == "paper":
            return PaperDHSPG(model, self.partition, **common, **targets)
        cls = ZeroDHSPG if self.is_deepspeed_enabled else DHSPG
        return cls(
            model,
            self.partition,
            window=self._setting("pruning_window"),
            min_keep=self._setting("min_keep"),
            group_divisible=self._setting("group_divisible"),
            tied=None if self._ties is None else [tie.axes for tie in self._ties],
            **common,
            **targets,
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """`Trainer.log` with `oto/group_sparsity`, `oto/params_left` and `oto/macs_left`, fractions in [0, 1].

        The progress bar shows the group sparsity and the phase. The caller's own `logs` get none of these entries,
        because `evaluate` may return them.
        """
        optimizer = self._dhspg()
        ours: dict[str, float] = {}
        if self.report is not None:
            before, after = self.report["before"], self.report["after"]
            ours["oto/group_sparsity"] = self.report["group_sparsity"]
            ours |= {f"oto/{name}_left": after[name] / (before[name] or 1) for name in self._works if name in before}
        elif optimizer is not None:
            # of all ZIGs, as in the report; those of frozen parameters are not the optimizer's
            sparsity = float(optimizer.zero.sum()) / max(1, self.partition.num_zigs)
            ours["oto/group_sparsity"] = sparsity
            ours |= {f"oto/{name}_left": optimizer.left(self.partition, work) for name, work in self._works.items()}
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                    text = f"group sparsity {sparsity:.2f}, {optimizer.phase}"
                    callback.training_bar.set_postfix_str(text)
        shown = logs | ours
        super().log(shown, *args, **kwargs)
        # trainers add to their logs in place (the epoch, metrics of their own), and their callers return these logs
        logs.clear()
        logs.update({name: value for name, value in shown.items() if name not in ours})
        if self.report is not None:
            self.report["metrics"]["compact"] = scores(logs) | self.report["metrics"]["compact"]

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """No checkpoint from before the target can be the best one."""
        optimizer = self._dhspg()
        if optimizer is not None and not optimizer.target_reached:
            return False
        return super()._determine_best_metric(metrics, trial)

    def _setting(self, name: str) -> Any:
        return setting(self.args, name)

    def _dhspg(self) -> DHSPG | None:
        optimizer = self.optimizer
        while isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        if self.is_deepspeed_enabled and not isinstance(optimizer, torch.optim.Optimizer | None):
            optimizer = optimizer.optimizer  # DeepSpeed's own is around the one it was given
        return optimizer if isinstance(optimizer, DHSPG) else None


class OTOTrainer(OTOMixin, Trainer):
    """`transformers.Trainer` that trains once and ends with a compact model (OTOv2, arXiv 2303.06862). See `OTOMixin`.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from hf_oto import OTOTrainingArguments
        >>> size = dict(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        >>> model = BertForSequenceClassification(BertConfig(**size))
        >>> args = OTOTrainingArguments("out", max_steps=20, save_strategy="no", report_to="none", disable_tqdm=True)
        >>> trainer = OTOTrainer(model, args, train_dataset=[{"input_ids": [1, 2, 3], "labels": 0}] * 32)
        >>> output = trainer.train()  # doctest: +ELLIPSIS
        {...}
        hf_oto cut 13 of 26 ZIGs, parameters 4,890 -> ..., MACs 3,520 -> ...; the compact model is in memory, ...
        >>> trainer.report["group_sparsity"]
        0.5
    """


class OTOSeq2SeqTrainer(OTOMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` that trains once and ends with a compact model. See `OTOMixin`."""
