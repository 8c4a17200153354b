"""The front door: from a model to its ZIG partition, rehearsed before anybody trains on it.

The model is traced, rules unite the dimensions of its tensors, and these are solved for axes of ZIGs and for sizes.
Then the cut is put on the model, without weights and with them, where there are some, and taken off again: what can't
be rebuilt exactly is pinned with that reason.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from .axes import Leaf
from .calls import Forward, Inputs, as_forwards, input_tensors, make_inputs, raise_if_out_of_memory, tensors_of
from .certificate import cut_difference, refuse_random
from .cost import Width, Work
from .cut import Cut, cut_, resolve
from .evaluating import WeightsKept, evaluating
from .fakes import Fakes
from .idle import pin_around_what_never_ran
from .modeling_oto import OTOError, named_tensors, sizes_of
from .reasons import AVERAGE, PROTECTED, REHEARSAL, SCRIPTED, SIZE
from .restore import MANY, replace_tensors_, restored
from .rules import Axes, apply_rules, multiplications, without_repeats
from .scales import solve_scales
from .sizes import Attribute, Equation, Sizes, Spans, is_comparison, spans_of
from .solve import solve
from .table import fold
from .trace import Trace, experts_at_once_, trace
from .zigs import ZIGPartition, random_half

logger = logging.getLogger(__name__)


def partition_zigs(model: nn.Module, inputs: Inputs | None = None, protect: Sequence[str] = ()) -> ZIGPartition:
    """Finds every zero-invariant group of a model (OTOv2, arXiv 2303.06862, Alg. 2), whatever its architecture.

    The model runs on the inputs in eval mode and in train mode, without dropout; both count. It is left as it was,
    but meanwhile it holds stand-ins of its weights: no other thread may run it then. (Other models may run.)

    Args:
        model: any `nn.Module`; on the meta device too.
        inputs: one small batch, the arguments of forward (a dict by name, or a tuple by position), or several calls, a
            list of such: whatever training does with the model. Branches that none of them takes are not seen. None:
            made from the config.
        protect: regular expressions; a parameter is not pruned if one matches anywhere in its name or the name of a
            module it is in.

    Returns:
        the partition; its `pinned` says for every other parameter dimension why it stays.

    Raises:
        OTOError: the model can't run on the inputs, or gives other outputs every time.
        ValueError: a pattern of `protect` that matches nothing.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> partition = partition_zigs(model, {"input": torch.ones(1, 3)})
        >>> [(axis.name, axis.kind, axis.size, axis.params) for axis in partition.axes]
        [('0.weight[0]', 'units', 8, 6)]
    """
    _refuse_unready_weights(model)
    protected = _protected(model, protect)
    if inputs is None:
        candidates = ([batch] for batch in make_inputs(model))
    else:
        candidates = iter([inputs])
    forwards, traced = _first_traced(model, map(as_forwards, candidates))
    inputs_are_empty = any(tensor.is_meta for tensor in input_tensors(forwards))
    if inputs_are_empty and not any(weight.is_meta for weight in model.parameters()):
        name = type(model).__name__
        raise OTOError(
            f"the inputs are on the meta device, and the weights of {name} are not: pass inputs with values"
        )
    traced = without_repeats(traced)
    unified = apply_rules(traced)
    traced = traced._replace(equations=_living_equations(traced, unified))
    scripted = [path for path, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    inside_scripted = tuple(f"{path}." for path in scripted)
    for name, ref in traced.sources.items():
        if name in protected:
            reason = PROTECTED
        elif name.startswith(inside_scripted):
            reason = SCRIPTED
        else:
            continue
        for dim in unified.of(ref):
            unified.algebra.pin(dim, reason)
    pin_around_what_never_ran(traced, unified)
    return _Rehearsal(model, forwards, traced, unified).rehearsed()


def _refuse_unready_weights(model: nn.Module) -> None:
    """Raises OTOError where weights are sharded, have no shape yet, or are loaded in part only."""
    name = type(model).__name__
    weights = dict(model.named_parameters())
    if any(isinstance(weight, DTensor) for weight in weights.values()):
        raise OTOError(
            f"{name} is sharded already: make the partition before fully_shard or "
            "accelerator.prepare; of a model too large for that, on the meta device"
        )
    lazy = [n for n, weight in weights.items() if is_lazy(weight)]
    if lazy:
        raise OTOError(f"{lazy[0]} of {name} has no shape yet: call the model once, then partition it")
    empty = [n for n, weight in weights.items() if weight.is_meta]
    if 0 < len(empty) < len(weights):
        raise OTOError(
            f"{len(empty)} of {len(weights)} weights of {name} are on the meta device, {empty[0]} for one: load "
            "all of them (no offload to disk or CPU), or none"
        )


def _protected(model: nn.Module, protect: Sequence[str]) -> set[str]:
    """The parameters that patterns protect, by their first names."""
    first_name = {id(p): name for name, p in model.named_parameters()}  # tied parameters have several names
    first_names = {name: first_name[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    modules = [name for name, _ in model.named_modules() if name]
    protected: set[str] = set()
    for pattern in [protect] if isinstance(protect, str) else protect:
        inside = tuple(f"{module}." for module in modules if re.search(pattern, module))
        matching = {
            first for name, first in first_names.items() if re.search(pattern, name) or name.startswith(inside)
        }
        if not matching:
            example = next(iter(first_names))
            raise ValueError(f"protect: {pattern!r} matches no parameter or module, for example {example!r}")
        protected |= matching
    return protected


def _first_traced(model: nn.Module, candidates: Iterable[list[Forward]]) -> tuple[list[Forward], Trace]:
    """The first calls that the model takes, and their trace."""
    for forwards in candidates:
        try:
            return forwards, trace(model, forwards)
        except OTOError as error:
            problem = error
    raise problem


def _living_equations(traced: Trace, unified: Axes) -> list[Equation]:
    """The equations that speak of no result that nobody uses."""
    computed = {ref.value for call in traced.calls for ref in call.outs}
    dead = computed - unified.dims.keys()
    living = []
    for equation in traced.equations:
        values = {value for side in equation.sides for _, value, *_ in spans_of(side)}
        if not values & dead:
            living.append(equation)
    return living


# solving -------------------------------------------------------------------------------------------


def _solved(model: nn.Module, traced: Trace, unified: Axes) -> tuple[ZIGPartition, np.ndarray, np.ndarray]:
    """The partition as the algebra has it now, and the ZIG and the axis of every id, -1 for none."""
    sources = {name: unified.of(ref) for name, ref in traced.sources.items()}
    buffers = sources.keys() - traced.parameters
    partition, zig_of = solve(unified.algebra.copy(), sources, buffers)
    axis_sizes = [axis.size for axis in partition.axes]
    axis_of_zig = np.repeat(np.arange(len(axis_sizes)), axis_sizes)  # (num_zigs,)
    axis_of = np.append(axis_of_zig, -1)[zig_of]  # the last entry is the axis of ZIG -1
    work = _macs(traced, unified, axis_of, axis_sizes)
    params_alone = partition.params(model).alone
    axes = []
    for axis, params, macs in zip(partition.axes, params_alone, work.alone, strict=True):
        axes.append(dataclasses.replace(axis, params=round(params), macs=round(macs)))
    sizes = Sizes(traced.equations, _zigs_of_spans(traced, unified, zig_of), _sizes_kept(model))
    return dataclasses.replace(partition, axes=tuple(axes), work=work, sizes=sizes), zig_of, axis_of


def _zigs_of_spans(traced: Trace, unified: Axes, zig_of: np.ndarray) -> Spans:
    """The ZIGs along every dimension that equations speak of and a cut can touch."""
    keys = set()
    for equation in traced.equations:
        for side in equation.sides:
            for _, value, dim, *_ in spans_of(side):
                keys.add((value, dim))
    zigs_of_leaf: dict[int, np.ndarray] = {}  # many tensors share a leaf: one array for all
    spans: Spans = {}
    for value, dim in keys:
        leaves = unified.dims[value][dim] if value in unified.dims else ()
        for leaf in leaves:
            if id(leaf.ids) not in zigs_of_leaf:
                zigs_of_leaf[id(leaf.ids)] = zig_of[leaf.ids]
        factors = tuple(zigs_of_leaf[id(leaf.ids)] for leaf in leaves)
        if any((zigs >= 0).any() for zigs in factors):
            spans[value, dim] = factors
    return spans


def _sizes_kept(model: nn.Module) -> dict[Attribute, int]:
    """Every size that a module keeps, entries of lists one by one."""
    values: dict[Attribute, int] = {}
    for path, module in model.named_modules():
        for name, value in sizes_of(module).items():
            if isinstance(value, int):
                values[path, name, None] = value
            elif len(value) <= MANY:  # longer ones are data
                for i, entry in enumerate(value):
                    values[path, name, i] = entry
    return values


def _macs(traced: Trace, unified: Axes, axis_of: np.ndarray, axis_sizes: list[int]) -> Work:
    """The multiply-accumulates of eval mode, as products of widths."""
    width_of_leaf: dict[int, Width] = {}

    def width(leaf: Leaf) -> Width:
        key = id(leaf.ids)
        if key not in width_of_leaf:
            axes, counts = np.unique(axis_of[leaf.ids], return_counts=True)
            pairs = zip(axes.tolist(), counts.tolist(), strict=True)
            lost = tuple((axis, count / axis_sizes[axis]) for axis, count in pairs if axis >= 0)
            width_of_leaf[key] = (len(leaf.ids), lost)
        return width_of_leaf[key]

    terms = []
    for call in traced.calls[: traced.evaluated]:
        for dims in multiplications(call):
            terms.append([width(leaf) for ref, dim in dims for leaf in unified.of(ref)[dim]])
    return Work.of(terms, len(axis_sizes))


def _consistent(model: nn.Module, traced: Trace, unified: Axes) -> tuple[ZIGPartition, np.ndarray]:
    """Solves, and pins axes that no scaling suits or whose sizes contradict each other, until there are none.

    Returns:
        the partition, and the axis of every id, -1 for none.
    """
    while True:
        partition, zig_of, axis_of = _solved(model, traced, unified)
        scales, unfit = solve_scales(traced, unified, partition, zig_of)
        if unfit:
            unfit_ids = np.flatnonzero(np.isin(axis_of, [*unfit]))
            unified.algebra.pin_ids(unfit_ids, AVERAGE)
            continue
        axes = [dataclasses.replace(axis, scales=scales.get(i, ())) for i, axis in enumerate(partition.axes)]
        partition = dataclasses.replace(partition, axes=tuple(axes))
        removed, conflicts = _first_contradiction(partition)
        if not conflicts:
            return partition, axis_of
        zigs = partition.sizes.involved(conflicts, removed)
        axes_to_pin = axis_of[np.isin(zig_of, zigs)]
        layer = next((equation.layer for equation in conflicts if equation.layer), "forward")
        unified.algebra.pin_ids(np.flatnonzero(np.isin(axis_of, axes_to_pin)), SIZE.of(layer))


def _first_contradiction(partition: ZIGPartition) -> tuple[np.ndarray, list[Equation]]:
    """The first cut of those tried whose size equations can't hold, and these equations; none where all cuts work."""
    for removed, comparisons_count in _draws(partition):
        _, conflicts = partition.sizes.solve(removed)
        if not comparisons_count:
            conflicts = [equation for equation in conflicts if not is_comparison(equation)]
        if conflicts:
            break
    return removed, conflicts


