"""`hf_oto.prune`: without training, by a few batches, and nothing of the model changes before all is proven."""

import copy
import gc
import random
import threading
import weakref
from functools import partial

import numpy as np
import peft
import pytest
import torch
import transformers as tf
from datasets import Dataset
from models import TABLE, VOCAB, make, randomise_
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hf_oto
from hf_oto import OTOError, PruningPlan, compact, partition_zigs, prune
from hf_oto.calls import Forward
from hf_oto.output_error import output_error
from hf_oto.walks import NAME


def batches_of(name, number=6):
    """Batches of the model of a row, each with other values."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(number):
        batch = {}
        for key, value in TABLE[name].inputs(4).items():
            if key.endswith("ids"):
                value = torch.randint(3, VOCAB, value.shape, generator=generator)
            elif value.is_floating_point():
                value = torch.randn(value.shape, generator=generator)
            batch[key] = value
        batches.append(batch)
    return batches


def outputs_of(model, batches):
    with torch.no_grad():
        found = [model.eval()(**batch) for batch in batches]
    return torch.cat([(output if isinstance(output, torch.Tensor) else output[0]).flatten() for output in found])


def distance(model, dense, batches):
    """The squared distance of the outputs, by their variance."""
    wanted = outputs_of(dense, batches)
    return float((outputs_of(model, batches) - wanted).square().mean() / wanted.var())


def cut_only(dense, batch, plan):
    partition = partition_zigs(dense, batch)
    return compact(copy.deepcopy(dense), partition, plan)


# what is left does what all did --------------------------------------------------------------------

NAMES = ["bert", "llama", "gpt2", "t5", "vit", "resnet_basic", "mixtral", "albert", "whisper", "convnext"]
NAMES = [name for name in NAMES if name in TABLE]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_exact_nearer_than_a_cut_alone_and_loads_again(name, tmp_path):
    dense, batches = make(name).eval(), batches_of(name)
    small, report = prune(copy.deepcopy(dense), batches[:-1], target_macs=0.6)
    assert report["max_output_difference"] < 1e-9
    assert report["after"]["macs"] < 0.7 * report["before"]["macs"]
    assert all(error <= before for before, error in report["fits"].values())
    others = batches[-1:]  # which it has not seen
    assert distance(small, dense, others) < distance(cut_only(dense, batches[0], report["plan"]), dense, others)
    small.save_pretrained(tmp_path)
    loaded = type(dense).from_pretrained(tmp_path)
    assert torch.equal(outputs_of(loaded, others), outputs_of(small, others))


class Twice(nn.Module):
    """Every hidden feature is there twice, and the second ones are read with small weights."""

    def __init__(self, first, second, dim_of_reader):
        super().__init__()
        self.first, self.second = first, second
        with torch.no_grad():
            for tensor in first.parameters():
                dim = 1 if isinstance(first, nn.modules.conv._ConvTransposeNd) and tensor.dim() > 1 else 0
                half = tensor.shape[dim] // 2
                tensor.narrow(dim, half, half).copy_(tensor.narrow(dim, 0, half))
            read = second.weight
            half = read.shape[dim_of_reader] // 2
            read.narrow(dim_of_reader, half, half).mul_(0.1)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def conv(cls, **options):
    return lambda: Twice(cls(3, 8, 3), cls(8, 4, 3, **options), 0 if "Transpose" in cls.__name__ else 1)


TWICE = {  # name -> (builder, shape of a batch)
    "linear": (lambda: Twice(nn.Linear(3, 8), nn.Linear(8, 4), 1), (64, 3)),
    "without bias": (lambda: Twice(nn.Linear(3, 8), nn.Linear(8, 4, bias=False), 1), (64, 3)),
    "conv1d": (conv(nn.Conv1d, stride=2, padding=1), (8, 3, 20)),
    "conv2d": (conv(nn.Conv2d, dilation=2), (8, 3, 12, 12)),
    "conv3d": (conv(nn.Conv3d), (4, 3, 6, 6, 6)),
    "transposed": (conv(nn.ConvTranspose2d, stride=2, output_padding=1), (8, 3, 6, 6)),
}


@pytest.mark.parametrize("name", TWICE)
def test_what_is_there_twice_goes_without_a_loss(name):
    torch.manual_seed(0)
    build, shape = TWICE[name]
    dense = build().eval()
    batches = [torch.randn(shape) for _ in range(10)]
    small, report = prune(copy.deepcopy(dense), batches, target_per_axis={"first": 0.5}, salience="activations")
    assert report["plan"].kept == {"first.weight[1]" if name == "transposed" else "first.weight[0]": (0, 1, 2, 3)}
    x = torch.randn(shape)
    error = (small(x) - dense(x)).norm() / dense(x).norm()
    bare = cut_only(dense, {"x": x}, report["plan"])
    assert error < 0.01 < 0.05 < (bare(x) - dense(x)).norm() / dense(x).norm()


def test_later_layers_make_up_for_earlier_errors():
    """The second weight has two names, and is left as it was cut. The last layer undoes what it can of that error."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 8)).eval()
    dense[3].alias = dense[2].weight
    batches = [torch.randn(256, 6) for _ in range(8)]
    old = copy.deepcopy(dense[4])
    middle = dense[2].weight.detach().clone()
    x = torch.randn(2000, 6)
    wanted = dense(x)
    small, report = prune(dense, batches, target_per_axis={"0.weight": 0.5})
    kept = list(report["plan"].kept["0.weight[0]"])
    assert torch.equal(small[2].weight, middle[:, kept]) and small[4].weight.shape == old.weight.shape
    error = (small(x) - wanted).norm()
    small[4] = old
    assert error < 0.95 * (small(x) - wanted).norm()


