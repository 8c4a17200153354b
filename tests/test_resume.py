"""Checkpoints: their weights are loaded whole or not at all, and whoever stops a run, it goes on as if nobody had.

Every law has a control that breaks what it relies on.
"""

import copy
import functools
import gc
import json
import logging
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from hf_oto import (
    OTOError,
    OTOMixin,
    OTOTrainer,
    OTOTrainingArguments,
    PruningPlan,
    compact,
    ending,
    measure,
    partition_zigs,
    to_dense,
)
from hf_oto.resume import lacks, load_weights_, newest_complete

STEPS = 16


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Runs take a tenth of the time without figures and long measurements, which are tested elsewhere."""
    monkeypatch.setattr("hf_oto.whole.measure", functools.partial(measure, seconds=0))
    monkeypatch.setattr(ending, "save_figures", lambda *_: None)


@pytest.fixture(autouse=True, scope="module")
def quick_collections():
    """The Trainer collects garbage four times a run: what was imported before is none."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def vit():
    """A model most of whose names are others in its checkpoints."""
    size = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    dropout = dict(hidden_dropout_prob=0.1)
    return tf.ViTForImageClassification(tf.ViTConfig(**size, **dropout, image_size=8, patch_size=4))


def bert():
    """A model whose names are the same in its checkpoints."""
    size = dict(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    return tf.BertForSequenceClassification(tf.BertConfig(**size))


def resnet():
    """A model with statistics in buffers."""
    size = dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    return tf.ResNetForImageClassification(tf.ResNetConfig(**size))


def llama():
    """A model with tied weights and buffers that are not saved."""
    size = dict(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**size, tie_word_embeddings=True))


def mixed():
    """A model in half precision, but for its head, which its config knows nothing of."""
    model = vit().bfloat16()
    model.classifier.float()
    return model


def compacted():
    """A model that was cut before."""
    model = vit()
    pixels = {"pixel_values": torch.randn(2, 3, 8, 8)}
    plan = PruningPlan({"vit.layers.0.mlp.fc1.weight[0]": range(8)})
    return compact(model, partition_zigs(model, pixels), plan)


class Plain(nn.Module):
    """No Transformers model: it has no `from_pretrained`."""

    def __init__(self):
        super().__init__()
        self.words, self.a, self.b = nn.Embedding(40, 8), nn.Linear(8, 16), nn.Linear(16, 2)
        self.norm = nn.BatchNorm1d(16)

    def forward(self, input_ids=None, labels=None):
        logits = self.b(self.norm(torch.relu(self.a(self.words(input_ids).mean(1)))))
        return {"loss": None if labels is None else F.cross_entropy(logits, labels), "logits": logits}


MODELS = {"vit": vit, "bert": bert, "resnet": resnet, "llama": llama, "mixed": mixed, "compacted": compacted,
          "plain": Plain, "bf16": lambda: bert().bfloat16()}  # fmt: skip


def made(name, seed=0):
    tf.set_seed(seed)
    return MODELS[name]()


def rows(name, n=64):
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (n,), generator=g).tolist()
    if name in ("bert", "plain", "bf16"):
        return [{"input_ids": torch.randint(3, 40, (6,), generator=g), "labels": label} for label in labels]
    side = 32 if name == "resnet" else 8
    return [{"pixel_values": torch.randn(3, side, side, generator=g), "labels": label} for label in labels]


def arguments(folder, cls=OTOTrainingArguments, **more):
    settings = dict(
        max_steps=STEPS, per_device_train_batch_size=4, learning_rate=1e-3, logging_strategy="no", save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, remove_unused_columns=False,
        lr_scheduler_type="cosine",
    )  # fmt: skip
    return cls(str(folder), **(settings | more))


class Watch(tf.TrainerCallback):
    """What a run knew when its last step was made: the optimizer's state, DHSPG's with it."""

    def on_train_end(self, args, state, control, optimizer, **kwargs):
        self.state = copy.deepcopy(optimizer.state_dict())


