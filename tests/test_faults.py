"""What goes wrong around a run, and what must not: no training is lost, no example either, and nothing is left behind.

Every law has a control that breaks what it relies on.
"""

import functools
import gc
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections import defaultdict, deque
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from hf_oto import OTOError, OTOMixin, OTOTrainer, OTOTrainingArguments, ending, hub, whole
from hf_oto import trainer as trainer_module
from hf_oto.compaction import Compaction

STEPS = 16


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Runs take a tenth of the time without figures and long measurements, which are tested elsewhere."""
    monkeypatch.setattr(whole, "measure", functools.partial(whole.measure, seconds=0))
    monkeypatch.setattr(ending, "save_figures", lambda *_: None)


@pytest.fixture(autouse=True, scope="module")
def quick_collections():
    """The Trainer collects garbage four times a run: what was imported before is none."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def bert(**more):
    tf.set_seed(0)
    size = dict(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    return tf.BertForSequenceClassification(tf.BertConfig(**(size | more)))


class Small(tf.PreTrainedModel):
    """A text classifier that is partitioned in milliseconds."""

    config_class = tf.PreTrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.words, self.a, self.b = nn.Embedding(40, 8), nn.Linear(8, 16), nn.Linear(16, 2)
        self.drop = nn.Dropout(0.1)
        self.post_init()

    def forward(self, input_ids=None, labels=None):
        h = self.words(input_ids).mean(1)
        logits = self.b(self.drop(torch.relu(self.a(h))))
        return {"loss": None if labels is None else F.cross_entropy(logits, labels), "logits": logits}


def small(dropout=0.1):
    tf.set_seed(0)
    model = Small(tf.PreTrainedConfig())
    model.drop.p = dropout
    return model


def rows(n=64, length=6):
    rng = np.random.default_rng(0)
    return [{"input_ids": rng.integers(3, 40, length).tolist(), "labels": int(rng.integers(2))} for _ in range(n)]


def arguments(folder, cls=OTOTrainingArguments, **more):
    settings = dict(
        max_steps=STEPS, per_device_train_batch_size=4, learning_rate=1e-3, logging_steps=5, save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    return cls(str(folder), **(settings | more))


def make(folder, model=None, cls=OTOTrainer, data=None, args=None, **more):
    given = {name: more.pop(name) for name in NOT_ARGUMENTS & more.keys()}
    args = args or arguments(folder, **more)
    return cls(model or small(), args, train_dataset=rows() if data is None else data, **given)


NOT_ARGUMENTS = {"callbacks", "eval_dataset", "data_collator", "compute_loss_func", "compute_metrics"}


def leftovers(folder):
    """What a run has left in its folder that only it knows of."""
    return [path.name for path in Path(folder).glob("*") if path.name.startswith(("trained", "rehearsal"))]


def last_weights_of(cls):
    """A trainer class that remembers the weights after each optimizer step."""

    class Remembering(cls):
        def create_optimizer(self, *args):
            optimizer = super().create_optimizer(*args)
            optimizer.register_step_post_hook(lambda *_: setattr(self, "after_step", snapshot(self.model)))
            return optimizer

    return Remembering


def snapshot(model):
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def saved_in(error):
    """The folder that an error names."""
    return re.search(r"saved in (\S+?)(?: |$)", str(error), re.MULTILINE)[1]


def same_weights(folder, expected):
    found = Small.from_pretrained(folder).state_dict()
    return found.keys() == expected.keys() and all(torch.equal(t, expected[name]) for name, t in found.items())


# trained is saved ------------------------------------------------------------------------------------


class Breaking(tf.TrainerCallback):
    """Raises at the first event of a kind from a step on."""

    def __init__(self, event, error, step=STEPS):
        self.event, self.error, self.step = event, error, step

    def __getattribute__(self, name):
        if name.startswith("on_") and name == object.__getattribute__(self, "event"):
            return self.raise_
        return object.__getattribute__(self, name)

    def raise_(self, args, state, control, **kwargs):
        if state.global_step >= self.step:
            raise self.error


EVENTS = ["on_step_end", "on_epoch_end", "on_evaluate", "on_prediction_step", "on_save", "on_log", "on_train_end"]


@pytest.mark.parametrize("event", EVENTS)
def test_a_callback_that_fails_after_the_last_step(tmp_path, event):
    own = RuntimeError("my own error")
    trainer = make(
        tmp_path, cls=last_weights_of(OTOTrainer), callbacks=[Breaking(event, own)], eval_dataset=rows(8),
        save_strategy="steps", save_steps=STEPS, eval_strategy="steps", eval_steps=STEPS,
    )  # fmt: skip
    with pytest.raises(OTOError, match="after the last step: RuntimeError: my own error") as raised:
        trainer.train()
    assert raised.value.__cause__ is own
    assert same_weights(saved_in(raised.value), trainer.after_step)
    assert leftovers(tmp_path) == ["trained"]


@pytest.mark.parametrize("event", ["on_pre_optimizer_step", "on_optimizer_step"])
def test_the_last_step_itself(tmp_path, event):
    """After the optimizer's last step the model is trained, though the Trainer hasn't counted it yet."""
    own = RuntimeError("my own error")
    trainer = make(tmp_path, cls=last_weights_of(OTOTrainer), callbacks=[Breaking(event, own, STEPS - 1)])
    trained = event == "on_optimizer_step"
    with pytest.raises(OTOError if trained else RuntimeError, match="my own error") as raised:
        trainer.train()
    assert leftovers(tmp_path) == (["trained"] if trained else [])
    assert not trained or same_weights(saved_in(raised.value), trainer.after_step)


@pytest.mark.parametrize("event", ["on_step_end", "on_evaluate", "on_log"])
def test_an_error_in_the_middle_is_the_stock_trainers(tmp_path, event):
    own = RuntimeError("my own error")
    raised = []
    for cls, kind in ((tf.Trainer, tf.TrainingArguments), (OTOTrainer, OTOTrainingArguments)):
        args = arguments(tmp_path / cls.__name__, kind, eval_strategy="steps", eval_steps=5)
        trainer = make(tmp_path, cls=cls, args=args, callbacks=[Breaking(event, own, 5)], eval_dataset=rows(8))
        with pytest.raises(RuntimeError) as error:
            trainer.train()
        raised.append(error.value)
        assert os.listdir(tmp_path / cls.__name__) == []
    assert raised == [own, own] and own.__cause__ is None


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(3)])
@pytest.mark.parametrize("step", [STEPS, 6])
def test_what_stops_a_program_stays_what_it_is(tmp_path, stop, step, caplog):
    trainer = make(tmp_path, cls=last_weights_of(OTOTrainer), callbacks=[Breaking("on_step_end", stop, step)])
    with pytest.raises(type(stop)) as raised:
        trainer.train()
    assert raised.value is stop
    assert leftovers(tmp_path) == (["trained"] if step == STEPS else [])
    if step == STEPS:
        assert same_weights(tmp_path / "trained", trainer.after_step) and str(tmp_path / "trained") in caplog.text


