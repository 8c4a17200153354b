"""What looking at a model and cutting it takes: peak memory of the partition, the check and the cut, in weights.

    python recipes/bench_memory.py                      # a Llama of 1.4 GB, in float32 and bfloat16
    python recipes/bench_memory.py --gigabytes 3 --dtypes bfloat16

Every step runs in a process of its own. A figure is how much more than the loaded model the step took at its peak, as
a multiple of the model's weights: 0.5 is half a model more. On the CPU it is the resident set, on a card what torch
allocated.
"""

import argparse
import os
import subprocess
import sys

import torch
import transformers as tf

from hf_oto import PruningPlan, check_zero_invariance, compact, partition_zigs

STEPS = ("partition", "check", "compact")


def llama(gigabytes: float, dtype: torch.dtype, device: str) -> tf.PreTrainedModel:
    """Llama shapes with about that many weights, nearly all of them in layers of 50 MB in float32."""
    config = tf.LlamaConfig(
        hidden_size=1024, intermediate_size=2752, num_attention_heads=16, num_key_value_heads=8, vocab_size=8000,
        num_hidden_layers=max(2, round(gigabytes * 1e9 / dtype.itemsize / 11.6e6)),
    )  # fmt: skip
    with torch.device(device):
        return tf.LlamaForCausalLM(config).to(dtype).eval()


def reset_peak(device: str) -> None:
    """Forgets the peak so far."""
    if device == "cpu":
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    else:
        torch.cuda.reset_peak_memory_stats()


def memory(device: str, peak: bool) -> int:
    """Bytes that the process holds, or held at its peak."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    with open("/proc/self/status") as file:
        lines = dict(line.split(":", 1) for line in file)
    return int(lines["VmHWM" if peak else "VmRSS"].split()[0]) * 1024


def run(step: str, gigabytes: float, dtype: torch.dtype, device: str) -> None:
    """Prints the row of one step."""
    torch.manual_seed(0)
    model = llama(gigabytes, dtype, device)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    inputs = {"input_ids": torch.arange(32, device=device).view(2, 16) + 5}
    partition = None
    if step != "partition":
        empty = tf.LlamaForCausalLM(model.config).to("meta") if device == "meta" else _without_weights(model)
        partition = partition_zigs(empty, {"input_ids": inputs["input_ids"].cpu()})
    elif device == "cpu":
        model(**inputs)  # kernels and libraries are no part of it
        partition_zigs(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)), {"input": torch.ones(1, 3)})
    plan = None if partition is None else PruningPlan({a.name: range((a.size + 1) // 2) for a in partition.axes})
    reset_peak(device)
    before = memory(device, peak=False)
    if step == "partition":
        partition_zigs(model, inputs)
    elif step == "check":
        check_zero_invariance(model, partition, inputs, plan)
    else:
        compact(model, partition, plan)
    more = memory(device, peak=True) - before
    name = str(dtype).removeprefix("torch.")
    print(f"{name:10}{step:14}{weights / 1e9:8.2f} GB{more / weights:10.2f}", flush=True)


def _without_weights(model: tf.PreTrainedModel) -> tf.PreTrainedModel:
    with torch.device("meta"):
        return type(model)(model.config).to(model.dtype).eval()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.4)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--step", choices=STEPS)
    options = parser.parse_args()
    if options.step:
        run(options.step, options.gigabytes, getattr(torch, options.dtypes[0]), options.device)
    else:
        # what is freed is given back at once: the peak is then what is held, not what glibc keeps for later
        os.environ |= {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
        print(f"{'dtype':10}{'step':14}{'weights':>11}{'peak':>10}", flush=True)
        for dtype in options.dtypes:
            for step in STEPS:
                same = ["--gigabytes", str(options.gigabytes), "--device", options.device, "--dtypes", dtype]
                subprocess.run([sys.executable, __file__, *same, "--step", step], check=True)
