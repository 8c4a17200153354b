"""A model that is cut several times is the model that is cut once, and so is the optimizer that trains it on."""

import copy
import itertools

import bitsandbytes
import numpy as np
import pytest
import torch
import torchao.optim
import transformers as tf
from models import TABLE, Gated, GatedConfig, Sigmoid, hidden, make, picture, randomise_
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

import hf_oto.compaction
import hf_oto.cut
import hf_oto.remaining
from hf_oto import DHSPG, OTOError, PruningPlan, compact, partition_zigs
from hf_oto.compaction import Compaction
from hf_oto.cut import grow_, resolve
from hf_oto.cut_state import cut_state_, why_uncuttable
from hf_oto.modeling_oto import is_compact, named_tensors, sizes_of
from hf_oto.remaining import partition_left
from hf_oto.report import macs
from hf_oto.zigs import Member

TOLERANCE = 1e-5


def zeros(model, compaction):
    """The plan that removes what is zero in the weights of a model, of the ZIGs that are left."""
    return PruningPlan.from_zeros(model, compaction.left)


def growing_plans(partition, seed=0, scaled_last=True):
    """Three plans, each of which removes what the one before does and more; half of every axis always stays.

    Args:
        scaled_last: whether the axes whose cut scales weights are in the last plan, or in none.
    """
    rng = np.random.default_rng(seed)
    plans = [{}, {}, {}]
    for axis in partition.axes:
        order = rng.permutation(axis.size)
        widths = np.sort(rng.integers((axis.size + 1) // 2, axis.size, size=3))[::-1]
        for number, width in enumerate(widths):
            may_go = not axis.scales or (scaled_last and number == 2)
            if may_go:
                plans[number][axis.name] = np.sort(order[:width])
    return [PruningPlan(kept) for kept in plans]


def cut_piecewise(model, partition, plans):
    """Cuts by one plan after the other."""
    compaction = Compaction(model, partition)
    for plan in plans:
        compaction.keep_(model, compaction.resolve(plan))
    return compaction


def sizes(model):
    return {path: sizes_of(module) for path, module in model.named_modules(remove_duplicate=False)}


def records(model):
    """Class name, architectures and record of every Transformers model in a model."""
    parts = [(path, part) for path, part in model.named_modules() if isinstance(part, PreTrainedModel)]
    return {p: (type(m).__name__, m.config.architectures, vars(m.config).get("oto")) for p, m in parts}


def classes(model):
    return [type(module) for module in model.modules()]


def ties(model):
    """The names of every tensor."""
    names = {}
    for name, tensor in named_tensors(model).items():
        names.setdefault(id(tensor), []).append(name)
    return list(names.values())


def values(model):
    return {name: tensor.detach().clone() for name, tensor in named_tensors(model).items()}


def are_equal(a, b):
    """Whether two models have equal tensors, bit by bit, as `values` gives them."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def shapes(model):
    return {name: tensor.shape for name, tensor in named_tensors(model).items()}


def differences(once, piecewise):
    """In what two models differ."""
    kinds = {"tensors": not are_equal(values(once), values(piecewise))}
    for kind in (sizes, records, ties, classes):
        kinds[kind.__name__] = kind(once) != kind(piecewise)
    return {kind for kind, differs in kinds.items() if differs}


def num_gone(partition, gone):
    return np.array([int(gone_of_axis.sum()) for _, gone_of_axis in partition.split(gone)])


def num_params(model):
    return sum(p.numel() for p in model.parameters())


class Wrapped(nn.Module):
    """A Transformers model inside another module, behind a layer that is cut too."""

    def __init__(self):
        super().__init__()
        self.first = Sigmoid()
        self.inner = Gated(GatedConfig())

    def forward(self, x):
        return self.inner(self.first(x))


class TiedUp(nn.Module):
    """Two layers share a weight, which has another name for each."""

    def __init__(self):
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(16, 12, bias=i == 1) for i in range(2))
        self.down = nn.ModuleList(nn.Linear(12, 16) for _ in range(2))
        self.up[1].weight = self.up[0].weight

    def forward(self, x):
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(up(x).relu())
        return x


class WeightNorms(nn.Module):
    """Three convolutions with weight norm: the direction of the second loses rows and columns."""

    def __init__(self):
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        widths = [3, 8, 8, 5]
        self.layers = nn.Sequential(*(norm(nn.Conv2d(a, b, 3)) for a, b in itertools.pairwise(widths)))

    def forward(self, x):
        first, second, third = self.layers
        return third(second(first(x).relu()).relu())


MORE = {"wrapped": (Wrapped, hidden), "tied up": (TiedUp, hidden), "weight norms": (WeightNorms, picture)}


@pytest.fixture(scope="module", params=MORE)
def other(request):
    """What no model of the table has: the model, a batch, and its partition."""
    cls, inputs_of = MORE[request.param]
    model, inputs = randomise_(cls()).eval(), inputs_of(2)
    return model, inputs, partition_zigs(model, inputs)


# cutting piecewise is cutting once -----------------------------------------------------------------


def check_piecewise(model, inputs, partition, outputs, difference, seed):
    plans = growing_plans(partition, seed)
    partition.zero_(model, plans[-1])
    zeroed = outputs(model, inputs)
    once, piecewise = copy.deepcopy(model), copy.deepcopy(model)
    compact(once, partition, plans[-1])
    compaction = cut_piecewise(piecewise, partition, plans)
    if any(axis.multiple > 1 for axis in partition.axes):
        # which zeros stay, to keep a multiple, differs: the first cut has chosen some that the last one would not
        assert shapes(once) == shapes(piecewise)
        assert differences(once, piecewise) <= {"tensors", "records"}
    else:
        assert differences(once, piecewise) == set()
        assert (compaction.gone == resolve(partition, plans[-1]).removed).all()
    small = outputs(piecewise, inputs)
    assert difference(zeroed, small) <= TOLERANCE
    assert difference(outputs(once, inputs), small) <= TOLERANCE
    # control: without the last cut, it is another model
    wider = copy.deepcopy(model)
    compact(wider, partition, plans[0])
    assert {"tensors", "sizes"} <= differences(wider, once) or num_params(wider) == num_params(once)
    assert num_params(once) < num_params(model)


@pytest.mark.parametrize("seed", range(2))
def test_cutting_piecewise_is_cutting_once(case, outputs, difference, seed):
    check_piecewise(copy.deepcopy(case.model), case.inputs, case.partition, outputs, difference, seed)


@pytest.mark.parametrize("seed", range(2))
def test_cutting_others_piecewise_is_cutting_once(other, outputs, difference, seed):
    model, inputs, partition = other
    check_piecewise(copy.deepcopy(model), inputs, partition, outputs, difference, seed)


WHAT_IS_HARD = {"mamba": "tied", "swapped": "indexed", "mixtral": "multiple", "llama": "scales", "bert": None}


@pytest.mark.parametrize("name", WHAT_IS_HARD)
def test_the_table_has_what_the_law_is_about(name):
    model = make(name).eval()
    partition = partition_zigs(model, TABLE[name].inputs(2))
    is_cut = {m.param for axis in partition.axes for m in axis.members}
    found = {"tied"} if any(len(names) > 1 and is_cut & set(names) for names in ties(model)) else set()
    for axis in partition.axes:
        found |= {"indexed"} if any(m.index is not None for m in axis.members) else set()
        found |= {"multiple"} if axis.multiple > 1 else set()
        found |= {"scales"} if axis.scales else set()
    expected = WHAT_IS_HARD[name]
    assert (expected in found) if expected else not found


@pytest.mark.parametrize("name", ["gated", "bert", "vit", "llama", "mixtral"])
def test_a_compact_model_is_cut_piecewise_too(name, draw_plan, outputs, difference):
    """Its record has two steps then: the one that it had, and one for all cuts since."""
    model, inputs = make(name).eval(), TABLE[name].inputs(2)
    partition = partition_zigs(model, inputs)
    compact(model, partition, draw_plan(partition))
    assert [cut["step"] for cut in model.config.oto["cuts"]] == [0] * len(model.config.oto["cuts"])
    again = partition_zigs(model, inputs)
    check_piecewise(copy.deepcopy(model), inputs, again, outputs, difference, 0)
    compaction = cut_piecewise(model, again, growing_plans(again, scaled_last=False))
    assert {cut["step"] for cut in model.config.oto["cuts"]} == {0, 1}
    compaction.undo_(model)
    assert {cut["step"] for cut in model.config.oto["cuts"]} == {0}


def test_a_record_of_every_cut_by_itself_shows(monkeypatch):
    model = make("gated").eval()
    partition = partition_zigs(model, hidden(2))
    plans = [PruningPlan({"up.weight[0]": range(n)}) for n in (10, 8, 6)]
    once, right, wrong = (copy.deepcopy(model) for _ in range(3))
    compact(once, partition, plans[-1])
    cut_piecewise(right, partition, plans)
    monkeypatch.setattr(hf_oto.compaction._Dense, "put_back_config_", lambda self, part: None)
    cut_piecewise(wrong, partition, plans)
    assert differences(once, right) == set()
    assert differences(once, wrong) == {"records"}


def test_positions_of_the_dense_model_show(monkeypatch, outputs, difference):
    """Control: the second cut takes what has the numbers of the dense model, which others have by then."""
    model, inputs = make("sigmoid").eval(), hidden(2)
    partition = partition_zigs(model, inputs)
    plans = [PruningPlan({"up.weight[0]": kept}) for kept in (range(2, 12), range(4, 12))]
    once, right, wrong = (copy.deepcopy(model) for _ in range(3))
    compact(once, partition, plans[-1])
    cut_piecewise(right, partition, plans)
    monkeypatch.setattr(hf_oto.remaining, "_member_left", lambda m, size, stays, _: stale(m, size, stays))
    cut_piecewise(wrong, partition, plans)
    assert differences(once, right) == set()
    assert differences(once, wrong) == {"tensors"}


def stale(member, size, stays):
    return Member.at(member.param, member.dim, member.role, member.positions(size)[stays])


@pytest.mark.parametrize("name", ["sigmoid", "gated"])
def test_what_is_gone_does_not_come_back(name):
    """Whatever a later plan says: here the first cut took 0 to 5, and the second plan keeps these alone."""
    model = make(name).eval()
    partition = partition_zigs(model, hidden(2))
    compaction = cut_piecewise(model, partition, [PruningPlan({"up.weight[0]": range(6, 12)})])
    assert not compaction.resolve(PruningPlan({})).removed.any()
    assert compaction.resolve(PruningPlan({"up.weight[0]": [0, 6, 7]})).removed.tolist() == [False] * 2 + [True] * 4
    # a plan that keeps only what is gone leaves one
    assert compaction.resolve(PruningPlan({"up.weight[0]": [0]})).removed.tolist() == [False] + [True] * 5
    before = values(model)
    compaction.keep_(model, compaction.resolve(PruningPlan({})))
    assert are_equal(before, values(model))


class Shared(nn.Module):
    """One attribute for the width of two layers, which loses ZIGs only where both do."""

    def __init__(self):
        super().__init__()
        self.width = 2
        self.up = nn.ModuleList(nn.Linear(16, 2) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(2, 16) for _ in range(2))

    def forward(self, x):
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(up(x).relu().view(-1, self.width)).view(x.shape)
        return x


def test_what_waits_for_another_axis_is_cut_with_it(outputs, difference):
    model, inputs = randomise_(Shared()).eval(), hidden(2)
    partition = partition_zigs(model, inputs)
    half = {"up.0.weight[0]": [1]}
    whole = half | {"up.1.weight[0]": [0]}
    partition.zero_(model, PruningPlan(whole))
    zeroed = outputs(model, inputs)
    compaction = Compaction(model, partition)
    for kept, width in ((half, 2), (whole, 1)):
        compaction.keep_(model, compaction.resolve(PruningPlan(kept), warn=False))
        assert (model.width, model.up[0].out_features) == (width, width)
        assert difference(zeroed, outputs(model, inputs)) <= TOLERANCE


def test_a_size_that_a_forward_sets_is_no_part_of_the_record(tmp_path):
    """A Swin whose last windows are as large as the image sets its shift to 0, in the first forward."""
    model, inputs = make("swin").eval(), TABLE["swin"].inputs(2)
    partition = partition_zigs(model, inputs)
    compaction, once = Compaction(model, partition), copy.deepcopy(model)
    before = sizes(model)
    model(**inputs)
    assert sizes(model) != before  # control
    for plan in growing_plans(partition):
        compaction.keep_(model, compaction.resolve(plan))
    compact(once, partition, growing_plans(partition)[-1])
    assert differences(once, model) == {"sizes"}
    model.save_pretrained(tmp_path)
    loaded = type(once)._oto_stock.from_pretrained(tmp_path)
    assert are_equal(values(model), values(loaded))


# plans and amounts ---------------------------------------------------------------------------------


def test_the_plan_is_in_the_weights(case):
    model = copy.deepcopy(case.model)
    plans = growing_plans(case.partition)
    case.partition.zero_(model, plans[-1])
    compaction = Compaction(model, case.partition)
    for plan in plans:
        assert compaction.plan(zeros(model, compaction)) == plans[-1]
        compaction.keep_(model, compaction.resolve(plan))
        assert compaction.plan(zeros(model, compaction)) == plans[-1]
    whole = compaction.whole_cut()
    one = resolve(case.partition, PruningPlan.removing(compaction.gone, case.partition))
    assert whole.attributes == one.attributes and whole.scales == one.scales
    assert (whole.removed == compaction.gone).all()
    # control: with the ZIGs that are left alive, the plan is what is gone
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert compaction.plan(zeros(model, compaction)) == PruningPlan.removing(compaction.gone, case.partition)


def test_what_is_left_is_counted_as_it_is_measured(case):
    model, partition = copy.deepcopy(case.model), case.partition
    params_before = partition.params(model)
    compaction = Compaction(model, partition)
    counts = []
    for plan in growing_plans(partition):
        compaction.keep_(model, compaction.resolve(plan))
        gone, nothing = num_gone(partition, compaction.gone), np.zeros(len(partition.axes))
        counted = [
            (compaction.left.params(model).left(nothing), compaction.left.work.left(nothing)),
            (params_before.left(gone), partition.work.left(gone)),
        ]
        measured = (num_params(model), macs(model, case.inputs))
        assert counted == [measured] * 2
        counts.append(measured)
    assert counts[-1][0] < num_params(case.model)  # control: they do get less
    assert counts[-1][1] < partition.work.left(np.zeros(len(partition.axes)))


def test_what_a_next_cut_saves_is_counted_beforehand(case):
    model = copy.deepcopy(case.model)
    *_, last_but_one, last = growing_plans(case.partition)
    compaction = cut_piecewise(model, case.partition, [last_but_one])
    left, cut = compaction.left, compaction.resolve(last)
    gone = num_gone(left, cut.removed)
    expected = (left.params(model).left(gone), left.work.left(gone))
    compaction.keep_(model, cut)
    assert expected == (num_params(model), macs(model, case.inputs))


# positions -----------------------------------------------------------------------------------------


def positions_by_labels(partition, gone, shapes_before):
    """For every axis and member, the positions of its ZIGs, (ZIGs left, k), in what is left of the tensors.

    Slow: every position of a dimension has a label for each member, which is cut as the tensor is.
    """
    lost = {}  # (tensor, dimension) -> positions that go
    for axis, gone_of_axis in partition.split(gone):
        for member in axis.members:
            for zig in np.flatnonzero(gone_of_axis):
                there = member.positions(axis.size)[zig].tolist()
                lost.setdefault((member.param, member.dim), set()).update(there)
    found = []
    for axis, gone_of_axis in partition.split(gone):
        for member in axis.members:
            labels = [None] * shapes_before[member.param][member.dim]
            for zig, positions in enumerate(member.positions(axis.size).tolist()):
                for number, position in enumerate(positions):
                    labels[position] = (zig, number)
            gone_here = lost.get((member.param, member.dim), set())
            labels = [label for position, label in enumerate(labels) if position not in gone_here]
            _, k = member.positions(axis.size).shape
            stay = np.flatnonzero(~gone_of_axis).tolist()
            found.append([[labels.index((zig, number)) for number in range(k)] for zig in stay])
    return found


def positions_of(partition):
    return [m.positions(axis.size).tolist() for axis in partition.axes for m in axis.members]


def check_positions(model, partition):
    shapes_before = shapes(model)
    gone = growing_plans(partition)[-1].removed(partition)
    left = partition_left(partition, gone)
    assert positions_of(left) == positions_by_labels(partition, gone, shapes_before)
    for before, after in zip(partition.axes, left.axes, strict=True):
        assert [(m.param, m.dim, m.role) for m in before.members] == [(m.param, m.dim, m.role) for m in after.members]
    assert partition_left(partition, np.zeros_like(gone)) is partition
    # control: as they were in the dense model, they are others
    before = [m.positions(axis.size)[~g].tolist() for axis, g in partition.split(gone) for m in axis.members]
    assert positions_of(left) != before
    # what is left of what is left
    order = np.random.default_rng(1).permutation(left.num_zigs)
    again = np.zeros(left.num_zigs, bool)
    again[order[: left.num_zigs // 4]] = True
    for _, again_of_axis in left.split(again):
        again_of_axis[0] = False
    both = gone.copy()
    both[~gone] = again
    assert positions_of(partition_left(left, again)) == positions_of(partition_left(partition, both))


def test_what_is_left_is_where_its_labels_are(case):
    check_positions(case.model, case.partition)


def test_what_is_left_of_others_is_where_its_labels_are(other):
    model, _, partition = other
    check_positions(model, partition)


# dense again ---------------------------------------------------------------------------------------


def statistics(partition, gone):
    """(tensor, dimension, positions that are gone) of all that may not be zero."""
    return [(m.param, m.dim, i) for _, m, i in partition.slices(gone) if m.role == "statistic"]


def check_undo(model, inputs, partition, outputs, difference):
    plans = growing_plans(partition, scaled_last=False)
    partition.zero_(model, plans[-1])
    zeroed = outputs(model, inputs)  # a forward may set sizes
    dense = copy.deepcopy(model)
    compaction = cut_piecewise(model, partition, plans)
    if not compaction.gone.any():
        pytest.skip("all its axes scale weights")
    gone = compaction.gone

    # for a moment
    before, small_sizes, small_records, small_shapes = values(model), sizes(model), records(model), shapes(model)
    trial = compaction.trial_dense(model)
    for _ in range(2):
        with trial as grown:
            assert grown is model
            assert shapes(grown) == shapes(dense) != small_shapes
            assert sizes(grown) == sizes(dense)
            assert ties(grown) == ties(dense)
            assert difference(zeroed, outputs(grown, inputs)) <= TOLERANCE
        assert are_equal(before, values(model))
        assert (sizes(model), records(model)) == (small_sizes, small_records)
        assert (compaction.gone == gone).all()

    # for good
    compaction.undo_(model)
    assert not compaction.gone.any()
    assert compaction.left is partition
    assert differences(dense, model) <= {"tensors"}
    assert shapes(dense) == shapes(model)
    assert difference(zeroed, outputs(model, inputs)) <= TOLERANCE
    tensors = named_tensors(model)
    for name, dim, positions in statistics(partition, gone):
        assert (tensors[name].index_select(dim, torch.from_numpy(positions)) != 0).all()
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in dense.parameters()]

    # and cut anew, it is the same small model
    compaction.keep_(model, compaction.resolve(plans[-1]))
    assert shapes(model) == small_shapes
    if not any(axis.multiple > 1 for axis in partition.axes):
        assert are_equal(before, values(model))
        assert records(model) == small_records


def test_a_cut_is_undone(case, outputs, difference):
    check_undo(copy.deepcopy(case.model), case.inputs, case.partition, outputs, difference)


def test_a_cut_of_others_is_undone(other, outputs, difference):
    model, inputs, partition = other
    check_undo(copy.deepcopy(model), inputs, partition, outputs, difference)


def test_some_models_have_statistics(case):
    """Otherwise the law above would say nothing of them."""
    if case.name in ("resnet_basic", "weight_norm", "detr", "mobilenet_v2"):
        assert statistics(case.partition, growing_plans(case.partition)[-1].removed(case.partition))


@pytest.mark.parametrize("name", ["bert", "vit", "gated"])
def test_the_class_is_compact_only_while_it_is_cut(name):
    model = make(name).eval()
    partition = partition_zigs(model, TABLE[name].inputs(2))
    stock, architectures = type(model), model.config.architectures
    compaction = cut_piecewise(model, partition, growing_plans(partition))
    assert is_compact(type(model)) and "oto" in vars(model.config)
    compaction.undo_(model)
    assert type(model) is stock
    assert model.config.architectures == architectures
    assert "oto" not in vars(model.config)
    compaction.undo_(model)  # once more changes nothing
    assert type(model) is stock


def test_marks_on_parameters_stay():
    """And whether they train; a parameter that isn't cut is the same object."""
    model = make("gated").eval()
    partition = partition_zigs(model, hidden(2))
    model.up.weight.mark = "a mark"
    model.up.weight.requires_grad_(False)
    up, bias_of_output = model.up.weight, model.down.bias
    compaction = cut_piecewise(model, partition, growing_plans(partition))
    for _ in range(2):
        assert model.up.weight is not up
        assert model.down.bias is bias_of_output
        assert model.up.weight.mark == "a mark" and not vars(model.down.weight)
        assert not model.up.weight.requires_grad and model.down.weight.requires_grad
        compaction.undo_(model)


def test_statistics_of_zero_show(outputs, difference, monkeypatch):
    """Control: a direction of zeros has no norm to divide by."""
    model, inputs = make("weight_norm").eval(), TABLE["weight_norm"].inputs(2)
    partition = partition_zigs(model, inputs)
    plan = growing_plans(partition)[-1]
    partition.zero_(model, plan)
    zeroed = outputs(model, inputs)
    compact(model, partition, plan)
    grown, wrong = copy.deepcopy(model), copy.deepcopy(model)
    cut = resolve(partition, plan)
    grow_(grown, cut)
    assert difference(zeroed, outputs(grown, inputs)) <= TOLERANCE
    right = hf_oto.cut._with_positions
    monkeypatch.setattr(hf_oto.cut, "_with_positions", lambda tensor, dim, gone, fill: right(tensor, dim, gone, 0.0))
    grow_(wrong, cut)
    assert not difference(zeroed, outputs(wrong, inputs)) <= 1e-3  # nan


# the optimizer -------------------------------------------------------------------------------------


class Net(nn.Module):
    """Weights that lose rows and columns, a batch norm, and a weight with two names."""

    def __init__(self):
        super().__init__()
        # no bias before the norm, which takes it away: its gradient would be rounding alone
        self.first, self.norm, self.second = nn.Linear(6, 12, bias=False), nn.BatchNorm1d(12), nn.Linear(12, 10)
        self.left, self.right, self.last = nn.Linear(10, 8), nn.Linear(10, 8), nn.Linear(8, 3)
        self.right.weight = self.left.weight

    def forward(self, x):
        x = self.second(self.norm(self.first(x)).relu()).relu()
        return self.last(self.left(x).relu() + self.right(-x).relu())


PARTITION = partition_zigs(randomise_(Net()), {"x": torch.ones(4, 6)})
STEPS, MORE_STEPS = 12, 5

BASES = {
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1, "foreach": False}),
    "adamw foreach": (torch.optim.AdamW, {"weight_decay": 0.1, "foreach": True}),
    "adamw fused": (torch.optim.AdamW, {"weight_decay": 0.1, "fused": True}),
    "adam amsgrad": (torch.optim.Adam, {"amsgrad": True, "foreach": False}),
    "adam amsgrad foreach": (torch.optim.Adam, {"amsgrad": True, "foreach": True}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "foreach": False}),
    "sgd foreach": (torch.optim.SGD, {"momentum": 0.9, "foreach": True}),
    "sgd fused": (torch.optim.SGD, {"momentum": 0.9, "fused": True}),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.5, "centered": True, "foreach": False}),
    "rmsprop foreach": (torch.optim.RMSprop, {"foreach": True}),
    "adagrad": (torch.optim.Adagrad, {"foreach": False}),
    "adagrad foreach": (torch.optim.Adagrad, {"foreach": True}),
    "adagrad fused": (torch.optim.Adagrad, {"fused": True}),
}
bases = pytest.mark.parametrize("base", BASES)


