"""What test_distillation.py launches on several processes: `distillation_worker.py FOLDER SCENARIO`.

Every rank writes what it ended with to FOLDER/SCENARIO.RANK.pt.
"""

import os
import sys
from pathlib import Path

import torch
import transformers as tf
from torch.distributed.tensor import DTensor

from hf_oto import OTOTrainer, OTOTrainingArguments

FSDP2 = dict(fsdp=True, fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]})
AUTO = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto")
ZERO3 = AUTO | {"bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 3}}
SETTINGS = {"ddp": {}, "fsdp2": FSDP2, "zero3": dict(deepspeed=ZERO3, use_cpu=False)}


def rows():
    """Answers of 1 to 7 tokens after a prompt of one: the shares of two ranks have unequal numbers of labels."""
    g = torch.Generator().manual_seed(0)
    found = []
    for i in range(64):
        words = torch.randint(3, 40, (8,), generator=g)
        counts = (torch.arange(8) > 0) & (torch.arange(8) <= 1 + i * 5 % 7)
        found.append({"input_ids": words, "labels": torch.where(counts, words, -100)})
    return found


def run(folder, batch_size=4, teacher="dense", seed=0, **more):
    tf.set_seed(seed)
    size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**size, intermediate_size=48, vocab_size=40))
    model.register_buffer("seen", torch.tensor([True, False]), persistent=False)  # buffers of any dtype are sent
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2 if p.dim() > 1 else 1)
    args = OTOTrainingArguments(
        str(folder), max_steps=24, per_device_train_batch_size=batch_size, learning_rate=2e-2, optim="sgd",
        save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False, logging_strategy="no",
        distillation_weight=0.8, protect=["embed"], **({"use_cpu": True} | more),
    )  # fmt: skip
    trainer = OTOTrainer(model, args, train_dataset=rows(), teacher=teacher)
    trainer.train()
    weights = {}
    for name, t in trainer.model.state_dict().items():
        weights[name] = t.full_tensor() if isinstance(t, DTensor) else t.clone()
    plan = {name: [int(i) for i in kept] for name, kept in trainer.plan.kept.items()}
    return {"plan": plan, "weights": {n: t for n, t in weights.items() if t.is_floating_point()}}


if __name__ == "__main__":
    folder, scenario = Path(sys.argv[1]), sys.argv[2]
    rank = int(os.environ["RANK"])
    if scenario == "zero3":
        import zero_worker  # which sets up DeepSpeed for CPUs

        zero_worker.deepspeed.init_distributed("gloo")
        zero_worker.force_deepspeed()
    # under DDP the ranks begin with other weights: those of rank 0 count, of the model and of its copy
    seed = rank if scenario == "ddp" else 0
    torch.save(run(folder / scenario, seed=seed, **SETTINGS[scenario]), folder / f"{scenario}.{rank}.pt")
