"""Wide arithmetic: whatever dtype a model is stored in, its forward is that of its copy in double, and nothing of it
changes."""

import copy
import gc
import weakref

import pytest
import torch
from models import TABLE, make, randomise_, waves
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import hf_oto.wide
from hf_oto.wide import WideArithmetic, storage_of, wide_dtype

LOW = [torch.float32, torch.bfloat16, torch.float16]
EXACT = 1e-12  # of the largest entry


def converted(inputs, dtype):
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}


def flat(out):
    if isinstance(out, torch.Tensor):
        return [out]
    parts = out.values() if isinstance(out, dict) else out if isinstance(out, (list, tuple)) else []
    return [t for part in parts for t in flat(part)]


def run(model, inputs, mode=None):
    """Every tensor that a model returns, of copies of the inputs."""
    torch.manual_seed(0)
    with torch.no_grad(), mode or torch.no_grad():
        return flat(model(**{name: t.clone() for name, t in inputs.items()}))


def apart(a, b):
    """The largest difference of two lists of tensors, relative to the largest entry of each; shapes must be equal."""
    assert [t.shape for t in a] == [t.shape for t in b]
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        x, y = (t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (x, y))
        finite = torch.isfinite(x) & torch.isfinite(y)
        assert torch.equal(x[~finite].isnan(), y[~finite].isnan())
        if finite.any():
            worst = max(worst, float((x - y)[finite].abs().max() / x[finite].abs().max().clamp_min(1e-30)))
    return worst


