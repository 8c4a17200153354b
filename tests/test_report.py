"""What people see: the numbers are those of the compact model, and the pictures can be read."""

import copy
import dataclasses
import html
import itertools
import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from models import TABLE, make
from test_trainer import arguments, bert, sentences, train
from torch import nn

from hf_oto import DHSPG, OTOTrainer, PruningPlan, ZIGPartition, compact, figures, partition_zigs, report
from hf_oto.cut import resolve
from hf_oto.paper import PaperDHSPG
from hf_oto.reasons import Reason
from hf_oto.report import Report, macs, measure, table
from hf_oto.zigs import PrunableAxis

KEYS = ["oto/group_sparsity", "oto/params_left", "oto/macs_left"]


def count(model):
    return sum({id(p): p.numel() for p in model.parameters()}.values())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that is evaluated at its last step, and once more as the compact model."""
    trainer = train(
        tmp_path_factory.mktemp("trained"),
        target_group_sparsity=0.4,
        eval_strategy="steps",
        eval_steps=20,
        shrink=False,
    )
    trainer.evaluate()
    return trainer


# numbers ----------------------------------------------------------------------------------


class Net(nn.Module):
    """Two layers with a hidden width of 100, which add one to their input in place."""

    def __init__(self, seconds=0.0):
        super().__init__()
        self.a, self.b, self.seconds = nn.Linear(4, 100), nn.Linear(100, 3), seconds
        self.register_buffer("scratch", torch.zeros(7), persistent=False)

    def forward(self, x):
        assert not x.any(), "this input was used before"
        time.sleep(self.seconds)
        return self.b(self.a(x.add_(1)).relu())


def test_sizes_by_hand():
    (found,) = measure(Net(), inputs={"x": torch.zeros(10, 4)}, seconds=0)
    params = 4 * 100 + 100 + 100 * 3 + 3
    assert found["params"] == params and found["bytes"] == 4 * params
    assert found["macs"] == 10 * (4 * 100 + 100 * 3)


def test_latencies_are_taken_in_turn(monkeypatch):
    """Other work on the machine then slows both models alike."""
    calls, models = [], [Net(), Net(0.02)]

    def latency(model, forwards, right=report._latency):
        calls.append(models.index(model))
        return right(model, forwards)

    monkeypatch.setattr(report, "_latency", latency)
    quick, slow = measure(*models, inputs={"x": torch.zeros(10, 4)}, seconds=0)
    assert calls == [0, 1] * 3
    assert models[0].training and models[1].training
    assert quick["latency"] < 0.02 <= slow["quartiles"][0]


def test_every_run_has_inputs_of_its_own():
    x = torch.zeros(10, 4)
    measure(Net(), inputs={"x": x}, seconds=0)
    assert not x.any()
    Net()(x)
    with pytest.raises(AssertionError, match="used before"):
        Net()(x)


def test_the_numbers_are_those_of_the_model_that_is_left(trained):
    """They are taken with the cut put on for a moment, while the full model is still there."""
    (again,) = measure(trained.model, inputs=trained._forwards, seconds=0)
    sizes = ("params", "macs", "bytes", "measured_on")
    assert {k: trained.report["after"][k] for k in sizes} == {k: again[k] for k in sizes}
    assert all(trained.report["before"][k] > again[k] for k in sizes[:3])


def test_bytes_are_those_of_the_file(trained, tmp_path):
    trained.model.save_pretrained(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    assert len(data) - header == trained.report["after"]["bytes"] < trained.report["before"]["bytes"]


def test_latency_states_its_spread_and_conditions(trained):
    for found in (trained.report["before"], trained.report["after"]):
        low, high = found["quartiles"]
        assert 0 < low <= found["latency"] <= high
        assert found["measured_on"] == f"a batch of 2 x 8, CPU, threads: {torch.get_num_threads()}"


def test_the_table_by_hand():
    before = {"params": 2e6, "macs": 3e9, "bytes": 8e6, "latency": 0.01, "quartiles": [0.009, 0.0125]}
    after = {"params": 1e6, "macs": 1e9, "bytes": 4e6, "latency": 0.004, "quartiles": [0.0035, 0.0051]}
    where = {"measured_on": "a batch of 2 x 8, CPU, threads: 2"}
    report = Report(
        before=before | where, after=after | where, max_output_difference=2e-7, training_macs=0.7,
        metrics={"zeroed": {"eval_accuracy": 0.5}, "compact": {"eval_accuracy": 0.25}},
    )  # fmt: skip
    assert str(report) == (
        "                  dense     compact   ratio\n"
        "parameters         2.0M        1.0M    50 %\n"
        "MACs               3.0G        1.0G    33 %\n"
        "file size         8.0MB       4.0MB    50 %\n"
        "latency         10.0 ms      4.0 ms    40 %\n"
        "quartiles   9.0-12.5 ms  3.5-5.1 ms\n"
        "measured on a batch of 2 x 8, CPU, threads: 2\n"
        "max output difference, zeroed full against compact: 2.0e-07\n"
        "training took 70 % of the MACs of a dense model\n"
        "eval_accuracy: 0.5000 full with zeros, 0.2500 compact"
    )
    assert table({"a": 1.0}, {"b": 1.0}).split() == ["dense", "compact", "ratio"]


def test_the_report_is_plain_data(trained):
    assert isinstance(trained.report, dict)
    assert json.loads(json.dumps(trained.report)) == trained.report
    assert trained.report["pruning"] == [4, 24]  # 10 and 60 % of 40 steps


def test_metrics_are_those_of_the_weights_that_were_cut(trained, tmp_path):
    metrics = trained.report["metrics"]
    assert metrics["zeroed"].keys() == metrics["compact"].keys() == {"eval_loss"}
    assert metrics["zeroed"]["eval_loss"] == pytest.approx(metrics["compact"]["eval_loss"], rel=1e-4)
    first = metrics["compact"]["eval_loss"]
    trained.evaluate(sentences(8))
    assert metrics["compact"]["eval_loss"] == first
    earlier = train(tmp_path, eval_on_start=True)  # not of these weights
    assert "eval_loss" in earlier.state.log_history[0] and earlier.report["metrics"]["zeroed"] == {}


def test_metrics_are_those_of_the_best_checkpoint_if_that_is_cut(tmp_path):
    trainer = train(
        tmp_path, shrink=False, eval_strategy="steps", eval_steps=10, save_strategy="steps", save_steps=10,
        load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    assert trainer.state.best_global_step == 30
    last = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line][-1]
    trainer.evaluate()
    metrics = trainer.report["metrics"]
    assert metrics["zeroed"]["eval_loss"] == pytest.approx(metrics["compact"]["eval_loss"], rel=1e-4)
    assert metrics["zeroed"]["eval_loss"] != pytest.approx(last, rel=1e-4)


# live -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "resnet_basic", "llama", "mixtral", "t5", "grouped_conv", "phi3", "swin"])
@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_left_is_what_a_cut_leaves(name, seed):
    model, inputs = make(name).eval(), TABLE[name].inputs(2)
    partition = partition_zigs(model, inputs)
    optimizer = DHSPG(model, partition, total_steps=100)
    works = [partition.params(model), partition.work]
    assert [optimizer.left(partition, work) for work in works] == [1, 1]
    gone = np.random.default_rng(seed).random(partition.num_zigs) < 0.4 + 0.5 * seed
    next(iter(partition.split(gone)))[1][:] = True  # of an axis that is all zero, one ZIG stays
    with torch.no_grad():
        optimizer._freeze(torch.from_numpy(gone))
    plan = PruningPlan({axis.name: np.flatnonzero(~g).tolist() or [0] for axis, g in partition.split(gone)})
    dense = [count(model), macs(model, inputs)]
    small = compact(model, partition, plan)
    params, work = (optimizer.left(partition, work) for work in works)
    assert params == count(small) / dense[0] < 1
    assert work == pytest.approx(macs(small, inputs) / dense[1], abs=1e-6)


class Cutter(tf.TrainerCallback):
    """Cuts a copy of the model at every line of the log."""

    def __init__(self):
        self.left = []

    def on_log(self, args, state, control, model=None, **kwargs):
        if self.trainer.report is None:
            small, compaction = copy.deepcopy(model), copy.copy(self.trainer._compaction)
            zeros = PruningPlan.from_zeros(small, compaction.left)
            compaction.keep_(small, compaction.resolve(compaction.plan(zeros)))
            self.left.append((count(small) / count(bert()), macs(small, self.trainer._forwards)))


@pytest.mark.parametrize("more", [{}, {"pruning_mode": "paper", "learning_rate": 0.03}])
def test_every_log_line_says_how_far_it_is(tmp_path, more):
    cutter = Cutter()
    trainer = cutter.trainer = OTOTrainer(
        bert(), arguments(tmp_path, logging_steps=4, **more), train_dataset=sentences(), eval_dataset=sentences(16),
        callbacks=[cutter],
    )  # fmt: skip
    trainer.train()
    trainer.evaluate()
    lines = [[line[key] for key in KEYS] for line in trainer.state.log_history]
    sparsity, params, work = zip(*lines, strict=True)
    assert 0 == sparsity[0] < sparsity[-1] == trainer.report["group_sparsity"]
    assert params[0] == work[0] == 1 and list(params) == sorted(params, reverse=True)
    before, after = trainer.report["before"], trainer.report["after"]
    assert params[-1] == params[-2] == count(trainer.model) / count(bert())
    assert work[-1] == after["macs"] / before["macs"]
    assert len(cutter.left) == len(lines) - 1  # the last one is of the compact model
    for seen, now, (share, multiplications) in zip(params, work, cutter.left, strict=False):
        assert seen == share
        assert now == pytest.approx(multiplications / before["macs"], abs=1e-6)


def test_three_tensors_multiplied_and_summed_count():
    class Three(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(8, 16), torch.nn.Bilinear(16, 16, 64)

        def forward(self, x):
            return self.b(self.a(x), self.a(x))

    assert macs(Three(), {"x": torch.ones(2, 8)}) == 2 * (2 * 8 * 16 + 16 * 16 * 64)


def test_without_macs_the_key_is_left_out(tmp_path):
    trainer = OTOTrainer(bert(), arguments(tmp_path), train_dataset=sentences())
    trainer.partition = dataclasses.replace(partition_zigs(trainer.model, trainer.trace_calls()), work=None)
    trainer.train()
    for line in trainer.state.log_history:
        assert [key for key in KEYS if key in line] == KEYS[:2]


@pytest.mark.parametrize(
    ("more", "phases"),
    [
        ({}, ["warm-up", "pruning", "training the rest"]),
        ({"pruning_mode": "paper", "learning_rate": 1e-6}, ["warm-up", "pruning"]),
        ({"target_group_sparsity": 0.0}, ["training"]),
    ],
)
def test_the_progress_bar_shows_group_sparsity_and_phase(tmp_path, more, phases):
    shown = []

    class Bar(tf.ProgressCallback):
        def on_train_begin(self, *args, **kwargs):
            super().on_train_begin(*args, **kwargs)
            self.training_bar.set_postfix_str = shown.append

    args = arguments(tmp_path, logging_steps=1, **more)
    trainer = OTOTrainer(bert(), args, train_dataset=sentences(), callbacks=[Bar()])
    trainer.train()
    assert [phase for phase, _ in itertools.groupby(text.split(", ")[1] for text in shown)] == phases
    assert shown[0] == f"group sparsity 0.00, {phases[0]}"
    assert shown[-1] == f"group sparsity {trainer.report['group_sparsity']:.2f}, {phases[-1]}"


def test_phases_of_the_paper():
    """Pruning ends when the target is reached, not at a step."""
    model = bert()
    optimizer = PaperDHSPG(model, partition_zigs(model), total_steps=100)
    state, phases = optimizer.param_groups[0], []
    for step, zeros in ((9, 0), (10, 0), (99, 67), (50, 68)):  # of 136 ZIGs
        state["dhspg_step"] = step
        with torch.no_grad():
            optimizer._freeze(torch.arange(136) < zeros)
        phases.append(optimizer.phase)
    assert phases == ["warm-up", "pruning", "pruning", "training the rest"]


def test_tensorboard_gets_scalars(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = train(tmp_path, report_to="tensorboard")
    (events,) = (tmp_path / "runs").rglob("events.out.tfevents.*")
    found = accumulator.EventAccumulator(str(events)).Reload()
    for key in KEYS:
        seen = {scalar.step: scalar.value for scalar in found.Scalars(f"train/{key}")}
        assert seen == {line["step"]: pytest.approx(line[key]) for line in trainer.state.log_history}


# notebooks --------------------------------------------------------------------------------


def test_a_notebook_shows_the_same_text(trained):
    for shown in (trained.partition, trained.report):
        assert shown._repr_html_() == f"<pre>{html.escape(str(shown))}</pre>"
    hostile = ZIGPartition((PrunableAxis("<script>a&b", "units", 4, ()),), {"<b>w[0]": Reason("<i>why")})
    assert "<script>" in str(hostile) and "<i>why" in str(hostile)
    assert not {"<script>", "<b>", "<i>"} & set(re.findall("<.*?>", hostile._repr_html_()))


# pictures ---------------------------------------------------------------------------------


def history(evaluations=1):
    lines = [
        {"step": s, "loss": 200 / s, "epoch": 1.0} | dict.fromkeys(KEYS, min(0.5, s / 1000))
        for s in range(20, 1001, 20)
    ]
    scored = {f"eval_a_rather_long_name_{i}_loss": 1.0 + i for i in range(evaluations)}
    return [*lines, *({"step": s} | scored for s in range(200, 1001, 200))]


def texts(panel):
    return [text.get_text() for text in panel.texts]


@pytest.mark.parametrize("name", ["resnet_bottleneck", "t5", "detr", "llama"])
def test_every_axis_has_a_row_of_its_own_that_says_what_is_left(name, draw_plan):
    partition = partition_zigs(make(name), TABLE[name].inputs(2))
    plan = draw_plan(partition)
    figure = figures.widths(resolve(partition, plan))
    kinds = list(dict.fromkeys(axis.kind for axis in partition.axes))
    assert len(figure.axes) == len(kinds)
    for panel, kind in zip(figure.axes, kinds, strict=True):
        axes = [axis for axis in partition.axes if axis.kind == kind]
        labels = [label.get_text() for label in panel.get_yticklabels()]
        assert len({*labels}) == len(axes)
        assert texts(panel) == [f"{len(plan.kept[axis.name]):,} / {axis.size:,}" for axis in axes]
        for axis, label in zip(axes, labels, strict=True):
            start, end = panel.get_title("left").split("*")
            assert axis.name.removesuffix(".weight[0]") == start + label + end


@pytest.mark.parametrize("evaluations", [0, 1, 3])
def test_the_lines_are_those_of_the_log(evaluations):
    figure = figures.progress(history(evaluations), [100, 600])
    top, bottom = figure.axes
    assert [len(top.lines), len(bottom.lines)] == [1 + evaluations, 3]
    assert list(bottom.lines[0].get_ydata()) == [100 * min(0.5, s / 1000) for s in range(20, 1001, 20)]
    window = top.patches[0].get_extents().transformed(top.transData.inverted())
    assert (round(window.x0), round(window.x1)) == (100, 600)


def test_a_run_without_logs_has_an_empty_picture():
    assert not [line for panel in figures.progress([], []).axes for line in panel.lines]


def test_bars_are_as_long_as_the_compact_layers_are_wide(trained):
    figure = figures.widths(resolve(trained.partition, trained.plan))
    drawn = {}
    for panel in figure.axes:
        dense, left = panel.containers
        assert {bar.get_width() for bar in dense} == {100}
        drawn |= dict(
            zip((t.get_text() for t in panel.get_yticklabels()), (bar.get_width() for bar in left), strict=True)
        )
    for i, layer in enumerate(trained.model.bert.encoder.layer):
        assert drawn[f"encoder.layer.{i}.intermediate"] == pytest.approx(
            100 * layer.intermediate.dense.out_features / 48
        )
        assert drawn[f"{i}"] == pytest.approx(100 * layer.attention.self.num_attention_heads / 4)


def test_pictures_lie_beside_the_model(trained, tmp_path, monkeypatch):
    trained.save_model(str(tmp_path / "a"))
    for folder in (trained.args.output_dir, tmp_path / "a"):
        for name in ("oto_widths.png", "oto_training.png"):
            assert Path(folder, name).read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(figures, "is_matplotlib_available", lambda: False)
    trained.save_model(str(tmp_path / "b"))
    assert (tmp_path / "b" / "model.safetensors").exists() and not list((tmp_path / "b").glob("*.png"))


def test_one_point_is_no_picture(tmp_path):
    train(tmp_path, logging_steps=500, max_steps=20)
    assert [path.name for path in tmp_path.glob("*.png")] == ["oto_widths.png"]


def test_a_dense_checkpoint_has_no_pictures(tmp_path):
    train(tmp_path, save_strategy="steps", save_steps=40)
    assert (tmp_path / "checkpoint-40" / "model.safetensors").exists()
    assert not list((tmp_path / "checkpoint-40").glob("*.png"))
