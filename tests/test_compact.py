"""Zeros cut out change nothing: a compact model computes what the full one does with the same ZIGs zeroed."""

import contextlib
import copy
import dataclasses
import gc
import logging
import weakref

import numpy as np
import pytest
import torch
from models import TABLE, Gated, GatedConfig, hidden, make, randomise_, waves
from torch import nn
from transformers import PreTrainedModel

import hf_oto.partition
import hf_oto.restore
from hf_oto import PruningPlan, compact, partition_zigs, to_dense
from hf_oto.calls import tensors_of
from hf_oto.certificate import certify
from hf_oto.compaction import Compaction
from hf_oto.cut import TrialCut, cut_, resolve
from hf_oto.layers import own_sizes
from hf_oto.modeling_oto import OTOError
from hf_oto.report import measure
from hf_oto.sizes import Equation, Sizes

TOLERANCE = 1e-5


@pytest.fixture
def pruned(case, draw_plan, outputs):
    """The model with a plan's ZIGs zeroed, the plan, and the outputs it then has."""
    model, plan = copy.deepcopy(case.model), draw_plan(case.partition)
    case.partition.zero_(model, plan)
    return model, plan, outputs(model, case.inputs)


def cut_part(model, partition, plan, attributes=None):
    """Cuts with attributes other than those that were solved for."""
    cut = resolve(partition, plan)
    cut_(model, cut if attributes is None else cut._replace(attributes=attributes))
    return model


# the law and its negative controls


def test_a_compact_model_is_the_zeroed_one(case, pruned, outputs, difference):
    model, plan, zeroed = pruned
    before = sum(p.numel() for p in model.parameters())
    assert compact(model, case.partition, plan) is model
    assert difference(zeroed, outputs(model, case.inputs)) <= TOLERANCE
    assert difference(outputs(case.model, case.inputs), zeroed) > 1e-3
    lost = sum(axis.params * int(gone.sum()) for axis, gone in case.partition.split(plan.removed(case.partition)))
    assert before - lost <= sum(p.numel() for p in model.parameters()) < before


def test_cutting_the_wrong_consumers_shows(case, pruned, outputs, difference):
    model, plan, zeroed = pruned
    axes = []
    for axis in case.partition.axes:
        members = [
            dataclasses.replace(m, index=np.roll(m.positions(axis.size), 1, 0)) if m.role == "consumer" else m
            for m in axis.members
        ]
        axes.append(dataclasses.replace(axis, members=tuple(members)))
    compact(model, dataclasses.replace(case.partition, axes=tuple(axes)), plan)
    assert difference(zeroed, outputs(model, case.inputs)) > 1e-3


def test_cutting_without_the_sizes_shows(case, pruned, outputs, difference):
    model, plan, zeroed = pruned
    attributes = resolve(case.partition, plan).attributes
    if not attributes:
        assert difference(zeroed, outputs(cut_part(model, case.partition, plan, {}), case.inputs)) <= TOLERANCE
        return
    for left_out in attributes:  # every one of them matters
        rest = {a: v for a, v in attributes.items() if a != left_out}
        small = cut_part(copy.deepcopy(model), case.partition, plan, rest)
        if left_out[1] in own_sizes(small.get_submodule(left_out[0])):  # those are read off the weight anyway
            continue
        try:
            assert difference(zeroed, outputs(small, case.inputs)) > 1e-3
        except (RuntimeError, ValueError):
            continue  # it can't run at all


# sizes


