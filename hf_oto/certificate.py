"""The certificate: zero ZIGs are invisible, and the cut model computes what the zeroed full one does.

Nothing here knows the rules that found the ZIGs: the calls are made, and their outputs are compared. Every operation
is computed in double, whatever the model's dtype. In double, right cuts differ by 1e-15 and the smallest wrong cuts by
1e-3. In bfloat16 rounding alone would be larger than many a wrong cut.

Worked example: in Linear(3, 8) - ReLU - Linear(8, 2) the cut removes units 4 to 7. With rows 4 to 7 of the first
weight and bias zero, the outputs are the same whether columns 4 to 7 of the second weight are zero or noise
(`invariance`). Linear(3, 4) - ReLU - Linear(4, 2), with the other rows and columns, has the same outputs, too (`cut`).
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
from .differences import has_numbers, largest_difference
from .evaluating import WeightsKept, evaluating, seed_everything
from .modeling_oto import OTOError
from .restore import uninterrupted
from .trace import experts_at_once_
from .wide import WideArithmetic, wide_dtype
from .zigs import Member, PrunableAxis, PruningPlan, ZIGPartition, random_half

logger = logging.getLogger(__name__)

TOLERANCE = 1e-9  # relative, of what is computed in double
TOLERANCE_OF_FLOAT32 = 1e-5  # exact models stay below 1.4e-6; coarser dtypes get more, as they round more

# Models whose forward fails in double (because it asks for dtypes, say) are compared in their own arithmetic.
ONLY_AS_THEY_ARE: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class Certificate(NamedTuple):
    """The differences that were found, each relative to the outputs' size.

    Attributes:
        invariance: how far the outputs move when what reads the zero ZIGs is filled with noise.
        cut: how far the outputs of the cut model are from those of the zeroed full one.
        tolerance: up to this value `invariance` and `cut` count as zero.
        rounding: what `cut` is in the model's own arithmetic.
    """

    invariance: float
    cut: float
    tolerance: float
    rounding: float

    def __str__(self) -> str:
        if math.isnan(self.cut) or math.isnan(self.invariance):
            return "no output on a real batch is a finite number (NaN or infinity)"
        difference = max(self.invariance, self.cut)
        return (
            f"with the zeroed ZIGs cut out, outputs on a real batch differ by {difference:.1e} "
            f"(allowed: {self.tolerance:.0e})"
        )

    @property
    def holds(self) -> bool:
        """Whether `invariance` and `cut` are within the tolerance; NaN is not."""
        return self.invariance <= self.tolerance and self.cut <= self.tolerance


def certify(model: nn.Module, cut: Cut, inputs: Inputs) -> Certificate:
    """Compares the zeroed full model with the cut model, and with itself while noise fills what reads the zeros.

    The model is changed for the moment and put back bit by bit. No second model is ever held: the memory needed is
    that of the model, of what the cut keeps, and of the outputs.
    """
    forwards = as_forwards(inputs)
    with zeroed(model, cut):
        exact, _ = exact_outputs(model, forwards)
        rounded = own_outputs(model, forwards)
    # Noise in producers that zero consumers silence would still move a norm that is taken over a whole weight.
    with zeroed(model, cut, noise=True, producers_too=False):
        exact_with_noise, _ = exact_outputs(model, forwards)
    invariance = largest_difference(exact, exact_with_noise)
    del exact_with_noise  # before the outputs of the cut model need their memory
    exact_of_cut, tolerance = _cut_outputs(model, cut, forwards)
    difference = largest_difference(exact, exact_of_cut)
    with TrialCut(model, cut):
        rounded_of_cut = own_outputs(model, forwards)
    rounding = largest_difference(rounded, rounded_of_cut)
    return Certificate(invariance, difference, tolerance, rounding)


def check_zero_invariance(
    model: nn.Module, partition: ZIGPartition, inputs: Inputs, plan: PruningPlan | None = None
) -> float:
    """Zeroes ZIGs, then fills what reads them once with zeros and once with noise; the outputs may not change.

    Two runs prove every group of the plan at once, independent of the rules that found the groups. The model is put
    back bit by bit. (The definition of a zero-invariant group: OTOv2, arXiv 2303.06862, Def. 1.) If the consumers are
    part of a ZIG, the consumers are zero and the producers are noise. A norm over a whole weight (spectral norm) then
    sees that noise, so that the outputs may move although the cut is exact.

    Args:
        inputs: as in `partition_zigs`.
        plan: the ZIGs to test; None: a random half of every axis.

    Returns:
        the largest difference of the outputs, relative to their size, computed in double: below 1e-9 if every group
            is zero-invariant.

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
        exact, _ = exact_outputs(model, forwards)
    with zeroed(model, cut, noise=True):
        exact_with_noise, _ = exact_outputs(model, forwards)
    return largest_difference(exact, exact_with_noise)


