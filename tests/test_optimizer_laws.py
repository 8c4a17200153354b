"""What torch.optim asks of an optimizer, asked of DHSPG around many bases: state, copies, hooks, schedulers, closures,
odd parameters and gradients; and of what it loads."""

import copy
import datetime
import io
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers as tf
from test_dhspg import PARTITION, Net, batch, consumer, make, net, producer, run, same, zeros
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from hf_oto import DHSPG, ZIGPartition
from hf_oto.paper import PaperDHSPG, Penalty
from hf_oto.zigs import OTOError, PrunableAxis

STEPS = 60  # events at 6, 10, 14, 17, 21, 25, 28, 32 and 36
BASES = {
    "adamw": (torch.optim.AdamW, dict(weight_decay=0.1)),
    "sgd": (torch.optim.SGD, dict(momentum=0.9, weight_decay=1e-2)),
}
VARIANTS = BASES | {
    "adamw_foreach": (torch.optim.AdamW, dict(foreach=True)),
    "adamw_fused": (torch.optim.AdamW, dict(fused=True)),
    "adamw_amsgrad": (torch.optim.AdamW, dict(amsgrad=True, foreach=False)),
    "adamw_maximize": (torch.optim.AdamW, dict(maximize=True)),
    "adamw_not_capturable": (torch.optim.AdamW, dict(capturable=False, differentiable=False)),
    "adamw_tensor_lr": (torch.optim.AdamW, dict(foreach=False)),
    "sgd_plain": (torch.optim.SGD, {}),
    "sgd_foreach": (torch.optim.SGD, dict(momentum=0.9, foreach=True)),
    "sgd_fused": (torch.optim.SGD, dict(momentum=0.9, nesterov=True, fused=True)),
    "sgd_maximize": (torch.optim.SGD, dict(momentum=0.9, maximize=True)),
    "adafactor": (torch.optim.Adafactor, {}),
    "lbfgs": (torch.optim.LBFGS, dict(max_iter=3, history_size=4)),
}
CLASSES = {"dhspg": (DHSPG, {}), "paper": (PaperDHSPG, dict(penalty=Penalty(5.0, 2.0, 10.0, 0.5)))}
EVERY_BASE = pytest.mark.parametrize("base", BASES.values(), ids=BASES)
EVERY_VARIANT = pytest.mark.parametrize("name", VARIANTS)
EVERY_CLASS = pytest.mark.parametrize("cls", CLASSES)


def rate(name):
    return torch.tensor(0.02) if "tensor_lr" in name else 0.02


def enough(model, cls, partition=PARTITION):
    """Whether so much is zero as the target asks for; OTOv2's own rule comes near it, but promises nothing."""
    gone, asked = zeros(model, partition).sum(), partition.num_zigs // 2
    return gone == asked if cls == "dhspg" else asked // 2 <= gone <= asked


def start(name, cls="dhspg", model=None, **settings):
    """(model, optimizer) of a variant, as they are before a run."""
    model = net() if model is None else model
    kind, more = CLASSES[cls]
    return model, make(model, VARIANTS[name], lr=rate(name), steps=STEPS, cls=kind, **more | settings)