def test_layers_know_their_sizes(case, pruned):
    model, plan, _ = pruned
    compact(model, case.partition, plan)
    for module, before in zip(model.modules(), case.model.modules(), strict=True):
        expected = {}
        if isinstance(module, nn.Linear):
            expected = dict(zip(("out_features", "in_features"), module.weight.shape, strict=True))
        elif isinstance(module, nn.Conv2d):
            out, per_group = module.weight.shape[:2]
            expected = {"out_channels": out, "in_channels": per_group * module.groups}
        elif isinstance(module, nn.BatchNorm2d):
            expected = {"num_features": len(module.running_mean)}
        elif isinstance(module, nn.GroupNorm):
            each = before.num_channels // before.num_groups
            expected = {"num_channels": len(module.weight), "num_groups": len(module.weight) // each}
        elif isinstance(module, nn.Embedding):
            expected = dict(zip(("num_embeddings", "embedding_dim"), module.weight.shape, strict=True))
        for name, size in expected.items():
            assert getattr(module, name) == size
    assert all(type(v) in (int, bool) for m in model.modules() for v in vars(m).values() if isinstance(v, int))


def cut_heads(name, kept):
    model, inputs = make(name), TABLE[name].inputs(2)
    partition = partition_zigs(model, inputs)
    axes = [axis for axis in partition.axes if axis.kind in ("heads", "kv_groups")]
    return compact(model, partition, PruningPlan(dict(zip((axis.name for axis in axes), kept, strict=True))))


def test_sizes_that_modules_keep_follow_each_layer():
    blocks = cut_heads("gpt2", [[1], [0, 2, 3]]).transformer.h
    assert [(b.attn.split_size, b.attn.head_dim, b.attn.embed_dim) for b in blocks] == [(8, 8, 32), (24, 8, 32)]
    assert [(b.attn.c_attn.nf, b.attn.c_proj.nx, b.attn.c_proj.nf) for b in blocks] == [(24, 8, 32), (72, 24, 32)]
    attention = cut_heads("llama", [[1], [0]]).model.layers[0].self_attn
    assert (attention.num_key_value_groups, attention.head_dim) == (4, 4)
    assert (attention.q_proj.out_features, attention.k_proj.out_features) == (16, 4)
    model = cut_heads("whisper", [[0, 2, 3], [1], [2, 3]]).model
    layers = [
        model.encoder.layers[0].self_attn,
        model.decoder.layers[0].self_attn,
        model.decoder.layers[0].encoder_attn,
    ]
    assert [(a.num_heads, a.q_proj.out_features, a.out_proj.in_features) for a in layers] == [
        (3, 24, 24),
        (1, 8, 8),
        (2, 16, 16),
    ]


def test_tied_parameters_stay_tied(case, pruned):
    model, plan, _ = pruned
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    unique = [n for n, _ in model.named_parameters()]
    compact(model, case.partition, plan)
    assert [n for n, _ in model.named_parameters(remove_duplicate=False)] == names
    assert [n for n, _ in model.named_parameters()] == unique


def test_tied_weights_are_cut_as_one(outputs, difference):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ModuleList(nn.Linear(16, 12, bias=i == 1) for i in range(2))
            self.down = nn.ModuleList(nn.Linear(12, 16) for _ in range(2))
            self.up[1].weight = self.up[0].weight

        def forward(self, x):
            for up, down in zip(self.up, self.down, strict=True):
                x = x + down(up(x).relu())
            return x

    model, inputs = randomise_(Net()), hidden(2)
    partition = partition_zigs(model, inputs)
    (axis,) = partition.axes
    assert {m.param for m in axis.members} == {"up.0.weight", "up.1.bias", "down.0.weight", "down.1.weight"}
    plan = PruningPlan({axis.name: [1, 5, 11]})
    partition.zero_(model, plan)
    zeroed = outputs(model, inputs)
    compact(model, partition, plan)
    assert difference(zeroed, outputs(model, inputs)) <= TOLERANCE
    assert model.up[0].weight is model.up[1].weight
    assert [(up.weight.shape, up.out_features) for up in model.up] == [((3, 16), 3)] * 2


def test_frozen_weights_stay_frozen_and_the_rest_trains(case, pruned):
    model, plan, _ = pruned
    flags = {name: i % 3 != 0 for i, (name, _) in enumerate(model.named_parameters())}
    for name, p in model.named_parameters():
        p.requires_grad_(flags[name])
    compact(model.train(), case.partition, plan)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(module.training for module in model.modules())
    assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in model.parameters())
    tensors_of(model(**case.inputs))[0].square().sum().backward()
    with_grad = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_grad and all(flags[name] for name in with_grad)


# plans


def test_a_plan_survives_json_and_zeros(case, pruned):
    model, plan, _ = pruned
    assert PruningPlan.from_json(plan.to_json()) == plan
    assert PruningPlan.from_zeros(model, case.partition) == plan
    assert PruningPlan.from_zeros(case.model, case.partition).kept == {}


