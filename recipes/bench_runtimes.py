"""Whether a compact model keeps its speed-up in other runtimes: torch, ONNX Runtime and OpenVINO in turn, one process.

    python recipes/bench_runtimes.py                           # BERT and ViT shapes at half the MACs, one CPU thread
    python recipes/bench_runtimes.py --model resnet llama --divisible 1 --batch-size 1 8

It needs `pip install onnxruntime onnxscript openvino`; without openvino its rows are missing. int8 is the file that
ONNX Runtime's `quantize_dynamic` writes, in both runtimes. The widths are those of bench_latency.py. The difference is
that of the compact model's outputs from torch's in float32, relative to the largest.
"""

import argparse
import copy
import importlib.util
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from bench_latency import MODELS, plan_of
from onnxruntime.quantization import QuantType, quantize_dynamic
from transformers import PreTrainedModel

from hf_oto import compact, measure, partition_zigs

Arrays = dict[str, np.ndarray]
Run = Callable[[Arrays], np.ndarray]  # inputs -> logits


def by_torch(model: PreTrainedModel) -> Run:
    forward = torch.no_grad()(model.forward)
    return lambda arrays: forward(**{name: torch.from_numpy(x) for name, x in arrays.items()}).logits.numpy()


def by_onnx_runtime(file: Path, threads: int) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda arrays: session.run(None, arrays)[0]


def by_openvino(file: Path, threads: int) -> Run:
    sys.modules["openvino_telemetry"] = None  # a benchmark reports to nobody
    import openvino

    # A CPU that has bfloat16 would otherwise compute in that.
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(file, "CPU", options)
    return lambda arrays: compiled(arrays)[0]


def runtimes(model: PreTrainedModel, example: dict[str, torch.Tensor], threads: int) -> dict[str, Run]:
    """The same model in every runtime; any batch size."""
    model.config.use_cache = False  # a graph returns logits alone
    dynamic = {name: {0: "batch"} for name in example}
    pair = {name: x.expand(2, *x.shape[1:]) for name, x in example.items()}  # a batch of one would stay one
    with tempfile.TemporaryDirectory() as folder:
        file, file_int8 = Path(folder) / "model.onnx", Path(folder) / "model.int8.onnx"
        torch.onnx.export(model, (), str(file), kwargs=pair, dynamo=True, dynamic_shapes=dynamic, verbose=False)
        quantize_dynamic(file, file_int8, weight_type=QuantType.QInt8)
        runs = {"torch": by_torch(model)}
        runs["onnxruntime f32"] = by_onnx_runtime(file, threads)
        runs["onnxruntime int8"] = by_onnx_runtime(file_int8, threads)
        if importlib.util.find_spec("openvino") is not None:
            runs["openvino f32"] = by_openvino(file, threads)
            runs["openvino int8"] = by_openvino(file_int8, threads)
    return runs


def seconds(run: Run, arrays: Arrays) -> float:
    """One forward."""
    start = time.perf_counter()
    run(arrays)
    return time.perf_counter() - start


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, nargs="+", default=["bert", "vit"])
    parser.add_argument("--macs", type=float, default=0.5, help="what is left")
    parser.add_argument("--divisible", type=int, default=8, help="widths are multiples of this")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # the exporter and the quantiser advise on other models than these
    torch.set_num_threads(options.threads)
    print(f"{options.threads} threads; medians of {options.rounds} rounds")
    print("model   batch  runtime           dense ms  compact ms  MACs left  time left  difference")
    for name in options.model:
        torch.manual_seed(0)
        build, example = MODELS[name]
        model = build().eval()
        partition = partition_zigs(model, example)
        small = compact(copy.deepcopy(model), partition, plan_of(partition, options.macs, options.divisible))
        compact_macs, dense_macs = (m["macs"] for m in measure(small, model, inputs=example, seconds=0))
        dense_runs, compact_runs = (runtimes(m, example, options.threads) for m in (model, small))
        for size in options.batch_size:
            arrays = {key: x.expand(size, *x.shape[1:]).numpy() for key, x in example.items()}
            times = {runtime: [] for runtime in dense_runs}
            for _ in range(options.rounds + 1):
                for runtime, pairs in times.items():
                    pairs.append((seconds(dense_runs[runtime], arrays), seconds(compact_runs[runtime], arrays)))
            expected = compact_runs["torch"](arrays)
            for runtime, pairs in times.items():
                dense, small_seconds = np.array(pairs[1:]).T  # the first round warms up
                off = np.abs(compact_runs[runtime](arrays) - expected).max() / np.abs(expected).max()
                print(f"{name:7} {size:5}  {runtime:16} {np.median(dense) * 1e3:9.1f} "
                      f"{np.median(small_seconds) * 1e3:11.1f} {compact_macs / dense_macs:10.1%} "
                      f"{np.median(small_seconds / dense):10.1%} {off:11.1e}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
