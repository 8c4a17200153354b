"""The channels and heads that Torch-Pruning (arXiv 2301.12900) removes of Transformers models, until a goal in MACs.

Both benches call it: bench_quality.py while the model trains, bench_prune.py without training.
"""

import contextlib
from typing import Any

from torch import Tensor, nn

from hf_oto import measure

NUM_PARTS = 200  # in which it may go from the dense model to the smallest one
SMALLEST = 0.95  # of every layer goes at most
GROUP_NORM = 1e-4  # the strength of its regulariser, which its examples set between 1e-5 and 1e-3


def pruner_of(model: nn.Module, inputs: dict[str, Tensor], score: str, scope: str) -> Any:
    """A pruner of all but the last layer; `score` and `scope` are the parts of a method's name.

    Of the scopes "bottleneck" is "global" without the residual stream of a transformer, as in their ViT example.
    """
    import torch_pruning as tp

    ignored = [module for module in model.modules() if is_last(module, model)]
    if scope == "bottleneck":
        ignored += [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    importance = tp.importance.GroupTaylorImportance() if score == "taylor" else None
    cls, more = tp.pruner.BasePruner, {}
    if score == "groupnorm":
        cls, more = tp.pruner.GroupNormPruner, {"reg": GROUP_NORM}
    heads = heads_of(model)
    if heads and scope == "local":  # its local pruning of heads takes one at least at every step: dimensions go
        more |= {"num_heads": heads}
    elif heads:
        more |= {
            "num_heads": heads,
            "prune_num_heads": True,
            "prune_head_dims": False,
            "head_pruning_ratio": SMALLEST,
        }
    return cls(
        model, inputs, importance or tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=SMALLEST,
        max_pruning_ratio=SMALLEST, global_pruning=scope != "local", isomorphic=scope == "isomorphic",
        iterative_steps=NUM_PARTS, ignored_layers=ignored,
        forward_fn=lambda model, inputs: model(**inputs).logits, **more,
    )  # fmt: skip


def macs(model: nn.Module, inputs: dict[str, Tensor]) -> float:
    (measured,) = measure(model, inputs=inputs, seconds=0)
    return measured["macs"]


def cut_to_(goal: float, pruner: Any, model: nn.Module, inputs: dict[str, Tensor], dense: float) -> float:
    """Removes channels, part by part, until a fraction of the dense model's MACs is left; returns what is left."""
    params = sum(p.numel() for p in model.parameters())
    left = macs(model, inputs) / dense
    while left > goal and pruner.current_step < NUM_PARTS:
        with contextlib.suppress(UnboundLocalError):  # its own, where no head is due: the next part takes the rest
            pruner.step()
        for module in model.modules():
            if (query := query_of(module)) is not None:
                module.num_attention_heads = pruner.num_heads[query]
                dims = query.out_features // module.num_attention_heads
                vars(module).update(
                    {name: dims for name in ("head_dim", "attention_head_size") if name in vars(module)}
                )
        if (now := sum(p.numel() for p in model.parameters())) != params:
            params, left = now, macs(model, inputs) / dense
    return left


def query_of(module: nn.Module) -> nn.Module | None:
    """The query's projection of an attention."""
    return getattr(module, "q_proj", getattr(module, "query", None))


def heads_of(model: nn.Module) -> dict[nn.Module, int]:
    """How many heads the projections of every attention have."""
    names = ("q_proj", "k_proj", "v_proj", "query", "key", "value")
    attentions = [module for module in model.modules() if query_of(module) is not None]
    return {getattr(m, name): m.num_attention_heads for m in attentions for name in names if hasattr(m, name)}


def is_last(module: nn.Module, model: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and module.out_features == model.config.num_labels