def untrained(base, **settings):
    """The model in double, so that rounding is small, its optimizer, and a scheduler around that."""
    cls, settings_of_base = BASES[base]
    torch.manual_seed(0)  # biases are torch's own, and noise
    model = randomise_(Net()).double().train()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1]},
        {"params": [p for p in model.parameters() if p.dim() == 1], "lr": 2e-3},
    ]
    optimizer = DHSPG(
        model, PARTITION, cls, lr=5e-3, params=groups, total_steps=20, window=(0.1, 0.5), num_events=2,
        **(settings_of_base | settings),
    )  # fmt: skip
    return model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)


def train(model, optimizer, scheduler, start, stop):
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 6, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 3, (16,), generator=generator)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def trained(base):
    """After the last event: what is zero stays zero."""
    everything = untrained(base)
    train(*everything, 0, STEPS)
    _, optimizer, _ = everything
    assert optimizer.phase == "training the rest" and optimizer.target_reached
    return everything


def cut_both(model, optimizer, plan=None, compaction=None):
    """Cuts a model and its optimizer by a plan; None: by what is zero."""
    compaction = compaction or Compaction(model, PARTITION)
    cut = compaction.resolve(plan or compaction.plan(zeros(model, compaction)))
    assert cut.removed.any()
    compaction.keep_(model, cut)
    optimizer.cut_(dict(model.named_parameters()), cut.positions)
    return compaction.plan(zeros(model, compaction))


