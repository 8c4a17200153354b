"""What people do with a model's folder, done in a fresh process on three checkpoints of one model: see test_loaders.

`compact` is the pruned model, `stock` the same with its zeros filled in, `full` the model before the cut. A check
returns what came out: from `compact` the same as from `stock`, from `full` something else. What returns nothing
asserts its law itself. Where `stock` raises, Transformers can't do it, and nothing is asked of `compact`.

Run: python loaders_worker.py FOLDER OUT GROUP [CHECK ...]; with GROUP `trusted` hf_oto cannot be imported. The group
`by_hand` takes long and is in no test.
"""

from __future__ import annotations

import copy
import inspect
import json
import sys
import time
import traceback
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers as tf
from models import LENGTH, TABLE, VOCAB, text
from PIL import Image
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_DECISION_MAPPING_NAMES

FOLDER, OUT, GROUP = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
TRUST = {"trust_remote_code": True} if GROUP == "trusted" else {}
LANGUAGE = ("llama", "gpt2", "phi3", "t5")


class Check(NamedTuple):
    run: Callable[[Path, str, str], Any]  # (checkpoint, model, argument) -> what came out
    cases: list[tuple[str, str]]  # (model, argument)
    groups: tuple[str, ...]  # the processes it runs in
    tolerance: float
    control: bool  # whether `full` gives something else


CHECKS: list[Check] = []


def check(models=("bert",), arguments=("",), groups=("imported",), tolerance=1e-5, control=True, cases=None):
    def register(run):
        CHECKS.append(Check(run, cases or list(product(models, arguments)), groups, tolerance, control))
        return run

    return register


# loading and calling


def config_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())


AUTOS = {path.parent.parent.name: config_of(path.parent)["auto_map"] for path in FOLDER.glob("*/compact/config.json")}
OWN: dict[str, set[str]] = {}  # class -> the Auto classes that choose it
for auto_map in AUTOS.values():
    for auto, reference in auto_map.items():
        OWN.setdefault(reference.removeprefix("modeling_oto."), set()).add(auto)


def auto_of(path: Path) -> type:
    """An Auto class that stands for the checkpoint's own class."""
    return getattr(tf, min(OWN[config_of(path)["architectures"][0]], key=lambda auto: ("PreTraining" in auto, auto)))


def load(path: Path, cls: type | None = None, **options: Any) -> tf.PreTrainedModel:
    if cls is None:
        cls = auto_of(path) if TRUST else getattr(tf, config_of(path)["architectures"][0])
    return cls.from_pretrained(str(path), **TRUST, **options).eval()


def outputs(model: nn.Module, inputs: dict[str, torch.Tensor]) -> Any:
    """What `model` returns; of the inputs it gets those that it takes."""
    takes = inspect.signature(model.forward).parameters
    inputs = {name: x.clone() for name, x in inputs.items() if name in takes}
    if "input_ids" in takes and not inputs:  # a decoder alone
        inputs = {"input_ids": text(2)["input_ids"]}
    torch.manual_seed(0)  # some models mask at random
    with torch.no_grad():
        return dict(model(**inputs))


def logits(path: Path, name: str, **options: Any) -> torch.Tensor:
    return outputs(load(path, **options), TABLE[name].inputs(2))["logits"]


# plain loading


@check(("bert", "llama", "t5", "vit", "resnet_basic", "phi3"), ("concrete", "auto", "low_cpu_mem_usage", "sharded"))
def plain(path: Path, name: str, way: str) -> Any:
    if way == "sharded":
        load(path).save_pretrained(OUT / "sharded", max_shard_size="4KB")
        path = OUT / "sharded"
        assert len(list(path.glob("*.safetensors"))) > 1
    cls = tf.AutoModel if way == "base" else auto_of(path) if way == "auto" else None
    return logits(path, name, cls=cls, **({"low_cpu_mem_usage": True} if way == "low_cpu_mem_usage" else {}))


