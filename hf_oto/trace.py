"""The calls of the model's forward, traced: every ATen call with the tensors it took and the layer it ran in.

They are traced together, in eval mode and in train mode, so that one algebra unites all they say. Meanwhile the sizes
that modules keep to themselves are tagged (sizes.py).
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
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from .calls import Forward, described, outermost_pretrained, raise_if_out_of_memory, tensors_of
from .evaluating import WeightsKept, enter_mode_, evaluating
from .modeling_oto import OTOError, named_tensors, set_sizes_, sizes_of
from .restore import MANY
from .sizes import SIZE_RULES, Equation, Ref, Size, expr_of, plain, span

logger = logging.getLogger(__name__)


class Call(NamedTuple):
    """One ATen call; tensors in args and kwargs are `Ref`s."""

    op: torch._ops.OpOverload | OpaqueOp
    args: tuple
    kwargs: dict[str, Any]
    outs: tuple[Ref, ...]
    layer: str

    @property
    def name(self) -> str:
        """aten::add_.Tensor -> add"""
        name = self.op._schema.name.split("::")[1]
        return name[:-1] if name.endswith("_") and not name.endswith("__") else name

    @property
    def refs(self) -> list[Ref]:
        """The tensors that it takes, in order."""
        return [*_refs_in(self.args), *_refs_in(self.kwargs.values())]

    @property
    def given(self) -> dict[str, Any]:
        """Every argument by its name in the schema and in that order, those left out too."""
        schema = self.op._schema.arguments
        args = dict(zip((a.name for a in schema), self.args, strict=False)) | self.kwargs
        return {a.name: args.get(a.name, a.default_value) for a in schema}


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
        evaluated: how many of them are those of eval mode.
        sources: number of every parameter and persistent buffer by (first) name.
        parameters: which of them are parameters.
        returned: the tensors that the model returned, by mode (training or not).
        equations: what sizes have to equal.
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
        return [ref for refs in self.returned.values() for ref in refs]


def _mapped(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """Arguments with every leaf mapped: several times as fast as a pytree, and a trace maps many thousands."""
    if type(value) is tuple or type(value) is list:
        return type(value)(_mapped(inner, leaf) for inner in value)
    if type(value) is dict:
        return {key: _mapped(inner, leaf) for key, inner in value.items()}
    return leaf(value)


class _Recorder(TorchDispatchMode):
    """Numbers tensors by identity, kept alive so that it stays unique, and writes down every ATen call."""

    def __init__(self, paths: Mapping[nn.Module, str]) -> None:
        super().__init__()
        self.supports_higher_order_operators = True
        self.calls: list[Call] = []
        self.layers = [""]
        self.in_hand: dict[str, set[int]] = {}
        self.count = 0
        self._paths = paths
        self._number: dict[int, int] = {}
        self._alive: list[torch.Tensor] = []

    def ref(self, tensor: torch.Tensor) -> Ref:
        """The number of a tensor, a new one if it has none."""
        return Ref(self._number[id(tensor)], tuple(tensor.shape)) if id(tensor) in self._number else self.add(tensor)

    def add(self, tensor: torch.Tensor) -> Ref:
        """A new number for a tensor: what is written to is another value from then on."""
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
        self._alive.append(tensor)
        return ref

    def known(self, tensors: Sequence[torch.Tensor]) -> set[int]:
        """The numbers of those tensors that have one."""
        return {self._number[id(t)] for t in tensors if id(t) in self._number}

    @contextlib.contextmanager
    def watching_layers(self) -> Iterator[None]:
        """While open, the modules that run say where a call is made, and what their forwards have in hand."""
        here = threading.get_ident()  # hooks are those of all threads

        def enter(module: nn.Module, args: Any) -> None:
            if threading.get_ident() == here:
                self.in_hand.setdefault(self.layers[-1], set()).update(self.known(tensors_of(args)))
                self.layers.append(self._paths.get(module, self.layers[-1]))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if threading.get_ident() == here:
                self.layers.pop()
                self.in_hand.setdefault(self.layers[-1], set()).update(self.known(tensors_of(output)))

        before = nn.modules.module.register_module_forward_pre_hook(enter)
        after = nn.modules.module.register_module_forward_hook(leave, always_call=True)
        with before, after:
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        refs = _mapped((args, kwargs), lambda leaf: self.ref(leaf) if isinstance(leaf, torch.Tensor) else leaf)
        out = func(*args, **kwargs)
        outs = tuple(self.add(t) for t in tree_iter(out) if isinstance(t, torch.Tensor))
        if isinstance(func, HigherOrderOperator):
            taken = tuple(ref for ref in tree_iter(refs) if isinstance(ref, Ref))
            self.calls.append(Call(OpaqueOp(func), taken, {}, outs, self.layers[-1]))
        elif outs or func is torch.ops.aten._local_scalar_dense.default:
            self.calls.append(Call(func, *refs, outs, self.layers[-1]))
        return out


class _Tagger(TorchFunctionMode):
    """Sees size arguments before C++ does: turns tags into equations, and shapes into tags."""

    def __init__(self, recorder: _Recorder, equations: list[Equation]) -> None:
        super().__init__()
        self.recorder, self.equations = recorder, equations

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        if name == "__get__" and func.__self__ is torch.Tensor.shape:
            return self._shape(args[0], func(*args))
        if name == "size" and func is torch.Tensor.size:
            shape = self._shape(args[0], args[0].shape)
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            return shape if dim is None else shape[dim]
        sizes: list[Size] = []

        def untag(value: Any) -> Any:
            if type(value) is slice:
                return slice(untag(value.start), untag(value.stop), untag(value.step))
            if type(value) is not Size:
                return value
            sizes.append(value)
            return plain(value)

        plain_args, plain_kwargs = _mapped((args, kwargs), untag)
        out = func(*plain_args, **plain_kwargs)
        if name not in SIZE_RULES:  # used as a number: it has to stay what it is
            self.equations += [Equation(n.expr, ("const", plain(n)), self.recorder.layers[-1]) for n in sizes]
        else:
            said: list[Equation] = []
            mark = len(self.equations)
            try:
                for n, expr in SIZE_RULES[name](self.recorder.ref, out, *args, **kwargs):
                    said.append(Equation(expr_of(n), expr, self.recorder.layers[-1]))
            except Exception as error:  # a way of calling it that the rule doesn't know: the rehearsal has to judge
                logger.info("the size rule of %s failed in %s: %s", name, self.recorder.layers[-1], error)
            self.equations[mark:] = said  # what the rule itself compared is no part of the model
        return out

    def _shape(self, tensor: torch.Tensor, shape: torch.Size) -> torch.Size:
        ref = self.recorder.ref(tensor)
        return torch.Size([Size(n, span(ref, d), self.equations) for d, n in enumerate(shape)])


def experts_at_once_(model: nn.Module) -> None:
    """Lets experts run as one batched product, in place: the implementation whose shapes don't depend on the data."""
    for module in outermost_pretrained(model).values():
        module.set_experts_implementation("batched_mm")


