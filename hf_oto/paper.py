"""OTOv2's own rule: warm up, choose the redundant ZIGs once, then penalty and half-space projection.

It is arXiv 2303.06862, Sec. 3.2, with the salience and the constants of the authors' release. The penalty can remove
no more norm from a ZIG than the sum of learning rate times lambda over the steps. So small learning rates miss the
target.

Worked example: with SGD, a learning rate of 0.1 and the released lambda of 0.001, a ZIG x on which the loss does not
pull is shortened by 0.1 * 0.001 a step. From the norm 1 to 0 it would take 10,000 steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .dhspg import DHSPG
from .salience import inner
from .schedule import Schedule
from .slices import Part, Rows, Slice, Tensors, local, rows_of
from .zigs import ZIGPartition

# arguments of DHSPG that the paper's rule has no use for
NOT_OF_THE_PAPER = {
    "target_params", "target_macs", "target_per_axis", "tied", "salience", "window", "num_events", "min_keep",
    "group_divisible",
}  # fmt: skip


@dataclass(frozen=True)
class Penalty:
    """The paper's constants.

    Attributes:
        lam: lambda, the weight of the penalty on the norm of a redundant group.
        amplify: if a step would make a group grow, the lambda of the group is this many times the smallest lambda with
            which the group shrinks.
        bound: the largest lambda, in multiples of `lam`.
        epsilon: a group becomes zero when a step takes it out of the half-space {z: <z, x> >= epsilon |x|^2}, where x
            is the group before the step; in [0, 1).
    """

    lam: float
    amplify: float
    bound: float
    epsilon: float

    @classmethod
    def released(cls, base: type[torch.optim.Optimizer], epsilon: float = 0.0) -> Penalty:
        """The constants of the release for a base optimizer; its tutorials have an epsilon of 0.9 or 0.95."""
        if issubclass(base, torch.optim.SGD):
            return cls(lam=1e-3, amplify=2.0, bound=10.0, epsilon=epsilon)
        return cls(lam=1e-2, amplify=20.0, bound=1e3, epsilon=epsilon)


class Products(NamedTuple):
    """Of the weights x and the descent direction d of each group, arrays of shape (num_zigs,)."""

    xd: Tensor  # <x, d>
    xx: Tensor  # |x|^2
    dd: Tensor  # |d|^2


class Before(NamedTuple):
    """Weights of redundant groups before a step: some positions of one slice."""

    rows: Rows
    owner: Tensor  # (k,), the groups of these positions, where the parameter lies
    x: Tensor  # the weights at these positions

    def part(self, values: Tensor) -> Part:
        """Values of these positions, for a sum over groups."""
        return Part(self.rows.slice, self.rows.positions, values)


class RowsOfGroups:
    """The positions of a set of groups, found anew only when the set changes, as a card waits for each search."""

    def __init__(self) -> None:
        self._groups: Tensor | None = None
        self._slices: tuple[Slice, ...] = ()
        self._rows: list[tuple[Rows, Tensor]] = []

    def __reduce__(self) -> Any:
        """Copies find the positions themselves: they may be for parameters on another device."""
        return RowsOfGroups, ()

    def of(self, groups: Tensor, slices: tuple[Slice, ...], params: Tensors) -> list[tuple[Rows, Tensor]]:
        """Rows, and the groups of their positions, (k,), on the parameter's device.

        Args:
            groups: bool (num_zigs,).
            slices: those of the optimizer, which are others after a cut.
        """
        is_known = self._groups is not None and self._slices is slices and torch.equal(self._groups, groups)
        if not is_known:
            self._groups = groups
            self._slices = slices
            self._rows = []
            for rows in rows_of(groups, slices, params):
                owner = rows.slice.owner[rows.positions]  # (k,), groups alone: no position is of no group
                self._rows.append((rows, owner.to(rows.index.device)))
        return self._rows


class PaperDHSPG(DHSPG):
    """OTOv2's DHSPG (arXiv 2303.06862, Sec. 3.2) around any base optimizer; see `DHSPG` for what both share.

    After the warm-up, as many ZIGs as the target asks for are redundant. From then on every step shortens those
    redundant ZIGs that are not zero yet, by a penalty on their norms. A ZIG that a step takes out of its half-space
    becomes zero.

    Args:
        model, partition, base, lr, target_group_sparsity, total_steps, process_group, base_kwargs: as for `DHSPG`.
        start: fraction of the run that is warm-up, in [0, 1).
        penalty: the constants; None: those of the release.

    Raises:
        ValueError, OTOError: as `DHSPG`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        partition: ZIGPartition,
        base: type[torch.optim.Optimizer] | torch.optim.Optimizer = torch.optim.AdamW,
        lr: float | None = None,
        target_group_sparsity: float | None = None,
        total_steps: int = 0,
        start: float = 0.1,
        penalty: Penalty | None = None,
        **more: Any,
    ) -> None:
        wrong = more.keys() & NOT_OF_THE_PAPER
        if wrong:
            raise ValueError(f"{min(wrong)}: OTOv2's own rule has none, use DHSPG")
        self._start = start
        super().__init__(
            model, partition, base, lr, target_group_sparsity, total_steps, min_keep=0.0, group_divisible=1, **more
        )
        self.penalty = penalty or Penalty.released(type(self.base))
        self._weights_before: list[Before] = []
        self._rows = RowsOfGroups()

    def _scheduled(self, total_steps: int, window: Any, num_events: Any) -> Schedule:
        warm_up_and_rest = super()._scheduled(total_steps, (self._start, 1.0), 1)
        # The choice is the only event: ZIGs become zero when they leave their half-spaces.
        choice = warm_up_and_rest.events[:1]
        return Schedule(choice)

    def _has_pruned(self, now: int) -> bool:
        return self.target_reached

    # a step -----------------------------------------------------------------------------------

    def _is_warm_up(self, now: int) -> bool:
        return not self.schedule.events or now < self.schedule.events[0]

    def _before_step(self, now: int) -> None:
        """Keeps a copy of the weights of those groups that may become zero in the step."""
        self._weights_before = []
        if self._is_warm_up(now):
            return
        params = self.parameters_by_name()
        redundant = self._redundant(now)
        for rows, owner in self._rows.of(redundant, self._group, params):
            parameter = local(params[rows.slice.param])
            x = parameter.index_select(rows.slice.dim, rows.index)
            self._weights_before.append(Before(rows, owner, x))

    def _redundant(self, now: int) -> Tensor:
        """The redundant groups that aren't zero yet, bool (num_zigs,); at the choice any group may be redundant."""
        not_zero = ~self.made_zero
        if now == self.schedule.events[0]:
            return not_zero
        is_redundant = self._own["redundant"].cpu() > 0
        return is_redundant & not_zero

    def _after_step(self, now: int) -> None:
        """Chooses the redundant groups after the warm-up, and from then on shortens or zeroes them."""
        weights_before = self._weights_before
        self._weights_before = []
        if self._is_warm_up(now):
            return
        redundant = self._redundant(now)
        if not redundant.any():
            return
        directions = self._directions(weights_before)
        weights = [before.part(before.x) for before in weights_before]
        xd, xx, dd = self._sums(
            _inner_products(weights, directions),
            _inner_products(weights, weights),
            _inner_products(directions, directions),
        )
        products = Products(xd, xx, dd)
        if now == self.schedule.events[0]:
            chosen = self._most_redundant(products)
            self._own["redundant"] = chosen.to(torch.uint8)
            return
        pull = penalties(products, self.penalty) / xx.sqrt()  # (num_zigs,)
        pull = torch.nan_to_num(pull, posinf=0.0)  # a group of no norm is not pulled
        products_with_before = self._penalise_(weights_before, pull)
        (after_and_before,) = self._sums(products_with_before)  # <x_hat, x>, (num_zigs,)
        leaves_half_space = after_and_before < self.penalty.epsilon * xx
        leaving = self._agreed(redundant & leaves_half_space)
        if leaving.any():  # else the zeros are those of the step before, whose positions are known
            self._freeze(leaving)

    def _penalise_(self, weights_before: Sequence[Before], pull: Tensor) -> list[Part]:
        """Subtracts learning rate * pull * x from the weights, where x are the weights before the step.

        Args:
            pull: lambda / |x| of every group, (num_zigs,).

        Returns:
            the products of the weights after and before the step, whose sums are <x_hat, x>.
        """
        rates = self._learning_rates()
        params = self.parameters_by_name()
        devices = {before.x.device for before in weights_before}
        pulls = {device: pull.to(device) for device in devices}
        products = []
        for before in weights_before:
            (slice_, index, _), owner, x = before
            rate = rates[slice_.param]
            parameter = local(params[slice_.param])
            shape = [1] * x.dim()
            shape[slice_.dim] = -1
            pull_of_row = pulls[x.device].index_select(0, owner).view(shape).to(x.dtype)
            x_half = parameter.index_select(slice_.dim, index)
            x_hat = x_half - rate * (pull_of_row * x)
            parameter.index_copy_(slice_.dim, index, x_hat)
            products.append(before.part(inner(x_hat, x)))
        return products

    def _directions(self, weights_before: Sequence[Before]) -> list[Part]:
        """The descent directions d of a step of the base optimizer, whatever it is.

        The step was x_half = x - rate * d, so d is (x - x_half) / rate.
        """
        rates = self._learning_rates()
        params = self.parameters_by_name()
        directions = []
        for before in weights_before:
            (slice_, index, _), _, x = before
            rate = rates[slice_.param]
            parameter = local(params[slice_.param])
            x_half = parameter.index_select(slice_.dim, index)
            step = x - x_half
            # with a learning rate of 0 the step is all that is known
            direction = step / rate if rate else step
            directions.append(before.part(direction))
        return directions

    def _learning_rates(self) -> dict[str, float]:
        rates = {}
        for group in self.param_groups:
            for name in group["param_names"]:
                rates[name] = float(group["lr"])  # it may be a tensor
        return rates

    def _most_redundant(self, products: Products) -> Tensor:
        """As many of the groups as the target asks for, bool (num_zigs,)."""
        axis_of = torch.from_numpy(self.limits.axis_of)  # (num_zigs,)
        score = redundancy(products, self._elements[axis_of])  # (num_zigs,)
        is_seen = torch.tensor(self._seen_axes(), dtype=torch.bool, device="cpu")  # (axes,)
        # an axis without a gradient has said nothing yet
        score = score.masked_fill(~is_seen[axis_of], -torch.inf)
        count = round(self.budget.dense - self.budget.goal)
        order = torch.argsort(score, descending=True, stable=True)
        chosen = torch.zeros_like(score, dtype=torch.bool)
        chosen[order[:count]] = True
        return self._agreed(chosen & (score > -torch.inf))