@check(("bert", "llama", "resnet_basic"), ("bfloat16", "float16", "auto"), tolerance=0.05)
def dtype(path: Path, name: str, kind: str) -> Any:
    load(path).bfloat16().save_pretrained(OUT / "bf16")
    model = load(OUT / "bf16" if kind == "auto" else path, dtype="auto" if kind == "auto" else getattr(torch, kind))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16 if kind == "auto" else getattr(torch, kind)}
    inputs = {n: x.to(model.dtype) if x.is_floating_point() else x for n, x in TABLE[name].inputs(2).items()}
    return outputs(model, inputs)["logits"].float()


@check(("bert", "llama", "t5", "vit"), ("auto", "dict", "disk"))
def device_map(path: Path, name: str, kind: str) -> Any:
    if kind != "disk":
        return logits(path, name, device_map={"": "cpu"} if kind == "dict" else "auto")
    whole = load(path)
    layers = next(n for n, m in whole.named_modules() if isinstance(m, nn.ModuleList))
    places = {n: "cpu" for n, m in whole.named_modules() if not any(m.children())} | {layers: "disk"}
    places = {n: place for n, place in places.items() if n == layers or not n.startswith(f"{layers}.")}
    places |= {n: "cpu" for n, _ in whole.named_parameters() if not any(n.startswith(f"{p}.") for p in places)}
    model = load(path, device_map=places, offload_folder=str(OUT / "offload"))
    assert any(p.is_meta for p in model.parameters())  # they lie on the disk
    return outputs(model, TABLE[name].inputs(2))["logits"]


@check(("bert", "llama", "t5", "vit", "phi3"), ("eager", "sdpa"), groups=("imported", "trusted"))
def attention(path: Path, name: str, kind: str) -> Any:
    model = load(path, attn_implementation=kind)
    assert model.config._attn_implementation == kind
    return outputs(model, TABLE[name].inputs(2))["logits"]


@check(("bert", "llama"), groups=("exported",))
def flex_attention(path: Path, name: str, _: str) -> Any:
    return logits(path, name, attn_implementation="flex_attention")


@check(("bert", "llama", "resnet_basic"), groups=("imported", "trusted"))
def from_config(path: Path, name: str, _: str) -> Any:
    model = load(path)
    built = auto_of(path).from_config(model.config, **TRUST).eval()
    built.load_state_dict(model.state_dict())
    return outputs(built, TABLE[name].inputs(2))["logits"]


# other heads, labels and vocabularies


SOME = ("bert", "llama", "llama_protected", "t5", "whisper", "vit", "resnet_basic", "distilbert")


@check(
    cases=[(name, auto) for name in AUTOS if not TRUST or name in SOME for auto in AUTOS[name]],
    groups=("imported", "trusted"),
    control=False,
)
def auto_class(path: Path, name: str, auto: str) -> Any:
    """Every Auto class that knows the model; what the checkpoint lacks is drawn from the same seed."""
    torch.manual_seed(0)
    options = {"num_labels": 2} if auto == "AutoModelForQuestionAnswering" else {}
    model, loading = getattr(tf, auto).from_pretrained(str(path), output_loading_info=True, **TRUST, **options)
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = 0  # some heads ask for it
    whole, inputs = load(path), TABLE[name].inputs(2)
    if len(loading["missing_keys"]) == len(model.state_dict()):
        raise LookupError(f"{type(model).__name__} finds none of its weights")
    if auto == "AutoModelForMultipleChoice":
        inputs = {n: x[None] for n, x in inputs.items()}
    out = outputs(model.eval(), inputs)
    if TRUST:  # what is saved again is as good
        model.save_pretrained(OUT / "again")
        again = outputs(load(OUT / "again", getattr(tf, auto)), inputs)
        assert difference(out, again) < 1e-6
    if type(model).__name__ == type(whole.base_model).__name__ and whole.base_model is not whole:
        body = outputs(whole.base_model, inputs)  # maybe with narrow outputs
        assert difference(out["last_hidden_state"], body["last_hidden_state"]) == 0
        return None
    return out


@check(("bert", "vit", "gpt2", "llama_protected"))
def head_on_a_base(path: Path, name: str, _: str) -> Any:
    body = load(path, tf.AutoModel)
    body.save_pretrained(OUT / "body")
    model = load(OUT / "body", auto_of(path))
    of_body, of_both = (outputs(m, TABLE[name].inputs(2))["last_hidden_state"] for m in (body, model.base_model))
    assert torch.equal(of_body, of_both)
    return of_both