def make(folder, name="vit", cls=OTOTrainer, seed=0, model=None, callbacks=(), **more):
    data = rows(name)
    given = {key: more.pop(key) for key in ("args", "compute_metrics") if key in more}
    given.setdefault("args", arguments(folder, **more))
    trainer = cls(
        model or made(name, seed), train_dataset=data, eval_dataset=data[:8], callbacks=[*callbacks], **given
    )
    trainer.add_callback(watch := Watch())
    trainer.watch = watch
    return trainer


def trained(folder, *args, resume=None, **more):
    trainer = make(folder, *args, **more)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def same(a, b):
    """Whether two nests of dicts, lists and tensors are equal bit by bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def same_run(a, b):
    """Whether two runs ended alike: the compact weights, what was kept, the optimizer's state and the zeros in it."""
    return a.plan == b.plan and same(a.watch.state, b.watch.state) and same(weights(a.model), weights(b.model))


def weights(model):
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def save(model, folder):
    """As the Trainer saves it."""
    if isinstance(model, tf.PreTrainedModel):
        model.save_pretrained(folder)
    else:
        folder.mkdir()
        save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


class StockLoading(OTOTrainer):
    """Breaks the rule: loads raw names, and keeps what it finds none for."""

    def _load_from_checkpoint(self, *args):
        tf.Trainer._load_from_checkpoint(self, *args)

    def _load_best_model(self):
        tf.Trainer._load_best_model(self)


class Forgetting(OTOTrainer):
    """Breaks the rule: resumes without what DHSPG knew."""

    def _load_optimizer_and_scheduler(self, checkpoint):
        pass


# weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_loaded_whole_and_in_place(tmp_path, name):
    saved, model = made(name, 0), made(name, 1)
    save(saved, tmp_path / "saved")
    with torch.no_grad():
        for t in saved.buffers():
            t.add_(1) if t.is_floating_point() else None
    save(saved, tmp_path / "saved2")
    objects = {n: (id(p), p.data_ptr(), p.requires_grad) for n, p in model.named_parameters()}
    model.train()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    load_weights_(model, str(tmp_path / "saved2"))
    assert same(states, (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()))
    assert model.training
    assert objects == {n: (id(p), p.data_ptr(), p.requires_grad) for n, p in model.named_parameters()}
    assert same(weights(model), weights(saved))
    assert not same(weights(made(name, 1)), weights(saved))  # control: they were others


@pytest.mark.parametrize(("name", "old"), [("vit", 32), ("bert", 0)])
def test_the_control_of_the_weights(tmp_path, name, old):
    """The stock Trainer's loading leaves most tensors of a ViT what they were."""
    saved = made(name, 0)
    save(saved, tmp_path / "saved")
    with torch.no_grad():
        stock = tf.Trainer(made(name, 1), arguments(tmp_path, tf.TrainingArguments))
        for t in (*saved.parameters(), *stock.model.parameters()):
            t.add_(torch.randn_like(t))  # no two are alike, biases neither
    save(saved, tmp_path / "saved")
    before = weights(stock.model)
    stock._load_from_checkpoint(str(tmp_path / "saved"))
    after = weights(stock.model)
    assert sum(torch.equal(t, before[n]) for n, t in after.items()) == old
    load_weights_(stock.model, str(tmp_path / "saved"))
    assert same(weights(stock.model), weights(saved))


@pytest.mark.parametrize("kind", ["shards", "bin"])
def test_other_files_of_weights(tmp_path, kind):
    saved, model = made("vit", 0), made("vit", 1)
    if kind == "shards":
        saved.save_pretrained(tmp_path, max_shard_size="4KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
    else:
        saved.save_pretrained(tmp_path)
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    load_weights_(model, str(tmp_path))
    assert same(weights(model), weights(saved))
    if kind == "shards":
        next(tmp_path.glob("*.safetensors")).unlink()
        assert "its weights" in lacks(str(tmp_path), False)
        with pytest.raises(OTOError, match="can't be loaded"):
            load_weights_(model, str(tmp_path))


def lose(file):
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[3])
    save_file(tensors, file, metadata={"format": "pt"})


def gain(file):
    save_file(load_file(file) | {"stranger": torch.zeros(2)}, file, metadata={"format": "pt"})


