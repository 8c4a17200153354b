"""DeepSpeed's ZeRO: DHSPG prunes in the flat float32 weights that ZeRO leaves each rank, box by box.

ZeRO writes the weights of a parameter group one behind the other, and gives every rank an equal run of these numbers.
What a rank has of a parameter is a run of its elements, and a run is a few boxes: parts of the parameter that are
tensors again. Each box is a view of the flat weights, with the ZIGs of its own positions, so that slices.py,
salience.py and zeros.py treat boxes as they treat parameters. The flat weights are the master weights: what becomes
zero in them becomes zero in the 16-bit model too.

Worked example: a weight of 3 rows and 5 columns, and two ranks. The 15 numbers are padded to 16, and each rank has 8.
Rank 0 has the numbers 0 to 7: row 0 as a box of (1, 5), and the first three columns of row 1 as a box of (1, 3). Rank
1 has the numbers 8 to 14: the other two columns of row 1 as a box of (1, 2), and row 2 as a box of (1, 5). For the
ZIGs of the columns the box of (1, 3) has the owners 0 1 2, and the box of (1, 2) has the owners 3 4.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .cut_state import why_unflattenable
from .dhspg import DHSPG
from .modeling_oto import OTOError
from .salience import gradient_squared, inner, weight_squared
from .slices import Part, Slice, on_this_rank, sum_over_zigs
from .trace import persistent_buffers
from .zeros import HeldZeros, can_be_dead

OPTIMIZERS = ("DeepSpeedZeroOptimizer", "BF16_Optimizer", "DeepSpeedZeroOptimizer_Stage3")  # classes of DeepSpeed
OFFLOAD = "leave it out of the config, or let accelerate's FSDP2 train the model"
ZERO_PP = "leave it out of the config"
# settings of `zero_optimization` that move or change what the boxes are views of -> the way out
UNSUPPORTED = {
    "offload_optimizer": OFFLOAD,
    "offload_param": OFFLOAD,
    "cpu_offload": OFFLOAD,
    "cpu_offload_params": OFFLOAD,
    "zenflow": OFFLOAD,
    "elastic_checkpoint": "it drops what DHSPG knows of a run: save ordinary checkpoints (elastic_checkpoint: false)",
    "round_robin_gradients": "it orders the weights otherwise: leave it out of the config",
    "zero_quantized_weights": ZERO_PP,
    "zero_quantized_gradients": ZERO_PP,
    "zero_quantized_nontrainable_weights": ZERO_PP,
    "zero_hpz_partition_size": ZERO_PP,
    "mics_shard_size": ZERO_PP,
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
    if zero.get("stage", 0) not in (1, 2):
        raise OTOError(f"ZeRO stage {zero.get('stage', 0)} is not supported: use stage 1 or 2, FSDP2 or DDP")
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
    autocast = config.get("torch_autocast", {})
    if autocast.get("enabled") and autocast.get("dtype") in ("float16", "fp16"):
        raise OTOError("`torch_autocast` in float16 may skip a part of a step: use bfloat16, or the section `fp16`")


# boxes ---------------------------------------------------------------------------------------------


class Fragment(NamedTuple):
    """What this rank has of a parameter: a run of its elements, in one of the flat tensors."""

    param: str
    start: int  # the first element, of the parameter written row by row
    flat: int  # the number of the flat tensor
    place: int  # where the run begins in the flat tensor
    values: Tensor  # the run as the model has it, perhaps in 16 bits, (n,)


class Box(NamedTuple):
    """A part of a parameter that is a tensor again."""

    first: tuple[int, ...]  # its first position in every dimension of the parameter
    shape: tuple[int, ...]


def boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """Splits the elements from `start` to `stop` of a tensor, written row by row, into boxes, in their order.

    Example:
        >>> boxes((3, 5), 0, 8)
        [Box(first=(0, 0), shape=(1, 5)), Box(first=(1, 0), shape=(1, 3))]
    """
    if start >= stop:
        return []
    if not shape:  # a single number
        return [Box((), ())]
    inner_shape = tuple(shape[1:])
    row_size = math.prod(inner_shape)
    whole_from = -(-start // row_size)  # the first row that is whole
    whole_to = stop // row_size  # the row behind the last one that is whole
    if whole_from > whole_to:
        return _boxes_of_row(inner_shape, whole_to, start, stop)
    found = _boxes_of_row(inner_shape, whole_from - 1, start, whole_from * row_size)
    if whole_from < whole_to:
        no_offset = (0,) * len(inner_shape)
        found.append(Box((whole_from, *no_offset), (whole_to - whole_from, *inner_shape)))
    found += _boxes_of_row(inner_shape, whole_to, whole_to * row_size, stop)
    return found


def _boxes_of_row(inner_shape: tuple[int, ...], row: int, start: int, stop: int) -> list[Box]:
    """Boxes of elements that all lie in one row."""
    begin = row * math.prod(inner_shape)
    found = boxes(inner_shape, start - begin, stop - begin)
    return [Box((row, *box.first), (1, *box.shape)) for box in found]


def fragments(params: Mapping[str, nn.Parameter]) -> Iterator[Fragment]:
    """What ZeRO-1 and 2 leave this rank of every parameter of a model.

    Args:
        params: the parameters by name.
    """
    for name, p in params.items():
        mapping = vars(p).get("_hp_mapping")
        if mapping is None:  # the parameter is frozen, or all of it is on other ranks
            continue
        address = mapping.lp_fragment_address
        values = p.detach().flatten().narrow(0, address.start, address.numel)
        place = mapping.hp_fragment_address.start
        yield Fragment(name, address.start, mapping.param_group_index, place, values)


class Flat:
    """A flat tensor of weights, and the boxes in it.

    Attributes:
        weights: the flat tensor, which the base optimizer steps.
        boxes: views of it by name: "layer.weight#1" is the second box of layer.weight on this rank.
    """

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights
        self.boxes: dict[str, Tensor] = {}
        self._places: dict[str, int] = {}  # where each box begins

    def add(self, name: str, place: int, shape: tuple[int, ...]) -> None:
        """Takes a box."""
        self._places[name] = place
        self.boxes[name] = self.weights.detach().narrow(0, place, math.prod(shape)).view(shape)

    def part(self, tensor: Tensor, name: str) -> Tensor:
        """The part of a tensor of the flat one's shape that belongs to a box."""
        box = self.boxes[name]
        return tensor.narrow(0, self._places[name], box.numel()).view(box.shape)

    def show_gradients(self) -> None:
        """Gives every box its part of the gradient that the flat tensor has now."""
        gradient = self.weights.grad
        for name, box in self.boxes.items():
            box.grad = None if gradient is None else self.part(gradient, name)

    def hide_gradients(self) -> None:
        """Lets go of the gradients."""
        for box in self.boxes.values():
            box.grad = None

    @property
    def has_moved(self) -> bool:
        """Whether the flat tensor lies elsewhere now, so that the boxes are views of nothing."""
        return any(box.data_ptr() != self.part(self.weights, name).data_ptr() for name, box in self.boxes.items())


