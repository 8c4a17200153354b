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
from accelerate.utils import extract_model_from_parallel
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from .calls import Call, Forward, as_forwards, at_home, device_of, input_tensors
from .modeling_oto import OTOError

Batches = Call | Iterable[Call] | Dataset | IterableDataset
NO_LABEL = -100  # what labels are padded with
OTHER_NAMES_OF_LABELS = ("label", "label_ids")  # collators of Transformers rename them, too


def calls_of(model: nn.Module, batches: Batches, batch_size: int, max_batches: int) -> list[Forward]:
    """The calls that some batches stand for.

    Args:
        batches: a batch as in `partition_zigs`, a list or a loader of such, or a dataset with the columns that the
            model's forward takes.
        batch_size: rows of a dataset in a batch.
        max_batches: no more are read.

    Raises:
        OTOError: there is no batch, or a dataset has no column for the model.
        ValueError: a batch can't be the arguments of a forward, or a number is out of range.
    """
    for name, value in (("batch_size", batch_size), ("max_batches", max_batches)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} is {value!r}: it must be a whole number, at least 1")
    if isinstance(batches, (Dataset, IterableDataset)):
        batches = _of_dataset(model, batches, batch_size)
    if isinstance(batches, (Mapping, Tensor, tuple, Forward)):
        batches = _one(batches)
    if not isinstance(batches, Iterable):
        raise ValueError(
            f"batches is a {type(batches).__name__}: pass a batch, a list or a loader of such, or a dataset"
        )
    forwards: list[Forward] = []
    for batch in itertools.islice(batches, max_batches):
        forwards += as_forwards(_taken_by(model, batch))
        tensors = input_tensors(forwards[-1:])
        if tensors and not any(tensor.numel() for tensor in tensors):
            raise ValueError(f"batch {len(forwards) - 1} has no rows: leave empty batches out")
    if not forwards:
        raise OTOError("there is no batch: pass at least one, with which the model can be run")
    device = device_of(model)
    if device is not None:
        forwards = [forward._replace(home=torch.device("cpu")).copy_on(device) for forward in forwards]
    return at_home(forwards, model)


def _one(batch: Call) -> list[Call]:
    if isinstance(batch, Mapping) and any(isinstance(part, Dataset) for part in batch.values()):
        raise ValueError(f"batches is a dict of datasets, {', '.join(batch)}: pass one of them")
    return [batch]


def _parameters_of_forward(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    # around a compiled model or a parallel one there is a module that takes anything
    inside = extract_model_from_parallel(model, keep_torch_compile=False)
    return inspect.signature(inside.forward).parameters


def _taken_by(model: nn.Module, batch: Any) -> Call:
    """What a forward takes of a batch: the entries that it names, or as many as it has positions.

    Raises:
        ValueError: there is no tensor among them.
    """
    if isinstance(batch, Forward):
        return batch
    parameters = _parameters_of_forward(model)
    if isinstance(batch, (list, tuple)):  # a loader gives lists
        taken = _taken_by_position(batch, parameters)
        entries = f"{len(batch)} positions"
    elif isinstance(batch, Mapping):
        taken = _taken_by_name(batch, parameters)
        entries = ", ".join(map(str, batch))
    else:
        return batch
    if not any(isinstance(value, Tensor) for value in tree_iter(taken)):
        raise ValueError(
            f"a batch has no tensor that {type(model).__name__} takes ({_first_names(model)}): it has {entries}; pass "
            "batches of tensors, a DataLoader of such, or a datasets.Dataset of rows"
        )
    return taken


def _taken_by_position(batch: Sequence[Any], parameters: Mapping[str, inspect.Parameter]) -> tuple[Any, ...]:
    takes_any_number = any(each.kind is inspect.Parameter.VAR_POSITIONAL for each in parameters.values())
    return tuple(batch) if takes_any_number else tuple(batch)[: len(parameters)]


def _taken_by_name(batch: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = {name for name, parameter in parameters.items() if parameter.kind not in variable}
    taken: dict[str, Any] = {}
    for key, value in batch.items():
        name = "labels" if key in OTHER_NAMES_OF_LABELS else key
        # a forward that only has **kwargs takes whatever there is
        if not names or name in names:
            taken[name] = value
    return taken


def _first_names(model: nn.Module) -> str:
    names = list(_parameters_of_forward(model))[:4]
    return ", ".join([*names, "..."])


def _of_dataset(model: nn.Module, dataset: Dataset | IterableDataset, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Batches of the rows of a dataset."""
    pad_token = getattr(getattr(model, "config", None), "pad_token_id", None)
    rows = iter(dataset)
    while chunk := list(itertools.islice(rows, batch_size)):
        yield _collated(model, chunk, pad_token or 0)


def _collated(model: nn.Module, rows: Sequence[Mapping[str, Any]], pad_token: int) -> dict[str, Tensor]:
    """One batch of rows, padded at the right where their lengths differ.

    Raises:
        OTOError: no column is an argument of the model's forward, or one holds no numbers.
    """
    parameters = _parameters_of_forward(model)
    batch: dict[str, Tensor] = {}
    for column in rows[0]:
        name = "labels" if column in OTHER_NAMES_OF_LABELS else column
        if name not in parameters:
            continue
        values = _values_of(column, rows)
        fill = {"input_ids": pad_token, "labels": NO_LABEL}.get(name, 0)
        batch[name] = _stacked(values, fill)
        lengths = {len(value) for value in values if value.dim()}
        is_padded = name == "input_ids" and len(lengths) > 1
        if is_padded and "attention_mask" not in rows[0]:
            ones = [torch.ones_like(value) for value in values]
            batch["attention_mask"] = _stacked(ones, 0)
    if not batch.keys() - {"labels"}:
        raise OTOError(
            f"the dataset has no column that {type(model).__name__} takes ({_first_names(model)}): it has "
            f"{', '.join(rows[0])}; apply the model's tokenizer or processor to it first"
        )
    return batch


def _values_of(column: str, rows: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    """One tensor for each row."""
    try:
        return [torch.as_tensor(row[column]) for row in rows]
    except (TypeError, ValueError, RuntimeError) as error:
        raise OTOError(f"the column {column!r} of the dataset holds no numbers: {error}") from error


def _stacked(values: Sequence[Tensor], fill: int) -> Tensor:
    """Tensors of equal shapes, or of different lengths, one upon the other."""
    shapes = {value.shape for value in values}
    if len(shapes) == 1:
        return torch.stack(list(values))
    return nn.utils.rnn.pad_sequence(list(values), batch_first=True, padding_value=fill)


class Rows:
    """Which rows of features count in one batch: those of padding don't, and of many only some do.

    A tensor of as many rows as a mask of the batch has positions is taken to have one row for each position.
    """

    def __init__(self, forward: Forward, seed: int = 0) -> None:
        self._seed = seed  # of the rows that are drawn
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