def reshape(file):
    tensors = load_file(file)
    name = sorted(tensors)[3]
    tensors[name] = torch.zeros(*tensors[name].shape[:-1], tensors[name].shape[-1] + 1)
    save_file(tensors, file, metadata={"format": "pt"})


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


TAMPERED = {lose: "it lacks [a-z]", gain: "the model has no stranger", reshape: "of another shape there: [a-z]",
            truncate: "can't be loaded: SafetensorError"}  # fmt: skip


@pytest.mark.parametrize("tamper", TAMPERED)
@pytest.mark.parametrize("name", ["vit", "bert", "plain"])
def test_weights_that_do_not_fit_are_an_error_that_changes_nothing(tmp_path, name, tamper):
    model = made(name, 1)
    save(made(name, 0), tmp_path / "saved")
    tamper(tmp_path / "saved" / "model.safetensors")
    before = weights(model)
    with pytest.raises(OTOError, match=TAMPERED[tamper]) as raised:
        load_weights_(model, str(tmp_path / "saved"))
    assert str(tmp_path / "saved") in str(raised.value)
    assert same(weights(model), before)


def test_weights_of_a_compact_model_that_do_not_fit(tmp_path):
    """The record says which sizes were cut, and no checkpoint can say otherwise."""
    save(made("compacted", 0), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    cut = next(name for name, t in tensors.items() if t.shape == (8, 16))
    save_file(tensors | {cut: torch.zeros(9, 16)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = made("compacted", 1)
    before = weights(model)
    with pytest.raises(OTOError, match=r"has shape \(9, 16\) in the checkpoint, \(8, 16\) by the record"):
        load_weights_(model, str(tmp_path))
    assert same(weights(model), before)


# resuming --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs, with a checkpoint of every other step, by the name of their model."""

    @functools.cache
    def run(name):
        return trained(tmp_path_factory.mktemp(name), name, save_strategy="steps", save_steps=2)

    return run


def checkpoint(trainer, step):
    return str(Path(trainer.args.output_dir, f"checkpoint-{step}"))


CASES = [("vit", 2), ("vit", 6), ("vit", 12), ("bert", 6), ("resnet", 6), ("bf16", 6), ("plain", 6)]


@pytest.mark.parametrize(("name", "step"), CASES)  # the window is from step 2 to 10
def test_resume_is_bit_identical(tmp_path, whole, name, step):
    again = trained(tmp_path, name, seed=1, resume=checkpoint(whole(name), step))
    assert same_run(again, whole(name))


@pytest.mark.parametrize(("cls", "step"), [(StockLoading, 2), (Forgetting, 6)])
def test_the_controls_of_resuming(tmp_path, whole, cls, step):
    assert not same_run(trained(tmp_path, cls=cls, seed=1, resume=checkpoint(whole("vit"), step)), whole("vit"))


def test_loading_without_the_cuts_of_a_checkpoint_is_refused(tmp_path, whole):
    with pytest.raises(OTOError, match="cut out of the model of this optimizer state, and 0 out of this one"):
        trained(tmp_path, cls=StockLoading, seed=1, resume=checkpoint(whole("vit"), 6))


class OneTooMany(OTOTrainer):
    """Breaks the rule: trains a step more than there are."""

    def _run_epoch(self, *args, **kwargs):
        tf.Trainer._run_epoch(self, *args, **kwargs)


@pytest.mark.parametrize("cls", [OTOTrainer, OneTooMany])
def test_a_run_resumed_at_its_last_step_trains_nothing(tmp_path, cls):
    """That step is in the middle of an epoch, and the learning rate is not zero there."""
    more = dict(max_steps=20, lr_scheduler_type="constant")
    ended = trained(tmp_path / "a", save_strategy="steps", save_steps=20, **more)
    again = trained(tmp_path / "b", cls=cls, seed=1, resume=checkpoint(ended, 20), **more)
    assert same_run(again, ended) == (cls is OTOTrainer)
    assert again.state.global_step == (20 if cls is OTOTrainer else 21)


def best_at(folder, name, cls=OTOTrainer):
    """A run whose best model is that of step 12, by decree."""
    ranks = iter([0, 0, 0, 0, 0, 1, 0.5, 0.2])
    return trained(
        folder, name, cls, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, metric_for_best_model="rank", compute_metrics=lambda _: {"rank": next(ranks)},
    )  # fmt: skip


def is_the_checkpoint_cut(trainer, step, name):
    model = compact(made(name, 1), trainer.partition, trainer.plan)
    load_weights_(model, checkpoint(trainer, step))  # it was cut while it trained
    return same(weights(model), weights(trainer.model))


@pytest.mark.parametrize("name", ["vit", "bert", "resnet", "bf16", "plain"])
def test_the_best_model_is_the_checkpoints_cut(tmp_path, name):
    trainer = best_at(tmp_path, name)
    assert trainer.state.best_global_step == 12
    assert is_the_checkpoint_cut(trainer, 12, name)
    assert not is_the_checkpoint_cut(trainer, 14, name)  # control


def test_the_control_of_the_best_model(tmp_path):
    """The stock Trainer's loading makes a model of two checkpoints."""
    trainer = best_at(tmp_path, "vit", StockLoading)
    assert not is_the_checkpoint_cut(trainer, 12, "vit") and not is_the_checkpoint_cut(trainer, 16, "vit")


class Losing(tf.TrainerCallback):
    """Something happens to the checkpoint of step 12 once it is there."""

    def __init__(self, happens):
        self.happens = happens

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 16:
            self.happens(Path(args.output_dir, "checkpoint-12", "model.safetensors"))


@pytest.mark.parametrize(("happens", "fact"), [(lose, "it lacks"), (Path.unlink, "has no weights")])
def test_a_best_model_that_is_not_whole_is_an_error_and_the_trained_one_is_saved(tmp_path, happens, fact):
    ranks = iter([0, 0, 0, 0, 0, 1, 0.5, 0.2])
    trainer = make(
        tmp_path, callbacks=[Losing(happens)], eval_strategy="steps", eval_steps=2, save_strategy="steps",
        save_steps=2, load_best_model_at_end=True, metric_for_best_model="rank",
        compute_metrics=lambda _: {"rank": next(ranks)},
    )  # fmt: skip
    with pytest.raises(OTOError, match=rf"{fact}.*saved in .*trained"):
        trainer.train()
    saved, last = (type(trainer.model).from_pretrained(tmp_path / name) for name in ("trained", "checkpoint-16"))
    assert same(weights(saved), weights(last))


def test_a_trainer_that_loads_in_a_way_of_its_own_does(tmp_path, whole):
    class Own(tf.Trainer):
        def _load_from_checkpoint(self, checkpoint_path):
            self.loaded = checkpoint_path
            load_weights_(self.model, checkpoint_path)

    class Both(OTOMixin, Own):
        pass

    folder = checkpoint(whole("vit"), 6)
    again = trained(tmp_path, cls=Both, seed=1, resume=folder)
    assert again.loaded == folder and same_run(again, whole("vit"))


# what can't be resumed -------------------------------------------------------------------------------


def copied(trainer, step, folder):
    target = folder / f"checkpoint-{step}"
    target.mkdir(parents=True)
    for file in Path(checkpoint(trainer, step)).iterdir():
        target.joinpath(file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "model.safetensors"]
)
def test_an_incomplete_checkpoint_says_what_it_lacks(tmp_path, whole, name):
    folder = copied(whole("vit"), 6, tmp_path)
    (folder / name).unlink()
    said = "its weights" if name == "model.safetensors" else name
    with pytest.raises(OTOError, match=rf"checkpoint-6 lacks {said} .*begin a new run .*from_pretrained\('.*-6'\)"):
        trained(tmp_path, resume=folder)  # a Path
    copied(whole("vit"), 4, tmp_path)
    with pytest.raises(OTOError, match=rf"checkpoint-6 lacks {said} .*resume from .*checkpoint-4"):
        trained(tmp_path, resume=str(folder))


def test_the_weights_alone_are_no_checkpoint(tmp_path):
    trained(tmp_path, save_strategy="steps", save_steps=4, save_only_model=True)
    for resume in (True, str(tmp_path / "checkpoint-8")):
        with pytest.raises(OTOError, match=r"lacks optimizer.pt, rng_state.pth, scheduler.pt .*save_only_model=True"):
            trained(tmp_path, resume=resume)


def test_a_plain_trainers_checkpoint(tmp_path):
    args = arguments(tmp_path, tf.TrainingArguments, save_strategy="steps", save_steps=4)
    make(tmp_path, cls=tf.Trainer, args=args).train()
    with pytest.raises(OTOError, match=r"resume from .*checkpoint-4: .*not DHSPG's.*from_pretrained\('.*-4'\)"):
        trained(tmp_path, resume=str(tmp_path / "checkpoint-4"))


def test_a_checkpoint_of_another_partition(tmp_path, whole):
    folder = checkpoint(whole("vit"), 6)
    with pytest.raises(OTOError, match=r"checkpoint-6 was saved with another partition.*`protect`"):
        trained(tmp_path, protect=["layers.0"], resume=folder)


@pytest.mark.parametrize(
    ("step", "target", "fact"),
    [
        (6, 0.1, "more ZIGs are zero in this optimizer state than the target asks for"),
        (12, 0.75, "the target can't be reached any more"),
        (6, 0.75, None),  # control: in time it can
    ],
)
def test_a_checkpoint_of_another_target(tmp_path, whole, step, target, fact):
    folder = checkpoint(whole("vit"), step)
    if fact is None:
        trainer = trained(tmp_path, "vit", resume=folder, target_group_sparsity=target)
        assert trainer.report["group_sparsity"] == pytest.approx(target, abs=0.05)
    else:
        with pytest.raises(OTOError, match=f"{fact}.*target_group_sparsity={target}.*0.5"):
            trained(tmp_path, "vit", resume=folder, target_group_sparsity=target)


def test_a_checkpoint_of_another_model(tmp_path, whole):
    config = made("vit").config
    config.num_labels = 5
    with pytest.raises(OTOError, match=r"checkpoint-6 is not of this .*: of another shape there: classifier"):
        trained(tmp_path, model=tf.ViTForImageClassification(config), resume=checkpoint(whole("vit"), 6))


def test_a_missing_checkpoint_is_the_stock_trainers_error(tmp_path):
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        trained(tmp_path, resume=True)
    with pytest.raises(ValueError, match="Can't find a valid checkpoint"):
        trained(tmp_path, resume=str(tmp_path / "nowhere"))


# stopped while a checkpoint is written ---------------------------------------------------------------


class Killed(BaseException):
    """As far as a test in one process can be killed."""


def kill_while_saving(monkeypatch, moment, step):
    """Everything stops at a moment of the saving of a step's checkpoint."""

    def stop_at(owner, name, half=False):
        right = getattr(owner, name)

        def killed(self, *args, **kwargs):
            state = self if isinstance(self, tf.TrainerState) else self.state
            if state.global_step != step:
                return right(self, *args, **kwargs)
            if half:
                right(self, *args, **kwargs)
                path = Path(args[0])
                path.write_text(path.read_text()[: -path.stat().st_size // 2])
            raise Killed

        monkeypatch.setattr(owner, name, killed)

    moments = {
        "before": (OTOTrainer, "save_model"),
        "after the weights": (OTOTrainer, "_save_optimizer_and_scheduler"),
        "after the optimizer": (OTOTrainer, "_save_scaler"),
        "before the random states": (OTOTrainer, "_save_rng_state"),
        "before the state": (tf.TrainerState, "save_to_json"),
        "within the state": (tf.TrainerState, "save_to_json", True),
    }
    stop_at(*moments[moment])


MOMENTS = ["before", "after the weights", "after the optimizer", "before the random states", "before the state",
           "within the state"]  # fmt: skip


@pytest.mark.parametrize(("moment", "older"), [("after the optimizer", False), *((m, True) for m in MOMENTS)])
def test_a_run_that_is_killed_while_it_saves(tmp_path, whole, monkeypatch, caplog, moment, older):
    """It resumes from the newest complete checkpoint, where the folder that is being written was another run's too."""
    if older:  # another run has left a folder of that name
        trained(tmp_path, seed=3, save_strategy="steps", save_steps=8, max_steps=8, target_group_sparsity=0.0)
        assert lacks(str(tmp_path / "checkpoint-8"), False) == []
    with monkeypatch.context() as patch:
        kill_while_saving(patch, moment, step=8)
        with pytest.raises(Killed):
            trained(tmp_path, save_strategy="steps", save_steps=4)
    newest, incomplete = newest_complete(str(tmp_path), False)
    assert newest == str(tmp_path / "checkpoint-4")
    assert bool(incomplete) == (older or moment != "before")
    with caplog.at_level(logging.WARNING):
        again = trained(tmp_path, seed=1, resume=True, save_strategy="steps", save_steps=4)
    assert same_run(again, whole("vit"))
    warned = [r.getMessage() for r in caplog.records if r.name == "hf_oto.resume"]
    assert len(warned) == len(incomplete)
    assert all("checkpoint-8 lacks" in text and "resuming from" in text for text in warned)


def test_the_control_of_the_kills(tmp_path, monkeypatch):
    """The stock Trainer writes into an older folder of that name, which then looks complete, with the weights
    of one run and the optimizer of another."""
    trained(tmp_path, seed=3, save_strategy="steps", save_steps=8, max_steps=8, target_group_sparsity=0.0)
    monkeypatch.setattr(OTOTrainer, "_save_checkpoint", tf.Trainer._save_checkpoint)
    kill_while_saving(monkeypatch, "after the weights", step=8)
    with pytest.raises(Killed):
        trained(tmp_path, save_strategy="steps", save_steps=4)
    assert newest_complete(str(tmp_path), False) == (str(tmp_path / "checkpoint-8"), {})


def test_checkpoints_are_numbers(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-last", "checkpoint-11-old"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-12").write_text("no folder")
    newest, incomplete = newest_complete(str(tmp_path), False)
    assert newest is None and [Path(folder).name for folder in incomplete] == ["checkpoint-10", "checkpoint-9"]


def test_a_scaler_is_looked_for(whole):
    folder = checkpoint(whole("vit"), 6)
    assert lacks(folder, True) == ["scaler.pt"] and lacks(folder, False) == []


# train() again ---------------------------------------------------------------------------------------


class Interrupt(tf.TrainerCallback):
    """Interrupts a run once, at the end of a step."""

    def __init__(self, step, error):
        self.steps, self.error = iter([step]), error
        self.step = next(self.steps)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.step = None
            raise self.error


def interrupted(folder, step, cls=OTOTrainer, error=None, **more):
    error = error or KeyboardInterrupt()
    trainer = make(folder, cls=cls, callbacks=[Interrupt(step, error)], **more)
    with pytest.raises(type(error)):
        trainer.train()
    return trainer


def whole_copy(model):
    """The model with zeros in the place of what was cut while it trained."""
    copied = copy.deepcopy(model)
    return to_dense(copied) if "oto" in vars(model.config) else copied


class GoingOn(OTOTrainer):
    """Breaks the rule: the optimizer of an interrupted run goes on in the next one, and its cuts stay."""

    def _forget_earlier_training(self):
        pass

    def _inner_training_loop(self, *args, **kwargs):
        return tf.Trainer._inner_training_loop(self, *args, **kwargs)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("own")])
@pytest.mark.parametrize("step", [1, 6, 12])
def test_an_interrupted_run_begins_anew(tmp_path, step, error):
    """From the weights as they are, it trains as a new trainer with this model does."""
    trainer = interrupted(tmp_path / "a", step, error=error)
    partition, model = trainer.partition, whole_copy(trainer.model)
    tf.set_seed(42)  # as a new trainer does
    trainer.train()
    new = trained(tmp_path / "b", model=model)
    assert same_run(trainer, new)
    assert trainer.partition is partition
    assert trainer.state.global_step == STEPS and trainer.report["group_sparsity"] == 0.5


def test_the_control_of_beginning_anew(tmp_path):
    trainer = interrupted(tmp_path / "a", 6, GoingOn)
    model = whole_copy(trainer.model)
    tf.set_seed(42)
    trainer.train()
    assert not same_run(trainer, trained(tmp_path / "b", model=model))


def test_an_interrupted_run_resumes(tmp_path, whole):
    trainer = interrupted(tmp_path, 7, save_strategy="steps", save_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert same_run(trainer, whole("vit"))


def test_interrupted_before_its_first_step_after_resuming(tmp_path, whole):
    """What was loaded for a run that made no step is not taken for the next one."""

    class AtOnce(Interrupt):
        def on_train_begin(self, args, state, control, **kwargs):
            self.on_step_end(args, state, control)

    trainer = make(tmp_path / "a", callbacks=[AtOnce(6, KeyboardInterrupt())])
    with pytest.raises(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=checkpoint(whole("vit"), 6))
    model = whole_copy(trainer.model)
    tf.set_seed(42)
    trainer.train()
    assert same_run(trainer, trained(tmp_path / "b", model=model))


def test_the_trainer_trains_with_an_optimizer_made_beforehand(tmp_path):
    trainer, steps = make(tmp_path), []
    made_before = trainer.create_optimizer()
    made_before.register_step_post_hook(lambda *_: steps.append(1))
    trainer.train()
    assert len(steps) == STEPS


class OutOfMemory(tf.TrainerCallback):
    """Memory runs out once, at the end of a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.step = None
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")


def test_a_resumed_run_that_runs_out_of_memory_begins_where_it_was_resumed(tmp_path, whole):
    """It begins again from the checkpoint: without that its weights would be ahead of its optimizer."""
    folder = copied(whole("vit"), 6, tmp_path)
    more = dict(auto_find_batch_size=True, resume=str(folder))
    trainer = trained(tmp_path / "a", callbacks=[OutOfMemory(9)], **more)
    assert trainer._train_batch_size == 3
    state = json.loads((folder / "trainer_state.json").read_text())
    (folder / "trainer_state.json").write_text(json.dumps(state | {"train_batch_size": 3}))
    assert same_run(trainer, trained(tmp_path / "b", **more))
    with pytest.raises(OTOError, match="cut out of the model of this optimizer state"):  # control
        trained(tmp_path / "c", cls=GoingOn, callbacks=[OutOfMemory(9)], **more)


# processes -------------------------------------------------------------------------------------------


def launch(folder, scenario):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(Path(__file__).with_name("resume_worker.py")), str(folder), scenario]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-5000:]


@pytest.mark.slow
def test_a_process_that_is_killed_resumes_bit_for_bit(tmp_path):
    """Killed while it trains, saves, cuts, and after its last step; the control resumes without what DHSPG knew."""
    launch(tmp_path, "kills")
    whole = torch.load(tmp_path / "whole" / "endedOTOTrainer.pt")
    for moment in ("training", "saving", "a_cut", "the_end"):
        assert same(torch.load(tmp_path / f"killed_in_{moment}" / "endedOTOTrainer.pt"), whole), moment
    assert not same(torch.load(tmp_path / "forgetting" / "endedForgetting.pt"), whole)


@pytest.mark.slow
def test_resumed_and_interrupted_on_several_ranks(tmp_path):
    launch(tmp_path, "ranks")
    for scenario in ("ddp", "fsdp2"):
        found, other = (torch.load(tmp_path / f"{scenario}.{rank}.pt") for rank in (0, 1))
        assert same(found, other), scenario
        if scenario == "ddp":
            assert same(found["resumed"], found["whole"])
            assert same(found["anew OTOTrainer"], found["new OTOTrainer"])
            assert not same(found["anew GoingOn"], found["new GoingOn"])  # control
        else:
            assert same(found["resumed True"]["weights"], found["whole"]["weights"])
            assert found["resumed None"]["sparsity"] == found["resumed True"]["sparsity"] == 0.5
            assert not same(found["resumed None"]["weights"], found["whole"]["weights"])
