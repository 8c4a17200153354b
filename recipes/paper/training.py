"""One training of table.py, in slices of time: checkpoints by the clock, a deadline, and how it goes on and ends."""

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, set_seed

from hf_oto import OTOTrainingArguments

from ..common import accuracy
from .images import Batches
from .systems import SYSTEMS
from .tutorials import BATCH_SIZE, TUTORIALS, TutorialTrainer, optimizer_and_schedule


class Paused(Exception):
    """The time is over, and what was trained is in a checkpoint."""


class Clock(TrainerCallback):
    """Saves a checkpoint every `period_s` seconds and at the deadline, at which it also raises Paused."""

    def __init__(self, period_s: float, deadline_s: float) -> None:
        self.period_s = period_s
        self.deadline_s = deadline_s
        self.next_s = monotonic() + period_s

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Looks at the clock, but after the last step of an epoch: its evaluation has to come before a checkpoint."""
        if state.global_step % (state.max_steps // state.num_train_epochs):
            self.on_epoch_end(args, state, control)

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Looks at the clock, but after the last epoch: there the model is cut and scored, whatever the time."""
        is_late = monotonic() >= min(self.next_s, self.deadline_s)
        if is_late and state.global_step < state.max_steps:
            control.should_save = True

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ends the training at the deadline."""
        now_s = monotonic()
        self.next_s = now_s + self.period_s
        if now_s >= self.deadline_s:
            raise Paused  # `control.should_training_stop` would make it cut the model now


def last_checkpoint(folder: Path) -> tuple[str | None, dict[str, Any]]:
    """The newest whole checkpoint in a folder, and the state of its trainer; (None, {}) where there is none."""
    found: tuple[str | None, dict[str, Any]] = (None, {})
    for path in folder.glob("checkpoint-*/trainer_state.json"):
        try:
            state = json.loads(path.read_text())  # it is written last: where it is whole, so is the checkpoint
        except ValueError:
            continue
        if state["global_step"] > found[1].get("global_step", -1):
            found = str(path.parent), state
    return found


def finished(
    folder: Path, network: str, mode: str, batches: Batches, options: argparse.Namespace, deadline_s: float
) -> dict[str, float]:
    """Trains a network to its end, from where it was left, and returns what the table shows of it.

    Raises:
        Paused: at the deadline.
    """
    tutorial = TUTORIALS[network]
    set_seed(options.seed)
    fields = json.loads(options.config) | {"num_labels": int(batches.labels.max()) + 1}
    model = SYSTEMS[network].built(options.smoke, fields)
    args = OTOTrainingArguments(
        str(folder), target_group_sparsity=tutorial.group_sparsity, seed=options.seed,
        pruning_mode="scheduled" if mode == "dense" else mode, num_train_epochs=options.epochs, max_grad_norm=0.0,
        per_device_train_batch_size=BATCH_SIZE, per_device_eval_batch_size=500, eval_strategy="epoch",
        logging_strategy="epoch", save_strategy="no", save_total_limit=2, bf16=options.precision == "bf16",
        fp16=options.precision == "fp16", dataloader_num_workers=options.workers, disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(), remove_unused_columns=False, report_to="none",
    )  # fmt: skip
    # the loading processes don't persist: each epoch has to draw as many random numbers as one that is begun anew
    model.to(args.device)  # before the optimizer is made
    total_steps = options.epochs * math.ceil(batches.num_train / BATCH_SIZE)
    given = {
        "train_dataset": batches.train,
        "eval_dataset": batches.test,
        "data_collator": replace(batches, mixup=tutorial.mixup),
        "compute_metrics": accuracy(),
        "optimizers": optimizer_and_schedule(model, tutorial, total_steps),
        "callbacks": [Clock(60 * options.save_minutes, deadline_s)],
    }
    trainer = Trainer(model, args, **given) if mode == "dense" else TutorialTrainer(model, args, tutorial, **given)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder)[0])
    figures = {"accuracy": trainer.evaluate()["eval_accuracy"], "epoch": options.epochs}
    trainer.save_model(str(folder / "end"))
    if mode == "dense":
        return figures | {"macs_left": 1.0, "params_left": 1.0, "group_sparsity": 0.0}
    before, after = trainer.report["before"], trainer.report["after"]
    left = {f"{name}_left": after[name] / before[name] for name in ("macs", "params")}
    return figures | left | {"group_sparsity": trainer.report["group_sparsity"]}
