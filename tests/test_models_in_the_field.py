"""Models as people write them, a function each: what is cut of them is exact, and the analysis leaves no trace.

Every situation is put through the same laws. It is partitioned, half of every axis is zeroed, and the outputs of the
zeroed model and of the compact one are equal, in every mode; nothing that the model keeps, nor what hooks, classes and
caches keep for it, has changed until then, also when the analysis is interrupted anywhere inside.
"""

import copy
import dataclasses
import functools
import gc
import itertools
import os
import random
import signal
import sys
import threading
import time
import types
import weakref
from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import accelerate
import numpy as np
import pytest
import torch
import transformers as tf
from models import randomise_, waves
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.ao import quantization
from torch.nn import functional as F
from torch.nn.utils import fusion, parametrizations, parametrize, prune, rnn
from torch.utils.checkpoint import checkpoint

from hf_oto import OTOError, PruningPlan, check_zero_invariance, compact, partition_zigs, restore
from hf_oto.calls import Forward
from hf_oto.certificate import certify
from hf_oto.cut import resolve
from hf_oto.sizes import Size

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm"),  # deprecated, but in use
    pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated"),  # the same
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),  # checkpoints without gradients
]
TOLERANCE = 1e-5
EFFECT = 1e-3


class Situation(NamedTuple):
    """One kind of model.

    Attributes:
        build: -> the model and the arguments of one call of it, or several.
        zigs: the sizes of the axes it must have.
        modes: in which the zeroed and the compact model are compared.
    """

    build: Callable[[], Any]
    zigs: list[int]
    modes: tuple[str, ...]


SITUATIONS: dict[str, Situation] = {}


def situation(*zigs, modes=("eval", "train")):
    def add(build):
        SITUATIONS[build.__name__] = Situation(build, list(zigs), modes)
        return build

    return add


def made(name):
    """The model of a situation with random weights, and its calls."""
    GLOBAL_TABLES.clear(), positions.cache_clear()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = SITUATIONS[name].build()
    model, inputs = built if isinstance(built, tuple) else (built, {"x": waves(4, 6)})
    return model, inputs


class Net(nn.Module):
    """Two linear layers, and what a situation puts between them."""

    def __init__(self, width=16, read=None):
        super().__init__()
        self.up, self.down = nn.Linear(6, width), nn.Linear(read or width, 3)

    def forward(self, x):
        return self.down(self.mid(torch.relu(self.up(x))))

    def mid(self, h):
        return h


class Around(nn.Module):
    """The same with a module between them."""

    def __init__(self, mid):
        super().__init__()
        self.up, self.mid, self.down = nn.Linear(6, 16), mid, nn.Linear(16, 3)

    def forward(self, x):
        return self.down(self.mid(torch.relu(self.up(x))))


# the same thing in several places ---------------------------------------------------------------------


@situation(16, 16)
def one_block_at_three_places_of_a_list():
    class M(Net):
        def __init__(self):
            super().__init__()
            block = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
            self.blocks, self.again = nn.ModuleList([block] * 3), block

        def mid(self, h):
            for block in self.blocks:
                h = h + block(h)
            return self.again(h)

    return M()


@situation(16)
def weights_tied_across_classes():
    """One weight is that of a linear layer, of an embedding, and a plain parameter of the model."""

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(12, 16), nn.Linear(16, 12, bias=False)
            self.up, self.down = nn.Linear(6, 16), nn.Linear(12, 3)
            self.head.weight = self.table.weight
            self.own = self.table.weight

        def forward(self, x):
            h = torch.relu(self.up(x)) + self.table(x.argmax(-1)) + self.own[0]
            return self.down(self.head(h))

    return M()


@situation(16)
def a_parameter_of_two_modules_of_one_class():
    class M(Net):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(6, 16)
            self.other.weight = self.up.weight

        def forward(self, x):
            return self.down(self.up(x).relu() * self.other(x))

    return M()


@situation(16)
def a_module_known_through_an_attribute_of_another():
    """The child refers to its parent's layer by a plain attribute, behind the back of nn.Module."""

    class Child(nn.Module):
        def __init__(self, layer):
            super().__init__()
            object.__setattr__(self, "layer", layer)

        def forward(self, h):
            return self.layer(h)

    class M(Net):
        def __init__(self):
            super().__init__()
            self.child = Child(self.down)

        def forward(self, x):
            return self.child(torch.relu(self.up(x)))

    return M()


@situation(16)
def a_registered_module_in_a_plain_list_too():
    class M(Net):
        def __init__(self):
            super().__init__()
            self.order = [self.up, [self.down]]

        def forward(self, x):
            return self.order[1][0](torch.relu(self.order[0](x)))

    return M()


@situation(16)
def a_module_that_nobody_registered():
    """It has weights, a running statistic and a mode, of which neither parameters() nor train() know."""

    class M(Net):
        def __init__(self):
            super().__init__()
            self.between = nn.Linear(16, 16)
            self.hidden = [nn.Sequential(nn.Linear(16, 5), nn.BatchNorm1d(5), nn.Linear(5, 16))]

        def mid(self, h):
            return self.between(torch.relu(self.hidden[0](h)))

    m = M()
    randomise_(m.hidden[0])
    return m


@situation(16)
def parameters_in_a_list_beside_their_registration():
    class M(Net):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(16))
            self.mine = [self.scale, self.down.weight]
            self.by_name = {"bias": self.down.bias}

        def forward(self, x):
            h = torch.relu(self.up(x)) * self.mine[0]
            return F.linear(h, self.mine[1], self.by_name["bias"])

    return M()


@situation(16)
def parameters_in_lists_of_lists():
    class M(Net):
        def __init__(self):
            super().__init__()
            self.mine = [[self.down.weight], [self.down.bias]]

        def forward(self, x):
            return F.linear(torch.relu(self.up(x)), self.mine[0][0], self.mine[1][0])

    return M()


@situation()
def a_view_of_a_parameter_as_attribute():
    class M(Net):
        def __init__(self):
            super().__init__()
            self.view = self.down.weight.detach().t()

        def forward(self, x):
            return torch.relu(self.up(x)) @ self.view + self.down.bias

    return M()


# what modules keep ------------------------------------------------------------------------------------


@situation(16)
def a_tensor_with_a_history():
    class M(Net):
        def mid(self, h):
            self.seen, self.all = h, {"last": [h], "sum": h.sum()}
            return h

    m = M()
    m(waves(4, 6)).sum()
    return m


@situation(16)
def locks_files_weakrefs_and_lambdas():
    class M(Net):
        def __init__(self):
            super().__init__()
            self.lock, self.local, self.event = threading.RLock(), threading.local(), threading.Event()
            self.file = sys.__stdout__
            self.act = lambda h: torch.relu(h) * 2
            self.me, self.others = weakref.ref(self), weakref.WeakValueDictionary({"up": self.up})
            self.weak = weakref.WeakSet([self.down])

        def mid(self, h):
            with self.lock:
                self.local.last = h
                self.event.set()
                assert self.me() is self and self.others["up"] is self.up and self.down in self.weak
                return self.act(h)

    return M()


