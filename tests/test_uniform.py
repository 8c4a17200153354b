"""Widths that a stock config can say: the ties are found by trying, and the model in the end needs no record."""

import copy
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers as tf
from models import TABLE, make, randomise_
from test_trainer import arguments, sentences

from hf_oto import DHSPG, OTOTrainer, PruningPlan, compact, partition_zigs, prune, uniform
from hf_oto.certificate import outputs_differ
from hf_oto.uniform import find_ties, in_steps, plain
from hf_oto.zigs import OTOError

TIES = {  # the numbers that say widths, and how many axes
    "bert": {("intermediate_size",): 2},
    "vit": {("intermediate_size",): 2},
    "clip": {("text_config", "intermediate_size"): 1, ("vision_config", "intermediate_size"): 1},
    "resnet_basic": {("hidden_sizes", 1): 3, ("embedding_size", "hidden_sizes", 0): 2},
    "llama": {("hidden_size",): 1, ("intermediate_size",): 2, ("num_attention_heads", "num_key_value_heads"): 2},
    "t5": {("d_ff",): 4, ("num_heads",): 3},
    "gpt_oss": {("hidden_size",): 1, ("intermediate_size",): 1, ("num_attention_heads", "num_key_value_heads"): 1},
    "mamba": {("hidden_size",): 1, ("intermediate_size",): 1},
}

DECODER = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=60)
GROUPED = DECODER | dict(num_key_value_heads=2, head_dim=8)
STREAM = {("hidden_size",): 1}  # not Gemma's, which multiplies embeddings by its root, nor Phi's, under a layer norm
HEADS, UNITS = {("num_attention_heads", "num_key_value_heads"): 2}, {("intermediate_size",): 2}
OTHERS = {  # not in the table: what makes them, and their ties
    "mistral": (lambda: tf.MistralForCausalLM(tf.MistralConfig(**GROUPED)), STREAM | HEADS | UNITS),
    "qwen3": (lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**GROUPED)), STREAM | HEADS | UNITS),
    "gemma2": (lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**GROUPED)), HEADS | UNITS),
    "phi": (lambda: tf.PhiForCausalLM(tf.PhiConfig(**DECODER)), UNITS),
    "dinov2": (lambda: tf.Dinov2Model(tf.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                                      mlp_ratio=2, image_size=32, patch_size=8)), {("mlp_ratio",): 2}),
}  # fmt: skip


def parts(name):
    if name in OTHERS:
        torch.manual_seed(0)
        model = randomise_(OTHERS[name][0]().eval())
        text = {"input_ids": torch.arange(16).view(2, 8)}
        inputs = text if "vocab_size" in vars(model.config) else {"pixel_values": torch.randn(2, 3, 32, 32)}
    else:
        model, inputs = make(name), TABLE[name].inputs(2)
    partition = partition_zigs(model, inputs)
    return model, inputs, partition, find_ties(model, partition, inputs)


