"""The widths of every layer, read off the weights, and an error for what no GGUF file can say.

A file has one hidden size, one size of all heads and one eps; every layer has its own number of heads and units.
"""

from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from hf_oto import OTOError

WAY_OUT = (
    "hf_oto.to_dense(model) has the same outputs and stock widths, and training with uniform=True ends with stock "
    "widths; of stock models llama.cpp's own convert_hf_to_gguf.py knows more than this recipe"
)


class Layer(NamedTuple):
    """The widths of one layer: query heads, key-value heads, and units of the feed-forward network."""

    heads: int
    kv_heads: int
    units: int


class Shapes(NamedTuple):
    """What all layers have in common, and the widths of each."""

    vocabulary: int
    hidden: int
    head_dim: int
    eps: float  # of every norm
    layers: tuple[Layer, ...]


def demand(holds: bool, fact: str) -> None:
    """Raises an error with the fact and the way out, unless the condition holds."""
    if not holds:
        raise OTOError(f"llama.cpp can't compute this model: {fact}. The way out: {WAY_OUT}")


def shapes_of(model: PreTrainedModel) -> Shapes:
    """The shapes of a Llama, Mistral, Qwen2 or Qwen3.

    Raises:
        OTOError: something that GGUF says once for all layers is different somewhere.
    """
    body = model.model
    vocabulary, hidden = body.embed_tokens.weight.shape
    head_dim = body.layers[0].self_attn.head_dim
    activation, output = model.config.hidden_act, model.lm_head.weight
    demand(activation == "silu", f"its activation is {activation!r}, that of llama.cpp silu")
    demand(output.shape == (vocabulary, hidden), f"lm_head is {text(output)}, its embedding {vocabulary} x {hidden}")
    norm = body.norm.weight
    demand(norm.shape == (hidden,), f"model.norm is {text(norm)}, and its embedding {vocabulary} x {hidden}")
    layers = []
    for number, block in enumerate(body.layers):
        layers.append(layer_of(f"model.layers.{number}", block, hidden, head_dim))
    return Shapes(vocabulary, hidden, head_dim, eps_of(model), tuple(layers))


def layer_of(name: str, block: torch.nn.Module, hidden: int, head_dim: int) -> Layer:
    """The widths of one layer, once it is sure that nothing else in it has a width of its own."""
    attention, mlp = block.self_attn, block.mlp
    rows = {part: attention.get_submodule(part).weight.shape[0] for part in ("q_proj", "k_proj")}
    for part, number in rows.items():
        whole = attention.head_dim == head_dim and number % head_dim == 0
        sizes = f"{number} rows, in heads of {attention.head_dim}; all heads of a file have one size, {head_dim} here"
        demand(whole, f"{name}.self_attn.{part} has {sizes}")
    heads, kv_heads = rows["q_proj"] // head_dim, rows["k_proj"] // head_dim
    units = mlp.up_proj.weight.shape[0]
    expected = {
        "self_attn.v_proj": (kv_heads * head_dim, hidden),
        "self_attn.q_proj": (heads * head_dim, hidden),
        "self_attn.k_proj": (kv_heads * head_dim, hidden),
        "self_attn.o_proj": (hidden, heads * head_dim),
        "mlp.gate_proj": (units, hidden),
        "mlp.up_proj": (units, hidden),
        "mlp.down_proj": (hidden, units),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    for part, sizes in expected.items():
        weight = block.get_submodule(part).weight
        wanted = " x ".join(map(str, sizes))
        rest = f"{hidden} channels, {heads} query and {kv_heads} key-value heads of {head_dim}, {units} units"
        demand(weight.shape == sizes, f"{name}.{part} is {text(weight)}, and with {rest} it has to be {wanted}")
    uneven = f"{name}.self_attn has {heads} query heads for {kv_heads} key-value heads, which must serve equally many"
    demand(heads == kv_heads * attention.num_key_value_groups, uneven)
    scaling = head_dim**-0.5
    factors = f"{name}.self_attn scales its scores by {attention.scaling:g}, llama.cpp by head_dim ** -0.5"
    demand(attention.scaling == scaling, f"{factors} = {scaling:g}")
    return Layer(heads, kv_heads, units)


def eps_of(model: PreTrainedModel) -> float:
    """The one eps of all norms."""
    eps = model.model.norm.variance_epsilon
    for name, module in model.named_modules():
        other = vars(module).get("variance_epsilon", eps)
        demand(other == eps, f"{name} has an eps of {other:g}, and a file has one for all norms, here {eps:g}")
    return eps


def text(tensor: torch.Tensor) -> str:
    """A shape (3, 4) as "3 x 4"."""
    return " x ".join(map(str, tensor.shape))