@situation(16)
def generators_that_it_draws_from():
    class M(Net):
        def __init__(self):
            super().__init__()
            self.torch, self.python = torch.Generator().manual_seed(3), random.Random(3)
            self.numpy, self.legacy = np.random.default_rng(3), np.random.RandomState(3)

        def mid(self, h):
            h = h * torch.rand((), generator=self.torch) + h * self.python.random()
            return h * float(self.numpy.random()) + h * float(self.legacy.rand())

    return M()


@situation(16)
def counters_everywhere():
    @dataclasses.dataclass
    class Stats:
        calls: int = 0
        widths: list = dataclasses.field(default_factory=list)

    @dataclasses.dataclass(slots=True)
    class Slots:
        calls: int = 0
        last: Any = None

    class M(Net):
        total = 0
        shapes = {}  # noqa: RUF012

        def __init__(self):
            super().__init__()
            self.calls, self.steps, self.stats, self.slots = 0, [0], Stats(), Slots()
            self.space = types.SimpleNamespace(calls=0, inner=types.SimpleNamespace(width=16))
            self.per_key, self.recent = defaultdict(int), deque(maxlen=3)
            self.list = [types.SimpleNamespace(calls=0)]
            self.array = np.zeros(3)

        def mid(self, h):
            n = h.shape[-1]
            self.calls += 1
            self.steps[0] += 1
            self.steps.append(n)
            self.stats.calls += n
            self.stats.widths.append(n)
            self.slots.calls += 1
            self.slots.last = n
            self.space.calls += n
            self.space.inner.width = n
            self.per_key[n] += 1
            self.recent.append(h)
            self.list[0].calls += n
            self.array[0] += 1
            type(self).total += n
            type(self).shapes[n] = h.shape
            return h

    return M()


@situation(16)
def a_table_by_device():
    class M(Net):
        def __init__(self):
            super().__init__()
            self.tables, self.ready = {}, None

        def mid(self, h):
            key = (str(h.device), h.shape[0])
            if key not in self.tables:
                self.tables[key] = torch.arange(h.shape[0], device=h.device).float()[:, None]
            return h * (1 + self.tables[key])

    return M()


@situation(16)
def a_table_of_the_class():
    """The cache is an attribute of the class: one for all models."""

    class M(Net):
        tables = {}  # noqa: RUF012

        def mid(self, h):
            if h.shape[0] not in self.tables:
                self.tables[h.shape[0]] = torch.arange(h.shape[0]).float()[:, None]
            return h * (1 + self.tables[h.shape[0]])

    return M()


GLOBAL_TABLES = {}


@situation(16)
def a_table_of_the_file():
    GLOBAL_TABLES.clear()

    class M(Net):
        def mid(self, h):
            if h.shape[0] not in GLOBAL_TABLES:
                GLOBAL_TABLES[h.shape[0]] = torch.arange(h.shape[0]).float()[:, None]
            return h * (1 + GLOBAL_TABLES[h.shape[0]])

    return M()


@functools.lru_cache(maxsize=8)
def positions(n):
    return torch.arange(n).float()[:, None]


@situation(16)
def a_cached_function():
    positions.cache_clear()

    class M(Net):
        def mid(self, h):
            return h * (1 + positions(h.shape[0]))

    return M()


@situation(16)
def a_cached_method():
    class M(Net):
        @functools.lru_cache  # noqa: B019
        def table(self, n, dtype):
            return torch.arange(n, dtype=dtype)[:, None]

        @functools.cached_property
        def constant(self):
            return torch.ones(1) * 2

        def mid(self, h):
            return h * (1 + self.table(h.shape[0], h.dtype)) * self.constant

    return M()


