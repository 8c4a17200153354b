"""The front door: from a model to its ZIG partition, rehearsed before anybody trains on it.

Trace, rules, solve, sizes; then the cut is tried on weightless copies, and on the real weights where there are some:
what can't be rebuilt exactly is pinned with that reason.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedConfig, PreTrainedModel

from .axes import Leaf
from .compact import cut_, put_, resolve, scale_factors, scaled
from .modeling_oto import named_tensors, sizes_of
from .rules import Axes, apply_rules, multiplications
from .scales import solve_scales
from .sizes import Sizes, spans_of
from .trace import Trace, evaluating, fake_weights, tensors_of, trace
from .wide import WideArithmetic, wide_dtype
from .zigs import OTOError, PruningPlan, Width, Work, ZIGPartition, fold, solve

logger = logging.getLogger(__name__)

EXACT = 1e-9  # relative, in wide arithmetic: right cuts differ by less than 1e-12 in every dtype, wrong ones by 1e-6
TOLERANCE = 1e-5  # relative; exact models stay below 1.4e-6 in float32, off-by-one cuts are mostly above 1e-4


def partition_zigs(
    model: nn.Module, inputs: Mapping[str, Any] | None = None, protect: Sequence[str] = ()
) -> ZIGPartition:
    """Finds every zero-invariant group of a model (OTOv2, arXiv 2303.06862, Alg. 2), whatever its architecture.

    Args:
        model: any `nn.Module`; on the meta device too.
        inputs: one small batch, the keyword arguments of forward; None: made from the config.
        protect: regular expressions; a parameter is not pruned if one matches anywhere in its name or the name of a
            module it is in.

    Returns:
        the partition; its `pinned` says for every other parameter dimension why it stays.

    Raises:
        OTOError: the model can't run on the inputs.
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
    protected = _protected(model, protect)
    inputs, traced = _first_traced(model, make_inputs(model) if inputs is None else [inputs])
    found = apply_rules(traced)
    dead = {ref.value for call in traced.calls for ref in call.outs} - found.dims.keys()  # nobody uses these results
    living = [q for q in traced.equations if not any(e[1] in dead for side in q[:2] for e in spans_of(side))]
    traced = traced._replace(equations=living)
    for name in protected & traced.sources.keys():
        for dim in found.of(traced.sources[name]):
            found.algebra.pin(dim, "protected by the caller")
    return _rehearsed(model, inputs, traced, found)


