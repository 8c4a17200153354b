"""Pruning without training: one call and a few batches make a trained model compact.

The salience of every ZIG is measured (sensitivity.py), `choice.choose` says which ZIGs go, as in training, and what is
left gets new weights by which it returns what the dense model does (compensation.py). All of this happens on a copy
that shares its parameters with the model. The model itself is changed at the very end, once the certificate holds.

Worked example: of Linear(3, 8), ReLU, Linear(8, 2) half of the MACs are to be left. The 4 least salient units go, the
second layer gets new weights for the other 4, and the model is cut as `compact` cuts it.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from .calibration import Batches, calls_of
from .calls import Forward, described, outermost_pretrained, raise_if_out_of_memory
from .certificate import certify
from .choice import choose, weigh_survivors
from .compaction import Compaction
from .compensation import Compensation
from .cut import Cut, TrialCut, kept_positions, scaled
from .evaluating import evaluating, random_states_kept
from .light_copy import light_copy, unshare_
from .modeling_oto import OTOError, named_tensors
from .output_error import output_error
from .partition import partition_zigs
from .reconstruction import reconstruct_
from .rehearsal import no_progress_bars, refuse_adapter
from .report import Report, measure
from .restore import contents, places, put_back, restored
from .sensitivity import SALIENCES, measured
from .targets import Budget, Limits, Target, budget_of, check_limits, counts_exactly, limits_of, the_target
from .uniform import Tie, find_ties, in_steps, plain
from .zigs import PruningPlan, ZIGPartition

logger = logging.getLogger(__name__)

BATCHES_OF_SALIENCE = 16  # more change little, and gradients take most of the time
FEWEST_TO_HOLD_OUT = 4  # of so many batches the last one is kept to tell how good the result is


def prune(
    model: nn.Module,
    batches: Batches,
    *,
    target_macs: float | None = None,
    target_params: float | None = None,
    target_group_sparsity: float | None = None,
    target_per_axis: Mapping[str, float] | None = None,
    salience: str = "outputs",
    rounds: int = 1,
    reconstruct: int = 0,
    protect: Sequence[str] = (),
    min_keep: float = 0.1,
    group_divisible: int | None = None,
    uniform: bool = False,
    batch_size: int = 16,
    max_batches: int = 64,
) -> tuple[nn.Module, Report]:
    """Makes a trained model compact without training, by a few batches.

    What is left gets new weights by ridge regression, from layer to layer, so that it returns what the dense model
    does (as GRAIL, arXiv 2602.23795, and Kwon et al., arXiv 2204.09656, do for single architectures). Labels are not
    needed. The model is changed in place, as by `compact`, and at the very end: it stays as it was if anything fails.
    Its parameters are new objects then, without gradients, so make optimizers after it.

    It takes the memory of a second, smaller model, of the largest layer's moments, and of one forward of all batches.

    Args:
        model: a trained model that `partition_zigs` takes.
        batches: what the model is run on: a batch as in `partition_zigs`, a list or a loader of such, or a dataset
            with the columns that forward takes. Some hundreds of examples, of the kind that the model will see. What
            can be pruned is found on the first batch.
        target_macs, target_params, target_group_sparsity, target_per_axis: how much is left or goes, as in
            `OTOTrainingArguments`; one of them, or half of the ZIGs go.
        salience: by what the ZIGs are chosen. "outputs": by gradients, with the model's own outputs as targets;
            "labels": with the labels in the batches; "activations": by variances, without gradients.
        rounds: in so many steps the target is reached. After each the weights are fitted, and the salience is
            measured anew. More rounds take several times as long. They help some convolutional networks.
        reconstruct: after that so many steps of AdamW make all weights imitate the dense model's outputs on these
            batches. It helps language models most.
        protect: as in `partition_zigs`.
        min_keep, group_divisible: as in `DHSPG`.
        uniform: whether the compact model has widths that its stock config can say.
        batch_size: rows of a dataset in a batch.
        max_batches: no more batches are read.

    Returns:
        the compact model, the same object (with `uniform`, a new one of the stock class), and a report. It has
        "before" and "after" (see `measure`), "group_sparsity", "max_output_difference" (of the zeroed and the compact
        model, see `OTOTrainer.report`), "plan", "fits" (how far the layer of each weight is from the dense one, as a
        fraction of the variance, without and with new weights) and "output_error": how far the outputs are from the
        dense model's, as a fraction of what these differ by between examples, of the logits or else of the first
        output. It is measured on the last batch, which of four or more batches is not fitted to
        ("output_error_is_held_out"), and None where nothing can be compared. All but "plan" goes into JSON.

    Raises:
        OTOError: the batches don't suit the model or the salience, or the certificate fails.
        ValueError: an argument out of range, or a target that is not feasible.

    Example:
        >>> layers = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> small, report = prune(layers, torch.randn(64, 3), target_macs=0.5)
        >>> small
        Sequential(
          (0): Linear(in_features=3, out_features=4, bias=True)
          (1): ReLU()
          (2): Linear(in_features=4, out_features=2, bias=True)
        )
    """
    _refuse_out_of_range(salience, rounds, reconstruct)
    check_limits(min_keep, group_divisible)
    target = the_target(
        {
            "target_macs": target_macs,
            "target_params": target_params,
            "target_group_sparsity": target_group_sparsity,
            "target_per_axis": target_per_axis,
        }
    )
    _refuse_no_model(model)
    with _undisturbed(model):
        forwards = calls_of(model, batches, batch_size, max_batches)
        examples = forwards[:1]  # on which everything is found and proven
        partition = partition_zigs(model, examples, protect)
        if not partition.axes:
            raise OTOError(f"{type(model).__name__} has no prunable ZIG:\n{partition}")
        _refuse_adapters(model)
        ties = None
        if uniform:
            ties = find_ties(model, partition, examples)
            partition = in_steps(partition, ties)
        limits, budget = _goal(model, partition, target, min_keep, group_divisible, ties)
        with _naming_bad_batches(model, forwards):
            pruned_copy = _PrunedCopy(model, partition, forwards)
            pruned_copy.prune_(limits, budget, salience, rounds, reconstruct)
            cut, new_weights, facts = pruned_copy.result()
        del pruned_copy  # its memory, but for the new weights
        report = _cut_for_good_(model, cut, new_weights, examples)
        report |= facts
        if ties is not None:
            model = _stock(model, partition, facts["plan"], ties, examples)
    return model, report


def _refuse_out_of_range(salience: str, rounds: int, reconstruct: int) -> None:
    if salience not in SALIENCES:
        raise ValueError(f"salience is {salience!r}: it must be one of {', '.join(SALIENCES)}")
    for name, value, least in (("rounds", rounds, 1), ("reconstruct", reconstruct, 0)):
        if type(value) is not int or value < least:
            raise ValueError(f"{name} is {value!r}: it must be a whole number, at least {least}")


def _refuse_no_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}, and must be a torch module (of a pipeline, its model)")
    if any(weight.is_meta for weight in model.parameters()):
        raise OTOError(f"{type(model).__name__} has weights on the meta device: load them, to prune without training")


def _refuse_adapters(model: nn.Module) -> None:
    """Raises OTOError where the model would save only a part of its weights, as adapters on a frozen base do."""
    if all(parameter.requires_grad for parameter in model.parameters()) or not hasattr(model, "save_pretrained"):
        return
    # saving writes into the config
    with tempfile.TemporaryDirectory() as folder, no_progress_bars(), restored(model):
        model.save_pretrained(folder)
        refuse_adapter(model, folder)


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """While open, autocast and inference mode are off; at the end the random states are as before."""
    devices = {weight.device.type for weight in model.parameters()}
    with contextlib.ExitStack() as stack:
        stack.enter_context(random_states_kept(model))
        # in inference mode nothing has gradients, and new weights could never be trained
        stack.enter_context(torch.inference_mode(False))
        for device in devices:
            # in autocast weights are copies, of which nobody knows whose they are
            if torch.amp.is_autocast_available(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextlib.contextmanager
def _naming_bad_batches(model: nn.Module, forwards: Sequence[Forward]) -> Iterator[None]:
    """Raises OTOError in the place of another error if the model itself can't run a batch."""
    try:
        yield
    except OTOError:
        raise
    except Exception as error:
        raise_if_out_of_memory(error)
        for number, forward in enumerate(forwards):
            try:
                with evaluating(model):
                    forward.run(model)
            except Exception as of_batch:
                name = type(model).__name__
                raise OTOError(
                    f"{name} can't take batch {number}, {described([forward])}: {type(of_batch).__name__}: {of_batch}"
                ) from of_batch
        raise