@situation(16)
def a_memory_bank_written_in_eval_mode():
    """In place, in a buffer, in a plain attribute, and in a list of tensors."""

    class M(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("bank", torch.ones(4, 6))
            self.plain, self.some, self.at = torch.ones(4, 6), [torch.ones(4, 6)], 0

        def forward(self, x):
            self.bank[self.at % 4] = x[0]
            self.bank.lerp_(x, 0.5)
            self.plain.mul_(0.5).add_(x)
            self.some[0].add_(1)
            self.at += 1
            return super().forward(x + self.bank + self.plain + self.some[0])

    return M()


@situation(16, 16)
def sizes_in_a_namespace_and_a_dataclass():
    @dataclasses.dataclass
    class Config:
        parts: int = 4

    class M(Net):
        def __init__(self):
            super().__init__()
            self.between, self.wide = nn.Linear(16, 16), nn.Linear(16, 16)
            self.config, self.space = Config(), types.SimpleNamespace(width=16)

        def mid(self, h):
            h = torch.relu(self.wide(self.between(h).view(-1, self.config.parts, 4).flatten(1)))
            return h

    return M()


@situation(16)
def weights_that_the_forward_writes():
    """An embedding that shortens its rows, and weights that are clamped."""

    class M(Net):
        def __init__(self):
            super().__init__()
            self.table, self.scale = nn.Embedding(6, 6, max_norm=0.5), nn.Parameter(torch.ones(16))

        def forward(self, x):
            self.up.weight.data.clamp_(-0.3, 0.3)
            return super().forward(x + self.table(torch.arange(4)))

        def mid(self, h):
            with torch.no_grad():
                self.scale.mul_(0.9)
            return h * self.scale

    return M()


@situation(16)
def past_activations():
    class M(Net):
        def __init__(self):
            super().__init__()
            self.past = deque(maxlen=2)

        def mid(self, h):
            self.past.append(h)
            return h + sum(self.past)

    return M()


# tables made from weights, modes ----------------------------------------------------------------------


class Table(nn.Module):
    """In eval mode it reads a table made from its weight; train() drops it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))
        self.register_buffer("index", torch.arange(4), persistent=False)
        self.table = None

    @torch.no_grad()
    def train(self, mode=True):
        super().train(mode)
        self.table = None if mode else self.weight.exp().expand(4, -1)[self.index]
        return self

    def forward(self, h):
        return h * (self.weight.exp() if self.training else self.table)


class LazyTable(nn.Module):
    """The table is made by the first forward in eval mode."""

    def __init__(self):
        super().__init__()
        self.weight, self.cache = nn.Parameter(torch.ones(16)), {}

    def train(self, mode=True):
        super().train(mode)
        if mode:
            self.cache = {}
        return self

    def forward(self, h):
        if self.training:
            return h * self.weight.exp()
        if h.device not in self.cache:
            self.cache[h.device] = self.weight.detach().exp()
        return h * self.cache[h.device]


@situation(16)
def a_table_made_at_eval():
    return Around(Table())


@situation(16)
def a_table_made_at_eval_compact_in_train_mode():
    return Around(Table()).train()


@situation(16)
def a_table_made_at_eval_inside_a_model_in_train_mode():
    m = Around(Table()).train()
    m.mid.eval()
    return m


@situation(16)
def a_lazy_table():
    m = Around(LazyTable()).eval()
    m(waves(4, 6))
    return m


@situation(16, 16)
def a_frozen_batch_norm():
    """train() leaves the batch norm in eval mode."""

    class M(Net):
        def __init__(self):
            super().__init__()
            self.norm, self.between, self.free = nn.BatchNorm1d(16), nn.Linear(16, 16), nn.BatchNorm1d(16)

        def train(self, mode=True):
            super().train(mode)
            self.norm.eval()
            return self

        def mid(self, h):
            return self.free(torch.relu(self.between(self.norm(h))))

    return M().train()


@situation(16)
def a_train_that_returns_nothing():
    class Silent(nn.Linear):
        def train(self, mode=True):
            self.training = mode

    m = Net()
    m.up = Silent(6, 16)
    return m


# parametrised weights ---------------------------------------------------------------------------------


def parametrised(wrap):
    m = Around(nn.Sequential(wrap(nn.Linear(16, 16)), nn.ReLU()))
    wrap(m.up)
    return m


@situation(16, 16)
def old_weight_norm():
    return parametrised(nn.utils.weight_norm)


@situation(16, 16)
def new_weight_norm():
    return parametrised(parametrizations.weight_norm)


@situation(16, 16)
def old_spectral_norm():
    return parametrised(nn.utils.spectral_norm)


@situation(16, 16)
def new_spectral_norm():
    return parametrised(parametrizations.spectral_norm)


@situation(16, 16)
def a_parametrisation_of_ones_own():
    class Bounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.bound = nn.Parameter(torch.ones(16, 1))

        def forward(self, weight):
            return torch.tanh(weight) * self.bound

    def wrap(layer):
        parametrize.register_parametrization(layer, "weight", Bounded())
        return layer

    return parametrised(wrap)


@situation(16)
def pruning_masks():
    def wrap(layer):
        prune.l1_unstructured(layer, "weight", 0.3)
        prune.random_unstructured(layer, "bias", 0.2)
        return layer

    return parametrised(wrap)


@situation(16, 16)
def a_fused_batch_norm():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = nn.Conv1d(3, 16, 3), nn.Conv1d(16, 16, 3), nn.BatchNorm1d(16)
            self.c = nn.Conv1d(16, 4, 1)

        def forward(self, x):
            return self.c(torch.relu(self.norm(self.b(torch.relu(self.a(x))))))

    m = randomise_(M()).eval()
    m.b, m.norm = fusion.fuse_conv_bn_eval(m.b, m.norm), nn.Identity()
    return m, {"x": waves(2, 3, 9)}


@situation(16, 16)
def a_lazy_layer():
    m = Around(None)
    m.mid = nn.Sequential(nn.LazyLinear(16), nn.ReLU())
    m(waves(4, 6))
    return m


@situation(16)
def orthogonal_weights():
    """What is orthogonal as a whole stays; what reads it can go."""
    m = Around(nn.Sequential(parametrizations.orthogonal(nn.Linear(16, 16), orthogonal_map="cayley"), nn.ReLU()))
    m.between = nn.Linear(16, 16)
    m.down = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    return m


@situation(16)
def training_for_quantisation():
    class M(Net):
        def __init__(self):
            super().__init__()
            self.grid = quantization.FakeQuantize(quantization.MovingAverageMinMaxObserver, 0, 255)

        def mid(self, h):
            return self.grid(h)

    m = M()
    m(waves(4, 6))
    m.apply(quantization.disable_observer)
    return m


# forwards that are something else ---------------------------------------------------------------------


@situation(16)
def a_compiled_model():
    return torch.compile(Net(), backend="eager")


@situation(16, 16)
def a_compiled_part():
    return Around(torch.compile(nn.Sequential(nn.Linear(16, 16), nn.ReLU()), backend="eager"))


@situation(16, 16)
def a_scripted_part():
    m = Around(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)))
    m.mid.add_module("script", torch.jit.script(nn.Sequential(nn.Linear(16, 16), nn.ReLU())))
    return m


@situation(16, 16)
def a_traced_part():
    m = Around(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)))
    m.mid.add_module("traced", torch.jit.trace(nn.Sequential(nn.Linear(16, 16), nn.ReLU()), waves(4, 16)))
    return m


@situation(16)
def a_forward_that_is_a_closure():
    m = Net()
    old, calls = m.forward, []

    def forward(x):
        calls.append(x.shape[-1])
        return old(x) * 2

    m.forward = forward
    return m


@situation(16)
def a_forward_that_is_partial():
    class M(Net):
        def mid(self, h, factor=1):
            return h * factor

    m = M()
    m.mid = functools.partial(m.mid, factor=3)
    m.forward = functools.partial(M.forward, m)
    return m


@situation(16)
def a_forward_that_is_a_method():
    def forward(self, x):
        self.shape = x.shape
        return self.down(torch.tanh(self.up(x)))

    m = Net()
    m.forward = types.MethodType(forward, m)
    return m


@situation(16)
def a_forward_wrapped_with_its_signature():
    class M(Net):
        @functools.wraps(Net.forward)
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    return M()


@situation(16, 16)
def hooks_that_change_what_goes_in_and_out():
    m = Around(nn.Sequential(nn.Linear(16, 16), nn.ReLU()))
    m.up.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    m.up.register_forward_hook(lambda _, __, out: out + 1)
    m.mid.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs), with_kwargs=True)
    m.down.register_forward_hook(lambda _, __, ___, out: {"logits": out}["logits"], with_kwargs=True)
    return m


@situation(16)
def hooks_that_hold_what_they_see():
    """In a list of a closure, in an object, in a number of a closure, in a default argument."""

    class Tracker:
        def __init__(self):
            self.seen, self.calls = {}, 0

        def hook(self, module, args, out):
            self.seen[module] = out
            self.calls += 1

    features, count = [], 0

    def number(*_):
        nonlocal count
        count += 1

    def default(_, __, out, seen={}):  # noqa: B006
        seen["last"] = out.shape[-1]

    m = Net()
    m.tracker = Tracker()
    m.up.register_forward_hook(Tracker().hook)
    m.up.register_forward_hook(lambda _, __, out: features.append(out))
    m.up.register_forward_hook(number)
    m.up.register_forward_hook(default)
    m.up.register_forward_hook(functools.partial(lambda seen, *_: seen.append(1), []))
    return m


@situation(16)
def a_head_that_reads_what_a_hook_kept():
    class M(Net):
        def __init__(self):
            super().__init__()
            features = self.features = {}
            self.up.register_forward_hook(lambda _, __, out: features.__setitem__("up", out))

        def forward(self, x):
            self.up(x)
            return self.down(self.features.pop("up").relu())

    return M()


@situation(16)
def data_parallel():
    return nn.DataParallel(Net())


@situation(16)
def hooks_of_accelerate():
    m = Net()
    accelerate.hooks.add_hook_to_module(m, accelerate.hooks.AlignDevicesHook(io_same_device=True))
    accelerate.hooks.add_hook_to_module(m.up, accelerate.hooks.AlignDevicesHook("cpu"))
    return m


@situation(16, 16, 16)
def checkpointed():
    class M(Net):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def mid(self, h):
            h = checkpoint(lambda h: torch.relu(self.a(h)), h, use_reentrant=False)
            return checkpoint(lambda h: torch.relu(self.b(h)), h, use_reentrant=True)

    return M()


@situation()
def a_pool_of_threads():
    """What other threads compute, the trace can't see: it stays."""

    class M(Net):
        def __init__(self):
            super().__init__()
            self.pool, self.b = ThreadPoolExecutor(2), nn.Linear(16, 16)

        def mid(self, h):
            return self.pool.submit(lambda: torch.relu(self.b(h))).result()

    return M()


@situation(16)
def a_function_of_autograd():
    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h):
            ctx.save_for_backward(h)
            return h.round()

        @staticmethod
        def backward(ctx, grad):
            return grad

    class M(Net):
        def mid(self, h):
            return Straight.apply(h)

    return M()


