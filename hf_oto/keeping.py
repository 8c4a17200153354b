"""What was trained is never lost: it is on disk before anything that comes after the last step can fail.

`Keeping` is a part of `OTOMixin`. A divided model can be saved by all ranks together only: if one of them fails after
the last step, the others hear of it, and help.

Worked example: training has ended, and a callback of rank 1 raises. The ranks meet before the model is cut. Rank 0
learns there that rank 1 has failed, both gather the weights, and rank 0 writes `out/trained`. The errors of both name
the folder.
"""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from .modeling_oto import OTOError
from .ranks import of_rank_zero
from .sharded import BeforeSharding, ShardedWeights
from .undivided import Undivided
from .whole import WholeWeights

logger = logging.getLogger(__name__)


class Keeping:
    """The part of `OTOMixin` that saves what was trained."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._saved_in: str | None = None  # the trained model of this run, once it is on disk
        self._last_saved: tuple[int, str] = (0, "")  # by `save_model`: the step, and the folder
        self._before_sharding: BeforeSharding | None = None  # of a model in shards: what it was when it was plain
        self._undivided: Undivided | None = None  # the same under DeepSpeed, until its engine is gone
        self._runs_by_blocks = True  # under ZeRO-3: whether the model runs while only one block has its weights
        self._trained: WholeWeights | ShardedWeights | None = None  # once the optimizer's memory was given back
        self._others_failed = False  # another rank has failed after the last step, and this one helps to save
        super().__init__(*args, **kwargs)

    @property
    def _is_divided(self) -> bool:
        """Whether FSDP2 or DeepSpeed have divided the parameters: only all ranks together have all of a run."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled or self._is_of_shards

    @property
    def _is_of_shards(self) -> bool:
        """Whether the model is in shards, so that all ranks together save it."""
        return self._before_sharding is not None or isinstance(self._trained, ShardedWeights)

    def _is_trained(self) -> bool:
        """Whether the last step has been made: the optimizer's, of which the Trainer may not know yet."""
        made = max(self.state.global_step, self._steps_made)
        return made > 0 and (self.control.should_training_stop or made >= self.state.max_steps)

    def _where_trained_is_safe(self, error: BaseException) -> str | None:
        """Saves the trained model, if it isn't yet, and says where; None if that isn't for this process to do."""
        if self._saved_in is None:
            # one rank alone can't gather a model
            if self._is_divided and not self._others_failed and self._failures_of_ranks(error) is None:
                return None
            if self.state.is_hyper_param_search:  # it ends trials by errors of its own
                return None
            try:
                if self._is_divided and self._trained is None:
                    self._take_trained()
                if not self._is_of_shards and not self.is_world_process_zero():
                    return f"the trained model is saved by rank 0 in {self.args.output_dir}"
                self._saved_in = self._save_trained()
            except Exception as another:
                return f"saving the trained model failed too ({another}): it is in memory still, as trainer.model"
        return f"the trained model is saved in {self._saved_in}"

    def _meet_after_training(self) -> None:
        """Raises if another rank has failed after the last step: it can't save a divided model without this one."""
        if not self._is_divided:
            return
        failures = self._failures_of_ranks(None, timedelta(days=1))  # a callback of rank 0 may push for long
        for rank, failure in enumerate(failures or []):
            if failure is not None:
                self._others_failed = True
                raise OTOError(f"rank {rank} failed: {failure}")

    def _failures_of_ranks(
        self, error: BaseException | None, timeout: timedelta = timedelta(minutes=1)
    ) -> list[str | None] | None:
        """How every rank has failed, each None where it hasn't; None if not all of them have come here in time."""
        failures: list[str | None] = [None] * torch.distributed.get_world_size()
        failure = None if error is None else f"{type(error).__name__}: {error}"
        try:
            torch.distributed.monitored_barrier(self._meeting, timeout=timeout)
            torch.distributed.all_gather_object(failures, failure, group=self._meeting)
        except RuntimeError as not_here:
            logger.error("other ranks are not here, and without them the model can't be gathered: %s", not_here)
            return None
        return failures

    def _save_trained(self) -> str:
        """Saves the model as it is now, before its last cut, and returns the folder.

        Of a sharded model all ranks come here, of another one rank 0 alone. The folder is `trained` in the output
        folder, with a number if another run has left one there; where it can't be written the checkpoint of the last
        step, if there is one, or a folder in the system's temporary one.
        """
        wanted = Path(self.args.output_dir, "trained")
        try:
            return self._save_whole(self._by_writer(lambda: _free(wanted)))
        except Exception as error:
            step, folder = self._last_saved
            if step == max(self.state.global_step, self._steps_made) and os.path.isdir(folder):
                logger.warning("the trained model is saved in %s only, not in %s: %s", folder, wanted, error)
                return folder
            elsewhere = self._by_writer(_free_elsewhere)
            try:
                self._save_whole(elsewhere)
            except Exception:
                raise error from None
            logger.warning("the trained model is saved in %s, not in %s: %s", elsewhere, wanted, error)
            return str(elsewhere)

    def _by_writer(self, compute: Callable[[], Any]) -> Any:
        """What the rank that saves the model computes."""
        return of_rank_zero(compute) if self._is_of_shards else compute()

    def _save_whole(self, folder: Path) -> str:
        """Saves the model under another name first: a folder of this name is whole."""
        partial = folder.with_name(f"{folder.name}.partial")

        def save() -> None:
            try:
                self._save(str(partial))
                self._save_cuts(str(partial))  # without it nobody knows the shapes of a plain module's weights
                os.rename(partial, folder)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise

        self._by_writer(lambda: _made_anew(partial))
        if self._trained is None:
            save()
        else:
            with self._trained.whole_on_disk(folder.parent, writes=self.is_world_process_zero()):
                self._by_writer(save)
        return str(folder)


def _free(wanted: Path) -> Path:
    """A folder that doesn't exist: the wanted one, or one with a number."""
    numbered = (wanted.with_name(f"{wanted.name}-{n}") for n in itertools.count(2))
    return next(folder for folder in itertools.chain([wanted], numbered) if not folder.exists())


def _free_elsewhere() -> Path:
    """A folder that doesn't exist, in the system's temporary one."""
    folder = Path(tempfile.mkdtemp(prefix="trained-"))
    folder.rmdir()
    return folder


def _made_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    folder.parent.mkdir(parents=True, exist_ok=True)
