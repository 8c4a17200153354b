"""Going on from a checkpoint: does its folder hold all that a run needs, and its weights, all of them or none.

`Resuming` is a part of `OTOMixin`, which asks before anything is trained. A checkpoint is complete if it has all that
the run which saved it would go on with. Its weights are read as `from_pretrained` reads them: in the files of some
models they have other names than in the modules.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerState
from transformers.modeling_utils import load_state_dict
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from .calls import raise_if_out_of_memory
from .dhspg import DHSPG
from .evaluating import random_states_kept
from .modeling_oto import OTOError

logger = logging.getLogger(__name__)

WHOLE_MODEL = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
STATES = (TRAINER_STATE_NAME, OPTIMIZER_NAME, SCHEDULER_NAME)  # what is removed before a checkpoint is written again
OTHERS = ("optimizer", "scheduler", "scaler", "rng_state", "training_args")  # beginnings of names: files of no weights


# folders -------------------------------------------------------------------------------------------


def newest_complete(output_dir: str, with_scaler: bool) -> tuple[str | None, dict[str, list[str]]]:
    """The checkpoint of the most steps that lacks nothing, or None, and what each of the later ones lacks.

    Args:
        output_dir: where a run saves its checkpoints.
        with_scaler: whether the run scales its gradients (fp16).
    """
    incomplete: dict[str, list[str]] = {}
    for folder in reversed(checkpoints(output_dir)):
        lacking = lacks(folder, with_scaler)
        if not lacking:
            return folder, incomplete
        incomplete[folder] = lacking
    return None, incomplete


def checkpoints(output_dir: str) -> list[str]:
    """The folders of checkpoints in an output folder, by their steps."""
    steps = {}
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name)
        if match is not None and folder.is_dir():
            steps[str(folder)] = int(match[1])
    return sorted(steps, key=lambda folder: steps[folder])


def lacks(folder: str, with_scaler: bool) -> list[str]:
    """What a folder lacks of all that a run goes on with: what was still to be written when its process was killed, or
    what `save_only_model=True` leaves out.

    The Trainer writes trainer_state.json last. Where files are deleted, their order is another: all are looked for.
    """
    names = os.listdir(folder)
    wanted = [SCHEDULER_NAME, *([SCALER_NAME] if with_scaler else [])]
    lacking = [name for name in wanted if name not in names]
    if not any(name.startswith("optimizer") for name in names):  # FSDP's is called otherwise, and may be a folder
        lacking.append(OPTIMIZER_NAME)
    if not any(name.startswith("rng_state") for name in names):
        lacking.append("rng_state.pth")
    if not has_weights(folder):
        lacking.append("its weights")
    try:
        TrainerState.load_from_json(os.path.join(folder, TRAINER_STATE_NAME))
    except (OSError, ValueError, TypeError):  # half of it may have been written
        lacking.append(TRAINER_STATE_NAME)
    return sorted(lacking)


def has_weights(folder: str) -> bool:
    """Whether there are files of weights, and all that an index names; trainers may save them in folders of theirs."""
    place = Path(folder)
    for index in place.glob("*.index.json"):
        try:
            shards = json.loads(index.read_text())["weight_map"].values()
        except ValueError:  # half of it may have been written
            return False
        if not all((place / shard).is_file() for shard in shards):
            return False
    files = [path for kind in ("safetensors", "bin", "distcp", "pt", "pth") for path in place.rglob(f"*.{kind}")]
    return any(not path.name.startswith(OTHERS) and not path.parent.name.startswith(OTHERS) for path in files)


# weights -------------------------------------------------------------------------------------------


def holds_whole_model(folder: str) -> bool:
    """Whether a folder holds a model's own weights, not those of adapters or of FSDP's shards alone."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in WHOLE_MODEL)


@torch.no_grad()
def load_weights_(model: nn.Module, folder: str) -> None:
    """Gives a model the weights of a checkpoint, in place: parameters stay the same objects, of the same dtype, on the
    same device.

    A Transformers model is loaded a second time, on the CPU, by its own `from_pretrained`: for a moment there is one
    model more. Of any other module the names in the file have to be its own.

    Raises:
        OTOError: a tensor of the model is not in the checkpoint, or the other way round, or has another shape. Nothing
            has been changed then. Tied weights, and keys that the model itself declares ignorable, may be missing.
    """
    try:
        with random_states_kept(model):  # what is built draws weights that nobody keeps
            found = _as_from_pretrained(model, folder) if isinstance(model, PreTrainedModel) else _as_saved(folder)
    except Exception as error:
        raise_if_out_of_memory(error)
        raise OTOError(f"the weights in {folder} can't be loaded: {type(error).__name__}: {error}") from error
    wanted, there = _shapes(model.state_dict()), _shapes(found.tensors)
    problems = {
        "it lacks": found.missing | (wanted.keys() - there.keys()),
        "the model has no": found.unexpected | (there.keys() - wanted.keys()),
        "of another shape there:": found.mismatched
        | {n for n in wanted.keys() & there.keys() if wanted[n] != there[n]},
    }
    facts = [f"{fact} {_first_of(names)}" for fact, names in problems.items() if names]
    if facts:
        raise OTOError(
            f"the checkpoint {folder} is not of this {type(model).__name__}, and nothing of it was loaded: "
            f"{'; '.join(facts)}. Go on with the model that was saved there, or begin a new run"
        )
    model.load_state_dict(found.tensors)


class Found(NamedTuple):
    """The tensors of a checkpoint, by the names that the modules have, and what did not fit."""

    tensors: dict[str, torch.Tensor]
    missing: frozenset[str] = frozenset()
    unexpected: frozenset[str] = frozenset()
    mismatched: frozenset[str] = frozenset()


def _as_from_pretrained(model: PreTrainedModel, folder: str) -> Found:
    floating = [t.dtype for t in model.state_dict().values() if isinstance(t, torch.Tensor) and t.is_floating_point()]
    # the one that holds all of them: in the config's own, parts of a wider one would lose bits
    dtype = functools.reduce(torch.promote_types, floating) if floating else "auto"
    loaded, info = type(model).from_pretrained(
        folder,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # its own error has no names
    )
    mismatched = frozenset(name for name, *_ in info["mismatched_keys"])
    return Found(loaded.state_dict(), frozenset(info["missing_keys"]), frozenset(info["unexpected_keys"]), mismatched)


def _as_saved(folder: str) -> Found:
    safe = os.path.join(folder, SAFE_WEIGHTS_NAME)
    if os.path.isfile(safe):
        return Found(load_file(safe))
    return Found(load_state_dict(os.path.join(folder, WEIGHTS_NAME)))


def _shapes(state: dict[str, Any]) -> dict[str, torch.Size]:
    """Of all but the extra states of modules, which are no tensors."""
    return {name: value.shape for name, value in state.items() if isinstance(value, torch.Tensor)}


def _first_of(names: Collection[str]) -> str:
    """A few names, and how many more there are."""
    few = ", ".join(sorted(names)[:3])
    return few if len(names) <= 3 else f"{few} and {len(names) - 3} more"


# the trainer ---------------------------------------------------------------------------------------


class Resuming:
    """The part of `OTOMixin` that goes on from a checkpoint, or begins anew."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._given_optimizer: Any = self.optimizer  # the user's own, which another training begins with again

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