@situation(16)
def gradients_inside_the_forward():
    class M(Net):
        def forward(self, x):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                y = self.down(torch.tanh(self.up(x)))
                (grad,) = torch.autograd.grad(y.sum(), x)
            return y, grad

    return M()


@situation(16)
def under_autocast():
    class M(Net):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                y = self.down(torch.relu(self.up(x)))
            return y.float()

    return M()


@situation(16)
def under_vmap():
    class M(Net):
        def mid(self, h):
            return torch.vmap(lambda row: row * 2 + 1)(h)

    return M()


# recurrent layers -------------------------------------------------------------------------------------


def recurrent(kind, **settings):
    class M(Net):
        def __init__(self):
            super().__init__(read=12 if settings.get("bidirectional") else 6)
            self.layers = nn.ModuleList([kind(16, 6, batch_first=True, **settings)])

        def mid(self, h):
            return self.layers[0](h)[0]

    return M(), {"x": waves(2, 5, 6)}


@situation(16, 6)
def gru_in_a_list():
    return recurrent(nn.GRU)


@situation(16, 6)
def lstm_both_ways():
    return recurrent(nn.LSTM, bidirectional=True)


@situation(16, 6)
def packed_sequences():
    class M(Net):
        def __init__(self):
            super().__init__(read=6)
            self.rnn = nn.LSTM(16, 6, batch_first=True)

        def forward(self, x, lengths):
            h = torch.relu(self.up(x))
            packed = rnn.pack_padded_sequence(h, lengths, batch_first=True, enforce_sorted=False)
            out, (last, _) = self.rnn(packed)
            out, _ = rnn.pad_packed_sequence(out, batch_first=True)
            return self.down(out), self.down(last[-1])

    return M(), {"x": waves(2, 5, 6), "lengths": torch.tensor([3, 5])}


@situation(16, 6)
def a_state_fed_back():
    """The state of the last call is kept, and read by the next one."""

    class M(Net):
        def __init__(self):
            super().__init__(read=6)
            self.rnn, self.state = nn.GRU(16, 6, batch_first=True), None

        def forward(self, x):
            out, self.state = self.rnn(torch.relu(self.up(x)), self.state)
            return self.down(out)

    return M(), [{"x": waves(2, 5, 6)}, {"x": waves(2, 3, 6)}]


@situation(6)
def a_state_passed_in():
    """The width of what the caller passes and gets stays."""

    class M(Net):
        def __init__(self):
            super().__init__(width=6, read=5)
            self.cell = nn.GRUCell(6, 5)

        def forward(self, x, state):
            state = self.cell(torch.relu(self.up(x)), state)
            return self.down(state), state

    return M(), {"x": waves(2, 6), "state": waves(2, 5)}


@situation(12, 12, 12)
def encoder_and_decoder():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            sizes = {"d_model": 16, "nhead": 4, "dim_feedforward": 12, "dropout": 0.0, "batch_first": True}
            self.e = nn.TransformerEncoder(
                nn.TransformerEncoderLayer(**sizes, norm_first=True), 2, nn.LayerNorm(16), False
            )
            self.d = nn.TransformerDecoder(nn.TransformerDecoderLayer(**sizes), 1)
            self.out = nn.Linear(16, 3)

        def forward(self, x, y):
            mask = nn.Transformer.generate_square_subsequent_mask(y.shape[1])
            padding = torch.arange(5) >= torch.tensor([[5], [3]])
            memory = self.e(x, src_key_padding_mask=padding)
            return self.out(self.d(y, memory, tgt_mask=mask, memory_key_padding_mask=padding))

    return M(), {"x": waves(2, 5, 16), "y": waves(2, 3, 16)}


# what forwards return ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    more: Any = None


Pair = namedtuple("Pair", "logits hidden")


@situation(16)
def a_dataclass():
    class M(Net):
        def forward(self, x):
            return Output(super().forward(x), {"list": [x, None, "text", 3]})

    return M()


@situation(16)
def a_named_tuple():
    class M(Net):
        def forward(self, x):
            return Pair(super().forward(x), None)

    return M()


@situation(16)
def a_nested_output():
    class M(Net):
        def forward(self, x):
            y = super().forward(x)
            return OrderedDict(a=[y, {"b": (y * 2, None)}], n=3, s="text", empty=y[:0], ints=torch.arange(3))

    return M()


@situation(16)
def a_model_output():
    class M(Net):
        def forward(self, x, return_dict=True):
            y = super().forward(x)
            out = tf.modeling_outputs.SequenceClassifierOutput(logits=y)
            return out if return_dict else out.to_tuple()

    return M(), [{"x": waves(4, 6)}, {"x": waves(4, 6), "return_dict": False}]


@situation()
def an_object_that_holds_a_hidden_state():
    """Beside the logits it returns an object with a tensor in it: that one is returned, too."""

    class Box:
        def __init__(self, hidden):
            self.inner = types.SimpleNamespace(hidden=[hidden])

    class M(Net):
        def forward(self, x):
            h = torch.relu(self.up(x))
            return self.down(h), Box(h)

    return M()


@situation()
def an_object_with_slots():
    @dataclasses.dataclass(slots=True)
    class Box:
        hidden: Any

    class Slots:
        __slots__ = ("hidden",)

    class M(Net):
        def forward(self, x):
            h = torch.relu(self.up(x))
            box = Slots()
            box.hidden = h
            return self.down(h), {"a": box}

    return M()


@situation()
def a_function_that_holds_a_hidden_state():
    class M(Net):
        def forward(self, x):
            h = torch.relu(self.up(x))
            return self.down(h), lambda: h.sum()

    return M()


