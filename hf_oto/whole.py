"""The end of a run whose model every rank holds whole: rank 0 certifies and measures, and all ranks follow.

sharded.py does the same where FSDP2 has sharded the model.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .calls import Forward
from .certificate import Certificate, certify, own_outputs, zeroed
from .compaction import Compaction
from .cut import Cut, TrialCut
from .differences import largest_difference
from .ranks import of_rank_zero
from .report import measure, size
from .uniform import Tie, plain
from .zigs import PruningPlan, ZIGPartition

logger = logging.getLogger(__name__)


class WholeWeights:
    """A trained model and its weights. All ranks call every method together.

    Attributes:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def zeros(self, partition: ZIGPartition) -> PruningPlan:
        """The plan that removes every ZIG that is exactly zero."""
        return PruningPlan.from_zeros(self.model, partition)

    def zero_(self, partition: ZIGPartition, plan: PruningPlan) -> None:
        """Zeroes, in place, the ZIGs that a plan removes."""
        partition.zero_(self.model, plan)

    def certify(self, cut: Cut, forwards: Sequence[Forward]) -> Certificate:
        """The certificate of a cut."""
        return of_rank_zero(lambda: certify(self.model, cut, forwards))

    def run(self, forwards: Sequence[Forward]) -> None:
        """Runs the model once, so that what it raises is raised here."""
        of_rank_zero(lambda: bool(own_outputs(self.model, forwards)))

    def moved_by_zeroing(self, cut: Cut, forwards: Sequence[Forward]) -> float:
        """How far outputs move, relative to their size, when what a cut removes is zeroed."""

        def how_far() -> float:
            before = own_outputs(self.model, forwards)
            with zeroed(self.model, cut):
                return largest_difference(before, own_outputs(self.model, forwards))

        return of_rank_zero(how_far)

    def measured(self, compaction: Compaction, rest: Cut, forwards: Sequence[Forward]) -> list[dict[str, Any]]:
        """What the dense and the compact model take. Measuring runs them, and what goes wrong with that is a warning.

        Args:
            rest: what is still to be cut.
        """
        trials = [compaction.trial_dense(self.model), TrialCut(self.model, rest)]
        try:
            return of_rank_zero(lambda: measure(*trials, inputs=forwards))
        except Exception as error:
            logger.warning("the models could not be measured: %s: %s", type(error).__name__, error)
        sizes = []
        for trial in trials:
            with trial as changed:
                sizes.append(size(changed))
        return sizes

    def keep_(self, compaction: Compaction, cut: Cut) -> None:
        """Cuts the model for good."""
        compaction.keep_(self.model, cut)

    def stock(
        self, partition: ZIGPartition, plan: PruningPlan, ties: Sequence[Tie], forwards: Sequence[Forward]
    ) -> bool:
        """Puts a stock model in the place of the cut one, whose config says its widths; whether there is one."""
        stock = plain(self.model, partition, plan, ties, forwards)  # the same on every rank
        if stock is None:
            return False
        self.model = stock
        return True

    @contextlib.contextmanager
    def whole_on_disk(self, folder: str | Path, writes: bool) -> Iterator[None]:
        """While open, the model has whole weights, as it always has."""
        yield
