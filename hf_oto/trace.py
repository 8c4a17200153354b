"""The calls of the model's forward, traced: every ATen call with the tensors it took and the layer it ran in.

They are traced together, in eval mode and in train mode, so that one algebra unites all they say. Sizes that modules
keep to themselves (`num_heads`, `split_size`, ...) are tagged while the trace runs, so that each size argument
remembers where it came from; what it must equal becomes an `Equation` for sizes.py.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from .calls import Forward, described, outermost_pretrained, raise_if_out_of_memory, tensors_of
from .modeling_oto import OTOError, named_tensors, set_sizes_, sizes_of
from .restore import MANY, WeightsKept, enter_mode_, evaluating

logger = logging.getLogger(__name__)

# ("const", n) | ("attribute", path, name, index) | ("span", value, dim, start, stop) | (op, left, right), where the
# operations are those of arithmetic, and comparisons, which are 1 or 0
Expr = tuple


@dataclass(frozen=True)
class Ref:
    """A recorded tensor: its number and its shape at that time."""

    value: int
    shape: tuple[int, ...]


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


class Equation(NamedTuple):
    """`left == right` must hold before and after a cut."""

    left: Expr
    right: Expr
    layer: str


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


class Size(int):
    """An int that remembers, as an expression, where it came from."""

    def __new__(cls, value: int, expr: Expr, equations: list[Equation]) -> Size:
        size = super().__new__(cls, value)
        size.expr, size.equations = expr, equations  # these receive what its later uses imply
        return size

    def _leave(self) -> int:
        """Leaves the algebra: from now on the expression has to keep its value."""
        self.equations.append(Equation(self.expr, ("const", plain(self)), ""))
        return plain(self)

    def __eq__(self, other: object) -> bool:
        equal = int.__eq__(self, other)
        if equal is True and isinstance(other, Size):
            if other.expr != self.expr:
                self.equations.append(Equation(self.expr, other.expr, ""))
        elif equal is not NotImplemented:
            self._note("==", other, equal)
        return equal

    def __ne__(self, other: object) -> bool:
        return not self == other

    # What is found by it in a table or set was compared with it; what isn't found there leaves no trace.
    __hash__ = int.__hash__

    def _note(self, comparison: str, other: Any, found: bool) -> None:
        """A comparison has to come out the same after a cut: code takes the other branch otherwise."""
        if isinstance(other, int):
            compared = (comparison, self.expr, expr_of(other))
            self.equations.append(Equation(compared, ("const", int(found)), ""))

    def __int__(self) -> int:
        return self._leave()

    def __float__(self) -> float:
        return float(self._leave())

    def __reduce__(self) -> tuple:
        return int, (plain(self),)


def _operation(name: str, op: str | None) -> Callable:
    """`Size.name`: the result is a size too, unless expressions have no such `op` or the other side is no int."""
    compute = getattr(int, name)

    def operate(self: Size, other: Any) -> Any:
        if op is None or not isinstance(other, int):
            return compute(self._leave(), other._leave() if isinstance(other, Size) else other)
        sides = (expr_of(other), self.expr) if name.startswith("__r") else (self.expr, expr_of(other))
        return Size(compute(plain(self), plain(other)), (op, *sides), self.equations)

    return operate


_OPS = {"add": "+", "sub": "-", "mul": "*", "floordiv": "//", "mod": "%", "truediv": None, "pow": None}
for _name, _op in [(f"__{side}{name}__", op) for name, op in _OPS.items() for side in ("", "r")]:
    setattr(Size, _name, _operation(_name, _op))


def _comparison(name: str, op: str) -> Callable:
    compute = getattr(int, name)

    def compare(self: Size, other: Any) -> bool:
        found = compute(self, other)
        if found is not NotImplemented:
            self._note(op, other, found)
        return found

    return compare


for _name, _op in {"__lt__": "<", "__le__": "<=", "__gt__": ">", "__ge__": ">="}.items():
    setattr(Size, _name, _comparison(_name, _op))


def plain(value: int) -> int:
    """The bare int, without a tag and without any consequence."""
    return int.__pos__(value)


def expr_of(value: int | Expr) -> Expr:
    """The expression a size came from; a plain int is a constant."""
    if isinstance(value, tuple):
        return value
    return value.expr if isinstance(value, Size) else ("const", value)


def span(ref: Ref, dim: int, start: int = 0, stop: int | None = None) -> Expr:
    """The number of positions in [start, stop) of a dimension that a cut leaves."""
    dim %= len(ref.shape)
    return ("span", ref.value, dim, start, ref.shape[dim] if stop is None else stop)


# what each function says of the sizes it is given: their arguments are those of torch's own ------------

Pairs = Iterator[tuple[int | Expr, Expr]]  # (a size as passed, what it must equal)


def _shape(ref: Callable, out: Any, sizes: Sequence[Any], first: int = 0) -> Pairs:
    for d, n in enumerate(sizes, first):
        if isinstance(n, int) and n != -1:
            yield n, span(ref(out), d)


def _ints(sizes: Sequence[Any]) -> Sequence[int]:
    return sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes


def _view(ref: Callable, out: Any, input: Any, *sizes: Any, shape: Any = (), size: Any = (), **_: Any) -> Pairs:
    return _shape(ref, out, _ints(sizes) or shape or size)


def _repeat(ref: Callable, out: Any, input: Any, *sizes: Any, repeats: Any = (), dims: Any = ()) -> Pairs:
    for d, n in enumerate(reversed(_ints(sizes) or repeats or dims), 1):
        yield n, ("//", span(ref(out), -d), span(ref(input), -d)) if d <= input.dim() else span(ref(out), -d)


def _repeat_interleave(ref: Callable, out: Any, input: Any, repeats: Any, dim: int | None = None, **_: Any) -> Pairs:
    if isinstance(repeats, int) and dim is not None:
        yield repeats, ("//", span(ref(out), dim), span(ref(input), dim))


def _split(ref: Callable, out: Any, input: Any, split_size_or_sections: Any, dim: int = 0) -> Pairs:
    for i, piece in enumerate(out):
        n = split_size_or_sections if isinstance(split_size_or_sections, int) else split_size_or_sections[i]
        if piece.shape[dim] == n:
            yield n, span(ref(piece), dim)


def _chunk(ref: Callable, out: Any, input: Any, chunks: int, dim: int = 0) -> Pairs:
    yield ("*", ("const", len(out)), span(ref(out[0]), dim)), span(ref(input), dim)


def _slices(ref: Callable, out: Any, input: Any, index: Any) -> Pairs:
    index = index if isinstance(index, tuple) else (index,)
    masks = [i.dim() if isinstance(i, torch.Tensor) and i.dtype == torch.bool else 1 for i in index]
    widths = [0 if i is None or i is ... else width for i, width in zip(index, masks, strict=True)]
    dim = 0
    for i, width in zip(index, widths, strict=True):
        if isinstance(i, slice) and i.step in (None, 1):
            yield from _bounds(ref(input), dim, i.start, i.stop)
        dim += input.dim() - sum(widths) if i is ... else width


def _bounds(source: Ref, dim: int, start: int | None, stop: int | None) -> Pairs:
    n = source.shape[dim]
    for bound in (start, stop):
        if isinstance(bound, int) and 0 < bound < n:
            yield bound, span(source, dim, 0, plain(bound))
        elif isinstance(bound, int) and -n < bound < 0:
            yield 0 - bound, span(source, dim, n + plain(bound), n)


def _narrow(ref: Callable, out: Any, input: Any, dim: int, start: Any, length: int) -> Pairs:
    if isinstance(start, int):
        yield from _bounds(ref(input), dim % input.dim(), start, start + length)


def _groups(ref: Callable, out: Any, input: Any, weight: Any, *more: Any, groups: int = 1, **_: Any) -> Pairs:
    """(b, g i) and (o, i); transposed, which has out for input, (b, g o) and (i, o)"""
    whole = span(ref(input), input.dim() - weight.dim() + 1)
    yield more[4] if len(more) > 4 else groups, ("//", whole, span(ref(weight), 1))


def _group_norm(ref: Callable, out: Any, input: Any, num_groups: int, *_: Any, **__: Any) -> Pairs:
    yield num_groups, ("//", span(ref(out), 1), ("const", input.shape[1] // plain(num_groups)))


def _default_scale(ref: Callable, out: Any, query: Any, *_: Any, scale: float | None = None, **__: Any) -> Pairs:
    if scale is None:  # 1 / sqrt(head_dim) is then read off the query
        yield query.shape[-1], span(ref(query), -1)


def _all_heads(ref: Callable, out: Any, query: Any, *args: Any, **named: Any) -> Pairs:
    """Of attention with all its projections in one function, head_dim is embed_dim // num_heads: it stays whole."""
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    for tensor, dim in ((query, -1), (args[4], 0), *((named.get(name), 0) for name in names)):
        if tensor is not None:
            yield tensor.shape[dim], span(ref(tensor), dim)


