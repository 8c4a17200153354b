"""Every recipe runs, is short, and needs no name that isn't public; what it saves is what another process loads."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import evaluate
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from models import waves

import hf_oto

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))

from recipes import common  # noqa: E402

RECIPES = ROOT / "recipes"
NAMED_IN_DOCSTRINGS = {"hf_oto.paper": {"PaperDHSPG", "Penalty"}}  # OTOv2's own rule: `DHSPG` says where it is
SHARED = {"common.py"}  # no recipe
SOURCES = sorted(path.relative_to(RECIPES).as_posix() for path in RECIPES.rglob("*.py"))

ALIKE = r"reloaded by another process: max logit difference (\S+)"
SHARE = r"dense 0\.\d{4}, compact 0\.\d{4}"
METHODS = ("dense", "scheduled", "paper", "magnitude", "hesso", "random", "distilled")
PAPER = ["-m", "recipes.paper", "--smoke", "--output-dir", "OUT", "--system"]
RUNS = {  # name -> (what is run, what it has to print)
    "quickstart": (["recipes/quickstart.py", "--smoke", "--output-dir", "OUT"], [ALIKE, SHARE, "2 x 3 x 32 x 32"]),
    "text_classification": (["recipes/text_classification.py", "--smoke", "--output-dir", "OUT"], [ALIKE, SHARE]),
    "language_model": (
        ["recipes/language_model.py", "--smoke", "--per-device-train-batch-size", "4", "--output-dir", "OUT"],
        [ALIKE, r"dense: perplexity \d+", r"compact: perplexity \d+", "dense writes: '", "compact writes: '"],
    ),
    "sentence_embeddings": (
        ["recipes/sentence_embeddings.py", "--smoke", "--max-steps", "20", "--output-dir", "OUT"],
        [SHARE, r"compact (0\.\d{4})[^$]*reloaded from \S+: \1\n"],
    ),
    "accelerate_loop": (
        ["recipes/accelerate_loop.py", "--smoke", "--cpu", "--batch-size", "8", "--out", "OUT"],
        [r"macs +\d+%", r"accuracy of the compact model: 0\.\d{4}"],
    ),
    "export_gguf": (
        ["recipes/export_gguf.py", "--smoke"],
        [
            r"tiny\.gguf: deci, f32\n",
            r"deci\.attention\.head_count: \[6, 4, 2\]\n",
            r"deci\.attention\.head_count_kv: \[3, 2, 1\]\n",
            r"deci\.feed_forward_length: \[95, 94, 93\]\n",
            r"30 tensors",
        ],
    ),
    "inspect_model": (["recipes/inspect_model.py", "bert"], ["24 prunable axes, 37,008 ZIGs"]),
    "paper": ([*PAPER, "demonet", "--target-group-sparsity", "0.5"], [SHARE, "parameters", "group sparsity 0.500"]),
    "super_resolution": ([*PAPER, "carn"], [r"PSNR \(Y, dB\): dense \d+\.\d+, compact \d+\.\d+"]),
    "table": (
        ["-m", "recipes.paper.table", "--smoke", "--networks", "resnet18", "--out", "OUT"],
        [
            r"resnet18 +dense +\d+\.\d\d +100\.00 +100\.00 +0\.00  epoch 4 of 4\n",
            r"resnet18 +scheduled +\d+\.\d\d +[\d.]+ +[\d.]+ +70\.\d\d  epoch 4 of 4\n",
            r"resnet18 +paper +\d+\.\d\d +[\d.]+ +[\d.]+ +[\d.]+  epoch 4 of 4\n",
            r"resnet18 +published +92\.86 +20\.26 +8\.79 +70\.00  epoch 300 of 300\n",
        ],
    ),
    "prune_then_adapt": (
        ["recipes/prune_then_adapt.py", "--smoke", "--output_dir", "OUT"],
        [r"dense: accuracy [01]\.", r"MACs .* 5\d %", r"pruned: accuracy [01]\.", r"adapted: accuracy [01]\.", ALIKE],
    ),
    "bench_latency": (
        ["recipes/bench_latency.py", "--model", "bert", "--batch-size", "1", "--divisible", "8", "--rounds", "3"],
        [r"bert +8 +1 .* \d+%"],
    ),
    "bench_runtimes": (
        ["recipes/bench_runtimes.py", "--model", "bert", "--batch-size", "1", "--rounds", "3"],
        [r"torch .* 0\.0e\+00\n", r"onnxruntime f32 .* \d\.\de-0[5-9]\n", r"onnxruntime int8 .* \d\.\de-0[1-4]\n"],
    ),
    "bench_memory": (
        ["recipes/bench_memory.py", "--gigabytes", "0.1", "--dtypes", "float32"],
        [r"partition .*GB", r"check .*GB", r"compact .*GB"],
    ),
    "bench_optimizer": (
        ["recipes/bench_optimizer.py", "--model", "small", "--base", "AdamW", "--steps", "60"],
        [r"whole run +57 steps +\d"],
    ),
    "bench_run": (
        [
            "recipes/bench_run.py",
            "--models",
            "vit",
            "--targets",
            "0.5",
            "--steps",
            "24",
            "--pairs",
            "1",
            "--hidden",
            "32",
        ],
        [r"vit +0\.5 +[\d.]+ +[\d.]+ +[\d.]+ \([\d.]+\)"],
    ),
    "bench_partition": (["recipes/bench_partition.py", "bert-base"], [r"bert-base +\d+ +[\d,]+"]),
    "bench_quality": (
        ["recipes/bench_quality.py", "--smoke", "--out", "OUT/quality.jsonl"],
        [
            rf"(?m)^{method} "
            for method in ("dense", "oto", "oto-whole", "paper", "scratch", "random", "tp-taylor-global")
        ],
    ),
    "bench_prune": (
        ["recipes/bench_prune.py", "--smoke", "--out", "OUT/prune.jsonl"],
        [
            rf"(?m)^{method} +0\.7 +1 +[\d.]+"
            for method in ("oto", "oto-8", "oto-reconstruct", "cut", "statistics", "mean", "tp-magnitude", "tp-taylor")
        ],
    ),
}
NEEDS = {"export_gguf": "gguf"}  # what isn't installed with the package or its recipes
LONG = {"quickstart", "language_model", "sentence_embeddings"}
LONG |= {"bench_memory", "bench_prune", "bench_quality", "bench_runtimes"}


def printed(command, out):
    command = [sys.executable, *(part.replace("OUT", str(out)) for part in command)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LONG)) for n in RUNS])
def test_recipes_run(name, tmp_path):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    command, patterns = RUNS[name]
    text = printed(command, tmp_path)
    for pattern in patterns:
        found = re.search(pattern, text)
        assert found, (pattern, text)
        assert pattern != ALIKE or float(found[1]) < 1e-5
    if name == "paper":
        weights = tmp_path / "demonet" / "compact" / "model.safetensors"
        assert 0 < weights.stat().st_size < 40_000  # the dense one has 50 kB


def test_every_recipe_is_run():
    run = {part for command, _ in RUNS.values() for part in command}
    recipes = {f"recipes/{path.name}" for path in RECIPES.glob("*.py") if path.name not in SHARED}
    assert recipes <= run
    assert "recipes/common.py" not in run  # control: a name can be missing


def test_a_reloaded_model_that_is_another_one_shows(tmp_path, capfd):
    model, other = common.vit(3), common.vit(3)
    model.save_pretrained(tmp_path / "saved")
    inputs = {"pixel_values": waves(1, 3, 32, 32)}
    for saved, differs in ((model, False), (other, True)):
        common.reload("AutoModelForImageClassification", str(tmp_path / "saved"), saved, inputs)
        assert (float(re.search(ALIKE, capfd.readouterr().out)[1]) > 1e-3) == differs


# the manner ---------------------------------------------------------------------------------------


def private_names(source):
    """Names of hf_oto that a source imports and that aren't public."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hf_oto":
            public = set(hf_oto.__all__) if node.module == "hf_oto" else NAMED_IN_DOCSTRINGS.get(node.module, set())
            found |= {f"{node.module}.{alias.name}" for alias in node.names if alias.name not in public}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("hf_oto.")}
    return found


