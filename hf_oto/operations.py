"""What torch's operations are like: which of them write, look something up, or multiply a large matrix.

Wide arithmetic (wide.py, narrow.py) asks this of every operation. Everything here is read off schemas, or stands in a
table with the reason.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

OWN = ("aten", "prims", "prim", "higher_order")  # namespaces of operations that compute in the dtype they are given

SMALLER = (torch.float32, torch.float16, torch.bfloat16)  # from the finest on

# These do no arithmetic: what they choose can be widened afterwards.
CHOOSING = {"embedding", "index", "index_select", "gather", "take", "masked_select", "clone", "_to_copy"}

MAKING = (torch.tensor, torch.full, torch.scalar_tensor)  # of numbers, in the default dtype

CHECKING: dict[Any, tuple] = {  # functions that compare dtypes themselves -> what they leave alone: large weights
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), (1, "weight")),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), (1, "weight")),
    **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), ()),
    **dict.fromkeys((F.scaled_dot_product_attention, F.rms_norm, torch.rms_norm), ()),
}


# products of large matrices ------------------------------------------------------------------------


class Split(NamedTuple):
    """How a product is computed piece by piece.

    Attributes:
        dims: argument -> the dimension of it that is split, counted from the end where it may be broadcast.
        along: the dimension of the result that these are.
    """

    dims: dict[int, int]
    along: int


def _split_of_convolution(args: Sequence) -> Split | None:
    """Output channels are split: dimension 0 of the weight, or 1 of that of a transposed convolution."""
    is_transposed, groups = args[6], args[8]
    if groups != 1:
        return None
    return Split({1: 1 if is_transposed else 0, 2: 0}, along=1)


_MM, _MV, _BMM = torch.ops.aten.mm.default, torch.ops.aten.mv.default, torch.ops.aten.bmm.default
_ADDMM, _BADDBMM = torch.ops.aten.addmm.default, torch.ops.aten.baddbmm.default
_BY_BATCH = Split({0: -3, 1: 0, 2: 0}, along=0)

SPLITS: dict[Any, dict[int, Split | Callable[[Sequence], Split | None]]] = {  # operation -> the large argument -> how
    _MM: {0: Split({0: 0}, along=0), 1: Split({1: 1}, along=1)},
    _MV: {0: Split({0: 0}, along=0)},
    _BMM: {0: Split({0: 0, 1: 0}, along=0), 1: Split({0: 0, 1: 0}, along=0)},
    _ADDMM: {1: Split({0: -2, 1: 0}, along=0), 2: Split({0: -1, 2: 1}, along=1)},
    _BADDBMM: {1: _BY_BATCH, 2: _BY_BATCH},
    torch.ops.aten.convolution.default: {1: _split_of_convolution},
}


def split_of(func: Any, args: Sequence, large: int) -> Split | None:
    """How a product is computed by pieces of one of its arguments, None if it can't be."""
    how = SPLITS[func][large]
    return how if isinstance(how, Split) else how(args)


# schemas -------------------------------------------------------------------------------------------


class Operation(NamedTuple):
    """What the schema of an operation says.

    Attributes:
        name: without namespace and overload.
        is_view: its result shares memory with what it is given.
        writes: (position, name) of the arguments it writes into.
        only_writes: it returns nothing else.
    """

    name: str
    is_view: bool
    writes: tuple[tuple[int, str], ...]
    only_writes: bool


@functools.cache
def operation(func: Any) -> Operation:
    """What the schema of an operation says.

    Example:
        >>> operation(torch.ops.aten.add_.Tensor)
        Operation(name='add_', is_view=False, writes=((0, 'self'),), only_writes=True)
    """
    if not isinstance(func, torch._ops.OpOverload):  # an operator above ATen has no schema
        return Operation(func.name(), is_view=False, writes=(), only_writes=False)
    schema = func._schema
    name = schema.name.split("::")[1]
    writes = []
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            writes.append((position, argument.name))
    shared = [result.alias_info for result in schema.returns]
    is_view = any(info is not None and not info.is_write for info in shared)
    if name in ("lift", "lift_fresh"):  # by their schema views, of a constant that nobody else has
        is_view = False
    only_writes = bool(writes) and all(info is not None for info in shared)
    return Operation(name, is_view, tuple(writes), only_writes)


class OperationCall(NamedTuple):
    """One call of an operation.

    Attributes:
        written: the tensors that it writes into.
    """

    func: Any
    args: Sequence
    kwargs: Mapping[str, Any]
    written: Sequence[torch.Tensor]

    @property
    def tensors(self) -> Iterator[torch.Tensor]:
        """The tensors that it takes, in lists too."""
        return tensors_in((*self.args, *self.kwargs.values()))


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """The tensors among values, in lists and tuples too."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


def is_foreign(tensor: torch.Tensor) -> bool:
    """Whether a tensor is of a subclass that dispatches by itself: only the subclass knows what its storage means."""
    return type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that there is no memory left: on a CPU that is a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