def state_of(optimizer):
    """(parameter, key) -> a value of the base optimizer's state."""
    found = {}
    for name, p in optimizer.parameters_by_name().items():
        for key, value in optimizer.state[p].items():
            found[name, key] = torch.as_tensor(value) if value is not None else torch.zeros(())
    return found


def are_close(a, b):
    if a.keys() != b.keys() or any(a[k].shape != b[k].shape for k in a):
        return False
    return all(torch.allclose(a[k], b[k], rtol=1e-6, atol=1e-10) for k in a)


@bases
def test_an_optimizer_trains_on_what_is_left(base):
    whole, small, forgetful = (trained(base) for _ in range(3))
    assert are_equal(values(whole[0]), values(small[0]))  # runs repeat
    for model, optimizer, _ in (small, forgetful):
        assert why_uncuttable(optimizer.base) is None
        cut_both(model, optimizer)
    for value in state_of(forgetful[1]).values():
        value.zero_()
    assert num_params(small[0]) < num_params(whole[0])
    for everything in (whole, small, forgetful):
        train(*everything, STEPS, STEPS + MORE_STEPS)
    cut_both(whole[0], whole[1])
    assert are_close(values(whole[0]), values(small[0]))
    assert are_close(state_of(whole[1]), state_of(small[1]))
    assert state_of(small[1])  # it has some
    assert not are_close(values(whole[0]), values(forgetful[0]))  # control: the state matters
    assert not are_close(values(whole[0]), values(trained(base)[0]))


