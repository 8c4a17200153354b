"""A compact model as a class: the stock Transformers class, built with the widths that a record in its config gives.

This file imports only torch and transformers, because a copy of it lies beside the weights of every checkpoint, where
`trust_remote_code=True` finds it without hf_oto installed.

The record is `config.oto`, plain JSON. Worked example: of a layer with 4 heads, 64 positions each, heads 0 and 2 stay:

    {"version": 1,
     "modules": {"bert.encoder.layer.0.attention.self.query": {
         "attributes": {"out_features": 128},
         "shapes": {"weight": [128, null], "bias": [128]}}},
     "cuts": [{"step": 0, "size": 4, "kept": "5",
               "members": [["bert...query.weight", 0, 0, 0, 1, 64], ...],
               "scales": [["bert...norm.weight", 1, 2, 0], ...]}],
     "sha256": "9f86d08..."}

    modules: only what differs from the stock model. The attributes are ints, or lists of ints; "config.NAME" is what
        one module alone reads from its config. In a shape null means: as the stock model has it.
    cuts: for `to_dense` only; cuts of the same step were made together.
        kept: a hexadecimal number whose bits are the ZIGs that stay; 5 is 0b0101, so ZIGs 0 and 2.
        members: [weight, dimension, fill, start, outer, inner]. `fill` is the value for the places that were cut. From
            `start` on the positions along the dimension are those of an array (outer, size, inner), whose middle
            dimension are the ZIGs. Or [weight, dimension, fill, list of the positions of every ZIG].
        scales: [weight, 1, 2, 0]: the weight was multiplied by (size / number kept) ** (1 / 2), after adding 0, which
            was then subtracted.
    sha256: of all the rest.

Nothing in the record is executed, and a record that does not fit is refused before anything is touched. The digest
finds damage, not malice: whoever seals a record anew can choose widths up to the stock model's, as they can choose the
weights, and nothing else. The cuts have to take from every weight what its new shape lacks. An attribute may only
change as the cuts of the weights at and below its module do, or as the shape of such a weight does (`_numbers_after`
says how). Of torch's own layers only the attributes in `TORCH_WIDTHS` may change: no stride, padding or kernel size.

That check is arithmetic, and does not know what an attribute is for. It can't tell a width from another number of the
same value, and for a module far up in the model it allows what any cut below the module allows.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from itertools import accumulate, groupby, pairwise
from operator import attrgetter
from pathlib import Path
from reprlib import repr as short  # of what may be long, or nested deeply
from typing import Any, NamedTuple, NoReturn

import torch
import transformers
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.models.auto import modeling_auto

VERSION = 1
FILE_NAME = "modeling_oto.py"
logger = logging.getLogger(__name__)


class OTOError(RuntimeError):
    """A model, checkpoint or set-up that hf_oto cannot handle; the message names the layer and the way out."""


def __getattr__(name: str) -> type[PreTrainedModel]:
    """`modeling_oto.BertModel`, as `auto_map` asks for it: the compact class of a Transformers model, by its name."""
    stock = None if name.startswith("_") else getattr(transformers, name, None)
    if not (isinstance(stock, type) and issubclass(stock, PreTrainedModel)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}, and transformers no such model")
    return compact_class(stock)


# The record


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """The record with its digest, whatever digest it has now."""
    rest = {part: value for part, value in record.items() if part != "sha256"}
    return rest | {"sha256": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def validate(record: Any) -> None:
    """Checks the version, the types and the digest of a record; `restore_` checks whether it fits a model.

    The time grows with the length of the record and no faster.

    Raises:
        OTOError: naming the first entry that is wrong.
    """
    require(isinstance(record, dict), f"is {short(record)}, not a JSON object")
    version = record.get("version")
    require(version == VERSION, f"has version {short(version)}, this hf_oto reads version {VERSION}: upgrade hf_oto")
    for part, kind in (("modules", dict), ("cuts", list), ("sha256", str)):
        is_there = isinstance(record.get(part), kind)
        require(is_there, f"has no {part!r} {kind.__name__}: it is truncated")
    require(len(record) == 4, f"has unknown parts: {short(list(record))}")
    for path, entry in record["modules"].items():
        _validate_entry(path, entry)
    for i, cut in enumerate(record["cuts"]):
        require(_is_cut(cut), f"cuts[{i}] is not {{'step', 'size', 'kept', 'members', 'scales'}} of the right kinds")
    require(record["sha256"] == sealed(record)["sha256"], "it isn't what was saved, by its sha256: it was changed")


def _validate_entry(path: Any, entry: Any) -> None:
    """Checks what a record says of one module.

    Paths are quoted in messages, and may be long: a message is made only where something is wrong.
    """
    if not (isinstance(path, str) and isinstance(entry, dict)):
        refuse(f"{short(path)} is {short(entry)}, not an object")
    if not entry.keys() <= {"attributes", "shapes"}:
        refuse(f"{short(path)} has unknown keys: {short(list(entry))}")
    if not all(isinstance(values, dict) for values in entry.values()):
        refuse(f"{short(path)}: a part is no object")
    for name, value in entry.get("attributes", {}).items():
        is_list_of_ints = isinstance(value, list) and all(map(_is_int, value))
        if not (_is_int(value) or is_list_of_ints):
            refuse(f"{_shortened(path)}.{_shortened(name)} is {short(value)}, not an int or a list of ints")
    for name, shape in entry.get("shapes", {}).items():
        if not (isinstance(shape, list) and all(n is None or (_is_int(n) and n >= 1) for n in shape)):
            label = f"{_shortened(path)}.{_shortened(name)}"
            refuse(f"the shape of {label} is {short(shape)}, not a list of sizes >= 1 and nulls")


def refuse(fact: str) -> NoReturn:
    """Raises the error of a record that does not fit."""
    raise OTOError(f"the hf_oto record in config.json (config.oto) does not fit: {fact}")


def require(ok: bool, fact: str) -> None:
    """Refuses the record, because of a fact, if something is not so."""
    if not ok:
        refuse(fact)


def _shortened(name: str) -> str:
    """The end of a name, which says more than its beginning."""
    return name if len(name) <= 100 else f"...{name[-100:]}"


def _is_int(value: Any) -> bool:
    # To isinstance JSON's true would be an int.
    return type(value) is int and -(2**63) <= value < 2**63


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(_is_int(n) and n >= 0 for n in values)


def _is_cut(cut: Any) -> bool:
    match cut:
        case {"step": step, "size": size, "kept": str(kept), "members": list(members), "scales": list(scales)}:
            if len(cut) != 5 or not _are_sizes([step, size]) or not members:
                return False
            if re.fullmatch("[0-9a-f]+", kept) is None or not _keeps_and_cuts(int(kept, 16), size):
                return False
            return all(_is_member(member, size) for member in members) and all(map(_is_scale, scales))
    return False


def _keeps_and_cuts(bits: int, size: int) -> bool:
    """Whether bits say of `size` ZIGs that at least one stays and at least one goes."""
    return bits.bit_length() <= size and 0 < bits.bit_count() < size


def _is_member(member: Any, size: int) -> bool:
    """Whether it is [name, dim, fill, start, outer, inner] or [name, dim, fill, [[index, ...] of every ZIG]]."""
    match member:
        case [str(), dim, 0 | 1 as fill, start, outer, inner]:
            return _are_sizes([dim, fill, start, outer, inner]) and outer > 0 and inner > 0
        case [str(), dim, 0 | 1 as fill, list(rows)]:
            if not _are_sizes([dim, fill]) or len(rows) != size or not all(map(_are_sizes, rows)):
                return False
            width = len(rows[0])
            return width > 0 and all(len(row) == width for row in rows)
    return False


def _is_scale(scale: Any) -> bool:
    """Whether it is [name, numerator and denominator of a power, offset]."""
    match scale:
        case [str(), over, under, offset]:
            return _is_int(over) and _are_sizes([under, offset]) and under > 0 and abs(over) <= 16 * under
    return False


def restore_(model: torch.nn.Module, record: dict[str, Any]) -> None:
    """Gives a stock model the sizes of a record, in place, on any device, meta too.

    Weights keep their leading values only to have some: those of the checkpoint are loaded afterwards. Parameters keep
    their identity, hence their ties, flags and `requires_grad`.

    Raises:
        OTOError: the record does not fit the model; nothing has been changed then.
    """
    changes = list(_changes(model, record))
    _check_widths(model, record, changes)
    for change in changes:
        if isinstance(change.holder, torch.nn.Module):
            set_sizes_(change.holder, {change.name: change.new})
        elif change.old != change.new:
            leading = tuple(slice(size) for size in change.new)
            change.holder.data = change.holder.data[leading].clone()


def named_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer, those that are tied under each of their names."""
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def sizes_of(module: torch.nn.Module) -> dict[str, int | list | tuple]:
    """The ints, and lists and tuples of ints, that a module keeps, and the ints of its config as "config.NAME"."""
    sizes: dict[str, int | list | tuple] = {}
    for name, value in vars(module).items():
        if name.startswith("_") or name == "training":
            continue
        is_list_of_ints = type(value) in (list, tuple, torch.Size) and value and all(map(_is_int, value))
        if _is_int(value) or is_list_of_ints:
            sizes[name] = value
    config = vars(module).get("config")
    if isinstance(config, PreTrainedConfig) and not isinstance(module, PreTrainedModel):
        own_values = config._oto_view[1] if isinstance(config, _View) else {}
        for name, value in (vars(config) | own_values).items():
            if _is_int(value) and name[0] != "_":
                sizes[f"config.{name}"] = value
    return sizes


