"""What DHSPG costs beside its base optimizer: steps of both in turn, in one process, on one thread.

    python recipes/bench_optimizer.py                          # bert-base, resnet-50 and a small ViT; 1,000 steps each
    python recipes/bench_optimizer.py --model small --steps 200

The gradients are random and the same at every step; only optimizer steps are timed. A ratio is the sum over all steps
of a kind divided by the base optimizer's sum over the same steps; the median beside it is that of single steps.
"""

import argparse
import copy
import statistics
import time

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_oto import DHSPG, partition_zigs

SMALL = ViTConfig(
    hidden_size=192, num_hidden_layers=6, num_attention_heads=6, intermediate_size=768, image_size=32, patch_size=4
)
MODELS = {
    "bert-base": lambda: BertForSequenceClassification(BertConfig()),
    "resnet-50": lambda: ResNetForImageClassification(ResNetConfig()),
    "small": lambda: ViTForImageClassification(SMALL),
}
BASES = {
    "AdamW": (torch.optim.AdamW, {"lr": 1e-5, "fused": True, "weight_decay": 0.01}),
    "SGD": (torch.optim.SGD, {"lr": 1e-4, "fused": True, "momentum": 0.9}),
}


def inputs_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A small batch."""
    if model.main_input_name == "input_ids":
        return {"input_ids": torch.arange(32).view(2, 16)}
    size = getattr(model.config, "image_size", 64)
    return {"pixel_values": torch.randn(2, 3, size, size)}


def timed(optimizer: torch.optim.Optimizer) -> float:
    """Seconds of one step."""
    start = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - start


def bench(model: PreTrainedModel, base: str, steps: int, noise: bool) -> None:
    """Prints the ratios of one model and base; with noise, zero ZIGs have gradients too."""
    cls, settings = BASES[base]
    partition = partition_zigs(model, inputs_of(model))
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        p.grad = torch.randn(p.shape, generator=generator) * 1e-3
        q.grad = p.grad.clone()
    plain = cls(twin.parameters(), **settings)
    ours = DHSPG(model, partition, base=cls, total_steps=steps, **settings)
    events = ours.schedule.events
    rows: dict[str, list[tuple[float, float]]] = {}
    for now in range(1, steps + 1):
        pair = (timed(plain), timed(ours)) if now % 2 else (timed(ours), timed(plain))[::-1]
        if now in events:
            kind = "choice"
        elif now in ours.schedule.sample_steps:
            kind = "salience"
        elif now in ours.schedule.factors:
            kind = "shrinking"
        else:
            kind = "after the freeze" if now > events[-1] else "other"
        if now in events and not noise:  # a loss has no gradients there
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                p.grad.mul_(p != 0)
                q.grad.copy_(p.grad)
        if now > 3:  # the first steps make the optimizers' states
            rows.setdefault(kind, []).append(pair)
            rows.setdefault("whole run", []).append(pair)
    params = sum(p.numel() for p in model.parameters())
    memory, step = ours.nbytes / params / 4, 1e3 * statistics.median(a for a, _ in rows["whole run"])
    print(f"{base}, {params / 1e6:.1f}M parameters, {partition.num_zigs:,} ZIGs, memory {memory:.2%} of the weights, "
          f"base step {step:.1f} ms")  # fmt: skip
    whole = sum(b - a for a, b in rows["whole run"])
    for kind, pairs in sorted(rows.items(), key=lambda row: -len(row[1])):
        ratio = sum(b for _, b in pairs) / sum(a for a, _ in pairs)
        median = statistics.median(b / a for a, b in pairs)
        share = sum(b - a for a, b in pairs) / whole
        print(
            f"    {kind:17} {len(pairs):5} steps  {ratio:6.3f}  median {median:6.3f}  {share:5.0%} of the extra time"
        )


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--base", choices=BASES, action="append")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--noise", action="store_true", help="gradients on zero ZIGs too: they are undone every step")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.model or MODELS:
        torch.manual_seed(0)
        model = MODELS[name]()
        for base in options.base or BASES:
            print(name, end=": ")
            bench(copy.deepcopy(model), base, options.steps, options.noise)


if __name__ == "__main__":
    main()
