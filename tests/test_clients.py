"""Trainers of others, their real classes, with `OTOMixin` before them: TRL's, sentence-transformers', PEFT's models.

The law: whatever the trainer, its run ends at the target, the report agrees with the weights, what is saved loads
again, and what the trainer returns and hands to callbacks is what it was.
"""

import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import sentence_transformers as st
import torch
import transformers as tf
import trl
from datasets import Dataset
from sentence_transformers.sentence_transformer import losses, modules
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.trainer_utils import default_compute_objective

from hf_oto import (
    OTOArguments,
    OTOError,
    OTOMixin,
    OTOSeq2SeqTrainer,
    OTOSeq2SeqTrainingArguments,
    OTOTrainer,
    OTOTrainingArguments,
    whole,
)
from hf_oto.arguments import as_code

pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing"),  # trl 1.16 sets, and switches, what is deprecated
]


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch):
    """Latencies are no subject here."""
    monkeypatch.setattr(whole, "measure", functools.partial(whole.measure, seconds=0.01))


WORDS = "[PAD] [UNK] [EOS] user assistant : it was a good bad film".split()
SIZES = dict(
    vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=48, pad_token_id=0, bos_token_id=None, eos_token_id=2,
)  # fmt: skip

# a message a line, and what the assistant says marked as such
TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
assistant : {% generation %}{{ message.content }} [EOS]{% endgeneration %}
{%- else -%}
{{ message.role }} : {{ message.content }}{{ ' ' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}assistant : {% endif -%}
"""


def tokenizer(**more):
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", padding_side="left")
    return tf.PreTrainedTokenizerFast(tokenizer_object=words, chat_template=TEMPLATE, **(special | more))


def llama(seed=0, cls=tf.LlamaForCausalLM, **more):
    tf.set_seed(seed)
    return cls(tf.LlamaConfig(**(SIZES | more)))


def from_disk(folder):
    """As people have it who fine-tune: its config says where it came from, and a reference is made from there."""
    llama().save_pretrained(folder / "pretrained")
    return tf.LlamaForCausalLM.from_pretrained(folder / "pretrained")


def settings(folder, cls=OTOTrainingArguments, **more):
    usual = dict(
        max_steps=24, per_device_train_batch_size=8, per_device_eval_batch_size=8, learning_rate=1e-3,
        logging_steps=8, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    return cls(str(folder), **(usual | more))


def mixed(cls):
    """What a user writes: `class Mine(OTOMixin, cls): pass`."""
    return type(f"OTO{cls.__name__}", (OTOMixin, cls), {})


def state(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def count(model):
    return sum(p.numel() for p in model.parameters())


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


def holds(trainer, dense, folder, load=None):
    """The law, but for what the trainer returns: see the module. `dense` is how many parameters there were."""
    report, partition = trainer.report, trainer.partition
    assert report["group_sparsity"] == round(0.5 * partition.num_zigs) / partition.num_zigs
    assert trainer.plan.removed(partition).sum() == round(0.5 * partition.num_zigs)
    assert report["before"]["params"] == dense
    assert report["after"]["params"] == count(trainer.model) < 0.95 * dense
    assert report["max_output_difference"] < 1e-9
    trainer.save_model(str(folder))
    loaded = (load or type(trainer.model).from_pretrained)(str(folder))
    assert same(state(loaded), state(trainer.model))
    return loaded


# TRL --------------------------------------------------------------------------------------

TEXT = {"text": ["it was a good film", "a bad film it was"] * 16}
CHAT = {
    "messages": [
        [{"role": "user", "content": "was it a good film"}, {"role": "assistant", "content": f"it was a {word} film"}]
        for word in ("good", "bad") * 16
    ]
}
COMPLETION = {"prompt": ["it was "] * 32, "completion": ["a good film", "a bad film"] * 16}
PREFERENCE = {"prompt": ["it was "] * 32, "chosen": ["a good film"] * 32, "rejected": ["a bad film"] * 32}
RATED = {"prompt": ["it was "] * 32, "completion": ["a good film", "a bad film"] * 16, "label": [True, False] * 16}


def length_reward(completions, **_):
    return [float(len(completion)) for completion in completions]


# name: (trainer, its arguments, data, settings, arguments of the constructor)
RUNS = {
    "sft: text": (trl.SFTTrainer, trl.SFTConfig, TEXT, {}, {}),
    "sft: chat": (trl.SFTTrainer, trl.SFTConfig, CHAT, {}, {}),
    "sft: assistant only": (trl.SFTTrainer, trl.SFTConfig, CHAT, dict(assistant_only_loss=True), {}),
    "sft: completion only": (trl.SFTTrainer, trl.SFTConfig, COMPLETION, dict(completion_only_loss=True), {}),
    "sft: packing": (trl.SFTTrainer, trl.SFTConfig, TEXT, dict(packing=True, max_length=16), {}),
    "sft: bf16": (trl.SFTTrainer, trl.SFTConfig, TEXT, dict(bf16=True), {}),
    "sft: no checkpointing": (trl.SFTTrainer, trl.SFTConfig, TEXT, dict(gradient_checkpointing=False), {}),
    "dpo": (trl.DPOTrainer, trl.DPOConfig, PREFERENCE, {}, {}),
    "dpo: bf16": (trl.DPOTrainer, trl.DPOConfig, PREFERENCE, dict(bf16=True), {}),
    "dpo: computed before": (trl.DPOTrainer, trl.DPOConfig, PREFERENCE, dict(precompute_ref_log_probs=True), {}),
    "kto": (trl.KTOTrainer, trl.KTOConfig, RATED, {}, {}),
    "reward": (
        trl.RewardTrainer, trl.RewardConfig,
        {"chosen": ["it was a good film"] * 32, "rejected": ["it was a bad film"] * 32}, {}, {},
    ),
    "grpo": (
        trl.GRPOTrainer, trl.GRPOConfig, {"prompt": ["it was"] * 32},
        dict(num_generations=4, max_completion_length=4), dict(reward_funcs=length_reward),
    ),
    "grpo: reference": (
        trl.GRPOTrainer, trl.GRPOConfig, {"prompt": ["it was"] * 32},
        dict(num_generations=4, max_completion_length=4, beta=0.1, num_iterations=2),
        dict(reward_funcs=length_reward),
    ),
}  # fmt: skip


def trl_trainer(name, folder, mixin=True, **more):
    cls, arguments, data, own, given = RUNS[name]
    model = llama(cls=tf.LlamaForSequenceClassification, num_labels=1) if name == "reward" else from_disk(folder)
    data = Dataset.from_dict(data)
    return (mixed(cls) if mixin else cls)(
        model=model,
        args=settings(folder, arguments, **({"bf16": False} | own)),
        train_dataset=data,
        eval_dataset=data.select(range(8)),
        processing_class=tokenizer(),
        **(given | more),
    )


@pytest.mark.parametrize("name", RUNS)
def test_trainers_of_trl(tmp_path, name):
    trainer = trl_trainer(name, tmp_path)
    dense = count(trainer.model)
    output = trainer.train()
    loaded = holds(trainer, dense, tmp_path / "compact")
    assert trainer.evaluate()["eval_loss"] > -1  # a number, and no error
    if not trainer.args.bf16:  # the trainer's model still computes under autocast then
        words = torch.tensor([[6, 7, 8, 9, 11]])
        with torch.no_grad():
            assert torch.equal(loaded.eval()(words).logits, trainer.model.eval()(words).logits)
    assert not [key for key in output.metrics if key.startswith("oto")]


def test_the_law_of_the_clients_can_fail(tmp_path):
    """Negative control of `holds`: it sees weights that differ from the saved ones, and a wrong report."""
    trainer = trl_trainer("sft: text", tmp_path)
    dense = count(trainer.model)
    trainer.train()
    holds(trainer, dense, tmp_path / "compact")
    saving = trainer.save_model

    def save_and_change(folder):
        saving(folder)
        with torch.no_grad():
            trainer.model.lm_head.weight[0, 0] += 1

    trainer.save_model = save_and_change
    with pytest.raises(AssertionError):
        holds(trainer, dense, tmp_path / "changed")
    trainer.save_model = saving
    trainer.report["after"]["params"] += 1
    with pytest.raises(AssertionError):
        holds(trainer, dense, tmp_path / "other")


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor([[6, 7, 8, 9, 11]])).logits


@pytest.mark.parametrize("own", [True, False])
def test_the_reference_of_dpo_stays_whole(tmp_path, own):
    """No weight and no output of the reference changes, whether the user gives it or the trainer loads it."""
    given = dict(ref_model=llama(seed=1)) if own else {}
    trainer = trl_trainer("dpo", tmp_path, **given)
    reference = trainer.ref_model
    assert not own or reference is given["ref_model"]
    dense, before, outputs = count(trainer.model), state(reference), logits(reference)
    policy = logits(trainer.model)
    trainer.train()
    holds(trainer, dense, tmp_path / "compact")
    assert trainer.ref_model is reference and same(state(reference), before)
    assert torch.equal(logits(reference), outputs)
    assert torch.isfinite(torch.tensor(trainer.evaluate()["eval_loss"]))  # it compares both
    assert not torch.allclose(logits(trainer.model), policy)  # control: the policy has changed


def test_forward_is_what_it_was_after_mixed_precision(tmp_path, monkeypatch):
    """Its decorators (this one makes `return_dict=False` a tuple), and what others have put in its place."""
    data = Dataset.from_dict({"input_ids": [[6, 7, 8, 9]] * 32, "labels": [[6, 7, 8, 9]] * 32})
    words = torch.tensor([[6, 7, 8, 9]])

    def run(model, folder):
        trainer = OTOTrainer(model, settings(folder, bf16=True), train_dataset=data, eval_dataset=data)
        trainer.evaluate()  # wraps it too
        trainer.train()
        return trainer.model

    model = run(llama(), tmp_path / "a")
    assert isinstance(model(input_ids=words, return_dict=False), tuple)
    patched = llama()
    stock = patched.forward

    @functools.wraps(type(patched).forward)
    def forward(*args, twice=False, **kwargs):
        return [stock(*args, **kwargs)] * 2 if twice else stock(*args, **kwargs)

    patched.forward = forward
    assert len(run(patched, tmp_path / "b")(input_ids=words, twice=True)) == 2
    # control: accelerate's own undo
    for module in ("hf_oto.trainer", "hf_oto.ending"):
        monkeypatch.setattr(f"{module}.take_off_autocast_", lambda model: None)
    with pytest.raises(AttributeError, match="'tuple' object"):  # the part in the middle has lost its decorator
        run(llama(), tmp_path / "c")(input_ids=words, return_dict=False)


def test_mixed_precision_is_put_on_once(tmp_path):
    """However often training is tried, with smaller batches, and after an evaluation."""

    class Greedy(OTOTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            if len(inputs["input_ids"]) > 4 and self.state.global_step > 4:
                raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
            return super().training_step(model, inputs, *args, **kwargs)

    args = settings(tmp_path, bf16=True, auto_find_batch_size=True)
    trainer = Greedy(bert(), args, train_dataset=labelled(), eval_dataset=labelled(8))
    trainer.evaluate()
    assert "_original_forward" in vars(trainer.model)  # control: it is on
    trainer.train()
    assert trainer._train_batch_size <= 4
    assert vars(trainer.model)["_original_forward"].__func__ is type(trainer.model).forward


def test_mixed_precision_after_an_evaluation_is_the_stock_trainers(tmp_path):
    """Nothing is pruned: every weight and the loss in the end are those of the stock trainer, to the last bit."""

    def run(cls, arguments, folder, **more):
        args = settings(tmp_path / folder, arguments, **more)
        trainer = cls(bert(), args, train_dataset=labelled(), eval_dataset=labelled(8))
        trainer.evaluate()
        trainer.train()
        return state(trainer.model), trainer.evaluate()["eval_loss"]

    weights, loss = run(tf.Trainer, tf.TrainingArguments, "stock", bf16=True)
    for bf16 in (True, False):  # False is the control
        ours, our_loss = run(OTOTrainer, OTOTrainingArguments, f"ours-{bf16}", bf16=bf16, target_group_sparsity=0.0)
        assert same(ours, weights) is bf16 and (our_loss == loss) is bf16


# sentence-transformers --------------------------------------------------------------------

PAIRS = {"anchor": ["it was a good film", "it was bad"] * 16, "positive": ["good film", "a bad film"] * 16}
SCORED = {"a": ["it was a good film", "it was bad"] * 16, "b": ["good film", "a good film"] * 16}
LOSSES = {
    "contrast": (losses.MultipleNegativesRankingLoss, PAIRS),
    "contrast, in pieces": (lambda m: losses.CachedMultipleNegativesRankingLoss(m, mini_batch_size=4), PAIRS),
    "order": (losses.CoSENTLoss, SCORED | {"score": [1.0, 0.1] * 16}),
    "classes": (lambda m: losses.SoftmaxLoss(m, 16, 2), SCORED | {"label": [1, 0] * 16}),  # has weights of its own
}


def embedder(folder):
    config = tf.BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    tf.set_seed(0)
    tf.BertModel(config).save_pretrained(folder / "bert")
    tokenizer(cls_token="[EOS]", sep_token="[EOS]", padding_side="right").save_pretrained(folder / "bert")
    words = modules.Transformer(str(folder / "bert"))
    return st.SentenceTransformer(modules=[words, modules.Pooling(32), modules.Dense(32, 16)], device="cpu")


def embedder_trainer(folder, name, **more):
    loss, data = LOSSES[name]
    model, data = embedder(folder), Dataset.from_dict(data)
    args = settings(folder, st.SentenceTransformerTrainingArguments, **more)
    cls = mixed(st.SentenceTransformerTrainer)
    return cls(model, args, train_dataset=data, eval_dataset=data.select(range(8)), loss=loss(model))


@pytest.mark.parametrize("name", LOSSES)
def test_sentence_transformers(tmp_path, name):
    trainer = embedder_trainer(tmp_path, name)
    dense = count(trainer.model)
    loss_weights = state(trainer.loss)
    trainer.train()
    loaded = holds(trainer, dense, tmp_path / "compact", lambda folder: st.SentenceTransformer(folder, device="cpu"))
    sentences = ["it was a good film", "bad film"]
    assert (loaded.encode(sentences) == trainer.model.encode(sentences)).all()
    assert not (loaded.encode(sentences) == embedder(tmp_path).encode(sentences)).all()  # control
    if name == "classes":
        after = state(trainer.loss)
        assert not torch.equal(after["classifier.weight"], loss_weights["classifier.weight"])  # they train, too


def test_learning_rates_by_pattern(tmp_path):
    """sentence-transformers passes groups with rates of their own as `optimizer_dict`."""
    trainer = embedder_trainer(tmp_path, "contrast", learning_rate_mapping={"embeddings": 0.0})
    dense, before = count(trainer.model), state(trainer.model)
    trainer.train()
    holds(trainer, dense, tmp_path / "compact", lambda folder: st.SentenceTransformer(folder, device="cpu"))
    after = state(trainer.model)
    frozen = [name for name in before if "embeddings.word_embeddings" in name]
    assert frozen and all(torch.equal(after[name], before[name]) for name in frozen)
    other = embedder_trainer(tmp_path, "contrast")  # control
    other.train()
    assert not any(torch.equal(state(other.model)[name], before[name]) for name in frozen)


# Seq2SeqTrainer ---------------------------------------------------------------------------


def test_seq2seq_generates_what_the_saved_model_generates(tmp_path):
    tf.set_seed(0)
    config = tf.T5Config(
        vocab_size=len(WORDS), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    data = Dataset.from_dict(
        {"input_ids": [[6, 7, 8, 9, 11], [8, 10, 11, 6, 7]] * 16, "labels": [[9, 2], [10, 2]] * 16}
    )
    args = settings(
        tmp_path, OTOSeq2SeqTrainingArguments, predict_with_generate=True, generation_max_length=5,
        target_group_sparsity=0.5,
    )  # fmt: skip
    seen = []

    def lengths(prediction):
        seen.append(prediction.predictions)
        return {"length": float(prediction.predictions.shape[1])}

    trainer = OTOSeq2SeqTrainer(
        tf.T5ForConditionalGeneration(config), args, train_dataset=data, eval_dataset=data.select(range(8)),
        compute_metrics=lengths,
    )  # fmt: skip
    dense = count(trainer.model)
    trainer.train()
    loaded = holds(trainer, dense, tmp_path / "compact")
    assert trainer.evaluate()["eval_length"] > 1 and len(seen) == 1
    predicted = trainer.predict(data.select(range(4))).predictions
    again = OTOSeq2SeqTrainer(loaded, args, train_dataset=data).predict(data.select(range(4))).predictions
    assert (predicted == again).all()


# what the trainer returns, logs and hands to callbacks -------------------------------------


class Listening(tf.TrainerCallback):
    def __init__(self):
        self.logs, self.metrics = [], []

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(logs)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.metrics.append(set(metrics))


def bert(seed=0):
    tf.set_seed(seed)
    config = tf.BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    return tf.BertForSequenceClassification(config)


def labelled(n=32):
    return Dataset.from_dict({"input_ids": [[6, 7, 8, 9], [6, 7, 8, 10]] * (n // 2), "labels": [1, 0] * (n // 2)})


def watched(cls, folder, **more):
    """The trainer after its run, and the keys of all that it returned and handed out."""
    heard = Listening()
    args = settings(folder, tf.TrainingArguments, eval_strategy="steps", eval_steps=8, **more)
    trainer = cls(bert(), args, train_dataset=labelled(), eval_dataset=labelled(8), callbacks=[heard])
    output = trainer.train()
    final = trainer.evaluate()
    predicted = trainer.predict(labelled(8)).metrics
    return trainer, heard, final, [set(output.metrics), set(final), set(predicted), *heard.metrics]


def test_metrics_are_those_of_the_stock_trainer(tmp_path):
    trainer, heard, final, keys = watched(mixed(tf.Trainer), tmp_path / "ours")
    _, stock_heard, _, stock_keys = watched(tf.Trainer, tmp_path / "stock")
    assert keys == stock_keys
    assert default_compute_objective(final) == final["eval_loss"]  # what a search minimises
    # control: every line of the log has ours, as the callbacks see it, and nothing else is another
    ours = {"oto/group_sparsity", "oto/params_left", "oto/macs_left"}
    for lines in (heard.logs, trainer.state.log_history):
        assert all(ours <= set(line) for line in lines)
    assert [set(line) - ours for line in heard.logs] == [set(line) for line in stock_heard.logs]


def test_early_stopping_watches_its_own_metric(tmp_path):
    """The best metric is the loss, and the patience is counted in evaluations, whatever we log."""
    patient = tf.EarlyStoppingCallback(early_stopping_patience=3)
    args = settings(
        tmp_path, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, save_total_limit=1,
        load_best_model_at_end=True, metric_for_best_model="loss", learning_rate=0.0, max_steps=40,
    )  # fmt: skip
    trainer = OTOTrainer(bert(), args, train_dataset=labelled(), eval_dataset=labelled(8), callbacks=[patient])
    trainer.train()
    losses = {line["step"]: line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line}
    assert trainer.state.best_metric == losses[trainer.state.best_global_step]
    # nothing learns at this rate: from the target on there is one best evaluation, then three that are not better
    assert trainer.state.global_step == trainer.state.best_global_step + 3 * 2 < 40
    with pytest.raises(KeyError, match="group_sparsity"):  # control: ours are no metric to choose by
        watched(mixed(tf.Trainer), tmp_path / "b", metric_for_best_model="oto/group_sparsity")


def test_metrics_that_a_trainer_adds_in_place_are_still_returned(tmp_path):
    trainer = trl_trainer("sft: text", tmp_path / "ours")
    ours = [set(trainer.train().metrics), set(trainer.evaluate())]
    trainer = trl_trainer("sft: text", tmp_path / "stock", mixin=False)
    assert ours == [set(trainer.train().metrics), set(trainer.evaluate())]
    assert "eval_mean_token_accuracy" in ours[1]  # control: there are some


class Reversed(tf.Trainer):
    """A constructor of its own order, with names of its own."""

    def __init__(self, data, how, *, network):
        super().__init__(network, how, train_dataset=data)


def test_any_order_of_the_constructor(tmp_path):
    cls = mixed(Reversed)
    trainer = cls(labelled(), settings(tmp_path), network=bert())
    dense = count(trainer.model)
    trainer.train()
    holds(trainer, dense, tmp_path / "compact")
    sharded = settings(tmp_path)
    sharded.deepspeed, sharded.hf_deepspeed_config = True, SimpleNamespace(config={"optimizer": {}})
    with pytest.raises(OTOError, match="remove the section `optimizer`"):  # before the trainer does anything
        cls(labelled(), sharded, network=bert())
    with pytest.raises(OTOError, match="remove the section `optimizer`"):
        cls(data=labelled(), network=bert(), how=sharded)


# optimizers of the user's -----------------------------------------------------------------


def layers_apart(model, lr=1e-3):
    """As people write it: every layer slower than the one above."""
    groups = []
    for depth, layer in enumerate(model.bert.encoder.layer):
        groups.append({"params": list(layer.parameters()), "lr": lr * 0.5 ** (2 - depth)})
    taken = {id(p) for group in groups for p in group["params"]}
    groups.append({"params": [p for p in model.parameters() if id(p) not in taken], "lr": lr})
    return torch.optim.AdamW(groups, weight_decay=0.1)


class Layered(tf.Trainer):
    def create_optimizer(self):
        self.optimizer = layers_apart(self.model)
        return self.optimizer


class LayeredBelow(OTOTrainer):
    """Does not ask us at all."""

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            self.optimizer = layers_apart(self.model)
        return self.optimizer


class Asking(OTOTrainer):
    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        optimizer.param_groups[0]["lr"] /= 2
        return optimizer


def given(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return {"optimizers": (optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 8, 0.5))}


OPTIMIZERS = {
    "overridden": (mixed(Layered), lambda model: {}, torch.optim.AdamW, [0.00025, 0.0005, 0.001]),
    "overridden below": (LayeredBelow, lambda model: {}, torch.optim.AdamW, [0.00025, 0.0005, 0.001]),
    "changed": (Asking, lambda model: {}, torch.optim.AdamW, [0.0005, 0.001]),
    "given": (OTOTrainer, given, torch.optim.SGD, [0.05]),
    "given without schedule": (
        OTOTrainer, lambda model: {"optimizers": (layers_apart(model), None)}, torch.optim.AdamW,
        [0.00025, 0.0005, 0.001],
    ),
    "class": (
        OTOTrainer, lambda model: {"optimizer_cls_and_kwargs": (torch.optim.NAdam, {"lr": 0.002})},
        torch.optim.NAdam, [0.002, 0.002],
    ),
}  # fmt: skip


class Rates(tf.TrainerCallback):
    """Notes the optimizer's groups as they are at the first step."""

    def on_train_begin(self, args, state, control, optimizer, lr_scheduler, **kwargs):
        self.rates = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
        self.base = type(optimizer.optimizer.base)
        self.scheduler = lr_scheduler

    def on_optimizer_step(self, args, state, control, optimizer, **kwargs):
        self.last = [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_users_own_optimizer_is_used_as_it_is(tmp_path, name):
    cls, make, kind, rates = OPTIMIZERS[name]
    model, seen = bert(), Rates()
    own = make(model)
    dense = count(model)
    args = settings(tmp_path, max_steps=32)
    trainer = cls(model, args, train_dataset=labelled(), callbacks=[seen], **own)
    trainer.train()
    holds(trainer, dense, tmp_path / "compact")
    assert seen.base is kind and seen.rates == pytest.approx(rates)
    assert kind.__name__ in trainer._optimizer_text
    assert name == "changed" or str(rates[0]) in trainer._optimizer_text
    if name == "given":
        assert seen.scheduler is own["optimizers"][1]
        assert seen.last == pytest.approx([0.05 * 0.5**3])  # the user's schedule was followed


def test_an_optimizer_of_another_model_is_refused(tmp_path):
    other = torch.optim.AdamW(bert().parameters())
    trainer = OTOTrainer(bert(), settings(tmp_path), train_dataset=labelled(), optimizers=(other, None))
    with pytest.raises(OTOError, match="trains no parameter of"):
        trainer.train()


def test_an_optimizer_that_makes_no_step_is_refused(tmp_path):
    """As the layer-wise ones of the Trainer: weights move in the backward pass, where nothing could hold a zero."""

    class Dummy(torch.optim.Optimizer):
        def __init__(self, params, lr):
            super().__init__([torch.zeros(1)], {"lr": lr})

        def step(self, closure=None):
            pass

    trainer = OTOTrainer(
        bert(), settings(tmp_path), train_dataset=labelled(), optimizer_cls_and_kwargs=(Dummy, {"lr": 1e-3})
    )
    with pytest.raises(OTOError, match="Dummy trains no parameter"):
        trainer.train()


# PEFT -------------------------------------------------------------------------------------

LORA = dict(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
ADAPTERS = {
    "lora": peft.LoraConfig(**LORA),
    "dora": peft.LoraConfig(**LORA, use_dora=True),
    "a head beside": peft.LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "ia3": peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]),
}
WAYS_OUT = r"(?s)saves [\d,]+ of its [\d,]+ weights.*merge the adapter.*or prune the base first"


def words(n=32):
    ids = [[6, 7, 8, 9, 11], [8, 10, 11, 6, 7]] * (n // 2)
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def adapted(name, seed=0, **more):
    return peft.get_peft_model(llama(seed, **more), ADAPTERS[name])


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_on_a_frozen_base_are_refused_before_the_first_step(tmp_path, name):
    steps = []

    class Counting(OTOTrainer):
        def training_step(self, *args, **kwargs):
            steps.append(1)
            return super().training_step(*args, **kwargs)

    model = adapted(name)
    before = state(model)
    with pytest.raises(OTOError, match=WAYS_OUT):
        Counting(model, settings(tmp_path), train_dataset=words()).train()
    assert not steps and same(state(model), before)
    assert list(tmp_path.iterdir()) == []  # what it tried is gone


def test_adapters_that_transformers_itself_adds_are_refused(tmp_path):
    model = llama()
    model.add_adapter(peft.LoraConfig(**LORA))
    with pytest.raises(OTOError, match=WAYS_OUT):
        OTOTrainer(model, settings(tmp_path), train_dataset=words()).train()


def test_an_adapter_whose_base_trains_is_refused_too(tmp_path):
    """Its checkpoint would lose the base, and the ranks that are left."""
    model = adapted("lora").requires_grad_(True)
    with pytest.raises(OTOError, match=WAYS_OUT):
        OTOTrainer(model, settings(tmp_path), train_dataset=words()).train()


def test_adapters_that_trl_makes_are_refused(tmp_path):
    trainer = trl_trainer("sft: text", tmp_path, peft_config=peft.LoraConfig(**LORA))
    with pytest.raises(OTOError, match=WAYS_OUT):
        trainer.train()


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_the_first_way_out_merge_and_train(tmp_path, name):
    model = adapted(name).merge_and_unload()
    model.requires_grad_(True)
    dense = count(model)
    trainer = OTOTrainer(model, settings(tmp_path), train_dataset=words())
    trainer.train()
    holds(trainer, dense, tmp_path / "compact")


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_the_second_way_out_prune_and_adapt(tmp_path, name):
    """The adapter's checkpoint loads again on the compact base, in both orders, and on no other."""
    trainer = OTOTrainer(llama(), settings(tmp_path / "a"), train_dataset=words())
    trainer.train()
    trainer.save_model(str(tmp_path / "compact"))
    compact = tf.LlamaForCausalLM.from_pretrained(tmp_path / "compact")
    model = peft.get_peft_model(compact, ADAPTERS[name])
    args = settings(tmp_path / "b", tf.TrainingArguments, learning_rate=0.01)
    tf.Trainer(model, args, train_dataset=words()).train()
    model.save_pretrained(tmp_path / "adapter")
    base = tf.LlamaForCausalLM.from_pretrained(tmp_path / "compact")
    without = logits(base)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.allclose(logits(loaded), without)  # control: the adapter does something
    with pytest.raises(RuntimeError, match="size mismatch"):  # control: the full base has other widths
        peft.PeftModel.from_pretrained(llama(), tmp_path / "adapter")


def test_a_partly_frozen_model_without_adapters_trains(tmp_path, caplog):
    model = llama()
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].mlp.requires_grad_(False)
    dense = state(model)
    trainer = OTOTrainer(model, settings(tmp_path), train_dataset=words())
    trainer.train()
    assert "are not pruned, because some of their parameters are frozen" in caplog.text
    assert trainer.model.model.layers[0].mlp.up_proj.out_features == 48
    assert trainer.model.model.layers[1].mlp.up_proj.out_features < 48
    assert torch.equal(trainer.model.model.embed_tokens.weight, dense["model.embed_tokens.weight"])
    trainer.save_model(str(tmp_path / "compact"))
    loaded = tf.LlamaForCausalLM.from_pretrained(tmp_path / "compact")
    assert same(state(loaded), state(trainer.model))


# arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [OTOTrainingArguments, OTOSeq2SeqTrainingArguments])
def test_classes_of_arguments_have_ours_and_their_own(tmp_path, cls):
    stock = cls.__mro__[2]
    ours = {field.name for field in fields(OTOArguments)}
    assert {field.name for field in fields(cls)} == ours | {field.name for field in fields(stock)}
    line = ["--output_dir", str(tmp_path), "--target_macs", "0.5", "--protect", "embed", "head"]
    (args,) = tf.HfArgumentParser(cls).parse_args_into_dataclasses(line)
    assert (args.target_macs, args.protect) == (0.5, ["embed", "head"])
    (stock_args,) = tf.HfArgumentParser(stock).parse_args_into_dataclasses(line[:2])
    for field in fields(stock):  # the defaults are still the stock ones
        if field.name not in ("logging_dir", "accelerator_config"):
            assert str(vars(args)[field.name]) == str(vars(stock_args)[field.name]), field.name


@dataclass
class SFTArguments(OTOArguments, trl.SFTConfig):
    """As the README says it."""


def test_arguments_of_others_take_ours(tmp_path):
    args = settings(tmp_path, SFTArguments, target_per_axis='{"mlp": 0.5}', bf16=False)
    assert args.target_per_axis == {"mlp": 0.5} and args.activation_checkpointing  # TRL's default
    assert not settings(tmp_path).activation_checkpointing  # control: not that of the others
    trainer = mixed(trl.SFTTrainer)(
        from_disk(tmp_path), args, train_dataset=Dataset.from_dict(TEXT), processing_class=tokenizer()
    )
    trainer.train()
    assert [layer.mlp.up_proj.out_features for layer in trainer.model.model.layers] == [24, 24]
    code = as_code(args, trainer.state.max_steps)
    assert "SFTArguments(" in code and "target_per_axis={'mlp': 0.5}" in code


WRONG = [
    (dict(pruning_mode="papre"), r"pruning_mode is 'papre'"),
    (dict(pruning_window=[0.6, 0.1]), r"pruning_window is \[0.6, 0.1\]"),
    (dict(pruning_window=[0.1]), r"pruning_window is \[0.1\]"),
    (dict(pruning_window=[0.1, 1.5]), r"pruning_window is \[0.1, 1.5\]"),
    (dict(min_keep=1.0), r"min_keep is 1.0"),
    (dict(min_keep=-0.1), r"min_keep is -0.1"),
    (dict(group_divisible=0), r"group_divisible is 0"),
    (dict(protect=["layer", "layer.(0"]), r"protect has 'layer.\(0'"),
    (dict(protect="layer.0"), r"protect is 'layer.0'"),
    (dict(target_per_axis={"mlp[": 0.5}), r"target_per_axis has 'mlp\['"),
    (dict(target_per_axis="{mlp: 0.5}"), r"target_per_axis is '\{mlp: 0.5\}'"),
    (dict(target_macs=0), r"target_macs is 0"),
    (dict(pruning_mode="paper", uniform=True), r"uniform is True"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[str(wrong) for wrong, _ in WRONG])
@pytest.mark.parametrize("cls", [OTOTrainingArguments, OTOSeq2SeqTrainingArguments])
def test_arguments_that_cannot_be_meant(tmp_path, cls, wrong, message):
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, cls, **wrong)


def test_arguments_at_their_bounds(tmp_path):
    settings(
        tmp_path, pruning_window=[0, 1], min_keep=0, group_divisible=1, protect=[r"layer\.0\."], target_macs=1.0,
    )  # fmt: skip


# the line at the end ----------------------------------------------------------------------


@pytest.mark.parametrize("shrink", [True, False])
@pytest.mark.parametrize("bars", [True, False])
def test_one_line_says_what_was_cut_and_where_it_is(tmp_path, capsys, bars, shrink):
    more = dict(disable_tqdm=not bars, log_level="error", save_strategy="steps", save_steps=12)
    args = settings(tmp_path, shrink=shrink, **more)
    trainer = OTOTrainer(bert(), args, train_dataset=labelled())
    trainer.train()
    before, after = trainer.report["before"], trainer.report["after"]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("hf_oto cut")]
    assert line == (
        f"hf_oto cut {trainer.plan.removed(trainer.partition).sum()} of {trainer.partition.num_zigs} ZIGs, "
        f"parameters {before['params']:,} -> {after['params']:,}, MACs {before['macs']:,} -> {after['macs']:,}; "
        "the compact model is in memory, as trainer.model: trainer.save_model() saves it "
        f"({tmp_path}/checkpoint-24 holds {'it as training left it' if shrink else 'the full one'})"
    )
    last = tf.BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-24")
    assert sum(p.numel() for p in last.parameters()) == (after if shrink else before)["params"]


