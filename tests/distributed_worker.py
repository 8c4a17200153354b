"""What test_distributed.py launches on several processes: `distributed_worker.py FOLDER SCENARIO ...`.

Every rank writes what it ended with to FOLDER/SCENARIO.RANK.pt; the test compares ranks, and with one process.
"""

import contextlib
import faulthandler
import gc
import os
import runpy
import socket
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers as tf
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial
from torch.nn.parallel import DistributedDataParallel

from hf_oto import DHSPG, OTOTrainer, OTOTrainingArguments, ZIGPartition, partition_zigs, sharded
from hf_oto.paper import PaperDHSPG, Penalty
from hf_oto.ranks import of_rank_zero
from hf_oto.zigs import Member, OTOError, PrunableAxis

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


def net(kind=""):
    """With "alike" the ZIGs of b differ by rounding only, with "tied" every salience is exactly 0, with "dead" the
    second unit of b, and what reads it, is zero."""
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        if kind == "alike":
            for p, dim in ((model.b.weight, 0), (model.c.weight, 1), (model.d.weight, 1)):
                p[:] = p.narrow(dim, 0, 1).clone()
            model.b.bias[:] = 0.1
        elif kind == "tied":
            model.b.bias[:] = -100.0
        elif kind == "dead":
            for p, dim in ((model.b.weight, 0), (model.b.bias, 0), (model.c.weight, 1), (model.d.weight, 1)):
                p.select(dim, 1).zero_()
    return model


def optimizer_for(model, cls=DHSPG, **more):
    base = {"base": torch.optim.AdamW, "lr": 1e-2, "num_events": 2}
    if cls is PaperDHSPG:
        base = {"base": torch.optim.SGD, "lr": 0.3, "penalty": Penalty(0.5, 2.0, 10.0, 0.0)}
    more = {"target_group_sparsity": 0.5, "total_steps": STEPS} | more
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
        rough = [
            [part._replace(values=part.values * (1 + 1e-6 * torch.randn(part.values.shape, generator=noise)))
             for part in parts]
            for parts in many
        ]  # fmt: skip
        return super()._sums(*rough)


@contextlib.contextmanager
def watched(found):
    """Counts decisions and what they send; to gather a parameter is an error."""
    reduce, sums, gather = dist.all_reduce, DHSPG._sums, DTensor.redistribute

    def all_reduce(t, *args, **more):
        found.setdefault("sent", []).append(t.numel())
        return reduce(t, *args, **more)

    def counted(self, *many):
        found["decisions"] = found.get("decisions", 0) + 1
        return sums(self, *many)

    def refuse(*_, **__):
        raise AssertionError("a parameter was gathered")

    dist.all_reduce, DHSPG._sums, DTensor.redistribute = all_reduce, counted, refuse
    try:
        yield
    finally:
        dist.all_reduce, DHSPG._sums, DTensor.redistribute = reduce, sums, gather


@contextlib.contextmanager
def silent(name):
    """Breaks the rule: this collective does nothing."""
    original = getattr(dist, name)
    setattr(dist, name, lambda *_, **__: None)
    try:
        yield
    finally:
        setattr(dist, name, original)


