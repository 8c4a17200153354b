"""Across processes: DDP and FSDP2 end where one process ends, all ranks alike. One test is one launch, with many laws.

What is launched is distributed_worker.py and recipes/accelerate_loop.py; see there for each run and what it breaks.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import distributed_worker as worker
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
WORKER = str(ROOT / "tests" / "distributed_worker.py")
FORKED = [sys.executable, WORKER]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
DDP = str(ROOT / "recipes" / "accelerate" / "ddp.yaml")
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", DDP, "--main_process_port", "0"]


def launch(*command):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


def results(folder, scenario, world=2):
    """What the ranks wrote, one dict of runs per rank."""
    return [torch.load(folder / f"{scenario}.{rank}.pt", weights_only=True) for rank in range(world)]


def distance(a, b):
    """The largest difference of two runs' weights; inf if they kept other ZIGs."""
    kept = "zero" if "zero" in a else "plan"
    if not (torch.equal(a[kept], b[kept]) if kept == "zero" else a[kept] == b[kept]):
        return float("inf")
    assert a["weights"].keys() == b["weights"].keys()
    return max(float((w.double() - b["weights"][n].double()).abs().max()) for n, w in a["weights"].items())


# the optimizer ----------------------------------------------------------------------------


def one_process(accumulate=1, kind="", cls=worker.DHSPG, halved=False):
    model = worker.net(kind)
    optimizer = worker.optimizer_for(model, cls=cls)
    if halved:  # the second half of every batch is left out
        worker.train(model, optimizer, world=2)
    else:
        worker.train(model, optimizer, accumulate=accumulate)
    return worker.result(model, optimizer)


def test_micro_batches_are_one_large_batch():
    whole = one_process()
    assert int(whole["zero"].sum()) == 8
    assert distance(one_process(accumulate=4), whole) < 1e-6
    assert distance(one_process(halved=True), whole) > 1e-3


@pytest.mark.slow
def test_optimizer_across_processes(tmp_path):
    launch(*FORKED, str(tmp_path), "optimizers:2", "hsdp:4")
    ranks, four = results(tmp_path, "optimizers"), results(tmp_path, "hsdp", 4)
    one = {"": one_process(), "paper": one_process(cls=worker.PaperDHSPG), "tied": one_process(kind="tied")}
    assert all(int(run["zero"].sum()) == 8 for run in one.values())
    # ties are broken by position, wherever the ZIGs lie: all but the floor of the first axis, then the second
    assert one["tied"]["zero"].tolist() == [True] * 6 + [False] + [True] * 2 + [False] * 7

    def expected(name):
        return one[next((key for key in ("paper", "tied") if key in name), "")]

    already, parallel = ranks[0].pop("refused")
    assert "sharded already" in already and "before fully_shard" in already
    assert "tensor parallel is not supported" in parallel and "FSDP2" in parallel
    runs = [name for name in ranks[0] if name != "traffic"]
    broken = [name for name in runs if "broken" in name]
    for name in runs:
        if name not in broken:
            assert distance(ranks[0][name], ranks[1][name]) == 0, name
            if "rough" not in name:
                assert distance(ranks[0][name], expected(name)) < 1e-6, name
    assert {"ddp", "ddp accumulated", "fsdp2", "fsdp2 made before", "mixed", "hsdp (2, 1)", "hsdp (1, 2)"} <= set(runs)
    # without the collectives: ranks that part, another zero set
    assert distance(ranks[0]["ddp rough, broken"], ranks[1]["ddp rough, broken"]) > 0
    assert distance(ranks[0]["fsdp2, broken"], one[""]) == float("inf")

    traffic = ranks[0]["traffic"]
    schedule = worker.optimizer_for(worker.net()).schedule
    assert traffic["decisions"] == len(schedule.sample_steps) > len(schedule.events) - 1
    # once more, before the first step: which ZIGs are dead from the start
    assert traffic["sent"] == [worker.PARTITION.num_zigs + 1] * (1 + traffic["decisions"])

    for rank in four:
        assert distance(rank["hsdp"], four[0]["hsdp"]) == 0
    assert distance(four[0]["hsdp"], one[""]) < 1e-6


# the Trainer ------------------------------------------------------------------------------


