"""What test_sharded.py launches on several ranks: the end of a sharded run by itself, without training or a Trainer.

Every rank writes what it found to FOLDER/RANK.pt; the test compares it with one process that holds the whole model.
"""

import contextlib
import dataclasses
import os
import socket
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers as tf
from distributed_worker import whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hf_oto import PruningPlan, partition_zigs, shards
from hf_oto.by_layers import WholeForNow
from hf_oto.calls import as_forwards, tensors_of
from hf_oto.compaction import Compaction
from hf_oto.modeling_oto import OTOError, named_tensors
from hf_oto.sharded import BeforeSharding, let_go_of_whole_weights
from hf_oto.zigs import random_half

torch.set_num_threads(1)
INPUTS = {"input_ids": torch.arange(3, 11)[None]}


def llama(tied=False):
    """Its norms are read with scales, one key head serves two query heads, and no size is a multiple of the ranks."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        hidden_size=36, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3, intermediate_size=33,
        vocab_size=41, head_dim=6, tie_word_embeddings=tied, max_position_embeddings=32,
    )  # fmt: skip
    model = tf.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.uniform_(0.5, 1.5)
    return model


class Residual(nn.Module):
    """No Transformers model; it has statistics, and a weight that its own forward reads, not that of a layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 14)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(14, 21), nn.BatchNorm1d(21), nn.ReLU(), nn.Linear(21, 14)) for _ in range(2)
        )
        self.out = nn.Parameter(torch.randn(3, 14))
        self.rnn = nn.GRU(14, 14)  # it keeps a list of its weights
        self.num_runs = 0
        self.register_buffer("seen", torch.zeros(2), persistent=False)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = x + layer(x)
        x, _ = self.rnn(x)
        return x @ self.out.T


def residual():
    torch.manual_seed(0)
    model = Residual()
    for layer in model.layers:
        nn.init.uniform_(layer[1].bias, 0.5, 1.0)
        layer[1].running_mean.normal_()
        layer[1].running_var.uniform_(0.5, 2.0)
    return model


MODELS = {"llama": llama, "tied": lambda: llama(tied=True), "bfloat16": lambda: llama().bfloat16(), "plain": residual}


def inputs_of(model):
    return INPUTS if isinstance(model, tf.PreTrainedModel) else {"x": torch.linspace(-1, 1, 24).reshape(3, 8)}


def logits(outputs):
    return tensors_of(outputs)[0]


def zeroed(name):
    """A model of which some ZIGs are zero, its partition, and the plan that removes them."""
    model = MODELS[name]()
    partition = partition_zigs(model, inputs_of(model))
    plan = random_half(partition)
    partition.zero_(model, plan)
    return model, partition, plan


def layers_of(model):
    return model.model.layers if isinstance(model, tf.PreTrainedModel) else model.layers


def fully_sharded(model, mesh):
    """As accelerate shards: layers, the head together with the last norm, and what is left."""
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh)
    if isinstance(model, tf.PreTrainedModel) and not model.config.tie_word_embeddings:
        fully_shard([model.model.norm, model.lm_head], mesh=mesh, reshard_after_forward=False)
    return fully_shard(model, mesh=mesh)


def with_live_biases(partition, ending="1.bias"):
    """Breaks the rule: biases with such names are cut, but not zeroed before."""
    axes = []
    for axis in partition.axes:
        members = []
        for member in axis.members:
            role = "statistic" if member.param.endswith(ending) else member.role
            members.append(dataclasses.replace(member, role=role))
        axes.append(dataclasses.replace(axis, members=tuple(members)))
    return dataclasses.replace(partition, axes=tuple(axes))


class Alive:
    """The bytes of weights that are whole for a forward, now and at most."""

    # of the class, because an object that hooks hold is put back after a forward
    now = most = 0


def bytes_of(for_now):
    tensors = [weight.places[0].tensor for weight in for_now.weights]
    return sum(t.nbytes for t in tensors if not t.is_meta)


@contextlib.contextmanager
def watched():
    gather, drop = WholeForNow.gather, WholeForNow.drop

    def gathers(for_now, *given):
        gather(for_now)
        Alive.now += bytes_of(for_now)
        Alive.most = max(Alive.most, Alive.now)

    def drops(for_now, *given):
        Alive.now -= bytes_of(for_now)
        drop(for_now)
        assert bytes_of(for_now) == 0

    Alive.now = Alive.most = 0
    WholeForNow.gather, WholeForNow.drop = gathers, drops
    try:
        yield
    finally:
        WholeForNow.gather, WholeForNow.drop = gather, drop


