"""Layers and functions that people write, a row each: what is cut of them is exact, what stays says truly why.

Partitions are made on the meta device, where no rehearsal on weights can mend a wrong rule; some rows need values.
"""

import copy
import dataclasses
import pickle
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from models import randomise_, waves
from torch import nn
from torch.ao import quantization
from torch.nn import functional as F
from torch.nn.utils import parametrizations, rnn

from hf_oto import PruningPlan, compact, partition_zigs, reasons

TOLERANCE = 1e-5
EVEN = torch.arange(6) % 2 == 0  # every other step


class Row(NamedTuple):
    """One kind of layer between others.

    Attributes:
        build: -> a model whose last layer is called `down`, and its input `x`.
        zigs: the sizes of the axes it must have, in their order.
        modes: in which it is traced and compared.
        values: whether the trace needs the values of tensors, so that the meta device would not do.
    """

    build: Callable[[], tuple[nn.Module, torch.Tensor]]
    zigs: list[int]
    modes: tuple[str, ...] = ("eval", "train")
    values: bool = False


class Chain(nn.Module):
    def __init__(self, up, mid, down):
        super().__init__()
        self.up, self.mid, self.down = up, mid, down

    def forward(self, x):
        return self.down(self.mid(self.up(x)))


class Fork(nn.Module):
    """Two linear layers side by side, a function of what they make, and one behind it."""

    def __init__(self, function, widths, read):
        super().__init__()
        self.a, self.b = (nn.Linear(4, width) for width in widths)
        self.down, self.function = nn.Linear(read, 5), function

    def forward(self, x):
        return self.down(self.function(self.a(x), self.b(x)))


class Weighted(nn.Module):
    """A linear layer, a function of what it makes and of a parameter, and one behind it."""

    def __init__(self, function, *shape):
        super().__init__()
        self.up, self.down, self.p = nn.Linear(4, 8), nn.Linear(8, 5), nn.Parameter(torch.ones(shape))
        self.function = function

    def forward(self, x):
        return self.down(self.function(self.up(x), self.p))


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def images(mid, read=8, plane=2, size=8):
    """A convolution of 3 channels into 8, `mid`, and one that reads `read` channels."""
    mid = mid if isinstance(mid, nn.Module) else Function(mid)
    layer = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[plane]
    return lambda: (
        Chain(layer(3, 8, 3, padding=1), copy.deepcopy(mid), layer(read, 5, 1)),
        waves(2, 3, *[size] * plane),
    )


def steps(mid, read=8, up=8):
    """The same for linear layers over 6 steps."""
    mid = mid if isinstance(mid, nn.Module) else Function(mid)
    return lambda: (Chain(nn.Linear(4, up), copy.deepcopy(mid), nn.Linear(read, 5)), waves(2, 6, 4))


def fork(function, widths=(8, 8), read=8):
    return lambda: (Fork(function, widths, read), waves(2, 6, 4))


def weighted(function, *shape):
    return lambda: (Weighted(function, *shape), waves(2, 6, 4))


# functions that move, write and look up -------------------------------------------------------------


def shifted_by_assignment(x):
    """A quarter of the channels from the next image, one from the one before, the others stay."""
    out, n = torch.zeros_like(x), x.shape[1] // 4
    out[:-1, :n] = x[1:, :n]
    out[1:, n : 2 * n] = x[:-1, n : 2 * n]
    out[:, 2 * n :] = x[:, 2 * n :]
    return out


def shifted_by_roll(x):
    n = x.shape[1] // 4
    a, b, rest = x.split([n, n, x.shape[1] - 2 * n], 1)
    return torch.cat([a.roll(1, 0), b.roll(-1, 0), rest], 1)


def apart(x):
    """Each quarter of the axis through a function of its own."""
    functions = torch.relu, torch.tanh, torch.sigmoid, torch.neg
    return torch.cat([f(part) for f, part in zip(functions, x.chunk(4, -1), strict=True)], -1)


def written(x, value):
    """Values in zeros, through a view of them."""
    out = torch.zeros_like(x)
    out[:, 1:] = value[:, 1:]
    return out


