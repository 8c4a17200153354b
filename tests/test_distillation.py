"""A teacher: its logits are a part of the loss of training, and of nothing else; and training leaves it as it is.

Every law has a control that breaks what it relies on.
"""

import copy
import functools
import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import distillation_worker as worker
import pytest
import sentence_transformers as st
import torch
import transformers as tf
import trl
from datasets import Dataset
from sentence_transformers.sentence_transformer import losses
from test_clients import TEXT, embedder, from_disk, mixed, tokenizer
from test_clients import settings as client_settings
from test_resume import Interrupt, OutOfMemory, checkpoint, quick, quick_collections, rows, same, same_run, weights  # noqa: F401  fixtures of all tests
from test_resume import arguments as short_arguments
from test_shrinking import LOGGED, STEPS, Steps, Watch, assert_same_end, llama, made, record, shrank
from torch import nn

from hf_oto import (
    OTOError,
    OTOMixin,
    OTOSeq2SeqTrainer,
    OTOSeq2SeqTrainingArguments,
    OTOTrainer,
    distillation,
    divergence,
)
from hf_oto.distillation import Teacher

ROOT = Path(__file__).parents[1]
SMALL = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=40)
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def texts():
    """Prompts, which count in no loss, answers of several lengths, and padding."""
    g = torch.Generator().manual_seed(0)
    found = []
    for i in range(64):
        words, length, prompt = torch.randint(3, 40, (8,), generator=g), 3 + i % 6, 1 + i % 2
        there = torch.arange(8) < length
        labels = torch.where(there & (torch.arange(8) >= prompt), words, -100)
        found.append({"input_ids": words.where(there, 0), "attention_mask": there.long(), "labels": labels})
    return found


def make(folder, name="vit", teacher=None, seed=0, model=None, data=None, cls=OTOTrainer, callbacks=(), **more):
    given = {key: more.pop(key) for key in ("compute_loss_func", "optimizers", "model_init") if key in more}
    args = more.pop("args", None) or short_arguments(folder, **({"max_steps": STEPS} | more))
    if "model_init" not in given:
        given["model"] = made(name, seed) if model is None else model
    data = data or (texts() if name == "llama" else rows(name))
    steps, watch = Steps(), Watch()
    trainer = cls(
        args=args, train_dataset=data, eval_dataset=data[:8], teacher=teacher, callbacks=[steps, *callbacks, watch],
        **given,
    )  # fmt: skip
    trainer.steps, trainer.watch = steps, watch
    return trainer


def trained(folder, *args, resume=None, **more):
    trainer = make(folder, *args, **more)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def batch(trainer, start=0, stop=4):
    return trainer.data_collator([dict(trainer.train_dataset[i]) for i in range(start, stop)])