SIZE_RULES: dict[str, Callable[..., Pairs]] = {
    **dict.fromkeys(["view", "reshape", "expand", "broadcast_to", "new_zeros", "new_ones", "new_empty"], _view),
    **dict.fromkeys(
        ["zeros", "ones", "empty", "rand", "randn"],
        lambda ref, out, *sizes, **named: _view(ref, out, None, *sizes, **named),
    ),
    "full": lambda ref, out, size, *_, **__: _shape(ref, out, size),
    "new_full": lambda ref, out, input, size, *_, **__: _shape(ref, out, size),
    "unflatten": lambda ref, out, input, dim, sizes: _shape(ref, out, sizes, dim % input.dim()),
    **dict.fromkeys(
        ["layer_norm", "rms_norm", "_fused_rms_norm"],
        lambda ref, out, input, normalized_shape, *_, **__: _shape(ref, out, normalized_shape, -len(normalized_shape)),
    ),
    "repeat": _repeat, "tile": _repeat, "repeat_interleave": _repeat_interleave,
    "split": _split, "split_with_sizes": _split, "chunk": _chunk, "__getitem__": _slices, "narrow": _narrow,
    **dict.fromkeys(["conv1d", "conv2d", "conv3d"], _groups),
    **dict.fromkeys(
        ["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"],
        lambda ref, out, input, *more, **named: _groups(ref, input, out, *more, **named),
    ),
    "__setitem__": lambda ref, out, input, index, value: _slices(ref, out, input, index),
    "multi_head_attention_forward": _all_heads,
    **dict.fromkeys(
        ["affine_grid", "affine_grid_generator"],  # (n, c, h, w), of which the channels decide nothing
        lambda ref, out, theta, size, *_, **__: _shape(ref, out, [size[0], *size[2:]]),
    ),
    "group_norm": _group_norm, "scaled_dot_product_attention": _default_scale,
}  # fmt: skip