@bases
def test_what_a_loop_holds_stays_the_same(base):
    model, optimizer, scheduler = trained(base)
    zero, sparsity = optimizer.zero, optimizer.group_sparsity
    held = [optimizer.base, optimizer.param_groups, *optimizer.param_groups, scheduler.optimizer]
    names = [list(group["param_names"]) for group in optimizer.param_groups]
    parameters, old_parameters = list(model.parameters()), [p for g in optimizer.param_groups for p in g["params"]]
    cut_both(model, optimizer)
    now = [optimizer.base, optimizer.param_groups, *optimizer.param_groups, scheduler.optimizer]
    assert all(a is b for a, b in zip(held, now, strict=True))
    assert [group["param_names"] for group in optimizer.param_groups] == names
    in_groups = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert in_groups == {id(p) for p in model.parameters()}
    assert {id(p) for p in optimizer.state} == in_groups  # nothing of the old ones is left
    assert in_groups.isdisjoint(id(p) for p in parameters if p.shape[0] in (12, 10, 8)), "these are cut"
    assert len(old_parameters) == len(in_groups)
    # ZIGs keep their numbers, and those that are gone are zero
    assert torch.equal(optimizer.zero, zero) and optimizer.group_sparsity == sparsity
    rates = [group["lr"] for group in optimizer.param_groups]
    train(model, optimizer, scheduler, STEPS, STEPS + 1)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.97 * rate for rate in rates])
    assert torch.equal(optimizer.zero, zero)