def test_an_axis_of_zeros_keeps_one():
    model, inputs = make("sigmoid"), hidden(2)
    partition = partition_zigs(model, inputs)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    plan = PruningPlan.from_zeros(model, partition)
    assert plan.kept == {"up.weight[0]": (0,)}
    assert compact(model, partition, plan).up.out_features == 1


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"up.weight[1]": [0]}, r"names 'up.weight\[1\]', which is no axis"),
        ({"up.weight[0]": [0, 12]}, r"outside \[0, 12\) of axis 'up.weight\[0\]'"),
        ({"up.weight[0]": [-1, 3]}, r"outside \[0, 12\)"),
        ({"up.weight[0]": [3, 4, 3]}, "repeats an index of axis"),
        ({"up.weight[0]": []}, "empties axis .* at least one of its 12 ZIGs must stay"),
        ({"up.weight[0]": [0.5, 1.7]}, r"up.weight\[0\]: .* as whole numbers, not float64"),
        ({"up.weight[0]": [True] * 12}, "as whole numbers, not bool"),
    ],
)
def test_a_plan_that_does_not_fit_is_an_error(kept, message):
    model, inputs = make("gated"), hidden(2)
    partition, before = partition_zigs(model, inputs), copy.deepcopy(model.state_dict())
    for use in (compact, lambda m, p, plan: p.zero_(m, plan), lambda m, p, plan: plan.removed(p)):
        with pytest.raises(ValueError, match=message):
            use(model, partition, PruningPlan(kept))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert type(model) is Gated


def test_the_order_of_a_plan_means_nothing(outputs):
    small = []
    for kept in ([1, 4, 9], [9, 1, 4]):
        model = make("gated")
        small.append(compact(model, partition_zigs(model, hidden(2)), PruningPlan({"up.weight[0]": kept})))
    assert torch.equal(*[outputs(model, hidden(2))[0] for model in small])


def test_a_plan_that_keeps_all_changes_nothing(case, outputs):
    model = copy.deepcopy(case.model)
    everything = {axis.name: range(axis.size) for axis in case.partition.axes}
    for plan in (PruningPlan({}), PruningPlan(everything)):
        assert compact(model, case.partition, plan) is model
    assert type(model) is type(case.model)
    for a, b in zip(outputs(case.model, case.inputs), outputs(model, case.inputs), strict=True):
        assert torch.equal(a, b)


def test_a_partition_serves_one_cut(case, pruned, draw_plan, outputs):
    model, plan, _ = pruned
    compact(model, case.partition, plan)
    small = outputs(model, case.inputs)
    for again in (plan, PruningPlan({})):
        with pytest.raises(OTOError, match="compacted already"):
            compact(model, case.partition, again)
    assert all(torch.equal(a, b) for a, b in zip(small, outputs(model, case.inputs), strict=True))


def test_a_partition_of_another_model_is_an_error():
    partition = partition_zigs(make("gated"), hidden(2))
    with pytest.raises(OTOError, match=r"no parameter 'kv|no parameter 'down|made for another model"):
        compact(nn.Linear(16, 24), partition, PruningPlan({"up.weight[0]": [0]}))


# sizes that contradict each other


class Shared(nn.Module):
    """One attribute for the width of two layers."""

    def __init__(self, width):
        super().__init__()
        self.width = width
        self.up = nn.ModuleList(nn.Linear(16, width) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(width, 16) for _ in range(2))
        self.free = nn.Linear(16, 12)
        self.last = nn.Linear(12, 16)

    def forward(self, x):
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(up(x).relu().view(-1, self.width)).view(x.shape)
        return self.last(self.free(x).relu())


def test_sizes_that_contradict_each_other_leave_zeros(outputs, difference, caplog):
    """Random cuts of axes of two leave one of each, so the partition offers axes that other plans cut unequally."""
    model, inputs = randomise_(Shared(2)), hidden(2)
    partition = partition_zigs(model, inputs)
    assert [axis.size for axis in partition.axes] == [2, 2, 12]
    plan = PruningPlan({"up.0.weight[0]": [1], "free.weight[0]": [0, 3, 7]})
    partition.zero_(model, plan)
    zeroed = outputs(model, inputs)
    with caplog.at_level(logging.WARNING, "hf_oto"):
        compact(model, partition, plan)
    assert "1 ZIGs stay as zeros" in caplog.text
    assert difference(zeroed, outputs(model, inputs)) <= TOLERANCE
    assert (model.width, model.up[0].out_features, model.free.out_features) == (2, 2, 3)
    assert not model.up[0].weight[0].any()