def train(model, optimizer, steps, begin=0, each=lambda i: None):
    """As `run`, for any base: what maximizes gets the negative loss, what wants a closure gets one."""
    base = getattr(optimizer, "base", optimizer)
    sign = -1 if base.defaults.get("maximize") else 1
    for i in range(begin, steps):
        x, y = batch(i)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = sign * nn.functional.cross_entropy(model(x.to(model.a.weight.dtype)), y)
            loss.backward()
            return loss

        if isinstance(base, torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        each(i)
    return model


def alike(a, b):
    """Whether two states are equal, with the dtypes of their tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(alike, a, b))
    return a.dtype == b.dtype and torch.equal(a, b) if torch.is_tensor(a) else a == b


def own(optimizer):
    """What DHSPG keeps, by name."""
    return {k: v for k, v in optimizer.param_groups[0].items() if torch.is_tensor(v) and k != "lr"}


# variants of the base ---------------------------------------------------------------------


@EVERY_VARIANT
@EVERY_CLASS
def test_bitwise_the_base_where_nothing_is_pruned(name, cls):
    plain = net()
    train(plain, VARIANTS[name][0](plain.parameters(), lr=rate(name), **VARIANTS[name][1]), 20)
    assert same(plain, train(*start(name, cls, target_group_sparsity=0.0), 20))
    other, optimizer = start(name, cls)  # negative control
    assert not same(plain, train(other, optimizer, 20))


@EVERY_VARIANT
def test_every_variant_reaches_the_target_and_trains_on(name):
    model, optimizer = start(name)
    train(model, optimizer, 36)
    gone, before = zeros(model), model.a.weight.detach().clone()
    assert gone.sum() == 15 and optimizer.target_reached
    train(model, optimizer, STEPS, begin=36, each=lambda i: np.testing.assert_array_equal(zeros(model), gone))
    living = torch.from_numpy(~gone[:20])
    assert (model.a.weight[living] != before[living]).any()


# state ------------------------------------------------------------------------------------

# a run that is stopped there: before the first step, in warm-up, at a sample, at an event that also freezes what was
# chosen before, between two shrinks, when the last ZIGs are frozen, and in the training of the rest
MOMENTS = (0, 3, 9, 14, 19, 36, 45)


def through_a_file(optimizer, other):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))


def through_float64(optimizer, other):
    """Into an optimizer of parameters made in another dtype and order, and from that into one like the first."""
    between = Reversed().double()
    groups = [{"params": [dict(between.named_parameters())[n] for n, _ in net().named_parameters()]}]
    kind = PaperDHSPG if isinstance(optimizer, PaperDHSPG) else DHSPG
    name = type(optimizer.base)
    wide = make(between, (name, {}), lr=1.0, cls=kind, params=groups, steps=STEPS)
    wide.load_state_dict(optimizer.state_dict())
    for key, t in own(optimizer).items():
        assert (
            torch.equal(own(wide)[key], t) and own(wide)[key].dtype == t.dtype
        )  # what isn't a parameter's is no float64
    for state in wide.state.values():
        assert all(t.dtype == torch.float64 for t in state.values() if torch.is_tensor(t) and t.dim())
    through_a_file(wide, other)


class Reversed(Net):
    """The same parameters, the last layer first."""

    def __init__(self):
        super().__init__()
        for name in ("c", "b", "norm", "a"):
            layer = getattr(self, name)
            delattr(self, name)
            setattr(self, name, layer)


@pytest.mark.parametrize("name", ["adamw", "sgd", "adamw_amsgrad", "adamw_tensor_lr", "adafactor"])
@EVERY_CLASS
def test_what_is_loaded_or_copied_goes_on_bit_by_bit(name, cls):
    whole, optimizer = start(name, cls)
    train(whole, optimizer, STEPS)
    assert zeros(whole).sum() > 0
    first, optimizer = start(name, cls)
    done = 0
    for at in MOMENTS:
        train(first, optimizer, at, begin=done)
        done = at
        for load in (through_a_file, through_float64):
            model, other = start(name, cls)
            model.load_state_dict(first.state_dict())
            load(optimizer, other)
            assert same(whole, train(model, other, STEPS, begin=at)), (at, load.__name__)
        for copied in (lambda both: pickle.loads(pickle.dumps(both)), copy.deepcopy):
            model, other = copied((first, optimizer))
            assert same(whole, train(model, other, STEPS, begin=at)), at
        assert optimizer.param_groups[0]["dhspg_step"] == at  # a copy shares nothing


@pytest.mark.parametrize("lost", ["redundant", "salience", "dhspg_step"])
def test_all_of_its_state_counts(lost):
    """Negative control of the test above: without one of these entries the run ends elsewhere."""
    different = []
    for at in MOMENTS[2:5]:
        model, optimizer = start("adamw")
        train(model, optimizer, at)
        state = copy.deepcopy(optimizer.state_dict())
        value = state["param_groups"][0][lost]
        state["param_groups"][0][lost] = 0 * value
        optimizer.load_state_dict(state)
        different.append(not same(train(*start("adamw"), STEPS), train(model, optimizer, STEPS, begin=at)))
    assert any(different)


def test_lbfgs_goes_on_from_a_file():
    """Its own history moves zero ZIGs, and what it loads is that history. (torch's LBFGS can't be copied.)"""
    whole, optimizer = start("lbfgs")
    train(whole, optimizer, STEPS)
    for at in (14, 45):
        first, optimizer = start("lbfgs")
        train(first, optimizer, at)
        model, other = start("lbfgs")
        model.load_state_dict(first.state_dict())
        through_a_file(optimizer, other)
        assert same(whole, train(model, other, STEPS, begin=at))


@pytest.mark.parametrize("salience", [None, lambda moments: moments.weight_squared.double()], ids=["default", "own"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_tensors_of_its_state_are_small_and_no_float64(dtype, salience):
    """A checkpoint may go to Apple's MPS, which has no float64."""
    model = net(dtype)
    optimizer = make(model, salience=salience, steps=STEPS)

    def check(i=0):
        assert {t.dtype for t in own(optimizer).values()} == {torch.float32, torch.uint8}
        assert all(len(t) in (30, 2) for t in own(optimizer).values())

    check()
    run(model, optimizer, STEPS, each=check)
    assert zeros(model).sum() == 15


@pytest.mark.parametrize("default", ["float64", "bfloat16", "meta"])
@EVERY_CLASS
def test_the_defaults_of_torch_are_not_its_own(default, cls):
    """Scripts set a default dtype or device, after which the model was made elsewhere: bit by bit the same run."""
    plain, ours = net(), net()
    kind, more = CLASSES[cls]
    settings = dict(cls=kind, steps=STEPS, lr=0.02, **more)
    if cls == "dhspg":
        settings["salience"] = lambda moments: moments.weight_times_gradient**2  # all moments are asked for
    expected = make(plain, BASES["sgd"], **settings)
    run(plain, expected, STEPS)
    was = torch.get_default_dtype()
    batches = [batch(i) for i in range(STEPS)]
    try:
        if default == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(getattr(torch, default))
        optimizer = make(ours, BASES["sgd"], **settings)
        for x, y in batches:
            nn.functional.cross_entropy(ours(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert alike(own(optimizer), own(expected)) and torch.equal(optimizer.zero, expected.zero)
        assert "of them zero" in repr(optimizer)
    finally:
        torch.set_default_dtype(was)
        torch.set_default_device(None)
    assert same(plain, ours)


class Counting(DHSPG):
    """A subclass with attributes of its own."""

    def __init__(self, *args, label, **settings):
        super().__init__(*args, **settings)
        self.label, self.counts = label, []

    def step(self, closure=None):
        self.counts.append(self.param_groups[0]["dhspg_step"])
        return super().step(closure)


def test_a_subclass_keeps_its_attributes():
    model = net()
    optimizer = make(model, cls=Counting, label="mine")
    lr_scheduler.LambdaLR(optimizer, lambda i: 1.0)  # puts a `step` of its own on the instance
    optimizer.register_step_post_hook(lambda *_: None)
    optimizer.step()
    copies = copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))
    for other, copied in copies:
        assert type(copied) is Counting and copied.label == "mine" and copied.counts == [0]
        run(other, copied, 5)
        assert copied.counts == [0, 1, 2, 3, 4, 5]
        assert copied.base.param_groups[0]["params"][0] is next(other.parameters())
    assert optimizer.counts == [0]


# hooks ------------------------------------------------------------------------------------


@EVERY_BASE
@EVERY_CLASS
def test_step_hooks_run_once_a_step(base, cls):
    """Those of DHSPG see it before and after all of the step. Those of its base see only that one's.

    Hooks of all optimizers run for DHSPG and, inside, for its base, which is an optimizer too: who counts steps with
    them looks at the optimizer that they are given.
    """
    model, calls = net(), []
    kind, more = CLASSES[cls]
    optimizer = make(model, base, cls=kind, steps=STEPS, **more)

    def note(name):
        return lambda optimizer, args, kwargs: calls.append((name, type(optimizer)))

    optimizer.register_step_pre_hook(note("pre"))
    optimizer.register_step_post_hook(note("post"))
    optimizer.base.register_step_pre_hook(note("pre"))
    optimizer.base.register_step_post_hook(note("post"))
    run(model, optimizer, 2)
    once = [("pre", kind), ("pre", base[0]), ("post", base[0]), ("post", kind)]
    assert calls == 2 * once
    calls.clear()
    hooks = register_optimizer_step_pre_hook(note("all")), register_optimizer_step_post_hook(note("all"))
    run(model, optimizer, 3, start=2)
    for hook in hooks:
        hook.remove()
    assert [call for call in calls if call[0] == "all"] == [("all", t) for t in (kind, base[0], base[0], kind)]


def test_a_step_hook_sees_what_is_zero_after_the_step():
    """An average of weights or a callback may be hung there. A hook of the base comes before the correction."""
    model = net()
    optimizer, seen, early, after = make(model, steps=STEPS), [], [], []
    optimizer.register_step_post_hook(lambda *_: seen.append(int(zeros(model).sum())))
    optimizer.base.register_step_post_hook(lambda *_: early.append(int(zeros(model).sum())))
    run(model, optimizer, 40, each=lambda i: after.append(int(zeros(model).sum())))
    assert seen == after and seen[-1] == 15
    assert early == [0, *after[:-1]]  # negative control


@EVERY_BASE
def test_state_dict_hooks_run_once(base):
    model, calls = net(), []
    optimizer = make(model, base, steps=STEPS)

    def mark(_, state):
        calls.append("post")
        return {**state, "mine": 1}

    optimizer.register_state_dict_pre_hook(lambda _: calls.append("pre"))
    optimizer.register_state_dict_post_hook(mark)
    optimizer.register_load_state_dict_pre_hook(lambda _, state: calls.append("load pre"))
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("load post"))
    run(model, optimizer, 8)
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    assert state["mine"] == 1 and calls == ["pre", "post", "load pre", "load post"]


