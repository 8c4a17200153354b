"""DeepSpeed's ZeRO: DHSPG as its client optimizer, which prunes in the flat float32 weights that each rank has.

flat.py finds the boxes in the flat weights. Here are the steps, which come in parts, and what is refused before the
first of them. The flat weights are the master weights: what is zero in them is zero in the 16-bit model, too.

Worked example: two parameter groups, weights and biases, and ZIGs that are to be zero after step 10. In step 10 ZeRO
first steps the flat weights: the boxes in them that belong to these ZIGs become zero, and so does their state. Then
ZeRO steps the flat biases, and the same happens to these. With that step 10 is over, and the mask says so. Had the
gradients overflown, ZeRO would have called neither part, and the next step would be step 10.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.integrations import set_hf_deepspeed_config, unset_hf_deepspeed_config

from .cut_state import why_unflattenable
from .dhspg import DHSPG
from .flat import Flat, Section, boxes_of_rank, flat_weights, refuse_other_layout, slices_of_boxes
from .modeling_oto import OTOError
from .salience import gradient_squared, inner, weight_squared
from .slices import Part, on_this_rank, sum_over_zigs
from .zeros import can_be_dead

OPTIMIZERS = ("DeepSpeedZeroOptimizer", "BF16_Optimizer", "DeepSpeedZeroOptimizer_Stage3")  # classes of DeepSpeed
LEAVE_OUT = "leave it out of the config"
OFFLOAD = "leave it out of the config; ZeRO-3 or FSDP2 on more devices save memory too"
# settings of `zero_optimization` that move or change what the boxes are views of -> the way out
UNSUPPORTED = {
    "offload_optimizer": OFFLOAD,
    "offload_param": OFFLOAD,
    "cpu_offload": OFFLOAD,
    "cpu_offload_params": OFFLOAD,
    "zenflow": OFFLOAD,
    "elastic_checkpoint": "it drops what DHSPG knows of a run: save ordinary checkpoints (elastic_checkpoint: false)",
    "round_robin_gradients": "it orders the weights otherwise: leave it out of the config",
    "zero_quantized_weights": LEAVE_OUT,
    "zero_quantized_gradients": LEAVE_OUT,
    "zero_quantized_nontrainable_weights": LEAVE_OUT,
    "zero_hpz_partition_size": LEAVE_OUT,
    "mics_shard_size": LEAVE_OUT,
}
OFF = (None, False, 0, 1, -1, "none", "auto")  # values that turn a setting off; True, which equals 1, doesn't


# what is refused -----------------------------------------------------------------------------------


def refuse_config(config: Mapping[str, Any] | str | os.PathLike[str]) -> None:
    """Raises OTOError where a DeepSpeed config asks for what can't be done, with the way out.

    Args:
        config: the config, or the path of a JSON file with it.
    """
    if not isinstance(config, Mapping):
        config = json.loads(Path(config).read_text())
    if "optimizer" in config:
        raise OTOError(
            "the DeepSpeed config makes an optimizer of its own, and DHSPG has to be around it: remove the section "
            "`optimizer` from the config, and give its settings to the Trainer (learning_rate, optim) or to DHSPG"
        )
    zero = config.get("zero_optimization", {})
    stage = int(zero.get("stage", 0))
    if stage not in (1, 2, 3):
        raise OTOError(f"ZeRO stage {stage} is not supported: use stage 1, 2 or 3, FSDP2 or DDP")
    for name, way_out in UNSUPPORTED.items():
        value = zero.get(name)
        if isinstance(value, Mapping):
            value = value.get("device", True)
        if value is True or value not in OFF:
            raise OTOError(f"`{name}` of ZeRO is not supported: {way_out}")
    if config.get("checkpoint", {}).get("load_universal"):
        raise OTOError("universal checkpoints drop what DHSPG knows of a run: resume from the ordinary checkpoint")
    if config.get("elasticity", {}).get("enabled"):
        raise OTOError("`elasticity` changes the number of ranks, and with it what each of them has: leave it out")
    if config.get("compile", {}).get("deepcompile"):
        raise OTOError("`deepcompile` divides the parameters in a way of its own: leave it out of the config")
    autocast = config.get("torch_autocast", {})
    if autocast.get("enabled") and autocast.get("dtype") in ("float16", "fp16"):
        raise OTOError("`torch_autocast` in float16 may skip a part of a step: use bfloat16, or the section `fp16`")


@contextlib.contextmanager
def models_stay_whole(hf_config: Any) -> Iterator[None]:
    """While open, Transformers makes whole models. Once there are arguments for ZeRO-3, it would divide them.

    Args:
        hf_config: what Transformers has made of the DeepSpeed config.
    """
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(hf_config)


# the optimizer -------------------------------------------------------------------------------------


class ZeroDHSPG(DHSPG):
    """DHSPG as the client optimizer of DeepSpeed's ZeRO-1, 2 and 3. Its arguments are those of `DHSPG`.

    ZeRO steps its flat tensors one by one. The first of them begins a step of this optimizer, and the last one
    ends it. A step that ZeRO skips, because gradients overflow, doesn't count.

    The base optimizer has to move every element by itself, as SGD and Adam do, since it gets flat tensors. An axis
    counts as seen by a batch if any gradient in it is not zero: ZeRO has zeros where there is no gradient.

    Raises:
        OTOError: the step of the base optimizer depends on the shapes of parameters, or its state is there already.

    Example:
        optimizer = ZeroDHSPG(model, partition, torch.optim.AdamW, lr=1e-3, total_steps=1000)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        optimizer.attach(engine)  # before the first step
    """

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        self._flats: list[Flat] = []  # empty until `attach`
        self._first_group: dict[str, Any] | None = None  # the first parameter group, within a step
        self._num_stepped = 0  # flat tensors of this step so far
        self._totals = torch.zeros(0)  # sums over ZIGs so far, (sums, num_zigs)
        self._ranks: dist.ProcessGroup | None = None
        super().__init__(model, *args, **kwargs)
        why = why_unflattenable(self.base)
        if why is not None:
            raise OTOError(f"{why}, and under ZeRO parameters are flat: use AdamW or SGD, say, or train with FSDP2")
        self._whole = self._group, self._readers, self.held.restless  # of whole parameters
        self._trained = tuple(self.parameters_by_name())

    def __getstate__(self) -> dict[str, Any]:
        """Process groups can't be copied."""
        return super().__getstate__() | {"_ranks": None}

    def attach(self, engine: Any) -> None:
        """Finds the boxes of this rank, once ZeRO has divided the parameters and before the first step.

        Args:
            engine: what `deepspeed.initialize`, or `accelerator.prepare`, has made of the model.

        Raises:
            OTOError: the engine does something that isn't supported.
        """
        refuse_config(engine.config)
        zero = engine.optimizer
        if type(zero).__name__ not in OPTIMIZERS or zero.optimizer is not self:
            raise OTOError(f"{type(zero).__name__} of the engine is not ZeRO around this optimizer")
        if "dhspg_step" not in self.param_groups[0]:
            raise OTOError("DeepSpeed drops the first parameter group, which is empty: leave it out")
        self._ranks = zero.dp_process_group
        if dist.get_world_size(self._ranks) != dist.get_world_size():
            raise OTOError("ZeRO beside model or sequence parallel is not supported: let all ranks share the data")
        flats = [Flat(weights) for weights in flat_weights(zero)]
        params = dict(engine.module.named_parameters())
        trained = {name: params[name] for name in self._trained if name in params}
        here = boxes_of_rank(flats, zero, trained)
        group, readers, self._restless = self._whole
        if not {s.param for s in group + readers} <= trained.keys():
            raise OTOError("the engine's model is not the one that this optimizer was made for")
        refuse_other_layout(here, trained, self._ranks)
        self._slices = slices_of_boxes(group, here.of_params), slices_of_boxes(readers, here.of_params)
        self._flats = flats
        self._sections: dict[tuple[int, ...], Section] = {}
        self._enter(range(len(flats)))

    def _enter(self, numbers: Iterable[int]) -> None:
        """From here on, only boxes in the flat tensors of these numbers are looked at and changed."""
        numbers = tuple(numbers)
        if numbers not in self._sections:
            flats = [self._flats[n] for n in numbers]
            self._sections[numbers] = Section(flats, *self._slices, self._restless)
        self._section = self._sections[numbers]
        self._group, self._readers, self.held = self._section.group, self._section.readers, self._section.held

    # what the code for whole parameters asks for ---------------------------------------------------

    @property
    def _own(self) -> dict[str, Any]:
        """ZeRO takes the first group out of `param_groups` while it steps another one."""
        return self._first_group or super()._own

    def parameters_by_name(self) -> dict[str, Tensor]:
        """Boxes by name, within a step those that are stepped now; whole parameters before ZeRO has divided them."""
        if self._flats:
            return self._section.params
        # ZeRO leaves frozen parameters alone
        return {name: p for name, p in super().parameters_by_name().items() if p.requires_grad}

    def state_of(self, p: Tensor) -> Mapping[str, Any]:
        """The base optimizer's state of a box: views where the state has tensors of the flat one's shape."""
        for flat in self._section.flats:
            for name, box in flat.boxes.items():
                if box is p:
                    shape = flat.weights.shape
                    state = super().state_of(flat.weights)
                    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == shape}
                    return {key: flat.part(value, name) for key, value in tensors.items()}
        return {}

    def _sums(self, *many: Iterable[Part]) -> Tensor:
        """The sums that `_add_up` has made, part by part of a step."""
        return self._totals[:-1]

    def _seen_axes(self) -> list[bool]:
        """For every axis, whether any gradient in it is not zero."""
        num_nonzero = self._totals[-1].split(self._axis_sizes)
        return [bool(numbers.any()) for numbers in num_nonzero]

    def _agreed(self, zigs: Tensor) -> Tensor:
        """The mask of ZIGs that the first rank has."""
        mask = zigs.to(self._flats[0].weights.device, torch.uint8)
        dist.broadcast(mask, group_src=0, group=self._ranks)
        return mask.cpu() > 0

    # a step in parts -------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Makes one part of a step: that of the flat tensors which are in `param_groups` now."""
        if not self._flats:
            raise OTOError(
                "DHSPG doesn't know ZeRO's flat tensors: call optimizer.attach(engine) before the first step"
            )
        if closure is not None:
            raise OTOError("under ZeRO an optimizer gets no closure")
        numbers = self._numbers_of_part()
        if self._num_stepped == 0:
            self._first_group = self.param_groups[0]
        self._enter(numbers)
        now = self._own["dhspg_step"] + 1
        if now == 1 and self._num_stepped == 0:
            self._own["zero"] = self._dead_zigs()
            self._enter(numbers)
        self._num_stepped += len(numbers)
        self._before_step(now)
        self.base.step()
        self._after_step(now)
        self._hold_zeros(now)
        if self._is_last_part:
            self._own["dhspg_step"] = now
            self._num_stepped = 0
            self._first_group = None
            self._enter(range(len(self._flats)))

    def _numbers_of_part(self) -> list[int]:
        """The numbers of the flat tensors that are to be stepped now, which are the next ones."""
        numbers_of = {id(flat.weights): n for n, flat in enumerate(self._flats)}
        numbers = [numbers_of.get(id(p), -1) for group in self.param_groups for p in group["params"]]
        if numbers != list(range(self._num_stepped, self._num_stepped + len(numbers))):
            raise OTOError(
                f"ZeRO steps the flat tensors {numbers} after {self._num_stepped} others, not in their order"
            )
        if any(self._flats[n].has_moved for n in numbers):
            raise OTOError("ZeRO's flat tensors lie elsewhere now: call optimizer.attach(engine) again")
        return numbers

    @property
    def _is_last_part(self) -> bool:
        return self._num_stepped == len(self._flats)

    def _dead_zigs(self) -> Tensor:
        """`zeros.dead_zigs`, of the boxes of all ranks."""
        self._enter(range(len(self._flats)))
        slices = self._group + self._readers
        nonzero = (Part(s, None, p != 0) for s, p in on_this_rank(slices, self._section.params))
        num_nonzero = sum_over_zigs([nonzero], self._section.params, self.num_zigs)
        (num_nonzero,) = self._over_ranks(num_nonzero)
        dead = can_be_dead(self._axes, self._trained) & (num_nonzero == 0)
        return dead.to(torch.uint8)

    def _before_step(self, now: int) -> None:
        """Adds up what this part has of the sums. The last part has all of them, and samples."""
        if now not in self.schedule.sample_steps:
            return
        products = [inner] if self._salience is None else [inner, weight_squared, gradient_squared]
        for flat in self._section.flats:
            flat.show_gradients()
        parts = [self._parts(product) for product in (*products, _is_seen)]
        sums = sum_over_zigs(parts, self._section.params, self.num_zigs)
        for flat in self._section.flats:
            flat.hide_gradients()
        is_first_part = self._num_stepped == len(self._section.flats)
        self._totals = sums if is_first_part else self._totals + sums
        if self._is_last_part:
            self._totals = self._over_ranks(self._totals)
            self._sample()

    def _after_step(self, now: int) -> None:
        """Shrinks this part of what is redundant, or makes it zero. After the last part ZIGs are chosen."""
        if self._is_last_part:
            super()._after_step(now)
            return
        redundant = self._own["redundant"].cpu() > 0  # (num_zigs,)
        factor = self.schedule.factors.get(now)
        if factor == 0:
            self._freeze(redundant)
        elif factor is not None:
            self._multiply(redundant, factor)

    def _over_ranks(self, sums: Tensor) -> Tensor:
        """Sums of this rank, added up over all ranks."""
        total = sums.to(self._flats[0].weights.device)
        dist.all_reduce(total, group=self._ranks)
        return total.cpu()


def _is_seen(weight: Tensor, gradient: Tensor) -> Tensor:
    """Which gradients are not zero."""
    return gradient != 0