def ended(name, mesh, folder):
    """The end of a run: everything that ending.py asks for, in its order."""
    model, partition, plan = zeroed(name)
    user = model
    inputs = inputs_of(model)
    forwards = as_forwards(inputs)
    found = {}
    before = BeforeSharding(model)
    sharded = fully_sharded(model, mesh)
    sharded.eval()
    with torch.no_grad():
        sharded(**inputs)  # the head stays whole after that
    if name == "plain":
        user.num_runs, user.seen = 7, torch.ones(2)  # as training may write them
    weights = before.taken_off(sharded, torch.device("cpu"))
    assert weights.model is user and not any(isinstance(p, DTensor) for p in user.parameters())
    assert all(p.is_meta for p in user.parameters())
    if name == "plain":
        assert all(ours is p for ours, p in zip(user.rnn._flat_weights, user.rnn.parameters(), strict=True))

    found["zeros"] = weights.zeros(partition) == PruningPlan.removing(plan.removed(partition), partition)
    compaction = Compaction(weights.model, partition)
    cut = compaction.resolve(plan)
    with watched():
        found["certificate"] = tuple(weights.certify(cut, forwards))
    found["gathered"] = Alive.most
    found["scaled wrongly"] = tuple(weights.certify(cut._replace(scales={}), forwards))
    # what isn't zero yet is zeroed by the certificate, if its partition knows all that it is made of
    removed = ~plan.removed(partition)
    removed[::2] = False  # else nothing of the model would be left
    others = compaction.resolve(PruningPlan.removing(removed, partition))
    found["others"] = tuple(weights.certify(others, forwards))
    if name == "plain":
        others = others._replace(partition=with_live_biases(partition))
        found["biases alive"] = tuple(weights.certify(others, forwards))
    weights.keep_(compaction, cut)
    again = weights.put_on_(lambda model, layers: fully_sharded(model, mesh))
    assert all(isinstance(p, DTensor) for p in user.parameters())
    with torch.no_grad():
        found["outputs"] = logits(user(**inputs))
    assert not all(isinstance(p, DTensor) for p in user.parameters())  # what is in no layer is whole still
    let_go_of_whole_weights(user)
    assert all(isinstance(p, DTensor) for p in user.parameters())
    rank = dist.get_rank()
    shards.SMALL_FILE = 2**13  # so that there are several files
    try:
        with again.whole_on_disk(user, torch.device("cpu"), folder / "missing", writes=rank == 0):
            pass
    except OTOError as error:  # every rank hears of it
        found["no folder"] = str(error)
    with again.whole_on_disk(user, torch.device("cpu"), folder, writes=rank == 0):
        if rank == 0 and isinstance(user, tf.PreTrainedModel):
            user.save_pretrained(folder / name)
        elif rank == 0:
            torch.save(user.state_dict(), folder / f"{name}.state")
    if name == "plain":
        found["written"] = user.num_runs, user.seen.tolist()
        user.seen.zero_()  # one process has written nothing
    found["weights"] = {n: whole(t) for n, t in named_tensors(user).items()}
    user.train()
    logits(user(**inputs)).square().mean().backward()  # it trains on
    found["gradients"] = {n: whole(p.grad) for n, p in user.named_parameters()}
    return found


def rank_of(rank, world, folder, port, names):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    dist.init_process_group("gloo")
    shape = (world,) if world == 2 else (2, world // 2)  # of 4 ranks two hold the same shards
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards")[-len(shape) :])
    found = {name: ended(name, mesh, Path(folder)) for name in names}
    torch.save(found, Path(folder) / f"{world}.{rank}.pt")


def main():
    """`sharded_worker.py FOLDER RANKS MODEL ...` forks the ranks."""
    folder, world, *names = sys.argv[1:]
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = str(s.getsockname()[1])
    arguments = (int(world), folder, port, names)
    torch.multiprocessing.start_processes(rank_of, arguments, int(world), start_method="fork")


if __name__ == "__main__":
    main()
