"""Going on from a checkpoint: whether its folder holds all that a run needs, and how its weights are loaded.

`Resuming` is a part of `OTOMixin`. It checks a checkpoint before anything is trained, and loads either all its weights
or none. Weights are read as `from_pretrained` reads them, because the files of some models have other names for them
than the modules.

Worked example: of checkpoint-100 and checkpoint-150, the second was being written when the process was killed, and has
weights but no trainer_state.json. `resume_from_checkpoint=True` goes on from checkpoint-100, with a warning.
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
from .restore import contents, put_back

logger = logging.getLogger(__name__)

WHOLE_MODEL = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
STATES = (TRAINER_STATE_NAME, OPTIMIZER_NAME, SCHEDULER_NAME)  # removed before a checkpoint is written again
DEEPSPEED_LATEST = "latest"  # a file with the name of the folder that DeepSpeed wrote last
DEEPSPEED_STATES = "_optim_states.pt"
NO_WEIGHTS = ("optimizer", "scheduler", "scaler", "rng_state", "training_args")  # files that hold something else


# folders -------------------------------------------------------------------------------------------


def newest_complete(output_dir: str, with_scaler: bool) -> tuple[str | None, dict[str, list[str]]]:
    """The latest checkpoint that lacks nothing, or None, and for every later checkpoint what it lacks.

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
    steps: dict[str, int] = {}
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name)
        if match is not None and folder.is_dir():
            steps[str(folder)] = int(match[1])
    return sorted(steps, key=lambda folder: steps[folder])


def lacks(folder: str, with_scaler: bool) -> list[str]:
    """The files that a run needs to go on, and that a folder lacks.

    A process that was killed had not written them yet, or `save_only_model=True` leaves them out. The Trainer writes
    trainer_state.json last; but files may be deleted in any order, so all are looked for.
    """
    names = os.listdir(folder)
    wanted = [SCHEDULER_NAME]
    if with_scaler:
        wanted.append(SCALER_NAME)
    lacking = [name for name in wanted if name not in names]
    # FSDP's optimizer has another name, and may be a folder; DeepSpeed's is in a folder that the file `latest` names
    if DEEPSPEED_LATEST in names:
        lacking += _lacks_of_deepspeed(Path(folder))
    elif not any(name.startswith("optimizer") for name in names):
        lacking.append(OPTIMIZER_NAME)
    # with several ranks every rank has a file of its own
    if not any(name.startswith("rng_state") for name in names):
        lacking.append("rng_state.pth")
    if not has_weights(folder):
        lacking.append("its weights")
    try:
        TrainerState.load_from_json(os.path.join(folder, TRAINER_STATE_NAME))
    except (OSError, ValueError, TypeError):  # only half of the file may have been written
        lacking.append(TRAINER_STATE_NAME)
    return sorted(lacking)


def _lacks_of_deepspeed(folder: Path) -> list[str]:
    """What the folder of DeepSpeed lacks in a checkpoint: every rank has its part of the optimizer in a file there."""
    name = (folder / DEEPSPEED_LATEST).read_text().strip()
    files = [file.name for file in (folder / name).glob(f"*{DEEPSPEED_STATES}")]
    return [] if files else [f"{name}/*{DEEPSPEED_STATES}"]


def has_weights(folder: str) -> bool:
    """Whether there are files of weights, and all files that an index names.

    Files in inner folders count, too: trainers may save weights in folders of their own.
    """
    place = Path(folder)
    for index in place.glob("*.index.json"):
        try:
            shards = json.loads(index.read_text())["weight_map"].values()
        except ValueError:  # only half of the file may have been written
            return False
        if not all((place / shard).is_file() for shard in shards):
            return False
    for suffix in ("safetensors", "bin", "distcp", "pt", "pth"):
        for file in place.rglob(f"*.{suffix}"):
            if not file.name.startswith(NO_WEIGHTS) and not file.parent.name.startswith(NO_WEIGHTS):
                return True
    return False


# weights -------------------------------------------------------------------------------------------


