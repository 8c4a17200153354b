"""The optimizer's laws: the base where nothing is pruned, the paper's update, the exact target, zeros for good."""

import copy
import dataclasses
import itertools
import math
import pickle
import re

import numpy as np
import pytest
import torch
import transformers as tf
from dhspg_reference import Group, Reference
from torch import nn

from hf_oto import DHSPG, PruningPlan, ZIGPartition, compact, partition_zigs, salience
from hf_oto.choice import choose, weigh_survivors
from hf_oto.paper import PaperDHSPG, Penalty
from hf_oto.report import macs
from hf_oto.zigs import Member, OTOError, PrunableAxis

ADAMW = (torch.optim.AdamW, dict(weight_decay=0.1))
FUSED = (torch.optim.AdamW, dict(weight_decay=0.1, fused=True))
SGD = (torch.optim.SGD, dict(momentum=0.9, nesterov=True, weight_decay=1e-2))
BASES = pytest.mark.parametrize("base", [ADAMW, FUSED, SGD], ids=["adamw", "fused", "sgd"])


class Net(nn.Module):
    """Two prunable hidden layers, the first behind a batch norm; 30 ZIGs."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b, self.c = nn.Linear(6, 20), nn.BatchNorm1d(20), nn.Linear(20, 10), nn.Linear(10, 3)

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.norm(self.a(x))))))


def producer(name, dim=0, **layout):
    return Member(name, dim, "producer", **layout)


def consumer(name, dim=1, **layout):
    return Member(name, dim, "consumer", **layout)


PARTITION = ZIGPartition(
    (
        PrunableAxis("a", "units", 20, (
            producer("a.weight"), producer("a.bias"), producer("norm.weight"), producer("norm.bias"),
            consumer("b.weight"),
            Member("norm.running_mean", 0, "statistic"), Member("norm.running_var", 0, "statistic"),
        )),
        PrunableAxis("b", "units", 10, (producer("b.weight"), producer("b.bias"), consumer("c.weight"))),
    ),
    {},
)  # fmt: skip


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return Net().to(dtype)


def make(model, base=ADAMW, lr=1e-2, steps=60, partition=PARTITION, cls=DHSPG, **settings):
    settings = dict(target_group_sparsity=0.5, total_steps=steps) | settings
    return cls(model, partition, base[0], lr=lr, **base[1], **settings)


def batch(i):
    g = torch.Generator().manual_seed(i)
    return torch.randn(16, 6, generator=g), torch.randint(0, 3, (16,), generator=g)


def run(model, optimizer, steps, start=0, scheduler=None, clip=None, each=lambda i: None):
    for i in range(start, steps):
        x, y = batch(i)
        nn.functional.cross_entropy(model(x.to(model.a.weight.dtype)), y).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler:
            scheduler.step()
        each(i)
    return model


def zeros(model, partition=PARTITION):
    return PruningPlan.from_zeros(model, partition).removed(partition)


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# the base optimizer -----------------------------------------------------------------------


@BASES
def test_with_nothing_to_prune_it_is_bitwise_the_base(base):
    plain, ours, pruned = net(), net(), net()
    run(plain, base[0](plain.parameters(), lr=1e-2, **base[1]), 50)
    run(ours, make(ours, base, target_group_sparsity=0.0), 50)
    run(pruned, make(pruned, base, steps=50), 50)
    assert same(plain, ours)
    assert not same(plain, pruned)


@BASES
def test_step_hooks_run_once(base):
    base[0](net().parameters(), lr=1e-2, **base[1])  # torch hooks a class when the first optimizer of it is made
    model, calls = net(), []
    optimizer = make(model, base)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    run(model, optimizer, 2)
    assert calls == ["before", "after"] * 2


EVERY_BASE = {
    "plain_sgd": (torch.optim.SGD, {}),
    "foreach_adamw": (torch.optim.AdamW, dict(foreach=True, amsgrad=True, weight_decay=0.1)),
    "adam": (torch.optim.Adam, dict(weight_decay=0.1)),
    "rmsprop": (torch.optim.RMSprop, dict(momentum=0.9, centered=True)),
    "adafactor": (torch.optim.Adafactor, dict(weight_decay=0.1)),
    "transformers_adafactor": (tf.Adafactor, dict(scale_parameter=False, relative_step=False, beta1=0.9)),
    "adagrad": (torch.optim.Adagrad, {}),
    "adadelta": (torch.optim.Adadelta, dict(weight_decay=0.1)),
    "adamax": (torch.optim.Adamax, dict(weight_decay=0.1)),
    "nadam": (torch.optim.NAdam, dict(weight_decay=0.1)),
    "radam": (torch.optim.RAdam, dict(weight_decay=0.1)),
    "rprop": (torch.optim.Rprop, {}),
    "asgd": (torch.optim.ASGD, dict(weight_decay=0.1)),
}


@pytest.mark.parametrize("base", EVERY_BASE.values(), ids=EVERY_BASE)
def test_any_optimizer_may_be_the_base(base):
    plain, ours, pruned = net(), net(), net()
    run(plain, base[0](plain.parameters(), lr=1e-3, **base[1]), 50)
    run(ours, make(ours, base, lr=1e-3, target_group_sparsity=0.0), 50)
    optimizer = make(pruned, base, lr=1e-3, steps=50)
    run(pruned, optimizer, 30)
    assert zeros(pruned).sum() == 15
    gone, before = optimizer.zero.numpy().copy(), pruned.a.weight.detach().clone()
    run(pruned, optimizer, 50, start=30)
    assert (zeros(pruned) == gone).all()
    assert not torch.equal(pruned.a.weight, before)  # the rest trains on
    assert same(plain, ours)
    assert not same(plain, pruned)


# the paper's update -----------------------------------------------------------------------


def random_case(seed, base):
    rng = np.random.default_rng(seed)
    model, axes, groups = nn.Module(), [], []
    for k in range(rng.integers(1, 4)):
        size, inner, width = rng.integers(2, 7), rng.integers(1, 4), rng.integers(1, 5)
        members = [("w", (size * inner, width), 0), ("v", (width, size * inner), 1), ("b", (size * inner,), 0)]
        for name, shape, _ in members:
            value = torch.from_numpy(rng.normal(size=shape) * rng.choice([0.01, 0.3]))
            model.register_parameter(f"{name}{k}", nn.Parameter(value))
        found = [producer(f"{name}{k}", dim, inner=int(inner)) for name, _, dim in members]
        axes.append(PrunableAxis(f"axis{k}", "units", int(size), tuple(found)))
        for j in range(size):
            index = torch.arange(j * inner, (j + 1) * inner)
            groups.append(Group([(m.param, m.dim, index) for m in found]))
    model.register_parameter("free", nn.Parameter(torch.from_numpy(rng.normal(size=(3,)))))
    return model, ZIGPartition(tuple(axes), {}), groups, rng


def paper_difference(seed, base, **change):
    model, partition, groups, rng = random_case(seed, base)
    kwargs, lr = {k: v for k, v in base[1].items() if k != "fused"}, float(10 ** rng.uniform(-2.5, -1))
    penalty = Penalty(float(10 ** rng.uniform(-2, 0)), 2.0, 10.0, float(rng.choice([0, 0.9])))
    twin = copy.deepcopy(model)
    params = dict(twin.named_parameters())
    optimizer = PaperDHSPG(
        model, partition, base[0], lr=lr, target_group_sparsity=0.5, total_steps=30, penalty=penalty, **kwargs
    )
    theirs = dataclasses.replace(penalty, **change)
    reference = Reference(
        params, base[0](params.values(), lr=lr, **kwargs), groups, round(0.5 * len(groups)), 3,
        theirs.lam, theirs.amplify, theirs.bound, theirs.epsilon,
    )  # fmt: skip
    goal = {n: torch.from_numpy(rng.normal(size=p.shape) * 0.1) for n, p in model.named_parameters()}
    for _ in range(30):
        for n, p in model.named_parameters():
            p.grad = p.detach() - goal[n] + 0.1 * torch.from_numpy(rng.normal(size=p.shape))
            # the same gradient, not one of the twin's own place: rounding must not be fed back
            params[n].grad = p.grad.clone()
        optimizer.step()
        reference.step()
    worst = max(float((p - params[n]).detach().abs().max()) for n, p in model.named_parameters())
    assert set(np.flatnonzero(optimizer.zero)) == reference.zero or change
    return worst, len(reference.zero)


@BASES
def test_paper_mode_is_the_literal_twin(base):
    results = [paper_difference(seed, base) for seed in range(25)]
    assert max(worst for worst, _ in results) < 1e-12
    assert sum(count for _, count in results) > 20  # the projection was at work
    assert any(paper_difference(seed, base, lam=0.3)[0] > 1e-3 for seed in range(5))


def test_the_released_rule_misses_its_target_at_a_fine_tuning_rate():
    model = net()
    optimizer = make(model, lr=5e-5, cls=PaperDHSPG)
    run(model, optimizer, 60)
    assert optimizer.group_sparsity == 0.0 and not optimizer.target_reached


# the schedule -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "steps", "count", "end"),
    [(0.5, 1000, 8, 600), (0.9, 1000, 16, 250), (0.9, 60, 16, 24), (0.9, 32, 16, 19)],
)
def test_high_targets_choose_early(target, steps, count, end):
    """The ZIGs that stay then train alone for most of the run. A short run takes the steps that its choices need."""
    events = make(net(), total_steps=steps, target_group_sparsity=target).schedule.events
    assert (len(events), events[0], events[-1]) == (count + 1, round(steps / 10), end)
    asked = make(net(), total_steps=steps, target_group_sparsity=target, window=(0.2, 0.8)).schedule.events
    assert (asked[0], asked[-1]) == (round(0.2 * steps), round(0.8 * steps))  # control: a window that is given stays


@BASES
@pytest.mark.parametrize("target", [0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("lr", [1e-6, 1e-3, 1e-1, "linear", "cosine"])
def test_exactly_the_target_whatever_the_learning_rate(base, target, lr):
    model = net()
    decay = {"linear": lambda i: 1 - i / 60, "cosine": lambda i: (1 + math.cos(math.pi * i / 60)) / 2}.get(lr)
    optimizer = make(model, base, lr=1e-2 if decay else lr, target_group_sparsity=target)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, decay) if decay else None
    history = []
    run(model, optimizer, 60, scheduler=scheduler, each=lambda i: history.append(zeros(model)))
    counts = [int(z.sum()) for z in history]
    assert counts[:6] == [0] * 6  # the window opens after 10 % of the steps
    assert counts[36:] == [round(target * 30)] * 24  # and closes at 60 %
    assert optimizer.group_sparsity == counts[-1] / 30 and optimizer.target_reached
    assert all((later >= earlier).all() for earlier, later in itertools.pairwise(history))
    for name in ("a", "b"):
        left = {axis.name: ~part for axis, part in PARTITION.split(history[-1])}[name]
        assert left.sum() >= max(1, np.ceil(0.1 * len(left)))


def test_the_floor_is_what_keeps_layers_alive():
    """Negative control of the floor: with a lower floor, a layer with one important unit loses all the others."""

    def kept(min_keep):
        model = net()
        with torch.no_grad():
            model.b.weight[1:].mul_(1e-4)
            model.b.bias[1:].mul_(1e-4)
        optimizer = make(model, target_group_sparsity=0.45, lr=1e-7, min_keep=min_keep)
        run(model, optimizer, 60)
        return (~zeros(model)[20:]).sum()

    assert kept(0.5) >= 5
    assert kept(0.1) == 1


@BASES
def test_zeros_stay_zero_under_everything(base):
    model = net()
    optimizer = make(model, base, lr=1e-2, steps=40)
    run(model, optimizer, 40)
    first = zeros(model)
    run(model, optimizer, 120, start=40, clip=0.1)
    assert np.array_equal(first, zeros(model)) and first.sum() == 15
    x, y = batch(0)
    nn.functional.cross_entropy(model(x), y).backward()
    gone = torch.from_numpy(first[:20])
    assert float(model.b.weight.grad[:, gone].abs().max()) == 0.0 < float(model.b.weight.grad[:, ~gone].abs().max())
    # negative control: a ZIG that comes back to life gives gradients to what reads it
    column = int(np.flatnonzero(first[:20])[0])
    with torch.no_grad():
        model.norm.bias[column] = 1.0
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    assert float(model.b.weight.grad[:, column].abs().max()) > 0.0


class Gated(nn.Module):
    """sigmoid(0) is not 0: the ZIG needs the reader's columns."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.b(torch.sigmoid(self.a(x)))


