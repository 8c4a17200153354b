"""A device that this machine lacks, simulated: its tensors are ordinary CPU tensors, remembered by their storages.

What is wrong on a card is wrong here: mixing devices, making doubles where there are none, drawing with a generator of
another device. What makes a card wait (a number that is read, a copy from device to device) is counted.

Worked example: on `SimulatedDevice("cuda:0")`, `torch.ones(2, device="cuda:0") + torch.ones(2)` raises, and
`torch.ones(2, device="cuda:0").sum().item()` adds "_local_scalar_dense" to `waits`.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

CPU = torch.device("cpu")
MOVES = {"to", "cpu", "cuda"}  # methods after whose name comes a device
READS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero"}  # operations for whose result the host waits
TAKES_CPU_INDICES = {"index", "index_put_", "index_put", "_index_put_impl_"}  # of a tensor on any device
DOUBLES = (torch.float64, torch.complex128)


class SimulatedDevice(TorchFunctionMode):
    """While open, tensors may be made on this device or moved to it.

    Args:
        device: "cuda:0", say.
        has_doubles: False for a device that raises a TypeError where a double would be made on it, as MPS does.

    Attributes:
        waits: the operations that made the host wait for the device or copied something to it, in their order.
    """

    def __init__(self, device: str = "cuda:0", has_doubles: bool = True) -> None:
        super().__init__()
        self.device = torch.device(device)
        self.has_doubles = has_doubles
        self.waits: list[str] = []
        self._storages: dict[int, StorageWeakRef] = {}  # while there is a weak reference, no address is used again
        self._operations = _Operations(self)
        self._open = contextlib.ExitStack()

    def __enter__(self) -> SimulatedDevice:
        """Opens the mode, and gives the device random states."""
        states = types.SimpleNamespace(get_rng_state=lambda *_: None, set_rng_state=lambda *_: None)
        modules = {self.device.type: states}
        get_module = torch.get_device_module

        class Generator(torch.Generator):
            def __new__(cls, device: torch.device | str = "cpu") -> Generator:
                made = super().__new__(cls)
                made.is_simulated = self._is_own(device)
                return made

        def module_of(device: torch.device) -> object:
            return modules.get(torch.device(device).type) or get_module(device)

        self._open.enter_context(mock.patch.object(torch, "Generator", Generator))
        self._open.enter_context(mock.patch.object(torch, "get_device_module", module_of))
        self._open.enter_context(self._operations)
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        """Closes the mode; tensors of the device are CPU tensors again."""
        super().__exit__(*error)
        self._open.close()

    @contextlib.contextmanager
    def without_other_modes(self) -> Iterator[None]:
        """While open, all modes are off but this one, as they would be beside a card."""
        with _disable_current_modes(), self._operations:
            super().__enter__()
            try:
                yield
            finally:
                super().__exit__(None, None, None)

    def take_(self, module: torch.nn.Module) -> torch.nn.Module:
        """Lets the tensors of a module lie on the device from now on."""
        for tensor in [*module.parameters(), *module.buffers()]:
            self.mark(tensor)
        return module

    def mark(self, tensor: torch.Tensor) -> torch.Tensor:
        """Lets a tensor lie on the device from now on."""
        if not self.has_doubles and tensor.dtype in DOUBLES:
            raise TypeError(f"{self.device} has no {tensor.dtype}")
        storage = tensor.untyped_storage()
        self._storages.setdefault(storage._cdata, StorageWeakRef(storage))
        return tensor

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies on the device."""
        return tensor.layout == torch.strided and tensor.untyped_storage()._cdata in self._storages

    def _is_own(self, device: object) -> bool:
        return isinstance(device, (str, torch.device)) and torch.device(device).type == self.device.type

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Answers what only the device's own build of torch could, and lets the CPU do the rest."""
        kwargs = dict(kwargs or {})
        name = func.__name__
        first = args[0] if args and type(args[0]) in (torch.Tensor, torch.nn.Parameter) else None
        if name == "__get__" and first is not None:
            attribute = func.__self__
            if attribute is torch.Tensor.device:
                return self.device if self.holds(first) else func(*args)
            if attribute is torch.Tensor.is_cuda:
                return self.holds(first) and self.device.type == "cuda"
        if name in ("tolist", "numpy", "__array__") and first is not None and self.holds(first):
            if name != "tolist":
                raise TypeError(f"can't convert a tensor on {self.device} to numpy: use Tensor.cpu() first")
            self.waits.append(name)
        if name in MOVES and first is not None:
            return self._moved(func, first, args[1:], kwargs)
        if not self._is_own(kwargs.get("device")):
            return func(*args, **kwargs)
        generator = kwargs.get("generator")
        if generator is not None and not generator.is_simulated:
            raise RuntimeError(f"expected a generator of {self.device}")
        out = func(*args, **kwargs | {"device": CPU})
        return tree_map_only(torch.Tensor, self.mark, out)

    def _moved(self, func, tensor, args, kwargs):
        """`Tensor.to` and its like, with the devices among the arguments taken for what they stand for."""
        is_to = func.__name__ == "to"
        given = [*args, kwargs.get("device"), kwargs.get("other")]
        places = [value for value in given if isinstance(value, (str, torch.device, torch.Tensor))]
        own = self.holds(tensor) if is_to else func.__name__ == "cuda"
        for place in places:
            own = self.holds(place) if isinstance(place, torch.Tensor) else self._is_own(place)
        if own != self.holds(tensor):
            self.waits.append(f"copy {'to' if own else 'from'} device")
            with self._operations.nowhere():
                tensor = tensor.clone()
        if is_to:
            args = [CPU if isinstance(value, (str, torch.device)) else value for value in args]
            kwargs |= {"device": CPU} if "device" in kwargs else {}
            with self._operations.nowhere():
                tensor = tensor.to(*args, **kwargs)
        return self.mark(tensor) if own else tensor


class _Operations(TorchDispatchMode):
    """Sees every operation, those of backward passes and of modules in C++ too, and where its tensors lie."""

    def __init__(self, simulated: SimulatedDevice) -> None:
        super().__init__()
        self._simulated = simulated
        self._is_copying = False

    @contextlib.contextmanager
    def nowhere(self):
        """While open, results lie on the CPU."""
        self._is_copying = True
        yield
        self._is_copying = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Makes the operation, if it could be made on one device, and notes where its results lie."""
        kwargs = kwargs or {}
        simulated = self._simulated
        if self._is_copying:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        on_device = [tensor for tensor in tensors if simulated.holds(tensor)]
        is_on_device = bool(on_device)
        if is_on_device:
            if name in READS:
                simulated.waits.append(name)
            elsewhere = [t for t in tensors if t.dim() and not simulated.holds(t)]
            if name == "copy_":
                is_on_device = simulated.holds(args[0])
                simulated.waits += ["copy_"] * (len(on_device) == 1)
            elif name in TAKES_CPU_INDICES and simulated.holds(args[0]):
                simulated.waits += ["copy to device"] * len(elsewhere)
                simulated.waits += ["nonzero"] * any(t.dtype == torch.bool for t in tensors[1:])
            elif elsewhere:
                shape = tuple(elsewhere[0].shape)
                raise RuntimeError(f"{func}: a tensor {shape} on the CPU among tensors on {simulated.device}")
        out = func(*args, **kwargs)
        if is_on_device and "device" not in kwargs:
            for tensor in tree_leaves(out):
                if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                    simulated.mark(tensor)
        return out