@situation()
def a_distribution():
    class M(Net):
        def __init__(self):
            super().__init__()
            self.mean, self.scale = nn.Linear(16, 8), nn.Linear(16, 8)
            del self.up
            self.up = nn.Identity()
            self.down = nn.Linear(8, 3)

        def forward(self, x):
            h = torch.cat([x, x, x[..., :4]], -1)
            normal = torch.distributions.Normal(self.mean(h), self.scale(h).exp())
            return self.down(normal.mean), normal

    return M()


@situation(16)
def parts_that_are_no_numbers():
    class M(Net):
        def forward(self, x):
            y = super().forward(x)
            return y, torch.full_like(y, torch.nan), torch.where(x > 0, torch.inf, x), y[:, 0] / 0

    return M()


@situation(16)
def complex_numbers():
    class M(Net):
        def forward(self, x):
            return torch.fft.fft(super().forward(x)), torch.view_as_complex(x.view(-1, 3, 2))

    return M()


@situation(16)
def complex_weights():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(6, 16, dtype=torch.complex64)
            self.down = nn.Linear(16, 3, dtype=torch.complex64)

        def forward(self, x):
            return self.down(self.up(x.to(torch.complex64)) * 2).abs()

    return M()


@situation(16)
def a_sparse_output():
    class M(Net):
        def forward(self, x):
            y = super().forward(x)
            return y, x.to_sparse()

    return M()


@situation(16)
def a_width_as_a_number():
    """It returns the shape beside the logits: a number that no tensor holds."""

    class M(Net):
        def forward(self, x):
            h = torch.relu(self.up(x))
            return self.down(h), tuple(h.shape)

    return M()


# calls ------------------------------------------------------------------------------------------------


@situation(16)
def calls_of_different_shapes():
    class M(Net):
        def forward(self, x, scale=None, flip=False):
            y = super().forward(x)
            return (y.flip(0) if flip else y) * (1 if scale is None else scale)

    return M(), [{"x": waves(4, 6)}, {"x": waves(2, 5, 6), "scale": 2.0}, {"x": waves(1, 6), "flip": True}]


@situation(16)
def positional_arguments():
    class M(Net):
        def forward(self, x, *more, **named):
            return super().forward(x + sum(more) + named["bias"])

    return M(), [Forward((waves(4, 6), waves(4, 6), 1.0), {"bias": torch.ones(6)})]


@situation(16)
def calls_of_parts():
    class M(Net):
        def forward(self, x):
            raise AssertionError("nobody calls it")

    m = M()
    m.encode = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 6))
    return m, [Forward((waves(4, 6),), {}, "encode"), Forward((waves(4, 6),), {}, "up")]


@situation(16)
def arguments_that_it_changes():
    """It takes keys out, writes in place, appends to a list, and counts in an object."""

    @dataclasses.dataclass(slots=True)
    class Slots:
        x: torch.Tensor

    class M(Net):
        def forward(self, **batch):
            x, nested, cache = batch.pop("x"), batch.pop("nested"), batch.pop("cache")
            x.mul_(2)
            nested["list"].append(x)
            nested["list"][0].add_(1)
            batch.pop("slots").x.add_(1)
            cache.calls += 1
            cache.last = x
            assert not batch and cache.calls == 1 and len(nested["list"]) == 2
            return super().forward(x + nested["list"][0])

    inputs = {"x": waves(4, 6), "nested": {"list": [waves(4, 6)]}, "cache": types.SimpleNamespace(calls=0, last=None)}
    return M(), inputs | {"slots": Slots(waves(4, 6))}


@situation(16)
def arguments_of_every_kind():
    class M(Net):
        def forward(self, x, size, best, mode, table, fn, data, batch, words):
            assert size.numel() == 24 and isinstance(size, torch.Size) and mode == "sum"
            y = super().forward(x + best.values + torch.from_numpy(data) + table["mask"] + fn(x) + batch["x"])
            return y[: len(words)]

    inputs = {
        "x": waves(4, 6), "size": torch.Size([4, 6]), "best": waves(2, 4, 6).max(0), "mode": "sum",
        "table": types.MappingProxyType({"mask": waves(4, 6)}), "fn": torch.sin, "data": np.ones(6, np.float32),
        "batch": tf.BatchEncoding({"x": waves(4, 6)}), "words": ["a", "b", "c"],
    }  # fmt: skip
    return M(), inputs


@situation(16, 4, 8)
def a_cache_passed_in():
    config = tf.LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,  # of two, one left would take another branch: keys are then not repeated
        num_key_value_heads=1,
        intermediate_size=8,
    )
    model = tf.LlamaForCausalLM(config)
    cache = tf.DynamicCache(config=config)
    cache.update(waves(2, 1, 3, 4), waves(2, 1, 3, 4), 0)
    return model, {"input_ids": torch.arange(8).view(2, 4) + 3, "past_key_values": cache}


# parts that don't run ---------------------------------------------------------------------------------


@situation(16, 12)
def a_head_of_training():
    class M(Net):
        def __init__(self):
            super().__init__()
            self.b, self.aux = nn.Linear(16, 12), nn.Linear(16, 3)
            self.down = nn.Linear(12, 3)

        def mid(self, h):
            self.loss = self.aux(h).sum() if self.training else None
            return torch.relu(self.b(h))

        def forward(self, x):
            y = super().forward(x)
            return y if self.loss is None else (y, self.loss)

    return M()


@situation(12)
def heads_of_other_tasks():
    """As an attribute, in a list, in a dict: what they would read stays, what they would not can go."""

    class M(Net):
        def __init__(self):
            super().__init__(read=16)
            self.wide, self.narrow = nn.Linear(16, 12), nn.Linear(12, 16)
            self.heads = nn.ModuleList([nn.Linear(16, 3), nn.Linear(16, 4)])
            self.tasks = nn.ModuleDict({"a": nn.Linear(16, 5)})
            self.other = nn.Sequential(nn.Linear(16, 7), nn.ReLU(), nn.Linear(7, 5))

        def mid(self, h):
            return self.narrow(torch.relu(self.wide(h)))

        def forward(self, x, task=0):
            return self.heads[task](self.mid(torch.relu(self.up(x))))

    return M()


@situation(12, 12, 12)
def experts_that_nobody_chose():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 3)
            self.experts = nn.ModuleList(
                nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 16)) for _ in range(4)
            )

        def forward(self, x, which=(0, 2)):
            h = torch.relu(self.up(x))
            return self.down(sum(self.experts[i](h) for i in which))

    return M(), [{"x": waves(4, 6)}, {"x": waves(4, 6), "which": (1,)}]


@situation(12)
def a_tower_without_data():
    class M(Net):
        def __init__(self):
            super().__init__()
            self.b, self.c = nn.Linear(16, 12), nn.Linear(12, 16)
            self.tower = nn.Sequential(nn.Conv1d(3, 5, 3), nn.ReLU(), nn.Conv1d(5, 16, 3))

        def mid(self, h):
            return self.c(torch.relu(self.b(h)))

        def forward(self, x, image=None):
            h = torch.relu(self.up(x))
            return self.down(self.mid(h if image is None else h + self.tower(image).mean(-1)))

    return M()


