"""A sharded model is certified, cut and saved as one process does it that holds the whole model."""

import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from sharded_worker import MODELS, inputs_of, layers_of, logits, zeroed
from test_distributed import launch

from hf_oto import compact
from hf_oto.certificate import certify
from hf_oto.cut import resolve
from hf_oto.modeling_oto import named_tensors

WORKER = str(Path(__file__).parent / "sharded_worker.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What 2 ranks found, each with half of every model, and 4 ranks, two of which hold the same half."""
    folder = tmp_path_factory.mktemp("sharded")
    launch(sys.executable, WORKER, str(folder), "2", *MODELS)
    launch(sys.executable, WORKER, str(folder), "4", "llama")
    return folder


RUNS = [(2, name) for name in MODELS] + [(4, "llama")]


@pytest.fixture(params=RUNS, ids=[f"{name}, {world} ranks" for world, name in RUNS])
def run(request, folder):
    """The name of a model, and what every rank found."""
    world, name = request.param
    return name, [torch.load(folder / f"{world}.{rank}.pt")[name] for rank in range(world)]


@pytest.mark.slow
def test_what_is_zero_is_seen_on_shards(run):
    _, ranks = run
    assert all(rank["zeros"] for rank in ranks)


@pytest.mark.slow
def test_the_certificate_is_that_of_one_process(run):
    name, ranks = run
    model, partition, plan = zeroed(name)
    one = certify(model, resolve(partition, plan), inputs_of(model))
    for rank in ranks:
        invariance, cut, tolerance, rounding = rank["certificate"]
        assert max(invariance, cut) < 1e-12 and tolerance == one.tolerance
        assert rounding == pytest.approx(one.rounding, abs=2e-7 if name != "bfloat16" else 0.05)
        assert rank["certificate"] == ranks[0]["certificate"]


@pytest.mark.slow
def test_the_certificate_finds_what_is_wrong(run):
    name, ranks = run
    for rank in ranks:
        assert max(rank["others"][:2]) < 1e-12
        if name == "plain":
            assert rank["scaled wrongly"] == rank["certificate"]  # nothing is scaled in it
            assert rank["biases alive"][0] > 1e-3  # noise shows what is alive
        else:
            assert rank["scaled wrongly"][1] > 1e-3


@pytest.mark.slow
def test_the_cut_is_that_of_one_process(run):
    name, ranks = run
    model, partition, plan = zeroed(name)
    inputs = inputs_of(model)
    small = compact(model, partition, plan).eval()
    expected = {name: tensor.detach().clone() for name, tensor in named_tensors(small).items()}
    with torch.no_grad():
        outputs = logits(small(**inputs))
    small.train()
    logits(small(**inputs)).square().mean().backward()
    for rank in ranks:
        assert {name: t.shape for name, t in rank["weights"].items()} == {n: t.shape for n, t in expected.items()}
        assert all(torch.equal(t, expected[n]) for n, t in rank["weights"].items())
        torch.testing.assert_close(rank["outputs"], outputs)
        for name, p in small.named_parameters():
            torch.testing.assert_close(rank["gradients"][name], p.grad, atol=1e-6, rtol=1e-4)
    weight = next(name for name, t in expected.items() if t.dim() == 2)
    assert not torch.equal(expected[weight], zeroed(run[0])[0].state_dict()[weight])  # control: something was cut


@pytest.mark.slow
def test_the_saved_model_is_plain_and_whole(run, folder):
    name, ranks = run
    if name == "plain":
        saved = torch.load(folder / "plain.state")
    else:
        again = tf.LlamaForCausalLM.from_pretrained(folder / name)
        assert again.config.architectures == ["LlamaForCausalLM"]
        # files so small that writing one after the other takes little memory
        assert (folder / name / "model.safetensors.index.json").exists()
        assert 1 < len(list((folder / name).glob("*.safetensors"))) < 12
        saved = dict(again.named_parameters())
    assert saved.keys() <= ranks[0]["weights"].keys()
    for key, tensor in ranks[0]["weights"].items():
        if key in saved:
            assert torch.equal(saved[key], tensor), key
    assert set(dict(zeroed(name)[0].named_parameters())) <= saved.keys()


@pytest.mark.slow
def test_no_rank_ever_holds_more_than_a_layer_and_what_is_in_none(run):
    name, ranks = run
    model = MODELS[name]()
    layers = [sum(p.nbytes for p in layer.parameters()) for layer in layers_of(model)]
    in_none = sum(p.nbytes for p in model.parameters()) - sum(layers)
    for rank in ranks:
        assert max(layers) < rank["gathered"] <= max(layers) + in_none
    assert max(layers) + in_none < sum(layers) + in_none  # control: that is less than the model


@pytest.mark.slow
def test_what_training_has_written_beside_the_weights_stays(folder):
    for rank in range(2):
        assert torch.load(folder / f"2.{rank}.pt")["plain"]["written"] == (7, [1, 1])


@pytest.mark.slow
def test_all_ranks_hear_of_a_folder_that_cannot_be_written(run):
    _, ranks = run
    assert all("missing" in rank["no folder"] for rank in ranks)
