"""Who in llama.cpp can compute a model: its architectures by name, what each of them reads, and the first that suits.

Read from the loaders and graphs of llama.cpp 0.5.0 (src/models/*.cpp). Most architectures take the widths of layer 0
for all layers, even if the file has an array of them. deci and openelm read every layer's own.
"""

from collections.abc import Collection, Iterator
from typing import NamedTuple

from hf_oto import OTOError

from .shapes import WAY_OUT, Shapes


class Architecture(NamedTuple):
    """What the code of llama.cpp under one name reads and computes.

    Attributes:
        per_layer: every layer has its own widths.
        neighbours: RoPE turns the positions 2 i and 2 i + 1 of a head together; if not, i and i + head_dim / 2.
        biases: the layers whose biases it reads.
        frequencies: RoPE takes factors from the file.
        output: the output layer may be another one than the token embedding.
        square: all query heads together are as wide as the hidden size.
        fused: q, k and v are one tensor.
    """

    per_layer: bool
    neighbours: bool
    biases: tuple[str, ...]
    frequencies: bool = False
    output: bool = True
    square: bool = False
    fused: bool = False


QKV = ("attn_q", "attn_k", "attn_v")
EVERYWHERE = (*QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down")
ARCHITECTURES = {
    "llama": Architecture(per_layer=False, neighbours=True, biases=EVERYWHERE, frequencies=True),
    "deci": Architecture(per_layer=True, neighbours=True, biases=EVERYWHERE, frequencies=True),
    "qwen2": Architecture(per_layer=False, neighbours=False, biases=QKV, square=True),
    "qwen3": Architecture(per_layer=False, neighbours=False, biases=QKV),
    "openelm": Architecture(per_layer=True, neighbours=False, biases=(), output=False, fused=True),
}
# model type -> who computes the same. First the one of that name, because more programs than llama.cpp know it.
COMPUTED_BY = {
    "llama": ("llama", "deci"),
    "mistral": ("llama", "deci"),
    "qwen2": ("qwen2", "deci"),
    "qwen3": ("qwen3", "openelm"),
}


def architecture_of(model_type: str, shapes: Shapes, names: Collection[str]) -> str:
    """The name of the first architecture that computes a model with these shapes and tensors.

    Args:
        names: the tensors' names in the file, those of q, k and v not yet fused.

    Raises:
        OTOError: there is none; the error says what is in the way of each.
    """
    reasons = []
    for name in COMPUTED_BY[model_type]:
        objections = list(objections_to(ARCHITECTURES[name], shapes, names))
        if not objections:
            return name
        reasons.append(f"not as {name!r}, because {' and '.join(objections)}")
    raise OTOError(f"llama.cpp can't compute this {model_type} model: {'; '.join(reasons)}. The way out: {WAY_OUT}")


def objections_to(architecture: Architecture, shapes: Shapes, names: Collection[str]) -> Iterator[str]:
    """Why an architecture can't compute a model, if it can't."""
    first = shapes.layers[0]
    others = [number for number, layer in enumerate(shapes.layers) if layer != first]
    if others and not architecture.per_layer:
        yield f"all its layers have the widths of the first, and layer {others[0]} has others"
    if architecture.square and first.heads * shapes.head_dim != shapes.hidden:
        yield f"its query heads are as wide as the hidden size, {shapes.hidden}, and {first.heads} are left"
    if "output.weight" in names and not architecture.output:
        yield "its output layer is the token embedding, and lm_head has other weights"
    if "rope_freqs.weight" in names and not architecture.frequencies:
        yield "it reads no factors of RoPE"
    biased = {name.split(".")[2] for name in names if name.startswith("blk.") and name.endswith(".bias")}
    unread = sorted(biased - set(architecture.biases))
    if unread:
        yield f"it reads no biases of {', '.join(unread)}"