def sharpened(model):
    """A teacher that has opinions: random weights of this size have none."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3 if p.dim() > 1 else 1)
    return model


# the value of the loss -------------------------------------------------------------------------------


def kl(logits, of_teacher, temperature):
    """Hinton et al., written out: (n, c), (n, c) -> the mean of T^2 sum_c p (log p - log q)."""
    p, q = ((x.double() / temperature).softmax(-1) for x in (of_teacher, logits))
    return temperature**2 * (p * (p / q).log()).sum(-1).mean()


def binary_kl(logits, of_teacher, temperature):
    p, q = ((x.double() / temperature).sigmoid() for x in (of_teacher, logits))
    return temperature**2 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()


def squares(logits, of_teacher, temperature):
    return ((logits.double() - of_teacher.double()) ** 2).mean()


def bert(num_labels=3, **more):
    return tf.BertForSequenceClassification(tf.BertConfig(**SMALL, **NO_DROPOUT, num_labels=num_labels, **more))


def labelled(label):
    """Sentences with labels of one kind."""
    g = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(3, 40, (6,), generator=g), "labels": label(g)} for _ in range(64)]


def tagger():
    return tf.BertForTokenClassification(tf.BertConfig(**SMALL, **NO_DROPOUT, num_labels=5))


def t5():
    size = dict(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=40, dropout_rate=0.0)
    return tf.T5ForConditionalGeneration(tf.T5Config(**size, decoder_start_token_id=0))


def bart():
    size = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    more = dict(encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=40, max_position_embeddings=16, dropout=0.0)
    return tf.BartForConditionalGeneration(tf.BartConfig(**size, **more, decoder_start_token_id=2))


def pairs(with_decoder_inputs=False):
    found = []
    for row in texts():
        row["labels"] = row["labels"].roll(3)
        if with_decoder_inputs:
            row["decoder_input_ids"] = row["labels"].clamp(min=0).roll(1)
        found.append(row)
    return found


def own_function(outputs, labels, num_items_in_batch=None):
    return nn.functional.cross_entropy(outputs["logits"], labels)


class Tuples(nn.Module):
    """A model that returns a tuple, and that has no config."""

    def __init__(self):
        super().__init__()
        self.words, self.a, self.b = nn.Embedding(40, 8), nn.Linear(8, 16), nn.Linear(16, 2)

    def forward(self, input_ids, labels):
        logits = self.b(torch.relu(self.a(self.words(input_ids).mean(1))))
        return nn.functional.cross_entropy(logits, labels), logits


def all_of(labels):
    return torch.ones(labels.shape[:1], dtype=torch.bool)


def answers(labels):
    """The positions before those of the answer: they predict it."""
    return torch.cat([labels[:, 1:] != -100, torch.zeros(len(labels), 1, dtype=torch.bool)], 1)


# name: (model, rows, what is compared, at which positions, settings of the trainer)
CASES = {
    "classes": (bert, lambda: labelled(lambda g: 2), kl, all_of, {}),
    "one number": (lambda: bert(1), lambda: labelled(lambda g: 0.5), squares, all_of, {}),
    "numbers": (
        lambda: bert(2, problem_type="regression"), lambda: labelled(lambda g: torch.rand(2, generator=g)),
        squares, all_of, {},
    ),
    "yes or no": (bert, lambda: labelled(lambda g: torch.rand(3, generator=g).round()), binary_kl, all_of, {}),
    "tokens": (
        tagger, lambda: labelled(lambda g: torch.tensor([-100, 1, 2, -100, 4, -100])), kl, lambda x: x != -100, {},
    ),
    "language model": (llama, texts, kl, answers, {}),
    "smoothed": (llama, texts, kl, answers, dict(label_smoothing_factor=0.1)),
    "own function": (bert, lambda: labelled(lambda g: 2), kl, all_of, dict(compute_loss_func=own_function)),
    "tuple": (Tuples, lambda: labelled(lambda g: 1), kl, all_of, {}),
    "seq2seq": (t5, pairs, kl, lambda x: x != -100, {}),
    "seq2seq that may guess its inputs": (bart, pairs, kl, lambda x: x != -100, {}),
    "seq2seq with inputs": (t5, lambda: pairs(True), kl, lambda x: x != -100, {}),
}  # fmt: skip


def build(name, seed):
    tf.set_seed(seed)
    return CASES[name][0]()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_the_loss_is_what_is_written(tmp_path, name):
    _, data, compare, where, more = CASES[name]
    teacher = sharpened(build(name, 1)).eval()
    weight, temperature = 0.6, 3.0
    more = more | dict(distillation_weight=weight, distillation_temperature=temperature)
    trainer = make(tmp_path, model=build(name, 0), data=data(), teacher=teacher, **more)
    model = trainer.model.train()
    inputs = batch(trainer)
    labels = inputs["labels"]
    num_items = trainer._get_num_items_in_batch([inputs], torch.device("cpu"))
    loss, outputs = trainer.compute_loss(model, dict(inputs), return_outputs=True, num_items_in_batch=num_items)
    assert torch.equal(loss, trainer.compute_loss(model, dict(inputs), num_items_in_batch=num_items))
    with torch.no_grad():
        own = tf.Trainer.compute_loss(trainer, model, dict(inputs), num_items_in_batch=num_items)
        logits = distillation.logits_of(outputs)
        of_teacher = distillation.logits_of(teacher(**inputs))
    chosen = where(labels)
    part = compare(logits[chosen], of_teacher[chosen], temperature)
    expected = (1 - weight) * own + weight * part
    torch.testing.assert_close(loss.detach().double(), expected.double(), atol=1e-6, rtol=1e-5)
    # controls: the other temperature, and all the positions
    assert abs(part - compare(logits[chosen], of_teacher[chosen], 2.0)) > 1e-5 * part or compare is squares
    if not chosen.all():
        flat = compare(logits.flatten(0, 1), of_teacher.flatten(0, 1), temperature)
        assert abs(part - flat) > 1e-3 * part
    assert abs(part) > 1e-4


def test_padding_and_prompts_do_not_count(tmp_path):
    """Whatever the teacher says there; and it counts what it says of the answer."""
    base = sharpened(made("llama", 1)).eval()

    class Elsewhere(nn.Module):
        def __init__(self, where):
            super().__init__()
            self.where = where

        def forward(self, input_ids, attention_mask):
            logits = base(input_ids=input_ids, attention_mask=attention_mask).logits
            return {"logits": logits + 50 * torch.randn_like(logits) * self.where.unsqueeze(-1)}

    def loss(where):
        trainer = make(tmp_path, "llama", teacher=Elsewhere(where))
        return trainer.compute_loss(trainer.model.train(), batch(trainer)).item()

    counts = answers(batch(make(tmp_path, "llama"))["labels"])
    quiet = loss(torch.zeros_like(counts))
    assert 0 < counts.sum() < counts.numel()
    assert loss(~counts) == pytest.approx(quiet, rel=1e-6)
    assert abs(loss(counts) - quiet) > 1  # control


def test_a_class_that_both_mask_out_is_no_class():
    masked = torch.tensor([[0.0, 1.0, float("-inf")]], requires_grad=True)
    value = divergence.divergence(masked, torch.tensor([[2.0, 0.0, float("-inf")]]), 2.0)
    value.sum().backward()
    without = divergence.divergence(masked.detach()[:, :2], torch.tensor([[2.0, 0.0]]), 2.0)
    assert torch.allclose(value, without) and torch.isfinite(masked.grad).all()
    assert not torch.allclose(value, divergence.divergence(masked, torch.tensor([[0.0, 2.0, float("-inf")]]), 2.0))


# accumulation ----------------------------------------------------------------------------------------


def gradients(trainer, batches):
    """The gradients of some batches that are accumulated, as the training loop gives them to `training_step`."""
    model = trainer.model
    model.zero_grad()
    samples, num_items = trainer.get_batch_samples(iter(batches), len(batches), torch.device("cpu"))
    trainer.current_gradient_accumulation_steps = len(samples)
    for inputs in samples:
        trainer.training_step(model, dict(inputs), num_items)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def apart(a, b):
    return max(float((a[name] - b[name]).abs().max() / b[name].abs().max().clamp(min=1e-6)) for name in b)


class MeanOfEach(OTOTrainer):
    """Breaks the rule: the mean of each batch, divided by their number."""

    def _scaled(self, values, num_items):
        return values.mean() / self.current_gradient_accumulation_steps


def counted(outputs, labels, num_items_in_batch=None):
    total = nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return total / num_items_in_batch


@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize("function", [None, counted])
def test_accumulated_batches_are_one_large_batch(tmp_path, weight, function):
    """Also where one has many more labels than the other."""

    def made_by(cls):
        more = dict(distillation_weight=weight, compute_loss_func=function, cls=cls)
        return make(tmp_path, "llama", teacher=sharpened(made("llama", 1)), **more)

    trainer = made_by(OTOTrainer)
    large = batch(trainer, 0, 6)
    parts = [{name: t[half] for name, t in large.items()} for half in (slice(0, 1), slice(1, 6))]
    num_labels = [int(answers(part["labels"]).sum()) for part in parts]
    assert num_labels[1] > 6 * num_labels[0]
    whole = gradients(trainer, [large])
    assert apart(gradients(trainer, parts), whole) < 1e-4
    assert apart(gradients(made_by(MeanOfEach), parts), whole) > 1e-2  # control


def test_accumulation_where_labels_are_not_counted(tmp_path):
    """A model whose forward takes no more arguments: the mean over equal batches is that over all of them."""
    trainer = make(tmp_path, "plain", teacher=sharpened(made("plain", 1)), distillation_weight=1.0)
    assert not trainer.model_accepts_loss_kwargs
    trainer.model.norm = trainer._teacher.module.norm = nn.Identity()  # batch statistics are those of a batch
    large = batch(trainer, 0, 8)
    parts = [{name: t[half] for name, t in large.items()} for half in (slice(0, 4), slice(4, 8))]
    whole = gradients(trainer, [large])
    assert apart(gradients(trainer, parts), whole) < 1e-4
    trainer.loss_is_scaled_for_ga = True  # whoever says so has no one divide; our part still is the mean over all
    assert apart(gradients(trainer, parts), whole) < 1e-4
    trainer._scaled = lambda values, num_items: values.mean()
    assert apart(gradients(trainer, parts), whole) > 0.1  # control


# the teacher -----------------------------------------------------------------------------------------


def as_it_is(model):
    """All of a model that training could change."""
    modes = [module.training for module in model.modules()]
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    return copy.deepcopy((weights(model), modes, asked, hooks, [p.grad for p in model.parameters()]))


class InItsMode(Teacher):
    """Breaks the rule: the teacher runs in the mode in which it was given."""

    def logits(self, call, label_names):
        with torch.no_grad():
            return self.module(**self._arguments(call.kwargs, label_names))["logits"]


def test_the_teacher_stays_as_it_is(tmp_path, monkeypatch):
    """Its statistics, modes and flags; no checkpoint, report or optimizer knows of it."""

    def given():
        teacher = sharpened(made("resnet", 1)).train()
        teacher.resnet.embedder.eval()
        next(teacher.parameters()).requires_grad_(False)
        return teacher

    teacher = given()
    before = as_it_is(teacher)
    saving = dict(save_strategy="steps", save_steps=12)
    with_teacher = trained(tmp_path / "with", "resnet", teacher, **saving)
    assert same(as_it_is(teacher), before)
    alone = trained(tmp_path / "alone", "resnet", **saving)
    for what in ("params", "bytes", "macs"):
        assert with_teacher.report["before"][what] == alone.report["before"][what]
    for what in ("params", "trained"):  # of the model, and of the gradients, after the first step
        assert vars(with_teacher.steps)[what][0] == vars(alone.steps)[what][0]
    for name in ("model.safetensors", "optimizer.pt"):
        sizes = [os.path.getsize(tmp_path / run / "checkpoint-12" / name) for run in ("with", "alone")]
        assert abs(sizes[0] - sizes[1]) < 0.2 * sizes[1]  # the cuts may differ; a teacher would be as much again
    assert not [name for name in with_teacher.model.state_dict() if "teacher" in name]
    assert not same_run(with_teacher, alone)  # control: it was asked
    monkeypatch.setattr(distillation, "Teacher", InItsMode)
    teacher = given()
    trained(tmp_path / "broken", "resnet", teacher)
    assert not same(as_it_is(teacher), before)  # control: its statistics would have moved


class Counting(nn.Module):
    """A teacher that notes how it is asked."""

    def __init__(self, module):
        super().__init__()
        self.module, self.asked = module, []

    def forward(self, **kwargs):
        state = (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), self.module.training)
        self.asked.append((state, sorted(kwargs)))
        return self.module(**kwargs)


def test_the_teacher_is_asked_once_a_batch_and_only_in_training(tmp_path):
    teacher = Counting(made("vit", 1))
    trainer = trained(tmp_path, teacher=teacher, eval_strategy="steps", eval_steps=6)
    trainer.evaluate()
    trainer.predict(trainer.eval_dataset)
    assert teacher.asked == [((False, False, False), ["pixel_values"])] * STEPS
    alone = trained(tmp_path / "alone", eval_strategy="steps", eval_steps=6)
    calls = [[(call.args, dict(call.kwargs), call.path) for call in run._forwards] for run in (trainer, alone)]
    assert same(*calls) and calls[0]
    assert trainer.partition.to_dict() == alone.partition.to_dict()
    trainer = make(tmp_path / "control", teacher=teacher)
    trainer.compute_loss(trainer.model.train(), batch(trainer))
    assert len(teacher.asked) == STEPS + 1  # control: whoever asks for the loss of training asks the teacher


def test_evaluation_is_the_trainers_own(tmp_path):
    trainer = make(tmp_path, teacher=sharpened(made("vit", 1)))
    own = make(tmp_path).evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == own
    with torch.no_grad():
        trainer.model.train()
        assert float(trainer.prediction_step(trainer.model, batch(trainer), True)[0]) > 0
    inputs = batch(trainer, 0, 8)
    assert trainer.compute_loss(trainer.model.train(), inputs).item() != pytest.approx(own, rel=1e-3)  # control


def test_without_a_teacher_nothing_changes(tmp_path):
    """To the last bit, whatever weight and temperature are; and with weight 0 neither."""
    plain = trained(tmp_path / "plain")
    assert same_run(trained(tmp_path / "set", distillation_weight=1.0, distillation_temperature=9.0), plain)
    assert same_run(trained(tmp_path / "zero", teacher=made("vit", 1), distillation_weight=0.0), plain)
    assert not same_run(trained(tmp_path / "some", teacher=made("vit", 1), distillation_weight=0.1), plain)  # control


def test_a_model_follows_its_teacher_or_its_labels(tmp_path):
    """With weight 1 the labels, which are random, have no say."""
    teacher = sharpened(sharpened(made("vit", 1))).eval()
    data = rows("vit", 32)
    pixels, labels = torch.stack([row["pixel_values"] for row in data]), torch.tensor([row["labels"] for row in data])
    with torch.no_grad():
        difference = teacher(pixels).logits.diff(dim=-1).median()
        teacher.classifier.bias[1] -= difference  # half of the images are of either class
        said = teacher(pixels).logits.argmax(-1)
    assert 12 <= int(said.sum()) <= 20 and 0.3 < float((said == labels).float().mean()) < 0.7

    def agreement(weight):
        more = dict(distillation_weight=weight, max_steps=150, learning_rate=1e-2, target_group_sparsity=0.2)
        model = trained(tmp_path / str(weight), teacher=teacher, data=data, **more).model.eval()
        with torch.no_grad():
            answer = model(pixels).logits.argmax(-1)
        return float((answer == said).float().mean()), float((answer == labels).float().mean())

    of_teacher, of_labels = agreement(1.0)
    assert of_teacher > 0.95 and of_labels < 0.75
    of_teacher, of_labels = agreement(0.0)  # control
    assert of_teacher < 0.75 and of_labels > 0.95


def test_a_teacher_of_another_architecture_and_dtype(tmp_path):
    """It gets the arguments that it takes, in its dtype."""

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3 * 64, 2)

        def forward(self, pixel_values):
            return (self.head(pixel_values.flatten(1)),)

    trainer = trained(tmp_path, teacher=Pooled().bfloat16())
    assert trainer.report["group_sparsity"] == 0.5
    model = make(tmp_path, teacher=Pooled().bfloat16())
    inputs = batch(model)
    assert torch.isfinite(model.compute_loss(model.model.train(), inputs | {"head_mask": None}))
    with pytest.raises(TypeError, match="unexpected keyword"):  # control
        Pooled()(**inputs)


def test_mixed_precision_and_compiled_models(tmp_path):
    teacher = Counting(made("vit", 1))
    trainer = make(tmp_path / "bf16", teacher=teacher, bf16=True)
    trainer.evaluate()
    trainer.train()
    assert {state for state, _ in teacher.asked} == {(False, True, False)}
    plain = trained(tmp_path / "plain", teacher=made("vit", 1))
    compiled = trained(tmp_path / "compiled", teacher=made("vit", 1), torch_compile_backend="eager")
    assert compiled.plan == plain.plan
    for p, q in zip(plain.model.parameters(), compiled.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)
    other = trained(tmp_path / "other", teacher=made("vit", 2))  # control
    assert other.plan != plain.plan or not same(weights(other.model), weights(plain.model))


# a copy of the model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "llama", "plain"])
def test_dense_is_a_copy_of_the_model_before_training(tmp_path, name):
    by_hand = trained(tmp_path / "by hand", name, teacher=copy.deepcopy(made(name)))
    assert same_run(trained(tmp_path / "dense", name, teacher="dense"), by_hand)
    assert not same_run(trained(tmp_path / "other", name, teacher=made(name, 1)), by_hand)  # controls
    assert not same_run(trained(tmp_path / "none", name), by_hand)


def test_dense_after_an_evaluation_under_mixed_precision(tmp_path):
    """accelerate has wrapped the model's forward by then, and a copy of that must not run the model."""

    def run(teacher, evaluates):
        trainer = make(tmp_path, teacher=teacher, bf16=True)
        if evaluates:
            trainer.evaluate()
        trainer.train()
        return trainer

    expected = run(made("vit"), False)
    assert same_run(run("dense", True), expected)
    assert not same_run(run(made("vit", 1), True), expected)  # control


