"""DHSPG: the base optimizer's own step, then one correction per zero-invariant group (ZIG).

Training splits the ZIGs into redundant and important ones, drives the redundant to exact zero while the rest trains on
as usual (dual half-space projected gradient; OTOv2, arXiv 2303.06862, Sec. 3.2).
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from .zigs import Member, OTOError, PrunableAxis, Work, ZIGPartition

logger = logging.getLogger(__name__)

SAMPLES = 6  # of the salience before the first choice, and before others as they are smaller
SLACK = 0.005  # of the dense model: a choice goes no further beyond its budget, where it can help it
PIECE = 2**20  # elements that are multiplied at a time
EMA = 0.9
SHRINKS = 2  # from one event to the next
SPARSITIES = ("target_group_sparsity", "target_per_axis")  # targets that are fractions of what goes, not of what stays
NORMED = 0.01  # how little of the salience of its ZIGs an axis as a whole has whose scale changes nothing


class Slice(NamedTuple):
    """Which ZIG every position of one parameter dimension belongs to."""

    param: str
    dim: int
    owner: Tensor  # (n,), ZIG numbers, num_zigs where none


class Schedule(NamedTuple):
    """What stays the same over a run; see `DHSPG` for the arguments."""

    mode: str
    axes: tuple[str, ...]  # the pruned axes, by name
    size: int  # ZIGs in all
    sizes: np.ndarray  # (axes,), ZIGs of every axis
    room: np.ndarray  # (axes,), how many of them may go
    multiple: np.ndarray  # (axes,), of which what stays is a multiple, unless all stays
    tie: np.ndarray  # (axes,), a number that axes share which keep equal fractions
    exact: bool  # whether the target is a number of ZIGs to meet, the last few of which need be no multiple
    work: Work  # what the budget counts: ZIGs, parameters or MACs
    target: float  # how much of that is left in the end
    cost: np.ndarray  # (axes,), how much of it a ZIG of every axis takes
    elements: np.ndarray  # (axes,), parameters of a ZIG of every axis
    group: tuple[Slice, ...]  # what is zero of a zero ZIG
    readers: tuple[Slice, ...]  # what reads it: zero too once it is, so that its gradients are
    guarded: tuple[Slice, ...]  # what may get gradients nevertheless
    events: tuple[int, ...]  # steps after which redundant ZIGs are chosen; the last one only ends pruning
    lam: float
    lam_amplify: float
    lam_max: float
    epsilon: float


class DHSPG(torch.optim.Optimizer):
    """Trains like `base` and brings a given fraction of the ZIGs to exact zero.

    `mode="paper"` is OTOv2's update: after the warm-up the most redundant groups by cosine and magnitude are chosen
    once, get the penalty lambda between its bounds, and are projected to zero when a step leaves their half-space. The
    norm it can remove is the sum of learning rate times lambda, so that small learning rates miss the target.

    `mode="scheduled"` reaches the target whatever the learning rate. It deviates from the paper in that

    - the salience is <x, gradient>^2, averaged over several batches (an EMA), not cosine and magnitude of one; on axes
      whose scale changes nothing, because what reads them is normalised, the rest takes over what goes: there it grows
      with (now living / then left)^2, so that none gets thin for being wide;
    - the redundant groups are chosen at several events, ever more of them on a cubic schedule, and every axis keeps a
      floor;
    - between events they are shrunk linearly to zero, in a few steps, instead of by a penalty; the half-space
      projection, which would copy the weights at each of them, never comes before that and is left out.

    In both, once a group is zero, what reads it and the optimizer's state of both are zeroed too: its gradients are
    exactly zero from then on, and nothing needs a mask.

    An instance is also an instance of `base`, so that schedulers, scalers and accelerate treat it as such.

    Across processes, all of which take every step, parameters may be plain tensors (DDP) or the DTensors of FSDP2 and
    HSDP, also mixed; sharding may come before or after the optimizer is made. Each rank sums over the rows it holds,
    one all-reduce adds that up, and rank 0's result counts: every decision is the same on all ranks, ties included. No
    parameter is ever gathered.

    Args:
        model: the model that `partition` was made for.
        partition: its ZIGs. Axes with a frozen parameter are left alone.
        base: any `torch.optim.Optimizer` class; its step is not rewritten.
        lr: learning rate, as in `base`.
        target_group_sparsity: fraction of ZIGs that are zero in the end, in [0, 1): exactly round(target * ZIGs);
            None: 0.5, unless one of the other targets is given.
        total_steps: optimizer steps of the whole run.
        target_params, target_macs: scheduled: instead, the fraction of the parameters of the whole model, or of the
            multiply-accumulates of the traced forward, that is left in the end, in (0, 1]: within 1 % absolute, or one
            ZIG, where that is more.
        target_per_axis: scheduled: instead, fractions of the ZIGs of each axis, {regular expression: target}; an axis
            has the first whose pattern matches its name somewhere, and else stays whole.
        mode: "scheduled" or "paper".
        params: parameter groups, their "params" as (name, parameter) pairs; None: all that require gradients.
        window: scheduled: fractions of the run at which pruning starts and ends. None: (0.1, 0.6), or where at most a
            fifth is left (0.1, 0.25), up to 0.6 in a run too short for that: there what stays needs the time.
        num_events: scheduled: choices in the window; None: 8, or 16 where at most a fifth is left.
        min_keep: scheduled: fraction of every axis, at least one ZIG, that always stays.
        group_divisible: scheduled: the width that is left of every axis, in channels or units, is a multiple of this;
            an axis that can't lose so many stays whole. None: 8 for widths from 64 on, as kernels like it (only a
            number of ZIGs, met exactly, may leave one axis out of step).
        tied: scheduled: names of axes that keep equal fractions, as a stock config has it; all others stay whole. A
            number of ZIGs is then reached, but not exactly.
        start: paper: fraction of the run that is warm-up.
        lam, lam_amplify, lam_max: paper: lambda, its amplification where a step would grow the norm, and the bound of
            that in multiples of lambda; None: the release's 1e-2, 20, 1e3 (1e-3, 2, 10 for SGD).
        epsilon: paper: the half-space {z: <z, x> >= epsilon |x|^2}, in [0, 1).
        base_kwargs: for `base`.

    Raises:
        ValueError: an argument out of range, two targets, one that the floors make infeasible, too few steps, no ZIG.
        OTOError: the model isn't the one the partition was made for.

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

    def __new__(
        cls, model: Any = None, partition: Any = None, base: type = torch.optim.AdamW, *_: Any, **__: Any
    ) -> DHSPG:
        return super().__new__(_with_base(cls, base))

    def __init__(
        self,
        model: torch.nn.Module,
        partition: ZIGPartition,
        base: type[torch.optim.Optimizer] = torch.optim.AdamW,
        lr: float = 1e-3,
        target_group_sparsity: float | None = None,
        total_steps: int = 0,
        mode: str = "scheduled",
        target_params: float | None = None,
        target_macs: float | None = None,
        target_per_axis: Mapping[str, float] | None = None,
        params: Iterable[dict[str, Any]] | None = None,
        window: tuple[float, float] | None = None,
        num_events: int | None = None,
        min_keep: float = 0.1,
        group_divisible: int | None = None,
        tied: Sequence[Sequence[str]] | None = None,
        start: float = 0.1,
        lam: float | None = None,
        lam_amplify: float | None = None,
        lam_max: float | None = None,
        epsilon: float = 0.0,
        **base_kwargs: Any,
    ) -> None:
        targets = {
            "target_group_sparsity": target_group_sparsity, "target_params": target_params,
            "target_macs": target_macs, "target_per_axis": target_per_axis,
        }  # fmt: skip
        kind, wanted = the_target(targets)
        if mode not in ("scheduled", "paper"):
            raise ValueError(f"mode is {mode!r}: it must be 'scheduled' or 'paper'")
        if mode == "paper" and (kind != "target_group_sparsity" or group_divisible not in (None, 1) or tied):
            raise ValueError("mode='paper' knows target_group_sparsity only: use mode='scheduled'")
        groups = list(params or [{"params": [(n, p) for n, p in model.named_parameters() if p.requires_grad]}])
        super().__init__(groups, lr=lr, **base_kwargs)
        # with this, GradScaler would let the fused kernel skip steps without our knowing
        self._step_supports_amp_scaling = False
        partition.tensors(model)  # raises where the model is another one
        trained = self._by_name()
        axes = [axis for axis in partition.axes if all(m.param in trained for m in axis.group)]
        if left := [axis.name for axis in partition.axes if axis not in axes]:
            logger.warning(
                "%d axes are not pruned, because some of their parameters are frozen (the base of an adapter, say: "
                "merge it, or let it train): %s", len(left), ", ".join(left[:3] + ["..."] * (len(left) > 3)),
            )  # fmt: skip
        sizes = np.array([axis.size for axis in axes], int)
        total = int(sizes.sum())
        if wanted not in (({}, 0) if kind in SPARSITIES else (1,)) and not axes:
            raise ValueError("the partition has no prunable ZIG that is trained: print(partition) says why")
        most = _most(axes, min_keep if mode == "scheduled" else 0, wanted if kind == "target_per_axis" else None)
        # a number of ZIGs is met exactly, though of some axes a multiple is left in the end, some as zeros
        counted = kind == "target_group_sparsity" and group_divisible in (None, 1) and tied is None
        multiple = [1 if counted and group_divisible else _multiple(axis, group_divisible) for axis in axes]
        tie, multiple, room = _room(axes, most, multiple, tied)
        work = Work.of([[(n, ((a, 1),))] for a, n in enumerate(sizes)], len(axes))  # ZIGs
        if kind in ("target_params", "target_macs"):
            whole = partition.params(model) if kind == "target_params" else partition.work
            if whole is None:
                raise ValueError("this partition doesn't know its MACs: target_macs needs one of partition_zigs")
            work = whole._replace(lost=whole.lost[:, [partition.axes.index(axis) for axis in axes]])
        dense, target = work.left(np.zeros(len(axes))), _goal(kind, wanted, work, room, min_keep)
        events: tuple[int, ...] = ()
        if target < dense and mode == "paper":
            events = _events(total_steps, (start, 1.0), 1)[:1]
        elif target < dense:
            few = round(target / dense, 2) <= 0.2
            count = num_events or (16 if few else 8)
            end = min(0.6, max(0.25, 0.1 + (count + 2) / max(1, total_steps))) if few else 0.6
            events = _events(total_steps, window or (0.1, end), count)
        sgd = issubclass(base, torch.optim.SGD)
        elements = []  # parameters of one ZIG of each axis
        for axis in axes:
            rows = [(m.positions(axis.size).shape[1], trained[m.param], m.dim) for m in axis.group]
            elements.append(sum(k * p.numel() // p.shape[dim] for k, p, dim in rows))
        readers = [(axis, [m for m in axis.members if m.role == "consumer" and m.param in trained]) for axis in axes]
        # without a reader that is zeroed too, a zero group still gets gradients
        unread = [
            axis for (axis, found) in readers
            if not axis.zero_path or not found or len(found) < sum(m.role == "consumer" for m in axis.members)
        ]  # fmt: skip
        owners: dict[bytes, Tensor] = {}  # a weight, its bias and its readers share one
        self.schedule = Schedule(
            mode, tuple(axis.name for axis in axes), total, sizes, room, multiple, tie, counted, work, target,
            cost=np.maximum(work.alone, 1e-9 * dense),  # what costs next to nothing goes last
            elements=np.array(elements, float),
            group=_slices(axes, {axis.name: axis.group for axis in axes}, trained, owners),
            readers=_slices(axes, {axis.name: members for axis, members in readers}, trained, owners),
            guarded=_slices(axes, {axis.name: axis.group for axis in unread}, trained, owners),
            events=events,
            lam=lam or (1e-3 if sgd else 1e-2),
            lam_amplify=lam_amplify or (2.0 if sgd else 20.0),
            lam_max=lam_max or (10.0 if sgd else 1e3),
            epsilon=epsilon,
        )  # fmt: skip
        # all that changes lives in the first group, in one structure from the start: it is what state_dict() saves
        self.param_groups[0].update(
            dhspg_step=0,
            zero=torch.zeros(total, dtype=torch.uint8),
            redundant=torch.zeros(total, dtype=torch.uint8),
            salience=torch.zeros(total, dtype=torch.float64),
            salience_of_axes=torch.zeros(len(axes), dtype=torch.float64),
            partition=_fingerprint(axes),
        )

    # state ------------------------------------------------------------------------------------

    def __reduce__(self) -> tuple:
        return _rebuild, (type(self).__mro__[2],), (self.__getstate__(), self.schedule)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """`torch.optim.Optimizer.load_state_dict`; what is zero is known by its number, so that the partition must be
        the one that the state was saved with.

        Raises:
            OTOError: it isn't.
        """
        if "dhspg_step" not in state_dict["param_groups"][0]:
            raise OTOError("this optimizer state is not DHSPG's: resume from a checkpoint of hf_oto, or begin anew")
        saved = state_dict["param_groups"][0].get("partition")
        if saved is not None and saved != self._own["partition"]:
            raise OTOError(
                "this optimizer state was saved with another partition, of other ZIGs: resume with the same model and "
                "the same `protect` (and the same frozen parameters), or begin a new run"
            )
        super().load_state_dict(state_dict)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple):
            state, self.schedule = state
            self._step_supports_amp_scaling = False
        super().__setstate__(state)

    @property
    def _own(self) -> dict[str, Any]:
        return self.param_groups[0]

    @property
    def zero(self) -> Tensor:
        """Which ZIGs are exactly zero, bool (num_zigs,), on the CPU."""
        return self._own["zero"].cpu() > 0

    @property
    def group_sparsity(self) -> float:
        """Fraction of the ZIGs that are exactly zero, in [0, 1]."""
        return float(self._own["zero"].sum()) / max(1, self.schedule.size)

    @property
    def target_reached(self) -> bool:
        """Whether as many ZIGs are zero as the target asks for."""
        return self.schedule.work.left(_per_axis(self.zero.numpy(), self.schedule.sizes)) <= self.schedule.target

    @property
    def phase(self) -> str:
        """Where the run is: "warm-up", "pruning", then "training the rest"; "training" if nothing is pruned."""
        now, events = self._own["dhspg_step"], self.schedule.events
        if not events or now < events[0]:
            return "warm-up" if events else "training"
        done = self.target_reached if self.schedule.mode == "paper" else now >= events[-1]
        return "training the rest" if done else "pruning"

    def left(self, partition: ZIGPartition, work: Work) -> float:
        """Fraction, in [0, 1], that a cut would now leave of `partition.work` (MACs) or `partition.params(model)`."""
        zeros = dict(zip(self.schedule.axes, _per_axis(self.zero.numpy(), self.schedule.sizes), strict=False))
        gone = []
        for axis in partition.axes:  # as `PruningPlan.from_zeros` and `compact` have it: one stays, and a multiple
            kept = max(1, axis.size - zeros.get(axis.name, 0))
            gone.append(max(0, axis.size - kept - -kept % axis.multiple))
        return work.left(np.array(gone)) / (work.left(np.zeros(len(gone))) or 1)

    def _by_name(self) -> dict[str, Tensor]:
        """The parameters as they are now: FSDP replaces them in the groups."""
        return {n: p for g in self.param_groups for n, p in zip(g["param_names"], g["params"], strict=True)}

    def _here(self, slices: Iterable[Slice]) -> Iterator[tuple[Slice, Tensor]]:
        """Slices and their parameters, both cut to what this rank holds of them."""
        params = self._by_name()
        for s in slices:
            p = params[s.param]
            owner = _owned(s, p)
            yield s if owner is s.owner else s._replace(owner=owner), _local(p)

    # a step -----------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the base optimizer, and the correction."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        own, plan = self._own, self.schedule
        now = own["dhspg_step"] + 1
        if not plan.events:
            self._base_step()
        elif plan.mode == "paper":
            self._paper_step(now)
        else:
            self._scheduled_step(now)
        own["dhspg_step"] = now
        return loss

    def _base_step(self) -> None:
        """The base optimizer's own step, without the hooks of torch that run around ours already."""
        step = super().step.__func__
        (step.__wrapped__ if getattr(step, "hooked", False) else step)(self)

    def _scheduled_step(self, now: int) -> None:
        own, plan = self._own, self.schedule
        if now in _sample_steps(plan.events):
            self._sample(now)
        self._base_step()
        redundant = None
        if now in (steps := _shrink_steps(plan.events)):
            previous, end = steps[now]
            redundant = own["redundant"].cpu() > 0
            if now < end:
                self._scale(redundant, (end - now) / (end - previous))
            else:  # the next event is here
                self._freeze(redundant)
                redundant.fill_(False)
        if now in plan.events[:-1]:
            redundant = self._choose(_chosen(plan.events.index(now) + 1, plan.events))
        if redundant is not None:
            own["redundant"] = redundant.to(torch.uint8)
        self._guard()

    def _paper_step(self, now: int) -> None:
        own, plan = self._own, self.schedule
        start = plan.events[0]
        redundant = torch.ones(plan.size, dtype=torch.bool) if now == start else own["redundant"].cpu() > 0
        redundant &= ~self.zero
        projecting = now >= start and bool(redundant.any())
        before = list(self._rows(redundant)) if projecting else []
        self._base_step()
        params, d = {n: _local(p) for n, p in self._by_name().items()}, []
        lr = {n: float(g["lr"]) for g in self.param_groups for n in g["param_names"]}
        for s, i, x in before:  # a d = x - x_half, whatever the base optimizer
            step = x - params[s.param].index_select(s.dim, i)
            d.append(step / lr[s.param] if lr[s.param] else step)
        if projecting:
            xd, xx, dd = self._sums(
                ((s, i, x * y) for (s, i, x), y in zip(before, d, strict=True)),
                ((s, i, x * x) for s, i, x in before),
                ((s, i, y * y) for (s, i, _), y in zip(before, d, strict=True)),
            )
        if projecting and now == start:
            score = paper_salience(xd, xx, dd, torch.from_numpy(np.repeat(plan.elements, plan.sizes)))
            chosen = torch.zeros_like(redundant)
            chosen[torch.argsort(score, descending=True, stable=True)[: round(plan.size - plan.target)]] = True
            own["redundant"] = chosen.to(torch.uint8)
        elif projecting:
            lam = paper_lambda(xd, xx, dd, plan.lam, plan.lam_amplify, plan.lam_max)
            pull = torch.nan_to_num(lam / xx.sqrt(), posinf=0.0)
            dot = []
            for s, i, x in before:
                p = params[s.param]
                hat = p.index_select(s.dim, i) - lr[s.param] * _spread(pull, s, i, x) * x
                p.index_copy_(s.dim, i, hat)
                dot.append((s, i, hat * x))
            self._freeze(redundant & (self._sum(dot) < plan.epsilon * xx))
        self._guard()

    # salience and choice ----------------------------------------------------------------------

    def _sample(self, now: int) -> None:
        """EMAs of <x, gradient>^2 of every ZIG and of every axis as a whole."""
        zigs = self._sum(self._products()).double()
        axes = torch.from_numpy(_per_axis(zigs.numpy(), self.schedule.sizes))
        for name, taylor in (("salience", zigs), ("salience_of_axes", axes)):
            new = torch.nan_to_num(taylor**2, nan=math.inf)
            self._own[name] = EMA * self._own[name].cpu() + (1 - EMA) * new  # to begin at 0 makes all too small alike

    def _products(self) -> Iterator[tuple[Slice, None, Tensor]]:
        """Weight times gradient, in pieces, each in the memory of the one before: fresh memory is slower than both."""
        grads, memory = {n: p.grad for n, p in self._by_name().items()}, {}
        for s, p in self._here(self.schedule.group):
            if grads[s.param] is None or not p.numel():
                continue
            out = memory.setdefault((p.device, p.dtype), torch.empty_like(p[:0]))
            rows = max(1, PIECE * p.shape[s.dim] // p.numel())
            pieces = [[s.owner], [p], [_local(grads[s.param])]]
            if rows < p.shape[s.dim]:
                pieces = [t.split(rows, dim) for (t,), dim in zip(pieces, (0, s.dim, s.dim), strict=True)]
            for owner, x, grad in zip(*pieces, strict=True):
                yield s._replace(owner=owner), None, torch.mul(x, grad, out=out.resize_(0))

    def _choose(self, share: float) -> Tensor:
        """The least salient living ZIGs for their cost, so that `share` of the way to the target is gone with them and
        the zero ones. They go in blocks, so that what stays of an axis is a multiple and above its floor."""
        plan, zero = self.schedule, self.zero.numpy()
        axis = np.repeat(np.arange(len(plan.sizes)), plan.sizes)
        salience, of_axes = (self._own[name].cpu().numpy() for name in ("salience", "salience_of_axes"))
        normed = of_axes < NORMED * _per_axis(salience, plan.sizes)
        salience = np.where(zero, -np.inf, salience)
        order = np.lexsort((salience, axis))  # axis after axis, each from the least salient on
        rank = np.arange(plan.size) - (np.cumsum(plan.sizes) - plan.sizes)[axis]
        living = plan.sizes - _per_axis(zero, plan.sizes)
        salience[order] *= np.where(normed[axis], living[axis] / (plan.sizes[axis] - rank), 1) ** 2
        first = (plan.sizes - 1) % plan.multiple + 1  # what has to go before multiples stay
        block = np.where(rank < first[axis], 0, 1 + (rank - first[axis]) // plan.multiple[axis])
        tie = plan.tie[axis]
        together = np.lexsort((rank, axis, block, tie))  # tied axes lose a block each at a time
        together = together[(first[axis] + block * plan.multiple[axis] <= plan.room[axis])[together]]
        order, axis, tie, block = order[together], axis[together], tie[together], block[together]
        starts = np.flatnonzero(np.diff(tie, prepend=-1) | np.diff(block, prepend=-1))
        score = np.add.reduceat(salience[order], starts) / np.add.reduceat(plan.cost[axis], starts)
        blocks = candidates = np.argsort(score, kind="stable")
        tie = tie[starts]
        dense = plan.work.left(0 * plan.sizes)
        goal = dense - round((dense - plan.target) * share)

        def left(chosen: np.ndarray) -> float:
            n = np.bincount(tie[chosen], minlength=len(plan.sizes))[plan.tie]
            return plan.work.left(np.where(n, first + (n - 1) * plan.multiple, 0))

        best = blocks
        while left(blocks) <= goal:  # the fewest that do; rather others than a big one that does too much
            blocks = blocks[: bisect.bisect_left(range(len(blocks)), -goal, key=lambda n: -left(blocks[:n]))]
            best = max(best, blocks, key=left)
            if not len(blocks) or goal - left(blocks) <= SLACK * dense:
                break
            big, rest = blocks[-1], candidates[len(blocks) :]
            blocks = candidates = np.concatenate([blocks[:-1], rest[tie[rest] != tie[big]]])
        chosen = np.zeros(plan.size, bool)
        place = np.full(len(starts), len(starts))
        place[best] = np.arange(len(best))
        place = np.repeat(place, np.diff(starts, append=len(order)))
        picked = order[np.argsort(place, kind="stable")][: (place < len(starts)).sum()]
        picked = picked[~zero[picked]]
        # more may be zero already than this event asks for: a state that was loaded into another schedule
        chosen[picked[: max(0, int(dense - goal) - zero.sum()) if plan.exact else None]] = True
        return torch.from_numpy(chosen)

    # on the parameters ------------------------------------------------------------------------

    def _rows(self, mask: Tensor) -> Iterator[tuple[Slice, Tensor, Tensor]]:
        """(slice, positions, a copy of the parameter there) for the ZIGs of a mask, of what this rank holds."""
        for s, p, index in _positions(mask, self._here(self.schedule.group)):
            yield s, index, p.index_select(s.dim, index)

    def _sum(self, parts: Iterable[tuple[Slice, Tensor | None, Tensor]]) -> Tensor:
        return self._sums(parts)[0]

    def _sums(self, *many: Iterable[tuple[Slice, Tensor | None, Tensor]]) -> Tensor:
        """Sums tensors over everything but their ZIGs: (len(many), num_zigs), on the CPU, in at least float32.

        Parts are what this rank holds; the result is that of all ranks together, bit by bit the same on each of them.
        """
        by_name = self._by_name()
        params = {s.param: by_name[s.param] for s in self.schedule.group}
        dtype = functools.reduce(torch.promote_types, [p.dtype for p in params.values()], torch.float32)
        layouts = {name: _layout(p) for name, p in params.items()}
        shape = (len(many), self.schedule.size + 1)
        # the same layouts in the same order on all ranks, whatever these hold
        sums = {layout: torch.zeros(shape, dtype=dtype, device=layout.device) for layout in layouts.values()}
        for k, parts in enumerate(many):
            found: dict[Layout, list[tuple[Tensor, Tensor]]] = {layout: [] for layout in sums}
            for s, index, values in parts:
                over = [dim for dim in range(values.dim()) if dim != s.dim]
                rows = values.sum(over, dtype=dtype) if over else values.to(dtype, copy=True)  # (n,)
                found[layouts[s.param]].append((s.owner if index is None else s.owner[index.cpu()], rows))
            for layout, pairs in found.items():
                if pairs:  # one sum is faster than one for each slice
                    owner, rows = map(torch.cat, zip(*pairs, strict=True))
                    sums[layout][k].index_add_(0, owner.to(rows.device), rows)
        total = torch.zeros(shape, dtype=dtype)
        for layout, part in sums.items():
            for group in layout.groups:  # none for replicated parameters: they are counted once
                dist.all_reduce(part, group=group)
            total = part + total.to(part.device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast(total, 0)  # replicas may round otherwise
        return total[:, :-1].cpu()

    def _scale(self, mask: Tensor, factor: float) -> None:
        """Multiplies the ZIGs of a mask: a whole multiply per tensor is faster than one by index."""
        table = torch.ones(self.schedule.size + 1)
        table[:-1][mask] = factor
        for s, p in self._here(self.schedule.group):
            factors = table.index_select(0, s.owner)
            if (factors != 1).any():
                p.mul_(factors.view([-1 if d == s.dim else 1 for d in range(p.dim())]).to(p.device, p.dtype))

    def _freeze(self, mask: Tensor) -> None:
        """Makes ZIGs zero for good, with what reads them and the base optimizer's state of both."""
        params = self._by_name()
        for s, p, index in _positions(mask, self._here(self.schedule.group + self.schedule.readers)):
            for t in (p, *self.state[params[s.param]].values()):
                if isinstance(t, Tensor) and t.is_floating_point() and _local(t).shape == p.shape:
                    _local(t).index_fill_(s.dim, index.to(t.device), 0)
        self._own["zero"] = (self.zero | mask).to(torch.uint8)

    def _guard(self) -> None:
        """Zeroes again what gets gradients though zero: groups whose reader is frozen or sees more than zeros."""
        if self.schedule.guarded:
            for s, p, index in _positions(self.zero, self._here(self.schedule.guarded)):
                p.index_fill_(s.dim, index, 0)


class Layout(NamedTuple):
    """Where the parts of a sum lie and which process groups add them up; none for what every rank holds whole."""

    device: torch.device
    groups: tuple[dist.ProcessGroup, ...] = ()


def _layout(p: Tensor) -> Layout:
    if not isinstance(p, DTensor):
        return Layout(p.device)
    if other := [x for x in p.placements if type(x) not in (Shard, Replicate)]:
        raise OTOError(
            f"a parameter of shape {tuple(p.shape)} is placed as {other[0]}: tensor parallel is not supported, "
            "use FSDP2 or HSDP (fully_shard) alone, or DDP"
        )
    sharded = [i for i, x in enumerate(p.placements) if isinstance(x, Shard)]
    return Layout(p.to_local().device, tuple(p.device_mesh.get_group(i) for i in sharded))


def _local(t: Tensor) -> Tensor:
    """What this rank holds of a tensor, sharing its memory."""
    return t.to_local() if isinstance(t, DTensor) else t


def _owned(s: Slice, p: Tensor) -> Tensor:
    """The owners of the positions that this rank holds of a parameter: DTensors are cut as by `torch.chunk`."""
    owner = s.owner
    if isinstance(p, DTensor):
        for i, placement in enumerate(p.placements):
            if isinstance(placement, Shard) and placement.dim == s.dim:
                chunks = owner.chunk(p.device_mesh.size(i))
                rank = p.device_mesh.get_local_rank(i)
                owner = chunks[rank] if rank < len(chunks) else owner[:0]
    return owner


def paper_salience(xd: Tensor, xx: Tensor, dd: Tensor, elements: Tensor) -> Tensor:
    """How redundant each group is, (n,): the mean of cos(x, d) and of 1 / (|x| / size), each L2-normalised."""
    cosine = torch.nan_to_num(xd / (xx * dd).sqrt(), posinf=0.0, neginf=0.0)
    small = 1 / (xx.sqrt() / elements + 1e-6)
    return 0.5 * torch.nn.functional.normalize(cosine, dim=0) + 0.5 * torch.nn.functional.normalize(small, dim=0)


def paper_lambda(xd: Tensor, xx: Tensor, dd: Tensor, lam: float, amplify: float, hat: float) -> Tensor:
    """The penalty of each group, (n,): lam, or between its bounds where the step would grow the norm (<x, d> < 0)."""
    low, high = -xd / xx.sqrt(), -dd * xx.sqrt() / xd
    grown = (amplify * low).clamp(lam, hat * lam)
    grown = torch.where(grown >= high, (low + high) / 2, grown)
    return torch.where(xd < 0, grown, torch.full_like(xd, lam))


def _spread(values: Tensor, s: Slice, index: Tensor, like: Tensor) -> Tensor:
    """One number per ZIG -> one per position of the slice, broadcastable to `like`."""
    shape = [-1 if d == s.dim else 1 for d in range(like.dim())]
    return values.to(like.device, like.dtype)[s.owner.to(like.device)[index]].view(shape)


def the_target(targets: Mapping[str, Any]) -> tuple[str, Any]:
    """The one target that is given, by name, checked; group sparsity 0.5 if none is."""
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are both given: one target at a time")
    name, value = next(iter(given.items()), ("target_group_sparsity", 0.5))
    for one in value.values() if name == "target_per_axis" else [value]:
        if not (0 <= one < 1 if name in SPARSITIES else 0 < one <= 1):
            raise ValueError(f"{name} is {value}: it must be in {'[0, 1)' if name in SPARSITIES else '(0, 1]'}")
    return name, value


def _most(axes: Sequence[PrunableAxis], min_keep: float, wanted: Mapping[str, float] | None) -> list[int]:
    """How many ZIGs of every axis may go: all above the floor, or as many as {regular expression: target} wants."""
    most = [axis.size - max(1, math.ceil(min_keep * axis.size)) for axis in axes]
    if wanted is None:
        return most
    asked = [round(next((t for p, t in wanted.items() if re.search(p, axis.name)), 0) * axis.size) for axis in axes]
    for axis, n, limit in zip(axes, asked, most, strict=True):
        if n > limit:
            raise ValueError(
                f"target_per_axis is not feasible for {axis.name}: with min_keep={min_keep} "
                f"at most {math.floor(1000 * limit / axis.size) / 1000} of it can go"
            )
    return asked


def _goal(kind: str, wanted: Any, work: Work, room: np.ndarray, min_keep: float) -> float:
    """How much of the work is left in the end."""
    dense, least = work.left(0 * room), work.left(room)
    if kind == "target_per_axis":
        return least
    goal = dense - round(wanted * dense) if kind == "target_group_sparsity" else wanted * dense
    if goal < least:
        bound = math.floor(1000 * (1 - least / dense)) if kind in SPARSITIES else math.ceil(1000 * least / dense)
        raise ValueError(
            f"{kind}={wanted} is not feasible: with min_keep={min_keep} it can be "
            f"at {'most' if kind in SPARSITIES else 'least'} {bound / 1000}"
        )
    return goal


def _multiple(axis: PrunableAxis, divisible: int | None) -> int:
    """Of how many ZIGs a multiple has to stay for the width to be divisible; one ZIG may be several channels wide."""
    width = next(m for m in axis.members if m.role == "producer").positions(axis.size).shape[1]
    divisible = divisible or (8 if width * axis.size >= 64 else 1)
    return math.lcm(axis.multiple, divisible // math.gcd(divisible, width))


def _room(
    axes: Sequence[PrunableAxis], most: Sequence[int], multiple: Sequence[int], tied: Sequence[Sequence[str]] | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The tie of every axis, of what a multiple stays, and how many may go, each (axes,), given the limits of each."""
    tie, multiple, room = np.arange(len(axes)), np.array(multiple, int), np.zeros(len(axes), int)
    if tied is None:
        for a, axis in enumerate(axes):
            first = (axis.size - 1) % multiple[a] + 1  # has to go for a multiple to stay
            room[a] = first + (most[a] - first) // multiple[a] * multiple[a] if most[a] >= first else 0
        return tie, multiple, room
    number = {axis.name: a for a, axis in enumerate(axes)}
    for names in tied:
        some = [number[name] for name in names if name in number]
        steps = math.gcd(*(axes[a].size for a in some))
        step = math.lcm(*(int(multiple[a]) // math.gcd(multiple[a], axes[a].size // steps) for a in some))
        if len(some) == len(names) and steps % step == 0:
            tie[some], multiple[some] = some[0], [step * axes[a].size // steps for a in some]
            room[some] = multiple[some] * min(most[a] // multiple[a] for a in some)
    return tie, multiple, room


def _per_axis(zigs: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """How many ZIGs of every axis are in a mask, (axes,)."""
    return np.array([part.sum() for part in np.split(zigs, np.cumsum(sizes)[:-1])], float)


def _positions(mask: Tensor, here: Iterable[tuple[Slice, Tensor]]) -> Iterator[tuple[Slice, Tensor, Tensor]]:
    """(slice, parameter, its positions whose ZIG is in the mask), where there are some."""
    padded = torch.cat([mask, torch.zeros(1, dtype=torch.bool)])
    for s, p in here:
        index = padded.index_select(0, s.owner).nonzero().squeeze(1)
        if len(index):
            yield s, p, index.to(p.device)


def _slices(
    axes: Sequence[PrunableAxis],
    members: Mapping[str, Sequence[Member]],
    params: Mapping[str, Tensor],
    known: dict[bytes, Tensor],
) -> tuple[Slice, ...]:
    """The members of all axes as one owner vector per parameter dimension."""
    total = sum(axis.size for axis in axes)
    owners: dict[tuple[str, int], np.ndarray] = {}
    start = 0
    for axis in axes:
        zigs = np.arange(start, start + axis.size)[:, None]
        for m in members.get(axis.name, ()):
            owner = owners.setdefault((m.param, m.dim), np.full(params[m.param].shape[m.dim], total, np.int32))
            owner[m.positions(axis.size)] = zigs
        start += axis.size
    return tuple(
        Slice(name, dim, known.setdefault(owner.tobytes(), torch.from_numpy(owner)))
        for (name, dim), owner in owners.items()
    )


def _events(total_steps: int, window: tuple[float, float], count: int) -> tuple[int, ...]:
    """Steps of the choices and of the end of pruning, evenly over the window: count + 1 of them."""
    begin, end = max(1, round(window[0] * total_steps)), round(window[1] * total_steps)
    if not 0 <= window[0] < window[1] <= 1:
        raise ValueError(f"window is {window}: it must be two fractions of the run, 0 <= start < end <= 1")
    if end - begin < count:
        needed = math.ceil((count + 2) / (window[1] - window[0]))
        raise ValueError(
            f"total_steps is {total_steps}, fewer training steps than the pruning window {window} with {count} events "
            f"needs: train for {needed} steps or more, or widen the window"
        )
    return tuple(begin + round(i * (end - begin) / count) for i in range(count + 1))


def _chosen(i: int, events: tuple[int, ...]) -> float:
    """How much of the way to the target is chosen by the i-th event."""
    return 1 - (1 - i / (len(events) - 1)) ** 3


@functools.cache
def _sample_steps(events: tuple[int, ...]) -> frozenset[int]:
    """The steps at which salience is sampled, evenly before each choice."""
    steps: set[int] = set()
    for i, (previous, event) in enumerate(zip((0, *events), events[:-1], strict=False)):
        part = (_chosen(i + 1, events) - _chosen(i, events)) / _chosen(1, events)
        count = min(max(1, round(SAMPLES * part)), event - previous)
        steps |= {event - k * (event - previous) // count for k in range(count)}
    return frozenset(steps)


@functools.cache
def _shrink_steps(events: tuple[int, ...]) -> dict[int, tuple[int, int]]:
    """The steps that make redundant ZIGs smaller, SHRINKS of them up to each event -> (the one before, the event)."""
    steps = {}
    for previous, event in itertools.pairwise(events):
        some = sorted({previous + math.ceil(i * (event - previous) / SHRINKS) for i in range(SHRINKS + 1)})
        steps |= {now: (before, event) for before, now in itertools.pairwise(some)}
    return steps


@functools.cache
def _with_base(cls: type, base: type[torch.optim.Optimizer]) -> type:
    """The class whose step is ours around that of `base`."""
    if issubclass(cls, base):
        return cls
    return type(cls.__name__, (cls, base), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def _fingerprint(axes: Sequence[PrunableAxis]) -> str:
    """What tells partitions apart: the names and sizes of the axes, in their order."""
    text = "\n".join(f"{axis.name} {axis.size}" for axis in axes)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _rebuild(base: type[torch.optim.Optimizer]) -> DHSPG:
    """An empty optimizer, for pickle and deepcopy to fill."""
    return DHSPG.__new__(DHSPG, base=base)
