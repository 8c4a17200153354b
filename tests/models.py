"""The table of tiny models that the laws are tested on: one row is a name, a builder and the axes it must have.

Weights are random everywhere, norms, biases and running statistics too, so that nothing holds by accident.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import transformers as tf
from torch import nn
from torch.nn import functional as F

VOCAB, LENGTH = 40, 7


class Row(NamedTuple):
    """One model.

    Attributes:
        build: attention implementation -> the model, in train mode as torch makes it, its weights not yet random.
        axes: (kind, size) -> how many axes of it the model has.
        inputs: batch size -> the keyword arguments of forward.
    """

    build: Callable[[str], nn.Module]
    axes: dict[tuple[str, int], int]
    inputs: Callable[[int], dict[str, torch.Tensor]]


def randomise_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every parameter and running statistic random values of a size that keeps activations near one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise / p[0].numel() ** 0.5 if p.dim() > 1 else p + 0.3 * noise)
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(0.3 * torch.randn(b.shape, generator=generator))
            if name.endswith("running_var"):
                b.copy_(0.5 + torch.rand(b.shape, generator=generator))
    return model


def make(name: str, attention: str = "sdpa") -> nn.Module:
    """The model of a row with random weights, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomise_(TABLE[name].build(attention))


# inputs


def text(batch: int) -> dict[str, torch.Tensor]:
    ids = torch.arange(batch * LENGTH).view(batch, LENGTH) * 7 % (VOCAB - 3) + 3
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def text_to_text(batch: int) -> dict[str, torch.Tensor]:
    return text(batch) | {"decoder_input_ids": text(batch)["input_ids"][:, :4]}


def waves(*shape: int) -> torch.Tensor:
    return torch.sin(torch.arange(torch.Size(shape).numel()).float() * 1.7).view(shape)


def image(batch: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": waves(batch, 3, 32, 32)}


def image_and_text(batch: int) -> dict[str, torch.Tensor]:
    return image(batch) | text(batch)


def speech(batch: int) -> dict[str, torch.Tensor]:
    return {"input_features": waves(batch, 8, 32), "decoder_input_ids": text(batch)["input_ids"][:, :4]}


def wave(batch: int) -> dict[str, torch.Tensor]:
    return {"input_values": waves(batch, 400)}


def hidden(batch: int) -> dict[str, torch.Tensor]:
    return {"x": waves(batch, LENGTH, 16)}


def picture(batch: int) -> dict[str, torch.Tensor]:
    return {"x": waves(batch, 3, 8, 8)}


# Transformers models


def basic_resnet(attention: str) -> nn.Module:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 2]}
    return tf.ResNetForImageClassification(tf.ResNetConfig(layer_type="basic", num_labels=5, **sizes))


def bottleneck_resnet(attention: str) -> nn.Module:
    sizes = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 2]}
    return tf.ResNetForImageClassification(tf.ResNetConfig(layer_type="bottleneck", num_labels=5, **sizes))


def convnext(attention: str) -> nn.Module:
    config = tf.ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 2], num_stages=2, num_labels=5)
    return tf.ConvNextForImageClassification(config)


def mobilenet(attention: str) -> nn.Module:
    return tf.MobileNetV2ForImageClassification(tf.MobileNetV2Config(depth_multiplier=0.25, num_labels=5))


def vit(attention: str) -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    config = tf.ViTConfig(image_size=32, patch_size=8, num_labels=5, attn_implementation=attention, **sizes)
    return tf.ViTForImageClassification(config)


def swin(attention: str) -> nn.Module:
    sizes = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "mlp_ratio": 1.5}
    config = tf.SwinConfig(image_size=32, patch_size=4, num_labels=5, attn_implementation=attention, **sizes)
    return tf.SwinForImageClassification(config)


def bert(attention: str) -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    config = tf.BertConfig(vocab_size=VOCAB, max_position_embeddings=16, attn_implementation=attention, **sizes)
    return tf.BertForMaskedLM(config)  # the output embedding is tied to the input's