def test_a_copy_is_let_go_of_in_the_end(tmp_path):
    trainer = trained(tmp_path, teacher="dense")
    assert trainer._teacher is None
    given = made("vit", 1)
    assert trained(tmp_path, teacher=given)._teacher.module is given  # control


@pytest.mark.parametrize("step", [6, 18])
def test_resuming_is_the_same_run(tmp_path, step):
    """Bit by bit, from a dense checkpoint and from one that is cut."""
    saving = dict(save_strategy="steps", save_steps=6)
    whole = trained(tmp_path / "whole", teacher="dense", **saving)
    folder = checkpoint(whole, step)
    assert shrank(whole) and min(whole.steps.cuts) < 18
    assert same_run(trained(tmp_path / "again", teacher="dense", resume=folder), whole)
    assert same_run(trained(tmp_path / "given", teacher=made("vit"), resume=folder), whole)
    late = sharpened(made("vit"))  # controls
    assert not same_run(trained(tmp_path / "late", teacher=late, resume=folder), whole)


def test_after_an_interruption_the_teacher_is_the_same(tmp_path):
    """What the same trainer resumes is the uninterrupted run, although its model has other weights by then."""
    saving = dict(save_strategy="steps", save_steps=6)
    whole = trained(tmp_path / "whole", teacher="dense", **saving)
    trainer = make(tmp_path / "again", teacher="dense", callbacks=[Interrupt(20, KeyboardInterrupt)], **saving)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    teacher = trainer._teacher
    trainer.train(resume_from_checkpoint=True)
    assert same_run(trainer, whole)
    trainer = make(tmp_path / "control", teacher="dense", callbacks=[Interrupt(20, KeyboardInterrupt)], **saving)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer._teacher is not teacher
    trainer._copied_model = None  # control: a copy of the weights as they are
    trainer.train(resume_from_checkpoint=True)
    assert not same_run(trainer, whole)


