"""Ridge regression, the rows that it takes, and the walks by which batches come to a layer together."""

import threading

import numpy as np
import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn import functional as F

from hf_oto import OTOError
from hf_oto.calibration import Rows
from hf_oto.calls import Forward
from hf_oto.mixing import Mixing, Product, Tensors, Watched
from hf_oto.ridge import Layer, Regression
from hf_oto.walks import NAME, Walk

# the regression ------------------------------------------------------------------------------------


def regression_of(x, y):
    regression = Regression()
    for begin in range(0, len(x), 100):
        regression.add(x[begin : begin + 100], y[begin : begin + 100])
    return regression


@pytest.mark.parametrize("has_bias", [True, False])
def test_it_finds_the_least_squares(has_bias):
    """With many rows the pull is weak, so that numpy's least squares are found."""
    torch.manual_seed(0)
    x = torch.randn(2000, 5) + (1.0 if has_bias else 0.0)
    y = x @ torch.randn(5, 3) + 0.1 * torch.randn(2000, 3) + (2.0 if has_bias else 0.0)
    layer = Layer(torch.zeros(5, 3), torch.zeros(3) if has_bias else None)
    fit = regression_of(x, y).fit(layer, "weight")
    columns = torch.cat([x, torch.ones(len(x), 1)], 1) if has_bias else x
    expected = np.linalg.lstsq(columns.double().numpy(), y.double().numpy(), rcond=None)[0]
    assert np.allclose(fit.layer.weight, expected[:5], atol=1e-2)
    if has_bias:
        assert np.allclose(fit.layer.bias, expected[5], atol=1e-2)
    assert fit.error < 0.1 < fit.error_before


def test_the_errors_are_fractions_of_the_variance():
    torch.manual_seed(0)
    x = torch.randn(4000, 2)
    y = x @ torch.tensor([[1.0], [2.0]]) + 5
    fit = regression_of(x[:, :1], y).fit(Layer(torch.zeros(1, 1), torch.full((1,), 5.0)), "weight")
    assert fit.error_before == pytest.approx(1.0, abs=0.05)
    assert fit.error == pytest.approx(0.8, abs=0.05)  # the feature that is left makes 1 of 5 parts of the variance


def test_where_nothing_is_to_be_learned_the_layer_stays():
    """Noise in few rows fits many weights, and helps no other rows."""
    torch.manual_seed(0)
    x, noise = torch.randn(40, 30), torch.randn(40, 3)
    old = Layer(torch.randn(30, 3), torch.randn(3))
    exact = x @ old.weight + old.bias
    fit = regression_of(x, exact).fit(old, "weight")
    assert torch.equal(fit.layer.weight, old.weight) or (fit.layer.weight - old.weight).abs().max() < 1e-5
    noisy = regression_of(x, exact + noise).fit(old, "weight")
    free = torch.linalg.lstsq(torch.cat([x, torch.ones(40, 1)], 1), exact + noise).solution[:30]
    moved = (noisy.layer.weight - old.weight).norm()
    assert moved < 0.5 * (free - old.weight).norm()


@pytest.mark.parametrize("num_rows", [20, 200])
def test_too_few_rows_are_noted(num_rows):
    torch.manual_seed(0)
    x = torch.randn(num_rows, 50)
    fit = regression_of(x, x @ torch.randn(50, 3)).fit(Layer(torch.zeros(50, 3), None), "fc.weight")
    assert fit.is_short_of_rows == (num_rows == 20)


@pytest.mark.parametrize("where", ["x", "y"])
def test_what_is_no_number_is_an_error(where):
    rows = {"x": torch.randn(100, 2), "y": torch.randn(100, 2)}
    rows[where][50, 0] = torch.nan
    with pytest.raises(OTOError, match=r"fc.weight .*not a finite number"):
        regression_of(rows["x"], rows["y"]).fit(Layer(torch.zeros(2, 2), None), "fc.weight")


# the rows ------------------------------------------------------------------------------------------


class Bmm(nn.Module):
    """Stacked weights, one matrix for each row of the batch."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 6))

    def forward(self, x):
        return x @ self.weight


class OneOfThree(nn.Module):
    """One matrix of a stack."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6, 4))

    def forward(self, x):
        return F.linear(x, self.weight[1])


class WeightFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))

    def forward(self, x):
        return self.weight @ x


