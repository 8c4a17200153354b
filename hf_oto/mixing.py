"""Where a forward multiplies features by a weight: the rows of features that go in, and the rows that come out.

Linear layers, convolutions, attention and experts end in a few ATen operations, whatever modules and functions a model
calls. So what is here covers every architecture.

Worked example: `nn.Linear(3, 8)` on a batch of shape (2, 4, 3) is `addmm(bias (8,), x (8, 3), w (3, 8))`, where w is a
transposed view of the parameter. Its `Mixing` has in_dim=1 and out_dim=0: the features lie along dimension 1 of the
parameter. The rows that go in are (8, 3), those that come out (8, 8).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from .modeling_oto import named_tensors
from .rules import RULES
from .rules.reductions import batch_norm


class Mixing(NamedTuple):
    """A matrix in a parameter, by which features are multiplied.

    Attributes:
        name: of the parameter.
        in_dim: the dimension along which the features lie that go in.
        out_dim: the one of those that come out. The other dimensions are those of a kernel, or are indexed.
        index: (dimension, position) for each dimension of which the matrix takes one position: that of the experts.
        is_flipped: whether the kernel is flipped, as that of a transposed convolution is.
    """

    name: str
    in_dim: int
    out_dim: int
    index: tuple[tuple[int, int], ...] = ()
    is_flipped: bool = False

    @property
    def label(self) -> str:
        """The name of the parameter, and where in it the matrix lies: "experts.weight[3]"."""
        positions = [str(position) for _, position in self.index]
        return f"{self.name}[{', '.join(positions)}]" if positions else self.name

    def matrix(self, parameter: Tensor) -> Tensor:
        """A copy of the matrix, (features x kernel, results)."""
        weight = self._ordered(parameter)
        if self.is_flipped:
            weight = weight.flip(self._kernel_dims(weight))
        return weight.reshape(-1, weight.shape[-1]).clone()

    def num_features(self, parameter: Tensor) -> int:
        """How many rows the matrix has: features x kernel."""
        *features_and_kernel, _ = self._ordered(parameter).shape
        return math.prod(features_and_kernel)

    def write_(self, parameter: Tensor, matrix: Tensor) -> None:
        """Puts another matrix, (features x kernel, results), into the parameter."""
        weight = self._ordered(parameter)
        new = matrix.reshape(weight.shape)
        if self.is_flipped:
            new = new.flip(self._kernel_dims(weight))
        weight.copy_(new)

    def _ordered(self, parameter: Tensor) -> Tensor:
        """A view of the parameter, (features, *kernel, results)."""
        weight = parameter.data
        dims = list(range(weight.dim()))
        for dim, position in sorted(self.index, reverse=True):
            weight = weight.select(dim, position)
            dims.remove(dim)
        kernel = [dim for dim in dims if dim not in (self.in_dim, self.out_dim)]
        order = [self.in_dim, *kernel, self.out_dim]
        return weight.permute([dims.index(dim) for dim in order])

    @staticmethod
    def _kernel_dims(weight: Tensor) -> list[int]:
        return list(range(1, weight.dim() - 1))


class Product(NamedTuple):
    """One multiplication of a forward.

    Attributes:
        mixing: the matrix.
        inputs: computes what goes in, (rows, features); of a convolution a row is a pixel.
        features: computes what the matrix is multiplied by, (rows, features x kernel); a row is a place of the kernel.
        results: computes, from what the operation has returned, what comes out, (rows, results).
        added: what the operation has added to these: one row, or a row for each; None: nothing.
    """

    mixing: Mixing
    inputs: Callable[[], Tensor]
    features: Callable[[], Tensor]
    results: Callable[[Tensor], Tensor]
    added: Tensor | None


class Normalization(NamedTuple):
    """One batch norm in eval mode: what it normalises, and by which statistics."""

    input: Tensor
    mean: Tensor
    variance: Tensor
    eps: float


Seen = Product | Normalization
FIRST_FACTOR = {"mm": 0, "addmm": 1, "bmm": 0, "baddbmm": 1}  # products of matrices -> the place of their first factor


class Tensors:
    """The parameters and buffers of a model by their memory, so that a view of one is known as such."""

    def __init__(self, model: nn.Module) -> None:
        self._of_storage: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in named_tensors(model).items():
            if tensor.layout == torch.strided and tensor.numel():
                self._of_storage.setdefault(tensor.untyped_storage()._cdata, (name, tensor))

    def owner(self, view: Any) -> tuple[str, Tensor] | None:
        """The parameter or buffer that a tensor is, or is a view of, with its name; None: of none."""
        if not isinstance(view, Tensor) or view.layout != torch.strided:
            return None
        return self._of_storage.get(view.untyped_storage()._cdata)

    def named(self, tensor: Any) -> str | None:
        """The name of the parameter that a tensor is, all of it."""
        owner = self.owner(tensor)
        if owner is None or owner[1].shape != tensor.shape or owner[1].stride() != tensor.stride():
            return None
        return owner[0]

    def shown_by(self, view: Tensor) -> tuple[str, list[int], dict[int, int]] | None:
        """What a view shows of a parameter: its name, the dimension of it that each dimension of the view is, and the
        positions along its other dimensions. None: it is no such view, or shows only a part of a dimension.

        Example:
            >>> layer = nn.Linear(3, 8)
            >>> Tensors(layer).shown_by(layer.weight.t())
            ('weight', [1, 0], {})
        """
        owner = self.owner(view)
        if owner is None:
            return None
        name, parameter = owner
        sizes_and_strides = list(zip(parameter.shape, parameter.stride(), strict=True))
        dims: list[int] = []
        for size_and_stride in zip(view.shape, view.stride(), strict=True):
            matching = [
                dim for dim, other in enumerate(sizes_and_strides) if other == size_and_stride and dim not in dims
            ]
            if not matching:
                return None
            dims.append(matching[0])
        # what the other dimensions' positions are follows from how far the view begins from the parameter's beginning
        offset = view.storage_offset() - parameter.storage_offset()
        other_dims = set(range(parameter.dim())) - set(dims)
        index: dict[int, int] = {}
        for dim in sorted(other_dims, key=parameter.stride, reverse=True):
            index[dim], offset = divmod(offset, parameter.stride(dim))
            if index[dim] >= parameter.shape[dim]:  # a view of another parameter, in the same memory
                return None
        return None if offset else (name, dims, index)


class Watched(TorchDispatchMode):
    """While open, shows the products by parameters, and the batch norms, that are computed.

    Args:
        tensors: those of the model that runs.
        before: is called with each of them before it is computed.
        after: is called with each of them after it was computed, and with what the operation has returned.
        otherwise: is called with the name of each parameter that another operation reads, an embedding, say.
    """

    supports_higher_order_operators = True

    def __init__(
        self,
        tensors: Tensors,
        before: Callable[[Seen], None] | None = None,
        after: Callable[[Seen, Any], None] | None = None,
        otherwise: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__()
        self._tensors = tensors
        self._before = before
        self._after = after
        self._otherwise = otherwise

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        seen: list[Seen] = []
        # with keyword arguments a product may be scaled
        if isinstance(func, torch._ops.OpOverload) and func.namespace == "aten" and not kwargs:
            seen = list(self._seen(func.overloadpacket.__name__, args))
        if not seen and not _gives_views(func):
            self._tell_of_owners((args, kwargs))
        if self._before is not None:
            for each in seen:
                self._before(each)
        output = func(*args, **kwargs)
        if self._after is not None:
            for each in seen:
                self._after(each, output)
        return output

    def _tell_of_owners(self, arguments: Any) -> None:
        """Calls `otherwise` with the parameters among some arguments."""
        if self._otherwise is None:
            return
        for argument in tree_iter(arguments):
            owner = self._tensors.owner(argument)
            if owner is not None:
                self._otherwise(owner[0])

    def _seen(self, name: str, args: tuple) -> Iterator[Seen]:
        """What an operation computes, by its name and its arguments."""
        if name in FIRST_FACTOR:
            position = FIRST_FACTOR[name]
            added = args[0] if position == 1 else None
            yield from self._products(args[position], args[position + 1], added)
        elif name == "convolution":
            yield from self._convolution(*args)
        elif RULES.get(name) is batch_norm and args[3] is not None and args[4] is not None:
            yield Normalization(args[0], args[3], args[4], eps=args[-1])

    def _products(self, first: Tensor, second: Tensor, added: Tensor | None) -> Iterator[Product]:
        """Those of features and a parameter, or of stacks of both."""
        for weight, features, weight_is_second in ((second, first, True), (first, second, False)):
            shown = self._tensors.shown_by(weight)
            if shown is None:
                continue
            name, dims, index = shown
            # features are rows where the weight comes second, and columns where it comes first
            *stack_dims, in_dim, out_dim = dims
            if not weight_is_second:
                in_dim, out_dim = out_dim, in_dim
            for number in range(len(weight)) if stack_dims else [None]:
                of_matrix = index | dict.fromkeys(stack_dims, number)
                mixing = Mixing(name, in_dim, out_dim, tuple(sorted(of_matrix.items())))
                rows = _RowsOf(number, weight_is_second)
                inputs = rows.reader(features)
                yield Product(mixing, inputs, inputs, rows, added=_added_to(rows, added))

    def _convolution(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        is_transposed: bool,
        output_padding: Sequence[int],
        groups: int,
    ) -> Iterator[Product]:
        """One of all channels; channels in groups are not mixed with those of other groups."""
        owner = self._tensors.owner(weight)
        if owner is None or groups != 1 or owner[1].shape != weight.shape:
            return
        kernel = weight.shape[2:]

        def features() -> Tensor:
            if not is_transposed:
                return patches(x, kernel, stride, padding, dilation)
            # it is a convolution, by the flipped kernel, of an image with zeros between its pixels
            around = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
            return patches(_spread(x, stride, output_padding), kernel, [1] * len(kernel), around, dilation)

        in_dim, out_dim = (0, 1) if is_transposed else (1, 0)
        mixing = Mixing(owner[0], in_dim, out_dim, (), is_transposed)
        yield Product(mixing, lambda: _pixels(x), features, _pixels, bias)


def _gives_views(func: Any) -> bool:
    """Whether an operation returns other views of what it takes, and computes nothing."""
    returns = func._schema.returns if isinstance(func, torch._ops.OpOverload) else []
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


class _RowsOf(NamedTuple):
    """The rows of a matrix, or of one in a stack; calling it gives them."""

    number: int | None  # of the matrix in the stack
    are_rows: bool  # else they are its columns

    def __call__(self, tensor: Tensor) -> Tensor:
        matrix = tensor if self.number is None else tensor[self.number]
        return matrix if self.are_rows else matrix.t()

    def reader(self, tensor: Tensor) -> Callable[[], Tensor]:
        """A function that gives those of one tensor."""
        return lambda: self(tensor)


def _added_to(rows: _RowsOf, added: Tensor | None) -> Tensor | None:
    """What is added to some rows: one row for all of them, or a row for each."""
    if added is None:
        return None
    is_one_row = added.dim() == 1 and rows.are_rows
    return added if is_one_row else rows(added)


def _pixels(images: Tensor) -> Tensor:
    """(batch, channels, *size) -> (pixels of all images, channels)."""
    return images.movedim(1, -1).reshape(-1, images.shape[1])


def patches(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """What a convolution sees at each of its places: (batch, channels, *size) -> (places, channels x kernel).

    Example:
        >>> patches(torch.arange(4.0).reshape(1, 1, 4), [2], [1], [0], [1])
        tensor([[0., 1.],
                [1., 2.],
                [2., 3.]])
    """
    around: list[int] = []
    for pad in reversed(padding):
        around += [pad, pad]
    x = F.pad(x, around)  # of less than nothing takes pixels away
    num_places = []
    for size, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True):
        num_places.append((size - d * (k - 1) - 1) // s + 1)
    seen = []
    for offsets in itertools.product(*map(range, kernel)):
        places = [slice(None), slice(None)]
        for offset, num, s, d in zip(offsets, num_places, stride, dilation, strict=True):
            first = offset * d
            places.append(slice(first, first + (num - 1) * s + 1, s))
        seen.append(_pixels(x[tuple(places)]))
    return torch.stack(seen, -1).flatten(1)


def _spread(x: Tensor, stride: Sequence[int], output_padding: Sequence[int]) -> Tensor:
    """Images with stride - 1 zeros between their pixels, and further zeros at their ends."""
    ends = [(size - 1) * s + 1 for size, s in zip(x.shape[2:], stride, strict=True)]
    sizes = [end + extra for end, extra in zip(ends, output_padding, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *sizes)
    places = [slice(0, end, s) for end, s in zip(ends, stride, strict=True)]
    spread[(slice(None), slice(None), *places)] = x
    return spread