# schedulers -------------------------------------------------------------------------------


def sequential(optimizer):
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 5), lr_scheduler.CosineAnnealingLR(optimizer, 55)]
    return lr_scheduler.SequentialLR(optimizer, parts, [5])


SCHEDULERS = {
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.05, total_steps=STEPS + 1),
    "warm_restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 7),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=3),
    "sequential": sequential,
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda i: 1 / (1 + i)),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.01, step_size_up=5, cycle_momentum=False),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 4), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


@EVERY_BASE
@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers_set_what_they_set_on_the_base(base, scheduler):
    """Learning rates, momentum and betas, step by step, also of a group of its own; the target is met all the same."""
    histories = []
    for ours in (True, False):
        model = net()
        early = [{"params": [*model.a.parameters(), *model.norm.parameters()]}, {"params": [*model.b.parameters()]}]
        groups = [*early, {"params": [*model.c.parameters()], "lr": 0.003}]
        optimizer = make(model, base, params=groups, steps=STEPS) if ours else base[0](groups, lr=1e-2, **base[1])
        chosen, history = scheduler(optimizer), []
        for i in range(STEPS):
            run(model, optimizer, i + 1, start=i)
            chosen.step(*[1.0] * isinstance(chosen, lr_scheduler.ReduceLROnPlateau))
            history.append([[g["lr"], g.get("momentum"), g.get("betas")] for g in optimizer.param_groups])
        histories.append(history)
        if ours:
            assert zeros(model).sum() == 15
            twin = scheduler(make(net(), base, params=None, steps=STEPS))
            twin.load_state_dict(chosen.state_dict())
    assert histories[0] == histories[1]
    assert len({str(moment) for moment in histories[0]}) > 3  # negative control: they change


