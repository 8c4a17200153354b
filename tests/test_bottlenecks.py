"""Laws of bottlenecks: without such an axis the output knows nothing of the inputs; without any other it does."""

import copy

import numpy as np
import pytest
import torch
import transformers as tf
from models import waves
from torch import nn

from hf_oto import partition_zigs
from hf_oto.choice import weigh_survivors
from hf_oto.targets import Target, limits_of


class Residual(nn.Module):
    """A stream of 12 with a branch of 8 units around which it goes on; all that was learned goes through 6 units."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(5, 12)
        self.up, self.down = nn.Linear(12, 8), nn.Linear(8, 12)
        self.neck, self.head = nn.Linear(12, 6), nn.Linear(6, 3)

    def forward(self, input):
        stream = self.stem(input).relu()
        stream = stream + self.down(self.up(stream).relu())
        return self.head(self.neck(stream).relu())


class Gated(Residual):
    """The output also sees the input through a gate, past the neck."""

    def forward(self, input):
        return super().forward(input) + input[:, :1].sigmoid()


def convolutions():
    config = tf.ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 12], depths=[2, 2], layer_type="basic", num_labels=3
    )
    return tf.ResNetForImageClassification(config)


def llama():
    config = tf.LlamaConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, head_dim=4
    )
    return tf.LlamaForCausalLM(config)


CASES = {  # model, inputs and others, the first names of what is a bottleneck
    "residual": (Residual, {"input": waves(4, 5)}, {"stem", "neck"}),
    "gated": (Gated, {"input": waves(4, 5)}, set()),
    "plain": (
        lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)),
        {"input": waves(4, 5)},
        {"0", "2"},
    ),
    "convolutions": (
        convolutions,
        {"pixel_values": waves(2, 3, 32, 32)},
        {"resnet.embedder", "resnet.encoder.stages.1.layers.0.shortcut"},
    ),
    "llama": (llama, {"input_ids": torch.arange(12).view(2, 6)}, {"model.embed_tokens"}),
}


def partitioned(case):
    torch.manual_seed(0)
    make, inputs, expected = CASES[case]
    model = make().eval()
    return model, inputs, partition_zigs(model, inputs), expected


@pytest.mark.parametrize("case", CASES)
def test_streams_and_layers_without_a_way_around_are_bottlenecks(case):
    _, _, partition, expected = partitioned(case)
    found = {axis.name for axis in partition.axes if axis.bottleneck}
    assert len(found) == len(expected)
    assert all(any(name.startswith(prefix) for prefix in expected) for name in found)
    assert len(found) < len(partition.axes) or case == "plain"  # control: not all of them are


@torch.no_grad()
def output_depends_on_inputs_without(axis, model, inputs):
    """Whether the outputs of other inputs differ when all ZIGs of an axis are zero, their readers' slices too."""
    model = copy.deepcopy(model)
    tensors = dict(model.named_parameters())
    for member in axis.members:
        if member.param in tensors:
            positions = torch.from_numpy(member.positions(axis.size)).flatten()
            tensors[member.param].index_fill_(member.dim, positions, 0.0)
    other = {name: tensor.flip(0) for name, tensor in inputs.items()}
    first, second = (out if isinstance(out, torch.Tensor) else out.logits for out in (model(**inputs), model(**other)))
    return not torch.allclose(first, second, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_only_without_a_bottleneck_the_output_knows_nothing_of_the_inputs(case):
    model, inputs, partition, _ = partitioned(case)
    for axis in partition.axes:
        assert output_depends_on_inputs_without(axis, model, inputs) != axis.bottleneck, axis.name


def test_the_last_of_a_bottleneck_weigh_more():
    _, _, partition, _ = partitioned("residual")
    limits = limits_of(partition.axes, Target("target_group_sparsity", 0.5))
    equal, none_is_zero = np.ones(partition.num_zigs), np.zeros(partition.num_zigs, bool)
    weighted = weigh_survivors(equal, limits.count(equal), none_is_zero, limits)  # none is under a norm
    weights = {axis.name: part.tolist() for axis, part in partition.split(weighted)}
    assert weights["neck.weight[0]"] == pytest.approx([(6 / left) ** 2 for left in range(6, 0, -1)])
    assert weights["up.weight[0]"] == [1.0] * 8  # control
