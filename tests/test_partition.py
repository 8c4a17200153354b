"""The partition: every ZIG is invariant, and the same however the model is looked at; whatever stays has a reason."""

import contextlib
import copy
import dataclasses
import functools
import io
import json
import logging
import random
import re
import tokenize
from collections import Counter
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers as tf
from models import TABLE, make, randomise_, waves
from torch import nn

import hf_oto
import hf_oto.partition
import hf_oto.rules
from hf_oto import DHSPG, PruningPlan, check_zero_invariance, compact, partition_zigs
from hf_oto.batches import make_inputs
from hf_oto.calls import Forward
from hf_oto.cut import resolve
from hf_oto.differences import largest_difference
from hf_oto.modeling_oto import OTOError
from hf_oto.report import macs

SWITCHES_ATTENTION = ["vit", "swin", "bert", "distilbert", "gpt2", "llama", "whisper", "clip"]


def layout(partition):
    """Axes and pinned dimensions as plain data: what has to be the same."""
    axes = [{k: v for k, v in axis.items() if k != "macs"} for axis in partition.to_dict()["axes"]]  # of the batch
    return axes, partition.pinned.keys()


def axis_of(partition, parameter, dim=0):
    return next(axis for axis in partition.axes if any((m.param, m.dim) == (parameter, dim) for m in axis.members))


def edited(partition, edit):
    """The partition with `edit(axis)` for the members of every axis."""
    return dataclasses.replace(
        partition, axes=tuple(dataclasses.replace(axis, members=tuple(edit(axis))) for axis in partition.axes)
    )


def misordered(axis):
    """Consumers read from the position before theirs."""
    for m in axis.members:
        shifted = np.roll(m.positions(axis.size), 1, axis=0)
        yield dataclasses.replace(m, index=shifted) if m.role == "consumer" else m


# the certificate


def test_zero_zigs_are_invisible(case, draw_plan):
    for seed in range(2):
        plan = draw_plan(case.partition, seed)
        assert check_zero_invariance(case.model, case.partition, case.inputs, plan) <= 1e-9


def test_the_certificate_sees_consumers_out_of_order(case, draw_plan):
    wrong = edited(case.partition, misordered)
    assert check_zero_invariance(case.model, wrong, case.inputs, draw_plan(wrong)) > 1e-3


@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        ("vit", "fc1.bias"),
        ("gpt2", "c_fc.bias"),
        ("llama", "up_proj.weight"),
        ("whisper", "v_proj.bias"),
        ("dense", "norm.bias"),
        ("grouped_conv", "grouped.bias"),
        ("group_norm", "norm.bias"),
        ("multi_query", "o.weight"),
    ],
)
def test_the_certificate_sees_a_member_left_out(name, parameter, draw_plan):
    model, inputs = make(name), TABLE[name].inputs(2)
    partition = partition_zigs(model, inputs)
    wrong = edited(partition, lambda axis: [m for m in axis.members if not m.param.endswith(parameter)])
    if name == "multi_query":  # zero queries attend all the same: the consumer's columns are what silences them
        wrong = dataclasses.replace(partition, axes=(dataclasses.replace(partition.axes[0], zero_path=True),))
    if name == "llama":  # silu(0) * up: zero gates silence a unit as well
        wrong = edited(wrong, lambda axis: [m for m in axis.members if not m.param.endswith("gate_proj.weight")])
    assert wrong != partition
    assert check_zero_invariance(model, wrong, inputs, draw_plan(partition)) > 1e-3


# what is found


def test_axes_are_those_of_the_table(case):
    assert Counter((axis.kind, axis.size) for axis in case.partition.axes) == TABLE[case.name].axes
    assert case.partition.num_zigs == sum(axis.size for axis in case.partition.axes)
    names = [axis.name for axis in case.partition.axes]
    assert len(set(names)) == len(names)


def test_heads_go_whole_and_not_head_dim():
    partition = partition_zigs(make("gpt2"), TABLE["gpt2"].inputs(2))
    axis = axis_of(partition, "transformer.h.0.attn.c_attn.weight", 1)
    (fused,) = [m for m in axis.members if m.param.endswith("c_attn.weight")]
    assert (axis.kind, axis.size, fused.start, fused.outer, fused.inner) == ("heads", 4, 0, 3, 8)


