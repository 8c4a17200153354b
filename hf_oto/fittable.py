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
from .mixing import Mixing, Normalization, Product, Seen, Tensors, Watched
from .modeling_oto import named_tensors
from .restore import Contents, contents

Sizes = tuple[torch.Size, ...]  # of the tensors of one batch


def one_by_one_(model: nn.Module) -> None:
    """Lets experts run one after the other, each on its own tokens, in place."""
    for part in outermost_pretrained(model).values():
        part.set_experts_implementation("eager")


class Fittable(NamedTuple):
    """What some forwards show of a matrix that can be fitted.

    Attributes:
        bias: the name of the bias that is added; None: none is, or not as a parameter of its own.
        is_steady: whether every forward multiplies by it once, as many rows as its batch has, so that a row of the cut
            model is a row of the dense one, and no module keeps tensors of a batch. (Experts get other tokens in the
            cut model.)
    """

    bias: str | None
    is_steady: bool


def fittable_weights(model: nn.Module, forwards: Sequence[Forward]) -> tuple[dict[Mixing, Fittable], dict[str, str]]:
    """The matrices that can be fitted, in the order of the forward, and the batch norms whose statistics can be taken
    anew: name of the means -> name of the variances."""
    looks = _Looks()
    keeps_tensors = False
    with evaluating(model):
        one_by_one_(model)
        tensors = Tensors(model)
        for number, forward in enumerate(forwards):
            kept_before = contents(model)
            looks.look(model, forward, number, tensors)
            keeps_tensors = keeps_tensors or _keeps_other_tensors(kept_before)
    sizes_of_batches = [_sizes_of(forward) for forward in forwards]
    refused = _used_otherwise(model, looks.uses) | looks.read_otherwise
    found: dict[Mixing, Fittable] = {}
    for mixing, uses in looks.uses.items():
        if mixing.name not in refused:
            is_steady = not mixing.index and not keeps_tensors and _are_steady(uses, sizes_of_batches)
            found[mixing] = Fittable(looks.bias_of(mixing), is_steady)
    # forwards that find each other's tensors must not walk together, and statistics are taken on such walks only
    return found, {} if keeps_tensors else looks.batch_norms


class _Use(NamedTuple):
    """One multiplication by a matrix."""

    forward: int  # its number
    num_rows: int


class _Looks:
    """What forwards have shown.

    Attributes:
        uses: of each matrix, in the order of the forward.
        batch_norms: name of the means -> name of the variances.
        read_otherwise: the names of parameters that something else than a product reads, an embedding, say.
    """

    def __init__(self) -> None:
        self.uses: dict[Mixing, list[_Use]] = {}
        self.batch_norms: dict[str, str] = {}
        self.read_otherwise: set[str] = set()
        self._biases: dict[Mixing, set[str | None]] = {}  # None: something else is added, or nothing

    def look(self, model: nn.Module, forward: Forward, number: int, tensors: Tensors) -> None:
        """Runs one forward; `tensors` are the model's."""

        def before(seen: Seen) -> None:
            if isinstance(seen, Normalization):
                mean, variance = tensors.named(seen.mean), tensors.named(seen.variance)
                if mean is not None and variance is not None:
                    self.batch_norms[mean] = variance
                return
            use = _Use(number, len(seen.inputs()))
            self.uses.setdefault(seen.mixing, []).append(use)
            self._biases.setdefault(seen.mixing, set()).add(_bias(seen, tensors))

        with Watched(tensors, before, otherwise=self.read_otherwise.add):
            forward.run(model)

    def bias_of(self, mixing: Mixing) -> str | None:
        """The bias that belongs to a matrix alone; None: there is none."""
        name, *others = self._biases[mixing]
        times_added = Counter(each for names in self._biases.values() for each in names)
        is_own = not others and times_added[name] == 1 and name not in self.read_otherwise
        return name if is_own else None


def _bias(product: Product, tensors: Tensors) -> str | None:
    """The name of the parameter that a product adds to each of its rows."""
    is_row = product.added is not None and product.added.dim() == 1
    return tensors.named(product.added) if is_row else None


def _keeps_other_tensors(before: Contents) -> bool:
    """Whether the modules keep tensors that they did not keep before: those of a batch, which others must not find."""
    for container, copied in before.containers:
        if isinstance(container, dict):
            for key, value in container.items():
                if isinstance(value, torch.Tensor) and copied.get(key) is not value:
                    return True
    return False


def _sizes_of(forward: Forward) -> Sizes:
    return tuple(tensor.shape for tensor in input_tensors([forward]))


def _are_steady(uses: Sequence[_Use], sizes_of_batches: Sequence[Sizes]) -> bool:
    """Whether every forward makes a product once, with a number of rows that follows from the sizes of its batch."""
    if [use.forward for use in uses] != list(range(len(sizes_of_batches))):
        return False
    rows_of_sizes: dict[Sizes, int] = {}
    for use, sizes in zip(uses, sizes_of_batches, strict=True):
        batch_size = next((shape[0] for shape in sizes if shape), 1)
        if use.num_rows % max(1, batch_size):
            return False
        # batches of equal sizes must show equally many rows
        if rows_of_sizes.setdefault(sizes, use.num_rows) != use.num_rows:
            return False
    return True


def _used_otherwise(model: nn.Module, mixings: Iterable[Mixing]) -> set[str]:
    """The parameters that stay as they are cut: tied ones, and those that are read along several dimensions."""
    names_of_id: dict[int, list[str]] = {}
    for name, tensor in named_tensors(model).items():
        names_of_id.setdefault(id(tensor), []).append(name)
    refused: set[str] = set()
    for names in names_of_id.values():
        if len(names) > 1:
            refused.update(names)
    dims_of_name: dict[str, set[tuple[int, int]]] = {}
    for mixing in mixings:
        dims_of_name.setdefault(mixing.name, set()).add((mixing.in_dim, mixing.out_dim))
    return refused | {name for name, dims in dims_of_name.items() if len(dims) > 1}