def _draws(partition: ZIGPartition) -> Iterator[tuple[np.ndarray, bool]]:
    """Cuts to try, bool (num_zigs,), and whether comparisons of sizes have to come out in them as they did.

    Comparisons have to where a single ZIG of every axis goes. That a size must not fall below some number, which only
    a larger cut does, is left to the plan that does it.
    """
    last_of_each = [np.zeros(0, bool)]
    for axis in partition.axes:
        last_of_each.append(np.arange(axis.size) == axis.size - 1)
    yield np.concatenate(last_of_each), True
    for seed in range(3):
        rng = np.random.default_rng(seed)
        at_random = [np.zeros(0, bool)]
        for axis in partition.axes:
            at_random.append(rng.permutation(axis.size) >= rng.integers(1, axis.size))
        yield np.concatenate(at_random), False


# rehearsal -----------------------------------------------------------------------------------------

Attempt = functools.partial[str | None]  # a function of a cut, which says what is wrong with the cut model


class _Rehearsal:
    """The cut, tried in every way that can be; families of axes that fail, alone or with the rest, are pinned."""

    def __init__(self, model: nn.Module, forwards: list[Forward], traced: Trace, unified: Axes) -> None:
        self.model = model
        self.forwards = forwards
        self.traced = traced
        self.unified = unified
        self.partition, self.axis_of = _consistent(model, traced, unified)

    def rehearsed(self) -> ZIGPartition:
        """The partition of what passes every attempt."""
        for attempt in _attempts(self.model, self.forwards, self.traced):
            while self.partition.axes and self._problem(attempt):
                if attempt.func is _differs:
                    refuse_random(self.model, self.forwards)  # no cut is to blame for what differs by itself
                    if not self._problem(attempt):  # in the arithmetic that refuse_random found the model to know
                        break
                else:
                    problem = self._problem(attempt, families=())
                    if problem:
                        raise OTOError(
                            f"{type(self.model).__name__} can't be run again on the same inputs, nothing cut out: "
                            f"{problem}"
                        )
                self._pin_families(attempt)
                self.partition, self.axis_of = _consistent(self.model, self.traced, self.unified)
        return self.partition

    def _problem(self, attempt: Attempt, families: Collection[str] | None = None) -> str | None:
        """What is wrong with the model without half of every axis, None if nothing is.

        Args:
            families: the families of axes to cut. None: all.
        """
        try:
            return attempt(resolve(self.partition, random_half(self.partition, families), warn=False))
        except DynamicOutputShapeException:
            return None
        except Exception as error:
            raise_if_out_of_memory(error)
            first_line = str(error).splitlines()[0] if str(error) else ""
            return f"{type(error).__name__}: {first_line}"

    def _pin_families(self, attempt: Attempt) -> None:
        """Pins every family of axes that fails together with those that passed before it."""
        axes_of_family: dict[str, list[int]] = {}
        has_scales: dict[str, bool] = {}
        for i, axis in enumerate(self.partition.axes):
            family = fold(axis.name)
            axes_of_family.setdefault(family, []).append(i)
            has_scales[family] = bool(axis.scales)
        passed: set[str] = set()
        # Of two families that fail together the later one is pinned: families with scales, which change weights of
        # other axes too, come last.
        for family in sorted(axes_of_family, key=lambda family: (has_scales[family], family)):
            problem = self._problem(attempt, passed | {family})
            if problem:
                logger.info("pinned %s: %s", family, problem)
                ids = np.flatnonzero(np.isin(self.axis_of, axes_of_family[family]))
                self.unified.algebra.pin_ids(ids, REHEARSAL.of(problem))
            else:
                passed.add(family)