def test_every_model_of_model_init_has_a_copy_of_its_own(tmp_path, monkeypatch):
    copies, models, seeds = [], [], iter(range(10))
    copied = OTOTrainer._copied

    def noting(self, model):
        copies.append(copied(self, model))
        return copies[-1]

    def model_init():
        models.append(weights(model := made("vit", next(seeds))))
        return model

    monkeypatch.setattr(OTOTrainer, "_copied", noting)
    trainer = make(tmp_path, teacher="dense", model_init=model_init)
    trainer.train()
    trainer.train()
    assert len(models) == 3 and len(copies) == 2  # the first model is of the constructor, and isn't trained
    assert [same(weights(made), model) for made, model in zip(copies, models[1:], strict=True)] == [True, True]
    assert not same(weights(copies[0]), weights(copies[1]))  # control


def test_memory_that_runs_out_leaves_the_teacher(tmp_path):
    """A second try with a smaller batch has the same teacher, and the end is that of the runs which don't shrink."""
    runs = []
    for shrink in (False, True):
        folder, out = tmp_path / str(shrink), OutOfMemory(18)
        trainer = make(folder, teacher="dense", shrink=shrink, callbacks=[out], auto_find_batch_size=True)
        seen = []
        trainer._begin_teaching = lambda model, right=trainer._begin_teaching, seen=seen: seen.append(right(model))
        trainer.train()
        assert len(seen) == 1 and trainer._train_batch_size == 3
        runs.append(trainer)
    assert_same_end(*runs)