def test_ctrl_c_stays_ctrl_c_on_a_full_disk(tmp_path, monkeypatch, caplog):
    trainer = make(tmp_path, callbacks=[Breaking("on_train_end", KeyboardInterrupt())])
    fill_the_disk(monkeypatch, trainer)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert "in memory" in caplog.text and leftovers(tmp_path) == []


def fill_the_disk(monkeypatch, trainer, after=1):
    """Saving fails from the call `after` (0 is the rehearsal) on, with a part of it written."""
    right, calls = trainer._save, iter(range(10))

    def save(folder, *args, **kwargs):
        if next(calls) < after:
            return right(folder, *args, **kwargs)
        trainer.model.config.save_pretrained(folder)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer, "_save", save)


@pytest.mark.parametrize("event", ["on_train_end", None])
def test_a_full_disk_leaves_the_trained_model_in_memory(tmp_path, monkeypatch, event):
    """The half-saved folder is deleted, and the trainer still has the whole model."""
    trainer = make(
        tmp_path, cls=last_weights_of(OTOTrainer), callbacks=[Breaking(event, RuntimeError("own"))] if event else []
    )
    fill_the_disk(monkeypatch, trainer)
    with pytest.raises(OTOError, match=r"No space left on device.*in memory still, as trainer.model") as raised:
        trainer.train()
    assert type(raised.value.__cause__) is (RuntimeError if event else OSError)
    assert leftovers(tmp_path) == []
    now = trainer.model.state_dict()
    assert all(torch.equal(t, now[name]) for name, t in trainer.after_step.items())


def test_a_full_disk_and_a_checkpoint_of_the_last_step(tmp_path, monkeypatch):
    trainer = make(tmp_path, cls=last_weights_of(OTOTrainer), save_strategy="steps", save_steps=STEPS)
    fill_the_disk(monkeypatch, trainer, after=2)  # the checkpoint could still be written
    trainer.train()  # that is safe enough
    assert trainer.report is not None and leftovers(tmp_path) == []
    assert same_weights(tmp_path / f"checkpoint-{STEPS}", trainer.after_step)
    again = make(
        tmp_path, cls=last_weights_of(OTOTrainer), save_strategy="steps", save_steps=STEPS,
        callbacks=[Breaking("on_train_end", RuntimeError("own"))],
    )  # fmt: skip
    fill_the_disk(monkeypatch, again, after=2)
    with pytest.raises(OTOError, match="own") as raised:
        again.train()
    assert saved_in(raised.value) == str(tmp_path / f"checkpoint-{STEPS}")
    assert same_weights(saved_in(raised.value), again.after_step)
    third = make(tmp_path, callbacks=[Breaking("on_train_end", RuntimeError("own"))])  # control: that one is old
    fill_the_disk(monkeypatch, third)
    with pytest.raises(OTOError, match="in memory still"):
        third.train()


def test_a_full_output_disk_makes_it_save_on_another_one(tmp_path, monkeypatch):
    """Where only the output folder can't be written, the model is saved in the system's temporary one."""
    out, other = tmp_path / "out", tmp_path / "other"
    other.mkdir()
    trainer = make(out, cls=last_weights_of(OTOTrainer), callbacks=[Breaking("on_train_end", RuntimeError("own"))])
    right = trainer._save
    fill_the_disk(monkeypatch, trainer)
    full = trainer._save
    monkeypatch.setattr(trainer, "_save", lambda folder, *a: (full if str(out) in folder else right)(folder, *a))
    monkeypatch.setattr(tempfile, "tempdir", str(other))
    with pytest.raises(OTOError, match="own") as raised:
        trainer.train()
    assert saved_in(raised.value).startswith(str(other)) and leftovers(out) == []
    assert same_weights(saved_in(raised.value), trainer.after_step)


@pytest.mark.parametrize(
    "owner, broken", [(whole, "certify"), (Compaction, "keep_"), (Compaction, "resolve"), (ending, "Report")]
)
@pytest.mark.parametrize("error", [RuntimeError("own"), torch.OutOfMemoryError("CUDA out of memory. Tried")])
def test_what_fails_while_compacting(tmp_path, monkeypatch, owner, broken, error):
    trainer = make(tmp_path, cls=last_weights_of(OTOTrainer), shrink=False)

    def fail(*args, **kwargs):
        raise error

    def break_it(*_, **__):
        monkeypatch.setattr(owner, broken, fail)

    trainer.add_callback(type("Late", (tf.TrainerCallback,), {"on_train_end": break_it})())
    expected = OTOError if type(error) is RuntimeError else torch.OutOfMemoryError
    with pytest.raises(expected, match=r"the trained model is saved in .*trained") as raised:
        trainer.train()
    assert raised.value.__cause__ is error
    assert same_weights(tmp_path / "trained", trainer.after_step)


@pytest.mark.parametrize("shrink", [True, False])
def test_a_model_that_no_longer_runs_is_saved(tmp_path, shrink):
    """Also where all zeros have been cut out, and certified, while it trained."""
    trainer = make(tmp_path, cls=last_weights_of(OTOTrainer), shrink=shrink)

    def break_it(*_, model, **__):
        def forward(*args, **kwargs):
            raise ArithmeticError("own")

        model.forward = forward

    trainer.add_callback(type("Late", (tf.TrainerCallback,), {"on_train_end": break_it})())
    with pytest.raises(OTOError, match=r"own.*saved in .*trained"):
        trainer.train()
    assert same_weights(tmp_path / "trained", trainer.after_step)


def test_evaluation_and_best_model_loading_that_fail(tmp_path, monkeypatch):
    def metrics(prediction):
        raise KeyError("accuracy")

    evaluated = make(
        tmp_path / "a", cls=last_weights_of(OTOTrainer), eval_strategy="steps", eval_steps=STEPS, eval_dataset=rows(8),
        compute_metrics=metrics,
    )  # fmt: skip
    with pytest.raises(OTOError, match="after the last step: KeyError") as raised:
        evaluated.train()
    assert same_weights(saved_in(raised.value), evaluated.after_step)

    class NoBest(last_weights_of(OTOTrainer)):
        def _load_best_model(self):
            raise OSError("the best checkpoint is gone")

    best = make(
        tmp_path / "b", cls=NoBest, eval_strategy="steps", eval_steps=STEPS, save_strategy="steps", save_steps=STEPS,
        load_best_model_at_end=True, eval_dataset=rows(8),
    )  # fmt: skip
    with pytest.raises(OTOError, match="the best checkpoint is gone") as raised:
        best.train()
    assert same_weights(saved_in(raised.value), best.after_step)