def test_sizes_that_agree_are_cut(outputs, difference):
    model, inputs = randomise_(Shared(2)), hidden(2)
    partition = partition_zigs(model, inputs)
    plan = PruningPlan({"up.0.weight[0]": [1], "up.1.weight[0]": [0]})
    partition.zero_(model, plan)
    zeroed = outputs(model, inputs)
    compact(model, partition, plan)
    assert difference(zeroed, outputs(model, inputs)) <= TOLERANCE
    assert (model.width, model.up[0].out_features, model.up[1].out_features) == (1, 1, 1)


def test_sizes_solve_what_the_code_computes():
    """x.view(heads, width), 4 heads of 6: without a head there are 3, and the width that still fits stays."""
    heads, width = ("attribute", "attn", "heads", None), ("attribute", "attn", "width", None)
    zig = np.arange(4)
    spans = {(0, 0): (zig, np.full(6, -1)), (1, 0): (zig,)}
    equations = [
        Equation(heads, ("span", 1, 0, 0, 4), "attn"),
        Equation(("*", heads, width), ("span", 0, 0, 0, 24), "attn"),
        Equation(("+", heads, ("const", 1)), ("const", 7), "false on the untouched model"),
    ]
    removed = np.array([False, True, False, False])
    sizes = Sizes(equations, spans, {heads[1:]: 4, width[1:]: 6})
    assert sizes.solve(removed) == ({heads[1:]: 3}, [])
    assert sizes.solve(np.zeros(4, bool)) == ({}, [])
    fixed = Equation(heads, ("const", 4), "mlp")
    _, conflicts = Sizes([*equations, fixed], spans, sizes.values).solve(removed)
    assert conflicts == Sizes(equations, spans, sizes.values).equations  # what speaks of the cut gives way


def test_sizes_never_grow_or_vanish():
    """Here 7 minus the heads that stay would grow, and these minus 3 would vanish: both contradict the cut."""
    pad, zig = ("attribute", "attn", "pad", None), np.arange(4)
    heads, spans = ("span", 0, 0, 0, 4), {(0, 0): (zig,)}
    removed = np.array([False, True, False, False])
    for expression, before, after in (
        (("-", ("const", 7), heads), 3, None),
        (("-", heads, ("const", 3)), 1, None),
        (("-", heads, ("const", 2)), 2, 1),  # negative control
    ):
        sizes = Sizes([Equation(pad, expression, "attn")], spans, {pad[1:]: before})
        assert sizes.solve(removed) == (({pad[1:]: after}, []) if after else ({}, sizes.equations))


class Branches(nn.Module):
    """Code that asks how wide it is, and does something else where it is narrower."""

    def __init__(self, asks):
        super().__init__()
        self.asks, self.up, self.down = asks, nn.Linear(16, 8), nn.Linear(8, 16)

    def forward(self, x):
        h = self.up(x).relu()
        return self.down(2 * h if self.asks(self, h) else h)


ASKS = {
    "wide": lambda net, h: h.shape[-1] > 3,
    "narrow": lambda net, h: 6 > h.shape[-1],
    "just so": lambda net, h: net.up.out_features == 8,
    "wide layer": lambda net, h: net.up.out_features > 3,
    "wide reader": lambda net, h: net.down.in_features > 3,
    "long weight": lambda net, h: len(net.up.weight) > 3,
    "many elements": lambda net, h: net.up.weight.numel() > 50,
    "not so": lambda net, h: h.size(-1) != 5,
    "even": lambda net, h: h.shape[-1] % 2 == 0,
    "in a table": lambda net, h: {8: True}.get(h.shape[-1], False),
    "as wide": lambda net, h: h.shape[-1] == net.down.in_features,  # and so it stays
}


def cut_to_every_width(asks, outputs, difference):
    """How far the compact model is from the zeroed one at most, and how many units were cut in all."""
    worst, cuts, inputs = 0.0, 0, hidden(2)
    partition = partition_zigs(randomise_(Branches(asks)), inputs)
    for axis in partition.axes:
        for kept in range(1, 8):
            model, plan = randomise_(Branches(asks)), PruningPlan({axis.name: range(kept)})
            partition.zero_(model, plan)
            zeroed = outputs(model, inputs)
            compact(model, partition, plan)
            cuts += 8 - model.up.out_features
            worst = max(worst, difference(zeroed, outputs(model, inputs)))
    return worst, cuts


def unseen(*_):
    """A rehearsal that sees no difference."""


