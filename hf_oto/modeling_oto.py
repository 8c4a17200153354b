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

    modules: only what differs from the stock model. An attribute is an int or a list of ints. The attribute
        "config.NAME" is a value that only this module reads from its config. A null in a shape means: as in the stock
        model.
    cuts: only `to_dense` reads them. Cuts of the same step were made together.
        kept: a hexadecimal number whose bits are the ZIGs that stay; 5 is 0b0101, so ZIGs 0 and 2.
        members: [weight, dimension, fill, start, outer, inner]. `fill` is the value for the positions that were cut.
            The positions along the dimension, from `start` on, are those of an array (outer, size, inner); the index
            along its middle dimension is the ZIG. Or [weight, dimension, fill, list of the positions of every ZIG].
        scales: [weight, 1, 2, 0] says: 0 was added to the weight, the sum was multiplied by
            (size / number kept) ** (1 / 2), and 0 was subtracted again.
    sha256: the digest of all other parts.

Nothing in the record is executed, and a record that does not fit is refused before anything is touched. The digest
finds damage, not malice: whoever writes a record and its digest can choose widths up to the stock model's, as they can
choose the weights, and nothing else. The cuts have to take from every weight what its new shape lacks. An attribute
may only change as the cuts of the weights at and below its module do, or as the shape of such a weight does
(`_numbers_after` says how). Of torch's own layers only the attributes in `TORCH_WIDTHS` may change: no stride, padding
or kernel size.

That check is arithmetic, and does not know what an attribute is for. The check can't tell a width from another number
of the same value, and for a module that contains many others it allows what any cut in one of these allows.
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
Record = dict[str, Any]  # config.oto, as described above
logger = logging.getLogger(__name__)


class OTOError(RuntimeError):
    """A model, checkpoint or set-up that hf_oto cannot handle; the message names the layer and the way out."""


def __getattr__(name: str) -> type[PreTrainedModel]:
    """The compact class of the Transformers model with this name: `auto_map` asks for `modeling_oto.BertModel`."""
    is_public = not name.startswith("_")
    stock = getattr(transformers, name, None) if is_public else None
    is_model = isinstance(stock, type) and issubclass(stock, PreTrainedModel)
    if not is_model:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}, and transformers no such model")
    return compact_class(stock)


# The record

# The parts beside the version -> the types of their values.
_PARTS = {"modules": dict, "cuts": list, "sha256": str}


def sealed(record: Record) -> Record:
    """The record with its digest; a digest that it has already does not count."""
    content = dict(record)
    content.pop("sha256", None)
    # The digest must not depend on the order of keys: JSON objects have none.
    text = json.dumps(content, sort_keys=True)
    content["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    return content


def validate(record: Any) -> None:
    """Checks the version, the types and the digest of a record; `restore_` checks whether it fits a model.

    The time grows with the length of the record and no faster.

    Raises:
        OTOError: naming the first entry that is wrong.
    """
    require(isinstance(record, dict), f"is {short(record)}, not a JSON object")
    version = record.get("version")
    # Before all else: a later version may have other parts.
    require(version == VERSION, f"has version {short(version)}, this hf_oto reads version {VERSION}: upgrade hf_oto")
    for part, kind in _PARTS.items():
        value = record.get(part)
        is_there = isinstance(value, kind)
        require(is_there, f"has no {part!r} {kind.__name__}: it is truncated")
    has_no_other = record.keys() == {"version", *_PARTS}
    require(has_no_other, f"has unknown parts: {short(list(record))}")
    for path, entry in record["modules"].items():
        _validate_entry(path, entry)
    for i, cut in enumerate(record["cuts"]):
        require(_is_cut(cut), f"cuts[{i}] is not {{'step', 'size', 'kept', 'members', 'scales'}} of the right kinds")
    is_as_saved = record["sha256"] == sealed(record)["sha256"]
    require(is_as_saved, "its sha256 is not that of its content: it was changed after it was saved")


def _validate_entry(path: Any, entry: Any) -> None:
    """Checks what a record says of one module.

    Messages quote paths, which may be long: a message is made only where something is wrong.
    """
    if not (isinstance(path, str) and isinstance(entry, dict)):
        refuse(f"{short(path)} is {short(entry)}, not an object")
    if not entry.keys() <= {"attributes", "shapes"}:
        refuse(f"{short(path)} has unknown keys: {short(list(entry))}")
    for values in entry.values():
        if not isinstance(values, dict):
            refuse(f"{short(path)}: a part is no object")
    for name, value in entry.get("attributes", {}).items():
        if not (_is_int(value) or _is_list_of_ints(value)):
            refuse(f"{_shortened(path)}.{_shortened(name)} is {short(value)}, not an int or a list of ints")
    for name, shape in entry.get("shapes", {}).items():
        if not _is_shape(shape):
            label = f"{_shortened(path)}.{_shortened(name)}"
            refuse(f"the shape of {label} is {short(shape)}, not a list of sizes >= 1 and nulls")


def refuse(fact: str) -> NoReturn:
    """Raises the error of a record that does not fit."""
    raise OTOError(f"the hf_oto record in config.json (config.oto) does not fit: {fact}")


def require(ok: bool, fact: str) -> None:
    """Refuses the record unless `ok`; the fact is the reason."""
    if not ok:
        refuse(fact)


def _shortened(name: str) -> str:
    """The end of a name, which says more than its beginning."""
    if len(name) <= 100:
        return name
    return f"...{name[-100:]}"


def _is_int(value: Any) -> bool:
    # To isinstance JSON's true would be an int. Sizes of torch have 64 bits.
    return type(value) is int and -(2**63) <= value < 2**63


def _is_list_of_ints(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_int, value))


def _are_sizes(values: Any) -> bool:
    # In one pass: a record has thousands of these lists.
    return isinstance(values, list) and all(_is_int(n) and n >= 0 for n in values)


