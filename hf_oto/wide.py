"""Wide arithmetic: a model stored in any dtype, its forward computed in double, one operation at a time.

In bfloat16 a right cut may differ by a percent, and a wrong one by less: rounding hides it. In double right cuts
differ by 1e-15 and wrong ones by what is wrong with them, so that one tolerance serves every dtype. The certificate
opens `WideArithmetic` around its forwards; this file knows torch and nothing of models or cuts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

Change = Callable[[torch.Tensor], torch.Tensor]

PIECE = 2**20  # elements of a stored matrix that are widened at a time: 8 MiB in double


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
    except (RuntimeError, TypeError):  # what it is depends on the device: MPS raises a TypeError
        return torch.float32
    return torch.float64


class WideArithmetic(TorchDispatchMode):
    """While open, every operation takes its floats widened to one dtype, and its results stay so.

    - What is stored (weights, buffers, inputs) keeps its dtype and its bits, and is widened for one operation only.
    - An operation that writes into something stored is computed in `dtype`, then rounded into it.
    - Matrix products widen a large weight by pieces of at most 2**20 elements, a lookup only the rows it finds.
    - `.float()`, `.to(torch.bfloat16)`, `dtype=` and autocast inside a forward mean `dtype` too.
    - Integers, bools and floats of one byte stay, as do tensors of subclasses that dispatch by themselves (DTensor).
    - The caller sees to gradients (none), compiled code (eager) and fused transformer layers (off).

    Args:
        dtype: torch.float64, or torch.float32 for devices without it.
        scales: storage of a narrow tensor, as by `storage_of` -> (factor, offset): what is stored there counts as
            (value + offset) * factor - offset, computed when it is widened and never rounded.

    Attributes:
        narrow: operations that don't know `dtype` -> the dtype that they computed in, of several the coarsest. While
            this is empty, all was computed in `dtype`.

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
        self.narrow: dict[str, torch.dtype] = {}
        self._wider = {torch.float16: dtype, torch.bfloat16: dtype, torch.complex32: torch.complex64}
        if dtype == torch.float64:
            self._wider |= {torch.float32: dtype, torch.complex32: torch.complex128, torch.complex64: torch.complex128}
        self._stored: set[torch.dtype] = set()  # dtypes that something narrow has had
        self._front = _Front(self)
        self._check_input: list[Callable[..., None]] = []

    def __enter__(self) -> WideArithmetic:
        self._check_input.append(nn.RNNBase.check_input)
        nn.RNNBase.check_input = lambda *_: None  # it wants the weights' dtype of the input, where kernels are told
        self._front.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._front.__exit__(*error)
        nn.RNNBase.check_input = self._check_input.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        op, kwargs = _operation(func), kwargs or {}
        if op.is_view:
            return func(*args, **kwargs)
        given = (*args, *kwargs.values())
        if types and any(map(is_foreign, _tensors(given))):
            return self._beside_foreign(func, args, kwargs)
        if op.name in CHOOSING and not op.writes:
            scale = self._scale_of(args[0])
            if scale and op.name == "_to_copy":  # to another dtype, which has to have the scaled values
                args, scale = (self.widened(args[0]), *args[1:]), None
            chosen = func(*args, **{k: self._dtype(v) for k, v in kwargs.items()})
            return self._wide(chosen, scale)
        narrow = self._narrow(given)
        if self.scales and op.only_writes:
            args = tuple(self.widened(v) if isinstance(v, torch.Tensor) and self._scale_of(v) else v for v in args)
        if op.only_writes and (op.name == "copy_" or narrow == sum(t.is_floating_point() for t in _tensors(given))):
            return func(*args, **kwargs)  # nothing in it is wider than what it writes into
        if narrow and func in PRODUCTS:
            for large, split in PRODUCTS[func].items():
                if args[large].numel() > PIECE and args[large].dtype in self._wider and (how := split(args)):
                    return self._by_pieces(func, args, kwargs, large, *how)
        if op.name == "_grouped_mm" and len(args) > 2 and args[0].dim() == 2 and args[1].dim() == 3 and not args[3:]:
            return self._expert_by_expert(*args)
        if func.namespace not in OWN:
            return self._of_others(func, args, kwargs, op.written(args, kwargs))
        return self._widest(func, args, kwargs, op.written(args, kwargs))

    def _narrow(self, values: Iterable) -> int:
        """How many of these are narrow tensors, in lists too; what dtypes there are is remembered."""
        count = 0
        for value in values:
            if isinstance(value, torch.Tensor):
                if value.dtype in self._wider:
                    self._stored.add(value.dtype)
                    count += 1
            elif isinstance(value, (list, tuple)):
                count += self._narrow(value)
        return count

    def widened(self, value: Any) -> Any:
        """A tensor, or tensors in lists and tuples, in `dtype`; what is no narrow float stays as it is."""
        if isinstance(value, torch.Tensor):
            return self._wide(value, self._scale_of(value))
        if type(value) in (list, tuple):
            return type(value)([self.widened(v) for v in value])
        return value

    def asked_wide(self, value: Any) -> Any:
        """`widened` for where the mode is on: it sees the conversion itself, and scales what that reads."""
        if not isinstance(value, torch.Tensor) or value.dtype not in self._wider or is_foreign(value):
            return type(value)(map(self.asked_wide, value)) if type(value) in (list, tuple) else value
        return value.to(self._wider[value.dtype])

    def _scale_of(self, tensor: torch.Tensor) -> tuple[float, float] | None:
        return self.scales.get(storage_of(tensor)) if self.scales and not is_foreign(tensor) else None

    def _wide(self, tensor: torch.Tensor, scale: tuple[float, float] | None) -> torch.Tensor:
        dtype = self._wider.get(tensor.dtype)
        if dtype is None or is_foreign(tensor):
            return tensor
        wide = tensor.to(dtype)
        if scale is None:
            return wide
        factor, offset = scale
        return wide.add_(offset).mul_(factor).sub_(offset) if offset else wide.mul_(factor)

    def _dtype(self, value: Any) -> Any:
        return self._wider.get(value, value) if isinstance(value, torch.dtype) else value

    # computing -------------------------------------------------------------------------------------

    def _widest(self, func: Any, args: Sequence, kwargs: Mapping, written: Sequence[torch.Tensor]) -> Any:
        """An operation of torch's in `dtype` or, where it doesn't know that, in the widest dtype that it knows."""
        try:
            return self._computed(func, args, kwargs, written, self.widened)
        except Exception as error:  # a kernel for some dtypes only, or the model's own error: then it comes again
            if _is_memory(error):
                raise
        known = [d for d in SMALLER if d in self._stored or d == torch.float32]
        return self._first_known(func, args, kwargs, written, [(d, partial(self._narrowed, dtype=d)) for d in known])

    def _computed(
        self, func: Any, args: Sequence, kwargs: Mapping, written: Sequence[torch.Tensor], change: Change
    ) -> Any:
        """The operation with its tensors changed; what it writes keeps its dtype, and takes the result rounded."""
        changed: dict[int, torch.Tensor] = {}  # what is given twice stays one tensor: x.addmm_(x, y)
        given = [self._changed(value, change, changed) for value in args]
        named = {name: self._changed(value, change, changed) for name, value in kwargs.items()}
        out = func(*given, **named)
        if not written:
            return self.widened(out)
        original = {}
        for tensor in written:
            new = changed[id(tensor)]
            original[id(new)] = tensor
            if new is not tensor:
                tensor.resize_(new.shape) if new.shape != tensor.shape else None  # an empty `out=`
                tensor.copy_(new)
        return tree_map_only(torch.Tensor, lambda t: original[id(t)] if id(t) in original else self.widened(t), out)

    def _changed(self, value: Any, change: Change, changed: dict[int, torch.Tensor]) -> Any:
        """An argument with its tensors changed, these gathered in `changed` under the ids of the given ones.

        No function inside `_computed`: one that calls itself is a reference cycle, and would hold every widened
        weight until Python's garbage collector comes round.
        """
        if isinstance(value, torch.Tensor):
            if id(value) not in changed:
                changed[id(value)] = change(value)
            return changed[id(value)]
        if isinstance(value, torch.dtype):
            return self._dtype(value) if change == self.widened else value
        return [self._changed(v, change, changed) for v in value] if isinstance(value, (list, tuple)) else value

    def _by_pieces(
        self, func: Any, args: Sequence, kwargs: Mapping, large: int, split: dict[int, int], along: int
    ) -> Any:
        """A product with a large stored matrix, so many of its rows at a time that the widened ones stay few.

        Args:
            large: the number of the argument that is it.
            split: argument -> the dimension of it that is split, counted from the end where it may be broadcast.
            along: the dimension of the result that these are.
        """
        count = args[large].shape[split[large]]
        step = max(1, PIECE * count // args[large].numel())
        out = None
        for start in range(0, count, step):
            length, piece = min(step, count - start), list(args)
            for i, dim in split.items():
                whole = args[i]
                if whole is not None and whole.dim() >= -dim and whole.shape[dim] == count:
                    piece[i] = whole.narrow(dim, start, length)
            part = self._computed(func, piece, kwargs, (), self.widened)
            if out is None:
                shape = list(part.shape)
                shape[along] = count
                out = part.new_empty(shape)
            out.narrow(along, start, length).copy_(part)
        return out

    def _expert_by_expert(self, x: torch.Tensor, experts: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """(tokens, k), (experts, k, n) -> (tokens, n): each expert's weights times the tokens up to its end."""
        out = x.new_zeros(len(x), experts.shape[2], dtype=self.dtype)
        start = 0
        for expert, end in zip(experts, ends.tolist(), strict=True):
            if end > start:
                out[start:end] = self.__torch_dispatch__(torch.ops.aten.mm.default, (), (x[start:end], expert))
            start = max(start, end)
        return out

    # what can't be wide, or may not ----------------------------------------------------------------

    def _beside_foreign(self, func: Any, args: Sequence, kwargs: Mapping) -> Any:
        """Tensors that dispatch by themselves stay, and what stands beside them takes their dtype."""
        foreign = [t.dtype for t in _tensors((*args, *kwargs.values())) if is_foreign(t)]
        dtype = next((d for d in foreign if d in self._wider), self.dtype)
        written = _operation(func).written(args, kwargs)
        return self._first_known(func, args, kwargs, written, [(dtype, partial(self._lowered, dtype=dtype))])

    def _of_others(self, func: Any, args: Sequence, kwargs: Mapping, written: Sequence[torch.Tensor]) -> Any:
        """An operation of somebody else's, in `dtype` only where it gives about the same in the dtypes it is made for:
        there are kernels that read doubles as something else, or round them inside."""
        own = [t.dtype for t in _tensors((*args, *kwargs.values())) if t.dtype in SMALLER]
        tries = [(d, partial(self._lowered, dtype=d)) for d in dict.fromkeys((*own, *SMALLER))]
        tries += [(d, partial(self._narrowed, dtype=d)) for d in SMALLER]
        before = dict(self.narrow)
        usual = self._first_known(func, args, kwargs, written, tries)
        if written or not any(t.dtype == self.dtype for t in _tensors((usual,))):
            return usual
        try:
            out = self._computed(func, args, kwargs, (), self.widened)
        except Exception as error:
            if _is_memory(error):
                raise
            return usual
        results = [*_tensors((out,))]
        if not all(map(_is_near, results, _tensors((usual,)))):
            return usual
        self.narrow = before
        for dtype in reversed(SMALLER):  # where it rounds inside, what is rounded before comes out the same
            if any(t.dtype == self.dtype and not _holds(t, dtype) for t in _tensors((*args, *kwargs.values()))):
                rounded = partial(self._rounded, dtype=dtype)
                again = _tensors((self._computed(func, args, kwargs, (), rounded),))
                if all(map(torch.equal, results, again)):
                    self._note(func, dtype)
                    break
        return out

    def _first_known(
        self,
        func: Any,
        args: Sequence,
        kwargs: Mapping,
        written: Sequence[torch.Tensor],
        tries: Sequence[tuple[torch.dtype, Change]],
    ) -> Any:
        """The operation in the first dtype that it takes, which is noted if there are floats in its result."""
        for left, (dtype, change) in enumerate(tries, 1 - len(tries)):
            try:
                out = self._computed(func, args, kwargs, written, change)
            except Exception as error:
                if _is_memory(error) or not left:
                    raise
            else:
                if dtype != self.dtype and any(t.is_floating_point() for t in _tensors((out,))):
                    self._note(func, dtype)
                return out

    def _narrowed(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Every float in `dtype`."""
        tensor = self._scaled(tensor)
        return tensor.to(dtype) if tensor.dtype in SMALLER or tensor.dtype == self.dtype else tensor

    def _lowered(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What the mode has widened in `dtype`; what is stored stays."""
        tensor = self._scaled(tensor)
        return tensor.to(dtype) if tensor.dtype == self.dtype else tensor

    def _scaled(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor as it is, or wide where only that has its values."""
        return self.widened(tensor) if self._scale_of(tensor) else tensor

    def _rounded(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What the mode has widened rounded to `dtype`, and all of it wide."""
        return tensor.to(dtype).to(self.dtype) if tensor.dtype == self.dtype else self.widened(tensor)

    def _note(self, func: Any, dtype: torch.dtype) -> None:
        dtypes = {dtype, self.narrow.get(func.name(), dtype)}
        self.narrow[func.name()] = max(dtypes, key=lambda d: torch.finfo(d).eps)


class _Front(TorchFunctionMode):
    """What happens before a dispatch mode sees it: autocast, and functions that compare dtypes or choose by them."""

    def __init__(self, wide: WideArithmetic) -> None:
        super().__init__()
        self.wide = wide

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C._DisableAutocast():  # else it would keep every weight it has cast until it is left
            if func in CHECKING:
                args = tuple(v if i in CHECKING[func] else self.wide.asked_wide(v) for i, v in enumerate(args))
                kwargs = {k: v if k in CHECKING[func] else self.wide.asked_wide(v) for k, v in kwargs.items()}
            try:
                return func(*args, **kwargs)
            except RuntimeError as error:
                if "out" in kwargs or func.__name__.endswith("_") or _is_memory(error):
                    raise
            if func in MAKING and "dtype" not in kwargs:  # the lowest double, say, is no float32
                return func(*args, **kwargs, dtype=self.wide.dtype)
            wide = tree_map_only(torch.Tensor, self.wide.asked_wide, (args, kwargs))
            return func(*wide[0], **wide[1])


# what torch's operations are like ------------------------------------------------------------------

OWN = ("aten", "prims", "prim", "higher_order")  # namespaces of operations that compute in the dtype they are given

SMALLER = (torch.float32, torch.float16, torch.bfloat16)  # from the finest on

CHOOSING = {
    "embedding",
    "index",
    "index_select",
    "gather",
    "take",
    "masked_select",
    "clone",
    "_to_copy",
}  # no arithmetic

UNSAID = {  # positions of running statistics that these change without their schema saying so, and of `training`
    "native_batch_norm": ((3, 4), 5),
    "cudnn_batch_norm": ((3, 4), 5),
    "miopen_batch_norm": ((3, 4), 5),
}

MAKING = (torch.tensor, torch.full, torch.scalar_tensor)  # of numbers, in the default dtype

CHECKING: dict[Any, tuple] = {  # functions that compare dtypes themselves -> what they leave alone: large weights
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), (1, "weight")),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), (1, "weight")),
    **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), ()),
    **dict.fromkeys((F.scaled_dot_product_attention, F.rms_norm, torch.rms_norm), ()),
}