def distilbert(attention: str) -> nn.Module:
    config = tf.DistilBertConfig(
        vocab_size=VOCAB,
        max_position_embeddings=16,
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=24,
        num_labels=5,
        attn_implementation=attention,
    )
    return tf.DistilBertForSequenceClassification(config)


def gpt2(attention: str) -> nn.Module:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 24, "n_positions": 16}
    config = tf.GPT2Config(vocab_size=VOCAB, bos_token_id=0, eos_token_id=0, attn_implementation=attention, **sizes)
    return tf.GPT2LMHeadModel(config)


def llama(attention: str) -> nn.Module:
    """Eight heads, two of which each serve a KV group of four."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 24, "max_position_embeddings": 16}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 4}
    config = tf.LlamaConfig(vocab_size=VOCAB, pad_token_id=0, attn_implementation=attention, **sizes, **heads)
    return tf.LlamaForCausalLM(config)


def t5(attention: str) -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 8, "num_heads": 4, "num_layers": 2, "d_ff": 24}
    return tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=VOCAB, decoder_start_token_id=0, **sizes))


def deberta(attention: str) -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    position = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_position_embeddings": 16}
    config = tf.DebertaConfig(vocab_size=VOCAB, type_vocab_size=0, num_labels=5, **sizes, **position)
    return tf.DebertaForSequenceClassification(config)


def whisper(attention: str) -> nn.Module:
    config = tf.WhisperConfig(
        vocab_size=VOCAB,
        num_mel_bins=8,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_source_positions=16,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        attn_implementation=attention,
    )
    return tf.WhisperForConditionalGeneration(config)


def clip(attention: str) -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
    text_config = {"vocab_size": VOCAB, "max_position_embeddings": 16, "eos_token_id": 2, **sizes}
    vision_config = {"image_size": 32, "patch_size": 8, **sizes}
    config = tf.CLIPConfig(text_config=text_config, vision_config=vision_config, projection_dim=8)
    config._attn_implementation = attention
    return tf.CLIPModel(config)


def mixtral(attention: str) -> nn.Module:
    """Four experts in one stack of weights: their hidden units are one axis."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 24, "max_position_embeddings": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    return tf.MixtralForCausalLM(tf.MixtralConfig(vocab_size=VOCAB, attn_implementation=attention, **sizes, **heads))


def gpt_oss(attention: str) -> nn.Module:
    """Experts whose gates and values alternate in one weight."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 24, "max_position_embeddings": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return tf.GptOssForCausalLM(tf.GptOssConfig(vocab_size=VOCAB, rope_parameters=rope, **sizes, **heads))


def deepseek(attention: str) -> nn.Module:
    """Multi-head latent attention."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 24, "max_position_embeddings": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16}
    parts = {"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1}
    return tf.DeepseekV3ForCausalLM(
        tf.DeepseekV3Config(vocab_size=VOCAB, attn_implementation=attention, **sizes, **heads, **parts)
    )


def falcon(attention: str) -> nn.Module:
    """Queries, keys and values of a group side by side in one weight."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_kv_heads": 2}
    config = tf.FalconConfig(
        vocab_size=VOCAB, new_decoder_architecture=True, ffn_hidden_size=24, attn_implementation=attention, **sizes
    )
    return tf.FalconForCausalLM(config)


def bloom(attention: str) -> nn.Module:
    """ALiBi: a slope for every head, computed from their number."""
    return tf.BloomForCausalLM(tf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=1, n_head=4))


def albert(attention: str) -> nn.Module:
    """One layer, used twice, and embeddings narrower than the layers."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    config = tf.AlbertConfig(
        vocab_size=VOCAB, embedding_size=16, max_position_embeddings=16, attn_implementation=attention, **sizes
    )
    return tf.AlbertForMaskedLM(config)