def normed_convolutions():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8 * 4 * 4, 5))


def test_batch_norms_have_the_statistics_of_the_batches():
    """If the dense ones do, and what comes to them has changed: a weight with two names is left as it was cut."""
    dense = normed_convolutions()
    batches = [1 + 2 * torch.randn(32, 3, 8, 8) for _ in range(4)]
    for norm in (dense[1], dense[4]):
        norm.momentum = None
    dense.train()(torch.cat(batches[:-1]))
    dense.eval()
    dense[2].alias = dense[3].weight
    small, _ = prune(copy.deepcopy(dense), batches, target_per_axis={"0.weight": 0.5})
    with torch.no_grad():
        for number in (1, 4):
            x = small[:number](torch.cat(batches[:-1]))
            assert torch.allclose(small[number].running_mean, x.mean((0, 2, 3)), atol=1e-3)
            assert torch.allclose(small[number].running_var, x.var((0, 2, 3)), rtol=1e-2)
    assert (small[4].running_var - dense[4].running_var).abs().max() > 0.01


def test_batch_norms_keep_statistics_that_are_not_those_of_the_batches():
    """What normalises by other statistics than its batches' does so afterwards."""
    dense = randomise_(normed_convolutions()).eval()
    batches = [1 + 2 * torch.randn(16, 3, 8, 8) for _ in range(4)]
    small, report = prune(copy.deepcopy(dense), batches, target_per_axis={"3.weight": 0.5})
    assert torch.allclose(small[1].running_mean, dense[1].running_mean, atol=1e-4)
    assert torch.allclose(small[1].running_var, dense[1].running_var, rtol=1e-4)
    with torch.no_grad():
        x = dense[0](torch.cat(batches))
        assert (dense[1].running_mean - x.mean((0, 2, 3))).abs().max() > 0.1
    assert report["output_error"] < 0.5
    few, _ = prune(copy.deepcopy(dense), batches[0][:1], target_per_axis={"3.weight": 0.25})
    assert torch.equal(few[1].running_mean, dense[1].running_mean)  # 36 values say nothing


def test_rounds_and_reconstruction_bring_it_nearer():
    dense, batches = make("resnet_basic" if "resnet_basic" in TABLE else "llama").eval(), None
    name = "resnet_basic" if "resnet_basic" in TABLE else "llama"
    batches = batches_of(name, 8)
    errors = [
        prune(copy.deepcopy(dense), batches, target_macs=0.5, **options)[1]["output_error"]
        for options in ({}, {"rounds": 4}, {"reconstruct": 100})
    ]
    assert errors[2] < errors[0]
    assert errors[1] != errors[0]


# what it takes -------------------------------------------------------------------------------------


def small_bert():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    return randomise_(tf.BertForSequenceClassification(tf.BertConfig(vocab_size=VOCAB, **sizes))).eval()


