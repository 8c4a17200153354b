"""What the released code of OTO needs beside torch 2.13, and to start as the optimizers of torch do."""

import contextlib
import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.onnx._internal.torchscript_exporter import _globals, utils
from transformers import PreTrainedModel


@contextlib.contextmanager
def imported(checkout: str, model: PreTrainedModel) -> Iterator[ModuleType]:
    """The package of a checkout, in a torch where its names are: both only hold in here (checked with torch 2.13)."""
    folders = {path.name for path in Path(checkout, "only_train_once").iterdir() if path.is_dir()}
    roots = folders | {"only_train_once", "imp", "distutils"}  # the package puts its folders on sys.path, too
    version = ModuleType("distutils.version")
    version.LooseVersion = Version
    stand_ins = {"imp": ModuleType("imp"), "distutils": ModuleType("distutils"), version.__name__: version}
    stand_ins["torch.onnx._globals"] = _globals

    def named_alike() -> dict[str, ModuleType]:
        return {
            name: sys.modules[name] for name in sys.modules if name.partition(".")[0] in roots or name in stand_ins
        }

    path, opset = sys.path[:], _globals.GLOBALS.export_onnx_opset_version  # HESSO's package sets both
    attention, training, before = model.config._attn_implementation, model.training, named_alike()
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # a trace holds for inputs of one shape
        stack.enter_context(contextlib.redirect_stdout(None))
        stack.enter_context(patch.object(torch.onnx, "_optimize_graph", utils._optimize_graph, create=True))
        for name in before:
            del sys.modules[name]
        sys.modules.update(stand_ins)
        sys.path.insert(0, checkout)
        model.set_attn_implementation("eager")  # ONNX has no operator of a whole attention
        try:
            yield importlib.import_module("only_train_once")
        finally:
            for name in named_alike():
                del sys.modules[name]
            sys.modules.update(before)
            sys.path[:], _globals.GLOBALS.export_onnx_opset_version = path, opset
            model.set_attn_implementation(attention)
            model.train(training)


@contextlib.contextmanager
def older_exporter() -> Iterator[None]:
    """Exports as torch did before 2.9: DHSPG looks for the names that this exporter gives to fused convolutions."""
    export = functools.partial(torch.onnx.export, dynamo=False)
    with warnings.catch_warnings(), patch.object(torch.onnx, "export", export):
        warnings.simplefilter("ignore")
        yield


class Positional(nn.Module):
    """A model that takes tensors by position and returns logits, as a trace needs it."""

    def __init__(self, model: PreTrainedModel, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, inputs, strict=True))).logits


def start_as_torch_(optimizer: torch.optim.Optimizer, moments_of: Callable[[dict], tuple[dict, dict]]) -> None:
    """Lets the moments start at zero, as Adam corrects them for.

    Theirs start at the first gradient g, and are divided by the same 1 - beta^t. So the second one is g^2 * 0.999^t /
    (1 - 0.999^t) too large: by 9.5 g^2 at the 100th step, which makes steps a third as long as those of `AdamW`.

    Args:
        optimizer: HESSO or DHSPG.
        moments_of: of a parameter group the dicts where the optimizer keeps the first and the second moments.
    """
    for i, group in enumerate(optimizer.param_groups):
        first, second = moments_of(group)
        for j, p in enumerate(group["params"]):
            first[f"grad_first_moment_buffer_group_{i}_param_{j}"] = torch.zeros_like(p)
            second[f"grad_second_moment_buffer_group_{i}_param_{j}"] = torch.zeros_like(p)