def optimizers(rank, world, folder):
    """One result per way to distribute the same training."""
    mesh = init_device_mesh("cpu", (world,))
    found = {}

    def sharded(kind="", after=True, mesh=mesh, parts=("a", ""), **more):
        model = net(kind)
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

    def ddp(kind="", **more):
        model = net(kind)
        optimizer = optimizer_for(model, **more)
        return DistributedDataParallel(model), optimizer

    found["ddp"] = ran(*ddp())
    found["ddp accumulated"] = ran(*ddp(), accumulate=2)
    found["ddp paper"] = ran(*ddp(cls=PaperDHSPG))
    found["ddp tied"] = ran(*ddp("tied"))
    found["ddp rough"] = ran(*ddp("alike", cls=Rough))
    with silent("broadcast"):
        model = net("alike")
        found["ddp rough, broken"] = ran(model, optimizer_for(model, cls=Rough), list(model.parameters()))
    found["traffic"] = {}
    model, optimizer, _ = sharded()
    with watched(found["traffic"]):
        train(model, optimizer, rank, world)
    found["fsdp2"] = result(model, optimizer)
    found["fsdp2 made before"] = ran(*sharded(after=False))
    found["fsdp2 accumulated"] = ran(*sharded(), accumulate=2)
    found["fsdp2 paper"] = ran(*sharded(cls=PaperDHSPG))
    found["fsdp2 tied"] = ran(*sharded("tied"))
    found["mixed"] = ran(*sharded(parts=("b", "d")))
    found["mixed paper"] = ran(*sharded(parts=("b", "d"), cls=PaperDHSPG))
    with silent("all_reduce"):  # of fsdp2 itself: reduce-scatter
        found["fsdp2, broken"] = ran(*sharded())
    for shape in ((1, world), (world, 1)):
        found[f"hsdp {shape}"] = ran(*sharded(mesh=init_device_mesh("cpu", shape, mesh_dim_names=("r", "s"))))

    found["refused"] = []
    parallel = net()
    parallel.a.weight = nn.Parameter(DTensor.from_local(parallel.a.weight.data, mesh, [Partial()]))
    for attempt in (lambda: partition_zigs(sharded()[0], {"x": batch(0)[0]}), lambda: optimizer_for(parallel).step()):
        try:
            attempt()
        except OTOError as error:
            found["refused"].append(str(error))
    return found