def rows(number=24, labels=True, lengths=(5, 9)):
    rng = random.Random(0)
    made = []
    for i in range(number):
        length = rng.randint(*lengths)
        row = {"input_ids": [rng.randint(3, VOCAB - 1) for _ in range(length)], "text": "words"}
        made.append(row | ({"labels": i % 2} if labels else {}))
    return made


def padded(rows, junk=0):
    """One batch; what stands in its padding is `junk`."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids = [row["input_ids"] + [junk] * (longest - len(row["input_ids"])) for row in rows]
    mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_all_kinds_of_batches_are_the_same_batches():
    data = rows(labels=False, lengths=(7, 7))
    ids = [{"input_ids": torch.tensor([row["input_ids"] for row in data[i : i + 8]])} for i in (0, 8, 16)]
    kinds = {
        "list": ids,
        "generator": (batch for batch in ids),
        "loader": DataLoader(ids, batch_size=None),
        "dataset": Dataset.from_list(data),
        "with strings": [batch | {"text": ["words"] * 8} for batch in ids],
    }
    results = {}
    for name, batches in kinds.items():
        small, _ = prune(small_bert(), batches, target_macs=0.6, batch_size=8)
        results[name] = weights(small)
    assert all(same(results["list"], result) for result in results.values())
    fewer, _ = prune(small_bert(), ids, target_macs=0.6, max_batches=2)
    assert not same(results["list"], weights(fewer))


def test_a_dataset_is_padded_with_its_mask_and_labels():
    data = Dataset.from_list(rows())
    by_hand = [padded(rows()[i : i + 8]) for i in (0, 8, 16)]
    labels = torch.tensor([row["labels"] for row in rows()])
    by_hand = [batch | {"labels": labels[8 * i : 8 * i + 8]} for i, batch in enumerate(by_hand)]
    options = {"target_macs": 0.6, "salience": "labels"}
    assert same(
        weights(prune(small_bert(), data, batch_size=8, **options)[0]),
        weights(prune(small_bert(), by_hand, **options)[0]),
    )


def test_what_a_forward_does_not_take_is_left_out():
    """A loader of (inputs, labels) gives lists; of a batch by name other columns are dropped, and labels renamed."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3)).eval()
    x, labels = torch.randn(64, 6), torch.zeros(64, dtype=torch.long)
    loader = DataLoader(TensorDataset(x, labels), batch_size=16)
    state = torch.random.get_rng_state()
    by_loader, _ = prune(copy.deepcopy(dense), loader, target_macs=0.5)
    assert torch.equal(torch.random.get_rng_state(), state)
    by_hand, _ = prune(copy.deepcopy(dense), list(x.split(16)), target_macs=0.5)
    assert same(weights(by_loader), weights(by_hand))
    renamed = [padded(rows()[i : i + 8]) | {"label": torch.arange(8) % 2} for i in (0, 8, 16)]
    prune(small_bert(), renamed, target_macs=0.6, salience="labels")


