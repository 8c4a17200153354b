"""What test_zero.py launches on two processes: `zero_worker.py FOLDER SCENARIO ...`.

Every rank writes what it ended with to FOLDER/SCENARIO.RANK.pt; the test compares ranks, and with one process.
"""

import contextlib
import faulthandler
import gc
import os
import socket
import sys
import weakref
from pathlib import Path
from unittest import mock

os.environ |= {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}

import deepspeed
import distributed_worker as plain
import torch
import torch.distributed as dist
import transformers as tf
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import nn

from hf_oto import DHSPG, OTOTrainer, OTOTrainingArguments, flat, sharded, whole, zero
from hf_oto.flat import flat_weights, master_weights
from hf_oto.modeling_oto import OTOError
from hf_oto.sharded import ShardedWeights
from hf_oto.zero import ZeroDHSPG

# else DeepSpeed compiles a transport of its own: gloo is what is asked for
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
torch.set_num_threads(1)
SIZE = 16  # examples a step
IN_PARTS = {"stage": 3, "sub_group_size": 50, "stage3_param_persistence_threshold": 0}
BF16 = {"bf16": {"enabled": True}}


# by hand ------------------------------------------------------------------------------------------


def groups_of(model):
    """Weights in one group and biases in another one, as the Trainer has them; one number is a group of its own."""
    named = [(name, p) for name, p in model.named_parameters() if name != "d.bias"]
    weights = [p for name, p in named if name.endswith("weight")]
    biases = [p for name, p in named if name.endswith("bias")]
    return [
        {"params": weights, "weight_decay": 0.1},
        {"params": biases, "weight_decay": 0.0},
        {"params": [model.d.bias], "weight_decay": 0.0},
    ]


def optimizer_for(model, cls=ZeroDHSPG, **more):
    return plain.optimizer_for(model, cls=cls, params=groups_of(model), **more)


def engine_for(stage, cls=ZeroDHSPG, attached=True, frozen=False, dead=False, config=None, **more):
    model = plain.net("dead" if dead else "")
    model.d.weight.requires_grad_(not frozen)
    optimizer = optimizer_for(model, cls, **more)
    whole_config = {
        "train_micro_batch_size_per_gpu": SIZE // dist.get_world_size(),
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
    }
    whole_config |= config or {}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=whole_config)
    if attached:
        optimizer.attach(engine)
    return engine, optimizer


def train(engine, start=0, stop=plain.STEPS, spoilt=None):
    """Trains as `distributed_worker.train` does. Before the step `spoilt` there is one without finite gradients."""
    dtype = next(engine.module.parameters()).dtype
    for step in range(start, stop):
        x, y = plain.batch(step, dist.get_rank(), dist.get_world_size(), SIZE)
        for factor in [float("nan"), 1.0] if step == spoilt else [1.0]:
            loss = nn.functional.cross_entropy(engine(x.to(dtype)).float(), y) * factor
            engine.backward(loss)
            engine.step()


def half_weights(model):
    """The weights that the model computes with."""
    with deepspeed.zero.GatheredParameters([p for p in model.parameters() if hasattr(p, "ds_id")]):
        return {name: p.detach().float().clone() for name, p in model.named_parameters()}


def result(engine, optimizer):
    return {
        "weights": {name: weight.clone() for name, weight in master_weights(engine.module)},
        "half": half_weights(engine.module),
        "flats": len(optimizer._flats),
        "zero": optimizer.made_zero,
        "still zero": optimizer.zero,
        "skipped": engine.skipped_steps,
        "reached": optimizer.target_reached,
    }


def ran(stage, spoilt=None, **more):
    engine, optimizer = engine_for(stage, **more)
    train(engine, spoilt=spoilt)
    return result(engine, optimizer)


@contextlib.contextmanager
def sums_of_one_rank():
    """Breaks the rule: a rank chooses by what it has."""
    over_ranks = ZeroDHSPG._over_ranks
    ZeroDHSPG._over_ranks = lambda self, sums: sums
    try:
        yield
    finally:
        ZeroDHSPG._over_ranks = over_ranks


def errors_of(**attempts):
    """What a user reads who tries these."""
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except OTOError as error:
            found[name] = str(error)
    return found


def other_weights():
    engine, optimizer = engine_for(2, attached=False)
    with torch.no_grad():
        engine.module.b.weight += 1
    optimizer.attach(engine)


def without_a_weight():
    """As if a release of DeepSpeed kept one parameter elsewhere."""
    fragments = flat.fragments
    flat.fragments = lambda *given: (fragment for fragment in fragments(*given) if fragment.param != "c.bias")
    try:
        engine_for(3)
    finally:
        flat.fragments = fragments


