"""An optimizer that knows the ZIGs of its parameters: it sums over them, shrinks them, and makes them zero for good.

It steps the base optimizer and leaves to a subclass what is done to which ZIGs before and after a step. DHSPG is such
a rule, and so is the paper's own. What a rank holds of the ZIGs is in slices.py, how they stay zero in zeros.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .composed import AroundOptimizer
from .cut_state import cut_state_
from .salience import parts
from .slices import Part, agreed, local, on_this_rank, per_position, rows_of, slices_left, slices_of, sum_over_zigs
from .zeros import HeldZeros
from .zigs import PrunableAxis, PruningPlan, ZIGPartition


class ZIGOptimizer(AroundOptimizer):
    """An optimizer around a base optimizer, which steps it and prunes ZIGs of its parameters.

    Once a ZIG is zero, what reads it and the optimizer's state of both are zeroed too: its gradients are exactly zero
    from then on, and nothing needs a mask. Some things move it nevertheless: noise on the gradients, a penalty on the
    distance to other weights, a momentum that can't be zeroed because it is quantised. Such a move is found in the
    same step, and undone after every step from then on: a ZIG that this optimizer calls zero is zero in the weights.

    Attributes:
        axis_names: the axes that are pruned.
        num_zigs: the number of their ZIGs, which are numbered axis after axis.
        held: what looks after the zeros.
    """

    def _take_zigs(self, axes: Sequence[PrunableAxis], process_group: dist.ProcessGroup | None) -> None:
        """Takes the axes that are to be pruned; `process_group`: see `DHSPG`."""
        self.axis_names = tuple(axis.name for axis in axes)
        self.num_zigs = sum(axis.size for axis in axes)
        self._axis_sizes = tuple(axis.size for axis in axes)
        self._process_group = process_group
        self._params_of_axes = [{m.param for m in axis.group} for axis in axes]

        trained = self.parameters_by_name()
        group = {axis.name: axis.group for axis in axes}
        readers = {}
        never_still = []  # (parameter, dimension): without a reader that is zeroed too, zeros still get gradients
        for axis in axes:
            consumers = [m for m in axis.members if m.role == "consumer"]
            readers[axis.name] = [m for m in consumers if m.param in trained]
            if not consumers or len(readers[axis.name]) < len(consumers):
                never_still += [(m.param, m.dim) for m in axis.group]
        owners: dict[bytes, Tensor] = {}
        self._group = slices_of(axes, group, trained, owners)  # what is zero of a zero ZIG
        self._readers = slices_of(axes, readers, trained, owners)  # what is zeroed with it, but trained before
        self.held = HeldZeros(self._group, never_still)

    @property
    def _own(self) -> dict[str, Any]:
        """All that changes during a run, in the first group, which is what `state_dict` saves."""
        return self.param_groups[0]

    def _begin(self, **more: Any) -> None:
        """Fills `_own` with the state of a run at its beginning; its structure never changes.

        It is on the CPU and in these dtypes, whatever torch's defaults are, because choices are made there.
        """
        self._own.update(
            dhspg_step=0,
            zero=torch.zeros(self.num_zigs, dtype=torch.uint8, device="cpu"),
            redundant=torch.zeros(self.num_zigs, dtype=torch.uint8, device="cpu"),
            # of which ZIGs no parameter has anything, because they were cut out
            gone=torch.zeros(self.num_zigs, dtype=torch.uint8, device="cpu"),
            **more,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Process groups can't be copied."""
        return super().__getstate__() | {"_process_group": None}

    # what is zero -----------------------------------------------------------------------------

    @property
    def zero(self) -> Tensor:
        """Which ZIGs are zero, bool (num_zigs,), on the CPU: this optimizer made them zero, and in the weights (of a
        sharded model: in those that this rank holds) they are."""
        return self.made_zero & ~self.held.moved(self._own["zero"], self.parameters_by_name())

    @property
    def made_zero(self) -> Tensor:
        """Which ZIGs this optimizer has made zero, bool (num_zigs,), whatever is in the weights now."""
        return self._own["zero"].cpu() > 0

    @property
    def mask(self) -> Tensor:
        """`made_zero` as it is kept, uint8 (num_zigs,): another tensor as soon as more ZIGs are zero."""
        return self._own["zero"]

    @property
    def group_sparsity(self) -> float:
        """Fraction of the ZIGs that are exactly zero, in [0, 1]."""
        return float(self.zero.sum()) / max(1, self.num_zigs)

    def zeros(self, partition: ZIGPartition) -> PruningPlan:
        """The plan that removes what this optimizer has made zero, whatever the weights say now."""
        starts = np.cumsum(self._axis_sizes)[:-1]
        zero_of_axis = dict(zip(self.axis_names, np.split(self.made_zero.numpy(), starts), strict=False))
        kept = {}
        for axis in partition.axes:
            if axis.name in zero_of_axis and zero_of_axis[axis.name].any():
                kept[axis.name] = np.flatnonzero(~zero_of_axis[axis.name]).tolist() or [0]
        return PruningPlan(kept)

    @property
    def nbytes(self) -> int:
        """Memory, in bytes, of what it keeps beside the base optimizer: owners of positions, masks and salience."""
        kept = [s.owner for s in self._group + self._readers]
        kept += [value for value in self._own.values() if torch.is_tensor(value)]
        distinct = {id(t): t for t in kept}.values()  # slices share owners
        return sum(t.numel() * t.element_size() for t in distinct) + self.held.nbytes

    # a step -----------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the base optimizer, with what is to be done to ZIGs before and after it."""
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

    def _before_step(self, now: int) -> None:
        """Reads what it needs off weights and gradients before the base optimizer moves them; in a subclass."""

    def _after_step(self, now: int) -> None:
        """Prunes after step `now`, counted from 1, of the base optimizer; in a subclass."""

    def _hold_zeros(self, now: int) -> None:
        self.held.hold_(self._own["zero"], self.parameters_by_name(), now)

    def _watched(self, closure: Callable[[], Any], now: int) -> Callable[[], Any]:
        """The closure, after whose first call the gradients are those of the weights before the step."""
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

    def _parts(self, product: Callable[[Tensor, Tensor], Tensor]) -> Iterable[Part]:
        """A product of weights and gradients, of all parameters of the ZIGs, for `_sums`."""
        return parts(self._group, self.parameters_by_name(), product)

    def _sums(self, *many: Iterable[Part]) -> Tensor:
        """Sums over the ZIGs, (len(many), num_zigs), of all ranks together."""
        params = self.parameters_by_name()
        return sum_over_zigs(many, {s.param: params[s.param] for s in self._group}, self.num_zigs)

    def _agreed(self, zigs: Tensor) -> Tensor:
        """A mask of ZIGs as the first of the ranks has it that train these parameters together."""
        replicas = self._process_group
        if replicas is None and dist.is_initialized():
            replicas = dist.group.WORLD
        params = self.parameters_by_name()
        return agreed(zigs.to(torch.uint8), [params[s.param] for s in self._group], replicas) > 0

    def _seen_axes(self) -> list[bool]:
        """Whether every parameter of an axis trains and has a gradient now."""
        seen = {name for name, p in self.parameters_by_name().items() if p.requires_grad and p.grad is not None}
        return [params <= seen for params in self._params_of_axes]

    # changes of ZIGs --------------------------------------------------------------------------

    def _multiply(self, zigs: Tensor, factor: float) -> None:
        """Multiplies the ZIGs of a mask by a factor."""
        if not zigs.any():
            return
        factors = torch.ones(self.num_zigs, dtype=torch.float32, device="cpu").masked_fill(zigs, factor)
        for s, p in on_this_rank(self._group, self.parameters_by_name()):
            # one multiply of the whole tensor, most of it by 1, is faster than one by index
            p.mul_(per_position(factors, s.owner, s.dim, p))
        self._forget_past_steps()

    def _freeze(self, zigs: Tensor) -> None:
        """Makes the ZIGs of a mask zero for good, with what reads them and the base optimizer's state of both."""
        params = self.parameters_by_name()
        for s, index, _ in rows_of(zigs, self._group + self._readers, params):
            p = params[s.param]
            tensors = [p]
            if p in self.state:
                tensors += [value for value in self.state[p].values() if _can_be_zeroed(value, local(p))]
            for t in tensors:
                local(t).index_fill_(s.dim, index, 0)
        self._own["zero"] = (self.made_zero | zigs).to(torch.uint8)
        if zigs.any():
            self._forget_past_steps()

    def cut_(self, params: Mapping[str, Tensor], positions: Mapping[str, Mapping[int, np.ndarray]]) -> None:
        """Goes on with the parameters that are left of a model after zero ZIGs were cut out of it.

        ZIGs keep their numbers, and those that are cut out are zero as before; only no parameter has them any more.

        Args:
            params: the model's parameters now, by name.
            positions: parameter -> dimension -> the positions of it that went.
        """
        kept: dict[str, dict[int, Tensor]] = {}
        for name, old in self.parameters_by_name().items():
            kept[name] = {}
            for dim, gone in positions.get(name, {}).items():
                kept[name][dim] = torch.from_numpy(np.delete(np.arange(old.shape[dim]), gone))
        cut_state_(self.base, params, kept)
        self._group = slices_left(self._group, kept)
        self._readers = slices_left(self._readers, kept)
        self.held = HeldZeros(self._group, self.held.restless)
        is_left = torch.zeros(self.num_zigs + 1, dtype=torch.bool, device="cpu")
        for s in self._group:
            is_left[s.owner.long()] = True
        self._own["gone"] = (~is_left[:-1]).to(torch.uint8)

    def _forget_past_steps(self) -> None:
        """LBFGS takes every change of the weights since its last step for its own: after another it begins anew."""
        if isinstance(self.base, torch.optim.LBFGS):
            self.state.clear()


def _can_be_zeroed(value: Any, p: Tensor) -> bool:
    """Whether a value of the optimizer's state is an ordinary tensor of its parameter's shape, not a quantised one."""
    if not isinstance(value, Tensor):
        return False
    t = local(value)
    is_ordinary = type(t) in (Tensor, torch.nn.Parameter)
    return is_ordinary and t.shape == p.shape and (t.is_floating_point() or t.is_complex())