def set_where(x, index, value):
    x = x.clone()
    x[index] = value
    return x


def resampled(x):
    theta = torch.tensor([[1.0, 0.1, 0.0], [0.1, 1.0, 0.0]]).expand(len(x), 2, 3)
    return F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), align_corners=False)


def unpooled(x):
    return F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)


def unfolded(x):
    return F.unfold(x, 3, padding=1).unflatten(-1, x.shape[-2:])


def random_depth(x):
    return x * x.new_empty(len(x), 1, 1).bernoulli_(1.0)


def rms_norm(x, weight):
    return torch.ops.aten._fused_rms_norm(x, x.shape[-1:], weight, 0.1)[0]


class Paired(nn.Module):
    def __init__(self, mid):
        super().__init__()
        self.a, self.b, self.mid, self.down = nn.Linear(4, 8), nn.Linear(4, 6), mid, nn.Linear(7, 5)

    def forward(self, x):
        return self.down(self.mid(self.a(x), self.b(x)))


class Bag(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.mid, self.down = nn.EmbeddingBag(10, 8, mode="mean", **settings), nn.Linear(8, 5)

    def forward(self, x):
        return self.down(self.mid((100 * x[..., 0].abs()).long() % 10))


class Loss(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 5)

    def forward(self, x):
        return F.mse_loss(self.down(self.up(x)), torch.ones(2, 6, 5))


# recurrent layers, attention, parametrisations ------------------------------------------------------


class Recurrent(nn.Module):
    """A recurrent layer of size 6 between two linear layers, over packed sequences or not."""

    def __init__(self, kind, packed=False, **settings):
        super().__init__()
        read = settings.get("proj_size", 6) * (2 if settings.get("bidirectional") else 1)
        self.up, self.down, self.packed = nn.Linear(4, 8), nn.Linear(read, 5), packed
        self.mid = kind(8, 6, batch_first=True, **settings)

    def forward(self, x):
        x = self.up(x)
        if self.packed:
            x = rnn.pack_padded_sequence(x, torch.tensor([6, 4]), batch_first=True)
        x, _ = self.mid(x)
        return self.down(rnn.pad_packed_sequence(x, batch_first=True)[0] if self.packed else x)


def recurrent(kind, packed=False, **settings):
    return lambda: (Recurrent(kind, packed, **settings), waves(2, 6, 4))


class Cell(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.up, self.mid, self.down = nn.Linear(4, 8), kind(8, 6), nn.Linear(6, 5)

    def forward(self, x):
        state = self.mid(self.up(x[:, 0]))
        state = self.mid(self.up(x[:, 1]), state)
        return self.down(state[0] if isinstance(state, tuple) else state)


class Attention(nn.Module):
    def __init__(self, mid, **masks):
        super().__init__()
        self.up, self.mid, self.down, self.masks = nn.Linear(4, 16), mid, nn.Linear(16, 5), masks

    def forward(self, x):
        x = self.up(x)
        if isinstance(self.mid, nn.TransformerEncoder):
            return self.down(self.mid(x, src_key_padding_mask=torch.arange(6) >= torch.tensor([[6], [4]])))
        if isinstance(self.mid, nn.TransformerDecoder):
            return self.down(self.mid(x, x.flip(1), tgt_mask=torch.full((6, 6), -torch.inf).triu(1)))
        return self.down(self.mid(x, x, x)[0])


SIZES = {"d_model": 16, "nhead": 4, "dim_feedforward": 12, "dropout": 0.0, "batch_first": True}


def encoder():
    return Attention(nn.TransformerEncoder(nn.TransformerEncoderLayer(**SIZES), 2)), waves(2, 6, 4)


def decoder():
    return Attention(nn.TransformerDecoder(nn.TransformerDecoderLayer(**SIZES), 1)), waves(2, 6, 4)


def attention():
    return Attention(nn.MultiheadAttention(16, 4, batch_first=True)), waves(2, 6, 4)


def orthogonal(layer):
    return parametrizations.orthogonal(layer, orthogonal_map="cayley")


def norm_of_all(layer):
    return parametrizations.weight_norm(layer, dim=None)


def wrapped(wrap):
    """Two convolutions whose weights are computed from others, and one behind them."""

    def build():
        layers = wrap(nn.Conv2d(3, 8, 3)), wrap(nn.Conv2d(8, 6, 3)), nn.Conv2d(6, 5, 3)
        return Chain(nn.Sequential(layers[0], nn.ReLU()), nn.Sequential(layers[1], nn.ReLU()), layers[2]), waves(
            2, 3, 9, 9
        )

    return build


def hooked():
    """The same by a hook, which keeps the weight that it computed."""
    model, x = wrapped(nn.utils.weight_norm)()
    with torch.no_grad():  # a weight with a history can't be copied
        randomise_(model)(x)
    return model, x


class Quantised(nn.Linear):
    """A linear layer in training for quantisation: its weight and its output are rounded to a grid."""

    def __init__(self, n, m, grid, grid_of_weight):
        super().__init__(n, m)
        self.grid, self.grid_of_weight = grid(), grid_of_weight()

    def forward(self, x):
        return self.grid(F.linear(x, self.grid_of_weight(self.weight), self.bias).relu())


def quantised(observe, *grids):
    """Layers whose ranges were observed; from now on the ranges stay, or not."""

    def build():
        model = Chain(Quantised(4, 8, *grids), Quantised(8, 6, *grids), nn.Linear(6, 5))
        randomise_(model)
        for _ in range(3):
            model(waves(2, 6, 4))
        return (model if observe else model.apply(quantization.disable_observer)), waves(2, 6, 4)

    return build


ACTIVATION = quantization.FakeQuantize.with_args(
    observer=quantization.MovingAverageMinMaxObserver, quant_min=0, quant_max=255, dtype=torch.quint8
)
PER_TENSOR = ACTIVATION, quantization.default_weight_fake_quant
PER_CHANNEL = ACTIVATION, quantization.default_per_channel_weight_fake_quant
FUSED = quantization.default_fused_act_fake_quant, quantization.default_fused_per_channel_wt_fake_quant

EXACT = {
    "shift by assignment": Row(images(shifted_by_assignment), [2]),
    "shift by roll": Row(images(shifted_by_roll), [2]),
    "chunks apart": Row(steps(apart), [2]),
    "roll of the axis": Row(steps(lambda x: x.roll(-3, -1)), [5]),
    "roll of others": Row(images(lambda x: x.roll((1, 2), (2, 3)).flip(2).rot90(1, (2, 3))), [8]),
    "unfold": Row(images(unfolded, read=72), [8]),
    "fold": Row(images(lambda x: F.fold(F.unfold(x, 2, stride=2), x.shape[-2:], 2, stride=2)), [8]),
    "windows": Row(steps(lambda x: x.unfold(1, 2, 1).amax(-1)), [8]),
    "grid sample": Row(images(resampled), [8]),
    "pixel shuffle": Row(images(nn.PixelShuffle(2), read=2), [2]),
    "pixel unshuffle": Row(images(nn.PixelUnshuffle(2), read=32), [8]),
    "channel shuffle": Row(images(nn.ChannelShuffle(2)), [4]),
    "constant border": Row(images(nn.ConstantPad2d(1, 1.0)), [8]),
    "unpool": Row(images(unpooled), [8]),
    "adaptive maximum": Row(images(nn.AdaptiveMaxPool3d(2), plane=3, size=4), [8]),
    "reflection": Row(images(nn.ReflectionPad3d(1), plane=3, size=4), [8]),
    "upsample": Row(images(nn.Upsample(scale_factor=2, mode="trilinear"), plane=3, size=3), [8]),
    "upsample exactly": Row(images(nn.Upsample(scale_factor=2, mode="nearest-exact")), [8]),
    "power pool": Row(images(nn.LPPool2d(2, 2)), [8]),
    "batch norm": Row(images(nn.BatchNorm2d(8)), [8]),
    "instance norm": Row(images(nn.InstanceNorm2d(8, affine=True, track_running_stats=True)), [8]),
    "group norm": Row(images(nn.GroupNorm(4, 8)), [4]),
    "fused rms norm": Row(weighted(rms_norm, 8), [8]),
    "dropout": Row(images(nn.Sequential(nn.Dropout(0.0), nn.Dropout2d(0.0), nn.FeatureAlphaDropout(0.0))), [8]),
    "random depth": Row(steps(random_depth), [8]),
    "random slope": Row(steps(nn.RReLU()), [8], modes=("eval",)),
    "log sigmoid": Row(steps(nn.LogSigmoid()), [8]),
    "squared error": Row(fork(lambda a, b: F.mse_loss(a, b, reduction="none")), [8]),
    "bilinear": Row(lambda: (Paired(nn.Bilinear(8, 6, 7)), waves(2, 6, 4)), [8, 6, 7]),
    "outer product": Row(fork(lambda a, b: torch.einsum("bti,btj->btij", a, b).flatten(2), (4, 3), 12), [4]),
    "baddbmm": Row(fork(lambda a, b: torch.baddbmm(a, a @ b.mT, b)), [8]),
    "polar": Row(steps(lambda x: torch.polar(x.abs(), x).real), [8]),
    "Fourier transform": Row(steps(lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=1), n=6, dim=1) * x), [8]),
    "diagonal": Row(weighted(lambda x, p: x @ torch.diag(p), 8), [8]),
    "of a diagonal": Row(weighted(lambda x, p: x * p.diagonal(), 8, 8), [8]),
    "embedding bag": Row(lambda: (Bag(), waves(2, 6, 4)), [8]),
    "short embedding": Row(lambda: (Bag(max_norm=0.5), waves(2, 6, 4)), [8]),
    "take along": Row(steps(lambda x: torch.take_along_dim(x, x.argsort(1), 1)), [8]),
    "order": Row(steps(lambda x: x.cummax(1)[0] + x.median(1, True)[0] + x.kthvalue(2, 1, True)[0]), [8]),
    "scatter": Row(steps(lambda x: torch.zeros_like(x).scatter_add(1, (x > 0).long(), x)), [8]),
    "scatter, the largest": Row(steps(lambda x: torch.ones_like(x).scatter_reduce(1, (x > 0).long(), x, "amax")), [8]),
    "index add": Row(steps(lambda x: x.index_add(1, torch.arange(6) // 2, x)), [8]),
    "index fill": Row(steps(lambda x: x.index_fill(1, torch.tensor([0, 2]), 1.0)), [8]),
    "index put": Row(steps(lambda x: set_where(x, (slice(None), EVEN), x[:, :3])), [8]),
    "put where a mask is": Row(steps(lambda x: set_where(x, EVEN.expand(2, 6), x[0, 0].sigmoid())), [8]),
    "masked scatter": Row(fork(lambda a, b: a.masked_scatter(EVEN[None, :, None].expand_as(a), b)), [8]),
    "written zeros": Row(steps(lambda x: written(x, x.sigmoid())), [8]),
    "RNN": Row(recurrent(nn.RNN, num_layers=2), [8, 6]),
    "GRU": Row(recurrent(nn.GRU, bidirectional=True), [8, 6]),
    "LSTM": Row(recurrent(nn.LSTM, num_layers=2, bidirectional=True), [8, 6]),
    "LSTM without bias": Row(recurrent(nn.LSTM, bias=False), [8, 6]),
    "LSTM with projection": Row(recurrent(nn.LSTM, proj_size=3), [8, 3, 6]),
    "packed LSTM": Row(recurrent(nn.LSTM, packed=True), [8, 6], values=True),
    "packed GRU": Row(recurrent(nn.GRU, packed=True, num_layers=2, bidirectional=True), [8, 6], values=True),
    "LSTM cell": Row(lambda: (Cell(nn.LSTMCell), waves(2, 6, 4)), [8, 6]),
    "GRU cell": Row(lambda: (Cell(nn.GRUCell), waves(2, 6, 4)), [8, 6]),
    "encoder": Row(encoder, [12, 12]),
    "decoder": Row(decoder, [12], values=True),
    "weight norm": Row(wrapped(parametrizations.weight_norm), [8, 6]),
    "weight norm of all": Row(wrapped(norm_of_all), [8, 6]),
    "weight norm by a hook": Row(hooked, [8, 6], values=True),
    "spectral norm": Row(wrapped(parametrizations.spectral_norm), [8, 6]),
    "spectral norm by a hook": Row(wrapped(nn.utils.spectral_norm), [8, 6]),
    "fake quantisation": Row(quantised(False, *PER_TENSOR), [8, 6], values=True),
    "by channel": Row(quantised(False, *PER_CHANNEL), [8, 6], values=True),
}  # fmt: skip


class Always(nn.Module):
    """Keeps a model in train mode, whoever asks for another."""

    def __init__(self, model):
        super().__init__()
        self.model = model.train()

    def train(self, mode=True):
        return super().train(True)

    def forward(self, x):
        return self.model(x)


def made(row, mode="eval"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = row.build()
    if not row.values:
        randomise_(model)
    return (Always(model) if mode == "train" else model.eval()), x


def partition_of(row, mode="eval"):
    model, x = made(row, mode)
    return partition_zigs(model if row.values else model.to("meta"), {"x": x})


def outputs(model, x):
    """Of a copy, because forwards move statistics."""
    torch.manual_seed(0)
    with torch.no_grad():
        return copy.deepcopy(model)(x.clone())


def cut(row, mode, cutting):
    """How far the outputs move when a random half is zeroed, and how far when that is cut by another partition."""
    model, x = made(row, mode)
    partition, rng = partition_of(row, mode), np.random.default_rng(0)
    plan = PruningPlan({a.name: np.sort(rng.permutation(a.size)[: (a.size + 1) // 2]) for a in partition.axes})
    full = outputs(model, x)
    partition.zero_(model, plan)
    zeroed = outputs(model, x)
    compact(model, cutting(partition), plan)
    scale = zeroed.abs().max()
    return float((full - zeroed).abs().max() / scale), float((zeroed - outputs(model, x)).abs().max() / scale)


def shifted(partition):
    """The same but that the last layer reads every position where the one before it was."""

    def shift(member, size):
        last = re.search(r"\bdown\.(weight|bias)", member.param) and member.role == "consumer"
        return dataclasses.replace(member, index=np.roll(member.positions(size), 1, 0)) if last else member

    axes = [dataclasses.replace(a, members=tuple(shift(m, a.size) for m in a.members)) for a in partition.axes]
    return dataclasses.replace(partition, axes=tuple(axes))


pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections"),  # torch says that these are not fast
    pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm"),  # deprecated, but in use
]
CASES = [pytest.param(name, mode, id=f"{name}-{mode}") for name, row in EXACT.items() for mode in row.modes]


@pytest.fixture(autouse=True)
def seen_by_the_trace():
    """Attention in one kernel, which eval mode prefers, keeps its parts to itself."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_what_is_cut_is_exact(name, mode):
    partition = partition_of(EXACT[name], mode)
    assert [axis.size for axis in partition.axes] == EXACT[name].zigs
    assert not any("rehearsal" in why or "no rule" in why for why in partition.pinned.values())
    effect, difference = cut(EXACT[name], mode, lambda partition: partition)
    assert effect > 1e-3 and difference <= TOLERANCE


@pytest.mark.parametrize("name", sorted(EXACT.keys() - {"encoder", "decoder"}))  # there `down` reads what stays
def test_reading_neighbouring_positions_shows(name):
    """Negative control of the test above: the last layer reads every position where the one before it was."""
    assert cut(EXACT[name], "eval", shifted)[1] > 100 * TOLERANCE


PINNED = {  # build, a dimension of a parameter, why it stays
    "response norm": (images(nn.LocalResponseNorm(3)), "up.weight[0]", reasons.NEIGHBOURS),
    "softmax of channels": (images(nn.Softmax2d()), "up.weight[0]", reasons.ALONG.of("softmax")),
    "layer norm": (steps(nn.LayerNorm(8)), "up.weight[0]", reasons.LAYER_NORM),
    "plane of frequencies": (steps(lambda x: torch.fft.fft2(x).real), "up.weight[0]", reasons.ALONG.of("fft_c2c")),
    "largest": (steps(lambda x: x + x.amax(-1, keepdim=True)), "up.weight[0]", reasons.TAKEN.of("amax")),
    "smallest": (steps(lambda x: x / (1 + x.norm(-torch.inf, -1, keepdim=True))), "up.weight[0]", reasons.NORM),
    "division by zero": (steps(lambda x: x / x.norm(dim=1, keepdim=True)), "up.weight[0]", reasons.DIVISOR),
    "roll of all": (steps(lambda x: x.roll(1)), "up.weight[0]", reasons.MIXED.of("roll")),
    "cropped": (steps(lambda x: F.pad(x, (-1, 1))), "up.weight[0]", reasons.FIXED),
    "random places": (images(nn.FractionalMaxPool2d(2, 4)), "up.weight[0]", "fractional_max_pool2d draws random"),
    "cross product": (fork(torch.linalg.cross, (3, 3), 3), "a.weight[0]", reasons.ALONG.of("a cross product")),
    "triangle": (weighted(lambda x, p: x @ p.tril(), 8, 8), "p[0]", reasons.TRIANGLE),
    "exponential": (weighted(lambda x, p: x @ p.matrix_exp(), 8, 8), "p[0]", "linalg_matrix_exp mixes all"),
    "strides": (steps(lambda x: x.as_strided((2, 6, 8), (48, 8, 1))), "up.weight[0]", "as_strided reads memory"),
    "a mask of its own": (steps(lambda x: x.masked_scatter(x > 0, x.flip(1))), "up.weight[0]", reasons.NUMBERED),
    "scatter of channels": (steps(lambda x: x.scatter(2, x.long() * 0, x)), "up.weight[0]", reasons.NUMBERED),
    "loss": (lambda: (Loss(), waves(2, 6, 4)), "down.weight[0]", reasons.LOSS),
    "all heads in one": (attention, "up.weight[0]", reasons.SIZE.of("mid")),
    "heads of an encoder": (encoder, "mid.layers.0.self_attn.in_proj_weight[0]", "a size used in mid.layers.0"),
    "orthogonal": (wrapped(orthogonal), "up.0.parametrizations.weight.original[0]", "linalg_solve_ex mixes all"),
    "observers": (quantised(True, *PER_TENSOR), "up.weight[0]", reasons.OBSERVED),
    "fused observers": (quantised(False, *FUSED), "up.weight[0]", reasons.OBSERVED),
}  # fmt: skip


@pytest.mark.parametrize("name", PINNED)
def test_pinned_dimensions_say_why(name):
    """The reason is the right one, and none of these asks for a report."""
    build, param, why = PINNED[name]
    row = Row(build, [], values=True)
    partition = partition_of(row)
    assert partition.pinned[param].startswith(why)
    assert not any("report" in why.lift for why in partition.pinned.values())


def test_every_reason_has_a_lift_wherever_it_goes():
    known = [reason for reason in vars(reasons).values() if isinstance(reason, reasons.Reason)]
    assert len(known) > 30
    asks = {reason for reason in known if "please report it" in reason.lift}
    assert asks == {reasons.NO_RULE, reasons.REHEARSAL}
    for reason in known:
        why = reason.of("this").at("layer.0").partly()
        for same in (why, copy.deepcopy(why), pickle.loads(pickle.dumps(why))):
            assert same == reason.replace("{}", "this") + " in layer.0 (some positions)"
            assert same.lift == reason.lift and same.anywhere == reason.of("this")
    assert "please report it" in reasons.Reason("one of the user's own").lift  # negative control


@pytest.mark.parametrize(("value", "zero"), [(torch.relu, True), (torch.sigmoid, False)])
def test_zeros_that_are_written_over_are_zeros_no_more(value, zero):
    """Only where the values written are zero too does a zeroed producer silence the position."""
    (axis,) = partition_of(Row(steps(lambda x: written(x, value(x))), [8])).axes
    assert axis.zero_path == zero
