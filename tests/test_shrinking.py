"""A model that shrinks while it trains ends as one that is cut at the end.

Every law compares a run with `shrink=True`, the default, with the same run with `shrink=False`. Dropout is off: its
masks have other shapes in a smaller model, so that the two runs would be other draws of one distribution.
"""

import copy
import functools
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from test_resume import (
    Interrupt,
    OutOfMemory,
    Plain,
    Watch,
    checkpoint,
    quick,  # noqa: F401  a fixture of all tests
    quick_collections,  # noqa: F401  likewise
    resnet,
    same,
    same_run,
    save,
    weights,
)
from test_resume import arguments as short_arguments
from test_resume import rows as rows_of
from test_trainer import CHECKPOINTING
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hf_oto import OTOError, OTOTrainer, PruningPlan, compact, paper, shrinking, whole
from hf_oto.cut_state import why_uncuttable
from hf_oto.resume import load_weights_
from hf_oto.shrinking import CUTS_NAME

STEPS = 24  # the window is from step 2 to step 14, with nine events
SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
LOGGED = dict(logging_strategy="steps", logging_steps=4)


def vit():
    return tf.ViTForImageClassification(tf.ViTConfig(**SMALL, **NO_DROPOUT, image_size=8, patch_size=4))


def bert():
    return tf.BertForSequenceClassification(tf.BertConfig(**SMALL, **NO_DROPOUT, vocab_size=40))


def llama():
    """Its residual stream is an axis whose cut scales weights: that waits for the end."""
    size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**size, intermediate_size=48, vocab_size=40))


STREAM_TOO = '{"embed": 0.5, "q_proj": 0.5, "mlp": 0.5}'
MODELS = {"vit": vit, "bert": bert, "resnet": resnet, "llama": llama, "plain": Plain}


def made(name, seed=0):
    tf.set_seed(seed)
    return MODELS[name]()


def rows(name):
    if name != "llama":
        return rows_of(name)
    texts = [row["input_ids"] for row in rows_of("bert")]
    return [{"input_ids": text, "labels": text} for text in texts]


class Steps(tf.TrainerCallback):
    """What a callback that stands behind ours sees of every step. It keeps no tensors."""

    def __init__(self):
        self.params, self.trained, self.rates, self.cuts = [], [], [], []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.trained.append(sum(p.grad.numel() for p in model.parameters() if p.grad is not None))

    def on_step_end(self, args, state, control, model, optimizer, **kwargs):
        self.params.append(sum(p.numel() for p in model.parameters()))
        assert self.params[-1] == sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        self.rates.append([group["lr"] for group in optimizer.param_groups])

    def on_compact(self, args, state, control, model, optimizer, cut, **kwargs):
        # no optimizer is left at the end, where the last cut is made; a checkpoint's cuts come before the first step
        if optimizer is not None and state.global_step > 0:
            self.cuts.append(state.global_step)


def make(folder, name="vit", shrink=True, cls=OTOTrainer, seed=0, callbacks=(), model=None, data=None, **more):
    given = {
        key: more.pop(key) for key in ("compute_metrics", "optimizers", "optimizer_cls_and_kwargs") if key in more
    }
    if name == "llama" and not any(key.startswith("target") for key in more):
        more["target_per_axis"] = STREAM_TOO
    args = short_arguments(folder, **({"max_steps": STEPS, "shrink": shrink} | more))
    data = data or rows(name)
    steps, watch = Steps(), Watch()
    trainer = cls(
        made(name, seed) if model is None else model, args, train_dataset=data, eval_dataset=rows(name)[:8],
        callbacks=[steps, *callbacks, watch], **given,
    )  # fmt: skip
    trainer.steps, trainer.watch = steps, watch
    return trainer


def trained(folder, *args, resume=None, **more):
    trainer = make(folder, *args, **more)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def both(folder, *args, **more):
    """The run cut at the end, and the run that shrinks."""
    return [trained(folder / str(shrink), *args, shrink=shrink, **more) for shrink in (False, True)]


KEY_BIAS = re.compile(r"(key|k_proj)\.bias$")  # softmax doesn't see it: its gradient is rounding, and Adam walks on it


def distance(a, b):
    """The largest difference of two models' tensors, relative to the largest entry of each; inf if shapes differ."""
    a, b = (model if isinstance(model, dict) else model.state_dict() for model in (a, b))
    if {name: t.shape for name, t in a.items()} != {name: t.shape for name, t in b.items()}:
        return float("inf")
    largest = 0.0
    for name, t in a.items():
        if t.is_floating_point() and not KEY_BIAS.search(name):
            largest = max(largest, float((t - b[name]).abs().max() / t.abs().max().clamp(min=1e-12)))
    return largest


def record(trainer):
    return getattr(getattr(trainer.model, "config", None), "oto", None)


def shrank(trainer):
    """Whether something was cut before the end."""
    return bool(trainer.steps.cuts)


