"""Operations that don't compute in double, or may not: each runs in another dtype, and that dtype is noted.

Wide arithmetic (wide.py) sends three kinds of operations here: torch's own that know no double, operations of others,
which may compute something else in double, and operations on tensors that dispatch by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from .operations import SMALLER, OperationCall, is_foreign, is_out_of_memory, tensors_in

if TYPE_CHECKING:
    from .wide import WideArithmetic

Change = Callable[[torch.Tensor], torch.Tensor]
Attempt = tuple[torch.dtype, Change]  # what its tensors are changed to, and how


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
            stored: the dtypes of stored tensors, of which one has to be known.
        """
        attempts = []
        for dtype in SMALLER:
            if dtype in stored or dtype == torch.float32:
                attempts.append((dtype, partial(self._narrowed, dtype=dtype)))
        return self._first_known(call, attempts)

    def beside_foreign(self, call: OperationCall) -> Any:
        """Tensors that dispatch by themselves stay, and what stands beside them takes their dtype."""
        wide = self._wide
        foreign_dtypes = [tensor.dtype for tensor in call.tensors if is_foreign(tensor)]
        dtype = next((dtype for dtype in foreign_dtypes if wide.is_narrow(dtype)), wide.dtype)
        return self._first_known(call, [(dtype, partial(self._lowered, dtype=dtype))])

    def of_others(self, call: OperationCall) -> Any:
        """An operation of somebody else's, in double only where it gives about the same in the dtypes it is made for.

        There are kernels that read doubles as something else, or that round them inside.
        """
        wide = self._wide
        used_before = dict(self.used)
        usual = self._first_known(call, self._attempts_of_others(call))
        if call.written or not any(tensor.dtype == wide.dtype for tensor in tensors_in((usual,))):
            return usual
        try:
            out = wide.computed(call, wide.widened)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return usual
        results = list(tensors_in((out,)))
        if not all(map(_is_near, results, tensors_in((usual,)))):
            return usual
        self.used = used_before  # the result in double counts, not the usual one
        rounding = self._rounding_inside(call, results)
        if rounding is not None:
            self._note(call, rounding)
        return out

    def _attempts_of_others(self, call: OperationCall) -> list[Attempt]:
        """First the dtypes of the call itself, in which stored tensors stay; then every float in one dtype."""
        own = [tensor.dtype for tensor in call.tensors if tensor.dtype in SMALLER]
        attempts: list[Attempt] = []
        for dtype in dict.fromkeys((*own, *SMALLER)):
            attempts.append((dtype, partial(self._lowered, dtype=dtype)))
        for dtype in SMALLER:
            attempts.append((dtype, partial(self._narrowed, dtype=dtype)))
        return attempts

    def _rounding_inside(self, call: OperationCall, results: Sequence[torch.Tensor]) -> torch.dtype | None:
        """The dtype that a kernel rounds doubles to inside, None if it doesn't.

        Where a kernel rounds inside, arguments that are rounded before give the very same result.
        """
        wide = self._wide
        for dtype in reversed(SMALLER):
            if all(tensor.dtype != wide.dtype or _holds(tensor, dtype) for tensor in call.tensors):
                continue  # rounding to this dtype changes no argument, so it shows nothing
            again = wide.computed(call, partial(self._rounded, dtype=dtype))
            if all(map(torch.equal, results, tensors_in((again,)))):
                return dtype
        return None

    def _first_known(self, call: OperationCall, attempts: Sequence[Attempt]) -> Any:
        """The operation in the first dtype that it takes, which is noted if there are floats in its result."""
        for number, (dtype, change) in enumerate(attempts, 1):
            try:
                out = self._wide.computed(call, change)
            except Exception as error:
                if is_out_of_memory(error) or number == len(attempts):
                    raise
            else:
                if dtype != self._wide.dtype and any(t.is_floating_point() for t in tensors_in((out,))):
                    self._note(call, dtype)
                return out

    def _note(self, call: OperationCall, dtype: torch.dtype) -> None:
        name = call.func.name()
        dtypes = {dtype, self.used.get(name, dtype)}
        self.used[name] = max(dtypes, key=lambda d: torch.finfo(d).eps)

    # changes of tensors ----------------------------------------------------------------------------

    def _narrowed(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Every float in `dtype`."""
        tensor = self._wide.scaled(tensor)
        return tensor.to(dtype) if tensor.dtype in SMALLER or tensor.dtype == self._wide.dtype else tensor

    def _lowered(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What the mode has widened in `dtype`; what is stored stays."""
        tensor = self._wide.scaled(tensor)
        return tensor.to(dtype) if tensor.dtype == self._wide.dtype else tensor

    def _rounded(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What the mode has widened rounded to `dtype`, and all of it wide."""
        if tensor.dtype == self._wide.dtype:
            return tensor.to(dtype).to(self._wide.dtype)
        return self._wide.widened(tensor)


def _holds(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a dtype has all the values of a tensor."""
    return torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)


def _is_near(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two results are the same up to rounding, at worst a tenth of the largest entry."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point() or not a.numel():
        return True  # an integer, such as an index of the largest entry, may be another one after rounding
    difference = (a - b).abs().nan_to_num(0).max()
    largest = b.abs().nan_to_num(0).max()
    return bool(difference <= 0.1 * largest)
