"""Wide arithmetic: a model stored in any dtype, its forward computed in double, one operation at a time.

In bfloat16 a right cut may differ by a percent, and a wrong one by less: rounding hides it. In double right cuts
differ by 1e-15, and wrong ones by what is wrong with them, so that one tolerance serves every dtype. The certificate
opens `WideArithmetic` around its forwards; this file knows torch and nothing of models or cuts.

Worked example: a Linear(4096, 4096) in bfloat16 takes 32 MiB, and 128 MiB in double. Its product with an input is
computed 256 rows of the weight at a time (2**20 elements, 8 MiB in double), and only the output stays wide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
    - Integers, bools and floats of one byte stay, as do tensors of subclasses that dispatch by themselves (DTensor).
    - The caller sees to gradients (none), compiled code (eager) and fused transformer layers (off).

    Args:
        dtype: torch.float64, or torch.float32 for devices without it.
        scales: storage of a narrow tensor, as by `storage_of` -> (factor, offset): what is stored there counts as
            (value + offset) * factor - offset, computed when it is widened and never rounded.

    Example:
        >>> model = nn.Linear(2, 1).bfloat16()
        >>> with torch.no_grad(), WideArithmetic() as wide:
        ...     out = model(torch.ones(1, 2).bfloat16())
        >>> out.dtype, model.weight.dtype, wide.narrow
        (torch.float64, torch.bfloat16, {})
    """

    supports_higher_order_operators = True

    def __init__(
        self, dtype: torch.dtype = torch.float64, scales: Mapping[int, tuple[float, float]] | None = None
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.scales = dict(scales or {})
        self._wider = {torch.float16: dtype, torch.bfloat16: dtype, torch.complex32: torch.complex64}
        if dtype == torch.float64:
            self._wider |= {torch.float32: dtype, torch.complex32: torch.complex128, torch.complex64: torch.complex128}
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
        # It wants the weights' dtype of the input; here the input is wide, and kernels are given both wide.
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
        if types and any(map(is_foreign, tensors_in(given))):
            return self._others.beside_foreign(OperationCall(func, args, kwargs, _written(op, args, kwargs)))
        if op.name in CHOOSING and not op.writes:
            return self._chosen(func, op.name, args, kwargs)
        num_narrow = self._count_narrow(given)
        if op.only_writes:
            if self.scales:
                args = tuple(self.scaled(value) if isinstance(value, torch.Tensor) else value for value in args)
            # Nothing in such a call is wider than what it writes into.
            if op.name == "copy_" or num_narrow == sum(tensor.is_floating_point() for tensor in tensors_in(given)):
                return func(*args, **kwargs)
        if num_narrow and func in SPLITS:
            split = self._split_of_large(func, args)
            if split is not None:
                return self._by_pieces(func, args, kwargs, split)
        if op.name == "_grouped_mm" and _is_of_experts(args):
            return self._expert_by_expert(*args)
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
            return self._wide(value, self._scale_of(value))
        if type(value) in (list, tuple):
            return type(value)([self.widened(inner) for inner in value])
        return value

    def asked_wide(self, value: Any) -> Any:
        """`widened` for where the mode is on: it sees the conversion itself, and scales what that reads."""
        if isinstance(value, torch.Tensor) and self.is_narrow(value.dtype) and not is_foreign(value):
            return value.to(self._wider[value.dtype])
        if type(value) in (list, tuple):
            return type(value)(map(self.asked_wide, value))
        return value

    def scaled(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor as it is stored, but wide where it has a scale: only a wide one has the scaled values."""
        return self.widened(tensor) if self._scale_of(tensor) else tensor

    def _scale_of(self, tensor: torch.Tensor) -> tuple[float, float] | None:
        if not self.scales or is_foreign(tensor):
            return None
        return self.scales.get(storage_of(tensor))

    def _wide(self, tensor: torch.Tensor, scale: tuple[float, float] | None) -> torch.Tensor:
        dtype = self._wider.get(tensor.dtype)
        if dtype is None or is_foreign(tensor):
            return tensor
        wide = tensor.to(dtype)
        if scale is None:
            return wide
        factor, offset = scale
        return wide.add_(offset).mul_(factor).sub_(offset) if offset else wide.mul_(factor)

    def _widened_dtype(self, value: Any) -> Any:
        """An argument, if it is a narrow dtype the wide one."""
        return self._wider.get(value, value) if isinstance(value, torch.dtype) else value

    def _count_narrow(self, values: Iterable) -> int:
        """How many of these are narrow tensors, in lists too; what dtypes there are is remembered."""
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

    def _chosen(self, func: Any, name: str, args: Sequence, kwargs: Mapping[str, Any]) -> Any:
        """Entries that are looked up, or a copy: chosen as they are stored, then widened."""
        source = args[0]
        scale = self._scale_of(source)
        if scale and name == "_to_copy":  # to another dtype, which has to have the scaled values
            args = (self.widened(source), *args[1:])
            scale = None
        chosen = func(*args, **{key: self._widened_dtype(value) for key, value in kwargs.items()})
        return self._wide(chosen, scale)

    def _widest(self, call: OperationCall) -> Any:
        """An operation of torch's in `dtype` or, where it doesn't know that, in the widest dtype that it knows."""
        try:
            return self.computed(call, self.widened)
        except Exception as error:  # a kernel for some dtypes only, or the model's own error: then it comes again
            if is_out_of_memory(error):
                raise
        return self._others.of_torch(call, self._stored)

    def computed(self, call: OperationCall, change: Change) -> Any:
        """The operation with its tensors changed; what it writes keeps its dtype, and takes the result rounded."""
        changed: dict[int, torch.Tensor] = {}  # what is given twice stays one tensor: x.addmm_(x, y)
        args = [self._changed(value, change, changed) for value in call.args]
        kwargs = {name: self._changed(value, change, changed) for name, value in call.kwargs.items()}
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
        return tree_map_only(torch.Tensor, lambda t: originals[id(t)] if id(t) in originals else self.widened(t), out)

    def _changed(self, value: Any, change: Change, changed: dict[int, torch.Tensor]) -> Any:
        """An argument with its tensors changed, these gathered in `changed` under the ids of the given ones.

        No function inside `computed`: one that calls itself is a reference cycle, and would hold every widened
        weight until Python's garbage collector comes round.
        """
        if isinstance(value, torch.Tensor):
            if id(value) not in changed:
                changed[id(value)] = change(value)
            return changed[id(value)]
        if isinstance(value, torch.dtype):
            return self._widened_dtype(value) if change == self.widened else value
        if isinstance(value, (list, tuple)):
            return [self._changed(inner, change, changed) for inner in value]
        return value

    # large weights ---------------------------------------------------------------------------------

    def _split_of_large(self, func: Any, args: Sequence) -> tuple[int, Split] | None:
        """The argument of a product that is a large stored matrix, and how it is split; None if there is none."""
        for position in SPLITS[func]:
            matrix = args[position]
            if matrix.numel() > PIECE and self.is_narrow(matrix.dtype):
                split = split_of(func, args, position)
                if split is not None:
                    return position, split
        return None

    def _by_pieces(self, func: Any, args: Sequence, kwargs: Mapping[str, Any], how: tuple[int, Split]) -> Any:
        """A product with a large stored matrix, so many of its rows at a time that the widened ones stay few."""
        large, split = how
        count = args[large].shape[split.dims[large]]
        step = max(1, PIECE * count // args[large].numel())
        out = None
        for start in range(0, count, step):
            length = min(step, count - start)
            piece = list(args)
            for i, dim in split.dims.items():
                whole = args[i]
                # A bias may be absent, or broadcast along this dimension.
                if whole is not None and whole.dim() >= -dim and whole.shape[dim] == count:
                    piece[i] = whole.narrow(dim, start, length)
            part = self.computed(OperationCall(func, piece, kwargs, ()), self.widened)
            if out is None:
                shape = list(part.shape)
                shape[split.along] = count
                out = part.new_empty(shape)
            out.narrow(split.along, start, length).copy_(part)
        return out

    def _expert_by_expert(self, x: torch.Tensor, experts: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """(tokens, k), (experts, k, n) -> (tokens, n): each expert's weights times the tokens up to its end."""
        out = x.new_zeros(len(x), experts.shape[2], dtype=self.dtype)
        start = 0
        for expert, end in zip(experts, ends.tolist(), strict=True):
            if end > start:
                # By this mode itself, which splits the weights of a large expert.
                out[start:end] = self.__torch_dispatch__(torch.ops.aten.mm.default, (), (x[start:end], expert))
            start = max(start, end)
        return out


def _is_of_experts(args: Sequence) -> bool:
    """Whether the arguments of a grouped product are (tokens, k), (experts, k, n) and the ends of the experts' tokens,
    and no more."""
    return len(args) > 2 and args[0].dim() == 2 and args[1].dim() == 3 and not args[3:]


def _written(op: Operation, args: Sequence, kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors of a call that the operation writes into."""
    if op.name in UNSAID:
        positions, training = UNSAID[op.name]
        return [args[i] for i in positions if args[training] and args[i] is not None]
    if not op.writes:
        return []
    return list(tensors_in(args[i] if i < len(args) else kwargs.get(name) for i, name in op.writes))


class _Front(TorchFunctionMode):
    """What happens before a dispatch mode sees it: autocast, and functions that compare dtypes or choose by them."""

    def __init__(self, wide: WideArithmetic) -> None:
        super().__init__()
        self.wide = wide

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        asked_wide = self.wide.asked_wide
        with torch._C._DisableAutocast():  # else it would keep every weight it has cast until it is left
            if func in CHECKING:
                alone = CHECKING[func]  # positions and names of what is left alone
                args = tuple(value if i in alone else asked_wide(value) for i, value in enumerate(args))
                kwargs = {name: value if name in alone else asked_wide(value) for name, value in kwargs.items()}
            try:
                return func(*args, **kwargs)
            except RuntimeError as error:
                # What may have been written to can't be tried again.
                if "out" in kwargs or func.__name__.endswith("_") or is_out_of_memory(error):
                    raise
            if func in MAKING and "dtype" not in kwargs:  # the lowest double, say, is no float32
                return func(*args, **kwargs, dtype=self.wide.dtype)
            wide_args, wide_kwargs = tree_map_only(torch.Tensor, asked_wide, (args, kwargs))
            return func(*wide_args, **wide_kwargs)