def test_early_stopping_counts_as_trained(tmp_path):
    class Stop(tf.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 13

    own = RuntimeError("own")
    trainer = make(tmp_path, cls=last_weights_of(OTOTrainer), callbacks=[Stop(), Breaking("on_train_end", own, 1)])
    with pytest.raises(OTOError) as raised:
        trainer.train()
    assert raised.value.__cause__ is own and same_weights(saved_in(raised.value), trainer.after_step)


def test_resumed_at_its_last_step(tmp_path):
    """Nothing is left to train there, so an error counts as one after the last step."""
    data = rows(4 * STEPS)
    make(tmp_path / "a", data=data, save_strategy="steps", save_steps=STEPS).train()
    again = make(tmp_path / "b", data=data, callbacks=[Breaking("on_train_end", RuntimeError("own"))])
    checkpoint = tmp_path / "a" / f"checkpoint-{STEPS}"
    with pytest.raises(OTOError, match="own") as raised:
        again.train(resume_from_checkpoint=str(checkpoint))
    assert same_weights(saved_in(raised.value), load_file(checkpoint / "model.safetensors"))


def test_an_old_folder_of_that_name_is_not_this_runs(tmp_path):
    """The model of an earlier run is neither taken for this one's, nor lost."""
    first = make(tmp_path, cls=last_weights_of(OTOTrainer), callbacks=[Breaking("on_train_end", RuntimeError("1"))])
    with pytest.raises(OTOError):
        first.train()
    again = make(
        tmp_path, cls=last_weights_of(OTOTrainer), callbacks=[Breaking("on_train_end", RuntimeError("2"))], seed=1
    )
    with pytest.raises(OTOError) as raised:
        again.train()
    assert same_weights(saved_in(raised.value), again.after_step)
    assert not same_weights(saved_in(raised.value), first.after_step)
    assert same_weights(tmp_path / "trained", first.after_step)
    make(tmp_path).train()  # one that succeeds leaves what others left
    assert same_weights(tmp_path / "trained", first.after_step)


def test_a_second_train_that_fails_before_it_begins(tmp_path, monkeypatch):
    """The end of the first training is no end of the second one."""
    trainer = OTOTrainer(model_init=lambda: small(), args=arguments(tmp_path), train_dataset=rows())
    trainer.train()
    own = ValueError("no such checkpoint")
    monkeypatch.setattr(trainer, "_load_from_checkpoint", lambda *_: (_ for _ in ()).throw(own))
    with pytest.raises(ValueError) as raised:
        trainer.train(resume_from_checkpoint="anywhere")
    assert raised.value is own and leftovers(tmp_path) == []


def test_after_a_failure_the_same_trainer_goes_on(tmp_path, monkeypatch):
    once = iter([RuntimeError("own")])

    class Breaks(tf.TrainerCallback):
        def on_train_end(self, *args, **kwargs):
            for error in once:
                raise error

    trainer = make(tmp_path, callbacks=[Breaks()])
    with pytest.raises(OTOError):
        trainer.train()
    trainer.train()
    assert trainer.report["group_sparsity"] == pytest.approx(0.5, abs=0.05)


def test_nothing_is_left_after_success(tmp_path):
    """Code that rotates, pushes or lists checkpoints never sees our folders either."""
    seen = set()

    class Looking(tf.TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            seen.update(os.listdir(args.output_dir))

        on_train_end = on_save

    trainer = make(
        tmp_path, save_strategy="steps", save_steps=4, save_total_limit=1, eval_strategy="steps", eval_steps=4,
        load_best_model_at_end=True, eval_dataset=rows(8), callbacks=[Looking()],
    )  # fmt: skip
    trainer.train()
    assert leftovers(tmp_path) == []
    assert seen and all(name.startswith("checkpoint-") for name in seen)


def test_training_memory_is_gone_when_the_cut_is_certified(tmp_path, monkeypatch):
    """Gradients, optimizer state, schedule: no one holds them while the model is certified."""
    held, alive = [], []

    class Watching(tf.TrainerCallback):
        def on_train_end(self, *args, model, optimizer, lr_scheduler, **kwargs):
            inner = optimizer.optimizer
            states = [v for state in inner.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
            for p in model.parameters():
                p.grad = torch.zeros_like(p)  # a callback's own backward leaves gradients, the Trainer leaves none
            held.extend(map(weakref.ref, [optimizer, inner, lr_scheduler, *states]))

    right = whole.certify

    def certify(model, *args):
        gc.collect()
        alive.extend(ref() for ref in held if ref() is not None)
        assert all(p.grad is None for p in model.parameters())
        return right(model, *args)

    monkeypatch.setattr(whole, "certify", certify)
    make(tmp_path, callbacks=[Watching()]).train()
    assert len(held) > 10 and alive == []


# what only warns -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("owner", "broken"), [(ending, "save_figures"), (whole, "measure")])
def test_figures_and_latency_only_warn(tmp_path, monkeypatch, owner, broken, caplog):
    def fail(*args, **kwargs):
        raise RuntimeError("no pen")

    monkeypatch.setattr(owner, broken, fail)
    trainer = make(tmp_path, eval_dataset=rows(8))
    trainer.train()
    trainer.evaluate()
    trainer.save_model(str(tmp_path / "small"))
    assert "no pen" in caplog.text and "parameters" in str(trainer.report) and trainer.report._repr_html_()
    again = Small.from_pretrained(tmp_path / "small")
    assert sum(p.numel() for p in again.parameters()) < trainer.report["before"]["params"]
    assert trainer.report["after"]["params"] == sum(p.numel() for p in again.parameters())


@pytest.mark.parametrize("name", ["_latency", "macs"])
def test_each_measurement_may_fail_alone(tmp_path, monkeypatch, name, caplog):
    from hf_oto import report as report_module

    def fail(*args, **kwargs):
        raise RuntimeError("no clock")

    trainer = make(tmp_path)
    monkeypatch.setattr(report_module, name, fail)
    trainer.train()
    shown = str(trainer.report)
    assert trainer.report["after"]["params"] < trainer.report["before"]["params"]
    assert "parameters" in shown and "no clock" in caplog.text


def test_a_card_that_fails_only_warns(tmp_path, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise RuntimeError("no ink")

    trainer = make(tmp_path, small())
    trainer.train()
    trainer.model.config.model_type = "bert"  # which the stock card asks for
    trainer.create_model_card(model_name="mine")
    assert "A compact model" in (tmp_path / "README.md").read_text()  # control
    monkeypatch.setattr(hub, "model_card", fail)
    trainer.create_model_card(model_name="mine")
    assert "no ink" in caplog.text and "A compact model" not in (tmp_path / "README.md").read_text()


def test_a_model_without_multiplications_has_a_report(tmp_path):
    """Its share of MACs is no division by zero."""
    from hf_oto.report import table

    text = table({"params": 10, "macs": 0}, {"params": 5, "macs": 0})
    assert "50 %" in text and "MACs" in text


# found out before the first step ---------------------------------------------------------------------


class Net(tf.PreTrainedModel):
    config_class = tf.PreTrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)
        self.post_init()

    def forward(self, x=None, labels=None):
        logits = self.b(torch.relu(self.a(x)))
        return {"loss": F.cross_entropy(logits, labels) if labels is not None else None, "logits": logits}


def vectors(n=64):
    g = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(6, generator=g), "labels": i % 3} for i in range(n)]


class Demanding(Net):
    def __init__(self, config, teacher):
        super().__init__(config)


def unserialisable():
    config = tf.PreTrainedConfig()
    config.when = object()
    return Net(config)


def sharing():
    model = Net(tf.PreTrainedConfig())
    model.register_buffer("part", model.b.weight.detach()[:2])
    return model


class PlainNet(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        if tied:
            self.c.weight = self.b.weight

    def forward(self, x, labels=None):
        logits = self.d(torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x)))))))
        return (
            {"loss": F.cross_entropy(logits, labels), "logits": logits} if labels is not None else {"logits": logits}
        )


