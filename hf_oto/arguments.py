"""Training arguments: what to prune, and any Trainer's own."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from transformers import (
    Seq2SeqTrainingArguments,
    TrainingArguments,
)

from .targets import check_limits, check_patterns, the_target

TARGETS = ("target_group_sparsity", "target_params", "target_macs", "target_per_axis")
# beginnings of the names of arguments that are about the machine, the files or the Hub, not about the training
OF_THE_PLACE = tuple("output_ log report_ run_ save_ hub_ push_ disable_ debug accelerator_ use_cpu".split())
# shown in any case, since a run can't be made again without them
ALWAYS_SHOWN = {"learning_rate", "max_steps", "per_device_train_batch_size", "seed"}


@dataclass
class OTOArguments:
    """What to prune. Inherit from it before any class of training arguments, as from `OTOMixin` before any trainer:
    `@dataclass class MyArguments(OTOArguments, SomeTrainingArguments): pass`.

    Args:
        target_group_sparsity (`float`, *optional*):
            Fraction of the ZIGs, in [0, 1), that is removed by the end of training: 0.5, unless one of the other
            targets is given.
        target_params (`float`, *optional*):
            Instead: fraction of the parameters, in (0, 1], that is left in the end.
        target_macs (`float`, *optional*):
            Instead: fraction of the multiply-accumulates, in (0, 1], that is left in the end.
        target_per_axis (`dict[str, float]` or JSON, *optional*):
            Instead: fraction of the ZIGs of each axis that is removed, by regular expression on the name of the axis
            in the printed partition. An axis whose name none of them matches stays whole.
        pruning_mode (`str`, *optional*, defaults to `"scheduled"`):
            `"scheduled"` reaches the target whatever the learning rate; `"paper"` is OTOv2's own update
            (arXiv 2303.06862), which reaches it only if the learning rate and the number of steps allow.
        pruning_window (`list[float]`, *optional*):
            First and last moment of pruning as fractions of the optimizer steps (scheduled mode): (0.1, 0.6), or
            (0.1, 0.25) where at most a fifth is left.
        min_keep (`float`, *optional*, defaults to 0.1):
            Fraction of every axis, in [0, 1) and at least one ZIG, that is never removed (scheduled mode).
        group_divisible (`int`, *optional*):
            What is left of every axis is a multiple of this, in channels or units (scheduled mode): 8 for widths from
            64 on, 1 for others.
        uniform (`bool`, *optional*, defaults to `False`):
            Layers whose width is one number of the stock config keep equal widths, and layers whose width is no such
            number stay whole. So the compact model is a stock one, with other numbers and no record (scheduled mode).
        shrink (`bool`, *optional*, defaults to `True`):
            Whether ZIGs are cut out as soon as they are zero, so that the rest of the run trains a smaller model; else
            they are cut out at the end. Callbacks that keep copies of weights need an `on_compact` method for that
            (see `OTOMixin`).
        protect (`list[str]`, *optional*):
            Regular expressions. A parameter is not pruned if one of them matches anywhere in its name, or in the name
            of a module that the parameter is in.
        distillation_weight (`float`, *optional*, defaults to 0.7):
            The teacher's part of the loss, in [0, 1], if the trainer has a `teacher`; the trainer's own loss has the
            rest (arXiv 1503.02531, section 2).
        distillation_temperature (`float`, *optional*, defaults to 2.0):
            Above 0: the logits of the model and of the teacher are divided by it before they are compared. The higher
            it is, the more the classes count that the teacher thinks unlikely (arXiv 1503.02531, section 2).

    Raises:
        ValueError: an argument is out of range or no regular expression, or several targets are given.
    """

    target_group_sparsity: float | None = field(
        default=None, metadata={"help": "Fraction of ZIGs to remove, in [0, 1); 0.5 if no target is given."}
    )
    target_params: float | None = field(default=None, metadata={"help": "Fraction of the parameters to keep."})
    target_macs: float | None = field(default=None, metadata={"help": "Fraction of the MACs to keep."})
    target_per_axis: dict | str | None = field(
        default=None, metadata={"help": "Fractions of ZIGs to remove, by regular expression on the axis, as JSON."}
    )
    pruning_mode: str = field(default="scheduled", metadata={"help": "scheduled or paper."})
    pruning_window: list[float] | None = field(
        default=None, metadata={"help": "Pruning starts and ends at these fractions of the steps."}
    )
    min_keep: float = field(default=0.1, metadata={"help": "Fraction of every axis that always stays, in [0, 1)."})
    group_divisible: int | None = field(
        default=None, metadata={"help": "What stays of an axis is a multiple of this."}
    )
    uniform: bool = field(default=False, metadata={"help": "Widths that a stock config can say, equal for layers."})
    shrink: bool = field(default=True, metadata={"help": "Cut zeros out while training, not only at its end."})
    protect: list[str] = field(default_factory=list, metadata={"help": "Regular expressions of names not to prune."})
    distillation_weight: float = field(default=0.7, metadata={"help": "The teacher's part of the loss, in [0, 1]."})
    distillation_temperature: float = field(
        default=2.0, metadata={"help": "Logits are divided by it before they are compared with the teacher's."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.target_per_axis, str):  # from a command line
            self.target_per_axis = _parsed("target_per_axis", self.target_per_axis)
        super().__post_init__()
        self._check()

    def _check(self) -> None:
        """Raises ValueError, with name and value, if an argument of ours makes no sense."""
        targets = {name: vars(self)[name] for name in TARGETS}
        the_target(targets)  # raises
        if self.pruning_mode not in ("scheduled", "paper"):
            raise ValueError(f"pruning_mode is {self.pruning_mode!r}: it must be 'scheduled' or 'paper'")
        if self.pruning_mode == "paper" and self.uniform:
            raise ValueError("uniform is True: pruning_mode='paper' knows no equal widths, use 'scheduled'")
        given_targets = [name for name in TARGETS if vars(self)[name] is not None]
        if self.pruning_mode == "paper" and given_targets not in ([], ["target_group_sparsity"]):
            raise ValueError(
                f"{given_targets[0]} is given: pruning_mode='paper' knows target_group_sparsity alone, "
                "use it or 'scheduled'"
            )
        window = self.pruning_window
        is_pair = isinstance(window, Sequence) and len(window) == 2
        if window is not None and not (is_pair and 0 <= window[0] < window[1] <= 1):
            raise ValueError(f"pruning_window is {window}: it must be two fractions of the run, 0 <= start < end <= 1")
        check_limits(self.min_keep, self.group_divisible)
        if isinstance(self.protect, str):  # its letters would each be taken for an expression
            raise ValueError(f"protect is {self.protect!r}: it must be a list of regular expressions")
        check_patterns("protect", self.protect or ())
        check_distillation(self.distillation_weight, self.distillation_temperature)


def check_distillation(weight: float, temperature: float) -> None:
    """Raises ValueError if the teacher's part of the loss or the temperature is out of range."""
    if not 0 <= weight <= 1:
        raise ValueError(f"distillation_weight is {weight}: it must be in [0, 1]")
    if not 0 < temperature < math.inf:
        raise ValueError(f"distillation_temperature is {temperature}: it must be a number above 0")


