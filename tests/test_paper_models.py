"""The networks of the OTO papers: what the papers prune is found, cut out without a trace, and saved."""

import copy
import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from models import channels, randomise_, waves
from torch import nn
from transformers import ResNetConfig

from hf_oto import PruningPlan, ZIGPartition, check_zero_invariance, compact, partition_zigs
from hf_oto.report import macs

REPO = Path(__file__).parents[1]
sys.path.append(str(REPO))  # `recipes.paper.models`: plain `models` is the table of the other tests

from recipes.paper.models import (  # noqa: E402
    CARN,
    VGG,
    CARNConfig,
    DemoNet,
    DemoNetConfig,
    DenseNet,
    DenseNetConfig,
    SmallResNetForImageClassification,
    StackedUnets,
    StackedUnetsConfig,
    VGGConfig,
)

TOLERANCE = 1e-5
SIZE = 8  # pixels a side
SMALL = {"num_labels": 5, "image_size": SIZE}


def vgg(batch_norm):
    sizes = {"hidden_sizes": [4, 6, 8], "depths": [1, 1, 2], "classifier_sizes": [10, 12]}
    return VGG(VGGConfig(batch_norm=batch_norm, **sizes, **SMALL))


def densenet(small_images=True):
    sizes = {"num_init_features": 6, "growth_rate": 4, "block_config": [2, 3], "bn_size": 2}
    return DenseNet(DenseNetConfig(small_images=small_images, **sizes, **(SMALL | {"image_size": 32})))


def carn(size=8, **options):
    return CARN(CARNConfig(hidden_size=size, image_size=SIZE, **options))


def resnet():
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 6], "depths": [1, 1], "layer_type": "basic"}
    return SmallResNetForImageClassification(ResNetConfig(num_labels=5, **sizes))


VGG_AXES = channels({4: 1, 6: 1, 8: 2}) | {("units", 10): 1, ("units", 12): 1}
DENSENET_AXES = channels({6: 1, 7: 1, 8: 5, 4: 5})  # stem, transition, bottlenecks, growth
NETWORKS = {  # name -> (builder, (kind, size) of an axis -> how many of them)
    "vgg16": (lambda: vgg(False), VGG_AXES),
    "vgg16_bn": (lambda: vgg(True), VGG_AXES),
    "densenet": (densenet, DENSENET_AXES),
    "densenet_large_images": (lambda: densenet(False), DENSENET_AXES),
    "carn": (carn, channels({8: 23})),
    "carn_x3_recursive": (lambda: carn(scale=3, recursive=True), channels({8: 11})),
    "carn_x4_groups": (lambda: carn(scale=4, group=2), channels({8: 3}) | {("groups", 2): 10}),
    "carn_m": (lambda: carn(16, group=4, recursive=True), channels({16: 3}) | {("groups", 4): 4}),
    "stacked_unets": (lambda: StackedUnets(StackedUnetsConfig(hidden_sizes=[4, 6, 8], **SMALL)),
                      channels({4: 11, 6: 11, 8: 4})),
    "demonet": (lambda: DemoNet(DemoNetConfig(hidden_size=4, classifier_size=6, **SMALL)),
                channels({4: 1, 8: 1, 16: 1}) | {("groups", 4): 1, ("units", 6): 1}),
    "resnet": (resnet, channels({4: 2, 6: 2})),
}  # fmt: skip


class Network(NamedTuple):
    """A network that no test may change, a batch, its partition, and the axes it must have."""

    model: nn.Module
    inputs: dict[str, torch.Tensor]
    partition: ZIGPartition
    axes: dict[tuple[str, int], int]


@functools.cache
def prepared(name):
    build, axes = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = randomise_(build()).eval()
    inputs = {"pixel_values": waves(2, 3, SIZE, SIZE) if "large" not in name else waves(2, 3, 32, 32)}
    return Network(model, inputs, partition_zigs(model, inputs), axes)


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    return prepared(request.param)


@pytest.fixture(scope="module")
def cut(network, draw_plan, outputs):
    """A compact copy by a random plan, and the outputs of the full model with the same ZIGs zeroed."""
    model, plan = copy.deepcopy(network.model), draw_plan(network.partition)
    network.partition.zero_(model, plan)
    zeroed = outputs(model, network.inputs)
    return compact(model, network.partition, plan), plan, zeroed


def with_members(partition, change):
    """The partition with other members: `change(axis)` gives them."""
    axes = [dataclasses.replace(axis, members=tuple(change(axis))) for axis in partition.axes]
    return dataclasses.replace(partition, axes=tuple(axes))


def axis_of(partition, name):
    return next(axis for axis in partition.axes if axis.name == name)