# shrinking -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "teacher"), [("vit", "dense"), ("bert", "given"), ("llama", "dense")])
def test_shrinking_changes_nothing(tmp_path, name, teacher):
    runs = []
    for shrink in (False, True):
        given = "dense" if teacher == "dense" else sharpened(made(name, 1))
        before = None if teacher == "dense" else as_it_is(given)
        runs.append(trained(tmp_path / str(shrink), name, given, shrink=shrink, **LOGGED))
        assert before is None or same(as_it_is(given), before)
    assert_same_end(*runs)
    other = trained(tmp_path / "other", name, sharpened(made(name, 2)), shrink=False)
    assert (
        other.plan != runs[0].plan
        or record(other) != record(runs[0])
        or not same(weights(other.model), weights(runs[0].model))
    )  # control


class Keeper(tf.TrainerCallback):
    def __init__(self, module):
        self.module = module


def test_a_callback_that_holds_the_teacher_keeps_no_tensors(tmp_path):
    teacher = made("vit", 1)
    assert shrank(trained(tmp_path / "a", teacher=teacher, callbacks=[Keeper(teacher)]))
    assert not shrank(trained(tmp_path / "b", teacher=teacher, callbacks=[Keeper(made("vit", 2))]))  # control


def test_a_trainer_is_copied_with_its_teacher(tmp_path):
    trainer = make(tmp_path, teacher=made("vit", 1))
    other = copy.deepcopy(trainer)
    assert other._teacher.module is not trainer._teacher.module
    inputs = batch(trainer)
    expected = trainer.compute_loss(trainer.model.train(), dict(inputs))
    assert torch.equal(other.compute_loss(other.model.train(), dict(inputs)), expected)
    other._teacher = None
    assert not torch.equal(other.compute_loss(other.model.train(), dict(inputs)), expected)  # control


