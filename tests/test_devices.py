"""Cards, without one: the optimizer, the certificate and the cut on a simulated device (simulated_device.py).

On it everything computes what it computes on the CPU, bit by bit, and what would mix devices on a card raises.
"""

import collections
import contextlib
import copy
import types
from unittest import mock

import accelerate
import pytest
import torch
import transformers as tf
from simulated_device import SimulatedDevice
from test_trainer import arguments, bert, sentences, train
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from hf_oto import (
    DHSPG,
    OTOTrainer,
    PruningPlan,
    calls,
    certificate,
    check_zero_invariance,
    cut_state,
    partition_zigs,
    salience,
    zeros,
)
from hf_oto import cut as cut_module
from hf_oto import paper as paper_module
from hf_oto.calls import Forward, at_home
from hf_oto.certificate import certify, own_outputs, zeroed
from hf_oto.compaction import Compaction
from hf_oto.cut_state import why_uncuttable
from hf_oto.differences import largest_difference
from hf_oto.evaluating import random_states_kept
from hf_oto.paper import PaperDHSPG, Penalty
from hf_oto.zigs import OTOError

STEPS = 24
MIXED = "on the CPU among tensors on cuda:0"


def net(depth=2):
    torch.manual_seed(0)
    hidden = [layer for _ in range(depth) for layer in (nn.Linear(16, 16), nn.ReLU())]
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), *hidden, nn.Linear(16, 3))


def batch(i=0):
    generator = torch.Generator().manual_seed(i)
    return torch.randn(8, 6, generator=generator)


OPTIMIZERS = {
    "adamw": lambda *args: DHSPG(*args, torch.optim.AdamW, 1e-2, 0.5, STEPS, num_events=2),
    "sgd": lambda *args: DHSPG(*args, torch.optim.SGD, 1e-2, 0.5, STEPS, num_events=2, momentum=0.9),
    "own salience": lambda *args: DHSPG(
        *args, lr=1e-2, total_steps=STEPS, num_events=2, salience=lambda moments: moments.weight_squared
    ),
    "paper": lambda *args: PaperDHSPG(
        *args, torch.optim.SGD, 0.3, 0.5, total_steps=STEPS, penalty=Penalty(0.5, 2.0, 10.0, 0.0)
    ),
}


def made(name, depth=2):
    model = net(depth)
    partition = partition_zigs(model, {"input": batch()})
    return model, partition, OPTIMIZERS[name](model, partition)


def run(model, optimizer, start=0, stop=STEPS, device="cpu", each=lambda i: None):
    for i in range(start, stop):
        model(batch(i).to(device)).square().mean().backward()
        each(i + 1)
        optimizer.step()
        optimizer.zero_grad()


def weights(model):
    return [p.detach().cpu().clone() for p in model.parameters()]


def same(a, b):
    return all(map(torch.equal, a, b))


# the simulation itself ----------------------------------------------------------------------------


def test_what_is_wrong_on_a_card_is_wrong_here():
    x = torch.ones(2)
    with SimulatedDevice("mps:0", has_doubles=False) as simulated:
        y = torch.ones(2, device="mps:0")
        assert [t.device.type for t in (y, y * 2, y[:1], torch.zeros_like(y), y.sum(), x.to(y), y.cpu(), x)] == (
            ["mps"] * 6 + ["cpu"] * 2
        )
        for wrong in (
            lambda: x + y,
            lambda: torch.cat([x, y]),
            lambda: x * y.sum(),
            lambda: y.index_select(0, torch.tensor([1])),
            lambda: y.double(),
            lambda: y.numpy(),
            lambda: torch.zeros(2, dtype=torch.float64, device=y.device),
            lambda: torch.randn(2, generator=torch.Generator(), device=y.device),
        ):
            with pytest.raises((RuntimeError, TypeError)):
                wrong()
        simulated.waits.clear()
        assert torch.equal((y * x.sum() + 1).cpu(), x + 2)  # a number of the CPU may be among them
        bool(y.any()), y.tolist(), y[torch.tensor([0])], y[y > 0], y.copy_(x), x.copy_(y)
        assert simulated.waits == [
            "copy from device", "_local_scalar_dense", "tolist", "copy to device", "nonzero", "copy_", "copy_"
        ]  # fmt: skip
    assert y.device.type == "cpu"


