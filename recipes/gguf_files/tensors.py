"""The tensors of a model, under the names and with the order of rows that an architecture of llama.cpp reads."""

import re

import torch
from transformers import PreTrainedModel

from hf_oto import OTOError

from .architectures import QKV, Architecture
from .shapes import Shapes, demand

OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
STATIC_ROPE = ("default", "linear", "llama3")  # frequencies that depend on nothing else, and no factor on the scores


def tensors_of(model: PreTrainedModel, shapes: Shapes) -> dict[str, torch.Tensor]:
    """Name in the file -> tensor, without the output layer if it is the token embedding.

    Raises:
        OTOError: a parameter without a name in GGUF, or a RoPE without one.
    """
    tied = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    tensors = {}
    for name, tensor in model.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            tensors[gguf_name(name)] = tensor
    factors = rope_factors(model, shapes.head_dim)
    if (factors != 1).any():
        tensors["rope_freqs.weight"] = factors
    return tensors


def gguf_name(name: str) -> str:
    """A parameter's name in the file: blk.3.ffn_up.weight for model.layers.3.mlp.up_proj.weight."""
    path, kind = name.rsplit(".", 1)
    if path in OUTER:
        return f"{OUTER[path]}.{kind}"
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", path)
    if found is None or found[2] not in INNER:
        raise OTOError(f"llama.cpp computes nothing with the parameter {name}: merge it into the others first")
    return f"blk.{found[1]}.{INNER[found[2]]}.{kind}"


def rope_factors(model: PreTrainedModel, head_dim: int) -> torch.Tensor:
    """What the frequencies of plain RoPE are divided by, (head_dim / 2,).

    Read off the model's own frequencies, so it is right for every RoPE that has the same ones for all texts.
    """
    frequencies = model.model.rotary_emb.inv_freq.cpu()
    if frequencies.dtype != torch.float32:  # model.to(dtype) does that
        raise OTOError(f"its RoPE was rounded to {frequencies.dtype}: save the model and load it again")
    kind = model.config.rope_parameters["rope_type"]
    demand(kind in STATIC_ROPE, f"its RoPE is of type {kind!r}, and this recipe knows {', '.join(STATIC_ROPE)}")
    turned = 2 * len(frequencies)
    demand(turned == head_dim, f"its RoPE turns {turned} of the {head_dim} positions of a head, that of llama.cpp all")
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / model.config.rope_parameters["rope_theta"] ** exponents
    factors = plain / frequencies
    return torch.where((factors - 1).abs() < 1e-6, 1.0, factors)


def arranged(tensors: dict[str, torch.Tensor], shapes: Shapes, architecture: Architecture) -> dict[str, torch.Tensor]:
    """The tensors as the architecture reads them: rows of q and k in the order of its RoPE, q, k and v fused."""
    result = dict(tensors)
    for number, layer in enumerate(shapes.layers):
        if architecture.neighbours:
            for part, heads in (("attn_q", layer.heads), ("attn_k", layer.kv_heads)):
                for name in (f"blk.{number}.{part}.weight", f"blk.{number}.{part}.bias"):
                    if name in result:
                        result[name] = neighbours(result[name], heads)
        if architecture.fused:
            parts = [result.pop(f"blk.{number}.{part}.weight") for part in QKV]
            result[f"blk.{number}.attn_qkv.weight"] = torch.cat(parts)
    return result


def neighbours(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Positions i and i + d / 2 of every head of d rows, which RoPE turns together, become 2 i and 2 i + 1.

    Example:
        >>> neighbours(torch.tensor([0, 1, 2, 3, 10, 11, 12, 13]), heads=2).tolist()
        [0, 2, 1, 3, 10, 12, 11, 13]
    """
    halves = rows.unflatten(0, (heads, 2, -1))  # (heads, 2, d / 2, ...)
    return halves.transpose(1, 2).flatten(0, 2)