def places(axis):
    """(parameter, dim) -> its positions along the axis, (size, k) as lists; the axis must cut it in one place only."""
    assert len({(m.param, m.dim) for m in axis.members}) == len(axis.members)
    return {(m.param, m.dim): m.positions(axis.size).tolist() for m in axis.members}


# the laws


def test_the_axes_of_the_paper_are_found(network):
    found = [(axis.kind, axis.size) for axis in network.partition.axes]
    assert {key: found.count(key) for key in found} == network.axes
    assert all(axis.zero_path for axis in network.partition.axes)
    assert not any("rehearsal" in why or "no rule" in why for why in network.partition.pinned.values())


def test_zigs_are_zero_invariant(network):
    assert check_zero_invariance(network.model, network.partition, network.inputs) <= TOLERANCE


def test_a_producer_left_alive_shows(network):
    def forget(axis):
        """The last producer, a bias, is not zeroed."""
        last = [m for m in axis.members if m.role == "producer"][-1]
        return [dataclasses.replace(m, role="consumer") if m is last else m for m in axis.members]

    broken = with_members(network.partition, forget)
    assert check_zero_invariance(network.model, broken, network.inputs) > 1e-3


def test_a_compact_network_is_the_zeroed_one(network, cut, outputs, difference):
    small, _, zeroed = cut
    assert difference(zeroed, outputs(small, network.inputs)) <= TOLERANCE
    assert difference(outputs(network.model, network.inputs), zeroed) > 1e-3
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in network.model.parameters())


def test_cutting_other_consumers_shows(network, cut, outputs, difference):
    def shift(axis):
        for m in axis.members:
            positions = m.positions(axis.size)
            yield dataclasses.replace(m, index=positions[::-1]) if m.role == "consumer" else m

    _, plan, zeroed = cut
    wrong = compact(copy.deepcopy(network.model), with_members(network.partition, shift), plan)
    assert difference(zeroed, outputs(wrong, network.inputs)) > 1e-3


def test_networks_come_back_from_their_folder(network, cut, outputs, difference, tmp_path):
    for name, model in (("dense", network.model), ("compact", cut[0])):
        model.save_pretrained(tmp_path / name)
        again = type(network.model).from_pretrained(tmp_path / name).eval()
        assert difference(outputs(model, network.inputs), outputs(again, network.inputs)) == 0.0
        assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert (tmp_path / "compact/model.safetensors").stat().st_size < (
        tmp_path / "dense/model.safetensors"
    ).stat().st_size


def test_widths_come_back_through_the_record_only(cut, network, tmp_path):
    cut[0].save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["oto"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="mismatch"):
        type(network.model).from_pretrained(tmp_path)


def test_every_parameter_learns(network, cut):
    """With labels there is a loss, in full and in compact form, and all that is left takes part in it."""
    for model in (network.model, cut[0]):
        model = copy.deepcopy(model).train()
        out = model(**network.inputs)[0].detach()
        is_image = isinstance(model, CARN)
        labels = out.flip(-1) if is_image else torch.tensor([0, 4])
        loss = model(**network.inputs, labels=labels).loss
        assert loss.shape == () and loss.isfinite() and loss > 0
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# what each network is there for


def test_a_norm_over_a_concatenation_belongs_to_its_producers():
    partition = prepared("densenet").partition
    first, second = (places(axis_of(partition, f"blocks.0.{i}.conv2.weight[0]")) for i in range(2))
    stem = places(axis_of(partition, "stem.weight[0]"))
    columns = [list(range(6)), list(range(6, 10)), list(range(10, 14))]  # of the concatenation: stem, first, second
    for part in ("weight", "bias", "running_mean", "running_var"):
        name = f"transitions.0.norm.{part}"
        assert [axis[name, 0] for axis in (stem, first, second)] == [[[i] for i in c] for c in columns]
    assert [axis["transitions.0.conv.weight", 1] for axis in (stem, first, second)] == [
        [[i] for i in c] for c in columns
    ]
    assert first["blocks.0.1.norm1.weight", 0] == [[6], [7], [8], [9]]
    assert ("blocks.0.1.norm1.weight", 0) not in second  # it is read before the second layer adds to it


def test_one_growth_channel_leaves_every_concatenation():
    model, _, partition, _ = prepared("densenet")
    small = compact(copy.deepcopy(model), partition, PruningPlan({"blocks.1.0.conv2.weight[0]": [0, 2, 3]}))
    assert [layer.norm1.num_features for layer in small.blocks[1]] == [7, 10, 14]
    assert (small.norm.num_features, small.classifier.in_features) == (18, 18)
    assert small.blocks[1][0].conv2.out_channels == 3
    assert [layer.norm1.num_features for layer in small.blocks[0]] == [6, 10]  # another block, another stream


