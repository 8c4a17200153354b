"""What test_hub.py runs as a client of its Hub: `hub_worker.py FOLDER SCENARIO ...`.

A scenario trains and pushes to the repository of its name; what the pushed model answers is written to FOLDER.
"""

import ast
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch
import transformers as tf
from datasets import Dataset
from huggingface_hub import HfApi, ModelCard, snapshot_download
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

import hf_oto
from hf_oto import OTOTrainer, OTOTrainingArguments, hub

torch.set_num_threads(1)
INPUTS = {"input_ids": torch.arange(16).view(2, 8)}
BERT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=60)
GPT2 = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=60, n_positions=16, bos_token_id=0, eos_token_id=1)


def tokenizer():
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "word": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return tf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]")


def data(of="bert"):
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 60, (64, 8)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": rng.integers(0, 3, 64).tolist() if of == "bert" else ids})


def bert():
    tf.set_seed(0)
    return tf.BertForSequenceClassification(tf.BertConfig(**BERT, num_labels=3))


def gpt2():
    tf.set_seed(0)
    model = tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2))
    model.generation_config.max_new_tokens = 5
    return model


def arguments(folder, cls=OTOTrainingArguments, **more):
    settings = dict(
        max_steps=24, per_device_train_batch_size=8, learning_rate=1e-3, save_steps=8, logging_steps=8,
        report_to="none", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, push_to_hub=True,
    )  # fmt: skip
    return cls(str(folder), **(settings | more))


def made(folder, name, model=None, cls=OTOTrainer, rows=None, **more):
    args = arguments(folder / f"run of {name}", **{"hub_model_id": f"me/{name}"} | more)
    rows, metrics = rows or data(), lambda p: {"accuracy": (p.predictions.argmax(-1) == p.label_ids).mean()}
    trainer = cls(
        model or bert(), args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer(),
        compute_metrics=metrics if isinstance(model, tf.BertPreTrainedModel | None) else None,
    )  # fmt: skip
    trainer.add_callback(Finished(trainer))
    return trainer


class Finished(tf.TrainerCallback):
    """Waits for every push: a checkpoint is not pushed while another one is."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_save(self, *args, **kwargs):
        self.trainer._finish_current_push()


@torch.no_grad()
def remember(folder, name, model):
    torch.save(model.eval()(**INPUTS).logits, folder / f"{name}.pt")


class Sharded(OTOTrainer):
    """Saves the dense model in several files."""

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self.report is None and self.args.should_save:
            (Path(output_dir) / "model.safetensors").unlink()
            self.model.save_pretrained(output_dir, max_shard_size="60KB")


# scenarios: (folder) -> pushes ------------------------------------------------------------


def end(folder):
    """A fine-tuned model, pushed once, with all that a card can have."""
    api = HfApi()
    bert().push_to_hub("me/base")
    api.upload_file(repo_id="me/base", path_in_repo="README.md", path_or_fileobj=b"---\nlicense: mit\n---\n")
    model = tf.AutoModelForSequenceClassification.from_pretrained("me/base")
    trainer = made(folder, "end", model, hub_strategy="end", target_group_sparsity=0.4, weight_decay=0.1, optim="sgd")
    trainer.train()
    trainer.evaluate()
    pushed = trainer.push_to_hub("All of it", tags="mine", dataset_tags="some_data", dataset="Some data")
    assert pushed.oid == api.model_info("me/end").sha
    remember(folder, "end", trainer.model)


def every_save(folder):
    trainer = made(folder, "every_save", gpt2(), Sharded, data("gpt2"))
    trainer.train()
    trainer.push_to_hub(blocking=False).result()
    remember(folder, "every_save", trainer.model)


def stock(folder):
    trainer = made(folder, "stock", cls=tf.Trainer)
    trainer.train()
    trainer.push_to_hub()


def checkpoint(folder):
    """Into a private repository, on a branch, with a token of its own; then resumed from there."""
    more = dict(
        hub_strategy="checkpoint", hub_revision="trial", hub_private_repo=True, hub_token=os.environ["HF_TOKEN"]
    )
    trainer = made(folder, "checkpoint", cls=Sharded, **more)
    HfApi().create_branch("me/checkpoint", branch="trial")
    trainer.train()
    trainer.save_model()
    remember(folder, "checkpoint", trainer.model)
    there = snapshot_download("me/checkpoint", revision="trial", allow_patterns="last-checkpoint/*")
    again = made(folder, "resumed", hub_strategy="end")
    again.train(resume_from_checkpoint=f"{there}/last-checkpoint")
    assert again.plan == trainer.plan


def alone(folder):
    """No trainer: the model's own push. The dense model and a compact one of another width are older revisions."""
    model = gpt2()
    model.push_to_hub("me/alone", commit_message="dense")
    partition = hf_oto.partition_zigs(model, INPUTS)
    for kept in (range(1, 4), range(2)):
        heads = {axis.name: list(kept) for axis in partition.axes if axis.kind == "heads"}
        hf_oto.compact(model, partition, hf_oto.PruningPlan(heads))
        partition = hf_oto.partition_zigs(model, INPUTS)
        model.push_to_hub("me/alone", commit_message=f"{len(kept)} heads", tags=["mine"])
        remember(folder, f"alone-{len(kept)}", model)
    tokenizer().push_to_hub("me/alone")
    hub._delete_others("me/alone", ["model-00001-of-00002.safetensors"], None, None)  # not there: none goes


