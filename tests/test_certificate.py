"""The certificate: no wrong cut passes and no right one is refused, in any dtype, by one tolerance.

Wrong cuts are made from right partitions by a list of errors. Whether one is wrong at all (two units may be alike) is
decided by itself: a copy in double is zeroed and cut, and run by torch alone.
"""

import contextlib
import copy
import dataclasses
import functools
from collections import Counter
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
import torch
from models import TABLE, make
from test_wide import LOW, InDouble, apart, converted, run
from transformers import PreTrainedModel

import hf_oto.differences
from hf_oto import PruningPlan, ZIGPartition, check_zero_invariance, partition_zigs
from hf_oto.certificate import TOLERANCE, certify, cut_difference
from hf_oto.cut import cut_, resolve
from hf_oto.differences import largest_difference

# what is judged, by whatever name it goes


def zero_invariance(model, partition, inputs, plan):
    return check_zero_invariance(model, partition, inputs, plan)


def difference_of_cut(model, partition, inputs, plan):
    difference, tolerance = cut_difference(model, resolve(partition, plan), inputs)
    assert tolerance == TOLERANCE
    return difference


def difference_seen(judge, *args):
    """The difference that a function sees, inf where the model doesn't even run."""
    try:
        return judge(*args)
    except Exception as error:
        assert not isinstance(error, (torch.OutOfMemoryError, NameError, AttributeError)), error
        return float("inf")


# errors: (partition, random numbers) -> wrong partitions


def with_member(partition, i, member, new):
    """The partition with one member of axis i replaced."""
    axis = partition.axes[i]
    members = tuple(new if m is member else m for m in axis.members)
    axes = list(partition.axes)
    axes[i] = dataclasses.replace(axis, members=members)
    return dataclasses.replace(partition, axes=tuple(axes))


def each(role):
    """An error of one member of one axis, for all members of a role."""

    def errors(change):
        def wrong(partition, rng):
            for i, axis in enumerate(partition.axes):
                for m in axis.members:
                    if m.role in role:
                        new = change(axis, m, rng)
                        if new is not None:
                            yield with_member(partition, i, m, new)

        return wrong

    return errors


ANY = ("producer", "consumer", "statistic")


@each(ANY)
def unit_before(axis, m, rng):
    """Positions off by one unit."""
    return dataclasses.replace(m, index=np.roll(m.positions(axis.size), 1, axis=0))


@each(ANY)
def position_before(axis, m, rng):
    """Positions off by one within a fused weight or a head."""
    index = m.positions(axis.size) - 1
    return dataclasses.replace(m, index=index) if index.min() >= 0 else None


@each(["consumer"])
def two_swapped(axis, m, rng):
    index = m.positions(axis.size).copy()
    pair = rng.permutation(axis.size)[:2]
    index[pair] = index[pair[::-1]]
    return dataclasses.replace(m, index=index)


@each(ANY)
def reversed_order(axis, m, rng):
    return dataclasses.replace(m, index=m.positions(axis.size)[::-1].copy())


@each(ANY)
def strides_swapped(axis, m, rng):
    """(outer, units, inner) read as (inner, units, outer)."""
    if m.index is not None or m.outer == m.inner:
        return None
    return dataclasses.replace(m, outer=m.inner, inner=m.outer)


@each(["producer"])
def not_zeroed(axis, m, rng):
    """A bias or a norm's weight is cut, but was never zero."""
    return dataclasses.replace(m, role="statistic")


def no_scales(partition, rng):
    """A norm taken for elementwise: its average is over fewer."""
    for i, axis in enumerate(partition.axes):
        if axis.scales:
            yield changed_axis(partition, i, scales=())


def one_scale_missing(partition, rng):
    for i, axis in enumerate(partition.axes):
        for j in range(len(axis.scales)):
            yield changed_axis(partition, i, scales=axis.scales[:j] + axis.scales[j + 1 :])