def test_a_kv_group_takes_the_queries_it_serves():
    partition = partition_zigs(make("llama"), TABLE["llama"].inputs(2))
    axis = axis_of(partition, "model.layers.1.self_attn.k_proj.weight")
    rows = {m.param.split(".")[-2]: m.positions(axis.size).shape for m in axis.members}
    assert axis.kind == "kv_groups"
    assert rows == {"q_proj": (2, 16), "k_proj": (2, 4), "v_proj": (2, 4), "o_proj": (2, 16)}


def test_slices_of_a_norm_belong_to_their_producers():
    partition = partition_zigs(make("dense"), TABLE["dense"].inputs(2))
    axis = axis_of(partition, "grow.1.weight")
    members = {(m.param, m.dim, m.start, m.role) for m in axis.members}
    assert {("norm.weight", 0, 10, "producer"), ("norms.2.running_var", 0, 10, "statistic")} < members
    assert {("grow.2.weight", 1, 10, "consumer"), ("head.weight", 1, 10, "consumer")} < members


@pytest.mark.parametrize(("name", "zero_path"), [("multi_query", False), ("sigmoid", False), ("gated", True)])
def test_consumers_join_where_zero_producers_are_not_silent(name, zero_path):
    (axis,) = partition_zigs(make(name), TABLE[name].inputs(2)).axes
    assert axis.zero_path is zero_path
    assert any(m.role == "consumer" for m in axis.group) is not zero_path


def test_every_dimension_is_a_member_or_pinned(case):
    covered = {
        f"{m.param}[{m.dim}]" for axis in case.partition.axes for m in axis.members
    } | case.partition.pinned.keys()
    for name, p in case.model.named_parameters():
        for dim, n in enumerate(p.shape):
            assert n == 1 or f"{name}[{dim}]" in covered
    assert all(reason.strip() for reason in case.partition.pinned.values())


def test_no_position_belongs_to_two_zigs(case):
    shapes = {name: t.shape for name, t in case.partition.tensors(case.model).items()}
    taken = {}
    for axis in case.partition.axes:
        for m in axis.members:
            mine = m.positions(axis.size).reshape(-1)
            free = taken.setdefault((m.param, m.dim), np.ones(shapes[m.param][m.dim], bool))
            assert free[mine].all() and len(np.unique(mine)) == len(mine)
            free[mine] = False
    for (param, dim), free in taken.items():
        assert free.any() == (f"{param}[{dim}]" in case.partition.pinned) or "running" in param


# the same however it is looked at


def test_a_real_forward_gives_the_same(case, monkeypatch):
    monkeypatch.setattr(hf_oto.partition, "trace", functools.partial(hf_oto.partition.trace, fake=False))
    assert layout(partition_zigs(case.model, case.inputs)) == layout(case.partition)


def test_no_weights_give_the_same(case):
    with torch.device("meta"):
        empty = TABLE[case.name].build("sdpa").to("meta")
    partition = partition_zigs(empty, case.inputs)
    assert layout(partition) == layout(case.partition)
    assert partition.pinned == case.partition.pinned
    assert all(p.is_meta for p in empty.parameters())


@pytest.mark.parametrize("batch", [1, 3])
def test_any_batch_size_gives_the_same(case, batch):
    assert layout(partition_zigs(case.model, TABLE[case.name].inputs(batch))) == layout(case.partition)


@pytest.mark.parametrize("name", SWITCHES_ATTENTION)
def test_any_attention_gives_the_same(name):
    inputs = TABLE[name].inputs(2)
    sdpa, eager = make(name, "sdpa"), make(name, "eager")
    assert (sdpa.config._attn_implementation, eager.config._attn_implementation) == ("sdpa", "eager")
    assert layout(partition_zigs(sdpa, inputs)) == layout(partition_zigs(eager, inputs))