@pytest.mark.parametrize("frozen_reader", [False, True])
def test_zeros_stay_where_gradients_do_not_vanish(frozen_reader):
    torch.manual_seed(0)
    model = Gated()
    members = (producer("a.weight"), producer("a.bias"), consumer("b.weight"))
    partition = ZIGPartition((PrunableAxis("a", "units", 12, members, zero_path=frozen_reader),), {})
    model.b.weight.requires_grad_(not frozen_reader)
    optimizer = make(model, SGD, lr=0.1, partition=partition)
    run(model, optimizer, 60)
    assert zeros(model, partition).sum() == 6


@pytest.mark.parametrize(("name", "message"), [("b", "no parameter 'b.bias'"), ("c", "c.weight is smaller")])
def test_a_partition_of_another_model_is_an_error(name, message):
    model = net()
    setattr(model, name, nn.Linear(20, 10, bias=False) if name == "b" else nn.Linear(9, 3))
    with pytest.raises(OTOError, match=message):
        make(model)


def test_axes_with_frozen_parameters_are_left_alone():
    model = net()
    model.a.bias.requires_grad_(False)
    optimizer = make(model)
    run(model, optimizer, 60)
    assert zeros(model).sum() == 5 and zeros(model)[:20].sum() == 0


def test_a_zero_group_changes_no_output():
    model = net()
    optimizer = make(model)
    run(model, optimizer, 60)
    model.eval()
    x, _ = batch(0)
    before = model(x)
    gone = torch.from_numpy(zeros(model))
    with torch.no_grad():
        model.c.weight[:, gone[20:]] = 7.0
        model.b.weight[:, gone[:20]] = 7.0
        # b's own zero rows have to stay zero
        model.b.weight[gone[20:]] = 0.0
    assert torch.equal(before, model(x))
    with torch.no_grad():
        model.b.weight[:, ~gone[:20]] += 7.0
    assert not torch.equal(before, model(x))


