"""The Trainer: partitions on the first batch, trains with DHSPG, holds the compact model when `train()` returns."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType, broadcast, broadcast_object_list
from huggingface_hub import HfApi
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import (
    PreTrainedModel,
    ProgressCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from .calls import Forward, as_forwards, own_copy, raise_if_out_of_memory, recorded
from .card import IN_PROGRESS, add_to_card, model_card
from .certificate import certify, largest_difference, own_outputs, zeroed
from .choice import the_target
from .cost import Work
from .cut import Cut, TrialCut, compact_, resolve
from .dhspg import DHSPG
from .evaluating import WeightsKept, evaluating, random_states_kept
from .examples import Beginning
from .figures import save_figures
from .modeling_oto import FILE_NAME, OTOError
from .paper import PaperDHSPG
from .partition import partition_zigs
from .rehearsal import no_progress_bars, refuse_adapter, rehearse_saving
from .report import Report, measure, scores, size
from .restore import contents, put_back, replace_tensors_, restored
from .resume import STATES, has_weights, holds_whole_model, lacks, load_weights_, newest_complete
from .trace import persistent_buffers
from .uniform import Tie, find_ties, plain
from .zigs import PruningPlan, ZIGPartition, random_half

logger = logging.getLogger(__name__)


@dataclass
class OTOArguments:
    """What to prune. It goes before any class of training arguments, as `OTOMixin` goes before any trainer:
    `@dataclass class MyArguments(OTOArguments, SomeTrainingArguments): pass`.

    Args:
        target_group_sparsity (`float`, *optional*):
            Fraction of the ZIGs, in [0, 1), that is removed by the end of training: 0.5, unless one of the other
            targets is given.
        target_params (`float`, *optional*):
            Instead: fraction of the parameters, in (0, 1], that is left in the end.
        target_macs (`float`, *optional*):
            Instead: fraction of the multiply-accumulates, in (0, 1], that is left in the end.
        target_per_axis (`dict[str, float]` or JSON, *optional*):
            Instead: fraction of the ZIGs of each axis that is removed, by regular expression on its name in the
            printed partition; axes that none matches stay whole.
        pruning_mode (`str`, *optional*, defaults to `"scheduled"`):
            `"scheduled"` reaches the target whatever the learning rate; `"paper"` is OTOv2's own update
            (arXiv 2303.06862), which reaches it only if the learning rate and the number of steps allow.
        pruning_window (`list[float]`, *optional*):
            First and last moment of pruning as fractions of the optimizer steps (scheduled mode): (0.1, 0.6), or
            (0.1, 0.25) where at most a fifth is left.
        min_keep (`float`, *optional*, defaults to 0.1):
            Fraction of every axis, in [0, 1) and at least one ZIG, that is never removed (scheduled mode).
        group_divisible (`int`, *optional*):
            What is left of every axis is a multiple of this, in channels or units (scheduled mode): 8 for widths from
            64 on, 1 for others.
        uniform (`bool`, *optional*, defaults to `False`):
            Layers that one number of the stock config describes keep equal widths, and what no number describes stays
            whole: the compact model is then a stock one, with other numbers and no record (scheduled mode).
        protect (`list[str]`, *optional*):
            Regular expressions; a parameter is not pruned if one matches anywhere in its name or the name of a module
            it is in.

    Raises:
        ValueError: an argument is out of range, no regular expression, or one of two targets.
    """

    target_group_sparsity: float | None = field(
        default=None, metadata={"help": "Fraction of ZIGs to remove, in [0, 1); 0.5 if no target is given."}
    )
    target_params: float | None = field(default=None, metadata={"help": "Fraction of the parameters to keep."})
    target_macs: float | None = field(default=None, metadata={"help": "Fraction of the MACs to keep."})
    target_per_axis: dict | str | None = field(
        default=None, metadata={"help": "Fractions of ZIGs to remove, by regular expression on the axis, as JSON."}
    )
    pruning_mode: str = field(default="scheduled", metadata={"help": "scheduled or paper."})
    pruning_window: list[float] | None = field(
        default=None, metadata={"help": "Pruning starts and ends at these fractions of the steps."}
    )
    min_keep: float = field(default=0.1, metadata={"help": "Fraction of every axis that always stays, in [0, 1)."})
    group_divisible: int | None = field(
        default=None, metadata={"help": "What stays of an axis is a multiple of this."}
    )
    uniform: bool = field(default=False, metadata={"help": "Widths that a stock config can say, equal for layers."})
    protect: list[str] = field(default_factory=list, metadata={"help": "Regular expressions of names not to prune."})

    def __post_init__(self) -> None:
        if isinstance(self.target_per_axis, str):  # from a command line
            self.target_per_axis = _parsed("target_per_axis", self.target_per_axis)
        super().__post_init__()
        self._check()

    def _check(self) -> None:
        """Raises ValueError where an argument of ours can't be meant, by its name and value."""
        the_target({name: vars(self)[name] for name in TARGETS})
        if self.pruning_mode not in ("scheduled", "paper"):
            raise ValueError(f"pruning_mode is {self.pruning_mode!r}: it must be 'scheduled' or 'paper'")
        if self.pruning_mode == "paper" and self.uniform:
            raise ValueError("uniform is True: pruning_mode='paper' knows no equal widths, use 'scheduled'")
        window = self.pruning_window
        if window is not None and not (len(window) == 2 and 0 <= window[0] < window[1] <= 1):
            raise ValueError(f"pruning_window is {window}: it must be two fractions of the run, 0 <= start < end <= 1")
        if not 0 <= self.min_keep < 1:
            raise ValueError(f"min_keep is {self.min_keep}: it must be in [0, 1)")
        if self.group_divisible is not None and self.group_divisible < 1:
            raise ValueError(f"group_divisible is {self.group_divisible}: it must be at least 1")
        if isinstance(self.protect, str):  # its letters would each be taken for an expression
            raise ValueError(f"protect is {self.protect!r}: it must be a list of regular expressions")
        for name, patterns in (("protect", self.protect), ("target_per_axis", self.target_per_axis)):
            for pattern in patterns or ():
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(f"{name} has {pattern!r}, which is no regular expression: {error}") from error