HOPELESS = {
    "a config that is no JSON": (unserialisable, "JSON|object"),
    "a view of a weight": (sharing, "part has shape"),
    "a constructor that wants more": (lambda: Demanding(tf.PreTrainedConfig(), teacher=None), "teacher"),
    "a plain module with tied weights": (lambda: PlainNet(tied=True), "share memory"),
}


@pytest.mark.parametrize("name", HOPELESS)
def test_what_cannot_be_saved_is_found_out_before_the_first_step(tmp_path, name):
    build, message = HOPELESS[name]
    trainer = make(tmp_path, build(), data=vectors())
    with pytest.raises(OTOError, match=rf"(?s)tried before the first step: .*({message})"):
        trainer.train()
    assert trainer.state.global_step == 0 and leftovers(tmp_path) == []
    make(tmp_path, Net(tf.PreTrainedConfig()), data=vectors()).train()  # control


def test_a_disk_without_room_for_the_model(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    trainer = make(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OTOError, match="1,000 bytes"):
        trainer.train()
    assert trainer.state.global_step == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(total=0, free=0))  # it doesn't know
    trainer.train()


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(tmp_path))

    trainer = make(tmp_path)
    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises((OTOError, PermissionError), match="Permission denied"):
        trainer.train()
    assert trainer.state.global_step == 0


FRESH = """
import sys, torch
from safetensors.torch import load_file
sys.path.insert(0, sys.argv[2])
from test_faults import PlainNet
import hf_oto

model, batch = PlainNet(), {"x": torch.zeros(2, 6)}
plan = hf_oto.PruningPlan.from_json(open(f"{sys.argv[1]}/oto_plan.json").read())
model = hf_oto.compact(model, hf_oto.partition_zigs(model, batch), plan)
model.load_state_dict(load_file(f"{sys.argv[1]}/model.safetensors"))
torch.save(model.eval()(torch.ones(3, 6))["logits"], f"{sys.argv[1]}/logits.pt")
"""


def test_a_plain_module_is_loaded_again_in_another_process(tmp_path):
    tf.set_seed(0)
    trainer = make(tmp_path, PlainNet(), data=vectors())
    trainer.train()
    trainer.save_model(str(tmp_path / "small"))
    (tmp_path / "load.py").write_text(FRESH)
    command = [sys.executable, str(tmp_path / "load.py"), str(tmp_path / "small"), os.path.dirname(__file__)]
    subprocess.run(command, check=True)
    with torch.no_grad():
        expected = trainer.model.eval()(torch.ones(3, 6))["logits"]
    assert torch.equal(torch.load(tmp_path / "small" / "logits.pt"), expected)
    with pytest.raises(RuntimeError, match="size mismatch"):  # control: the plan is what makes it fit
        PlainNet().load_state_dict(load_file(tmp_path / "small" / "model.safetensors"))


# data ------------------------------------------------------------------------------------------------