def other_model():
    engine, optimizer = engine_for(2, attached=False)
    engine.module = nn.Sequential(engine.module)
    optimizer.attach(engine)


def resumed(folder, forgetful=False):
    engine, optimizer = engine_for(2)
    engine.load_checkpoint(folder)
    if forgetful:
        optimizer.param_groups[0]["dhspg_step"] = 0
    train(engine, start=13)
    return result(engine, optimizer)


def by_hand(rank, world, folder):
    found = {f"zero{stage}": ran(stage) for stage in (1, 2, 3)}
    found["zero3 in parts"] = ran(3, config={"zero_optimization": IN_PARTS})
    found["zero3 frozen"] = ran(3, frozen=True)
    found["zero3 clipped"] = ran(3, config={"gradient_clipping": 0.05})
    found["zero3 spoilt"] = ran(3, spoilt=7)
    found["bf16 zero3"] = ran(3, config=BF16)
    found["clipped"] = ran(2, config={"gradient_clipping": 0.05})
    found["spoilt"] = ran(2, spoilt=7)
    found["frozen"] = ran(1, frozen=True)
    found["dead"] = ran(2, dead=True)
    found["moments"] = ran(2, salience=salience)
    with sums_of_one_rank():
        found["broken"] = ran(2)
    found["bf16 zero1"] = ran(1, config=BF16)
    found["bf16 zero2"] = ran(2, config=BF16)
    found["bf16 in float32"] = ran(1, config=BF16 | {"data_types": {"grad_accum_dtype": "fp32"}})
    place = str(folder / "by hand")
    engine, _ = engine_for(2)
    train(engine, stop=13)
    engine.save_checkpoint(place)
    found["resumed"] = resumed(place)
    found["forgetful"] = resumed(place, forgetful=True)
    found["errors"] = errors_of(
        detached=lambda: train(engine_for(2, attached=False)[0], stop=1),
        plain=lambda: train(engine_for(2, cls=DHSPG, attached=False)[0], stop=1),
        elastic=lambda: engine_for(2, config={"zero_optimization": {"stage": 2, "elastic_checkpoint": True}}),
        other=other_weights,
        gap=without_a_weight,
        model=other_model,
    )
    return found


def salience(moments):
    return moments.weight_squared + moments.gradient_squared


# the Trainer --------------------------------------------------------------------------------------


def force_deepspeed():
    """accelerate has DeepSpeed on accelerators only, and on CPUs silently trains without: here the real path runs."""
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_CPU)
    tf.training_args.is_torch_bf16_gpu_available = lambda: True


def trained(folder, stage, config=None, **more):
    whole_config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": stage},
    }
    return plain.trained(folder, world=2, use_cpu=False, deepspeed=whole_config | (config or {}), **more)


def vit():
    """Its inputs are no integers, and DeepSpeed wants them in 16 bits."""
    tf.set_seed(0)
    config = tf.ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=33, image_size=32, patch_size=8,
        num_labels=3,
    )  # fmt: skip
    return tf.ViTForImageClassification(config)


class Interrupts(tf.TrainerCallback):
    """Fails in the middle."""

    def on_step_end(self, *_, **__):
        raise ZeroDivisionError


class Again(OTOTrainer):
    """Trains again after an interruption."""

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        except ZeroDivisionError:
            return super().train(*args, **kwargs)


def again_after_an_interruption(folder):
    before, plain.OTOTrainer = plain.OTOTrainer, Again
    try:
        trained(folder, 2, callbacks=[Interrupts()])
    finally:
        plain.OTOTrainer = before


def divided(folder):
    """A run with a model that ZeRO-3 divides while it is made, because there are arguments already."""
    make = plain.bert
    whole = make()
    if dist.get_rank() == 0:
        whole.save_pretrained(folder / "saved")
    dist.barrier()
    found = {}

    def load():
        model = tf.BertForSequenceClassification.from_pretrained(folder / "saved")
        found["empty"] = all(p.numel() == 0 for p in model.parameters())
        return model

    plain.bert = load
    try:
        return trained(folder / "divided", 3) | found
    finally:
        plain.bert = make


def read_from_outside(folder):
    """A run with a model that reads a weight of a layer while another one runs: it can't run layer by layer."""
    make = plain.bert

    def with_hook():
        model = make()
        dense = model.bert.encoder.layer[0].output.dense
        model.classifier.register_forward_hook(lambda module, args, output: output + 0 * dense.bias.sum())
        return model

    blocks_of = sharded.blocks_of
    sharded.blocks_of = None  # nobody asks for them
    plain.bert = with_hook
    try:
        return trained(folder / "outside", 3)
    finally:
        plain.bert, sharded.blocks_of = make, blocks_of


OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
BEST = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "best", "load_best_model_at_end": True}


def trainer(rank, world, folder):
    force_deepspeed()
    found = {"zero2": freed(folder / "zero2", 2)}
    again = {"stage": 2, "resume": str(folder / "zero2" / "checkpoint-21")}
    found["zero1"] = trained(folder / "zero1", 1, accumulate=2)
    found["resnet"] = trained(folder / "resnet", 2, kind="resnet")
    plain.resnet = vit
    found["vit bf16"] = trained(folder / "vit bf16", 2, kind="resnet", bf16=True)
    found["resumed"] = trained(folder / "resumed", **again)
    found["zero3"] = freed(folder / "zero3", 3)
    thrice = {"stage": 3, "resume": str(folder / "zero3" / "checkpoint-21")}
    found["zero3 resumed"] = trained(folder / "zero3 resumed", **thrice)
    found["divided"] = divided(folder)
    found["outside"] = read_from_outside(folder)
    found["zero3 bf16"] = trained(folder / "zero3 bf16", 3, bf16=True)
    found["forgetful"] = trained(folder / "forgetful", callbacks=[plain.Forgets()], **again)
    found["bf16"] = trained(folder / "bf16", 2, bf16=True)
    found["best"] = trained(folder / "best", 2, **BEST)
    found["errors"] = errors_of(
        optimizer=lambda: trained(folder / "no", 2, config={"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}),
        offload=lambda: trained(folder / "no", 2, config={"zero_optimization": OFFLOAD}),
        paper=lambda: trained(folder / "no", 2, pruning_mode="paper"),
        again=lambda: again_after_an_interruption(folder / "no"),
        adafactor=lambda: trained(folder / "no", 2, optim="adafactor"),
        callback=lambda: trained(folder / "broken", callbacks=[plain.Breaks()], **thrice),
    )  # fmt: skip
    certify, of_shards = whole.certify, ShardedWeights.certify
    if rank == 0:  # the others hear of it
        whole.certify = lambda *given: certify(*given)._replace(cut=0.5)
    ShardedWeights.certify = lambda *given: of_shards(*given)._replace(cut=0.5)
    found["errors"] |= errors_of(
        certificate=lambda: trained(folder / "failed", **again),
        of_shards=lambda: trained(folder / "failed shards", **thrice),
    )
    whole.certify, ShardedWeights.certify = certify, of_shards
    return found


def freed(folder, stage):
    """A run, and whether in its end nothing was left of DeepSpeed's flat tensors."""
    flats = []

    def noted(engine_optimizer):
        found = flat_weights(engine_optimizer)
        flats.extend(map(weakref.ref, found))
        return found

    with mock.patch.object(zero, "flat_weights", noted):
        run = trained(folder, stage, save_strategy="steps", save_steps=21)
    gc.collect()
    return run | {"freed": bool(flats) and all(reference() is None for reference in flats)}


def launched(rank, world, folder):
    """The arguments say nothing of DeepSpeed: `accelerate launch` does."""
    force_deepspeed()
    found = {"zero2": plain.trained(folder / "launched", world=2, use_cpu=False)}
    os.environ["ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"] = "cpu"  # as another config of the launcher
    args = OTOTrainingArguments(str(folder / "no"), report_to="none")
    return found | {"errors": errors_of(offload=lambda: OTOTrainer(plain.bert(), args))}


SCENARIOS = {f.__name__: f for f in (by_hand, trainer, launched)}


def run(folder, scenarios):
    gc.freeze()  # accelerate collects often; what the imports brought needs no second look
    faulthandler.dump_traceback_later(200, exit=True)  # a rank that waits for the other one for ever
    deepspeed.init_distributed("gloo")
    for scenario in scenarios:
        found = SCENARIOS[scenario](dist.get_rank(), dist.get_world_size(), Path(folder))
        torch.save(found, Path(folder, f"{scenario}.{dist.get_rank()}.pt"))
        AcceleratorState._reset_state(reset_partial_state=True)
    dist.barrier()
    dist.destroy_process_group()  # else gloo's threads may still run when the process ends, which aborts it


def forked(rank, folder, scenarios):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    run(folder, scenarios)


def main():
    """One rank of a launcher; without one both ranks, forked after the imports."""
    folder, *scenarios = sys.argv[1:]
    if "RANK" in os.environ:
        return run(folder, scenarios)
    with socket.socket() as s:
        s.bind(("localhost", 0))
        os.environ["MASTER_PORT"] = str(s.getsockname()[1])
    torch.multiprocessing.start_processes(forked, (folder, scenarios), 2, start_method="fork")


if __name__ == "__main__":
    main()