@pytest.mark.parametrize("name", [*TIES, *OTHERS])
def test_a_plain_model_computes_what_the_zeroed_one_does(name):
    model, inputs, partition, ties = parts(name)
    assert {sum(tie.numbers, ()): len(tie.axes) for tie in ties} == (TIES.get(name) or OTHERS[name][1])
    sizes = {axis.name: axis.size for axis in partition.axes}
    kept = [max(1, tie.steps * (1 + i) // (2 + i)) / tie.steps for i, tie in enumerate(ties)]  # of each another share
    plan = PruningPlan(
        {
            a: range(sizes[a] - int(sizes[a] * share), sizes[a])
            for tie, share in zip(ties, kept, strict=True)
            for a in tie.axes
        }
    )
    partition.zero_(model, plan)
    small = compact(copy.deepcopy(model), partition, plan)
    stock = plain(small, partition, plan, ties, inputs)
    assert type(stock) is type(model) and "oto" not in vars(stock.config)
    assert stock.num_parameters() == small.num_parameters() < model.num_parameters()
    assert outputs_differ(model, stock, inputs)[0] < 1e-5


@pytest.mark.parametrize("num_gone", [1, 16])
def test_a_config_that_could_not_be_saved_is_no_stock_config(num_gone):
    """A config of Llama wants heads to divide the hidden size, and says so only when it is saved."""
    model, inputs, partition, ties = parts("llama")
    (tie,) = (tie for tie in ties if ("hidden_size",) in tie.numbers)
    sizes = {axis.name: axis.size for axis in partition.axes}
    plan = PruningPlan({name: range(sizes[name] - num_gone) for name in tie.axes})
    small = compact(copy.deepcopy(model), partition, plan)
    stock = plain(small, partition, plan, [tie], inputs)
    assert (stock is None) == (num_gone == 1)


HEADS_DIVIDE_WIDTHS = {  # heads and heads of keys, whose number has to divide the hidden size
    "grouped": (dict(num_attention_heads=4, num_key_value_heads=2), {4, 2}),
    "with a head size": (dict(num_attention_heads=8, num_key_value_heads=4, head_dim=4), {8, 4}),
    "many": (dict(num_attention_heads=16, num_key_value_heads=16), {16, 8}),
}


@pytest.mark.parametrize("name", HEADS_DIVIDE_WIDTHS)
def test_the_steps_of_ties_go_together(name):
    """Whatever steps go of each tie, the config is one that can be saved and loaded."""
    numbers, heads = HEADS_DIVIDE_WIDTHS[name]
    torch.manual_seed(0)
    model = randomise_(tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER | dict(hidden_size=64) | numbers)).eval())
    inputs = {"input_ids": torch.arange(16).view(2, 8)}
    partition = partition_zigs(model, inputs)
    ties = find_ties(model, partition, inputs)
    stepped = in_steps(partition, ties)
    assert in_steps(stepped, ties) is stepped
    assert {sum(tie.numbers, ()) for tie in ties} >= {("hidden_size",), ("intermediate_size",)}
    multiples = {axis.name: axis.multiple for axis in stepped.axes}
    sizes = {axis.name: axis.size for axis in stepped.axes}
    found_heads = set()
    for kept in itertools.product(*(sorted({1, tie.steps // 2, tie.steps - 1, tie.steps}) for tie in ties)):
        plan = {}
        for tie, number in zip(ties, kept, strict=True):
            plan |= {axis: range(sizes[axis] * number // tie.steps) for axis in tie.axes}
        assert all(len(positions) % multiples[axis] == 0 for axis, positions in plan.items())
        small = compact(copy.deepcopy(model), stepped, PruningPlan(plan))
        stock = plain(small, stepped, PruningPlan(plan), ties, inputs)
        assert stock is not None
        found_heads.add(stock.config.num_attention_heads)
    assert found_heads == heads


def test_pruning_without_training_ends_with_a_stock_model():
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED))
    batches = list(torch.randint(0, 60, (6, 8, 12)))
    small, _ = prune(model, [{"input_ids": ids} for ids in batches], target_macs=0.5, uniform=True)
    assert "oto" not in vars(small.config) and small.config.hidden_size < 32


@pytest.mark.parametrize("name", ["bloom", "swin", "convnext", "swapped"])
def test_a_config_that_says_nothing_is_an_error_before_training(name):
    with pytest.raises(OTOError, match="no number in the config"):
        parts(name)


def test_numbers_that_say_more_than_widths_are_no_ties(monkeypatch):
    """Mixtral's hidden size makes the head size too: all shapes fit, and only the outputs tell."""
    model, inputs = make("mixtral"), TABLE["mixtral"].inputs(2)
    partition = partition_zigs(model, inputs)
    numbers = {path for tie in find_ties(model, partition, inputs) for path in tie.numbers}
    assert ("intermediate_size",) in numbers and ("hidden_size",) not in numbers
    monkeypatch.setattr(uniform, "outputs_differ", lambda *_: (0.0, 1.0))
    assert ("hidden_size",) in {path for tie in find_ties(model, partition, inputs) for path in tie.numbers}


@pytest.mark.parametrize("target", [{"target_macs": 0.7}, {"target_group_sparsity": 0.6}, {"group_divisible": 4}])
def test_tied_axes_lose_equal_shares_and_others_do_not(target):
    def shares(tie_them):
        model, inputs, partition, ties = parts("llama")
        tied = [tie.axes for tie in ties] if tie_them else None
        partition = in_steps(partition, ties) if tie_them else partition
        optimizer = DHSPG(model, partition, lr=1e-3, total_steps=40, tied=tied, **target)
        for _ in range(40):
            optimizer.zero_grad()
            model(**inputs).logits.square().mean().backward()
            optimizer.step()
        assert optimizer.target_reached
        plan, sizes = PruningPlan.from_zeros(model, partition), {axis.name: axis.size for axis in partition.axes}
        kept = {a: len(plan.kept.get(a, range(n))) / n for a, n in sizes.items()}
        return ties, [{kept[a] for a in tie.axes} for tie in ties]

    ties, found = shares(True)
    assert all(len(some) == 1 and min(some) * tie.steps % 1 == 0 for tie, some in zip(ties, found, strict=True))
    assert any(len(some) > 1 for some in shares(False)[1])


def test_looking_for_ties_draws_no_random_numbers():
    torch.manual_seed(0)
    model, inputs = make("llama"), TABLE["llama"].inputs(2)
    partition, before = partition_zigs(model, inputs), torch.get_rng_state()
    find_ties(model, partition, inputs)
    assert torch.equal(before, torch.get_rng_state())


def test_the_trainer_ends_with_a_stock_checkpoint(tmp_path):
    tf.set_seed(0)
    config = tf.LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=8,
                            num_key_value_heads=4, head_dim=8, vocab_size=60, num_labels=3,
                            pad_token_id=0)  # fmt: skip
    args = arguments(tmp_path, uniform=True, target_params=0.5)
    trainer = OTOTrainer(tf.LlamaForSequenceClassification(config), args, train_dataset=sentences())
    trainer.train()
    assert type(trainer.model) is tf.LlamaForSequenceClassification
    assert trainer.report["after"]["params"] <= 0.5 * trainer.report["before"]["params"]
    trainer.save_model(str(tmp_path / "stock"))
    saved = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert not {"oto", "auto_map"} & saved.keys() and saved["intermediate_size"] < 48
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        np.save(tmp_path / "logits.npy", trainer.model.eval()(input_ids=ids).logits.numpy())
    code = f"""
import sys, numpy as np, torch, transformers as tf
model = tf.AutoModelForSequenceClassification.from_pretrained({str(tmp_path / "stock")!r}).eval()
with torch.no_grad():
    logits = model(input_ids=torch.arange(3, 11)[None]).logits.numpy()
assert np.array_equal(logits, np.load({str(tmp_path / "logits.npy")!r})) and "hf_oto" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_trainer_says_so_before_training(tmp_path):
    model = make("swin")
    trainer = OTOTrainer(model, arguments(tmp_path, uniform=True), train_dataset=images())
    with pytest.raises(OTOError, match="uniform=True: no number in the config of Swin"):
        trainer.train()
    assert trainer.state.global_step == 0


def images():
    size = TABLE["swin"].inputs(1)["pixel_values"].shape[1:]
    return [{"pixel_values": torch.randn(size), "labels": torch.tensor(0)} for _ in range(32)]
