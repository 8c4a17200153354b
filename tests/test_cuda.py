"""On a CUDA card: what test_devices.py shows on a simulated one, and what only a card can show.

`pytest -m cuda` takes a few minutes on one card (CUDA_VISIBLE_DEVICES=0 where there are several), and skips everything
without one. HF_OTO_CUDA_TESTS_ON_CPU=1 runs the same lines on the CPU, to see that they run: memory and waits are not
measured then, and what the CPU lacks is left out.
"""

import contextlib
import os
import subprocess
import sys
import warnings
from pathlib import Path

import bitsandbytes
import pytest
import torch
import torch.distributed as dist
import transformers as tf
from test_devices import OPTIMIZERS, batch, half_of, llama, made, net, run, same, weights
from test_trainer import arguments, bert, sentences, train
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hf_oto import DHSPG, OTOTrainer, PruningPlan, certificate, check_zero_invariance, compact, partition_zigs
from hf_oto.calls import as_forwards
from hf_oto.certificate import certify, own_outputs, zeroed
from hf_oto.compaction import Compaction
from hf_oto.cut import Scale
from hf_oto.differences import largest_difference
from hf_oto.evaluating import random_states_kept

ON_CPU = bool(os.environ.get("HF_OTO_CUDA_TESTS_ON_CPU"))
DEVICE = "cpu" if ON_CPU else "cuda"
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not ON_CPU and not torch.cuda.is_available(), reason="no CUDA card"),
    pytest.mark.filterwarnings("default"),  # compilers warn of what a card has and these tests don't use (TF32, say)
]


def in_the_weights(model, partition):
    return PruningPlan.from_zeros(model, partition).removed(partition)


def on(model, dtype=None):
    return model.to(DEVICE, dtype)


def moved(inputs):
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


# the optimizer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_makes_zeros_on_a_card(name):
    model, partition, optimizer = made(name)
    run(on(model), optimizer, device=DEVICE)
    made_zero = optimizer.made_zero.numpy()
    assert made_zero.any() and (in_the_weights(model, partition) >= made_zero).all()
    assert torch.equal(optimizer.zero, optimizer.made_zero)
    if name != "paper":
        assert optimizer.target_reached and made_zero.sum() == partition.num_zigs // 2
    assert not in_the_weights(on(net()), partition).any()  # control


