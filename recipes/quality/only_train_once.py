"""HESSO and OTOv2's DHSPG as their authors released them: bench_quality.py compares with the code that others run.

    git clone https://github.com/microsoft/only_train_once                         # HESSO, arXiv 2409.09085
    git clone -b otov2_legacy_backup https://github.com/tianyic/only_train_once    # OTOv2's DHSPG, arXiv 2303.06862

A class adapts each to what the training loop asks of a rival. Neither knows a budget but a fraction of its groups.
"""

import importlib
import tempfile
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .released import Positional, imported, older_exporter, start_as_torch_


class OnlyTrainOnce:
    """What both have in common.

    Args:
        checkout: the folder of the repository.
        model: the model, which is trained and cut in place.
        inputs: a batch, the tensors that forward is given by name.
        setting: `steps`; `learning_rate`; `base`, "adamw" or "sgd"; `target`, the fraction of groups to become zero.
    """

    def __init__(
        self, checkout: str, model: PreTrainedModel, inputs: dict[str, Tensor], setting: dict[str, Any]
    ) -> None:
        self.model = Positional(model, list(inputs))
        arguments = {
            "variant": setting["base"],
            "lr": setting["learning_rate"],
            "weight_decay": 0.01 if setting["base"] == "adamw" else 0.0,
            "first_momentum": 0.9,
            "target_group_sparsity": setting["target"],
        }
        with imported(checkout, model) as package:
            self.oto, self.optimizer = self.start(package, tuple(inputs.values()), setting["steps"], arguments)


class Hesso(OnlyTrainOnce):
    """HESSO, in the setting of tutorials/01.resnet18_cifar10.ipynb."""

    def start(self, package: ModuleType, inputs: tuple[Tensor, ...], steps: int, arguments: dict[str, Any]) -> tuple:
        operators = importlib.import_module("only_train_once.operation.operator")
        # Its table of attentions has no ViT's, whose layers have the names of Llama's.
        operators.COMPOSED_MODULES["ViTAttention"] = operators.LlamaAttentionOTO
        for module in self.model.modules():
            if type(module).__name__ == "ViTAttention":
                module.num_heads, module.hidden_size = module.num_attention_heads, module.config.hidden_size
        oto = package.OTO(self.model, inputs)
        # Like sanity_check/test_bert.py: without this the residual stream is cut, and not at all of its layers.
        # Of the pooler of a BERT that is no more than fine-tuned one output of 384 would be left.
        names = [name for name, _ in self.model.named_parameters() if {"embeddings", "pooler"} & set(name.split("."))]
        oto.mark_unprunable_by_param_names(names)
        optimizer = oto.hesso(
            start_pruning_step=steps // 10,  # the tutorial's tenth
            pruning_steps=max(10, round(0.15 * steps)),  # "until 1/4 or 1/5 of total number of training steps"
            pruning_periods=10,  # the tutorial's
            device=self.model.model.device,
            **arguments,
        )
        # A LayerNorm is two operators of the graph, each with both weights, which would be stepped twice.
        for group in optimizer.param_groups:
            once = {name: i for i, name in enumerate(group["p_names"])}.values()
            group |= {key: [group[key][i] for i in once] for key in ("p_names", "params", "p_transform")}
        start_as_torch_(optimizer, lambda group: (optimizer.first_moment_grads, optimizer.second_moment_grads))
        return oto, optimizer

    def compacted(self) -> nn.Module:
        """The compact model, from the file that `construct_subnet` writes."""
        with tempfile.TemporaryDirectory() as folder:
            self.oto.construct_subnet(out_dir=folder)
            return torch.load(self.oto.compressed_model_path, weights_only=False).model


class LegacyDHSPG(OnlyTrainOnce):
    """OTOv2's DHSPG, in the setting of tutorials/01.quick_start_resnet18_cifar10.ipynb; it can prune no attention."""

    def start(self, package: ModuleType, inputs: tuple[Tensor, ...], steps: int, arguments: dict[str, Any]) -> tuple:
        operators = importlib.import_module("operation.operator")
        # Its table has the Reshape that ends the tutorial's ResNet, and no Flatten: the last stage would stay whole.
        operators.OP_DICT["flatten"] = operators.Operator("flatten", zero_invariant=True)
        # Its steps put tensors on the GPU, wherever the model is.
        here = patch.object(Tensor, "cuda", lambda tensor: tensor.to(self.model.model.device))
        with here:
            oto = package.OTO(self.model, *inputs)
            # The tutorial starts after 50 of 300 epochs; lambda is the default of the base, which it leaves, too.
            optimizer = oto.dhspg(start_pruning_steps=steps // 6, epsilon=0.95, **arguments)
        type(optimizer).step = here(type(optimizer).step)
        start_as_torch_(optimizer, lambda group: (group, group))
        return oto, optimizer

    def compacted(self) -> nn.Module:
        """The compact model, from the file that `compress` writes."""
        # It takes running statistics for part of a group, which is zero only if they are. A channel that has been zero
        # for less than 500 steps still has some, and they change nothing where weight and bias are zero.
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                is_zero = (module.weight == 0) & (module.bias == 0)  # (channels,)
                module.running_mean[is_zero], module.running_var[is_zero] = 0, 0
        with tempfile.TemporaryDirectory() as folder, older_exporter():
            self.oto.compress(folder)
            from .onnx_module import OnnxModule  # onnx is needed here alone

            return OnnxModule(self.oto.compressed_model_path, self.model.names)