def _is_shape(shape: Any) -> bool:
    """Whether it is a list of sizes >= 1, or None for those that stay as in the stock model."""
    if not isinstance(shape, list):
        return False
    given = [size for size in shape if size is not None]
    return _are_sizes(given) and 0 not in given


def _is_cut(cut: Any) -> bool:
    match cut:
        case {"step": step, "size": size, "kept": str(kept), "members": list(members), "scales": list(scales)}:
            # The pattern matches dicts with more keys too.
            if len(cut) != 5 or not members:
                return False
            if not _are_sizes([step, size]):
                return False
            # int() would also take a sign, spaces and underscores.
            if re.fullmatch("[0-9a-f]+", kept) is None:
                return False
            if not _keeps_and_cuts(int(kept, 16), size):
                return False
            if not all(_is_member(member, size) for member in members):
                return False
            return all(map(_is_scale, scales))
    return False


def _keeps_and_cuts(bits: int, size: int) -> bool:
    """Whether bits say of `size` ZIGs that at least one stays and at least one goes."""
    return bits.bit_length() <= size and 0 < bits.bit_count() < size


def _is_member(member: Any, size: int) -> bool:
    """Whether it is [name, dim, fill, start, outer, inner] or [name, dim, fill, [[index, ...] of every ZIG]]."""
    match member:
        case [str(), dim, 0 | 1 as fill, start, outer, inner]:
            if not _are_sizes([dim, fill, start, outer, inner]):
                return False
            return outer > 0 and inner > 0
        case [str(), dim, 0 | 1 as fill, list(rows)]:
            if not _are_sizes([dim, fill]):
                return False
            if len(rows) != size:
                return False
            if not all(map(_are_sizes, rows)):
                return False
            # Every ZIG has the same number of positions, and at least one.
            lengths = set(map(len, rows))
            return len(lengths) == 1 and 0 not in lengths
    return False


def _is_scale(scale: Any) -> bool:
    """Whether it is [name, numerator and denominator of a power, offset]."""
    match scale:
        case [str(), numerator, denominator, offset]:
            if not _is_int(numerator) or not _are_sizes([denominator, offset]):
                return False
            # size / number kept is below 2 ** 63, so its 16th power is still a float.
            return denominator > 0 and abs(numerator) <= 16 * denominator
    return False


def restore_(model: nn.Module, record: Record) -> None:
    """Gives a stock model the sizes of a record, in place, on any device, meta too.

    A smaller weight holds the leading values of the larger one, but they mean nothing: those of the checkpoint are
    loaded afterwards. Parameters keep their identity, hence their ties, flags and `requires_grad`.

    Raises:
        OTOError: the record does not fit the model; nothing has been changed then.
    """
    # All changes are checked before the first one is made.
    changes = list(_changes(model, record))
    _check_widths(model, record, changes)
    for change in changes:
        if isinstance(change.holder, nn.Module):
            set_sizes_(change.holder, {change.name: change.new})
        elif change.old != change.new:
            leading = tuple(slice(size) for size in change.new)
            values = change.holder.data[leading]
            # A view would keep the memory of the whole weight.
            change.holder.data = values.clone()


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer, those that are tied under each of their names."""
    tensors: dict[str, torch.Tensor] = {}
    tensors.update(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    return tensors


def sizes_of(module: nn.Module) -> dict[str, int | list | tuple]:
    """The ints, and lists and tuples of ints, that a module keeps, and the ints of its config as "config.NAME"."""
    sizes: dict[str, int | list | tuple] = {}
    for name, value in vars(module).items():
        if name.startswith("_") or name == "training":
            continue
        is_sequence = type(value) in (list, tuple, torch.Size)
        is_sequence_of_ints = is_sequence and value and all(map(_is_int, value))
        if is_sequence_of_ints or _is_int(value):
            sizes[name] = value
    config = vars(module).get("config")
    # The config of a whole model is read by all its modules, so it is not the model's own.
    if isinstance(config, PreTrainedConfig) and not isinstance(module, PreTrainedModel):
        config_values = dict(vars(config))
        if isinstance(config, _View):
            _, own_values = config._oto_view
            config_values.update(own_values)
        for name, value in config_values.items():
            if _is_int(value) and not name.startswith("_"):
                sizes[f"config.{name}"] = value
    return sizes


def is_cut_size(old: int, new: int) -> bool:
    """Whether a cut may turn the size `old` of the stock model into `new`: sizes shrink, and none vanishes."""
    if new == old:
        return True
    are_ints = _is_int(old) and _is_int(new)
    return are_ints and 1 <= new <= old


def set_sizes_(module: nn.Module, sizes: Mapping[str, Any]) -> None:
    """Sets what `sizes_of` names, in place."""
    for name, value in sizes.items():
        name_in_config = name.removeprefix("config.")
        if name_in_config != name:
            module.config = config_view(module.config, {name_in_config: value})
        else:
            setattr(module, name, value)


class _View:
    """The base of the classes of config views, which copy and pickle as views.

    Attributes:
        _oto_view: the config that is viewed, and the values that are others in the view.
    """

    _oto_view: tuple[PreTrainedConfig, dict[str, int]]

    def __init_subclass__(cls) -> None:
        """Does nothing: Transformers' own would treat every view as a new class of configs."""

    def __deepcopy__(self, memo: dict[int, Any]) -> PreTrainedConfig:
        config, values = self._oto_view
        own_config = copy.deepcopy(config, memo)
        return config_view(own_config, values)

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        return config_view, self._oto_view


