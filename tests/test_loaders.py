"""A compact model goes where a stock model goes: every loader, every consumer, in fresh processes, the same outputs.

What is done there, and how it is judged, stands in loaders_worker.py.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import transformers as tf
from models import LENGTH, TABLE, VOCAB, make, randomise_
from transformers.decision import DecisionConfig

import hf_oto
from hf_oto.modeling_oto import OTOError

WORKER = Path(__file__).parent / "loaders_worker.py"
CONFIG = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 24,
}


def tokenizer(name):
    if name == "whisper":
        words = ["[PAD]", "<|startoftranscript|>", "<|endoftext|>", *(f"w{i}" for i in range(VOCAB - 4))]
        words += ["<|notimestamps|>"]  # what comes behind it is a time
        special = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), [*words[:3], words[2]], strict=True))
        return tf.WhisperTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], **special)
    words = ["[PAD]", "[UNK]", "[MASK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(VOCAB - 5))]
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "mask", "cls", "sep")}
    return tf.PreTrainedTokenizerFast(tokenizer_object=model, model_max_length=16, **special)


def processors(name, folder):
    """What a pipeline needs beside the model."""
    size = {"height": 32, "width": 32}
    inputs = TABLE[name].inputs(1)
    if inputs.keys() & {"input_ids", "decoder_input_ids", "input_values"}:
        tokenizer(name).save_pretrained(folder)
        DecisionConfig(labels={"noul": ["w7", "w8"]}, chat_template="{{ state }}").save_pretrained(folder)
    if name == "clip":
        images = tf.CLIPImageProcessorPil(size=size, do_center_crop=False)
        tf.CLIPProcessor(images, tokenizer(name)).save_pretrained(folder)
    elif name == "detr":
        tf.DetrImageProcessorPil(size=size, do_pad=False).save_pretrained(folder)
    elif "pixel_values" in inputs:
        tf.ViTImageProcessorPil(size=size).save_pretrained(folder)
    elif name == "whisper":
        options = {"feature_size": 8, "hop_length": 500, "chunk_length": 1, "n_fft": 500}
        tf.WhisperFeatureExtractor(**options).save_pretrained(folder)
    elif name == "wav2vec2":
        tf.Wav2Vec2FeatureExtractor().save_pretrained(folder)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory, draw_plan):
    """Every Transformers model of the table, in a folder each: `full`, `compact` and `stock`."""
    folder = tmp_path_factory.mktemp("zoo")
    for name, protect in [*((name, ()) for name in TABLE), ("llama_protected", ("embed",))]:
        row = name.removesuffix("_protected")
        model, inputs = make(row).eval(), TABLE[row].inputs(2)
        if type(model) is not getattr(tf, type(model).__name__, None):
            continue
        partition = hf_oto.partition_zigs(model, inputs, protect=protect)
        model.save_pretrained(folder / name / "full")
        hf_oto.compact(model, partition, draw_plan(partition)).save_pretrained(folder / name / "compact")
        hf_oto.to_dense(model).save_pretrained(folder / name / "stock")
        for kind in ("full", "compact", "stock"):
            processors(row, folder / name / kind)
    return folder


# What the stock model cannot do either, in its words
STOCK_CANNOT = (
    "Repo id must be in the form",  # AutoBackbone asks the Hub, even for a folder
    "finds none of its weights",  # a head whose body has another prefix: drawn at random, without a word
    "input_channels must be divisible by 8",
    "You set `ignore_mismatched_sizes` to `False`",  # multiple choice from five labels
    "The shape of the mask",
    "has no attribute 'shape'",  # a text pipeline for text and images
    "You have to specify input_ids",  # an image pipeline for text and images
    "Can't load feature extractor",
    "shape '[32, 0]' is invalid",  # 4 bits on a CPU with AVX512-BF16, whose kernel takes multiples of 32 and 64 only
)
# What a head of another task would read is narrow in these
NARROW = {
    "deberta", "deepseek", "distilbert", "gated_delta_net", "gpt_oss", "llama", "mixtral", "mobilenet_v2", "phi3"
}  # fmt: skip
SAME_BY_CHANCE = {"pipeline gpt2 text-generation", "pipeline bloom text-generation"}  # four words, pruned or not


def judge(zoo, out, group, subtests):
    """Runs a group of checks in a fresh process; every check is a subtest."""
    out.mkdir()
    environment = {key: value for key, value in os.environ.items() if group != "trusted" or key != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(out / "modules")}
    command = [sys.executable, str(WORKER), str(zoo), str(out), group]
    done = subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-5000:]
    results = json.loads((out / "results.json").read_text())
    for key, found in results.items():
        with subtests.test(key):
            if "skip" in found:
                assert any(words in found["skip"] for words in STOCK_CANNOT), found["skip"]
                pytest.skip(f"the stock model: {found['skip']}")
            if key.startswith("auto_class") and key.split()[1] in NARROW and "error" in found:
                assert "OTOError" in found["error"] and "prune with protect=" in found["error"], found["error"]
                continue
            assert "error" not in found, found["error"]
            assert found["same"] <= found["tolerance"]
            if "full" in found and key not in SAME_BY_CHANCE:
                assert found["full"] > max(1e-3, found["tolerance"])
    return results


def test_with_hf_oto(zoo, tmp_path, subtests):
    results = judge(zoo, tmp_path / "out", "imported", subtests)
    assert {key.split()[1] for key, found in results.items() if "error" in found} == NARROW
    assert len(results) > 200


def test_without_hf_oto(zoo, tmp_path, subtests):
    assert len(judge(zoo, tmp_path / "out", "trusted", subtests)) > 100


@pytest.mark.slow
def test_compilers_and_exporters(zoo, tmp_path, subtests):
    judge(zoo, tmp_path / "out", "exported", subtests)


@pytest.mark.parametrize("tied", [False, True])
def test_another_head_on_a_narrow_stream(tied, tmp_path, draw_plan):
    """The error names what to protect, by the name it has in the model; what is protected so takes the head."""
    inputs = TABLE["llama"].inputs(2)

    def pruned(protect):
        model = randomise_(tf.LlamaForCausalLM(tf.LlamaConfig(**CONFIG, tie_word_embeddings=tied)).eval())
        partition = hf_oto.partition_zigs(model, inputs, protect=protect)
        hf_oto.compact(model, partition, draw_plan(partition)).save_pretrained(tmp_path)
        return tf.AutoModelForTokenClassification.from_pretrained(tmp_path)

    with pytest.raises(OTOError, match=r"has no \['lm_head.weight'\] but other weights.*to_dense") as error:
        pruned(())
    (named,) = re.findall(r"protect=\['(.*)'\]", str(error.value))
    assert pruned([named])(**inputs).logits.shape == (2, LENGTH, 2)