def test_the_line_names_no_checkpoint_without_one(tmp_path, capsys):
    OTOTrainer(bert(), settings(tmp_path), train_dataset=labelled()).train()
    out = capsys.readouterr().out
    assert "trainer.save_model() saves it\n" in out and "checkpoint" not in out
    tf.Trainer(bert(), settings(tmp_path, tf.TrainingArguments), train_dataset=labelled()).train()
    assert "hf_oto cut" not in capsys.readouterr().out  # control


def test_a_card_of_a_checkpoint_does_not_stay(tmp_path):
    """TRL writes a card with each checkpoint; beside the compact model none says that training goes on."""
    trainer = trl_trainer("sft: text", tmp_path)
    trainer.args.save_strategy, trainer.args.save_steps = tf.trainer_utils.SaveStrategy.STEPS, 12
    trainer.train()
    card = tmp_path / "README.md"
    assert "Training is not over" in card.read_text()  # control
    trainer.save_model()
    assert "Training is not over" not in card.read_text() and "A compact model" in card.read_text()


# scripts in the manner of the official examples --------------------------------------------

SCRIPTS = {
    "classification": (
        "from transformers import Trainer, TrainingArguments",
        "from hf_oto import OTOTrainer as Trainer, OTOTrainingArguments as TrainingArguments",
    ),
    "summarization": (
        "from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments",
        "from hf_oto import OTOSeq2SeqTrainer as Seq2SeqTrainer, "
        "OTOSeq2SeqTrainingArguments as Seq2SeqTrainingArguments",
    ),
}