# state ------------------------------------------------------------------------------------


def through_a_file(optimizer, other, folder):
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    other.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
    return other


@BASES
@pytest.mark.parametrize("cls", [DHSPG, PaperDHSPG])
@pytest.mark.parametrize("at", [3, 17, 45])
def test_resume_is_bit_identical(base, cls, at, tmp_path):
    def start():
        model = net()
        return model, make(model, base, lr=5e-2, cls=cls)

    whole, optimizer = start()
    run(whole, optimizer, 60)
    first, optimizer = start()
    run(first, optimizer, at)
    for copied in ("file", "pickle", "deepcopy"):
        if copied == "file":
            model, other = start()
            model.load_state_dict(first.state_dict())
            through_a_file(optimizer, other, tmp_path)
        elif copied == "pickle":
            model, other = pickle.loads(pickle.dumps((first, optimizer)))
        else:
            model, other = copy.deepcopy((first, optimizer))
        run(model, other, 60, start=at)
        assert same(model, whole), copied
    model, other = start()  # negative control: weights alone are not enough
    model.load_state_dict(first.state_dict())
    run(model, other, 60, start=at)
    assert not same(model, whole)


def test_a_fake_step_before_loading_changes_nothing(tmp_path):
    """torch.distributed.checkpoint steps a fresh optimizer with zero gradients and lr 0 before it loads state."""
    whole = net()
    optimizer = make(whole)
    run(whole, optimizer, 20)
    fresh = net()
    other = make(fresh)
    fresh.load_state_dict(whole.state_dict())
    for p in fresh.parameters():
        p.grad = torch.zeros_like(p)
    lrs = [g["lr"] for g in other.param_groups]
    for g in other.param_groups:
        g["lr"] = 0.0
    other.step()
    for g, lr in zip(other.param_groups, lrs, strict=True):
        g["lr"] = lr
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), fresh.parameters(), strict=True))
    other.zero_grad()
    through_a_file(optimizer, other, tmp_path)
    run(whole, optimizer, 60, start=20)
    run(fresh, other, 60, start=20)
    assert same(whole, fresh)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    model = net(dtype)
    optimizer = make(model)
    run(model, optimizer, 60)
    assert zeros(model).sum() == 15