def config_view(config: PreTrainedConfig, values: Mapping[str, int]) -> PreTrainedConfig:
    """A view of a config, for one module that reads other values from it than the other modules of the model.

    The view shares all attributes with the config.
    """
    values = dict(values)
    if isinstance(config, _View):
        # `_oto_view` has the config itself and all values: there are no views of views.
        config, earlier_values = config._oto_view
        values = earlier_values | values
    stock = type(config)
    namespace: dict[str, Any] = {
        "_oto_view": (config, values),
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
    }
    for name, value in values.items():
        # A property wins over the attribute of that name, which the view shares with the config.
        namespace[name] = property(lambda _, value=value: value)
    view_class = type(stock.__name__, (_View, stock), namespace)
    # Without __init__, which would set attributes of the config anew.
    view = object.__new__(view_class)
    # The same dict and no copy: what is set on the config later is seen in the view.
    view.__dict__ = vars(config)
    return view


class Change(NamedTuple):
    """One size that a record gives: an attribute of a module, or the shape of a parameter or persistent buffer.

    Attributes:
        path: the module.
        name: the name of the attribute or tensor in the module.
        old: the value in the model.
        new: the value in the record.
        holder: the module with the attribute, or the tensor with the shape.
    """

    path: str
    name: str
    old: Any
    new: Any
    holder: Any

    @property
    def label(self) -> str:
        """The full name, "encoder.layer.0.query.weight"."""
        return _label(self.path, self.name)


def _label(path: str, name: str) -> str:
    # The path of the model itself is "".
    return f"{path}.{name}".removeprefix(".")


def _changes(model: nn.Module, record: Record) -> Iterator[Change]:
    """Every size that a record gives, checked against the model."""
    # A module that has two paths may be recorded under either.
    modules = dict(model.named_modules(remove_duplicate=False))
    stock = f"{type(model).__name__} of transformers {transformers.__version__}"
    for path, entry in record["modules"].items():
        require(path in modules, f"it names the module {path!r}, which {stock} does not have")
        module = modules[path]
        attributes = entry.get("attributes", {})
        shapes = entry.get("shapes", {})
        yield from _attribute_changes(path, module, attributes)
        yield from _shape_changes(path, module, shapes)


def _attribute_changes(path: str, module: nn.Module, attributes: dict[str, Any]) -> Iterator[Change]:
    sizes = sizes_of(module)
    for name, new in attributes.items():
        label = _label(path, name)
        require(name in sizes, f"{type(module).__name__} keeps no size {name!r} ({label})")
        old = sizes[name]
        if isinstance(old, (list, tuple)) and isinstance(new, list):
            has_same_length = len(old) == len(new)
            fits = has_same_length and all(map(is_cut_size, old, new))
        else:
            fits = is_cut_size(old, new)
        require(fits, f"{label} is {short(old)}, the record has {short(new)}")
        # JSON has lists only: a tuple becomes a tuple again.
        new_of_same_type = type(old)(new)
        yield Change(path, name, old, new_of_same_type, module)


def _shape_changes(path: str, module: nn.Module, shapes: dict[str, Any]) -> Iterator[Change]:
    tensors = dict(module._parameters)
    for name, buffer in module._buffers.items():
        if name not in module._non_persistent_buffers_set:
            tensors[name] = buffer
    for name, sizes in shapes.items():
        label = _label(path, name)
        tensor = tensors.get(name)
        require(tensor is not None, f"{type(module).__name__} has no weight or saved buffer {name!r} ({label})")
        old = tensor.shape
        fits = len(sizes) == len(old)
        if fits:
            new = _filled(sizes, old)
            fits = all(n <= o for n, o in zip(new, old, strict=True))
        require(fits, f"{label} has shape {tuple(old)}, of which the record keeps {short(sizes)}")
        yield Change(path, name, old, torch.Size(new), tensor)


def _filled(sizes: list[int | None], others: Iterable[Any]) -> list[Any]:
    """The sizes, each None among them replaced by the one of `others` at its place."""
    filled = []
    for size, other in zip(sizes, others, strict=True):
        filled.append(other if size is None else size)
    return filled


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


Cuts = list[RecordedCut]  # of a whole record, in the order they were made
Place = tuple[str, int]  # a weight and one of its dimensions
WidthChanges = set[tuple[int, int]]  # (width, new width)

# What torch's own layers call a width or a count of groups.
TORCH_WIDTHS = {
    *("in_features", "in1_features", "in2_features", "out_features", "in_channels", "out_channels", "groups"),
    *("num_features", "num_channels", "num_groups", "num_parameters", "num_embeddings", "embedding_dim"),
    *("normalized_shape", "input_size", "hidden_size", "proj_size", "embed_dim", "kdim", "vdim", "num_heads"),
}


def cuts_of(record: Record) -> Cuts:
    """The cuts in the order they were made."""
    cuts = []
    for cut in record["cuts"]:
        bits = int(cut["kept"], 16)
        recorded = RecordedCut(
            step=cut["step"],
            size=cut["size"],
            kept=bits.bit_count(),
            bits=bits,
            members=cut["members"],
            scales=cut["scales"],
        )
        cuts.append(recorded)
    return sorted(cuts, key=attrgetter("step"))


def check_cuts(cuts: Iterable[RecordedCut], dense: Mapping[str, torch.Size]) -> dict[Place, int]:
    """Checks that the cuts fit a stock model, by counting: no array as long as an axis is made.

    Args:
        cuts: in the order they were made.
        dense: name -> shape of every parameter and buffer of the stock model.

    Returns:
        (name, dim) -> how many positions are left after all cuts, for every dimension that a cut takes from.

    Raises:
        OTOError: a cut names a weight or a position that is not there, or cuts of one step overlap.
    """
    widths: dict[Place, int] = {}
    for _, step in groupby(cuts, key=attrgetter("step")):
        spanned: Counter[Place] = Counter()  # the positions of all ZIGs of this step, kept ones too
        lost: Counter[Place] = Counter()
        for cut in step:
            for name, dim, _, *layout in cut.members:
                place = name, dim
                shape = dense.get(name, ())
                if dim < len(shape):
                    # Only the end of the step changes widths: its cuts were made together.
                    widths.setdefault(place, shape[dim])
                width = widths.get(place, 0)
                extent = _extent(cut.size, layout)
                spanned[place] += cut.size * extent.positions
                num_cut = cut.size - cut.kept
                lost[place] += num_cut * extent.positions
                # Cuts of one step that overlap may span more positions than there are.
                fits = extent.last < width and spanned[place] <= width
                require(fits, f"the stock model has no {short(name)}[{dim}] of {spanned[place]} positions to cut")
        for place, count in lost.items():
            widths[place] -= count
    return widths