# closures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "sgd", "lbfgs"])
@EVERY_CLASS
def test_closures(name, cls):
    """The salience is that of the gradients before the step, however often a base calls its closure."""
    model, optimizer = start(name, cls)
    calls, sampled = [], []
    before_step = optimizer._before_step

    def watch(now):
        sampled.append((now, model.c.bias.grad.clone()))
        before_step(now)

    optimizer._before_step = watch
    for i in range(45):
        x, y = batch(i)

        def closure(x=x, y=y, i=i):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            calls.append((i + 1, model.c.bias.grad.clone()))
            return loss

        loss = optimizer.step(closure)
        assert loss.requires_grad and loss > 0
    firsts = [next(grad for step, grad in calls if step == now) for now in range(1, 46)]
    assert [now for now, _ in sampled] == list(range(1, 46))
    assert all(torch.equal(grad, first) for (_, grad), first in zip(sampled, firsts, strict=True))
    assert (len(calls) > 60) == (name == "lbfgs")
    assert enough(model, cls)


@EVERY_BASE
def test_a_closure_is_a_backward_before_the_step(base):
    model, other = net(), net()
    optimizer = make(other, base, steps=STEPS)
    run(model, make(model, base, steps=STEPS), 20)
    for i in range(20):
        x, y = batch(i)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(other(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert same(model, other)


# gradients that are not there -------------------------------------------------------------


@EVERY_BASE
def test_a_parameter_without_gradients_keeps_its_axis(base):
    """The salience of its ZIGs is unknown, so all ZIGs that go are of the other axis."""
    model = net()
    optimizer = make(model, base, steps=STEPS)
    model.b.bias.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    before = model.b.bias.detach().clone()
    run(model, optimizer, STEPS)
    assert zeros(model)[:20].sum() == 15 and zeros(model)[20:].sum() == 0
    assert torch.equal(model.b.bias, before)


@EVERY_BASE
@EVERY_CLASS
def test_gradients_may_be_missing_in_some_steps(base, cls):
    model = net()
    kind, more = CLASSES[cls]
    optimizer = make(model, base, cls=kind, steps=STEPS, lr=0.02, **more)
    for i in range(STEPS):
        x, y = batch(i)
        nn.functional.cross_entropy(model(x), y).backward()
        for p in list(model.parameters())[i % 2 :: 2]:  # weights, or biases
            p.grad = None
        optimizer.step()
        optimizer.zero_grad()
    assert zeros(model).sum() == 0  # no step sees all gradients of an axis, so that its ZIGs have no salience
    model = net()
    optimizer = make(model, base, steps=STEPS, lr=0.02)
    for i in range(STEPS):
        x, y = batch(i)
        nn.functional.cross_entropy(model(x), y).backward()
        if i % 2:
            for p in list(model.parameters())[::2]:
                p.grad = None
        optimizer.step()
        optimizer.zero_grad()
    assert zeros(model).sum() == 15


def frozen_for(first, last, seen=None):
    """ZIGs gone of (a, b) when layer `a` and its norm don't train in those steps."""
    model = net()
    optimizer = make(model, steps=STEPS, min_keep=0.05)
    if seen is not None:
        optimizer._seen_axes = lambda: seen
    history = []

    def each(i):
        for p in (*model.a.parameters(), *model.norm.parameters()):
            p.requires_grad_(not first <= i + 1 < last)
        history.append(zeros(model))

    each(-1)
    run(model, optimizer, STEPS, each=each)
    return [np.array([gone[:20].sum(), gone[20:].sum()]) for gone in history]


@pytest.mark.parametrize(("first", "last"), [(0, 15), (11, 60), (15, 27)], ids=["unfrozen", "frozen", "between"])
def test_an_axis_that_does_not_train_is_not_chosen(first, last):
    """Its salience is old, or 0. ZIGs chosen before still go to zero; once it trains again, it may lose more."""
    history = frozen_for(first, last)
    events = [6, 10, 14, 17, 21, 25, 28, 32, 36]
    seen = [any(first > s or s >= last for s in range(a, b)) for a, b in itertools.pairwise([0, *events])]
    for chosen, (event, after) in zip(seen, itertools.pairwise(events), strict=False):
        grew = history[after][0] > history[event][0]
        assert chosen or not grew, event
    assert history[-1][0] > 0
    if last < 36:
        assert history[-1].sum() == 15


def test_an_axis_without_gradients_would_be_chosen_first():
    """Negative control: if a salience of 0 counted, the axis that never trained would lose all the ZIGs."""
    assert frozen_for(0, 60)[-1].tolist() == [0, 9]
    assert frozen_for(0, 60, seen=[True, True])[-1].tolist() == [15, 0]


# odd parameters ---------------------------------------------------------------------------


class ComplexNet(nn.Module):
    """A complex hidden layer, as of a Fourier operator: 12 ZIGs."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(12, 6, dtype=torch.complex64) / 3)
        self.b = nn.Parameter(torch.zeros(12, dtype=torch.complex64))
        self.v = nn.Parameter(torch.randn(3, 12, dtype=torch.complex64) / 3)

    def forward(self, x):
        return ((x.to(self.w.dtype) @ self.w.T + self.b) @ self.v.T).abs()


COMPLEX = ZIGPartition((PrunableAxis("w", "units", 12, (producer("w"), producer("b"), consumer("v"))),), {})


@EVERY_BASE
@EVERY_CLASS
def test_complex_parameters(base, cls):
    torch.manual_seed(0)
    model, (kind, more) = ComplexNet(), CLASSES[cls]
    optimizer = make(model, base, cls=kind, lr=0.02, steps=STEPS, partition=COMPLEX, **more)
    start, by_hand = copy.deepcopy(model), None
    for i in range(STEPS):
        x, y = batch(i)
        nn.functional.cross_entropy(model(x), y).backward()
        if i == 0:
            by_hand = sum(
                (torch.view_as_real(p) * torch.view_as_real(p.grad)).flatten(1).sum(1) for p in (model.w, model.b)
            )
        optimizer.step()
        if i == 0 and cls == "dhspg":  # <x, gradient> is that of the real and imaginary parts
            salience = optimizer.param_groups[0]["salience"]
            torch.testing.assert_close(salience, 0.1 * by_hand.detach() ** 2)
        optimizer.zero_grad()
    gone = torch.from_numpy(zeros(model, COMPLEX))
    assert enough(model, cls, COMPLEX)
    assert not model.w[gone].any() and not model.b[gone].any() and not model.v[:, gone].any()
    assert (model.w[~gone] != start.w[~gone]).all()


@EVERY_BASE
@EVERY_CLASS
def test_parameters_of_no_size(base, cls):
    """One in an axis, of units that read nothing else, and one outside."""
    model = net()
    model.register_parameter("none", nn.Parameter(torch.empty(20, 0)))
    model.register_parameter("free", nn.Parameter(torch.empty(0)))
    first = PARTITION.axes[0]
    axis = PrunableAxis("a", "units", 20, (*first.members, producer("none")))
    partition = ZIGPartition((axis, PARTITION.axes[1]), {})
    kind, more = CLASSES[cls]
    optimizer = make(model, base, cls=kind, lr=0.02, steps=STEPS, partition=partition, **more)
    for i in range(STEPS):
        x, y = batch(i)
        loss = nn.functional.cross_entropy(model(x), y) + model.none.sum() + model.free.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.group_sparsity == zeros(model).mean() and enough(model, cls)


class Bag(nn.Module):
    """A mean of sparse embeddings, 12 wide; only 20 of 50 rows are ever looked up."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(50, 12, sparse=True), nn.Linear(12, 3)

    def forward(self, ids):
        return self.head(self.table(ids).mean(1))


BAG = ZIGPartition((PrunableAxis("table", "units", 12, (producer("table.weight", 1), consumer("head.weight"))),), {})


@pytest.mark.parametrize("name", ["sgd", "sparse_adam"])
def test_sparse_gradients(name):
    torch.manual_seed(0)
    model = Bag()
    base = {"sgd": torch.optim.SGD, "sparse_adam": torch.optim.SparseAdam}[name]
    groups = [{"params": list(model.parameters() if name == "sgd" else model.table.parameters())}]
    optimizer = make(model, (base, {}), lr=0.05, steps=STEPS, partition=BAG, params=groups)
    rest = torch.optim.SGD(model.head.parameters(), lr=0.05 * (name != "sgd"))
    never = model.table.weight[20:].detach().clone()
    for i in range(STEPS):
        g = torch.Generator().manual_seed(i)
        ids, y = torch.randint(0, 20, (16, 4), generator=g), torch.randint(0, 3, (16,), generator=g)
        nn.functional.cross_entropy(model(ids), y).backward()
        assert model.table.weight.grad.is_sparse
        if i == 0:
            by_hand = (model.table.weight.detach() * model.table.weight.grad.to_dense()).sum(0) ** 2
        optimizer.step()
        if i == 0:
            torch.testing.assert_close(optimizer.param_groups[0]["salience"], 0.1 * by_hand)
        rest.step()
        optimizer.zero_grad()
        rest.zero_grad()
    gone = torch.from_numpy(zeros(model, BAG))
    assert gone.sum() == 6 and not model.table.weight[:, gone].any()
    assert torch.equal(model.table.weight[20:, ~gone], never[:, ~gone])  # rows that no batch has stay as they were


@EVERY_BASE
@EVERY_CLASS
def test_a_tensor_outside_the_model_trains_on(base, cls):
    """The temperature of a loss, and a whole layer of one: as by the plain optimizer, while the model is pruned."""
    ends = []
    for ours in (True, False):
        model, temperature, head = net(), nn.Parameter(torch.tensor(2.0)), nn.Linear(1, 1)
        nn.init.constant_(head.weight, 0.3)
        groups = [{"params": list(model.parameters())}, {"params": [temperature, *head.parameters()], "lr": 0.05}]
        kind, more = CLASSES[cls]
        if ours:
            optimizer = make(model, base, cls=kind, params=groups, steps=STEPS, lr=0.02, **more)
        else:
            optimizer = base[0](groups, lr=0.02, **base[1])
        for i in range(STEPS):
            x, y = batch(i)
            (nn.functional.cross_entropy(model(x), y) + (head(temperature[None]) - 1).square().sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append([temperature, *head.parameters()])
        assert (zeros(model).sum() > 0) == ours
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))
    assert float(ends[0][0].detach()) != 2.0


def test_an_optimizer_of_another_model_is_an_error():
    other = nn.Linear(3, 3)
    with pytest.raises(OTOError, match="SGD trains no parameter of Net in its step: make it with model"):
        DHSPG(net(), PARTITION, torch.optim.SGD(other.parameters(), lr=0.1), total_steps=STEPS)
    with pytest.raises(OTOError, match="trains no parameter"):
        DHSPG(net(), PARTITION, torch.optim.SGD, params=[{"params": other.parameters()}], total_steps=STEPS)
    model = net()
    DHSPG(model, PARTITION, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=STEPS)


# groups -----------------------------------------------------------------------------------


@EVERY_BASE
@EVERY_CLASS
def test_groups_keep_their_own_settings(base, cls):
    """Bitwise the base where nothing is pruned; a group with lr 0 doesn't move, but is pruned."""
    kind, more = CLASSES[cls]

    def groups(model):
        decay, rest = [p for p in model.parameters() if p.dim() > 1], [p for p in model.parameters() if p.dim() == 1]
        return [{"params": iter(decay), "lr": 0.03, "weight_decay": 0.2}, {"params": rest, "weight_decay": 0.0}]

    plain, ours, still = net(), net(), net()
    run(plain, base[0](groups(plain), lr=0.01, **base[1]), 30)
    optimizer = make(ours, base, cls=kind, params=groups(ours), steps=STEPS, target_group_sparsity=0.0, **more)
    run(ours, optimizer, 30)
    assert same(plain, ours)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.03, 0.2), (0.01, 0.0)]
    optimizer = make(still, base, lr=0.0, steps=STEPS)
    run(still, optimizer, STEPS)
    gone = torch.from_numpy(zeros(still)[:20])
    assert optimizer.target_reached and torch.equal(still.a.weight[~gone], net().a.weight[~gone])