def is_cut_size(old: int, new: int) -> bool:
    """Whether a cut may make a size `new` that is `old` in the stock model: sizes shrink, and none vanishes."""
    return new == old or (_is_int(old) and _is_int(new) and 1 <= new <= old)


def set_sizes_(module: torch.nn.Module, sizes: Mapping[str, Any]) -> None:
    """Sets what `sizes_of` names, in place."""
    for name, value in sizes.items():
        if name.startswith("config."):
            module.config = config_view(module.config, {name.removeprefix("config."): value})
        else:
            setattr(module, name, value)


class _View:
    """The base of the classes of config views, which copy and pickle as views.

    Attributes:
        _oto_view: the config that is viewed, and the values that are others in the view.
    """

    _oto_view: tuple[PreTrainedConfig, dict[str, int]]

    def __init_subclass__(cls) -> None:
        """Nothing: Transformers' own would treat every view as a new class of configs."""

    def __deepcopy__(self, memo: dict[int, Any]) -> PreTrainedConfig:
        config, values = self._oto_view
        return config_view(copy.deepcopy(config, memo), values)

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        return config_view, self._oto_view


def config_view(config: PreTrainedConfig, values: Mapping[str, int]) -> PreTrainedConfig:
    """The same config, attributes shared, in which one module reads other values: layers of one model differ."""
    if isinstance(config, _View):
        config, earlier_values = config._oto_view
        values = earlier_values | dict(values)
    stock = type(config)
    namespace: dict[str, Any] = {
        "_oto_view": (config, dict(values)),
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
    }
    for name, value in values.items():
        # A property wins over the attribute of that name, which the view shares with the config.
        namespace[name] = property(lambda _, value=value: value)
    view_class = type(stock.__name__, (_View, stock), namespace)
    view = object.__new__(view_class)
    view.__dict__ = vars(config)
    return view


