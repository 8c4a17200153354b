"""The front door: from a model to its ZIG partition, rehearsed before anybody trains on it.

Trace, rules, solve, sizes; then the cut is put on the model, without weights and with them, where there are some, and
taken off again: what can't be rebuilt exactly is pinned with that reason.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
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
from .modeling_oto import OTOError, named_tensors, sizes_of
from .reasons import AVERAGE, IDLE, PROTECTED, REHEARSAL, SCRIPTED, SIZE
from .restore import MANY, replace_tensors_, restored
from .rules import Axes, apply_rules, multiplications, without_repeats
from .scales import solve_scales
from .sizes import Sizes, is_comparison, spans_of
from .solve import solve
from .table import fold
from .trace import Trace, experts_at_once_, trace
from .zigs import ZIGPartition, random_half

logger = logging.getLogger(__name__)

CONCATENATED = (1, 2, 3, 4)  # so many equal widths side by side may be what a head reads: u, v, |u - v|, u * v


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
    if any(isinstance(p, DTensor) for p in model.parameters()):
        raise OTOError(
            f"{type(model).__name__} is sharded already: make the partition before fully_shard or "
            "accelerator.prepare; of a model too large for that, on the meta device"
        )
    name, weights = type(model).__name__, dict(model.named_parameters())
    if lazy := [n for n, p in weights.items() if is_lazy(p)]:
        raise OTOError(f"{lazy[0]} of {name} has no shape yet: call the model once, then partition it")
    without = [n for n, p in weights.items() if p.is_meta]
    if 0 < len(without) < len(weights):
        raise OTOError(
            f"{len(without)} of {len(weights)} weights of {name} are on the meta device, {without[0]} for one: load "
            "all of them (no offload to disk or CPU), or none"
        )
    protected = _protected(model, protect)
    given = ([batch] for batch in make_inputs(model)) if inputs is None else [inputs]
    forwards, traced = _first_traced(model, map(as_forwards, given))
    if not without and any(t.is_meta for t in input_tensors(forwards)):
        raise OTOError(
            f"the inputs are on the meta device, and the weights of {name} are not: pass inputs with values"
        )
    traced = without_repeats(traced)
    found = apply_rules(traced)
    dead = {ref.value for call in traced.calls for ref in call.outs} - found.dims.keys()  # nobody uses these results
    living = [q for q in traced.equations if not any(e[1] in dead for side in q[:2] for e in spans_of(side))]
    traced = traced._replace(equations=living)
    scripted = [f"{path}." for path, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    for name in traced.sources:
        why = PROTECTED if name in protected else SCRIPTED if name.startswith(tuple(scripted)) else ""
        for dim in found.of(traced.sources[name]) if why else ():
            found.algebra.pin(dim, why)
    _pin_around_what_never_ran(traced, found)
    return _rehearsed(model, forwards, traced, found)


def _protected(model: nn.Module, protect: Sequence[str]) -> set[str]:
    first = {id(p): name for name, p in model.named_parameters()}  # what is tied has several names
    names = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    modules = [name for name, _ in model.named_modules() if name]
    found = set()
    for pattern in [protect] if isinstance(protect, str) else protect:
        inside = tuple(f"{module}." for module in modules if re.search(pattern, module))
        matching = {names[name] for name in names if re.search(pattern, name) or name.startswith(inside)}
        if not matching:
            raise ValueError(f"protect: {pattern!r} matches no parameter or module, for example {next(iter(names))!r}")
        found |= matching
    return found


def _first_traced(model: nn.Module, several: Iterable[list[Forward]]) -> tuple[list[Forward], Trace]:
    """The first calls that the model takes, and their trace."""
    for forwards in several:
        try:
            return forwards, trace(model, forwards)
        except OTOError as error:
            problem = error
    raise problem


def _pin_around_what_never_ran(traced: Trace, found: Axes) -> None:
    """Pins whatever a parameter that no call touched might read, or add to, when it runs one day: an auxiliary head,
    another task's, a tower without data.

    Its module is called, if ever, where the forward of the module around it runs, on what that has in hand: so there
    every run of dimensions stays that is as wide as one of the parameter's own, or of which that is up to CONCATENATED
    in a row. (64 channels around an unused Linear(64, 10) stay, and around an unused Linear(128, 10), which may read
    their mean and their maximum; 48 around it need not.)
    """
    used = {ref.value for call in found.calls for ref in call.refs}
    idle = [name for name in traced.sources if name in traced.parameters and traced.sources[name].value not in used]
    if not idle:
        return
    working = {f"{name}." for name in traced.parameters - set(idle)}
    around: dict[str, dict[int, str]] = {}  # path -> the widths that something there never used has -> its name
    for name in idle:
        path = name.rpartition(".")[0]
        # the largest module around it in which nothing worked is what would be called
        while path and not any(other.startswith(f"{path}.") for other in working):
            path = path.rpartition(".")[0]
        while path and path not in traced.in_hand:  # a list of modules has no forward: what holds it calls them
            path = path.rpartition(".")[0]
        widths = around.setdefault(path, {})
        for n in traced.sources[name].shape:
            if n > 1:
                widths.setdefault(n, name)
    in_hand = {path: set(values) for path, values in traced.in_hand.items()}
    for call in found.calls:
        in_hand.setdefault(call.layer, set()).update(ref.value for ref in (*call.refs, *call.outs))
    weights = {ref.value for ref in traced.sources.values()}
    for path, widths in around.items():
        for value in (in_hand.get(path, set()) & found.dims.keys()) - weights:
            dims = found.dims[value]
            sizes = [math.prod(len(leaf.ids) for leaf in dim) for dim in dims]
            for start in range(len(dims)):
                for stop in range(start + 1, len(dims) + 1):
                    size = math.prod(sizes[start:stop])
                    if size == 1:  # of which everything is a multiple
                        continue
                    name = next((widths[k * size] for k in CONCATENATED if k * size in widths), None)
                    for dim in dims[start:stop] if name else ():
                        found.algebra.pin(dim, IDLE.of(fold(name)))


def _solved(model: nn.Module, traced: Trace, found: Axes) -> tuple[ZIGPartition, np.ndarray, np.ndarray]:
    """The partition as the algebra has it now, and the ZIG and the axis of every id, -1 for none."""
    sources = {name: found.of(ref) for name, ref in traced.sources.items()}
    partition, zig_of = solve(found.algebra.copy(), sources, sources.keys() - traced.parameters)
    zigs: dict[int, np.ndarray] = {}  # many tensors share a leaf: one array for all
    spans = {}
    for value, dim in {e[1:3] for q in traced.equations for side in q[:2] for e in spans_of(side)}:
        leaves = found.dims[value][dim] if value in found.dims else ()
        zigs |= {id(leaf.ids): zig_of[leaf.ids] for leaf in leaves if id(leaf.ids) not in zigs}
        factors = tuple(zigs[id(leaf.ids)] for leaf in leaves)
        if any((f >= 0).any() for f in factors):
            spans[value, dim] = factors
    values = {
        (path, name, i): n
        for path, module in model.named_modules()
        for name, value in sizes_of(module).items()
        if isinstance(value, int) or len(value) <= MANY
        for i, n in ([(None, value)] if isinstance(value, int) else enumerate(value))
    }
    size = [axis.size for axis in partition.axes]
    axis_of = np.append(np.repeat(np.arange(len(size)), size), -1)[zig_of]
    known: dict[int, Width] = {}

    def width(leaf: Leaf) -> Width:
        if id(leaf.ids) not in known:
            some, counts = (x.tolist() for x in np.unique(axis_of[leaf.ids], return_counts=True))
            lost = tuple((a, n / size[a]) for a, n in zip(some, counts, strict=True) if a >= 0)
            known[id(leaf.ids)] = (len(leaf.ids), lost)
        return known[id(leaf.ids)]

    products = (dims for call in traced.calls[: traced.evaluated] for dims in multiplications(call))
    factors = ([width(leaf) for ref, d in dims for leaf in found.of(ref)[d]] for dims in products)
    work = Work.of(factors, len(size))
    amounts = zip(partition.axes, partition.params(model).alone, work.alone, strict=True)
    axes = tuple(dataclasses.replace(axis, params=round(p), macs=round(n)) for axis, p, n in amounts)
    sizes = Sizes(traced.equations, spans, values)
    return dataclasses.replace(partition, axes=axes, work=work, sizes=sizes), zig_of, axis_of


def _consistent(model: nn.Module, traced: Trace, found: Axes) -> tuple[ZIGPartition, np.ndarray]:
    """Solves, and pins what no scaling suits or what contradicts itself for random cuts, until nothing does; the
    partition, and the axis of every id."""
    while True:
        partition, zig_of, axis_of = _solved(model, traced, found)
        scales, unfit = solve_scales(traced, found, partition, zig_of)
        if unfit:
            found.algebra.pin_ids(np.flatnonzero(np.isin(axis_of, [*unfit])), AVERAGE)
            continue
        axes = (dataclasses.replace(axis, scales=scales.get(i, ())) for i, axis in enumerate(partition.axes))
        partition = dataclasses.replace(partition, axes=tuple(axes))
        for removed, compare in _draws(partition):
            _, conflicts = partition.sizes.solve(removed)
            conflicts = [q for q in conflicts if compare or not is_comparison(q)]
            if conflicts:
                break
        else:
            return partition, axis_of
        axes = axis_of[np.isin(zig_of, partition.sizes.involved(conflicts, removed))]
        layer = next((c.layer for c in conflicts if c.layer), "forward")
        found.algebra.pin_ids(np.flatnonzero(np.isin(axis_of, axes)), SIZE.of(layer))


def _draws(partition: ZIGPartition) -> Iterator[tuple[np.ndarray, bool]]:
    """Cuts to try, bool (num_zigs,), and whether comparisons of sizes have to come out as they did in them: in one of
    a single ZIG of every axis. That a size must not fall below some number is left to the plan that does it."""
    none = np.zeros(0, bool)
    yield np.concatenate([none, *(np.arange(axis.size) == axis.size - 1 for axis in partition.axes)]), True
    for seed in range(3):
        rng = np.random.default_rng(seed)
        cut = (rng.permutation(axis.size) >= rng.integers(1, axis.size) for axis in partition.axes)
        yield np.concatenate([none, *cut]), False


# rehearsal -----------------------------------------------------------------------------------------


def _rehearsed(model: nn.Module, forwards: list[Forward], traced: Trace, found: Axes) -> ZIGPartition:
    """Tries the cut; families of axes that can't be cut alone, or together with the rest, are pinned."""
    partition, axis_of = _consistent(model, traced, found)

    def problem(attempt: Callable[[Cut], str | None], families: Collection[str] | None = None) -> str | None:
        try:
            return attempt(resolve(partition, random_half(partition, families), warn=False))
        except DynamicOutputShapeException:
            return None
        except Exception as error:
            raise_if_out_of_memory(error)
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"

    for attempt in _attempts(model, forwards, traced):
        while partition.axes and problem(attempt):
            if attempt.func is _differs:
                refuse_random(model, forwards)  # no cut is to blame for what differs by itself
                if not problem(attempt):  # in the arithmetic that it turned out to know
                    break
            elif why := problem(attempt, ()):
                raise OTOError(f"{type(model).__name__} can't be run again on the same inputs, nothing cut out: {why}")
            streams = {fold(axis.name): bool(axis.scales) for axis in partition.axes}
            good: set[str] = set()
            for family in sorted(streams, key=lambda f: (streams[f], f)):  # of two that quarrel the later one goes
                if why := problem(attempt, good | {family}):
                    logger.info("pinned %s: %s", family, why)
                    bad = [i for i, axis in enumerate(partition.axes) if fold(axis.name) == family]
                    ids = np.flatnonzero(np.isin(axis_of, bad))
                    found.algebra.pin_ids(ids, REHEARSAL.of(why))
                else:
                    good.add(family)
            partition, axis_of = _consistent(model, traced, found)
    return partition