def wav2vec2(attention: str) -> nn.Module:
    """Waveforms; a group norm of one channel each, and a positional convolution with weight norm."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
    convs = {"conv_dim": (12, 16), "conv_stride": (4, 2), "conv_kernel": (8, 3), "num_feat_extract_layers": 2}
    position = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    config = tf.Wav2Vec2Config(vocab_size=VOCAB, attn_implementation=attention, **sizes, **convs, **position)
    return tf.Wav2Vec2ForCTC(config)


def mamba(attention: str) -> nn.Module:
    """A state space model: a depthwise convolution and a scan over time."""
    config = tf.MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4, use_mambapy=False)
    return tf.MambaForCausalLM(config)


def recurrent_gemma(attention: str) -> nn.Module:
    """A gated linear recurrence, head by head; the state it would hand on is computed and thrown away."""
    config = tf.RecurrentGemmaConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, lru_width=32, block_types=["recurrent", "attention"], pad_token_id=0,
    )  # fmt: skip
    return tf.RecurrentGemmaForCausalLM(config)


def gated_delta_net(attention: str) -> nn.Module:
    """Linear attention by chunks, each a triangular system: two value heads for every key head."""
    config = tf.Qwen3_5TextConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, intermediate_size=24, layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, pad_token_id=0,
    )  # fmt: skip
    return tf.Qwen3_5ForCausalLM(config)


def efficientnet(attention: str) -> nn.Module:
    """Depthwise convolutions with a squeeze-and-excite gate."""
    config = tf.EfficientNetConfig(
        image_size=32, width_coefficient=0.5, depth_coefficient=0.4, hidden_dim=640, num_labels=5,
        kernel_sizes=[3, 3], in_channels=[32, 32], out_channels=[32, 48], strides=[1, 2], num_block_repeats=[1, 2],
        expand_ratios=[1, 2], depthwise_padding=[],
    )  # fmt: skip
    return tf.EfficientNetForImageClassification(config)


def regnet(attention: str) -> nn.Module:
    """Grouped convolutions."""
    sizes = {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 1], "groups_width": 4}
    return tf.RegNetForImageClassification(tf.RegNetConfig(num_labels=5, **sizes))


def segformer(attention: str) -> nn.Module:
    """Attention on a shortened sequence, a stage of one head, depthwise convolutions in the FFN."""
    stages = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16]}
    more = {"patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}
    return tf.SegformerForImageClassification(tf.SegformerConfig(num_labels=5, **stages, **more))


def detr(attention: str) -> nn.Module:
    """Detection heads, cross-attention, and a backbone whose batch norms are buffers."""
    backbone = tf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 3, "num_labels": 4}
    ffn = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = tf.DetrConfig(backbone_config=backbone, use_timm_backbone=False, **sizes, **ffn)
    return tf.DetrForObjectDetection(config)


def vit_mae(attention: str) -> nn.Module:
    """Patches masked at random."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    config = tf.ViTMAEConfig(image_size=32, patch_size=8, decoder_intermediate_size=20, **sizes, **decoder)
    config._attn_implementation = attention
    return tf.ViTMAEForPreTraining(config)


