"""Wide arithmetic: a model stored in any dtype, its forward computed in double, one operation at a time.

In bfloat16 a right cut may change the outputs by a percent, and a wrong one by less, so rounding hides the mistake. In
double a right cut changes them by 1e-15, and a wrong one by its whole mistake, so one tolerance serves every dtype.
The certificate opens `WideArithmetic` around its forwards. This file knows torch and nothing of models or cuts.

Worked example: the weight of a Linear(4096, 4096) takes 32 MiB in bfloat16, and would take 128 MiB in double. The
product with an input widens 256 rows of the weight at a time (2**20 elements, 8 MiB in double), and only the output
stays wide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from .narrow import OtherDtypes
from .operations import (
    CHECKING,
    CHOOSING,
    MAKING,
    OWN,
    SPLITS,
    Operation,
    OperationCall,
    Split,
    is_foreign,
    is_out_of_memory,
    operation,
    split_of,
    tensors_in,
)

Change = Callable[[torch.Tensor], torch.Tensor]
Kwargs = Mapping[str, Any]
FactorAndOffset = tuple[float, float]  # a value counts as (value + offset) * factor - offset

PIECE = 2**20  # elements of a stored matrix that are widened at a time: 8 MiB in double

# Positions of running statistics that these operations change without their schema saying so, and that of `training`.
UNSAID = {
    "native_batch_norm": ((3, 4), 5),
    "cudnn_batch_norm": ((3, 4), 5),
    "miopen_batch_norm": ((3, 4), 5),
}


def wide_dtype(device: torch.device | str) -> torch.dtype:
    """The widest float a device computes in: double, or float32 where there is none (Apple's GPUs).

    Example:
        >>> wide_dtype("cpu")
        torch.float64
    """
    try:
        one = torch.ones(1, 1, dtype=torch.float64, device=device)
        torch.mm(one, one)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):  # which of them depends on the device: MPS raises a TypeError
        return torch.float32
    return torch.float64


def storage_of(tensor: torch.Tensor) -> int:
    """What a tensor has in common with its views."""
    return tensor.untyped_storage()._cdata


class WideArithmetic(TorchDispatchMode):
    """While open, every operation takes its floats widened to one dtype, and its results stay so.

    - What is stored (weights, buffers, inputs) keeps its dtype and its bits, and is widened for one operation only.
    - An operation that writes into something stored is computed in `dtype`, then rounded into it.
    - Matrix products widen a large weight by pieces of at most 2**20 elements; a lookup widens only the rows it finds.
    - `.float()`, `.to(torch.bfloat16)`, `dtype=` and autocast inside a forward mean `dtype` too.
    - Integers, bools and floats of one byte stay as they are, and so do tensors of subclasses that dispatch by
      themselves (DTensor).
    - The caller has to switch off gradients, compiled code and fused transformer layers.

    Args:
        dtype: torch.float64, or torch.float32 for devices without it.
        scales: storage of a narrow tensor, as by `storage_of` -> (factor, offset): each value that is stored there
            counts as (value + offset) * factor - offset, computed when it is widened and never rounded.

    Example:
        >>> model = nn.Linear(2, 1).bfloat16()
        >>> with torch.no_grad(), WideArithmetic() as wide:
        ...     out = model(torch.ones(1, 2).bfloat16())
        >>> out.dtype, model.weight.dtype, wide.narrow
        (torch.float64, torch.bfloat16, {})
    """

    supports_higher_order_operators = True

    def __init__(
        self, dtype: torch.dtype = torch.float64, scales: Mapping[int, FactorAndOffset] | None = None
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.scales = {} if scales is None else scales  # not a copy: weights may come and go while this is open
        complex_dtype = dtype.to_complex()
        self._wider = {torch.float16: dtype, torch.bfloat16: dtype, torch.complex32: complex_dtype}
        if dtype == torch.float64:
            self._wider[torch.float32] = dtype
            self._wider[torch.complex64] = complex_dtype
        self._stored: set[torch.dtype] = set()  # dtypes that something narrow has had
        self._others = OtherDtypes(self)
        self._front = _Front(self)
        self._check_input: list[Callable[..., None]] = []

    @property
    def narrow(self) -> dict[str, torch.dtype]:
        """Operations that don't know `dtype` -> the dtype that they computed in, of several the coarsest.

        While this is empty, all was computed in `dtype`.
        """
        return self._others.used

    def __enter__(self) -> WideArithmetic:
        self._check_input.append(nn.RNNBase.check_input)
        # the check refuses an input whose dtype is not that of the weights; here the input is wide and the weights
        # are narrow, and kernels are given both wide
        nn.RNNBase.check_input = lambda *_: None
        self._front.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._front.__exit__(*error)
        nn.RNNBase.check_input = self._check_input.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        op = operation(func)
        if op.is_view:
            return func(*args, **kwargs)
        given = (*args, *kwargs.values())
        # `types` names the tensor subclasses of a call, mostly none; each tensor is asked only if there are some
        if types and any(map(is_foreign, tensors_in(given))):
            call = OperationCall(func, args, kwargs, _written(op, args, kwargs))
            return self._others.beside_foreign(call)
        if op.name in CHOOSING and not op.writes:
            return self._chosen(func, op.name, args, kwargs)
        num_narrow = self._count_narrow(given)
        if op.only_writes:
            if self.scales:
                args = tuple(map(self.scaled, args))
            # nothing in such a call is wider than the tensor that it writes into
            if op.name == "copy_" or num_narrow == _count_floating(given):
                return func(*args, **kwargs)
        if num_narrow and func in SPLITS:
            large = _large_argument(self, func, args)
            if large is not None:
                call = OperationCall(func, args, kwargs, ())
                return _by_pieces(self, call, *large)
        if op.name == "_grouped_mm" and _is_of_experts(args):
            return _expert_by_expert(self, *args)
        call = OperationCall(func, args, kwargs, _written(op, args, kwargs))
        if func.namespace not in OWN:
            return self._others.of_others(call)
        return self._widest(call)

    # widening --------------------------------------------------------------------------------------

    def is_narrow(self, dtype: torch.dtype) -> bool:
        """Whether tensors of a dtype are widened."""
        return dtype in self._wider

    def widened(self, value: Any) -> Any:
        """A tensor, or tensors in lists and tuples, in `dtype`; what is no narrow float stays as it is."""
        if isinstance(value, torch.Tensor):
            scale = self._scale_of(value)
            return self._wide(value, scale)
        if type(value) in (list, tuple):
            return type(value)(map(self.widened, value))
        return value

    def asked_wide(self, value: Any) -> Any:
        """`widened` for code that runs while the mode is open: the mode sees the conversion and applies the scale."""
        if isinstance(value, torch.Tensor):
            if is_foreign(value) or not self.is_narrow(value.dtype):
                return value
            return value.to(self._wider[value.dtype])
        if type(value) in (list, tuple):
            return type(value)(map(self.asked_wide, value))
        return value

    def scaled(self, value: Any) -> Any:
        """An argument as it is, but a tensor that has a scale is widened: only a wide one has the scaled values."""
        if isinstance(value, torch.Tensor) and self._scale_of(value):
            return self.widened(value)
        return value

    def _scale_of(self, tensor: torch.Tensor) -> FactorAndOffset | None:
        if not self.scales or is_foreign(tensor):
            return None
        return self.scales.get(storage_of(tensor))

    def _wide(self, tensor: torch.Tensor, scale: FactorAndOffset | None) -> torch.Tensor:
        dtype = self._wider.get(tensor.dtype)
        if dtype is None or is_foreign(tensor):
            return tensor
        wide = tensor.to(dtype)  # a copy: what follows may be done in place
        if scale is None:
            return wide
        factor, offset = scale
        if not offset:
            return wide.mul_(factor)
        shifted = wide.add_(offset)
        return shifted.mul_(factor).sub_(offset)

    def _widened_dtype(self, value: Any) -> Any:
        """An argument, or the wide dtype if the argument is a narrow dtype."""
        if isinstance(value, torch.dtype):
            return self._wider.get(value, value)
        return value

    def _count_narrow(self, values: Iterable) -> int:
        """The number of narrow tensors among these values and in their lists; remembers the dtypes of the tensors."""
        count = 0
        for value in values:
            if isinstance(value, torch.Tensor):
                if value.dtype in self._wider:
                    self._stored.add(value.dtype)
                    count += 1
            elif isinstance(value, (list, tuple)):
                count += self._count_narrow(value)
        return count

    # computing -------------------------------------------------------------------------------------

    def _chosen(self, func: Any, name: str, args: Sequence, kwargs: Kwargs) -> Any:
        """Entries that are looked up, or a copy: they are chosen as they are stored, and then widened."""
        source, *others = args
        scale = self._scale_of(source)
        if scale and name == "_to_copy":  # to another dtype, which has to have the scaled values
            source = self.widened(source)
            scale = None
        wide_kwargs = {key: self._widened_dtype(value) for key, value in kwargs.items()}
        chosen = func(source, *others, **wide_kwargs)
        return self._wide(chosen, scale)

    def _widest(self, call: OperationCall) -> Any:
        """An operation of torch's in `dtype`, or in the widest dtype that it knows if it doesn't know `dtype`."""
        try:
            return self.computed(call, self.widened)
        except Exception as error:  # a kernel for some dtypes only, or the model's own error, which then comes again
            if is_out_of_memory(error):
                raise
        return self._others.of_torch(call, self._stored)

    def computed(self, call: OperationCall, change: Change) -> Any:
        """The operation with its tensors changed; a tensor that it writes keeps its dtype, and the result is rounded.

        Args:
            change: what is done to each tensor that the operation takes.
        """
        changed: dict[int, torch.Tensor] = {}  # what is given twice stays one tensor: x.addmm_(x, y)
        args = [self._changed(value, change, changed) for value in call.args]
        kwargs = {}
        for name, value in call.kwargs.items():
            kwargs[name] = self._changed(value, change, changed)
        out = call.func(*args, **kwargs)
        if not call.written:
            return self.widened(out)
        originals: dict[int, torch.Tensor] = {}  # id of a changed tensor -> the one that was given
        for tensor in call.written:
            result = changed[id(tensor)]
            originals[id(result)] = tensor
            if result is not tensor:
                if result.shape != tensor.shape:  # an empty `out=`
                    tensor.resize_(result.shape)
                tensor.copy_(result)
        # an operation that returns the tensor that it writes returns the given one
        put_originals = partial(self._original_or_widened, originals)
        return tree_map_only(torch.Tensor, put_originals, out)

    def _original_or_widened(self, originals: Mapping[int, torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) in originals:
            return originals[id(tensor)]
        return self.widened(tensor)

    def _changed(self, value: Any, change: Change, changed: dict[int, torch.Tensor]) -> Any:
        """An argument with its tensors changed; `changed` receives the id of each given tensor -> the changed one."""
        # a method, because a function inside `computed` that calls itself would hold every widened weight until
        # garbage is collected
        if isinstance(value, torch.Tensor):
            if id(value) not in changed:
                changed[id(value)] = change(value)
            return changed[id(value)]
        if isinstance(value, torch.dtype) and change == self.widened:
            return self._widened_dtype(value)
        if isinstance(value, (list, tuple)):
            return [self._changed(inner, change, changed) for inner in value]
        return value


# large weights -------------------------------------------------------------------------------------


def _large_argument(wide: WideArithmetic, func: Any, args: Sequence) -> tuple[int, Split] | None:
    """(position, split) of the argument of a product that is a large stored matrix; None if there is none."""
    for position in SPLITS[func]:
        matrix = args[position]
        is_large = matrix.numel() > PIECE and wide.is_narrow(matrix.dtype)
        split = split_of(func, args, position) if is_large else None
        if split is not None:
            return position, split
    return None


def _by_pieces(wide: WideArithmetic, call: OperationCall, large: int, split: Split) -> torch.Tensor:
    """A product with a large stored matrix, so many of its rows at a time that the widened ones stay few.

    Args:
        large: the position of the matrix among the arguments.
    """
    matrix = call.args[large]
    count = matrix.shape[split.dims[large]]
    step = max(1, PIECE * count // matrix.numel())  # rows
    out = None
    for start in range(0, count, step):
        length = min(step, count - start)
        piece = list(call.args)
        for i, dim in split.dims.items():
            if _has_size(piece[i], dim, count):
                piece[i] = piece[i].narrow(dim, start, length)
        part_call = call._replace(args=piece)
        part = wide.computed(part_call, wide.widened)
        if out is None:
            shape = list(part.shape)
            shape[split.along] = count
            out = part.new_empty(shape)
        place = out.narrow(split.along, start, length)
        place.copy_(part)
    return out


def _has_size(tensor: torch.Tensor | None, dim: int, size: int) -> bool:
    """Whether a tensor has this size in a dimension; a bias may be absent, or broadcast along it."""
    if tensor is None or tensor.dim() < -dim:
        return False
    return tensor.shape[dim] == size


def _expert_by_expert(
    wide: WideArithmetic, x: torch.Tensor, experts: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """(tokens, k), (experts, k, n) -> (tokens, n): each expert's weights times the tokens up to its end."""
    num_tokens = len(x)
    out = x.new_zeros(num_tokens, experts.shape[2], dtype=wide.dtype)
    start = 0
    for expert, end in zip(experts, ends.tolist(), strict=True):
        if end > start:
            tokens = x[start:end]
            # the mode computes the product, and splits the weights of a large expert
            product = wide.__torch_dispatch__(torch.ops.aten.mm.default, (), (tokens, expert))
            out[start:end] = product
        start = max(start, end)
    return out


def _is_of_experts(args: Sequence) -> bool:
    """Whether a grouped product takes (tokens, k), (experts, k, n) and the ends of the experts' tokens alone."""
    if len(args) != 3:
        return False
    x, experts, _ = args
    return x.dim() == 2 and experts.dim() == 3


# what operations take and write --------------------------------------------------------------------


def _count_floating(values: Iterable) -> int:
    """The number of tensors of floats among values, in lists too."""
    return sum(tensor.is_floating_point() for tensor in tensors_in(values))


def _written(op: Operation, args: Sequence, kwargs: Kwargs) -> list[torch.Tensor]:
    """The tensors of a call that the operation writes into."""
    if op.name in UNSAID:
        positions, training = UNSAID[op.name]
        if not args[training]:
            return []
        statistics = [args[i] for i in positions]
        return list(tensors_in(statistics))  # without those that are None
    if not op.writes:
        return []
    written = []
    for position, name in op.writes:
        is_positional = position < len(args)
        written.append(args[position] if is_positional else kwargs.get(name))
    return list(tensors_in(written))


class _Front(TorchFunctionMode):
    """What happens before a dispatch mode sees it: autocast, and functions that compare dtypes or choose by them."""

    def __init__(self, wide: WideArithmetic) -> None:
        super().__init__()
        self.wide = wide

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        asked_wide = self.wide.asked_wide
        with torch._C._DisableAutocast():  # else autocast would keep every weight that it has cast until it is left
            if func in CHECKING:
                as_they_are = CHECKING[func]  # positions and names of arguments
                changed_args = list(args)
                for i, value in enumerate(args):
                    if i not in as_they_are:
                        changed_args[i] = asked_wide(value)
                changed_kwargs = dict(kwargs)
                for name, value in kwargs.items():
                    if name not in as_they_are:
                        changed_kwargs[name] = asked_wide(value)
                args = tuple(changed_args)
                kwargs = changed_kwargs
            try:
                return func(*args, **kwargs)
            except RuntimeError as error:
                # a call that may have written into a tensor can't be tried again
                writes = "out" in kwargs or func.__name__.endswith("_")
                if writes or is_out_of_memory(error):
                    raise
            if func in MAKING and "dtype" not in kwargs:  # the lowest double, say, is no float32
                return func(*args, **kwargs, dtype=self.wide.dtype)
            wide_args, wide_kwargs = tree_map_only(torch.Tensor, asked_wide, (args, kwargs))
            return func(*wide_args, **wide_kwargs)