class _Extent(NamedTuple):
    """Where a member lies: how many positions each of its ZIGs has, and the last position of all ZIGs."""

    positions: int
    last: int


def _extent(size: int, layout: list[Any]) -> _Extent:
    if len(layout) == 1:
        rows = layout[0]  # (size, positions)
        last = max(map(max, rows))
        return _Extent(len(rows[0]), last)
    start, outer, inner = layout
    stop = start + outer * size * inner
    return _Extent(outer * inner, stop - 1)


def _runs(layout: list[Any]) -> set[int]:
    """The numbers of positions that a ZIG has in a member: of all, and of each run without gaps."""
    if len(layout) == 3:
        _, outer, inner = layout
        return {outer * inner, inner}
    positions = layout[0][0]  # of the first ZIG
    numbers = {len(positions)}
    start_of_run = 0
    for i in range(1, len(positions)):
        if positions[i] != positions[i - 1] + 1:
            numbers.add(i - start_of_run)
            start_of_run = i
    numbers.add(len(positions) - start_of_run)
    return numbers


def _check_widths(model: nn.Module, record: Record, changes: list[Change]) -> None:
    """Checks that shapes, cuts and attributes of a record say the same.

    Args:
        model: the stock model.
        record: well-formed.
        changes: what `_changes` gives for them.
    """
    cuts = cuts_of(record)
    of_tensors: list[Change] = []
    of_attributes: list[Change] = []
    for change in changes:
        is_of_tensor = isinstance(change.holder, torch.Tensor)
        changes_of_kind = of_tensors if is_of_tensor else of_attributes
        changes_of_kind.append(change)
    _check_shapes(model, cuts, of_tensors)
    taken = _taken_by_module(cuts)
    widths = _widths_by_module(model, record, of_tensors)
    for change in of_attributes:
        path, name, old, new, module = change
        if old == new:
            continue
        fact = f"{change.label} is {short(old)}, no width that was cut makes it {short(new)}"
        may_change = name in TORCH_WIDTHS or not _is_torch_layer(module)
        require(may_change, fact)
        is_explained = _accounts_for(old, new, widths[path], taken[path], cuts)
        require(is_explained, fact)


def _check_shapes(model: nn.Module, cuts: Cuts, changes: Iterable[Change]) -> None:
    """Checks that the shapes of the record are those of the stock model without what the cuts take."""
    dense = {}
    for name, tensor in named_tensors(model).items():
        dense[name] = tensor.shape
    left_by_cuts = check_cuts(cuts, dense)
    recorded: dict[Place, int] = {}  # (weight, dim) -> new width
    for change in changes:
        for dim, width in enumerate(change.new):
            recorded[change.label, dim] = width
    for place, width in left_by_cuts.items():
        name, dim = place
        recorded_width = recorded.get(place)
        fact = f"its cuts leave {width} positions of {name}[{dim}], its shapes {recorded.get(place, 'all')}"
        require(recorded_width == width, fact)


def _taken_by_module(cuts: Cuts) -> defaultdict[str, set[Taken]]:
    """The path of a module -> what is cut at and below it."""
    by_module: defaultdict[str, set[Taken]] = defaultdict(set)
    for i, cut in enumerate(cuts):
        for name, _, _, *layout in cut.members:
            taken = {Taken(i, positions) for positions in _runs(layout)}
            for path in _modules_of(name):
                by_module[path] |= taken
    return by_module


def _widths_by_module(model: nn.Module, record: Record, changes: Iterable[Change]) -> defaultdict[str, WidthChanges]:
    """The path of a module -> (width, new width) of the weights at and below it.

    Args:
        changes: those of shapes.
    """
    by_module: defaultdict[str, WidthChanges] = defaultdict(set)
    for change in changes:
        widths = set(zip(change.old, change.new, strict=True))
        changed = {(old, new) for old, new in widths if old != new}
        for path in _modules_of(change.label):
            by_module[path] |= changed
        layer = model.get_submodule(change.path)
        if isinstance(layer, nn.modules.conv._ConvNd):
            # The weight has the channels of one group, and the attributes count those of all groups.
            entry = record["modules"][change.path]
            attributes = entry.get("attributes", {})
            new_groups = attributes.get("groups", layer.groups)
            for old, new in widths:
                in_all_groups = old * layer.groups, new * new_groups
                by_module[change.path].add(in_all_groups)
    return by_module