def phi3(attention: str) -> nn.Module:
    """Fused queries, keys and values, fused gate and value; the head count is read from the config in forward."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 24, "max_position_embeddings": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "original_max_position_embeddings": 16}
    config = tf.Phi3Config(vocab_size=VOCAB, pad_token_id=0, attn_implementation=attention, **sizes, **heads)
    return tf.Phi3ForCausalLM(config)


# our own, for what no model above has


class FrozenNorm(nn.Module):
    """A shift by a buffer, which no optimizer makes zero: the reader has to be."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3)
        self.register_buffer("shift", torch.linspace(1, 2, 8).view(8, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last((self.first(x) + self.shift).relu())


class Glu(nn.Module):
    """Values and gates in the halves of one weight; something is computed and thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(12, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x)
        h.softmax(-1)
        return self.down(F.glu(h, -1))


class Dense(nn.Module):
    """Every layer reads, through a BatchNorm, all that came before it, laid side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6 + 4 * i) for i in range(3))
        self.grow = nn.ModuleList(nn.Conv2d(6 + 4 * i, 4, 3, padding=1, bias=False) for i in range(3))
        self.norm = nn.BatchNorm2d(18)
        self.head = nn.Linear(18, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for norm, grow in zip(self.norms, self.grow, strict=True):
            x = torch.cat([x, grow(norm(x).relu())], 1)
        return self.head(self.norm(x).relu().mean((2, 3)))


class MultiQuery(nn.Module):
    """Four query heads on one key and value: a head of zero queries attends to all tokens alike, which is not zero."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.q = nn.Linear(16, 16)
        self.kv = nn.Linear(16, 8)
        self.o = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.heads, 4).transpose(1, 2)  # (b, heads, n, 4)
        k, v = self.kv(x).view(b, n, 2, 1, 4).unbind(2)
        scores = q @ k.transpose(1, 2).transpose(2, 3) / 2  # (b, heads, n, n)
        return self.o((scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2).reshape(b, n, -1))


class GroupedConv(nn.Module):
    """A convolution of four groups of three between two whole ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3)
        self.grouped = nn.Conv2d(12, 20, 3, groups=4)
        self.last = nn.Conv2d(20, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.grouped(self.first(x).relu()).relu())


class Sigmoid(nn.Module):
    """f(0) = 1/2 between producer and consumer: zero producers alone are not silent."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 12)
        self.down = nn.Linear(12, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).sigmoid())


class GroupNormed(nn.Module):
    """Statistics over groups of four channels: only whole groups can go."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3)
        self.norm = nn.GroupNorm(4, 16)
        self.last = nn.ConvTranspose2d(16, 5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(x)).relu())


class GatedConfig(tf.PreTrainedConfig):
    model_type = "gated"


class Gated(tf.PreTrainedModel):
    """Gate and value from one weight, cut in two with `chunk`: position j and position j + 12 are one unit."""

    config_class = GatedConfig

    def __init__(self, config: GatedConfig) -> None:
        super().__init__(config)
        self.up = nn.Linear(16, 24)
        self.down = nn.Linear(12, 16)
        self.post_init()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * value)


class WeightNormed(tf.PreTrainedModel):
    """Direction and norm of a weight by themselves: a zero norm silences, a zero direction would be 0 / 0."""

    config_class = GatedConfig

    def __init__(self, config: GatedConfig) -> None:
        super().__init__(config)
        norm = nn.utils.parametrizations.weight_norm
        self.first, self.last = norm(nn.Conv2d(3, 8, 3)), norm(nn.Conv2d(8, 5, 3))
        self.post_init()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).relu())


class Swapped(tf.PreTrainedModel):
    """The two parts of a hidden layer change places on the way: its units are read in another order."""

    config_class = GatedConfig

    def __init__(self, config: GatedConfig) -> None:
        super().__init__(config)
        self.parts = [8, 4]
        self.up = nn.Linear(16, 12)
        self.down = nn.Linear(12, 16)
        self.post_init()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.up(x).relu().split(self.parts, -1)
        return self.down(torch.cat([right, left], -1))


def channels(counts: dict[int, int]) -> dict[tuple[str, int], int]:
    return {("channels", size): count for size, count in counts.items()}


TRANSFORMER = {("heads", 4): 2, ("units", 24): 2}
MOBILENET_V2 = channels({8: 4, 16: 1, 24: 1, 40: 1, 48: 6, 80: 1, 96: 4, 144: 3, 240: 3, 1280: 1})
REGNET = channels({8: 1, 16: 1, 2: 1, 24: 1, 4: 1}) | {("groups", 4): 1, ("groups", 6): 1}

