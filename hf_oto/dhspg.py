"""DHSPG: the base optimizer's own step, then one correction per zero-invariant group (ZIG).

Training splits the ZIGs into redundant and important ones, drives the redundant to exact zero while the rest trains on
as usual (dual half-space projected gradient; OTOv2, arXiv 2303.06862, Sec. 3.2). When something happens is in
schedule.py, which ZIGs go in choice.py, what a rank holds of them in slices.py, the paper's own rule in paper.py.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .choice import FRACTIONS_REMOVED, budget_of, choose, counts_exactly, limits_of, the_target, weigh_survivors
from .cost import Work
from .modeling_oto import OTOError
from .schedule import Schedule
from .slices import Part, Rows, agreed, local, on_this_rank, per_position, rows_of, slices_of, sum_over_zigs
from .zigs import PrunableAxis, PruningPlan, ZIGPartition

logger = logging.getLogger(__name__)

EMA = 0.9
PIECE = 2**20  # elements of a parameter that are multiplied at a time
LOOK_ELSEWHERE = 50  # steps after which other zeros are looked at


class Moments(NamedTuple):
    """What one batch says of every ZIG: sums over its parameters x and their gradients g, each (num_zigs,)."""

    weight_times_gradient: Tensor
    weight_squared: Tensor
    gradient_squared: Tensor
    elements: Tensor  # how many parameters it has
    cost: Tensor  # how much of the budget it takes: salience is divided by it when ZIGs are chosen


class DHSPG(torch.optim.Optimizer):
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

    # a GradScaler must unscale, and skip steps, itself: a kernel that skips one inside doesn't tell us
    _step_supports_amp_scaling = False

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
        self._take(base if isinstance(base, torch.optim.Optimizer) else None, model, base, lr, params, base_kwargs)
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
        self._frozen: Frozen | None = None
        trained = self._by_name()
        owners: dict[bytes, Tensor] = {}
        readers = {
            axis.name: [m for m in axis.members if m.role == "consumer" and m.param in trained] for axis in axes
        }
        # what is zero of a zero ZIG, and what reads it: zero too then, so that its gradients are
        self._group = slices_of(axes, {axis.name: axis.group for axis in axes}, trained, owners)
        self._readers = slices_of(axes, readers, trained, owners)
        # without a reader that is zeroed too, a zero group still gets gradients
        unread = [
            axis
            for axis in axes
            if not readers[axis.name] or len(readers[axis.name]) < sum(m.role == "consumer" for m in axis.members)
        ]
        self._restless = {(m.param, m.dim) for axis in unread for m in axis.group}
        self._params_of_axes = [{m.param for m in axis.group} for axis in axes]
        self._elements = _elements(axes, trained)
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

    # the base optimizer -----------------------------------------------------------------------

    def _take(
        self,
        given: torch.optim.Optimizer | None,
        model: torch.nn.Module,
        cls: Any,
        lr: float | None,
        params: Iterable[dict[str, Any]] | None,
        base_kwargs: Mapping[str, Any],
    ) -> None:
        """Makes the base optimizer, or takes the one that is given, and names its parameters as the model does."""
        names = {id(p): name for name, p in model.named_parameters()}
        if given is None:
            groups = [{"params": [p for p in model.parameters() if p.requires_grad]}] if params is None else params
            given = cls([_without_names(group) for group in groups], lr=1e-3 if lr is None else lr, **base_kwargs)
        elif lr is not None or params is not None or base_kwargs:
            wrong = [*base_kwargs, *(name for name, x in (("lr", lr), ("params", params)) if x is not None)]
            raise ValueError(f"base is an optimizer already, with settings of its own: {wrong[0]} is not for DHSPG")
        if not any(id(p) in names for group in given.param_groups for p in group["params"]):
            raise OTOError(
                f"{type(given).__name__} trains no parameter of {type(model).__name__} in its step: make it with "
                "model.parameters()"
            )
        unknown = 0
        for group in given.param_groups:
            group["param_names"] = []
            for p in group["params"]:
                unknown += id(p) not in names  # of a loss, say
                group["param_names"].append(names.get(id(p), f"not in the model: {unknown}"))
        self.base = given
        super().__setstate__({})  # what torch's own __init__ makes, beside groups and state: those are the base's

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's; the first has what DHSPG knows."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:
        """The base optimizer's."""
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The base optimizer's."""
        return self.base.defaults

    def __getattr__(self, name: str) -> Any:
        """What only some optimizers have: `train` and `eval`, say."""
        if name.startswith("__") or "base" not in vars(self):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.base, name)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """The base optimizer's; what is added trains, and is not pruned."""
        group = _without_names(param_group)
        group["params"] = list(group["params"])
        count = sum(len(g["params"]) for g in self.param_groups)
        group["params"] = [(f"added: {count + i}", p) for i, p in enumerate(group["params"])]
        self.base.add_param_group(group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The base optimizer's."""
        self.base.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's, with what DHSPG knows in its first parameter group."""
        return self.base.state_dict()

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

    def register_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
        """The base optimizer's."""
        return self.base.register_state_dict_pre_hook(hook, prepend)

    def register_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> Any:
        """The base optimizer's."""
        return self.base.register_state_dict_post_hook(hook, prepend)

    def register_load_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
        """The base optimizer's."""
        return self.base.register_load_state_dict_pre_hook(hook, prepend)

    def register_load_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> Any:
        """The base optimizer's."""
        return self.base.register_load_state_dict_post_hook(hook, prepend)

    def __getstate__(self) -> dict[str, Any]:
        """Without hooks and what others have put on the instance (a scheduler its own `step`), as torch has it;
        process groups can't be copied."""
        kept = {name: value for name, value in vars(self).items() if not name.startswith("_optimizer_")}
        kept.pop("step", None)
        return kept | {"_frozen": None, "_process_group": None}

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
        zero = self.made_zero
        for rows, p in self._frozen_rows_and_weights():
            moved = p.index_select(rows.slice.dim, rows.index) != 0
            others = [d for d in range(moved.dim()) if d != rows.slice.dim]
            moved = (moved.any(dim=others) if others else moved).cpu()
            zero[rows.slice.owner[rows.index.cpu()][moved].long()] = False
        return zero

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
        if self._frozen is not None:
            kept += [rows.index for rows in self._frozen.rows]
        return sum(t.numel() * t.element_size() for t in {id(t): t for t in kept}.values())

    def _by_name(self) -> dict[str, Tensor]:
        """The parameters as they are now: FSDP replaces them in the groups."""
        return {
            name: p
            for group in self.param_groups
            for name, p in zip(group["param_names"], group["params"], strict=True)
        }

    def _trained_axes(self, partition: ZIGPartition) -> list[PrunableAxis]:
        trained = {name for name, p in self._by_name().items() if p.requires_grad}
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
            sums = self._sums(self._parts(inner), self._parts(_weight_squared), self._parts(_gradient_squared))
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

    def _seen_axes(self) -> list[bool]:
        """Whether every parameter of an axis trains and has a gradient now."""
        seen = {name for name, p in self._by_name().items() if p.requires_grad and p.grad is not None}
        return [params <= seen for params in self._params_of_axes]

    def _parts(self, product: Callable[[Tensor, Tensor], Tensor]) -> Iterator[Part]:
        """A product of weights and gradients, piece by piece: large temporary tensors are slow."""
        params = self._by_name()
        for s, p in on_this_rank(self._group, params):
            grad = params[s.param].grad
            if grad is None or not p.numel():
                continue
            grad = local(grad)
            grad = grad.to_dense() if grad.is_sparse else grad
            positions = max(1, PIECE * p.shape[s.dim] // p.numel())
            pieces = (t.split(positions, dim) for t, dim in ((s.owner, 0), (p, s.dim), (grad, s.dim)))
            for owner, x, g in zip(*pieces, strict=True):
                yield Part(s._replace(owner=owner), None, product(x, g))

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
        params = self._by_name()
        return sum_over_zigs(many, {s.param: params[s.param] for s in self._group}, self.num_zigs)

    def _agreed(self, zigs: Tensor) -> Tensor:
        """A mask as the first of the ranks has it that train these parameters together."""
        replicas = self._process_group
        if replicas is None and dist.is_initialized():
            replicas = dist.group.WORLD
        params = self._by_name()
        return agreed(zigs.to(torch.uint8), [params[s.param] for s in self._group], replicas) > 0

    def _scale(self, zigs: Tensor, factor: float) -> None:
        """Multiplies the ZIGs of a mask: a whole multiply per tensor is faster than one by index."""
        if not zigs.any():
            return
        factors = torch.ones(self.num_zigs, dtype=torch.float32, device="cpu").masked_fill(zigs, factor)
        for s, p in on_this_rank(self._group, self._by_name()):
            p.mul_(per_position(factors, s.owner, s.dim, p))
        self._forget_past_steps()

    def _freeze(self, zigs: Tensor) -> None:
        """Makes ZIGs zero for good, with what reads them and the base optimizer's state of both."""
        params = self._by_name()
        for (s, index, _), p in self._rows_and_weights(rows_of(zigs, self._group + self._readers, params)):
            p.index_fill_(s.dim, index, 0)
            for state in self.state[params[s.param]].values() if params[s.param] in self.state else ():
                if _can_be_zeroed(state, p):
                    local(state).index_fill_(s.dim, index, 0)
        self._own["zero"] = (self.made_zero | zigs).to(torch.uint8)
        if zigs.any():
            self._forget_past_steps()

    def _forget_past_steps(self) -> None:
        """LBFGS takes every change of the weights since its last step for its own: after another it begins anew."""
        if isinstance(self.base, torch.optim.LBFGS):
            self.state.clear()

    def _rows_and_weights(self, rows: Iterable[Rows]) -> Iterator[tuple[Rows, Tensor]]:
        params = self._by_name()
        for row in rows:
            yield row, local(params[row.slice.param])

    # zeros stay zero --------------------------------------------------------------------------

    def _frozen_rows_and_weights(self) -> list[tuple[Rows, Tensor]]:
        """The zero positions of all groups, found once for each freeze, and the weights that they are of now."""
        if self._frozen is None or self._frozen.mask is not self._own["zero"]:
            self._frozen = Frozen(self._own["zero"], rows_of(self.made_zero, self._group, self._by_name()))
        return list(self._rows_and_weights(self._frozen.rows))

    def _hold_zeros(self, now: int) -> None:
        """Zeroes again what moved though its ZIG is zero, and remembers which parameters do that.

        All zero positions are looked at in the step of a freeze and in the next, in which momentum that could not be
        zeroed would show; later one ZIG of every parameter, as what moves zeros (noise, a penalty, a teacher) moves
        all of them. `zero`, and so every number that is reported, looks at all of them.
        """
        pairs = self._frozen_rows_and_weights()
        watched = [(rows, p) for rows, p in pairs if rows.key not in self._restless]
        if self._frozen.full_looks > 0:
            self._frozen.full_looks -= 1
            moved = [(rows, p) for rows, p in watched if p.index_select(rows.slice.dim, rows.index).any()]
        else:
            moved = watched if self._frozen.one_of_each_moved(watched, now) else []
        if moved:
            self._restless |= {rows.key for rows, _ in moved}
            logger.info(
                "something besides the loss moves ZIGs that are zero, of %s and %d other parameters (noise on "
                "gradients, a penalty, a momentum that can't be zeroed): they are zeroed after every step from now on",
                moved[0][0].slice.param, len(moved) - 1,
            )  # fmt: skip
        for rows, p in pairs:
            if rows.key in self._restless:
                p.index_fill_(rows.slice.dim, rows.index, 0)


class Frozen:
    """Where the zeros of one mask are, and a quick look at some of them."""

    def __init__(self, mask: Tensor, rows: list[Rows]) -> None:
        self.mask = mask
        self.rows = rows
        self.full_looks = 2
        self._views_of: tuple[int, list[int]] = (0, [])
        self._views: list[Tensor] = []

    def one_of_each_moved(self, watched: Sequence[tuple[Rows, Tensor]], now: int) -> bool:
        """Whether, of any parameter, one ZIG is not zero; which one changes every LOOK_ELSEWHERE steps."""
        turn = now // LOOK_ELSEWHERE
        views_of = (turn, [p.data_ptr() for _, p in watched])
        if views_of != self._views_of:  # views are made once: of small models these would cost more than the look
            ones = [p.select(rows.slice.dim, rows.positions[turn % len(rows.positions)]) for rows, p in watched]
            self._views = [one.reshape(-1) if one.is_contiguous() else one for one in ones]
            self._views_of = views_of
        alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for view in self._views:
            alike.setdefault((view.device, view.dtype), []).append(view if view.dim() == 1 else view.reshape(-1))
        return any(bool(torch.cat(views).any()) for views in alike.values())


def inner(x: Tensor, y: Tensor) -> Tensor:
    """The terms of the real inner product."""
    return (x.conj() * y).real if x.is_complex() else x * y


def _weight_squared(weight: Tensor, gradient: Tensor) -> Tensor:
    return inner(weight, weight)


def _gradient_squared(weight: Tensor, gradient: Tensor) -> Tensor:
    return inner(gradient, gradient)


def _can_be_zeroed(state: Any, p: Tensor) -> bool:
    """Whether what an optimizer keeps of a parameter is a plain tensor of its shape, not a quantised one, say."""
    if not isinstance(state, Tensor):
        return False
    here = local(state) if isinstance(state, DTensor) else state
    plain = type(here) in (Tensor, torch.nn.Parameter)
    return plain and here.shape == p.shape and (here.is_floating_point() or here.is_complex())


def _without_names(group: Mapping[str, Any]) -> dict[str, Any]:
    params = group["params"]
    params = [params] if isinstance(params, Tensor) else params
    return {**group, "params": [p[1] if isinstance(p, tuple) else p for p in params]}


def _elements(axes: Sequence[PrunableAxis], params: Mapping[str, Tensor]) -> Tensor:
    """Parameters of one ZIG of each axis, (axes,)."""
    counts = []
    for axis in axes:
        count = 0
        for m in axis.group:
            p = params[m.param]
            count += m.positions(axis.size).shape[1] * p.numel() // p.shape[m.dim]
        counts.append(count)
    return torch.tensor(counts, dtype=torch.float32, device="cpu")


def _fingerprint(axes: Sequence[PrunableAxis]) -> str:
    """What tells partitions apart: the names and sizes of the axes, in their order."""
    text = "\n".join(f"{axis.name} {axis.size}" for axis in axes)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
