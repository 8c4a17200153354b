"""What bench_prune.py does beside calling methods: means, statistics, and the bridge to the code of Kwon et al."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import hf_oto

sys.path.append(str(Path(__file__).parents[1] / "recipes"))

from pruning import kcm, older_bert, simple
from pruning.dense import Subject

KEPT = hf_oto.PruningPlan({"0.weight[0]": [0, 2, 5]})
NUM_HEADS, NUM_UNITS = 4, 24


def subject_of(model, batches):
    """Each time the same weights, as a new object."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def fresh():
        copied = type(model)(model.config) if hasattr(model, "config") else layers()
        copied.load_state_dict(weights)
        return copied.eval()

    return Subject(None, fresh, batches, {name: t[:2] for name, t in batches[0].items() if name != "labels"})


def layers():
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))


def bert():
    """A BERT of two layers with random weights, and two batches with padding."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=10, hidden_size=16, num_hidden_layers=2, num_attention_heads=NUM_HEADS,
            intermediate_size=NUM_UNITS, initializer_range=0.5,
        )
    ).eval()  # fmt: skip
    batches = []
    for length in (4, 6):
        batch = {"input_ids": torch.randint(1, 10, (3, 6)), "labels": torch.tensor([0, 1, 0])}
        batches.append(batch | {"attention_mask": (torch.arange(6) < torch.tensor([[6], [length], [2]])).long()})
    return model, batches


def test_a_mean_that_is_folded_leaves_the_mean_of_the_output():
    torch.manual_seed(0)
    model = layers()
    batches = [{"input": torch.randn(16, 3)} for _ in range(3)]
    subject = subject_of(model, batches)
    x = torch.cat([batch["input"] for batch in batches])
    wanted = model(x).mean(0)
    difference = {}
    for method in (simple.mean, simple.cut):
        small = method(subject, KEPT)
        assert small[0].out_features == 3
        difference[method] = (small(x).mean(0) - wanted).detach().abs().max().item()
    assert difference[simple.mean] < 1e-6
    assert difference[simple.cut] > 1e-2  # control: without the fold it is another one


def test_padding_is_no_part_of_a_mean():
    model, batches = bert()
    name = "bert.encoder.layer.0.intermediate.dense"
    found = simple.means(model, batches)[name]
    for batch in batches:
        batch["input_ids"] = torch.where(batch["attention_mask"] == 0, 7, batch["input_ids"])
    assert torch.allclose(simple.means(model, batches)[name], found, atol=1e-6)
    all_count = [{name: t for name, t in batch.items() if name != "attention_mask"} for batch in batches]
    assert not torch.allclose(simple.means(model, all_count)[name], found, atol=1e-2)


def test_statistics_are_those_of_the_batches():
    torch.manual_seed(0)
    norm = nn.Sequential(nn.BatchNorm2d(2))
    batches = [{"input": 3 + 2 * torch.randn(8, 2, 4, 4)} for _ in range(4)]
    before = norm[0].running_mean.clone()
    simple.statistics_anew_(norm, batches)
    mean = torch.stack([batch["input"].mean((0, 2, 3)) for batch in batches]).mean(0)
    assert torch.allclose(norm[0].running_mean, mean, atol=1e-6)
    assert not torch.allclose(before, mean, atol=1e-1)
    assert norm[0].momentum == 0.1
    assert not norm[0].training


def masked(model, heads, units, batch):
    """The logits of a BERT whose heads and units are multiplied by factors."""
    older = older_bert.OlderBert(model)
    handles = []
    for layer, factors in zip(model.bert.encoder.layer, units, strict=True):
        hook = layer.output.register_forward_pre_hook(lambda _, inputs, f=factors: (inputs[0] * f, inputs[1]))
        handles.append(hook)
    logits = older(head_mask=heads, **batch).logits
    for handle in handles:
        handle.remove()
    return logits


def test_an_older_bert_is_the_same_model():
    model, batches = bert()
    heads, units = torch.ones(2, NUM_HEADS), torch.ones(2, NUM_UNITS)
    for batch in batches:
        output = model(**batch)
        older = older_bert.OlderBert(model)(head_mask=heads, **batch)
        assert torch.allclose(older.logits, output.logits, atol=1e-5)
        assert torch.allclose(older.loss, output.loss, atol=1e-5)
    heads[1, 0] = 0
    assert not torch.allclose(masked(model, heads, units, batch), output.logits, atol=1e-3)


@pytest.mark.parametrize("is_emptied", [False, True])
def test_masks_are_cut_out_as_they_mask(is_emptied, monkeypatch):
    model, batches = bert()
    generator = torch.Generator().manual_seed(1)
    heads, units = (
        torch.rand(2, n, generator=generator) * (torch.rand(2, n, generator=generator) < 0.5)
        for n in (NUM_HEADS, NUM_UNITS)
    )
    heads[1] = 0 if is_emptied else torch.tensor([0.5, 0, 2, 0])
    heads[0, 0] = 1.5
    monkeypatch.setattr(kcm, "masks", lambda *args: (heads, units))
    small = kcm.kcm(subject_of(model, batches), "kcm", 0.5, {"kcm": ""})
    widths = [layer.output.dense.in_features for layer in small.bert.encoder.layer]
    assert widths == (units != 0).sum(1).tolist()
    attentions = [layer.attention.self.query.out_features // 4 for layer in small.bert.encoder.layer]
    assert attentions == (heads != 0).sum(1).clamp_min(1).tolist()
    for batch in batches:
        assert torch.allclose(small(**batch).logits, masked(model, heads, units, batch), atol=1e-5)
        assert not torch.allclose(small(**batch).logits, model(**batch).logits, atol=1e-3)
