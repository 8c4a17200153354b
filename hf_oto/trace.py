"""One forward of the model, recorded: every ATen call with the tensors it took and the layer it ran in.

Sizes that modules keep to themselves (`num_heads`, `split_size`, ...) are tagged while the trace runs, so that each
size argument remembers where it came from; what it must equal becomes an `Equation` for sizes.py.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from .modeling_oto import config_view, sizes_of

logger = logging.getLogger(__name__)

Expr = tuple  # ("const", n) | ("attribute", path, name, index) | ("span", value, dim, start, stop) | (op, left, right)


class Ref(NamedTuple):
    """A recorded tensor: its number in `Trace.shapes` and its shape at that time."""

    value: int
    shape: tuple[int, ...]


class Call(NamedTuple):
    """One ATen call; tensors in args and kwargs are `Ref`s."""

    op: torch._ops.OpOverload
    args: tuple
    kwargs: dict[str, Any]
    outs: tuple[Ref, ...]
    layer: str


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

    expr: Expr
    equations: list[Equation]

    @staticmethod
    def of(value: int, expr: Expr, equations: list[Equation]) -> Size:
        """A tagged int; `equations` receives what its later uses imply."""
        size = Size(value)
        size.expr, size.equations = expr, equations
        return size

    def plain(self) -> int:
        """The bare int, without any consequence."""
        return int.__add__(self, 0)

    def _leave(self) -> int:
        """Leaves the algebra: from now on the expression has to keep its value."""
        self.equations.append(Equation(self.expr, ("const", self.plain()), ""))
        return self.plain()

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
        return int, (self.plain(),)

    def __deepcopy__(self, memo: dict) -> int:
        return self.plain()


def _operator(name: str, op: str | None) -> tuple[Callable, Callable]:
    compute, reflected = getattr(int, f"__{name}__"), getattr(int, f"__r{name}__")

    def make(method: Callable, swap: bool) -> Callable:
        def operate(self: Size, other: Any) -> Any:
            if op is None or not isinstance(other, int):
                plain = other._leave() if isinstance(other, Size) else other
                return method(self._leave(), plain)
            result = method(self.plain(), plain_int(other))
            if result is NotImplemented:
                return result
            left, right = (expr_of(other), self.expr) if swap else (self.expr, expr_of(other))
            return Size.of(result, (op, left, right), self.equations)

        return operate

    return make(compute, False), make(reflected, True)


for _name, _op in [
    ("add", "+"),
    ("sub", "-"),
    ("mul", "*"),
    ("floordiv", "//"),
    ("mod", "%"),
    ("truediv", None),
    ("pow", None),
]:
    _forward, _reflected = _operator(_name, _op)
    setattr(Size, f"__{_name}__", _forward)
    setattr(Size, f"__r{_name}__", _reflected)


def plain_int(value: Any) -> Any:
    """The value without a tag."""
    return value.plain() if isinstance(value, Size) else value


def expr_of(value: int | Expr) -> Expr:
    """The expression a size came from; a plain int is a constant."""
    if isinstance(value, tuple):
        return value
    return value.expr if isinstance(value, Size) else ("const", value)


def span(ref: Ref, dim: int, start: int = 0, stop: int | None = None) -> Expr:
    """The number of positions in [start, stop) of a dimension that a cut leaves."""
    dim %= len(ref.shape)
    return ("span", ref.value, dim, start, ref.shape[dim] if stop is None else stop)


# what each function says of the sizes it is given --------------------------------------------------

Pairs = Iterator[tuple[int | Expr, Expr]]  # (a size as passed, what it must equal)


def _ints(sizes: Sequence[Any]) -> Sequence[int]:
    return sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes


def _out_shape(ref: Callable, out: Any, args: tuple, kwargs: dict) -> Pairs:
    sizes = _ints(args[1:]) or kwargs.get("shape") or kwargs.get("size") or ()
    for d, n in enumerate(sizes):
        if isinstance(n, int) and n != -1:
            yield n, span(ref(out), d)


def _factory(ref: Callable, out: Any, args: tuple, kwargs: dict) -> Pairs:
    return _out_shape(ref, out, (None, *args), kwargs)


def _full(ref: Callable, out: Any, args: tuple, kwargs: dict) -> Pairs:
    return _out_shape(ref, out, (None, args[0]) if args else (None,), kwargs)


def _new_full(ref: Callable, out: Any, args: tuple, kwargs: dict) -> Pairs:
    return _out_shape(ref, out, args[:2], kwargs)


def _unflatten(ref: Callable, out: Any, args: tuple, kwargs: dict) -> Pairs:
    dim = kwargs["dim"] if "dim" in kwargs else args[1]
    dim %= args[0].dim()
    for i, n in enumerate(kwargs["sizes"] if "sizes" in kwargs else args[2]):
        if n != -1:
            yield n, span(ref(out), dim + i)


def _repeat(ref: Callable, out: Any, args: tuple, kwargs: dict) -> Pairs:
    source = ref(args[0])
    sizes = _ints(args[1:]) or kwargs.get("repeats") or kwargs.get("dims")
    for d, n in enumerate(reversed(sizes), 1):
        if d <= len(source.shape):
            yield n, ("//", span(ref(out), -d), span(source, -d))
        else:
            yield n, span(ref(out), -d)


def _repeat_interleave(ref: Callable, out: Any, args: tuple, kwargs: dict) -> Pairs:
    n = kwargs["repeats"] if "repeats" in kwargs else args[1]
    dim = kwargs["dim"] if "dim" in kwargs else args[2] if len(args) > 2 else None
    if isinstance(n, int) and dim is not None:
        yield n, ("//", span(ref(out), dim), span(ref(args[0]), dim))


def _split(ref: Callable, out: Any, args: tuple, kwargs: dict) -> Pairs:
    sizes = next((kwargs[k] for k in ("split_size_or_sections", "split_size") if k in kwargs), None)
    sizes = args[1] if sizes is None else sizes
    dim = kwargs["dim"] if "dim" in kwargs else args[2] if len(args) > 2 else 0
    for i, piece in enumerate(out):
        n = sizes if isinstance(sizes, int) else sizes[i]
        if piece.shape[dim] == n:
            yield n, span(ref(piece), dim)


def _chunk(ref: Callable, out: Any, args: tuple, kwargs: dict) -> Pairs:
    dim = kwargs["dim"] if "dim" in kwargs else args[2] if len(args) > 2 else 0
    total = ("*", ("const", len(out)), span(ref(out[0]), dim))
    yield total, span(ref(args[0]), dim)


def _slices(ref: Callable, out: Any, args: tuple, kwargs: dict) -> Pairs:
    source, index = ref(args[0]), args[1] if isinstance(args[1], tuple) else (args[1],)
    used = sum(
        i.dim() if isinstance(i, torch.Tensor) and i.dtype == torch.bool else 1
        for i in index
        if i is not None and i is not ...
    )
    dim = 0
    for i in index:
        if i is None:
            continue
        if i is ...:
            dim += len(source.shape) - used
            continue
        if isinstance(i, slice) and i.step in (None, 1):
            yield from _bounds(source, dim, i.start, i.stop)
        dim += i.dim() if isinstance(i, torch.Tensor) and i.dtype == torch.bool else 1


def _bounds(source: Ref, dim: int, start: int | None, stop: int | None) -> Pairs:
    n = source.shape[dim]
    for bound in (start, stop):
        if isinstance(bound, int) and 0 < bound < n:
            yield bound, span(source, dim, 0, plain_int(bound))
        elif isinstance(bound, int) and -n < bound < 0:
            yield 0 - bound, span(source, dim, n + plain_int(bound), n)


def _narrow(ref: Callable, out: Any, args: tuple, kwargs: dict) -> Pairs:
    names = dict(zip(("input", "dim", "start", "length"), args, strict=False)) | kwargs
    if isinstance(names["start"], int):
        source = ref(args[0])
        yield from _bounds(source, names["dim"] % len(source.shape), names["start"], names["start"] + names["length"])


def _groups(ref: Callable, out: Any, args: tuple, kwargs: dict, transposed: bool = False) -> Pairs:
    groups = kwargs["groups"] if "groups" in kwargs else args[6] if len(args) > 6 else 1
    x = kwargs["input"] if "input" in kwargs else args[0]
    weight = kwargs["weight"] if "weight" in kwargs else args[1]
    whole = out if transposed else x  # (b, g i) and (o, i), or, transposed, (b, g o) and (i, o)
    yield groups, ("//", span(ref(whole), whole.dim() - weight.dim() + 1), span(ref(weight), 1))


def _transposed_groups(ref: Callable, out: Any, args: tuple, kwargs: dict) -> Pairs:
    return _groups(ref, out, args, kwargs, transposed=True)


def _group_norm(ref: Callable, out: Any, args: tuple, kwargs: dict) -> Pairs:
    groups = kwargs["num_groups"] if "num_groups" in kwargs else args[1]
    yield groups, ("//", span(ref(out), 1), ("const", args[0].shape[1] // plain_int(groups)))


def _normalized_shape(ref: Callable, out: Any, args: tuple, kwargs: dict) -> Pairs:
    shape = kwargs["normalized_shape"] if "normalized_shape" in kwargs else args[1]
    for d, n in enumerate(shape):
        yield n, span(ref(out), d - len(shape))


def _default_scale(ref: Callable, out: Any, args: tuple, kwargs: dict) -> Pairs:
    query = kwargs["query"] if "query" in kwargs else args[0]
    if kwargs.get("scale") is None:  # 1 / sqrt(head_dim) is then read off the query
        yield query.shape[-1], span(ref(query), -1)


SIZE_RULES: dict[str, Callable[..., Pairs]] = {
    **dict.fromkeys(["view", "reshape", "expand", "broadcast_to", "new_zeros", "new_ones", "new_empty"], _out_shape),
    **dict.fromkeys(["zeros", "ones", "empty", "rand", "randn"], _factory),
    "full": _full, "new_full": _new_full, "unflatten": _unflatten,
    "repeat": _repeat, "tile": _repeat, "repeat_interleave": _repeat_interleave,
    "split": _split, "split_with_sizes": _split, "chunk": _chunk, "__getitem__": _slices, "narrow": _narrow,
    **dict.fromkeys(["conv1d", "conv2d", "conv3d"], _groups),
    **dict.fromkeys(["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"], _transposed_groups),
    "group_norm": _group_norm, "layer_norm": _normalized_shape, "rms_norm": _normalized_shape,
    "scaled_dot_product_attention": _default_scale,
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
        if id(tensor) not in self._number:
            return self.add(tensor)
        return Ref(self._number[id(tensor)], tuple(tensor.shape))

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
        plain_args, plain_kwargs = _untag(args, sizes), _untag(kwargs, sizes)
        out = func(*plain_args, **plain_kwargs)
        if name not in SIZE_RULES:  # used as a number: it has to stay what it is
            self.equations += [Equation(n.expr, ("const", n.plain()), self.recorder.layers[-1]) for n in sizes]
        else:
            try:
                for n, expr in SIZE_RULES[name](self.recorder.ref, out, args, kwargs):
                    self.equations.append(Equation(expr_of(n), expr, self.recorder.layers[-1]))
            except Exception as error:  # a way of calling it that the rule doesn't know: the rehearsal has to judge
                logger.info("the size rule of %s failed in %s: %s", name, self.recorder.layers[-1], error)
        return out

    def _shape(self, tensor: torch.Tensor, shape: torch.Size) -> torch.Size:
        ref = self.recorder.ref(tensor)
        return torch.Size([Size.of(n, span(ref, d), self.equations) for d, n in enumerate(shape)])


def _untag(value: Any, sizes: list[Size]) -> Any:
    """Arguments without tags; those that had one are added to `sizes`."""
    if isinstance(value, Size):
        sizes.append(value)
        return value.plain()
    if type(value) in (tuple, list, torch.Size):
        return type(value)([_untag(v, sizes) for v in value])
    if type(value) is dict:
        return {k: _untag(v, sizes) for k, v in value.items()}
    if isinstance(value, slice):
        return slice(*(_untag(v, sizes) for v in (value.start, value.stop, value.step)))
    return value


@contextlib.contextmanager
def _tagged(model: nn.Module, equations: list[Equation]) -> Iterator[None]:
    """While open, every size that a module keeps is tagged, and those it reads from its config."""
    undo = []
    try:
        for path, module in model.named_modules():
            of_config = {}
            for name, value in sizes_of(module).items():
                if isinstance(value, int):
                    tagged: Any = Size.of(value, ("attribute", path, name, None), equations)
                else:
                    tagged = type(value)(
                        [Size.of(n, ("attribute", path, name, i), equations) for i, n in enumerate(value)]
                    )
                if name.startswith("config."):
                    of_config[name.removeprefix("config.")] = tagged
                else:
                    undo.append((module, name, value, tagged))
                    vars(module)[name] = tagged
            if of_config:
                config = vars(module)["config"]
                vars(module)["config"] = config_view(config, of_config)
                undo.append((module, "config", config, vars(module)["config"]))
        yield
    finally:
        for module, name, value, tagged in undo:
            if vars(module).get(name) is tagged:
                vars(module)[name] = value


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
    model: nn.Module, mode: FakeTensorMode, shapes: Mapping[str, Sequence[int]] | None = None
) -> dict[str, torch.Tensor]:
    """Weightless stand-ins of every parameter and buffer, of other shapes if given; what is tied stays tied."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    device = next((t.device for _, t in tensors if t.device.type != "meta"), torch.device("cpu"))
    fakes: dict[int, torch.Tensor] = {}
    for name, t in tensors:
        if id(t) not in fakes:
            empty = torch.empty(t.shape if shapes is None else shapes[name], dtype=t.dtype, device="meta")
            fakes[id(t)] = FakeTensor(mode, empty, device if t.is_meta else t.device)
    return {name: fakes[id(t)] for name, t in tensors}


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
    names = parameters | persistent_buffers(model).keys()
    if fake:
        weights = fake_weights(model, mode)
        inputs = tree_map_only(torch.Tensor, mode.from_tensor, dict(inputs))
    else:
        weights = dict([*model.named_parameters(), *model.named_buffers()])
    sources = {name: recorder.add(weights[name]) for name in names if name in weights}
    sources = {name: sources[name] for name in weights if name in sources}
    paths = {module: path for path, module in model.named_modules()}

    def enter(module: nn.Module, _: Any) -> None:
        recorder.layers.append(paths.get(module, recorder.layers[-1]))

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        recorder.layers.pop()

    hooks = [
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave),
    ]
    try:
        with evaluating(model), _tagged(model, equations), mode, _Tagger(recorder, equations), recorder:
            output = torch.func.functional_call(model, weights, (), dict(inputs)) if fake else model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return Trace(recorder.calls, sources, parameters, [recorder.ref(t) for t in tensors_of(output)], equations, fake)