def image(folder):
    """An image model, with what turns images into its inputs."""
    tf.set_seed(0)
    size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16)
    model = tf.ViTForImageClassification(tf.ViTConfig(**size, patch_size=8, num_labels=3))
    processor = tf.ViTImageProcessorPil(size={"height": 16, "width": 16})
    pixels, labels = torch.randn(64, 3, 16, 16), torch.arange(64) % 3
    rows = [{"pixel_values": x, "labels": y} for x, y in zip(pixels, labels, strict=True)]
    args = arguments(folder / "run of image", hub_model_id="me/image", hub_strategy="end")
    trainer = OTOTrainer(model, args, train_dataset=rows, processing_class=processor)
    trainer.train()
    trainer.push_to_hub()
    answers = tf.pipeline("image-classification", trainer.model, image_processor=processor)(picture())
    torch.save(torch.tensor([answer["score"] for answer in answers]), folder / "image.pt")


def picture():
    return Image.fromarray((np.arange(24 * 24 * 3) * 7 % 256).astype("uint8").reshape(24, 24, 3))


def uniform(folder):
    """A compact model without a record."""
    trainer = made(folder, "uniform", hub_strategy="end", uniform=True, target_group_sparsity=0.3)
    trainer.train()
    trainer.push_to_hub()
    remember(folder, "uniform", trainer.model)


def twice(folder):
    """A compact model is pruned once more."""
    model = tf.AutoModelForSequenceClassification.from_pretrained("me/end")
    trainer = made(folder, "twice", model)
    trainer.train()
    trainer.push_to_hub()
    remember(folder, "twice", trainer.model)


def again(folder):
    """What the card says is enough to get the same weights."""
    text = ModelCard.load("me/end").text
    (call,) = re.findall(r"^OTOTrainingArguments\(\n(?s:.*?)^\)", text, re.MULTILINE)
    settings = {k.arg: ast.literal_eval(k.value) for k in ast.parse(call).body[0].value.keywords}
    model = tf.AutoModelForSequenceClassification.from_pretrained("me/base")
    run = OTOTrainingArguments(str(folder / "again"), **settings, use_cpu=True, disable_tqdm=True)
    trainer = OTOTrainer(model, run, train_dataset=data())
    trainer.train()
    remember(folder, "again", trainer.model)


def ranks(folder):
    """Several processes, one of which pushes."""
    trainer = made(folder, "ranks", cls=Sharded, max_steps=16)
    trainer.train()
    assert (trainer.push_to_hub() is None) == (not trainer.is_world_process_zero())


if __name__ == "__main__":
    for scenario in sys.argv[2:]:
        globals()[scenario](Path(sys.argv[1]))