class Section:
    """Those flat tensors that are stepped together, and the slices of their boxes."""

    def __init__(
        self, flats: Sequence[Flat], group: Iterable[Slice], readers: Iterable[Slice], restless: set[tuple[str, int]]
    ) -> None:
        self.flats = flats
        self.params = {name: box for flat in flats for name, box in flat.boxes.items()}
        self.group = tuple(s for s in group if s.param in self.params)
        self.readers = tuple(s for s in readers if s.param in self.params)
        moving = [(s.param, s.dim) for s in self.group if (_param_of(s.param), s.dim) in restless]
        self.held = HeldZeros(self.group, moving)


def _param_of(box: str) -> str:
    """The name of the parameter that a box is a part of."""
    return box.rpartition("#")[0]


def _slices_of_boxes(slices: Iterable[Slice], boxes_of: Mapping[str, Mapping[str, Box]]) -> list[Slice]:
    """Slices of whole parameters as slices of the boxes that this rank has of them.

    Args:
        boxes_of: parameter -> name of a box -> box.
    """
    known: dict[bytes, Tensor] = {}  # equal owners are one tensor, as in `slices_of`
    found = []
    for s in slices:
        for name, box in boxes_of.get(s.param, {}).items():
            first, size = box.first[s.dim], box.shape[s.dim]
            owner = s.owner[first : first + size]
            found.append(Slice(name, s.dim, known.setdefault(owner.numpy().tobytes(), owner)))
    return found


# the optimizer -------------------------------------------------------------------------------------


class ZeroDHSPG(DHSPG):
    """DHSPG as the client optimizer of DeepSpeed's ZeRO-1 and 2. Its arguments are those of `DHSPG`.

    ZeRO steps its parameter groups one by one. The first of them begins a step of this optimizer, and the last one
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
            raise OTOError(f"{type(zero).__name__} of the engine is not ZeRO-1 or 2 around this optimizer")
        if "dhspg_step" not in self.param_groups[0]:
            raise OTOError("DeepSpeed drops the first parameter group, which is empty: leave it out")
        self._ranks = zero.dp_process_group
        if dist.get_world_size(self._ranks) != dist.get_world_size():
            raise OTOError("ZeRO beside model or sequence parallel is not supported: let all ranks share the data")
        flats = [Flat(weights) for group in self.param_groups for weights in group["params"]]
        params = dict(engine.module.named_parameters())
        boxes_of: dict[str, dict[str, Box]] = {}
        for fragment in fragments(params):
            _refuse_other_layout(fragment, flats[fragment.flat].weights)
            place = fragment.place
            stop = fragment.start + len(fragment.values)
            boxes_of_param = boxes_of.setdefault(fragment.param, {})
            for box in boxes(params[fragment.param].shape, fragment.start, stop):
                name = f"{fragment.param}#{len(boxes_of_param)}"
                boxes_of_param[name] = box
                flats[fragment.flat].add(name, place, box.shape)
                place += math.prod(box.shape)
        group, readers, self._restless = self._whole
        self._slices = _slices_of_boxes(group, boxes_of), _slices_of_boxes(readers, boxes_of)
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


def _refuse_other_layout(fragment: Fragment, flat: Tensor) -> None:
    """Raises where the flat weights are not the model's, as they are when the layout of ZeRO isn't understood."""
    values = fragment.values
    master = flat.detach().narrow(0, fragment.place, len(values))
    if not torch.equal(master.to(values.dtype), values):
        raise OTOError(
            f"ZeRO's flat weights are not those of {fragment.param}: another release of DeepSpeed may order them "
            "otherwise (0.19 is known), or the model was changed after deepspeed.initialize"
        )


# the end -------------------------------------------------------------------------------------------


def master_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model that DeepSpeed trains, whole, on the CPU of every rank, in float32 where they train."""
    from deepspeed.utils import safe_get_full_fp32_param

    whole = {}
    for name, p in model.named_parameters():
        master = safe_get_full_fp32_param(p) if p.requires_grad else None
        value = p if master is None else master
        whole[name] = value.detach().to("cpu", copy=True)
    for name, buffer in persistent_buffers(model).items():
        whole[name] = buffer.detach().to("cpu", copy=True)
    return whole
