"""DHSPG: the base optimizer's own step, then one correction per zero-invariant group (ZIG).

Training splits the ZIGs into redundant and important ones and drives the redundant ones to exact zero, while the
important ones train on as usual (dual half-space projected gradient; OTOv2, arXiv 2303.06862, Sec. 3.2). schedule.py
says at which steps something happens, salience.py how important ZIGs are, choice.py which of them go, and
zig_optimizer.py changes them. The paper's own rule is in paper.py.

Worked example: 8 ZIGs, of which half are to be zero after events at steps 6 and 10. Up to step 6 only the base
optimizer moves the weights, and the salience of all ZIGs is sampled. After step 6 the 4 least salient ZIGs are
chosen. After step 8 they are halved, after step 10 they are zero and stay zero, and the other 4 train on.

DHSPG deviates from the paper's rule in three respects.

- The salience is <x, gradient>^2, averaged over several batches (an EMA), not cosine and magnitude of one batch. Under
  a norm, which undoes a factor common to all ZIGs, and on a bottleneck it underrates the last ones that are left:
  there it is multiplied by a number that grows with the ZIGs that are gone (`choice.weigh_survivors`).
- The redundant ZIGs are chosen at several events, ever more of them on a cubic schedule, and every axis keeps a floor.
- Between events the redundant ZIGs are shrunk linearly to zero, in a few steps, instead of by a penalty. The
  half-space projection is left out: it would need a copy of the weights in each of these steps, and it never made a
  ZIG zero before the shrinking did.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .choice import choose, weigh_survivors
from .composed import made
from .cost import Work
from .modeling_oto import OTOError
from .salience import Moments, elements_of_zig, gradient_squared, inner, weight_squared
from .schedule import Schedule
from .targets import FRACTIONS_REMOVED, Budget, Target, budget_of, check_limits, counts_exactly, limits_of, the_target
from .zig_optimizer import ZIGOptimizer
from .zigs import PrunableAxis, ZIGPartition

logger = logging.getLogger(__name__)

State = Mapping[str, Any]  # a parameter group, with what changes during a run
Window = tuple[float, float]
EMA = 0.9  # weight of the salience so far when that of another batch is added


class DHSPG(ZIGOptimizer):
    """Trains like `base` and brings a given fraction of the ZIGs to exact zero, whatever the learning rate.

    OTOv2's own rule, from which this one deviates, is `hf_oto.paper.PaperDHSPG`.

    The base optimizer is kept as `optimizer.base`. This optimizer has the same `param_groups`, `state` and `defaults`,
    so that schedulers, scalers, accelerate and checkpoints treat both alike.

    In a distributed run all processes take every step. Parameters may be plain tensors (DDP) or the DTensors of FSDP2
    and HSDP, also mixed, and may be sharded before or after the optimizer is made. Each rank sums over its rows, one
    all-reduce adds the sums up, and all ranks follow the choice of the first one. No parameter is ever gathered.

    Args:
        model: the model that `partition` was made for.
        partition: its ZIGs. Axes with a parameter that is frozen, or not in the optimizer, are left alone.
        base: any `torch.optim.Optimizer` class; its step is not rewritten. Or an instance of one, made for parameters
            of this model, with whatever groups and settings it has: `lr`, `params` and `base_kwargs` are then its own.
        lr: learning rate, as in `base`; None: 1e-3.
        target_group_sparsity: fraction of ZIGs that are zero in the end, in [0, 1): exactly round(target * ZIGs);
            None: 0.5, unless one of the other targets is given.
        total_steps: optimizer steps of the whole run.
        target_params, target_macs: instead, the fraction of the parameters of the whole model, or of the
            multiply-accumulates of the traced forward, that is left in the end, in (0, 1]: within 1 % absolute, or one
            ZIG, where that is more.
        target_per_axis: instead, fractions of the ZIGs of each axis, {regular expression: target}. The first pattern
            that matches somewhere in the name of an axis counts; an axis that none matches stays whole.
        params: parameter groups; None: all that require gradients.
        window: fractions of the run at which pruning starts and ends. None: (0.1, 0.6). Where at most a fifth is left,
            what stays needs more time: (0.1, 0.25), with an end of up to 0.6 in a run too short for that.
        num_events: choices in the window; None: 8, or 16 where at most a fifth is left.
        min_keep: fraction of every axis, in [0, 1), at least one ZIG, that always stays.
        group_divisible: the width that is left of every axis, in channels or units, is a multiple of this; an axis
            that can't lose so many stays whole. None: 8 for widths from 64 on, with which kernels are fast (but one
            axis may have another width where a number of ZIGs is to be met exactly).
        tied: names of axes that keep equal fractions, as a stock config has it; all others stay whole. A number of
            ZIGs is then reached, but not exactly.
        salience: how important every ZIG is, (num_zigs,), by the `Moments` of one batch; averaged over batches and
            divided by the cost of a ZIG. None: <x, gradient>^2.
        process_group: the ranks that hold the same plain parameters and take every step together. None: all; give a
            smaller one (`dist.new_group([rank])`) where a rank trains alone. DTensors know theirs.
        base_kwargs: for `base`.

    Raises:
        ValueError: an argument out of range, two targets, one that the floors make infeasible, too few steps, no ZIG.
        OTOError: the model isn't the one the partition was made for, or `base` trains other parameters.

    Example:
        >>> from hf_oto import partition_zigs
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> partition = partition_zigs(model, {"input": torch.ones(1, 3)})
        >>> optimizer = DHSPG(model, partition, torch.optim.SGD, lr=0.1, momentum=0.9, total_steps=40)
        >>> for _ in range(40):
        ...     loss = model(torch.randn(4, 3)).square().mean()
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> optimizer.group_sparsity
        0.5
    """

    def __init__(
        self,
        model: torch.nn.Module,
        partition: ZIGPartition,
        base: type[torch.optim.Optimizer] | torch.optim.Optimizer = torch.optim.AdamW,
        lr: float | None = None,
        target_group_sparsity: float | None = None,
        total_steps: int = 0,
        target_params: float | None = None,
        target_macs: float | None = None,
        target_per_axis: Mapping[str, float] | None = None,
        params: Iterable[dict[str, Any]] | None = None,
        window: Window | None = None,
        num_events: int | None = None,
        min_keep: float = 0.1,
        group_divisible: int | None = None,
        tied: Sequence[Sequence[str]] | None = None,
        salience: Callable[[Moments], Tensor] | None = None,
        process_group: dist.ProcessGroup | None = None,
        **base_kwargs: Any,
    ) -> None:
        targets = {
            "target_group_sparsity": target_group_sparsity,
            "target_params": target_params,
            "target_macs": target_macs,
            "target_per_axis": target_per_axis,
        }
        target = the_target(targets)
        _check_ranges(min_keep, group_divisible, num_events)
        partition.tensors(model)  # raises where the model is another one
        if not isinstance(base, torch.optim.Optimizer):
            base = made(base, model, lr, params, base_kwargs)
        else:
            _refuse_settings(base_kwargs, lr=lr, params=params)
        self._put_around(base, model)

        axes = _trained_axes(partition, self.parameters_by_name(), target)
        self.limits = limits_of(axes, target, min_keep, group_divisible, tied)
        exact = counts_exactly(target, group_divisible, tied)
        num_params = partition.params(model)
        self.budget = budget_of(target, self.limits, axes, partition, num_params, exact, min_keep)
        self.schedule = self._scheduled(total_steps, window, num_events)
        self._salience = salience
        self._elements = elements_of_zig(axes, self.parameters_by_name())
        self._take_zigs(axes, process_group)
        self.fingerprint = _fingerprint(axes)
        events = ", ".join(map(str, self.schedule.events)) or "no step"
        self._begin(
            salience=torch.zeros(self.num_zigs, dtype=torch.float32, device="cpu"),  # an EMA
            salience_of_axes=torch.zeros(len(axes), dtype=torch.float32, device="cpu"),
            # axes whose gradients were seen since the last choice
            sampled=torch.zeros(len(axes), dtype=torch.uint8, device="cpu"),
            partition=self.fingerprint,
            run=f"{target.kind}={target.value}, events at {events}",
        )

    def _scheduled(self, total_steps: int, window: Window | None, num_events: int | None) -> Schedule:
        budget = self.budget
        if budget.goal >= budget.dense:  # nothing is to go, and the run may have no step
            return Schedule()
        fraction_left = budget.goal / budget.dense
        return Schedule.over(total_steps, fraction_left, window, num_events)

    # state ------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the base optimizer's state. The state must be of the same partition: ZIGs are known by their numbers.

        A state with another target or window is taken, with a warning, if this run can still reach its own target.

        Raises:
            OTOError: the state isn't DHSPG's, is of another partition, or of a run that can't become this one.
        """
        saved = state_dict["param_groups"][0]
        own = dict(self._own)
        _refuse_other_partition(saved, own)
        _refuse_other_cuts(saved, own)
        run = own["run"]
        if saved["run"] != run:
            zero = torch.stack([saved["zero"], saved["redundant"]]).cpu().amax(0) > 0  # the latter will be zero, too
            left = self._left(zero.numpy())
            _refuse_what_cannot_go_on(saved, run, left, self.budget, self.schedule)
            logger.warning("the run goes on with another plan: %s; so far: %s", run, saved["run"])
        super().load_state_dict(state_dict)
        self._own["run"] = run

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__} around {type(self.base).__name__} (parameters: {_described(self.param_groups)})\n"
            f"    {self.num_zigs:,} ZIGs on {len(self.axis_names)} axes, {self.group_sparsity:.3f} of them zero\n"
            f"    step {self._own['dhspg_step']}, {self.phase}; {self._own['run']}"
        )

    # where the run is -------------------------------------------------------------------------

    @property
    def target_reached(self) -> bool:
        """Whether as many ZIGs are zero as the target asks for."""
        return self.reaches_target(self.zero)

    def reaches_target(self, zero: Tensor) -> bool:
        """Whether the target would be reached with these zeros, bool (num_zigs,)."""
        return self._left(zero.numpy()) <= self.budget.goal

    def _left(self, zero: np.ndarray) -> float:
        """How much of the budget's work is left without these ZIGs, bool (num_zigs,)."""
        num_zero = self.limits.count(zero)  # (axes,)
        return self.budget.work.left(num_zero)

    def left(self, partition: ZIGPartition, work: Work) -> float:
        """Fraction, in [0, 1], that a cut would now leave of `partition.work` (MACs) or `partition.params(model)`."""
        counts = self.limits.count(self.zero.numpy())  # (axes,)
        num_zero = dict(zip(self.axis_names, counts, strict=True))
        num_gone = [_num_removable(axis, num_zero.get(axis.name, 0)) for axis in partition.axes]
        dense = work.left(np.zeros(len(num_gone)))
        left = work.left(np.array(num_gone))
        return left / (dense or 1)

    @property
    def phase(self) -> str:
        """The phase of the run: "warm-up", "pruning", then "training the rest"; "training" if nothing is pruned."""
        now = self._own["dhspg_step"]
        events = self.schedule.events
        if not events:
            return "training"
        if now < events[0]:
            return "warm-up"
        return "training the rest" if self._has_pruned(now) else "pruning"

    def _has_pruned(self, now: int) -> bool:
        return now >= self.schedule.events[-1]

    # what happens before and after a step -----------------------------------------------------

    def _before_step(self, now: int) -> None:
        if now in self.schedule.sample_steps:
            self._sample()

    def _after_step(self, now: int) -> None:
        """Shrinks what is redundant, makes it zero when its time has come, and chooses what is redundant next."""
        factor = self.schedule.factors.get(now)
        share = self.schedule.share_chosen_at(now)
        if factor is None and share is None:
            return
        redundant = self._own["redundant"].cpu() > 0  # (num_zigs,)
        if factor == 0:  # the next event is here
            self._freeze(redundant)
            redundant = torch.zeros_like(redundant)
        elif factor is not None:
            self._multiply(redundant, factor)
        if share is not None:
            redundant = self._choose(share)
        self._own["redundant"] = redundant.to(torch.uint8)

    def _sample(self) -> None:
        """Adds this batch to the EMAs of <x, gradient>^2 of every ZIG and of every axis as a whole."""
        own = self._own
        axis_of = torch.from_numpy(self.limits.axis_of)  # (num_zigs,)
        seen = torch.tensor(self._seen_axes(), dtype=torch.bool, device="cpu")  # (axes,)
        if self._salience is None:
            (sums,) = self._sums(self._parts(inner))
            salience = sums**2
            salience_of_axes = _squared_sums(sums, axis_of, len(seen))
        else:
            moments = self._moments(axis_of)
            salience = self._salience(moments).float()
            # nobody knows what the user's salience says of a whole axis: infinity stands for one not under a norm
            salience_of_axes = torch.full_like(seen, math.inf, dtype=torch.float32)
        sampled = own["sampled"].cpu() > 0
        own["sampled"] = (sampled | seen).to(torch.uint8)
        own["salience"] = _averaged(own["salience"].cpu(), salience, seen[axis_of])
        own["salience_of_axes"] = _averaged(own["salience_of_axes"].cpu(), salience_of_axes, seen)

    def _moments(self, axis_of: Tensor) -> Moments:
        products = [self._parts(product) for product in (inner, weight_squared, gradient_squared)]
        sums = self._sums(*products)  # (3, num_zigs)
        cost_of_zig = torch.from_numpy(self.budget.cost_of_zig).float()  # (axes,)
        return Moments(*sums, self._elements[axis_of], cost_of_zig[axis_of])

    def _choose(self, share: float) -> Tensor:
        """The ZIGs that become zero next. An axis that had no gradient since the last choice loses none."""
        own = self._own
        zero = self.made_zero.numpy()
        salience = own["salience"].cpu().double().numpy()
        salience_of_axes = own["salience_of_axes"].cpu().double().numpy()
        sampled = own["sampled"].cpu().numpy() > 0
        weighted = weigh_survivors(salience, salience_of_axes, zero, self.limits)
        chosen = choose(weighted, zero, sampled, share, self.limits, self.budget)
        own["sampled"] = torch.zeros_like(own["sampled"], device="cpu")
        return self._agreed(torch.from_numpy(chosen))


