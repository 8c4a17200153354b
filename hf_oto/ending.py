"""The end of a run: what was trained is saved, and those zeros that are still in it are certified and cut out.

`Ending` is a part of `OTOMixin`. Whatever fails after the last step leaves the trained model on disk, and the error
says where. What can't be done at the end is found out before the first step, by rehearsal.py.
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
from accelerate.utils import broadcast, fsdp2_prepare_model
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers.integrations import unset_hf_deepspeed_config
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .cut import Cut
from .evaluating import take_off_autocast_
from .figures import save_figures
from .flat import master_weights
from .modeling_oto import OTOError
from .ranks import of_rank_zero
from .report import Report, scores
from .sharded import BeforeSharding, ShardedWeights
from .shrinking import CUTS_NAME
from .undivided import Undivided
from .whole import WholeWeights
from .zigs import PruningPlan

logger = logging.getLogger(__name__)


class Ending:
    """The part of `OTOMixin` that makes the end."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.plan: PruningPlan | None = None
        self.report: Report | None = None
        self._cut: Cut | None = None  # what was cut
        self._saved_in: str | None = None  # the trained model of this run, once it is on disk
        self._last_saved: tuple[int, str] = (0, "")  # by `save_model`: the step, and the folder
        self._before_sharding: BeforeSharding | None = None  # under FSDP2: the model when it was plain
        self._others_failed = False  # another rank has failed after the last step, and this one helps to save
        self._trained: WholeWeights | ShardedWeights | None = None  # once the optimizer's memory was given back
        self._undivided: Undivided | None = None  # under DeepSpeed: the same
        super().__init__(*args, **kwargs)

    @property
    def _is_divided(self) -> bool:
        """Whether FSDP2 or DeepSpeed have divided the parameters: only all ranks together have all of a run."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    # what was trained is never lost ---------------------------------------------------------------

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

    @property
    def _is_of_shards(self) -> bool:
        """Whether FSDP2 has sharded the model, so that all ranks together save it."""
        return self._before_sharding is not None

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

    # the cut ---------------------------------------------------------------------------------------

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
        was_divided = self._is_divided
        del optimizer  # its state is twice the model
        trained = self._take_trained()
        state = self.state
        last = (self.args.load_best_model_at_end and state.best_global_step) or state.global_step  # of these weights
        training_macs = self._training_macs()
        metrics = {k: v for logs in state.log_history if logs["step"] == last for k, v in scores(logs).items()}
        # before rank 0 waits for any other
        self._saved_in = self._save_trained() if self._is_of_shards else of_rank_zero(self._save_trained)
        if self.accelerator.num_processes > 1:
            for buffer in trained.model.buffers():  # batch norm statistics differ between ranks
                buffer.copy_(broadcast(buffer))
        if self._zero_again(trained, made_zero) or self._has_shrunk:
            metrics = {}  # other weights were evaluated, or those of a model that was cut already
        self.plan = self._compaction.plan(trained.zeros(self._compaction.left))
        rest = self._compaction.resolve(self.plan)
        self._certify_rest(trained, rest)
        before, after = trained.measured(self._compaction, rest, self._forwards)
        self._trained = None  # from here on it is the compact model
        trained.keep_(self._compaction, rest)
        if rest.removed.any() and not was_divided:  # a callback's copies of shards have no shapes to cut
            self._tell_callbacks(trained.model, rest)
        self._cut = self._compaction.whole_cut()
        if self._ties is not None and not trained.stock(self.partition, self.plan, self._ties, self._forwards):
            logger.warning("no stock config says these widths: the compact model is saved with a record of them")
        self._take_compact(trained)
        self.report = Report(
            before=before,
            after=after,
            group_sparsity=float(self._cut.removed.sum() / max(1, self.partition.num_zigs)),
            max_output_difference=max(certificate.cut for certificate in self._certificates),
            max_output_difference_in_own_dtype=max(certificate.rounding for certificate in self._certificates),
            training_macs=training_macs,
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

    def _certify_rest(self, trained: WholeWeights | ShardedWeights, rest: Cut) -> None:
        """Adds the certificate of what is still to be cut, and raises where it fails."""
        if rest.removed.any() or not self._certificates:
            certificate = trained.certify(rest, self._forwards)
            if not certificate.holds:
                raise OTOError(f"the certificate failed: {certificate}, so the model was not cut")
            self._certificates.append(certificate)
        else:  # every cut has its certificate: what is left to see is that the model still runs
            trained.run(self._forwards)

    def _outcome(self) -> str:
        """One line for whoever looks at the output of a run: what was cut, and where which model is now."""
        cut = [f"{self._cut.removed.sum():,} of {self.partition.num_zigs:,} ZIGs"]
        before, after = self.report["before"], self.report["after"]
        for name, text in (("params", "parameters"), ("macs", "MACs")):
            if name in before:
                cut.append(f"{text} {before[name]:,} -> {after[name]:,}")
        where = "the compact model is in memory, as trainer.model: trainer.save_model() saves it"
        checkpoints = [self._last_saved[1], self.state.best_model_checkpoint or ""]
        if self.args.load_best_model_at_end:
            checkpoints.reverse()
        for folder in checkpoints:  # the last one may have been deleted for the best one
            if Path(folder).name.startswith(PREFIX_CHECKPOINT_DIR) and os.path.isdir(folder):
                was_cut = Path(folder, CUTS_NAME).exists()
                where += f" ({folder} holds {'it as training left it' if was_cut else 'the full one'})"
                break
        return f"hf_oto cut {', '.join(cut)}; {where}"

    def _zero_again(self, trained: WholeWeights | ShardedWeights, made_zero: PruningPlan) -> bool:
        """Zeroes ZIGs that the optimizer made zero and that aren't in the weights: whether there were any."""
        left, gone = self._compaction.left, self._compaction.gone
        removed = made_zero.removed(self.partition)[~gone]
        moved = removed & ~trained.zeros(left).removed(left)
        if not moved.any():
            return False
        difference = trained.moved_by_zeroing(Cut(left, removed, {}, {}), self._forwards)
        trained.zero_(left, PruningPlan.removing(removed, left))
        logger.warning(
            "of the %d ZIGs that training had made zero and that were not cut yet, %d were not zero in the end: "
            "weights were put into the model from outside (an average, a checkpoint, a callback of yours). They are "
            "zeroed again, by which the outputs on a real batch move by %.1e, relative to their size",
            removed.sum(), moved.sum(), difference,
        )  # fmt: skip
        return True

    def _take_trained(self) -> WholeWeights | ShardedWeights:
        """The trained model, plain; gradients and optimizer state are gone, whoever held them."""
        if self._before_sharding is not None:
            # from here on the shards are nowhere else, whatever is raised
            trained = self._trained = self._before_sharding.taken_off(self.model, self.accelerator.device)
        elif self._undivided is not None:
            weights = master_weights(self.model)
            self.accelerator.free_memory()  # DeepSpeed's engine goes, and takes its hooks off the model
            unset_hf_deepspeed_config()  # ZeRO-3 would divide every model that is made from here on
            trained = WholeWeights(self._undivided.filled(weights))
            self.is_deepspeed_enabled = False
            self._undivided = self.deepspeed = None
        else:
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            take_off_autocast_(model)
            trained = WholeWeights(self.accelerator.unwrap_model(model, keep_fp32_wrapper=False))
        model = trained.model
        for holder in (self, self.callback_handler):
            holder.model, holder.optimizer, holder.lr_scheduler = model, None, None
        self.model_wrapped = model
        model.zero_grad(set_to_none=True)
        self.accelerator.free_memory()
        if self._before_sharding is None:
            self.model = self.model_wrapped = trained.model = model.to(self.accelerator.device)
        self._trained = trained
        return trained

    def _take_compact(self, trained: WholeWeights | ShardedWeights) -> None:
        """Makes the compact model the trainer's, ready to be evaluated; what was sharded is sharded again."""
        model = trained.model
        if isinstance(trained, ShardedWeights):
            self._before_sharding = trained.put_on_(self._sharded_as_in_training)
        for holder in (self, self.callback_handler):
            holder.model = model
        self.model_wrapped = model
        self._trained = None
        self.accelerator.free_memory()
        self.model_wrapped = self.accelerator.prepare_model(model, evaluation_mode=True)

    def _shard_again(self) -> None:
        """Shards a model again that was made plain to be cut, after which something has failed."""
        if isinstance(self._trained, ShardedWeights) and self._failures_of_ranks(None) is not None:
            self._take_compact(self._trained)

    def _sharded_as_in_training(self, model: torch.nn.Module) -> None:
        """Shards a model without weights, in place, as accelerate sharded the dense one."""
        plugin = self.accelerator.state.fsdp_plugin
        loads_on_rank_0 = plugin.cpu_ram_efficient_loading
        plugin.cpu_ram_efficient_loading = False  # there is nothing to be loaded
        try:
            fsdp2_prepare_model(self.accelerator, model)
        finally:
            plugin.cpu_ram_efficient_loading = loads_on_rank_0
        if hasattr(model, "generate"):
            register_fsdp_forward_method(model, "generate")
        model._is_accelerate_prepared = True  # `prepare_model` would wrap it in autocast, as it wraps unsharded ones

    def _save_compact_shards(self, folder: str) -> None:
        """Saves the compact model whole, while it stays sharded."""
        self._by_writer(lambda: os.makedirs(folder, exist_ok=True))
        writes = self.is_world_process_zero()
        with self._before_sharding.whole_on_disk(self.model, self.accelerator.device, folder, writes):
            self._by_writer(lambda: self._save(folder))

    def _save_figures(self, folder: str) -> None:
        """Figures are for looking at: what goes wrong with them is a warning."""
        if self.args.should_save:
            try:
                os.makedirs(folder, exist_ok=True)
                save_figures(folder, self._cut, self.state.log_history, self.report["pruning"])
            except Exception as error:
                logger.warning("the figures could not be drawn: %s: %s", type(error).__name__, error)


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