@check(("vit", "resnet_basic", "distilbert", "segformer"), groups=("imported", "trusted"))
def labels(path: Path, name: str, _: str) -> Any:
    model = load(path, num_labels=41, ignore_mismatched_sizes=True)
    assert model.config.num_labels == 41
    for p in model.parameters():
        if len(p) == 41:  # new, and drawn at random: make it the same everywhere
            nn.init.constant_(p, 0.1)
    model.save_pretrained(OUT / "labels")
    return logits(OUT / "labels", name)


@check(("bert", "llama", "gpt2", "t5", "llama_protected"), ("48", "30"), groups=("imported", "trusted"))
def vocabulary(path: Path, name: str, size: str) -> Any:
    model, inputs = load(path), TABLE[name].inputs(2)
    old = outputs(model, {n: x % 30 if n.endswith("ids") else x for n, x in inputs.items()})["logits"]
    model.resize_token_embeddings(int(size), mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCAB:] = 0  # new, and drawn at random: make them the same everywhere
        model.get_output_embeddings().weight[VOCAB:] = 0
    model.save_pretrained(OUT / "vocabulary")
    again = load(OUT / "vocabulary")
    assert again.config.vocab_size == int(size) and again.get_input_embeddings().weight.shape[0] == int(size)
    if not TRUST and path.name == "compact":
        import hf_oto

        inputs = {n: x % 30 if n.endswith("ids") else x for n, x in inputs.items()}
        assert difference(outputs(hf_oto.to_dense(again), inputs)["logits"], outputs(again, inputs)["logits"]) < 1e-5
    new = outputs(again, {n: x % 30 if n.endswith("ids") else x for n, x in inputs.items()})["logits"]
    assert difference(old[..., :30], new[..., :30]) < 1e-6
    return new


# generation and pipelines


@check(LANGUAGE, ("dynamic", "static", "none", "beams"), groups=("imported", "trusted"))
def generate(path: Path, name: str, kind: str) -> Any:
    inputs = {n: x for n, x in TABLE[name].inputs(2).items() if not n.startswith("decoder")}
    options = {"none": {"use_cache": False}, "static": {"cache_implementation": "static"}, "beams": {"num_beams": 3}}
    settings = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    out = load(path).generate(**inputs, **settings, **options.get(kind, {}))
    return [out.sequences, out.scores]


def tasks(name: str) -> list[str]:
    """The pipelines whose Auto class chooses the checkpoint's own class; not those that wrap it in a default Jev."""
    config = config_of(FOLDER / name / "stock")
    own, supported = OWN[config["architectures"][0]], dict(tf.pipelines.SUPPORTED_TASKS)
    if config["model_type"] in MODEL_FOR_DECISION_MAPPING_NAMES:
        del supported["decision"]
    return [task for task, of in supported.items() if own & {auto.__name__ for auto in of["pt"]}]


PICTURE = Image.fromarray((np.arange(32 * 32 * 3) * 7 % 256).astype("uint8").reshape(32, 32, 3))
SOUND = {"raw": np.sin(np.arange(1600) / 9).astype("float32"), "sampling_rate": 16000}
SENTENCE = "w5 w9 w3 w11"
TASKS = {
    "fill-mask": (f"{SENTENCE} [MASK]", {}),
    "text-classification": (SENTENCE, {"top_k": None}),
    "zero-shot-classification": (SENTENCE, {"candidate_labels": ["w7", "w8"], "hypothesis_template": "w1 {}"}),
    "decision": ({"state": SENTENCE, "questions": {"?": {"type": "noul"}}}, {}),
    "text-generation": (SENTENCE, {"max_new_tokens": 4, "do_sample": False}),
    "image-classification": (PICTURE, {}),
    "zero-shot-image-classification": (PICTURE, {"candidate_labels": ["w7", "w8"], "hypothesis_template": "w1 {}"}),
    "object-detection": (PICTURE, {"threshold": 0.0}),
    "automatic-speech-recognition": (SOUND, {"generate_kwargs": {"max_new_tokens": 5}}),
    "zero-shot-audio-classification": (SOUND["raw"], {"candidate_labels": ["w7", "w8"]}),
    "feature-extraction": (SENTENCE, {}),
    "image-feature-extraction": (PICTURE, {}),
}
PIPELINES = [(name, task) for name in AUTOS for task in tasks(name)]
PIPELINES += [("bert", "feature-extraction"), ("vit", "image-feature-extraction")]