def cut_difference(model: nn.Module, cut: Cut, inputs: Inputs) -> tuple[float, float]:
    """How far the cut model is from the zeroed full one, computed in double, and the tolerance of this distance."""
    forwards = as_forwards(inputs)
    with zeroed(model, cut):
        exact, _ = exact_outputs(model, forwards)
    exact_of_cut, tolerance = _cut_outputs(model, cut, forwards)
    return largest_difference(exact, exact_of_cut), tolerance


def outputs_differ(model: nn.Module, other: nn.Module, inputs: Inputs) -> tuple[float, float]:
    """How far the outputs of two models are from each other, computed in double, and the tolerance of that."""
    forwards = as_forwards(inputs)
    outputs, tolerance = exact_outputs(model, forwards)
    other_outputs, _ = exact_outputs(other, forwards)
    return largest_difference(outputs, other_outputs), tolerance


def _cut_outputs(model: nn.Module, cut: Cut, forwards: Sequence[Forward]) -> tuple[list[torch.Tensor], float]:
    # Weights are scaled while they are widened: the certificate judges the cut, not how scaled weights are rounded.
    widening = None if model in ONLY_AS_THEY_ARE else _arithmetic(model)
    trial = TrialCut(model, cut, widening)
    with trial:
        return exact_outputs(model, forwards, trial.scales)


class _Kept(NamedTuple):
    """A slice of a weight as it was before it was written over."""

    weight: torch.Tensor
    dim: int
    index: torch.Tensor  # (k,), positions along `dim`
    before: torch.Tensor | None  # None: zeros, which need no memory


class _Overwritten:
    """Slices of weights that are written over, and how they were."""

    def __init__(self) -> None:
        self._generators: dict[torch.device, torch.Generator] = {}
        self._kept: list[_Kept] = []

    def write_(self, parameter: torch.Tensor, dim: int, index: np.ndarray, noise: bool) -> None:
        """Makes slices zero, or fills them with noise; slices that are zero already are not zeroed again."""
        weight = parameter.data  # through .data a graph that holds the weight for its backward stays whole
        where = torch.from_numpy(index).to(weight.device)
        before = weight.index_select(dim, where)
        was_zero = not before.any()
        if was_zero and not noise:
            return
        kept = _Kept(weight, dim, where, None if was_zero else before)
        self._kept.append(kept)  # before the write, which may be interrupted
        if noise:
            generator = self._generator_of(weight.device)
            values = torch.randn(before.shape, generator=generator, device=weight.device)
            weight.index_copy_(dim, where, values.to(weight))
        else:
            weight.index_fill_(dim, where, 0)

    def _generator_of(self, device: torch.device) -> torch.Generator:
        """A generator on the device of a weight, as a card draws noise faster than the CPU could send it there."""
        if device not in self._generators:
            generator = torch.Generator(device)
            self._generators[device] = generator.manual_seed(0)  # the same noise in every certificate
        return self._generators[device]

    def put_back_(self) -> None:
        """Makes the slices what they were."""
        with uninterrupted():
            # the last write first, as slices may overlap
            for weight, dim, index, before in reversed(self._kept):
                if before is None:
                    weight.index_fill_(dim, index, 0)
                else:
                    weight.index_copy_(dim, index, before)


@contextlib.contextmanager
def zeroed(model: nn.Module, cut: Cut, noise: bool = False, producers_too: bool = True) -> Iterator[None]:
    """While open, what the cut removes is zero in the weights and, if `noise`, the other side is filled at random.

    Args:
        producers_too: whether producers are filled with noise, too, on axes whose consumers have to be zero.
    """
    slices = []
    for axis, member, index in cut.partition.slices(cut.removed):
        if member.role != "statistic":  # those belong to neither side
            slices.append((axis, member, index))
    tensors = cut.partition.tensors(model)
    overwritten = _Overwritten()
    try:
        if noise:
            for axis, member, index in slices:
                if is_free(axis, member, producers_too):
                    overwritten.write_(tensors[member.param], member.dim, index, noise=True)
        # Zeros are written last, so that they win where a tensor is on both sides.
        for axis, member, index in slices:
            has_noise = noise and is_free(axis, member, producers_too)
            if member in axis.group and not has_noise:
                overwritten.write_(tensors[member.param], member.dim, index, noise=False)
        yield
    finally:
        overwritten.put_back_()


def is_free(axis: PrunableAxis, member: Member, producers_too: bool) -> bool:
    """Whether a slice may hold anything, since the other side is zero."""
    if axis.zero_path or not producers_too:
        return member not in axis.group
    # without a zero path producers are free only if there are consumers, which are zero then
    has_consumers = any(each.role == "consumer" for each in axis.members)
    return member.role == "producer" and has_consumers


