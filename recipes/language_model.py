"""Train a small Llama from scratch with TRL's SFTTrainer, and get a compact one back.

    python recipes/language_model.py                               # the Python reference, which every Python ships
    python recipes/language_model.py --dataset NAME_OR_FOLDER      # any dataset with a column "text"
    python recipes/language_model.py --smoke                       # a few steps, to see that everything runs

The tokenizer is learned from the same texts. A dense run and an OTO run of the same steps, the perplexity of the last
tenth of the texts, what both write, and the saved compact model loaded again by another process.
"""

import math
from dataclasses import dataclass

import torch
from common import Recipe, byte_pairs, metric, paragraphs, parse, reload
from datasets import Dataset, load_dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

from hf_oto import OTOArguments, OTOMixin

SMALL = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6,
         "num_key_value_heads": 3}  # fmt: skip
TINY = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 2}  # of a smoke run
CHARACTERS = 2000  # of a piece of text


class OTOSFTTrainer(OTOMixin, SFTTrainer):
    """`SFTTrainer` that ends with a compact model."""


@dataclass
class OTOSFTConfig(OTOArguments, SFTConfig):
    """`SFTConfig` and what to prune."""


def pieces(name: str | None) -> list[str]:
    """The texts one after the other, in pieces of equal length."""
    whole = "\n".join(paragraphs() if name is None else load_dataset(name)["train"]["text"])
    return [whole[i : i + CHARACTERS] for i in range(0, len(whole), CHARACTERS)]


def written(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, beginning: str) -> str:
    """How a model goes on."""
    tokens = tokenizer(beginning, return_tensors="pt", return_token_type_ids=False).to(model.device)
    set_seed(0)
    return tokenizer.decode(model.eval().generate(**tokens, max_new_tokens=40, do_sample=True, top_k=20)[0])


@torch.no_grad()
def next_token_accuracy(trainer: SFTTrainer) -> float:
    """Share of the tokens of the evaluation texts, in [0, 1], that the model finds most likely."""
    share = metric("accuracy")
    for batch in trainer.get_eval_dataloader():
        batch = {name: tensor.to(trainer.model.device) for name, tensor in batch.items()}
        guessed, tokens = trainer.model.eval()(**batch).logits[:, :-1].argmax(-1), batch["labels"][:, 1:]
        known = tokens != -100  # padding has no label
        share.add_batch(predictions=guessed[known], references=tokens[known])
    return share.compute()["accuracy"]


def main() -> None:
    """Runs the recipe."""
    options, args = parse(
        __doc__, Recipe, OTOSFTConfig, output_dir="out/language_model", max_steps=600, max_length=128,
        per_device_train_batch_size=16, per_device_eval_batch_size=16, learning_rate=2e-3, weight_decay=0.01,
        warmup_steps=0.05, lr_scheduler_type="cosine", packing=True, packing_strategy="wrapped", bf16=False,
        gradient_checkpointing=False,
        activation_checkpointing=False,
    )  # fmt: skip
    texts = pieces(options.dataset)[: 40 if options.smoke else None]
    train, test = texts[: -len(texts) // 10], texts[-len(texts) // 10 :]
    tokenizer = byte_pairs(train, 512)
    shape = SMALL | (TINY if options.smoke else {})

    def trained(cls: type[SFTTrainer]) -> SFTTrainer:
        set_seed(args.seed)
        config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=args.max_length, **shape)
        trainer = cls(
            LlamaForCausalLM(config), args,
            train_dataset=Dataset.from_dict({"text": train}), eval_dataset=Dataset.from_dict({"text": test}),
            processing_class=tokenizer,
        )  # fmt: skip
        trainer.train()
        return trainer

    dense, compact = trained(SFTTrainer), trained(OTOSFTTrainer)
    for name, trainer in (("dense", dense), ("compact", compact)):
        perplexity, accuracy = math.exp(trainer.evaluate()["eval_loss"]), next_token_accuracy(trainer)
        print(f"{name}: perplexity {perplexity:.2f}, next-token accuracy {accuracy:.4f}")
        print(f"{name} writes: {written(trainer.model, tokenizer, test[0][:40])!r}")

    folder = f"{args.output_dir}/compact"
    compact.save_model(folder)
    tokens = tokenizer(test[0][:200], return_tensors="pt", return_token_type_ids=False)
    reload("AutoModelForCausalLM", folder, compact.model, dict(tokens))


if __name__ == "__main__":
    main()