@pytest.mark.parametrize("name", ASKS)
def test_no_cut_takes_another_branch(name, outputs, difference, monkeypatch):
    worst, cuts = cut_to_every_width(ASKS[name], outputs, difference)
    assert worst <= TOLERANCE
    assert (cuts == sum(range(8))) is (name == "as wide")  # of the others some stay as zeros, or all are pinned
    monkeypatch.setattr(Sizes, "solve", lambda *_: ({}, []))  # control: sizes that nobody compares
    for module in ("attempts", "partition"):  # and no rehearsal, which sees some of them
        monkeypatch.setattr(f"hf_oto.{module}.differs", unseen)
    worst, _ = cut_to_every_width(ASKS[name], outputs, difference)
    assert (worst > 1e-3) is (name != "as wide")


# put on, taken off, kept


class Broken(Exception):
    """Raised by a test."""


def kept_by(model):
    """Everything that the modules keep: names, identities and contents."""
    tensors = [(n, id(t), t.clone()) for n, t in [*model.named_parameters(), *model.named_buffers()]]
    attributes = [
        (path, name, id(value), repr(value) if isinstance(value, (int, list, tuple)) else None)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
    ]
    return tensors, attributes


def unchanged(before, after):
    same = all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(before[0], after[0], strict=True))
    return same and before[1] == after[1]


@pytest.mark.parametrize("raised", [None, Broken, KeyboardInterrupt])
def test_a_trial_cut_leaves_no_trace(case, pruned, outputs, difference, raised):
    model, plan, zeroed = pruned
    cut, before = resolve(case.partition, plan), kept_by(model)
    trial = TrialCut(model, cut)
    assert unchanged(before, kept_by(model))
    for _ in range(2):  # as often as it takes
        with pytest.raises(raised) if raised else contextlib.nullcontext(), trial as small:
            assert small is model
            assert difference(zeroed, outputs(model, case.inputs)) <= TOLERANCE
            assert not unchanged(before, kept_by(model))  # control
            if raised:
                raise raised
        assert unchanged(before, kept_by(model))
    assert difference(zeroed, outputs(model, case.inputs)) == 0


def test_a_cut_that_fails_halfway_is_taken_off(case, draw_plan, monkeypatch):
    model, cut = copy.deepcopy(case.model), resolve(case.partition, draw_plan(case.partition))
    before, places = kept_by(model), []

    def put(self, tensor, right=hf_oto.restore.Place.put):
        places.append(self)
        if len(places) == 3:
            raise Broken
        right(self, tensor)

    monkeypatch.setattr(hf_oto.restore.Place, "put", put)
    with pytest.raises(Broken):
        TrialCut(model, cut)
    assert unchanged(before, kept_by(model))


