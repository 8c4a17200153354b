"""An optimizer that knows the ZIGs of its parameters: it sums over them, shrinks them, and makes them zero for good.

It steps the base optimizer. A subclass decides what happens to which ZIGs before and after the step: DHSPG in
dhspg.py, and the paper's own rule in paper.py. slices.py finds what a rank holds of ZIGs, zeros.py keeps them zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .composed import AroundOptimizer
from .cut import Positions
from .cut_state import cut_state_
from .salience import parts
from .slices import (
    Part,
    Slice,
    agreed,
    local,
    on_this_rank,
    per_position,
    rows_of,
    slices_left,
    slices_of,
    sum_over_zigs,
)
from .zeros import HeldZeros, dead_zigs
from .zigs import Member, PrunableAxis, PruningPlan, ZIGPartition

Product = Callable[[Tensor, Tensor], Tensor]  # of a weight and its gradient, element by element
Closure = Callable[[], Any]
Members = dict[str, Sequence[Member]]  # by the names of axes


class ZIGOptimizer(AroundOptimizer):
    """An optimizer around a base optimizer, which steps it and prunes ZIGs of its parameters.

    When a ZIG becomes zero, the weights that read it become zero with it, and so does the base optimizer's state of
    both. From then on the gradients of the ZIG are exactly zero, and nothing needs a mask. Some things move the ZIG
    nevertheless: noise on the gradients, a penalty on the distance to other weights, a momentum that can't be zeroed
    because it is quantised. Such a move is found in the same step and undone after every later step, so that a ZIG
    that this optimizer calls zero is zero in the weights.

    Attributes:
        axis_names: the axes that are pruned.
        num_zigs: the number of their ZIGs, which are numbered axis after axis.
        held: the object that keeps zeros zero.
    """

    def _take_zigs(self, axes: Sequence[PrunableAxis], process_group: dist.ProcessGroup | None) -> None:
        """Takes the axes that are to be pruned; `process_group`: see `DHSPG`."""
        self.axis_names = tuple(axis.name for axis in axes)
        self._axis_sizes = tuple(axis.size for axis in axes)
        self.num_zigs = sum(self._axis_sizes)
        self._process_group = process_group
        self._params_of_axes: list[set[str]] = []
        trained = self.parameters_by_name()
        group: Members = {}  # what a ZIG is made of
        readers: Members = {}  # what reads it, and trains
        never_still = []  # (parameter, dimension): without a reader that is zeroed too, zeros still get gradients
        for axis in axes:
            self._params_of_axes.append({member.param for member in axis.group})
            group[axis.name] = axis.group
            consumers = [member for member in axis.members if member.role == "consumer"]
            readers[axis.name] = [member for member in consumers if member.param in trained]
            if not consumers or len(readers[axis.name]) < len(consumers):
                never_still += [(member.param, member.dim) for member in axis.group]
        owners: dict[bytes, Tensor] = {}
        # a zero ZIG stays zero in its group; in its readers it is zeroed once, when it becomes zero
        self._group = slices_of(axes, group, trained, owners)
        self._readers = slices_of(axes, readers, trained, owners)
        self.held = HeldZeros(self._group, never_still)
        self._axes = tuple(axes)

    @property
    def _own(self) -> dict[str, Any]:
        """All that changes during a run. It stands in the first group, because `state_dict` saves the groups."""
        return self.param_groups[0]

    def _begin(self, **more: Any) -> None:
        """Fills `_own` with the state of a run at its beginning. Its names, shapes and dtypes never change.

        The tensors are on the CPU and have these dtypes, whatever torch's defaults are: choices are made there.
        """
        no_zig = torch.zeros(self.num_zigs, dtype=torch.uint8, device="cpu")
        self._own.update(
            dhspg_step=0,
            zero=no_zig.clone(),
            redundant=no_zig.clone(),
            gone=no_zig.clone(),  # the ZIGs that were cut out: no parameter has anything of them
            **more,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Process groups can't be copied."""
        return super().__getstate__() | {"_process_group": None}

    # what is zero -----------------------------------------------------------------------------

    @property
    def zero(self) -> Tensor:
        """Which ZIGs are zero for good, bool (num_zigs,), on the CPU: `made_zero`, and the weights are zero.

        Of a sharded model only those weights count that this rank holds.
        """
        params = self.parameters_by_name()
        moved = self.held.moved(self._own["zero"], params)
        return self.made_zero & ~moved

    @property
    def made_zero(self) -> Tensor:
        """Which ZIGs were made zero, or dead before (`dead_zigs`), bool (num_zigs,), whatever the weights are now."""
        return self._own["zero"].cpu() > 0

    @property
    def mask(self) -> Tensor:
        """`made_zero` as uint8 (num_zigs,). When ZIGs become zero, another tensor takes the place of this one."""
        return self._own["zero"]

    @property
    def group_sparsity(self) -> float:
        """Fraction of the ZIGs that are exactly zero, in [0, 1]."""
        num_zero = float(self.zero.sum())
        return num_zero / max(1, self.num_zigs)

    def zeros(self, partition: ZIGPartition) -> PruningPlan:
        """The plan that removes what this optimizer has made zero, whatever the weights say now."""
        starts = np.cumsum(self._axis_sizes)[:-1]
        pieces = np.split(self.made_zero.numpy(), starts)
        # without any axis there is one piece, of no ZIG
        zero_of_axis = dict(zip(self.axis_names, pieces, strict=False))
        kept = {}
        for axis in partition.axes:
            zero = zero_of_axis.get(axis.name)  # (size,)
            if zero is not None and zero.any():
                positions = np.flatnonzero(~zero).tolist()
                kept[axis.name] = positions or [0]  # a plan keeps one ZIG at least
        return PruningPlan(kept)

    @property
    def nbytes(self) -> int:
        """Memory, in bytes, that it takes beside the base optimizer: owners of positions, masks and salience."""
        owners = [slice_.owner for slice_ in self._group + self._readers]
        distinct = {id(owner): owner for owner in owners}  # slices share owners
        own = [value for value in self._own.values() if torch.is_tensor(value)]
        return self.held.nbytes + _nbytes(distinct.values()) + _nbytes(own)

    # a step -----------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Makes one step of the base optimizer, and prunes around it."""
        now = self._own["dhspg_step"] + 1
        if now == 1:  # only now the weights are those that training begins with: they may have been loaded
            self._own["zero"] = dead_zigs(self._axes, self._group + self._readers, self.parameters_by_name())
        if closure is None:
            self._before_step(now)
            loss = self.base.step()
        else:
            watched = self._watched(closure, now)
            loss = self.base.step(watched)
        self._after_step(now)
        self._own["dhspg_step"] = now
        self._hold_zeros(now)
        return loss

    def _before_step(self, now: int) -> None:
        """Reads weights and gradients before the base optimizer moves them. A subclass says which, and what for."""

    def _after_step(self, now: int) -> None:
        """Prunes after step `now` of the base optimizer, counted from 1. A subclass says how."""

    def _hold_zeros(self, now: int) -> None:
        if not self.held.is_idle(self._own["zero"]):
            params = self.parameters_by_name()
            self.held.hold_(self._own["zero"], params, now)

    def _watched(self, closure: Closure, now: int) -> Closure:
        """A closure that calls `_before_step` once, after its first call.

        Only then the gradients are those of the weights before the step: the base may call its closure several times.
        """
        num_calls = 0

        def watched() -> Any:
            nonlocal num_calls
            with torch.enable_grad():
                loss = closure()
            num_calls += 1
            if num_calls == 1:
                with torch.no_grad():
                    self._before_step(now)
            return loss

        return watched

    # sums over ZIGs ---------------------------------------------------------------------------

    def _params_of_group(self) -> dict[str, Tensor]:
        """The parameters that ZIGs are made of, by name."""
        params = self.parameters_by_name()
        return {slice_.param: params[slice_.param] for slice_ in self._group}

    def _parts(self, product: Product) -> Iterable[Part]:
        """A product of weights and gradients, of all parameters of the ZIGs, for `_sums`."""
        params = self.parameters_by_name()
        return parts(self._group, params, product)

    def _sums(self, *many: Iterable[Part]) -> Tensor:
        """Sums over the ZIGs, (len(many), num_zigs), of all ranks together."""
        params = self._params_of_group()
        return sum_over_zigs(many, params, self.num_zigs)

    def _agreed(self, zigs: Tensor) -> Tensor:
        """The mask of ZIGs that the first rank has, of the ranks that train these parameters together."""
        replicas = self._process_group
        if replicas is None and dist.is_initialized():
            replicas = dist.group.WORLD
        params = self._params_of_group().values()
        mask = agreed(zigs.to(torch.uint8), params, replicas)
        return mask > 0

    def _seen_axes(self) -> list[bool]:
        """For every axis, whether all its parameters train and have a gradient now."""
        seen = set()
        for name, p in self.parameters_by_name().items():
            has_gradient = p.grad is not None
            if p.requires_grad and has_gradient:
                seen.add(name)
        return [params <= seen for params in self._params_of_axes]

    # changes of ZIGs --------------------------------------------------------------------------

    def _multiply(self, zigs: Tensor, factor: float) -> None:
        """Multiplies the ZIGs of a mask by a factor."""
        if not zigs.any():
            return
        factors = torch.ones(self.num_zigs, dtype=torch.float32, device="cpu")
        factors.masked_fill_(zigs, factor)
        params = self.parameters_by_name()
        for slice_, p in on_this_rank(self._group, params):
            # one multiply of the whole tensor, most of it by 1, is faster than one by index
            factors_of_positions = per_position(factors, slice_.owner, slice_.dim, p)
            p.mul_(factors_of_positions)
        self._forget_past_steps()

    def _freeze(self, zigs: Tensor) -> None:
        """Makes the ZIGs of a mask zero for good, with what reads them and the base optimizer's state of both."""
        params = self.parameters_by_name()
        slices = self._group + self._readers
        for slice_, index, _ in rows_of(zigs, slices, params):
            p = params[slice_.param]
            local_p = local(p)
            local_p.index_fill_(slice_.dim, index, 0)
            for value in self.state_of(p).values():
                if _can_be_zeroed(value, local_p):
                    local(value).index_fill_(slice_.dim, index, 0)
        zero = self.made_zero | zigs
        self._own["zero"] = zero.to(torch.uint8)
        if zigs.any():
            self._forget_past_steps()

    def cut_(self, params: Mapping[str, Tensor], positions: Positions) -> None:
        """Goes on with the parameters of a model after zero ZIGs were cut out of it.

        All ZIGs keep their numbers. Those that were cut out still count as zero, but no parameter has them any more.

        Args:
            params: the model's parameters after the cut, by name.
            positions: parameter -> dimension -> the positions of it that were cut out.
        """
        cut_state_(self.base, params, positions)
        self._group = slices_left(self._group, positions)
        self._readers = slices_left(self._readers, positions)
        self.held = HeldZeros(self._group, self.held.restless)
        is_gone = _of_no_position(self._group, self.num_zigs)
        self._own["gone"] = is_gone.to(torch.uint8)

    def _forget_past_steps(self) -> None:
        """Lets LBFGS begin anew. It would take a change of the weights that we have made for its own step."""
        if isinstance(self.base, torch.optim.LBFGS):
            self.state.clear()


def _nbytes(tensors: Iterable[Tensor]) -> int:
    """The memory of tensors, in bytes."""
    total = 0
    for tensor in tensors:
        total += tensor.numel() * tensor.element_size()
    return total


def _of_no_position(slices: Iterable[Slice], num_zigs: int) -> Tensor:
    """Which ZIGs have no position in any slice, bool (num_zigs,)."""
    # the last element is for positions of no ZIG
    has_positions = torch.zeros(num_zigs + 1, dtype=torch.bool, device="cpu")
    for slice_ in slices:
        owner = slice_.owner.long()
        has_positions[owner] = True
    return ~has_positions[:-1]


def _can_be_zeroed(value: Any, p: Tensor) -> bool:
    """Whether a value of the optimizer's state is an ordinary tensor of its parameter's shape, not a quantised one."""
    if not isinstance(value, Tensor):
        return False
    tensor = local(value)
    is_ordinary = type(tensor) in (Tensor, torch.nn.Parameter)
    has_same_shape = tensor.shape == p.shape
    has_numbers = tensor.is_floating_point() or tensor.is_complex()
    return is_ordinary and has_same_shape and has_numbers
