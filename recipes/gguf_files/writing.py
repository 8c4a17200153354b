"""The GGUF file of a model and its tokenizer: everything is checked first, then written."""

import os
from pathlib import Path
from typing import NamedTuple

import gguf
import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .architectures import ARCHITECTURES, COMPUTED_BY, architecture_of
from .shapes import Shapes, demand, shapes_of
from .storage import OWN, TYPES, type_of, write_tensors
from .tensors import arranged, tensors_of
from .vocabulary import add_vocabulary, vocabulary_of


class Exported(NamedTuple):
    """What was written.

    Attributes:
        architecture: who in llama.cpp computes it.
        dtype: of the matrices.
        notes: what llama.cpp does in another way than Transformers, as sentences.
    """

    architecture: str
    dtype: str
    notes: list[str]


@torch.no_grad()
def export(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str | os.PathLike, dtype: str | None = None
) -> Exported:
    """Writes a Llama, Mistral, Qwen2 or Qwen3, compact or not, to a file that llama.cpp runs.

    Args:
        dtype: of the matrices: "f32", "f16", "bf16", "q8_0", or None for the model's own. Vectors become float32.

    Raises:
        OTOError: llama.cpp can't compute the model, or can't do what its tokenizer does. Nothing is written then.
    """
    kind = model.config.model_type
    demand(kind in COMPUTED_BY, f"it is a {kind!r}, and this recipe knows {', '.join(COMPUTED_BY)}")
    shapes = shapes_of(model)
    tensors = tensors_of(model, shapes)
    name = architecture_of(kind, shapes, tensors)
    vocabulary = vocabulary_of(tokenizer, shapes.vocabulary)
    tensors = arranged(tensors, shapes, ARCHITECTURES[name])
    dtype = dtype or OWN.get(model.dtype, "f32")
    matrix_type, file_type = TYPES[dtype]
    types = {key: type_of(key, tensor, matrix_type) for key, tensor in tensors.items()}

    writer = gguf.GGUFWriter(path, name)
    writer.add_name(Path(model.config.name_or_path).name or kind)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    notes = add_numbers(writer, model.config, shapes)
    add_vocabulary(writer, vocabulary)
    write_tensors(writer, tensors, types)
    return Exported(name, dtype, [*notes, *vocabulary.words.notes])


def add_numbers(writer: gguf.GGUFWriter, config: PreTrainedConfig, shapes: Shapes) -> list[str]:
    """Adds the numbers that llama.cpp builds the model from; returns what it can't be told."""
    context, notes = config.max_position_embeddings, []
    window = config.to_dict().get("sliding_window")
    if window is not None and window < context:
        context = window
        notes.append(f"llama.cpp attends to all tokens, and the model to the last {window}: let no text be longer")
    writer.add_context_length(context)
    writer.add_vocab_size(shapes.vocabulary)
    writer.add_embedding_length(shapes.hidden)
    writer.add_block_count(len(shapes.layers))
    heads, kv_heads, units = zip(*shapes.layers, strict=True)  # each (layers,)
    writer.add_head_count(one_or_all(heads))
    writer.add_head_count_kv(one_or_all(kv_heads))
    writer.add_feed_forward_length(one_or_all(units))
    writer.add_key_length(shapes.head_dim)
    writer.add_value_length(shapes.head_dim)
    writer.add_rope_dimension_count(shapes.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(shapes.eps)
    return notes


def one_or_all(widths: tuple[int, ...]) -> int | list[int]:
    """One number if all layers have it, which every program that reads GGUF can read; if not, an array."""
    return widths[0] if len(set(widths)) == 1 else list(widths)
