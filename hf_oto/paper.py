"""OTOv2's own rule: warm up, choose the redundant ZIGs once, then penalty and half-space projection.

It is arXiv 2303.06862, Sec. 3.2, with the salience and the constants of the authors' release. All the norm that the
penalty can remove from a ZIG is the sum of learning rate times lambda over the steps: small learning rates miss the
target.

Worked example: with SGD, a learning rate of 0.1 and the released lambda of 0.001, a ZIG x on which the loss does not
pull is shortened by 0.1 * 0.001 a step. From the norm 1 to 0 it would take 10,000 steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .dhspg import DHSPG
from .salience import inner
from .schedule import Schedule
from .slices import Part, local, rows_of
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
        amplify: where a step would make a group grow, its lambda is this many times the smallest with which the group
            shrinks.
        bound: the largest lambda, in multiples of `lam`.
        epsilon: a group becomes zero when a step takes it out of the half-space {z: <z, x> >= epsilon |x|^2}; in
            [0, 1).
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


class PaperDHSPG(DHSPG):
    """OTOv2's DHSPG (arXiv 2303.06862, Sec. 3.2) around any base optimizer; see `DHSPG` for what both share.

    After the warm-up, as many ZIGs as the target asks for are redundant. From then on every step shortens those that
    are not zero yet by a penalty on their norms, and makes zero those that it takes out of their half-spaces.

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
        self._weights_before: list[Part] = []

    def _scheduled(self, total_steps: int, window: Any, num_events: Any) -> Schedule:
        warm_up_and_rest = super()._scheduled(total_steps, (self._start, 1.0), 1)
        return Schedule(warm_up_and_rest.events[:1])  # the choice; ZIGs become zero when they leave their half-spaces

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
        for s, index, _ in rows_of(self._redundant(now), self._group, params):
            p = local(params[s.param])
            self._weights_before.append(Part(s, index, p.index_select(s.dim, index)))

    def _redundant(self, now: int) -> Tensor:
        """The groups that are redundant, or at the choice may be, and aren't zero yet, bool (num_zigs,)."""
        if now == self.schedule.events[0]:
            return ~self.made_zero
        return (self._own["redundant"].cpu() > 0) & ~self.made_zero

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
        pairs = list(zip(weights_before, directions, strict=True))
        # of each group: <x, d>, |x|^2 and |d|^2, each (num_zigs,)
        xd, xx, dd = self._sums(
            (x._replace(values=inner(x.values, d)) for x, d in pairs),
            (x._replace(values=inner(x.values, x.values)) for x in weights_before),
            (x._replace(values=inner(d, d)) for x, d in pairs),
        )
        if now == self.schedule.events[0]:
            self._own["redundant"] = self._most_redundant(redundant, xd, xx, dd).to(torch.uint8)
            return
        lam = penalties(xd, xx, dd, self.penalty)
        products = self._penalise_(weights_before, torch.nan_to_num(lam / xx.sqrt(), posinf=0.0))
        leaves_half_space = self._sums(products)[0] < self.penalty.epsilon * xx
        self._freeze(self._agreed(redundant & leaves_half_space))

    def _penalise_(self, weights_before: Sequence[Part], pull: Tensor) -> list[Part]:
        """Subtracts learning rate * pull * x from the weights, with x the weights before the step.

        Args:
            pull: lambda / |x| of every group, (num_zigs,).

        Returns:
            the products of the weights after and before the step, whose sums are <x_hat, x>.
        """
        rates = self._learning_rates()
        params = self.parameters_by_name()
        products = []
        for s, index, x in weights_before:
            p = local(params[s.param])
            shape = [-1 if d == s.dim else 1 for d in range(x.dim())]
            owner = s.owner[index.cpu()].long()  # (k,)
            pull_of_row = pull[owner].view(shape).to(x.device, x.dtype)
            x_hat = p.index_select(s.dim, index) - rates[s.param] * (pull_of_row * x)
            p.index_copy_(s.dim, index, x_hat)
            products.append(Part(s, index, inner(x_hat, x)))
        return products

    def _directions(self, weights_before: Sequence[Part]) -> list[Tensor]:
        """The descent directions d that the base optimizer has taken, whatever it is.

        The step was x_half = x - rate * d, so d is (x - x_half) / rate.
        """
        rates = self._learning_rates()
        params = self.parameters_by_name()
        directions = []
        for s, index, x in weights_before:
            x_half = local(params[s.param]).index_select(s.dim, index)
            step = x - x_half
            directions.append(step / rates[s.param] if rates[s.param] else step)
        return directions

    def _learning_rates(self) -> dict[str, float]:
        rates = {}
        for group in self.param_groups:
            for name in group["param_names"]:
                rates[name] = float(group["lr"])
        return rates

    def _most_redundant(self, candidates: Tensor, xd: Tensor, xx: Tensor, dd: Tensor) -> Tensor:
        """As many of the groups as the target asks for, bool (num_zigs,)."""
        axis_of = torch.from_numpy(self.limits.axis_of)
        score = redundancy(xd, xx, dd, self._elements[axis_of])
        seen = torch.tensor(self._seen_axes(), dtype=torch.bool, device="cpu")  # (axes,)
        score = score.masked_fill(~seen[axis_of], -torch.inf)
        count = round(self.budget.dense - self.budget.goal)
        chosen = torch.zeros_like(candidates)
        chosen[torch.argsort(score, descending=True, stable=True)[:count]] = True
        return self._agreed(chosen & (score > -torch.inf))


def redundancy(xd: Tensor, xx: Tensor, dd: Tensor, elements: Tensor) -> Tensor:
    """How redundant each group is: the mean of cos(x, d) and of 1 / (|x| / elements), each L2-normalised.

    Args:
        xd, xx, dd: <x, d>, |x|^2 and |d|^2 of each group, (n,), with weights x and descent direction d.
        elements: the number of parameters of each group, (n,).
    """
    cosine = torch.nan_to_num(xd / (xx * dd).sqrt(), posinf=0.0, neginf=0.0)
    smallness = 1 / (xx.sqrt() / elements + 1e-6)
    normalize = torch.nn.functional.normalize
    return 0.5 * normalize(cosine, dim=0) + 0.5 * normalize(smallness, dim=0)


def penalties(xd: Tensor, xx: Tensor, dd: Tensor, penalty: Penalty) -> Tensor:
    """Lambda of each group, (n,): the given one, or a larger one where the step alone would make the norm grow.

    Args:
        xd, xx, dd: <x, d>, |x|^2 and |d|^2 of each group, (n,), with weights x and descent direction d.
    """
    lowest = -xd / xx.sqrt()  # with more than this the norm shrinks
    highest = -dd * xx.sqrt() / xd  # with less than this the loss still descends
    raised = (penalty.amplify * lowest).clamp(penalty.lam, penalty.bound * penalty.lam)
    raised = torch.where(raised >= highest, (lowest + highest) / 2, raised)
    would_grow = xd < 0
    return torch.where(would_grow, raised, torch.full_like(xd, penalty.lam))