class InDouble(TorchFunctionMode):
    """An independent reference: wherever a forward asks for a smaller float, it gets a double."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16):
            return args[0].double()
        small = lambda d: torch.float64 if d in LOW else d  # noqa: E731
        args, kwargs = tree_map_only(torch.dtype, small, (args, kwargs or {}))
        return func(*args, **kwargs)


# the table


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", TABLE)
def test_a_model_of_any_dtype_computes_as_its_copy_in_double(name, dtype):
    model, inputs = make(name).eval().to(dtype), converted(TABLE[name].inputs(2), dtype)
    state = {key: t.clone() for key, t in model.state_dict().items()}
    versions = {key: t._version for key, t in model.state_dict().items()}
    double = copy.deepcopy(model).double(), converted(inputs, torch.float64)
    given = {key: t.clone() for key, t in inputs.items()}
    mode, other = WideArithmetic(), WideArithmetic()
    torch.manual_seed(0)
    with torch.no_grad(), mode:
        structure = model(**inputs)
    wide = flat(structure)
    exact = run(*double, other)
    plain = run(model, inputs)
    assert mode.narrow == other.narrow == {}
    assert apart(exact, wide) <= EXACT
    limit = 1e-4 if dtype == torch.bfloat16 else 1e-5 if dtype == torch.float16 else 1e-8
    assert apart(exact, plain) > limit  # negative control
    assert apart(exact, plain) < 0.05  # and it is the same function
    assert all(t.dtype == torch.float64 for t in wide if t.is_floating_point())
    assert type(structure) is type(model(**inputs))
    assert all(torch.equal(t, state[key]) for key, t in model.state_dict().items())
    assert {key: t._version for key, t in model.state_dict().items()} == versions
    assert all(torch.equal(t, given[key]) for key, t in inputs.items())


ODD = {"mixtral", "gpt_oss", "vit_mae"}  # grouped products know no double; random draws differ by dtype


@pytest.mark.parametrize("name", sorted(TABLE.keys() - ODD))
def test_what_is_computed_is_what_torch_computes_in_double(name):
    """The reference runs without the mode: a copy in double, its casts to smaller floats turned into doubles."""
    model, inputs = make(name).eval().bfloat16(), converted(TABLE[name].inputs(2), torch.bfloat16)
    reference = run(copy.deepcopy(model).double(), converted(inputs, torch.float64), InDouble())
    assert apart(reference, run(model, inputs, WideArithmetic())) <= 1e-6  # constants torch makes in float32
    assert apart(reference, run(model, inputs)) > 1e-4


# kinds of operations: a small module, (its inputs), each in every dtype


class Lambda(nn.Module):
    """A function of its own parameters and an input."""

    def __init__(self, function, *layers, **buffers):
        super().__init__()
        self.function = function
        self.layers = nn.ModuleList(layers)
        self.table = nn.Parameter(torch.zeros(9, 6))
        for name, b in buffers.items():
            self.register_buffer(name, b)

    def forward(self, x):
        return self.function(self, x)


def in_place(m, x):
    y = m.layers[0](x)
    y.mul_(m.table[0, 0]).add_(m.layers[0].bias).clamp_(-1)
    y[:, 1] += m.table[1, :6]
    y[:, 0] = m.table[0]
    y.masked_fill_(y > 0.5, torch.finfo(y.dtype).min / 2).clamp_min_(-3)
    y.index_put_((torch.tensor([0]),), m.table[2])
    y.index_add_(1, torch.tensor([0, 2]), m.table[:2].expand(2, 2, 6))
    return y.scatter_add_(1, torch.zeros(2, 1, 6).long(), y.clone())


def written_out(m, x):
    y = torch.empty(0)
    torch.add(x, m.table[0], out=y)
    z = torch.empty(2, 3, 6, dtype=x.dtype)
    torch.mul(y, m.table[1], out=z)
    return torch.matmul(z, m.table.T, out=torch.empty(2, 3, 9))


def accumulated(m, x):
    total, count = torch.tensor(0.0), torch.zeros(6)
    for row in x.unbind(1):
        total += (row * m.table[0]).sum()
        count += row.sum(0) * m.table[1]
    return count + total


def autocast(m, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m.layers[0](x)
        z = torch.matmul(y, m.table.T)
    with torch.autocast("cpu", enabled=False):
        return z.float() @ m.table.float()


def casts(m, x):
    y = m.layers[0](x.to(torch.bfloat16).to(x.dtype)).float().half().type_as(x)
    z = torch.zeros(2, 3, 6, dtype=torch.float16).copy_(y) + torch.full((6,), 0.5, dtype=torch.bfloat16)
    return torch.softmax(z, -1, dtype=torch.float32).to(m.table.dtype) * torch.arange(6, dtype=torch.float32)


def attention(m, x):
    q = m.layers[0](x).view(2, 3, 2, 3).transpose(1, 2)
    k, v = (q[:, :1] * m.table[0, :3]), q[:, 1:] + m.table[1, :3]
    mask = torch.full((3, 3), torch.finfo(m.table.dtype).min, dtype=m.table.dtype).triu(1)
    bias = m.bias.view(1, 1, 3, 3)
    return [
        F.scaled_dot_product_attention(q, q, q, attn_mask=mask),
        F.scaled_dot_product_attention(q, q, q, attn_mask=bias, scale=0.3),
        F.scaled_dot_product_attention(q, q, q, is_causal=True),
        F.scaled_dot_product_attention(q, q, q, attn_mask=bias > 0),
        F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        F.scaled_dot_product_attention(m.table.view(1, 1, 9, 6), m.table.view(1, 1, 9, 6), m.table.view(1, 1, 9, 6)),
    ]


def complex_numbers(m, x):
    turn = torch.polar(torch.ones(3, dtype=torch.float32), m.table[0, :3].float())
    z = torch.view_as_complex(m.layers[0](x).float().reshape(2, 3, 3, 2)) * turn * m.phases
    spectrum = torch.fft.rfft(x.float() * m.table[1].float(), dim=-1)
    back = torch.fft.irfft(spectrum * torch.complex(m.table[2, :4].float(), m.table[3, :4].float()), n=6)
    return torch.view_as_real(z), z, back, torch.fft.fft2(z).abs()


def chosen(m, x):
    ids = torch.tensor([[0, 3, 8], [1, 1, 2]])
    y = F.embedding(ids, m.table) + m.table[ids] + m.table.index_select(0, ids[0])  # (2, 3, 6)
    y = y + m.table.gather(0, ids.repeat(1, 2))[:1] + x
    return y, F.embedding_bag(ids, m.table), m.table[m.table > 0] + m.table[0, 0]


def ordered(m, x):
    y = m.layers[0](x)
    top = y.topk(3, -1)
    return [top.values, top.indices, y.sort(-1).values, y.argmax(-1), y.cumsum(1), y.cummax(1).values]


def branches(m, x):
    y = m.layers[0](x)
    y = y * 2 if y.sum().item() > 0 else y - m.table[0]
    if y.dtype == m.table.dtype:  # what a forward can see of the mode
        y = y + 0
    return torch.where(y > 0, y, torch.tensor(0.1)) + torch.where(y > 0, m.table[0, 0], 0.0)


def views(m, x):
    y = m.table.view(3, 3, 6).permute(1, 0, 2)[:, 1:].expand(3, 2, 6).unflatten(-1, (2, 3)).flatten(0)
    parts = m.layers[0](x).chunk(2, -1)
    return y * 2, torch.cat([*parts, m.table.split(3)[0].expand(2, 3, 6)], -1), torch.stack(parts).unfold(-1, 2, 1)


def normed(m, x):
    y = F.rms_norm(F.layer_norm(x * m.table[0], (6,), m.table[1], m.table[2]), (6,), m.table[3])
    y = F.group_norm(y, 3, m.table[0, :3], m.table[1, :3])
    return F.instance_norm(y), F.normalize(y, dim=-1), F.cosine_similarity(y, m.table[:3], -1), torch.cdist(y, y)


def experts(m, x):
    tokens = m.layers[0](x).flatten(0, 1)
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)  # the second expert has none, the last token no expert
    return F.grouped_mm(tokens.to(m.stack.dtype), m.stack, offs=ends)[:5]


def solved(m, x):
    a = m.layers[0](x)[..., :3].float() + 4 * torch.eye(3)
    return (
        torch.linalg.solve_triangular(a.tril(), a, upper=False),
        torch.linalg.inv(a),
        torch.einsum("bij,bjk->ik", a, a),
    )


def transposed(m, x):
    z = m.layers[1](m.layers[0](x.transpose(1, 2)).relu())
    return m.layers[2](z) + F.conv1d(z, m.layers[0].weight[:, :4], padding="same")


def through_time(m, x):
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 2]), batch_first=True)
    y, (h, c) = m.layers[0](packed)
    y = nn.utils.rnn.pad_packed_sequence(y, batch_first=True)[0]
    z, g = m.layers[1](y)
    r, _ = m.layers[2](input=z, hx=torch.zeros(1, 2, 3, dtype=x.dtype))
    cell = m.layers[3](r[:, 0])
    return [y, h, c, z, g, r, cell]


def encoder(m, x):
    return m.layers[0](x), m.layers[0](x, mask=m.bias, src_key_padding_mask=m.bias[:2])


KINDS = {
    "in_place": Lambda(in_place, nn.Linear(6, 6)),
    "out": Lambda(written_out),
    "accumulated": Lambda(accumulated),
    "autocast": Lambda(autocast, nn.Linear(6, 6)),
    "casts": Lambda(casts, nn.Linear(6, 6)),
    "attention": Lambda(attention, nn.Linear(6, 6), bias=waves(3, 3)),
    "complex": Lambda(complex_numbers, nn.Linear(6, 6)),
    "chosen": Lambda(chosen),
    "ordered": Lambda(ordered, nn.Linear(6, 6)),
    "branches": Lambda(branches, nn.Linear(6, 6)),
    "views": Lambda(views, nn.Linear(6, 6)),
    "normed": Lambda(normed),
    "experts": Lambda(experts, nn.Linear(6, 8), stack=waves(3, 8, 8)),
    "solved": Lambda(solved, nn.Linear(6, 6)),
    "convolutions": Lambda(
        transposed,
        nn.Conv1d(6, 8, 3, padding=1),
        nn.ConvTranspose1d(8, 4, 2, groups=2),
        nn.Conv1d(4, 8, 1, bias=False),
    ),
    "recurrent": Lambda(
        through_time,
        nn.LSTM(6, 5, 2, batch_first=True, bidirectional=True, proj_size=3),
        nn.GRU(6, 4, batch_first=True),
        nn.RNN(4, 3, batch_first=True),
        nn.GRUCell(3, 2),
    ),
    "encoder": Lambda(encoder, nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 9, 0.0, batch_first=True), 2)),
}
KINDS["encoder"].register_buffer("bias", waves(3, 3))
KINDS["complex"].phases = torch.polar(torch.ones(3), waves(3))  # what is complex stays so in `model.half()`


@pytest.fixture
def no_fast_path():
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_operation(kind, dtype, no_fast_path):
    model = randomise_(copy.deepcopy(KINDS[kind])).eval().to(dtype)
    inputs = {"x": waves(2, 3, 6).to(dtype)}
    double = copy.deepcopy(model).double()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    mode, other = WideArithmetic(), WideArithmetic()
    wide = run(model, inputs, mode)
    exact = run(double, converted(inputs, torch.float64), other)
    assert mode.narrow == {} == other.narrow
    assert all(t.dtype in (torch.float64, torch.complex128, torch.int64) for t in wide)
    assert apart(exact, wide) <= EXACT
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    if kind not in ("experts", "out"):  # torch has no grouped product in double, and its `out=` must be one
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "autocast", lambda *_, **__: torch.no_grad())
            reference = run(double, converted(inputs, torch.float64), InDouble())
        assert apart(reference, wide) <= 1e-7  # 0.1 is made in float32
    try:
        plain = run(model, inputs)
    except RuntimeError:
        return  # not in this dtype, or not without autocast
    assert apart(exact, plain) > (1e-9 if dtype == torch.float32 else 1e-5)  # negative control


def vmapped(m, x):
    return torch.vmap(lambda row: m.layers[0](row) * m.table[0])(x)


def inference(m, x):
    with torch.inference_mode():
        return m.layers[0](x) * 2


def checkpointed(m, x):
    return torch.utils.checkpoint.checkpoint(m.layers[0], x, use_reentrant=False) * 2


def flexible(m, x):
    q = m.layers[0](x).unsqueeze(1)
    return flex_attention(q, q, x.unsqueeze(1))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # that is what the stance asks for
@pytest.mark.parametrize("function", [vmapped, inference, checkpointed, flexible])
def test_every_way_to_run_operations(function):
    model, inputs = randomise_(Lambda(function, nn.Linear(6, 6))).bfloat16(), {"x": waves(2, 3, 6).bfloat16()}
    double, mode = copy.deepcopy(model).double(), WideArithmetic()
    with torch.compiler.set_stance("force_eager"):  # as the caller does
        wide = run(model, inputs, mode)
        exact = run(double, converted(inputs, torch.float64))
        assert apart(exact, wide) <= EXACT < apart(exact, run(model, inputs))
    assert mode.narrow == {}


def test_running_statistics_are_kept_in_their_own_dtype():
    """Batch norm in train mode: the output is exact, the buffers take the new statistics, rounded once."""
    model = randomise_(nn.Sequential(nn.Conv1d(6, 6, 1), nn.BatchNorm1d(6))).bfloat16()
    double = copy.deepcopy(model).double()
    inputs = {"input": waves(2, 6, 5).bfloat16()}
    before = model[1].running_mean.clone()
    for training in (False, True):
        model.train(training), double.train(training)
        wide = run(model, inputs, WideArithmetic())
        assert apart(run(double, converted(inputs, torch.float64)), wide) <= EXACT
        assert torch.equal(model[1].running_mean, before) is not training
    assert torch.equal(model[1].running_mean, double[1].running_mean.bfloat16())
    assert torch.equal(model[1].running_var, double[1].running_var.bfloat16())
    assert model[1].num_batches_tracked == 1


def test_writes_into_stored_tensors_keep_their_dtype():
    buffer, given = waves(6).bfloat16(), waves(6).bfloat16()
    expected = (buffer.double() + given.double() / 3).bfloat16()
    with torch.no_grad(), WideArithmetic():
        third = given / 3
        assert third.dtype == torch.float64
        assert buffer.add_(third) is buffer
    assert torch.equal(buffer, expected)
    out = torch.empty(0, dtype=torch.bfloat16)
    with torch.no_grad(), WideArithmetic():
        torch.mul(third, given, out=out)
    assert torch.equal(out, (third * given.double()).bfloat16())


# what knows no double


def counting(name, body):
    """A custom op of somebody else's and the number of times it ran."""
    calls = []

    def op(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        calls.append(x.dtype)
        return body(x, w)

    torch.library.custom_op(f"hf_oto_wide::{name}", mutates_args=())(op)
    return getattr(torch.ops.hf_oto_wide, name), calls


def small_only(dtypes):
    def body(x, w):
        if x.dtype not in dtypes:
            raise TypeError(f"no kernel for {x.dtype}")
        return x @ w.T

    return body


def out_of_memory(x, w):
    raise torch.OutOfMemoryError("no memory left")


def out_of_main_memory(x, w):
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory")


OPS = {  # op -> the dtype it really computes in, None for the wide one
    "any": (counting("any", lambda x, w: x @ w.T), None),
    "flipped": (counting("flipped", lambda x, w: x.flip(-1)), None),
    "single": (counting("single", small_only([torch.float32])), torch.float32),
    "brain": (counting("brain", small_only([torch.bfloat16])), torch.bfloat16),
    "silent": (counting("silent", lambda x, w: (x.float() @ w.float().T).to(x.dtype)), torch.float32),
    "silent_brain": (counting("silent_brain", lambda x, w: x.bfloat16().to(x.dtype)), torch.bfloat16),
    "misread": (counting("misread", lambda x, w: x.view(torch.int32).float().sum(-1)), torch.bfloat16),
    "found": (counting("found", lambda x, w: (x @ w.T).argmax(-1)), None),
}


@pytest.mark.parametrize("name", OPS)
def test_an_op_that_knows_no_double_is_noted(name):
    (op, _), really = OPS[name]
    model = randomise_(Lambda(lambda m, x: op(m.layers[0](x), m.table), nn.Linear(6, 6))).bfloat16()
    mode = WideArithmetic()
    (wide,) = run(model, {"x": waves(2, 3, 6).bfloat16()}, mode)
    assert mode.narrow == ({f"hf_oto_wide::{name}": really} if really else {})
    assert wide.dtype == (torch.int64 if name == "found" else torch.float64)


@pytest.mark.parametrize("body", [out_of_memory, out_of_main_memory])
def test_no_memory_is_no_missing_kernel(body):
    op, calls = counting(body.__name__, body)
    mode = WideArithmetic()
    with torch.no_grad(), mode, pytest.raises(RuntimeError, match="memory"):
        op(waves(2, 6), waves(3, 6))
    assert len(calls) == 1 and mode.narrow == {}


def test_an_error_of_the_model_is_its_own():
    before = nn.RNNBase.check_input
    with torch.no_grad(), WideArithmetic() as mode:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            nn.Linear(3, 4)(waves(2, 5))
        with pytest.raises(ValueError, match="mine"):
            Lambda(lambda m, x: exec('raise ValueError("mine")'))(1)
        assert mode.narrow == {}
    with pytest.raises(KeyError), WideArithmetic():
        raise KeyError
    assert nn.RNNBase.check_input is before
    assert nn.Linear(3, 4)(waves(2, 3)).dtype == torch.float32


class Packed(torch.Tensor):
    """A subclass that dispatches by itself and can only bfloat16, as quantised and sharded tensors do."""

    @staticmethod
    def __new__(cls, inside):
        return torch.Tensor._make_wrapper_subclass(cls, inside.shape, dtype=inside.dtype)

    def __init__(self, inside):
        self.inside = inside

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args = tree_map_only(Packed, lambda t: t.inside, args)
        assert all(t.dtype == torch.bfloat16 for t in args if isinstance(t, torch.Tensor))
        out = func(*args, **(kwargs or {}))
        return Packed(out) if func in (torch.ops.aten.t.default, torch.ops.aten.detach.default) else out


def test_tensors_that_dispatch_by_themselves_are_left_alone():
    weight = Packed(waves(4, 6).bfloat16())
    x = waves(2, 6).bfloat16()
    with torch.no_grad(), WideArithmetic() as mode:
        out = F.linear(x * 2, weight) * 2
    assert out.dtype == torch.float64
    assert mode.narrow == {"aten::mm": torch.bfloat16}
    assert torch.equal(out, 2 * F.linear(x * 2, weight.inside).double())


def test_quantised_weights_are_dequantised_in_double():
    whole, eighth = torch.arange(-12, 12).view(4, 6).to(torch.int8), waves(4, 6).to(torch.float8_e4m3fn)
    scale, x = waves(4, 1).bfloat16(), waves(2, 6).bfloat16()
    function = lambda: x @ (whole.to(x.dtype) * scale).T + x @ eighth.to(torch.bfloat16).T  # noqa: E731
    with torch.no_grad(), WideArithmetic() as mode:
        out = function()
    exact = x.double() @ (whole.double() * scale.double()).T + x.double() @ eighth.double().T
    assert apart([exact], [out]) <= EXACT < apart([exact], [function()])
    assert (whole.dtype, eighth.dtype, mode.narrow) == (torch.int8, torch.float8_e4m3fn, {})


# memory


class Widened(TorchDispatchMode):
    """Counts the bytes of what is converted, as long as it lives; without the garbage collector."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default) and out.dtype == torch.float64:
            self.now += out.nbytes
            self.peak = max(self.peak, self.now)
            weakref.finalize(out, self._gone, out.nbytes)
        return out

    def _gone(self, size):
        self.now -= size


LARGE = {
    "linear": (nn.Linear(512, 600), (3, 512)),
    "linear without bias": (nn.Linear(512, 600, bias=False), (2, 3, 512)),
    "one column": (nn.Linear(512, 600), (512,)),
    "weight on the left": (Lambda(lambda m, x: m.left @ x, left=waves(600, 512)), (512, 3)),
    "weight by a vector": (Lambda(lambda m, x: m.left @ x, left=waves(600, 512)), (512,)),
    "batched": (Lambda(lambda m, x: x @ m.stack, stack=waves(60, 50, 100)), (60, 3, 50)),
    "bias and batch": (
        Lambda(lambda m, x: torch.baddbmm(m.b, x, m.w), w=waves(60, 50, 100), b=waves(100)),
        (60, 3, 50),
    ),
    "experts": (
        Lambda(
            lambda m, x: F.grouped_mm(x.to(m.stack.dtype), m.stack, offs=torch.arange(4, 244, 4, dtype=torch.int32)),
            stack=waves(60, 64, 80),
        ),
        (240, 64),
    ),
    "convolution": (nn.Conv2d(64, 500, 3), (2, 64, 3, 3)),
    "transposed convolution": (nn.ConvTranspose1d(100, 1000, 3), (2, 100, 2)),
    "lookup": (Lambda(lambda m, x: F.embedding(torch.tensor([3, 5]), m.rows) + m.rows[7], rows=waves(600, 512)), (1,)),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_weights_are_widened_by_pieces(name, monkeypatch):
    """At most a tenth of what the whole weight takes in double, also if the garbage collector never runs."""
    layer, shape = LARGE[name]
    layer = randomise_(copy.deepcopy(layer)).bfloat16()
    inputs = {next(iter(layer.forward.__code__.co_varnames[1:])): waves(*shape).bfloat16()}
    weight = max([*layer.parameters(), *layer.buffers()], key=torch.numel)
    exact = run(copy.deepcopy(layer).double(), converted(inputs, torch.float64), WideArithmetic())
    peaks = []
    for piece in (2**14, 2**40):
        monkeypatch.setattr(hf_oto.wide, "PIECE", piece)
        gc.collect()
        gc.disable()
        with Widened() as counted:
            wide = run(layer, inputs, WideArithmetic())
        gc.enable()
        assert apart(exact, wide) <= EXACT
        peaks.append(counted.peak)
    assert peaks[0] < 0.15 * 8 * weight.numel()
    if name not in ("lookup", "experts"):  # control; these two never widen the whole
        assert peaks[1] >= 8 * weight.numel()


def test_nothing_widened_outlives_its_operation():
    model, inputs = make("llama").eval().bfloat16(), TABLE["llama"].inputs(2)
    gc.collect()
    gc.disable()
    with Widened() as counted:
        wide = run(model, inputs, WideArithmetic())
    gc.enable()
    largest = 8 * max(p.numel() for p in model.parameters())
    assert counted.peak <= 2 * largest + 8 * 2 * 7 * 40  # an operation's operand and result, and what it works on
    del wide
    assert counted.now == 0


# around it


def test_autocast_around_it_neither_matters_nor_keeps_anything():
    model, inputs = make("vit").eval(), TABLE["vit"].inputs(2)
    exact = run(model, inputs, WideArithmetic())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = run(model, inputs)
        assert apart(exact, run(model, inputs, WideArithmetic())) <= EXACT < apart(exact, plain)
        assert all(map(torch.equal, plain, run(model, inputs)))


def test_single_precision_where_there_is_no_double():
    model, inputs = make("llama").eval().bfloat16(), TABLE["llama"].inputs(2)
    mode = WideArithmetic(torch.float32)
    wide = run(model, inputs, mode)
    assert {t.dtype for t in wide} == {torch.float32} and mode.narrow == {}
    assert apart(run(copy.deepcopy(model).float(), inputs), wide) <= 1e-5 < apart(wide, run(model, inputs))


def test_the_dtype_of_a_device(monkeypatch):
    assert wide_dtype("cpu") == wide_dtype(torch.device("cpu")) == torch.float64

    def refusing(error):
        def refuse(*args, **kwargs):
            raise error

        monkeypatch.setattr(torch, "ones", refuse)

    for error in (TypeError("Cannot convert a MPS Tensor to float64 dtype"), RuntimeError("no fp64 on this device")):
        refusing(error)
        assert wide_dtype("mps") == torch.float32
    refusing(torch.OutOfMemoryError())
    with pytest.raises(torch.OutOfMemoryError):
        wide_dtype("mps")


def test_one_mode_serves_many_forwards():
    model, inputs = make("gpt2").eval(), TABLE["gpt2"].inputs(2)
    mode = WideArithmetic()
    first = run(model, inputs, mode)
    assert all(map(torch.equal, first, run(model, inputs, mode)))
    with mode:
        assert all(map(torch.equal, first, run(model, inputs, WideArithmetic())))


def test_names_of_torch_that_are_not_public():
    """Checked with torch 2.13: what wide.py takes of it that may go."""
    assert torch._C._DisableAutocast
    assert nn.RNNBase.check_input
    for name, (positions, training) in hf_oto.wide.UNSAID.items():
        arguments = [a.name for a in getattr(torch.ops.aten, name).default._schema.arguments]
        assert [arguments[i] for i in positions] == ["running_mean", "running_var"]
        assert arguments[training] == "training"
    arguments = torch.ops.aten.convolution.default._schema.arguments
    assert (arguments[6].name, arguments[8].name) == ("transposed", "groups")


SCALED = {  # ways to read a weight of (6, 4)
    "linear": lambda w, x: nn.functional.linear(x, w),
    "transposed": lambda w, x: x @ w.t(),
    "embedding": lambda w, x: nn.functional.embedding(torch.tensor([1, 5]), w),
    "row": lambda w, x: w[2] * x,
    "float": lambda w, x: w.float() * 2,
    "half": lambda w, x: w.half() * 2,
    "one more": lambda w, x: (1 + w.float()) * 3,
    "copied": lambda w, x: torch.zeros(6, 4).copy_(w) if w.dtype == torch.float32 else w.clone() + 0,
    "rms_norm": lambda w, x: nn.functional.rms_norm(x, (4,), w[0]),
    "sdpa": lambda w, x: nn.functional.scaled_dot_product_attention(w[None, None], w[None, None], w[None, None]),
    "conv": lambda w, x: nn.functional.conv1d(torch.ones(1, 4, 3).to(w.dtype), w[:, :, None]),
    "stacked": lambda w, x: torch.stack([w, w]).sum(0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("way", SCALED)
def test_what_is_stored_unscaled_is_scaled_as_it_is_widened(way, offset, dtype):
    """The scale is applied once, however the weight is read, and without rounding; control: no scale is given."""
    weight, x = waves(6, 4).to(dtype), waves(2, 4).to(dtype)
    with torch.no_grad(), WideArithmetic():
        exact = SCALED[way]((weight.double() + offset) * 1.7 - offset, x.double())
    for scales, same in (({storage_of(weight): (1.7, offset)}, True), (None, False)):
        with torch.no_grad(), WideArithmetic(scales=scales):
            out = SCALED[way](weight, x)
        limit = 1e-7 if way == "copied" and dtype == torch.float32 else 1e-12  # that is rounded into a float32
        assert bool((out.double() - exact).abs().max() <= limit) is same


def test_the_lowest_number_of_the_wide_dtype_can_be_a_tensor():
    """Masks are made so: torch.tensor(torch.finfo(scores.dtype).min), in the default dtype."""
    x = waves(2, 3)

    def masked():
        scores = x * 2
        return torch.max(scores, torch.tensor(torch.finfo(scores.dtype).min)), torch.full(
            (2,), torch.finfo(scores.dtype).min
        )

    with torch.no_grad(), WideArithmetic():
        scores, lowest = masked()
    assert torch.equal(scores, x.double() * 2) and lowest.dtype == torch.float64
    assert masked()[1].dtype == torch.float32
    with pytest.raises(RuntimeError, match="overflow"):  # control: as it is without
        torch.full((2,), torch.finfo(torch.float64).min)