@bases
def test_a_saved_state_is_loaded_after_the_same_cut(base):
    model, optimizer, scheduler = trained(base)
    plan = cut_both(model, optimizer)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    fresh = untrained(base)
    cut_both(fresh[0], fresh[1], plan)
    fresh[0].load_state_dict(weights)
    fresh[1].load_state_dict(copy.deepcopy(saved))
    fresh[2].load_state_dict(scheduler.state_dict())
    assert are_equal(state_of(fresh[1]), state_of(optimizer))
    for everything in ((model, optimizer, scheduler), fresh):
        train(*everything, STEPS, STEPS + MORE_STEPS)
    assert are_equal(values(model), values(fresh[0]))
    assert torch.equal(optimizer.zero, fresh[1].zero)
    assert all(fits(value, fresh[0], name) for (name, _), value in state_of(fresh[1]).items())
    # control: for a dense one it has other shapes, which fused kernels would not even check
    dense_model, dense_optimizer, _ = untrained(base)
    mismatched = {name for (name, _), value in state_of(optimizer).items() if not fits(value, dense_model, name)}
    assert mismatched >= {"first.weight", "second.weight", "left.weight", "last.weight"}
    with pytest.raises(OTOError, match="and 0 out of this one"):
        dense_optimizer.load_state_dict(saved)