def _modules_of(name: str) -> Iterator[str]:
    """The paths of the modules that a weight or attribute of this name lies in, the innermost first, "" last."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _is_torch_layer(module: nn.Module) -> bool:
    """Whether torch wrote the module or a base class of it; torch's containers, which compute nothing, don't count."""
    containers = nn.ModuleList.__module__
    for cls in type(module).__mro__:
        home = cls.__module__
        is_of_torch = home.startswith("torch.nn.modules.")
        if is_of_torch and home != containers and cls is not nn.Module:
            return True
    return False


def _accounts_for(old: Any, new: Any, widths: WidthChanges, taken: set[Taken], cuts: Cuts) -> bool:
    """Whether cuts make an int, or the ints of a list, change like this.

    Args:
        old, new: the values, of one kind and length.
        widths: (width, new width) of the weights at and below the module.
        taken: what the cuts take of these.
        cuts: all cuts; `taken` has their indices.
    """
    # An int is treated as a list of one.
    is_list = isinstance(old, (list, tuple))
    olds = tuple(old) if is_list else (old,)
    news = tuple(new) if is_list else (new,)
    for before, after in zip(olds, news, strict=True):
        if before == after or (before, after) in widths:
            continue
        if after not in _numbers_after(before, taken, cuts):
            # A list may also be the lengths of parts that lie side by side on one axis.
            return news in _parts_after(olds, taken, cuts)
    return True


def _by_step(taken: set[Taken], cuts: Cuts) -> Iterator[list[tuple[RecordedCut, int]]]:
    """For every step that takes something, (cut, positions) of all that it takes."""
    # The cuts are in the order of their steps, so the cuts of one step stand together.
    pairs = [(cuts[i], positions) for i, positions in sorted(taken)]
    for _, step in groupby(pairs, key=_step_of):
        yield list(step)


def _step_of(pair: tuple[RecordedCut, int]) -> int:
    cut, _ = pair
    return cut.step


def _numbers_after(number: int, taken: set[Taken], cuts: Cuts) -> set[int]:
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
                    share = before // cut.size
                    after_step.add(share * cut.kept)
        # A number need not count what this step cuts, so those from before stay possible.
        numbers |= after_step
    return numbers


def _is_counted(number: int, cut: RecordedCut, positions: int, widths: set[int]) -> bool:
    """Whether a number counts something that every ZIG of a cut has an equal whole share of.

    Args:
        positions: how many positions one ZIG has.
        widths: how many positions one ZIG has in each cut of the step. A number among these is the width of a ZIG, and
            stays.
    """
    share, rest = divmod(number, cut.size)
    if rest or not share:
        return False
    counts_zigs_or_positions = share in (1, positions)
    if counts_zigs_or_positions:
        return True
    counts_something_between = positions % share == 0
    return counts_something_between and number not in widths


def _parts_after(parts: tuple[int, ...], taken: set[Taken], cuts: Cuts) -> set[tuple[int, ...]]:
    """What the lengths of parts that lie side by side on one axis may be after the cuts.

    Worked example: the parts (1, 3) of 4 heads, of which heads 0, 1 and 3 stay, become (1, 2).
    """
    possible = {parts}
    for step in _by_step(taken, cuts):
        for before in list(possible):
            for cut, positions in step:
                for unit in {1, positions}:  # lengths may be counted in ZIGs or in positions
                    after = _parts_after_cut(before, cut, unit)
                    if after is not None:
                        possible.add(after)
    return possible


def _parts_after_cut(parts: tuple[int, ...], cut: RecordedCut, unit: int) -> tuple[int, ...] | None:
    """The lengths of parts after a cut whose ZIGs have `unit` places each; None if the parts aren't made of these."""
    ends = list(accumulate(parts))
    if ends[-1] != cut.size * unit:
        return None
    kept_ends = [0]
    for end in ends:
        number_before, rest = divmod(end, unit)
        if rest:
            return None
        bits_before = (1 << number_before) - 1  # of the ZIGs before this end
        kept_before = (cut.bits & bits_before).bit_count()
        kept_ends.append(unit * kept_before)
    return tuple(stop - start for start, stop in pairwise(kept_ends))


# Records of other classes, and of cuts in a row


