"""Save -> load gives equal outputs: compact models come back from their folder, with hf_oto and without."""

import copy
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import transformers as tf
from models import TABLE, make
from transformers import initialization

import hf_oto
import hf_oto.saving
from hf_oto.modeling_oto import (
    CompactMixin,
    OTOError,
    become_compact_,
    compact_class,
    is_compact,
    restore_,
    sealed,
    validate,
)

REPO = Path(hf_oto.saving.__file__).parents[1]
torch.set_num_threads(1)


# Cutting by hand: the smallest thing that makes what compact.py makes


def cut_(model, tensors, attributes=()):
    """Cuts `{"path.name": {dim: kept indices}}`, sets `{"path.attribute": value}` and returns the record of both."""
    cuts_before = vars(model.config).get("oto", {"cuts": []})["cuts"]
    step, modules, cuts = len(cuts_before), {}, []
    for label, by_dim in tensors.items():
        path, _, name = label.rpartition(".")
        module = model.get_submodule(path)
        tensor = module._parameters.get(name, module._buffers.get(name))
        shape = [None] * tensor.dim()
        for dim, kept in by_dim.items():
            if len(kept) < tensor.shape[dim]:
                cuts.append({"step": step, **axis(tensor.shape[dim], kept, label, dim)})
            tensor.data = tensor.data.index_select(dim, torch.tensor(kept))
            shape[dim] = len(kept)
        modules.setdefault(path, {}).setdefault("shapes", {})[name] = shape
    for label, value in dict(attributes).items():
        path, _, name = label.rpartition(".")
        setattr(model.get_submodule(path), name, value)
        modules.setdefault(path, {}).setdefault("attributes", {})[name] = value
    return {"version": 1, "modules": modules, "cuts": cuts}