def _goal(
    model: nn.Module,
    partition: ZIGPartition,
    target: Target,
    min_keep: float,
    group_divisible: int | None,
    ties: Sequence[Tie] | None,
) -> tuple[Limits, Budget]:
    """How many ZIGs of every axis may go, and how much goes in all."""
    tied_axes = None if ties is None else [tie.axes for tie in ties]
    limits = limits_of(partition.axes, target, min_keep, group_divisible, tied_axes)
    is_exact = counts_exactly(target, group_divisible, tied_axes)
    num_params = partition.params(model)
    budget = budget_of(target, limits, partition.axes, partition, num_params, is_exact, min_keep)
    return limits, budget


class _PrunedCopy:
    """The copy on which everything is tried."""

    def __init__(self, model: nn.Module, partition: ZIGPartition, forwards: Sequence[Forward]) -> None:
        self._model = model
        has_many = len(forwards) >= FEWEST_TO_HOLD_OUT
        self._held_out = forwards[-1:] if has_many else []
        self._forwards = forwards[:-1] if has_many else forwards
        self._small = light_copy(model)
        self._compaction = Compaction(self._small, partition)
        self._compensation = Compensation(model, self._small, self._forwards)
        self._changed = set(self._compensation.changed)

    def prune_(self, limits: Limits, budget: Budget, salience: str, rounds: int, reconstruct: int) -> None:
        """Cuts the copy, and gives it new weights; see `prune` for the arguments."""
        num_steps = rounds * len(self._compensation.weights) + reconstruct
        with transformers_logging.tqdm(total=num_steps, desc="pruning") as bar:
            for number in range(1, rounds + 1):
                self._cut_(limits, budget, salience, number / rounds)
                self._compensation.fit_(self._compaction.whole_cut(), bar.update)
            if reconstruct:
                self._changed |= dict(self._small.named_parameters()).keys()
                unshare_(self._small, self._model, self._changed)
                reconstruct_(self._small, self._model, self._forwards, reconstruct, bar.update)

    def _cut_(self, limits: Limits, budget: Budget, kind: str, share: float) -> None:
        """Cuts out the least salient ZIGs that are left, up to a share of the way to the goal."""
        gone = self._compaction.gone  # (num_zigs,), those of earlier rounds
        forwards = self._forwards[:BATCHES_OF_SALIENCE]
        of_zigs_left, of_axes = measured(self._small, self._compaction.left, forwards, kind)
        salience = np.zeros(len(gone))
        # what nobody knows the salience of goes last
        salience[~gone] = np.nan_to_num(of_zigs_left, nan=np.inf)
        weighted = weigh_survivors(salience, of_axes, gone, limits)
        may_be_cut = np.ones(len(limits.sizes), bool)  # (axes,)
        chosen = choose(weighted, gone, may_be_cut, share, limits, budget)
        plan = PruningPlan.removing(chosen | gone, self._compaction.partition)
        self._compaction.keep_(self._small, self._compaction.resolve(plan))

    def result(self) -> tuple[Cut, dict[str, Tensor], dict[str, Any]]:
        """The cut, the weights that have changed, by name, and what the report says of both."""
        cut = self._compaction.whole_cut()
        tensors = named_tensors(self._small)
        new_weights = {name: tensors[name] for name in self._changed}
        facts = {
            "plan": PruningPlan.removing(cut.removed, cut.partition),
            "fits": {name: (fit.error_before, fit.error) for name, fit in self._compensation.fits.items()},
            "output_error": output_error(self._model, self._small, self._held_out or self._forwards[:4]),
            "output_error_is_held_out": bool(self._held_out),
        }
        return cut, new_weights, facts


