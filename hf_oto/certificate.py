"""The certificate: zero ZIGs are invisible, and the cut model computes what the zeroed full one does.

Stands beside the cut, independent of the rules that found the ZIGs: the calls are made, and outputs compared. Every
operation is computed in double, whatever the model's dtype: there right cuts differ by 1e-15 and the smallest wrong
ones by 1e-3, while in bfloat16 rounding alone is larger than many a wrong cut.
"""

from __future__ import annotations

import contextlib
import logging
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from .calls import Forward, Inputs, as_forwards, described, raise_if_out_of_memory, tensors_of
from .cut import Cut, TrialCut
from .evaluating import WeightsKept, evaluating, seed_everything
from .modeling_oto import OTOError
from .restore import uninterrupted
from .trace import experts_at_once_
from .wide import WideArithmetic, wide_dtype
from .zigs import Member, PrunableAxis, PruningPlan, ZIGPartition, random_half

logger = logging.getLogger(__name__)

TOLERANCE = 1e-9  # relative, of what is computed in double; in float32 exact models stay below 1.4e-6
TOLERANCE_OF_FLOAT32 = 1e-5  # of coarser dtypes as much more as they round more


# models with a forward that fails in double (it asks for dtypes, say): they are compared in their own arithmetic
ONLY_AS_THEY_ARE: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class Certificate(NamedTuple):
    """What was compared, each relative to the outputs' size.

    Attributes:
        invariance: how far the outputs move when what reads the zero ZIGs is filled with noise.
        cut: how far the cut model is from the zeroed full one.
        tolerance: the largest of both that is right.
        rounding: how far the two are from each other in the model's own arithmetic.
    """

    invariance: float
    cut: float
    tolerance: float
    rounding: float

    def __str__(self) -> str:
        if math.isnan(self.cut) or math.isnan(self.invariance):
            return "no output on a real batch is a finite number (NaN or infinity)"
        return (
            f"with zero ZIGs cut out, outputs on a real batch differ by {max(self.invariance, self.cut):.1e} "
            f"(allowed: {self.tolerance:.0e})"
        )

    @property
    def holds(self) -> bool:
        """Whether both are within the tolerance; NaN is not."""
        return self.invariance <= self.tolerance and self.cut <= self.tolerance


def certify(model: nn.Module, cut: Cut, inputs: Inputs) -> Certificate:
    """Compares the zeroed full model with itself, what reads the zeros filled with noise, and with the cut model.

    The model is changed for the moment and put back bit by bit. Never are two models held at once: memory is that of
    the model, what the cut keeps, and the outputs.
    """
    forwards = as_forwards(inputs)
    with zeroed(model, cut):
        quiet, tolerance = exact_outputs(model, forwards)
        rounded = own_outputs(model, forwards)
    # where a norm is taken over a whole weight, what zero consumers silence still moves that norm
    with zeroed(model, cut, noise=True, producers_too=False):
        loud, _ = exact_outputs(model, forwards)
    invariance = largest_difference(quiet, loud)
    del loud
    small, tolerance = _cut_outputs(model, cut, forwards)
    difference = largest_difference(quiet, small)
    with TrialCut(model, cut):
        rounding = largest_difference(rounded, own_outputs(model, forwards))
    return Certificate(invariance, difference, tolerance, rounding)


def check_zero_invariance(
    model: nn.Module, partition: ZIGPartition, inputs: Inputs, plan: PruningPlan | None = None
) -> float:
    """Zeroes ZIGs, then fills what reads them once with zeros and once with noise; nothing may change.

    Two runs prove every group of the plan at once, independent of the rules that found them. The model is not
    touched. (The definition of a zero-invariant group: OTOv2, arXiv 2303.06862, Def. 1.) Where the consumers are part
    of a ZIG, these are zero and its producers noise; a norm over a whole weight (spectral norm) hears that noise, so
    that outputs may move there though the cut is exact.

    Args:
        inputs: as in `partition_zigs`.
        plan: the ZIGs to test; None: a random half of every axis.

    Returns:
        the largest difference of the outputs, relative to their size, computed in double: below 1e-9 if it holds.

    Example:
        >>> from hf_oto import partition_zigs
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> batch = {"input": torch.ones(1, 3)}
        >>> check_zero_invariance(model, partition_zigs(model, batch), batch) < 1e-9
        True
    """
    forwards = as_forwards(inputs)
    removed = (plan or random_half(partition)).removed(partition)
    cut = Cut(partition, removed, {}, {})
    with zeroed(model, cut):
        quiet, _ = exact_outputs(model, forwards)
    with zeroed(model, cut, noise=True):
        loud, _ = exact_outputs(model, forwards)
    return largest_difference(quiet, loud)