def test_one_row_at_a_time_is_enough():
    """Some batches are held out whole."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3)).eval()
    batches = list(torch.randn(400, 6).split(1))
    _, report = prune(copy.deepcopy(dense), batches, target_macs=0.5, max_batches=400)
    before, after = report["fits"]["2.weight"]
    assert after < before


@pytest.mark.parametrize("salience", ["outputs", "activations"])
def test_what_stands_in_padding_changes_nothing(salience):
    results = []
    for junk in (0, 1):
        batches = [padded(rows()[i : i + 8], junk) for i in (0, 8, 16)]
        results.append(weights(prune(small_bert(), batches, target_macs=0.6, salience=salience)[0]))
    for name, tensor in results[0].items():
        assert torch.allclose(tensor, results[1][name], atol=1e-5), name
    batches = [{"input_ids": padded(rows()[i : i + 8], 1)["input_ids"]} for i in (0, 8, 16)]
    without_mask = weights(prune(small_bert(), batches, target_macs=0.6, salience=salience)[0])
    shapes_differ = any(tensor.shape != without_mask[name].shape for name, tensor in results[0].items())
    assert shapes_differ or any((t - without_mask[n]).abs().max() > 1e-3 for n, t in results[0].items())


def test_the_same_call_gives_the_same_model_and_draws_no_random_numbers():
    batches = [padded(rows()[i : i + 8]) for i in (0, 8, 16)]
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        model = small_bert()
        before = torch.random.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        results.append(weights(prune(model, batches, target_macs=0.6, reconstruct=5)[0]))
        after = torch.random.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert same(*results)


def test_the_stock_class_where_widths_are_uniform(tmp_path):
    batches = [padded(rows()[i : i + 8]) for i in (0, 8, 16)]
    small, report = prune(small_bert(), batches, target_macs=0.8, uniform=True)
    assert type(small) is tf.BertForSequenceClassification and "oto" not in vars(small.config)
    assert report["after"]["macs"] <= 0.8 * report["before"]["macs"]
    small.save_pretrained(tmp_path)
    loaded = tf.BertForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(outputs_of(loaded, batches), outputs_of(small, batches))


def test_a_compact_model_is_pruned_again(tmp_path):
    batches = [padded(rows()[i : i + 8]) for i in (0, 8, 16)]
    small, first = prune(small_bert(), batches, target_macs=0.8)
    small, second = prune(small, batches, target_macs=0.8)
    assert second["before"]["macs"] == first["after"]["macs"] > second["after"]["macs"]
    small.save_pretrained(tmp_path)
    loaded = tf.BertForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(outputs_of(loaded, batches), outputs_of(small, batches))


def test_protected_weights_and_modes_stay():
    model = small_bert().train()
    model.bert.embeddings.requires_grad_(False)
    batches = [padded(rows()[i : i + 8]) for i in (0, 8, 16)]
    small, report = prune(model, batches, target_macs=0.8, protect=[r"layer\.0\."])
    assert small is model and small.training and all(module.training for module in small.modules())
    assert (
        not any(p.requires_grad for p in small.bert.embeddings.parameters()) and small.classifier.weight.requires_grad
    )
    assert all(p.grad is None for p in small.parameters())
    assert report["plan"].kept and not any("layer.0." in name for name in report["plan"].kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_stays(dtype):
    batches = [padded(rows()[i : i + 8]) for i in (0, 8, 16)]
    small, report = prune(small_bert().to(dtype), batches, target_macs=0.6)
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert report["output_error"] < 0.4 and report["max_output_difference"] < 1e-9


def test_forwards_that_keep_something_in_their_modules():
    """Batches of other sizes would find each other's tensors, if they walked together."""

    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 3)

        def forward(self, x):
            self.kept = x[:, :1]
            x = self.second(torch.relu(self.first(x)))
            return self.third(torch.relu(x) * self.kept)

    torch.manual_seed(0)
    dense = Keeps().eval()
    batches = [torch.randn(size, 4) for size in (64, 32, 64)]
    _, report = prune(copy.deepcopy(dense), batches, target_macs=0.5)
    assert report["output_error"] < 0.2 and all(error <= before for before, error in report["fits"].values())


class Tied(nn.Module):
    """An embedding whose table the head multiplies by, under one name."""

    def __init__(self):
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(30, 32), nn.Linear(32, 96), nn.Linear(96, 32)

    def forward(self, ids):
        hidden = self.down(torch.relu(self.up(self.table(ids))))
        return nn.functional.linear(hidden, self.table.weight)


def test_what_is_read_otherwise_too_stays():
    torch.manual_seed(0)
    dense = Tied().eval()
    batches = [torch.randint(0, 30, (16, 8)) for _ in range(6)]
    small, report = prune(copy.deepcopy(dense), batches, target_macs=0.5, protect=["table"])
    assert torch.equal(small.table.weight, dense.table.weight)
    ids = batches[0]
    bare = cut_only(dense, {"ids": ids}, report["plan"])
    assert (small(ids) - dense(ids)).norm() < (bare(ids) - dense(ids)).norm()