def wrong_powers(partition, rng):
    for i, axis in enumerate(partition.axes):
        for power in (Fraction(2), Fraction(1, 2)):
            if axis.scales:
                scales = tuple(s._replace(power=s.power * power) for s in axis.scales)
                yield changed_axis(partition, i, scales=scales)


def wrong_offsets(partition, rng):
    for i, axis in enumerate(partition.axes):
        for j, s in enumerate(axis.scales):
            scales = (*axis.scales[:j], s._replace(offset=1 - s.offset), *axis.scales[j + 1 :])
            yield changed_axis(partition, i, scales=scales)


def changed_axis(partition, i, **changes):
    axes = list(partition.axes)
    axes[i] = dataclasses.replace(axes[i], **changes)
    return dataclasses.replace(partition, axes=tuple(axes))


class Kept:
    """The sizes of a partition, but one attribute stays what it was."""

    def __init__(self, sizes, attribute):
        self.sizes, self.attribute = sizes, attribute

    def solve(self, removed):
        attributes, conflicts = self.sizes.solve(removed)
        return {a: n for a, n in attributes.items() if a != self.attribute}, conflicts

    def involved(self, *args):
        return self.sizes.involved(*args)


def size_kept(partition, rng):
    """A module goes on with the number of heads or groups it had."""
    removed = half(partition, 0).removed(partition)
    for attribute in partition.sizes.solve(removed)[0]:
        yield dataclasses.replace(partition, sizes=Kept(partition.sizes, attribute))


ERRORS = {
    "unit before": unit_before,
    "position before": position_before,
    "two swapped": two_swapped,
    "reversed": reversed_order,
    "strides swapped": strides_swapped,
    "not zeroed": not_zeroed,
    "no scales": no_scales,
    "one scale missing": one_scale_missing,
    "wrong power": wrong_powers,
    "wrong offset": wrong_offsets,
    "size kept": size_kept,
}

MODELS = [
    "resnet_basic", "vit", "bert", "llama", "t5", "gpt2", "mixtral", "mamba", "group_norm", "whisper", "deberta",
    "recurrent_gemma", "dense", "regnet",
]  # fmt: skip
MOST = 5  # of one error in one model


