"""Operations that don't compute in double, or may not: each runs in another dtype, and that dtype is noted.

Wide arithmetic (wide.py) sends three kinds of operations to this file: operations of torch that know no double,
operations of other libraries, which may compute something else in double, and operations on tensors that dispatch by
themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from .operations import SMALLER, OperationCall, is_foreign, is_out_of_memory, tensors_in

if TYPE_CHECKING:
    from .wide import WideArithmetic

Change = Callable[[torch.Tensor], torch.Tensor]
Attempt = tuple[torch.dtype, Change]  # the dtype that is noted, and how the tensors of the call are changed to it


class OtherDtypes:
    """The ways of one `WideArithmetic` to compute in dtypes other than its own.

    Attributes:
        used: operation -> the dtype that it computed in, of several the coarsest.
    """

    def __init__(self, wide: WideArithmetic) -> None:
        self._wide = wide
        self.used: dict[str, torch.dtype] = {}

    # the three kinds -------------------------------------------------------------------------------

    def of_torch(self, call: OperationCall, stored: set[torch.dtype]) -> Any:
        """An operation of torch's in the widest dtype that it knows.

        Args:
            stored: the dtypes of stored tensors, of which the operation has to know one.
        """
        # float32 is tried even where nothing is stored in it: most kernels know it.
        known_or_stored = {torch.float32, *stored}
        dtypes = [dtype for dtype in SMALLER if dtype in known_or_stored]
        attempts = _attempts(self._narrowed, dtypes)
        return self._first_known(call, attempts)

    def beside_foreign(self, call: OperationCall) -> Any:
        """Tensors that dispatch by themselves stay, and the tensors beside them take their dtype."""
        wide = self._wide
        dtype = wide.dtype
        for tensor in call.tensors:
            if is_foreign(tensor) and wide.is_narrow(tensor.dtype):
                dtype = tensor.dtype
                break
        attempts = _attempts(self._lowered, [dtype])
        return self._first_known(call, attempts)

    def of_others(self, call: OperationCall) -> Any:
        """An operation of another library, in double only if that is near the result in the dtypes it is made for.

        Some kernels read doubles as something else, or round doubles inside.
        """
        wide = self._wide
        used_before = dict(self.used)
        attempts = self._attempts_of_others(call)
        usual = self._first_known(call, attempts)
        usual_tensors = list(tensors_in((usual,)))
        is_any_wide = any(map(self._is_wide, usual_tensors))
        # A call that writes must not run twice; a result without wide floats shows no rounding.
        if call.written or not is_any_wide:
            return usual
        try:
            out = wide.computed(call, wide.widened)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return usual
        wide_tensors = list(tensors_in((out,)))
        if not all(map(_is_near, wide_tensors, usual_tensors)):
            return usual
        # The result in double counts, not the usual one.
        self.used = used_before
        rounding = self._rounding_inside(call, wide_tensors)
        if rounding is not None:
            self._note(call, rounding)
        return out

    def _attempts_of_others(self, call: OperationCall) -> list[Attempt]:
        """First the dtypes of the call itself, in which stored tensors stay; then every float in one dtype."""
        own_dtypes = [tensor.dtype for tensor in call.tensors]
        in_order = [dtype for dtype in own_dtypes if dtype in SMALLER]
        in_order.extend(SMALLER)
        # The keys of a dict have an order, and each is there once.
        dtypes = dict.fromkeys(in_order)
        lowered = _attempts(self._lowered, dtypes)
        narrowed = _attempts(self._narrowed, SMALLER)
        return lowered + narrowed

    def _rounding_inside(self, call: OperationCall, results: Sequence[torch.Tensor]) -> torch.dtype | None:
        """The dtype that a kernel rounds doubles to inside, None if it doesn't.

        Where a kernel rounds inside, arguments that are rounded before give the very same result.
        """
        wide_arguments = list(filter(self._is_wide, call.tensors))
        # From the coarsest on, because rounding to a finer dtype may give the same result too.
        for dtype in reversed(SMALLER):
            if all(_holds(tensor, dtype) for tensor in wide_arguments):
                continue  # rounding to this dtype changes no argument, so it shows nothing
            change = partial(self._rounded, dtype=dtype)
            out_of_rounded = self._wide.computed(call, change)
            results_of_rounded = tensors_in((out_of_rounded,))
            if all(map(torch.equal, results, results_of_rounded)):
                return dtype
        return None

    def _first_known(self, call: OperationCall, attempts: Sequence[Attempt]) -> Any:
        """The operation in the first dtype that it takes, which is noted if there are floats in its result."""
        last = len(attempts)
        for number, (dtype, change) in enumerate(attempts, 1):
            try:
                out = self._wide.computed(call, change)
            except Exception as error:
                # Where no dtype is known, the last error is the model's own.
                if is_out_of_memory(error) or number == last:
                    raise
            else:
                if dtype != self._wide.dtype and _has_floats(out):
                    self._note(call, dtype)
                return out

    def _note(self, call: OperationCall, dtype: torch.dtype) -> None:
        name = call.func.name()
        used_before = self.used.get(name, dtype)
        coarsest = max(used_before, dtype, key=_coarseness)
        self.used[name] = coarsest

    def _is_wide(self, tensor: torch.Tensor) -> bool:
        return tensor.dtype == self._wide.dtype

    # changes of tensors ----------------------------------------------------------------------------

    def _narrowed(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Every float in `dtype`."""
        tensor = self._wide.scaled(tensor)
        if tensor.dtype in SMALLER or self._is_wide(tensor):
            return tensor.to(dtype)
        return tensor

    def _lowered(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Tensors that the mode has widened are lowered to `dtype`; stored tensors stay as they are."""
        tensor = self._wide.scaled(tensor)
        if self._is_wide(tensor):
            return tensor.to(dtype)
        return tensor

    def _rounded(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Every float wide, and those that the mode has widened rounded to `dtype` first."""
        if self._is_wide(tensor):
            rounded = tensor.to(dtype)
            return rounded.to(self._wide.dtype)
        return self._wide.widened(tensor)


def _attempts(change: Callable[..., torch.Tensor], dtypes: Iterable[torch.dtype]) -> list[Attempt]:
    attempts = []
    for dtype in dtypes:
        to_dtype = partial(change, dtype=dtype)
        attempts.append((dtype, to_dtype))
    return attempts


def _has_floats(out: Any) -> bool:
    """Whether there are floats in what an operation returns."""
    tensors = tensors_in((out,))
    return any(map(torch.is_floating_point, tensors))


def _coarseness(dtype: torch.dtype) -> float:
    """The distance from 1 to the next number of a dtype."""
    return torch.finfo(dtype).eps


def _holds(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a dtype has all the values of a tensor."""
    rounded = tensor.to(dtype)
    return torch.equal(rounded.to(tensor.dtype), tensor)


def _is_near(result: torch.Tensor, usual: torch.Tensor) -> bool:
    """Whether two results are the same up to rounding, at worst a tenth of the largest entry."""
    if result.shape != usual.shape:
        return False
    if result.dtype != usual.dtype:
        return False
    if not result.is_floating_point() or not result.numel():
        return True  # an integer, such as an index of the largest entry, may be another one after rounding
    # Both may have the same infinities, whose difference is no number.
    difference = (result - usual).abs()
    largest_difference = difference.nan_to_num(0).max()
    largest_entry = usual.abs().nan_to_num(0).max()
    is_near = largest_difference <= 0.1 * largest_entry
    return bool(is_near)
