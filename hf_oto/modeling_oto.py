"""A compact model as a class: the stock Transformers class, built with the widths that a record in its config gives.

Stands behind the cut, at the end of the flow, and alone: it imports only torch and transformers, because this very
file is also copied beside the weights, where `trust_remote_code=True` finds it without hf_oto installed.

The record is `config.oto`, plain JSON:

    {"version": 1,
     "modules": {"bert.encoder.layer.0.attention.self.query":             # only what differs from the stock model
                     {"attributes": {"out_features": 128},                # ints, or lists of ints; "config.NAME" for
                                                                          # what only this module's config says
                      "shapes": {"weight": [128, null], "bias": [128]}}}, # new sizes, null: as the stock model has it
     "cuts": [{"step": 0, "size": 4, "kept": "5",                           # for `to_dense` only; the bits of "kept",
               "members": [["bert...query.weight", 0, 0,                   # a hexadecimal number, are what was kept;
                            0, 1, 64], ...],                               # the third entry fills the cut places
               "scales": [["bert...norm.weight", 1, 2, 0], ...]}],          # times (size / number kept) ** (1 / 2),
                                                                            # after adding 0, which is then taken off
     "sha256": "9f86d08..."}                                                # of all the rest

Nothing in it is executed, and what does not fit is refused before anything is touched. The digest finds damage, not
malice: who seals a record anew can choose widths up to the stock model's, as he can choose the weights, and nothing
else. The cuts have to take of every weight what its new shape lacks. An attribute may only change as they do, or as
a shape does, of the weights at and below its module (`_numbers_after` says how). Of torch's own layers only the names
in `TORCH_WIDTHS` may change at all: no stride, padding or kernel size.

That is arithmetic, no knowledge of what an attribute is for. It can't tell a width from another number of the same
value, nor what a number far up in the model counts, with all the cuts of the model below it.
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
    """Checks the version, the types and the digest of a record, in time that grows with its length and no faster.
    Whether it fits a model is checked by `restore_`.

    Raises:
        OTOError: naming the first entry that is wrong.
    """
    require(isinstance(record, dict), f"is {short(record)}, not a JSON object")
    version = record.get("version")
    require(version == VERSION, f"has version {short(version)}, this hf_oto reads version {VERSION}: upgrade hf_oto")
    for part, kind in (("modules", dict), ("cuts", list), ("sha256", str)):
        require(isinstance(record.get(part), kind), f"has no {part!r} {kind.__name__}: it is truncated")
    require(len(record) == 4, f"has unknown parts: {short(list(record))}")
    for path, entry in record["modules"].items():
        _validate_entry(path, entry)
    for i, cut in enumerate(record["cuts"]):
        require(_is_cut(cut), f"cuts[{i}] is not {{'step', 'size', 'kept', 'members', 'scales'}} of the right kinds")
    require(record["sha256"] == sealed(record)["sha256"], "it isn't what was saved, by its sha256: it was changed")


def _validate_entry(path: Any, entry: Any) -> None:
    """Checks what a record says of one module; a path may be long, so it is quoted only where something is wrong."""
    if not (isinstance(path, str) and isinstance(entry, dict)):
        refuse(f"{short(path)} is {short(entry)}, not an object")
    if not entry.keys() <= {"attributes", "shapes"}:
        refuse(f"{short(path)} has unknown keys: {short(list(entry))}")
    if not all(isinstance(values, dict) for values in entry.values()):
        refuse(f"{short(path)}: a part is no object")
    for name, value in entry.get("attributes", {}).items():
        if not (_is_int(value) or (isinstance(value, list) and all(map(_is_int, value)))):
            refuse(f"{_shortened(path)}.{_shortened(name)} is {short(value)}, not an int or a list of ints")
    for name, shape in entry.get("shapes", {}).items():
        if not (isinstance(shape, list) and all(n is None or (_is_int(n) and n >= 1) for n in shape)):
            refuse(
                f"the shape of {_shortened(path)}.{_shortened(name)} is {short(shape)}, not a list of sizes >= 1 and "
                "nulls"
            )


def refuse(fact: str) -> NoReturn:
    raise OTOError(f"the hf_oto record in config.json (config.oto) does not fit: {fact}")


def require(ok: bool, fact: str) -> None:
    if not ok:
        refuse(fact)


def _shortened(name: str) -> str:
    """The end of a name, which says more than its beginning."""
    return name if len(name) <= 100 else f"...{name[-100:]}"


def _is_int(value: Any) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63  # JSON's true is an int to isinstance


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(_is_int(n) and n >= 0 for n in values)


def _is_cut(cut: Any) -> bool:
    match cut:
        case {"step": step, "size": size, "kept": str(kept), "members": list(members), "scales": list(scales)}:
            ok = len(cut) == 5 and _are_sizes([step, size]) and re.fullmatch("[0-9a-f]+", kept) is not None
            ok = ok and _leaves_some(int(kept, 16), size) and bool(members)
            return ok and all(_is_member(member, size) for member in members) and all(map(_is_scale, scales))
    return False


def _leaves_some(bits: int, size: int) -> bool:
    """Whether some ZIGs stay and some go, of `size`."""
    return bits.bit_length() <= size and 0 < bits.bit_count() < size


def _is_member(member: Any, size: int) -> bool:
    """[name, dim, fill, start, outer, inner] or [name, dim, fill, [[index, ...] of every ZIG]]."""
    match member:
        case [str(), dim, 0 | 1 as fill, start, outer, inner]:
            return _are_sizes([dim, fill, start, outer, inner]) and outer > 0 and inner > 0
        case [str(), dim, 0 | 1 as fill, list(rows)]:
            ok = _are_sizes([dim, fill]) and len(rows) == size and all(map(_are_sizes, rows))
            return ok and {len(rows[0]) or -1} == set(map(len, rows))
    return False


def _is_scale(scale: Any) -> bool:
    """[name, numerator and denominator of a power, offset]."""
    match scale:
        case [str(), over, under, offset]:
            return _is_int(over) and _are_sizes([under, offset]) and under > 0 and abs(over) <= 16 * under
    return False


def restore_(model: torch.nn.Module, record: dict[str, Any]) -> None:
    """Gives a stock model the sizes of `record`, in place; kept values are the leading ones (weights come afterwards).

    Works on any device, meta too. Parameters keep their identity, hence their ties, flags and `requires_grad`.

    Raises:
        OTOError: the record does not fit the model; nothing has been changed then.
    """
    changes = list(_changes(model, record))
    _check_widths(model, record, changes)
    for _, now, new, holder, name in changes:
        if isinstance(holder, torch.nn.Module):
            set_sizes_(holder, {name: new})
        elif now != new:
            holder.data = holder.data[tuple(map(slice, new))].clone()


def named_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer, those that are tied under each of their names."""
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def sizes_of(module: torch.nn.Module) -> dict[str, int | list | tuple]:
    """The ints, and lists and tuples of ints, that a module keeps, and the ints of its config as "config.NAME"."""
    kept = {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"}
    found = {
        name: value
        for name, value in kept.items()
        if _is_int(value) or (type(value) in (list, tuple, torch.Size) and value and all(map(_is_int, value)))
    }
    config = kept.get("config")
    if isinstance(config, PreTrainedConfig) and not isinstance(module, PreTrainedModel):
        read = vars(config) | (config._oto_view[1] if isinstance(config, _View) else {})
        found |= {f"config.{name}": value for name, value in read.items() if _is_int(value) and name[0] != "_"}
    return found


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
    """The base of config views: no classes of their own to Transformers, and they copy and pickle as views."""

    _oto_view: tuple[PreTrainedConfig, dict[str, int]]

    def __init_subclass__(cls) -> None:
        pass

    def __deepcopy__(self, memo: dict[int, Any]) -> PreTrainedConfig:
        config, values = self._oto_view
        return config_view(copy.deepcopy(config, memo), values)

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        return config_view, self._oto_view


def config_view(config: PreTrainedConfig, values: Mapping[str, int]) -> PreTrainedConfig:
    """The same config, attributes shared, in which one module reads other values: layers of one model differ."""
    if isinstance(config, _View):
        config, before = config._oto_view
        values = before | dict(values)
    names: dict[str, Any] = {name: property(lambda _, value=value: value) for name, value in values.items()}
    stock = type(config)
    names |= {"_oto_view": (config, dict(values)), "__module__": stock.__module__, "__qualname__": stock.__qualname__}
    view = object.__new__(type(stock.__name__, (_View, stock), names))
    view.__dict__ = vars(config)
    return view


def _changes(model: torch.nn.Module, record: dict[str, Any]) -> Iterator[tuple[str, Any, Any, Any, str]]:
    """(label, value now, value in the record, module or tensor, name) of every attribute and of every shape of a
    parameter or persistent buffer, checked against each other."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, entry in record["modules"].items():
        here = f"{type(model).__name__} of transformers {transformers.__version__}"
        require(path in modules, f"it names the module {path!r}, which {here} does not have")
        module = modules[path]
        known, kind = sizes_of(module), type(module).__name__
        for name, new in entry.get("attributes", {}).items():
            label = f"{path}.{name}".removeprefix(".")
            require(name in known, f"{kind} keeps no size {name!r} ({label})")
            old = known[name]
            olds, news = (old, new) if isinstance(old, (list, tuple)) and isinstance(new, list) else ([old], [new])
            fits = len(olds) == len(news) and all(map(is_cut_size, olds, news))
            require(fits, f"{label} is {short(old)}, the record has {short(new)}")
            yield label, old, type(old)(new), module, name
        saved = {name: b for name, b in module._buffers.items() if name not in module._non_persistent_buffers_set}
        for name, sizes in entry.get("shapes", {}).items():
            label, tensor = f"{path}.{name}".removeprefix("."), (module._parameters | saved).get(name)
            require(tensor is not None, f"{kind} has no weight or saved buffer {name!r} ({label})")
            dense = tensor.shape
            fits = len(sizes) == len(dense) and all(n is None or n <= d for n, d in zip(sizes, dense, strict=True))
            require(fits, f"{label} has shape {tuple(dense)}, of which the record keeps {short(sizes)}")
            shape = torch.Size(d if n is None else n for n, d in zip(sizes, dense, strict=True))
            yield label, dense, shape, tensor, name


# What the numbers of a record prove


class RecordedCut(NamedTuple):
    """An axis of `size` ZIGs of which `kept` stay, those whose bit in `bits` is set, the lowest for the first ZIG."""

    step: int
    size: int
    kept: int
    bits: int
    members: list[list[Any]]
    scales: list[list[Any]]


class Taken(NamedTuple):
    """Of a weight at or below some module each ZIG of the cut has `positions` positions, all of them or one run."""

    cut: int  # its index among the cuts in order: of a long one neither copies nor hashes are made
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
    """Checks that the cuts fit a stock model, by counting; no array as long as an axis is made.

    Args:
        cuts: in the order they were made.
        dense: name -> shape of every parameter and buffer of the stock model.

    Returns:
        (name, dim) -> how many positions are left after all cuts, of what any cut takes something.

    Raises:
        OTOError: a cut names a weight or a position that is not there, or cuts of one step overlap.
    """
    left: dict[tuple[str, int], int] = {}
    for _, step in groupby(cuts, key=attrgetter("step")):
        spanned, lost = Counter(), Counter()
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
    """How many positions each ZIG has of a member, and the last position of all."""
    if len(layout) == 1:
        rows = layout[0]
        return len(rows[0]), max(map(max, rows))
    start, outer, inner = layout
    return outer * inner, start + outer * size * inner - 1


def _runs(layout: list[Any]) -> set[int]:
    """The positions that a ZIG has of a member, and how long the runs are in which they lie."""
    if len(layout) == 3:
        _, outer, inner = layout
        return {outer * inner, inner}
    first = layout[0][0]
    breaks = [0, *(i for i, (a, b) in enumerate(pairwise(first), 1) if b != a + 1), len(first)]
    return {len(first), *(stop - start for start, stop in pairwise(breaks))}


def _check_widths(model: nn.Module, record: dict[str, Any], changes: Iterable[tuple[str, Any, Any, Any, str]]) -> None:
    """Checks that shapes, cuts and attributes of a record say the same.

    Args:
        model: the stock model.
        record: well-formed.
        changes: what `_changes` gives for them.
    """
    cuts = cuts_of(record)
    left = check_cuts(cuts, {name: tensor.shape for name, tensor in named_tensors(model).items()})
    shapes: dict[str, set[tuple[int, int]]] = defaultdict(set)  # module -> (width, new width) at and below it
    taken: dict[str, set[Taken]] = defaultdict(set)  # module -> what is cut at and below it
    for i, cut in enumerate(cuts):
        for name, _, _, *layout in cut.members:
            for path in _modules_of(name):
                taken[path].update(Taken(i, positions) for positions in _runs(layout))
    recorded = {}
    for label, dense, new, holder, _ in changes:
        if isinstance(holder, torch.Tensor):
            widths = list(zip(dense, new, strict=True))
            recorded |= {(label, dim): width for dim, (_, width) in enumerate(widths)}
            changed = {pair for pair in widths if pair[0] != pair[1]}
            for path in _modules_of(label):
                shapes[path] |= changed
            path = label.rpartition(".")[0]
            layer = model.get_submodule(path)
            if isinstance(layer, nn.modules.conv._ConvNd):  # its weight has the channels of one group
                groups = record["modules"][path].get("attributes", {}).get("groups", layer.groups)
                shapes[path] |= {(old * layer.groups, new * groups) for old, new in widths}
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
    """The paths of the modules that a weight or attribute of this name lies in, the outermost, "", last."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _is_torch_layer(module: nn.Module) -> bool:
    """Whether torch wrote the module, or its base class; what only contains others is the model's own code."""
    homes = {cls.__module__ for cls in type(module).__mro__ if cls is not nn.Module}
    return any(home.startswith("torch.nn.modules.") and home != nn.ModuleList.__module__ for home in homes)


def _accounts_for(
    old: Any, new: Any, shapes: set[tuple[int, int]], taken: set[Taken], cuts: list[RecordedCut]
) -> bool:
    """Whether an int, or the ints of a list, may change like this.

    Args:
        old, new: the values, of one kind and length.
        shapes: (width, new width) of the weights at and below the module.
        taken: what the cuts take of these.
        cuts: all cuts, which `taken` counts by.
    """
    olds, news = (old, new) if isinstance(old, (list, tuple)) else ([old], [new])
    changed = [pair for pair in zip(olds, news, strict=True) if pair[0] != pair[1]]
    if all(pair in shapes or pair[1] in _numbers_after(pair[0], taken, cuts) for pair in changed):
        return True
    return tuple(news) in _parts_after(tuple(olds), taken, cuts)


def _by_step(taken: set[Taken], cuts: list[RecordedCut]) -> Iterator[list[tuple[RecordedCut, int]]]:
    """For every step that takes something, (cut, positions) of what it takes."""
    ordered = ((cuts[i], positions) for i, positions in sorted(taken))
    for _, step in groupby(ordered, key=lambda pair: pair[0].step):
        yield list(step)


def _numbers_after(number: int, taken: set[Taken], cuts: list[RecordedCut]) -> set[int]:
    """What a number may be after the cuts: it counts something of which every ZIG has the same whole share.

    Of a cut from 4 heads to 3, of 8 positions each, 4 heads become 3 and 32 positions become 24, and so does what
    lies between: where a head is a key head with 2 query heads, 8 query heads become 6. The width of a head
    itself, 8, stays 8.
    """
    numbers = {number}
    for step in _by_step(taken, cuts):
        widths = {positions for _, positions in step}
        tries = [(before, cut, positions) for before in numbers for cut, positions in step]
        numbers |= {n // cut.size * cut.kept for n, cut, positions in tries if _is_counted(n, cut, positions, widths)}
    return numbers


def _is_counted(number: int, cut: RecordedCut, positions: int, widths: set[int]) -> bool:
    """Whether every ZIG of a cut, of so many positions, has the same share of a number; `widths` are those of one ZIG,
    of this cut and of others."""
    share, rest = divmod(number, cut.size)
    if rest or not share:
        return False
    return share in (1, positions) or (positions % share == 0 and number not in widths)


def _parts_after(parts: tuple[int, ...], taken: set[Taken], cuts: list[RecordedCut]) -> set[tuple[int, ...]]:
    """What the lengths of parts, side by side on one axis, may be after the cuts: what is kept within each."""
    found = {parts}
    for step in _by_step(taken, cuts):
        for before in list(found):
            ends = list(accumulate(before))
            for cut, positions in step:
                for unit in {1, positions}:
                    if ends[-1] == cut.size * unit and all(end % unit == 0 for end in ends):
                        kept = [unit * (cut.bits & ((1 << end // unit) - 1)).bit_count() for end in ends]
                        found.add(tuple(b - a for a, b in pairwise([0, *kept])))
    return found


# Records of other classes, and of cuts in a row


def _translated(model: PreTrainedModel, record: dict[str, Any], partly: bool) -> dict[str, Any]:
    """The record in the paths of `model`, which may be the base model of the one recorded, or have another head.

    Args:
        partly: leave out what `model` does not have, as `from_pretrained` leaves out its weights.
    """
    known = dict(model.named_modules(remove_duplicate=False)).keys() | named_tensors(model).keys()
    parts = ("members", "scales")
    names = {*record["modules"], *(entry[0] for cut in record["cuts"] for part in parts for entry in cut[part])}
    if not partly and names <= known:
        return record
    body = f"{model.base_model_prefix}." if model.base_model_prefix else "no body."
    has_body = model.base_model is not model  # "bert.encoder" here, "encoder" in a base model
    of_head = any(f"{name}.".startswith(body) for name in names)

    def translate(name: str) -> str | None:
        inside = f"{body}{name}".removesuffix(".")
        if of_head and not has_body:
            name = f"{name}."[len(body) : -1] if f"{name}.".startswith(body) else None
        elif has_body and not of_head and inside in known and (partly or name not in known):
            name = inside
        return name if name in known or not partly else None

    if partly and has_body and any(not name.startswith(body) for name, _ in model.named_parameters()):
        lost = _readers(record, {name for name in names if translate(name) is None})
        fact = f"{type(model).__name__} has no {lost} but other weights, and what those would read is narrow"
        require(not lost, f"{fact}: save hf_oto.to_dense(model) and load that, or prune with protect={lost}")
    modules = {translate(path): entry for path, entry in record["modules"].items()}
    modules.pop(None, None)
    require(bool(modules) or not record["modules"], f"{type(model).__name__} has none of its modules")
    if len(modules) < len(record["modules"]):
        logger.info("%s uses %d of the %d compact modules", type(model).__name__, len(modules), len(record["modules"]))
    cuts = []
    for cut in record["cuts"]:
        named = {part: [[translate(name), *rest] for name, *rest in cut[part]] for part in parts}
        cuts.append(cut | {part: [entry for entry in named[part] if entry[0] is not None] for part in parts})
    return sealed(record | {"modules": modules, "cuts": [cut for cut in cuts if cut["members"]]})


def _readers(record: dict[str, Any], gone: set[str]) -> list[str]:
    """The weights in `gone`, modules and weights, that share a cut axis with weights that are not."""
    cuts = [{name for name, *_ in cut["members"]} for cut in record["cuts"]]
    shared = {name for members in cuts if members - gone for name in members & gone}
    named = {name for members in cuts for name in members}
    for path in gone & record["modules"].keys():
        for name, shape in record["modules"][path].get("shapes", {}).items():
            if any(shape) and f"{path}.{name}" not in named:
                shared.add(f"{path}.{name}")  # tied: the cut knows it by its other name
    return sorted(shared)


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """One record for two cuts in a row: the later sizes count, the cuts follow each other."""
    modules = copy.deepcopy(old["modules"])
    for path, entry in new["modules"].items():
        mine = modules.setdefault(path, {})
        mine["attributes"] = mine.get("attributes", {}) | entry.get("attributes", {})
        shapes = mine.setdefault("shapes", {})
        for name, shape in entry.get("shapes", {}).items():
            before = shapes.get(name, [None] * len(shape))
            shapes[name] = [b if n is None else n for n, b in zip(shape, before, strict=True)]
    return new | {"modules": modules, "cuts": [*old["cuts"], *new["cuts"]]}


# The class


def _shared_variable() -> ContextVar[frozenset[str]]:
    """One variable for all copies of this file: hf_oto's own and those that came with checkpoints."""
    if "_oto_building" not in vars(PreTrainedModel):
        PreTrainedModel._oto_building = ContextVar("oto_building", default=frozenset())
    return PreTrainedModel._oto_building


BUILDING = _shared_variable()  # digests of the records whose models this thread is building now


def asks_for_compact(config: PreTrainedConfig) -> bool:
    """Whether a model built from this config is compact: the config has a record, and not that of an enclosing model.

    Sub-models are built from the config of the model they are part of, or from a copy of it, but the paths in the
    record are those of the outermost model. While that one is built, `BUILDING` has the record's digest.
    """
    if "oto" not in vars(config):
        return False
    digest = config.oto.get("sha256") if isinstance(config.oto, dict) else None
    return not (isinstance(digest, str) and digest in BUILDING.get())


def finish_loading(finish: Callable[..., Any], model: PreTrainedModel, load_config: Any, loading_info: Any) -> Any:
    """Transformers' `_finalize_model_loading`, but sizes that a record cut are never taken for a new head, to be
    initialised anew.

    Args:
        finish: the `_finalize_model_loading` that would run without us.
        model, load_config, loading_info: its arguments.

    Raises:
        OTOError: the weights have other sizes than the record says, whatever `ignore_mismatched_sizes` is, or other
            sizes than the stock model where it says nothing, and that is False.
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
        require(
            fits, f"{key} has shape {tuple(saved)} in the checkpoint, {tuple(built)} by the record: not its weights"
        )
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

    It would call `_init_weights` on such a module and only then see, tensor by tensor, that nothing is to be written.
    Some models compute there with sizes of the config, which don't fit what was cut. Other modules are left to it,
    for some draw random numbers there, and the weights of a new head are to be those it has on the stock model.
    """
    cut = {path for path, entry in record["modules"].items() if entry.get("shapes")}
    touched = cut | {above for path in cut for above in _modules_of(path)}
    for path, module in model.named_modules():
        tensors = [*module.parameters(), *module.buffers()] if path in touched else []
        if tensors and all(getattr(tensor, "_is_hf_initialized", False) for tensor in tensors):
            module._is_hf_initialized = True


class CompactMixin:
    """What a compact class adds to its stock class: it builds, saves and pickles itself by the record in its config.

    The record is restored when the model is built, on meta in `from_pretrained`: weights, shards, dtypes, device maps
    and ties are then Transformers' own business.
    """

    _oto_stock: type[PreTrainedModel]
    _auto_class = None  # of custom code, which Transformers would save without us: `save_pretrained` does it

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
        foreign = bool(config.architectures) and name not in config.architectures
        translated = _translated(self, record, partly=foreign)
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
        stock, custom = self._oto_stock, _custom_classes(self._oto_stock, self.config)
        travels = _is_in_transformers(stock) or bool(custom)
        if "oto" in vars(self.config) and travels and not self._hf_peft_config_loaded:
            self.config.auto_map = _auto_map(stock, self.config) | {
                auto: f"{_custom_name(stock)}.{name}" for auto, name in custom.items()
            }
            if self.should_save_on_this_rank(is_main_process):
                os.makedirs(save_directory, exist_ok=True)
                shutil.copyfile(__file__, Path(save_directory) / FILE_NAME)
                if custom:
                    custom_object_save(self, save_directory)
                    code = _custom_code(stock, sorted(set(custom.values())))
                    (Path(save_directory) / f"{_custom_name(stock)}.py").write_text(code)
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)

    def _get_files_timestamps(self, working_dir: str | os.PathLike) -> dict[str, float]:
        """`save_pretrained(push_to_hub=True)` uploads what is newer than this: let our files always be."""
        ours = (FILE_NAME, f"{_custom_name(self._oto_stock)}.py")
        return {f: time for f, time in super()._get_files_timestamps(working_dir).items() if f not in ours}

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoModel") -> None:
        """Nothing: Auto classes call it on code from a checkpoint, and would then save and load us as custom code."""

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        """Pickles as (stock class, state): the compact class itself cannot be found by name."""
        if type(self) is not compact_class(self._oto_stock):
            return super().__reduce_ex__(protocol)  # a subclass of somebody's
        _, _, *state = super().__reduce_ex__(max(protocol, 2))
        return _blank, (self._oto_stock,), *state


@functools.cache
def compact_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of compact `stock` models: its subclass of the same name and module, so that whatever Transformers
    looks up by these (key conversions, losses, `is_custom_code`, `architectures`) stays as it was.

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
    """Warns where a stock model, built here without weights, can't take the record, so that nothing saved would load.

    That is so where the model was changed by hand, and its config doesn't say how to build it.
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

    Other models, in other threads too, may be built from the config that it was given: that one is never written to.
    """
    given = model.config
    own = copy.copy(given)
    for name, value in values.items():
        setattr(own, name, value)
    for module in model.modules():
        for name in [name for name, value in vars(module).items() if value is given]:
            setattr(module, name, own)


def _is_in_transformers(stock: type[PreTrainedModel]) -> bool:
    return getattr(transformers, stock.__name__, None) is stock


def _auto_map(stock: type[PreTrainedModel], config: PreTrainedConfig) -> dict[str, str]:
    """{"AutoModelFor...": "modeling_oto.Class"} for every Auto class that knows the config: `stock`, where it is a
    choice, else the family's other classes, so that the body can be loaded alone or under another head. What is there
    and not ours ("[repo--]modeling_oto.Class") stays."""
    ours, there = f"{Path(FILE_NAME).stem}.", vars(config).get("auto_map") or {}
    entries = {auto: ref for auto, ref in there.items() if not str(ref).split("--")[-1].startswith(ours)}
    for auto in vars(modeling_auto).values():
        mapping = vars(auto).get("_model_mapping") if isinstance(auto, type) else None
        if mapping is not None and type(config) in mapping:
            choices = mapping[type(config)]
            choices = choices if isinstance(choices, (list, tuple)) else [choices]
            chosen = stock if stock in choices else choices[0]
            if _is_in_transformers(chosen) and chosen.config_class is type(config):
                entries[auto.__name__] = f"{ours}{chosen.__name__}"
    return entries


def _custom_classes(stock: type[PreTrainedModel], config: PreTrainedConfig) -> dict[str, str]:
    """{"AutoModelFor...": name} of the models in the file of `stock`, which is a file that checkpoints bring along.

    Empty for a class of Transformers, for one that no Auto class knows, and for one that no file defines.
    """
    home = sys.modules.get(stock.__module__)
    if _is_in_transformers(stock) or stock.__module__ == "__main__" or not getattr(home, "__file__", None):
        return {}
    found = {} if stock._auto_class is None else {stock._auto_class: stock.__name__}
    for auto, reference in (vars(config).get("auto_map") or {}).items():
        module, _, name = str(reference).split("--")[-1].partition(".")
        cls = vars(home).get(name)
        of_this_file = module in (stock.__module__.rpartition(".")[2], _custom_name(stock))
        if of_this_file and isinstance(cls, type) and issubclass(cls, PreTrainedModel):
            found[auto] = name
    return found


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
