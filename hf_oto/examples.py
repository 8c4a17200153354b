"""The first examples of a training set: a few, taken once, collated as training will, and given back to a stream.

Stands at the beginning of the run: on them the trainer shows what it does with its model. No example is lost to
training, whether the data can be indexed, read again, or read only once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import IterableDataset

FEW = 2  # examples: batch norms and contrasts in a batch want more than one


class Rewound(IterableDataset):
    """A stream whose first examples can be looked at: the first iteration begins with them and goes on from there.

    Args:
        dataset: may be one that begins anew with every iteration, or one that never does.
    """

    def __init__(self, dataset: IterableDataset) -> None:
        self.dataset = dataset
        self._iterator: Iterator[Any] | None = None
        self._seen: list[Any] = []

    def first(self, start: int, stop: int) -> list[Any]:
        """Examples number `start` to `stop` of the next iteration, fewer if there are no more."""
        if self._iterator is None:
            self._iterator = iter(self.dataset)
        self._seen += itertools.islice(self._iterator, max(0, stop - len(self._seen)))
        return self._seen[start:stop]

    def __iter__(self) -> Iterator[Any]:
        if self._iterator is None:
            return iter(self.dataset)
        seen, rest = self._seen, self._iterator
        self._seen, self._iterator = [], None
        return itertools.chain(seen, rest)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)


def first_batches(loader: Any, batch_size: int, stream: Rewound | None = None) -> Iterator[Callable[[], Any]]:
    """Makers of small batches to try, one after the other: of a few examples, of others from further on (the first
    may have no label), of one (lengths may differ, and the collator not pad), and at last the loader's own first one.

    Args:
        loader: the training's data loader, or whatever yields batches: then only its own is tried.
        batch_size: of the training.
        stream: the data set that it reads, if that is a stream.
    """
    dataset, collate = getattr(loader, "dataset", None), getattr(loader, "collate_fn", None)
    if collate is not None and stream is not None:
        for start, count in ((0, FEW), (batch_size, FEW), (0, 1), (0, batch_size)):
            yield lambda start=start, count=count: collate(stream.first(start, start + count))
        return  # the loader would read ahead, and what it reads is lost
    if collate is not None and hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        for start, count in ((0, FEW), (len(dataset) // 2, FEW), (0, 1)):
            some = range(start, min(start + count, len(dataset)))
            yield lambda some=some: collate([dataset[i] for i in some])
    yield lambda: next(iter(loader))