def _parsed(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is {text!r}, which is no JSON: {error}") from error


def _default(argument: Field) -> Any:
    """The value of an argument that nobody gives."""
    if argument.default_factory is MISSING:
        return argument.default
    return argument.default_factory()


# the empty tuple in the place of an empty list, as the values are shared
DEFAULTS = {each.name: () if each.default is MISSING else each.default for each in fields(OTOArguments)}


@dataclass
class OTOTrainingArguments(OTOArguments, TrainingArguments):
    """`TrainingArguments` and what to prune; see `OTOArguments`. With plain `TrainingArguments` the defaults hold."""


@dataclass
class OTOSeq2SeqTrainingArguments(OTOArguments, Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` and what to prune; see `OTOArguments`."""


def as_code(args: TrainingArguments, max_steps: int, also: Collection[str] = ()) -> str:
    """The arguments that make another run the same, as code: ALWAYS_SHOWN, and what differs from its default.

    Args:
        also: the names of other arguments that are shown in any case, if there are such.
    """
    values = args.to_dict() | {"max_steps": max_steps}
    shown = {name: setting(args, name) for name in TARGETS if setting(args, name) is not None}
    if isinstance(args, OTOArguments):  # a Trainer's own arguments have no field for the default target
        kind, target = the_target(shown)
        shown = {kind: target}
    for argument in fields(args):
        name = argument.name
        default = _default(argument)
        value = values.get(name, default)  # to_dict leaves out what is no data
        # None, False and an empty list mean the same
        differs = value != default and (value or default)
        is_of_training = not name.startswith(OF_THE_PLACE)
        if (differs and is_of_training) or name in ALWAYS_SHOWN or name in also:
            shown[name] = value
    lines = "".join(f"    {name}={value!r},\n" for name, value in shown.items())
    return f'{type(args).__name__}(\n    "out",\n{lines})'


def setting(args: TrainingArguments, name: str) -> Any:
    """An argument of ours; its default where the arguments are a Trainer's own."""
    return vars(args).get(name, DEFAULTS[name])
