"""One forward of the model, recorded: every ATen call with the tensors it took and the layer it ran in.

Sizes that modules keep to themselves (`num_heads`, `split_size`, ...) are tagged while the trace runs, so that each
size argument remembers where it came from; what it must equal becomes an `Equation` for sizes.py.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from .modeling_oto import named_tensors, set_sizes_, sizes_of

logger = logging.getLogger(__name__)

Expr = tuple  # ("const", n) | ("attribute", path, name, index) | ("span", value, dim, start, stop) | (op, left, right)


@dataclass(frozen=True)
class Ref:
    """A recorded tensor: its number and its shape at that time."""

    value: int
    shape: tuple[int, ...]


class Call(NamedTuple):
    """One ATen call; tensors in args and kwargs are `Ref`s."""

    op: torch._ops.OpOverload
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
        return [a for a in tree_iter((self.args, self.kwargs)) if isinstance(a, Ref)]

    @property
    def given(self) -> dict[str, Any]:
        """Every argument by its name in the schema and in that order, those left out too."""
        schema = self.op._schema.arguments
        args = dict(zip((a.name for a in schema), self.args, strict=False)) | self.kwargs
        return {a.name: args.get(a.name, a.default_value) for a in schema}


class Equation(NamedTuple):
    """`left == right` must hold before and after a cut."""

    left: Expr
    right: Expr
    layer: str


class Trace(NamedTuple):
    """What one forward did.

    Attributes:
        calls: the ATen calls in order.
        sources: number of every parameter and persistent buffer by (first) name.
        parameters: which of them are parameters.
        outputs: the tensors the model returned.
        equations: what sizes have to equal.
        fake: whether it ran on FakeTensors.
    """

    calls: list[Call]
    sources: dict[str, Ref]
    parameters: set[str]
    outputs: list[Ref]
    equations: list[Equation]
    fake: bool


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
        if equal is True and isinstance(other, Size) and other.expr != self.expr:
            self.equations.append(Equation(self.expr, other.expr, ""))
        return equal

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = int.__hash__

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


class _Recorder(TorchDispatchMode):
    """Numbers tensors by identity, kept alive so that it stays unique, and writes down every ATen call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.layers = [""]
        self._number: dict[int, int] = {}
        self._alive: list[torch.Tensor] = []

    def ref(self, tensor: torch.Tensor) -> Ref:
        return Ref(self._number[id(tensor)], tuple(tensor.shape)) if id(tensor) in self._number else self.add(tensor)

    def add(self, tensor: torch.Tensor) -> Ref:
        self._number[id(tensor)] = len(self._alive)
        self._alive.append(tensor)
        return Ref(len(self._alive) - 1, tuple(tensor.shape))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        refs = tree_map_only(torch.Tensor, self.ref, (args, kwargs))
        out = func(*args, **kwargs)
        outs = tuple(self.add(t) for t in tree_iter(out) if isinstance(t, torch.Tensor))
        if outs or func is torch.ops.aten._local_scalar_dense.default:
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

        def untag(value: Size | slice) -> int | slice:
            if isinstance(value, slice):
                return slice(*tree_map_only(Size, untag, (value.start, value.stop, value.step)))
            sizes.append(value)
            return plain(value)

        plain_args, plain_kwargs = tree_map_only((Size, slice), untag, (args, kwargs))
        out = func(*plain_args, **plain_kwargs)
        if name not in SIZE_RULES:  # used as a number: it has to stay what it is
            self.equations += [Equation(n.expr, ("const", plain(n)), self.recorder.layers[-1]) for n in sizes]
        else:
            try:
                for n, expr in SIZE_RULES[name](self.recorder.ref, out, *args, **kwargs):
                    self.equations.append(Equation(expr_of(n), expr, self.recorder.layers[-1]))
            except Exception as error:  # a way of calling it that the rule doesn't know: the rehearsal has to judge
                logger.info("the size rule of %s failed in %s: %s", name, self.recorder.layers[-1], error)
        return out

    def _shape(self, tensor: torch.Tensor, shape: torch.Size) -> torch.Size:
        ref = self.recorder.ref(tensor)
        return torch.Size([Size(n, span(ref, d), self.equations) for d, n in enumerate(shape)])