# other trainers --------------------------------------------------------------------------------------


class Unfused(trl.SFTTrainer):
    compute_loss = tf.Trainer.compute_loss


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing")  # trl 1.16 sets, and switches, what is deprecated
def test_a_fused_loss_has_no_logits_and_says_the_way_out(tmp_path):
    def run(cls, teacher):
        args = client_settings(tmp_path, trl.SFTConfig, bf16=False)
        data = Dataset.from_dict(TEXT)
        more = dict(train_dataset=data, eval_dataset=data.select(range(8)), processing_class=tokenizer())
        trainer = mixed(cls)(model=from_disk(tmp_path), args=args, teacher=teacher, **more)
        trainer.dense_loss = trainer.evaluate()["eval_loss"]
        trainer.train()
        return trainer

    with pytest.raises(OTOError, match=r"without computing logits.*compute_loss = transformers.Trainer.compute_loss"):
        run(trl.SFTTrainer, "dense")
    trainer, alone, fused = run(Unfused, "dense"), run(Unfused, None), run(trl.SFTTrainer, None)
    assert trainer.report["group_sparsity"] == 0.5 and trainer.evaluate()["eval_loss"] > 0
    assert alone.dense_loss == pytest.approx(fused.dense_loss, rel=1e-5)  # the same loss, in one step or in two
    assert not same(weights(alone.model), weights(trainer.model))  # control


def test_an_embedding_model_has_no_logits(tmp_path):
    model = embedder(tmp_path)
    args = client_settings(tmp_path, st.SentenceTransformerTrainingArguments)
    data = Dataset.from_dict({"anchor": ["it was good", "it was bad"] * 16, "positive": ["good film", "a film"] * 16})
    more = dict(train_dataset=data, loss=losses.MultipleNegativesRankingLoss(model), teacher="dense")
    with pytest.raises(OTOError, match="without computing logits"):
        mixed(st.SentenceTransformerTrainer)(model, args, **more).train()


@pytest.mark.parametrize("with_decoder_inputs", [True, False])
def test_seq2seq(tmp_path, with_decoder_inputs):
    tf.set_seed(0)
    args = short_arguments(tmp_path, OTOSeq2SeqTrainingArguments, max_steps=STEPS, predict_with_generate=True)
    more = dict(data=pairs(with_decoder_inputs), cls=OTOSeq2SeqTrainer, args=args)
    trainer = trained(tmp_path, model=t5(), teacher="dense", **more)
    assert trainer.report["group_sparsity"] == 0.5
    assert trainer.predict(trainer.eval_dataset, max_new_tokens=4).predictions.shape[0] == 8