def run_script(name, changed, folder, *more):
    """Runs a script of tests/scripts, as it is or with its one import changed, and gives what it printed."""
    text = (Path(__file__).parent / "scripts" / f"run_{name}.py").read_text()
    stock, ours = SCRIPTS[name]
    assert text.count(stock) == 1
    folder.mkdir(exist_ok=True)
    script = folder / f"run_{name}.py"
    script.write_text(text.replace(stock, ours) if changed else text)
    environment = os.environ | {"HF_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, str(script), *more], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Data files and small models with their tokenizers, as a user has them on disk."""
    folder = tmp_path_factory.mktemp("local")
    for split, count in (("train", 64), ("validation", 16), ("test", 16)):
        rows = [{"sentence": f"it was a {('good', 'bad')[i % 2]} film", "label": i % 2} for i in range(count)]
        (folder / f"{split}.json").write_text("\n".join(json.dumps(row) for row in rows))
        lines = ["text,summary", *(f"it was a {w} film,{w} film" for w in ("good", "bad") * (count // 2))]
        (folder / f"{split}.csv").write_text("\n".join(lines))
    bert().save_pretrained(folder / "bert")
    tokenizer(cls_token="[EOS]", sep_token="[EOS]", padding_side="right").save_pretrained(folder / "bert")
    tf.set_seed(0)
    t5 = tf.T5Config(
        vocab_size=len(WORDS), d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    tf.T5ForConditionalGeneration(t5).save_pretrained(folder / "t5")
    tokenizer(padding_side="right").save_pretrained(folder / "t5")
    return folder


def line_of(name, local, out, **more):
    suffix, model = ("json", "bert") if name == "classification" else ("csv", "t5")
    options = dict(
        model_name_or_path=local / model, output_dir=out, train_file=local / f"train.{suffix}",
        validation_file=local / f"validation.{suffix}", test_file=local / f"test.{suffix}",
        per_device_train_batch_size=8, max_steps=24, save_steps=12, learning_rate=1e-3, seed=1, report_to="none",
    ) | more  # fmt: skip
    flags = ["--do_train", "--do_eval", "--do_predict", "--use_cpu"]
    return [part for key, value in options.items() for part in (f"--{key}", str(value))] + flags


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_script_with_one_changed_import(tmp_path, local, name):
    """Trained, evaluated before and after, predicted, saved, resumed; the control is the script as it is."""
    found = {}
    more = ["--predict_with_generate", "--generation_max_length", "4"] if name == "summarization" else []
    for who in ("stock", "ours"):
        out = tmp_path / who / "out"
        printed = run_script(name, who == "ours", tmp_path / who, *line_of(name, local, out), *more)
        assert ("hf_oto cut" in printed) == (who == "ours")
        found[who] = out
        results = json.loads((out / "all_results.json").read_text())
        assert not [key for key in results if key.startswith("oto")]
        found[f"{who}: keys"] = set(results)
        assert (out / "trainer_state.json").exists() and (out / "predictions.txt").read_text().count("\n") >= 16
        assert ("A compact model" in (out / "README.md").read_text()) == (who == "ours")
    assert found["stock: keys"] == found["ours: keys"]
    auto = tf.AutoModelForSequenceClassification if name == "classification" else tf.AutoModelForSeq2SeqLM
    sizes = {who: sum(p.numel() for p in auto.from_pretrained(found[who]).parameters()) for who in ("stock", "ours")}
    assert sizes["ours"] < 0.9 * sizes["stock"]
    # the same script, stopped in the middle and started again, goes on from its last checkpoint
    out = tmp_path / "again" / "out"
    more = [*more, "--stop_after", "14"]
    run_script(name, True, tmp_path / "again", *line_of(name, local, out), *more)
    assert (out / "checkpoint-12").exists()
    printed = run_script(name, True, tmp_path / "again", *line_of(name, local, out), *more[:-2])
    assert f"resuming from {out / 'checkpoint-12'}" in printed
    whole, resumed = (state(auto.from_pretrained(folder)) for folder in (found["ours"], out))
    assert same(whole, resumed)
