"""DHSPG: the base optimizer's own step, then one correction per zero-invariant group (ZIG).

Training splits the ZIGs into redundant and important ones, drives the redundant to exact zero while the rest trains on
as usual (dual half-space projected gradient; OTOv2, arXiv 2303.06862, Sec. 3.2). When something happens is in
schedule.py, how important ZIGs are in salience.py, which go in choice.py, what a rank holds of them in slices.py, how
they stay zero in zeros.py; the paper's own rule is in paper.py.
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

from .choice import FRACTIONS_REMOVED, budget_of, choose, counts_exactly, limits_of, the_target, weigh_survivors
from .composed import AroundOptimizer, made
from .cost import Work
from .modeling_oto import OTOError
from .salience import Moments, elements_of_zig, gradient_squared, inner, parts, weight_squared
from .schedule import Schedule
from .slices import Part, agreed, local, on_this_rank, per_position, rows_of, slices_of, sum_over_zigs
from .zeros import HeldZeros
from .zigs import PrunableAxis, PruningPlan, ZIGPartition

logger = logging.getLogger(__name__)

EMA = 0.9


class DHSPG(AroundOptimizer):
    """Trains like `base` and brings a given fraction of the ZIGs to exact zero, whatever the learning rate.

    It deviates from the paper's rule, which is in `hf_oto.paper.PaperDHSPG`, in that

    - the salience is <x, gradient>^2, averaged over several batches (an EMA), not cosine and magnitude of one; on axes
      whose scale changes nothing, because a norm reads them, it grows with what is gone of the axis
      (`choice.weigh_survivors`);
    - the redundant groups are chosen at several events, ever more of them on a cubic schedule, and every axis keeps a
      floor;
    - between events they are shrunk linearly to zero, in a few steps, instead of by a penalty; the half-space
      projection, which would copy the weights at each of them, never comes before that and is left out.

    Once a group is zero, what reads it and the optimizer's state of both are zeroed too: its gradients are exactly
    zero from then on, and nothing needs a mask. What moves it nevertheless (noise on the gradients, a penalty on the
    distance to other weights, a momentum that can't be zeroed because it is quantised) is found in the same step, and
    from then on undone after every step: a ZIG that this optimizer calls zero is zero in the weights.

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
        target = the_target(
            {
                "target_group_sparsity": target_group_sparsity,
                "target_params": target_params,
                "target_macs": target_macs,
                "target_per_axis": target_per_axis,
            }
        )
        if not 0 <= min_keep < 1:
            raise ValueError(f"min_keep is {min_keep}: it must be in [0, 1)")
        if group_divisible is not None and group_divisible < 1:
            raise ValueError(f"group_divisible is {group_divisible}: it must be at least 1")
        if num_events is not None and num_events < 1:
            raise ValueError(f"num_events is {num_events}: it must be at least 1")
        partition.tensors(model)  # raises where the model is another one
        if not isinstance(base, torch.optim.Optimizer):
            base = made(base, model, lr, params, base_kwargs)
        elif lr is not None or params is not None or base_kwargs:
            given = [*base_kwargs, *(name for name, x in (("lr", lr), ("params", params)) if x is not None)]
            raise ValueError(f"base is an optimizer already, with settings of its own: {given[0]} is not for DHSPG")
        self._put_around(base, model)
        axes = self._trained_axes(partition)
        nothing_to_do = target.value in ({}, 0) if target.kind in FRACTIONS_REMOVED else target.value == 1
        if not axes and not nothing_to_do:
            raise ValueError("the partition has no prunable ZIG that is trained: print(partition) says why")
        self.limits = limits_of(axes, target, min_keep, group_divisible, tied)
        exact = counts_exactly(target, group_divisible, tied)
        self.budget = budget_of(target, self.limits, axes, partition, partition.params(model), exact, min_keep)
        self.schedule = self._scheduled(total_steps, window, num_events)
        self.axis_names = tuple(axis.name for axis in axes)
        self.num_zigs = int(self.limits.sizes.sum())
        self._salience = salience
        self._process_group = process_group
        self._elements = elements_of_zig(axes, self.parameters_by_name())
        self._params_of_axes = [{m.param for m in axis.group} for axis in axes]
        self._cut_into_slices(axes)
        # all that changes lives in the first group, in one structure from the start: it is what state_dict() saves.
        # On the CPU and in these dtypes, whatever torch's defaults are: the choice is made there
        self._own.update(
            dhspg_step=0,
            zero=torch.zeros(self.num_zigs, dtype=torch.uint8, device="cpu"),
            redundant=torch.zeros(self.num_zigs, dtype=torch.uint8, device="cpu"),
            salience=torch.zeros(self.num_zigs, dtype=torch.float32, device="cpu"),
            salience_of_axes=torch.zeros(len(axes), dtype=torch.float32, device="cpu"),
            # axes whose gradients were seen since the last choice
            sampled=torch.zeros(len(axes), dtype=torch.uint8, device="cpu"),
            partition=_fingerprint(axes),
            run=f"{target.kind}={target.value}, events at {', '.join(map(str, self.schedule.events)) or 'no step'}",
        )

    def _cut_into_slices(self, axes: Sequence[PrunableAxis]) -> None:
        """What is zero of a zero ZIG, and what reads it, which is zero too then, so that its gradients are."""
        trained = self.parameters_by_name()
        owners: dict[bytes, Tensor] = {}
        group, readers, unread = {}, {}, []
        for axis in axes:
            consumers = [m for m in axis.members if m.role == "consumer"]
            group[axis.name] = axis.group
            readers[axis.name] = [m for m in consumers if m.param in trained]
            # without a reader that is zeroed too, a zero group still gets gradients
            if not consumers or len(readers[axis.name]) < len(consumers):
                unread.append(axis)
        self._group = slices_of(axes, group, trained, owners)
        self._readers = slices_of(axes, readers, trained, owners)
        self.held = HeldZeros(self._group, [(m.param, m.dim) for axis in unread for m in axis.group])

    # state ------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The base optimizer's. What is zero is known by its number: the partition must be the one of the state.

        Another target or window is taken over, with a warning, if the run can still reach it.

        Raises:
            OTOError: the state isn't DHSPG's, is of another partition, or of a run that can't become this one.
        """
        saved, own = state_dict["param_groups"][0], dict(self._own)
        if "dhspg_step" not in saved:
            raise OTOError("this optimizer state is not DHSPG's: resume from a checkpoint of hf_oto, or begin anew")
        if saved["partition"] != own["partition"]:
            raise OTOError(
                "this optimizer state was saved with another partition, of other ZIGs: resume with the same model and "
                "the same `protect` (and the same frozen parameters), or begin a new run"
            )
        if saved["run"] != own["run"]:
            self._refuse_what_cannot_go_on(saved)
            logger.warning("the run goes on with another plan: %s; so far: %s", own["run"], saved["run"])
        self.base.load_state_dict(state_dict)
        self._own["run"] = own["run"]

    def _refuse_what_cannot_go_on(self, saved: Mapping[str, Any]) -> None:
        step, events = int(saved["dhspg_step"]), self.schedule.events
        plans = f"this run: {self._own['run']}; the state, of step {step}: {saved['run']}"
        zero = np.asarray(torch.as_tensor(saved["zero"]).cpu()) > 0
        left = self._left(zero)
        unit = self.budget.cost_of_zig.max(initial=0.0)  # a goal may be missed by one ZIG
        if left < self.budget.goal - max(0.01 * self.budget.dense, unit) or (
            self.budget.exact and left < self.budget.goal
        ):
            raise OTOError(f"more ZIGs are zero in this optimizer state than the target asks for ({plans})")
        if left > self.budget.goal and (len(events) < 2 or step >= events[-2]):
            raise OTOError(
                f"the target can't be reached any more, the steps at which ZIGs are chosen are over ({plans})"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Process groups can't be copied."""
        return super().__getstate__() | {"_process_group": None}

    def __repr__(self) -> str:
        # the rate of a base may be a tensor, or None where it sets its own
        rates = ["no lr" if g["lr"] is None else f"lr {float(g['lr']):g}" for g in self.param_groups]
        sizes = [sum(p.numel() for p in g["params"]) for g in self.param_groups]
        groups = ", ".join(f"{size:,} at {rate}" for size, rate in zip(sizes, rates, strict=True))
        return (
            f"{type(self).__name__} around {type(self.base).__name__} (parameters: {groups})\n"
            f"    {self.num_zigs:,} ZIGs on {len(self.axis_names)} axes, {self.group_sparsity:.3f} of them zero\n"
            f"    step {self._own['dhspg_step']}, {self.phase}; {self._own['run']}"
        )

    # what it knows ----------------------------------------------------------------------------

    @property
    def _own(self) -> dict[str, Any]:
        return self.param_groups[0]

    @property
    def zero(self) -> Tensor:
        """Which ZIGs are zero, bool (num_zigs,), on the CPU: this optimizer made them zero, and in the weights (of a
        sharded model: in those that this rank holds) they are."""
        return self.made_zero & ~self.held.moved(self._own["zero"], self.parameters_by_name())

    @property
    def made_zero(self) -> Tensor:
        """Which ZIGs this optimizer has made zero, bool (num_zigs,), whatever is in the weights now."""
        return self._own["zero"].cpu() > 0

    def zeros(self, partition: ZIGPartition) -> PruningPlan:
        """What this optimizer has made zero, whatever the weights say now, as a plan that removes it."""
        parts = np.split(self.made_zero.numpy(), np.cumsum(self.limits.sizes)[:-1])
        gone = dict(zip(self.axis_names, parts, strict=False))
        kept = {}
        for axis in partition.axes:
            if axis.name in gone and gone[axis.name].any():
                kept[axis.name] = np.flatnonzero(~gone[axis.name]).tolist() or [0]
        return PruningPlan(kept)

    @property
    def group_sparsity(self) -> float:
        """Fraction of the ZIGs that are exactly zero, in [0, 1]."""
        return float(self.zero.sum()) / max(1, self.num_zigs)

    @property
    def target_reached(self) -> bool:
        """Whether as many ZIGs are zero as the target asks for."""
        return self.reaches_target(self.zero)

    def reaches_target(self, zero: Tensor) -> bool:
        """Whether the target would be reached with these zeros, bool (num_zigs,)."""
        return self._left(zero.numpy()) <= self.budget.goal

    def _left(self, zero: np.ndarray) -> float:
        return self.budget.work.left(self.limits.count(zero))

    @property
    def phase(self) -> str:
        """Where the run is: "warm-up", "pruning", then "training the rest"; "training" if nothing is pruned."""
        now, events = self._own["dhspg_step"], self.schedule.events
        if not events:
            return "training"
        if now < events[0]:
            return "warm-up"
        return "training the rest" if self._has_pruned(now) else "pruning"

    def _has_pruned(self, now: int) -> bool:
        return now >= self.schedule.events[-1]

    def left(self, partition: ZIGPartition, work: Work) -> float:
        """Fraction, in [0, 1], that a cut would now leave of `partition.work` (MACs) or `partition.params(model)`."""
        zeros = dict(zip(self.axis_names, self.limits.count(self.zero.numpy()), strict=True))
        gone = []
        for axis in partition.axes:  # as `PruningPlan.from_zeros` and `compact` have it: one stays, and a multiple
            kept = max(1, axis.size - zeros.get(axis.name, 0))
            gone.append(max(0, axis.size - kept - -kept % axis.multiple))
        return work.left(np.array(gone)) / (work.left(np.zeros(len(gone))) or 1)

    @property
    def nbytes(self) -> int:
        """Memory, in bytes, of what it keeps beside the base optimizer: owners of positions, masks and salience."""
        kept = [s.owner for s in self._group + self._readers] + [t for t in self._own.values() if torch.is_tensor(t)]
        return sum(t.numel() * t.element_size() for t in {id(t): t for t in kept}.values()) + self.held.nbytes

    def _trained_axes(self, partition: ZIGPartition) -> list[PrunableAxis]:
        trained = {name for name, p in self.parameters_by_name().items() if p.requires_grad}
        axes = [axis for axis in partition.axes if all(m.param in trained for m in axis.group)]
        if left := [axis.name for axis in partition.axes if axis not in axes]:
            logger.warning(
                "%d axes are not pruned, because some of their parameters are frozen (the base of an adapter, say: "
                "merge it, or let it train): %s", len(left), ", ".join(left[:3] + ["..."] * (len(left) > 3)),
            )  # fmt: skip
        return axes

    def _scheduled(self, total_steps: int, window: tuple[float, float] | None, num_events: int | None) -> Schedule:
        dense = self.budget.dense
        if self.budget.goal >= dense:
            return Schedule()
        return Schedule.over(total_steps, self.budget.goal / dense, window, num_events)

    # a step -----------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the base optimizer, and the correction."""
        now = self._own["dhspg_step"] + 1
        if closure is None:
            self._before_step(now)
            loss = self.base.step()
        else:
            loss = self.base.step(self._watched(closure, now))
        self._after_step(now)
        self._own["dhspg_step"] = now
        self._hold_zeros(now)
        return loss

    def _hold_zeros(self, now: int) -> None:
        self.held.hold_(self._own["zero"], self.parameters_by_name(), now)

    def _watched(self, closure: Callable[[], Any], now: int) -> Callable[[], Any]:
        """The closure, after whose first call the gradients are those of the weights before the step."""
        calls = 0

        def watched() -> Any:
            nonlocal calls
            with torch.enable_grad():
                loss = closure()
            calls += 1
            if calls == 1:
                with torch.no_grad():
                    self._before_step(now)
            return loss

        return watched

    def _before_step(self, now: int) -> None:
        """What is read off weights and gradients before the base optimizer moves them."""
        if now in self.schedule.sample_steps:
            self._sample()

    def _after_step(self, now: int) -> None:
        """Shrinks what is redundant, makes it zero when its time has come, and chooses what is redundant next."""
        factor = self.schedule.factors.get(now)
        share = self.schedule.share_chosen_at(now)
        if factor is None and share is None:
            return
        redundant = self._own["redundant"].cpu() > 0
        if factor == 0:  # the next event is here
            self._freeze(redundant)
            redundant = torch.zeros_like(redundant)
        elif factor is not None:
            self._scale(redundant, factor)
        if share is not None:
            redundant = self._choose(share)
        self._own["redundant"] = redundant.to(torch.uint8)

    # salience and choice ----------------------------------------------------------------------

    def _sample(self) -> None:
        """EMAs of <x, gradient>^2 of every ZIG and of every axis as a whole."""
        axis_of = torch.from_numpy(self.limits.axis_of)
        if self._salience is None:
            (sums,) = self._sums(self._parts(inner))
            salience = sums**2
            of_axes = torch.zeros_like(self._own["salience_of_axes"], device="cpu").double()
            of_axes = of_axes.index_add_(0, axis_of, sums.double()).square()
        else:
            sums = self._sums(self._parts(inner), self._parts(weight_squared), self._parts(gradient_squared))
            cost = torch.from_numpy(self.budget.cost_of_zig)[axis_of].float()
            salience = self._salience(Moments(*sums, self._elements[axis_of], cost)).float()
            # who knows what it says of an axis under a norm
            of_axes = torch.full((len(self.axis_names),), math.inf, device="cpu")
        seen = torch.tensor(self._seen_axes(), dtype=torch.bool, device="cpu")
        self._own["sampled"] = ((self._own["sampled"].cpu() > 0) | seen).to(torch.uint8)
        for name, new, here in (("salience", salience, seen[axis_of]), ("salience_of_axes", of_axes, seen)):
            old = self._own[name].cpu()
            new = torch.nan_to_num(new, nan=math.inf, posinf=math.inf).float()
            # to begin at 0 makes all too small alike
            self._own[name] = torch.where(here, EMA * old + (1 - EMA) * new, old)

    def _parts(self, product: Callable[[Tensor, Tensor], Tensor]) -> Iterable[Part]:
        return parts(self._group, self.parameters_by_name(), product)

    def _seen_axes(self) -> list[bool]:
        """Whether every parameter of an axis trains and has a gradient now."""
        seen = {name for name, p in self.parameters_by_name().items() if p.requires_grad and p.grad is not None}
        return [params <= seen for params in self._params_of_axes]

    def _choose(self, share: float) -> Tensor:
        """The ZIGs to be made zero next. Those without a gradient since the last choice have no salience and stay."""
        zero = self.made_zero.numpy()
        salience, of_axes = (self._own[name].cpu().double().numpy() for name in ("salience", "salience_of_axes"))
        sampled = self._own["sampled"].cpu().numpy() > 0
        weighted = weigh_survivors(salience, of_axes, zero, self.limits)
        chosen = choose(weighted, zero, sampled, share, self.limits, self.budget)
        self._own["sampled"] = torch.zeros_like(self._own["sampled"], device="cpu")
        return self._agreed(torch.from_numpy(chosen))

    # on the parameters ------------------------------------------------------------------------

    def _sums(self, *many: Iterable[Part]) -> Tensor:
        """Sums over the ZIGs, (len(many), num_zigs), of all ranks together."""
        params = self.parameters_by_name()
        return sum_over_zigs(many, {s.param: params[s.param] for s in self._group}, self.num_zigs)

    def _agreed(self, zigs: Tensor) -> Tensor:
        """A mask as the first of the ranks has it that train these parameters together."""
        replicas = self._process_group
        if replicas is None and dist.is_initialized():
            replicas = dist.group.WORLD
        params = self.parameters_by_name()
        return agreed(zigs.to(torch.uint8), [params[s.param] for s in self._group], replicas) > 0

    def _scale(self, zigs: Tensor, factor: float) -> None:
        """Multiplies the ZIGs of a mask: a whole multiply per tensor is faster than one by index."""
        if not zigs.any():
            return
        factors = torch.ones(self.num_zigs, dtype=torch.float32, device="cpu").masked_fill(zigs, factor)
        for s, p in on_this_rank(self._group, self.parameters_by_name()):
            p.mul_(per_position(factors, s.owner, s.dim, p))
        self._forget_past_steps()

    def _freeze(self, zigs: Tensor) -> None:
        """Makes ZIGs zero for good, with what reads them and the base optimizer's state of both."""
        params = self.parameters_by_name()
        for s, index, _ in rows_of(zigs, self._group + self._readers, params):
            p = params[s.param]
            states = self.state[p].values() if p in self.state else ()
            for t in (p, *states):
                if t is p or _can_be_zeroed(t, local(p)):
                    local(t).index_fill_(s.dim, index, 0)
        self._own["zero"] = (self.made_zero | zigs).to(torch.uint8)
        if zigs.any():
            self._forget_past_steps()

    def _forget_past_steps(self) -> None:
        """LBFGS takes every change of the weights since its last step for its own: after another it begins anew."""
        if isinstance(self.base, torch.optim.LBFGS):
            self.state.clear()


def _can_be_zeroed(state: Any, p: Tensor) -> bool:
    """Whether what an optimizer keeps of a parameter is a plain tensor of its shape, not a quantised one, say."""
    if not isinstance(state, Tensor):
        return False
    here = local(state)
    plain = type(here) in (Tensor, torch.nn.Parameter)
    return plain and here.shape == p.shape and (here.is_floating_point() or here.is_complex())


def _fingerprint(axes: Sequence[PrunableAxis]) -> str:
    """What tells partitions apart: the names and sizes of the axes, in their order."""
    text = "\n".join(f"{axis.name} {axis.size}" for axis in axes)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
