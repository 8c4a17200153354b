"""Weightless stand-ins of a model's tensors: they have shapes and devices, and neither memory nor values.

The trace and the rehearsal run a model on them, so that a model of any size is analysed without its weights.
"""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from .modeling_oto import named_tensors


class Fakes:
    """Makes the stand-ins for one model.

    Attributes:
        mode: the context that has to be open while the model runs on the stand-ins.
    """

    def __init__(self, model: nn.Module) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        tensors = named_tensors(model)
        # Meta tensors say no device; they are taken to lie where the first of the model's other tensors does.
        self._device = torch.device("cpu")
        for tensor in tensors.values():
            if not tensor.is_meta:
                self._device = tensor.device
                break
        self._devices: dict[str, torch.device] = {}
        for name, tensor in tensors.items():
            self._devices[name] = self._device_of(tensor)

    def weights(self, model: nn.Module) -> dict[int, torch.Tensor]:
        """A stand-in for every parameter and buffer that the model has now, by the id of the original."""
        stand_ins: dict[int, torch.Tensor] = {}
        for name, tensor in named_tensors(model).items():
            key = id(tensor)
            if key not in stand_ins:  # tied tensors share one stand-in
                device = self._devices[name]
                stand_ins[key] = self._fake(tensor, device)
        return stand_ins

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """A stand-in for an input."""
        return self._fake(tensor, self._device_of(tensor))

    def _device_of(self, tensor: torch.Tensor) -> torch.device:
        if tensor.is_meta:
            return self._device
        return tensor.device

    def _fake(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        shape_alone = torch.empty_like(tensor, device="meta")
        fake = FakeTensor(self.mode, shape_alone, device)
        # isinstance(fake, nn.Parameter) reads this attribute
        fake._is_param = isinstance(tensor, nn.Parameter)
        return fake
