"""Averages over a cut axis: exact with the weights scaled, or pinned; never wrong."""

import dataclasses
from typing import ClassVar

import pytest
import torch
import transformers as tf
from models import GatedConfig, hidden, make, randomise_, text, waves
from torch import nn
from torch.nn import functional as F

import hf_oto
from hf_oto import PruningPlan, check_zero_invariance, compact, partition_zigs, to_dense
from hf_oto.cut import cut_, resolve

TOLERANCE = 1e-5
EPS = 0.1  # so large that a wrong one shows


def shifted(x):
    """Every token's predecessor, written into zeros."""
    out = torch.zeros_like(x)
    out[:, 1:] = x[:, :-1]
    return out


NORMS = {  # weight, x -> x of mean square 1, more or less
    "weight": lambda w, x: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)),
    "product": lambda w, x: x / ((x * x).mean(-1, keepdim=True) + EPS).sqrt() * w,
    "one_plus": lambda w, x: x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * (1.0 + w),
    "torch": lambda w, x: F.rms_norm(x, w.shape, w, EPS),
    "none": lambda w, x: F.rms_norm(x, x.shape[-1:], None, EPS),
    "both": lambda w, x: torch.tanh(w) * (x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * (1 + w)),
    "shifted": lambda w, x: F.rms_norm(x + shifted(x), w.shape, w, EPS) + w * shifted(x),
    "pooled": lambda w, x: w * x * x.mean(-1, keepdim=True).sigmoid(),
    "in_place": lambda w, x: w * (x * x.float().pow(2).mean(-1, keepdim=True).add_(EPS).rsqrt_()),
}
WRONG_NORMS = {
    "layer_norm": lambda w, x: F.layer_norm(x, w.shape, w, None, EPS),
    "centered": lambda w, x: w * (x - x.mean(-1, keepdim=True)),
    "variance": lambda w, x: w * x * torch.rsqrt(x.var(-1, keepdim=True) + EPS),
    "response": lambda w, x: w * x.relu() / (x.relu().mean(-1, keepdim=True) + EPS),
    "gated": lambda w, x: (
        w * F.rms_norm(x, w.shape, None, EPS) * x.pow(2).mean(-1, keepdim=True).sqrt().tanh() * x.tanh()
    ),
    "cubed": lambda w, x: w * x / (x.abs().pow(3).mean(-1, keepdim=True) + x.pow(2).mean(-1, keepdim=True) + EPS),
    "part": lambda w, x: w * (x * torch.rsqrt(x[..., :8].pow(2).mean(-1, keepdim=True) + EPS)),
}


