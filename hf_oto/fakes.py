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
        mode: has to be open while the model runs on them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        devices = {name: tensor.device for name, tensor in named_tensors(model).items()}
        # Meta tensors say no device; they are taken to lie where the model's other tensors do.
        self._device = torch.device("cpu")
        for device in devices.values():
            if device.type != "meta":
                self._device = device
                break
        self._devices = {name: self._device if d.type == "meta" else d for name, d in devices.items()}

    def weights(self, model: nn.Module) -> dict[int, torch.Tensor]:
        """A stand-in for every parameter and buffer that the model has now, by the id of the original."""
        stand_ins: dict[int, torch.Tensor] = {}
        for name, tensor in named_tensors(model).items():
            if id(tensor) not in stand_ins:  # tied tensors share one stand-in
                stand_ins[id(tensor)] = self._fake(tensor, self._devices[name])
        return stand_ins

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """A stand-in for an input."""
        device = self._device if tensor.is_meta else tensor.device
        return self._fake(tensor, device)

    def _fake(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        fake = FakeTensor(self.mode, torch.empty_like(tensor, device="meta"), device)
        fake._is_param = isinstance(tensor, nn.Parameter)  # which is what isinstance(fake, nn.Parameter) asks
        return fake
