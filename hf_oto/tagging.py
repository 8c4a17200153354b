"""The tags of a traced model: each size that the model passes around becomes a `Size`, which knows where it came from.

While the model runs, `Tagger` calls each torch function with bare ints, and shows the call with its tagged sizes to
the function's rule in size_rules.py. If a function has no rule, then the sizes that it takes have to stay as they are.

Worked example: a module keeps num_heads = 12, and `tag_` makes it Size(12, ("attribute", path, "num_heads", None)).
Its forward calls `x.view(b, n, self.num_heads, 64)`. The view gets a bare 12, and the rule of `view` states the
equation "num_heads equals what a cut leaves of dimension 2 of the result".
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .layers import is_of_one_group, names_of_own_sizes
from .modeling_oto import set_sizes_, sizes_of
from .restore import MANY
from .size_rules import SIZE_RULES
from .sizes import Equation, Expr, Ref, Size, expr_of, plain, span

logger = logging.getLogger(__name__)


def tag_(model: nn.Module, equations: list[Equation], ref: Callable[[torch.Tensor], Ref]) -> None:
    """Tags the sizes that each module keeps or reads from its config, in place; `restored` takes the tags off.

    Args:
        ref: the `Ref` of a tensor.
    """
    for path, module in model.named_modules():
        expr_of_own = _own_sizes_as_spans(module, path, ref)
        tagged: dict[str, Any] = {}
        for name, value in sizes_of(module).items():
            if isinstance(value, int):
                expr = expr_of_own.get(name, ("attribute", path, name, None))
                tagged[name] = Size(value, expr, equations)
            elif len(value) <= MANY:  # longer lists are data
                sizes = []
                for i, entry in enumerate(value):
                    expr = ("attribute", path, name, i)
                    sizes.append(Size(entry, expr, equations))
                tagged[name] = type(value)(sizes)
        set_sizes_(module, tagged)


def _own_sizes_as_spans(module: nn.Module, path: str, ref: Callable[[torch.Tensor], Ref]) -> dict[str, Expr]:
    """The sizes of its weight that one of torch's layers keeps, as the dimensions that they are sizes of."""
    names = names_of_own_sizes(module)
    weight = module._parameters.get("weight") if names else None
    if weight is None:  # a parametrised one is computed
        return {}
    exprs: dict[str, Expr] = {}
    for dim, name in enumerate(names):
        expr = span(ref(weight), dim)
        if is_of_one_group(module, dim):
            expr = ("*", expr, ("attribute", path, "groups", None))
        exprs[name] = expr
    return exprs


class Tagger(TorchFunctionMode):
    """While open, the shapes of tensors are tagged, and each tag that a torch function takes becomes an equation.

    Args:
        recorder: has `ref(tensor)`, which returns the `Ref` of a tensor, and `layers`, whose last entry is the path
            of the module that runs.
        equations: the list that receives the equations.
    """

    def __init__(self, recorder: Any, equations: list[Equation]) -> None:
        super().__init__()
        self.recorder = recorder
        self.equations = equations

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        # `tensor.shape` arrives as the getter of that property
        if name == "__get__" and func.__self__ is torch.Tensor.shape:
            return self._tagged_shape(args[0])
        if name == "size" and func is torch.Tensor.size:
            return self._tagged_size(*args, **kwargs)
        if name in ("numel", "nelement"):
            return math.prod(self._tagged_shape(args[0]))

        sizes: list[Size] = []
        untag = functools.partial(_untagged, sizes)
        plain_args = mapped(args, untag)
        plain_kwargs = mapped(kwargs, untag)
        out = func(*plain_args, **plain_kwargs)
        if name in SIZE_RULES:
            self._apply_rule(name, out, args, kwargs)
            return out

        if name == "__len__":  # `len` makes a bare int of whatever it gets
            (first_size, *_) = self._tagged_shape(args[0])
            sizes.append(first_size)
        # a function without a rule uses the sizes as numbers, so they have to stay what they are
        layer = self.recorder.layers[-1]
        for size in sizes:
            number = ("const", plain(size))
            equation = Equation(size.expr, number, layer)
            self.equations.append(equation)
        return out

    def _apply_rule(self, name: str, out: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Adds the equations that the size rule of a function states for one call."""
        layer = self.recorder.layers[-1]
        rule = SIZE_RULES[name]
        stated: list[Equation] = []
        count_before = len(self.equations)
        try:
            for size, expr in rule(self.recorder.ref, out, *args, **kwargs):
                equation = Equation(expr_of(size), expr, layer)
                stated.append(equation)
        except Exception as error:  # the rule doesn't know this way of calling: the rehearsal has to judge the cut
            logger.info("the size rule of %s failed in %s: %s", name, layer, error)
        # the rule itself compares and computes with sizes, which adds equations that are no part of the model
        self.equations[count_before:] = stated

    def _tagged_size(self, tensor: torch.Tensor, dim: int | None = None) -> torch.Size | int:
        """The result of `tensor.size()` or `tensor.size(dim)`, with tags."""
        tagged_shape = self._tagged_shape(tensor)
        if dim is None:
            return tagged_shape
        return tagged_shape[dim]

    def _tagged_shape(self, tensor: torch.Tensor) -> torch.Size:
        shape = tensor.shape
        ref = self.recorder.ref(tensor)
        sizes = []
        for dim, size in enumerate(shape):
            expr = span(ref, dim)
            sizes.append(Size(size, expr, self.equations))
        return torch.Size(sizes)  # a tuple: its entries keep their tags


def _untagged(sizes: list[Size], value: Any) -> Any:
    """An argument without tags, as torch takes it; the tagged sizes are added to `sizes`."""
    if type(value) is slice:
        start = _untagged(sizes, value.start)
        stop = _untagged(sizes, value.stop)
        step = _untagged(sizes, value.step)
        return slice(start, stop, step)
    if type(value) is not Size:
        return value
    sizes.append(value)
    return plain(value)


def mapped(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """Arguments in which each value that is no tuple, list or dict is replaced by `leaf(value)`."""
    # torch's tree_map takes several times as long, and a trace maps the arguments of many thousands of calls
    kind = type(value)
    if kind is tuple or kind is list:
        return kind(mapped(inner, leaf) for inner in value)
    if kind is dict:
        return {key: mapped(inner, leaf) for key, inner in value.items()}
    return leaf(value)