def _squared_sums(sums: Tensor, axis_of: Tensor, num_axes: int) -> Tensor:
    """The square of the sum over all ZIGs of an axis, (axes,).

    Args:
        sums: <x, gradient> of every ZIG, (num_zigs,).
        axis_of: the axis of every ZIG, (num_zigs,).
    """
    # under a norm the sums of an axis cancel: in float32 little more than rounding would be left
    sums_of_axes = torch.zeros(num_axes, dtype=torch.float64, device="cpu")
    sums_of_axes.index_add_(0, axis_of, sums.double())
    return sums_of_axes.square()


def _averaged(old: Tensor, new: Tensor, seen: Tensor) -> Tensor:
    """The EMA after one more batch; an element that the batch says nothing of, as `seen` shows, stays as it was.

    The EMA begins at 0 and is not corrected for that, which makes all its values smaller by the same factor.
    """
    # a ZIG with such a gradient must not go because its salience can't be compared
    new = torch.nan_to_num(new, nan=math.inf, posinf=math.inf).float()
    averaged = EMA * old + (1 - EMA) * new
    return torch.where(seen, averaged, old)


def _num_removable(axis: PrunableAxis, num_zero: int) -> int:
    """How many ZIGs a cut removes of an axis of which some are zero."""
    # `PruningPlan.from_zeros` keeps one ZIG at least, and `compact` keeps a multiple
    num_kept = max(1, axis.size - num_zero)
    num_kept += -num_kept % axis.multiple
    return max(0, axis.size - num_kept)