def test_equal_view_chains_give_the_same():
    """The same function of the same weights, the heads split off in different ways."""

    class Net(nn.Module):
        def __init__(self, split):
            super().__init__()
            self.heads, self.split = 4, split
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x):
            h = self.split(self.up(x), self.heads)  # (b, n, heads, 8)
            return self.down((h * h.square().sum(-1, keepdim=True).relu()).flatten(2))

    chains = [
        lambda h, heads: h.view(*h.shape[:2], heads, -1),
        lambda h, heads: h.unflatten(-1, (heads, -1)),
        lambda h, heads: torch.stack(h.chunk(4, -1), 2) if heads is None else h.unflatten(-1, (-1, 2, 4)).flatten(-2),
        lambda h, heads: h.transpose(0, 2).reshape(heads, -1, *h.shape[1::-1]).permute(3, 2, 0, 1),
        lambda h, heads: h.flip(-1).flip(-1).reshape(h.shape[0], -1, heads, h.shape[-1] // heads),
    ]
    found = [partition_zigs(randomise_(Net(chain)), {"x": waves(2, 7, 16)}) for chain in chains]
    assert [axis.size for axis in found[0].axes] == [4]
    assert all(layout(partition) == layout(found[0]) for partition in found)


@pytest.mark.parametrize("form", ["mean", "constant"])
def test_a_size_read_in_the_forward_pins_with_and_without_weights(form):
    """A number that is the width, not an index: it would be another one after a cut."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(16, 12), nn.Linear(12, 16)

        def forward(self, x):
            h = self.up(x).relu()
            scale = h.shape[-1] if form == "mean" else torch.tensor(h.size(-1), dtype=h.dtype).sqrt()
            return self.down(h / scale)

    net = randomise_(Net())
    for model in (net, copy.deepcopy(net).to("meta")):
        partition = partition_zigs(model, {"x": waves(2, 7, 16)})
        assert not partition.axes
        assert partition.pinned["up.weight[0]"]


# what the caller says


def test_protected_parameters_are_pinned():
    model, inputs = make("vit"), TABLE["vit"].inputs(2)
    partition = partition_zigs(model, inputs, protect=[r"layers\.0\.", "v_proj"])
    assert [axis.name for axis in partition.axes] == ["vit.layers.1.mlp.fc1.weight[0]"]
    assert partition.pinned["vit.layers.0.mlp.fc1.bias[0]"] == "protected by the caller"
    of_module = partition_zigs(model, inputs, protect=[r"layers\.0$", r"attention$"])  # of no parameter the whole name
    assert [axis.name for axis in of_module.axes] == ["vit.layers.1.mlp.fc1.weight[0]"]
    assert partition_zigs(model, inputs, protect="").axes == ()  # the pattern that matches all


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"'encodr' matches no parameter .* for example 'vit\."):
        partition_zigs(make("vit"), TABLE["vit"].inputs(2), protect=["layers", "encodr"])


def test_a_batch_by_name_by_position_or_alone_is_the_same():
    model, x = randomise_(Heads(nn.Conv2d(3, 5, 7))), waves(2, 7, 16)
    expected = layout(partition_zigs(model, {"x": x}))
    for inputs in (x, (x,), [x], [(x,), {"x": x}], [Forward(args=(x,))]):
        assert layout(partition_zigs(model, inputs)) == expected
    for wrong, message in (
        ("x", "hold a str: pass the arguments"),
        ([], "is empty"),
        ([[x]], "hold a list"),
    ):
        with pytest.raises(ValueError, match=message):
            partition_zigs(model, wrong)


@pytest.mark.parametrize("batch", [{"x": torch.zeros(2, 7, 15)}, {"y": torch.zeros(2, 7, 15)}])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_batch_the_model_cannot_take_is_named(batch, device):
    with pytest.raises(OTOError, match=r"MultiQuery can't take the batch \{'[xy]': \(2, 7, 15\)\}"):
        partition_zigs(make("multi_query").to(device), batch)


def test_no_batch_can_be_made_for_a_plain_module():
    with pytest.raises(OTOError, match=r"batch for Dense .* pass inputs"):
        partition_zigs(make("dense"))


# what is not understood


class TwoLayers(nn.Module):
    """Two hidden layers, each with a function of the test's own in it."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.up = nn.ModuleList(nn.Linear(16, 12) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(12, 16) for _ in range(2))
        self.spare = nn.Linear(5, 3)
        self.free = nn.Linear(16, 10)
        self.last = nn.Linear(10, 16)

    def forward(self, x):
        for up, down in zip(self.up, self.down, strict=True):
            x = down(self.function(up(x)))
        return self.last(self.free(x).relu())


WITHOUT_UNITS = ["down.0.weight[0]", "down.1.weight[0]", "free.weight[0]"]


@torch.library.custom_op("hf_oto_tests::backwards", mutates_args=())
def backwards(x: torch.Tensor) -> torch.Tensor:
    return x.flip(-1)


@backwards.register_fake
def _(x):
    return torch.empty_like(x)


def messages(caplog, text):
    return [record.getMessage() for record in caplog.records if text in record.getMessage()]


def test_an_unknown_op_pins_and_says_so_once(caplog):
    with caplog.at_level(logging.INFO, "hf_oto"):
        partition = partition_zigs(randomise_(TwoLayers(lambda x: backwards(x))), {"x": waves(2, 7, 16)})
    assert [axis.name for axis in partition.axes] == WITHOUT_UNITS
    for name in ("up.0.weight[0]", "up.1.weight[0]", "up.1.bias[0]"):
        assert "backwards has no rule" in partition.pinned[name]
    assert "down.1.weight[1]" in partition.pinned
    assert len(messages(caplog, "backwards")) == 1


def test_a_rule_that_fails_pins_and_says_so_once(caplog, monkeypatch):
    def broken(s, call):
        raise KeyError("oops")

    monkeypatch.setitem(hf_oto.rules.RULES, "tanh", broken)
    with caplog.at_level(logging.INFO, "hf_oto"):
        partition = partition_zigs(randomise_(TwoLayers(torch.tanh)), {"x": waves(2, 7, 16)})
    assert [axis.name for axis in partition.axes] == WITHOUT_UNITS
    assert "up.0.weight[0]" in partition.pinned and "down.1.weight[1]" in partition.pinned
    (message,) = messages(caplog, "tanh")
    assert "oops" in message


def test_a_rule_that_gives_the_wrong_shape_pins(monkeypatch):
    monkeypatch.setitem(hf_oto.rules.RULES, "tanh", lambda s, call: [s.of(call.args[0])[:-1]])
    partition = partition_zigs(randomise_(TwoLayers(torch.tanh)), {"x": waves(2, 7, 16)})
    assert [axis.name for axis in partition.axes] == WITHOUT_UNITS


def unseen(*_):
    """A rehearsal that sees no difference."""


@pytest.mark.parametrize(
    ("op", "wrong", "function"),
    [
        ("flip", lambda s, call: [s.of(call.args[0])], lambda x: x.flip(-1) * x),
        ("_softmax", hf_oto.rules.elementwise.elementwise, lambda x: x.softmax(-1)),
    ],
    ids=["flip", "softmax"],
)
def test_a_rule_that_is_wrong_is_caught_in_rehearsal(op, wrong, function, monkeypatch):
    """Negative control of the rules themselves: the rehearsal compares the cut model with the zeroed one."""
    model, inputs = randomise_(TwoLayers(function)), {"x": waves(2, 7, 16)}
    monkeypatch.setitem(hf_oto.rules.RULES, op, wrong)
    partition = partition_zigs(model, inputs)
    assert [axis.name for axis in partition.axes] == WITHOUT_UNITS
    assert "in rehearsal" in partition.pinned["up.0.weight[0]"]
    for module in ("attempts", "partition"):  # control: unseen, the rule offers the units
        monkeypatch.setattr(f"hf_oto.{module}.differs", unseen)
    assert "up.0.weight[0]" in [axis.name for axis in partition_zigs(model, inputs).axes]


def test_when_several_families_fail_only_these_are_pinned(monkeypatch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            for name in "abc":
                setattr(self, name, nn.Linear(16, 12))
                setattr(self, f"{name}2", nn.Linear(12, 16))

        def forward(self, x):
            for up, down in ((self.a, self.a2), (self.b, self.b2)):
                h = up(x)
                x = down(h * h.flip(-1))
            return self.c2(self.c(x).relu())

    monkeypatch.setitem(hf_oto.rules.RULES, "flip", lambda s, call: [s.of(call.args[0])])
    partition = partition_zigs(randomise_(Net()), {"x": waves(2, 7, 16)})
    pinned = {name: why for name, why in partition.pinned.items() if "in rehearsal" in why}
    assert pinned.keys() == {f"{n}.{leaf}" for n in "ab" for leaf in ("weight[0]", "bias[0]")} | {
        "a2.weight[1]", "b2.weight[1]",
    }  # fmt: skip
    assert not any("some positions" in why for why in pinned.values())
    assert {axis.name for axis in partition.axes} == {"a2.weight[0]", "b2.weight[0]", "c.weight[0]"}


def test_what_the_forward_never_uses_is_pinned():
    model = randomise_(TwoLayers(torch.relu))
    partition = partition_zigs(model, {"x": waves(2, 7, 16)})
    assert len(partition.axes) == 5
    assert {partition.pinned[f"spare.{name}"] for name in ("weight[0]", "weight[1]", "bias[0]")} == {
        "the traced forward never used it"
    }


class Heads(nn.Module):
    """A trunk, a head that is used, and something that no batch has used so far."""

    def __init__(self, unused):
        super().__init__()
        self.up, self.mid, self.down = nn.Linear(16, 12), nn.Linear(12, 10), nn.Linear(10, 16)
        self.unused = unused

    def forward(self, x):
        return self.down(self.mid(self.up(x).relu()).relu())


@pytest.mark.parametrize(
    ("unused", "left"),
    [
        (nn.Linear(12, 3), {10}),  # may read the first hidden layer
        (nn.Linear(5, 10), {12}),  # may add to the second
        (nn.ModuleList([nn.Linear(12, 4), nn.Linear(10, 4)]), set()),
        (nn.ModuleDict({"task": nn.Sequential(nn.Linear(10, 7), nn.Linear(7, 3))}), {12}),
        (nn.Parameter(torch.ones(12)), {10}),
        (nn.Linear(24, 3), {10}),  # may read two of the first side by side: mean and maximum
        (nn.Linear(40, 3), {12}),  # or u, v, |u - v|, u * v
        (nn.Linear(66, 3), {12, 10}),  # control: a multiple of neither
        (nn.Linear(120, 3), {12, 10}),  # and of both, but of more than anybody puts side by side
        (nn.Conv2d(3, 5, 7), {12, 10}),  # control: has no width in common
    ],
)
def test_what_an_unused_head_may_read_is_pinned(unused, left):
    partition = partition_zigs(randomise_(Heads(unused)), {"x": waves(2, 7, 16)})
    assert {axis.size for axis in partition.axes} == left
    for name, size in (("up", 12), ("mid", 10)):
        assert ("which never ran, may read it" in partition.pinned.get(f"{name}.weight[0]", "")) is (size not in left)


def test_inner_widths_of_an_unused_part_pin_nothing_deep_inside_others():
    """An unused tower meets what its parent has in hand, not the hidden layers of another tower."""

    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = (nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8)) for _ in range(2))
            self.head = nn.Linear(8, 3)

        def forward(self, x, y=None):
            return self.head(self.one(x) if y is None else self.one(x) + self.two(y))

    model, x = randomise_(Towers()), waves(2, 16)
    assert {axis.size for axis in partition_zigs(model, {"x": x}).axes} == {12}
    assert {axis.size for axis in partition_zigs(model, {"x": x, "y": x}).axes} == {12, 8}
    assert {axis.size for axis in partition_zigs(model, [{"x": x}, {"x": x, "y": x}]).axes} == {12, 8}