class Change(NamedTuple):
    """One size that a record gives: an attribute of a module, or the shape of a parameter or persistent buffer.

    Attributes:
        label: its full name, "encoder.layer.0.query.weight".
        old: the value in the model.
        new: the value in the record.
        holder: the module with the attribute, or the tensor with the shape.
        name: its name in the module.
    """

    label: str
    old: Any
    new: Any
    holder: Any
    name: str


def _changes(model: torch.nn.Module, record: dict[str, Any]) -> Iterator[Change]:
    """Every size that a record gives, checked against the model."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, entry in record["modules"].items():
        stock = f"{type(model).__name__} of transformers {transformers.__version__}"
        require(path in modules, f"it names the module {path!r}, which {stock} does not have")
        module = modules[path]
        yield from _attribute_changes(path, module, entry.get("attributes", {}))
        yield from _shape_changes(path, module, entry.get("shapes", {}))


def _attribute_changes(path: str, module: torch.nn.Module, attributes: dict[str, Any]) -> Iterator[Change]:
    sizes = sizes_of(module)
    for name, new in attributes.items():
        label = f"{path}.{name}".removeprefix(".")
        require(name in sizes, f"{type(module).__name__} keeps no size {name!r} ({label})")
        old = sizes[name]
        if isinstance(old, (list, tuple)) and isinstance(new, list):
            fits = len(old) == len(new) and all(map(is_cut_size, old, new))
        else:
            fits = is_cut_size(old, new)
        require(fits, f"{label} is {short(old)}, the record has {short(new)}")
        yield Change(label, old, type(old)(new), module, name)


def _shape_changes(path: str, module: torch.nn.Module, shapes: dict[str, Any]) -> Iterator[Change]:
    saved = {name: b for name, b in module._buffers.items() if name not in module._non_persistent_buffers_set}
    tensors = module._parameters | saved
    for name, sizes in shapes.items():
        label = f"{path}.{name}".removeprefix(".")
        tensor = tensors.get(name)
        require(tensor is not None, f"{type(module).__name__} has no weight or saved buffer {name!r} ({label})")
        old = tensor.shape
        fits = len(sizes) == len(old) and all(n is None or n <= o for n, o in zip(sizes, old, strict=True))
        require(fits, f"{label} has shape {tuple(old)}, of which the record keeps {short(sizes)}")
        new = torch.Size(o if n is None else n for n, o in zip(sizes, old, strict=True))
        yield Change(label, old, new, tensor, name)


# What the numbers of a record prove


class RecordedCut(NamedTuple):
    """One axis of `size` ZIGs of which `kept` stay: those whose bit in `bits` is set, the lowest bit for ZIG 0."""

    step: int
    size: int
    kept: int
    bits: int
    members: list[list[Any]]
    scales: list[list[Any]]


class Taken(NamedTuple):
    """A cut takes something of a weight.

    Attributes:
        cut: the index of the cut among all cuts in order. (A cut may be long: it is neither copied nor hashed.)
        positions: how many positions of the weight one ZIG has, in all or in one run without gaps.
    """

    cut: int
    positions: int


TORCH_WIDTHS = {  # what torch's own layers call a width or a count of groups
    *("in_features", "in1_features", "in2_features", "out_features", "in_channels", "out_channels", "groups"),
    *("num_features", "num_channels", "num_groups", "num_parameters", "num_embeddings", "embedding_dim"),
    *("normalized_shape", "input_size", "hidden_size", "proj_size", "embed_dim", "kdim", "vdim", "num_heads"),
}


def cuts_of(record: dict[str, Any]) -> list[RecordedCut]:
    """The cuts in the order they were made."""
    cuts = []
    for cut in record["cuts"]:
        bits = int(cut["kept"], 16)
        cuts.append(RecordedCut(cut["step"], cut["size"], bits.bit_count(), bits, cut["members"], cut["scales"]))
    return sorted(cuts, key=attrgetter("step"))


def check_cuts(cuts: Iterable[RecordedCut], dense: Mapping[str, torch.Size]) -> dict[tuple[str, int], int]:
    """Checks that the cuts fit a stock model, by counting: no array as long as an axis is made.

    Args:
        cuts: in the order they were made.
        dense: name -> shape of every parameter and buffer of the stock model.

    Returns:
        (name, dim) -> how many positions are left after all cuts, for every dimension that a cut takes from.

    Raises:
        OTOError: a cut names a weight or a position that is not there, or cuts of one step overlap.
    """
    left: dict[tuple[str, int], int] = {}
    for _, step in groupby(cuts, key=attrgetter("step")):
        spanned: Counter[tuple[str, int]] = Counter()  # the positions of all ZIGs of this step, kept ones too
        lost: Counter[tuple[str, int]] = Counter()
        for cut in step:
            for name, dim, _, *layout in cut.members:
                shape = dense.get(name, ())
                width = left.get((name, dim), shape[dim]) if dim < len(shape) else 0
                positions, last = _extent(cut.size, layout)
                spanned[name, dim] += cut.size * positions
                lost[name, dim] += (cut.size - cut.kept) * positions
                fits = last < width and spanned[name, dim] <= width
                require(fits, f"the stock model has no {short(name)}[{dim}] of {spanned[name, dim]} positions to cut")
        for (name, dim), count in lost.items():
            left[name, dim] = left.get((name, dim), dense[name][dim]) - count
    return left


def _extent(size: int, layout: list[Any]) -> tuple[int, int]:
    """How many positions each ZIG has in a member, and the last position of all ZIGs."""
    if len(layout) == 1:
        rows = layout[0]
        return len(rows[0]), max(map(max, rows))
    start, outer, inner = layout
    return outer * inner, start + outer * size * inner - 1


def _runs(layout: list[Any]) -> set[int]:
    """The numbers of positions that a ZIG has in a member: of all, and of each run without gaps."""
    if len(layout) == 3:
        _, outer, inner = layout
        return {outer * inner, inner}
    positions = layout[0][0]  # of the first ZIG
    breaks = [i for i, (a, b) in enumerate(pairwise(positions), 1) if b != a + 1]
    ends = [0, *breaks, len(positions)]
    return {len(positions), *(stop - start for start, stop in pairwise(ends))}


def _check_widths(model: nn.Module, record: dict[str, Any], changes: Iterable[Change]) -> None:
    """Checks that shapes, cuts and attributes of a record say the same.

    Args:
        model: the stock model.
        record: well-formed.
        changes: what `_changes` gives for them.
    """
    cuts = cuts_of(record)
    left = check_cuts(cuts, {name: tensor.shape for name, tensor in named_tensors(model).items()})
    taken: dict[str, set[Taken]] = defaultdict(set)  # module -> what is cut at and below it
    for i, cut in enumerate(cuts):
        for name, _, _, *layout in cut.members:
            for path in _modules_of(name):
                taken[path].update(Taken(i, positions) for positions in _runs(layout))
    shapes: dict[str, set[tuple[int, int]]] = defaultdict(set)  # module -> (width, new width) at and below it
    recorded: dict[tuple[str, int], int] = {}  # (weight, dim) -> new width
    for label, dense, new, holder, _ in changes:
        if isinstance(holder, torch.Tensor):
            recorded |= {(label, dim): width for dim, width in enumerate(new)}
            widths = list(zip(dense, new, strict=True))
            changed = {(old_width, new_width) for old_width, new_width in widths if old_width != new_width}
            for path in _modules_of(label):
                shapes[path] |= changed
            path = label.rpartition(".")[0]
            layer = model.get_submodule(path)
            if isinstance(layer, nn.modules.conv._ConvNd):  # its weight has the channels of one group
                groups = record["modules"][path].get("attributes", {}).get("groups", layer.groups)
                shapes[path] |= {(old_width * layer.groups, new_width * groups) for old_width, new_width in widths}
    for (name, dim), width in left.items():
        fact = f"its cuts leave {width} positions of {name}[{dim}], its shapes {recorded.get((name, dim), 'all')}"
        require(recorded.get((name, dim)) == width, fact)
    for label, old, new, module, name in changes:
        if isinstance(module, nn.Module) and old != new:
            path = label.removesuffix(name).removesuffix(".")
            fact = f"{label} is {short(old)}, no width that was cut makes it {short(new)}"
            require(not _is_torch_layer(module) or name in TORCH_WIDTHS, fact)
            require(_accounts_for(old, new, shapes[path], taken[path], cuts), fact)


def _modules_of(name: str) -> Iterator[str]:
    """The paths of the modules that a weight or attribute of this name lies in, the innermost first, "" last."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _is_torch_layer(module: nn.Module) -> bool:
    """Whether torch wrote the module or a base class of it; torch's containers, which compute nothing, don't count."""
    homes = {cls.__module__ for cls in type(module).__mro__ if cls is not nn.Module}
    return any(home.startswith("torch.nn.modules.") and home != nn.ModuleList.__module__ for home in homes)


