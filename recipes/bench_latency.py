"""Whether a compact model is as much faster as its MACs promise: forwards of dense and compact in turn, one process.

    python recipes/bench_latency.py                            # BERT, ViT, ResNet and Llama shapes at half the MACs
    python recipes/bench_latency.py --model bert --divisible 1 8 16 --batch-size 8 32

Every layer keeps a share of its own, drawn between .6 and 1.4 of the mean, as after training; --divisible makes widths
multiples. The last column is speed-up by promised speed-up: 100 % is all of it.
"""

import argparse
import copy
import statistics
import time

import numpy as np
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_oto import PruningPlan, ZIGPartition, compact, measure, partition_zigs

TEXT = {"input_ids": torch.arange(128)[None]}
IMAGE = {"pixel_values": torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))}
LLAMA = LlamaConfig(hidden_size=768, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=12,
                    num_key_value_heads=4, vocab_size=2000)  # fmt: skip
MODELS = {
    "bert": (lambda: BertForSequenceClassification(BertConfig(num_hidden_layers=4)), TEXT),
    "vit": (lambda: ViTForImageClassification(ViTConfig(num_hidden_layers=4)), IMAGE),
    "resnet": (lambda: ResNetForImageClassification(ResNetConfig()), IMAGE),
    "llama": (lambda: LlamaForCausalLM(LLAMA), TEXT),
}


def plan_of(partition: ZIGPartition, macs_left: float, divisible: int) -> PruningPlan:
    """Unequal widths, multiples of `divisible`, that leave about a fraction of the MACs."""
    spread = np.random.default_rng(0).uniform(0.6, 1.4, len(partition.axes))
    sizes = np.array([axis.size for axis in partition.axes])
    step = np.array([divisible if axis.kind in ("units", "channels") else 1 for axis in partition.axes])

    def kept(share: float) -> np.ndarray:
        return np.minimum(sizes, np.maximum(step, np.round(sizes * np.clip(share * spread, 0, 1) / step) * step))

    shares = np.linspace(0.05, 1, 400)
    dense = partition.work.left(0 * sizes)
    off = [abs(partition.work.left(sizes - kept(share)) / dense - macs_left) for share in shares]
    best = kept(shares[int(np.argmin(off))]).astype(int)
    return PruningPlan({axis.name: range(n) for axis, n in zip(partition.axes, best, strict=True)})


def seconds(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> float:
    """One forward."""
    start = time.perf_counter()
    model(**inputs)
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)
    return time.perf_counter() - start


@torch.no_grad()
def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, nargs="+", default=list(MODELS))
    parser.add_argument("--macs", type=float, default=0.5, help="what is left")
    parser.add_argument("--divisible", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[8])
    parser.add_argument("--protect", nargs="*", default=[])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    print(f"{device}, {options.threads} threads; medians of {options.rounds} rounds (quartiles)")
    print("model   multiple  batch    dense ms          compact ms        MACs left  time left  of the promise")
    for name in options.model:
        torch.manual_seed(0)
        build, example = MODELS[name]
        model = build().eval().to(device)
        partition = partition_zigs(model, example, protect=options.protect)
        for divisible in options.divisible:
            small = compact(copy.deepcopy(model), partition, plan_of(partition, options.macs, divisible))
            for size in options.batch_size:
                inputs = {key: value.expand(size, *value.shape[1:]).to(device) for key, value in example.items()}
                compact_macs, dense_macs = (m["macs"] for m in measure(small, model, inputs=inputs, seconds=0))
                left = compact_macs / dense_macs
                times = np.array([[seconds(m, inputs) for m in (model, small)] for _ in range(options.rounds + 1)])[1:]
                ratio = statistics.median(times[:, 1] / times[:, 0])
                shown = [
                    "{1:6.1f} ({0:.1f}-{2:.1f})".format(*np.quantile(t, (0.25, 0.5, 0.75)) * 1e3) for t in times.T
                ]
                print(f"{name:7} {divisible:8} {size:6}    {shown[0]:17} {shown[1]:17} {left:9.1%} {ratio:10.1%} "
                      f"{left / ratio:10.0%}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