def assert_same_end(whole, small, tolerance=1e-5):
    """What is left of a run in the end is the same, and the second one has shrunk on the way."""
    assert shrank(small) and not shrank(whole)
    assert small.plan == whole.plan
    assert record(small) == record(whole)
    assert distance(small.model, whole.model) < tolerance
    assert small.report["group_sparsity"] == whole.report["group_sparsity"]
    for when in ("before", "after"):
        sizes = [{key: of[when][key] for key in ("params", "macs", "bytes")} for of in (small.report, whole.report)]
        assert sizes[0] == sizes[1]
    assert small.report["pruning"] == whole.report["pruning"]
    assert small.report["max_output_difference"] < 1e-9


# equality --------------------------------------------------------------------------------------------

# SGD's updates follow the gradients, which Adam's divide by their size
OPTIMIZERS = {
    "adamw": dict(optim="adamw_torch", learning_rate=1e-3),
    "sgd": dict(optim="sgd", optim_args="momentum=0.9", learning_rate=2e-2),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Uninterrupted runs, with all their checkpoints, by model, optimizer and shrink."""

    @functools.cache
    def of(name, optimizer, shrink):
        folder = tmp_path_factory.mktemp(f"{name}-{optimizer}-{shrink}")
        settings = OPTIMIZERS[optimizer] | LOGGED | dict(save_strategy="steps", save_steps=2)
        given = made(name)
        trainer = make(folder, name, shrink, model=given, **settings)
        output = trainer.train()
        trainer.given, trainer.train_loss = given, output.training_loss
        trainer.before_evaluation = copy.deepcopy(dict(trainer.report))
        trainer.eval_loss = trainer.evaluate()["eval_loss"]
        return trainer

    return of


EACH = [(name, optimizer) for name in ("vit", "bert", "resnet", "llama") for optimizer in OPTIMIZERS]


@pytest.mark.parametrize(("name", "optimizer"), EACH)
def test_the_end_is_that_of_a_cut_at_the_end(run, name, optimizer):
    whole, small = (run(name, optimizer, shrink) for shrink in (False, True))
    assert_same_end(whole, small)
    assert small.eval_loss == pytest.approx(whole.eval_loss, rel=1e-5)
    assert small.train_loss == pytest.approx(whole.train_loss, rel=1e-5)
    assert small.model is small.given and whole.model is whole.given
    assert type(small.model).__name__ == type(whole.model).__name__
    other = run(name, next(each for each in OPTIMIZERS if each != optimizer), True)  # control
    assert other.plan != whole.plan and not distance(other.model, whole.model) < 1e-5


OURS = ("oto/group_sparsity", "oto/params_left", "oto/macs_left")


@pytest.mark.parametrize(("name", "optimizer"), EACH)
def test_the_logs_are_the_same(run, name, optimizer):
    whole, small = (run(name, optimizer, shrink) for shrink in (False, True))
    assert small.steps.rates == whole.steps.rates and len(small.steps.rates) == STEPS
    logs = list(zip(whole.state.log_history, small.state.log_history, strict=True))
    assert len(logs) == STEPS // 4 + 2  # and the ends of training and evaluation
    for of_whole, of_small in logs:
        assert of_whole.keys() == of_small.keys()
        assert of_whole.get("learning_rate") == of_small.get("learning_rate")
        for key in of_whole.keys() & {"loss", "train_loss", "eval_loss", "grad_norm", *OURS}:
            assert of_small[key] == pytest.approx(of_whole[key], rel=1e-3 if key == "grad_norm" else 1e-5), key
    losses = [logs["loss"] for logs in small.state.log_history if "loss" in logs]
    assert len(set(losses)) == len(losses)  # control: not all numbers are alike


@pytest.mark.parametrize(("name", "optimizer"), EACH)
def test_each_cut_is_seen_at_once(run, name, optimizer):
    """By callbacks behind ours at the end of the same step, and by the next step."""
    whole, small = (run(name, optimizer, shrink).steps for shrink in (False, True))
    events = run(name, optimizer, True).report["pruning"]
    # the target is reached an event before the last: a thousandth of the ZIGs is less than one
    assert len(small.cuts) > 1 and events[0] < small.cuts[0] < small.cuts[-1] <= events[1] < STEPS
    for step in range(2, STEPS + 1):
        before, after = small.params[step - 2 : step]
        assert (after < before) == (step in small.cuts)
        before, after = small.trained[step - 2 : step]
        assert (after < before) == (step - 1 in small.cuts)
    assert small.params[-1] < whole.params[-1]
    assert len({*whole.params}) == len({*whole.trained}) == 1  # control


class Counting(OTOTrainer):
    """Counts the floating-point operations of every step, forward and backward."""

    def training_step(self, *args, **kwargs):
        with FlopCounterMode(display=False) as counter:
            loss = super().training_step(*args, **kwargs)
        vars(self).setdefault("flops", []).append(counter.get_total_flops())
        return loss


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_each_cut_saves_operations(tmp_path, name):
    whole, small = both(tmp_path, name, cls=Counting, target_macs=0.6)
    assert len(small.steps.cuts) > 1
    for step in range(1, STEPS):
        before, after = small.flops[step - 1 : step + 1]
        assert (after < before) == (step in small.steps.cuts) and after <= before
    assert small.flops[-1] < 0.75 * small.flops[0]
    fraction = sum(small.flops) / (len(small.flops) * small.flops[0])
    assert small.report["training_macs"] == pytest.approx(fraction, abs=0.03) and fraction < 0.9
    assert f"training took {100 * small.report['training_macs']:.0f} % of the MACs" in str(small.report)
    assert whole.report["training_macs"] == 1 and "training took" not in str(whole.report)
    assert len({*whole.flops}) == 1 and whole.flops[0] == small.flops[0]  # control


def test_the_report_does_not_show_metrics_of_a_model_that_was_cut_already(tmp_path):
    whole, small = both(tmp_path, eval_strategy="steps", eval_steps=STEPS)
    assert whole.report["metrics"]["zeroed"] and small.report["metrics"]["zeroed"] == {}


# what users bring along ------------------------------------------------------------------------------


class Stop(tf.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True


class Augmented(torch.utils.data.Dataset):
    """Draws noise for every example it gives, after some numbers that nobody needs."""

    def __init__(self, num_drawn_before=0):
        self.rows, self.num_drawn_before = rows("vit"), num_drawn_before

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        torch.randn(self.num_drawn_before)
        noise = 0.3 * torch.randn(3, 8, 8) + np.random.randn()
        return self.rows[i] | {"pixel_values": self.rows[i]["pixel_values"] + noise}


SETTINGS = {
    "accumulation": dict(gradient_accumulation_steps=3, per_device_train_batch_size=2),
    "checkpointing": {CHECKPOINTING: True},
    "no clipping": dict(max_grad_norm=0.0),
    "constant": dict(lr_scheduler_type="constant"),
    "warm-up": dict(lr_scheduler_type="cosine_with_restarts", warmup_steps=3),
    "plateau": dict(lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps", eval_steps=1,
                    lr_scheduler_kwargs=dict(patience=0, threshold=0.5), metric_for_best_model="loss"),
    "fused": dict(optim="adamw_torch_fused"),
    "foreach off": dict(optim="rmsprop", learning_rate=1e-4),
    "adagrad": dict(optim="adagrad", learning_rate=1e-3),
    "params": dict(target_params=0.5),
    "macs": dict(target_macs=0.5),
    "per axis": dict(target_per_axis='{"mlp": 0.5}'),
    "multiples": dict(group_divisible=4),
    "compiled": dict(torch_compile_backend="eager"),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_the_same_end_with_other_settings(tmp_path, name):
    whole, small = both(tmp_path, **SETTINGS[name])
    assert_same_end(whole, small)
    assert small.steps.rates == whole.steps.rates
    if name == "plateau":
        assert len({rate for (rate, *_) in small.steps.rates}) > 1
    if name == "compiled":  # every cut compiles anew
        assert len(small.steps.cuts) == 1


def one_cycle(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=STEPS + 1)


def test_a_schedule_on_the_users_own_optimizer(tmp_path):
    """OneCycleLR moves the learning rate and the momentum of an optimizer that it was made for."""
    runs = []
    for shrink in (False, True):
        model = made("vit")
        runs.append(trained(tmp_path / str(shrink), shrink=shrink, model=model, optimizers=one_cycle(model)))
    whole, small = runs
    assert_same_end(whole, small)
    assert small.steps.rates == whole.steps.rates and len({rate for (rate, *_) in small.steps.rates}) > 20


def test_random_augmentation_is_drawn_as_before(tmp_path):
    whole, small = both(tmp_path, data=Augmented())
    assert_same_end(whole, small)
    other = trained(tmp_path / "other", data=Augmented(1))
    assert not distance(other.model, whole.model) < 1e-5  # control: other noise


class Stream(torch.utils.data.IterableDataset):
    """It can be read once."""

    def __init__(self):
        self.num_read = 0
        self.examples = iter(rows("vit") * 10)

    def __iter__(self):
        for example in self.examples:
            self.num_read += 1
            yield example


def test_a_stream_is_read_once(tmp_path):
    streams = Stream(), Stream()
    whole, small = (
        trained(tmp_path / str(shrink), shrink=shrink, data=stream)
        for shrink, stream in zip((False, True), streams, strict=True)
    )
    assert_same_end(whole, small)
    assert STEPS * 4 <= streams[0].num_read == streams[1].num_read < STEPS * 4 + 30


def test_half_precision(tmp_path):
    """Kernels of other shapes round otherwise: the losses are alike, and all that is exact stays so."""
    whole, small = both(tmp_path, bf16=True)
    assert shrank(small)
    assert small.report["group_sparsity"] == whole.report["group_sparsity"] == 0.5
    assert small.report["max_output_difference"] < 1e-9
    assert small.evaluate()["eval_loss"] == pytest.approx(whole.evaluate()["eval_loss"], rel=0.02)


class Scaling(OTOTrainer):
    """Scales its loss, as fp16 does, by powers of two: that rounds nothing."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)


def test_a_scaler_goes_on(tmp_path):
    whole, small = both(tmp_path, cls=Scaling, max_grad_norm=0.0)
    assert_same_end(whole, small)
    assert same_run(small, trained(tmp_path / "unscaled", max_grad_norm=0.0))
    assert small.accelerator.scaler is None or small.accelerator.scaler.get_scale() != 2.0**10  # control: it worked


def test_uniform_widths_end_in_a_stock_model(tmp_path):
    whole, small = both(tmp_path, uniform=True, group_divisible=1)
    assert_same_end(whole, small)
    assert type(small.model) is tf.ViTForImageClassification and record(small) is None
    assert small.model.config.intermediate_size < 24


def test_a_model_that_is_no_transformers_one(tmp_path):
    whole, small = both(tmp_path, "plain")
    assert_same_end(whole, small)
    assert small.model.a.out_features < 16


PAPER = dict(pruning_mode="paper", optim="sgd", learning_rate=0.1)


def make_the_paper_quick(monkeypatch, lam):
    penalty = paper.Penalty(lam, amplify=2.0, bound=10.0, epsilon=0.9)
    monkeypatch.setattr(paper.Penalty, "released", lambda _: penalty)


@pytest.mark.parametrize("lam", [3.0, 1e-3])
def test_the_papers_own_rule(tmp_path, monkeypatch, lam):
    """It has no window: a cut is made once it is worth it, or the target is reached, and else at the end."""
    make_the_paper_quick(monkeypatch, lam)
    whole, small = both(tmp_path, protect=["attention"], **PAPER)
    assert (small.report["group_sparsity"] == 0.5) == (lam == 3.0)
    if lam == 3.0:
        assert_same_end(whole, small)
        assert small.steps.cuts[-1] < STEPS
    else:
        assert not shrank(small) and same_run(small, whole)


def test_an_axis_that_becomes_zero_piece_by_piece_keeps_a_zig(tmp_path, monkeypatch):
    """The paper's rule has no floor. Which of the zeros stays depends on which were cut before: it is a zero."""
    make_the_paper_quick(monkeypatch, 3.0)
    whole, small = both(tmp_path, **PAPER)
    assert shrank(small)
    widths = [{name: len(kept) for name, kept in trainer.plan.kept.items()} for trainer in (whole, small)]
    assert widths[0] == widths[1] and 1 in widths[0].values()
    assert small.evaluate()["eval_loss"] == pytest.approx(whole.evaluate()["eval_loss"], rel=1e-5)
    assert small.report["group_sparsity"] == whole.report["group_sparsity"] < 0.5


@pytest.mark.parametrize("step", [3, 9, 18])
def test_stopped_early(tmp_path, step):
    """Before the first cut it is the same run, bit by bit."""
    whole, small = both(tmp_path, callbacks=[Stop(step)])
    assert small.state.global_step == step
    if step == 3:
        assert not shrank(small) and same_run(small, whole)
    else:
        assert_same_end(whole, small)
    assert (small.report["group_sparsity"] == 0.5) == (step == 18)


# the best checkpoint ---------------------------------------------------------------------------------


def decree(best, first=2):
    """A metric by which the model of one step is the best, and later ones ever worse; it is asked every 2 steps."""
    steps = iter(range(first, STEPS + 1, 2))

    def compute_metrics(_):
        step = next(steps, STEPS)
        return {"rank": -100.0 if step < best else float(best - step)}

    return compute_metrics


def best(step, first=2):
    return dict(
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, save_total_limit=2,
        load_best_model_at_end=True, metric_for_best_model="rank", greater_is_better=True,
        compute_metrics=decree(step, first),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["vit", "resnet", "plain"])
@pytest.mark.parametrize("step", [12, 14, 20])  # the target is reached after step 12, before the last event
def test_the_best_model_is_the_checkpoints(tmp_path, name, step):
    whole, small = (trained(tmp_path / str(shrink), name, shrink, **best(step)) for shrink in (False, True))
    assert small.state.best_global_step == whole.state.best_global_step == step
    assert_same_end(whole, small)
    folders = sorted(folder.name for folder in Path(small.args.output_dir).glob("checkpoint-*"))
    assert folders == sorted({f"checkpoint-{step}", f"checkpoint-{STEPS}"})
    if name == "vit":
        loaded, last = (tf.ViTForImageClassification.from_pretrained(checkpoint(small, at)) for at in (step, STEPS))
        assert same(weights(loaded), weights(small.model))
        assert not same(weights(last), weights(small.model))  # control


def test_patience(tmp_path):
    whole, small = (
        trained(
            tmp_path / str(shrink), shrink=shrink, callbacks=[tf.EarlyStoppingCallback(2)],
            **(best(16) | dict(save_total_limit=None)),
        )
        for shrink in (False, True)
    )  # fmt: skip
    assert small.state.global_step == whole.state.global_step == 20
    assert_same_end(whole, small)


# what waits for the end ------------------------------------------------------------------------------


class Average(tf.TrainerCallback):
    """An average of the weights, kept in the shapes that they had in the beginning."""

    def __init__(self, model):
        self.kept = {name: t.clone() for name, t in model.state_dict().items() if t.is_floating_point()}

    def on_step_end(self, args, state, control, model, **kwargs):
        now = model.state_dict()
        for name, t in self.kept.items():
            assert t.shape == now[name].shape
            t.lerp_(now[name], 0.2)


class Own(torch.optim.SGD):
    """Keeps tensors beside its state."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.velocities = [torch.zeros_like(p) for group in self.param_groups for p in group["params"]]


def keeping(**settings):
    return lambda model, monkeypatch: settings


def with_average(model, monkeypatch):
    return {"callbacks": [Average(model)]}


def with_a_list_of_weights(model, monkeypatch):
    callback = tf.TrainerCallback()
    callback.snapshots = [{"weight": model.classifier.weight.detach().clone()}]
    return {"callbacks": [callback]}


def with_an_averaged_model(model, monkeypatch):
    callback = tf.TrainerCallback()
    callback.swa = torch.optim.swa_utils.AveragedModel(model)
    return {"callbacks": [callback]}


def with_hook(model, monkeypatch):
    model.classifier.weight.register_hook(lambda gradient: gradient)
    return {}


def with_accumulate_hook(model, monkeypatch):
    model.classifier.weight.register_post_accumulate_grad_hook(lambda p: None)
    return {}


def with_data_parallel(model, monkeypatch):
    monkeypatch.setattr(shrinking, "DataParallel", type(model))
    return {}


def with_regional_compilation(model, monkeypatch):
    class Regional(OTOTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            monkeypatch.setattr(self.accelerator.state.dynamo_plugin, "use_regional_compilation", True)

    return {"cls": Regional}


REASONS = {
    "Average keeps tensors and has no on_compact": with_average,
    "TrainerCallback keeps tensors and has no on_compact": with_a_list_of_weights,
    "TrainerCallback keeps tensors and": with_an_averaged_model,
    "classifier.weight has a hook": with_hook,
    "classifier.weight has a hook, which may know": with_accumulate_hook,
    "DataParallel copies it in every step": with_data_parallel,
    "its layers are compiled one by one": with_regional_compilation,
    "exp_avg_sq_col of Adafactor doesn't have the shape of its parameter": keeping(optim="adafactor"),
    "Own keeps tensors of its own, as velocities": keeping(optimizer_cls_and_kwargs=(Own, {"lr": 0.05})),
    "shrink=False": keeping(shrink=False),
}


def reasons_in(caplog):
    texts = [r.getMessage() for r in caplog.records if r.name == "hf_oto.shrinking"]
    return [
        text.split(": ", 1)[1] for text in texts if text.startswith("the model is cut at the end of training only")
    ]


@pytest.mark.parametrize("reason", REASONS)
def test_what_waits_for_the_end_says_why(tmp_path, monkeypatch, caplog, reason):
    runs = []
    with caplog.at_level(logging.INFO, "hf_oto.shrinking"):
        for shrink in (False, True):
            caplog.clear()
            model = made("vit")
            more = REASONS[reason](model, monkeypatch)
            runs.append(trained(tmp_path / str(shrink), model=model, **({"shrink": shrink} | more)))
    assert len(reasons_in(caplog)) == 1 and reason in reasons_in(caplog)[0]
    whole, small = runs
    assert not shrank(small) and same_run(small, whole) and record(small) == record(whole)
    assert small.report["group_sparsity"] == 0.5


class Harmless(tf.TrainerCallback):
    """Keeps the model itself, which is cut, and numbers."""

    def __init__(self, model):
        self.model, self.losses, self.by_name = model, [1.0], {"a": 2}


def test_the_control_of_what_waits(tmp_path, caplog):
    model = made("vit")
    with caplog.at_level(logging.INFO, "hf_oto.shrinking"):
        assert shrank(trained(tmp_path, model=model, callbacks=[Harmless(model)]))
    assert reasons_in(caplog) == []


def test_an_optimizer_whose_state_has_other_shapes_can_not_be_cut():
    x = nn.Parameter(torch.ones(3, 2))
    for optimizer, reason in (
        (torch.optim.LBFGS([x]), "LBFGS keeps tensors of its own, as _params"),
        (torch.optim.Adafactor([x]), "doesn't have the shape of its parameter"),
        (torch.optim.AdamW([x]), None),
        (torch.optim.SGD([x], lr=0.1, momentum=0.9), None),
    ):
        x.grad = torch.ones(3, 2)
        optimizer.step(lambda: x.sum())
        found = why_uncuttable(optimizer)
        assert found == reason or reason in found


# a certificate that fails ----------------------------------------------------------------------------


def failing(certify, failing_calls):
    """A certificate that fails in some of its calls, which are counted from 1."""
    count = iter(range(1, 100))

    def certified(*args):
        certificate = certify(*args)
        return certificate._replace(cut=0.5) if next(count) in failing_calls else certificate

    return certified


def test_a_cut_that_is_not_certified_is_not_made(tmp_path, monkeypatch, caplog):
    """The model and the optimizer are what they were, and the end decides."""
    monkeypatch.setattr(shrinking, "certify", failing(shrinking.certify, {1}))
    whole, small = both(tmp_path)
    assert not shrank(small) and same_run(small, whole)
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "shrinking" in r.name]
    assert len(warned) == 1 and re.search("not cut before the end of training.*differ by 5.0e-01", warned[0])
    assert small.report["max_output_difference"] < 1e-9
    assert shrank(trained(tmp_path / "control"))  # the second call holds, and it is another run's


def test_the_second_cut_is_not_certified(tmp_path, monkeypatch):
    monkeypatch.setattr(shrinking, "certify", failing(shrinking.certify, {2}))
    whole, small = both(tmp_path)
    assert len(small.steps.cuts) == 1
    assert_same_end(whole, small)


def test_no_cut_is_certified(tmp_path, monkeypatch):
    """Nor at the end: the trained full model is on disk then."""
    monkeypatch.setattr(shrinking, "certify", failing(shrinking.certify, {1}))
    monkeypatch.setattr(whole, "certify", failing(whole.certify, {1}))
    with pytest.raises(OTOError, match=r"certificate failed.*saved in .*trained"):
        trained(tmp_path)
    dense = tf.ViTForImageClassification.from_pretrained(tmp_path / "trained")
    assert dense.config.intermediate_size == 24 and "oto" not in vars(dense.config)


def test_what_is_saved_when_the_end_fails_says_what_was_cut(tmp_path, monkeypatch):
    """A plain module's weights are of no use without that."""
    monkeypatch.setattr(shrinking, "certify", failing(shrinking.certify, {2}))
    monkeypatch.setattr(whole, "certify", failing(whole.certify, {1}))
    trainer = make(tmp_path, "plain")
    with pytest.raises(OTOError, match=r"certificate failed.*saved in .*trained"):
        trainer.train()
    assert len(trainer.steps.cuts) == 1
    plan = PruningPlan(json.loads((tmp_path / "trained" / CUTS_NAME).read_text())["plan"])
    model = compact(made("plain", 1), trainer.partition, plan)
    load_weights_(model, str(tmp_path / "trained"))
    assert same(weights(model), weights(trainer.model))


# copies of the weights -------------------------------------------------------------------------------


class CutAverage(Average):
    def on_compact(self, args, state, control, model, optimizer, cut, **kwargs):
        self.kept = cut.of_tensors(self.kept, model)


class Lagging(Average):
    """Breaks the rule: says that it cuts its copies, and doesn't."""

    def on_compact(self, *args, **kwargs):
        pass


def averaged(folder, name, shrink, cls):
    model = made(name)
    callback = cls(model)
    trainer = trained(folder, name, shrink, model=model, callbacks=[callback])
    return trainer, callback.kept


@pytest.mark.parametrize("name", ["vit", "bert", "resnet", "llama"])
def test_copies_of_the_weights_are_cut_alike(tmp_path, name):
    whole, average = averaged(tmp_path / "whole", name, False, Average)
    small, small_average = averaged(tmp_path / "small", name, True, CutAverage)
    assert_same_end(whole, small)
    cut_average = whole._cut.of_tensors(average, whole.model)
    assert distance(small_average, cut_average) < 1e-5
    assert not distance(small_average, weights_as_floats(small.model)) < 1e-3  # control: it is no copy


def weights_as_floats(model):
    return {name: t for name, t in weights(model).items() if t.is_floating_point()}


def test_copies_are_told_of_the_cuts_of_a_checkpoint(tmp_path, run):
    folder = checkpoint(run("vit", "adamw", True), 12)
    model = made("vit")
    callback = CutAverage(model)
    trained(tmp_path / "a", model=model, callbacks=[callback], resume=folder, **OPTIMIZERS["adamw"], **LOGGED)
    assert {name: t.shape for name, t in callback.kept.items()} == shapes(weights_as_floats(model))
    model = made("vit")
    with pytest.raises(AssertionError):  # control: copies that aren't cut have other shapes
        trained(tmp_path / "b", model=model, callbacks=[Lagging(model)], resume=folder, **OPTIMIZERS["adamw"])


def shapes(tensors):
    return {name: t.shape for name, t in tensors.items()}


def test_the_control_of_the_copies(tmp_path):
    with pytest.raises(AssertionError):
        averaged(tmp_path, "vit", True, Lagging)


def test_copies_that_can_not_be_cut(run):
    """Those of other names, of shapes from after the cut, and a tied tensor by another name than the cut's own."""
    trainer = run("vit", "adamw", True)
    cut, model = trainer._cut, trainer.model
    name, t = next((name, t) for name, t in model.named_parameters() if "fc1.weight" in name)
    with pytest.raises(ValueError, match=r"no parameter or buffer 'module.classifier.weight'"):
        cut.of_tensors({"module.classifier.weight": t}, model)
    with pytest.raises(ValueError, match=rf"before the cut {name} had shape \[24, 16\], and its copy has"):
        cut.of_tensors({name: t}, model)
    dense = torch.ones(24, 16)
    assert cut.of_tensors({name: dense}, model)[name].shape == t.shape
    model.get_submodule(name.rpartition(".")[0]).other_name = t
    other_name = name.replace(".weight", ".other_name")
    assert cut.of_tensors({other_name: dense}, model)[other_name].shape == t.shape
    del model.get_submodule(name.rpartition(".")[0]).other_name


# resuming --------------------------------------------------------------------------------------------


def without_times(report):
    sizes = {when: {key: report[when][key] for key in ("params", "macs", "bytes")} for when in ("before", "after")}
    return report | sizes | {"metrics": None}


@pytest.mark.parametrize(("name", "steps"), [("vit", (2, 4, 8, 12, 20)), ("llama", (2, 6, 12)), ("resnet", (4, 8))])
def test_resume_is_bit_identical(tmp_path, run, name, steps):
    """Before the first cut, at it, between two, at the last, and after it."""
    whole = run(name, "adamw", True)
    for step in steps:
        folder = checkpoint(whole, step)
        cuts_before = [cut for cut in whole.steps.cuts if cut <= step]
        assert Path(folder, CUTS_NAME).exists() == bool(cuts_before)
        again = trained(tmp_path / str(step), name, seed=1, resume=folder, **OPTIMIZERS["adamw"], **LOGGED)
        assert same_run(again, whole), step
        assert again.steps.cuts == whole.steps.cuts[len(cuts_before) :]
        assert record(again) == record(whole)
        assert without_times(again.report) == without_times(whole.before_evaluation)


class Uncut(OTOTrainer):
    """Breaks the rule: goes on with a new optimizer's state."""

    def _load_optimizer_and_scheduler(self, checkpoint):
        pass


class Whole(OTOTrainer):
    """Breaks the rule: loads neither cuts nor weights."""

    def _load_from_checkpoint(self, checkpoint):
        pass


def test_the_controls_of_resuming(tmp_path, run):
    whole = run("vit", "adamw", True)
    folder = tmp_path / "checkpoint-12"
    shutil.copytree(checkpoint(whole, 12), folder)
    assert not same_run(trained(tmp_path / "a", cls=Uncut, resume=str(folder)), whole)
    with pytest.raises(OTOError, match=r"cut out of the model of this optimizer state"):
        trained(tmp_path / "c", cls=Whole, resume=str(folder))
    (folder / CUTS_NAME).unlink()
    with pytest.raises(OTOError, match=r"checkpoint-12 is not of this .*of another shape there"):
        trained(tmp_path / "b", resume=str(folder))


@pytest.mark.parametrize("step", [8, 20])
@pytest.mark.parametrize("shrink", [True, False])
def test_resumed_the_other_way(tmp_path, run, step, shrink):
    """What is cut stays cut; what is zero and whole is cut at once if the run shrinks."""
    whole, other = run("vit", "adamw", shrink), run("vit", "adamw", not shrink)
    again = trained(tmp_path, shrink=shrink, resume=checkpoint(other, step), **OPTIMIZERS["adamw"])
    assert again.plan == whole.plan and record(again) == record(whole)
    assert distance(again.model, whole.model) < 1e-5
    assert shrank(again) == shrink
    if shrink:
        assert again.steps.cuts[0] == step + 1
    else:
        smaller = again.steps.params[step - STEPS] < other.steps.params[0]
        assert smaller and len({*again.steps.params}) == 1


def test_the_compact_model_is_not_the_one_to_resume_with(tmp_path, run):
    folder = checkpoint(run("vit", "adamw", True), 20)
    model = tf.ViTForImageClassification.from_pretrained(folder)
    with pytest.raises(OTOError, match=r"with the dense model that the run began with"):
        trained(tmp_path, model=model, resume=folder)


def test_what_an_older_run_has_left_in_a_folder_is_not_taken_for_cuts(tmp_path, run):
    trained(tmp_path, save_strategy="steps", save_steps=12)
    assert (tmp_path / "checkpoint-12" / CUTS_NAME).exists()
    whole = trained(tmp_path, shrink=False, save_strategy="steps", save_steps=12)
    assert same_run(trained(tmp_path / "b", shrink=False, resume=str(tmp_path / "checkpoint-12")), whole)


def test_a_resumed_run_with_a_dense_best_checkpoint_waits_for_the_end(tmp_path, caplog):
    """Its weights, if they are the best in the end, have to fit."""
    first = trained(tmp_path / "first", shrink=False, **(best(16) | dict(save_total_limit=None)))
    assert first.state.best_global_step == 16
    with caplog.at_level(logging.INFO, "hf_oto.shrinking"):
        again = trained(tmp_path / "again", resume=checkpoint(first, 18), **best(16, first=20))
    assert len(reasons_in(caplog)) == 1 and re.search("best checkpoint so far, .*checkpoint-16", reasons_in(caplog)[0])
    assert not shrank(again) and again.state.best_global_step == 16
    assert again.plan == first.plan and same(weights(again.model), weights(first.model))
    early = trained(tmp_path / "early", resume=checkpoint(first, 10), **best(16, first=12))  # control: no best one yet
    assert shrank(early)


def interrupted(folder, step, **more):
    trainer = make(folder, callbacks=[Interrupt(step, KeyboardInterrupt())], **more)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    return trainer


@pytest.mark.parametrize("step", [5, 13, 18])
def test_an_interrupted_run_resumes_in_the_same_object(tmp_path, run, step):
    """After the checkpoint of the step before, whose model was cut as often or less often."""
    whole = run("vit", "adamw", True)
    trainer = interrupted(tmp_path, step, save_strategy="steps", save_steps=4, **OPTIMIZERS["adamw"], **LOGGED)
    assert shrank(trainer)
    trainer.train(resume_from_checkpoint=True)
    assert same_run(trainer, whole) and record(trainer) == record(whole)


def test_an_interrupted_run_begins_anew(tmp_path):
    """Its model is dense again, with zeros where it was cut, as one is that was not cut."""
    runs = []
    for shrink in (False, True):
        trainer = interrupted(tmp_path / str(shrink), 18, shrink=shrink)
        assert shrank(trainer) == shrink
        trainer.steps.cuts.clear()
        tf.set_seed(42)  # as a new trainer does
        trainer.train()
        assert trainer.state.global_step == STEPS
        runs.append(trainer)
    assert_same_end(*runs)
    assert max(runs[1].steps.params) == runs[0].steps.params[0]


def test_memory_that_runs_out_after_a_cut(tmp_path):
    """The next try begins with the dense model."""
    whole, small = (
        trained(
            tmp_path / str(shrink), shrink=shrink, callbacks=[OutOfMemory(18)], auto_find_batch_size=True,
        )
        for shrink in (False, True)
    )  # fmt: skip
    assert whole._train_batch_size == small._train_batch_size == 3
    # it begins whole again, and what is dead by then is cut out after its first step
    assert len(small.steps.params) == 18 + STEPS and small.steps.params[18] == small.steps.params[17]
    assert_same_end(whole, small)


def test_a_checkpoint_that_can_not_be_loaded_leaves_no_cut_model(tmp_path, run):
    """`train()` without a checkpoint then trains as if there had been no attempt."""
    folder = tmp_path / "checkpoint-12"
    shutil.copytree(checkpoint(run("vit", "adamw", True), 12), folder)
    save(made("bert"), tmp_path / "other")
    shutil.copyfile(tmp_path / "other" / "model.safetensors", folder / "model.safetensors")
    trainer = make(tmp_path / "a")
    with pytest.raises(OTOError, match=r"checkpoint-12 is not of this"):
        trainer.train(resume_from_checkpoint=str(folder))
    assert type(trainer.model) is tf.ViTForImageClassification and record(trainer) is None
    assert same(weights(trainer.model), weights(made("vit")))
    tf.set_seed(42)
    trainer.train()
    assert same_run(trainer, trained(tmp_path / "b"))


def test_a_new_model_is_not_taken_for_the_one_that_was_cut(tmp_path, run):
    """What an earlier training has cut is none of the business of what `model_init` makes for the next one."""
    args = short_arguments(tmp_path / "a", max_steps=STEPS, **OPTIMIZERS["adamw"])
    trainer = OTOTrainer(model_init=lambda: made("vit"), args=args, train_dataset=rows("vit"))
    trainer.train()
    first = weights(trainer.model)
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(checkpoint(run("vit", "adamw", True), 2), folder)
    save(made("bert"), tmp_path / "other")
    shutil.copyfile(tmp_path / "other" / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(OTOError, match=r"checkpoint-2 is not of this"):
        trainer.train(resume_from_checkpoint=str(folder))
    trainer.train()
    assert same(weights(trainer.model), first)


class FailingOnce(OTOTrainer):
    """Fails after the weights are loaded, for which the optimizer is made, and before the first step."""

    calls = 0

    def create_optimizer(self, *args, **kwargs):
        self.calls += 1
        if self.calls == 2:
            raise KeyboardInterrupt
        return super().create_optimizer(*args, **kwargs)


def test_interrupted_between_the_weights_and_the_first_step(tmp_path, run):
    trainer = make(tmp_path / "a", cls=FailingOnce, **OPTIMIZERS["adamw"])
    folder = checkpoint(run("vit", "adamw", True), 12)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=folder)
    assert record(trainer)
    trainer.train()
    assert trainer.report["group_sparsity"] == 0.5
    dense = sum(p.numel() for p in made("vit").parameters())
    assert trainer.steps.params[-1] < dense == trainer.report["before"]["params"]


def in_new_process(folder, moment):
    """A run that is killed after a cut, or the one that resumes it."""
    torch.set_num_threads(1)
    killed = [Kill(13)] if moment == "killed" else []
    trainer = make(folder, callbacks=killed, save_strategy="steps", save_steps=4, **OPTIMIZERS["adamw"], **LOGGED)
    trainer.train(resume_from_checkpoint=not killed)
    torch.save({"weights": weights(trainer.model), "optimizer": trainer.watch.state}, Path(folder, "ended.pt"))


class Kill(Stop):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os._exit(9)


@pytest.mark.slow
def test_a_killed_process_is_resumed_by_a_new_one(tmp_path, run):
    code = (
        "import sys, torch; torch.set_num_threads(1); import test_shrinking as law; law.in_new_process(*sys.argv[1:])"
    )
    for moment, status in (("killed", 9), ("resumed", 0)):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), moment], cwd=Path(__file__).parent, capture_output=True,
            text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == status, done.stderr[-3000:]
    assert json.loads((tmp_path / "checkpoint-12" / CUTS_NAME).read_text())["plan"]
    ended, whole = torch.load(tmp_path / "ended.pt"), run("vit", "adamw", True)
    assert same(ended, {"weights": weights(whole.model), "optimizer": whole.watch.state})