def _translated(model: PreTrainedModel, record: Record, partly: bool) -> Record:
    """The record in the paths of `model`, which may be the base model of the recorded one, or have another head.

    Args:
        partly: leave out what `model` does not have, as `from_pretrained` leaves out its weights.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    known = modules.keys() | named_tensors(model).keys()
    names = _names_in(record)
    if not partly and names <= known:
        return record
    new_names = _new_names(model, names, known, partly)
    if partly:
        absent = {name for name in names if new_names[name] is None}
        _check_readers(model, record, absent)
    new_modules = {}
    for path, entry in record["modules"].items():
        if new_names[path] is not None:
            new_modules[new_names[path]] = entry
    has_none = bool(record["modules"]) and not new_modules
    require(not has_none, f"{type(model).__name__} has none of its modules")
    number, new_number = len(record["modules"]), len(new_modules)
    if new_number < number:
        logger.info("%s uses %d of the %d compact modules", type(model).__name__, new_number, number)
    new_cuts = []
    for cut in record["cuts"]:
        members = _renamed(cut["members"], new_names)
        scales = _renamed(cut["scales"], new_names)
        if members:
            new_cuts.append(cut | {"members": members, "scales": scales})
    return sealed(record | {"modules": new_modules, "cuts": new_cuts})


def _names_in(record: Record) -> set[str]:
    """The modules and weights that a record names."""
    names = set(record["modules"])
    for cut in record["cuts"]:
        for part in ("members", "scales"):
            names.update(name for name, *_ in cut[part])
    return names


def _new_names(model: PreTrainedModel, names: set[str], known: set[str], partly: bool) -> dict[str, str | None]:
    """Name in the record -> name in the model, None if the model lacks it.

    Worked example: in a model with a head, all names in the body begin with "body."; in the body alone, no name does.

    Args:
        names: the modules and weights that the record names.
        known: those of the model.
        partly: give None for what is not known, instead of a name that `restore_` refuses.
    """
    body = model.base_model_prefix
    model_has_head = model.base_model is not model
    in_body = [name for name in names if _is_in_body(name, body)]
    # Without a prefix there is no body that could stand alone.
    record_has_head = bool(body and in_body)
    new_names: dict[str, str | None] = {}
    for name in names:
        new_name: str | None = name
        if record_has_head and not model_has_head:
            new_name = _without_body(name, body)
        elif model_has_head and not record_has_head:
            with_body = _label(body, name).removesuffix(".")
            # Where the model has both names, a record of another class means the body.
            if with_body in known and (partly or name not in known):
                new_name = with_body
        if partly and new_name not in known:
            new_name = None
        new_names[name] = new_name
    return new_names


def _is_in_body(name: str, body: str) -> bool:
    return f"{name}.".startswith(f"{body}.")


def _without_body(name: str, body: str) -> str | None:
    if not _is_in_body(name, body):
        return None
    return name.removeprefix(body).removeprefix(".")


def _renamed(entries: list[list[Any]], new_names: Mapping[str, str | None]) -> list[list[Any]]:
    """Members or scales of a cut under new names, without those that the model lacks."""
    renamed = []
    for name, *rest in entries:
        new_name = new_names[name]
        if new_name is not None:
            renamed.append([new_name, *rest])
    return renamed


def _check_readers(model: PreTrainedModel, record: Record, absent: set[str]) -> None:
    """Refuses a record for a model that has weights of its own, where those would read what was cut.

    Args:
        absent: the modules and weights that the record names and the model lacks.
    """
    body = model.base_model_prefix
    model_has_head = model.base_model is not model
    names = [name for name, _ in model.named_parameters()]
    has_own_weights = any(not name.startswith(f"{body}.") for name in names)
    if not (model_has_head and has_own_weights):
        return
    lost = _readers(record, absent)
    fact = f"{type(model).__name__} has no {lost} but other weights, and what those would read is narrow"
    require(not lost, f"{fact}: save hf_oto.to_dense(model) and load that, or prune with protect={lost}")


def _readers(record: Record, absent: set[str]) -> list[str]:
    """The weights that a model lacks and that share a cut axis with weights that it has.

    Args:
        absent: the modules and weights that the model lacks.
    """
    shared: set[str] = set()
    named: set[str] = set()
    for cut in record["cuts"]:
        members = {name for name, *_ in cut["members"]}
        named |= members
        has_some = bool(members - absent)
        if has_some:
            shared |= members & absent
    for path in absent & record["modules"].keys():
        shapes = record["modules"][path].get("shapes", {})
        for name, shape in shapes.items():
            label = _label(path, name)
            # A cut weight that no cut names is tied: the cut knows it by its other name.
            if any(shape) and label not in named:
                shared.add(label)
    return sorted(shared)


def _merged(old: Record, new: Record) -> Record:
    """One record for two cuts in a row: the later sizes count, the cuts follow each other."""
    modules = copy.deepcopy(old["modules"])
    for path, entry in new["modules"].items():
        merged = modules.setdefault(path, {})
        attributes = merged.setdefault("attributes", {})
        attributes.update(entry.get("attributes", {}))
        shapes = merged.setdefault("shapes", {})
        for name, shape in entry.get("shapes", {}).items():
            earlier = shapes.get(name, [None] * len(shape))
            shapes[name] = _filled(shape, earlier)
    cuts = [*old["cuts"], *new["cuts"]]
    return new | {"modules": modules, "cuts": cuts}


# The class


def _shared_variable() -> ContextVar[frozenset[str]]:
    """One variable for all copies of this file: hf_oto's own and those that came with checkpoints."""
    if "_oto_building" not in vars(PreTrainedModel):
        nothing: frozenset[str] = frozenset()
        PreTrainedModel._oto_building = ContextVar("oto_building", default=nothing)
    return PreTrainedModel._oto_building


BUILDING = _shared_variable()  # digests of the records whose models this thread is building now


def _has_record(config: PreTrainedConfig) -> bool:
    return "oto" in vars(config)


def asks_for_compact(config: PreTrainedConfig) -> bool:
    """Whether a model built from this config is compact: the config has a record, and it is not an outer model's.

    Sub-models are built from the config of the model they are part of, or from a copy of it, but the paths in the
    record are those of the outermost model. While the outermost model is built, `BUILDING` has the record's digest.
    """
    if not _has_record(config):
        return False
    if not isinstance(config.oto, dict):
        return True  # so that the record is refused
    digest = config.oto.get("sha256")
    # What is no string may have no hash, and a set can't be asked for it.
    is_of_outer_model = isinstance(digest, str) and digest in BUILDING.get()
    return not is_of_outer_model


def finish_loading(finish: Callable[..., Any], model: PreTrainedModel, load_config: Any, loading_info: Any) -> Any:
    """Transformers' `_finalize_model_loading`, but no weight that contradicts the record is initialised anew.

    With `ignore_mismatched_sizes=True` Transformers would initialise it anew, as it initialises a new head.

    Args:
        finish: the `_finalize_model_loading` that would run without us.
        model, load_config, loading_info: its arguments.

    Raises:
        OTOError: weights have other sizes than the record says. Or the record says nothing of weights that have other
            sizes than the stock model's, and `ignore_mismatched_sizes` is False.
    """
    for part in model.modules():
        if _is_built_by_record(part):
            _mark_loaded_modules_(part, part.config.oto)
    if not _is_built_by_record(model):
        return finish(model, load_config, loading_info)
    _check_loaded_shapes(model.config.oto, loading_info.mismatched_keys)
    try:
        return finish(model, load_config, loading_info)
    except RuntimeError as error:
        is_about_weights = loading_info.mismatched_keys or loading_info.conversion_errors or loading_info.error_msgs
        if not is_about_weights:
            raise
        names = sorted(key for key, *_ in loading_info.mismatched_keys)
        fact = f"the weights do not fit what config.json and its hf_oto record say of {short(names)}"
        raise OTOError(f"{fact}: {error}") from error


def _is_built_by_record(module: nn.Module) -> bool:
    return is_compact(type(module)) and _has_record(module.config)