def test_one_attribute_for_two_sizes_is_pinned():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.width = 12
            self.up = nn.ModuleList(nn.Linear(16, 12) for _ in range(2))
            self.down = nn.ModuleList(nn.Linear(12, 16) for _ in range(2))

        def forward(self, x):
            for up, down in zip(self.up, self.down, strict=True):
                x = down(up(x).relu().view(-1, self.width)).view(x.shape)
            return x

    partition = partition_zigs(randomise_(Net()), {"x": waves(2, 7, 16)})
    assert not partition.axes
    assert "a size used in forward can't follow it" in partition.pinned["up.0.weight[0]"]


# manners


def frozen_view(model):
    attributes = {
        (path, name): (type(value), str(value))
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, (int, float, str, list, tuple, bool, type(None)))
    }
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    config = getattr(model, "config", None)
    return attributes, hooks, config and config.to_dict(), type(model)


@contextlib.contextmanager
def random_state_kept():
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    yield
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]


def test_the_model_stays_untouched(case):
    model = copy.deepcopy(case.model).train()
    next(iter(model.children())).eval()
    next(iter(model.parameters())).requires_grad_(False)
    tensors = {n: (t, t.clone(), t.requires_grad) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    training, before = [m.training for m in model.modules()], frozen_view(model)
    with random_state_kept():
        partition_zigs(model, case.inputs)
    check_zero_invariance(model, case.partition, case.inputs)
    assert frozen_view(model) == before
    assert [m.training for m in model.modules()] == training
    after = dict([*model.named_parameters(), *model.named_buffers()])
    assert tensors.keys() == after.keys()
    for name, (t, copied, requires_grad) in tensors.items():
        assert after[name] is t and t.requires_grad is requires_grad and t.grad is None
        assert torch.equal(t, copied)
    assert all(type(v) in (int, bool) for m in model.modules() for v in vars(m).values() if isinstance(v, int))


class Recurrent(TwoLayers):
    """Keeps its state for the next call."""

    state: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.state = x if self.state is None else self.state + x
        return super().forward(self.state)


def test_a_forward_leaves_no_state_behind():
    model, x = Recurrent(torch.relu), torch.randn(2, 16)
    partition = partition_zigs(model, {"x": x})
    check_zero_invariance(model, partition, {"x": x})
    assert model.state is None
    assert torch.equal(model(x), TwoLayers.forward(model, x))
    assert model.state is x  # control: outside, it does keep it


def test_hooks_that_the_first_forward_installs_stay():
    """Transformers records hidden states by hooks, put there once: the mark that they are must outlast the trace."""
    model, inputs = make("bert").eval(), TABLE["bert"].inputs(2) | {"output_hidden_states": True}
    partition_zigs(model, inputs)
    assert len(model(**inputs).hidden_states) == len(make("bert").eval()(**inputs).hidden_states) > 1


def test_a_failing_trace_puts_everything_back():
    model = make("bert")
    before = frozen_view(model)
    with pytest.raises(OTOError):
        partition_zigs(model, {"input_ids": torch.zeros(2, 99, dtype=torch.long)})
    assert frozen_view(model) == before
    assert not torch.nn.modules.module._global_forward_hooks


def test_partitioning_twice_gives_the_same(case):
    assert partition_zigs(case.model, case.inputs).to_dict() == case.partition.to_dict()


def test_the_table_can_be_read(case):
    table = str(case.partition)
    head, *lines = table.splitlines()
    assert head == f"{len(case.partition.axes)} prunable axes, {case.partition.num_zigs:,} ZIGs"
    assert all(any(axis.kind in line for line in lines) for axis in case.partition.axes)
    assert all(len(line) < 400 for line in lines)


def test_the_partition_as_plain_data(case):
    data = case.partition.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert [axis["size"] for axis in data["axes"]] == [axis.size for axis in case.partition.axes]


def test_params_count_what_a_zig_takes(case):
    for axis in case.partition.axes:
        first = PruningPlan({axis.name: range(1, axis.size)})
        marked = {n: torch.zeros(p.shape, dtype=torch.bool) for n, p in case.model.named_parameters()}
        for _, m, index in case.partition.slices(first.removed(case.partition)):
            if m.param in marked:
                marked[m.param].index_fill_(m.dim, torch.from_numpy(index), True)
        overlap = {m.param for m in axis.members if sum(o.param == m.param for o in axis.members) > 1}
        if not overlap:
            assert sum(int(mask.sum()) for mask in marked.values()) == axis.params


def test_macs_count_what_a_zig_takes(case):
    dense = macs(case.model, case.inputs)
    assert case.partition.work.left(np.zeros(len(case.partition.axes))) == dense > 0
    for axis in case.partition.axes[:6]:
        small = copy.deepcopy(case.model)
        compact(small, case.partition, PruningPlan({axis.name: range(axis.multiple, axis.size)}))
        assert dense - macs(small, case.inputs) == pytest.approx(axis.multiple * axis.macs, abs=1)


def test_what_a_plan_leaves_is_known_before_the_cut(case, draw_plan):
    plan = draw_plan(case.partition, 3)
    removed = resolve(case.partition, plan).removed
    gone = np.array([part.sum() for _, part in case.partition.split(removed)])
    params = case.partition.params(case.model)
    small = compact(copy.deepcopy(case.model), case.partition, plan)
    assert params.left(gone) == sum(p.numel() for p in small.parameters())
    assert case.partition.work.left(gone) == pytest.approx(macs(small, case.inputs), rel=1e-9)
    assert params.left(gone) < params.left(0 * gone) == sum(p.numel() for p in case.model.parameters())


ARCHITECTURES = """albert bart beit bert bloom blip convbert convnext deberta deit detr distilbert efficientnet electra
    falcon gemma gpt gptj hubert llama longformer marian mistral mixtral mobilenet mobilevit mpt opt pegasus phi qwen
    regnet resnet roberta segformer starcoder swin t5 timesformer umt5 vit wav2vec whisper xlm xlnet""".split()


def code_of(text):
    """The tokens of a source file without comments and docstrings."""
    previous = tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        starts_line = previous in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.NL)
        if token.type != tokenize.COMMENT and not (token.type == tokenize.STRING and starts_line):
            yield token
        previous = token.type if token.type != tokenize.COMMENT else previous