class Counts(nn.Module):
    """A forward that writes to a buffer, keeps a tensor, and holds something that can't be copied, if asked to."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 32), nn.Linear(32, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += len(x)
        self.last = torch.relu(self.first(x))
        return self.second(self.last)


def test_what_forwards_write_is_not_written_to_the_model():
    torch.manual_seed(0)
    dense = Counts().eval()
    dense(torch.randn(4, 6))
    small, _ = prune(dense, [torch.randn(64, 6) for _ in range(4)], target_macs=0.5, reconstruct=3)
    assert small.seen == 4 and small.last.shape == (4, 32)
    dense = Counts().eval()
    dense.lock = threading.Lock()
    with pytest.raises(OTOError, match=r"Counts can't be copied: .*lock"):
        prune(dense, torch.randn(64, 6), target_macs=0.5)


class Chosen(nn.Module):
    """Experts in a list, each of which sees the tokens that a gate gives it."""

    def __init__(self):
        super().__init__()
        self.before, self.gate = nn.Linear(4, 16), nn.Linear(16, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)) for _ in range(3))

    def forward(self, x):
        hidden = torch.tanh(self.before(x))
        chosen = self.gate(hidden).argmax(-1)
        out = x.new_zeros(len(x), 4)
        for number, expert in enumerate(self.experts):
            mine = chosen == number
            if mine.any():
                out[mine] = expert(hidden[mine])
        return out


def test_stacked_experts_are_fitted_one_by_one():
    _, report = prune(make("mixtral").eval(), batches_of("mixtral", 8), target_macs=0.6)
    experts = {name.partition("[")[2] for name in report["fits"] if "experts.down_proj" in name}
    assert len(experts) == make("mixtral").config.num_local_experts


@pytest.mark.parametrize("batch_size", [3, 64])
def test_experts_that_get_other_tokens_in_the_cut_model(batch_size):
    torch.manual_seed(0)
    dense = Chosen().eval()
    batches = list(torch.randn(20 * batch_size, 4).split(batch_size))
    protect = ["before", "gate"]
    small, report = prune(copy.deepcopy(dense), batches, target_group_sparsity=0.5, protect=protect)
    assert all(not after > before for before, after in report["fits"].values())
    x = torch.randn(500, 4)
    bare = cut_only(dense, {"x": x}, report["plan"]) if batch_size > 3 else None
    if bare is not None:
        assert (small(x) - dense(x)).norm() < (bare(x) - dense(x)).norm()


class Oddly(nn.Module):
    """Biases that are a part of a parameter, or belong to two layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 32)
        self.second, self.third = (nn.Linear(32, 8, bias=False) for _ in range(2))
        self.biases, self.shared = nn.Parameter(torch.randn(16)), nn.Parameter(torch.randn(8))

    def forward(self, x):
        x = torch.relu(self.first(x))
        part = nn.functional.linear(x, self.second.weight, self.biases[:8])
        other = nn.functional.linear(x, self.third.weight, self.shared)
        return part * nn.functional.linear(x, self.second.weight[:, :], self.shared) + other


def test_biases_that_are_not_the_layers_own_stay():
    torch.manual_seed(0)
    dense = Oddly().eval()
    batches = [torch.randn(128, 4) for _ in range(6)]
    small, report = prune(copy.deepcopy(dense), batches, target_macs=0.6)
    assert torch.equal(small.biases, dense.biases) and torch.equal(small.shared, dense.shared)
    x = torch.randn(500, 4)
    assert (small(x) - dense(x)).norm() < (cut_only(dense, {"x": x}, report["plan"])(x) - dense(x)).norm()


def test_reconstruction_in_half_precision_and_one_that_does_not_help(monkeypatch, caplog):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3)).to(torch.bfloat16).eval()
    batches = [torch.randn(128, 6, dtype=torch.bfloat16) for _ in range(4)]
    errors = []
    for steps in (0, 300):
        _, report = prune(copy.deepcopy(dense), batches, target_macs=0.4, reconstruct=steps)
        errors.append(report["output_error"])
    assert errors[1] < 0.9 * errors[0]
    monkeypatch.setattr("hf_oto.reconstruction.LEARNING_RATE", 10.0)
    _, report = prune(copy.deepcopy(dense), batches, target_macs=0.4, reconstruct=10)
    assert report["output_error"] == errors[0] and "reconstruction is undone" in caplog.text


# errors --------------------------------------------------------------------------------------------


def good_batches():
    return [padded(rows()[i : i + 8]) for i in (0, 8, 16)]


