"""One run of bench_quality.py: the same data, order, base optimizer and schedule for every method."""

from dataclasses import replace
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from hf_oto import OTOTrainer, OTOTrainingArguments, measure

from .rivals import RandomZIGs, Released, Rival
from .runs import Setting
from .scoring import narrow, scores
from .tasks import Task
from .torch_pruning import TorchPruning

OURS = {
    "oto": {},
    "oto-whole": {"shrink": False},
    "oto-early": {"pruning_window": [0.05, 0.35]},
    "oto-taught": {},
    "paper": {"pruning_mode": "paper"},
}
RIVALS: dict[str, type[Rival]] = {
    "random": RandomZIGs,
    **{f"tp-taylor-{scope}": TorchPruning for scope in ("local", "global", "isomorphic")},
    "tp-groupnorm-local": TorchPruning,
    "tp-magnitude-local": TorchPruning,
    "hesso": Released,
    "dhspg": Released,
}
METHODS = ("dense", *OURS, "scratch", *RIVALS)
BY_SPARSITY = ("paper", "hesso", "dhspg")  # their target is the fraction of ZIGs that goes, not the MACs left
DECAY = 0.25  # the last part of the run, in which the learning rate of "wsd" falls to zero
SCHEDULES = ("wsd", "linear", "cosine")


def arguments(setting: Setting, folder: str) -> dict[str, Any]:
    """Training arguments that all methods share."""
    schedule: dict[str, Any] = {"lr_scheduler_type": setting.schedule}
    if setting.schedule == "wsd":
        kwargs = {"num_decay_steps": int(DECAY * setting.steps), "decay_type": "linear"}
        schedule = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": kwargs}
    strategy = "group_by_length" if setting.task == "text" else "random"
    return schedule | {
        "output_dir": folder, "max_steps": setting.steps, "per_device_train_batch_size": setting.batch_size,
        "learning_rate": setting.learning_rate, "weight_decay": 0.01 if setting.base == "adamw" else 0.0,
        "warmup_steps": setting.steps // 20, "seed": setting.seed, "train_sampling_strategy": strategy,
        "remove_unused_columns": False, "dataloader_pin_memory": torch.cuda.is_available(),
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_steps": 10**9,
    }  # fmt: skip


def trainer_of(task: Task, checkouts: dict[str, str], setting: Setting, folder: str) -> Trainer:
    """The trainer of a method."""
    set_seed(setting.seed)
    width = narrow(task, setting.target) if setting.method == "scratch" else 1.0
    model = task.build(width)
    optimizer = torch.optim.AdamW if setting.base == "adamw" else torch.optim.SGD
    kwargs = {} if setting.base == "adamw" else {"momentum": 0.9}
    common = {
        "model": model, "train_dataset": task.train, "data_collator": task.collate,
        "optimizer_cls_and_kwargs": (optimizer, {"lr": setting.learning_rate} | kwargs),
    }  # fmt: skip
    given = arguments(setting, folder)
    if setting.method in OURS:
        target = "target_group_sparsity" if setting.method in BY_SPARSITY else "target_macs"
        given |= OURS[setting.method] | {target: setting.target}
        teacher = None
        if setting.method == "oto-taught":
            dense = trainer_of(task, checkouts, replace(setting, method="dense"), folder)
            dense.train()
            teacher = dense.model
            set_seed(setting.seed)
        return OTOTrainer(args=OTOTrainingArguments(**given), teacher=teacher, **common)
    args = TrainingArguments(**given)
    if setting.method in RIVALS:
        inputs = task.inputs(2)
        return RIVALS[setting.method](args=args, setting=setting, inputs=inputs, checkouts=checkouts, **common)
    return Trainer(args=args, **common)


def run(task: Task, checkouts: dict[str, str], setting: Setting) -> dict[str, float]:
    """Trains one model, cuts it, and scores what is left."""
    start = process_time()
    with TemporaryDirectory() as folder:
        trainer = trainer_of(task, checkouts, setting, folder)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    cpu = process_time() - start
    model = trainer.compacted() if isinstance(trainer, Rival) else trainer.model
    dense, small = measure(task.build(1.0), model, inputs=task.inputs(8), seconds=0.3)
    ratios = {name: small[name] / dense[name] for name in ("params", "macs", "latency")}
    if isinstance(trainer, OTOTrainer):
        training_macs = trainer.report["training_macs"]
    else:
        training_macs = trainer.training_macs if isinstance(trainer, Rival) else ratios["macs"]
    return scores(model, task) | ratios | {"training_macs": training_macs, "cpu": cpu}