def test_compacting_never_holds_two_models(monkeypatch):
    """Tensor by tensor: the old one goes before the next new one comes."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(12)))
    partition = partition_zigs(model, {"input": torch.ones(1, 64)})
    cut = resolve(partition, PruningPlan({axis.name: range(32) for axis in partition.axes}))
    alive, most = weakref.WeakSet(model.parameters()), []

    def put(self, tensor, right=hf_oto.restore.Place.put):
        right(self, tensor)
        alive.add(tensor)
        most.append(sum(t.numel() for t in alive))

    whole = sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(hf_oto.restore.Place, "put", put)
    held = [*model.parameters()]
    with TrialCut(model, cut):  # control: with the old ones held, there are two
        pass
    assert max(most) > 1.2 * whole
    most.clear()
    del held
    gc.collect()
    compact(model, partition, PruningPlan({axis.name: range(32) for axis in partition.axes}))
    assert max(most) <= whole + 64 * 64


def test_what_stays_as_zeros_is_said_once(tmp_path, caplog):
    """A plan is resolved once in a run, and certificate, measurements, cut and figures all use the result."""
    model, inputs = randomise_(Shared(2)), hidden(2)
    partition = partition_zigs(model, inputs)
    with caplog.at_level(logging.WARNING, "hf_oto"):
        cut = resolve(partition, PruningPlan({"up.0.weight[0]": [1]}))
        certificate = certify(model, cut, inputs)
        measure(model, TrialCut(model, cut), inputs=inputs, seconds=0)
        Compaction(model, partition).keep_(model, cut)
    assert certificate.holds
    assert caplog.text.count("stay as zeros") == 1


# once more, and back


def twice(case, draw_plan, outputs):
    """The model after two cuts, and its outputs with all those ZIGs zeroed."""
    model, zeroed = copy.deepcopy(case.model), None
    for seed in (0, 1):
        partition = partition_zigs(model, case.inputs)
        plan = draw_plan(partition, seed)
        partition.zero_(model, plan)
        zeroed = outputs(model, case.inputs)
        compact(model, partition, plan)
    return model, zeroed


def test_a_compact_model_can_be_cut_again(case, draw_plan, outputs, difference):
    model, zeroed = twice(case, draw_plan, outputs)
    assert difference(zeroed, outputs(model, case.inputs)) <= TOLERANCE
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in case.model.parameters())


def test_compact_models_are_dense_again(case, pruned, draw_plan, outputs, difference):
    model, plan, zeroed = pruned
    compact(model, case.partition, plan)
    if not isinstance(model, PreTrainedModel):
        with pytest.raises(OTOError, match=f"this is a {type(model).__name__}"):
            to_dense(model)
        return
    for small, expected in ((model, zeroed), twice(case, draw_plan, outputs)):
        widths = {name: t.shape for name, t in small.state_dict().items()}
        dense = to_dense(small)
        assert type(dense) is type(case.model)
        assert not {"oto", "auto_map"} & vars(dense.config).keys()
        assert {n: t.shape for n, t in dense.state_dict().items()} == {
            n: t.shape for n, t in case.model.state_dict().items()
        }
        assert difference(expected, outputs(dense, case.inputs)) <= TOLERANCE
        assert {name: t.shape for name, t in small.state_dict().items()} == widths
        assert dense.training is small.training


def test_dense_zigs_are_zero():
    """Negative control of `to_dense`: the positions that were cut are zeros in the dense model, and no others are."""
    model, inputs = make("gated"), hidden(2)
    partition = partition_zigs(model, inputs)
    dense = to_dense(compact(model, partition, PruningPlan({"up.weight[0]": [2, 5, 6]})))
    plan = PruningPlan.from_zeros(dense, partition)
    assert plan.kept["up.weight[0]"] == (2, 5, 6)
    rows = dense.up.weight.detach().abs().sum(1).view(2, 12)
    assert torch.equal(rows[0] > 0, rows[1] > 0)


def test_a_stock_model_is_dense_already(outputs, difference):
    model = make("vit")
    assert difference(outputs(model, TABLE["vit"].inputs(2)), outputs(to_dense(model), TABLE["vit"].inputs(2))) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype, draw_plan, outputs, difference):
    model, inputs = make("llama").to(dtype), TABLE["llama"].inputs(2)
    partition = partition_zigs(model, inputs)
    assert len(partition.axes) == 5
    plan = draw_plan(partition)
    partition.zero_(model, plan)
    zeroed = outputs(model, inputs)
    compact(model, partition, plan)
    assert {p.dtype for p in model.parameters()} == {dtype}
    limit = 3 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)  # norms are computed in float32
    assert difference(zeroed, outputs(model, inputs)) <= 4 * limit
    assert difference(zeroed, outputs(to_dense(model), inputs)) <= 4 * limit


def test_a_model_without_weights_can_be_cut():
    with torch.device("meta"):
        model = Gated(GatedConfig())
    partition = partition_zigs(model, {"x": waves(2, 7, 16)})
    compact(model, partition, PruningPlan({"up.weight[0]": [0, 3]}))
    assert model.up.weight.is_meta and model.up.weight.shape == (4, 16)


def test_experts_keep_a_multiple_of_eight(outputs, difference):
    """The kernels of stacked experts want aligned rows: of 24 units 5 are asked for, 8 stay, three of them zero."""
    model, inputs = make("mixtral"), TABLE["mixtral"].inputs(2)
    partition = partition_zigs(model, inputs)
    (axis,) = [axis for axis in partition.axes if axis.multiple == 8 and axis.size == 24]
    plan = PruningPlan({axis.name: range(5)})
    partition.zero_(model, plan)
    zeroed = outputs(model, inputs)
    compact(model, partition, plan)
    assert model.model.layers[0].mlp.experts.down_proj.shape[-1] == 8
    assert difference(zeroed, outputs(model, inputs)) <= TOLERANCE
    kept = model.model.layers[0].mlp.experts.down_proj.shape[0]
    assert kept == 4  # the experts themselves stay