# the optimizer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_doubles", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_does_the_same_on_a_device(name, has_doubles):
    model, _, optimizer = made(name)
    run(model, optimizer)
    assert optimizer.zero.any() and not same(weights(model), weights(net()))
    on_device, _, other = made(name)
    with SimulatedDevice(has_doubles=has_doubles) as simulated:
        simulated.take_(on_device)
        run(on_device, other, device="cuda:0")
        assert same(weights(on_device), weights(model)) and torch.equal(other.zero, optimizer.zero)
        states = [v for state in other.state.values() for v in state.values() if torch.is_tensor(v) and v.dim()]
        assert all(value.device == simulated.device for value in states)
        assert other.group_sparsity == optimizer.group_sparsity and repr(other) == repr(optimizer)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_may_lie_on_the_device(name):
    """accelerate moves all that is loaded to the device, masks and salience too."""
    model, _, optimizer = made(name)
    run(model, optimizer)
    first, _, interrupted = made(name)
    second, _, resumed = made(name)
    with SimulatedDevice(has_doubles=False) as simulated:
        run(simulated.take_(first), interrupted, stop=10, device="cuda:0")
        state = interrupted.state_dict()
        for group in state["param_groups"]:
            group.update({key: value.to("cuda:0") for key, value in group.items() if torch.is_tensor(value)})
        simulated.take_(second).load_state_dict(first.state_dict())
        resumed.load_state_dict(state)
        assert resumed.param_groups[0]["salience"].device == simulated.device
        run(second, resumed, start=10, device="cuda:0")
        assert same(weights(second), weights(model))


def waits_of_steps(name, depth=2):
    model, _, optimizer = made(name, depth)
    waits = {}
    with SimulatedDevice() as simulated:
        simulated.take_(model)
        for i in range(STEPS):
            run(model, optimizer, i, i + 1, "cuda:0", each=lambda _: simulated.waits.clear())
            waits[i + 1] = [*simulated.waits]
    return optimizer, waits


def test_a_step_without_an_event_waits_once_at_most(monkeypatch):
    optimizer, waits = waits_of_steps("adamw")
    schedule = optimizer.schedule
    assert schedule.factors == {5: 0.5, 8: 0.0, 11: 0.5, 14: 0.0}
    of_events = {1, *schedule.sample_steps, *schedule.factors}
    quiet = {step: found for step, found in waits.items() if step not in of_events}
    assert {step for step, found in quiet.items() if found} == {step for step in quiet if step > 8}  # the one look
    assert max(map(len, quiet.values())) == 1
    # however many parameters there are
    _, of_more = waits_of_steps("adamw", depth=6)
    assert max(len(of_more[step]) for step in quiet) == 1

    class Forgetful(zeros.HeldZeros):
        """Breaks the rule: finds the positions anew in every step, as before."""

        def _zero_rows(self, zero, params):
            self._mask = None
            return super()._zero_rows(zero, params)

    monkeypatch.setattr("hf_oto.zig_optimizer.HeldZeros", Forgetful)
    _, of_forgetful = waits_of_steps("adamw")
    assert min(len(of_forgetful[step]) for step in quiet if step > 8) > 3


def test_paper_mode_copies_no_index_where_nothing_changes(monkeypatch):
    def to_device(depth):
        optimizer, waits = waits_of_steps("paper", depth)
        copies = [collections.Counter(found)["copy to device"] for found in waits.values()]
        assert optimizer.zero.any()
        return copies

    assert min(to_device(2)[3:]) == min(to_device(6)[3:]) == 1  # the pull of all groups

    def anew(self, groups, slices, params):
        rows = paper_module.rows_of(groups, slices, params)
        return [(each, each.slice.owner[each.positions].to(each.index.device)) for each in rows]

    monkeypatch.setattr(paper_module.RowsOfGroups, "of", anew)
    assert min(to_device(2)[3:]) > 1  # control


def test_a_card_gets_larger_pieces(monkeypatch):
    def num_pieces(model, optimizer, device):
        model(batch().to(device)).sum().backward()
        return len([*optimizer._parts(salience.inner)])

    monkeypatch.setattr(salience, "PIECE", 32)
    model, _, optimizer = made("adamw")
    on_the_cpu = num_pieces(model, optimizer, "cpu")
    model, _, optimizer = made("adamw")
    with SimulatedDevice() as simulated:
        assert num_pieces(simulated.take_(model), optimizer, "cuda:0") == len(optimizer._group) < on_the_cpu


def test_a_copy_of_the_paper_goes_on_elsewhere():
    at = 12  # no ZIG becomes zero in this step, so that the next one knows the positions
    model, _, optimizer = made("paper")
    on_device, _, other = made("paper")
    with SimulatedDevice() as simulated:
        run(simulated.take_(on_device), other, stop=at, device="cuda:0")
        twin, twin_optimizer = copy.deepcopy((on_device, other))
        for p in twin.parameters():
            p.data = p.data.to("cpu")
        run(twin, twin_optimizer, start=at)
    run(model, optimizer)
    assert same(weights(twin), weights(model)) and not same(weights(on_device), weights(model))