def _asks_for_nothing(target: Target) -> bool:
    if target.kind in FRACTIONS_REMOVED:
        return target.value in ({}, 0)
    return target.value == 1


def _check_ranges(min_keep: float, group_divisible: int | None, num_events: int | None) -> None:
    check_limits(min_keep, group_divisible)
    if num_events is not None and num_events < 1:
        raise ValueError(f"num_events is {num_events}: it must be at least 1")


def _refuse_settings(base_kwargs: Mapping[str, Any], **settings: Any) -> None:
    """Raises where settings are given beside a base that is an optimizer already."""
    given = list(base_kwargs)
    given += [name for name, value in settings.items() if value is not None]
    if given:
        raise ValueError(f"base is an optimizer already, with settings of its own: {given[0]} is not for DHSPG")


def _trained_axes(partition: ZIGPartition, params: Mapping[str, Tensor], target: Target) -> list[PrunableAxis]:
    """The axes all of whose parameters train. It raises where there is none, but something to be pruned."""
    trained = {name for name, p in params.items() if p.requires_grad}
    axes = []
    frozen = []
    for axis in partition.axes:
        names = {member.param for member in axis.group}
        if names <= trained:
            axes.append(axis)
        else:
            frozen.append(axis.name)
    if frozen:
        first_names = frozen[:3]
        if len(frozen) > 3:
            first_names.append("...")
        logger.warning(
            "%d axes are not pruned, because some of their parameters are frozen (the base of an adapter, say: "
            "merge it, or let it train): %s",
            len(frozen),
            ", ".join(first_names),
        )
    if not axes and not _asks_for_nothing(target):
        raise ValueError("no prunable ZIG is trained: all are frozen (unfreeze some), pinned, or not in the optimizer")
    return axes