def _accounts_for(
    old: Any, new: Any, shapes: set[tuple[int, int]], taken: set[Taken], cuts: list[RecordedCut]
) -> bool:
    """Whether cuts make an int, or the ints of a list, change like this.

    Args:
        old, new: the values, of one kind and length.
        shapes: (width, new width) of the weights at and below the module.
        taken: what the cuts take of these.
        cuts: all cuts; `taken` has their indices.
    """
    olds, news = (old, new) if isinstance(old, (list, tuple)) else ([old], [new])
    if all(_accounts_for_number(a, b, shapes, taken, cuts) for a, b in zip(olds, news, strict=True)):
        return True
    # A list may also be the lengths of parts that lie side by side on one axis.
    return tuple(news) in _parts_after(tuple(olds), taken, cuts)


def _accounts_for_number(
    old: int, new: int, shapes: set[tuple[int, int]], taken: set[Taken], cuts: list[RecordedCut]
) -> bool:
    return old == new or (old, new) in shapes or new in _numbers_after(old, taken, cuts)


def _by_step(taken: set[Taken], cuts: list[RecordedCut]) -> Iterator[list[tuple[RecordedCut, int]]]:
    """For every step that takes something, (cut, positions) of all that it takes."""
    ordered = ((cuts[i], positions) for i, positions in sorted(taken))
    for _, step in groupby(ordered, key=lambda pair: pair[0].step):
        yield list(step)


