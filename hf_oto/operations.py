"""What torch's operations are like: which of them write, look something up, or multiply a large matrix.

Wide arithmetic (wide.py, narrow.py) asks this about every operation. The answers are read off schemas, or stand in a
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

# These do no arithmetic: the values that they choose can be widened afterwards.
CHOOSING = {"embedding", "index", "index_select", "gather", "take", "masked_select", "clone", "_to_copy"}

MAKING = (torch.tensor, torch.full, torch.scalar_tensor)  # tensors from numbers, in the default dtype

# Some functions compare dtypes before any operation runs, so their arguments have to be widened before the function
# does. CHECKING names such functions -> the arguments, by position or name, that stay as they are: large weights.
WEIGHT = (1, "weight")
CHECKING: dict[Any, tuple] = {
    F.conv1d: WEIGHT,
    F.conv2d: WEIGHT,
    F.conv3d: WEIGHT,
    F.conv_transpose1d: WEIGHT,
    F.conv_transpose2d: WEIGHT,
    F.conv_transpose3d: WEIGHT,
    torch.lstm: (),
    torch.gru: (),
    torch.rnn_tanh: (),
    torch.rnn_relu: (),
    F.scaled_dot_product_attention: (),
    F.rms_norm: (),
    torch.rms_norm: (),
}


# products of large matrices ------------------------------------------------------------------------


class Split(NamedTuple):
    """How a product is computed piece by piece.

    Attributes:
        dims: position of an argument -> its dimension that is split, counted from the end where the argument may
            broadcast.
        along: the dimension of the result that the split dimensions become.
    """

    dims: dict[int, int]
    along: int


def _split_of_convolution(args: Sequence) -> Split | None:
    """Output channels are split: dimension 0 of the weight, or dimension 1 where the convolution is transposed."""
    is_transposed = args[6]
    groups = args[8]
    if groups != 1:  # each piece of the output channels would read other input channels
        return None
    output_dim = 1 if is_transposed else 0
    return Split({1: output_dim, 2: 0}, along=1)


aten = torch.ops.aten
How = Split | Callable[[Sequence], Split | None]  # or a function that says how for these arguments
SPLITS: dict[Any, dict[int, How]] = {  # operation -> position of the large argument -> how
    # (n, k), (k, m) -> (n, m)
    aten.mm.default: {
        0: Split({0: 0}, along=0),
        1: Split({1: 1}, along=1),
    },
    # (n, k), (k) -> (n)
    aten.mv.default: {
        0: Split({0: 0}, along=0),
    },
    # (b, n, k), (b, k, m) -> (b, n, m)
    aten.bmm.default: {
        0: Split({0: 0, 1: 0}, along=0),
        1: Split({0: 0, 1: 0}, along=0),
    },
    # bias (n, m) or less, (n, k), (k, m) -> (n, m)
    aten.addmm.default: {
        1: Split({0: -2, 1: 0}, along=0),
        2: Split({0: -1, 2: 1}, along=1),
    },
    # bias (b, n, m) or less, (b, n, k), (b, k, m) -> (b, n, m)
    aten.baddbmm.default: {
        1: Split({0: -3, 1: 0, 2: 0}, along=0),
        2: Split({0: -3, 1: 0, 2: 0}, along=0),
    },
    aten.convolution.default: {
        1: _split_of_convolution,
    },
}


def split_of(func: Any, args: Sequence, large: int) -> Split | None:
    """How a product is computed by pieces of one of its arguments, None if it can't be."""
    how = SPLITS[func][large]
    if isinstance(how, Split):
        return how
    return how(args)


# schemas -------------------------------------------------------------------------------------------


class Operation(NamedTuple):
    """What the schema of an operation says.

    Attributes:
        name: without namespace and overload.
        is_view: whether its result shares memory with an argument.
        writes: (position, name) of the arguments it writes into.
        only_writes: whether it returns only what it writes into.
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
        info = argument.alias_info  # None where the argument is neither written nor returned
        if info is not None and info.is_write:
            writes.append((position, argument.name))
    shared = [result.alias_info for result in schema.returns]
    is_view = any(info is not None and not info.is_write for info in shared)
    if name in ("lift", "lift_fresh"):  # their schema says view, but nobody else has the constant that they view
        is_view = False
    returns_shared_only = all(info is not None for info in shared)
    only_writes = bool(writes) and returns_shared_only
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
        values = (*self.args, *self.kwargs.values())
        return tensors_in(values)


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
    """Whether an error says that there is no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # torch raises a plain RuntimeError where a CPU's memory is spent
    return "can't allocate memory" in str(error)
