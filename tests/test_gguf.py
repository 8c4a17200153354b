"""A GGUF file says what a compact language model is, or there is none: llama.cpp computes the same from it.

Whatever needs llama.cpp is skipped where llama-cpp-python isn't installed, which has to be compiled.
"""

import json
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import tokenizers as tk
import torch
import transformers as tf
from models import randomise_
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

import hf_oto

gguf = pytest.importorskip("gguf")
sys.path.append(str(Path(__file__).parents[1]))

from recipes.gguf_files import architectures, tensors, words, writing  # noqa: E402

LINES = [
    "It is 7 o'clock: we've 1234 apples, 56 pears and I'LL eat them.",
    "Wörter   haben\tLeerzeichen\n\n und Zeilen.  ",
    "def f(x):\n    return x ** 2  # 😁 two",
]
TEMPLATE = "{% for m in messages %}<|start|>{{ m['content'] }}<|stop|>{% endfor %}"
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 96, "max_position_embeddings": 64}


# tokenizers ---------------------------------------------------------------------------------------


def byte_level(expression=None, whole=False, bos=False):
    """A tokenizer that merges bytes, learned from the lines."""
    learned = tk.Tokenizer(tk.models.BPE(ignore_merges=whole))
    bytes_only = tk.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=expression is None)
    split = [tk.pre_tokenizers.Split(tk.Regex(expression), "isolated")] if expression else []
    learned.pre_tokenizer = tk.pre_tokenizers.Sequence([*split, bytes_only])
    learned.decoder = tk.decoders.ByteLevel()
    special = ["<|start|>", "<|stop|>", "<|fill|>"]
    alphabet = tk.pre_tokenizers.ByteLevel.alphabet()
    trainer = tk.trainers.BpeTrainer(
        vocab_size=320, show_progress=False, special_tokens=special, initial_alphabet=alphabet
    )
    learned.train_from_iterator(LINES, trainer)
    learned.add_tokens([tk.AddedToken("<think>", normalized=False)])
    if bos:
        first = [("<|start|>", learned.token_to_id("<|start|>"))]
        learned.post_processor = tk.processors.TemplateProcessing("<|start|> $A", None, first)
    names = {"bos_token": "<|start|>", "eos_token": "<|stop|>", "pad_token": "<|fill|>"}
    return tf.PreTrainedTokenizerFast(tokenizer_object=learned, chat_template=TEMPLATE, **names)


def sentencepiece(metaspace=None):
    """A tokenizer as Llama-2's: characters are merged by scores, and what is no token becomes bytes."""
    special = ["<unk>", "<s>", "</s>"]
    raw = tk.Tokenizer(tk.models.BPE())
    raw.pre_tokenizer = tk.pre_tokenizers.Metaspace()
    raw.train_from_iterator([topics["numbers"], *LINES], tk.trainers.BpeTrainer(vocab_size=400, show_progress=False))
    pieces = sorted(raw.get_vocab(), key=raw.get_vocab().get)
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = []
    for piece in pieces:  # every way to make a piece, as the converters of Transformers write them
        merges += [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in vocab and piece[i:] in vocab]
    made = tk.Tokenizer(tk.models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if metaspace:
        made.pre_tokenizer = tk.pre_tokenizers.Metaspace(prepend_scheme=metaspace, split=False)
    else:
        spaces = [tk.normalizers.Prepend("▁"), tk.normalizers.Replace(" ", "▁")]
        made.normalizer = tk.normalizers.Sequence(spaces)
    made.post_processor = tk.processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return tf.PreTrainedTokenizerFast(tokenizer_object=made, **names)


TOKENIZERS = {
    "gpt-2": lambda: byte_level(),
    "llama-bpe": lambda: byte_level(words.LLAMA3, whole=True, bos=True),
    "smaug-bpe": lambda: byte_level(words.LLAMA3),
    "qwen2": lambda: byte_level(words.QWEN2),
    "tekken": lambda: byte_level(words.TEKKEN, whole=True, bos=True),
    "default": sentencepiece,
}


# models -------------------------------------------------------------------------------------------


def llama(vocab_size, **more):
    return tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=vocab_size, **SIZES | HEADS | more))


