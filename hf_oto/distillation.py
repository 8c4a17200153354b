"""Distillation: the model learns from a teacher's logits, too (Hinton et al., arXiv 1503.02531).

`Distilling` is a part of `OTOMixin`. While the trainer computes its own loss, a hook notes the calls of the model. The
teacher answers the same calls, and where its logits differ from the model's (divergence.py), that is a part of the
loss. Nothing else in a run knows of the teacher.

Worked example: two classes, temperature 2, weight 0.7. The model's logits are (0, 0), the teacher's (2, 0). At this
temperature they say (0.5, 0.5) and (0.73, 0.27), of which the KL divergence is 0.11. So the loss is 0.3 times the
trainer's own loss, plus 0.7 * 2^2 * 0.11.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import types
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from transformers import PreTrainedModel

from .arguments import check_distillation, setting
from .calls import device_of, refuse_sharded
from .divergence import compared, comparison, labels_in
from .evaluating import take_off_autocast_
from .flat import make_whole_
from .modeling_oto import OTOError, named_tensors
from .wide import is_foreign

DENSE = "dense"  # stands for a copy of the model as it is when training begins
OF_THE_LOSS = ("labels", "shift_labels", "num_items_in_batch")  # arguments of a model that its logits don't depend on
NO_LOGITS = (
    "the loss of {trainer} calls its model without computing logits that have a gradient{returned}, and a teacher is "
    "compared by `logits`. Losses that are fused with the last layer, as those of TRL's SFTTrainer and of Liger "
    "kernels, compute none, and embedding models have none. Ways out: class Own(SFTTrainer): compute_loss = "
    "transformers.Trainer.compute_loss, and OTOMixin before Own; use_liger_kernel=False; or no teacher="
)


# the teacher ---------------------------------------------------------------------------------------


class Call(NamedTuple):
    """A call of the model that has logits, with a gradient."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    logits: Tensor


def logits_of(output: Any) -> Tensor | None:
    """The logits in what a model returns: by their name, or the first tensor of a tuple that is no single number."""
    if isinstance(output, Mapping):
        return output.get("logits")
    parts = output if isinstance(output, (tuple, list)) else [output]
    for part in parts:
        if isinstance(part, Tensor) and part.is_floating_point() and part.dim() > 1:
            return part
    return None


class Noted(NamedTuple):
    """What a loss does with the model."""

    calls: list[Call]  # those whose logits have a gradient
    names: list[str]  # of what the other calls return


@contextlib.contextmanager
def noted_calls(model: nn.Module) -> Iterator[Noted]:
    """While open, notes the calls of the model."""
    noted = Noted([], [])

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        logits = logits_of(output)
        if logits is not None and logits.requires_grad:
            noted.calls.append(Call(args, kwargs, logits))
        elif isinstance(output, Mapping):
            noted.names.extend(output)

    handle = model.register_forward_hook(note, with_kwargs=True)
    try:
        yield noted
    finally:
        handle.remove()


@dataclass(frozen=True)
class Teacher:
    """A model that is asked for logits, and that stays as it is.

    It is no attribute of the trainer itself: what looks through a trainer's modules does not meet it.
    """

    module: nn.Module

    @torch.no_grad()
    def logits(self, call: Call, label_names: Collection[str]) -> Tensor:
        """Its logits for a call of the model, in eval mode, on the model's device.

        Args:
            label_names: arguments that it is not given where it can do without.
        """
        device = call.logits.device
        home = device_of(self.module)
        # a teacher that somebody has spread over several devices moves its inputs itself
        if home is not None and home != device:
            self.module.to(device)
        kwargs = self._arguments(call.kwargs, label_names)
        modes = {module: module.training for module in self.module.modules()}
        if any(modes.values()):
            self.module.eval()
        try:
            output = self.module(*call.args, **kwargs)
        finally:
            if any(modes.values()):
                for module, training in modes.items():  # the outer ones come first, as `train` changes inner ones too
                    module.train(training)
        logits = logits_of(output)
        if logits is None:
            raise OTOError(f"the teacher, {type(self.module).__name__}, returns no logits")
        return logits.to(device)

    def _arguments(self, kwargs: Mapping[str, Any], label_names: Collection[str]) -> dict[str, Any]:
        """The arguments of the model's call that it takes, without labels where it can do without."""
        parameters = inspect.signature(self.module.forward).parameters
        takes_all = any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        dtypes = [p.dtype for p in self.module.parameters() if p.is_floating_point()]
        taken: dict[str, Any] = {}
        for name, value in kwargs.items():
            is_needed = name in parameters and parameters[name].default is inspect.Parameter.empty
            if name in {*OF_THE_LOSS, *label_names} and not is_needed and not self._decodes(name, kwargs):
                continue
            if name not in parameters and not takes_all:
                continue
            is_float = isinstance(value, Tensor) and value.is_floating_point()
            taken[name] = value.to(dtypes[0]) if is_float and dtypes else value
        if "use_cache" in parameters:
            taken["use_cache"] = False  # nothing is generated
        return taken

    def _decodes(self, name: str, kwargs: Mapping[str, Any]) -> bool:
        """Whether the inputs of a decoder are made from this argument."""
        config = vars(self.module).get("config")
        reads_labels = getattr(config, "is_encoder_decoder", False)
        given = {"decoder_input_ids", "decoder_inputs_embeds"} & kwargs.keys()
        return name == "labels" and reads_labels and not given