# dtypes -----------------------------------------------------------------------------------------------


@situation(16, 16)
def double_weights():
    return Around(nn.Sequential(nn.Linear(16, 16), nn.ReLU())).double(), {"x": waves(4, 6).double()}


@situation(16)
def mixed_dtypes():
    class M(Net):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(16)
            self.register_buffer("codes", torch.ones(6, dtype=torch.int8))

        def forward(self, x):
            h = self.up((x * self.codes).bfloat16())
            return self.down(torch.relu(self.norm(h.float())).double())

    m = M()
    m.up.bfloat16(), m.down.double()
    return m


# the laws ---------------------------------------------------------------------------------------------


def calls_of(inputs):
    several = inputs if isinstance(inputs, list) else [inputs]
    return [call if isinstance(call, Forward) else Forward(kwargs=call) for call in several]


def flat(out):
    if isinstance(out, torch.Tensor):
        return [out.to_dense() if out.is_sparse else out]
    if isinstance(out, dict):
        return [t for part in out.values() for t in flat(part)]
    if isinstance(out, (list, tuple)):
        return [t for part in out for t in flat(part)]
    return flat([v for v in vars(out).values()]) if dataclasses.is_dataclass(out) and hasattr(out, "__dict__") else []


def outputs(model, inputs, mode):
    """What the calls return in a mode."""
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    if model.training != (mode == "train"):
        model.train(mode == "train")
    found = []
    with torch.no_grad():
        for call in calls_of(inputs):
            args, kwargs = own(call.args), own(dict(call.kwargs))
            found += flat(model.get_submodule(call.path)(*args, **kwargs))
    return [t.clone() for t in found if t.is_floating_point() or t.is_complex()]


def own(value):
    """A copy for a forward that changes what it is given."""
    try:
        return copy.deepcopy(value)
    except TypeError:  # of a mapping proxy there is none
        return {name: own(v) if not isinstance(v, types.MappingProxyType) else v for name, v in value.items()}


def distance(a, b):
    """The largest difference of finite entries relative to the largest of them; inf if shapes differ."""
    if [t.shape for t in a] != [t.shape for t in b]:
        return float("inf")
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        finite = torch.isfinite(x) & torch.isfinite(y)
        assert torch.equal(torch.isfinite(x), torch.isfinite(y))
        if finite.any():
            difference = (x - y)[finite].detach().abs().max()
            worst = max(worst, float(difference / x[finite].detach().abs().max().clamp_min(1e-3)))
    return worst


PLAIN = (int, float, str, bytes, bool, complex, type(None), torch.dtype, torch.device)


def memory_of(model):
    """Everything that a model keeps, as (path, what it is): bits, numbers, and which object is where; of its classes,
    its hooks and their closures, too."""
    found, seen, alive = [], set(), []

    def visit(path, value):
        if isinstance(value, PLAIN):
            found.append((path, type(value), value))
            return
        found.append((path, type(value), id(value)))
        if id(value) in seen:
            return
        seen.add(id(value))
        alive.append(value)
        if isinstance(value, torch.Tensor):
            bits = value.detach().clone().cpu() if not value.is_meta else None
            found.append((path, "tensor", value.shape, value.dtype, value.requires_grad, Bits(bits)))
        elif isinstance(value, np.ndarray):
            found.append((path, "array", value.tobytes()))
        elif isinstance(value, torch.Generator):
            found.append((path, "state", Bits(value.get_state())))
        elif isinstance(value, random.Random):
            found.append((path, "state", value.getstate()))
        elif isinstance(value, np.random.Generator):
            found.append((path, "state", repr(value.bit_generator.state)))
        elif isinstance(value, np.random.RandomState):
            found.append((path, "state", repr(value.get_state())))
        elif isinstance(value, torch.jit.ScriptModule):
            found.append((path, "mode", value.training))
        elif isinstance(value, (types.ModuleType, type, weakref.ref)):
            pass
        elif isinstance(value, dict):
            found.append((path, "keys", [id(k) if not isinstance(k, PLAIN) else k for k in value]))
            alive.extend(value)
            for key, inner in value.items():
                visit((*path, str(key)), inner)
        elif isinstance(value, (list, tuple, deque, set)):
            for i, inner in enumerate(value):
                visit((*path, i), inner)
        elif isinstance(value, types.FunctionType):
            for i, cell in enumerate(value.__closure__ or ()):
                visit((*path, "closure", i), cell.cell_contents)
            visit((*path, "defaults"), value.__defaults__)
        elif isinstance(value, types.MethodType):
            visit((*path, "self"), value.__self__)
            visit((*path, "function"), value.__func__)
        elif isinstance(value, functools.partial):
            for name in ("func", "args", "keywords"):
                visit((*path, name), getattr(value, name))
        else:
            for name in getattr(type(value), "__slots__", ()):
                visit((*path, name), getattr(value, name, None))
            if hasattr(value, "__dict__") and type(value).__module__ not in ("_thread", "threading"):
                visit((*path, "vars"), vars(value))

    for name, module in model.named_modules():
        visit((name,), module)
        for cls in type(module).__mro__:
            if cls.__module__ == __name__:
                of_class = {k: v for k, v in vars(cls).items() if isinstance(v, (int, dict, list)) and k[0] != "_"}
                for k, v in of_class.items():
                    visit((name, cls.__name__, k), v)
    for name, tensor in model.state_dict().items():
        found.append((name, "state dict", Bits(tensor.detach().clone() if isinstance(tensor, torch.Tensor) else None)))
    visit(("file",), GLOBAL_TABLES)
    found.append((("random",), random.getstate(), repr(np.random.get_state()), Bits(torch.get_rng_state())))
    found.append(alive)  # so that ids stay unique
    return found


class Bits:
    """A tensor that is equal to one with the same bits."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __eq__(self, other):
        a, b = self.tensor, other.tensor
        if a is None or b is None:
            return a is b
        same = a.shape == b.shape and a.dtype == b.dtype
        return same and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))

    __hash__ = None


def changed(before, after):
    """The first thing that isn't what it was, None if all is."""
    for a, b in itertools.zip_longest(before[:-1], after[:-1]):
        if a != b:
            return a, b
    return None