@contextlib.contextmanager
def _tagged(model: nn.Module, equations: list[Equation]) -> Iterator[None]:
    """While open, every size that a module keeps is tagged, and those it reads from its config."""
    undo = []
    try:
        for path, module in model.named_modules():
            tagged: dict[str, Any] = {}
            for name, value in sizes_of(module).items():
                if isinstance(value, int):
                    tagged[name] = Size(value, ("attribute", path, name, None), equations)
                else:
                    sizes = [Size(n, ("attribute", path, name, i), equations) for i, n in enumerate(value)]
                    tagged[name] = type(value)(sizes)
            before = dict(vars(module))
            set_sizes_(module, tagged)
            undo.append((vars(module), before, dict(vars(module))))
        yield
    finally:
        for now, before, tagged in undo:  # but what the forward has changed
            now.update({name: value for name, value in before.items() if now.get(name) is tagged[name]})


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While open, the model is in eval mode, without gradients; no tensor that it keeps for itself outlasts it."""
    before = {module: dict(vars(module)) for module in model.modules()}
    with torch.no_grad(), torch.random.fork_rng():
        try:
            model.train()  # drops what modules cache in eval mode
            model.eval()
            yield
        finally:
            for module, kept in before.items():
                now = vars(module)
                for name in [n for n, v in now.items() if v is not kept.get(n) and tensors_of(v)]:
                    del now[name]
                now.update({n: v for n, v in kept.items() if n not in now}, training=kept["training"])


def tensors_of(output: Any) -> list[torch.Tensor]:
    """The tensors of a model's output, in order; caches are no outputs."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, Mapping):
        return [t for value in output.values() for t in tensors_of(value)]
    if isinstance(output, (list, tuple)):
        return [t for value in output for t in tensors_of(value)]
    return []


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that a checkpoint holds, by name."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def fake_weights(
    model: nn.Module, mode: FakeTensorMode, like: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Weightless stand-ins of every parameter and buffer, with the shapes of `like`, if given; ties stay."""
    tensors = named_tensors(model)
    like = like or tensors
    device = next((t.device for t in tensors.values() if t.device.type != "meta"), torch.device("cpu"))
    fakes: dict[int, torch.Tensor] = {}
    for name, t in tensors.items():
        if id(t) not in fakes:
            empty = torch.empty(like[name].shape, dtype=t.dtype, device="meta")
            fakes[id(t)] = FakeTensor(mode, empty, device if t.is_meta else t.device)
    return {name: fakes[id(t)] for name, t in tensors.items()}


def trace(model: nn.Module, inputs: Mapping[str, Any], fake: bool = True) -> Trace:
    """Runs the model once in eval mode and records it.

    Args:
        model: any module; its weights are not touched.
        inputs: keyword arguments of forward.
        fake: run on FakeTensors (no memory, no arithmetic) instead of the real weights.
    """
    recorder, equations = _Recorder(), []
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext()
    parameters = {n for n, _ in model.named_parameters()}
    names = parameters | persistent_buffers(model).keys()  # of what is tied, the first
    weights = fake_weights(model, mode) if fake else dict([*model.named_parameters(), *model.named_buffers()])
    inputs = tree_map_only(torch.Tensor, mode.from_tensor, dict(inputs)) if fake else dict(inputs)
    sources = {name: recorder.add(t) for name, t in weights.items() if name in names}
    paths = {module: path for path, module in model.named_modules()}

    def enter(module: nn.Module, _: Any) -> None:
        recorder.layers.append(paths.get(module, recorder.layers[-1]))

    def leave(*_: Any) -> None:
        recorder.layers.pop()

    before = nn.modules.module.register_module_forward_pre_hook(enter)
    after = nn.modules.module.register_module_forward_hook(leave)
    with before, after, evaluating(model), _tagged(model, equations), mode, _Tagger(recorder, equations), recorder:
        output = torch.func.functional_call(model, weights, (), inputs) if fake else model(**inputs)
    return Trace(recorder.calls, sources, parameters, [recorder.ref(t) for t in tensors_of(output)], equations, fake)