class Twice(tf.Trainer):
    """Calls its model twice for one batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = model(**inputs)["loss"] + model(**inputs)["loss"]
        return (loss, {}) if return_outputs else loss


def test_a_loss_of_several_calls_and_classes_behind_and_before(tmp_path):
    """Their mean counts. A loss in a class behind `OTOMixin` is the trainer's own; one before it has to call ours."""
    teacher = sharpened(made("vit", 1))
    behind = make(tmp_path, teacher=teacher, cls=type("Behind", (OTOMixin, Twice), {}), distillation_weight=0.5)
    plain = make(tmp_path, teacher=teacher, distillation_weight=0.5)
    inputs = batch(plain)
    own = plain.model.train()(**inputs).loss
    difference = behind.compute_loss(behind.model.train(), dict(inputs)) - plain.compute_loss(
        plain.model, dict(inputs)
    )
    assert difference.item() == pytest.approx(0.5 * own.item(), rel=1e-4)

    class Past(OTOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs)["loss"]

    with pytest.raises(OTOError, match=r"compute_loss of Past goes past"):
        trained(tmp_path, teacher=teacher, cls=Past)
    trained(tmp_path, cls=Past)  # control: without a teacher nobody minds

    class Through(OTOTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return super().compute_loss(model, inputs, *args, **kwargs)

    trained(tmp_path, teacher=teacher, cls=Through)


# errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(distillation_weight=1.5), r"distillation_weight is 1.5: it must be in \[0, 1\]"),
        (dict(distillation_weight=float("nan")), "distillation_weight is nan"),
        (dict(distillation_temperature=0.0), "distillation_temperature is 0.0: it must be a number above 0"),
        (dict(distillation_temperature=float("inf")), "distillation_temperature is inf"),
    ],
)
def test_arguments_out_of_range(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        short_arguments(tmp_path, **settings)
    trainer = make(tmp_path, teacher="dense")
    vars(trainer.args).update(settings)  # as a search does
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("teacher", ["sparse", 3, tf.ViTConfig()])
def test_what_is_no_teacher(tmp_path, teacher):
    with pytest.raises(ValueError, match="it must be a model, or 'dense'"):
        make(tmp_path, teacher=teacher)


def test_a_teacher_that_would_change(tmp_path):
    model = made("vit")
    with pytest.raises(OTOError, match="the teacher is the model that is trained: teacher='dense'"):
        make(tmp_path, model=model, teacher=model)
    tied = made("vit", 1)
    tied.classifier.weight = model.classifier.weight
    with pytest.raises(OTOError, match=r"classifier.weight of the teacher is classifier.weight of the model"):
        make(tmp_path, model=model, teacher=tied)
    view = made("vit", 1)
    view.classifier.bias.data = model.classifier.bias.data[:]  # other tensors, the same memory
    with pytest.raises(OTOError, match=r"classifier.bias of the teacher"):
        make(tmp_path, model=model, teacher=view)
    make(tmp_path, model=model, teacher=made("vit", 1))  # control


def test_another_number_of_logits(tmp_path):
    tf.set_seed(1)
    three = tf.ViTForImageClassification(
        tf.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=8,
                     patch_size=4, num_labels=3)
    )  # fmt: skip
    trainer = make(tmp_path, teacher=three)
    with pytest.raises(OTOError, match=r"the model has 2 logits.*and the teacher 3"):
        trainer.train()
    assert trainer.state.global_step == 0


class TagsForTokenClassification(tf.BertForTokenClassification):
    """Its labels have a name of their own."""

    def forward(self, input_ids=None, attention_mask=None, tags=None, **kwargs):
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask)
        if tags is not None:
            output["loss"] = nn.functional.cross_entropy(output.logits.flatten(0, 1), tags.flatten())
        return output


def test_labels_of_another_name(tmp_path):
    tf.set_seed(0)
    config = tf.BertConfig(**SMALL, **NO_DROPOUT, num_labels=3)
    model, teacher = TagsForTokenClassification(config), sharpened(TagsForTokenClassification(config))
    ids = torch.randint(3, 40, (4, 6))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "tags": ids % 3}
    inputs["tags"][:, :3] = -100
    args = short_arguments(tmp_path, max_steps=STEPS, label_names=["tags"], distillation_weight=1.0)
    trainer = make(tmp_path, model=model, teacher=teacher, args=args, data=[{}] * 8)
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(model.train(), dict(inputs)).detach()
    both = [m.eval()(**inputs).logits.detach() for m in (model, teacher)]
    counted, everywhere = kl(*(x[:, 3:].flatten(0, 1) for x in both), 2.0), kl(*(x.flatten(0, 1) for x in both), 2.0)
    assert float(loss) == pytest.approx(float(counted), rel=1e-4)
    assert float(counted) != pytest.approx(float(everywhere), rel=1e-3)  # control


def test_outputs_without_logits_are_named(tmp_path):
    class Named(nn.Module):
        def __init__(self, key):
            super().__init__()
            self.fc, self.out, self.key = nn.Linear(4, 16), nn.Linear(16, 3), key

        def forward(self, x, labels=None):
            y = self.out(self.fc(x).relu())
            loss = y.sum() if labels is None else nn.functional.cross_entropy(y, labels)
            return {"loss": loss, self.key: y}

    x, labels = torch.randn(4, 4), torch.tensor([0, 1, 2, 0])
    for key in ("pred", "logits"):
        trainer = make(tmp_path, model=Named(key), teacher=Named("logits"), data=[{"x": x[0], "labels": 0}] * 8)
        trainer.current_gradient_accumulation_steps = 1
        if key == "logits":  # control
            assert torch.isfinite(trainer.compute_loss(trainer.model.train(), {"x": x, "labels": labels}))
            continue
        with pytest.raises(
            OTOError, match=r"that have a gradient \(it returns loss, pred\), and a teacher is compared by `logits`"
        ):
            trainer.compute_loss(trainer.model.train(), {"x": x, "labels": labels})


def test_classes_in_another_order(tmp_path):
    def named(*names):
        model = made("vit", 1)
        model.config.id2label = dict(enumerate(names))
        return model

    with pytest.raises(OTOError, match=r"classes of the teacher are \['pos', 'neg'\] and those of the model"):
        make(tmp_path, model=named("neg", "pos"), teacher=named("pos", "neg")).train()
    for of_teacher in (("neg", "pos"), ("LABEL_0", "LABEL_1")):  # controls
        distillation.refuse_other_order(named(*of_teacher), named("neg", "pos"))


