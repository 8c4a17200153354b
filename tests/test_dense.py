"""The way back keeps what a model is: every tensor its dtype and flags, every module its mode, and all its values."""

import copy

import pytest
import torch
from models import TABLE, make
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

import hf_oto
from hf_oto.dense import stock_model
from hf_oto.modeling_oto import named_tensors


class Mixed(PreTrainedModel):
    """A layer to cut beside tensors of every kind."""

    config_class = PreTrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.up, self.norm, self.down = nn.Linear(6, 16), nn.LayerNorm(6), nn.Linear(16, 4)
        self.phase = nn.Parameter(torch.polar(torch.ones(6), torch.arange(6.0)))
        self.register_buffer("table", torch.polar(torch.ones(6), torch.arange(6.0)))
        self.register_buffer("scratch", torch.zeros(6), persistent=False)
        self.post_init()

    def forward(self, x):
        turned = torch.view_as_real(torch.view_as_complex(torch.stack([x, x], -1)) * self.phase * self.table)[..., 0]
        return self.down(torch.relu(self.up(self.norm(turned) + self.scratch)))


@pytest.fixture
def small():
    """A compact model whose tensors have five dtypes, whose flags and modes differ."""
    torch.manual_seed(0)
    model = Mixed(PreTrainedConfig())
    partition = hf_oto.partition_zigs(model, {"x": torch.randn(3, 6)})
    hf_oto.compact(model, partition, hf_oto.PruningPlan({"up.weight[0]": [0, 3, 4, 9]}))
    model.up.weight.data = model.up.weight.data.bfloat16()
    model.down.weight.data = model.down.weight.data.double()
    model.down.bias.data = model.down.bias.data.half()
    model.phase.requires_grad_(False)
    model.norm.requires_grad_(False)
    model.scratch.fill_(0.5)
    model.train()
    model.norm.eval()
    return model


def kinds(model):
    return {name: (t.dtype, t.requires_grad) for name, t in named_tensors(model).items()}


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


def test_dtypes_flags_and_modes_stay(small):
    before = copy.deepcopy(small.state_dict())
    dense = hf_oto.to_dense(small)
    assert kinds(dense) == kinds(small) and len({dtype for dtype, _ in kinds(dense).values()}) == 5
    assert modes(dense) == modes(small) and len(set(modes(dense).values())) == 2
    assert all(torch.equal(before[name], tensor) for name, tensor in small.state_dict().items())


def test_every_value_is_there_and_zeros_elsewhere(small):
    dense, kept = hf_oto.to_dense(small), [0, 3, 4, 9]
    gone = sorted(set(range(16)) - set(kept))
    assert torch.equal(dense.up.weight[kept], small.up.weight) and not dense.up.weight[gone].any()
    assert torch.equal(dense.down.weight[:, kept], small.down.weight) and not dense.down.weight[:, gone].any()
    for name in ("phase", "table", "scratch", "norm.weight", "down.bias"):
        assert torch.equal(named_tensors(dense)[name], named_tensors(small)[name]), name
    assert small.phase.is_complex() and small.phase.imag.any()


def test_one_dtype_for_all_would_be_another_model(small):
    """Negative control: a stock model as its class builds it, and one that was given `model.dtype`."""
    built = Mixed(PreTrainedConfig())
    assert kinds(built) != kinds(small) and modes(built) != modes(small)
    with pytest.warns(UserWarning, match="discards the imaginary part"):
        levelled = hf_oto.to_dense(small).to(small.dtype)
    assert kinds(levelled) != kinds(small)


@pytest.mark.parametrize("name", ["llama", "bert", "resnet_basic"])
def test_float32_norms_of_a_bfloat16_model(name, draw_plan):
    model, inputs = make(name), TABLE[name].inputs(2)
    partition = hf_oto.partition_zigs(model, inputs)
    hf_oto.compact(model, partition, draw_plan(partition)).bfloat16()
    for path, module in model.named_modules():
        if "norm" in path.lower():
            module.float()
    dense = hf_oto.to_dense(model)
    assert kinds(dense) == kinds(model)
    assert {dtype for dtype, _ in kinds(dense).values()} >= {torch.bfloat16, torch.float32}
    assert kinds(stock_model(model, dense.config)) == kinds(model)


def test_random_numbers_are_not_drawn(small):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    hf_oto.to_dense(small)
    assert torch.equal(torch.rand(2), expected)