class Stock(tf.Trainer):
    """Notes the batches that it trains on."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.__dict__.setdefault("batches", []).append({k: v.clone() for k, v in inputs.items()})
        return super().training_step(model, inputs, *args, **kwargs)


class Ours(OTOMixin, Stock):
    pass


class Once(torch.utils.data.IterableDataset):
    """A stream that is read once: every iteration goes on where the last one ended."""

    def __init__(self, n=4 * STEPS):
        self.iterator = iter(rows(n))

    def __iter__(self):
        return self.iterator


class OnceInAGenerator(Once):
    def __iter__(self):
        for row in self.iterator:
            yield dict(row)


class Sized(torch.utils.data.IterableDataset):
    def __init__(self, n=30):
        self.n = n

    def __iter__(self):
        yield from rows(self.n)

    def __len__(self):
        return self.n


class Shuffled(torch.utils.data.IterableDataset):
    """A stream in another order every time, by a generator of its own."""

    def __init__(self, n=30):
        self.rng, self.n = random.Random(0), n

    def __iter__(self):
        order = rows(self.n)
        self.rng.shuffle(order)
        yield from order


class Epochs(torch.utils.data.IterableDataset):
    def __init__(self, n=20):
        self.n, self.epoch = n, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = rows(self.n)
        random.Random(self.epoch).shuffle(order)
        yield from order


class Described(torch.utils.data.IterableDataset):
    """The trainer looks at what it is, and sets what it does."""

    limit = 5

    def __iter__(self):
        for i, row in enumerate(rows()):
            yield row if i < self.limit else row | {"labels": 0}


class Keyed(torch.utils.data.Dataset):
    """Rows by name: no index is one."""

    def __init__(self):
        self.named = {f"row-{i}": row for i, row in enumerate(rows())}

    def __getitem__(self, key):
        return self.named[key]

    def __len__(self):
        return len(self.named)


class Augmented(torch.utils.data.Dataset):
    """Numbers drawn from everywhere, one of them its own generator, for every example."""

    def __init__(self):
        self.rng, self.rows, self.taken = np.random.default_rng(0), rows(), 0

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        self.taken += 1
        noise = random.randrange(5) + int(np.random.randint(5)) + int(torch.randint(5, ())) + int(self.rng.integers(5))
        return {"input_ids": [*self.rows[i]["input_ids"], noise], "labels": self.rows[i]["labels"]}


class NoLength(torch.utils.data.Dataset):
    def __getitem__(self, i):
        return rows()[i]


def stacked(some):
    return {
        "input_ids": torch.tensor([r["input_ids"] for r in some]),
        "labels": torch.tensor([r["labels"] for r in some]),
    }


def at_least_four(some):
    assert len(some) >= 4, "too few"
    return stacked(some)


def masked(some):
    """A collator that draws from torch's and numpy's own."""
    batch = stacked(some)
    hidden = torch.rand(batch["input_ids"].shape) < 0.3
    batch["input_ids"][hidden] = 3 + int(np.random.randint(30))
    return batch


class OwnMask:
    """A collator with a generator of its own, and a count."""

    def __init__(self):
        self.generator, self.calls = torch.Generator().manual_seed(1), 0

    def __call__(self, some):
        self.calls += 1
        batch = stacked(some)
        batch["input_ids"][torch.rand(batch["input_ids"].shape, generator=self.generator) < 0.3] = 3 + self.calls % 30
        return batch


def taking(some):
    labels = torch.tensor([r.pop("labels") for r in some])
    return {"input_ids": torch.tensor([r["input_ids"] for r in some]), "labels": labels}


def labelling(some):
    """Labels are made in the collator, of every second sum."""
    ids = torch.tensor([r["input_ids"] for r in some])
    return {"input_ids": ids, "labels": ids.sum(1) % 2}


def by_length(n=64):
    return [{"input_ids": [3 + i % 30] * (3 + i % 7), "labels": i % 2} for i in range(n)]


def padded(some):
    length = max(len(r["input_ids"]) for r in some)
    ids = [r["input_ids"] + [0] * (length - len(r["input_ids"])) for r in some]
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor([r["labels"] for r in some])}


def plain_stream(n=64):
    yield from rows(n)


def loading(make_loader):
    """Both trainers with another training data loader."""
    return tuple(
        type(cls.__name__, (cls,), {"get_train_dataloader": lambda self: make_loader(self)}) for cls in (Stock, Ours)
    )


def generator_function(self):
    for i in range(0, 4 * STEPS, 4):
        yield stacked(rows()[i : i + 4])


def one_generator(self):
    if "loader" not in vars(self):
        self.loader = generator_function(self)
    return self.loader


class Batches:
    """A data loader of one's own, with a length and no more."""

    def __iter__(self):
        return generator_function(None)

    def __len__(self):
        return STEPS


class Transformed(torch.utils.data.IterableDataset):
    """Wraps the trainer's stream, whose raw rows no collator takes."""

    def __init__(self, source):
        self.source = source

    def __iter__(self):
        for row in self.source:
            yield {"input_ids": row["words"], "labels": row["labels"]}


class Words(Once):
    def __iter__(self):
        for row in self.iterator:
            yield {"words": row["input_ids"], "labels": row["labels"]}


class EveryThird(torch.utils.data.Sampler):
    """A batch sampler with a state: every iteration starts elsewhere."""

    start = 0

    def __init__(self):
        pass

    def __iter__(self):
        self.start += 1
        for i in range(len(self)):
            yield [(self.start + 3 * (4 * i + k)) % 64 for k in range(4)]

    def __len__(self):
        return 16