def _parsed(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is {text!r}, which is no JSON: {error}") from error


PLAN_NAME = "oto_plan.json"
TARGETS = ("target_group_sparsity", "target_params", "target_macs", "target_per_axis")
DEFAULTS = {f.name: f.default if f.default_factory is MISSING else () for f in fields(OTOArguments)}


@dataclass
class OTOTrainingArguments(OTOArguments, TrainingArguments):
    """`TrainingArguments` and what to prune; see `OTOArguments`. A plain `TrainingArguments` works too and then means
    the defaults."""


@dataclass
class OTOSeq2SeqTrainingArguments(OTOArguments, Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` and what to prune; see `OTOArguments`."""


class OTOMixin:
    """Makes any `Trainer` train once and hold a compact model: `class MyTrainer(OTOMixin, SomeTrainer): pass`.

    After `train()`, `model`, `evaluate`, `predict`, `save_model` and `push_to_hub` are those of the compact model.
    Under FSDP2 that is the model passed in, plain and unsharded, and every rank must have room for the full one once.

    Attributes:
        partition: the ZIGs, found on the first batch (`ZIGPartition`), or None before `train()`.
        plan: what was kept (`PruningPlan`), or None before the end of `train()`.
        report: dict with "before" and "after" (see `measure`), "group_sparsity" (of the ZIGs that were cut out),
            "max_output_difference_in_own_dtype" and, computed in double, "max_output_difference" (relative,
            of zeroed full and compact model on a real batch), "pruning" (its first and last step) and "metrics" (of
            the last evaluation of the full model, if its weights were those that were cut, "zeroed", and of the first
            one after, "compact"), or None. It prints as a table.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.partition: ZIGPartition | None = None
        self.plan: PruningPlan | None = None
        self.report: Report | None = None
        self._cut: Cut | None = None  # what was cut
        self._works: dict[str, Work] = {}  # what is shown of it while it shrinks
        self._forwards: list[Forward] = []  # what training does with the model, on a few examples
        self._loader: Any = None  # what training will read, until its first examples are looked at
        self._taken: list[Any] = []  # batches looked at that only we can give to training
        self._taken_of: Any = None  # the iterator that they are of
        self._steps_made = 0  # of the optimizer; `state.global_step` follows
        self._rehearsed: ZIGPartition | None = None  # for which the end was tried
        self._saved_in: str | None = None  # the trained full model of this run, once it is on disk
        self._last_saved: tuple[int, str] = (0, "")  # by `save_model`: the step, and the folder
        self._optimizer_text = ""  # the one that DHSPG is around, with its settings
        self._early_card: tuple[Any, Any] | None = None  # what a card was asked for with, while training
        for given in (*args, *kwargs.values()):
            if isinstance(given, TrainingArguments):
                _refuse_sharding(given)
        super().__init__(*args, **kwargs)
        self._given_optimizer: Any = self.optimizer  # the user's own, which another training begins with again
        self._ties: tuple[Tie, ...] | None = None
        self._whole: WholeModel | None = None  # under FSDP2: the model before it was sharded, without weights
        if self.get_tp_size() > 1:
            raise OTOError("tensor parallel splits the groups that OTO prunes: train with FSDP2 or DDP instead")
        self._refuse_launcher()

    # training --------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`, and the compact model at its end.

        Whatever fails after the last step, the trained full model is then in the folder `dense` of the output folder,
        and the error names it. Called again after it was interrupted, it trains its whole schedule, from the weights
        as they are.

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
                "to prune it again an OTOTrainer(trainer.model, ...)"
            )
        if resume_from_checkpoint:
            resume_from_checkpoint = self._complete_checkpoint(resume_from_checkpoint)
        self.plan = self.report = self._saved_in = None
        self._last_saved = (0, "")
        if self.model_init is not None:
            self.partition = self._ties = None
            self._forwards = []
            self.is_fsdp_enabled = self.accelerator.is_fsdp2
        earlier = self.state
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
            self._compact()
        except BaseException as error:
            if self.state is earlier or not self._is_trained():
                raise
            where = self._where_trained_is_safe()
            if where is None:
                raise
            if not isinstance(error, Exception):  # Ctrl-C stays what it is
                logger.error("%s after the last step: %s", type(error).__name__, where)
                raise
            raise_if_out_of_memory(error, where)
            raise OTOError(f"after the last step: {type(error).__name__}: {error}; {where}") from error
        finally:
            self._loader = None
        return output

    def _is_trained(self) -> bool:
        """Whether the last step has been made: the optimizer's, of which the Trainer may not know yet."""
        made = max(self.state.global_step, self._steps_made)
        return made > 0 and (self.control.should_training_stop or made >= self.state.max_steps)

    def _where_trained_is_safe(self) -> str | None:
        """Saves the trained full model, if it isn't yet, and says where; None if that isn't for this process to do."""
        if self._saved_in is None:
            if self.is_fsdp_enabled and not self._all_ranks_are_here():  # one alone can't gather a model
                return None
            if self.state.is_hyper_param_search:  # it ends trials by errors of its own
                return None
            if self.is_fsdp_enabled:
                self._without_training_memory()
            if not self.is_world_process_zero():
                return f"the trained full model is saved by rank 0 in {self.args.output_dir}"
            try:
                self._saved_in = self._save_trained()
            except Exception as error:
                return f"saving the trained full model failed too ({error}): it is in memory still, as trainer.model"
        return f"the trained full model is saved in {self._saved_in}"

    def _all_ranks_are_here(self) -> bool:
        """Whether all ranks have come to this line, within a minute: whatever failed has failed on each of them."""
        try:
            torch.distributed.monitored_barrier(self._meeting, timeout=timedelta(minutes=1))
        except RuntimeError as error:
            logger.error("not all ranks failed after the last step, so the model can't be gathered: %s", error)
            return False
        return True

    def _save_trained(self) -> str:
        """Saves the model as it is now, whole and uncut, and returns the folder.

        That is `dense` in the output folder, with a number if another run has left one there; where it can't be
        written the checkpoint of the last step, if there is one, or a folder in the system's temporary one.
        """
        dense = Path(self.args.output_dir, "dense")
        free = itertools.chain([dense], (dense.with_name(f"dense-{n}") for n in itertools.count(2)))
        try:
            return self._save_whole(next(folder for folder in free if not folder.exists()))
        except Exception as error:
            step, folder = self._last_saved
            if step == max(self.state.global_step, self._steps_made) and os.path.isdir(folder):
                logger.warning("the trained full model is saved in %s only, not in %s: %s", folder, dense, error)
                return folder
            elsewhere = Path(tempfile.mkdtemp(prefix="dense-"))
            elsewhere.rmdir()  # its name is free
            try:
                self._save_whole(elsewhere)
            except Exception:
                raise error from None
            logger.warning("the trained full model is saved in %s, not in %s: %s", elsewhere, dense, error)
            return str(elsewhere)

    def _save_whole(self, folder: Path) -> str:
        """Saves the model under another name first: a folder of this name is whole."""
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        try:
            self._save(str(partial))
            os.rename(partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return str(folder)

    def _inner_training_loop(
        self, batch_size: int | None = None, args: Any = None, resume_from_checkpoint: str | None = None, **kwargs: Any
    ) -> Any:
        """`Trainer`'s; where an earlier one was interrupted, or ran out of memory, this one begins anew."""
        if isinstance(self.optimizer, AcceleratedOptimizer):  # prepared for that one, it would go on with its schedule
            self.optimizer = self.callback_handler.optimizer = self.callback_handler.lr_scheduler = (
                None  # and its memory
            )
            if resume_from_checkpoint is not None and not self.is_fsdp_enabled:  # FSDP's are loaded further in
                self._load_from_checkpoint(resume_from_checkpoint)
        elif self.optimizer is not None and not isinstance(self.optimizer, DHSPG):
            self._given_optimizer = self.optimizer
        if self.optimizer is None:
            self.optimizer = self._given_optimizer
        self._steps_made = 0
        return super()._inner_training_loop(batch_size, args, resume_from_checkpoint, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """`Trainer`'s, which makes one step too many if it was resumed at the last one, in the middle of an epoch."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    # resuming --------------------------------------------------------------------------------------

    def _complete_checkpoint(self, asked: str | bool) -> str | bool:
        """The folder to resume from, which lacks nothing; what isn't there at all is left for `Trainer` to refuse."""
        place, with_scaler = self.args.output_dir, self.accelerator.scaler is not None
        newest, incomplete = newest_complete(place, with_scaler)
        if asked is not True:
            incomplete = {str(asked): lacks(asked, with_scaler)} if os.path.isdir(asked) else {}
        facts = "; ".join(f"{folder} lacks {', '.join(lacking)}" for folder, lacking in incomplete.items() if lacking)
        if not facts:
            return newest or True if asked is True else asked
        if asked is True and newest is not None:
            if self.is_world_process_zero():
                logger.warning("%s: resuming from %s", facts, newest)
            return newest
        instead = f"resume from {newest}, or " if newest is not None else ""
        raise OTOError(
            f"can't resume: {facts} (a run that is killed leaves such a folder, and so does save_only_model=True): "
            f"{instead}begin a new run from its weights, with a model from from_pretrained({next(iter(incomplete))!r})"
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """`Trainer`'s, but all the weights or an error."""
        if self._loads_otherwise(super()._load_from_checkpoint, Trainer._load_from_checkpoint, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, *([] if model is None else [model]))
            return
        whole = self.accelerator.unwrap_model(self.model if model is None else model, keep_torch_compile=False)
        load_weights_(whole, str(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        """`Trainer`'s, but all the weights or an error."""
        best = self.state.best_model_checkpoint
        if not has_weights(best):
            raise OTOError(
                f"the best checkpoint, {best}, is not there or has no weights, so they can't be loaded (machines that "
                "share no disk need save_on_each_node=True)"
            )
        if self._loads_otherwise(super()._load_best_model, Trainer._load_best_model, best):
            super()._load_best_model()
            return
        logger.info("Loading best model from %s (score: %s).", best, self.state.best_metric)
        load_weights_(self.accelerator.unwrap_model(self.model, keep_torch_compile=False), best)

    def _loads_otherwise(self, inherited: Any, stock: Any, folder: str) -> bool:
        """Whether another trainer, accelerate (for FSDP) or PEFT has a way of its own to load what is in a folder."""
        return self.is_fsdp_enabled or inherited.__func__ is not stock or not holds_whole_model(folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """`Trainer`'s; what doesn't fit this run is an error that names the folder."""
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except Exception as error:
            raise_if_out_of_memory(error)
            raise OTOError(
                f"can't resume from {checkpoint}: {error} (for a new run from its weights, take a model from "
                f"from_pretrained({str(checkpoint)!r}))"
            ) from error

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """`Trainer`'s, into a folder that is incomplete until the last file: an older one may have had its name."""
        folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            for name in STATES:
                (folder / name).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        """`Trainer`'s; the state of the run, which is saved next, says that every rank has written its own."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    # data ------------------------------------------------------------------------------------------

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any) -> Any:
        """`Trainer`'s; the training loop asks with the data loader that it goes on to read."""
        if dataloader is not self._taken_of:
            self._taken = []
        self._loader = dataloader
        return super().set_initial_training_values(args, dataloader)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        """`Trainer`'s, beginning with what was taken of an iterator before."""
        taken = (self._taken.pop(0) for _ in range(len(self._taken)))
        # a chain, which doesn't close the epoch's iterator at its own end
        return super().get_batch_samples(itertools.chain(taken, epoch_iterator), *args, **kwargs)

    def trace_calls(self) -> Sequence[Mapping[str, Any] | Forward]:
        """The calls of the model's forward that training makes: those of one `compute_loss` on a few examples.

        Override it where that is not how your trainer uses its model: a list of keyword arguments of forward.

        Raises:
            OTOError: no batch could be computed; the error that the trainer's own first batch gives is its cause.
        """
        loader, self._loader = self._loader, None
        if loader is None or getattr(loader, "num_workers", 0) > 0:  # workers go on from where they were left
            loader = self.get_train_dataloader()
        without_loss: list[Forward] = []
        problem: Exception | None = None
        with Beginning(loader, self._train_batch_size) as beginning:
            for make_batch in beginning.batches():
                try:
                    forwards, finite = self._calls_of_a_loss(make_batch, beginning.owners)
                except Exception as error:
                    raise_if_out_of_memory(error)
                    logger.info("compute_loss on a few examples failed: %s: %s", type(error).__name__, error)
                    problem = error
                    continue
                without_loss = without_loss or forwards  # examples without labels show the calls too
                if finite:
                    without_loss = forwards
                    break
        if beginning.taken:
            self._taken += beginning.taken
            self._taken_of = loader
        if without_loss:
            return without_loss
        raise OTOError(
            f"compute_loss of {type(self).__name__} fails on its first batch: {type(problem).__name__}: {problem} (if "
            "it needs what only training has, an optimizer, say: override trace_calls)"
        ) from problem

    def _calls_of_a_loss(self, make_batch: Callable[[], Any], owners: Sequence[Any]) -> tuple[list[Forward], bool]:
        """The calls that one `compute_loss` makes, and whether the loss is finite; trainer, model and the data's
        `owners` stay as they were."""
        owners = [self, self.args, self.state, self.control, *owners]
        if hasattr(self.data_collator, "__dict__"):
            owners.append(self.data_collator)  # the loader's own may be around it
        with random_states_kept(self.model), restored(self.model, *owners):
            for held, _ in contents(torch.nn.Module(), self).containers:
                if isinstance(held, dict):  # sums, say, that grow in place
                    held |= {name: t.clone() for name, t in held.items() if isinstance(t, torch.Tensor)}
            self._taken = []
            self.log = lambda *_, **__: None  # what the loss reports is no part of the training yet
            self.args.average_tokens_across_devices = False  # ranks may fail one by one
            samples, num_items = self.get_batch_samples(iter([own_copy(make_batch())]), 1, self.args.device)
            self.current_gradient_accumulation_steps = 1  # the training loop has not set it yet
            with evaluating(self.model, training=True), WeightsKept(self.model), torch.enable_grad():
                inputs = self._prepare_inputs(samples[0])  # may generate, which is no part of the loss
                with recorded(self.model) as forwards, self.compute_loss_context_manager():
                    loss = self.compute_loss(self.model, inputs, num_items_in_batch=num_items)
        if not forwards:
            raise OTOError(f"compute_loss of {type(self).__name__} does not call its model: override trace_calls")
        return forwards, bool(torch.isfinite(torch.as_tensor(loss)).all())

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """DHSPG around the optimizer that the trainer makes or was given, whatever its parameter groups are."""
        self._steps_made = 0
        if self._dhspg() is None:
            before = self.optimizer
            try:
                super().create_optimizer(*args, **kwargs)
                self._take_over_optimizer(args[0] if args else kwargs.get("model"))
            except BaseException:
                self.optimizer = before  # what the trainer has made isn't one that was given
                raise
        return self.optimizer

    def _wrap_model(self, model: Any, training: bool = True, *args: Any, **kwargs: Any) -> Any:
        """`Trainer`'s (private, of 5.23), which training calls between `create_optimizer` and `prepare`."""
        if training and self.is_in_train:
            if self._dhspg() is None:  # a subclass has made its optimizer without asking us
                self._take_over_optimizer(None)
            _take_off_autocast_(self.model)  # of an earlier try, with a larger batch
        return super()._wrap_model(model, training, *args, **kwargs)

    def _take_over_optimizer(self, model: torch.nn.Module | None) -> None:
        model = self.model if model is None else model
        base = self.optimizer
        if not isinstance(base, torch.optim.Optimizer):
            raise OTOError(f"{type(base).__name__} is no torch optimizer, which makes the steps: use one that is")
        _take_off_autocast_(model)  # of an evaluation before; training puts it on again
        with random_states_kept(model):  # training goes on with the numbers it would have drawn
            self._analyse(model)
            self.optimizer = self._dhspg_around(base, model)
        self._optimizer_text = _described(base)
        self._loader = None
        self.optimizer.register_step_post_hook(self._note_step)

    def _note_step(self, *_: Any) -> None:
        self._steps_made = self.state.global_step + 1

    def _analyse(self, model: torch.nn.Module) -> None:
        """Finds the ZIGs, and tries before the first step what has to be possible after the last one."""
        _of_rank_zero(lambda: self._refuse_adapters(model))
        if not self._forwards:
            self._forwards = as_forwards(self.trace_calls())
        if self.partition is None:
            protect = self._setting("protect")
            self.partition = _of_rank_zero(lambda: partition_zigs(model, self._forwards, protect=protect))
            if self.is_world_process_zero() and not self.args.disable_tqdm:
                print(self.partition)
        if self._setting("uniform"):
            self._ties = _of_rank_zero(lambda: find_ties(model, self.partition, self._forwards))
        if not self.partition.axes and self._setting("target_group_sparsity") != 0:
            raise OTOError(f"{type(model).__name__} has no prunable ZIG:\n{self.partition}")
        if self._rehearsed is not self.partition:
            _of_rank_zero(lambda: self._rehearse_the_end(model))
            self._rehearsed = self.partition
        works = {"params": self.partition.params(model), "macs": self.partition.work}
        self._works = {name: work for name, work in works.items() if work is not None}
        if self.is_fsdp_enabled and not any(isinstance(p, DTensor) for p in model.parameters()):
            self._whole = WholeModel(model)
            self._meeting = torch.distributed.new_group(backend="gloo")  # the one that knows who is missing

    def _dhspg_around(self, base: torch.optim.Optimizer, model: torch.nn.Module) -> DHSPG:
        steps = self.state.max_steps or self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]
        common = {"base": base, "total_steps": steps}
        targets = {name: self._setting(name) for name in TARGETS if self._setting(name) is not None}
        if self._setting("pruning_mode") == "paper":
            return PaperDHSPG(model, self.partition, **common, **targets)
        return DHSPG(
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
        """`Trainer.log` with `oto/group_sparsity`, `oto/params_left` and `oto/macs_left`, fractions in [0, 1], in
        every line; the progress bar shows the group sparsity and the phase. The caller's own `logs`, which may be
        what `evaluate` returns, get none of them."""
        optimizer = self._dhspg()
        ours: dict[str, float] = {}
        if self.report is not None:
            before, after = self.report["before"], self.report["after"]
            ours["oto/group_sparsity"] = self.report["group_sparsity"]
            ours |= {f"oto/{name}_left": after[name] / (before[name] or 1) for name in self._works if name in before}
        elif optimizer is not None:
            ours["oto/group_sparsity"] = optimizer.group_sparsity
            ours |= {f"oto/{name}_left": optimizer.left(self.partition, work) for name, work in self._works.items()}
            text = f"group sparsity {optimizer.group_sparsity:.2f}, {optimizer.phase}"
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                    callback.training_bar.set_postfix_str(text)
                elif (table := getattr(callback, "training_tracker", None)) is not None:  # in a notebook
                    table.prefix = text
        shown = logs | ours
        super().log(shown, *args, **kwargs)
        # trainers add to their logs in place (the epoch, metrics of their own), and their callers return that
        logs.clear()
        logs.update({name: value for name, value in shown.items() if name not in ours})
        if self.report is not None:
            self.report["metrics"]["compact"] = scores(logs) | self.report["metrics"]["compact"]

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """`Trainer.save_model`; beside a compact model also the figures, where matplotlib is installed, and beside one
        that is no `PreTrainedModel` what was cut, as `oto_plan.json`, to build it again by."""
        super().save_model(output_dir, *args, **kwargs)
        folder = output_dir or self.args.output_dir
        if not self.is_fsdp_enabled:
            self._last_saved = self.state.global_step, folder
        if self.report is not None:
            self._save_figures(folder)
            if self.args.should_save and not isinstance(self.model, PreTrainedModel):
                Path(folder, PLAN_NAME).write_text(self.plan.to_json())
            self._write_early_card_anew()

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """No checkpoint from before the target can be the best one."""
        optimizer = self._dhspg()
        if optimizer is not None and not optimizer.target_reached:
            return False
        return super()._determine_best_metric(metrics, trial)

    # compacting ------------------------------------------------------------------------------------

    def _rehearse_the_end(self, model: torch.nn.Module) -> None:
        """Cuts the untrained model for a moment, saves it beside where the trained one will be, and builds it again:
        what can't be done in the end is an error before the first step."""
        cut = resolve(self.partition, random_half(self.partition), warn=False)
        with self._room_for_rehearsal(model) as folder:
            try:
                rehearse_saving(model, cut, lambda: self._save(folder), folder)
            except Exception as error:
                raise_if_out_of_memory(error)
                raise OTOError(
                    f"a compact {type(model).__name__} can't be saved and loaded again, which was tried before the "
                    f"first step: {type(error).__name__}: {error}"
                ) from error

    def _refuse_adapters(self, model: torch.nn.Module) -> None:
        """Saves a model with frozen parameters once: what saves a part of its weights only is an error, even before
        anything is analysed."""
        if not all(p.requires_grad for p in model.parameters()):
            with self._room_for_rehearsal(model) as folder, no_progress_bars():
                try:
                    self._save(folder)
                except Exception:  # the rehearsal will say why
                    return
                refuse_adapter(model, folder)

    @contextlib.contextmanager
    def _room_for_rehearsal(self, model: torch.nn.Module) -> Iterator[str]:
        """An empty folder, for a moment, beside where the trained model will be."""
        place = self.args.output_dir
        os.makedirs(place, exist_ok=True)
        disk, needed = shutil.disk_usage(place), size(model)["bytes"]
        if disk.total and disk.free < needed:  # some network disks say they have none at all
            raise OTOError(f"the trained model takes {needed:,} bytes, and {disk.free:,} bytes are free in {place}")
        with tempfile.TemporaryDirectory(prefix="rehearsal-", dir=place, ignore_cleanup_errors=True) as folder:
            yield folder

    def _compact(self) -> None:
        """Saves the trained model, certifies the cut of its zeros, measures both, cuts, and lets go of the rest."""
        optimizer = self._dhspg()
        events = optimizer.schedule.events
        if not optimizer.reaches_target(optimizer.made_zero):
            logger.warning(
                "training ended at group sparsity %.3f, before its target: only what is zero is cut out",
                optimizer.group_sparsity,
            )
        made_zero = optimizer.zeros(self.partition)
        del optimizer  # its state is twice the model
        model = self._without_training_memory()
        state = self.state
        last = (self.args.load_best_model_at_end and state.best_global_step) or state.global_step  # of these weights
        metrics = {k: v for logs in state.log_history if logs["step"] == last for k, v in scores(logs).items()}
        self._saved_in = _of_rank_zero(self._save_trained)  # before rank 0 waits for any other
        if self.accelerator.num_processes > 1:
            for buffer in model.buffers():  # batch norm statistics differ between ranks
                buffer.copy_(broadcast(buffer))
        if self._zero_again(model, made_zero):
            metrics = {}  # other weights were evaluated
        self.plan = PruningPlan.from_zeros(model, self.partition)
        cut = resolve(self.partition, self.plan)
        certificate = _of_rank_zero(lambda: certify(model, cut, self._forwards))
        if not certificate.holds:
            raise OTOError(f"the certificate failed: {certificate}, so the model was not cut")
        before, after = self._measured(model, cut)
        if cut.removed.any():
            compact_(model, cut)
        self._cut = cut
        if self._ties is not None:
            stock = plain(model, self.partition, self.plan, self._ties, self._forwards)  # the same on every rank
            if stock is None:
                logger.warning("no stock config says these widths: the compact model is saved with a record of them")
            model = stock or model
        for holder in (self, self.callback_handler):
            holder.model = model
        self.model_wrapped = model
        self.accelerator.free_memory()
        self.model_wrapped = self.accelerator.prepare_model(model, evaluation_mode=True)
        self.report = Report(
            before=before,
            after=after,
            group_sparsity=float(cut.removed.sum() / max(1, self.partition.num_zigs)),
            max_output_difference=certificate.cut,
            max_output_difference_in_own_dtype=certificate.rounding,
            pruning=[events[0], events[-1] if len(events) > 1 else state.global_step] if events else [],
            metrics={"zeroed": metrics, "compact": {}},
        )
        if self.is_world_process_zero():
            if not self.args.disable_tqdm:
                print(self.report)
            print(self._outcome())  # as the Trainer prints its log lines, whatever the log level
        self._save_figures(self.args.output_dir)
        if self.is_world_process_zero() and self._saved_in != self._last_saved[1]:
            shutil.rmtree(self._saved_in, ignore_errors=True)  # at the very end: until here it is the way back

    def _outcome(self) -> str:
        """One line for whoever looks at the output of a run: what was cut, and where which model is now."""
        cut = [f"{self._cut.removed.sum():,} of {self.partition.num_zigs:,} ZIGs"]
        before, after = self.report["before"], self.report["after"]
        for name, text in (("params", "parameters"), ("macs", "MACs")):
            if name in before:
                cut.append(f"{text} {before[name]:,} -> {after[name]:,}")
        where = "the compact model is in memory, as trainer.model: trainer.save_model() saves it"
        checkpoints = [self._last_saved[1], self.state.best_model_checkpoint or ""]
        for folder in checkpoints:  # the last one may have been deleted for the best one
            if Path(folder).name.startswith(PREFIX_CHECKPOINT_DIR) and os.path.isdir(folder):
                where += f" ({folder} holds the full one)"
                break
        return f"hf_oto cut {', '.join(cut)}; {where}"

    def _zero_again(self, model: torch.nn.Module, made_zero: PruningPlan) -> bool:
        """Zeroes ZIGs that the optimizer made zero and that aren't in the weights: whether there were any."""
        removed = made_zero.removed(self.partition)
        moved = removed & ~PruningPlan.from_zeros(model, self.partition).removed(self.partition)
        if not moved.any():
            return False

        def how_far() -> float:
            before = own_outputs(model, self._forwards)
            with zeroed(model, Cut(self.partition, removed, {}, {})):
                return largest_difference(before, own_outputs(model, self._forwards))

        difference = _of_rank_zero(how_far)
        self.partition.zero_(model, made_zero)
        logger.warning(
            "%d of %d ZIGs that training had made zero were not zero in the end: weights were put into the model from "
            "outside (an average, a checkpoint, a callback of yours). They are zeroed again, by which the outputs on "
            "a real batch move by %.1e, relative to their size",
            moved.sum(), removed.sum(), difference,
        )  # fmt: skip
        return True

    def _measured(self, model: torch.nn.Module, cut: Cut) -> list[dict[str, Any]]:
        """What the full and the cut model take. Measuring runs them, and what goes wrong with that is a warning."""
        try:
            return _of_rank_zero(lambda: measure(model, TrialCut(model, cut), inputs=self._forwards))
        except Exception as error:
            logger.warning("the models could not be measured: %s: %s", type(error).__name__, error)
        with TrialCut(model, cut) as small:
            after = size(small)
        return [size(model), after]

    def _without_training_memory(self) -> torch.nn.Module:
        """The trained model, whole, on every rank; gradients and optimizer state are gone, whoever held them."""
        if self.is_fsdp_enabled:
            # whole and plain from here on: it is saved, evaluated and cut like any other
            model, self.is_fsdp_enabled = self._whole.gathered(self.model), False
            self._whole = None
        else:
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            _take_off_autocast_(model)
            model = self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        for holder in (self, self.callback_handler):
            holder.model, holder.optimizer, holder.lr_scheduler = model, None, None
        self.model_wrapped = model
        model.zero_grad(set_to_none=True)
        self.accelerator.free_memory()
        self.model = self.model_wrapped = model.to(self.accelerator.device)
        return model

    def _save_figures(self, folder: str) -> None:
        """Figures are for looking at: what goes wrong with them is a warning."""
        if self.args.should_save:
            try:
                os.makedirs(folder, exist_ok=True)
                save_figures(folder, self._cut, self.state.log_history, self.report["pruning"])
            except Exception as error:
                logger.warning("the figures could not be drawn: %s: %s", type(error).__name__, error)

    # the Hub ---------------------------------------------------------------------------------------

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """`Trainer.push_to_hub`; a compact model then deletes the dense weights that pushes during training left."""
        folder, compacted = self.args.output_dir, self.report is not None and self.is_world_process_zero()
        if compacted:  # saving replaces shards, but not what says where they are
            Path(folder, SAFE_WEIGHTS_INDEX_NAME).unlink(missing_ok=True)
        pushed = super().push_to_hub(commit_message, blocking, token, revision, *args, **kwargs)
        if compacted:
            kept, at = os.listdir(folder), (token or self.args.hub_token, revision or self.args.hub_revision)
            if blocking:
                _delete_others(self.hub_model_id, kept, *at)
            else:
                pushed.add_done_callback(lambda p: p.exception() or _delete_others(self.hub_model_id, kept, *at))
        return pushed

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """`Trainer`'s, with a card that says what is pushed, and the code of a model that was compact before."""
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            idle = self.push_in_progress is None or self.push_in_progress.is_done()
            if idle and "config" in vars(self.model):  # without one there is no stock card either
                self.create_model_card(model_name=self.hub_model_id.split("/")[-1])
            code = os.path.join(checkpoint_folder, FILE_NAME)
            if os.path.exists(code):
                shutil.copy(code, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """`Trainer`'s card with the optimizer that really trained, two more tags, and what `model_card` says."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero() and self.state.global_step > 0:
            self._early_card = (args, kwargs) if self.report is None else None
            try:
                self._add_to_card()
            except Exception as error:
                logger.warning("the card says nothing of the pruning: %s: %s", type(error).__name__, error)

    def _write_early_card_anew(self) -> None:
        """A card from before the end says that training is not over."""
        if self._early_card is not None:
            given, named = self._early_card
            try:
                self.create_model_card(*given, **named)
            except Exception as error:
                logger.warning("the card still says that training goes on: %s: %s", type(error).__name__, error)

    def _add_to_card(self) -> None:
        optimizer = f"DHSPG of hf_oto around {self._optimizer_text}"
        folder, text = self.args.output_dir, IN_PROGRESS
        if self.report is not None:
            name = self.hub_model_id or Path(folder).name
            text = model_card(name, self.model, self.report, self._arguments(), optimizer, folder)
        add_to_card(os.path.join(folder, "README.md"), text, optimizer)

    def _arguments(self) -> str:
        """The arguments that make another run the same, as code: a few always, and what differs from its default."""
        values = self.args.to_dict() | {"max_steps": self.state.max_steps}
        shown = {name: self._setting(name) for name in TARGETS if self._setting(name) is not None}
        if isinstance(self.args, OTOArguments):  # what says no target has no field for the default one
            shown = dict([the_target(shown)])
        for f in fields(self.args):
            default = f.default if f.default_factory is MISSING else f.default_factory()
            value = values.get(f.name, default)  # some are left out, where they are no data
            differs = value != default and (value or default) and not f.name.startswith(OF_THE_PLACE)
            if differs or f.name in ("learning_rate", "max_steps", "per_device_train_batch_size", "seed"):
                shown[f.name] = value
        lines = "".join(f"    {name}={value!r},\n" for name, value in shown.items())
        return f'{type(self.args).__name__}(\n    "out",\n{lines})'

    # what it reads ---------------------------------------------------------------------------------

    def _refuse_launcher(self) -> None:
        """What `accelerate launch` or the model itself, not the arguments, ask for."""
        if self.accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
            raise OTOError(DEEPSPEED)
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise OTOError(FSDP1)
        if any(isinstance(p, DTensor) for p in self.model.parameters()):
            raise OTOError(
                "from_pretrained has sharded this model already, and ZIGs are found on whole ones: load it without a "
                "distributed_config and let the Trainer shard it (fsdp=True), or train with DDP"
            )

    def _setting(self, name: str) -> Any:
        return vars(self.args).get(name, DEFAULTS[name])

    def _dhspg(self) -> DHSPG | None:
        optimizer = self.optimizer
        while isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        return optimizer if isinstance(optimizer, DHSPG) else None


class OTOTrainer(OTOMixin, Trainer):
    """`transformers.Trainer` that trains once and ends with a compact model (OTOv2, arXiv 2303.06862). See `OTOMixin`.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> size = dict(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        >>> model = BertForSequenceClassification(BertConfig(**size))
        >>> args = OTOTrainingArguments("out", max_steps=20, save_strategy="no", report_to="none", disable_tqdm=True)
        >>> trainer = OTOTrainer(model, args, train_dataset=[{"input_ids": [1, 2, 3], "labels": 0}] * 32)
        >>> output = trainer.train()  # doctest: +ELLIPSIS
        {...}
        hf_oto cut 13 of 26 ZIGs, parameters 4,890 -> 4,546, MACs 3,520 -> 1,456; the compact model is in memory, ...
        >>> trainer.report["group_sparsity"]
        0.5
    """


class OTOSeq2SeqTrainer(OTOMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` that trains once and ends with a compact model. See `OTOMixin`."""


def _refuse_sharding(args: TrainingArguments | None) -> None:
    """DeepSpeed and FSDP1 flatten the parameters that ZIGs are made of."""
    if args is None:
        return
    if args.deepspeed:
        raise OTOError(DEEPSPEED)
    if args.fsdp and (int(args.fsdp_config.get("version", 2)) != 2 or args.fsdp_config.get("xla")):
        raise OTOError(FSDP1)


DEEPSPEED = "DeepSpeed is not supported, it flattens the parameters: train with FSDP2 (fsdp=True) or DDP instead"
FSDP1 = (
    "FSDP1 is not supported, it flattens the parameters: train with FSDP2 instead (fsdp_config={'version': 2}, or "
    "fsdp_version: 2 in the accelerate config), or with DDP"
)


# beginnings of arguments that are about the machine, the files or the Hub, not about the training
OF_THE_PLACE = tuple("output_ log report_ run_ save_ hub_ push_ disable_ debug accelerator_ use_cpu".split())


def _described(optimizer: torch.optim.Optimizer) -> str:
    """An optimizer's class and settings, as one line; where parameter groups differ in one, all its values."""
    shown = {}
    for name in optimizer.defaults:
        values = [group.get(name) for group in optimizer.param_groups]
        if len(set(map(str, values))) > 1:
            shown[name] = values
        elif values[0]:  # not what is off
            shown[name] = values[0]
    cls = type(optimizer)
    return f"{cls.__module__}.{cls.__qualname__} with {shown}"


def _take_off_autocast_(model: torch.nn.Module) -> None:
    """Puts back the forward that `accelerator.prepare` has wrapped for mixed precision, if it has.

    accelerate (1.15) keeps it as `_original_forward`. Its own undo takes off whatever names what it wraps: the
    decorators of the class's forward, and the forward that others have put in its place on this object.
    """
    original = vars(model).pop("_original_forward", None)
    if original is not None:
        vars(model).pop("forward", None)
        vars(model).pop("_is_accelerate_prepared", None)  # it would not be wrapped again
        if original != model.forward:  # not the class's own, which is there again
            model.forward = original


def _delete_others(repo: str, kept: Sequence[str], token: str | None, revision: str | None) -> None:
    """Deletes the weights at the top of the repository that are not among those in `kept`, which is uploaded."""
    api, weights = HfApi(token=token), re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
    found = {name for name in api.list_repo_files(repo, revision=revision) if weights.fullmatch(name)}
    if found - set(kept) and found & set(kept):
        names = sorted(found - set(kept))
        api.delete_files(repo, names, revision=revision, commit_message="Delete the dense weights")


def _of_rank_zero(compute: Callable[[], Any]) -> Any:
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
