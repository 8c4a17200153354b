"""The tags of a traced model: every size that it passes around is a `Size`, and says where it is used as a size.

While the model runs, `Tagger` hands each call of a torch function to its rule in size_rules.py, and calls the function
itself with bare ints. A size that goes where no rule knows it has to stay what it is.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .modeling_oto import set_sizes_, sizes_of
from .restore import MANY
from .size_rules import SIZE_RULES
from .sizes import Equation, Size, expr_of, plain, span

logger = logging.getLogger(__name__)


def tag_(model: nn.Module, equations: list[Equation]) -> None:
    """Tags every size that a module keeps, and those it reads from its config, in place: `restored` undoes it."""
    for path, module in model.named_modules():
        tagged: dict[str, Any] = {}
        for name, value in sizes_of(module).items():
            if isinstance(value, int):
                tagged[name] = Size(value, ("attribute", path, name, None), equations)
            elif len(value) <= MANY:  # longer ones are data
                sizes = [Size(n, ("attribute", path, name, i), equations) for i, n in enumerate(value)]
                tagged[name] = type(value)(sizes)
        set_sizes_(module, tagged)


class Tagger(TorchFunctionMode):
    """Sees size arguments before C++ does: turns tags into equations, and shapes into tags.

    Args:
        recorder: has `ref(tensor)`, the `Ref` of a tensor, and `layers`, of which the last is the one that runs.
        equations: receives the equations.
    """

    def __init__(self, recorder: Any, equations: list[Equation]) -> None:
        super().__init__()
        self.recorder = recorder
        self.equations = equations

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        if name == "__get__" and func.__self__ is torch.Tensor.shape:
            return self._tagged_shape(args[0], func(*args))
        if name == "size" and func is torch.Tensor.size:
            shape = self._tagged_shape(args[0], args[0].shape)
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            return shape if dim is None else shape[dim]
        sizes: list[Size] = []
        plain_args, plain_kwargs = mapped((args, kwargs), functools.partial(_untagged, sizes))
        out = func(*plain_args, **plain_kwargs)
        layer = self.recorder.layers[-1]
        if name in SIZE_RULES:
            self._apply_rule(name, out, args, kwargs)
        else:  # the function uses the sizes as numbers, so they have to stay what they are
            self.equations += [Equation(size.expr, ("const", plain(size)), layer) for size in sizes]
        return out

    def _apply_rule(self, name: str, out: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Adds the equations that a function's rule gives for one call."""
        layer = self.recorder.layers[-1]
        stated: list[Equation] = []
        mark = len(self.equations)
        try:
            for size, expr in SIZE_RULES[name](self.recorder.ref, out, *args, **kwargs):
                stated.append(Equation(expr_of(size), expr, layer))
        except Exception as error:  # a way of calling it that the rule doesn't know: the rehearsal has to judge
            logger.info("the size rule of %s failed in %s: %s", name, layer, error)
        # The rule itself compares and computes with sizes; what follows from that is no part of the model.
        self.equations[mark:] = stated

    def _tagged_shape(self, tensor: torch.Tensor, shape: torch.Size) -> torch.Size:
        ref = self.recorder.ref(tensor)
        return torch.Size([Size(n, span(ref, dim), self.equations) for dim, n in enumerate(shape)])


def _untagged(sizes: list[Size], value: Any) -> Any:
    """An argument as torch takes it; the sizes that were tagged are added to `sizes`."""
    if type(value) is slice:
        bounds = (value.start, value.stop, value.step)
        return slice(*[_untagged(sizes, bound) for bound in bounds])
    if type(value) is not Size:
        return value
    sizes.append(value)
    return plain(value)


def mapped(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """Arguments with every leaf mapped: several times as fast as a pytree, and a trace maps many thousands."""
    kind = type(value)
    if kind is tuple or kind is list:
        return kind(mapped(inner, leaf) for inner in value)
    if kind is dict:
        return {key: mapped(inner, leaf) for key, inner in value.items()}
    return leaf(value)