def architectures_in(text):
    named = re.compile(rf"(?<![a-z])({'|'.join(ARCHITECTURES)})(?![a-z])", re.IGNORECASE)
    spaced = [re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=\d)(?=[A-Za-z])", " ", token.string) for token in code_of(text)]
    return [name for token in spaced for name in named.findall(token)]


@pytest.mark.parametrize("path", sorted(Path(hf_oto.__file__).parent.glob("*.py")), ids=lambda path: path.name)
def test_no_line_names_an_architecture(path):
    assert architectures_in(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line", ["ok = type(m).__name__ == 'BertModel'", "x = gpt2_heads", "from a import T5Attention"]
)
def test_the_search_for_architectures_finds_them(line):
    assert architectures_in(line)
    assert not architectures_in(f'"""{line}"""\n# {line}\n')


# models as users have them


@pytest.mark.parametrize("name", ["bert", "vit", "clip", "whisper", "wav2vec2", "t5", "mixtral"])
def test_a_batch_made_from_the_config_gives_the_same(name):
    """Both towers of CLIP, encoder and decoder of Whisper: nobody has to say what the forward takes."""
    model = make(name).eval()
    expected = layout(partition_zigs(model, TABLE[name].inputs(2)))
    assert layout(partition_zigs(model)) == expected
    assert layout(partition_zigs(model.to(torch.bfloat16))) == expected


