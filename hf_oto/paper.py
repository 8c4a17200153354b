"""OTOv2's own rule: warm up, choose the redundant ZIGs once, then penalty and half-space projection.

arXiv 2303.06862, Sec. 3.2, with the salience and the constants of the authors' release. The norm that it can remove is
the sum of learning rate times lambda: small learning rates miss the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .dhspg import DHSPG, inner
from .schedule import Schedule
from .slices import Part, local, rows_of
from .zigs import ZIGPartition


@dataclass(frozen=True)
class Penalty:
    """The paper's constants.

    Attributes:
        lam: lambda, the penalty on the norm of a redundant group.
        amplify: times the least penalty with which a group that would grow shrinks.
        bound: the largest penalty, in multiples of lambda.
        epsilon: of the half-space {z: <z, x> >= epsilon |x|^2}, in [0, 1).
    """

    lam: float
    amplify: float
    bound: float
    epsilon: float

    @classmethod
    def released(cls, base: type[torch.optim.Optimizer], epsilon: float = 0.0) -> Penalty:
        """What the release takes with this base optimizer; its tutorials have an epsilon of 0.9 or 0.95."""
        return cls(1e-3, 2.0, 10.0, epsilon) if issubclass(base, torch.optim.SGD) else cls(1e-2, 20.0, 1e3, epsilon)


class PaperDHSPG(DHSPG):
    """OTOv2's DHSPG (arXiv 2303.06862, Sec. 3.2) around any base optimizer. See `DHSPG` for what both share.

    Args:
        model, partition, base, lr, target_group_sparsity, total_steps, process_group, base_kwargs: as for `DHSPG`.
        start: fraction of the run that is warm-up.
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
        if wrong := more.keys() & {"target_params", "target_macs", "target_per_axis", "tied", "salience", "window"}:
            raise ValueError(f"{min(wrong)}: OTOv2's own rule has none, use DHSPG")
        self._start = start
        super().__init__(
            model, partition, base, lr, target_group_sparsity, total_steps, min_keep=0.0, group_divisible=1, **more
        )
        self.penalty = penalty or Penalty.released(type(self.base))
        self._weights_before: list[Part] = []

    def _scheduled(self, total_steps: int, window: Any, num_events: Any) -> Schedule:
        whole = super()._scheduled(total_steps, (self._start, 1.0), 1)
        return Schedule(whole.events[:1])

    def _has_pruned(self, now: int) -> bool:
        return self.target_reached

    # a step -----------------------------------------------------------------------------------

    def _before_step(self, now: int) -> None:
        """Keeps a copy of the weights of those groups that may be projected."""
        self._weights_before = []
        if not self.schedule.events or now < self.schedule.events[0]:
            return
        params = self._by_name()
        for s, index, _ in rows_of(self._redundant(now), self._group, params):
            p = local(params[s.param])
            self._weights_before.append(Part(s, index, p.index_select(s.dim, index)))

    def _redundant(self, now: int) -> Tensor:
        """The groups that are redundant, or at the choice may be, and aren't zero yet, bool (num_zigs,)."""
        if now == self.schedule.events[0]:
            return ~self.made_zero
        return (self._own["redundant"].cpu() > 0) & ~self.made_zero

    def _after_step(self, now: int) -> None:
        before, self._weights_before = self._weights_before, []
        if not self.schedule.events or now < self.schedule.events[0]:
            return
        redundant = self._redundant(now)
        if not redundant.any():
            return
        directions = self._directions(before)
        pairs = list(zip(before, directions, strict=True))
        xd, xx, dd = self._sums(
            (x._replace(values=inner(x.values, d)) for x, d in pairs),
            (x._replace(values=inner(x.values, x.values)) for x in before),
            (x._replace(values=inner(d, d)) for x, d in pairs),
        )
        if now == self.schedule.events[0]:
            self._own["redundant"] = self._most_redundant(redundant, xd, xx, dd).to(torch.uint8)
            return
        lam = penalties(xd, xx, dd, self.penalty)
        pull = torch.nan_to_num(lam / xx.sqrt(), posinf=0.0)  # (num_zigs,)
        rates, params, products = self._learning_rates(), self._by_name(), []
        for s, index, x in before:
            p = local(params[s.param])
            shape = [-1 if d == s.dim else 1 for d in range(x.dim())]
            pulled = pull[s.owner[index.cpu()].long()].view(shape).to(x.device, x.dtype) * x
            x_hat = p.index_select(s.dim, index) - rates[s.param] * pulled
            p.index_copy_(s.dim, index, x_hat)
            products.append(Part(s, index, inner(x_hat, x)))
        leaves_half_space = self._sums(products)[0] < self.penalty.epsilon * xx
        self._freeze(self._agreed(redundant & leaves_half_space))

    def _directions(self, before: Sequence[Part]) -> list[Tensor]:
        """The base optimizer's descent directions d: a d = x - x_half, a the learning rate, whatever the optimizer."""
        rates, params, directions = self._learning_rates(), self._by_name(), []
        for s, index, x in before:
            step = x - local(params[s.param]).index_select(s.dim, index)
            directions.append(step / rates[s.param] if rates[s.param] else step)
        return directions

    def _learning_rates(self) -> dict[str, float]:
        return {name: float(group["lr"]) for group in self.param_groups for name in group["param_names"]}

    def _most_redundant(self, candidates: Tensor, xd: Tensor, xx: Tensor, dd: Tensor) -> Tensor:
        """As many groups as the target asks for."""
        axis_of = torch.from_numpy(self.limits.axis_of)
        score = redundancy(xd, xx, dd, self._elements[axis_of])
        seen = torch.tensor(self._seen_axes(), dtype=torch.bool, device="cpu")
        score = score.masked_fill(~seen[axis_of], -torch.inf)
        count = round(self.budget.dense - self.budget.goal)
        chosen = torch.zeros_like(candidates)
        chosen[torch.argsort(score, descending=True, stable=True)[:count]] = True
        return self._agreed(chosen & (score > -torch.inf))


def redundancy(xd: Tensor, xx: Tensor, dd: Tensor, elements: Tensor) -> Tensor:
    """How redundant each group is, (n,): the mean of cos(x, d) and of 1 / (|x| / elements), each L2-normalised."""
    cosine = torch.nan_to_num(xd / (xx * dd).sqrt(), posinf=0.0, neginf=0.0)
    smallness = 1 / (xx.sqrt() / elements + 1e-6)
    normalize = torch.nn.functional.normalize
    return 0.5 * normalize(cosine, dim=0) + 0.5 * normalize(smallness, dim=0)


def penalties(xd: Tensor, xx: Tensor, dd: Tensor, penalty: Penalty) -> Tensor:
    """Lambda of each group, (n,): the given one, or between its bounds where the step would grow the norm."""
    lowest, highest = -xd / xx.sqrt(), -dd * xx.sqrt() / xd  # to shrink at all, and to descend still
    raised = (penalty.amplify * lowest).clamp(penalty.lam, penalty.bound * penalty.lam)
    raised = torch.where(raised >= highest, (lowest + highest) / 2, raised)
    return torch.where(xd < 0, raised, torch.full_like(xd, penalty.lam))
