"""What test_distributed.py launches on several processes: `distributed_worker.py SCENARIO FOLDER`.

Every rank writes what it ended with to FOLDER/SCENARIO.RANK.pt; the test compares ranks, and with one process.
"""

import contextlib
import faulthandler
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hf_oto import DHSPG, ZIGPartition
from hf_oto.zigs import Member, PrunableAxis

torch.set_num_threads(1)
STEPS = 24

# the optimizer alone ----------------------------------------------------------------------


class Net(nn.Module):
    """7 heads of 3 units, then 9 units, then two readers, one of a single row: no size is a multiple of the ranks."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 21), nn.Linear(21, 9)
        self.c, self.d = nn.Linear(9, 3), nn.Linear(9, 1)

    def forward(self, x):
        h = torch.relu(self.b(torch.tanh(self.a(x))))
        return self.c(h) + nn.functional.pad(self.d(h), (0, 2))


def _axis(name, size, inner, *readers):
    layout = {"inner": inner}
    made = [Member(f"{name}.{leaf}", 0, "producer", **layout) for leaf in ("weight", "bias")]
    return PrunableAxis(name, "units", size, (*made, *(Member(r, 1, "consumer", **layout) for r in readers)))


PARTITION = ZIGPartition((_axis("a", 7, 3, "b.weight"), _axis("b", 9, 1, "c.weight", "d.weight")), {})


def net(tied=False):
    """Tied: all ZIGs of b are alike, and stay so until some of them are chosen."""
    torch.manual_seed(0)
    model = Net()
    if tied:
        with torch.no_grad():
            model.b.weight[:] = model.b.weight[:1].clone()
            model.b.bias[:] = 0.1
            model.c.weight[:] = model.c.weight[:, :1].clone()
            model.d.weight[:] = model.d.weight[:, :1].clone()
    return model


def optimizer_for(model, cls=DHSPG, mode="scheduled", **more):
    base = {"base": torch.optim.AdamW, "lr": 1e-2, "num_events": 2}
    if mode == "paper":
        base = {"base": torch.optim.SGD, "lr": 0.3, "lam": 0.5}
    more = {"target_group_sparsity": 0.5, "total_steps": STEPS, "mode": mode} | more
    return cls(model, PARTITION, weight_decay=0.1, **base, **more)


def batch(step, rank=0, world=1, size=16):
    """The share of a rank in the batch of a step."""
    g = torch.Generator().manual_seed(step)
    x, y = torch.randn(size, 6, generator=g), torch.randint(0, 3, (size,), generator=g)
    return x.chunk(world)[rank], y.chunk(world)[rank]


def train(model, optimizer, rank=0, world=1, accumulate=1, start=0, stop=STEPS, average=()):
    for step in range(start, stop):
        for x, y in zip(*(t.chunk(accumulate) for t in batch(step, rank, world)), strict=True):
            (nn.functional.cross_entropy(model(x), y) / accumulate).backward()
        for p in average:
            dist.all_reduce(p.grad)
            p.grad /= world
        optimizer.step()
        optimizer.zero_grad()


def whole(t):
    return t.detach().full_tensor() if isinstance(t, DTensor) else t.detach().clone()


def result(model, optimizer):
    module = model.module if isinstance(model, DistributedDataParallel) else model
    return {"weights": {n: whole(p) for n, p in module.named_parameters()}, "zero": optimizer.zero}


class Rough(DHSPG):
    """Its sums are rounded differently on every rank, as on unlike devices."""

    def _sums(self, *many):
        noise = torch.Generator().manual_seed(dist.get_rank())
        rough = [[(s, i, v * (1 + 1e-6 * torch.randn(v.shape, generator=noise))) for s, i, v in parts] for parts in many]
        return super()._sums(*rough)


@contextlib.contextmanager
def silent(name):
    """Breaks the rule: this collective does nothing."""
    original = getattr(dist, name)
    setattr(dist, name, lambda *_, **__: None)
    try:
        yield
    finally:
        setattr(dist, name, original)


def optimizers(rank, world):
    """One result per way to distribute the same training."""
    mesh = init_device_mesh("cpu", (world,))
    found = {}

    def sharded(tied=False, after=True, mesh=mesh, parts=("a", ""), **more):
        model = net(tied)
        optimizer = None if after else optimizer_for(model, **more)
        before = dict(model.named_parameters())
        for name in parts:
            fully_shard(model.get_submodule(name), mesh=mesh)
        now = dict(model.named_parameters())
        assert any(isinstance(p, DTensor) for p in now.values())
        assert not parts[-1] == "" or all(isinstance(p, DTensor) for p in now.values())
        if optimizer is None:
            optimizer = optimizer_for(model, **more)
        else:  # as accelerate does it
            names = {id(p): n for n, p in before.items()}
            for group in optimizer.param_groups:
                group["params"] = [now[names[id(p)]] for p in group["params"]]
        return model, optimizer, [p for p in now.values() if not isinstance(p, DTensor)]

    def ran(model, optimizer, average=(), **more):
        train(model, optimizer, rank, world, average=average, **more)
        return result(model, optimizer)

    def ddp(tied=False, **more):
        model = net(tied)
        optimizer = optimizer_for(model, **more)
        # the gradients of all parameters meet in one all-reduce
        return DistributedDataParallel(model), optimizer

    found["ddp"] = ran(*ddp())
    found["ddp accumulated"] = ran(*ddp(), accumulate=2)
    found["ddp paper"] = ran(*ddp(mode="paper"))
    found["ddp tied"] = ran(*ddp(tied=True))
    found["ddp rough"] = ran(*ddp(tied=True, cls=Rough))
    with silent("broadcast"):
        model = net(tied=True)
        found["ddp rough, broken"] = ran(model, optimizer_for(model, cls=Rough), list(model.parameters()))
    found["fsdp2"] = ran(*sharded())
    found["fsdp2 made before"] = ran(*sharded(after=False))
    found["fsdp2 accumulated"] = ran(*sharded(), accumulate=2)
    found["fsdp2 paper"] = ran(*sharded(mode="paper"))
    found["fsdp2 tied"] = ran(*sharded(tied=True))
    found["mixed"] = ran(*sharded(parts=("b", "d")))
    found["mixed paper"] = ran(*sharded(parts=("b", "d"), mode="paper"))
    with silent("all_reduce"):  # of fsdp2 itself: reduce-scatter
        found["fsdp2, broken"] = ran(*sharded())
    for shape in ((2, world // 2), (1, world), (world, 1)):
        if shape[0] * shape[1] == world:
            found[f"hsdp {shape}"] = ran(*sharded(mesh=init_device_mesh("cpu", shape, mesh_dim_names=("r", "s"))))
    return found


SCENARIOS = {"optimizers": optimizers}


def main():
    scenario, folder = sys.argv[1:]
    faulthandler.dump_traceback_later(100, exit=True)  # a rank that waits for the other one for ever
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    found = SCENARIOS[scenario](rank, world)
    torch.save(found, Path(folder) / f"{scenario}.{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