def hsdp(rank, world, folder):
    """Two replicas of two shards each."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicas", "shards"))
    model = net()
    for module in (model.a, model):
        fully_shard(module, mesh=mesh)
    optimizer = optimizer_for(model)
    train(model, optimizer, rank, world)
    return {"hsdp": result(model, optimizer)}


# the Trainer ------------------------------------------------------------------------------


def bert():
    tf.set_seed(0)
    config = tf.BertConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=33, vocab_size=60, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return tf.BertForSequenceClassification(config)


def resnet():
    tf.set_seed(0)
    config = tf.ResNetConfig(
        embedding_size=9, hidden_sizes=[9, 12], depths=[1, 1], layer_type="basic", num_labels=3
    )  # fmt: skip
    return tf.ResNetForImageClassification(config)


def rows(kind):
    g = torch.Generator().manual_seed(0)
    inputs = {"input_ids": torch.randint(3, 60, (64, 8), generator=g)}
    if kind == "resnet":
        inputs = {"pixel_values": torch.randn(64, 3, 32, 32, generator=g)}
    labels = torch.randint(0, 3, (64,), generator=g)
    return [{name: t[i] for name, t in inputs.items()} | {"labels": labels[i]} for i in range(64)]


class Watch(tf.TrainerCallback):
    """What a run looked like from inside: whether its parameters were sharded, how many parameters the model had in
    its steps, and its buffers when it ended."""

    def __init__(self):
        self.sharded, self.sizes, self.buffers = set(), set(), {}

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **_):
        groups = optimizer.param_groups
        found = [*model.parameters(), *(p for g in groups for p in g["params"])]
        self.sharded |= {isinstance(p, DTensor) for p in found}
        self.sizes.add(sum(p.numel() for p in model.parameters()))

    def on_train_end(self, args, state, control, model=None, **_):
        self.buffers = {
            n.removeprefix("module."): b.clone() for n, b in model.named_buffers() if b.is_floating_point()
        }


class Forgets(tf.TrainerCallback):
    """Breaks the rule: a resumed run without what DHSPG knew."""

    def on_train_begin(self, args, state, control, optimizer=None, **_):
        optimizer.param_groups[0]["dhspg_step"] = 0


class Breaks(tf.TrainerCallback):
    """Fails when all is trained, on one rank alone."""

    def on_train_end(self, *_, **__):
        if dist.get_rank() == 1:
            raise ZeroDivisionError("a callback of the user's")


def mean_loss(outputs, labels, num_items_in_batch=None):
    """The mean over all ranks and micro-batches: Trainer expects it so, the loss of these models is that of one."""
    loss = nn.functional.cross_entropy(outputs.logits, labels, reduction="sum")
    return loss / (num_items_in_batch or len(labels))


def trained(folder, kind="bert", world=1, accumulate=1, resume=None, callbacks=(), **more):
    """One run of 8 examples a step, however they are spread."""
    settings = dict(
        max_steps=48, pruning_window=(0.05, 0.95), target_group_sparsity=0.4, save_strategy="no",
        per_device_train_batch_size=8 // world // accumulate, gradient_accumulation_steps=accumulate,
        logging_strategy="no", learning_rate=5e-3, adam_epsilon=1e-4, report_to="none", disable_tqdm=True,
        use_cpu=True, remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip
    watch = Watch()
    args = OTOTrainingArguments(str(folder), **(settings | more))
    model = {"bert": bert, "resnet": resnet}[kind]()
    trainer = OTOTrainer(
        model, args, train_dataset=rows(kind), eval_dataset=rows(kind), callbacks=[watch, *callbacks],
        compute_loss_func=mean_loss,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    assert (trainer.model is model) is not args.uniform  # sharded or not, it is the user's own
    is_sharded = any(isinstance(p, DTensor) for p in trainer.model.parameters())
    zero = (args.deepspeed or {}).get("zero_optimization", {})
    assert is_sharded == (bool(args.fsdp) or zero.get("stage") == 3)
    trainer.save_model(str(folder / "compact"))
    assert any(isinstance(p, DTensor) for p in trainer.model.parameters()) == is_sharded  # saving changes nothing
    return {
        "weights": whole_state(trainer.model), "plan": trainer.plan.to_json(), "sharded": watch.sharded,
        "sizes": watch.sizes, "buffers": watch.buffers, "loss": trainer.evaluate()["eval_loss"],
        "sparsity": trainer.report["group_sparsity"],
        "difference": trainer.report["max_output_difference"], "files": sorted(os.listdir(folder / "compact")),
    }  # fmt: skip


def whole_state(model):
    """The weights of a model, also of a sharded one, and its buffers."""
    state = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in model.state_dict().items()}
    return {name: t.detach().clone() for name, t in state.items()}


def trainer_ddp(rank, world, folder):
    checkpoints = {"save_strategy": "steps", "save_steps": 15}
    accumulated = {"world": world, "accumulate": 2, "ddp_find_unused_parameters": True}
    ddp = trained(folder / "ddp", world=world, **checkpoints)
    checkpoint = folder / "ddp" / "checkpoint-30"
    assert (checkpoint / "oto_cuts.json").exists()
    return {
        "ddp": ddp,
        "ddp resumed": trained(folder / "ddp resumed", world=world, resume=str(checkpoint), **checkpoints),
        "ddp whole": trained(folder / "ddp whole", world=world, shrink=False),
        "ddp accumulated": trained(folder / "accumulated", **accumulated),
        "ddp resnet": trained(folder / "resnet", "resnet", world=world),
    }


LAYERS = {"bert": "BertLayer", "resnet": "ResNetStage"}


def force_fsdp2():
    """accelerate shards on GPUs only, and on CPUs silently trains with DDP: here the real path runs on CPUs."""
    init = AcceleratorState.__init__

    def forced(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self.mixed_precision)

    AcceleratorState.__init__ = forced
    # accelerate asks every model for its embeddings, and this one raises
    tf.ResNetForImageClassification.get_input_embeddings = lambda self: None


class Unsendable(Exception):
    def __reduce__(self):
        raise TypeError("for this process only")


def fail():
    raise Unsendable("the disk is full")


def trainer_fsdp2(rank, world, folder):
    force_fsdp2()
    found = {}
    for kind, state in (("bert", "FULL"), ("bert", "SHARDED"), ("resnet", "SHARDED")):
        name = f"{kind} {state}"
        # accelerate's default for BERT shards the embeddings twice, and fails
        config = {"state_dict_type": f"{state}_STATE_DICT", "transformer_layer_cls_to_wrap": [LAYERS[kind]]}
        more = {"kind": kind, "world": world, "fsdp": True, "fsdp_config": config}
        found[name] = trained(folder / name, save_strategy="steps", save_steps=21, **more)
        if kind == "bert":
            again = {"resume": str(folder / name / "checkpoint-21"), **more}
            found[f"{name} resumed"] = trained(folder / f"{name} resumed", **again)
            stock = f"uniform {state}"
            found[stock] = trained(folder / stock, uniform=True, target_group_sparsity=0.2, **more)
    found["forgetful"] = trained(folder / "forgetful", callbacks=[Forgets()], **again)
    try:
        trained(folder / "broken", callbacks=[Breaks()], **again)
    except OTOError as error:
        found["broken"] = str(error), type(error.__cause__).__name__
    original = sharded.largest_difference
    if rank == 0:  # the others hear of it
        sharded.largest_difference = lambda *_: 0.5
    try:
        trained(folder / "failed", **again)
    except OTOError as error:
        found["failed"] = str(error)
    sharded.largest_difference = original
    try:
        of_rank_zero(fail)
    except Exception as error:
        found["unsendable"] = str(error)
    path = Path(__file__).parents[1] / "recipes" / "accelerate" / "fsdp2.yaml"
    asked = load_config_from_file(str(path)).fsdp_config
    # what `accelerate launch` makes of its config file
    launcher = {name.upper().replace("_LAYER_CLS_", "_CLS_"): str(value) for name, value in asked.items()}
    launcher["ACCELERATE_USE_FSDP"] = "true"
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ |= launcher
    recipe(folder / "loop sharded", "--save-at", "13")
    return found


def loop_ddp(rank, world, folder):
    """Takes up what `accelerate launch recipes/accelerate_loop.py --save-at 13` left."""
    recipe(folder / "loop resumed", "--resume", str(folder / "loop" / "step-13"))
    return {}


def recipe(folder, *more):
    """recipes/accelerate_loop.py, in this process."""
    path = Path(__file__).parents[1] / "recipes" / "accelerate_loop.py"
    argv, sys.argv = sys.argv, [str(path), "--cpu", "--smoke", "--batch-size", "8", "--out", str(folder), *more]
    sys.path.insert(0, str(path.parent))
    end = Accelerator.end_training
    Accelerator.end_training = lambda self: None  # the process group is needed yet
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv, Accelerator.end_training = argv, end
        sys.path.remove(str(path.parent))
        AcceleratorState._reset_state(reset_partial_state=True)


SCENARIOS = {f.__name__: f for f in (optimizers, hsdp, trainer_ddp, trainer_fsdp2, loop_ddp)}


def run(scenario, folder):
    gc.freeze()  # accelerate collects often; what the imports brought needs no second look
    faulthandler.dump_traceback_later(200, exit=True)  # a rank that waits for the other one for ever
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = SCENARIOS[scenario](rank, dist.get_world_size(), folder)
    torch.save(found, folder / f"{scenario}.{rank}.pt")
    AcceleratorState._reset_state(reset_partial_state=True)


def forked(rank, world, scenario, folder):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "localhost"}
    run(scenario, folder)


def main():
    """One rank of a launcher; without one, all ranks, forked after the imports, as SCENARIO:RANKS ..."""
    folder, *scenarios = sys.argv[1:]
    if "RANK" in os.environ:
        return [run(scenario, Path(folder)) for scenario in scenarios]
    for scenario in scenarios:
        name, world = scenario.split(":")
        with socket.socket() as s:
            s.bind(("localhost", 0))
            os.environ["MASTER_PORT"] = str(s.getsockname()[1])
        arguments = (int(world), name, Path(folder))
        torch.multiprocessing.start_processes(forked, arguments, int(world), start_method="fork")


if __name__ == "__main__":
    main()
