"""Flat weights: what ZeRO leaves each rank of the parameters, seen as boxes, which are tensors again.

ZeRO writes the weights of a parameter group one behind the other and gives every rank a run of these numbers (ZeRO-1
and 2), or gives every rank a run of each parameter (ZeRO-3). A run is a few boxes. Each box is a view of the flat
float32 weights, with the ZIGs of its own positions, so that slices.py, salience.py and zeros.py treat boxes as they
treat parameters. zero.py makes the steps.

Worked example: a weight of 3 rows and 5 columns, and two ranks. The 15 numbers are padded to 16, and each rank has 8.
Rank 0 has the numbers 0 to 7: row 0 as a box of (1, 5), and the first three columns of row 1 as a box of (1, 3). Rank
1 has the numbers 8 to 14: the other two columns of row 1 as a box of (1, 2), and row 2 as a box of (1, 5). For the
ZIGs of the columns the box of (1, 3) has the owners 0 1 2, and the box of (1, 2) has the owners 3 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .modeling_oto import OTOError
from .restore import contents, replace_tensors_
from .slices import Slice
from .zeros import HeldZeros

Params = Mapping[str, nn.Parameter]  # by name


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


class Flat:
    """A flat tensor of weights, and the boxes in it.

    Attributes:
        weights: the flat tensor, which the base optimizer steps.
        boxes: views of it by name: "layer.weight#1" is the second box of layer.weight on this rank.
    """

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights
        self._address = weights.data_ptr()
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
        return self.weights.data_ptr() != self._address


def flat_weights(zero: Any) -> list[Tensor]:
    """The flat tensors of this rank, in the order in which they are stepped.

    Args:
        zero: the optimizer that DeepSpeed has put around ours.
    """
    if _is_stage_3(zero):
        return list(zero.fp32_partitioned_groups_flat)
    weights = []
    for group in zero.optimizer.param_groups:
        weights += group["params"]
    return weights


def _is_stage_3(zero: Any) -> bool:
    return type(zero).__name__ == "DeepSpeedZeroOptimizer_Stage3"


def shape_of(p: Tensor) -> tuple[int, ...]:
    """The shape of a parameter, also while ZeRO-3 keeps it empty."""
    shape = vars(p).get("ds_shape", p.shape)
    return tuple(shape)


def _numel(p: Tensor) -> int:
    return math.prod(shape_of(p))


def fragments(zero: Any, params: Params) -> Iterator[Fragment]:
    """What ZeRO leaves this rank of every parameter of a model; frozen parameters are not in the flat tensors.

    Args:
        zero: the optimizer that DeepSpeed has put around ours.
        params: the parameters by name.
    """
    fragment_of = _fragment_of_stage_3 if _is_stage_3(zero) else _fragment_of_stage_2
    for name, p in params.items():
        fragment = fragment_of(zero, name, p) if p.requires_grad else None
        if fragment is not None:
            yield fragment


def _fragment_of_stage_3(zero: Any, name: str, p: nn.Parameter) -> Fragment | None:
    """The run of a parameter that this rank has; None where the run is all padding."""
    number = zero.get_param_id(p)
    flat, place, run = zero.grad_position[number]
    start = run * dist.get_rank(zero.dp_process_group)
    size = min(run, _numel(p) - start)  # the last runs are padded
    if size <= 0:
        return None
    values = p.ds_tensor.detach().narrow(0, 0, size)
    return Fragment(name, start, flat, place, values)


def _fragment_of_stage_2(zero: Any, name: str, p: nn.Parameter) -> Fragment | None:
    """What lies of a parameter in the run of its group; None where all of it is on other ranks. Also of stage 1."""
    mapping = vars(p).get("_hp_mapping")
    if mapping is None:
        return None
    address = mapping.lp_fragment_address
    values = p.detach().flatten().narrow(0, address.start, address.numel)
    place = mapping.hp_fragment_address.start
    return Fragment(name, address.start, mapping.param_group_index, place, values)


class BoxesOfRank(NamedTuple):
    """What this rank has of the parameters."""

    of_params: dict[str, dict[str, Box]]  # parameter -> name of a box -> box
    strange: list[str]  # parameters whose flat weights are not those of the model


def boxes_of_rank(flats: Sequence[Flat], zero: Any, params: Params) -> BoxesOfRank:
    """Finds all boxes of this rank, and puts each one into its flat tensor."""
    found = BoxesOfRank({}, [])
    for fragment in fragments(zero, params):
        name = fragment.param
        flat = flats[fragment.flat]
        if not _is_of_model(fragment, flat.weights):
            found.strange.append(name)
        boxes_of_param = found.of_params.setdefault(name, {})
        place = fragment.place
        stop = fragment.start + len(fragment.values)
        shape = shape_of(params[name])
        for number, box in enumerate(boxes(shape, fragment.start, stop)):
            name_of_box = f"{name}#{number}"
            boxes_of_param[name_of_box] = box
            flat.add(name_of_box, place, box.shape)
            place += math.prod(box.shape)
    return found


def _is_of_model(fragment: Fragment, flat: Tensor) -> bool:
    """Whether the flat weights are the model's; they are not, when the layout of ZeRO isn't understood."""
    values = fragment.values
    master = flat.detach().narrow(0, fragment.place, len(values))
    return torch.equal(master.to(values.dtype), values)


def refuse_other_layout(here: BoxesOfRank, params: Params, ranks: dist.ProcessGroup) -> None:
    """Raises, on all ranks, where a flat weight is not the model's, or not every weight is there exactly once.

    Args:
        here: the boxes of this rank.
        params: the parameters that train, by name.
        ranks: the ranks that share them.
    """
    num_here = 0
    for boxes_of_param in here.of_params.values():
        num_here += sum(math.prod(box.shape) for box in boxes_of_param.values())
    device = next(iter(params.values())).device
    counts = torch.tensor([num_here, len(here.strange)], dtype=torch.int64, device=device)
    dist.all_reduce(counts, group=ranks)
    num_in_flats, num_strange = counts.tolist()
    known = "another release of DeepSpeed may order or divide them otherwise (0.19 is known)"
    if num_strange:
        name = here.strange[0] if here.strange else "a parameter of another rank"
        raise OTOError(
            f"ZeRO's flat weights are not those of {name}: {known}, or the model was changed after "
            "deepspeed.initialize"
        )
    num_weights = sum(map(_numel, params.values()))
    if num_in_flats != num_weights:
        raise OTOError(f"ZeRO's flat tensors have {num_in_flats:,} weights of the model's {num_weights:,}: {known}")


def slices_of_boxes(slices: Iterable[Slice], boxes_of: Mapping[str, Mapping[str, Box]]) -> list[Slice]:
    """Slices of whole parameters as slices of the boxes that this rank has of them.

    Args:
        boxes_of: parameter -> name of a box -> box.
    """
    known: dict[bytes, Tensor] = {}  # equal owners are one tensor, as in `slices_of`
    found = []
    for s in slices:
        for name, box in boxes_of.get(s.param, {}).items():
            start = box.first[s.dim]
            stop = start + box.shape[s.dim]
            owner = s.owner[start:stop]
            key = owner.numpy().tobytes()
            shared_owner = known.setdefault(key, owner)
            found.append(Slice(name, s.dim, shared_owner))
    return found


class Section:
    """Those flat tensors that are stepped together, and the slices of their boxes."""

    def __init__(
        self, flats: Sequence[Flat], group: Iterable[Slice], readers: Iterable[Slice], restless: set[tuple[str, int]]
    ) -> None:
        self.flats = flats
        self.params: dict[str, Tensor] = {}
        for flat in flats:
            self.params.update(flat.boxes)
        self.group = tuple(s for s in group if s.param in self.params)
        self.readers = tuple(s for s in readers if s.param in self.params)
        moving = []
        for s in self.group:
            of_param = (_param_of(s.param), s.dim)
            if of_param in restless:
                moving.append((s.param, s.dim))
        self.held = HeldZeros(self.group, moving)


def _param_of(box: str) -> str:
    """The name of the parameter that a box is a part of."""
    return box.rpartition("#")[0]


def master_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a model that DeepSpeed trains, by name, in float32 where they train.

    They are whole on every rank, one after the other, and all ranks ask for the next one together.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    for name, p in model.named_parameters():
        master = safe_get_full_fp32_param(p) if p.requires_grad else None
        yield name, _gathered(p) if master is None else master.detach()


def let_go_of(zero: Any, model: nn.Module) -> None:
    """Frees what DeepSpeed's optimizer holds, and the parts of divided parameters, once the engine is done.

    They hold each other, in circles that Python's garbage collector can't see, and a list of DeepSpeed holds modules.
    """
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    vars(zero).clear()
    for parameter in model.parameters():
        vars(parameter).pop("ds_tensor", None)
    modules = set(model.modules())
    FWD_MODULE_STACK[:] = [module for module in FWD_MODULE_STACK if module not in modules]


def make_whole_(model: nn.Module) -> None:
    """Makes a model whole that ZeRO-3 has divided while it was made: every rank gets all weights, on the CPU.

    The model has new parameters then, and `deepspeed.initialize` divides them again.
    """
    new = {}  # id of a divided parameter -> the whole one
    for p in model.parameters():
        if "ds_id" in vars(p):
            new[id(p)] = nn.Parameter(_gathered(p), p.requires_grad)
    replace_tensors_(contents(model), new)


def _gathered(p: Tensor) -> Tensor:
    """A copy of a parameter on the CPU, whole where ZeRO-3 has divided it."""
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([p], enabled="ds_id" in vars(p)):
        return p.detach().to("cpu", copy=True)