def _check_loaded_shapes(record: Record, mismatched_keys: Iterable[tuple[str, Any, Any]]) -> None:
    """Checks that weights whose shape is another one in the checkpoint have the sizes of the record.

    Args:
        mismatched_keys: (name, shape in the checkpoint, shape in the model) of these weights.
    """
    for key, saved, built in sorted(mismatched_keys):
        path, _, name = key.rpartition(".")
        entry = record["modules"].get(path, {})
        shapes = entry.get("shapes", {})
        recorded = shapes.get(name, [])
        # Sizes of which the record says nothing are Transformers' own business: those of a new head, say.
        fits = True
        for size, saved_size in zip(recorded, saved, strict=False):
            fits = fits and size in (None, saved_size)
        fact = f"{key} has shape {tuple(saved)} in the checkpoint, {tuple(built)} by the record: not its weights"
        require(fits, fact)


def _mark_loaded_modules_(model: PreTrainedModel, record: Record) -> None:
    """Lets Transformers initialise no module with something cut in it, where all its tensors have been loaded.

    Transformers would call `_init_weights` on such a module, and only then see, tensor by tensor, that nothing is to
    be written. Some models compute in `_init_weights` with sizes of the config, which don't fit what was cut. All
    other modules are initialised as ever: `_init_weights` may draw random numbers, and a new head has to get the same
    weights as on the stock model.
    """
    touched: set[str] = set()  # modules with something cut at or below them
    for path, entry in record["modules"].items():
        if entry.get("shapes"):
            touched.add(path)
            touched.update(_modules_of(path))
    for path, module in model.named_modules():
        if path not in touched:
            continue
        tensors = [*module.parameters(), *module.buffers()]
        are_loaded = all(getattr(tensor, "_is_hf_initialized", False) for tensor in tensors)
        if tensors and are_loaded:
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
        # Sub-models find the digest, and leave the record to this model.
        building = BUILDING.get() | {record["sha256"]}
        token = BUILDING.set(building)
        try:
            super().__init__(config, *args, **kwargs)
        finally:
            BUILDING.reset(token)
        name = self._oto_stock.__name__
        is_of_other_class = bool(config.architectures) and name not in config.architectures
        translated = _translated(self, record, partly=is_of_other_class)
        # A model that is saved has to name its own class, and the paths of that class.
        if translated is not record or config.architectures != [name]:
            _replace_config_(self, {"oto": translated, "architectures": [name]})
        restore_(self, translated)

    @classmethod
    def _finalize_model_loading(cls, *args: Any) -> Any:
        finish = super()._finalize_model_loading
        return finish_loading(finish, *args)

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """`PreTrainedModel.save_pretrained`, and beside the weights the code that `trust_remote_code=True` needs."""
        stock = self._oto_stock
        custom = _custom_classes(stock, self.config)
        can_travel = _is_in_transformers(stock) or bool(custom)
        # An adapter is saved without the weights that the record describes.
        is_adapter_alone = self._hf_peft_config_loaded
        if _has_record(self.config) and can_travel and not is_adapter_alone:
            auto_map = _auto_map(stock, self.config)
            for auto, name in custom.items():
                auto_map[auto] = f"{_custom_name(stock)}.{name}"
            self.config.auto_map = auto_map
            if self.should_save_on_this_rank(is_main_process):
                _save_code(self, Path(save_directory), custom)
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)

    def _get_files_timestamps(self, working_dir: str | os.PathLike) -> dict[str, float]:
        """The times of the files in a folder, without ours, so that a push always uploads ours.

        `save_pretrained(push_to_hub=True)` uploads files that are newer than their time here, or that have none.
        """
        timestamps = dict(super()._get_files_timestamps(working_dir))
        timestamps.pop(FILE_NAME, None)
        timestamps.pop(f"{_custom_name(self._oto_stock)}.py", None)
        return timestamps

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoModel") -> None:
        """Does nothing: Auto classes call it on code from a checkpoint, which would then be saved as custom code."""

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        """Pickles as (stock class, state): the compact class itself cannot be found by name."""
        is_users_subclass = type(self) is not compact_class(self._oto_stock)  # which has a name
        if is_users_subclass:
            return super().__reduce_ex__(protocol)
        # From protocol 2 on the result is (function, arguments, state, ...).
        protocol = max(protocol, 2)
        _, _, *state = super().__reduce_ex__(protocol)
        return _blank, (self._oto_stock,), *state


# Cached, because two classes for one stock class would not be the same type.
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
    bases: list[type] = [CompactMixin, stock]
    if issubclass(stock, GenerationMixin):
        # Auto classes look for it among the direct bases of code from a checkpoint, and add it otherwise.
        bases.append(GenerationMixin)
    namespace = {
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
        "_oto_stock": stock,
    }
    return type(stock.__name__, tuple(bases), namespace)


def is_compact(cls: type) -> bool:
    """Whether `cls` is a compact class, made by this copy of the file or by one that came with a checkpoint."""
    return hasattr(cls, "_oto_stock")


def become_compact_(model: PreTrainedModel, record: Record) -> PreTrainedModel:
    """Makes a model that has been cut an instance of its compact class; earlier cuts stay in its record.

    Args:
        model: the cut model: its attributes and shapes are those of the record already.
        record: what was cut now, as described at the top of this file; its digest is made here.

    Raises:
        OTOError: the record is malformed or does not describe the model.
    """
    if _has_record(model.config):
        record = _merged(model.config.oto, record)
    record = sealed(record)
    validate(record)
    for change in _changes(model, record):
        # The model has the sizes of the record already.
        is_cut = change.old == change.new
        require(is_cut, f"{change.label} is {change.old}, the record has {change.new}")
    _try_on_stock(model, record)
    model.config.oto = record
    model.__class__ = compact_class(type(model))
    model.config.architectures = [model._oto_stock.__name__]  # the class that the paths belong to
    return model