TEXT = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "pad_token_id": 0}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
VISION = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 20, "image_size": 16, "patch_size": 8}


def llava() -> nn.Module:
    """As many image tokens in the text as the image has patches."""
    vision = tf.CLIPVisionConfig(**VISION, num_hidden_layers=2)
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(vision_config=vision, text_config=tf.LlamaConfig(**TEXT), image_token_index=50)
    )


def smolvlm() -> nn.Module:
    """Several images for every text."""
    text = tf.LlamaConfig(**TEXT)
    vision = VISION | {"num_hidden_layers": 1}
    return tf.SmolVLMForConditionalGeneration(
        tf.SmolVLMConfig(vision_config=vision, text_config=text, image_token_id=50, scale_factor=2)
    )


def qwen_vl() -> nn.Module:
    """Images as a list of patches and a grid."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 4, "intermediate_size": 20, "out_hidden_size": 32}
    config = tf.Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_parameters": rope}, vision_config=vision | {"patch_size": 4}, image_token_id=50,
        video_token_id=51, vision_start_token_id=52, vision_end_token_id=53,
    )  # fmt: skip
    return tf.Qwen2_5_VLForConditionalGeneration(config)


@pytest.mark.parametrize("build", [llava, smolvlm, qwen_vl])
def test_images_find_their_places_in_the_text(build):
    """Models that read image tokens in the ids get as many as their images have features: both towers are offered."""
    model = randomise_(build()).eval()
    units = {axis.size for axis in partition_zigs(model).axes if axis.kind == "units"}
    assert {20, 24} <= units  # of the vision tower and of the language model
    text = next(batch for batch in make_inputs(model) if len(batch) == 1)
    units = {axis.size for axis in partition_zigs(model, text).axes if axis.kind == "units"}
    assert 24 in units and 20 not in units  # control: of a text alone the vision tower never runs


@pytest.mark.parametrize("name", ["bert", "llama", "mixtral"])
def test_low_precision_and_checkpointing_give_the_same(name):
    model, inputs = make(name).eval(), TABLE[name].inputs(2)
    expected = layout(partition_zigs(model, inputs))
    model.activation_checkpointing_enable()
    model.train()
    assert layout(partition_zigs(model, inputs)) == expected
    assert model.training
    assert layout(partition_zigs(model.to(torch.bfloat16), inputs)) == expected


def test_labels_are_welcome():
    model, inputs = make("bert"), TABLE["bert"].inputs(2)
    assert layout(partition_zigs(model, inputs | {"labels": inputs["input_ids"]})) == layout(
        partition_zigs(model, inputs)
    )


def adapted():
    """A model with adapters on its queries, values and up projections, none of them zero."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"])
    return randomise_(peft.get_peft_model(make("llama"), config)).eval()


