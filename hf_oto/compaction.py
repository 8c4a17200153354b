"""A cut that is kept: what has been cut out of a model so far, in one step or in several, and the record of it.

A model that shrinks while it trains is cut several times. All its cuts together are one cut of the dense model: they
have one plan and one record in the config, by which `from_pretrained` builds the compact model.

Worked example: of 8 ZIGs of Linear(3, 8), ReLU, Linear(8, 2) the first cut takes 1 and 3, and the second 4. After the
first cut 6 ZIGs are left. Number 4 of the dense model is then number 2 of `left`, and the cut takes row 2 of 0.weight.
"""

from __future__ import annotations

import contextlib
import copy
import functools
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
from .zigs import PrunableAxis, PruningPlan, ZIGPartition


def compact(model: nn.Module, partition: ZIGPartition, plan: PruningPlan) -> nn.Module:
    """Cuts out what `plan` removes, in place; the output equals that of the model with those ZIGs zeroed.

    A Transformers model, and every one inside another module, becomes an instance of a subclass of its own class and
    name that saves its widths in `config.oto`; `from_pretrained` reads them, and so does whatever is built from this
    config object: for a dense twin copy it before. (OTOv2, arXiv 2303.06862, Sec. 3.3)

    Tensors are cut one by one: the peak is the model and the largest of them.

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
    compaction.keep_(model, compaction.resolve(plan))
    return model


OURS_IN_CONFIG = ("oto", "auto_map", "architectures")  # what cutting and saving a compact model write into a config


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
            values = vars(part.config)
            ours = {name: copy.deepcopy(values[name]) for name in OURS_IN_CONFIG if name in values}
            self._dense[path] = _Dense(type(part), ours, {})

    @functools.cached_property
    def left(self) -> ZIGPartition:
        """The ZIGs of the model as it is now."""
        return partition_left(self.partition, self.gone)

    def resolve(self, plan: PruningPlan, warn: bool = True) -> Cut:
        """Decides what of a plan for the dense model can be cut out now; see `hf_oto.cut.resolve`.

        Returns:
            a cut of the model as it is now. What is gone already doesn't come back, whatever the plan says.
        """
        whole = resolve(self.partition, plan, warn, self.gone)
        removed = whole.removed[~self.gone]
        return Cut(self.left, removed, whole.attributes, scale_factors(self.left, removed))

    def plan(self, model: nn.Module) -> PruningPlan:
        """The plan for the dense model that removes what is gone, and every ZIG that is exactly zero."""
        removed = self.gone.copy()
        removed[~self.gone] = PruningPlan.from_zeros(model, self.left).removed(self.left)
        return PruningPlan.removing(removed, self.partition)

    def keep_(self, model: nn.Module, cut: Cut) -> None:
        """Cuts tensors, sizes and caches, class and record of the config, in place; see `compact`.

        Args:
            model: the model that was given at first, as it is after the cuts so far.
            cut: of `left`.
        """
        if not cut.removed.any():
            return
        parts = outermost_pretrained(model)
        # not those at the beginning of training: a forward may set sizes, too
        sizes_before = {path: _sizes(part) for path, part in parts.items()}
        cut_(model, cut)
        renew_caches_(model)
        gone = self.gone.copy()
        gone[~self.gone] = cut.removed
        self.gone = gone
        vars(self).pop("left", None)  # it is another one now
        for path, part in parts.items():
            self._dense[path].note_changes(sizes_before[path], _sizes(part))
            self._record_(part, path)

    def _record_(self, part: PreTrainedModel, path: str) -> None:
        """Writes one record of all cuts into a config, and gives the model its compact class."""
        dense = self._dense[path]
        dense.put_back_config_(part)  # the model may have been compact before training: its record is continued
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
        return Trial(model, lambda model: grow_(model, whole_cut))

    def undo_(self, model: nn.Module) -> None:
        """Makes the model dense again, in place, with zeros in the place of what is gone."""
        if not self.gone.any():
            return
        grow_(model, self.whole_cut())
        renew_caches_(model)
        for path, part in outermost_pretrained(model).items():
            dense = self._dense[path]
            dense.put_back_config_(part)
            part.__class__ = dense.cls
            dense.sizes.clear()
        self.gone = np.zeros_like(self.gone)
        vars(self).pop("left", None)


class _Dense(NamedTuple):
    """A Transformers model before the first cut."""

    cls: type[PreTrainedModel]
    config_values: dict[str, Any]  # of `OURS_IN_CONFIG`, those that the config had
    sizes: dict[SizeKey, Any]  # those that cuts have changed, as they were before

    def note_changes(self, before: Mapping[SizeKey, Any], after: Mapping[SizeKey, Any]) -> None:
        """Notes what a cut has changed; what an earlier cut has changed is noted already."""
        for key, size in before.items():
            if after.get(key, size) != size:
                self.sizes.setdefault(key, size)

    def put_back_config_(self, part: PreTrainedModel) -> None:
        for name in OURS_IN_CONFIG:
            vars(part.config).pop(name, None)
        vars(part.config).update(copy.deepcopy(self.config_values))


@contextlib.contextmanager
def trial_compact(model: nn.Module, cut: Cut) -> Iterator[None]:
    """While open, the model is what `compact` makes of it, class and config too.

    Args:
        cut: of the dense model.
    """
    classes = {part: type(part) for part in outermost_pretrained(model).values()}
    with restored(model):
        try:
            Compaction(model, cut.partition).keep_(model, cut)
            yield
        finally:
            for part, cls in classes.items():
                part.__class__ = cls


# the record ----------------------------------------------------------------------------------------

SizeKey = tuple[str, str, str]  # module path, "attributes" or "shapes", name of the attribute or tensor


def _sizes(model: nn.Module) -> dict[SizeKey, Any]:
    """All sizes and shapes that a model's modules have, under every name that something tied has.

    (A model is built, and its record restored, before its weights are tied.)
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
    model: PreTrainedModel, partition: ZIGPartition, gone: np.ndarray, sizes_before: Mapping[SizeKey, Any], prefix: str
) -> dict[str, Any]:
    """What modeling_oto.py needs to build the compact model from a stock one, and `to_dense` to undo the cut.

    Args:
        partition: of the model before the cut.
        gone: which of its ZIGs have been cut out, bool (num_zigs,).
        sizes_before: of what `_sizes` finds, all that was changed by the cut, as it was before.
        prefix: of the names of its parameters in the model that was cut.
    """
    modules: dict[str, dict[str, dict[str, Any]]] = {}
    for key, now in _sizes(model).items():
        before = sizes_before.get(key, now)
        if now == before:
            continue
        path, part, name = key
        value = list(now) if isinstance(now, (list, tuple)) else now
        if part == "shapes":  # None for a dimension that stays
            value = [n if n != old else None for n, old in zip(now, before, strict=True)]
        modules.setdefault(path, {}).setdefault(part, {})[name] = value

    earlier_cuts = vars(model.config).get("oto", {"cuts": []})["cuts"]
    step = max((earlier["step"] for earlier in earlier_cuts), default=-1) + 1
    cuts = []
    for axis, removed in partition.split(gone):
        members = _recorded_members(axis, prefix)
        if not (removed.any() and members):
            continue
        kept_bits = int.from_bytes(np.packbits(~removed, bitorder="little").tobytes(), "little")
        scales = []
        for scale in axis.scales:
            if scale.param.startswith(prefix):
                scales.append([scale.param.removeprefix(prefix), *scale.power.as_integer_ratio(), scale.offset])
        cuts.append({"step": step, "size": axis.size, "kept": f"{kept_bits:x}", "members": members, "scales": scales})
    return {"version": VERSION, "modules": modules, "cuts": cuts}


def _recorded_members(axis: PrunableAxis, prefix: str) -> list[list[Any]]:
    """[parameter, dimension, whether a cut position is filled in again with something else than zero, positions]."""
    members = []
    for m in axis.members:
        if m.param.startswith(prefix):
            is_never_zero = int(m.role == "statistic")  # a variance, or the direction of a weight
            positions = [m.start, m.outer, m.inner] if m.index is None else [m.index.tolist()]
            members.append([m.param.removeprefix(prefix), m.dim, is_never_zero, *positions])
    return members