@EVERY_BASE
@EVERY_CLASS
def test_a_group_may_be_added_in_the_middle(base, cls):
    """It trains as by the plain optimizer with that group, and is part of the state."""
    kind, more = CLASSES[cls]

    def start():
        torch.manual_seed(1)
        return net(), nn.Linear(3, 3)

    def train(model, late, optimizer, begin, end):
        for i in range(begin, end):
            x, y = batch(i)
            nn.functional.cross_entropy(late(model(x)), y).backward()
            optimizer.step()
            model.zero_grad()
            late.zero_grad()

    model, late = start()
    optimizer = make(model, base, cls=kind, steps=STEPS, lr=0.02, **more)
    train(model, late, optimizer, 0, 12)
    before = late.weight.detach().clone()
    optimizer.add_param_group({"params": late.weight, "lr": 0.05})
    optimizer.add_param_group({"params": iter([late.bias])})
    assert [g["lr"] for g in optimizer.param_groups] == [0.02, 0.05, 0.02]
    train(model, late, optimizer, 12, 20)
    assert not torch.equal(late.weight, before)
    other, other_late = copy.deepcopy((model, late))
    again = make(other, base, cls=kind, steps=STEPS, lr=0.02, **more)
    again.add_param_group({"params": [other_late.weight], "lr": 0.05})
    again.add_param_group({"params": [other_late.bias]})
    through_a_file(optimizer, again)
    train(model, late, optimizer, 20, STEPS)
    train(other, other_late, again, 20, STEPS)
    assert same(model, other) and same(late, other_late)
    assert enough(model, cls)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [model.a.weight]})