@check(cases=PIPELINES, groups=("imported", "trusted"))
def pipeline(path: Path, name: str, task: str) -> Any:
    inputs, options = TASKS[task]
    pipe = tf.pipeline(task, model=str(path), **TRUST)
    return pipe(copy.copy(inputs), **options)


# training and pruning on


class Rows(torch.utils.data.Dataset):
    def __init__(self, name: str) -> None:
        self.inputs = TABLE[name].inputs(8)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = {n: x[i] for n, x in self.inputs.items()}
        return row | {"labels": row["input_ids"] if "input_ids" in row else i % 5}


def certain(model: nn.Module) -> nn.Module:
    """The model without dropout, which falls elsewhere in a model of other widths."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@check(("bert", "resnet_basic"), tolerance=1e-4)
def trainer(path: Path, name: str, _: str) -> Any:
    """Zeros get no gradient: the stock model goes the same way."""
    settings = {"max_steps": 3, "save_steps": 2, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    args = tf.TrainingArguments(str(OUT / "run"), learning_rate=1e-2, per_device_train_batch_size=4, **settings)
    run = tf.Trainer(certain(load(path)), args, train_dataset=Rows(name))
    run.train()
    run.save_model(str(OUT / "trained"))
    resumed = tf.Trainer(certain(load(path)), args, train_dataset=Rows(name))
    resumed.train(resume_from_checkpoint=str(OUT / "run" / "checkpoint-2"))
    result = logits(OUT / "trained", name)
    assert difference(result, logits(path, name)) > 1e-2
    return result, outputs(resumed.model.eval(), TABLE[name].inputs(2))["logits"]


@check(("bert", "llama", "phi3", "resnet_basic", "t5"))
def prune_again(path: Path, name: str, _: str) -> None:
    import hf_oto

    model, inputs = load(path), TABLE[name].inputs(2)
    partition = hf_oto.partition_zigs(model, inputs)
    before = outputs(model, inputs)["logits"]
    weights = sum(p.numel() for p in model.parameters())
    plan = hf_oto.PruningPlan({axis.name: range((axis.size + 1) // 2) for axis in partition.axes})
    hf_oto.compact(model, partition, plan).save_pretrained(OUT / "twice")
    again = load(OUT / "twice")
    after = outputs(again, inputs)["logits"]
    assert difference(after, outputs(model, inputs)["logits"]) < 1e-6
    assert difference(after, outputs(hf_oto.to_dense(again), inputs)["logits"]) < 1e-4
    assert difference(after, before) > 1e-2 and sum(p.numel() for p in again.parameters()) < 0.9 * weights


# adapters


def adapted(path: Path, name: str) -> Any:
    """A model with a LoRA adapter on all its linear layers, after five steps."""
    import peft

    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=True)
    model = peft.get_peft_model(load(path), config)
    inputs = TABLE[name].inputs(4)
    inputs["labels"] = inputs.pop("decoder_input_ids", inputs["input_ids"]).contiguous()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model.eval()(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return model.eval()


@check(("bert", "llama", "gpt2", "phi3", "t5"), groups=("imported", "trusted"))
def lora(path: Path, name: str, _: str) -> None:
    """Trained, saved, loaded in both ways, merged, and the merged model saved and loaded."""
    import peft

    inputs, before = TABLE[name].inputs(2), logits(path, name)
    model = adapted(path, name)
    expected = outputs(model.base_model.model, inputs)["logits"]
    assert difference(expected, before) > 1e-3
    model.save_pretrained(OUT / "adapter")
    loaded = peft.PeftModel.from_pretrained(load(path), OUT / "adapter").eval()
    assert difference(outputs(loaded.base_model.model, inputs)["logits"], expected) < 1e-6
    inside = load(path)
    inside.load_adapter(str(OUT / "adapter"))
    assert difference(outputs(inside.eval(), inputs)["logits"], expected) < 1e-6
    by_itself = auto_of(path).from_pretrained(str(OUT / "adapter"), **TRUST).eval()  # finds its base model
    assert difference(outputs(by_itself, inputs)["logits"], expected) < 1e-6
    loaded.merge_and_unload().save_pretrained(OUT / "merged")
    assert difference(logits(OUT / "merged", name), expected) < 1e-4


@check(("llama",))
def lora_before_pruning(path: Path, name: str, _: str) -> None:
    import hf_oto

    merged, inputs = adapted(path, name).merge_and_unload(), TABLE[name].inputs(2)
    partition = hf_oto.partition_zigs(merged, inputs)
    plan = hf_oto.PruningPlan({axis.name: range((axis.size + 1) // 2) for axis in partition.axes})
    partition.zero_(merged, plan)
    zeroed = outputs(merged, inputs)["logits"]
    hf_oto.compact(merged, partition, plan).save_pretrained(OUT / "merged-pruned")
    assert difference(logits(OUT / "merged-pruned", name), zeroed) < 1e-5


# compilers, exporters, quantisers, other libraries


@check(("bert", "llama", "resnet_basic"), ("aot_eager",), groups=("exported",))
@check(("bert", "llama"), ("inductor",), groups=("by_hand",))
def compiled(path: Path, name: str, backend: str) -> Any:
    return outputs_of(torch.compile(load(path), backend=backend, fullgraph=True), TABLE[name].inputs(2))


def outputs_of(call: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return call(**inputs)["logits"]


@check(("bert", "llama", "vit", "resnet_basic"), groups=("exported",))
def exported(path: Path, name: str, _: str) -> Any:
    inputs = TABLE[name].inputs(2)
    model = load(path)
    model.config.use_cache = False
    program = torch.export.export(model, (), inputs, strict=False)
    torch.export.save(program, OUT / "program.pt2")
    return outputs_of(torch.export.load(OUT / "program.pt2").module(), inputs)


@check(("bert", "llama", "vit", "resnet_basic"), tolerance=1e-4, groups=("exported",))
def onnx(path: Path, name: str, _: str) -> Any:
    """Through torch's exporter; the second text is padded, and only attended positions count."""
    import onnxruntime

    inputs = TABLE[name].inputs(2)
    if "attention_mask" in inputs:
        inputs["attention_mask"][1, LENGTH - 2 :] = 0
    model = load(path)
    model.config.use_cache = False
    torch.onnx.export(model, (), str(OUT / "model.onnx"), kwargs=inputs, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(OUT / "model.onnx"))
    names = [i.name for i in session.get_inputs()]
    out = torch.from_numpy(session.run(None, {n: inputs[n].numpy() for n in names})[0])
    torchs = outputs(model, inputs)["logits"]
    if "attention_mask" in inputs:
        attended = inputs["attention_mask"].bool()
        out, torchs = out[attended], torchs[attended]
    assert difference(out, torchs) < 1e-4
    return out


