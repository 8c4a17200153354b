"""The end of a run: what was trained is saved, and those zeros that are still in it are certified and cut out.

`Ending` is a part of `OTOMixin`. Whatever fails after the last step leaves the trained model on disk, as keeping.py
saves it. What can't be done at the end is found out before the first step, by rehearsal.py.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast, fsdp2_prepare_model
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import PreTrainedModel
from transformers.integrations import unset_hf_deepspeed_config
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .cut import Cut
from .evaluating import take_off_autocast_
from .figures import save_figures
from .flat import let_go_of, master_weights
from .modeling_oto import OTOError
from .ranks import of_rank_zero
from .report import Report, scores
from .sharded import BeforeSharding, ShardedWeights, divide_
from .shards import divided_by_rows
from .shrinking import CUTS_NAME
from .trace import persistent_buffers
from .whole import WholeWeights
from .zigs import PruningPlan

logger = logging.getLogger(__name__)

PLAN_NAME = "oto_plan.json"


class Ending:
    """The part of `OTOMixin` that makes the end."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.plan: PruningPlan | None = None
        self.report: Report | None = None
        self._cut: Cut | None = None  # what was cut
        super().__init__(*args, **kwargs)

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
            logger.warning(
                "no stock config says these widths, so the compact model is saved with a record of them; "
                "with another group_divisible, or a width in protect, there may be one"
            )
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
            trained = self._trained = self._taken_of_deepspeed()
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
        if isinstance(trained, WholeWeights):
            self.model = self.model_wrapped = trained.model = model.to(self.accelerator.device)
        self._trained = trained
        return trained

    def _taken_of_deepspeed(self) -> WholeWeights | ShardedWeights:
        """The trained model, plain. ZeRO-3 has divided it, and it stays divided, as FSDP2 divides."""
        device = self.accelerator.device
        weights: dict[str, torch.Tensor] = {}
        for name, weight in master_weights(self.model):
            if isinstance(self._undivided, BeforeSharding):
                weights[name] = divided_by_rows(weight, self._mesh_of_all_ranks())
            else:
                weights[name] = weight.to("cpu", copy=True)
        buffers = persistent_buffers(self.model)
        zero = self.deepspeed.optimizer
        self.accelerator.free_memory()  # DeepSpeed's engine goes, and takes its hooks off the model
        let_go_of(zero, self.model)
        unset_hf_deepspeed_config()  # ZeRO-3 would divide every model that is made from here on
        self.is_deepspeed_enabled = False
        undivided = self._undivided
        self._undivided = self.deepspeed = None
        if isinstance(undivided, BeforeSharding):
            return undivided.in_shards(weights, buffers, self._runs_by_blocks, device)
        return WholeWeights(undivided.filled(weights, buffers))

    def _mesh_of_all_ranks(self) -> DeviceMesh:
        return init_device_mesh(self.accelerator.device.type, (self.accelerator.num_processes,))

    def _take_compact(self, trained: WholeWeights | ShardedWeights) -> None:
        """Makes the compact model the trainer's, ready to be evaluated; what was sharded is sharded again."""
        model = trained.model
        if isinstance(trained, ShardedWeights):
            self._before_sharding = trained.put_on_(self._sharded_again)
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

    def _sharded_again(self, model: torch.nn.Module, layers: Sequence[torch.nn.Module]) -> None:
        """Shards a model without weights and its layers, in place, as the dense one was."""
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            loads_on_rank_0 = plugin.cpu_ram_efficient_loading
            plugin.cpu_ram_efficient_loading = False  # there is nothing to be loaded
            try:
                fsdp2_prepare_model(self.accelerator, model)
            finally:
                plugin.cpu_ram_efficient_loading = loads_on_rank_0
        else:  # ZeRO-3 has divided it, and DeepSpeed's engine is gone
            divide_(model, layers, self._mesh_of_all_ranks())
        if hasattr(model, "generate"):
            register_fsdp_forward_method(model, "generate")
        model._is_accelerate_prepared = True  # `prepare_model` would wrap it in autocast, as it wraps unsharded ones

    def _save_shards(self, folder: str) -> None:
        """Saves the model whole, while it stays sharded."""
        self._by_writer(lambda: os.makedirs(folder, exist_ok=True))
        writes = self.is_world_process_zero()
        with self._before_sharding.whole_on_disk(self.model, self.accelerator.device, folder, writes):
            self._by_writer(lambda: self._save(folder))

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """`Trainer.save_model`, and more files beside a compact model.

        These are the figures, where matplotlib is installed, and for a model that is no `PreTrainedModel` the plan,
        `oto_plan.json`, with which it can be built again.
        """
        folder = output_dir or self.args.output_dir
        # until the end FSDP2 and DeepSpeed save in their own ways
        if self._is_of_shards and (self.report is not None or not self.is_fsdp_enabled):
            self._save_shards(folder)
            is_internal = args or kwargs.get("_internal_call")
            if self.args.push_to_hub and not is_internal:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
        else:
            super().save_model(output_dir, *args, **kwargs)
        if self.report is None:
            self._save_cuts(folder)
        if self.report is not None or not self._is_divided:
            self._last_saved = self.state.global_step, folder
        if self.report is not None:
            self._save_figures(folder)
            if self.args.should_save and not isinstance(self.model, PreTrainedModel):
                Path(folder, PLAN_NAME).write_text(self.plan.to_json())
            self._write_early_card_anew()

    def _save_figures(self, folder: str) -> None:
        """Figures are for looking at: what goes wrong with them is a warning."""
        if self.args.should_save:
            try:
                os.makedirs(folder, exist_ok=True)
                save_figures(folder, self._cut, self.state.log_history, self.report["pruning"])
            except Exception as error:
                logger.warning("the figures could not be drawn: %s: %s", type(error).__name__, error)