def axis(width, kept, label, dim):
    """A cut of one weight: its ZIGs are the longest blocks of equal length that were kept or cut as a whole."""
    stays = [position in set(kept) for position in range(width)]

    def blocks(length):
        return [set(stays[start : start + length]) for start in range(0, width, length)]

    lengths = [length for length in range(1, width) if width % length == 0]
    inner = max(length for length in lengths if all(len(block) == 1 for block in blocks(length)))
    bits = sum(1 << i for i, block in enumerate(blocks(inner)) if block == {True})
    member = [label, dim, 0, 0, 1, inner]
    return {"size": width // inner, "kept": f"{bits:x}", "members": [member], "scales": []}


def rows(heads, width):
    return [head * width + i for head in heads for i in range(width)]


def linear(path, dim, kept, bias=True):
    """Cut of one side of a Linear: (tensors, attributes)."""
    tensors = {f"{path}.weight": {dim: kept}} | ({f"{path}.bias": {0: kept}} if bias and dim == 0 else {})
    return tensors, {f"{path}.{'out_features' if dim == 0 else 'in_features'}": len(kept)}


def together(*parts):
    tensors, attributes = {}, {}
    for new_tensors, new_attributes in parts:
        tensors, attributes = tensors | new_tensors, attributes | new_attributes
    return tensors, attributes


def bert():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    model = tf.BertForSequenceClassification(tf.BertConfig(vocab_size=40, num_labels=3, **sizes))
    parts = []
    for layer, heads, units in ((0, [0, 2], range(5, 20)), (1, [3], range(7))):
        path, kept, units = f"bert.encoder.layer.{layer}", rows(heads, 8), list(units)
        parts += [linear(f"{path}.attention.self.{name}", 0, kept) for name in ("query", "key", "value")]
        parts += [linear(f"{path}.attention.output.dense", 1, kept)]
        parts += [linear(f"{path}.intermediate.dense", 0, units), linear(f"{path}.output.dense", 1, units)]
        sizes = {"num_attention_heads": len(heads), "all_head_size": len(kept)}
        parts += [({}, {f"{path}.attention.self.{name}": size for name, size in sizes.items()})]
    return model, together(*parts), {"input_ids": torch.arange(12).view(2, 6)}


def llama():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    config = tf.LlamaConfig(vocab_size=40, num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0, **sizes)
    parts = []
    for layer, group, units in ((0, [1], range(9)), (1, [0, 1], range(3, 24))):
        path, units = f"model.layers.{layer}", list(units)
        queries = rows([2 * g + i for g in group for i in range(2)], 8)
        parts += [linear(f"{path}.self_attn.q_proj", 0, queries, bias=False)]
        parts += [linear(f"{path}.self_attn.{name}", 0, rows(group, 8), bias=False) for name in ("k_proj", "v_proj")]
        parts += [linear(f"{path}.self_attn.o_proj", 1, queries)]
        parts += [linear(f"{path}.mlp.{name}", 0, units, bias=False) for name in ("gate_proj", "up_proj")]
        parts += [linear(f"{path}.mlp.down_proj", 1, units)]
    return tf.LlamaForCausalLM(config), together(*parts), {"input_ids": torch.arange(12).view(2, 6)}


def gpt2():
    sizes = {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
    config = tf.GPT2Config(bos_token_id=0, eos_token_id=0, **sizes)
    kept, units = rows([1, 3], 8), list(range(50))
    attn, mlp, fused = "transformer.h.1.attn", "transformer.h.1.mlp", [j * 32 + i for j in range(3) for i in kept]
    tensors = {f"{attn}.c_attn.weight": {1: fused}, f"{attn}.c_attn.bias": {0: fused}}
    tensors |= {f"{attn}.c_proj.weight": {0: kept}}
    tensors |= {f"{mlp}.c_fc.weight": {1: units}, f"{mlp}.c_fc.bias": {0: units}, f"{mlp}.c_proj.weight": {0: units}}
    attributes = {f"{attn}.num_heads": 2, f"{attn}.split_size": 16, f"{attn}.c_attn.nf": 48, f"{attn}.c_proj.nx": 16}
    attributes |= {f"{mlp}.c_fc.nf": 50, f"{mlp}.c_proj.nx": 50}
    return tf.GPT2LMHeadModel(config), (tensors, attributes), {"input_ids": torch.arange(12).view(2, 6)}


def t5():
    sizes = {"d_model": 32, "d_kv": 8, "num_heads": 4, "num_layers": 2, "d_ff": 24, "vocab_size": 40}
    model = tf.T5ForConditionalGeneration(tf.T5Config(decoder_start_token_id=0, dropout_rate=0.0, **sizes))
    kept, units, parts = rows([0, 3], 8), list(range(4, 15)), []
    for layer in range(2):  # layer 0's position bias serves all layers: heads of a stack go together
        path = f"encoder.block.{layer}.layer.0.SelfAttention"
        parts += [linear(f"{path}.{name}", 0, kept, bias=False) for name in "qkv"] + [linear(f"{path}.o", 1, kept)]
        parts += [({}, {f"{path}.n_heads": 2, f"{path}.inner_dim": 16})]
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    parts += [({f"{bias}.weight": {1: [0, 3]}}, {f"{bias}.embedding_dim": 2})]
    path = "decoder.block.1.layer.2.DenseReluDense"
    parts += [linear(f"{path}.wi", 0, units, bias=False), linear(f"{path}.wo", 1, units)]
    ids = torch.arange(12).view(2, 6)
    return model, together(*parts), {"input_ids": ids, "decoder_input_ids": ids[:, :3]}


def resnet():
    config = tf.ResNetConfig(embedding_size=8, hidden_sizes=[16, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    path, kept = "resnet.encoder.stages.1.layers.0.layer", [0, 1, 5, 9, 14]
    names = ("weight", "bias", "running_mean", "running_var")
    tensors = {f"{path}.0.normalization.{name}": {0: kept} for name in names}
    tensors |= {f"{path}.0.convolution.weight": {0: kept}, f"{path}.1.convolution.weight": {1: kept}}
    attributes = {f"{path}.0.normalization.num_features": 5}
    attributes |= {f"{path}.0.convolution.out_channels": 5, f"{path}.1.convolution.in_channels": 5}
    model = tf.ResNetForImageClassification(config)
    model(torch.randn(4, 3, 16, 16))  # running statistics worth saving
    return model, (tensors, attributes), {"pixel_values": torch.randn(2, 3, 16, 16)}


def vit():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
    model = tf.ViTForImageClassification(tf.ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes))
    fc1 = next(name for name, p in model.named_parameters() if tuple(p.shape) == (24, 32)).removesuffix(".weight")
    fc2 = next(name for name, p in model.named_parameters() if tuple(p.shape) == (32, 24)).removesuffix(".weight")
    parts = linear(fc1, 0, list(range(9))), linear(fc2, 1, list(range(9)))
    return model, together(*parts), {"pixel_values": torch.randn(2, 3, 8, 8)}


MODELS = {
    "bert": (bert, "AutoModelForSequenceClassification"),
    "llama": (llama, "AutoModelForCausalLM"),
    "gpt2": (gpt2, "AutoModelForCausalLM"),
    "t5": (t5, "AutoModelForSeq2SeqLM"),
    "resnet": (resnet, "AutoModelForImageClassification"),
    "vit": (vit, "AutoModelForImageClassification"),
}


def compact(name):
    """(compact model, inputs) of a row of MODELS."""
    torch.manual_seed(0)
    model, cuts, inputs = MODELS[name][0]()
    return become_compact_(model.eval(), cut_(model, *cuts)), inputs


@torch.no_grad()
def difference(model, other, inputs):
    return (model(**inputs).logits - other(**inputs).logits).abs().max().item()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with every model of the table, saved compact, its inputs and outputs."""
    folder = tmp_path_factory.mktemp("saved")
    for name in MODELS:
        model, inputs = compact(name)
        model.save_pretrained(folder / name)
        model.save_pretrained(folder / f"{name}-sharded", max_shard_size="10KB")
        with torch.no_grad():
            torch.save((inputs, model(**inputs).logits), folder / f"{name}.pt")
    return folder


@pytest.fixture(scope="module")
def compact_bert():
    return compact("bert")


# In fresh processes

FRESH = """
import json, sys, warnings
from pathlib import Path
warnings.simplefilter("error")
import torch, transformers as tf
torch.set_num_threads(1)
tf.utils.logging.disable_progress_bar()
folder, out, models, results = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]), {}

def check(key, load):
    name = key.split()[0]
    inputs, logits = torch.load(folder / f"{name}.pt")
    try:
        model = load()
    except Exception as error:
        results[key] = f"{type(error).__name__}: {error}"
        return None
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()  # mapped from the file it may be unaligned, and sums then round differently
    with torch.no_grad():
        results[key] = (model.eval()(**inputs).logits - logits).abs().max().item()
    return model

def stock(name):
    return getattr(tf, json.loads((folder / name / "config.json").read_text())["architectures"][0])
"""

WITH_HF_OTO = """
import hf_oto.saving
for name, auto in models.items():
    auto = getattr(tf, auto)
    model = check(f"{name} concrete", lambda: stock(name).from_pretrained(folder / name))
    check(f"{name} auto", lambda: auto.from_pretrained(folder / name))
    check(f"{name} trusted", lambda: auto.from_pretrained(folder / name, trust_remote_code=True))
    check(f"{name} sharded", lambda: auto.from_pretrained(folder / f"{name}-sharded", device_map="cpu"))
    model.save_pretrained(out / name)
    check(f"{name} saved again", lambda: auto.from_pretrained(out / name))
"""

WITHOUT_HF_OTO = """
sys.modules["hf_oto"] = None  # import hf_oto raises
for name, auto in models.items():
    auto = getattr(tf, auto)
    check(f"{name} refused", lambda: stock(name).from_pretrained(folder / name))
    model = check(f"{name} trusted", lambda: auto.from_pretrained(folder / name, trust_remote_code=True))
    assert type(model).__module__.startswith("transformers.") and model.config.architectures == [stock(name).__name__]
    check(f"{name} sharded", lambda: auto.from_pretrained(folder / f"{name}-sharded", trust_remote_code=True))
    model.save_pretrained(out / name)
    check(f"{name} saved again", lambda: auto.from_pretrained(out / name, trust_remote_code=True))
    check(f"{name} config", lambda: (
        built := auto.from_config(model.config, trust_remote_code=True), built.load_state_dict(model.state_dict()))[0])
inputs, _ = torch.load(folder / "bert.pt")
body = tf.AutoModel.from_pretrained(folder / "bert", trust_remote_code=True).eval()
whole = tf.AutoModelForSequenceClassification.from_pretrained(folder / "bert", trust_remote_code=True).eval()
results["body"] = (body(**inputs)[0] - whole.bert(**inputs)[0]).abs().max().item()
assert "generate" in dir(tf.AutoModelForCausalLM.from_pretrained(folder / "gpt2", trust_remote_code=True))
"""


def run_fresh(script, folder, out, **environment):
    """Runs the script in a new process, in a folder that is not the repository, and returns its results."""
    out.mkdir()
    keep = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment = keep | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(out / "modules")} | environment
    models = json.dumps({name: auto for name, (_, auto) in MODELS.items()})
    script = FRESH + script + "\nprint(json.dumps(results))"
    run = [sys.executable, "-c", script, str(folder), str(out), models]
    done = subprocess.run(run, cwd=out, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_fresh_process_with_hf_oto(saved, tmp_path):
    results = run_fresh(WITH_HF_OTO, saved, tmp_path / "out", PYTHONPATH=str(REPO))
    assert results == dict.fromkeys(results, 0.0) and len(results) == 5 * len(MODELS)


def test_fresh_process_without_hf_oto(saved, tmp_path):
    results = run_fresh(WITHOUT_HF_OTO, saved, tmp_path / "out")
    refused = [results.pop(f"{name} refused") for name in MODELS]  # negative control: nothing honours the record
    assert all("size mismatch" in answer or "mismatched" in answer for answer in refused), refused
    assert results == dict.fromkeys(results, 0.0) and len(results) == 4 * len(MODELS) + 1
    # what that process saved is as good here
    for name, (_, auto) in MODELS.items():
        inputs, logits = torch.load(saved / f"{name}.pt")
        model = getattr(tf, auto).from_pretrained(tmp_path / "out" / name)
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, logits)
        assert isinstance(model, CompactMixin)


# In this process


def test_every_model_of_the_table_comes_back(case, draw_plan, outputs, tmp_path):
    if not isinstance(case.model, tf.PreTrainedModel):
        pytest.skip("only Transformers models are saved")
    model = hf_oto.compact(copy.deepcopy(case.model), case.partition, draw_plan(case.partition))
    model.save_pretrained(tmp_path)
    twins = [type(case.model).from_pretrained(tmp_path), copy.deepcopy(model)]
    if not any("parametrizations" in name for name, _ in model.named_parameters()):  # torch doesn't pickle those
        twins.append(pickle.loads(pickle.dumps(model)))
    for twin in twins:
        assert type(twin) is type(model)
        for tensor in [*twin.parameters(), *twin.buffers()]:
            tensor.data = tensor.data.clone()  # mapped from the file it may be unaligned
        for a, b in zip(outputs(model, case.inputs), outputs(twin, case.inputs), strict=True):
            assert torch.equal(a, b)


def test_layers_read_their_own_config():
    """Phi-3 reads its head count from the config in forward: every layer gets a view of it, the config stays stock."""
    model, inputs = make("phi3"), TABLE["phi3"].inputs(2)
    partition = hf_oto.partition_zigs(model, inputs)
    (axis,) = [axis for axis in partition.axes if axis.kind == "kv_groups"]
    hf_oto.compact(model, partition, hf_oto.PruningPlan({axis.name: [1]}))
    attention = model.model.layers[0].self_attn
    assert (attention.config.num_attention_heads, model.config.num_attention_heads) == (2, 4)
    assert isinstance(attention.config, tf.Phi3Config) and attention.config.hidden_size == 32
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")  # what is not viewed is shared, with the twin's own config
    assert twin.model.layers[0].self_attn.config._attn_implementation == "eager"
    assert attention.config._attn_implementation == "sdpa"
    assert type(tf.Phi3Config.from_dict(model.config.to_dict())) is tf.Phi3Config


def test_saved_files_are_stock_plus_record(saved):
    config = json.loads((saved / "bert" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"] and config["model_type"] == "bert"
    assert config["auto_map"]["AutoModelForSequenceClassification"] == "modeling_oto.BertForSequenceClassification"
    assert config["auto_map"]["AutoModel"] == "modeling_oto.BertModel"
    assert "AutoConfig" not in config["auto_map"] and config["num_attention_heads"] == 4
    assert (saved / "bert" / "modeling_oto.py").read_bytes() == (REPO / "hf_oto" / "modeling_oto.py").read_bytes()


def test_compact_class_is_the_stock_class_to_everybody(compact_bert):
    stock = tf.BertForSequenceClassification
    cls = compact_class(stock)
    assert cls is compact_class(stock) and cls is compact_class(cls) and is_compact(cls) and not is_compact(stock)
    assert (cls.__name__, cls.__qualname__, cls.__module__) == (stock.__name__, stock.__qualname__, stock.__module__)
    assert not cls.is_custom_code() and cls.config_class is stock.config_class and isinstance(compact_bert[0], stock)
    cls.register_for_auto_class("AutoModelForSequenceClassification")
    assert not cls.is_remote_code()
    assert compact_class(tf.GPT2LMHeadModel).can_generate() and not cls.can_generate()


def test_without_a_record_everything_is_stock(tmp_path):
    config = tf.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=40)
    torch.manual_seed(0)
    model = tf.BertModel(config)
    assert type(model) is tf.BertModel
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "modeling_oto.py").exists()
    for loaded in (tf.BertModel.from_pretrained(tmp_path), tf.AutoModel.from_config(config), copy.deepcopy(model)):
        assert type(loaded) is tf.BertModel
    hf_oto.saving.install_hook()  # idempotent
    torch.manual_seed(0)
    assert all(map(torch.equal, tf.BertModel(config=config).state_dict().values(), model.state_dict().values()))


def test_wrong_module_name_loses_key_conversions(saved):
    """Negative control: were the compact class not in the stock class's module, it would count as custom code, and a
    base model would silently come out of a head's checkpoint with random layers."""
    cls = compact_class(tf.ViTModel)
    _, loading = cls.from_pretrained(saved / "vit", output_loading_info=True)
    assert loading["missing_keys"] == {"pooler.dense.weight", "pooler.dense.bias"}
    elsewhere = type(cls.__name__, (CompactMixin, tf.ViTModel), {"_oto_stock": tf.ViTModel})
    _, loading = elsewhere.from_pretrained(saved / "vit", output_loading_info=True)
    assert len(loading["missing_keys"]) > 2


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_tied_weights_stay_tied(saved, name):
    model = getattr(tf, MODELS[name][1]).from_pretrained(saved / name)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_dtype_and_generation(saved):
    model = tf.AutoModelForCausalLM.from_pretrained(saved / "llama", dtype=torch.bfloat16, low_cpu_mem_usage=True)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model = tf.AutoModelForCausalLM.from_pretrained(saved / "llama")
    ids = torch.arange(1, 7)[None]
    tokens = [model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*tokens)


def test_deepcopy_and_pickle(compact_bert):
    model, inputs = compact_bert
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model) and difference(model, twin, inputs) == 0.0
    assert twin.bert.encoder.layer[0].intermediate.dense.weight.shape == (15, 32)


