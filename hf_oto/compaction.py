"""A cut that is kept: all that has been cut out of a model, in one step or in several, and the record of it.

A model that shrinks while it trains is cut several times. All its cuts together are one cut of the dense model, with
one plan and with one record in the config. From that record `from_pretrained` builds the compact model.

Worked example: of 8 ZIGs of Linear(3, 8), ReLU, Linear(8, 2) the first cut takes 1 and 3, and the second 4. After the
first cut 6 ZIGs are left. Number 4 of the dense model is then number 2 of `left`, and the cut takes row 2 of 0.weight.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from torch import nn
from transformers import PreTrainedModel

from .calls import outermost_pretrained
from .cut import Cut, Trial, cut_, grow_, resolve, scale_factors
from .evaluating import renew_caches_
from .modeling_oto import VERSION, become_compact_, named_tensors, sizes_of
from .remaining import partition_left
from .restore import restored
from .zigs import Member, PrunableAxis, PruningPlan, ZIGPartition

SizeKey = tuple[str, str, str]  # module path, "attributes" or "shapes", name of the attribute or tensor
SizeOfKey = Mapping[SizeKey, Any]
OURS_IN_CONFIG = ("oto", "auto_map", "architectures")  # what cutting and saving a compact model write into a config

logger = logging.getLogger(__name__)


def compact(model: nn.Module, partition: ZIGPartition, plan: PruningPlan) -> nn.Module:
    """Cuts out what `plan` removes, in place; the output equals that of the model with those ZIGs zeroed.

    A Transformers model, also one inside another module, becomes an instance of a subclass of its class. The subclass
    has the same name and saves the widths in `config.oto`, where `from_pretrained` reads them. Every model that is
    built from this config object has these widths, too: for a dense twin copy the config before the cut. (OTOv2, arXiv
    2303.06862, Sec. 3.3)

    Tensors are cut one by one: the peak of the memory is the model and the largest tensor.

    Args:
        model: the model the partition was made for.
        partition: its ZIGs.
        plan: kept positions per axis.

    Returns:
        the same model object.

    Raises:
        ValueError: the plan doesn't fit the partition.
        OTOError: the model isn't the one the partition was made for.

    Example:
        >>> import torch
        >>> from hf_oto import partition_zigs
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> partition = partition_zigs(model, {"input": torch.ones(1, 3)})
        >>> compact(model, partition, PruningPlan({"0.weight[0]": [0, 2, 5]}))[0]
        Linear(in_features=3, out_features=3, bias=True)
    """
    partition.tensors(model)  # raises where the model is another one
    compaction = Compaction(model, partition)
    cut = compaction.resolve(plan)
    if not cut.removed.any():
        logger.warning("the plan removes nothing of %s, which stays as it is", type(model).__name__)
    compaction.keep_(model, cut)
    return model


class Compaction:
    """What has been cut out of a model so far.

    Attributes:
        partition: the ZIGs of the dense model.
        gone: which of them have been cut out, bool (num_zigs,).
    """

    def __init__(self, model: nn.Module, partition: ZIGPartition) -> None:
        """Takes a model as it is before its first cut."""
        self.partition = partition
        self.gone = np.zeros(partition.num_zigs, bool)
        self._dense: dict[str, _Dense] = {}  # path of a Transformers model in the model -> what it was
        for path, part in outermost_pretrained(model).items():
            self._dense[path] = _dense(part)

    @functools.cached_property
    def left(self) -> ZIGPartition:
        """The ZIGs of the model as it is now."""
        return partition_left(self.partition, self.gone)

    def resolve(self, plan: PruningPlan, warn: bool = True) -> Cut:
        """Decides what of a plan for the dense model can be cut out now; see `hf_oto.cut.resolve`.

        Returns:
            a cut of the model as it is now. What is gone already doesn't come back, whatever the plan says.
        """
        cut_of_dense = resolve(self.partition, plan, warn, self.gone)
        removed = cut_of_dense.removed[~self.gone]  # (ZIGs left,)
        # earlier cuts have scaled the parameters already, for what went then
        scales = scale_factors(self.left, removed)
        return Cut(self.left, removed, cut_of_dense.attributes, scales)

    def gone_after(self, removed: np.ndarray) -> np.ndarray:
        """All ZIGs of the dense model that are gone after one more cut, bool (num_zigs,).

        Args:
            removed: which ZIGs of `left` that cut removes, bool (ZIGs left,).
        """
        gone = self.gone.copy()
        gone[~gone] = removed
        return gone

    def plan(self, zeros: PruningPlan) -> PruningPlan:
        """The plan for the dense model that removes what is gone, and more of what is left.

        Args:
            zeros: a plan for `left`.
        """
        removed = self.gone_after(zeros.removed(self.left))
        return PruningPlan.removing(removed, self.partition)

    def keep_(self, model: nn.Module, cut: Cut) -> None:
        """Cuts a model in place: its tensors, sizes and caches, its class and the record in its config; see `compact`.

        Args:
            model: the model from which this compaction was made, after the cuts so far.
            cut: a cut of `left`.
        """
        if not cut.removed.any():
            return
        parts = outermost_pretrained(model)
        # the sizes of this moment, not those before training, because a forward may have set others meanwhile
        sizes_before = {path: _sizes(part) for path, part in parts.items()}
        cut_(model, cut)
        renew_caches_(model)
        gone = self.gone_after(cut.removed)
        self._set_gone(gone)
        for path, part in parts.items():
            sizes_now = _sizes(part)
            self._dense[path].note_changes(sizes_before[path], sizes_now)
            self._record_(part, path)

    def _set_gone(self, gone: np.ndarray) -> None:
        self.gone = gone
        vars(self).pop("left", None)  # the cached partition is of the model before

    def _record_(self, part: PreTrainedModel, path: str) -> None:
        """Writes one record of all cuts into a config, and gives the model its compact class."""
        dense = self._dense[path]
        # a model that was compact before training gets its own record back, which the new one then continues
        dense.put_back_config_(part)
        prefix = f"{path}." if path else ""
        record = _record(part, self.partition, self.gone, dense.sizes, prefix)
        if record["cuts"]:
            become_compact_(part, record)

    def whole_cut(self) -> Cut:
        """All that is gone, as one cut of the dense model."""
        plan = PruningPlan.removing(self.gone, self.partition)
        return resolve(self.partition, plan, warn=False, gone=self.gone)

    def trial_dense(self, model: nn.Module) -> Trial:
        """While it is open, the model has its dense sizes again, with zeros in the place of what is gone."""
        whole_cut = self.whole_cut()

        def change(model: nn.Module) -> None:
            grow_(model, whole_cut)

        return Trial(model, change)

    def undo_(self, model: nn.Module) -> None:
        """Makes the model dense again, in place, with zeros in the place of what is gone."""
        if not self.gone.any():
            return
        whole_cut = self.whole_cut()
        grow_(model, whole_cut)
        renew_caches_(model)
        for path, part in outermost_pretrained(model).items():
            dense = self._dense[path]
            dense.put_back_config_(part)
            part.__class__ = dense.cls
            dense.sizes.clear()
        nothing = np.zeros_like(self.gone)
        self._set_gone(nothing)


class _Dense(NamedTuple):
    """What a Transformers model was before the first cut."""

    cls: type[PreTrainedModel]
    config_values: dict[str, Any]  # the values that its config had under the names in `OURS_IN_CONFIG`
    sizes: dict[SizeKey, Any]  # the sizes that cuts have changed, as they were before

    def note_changes(self, before: SizeOfKey, after: SizeOfKey) -> None:
        """Notes the sizes that a cut has changed. A size that an earlier cut has changed is noted already."""
        for key, size in before.items():
            if after.get(key, size) != size:
                self.sizes.setdefault(key, size)

    def put_back_config_(self, part: PreTrainedModel) -> None:
        """Gives the config of a model the values that it had before the first cut."""
        values = vars(part.config)
        for name in OURS_IN_CONFIG:
            values.pop(name, None)
        before = copy.deepcopy(self.config_values)  # a copy, because this may happen again after the next cut
        values.update(before)


def _dense(part: PreTrainedModel) -> _Dense:
    """What a Transformers model is now, before its first cut."""
    values = vars(part.config)
    config_values = {}
    for name in OURS_IN_CONFIG:
        if name in values:
            config_values[name] = copy.deepcopy(values[name])
    return _Dense(type(part), config_values, sizes={})


@contextlib.contextmanager
def trial_compact(model: nn.Module, cut: Cut) -> Iterator[None]:
    """While open, the model is what `compact` makes of it, with the class and the config of a compact model.

    Args:
        cut: a cut of the dense model.
    """
    classes = {part: type(part) for part in outermost_pretrained(model).values()}
    compaction = Compaction(model, cut.partition)
    with restored(model):
        try:
            compaction.keep_(model, cut)
            yield
        finally:
            # `restored` puts back what a module keeps, but not the class of the module
            for part, cls in classes.items():
                part.__class__ = cls


# the record ----------------------------------------------------------------------------------------


def _sizes(model: nn.Module) -> SizeOfKey:
    """All sizes and shapes that a model's modules have. What is tied stands under each of its names.

    (Each name counts, because `from_pretrained` applies the record before it ties the weights.)
    """
    sizes: dict[SizeKey, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, value in sizes_of(module).items():
            sizes[path, "attributes", name] = value
    for name, tensor in named_tensors(model).items():
        path, _, leaf = name.rpartition(".")
        sizes[path, "shapes", leaf] = tensor.shape
    return sizes


def _record(
    model: PreTrainedModel, partition: ZIGPartition, gone: np.ndarray, sizes_before: SizeOfKey, prefix: str
) -> dict[str, Any]:
    """What modeling_oto.py needs to build the compact model from a stock one, and `to_dense` to undo the cut.

    Args:
        partition: the ZIGs of the model before the cut.
        gone: which of them have been cut out, bool (num_zigs,).
        sizes_before: the sizes that the cut has changed, as they were before; see `_sizes`.
        prefix: what the names of this model's parameters begin with in the model that was cut.
    """
    modules = _recorded_sizes(model, sizes_before)
    earlier_record = vars(model.config).get("oto", {"cuts": []})
    earlier_steps = [cut["step"] for cut in earlier_record["cuts"]]
    last_step = max(earlier_steps, default=-1)
    step = last_step + 1
    cuts = []
    for axis, removed in partition.split(gone):
        members = _recorded_members(axis, prefix)
        if not (removed.any() and members):
            continue
        # one bit a ZIG, the first one lowest: the record stays short for wide axes
        kept_bytes = np.packbits(~removed, bitorder="little").tobytes()
        kept_bits = int.from_bytes(kept_bytes, "little")
        cut = {
            "step": step,
            "size": axis.size,
            "kept": f"{kept_bits:x}",
            "members": members,
            "scales": _recorded_scales(axis, prefix),
        }
        cuts.append(cut)
    return {"version": VERSION, "modules": modules, "cuts": cuts}


def _recorded_sizes(model: nn.Module, sizes_before: SizeOfKey) -> dict[str, Any]:
    """Module path -> "attributes" or "shapes" -> name -> value, for the sizes that the cut has changed."""
    modules: dict[str, Any] = {}
    for key, now in _sizes(model).items():
        before = sizes_before.get(key, now)
        if now == before:
            continue
        path, part, name = key
        value = list(now) if isinstance(now, (list, tuple)) else now
        if part == "shapes":
            # None for a dimension that stays
            value = [n if n != old else None for n, old in zip(now, before, strict=True)]
        sizes_of_module = modules.setdefault(path, {})
        sizes_of_part = sizes_of_module.setdefault(part, {})
        sizes_of_part[name] = value
    return modules


def _recorded_scales(axis: PrunableAxis, prefix: str) -> list[list[Any]]:
    """[parameter, numerator and denominator of the power, offset] for every parameter of the model that is scaled."""
    scales = []
    for scale in axis.scales:
        if scale.param.startswith(prefix):
            name = scale.param.removeprefix(prefix)
            numerator, denominator = scale.power.as_integer_ratio()  # JSON has no fractions
            scales.append([name, numerator, denominator, scale.offset])
    return scales


def _recorded_members(axis: PrunableAxis, prefix: str) -> list[list[Any]]:
    """[parameter, dimension, whether `to_dense` fills it with anything but zeros, positions] for every member."""
    members = []
    for member in axis.members:
        if not member.param.startswith(prefix):
            continue
        name = member.param.removeprefix(prefix)
        is_never_zero = int(member.role == "statistic")  # a variance, or the direction of a weight
        positions = _recorded_positions(member)
        members.append([name, member.dim, is_never_zero, *positions])
    return members


def _recorded_positions(member: Member) -> list[Any]:
    """The three numbers of an even stride, or one list of positions."""
    if member.index is None:
        return [member.start, member.outer, member.inner]
    return [member.index.tolist()]