def _inner_products(first: Sequence[Part], second: Sequence[Part]) -> Iterator[Part]:
    """The products of the same parts of two vectors, element by element, to be added up ZIG by ZIG."""
    for part, other in zip(first, second, strict=True):
        products = inner(part.values, other.values)
        yield part._replace(values=products)


def redundancy(products: Products, elements: Tensor) -> Tensor:
    """How redundant each group is: the mean of cos(x, d) and of 1 / (|x| / elements), each L2-normalised.

    Args:
        elements: the number of parameters of each group, (num_zigs,).
    """
    xd, xx, dd = products
    cosine = xd / (xx * dd).sqrt()
    cosine = torch.nan_to_num(cosine, posinf=0.0, neginf=0.0)  # where d is 0, or x
    magnitude = xx.sqrt() / elements
    smallness = 1 / (magnitude + 1e-6)
    return 0.5 * normalize(cosine, dim=0) + 0.5 * normalize(smallness, dim=0)


def penalties(products: Products, penalty: Penalty) -> Tensor:
    """Lambda of each group, (num_zigs,): that of `penalty`, or a larger one if the step alone makes the norm grow."""
    xd, xx, dd = products
    norm = xx.sqrt()
    lowest = -xd / norm  # with a larger lambda the norm shrinks
    highest = -dd * norm / xd  # with a smaller lambda the loss still descends
    raised = penalty.amplify * lowest
    raised = raised.clamp(penalty.lam, penalty.bound * penalty.lam)
    # with too large a lambda the loss would grow: halfway between both bounds it doesn't
    halfway = (lowest + highest) / 2
    raised = torch.where(raised >= highest, halfway, raised)
    would_grow = xd < 0
    given = torch.full_like(xd, penalty.lam)
    return torch.where(would_grow, raised, given)
