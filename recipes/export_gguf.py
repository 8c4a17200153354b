"""Writes a compact language model, or a dense one, as a GGUF file, which llama.cpp and what is built on it run.

    python recipes/export_gguf.py COMPACT_FOLDER OUT.gguf [--dtype q8_0]
    python recipes/export_gguf.py --smoke                        # makes a tiny model, writes it and reads it again

For Llama, Mistral, Qwen2 and Qwen3 with a BPE tokenizer; needs `pip install -e ".[gguf]"`. In the file every layer has
its own number of query heads, key-value heads and feed-forward units; the hidden size may be cut, too. An error says
what llama.cpp can't compute. The parts are in gguf_files: shapes, architectures, tensors, vocabulary, writing.
"""

import argparse
import tempfile
from pathlib import Path

import gguf
from common import byte_pairs, paragraphs
from gguf_files.storage import TYPES
from gguf_files.writing import export
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import hf_oto


def tiny(folder: str) -> None:
    """Saves a Llama of three layers, each with its own widths, and its tokenizer."""
    tokenizer = byte_pairs(paragraphs()[:100], 400)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4,
        intermediate_size=96,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    partition = hf_oto.partition_zigs(model, protect=["embed"])
    kept = {}
    for number, axis in enumerate(partition.axes):
        kept[axis.name] = range(axis.size - 1 - number // 2)
    hf_oto.compact(model, partition, hf_oto.PruningPlan(kept)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def read_again(path: str) -> None:
    """Prints what stands in a file of the widths of its layers, and how many tensors there are."""
    reader = gguf.GGUFReader(path)
    name = reader.fields["general.architecture"].contents()
    for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        print(f"{name}.{key}: {reader.fields[f'{name}.{key}'].contents()}")
    print(f"{len(reader.tensors)} tensors, {Path(path).stat().st_size:,} bytes")


def main() -> None:
    """Runs the recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="a folder or a Hub name, with model and tokenizer")
    parser.add_argument("out", nargs="?", help="the file to write")
    parser.add_argument("--dtype", choices=TYPES, help="of the matrices; without it, the model's own")
    parser.add_argument("--smoke", action="store_true", help="write a tiny model to a temporary file")
    options = parser.parse_args()
    if not options.smoke and options.out is None:
        parser.error("a folder and a file to write are needed")
    with tempfile.TemporaryDirectory() as temporary:
        if options.smoke:
            options.folder, options.out = temporary, f"{temporary}/tiny.gguf"
            tiny(temporary)
        try:
            model = AutoModelForCausalLM.from_pretrained(options.folder, dtype="auto")
            tokenizer = AutoTokenizer.from_pretrained(options.folder)
        except (OSError, ValueError) as error:
            parser.error(f"{options.folder} must be a folder or a Hub name with a model and its tokenizer: {error}")
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        try:
            written = export(model, tokenizer, options.out, options.dtype)
        except hf_oto.OTOError as error:
            parser.error(str(error))
        print(f"{options.out}: {written.architecture}, {written.dtype}")
        for note in written.notes:
            print(f"note: {note}")
        read_again(options.out)


if __name__ == "__main__":
    main()