class Transposed(nn.Module):
    """Tokens first, as some attentions have them."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 6)

    def forward(self, x):
        return self.fc(x.transpose(0, 1)).transpose(0, 1)


def strides(cls, dims, **options):
    return lambda: cls(4, 6, 3, **{"stride": 2, "padding": 1, "dilation": 2, **options}), (2, 4, *[9] * dims)


PRODUCTS = {  # name -> (builder, shape of the input)
    "linear": (lambda: nn.Linear(4, 6), (2, 5, 4)),
    "without bias": (lambda: nn.Linear(4, 6, bias=False), (2, 5, 4)),
    "one token": (lambda: nn.Linear(4, 6), (5, 4)),
    "transposed": (Transposed, (2, 5, 4)),
    "conv1d of transformers": (lambda: tf.pytorch_utils.Conv1D(6, 4), (2, 5, 4)),
    "stack": (Bmm, (3, 5, 4)),
    "one of a stack": (OneOfThree, (5, 4)),
    "weight first": (WeightFirst, (4, 5)),
    "square": (lambda: nn.Linear(4, 4), (2, 5, 4)),
    "conv 1": strides(nn.Conv1d, 1),
    "conv 2": strides(nn.Conv2d, 2),
    "conv 3": strides(nn.Conv3d, 3, dilation=1),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 5, 5)),
    "transposed conv 1": strides(nn.ConvTranspose1d, 1, output_padding=1),
    "transposed conv 2": strides(nn.ConvTranspose2d, 2, output_padding=1),
    "transposed conv, padded": strides(nn.ConvTranspose2d, 2, stride=1, padding=3, dilation=1),
}


def products_of(model, x):
    """The products of one forward: (product, features, results)."""
    found = []

    def after(seen, output):
        if isinstance(seen, Product):
            found.append((seen, seen.features(), seen.results(output)))

    with torch.no_grad(), Watched(Tensors(model), after=after):
        model(x)
    return found


@pytest.mark.parametrize("name", PRODUCTS)
def test_features_times_matrix_are_the_results(name):
    torch.manual_seed(0)
    build, shape = PRODUCTS[name]
    model = build()
    found = products_of(model, torch.randn(shape))
    assert len(found) == (3 if name == "stack" else 1)
    tensors = dict(model.named_parameters())
    for product, features, results in found:
        matrix = product.mixing.matrix(tensors[product.mixing.name])
        added = 0 if product.added is None else product.added
        if name == "transposed":  # its bias is added by another operation
            assert product.added is None
        assert torch.allclose(features @ matrix + added, results, atol=1e-5)
        assert features.shape[0] == results.shape[0] and product.inputs().shape[1] == 4
        assert not torch.allclose(features.flip(1) @ matrix + added, results, atol=1e-2)


@pytest.mark.parametrize("name", PRODUCTS)
def test_another_matrix_is_what_the_model_then_multiplies_by(name):
    torch.manual_seed(0)
    build, shape = PRODUCTS[name]
    model, x = build(), torch.randn(shape)
    tensors = dict(model.named_parameters())
    wanted = {}
    for product, *_ in products_of(model, x):
        new = torch.randn(product.mixing.matrix(tensors[product.mixing.name]).shape)
        product.mixing.write_(tensors[product.mixing.name], new)
        wanted[product.mixing] = new
    for product, features, results in products_of(model, x):
        added = 0 if product.added is None else product.added
        assert torch.allclose(features @ wanted[product.mixing] + added, results, atol=1e-4)


@pytest.mark.parametrize(
    "model",
    [nn.Conv2d(4, 6, 3, groups=2), nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.BatchNorm2d(4).eval()],
)
def test_what_is_no_product_by_a_parameter_is_not_shown(model):
    shape = (2, 4, 5, 5) if not isinstance(model, nn.Linear) else (2, 4)
    assert products_of(model, torch.randn(shape)) == []


def test_a_part_of_a_parameter_is_not_shown():
    """Attention with one weight for query, key and value shows its output projection alone."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True)  # in train mode it has no fused path
    query, key, value = torch.randn(3, 2, 3, 8)
    found = []
    with torch.no_grad(), Watched(Tensors(attention), after=lambda product, _: found.append(product.mixing)):
        attention(query, key, value)
    assert found == [Mixing("out_proj.weight", 1, 0)]


def test_padding_does_not_count():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    rows = Rows(Forward(kwargs={"input_ids": torch.ones(2, 3), "attention_mask": mask}))
    assert rows.counting(6, torch.device("cpu")).tolist() == [0, 1, 3]
    assert rows.counting(5, torch.device("cpu")).tolist() == [0, 1, 2, 3, 4]
    assert set(rows.counting(6, torch.device("cpu"), most=2).tolist()) < {0, 1, 3}
    both = {"attention_mask": mask, "decoder_attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]])}
    assert Rows(Forward(kwargs=both)).counting(6, torch.device("cpu")).tolist() == [0, 1]


# the walks -----------------------------------------------------------------------------------------


def test_forwards_stop_and_go_on():
    way = []

    def run(stop):
        for place in "ab":
            way.append(place)
            stop(place)
        way.append("end")

    walk = Walk(run)
    assert walk.at is None and not way
    walk.go_on()
    assert walk.at == "a" and way == ["a"]
    walk.go_on()
    assert walk.at == "b" and way == ["a", "b"]
    walk.go_on()
    walk.go_on()  # there is no further to go
    assert walk.at is None and way == ["a", "b", "end"]


def test_an_error_on_the_way_is_raised_here():
    def run(stop):
        stop(1)
        raise ValueError("on the way")

    walk = Walk(run)
    walk.go_on()
    with pytest.raises(ValueError, match="on the way"):
        walk.go_on()
    walk.end()


def test_ended_forwards_leave_no_thread():
    cleaned = []

    def run(stop):
        try:
            stop(1)
            cleaned.append("went on")
        finally:
            cleaned.append("cleaned")

    walks = [Walk(run) for _ in range(5)]
    for walk in walks[:3]:
        walk.go_on()
    assert [thread.name for thread in threading.enumerate()].count(NAME) == 3
    for walk in walks:
        walk.end()
        walk.end()
    assert NAME not in {thread.name for thread in threading.enumerate()} and cleaned == ["cleaned"] * 3