def test_adapters_are_cut_along(draw_plan, outputs, difference):
    model, inputs = adapted(), TABLE["llama"].inputs(2)
    partition = partition_zigs(model, inputs)
    sizes = Counter((axis.kind, axis.size) for axis in partition.axes)
    base = {("units", 32): 1, ("kv_groups", 2): 2, ("units", 24): 2}
    assert sizes == base | {("units", 4): 6}  # the adapters' ranks
    axis = axis_of(partition, "base_model.model.model.layers.0.mlp.up_proj.base_layer.weight")
    members = {(m.param.split(".", 5)[-1], m.role) for m in axis.members}
    assert ("mlp.up_proj.lora_B.default.weight", "producer") in members
    plan = draw_plan(partition)
    partition.zero_(model, plan)
    zeroed = outputs(model, inputs)
    compact(model, partition, plan)
    assert difference(zeroed, outputs(model, inputs)) <= 1e-5
    merged = model.merge_and_unload()
    assert difference(zeroed, outputs(merged, inputs)) <= 1e-5


def test_a_frozen_base_is_left_alone_and_said_so(caplog):
    model, inputs = adapted(), TABLE["llama"].inputs(2)
    partition = partition_zigs(model, inputs)
    with caplog.at_level(logging.WARNING, "hf_oto"):
        optimizer = DHSPG(model, partition, total_steps=100)
    assert "5 axes are not pruned, because some of their parameters are frozen" in caplog.text
    assert optimizer.num_zigs == 6 * 4
    model.requires_grad_(True)
    assert DHSPG(model, partition, total_steps=100).num_zigs == partition.num_zigs


