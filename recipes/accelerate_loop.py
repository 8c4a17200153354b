"""A plain accelerate loop without Trainer: one process, DDP or FSDP2, interrupted and taken up again.

    accelerate launch --config_file recipes/accelerate/one.yaml recipes/accelerate_loop.py    # or ddp, fsdp2
    torchrun --nproc_per_node 2 recipes/accelerate_loop.py --cpu              # DDP where there is no GPU
    python recipes/accelerate_loop.py --save-at 200                  # writes out/accelerate_loop/step-200
    python recipes/accelerate_loop.py --resume out/accelerate_loop/step-200   # ends bit by bit as if never stopped
    python recipes/accelerate_loop.py --smoke                        # a few steps, to see that everything runs

What OTO adds to a loop: the partition before `prepare`, DHSPG as the optimizer, and three lines at the end.
"""

import argparse
import copy
import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin
from common import collate, digits, metric, vit
from torch.utils.data import DataLoader
from transformers import get_linear_schedule_with_warmup, set_seed

from hf_oto import DHSPG, PruningPlan, check_zero_invariance, compact, measure, partition_zigs

ACCUMULATE = 2  # micro-batches a step


def micro_batches(loader: DataLoader, accelerator: Accelerator, start: int) -> Iterator[dict[str, torch.Tensor]]:
    """Micro-batches without end from number `start` on; every epoch has an order of its own."""
    for epoch in itertools.count(start // len(loader)):
        rest = accelerator.skip_first_batches(loader, start % len(loader)) if start % len(loader) else loader
        rest.set_epoch(epoch)
        yield from rest
        start = 0


def main() -> None:
    """Runs the recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target-macs", type=float, default=0.5, help="fraction of the MACs that is left")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=32, help="examples a step, over all processes")
    parser.add_argument("--save-at", type=int, default=0, help="the step after which the state is saved")
    parser.add_argument("--resume", type=Path, help="what --save-at wrote")
    parser.add_argument("--out", type=Path, default=Path("out/accelerate_loop"))
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="30 steps")
    options = parser.parse_args()
    steps = 30 if options.smoke else options.steps

    accelerator = Accelerator(
        cpu=options.cpu,
        # split: the batch stays as large as it is, however many processes share it
        dataloader_config=DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True),
        gradient_accumulation_plugin=GradientAccumulationPlugin(ACCUMULATE, sync_with_dataloader=False),
    )
    set_seed(0)
    data = digits()
    size = options.batch_size // ACCUMULATE
    loader = DataLoader(data["train"], size, shuffle=True, collate_fn=collate, drop_last=True)
    model = vit(10)
    # on the whole model: before prepare() shards it
    partition = partition_zigs(model, collate([data["train"][i] for i in range(2)]))
    optimizer = DHSPG(
        model, partition, base=torch.optim.AdamW, lr=1e-3, weight_decay=0.01, total_steps=steps,
        target_macs=options.target_macs,
    )  # fmt: skip
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)

    done = 0
    if options.resume:
        accelerator.load_state(options.resume)
        done = int(options.resume.name.removeprefix("step-"))
    batches = micro_batches(loader, accelerator, done * ACCUMULATE)
    model.train()
    while done < steps:
        for batch in itertools.islice(batches, ACCUMULATE):
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        done += 1
        if done % max(10, steps // 5) == 0:
            accelerator.print(f"step {done}: loss {loss:.3f}, group sparsity {optimizer.optimizer.group_sparsity:.2f}")
        if done == options.save_at:
            accelerator.save_state(options.out / f"step-{done}")

    weights = accelerator.get_state_dict(model)  # whole on the main process, also of a sharded model
    if accelerator.is_main_process:
        whole = vit(10)
        whole.load_state_dict(weights)
        plan = PruningPlan.from_zeros(whole, partition)
        test = collate(list(data["test"]))
        few = {name: tensor[:8] for name, tensor in test.items()}
        print(f"certificate: outputs move by {check_zero_invariance(whole, partition, few, plan):.1e}")
        small = compact(copy.deepcopy(whole), partition, plan).eval()
        dense, left = measure(whole, small, inputs=few)
        for name in ("params", "macs", "latency"):
            print(f"{name:8} {left[name] / dense[name]:4.0%} of the dense model's")
        with torch.no_grad():
            guessed = small(test["pixel_values"]).logits.argmax(-1)
        right = metric("accuracy").compute(predictions=guessed, references=test["labels"])
        print(f"accuracy of the compact model: {right['accuracy']:.4f}")
        small.save_pretrained(options.out / "compact")
    accelerator.end_training()


if __name__ == "__main__":
    main()