@EVERY_BASE
@EVERY_CLASS
def test_an_instance_may_be_the_base(base, cls):
    """With its groups, learning rates and what it has learned; bitwise it where nothing is pruned."""
    kind, more = CLASSES[cls]

    def begun():
        model = net()
        groups = [{"params": list(model.a.parameters())}, {"params": [*model.b.parameters()], "lr": 0.05}]
        plain = base[0]([*groups, {"params": [*model.norm.parameters(), *model.c.parameters()]}], lr=0.02, **base[1])
        return run(model, plain, 5), plain

    whole, plain = begun()
    run(whole, plain, 50, start=5)
    model, plain = begun()
    state = copy.deepcopy(plain.state_dict()["state"])
    optimizer = kind(model, PARTITION, plain, target_group_sparsity=0.0, total_steps=STEPS, **more)
    assert optimizer.base is plain and [g["lr"] for g in optimizer.param_groups] == [0.02, 0.05, 0.02]
    assert alike(optimizer.state_dict()["state"], state)
    assert same(whole, run(model, optimizer, 50, start=5))
    model, plain = begun()
    optimizer = kind(model, PARTITION, plain, target_group_sparsity=0.5, total_steps=STEPS, **more)
    run(model, optimizer, STEPS, start=5)
    run(model, optimizer, 65, start=60)
    assert enough(model, cls)
    with pytest.raises(ValueError, match="lr is not for DHSPG"):
        DHSPG(model, PARTITION, plain, lr=0.1, total_steps=STEPS)