def _cut_for_good_(model: nn.Module, cut: Cut, weights: Mapping[str, Tensor], examples: Sequence[Forward]) -> Report:
    """Gives the model new weights and cuts it, in place; if anything fails, the model is as it was.

    Args:
        weights: the new ones, as they are after the cut, by name.

    Raises:
        OTOError: the certificate fails.
    """
    before = contents(model)
    classes = {part: type(part) for part in outermost_pretrained(model).values()}
    try:
        _put_(model, cut, weights)
        certificate = certify(model, cut, examples)
        if not certificate.holds:
            raise OTOError(f"the certificate failed: {certificate}, so the model was not cut")
        dense, compact = measure(model, TrialCut(model, cut), inputs=list(examples))
        Compaction(model, cut.partition).keep_(model, cut)
    except BaseException:
        put_back(before)
        for part, cls in classes.items():
            part.__class__ = cls
        raise
    return Report(
        before=dense,
        after=compact,
        group_sparsity=float(cut.removed.mean()),
        max_output_difference=certificate.cut,
        max_output_difference_in_own_dtype=certificate.rounding,
        training_macs=None,
        metrics={"zeroed": {}, "compact": {}},
    )


def _put_(model: nn.Module, cut: Cut, weights: Mapping[str, Tensor]) -> None:
    """Puts weights of the cut model into the full one, as new tensors; what is cut out stays as it is."""
    positions = cut.positions
    tensors = named_tensors(model)
    places_of_id = places(model)
    for name, left in weights.items():
        old = tensors[name]
        if name in cut.scales:  # the cut will multiply it
            factor, offset = cut.scales[name]
            left = scaled(left.detach(), 1 / factor, offset)
        kept = []
        for dim, size in enumerate(old.shape):
            gone = positions.get(name, {}).get(dim, np.empty(0, int))
            kept.append(kept_positions(size, gone, old.device))
        new = old.detach().clone()
        # of a number there is nothing to be left out
        where = torch.meshgrid(*kept, indexing="ij") if kept else ...
        new[where] = left.detach()
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, old.requires_grad)
        for place in places_of_id[id(old)]:
            place.put(new)


def _stock(
    model: nn.Module, partition: ZIGPartition, plan: PruningPlan, ties: Sequence[Tie], examples: Sequence[Forward]
) -> nn.Module:
    """The stock model with the widths and weights of a cut one, whose config says them."""
    stock = plain(model, partition, plan, ties, examples)
    if stock is None:
        logger.warning(
            "no stock config says these widths, so the compact model is saved with a record of them; "
            "with another group_divisible, or a width in protect, there may be one"
        )
        return model
    return stock
