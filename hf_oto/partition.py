"""The front door: from a model to its ZIG partition, rehearsed before anybody trains on it.

The model is traced, and rules unite the dimensions of its tensors. The axes of ZIGs, and the sizes that modules keep,
are solved from these. Then a cut is put on the model and taken off again, first without weights and then, if there are
some, with them. What can't be rebuilt exactly is pinned, with that reason.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from torch.nn.parameter import is_lazy

from .attempts import Attempt, attempts, differs
from .axes import Leaf
from .batches import make_inputs
from .bottlenecks import bottlenecks
from .calls import Forward, Inputs, as_forwards, input_tensors, raise_if_out_of_memory, refuse_sharded
from .certificate import refuse_random
from .cost import Width, Work
from .cut import resolve
from .idle import pin_around_what_never_ran
from .modeling_oto import OTOError, sizes_of
from .reasons import AVERAGE, PROTECTED, REHEARSAL, SCRIPTED, SIZE
from .restore import MANY
from .rules import Axes, apply_rules, multiplications, without_repeats
from .scales import solve_scales
from .sizes import Attribute, Equation, Sizes, Spans, is_comparison, spans_of
from .solve import solve
from .table import fold
from .targets import check_patterns
from .trace import Trace, trace
from .zigs import ZIGPartition, random_half

logger = logging.getLogger(__name__)


def partition_zigs(
    model: nn.Module,
    inputs: Inputs | None = None,
    protect: Sequence[str] = (),
    device: torch.device | str | None = None,
) -> ZIGPartition:
    """Finds every zero-invariant group of a model (OTOv2, arXiv 2303.06862, Alg. 2), whatever its architecture.

    The model runs on the inputs in eval mode and in train mode, without dropout; both count. The model is left as it
    was. But while it is partitioned it holds stand-ins of its weights, so that no other thread may run it. (Other
    threads may run other models.)

    Args:
        model: any `nn.Module`; on the meta device too.
        inputs: one small batch: the arguments of forward, a dict by name, or a tuple by position. Or several calls, a
            list of such batches: whatever training does with the model. A branch that no call takes is not seen. None:
            the inputs are made from the config.
        protect: regular expressions. A parameter is not pruned if one of them matches anywhere in its name, or in the
            name of a module that the parameter is in.
        device: where the cut is tried out, one layer after the other, if not where the model lies.

    Returns:
        the partition; its `pinned` says for every other parameter dimension why it stays.

    Raises:
        OTOError: the model can't run on the inputs, or gives other outputs every time.
        ValueError: a pattern of `protect` that matches nothing, or is no regular expression.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> partition = partition_zigs(model, {"input": torch.ones(1, 3)})
        >>> [(axis.name, axis.kind, axis.size, axis.params) for axis in partition.axes]
        [('0.weight[0]', 'units', 8, 6)]
    """
    _refuse_unready_weights(model)
    protected = _protected(model, protect)
    if device is not None:
        device = torch.device(device)
    batches = make_inputs(model) if inputs is None else [inputs]
    forwards, traced = _first_traced(model, map(as_forwards, batches))
    has_empty_inputs = any(tensor.is_meta for tensor in input_tensors(forwards))
    has_empty_weights = any(weight.is_meta for weight in model.parameters())
    if has_empty_inputs and not has_empty_weights:
        name = type(model).__name__
        raise OTOError(
            f"the inputs are on the meta device, and the weights of {name} are not: pass inputs with values"
        )
    traced = without_repeats(traced)
    unified = apply_rules(traced)
    traced = traced._replace(equations=_living_equations(traced, unified))
    _pin_by_name(model, traced, unified, protected)
    pin_around_what_never_ran(traced, unified)
    return _Rehearsal(model, forwards, traced, unified, device).rehearsed()


def _refuse_unready_weights(model: nn.Module) -> None:
    """Raises OTOError where weights are sharded, have no shape yet, or are loaded in part only."""
    name = type(model).__name__
    weights = dict(model.named_parameters())
    refuse_sharded(
        model, "make the partition before fully_shard or accelerator.prepare; of a model too large for that, on meta"
    )
    lazy = [weight_name for weight_name, weight in weights.items() if is_lazy(weight)]
    if lazy:
        raise OTOError(f"{lazy[0]} of {name} has no shape yet: call the model once, then partition it")
    empty = [weight_name for weight_name, weight in weights.items() if weight.is_meta]
    if 0 < len(empty) < len(weights):
        raise OTOError(
            f"{len(empty)} of {len(weights)} weights of {name} are on the meta device, {empty[0]} for one: load "
            "all of them (no offload to disk or CPU), or none"
        )


def _protected(model: nn.Module, protect: Sequence[str]) -> set[str]:
    """The parameters that patterns protect, by their first names."""
    first_of_id: dict[int, str] = {}  # tied parameters have several names
    first_of_name: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first_of_name[name] = first_of_id.setdefault(id(parameter), name)
    modules = [path for path, _ in model.named_modules() if path]
    patterns = [protect] if isinstance(protect, str) else protect
    check_patterns("protect", patterns)
    protected: set[str] = set()
    for pattern in patterns:
        # the dot keeps module "layer.1" from matching "layer.10"
        inside = tuple(f"{module}." for module in modules if re.search(pattern, module))
        matching = set()
        for name, first_name in first_of_name.items():
            if re.search(pattern, name) or name.startswith(inside):
                matching.add(first_name)
        if not matching:
            example = next(iter(first_of_name))
            raise ValueError(f"protect: {pattern!r} matches no parameter or module, for example {example!r}")
        protected |= matching
    return protected


def _pin_by_name(model: nn.Module, traced: Trace, unified: Axes, protected: Collection[str]) -> None:
    """Pins protected parameters and those of scripted modules, all of their dimensions."""
    inside_scripted: tuple[str, ...] = ()  # beginnings of names
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            inside_scripted += (f"{path}.",)
    for name, ref in traced.sources.items():
        if name in protected:
            reason = PROTECTED
        elif name.startswith(inside_scripted):
            reason = SCRIPTED
        else:
            continue
        for leaves in unified.of(ref):
            unified.algebra.pin(leaves, reason)


def _first_traced(model: nn.Module, candidates: Iterable[list[Forward]]) -> tuple[list[Forward], Trace]:
    """The first calls that the model takes, and their trace."""
    for forwards in candidates:
        try:
            return forwards, trace(model, forwards)
        except OTOError as error:
            problem = error
    raise problem


def _living_equations(traced: Trace, unified: Axes) -> list[Equation]:
    """The equations, without those that speak of results which nobody uses."""
    computed = set()
    for call in traced.calls:
        computed.update(ref.value for ref in call.outs)
    dead = computed - unified.dims.keys()
    living = []
    for equation in traced.equations:
        values = set()  # the numbers of the results that the equation speaks of
        for side in equation.sides:
            spans = spans_of(side)
            values.update(value for _, value, *_ in spans)
        if values.isdisjoint(dead):
            living.append(equation)
    return living


# solving -------------------------------------------------------------------------------------------


class _Solution(NamedTuple):
    """The partition that the algebra gives as it is now, and where each id of the algebra lies in it."""

    partition: ZIGPartition
    zig_of: np.ndarray  # (ids,), -1 for no ZIG
    axis_of: np.ndarray  # (ids,), -1 for no axis


def _solved(model: nn.Module, traced: Trace, unified: Axes) -> _Solution:
    sources = {}
    for name, ref in traced.sources.items():
        sources[name] = unified.of(ref)
    buffers = sources.keys() - traced.parameters
    partition, zig_of = solve(unified.algebra.copy(), sources, buffers)
    axis_sizes = [axis.size for axis in partition.axes]
    num_axes = len(axis_sizes)
    axis_of_zig = np.repeat(np.arange(num_axes), axis_sizes)  # (num_zigs,)
    axis_of = np.append(axis_of_zig, -1)[zig_of]  # the last entry is the axis of ZIG -1
    work = _macs(traced, unified, axis_of, axis_sizes)
    params_alone = partition.params(model).alone
    are_bottlenecks = bottlenecks(traced, unified, axis_of)
    axes = []
    for number, axis in enumerate(partition.axes):
        counted = dataclasses.replace(
            axis,
            params=round(params_alone[number]),
            macs=round(work.alone[number]),
            bottleneck=number in are_bottlenecks,
        )
        axes.append(counted)
    spans = _zigs_of_spans(traced, unified, zig_of)
    sizes = Sizes(traced.equations, spans, _sizes_kept(model))
    partition = dataclasses.replace(partition, axes=tuple(axes), work=work, sizes=sizes)
    return _Solution(partition, zig_of, axis_of)


def _zigs_of_spans(traced: Trace, unified: Axes, zig_of: np.ndarray) -> Spans:
    """The ZIGs along every dimension that equations speak of and a cut can touch."""
    dimensions = set()
    for equation in traced.equations:
        for side in equation.sides:
            for _, value, dim, *_ in spans_of(side):
                dimensions.add((value, dim))
    zigs_of_leaf: dict[int, np.ndarray] = {}  # many tensors share a leaf: one array for all
    spans: Spans = {}
    for value, dim in dimensions:
        if value not in unified.dims:
            continue
        factors = []
        for leaf in unified.dims[value][dim]:
            key = id(leaf.ids)
            if key not in zigs_of_leaf:
                zigs_of_leaf[key] = zig_of[leaf.ids]
            factors.append(zigs_of_leaf[key])
        if any((zigs >= 0).any() for zigs in factors):
            spans[value, dim] = tuple(factors)
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
            axes_in_leaf = axis_of[leaf.ids]  # (n,)
            axes, counts = np.unique(axes_in_leaf, return_counts=True)
            lost_with_zig = []  # (axis, positions of the leaf that one ZIG of the axis takes)
            for axis, count in zip(axes.tolist(), counts.tolist(), strict=True):
                if axis >= 0:  # -1 counts the positions of no axis
                    lost_with_zig.append((axis, count / axis_sizes[axis]))
            num_positions = len(leaf.ids)
            width_of_leaf[key] = (num_positions, tuple(lost_with_zig))
        return width_of_leaf[key]

    terms = []
    for call in traced.calls[: traced.evaluated]:
        for dims in multiplications(call):
            widths = []
            for ref, dim in dims:
                leaves = unified.of(ref)[dim]
                widths += [width(leaf) for leaf in leaves]
            terms.append(widths)
    return Work.of(terms, len(axis_sizes))


def _consistent(model: nn.Module, traced: Trace, unified: Axes) -> _Solution:
    """Solves, and pins axes that no scaling suits or whose sizes contradict each other, until there are none."""
    while True:  # it ends: every turn pins at least one axis
        partition, zig_of, axis_of = _solved(model, traced, unified)
        scales, unfit = solve_scales(traced, unified, partition, zig_of)
        if unfit:
            unified.algebra.pin_ids(_ids_of([*unfit], axis_of), AVERAGE)
            continue
        axes = []
        for number, axis in enumerate(partition.axes):
            scales_of_axis = scales.get(number, ())
            axes.append(dataclasses.replace(axis, scales=scales_of_axis))
        partition = dataclasses.replace(partition, axes=tuple(axes))
        removed, conflicts = _first_contradiction(partition)
        if not conflicts:
            return _Solution(partition, zig_of, axis_of)
        zigs = partition.sizes.involved(conflicts, removed)
        axes_to_pin = axis_of[np.isin(zig_of, zigs)]
        ids = _ids_of(axes_to_pin, axis_of)
        layers = [equation.layer for equation in conflicts if equation.layer]
        layer = layers[0] if layers else "forward"
        unified.algebra.pin_ids(ids, SIZE.of(layer))


def _ids_of(axes: Sequence[int] | np.ndarray, axis_of: np.ndarray) -> np.ndarray:
    """The ids of some axes, of which `axis_of` says the axis of every id."""
    is_on_axes = np.isin(axis_of, axes)  # (ids,)
    return np.flatnonzero(is_on_axes)


def _first_contradiction(partition: ZIGPartition) -> tuple[np.ndarray, list[Equation]]:
    """The first cut whose size equations contradict each other, and these equations; none if there is no such cut."""
    for removed, comparisons_count in _draws(partition):
        _, conflicts = partition.sizes.solve(removed)
        if not comparisons_count:
            conflicts = [equation for equation in conflicts if not is_comparison(equation)]
        if conflicts:
            break
    return removed, conflicts


def _draws(partition: ZIGPartition) -> Iterator[tuple[np.ndarray, bool]]:
    """Cuts to try, bool (num_zigs,), and whether comparisons of sizes have to come out in them as they did.

    The first cut removes a single ZIG of every axis, and comparisons have to come out as they did. The other cuts are
    larger and may turn a comparison round, because a size falls below some number, say. Whether that is right is
    decided where a plan makes such a cut.
    """
    num_zigs = partition.num_zigs
    last_of_each = np.zeros(num_zigs, bool)
    for _, removed_of_axis in partition.split(last_of_each):
        removed_of_axis[-1] = True
    yield last_of_each, True
    for seed in range(3):
        rng = np.random.default_rng(seed)
        at_random = np.zeros(num_zigs, bool)
        for axis, removed_of_axis in partition.split(at_random):
            order = rng.permutation(axis.size)  # (size,)
            num_kept = rng.integers(1, axis.size)  # at least one ZIG stays, and at least one is cut
            removed_of_axis[:] = order >= num_kept
        yield at_random, False


# rehearsal -----------------------------------------------------------------------------------------


class _Rehearsal:
    """The cut, tried in every way that is possible; families of axes that fail, alone or together, are pinned."""

    def __init__(
        self,
        model: nn.Module,
        forwards: list[Forward],
        traced: Trace,
        unified: Axes,
        device: torch.device | None,
    ) -> None:
        self.model = model
        self.forwards = forwards
        self.traced = traced
        self.unified = unified
        self.device = device
        self._solve()

    def _solve(self) -> None:
        self.partition, _, self.axis_of = _consistent(self.model, self.traced, self.unified)

    def rehearsed(self) -> ZIGPartition:
        """The partition of what passes every attempt."""
        for attempt in attempts(self.model, self.forwards, self.traced, self.device):
            while self.partition.axes and self._problem(attempt):
                self._refuse_a_failing_model(attempt)
                # The refusal may have found that the model computes in its own dtype only: the cut is tried again.
                if attempt.func is differs and not self._problem(attempt):
                    break
                self._pin_families(attempt)
                self._solve()
        return self.partition

    def _refuse_a_failing_model(self, attempt: Attempt) -> None:
        """Raises OTOError where no cut is to blame, as the model fails the attempt with nothing cut out."""
        if attempt.func is differs:
            refuse_random(self.model, self.forwards)
            return
        problem = self._problem(attempt, families=())
        if problem:
            name = type(self.model).__name__
            raise OTOError(f"{name} can't be run again on the same inputs, nothing cut out: {problem}")

    def _problem(self, attempt: Attempt, families: Collection[str] | None = None) -> str | None:
        """What is wrong with the model without half of every axis, None if nothing is.

        Args:
            families: the families of axes to cut. None: all.
        """
        try:
            plan = random_half(self.partition, families)
            return attempt(resolve(self.partition, plan, warn=False))
        except DynamicOutputShapeException:  # FakeTensors don't know how many values are nonzero, say
            return None
        except Exception as error:
            raise_if_out_of_memory(error)
            lines = str(error).splitlines()
            first_line = lines[0] if lines else ""
            return f"{type(error).__name__}: {first_line}"

    def _pin_families(self, attempt: Attempt) -> None:
        """Pins every family of axes that fails together with those that passed before it."""
        axes_of_family: dict[str, list[int]] = {}
        has_scales: dict[str, bool] = {}
        for number, axis in enumerate(self.partition.axes):
            family = fold(axis.name)
            axes_of_family.setdefault(family, []).append(number)
            has_scales[family] = bool(axis.scales)
        # Of two families that fail together the later one is pinned. Families with scales come last, because they
        # change weights of other axes, too.
        in_order = sorted((has_scales[family], family) for family in axes_of_family)
        passed: set[str] = set()
        for _, family in in_order:
            problem = self._problem(attempt, passed | {family})
            if not problem:
                passed.add(family)
                continue
            logger.info("pinned %s: %s", family, problem)
            ids = _ids_of(axes_of_family[family], self.axis_of)
            self.unified.algebra.pin_ids(ids, REHEARSAL.of(problem))