def test_positions_of_which_nobody_says_whether_they_count(tmp_path):
    trainer = make(tmp_path, "llama", teacher=made("llama", 1))
    inputs = batch(trainer)

    def loss(keys):
        calls = {key: inputs[key] for key in keys}
        trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum()
        trainer.current_gradient_accumulation_steps = 1
        return trainer.compute_loss(trainer.model.train(), calls)

    with pytest.raises(OTOError, match=r"nothing says which positions of the logits, \(4, 8, 40\), count"):
        loss(["input_ids"])
    assert torch.isfinite(loss(["input_ids", "attention_mask"]))  # control
    pixels = {"labels": torch.zeros(2, 4, 4, dtype=torch.long)}  # of logits (2, 4 classes, 4, 4)
    assert divergence.compared((2, 4, 4), pixels, pixels["labels"], shifts=False) is None
    assert divergence.compared((2, 16), {}, pixels["labels"].flatten(1), shifts=False).all()  # control


def patched(how):
    """A model in the place of whose forward somebody has put a function that knows the model."""
    model = sharpened(made("vit", 3))
    stock = model.forward

    @functools.wraps(stock)
    def forward(pixel_values=None, labels=None, **kwargs):
        assert forward is not None  # it is in its own closure, too
        return stock(pixel_values=pixel_values, labels=labels)

    def method(self, pixel_values=None, labels=None, **kwargs):
        return stock(pixel_values=pixel_values, labels=labels)

    class Held:
        def __deepcopy__(self, memo):
            return self

        def __call__(self, pixel_values=None, labels=None, **kwargs):
            return stock(pixel_values=pixel_values, labels=labels)

    put = {"function": forward, "method": types.MethodType(method, model), "object": Held()}
    model.forward = put[how]
    return model


@pytest.mark.parametrize("how", ["function", "method"])
def test_a_copy_runs_layers_of_its_own(tmp_path, how, monkeypatch):
    """`deepcopy` copies no functions, and TRL puts such a function there: the teacher would be the model itself."""
    expected = trained(tmp_path / "a", teacher=sharpened(made("vit", 3)), model=patched(how))
    assert same_run(trained(tmp_path / "b", model=patched(how), teacher="dense"), expected)
    monkeypatch.setattr(distillation, "_rebound", lambda value, copies: value)  # control
    with pytest.raises(OTOError, match="the teacher runs layers of the model that is trained"):
        trained(tmp_path / "c", model=patched(how), teacher="dense")


def test_a_teacher_that_runs_the_model_is_refused(tmp_path):
    with pytest.raises(OTOError, match="the teacher runs layers of the model that is trained"):
        trained(tmp_path, model=patched("object"), teacher="dense")
    trained(tmp_path, model=patched("object"), teacher=made("vit", 3))  # control


def test_several_cards_in_one_process_are_refused(tmp_path, monkeypatch):
    trainer = make(tmp_path, teacher="dense")
    monkeypatch.setattr(tf.TrainingArguments, "n_gpu", 2)
    with pytest.raises(OTOError, match=r"DataParallel has no teacher.*torchrun"):
        trainer.train()
    assert make(tmp_path / "control")._begin_teaching(nn.Linear(1, 1)) is None  # control


# what is written -------------------------------------------------------------------------------------


def test_the_card_says_who_taught(tmp_path):
    made("bert", 1).save_pretrained(tmp_path / "big")
    teacher = tf.BertForSequenceClassification.from_pretrained(tmp_path / "big")

    def card(folder, teacher, **more):
        trainer = trained(tmp_path / folder, "bert", teacher, **more)
        trainer.create_model_card(model_name="mine")
        return (tmp_path / folder / "README.md").read_text()

    text = card("given", teacher, distillation_weight=0.7)
    assert f"Teacher: {tmp_path / 'big'}, a BertForSequenceClassification. Its logits" in text
    assert "distillation_weight=0.7," in text and "distillation_temperature=2.0," in text
    assert "Teacher: a copy of the model as it was before training (`teacher='dense'`)" in card("dense", "dense")
    assert "eacher" not in (none := card("none", None)) and "distillation" not in none  # control


# several processes -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["ddp", "fsdp2", "zero3"])
def test_ranks_end_where_one_process_ends(tmp_path, scenario):
    """With labels that are unequal between them, counted for all of them; and all have the teacher of rank 0."""
    if scenario == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    script = str(ROOT / "tests" / "distillation_worker.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launch, str(tmp_path), scenario], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-5000:]
    ranks = [torch.load(tmp_path / f"{scenario}.{rank}.pt", weights_only=True) for rank in range(2)]
    one, other = worker.run(tmp_path / "one", batch_size=8), worker.run(tmp_path / "two", batch_size=8, teacher=None)

    def far(a, b):
        if a["plan"] != b["plan"]:
            return float("inf")
        return max(float((t - b["weights"][n]).abs().max()) for n, t in a["weights"].items())

    assert far(*ranks) == 0
    assert far(ranks[0], one) < 1e-5
    assert far(ranks[0], other) > 1e-3  # control