def own_outputs(model: nn.Module, forwards: Sequence[Forward]) -> list[torch.Tensor]:
    """The floating-point outputs of all calls in eval mode; every time the forwards draw the same random numbers."""
    with evaluating(model), WeightsKept(model):
        experts_at_once_(model)
        return _outputs(model, forwards)


def exact_outputs(
    model: nn.Module, forwards: Sequence[Forward], scales: Mapping[int, tuple[float, float]] | None = None
) -> tuple[list[torch.Tensor], float]:
    """`own_outputs` with every operation computed in double (on devices without it in float32), and their tolerance.

    Args:
        scales: of weights that are still to be scaled, see `WideArithmetic`.
    """
    if model in ONLY_AS_THEY_ARE:
        dtypes = {torch.float32}  # a forward may compute in float32, whatever the dtypes of its weights
        dtypes.update(weight.dtype for weight in model.parameters() if weight.is_floating_point())
        tolerance = max(_tolerance(dtype) for dtype in dtypes)
        return own_outputs(model, forwards), tolerance
    wide = WideArithmetic(_arithmetic(model), scales)
    with evaluating(model), WeightsKept(model):
        experts_at_once_(model)
        with wide:
            outputs = _outputs(model, forwards)
    if wide.narrow:
        logger.info("computed in what these operations know: %s", wide.narrow)
    tolerance = max(_tolerance(dtype) for dtype in [wide.dtype, *wide.narrow.values()])
    return outputs, tolerance


def _arithmetic(model: nn.Module) -> torch.dtype:
    """The widest dtype that every device of the model computes in."""
    devices = {parameter.device for parameter in model.parameters()} or {torch.device("cpu")}
    if all(wide_dtype(device) == torch.float64 for device in devices):
        return torch.float64
    return torch.float32


def _tolerance(dtype: torch.dtype) -> float:
    """Up to which difference outputs count as equal that were computed in a dtype."""
    if dtype == torch.float64:
        return TOLERANCE
    return TOLERANCE_OF_FLOAT32 * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps


def _outputs(model: nn.Module, forwards: Sequence[Forward]) -> list[torch.Tensor]:
    seed_everything()
    outputs = []
    for forward in forwards:
        for tensor in tensors_of(forward.run(model)):
            if has_numbers(tensor):
                outputs += _kept(tensor.detach())  # a forward may have asked for gradients
    return outputs


# Entries of an output that are kept. Logits of long texts and a large vocabulary are larger than a layer, and they are
# needed in double and several times: before and after a cut, with and without noise.
MOST_ENTRIES = 2**26


def _kept(output: torch.Tensor) -> list[torch.Tensor]:
    """What is kept of an output to be compared: all of it or, if it is very large, some rows, and its sizes.

    The rows (along the last dimension; of logits each is a token's) are drawn at random, the same ones every time.
    What is cut is the same for all tokens, so that a wrong cut shows in every row that depends on it.
    """
    if output.numel() <= MOST_ENTRIES or output.dim() < 2 or output.layout != torch.strided:
        return [output]
    rows = output.reshape(-1, output.shape[-1])
    num_kept = max(1, MOST_ENTRIES // rows.shape[1])
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(rows), generator=generator, device="cpu")
    kept = rows.index_select(0, order[:num_kept].to(rows.device))
    return [kept, torch.tensor(output.shape, device="cpu")]


def refuse_random(model: nn.Module, inputs: Inputs) -> None:
    """Refuses a model that can't be certified, because its outputs differ from run to run, or are not numbers.

    A model whose forward fails in double is noted in `ONLY_AS_THEY_ARE`.

    Raises:
        OTOError: the outputs differ, are not numbers, or there are none.
    """
    forwards = as_forwards(inputs)
    name = type(model).__name__
    try:
        first, tolerance = exact_outputs(model, forwards)
        again, _ = exact_outputs(model, forwards)
    except Exception as error:
        raise_if_out_of_memory(error)
        if model in ONLY_AS_THEY_ARE:
            calls = described(forwards)
            kind = type(error).__name__
            raise OTOError(f"{name}, with nothing cut out, fails on {calls}: {kind}: {error}") from error
        logger.warning(
            "%s does not compute in double (%s: %s): it is certified in its own dtype, more coarsely",
            name, type(error).__name__, error,
        )  # fmt: skip
        ONLY_AS_THEY_ARE.add(model)
        refuse_random(model, inputs)
        return
    if not first:
        raise OTOError(f"{name} returns no floating-point tensor (logits, say): nothing can be certified of it")
    difference = largest_difference(first, again)
    if math.isnan(difference):
        raise OTOError(f"no output of {name} is a finite number (NaN or infinity): nothing can be certified of it")
    if difference > tolerance:
        raise OTOError(
            f"{name} gives other outputs on the same batch, by {difference:.1e}, though torch, numpy and Python draw "
            "the same random numbers: let it draw from these in eval mode, or nothing that is cut out can be certified"
        )