def make_inputs(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Small batches made from a Transformers config, of text, images or sound: first of all its forward takes, so that
    every tower runs (images have their places in the text, where the model wants that), then of its main input alone.

    Raises:
        OTOError: what the model reads is none of these.
    """
    made, main = {}, ""
    if isinstance(model, PreTrainedModel):
        accepted, main = inspect.signature(model.forward).parameters, model.main_input_name
        device = torch.device("cpu") if model.device.type == "meta" else model.device
        for name in ("input_ids", "pixel_values", "input_values", "input_features", "decoder_input_ids"):
            value = _made(name, model.config) if name in accepted else None
            if value is not None:
                made[name] = value.to(device, model.dtype if value.is_floating_point() else value.dtype)
    if {"input_ids", "pixel_values"} <= made.keys():
        yield from _with_images(model, made)
    if made:
        yield made
    if main not in made:
        raise OTOError(
            f"can't make a batch for {type(model).__name__} from its config: pass inputs, the arguments of its forward"
        )
    yield {name: value for name, value in made.items() if name in (main, "decoder_input_ids")}
    yield {main: made[main]}


def _with_images(model: PreTrainedModel, made: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Batches whose texts begin with a token for every feature of their image: to count these the images are encoded,
    in each of the forms that models take them in."""
    token, encode = _find(model.config, "image_token_id"), getattr(model, "get_image_features", None)
    if token is None or encode is None or model.device.type == "meta":
        return
    pixels, text = made["pixel_values"], made["input_ids"]
    forms = [{"pixel_values": pixels, "image_sizes": torch.tensor([pixels.shape[-2:]] * 2, device=pixels.device)}]
    forms += [{"pixel_values": pixels}, {"pixel_values": pixels[:, None]}]
    patch, merge = _find(model.config, "patch_size"), 2 * (_find(model.config, "spatial_merge_size") or 1)
    if isinstance(patch, int):
        size = pixels.shape[1] * (_find(model.config, "temporal_patch_size") or 1) * patch**2
        grid = torch.tensor([[1, merge, merge]] * 2, device=pixels.device)
        forms.insert(0, {"pixel_values": pixels.new_ones(2 * merge**2, size), "image_grid_thw": grid})
    for images in (form for form in forms if form.keys() <= inspect.signature(encode).parameters.keys()):
        try:
            with evaluating(model):
                features = encode(**images)
        except Exception:  # not its form
            continue
        features = tensors_of(getattr(features, "pooler_output", features))
        count = sum(t.numel() for t in features) // model.get_input_embeddings().weight.shape[1]
        text = torch.where(text == token, text - 1, text)
        batch = made | images | {"input_ids": torch.cat([text.new_full((2, count // 2), token), text], 1)}
        if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
            batch["mm_token_type_ids"] = (batch["input_ids"] == token).long()
        yield batch


def _find(config: PreTrainedConfig, key: str) -> Any:
    """What a config or one of its parts says, None if none does."""
    parts = [config, *(vars(config)[key] for key in config.sub_configs if vars(config).get(key) is not None)]
    return next((found for part in parts if (found := getattr(part, key, None)) is not None), None)


def _made(name: str, config: PreTrainedConfig) -> torch.Tensor | None:
    """One input, None if the config doesn't say how large it is."""
    generator, shape = torch.Generator().manual_seed(0), (4000,)
    if name.endswith("input_ids"):
        size = _find(config, "vocab_size")
        return torch.randint(3, size, (2, 16), generator=generator) if size else None
    if name == "pixel_values":
        size = _find(config, "image_size") or 64
        shape = (_find(config, "num_channels") or 3, *(size if isinstance(size, (list, tuple)) else (size, size)))
    if name == "input_features":
        shape = (_find(config, "num_mel_bins"), 2 * (_find(config, "max_source_positions") or 50))
    return torch.randn(2, *shape, generator=generator) if all(shape) else None


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


def _first_traced(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> tuple[dict[str, Any], Trace]:
    """The first batch that the model takes, and its trace."""
    for inputs in batches:
        try:
            return dict(inputs), run_traced(model, inputs)
        except OTOError as error:
            problem = error
    raise problem


def run_traced(model: nn.Module, inputs: Mapping[str, Any]) -> Trace:
    """The trace of one forward: on FakeTensors, or by one real forward where the model does not run on them."""
    empty = any(p.is_meta for p in model.parameters())
    with _experts_at_once(model):
        for fake in (True,) if empty else (True, False):
            try:
                return trace(model, inputs, fake=fake)
            except Exception as error:  # data-dependent branches and exotic kernels don't run on FakeTensors
                problem = error
                logger.info("the trace with fake=%s failed: %s", fake, str(error).split("\n")[0])
    hint = " (or the model can't be traced without weights: load them first)" if empty else ""
    shapes = {k: tuple(v.shape) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    raise OTOError(
        f"{type(model).__name__} can't take the batch {shapes}: {type(problem).__name__}: {problem}{hint}"
    ) from problem


@contextlib.contextmanager
def _experts_at_once(model: nn.Module) -> Iterator[None]:
    """While open, experts run as one batched product: the implementation whose shapes don't depend on the data."""
    undo = []
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and not any(module in other.modules() for other, _ in undo):
            undo.append((module, module.get_experts_implementation()))
            module.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        for module, before in undo:
            module.set_experts_implementation(before)


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

    products = (dims for call in traced.calls for dims in multiplications(call))
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
            found.algebra.pin_ids(np.flatnonzero(np.isin(axis_of, [*unfit])), "an average is taken over it")
            continue
        axes = (dataclasses.replace(axis, scales=scales.get(i, ())) for i, axis in enumerate(partition.axes))
        partition = dataclasses.replace(partition, axes=tuple(axes))
        for seed in range(3):
            rng = np.random.default_rng(seed)
            cut = [rng.permutation(axis.size) >= rng.integers(1, axis.size) for axis in partition.axes]
            removed = np.concatenate([np.zeros(0, bool), *cut])
            _, conflicts = partition.sizes.solve(removed)
            if conflicts:
                break
        else:
            return partition, axis_of
        axes = axis_of[np.isin(zig_of, partition.sizes.involved(conflicts, removed))]
        layer = next((c.layer for c in conflicts if c.layer), "forward")
        found.algebra.pin_ids(np.flatnonzero(np.isin(axis_of, axes)), f"a size used in {layer} can't follow it")


# rehearsal -----------------------------------------------------------------------------------------


def _rehearsed(model: nn.Module, inputs: dict[str, Any], traced: Trace, found: Axes) -> ZIGPartition:
    """Tries the cut; families of axes that can't be cut alone, or together with the rest, are pinned."""
    partition, axis_of = _consistent(model, traced, found)

    def problem(attempt: Callable[..., str | None], families: Collection[str] | None = None) -> str | None:
        try:
            return attempt(partition, _half(partition, families))
        except DynamicOutputShapeException:
            return None
        except Exception as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"

    for attempt in _attempts(model, inputs, traced):
        while partition.axes and problem(attempt):
            streams = {fold(axis.name): bool(axis.scales) for axis in partition.axes}
            good: set[str] = set()
            for family in sorted(streams, key=lambda f: (streams[f], f)):  # of two that quarrel the later one goes
                if why := problem(attempt, good | {family}):
                    logger.info("pinned %s: %s", family, why)
                    bad = [i for i, axis in enumerate(partition.axes) if fold(axis.name) == family]
                    ids = np.flatnonzero(np.isin(axis_of, bad))
                    found.algebra.pin_ids(ids, f"cutting it failed in rehearsal: {why}")
                else:
                    good.add(family)
            partition, axis_of = _consistent(model, traced, found)
    return partition


def _attempts(model: nn.Module, inputs: dict[str, Any], traced: Trace) -> Iterator[Callable[..., str | None]]:
    """Functions of a partition and a plan that say what is wrong with the cut model: on weightless copies it must run
    and keep the shapes of the outputs; with weights, the outputs too."""
    if traced.fake:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        empty = {id(t): torch.empty(t.shape, dtype=t.dtype, device="meta") for t in named_tensors(model).values()}
        meta = {name: empty[id(t)] for name, t in named_tensors(model).items()}
        fakes = tree_map_only(torch.Tensor, mode.from_tensor, inputs)
        shapes = [ref.shape for ref in traced.outputs]

        def without_weights(partition: ZIGPartition, plan: PruningPlan) -> str | None:
            small = cut_copy(model, partition, plan, meta)  # several times as fast as cutting fakes
            cut = named_tensors(small)
            put_(small, {id(cut[name]): fake for name, fake in fake_weights(model, mode, cut).items()})
            with mode, evaluating(small), _experts_at_once(small):
                now = [tuple(t.shape) for t in tensors_of(small(**fakes))]
            return None if now == shapes else f"the outputs change shape, {shapes} -> {now}"

        yield without_weights
    if not any(p.is_meta for p in model.parameters()):

        def with_weights(partition: ZIGPartition, plan: PruningPlan) -> str | None:
            difference = cut_difference(model, partition, plan, inputs)
            return None if difference <= EXACT else f"the outputs differ by {difference:.1e}"

        yield with_weights


def _half(partition: ZIGPartition, families: Collection[str] | None = None) -> PruningPlan:
    """A random half of every axis, or of those of these families alone."""
    rng = np.random.default_rng(0)
    kept = {}
    for axis in partition.axes:
        # at least half: with less, deep networks forget their input, and any cut looks right
        keep = np.sort(rng.permutation(axis.size)[: rng.integers((axis.size + 1) // 2, axis.size)])
        if families is None or fold(axis.name) in families:
            kept[axis.name] = keep
    return PruningPlan(kept)


def tolerance(model: nn.Module) -> float:
    """The largest relative difference that rounding explains: 1e-5 in float32, which norms of wider models use too."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()} | {torch.float32}
    return max(TOLERANCE * torch.finfo(d).eps / torch.finfo(torch.float32).eps for d in dtypes)


def is_rounding(
    difference: float, model: nn.Module, partition: ZIGPartition, plan: PruningPlan, inputs: Mapping[str, Any]
) -> bool:
    """Whether rounding explains the difference that a cut makes: it is within `tolerance` or, in a model less stable
    than most, within four times what scaling the same weights, and scaling them back, does to it."""
    if difference <= tolerance(model):
        return True
    removed, _ = resolve(partition, plan)
    zeroed = _zeroed(model, partition, removed, noise=False)
    again = partition.tensors(model) | zeroed
    for name, (factor, offset) in scale_factors(partition, removed).items():
        again[name] = scaled(scaled(again[name].detach(), factor, offset), 1 / factor, offset)
    return difference < 4 * _difference(_outputs(model, inputs, zeroed), _outputs(model, inputs, again))


def _outputs(
    model: nn.Module, inputs: Mapping[str, Any], weights: Mapping[str, torch.Tensor] | None = None
) -> list[torch.Tensor]:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with evaluating(model), WideArithmetic(wide_dtype(device)):
        torch.manual_seed(0)
        inputs = tree_map_only(torch.Tensor, torch.clone, dict(inputs))
        out = model(**inputs) if weights is None else torch.func.functional_call(model, dict(weights), (), inputs)
        return [t for t in tensors_of(out) if t.is_floating_point()]


def _difference(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> float:
    """Largest difference relative to the `_spread` of each output, or for a scalar (a loss, a small difference of what
    stands beside it) to the largest of all; inf where shapes or infinities differ, or where nothing is finite."""
    if [x.shape for x in a] != [y.shape for y in b]:
        return float("inf")
    worst, largest = 0.0, max((_spread(x) for x in a), default=0.0)
    for x, y in zip(a, b, strict=True):
        finite = torch.isfinite(x)
        if not torch.equal(finite, torch.isfinite(y)) or (x.numel() and not finite.any()):  # then nothing is compared
            return float("inf")
        if x.numel():
            scale = _spread(x) if x.dim() else largest
            worst = max(worst, float((x - y)[finite].abs().max()) / max(scale, 1e-3))
    return worst


def _spread(x: torch.Tensor) -> float:
    """How far the finite entries of an output are from their mean, so that an offset common to all hides nothing; at
    least 1e-4 of the largest entry, so that rounding of a large offset is no difference."""
    x = x[torch.isfinite(x)].double()
    if x.numel() <= 1:
        return float(x.abs().sum())
    return max(float((x - x.mean()).abs().max()), 1e-4 * float(x.abs().max()))


def _zeroed(model: nn.Module, partition: ZIGPartition, removed: np.ndarray, noise: bool) -> dict[str, torch.Tensor]:
    """Copies of the weights with ZIGs zeroed, bool (num_zigs,), and, if `noise`, their other side filled at random."""
    slices = [s for s in partition.slices(removed) if s[1].role != "statistic"]
    tensors = partition.tensors(model)
    changed = {m.param: tensors[m.param].detach().clone() for _, m, _ in slices}
    generator = torch.Generator().manual_seed(0)
    for _, m, index in slices if noise else ():
        w = changed[m.param]
        where = torch.from_numpy(index).to(w.device)
        shape = w.index_select(m.dim, where).shape
        w.index_copy_(m.dim, where, torch.randn(shape, generator=generator).to(w))
    for axis, m, index in slices:  # zeros win where a tensor is on both sides
        if m.role == "consumer" if noise and not axis.zero_path else m in axis.group:
            w = changed[m.param]
            w.index_fill_(m.dim, torch.from_numpy(index).to(w.device), 0)
    return changed


def check_zero_invariance(
    model: nn.Module, partition: ZIGPartition, inputs: Mapping[str, Any], plan: PruningPlan | None = None
) -> float:
    """The certificate: zero ZIGs, then fill what reads them once with zeros and once with noise; nothing may change.

    Two forwards prove every group of the plan at once, independent of the rules that found them. The model is not
    touched. (The definition of a zero-invariant group: OTOv2, arXiv 2303.06862, Def. 1.)

    Args:
        plan: the ZIGs to test; None: a random half of every axis.

    Returns:
        the largest difference of the outputs, relative to their largest entry: below 1e-5 in float32 if it holds.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> batch = {"input": torch.ones(1, 3)}
        >>> check_zero_invariance(model, partition_zigs(model, batch), batch) < 1e-5
        True
    """
    removed = (plan or _half(partition)).removed(partition)
    quiet = _outputs(model, inputs, _zeroed(model, partition, removed, noise=False))
    loud = _outputs(model, inputs, _zeroed(model, partition, removed, noise=True))
    return _difference(quiet, loud)


def cut_difference(model: nn.Module, partition: ZIGPartition, plan: PruningPlan, inputs: Mapping[str, Any]) -> float:
    """How far a cut copy is from the zeroed full model, measured as in `check_zero_invariance`; changes nothing."""
    removed, _ = resolve(partition, plan)
    zeroed = _zeroed(model, partition, removed, noise=False)
    tensors = named_tensors(model)
    # the certificate judges the cut, not how its scaled weights round; what is tied has several names
    scaled_ids = {id(tensors[name]) for name in scale_factors(partition, removed)}
    unrounded = {name: t.detach().double() for name, t in tensors.items() if id(t) in scaled_ids}
    small = cut_copy(model, partition, plan, tensors | unrounded)
    return _difference(_outputs(model, inputs, zeroed), _outputs(small, inputs))


def cut_copy(
    model: nn.Module, partition: ZIGPartition, plan: PruningPlan, weights: Mapping[str, torch.Tensor] | None = None
) -> nn.Module:
    """A cut copy of a model, of its own class still, made of other weights if given; what is not cut, both share."""
    tensors = named_tensors(model)
    small = copy.deepcopy(model, {id(t): (weights or tensors)[name] for name, t in tensors.items()})
    cut_(small, partition, *resolve(partition, plan))
    return small


def outputs_differ(a: nn.Module, b: nn.Module, inputs: Mapping[str, Any]) -> float:
    """How far the outputs of two models are from each other, measured as in `check_zero_invariance`."""
    return _difference(_outputs(a, inputs), _outputs(b, inputs))