class Stream(tf.PreTrainedModel):
    """Embedding, a residual block behind a norm, a norm, and a head that may be the embedding again."""

    config_class = GatedConfig
    _tied_weights_keys: ClassVar = {"head.weight": "embed.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.norm = (NORMS | WRONG_NORMS)[config.norm]
        self.embed, self.head = nn.Embedding(40, 16), nn.Linear(16, 40, bias=False)
        self.up, self.down = nn.Linear(16, 12), nn.Linear(12, 16)
        if config.norm != "none":
            self.scale = nn.ParameterList(nn.Parameter(torch.rand(16)) for _ in range(2))
        else:
            self.scale = [None, None]
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        x = x + self.down(F.silu(self.up(self.norm(self.scale[0], x))))
        return self.head(self.norm(self.scale[1], x))


def stream(norm, tied):
    return randomise_(Stream(GatedConfig(norm=norm, tie_word_embeddings=tied))).eval()


def half(partition):
    return PruningPlan({axis.name: range(1, axis.size, 2) for axis in partition.axes})


def streams_of(partition):
    return [axis for axis in partition.axes if axis.scales]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_streams_behind_norms_are_cut_exactly(norm, tied, outputs, difference):
    model = stream(norm, tied)
    partition = partition_zigs(model, text(2))
    if norm in ("none", "both") and tied:  # nothing between two uses of one weight could take its scale back
        assert [axis.size for axis in partition.axes] == [12]
        assert partition.pinned["embed.weight[1]"] == "an average is taken over it"
        return
    (axis,) = streams_of(partition)
    assert (axis.kind, axis.size, axis.zero_path) == ("units", 16, True)
    assert check_zero_invariance(model, partition, text(2)) <= TOLERANCE
    for _ in range(2):  # and once more
        plan = half(partition)
        partition.zero_(model, plan)
        zeroed = outputs(model, text(2))
        compact(model, partition, plan)
        assert difference(zeroed, outputs(model, text(2))) <= TOLERANCE
        dense = to_dense(model)
        assert dense.embed.weight.shape == (40, 16)
        assert difference(zeroed, outputs(dense, text(2))) <= TOLERANCE
        partition = partition_zigs(model, text(2))
    assert model.embed.weight.shape == (40, 4) and len(model.config.oto["cuts"]) == 4


@pytest.mark.parametrize("norm", sorted(NORMS.keys() - {"none", "both"}))
def test_a_cut_without_the_scales_shows(norm, outputs, difference):
    """Negative control: every power is needed, and its sign."""
    for wrong in (
        lambda name, power: 0,
        lambda name, power: -power,
        lambda name, power: power * (name[:5] != "embed"),
    ):
        model = stream(norm, True)
        partition = partition_zigs(model, text(2))
        (axis,) = streams_of(partition)
        plan = PruningPlan({axis.name: range(1, axis.size, 2)})
        partition.zero_(model, plan)
        zeroed = outputs(model, text(2))
        scales = tuple(s._replace(power=wrong(s.param, s.power)) for s in axis.scales)
        axes = tuple(dataclasses.replace(a, scales=scales) if a is axis else a for a in partition.axes)
        cut_(model, resolve(dataclasses.replace(partition, axes=axes), plan))
        assert difference(zeroed, outputs(model, text(2))) > 1e-3


@pytest.mark.parametrize("norm", WRONG_NORMS)
def test_averages_used_otherwise_are_pinned(norm):
    model = stream(norm, False)
    for weights in (model, stream(norm, False).to("meta")):  # the rules know, without the rehearsal
        partition = partition_zigs(weights, text(2))
        assert [axis.size for axis in partition.axes] == [12]
        assert "rehearsal" not in partition.pinned["embed.weight[1]"]


class Mean(nn.Module):
    """A plain average of hidden units, linear or not, next to what reads them."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.up, self.down = kind, nn.Linear(16, 12), nn.Linear(12, 16)
        if kind == "side by side":
            self.left, self.right = nn.Linear(16, 12), nn.Linear(12, 16)

    def forward(self, x):
        h = self.up(x)
        if self.kind == "relu":
            return self.down(h.relu()) + h.relu().mean(-1, keepdim=True)
        if self.kind == "side by side":
            both = torch.cat([h, self.left(x)], -1)
            return self.down(h) + self.right(self.left(x)) + both.mean(-1, keepdim=True)
        return self.down(h) + h.mean(-1, keepdim=True)


@pytest.mark.parametrize(("kind", "powers"), [("linear", [-1, -1, 1]), ("relu", None), ("side by side", None)])
def test_plain_averages_are_exact_or_pinned(kind, powers, outputs, difference):
    model = randomise_(Mean(kind)).eval()
    partition = partition_zigs(model, hidden(2))
    assert [[s.power for s in axis.scales] for axis in partition.axes] == ([powers] if powers else [])
    plan = half(partition)
    partition.zero_(model, plan)
    zeroed = outputs(model, hidden(2))
    assert difference(zeroed, outputs(compact(model, partition, plan), hidden(2))) <= TOLERANCE


class NormedHeads(nn.Module):
    """A norm over all heads at once, as wide as the heads are many times wide."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16, bias=i > 2) for i in range(4))
        self.norms = nn.ModuleList(nn.RMSNorm(16, EPS) for _ in range(2))

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.norms[0](self.q(x)), self.norms[1](self.k(x)), self.v(x)
        q, k, v = (t.view(b, n, -1, 4).transpose(1, 2) for t in (q, k, v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))


def test_heads_normed_together_are_cut_whole(outputs, difference):
    model = randomise_(NormedHeads()).eval()
    partition = partition_zigs(model, hidden(2))
    (axis,) = partition.axes
    assert (axis.kind, axis.size, bool(axis.scales)) == ("heads", 4, True)
    plan = PruningPlan({axis.name: [1, 2, 3]})
    partition.zero_(model, plan)
    zeroed = outputs(model, hidden(2))
    assert difference(zeroed, outputs(compact(model, partition, plan), hidden(2))) <= TOLERANCE
    assert model.norms[0].normalized_shape == (12,)


def test_only_what_is_cut_is_scaled():
    """A protected parameter keeps its values, whatever else would have to change."""
    model = make("deepseek")
    names = ["q_a_proj", "kv_a_proj", "o_proj"]
    for name in names:
        partition = partition_zigs(model, text(2), protect=[name])
        assert not any(name in s.param for axis in partition.axes for s in axis.scales)
    assert any(n in s.param for n in names for axis in partition_zigs(model, text(2)).axes for s in axis.scales)


@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rehearsal_sees_a_scale_that_is_hardly_wrong(dtype, wrong, monkeypatch):
    """A power that is off by a millionth is no rounding, in any dtype."""
    model = stream("weight", True).to(dtype)
    power = 1 + 1e-6 * wrong

    def resolved(partition, plan, warn, right=hf_oto.partition.resolve):
        cut = right(partition, plan)
        return cut._replace(scales={name: (f**power, offset) for name, (f, offset) in cut.scales.items()})

    monkeypatch.setattr(hf_oto.partition, "resolve", resolved)
    partition = partition_zigs(model, text(2))
    assert bool(streams_of(partition)) is not wrong
    assert ("in rehearsal" in partition.pinned.get("embed.weight[1]", "")) is wrong


def test_a_body_alone_is_dense_again(tmp_path, outputs, difference):
    """The body's scales are undone too, and it doesn't need those of the head that it was saved with."""
    model = make("llama").eval()
    partition = partition_zigs(model, text(2))
    plan = half(partition)
    partition.zero_(model, plan)
    expected = outputs(model.model, text(2))
    compact(model, partition, plan).save_pretrained(tmp_path)
    body = tf.AutoModel.from_pretrained(tmp_path).eval()
    assert outputs(body, text(2))[0].shape[-1] == 16
    assert difference(expected, outputs(to_dense(body), text(2))) <= TOLERANCE


def test_zero_zigs_of_a_stream_get_no_gradient():
    """What training has made zero stays zero by itself: its norm's gradient is proportional to it."""
    model = stream("weight", True)
    partition = partition_zigs(model, text(2))
    (axis,) = streams_of(partition)
    gone = [0, 3, 7]
    with torch.no_grad():
        for m in axis.members:
            dict(model.named_parameters())[m.param].index_fill_(m.dim, torch.tensor(gone), 0)
    model(**text(2)).square().sum().backward()
    parameters = dict(model.named_parameters())
    for m in axis.members:
        gradient = parameters[m.param].grad.movedim(m.dim, 0)
        assert not gradient[gone].any() and gradient[[1, 2]].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_scales_are_rounded_once(dtype, outputs, difference):
    model = stream("one_plus", True).to(dtype)
    partition = partition_zigs(model, text(2))
    assert streams_of(partition)
    plan = half(partition)
    partition.zero_(model, plan)
    zeroed = outputs(model, text(2))
    assert difference(zeroed, outputs(compact(model, partition, plan), text(2))) <= 16 * torch.finfo(dtype).eps
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize(("function", "offered"), [(torch.neg, True), (torch.cos, False)])
def test_averages_of_what_zeros_do_not_silence_are_pinned(function, offered):
    """cos(0) is 1: zero producers don't silence these positions, so the average over them pins the axis."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(16, 12), nn.Linear(12, 16)

        def forward(self, x):
            h = function(self.up(x))
            return self.down(h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS))

    partition = partition_zigs(randomise_(Net()), {"x": waves(2, 7, 16)})
    assert [axis.size for axis in partition.axes] == ([12] if offered else [])
    assert (partition.pinned.get("up.weight[0]") == "an average is taken over it") is not offered
