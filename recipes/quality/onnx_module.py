"""ONNX graphs of convolutions as modules of torch: OTOv2 leaves a file, and what is measured are modules."""

from functools import partial
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import ImageClassifierOutput


def convolution(x: Tensor, weight: Tensor, bias: Tensor, **attributes: Any) -> Tensor:
    """ONNX pads (top, left, bottom, right); a model of torch has the same above and below, left and right."""
    padding = attributes["pads"][:2]
    return F.conv2d(x, weight, bias, attributes["strides"], padding, attributes["dilations"], attributes["group"])


OPERATORS = {
    "Add": torch.add,
    "Conv": convolution,
    "Flatten": lambda x, axis: x.flatten(axis),
    # nn.Linear is exported with transB=1, and no factors
    "Gemm": lambda x, weight, bias, **_: F.linear(x, weight, bias),
    "GlobalAveragePool": lambda x: x.mean((2, 3), keepdim=True),
    "Relu": torch.relu,
}


class OnnxModule(nn.Module):
    """An ONNX file as a module: the graph's inputs take the names of `names`, its output is `.logits`."""

    def __init__(self, path: str, names: list[str]) -> None:
        super().__init__()
        graph = onnx.load(path).graph
        self.names = names
        self.inputs = [value.name for value in graph.input]
        self.constants = [tensor.name for tensor in graph.initializer]
        self.weights = nn.ParameterList(
            torch.tensor(onnx.numpy_helper.to_array(tensor)) for tensor in graph.initializer
        )
        self.output = graph.output[0].name
        self.calls = []
        for node in graph.node:
            attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
            self.calls.append((partial(OPERATORS[node.op_type], **attributes), list(node.input), node.output[0]))

    def forward(self, **inputs: Tensor) -> ImageClassifierOutput:
        tensors = dict(zip(self.constants, self.weights, strict=True))
        tensors |= {name: inputs[given] for name, given in zip(self.inputs, self.names, strict=True)}
        for operator, arguments, result in self.calls:
            tensors[result] = operator(*(tensors[name] for name in arguments))
        return ImageClassifierOutput(logits=tensors[self.output])