BASES = {
    "fused": (torch.optim.AdamW, dict(fused=True)),
    "foreach": (torch.optim.AdamW, dict(foreach=True)),
    "one by one": (torch.optim.AdamW, dict(foreach=False)),
    "capturable": (torch.optim.AdamW, dict(capturable=True)),
    "sgd": (torch.optim.SGD, dict(momentum=0.9, nesterov=True)),
    "8 bit": (bitsandbytes.optim.AdamW8bit, dict(min_8bit_size=1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BASES)
def test_zeros_are_in_the_weights_after_every_step(name, dtype):
    if ON_CPU and name == "capturable":
        pytest.skip("not on a CPU")
    base, settings = BASES[name]
    model = on(net(), dtype)
    partition = partition_zigs(model, {"input": batch().to(DEVICE, dtype)})
    optimizer = DHSPG(model, partition, base, 1e-2, 0.5, 24, num_events=2, **settings)
    counts = []
    with torch.compiler.set_stance("force_eager"):
        for i in range(24):
            model(batch(i).to(DEVICE, dtype)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            made_zero = optimizer.made_zero.numpy()
            assert (in_the_weights(model, partition) >= made_zero).all()
            counts.append(made_zero.sum())
    assert counts[0] == 0 and counts[-1] == partition.num_zigs // 2


def test_a_scaler_skips_steps():
    """GradScaler: a step with infinite gradients is none, neither for the base nor for the schedule."""
    model, _, optimizer = made("adamw")
    on(model)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**4)
    for i in range(24):
        loss = model(batch(i).to(DEVICE)).square().mean()
        scaler.scale(loss * (torch.inf if i == 5 else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert optimizer.param_groups[0]["dhspg_step"] == 23 and optimizer.target_reached
    assert all(p.isfinite().all() for p in model.parameters())


@contextlib.contextmanager
def waits(found):
    """Notes where the host waits for the card, as torch sees it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if not ON_CPU:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            if not ON_CPU:
                torch.cuda.set_sync_debug_mode("default")
    found += [str(w.message) for w in caught if "called a synchronizing" in str(w.message)]


def test_a_step_without_an_event_waits_once_at_most():
    model = net(depth=6)
    partition = partition_zigs(model, {"input": batch()})
    on(model)
    optimizer = DHSPG(model, partition, torch.optim.AdamW, 1e-2, 0.5, 24, num_events=2, fused=True)
    found = {}
    for i in range(24):
        model(batch(i).to(DEVICE)).square().mean().backward()
        found[i + 1] = []
        with waits(found[i + 1]):
            optimizer.step()
        optimizer.zero_grad()
    schedule = optimizer.schedule
    of_events = {1, *schedule.sample_steps, *schedule.factors}
    assert all(len(of_step) <= 1 for step, of_step in found.items() if step not in of_events)
    assert all(not of_step for step, of_step in found.items() if step not in of_events and step < 8)
    assert ON_CPU or max(len(found[step]) for step in of_events) > 1  # control: waits are seen


def test_a_state_goes_on_on_a_card():
    model, _, optimizer = made("adamw")
    run(on(model), optimizer, device=DEVICE)
    first, _, interrupted = made("adamw")
    run(on(first), interrupted, stop=10, device=DEVICE)
    state = interrupted.state_dict()
    for group in state["param_groups"]:  # as accelerate loads it
        group.update({key: value.to(DEVICE) for key, value in group.items() if torch.is_tensor(value)})
    second, _, resumed = made("adamw")
    on(second).load_state_dict(first.state_dict())
    resumed.load_state_dict(state)
    run(second, resumed, start=10, device=DEVICE)
    assert same(weights(second), weights(model)) and torch.equal(resumed.zero, optimizer.zero)
    assert not same(weights(first), weights(model))  # control


# certificate and cut ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_certificate_and_cut_on_a_card(dtype):
    model, partition, inputs = llama()
    on(model, dtype)
    inputs = moved(inputs)
    cut = Compaction(model, partition).resolve(half_of(partition))
    before = weights(model)
    found = certify(model, cut, inputs)
    assert found.holds and found.tolerance == 1e-9 and same(weights(model), before)
    wrong = cut._replace(scales=dict.fromkeys(cut.scales, Scale(1.0, 0)))
    assert cut.scales and not certify(model, wrong, inputs).holds  # control
    assert check_zero_invariance(model, partition, inputs) < 1e-9
    with zeroed(model, cut, noise=True):
        assert not same(weights(model), before)
    assert same(weights(model), before)


def test_a_compact_llama_generates_on_a_card(tmp_path):
    model, partition, inputs = llama()
    on(model)
    inputs = moved(inputs)
    settings = dict(max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None, disable_compile=True)
    dense = model.generate(**inputs, **settings)
    partition.zero_(model, half_of(partition))
    # averages over the stream are scaled by the cut alone: of the zeroed model the compact one is the twin
    expected = own_outputs(model, as_forwards(inputs))
    tokens = model.generate(**inputs, **settings)
    small = compact(model, partition, half_of(partition))
    assert largest_difference(expected, own_outputs(small, as_forwards(inputs))) < 1e-4
    small.save_pretrained(tmp_path)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path, device_map=DEVICE)
    assert loaded.device.type == DEVICE and loaded.num_parameters() < 0.6 * sum(map(torch.numel, weights(llama()[0])))
    for cache in ("dynamic", "static"):
        assert torch.equal(loaded.generate(**inputs, **settings, cache_implementation=cache), tokens)
    assert not torch.equal(dense, tokens)  # control


def test_training_draws_the_numbers_it_would_have_drawn():
    """Also where the model lies on the CPU, as it does before FSDP2 shards it, and training draws on the card."""
    torch.rand(1, device=DEVICE)  # the card has a generator from now on
    for model in (net(), on(net())):
        torch.manual_seed(1)
        expected = torch.rand(3, device=DEVICE)
        torch.manual_seed(1)
        x = batch().to(next(model.parameters()).device)
        check_zero_invariance(model, partition_zigs(model, {"input": x}), {"input": x})
        with random_states_kept(model):
            torch.manual_seed(2)
            assert not torch.equal(torch.rand(3, device=DEVICE), expected)  # control
        assert torch.equal(torch.rand(3, device=DEVICE), expected)


# memory -------------------------------------------------------------------------------------------


def peak(compute):
    """The memory, in bytes, that the card needed beside what lay there before; 0 on the CPU."""
    if ON_CPU:
        compute()
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    compute()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_outputs_are_compared_in_little_memory(monkeypatch):
    size = (2, 1024, 64 if ON_CPU else 32 * 1024)
    x = torch.randn(size, device=DEVICE, dtype=torch.float64)  # 512 MiB
    y = x.clone()
    assert peak(lambda: largest_difference([x], [y])) < 200 * 2**20
    monkeypatch.setattr(certificate, "PIECE", 2**40)
    assert ON_CPU or peak(lambda: largest_difference([x], [y])) > 500 * 2**20  # control


def test_the_certificate_keeps_little_of_large_logits(monkeypatch):
    vocabulary, tokens = (64, 32) if ON_CPU else (64 * 1024, 2048)
    size = dict(vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_attention_heads=4)
    model = on(tf.LlamaForCausalLM(tf.LlamaConfig(**size, num_hidden_layers=1, num_key_value_heads=2)))
    inputs = {"input_ids": torch.arange(2 * tokens, device=DEVICE).view(2, tokens) % vocabulary}
    partition = partition_zigs(model, {"input_ids": inputs["input_ids"][:, :8]})
    cut = Compaction(model, partition).resolve(half_of(partition))
    peaks = {}
    for most in (2**22, 2**40):  # the second one is the control: all logits are kept, 2 GiB of them in double
        monkeypatch.setattr(certificate, "MOST_ENTRIES", most)
        peaks[most] = peak(lambda: certify(model, cut, inputs))
    assert ON_CPU or peaks[2**22] < 0.7 * peaks[2**40]


# the Trainer --------------------------------------------------------------------------------------

RUNS = {
    "float32": {},
    "fused": {"optim": "adamw_torch_fused"},
    "bf16": {"bf16": True},
    "fp16": {"fp16": True},
    "compiled": {"torch_compile": True},
    "whole to the end": {"shrink": False, "bf16": True},
    "paper": {"pruning_mode": "paper"},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_the_trainer(tmp_path, name):
    if ON_CPU and name in ("fp16", "compiled"):
        pytest.skip("not on a CPU, or slowly")
    args = arguments(tmp_path / "out", use_cpu=ON_CPU, max_steps=40, **RUNS[name])
    trainer = train(tmp_path, args=args)
    report = trainer.report
    assert report["max_output_difference"] < 1e-9 and DEVICE in report["after"]["measured_on"].lower()
    assert all(p.device.type == DEVICE for p in trainer.model.parameters())
    if name != "paper":
        assert report["group_sparsity"] == 0.5 and report["after"]["params"] < report["before"]["params"]
    trainer.save_model(str(tmp_path / "compact"))
    loaded = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "compact").to(DEVICE).eval()
    assert same(weights(loaded), weights(trainer.model))
    ids = torch.tensor(sentences(4)["input_ids"], device=DEVICE)
    rounding = 1e-5 if name in ("float32", "fused", "paper") else 0.05
    with torch.no_grad():
        logits = loaded(ids).logits
        assert (logits - trainer.model.eval()(ids).logits).abs().max() < rounding
        assert (logits - on(bert()).eval()(ids).logits).abs().max() > rounding  # control
    assert trainer.evaluate()["eval_loss"] > 0


# FSDP2 --------------------------------------------------------------------------------------------


def of_one_rank(folder):
    """FSDP2 with one rank: the optimizer alone, then the Trainer. It runs in a process of its own."""
    dist.init_process_group("gloo" if ON_CPU else "nccl")
    model, _, optimizer = made("adamw")
    run(on(model), optimizer, device=DEVICE)
    sharded, _, other = made("adamw")
    mesh = init_device_mesh(DEVICE, (1,))
    for layer in sharded:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    other.param_groups[0]["params"] = list(sharded.parameters())
    run(sharded, other, device=DEVICE)
    whole = [p.full_tensor().detach().cpu() for p in sharded.parameters()]
    assert all(isinstance(p, DTensor) and p.device.type == DEVICE for p in sharded.parameters())
    assert torch.equal(other.zero, optimizer.zero) and optimizer.target_reached
    for a, b in zip(whole, weights(model), strict=True):
        torch.testing.assert_close(a, b)

    if ON_CPU:
        import distributed_worker

        distributed_worker.force_fsdp2()
    seen = []

    class Watch(tf.TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            seen.append({(type(p), p.device.type) for p in model.parameters()})

    # accelerate's default for BERT shards the embeddings twice, and fails
    config = {"version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"]}
    args = arguments(folder / "out", use_cpu=ON_CPU, fsdp=True, fsdp_config=config)
    trainer = OTOTrainer(bert(), args, train_dataset=sentences(), callbacks=[Watch()])
    trainer.train()
    assert all({kind.__name__ for kind, _ in types} == {"DTensor"} for types in seen) and len(seen) == 40
    assert all({device for _, device in types} == {DEVICE} for types in seen)
    assert trainer.report["group_sparsity"] == 0.5 and trainer.report["max_output_difference"] < 1e-9
    trainer.save_model(str(folder / "compact"))
    dist.barrier()
    dist.destroy_process_group()


def test_fsdp2_with_one_rank(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    done = subprocess.run(
        [*launch, str(Path(__file__)), str(tmp_path)], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-5000:]
    loaded = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "compact").to(DEVICE)
    dense = bert().num_parameters()
    assert loaded.num_parameters() < dense
    ids = torch.tensor(sentences(4)["input_ids"], device=DEVICE)
    assert loaded(ids).logits.isfinite().all()


if __name__ == "__main__":
    of_one_rank(Path(sys.argv[1]))