def test_from_config(compact_bert):
    model, inputs = compact_bert
    before = copy.deepcopy(model.config.to_dict())
    for build in (
        tf.AutoModelForSequenceClassification.from_config,
        tf.BertForSequenceClassification._from_config,
        tf.BertForSequenceClassification,
        compact_class(tf.BertForSequenceClassification),
    ):
        twin = build(model.config).eval()
        twin.load_state_dict(model.state_dict())
        assert type(twin) is type(model) and difference(model, twin, inputs) == 0.0
        assert type(twin.bert) is tf.BertModel
    assert model.config.to_dict() == before
    with torch.device("meta"):
        twin = tf.AutoModelForSequenceClassification.from_config(model.config)
    assert {n: p.shape for n, p in twin.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert {p.device.type for p in twin.parameters()} == {"meta"}


def test_base_model_and_other_heads(saved, tmp_path):
    whole = tf.BertForSequenceClassification.from_pretrained(saved / "bert")
    ids = {"input_ids": torch.arange(12).view(2, 6)}
    with torch.no_grad():
        hidden = whole.bert(**ids).last_hidden_state
        body = tf.BertModel.from_pretrained(saved / "bert")
        assert torch.equal(body(**ids).last_hidden_state, hidden)
        body.save_pretrained(tmp_path / "body")
        assert torch.equal(tf.AutoModel.from_pretrained(tmp_path / "body")(**ids).last_hidden_state, hidden)
        for source in (saved / "bert", tmp_path / "body"):  # the pooler is cut away with the rest of what is not there
            other = tf.BertForMaskedLM.from_pretrained(source)
            assert torch.equal(other.bert(**ids).last_hidden_state, hidden)
            assert other.config.oto["cuts"][0]["members"][0][0].startswith("bert.encoder")
        whole.bert.save_pretrained(tmp_path / "part")  # a stock sub-model, whose config has the whole model's record
        assert torch.equal(tf.BertModel.from_pretrained(tmp_path / "part")(**ids).last_hidden_state, hidden)


def test_base_from_head_that_adds_classes_around_auto_model(tmp_path):
    model, cuts, inputs = llama()
    record = cut_(model, *cuts)
    head = tf.LlamaForSequenceClassification._from_config(model.config)  # builds its body by AutoModel.from_config
    cut_(head, *cuts)
    become_compact_(head.eval(), record).save_pretrained(tmp_path)
    loaded = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert difference(head, loaded, inputs) == 0.0 and type(loaded.model) is tf.LlamaModel


def test_record_of_the_root_module():
    class Root(tf.PreTrainedModel):
        config_class = tf.PreTrainedConfig  # base_model_prefix is "", and nothing is a body

        def __init__(self, config):
            super().__init__(config)
            self.width, self.scale, self.out = 8, torch.nn.Parameter(torch.ones(8)), torch.nn.Linear(8, 2)
            self.post_init()

    modules = {"": {"attributes": {"width": 5}, "shapes": {"scale": [5]}}, "out": {"shapes": {"weight": [None, 5]}}}
    config = tf.PreTrainedConfig(oto=sealed({"version": 1, "modules": modules, "cuts": []}))
    for config.architectures in (None, ["Root"], ["Other"]):
        model = Root(config)
        assert (model.width, model.scale.shape, model.out.weight.shape) == (5, (5,), (2, 5))


def test_parts_of_a_composite_model_keep_their_own_records(saved, tmp_path):
    build = tf.VisionEncoderDecoderModel.from_encoder_decoder_pretrained
    model = build(saved / "vit", saved / "bert").eval()
    assert is_compact(type(model.encoder)) and is_compact(type(model.decoder)) and not is_compact(type(model))
    model.save_pretrained(tmp_path)
    inputs = {"pixel_values": torch.randn(2, 3, 8, 8), "decoder_input_ids": torch.arange(6).view(2, 3)}
    assert difference(model, tf.VisionEncoderDecoderModel.from_pretrained(tmp_path), inputs) == 0.0


# Built by several threads


def built_by_threads(build):
    """What `build()` returns, or raises, 32 times in four threads that take turns all the time."""
    results, interval = [], sys.getswitchinterval()

    def run():
        for _ in range(8):
            try:
                results.append(build())
            except Exception as error:
                results.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    return results


def shapes(model):
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("cls", [tf.BertForSequenceClassification, tf.BertModel, tf.BertForTokenClassification])
def test_threads_may_share_a_config(compact_bert, cls):
    """The class of the record, the body and another head: all are compact, and nobody writes to the config."""
    model, _ = compact_bert
    record, before = model.config.oto, copy.deepcopy(model.config.to_dict())
    body = {name.removeprefix("bert."): size for name, size in shapes(model).items()}
    alone = shapes(cls(model.config))
    assert any(body.get(name.removeprefix("bert.")) == size for name, size in alone.items() if size[0] == 16)
    for built in built_by_threads(lambda: cls(model.config)):
        assert not isinstance(built, Exception), built
        assert is_compact(type(built)) and shapes(built) == alone
    assert model.config.oto is record and model.config.to_dict() == before


def test_taking_the_record_out_of_the_config_fails_in_threads(compact_bert):
    """Negative control: while one thread has taken the record out, another builds a dense model, or fails."""
    config = copy.deepcopy(compact_bert[0].config)

    def build():
        record = config.oto
        del config.oto
        try:
            model = tf.BertForSequenceClassification(config)
        finally:
            config.oto = record
        restore_(model, record)
        return shapes(model)

    expected = shapes(compact_bert[0])
    assert any(built != expected for built in built_by_threads(build))


def test_the_config_is_shared_as_ever(compact_bert):
    """A model has the config object it was built from, its parts too; one of another class has its own."""
    config = compact_bert[0].config
    twin, body = tf.BertForSequenceClassification(config), tf.BertModel(config)
    assert {id(m.config) for m in twin.modules() if "config" in vars(m)} == {id(config)}
    assert {id(m.config) for m in body.modules() if "config" in vars(m)} == {id(body.config)} != {id(config)}
    assert config.architectures == ["BertForSequenceClassification"] and body.config.architectures == ["BertModel"]


# Hooks of others


@pytest.fixture
def hooks(monkeypatch):
    """What PreTrainedModel has under both names now; put back at the end."""
    for name in ("__new__", "_finalize_model_loading"):
        monkeypatch.setattr(tf.PreTrainedModel, name, vars(tf.PreTrainedModel)[name])
    return tf.PreTrainedModel


def put(cls, name, calls, before):
    """Puts a function of somebody else's under a name of the class, which calls `before`."""

    def theirs(*args, **kwargs):
        calls.append(name)
        return before(*args, **kwargs)

    setattr(cls, name, staticmethod(theirs))


def without_us(function):
    """What our hook calls, the function itself where it is not ours."""
    return function.__wrapped__ if getattr(function, "_oto_hook", False) else function


@pytest.mark.parametrize("when", ["before", "after", "around"])
def test_hooks_of_others_are_called_too(hooks, saved, when):
    calls = []
    for name in ("__new__", "_finalize_model_loading"):
        ours = getattr(hooks, name)
        put(hooks, name, calls, without_us(ours) if when == "before" else ours)
    if when != "after":
        hf_oto.saving.install_hook()
    for _ in range(3):
        installed = hooks.__new__, hooks._finalize_model_loading
        hf_oto.saving.install_hook()
    assert installed == (hooks.__new__, hooks._finalize_model_loading)
    model = tf.BertForSequenceClassification.from_pretrained(saved / "bert")
    assert calls == ["__new__", "__new__", "_finalize_model_loading"]  # the model, its body
    assert is_compact(type(model)) and not is_compact(type(model.bert))
    compact_class(tf.BertForSequenceClassification).from_pretrained(saved / "bert")  # as without hf_oto
    assert calls[3:] == ["__new__", "__new__", "_finalize_model_loading"]
    inputs, logits = torch.load(saved / "bert.pt")
    with torch.no_grad():
        assert (model(**inputs).logits - logits).abs().max() < 1e-6


def test_a_hook_that_calls_nobody_is_the_end_of_ours(hooks, compact_bert):
    """Negative control: a hook that calls no other makes dense models, until ours is installed over it."""
    config = compact_bert[0].config
    hooks.__new__ = staticmethod(lambda cls, *args, **kwargs: object.__new__(cls))
    assert type(tf.BertForSequenceClassification(config)) is tf.BertForSequenceClassification
    hf_oto.saving.install_hook()
    assert is_compact(type(tf.BertForSequenceClassification(config)))


def test_classes_that_make_their_own_objects(compact_bert):
    """What `__new__` of a base behind PreTrainedModel is given are the arguments, as Python gives them."""
    seen = []

    class Behind:
        def __new__(cls, *args, **kwargs):
            seen.append(args)
            return super().__new__(cls)

    class Mine(tf.PreTrainedModel, Behind):
        config_class = tf.PreTrainedConfig

    config = tf.PreTrainedConfig()
    assert type(Mine(config)) is Mine and seen == [(config,)]


# Initialisation


class Decaying(tf.PreTrainedModel):
    """Its `_init_weights` computes with a size of the config, whatever shape the weight has by then."""

    __module__ = "transformers.decaying"  # else it counts as custom code, of which no loaded module is initialised
    config_class, base_model_prefix = tf.PreTrainedConfig, "body"

    def __init__(self, config):
        super().__init__(config)
        self.up, self.down = torch.nn.Linear(6, config.units), torch.nn.Linear(config.units, 4)
        self.decay = torch.nn.Parameter(torch.zeros(config.units))
        self.post_init()

    def forward(self, x):
        return self.down(torch.relu(self.up(x)) * self.decay)

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, Decaying):
            slopes = torch.linspace(0, 1, module.config.units)
            initialization.copy_(module.decay, torch.zeros_like(module.decay + slopes) + slopes)