TABLE = {
    "resnet_basic": Row(basic_resnet, channels({8: 2, 12: 3}), image),
    "resnet_bottleneck": Row(bottleneck_resnet, channels({4: 2, 8: 5, 16: 1, 32: 1}), image),
    "convnext": Row(convnext, {("units", 32): 1, ("units", 48): 2}, image),
    "mobilenet_v2": Row(mobilenet, MOBILENET_V2, image),
    "vit": Row(vit, TRANSFORMER, image),
    "swin": Row(swin, {("heads", 2): 2, ("heads", 4): 2, ("units", 24): 2, ("units", 48): 2}, image),
    "bert": Row(bert, TRANSFORMER, text),
    "distilbert": Row(distilbert, TRANSFORMER | {("units", 32): 1}, text),
    "gpt2": Row(gpt2, TRANSFORMER, text),
    "llama": Row(llama, {("units", 32): 1, ("kv_groups", 2): 2, ("units", 24): 2}, text),
    "t5": Row(t5, {("heads", 4): 3, ("units", 24): 4}, text_to_text),
    "deberta": Row(deberta, TRANSFORMER | {("units", 32): 2}, text),
    "whisper": Row(whisper, {("heads", 4): 3, ("units", 24): 2, ("channels", 32): 1}, speech),
    "clip": Row(clip, TRANSFORMER, image_and_text),
    "dense": Row(lambda attention: Dense(), {("channels", 6): 1, ("channels", 4): 3}, picture),
    "multi_query": Row(lambda attention: MultiQuery(), {("heads", 4): 1}, hidden),
    "grouped_conv": Row(lambda attention: GroupedConv(), {("groups", 4): 1}, picture),
    "sigmoid": Row(lambda attention: Sigmoid(), {("units", 12): 1}, hidden),
    "group_norm": Row(lambda attention: GroupNormed(), {("groups", 4): 1}, picture),
    "swapped": Row(lambda attention: Swapped(GatedConfig()), {("units", 12): 1}, hidden),
    "mixtral": Row(mixtral, {("units", 32): 1, ("kv_groups", 2): 1, ("units", 24): 1}, text),
    "gpt_oss": Row(gpt_oss, {("units", 32): 1, ("kv_groups", 2): 1, ("units", 24): 1}, text),
    "deepseek": Row(deepseek, {("units", 32): 1, ("units", 16): 2, ("heads", 4): 1, ("units", 24): 1}, text),
    "falcon": Row(falcon, {("heads", 2): 1, ("units", 24): 1}, text),
    "bloom": Row(bloom, {("units", 8): 1, ("units", 128): 1}, text),
    "albert": Row(albert, {("heads", 4): 1, ("units", 24): 1}, text),
    "wav2vec2": Row(wav2vec2, {("groups", 12): 1, ("heads", 4): 1, ("units", 24): 1}, wave),
    "recurrent_gemma": Row(
        recurrent_gemma, {("units", 16): 1, ("channels", 4): 1, ("units", 24): 2, ("kv_groups", 2): 1}, text
    ),
    "gated_delta_net": Row(gated_delta_net, {("units", 16): 1, ("kv_groups", 2): 2, ("units", 24): 2}, text),
    "mamba": Row(mamba, {("units", 16): 1, ("channels", 32): 1}, text),
    "efficientnet": Row(efficientnet, channels({16: 2, 4: 2, 32: 1, 24: 1, 640: 1}), image),
    "regnet": Row(regnet, REGNET, image),
    "segformer": Row(segformer, {("channels", 16): 1, ("heads", 2): 1, ("channels", 32): 1}, image),
    "detr": Row(detr, channels({8: 2, 16: 2}) | {("heads", 4): 3, ("units", 24): 2, ("units", 32): 2}, image),
    "vit_mae": Row(vit_mae, {("heads", 4): 1, ("units", 24): 1, ("heads", 2): 1, ("units", 20): 1}, image),
    "phi3": Row(phi3, {("units", 32): 1, ("kv_groups", 2): 1, ("units", 24): 1}, text),
    "weight_norm": Row(lambda attention: WeightNormed(GatedConfig()), channels({8: 1}), picture),
    "frozen_norm": Row(lambda attention: FrozenNorm(), channels({8: 1}), picture),
    "glu": Row(lambda attention: Glu(), {("units", 12): 1}, hidden),
    "gated": Row(lambda attention: Gated(GatedConfig()), {("units", 12): 1}, hidden),
}