def half(partition):
    rng = np.random.default_rng(0)
    return PruningPlan({a.name: np.sort(rng.permutation(a.size)[: (a.size + 1) // 2]) for a in partition.axes})


def leftovers(memory):
    return [entry for entry in memory[:-1] if entry[1] in (Size, FakeTensor)]


HEARS_NOISE = {"old_spectral_norm", "new_spectral_norm"}  # a norm over all of a weight hears what goes into it


@pytest.mark.parametrize("name", SITUATIONS)
def test_what_is_cut_is_exact_and_the_analysis_leaves_no_trace(name):
    zigs, modes = SITUATIONS[name].zigs, SITUATIONS[name].modes
    model, inputs = made(name)
    before = memory_of(model)
    partition = partition_zigs(model, inputs)
    assert changed(before, memory_of(model)) is None
    assert sorted(axis.size for axis in partition.axes) == sorted(zigs), partition.pinned
    plan = half(partition)
    if zigs:
        assert certify(model, resolve(partition, plan), inputs).holds
        assert name in HEARS_NOISE or check_zero_invariance(model, partition, inputs) < 1e-9
        assert changed(before, memory_of(model)) is None
    for mode in modes:
        full = outputs(*made(name), mode)
        zeroed, _ = made(name)
        partition.zero_(zeroed, plan)
        quiet = outputs(zeroed, inputs, mode)
        if mode != "eval":  # in eval mode it is the one that was analysed
            model, _ = made(name)
        partition.zero_(model, plan)
        count = sum(p.numel() for p in model.parameters())
        assert compact(model, partition, plan) is model
        small = outputs(model, inputs, mode)
        assert distance(quiet, small) < TOLERANCE
        assert not leftovers(memory_of(model))
        for layer in model.modules():  # said right after compact; a weight that a hook computes is new by now
            if isinstance(layer, nn.Linear):
                assert (layer.out_features, layer.in_features) == tuple(layer.weight.shape)
        if zigs:  # negative control: what was cut mattered
            assert sum(p.numel() for p in model.parameters()) < count
            assert distance(full, small) > EFFECT


class Stop(BaseException):
    """What Ctrl-C raises, but never by accident."""


def at_call(k, error):
    """A context in which the k-th call of any module raises, and the list of all calls."""
    calls = []

    def hook(module, args):
        calls.append(type(module))
        if len(calls) == k:
            raise error

    return nn.modules.module.register_module_forward_pre_hook(hook), calls


def number_of_calls(analyse):
    hook, calls = at_call(0, None)
    with hook:
        analyse()
    return len(calls)


@pytest.mark.parametrize("name", SITUATIONS)
def test_an_interrupted_analysis_leaves_no_trace(name):
    """Interrupted in the first call of a module, in the last, and in between; others may do the same exhaustively."""
    model, inputs = made(name)
    count = number_of_calls(lambda: partition_zigs(model, inputs))
    before = memory_of(model)
    for k in sorted({1, count // 3, 2 * count // 3, count} - {0}):
        hook, _ = at_call(k, Stop())
        with hook, pytest.raises(Stop):
            partition_zigs(model, inputs)
        assert changed(before, memory_of(model)) is None, f"call {k} of {count}"


FEW = [
    "a_frozen_batch_norm",
    "counters_everywhere",
    "old_spectral_norm",
    "a_memory_bank_written_in_eval_mode",
]


@pytest.mark.parametrize("name", FEW)
def test_an_interrupt_at_any_call_leaves_no_trace(name):
    model, inputs = made(name)
    partition = partition_zigs(model, inputs)
    cut = resolve(partition, half(partition))
    before = memory_of(model)
    for analyse in (
        lambda: partition_zigs(model, inputs),
        lambda: check_zero_invariance(model, partition, inputs),
        lambda: certify(model, cut, inputs),
    ):
        count = number_of_calls(analyse)
        for k in range(1, count + 1):
            hook, _ = at_call(k, Stop())
            with hook, pytest.raises(Stop):
                analyse()
            assert changed(before, memory_of(model)) is None, f"call {k} of {count}"


def test_a_signal_while_something_is_put_back_leaves_no_trace(monkeypatch, request):
    """The signal arrives in the middle of every single undo, and of every cut that is put on."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it may be ignored
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, handler))
    model, inputs = made("old_spectral_norm")
    partition = partition_zigs(model, inputs)
    cut = resolve(partition, half(partition))
    before, is_same = memory_of(model), restore._is_same
    seen, at = [0], [0]

    def interrupted(*args):
        seen[0] += 1
        if seen[0] == at[0]:
            signal.raise_signal(signal.SIGINT)
        return is_same(*args)

    monkeypatch.setattr(restore, "_is_same", interrupted)
    certify(model, cut, inputs)
    count = seen[0]
    for k in range(1, count + 1, 7):
        seen[0], at[0] = 0, k
        with pytest.raises(KeyboardInterrupt):
            certify(model, cut, inputs)
        assert changed(before, memory_of(model)) is None, f"undo {k} of {count}"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError("no memory"),
        np._core._exceptions._ArrayMemoryError((1, 2), np.dtype(float)),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_runs_out_is_never_an_answer(error):
    """At whatever call: it is raised with advice, the model is as it was, and no axis is pinned for it."""
    model, inputs = made("checkpointed")
    count = number_of_calls(lambda: partition_zigs(model, inputs))
    before = memory_of(model)
    for k in range(1, count + 1):
        hook, _ = at_call(k, error)
        with hook, pytest.raises((torch.OutOfMemoryError, MemoryError, RuntimeError), match="smaller batch"):
            partition_zigs(model, inputs)
        assert changed(before, memory_of(model)) is None, f"call {k} of {count}"


def test_any_other_error_may_be_an_answer():
    """Negative control: what isn't memory is taken for a model that can't run so, and found out or pinned."""
    model, inputs = made("checkpointed")
    count = number_of_calls(lambda: partition_zigs(model, inputs))
    sizes = []
    for k in range(1, count + 1):
        hook, _ = at_call(k, RuntimeError("something else"))
        with hook:
            sizes.append(len(partition_zigs(model, inputs).axes))
    assert 3 in sizes


# errors -----------------------------------------------------------------------------------------------


class Returns(Net):
    """Returns what a function makes of its logits and of its hidden state."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        h = torch.relu(self.up(x))
        return self.function(self.down(h), h)


class Opaque:
    pass


def generator(y, h):
    yield y


def nested(y, h):
    return torch.nested.nested_tensor([y], layout=torch.jagged)


def lazy():
    model = Net()
    model.down = nn.LazyLinear(3)
    return model


def partly_on_meta():
    model = Net()
    model.down.to("meta")
    return model


class Random(Net):
    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def mid(self, h):
        return h * (1 + self.draw())


REFUSED = {
    "an object": (lambda: Returns(lambda y, h: Opaque()), "Opaque"),
    "a number": (lambda: Returns(lambda y, h: float(y.sum())), "float"),
    "nothing": (lambda: Returns(lambda y, h: None), "NoneType"),
    "a generator": (lambda: Returns(generator), "generator"),
    "ids alone": (lambda: Returns(lambda y, h: y.argmax(-1)), "no floating-point tensor"),
    "NaN alone": (lambda: Returns(lambda y, h: y * torch.nan), "NaN or infinity"),
    "a nested tensor": (
        lambda: Returns(lambda y, h: torch.nested.nested_tensor([y], layout=torch.jagged)),
        "nested tensors",
    ),
    "lazy weights": (lazy, "no shape yet: call the model once"),
    "half of it on meta": (partly_on_meta, "2 of 4 weights of Net are on the meta device, down.weight"),
    "random by itself": (lambda: Random(lambda: int.from_bytes(os.urandom(2), "big") / 2**16), "gives other outputs"),
    "the system's random": (lambda: Random(random.SystemRandom().random), "gives other outputs"),
    "the time": (lambda: Random(time.perf_counter), "gives other outputs"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_certified_is_refused_by_name(name):
    build, says = REFUSED[name]
    model = build()
    with pytest.raises(OTOError, match=says):
        partition_zigs(model, {"x": waves(4, 6)})


@pytest.mark.parametrize(
    "draw", [np.random.rand, random.random, lambda: torch.rand(())], ids=["numpy", "python", "torch"]
)
def test_random_numbers_that_can_be_seeded_are_fine(draw):
    """Negative control of the refusals, and of those that follow."""
    assert [axis.size for axis in partition_zigs(Random(draw), {"x": waves(4, 6)}).axes] == [16]


def test_inputs_that_cannot_be_used_twice_are_refused():
    class Sum(Net):
        def forward(self, xs):
            return super().forward(sum(xs))

    assert partition_zigs(Sum(), {"xs": [waves(4, 6)]}).axes
    with pytest.raises(ValueError, match="list_iterator, which can be read once only"):
        partition_zigs(Sum(), {"xs": iter([waves(4, 6)])})


def test_inputs_without_values_are_refused_where_weights_have_some():
    with pytest.raises(OTOError, match="pass inputs with values"):
        partition_zigs(Net(), {"x": waves(4, 6).to("meta")})
    assert partition_zigs(Net().to("meta"), {"x": waves(4, 6).to("meta")}).axes


def test_a_model_that_runs_once_only_is_refused():
    class Once(Net):
        def forward(self, x):
            next(self.data)
            return super().forward(x)

    model = Once()
    for count, refused in ((100, False), (3, True)):  # the first is the negative control
        model.data = iter([None] * count)
        if refused:
            with pytest.raises(OTOError, match="nothing cut out"):
                partition_zigs(model, {"x": waves(4, 6)})
        else:
            assert partition_zigs(model, {"x": waves(4, 6)}).axes


# what never ran ---------------------------------------------------------------------------------------


class Later(Net):
    """A part that reads `function` of the hidden state runs only once it is switched on."""

    def __init__(self, width, function):
        super().__init__()
        self.later, self.function, self.on = nn.Linear(width, 3), function, False

    def mid(self, h):
        self.seen = self.later(self.function(h)) if self.on else None
        return h


def test_a_part_that_never_ran_keeps_its_width():
    """One that reads the width itself protects it, or up to four states side by side. One that reads more of them does
    not: switched on after the cut it is an error of shapes, never a wrong number."""
    x = {"x": waves(4, 6)}
    assert not partition_zigs(Later(16, lambda h: h), x).axes
    assert not partition_zigs(Later(32, lambda h: torch.cat([h, h], -1)), x).axes
    model = Later(80, lambda h: torch.cat([h] * 5, -1))
    partition = partition_zigs(model, x)
    assert [axis.size for axis in partition.axes] == [16]
    compact(model, partition, half(partition))
    model.on = True
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(**x)
    model = Later(32, lambda h: torch.cat([h, h], -1))
    model.on = True
    partition = partition_zigs(model, x)
    compact(model, partition, half(partition))(**x)  # what runs is cut along


# threads, signals, large things -----------------------------------------------------------------------


def test_another_thread_may_partition():
    """Signals belong to the main thread, hooks and modes to all: the partition is the same."""
    expected = partition_zigs(*made("encoder_and_decoder")).to_dict()
    found = []
    thread = threading.Thread(target=lambda: found.append(partition_zigs(*made("encoder_and_decoder")).to_dict()))
    thread.start()
    thread.join()
    assert found == [expected]


def test_other_models_may_run_meanwhile():
    expected = partition_zigs(*made("encoder_and_decoder"))
    other, inputs = made("checkpointed")
    stop, errors = threading.Event(), []

    def run():
        try:
            while not stop.is_set():
                other(**inputs)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        found = [partition_zigs(*made("encoder_and_decoder")) for _ in range(3)]
    finally:
        stop.set()
        thread.join()
    assert not errors
    assert all(p.to_dict() == expected.to_dict() and p.pinned == expected.pinned for p in found)


@pytest.mark.parametrize("kind", ["list", "tuple", "dict", "dicts", "set"])
def test_large_containers_cost_about_nothing(kind):
    n = 200_000
    large = {
        "list": lambda: list(range(n)),
        "tuple": lambda: tuple(range(n)),
        "dict": lambda: {str(i): i for i in range(n)},
        "dicts": lambda: [{"a": 1} for _ in range(n)],
        "set": lambda: set(range(n)),
    }
    model = Net()
    model.data = large[kind]()
    start = time.process_time()
    partition = partition_zigs(model, {"x": waves(4, 6)})
    assert time.process_time() - start < 3  # 0.3 here; entered or tagged one by one it would be 1.5 for a list
    assert len(partition.axes) == 1


def test_nothing_of_the_analysis_lives_on():
    """Wherever it may hide, no stand-in of a tensor or of a size is left once the partition is gone."""
    kept = [made(name) for name in SITUATIONS]
    before = alive()
    for model, inputs in kept:
        partition_zigs(model, inputs)
    assert alive() == before
    kept[0][0].hidden = Size(3, ("const", 3), [])  # negative control
    assert alive() == before + 1


def alive():
    gc.collect()
    return sum(type(o) in (Size, FakeTensor) for o in gc.get_objects())


def test_the_memory_of_a_model_sees_every_change():
    """Negative control of `memory_of`."""
    model, _ = made("counters_everywhere")
    seen = []
    model.up.register_forward_hook(lambda *_: seen.append(0))
    changes = [
        lambda: model.up.weight.data.__setitem__((0, 0), 7.0),
        lambda: setattr(model.up, "weight", nn.Parameter(model.up.weight.detach().clone())),
        lambda: model.eval(),
        lambda: setattr(model, "calls", np.int64(0)),
        lambda: setattr(model.space.inner, "width", 17),
        lambda: setattr(model.slots, "calls", 1),
        lambda: setattr(model.list[0], "calls", 1),
        lambda: model.recent.append(1),
        lambda: model.array.__setitem__(0, 1),
        lambda: setattr(type(model), "total", 1),
        lambda: type(model).shapes.update(a=1),
        lambda: seen.append(1),
        lambda: GLOBAL_TABLES.update(a=1),
        lambda: random.random(),
        lambda: np.random.rand(),
        lambda: torch.rand(()),
    ]
    for i, change in enumerate(changes):
        before = memory_of(model)
        assert changed(before, memory_of(model)) is None
        change()
        assert changed(before, memory_of(model)) is not None, i
