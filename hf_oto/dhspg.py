"""DHSPG: the base optimizer's own step, then one correction per zero-invariant group (ZIG).

Training splits the ZIGs into redundant and important ones and drives the redundant ones to exact zero, while the rest
trains on as usual (dual half-space projected gradient; OTOv2, arXiv 2303.06862, Sec. 3.2). When something happens is
in schedule.py, how important ZIGs are in salience.py, which ones go in choice.py, what is done to them in
zig_optimizer.py; the paper's own rule is in paper.py.

Worked example: 8 ZIGs, of which half are to be zero after events at steps 6 and 10. Up to step 6 only the base
optimizer moves the weights, and the salience of all ZIGs is sampled. After step 6 the 4 least salient ZIGs are
chosen. After step 8 they are halved, after step 10 they are zero and stay zero, and the other 4 train on.

DHSPG deviates from the paper's rule in three respects.

- The salience is <x, gradient>^2, averaged over several batches (an EMA), not cosine and magnitude of one batch. Along
  an axis whose scale changes nothing, because a norm reads it, the salience grows with what is gone of the axis
  (`choice.weigh_survivors`).
- The redundant ZIGs are chosen at several events, ever more of them on a cubic schedule, and every axis keeps a floor.
- Between events they are shrunk linearly to zero, in a few steps, instead of by a penalty. The half-space projection,
  which would need a copy of the weights in each of these steps, never made a ZIG zero before that and is left out.
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
from .targets import FRACTIONS_REMOVED, Budget, budget_of, counts_exactly, limits_of, the_target
from .zig_optimizer import ZIGOptimizer
from .zigs import PrunableAxis, ZIGPartition

logger = logging.getLogger(__name__)

EMA = 0.9  # weight of the salience so far when that of another batch is added


class DHSPG(ZIGOptimizer):
    """Trains like `base` and brings a given fraction of the ZIGs to exact zero, whatever the learning rate.

    OTOv2's own rule, from which this one deviates, is `hf_oto.paper.PaperDHSPG`.

    The base optimizer is kept as `optimizer.base`; `param_groups`, `state` and `defaults` are its own, so that
    schedulers, scalers, accelerate and checkpoints treat this optimizer as they treat that one.

    Across processes, all of which take every step, parameters may be plain tensors (DDP) or the DTensors of FSDP2 and
    HSDP, also mixed; sharding may come before or after the optimizer is made. Each rank sums over the rows it holds,
    one all-reduce adds that up, and the choice of the first rank counts. No parameter is ever gathered.

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
        target_per_axis: instead, fractions of the ZIGs of each axis, {regular expression: target}; an axis has the
            first whose pattern matches its name somewhere, and else stays whole.
        params: parameter groups; None: all that require gradients.
        window: fractions of the run at which pruning starts and ends. None: (0.1, 0.6), or where at most a fifth is
            left (0.1, 0.25), up to 0.6 in a run too short for that: there what stays needs the time.
        num_events: choices in the window; None: 8, or 16 where at most a fifth is left.
        min_keep: fraction of every axis, in [0, 1), at least one ZIG, that always stays.
        group_divisible: the width that is left of every axis, in channels or units, is a multiple of this; an axis
            that can't lose so many stays whole. None: 8 for widths from 64 on, as kernels like it (only a number of
            ZIGs, met exactly, may leave one axis out of step).
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
        window: tuple[float, float] | None = None,
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

        axes = _trained_axes(partition, self.parameters_by_name())
        removes = target.kind in FRACTIONS_REMOVED
        nothing_to_do = target.value in ({}, 0) if removes else target.value == 1
        if not axes and not nothing_to_do:
            raise ValueError("the partition has no prunable ZIG that is trained: print(partition) says why")
        self.limits = limits_of(axes, target, min_keep, group_divisible, tied)
        exact = counts_exactly(target, group_divisible, tied)
        self.budget = budget_of(target, self.limits, axes, partition, partition.params(model), exact, min_keep)
        self.schedule = self._scheduled(total_steps, window, num_events)
        self._salience = salience
        self._elements = elements_of_zig(axes, self.parameters_by_name())
        self._take_zigs(axes, process_group)
        events = ", ".join(map(str, self.schedule.events)) or "no step"
        self._begin(
            salience=torch.zeros(self.num_zigs, dtype=torch.float32, device="cpu"),
            salience_of_axes=torch.zeros(len(axes), dtype=torch.float32, device="cpu"),
            # axes whose gradients were seen since the last choice
            sampled=torch.zeros(len(axes), dtype=torch.uint8, device="cpu"),
            partition=_fingerprint(axes),
            run=f"{target.kind}={target.value}, events at {events}",
        )

    def _scheduled(self, total_steps: int, window: tuple[float, float] | None, num_events: int | None) -> Schedule:
        dense = self.budget.dense
        if self.budget.goal >= dense:
            return Schedule()
        return Schedule.over(total_steps, self.budget.goal / dense, window, num_events)

    # state ------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the base optimizer's state. ZIGs are known by their numbers: the state must be of the same partition.

        Another target or window is taken over, with a warning, if the run can still reach it.

        Raises:
            OTOError: the state isn't DHSPG's, is of another partition, or of a run that can't become this one.
        """
        saved = state_dict["param_groups"][0]
        own = dict(self._own)
        if "dhspg_step" not in saved:
            raise OTOError("this optimizer state is not DHSPG's: resume from a checkpoint of hf_oto, or begin anew")
        if saved["partition"] != own["partition"]:
            raise OTOError(
                "this optimizer state was saved with another partition, of other ZIGs: resume with the same model and "
                "the same `protect` (and the same frozen parameters), or begin a new run"
            )
        if saved["run"] != own["run"]:
            zero = np.asarray(torch.as_tensor(saved["zero"]).cpu()) > 0
            _refuse_what_cannot_go_on(saved, own["run"], self._left(zero), self.budget, self.schedule)
            logger.warning("the run goes on with another plan: %s; so far: %s", own["run"], saved["run"])
        _refuse_other_shapes(state_dict, self.param_groups)
        self.base.load_state_dict(state_dict)
        self._own["run"] = own["run"]

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
        return self.budget.work.left(self.limits.count(zero))

    def left(self, partition: ZIGPartition, work: Work) -> float:
        """Fraction, in [0, 1], that a cut would now leave of `partition.work` (MACs) or `partition.params(model)`."""
        num_zero = dict(zip(self.axis_names, self.limits.count(self.zero.numpy()), strict=True))
        num_gone = []
        for axis in partition.axes:  # `PruningPlan.from_zeros` keeps one ZIG at least, and `compact` keeps a multiple
            num_kept = max(1, axis.size - num_zero.get(axis.name, 0))
            num_kept += -num_kept % axis.multiple
            num_gone.append(max(0, axis.size - num_kept))
        dense = work.left(np.zeros(len(num_gone)))
        return work.left(np.array(num_gone)) / (dense or 1)

    @property
    def phase(self) -> str:
        """Where the run is: "warm-up", "pruning", then "training the rest"; "training" if nothing is pruned."""
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
            self._scale(redundant, factor)
        if share is not None:
            redundant = self._choose(share)
        self._own["redundant"] = redundant.to(torch.uint8)

    def _sample(self) -> None:
        """Adds this batch to the EMAs of <x, gradient>^2 of every ZIG and of every axis as a whole."""
        axis_of = torch.from_numpy(self.limits.axis_of)
        if self._salience is None:
            (sums,) = self._sums(self._parts(inner))
            salience = sums**2
            sums_of_axes = torch.zeros(len(self.axis_names), dtype=torch.float64, device="cpu")
            salience_of_axes = sums_of_axes.index_add_(0, axis_of, sums.double()).square()
        else:
            sums = self._sums(self._parts(inner), self._parts(weight_squared), self._parts(gradient_squared))
            cost = torch.from_numpy(self.budget.cost_of_zig)[axis_of].float()
            salience = self._salience(Moments(*sums, self._elements[axis_of], cost)).float()
            # nobody knows what this says of a whole axis: infinity stands for one that is not under a norm
            salience_of_axes = torch.full((len(self.axis_names),), math.inf, device="cpu")
        seen = torch.tensor(self._seen_axes(), dtype=torch.bool, device="cpu")  # (axes,)
        own = self._own
        own["sampled"] = ((own["sampled"].cpu() > 0) | seen).to(torch.uint8)
        own["salience"] = _averaged(own["salience"].cpu(), salience, seen[axis_of])
        own["salience_of_axes"] = _averaged(own["salience_of_axes"].cpu(), salience_of_axes, seen)

    def _choose(self, share: float) -> Tensor:
        """The ZIGs to be made zero next. Those without a gradient since the last choice have no salience and stay."""
        own = self._own
        zero = self.made_zero.numpy()
        salience = own["salience"].cpu().double().numpy()
        salience_of_axes = own["salience_of_axes"].cpu().double().numpy()
        sampled = own["sampled"].cpu().numpy() > 0
        weighted = weigh_survivors(salience, salience_of_axes, zero, self.limits)
        chosen = choose(weighted, zero, sampled, share, self.limits, self.budget)
        own["sampled"] = torch.zeros_like(own["sampled"], device="cpu")
        return self._agreed(torch.from_numpy(chosen))


def _averaged(old: Tensor, new: Tensor, seen: Tensor) -> Tensor:
    """The EMA with another value where there is one, `seen`.

    It begins at 0 and is not corrected for that, which makes all values smaller by the same factor.
    """
    new = torch.nan_to_num(new, nan=math.inf, posinf=math.inf).float()
    return torch.where(seen, EMA * old + (1 - EMA) * new, old)


def _check_ranges(min_keep: float, group_divisible: int | None, num_events: int | None) -> None:
    if not 0 <= min_keep < 1:
        raise ValueError(f"min_keep is {min_keep}: it must be in [0, 1)")
    if group_divisible is not None and group_divisible < 1:
        raise ValueError(f"group_divisible is {group_divisible}: it must be at least 1")
    if num_events is not None and num_events < 1:
        raise ValueError(f"num_events is {num_events}: it must be at least 1")


def _refuse_settings(base_kwargs: Mapping[str, Any], **settings: Any) -> None:
    """Raises where settings are given beside a base that is an optimizer already."""
    given = [*base_kwargs, *(name for name, value in settings.items() if value is not None)]
    if given:
        raise ValueError(f"base is an optimizer already, with settings of its own: {given[0]} is not for DHSPG")


def _trained_axes(partition: ZIGPartition, params: Mapping[str, Tensor]) -> list[PrunableAxis]:
    """The axes all of whose parameters train."""
    trained = {name for name, p in params.items() if p.requires_grad}
    axes = [axis for axis in partition.axes if all(m.param in trained for m in axis.group)]
    frozen = [axis.name for axis in partition.axes if axis not in axes]
    if frozen:
        logger.warning(
            "%d axes are not pruned, because some of their parameters are frozen (the base of an adapter, say: "
            "merge it, or let it train): %s", len(frozen), ", ".join(frozen[:3] + ["..."] * (len(frozen) > 3)),
        )  # fmt: skip
    return axes


def _refuse_what_cannot_go_on(
    saved: Mapping[str, Any], run: str, left: float, budget: Budget, schedule: Schedule
) -> None:
    """Raises where the state of another run can't become one of this run.

    Args:
        saved: the state.
        run: this run in words.
        left: how much of the budget's work is left in the state.
    """
    step = int(saved["dhspg_step"])
    runs = f"this run: {run}; the state, of step {step}: {saved['run']}"
    cost_of_one_zig = budget.cost_of_zig.max(initial=0.0)
    may_miss = 0.0 if budget.exact else max(0.01 * budget.dense, cost_of_one_zig)
    if left < budget.goal - may_miss:
        raise OTOError(f"more ZIGs are zero in this optimizer state than the target asks for ({runs})")
    choices = schedule.events[:-1]
    if left > budget.goal and (not choices or step >= choices[-1]):
        raise OTOError(f"the target can't be reached any more, the steps at which ZIGs are chosen are over ({runs})")


def _refuse_other_shapes(state_dict: Mapping[str, Any], param_groups: Iterable[Mapping[str, Any]]) -> None:
    """Raises where a state is of smaller or larger weights: torch's fused steps would read past the ends of tensors.

    Averages over a dimension have the size 1 there. States of one dimension may be packed in any way.
    """
    for group, saved in zip(param_groups, state_dict["param_groups"], strict=False):
        for p, key in zip(group["params"], saved["params"], strict=False):
            for name, value in state_dict["state"].get(key, {}).items():
                if not isinstance(value, Tensor) or value.dim() != p.dim() or p.dim() < 2:
                    continue
                if any(size not in (1, size_of_p) for size, size_of_p in zip(value.shape, p.shape, strict=True)):
                    raise OTOError(
                        f"{name} in this optimizer state has shape {tuple(value.shape)}, and its parameter "
                        f"{tuple(p.shape)}: the model is not as it was when the state was saved"
                    )


def _described(param_groups: Iterable[Mapping[str, Any]]) -> str:
    """Sizes and learning rates of parameter groups: "12,448 at lr 0.01"."""
    groups = []
    for group in param_groups:
        size = sum(p.numel() for p in group["params"])
        # the rate of a base may be a tensor, or None where the base sets its own
        rate = "no lr" if group["lr"] is None else f"lr {float(group['lr']):g}"
        groups.append(f"{size:,} at {rate}")
    return ", ".join(groups)


def _fingerprint(axes: Sequence[PrunableAxis]) -> str:
    """What tells partitions apart: a digest of the names and sizes of the axes, in their order."""
    text = "\n".join(f"{axis.name} {axis.size}" for axis in axes)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