NAN = [{"inputs_embeds": torch.full((4, 5, 32), torch.nan)}]
ERRORS = {  # name -> (batches, options, error, what it says)
    "no batch": ([], {}, OTOError, "no batch"),
    "no column": (Dataset.from_list([{"text": "words"}]), {}, OTOError, "no column that .* tokenizer"),
    "no labels": (good_batches(), {"salience": "labels"}, OTOError, "add them, or use"),
    "nothing": (None, {}, ValueError, "is a NoneType: pass a batch"),
    "no rows": (Dataset.from_dict({"input_ids": []}), {}, OTOError, "no batch"),
    "rows that are lists": ([{"input_ids": [3, 4, 5]}], {}, ValueError, "no tensor .*Dataset of rows"),
    "several datasets": ({"train": Dataset.from_list([{"a": 1}])}, {}, ValueError, "dict of datasets, train"),
    "no numbers": (Dataset.from_list([{"input_ids": "words"}]), {}, OTOError, "'input_ids' .* no numbers"),
    "no batch size": (good_batches(), {"batch_size": 0}, ValueError, "batch_size is 0: .* at least 1"),
    "no number of batches": (
        good_batches(),
        {"max_batches": None},
        ValueError,
        "max_batches is None: .* whole number",
    ),
    "an empty batch": (torch.zeros(0, 12, dtype=torch.int64), {}, ValueError, "no rows"),
    "no list in protect": (good_batches(), {"protect": None}, ValueError, "protect is None: .* list"),
    "no pattern in protect": (
        good_batches(),
        {"protect": ["("]},
        ValueError,
        r"protect has '\(', which is no regular",
    ),
    "no pattern": (
        good_batches(),
        {"target_macs": None, "target_per_axis": {"(": 0.5}},
        ValueError,
        "target_per_axis has '\\(', which is no",
    ),
    "half a width": (good_batches(), {"group_divisible": 1.5}, ValueError, "group_divisible is 1.5: .* whole number"),
    "a floor below zero": (good_batches(), {"min_keep": -0.1}, ValueError, "min_keep is -0.1"),
    "a target that is no number": (good_batches(), {"target_macs": True}, ValueError, "True is no number"),
    "another salience": (good_batches(), {"salience": "magnitude"}, ValueError, "must be one of outputs"),
    "no round": (good_batches(), {"rounds": 0}, ValueError, "rounds is 0: .* at least 1"),
    "half a round": (good_batches(), {"rounds": 2.5}, ValueError, "rounds is 2.5: it must be a whole number"),
    "whether to reconstruct": (good_batches(), {"reconstruct": True}, ValueError, "reconstruct is True"),
    "labels alone": (Dataset.from_list([{"text": "a", "label": 1}]), {}, OTOError, "no column that .* tokenizer"),
    "no number": (NAN, {}, OTOError, "finite number"),
    "too little": (good_batches(), {"target_macs": 0.01}, ValueError, "not feasible"),
    "two targets": (good_batches(), {"target_params": 0.5}, ValueError, "one target at a time"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_is_an_error_that_says_the_way_out(name):
    batches, options, error, text = ERRORS[name]
    model = small_bert()
    before = weights(model)
    with pytest.raises(error, match=text):
        prune(model, batches, **{"target_macs": 0.6} | options)
    assert same(weights(model), before) and type(model) is tf.BertForSequenceClassification


def fails_at(monkeypatch, place):
    """Lets something fail: a later batch, the certificate, or the very cut, by an error or by Ctrl-C."""
    if place == "certificate":
        certificate = hf_oto.certificate.Certificate(1.0, 1.0, 1e-9, 1.0)
        monkeypatch.setattr("hf_oto.pruning.certify", lambda *_: certificate)
        return OTOError
    if place == "cut":
        original = hf_oto.compaction.become_compact_

        def interrupted(part, record):
            original(part, record)
            if part.bert.embeddings.word_embeddings.weight.requires_grad is False:  # the model itself, not its copy
                raise KeyboardInterrupt

        monkeypatch.setattr("hf_oto.compaction.become_compact_", interrupted)
        return KeyboardInterrupt
    return RuntimeError


@pytest.mark.parametrize("place", ["batch", "certificate", "cut"])
def test_the_model_is_untouched_if_anything_fails(monkeypatch, place):
    model = small_bert().train()
    model.bert.embeddings.requires_grad_(False)
    batches = good_batches()
    if place == "batch":
        batches[2]["input_ids"] = torch.full((8, 9), VOCAB + 1)
        del batches[2]["attention_mask"]
    before, config, cls = weights(model), model.config.to_dict(), type(model)
    tensors = {name: id(p) for name, p in model.named_parameters()}
    with pytest.raises((fails_at(monkeypatch, place), IndexError)):
        prune(model, batches, target_macs=0.6)
    assert same(weights(model), before) and type(model) is cls and model.config.to_dict() == config
    assert {name: id(p) for name, p in model.named_parameters()} == tensors
    assert model.training and not model.bert.embeddings.word_embeddings.weight.requires_grad
    assert model.classifier.weight.requires_grad and model.classifier.weight.grad is None
    assert NAME not in {thread.name for thread in threading.enumerate()}


def test_adapters_and_what_is_no_module_are_refused():
    """What an adapter saves can't say what was pruned. Merged, it can be; and so can a base that has none."""
    config = peft.LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS")
    adapted = peft.get_peft_model(small_bert(), config)
    with pytest.raises(OTOError, match="merge the adapter"):
        prune(adapted, good_batches(), target_macs=0.6)
    small, _ = prune(adapted.merge_and_unload(), good_batches(), target_macs=0.6)
    assert small.num_parameters() < small_bert().num_parameters()
    with pytest.raises(ValueError, match=r"model is a str, .* pipeline"):
        prune("dense", good_batches())


def test_the_error_that_is_reported_is_one_on_other_data():
    """Few rows fit themselves, and nothing else."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 3)).eval()
    batches = list(torch.randn(80, 6).split(8))
    small, report = prune(copy.deepcopy(dense), batches, target_macs=0.5)
    assert report["output_error_is_held_out"] and "held out" in str(report)
    x = batches[-1]
    off = ((small(x) - dense(x)).square().mean() / dense(x).var(0, correction=0).mean()).item()
    assert report["output_error"] == pytest.approx(off, rel=1e-3)
    _, report = prune(copy.deepcopy(dense), batches[:3], target_macs=0.5)
    assert not report["output_error_is_held_out"] and "fitted to" in str(report)


@pytest.mark.parametrize("around", [partial(torch.compile, backend="eager"), nn.DataParallel])
def test_what_stands_around_a_model_does_not_hide_its_columns(around):
    dataset = Dataset.from_list(
        [{"input_ids": row.tolist(), "text": "unused"} for row in torch.randint(0, VOCAB, (40, 12))]
    )
    model = small_bert()
    small, _ = prune(around(model), dataset, target_macs=0.6)
    assert isinstance(small, type(around(model))) and model.num_parameters() < small_bert().num_parameters()


class Constantly(nn.Module):
    """Most of what differs between its outputs has nothing to do with the inputs."""

    def __init__(self, returns):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 3))
        self.register_buffer("offset", torch.tensor([0.0, 50.0, 100.0]))
        self.returns = returns

    def forward(self, x, labels=None):
        logits = self.layers(x) + self.offset
        loss = None if labels is None else nn.functional.cross_entropy(logits / 100, labels)
        return {"logits": logits, "loss": loss, "tuple": (loss, logits)}[self.returns]


def test_what_all_examples_share_is_no_variance():
    torch.manual_seed(0)
    dense = Constantly("logits").eval()
    batches = list(torch.randn(80, 6).split(8))
    small, report = prune(copy.deepcopy(dense), batches, target_macs=0.3, min_keep=0)
    x = batches[-1]
    squares = (small(x) - dense(x)).square()
    assert report["output_error"] == pytest.approx(
        (squares.sum() / (dense(x) - dense(x).mean(0)).square().sum()).item()
    )
    assert report["output_error"] > 100 * squares.mean() / dense(x).var()


class Divided(nn.Module):
    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, x):
        return (x - x[0]) / self.by


def test_no_number_where_the_dense_model_has_one_is_infinitely_far():
    forwards = [Forward((torch.arange(6.0).reshape(3, 2),))]
    assert output_error(Divided(1.0), Divided(0.5), forwards) == pytest.approx(2.5)
    assert output_error(Divided(1.0), Divided(0.0), forwards) == float("inf")


@pytest.mark.parametrize("returns", ["loss", "tuple"])
def test_a_loss_is_found_alone_and_first(returns):
    torch.manual_seed(0)
    model = Constantly(returns).eval()
    batches = [{"x": torch.randn(16, 6), "labels": torch.randint(0, 3, (16,))} for _ in range(5)]
    _, report = prune(model, batches, target_macs=0.5, salience="labels")
    if returns == "loss":  # of a loss alone nobody knows how much it differs between examples
        assert report["output_error"] is None and "off the dense" not in str(report)
    else:
        assert 0 < report["output_error"] < 1
    with pytest.raises(OTOError, match="loss that a model returns"):
        prune(Constantly("logits"), [batch["x"] for batch in batches], salience="labels")


@pytest.mark.parametrize("number", [0, 2, 4])
def test_no_number_in_any_batch_is_an_error(number):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 3)).eval()
    batches = list(torch.randn(40, 6).split(8))
    batches[number] = batches[number] * torch.nan
    model = copy.deepcopy(dense)
    with pytest.raises(OTOError, match="finite"):
        prune(model, batches, target_macs=0.5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))


def test_a_batch_that_the_model_cannot_take_is_named():
    model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 3)).eval()
    batches = list(torch.randn(40, 6).split(8))
    batches[2] = torch.randn(8, 7)
    with pytest.raises(OTOError, match=r"can't take batch 2, .*\(8, 7\)"):
        prune(model, batches, target_macs=0.5)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 3))

    def forward(self, of, scale=1.0):
        return self.layers(of["x"][0]) * scale


def test_tensors_may_lie_deeper_in_a_batch():
    batches = [{"of": {"x": [rows]}} for rows in torch.randn(40, 6).split(8)]
    _, report = prune(Nested().eval(), batches, target_macs=0.5)
    assert report["after"]["macs"] <= 0.5 * report["before"]["macs"]


def test_in_inference_mode_it_prunes_and_the_result_can_be_trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 3)).eval()
    with torch.inference_mode():
        batches = list(torch.randn(40, 6).split(8))
        small, _ = prune(model, batches, target_macs=0.5, reconstruct=3)
        assert torch.is_inference_mode_enabled()
    small(torch.randn(4, 6)).sum().backward()
    assert all(weight.grad is not None for weight in small.parameters())


@pytest.mark.parametrize("way", ["forward", "hook"])
def test_functions_that_lead_from_the_copy_to_the_model_are_refused(way):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3)).eval()
    if way == "forward":
        own = model.forward
        model.forward = lambda input: own(input)
    else:
        model[1].register_forward_hook(lambda module, args, output: output + 0 * model[0](args[0][:, :6]).sum())
    before = weights(model)
    with pytest.raises(OTOError, match=r"leads to .* take it off"):
        prune(model, [torch.randn(64, 6) for _ in range(3)], target_macs=0.5)
    assert same(weights(model), before)


class Scaled(nn.Module):
    """A parameter that is one number, logits that may be none, and weights that are frozen."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 32), nn.Linear(32, 3)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return {"logits": self.scale * self.second(torch.relu(self.first(x)))}


def test_numbers_frozen_weights_and_autocast():
    torch.manual_seed(0)
    dense = Scaled().eval()
    dense.second.bias.requires_grad_(False)
    batches = [{"x": torch.randn(64, 6)} for _ in range(6)]
    plain, report = prune(copy.deepcopy(dense), batches, target_macs=0.5)
    frozen = plain.second.bias.clone()
    small, _ = prune(copy.deepcopy(dense), batches, target_macs=0.5, reconstruct=50)
    assert torch.equal(small.second.bias, frozen) and not torch.equal(small.scale, dense.scale)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        small, same_report = prune(copy.deepcopy(dense), batches, target_macs=0.5)
    assert same(weights(small), weights(plain)) and same_report["fits"] == report["fits"]
    with pytest.raises(OTOError, match="logits are not finite"):
        prune(dense, [batches[0], {"x": torch.full((8, 6), torch.nan)}, *batches], target_macs=0.5)


def test_weights_that_are_not_there_are_an_error():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(OTOError, match="meta device"):
        prune(model, torch.randn(64, 3), target_macs=0.5)


def test_nothing_of_the_batches_is_kept():
    batches = good_batches()
    result = prune(small_bert(), batches, target_macs=0.6)
    kept = [weakref.ref(batch["input_ids"]) for batch in batches]
    del batches
    gc.collect()
    assert not any(ref() is not None for ref in kept)
    assert isinstance(result[1]["plan"], PruningPlan)