def copied(model: nn.Module) -> nn.Module:
    """A copy that runs none of the model's own layers, whatever has been put in the place of their forward."""
    copies: dict[int, Any] = {}  # id of an object -> its copy
    made = copy.deepcopy(model, copies)
    take_off_autocast_(made)  # an evaluation may have put it on
    for module in made.modules():
        if "forward" in vars(module):
            module.forward = _rebound(vars(module)["forward"], copies)
    return made


def _rebound(value: Any, copies: dict[int, Any]) -> Any:
    """A function with copies in the place of the modules that it was made around; `deepcopy` leaves functions alone.

    Args:
        copies: id of an object -> its copy.
    """
    if isinstance(value, nn.Module) or id(value) in copies:
        return copies.get(id(value), value)
    if isinstance(value, types.MethodType):
        return types.MethodType(_rebound(value.__func__, copies), _rebound(value.__self__, copies))
    if not isinstance(value, types.FunctionType) or not value.__closure__:
        return value
    cells = tuple(types.CellType() for _ in value.__closure__)
    made = types.FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
    made.__kwdefaults__ = value.__kwdefaults__
    vars(made).update(vars(value))
    copies[id(value)] = made  # a function may be in its own closure
    for cell, before in zip(cells, value.__closure__, strict=True):
        with contextlib.suppress(ValueError):  # of a variable that nothing was assigned to yet
            cell.cell_contents = _rebound(before.cell_contents, copies)
    return made


def _memory_of(tensor: Tensor) -> tuple[Any, ...]:
    """What tensors have in common that share memory."""
    if is_foreign(tensor) or tensor.layout != torch.strided or tensor.untyped_storage().data_ptr() == 0:
        return (id(tensor),)
    return tensor.device, tensor.untyped_storage().data_ptr()


def refuse_shared(teacher: nn.Module, model: nn.Module) -> None:
    """Raises OTOError where the teacher would change while the model trains."""
    if teacher is model:
        raise OTOError("the teacher is the model that is trained: teacher='dense' makes a copy of it")
    trained = {_memory_of(tensor): name for name, tensor in named_tensors(model).items()}
    for name, tensor in named_tensors(teacher).items():
        name_in_model = trained.get(_memory_of(tensor))
        if name_in_model is not None and tensor.numel():
            raise OTOError(
                f"{name} of the teacher is {name_in_model} of the model that is trained: load the teacher once more, "
                "or pass copy.deepcopy(teacher)"
            )


def refuse_other_order(teacher: nn.Module, model: nn.Module) -> None:
    """Raises OTOError where both name their classes and have them in another order."""
    names = [getattr(vars(module).get("config"), "id2label", None) or {} for module in (teacher, model)]
    of_teacher, of_model = ([str(name) for _, name in sorted(of.items())] for of in names)
    if of_teacher != of_model and sorted(of_teacher) == sorted(of_model):
        raise OTOError(
            f"the classes of the teacher are {of_teacher} and those of the model {of_model} (config.id2label): load "
            "one of them with the order of the other"
        )