def _attempts(model: nn.Module, forwards: list[Forward], traced: Trace) -> Iterator[Attempt]:
    """The attempts that a cut has to pass.

    The cut model must run in every mode that was traced, and keep the shapes of its outputs; where there are weights,
    it must also keep the outputs themselves in eval mode.
    """
    shapes = {training: [ref.shape for ref in returned] for training, returned in traced.returned.items()}
    if traced.returned.get(True) == traced.returned[False]:
        del shapes[True]  # train mode made the very same calls
    on_fakes = {training: shapes[training] for training in shapes if traced.fake[training]}
    # What eval mode computes with weights is compared by `_differs`, shapes and all.
    on_weights = {training: shapes[training] for training in shapes if training and not traced.fake[training]}
    if on_fakes:
        yield functools.partial(_changes_shapes, model, forwards, on_fakes, True)
    if not any(p.is_meta for p in model.parameters()):
        yield functools.partial(_differs, model, forwards)
        if on_weights:
            yield functools.partial(_changes_shapes, model, forwards, on_weights, False)


def _changes_shapes(
    model: nn.Module, forwards: list[Forward], shapes: Mapping[bool, Sequence[Any]], on_fakes: bool, cut: Cut
) -> str | None:
    """Says whether the outputs of the cut model have other shapes in some mode.

    Args:
        shapes: mode, training or not -> the shapes of the full model's outputs.
        on_fakes: run the model on FakeTensors; else with its weights.
    """
    fakes = Fakes(model)
    with restored(model) as kept:
        if on_fakes:  # meta tensors are cut several times as fast as FakeTensors
            empty = {id(tensor): _without_weight(tensor) for tensor in named_tensors(model).values()}
            replace_tensors_(kept, empty)
        cut_(model, cut)
        weights = fakes.weights(model) if on_fakes else None
        for training, shapes_before in shapes.items():
            run_mode = fakes.mode if on_fakes else WeightsKept(model)
            copy_input: Callable[[torch.Tensor], torch.Tensor] = fakes.of if on_fakes else torch.clone
            shapes_after = []
            with evaluating(model, training, weights), run_mode:
                experts_at_once_(model)
                for forward in forwards:
                    outputs = tensors_of(forward.run(model, copy_input))
                    shapes_after += [tuple(output.shape) for output in outputs]
            if shapes_after != shapes_before:
                return f"the outputs change shape, {shapes_before} -> {shapes_after}"
    return None


def _without_weight(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _differs(model: nn.Module, forwards: list[Forward], cut: Cut) -> str | None:
    """Says how far the outputs of the cut model are from those of the zeroed one, if they are not the same."""
    difference, tolerance = cut_difference(model, cut, forwards)
    if difference <= tolerance:
        return None
    return f"the outputs differ by {difference:.1e}"