# recording -----------------------------------------------------------------------------------------


def _mapped(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """Arguments with every leaf mapped: several times as fast as a pytree, and a trace maps many thousands."""
    if type(value) is tuple or type(value) is list:
        return type(value)(_mapped(inner, leaf) for inner in value)
    if type(value) is dict:
        return {key: _mapped(inner, leaf) for key, inner in value.items()}
    return leaf(value)


class _Recorder(TorchDispatchMode):
    """Numbers tensors by identity, kept alive so that it stays unique, and writes down every ATen call."""

    def __init__(self) -> None:
        super().__init__()
        self.supports_higher_order_operators = True
        self.calls: list[Call] = []
        self.layers = [""]
        self.count = 0
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
    recorder, equations, fakes = _Recorder(), [], Fakes(model)
    parameters = {name for name, _ in model.named_parameters()}
    tensors = named_tensors(model)
    stored = parameters | persistent_buffers(model).keys()  # of what is tied, the first name
    sources = {name: recorder.new(t.shape) for name, t in tensors.items() if name in stored}
    taken: list[list[Ref]] = [[] for _ in forwards]  # the tensors that every call takes
    paths = {module: path for path, module in model.named_modules()}
    in_hand: dict[str, set[int]] = {}
    empty = any(t.is_meta for t in tensors.values())
    weights = fakes.weights(model) if fake or empty else None
    here = threading.get_ident()

    def enter(module: nn.Module, args: Any) -> None:
        if threading.get_ident() != here:  # hooks are those of all threads
            return
        in_hand.setdefault(recorder.layers[-1], set()).update(recorder.known(tensors_of(args)))
        recorder.layers.append(paths.get(module, recorder.layers[-1]))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() != here:
            return
        recorder.layers.pop()
        in_hand.setdefault(recorder.layers[-1], set()).update(recorder.known(tensors_of(output)))

    def run(training: bool, on_fakes: bool) -> list[Ref]:
        """Makes all the calls in one mode; what they return."""
        outputs = []
        mode = fakes.mode if on_fakes else contextlib.nullcontext()
        before = nn.modules.module.register_module_forward_pre_hook(enter)
        after = nn.modules.module.register_module_forward_hook(leave, always_call=True)
        kept = contextlib.nullcontext() if on_fakes else WeightsKept(model)
        with before, after, evaluating(model, training, weights if on_fakes else None), kept:
            for name, tensor in named_tensors(model).items():
                if name in sources:
                    recorder.name(tensor, sources[name])
            experts_at_once_(model)
            tag_(model, equations)
            with mode, _Tagger(recorder, equations), recorder:
                enter_mode_(model, training)  # what modules compute from their weights then is seen, too
            for forward, refs in zip(forwards, taken, strict=True):
                count = iter(range(len(refs)))

                def given(tensor: torch.Tensor, refs: list[Ref] = refs, count: Iterator[int] = count) -> torch.Tensor:
                    copied = fakes.of(tensor) if on_fakes else tensor.clone()
                    i = next(count, None)
                    refs += [recorder.new(tensor.shape)] if i is None else []
                    recorder.name(copied, refs[-1 if i is None else i])
                    return copied

                recorder.layers = [""]
                with mode, _Tagger(recorder, equations), recorder:
                    output = forward.run(model, given)
                found = tensors_of(output)
                if not found:
                    raise OTOError(f"there is no tensor in what {type(model).__name__} returns, {type(output)}")
                outputs += [recorder.ref(t) for t in found]
        return outputs

    traced, returned, evaluated = {}, {}, 0
    for training in modes:
        mark = len(recorder.calls), len(equations)
        for on_fakes in [True] * (fake or empty) + [False] * (not empty):
            try:
                returned[training] = run(training, on_fakes)
            except Exception as error:  # data-dependent branches and exotic kernels don't run on FakeTensors
                raise_if_out_of_memory(error)
                problem = error
                del recorder.calls[mark[0] :], equations[mark[1] :]
                said = str(error).split("\n")[0]
                logger.info("the trace with training=%s, fake=%s failed: %s", training, on_fakes, said)
            else:
                traced[training] = on_fakes
                break
        if not training and not traced:
            hint = " (or the model can't be traced without weights: load them first)" if empty else ""
            raise OTOError(
                f"{type(model).__name__} can't take the batch {described(forwards)}: "
                f"{type(problem).__name__}: {problem}{hint}"
            ) from problem
        evaluated = evaluated or len(recorder.calls)
    return Trace(recorder.calls, evaluated, sources, parameters, returned, equations, in_hand, traced)
