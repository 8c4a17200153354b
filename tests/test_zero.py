"""DeepSpeed's ZeRO ends where one process ends: the same zeros, weights, checkpoints and compact model.

What is launched is zero_worker.py; see there for each run and what it breaks. One launch serves most laws.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import distributed_worker as plain
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import nn

from hf_oto import DHSPG, OTOError, PruningPlan
from hf_oto.flat import boxes
from hf_oto.resume import lacks
from hf_oto.zero import ZeroDHSPG, refuse_config

ROOT = Path(__file__).parents[1]
WORKER = str(ROOT / "tests" / "zero_worker.py")


def launch(*command, **environment):
    quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=os.environ | quiet | environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-9000:]
    return done.stdout


def results(folder, scenario):
    """What both ranks wrote."""
    return [torch.load(folder / f"{scenario}.{rank}.pt", weights_only=True) for rank in range(2)]


def distance(a, b):
    """The largest difference of two runs' weights; inf if they have other zeros."""
    same = torch.equal(a["zero"], b["zero"]) if "zero" in a else a["plan"] == b["plan"]
    if not same:
        return math.inf
    assert a["weights"].keys() == b["weights"].keys()
    return max(float((w.double() - b["weights"][n].double()).abs().max()) for n, w in a["weights"].items())


# boxes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (1, 4), (4, 1), (2, 3, 4), (3, 1, 2), (2, 2, 2, 3)])
def test_boxes_are_the_run_in_its_order(shape):
    numbers = torch.arange(math.prod(shape)).view(shape)
    size = numbers.numel()
    most = 1
    for start in range(size):
        for stop in range(start + 1, size + 1):
            found = boxes(shape, start, stop)
            parts = [
                numbers[tuple(slice(f, f + n) for f, n in zip(box.first, box.shape, strict=True))] for box in found
            ]
            assert [part.shape for part in parts] == [box.shape for box in found]
            together = torch.cat([part.flatten() for part in parts])
            assert torch.equal(together, torch.arange(start, stop))
            most = max(most, len(found))
    assert most <= max(1, 2 * len(shape) - 1)  # a handful
    assert boxes(shape, 0, 0) == []


# what is refused ----------------------------------------------------------------------------------

GOOD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}, "mics_shard_size": -1}}


def zero(**settings):
    return {"zero_optimization": {"stage": 2} | settings}


@pytest.mark.parametrize(
    "config, fact",
    [
        (GOOD | {"optimizer": {"type": "AdamW"}}, "remove the section `optimizer`"),
        ({}, "stage 0 is not supported.*DDP"),
        (zero(stage=0), "stage 0 is not supported.*DDP"),
        (zero(offload_optimizer={"device": "cpu"}), "`offload_optimizer`.*leave it out"),
        (zero(offload_param={"device": "nvme"}), "`offload_param`.*leave it out"),
        (zero(cpu_offload=True), "`cpu_offload`.*leave it out"),
        (zero(elastic_checkpoint=True), "`elastic_checkpoint`.*ordinary checkpoints"),
        (zero(zero_quantized_gradients=True), "`zero_quantized_gradients`.*leave it out"),
        (zero(zero_hpz_partition_size=2), "`zero_hpz_partition_size`.*leave it out"),
        (zero(round_robin_gradients=True), "`round_robin_gradients`.*leave it out"),
        (GOOD | {"checkpoint": {"load_universal": True}}, "universal checkpoints.*ordinary"),
        (GOOD | {"compile": {"deepcompile": True}}, "`deepcompile`.*leave it out"),
        (GOOD | {"elasticity": {"enabled": True}}, "`elasticity`.*leave it out"),
        (GOOD | {"torch_autocast": {"enabled": True, "dtype": "float16"}}, "float16.*bfloat16"),
    ],
)
def test_a_config_is_refused_with_the_way_out(config, fact, tmp_path):
    with pytest.raises(OTOError, match=fact):
        refuse_config(config)
    file = tmp_path / "zero.json"
    file.write_text(json.dumps(config))
    with pytest.raises(OTOError, match=fact):
        refuse_config(file)
    refuse_config(GOOD)