@contextlib.contextmanager
def _refusing_to_run(model: nn.Module) -> Iterator[None]:
    """While open, OTOError where a layer of the model runs: a teacher may hold on to the model in ways of its own."""

    def refuse(*_: Any) -> None:
        raise OTOError(
            "the teacher runs layers of the model that is trained, which it must have kept: load a teacher that has "
            "layers of its own"
        )

    layers = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]
    handles = [layer.register_forward_pre_hook(refuse) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# the trainer ---------------------------------------------------------------------------------------


class Distilling:
    """The part of `OTOMixin` that asks a teacher.

    The loss of training is (1 - w) times the trainer's own loss plus w * T^2 times the KL divergence of the model's
    classes from the teacher's at temperature T, over the labels that the trainer's own loss counts. Here w is the
    argument `distillation_weight` and T the `distillation_temperature`. Numbers (one logit, or float labels) are
    compared by squared differences instead, and several yes-or-no labels by the divergence of each. What `evaluate`
    returns is the trainer's own loss.

    Args:
        teacher (`PreTrainedModel`, `nn.Module` or `"dense"`, *optional*):
            A model with as many logits, of any architecture (Hinton et al., arXiv 1503.02531). It computes in eval
            mode, and nothing of it changes, except that it is moved to the device of the training. Every rank has it
            whole, under FSDP2 and ZeRO, too. `"dense"` is a copy of the model as it is when `train()` begins, before
            a checkpoint is loaded: for a model that has learned the task before, since one whose weights are random
            teaches nothing.

    Raises:
        ValueError: `teacher` is no model and not `"dense"`.
        OTOError: the teacher shares weights with the model, has another number of logits, or the loss of the trainer
            calls its model without computing logits.
    """

    def __init__(self, *args: Any, teacher: nn.Module | str | None = None, **kwargs: Any) -> None:
        if not (teacher is None or isinstance(teacher, nn.Module) or (isinstance(teacher, str) and teacher == DENSE)):
            raise ValueError(
                f"teacher is {teacher!r}: it must be a model, or {DENSE!r} for a copy of the one to train"
            )
        self._teacher = Teacher(teacher) if isinstance(teacher, nn.Module) else None
        self._teacher_is_a_copy = isinstance(teacher, str)
        self._copied_model: nn.Module | None = None  # the model that the teacher is a copy of
        self._has_answered = False  # whether the teacher has been asked since training began
        self._has_asked = False  # whether the loss of this step was ours
        self.is_in_train = False  # `Trainer` sets it itself, but only after it has called `model_init` once
        super().__init__(*args, **kwargs)
        if self._teacher is not None:
            if self.is_deepspeed_enabled:
                make_whole_(self._teacher.module)  # from_pretrained has divided it, too, if ZeRO-3 is to divide models
            refuse_shared(self._teacher.module, self.model)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`, with a teacher that is there before a checkpoint is loaded."""
        if self.model_init is None:
            self._begin_teaching(self.model)
        output = super().train(*args, **kwargs)
        if self._teacher_is_a_copy:
            self._teacher = self._copied_model = None  # its memory is free for what comes after the last step
        return output

    def call_model_init(self, *args: Any, **kwargs: Any) -> nn.Module:
        """`Trainer`'s; every training begins with another model then, of which there may be a copy."""
        model = super().call_model_init(*args, **kwargs)
        if self.is_in_train:
            self._begin_teaching(model)
        return model

    def _begin_teaching(self, model: nn.Module) -> None:
        """Looks at the settings and copies the model, if a copy is to be the teacher and isn't there yet."""
        if self._teacher is None and not self._teacher_is_a_copy:
            return
        self._weight_and_temperature()  # raises
        if self.args.n_gpu > 1:
            raise OTOError("DataParallel has no teacher: start one process per card (torchrun), or show one card only")
        self._has_answered = False
        if self._teacher_is_a_copy:
            # after an interruption the weights are others, but the teacher stays: what resumes is the same run
            if self._copied_model is not model:
                self._teacher = Teacher(self._copied(model))
                self._copied_model = model
        else:
            refuse_shared(self._teacher.module, model)
            refuse_other_order(self._teacher.module, model)

    def _copied(self, model: nn.Module) -> nn.Module:
        """A copy that doesn't train, the same on all ranks."""
        refuse_sharded(model, "teacher='dense' can't copy it; pass a model of its own as the teacher")
        made = copied(model)
        made.requires_grad_(False).eval()
        if self.accelerator.num_processes > 1:
            made.to(self.args.device)
            # ranks may begin with other weights, until DDP or FSDP2 makes them alike
            for tensor in [*made.parameters(), *made.buffers()]:
                tensor.data.copy_(broadcast(tensor.data.contiguous()))
        return made

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainer`'s; a loss that ignores the teacher is an error."""
        self._has_asked = False
        loss = super().training_step(*args, **kwargs)
        if self._teacher is not None and not self._has_asked:
            raise OTOError(
                f"compute_loss of {type(self).__name__} goes past the one of OTOMixin, which asks the teacher: let it "
                "call super().compute_loss, or define it in a class behind OTOMixin"
            )
        return loss

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """`Trainer`'s; while training with a teacher, its logits have a part in the loss."""
        if self._teacher is None or not (model.training and torch.is_grad_enabled()):
            return super().compute_loss(model, inputs, *args, **kwargs)
        self._has_asked = True
        weight, temperature = self._weight_and_temperature()
        if weight == 0:
            return super().compute_loss(model, inputs, *args, **kwargs)
        given = dict(inputs) if isinstance(inputs, Mapping) else {}  # before trainers take out what is theirs
        with noted_calls(model) as noted:
            computed = super().compute_loss(model, inputs, *args, **kwargs)
        if not noted.calls:
            returned = f" (it returns {', '.join(noted.names)})" if noted.names else ""
            raise OTOError(NO_LOGITS.format(trainer=type(self).__name__, returned=returned))
        num_items = kwargs.get("num_items_in_batch", args[1] if len(args) > 1 else None)
        parts = [self._compared_with_teacher(call, given, num_items, temperature) for call in noted.calls]
        part = torch.stack(parts).mean()
        if isinstance(computed, tuple):
            loss, outputs = computed
            return (1 - weight) * loss + weight * part, outputs
        return (1 - weight) * computed + weight * part

    def _compared_with_teacher(
        self, call: Call, given: Mapping[str, Any], num_items: Any, temperature: float
    ) -> Tensor:
        """How far the logits of a call are from the teacher's, one number, scaled as the trainer's own loss is."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        with contextlib.nullcontext() if self._has_answered else _refusing_to_run(model), self.accelerator.autocast():
            of_teacher = self._teacher.logits(call, self.label_names)
        self._has_answered = True
        if call.logits.shape != of_teacher.shape:
            raise OTOError(
                f"the model has {call.logits.shape[-1]} logits, {tuple(call.logits.shape)}, and the teacher "
                f"{of_teacher.shape[-1]}, {tuple(of_teacher.shape)}: they can be compared one by one only. Around the "
                "teacher put a module that returns the logits of the model's classes"
            )
        inputs = {**given, **call.kwargs}
        labels = labels_in(inputs, [*self.label_names, "labels"])
        positions = compared(call.logits.shape[:-1], inputs, labels, self._loss_shifts_labels)
        if positions is None:
            shapes = {name: tuple(value.shape) for name, value in inputs.items() if isinstance(value, Tensor)}
            raise OTOError(
                f"nothing says which positions of the logits, {tuple(call.logits.shape)}, count: their last axis has "
                f"to be the classes, with a label, or an attention_mask, for every position, and there are {shapes}"
            )
        positions = positions.to(call.logits.device)
        problem = getattr(vars(model).get("config"), "problem_type", None)
        compare = comparison(call.logits, labels, problem)
        dtype = torch.promote_types(call.logits.dtype, torch.float32)  # half precision is too coarse for a sum
        values = compare(call.logits[positions].to(dtype), of_teacher[positions].to(dtype), temperature)
        return self._scaled(values, num_items)

    def _scaled(self, values: Tensor, num_items: Any) -> Tensor:
        """The mean of values, scaled as `training_step` expects it of a loss.

        Where `Trainer` counts the labels of all batches that are accumulated, a loss is a sum divided by their number.
        Elsewhere it is the mean over one batch, which `training_step` divides by the number of the batches.
        """
        mean = values.sum() / max(1, values.numel())
        is_scaled = self.loss_is_scaled_for_ga
        if is_scaled is None:
            divides = self.model_accepts_loss_kwargs and num_items is not None
            is_scaled = divides or self.compute_loss_func is not None
        if not is_scaled:
            return mean
        if num_items is None:
            return mean / self.current_gradient_accumulation_steps
        part = values.sum() / torch.as_tensor(num_items, device=values.device)
        if self.args.average_tokens_across_devices:  # the labels of all ranks were counted, and DDP averages
            part = part * self.accelerator.num_processes
        return part

    def _weight_and_temperature(self) -> tuple[float, float]:
        weight, temperature = (setting(self.args, f"distillation_{name}") for name in ("weight", "temperature"))
        check_distillation(weight, temperature)  # a search sets arguments that nobody else has looked at
        return weight, temperature

    def _described_teacher(self) -> str:
        """The teacher in words; empty if there is none."""
        if self._teacher_is_a_copy:
            return f"a copy of the model as it was before training (`teacher={DENSE!r}`)"
        if self._teacher is None:
            return ""
        module = self._teacher.module
        name = module.name_or_path if isinstance(module, PreTrainedModel) else ""
        return f"{name}, " * bool(name) + f"a {type(module).__name__}"
