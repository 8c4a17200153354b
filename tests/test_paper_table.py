"""The table of OTOv2: its runs go on where they were stopped, and its batches and rates are those of the tutorials."""

import functools
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

from hf_oto import ending, measure

sys.path.append(str(Path(__file__).parents[1]))

from recipes.common import splits
from recipes.paper import table, training
from recipes.paper.images import MARGIN, Batches, cropped_and_mirrored
from recipes.paper.tutorials import EPOCHS, TUTORIALS, optimizer_and_schedule

# runs that are stopped --------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Runs take less time without figures and long measurements, which are tested elsewhere."""
    monkeypatch.setattr("hf_oto.whole.measure", functools.partial(measure, seconds=0))
    monkeypatch.setattr(ending, "save_figures", lambda *_: None)


class Killed(BaseException):
    """As if the process had been killed."""


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs the recipe by a clock whose seconds are looks at it, about one a step, and returns what it prints."""
    monkeypatch.setattr(table, "splits", functools.cache(splits))

    def run(mode, out="out", killed_at=None, seconds=None, **options):
        ticks = itertools.count()

        def monotonic():
            now = next(ticks)
            if now == killed_at:
                raise Killed
            return float(now)

        monkeypatch.setattr(training, "monotonic", monotonic)
        monkeypatch.setattr(table, "monotonic", monotonic)
        command = ["--smoke", "--networks", "vgg16-bn", "--modes", mode, "--out", str(tmp_path / out)]
        if seconds:
            options["minutes"] = seconds / 60
        for name, value in options.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        table.main(command)
        return capsys.readouterr().out

    return run


def ended(folder):
    """The line and the weights that the only run in a folder has ended with."""
    (line,) = (folder / "table.jsonl").read_text().splitlines()
    (weights,) = folder.glob("*/end/model.safetensors")
    return json.loads(line), load_file(weights)


def same(a, b):
    (line, weights), (other_line, other_weights) = a, b
    return line == other_line and all(torch.equal(weights[name], other_weights[name]) for name in weights)


def checkpoints(folder):
    return sorted(folder.glob("*/checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


@pytest.mark.parametrize("mode", table.MODES)
def test_a_run_in_slices_or_killed_is_an_uninterrupted_one(run, tmp_path, mode):
    run(mode, "whole")
    steps = []
    for workers in (0, 2, 0):  # of 40 steps; ten make an epoch
        text = run(mode, "sliced", seconds=13, workers=workers)
        (_, state) = training.last_checkpoint(next((tmp_path / "sliced").glob("vgg*")))
        steps.append(state["global_step"])
        assert f"epoch {state['epoch']:.4g} of 4\n" in text
        assert f"not finished: vgg16-bn {mode}; the same command goes on" in text
    assert 0 < steps[0] < steps[1] < steps[2] < 40
    assert "not finished" not in run(mode, "sliced")
    assert same(ended(tmp_path / "sliced"), ended(tmp_path / "whole"))

    with pytest.raises(Killed):
        run(mode, "killed", killed_at=30, save_minutes=7 / 60)
    older, newest = checkpoints(tmp_path / "killed")
    state = newest / "trainer_state.json"
    state.write_text(state.read_text()[:-20])  # it was killed while it wrote this one
    assert training.last_checkpoint(older.parent)[0] == str(older)
    run(mode, "killed")
    assert same(ended(tmp_path / "killed"), ended(tmp_path / "whole"))


def test_the_controls_of_going_on(run, tmp_path):
    """Without the states of the random numbers dropout draws other masks; another seed makes another run."""
    run("dense", "whole")
    run("dense", "other", seed=1)
    assert not same(ended(tmp_path / "other"), ended(tmp_path / "whole"))
    run("dense", "sliced", seconds=13)
    (checkpoint,) = checkpoints(tmp_path / "sliced")
    (checkpoint / "rng_state.pth").unlink()
    run("dense", "sliced")
    assert not same(ended(tmp_path / "sliced"), ended(tmp_path / "whole"))


def test_what_is_finished_is_not_done_again(run, monkeypatch):
    first = run("dense")
    monkeypatch.setattr(table, "finished", lambda *_: pytest.fail("it is done again"))
    assert run("dense").splitlines()[-3:] == first.splitlines()[-3:]
    with pytest.raises(pytest.fail.Exception, match="done again"):  # control: a run of other settings is another one
        run("dense", seed=1)


def test_the_last_evaluation_is_shown(run):
    """Before the first one there is nothing to show."""
    early, late = (next(line for line in text.splitlines() if " scheduled " in line) for text in
                   (run("scheduled", seconds=8), run("scheduled", seconds=30)))  # fmt: skip
    assert early.split()[2:6] == ["-"] * 4
    assert all(float(figure) > 0 for figure in late.split()[2:6])


# how the tutorials train ------------------------------------------------------------------------------


def rates(is_stepped_before):
    """The learning rate of every epoch, by torch's StepLR, which the tutorials step before each epoch."""
    optimizer = SGD([torch.zeros(1)], 0.1)
    schedule = StepLR(optimizer, 75, 0.1)
    found = []
    for _ in range(EPOCHS):
        optimizer.step()
        if is_stepped_before:
            schedule.step()
        found.append(optimizer.param_groups[0]["lr"])
        if not is_stepped_before:
            schedule.step()
    return found