Split = tuple[dict[int, int], int]  # argument -> the dimension of it that is split, and that of the result


def _convolved(args: Sequence) -> Split | None:
    transposed, groups = args[6], args[8]
    return ({1: 1 if transposed else 0, 2: 0}, 1) if groups == 1 else None


PRODUCTS: dict[Any, dict[int, Callable[[Sequence], Split | None]]] = {  # operation -> the large argument -> its split
    torch.ops.aten.mm.default: {0: lambda _: ({0: 0}, 0), 1: lambda _: ({1: 1}, 1)},
    torch.ops.aten.mv.default: {0: lambda _: ({0: 0}, 0)},
    torch.ops.aten.bmm.default: {0: lambda _: ({0: 0, 1: 0}, 0), 1: lambda _: ({0: 0, 1: 0}, 0)},
    torch.ops.aten.addmm.default: {1: lambda _: ({0: -2, 1: 0}, 0), 2: lambda _: ({0: -1, 2: 1}, 1)},
    torch.ops.aten.baddbmm.default: {1: lambda _: ({0: -3, 1: 0, 2: 0}, 0), 2: lambda _: ({0: -3, 1: 0, 2: 0}, 0)},
    torch.ops.aten.convolution.default: {1: _convolved},
}


class _Operation(NamedTuple):
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

    def written(self, args: Sequence, kwargs: Mapping) -> list[torch.Tensor]:
        """The tensors of this call that it writes into."""
        if self.name in UNSAID:
            positions, training = UNSAID[self.name]
            return [args[i] for i in positions if args[training] and args[i] is not None]
        given = (args[i] if i < len(args) else kwargs.get(name) for i, name in self.writes)
        return [*_tensors(given)] if self.writes else []


@functools.cache
def _operation(func: Any) -> _Operation:
    if not isinstance(func, torch._ops.OpOverload):
        return _Operation(func.name(), False, (), False)
    schema = func._schema
    name = schema.name.split("::")[1]
    shared = [r.alias_info for r in schema.returns]
    view = any(info is not None and not info.is_write for info in shared) and name not in ("lift", "lift_fresh")
    writes = [
        (i, a.name) for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write
    ]
    return _Operation(name, view, tuple(writes), bool(writes) and all(info is not None for info in shared))


def storage_of(tensor: torch.Tensor) -> int:
    """What a tensor has in common with its views."""
    return tensor.untyped_storage()._cdata


def is_foreign(tensor: torch.Tensor) -> bool:
    """Whether a tensor is of a subclass that dispatches by itself: what its storage means, it alone knows."""
    return type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _holds(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a dtype has all the values of a tensor."""
    return torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)


def _is_near(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two results are the same, but for rounding at worst."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return True  # an index of the largest may be another one
    return bool((a - b).abs().nan_to_num(0).max() <= 0.1 * b.abs().nan_to_num(0).max()) if a.numel() else True


def _is_memory(error: Exception) -> bool:
    """Whether an error says that there is no memory left: on a CPU that is a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
