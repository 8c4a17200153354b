"""What DHSPG calls zero is zero in the weights, after every step and in every number, whatever moves the weights.

The movers are what people add to a training: noise on gradients, penalties on the distance to other weights,
teachers, optimizers that keep quantised or flat momentum. The control of each: without the guard it moves zeros.
"""

import copy

import bitsandbytes
import numpy as np
import pytest
import torch
import torchao.optim
import transformers as tf
from test_faults import STEPS, arguments, rows, small

from hf_oto import DHSPG, OTOTrainer, PruningPlan, compact, partition_zigs


class Flat(torch.optim.Optimizer):
    """Momentum in one flat tensor, of another shape than the parameter."""

    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                momentum = state.setdefault("momentum", torch.zeros(p.numel()))
                momentum.mul_(0.9).add_(p.grad.reshape(-1))
                p.sub_(momentum.view_as(p), alpha=group["lr"])


def noise(model, start, **_):
    def after_backward():
        for p in model.parameters():
            p.grad.add_(torch.randn_like(p), alpha=1e-3)

    return None, after_backward


def distance(model, start, **_):
    """L2-SP: the distance to the weights that training began with."""
    return lambda _: sum((p - q).square().sum() for p, q in zip(model.parameters(), start, strict=True)), None


def fisher(model, start, **_):
    """EWC: the same, weighted by how much an earlier task minds."""
    weights = [torch.rand_like(q) for q in start]
    return lambda _: sum(
        (w * (p - q).square()).sum() for w, p, q in zip(weights, model.parameters(), start, strict=True)
    ), None


def teacher(model, start, inputs, **_):
    """Distillation on hidden states, those of the residual stream."""
    taught = copy.deepcopy(model)(**inputs, output_hidden_states=True).hidden_states
    return lambda output: sum(
        (h - t.detach()).square().mean() for h, t in zip(output.hidden_states, taught, strict=True)
    ), None


def poke(model, start, **_):
    """One tensor alone is moved, in the steps after the freeze too."""
    weight = max(model.parameters(), key=lambda p: p.numel())

    def after_backward():
        weight.data.add_(1e-3)

    return None, after_backward


ADAMW = (torch.optim.AdamW, {})
MOVERS = {
    "noise": (ADAMW, noise),
    "distance": (ADAMW, distance),
    "fisher": ((torch.optim.SGD, dict(momentum=0.9)), fisher),
    "teacher": (ADAMW, teacher),
    "poke": (ADAMW, poke),
    "flat": ((Flat, {}), None),
    "bitsandbytes": ((bitsandbytes.optim.AdamW8bit, {}), None),
    "torchao 8": ((torchao.optim.AdamW8bit, {}), None),
    "torchao 4": ((torchao.optim.AdamW4bit, {}), None),
}


def llama():
    """With matrices of 4,096 elements and more: states of smaller ones are never quantised."""
    torch.manual_seed(0)
    size = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**size, num_key_value_heads=2)), {
        "input_ids": torch.arange(24).view(2, 12)
    }


def run(name, each=lambda *_: None, cls=DHSPG, steps=30):
    """Trains a tiny Llama, whose residual stream is pruned too, and calls `each(model, partition, optimizer)`."""
    (base, settings), mover = MOVERS.get(name, (ADAMW, None))
    model, inputs = llama()
    partition = partition_zigs(model, inputs)
    start = [p.detach().clone() for p in model.parameters()]
    loss_of, after_backward = mover(model, start, inputs=inputs) if mover else (None, None)
    optimizer = cls(
        model, partition, base, lr=1e-2, target_per_axis={"": 0.5}, total_steps=steps, num_events=2, **settings
    )
    with torch.compiler.set_stance("force_eager"):
        for _ in range(steps):
            output = model(**inputs, output_hidden_states=True)
            loss = output.logits.square().mean()
            (loss if loss_of is None else loss + loss_of(output)).backward()
            if after_backward is not None:
                after_backward()
            optimizer.step()
            optimizer.zero_grad()
            each(model, partition, optimizer)
    return model, partition, optimizer


def half(partition):
    return sum(round(0.5 * axis.size) for axis in partition.axes)


def in_the_weights(model, partition):
    return PruningPlan.from_zeros(model, partition).removed(partition)


class Unguarded(DHSPG):
    """Breaks the rule."""

    def _hold_zeros(self, now):
        pass


@pytest.mark.parametrize("name", MOVERS)
def test_zero_is_in_the_weights_whatever_moves_them(name):
    counts = []

    def each(model, partition, optimizer):
        made = optimizer.param_groups[0]["zero"].numpy() > 0
        assert (in_the_weights(model, partition) >= made).all()
        assert (optimizer.zero.numpy() == made).all()
        counts.append(made.sum())

    model, partition, optimizer = run(name, each)
    assert counts[-1] == half(partition) == sum(optimizer.zero) > counts[10]
    assert optimizer.target_reached and optimizer.held.restless
    assert optimizer.group_sparsity == in_the_weights(model, partition).mean()


@pytest.mark.parametrize("name", MOVERS)
def test_zeros_move_without_the_guard(name):
    model, partition, optimizer = run(name, cls=Unguarded)
    made = optimizer.param_groups[0]["zero"].numpy() > 0
    assert made.sum() == half(partition)
    assert in_the_weights(model, partition).sum() < made.sum()
    # and the numbers say so: they are read off the weights
    assert optimizer.group_sparsity <= in_the_weights(model, partition).mean() and not optimizer.target_reached


def test_a_loss_alone_moves_no_zeros_and_nothing_is_guarded():
    _, _, optimizer = run("none")
    assert optimizer.target_reached and not optimizer.held.restless
    model, partition, unguarded = run("none", cls=Unguarded)
    assert unguarded.target_reached and in_the_weights(model, partition).sum() == unguarded.zero.sum()