def tag_(model: nn.Module, equations: list[Equation]) -> None:
    """Tags every size that a module keeps, and those it reads from its config, in place: `restored` undoes it."""
    for path, module in model.named_modules():
        tagged: dict[str, Any] = {}
        for name, value in sizes_of(module).items():
            if isinstance(value, int):
                tagged[name] = Size(value, ("attribute", path, name, None), equations)
            elif len(value) <= MANY:  # longer ones are data
                sizes = [Size(n, ("attribute", path, name, i), equations) for i, n in enumerate(value)]
                tagged[name] = type(value)(sizes)
        set_sizes_(module, tagged)


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that a checkpoint holds, by name."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


class Fakes:
    """Weightless stand-ins of a model's tensors and of its inputs: they have shapes, and neither memory nor values."""

    def __init__(self, model: nn.Module) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        devices = {name: t.device for name, t in named_tensors(model).items()}
        self._device = next((d for d in devices.values() if d.type != "meta"), torch.device("cpu"))
        self._devices = {name: self._device if d.type == "meta" else d for name, d in devices.items()}

    def weights(self, model: nn.Module) -> dict[int, torch.Tensor]:
        """A fake of every parameter and buffer that the model has now, by the id of that."""
        found: dict[int, torch.Tensor] = {}
        for name, tensor in named_tensors(model).items():
            if id(tensor) not in found:
                found[id(tensor)] = self._fake(tensor, self._devices[name])
        return found

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """A fake of an input."""
        return self._fake(tensor, self._device if tensor.is_meta else tensor.device)

    def _fake(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        fake = FakeTensor(self.mode, torch.empty_like(tensor, device="meta"), device)
        fake._is_param = isinstance(tensor, nn.Parameter)  # which is what isinstance(fake, nn.Parameter) asks
        return fake


def trace(
    model: nn.Module, forwards: Sequence[Forward], fake: bool = True, modes: Sequence[bool] = (False, True)
) -> Trace:
    """Makes the calls in eval mode, then in train mode without dropout, and records them: on FakeTensors (no memory,
    no arithmetic), or with the real weights where the model doesn't run on these.

    Args:
        model: any module, on the meta device too; it stays as it is.
        fake: whether to try FakeTensors.
        modes: eval mode (False) first, then train mode (True).

    Raises:
        OTOError: the model can't take the calls in eval mode. (What it can't do in train mode, without labels say, is
            left out.)
    """
    runs = _Runs(model, forwards, fake)
    traced, returned, evaluated = {}, {}, 0
    for training in modes:
        for on_fakes in runs.ways:
            mark = runs.mark()
            try:
                returned[training] = runs.run(training, on_fakes)
            except Exception as error:  # data-dependent branches and exotic kernels don't run on FakeTensors
                raise_if_out_of_memory(error)
                problem = error
                runs.forget_since(mark)
                said = str(error).split("\n")[0]
                logger.info("the trace with training=%s, fake=%s failed: %s", training, on_fakes, said)
            else:
                traced[training] = on_fakes
                break
        if not training and not traced:
            hint = " (or the model can't be traced without weights: load them first)" if runs.is_empty else ""
            raise OTOError(
                f"{type(model).__name__} can't take the batch {described(forwards)}: "
                f"{type(problem).__name__}: {problem}{hint}"
            ) from problem
        evaluated = evaluated or len(runs.recorder.calls)
    recorder = runs.recorder
    return Trace(
        recorder.calls, evaluated, runs.sources, runs.parameters, returned, runs.equations, recorder.in_hand, traced
    )


class _Runs:
    """The calls, made once in every mode, into one recorder.

    Attributes:
        is_empty: whether the model has no weights: it then runs on FakeTensors only.
        ways: whether to run on FakeTensors, in the order in which this is tried.
        sources: the numbers of parameters and persistent buffers, the same in every run, by (first) name.
        equations: what the runs say of sizes.
    """

    def __init__(self, model: nn.Module, forwards: Sequence[Forward], fake: bool) -> None:
        self.model, self.forwards = model, forwards
        self.recorder = _Recorder({module: path for path, module in model.named_modules()})
        self.equations: list[Equation] = []
        tensors = named_tensors(model)
        self.parameters = {name for name, _ in model.named_parameters()}
        stored = self.parameters | persistent_buffers(model).keys()
        self.sources = {name: self.recorder.new(t.shape) for name, t in tensors.items() if name in stored}
        self.is_empty = any(t.is_meta for t in tensors.values())
        self.ways = [True] * (fake or self.is_empty) + [False] * (not self.is_empty)
        self._fakes = Fakes(model)
        self._fake_weights = self._fakes.weights(model) if True in self.ways else None
        self._taken: list[list[Ref]] = [[] for _ in forwards]  # the tensors that every call takes

    def mark(self) -> tuple[int, int]:
        """Where the recording is now."""
        return len(self.recorder.calls), len(self.equations)

    def forget_since(self, mark: tuple[int, int]) -> None:
        """Takes back what a run recorded that failed."""
        del self.recorder.calls[mark[0] :], self.equations[mark[1] :]

    def run(self, training: bool, on_fakes: bool) -> list[Ref]:
        """Makes all the calls in one mode; what they return."""
        model, recorder, outputs = self.model, self.recorder, []
        mode = self._fakes.mode if on_fakes else contextlib.nullcontext()
        weights = self._fake_weights if on_fakes else None
        kept = contextlib.nullcontext() if on_fakes else WeightsKept(model)
        with recorder.watching_layers(), evaluating(model, training, weights), kept:
            for name, tensor in named_tensors(model).items():
                if name in self.sources:
                    recorder.name(tensor, self.sources[name])
            experts_at_once_(model)
            tag_(model, self.equations)
            with mode, _Tagger(recorder, self.equations), recorder:
                enter_mode_(model, training)  # what modules compute from their weights then is seen, too
            for forward, taken in zip(self.forwards, self._taken, strict=True):
                recorder.layers = [""]
                with mode, _Tagger(recorder, self.equations), recorder:
                    output = forward.run(model, self._giving(taken, on_fakes))
                found = tensors_of(output)
                if not found:
                    raise OTOError(f"there is no tensor in what {type(model).__name__} returns, {type(output)}")
                outputs += [recorder.ref(t) for t in found]
        return outputs

    def _giving(self, taken: list[Ref], on_fakes: bool) -> Callable[[torch.Tensor], torch.Tensor]:
        """What gives a call its own copies of its inputs: in every run the i-th input has the same number."""
        known = iter(list(taken))

        def give(tensor: torch.Tensor) -> torch.Tensor:
            ref = next(known, None)
            if ref is None:
                ref = self.recorder.new(tensor.shape)
                taken.append(ref)
            given = self._fakes.of(tensor) if on_fakes else tensor.clone()
            self.recorder.name(given, ref)
            return given

        return give