def fits(value, model, name):
    return value.dim() == 0 or value.shape == model.get_parameter(name).shape


def test_two_cuts_of_an_optimizer_are_one():
    once, twice = trained("adamw"), trained("adamw")
    plan = cut_both(*once[:2])
    model, optimizer, _ = twice
    compaction = Compaction(model, PARTITION)
    half = {name: sorted({*kept, *range(6)}) for name, kept in plan.kept.items()}
    for part in (PruningPlan(half), plan):
        cut_both(model, optimizer, part, compaction)
    assert are_equal(values(once[0]), values(model))
    assert are_equal(state_of(once[1]), state_of(optimizer))
    for everything in (once, twice):
        train(*everything, STEPS, STEPS + MORE_STEPS)
    assert are_equal(values(once[0]), values(model))


def test_a_cut_inside_the_window_changes_no_later_choice():
    """The ZIGs that are left are chosen from as if nothing had gone."""
    whole, small = untrained("adamw"), untrained("adamw")
    first_zeros = next(step for step in range(1, STEPS) if has_zeros_after(step))
    for everything in (whole, small):
        train(*everything, 0, first_zeros)
    assert whole[1].phase == "pruning" and not whole[1].target_reached
    compaction = Compaction(small[0], PARTITION)
    cut_both(*small[:2], small[1].zeros(PARTITION), compaction)
    for everything in (whole, small):
        train(*everything, first_zeros, STEPS + MORE_STEPS)
    assert whole[1].target_reached
    assert torch.equal(whole[1].zero, small[1].zero)
    gone_before = num_params(small[0])
    cut_both(*small[:2], small[1].zeros(PARTITION), compaction)
    cut_both(*whole[:2])
    assert num_params(small[0]) < gone_before  # the later events took more
    assert are_close(values(whole[0]), values(small[0]))
    assert are_close(state_of(whole[1]), state_of(small[1]))