def _numbers_after(number: int, taken: set[Taken], cuts: list[RecordedCut]) -> set[int]:
    """What a number may be after the cuts, if it counts something that every ZIG has an equal whole share of.

    Worked example: a cut from 4 heads to 3, of 8 positions each. A number 4 counts heads and becomes 3; a number 32
    counts positions and becomes 24. A number 8 may count something between: if each head is a key head with 2 query
    heads, 8 query heads become 6. But the 8 positions of one head stay 8.
    """
    numbers = {number}
    for step in _by_step(taken, cuts):
        widths = {positions for _, positions in step}
        after_step = set()
        for before in numbers:
            for cut, positions in step:
                if _is_counted(before, cut, positions, widths):
                    after_step.add(before // cut.size * cut.kept)
        numbers |= after_step
    return numbers


def _is_counted(number: int, cut: RecordedCut, positions: int, widths: set[int]) -> bool:
    """Whether a number counts something that every ZIG of a cut has an equal whole share of.

    Args:
        positions: how many positions one ZIG has.
        widths: the same of all cuts of the step; a number that is one of these is the width of a ZIG, and stays.
    """
    share, rest = divmod(number, cut.size)
    if rest or not share:
        return False
    counts_zigs_or_positions = share in (1, positions)
    return counts_zigs_or_positions or (positions % share == 0 and number not in widths)


def _parts_after(parts: tuple[int, ...], taken: set[Taken], cuts: list[RecordedCut]) -> set[tuple[int, ...]]:
    """What the lengths of parts that lie side by side on one axis may be after the cuts.

    Worked example: the parts (1, 3) of 4 heads, of which heads 0, 1 and 3 stay, become (1, 2).
    """
    possible = {parts}
    for step in _by_step(taken, cuts):
        for before in list(possible):
            ends = list(accumulate(before))
            for cut, positions in step:
                for unit in {1, positions}:  # lengths may be counted in ZIGs or in positions
                    if ends[-1] != cut.size * unit or any(end % unit for end in ends):
                        continue
                    kept_ends = [0]
                    for end in ends:
                        zigs_before = (1 << end // unit) - 1  # the bits of the ZIGs before this end
                        kept_ends.append(unit * (cut.bits & zigs_before).bit_count())
                    possible.add(tuple(stop - start for start, stop in pairwise(kept_ends)))
    return possible


# Records of other classes, and of cuts in a row


def _translated(model: PreTrainedModel, record: dict[str, Any], partly: bool) -> dict[str, Any]:
    """The record in the paths of `model`, which may be the base model of the recorded one, or have another head.

    Args:
        partly: leave out what `model` does not have, as `from_pretrained` leaves out its weights.
    """
    known = dict(model.named_modules(remove_duplicate=False)).keys() | named_tensors(model).keys()
    parts = ("members", "scales")
    names = set(record["modules"])
    for cut in record["cuts"]:
        names |= {name for part in parts for name, *_ in cut[part]}
    if not partly and names <= known:
        return record
    # The prefix of the body: "bert." is in all paths of a model with a head, and in none of the body alone.
    body = f"{model.base_model_prefix}." if model.base_model_prefix else "no body."
    model_has_head = model.base_model is not model
    record_has_head = any(f"{name}.".startswith(body) for name in names)

    def translate(name: str) -> str | None:
        with_body = f"{body}{name}".removesuffix(".")
        if record_has_head and not model_has_head:
            name = f"{name}."[len(body) : -1] if f"{name}.".startswith(body) else None
        elif model_has_head and not record_has_head and with_body in known and (partly or name not in known):
            name = with_body
        return name if name in known or not partly else None

    new_names = {name: translate(name) for name in names}
    if partly and model_has_head and any(not name.startswith(body) for name, _ in model.named_parameters()):
        lost = _readers(record, {name for name in names if new_names[name] is None})
        fact = f"{type(model).__name__} has no {lost} but other weights, and what those would read is narrow"
        require(not lost, f"{fact}: save hf_oto.to_dense(model) and load that, or prune with protect={lost}")
    modules = {new_names[path]: entry for path, entry in record["modules"].items()}
    modules.pop(None, None)
    require(bool(modules) or not record["modules"], f"{type(model).__name__} has none of its modules")
    if len(modules) < len(record["modules"]):
        logger.info("%s uses %d of the %d compact modules", type(model).__name__, len(modules), len(record["modules"]))
    cuts = []
    for cut in record["cuts"]:
        cut = dict(cut)
        for part in parts:
            cut[part] = [[new_names[name], *rest] for name, *rest in cut[part] if new_names[name] is not None]
        if cut["members"]:
            cuts.append(cut)
    return sealed(record | {"modules": modules, "cuts": cuts})


def _readers(record: dict[str, Any], gone: set[str]) -> list[str]:
    """The weights that a model lacks and that share a cut axis with weights that it has.

    Args:
        gone: the modules and weights that the model lacks.
    """
    shared: set[str] = set()
    named: set[str] = set()
    for cut in record["cuts"]:
        members = {name for name, *_ in cut["members"]}
        named |= members
        if members - gone:
            shared |= members & gone
    for path in gone & record["modules"].keys():
        for name, shape in record["modules"][path].get("shapes", {}).items():
            # A cut weight that no cut names is tied: the cut knows it by its other name.
            if any(shape) and f"{path}.{name}" not in named:
                shared.add(f"{path}.{name}")
    return sorted(shared)


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """One record for two cuts in a row: the later sizes count, the cuts follow each other."""
    modules = copy.deepcopy(old["modules"])
    for path, entry in new["modules"].items():
        mine = modules.setdefault(path, {})
        mine["attributes"] = mine.get("attributes", {}) | entry.get("attributes", {})
        shapes = mine.setdefault("shapes", {})
        for name, shape in entry.get("shapes", {}).items():
            earlier = shapes.get(name, [None] * len(shape))
            shapes[name] = [e if n is None else n for n, e in zip(shape, earlier, strict=True)]
    return new | {"modules": modules, "cuts": [*old["cuts"], *new["cuts"]]}


# The class


def _shared_variable() -> ContextVar[frozenset[str]]:
    """One variable for all copies of this file: hf_oto's own and those that came with checkpoints."""
    if "_oto_building" not in vars(PreTrainedModel):
        PreTrainedModel._oto_building = ContextVar("oto_building", default=frozenset())
    return PreTrainedModel._oto_building


BUILDING = _shared_variable()  # digests of the records whose models this thread is building now


def asks_for_compact(config: PreTrainedConfig) -> bool:
    """Whether a model built from this config is compact: the config has a record, and it is not an outer model's.

    Sub-models are built from the config of the model they are part of, or from a copy of it, but the paths in the
    record are those of the outermost model. While the outermost model is built, `BUILDING` has the record's digest.
    """
    if "oto" not in vars(config):
        return False
    digest = config.oto.get("sha256") if isinstance(config.oto, dict) else None
    return not (isinstance(digest, str) and digest in BUILDING.get())


def finish_loading(finish: Callable[..., Any], model: PreTrainedModel, load_config: Any, loading_info: Any) -> Any:
    """Transformers' `_finalize_model_loading`; weights that don't fit the record are never initialised anew.

    Transformers would do that, with `ignore_mismatched_sizes=True`, as it does with a new head.

    Args:
        finish: the `_finalize_model_loading` that would run without us.
        model, load_config, loading_info: its arguments.

    Raises:
        OTOError: weights have other sizes than the record says. Or the record says nothing of weights that have other
            sizes than the stock model's, and `ignore_mismatched_sizes` is False.
    """
    for part in model.modules():
        if is_compact(type(part)) and "oto" in vars(part.config):
            _mark_loaded_modules_(part, part.config.oto)
    if not (is_compact(type(model)) and "oto" in vars(model.config)):
        return finish(model, load_config, loading_info)
    modules = model.config.oto["modules"]
    for key, saved, built in sorted(loading_info.mismatched_keys):
        path, _, name = key.rpartition(".")
        cut = modules.get(path, {}).get("shapes", {}).get(name, [])
        fits = all(n is None or s == n for s, n in zip(saved, cut, strict=False))
        fact = f"{key} has shape {tuple(saved)} in the checkpoint, {tuple(built)} by the record: not its weights"
        require(fits, fact)
    try:
        return finish(model, load_config, loading_info)
    except RuntimeError as error:
        if not (loading_info.mismatched_keys or loading_info.conversion_errors or loading_info.error_msgs):
            raise
        names = short(sorted(key for key, *_ in loading_info.mismatched_keys))
        raise OTOError(
            f"the weights do not fit what config.json and its hf_oto record say of {names}: {error}"
        ) from error


def _mark_loaded_modules_(model: PreTrainedModel, record: dict[str, Any]) -> None:
    """Lets Transformers initialise no module with something cut in it, where all its tensors have been loaded.

    Transformers would call `_init_weights` on such a module, and only then see, tensor by tensor, that nothing is to
    be written. Some models compute in `_init_weights` with sizes of the config, which don't fit what was cut. All
    other modules are initialised as ever: `_init_weights` may draw random numbers, and a new head has to get the same
    weights as on the stock model.
    """
    cut = {path for path, entry in record["modules"].items() if entry.get("shapes")}
    touched = cut | {above for path in cut for above in _modules_of(path)}
    for path, module in model.named_modules():
        tensors = [*module.parameters(), *module.buffers()] if path in touched else []
        if tensors and all(getattr(tensor, "_is_hf_initialized", False) for tensor in tensors):
            module._is_hf_initialized = True


class CompactMixin:
    """What a compact class adds to its stock class: it builds, saves and pickles itself by the record in its config.

    The record is restored when the model is built, which `from_pretrained` does on the meta device: weights, shards,
    dtypes, device maps and ties remain Transformers' own business.
    """

    _oto_stock: type[PreTrainedModel]
    # Where a class of custom code has set this, Transformers would save its code without ours; `save_pretrained` below
    # saves both.
    _auto_class = None

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        if not asks_for_compact(config):
            super().__init__(config, *args, **kwargs)
            return
        record = config.oto
        validate(record)
        token = BUILDING.set(BUILDING.get() | {record["sha256"]})
        try:
            super().__init__(config, *args, **kwargs)
        finally:
            BUILDING.reset(token)
        name = self._oto_stock.__name__
        is_of_other_class = bool(config.architectures) and name not in config.architectures
        translated = _translated(self, record, partly=is_of_other_class)
        if translated is not record or config.architectures != [name]:
            _replace_config_(self, {"oto": translated, "architectures": [name]})
        restore_(self, translated)

    @classmethod
    def _finalize_model_loading(cls, *args: Any) -> Any:
        return finish_loading(super()._finalize_model_loading, *args)

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """`PreTrainedModel.save_pretrained`, and beside the weights the code that `trust_remote_code=True` needs."""
        stock = self._oto_stock
        custom = _custom_classes(stock, self.config)
        can_travel = _is_in_transformers(stock) or bool(custom)
        if "oto" in vars(self.config) and can_travel and not self._hf_peft_config_loaded:
            custom_map = {auto: f"{_custom_name(stock)}.{name}" for auto, name in custom.items()}
            self.config.auto_map = _auto_map(stock, self.config) | custom_map
            if self.should_save_on_this_rank(is_main_process):
                os.makedirs(save_directory, exist_ok=True)
                shutil.copyfile(__file__, Path(save_directory) / FILE_NAME)
                if custom:
                    custom_object_save(self, save_directory)
                    code = _custom_code(stock, sorted(set(custom.values())))
                    (Path(save_directory) / f"{_custom_name(stock)}.py").write_text(code)
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)

    def _get_files_timestamps(self, working_dir: str | os.PathLike) -> dict[str, float]:
        """Without our files: `save_pretrained(push_to_hub=True)` uploads what is newer than here, or absent."""
        ours = (FILE_NAME, f"{_custom_name(self._oto_stock)}.py")
        timestamps = super()._get_files_timestamps(working_dir)
        return {name: time for name, time in timestamps.items() if name not in ours}

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoModel") -> None:
        """Nothing: Auto classes call it on code from a checkpoint, and would then save this class as custom code."""

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        """Pickles as (stock class, state): the compact class itself cannot be found by name."""
        if type(self) is not compact_class(self._oto_stock):  # a subclass that a user has made, which has a name
            return super().__reduce_ex__(protocol)
        _, _, *state = super().__reduce_ex__(max(protocol, 2))
        return _blank, (self._oto_stock,), *state


@functools.cache
def compact_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of compact models: a subclass of the stock class with the same name and module.

    Whatever Transformers looks up by name and module (key conversions, losses, `is_custom_code`, `architectures`)
    stays as it was.

    Example:
        >>> compact_class(PreTrainedModel).__name__
        'PreTrainedModel'
        >>> compact_class(PreTrainedModel) is PreTrainedModel
        False
    """
    if is_compact(stock):
        return stock
    # Auto classes look for GenerationMixin among the direct bases of code from a checkpoint, and add it otherwise.
    bases = (CompactMixin, stock, GenerationMixin) if issubclass(stock, GenerationMixin) else (CompactMixin, stock)
    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__}
    return type(stock.__name__, bases, names | {"_oto_stock": stock})


def is_compact(cls: type) -> bool:
    """Whether `cls` is a compact class, made by this copy of the file or by one that came with a checkpoint."""
    return hasattr(cls, "_oto_stock")


def become_compact_(model: PreTrainedModel, record: dict[str, Any]) -> PreTrainedModel:
    """Makes a model that has been cut an instance of its compact class; a model cut before gets one merged record.

    Args:
        model: the cut model: its attributes and shapes are those of the record already.
        record: what was cut now, as described at the top of this file; its digest is made here.

    Raises:
        OTOError: the record is malformed or does not describe the model.
    """
    if "oto" in vars(model.config):
        record = _merged(model.config.oto, record)
    record = sealed(record)
    validate(record)
    for label, now, new, *_ in _changes(model, record):
        require(now == new, f"{label} is {now}, the record has {new}")
    _try_on_stock(model, record)
    model.config.oto = record
    model.__class__ = compact_class(type(model))
    model.config.architectures = [model._oto_stock.__name__]  # the class that the paths belong to
    return model


def _try_on_stock(model: PreTrainedModel, record: dict[str, Any]) -> None:
    """Warns where the stock model, built here without weights, can't take the record: nothing saved would load.

    That happens where the model was changed by hand, so that its config doesn't say how to build it.
    """
    config = copy.deepcopy(model.config)
    vars(config).pop("oto", None)
    stock = compact_class(type(model))._oto_stock
    try:
        with torch.device("meta"):
            restore_(stock(config), record)
    except Exception as error:  # a constructor may raise anything
        fact = "what it saves can't be loaded, for its config alone doesn't build it"
        logger.warning("%s: %s (%s); keep the full model's checkpoint", stock.__name__, fact, error)


def _blank(stock: type[PreTrainedModel]) -> PreTrainedModel:
    """An uninitialised compact model, for pickle and deepcopy to fill."""
    return object.__new__(compact_class(stock))


def _replace_config_(model: PreTrainedModel, values: Mapping[str, Any]) -> None:
    """Gives a model, and the parts that share its config, a copy of that config with other values.

    The given config is never written to: other models, in other threads too, may be built from it.
    """
    given = model.config
    own = copy.copy(given)
    for name, value in values.items():
        setattr(own, name, value)
    for module in model.modules():
        attributes = list(vars(module).items())
        for name, value in attributes:
            if value is given:
                setattr(module, name, own)


def _is_in_transformers(stock: type[PreTrainedModel]) -> bool:
    return getattr(transformers, stock.__name__, None) is stock


def _auto_map(stock: type[PreTrainedModel], config: PreTrainedConfig) -> dict[str, str]:
    """{"AutoModelFor...": "modeling_oto.Class"} for every Auto class that knows the config.

    The class is `stock` where the Auto class can choose it, else the family's class for that task, so that the body
    can be loaded alone or under another head. Entries that the config has already and that are not ours
    ("[repo--]modeling_oto.Class") stay.
    """
    ours = f"{Path(FILE_NAME).stem}."
    existing = vars(config).get("auto_map") or {}
    entries = {auto: ref for auto, ref in existing.items() if not str(ref).split("--")[-1].startswith(ours)}
    for auto in vars(modeling_auto).values():
        mapping = vars(auto).get("_model_mapping") if isinstance(auto, type) else None
        if mapping is None or type(config) not in mapping:
            continue
        choices = mapping[type(config)]
        choices = choices if isinstance(choices, (list, tuple)) else [choices]
        chosen = stock if stock in choices else choices[0]
        if _is_in_transformers(chosen) and chosen.config_class is type(config):
            entries[auto.__name__] = f"{ours}{chosen.__name__}"
    return entries


def _custom_classes(stock: type[PreTrainedModel], config: PreTrainedConfig) -> dict[str, str]:
    """{"AutoModelFor...": name} of the models in the file of `stock`, where checkpoints bring that file along.

    Empty for a class of Transformers, for one that no Auto class knows, and for one that no file defines.
    """
    home = sys.modules.get(stock.__module__)
    has_file = stock.__module__ != "__main__" and getattr(home, "__file__", None)
    if _is_in_transformers(stock) or not has_file:
        return {}
    classes: dict[str, str] = {}
    if stock._auto_class is not None:
        classes[stock._auto_class] = stock.__name__
    files = (stock.__module__.rpartition(".")[2], _custom_name(stock))
    for auto, reference in (vars(config).get("auto_map") or {}).items():
        module, _, name = str(reference).split("--")[-1].partition(".")  # [repo--]module.Class
        cls = vars(home).get(name)
        if module in files and isinstance(cls, type) and issubclass(cls, PreTrainedModel):
            classes[auto] = name
    return classes


def _custom_name(stock: type[PreTrainedModel]) -> str:
    """The name of the module that makes the classes beside `stock` compact."""
    return f"compact_{stock.__module__.rpartition('.')[2]}"


def _custom_code(stock: type[PreTrainedModel], names: list[str]) -> str:
    """The text of that module; its imports are plain lines, because Transformers looks for them to copy the files."""
    home = stock.__module__.rpartition(".")[2]
    lines = [f'"""The classes of {home}.py with the widths of the record in config.json; written by hf_oto."""', ""]
    lines += [f"from .{home} import {name} as Stock{name}" for name in names]
    lines += [f"from .{Path(FILE_NAME).stem} import compact_class", ""]
    lines += [f"{name} = compact_class(Stock{name})" for name in names]
    return "\n".join(lines) + "\n"