@check(("bert", "llama"), ("int8", "int4"), groups=("imported", "trusted"))
def torchao(path: Path, name: str, kind: str) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerAxis

    how = Int8WeightOnlyConfig() if kind == "int8" else IntxWeightOnlyConfig(torch.int4, PerAxis(0))
    quantised(path, name, tf.TorchAoConfig(how), lambda p: type(p).__name__ != "Parameter")


@check(("bert", "llama"), ("8bit", "4bit"), groups=("imported", "trusted"))
def bitsandbytes(path: Path, name: str, kind: str) -> None:
    config = tf.BitsAndBytesConfig(**{f"load_in_{kind}": True})
    quantised(path, name, config, lambda p: type(p).__name__ in ("Int8Params", "Params4bit"))


def quantised(path: Path, name: str, config: Any, is_quantised: Callable[[torch.Tensor], bool]) -> None:
    """Quantised at load: near the plain model but not it; saved and loaded again, the same."""
    plainly, inputs = logits(path, name), TABLE[name].inputs(2)
    model = load(path, quantization_config=config, device_map="cpu")
    linear = [p for n, p in model.named_parameters() if n.endswith("weight") and is_quantised(p)]
    assert len(linear) >= 10
    out = outputs(model, inputs)["logits"].float()
    assert 1e-6 < difference(out, plainly) < 0.6
    model.save_pretrained(OUT / "quantised")
    assert difference(outputs(load(OUT / "quantised", device_map="cpu"), inputs)["logits"].float(), out) < 1e-4