def mistral(vocab_size, **more):
    sizes = SIZES | HEADS | {"head_dim": 16}  # the query heads are wider than the hidden size
    return tf.MistralForCausalLM(tf.MistralConfig(vocab_size=vocab_size, **sizes | more))


def llama3(vocab_size, **more):
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return llama(
        vocab_size,
        rope_parameters=rope | {"original_max_position_embeddings": 32},
        tie_word_embeddings=True,
        **more,
    )


def qwen2(vocab_size, **more):
    return tf.Qwen2ForCausalLM(tf.Qwen2Config(vocab_size=vocab_size, **SIZES | HEADS | more))


def qwen3(vocab_size, tie_word_embeddings=True, **more):
    sizes = SIZES | HEADS | {"head_dim": 16, "tie_word_embeddings": tie_word_embeddings}
    return tf.Qwen3ForCausalLM(tf.Qwen3Config(vocab_size=vocab_size, **sizes | more))


FAMILIES = {  # name -> (model, tokenizer, the architecture of the compact model, that of the dense one)
    "llama": (llama, "default", "deci", "llama"),
    "mistral": (mistral, "tekken", "deci", "llama"),
    "llama3": (llama3, "llama-bpe", "deci", "llama"),
    "qwen2": (qwen2, "qwen2", "deci", "qwen2"),
    "qwen3": (qwen3, "qwen2", "openelm", "qwen3"),
}


def dense(family, **more):
    """(model, tokenizer) of a family; two more rows in the embedding than there are tokens."""
    build, tokenizer = FAMILIES[family][0], TOKENIZERS[FAMILIES[family][1]]()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = randomise_(build(len(tokenizer) + 2, **more))
    return model.eval(), tokenizer