SITUATIONS = {
    "a stream read once": dict(data=Once),
    "a stream read once, in a generator": dict(data=OnceInAGenerator),
    "a stream read once, with accumulation": dict(
        data=lambda: Once(8 * STEPS), gradient_accumulation_steps=2, reads=8 * STEPS
    ),
    "a stream read once, two workers": dict(data=Once, dataloader_num_workers=2),
    "a stream in a generator, two workers": dict(data=OnceInAGenerator, dataloader_num_workers=2),
    "a stream with a length": dict(data=Sized, max_steps=-1, num_train_epochs=2),
    "a stream in another order every time": dict(data=Shuffled),
    "a stream that is told its epoch": dict(data=Epochs),
    "a streaming data set": dict(data=lambda: datasets.IterableDataset.from_generator(plain_stream)),
    "a shuffled streaming data set": dict(
        data=lambda: datasets.IterableDataset.from_generator(plain_stream).shuffle(seed=3, buffer_size=9)
    ),
    "a data set": dict(data=lambda: datasets.Dataset.from_list(rows())),
    "random numbers in the data set": dict(data=Augmented),
    "a random collator": dict(data_collator=lambda: masked),
    "a collator with a generator of its own": dict(data_collator=OwnMask),
    "a collator that wants four examples": dict(data_collator=lambda: at_least_four),
    "a collator that labels": dict(
        data=lambda: [{"input_ids": r["input_ids"]} for r in rows()], data_collator=lambda: labelling
    ),
    "one example a batch, of its own length": dict(
        data=by_length, data_collator=lambda: stacked, per_device_train_batch_size=1
    ),
    "examples sorted by length, padded": dict(
        data=lambda: sorted(by_length(), key=lambda r: len(r["input_ids"])), data_collator=lambda: padded
    ),
    "a collator that takes keys out": dict(data_collator=lambda: taking, remove_unused_columns=False),
    "a collator that takes keys out of a stream": dict(
        data=Once, data_collator=lambda: taking, remove_unused_columns=False
    ),
    "a worker that persists": dict(
        data=Once, data_collator=lambda: stacked, dataloader_num_workers=1, dataloader_persistent_workers=True
    ),
    "one example": dict(data=lambda: rows(1)),
    "grouped by length": dict(
        data=lambda: datasets.Dataset.from_list(by_length()), data_collator=lambda: padded,
        train_sampling_strategy="group_by_length",
    ),
    "a list of batches": dict(loader=lambda self: [stacked(rows()[i : i + 4]) for i in range(0, 64, 4)]),
    "a generator function": dict(loader=generator_function),
    "one generator": dict(loader=one_generator),
    "a loader without a data set": dict(loader=lambda self: Batches()),
    "no length, a sampler": dict(
        loader=lambda self: torch.utils.data.DataLoader(
            NoLength(), batch_size=4, collate_fn=stacked, sampler=range(4 * STEPS)
        )
    ),
    "rows by name": dict(
        loader=lambda self: torch.utils.data.DataLoader(
            Keyed(), batch_size=4, collate_fn=stacked, sampler=[f"row-{i}" for i in range(64)]
        )
    ),
    "a data set of batches": dict(
        loader=lambda self: torch.utils.data.DataLoader(
            [stacked(rows()[i : i + 4]) for i in range(0, 64, 4)], batch_size=None
        )
    ),
    "a batch sampler": dict(
        loader=lambda self: torch.utils.data.DataLoader(rows(), batch_sampler=EveryThird(), collate_fn=stacked)
    ),
    "a stream that the loader transforms": dict(
        data=Words,
        loader=lambda self: torch.utils.data.DataLoader(
            Transformed(self.train_dataset), batch_size=4, collate_fn=stacked
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SITUATIONS)
def test_the_batches_are_those_of_the_stock_trainer(tmp_path, name):
    """Every example, in its order, bit by bit: what is looked at before the first step is trained on all the same."""
    situation = dict(SITUATIONS[name])
    loader, collator = situation.pop("loader", None), situation.pop("data_collator", None)
    reads, data = situation.pop("reads", None), situation.pop("data", rows)
    classes = loading(loader) if loader else (Stock, Ours)
    seen, steps = [], []
    for cls in classes:
        kind = OTOTrainingArguments if issubclass(cls, OTOMixin) else tf.TrainingArguments
        made = {"data_collator": collator()} if collator else {}
        # dropout of a model that shrinks draws fewer numbers, and then the data draw others
        model = small(dropout=0.0)
        trainer = make(tmp_path, model, cls=cls, data=data(), args=arguments(tmp_path, kind, **situation), **made)
        trainer.train()
        seen.append(trainer.batches)
        steps.append(trainer.state.global_step)
    stock, ours = seen
    assert steps[0] == steps[1] > 0 and len(stock) == len(ours)
    for a, b in zip(stock, ours, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert reads is None or sum(len(b["labels"]) for b in ours) == reads


def test_a_stream_that_is_too_short_ends_as_with_the_stock_trainer(tmp_path):
    ends = []
    for cls, kind in ((Stock, tf.TrainingArguments), (Ours, OTOTrainingArguments)):
        trainer = make(tmp_path, cls=cls, data=Once(4 * STEPS - 6), args=arguments(tmp_path, kind))
        with pytest.raises(ValueError, match="end of all iterable data") as raised:
            trainer.train()
        ends.append((type(raised.value), str(raised.value), len(trainer.batches)))
    assert ends[0] == ends[1] and ends[0][2] == STEPS - 1


def test_the_control_of_the_batches(tmp_path):
    """One example that is taken beforehand changes them, and so does one random number."""

    def first_batch(taken=0, drawn=0):
        """Of a training before which so many examples were taken, and so many random numbers drawn."""
        data = Once(5 * STEPS)
        args = arguments(tmp_path, tf.TrainingArguments)
        trainer = make(tmp_path, cls=Stock, data=data, args=args, data_collator=masked)
        for _ in range(taken):
            next(data.iterator)
        torch.rand(drawn)
        trainer.train()
        return trainer.batches[0]["input_ids"]

    right = first_batch()
    assert torch.equal(right, first_batch())
    assert not torch.equal(right, first_batch(taken=1))
    assert not torch.equal(right, first_batch(drawn=1))


@pytest.mark.parametrize("data", [Epochs, rows, Augmented])
@pytest.mark.parametrize("step", [4, 8])
def test_resumed_data_are_those_of_the_stock_trainer(tmp_path, data, step):
    seen = []
    for cls, kind in ((Stock, tf.TrainingArguments), (Ours, OTOTrainingArguments)):
        folder = tmp_path / cls.__name__
        size = dict(max_steps=STEPS, save_strategy="steps", save_steps=step)
        make(folder, small(dropout=0.0), cls=cls, data=data(), args=arguments(folder, kind, **size)).train()
        again = make(folder, small(dropout=0.0), cls=cls, data=data(), args=arguments(folder, kind, **size))
        again.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        seen.append([b["input_ids"] for b in again.batches])
    assert len(seen[0]) == len(seen[1]) == STEPS - step
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_a_stream_is_still_what_it_was(tmp_path):
    """Callbacks and loaders see the user's own object: its class, its length, what they set."""
    data, found = Described(), []

    class Looking(tf.TrainerCallback):
        def on_train_begin(self, *args, train_dataloader, **kwargs):
            found.append(isinstance(train_dataloader.dataset, Described))
            train_dataloader.dataset.limit = 10**6

    trainer = make(tmp_path, cls=Ours, data=data, callbacks=[Looking()])
    trainer.train()
    assert found == [True] and data.limit == 10**6 and trainer.train_dataset is data
    assert sum(int(b["labels"].sum()) for b in trainer.batches) > 5  # what was set counts
    assert type(data) is Described and "__iter__" not in vars(data)


def test_first_examples_without_labels_or_with_infinite_losses(tmp_path):
    class Odd(OTOTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            return loss * float("nan") if (inputs["input_ids"] == 39).all() else loss

    data = [{"input_ids": [39] * 6, "labels": 0}] * 2 + rows()[2:]
    trainer = make(tmp_path, cls=Odd, data=data, max_grad_norm=0.0, logging_nan_inf_filter=True)
    calls = trainer.trace_calls()
    assert not (calls[0].kwargs["input_ids"] == 39).all()
    trainer = make(tmp_path, cls=Odd, data=rows())
    assert torch.equal(
        trainer.trace_calls()[0].kwargs["input_ids"], torch.tensor([r["input_ids"] for r in rows()[:2]])
    )


def test_no_example_at_all(tmp_path):
    class Empty(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(OTOError, match=r"has no example|does not contain any data"):
        make(tmp_path, data=Empty()).train()


# trainers --------------------------------------------------------------------------------------------


def trained(folder, cls=OTOTrainer, model=None, **more):
    trainer = make(folder, model, cls, **more)
    dense = sum(p.numel() for p in trainer.model.parameters())
    trainer.train()
    assert trainer.report["group_sparsity"] > 0.4
    assert sum(p.numel() for p in trainer.model.parameters()) < dense
    return trainer


class Renamed(OTOTrainer):
    """Calls the model twice, on columns that have other names."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        ids, labels = inputs["words"], inputs["classes"]
        out = [model(input_ids=x).logits for x in (ids, ids.flip(1))]
        loss = F.cross_entropy(out[0], labels) + F.mse_loss(*out)
        return (loss, {"logits": out[0]}) if return_outputs else loss


class Autocast(OTOTrainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            return super().compute_loss(model, inputs, *args, **kwargs)


class Submodule(OTOTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        body = model.base_model(input_ids=inputs["input_ids"])
        logits = model.classifier(body.pooler_output)
        loss = F.cross_entropy(logits, inputs["labels"])
        return (loss, {"logits": logits}) if return_outputs else loss


class Penalty(OTOTrainer):
    """A gradient penalty: the loss holds a derivative."""

    @torch.enable_grad()
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        x = inputs["x"].clone().requires_grad_()
        out = model(x=x, labels=inputs["labels"])
        (slope,) = torch.autograd.grad(out["loss"], x, create_graph=True)
        loss = out["loss"] + slope.pow(2).sum()
        return (loss, out) if return_outputs else loss


class PerItem(OTOTrainer):
    """Divides by the number of items that the Trainer counts, as the documentation does."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        out = model(input_ids=inputs["input_ids"])
        items = num_items_in_batch if model.training else len(inputs["labels"])  # evaluation counts none
        loss = F.cross_entropy(out.logits, inputs["labels"], reduction="sum") / items
        return (loss, out) if return_outputs else loss


def per_item(outputs, labels, num_items_in_batch=None):
    loss = F.cross_entropy(outputs["logits"], labels, reduction="sum")
    return loss / (num_items_in_batch if torch.is_grad_enabled() else len(labels))


class Traced(OTOTrainer):
    """Says itself what it does with the model, as its loss needs what only training has."""

    def trace_calls(self):
        torch.rand(3)
        return [{"input_ids": torch.tensor([r["input_ids"] for r in rows()[:2]])}]

    def compute_loss(self, model, inputs, *args, **kwargs):
        assert self.lr_scheduler.get_last_lr() if model.training else True
        return super().compute_loss(model, inputs, *args, **kwargs)


def llama():
    tf.set_seed(0)
    size = dict(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**size, intermediate_size=16, pad_token_id=0, eos_token_id=2))


class Generates(OTOTrainer):
    """Trains on what the model wrote."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        with torch.no_grad():
            written = model.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False, min_new_tokens=3)
        out = model(input_ids=written, labels=written)
        return (out.loss, out) if return_outputs else out.loss


def words():
    return [{"words": r["input_ids"], "classes": r["labels"]} for r in rows()]


def tokens():
    return [{"input_ids": torch.tensor(r["input_ids"]), "labels": torch.tensor(r["input_ids"])} for r in rows()]


TRAINERS = {
    "two calls on renamed columns": lambda: dict(
        model=bert(), cls=Renamed, data=words(), remove_unused_columns=False, label_names=["classes"]
    ),
    "autocast in the loss": lambda: dict(model=bert(), cls=Autocast),
    "the body alone": lambda: dict(model=bert(), cls=Submodule),
    "a gradient penalty": lambda: dict(cls=Penalty, model=Net(tf.PreTrainedConfig()), data=vectors()),
    "a loss by item": lambda: dict(cls=PerItem, model=llama_classifier()),
    "a loss function by item": lambda: dict(model=bert(), compute_loss_func=per_item),
    "calls of its own": lambda: dict(cls=Traced),
    "generate in the loss": lambda: dict(cls=Generates, model=llama(), data=tokens()),
    "label smoothing": lambda: dict(label_smoothing_factor=0.1),
    "NEFTune": lambda: dict(model=bert(), neftune_noise_alpha=5.0),
    "bf16": lambda: dict(model=bert(), bf16=True),
    "gradient checkpointing": lambda: dict(model=bert(), activation_checkpointing=True),
}


def llama_classifier():
    tf.set_seed(0)
    size = dict(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    return tf.LlamaForSequenceClassification(tf.LlamaConfig(**size, intermediate_size=16, pad_token_id=0))


@pytest.mark.parametrize("name", TRAINERS)
def test_trainers_that_people_write(tmp_path, name):
    trainer = trained(tmp_path, **TRAINERS[name]())
    trainer.save_model(str(tmp_path / "small"))
    again = type(trainer.model).from_pretrained(tmp_path / "small").state_dict()
    assert all(torch.equal(t, again[name]) for name, t in trainer.model.state_dict().items())
    data = trainer.train_dataset[:8]
    assert np.isfinite(trainer.evaluate(data)["eval_loss"]) and len(trainer.predict(data).predictions)


def test_compiled(tmp_path):
    trained(
        tmp_path,
        torch_compile=True,
        torch_compile_backend="aot_eager",
        model=Net(tf.PreTrainedConfig()),
        data=vectors(),
    )


def test_a_loss_that_never_calls_the_model(tmp_path):
    class Idle(OTOTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return sum(p.sum() for p in model.parameters())

    with pytest.raises(OTOError, match="does not call its model: override trace_calls"):
        make(tmp_path, cls=Idle).train()


def test_a_loss_that_needs_what_training_has_says_the_way_out(tmp_path):
    class Scheduled(OTOTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            assert self.lr_scheduler.get_last_lr()
            return super().compute_loss(model, inputs, *args, **kwargs)

    with pytest.raises(OTOError, match=r"(?s)fails on its first batch: AttributeError.*trace_calls"):
        make(tmp_path, cls=Scheduled).train()


# nothing is left behind ------------------------------------------------------------------------------


class Counting(OTOTrainer):
    """Keeps metrics wherever people keep them, logs from its loss, and draws before it traces."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        self.losses, self.calls = deque(maxlen=3), 0
        self.total = torch.zeros(())
        self.state.seen = 0

    def trace_calls(self):
        torch.rand(3)
        return super().trace_calls()

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.metrics["train"]["loss"].append(float(loss))
        self.losses.append(float(loss))
        self.calls += 1
        self.total += loss.detach()
        self.state.seen = vars(self.state).get("seen", 0) + len(inputs["input_ids"])
        self.log({"mine": float(loss)})
        return loss


def everything(value, depth=6, seen=None):
    """A picture of an object by what it holds, down to some depth; equal pictures are equal objects."""
    seen = {} if seen is None else seen
    if isinstance(value, torch.Tensor):
        return id(value), value.detach().clone().numpy().tobytes(), value.grad is None, value.requires_grad
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state)
    if value is None or isinstance(value, (int, float, str, bytes, bool, type)):
        return value
    if id(value) in seen or depth == 0:
        return id(value)
    seen[id(value)] = value
    if isinstance(value, (list, tuple, deque, set)):
        return [everything(v, depth - 1, seen) for v in value]
    if isinstance(value, dict):
        return [(k if isinstance(k, str) else id(k), everything(v, depth - 1, seen)) for k, v in value.items()]
    if type(value).__module__.startswith(("transformers", "test_faults", "torch.nn")) and hasattr(value, "__dict__"):
        return type(value).__name__, everything(vars(value), depth - 1, seen)
    return id(value)


OURS = set(
    "partition plan report optimizer _forwards _works _ties _whole _rehearsed _steps_made _optimizer_text "
    "_compaction _fingerprint".split()
)


@pytest.mark.parametrize("collator", [masked, OwnMask()])
def test_the_analysis_leaves_nothing_behind(tmp_path, collator):
    class Model(Small):
        count = 0

        def forward(self, input_ids=None, labels=None):
            self.count += 1
            self.seen = input_ids
            return super().forward(input_ids, labels)

    tf.set_seed(0)
    model = Model(tf.PreTrainedConfig())
    events = []

    class Listening(tf.TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            events.append(logs)

    trainer = make(tmp_path, model, Counting, Augmented(), data_collator=collator, callbacks=[Listening()])
    trainer._set_signature_columns_if_needed()  # what the first data loader remembers
    trainer.model.train()

    def picture():
        held = {k: v for k, v in vars(trainer).items() if k not in OURS}
        random_states = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()
        gradients = trainer.accelerator.gradient_state
        return everything(held), random_states, everything(vars(model)), len(gradients.dataloader_references)

    before = picture()
    trainer.create_optimizer()
    after = picture()
    assert before == after
    assert events == [] and leftovers(tmp_path) == []
    with torch.no_grad():  # control: the picture shows a change anywhere
        trainer.data_collator([rows()[0]])
    assert picture() != after


def test_a_first_batch_taken_from_the_loader_leaves_nothing_behind(tmp_path):
    """Only the loader itself can give a batch here, and the random numbers that it draws are given back too."""

    class Mine(Counting):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(Keyed(), 4, collate_fn=masked, sampler=Names())

    class Names(torch.utils.data.Sampler):
        def __init__(self):
            pass

        def __iter__(self):
            yield from (f"row-{i}" for i in torch.randperm(64).tolist())

        def __len__(self):
            return 64

    trainer = make(tmp_path, cls=Mine)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    trainer.create_optimizer()
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert np.array_equal(before[2], np.random.get_state()[1]) and trainer.calls == 0 and trainer.total == 0


def test_a_model_with_extra_state(tmp_path):
    class Extra(Small):
        calls = 0

        def get_extra_state(self):
            return torch.tensor([self.calls])

        def set_extra_state(self, state):
            self.calls = int(state)

        def forward(self, input_ids=None, labels=None):
            self.calls += self.training
            return super().forward(input_ids, labels)

    tf.set_seed(0)
    trainer = make(tmp_path, Extra(tf.PreTrainedConfig()))
    calls = []
    trainer.add_callback(
        type("At", (tf.TrainerCallback,), {"on_train_begin": lambda *_, model, **__: calls.append(model.calls)})()
    )
    trainer.train()
    assert calls == [0] and trainer.model.calls == STEPS


# searches and batch sizes ----------------------------------------------------------------------------


class Pruned(Exception):
    """What a search raises to end a trial."""


def test_a_search_partitions_every_trial_anew_and_keeps_its_own_errors(tmp_path, monkeypatch):
    def model_init(trial):
        tf.set_seed(0)
        model = Small(tf.PreTrainedConfig())
        if trial:
            model.a, model.b = nn.Linear(8, trial["width"]), nn.Linear(trial["width"], 2)
        return model

    class Backend:
        name = "mine"

        def default_hp_space(self, trial):
            return trial

        def ensure_available(self):
            pass

        def run(self, trainer, n_trials, direction, **kwargs):
            results = []
            for trial in ({"width": 16, "target_group_sparsity": 0.3}, {"width": 24, "target_group_sparsity": 0.5}):
                trainer.train(trial=trial)
                widths = [a.size for a in trainer.partition.axes if a.name.startswith("a.")]
                results.append((widths, trainer.report["group_sparsity"]))
            trainer.add_callback(Breaking("on_train_end", Pruned()))
            with pytest.raises(Pruned):
                trainer.train(trial={"width": 16})
            return results

    from transformers import trainer as stock_module

    backend = tf.trainer_utils.HPSearchBackend.OPTUNA
    right = tf.TrainerState.init_training_references

    def references(self, trainer, max_steps, num_train_epochs, trial):
        right(self, trainer, max_steps, num_train_epochs, None)  # which knows trials of known searches only

    monkeypatch.setitem(stock_module.ALL_HYPERPARAMETER_SEARCH_BACKENDS, backend, Backend)

    def set_up(self, trial):
        for name in trial.keys() - {"width"}:
            setattr(self.args, name, trial[name])

    monkeypatch.setattr(OTOTrainer, "_hp_search_setup", set_up)
    monkeypatch.setattr(OTOTrainer, "_get_output_dir", lambda self, trial: self.args.output_dir)
    monkeypatch.setattr(tf.TrainerState, "init_training_references", references)
    monkeypatch.setattr(OTOTrainer, "_rehearse_the_end", lambda self, model: None)  # a class of another width
    trainer = OTOTrainer(model_init=model_init, args=arguments(tmp_path), train_dataset=rows())
    found = trainer.hyperparameter_search(backend="optuna", n_trials=2)
    assert [widths for widths, _ in found] == [[16], [24]]
    assert found[0][1] == pytest.approx(0.3, abs=0.05) and found[1][1] == pytest.approx(0.5, abs=0.05)
    assert leftovers(tmp_path) == []


def test_memory_that_runs_out_in_the_rehearsal_finds_another_batch_size(tmp_path, monkeypatch):
    right, calls = trainer_module.partition_zigs, iter(range(10))

    def short(*args, **kwargs):
        if next(calls) == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return right(*args, **kwargs)

    monkeypatch.setattr(trainer_module, "partition_zigs", short)
    trainer = trained(tmp_path, auto_find_batch_size=True)
    assert trainer._train_batch_size < 4
    calls = iter(range(10))
    with pytest.raises(torch.OutOfMemoryError):  # control
        make(tmp_path).train()


@pytest.mark.parametrize("step", [3, 7, 14])
def test_resume_is_bit_identical(tmp_path, step):
    whole = trained(tmp_path / "whole", save_strategy="steps", save_steps=step, data=rows(20))
    again = make(tmp_path / "again", data=rows(20))
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert whole.plan == again.plan
    expected = whole.model.state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in again.model.state_dict().items())
    other = trained(tmp_path / "other", data=rows(20), seed=1)  # control: other batches, other weights
    assert any(
        t.shape != expected[n].shape or not torch.equal(t, expected[n]) for n, t in other.model.state_dict().items()
    )