def _try_on_stock(model: PreTrainedModel, record: Record) -> None:
    """Warns where the stock model, built here without weights, can't take the record: nothing saved would load.

    That happens where the model was changed by hand, so that its config doesn't say how to build it.
    """
    # A constructor may write to its config.
    config = copy.deepcopy(model.config)
    vars(config).pop("oto", None)
    stock = compact_class(type(model))._oto_stock
    try:
        with torch.device("meta"):
            full_model = stock(config)
            restore_(full_model, record)
    except Exception as error:  # a constructor may raise anything
        fact = "what it saves can't be loaded, because its config alone doesn't build it"
        logger.warning("%s: %s (%s); keep the full model's checkpoint", stock.__name__, fact, error)


def _blank(stock: type[PreTrainedModel]) -> PreTrainedModel:
    """An uninitialised compact model, for pickle and deepcopy to fill."""
    cls = compact_class(stock)
    return object.__new__(cls)


def _replace_config_(model: PreTrainedModel, values: Mapping[str, Any]) -> None:
    """Gives a model, and the parts that share its config, a copy of that config with other values.

    The given config is never written to: other models, in other threads too, may be built from it.
    """
    given = model.config
    own = copy.copy(given)
    for name, value in values.items():
        setattr(own, name, value)
    for module in model.modules():
        # A list, because the loop writes to these attributes.
        attributes = list(vars(module).items())
        for name, value in attributes:
            if value is given:
                setattr(module, name, own)


# The code beside the weights


def _save_code(model: PreTrainedModel, folder: Path, custom: Mapping[str, str]) -> None:
    """Writes this file, and for custom code also the file of the stock class and one that makes its classes compact.

    Args:
        custom: what `_custom_classes` gives.
    """
    stock = model._oto_stock
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(__file__, folder / FILE_NAME)
    if custom:
        custom_object_save(model, folder)
        class_names = sorted(set(custom.values()))
        code = _custom_code(stock, class_names)
        path = folder / f"{_custom_name(stock)}.py"
        path.write_text(code)


def _is_in_transformers(stock: type[PreTrainedModel]) -> bool:
    return getattr(transformers, stock.__name__, None) is stock


def _auto_map(stock: type[PreTrainedModel], config: PreTrainedConfig) -> dict[str, str]:
    """{"AutoModelFor...": "modeling_oto.Class"} for every Auto class that knows the config.

    The class is `stock` where the Auto class can choose it, else the family's class for that task, so that the body
    can be loaded alone or under another head. Entries that the config has already and that are not ours
    ("[repo--]modeling_oto.Class") stay.
    """
    prefix = f"{Path(FILE_NAME).stem}."
    entries: dict[str, str] = {}
    for auto_name, reference in _auto_map_of(config).items():
        if not _without_repo(reference).startswith(prefix):
            entries[auto_name] = reference
    for auto in vars(modeling_auto).values():
        if not isinstance(auto, type):
            continue
        mapping = vars(auto).get("_model_mapping")
        if mapping is None or type(config) not in mapping:
            continue
        choices = mapping[type(config)]
        # Some configs have several classes for one task.
        if not isinstance(choices, (list, tuple)):
            choices = [choices]
        chosen = stock if stock in choices else choices[0]
        if _is_in_transformers(chosen) and chosen.config_class is type(config):
            entries[auto.__name__] = f"{prefix}{chosen.__name__}"
    return entries


def _auto_map_of(config: PreTrainedConfig) -> dict[str, Any]:
    # config.json may have null there.
    return vars(config).get("auto_map") or {}


def _without_repo(reference: Any) -> str:
    """The "module.Class" of "[repo--]module.Class"."""
    return str(reference).split("--")[-1]


def _custom_classes(stock: type[PreTrainedModel], config: PreTrainedConfig) -> dict[str, str]:
    """{"AutoModelFor...": name} of the models in the file of `stock`, where checkpoints bring that file along.

    Empty for a class of Transformers, for one that no Auto class knows, and for one that no file defines.
    """
    home = sys.modules.get(stock.__module__)
    # No checkpoint can bring along what was defined in a script or a notebook.
    is_in_main = stock.__module__ == "__main__"
    has_file = not is_in_main and getattr(home, "__file__", None)
    if _is_in_transformers(stock) or not has_file:
        return {}
    classes: dict[str, str] = {}
    if stock._auto_class is not None:
        classes[stock._auto_class] = stock.__name__
    # A checkpoint saved by us refers to the second, one saved by others to the first.
    files = (_file_stem(stock), _custom_name(stock))
    for auto, reference in _auto_map_of(config).items():
        module, _, name = _without_repo(reference).partition(".")
        cls = vars(home).get(name)
        is_model = isinstance(cls, type) and issubclass(cls, PreTrainedModel)
        if is_model and module in files:
            classes[auto] = name
    return classes


def _file_stem(stock: type[PreTrainedModel]) -> str:
    """The name of the file of a class, without ".py"."""
    return stock.__module__.rpartition(".")[2]


def _custom_name(stock: type[PreTrainedModel]) -> str:
    """The name of the module that makes the classes beside `stock` compact."""
    return f"compact_{_file_stem(stock)}"


def _custom_code(stock: type[PreTrainedModel], names: list[str]) -> str:
    """The text of the module `_custom_name`.

    Its imports are plain lines, because Transformers looks for those to copy the files.
    """
    home = _file_stem(stock)
    ours = Path(FILE_NAME).stem
    lines = [f'"""The classes of {home}.py with the widths of the record in config.json; written by hf_oto."""', ""]
    for name in names:
        lines.append(f"from .{home} import {name} as Stock{name}")
    lines += [f"from .{ours} import compact_class", ""]
    for name in names:
        lines.append(f"{name} = compact_class(Stock{name})")
    return "\n".join(lines) + "\n"
