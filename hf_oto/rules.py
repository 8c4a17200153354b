"""One short function per ATen op: how the dimensions it takes become the dimensions it gives.

`apply_rules` walks a trace once and fills the axis algebra; an op without a rule, or a rule that fails, pins.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_iter

from .axes import Algebra, Dim, Leaf, Mark, size, with_zero
from .trace import Call, Ref, Trace

logger = logging.getLogger(__name__)

OUTPUT = "it is part of the model's output"
MEETS = "it meets a position that stays (of an input or an index, say)"


# Whether the result of two operands is zero where they (or not) are: a + b, a * b, a / b, ...


def both(a: bool, b: bool) -> bool:
    return a and b


def either(a: bool, b: bool) -> bool:
    return a or b


def first(a: bool, b: bool) -> bool:
    return a


def second(a: bool, b: bool) -> bool:
    return b


def never(a: bool, b: bool) -> bool:
    return False


class Axes:
    """The dimensions of every tensor of a trace, filled in call order.

    Attributes:
        algebra: the union-find the dimensions live in.
        dims: value number -> its dimensions.
        calls: the calls that the outputs depend on.
        const: numbers of the values that depend on parameters and buffers only.
        chosen: numbers of the values that are parts of such, chosen by the data (an expert's weights, say).
    """

    def __init__(self) -> None:
        self.algebra = Algebra()
        self.dims: dict[int, list[Dim]] = {}
        self.calls: list[Call] = []
        self.const: set[int] = set()
        self.chosen: set[int] = set()
        self.layer = ""

    def of(self, ref: Ref) -> list[Dim]:
        """The dimensions of a tensor; one the trace did not see made (an input) can't be cut."""
        if ref.value not in self.dims:
            self.dims[ref.value] = [self.algebra.fixed(n) for n in ref.shape]
        return self.dims[ref.value]

    def source(self, ref: Ref, zeroed: bool) -> None:
        """A parameter, `zeroed` where removed, or a buffer, which is not: every dimension starts as fresh ids."""
        self.dims[ref.value] = [(self.algebra.new(n, zero=zeroed),) if n > 1 else () for n in ref.shape]
        self.const.add(ref.value)

    def why(self, text: str) -> str:
        """A reason with the layer it comes from."""
        return f"{text} in {self.layer}" if self.layer else text

    def pin(self, dim: Dim, text: str) -> None:
        """Pins with a reason."""
        self.algebra.pin(dim, self.why(text))

    def unify(self, a: Dim, b: Dim, zero: Callable[[bool, bool], bool] = both) -> Dim:
        """The common dimension of two operands of an elementwise op; size 1 broadcasts."""
        if not a or not b:
            long = a or b
            return tuple(Leaf(x.ids, zero(x.zero, False) if a else zero(False, x.zero)) for x in long)
        if size(a) != size(b):
            raise ValueError(f"sizes {size(a)} and {size(b)} don't match")
        pair = self.algebra.align(a, b, self.why(MEETS))
        if pair is None:
            return self.algebra.fixed(size(a))
        return tuple(Leaf(x.ids, zero(x.zero, y.zero)) for x, y in zip(*pair, strict=True))

    def weight(self, ref: Ref) -> int:
        """How much of a weight a tensor is: 2 made of parameters, 1 chosen from them by the data, 0 activations."""
        return 2 if ref.value in self.const else int(ref.value in self.chosen)

    def contract(self, a: Dim, b: Dim, a_weight: int, b_weight: int) -> None:
        """The summed dimension of a product: the weight's side consumes what the other side produces."""
        if not a or not b:
            return
        pair = self.algebra.align(a, b, self.why(MEETS))
        for x, y in zip(*pair, strict=True) if pair else ():
            weight, data = (x, y) if a_weight > b_weight else (y, x)
            if not (x.zero or y.zero):  # between activations, or a reader that can't be zeroed: a buffer, exp(weight)
                self.pin((x,), "summed over, and neither side becomes zero")
            if a_weight or b_weight:
                self.algebra.mark((weight,), Mark.CONSUMER if data.zero else Mark.CONSUMER | Mark.NOT_ZERO)
            if a_weight and b_weight:
                self.algebra.mark((data,), Mark.PRODUCER)

    def produce(self, ref: Ref, *dims: Dim) -> None:
        """Marks dimensions as made by a parameter, where the tensor comes from parameters."""
        if self.weight(ref):
            for dim in dims:
                self.algebra.mark(dim, Mark.PRODUCER)
                if any((self.algebra.marks[leaf.ids] & Mark.NORMED).any() for leaf in dim):
                    self.pin(dim, "a norm is taken over it")


# elementwise ---------------------------------------------------------------------------------------

KEEPS_ZERO = frozenset(  # f(0) = 0
    """relu gelu silu tanh neg abs sqrt sin erf tan asinh atan sign sgn round floor ceil trunc hardswish leaky_relu elu
    celu mish relu6 expm1 log1p square clone _to_copy detach alias lift lift_fresh contiguous nan_to_num native_dropout
    zeros_like _conj positive _prelu_kernel mul div logical_and bitwise_and""".split()
)
ALL_ZERO = frozenset("add sub maximum minimum where lerp hypot logical_or bitwise_or".split())
ANY_ZERO = frozenset("mul logical_and bitwise_and".split())
FIRST_ZERO = frozenset("div floor_divide remainder fmod copy _prelu_kernel".split())


def elementwise(s: Axes, call: Call) -> list[list[Dim]]:
    """... , ... -> ...: operands broadcast against each other; what is zero depends on the function."""
    name = base_name(call.op)
    refs = [a for a in tree_iter((call.args, call.kwargs), is_leaf=is_ref) if is_ref(a)]
    numbers = [a for a in call.args if isinstance(a, (int, float)) and not isinstance(a, bool)]
    if name == "where" and len(refs) == 3:  # the condition decides nothing about zeros
        refs = [*refs[1:], refs[0]]
    if name == "copy":
        refs = refs[::-1]
    many = len(refs) > 1
    out = call.outs[0].shape
    result: list[Dim] = [()] * len(out)
    for i, ref in enumerate(refs):
        dims = [()] * (len(out) - len(ref.shape)) + list(s.of(ref))
        if many:
            s.produce(ref, *dims)
        if i == 0:
            result = dims
            continue
        condition = name == "where" and i == 2
        zero = (
            first
            if condition or name in FIRST_ZERO
            else both
            if name in ALL_ZERO
            else either
            if name in ANY_ZERO
            else never
        )
        result = [s.unify(a, b, zero) for a, b in zip(result, dims, strict=True)]
    if not many and not _keeps_zero(name, call, numbers):
        result = [with_zero(dim, False) for dim in result]
    return [result] * len(call.outs)


def _keeps_zero(name: str, call: Call, numbers: list[float]) -> bool:
    if name in KEEPS_ZERO:
        return True
    if name in ("hardtanh", "clamp"):
        low, high = [*call.args[1:], *[None] * 3][:2]
        return (low is None or low <= 0) and (high is None or high >= 0)
    if name == "clamp_min":
        return numbers[0] <= 0
    if name == "clamp_max":
        return numbers[0] >= 0
    if name == "pow":
        return bool(numbers) and is_ref(call.args[0]) and numbers[0] > 0
    if name in ("add", "sub"):
        return numbers == [0]
    if name == "masked_fill":
        return len(call.args) > 2 and call.args[2] == 0
    return False


def masked_fill(s: Axes, call: Call) -> list[list[Dim]]:
    """x, mask -> x"""
    x, mask = s.of(call.args[0]), s.of(call.args[1])
    x = [()] * (len(call.outs[0].shape) - len(x)) + x
    mask = [()] * (len(x) - len(mask)) + mask
    keep = call.args[2] == 0
    return [[s.unify(a, b, lambda a, b: a and keep) for a, b in zip(x, mask, strict=True)]]


# layout --------------------------------------------------------------------------------------------


def view(s: Axes, call: Call) -> list[list[Dim]]:
    """the same elements in row-major order under another shape"""
    return [s.algebra.reshape(s.of(call.args[0]), call.outs[0].shape)]


def permute(s: Axes, call: Call) -> list[list[Dim]]:
    """dimensions reordered"""
    dims = s.of(call.args[0])
    return [[dims[d] for d in call.args[1]]]


def transpose(s: Axes, call: Call) -> list[list[Dim]]:
    """two dimensions exchanged; `t` the last two"""
    dims = list(s.of(call.args[0]))
    if len(dims) > 1:
        a, b = call.args[1:] if len(call.args) == 3 else (0, 1)
        dims[a], dims[b] = dims[b], dims[a]
    return [dims]


def unsqueeze(s: Axes, call: Call) -> list[list[Dim]]:
    """a dimension of size 1 appears"""
    dims, d = list(s.of(call.args[0])), call.args[1]
    dims.insert(d if d >= 0 else d + len(dims) + 1, ())
    return [dims]


def squeeze(s: Axes, call: Call) -> list[list[Dim]]:
    """dimensions of size 1 disappear"""
    ref = call.args[0]
    n = len(ref.shape)
    which = range(n) if len(call.args) == 1 else {d % n for d in as_list(call.args[1])}
    return [[dim for d, dim in enumerate(s.of(ref)) if not (d in which and ref.shape[d] == 1)]]


def expand(s: Axes, call: Call) -> list[list[Dim]]:
    """size 1 -> n: a new axis along which all is equal"""
    out = call.outs[0].shape
    dims = [()] * (len(out) - len(call.args[0].shape)) + list(s.of(call.args[0]))
    grown = [n > 1 and not dim for n, dim in zip(out, dims, strict=True)]
    return [[(s.algebra.new(n, marks=Mark.EXPANDED),) if g else d for n, d, g in zip(out, dims, grown, strict=True)]]


def repeat(s: Axes, call: Call) -> list[list[Dim]]:
    """n -> r n, the copies outermost"""
    out, times = call.outs[0].shape, call.args[1]
    dims = [()] * (len(out) - len(call.args[0].shape)) + list(s.of(call.args[0]))
    return [
        [(*((s.algebra.new(r, marks=Mark.EXPANDED),) if r > 1 else ()), *d) for r, d in zip(times, dims, strict=True)]
    ]


def slice_(s: Axes, call: Call) -> list[list[Dim]]:
    """positions start:stop:step of one dimension"""
    ref, d, start, stop, step = [*call.args, *[0, None, None, 1][len(call.args) - 1 :]]
    d %= len(ref.shape)
    n = ref.shape[d]
    index = np.arange(n)[slice(start, stop, step)]
    if step > 1 and n % step == 0 and len(index) == n // step:  # one of every `step`: these go together
        dims = list(s.of(ref))
        dims[d], inner = s.algebra.reshape([dims[d]], [n // step, step])
        s.pin(inner, "a fixed position of it is read")
        return [dims]
    if step > 1:
        s.pin(s.of(ref)[d], "its positions are read at a stride")
    return [_taken(s, ref, d, index)]


def _taken(s: Axes, ref: Ref, d: int, index: np.ndarray) -> list[Dim]:
    dims = list(s.of(ref))
    if len(index) == 0:
        dims[d] = s.algebra.fixed(0)
    elif len(index) != ref.shape[d] or not np.array_equal(index, np.arange(len(index))):
        dims[d] = s.algebra.take(dims[d], index)
    return dims


def select(s: Axes, call: Call) -> list[list[Dim]]:
    """one position of a dimension, which disappears"""
    ref, d = call.args[0], call.args[1] % len(call.args[0].shape)
    dims = list(s.of(ref))
    s.pin(dims.pop(d), "a fixed position of it is read")
    return [dims]


def unbind(s: Axes, call: Call) -> list[list[Dim]]:
    """every position of a dimension by itself"""
    ref = call.args[0]
    d = (call.args[1] if len(call.args) > 1 else 0) % len(ref.shape)
    dims = list(s.of(ref))
    s.pin(dims.pop(d), "its positions are read one by one")
    return [dims] * len(call.outs)


def split(s: Axes, call: Call) -> list[list[Dim]]:
    """pieces of a dimension"""
    ref = call.args[0]
    d = (call.args[2] if len(call.args) > 2 else call.kwargs.get("dim", 0)) % len(ref.shape)
    ends = np.cumsum([out.shape[d] for out in call.outs])
    return [_taken(s, ref, d, np.arange(end - out.shape[d], end)) for out, end in zip(call.outs, ends, strict=True)]


def cat(s: Axes, call: Call) -> list[list[Dim]]:
    """dimensions laid one after the other"""
    refs = [r for r in call.args[0] if r.shape != (0,)]
    n = len(refs[0].shape)
    d = (call.args[1] if len(call.args) > 1 else call.kwargs.get("dim", 0)) % n
    result = list(s.of(refs[0]))
    for ref in refs:
        s.produce(ref, *s.of(ref))
    for ref in refs[1:]:
        result = [a if i == d else s.unify(a, b) for i, (a, b) in enumerate(zip(result, s.of(ref), strict=True))]
    result[d] = s.algebra.cat([s.of(ref)[d] for ref in refs if ref.shape[d]])
    return [result]


def stack(s: Axes, call: Call) -> list[list[Dim]]:
    """tensors side by side along a new dimension, which can't be cut"""
    refs, d = call.args[0], (call.args[1] if len(call.args) > 1 else 0)
    result = list(s.of(refs[0]))
    for ref in refs:
        s.produce(ref, *s.of(ref))
    for ref in refs[1:]:
        result = [s.unify(a, b) for a, b in zip(result, s.of(ref), strict=True)]
    result.insert(d if d >= 0 else d + len(result) + 1, s.algebra.fixed(len(refs)))
    return [result]


def roll(s: Axes, call: Call) -> list[list[Dim]]:
    """positions rotated"""
    ref, shifts, dims = call.args[0], as_list(call.args[1]), as_list(call.args[2]) if len(call.args) > 2 else []
    if not dims:
        return unknown(s, call)
    result = list(s.of(ref))
    for shift, d in zip(shifts, dims, strict=True):
        if result[d]:
            result[d] = s.algebra.take(result[d], np.roll(np.arange(ref.shape[d]), shift))
    return [result]


def flip(s: Axes, call: Call) -> list[list[Dim]]:
    """positions reversed"""
    result = list(s.of(call.args[0]))
    for d in call.args[1]:
        if result[d]:
            result[d] = s.algebra.take(result[d], np.arange(call.args[0].shape[d])[::-1])
    return [result]


def pad(s: Axes, call: Call) -> list[list[Dim]]:
    """positions added (or taken away) at both ends"""
    ref, amounts = call.args[0], call.args[1]
    result = list(s.of(ref))
    for i in range(len(amounts) // 2):
        d = len(ref.shape) - 1 - i
        before, after = amounts[2 * i], amounts[2 * i + 1]
        n = ref.shape[d]
        if before or after:
            kept = _taken(s, ref, d, np.arange(max(0, -before), n + min(0, after)))[d]
            parts = [s.algebra.fixed(before)] * (before > 0) + [kept] + [s.algebra.fixed(after)] * (after > 0)
            result[d] = s.algebra.cat(parts)
    return [result]


def glu(s: Axes, call: Call) -> list[list[Dim]]:
    """two halves of a dimension, the first gated by the second"""
    ref = call.args[0]
    d = (call.args[1] if len(call.args) > 1 else -1) % len(ref.shape)
    n = ref.shape[d] // 2
    left, right = _taken(s, ref, d, np.arange(n)), _taken(s, ref, d, np.arange(n, 2 * n))
    left[d] = s.unify(left[d], right[d], first)
    return [left]


def pixel_shuffle(s: Axes, call: Call) -> list[list[Dim]]:
    """n (c r r) h w -> n c (h r) (w r)"""
    ref, r = call.args
    *batch, channels, h, w = s.of(ref)
    inner = s.algebra.reshape([channels], [ref.shape[-3] // r**2, r, r])
    for dim in (*inner[1:], h, w):
        s.pin(dim, "it becomes part of the image plane")
    return [[*batch, inner[0], *map(s.algebra.fixed, call.outs[0].shape[-2:])]]


# lookups -------------------------------------------------------------------------------------------


def embedding(s: Axes, call: Call) -> list[list[Dim]]:
    """v d, i -> i d"""
    weight, index = call.args[:2]
    table, d = s.of(weight)
    s.pin(table, "rows are looked up by number")
    s.produce(weight, d)
    return [[*s.of(index), d]]


def index_(s: Axes, call: Call) -> list[list[Dim]]:
    """x[i, j, ...]: indexed dimensions are looked up by number, the others stay"""
    ref, index = call.args
    dims, shape = s.of(ref), call.outs[0].shape
    used = [k for k, i in enumerate(index) if i is not None]
    mask = index[used[0]] if len(used) == 1 else None
    if mask is not None and len(mask.shape) > 1 and len(shape) == len(dims) - len(mask.shape) + 1:
        for dim in s.of(mask):  # a mask covers as many dimensions as it has
            s.pin(dim, "it is an index")
        index = [None] * used[0] + [None] * len(mask.shape)
        used = list(range(used[0], used[0] + len(mask.shape)))
    for k in used:
        s.pin(dims[k], "positions are looked up by number")
        for dim in s.of(index[k]) if index[k] is not None else ():
            s.pin(dim, "it is an index")
    rest = [dims[k] for k in range(len(dims)) if k not in used]
    if len(rest) > 1 and s.weight(ref):  # one matrix of several, an expert's: what it is used for says who produces
        for dim in rest:
            s.algebra.mark(dim, Mark.EXPERTS)
    else:
        s.produce(ref, *rest)
    new = len(shape) - len(rest)
    at = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    return [[*rest[:at], *map(s.algebra.fixed, shape[at : at + new]), *rest[at:]]]


def index_select(s: Axes, call: Call) -> list[list[Dim]]:
    """x[:, i]"""
    ref, d, index = call.args
    dims = list(s.of(ref))
    if dims:
        s.pin(dims[d], "positions are looked up by number")
        dims[d] = s.algebra.fixed(index.shape[0] if index.shape else 1)
    s.produce(ref, *dims)
    return [dims]


def gather(s: Axes, call: Call) -> list[list[Dim]]:
    """x[i, index[i, j]] -> i j: one dimension is looked up by number, the others go together"""
    ref, d, index = call.args[:3]
    dims, found = s.of(ref), list(s.of(index))
    d %= max(1, len(dims))
    for k, n in enumerate(index.shape):
        if k != d and n == ref.shape[k]:
            found[k] = s.unify(dims[k], found[k], first)
        elif dims:
            s.pin(dims[k], "positions are looked up by number")
            s.pin(found[k], "it is an index")
    s.produce(ref, *dims)
    return [found]


def view_as_real(s: Axes, call: Call) -> list[list[Dim]]:
    """a complex number is two positions of a new last dimension"""
    return [[*s.of(call.args[0]), s.algebra.fixed(2)]]


def view_as_complex(s: Axes, call: Call) -> list[list[Dim]]:
    """the inverse"""
    dims = list(s.of(call.args[0]))
    s.pin(dims.pop(), "it holds the parts of a complex number")
    return [dims]


# contractions --------------------------------------------------------------------------------------


def mm(s: Axes, call: Call) -> list[list[Dim]]:
    """... i k, ... k j -> ... i j: k is contracted; leading dimensions go together"""
    a, b = call.args[-2:] if base_name(call.op) in ("addmm", "baddbmm", "addmv") else call.args[:2]
    a_weight, b_weight = s.weight(a), s.weight(b)
    da, db = s.of(a), s.of(b)
    batch = [s.unify(x, y, either) for x, y in zip(da[:-2], db[:-2], strict=False)]
    if not (a_weight or b_weight):
        for dim in batch:
            s.algebra.mark(dim, Mark.HEADS)
    s.contract(da[-1], db[-2] if len(db) > 1 else db[-1], a_weight, b_weight)
    s.produce(a, *da[:-1])
    s.produce(b, *db[:-2], *db[-1:] if len(db) > 1 else ())
    out = [*batch, *da[-2:-1], *(db[-1:] if len(db) > 1 else ())]
    if len(call.args) > 2 and (a, b) != call.args[:2]:
        bias = call.args[0]
        db = [()] * (len(out) - len(bias.shape)) + list(s.of(bias))
        s.produce(bias, *db)
        out = [s.unify(x, y) for x, y in zip(out, db, strict=True)]
    return [out]


def convolution(s: Axes, call: Call) -> list[list[Dim]]:
    """b (g i) x, (g o) i k -> b (g o) x"""
    x, weight, bias, *_, transposed, _, groups = call.args[:9]
    batch, channels, *space = s.of(x)
    first, second, *kernel = s.of(weight)
    for dim in (*space, *kernel):
        s.pin(dim, "it is a spatial axis")
    x_weight, w_weight = s.weight(x), s.weight(weight)
    if groups > 1:
        outer = s.algebra.reshape([channels], [groups, x.shape[1] // groups])
        grouped = s.algebra.reshape([first], [groups, weight.shape[0] // groups])
        group = s.unify(outer[0], grouped[0], either)
        if weight.shape[1] > 1 or weight.shape[0] > groups:
            s.algebra.mark(group, Mark.GROUPS)
        else:
            s.algebra.mark(group, Mark.CHANNELS)
        if transposed:
            s.contract(outer[1], grouped[1], x_weight, w_weight)
            out = (*group, *second)
        else:
            s.contract(outer[1], second, x_weight, w_weight)
            out = (*group, *grouped[1])
        s.produce(weight, *grouped, *([second] if transposed else []))
    else:
        inside, out = (first, second) if transposed else (second, first)
        s.algebra.mark(out, Mark.CHANNELS)
        s.contract(channels, inside, x_weight, w_weight)
        s.produce(weight, out)
    if bias is not None:
        s.produce(bias, *s.of(bias))
        out = s.unify(out, s.of(bias)[0])
    else:
        out = tuple(out)
    return [[batch, out, *map(s.algebra.fixed, call.outs[0].shape[2:])]]


def attention(s: Axes, call: Call) -> list[list[Dim]]:
    """b h q d, b h k d, b h k v -> b h q v: heads go together, d and k are contracted"""
    q, k, v = call.args[:3]
    mask = next(
        (a for a in [call.kwargs.get("attn_mask"), call.kwargs.get("attn_bias"), *call.args[3:]] if is_ref(a)), None
    )
    dq, dk, dv = s.of(q), s.of(k), s.of(v)
    batch = s.unify(s.unify(dq[0], dk[0]), dv[0])
    shared = s.unify(dk[1], dv[1], second)
    heads = dq[1]
    if k.shape[1] != q.shape[1]:  # grouped queries
        group, each = s.algebra.reshape([heads], [k.shape[1], q.shape[1] // k.shape[1]])
        s.algebra.mark(each, Mark.EXPANDED)
        heads = (*s.unify(group, shared, second), *with_zero(each, False))
    else:
        heads = s.unify(heads, shared, second)
    s.algebra.mark(heads, Mark.HEADS)
    s.contract(dq[3], dk[3], 0, 0)
    for dim in (dk[2], dv[2]):
        s.pin(dim, "attention runs over it")
    if mask is not None:
        dm = [()] * (4 - len(mask.shape)) + list(s.of(mask))
        s.produce(mask, *dm)
        for a, b in zip((batch, heads, dq[2], dk[2]), dm, strict=True):
            s.unify(a, b)
    result = [batch, heads, dq[2], dv[3]]
    return [result] + [[s.algebra.fixed(n) for n in out.shape] for out in call.outs[1:]]


def solve_triangular(s: Axes, call: Call) -> list[list[Dim]]:
    """b n n, b n k -> b n k with ones on the diagonal: one triangular system for each of b"""
    if not (call.kwargs.get("unitriangular") and call.kwargs.get("left", True)):
        return unknown(s, call)
    matrix, known = s.of(call.args[0]), s.of(call.args[1])
    for ref in call.args:
        s.produce(ref, *s.of(ref))
    for dim in (*matrix[-2:], known[-2]):
        s.pin(dim, "a linear system is solved along it")
    batch = [s.unify(a, b, second) for a, b in zip(matrix[:-2], known[:-2], strict=True)]
    return [[*batch, *known[-2:]]]


def multiplications(call: Call) -> list[list[tuple[Ref, int]]]:
    """The dimensions whose sizes, multiplied, are the multiply-accumulates of a call; a list per product, summed.

    Matrix products, convolutions and attention count, biases and elementwise operations don't.
    """
    name = base_name(call.op)
    refs = [a for a in call.args if is_ref(a)]

    def all_of(ref: Ref, *but: int) -> list[tuple[Ref, int]]:
        return [(ref, d) for d in range(len(ref.shape)) if d not in but]

    if name in ("mm", "bmm", "mv", "dot", "addmm", "baddbmm", "addmv", "_grouped_mm"):
        a, b = refs[-2:] if name in ("addmm", "baddbmm", "addmv") else refs[:2]
        return [[*all_of(a), *([(b, len(b.shape) - 1)] if len(b.shape) > 1 else [])]]
    if name in ("convolution", "_convolution"):
        x, weight = refs[:2]
        image = x if call.args[6] else call.outs[0]  # a transposed one multiplies once per input position
        return [[*all_of(image, 1), *all_of(weight)]]
    if name.startswith("_scaled_dot_product"):
        q, k, v = refs[:3]
        return [[*all_of(q), (k, 2)], [*all_of(q, 3), (k, 2), (v, 3)]]
    return []


# normalisations and reductions ---------------------------------------------------------------------


def softmax(s: Axes, call: Call) -> list[list[Dim]]:
    """normalised over one dimension"""
    dims = s.of(call.args[0])
    if dims:
        s.pin(dims[call.args[1]], "a softmax runs over it")
    return [[with_zero(dim, False) for dim in dims]]


def layer_norm(s: Axes, call: Call) -> list[list[Dim]]:
    """normalised over the last dimensions: their mean and variance would change"""
    x, shape = call.args[:2]
    dims = list(s.of(x))
    for d in range(len(dims) - len(shape), len(dims)):
        s.pin(dims[d], "a layer norm takes mean and variance over it")
    for affine in call.args[2:4]:
        if is_ref(affine):
            s.produce(affine, *s.of(affine))
            tail = [s.unify(a, b) for a, b in zip(dims[-len(shape) :], s.of(affine), strict=True)]
            dims[-len(shape) :] = tail
    kept = dims[: len(dims) - len(shape)]
    stats = [[*[with_zero(d, False) for d in kept], *[()] * (len(out.shape) - len(kept))] for out in call.outs[1:]]
    return [[*[with_zero(d, False) for d in kept], *dims[-len(shape) :]], *stats]


def batch_norm(s: Axes, call: Call) -> list[list[Dim]]:
    """b c x: each channel by its own statistics"""
    x, weight, bias = call.args[:3]
    dims = list(s.of(x))
    for d, dim in enumerate(dims):
        if d != 1:
            s.pin(dim, "a batch norm averages over it")
    channels = with_zero(dims[1], is_ref(weight) and (bias is None or is_ref(bias)))
    for vector in call.args[1:5]:
        if is_ref(vector):
            s.produce(vector, *s.of(vector))
            channels = s.unify(channels, s.of(vector)[0], first)
    dims[1] = channels
    return [dims] + [
        [channels] if len(out.shape) == 1 and out.shape[0] else [() for _ in out.shape] for out in call.outs[1:]
    ]


def group_norm(s: Axes, call: Call) -> list[list[Dim]]:
    """b (g c) x: each group by its own statistics, so that whole groups go"""
    x, weight, bias, _, channels, _, groups, _ = call.args
    dims = list(s.of(x))
    outer, inner = s.algebra.reshape([dims[1]], [groups, channels // groups])
    s.pin(inner, "a group norm takes mean and variance over it")
    s.algebra.mark(outer, Mark.GROUPS)
    dim = with_zero((*outer, *inner), is_ref(weight) and is_ref(bias))
    for affine in (weight, bias):
        if is_ref(affine):
            s.produce(affine, *s.of(affine))
            dim = s.unify(dim, s.of(affine)[0], first)
    dims[1] = dim
    return [dims] + [[dims[0], with_zero(outer, False)] for _ in call.outs[1:]]


def weight_norm(s: Axes, call: Call) -> list[list[Dim]]:
    """v g / |v|, the norm over all dimensions but one: along that a zero g silences and a zero v gives 0 / 0; what
    reads along the others has to be zero, for the norm's sake"""
    v, g = call.args[:2]
    d = call.args[2] if len(call.args) > 2 else 0
    dims = list(s.of(v))
    s.algebra.mark(dims[d], Mark.FOLLOWER)
    dims[d] = s.unify(s.of(g)[d], dims[d], first)
    for k, dim in enumerate(dims):
        if k != d:
            s.algebra.mark(dim, Mark.NORMED | Mark.NOT_ZERO)
    return [dims, *[[s.algebra.fixed(n) for n in out.shape] for out in call.outs[1:]]]


def reduced_dims(call: Call, at: int = 1) -> set[int]:
    """The dimensions that a reduction runs over; `at`: the place of that argument."""
    n = len(call.args[0].shape)
    given = call.args[at] if len(call.args) > at else call.kwargs.get("dim")
    if isinstance(given, bool):
        given = None
    return set(range(n)) if given is None or given == [] else {d % n for d in as_list(given) if n}


def _reduced(s: Axes, call: Call, harmless: Callable[[Leaf], bool], why: str, at: int = 1) -> list[list[Dim]]:
    ref = call.args[0]
    n, which = len(ref.shape), reduced_dims(call, at)
    dims = s.of(ref)
    for d in which:
        for leaf in dims[d]:
            if not harmless(leaf):
                s.pin((leaf,), why)
    keep = len(call.outs[0].shape) == n
    result = [() if d in which else dim for d, dim in enumerate(dims) if keep or d not in which]
    return [result] * len(call.outs)


def sum_(s: Axes, call: Call) -> list[list[Dim]]:
    """summed over some dimensions: zeros change nothing"""
    s.produce(call.args[0], *s.of(call.args[0]))
    return _reduced(s, call, lambda leaf: leaf.zero, "it is summed over, and removed positions would not be zero")


def vector_norm(s: Axes, call: Call) -> list[list[Dim]]:
    """a p-norm over some dimensions: zeros change nothing"""
    s.produce(call.args[0], *s.of(call.args[0]))
    return _reduced(s, call, lambda leaf: leaf.zero, "a norm is taken over it", at=2)


def mean(s: Axes, call: Call) -> list[list[Dim]]:
    """averaged over some dimensions: zeros change only the number of positions, and scales.py sees to that"""
    zeros = base_name(call.op) == "mean" and not s.weight(call.args[0])
    result = _reduced(s, call, lambda leaf: zeros and leaf.zero, "an average is taken over it")
    return result if "mean" in base_name(call.op) else [[with_zero(d, False) for d in dims] for dims in result]


def along(s: Axes, call: Call) -> list[list[Dim]]:
    """ordered or accumulated along one dimension, which stays"""
    dims = list(s.of(call.args[0]))
    numbers = [a for a in call.args[1:] if isinstance(a, int) and not isinstance(a, bool)]
    d = call.kwargs.get(
        "dim",
        {"topk": (numbers[1:] or [-1])[0], "sort": (numbers or [-1])[0]}.get(base_name(call.op), (numbers or [0])[0]),
    )
    if dims:
        s.pin(dims[d], f"{base_name(call.op)} runs along it")
        dims[d] = s.algebra.fixed(call.outs[0].shape[d])
    return [[with_zero(dim, False) for dim in dims]] * len(call.outs)


def spatial(s: Axes, call: Call) -> list[list[Dim]]:
    """b c x -> b c y: pooling and resizing within the image plane"""
    name = base_name(call.op)
    k = next(n for n in (1, 2, 3) if f"{n}d" in name or {1: "linear1", 2: "bi", 3: "tri"}[n] in name)
    dims = list(s.of(call.args[0]))
    for dim in dims[-k:]:
        s.pin(dim, "it is a spatial axis")
    return [[*dims[:-k], *map(s.algebra.fixed, out.shape[-k:])] for out in call.outs]


# new tensors and the rest --------------------------------------------------------------------------


def fill(s: Axes, call: Call) -> list[list[Dim]]:
    """a new tensor that is the same everywhere: its axes are whatever meets them"""
    return [[(s.algebra.new(n),) if n > 1 else () for n in out.shape] for out in call.outs]


def count(s: Axes, call: Call) -> list[list[Dim]]:
    """a new tensor whose values are positions"""
    return [[s.algebra.fixed(n) for n in out.shape] for out in call.outs]


def unknown(s: Axes, call: Call) -> list[list[Dim]]:
    """no rule: nothing that takes part may be cut"""
    return _all_pinned(s, call, f"{base_name(call.op)} has no rule")


def lookup(s: Axes, call: Call) -> list[list[Dim]]:
    """positions found by number at run time: nothing that takes part may be cut"""
    return _all_pinned(s, call, "positions are looked up by number")


def _all_pinned(s: Axes, call: Call, why: str) -> list[list[Dim]]:
    for a in tree_iter((call.args, call.kwargs), is_leaf=is_ref):
        if is_ref(a):
            s.produce(a, *s.of(a))
            for dim in s.of(a):
                s.pin(dim, why)
    return [[s.algebra.fixed(n) for n in out.shape] for out in call.outs]


def base_name(op: torch._ops.OpOverload) -> str:
    """aten::add_.Tensor -> add"""
    name = op._schema.name.split("::")[1]
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def is_ref(a: Any) -> bool:
    """Whether an argument is a tensor."""
    return isinstance(a, Ref)


def as_list(a: int | Sequence[int]) -> list[int]:
    """One dimension or several, as a list."""
    return [a] if isinstance(a, int) else list(a)


_NAMES: dict[Callable[[Axes, Call], list[list[Dim]]], str] = {
    elementwise: """_to_copy copy hardswish native_dropout alias detach lift_fresh lift contiguous rsub zeros_like
        ones_like full_like empty_like rand_like randn_like bernoulli fill zero _prelu_kernel
        tril triu _conj positive floor_divide""",
    masked_fill: "masked_fill",
    view: "view _unsafe_view reshape _reshape_alias",
    permute: "permute",
    transpose: "transpose t",
    unsqueeze: "unsqueeze",
    squeeze: "squeeze",
    expand: "expand",
    repeat: "repeat",
    slice_: "slice",
    select: "select",
    unbind: "unbind",
    split: "split split_with_sizes unsafe_split chunk unsafe_chunk split_copy split_with_sizes_copy",
    cat: "cat",
    stack: "stack",
    roll: "roll",
    flip: "flip",
    pad: "constant_pad_nd",
    glu: "glu",
    pixel_shuffle: "pixel_shuffle",
    embedding: "embedding",
    view_as_real: "view_as_real",
    view_as_complex: "view_as_complex",
    weight_norm: "_weight_norm_interface",
    index_: "index",
    index_select: "index_select",
    gather: "gather",
    lookup: """scatter scatter_add index_put index_add index_copy bucketize searchsorted nonzero masked_select
        one_hot histc _local_scalar_dense""",
    mm: "mm addmm bmm baddbmm mv dot",
    convolution: "convolution _convolution",
    attention: """_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention
        _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
        _scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math""",
    solve_triangular: "linalg_solve_triangular",
    softmax: "_softmax _log_softmax _safe_softmax",
    layer_norm: "native_layer_norm",
    batch_norm: """native_batch_norm _native_batch_norm_legit_no_training _native_batch_norm_legit cudnn_batch_norm
        miopen_batch_norm _batch_norm_no_update""",
    group_norm: "native_group_norm",
    sum_: "sum",
    vector_norm: "linalg_vector_norm",
    mean: "mean var std var_mean std_mean amax amin max min prod all any argmax argmin logsumexp",
    along: "cumsum cumprod topk sort logcumsumexp",
    spatial: """max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d
        avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_max_pool2d upsample_nearest1d
        upsample_nearest2d upsample_bilinear2d upsample_bicubic2d _upsample_bicubic2d_aa _upsample_bilinear2d_aa
        upsample_linear1d grid_sampler_2d reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d""",
    fill: """zeros ones full empty new_zeros new_ones new_full new_empty scalar_tensor rand randn empty_strided
        new_empty_strided""",
    count: "arange linspace eye tril_indices triu_indices randint randperm",
}
RULES = {name: rule for rule, names in _NAMES.items() for name in names.split()}


def _live(trace: Trace) -> list[Call]:
    """The calls that the outputs depend on: what is computed and thrown away decides nothing."""
    needed = {ref.value for ref in trace.outputs}
    live = []
    for call in reversed(trace.calls):
        if not call.outs or call.op._schema.is_mutable or any(ref.value in needed for ref in call.outs):
            live.append(call)
            needed |= {a.value for a in tree_iter((call.args, call.kwargs), is_leaf=is_ref) if is_ref(a)}
    return live[::-1]


def apply_rules(trace: Trace) -> Axes:
    """The dimensions of every tensor of the trace, unified and pinned as its calls demand."""
    s = Axes()
    for name, ref in trace.sources.items():
        s.source(ref, name in trace.parameters)
    s.algebra.reason(OUTPUT)  # the first: what a person should read, if there are others too
    missing: set[str] = set()
    s.calls = _live(trace)
    for call in s.calls:
        s.layer = call.layer
        name = base_name(call.op)
        rule = RULES.get(name, elementwise if torch.Tag.pointwise in call.op.tags else unknown)
        problem = "it has no rule"
        try:
            outs = rule(s, call)
            for ref, dims in zip(call.outs, outs, strict=True):
                if [size(dim) if 0 not in ref.shape else 0 for dim in dims] != [
                    n if 0 not in ref.shape else 0 for n in ref.shape
                ]:
                    raise ValueError(f"the rule gives {[size(dim) for dim in dims]} for {ref.shape}")
        except Exception as error:  # a rule that fails must pin, never raise and never guess
            rule, outs, problem = unknown, unknown(s, call), f"its rule failed ({type(error).__name__}: {error})"
        if rule is unknown and call.outs and name not in missing:
            missing.add(name)
            logger.info("tensors of %s are pinned: %s, in %s", name, problem, call.layer)
        refs = [a for a in tree_iter((call.args, call.kwargs), is_leaf=is_ref) if is_ref(a)]
        const = all(s.weight(a) == 2 for a in refs)
        chosen = not const and s.weight(refs[0]) > 0 and (len(refs) == 1 or rule in (index_, index_select, gather))
        for ref, dims in zip(call.outs, outs, strict=True):
            s.dims[ref.value] = dims
            s.const |= {ref.value} if const else set()
            s.chosen |= {ref.value} if chosen else set()
    for ref in trace.outputs:
        for dim in s.of(ref):
            s.algebra.pin(dim, OUTPUT)
    return s
