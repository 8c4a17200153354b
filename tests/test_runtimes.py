"""A compact model in other runtimes: ONNX Runtime and OpenVINO return what torch does, for inputs of any size.

A graph says the shape of every weight, so that a runtime need not know how one config could describe layers that
differ. Each law compares with torch's outputs of the model itself, and its control with those of the full model.
"""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers as tf
from models import VOCAB, randomise_, waves
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import nn

import hf_oto

pytestmark = [
    # torch.export in torch 2.13
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
    # ids and mask have the same length
    pytest.mark.filterwarnings("ignore:.*The axis name. length will not be used:UserWarning"),
]

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24}
KEPT = {"heads": (1, 3, 2), "units": (10, 16, 22)}  # in the three layers

Arrays = dict[str, np.ndarray]
Run = Callable[[Arrays], np.ndarray]  # inputs -> logits


def bert():
    config = tf.BertConfig(vocab_size=VOCAB, max_position_embeddings=16, **SIZES)
    return tf.BertForSequenceClassification(config)


def vit():
    config = tf.ViTConfig(image_size=32, patch_size=16, num_labels=5, **SIZES)
    return tf.ViTForImageClassification(config)


def text(batch, length):
    """The last text of a batch is padded."""
    ids = torch.arange(batch * length).view(batch, length) * 7 % VOCAB
    mask = torch.ones_like(ids)
    mask[-1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def image(batch):
    return {"pixel_values": waves(batch, 3, 32, 32)}


class Model(NamedTuple):
    """A row: how the model is built, the batch that the exporter sees, other batches, and what may vary in them."""

    build: Callable[[], tf.PreTrainedModel]
    example: dict[str, torch.Tensor]
    others: list[dict[str, torch.Tensor]]
    dynamic: dict[str, dict[int, str]]  # name of an input -> dimension -> what it counts


TEXT = {0: "batch", 1: "length"}
MODELS = {
    "bert": Model(bert, text(2, 8), [text(3, 5), text(1, 16)], {"input_ids": TEXT, "attention_mask": TEXT}),
    "vit": Model(vit, image(2), [image(3), image(1)], {"pixel_values": {0: "batch"}}),
}


class Served(NamedTuple):
    """A compact model, loaded from its folder, two ONNX files of it, and the full model before the cut."""

    model: tf.PreTrainedModel
    full: tf.PreTrainedModel
    row: Model
    file: Path
    file_int8: Path

    @property
    def batches(self):
        return [self.row.example, *self.row.others]


def own_widths(partition):
    """Every layer keeps a width of its own, and what is not in the layers stays whole."""
    kept = {}
    for kind, widths in KEPT.items():
        axes = [axis.name for axis in partition.axes if axis.kind == kind and ".layer" in axis.name]
        kept |= {name: range(width) for name, width in zip(axes, widths, strict=True)}
    return hf_oto.PruningPlan(kept)


@pytest.fixture(scope="module", params=MODELS)
def served(request, tmp_path_factory):
    folder, row = tmp_path_factory.mktemp(request.param), MODELS[request.param]
    full = randomise_(row.build()).eval()
    small = randomise_(row.build()).eval()
    partition = hf_oto.partition_zigs(small, row.example)
    hf_oto.compact(small, partition, own_widths(partition)).save_pretrained(folder)
    model = type(full).from_pretrained(folder).eval()
    file, file_int8 = folder / "model.onnx", folder / "model.int8.onnx"
    options = {"dynamo": True, "external_data": False, "verbose": False}
    torch.onnx.export(model, (), str(file), kwargs=row.example, dynamic_shapes=row.dynamic, **options)
    quantize_dynamic(file, file_int8, weight_type=QuantType.QInt8)
    return Served(model, full, row, file, file_int8)


@pytest.fixture(scope="module")
def openvino():
    """OpenVINO without the package through which it would report at every import that it is used."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "openvino_telemetry", None)
        return pytest.importorskip("openvino", exc_type=ImportError)


def arrays(batch):
    return {name: x.numpy() for name, x in batch.items()}


def by_torch(model):
    def run(inputs):
        with torch.no_grad():
            return model(**{name: torch.from_numpy(x) for name, x in inputs.items()}).logits.numpy()

    return run


def by_onnx_runtime(file):
    session = onnxruntime.InferenceSession(file)
    return lambda inputs: session.run(None, inputs)[0]


def by_openvino(openvino, model):
    """In float32: a CPU that has bfloat16 would otherwise compute in that."""
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda inputs: compiled(inputs)[0]


def difference(runtime: Run, model: nn.Module, batches):
    """The largest one of all batches, relative to the largest logit."""
    found = []
    for batch in batches:
        logits, expected = runtime(arrays(batch)), by_torch(model)(arrays(batch))
        assert logits.shape == expected.shape
        found.append(np.abs(logits - expected).max() / np.abs(expected).max())
    return max(found)


def linear_shapes(model):
    """(width, width) -> number of linear layers; the smaller width first, because an export may transpose."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return Counter(tuple(sorted(layer.weight.shape)) for layer in layers)


def test_the_graph_has_the_widths_of_every_layer(served):
    graph = onnx.load(served.file).graph
    in_graph = Counter(tuple(sorted(weight.dims)) for weight in graph.initializer)
    assert linear_shapes(served.model) <= in_graph
    assert not linear_shapes(served.full) <= in_graph
    own = [(8 * heads, units) for heads, units in zip(*KEPT.values(), strict=True)]
    assert len(set(own)) == 3
    assert all(in_graph[heads, 32] >= 3 and in_graph[units, 32] >= 2 for heads, units in own)


def test_onnx_runtime_returns_what_torch_does(served):
    run = by_onnx_runtime(served.file)
    assert difference(run, served.model, served.batches) < 1e-4
    assert difference(run, served.full, served.batches) > 0.1


def test_onnx_runtime_in_int8(served):
    """Quantised as any other graph: products of whole numbers, near the model, and not the same."""
    operations = Counter(node.op_type for node in onnx.load(served.file_int8).graph.node)
    num_linear = sum(linear_shapes(served.model).values())
    assert operations["MatMulInteger"] >= num_linear
    assert "MatMulInteger" not in {node.op_type for node in onnx.load(served.file).graph.node}
    run = by_onnx_runtime(served.file_int8)
    assert 1e-4 < difference(run, served.model, served.batches) < 0.05
    assert difference(run, served.full, served.batches) > 0.1


@pytest.mark.parametrize("way", ["file", "export"])
def test_openvino_returns_what_torch_does(served, way, openvino):
    if way == "file":
        model = openvino.Core().read_model(served.file)
    else:
        dynamic = {name: dict.fromkeys(dims, torch.export.Dim.DYNAMIC) for name, dims in served.row.dynamic.items()}
        program = torch.export.export(served.model, (), served.row.example, dynamic_shapes=dynamic, strict=False)
        model = openvino.convert_model(program)
    run = by_openvino(openvino, model)
    assert difference(run, served.model, served.batches) < 1e-4
    assert difference(run, served.full, served.batches) > 0.1


def test_openvino_in_int8(served, openvino):
    """Of the file that ONNX Runtime quantised; OpenVINO's own quantiser is another package."""
    model = openvino.Core().read_model(served.file_int8)
    run = by_openvino(openvino, model)
    assert 1e-4 < difference(run, served.model, served.batches) < 0.05
    assert difference(run, served.full, served.batches) > 0.1