def holds_whole_model(folder: str) -> bool:
    """Whether a folder holds the weights of a whole model, rather than those of adapters alone or shards of FSDP."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in WHOLE_MODEL)


@torch.no_grad()
def load_weights_(model: nn.Module, folder: str) -> None:
    """Gives a model the weights of a checkpoint, in place; its parameters stay the same objects.

    They also keep their dtypes and devices.

    A Transformers model is loaded a second time, on the CPU, by its own `from_pretrained`, so that memory holds two
    models for a moment. For any other module the names in the file have to be those in the module.

    Raises:
        OTOError: a tensor of the model is not in the checkpoint, or the other way round, or has another shape. The
            model is then unchanged. Tied weights, and keys that the model itself declares ignorable, may be missing.
    """
    try:
        with random_states_kept(model):  # a second model draws weights that nobody keeps
            if isinstance(model, PreTrainedModel):
                loaded = _as_from_pretrained(model, folder)
            else:
                loaded = _as_saved(folder)
    except Exception as error:
        raise_if_out_of_memory(error)
        raise OTOError(f"the weights in {folder} can't be loaded: {type(error).__name__}: {error}") from error
    shapes = _shapes(model.state_dict())
    loaded_shapes = _shapes(loaded.tensors)
    common = shapes.keys() & loaded_shapes.keys()
    # `from_pretrained` reports what it skipped; of a file that was read directly only the comparison tells
    problems = {
        "it lacks": loaded.missing | (shapes.keys() - loaded_shapes.keys()),
        "the model has no": loaded.unexpected | (loaded_shapes.keys() - shapes.keys()),
        "of another shape there:": loaded.mismatched | {n for n in common if shapes[n] != loaded_shapes[n]},
    }
    facts = [f"{fact} {_first_of(names)}" for fact, names in problems.items() if names]
    if facts:
        raise OTOError(
            f"the checkpoint {folder} is not of this {type(model).__name__}, and nothing of it was loaded: "
            f"{'; '.join(facts)}. Go on with the model that was saved there, or begin a new run"
        )
    model.load_state_dict(loaded.tensors)


class Loaded(NamedTuple):
    """The tensors of a checkpoint, by the names that the modules have, and the names of those that did not fit."""

    tensors: dict[str, torch.Tensor]
    missing: frozenset[str] = frozenset()
    unexpected: frozenset[str] = frozenset()
    mismatched: frozenset[str] = frozenset()


def _as_from_pretrained(model: PreTrainedModel, folder: str) -> Loaded:
    tensors = [t for t in model.state_dict().values() if isinstance(t, torch.Tensor)]
    dtypes = [t.dtype for t in tensors if t.is_floating_point()]
    # The dtype that holds all of them: in the config's own dtype, parts of a wider one would lose bits.
    dtype = functools.reduce(torch.promote_types, dtypes) if dtypes else "auto"
    twin, info = type(model).from_pretrained(
        folder,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # the error that it would raise names no weights
    )
    return Loaded(
        tensors=twin.state_dict(),
        missing=frozenset(info["missing_keys"]),
        unexpected=frozenset(info["unexpected_keys"]),
        mismatched=frozenset(name for name, *_ in info["mismatched_keys"]),
    )


def _as_saved(folder: str) -> Loaded:
    safe = os.path.join(folder, SAFE_WEIGHTS_NAME)
    if os.path.isfile(safe):
        return Loaded(load_file(safe))
    return Loaded(load_state_dict(os.path.join(folder, WEIGHTS_NAME)))


def _shapes(state: dict[str, Any]) -> dict[str, torch.Size]:
    """The shapes of a state. The extra states of modules are left out, because they are no tensors."""
    return {name: value.shape for name, value in state.items() if isinstance(value, torch.Tensor)}


def _first_of(names: Collection[str]) -> str:
    """The first three names, and how many more there are."""
    first_three = ", ".join(sorted(names)[:3])
    if len(names) <= 3:
        return first_three
    return f"{first_three} and {len(names) - 3} more"


# the trainer ---------------------------------------------------------------------------------------


class Resuming:
    """The part of `OTOMixin` that goes on from a checkpoint, or begins anew."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._given_optimizer: Any = self.optimizer  # the user's own: another training begins with it again

    def _inner_training_loop(
        self, batch_size: int | None = None, args: Any = None, resume_from_checkpoint: str | None = None, **kwargs: Any
    ) -> Any:
        """`Trainer`'s; after a training that was interrupted, or ran out of memory, this one begins anew."""
        if isinstance(self.optimizer, AcceleratedOptimizer):  # it is left from a try with a larger batch
            self._forget_earlier_training()
            # under FSDP and DeepSpeed `Trainer` itself loads the weights, later
            if resume_from_checkpoint is not None and not self._is_divided:
                self._load_from_checkpoint(resume_from_checkpoint)
        elif self.optimizer is not None and not isinstance(self.optimizer, DHSPG):
            self._given_optimizer = self.optimizer
        if self.optimizer is None:
            self.optimizer = self._given_optimizer
        self._steps_made = 0
        return super()._inner_training_loop(batch_size, args, resume_from_checkpoint, **kwargs)

    def _forget_earlier_training(self) -> None:
        """Drops an optimizer that would go on with its schedule, and undoes the cuts that it has led to."""
        self._undo_cuts()
        self.optimizer = self._given_optimizer
        self.callback_handler.optimizer = None
        self.callback_handler.lr_scheduler = None

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """`Trainer`'s, but it makes no step after the last one.

        `Trainer` makes one too many when it resumes at the last step, in the middle of an epoch.
        """
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _complete_checkpoint(self, asked: str | bool) -> str | bool:
        """A folder to resume from that lacks nothing. `Trainer` itself refuses a folder that does not exist.

        Args:
            asked: a folder. True: the latest checkpoint of the output folder.
        """
        with_scaler = self.accelerator.scaler is not None
        newest, incomplete = newest_complete(self.args.output_dir, with_scaler)
        wants_newest = asked is True
        if not wants_newest:
            incomplete = {str(asked): lacks(asked, with_scaler)} if os.path.isdir(asked) else {}
        facts = "; ".join(f"{folder} lacks {', '.join(lacking)}" for folder, lacking in incomplete.items() if lacking)
        if not facts:
            return (newest or True) if wants_newest else asked
        if wants_newest and newest is not None:
            if self.is_world_process_zero():
                logger.warning("%s: resuming from %s", facts, newest)
            return newest
        instead = f"resume from {newest}, or " if newest is not None else ""
        first = next(iter(incomplete))
        raise OTOError(
            f"can't resume: {facts} (a run that is killed leaves such a folder, and so does save_only_model=True): "
            f"{instead}begin a new run from its weights, with a model from from_pretrained({first!r})"
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """`Trainer`'s, but it loads all the weights or raises. After an error the model is as it was before."""
        if model is not None:
            self._load_weights_of(resume_from_checkpoint, model)
            return
        before = contents(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))
        try:
            self._repeat_cuts_of(str(resume_from_checkpoint))
            self._load_weights_of(resume_from_checkpoint, None)
        except BaseException:
            if self._has_shrunk:
                self._forget_earlier_training()
                put_back(before)
            raise

    def _load_weights_of(self, resume_from_checkpoint: str, model: Any) -> None:
        inherited = super()._load_from_checkpoint
        if self._loads_otherwise(inherited, Trainer._load_from_checkpoint, resume_from_checkpoint):
            if model is None:
                inherited(resume_from_checkpoint)
            else:
                inherited(resume_from_checkpoint, model)
            return
        wrapped = self.model if model is None else model
        unwrapped = self.accelerator.unwrap_model(wrapped, keep_torch_compile=False)
        load_weights_(unwrapped, str(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        """`Trainer`'s, but it loads all the weights or raises."""
        best = self.state.best_model_checkpoint
        if not has_weights(best):
            raise OTOError(
                f"the best checkpoint, {best}, is not there or has no weights, so they can't be loaded (machines that "
                "share no disk need save_on_each_node=True)"
            )
        inherited = super()._load_best_model
        if self._loads_otherwise(inherited, Trainer._load_best_model, best):
            inherited()
            return
        logger.info("Loading best model from %s (score: %s).", best, self.state.best_metric)
        unwrapped = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        load_weights_(unwrapped, best)

    def _loads_otherwise(self, inherited: Any, stock: Any, folder: str) -> bool:
        """Whether another trainer, accelerate (for FSDP), DeepSpeed or PEFT loads what is in a folder in its own way.

        Args:
            inherited: the method that would run without ours.
            stock: the method of `Trainer`.
        """
        is_of_other_trainer = inherited.__func__ is not stock
        return self._is_divided or is_of_other_trainer or not holds_whole_model(folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """`Trainer`'s; if a state doesn't fit this run, the error names the folder."""
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except Exception as error:
            raise_if_out_of_memory(error)
            raise OTOError(
                f"can't resume from {checkpoint}: {error} (for a new run from its weights, take a model from "
                f"from_pretrained({str(checkpoint)!r}))"
            ) from error

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """`Trainer`'s, into a folder that is incomplete until the last file is written."""
        folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        # an older run may have left a complete folder of that name
        if self.args.should_save:
            for name in STATES:
                (folder / name).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        """`Trainer`'s. Every rank waits for the others here."""
        super()._save_rng_state(output_dir)
        # the state of the run is written next, and says that the checkpoint is complete
        self.accelerator.wait_for_everyone()