def half(partition, seed):
    """At least half of every axis stays, so that the activations live on."""
    rng = np.random.default_rng(seed)
    keep = {a.name: rng.permutation(a.size)[: rng.integers((a.size + 1) // 2, a.size)] for a in partition.axes}
    return PruningPlan({name: np.sort(kept) for name, kept in keep.items()})


class Offset:
    """A hook that adds a thousand to all that a model returns: what differs must not hide in it."""

    def __call__(self, module, args, out):
        if isinstance(out, torch.Tensor):
            return out + 1000
        for name, value in out.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                out[name] = value + 1000
        return out


class Wrong(NamedTuple):
    """A wrong cut: `difference` is what torch's own double makes of it, inf where the cut model doesn't run."""

    name: str
    error: str
    partition: ZIGPartition
    plan: PruningPlan
    difference: float


@functools.cache
def right(name):
    model, inputs = make(name).eval(), TABLE[name].inputs(2)
    return model, inputs, partition_zigs(model, inputs)


def in_double(model):
    """A copy in double that torch can run by itself: it has no grouped product of doubles."""
    twin = copy.deepcopy(model).double()
    if isinstance(twin, PreTrainedModel):
        twin.set_experts_implementation("batched_mm")
    return twin


def proof(model, inputs, partition, plan):
    """How far zeroed and cut copies in double are from each other, without any of the functions under test."""
    return by_torch(in_double(model), converted(inputs, torch.float64), partition, plan, InDouble)


def by_torch(zeroed, inputs, partition, plan, mode=contextlib.nullcontext):
    """How far a model, zeroed here, is from its cut copy in the arithmetic that it has."""
    partition.zero_(zeroed, plan)
    small = copy.deepcopy(zeroed)
    try:
        cut_(small, resolve(partition, plan))
        return apart(run(zeroed, inputs, mode()), run(small, inputs, mode()))
    except Exception:
        return float("inf")


@pytest.fixture(scope="module")
def wrong_cuts():
    """Every error in every model, and what of it is no error: a list and the number of the harmless ones."""
    found, harmless = [], Counter()
    for name in MODELS:
        model, inputs, partition = right(name)
        for error, make_wrong in ERRORS.items():
            rng = np.random.default_rng(0)
            wrong = [*make_wrong(partition, rng)]
            for seed, i in enumerate(rng.permutation(len(wrong))[:MOST]):
                plan = half(partition, seed)
                difference = proof(model, inputs, wrong[i], plan)
                if difference > 1e-7:
                    found.append(Wrong(name, error, wrong[i], plan, difference))
                else:
                    harmless[error] += 1
    return found, harmless


def in_dtype(name, dtype, offset=False):
    """The model of a row in a dtype, and its inputs; skips where stock can't run it."""
    model, inputs, partition = right(name)
    model, inputs = copy.deepcopy(model).to(dtype), converted(inputs, dtype)
    try:
        run(model, inputs)
    except RuntimeError as error:
        pytest.skip(f"{name} in {dtype}: {error}")
    if offset:
        model.register_forward_hook(Offset())
    return model, inputs, partition


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_no_wrong_cut_passes(wrong_cuts, dtype):
    cuts, harmless = wrong_cuts
    models = {(name, offset): in_dtype(name, dtype, offset)[:2] for name in MODELS for offset in (False, True)}
    passed, smallest, seen = [], {False: np.inf, True: np.inf}, Counter()
    for i, wrong in enumerate(cuts):
        offset = i % 2 == 1
        model, inputs = models[wrong.name, offset]
        difference = difference_seen(difference_of_cut, model, wrong.partition, inputs, wrong.plan)
        seen["crashes" if np.isinf(wrong.difference) else "runs", offset] += 1
        smallest[offset] = min(smallest[offset], difference)
        if difference <= TOLERANCE:
            passed.append((wrong.name, wrong.error, difference, wrong.difference))
    runs = seen["runs", False] + seen["runs", True]
    kinds = Counter(w.error for w in cuts if np.isfinite(w.difference))
    report = (
        f"{dtype}: {len(passed)} of {len(cuts)} wrong cuts pass, {runs} of them run; harmless {harmless}; {kinds}; "
    )
    report += f"smallest difference {smallest[False]:.1e}, with outputs offset by 1000 {smallest[True]:.1e}; {passed}"
    assert not passed, report
    assert runs >= 200 and len({w.name for w in cuts}) >= 8 and len(kinds) >= 8, report
    assert min(smallest.values()) > 100 * TOLERANCE, report


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", TABLE)
def test_no_right_cut_is_refused(name, dtype):
    for offset in (False, True):
        model, inputs, partition = in_dtype(name, dtype, offset)
        assert Counter((axis.kind, axis.size) for axis in partition.axes) == TABLE[name].axes  # the rehearsal took all
        plan = half(partition, 7)
        assert difference_of_cut(model, partition, inputs, plan) <= TOLERANCE / 100
        assert zero_invariance(model, partition, inputs, plan) <= TOLERANCE / 100


@pytest.fixture(scope="module")
def loud_groups():
    """(model, partition, plan) of groups that zeros don't silence: a member left out, or read from the unit before."""
    found = []
    for name in MODELS:
        model, inputs, partition = right(name)
        wrong = [*unit_before(partition, None), *not_zeroed(partition, None)]
        for seed, i in enumerate(np.random.default_rng(0).permutation(len(wrong))[:10]):
            plan = half(partition, seed)
            if loudness(model, inputs, wrong[i], plan) > 1e-7:
                found.append((name, wrong[i], plan))
    return found


def loudness(model, inputs, partition, plan):
    """How much zero ZIGs show: in double, by torch alone, what stands on their other side is 0 once and 1 once."""
    outs = []
    for value in (0, 1):
        twin = in_double(model)
        tensors = partition.tensors(twin)
        slices = [*partition.slices(plan.removed(partition))]
        for fill in (value, 0):  # zeros win
            for axis, m, index in slices:
                zero = "producer" if axis.zero_path else "consumer"
                if m.role != "statistic" and (m.role == zero) == (fill == 0):
                    tensors[m.param].data.index_fill_(m.dim, torch.from_numpy(index), fill)
        outs.append(run(twin, converted(inputs, torch.float64), InDouble()))
    return apart(*outs)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_no_group_that_is_not_invariant_passes(loud_groups, dtype):
    models = {name: in_dtype(name, dtype, offset=True)[:2] for name in MODELS}
    passed, smallest = [], np.inf
    for name, partition, plan in loud_groups:
        model, inputs = models[name]
        difference = difference_seen(zero_invariance, model, partition, inputs, plan)
        smallest = min(smallest, difference)
        if difference <= TOLERANCE:
            passed.append((name, difference))
    report = f"{dtype}: {len(passed)} of {len(loud_groups)} pass, smallest difference {smallest:.1e}: {passed}"
    assert not passed and len(loud_groups) >= 30 and smallest > 100 * TOLERANCE, report


def test_rounding_hides_wrong_cuts(wrong_cuts):
    """Control: in bfloat16's own arithmetic no tolerance parts the right cuts from the wrong ones."""
    models = {name: in_dtype(name, torch.bfloat16) for name in MODELS}
    largest = max(by_torch(copy.deepcopy(m), inputs, p, half(p, 7)) for m, inputs, p in models.values())
    passed = 0
    for wrong in wrong_cuts[0]:
        if wrong.difference < 0.1:
            model, inputs, _ = models[wrong.name]
            passed += by_torch(copy.deepcopy(model), inputs, wrong.partition, wrong.plan) <= largest
    assert 1e-3 < largest < 0.1 and passed >= 3, (largest, passed)


def test_large_outputs_are_compared_in_pieces(monkeypatch):
    """The size of the pieces changes nothing; control: each piece counts."""
    x = torch.randn(7, 11, dtype=torch.float64) + 1000
    x[3, 4], x[6, 10] = torch.nan, torch.inf
    y = x.clone()
    y[5, 2] += 0.5
    whole = largest_difference([x, x[0, 0]], [y, x[0, 0]])
    assert 0.05 < whole < 0.5  # of the spread, not of the offset
    for piece in (1, 2, 5, 76, 77):
        monkeypatch.setattr(hf_oto.differences, "PIECE", piece)
        assert largest_difference([x, x[0, 0]], [y, x[0, 0]]) == pytest.approx(whole)
        assert largest_difference([x], [x]) == 0
    y[6, 10] = 1.0
    assert largest_difference([x], [y]) == float("inf")
    assert np.isnan(largest_difference([x * torch.nan], [x * torch.nan]))


class AsksForItsDtype(torch.nn.Module):
    """A forward that computes in float32 or not at all."""

    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(16, 12), torch.nn.Linear(12, 16)

    def forward(self, x):
        h = self.up(x).relu()
        if h.dtype != torch.float32:
            raise TypeError("float32, please")
        return self.down(h)


def test_what_does_not_compute_in_double_is_certified_as_it_is(caplog):
    """Its tolerance is coarser, and a warning says so; a wrong cut is refused all the same."""
    model, inputs = AsksForItsDtype(), {"x": torch.randn(4, 16)}
    partition = partition_zigs(model, inputs)
    assert [axis.size for axis in partition.axes] == [12]
    assert caplog.text.count("is certified in its own dtype") == 1
    cut = resolve(partition, half(partition, 0))
    right = certify(model, cut, inputs)
    assert right.holds and right.tolerance == 1e-5
    wrong = next(iter(unit_before(partition, None)))
    assert not certify(model, resolve(wrong, half(wrong, 0)), inputs).holds