@pytest.mark.parametrize(
    "base, fact",
    [
        (torch.optim.Adafactor, "depends on the shape"),
        (torch.optim.Adagrad, "made its state for whole parameters"),
        (torch.optim.LBFGS, "LBFGS"),
        (torch.optim.AdamW, None),
        (torch.optim.SGD, None),
    ],
)
def test_a_base_that_needs_shapes_is_refused(base, fact):
    settings = {"target_group_sparsity": 0.5, "total_steps": plain.STEPS, "lr": 0.1}
    if fact is None:
        ZeroDHSPG(plain.net(), plain.PARTITION, base, **settings)
    else:
        with pytest.raises(OTOError, match=f"{fact}.*under ZeRO parameters are flat: use AdamW or SGD"):
            ZeroDHSPG(plain.net(), plain.PARTITION, base, **settings)


def test_a_checkpoint_without_the_states_of_deepspeed_is_incomplete(tmp_path):
    for name in ("scheduler.pt", "rng_state_0.pth", "model.safetensors"):
        (tmp_path / name).touch()
    tf.TrainerState().save_to_json(str(tmp_path / "trainer_state.json"))
    (tmp_path / "latest").write_text("global_step5\n")
    assert lacks(str(tmp_path), with_scaler=False) == ["global_step5/*_optim_states.pt"]
    (tmp_path / "global_step5").mkdir()
    (tmp_path / "global_step5" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    assert lacks(str(tmp_path), with_scaler=False) == []


# by hand ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    place = tmp_path_factory.mktemp("zero")
    launch(sys.executable, WORKER, str(place), "by_hand", "trainer")
    return place


def one_process(clip=math.inf, frozen=False, dead=False, **more):
    model = plain.net("dead" if dead else "")
    model.d.weight.requires_grad_(not frozen)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for name, p in named.items() if name.endswith("weight")], "weight_decay": 0.1},
        {"params": [p for name, p in named.items() if name.endswith("bias")], "weight_decay": 0.0},
    ]
    optimizer = plain.optimizer_for(model, cls=DHSPG, params=groups, **more)
    for step in range(plain.STEPS):
        x, y = plain.batch(step)
        nn.functional.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return plain.result(model, optimizer)


def salience(moments):
    return moments.weight_squared + moments.gradient_squared


@pytest.mark.slow
def test_all_ranks_end_where_one_process_ends(folder):
    ranks = results(folder, "by_hand")
    one = one_process()
    others = {
        "clipped": one_process(clip=0.05),
        "frozen": one_process(frozen=True),
        "dead": one_process(dead=True),
        "moments": one_process(salience=salience),
    }
    names = ("zero1", "zero2", "zero3", "zero3 in parts", "spoilt", "zero3 spoilt")
    expected = dict.fromkeys(names, one) | others
    expected |= {f"zero3 {name}": others[name] for name in ("clipped", "frozen")}
    assert int(one["zero"].sum()) == 8
    for name, run in expected.items():
        assert distance(ranks[0][name], ranks[1][name]) == 0, name
        assert distance(ranks[0][name], run) < 1e-5, name
        assert all(torch.equal(rank[name]["zero"], rank[name]["still zero"]) for rank in ranks)
    # the runs are different ones, and a step was skipped
    assert distance(expected["clipped"], one) > 1e-3 and distance(expected["frozen"], one) > 1e-3
    assert distance(expected["moments"], one) == math.inf
    assert others["dead"]["zero"][8] and not one["zero"][8]
    assert ranks[0]["spoilt"]["skipped"] == ranks[0]["zero3 spoilt"]["skipped"] == 1
    assert ranks[0]["zero3 in parts"]["flats"] > ranks[0]["zero3"]["flats"] == 3
    assert distance(ranks[0]["broken"], one) == math.inf


@pytest.mark.slow
def test_sixteen_bits_reach_the_target_with_exact_zeros(folder):
    for name in ("bf16 zero1", "bf16 zero2", "bf16 zero3", "bf16 in float32"):
        run, other = (rank[name] for rank in results(folder, "by_hand"))
        assert run["reached"] and distance(run, other) == 0
        model = plain.net()
        model.load_state_dict(run["half"])
        assert zeros_of(model).tolist() == run["zero"].tolist() and run["zero"].sum() == 8
        assert 0 < max(float((w - run["half"][n]).abs().max()) for n, w in run["weights"].items()) < 0.01
        with torch.no_grad():
            model.b.bias += 1e-3  # the control
        assert zeros_of(model).tolist() != run["zero"].tolist()


@pytest.mark.slow
def test_resumed_is_uninterrupted(folder):
    for rank in results(folder, "by_hand"):
        assert distance(rank["resumed"], rank["zero2"]) == 0
        assert distance(rank["forgetful"], rank["zero2"]) > 0


