"""Which weights a forward multiplies features by, and which of them can be fitted anew.

Worked example: in Linear(3, 8), ReLU, Linear(8, 2) both weights can be, each with its bias. If the second layer had
the first one's weight, transposed, neither could, because each would spoil the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from .calls import Forward, input_tensors, outermost_pretrained
from .evaluating import evaluating
from .mixing import Mixing, Product, Seen, Tensors, Watched
from .modeling_oto import named_tensors
from .restore import Contents, contents


def one_by_one_(model: nn.Module) -> None:
    """Lets experts run one after the other, each on its own tokens, in place."""
    for part in outermost_pretrained(model).values():
        part.set_experts_implementation("eager")


class Place(NamedTuple):
    """What some forwards show of a matrix.

    Attributes:
        bias: the name of the bias that is added; None: none is, or not as a parameter of its own.
        is_steady: whether every forward multiplies by it once, as many rows as its batch has, so that a row of the cut
            model is a row of the dense one, and no module keeps tensors of a batch. (Experts get other tokens in the
            cut model.)
    """

    bias: str | None
    is_steady: bool


def looked_at(model: nn.Module, forwards: Sequence[Forward]) -> tuple[dict[Mixing, Place], dict[str, str]]:
    """What some forwards multiply by, in order, and their batch norms: name of the means -> name of the variances."""
    numbers_of_rows: dict[Mixing, list[tuple[int, int]]] = {}  # (number of a forward, rows), for each product
    names_of_added: dict[Mixing, set[str | None]] = {}
    statistics: dict[str, str] = {}
    read_otherwise: set[str] = set()
    keeps_tensors = False
    with evaluating(model):
        one_by_one_(model)
        tensors = Tensors(model)
        for number, forward in enumerate(forwards):

            def before(seen: Seen, number: int = number) -> None:
                if isinstance(seen, Product):
                    rows = len(seen.inputs())
                    numbers_of_rows.setdefault(seen.mixing, []).append((number, rows))
                    is_bias = seen.added is not None and seen.added.dim() == 1
                    name = tensors.named(seen.added) if is_bias else None
                    names_of_added.setdefault(seen.mixing, set()).add(name)
                else:
                    mean, variance = tensors.named(seen.mean), tensors.named(seen.variance)
                    if mean is not None and variance is not None:
                        statistics[mean] = variance

            kept_before = contents(model)
            with Watched(tensors, before, otherwise=read_otherwise.add):
                forward.run(model)
            keeps_tensors = keeps_tensors or _keeps_other_tensors(kept_before)
    sizes = [_sizes_of_batch(forward) for forward in forwards]
    times_added = Counter(name for names in names_of_added.values() for name in names)
    refused = _used_otherwise(model, numbers_of_rows) | read_otherwise
    found: dict[Mixing, Place] = {}
    for mixing, numbers in numbers_of_rows.items():
        name, *others = names_of_added[mixing]
        is_own = not others and times_added[name] == 1 and name not in read_otherwise
        is_steady = not mixing.index and not keeps_tensors and _are_steady(numbers, sizes)
        if mixing.name not in refused:
            found[mixing] = Place(name if is_own else None, is_steady)
    # forwards that find each other's tensors must not walk together, and statistics are taken on such walks only
    return found, {} if keeps_tensors else statistics


def _keeps_other_tensors(before: Contents) -> bool:
    """Whether the modules keep tensors that they did not keep before: those of a batch, which others must not find."""
    for container, copied in before.containers:
        if isinstance(container, dict):
            for key, value in container.items():
                if isinstance(value, torch.Tensor) and copied.get(key) is not value:
                    return True
    return False


def _sizes_of_batch(forward: Forward) -> tuple[torch.Size, ...]:
    return tuple(tensor.shape for tensor in input_tensors([forward]))


def _are_steady(numbers_of_rows: Sequence[tuple[int, int]], sizes: Sequence[tuple[torch.Size, ...]]) -> bool:
    """Whether every forward makes a product once, with a number of rows that follows from the sizes of its batch.

    Args:
        numbers_of_rows: (number of the forward, rows) for each product.
        sizes: of the tensors of each batch.
    """
    if [number for number, _ in numbers_of_rows] != list(range(len(sizes))):
        return False
    rows_of_sizes: dict[tuple[torch.Size, ...], int] = {}
    for number, rows in numbers_of_rows:
        batch_size = next((shape[0] for shape in sizes[number] if shape), 1)
        if rows % max(1, batch_size) or rows_of_sizes.setdefault(sizes[number], rows) != rows:
            return False
    return True


def _used_otherwise(model: nn.Module, mixings: Iterable[Mixing]) -> set[str]:
    """The parameters that stay as they are cut: tied ones, and those that are read along several dimensions."""
    names_of_id: dict[int, list[str]] = {}
    for name, tensor in named_tensors(model).items():
        names_of_id.setdefault(id(tensor), []).append(name)
    refused = {name for names in names_of_id.values() if len(names) > 1 for name in names}
    dims_of_name: dict[str, set[tuple[int, int]]] = {}
    for mixing in mixings:
        dims_of_name.setdefault(mixing.name, set()).add((mixing.in_dim, mixing.out_dim))
    return refused | {name for name, dims in dims_of_name.items() if len(dims) > 1}