def test_weights_that_were_loaded_are_not_initialised(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = Decaying(tf.PreTrainedConfig(units=16)).eval()
    assert model.decay[-1] == 1  # it was called
    x = torch.randn(3, 6)
    partition = hf_oto.partition_zigs(model, {"x": x})
    hf_oto.compact(model, partition, hf_oto.PruningPlan({"up.weight[0]": [0, 3, 4, 9]}))
    model.save_pretrained(tmp_path)
    assert torch.equal(Decaying.from_pretrained(tmp_path)(x), model(x))
    twin = Decaying(model.config)  # initialised at its stock size, then cut
    assert twin.decay.shape == (4,) and twin.decay.any()
    monkeypatch.setattr("hf_oto.modeling_oto._mark_loaded_modules_", lambda *_: None)  # negative control
    with pytest.raises(RuntimeError, match=r"size of tensor a \(4\) must match the size of tensor b \(16\)"):
        Decaying.from_pretrained(tmp_path)


def test_weights_that_are_missing_are_initialised(saved):
    """A head that no checkpoint has, beside compact layers, is drawn as the stock model draws it."""
    torch.manual_seed(0)
    head = tf.BertForMaskedLM.from_pretrained(saved / "bert").cls.predictions
    drawn = head.transform.dense.weight.std() / head.transform.dense.weight.new_tensor(0.02)
    assert 0.8 < drawn < 1.2 and not head.transform.dense.bias.any() and head.transform.LayerNorm.weight.eq(1).all()


def test_a_new_head_is_that_of_the_stock_model(draw_plan, tmp_path):
    """Wav2Vec2 draws random numbers for weights that it has loaded, before those of a new head are drawn."""
    model, inputs = make("wav2vec2").eval(), TABLE["wav2vec2"].inputs(2)
    partition = hf_oto.partition_zigs(model, inputs)
    hf_oto.compact(model, partition, draw_plan(partition)).save_pretrained(tmp_path / "compact")
    hf_oto.to_dense(model).save_pretrained(tmp_path / "dense")
    heads = []
    for kind in ("compact", "dense"):
        torch.manual_seed(0)
        heads.append(tf.AutoModelForAudioClassification.from_pretrained(tmp_path / kind).classifier.weight)
    assert torch.equal(*heads) and heads[0].std() > 0


def test_rwkv(tmp_path):
    sizes = {"vocab_size": 40, "hidden_size": 16, "attention_hidden_size": 24, "intermediate_size": 32}
    torch.manual_seed(0)
    model = tf.RwkvForCausalLM(tf.RwkvConfig(num_hidden_layers=2, context_length=16, **sizes)).eval()
    inputs = {"input_ids": torch.arange(12).view(2, 6), "use_cache": False}
    partition = hf_oto.partition_zigs(model, inputs)
    assert {axis.size for axis in partition.axes} >= {24, 32}
    plan = hf_oto.PruningPlan({axis.name: range(axis.size // 2) for axis in partition.axes})
    hf_oto.compact(model, partition, plan).save_pretrained(tmp_path)
    assert difference(model, tf.AutoModelForCausalLM.from_pretrained(tmp_path), inputs) == 0.0


def test_body_compacted_inside_its_head(tmp_path):
    model, (tensors, attributes), inputs = bert()
    tensors, attributes = ({k.removeprefix("bert."): v for k, v in x.items()} for x in (tensors, attributes))
    become_compact_(model.eval().bert, cut_(model.bert, tensors, attributes))
    model.save_pretrained(tmp_path)
    assert difference(model, tf.BertForSequenceClassification.from_pretrained(tmp_path), inputs) == 0.0


def test_other_number_of_labels_keeps_the_compact_layers(saved):
    options = {"num_labels": 7, "ignore_mismatched_sizes": True}
    model = tf.BertForSequenceClassification.from_pretrained(saved / "bert", **options)
    whole = tf.BertForSequenceClassification.from_pretrained(saved / "bert")
    assert model.classifier.weight.shape == (7, 32)
    assert all(map(torch.equal, model.bert.state_dict().values(), whole.bert.state_dict().values()))


def test_cut_again():
    model, inputs = compact("bert")
    path, step = "bert.encoder.layer.1", len(model.config.oto["cuts"])
    again = together(linear(f"{path}.intermediate.dense", 0, [1, 2]), linear(f"{path}.output.dense", 1, [1, 2]))
    become_compact_(model, cut_(model, *again))
    entry = model.config.oto["modules"][f"{path}.intermediate.dense"]
    assert entry == {"attributes": {"out_features": 2}, "shapes": {"weight": [2, None], "bias": [2]}}
    assert {cut["step"] for cut in model.config.oto["cuts"]} == {0, step} and step > 0
    twin = tf.BertForSequenceClassification(model.config).eval()
    twin.load_state_dict(model.state_dict())
    assert difference(model, twin, inputs) == 0.0


def test_user_defined_class(tmp_path):
    """A class that is not in Transformers gets no auto_map, and loads where hf_oto is imported."""

    class Mine(tf.BertForSequenceClassification):
        pass

    torch.manual_seed(0)
    stock, cuts, inputs = bert()
    model = Mine(stock.config).eval()
    become_compact_(model, cut_(model, *cuts)).save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    assert difference(model, Mine.from_pretrained(tmp_path), inputs) == 0.0


# Models whose code lies beside their weights

CUSTOM = """
import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from .configuration_mine import MineConfig


class MineModel(PreTrainedModel):
    config_class, base_model_prefix = MineConfig, "body"

    def __init__(self, config):
        super().__init__(config)
        self.up, self.down = torch.nn.Linear(6, config.units), torch.nn.Linear(config.units, 6)
        self.post_init()

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class MineForSequenceClassification(PreTrainedModel):
    config_class, base_model_prefix = MineConfig, "body"

    def __init__(self, config):
        super().__init__(config)
        self.body, self.head = MineModel(config), torch.nn.Linear(6, 3)
        self.post_init()

    def forward(self, x):
        return SequenceClassifierOutput(logits=self.head(self.body(x)))
"""
CUSTOM_CONFIG = """
from transformers import PreTrainedConfig


class MineConfig(PreTrainedConfig):
    model_type = "mine"

    def __init__(self, units=16, **kwargs):
        self.units = units
        super().__init__(**kwargs)
"""
CUSTOM_MAP = {
    "AutoConfig": "configuration_mine.MineConfig",
    "AutoModel": "modeling_mine.MineModel",
    "AutoModelForSequenceClassification": "modeling_mine.MineForSequenceClassification",
}
FRESH_CUSTOM = """
import sys, json, torch, transformers as tf
folder, out, with_us = sys.argv[1], sys.argv[2], sys.argv[3] == "with"
if with_us:
    import hf_oto
else:
    sys.modules["hf_oto"] = None  # import hf_oto raises
auto, x, logits = tf.AutoModelForSequenceClassification, *torch.load(f"{folder}/expected.pt")
results = {}
for source in (folder, f"{out}/once", f"{out}/twice"):
    model = auto.from_pretrained(source, trust_remote_code=True).eval()
    body = tf.AutoModel.from_pretrained(source, trust_remote_code=True).eval()
    with torch.no_grad():
        results[source] = [(found - logits).abs().max().item() for found in (model(x).logits, model.head(body(x)))]
    assert model.body.up.out_features == 4 and type(model).__name__ == "MineForSequenceClassification"
    model.save_pretrained(f"{out}/once" if source == folder else f"{out}/twice")
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def custom(tmp_path_factory):
    """A folder with a checkpoint of custom code, as anybody publishes one, and a folder with the compact model."""
    folder = tmp_path_factory.mktemp("custom")
    (folder / "full").mkdir()
    (folder / "full" / "modeling_mine.py").write_text(CUSTOM)
    (folder / "full" / "configuration_mine.py").write_text(CUSTOM_CONFIG)
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    config = {"model_type": "mine", "units": 16, "auto_map": CUSTOM_MAP}
    (folder / "full" / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    config = tf.AutoConfig.from_pretrained(folder / "full", trust_remote_code=True)
    model = tf.AutoModelForSequenceClassification.from_config(config, trust_remote_code=True).eval()
    model.save_pretrained(folder / "full")
    loaded = tf.AutoModelForSequenceClassification.from_pretrained(folder / "full", trust_remote_code=True).eval()
    x = torch.randn(3, 6)
    partition = hf_oto.partition_zigs(loaded, {"x": x})
    plan = hf_oto.PruningPlan({"body.up.weight[0]": [0, 3, 4, 9]})
    hf_oto.compact(loaded, partition, plan).save_pretrained(folder / "compact")
    torch.save((x, loaded(x).logits.detach()), folder / "compact" / "expected.pt")
    monkeypatch.undo()
    return folder


@pytest.mark.parametrize("hf_oto_is", ["with", "without"])
def test_custom_code_comes_back(custom, tmp_path, hf_oto_is):
    """A file beside the custom code makes its classes compact, and auto_map names that file: hf_oto isn't needed."""
    names = {file.name for file in (custom / "compact").iterdir()}
    assert names >= {"modeling_mine.py", "configuration_mine.py", "modeling_oto.py", "compact_modeling_mine.py"}
    assert json.loads((custom / "compact" / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_mine.MineConfig",
        "AutoModel": "compact_modeling_mine.MineModel",
        "AutoModelForSequenceClassification": "compact_modeling_mine.MineForSequenceClassification",
    }
    done = run_custom(custom / "compact", tmp_path, hf_oto_is)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) == 3 and all(found == [0.0, 0.0] for found in results.values())
    names |= {"expected.pt"}
    assert {file.name for file in (tmp_path / "twice").iterdir()} | {"expected.pt"} == names


def test_custom_code_alone_knows_no_record(custom, tmp_path):
    """Negative control: by its own class, and without hf_oto, the sizes don't fit."""
    shutil.copytree(custom / "compact", tmp_path / "copy")
    config = json.loads((custom / "compact" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {"auto_map": CUSTOM_MAP}))
    done = run_custom(tmp_path / "copy", tmp_path, "without")
    assert done.returncode != 0 and "mismatch" in done.stderr


def run_custom(folder, out, hf_oto_is):
    keep = {key: value for key, value in os.environ.items() if key != "PYTHONPATH" or hf_oto_is == "with"}
    keep |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(out / "modules")}
    keep |= {"PYTHONPATH": str(REPO)} if hf_oto_is == "with" else {}
    command = [sys.executable, "-c", FRESH_CUSTOM, str(folder), str(out), hf_oto_is]
    return subprocess.run(command, cwd=out, env=keep, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_restore_keeps_parameter_identity_flags_and_parametrizations():
    layer = torch.nn.Module()
    layer.a, layer.b = torch.nn.Linear(4, 6, device="meta"), torch.nn.Linear(4, 6, device="meta", dtype=torch.bfloat16)
    layer.b.weight = layer.a.weight.requires_grad_(False)
    layer.a.weight._is_hf_initialized = True
    layer.normed = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 6))
    layer.sizes = (4, 6)
    kept = layer.normed.weight[:3].detach().clone()
    modules = {path: {"shapes": {"weight": [3, None]}} for path in "ab"}
    modules["b"]["shapes"]["bias"] = [3]
    modules["normed.parametrizations.weight"] = {"shapes": {"original0": [3, 1], "original1": [3, None]}}
    modules[""] = {"attributes": {"sizes": [4, 3]}}
    restore_(layer, {"version": 1, "modules": modules, "cuts": []})
    assert layer.a.weight is layer.b.weight and layer.a.weight.shape == (3, 4) and layer.b.bias.dtype == torch.bfloat16
    assert layer.a.weight._is_hf_initialized and not layer.a.weight.requires_grad and layer.a.weight.is_meta
    assert torch.equal(layer.normed.weight, kept) and layer.sizes == (4, 3)


def test_push_uploads_the_code(compact_bert, tmp_path):
    (tmp_path / "modeling_oto.py").touch()
    (tmp_path / "other.py").touch()
    assert compact_bert[0]._get_files_timestamps(tmp_path).keys() == {"other.py"}


# Wrong records

LAYER = "bert.encoder.layer.0"


def module(record, path=f"{LAYER}.intermediate.dense"):
    return record["modules"][path]


WRONG = {
    "version 2, .* reads version 1: upgrade": lambda r: r.update(version=2),
    "has no 'modules'": lambda r: r.pop("modules"),
    "has no 'cuts'": lambda r: r.pop("cuts"),
    r"cuts\[0\] is not": lambda r: r["cuts"][0].update(members=[["name", 0, 1]]),
    r"cuts\[0\] is not .*": lambda r: r["cuts"][0].update(members=[["name", "0", 0, [[1]]]]),
    r".*cuts\[0\] is not": lambda r: r["cuts"][0].update(kept="f" * 9),  # more bits than ZIGs
    r"cuts\[20\] is not": lambda r: r["cuts"].append({"step": 0, "size": 4, "kept": 2, "members": []}),
    r"cuts\[0\] is not .*scales": lambda r: r["cuts"][0].update(scales=[["name", 1, 0, 0]]),
    "module 'bert.encoder.layer.9', which BertForSeq": lambda r: r["modules"].update({"bert.encoder.layer.9": {}}),
    "unknown keys": lambda r: module(r).update(shape={}),
    r"dense.out_features is '15', not an int": lambda r: module(r)["attributes"].update(out_features="15"),
    r"dense.out_features is True, not an int": lambda r: module(r)["attributes"].update(out_features=True),
    "Linear keeps no size '_version'": lambda r: module(r)["attributes"].update(_version=1),
    "Linear keeps no size 'widths'": lambda r: module(r)["attributes"].update(widths=3),
    "Linear keeps no size 'training'": lambda r: module(r)["attributes"].update(training=0),
    "dense.out_features is 24, the record has 25": lambda r: module(r)["attributes"].update(out_features=25),
    "dense.out_features is 24, the record has 0": lambda r: module(r)["attributes"].update(out_features=0),
    "dense.out_features is 100000.*00000, not an int": lambda r: module(r)["attributes"].update(out_features=10**400),
    r"out_features is 24, the record has \[15\]": lambda r: module(r)["attributes"].update(out_features=[15]),
    "shape of .*dense.weight is 15, not a list": lambda r: module(r)["shapes"].update(weight=15),
    r"dense.weight is \[0, None\], not a list of sizes >= 1": lambda r: module(r)["shapes"].update(weight=[0, None]),
    r"dense.weight has shape \(24, 32\), of which .* \[25, None\]": lambda r: module(r)["shapes"].update(
        weight=[25, None]
    ),
    r"dense.weight has shape \(24, 32\), of which .* \[15\]": lambda r: module(r)["shapes"].update(weight=[15]),
    "no weight or saved buffer 'scale'": lambda r: module(r)["shapes"].update(scale=[1]),
    "no weight or saved buffer 'position_ids'": lambda r: r["modules"].update(
        {"bert.embeddings": {"shapes": {"position_ids": [1, 8]}}}
    ),
}


@pytest.mark.parametrize("match", WRONG)
def test_wrong_record_is_an_error_before_any_weight_is_used(compact_bert, saved, tmp_path, match):
    config = json.loads((saved / "bert" / "config.json").read_text())
    WRONG[match](config["oto"])
    config["oto"] = sealed(config["oto"])  # else its digest would not fit either
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((saved / "bert" / "model.safetensors").read_bytes())
    with pytest.raises(OTOError, match=match):
        tf.AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_record_that_does_not_fit_the_weights(saved, tmp_path):
    """A record that fits the class but not the weights, here and without hf_oto: no layer is initialised anew."""
    config = json.loads((saved / "bert" / "config.json").read_text())
    module(config["oto"])["shapes"]["weight"] = [14, None]
    cuts = [cut for cut in config["oto"]["cuts"] if f"{LAYER}.intermediate.dense.weight" not in cut["members"][0]]
    config["oto"] = sealed(config["oto"] | {"cuts": cuts})
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((saved / "bert" / "model.safetensors").read_bytes())
    words = r"intermediate.dense.weight has shape \(15, 32\) in the checkpoint, \(14, 32\) by the record"
    with pytest.raises(OTOError, match=words):
        tf.BertForSequenceClassification.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    shutil.copy(saved / "bert" / "modeling_oto.py", tmp_path)
    auto = "AutoModelForSequenceClassification"
    load = f"from transformers import {auto}; {auto}.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)"
    found = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True)
    assert re.search(f"OTOError: .*{words}", found.stderr), found.stderr


def test_become_compact_checks_the_model():
    model, cuts, _ = bert()
    record = cut_(model, *cuts)
    validate(json.loads(json.dumps(sealed(record))))
    record["modules"][f"{LAYER}.intermediate.dense"]["attributes"]["out_features"] = 14
    with pytest.raises(OTOError, match="out_features is 15, the record has 14"):
        become_compact_(model, record)
    assert type(model) is tf.BertForSequenceClassification and "oto" not in model.config.to_dict()