def _attempts(model: nn.Module, forwards: list[Forward], traced: Trace) -> Iterator[functools.partial[str | None]]:
    """Functions of a cut that say what is wrong with the cut model: it must run in every mode that was traced and
    keep the shapes of its outputs, and where there are weights, the outputs themselves in eval mode."""
    shapes = {training: [ref.shape for ref in returned] for training, returned in traced.returned.items()}
    if traced.returned.get(True) == traced.returned[False]:
        del shapes[True]  # train mode made the very same calls
    on_fakes = {training: shapes[training] for training in shapes if traced.fake[training]}
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
    """Whether the outputs of the cut model have other shapes in some mode; `shapes`: by mode, training or not."""
    fakes = Fakes(model)
    with restored(model) as kept:
        if on_fakes:  # cut without weights, which is several times as fast as cutting fakes
            replace_tensors_(kept, {id(t): _without_weight(t) for t in named_tensors(model).values()})
        cut_(model, cut)
        weights = fakes.weights(model) if on_fakes else None
        for training, before in shapes.items():
            with evaluating(model, training, weights), fakes.mode if on_fakes else WeightsKept(model):
                experts_at_once_(model)
                tensor = fakes.of if on_fakes else torch.clone
                outputs = [t for forward in forwards for t in tensors_of(forward.run(model, tensor))]
            now = [tuple(t.shape) for t in outputs]
            if now != before:
                return f"the outputs change shape, {before} -> {now}"
    return None


def _without_weight(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _differs(model: nn.Module, forwards: list[Forward], cut: Cut) -> str | None:
    """How far the outputs of the cut model are from those of the zeroed one, if they are not the same."""
    difference, tolerance = cut_difference(model, cut, forwards)
    return None if difference <= tolerance else f"the outputs differ by {difference:.1e}"
