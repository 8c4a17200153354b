"""The first examples of a training set: a few, taken once, collated as training will, and given back.

Stands at the beginning of the run: on them the trainer shows what it does with its model. No example is lost to
training, whether the data can be indexed, read again, or read only once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import datasets
from accelerate.data_loader import DataLoaderStateMixin, IterableDatasetShard
from torch.utils.data import IterableDataset

from .calls import own_copy

FEW = 2  # examples: batch norms and contrasts in a batch want more than one


class Tape:
    """What was read of an iterator before its time, to be read again.

    Attributes:
        seen: all that was read so far.
    """

    def __init__(self, begin: Callable[[], Iterator[Any]]) -> None:
        self._begin = begin
        self._iterator: Iterator[Any] | None = None
        self.seen: list[Any] = []

    def look(self) -> Iterator[Any]:
        """All from the first on, as often as it takes: copies, since collators take keys out of examples."""
        for position in itertools.count():
            if position == len(self.seen):
                if self._iterator is None:
                    self._iterator = self._begin()
                self.seen += itertools.islice(self._iterator, 1)
            if position == len(self.seen):
                return
            yield own_copy(self.seen[position])

    def rewound(self) -> Iterator[Any]:
        """All from the first on, for the last time."""
        return self._begin() if self._iterator is None else itertools.chain(self.seen, self._iterator)


def _taped(stream: IterableDataset) -> Tape:
    """A tape under a stream: it is read instead, until training begins to read.

    The stream stays the user's own object, with its length and attributes; only its class is, until then, a subclass
    of its own class.
    """
    cls = type(stream)
    if "_oto_tape" in vars(cls):
        return vars(cls)["_oto_tape"]
    tape = Tape(lambda: cls.__iter__(stream))
    subclass = type(cls)(cls.__name__, (cls,), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})
    subclass._oto_tape = tape

    def read(self: IterableDataset) -> Iterator[Any]:
        if vars(subclass).get("_oto_looking"):
            return tape.look()
        object.__setattr__(stream, "__class__", cls)
        return tape.rewound()

    subclass.__iter__ = read  # not in the class body, where the metaclass of data pipes would wrap it
    object.__setattr__(stream, "__class__", subclass)
    return tape


class Beginning:
    """The beginning of what a data loader reads. While it is open nothing is taken away from training.

    Args:
        loader: the one that training will read, or any iterable of batches.
        batch_size: of the training.

    Attributes:
        taken: batches that can't be given back to the loader, as it is an iterator: training has to begin with them.
    """

    def __init__(self, loader: Any, batch_size: int) -> None:
        self._loader, self._batch_size = loader, batch_size
        dataset = getattr(loader, "dataset", None)
        while isinstance(dataset, IterableDatasetShard):
            dataset = dataset.dataset
        self._dataset, self._collate = dataset, getattr(loader, "collate_fn", None)
        self._in_workers = getattr(loader, "num_workers", 0) > 0
        # streams of `datasets`, and those that are told the epoch, begin anew; workers read copies
        anew = isinstance(dataset, datasets.IterableDataset) or hasattr(dataset, "set_epoch")
        self._is_taped = isinstance(dataset, IterableDataset) and not anew and not self._in_workers
        self._tape = Tape(lambda: loader) if isinstance(loader, Iterator) else None

    @property
    def taken(self) -> list[Any]:
        return [] if self._tape is None else self._tape.seen

    @property
    def owners(self) -> list[Any]:
        """The objects whose attributes reading changes; a stream on a tape has been read, and its own stay."""
        sampler = getattr(self._loader, "batch_sampler", None)
        found = [self._collate, sampler, getattr(sampler, "sampler", None), getattr(self._loader, "sampler", None)]
        found += [getattr(self._collate, "__self__", None), None if self._is_taped else self._dataset]
        return [owner for owner in found if hasattr(owner, "__dict__")]

    def __enter__(self) -> Beginning:
        if self._is_taped:
            _taped(self._dataset)
            type(self._dataset)._oto_looking = True
        return self

    def __exit__(self, *_: Any) -> None:
        if self._is_taped:
            type(self._dataset)._oto_looking = False

    def batches(self) -> Iterator[Callable[[], Any]]:
        """Makers of small batches to try, one after the other: of a few examples, of others from further on (the
        first may have no label), of one (lengths may differ, and the collator not pad), and at last the loader's own
        first one."""
        is_stream = isinstance(self._dataset, IterableDataset)
        indexed = hasattr(self._dataset, "__getitem__") and hasattr(self._dataset, "__len__")
        if self._collate is not None and (is_stream or indexed) and not (is_stream and self._in_workers):
            for start, count in ((0, FEW), (self._batch_size if is_stream else None, FEW), (0, 1)):
                yield lambda start=start, count=count: self._collate(self._examples(start, count))
        yield self._first_of_loader

    def _examples(self, start: int | None, count: int) -> list[Any]:
        """Examples from `start` on, None: from the middle."""
        if isinstance(self._dataset, IterableDataset):
            some = list(itertools.islice(iter(self._dataset), start, start + count))
        else:
            start = len(self._dataset) // 2 if start is None else start
            # copies: collators take keys out of examples
            some = [own_copy(self._dataset[i]) for i in range(start, min(start + count, len(self._dataset)))]
        if not some:
            raise ValueError(f"there is no example number {start} in the training set")
        return some

    def _first_of_loader(self) -> Any:
        batches = iter(self._loader) if self._tape is None else self._tape.look()
        try:
            for batch in batches:
                return batch
        finally:
            if isinstance(self._loader, DataLoaderStateMixin):
                self._loader.end()  # what it tells accelerate where it is reading
        raise ValueError("the training set has no example")