def test_the_learning_rate_is_that_of_the_tutorials():
    model, steps_an_epoch = torch.nn.Linear(1, 1), 3
    optimizer, schedule = optimizer_and_schedule(model, TUTORIALS["resnet50"], EPOCHS * steps_an_epoch)
    found = []
    for _ in range(EPOCHS * steps_an_epoch):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    expected = np.repeat(rates(True), steps_an_epoch)
    assert np.allclose(found, expected, rtol=1e-9)
    assert not np.allclose(found, np.repeat(rates(False), steps_an_epoch), rtol=1e-9)  # control
    settings = optimizer.param_groups[0]
    assert (settings["momentum"], settings["weight_decay"], len(settings["params"])) == (0, 1e-3, 2)  # biases decay


def test_the_constants_reach_the_optimizer(run, monkeypatch):
    seen = {}

    class Watch(training.Clock):
        def on_train_begin(self, args, state, control, optimizer, **kwargs):
            seen["optimizer"] = optimizer.optimizer

    monkeypatch.setattr(training, "Clock", Watch)
    run("paper")
    optimizer = seen["optimizer"]
    assert (optimizer.penalty.epsilon, optimizer.penalty.lam, optimizer.penalty.bound) == (0.9, 5e-4, 10.0)
    assert optimizer.schedule.events == (6,)  # 50 of 300 epochs are a sixth of 40 steps; its default is a tenth
    run("scheduled")
    assert not hasattr(seen["optimizer"], "penalty")  # control


# batches ----------------------------------------------------------------------------------------------


def data(**settings):
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (80, 3, 32, 32), np.uint8))
    return Batches(pixels, torch.arange(80) % 10, 64, **settings)


def views(image):
    """All crops of an image with black around it, and their mirror images, as bytes."""
    padded = F.pad(image, [MARGIN] * 4).numpy()
    shifts = range(2 * MARGIN + 1)
    crops = [padded[:, top : top + 32, left : left + 32] for top in shifts for left in shifts]
    return {view.tobytes() for crop in crops for view in (crop, crop[:, :, ::-1])}


def test_images_are_cropped_and_mirrored():
    pixels = data().pixels[:64]
    seen = cropped_and_mirrored(pixels, np.random.default_rng(1))
    kinds = [sorted(views(image)).index(view.numpy().tobytes()) for image, view in zip(pixels, seen, strict=True)]
    assert len(set(kinds)) > 40  # of 162
    assert pixels[1].numpy().tobytes() not in views(pixels[0])  # control


def test_a_batch_depends_on_its_images_alone():
    batches, numbers = data(augment=True, mixup=0.2), list(range(5, 21))
    torch.manual_seed(0)
    first = batches(numbers)
    torch.manual_seed(1)
    again = batches(numbers)
    assert all(torch.equal(first[name], again[name]) for name in first)
    others = {"order": batches(numbers[::-1])["pixel_values"].flip(0),
              "seed": data(augment=True, mixup=0.2, seed=1)(numbers)["pixel_values"]}  # fmt: skip
    assert not any(torch.equal(first["pixel_values"], other) for other in others.values())  # control


def test_what_tests_is_neither_cropped_nor_mixed():
    batches = data(augment=True, mixup=0.2, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    test, train = batches(list(batches.test)), batches(list(batches.train)[:16])
    expected = (batches.pixels[64:].numpy() / 255 - np.reshape([0.1, 0.2, 0.3], (3, 1, 1))) / np.reshape(
        [0.4, 0.5, 0.6], (3, 1, 1)
    )
    assert np.allclose(test["pixel_values"], expected, atol=1e-5)
    assert torch.equal(test["labels"], torch.arange(64, 80) % 10)
    assert train["labels"].shape == (16, 10)
    assert torch.allclose(train["labels"].sum(1), torch.ones(16))
    assert not torch.equal(train["labels"], F.one_hot(torch.arange(16) % 10, 10).float())  # control: it was mixed


def test_mixed_images_and_labels_have_the_same_shares():
    """Where all pixels of an image are its class, a mixed image is the mean of its label."""
    classes = torch.arange(64) % 10
    pixels = classes.to(torch.uint8)[:, None, None, None].expand(64, 3, 32, 32).contiguous()
    batch = Batches(pixels, classes, 64, mixup=0.2, mean=[0, 0, 0], std=[1 / 255] * 3)(list(range(16)))
    mean_class = batch["labels"] @ torch.arange(10.0)
    assert torch.allclose(batch["pixel_values"].mean((1, 2, 3)), mean_class, atol=1e-4)
    assert not torch.allclose(mean_class, classes[:16].float(), atol=1e-4)  # control: it was mixed
