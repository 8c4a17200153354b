"""Models that run while only one of their layers has its weights."""

import pytest
import torch
from sharded_worker import Alive, watched, with_live_biases
from torch import nn

from hf_oto import OTOError, attempts, partition_zigs
from hf_oto.by_layers import blocks_of, runs_by_blocks, taken_apart
from hf_oto.calls import as_forwards
from hf_oto.certificate import own_outputs
from hf_oto.cut import resolve
from hf_oto.zigs import random_half

INPUTS = {"x": torch.linspace(-1, 1, 24).reshape(3, 8)}


class Layer(nn.Module):
    """A layer whose forward shortens its own weights, in eval mode too."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x):
        with torch.no_grad():
            self.wide.weight.clamp_(-0.1, 0.1)
        return x + self.narrow(self.wide(x).relu())


class Net(nn.Module):
    """Layers in a list, and a head in none."""

    def __init__(self, reads_from_outside=False):
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in range(4)])
        self.head = nn.Linear(8, 4)
        self.reads_from_outside = reads_from_outside

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        if self.reads_from_outside:
            x = x * self.layers[0].narrow.bias
        return self.head(x)


class Parts(nn.Module):
    """Blocks whose parts are called from outside, without a bias; its hidden size is a number in the forward."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Holder(), Holder()])
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        for block in self.blocks:
            hidden = block.up(x).relu()
            hidden = hidden / float(len(range(hidden.shape[-1])))  # which only a run with values shows
            x = x + block.down(hidden)
        return self.head(x)


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 32, bias=False), nn.Linear(32, 8, bias=False)


def net(**arguments):
    torch.manual_seed(0)
    return Net(**arguments).eval()


def bytes_of(module):
    return sum(p.nbytes for p in module.parameters())


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_only_one_layer_is_there_at_a_time():
    model = net()
    with watched():
        partition = partition_zigs(model, INPUTS)
    assert len(partition.axes) == 4
    assert 0 < Alive.most <= bytes_of(model.head) + bytes_of(model.layers[0])


def test_outputs_and_weights_stay():
    model = net()
    before = weights(model)
    parameters = dict(model.named_parameters())
    forwards = as_forwards(INPUTS)
    expected = own_outputs(model, forwards)
    with taken_apart(model) as by_layers, by_layers.running():
        outputs = own_outputs(model, forwards)
        assert any(p.is_meta for p in model.parameters())
    assert all(map(torch.equal, outputs, expected))
    assert same(weights(model), before)
    assert all(p is parameters[name] for name, p in model.named_parameters())


@pytest.mark.parametrize("reads_from_outside", [False, True])
def test_a_wrong_cut_is_found_and_a_right_one_passes(reads_from_outside):
    model = net(reads_from_outside=reads_from_outside)
    before = weights(model)
    partition = partition_zigs(model, INPUTS)
    assert len(partition.axes) == 4
    forwards = as_forwards(INPUTS)
    assert attempts.differs(model, forwards, None, resolve(partition, random_half(partition))) is None
    wrong = with_live_biases(partition, "wide.bias")
    problem = attempts.differs(model, forwards, None, resolve(wrong, random_half(wrong)))
    assert "differ by" in problem
    assert same(weights(model), before)


def test_what_is_not_there_is_never_computed_with():
    """Some of torch's products of a tensor and one on meta return whatever lies in memory."""
    for seed in range(8):
        torch.manual_seed(seed)
        model = Parts()
        with (
            taken_apart(model) as by_layers,
            by_layers.running(),
            pytest.raises(OTOError, match=r"up\.weight is read"),
        ):
            model(**INPUTS)
        assert not partition_zigs(model, INPUTS).axes
        assert not runs_by_blocks(model, as_forwards(INPUTS))
    assert runs_by_blocks(net(), as_forwards(INPUTS))


class Returns(Layer):
    """A layer that returns a weight of its own."""

    def forward(self, x):
        return super().forward(x), self.narrow.bias


def test_a_weight_that_a_layer_returns_is_gone():
    model = nn.Sequential(Returns(), Last()).eval()
    with taken_apart(model) as by_layers, by_layers.running(), pytest.raises(OTOError, match=r"narrow\.bias is"):
        model(INPUTS["x"])
    assert not runs_by_blocks(model, as_forwards((INPUTS["x"],)))
    assert len(partition_zigs(model, (INPUTS["x"],)).axes) == 1


class Last(nn.Module):
    def forward(self, output):
        x, bias = output
        return x * bias


def test_blocks_are_what_all_ranks_run():
    model = net()
    assert blocks_of(model) == list(model.layers)
    model.layers[2].narrow.weight = model.layers[0].narrow.weight
    assert blocks_of(model) == [model.layers[1], model.layers[3]]
    model.layers[2].experts = nn.ModuleList([Layer()])  # one rank may need them, and another not
    assert blocks_of(model) == [model.layers[1], model.layers[3]]
    experts = nn.ModuleList([nn.ModuleList([Layer(), Layer()]), nn.ModuleList([Layer()])])
    assert blocks_of(experts) == [experts[0][0], experts[0][1], experts[1][0]]
    inner = nn.Sequential(nn.Sequential(Layer(), Layer()), nn.Linear(8, 8))
    assert blocks_of(inner) == [inner[0]]


def test_a_weight_that_is_computed_from_buffers_too():
    model = net()
    for layer in model.layers:
        nn.utils.parametrizations.spectral_norm(layer.narrow)
    model.eval()
    partition = partition_zigs(model, INPUTS)
    assert len(partition.axes) == 4
    with taken_apart(model) as by_layers:
        difference, tolerance = by_layers.cut_difference(
            resolve(partition, random_half(partition)), as_forwards(INPUTS)
        )
    assert difference <= tolerance