@pytest.mark.slow
def test_trainer_under_ddp_and_fsdp2(tmp_path):
    launch(*TORCHRUN, WORKER, str(tmp_path), "trainer_ddp", "trainer_fsdp2")
    ranks = [a | b for a, b in zip(results(tmp_path, "trainer_ddp"), results(tmp_path, "trainer_fsdp2"), strict=True)]
    errors, broken, unsendable = ([rank.pop(n) for rank in ranks] for n in ("failed", "broken", "unsendable"))
    # an error of rank 0 that can't be sent is heard of as its text
    assert all("Unsendable: the disk is full" in text for text in unsendable)
    one = worker.trained(tmp_path / "one")
    uniform = worker.trained(tmp_path / "uniform", uniform=True, target_group_sparsity=0.2)
    assert distance(uniform, one) == float("inf") and "modeling_oto.py" not in uniform["files"]
    assert 0.35 < one["sparsity"] < 0.45
    for name, run in ranks[0].items():
        assert distance(run, ranks[1][name]) == 0, name  # weights and buffers
        assert run["loss"] == ranks[1][name]["loss"], name
        assert run["sharded"] == {"SHARDED" in name or "FULL" in name or name == "forgetful"}, name
        assert run["difference"] < 1e-5, name
        # under DDP the model shrinks while it trains, also in what is left of a run that is resumed
        assert (len(run["sizes"]) > 1) == (run["sharded"] == {False} and name != "ddp whole"), name
        if "resnet" in name:  # its batch norms see half a batch: no run of one process is like it
            before = [rank[name]["buffers"] for rank in ranks]
            assert any(not torch.equal(t, before[1][n]) for n, t in before[0].items())
            assert any("running_mean" in n for n in run["weights"])
        elif name != "forgetful":
            assert distance(run, uniform if "uniform" in name else one) < 1e-5, name
            assert "uniform" not in name or run["files"] == uniform["files"]
    for state in ("FULL", "SHARDED"):
        assert distance(ranks[0][f"bert {state} resumed"], ranks[0][f"bert {state}"]) == 0
    assert distance(ranks[0]["ddp resumed"], ranks[0]["ddp"]) == 0
    assert distance(ranks[0]["forgetful"], ranks[0]["bert SHARDED"]) > 0

    # saved once, whole, and the same again
    classes = {"bert": tf.BertForSequenceClassification, "resnet": tf.ResNetForImageClassification}
    for name in ("ddp", "bert FULL", "bert SHARDED", "resnet SHARDED"):
        run, folder = ranks[0][name], tmp_path / name / "compact"
        files = ["config.json", "model.safetensors", "modeling_oto.py", "oto_widths.png", "training_args.bin"]
        assert run["files"] == files
        assert not any("FSDP" in a for a in json.loads((folder / "config.json").read_text())["architectures"])
        again = classes[name.split()[0].replace("ddp", "bert")].from_pretrained(folder).state_dict()
        assert again.keys() == run["weights"].keys()
        assert all(torch.equal(t, run["weights"][n]) for n, t in again.items()), name
    assert any(t.shape != worker.bert().state_dict()[n].shape for n, t in ranks[0]["bert FULL"]["weights"].items())

    # a certificate that fails on one rank stops them all, and the full model is saved though training was sharded
    assert errors[0] == errors[1] and "certificate failed" in errors[0]
    full = load_file(tmp_path / "failed" / "trained" / "model.safetensors")
    assert {n: t.shape for n, t in full.items()} == {n: t.shape for n, t in worker.bert().state_dict().items()}

    # so it is when a callback of the user's fails in the end on one rank, while the model is sharded still
    assert [kind for _, kind in broken] == ["OTOError", "ZeroDivisionError"]
    assert all("ZeroDivisionError" in text and "the trained model is saved" in text for text, _ in broken)
    full = load_file(tmp_path / "broken" / "trained" / "model.safetensors")
    assert {n: t.shape for n, t in full.items()} == {n: t.shape for n, t in worker.bert().state_dict().items()}

    # the recipe, sharded, ends where one process does
    loop = load_file(tmp_path / "loop sharded" / "compact" / "model.safetensors")
    worker.recipe(tmp_path / "loop")
    assert weights_differ(loop, load_file(tmp_path / "loop" / "compact" / "model.safetensors")) < 1e-5


# a loop without Trainer -------------------------------------------------------------------


def weights_differ(a, b):
    """Without key biases: no output depends on them, their gradients are rounding, which Adam makes large."""
    assert {n: t.shape for n, t in a.items()} == {n: t.shape for n, t in b.items()}
    return max(float((t - b[n]).abs().max()) for n, t in a.items() if not n.endswith("key.bias"))


@pytest.mark.slow
def test_accelerate_loop(tmp_path):
    recipe, out = str(ROOT / "recipes" / "accelerate_loop.py"), str(tmp_path / "loop")
    printed = launch(*LAUNCH, recipe, "--cpu", "--smoke", "--batch-size", "8", "--out", out, "--save-at", "13")
    assert " 50% of the dense model's" in printed and printed.count("accuracy of the compact model") == 1
    launch(*FORKED, str(tmp_path), "loop_ddp:2")
    worker.recipe(tmp_path / "one")
    whole, resumed, one = (
        load_file(tmp_path / name / "compact" / "model.safetensors") for name in ("loop", "loop resumed", "one")
    )
    assert weights_differ(whole, resumed) == 0
    assert weights_differ(whole, one) < 1e-5
    assert weights_differ(whole, {n: t + 1e-4 for n, t in one.items()}) > 1e-5
