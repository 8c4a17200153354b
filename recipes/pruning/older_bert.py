"""A BERT as it was called in Transformers 4: with a head mask, additive attention masks, and tuples.

It has the weights of the model that it is made from, and the names by which Kwon et al. reach them.
"""

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import PreTrainedModel

MASKED = -1e4  # of Transformers 4; they take positions with 0 for those that count


class OlderLayer(nn.Module):
    """One layer: `attention.output`, `intermediate` and `output` are called as before, by position."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.attention, self.intermediate, self.output = layer.attention, layer.intermediate, layer.output

    def forward(self, x: Tensor, attention_mask: Tensor, head_mask: Tensor) -> tuple[Tensor]:
        """x (b, t, width), attention_mask (b, 1, 1, t) is added, head_mask (1, heads, 1, 1) multiplies."""
        attention = self.attention.self
        projections = (attention.query, attention.key, attention.value)
        q, k, v = (
            projection(x).unflatten(2, (-1, attention.attention_head_size)).transpose(1, 2)
            for projection in projections
        )  # (b, heads, t, dims)
        context = scaled_dot_product_attention(q, k, v, attention_mask) * head_mask
        attended = self.attention.output(context.transpose(1, 2).flatten(2), x)
        return (self.output(self.intermediate(attended), attended),)


class OlderBert(nn.Module):
    """A BERT with a classifier, in eval mode."""

    base_model_prefix = "bert"

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.layers = nn.ModuleList(OlderLayer(layer) for layer in model.base_model.encoder.layer)
        self.bert = SimpleNamespace(encoder=SimpleNamespace(layer=self.layers))

    def forward(
        self, head_mask: Tensor, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **kwargs: Tensor
    ) -> SimpleNamespace:
        """head_mask (layers, heads)"""
        x = self.model.base_model.embeddings(input_ids=input_ids, **kwargs)
        mask = torch.where(attention_mask == 0, MASKED, 0.0)[:, None, None]  # (b, 1, 1, t)
        for layer, of_heads in zip(self.layers, head_mask, strict=True):
            (x,) = layer(x, mask, of_heads.view(1, -1, 1, 1))
        logits = self.model.classifier(self.model.base_model.pooler(x))
        return SimpleNamespace(logits=logits, loss=cross_entropy(logits, labels))