def compact(model, stream=False):
    """Every layer with its own widths; with `stream`, less of the hidden size, too."""
    partition = hf_oto.partition_zigs(
        model, {"input_ids": torch.arange(12)[None]}, protect=() if stream else ["embed"]
    )
    rng, kept = np.random.default_rng(0), {}
    for number, axis in enumerate(partition.axes):
        kept[axis.name] = np.sort(rng.permutation(axis.size)[: axis.size - 1 - number // 2])
    return hf_oto.compact(model, partition, hf_oto.PruningPlan(kept))


def saved(model, tokenizer, folder):
    """What another process would load: the model and its tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    loaded = tf.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    return loaded, tf.AutoTokenizer.from_pretrained(folder)


def widths(model):
    """The widths of every layer, by the numbers that GGUF has for them."""
    found = {"attention.head_count": [], "attention.head_count_kv": [], "feed_forward_length": []}
    for block in model.model.layers:
        found["attention.head_count"].append(block.self_attn.q_proj.out_features // block.self_attn.head_dim)
        found["attention.head_count_kv"].append(block.self_attn.k_proj.out_features // block.self_attn.head_dim)
        found["feed_forward_length"].append(block.mlp.up_proj.out_features)
    return found


def contents(path):
    """Key -> value of a file."""
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


# in llama.cpp -------------------------------------------------------------------------------------


@pytest.fixture
def run():
    """path -> the model in llama.cpp, its keys and values in float32."""
    llama_cpp = pytest.importorskip("llama_cpp")
    opened = []

    def load(path, **more):
        float32 = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
        options = {"n_ctx": 64, "n_threads": 1, "logits_all": True, "verbose": False} | float32 | more
        opened.append(llama_cpp.Llama(str(path), **options))
        return opened[-1]

    yield load
    for model in opened:
        model.close()


def logits_of(program, ids):
    """(tokens, vocabulary)"""
    program.reset()
    program.eval(ids)
    return torch.from_numpy(program.scores[: len(ids)].copy())


@torch.no_grad()
def difference(program, model, ids):
    """The largest of all logits, at every position."""
    return (logits_of(program, ids) - model(torch.tensor([ids])).logits[0]).abs().max().item()


@torch.no_grad()
def greedy(step, ids, tokens):
    """The most probable token, again and again."""
    ids = list(ids)
    for _ in range(tokens):
        ids.append(int(step(ids).argmax()))
    return ids


def texts_agree(program, model, ids, tokens=20):
    """Whether both go on alike."""
    program.reset()
    program.eval(ids)
    theirs = list(ids)
    for _ in range(tokens):  # with keys and values kept from token to token
        theirs.append(int(program.scores[program.n_tokens - 1].argmax()))
        program.eval(theirs[-1:])
    return theirs == greedy(lambda so_far: model(torch.tensor([so_far])).logits[0, -1], ids, tokens)


@pytest.mark.parametrize("stream", [False, True], ids=["layers", "stream"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_compact_model_is_the_same_in_llama_cpp(family, stream, tmp_path, run):
    model, tokenizer = dense(family)
    model, tokenizer = saved(compact(model, stream), tokenizer, tmp_path / "compact")
    assert model.model.norm.weight.numel() == (63 if stream else 64)
    path = tmp_path / "model.gguf"
    written = writing.export(model, tokenizer, path, "f32")
    assert written.architecture == FAMILIES[family][2]
    program = run(path)
    ids = tokenizer(LINES[0]).input_ids[:40]
    assert difference(program, model, ids) < 1e-3
    assert texts_agree(program, model, ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_model_is_the_same_in_llama_cpp(family, tmp_path, run):
    model, tokenizer = dense(family)
    assert writing.export(model, tokenizer, tmp_path / "model.gguf", "f32").architecture == FAMILIES[family][3]
    assert difference(run(tmp_path / "model.gguf"), model, list(range(30))) < 1e-3


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_without_the_order_of_its_rope_it_is_another_model(family, tmp_path, run, monkeypatch):
    model, tokenizer = dense(family)
    model = compact(model)
    monkeypatch.setattr(tensors, "neighbours", lambda rows, heads: rows)
    writing.export(model, tokenizer, tmp_path / "model.gguf", "f32")
    program = run(tmp_path / "model.gguf")
    assert difference(program, model, list(range(30))) > 0.1
    assert difference(program, model, [5]) < 1e-3  # RoPE turns nothing at position 0


def test_without_its_factors_of_rope_it_is_another_model(tmp_path, run, monkeypatch):
    model, tokenizer = dense("llama3")
    monkeypatch.setattr(tensors, "rope_factors", lambda model, head_dim: torch.ones(head_dim // 2))
    writing.export(model, tokenizer, tmp_path / "model.gguf", "f32")
    assert difference(run(tmp_path / "model.gguf"), model, list(range(30))) > 0.1


def test_widths_of_other_layers_are_not_loaded(tmp_path, run, monkeypatch):
    model, tokenizer = dense("llama")
    monkeypatch.setattr(writing, "one_or_all", lambda widths: list(widths[::-1]))
    writing.export(compact(model), tokenizer, tmp_path / "model.gguf", "f32")
    with pytest.raises(ValueError, match="Failed to load model"):
        run(tmp_path / "model.gguf")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_stock_architectures_read_one_width_for_all_layers(family, tmp_path, run, monkeypatch):
    """As soon as this fails, a new llama.cpp reads more, and `COMPUTED_BY` can do with less."""
    model, tokenizer = dense(family)
    stock = architectures.COMPUTED_BY[family][0]
    reads_all = architectures.ARCHITECTURES[stock]._replace(per_layer=True, square=False)
    monkeypatch.setitem(architectures.ARCHITECTURES, stock, reads_all)
    assert writing.export(compact(model), tokenizer, tmp_path / "model.gguf", "f32").architecture == stock
    with pytest.raises(ValueError, match="Failed to load model"):
        run(tmp_path / "model.gguf")


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_other_types_compute_nearly_the_same(family, dtype, tmp_path, run):
    model, tokenizer = dense(family, intermediate_size=128)
    model = compact(model)
    writing.export(model, tokenizer, tmp_path / "model.gguf", dtype)
    program = run(tmp_path / "model.gguf")
    ids = list(range(30))
    assert 0 < difference(program, model, ids) < 0.5
    assert len(program.create_completion("x", max_tokens=4, temperature=0)["choices"][0]["text"]) > 0
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    of_32 = {name for name, tensor in found.items() if len(tensor.shape) > 1 and tensor.shape[0] % 32 == 0}
    assert {name.split(".")[-2] for name in found} - {name.split(".")[-2] for name in of_32} >= {"ffn_down"}
    for name, tensor in found.items():
        expected = "F32" if len(tensor.shape) == 1 else dtype.upper()
        if expected == "Q8_0" and name not in of_32:
            expected = "F16"
        assert tensor.tensor_type.name == expected


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_tokenizer_is_the_same_in_llama_cpp(name, tmp_path, run):
    tokenizer = TOKENIZERS[name]()
    special = tokenizer.bos_token + "a" + tokenizer.eos_token
    known = [
        *LINES,
        topics["integers"],
        *LINES[0].split(),
        "<think>",
        f"{special} b  c",
        "",
        "12345678 you'Re  \n \n\n\tß 漢字",
    ]
    path = tmp_path / "model.gguf"
    assert not writing.export(llama(len(tokenizer) + 3), tokenizer, path).notes
    program = run(path, vocab_only=True)
    for text in known:
        assert program.tokenize(text.encode(), special=True) == tokenizer(text).input_ids, text
        bare = tokenizer(text, add_special_tokens=False).input_ids
        assert program.tokenize(text.encode(), add_bos=False, special=True) == bare, text
    assert (program.token_eos(), program.token_bos()) == (tokenizer.eos_token_id, tokenizer.bos_token_id)
    found = contents(path)
    assert found.get("tokenizer.chat_template") == tokenizer.chat_template
    assert found.get("tokenizer.ggml.padding_token_id") == tokenizer.pad_token_id
    assert found["tokenizer.ggml.tokens"][-3:] == [f"[PAD{len(tokenizer) + i}]" for i in range(3)]


def test_another_name_of_the_pre_tokenizer_is_another_tokenizer(tmp_path, run, monkeypatch):
    tokenizer = TOKENIZERS["llama-bpe"]()
    monkeypatch.setitem(words.NAMES, ((words.LLAMA3,), True), "gpt-2")
    writing.export(llama(len(tokenizer)), tokenizer, tmp_path / "model.gguf")
    program = run(tmp_path / "model.gguf", vocab_only=True)
    assert any(program.tokenize(t.encode(), special=True) != tokenizer(t).input_ids for t in LINES)


SPACES = {  # Metaspace's way with the space before a text -> what llama.cpp splits in another way, and what it doesn't
    "always": ([" a"], ["a", "<s>a"]),
    "first": ([" a", "<s>a"], ["a"]),
    "never": ([], ["a", " a", "<s>a"]),
}


@pytest.mark.parametrize("scheme", SPACES)
def test_a_note_says_which_spaces_differ(scheme, tmp_path, run):
    tokenizer = sentencepiece(scheme)
    notes = writing.export(llama(len(tokenizer)), tokenizer, tmp_path / "model.gguf").notes
    program = run(tmp_path / "model.gguf", vocab_only=True)
    for texts, alike in zip(SPACES[scheme], (False, True), strict=True):
        for text in texts:
            assert (program.tokenize(text.encode(), special=True) == tokenizer(text).input_ids) == alike
    found = [("after a space" in note, "special token" in note) for note in notes]
    assert found == {"always": [(True, False)], "first": [(True, True)], "never": []}[scheme]


def test_a_note_says_that_accents_are_not_composed(tmp_path, run):
    tokenizer = TOKENIZERS["qwen2"]()
    tokenizer.backend_tokenizer.normalizer = tk.normalizers.NFC()
    (note,) = writing.export(llama(len(tokenizer)), tokenizer, tmp_path / "model.gguf").notes
    assert "NFC" in note
    program = run(tmp_path / "model.gguf", vocab_only=True)
    for text, alike in (("W\u00f6rter", True), ("Wo\u0308rter", False)):
        assert (program.tokenize(text.encode()) == tokenizer(text).input_ids) == alike


# in the file --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_has_the_widths_of_every_layer(family, tmp_path):
    model, tokenizer = dense(family)
    model, tokenizer = saved(compact(model, stream=True), tokenizer, tmp_path / "compact")
    name = writing.export(model, tokenizer, tmp_path / "model.gguf").architecture
    found = contents(tmp_path / "model.gguf")
    for key, expected in widths(model).items():
        assert len(set(expected)) == 3
        assert found[f"{name}.{key}"] == expected
    assert found[f"{name}.embedding_length"] == 63
    assert found[f"{name}.attention.key_length"] == model.model.layers[0].self_attn.head_dim


def test_equal_widths_are_one_number(tmp_path):
    model, tokenizer = dense("qwen2")
    name = writing.export(model, tokenizer, tmp_path / "model.gguf").architecture
    found = contents(tmp_path / "model.gguf")
    assert [found[f"{name}.{key}"] for key in widths(model)] == [8, 4, 96]


def test_without_a_dtype_nothing_is_rounded(tmp_path):
    model, tokenizer = dense("qwen2")
    model, tokenizer = saved(compact(model).bfloat16(), tokenizer, tmp_path / "compact")
    assert writing.export(model, tokenizer, tmp_path / "model.gguf").dtype == "bf16"
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    up = gguf.quants.dequantize(found["blk.1.ffn_up.weight"].data, gguf.GGMLQuantizationType.BF16)
    assert torch.equal(torch.from_numpy(up).bfloat16(), model.model.layers[1].mlp.up_proj.weight)
    assert "rope_freqs.weight" not in found  # the frequencies stay float32
    with pytest.raises(hf_oto.OTOError, match=r"its RoPE was rounded to torch.bfloat16: save the model"):
        writing.export(dense("qwen2")[0].bfloat16(), tokenizer, tmp_path / "rounded.gguf")


def test_a_window_ends_the_context(tmp_path):
    model, tokenizer = dense("mistral", sliding_window=16)
    (note,) = writing.export(model, tokenizer, tmp_path / "model.gguf").notes
    assert "last 16" in note
    assert contents(tmp_path / "model.gguf")["llama.context_length"] == 16
    model, tokenizer = dense("mistral", sliding_window=64)
    assert not writing.export(model, tokenizer, tmp_path / "model.gguf").notes


# what can't be said -------------------------------------------------------------------------------


def cut_rows(linear, number):
    linear.weight = torch.nn.Parameter(linear.weight[:-number].detach())


def cut_norm(norm):
    norm.weight = torch.nn.Parameter(norm.weight[:-1].detach())


def scale_scores(model):
    model.model.layers[2].self_attn.scaling *= 2


def other_eps(model):
    model.model.layers[1].post_attention_layernorm.variance_epsilon = 1e-3


def more_parameters(model):
    model.model.layers[0].mlp.gate = torch.nn.Parameter(torch.ones(1))


def large_weights(model):
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e5


REFUSED = {  # name -> (what is done to a compact Llama, the error)
    "inside heads": (
        lambda m: cut_rows(m.model.layers[0].self_attn.q_proj, 2),
        r"layers.0.self_attn.q_proj has 46 rows, in heads of 8; all heads of a file have one size.*to_dense.*uniform",
    ),
    "values": (
        lambda m: cut_rows(m.model.layers[1].self_attn.v_proj, 1),
        r"layers.1.self_attn.v_proj is 15 x 64, and with 64 channels, 4 query and 2 key-value .* 16 x 64.*to_dense",
    ),
    "groups": (
        lambda m: cut_rows(m.model.layers[2].self_attn.q_proj, 8),
        r"layers.2.self_attn.o_proj is 64 x 16, .* 1 query and 1 key-value heads.* 64 x 8.*to_dense",
    ),
    "output": (lambda m: cut_norm(m.model.norm), r"model.norm is 63, and its embedding \d+ x 64"),
    "stream": (
        lambda m: cut_norm(m.model.layers[1].input_layernorm),
        r"layers.1.input_layernorm is 63, and with 64 channels.* 64\. .*to_dense",
    ),
    "units": (lambda m: cut_rows(m.model.layers[0].mlp.gate_proj, 1), r"layers.0.mlp.gate_proj is 94 x 64.* 95 x 64"),
    "vocabulary": (lambda m: cut_rows(m.lm_head, 1), r"lm_head is \d+ x 64, its embedding \d+ x 64"),
    "scores": (scale_scores, r"layers.2.self_attn scales its scores by 0.70.*head_dim \*\* -0.5 = 0.35"),
    "eps": (other_eps, r"layers.1.post_attention_layernorm has an eps of 0.001, .* here 1e-06"),
    "parameter": (more_parameters, r"nothing with the parameter model.layers.0.mlp.gate: merge it"),
    "large": (large_weights, r"blk.0.ffn_up.weight has values that float16 doesn't reach: take --dtype bf16"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_file_cannot_say_is_an_error(name, tmp_path):
    model, tokenizer = dense("llama")
    model, (change, message) = compact(model), REFUSED[name]
    writing.export(model, tokenizer, tmp_path / "before.gguf", "f16")  # control
    change(model)
    with pytest.raises(hf_oto.OTOError, match=message):
        writing.export(model, tokenizer, tmp_path / "model.gguf", "f16")
    assert not (tmp_path / "model.gguf").exists()


def test_query_heads_serve_equally_many():
    model = compact(dense("llama")[0])
    attention = model.model.layers[0].self_attn
    cut_rows(attention.q_proj, 8)
    attention.o_proj.weight = torch.nn.Parameter(attention.o_proj.weight[:, :-8].detach())
    with pytest.raises(hf_oto.OTOError, match=r"layers.0.self_attn has 5 query heads for 3 key-value heads"):
        writing.shapes_of(model)


def test_an_untied_qwen3_needs_equal_widths(tmp_path, run):
    model, tokenizer = dense("qwen3", tie_word_embeddings=False)
    model = compact(model, stream=True)
    message = "not as 'qwen3', because all its layers .* layer 1 has others; not as 'openelm', .* lm_head .*to_dense"
    with pytest.raises(hf_oto.OTOError, match=message):
        writing.export(model, tokenizer, tmp_path / "model.gguf")
    whole = hf_oto.to_dense(model)
    assert writing.export(whole, tokenizer, tmp_path / "model.gguf").architecture == "qwen3"
    assert difference(run(tmp_path / "model.gguf"), model, list(range(30))) < 1e-3


@pytest.mark.parametrize(
    ("family", "rope", "message"),
    [
        ("llama", {"rope_type": "yarn", "factor": 4.0}, r"RoPE is of type 'yarn', .* default, linear, llama3\. "),
        ("llama", {"rope_type": "dynamic", "factor": 4.0}, r"RoPE is of type 'dynamic'"),
        ("qwen3", {"rope_type": "linear", "factor": 4.0}, r"'openelm', because it reads no factors of RoPE"),
        ("llama", {"rope_type": "linear", "factor": 4.0}, None),
        ("qwen2", {"rope_type": "linear", "factor": 4.0}, None),
    ],
)
def test_rope_is_what_llama_cpp_turns(family, rope, message, tmp_path, run):
    model, tokenizer = dense(family, rope_parameters={"rope_theta": 1e4} | rope)
    model = compact(model)
    if message is None:
        assert writing.export(model, tokenizer, tmp_path / "model.gguf").architecture == "deci"
        assert difference(run(tmp_path / "model.gguf"), model, list(range(30))) < 1e-3
    else:
        with pytest.raises(hf_oto.OTOError, match=message):
            writing.export(model, tokenizer, tmp_path / "model.gguf")


def test_biases_are_read_or_refused(tmp_path, run):
    model, tokenizer = dense("llama", attention_bias=True, mlp_bias=True)
    model = compact(model)
    writing.export(model, tokenizer, tmp_path / "model.gguf")
    assert difference(run(tmp_path / "model.gguf"), model, list(range(30))) < 1e-3
    model, tokenizer = dense("qwen3", attention_bias=True)
    with pytest.raises(hf_oto.OTOError, match="'openelm', because it reads no biases of attn_k, attn_output, attn_q"):
        writing.export(compact(model), tokenizer, tmp_path / "model.gguf")


def test_another_kind_of_model_is_an_error(tmp_path):
    model = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=320, n_embd=32, n_layer=1, n_head=4))
    with pytest.raises(hf_oto.OTOError, match=r"it is a 'gpt2', and this recipe knows llama, mistral, qwen2, qwen3"):
        writing.export(model, TOKENIZERS["gpt-2"](), tmp_path / "model.gguf")
    model, tokenizer = dense("llama")
    model.config.hidden_act = "gelu"
    with pytest.raises(hf_oto.OTOError, match="its activation is 'gelu'"):
        writing.export(model, tokenizer, tmp_path / "model.gguf")


def without_eos(tokenizer):
    tokenizer.eos_token = None


def more_tokens(tokenizer):
    tokenizer.add_tokens(["<more>"])


def other_words(tokenizer):
    tokenizer.backend_tokenizer.pre_tokenizer = byte_level(r"\d+").backend_tokenizer.pre_tokenizer


def lower_case(tokenizer):
    tokenizer.backend_tokenizer.normalizer = tk.normalizers.Lowercase()


def greedy_token(tokenizer):
    tokenizer.add_tokens([tk.AddedToken("<think>", rstrip=True)])


def framed(tokenizer):
    frame = [("<|fill|>", tokenizer.pad_token_id)]
    tokenizer.backend_tokenizer.post_processor = tk.processors.TemplateProcessing("<|fill|> $A", None, frame)


REFUSED_TOKENIZERS = {
    "eos": (without_eos, "no eos_token, and llama.cpp would take token 11"),
    "size": (more_tokens, "the token '<more>' has the number 321, and the embedding has 321 rows"),
    "words": (other_words, r"no name for this pre-tokenizer, with ignore_merges=False: .*\\\\d\+"),
    "normalizer": (lower_case, "doesn't normalise texts, and the tokenizer does: .*Lowercase"),
    "strip": (greedy_token, "'<think>' takes the spaces beside it"),
    "frame": (framed, "adds other tokens than bos and eos"),
}


@pytest.mark.parametrize("name", REFUSED_TOKENIZERS)
def test_a_tokenizer_that_llama_cpp_has_not_is_an_error(name, tmp_path):
    tokenizer, (change, message) = TOKENIZERS["qwen2"](), REFUSED_TOKENIZERS[name]
    model = llama(len(tokenizer))
    writing.export(model, tokenizer, tmp_path / "before.gguf")  # control
    change(tokenizer)
    with pytest.raises(hf_oto.OTOError, match=message):
        writing.export(model, tokenizer, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_scores_need_all_ways_to_make_a_token():
    state = json.loads(sentencepiece().backend_tokenizer.to_str())
    scores = words.words_of(state).scores
    merges = state["model"]["merges"]
    assert len(scores) < len(merges)  # so that a token is made in two ways
    made = ["".join(pair) for pair in merges]
    second = next(rank for rank, token in enumerate(made) if token in made[:rank])
    del merges[second]
    with pytest.raises(hf_oto.OTOError, match=r"llama.cpp would merge .* the tokenizer has no such merge"):
        words.words_of(state)


BPE = {  # what a tokenizer.json says of its model -> the error
    "type": ("Unigram", "is a Unigram model, and only BPE is written"),
    "end_of_word_suffix": ("</w>", "marks where words go on or end"),
    "vocab": ({"a": 0}, "no token for some byte"),
}


@pytest.mark.parametrize("key", BPE)
def test_what_bpe_may_be_in_llama_cpp(key):
    state = json.loads(sentencepiece().backend_tokenizer.to_str())
    assert words.words_of(state).kind == "llama"  # control
    state["model"][key], message = BPE[key]
    with pytest.raises(hf_oto.OTOError, match=message):
        words.words_of(state)


def test_the_expressions_are_those_of_stock_tokenizers():
    assert words.QWEN2 == PRETOKENIZE_REGEX
    assert words.LLAMA3 == words.QWEN2.replace(r"\p{N}| ", r"\p{N}{1,3}| ") != words.QWEN2