def test_skipped_steps_are_no_steps():
    """A gradient scaler that finds an overflow leaves out the step: phases, weights and zeros stay where they are."""
    model, twin = net(), net()
    optimizer, other = make(model), make(twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    for i in range(60):
        x, y = batch(i)
        for overflow in [True, False] if i % 7 == 3 else [False]:
            loss = nn.functional.cross_entropy(model(x), y)
            if overflow:
                model.norm.momentum = 0.0  # the batch norm of this forward counts twice otherwise
            scaler.scale(loss * (math.inf if overflow else 1)).backward()
            before = optimizer.param_groups[0]["dhspg_step"]
            scaler.step(optimizer)
            assert optimizer.param_groups[0]["dhspg_step"] == before + (not overflow)
            scaler.update()
            optimizer.zero_grad()
            model.norm.momentum = 0.1
        nn.functional.cross_entropy(twin(x), y).backward()
        other.step()
        other.zero_grad()
    assert zeros(model).sum() == 15 and (zeros(model) == zeros(twin)).all()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


def test_closures_work():
    model = net()
    optimizer = make(model, SGD, lr=0.1, steps=40)
    for i in range(40):
        x, y = batch(i)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        assert optimizer.step(closure) > 0
    assert zeros(model).sum() == 15


# budgets ----------------------------------------------------------------------------------


def encoder():
    """A small BERT, its partition and its batch: one unit is 0.1 % of it, one head 0.9 %."""
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=40, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=16,
        max_position_embeddings=16, num_labels=3, attention_probs_dropout_prob=0, hidden_dropout_prob=0,
    )  # fmt: skip
    model = tf.BertForSequenceClassification(config)
    inputs = {"input_ids": torch.arange(32).view(4, 8), "labels": torch.tensor([0, 1, 2, 0])}
    return model, partition_zigs(model, inputs), inputs


