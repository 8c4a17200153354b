"""The calls of the model's forward, traced: every ATen call with the tensors that it took and the layer it ran in.

All calls are traced together, in eval mode and in train mode, so that one algebra unites all that they say. During the
trace the sizes that modules keep as numbers are tagged (tagging.py).
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from .calls import Forward, described, outermost_pretrained, raise_if_out_of_memory, tensors_of
from .evaluating import WeightsKept, enter_mode_, evaluating
from .fakes import Fakes
from .modeling_oto import OTOError, named_tensors
from .sizes import Equation, Ref
from .tagging import Tagger, mapped, tag_

logger = logging.getLogger(__name__)


TensorFunction = Callable[[torch.Tensor], torch.Tensor]


class Call(NamedTuple):
    """One ATen call; in args and kwargs a `Ref` stands for every tensor."""

    op: torch._ops.OpOverload | OpaqueOp
    args: tuple
    kwargs: dict[str, Any]
    outs: tuple[Ref, ...]
    layer: str

    @property
    def name(self) -> str:
        """The name of the operator without namespace and overload: aten::add_.Tensor -> add."""
        name = self.op._schema.name.split("::")[1]
        is_in_place = name.endswith("_") and not name.endswith("__")
        return name[:-1] if is_in_place else name

    @property
    def refs(self) -> list[Ref]:
        """The tensors that it takes, in order."""
        refs = list(_refs_in(self.args))
        refs += _refs_in(self.kwargs.values())
        return refs

    @property
    def given(self) -> dict[str, Any]:
        """Every argument by its name, in the order of the schema, with defaults for those left out."""
        parameters = self.op._schema.arguments
        names = [parameter.name for parameter in parameters]
        # fewer arguments than names: some are left out, or given by name
        passed = dict(zip(names, self.args, strict=False))
        passed |= self.kwargs
        given = {}
        for parameter in parameters:
            name = parameter.name
            given[name] = passed.get(name, parameter.default_value)
        return given


def _refs_in(values: Iterable[Any]) -> Iterator[Ref]:
    for value in values:
        if isinstance(value, Ref):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _refs_in(value)


class Schema(NamedTuple):
    """What ATen's schemas say, for an operator that has none."""

    name: str
    arguments: tuple = ()
    returns: tuple = ()
    is_mutable: bool = False


class OpaqueOp:
    """An operator above ATen, such as flex attention, of which only the tensors that it takes and gives are known."""

    tags: tuple = ()

    def __init__(self, op: HigherOrderOperator) -> None:
        self._schema = Schema(f"higher_order::{op.name()}")


class Trace(NamedTuple):
    """What all the forwards did.

    Attributes:
        calls: the ATen calls in order, those of eval mode first.
        evaluated: the number of calls of eval mode.
        sources: every parameter and persistent buffer, by its (first) name.
        parameters: the names in `sources` that are names of parameters.
        returned: the tensors that the model returned, by mode (training or not).
        equations: the equations that hold between sizes.
        in_hand: path of a module -> the numbers of the tensors that its forward had in hand: what it computed, and
            what the modules that it called took and gave.
        fake: the modes that were traced (training or not) -> whether on FakeTensors.
    """

    calls: list[Call]
    evaluated: int
    sources: dict[str, Ref]
    parameters: set[str]
    returned: dict[bool, list[Ref]]
    equations: list[Equation]
    in_hand: dict[str, set[int]]
    fake: dict[bool, bool]

    @property
    def outputs(self) -> list[Ref]:
        """The tensors that the model returned, in any mode."""
        outputs = []
        for refs in self.returned.values():
            outputs += refs
        return outputs


# recording -----------------------------------------------------------------------------------------