def has_zeros_after(step):
    model, optimizer, scheduler = untrained("adamw")
    train(model, optimizer, scheduler, 0, step)
    return bool(optimizer.zero.any())


# what can't be cut ---------------------------------------------------------------------------------


def stepped(cls, **settings):
    """An optimizer after a step with a weight that is large enough to be quantised or factored."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    params = [
        p for p in model.parameters() if p.dim() == 2 or cls is not torch.optim.Muon
    ]  # which takes matrices only
    optimizer = cls(params, **({"lr": 1e-3} | settings))

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 64)).square().mean()
        loss.backward()
        return loss

    with torch.compiler.set_stance("force_eager"):
        optimizer.step(closure) if cls is torch.optim.LBFGS else (closure(), optimizer.step())
    return optimizer


UNCUTTABLE = {
    "LBFGS": (torch.optim.LBFGS, {}, "LBFGS keeps tensors of its own, as _params"),
    "Adafactor": (
        tf.Adafactor,
        {"relative_step": False, "scale_parameter": False},
        "exp_avg_sq_row of Adafactor doesn't have the shape of its parameter",
    ),
    "torchao 8": (torchao.optim.AdamW8bit, {}, "exp_avg of AdamW8bit doesn't have the shape of its parameter"),
    "torchao 4": (torchao.optim.AdamW4bit, {}, "exp_avg of AdamW4bit doesn't have the shape of its parameter"),
    "bitsandbytes": (bitsandbytes.optim.AdamW8bit, {}, "AdamW8bit keeps tensors of its own, as name2qmap"),
}


class Around(torch.optim.SGD):
    """Steps by another optimizer, whose state nobody else sees."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.inner = torch.optim.AdamW(self.param_groups, lr=lr)

    def step(self, closure=None):
        self.inner.step()