def pruned(steps=40, **settings):
    """(partition, kept per axis, fractions of the parameters and MACs that are left) after a run."""
    model, partition, inputs = encoder()
    before = sum(p.numel() for p in model.parameters()), macs(model, inputs)
    optimizer = make(model, steps=steps, lr=1e-3, partition=partition, num_events=5, **settings)
    for _ in range(steps):
        assert not (optimizer.target_reached and optimizer.group_sparsity == 0)
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.target_reached
    plan = PruningPlan.from_zeros(model, partition)
    compact(model, partition, plan)
    kept = {axis.name: len(plan.kept.get(axis.name, range(axis.size))) for axis in partition.axes}
    return partition, kept, (sum(p.numel() for p in model.parameters()) / before[0], macs(model, inputs) / before[1])


@pytest.mark.parametrize("piece", [2**20, 7])
def test_salience_is_a_mean_over_batches(monkeypatch, piece):
    """The mean of <x, gradient>^2 is computed by hand in float64; no single batch gives the same."""
    monkeypatch.setattr(salience, "PIECE", piece)
    model = net()
    optimizer, terms = make(model), []

    def watch(*_):
        rows = [(p.double() * p.grad).reshape(len(p), -1).sum(1) for p in model.parameters()]
        terms.append(torch.cat([sum(rows[:4]), sum(rows[4:6])]).detach() ** 2)

    optimizer.register_step_pre_hook(watch)
    run(model, optimizer, 6)  # the first choice comes after the sixth step
    mean = sum(0.1 * 0.9 ** (5 - i) * term for i, term in enumerate(terms))
    torch.testing.assert_close(optimizer.param_groups[0]["salience"], mean, rtol=1e-3, atol=1e-12, check_dtype=False)
    assert all(torch.cosine_similarity(mean, term, dim=0) < 0.97 for term in terms)


