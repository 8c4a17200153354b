"""The batches by which a model is pruned without training: calls of its forward, of which padding doesn't count.

Worked example: the two batches of a loader, each {"input_ids", "attention_mask", "labels", "text"}, become two calls
with the first three, on the device of the model. The strings are no argument of its forward, and are left out.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from .calls import Call, Forward, as_forwards, at_home, device_of
from .modeling_oto import OTOError

Batches = Call | Iterable[Call] | Dataset
NO_LABEL = -100  # what labels are padded with


def calls_of(model: nn.Module, batches: Batches, batch_size: int, max_batches: int) -> list[Forward]:
    """The calls that some batches stand for.

    Args:
        batches: a batch as in `partition_zigs`, a list or a loader of such, or a dataset with the columns that the
            model's forward takes.
        batch_size: rows of a dataset in a batch.
        max_batches: no more are read.

    Raises:
        OTOError: there is no batch, or a dataset has no column for the model.
        ValueError: a batch can't be the arguments of a forward.
    """
    if isinstance(batches, Dataset):
        batches = _of_dataset(model, batches, batch_size)
    is_one = isinstance(batches, (Mapping, Tensor, tuple, Forward))
    several = [batches] if is_one else itertools.islice(batches, max_batches)
    forwards: list[Forward] = []
    for batch in several:
        if isinstance(batch, Mapping):
            batch = _taken_by(model, batch)
        forwards += as_forwards(batch)
    if not forwards:
        raise OTOError("there is no batch: pass at least one, with which the model can be run")
    device = device_of(model)
    if device is not None:
        forwards = [forward._replace(home=torch.device("cpu")).copy_on(device) for forward in forwards]
    return at_home(forwards, model)


def _parameters_of_forward(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward).parameters


def _taken_by(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a batch that a model's forward names; all of them where it names none."""
    parameters = _parameters_of_forward(model)
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = {name for name, parameter in parameters.items() if parameter.kind not in kinds}
    return {name: value for name, value in batch.items() if not names or name in names}


def _of_dataset(model: nn.Module, dataset: Dataset, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Batches of the rows of a dataset."""
    first_row = _taken_by(model, dataset[0]) if len(dataset) else {}
    if not first_row:
        expected = ", ".join(list(_parameters_of_forward(model))[:4])
        raise OTOError(
            f"the dataset has no column that {type(model).__name__} takes ({expected}, ...): it has "
            f"{', '.join(dataset.column_names)}; apply the model's tokenizer or processor to it first"
        )
    pad_token = getattr(getattr(model, "config", None), "pad_token_id", None)
    for begin in range(0, len(dataset), batch_size):
        rows = [dataset[i] for i in range(begin, min(begin + batch_size, len(dataset)))]
        yield _collated(rows, first_row.keys(), pad_token or 0)


def _collated(rows: Sequence[Mapping[str, Any]], names: Iterable[str], pad_token: int) -> dict[str, Tensor]:
    """One batch of rows, padded at the right where their lengths differ."""
    batch: dict[str, Tensor] = {}
    for name in names:
        values = [torch.as_tensor(row[name]) for row in rows]
        fill = {"input_ids": pad_token, "labels": NO_LABEL}.get(name, 0)
        batch[name] = _stacked(values, fill)
        lengths = [len(value) for value in values if value.dim()]
        if name == "input_ids" and "attention_mask" not in rows[0] and len(set(lengths)) > 1:
            ones = [torch.ones_like(value) for value in values]
            batch["attention_mask"] = _stacked(ones, 0)
    return batch


def _stacked(values: Sequence[Tensor], fill: int) -> Tensor:
    """Tensors of equal shapes, or of different lengths, one upon the other."""
    if len({value.shape for value in values}) == 1:
        return torch.stack(list(values))
    return nn.utils.rnn.pad_sequence(list(values), batch_first=True, padding_value=fill)


class Rows:
    """Which rows of features count in one batch: those of padding don't, and of many only some do.

    A tensor of as many rows as a mask of the batch has positions is taken to have one row for each position.
    """

    def __init__(self, forward: Forward, seed: int = 0) -> None:
        self._seed = seed
        self._masks: dict[int, Tensor] = {}  # number of positions -> bool, those that count
        for name, value in forward.kwargs.items():
            if isinstance(value, Tensor) and value.dim() == 2 and name.endswith("attention_mask"):
                mask = value.reshape(-1) != 0
                # of two masks for as many positions, an encoder's and a decoder's, a row must pass both
                earlier = self._masks.get(len(mask))
                self._masks[len(mask)] = mask if earlier is None else mask & earlier

    def counting(self, num_rows: int, device: torch.device, most: int | None = None) -> Tensor:
        """The numbers of the rows that count, in order.

        Args:
            most: so many at most, drawn at random; the same ones every time.
        """
        mask = self._masks.get(num_rows)
        if mask is None:
            rows = torch.arange(num_rows)
        else:
            rows = mask.cpu().nonzero()[:, 0]
        if most is not None and len(rows) > most:
            generator = torch.Generator().manual_seed(self._seed)
            drawn = torch.randperm(len(rows), generator=generator)[:most]
            rows = rows[drawn.sort().values]
        return rows.to(device)

    def of_classes(self, output: Any) -> Tensor | None:
        """The logits of the rows that count, in float32, (rows, classes); None where an output has no such logits."""
        logits = output.get("logits") if isinstance(output, Mapping) else None
        if not isinstance(logits, Tensor) or logits.dim() < 2 or logits.shape[-1] == 1:
            return None
        if logits.dim() > 3:  # the classes of an image's pixels
            logits = logits.movedim(1, -1)
        flat = logits.reshape(-1, logits.shape[-1]).float()
        return flat[self.counting(len(flat), flat.device)]