class ByAverage(torch.optim.SGD):
    """Moves by the gradient over its mean, or with `by_norm` over its norm, in which zeros don't count."""

    def __init__(self, params, lr, by_norm=False):
        super().__init__(params, lr)
        self.by_norm = by_norm

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            size = p.grad.norm() if self.by_norm else p.grad.abs().mean()
            p.sub_(self.param_groups[0]["lr"] * p.grad / size)


class OnlyWhole(torch.optim.SGD):
    def step(self, closure=None):
        assert len(self.param_groups[0]["params"]) > 1, "needs them all"
        super().step(closure)


BY_SHAPE = {
    "muon": (torch.optim.Muon, {}, "a step of Muon depends on the shape of a parameter"),
    "muon as adam": (torch.optim.Muon, {"adjust_lr_fn": "match_rms_adamw"}, "a step of Muon depends on the shape"),
    "average": (ByAverage, {}, "a step of ByAverage depends on the shape of a parameter"),
    "around": (Around, {}, "Around keeps tensors of its own, as inner"),
    "only whole": (OnlyWhole, {}, "OnlyWhole can't be tried on one parameter (AssertionError: needs them all"),
}


@pytest.mark.parametrize("name", UNCUTTABLE)
def test_an_optimizer_that_cannot_be_cut_says_why(name):
    cls, settings, why = UNCUTTABLE[name]
    assert why in why_uncuttable(stepped(cls, **settings))


@pytest.mark.parametrize("name", BY_SHAPE)
def test_an_optimizer_that_sees_shapes_cannot_be_cut(name):
    """It would go on as another one, without an error."""
    cls, settings, why = BY_SHAPE[name]
    assert why in why_uncuttable(stepped(cls, **settings))


def test_the_reason_is_the_step():
    """What is refused for its shape does train otherwise on what is left."""
    torch.manual_seed(0)
    weight, gradient = torch.randn(2, 16, 64, dtype=torch.float64)
    for cls, is_refused in ((torch.optim.Muon, True), (torch.optim.AdamW, False)):
        moved = []
        for columns in (64, 4):
            p = nn.Parameter(weight[:, :columns].clone())
            p.grad = gradient[:, :columns].clone()
            with torch.no_grad():
                p[:, 4:], p.grad[:, 4:] = 0, 0
            optimizer = cls([p], lr=0.1)
            optimizer.step()
            moved.append(p[:, :4])
        assert torch.allclose(*moved, rtol=1e-6) is not is_refused
        assert (why_uncuttable(optimizer) is not None) is is_refused


@bases
def test_asking_changes_nothing(base):
    model, optimizer, scheduler = trained(base)
    called = []
    optimizer.base.register_step_post_hook(lambda *_: called.append(1))
    before, state_before = values(model), copy.deepcopy(optimizer.state_dict())
    random_state = torch.get_rng_state()
    held = {name: id(value) for name, value in vars(optimizer.base).items()}
    assert why_uncuttable(optimizer.base) is None
    assert are_equal(before, values(model)) and not called
    assert torch.equal(torch.get_rng_state(), random_state)
    assert {name: id(value) for name, value in vars(optimizer.base).items()} == held
    assert all(p.grad is None for p in model.parameters())
    for number, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            assert value is state_before["state"][number][key] or torch.equal(
                value, state_before["state"][number][key]
            )
    train(model, optimizer, scheduler, STEPS, STEPS + 1)
    assert called  # control: the hook is called in a step


@bases
def test_other_optimizers_can_be_cut(base):
    cls, settings = BASES[base]
    assert why_uncuttable(stepped(cls, **settings)) is None


def test_a_step_by_norms_can_be_cut():
    assert why_uncuttable(stepped(ByAverage, by_norm=True)) is None


def test_a_parameter_of_another_name_stays():
    model = nn.Linear(6, 4)
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-3)
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    old, state = model.bias, dict(optimizer.state[model.bias])
    new = nn.Parameter(model.weight.detach()[[0, 2]])
    params = {"weight": new, "unknown": nn.Parameter(torch.ones(3))}
    cut_state_(optimizer, params, {"weight": {0: np.array([1, 3])}})
    assert optimizer.param_groups[0]["params"][0] is new and optimizer.param_groups[0]["params"][1] is old
    assert optimizer.state[new]["exp_avg"].shape == (2, 6)
    assert all(optimizer.state[old][key] is value for key, value in state.items())
    assert set(map(id, optimizer.state)) == {id(new), id(old)}