class _Recorder(TorchDispatchMode):
    """Gives every tensor a number and writes down every ATen call.

    Tensors are told apart by their `id`; those with a number are kept alive, so that no other tensor gets their `id`.
    """

    def __init__(self, paths: Mapping[nn.Module, str]) -> None:
        super().__init__()
        self.supports_higher_order_operators = True
        self.calls: list[Call] = []
        self.layers = [""]  # paths of the modules that run now, the innermost last
        self.in_hand: dict[str, set[int]] = {}
        self.count = 0
        self._paths = paths
        self._number: dict[int, int] = {}  # id of a tensor -> its number
        self._alive: list[torch.Tensor] = []

    def ref(self, tensor: torch.Tensor) -> Ref:
        """The number of a tensor; a tensor without a number gets a new one."""
        number = self._number.get(id(tensor))
        if number is None:
            return self.add(tensor)
        return Ref(number, tuple(tensor.shape))

    def add(self, tensor: torch.Tensor) -> Ref:
        """A new number for a tensor: a tensor that has been written to is another value from then on."""
        if tensor.is_nested:
            raise OTOError(f"nested tensors, here in {self.layers[-1] or 'forward'}, have no shape to trace")
        return self.name(tensor, self.new(tensor.shape))

    def new(self, shape: Sequence[int]) -> Ref:
        """A number that no tensor has yet."""
        self.count += 1
        return Ref(self.count - 1, tuple(shape))

    def name(self, tensor: torch.Tensor, ref: Ref) -> Ref:
        """Says which number a tensor stands for."""
        self._number[id(tensor)] = ref.value
        # a tensor that is freed would leave its id to another one
        self._alive.append(tensor)
        return ref

    def known(self, tensors: Sequence[torch.Tensor]) -> set[int]:
        """The numbers of those tensors that have one."""
        return {self._number[id(tensor)] for tensor in tensors if id(tensor) in self._number}

    @contextlib.contextmanager
    def watching_layers(self) -> Iterator[None]:
        """While open, the modules that run say where a call is made, and what their forwards have in hand."""
        own_thread = threading.get_ident()  # torch calls these hooks in all threads

        def note(tensors: Any) -> None:
            caller = self.layers[-1]
            in_hand_of_caller = self.in_hand.setdefault(caller, set())
            numbers = self.known(tensors_of(tensors))
            in_hand_of_caller.update(numbers)

        def enter(module: nn.Module, args: Any) -> None:
            if threading.get_ident() == own_thread:
                note(args)
                # A module that is registered nowhere counts to the module that calls it.
                path = self._paths.get(module, self.layers[-1])
                self.layers.append(path)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if threading.get_ident() == own_thread:
                self.layers.pop()
                note(output)

        before = nn.modules.module.register_module_forward_pre_hook(enter)
        # after an error, too: a model may catch it and go on, and `layers` must be right then
        after = nn.modules.module.register_module_forward_hook(leave, always_call=True)
        with before, after:
            yield

    def _ref_of_tensor(self, leaf: Any) -> Any:
        return self.ref(leaf) if isinstance(leaf, torch.Tensor) else leaf

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # The arguments are numbered before the call: what is written to has the old number as an argument.
        refs = mapped((args, kwargs), self._ref_of_tensor)
        out = func(*args, **kwargs)
        outs = tuple(self.add(tensor) for tensor in tree_iter(out) if isinstance(tensor, torch.Tensor))
        layer = self.layers[-1]
        is_item = func is torch.ops.aten._local_scalar_dense.default  # `.item()` returns no tensor, but reads one
        if isinstance(func, HigherOrderOperator):
            inputs = tuple(ref for ref in tree_iter(refs) if isinstance(ref, Ref))
            call = Call(OpaqueOp(func), inputs, {}, outs, layer)
            self.calls.append(call)
        elif outs or is_item:
            call = Call(func, *refs, outs, layer)
            self.calls.append(call)
        return out


# preparing the model -------------------------------------------------------------------------------