@EVERY_BASE
def test_parameters_may_come_with_names(base):
    """As torch has it, for a class, an instance and an added group: the same run as without."""
    whole, named, instance = net(), net(), net()
    run(whole, make(whole, base, steps=STEPS), STEPS)
    groups = [{"params": named.named_parameters()}]
    optimizer = make(named, base, params=groups, steps=STEPS)
    run(named, optimizer, STEPS)
    plain = base[0](instance.named_parameters(prefix="mine"), lr=1e-2, **base[1])
    run(instance, DHSPG(instance, PARTITION, plain, total_steps=STEPS), STEPS)
    assert same(whole, named) and same(whole, instance)
    assert zeros(whole).sum() == 15
    more = nn.Linear(2, 2)
    optimizer.add_param_group({"params": more.named_parameters()})
    assert optimizer.param_groups[1]["params"] == list(more.parameters())


# scalers and text -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "adamw_fused", "sgd", "sgd_fused"])
def test_a_gradient_scaler_skips_steps(name):
    """Also of a fused base, whose kernels would skip them unseen: steps that count are those that were taken."""
    model, optimizer = start(name)
    scaler, taken = torch.amp.GradScaler("cpu", init_scale=8.0), 0
    for i in range(70):
        x, y = batch(i)
        overflow = math.inf if i % 7 == 3 else 1.0
        scaler.scale(nn.functional.cross_entropy(model(x), y) * overflow).backward()
        before = copy.deepcopy(model.a.weight)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        taken += overflow == 1
        assert optimizer.param_groups[0]["dhspg_step"] == taken
        assert torch.equal(before, model.a.weight) == (overflow != 1)
    assert zeros(model).sum() == 15 and taken == STEPS
    assert all(p.isfinite().all() for p in model.parameters())


@EVERY_VARIANT
def test_it_prints_as_a_few_lines(name):
    model, optimizer = start(name)
    train(model, optimizer, 20)
    text = repr(optimizer)
    assert len(text.splitlines()) == 3 and max(map(len, text.splitlines())) < 120
    assert "tensor(" not in text and VARIANTS[name][0].__name__ in text and "0.02" in text
    assert f"{optimizer.group_sparsity:.3f} of them zero" in text and "step 20, pruning" in text
    assert "tensor(" in str(optimizer.param_groups)  # negative control: what the list of groups would print


def test_a_base_that_sets_its_own_rate_prints():
    model = net()
    optimizer = DHSPG(model, PARTITION, tf.Adafactor(model.parameters()), total_steps=STEPS)
    run(model, optimizer, STEPS)
    assert zeros(model).sum() == 15 and "at no lr)" in repr(optimizer)


# what is chosen ---------------------------------------------------------------------------


def smallest_norm(moments):
    return moments.weight_squared / moments.elements


def test_users_may_give_a_salience():
    """With magnitude as the salience, the ZIGs of smallest norm go. The default chooses others."""

    def gone(salience):
        model = net()
        with torch.no_grad():
            # norms of a wide range, in another order than the loss's
            model.a.weight.mul_(torch.linspace(1, 3, 20)[torch.randperm(20)][:, None])
            model.b.weight.mul_(torch.linspace(2, 6, 10)[torch.randperm(10)][:, None])
        norms = [
            torch.cat([p.detach().reshape(len(p), -1) for p in layer], 1).square().mean(1)
            for layer in ((*model.a.parameters(), *model.norm.parameters()), model.b.parameters())
        ]
        optimizer = make(model, lr=0.0, steps=STEPS, salience=salience)
        run(model, optimizer, STEPS)
        pruned = pickle.loads(pickle.dumps(optimizer))
        assert torch.equal(pruned.zero, optimizer.zero)
        return optimizer.zero, torch.cat(norms)

    zero, norms = gone(smallest_norm)
    assert zero.sum() == 15 and set(norms[zero].tolist()) == set(norms.sort().values[:15].tolist())
    zero, norms = gone(None)
    assert zero.sum() == 15 and set(norms[zero].tolist()) != set(norms.sort().values[:15].tolist())


