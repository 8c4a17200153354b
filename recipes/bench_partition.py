"""What the analysis costs: trace, solve and rehearsal in CPU seconds of one thread, and peak memory, without weights.

    python recipes/bench_partition.py            # real-size configs, and Llama shapes of 8, 16, 32 and 64 layers
    python recipes/bench_partition.py llama-70b  # one of them

Every model is built on the meta device and measured in a process of its own: the first partition, which also fills
torch's caches, then the fastest and the median of up to eleven more.
"""

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import transformers as tf

import hf_oto


def text(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sixteen tokens."""
    return {"input_ids": torch.arange(16)[None] + 5, **more}


def image() -> dict[str, torch.Tensor]:
    """One image of 224 pixels."""
    return {"pixel_values": torch.zeros(1, 3, 224, 224)}


def llama(layers: int, hidden: int, ffn: int, heads: int, kv: int) -> Callable[[], tf.PreTrainedModel]:
    """Llama shapes."""
    config = tf.LlamaConfig(
        hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv,
    )  # fmt: skip
    return lambda: tf.LlamaForCausalLM(config)


MODELS = {
    "bert-base": (lambda: tf.BertForMaskedLM(tf.BertConfig()), text),
    "vit-base": (lambda: tf.ViTForImageClassification(tf.ViTConfig()), image),
    "resnet-50": (lambda: tf.ResNetForImageClassification(tf.ResNetConfig()), image),
    "convnext-tiny": (lambda: tf.ConvNextForImageClassification(tf.ConvNextConfig()), image),
    "whisper-small": (
        lambda: tf.WhisperForConditionalGeneration(
            tf.WhisperConfig(
                d_model=768,
                encoder_layers=12,
                decoder_layers=12,
                encoder_attention_heads=12,
                decoder_attention_heads=12,
                encoder_ffn_dim=3072,
                decoder_ffn_dim=3072,
            )
        ),
        lambda: {"input_features": torch.zeros(1, 80, 3000), "decoder_input_ids": torch.arange(8)[None]},
    ),
    "llama-70b": (llama(80, 8192, 28672, 64, 8), text),
    "llama-405b": (llama(126, 16384, 53248, 128, 8), text),
    "deepseek-v3": (lambda: tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config()), text),  # its defaults are those sizes
    **{f"llama-{n}-layers": (llama(n, 4096, 11008, 32, 8), text) for n in (8, 16, 32, 64)},
}


def measure(name: str) -> None:
    """Prints the row of one model."""
    torch.set_num_threads(1)
    build, inputs = MODELS[name]
    with torch.device("meta"):
        model = build().eval()
    seconds = []
    while len(seconds) < 4 or (len(seconds) < 12 and sum(seconds) < 10):
        start = time.process_time()
        partition = hf_oto.partition_zigs(model, inputs())
        seconds.append(time.process_time() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    axes, zigs = len(partition.axes), partition.num_zigs
    first, *more = seconds
    print(
        f"{name:16}{axes:6}{zigs:11,}{first:9.2f}{min(more):9.2f}{statistics.median(more):9.2f}{peak:9.2f}", flush=True
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(sys.argv[1])
    else:
        print(
            f"{'model':16}{'axes':>6}{'ZIGs':>11}{'first s':>9}{'least s':>9}{'median s':>9}{'peak GB':>9}", flush=True
        )
        for name in MODELS:
            subprocess.run([sys.executable, __file__, name], check=True)