@check(("bert", "distilbert", "albert"), groups=("imported", "trusted"))
def sentence_transformer(path: Path, name: str, _: str) -> Any:
    from sentence_transformers import SentenceTransformer

    options = {"device": "cpu", "local_files_only": True, **TRUST}
    model = SentenceTransformer(str(path), **options)  # mean pooling
    model.save(str(OUT / "sentences"))
    first, again = (
        m.encode([SENTENCE, "w30 w2"]) for m in (model, SentenceTransformer(str(OUT / "sentences"), **options))
    )
    assert difference(first, again) < 1e-6
    return first


# running them


def difference(a: Any, b: Any) -> float:
    """The largest difference relative to the largest entry; inf where words, whole numbers or shapes differ."""
    if isinstance(a, np.ndarray):
        a = torch.from_numpy(a)
    if isinstance(b, np.ndarray):
        b = torch.from_numpy(b)
    if isinstance(a, (float, np.floating)):
        a, b = torch.tensor(float(a)), torch.tensor(float(b))
    if isinstance(a, torch.Tensor):
        if a.shape != b.shape or not a.numel():
            return float("inf") if a.shape != b.shape else 0.0
        if not a.is_floating_point():
            return 0.0 if torch.equal(a, b) else float("inf")
        return float((a - b).abs().max() / a.abs().max().clamp(min=1e-12))
    if isinstance(a, dict):
        a, b = [a[k] for k in sorted(a)] if a.keys() == b.keys() else [0], [b[k] for k in sorted(b)]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return (
            max([difference(x, y) for x, y in zip(a, b, strict=True)], default=0.0)
            if len(a) == len(b)
            else float("inf")
        )
    return 0.0 if a == b or a is None or hasattr(a, "get_seq_length") else float("inf")


def run(check: Check, name: str, argument: str) -> dict[str, Any]:
    """{"skip": why} | {"error": words} | {"same": difference, "full": difference of the control}"""
    found = {}
    for kind in ("stock", "compact", "full") if check.control else ("stock", "compact"):
        try:
            torch.manual_seed(0)
            found[kind] = check.run(FOLDER / name / kind, name, argument)
        except Exception as error:
            line = traceback.extract_tb(error.__traceback__)[1].lineno
            words = f"{type(error).__name__} in line {line} of loaders_worker.py: {error}"
            if kind != "full":
                stock_cannot = kind == "stock" and not isinstance(error, AssertionError)
                return {"skip" if stock_cannot else "error": words[:600]}
    same = difference(found["stock"], found["compact"])
    result = {"same": same, "tolerance": check.tolerance}
    if check.control and found["stock"] is not None:
        result["full"] = difference(found["stock"], found.get("full"))
    return result


def main() -> None:
    if GROUP == "trusted":
        sys.modules["hf_oto"] = None  # import hf_oto raises
    else:
        import hf_oto  # noqa: F401
    tf.utils.logging.set_verbosity_error()
    tf.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    TABLE["llama_protected"] = TABLE["llama"]
    results, only = {}, sys.argv[4:]
    for one in CHECKS:
        if GROUP in one.groups and (not only or one.run.__name__ in only):
            start = time.process_time()
            for name, argument in one.cases:
                results[f"{one.run.__name__} {name} {argument}".strip()] = run(one, name, argument)
            print(f"{one.run.__name__}: {time.process_time() - start:.1f} s", file=sys.stderr)
    (OUT / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