def on_cpu(rows):
    return [each._replace(index=each.positions) for each in rows]


@pytest.mark.parametrize("module", ["zeros", "zig_optimizer", "paper"])
def test_a_planted_index_on_the_cpu_is_found(monkeypatch, module):
    place = __import__("hf_oto." + module, fromlist=["rows_of"])
    rows_of = place.rows_of
    monkeypatch.setattr(place, "rows_of", lambda *args: on_cpu(rows_of(*args)))
    model, _, optimizer = made("paper" if module == "paper" else "adamw")
    with SimulatedDevice() as simulated, pytest.raises(RuntimeError, match=MIXED):
        run(simulated.take_(model), optimizer, device="cuda:0")


# certificate and cut ------------------------------------------------------------------------------


def llama():
    torch.manual_seed(0)
    size = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = tf.LlamaConfig(**size, num_key_value_heads=2)
    model = tf.LlamaForCausalLM(config).eval()
    inputs = {"input_ids": torch.arange(24).view(2, 12)}
    return model, partition_zigs(model, inputs), inputs


def half_of(partition):
    return PruningPlan({axis.name: range(axis.size - axis.size // 2) for axis in partition.axes})


@pytest.mark.parametrize("has_doubles", [True, False])
def test_a_llama_is_certified_cut_and_grown_on_a_device(has_doubles):
    model, partition, inputs = llama()
    with SimulatedDevice(has_doubles=has_doubles) as simulated:
        simulated.take_(model)
        inputs = {name: tensor.to("cuda:0") for name, tensor in inputs.items()}
        assert check_zero_invariance(model, partition, inputs) < (1e-9 if has_doubles else 1e-5)
        before = weights(model)
        compaction = Compaction(model, partition)
        cut = compaction.resolve(half_of(partition))
        found = certify(model, cut, inputs)
        assert found.holds and found.tolerance == (1e-9 if has_doubles else 1e-5) and same(weights(model), before)
        partition.zero_(model, half_of(partition))
        full = own_outputs(model, calls.as_forwards(inputs))
        compaction.keep_(model, cut)
        assert sum(p.numel() for p in model.parameters()) < 0.6 * sum(p.numel() for p in before)
        assert largest_difference(full, own_outputs(model, calls.as_forwards(inputs))) < 1e-5
        assert all(tensor.device == simulated.device for tensor in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_after_a_cut_and_a_dense_model_comes_back(name):
    def cut_run(device):
        model, partition, optimizer = made(name)
        if device is not None:
            device.take_(model)
        place = "cpu" if device is None else device.device
        run(model, optimizer, stop=16, device=place)
        compaction = Compaction(model, partition)
        cut = compaction.resolve(optimizer.zeros(partition))
        assert cut.removed.any() and why_uncuttable(optimizer.base) is None
        positions = cut.positions
        compaction.keep_(model, cut)
        optimizer.cut_(dict(model.named_parameters()), positions)
        run(model, optimizer, start=16, device=place)
        small = weights(model)
        compaction.undo_(model)
        assert [p.shape for p in model.parameters()] == [p.shape for p in net().parameters()]
        return small + weights(model) + [model(batch().to(place)).detach().cpu()]

    expected = cut_run(None)
    with SimulatedDevice(has_doubles=False) as simulated:
        assert same(cut_run(simulated), expected)


PLANTED = {
    "state": (cut_state, "without_positions", lambda tensor, gone: cut_state_on_cpu(tensor, gone)),
    "cut": (cut_module, "kept_positions", lambda size, gone, device: positions_on_cpu(size, gone)),
}


def cut_state_on_cpu(tensor, gone_of_dims):
    for dim, gone in gone_of_dims.items():
        tensor = tensor.index_select(dim, positions_on_cpu(tensor.shape[dim], gone))
    return tensor


def positions_on_cpu(size, gone):
    return torch.tensor([i for i in range(size) if i not in set(gone)])


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_index_of_a_cut_is_found(monkeypatch, name):
    monkeypatch.setattr(*PLANTED[name])
    model, partition, optimizer = made("adamw")
    with SimulatedDevice() as simulated:
        run(simulated.take_(model), optimizer, device="cuda:0")
        compaction = Compaction(model, partition)
        cut = compaction.resolve(optimizer.zeros(partition))
        positions = cut.positions
        with pytest.raises(RuntimeError, match=MIXED):
            compaction.keep_(model, cut)
            optimizer.cut_(dict(model.named_parameters()), positions)


def test_a_planted_index_of_a_growth_is_found(monkeypatch):
    model, partition, optimizer = made("adamw")
    with SimulatedDevice() as simulated:
        run(simulated.take_(model), optimizer, device="cuda:0")
        compaction = Compaction(model, partition)
        compaction.keep_(model, compaction.resolve(optimizer.zeros(partition)))
        monkeypatch.setattr(*PLANTED["cut"])
        with pytest.raises(RuntimeError, match=MIXED):
            compaction.undo_(model)


def test_noise_is_drawn_on_the_device(monkeypatch):
    model, partition, _ = made("adamw")
    before = weights(model)
    with SimulatedDevice() as simulated:
        simulated.take_(model)
        cut = Compaction(model, partition).resolve(half_of(partition))
        writes = []
        write_ = certificate._Overwritten.write_

        def counted(*args, **more):
            writes.append(args)
            write_(*args, **more)

        monkeypatch.setattr(certificate._Overwritten, "write_", counted)
        simulated.waits.clear()
        with zeroed(model, cut, noise=True):
            copies = collections.Counter(simulated.waits)["copy to device"]
            assert copies == len(writes) > 0  # of the indices alone, no noise is copied
            assert not same(weights(model), before)
        assert same(weights(model), before)
        generator = torch.Generator
        monkeypatch.setattr(torch, "Generator", lambda device: generator())
        with pytest.raises(RuntimeError, match="a generator of"), zeroed(model, cut, noise=True):
            pass


def test_no_card_but_the_models_own_is_asked_for_its_random_state(monkeypatch):
    from hf_oto import compact, to_dense

    model, partition, _ = llama()
    compact(model, partition, half_of(partition))
    fork = torch.random.fork_rng

    def strict(devices=None, **more):
        assert devices is not None, "every card is asked"
        return fork(devices, **more)

    monkeypatch.setattr(torch.random, "fork_rng", strict)
    with pytest.raises(AssertionError), torch.random.fork_rng():
        pass
    before = torch.get_rng_state()
    to_dense(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_cards_generator_goes_on_while_the_model_lies_on_the_cpu(monkeypatch):
    """As it does before FSDP2 shards it: the certificate seeds the generators of all devices."""
    put_back = []
    generator = types.SimpleNamespace(
        get_rng_state=lambda device: f"of {device}", set_rng_state=lambda *state: put_back.append(state)
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: generator)
    with random_states_kept(net()):
        pass
    assert not put_back  # control: no card, or one on which no number can have been drawn
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    with random_states_kept(net()):
        assert not put_back
    assert put_back == [("of cuda:1", torch.device("cuda", 1))]


# where inputs go ----------------------------------------------------------------------------------


def test_arguments_follow_their_model():
    model = net()
    lengths = torch.ones(1)
    with SimulatedDevice() as simulated:
        (forward,) = at_home([Forward((batch(),))], model)
        assert forward.copy_for(model).args[0].device.type == "cpu"
        simulated.take_(model)
        outputs = own_outputs(model, [forward])
        assert outputs[0].device == simulated.device
        with pytest.raises(RuntimeError, match=MIXED):  # control: of a call without a home nothing follows
            own_outputs(model, [Forward((batch(),))])
        # what lay elsewhere than the model stays where it is
        (later,) = at_home([Forward((batch().to("cuda:0"), lengths))], model)
        assert [tensor.device.type for tensor in later.copy_for(model).args] == ["cuda", "cpu"]
        model.to("cpu")
        assert [tensor.device.type for tensor in later.copy_for(model).args] == ["cpu", "cpu"]
    meta = net().to("meta")
    assert forward.copy_for(meta).args[0].device.type == "cpu"


@contextlib.contextmanager
def on_device(simulated, arguments):
    """The Trainer's device, and accelerate's, are the simulated one."""
    vars(arguments)["_setup_devices"] = simulated.device
    device = property(lambda self: simulated.device)
    with simulated, mock.patch.object(accelerate.Accelerator, "device", device):
        yield


class Noted(list):
    """What hooks note; a plain list would be put back with all that the model's modules keep."""


def devices_of_layers(model):
    """The devices where the layers have had their weights when they ran, on values and not on meta, as they come."""
    devices = Noted()

    def note(module, args):
        if type(module.weight) is nn.Parameter and not isinstance(args[0], FakeTensor):
            devices.append(module.weight.device.type)

    for path, module in model.named_modules():
        if "layer" in path and isinstance(module, nn.Linear):
            module.register_forward_pre_hook(note)
    return devices


def test_under_fsdp2_the_model_runs_where_it_will_train(tmp_path, monkeypatch):
    args, model, simulated = arguments(tmp_path), bert(), SimulatedDevice()
    monkeypatch.setattr("hf_oto.by_layers._disable_current_modes", simulated.without_other_modes)
    with on_device(simulated, args):
        trainer = OTOTrainer(model, args, train_dataset=sentences())
        model.to("cpu")  # FSDP2 leaves it there until training begins
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        devices = devices_of_layers(model)
        forwards = at_home(trainer.trace_calls(), model)
        assert set(devices) == {"cuda"}
        assert {tensor.device.type for tensor in calls.input_tensors(forwards)} == {"cpu"}
        devices.clear()
        partition = partition_zigs(model, forwards, device=simulated.device)
        assert set(devices) == {"cuda"}
        assert str(partition) == str(partition_zigs(bert(), forwards))
        for name, p in model.named_parameters():
            assert p.device.type == "cpu" and torch.equal(p, weights[name])
        model.to("cuda:0")
        assert check_zero_invariance(model, partition, forwards) < 1e-9


def test_under_fsdp2_a_model_whose_layers_do_not_run_alone_runs_where_it_lies(tmp_path, monkeypatch):
    args, model, simulated = arguments(tmp_path), bert(), SimulatedDevice()
    first = model.bert.encoder.layer[0].output.dense
    model.classifier.register_forward_pre_hook(lambda module, args: args[0] + first.weight.sum())  # from outside
    monkeypatch.setattr("hf_oto.by_layers._disable_current_modes", simulated.without_other_modes)
    with on_device(simulated, args):
        trainer = OTOTrainer(model, args, train_dataset=sentences())
        model.to("cpu")
        devices = devices_of_layers(model)
        forwards = at_home(trainer.trace_calls(), model)
        assert set(devices) == {"cuda", "cpu"} and devices[-1] == "cpu"
        assert {tensor.device.type for tensor in calls.input_tensors(forwards)} == {"cpu"}
        assert partition_zigs(model, forwards, device=simulated.device).axes
        assert devices[-1] == "cpu"
        monkeypatch.setattr("hf_oto.first_calls.send_to_device", lambda inputs, device: inputs)
        with pytest.raises(OTOError, match=MIXED):
            trainer.trace_calls()


@pytest.mark.parametrize(("device", "mode"), [("mps:0", "scheduled"), ("cuda:0", "paper")])
def test_a_whole_run_does_the_same_on_a_device(tmp_path, device, mode):
    more = {"max_steps": 24, "pruning_mode": mode}
    expected = train(tmp_path, **more)
    simulated = SimulatedDevice(device, has_doubles=device != "mps:0")
    args = arguments(tmp_path, **more)
    with on_device(simulated, args):
        trainer = train(tmp_path, args=args)
        assert all(p.device == simulated.device for p in trainer.model.parameters())
        assert f"measured on a batch of 2 x 8, {device}" in str(trainer.report)
        assert same(weights(trainer.model), weights(expected.model))
        assert trainer.plan == expected.plan and (mode == "paper" or trainer.report["group_sparsity"] == 0.5)


# comparing ----------------------------------------------------------------------------------------


def test_of_very_large_outputs_some_rows_are_compared(monkeypatch):
    model, partition, inputs = llama()
    cut = Compaction(model, partition).resolve(half_of(partition))
    whole = certify(model, cut, inputs)
    monkeypatch.setattr(certificate, "MOST_ENTRIES", 5 * 64)
    kept, sizes = own_outputs(model, calls.as_forwards(inputs))
    assert kept.shape == (5, 64) and sizes.tolist() == [2, 12, 64]
    some = certify(model, cut, inputs)
    assert whole.holds and some.holds and some != whole
    wrong = cut._replace(scales=dict.fromkeys(cut.scales, cut_module.Scale(1.0, 0)))
    assert cut.scales and not certify(model, wrong, inputs).holds  # control: a wrong cut still shows
    assert largest_difference([kept, sizes], [kept, sizes]) == 0
    assert largest_difference([kept, sizes], [kept, sizes + 1]) == float("inf")


def test_a_sum_of_halves_is_a_number():
    x = torch.full((2, 70_000), 2.0, dtype=torch.float16)
    x[0, 0] = 4.0
    y = x.clone()
    y[0, 1] = 4.0
    assert not x.sum().isfinite()
    assert largest_difference([x], [y]) == pytest.approx(1.0, rel=1e-2) and largest_difference([x], [x]) == 0
