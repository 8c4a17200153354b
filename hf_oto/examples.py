"""The first examples of a training set: read before training, collated as training will, and given back to it.

On them the trainer shows what it does with its model. No example is lost to training, whether the data can be indexed,
read again, or read only once.

Worked example: a stream of 1, 2, 3, ... that can be read once. `Beginning` reads 1 and 2 through a `Tape`, which
remembers them; training then gets 1, 2 from the tape, and 3, ... from the stream.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import datasets
from accelerate.data_loader import DataLoaderStateMixin, IterableDatasetShard
from torch.utils.data import IterableDataset

from .calls import own_copy

FEW = 2  # examples: batch norms, and losses that compare the examples of a batch, want more than one


class Tape:
    """What was read of an iterator before training, to be read again.

    Args:
        begin: makes the iterator, when the first example is asked for.

    Attributes:
        seen: all that was read so far.

    Example:
        >>> tape = Tape(lambda: iter("abc"))
        >>> next(tape.look()), next(tape.look()), list(tape.rewound())
        ('a', 'a', ['a', 'b', 'c'])
    """

    def __init__(self, begin: Callable[[], Iterator[Any]]) -> None:
        self._begin = begin
        self._iterator: Iterator[Any] | None = None
        self.seen: list[Any] = []

    def look(self) -> Iterator[Any]:
        """All from the first on, as often as it is called: copies, since collators take keys out of examples."""
        for position in itertools.count():
            if position == len(self.seen):
                if self._iterator is None:
                    self._iterator = self._begin()
                self.seen += itertools.islice(self._iterator, 1)
            if position == len(self.seen):  # the iterator is at its end
                return
            yield own_copy(self.seen[position])

    def rewound(self) -> Iterator[Any]:
        """All from the first on, for the last time."""
        if self._iterator is None:
            return self._begin()
        return itertools.chain(self.seen, self._iterator)


def _taped(stream: IterableDataset) -> Tape:
    """A tape that is read in the place of a stream, until training begins to read.

    The stream stays the user's own object, with its length and attributes; until training reads it, its class is a
    subclass of its own class.
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
        object.__setattr__(stream, "__class__", cls)  # training has begun
        return tape.rewound()

    subclass.__iter__ = read  # not in the class body, where the metaclass of data pipes would wrap it
    object.__setattr__(stream, "__class__", subclass)
    return tape


class Beginning:
    """The beginning of what a data loader reads. Nothing that is read while it is open is taken away from training.

    Args:
        loader: the loader that training will read, or any iterable of batches.
        batch_size: of the training.
    """

    def __init__(self, loader: Any, batch_size: int) -> None:
        self._loader = loader
        self._batch_size = batch_size
        dataset = getattr(loader, "dataset", None)
        while isinstance(dataset, IterableDatasetShard):
            dataset = dataset.dataset
        self._dataset = dataset
        self._collate = getattr(loader, "collate_fn", None)
        self._in_workers = getattr(loader, "num_workers", 0) > 0
        # Streams of `datasets`, and streams that are told the epoch, begin anew when they are read again.
        begins_anew = isinstance(dataset, datasets.IterableDataset) or hasattr(dataset, "set_epoch")
        # Workers read copies of the dataset, so that the dataset itself is not read at all.
        self._is_taped = isinstance(dataset, IterableDataset) and not begins_anew and not self._in_workers
        self._tape = Tape(lambda: loader) if isinstance(loader, Iterator) else None

    @property
    def taken(self) -> list[Any]:
        """The batches that training has to begin with: an iterator doesn't take back what was read of it."""
        return [] if self._tape is None else self._tape.seen

    @property
    def owners(self) -> list[Any]:
        """The objects whose attributes reading changes, and that have to be put back."""
        batch_sampler = getattr(self._loader, "batch_sampler", None)
        objects = [
            self._collate,
            batch_sampler,
            getattr(batch_sampler, "sampler", None),
            getattr(self._loader, "sampler", None),
            getattr(self._collate, "__self__", None),
        ]
        if not self._is_taped:  # a stream on a tape really has been read, and has to know it
            objects.append(self._dataset)
        return [owner for owner in objects if hasattr(owner, "__dict__")]

    def __enter__(self) -> Beginning:
        if self._is_taped:
            _taped(self._dataset)
            type(self._dataset)._oto_looking = True
        return self

    def __exit__(self, *_: Any) -> None:
        if self._is_taped:
            type(self._dataset)._oto_looking = False

    def batches(self) -> Iterator[Callable[[], Any]]:
        """Makers of small batches to try, one after the other; the last one gives the loader's own first batch."""
        is_stream = isinstance(self._dataset, IterableDataset)
        is_indexed = hasattr(self._dataset, "__getitem__") and hasattr(self._dataset, "__len__")
        is_readable = not self._in_workers if is_stream else is_indexed
        if self._collate is not None and is_readable:
            yield functools.partial(self._batch, 0, FEW)
            # The first examples may have no label.
            yield functools.partial(self._batch, self._batch_size if is_stream else None, FEW)
            # The lengths of examples may differ, and the collator may not pad.
            yield functools.partial(self._batch, 0, 1)
        yield self._first_of_loader

    def _batch(self, start: int | None, count: int) -> Any:
        """A batch of examples from `start` on. None: from the middle of the training set."""
        if isinstance(self._dataset, IterableDataset):
            examples = list(itertools.islice(iter(self._dataset), start, start + count))
        else:
            num_examples = len(self._dataset)
            if start is None:
                start = num_examples // 2
            stop = min(start + count, num_examples)
            # Copies, since collators take keys out of examples.
            examples = [own_copy(self._dataset[i]) for i in range(start, stop)]
        if not examples:
            raise ValueError(f"there is no example number {start} in the training set")
        return self._collate(examples)

    def _first_of_loader(self) -> Any:
        batches = iter(self._loader) if self._tape is None else self._tape.look()
        try:
            for batch in batches:
                return batch
        finally:
            if isinstance(self._loader, DataLoaderStateMixin):
                self._loader.end()  # as at the end of an epoch: accelerate notes which loader is being read
        raise ValueError("the training set has no example")