def experts_at_once_(model: nn.Module) -> None:
    """Lets experts run as one batched product, in place. The shapes of this implementation don't depend on data."""
    for module in outermost_pretrained(model).values():
        module.set_experts_implementation("batched_mm")


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that a checkpoint holds, by name."""
    persistent: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                full_name = f"{path}.{name}" if path else name
                persistent[full_name] = buffer
    return persistent


# tracing -------------------------------------------------------------------------------------------


def trace(
    model: nn.Module, forwards: Sequence[Forward], fake: bool = True, modes: Sequence[bool] = (False, True)
) -> Trace:
    """Makes the calls in eval mode, then in train mode without dropout, and records them.

    The model runs on FakeTensors, which take no memory and no arithmetic. If that fails, it runs with its weights.

    Args:
        model: any module, which may be on the meta device; it stays as it is.
        fake: whether to try FakeTensors.
        modes: eval mode (False) first, then train mode (True).

    Raises:
        OTOError: the model can't take the calls in eval mode. (Calls that fail in train mode only are left out:
            labels may be missing, say.)

    Example:
        >>> traced = trace(nn.Linear(3, 8), [Forward(args=(torch.ones(2, 3),))], modes=[False])
        >>> for call in traced.calls[-2:]:  # what comes before copies the input
        ...     print(call.name, [ref.shape for ref in call.refs], "->", call.outs[0].shape)
        t [(8, 3)] -> (3, 8)
        addmm [(8,), (2, 3), (3, 8)] -> (2, 8)
    """
    runs = _Runs(model, forwards, fake)
    fake_of_mode: dict[bool, bool] = {}  # of the modes that could be traced
    returned: dict[bool, list[Ref]] = {}
    evaluated = 0
    for training in modes:
        for on_fakes in runs.ways:
            mark = runs.mark()
            try:
                returned[training] = runs.run(training, on_fakes)
            except Exception as error:  # data-dependent branches and exotic kernels don't run on FakeTensors
                raise_if_out_of_memory(error)
                problem = error
                runs.forget_since(mark)
                first_line = str(error).split("\n")[0]
                logger.info("the trace with training=%s, fake=%s failed: %s", training, on_fakes, first_line)
            else:
                fake_of_mode[training] = on_fakes
                break
        # train mode may fail, because labels may be missing; eval mode must not
        if not training and not fake_of_mode:
            hint = " (or the model can't be traced without weights: load them first)" if runs.is_empty else ""
            raise OTOError(
                f"{type(model).__name__} can't take the batch {described(forwards)}: "
                f"{type(problem).__name__}: {problem}{hint}"
            ) from problem
        if not evaluated:  # eval mode comes first
            evaluated = len(runs.recorder.calls)
    return Trace(
        calls=runs.recorder.calls,
        evaluated=evaluated,
        sources=runs.sources,
        parameters=runs.parameters,
        returned=returned,
        equations=runs.equations,
        in_hand=runs.recorder.in_hand,
        fake=fake_of_mode,
    )


class _Runs:
    """The calls, made once in every mode, into one recorder.

    Attributes:
        is_empty: whether the model has no weights, and so runs on FakeTensors only.
        ways: whether to run on FakeTensors: the answers to try, in order.
        sources: the parameters and persistent buffers, with the same numbers in every run, by (first) name.
        equations: the equations between sizes that the runs have found.
    """

    def __init__(self, model: nn.Module, forwards: Sequence[Forward], fake: bool) -> None:
        self.model = model
        self.forwards = forwards
        paths = {module: path for path, module in model.named_modules()}
        self.recorder = _Recorder(paths)
        self.equations: list[Equation] = []
        tensors = named_tensors(model)
        self.parameters = {name for name, _ in model.named_parameters()}
        stored = self.parameters | persistent_buffers(model).keys()
        self.sources: dict[str, Ref] = {}
        for name, tensor in tensors.items():
            if name in stored:
                self.sources[name] = self.recorder.new(tensor.shape)
        self.is_empty = any(t.is_meta for t in tensors.values())
        self.ways: list[bool] = []
        if fake or self.is_empty:
            self.ways.append(True)
        if not self.is_empty:
            self.ways.append(False)
        self._fakes = Fakes(model)
        self._fake_weights = self._fakes.weights(model) if True in self.ways else None
        self._inputs: list[list[Ref]] = [[] for _ in forwards]  # the tensors that every call takes

    def mark(self) -> tuple[int, int]:
        """Where the recording is now."""
        return len(self.recorder.calls), len(self.equations)

    def forget_since(self, mark: tuple[int, int]) -> None:
        """Removes what a failed run has recorded, so that another way can be tried."""
        num_calls, num_equations = mark
        del self.recorder.calls[num_calls:]
        del self.equations[num_equations:]

    def run(self, training: bool, on_fakes: bool) -> list[Ref]:
        """Makes all the calls in one mode; returns the tensors that they returned."""
        model, recorder = self.model, self.recorder
        weights = self._fake_weights if on_fakes else None
        # a forward may write to weights; those of FakeTensors are copies anyway
        weights_kept = contextlib.nullcontext() if on_fakes else WeightsKept(model)
        outputs: list[Ref] = []
        with recorder.watching_layers(), evaluating(model, training, weights), weights_kept:
            for name, tensor in named_tensors(model).items():
                if name in self.sources:
                    recorder.name(tensor, self.sources[name])
            experts_at_once_(model)
            tag_(model, self.equations, recorder.ref)
            with self._recording(on_fakes):
                enter_mode_(model, training)  # what modules compute from their weights at this moment is recorded too
            for forward, inputs in zip(self.forwards, self._inputs, strict=True):
                recorder.layers = [""]
                give = self._giving(inputs, on_fakes)
                with self._recording(on_fakes):
                    output = forward.run(model, give)
                tensors = tensors_of(output)
                if not tensors:
                    raise OTOError(f"there is no tensor in what {type(model).__name__} returns, {type(output)}")
                outputs += [recorder.ref(tensor) for tensor in tensors]
        return outputs

    @contextlib.contextmanager
    def _recording(self, on_fakes: bool) -> Iterator[None]:
        """While open, the calls of ATen and the sizes that are passed are recorded."""
        fake_mode = self._fakes.mode if on_fakes else contextlib.nullcontext()
        # The mode that is entered last is asked first: the recorder sees a call before FakeTensors compute it.
        with fake_mode, Tagger(self.recorder, self.equations), self.recorder:
            yield

    def _giving(self, inputs: list[Ref], on_fakes: bool) -> TensorFunction:
        """A function that copies the inputs of one call, in order. The i-th input has the same number in every run.

        Args:
            inputs: the numbers that the inputs have from earlier runs; those of further inputs are added.
        """
        numbers = iter(list(inputs))

        def give(tensor: torch.Tensor) -> torch.Tensor:
            ref = next(numbers, None)
            if ref is None:  # no earlier run has come as far as this input
                ref = self.recorder.new(tensor.shape)
                inputs.append(ref)
            copy = self._fakes.of(tensor) if on_fakes else tensor.clone()
            self.recorder.name(copy, ref)
            return copy

        return give