@pytest.mark.slow
def test_what_the_user_reads_by_hand(folder):
    for rank in results(folder, "by_hand"):
        errors = rank["errors"]
        assert "optimizer.attach(engine) before the first step" in errors["detached"]
        assert "ZeroDHSPG" in errors["plain"] and "takes the place of DHSPG" in errors["plain"]
        assert "ordinary checkpoints" in errors["elastic"]
        assert "not those of b.weight" in errors["other"]
        assert "have 382 weights of the model's 385" in errors["gap"]
        assert "not the one that this optimizer was made for" in errors["model"]


def zeros_of(model):
    return torch.from_numpy(PruningPlan.from_zeros(model, plain.PARTITION).removed(plain.PARTITION))


# the Trainer --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_ends_where_one_process_ends(folder, tmp_path):
    ranks = results(folder, "trainer")
    one = plain.trained(tmp_path / "one")
    assert 0.35 < one["sparsity"] < 0.45
    classes = {"resnet": tf.ResNetForImageClassification, "vit": tf.ViTForImageClassification}
    for name in ranks[0].keys() - {"errors", "forgetful"}:
        run = ranks[0][name]
        assert distance(run, ranks[1][name]) == 0, name
        assert run["loss"] == ranks[1][name]["loss"], name
        assert run["difference"] < 1e-5, name
        assert abs(run["sparsity"] - 0.4) < 0.05, name
        assert len(run["sizes"]) == 1  # the model is cut at the end only
        if "bf16" not in name and name != "resnet":  # its batch norms see half a batch
            assert distance(run, one) < 1e-5, name
        # whole, saved once, in the dtype that it had, and the same again
        cls = classes.get(name.split()[0], tf.BertForSequenceClassification)
        again = cls.from_pretrained(folder / name / "compact").state_dict()
        assert again.keys() == run["weights"].keys()
        assert all(torch.equal(t, run["weights"][n]) and t.dtype != torch.bfloat16 for n, t in again.items())
    assert any(t.shape != plain.bert().state_dict()[n].shape for n, t in ranks[0]["zero2"]["weights"].items())
    assert distance(ranks[0]["resumed"], ranks[0]["zero2"]) == 0
    assert distance(ranks[0]["zero3 resumed"], ranks[0]["zero3"]) == 0
    assert distance(ranks[0]["divided"], ranks[0]["zero3"]) == 0 and ranks[0]["divided"]["empty"]
    assert distance(ranks[0]["outside"], ranks[0]["zero3"]) == 0
    assert distance(ranks[0]["forgetful"], ranks[0]["zero2"]) > 0
    assert 1e-5 < distance(ranks[0]["bf16"], one)
    assert all(rank[name]["freed"] for rank in ranks for name in ("zero2", "zero3"))


@pytest.mark.slow
def test_accelerate_launch(folder):
    config = str(ROOT / "recipes" / "accelerate" / "zero.yaml")
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    launch(*accelerate, "--main_process_port", "0", WORKER, str(folder), "launched")
    for rank, other in zip(results(folder, "launched"), results(folder, "trainer"), strict=True):
        # under DDP, without DeepSpeed, the model would have shrunk while it trained
        assert len(rank["zero2"]["sizes"]) == 1
        assert distance(rank["zero2"], other["zero2"]) == 0 < distance(rank["zero2"], other["forgetful"])
        assert "`offload_optimizer`" in rank["errors"]["offload"]


@pytest.mark.slow
def test_what_fails_leaves_the_trained_model(folder):
    errors = [rank["errors"] for rank in results(folder, "trainer")]
    assert errors[0]["certificate"] == errors[1]["certificate"]
    assert "certificate failed" in errors[0]["certificate"]
    assert all("certificate failed" in of_rank["of_shards"] for of_rank in errors)
    assert all("ZeroDivisionError" in of_rank["callback"] for of_rank in errors)
    dense = {name: t.shape for name, t in plain.bert().state_dict().items()}
    for name in ("failed", "failed shards", "broken"):
        saved = load_file(folder / name / "trained" / "model.safetensors")
        assert {n: t.shape for n, t in saved.items()} == dense


@pytest.mark.slow
def test_what_the_user_reads(folder):
    for rank in results(folder, "trainer"):
        errors = rank["errors"]
        assert "remove the section `optimizer`" in errors["optimizer"]
        assert "`offload_optimizer`" in errors["offload"]
        assert "no pruning_mode='paper'" in errors["paper"]
        assert "depends on the shape of a parameter" in errors["adafactor"]
        assert "make a new trainer" in errors["again"]
    assert not (folder / "no" / "trained").exists()  # nothing was trained
