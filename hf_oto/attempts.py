"""The attempts of the rehearsal: a cut model must run in every mode, keep its shapes, and compute what it should.

partition.py puts a cut on a model and asks the attempts, one after the other, what is wrong with the model then.

Worked example: train mode returns a loss and logits of shape (2, 5), and eval mode the logits alone. A cut model must
return the same shapes in both modes. If there are weights, its logits must be those of the zeroed model, too.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .by_layers import taken_apart
from .calls import Forward, raise_if_out_of_memory, tensors_of
from .certificate import cut_difference
from .cut import Cut, cut_
from .evaluating import WeightsKept, evaluating
from .fakes import Fakes
from .modeling_oto import named_tensors
from .restore import replace_tensors_, restored
from .trace import Trace, experts_at_once_

logger = logging.getLogger(__name__)

Attempt = functools.partial[str | None]  # a function of a cut, which says what is wrong with the cut model
ShapesOfMode = Mapping[bool, list[Any]]  # mode, training or not -> the shapes of all outputs, one after the other


def attempts(
    model: nn.Module, forwards: list[Forward], traced: Trace, device: torch.device | None = None
) -> Iterator[Attempt]:
    """The attempts that a cut has to pass.

    The cut model must run in every mode that was traced, and keep the shapes of its outputs; where there are weights,
    it must also keep the outputs themselves in eval mode.

    Args:
        device: where outputs are computed, one layer after the other. None: where the weights are.
    """
    shapes_on_fakes: dict[bool, list[Any]] = {}
    shapes_on_weights: dict[bool, list[Any]] = {}
    for training, outputs in traced.returned.items():
        if training and outputs == traced.returned[False]:
            continue  # train mode made the very same calls
        shapes = [output.shape for output in outputs]
        if traced.fake[training]:
            shapes_on_fakes[training] = shapes
        elif training:  # what eval mode computes with weights is compared by `differs`, shapes and all
            shapes_on_weights[training] = shapes
    if shapes_on_fakes:
        yield functools.partial(_changes_shapes_of_fakes, model, forwards, shapes_on_fakes)
    if any(weight.is_meta for weight in model.parameters()):
        return  # there are no values to compute with
    yield functools.partial(differs, model, forwards, device)
    if shapes_on_weights:
        yield functools.partial(_changes_shapes, model, forwards, shapes_on_weights)


def differs(model: nn.Module, forwards: list[Forward], device: torch.device | None, cut: Cut) -> str | None:
    """Says how far the outputs of the cut model are from those of the zeroed one, if they are not the same.

    Only one layer at a time is copied to be zeroed or cut. Where the outputs are not the same then, or a forward reads
    weights of a layer that isn't running, all layers are.

    Args:
        device: see `attempts`.
    """
    try:
        with taken_apart(model, device) as by_layers:
            difference, tolerance = by_layers.cut_difference(cut, forwards)
        if difference <= tolerance:
            return None
    except Exception as error:
        raise_if_out_of_memory(error)
        logger.info("the layers of %s don't run one by one: %s", type(model).__name__, error)
    difference, tolerance = cut_difference(model, cut, forwards)
    if difference <= tolerance:
        return None
    return f"the outputs differ by {difference:.1e}"


def _changes_shapes(model: nn.Module, forwards: list[Forward], shapes: ShapesOfMode, cut: Cut) -> str | None:
    """Says whether the outputs of the cut model, run with its weights, have other shapes in some mode.

    Args:
        shapes: those of the full model.
    """
    with restored(model):
        cut_(model, cut)
        for training, shapes_before in shapes.items():
            with evaluating(model, training), WeightsKept(model):
                experts_at_once_(model)
                shapes_after = _output_shapes(model, forwards, torch.clone)
            if shapes_after != shapes_before:
                return _other_shapes(shapes_before, shapes_after)
    return None


def _changes_shapes_of_fakes(model: nn.Module, forwards: list[Forward], shapes: ShapesOfMode, cut: Cut) -> str | None:
    """Says whether the outputs of the cut model, run on FakeTensors, have other shapes in some mode.

    Args:
        shapes: those of the full model.
    """
    fakes = Fakes(model)
    with restored(model) as kept:  # the cut and the replaced tensors are undone in the end
        # Meta tensors are cut several times as fast as FakeTensors.
        empty_tensors: dict[int, Tensor] = {}
        for tensor in named_tensors(model).values():
            empty_tensors[id(tensor)] = _without_values(tensor)
        replace_tensors_(kept, empty_tensors)
        cut_(model, cut)
        weights = fakes.weights(model)
        for training, shapes_before in shapes.items():
            with evaluating(model, training, weights), fakes.mode:
                experts_at_once_(model)
                shapes_after = _output_shapes(model, forwards, fakes.of)
            if shapes_after != shapes_before:
                return _other_shapes(shapes_before, shapes_after)
    return None


def _output_shapes(
    model: nn.Module, forwards: list[Forward], copy_input: Callable[[Tensor], Tensor]
) -> list[tuple[int, ...]]:
    """The shapes of the outputs of all calls, one after the other."""
    shapes = []
    for forward in forwards:
        outputs = tensors_of(forward.run(model, copy_input))
        shapes += [tuple(output.shape) for output in outputs]
    return shapes


def _other_shapes(before: list[Any], after: list[Any]) -> str:
    return f"the outputs change shape, {before} -> {after}"


def _without_values(tensor: Tensor) -> Tensor:
    """The same tensor on the meta device; of a parameter, a parameter."""
    empty = torch.empty_like(tensor, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, tensor.requires_grad)
    return empty