@pytest.mark.parametrize(("reader", "offered"), [("parameter", True), ("buffer", False), ("exp", False)])
def test_a_reader_that_cannot_be_zero_pins_what_is_not_zero(reader, offered):
    """sigmoid(0) is 1/2: the reader has to be zero, as a buffer or exp(weight) never is; with weights or without."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(16, 12), nn.Linear(12, 16, bias=False)
            self.register_buffer("fixed", waves(12, 16))

        def forward(self, x):
            down = {"parameter": self.down.weight.T, "buffer": self.fixed, "exp": self.down.weight.T.exp()}[reader]
            return self.up(x).sigmoid() @ down

    net = randomise_(Net())
    for model in (net, copy.deepcopy(net).to("meta")):
        assert bool(partition_zigs(model, {"x": waves(2, 7, 16)}).axes) is offered


def test_a_small_loss_is_measured_on_the_scale_of_the_logits():
    """The loss of a confident model shows rounding a hundredfold; control: logits that do differ."""
    logits = torch.tensor([[20.0, 5.0, -3.0]])
    loss = torch.tensor(3e-3)
    moved = [loss + 2e-6, logits + 2e-6]
    assert largest_difference([loss, logits], moved) < 1e-5 < largest_difference([loss], moved[:1])
    assert largest_difference([loss, logits], [loss, logits + 1e-3]) > 1e-5