@pytest.mark.parametrize("name", SOURCES)
def test_recipes_need_public_names_only(name):
    assert not private_names((RECIPES / name).read_text())


def test_a_private_name_shows():
    assert private_names("from hf_oto.report import table\nimport hf_oto.cut") == {"hf_oto.report.table", "hf_oto.cut"}
    assert private_names("from hf_oto import no_such_name") == {"hf_oto.no_such_name"}
    assert not private_names("from hf_oto import OTOTrainer\nimport hf_oto")
    documented = {name for names in NAMED_IN_DOCSTRINGS.values() for name in names}
    assert any(name in hf_oto.DHSPG.__doc__ for name in documented)


@pytest.mark.parametrize("name", sorted(set(SOURCES) - SHARED))
def test_recipes_are_short(name):
    assert len((RECIPES / name).read_text().splitlines()) < 120


# what stands beside them --------------------------------------------------------------------------


def test_the_metric_is_the_share_of_right_answers():
    accuracy = evaluate.load(str(RECIPES / "metrics" / "accuracy"), keep_in_memory=True)
    assert accuracy.compute(predictions=[1, 0, 2, 2], references=[1, 1, 2, 2]) == {"accuracy": 0.75}
    assert accuracy.compute(predictions=[1, 0], references=[0, 1]) == {"accuracy": 0.0}
    for predictions in ([1, 0], [2, 2]):  # in parts, as a loop adds them
        accuracy.add_batch(predictions=predictions, references=[1, 2])
    assert accuracy.compute() == {"accuracy": 0.5}


@pytest.mark.parametrize(
    ("name", "kind", "processes"),
    [("one", "NO", 1), ("ddp", "MULTI_GPU", 2), ("fsdp2", "FSDP", 2), ("zero", "DEEPSPEED", 2)],
)
def test_accelerate_reads_its_files(name, kind, processes, tmp_path):
    path = RECIPES / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert (config.distributed_type, config.num_processes) == (kind, processes)
    assert config.fsdp_config.get("fsdp_version") == (2 if name == "fsdp2" else None)
    (tmp_path / "wrong.yaml").write_text(path.read_text() + "no_such_key: 1\n")  # control: unknown keys are errors
    with pytest.raises(ValueError, match="no_such_key"):
        load_config_from_file(str(tmp_path / "wrong.yaml"))