# what may be loaded -----------------------------------------------------------------------


def resumed(at, **other):
    """(model, optimizer) of another plan, with the state of a run to 0.5 that was stopped after `at` steps."""
    model, optimizer = start("adamw")
    train(model, optimizer, at)
    goes_on, again = start("adamw", model=copy.deepcopy(model), **other)
    through_a_file(optimizer, again)
    return goes_on, again


@pytest.mark.parametrize(
    ("at", "other", "gone"),
    [
        (20, dict(target_group_sparsity=0.8), 24),
        (9, dict(target_group_sparsity=0.3), 9),
        (20, dict(window=(0.2, 0.9)), 15),
        (5, dict(window=(0.5, 0.9), num_events=3), 15),
        (20, dict(num_events=2), 15),
        (45, dict(window=(0.0, 0.3)), 15),
        (36, dict(target_group_sparsity=0.8, window=(0.1, 0.9)), 24),
    ],
)
def test_another_plan_goes_on_and_ends_at_its_own_target(at, other, gone, caplog):
    model, optimizer = resumed(at, **other)
    assert "the run goes on with another plan" in caplog.text
    assert optimizer.param_groups[0]["run"] != start("adamw")[1].param_groups[0]["run"]
    before = zeros(model)
    train(model, optimizer, STEPS, begin=at)
    assert zeros(model).sum() == gone and optimizer.target_reached and (zeros(model) >= before).all()


@pytest.mark.parametrize(
    ("at", "other", "message"),
    [
        (36, dict(target_group_sparsity=0.3), "more ZIGs are zero in this optimizer state than the target asks for"),
        (40, dict(target_group_sparsity=0.8), "the target can't be reached any more"),
        (20, dict(window=(0.0, 0.3)), "the target can't be reached any more"),
        (20, dict(target_group_sparsity=0.0), "more ZIGs are zero"),
    ],
)
def test_a_plan_that_can_not_become_this_one_is_an_error(at, other, message):
    with pytest.raises(OTOError, match=message):
        resumed(at, **other)


@EVERY_BASE
@EVERY_CLASS
def test_a_state_of_something_else_is_an_error(base, cls):
    model, (kind, more) = net(), CLASSES[cls]
    optimizer = make(model, base, cls=kind, steps=STEPS, **more)
    run(model, optimizer, 9)
    before = copy.deepcopy(optimizer.state_dict())
    plain = base[0](model.parameters(), lr=1e-2, **base[1])
    with pytest.raises(OTOError, match="not DHSPG's"):
        optimizer.load_state_dict(plain.state_dict())
    half = ZIGPartition(PARTITION.axes[:1], {})
    with pytest.raises(OTOError, match="another partition"):
        optimizer.load_state_dict(make(net(), base, cls=kind, steps=STEPS, partition=half, **more).state_dict())
    assert alike(optimizer.state_dict(), before)  # an error changes nothing
    run(model, optimizer, 10, start=9)  # negative control
    assert not alike(optimizer.state_dict(), before)
    optimizer.load_state_dict(before)
    assert alike(optimizer.state_dict(), before)


# processes --------------------------------------------------------------------------------


def rank_of_two(rank, folder):
    """Runs with gradients of its own, as no DDP makes them equal: together, alone, and one rank more often."""
    torch.set_num_threads(1)
    late = datetime.timedelta(seconds=30)  # who waits for a rank that takes no step fails then
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=late)
    alone = [dist.new_group([r]) for r in range(2)][rank]
    ends = {}
    for name, group in (("together", None), ("alone", alone)):
        model = net()
        optimizer = make(model, steps=STEPS, process_group=group)
        for i in range(40):
            x, y = batch(1000 * rank + i)
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends[name] = (optimizer.zero, model.state_dict())
    if rank == 1:  # a whole run of one rank, while the other waits for none
        model = net()
        run(model, make(model, steps=STEPS, process_group=alone), 40)
        ends["one"] = (torch.from_numpy(zeros(model)), model.state_dict())
    torch.save(ends, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_process_group_says_who_agrees(tmp_path):
    """Ranks that step together choose the same ZIGs, even of unlike gradients; with a group of its own none waits."""
    torch.multiprocessing.spawn(rank_of_two, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(first["together"][0], second["together"][0]) and first["together"][0].sum() == 15
    assert not torch.equal(first["alone"][0], second["alone"][0])  # negative control
    assert torch.equal(first["alone"][0], first["together"][0])  # the first rank's choice is the one that counts
    alone = net()
    run(alone, make(alone, steps=STEPS), 40)
    assert torch.equal(second["one"][0], torch.from_numpy(zeros(alone)))
    assert all(torch.equal(p, second["one"][1][n]) for n, p in alone.state_dict().items())