def cut_difference(model: nn.Module, cut: Cut, inputs: Inputs) -> tuple[float, float]:
    """How far the cut model is from the zeroed full one, computed in double, and the most that is right."""
    forwards = as_forwards(inputs)
    with zeroed(model, cut):
        full, _ = exact_outputs(model, forwards)
    small, tolerance = _cut_outputs(model, cut, forwards)
    return largest_difference(full, small), tolerance


def outputs_differ(a: nn.Module, b: nn.Module, inputs: Inputs) -> tuple[float, float]:
    """How far the outputs of two models are from each other, computed in double, and the most that is right."""
    forwards = as_forwards(inputs)
    first, tolerance = exact_outputs(a, forwards)
    second, _ = exact_outputs(b, forwards)
    return largest_difference(first, second), tolerance


def _cut_outputs(model: nn.Module, cut: Cut, forwards: Sequence[Forward]) -> tuple[list[torch.Tensor], float]:
    # the certificate judges the cut, not how its scaled weights are rounded
    trial = TrialCut(model, cut, widening=None if model in ONLY_AS_THEY_ARE else _arithmetic(model))
    with trial:
        return exact_outputs(model, forwards, trial.scales)


@contextlib.contextmanager
def zeroed(model: nn.Module, cut: Cut, noise: bool = False, producers_too: bool = True) -> Iterator[None]:
    """While open, what the cut removes is zero in the weights and, if `noise`, its other side filled at random.

    What is written over is kept and put back; what is zero already, as after training, is not written at all.

    Args:
        producers_too: whether the other side of zero consumers is filled, where these have to be zero.
    """
    slices = [s for s in cut.partition.slices(cut.removed) if s[1].role != "statistic"]
    tensors = cut.partition.tensors(model)
    kept: list[tuple[torch.Tensor, int, torch.Tensor, torch.Tensor | None]] = []  # None: zeros, as after training
    generator = torch.Generator().manual_seed(0)

    def is_free(axis: PrunableAxis, member: Member) -> bool:
        """Whether a slice may hold anything, since the other side is zero."""
        if axis.zero_path or not producers_too:
            return member not in axis.group
        return member.role == "producer" and any(m.role == "consumer" for m in axis.members)

    def write(name: str, dim: int, index: np.ndarray, at_random: bool) -> None:
        weight = tensors[name].data  # through .data a graph that holds the weight for its backward stays whole
        where = torch.from_numpy(index).to(weight.device)
        before = weight.index_select(dim, where)
        is_zero = not before.any()
        if is_zero and not at_random:
            return
        kept.append((weight, dim, where, None if is_zero else before))
        if at_random:
            weight.index_copy_(dim, where, torch.randn(before.shape, generator=generator).to(weight))
        else:
            weight.index_fill_(dim, where, 0)

    try:
        for axis, member, index in slices if noise else ():
            if is_free(axis, member):
                write(member.param, member.dim, index, at_random=True)
        for axis, member, index in slices:  # zeros win where a tensor is on both sides
            if member in axis.group and not (noise and is_free(axis, member)):
                write(member.param, member.dim, index, at_random=False)
        yield
    finally:
        with uninterrupted():
            for weight, dim, where, before in reversed(kept):
                weight.index_fill_(dim, where, 0) if before is None else weight.index_copy_(dim, where, before)


def own_outputs(model: nn.Module, forwards: Sequence[Forward]) -> list[torch.Tensor]:
    """The floating-point outputs of all calls in eval mode, the same random numbers for all who draw any."""
    with evaluating(model), WeightsKept(model):
        experts_at_once_(model)
        return _outputs(model, forwards)


def exact_outputs(
    model: nn.Module, forwards: Sequence[Forward], scales: Mapping[int, tuple[float, float]] | None = None
) -> tuple[list[torch.Tensor], float]:
    """`own_outputs` with every operation computed in double, float32 on devices without, and the tolerance of that.

    Args:
        scales: of weights that are still to be scaled, see `WideArithmetic`.
    """
    if model in ONLY_AS_THEY_ARE:
        dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()} | {torch.float32}
        return own_outputs(model, forwards), max(map(_tolerance, dtypes))
    wide = WideArithmetic(_arithmetic(model), scales)
    with evaluating(model), WeightsKept(model):
        experts_at_once_(model)
        with wide:
            outputs = _outputs(model, forwards)
    if wide.narrow:
        logger.info("computed in what these operations know: %s", wide.narrow)
    return outputs, max(_tolerance(dtype) for dtype in [wide.dtype, *wide.narrow.values()])