def _refuse_other_partition(saved: State, own: State) -> None:
    """Raises where a state isn't DHSPG's, or its ZIGs are others."""
    if "dhspg_step" not in saved:
        raise OTOError("this optimizer state is not DHSPG's: resume from a checkpoint of hf_oto, or begin anew")
    if saved["partition"] != own["partition"]:
        raise OTOError(
            "this optimizer state was saved with another partition, of other ZIGs: resume with the same model and "
            "the same `protect` (and the same frozen parameters), or begin a new run"
        )


def _refuse_other_cuts(saved: State, own: State) -> None:
    """Raises where a state has other shapes than the parameters, which torch doesn't notice."""
    gone_now = own["gone"].cpu()
    no_zig = torch.zeros_like(gone_now)
    gone_then = saved.get("gone", no_zig)  # older states have no such entry
    gone_then = torch.as_tensor(gone_then).cpu()
    if not torch.equal(gone_then, gone_now):
        num_then = int(gone_then.sum())
        num_now = int(gone_now.sum())
        raise OTOError(
            f"{num_then} ZIGs were cut out of the model of this optimizer state, and {num_now} out of this one: cut "
            "this model in the same way before the state is loaded, as `OTOTrainer` does"
        )


def _refuse_what_cannot_go_on(saved: State, run: str, left: float, budget: Budget, schedule: Schedule) -> None:
    """Raises where the state of another run can't become one of this run.

    Args:
        saved: the state.
        run: this run in words.
        left: how much of the budget's work is left with the zeros in the state.
    """
    step = int(saved["dhspg_step"])
    runs = f"this run: {run}; the state, of step {step}: {saved['run']}"
    cost_of_one_zig = budget.cost_of_zig.max(initial=0.0)
    # the promise of a target that isn't met exactly: within 1 %, or one ZIG
    may_miss = 0.0 if budget.exact else max(0.01 * budget.dense, cost_of_one_zig)
    if left < budget.goal - may_miss:
        raise OTOError(f"more ZIGs are zero in this optimizer state than the target asks for ({runs})")
    choices = schedule.events[:-1]
    has_chosen = not choices or step >= choices[-1]
    if left > budget.goal and has_chosen:
        raise OTOError(f"the target can't be reached any more, the steps at which ZIGs are chosen are over ({runs})")


def _described(param_groups: Iterable[State]) -> str:
    """Sizes and learning rates of parameter groups: "12,448 at lr 0.01"."""
    groups = []
    for group in param_groups:
        size = sum(p.numel() for p in group["params"])
        # the rate of a base may be a tensor, or None where the base sets its own
        lr = group["lr"]
        rate = "no lr" if lr is None else f"lr {float(lr):g}"
        groups.append(f"{size:,} at {rate}")
    return ", ".join(groups)


def _fingerprint(axes: Sequence[PrunableAxis]) -> str:
    """What tells partitions apart: a digest of the names and sizes of the axes, in their order."""
    lines = [f"{axis.name} {axis.size}" for axis in axes]
    text = "\n".join(lines)
    digest = hashlib.sha256(text.encode())
    return digest.hexdigest()[:16]
