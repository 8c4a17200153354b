"""The authors' own HESSO and DHSPG run beside this torch, as the base optimizer does until they prune; cuts are exact.

HESSO_CHECKOUT and DHSPG_CHECKOUT name the folders of the repositories, which recipes/quality/only_train_once.py names;
what needs one is skipped without it.
"""

import copy
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from models import randomise_, waves
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ResNetConfig,
    ViTConfig,
    ViTForImageClassification,
    get_wsd_schedule,
)

from hf_oto import measure

sys.path.append(str(Path(__file__).parents[1]))

from recipes.paper.models import SmallResNetForImageClassification

onnx_module = pytest.importorskip("recipes.quality.onnx_module", exc_type=ImportError)

from recipes.quality.only_train_once import Hesso, LegacyDHSPG  # noqa: E402
from recipes.quality.released import older_exporter  # noqa: E402

CHECKOUTS = {Hesso: os.environ.get("HESSO_CHECKOUT"), LegacyDHSPG: os.environ.get("DHSPG_CHECKOUT")}
STEPS = 20
ENCODER = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=6, intermediate_size=32, num_labels=3)


def resnet():
    shape = dict(hidden_sizes=[8, 12], depths=[2, 1], layer_type="basic", downsample_in_first_stage=True)
    return SmallResNetForImageClassification(ResNetConfig(embedding_size=8, num_labels=3, **shape))


def vit():
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **ENCODER))


def bert():
    config = BertConfig(
        vocab_size=30, max_position_embeddings=9, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **ENCODER
    )
    return BertForSequenceClassification(config)


def tokens():
    """Two texts, the second of them padded."""
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": (torch.arange(18).view(2, 9) * 7 % 29 + 1) * mask, "attention_mask": mask}


def images():
    return {"pixel_values": waves(2, 3, 16, 16)}


MODELS = {resnet: images, vit: images, bert: tokens}
RUNS = [(LegacyDHSPG, resnet), *((Hesso, build) for build in MODELS)]


def made(build):
    torch.manual_seed(0)
    return randomise_(build()).train(), MODELS[build]()


def adapted(cls, model, inputs, base, target):
    if CHECKOUTS[cls] is None:
        pytest.skip("no checkout is named")
    setting = {"steps": STEPS, "learning_rate": 1e-3, "base": base, "target": target, "seed": 0}
    return cls(CHECKOUTS[cls], model, inputs, setting)


def train(model, inputs, optimizer, schedule=True):
    if schedule:
        rate = get_wsd_schedule(optimizer, num_warmup_steps=2, num_decay_steps=8, num_training_steps=STEPS)
    labels = torch.arange(2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        if schedule:
            rate.step()


@torch.no_grad()
def logits(model, inputs):
    return model.eval()(**inputs).logits


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def base_of(model, base):
    if base == "sgd":
        return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)


@pytest.mark.parametrize("base", ["adamw", "sgd"])
@pytest.mark.parametrize(("cls", "build"), RUNS)
def test_without_a_target_it_is_the_base_and_the_schedule_drives_it(cls, build, base):
    model, inputs = made(build)
    scheduled, constant = copy.deepcopy(model), copy.deepcopy(model)
    rival = adapted(cls, model, inputs, base, target=0.0)
    assert model.training
    train(model, inputs, rival.optimizer)
    train(scheduled, inputs, base_of(scheduled, base))
    train(constant, inputs, base_of(constant, base), schedule=False)
    moved = (weights(scheduled) - weights(made(build)[0])).abs().max()

    def share_that_differs(twin):
        return float(((weights(model) - weights(twin)).abs() > 0.01 * moved).float().mean())

    # A bias of all keys has no gradient but rounding errors, and AdamW makes whole steps of those.
    assert share_that_differs(scheduled) < 0.02
    assert share_that_differs(constant) > 0.1  # control: another schedule shows


@pytest.mark.parametrize("build", MODELS)
def test_hesso_cuts_what_it_makes_zero(build):
    model, inputs = made(build)
    dense = copy.deepcopy(model)
    rival = adapted(Hesso, model, inputs, "adamw", target=0.5)
    train(model, inputs, rival.optimizer)
    expected = logits(model, inputs)
    small = rival.compacted()
    torch.testing.assert_close(logits(small, inputs), expected, rtol=1e-4, atol=1e-5)
    assert (logits(dense, inputs) - expected).abs().max() > 1e-3  # control: another model shows
    of_dense, of_small = measure(dense, small, inputs=inputs, seconds=0)
    assert of_small["macs"] < 0.9 * of_dense["macs"]


def test_dhspg_cuts_what_is_zero():
    model, inputs = made(resnet)
    dense = copy.deepcopy(model)
    rival = adapted(LegacyDHSPG, model, inputs, "adamw", target=0.5)
    train(model, inputs, rival.optimizer)
    groups = [group for group in rival.optimizer.param_groups if group["group_type"] >= 3]
    assert sum(group["num_groups"] for group in groups) == 8 + 3 * 8 + 2 * 12  # the residual stream of each stage, too
    for group in groups:  # in so few steps it would make none zero; their running statistics are not
        for p in group["params"]:
            p.data[: group["num_groups"] // 2] = 0
    expected = logits(model, inputs)
    small = rival.compacted()
    torch.testing.assert_close(logits(small, inputs), expected, rtol=1e-4, atol=1e-5)
    assert (logits(dense, inputs) - expected).abs().max() > 1e-3  # control: another model shows
    of_dense, of_small = measure(dense, small, inputs=inputs, seconds=0)
    assert of_small["macs"] < 0.4 * of_dense["macs"]


@pytest.mark.parametrize("cls", CHECKOUTS)
def test_a_checkout_leaves_no_names_behind(cls, monkeypatch):
    mine = types.ModuleType("graph")
    monkeypatch.setitem(sys.modules, "graph", mine)
    names, path = set(sys.modules), sys.path[:]
    model, inputs = made(resnet)
    rival = adapted(cls, model, inputs, "sgd", target=0.5)
    left = {
        name for name in set(sys.modules) - names if str(sys.modules[name].__spec__.origin).startswith(CHECKOUTS[cls])
    }
    assert not left
    assert type(rival.oto).__module__ == "only_train_once"  # control: it was imported
    assert sys.modules["graph"] is mine
    assert sys.path == path
    assert "_optimize_graph" not in vars(torch.onnx)
    assert torch.Tensor.cuda.__name__ == "cuda"


def test_an_onnx_file_is_a_module(tmp_path):
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    ).eval()
    pixels = waves(2, 3, 16, 16)
    with older_exporter():
        torch.onnx.export(model, (pixels,), str(tmp_path / "model.onnx"))
    read = onnx_module.OnnxModule(str(tmp_path / "model.onnx"), ["pixel_values"])
    torch.testing.assert_close(logits(read, {"pixel_values": pixels}), model(pixels).detach())
    with torch.no_grad():
        read.weights[0][:] *= 2
    assert (logits(read, {"pixel_values": pixels}) - model(pixels)).abs().max() > 1e-3  # control: its weights count