def test_axes_under_norms_lose_alike():
    """A norm makes the scale of an axis irrelevant: its last ZIGs count more there, and one event doesn't empty it."""
    torch.manual_seed(0)
    blocks = [(nn.Conv2d(n, 16, 1), nn.BatchNorm2d(16), nn.ReLU()) for n in (3, 16, 16)]
    model = nn.Sequential(*itertools.chain(*blocks), nn.Flatten(), nn.Linear(16 * 4, 3))
    partition = partition_zigs(model, {"input": torch.randn(2, 3, 2, 2)})
    optimizer = make(model.train(), partition=partition, target_group_sparsity=8 / 48)
    for _ in range(optimizer.schedule.events[0]):
        model(torch.randn(16, 3, 2, 2)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    own, limits = optimizer.param_groups[0], optimizer.limits
    share = own["salience_of_axes"] / own["salience"].view(3, 16).sum(1)
    assert share[:2].max() < 1e-4 and share[2] > 0.1  # a linear layer reads the last one

    def lost(of_axes):
        salience, none = np.array([1, 1.1, 1000]).repeat(16), np.zeros(48, bool)
        weighted = weigh_survivors(salience, np.full(3, of_axes), none, limits)
        return limits.count(choose(weighted, none, np.ones(3, bool), 1.0, limits, optimizer.budget)).tolist()

    assert lost(0.0) == [4, 4, 0]
    assert lost(np.inf) == [8, 0, 0]


@pytest.mark.parametrize(
    ("kind", "target", "divisible"),
    [("target_params", 0.7, 1), ("target_params", 0.7, 8), ("target_macs", 0.4, 1), ("target_macs", 0.75, 8)],
)
def test_a_budget_is_met_within_a_percent(kind, target, divisible):
    partition, kept, left = pruned(target_group_sparsity=None, group_divisible=divisible, **{kind: target})
    assert 0 <= target - left[kind == "target_macs"] <= 0.01
    if divisible > 1:
        assert all(kept[axis.name] % 8 == 0 for axis in partition.axes if axis.kind == "units")


def test_budgets_and_multiples_do_not_hold_by_themselves():
    """Negative control of the test above."""
    partition, kept, left = pruned(target_group_sparsity=0.3, group_divisible=1)
    assert sum(kept.values()) == partition.num_zigs - round(0.3 * partition.num_zigs)
    assert abs(0.7 - left[0]) > 0.01 and abs(0.4 - left[1]) > 0.01
    assert any(kept[axis.name] % 8 for axis in partition.axes if axis.kind == "units")


@pytest.mark.parametrize(("target", "divisible"), [(0.3, None), (0.47, None), (0.6, None), (0.6, 1)])
def test_wide_axes_are_aligned_and_the_number_is_exact(target, divisible):
    partition, kept, _ = pruned(target_group_sparsity=target, group_divisible=divisible, min_keep=0.11)
    assert sum(kept.values()) == partition.num_zigs - round(target * partition.num_zigs)
    odd = sum(kept[axis.name] % 8 > 0 for axis in partition.axes if axis.size >= 64)
    assert odd <= 1 if divisible is None else odd > 1


@pytest.mark.parametrize("divisible", [1, 2])
def test_a_number_of_zigs_is_exact_whatever_the_cut_leaves(divisible):
    """Stacked experts keep multiples of 8; unless other multiples are asked for, the number of zeros is exact."""
    partition = ZIGPartition(tuple(dataclasses.replace(axis, multiple=8) for axis in PARTITION.axes), {})
    model = net()
    run(model, make(model, partition=partition, target_group_sparsity=0.4, group_divisible=divisible), 60)
    kept = [int((~part).sum()) for _, part in partition.split(zeros(model))]
    if divisible == 1:
        assert sum(kept) == 18
    else:
        assert sum(kept) <= 18 and kept[0] in (20, 16, 8) and kept[1] in (10, 8)


def test_every_axis_may_have_its_own_target():
    asked = {r"layer\.0\.attention": 0.5, r"layer\.\d+\.attention": 0.25, r"layer\.2\.intermediate": 0.9}
    partition, kept, _ = pruned(target_group_sparsity=None, target_per_axis=asked, group_divisible=8)
    heads = [kept[axis.name] for axis in partition.axes if axis.kind == "heads"]
    units = [kept[axis.name] for axis in partition.axes if axis.kind == "units"]
    assert heads == [8, 12, 12] and units == [160, 160, 16, 64]  # a head is 4 channels wide


# bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(target_group_sparsity=1.0), r"in \[0, 1\)"),
        (dict(target_group_sparsity=-0.1), r"in \[0, 1\)"),
        (dict(target_group_sparsity=0.95), r"not feasible.*at most 0\.9"),
        (dict(steps=10), r"fewer training steps than the pruning window.*\d+ steps or more"),
        (dict(target_params=0.5), "target_group_sparsity and target_params are both given"),
        (dict(target_group_sparsity=None, target_params=0.0), r"target_params is 0.0: it must be in \(0, 1\]"),
        (dict(target_group_sparsity=None, target_params=0.01), r"target_params=0.01 is not feasible.*at least 0\.\d+"),
        (dict(target_group_sparsity=None, target_macs=0.5), "doesn't know its MACs"),
        (dict(target_group_sparsity=None, target_per_axis={"a": 0.95}), "not feasible for a: .* at most 0.9"),
        (dict(cls=PaperDHSPG, target_params=0.5), "target_params: OTOv2's own rule has none, use DHSPG"),
        (dict(min_keep=1.0), r"min_keep is 1.0: it must be in \[0, 1\)"),
        (dict(group_divisible=0), "group_divisible is 0: it must be a whole number of at least 1"),
        (dict(steps=0), "total_steps is missing"),
        (dict(num_events=0), "num_events is 0: it must be at least 1"),
        (dict(target_group_sparsity=None, target_per_axis={"nowhere": 0.5}), "'nowhere' matches no axis, .* 'a'"),
        (dict(window=(0.6, 0.1)), "0 <= start < end <= 1"),
        (dict(partition=ZIGPartition((), {})), "no prunable ZIG"),
    ],
)
def test_bad_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        make(net(), **settings)


def test_the_largest_feasible_target_is_feasible():
    make(net(), target_group_sparsity=0.9)
    with pytest.raises(ValueError, match="at least") as error:
        make(net(), target_group_sparsity=None, target_params=0.01)
    make(
        net(), target_group_sparsity=None, target_params=float(re.search(r"at least ([\d.]+\d)", str(error.value))[1])
    )
