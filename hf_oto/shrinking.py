"""Shrinking: ZIGs that have become zero for good are cut out during training, and the run goes on with the others.

`Shrinking` is a part of `OTOMixin`. After each event of the pruning window the zero ZIGs are cut out of the model and
of the optimizer, in place: the objects that the training loop holds stay the same. The trained model is the same, up
to rounding, as after a single cut at the end. With dropout it differs, because smaller masks are drawn, but it is a
sample of the same distribution.

Worked example: a run of 100 steps with events after steps 10, 16, ... 60. After step 16 the first ZIGs are zero and
are cut out; step 17 is computed with smaller matrices. From step 61 on, the model that trains is as small as the one
that is saved in the end, except along axes whose cut scales weights: those are cut at the end.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DynamoBackend
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import TrainerCallback

from .arguments import setting
from .calls import tensors_of
from .certificate import Certificate, certify
from .compaction import Compaction
from .cut import Cut
from .cut_state import replace_parameters_, why_uncuttable
from .dhspg import DHSPG
from .evaluating import random_states_kept, take_off_autocast_
from .modeling_oto import OTOError
from .ranks import of_rank_zero
from .restore import restored
from .zero import ZeroDHSPG
from .zigs import PruningPlan

logger = logging.getLogger(__name__)

CUTS_NAME = "oto_cuts.json"  # a file beside the weights of a checkpoint: what had been cut out of its model
WORTH_IT = 0.05  # the fraction of the dense model's work that a cut inside the window must save


class _CutAfterStep(TrainerCallback):
    """The first of all callbacks: it cuts, and the others see the smaller model."""

    def __init__(self, trainer: Shrinking) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._look_for_zeros()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # only now DeepSpeed has divided the parameters, and has loaded a checkpoint
        optimizer = self._trainer._dhspg()
        if isinstance(optimizer, ZeroDHSPG):
            optimizer.attach(self._trainer.model_wrapped)


class Shrinking:
    """The part of `OTOMixin` that cuts while training."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._compaction: Compaction | None = None  # what has been cut out of the model
        self._certificates: list[Certificate] = []  # of the cuts so far
        # (step, fraction of the dense model's MACs that every later step takes), for each cut during training
        self._macs_since: list[tuple[int, float]] = []
        self._fingerprint = ""  # of the axes that the optimizer prunes
        self._mask_seen: torch.Tensor | None = None  # the optimizer's mask of zeros when it was last looked at
        self._stays_whole_because: str | None = None  # why nothing more is cut before the end; None: cuts go on
        super().__init__(*args, **kwargs)
        self.callback_handler.callbacks.insert(0, _CutAfterStep(self))

    def _begin_whole(self, model: nn.Module) -> None:
        """Takes a model of which nothing has been cut out."""
        self._compaction = Compaction(model, self.partition)
        self._fingerprint = self._dhspg().fingerprint
        self._certificates = []
        self._macs_since = []
        self._mask_seen = None
        self._stays_whole_because = None

    @property
    def _has_shrunk(self) -> bool:
        """Whether something has been cut out of the model already."""
        return self._compaction is not None and bool(self._compaction.gone.any())

    # the cut ---------------------------------------------------------------------------------------

    def _look_for_zeros(self) -> None:
        """Cuts out the ZIGs that have become zero in the last step."""
        optimizer = self._dhspg()
        if optimizer is None or self._stays_whole_because is not None:
            return
        # this runs after every step: comparing objects costs nothing, and the mask is another one after every event
        if optimizer.mask is self._mask_seen:
            return
        self._mask_seen = optimizer.mask
        with random_states_kept(self.model):  # training goes on with the numbers it would have drawn
            self._cut_zeros_out(optimizer)

    def _cut_zeros_out(self, optimizer: DHSPG) -> None:
        """Cuts out the zero ZIGs, if the cut is worth it and nothing speaks against it."""
        plan = self._plan_for_now(optimizer)
        cut = self._compaction.resolve(plan, warn=False)
        if not cut.removed.any() or not self._is_worth_it(cut, optimizer):
            return
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        self._stays_whole_because = self._why_whole(model, optimizer)
        if self._stays_whole_because is not None:
            logger.info("the model is cut at the end of training only: %s", self._stays_whole_because)
            return
        certificate = of_rank_zero(lambda: self._certified(model, cut))
        if not certificate.holds:
            self._stays_whole_because = str(certificate)
            logger.warning("the model is not cut before the end of training: %s", certificate)
            return
        self._certificates.append(certificate)
        self._cut_(model, cut)
        self._macs_since.append((self.state.global_step, self._macs_left()))
        self._tell_callbacks(model, cut)

    def _plan_for_now(self, optimizer: DHSPG) -> PruningPlan:
        """The plan that removes the zero ZIGs, except on axes whose cut scales weights.

        Those wait for the end, because Adam's steps have a size of their own and don't scale with the weights.
        """
        plan = optimizer.zeros(self.partition)
        scaled = {axis.name for axis in self.partition.axes if axis.scales}
        kept_of_others = {name: kept for name, kept in plan.kept.items() if name not in scaled}
        return PruningPlan(kept_of_others)

    def _is_worth_it(self, cut: Cut, optimizer: DHSPG) -> bool:
        """Whether a cut saves enough work, or is the last one before the end."""
        if optimizer.phase == "training the rest" or optimizer.target_reached:
            return True
        if self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
            return False  # every cut compiles the model anew
        work = self._works.get("macs", self._works["params"])
        gone = self._compaction.gone_after(cut.removed)
        num_gone_before = self._num_gone(self._compaction.gone)  # (axes,)
        num_gone_after = self._num_gone(gone)
        saved = work.left(num_gone_before) - work.left(num_gone_after)
        dense = work.left(np.zeros_like(num_gone_before))
        return saved >= WORTH_IT * dense

    def _macs_left(self) -> float:
        """The fraction of the dense model's MACs that a forward takes now; 1 where they are not known."""
        work = self._works.get("macs")
        if work is None:
            return 1.0
        num_gone = self._num_gone(self._compaction.gone)  # (axes,)
        dense = work.left(np.zeros_like(num_gone))
        return work.left(num_gone) / (dense or 1)

    def _training_macs(self) -> float | None:
        """The MACs of the run, as a fraction of those of the dense model; None where MACs are not known."""
        if "macs" not in self._works:
            return None
        last = self.state.global_step
        steps = [step for step, _ in self._macs_since] + [last]
        total = float(steps[0])  # until the first cut every step takes all
        for (_, left), begin, end in zip(self._macs_since, steps, steps[1:], strict=False):
            total += (end - begin) * left
        return total / max(1, last)

    def _num_gone(self, gone: np.ndarray) -> np.ndarray:
        """The number of ZIGs of every axis that are gone, (axes,).

        Args:
            gone: bool (num_zigs,).
        """
        num_gone = [int(gone_of_axis.sum()) for _, gone_of_axis in self.partition.split(gone)]
        return np.array(num_gone)

    def _certified(self, model: nn.Module, cut: Cut) -> Certificate:
        """The certificate of a cut in the middle of training, all of whose state stays as it is."""
        with restored(model):
            take_off_autocast_(model)
            return certify(model, cut, self._forwards)

    def _cut_(self, model: nn.Module, cut: Cut) -> None:
        """Cuts the model, the optimizer, and what DDP keeps of both."""
        positions = cut.positions
        self._compaction.keep_(model, cut)
        self._dhspg().cut_(dict(model.named_parameters()), positions)
        self._renew_ddp(model)

    def _renew_ddp(self, model: nn.Module) -> None:
        """Initialises DDP's wrapper again, so that it reduces the gradients of the new parameters.

        The wrapper stays the same object, because the training loop holds it.
        """
        wrapped = self.model_wrapped
        wrapped = getattr(wrapped, "_orig_mod", wrapped)  # torch.compile's wrapper
        if not isinstance(wrapped, DistributedDataParallel):
            return
        handler = self.accelerator.ddp_handler
        settings = {} if handler is None else handler.to_kwargs()
        if wrapped.device_ids is not None:
            settings |= {"device_ids": wrapped.device_ids, "output_device": wrapped.output_device}
        training = wrapped.training
        del wrapped.reducer, wrapped.logger  # with the reducer go its hooks on the old parameters
        wrapped.__init__(model, **settings)
        wrapped.train(training)
        if handler is not None:
            handler.register_comm_hook(wrapped)

    def _tell_callbacks(self, model: nn.Module, cut: Cut) -> None:
        """Calls `on_compact` of the callbacks that have it."""
        for callback in self.callback_handler.callbacks:
            on_compact = getattr(callback, "on_compact", None)
            if on_compact is not None:
                on_compact(self.args, self.state, self.control, model=model, optimizer=self.optimizer, cut=cut)

    def _undo_cuts(self) -> None:
        """Makes the model dense again, with zeros in the place of what was cut, because another training begins."""
        if not self._has_shrunk:
            return
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        self._compaction.undo_(model)
        replace_parameters_(self._dhspg().base, dict(model.named_parameters()))
        self._renew_ddp(model)

    # what makes it wait for the end ----------------------------------------------------------------

    def _why_whole(self, model: nn.Module, optimizer: DHSPG) -> str | None:
        """Why nothing can be cut before the end, in words; None: nothing speaks against it."""
        if not setting(self.args, "shrink"):
            return "shrink=False"
        if self.is_fsdp_enabled:
            return "FSDP2 shards its parameters"
        if self.is_deepspeed_enabled:
            return "DeepSpeed has its parameters in flat tensors, whose sizes it has written down"
        if isinstance(self.model_wrapped, DataParallel):
            return "DataParallel copies it in every step"
        if self.accelerator.state.dynamo_plugin.use_regional_compilation:
            return "its layers are compiled one by one, and each would be compiled anew"
        best = self.state.best_model_checkpoint
        if self.args.load_best_model_at_end and best:
            return f"the best checkpoint so far, {best}, is of the larger model, and may be loaded at the end"
        for name, p in model.named_parameters():
            if p._backward_hooks or p._post_accumulate_grad_hooks:
                return f"{name} has a hook, which may know its shape"
        whose = [model] if self._teacher is None else [model, self._teacher.module]
        for callback in self.callback_handler.callbacks:
            if not hasattr(callback, "on_compact") and _keeps_tensors(callback, whose):
                return f"{type(callback).__name__} keeps tensors and has no on_compact to cut them"
        return why_uncuttable(optimizer.base)

    # checkpoints -----------------------------------------------------------------------------------

    def _save_cuts(self, folder: str) -> None:
        """Writes a file beside the weights of a checkpoint that says what has been cut out so far."""
        if not self.args.should_save:
            return
        file = Path(folder, CUTS_NAME)
        if not self._has_shrunk:
            file.unlink(missing_ok=True)  # another run may have left such a file in a folder of that name
            return
        plan = PruningPlan.removing(self._compaction.gone, self.partition)
        saved = {
            "partition": self._fingerprint,
            "plan": dict(plan.kept),
            "macs_since": self._macs_since,
            "certificates": [list(certificate) for certificate in self._certificates],
        }
        file.write_text(json.dumps(saved))

    def _repeat_cuts_of(self, checkpoint: str) -> None:
        """Makes the cuts of a checkpoint's model, before the weights of the checkpoint are loaded.

        Raises:
            OTOError: the checkpoint is of a run with another partition.
        """
        file = Path(checkpoint, CUTS_NAME)
        if not file.exists():
            return
        if self.is_fsdp_enabled:
            raise OTOError(f"{checkpoint} is of a model that shrinks while it trains, which FSDP2 can't: use DDP")
        saved = json.loads(file.read_text())
        if self._dhspg() is None:
            self.create_optimizer()  # while the model is dense; `Trainer` makes no second one
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if saved["partition"] != self._fingerprint:
            raise OTOError(
                f"{checkpoint} was saved with another partition, of other ZIGs: resume with the dense model that the "
                "run began with, not with the one in the checkpoint, and with the same `protect`"
            )
        plan = PruningPlan(saved["plan"])
        cut = self._compaction.resolve(plan, warn=False)
        self._cut_(model, cut)
        self._tell_callbacks(model, cut)
        self._certificates = [Certificate(*values) for values in saved["certificates"]]
        self._macs_since = [(step, left) for step, left in saved["macs_since"]]


def _keeps_tensors(callback: Any, models: Sequence[nn.Module]) -> bool:
    """Whether a callback keeps tensors, or a module that isn't part of the model or its teacher.

    Args:
        models: these two. The teacher is never cut, so that whoever keeps it has nothing to cut.
    """
    own = {id(module) for model in models for module in model.modules()}
    for value in vars(callback).values():
        if isinstance(value, nn.Module):
            has_parameters = any(True for _ in value.parameters())
            if id(value) not in own and has_parameters:
                return True
        elif isinstance(value, (torch.Tensor, Mapping, list, tuple)) and tensors_of(value):
            return True
    return False