def test_skip_connections_are_prunable():
    """A skip's channels go from the first half of the concatenation, the upsampled ones from the second."""
    partition = prepared("stacked_unets").partition
    for unet, up in (("unet1", "up.{}.weight[1]"), ("unet2", "up.{}.1.weight[0]")):
        for level, (source, width) in enumerate((("first.3.weight[0]", 4), ("encode.0.3.weight[0]", 6))):
            skip = places(axis_of(partition, f"{unet}.{source}"))
            other = places(axis_of(partition, f"{unet}.{up.format(level)}"))
            reader = (f"{unet}.decode.{level}.0.weight", 1)
            assert skip[reader] == [[i] for i in range(width)]
            assert other[reader] == [[i] for i in range(width, 2 * width)]
    assert ("unet1.down.0.weight", 1) in places(axis_of(partition, "unet1.first.3.weight[0]"))
    assert ("unet1.up.0.weight", 0) in places(axis_of(partition, "unet1.decode.1.3.weight[0]"))


def test_grouped_convolutions_lose_whole_groups():
    model, _, partition, _ = prepared("carn_m")
    axis = axis_of(partition, "entry.weight[0]")
    conv = "body.parts.0.parts.0.conv1.weight"
    assert axis.kind == "groups" and places(axis)[conv, 0] == [list(range(4 * i, 4 * i + 4)) for i in range(4)]
    assert f"{conv}[1]" in partition.pinned  # the positions inside a group
    small = compact(copy.deepcopy(model), partition, PruningPlan({axis.name: [0, 2, 3]}))
    block = small.body.parts[0].parts[0]
    assert (block.conv1.groups, block.conv1.weight.shape) == (3, (12, 4, 3, 3))
    assert small.body.parts[1].parts[0].conv1.groups == 4


def test_pixel_shuffle_takes_channels_in_fours():
    axis = axis_of(prepared("carn").partition, "upsample.0.weight[0]")
    assert places(axis)["upsample.0.weight", 0] == [list(range(4 * i, 4 * i + 4)) for i in range(8)]
    assert places(axis)["exit.weight", 1] == [[i] for i in range(8)]


def test_shared_weights_tie_what_they_make():
    """One block used three times adds to the block's input and to what its fusions make: they can only go together."""
    shared = prepared("carn_x3_recursive").partition
    free = prepared("carn").partition
    fused = [("body.parts.0.fuse.0.weight", 0), ("body.parts.0.fuse.1.weight", 0)]
    entry = places(axis_of(shared, "entry.weight[0]"))
    assert {*fused, ("body.parts.0.parts.0.conv2.weight", 0)} <= entry.keys()
    assert fused[0] not in places(axis_of(free, "entry.weight[0]"))
    assert entry["body.parts.0.fuse.0.weight", 1] == [[i, i + 8] for i in range(8)]  # the input and what was added


def test_two_norms_of_one_tensor_and_a_residual_are_one_axis():
    axis = places(axis_of(prepared("demonet").partition, "left.weight[0]"))
    for name in ("right.weight", "norm_left.0.weight", "norm_left.1.weight"):
        assert axis[name, 0] == [[i] for i in range(8)]
    assert axis["norm_cat.weight", 0] == axis["reduce.weight", 1] == [[i] for i in range(4, 12)]


def test_depthwise_convolutions_lose_channels():
    model, _, partition, _ = prepared("demonet")
    small = compact(copy.deepcopy(model), partition, PruningPlan({"reduce.weight[0]": range(3, 16)}))
    assert (small.depthwise.groups, small.depthwise.weight.shape) == (13, (13, 1, 3, 3))


@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        (lambda: DenseNet(DenseNetConfig(num_labels=1000, small_images=False)), 7_978_856),
        (lambda: SmallResNetForImageClassification(ResNetConfig(
            hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=10)), 11_173_962),
    ],
    ids=["densenet121", "resnet18"],
)  # fmt: skip
def test_networks_have_the_published_number_of_parameters(build, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in build().parameters()) == parameters


@pytest.mark.parametrize(("options", "giga"), [({}, 222.8), ({"group": 4, "recursive": True}, 91.2)])
def test_carn_costs_what_its_authors_say(options, giga):
    """GMACs for an output of 1280 x 720, measured on a hundredth of it (arXiv 1803.08664, Table 1: CARN, CARN-M)."""
    with torch.device("meta"):
        model = CARN(CARNConfig(**options))
    model = model.to_empty(device="cpu")
    assert round(macs(model, {"pixel_values": torch.zeros(1, 3, 36, 64)}) / 1e7, 1) == giga