def test_one_weight_put_in_from_outside_is_seen_by_every_number():
    model, partition, optimizer = run("none")
    before = optimizer.group_sparsity
    axis = partition.axes[0]
    member = next(m for m in axis.members if m.role == "producer")
    first = int(np.flatnonzero(optimizer.zero.numpy()[: axis.size])[0])
    weight = dict(model.named_parameters())[member.param]
    with torch.no_grad():
        weight.select(member.dim, int(member.positions(axis.size)[first, 0])).view(-1)[0] = 1e-20
    assert optimizer.group_sparsity == before - 1 / partition.num_zigs and not optimizer.target_reached
    assert f"{before - 1 / partition.num_zigs:.3f} of them zero" in repr(optimizer)
    assert optimizer.zeros(partition).removed(partition).sum() == half(partition)


# the Trainer --------------------------------------------------------------------------------------


class Average(tf.TrainerCallback):
    """An average of the weights over the steps, put in at the end."""

    def on_train_begin(self, *_, model, **__):
        self.mean = [p.detach().clone() for p in model.parameters()]

    def on_step_end(self, *_, model, **__):
        for mean, p in zip(self.mean, model.parameters(), strict=True):
            mean.lerp_(p.detach(), 0.2)

    def on_train_end(self, *_, model, **__):
        for mean, p in zip(self.mean, model.parameters(), strict=True):
            p.data.copy_(mean)


class Stirs(tf.TrainerCallback):
    """Moves all weights after the last step only."""

    def on_step_end(self, args, state, *_, model, **__):
        if state.global_step == STEPS:
            for p in model.parameters():
                p.data.add_(1e-4)


def trained(folder, caplog, callbacks=(), **more):
    trainer = OTOTrainer(
        small(), arguments(folder, logging_steps=1, **more), train_dataset=rows(), callbacks=[*callbacks]
    )
    trainer.train()
    assert not any("before its target" in r.getMessage() for r in caplog.records)
    warned = [r.getMessage() for r in caplog.records if "put into the model from outside" in r.getMessage()]
    removed = trainer.plan.removed(trainer.partition)
    # report, plan and model agree, whatever happened
    assert trainer.report["group_sparsity"] == removed.mean() and abs(removed.mean() - 0.5) < 0.02
    assert trainer.report["after"]["params"] == sum(p.numel() for p in trainer.model.parameters())
    assert trainer.report["after"]["params"] < trainer.report["before"]["params"]
    return trainer, warned


def test_an_average_of_weights_is_looked_at_before_the_cut(tmp_path, caplog):
    _, warned = trained(tmp_path, caplog, [Average()])
    (text,) = warned
    assert "of them" not in text and "are zeroed again, by which the outputs on a real batch move by" in text
    assert float(text.split("move by ")[1].split(",")[0]) > 1e-6


def test_a_run_without_an_average_warns_of_nothing(tmp_path, caplog):
    assert trained(tmp_path, caplog)[1] == []


def test_log_lines_agree_with_the_weights(tmp_path, caplog):
    trainer, warned = trained(tmp_path, caplog, [Stirs()], shrink=False)  # what is cut out is moved by nothing
    assert len(warned) == 1
    sparsity = [line["oto/group_sparsity"] for line in trainer.state.log_history if "oto/group_sparsity" in line]
    assert max(sparsity[: STEPS - 1]) > 0.4  # control: it had been reached
    assert sparsity[STEPS - 1] == 0.0  # the line of the last step, after which everything moved


# zeros from the start ---------------------------------------------------------------------


def half_dead(what_reads=True):
    """Of 16 units 8 have no weight, and nothing reads them, unless their readers still do."""
    model = small()
    with torch.no_grad():
        model.a.weight[:8] = 0
        model.a.bias[:8] = 0
        if what_reads:
            model.b.weight[:, :8] = 0
    return model


def macs_left(trainer):
    return trainer.report["after"]["macs"] / trainer.report["before"]["macs"]


@pytest.mark.parametrize("shrink", [True, False])
def test_units_that_are_dead_already_count_for_the_target(tmp_path, shrink):
    given = dict(target_group_sparsity=None, target_per_axis={r"^a\.": 0.75}, shrink=shrink, logging_steps=1)
    trainer = OTOTrainer(half_dead(), arguments(tmp_path, **given), train_dataset=rows())
    trainer.train()
    name = next(axis.name for axis in trainer.partition.axes if axis.name.startswith("a."))
    kept = trainer.plan.kept[name]
    assert len(kept) == 4 and min(kept) >= 8  # the dead ones, and 4 of those that lived
    first, *_, last = [line["oto/macs_left"] for line in trainer.state.log_history if "oto/macs_left" in line]
    assert first < 1 and last == pytest.approx(macs_left(trainer))


def test_units_that_will_live_are_not_dead(tmp_path):
    """Control: what reads them gives them gradients, as in a layer that begins at zero."""
    optimizers = []
    for what_reads in (True, False):
        model = half_dead(what_reads)
        partition = partition_zigs(model, {"input_ids": torch.ones(1, 3, dtype=torch.long)})
        optimizers.append(DHSPG(model, partition, total_steps=40))
        optimizers[-1].step()
    dead, living = optimizers
    assert int(dead.zero.sum()) == 8 and int(living.zero.sum()) == 0


def test_a_plan_that_removes_nothing_is_said(caplog):
    model = small()
    partition = partition_zigs(model, {"input_ids": torch.ones(1, 3, dtype=torch.long)})
    compact(model, partition, PruningPlan.from_zeros(model, partition))
    assert "removes nothing" in caplog.text