def _arithmetic(model: nn.Module) -> torch.dtype:
    """The widest dtype that every device of the model computes in."""
    devices = {p.device for p in model.parameters()} or {torch.device("cpu")}
    return torch.float64 if all(wide_dtype(device) == torch.float64 for device in devices) else torch.float32


def _tolerance(dtype: torch.dtype) -> float:
    if dtype == torch.float64:
        return TOLERANCE
    return TOLERANCE_OF_FLOAT32 * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps


def _outputs(model: nn.Module, forwards: Sequence[Forward]) -> list[torch.Tensor]:
    seed_everything()
    found = []
    for forward in forwards:
        found += [t for t in tensors_of(forward.run(model)) if t.is_floating_point() or t.is_complex()]
    return found


def largest_difference(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> float:
    """Largest difference relative to the `_spread` of each output, or for a scalar (a loss, a small difference of what
    stands beside it) to the largest of all. Entries that are not finite in both are not compared.

    Returns:
        inf where shapes or infinities differ; nan where nothing at all is finite.
    """
    a, b = ([x if x.layout == torch.strided else x.to_dense() for x in some] for some in (a, b))
    if [x.shape for x in a] != [y.shape for y in b]:
        return math.inf
    moved: list[float] = []
    for x, y in zip(a, b, strict=True):
        moved.append(0.0)
        for part, other in zip(_pieces(x), _pieces(y), strict=True):
            finite = torch.isfinite(part)
            if not torch.equal(finite, torch.isfinite(other)):
                return math.inf
            moved[-1] = max(moved[-1], _largest((part - other)[finite]))
    spreads = [_spread(x) for x in a]
    if all(spread is None for spread in spreads):
        return math.nan
    largest = max(spread for spread in spreads if spread is not None)
    scales = [spread if x.dim() else largest for x, spread in zip(a, spreads, strict=True)]
    return max(move / max(scale or 0.0, 1e-3) for move, scale in zip(moved, scales, strict=True))


PIECE = 2**22  # entries of an output that are compared at a time: logits of a large vocabulary are as large as layers


def _pieces(x: torch.Tensor) -> Iterator[torch.Tensor]:
    yield from x.reshape(-1).split(PIECE)


def _largest(x: torch.Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _spread(x: torch.Tensor) -> float | None:
    """How far finite entries are from their mean, so that an offset common to all hides nothing; at least 1e-4 of the
    largest, so that rounding of a large offset is no difference. None where no entry is finite."""
    finite = [(part[torch.isfinite(part)].sum(), int(torch.isfinite(part).sum())) for part in _pieces(x)]
    count = sum(n for _, n in finite)
    if count == 0:
        return None
    mean = sum(total for total, _ in finite) / count if count > 1 else 0
    largest = max(_largest(part[torch.isfinite(part)]) for part in _pieces(x))
    return max(max(_largest((part - mean)[torch.isfinite(part)]) for part in _pieces(x)), 1e-4 * largest)


def refuse_random(model: nn.Module, inputs: Inputs) -> None:
    """Nothing can be certified of a model whose outputs differ from run to run, or are not numbers.

    Raises:
        OTOError: saying which.
    """
    forwards = as_forwards(inputs)
    name = type(model).__name__
    try:
        first, tolerance = exact_outputs(model, forwards)
        again, _ = exact_outputs(model, forwards)
    except Exception as error:
        raise_if_out_of_memory(error)
        if model in ONLY_AS_THEY_ARE:
            raise OTOError(
                f"{name}, with nothing cut out, fails on {described(forwards)}: {type(error).__name__}: {error}"
            ) from error
        logger.warning(
            "%s does not compute in double (%s: %s): it is certified in its own dtype, more coarsely",
            name, type(error).__name__, error,
        )  # fmt: skip
        ONLY_AS_THEY_ARE.add(model)
        refuse_random(model, inputs)
        return
    if not first:
        raise OTOError(f"{name} returns no floating-point tensor (logits, say): nothing can be certified of it")
    moved = largest_difference(first, again)
    if math.isnan(moved):
        raise OTOError(f"no output of {name} is a finite number (NaN or infinity): nothing can be certified of it")
    if moved > tolerance:
        raise OTOError(
            f"{name} gives other outputs on the same batch, by {moved:.1e}, though torch, numpy and Python draw the "
            "same random numbers: let it draw from these in eval mode, or nothing that is cut out can be certified"
        )
