"""OTOTrainer: one train() on a full model, a compact one in the end, and nothing lost on the way."""

import copy
import dataclasses
from types import SimpleNamespace

import accelerate
import numpy as np
import pytest
import torch
import transformers as tf
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from datasets import Dataset
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

import hf_oto
from hf_oto import OTOMixin, OTOSeq2SeqTrainer, OTOTrainer, OTOTrainingArguments, ranks, whole
from hf_oto.paper import PaperDHSPG
from hf_oto.zigs import OTOError

BERT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=60)


def bert(seed=0):
    tf.set_seed(seed)
    return tf.BertForSequenceClassification(tf.BertConfig(**BERT, num_labels=3))


def sentences(n=64):
    rng = np.random.default_rng(0)
    return Dataset.from_dict(
        {"input_ids": rng.integers(3, 60, (n, 8)).tolist(), "labels": rng.integers(0, 3, n).tolist()}
    )


def arguments(folder, cls=OTOTrainingArguments, **more):
    settings = dict(
        max_steps=40, per_device_train_batch_size=8, learning_rate=1e-3, logging_steps=10, save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    return cls(str(folder), **(settings | more))


def train(folder, model=None, cls=OTOTrainer, resume=None, data=None, args=None, **more):
    args = args or arguments(folder, **more)
    trainer = cls(model or bert(), args, train_dataset=data or sentences(), eval_dataset=sentences(16))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("trained"), target_group_sparsity=0.4)


# the main job -----------------------------------------------------------------------------


def digits():
    data = load_digits()
    images = [Image.fromarray((i * 15.9).astype(np.uint8)).resize((32, 32)) for i in data.images]
    pixels = np.stack([np.asarray(i, np.float32)[None].repeat(3, 0) / 127.5 - 1 for i in images])
    order = np.random.default_rng(0).permutation(len(pixels))
    rows = [{"pixel_values": torch.from_numpy(pixels[i]), "labels": int(data.target[i])} for i in order]
    return rows[:1400], rows[1400:]


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def test_real_run_stays_within_two_points_of_dense(tmp_path):
    rows, held_out = digits()
    config = tf.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic", num_labels=10
    )
    scores = {}
    for name, cls, args_cls in (
        ("dense", tf.Trainer, tf.TrainingArguments),
        ("oto", OTOTrainer, OTOTrainingArguments),
    ):
        tf.set_seed(0)
        args = arguments(
            tmp_path,
            args_cls,
            max_steps=220,
            per_device_train_batch_size=32,
            learning_rate=3e-3,
            remove_unused_columns=False,
        )
        trainer = cls(
            tf.ResNetForImageClassification(config),
            args,
            train_dataset=rows,
            eval_dataset=held_out,
            compute_metrics=accuracy,
        )
        trainer.train()
        scores[name] = trainer.evaluate()["eval_accuracy"]
    assert scores["dense"] > 0.95
    assert scores["oto"] > scores["dense"] - 0.02
    report = trainer.report
    assert report["group_sparsity"] == round(0.5 * trainer.partition.num_zigs) / trainer.partition.num_zigs
    assert report["after"]["params"] < 0.6 * report["before"]["params"]
    assert report["after"]["macs"] < 0.8 * report["before"]["macs"]
    assert report["max_output_difference"] < 1e-5


def test_after_train_everything_sees_the_compact_model(trained, tmp_path):
    model = trained.model
    assert isinstance(model, tf.BertForSequenceClassification)
    removed = trained.plan.removed(trained.partition)
    assert removed.sum() == round(0.4 * trained.partition.num_zigs)
    widths = [layer.intermediate.dense.out_features for layer in model.bert.encoder.layer]
    assert sum(widths) < 2 * 48
    assert trained.evaluate()["eval_loss"] > 0
    predicted = trained.predict(sentences(16)).predictions
    trained.save_model(str(tmp_path))
    again = OTOTrainer(
        tf.BertForSequenceClassification.from_pretrained(tmp_path), arguments(tmp_path / "again")
    ).predict(sentences(16))  # fmt: skip
    assert np.array_equal(predicted, again.predictions)


def test_plain_training_arguments_mean_the_defaults(tmp_path):
    trainer = train(tmp_path, args=arguments(tmp_path, tf.TrainingArguments))
    assert trainer.report["group_sparsity"] == pytest.approx(0.5, abs=1e-3)


def test_nothing_to_prune_is_the_stock_trainer(tmp_path):
    stock = tf.Trainer(bert(), arguments(tmp_path, tf.TrainingArguments), train_dataset=sentences())
    stock.train()
    ours = train(tmp_path, target_group_sparsity=0.0)
    expected = stock.model.state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in ours.model.state_dict().items())
    pruned = train(tmp_path, target_group_sparsity=0.2)
    assert any(t.shape != expected[n].shape for n, t in pruned.model.state_dict().items())


@pytest.mark.parametrize("step", [2, 14, 36])
def test_resume_is_bit_identical(tmp_path, step):
    """Before, inside and after the window; without the optimizer's state it is none (controls: test_resume.py)."""
    whole = train(tmp_path / "whole", save_strategy="steps", save_steps=step, lr_scheduler_type="cosine")
    checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
    again = train(tmp_path / "again", resume=str(checkpoint), lr_scheduler_type="cosine")
    assert whole.plan == again.plan
    expected = whole.model.state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in again.model.state_dict().items())
    if step == 14:
        (checkpoint / "optimizer.pt").unlink()
        with pytest.raises(OTOError, match=r"checkpoint-14 lacks optimizer.pt"):
            train(tmp_path / "other", resume=str(checkpoint), lr_scheduler_type="cosine")


def test_a_checkpoint_of_another_partition_is_refused(tmp_path):
    """As many ZIGs, but others: their zeros would be taken for these."""
    train(tmp_path / "a", save_strategy="steps", save_steps=20, protect=["layer.0"])
    checkpoint = str(tmp_path / "a" / "checkpoint-20")
    with pytest.raises(OTOError, match=r"saved with another partition.*same `protect`"):
        train(tmp_path / "b", resume=checkpoint, protect=["layer.1"])
    again = train(tmp_path / "c", resume=checkpoint, protect=["layer.0"])  # control
    assert again.report["group_sparsity"] == 0.5


def test_a_checkpoint_of_the_stock_trainer_is_refused(tmp_path):
    args = arguments(tmp_path, tf.TrainingArguments, max_steps=4, save_strategy="steps", save_steps=4)
    tf.Trainer(bert(), args, train_dataset=sentences()).train()
    with pytest.raises(OTOError, match="not DHSPG's"):
        train(tmp_path, resume=str(tmp_path / "checkpoint-4"))


def test_paper_mode_runs(tmp_path):
    trainer = train(tmp_path, pruning_mode="paper", optim="sgd", learning_rate=0.1)
    assert 0 <= trainer.report["group_sparsity"] <= 0.5
    again = OTOTrainer(bert(), trainer.args, train_dataset=sentences())
    assert type(again.create_optimizer()) is PaperDHSPG


def test_the_best_model_is_never_from_before_the_target(tmp_path):
    """The largest loss, that of the first evaluation, is the best one here."""
    trainer = train(
        tmp_path, save_strategy="steps", save_steps=5, eval_strategy="steps", eval_steps=5,
        load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    assert trainer.state.best_global_step >= 24
    assert trainer.report["group_sparsity"] == pytest.approx(0.5, abs=1e-3)


def test_seq2seq_generates_with_the_compact_model(tmp_path):
    tf.set_seed(0)
    config = tf.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=60, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    data = sentences(32).map(lambda e: {"labels": e["input_ids"][:4]})
    args = arguments(tmp_path, tf.Seq2SeqTrainingArguments, predict_with_generate=True, generation_max_length=6)
    trainer = OTOSeq2SeqTrainer(tf.T5ForConditionalGeneration(config), args, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert {axis.kind for axis in trainer.partition.axes} == {"heads", "units"}
    generated = trainer.predict(data.select(range(4))).predictions
    assert generated.shape[0] == 4


def test_model_init_trains_again_from_the_start(tmp_path):
    trainer = OTOTrainer(model_init=lambda: bert(), args=arguments(tmp_path), train_dataset=sentences())
    trainer.train()
    first = copy.deepcopy(trainer.plan)
    trainer.train()
    assert trainer.plan == first


# what users bring along -------------------------------------------------------------------


def test_a_search_over_targets(tmp_path):
    """`hyperparameter_search` sets the arguments of one trainer and trains it again from `model_init`."""
    trainer = OTOTrainer(args=arguments(tmp_path), model_init=lambda: bert(), train_dataset=sentences())
    for target in (0.2, 0.6):
        trainer.args.target_group_sparsity = target
        trainer.train()
        n = trainer.partition.num_zigs
        assert trainer.report["group_sparsity"] == round(target * n) / n


class Greedy(OTOTrainer):
    """Runs out of memory at batches of more than four, after half of the pruning window."""

    steps = 0

    def training_step(self, model, inputs, *args, **kwargs):
        self.steps += 1
        if len(inputs["input_ids"]) > 4 and self.steps > 14:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
        return super().training_step(model, inputs, *args, **kwargs)


def test_auto_find_batch_size(tmp_path):
    trainer = train(tmp_path, cls=Greedy, auto_find_batch_size=True)
    assert trainer.steps > 15 + 40 and trainer._train_batch_size <= 4
    assert trainer.report["group_sparsity"] == 0.5 and trainer.report["max_output_difference"] < 1e-5
    with pytest.raises(RuntimeError, match="out of memory"):  # control: without it there is no second try
        train(tmp_path, cls=Greedy)


# the newer name of the two; transformers 5.20 has the older one alone
FIELDS = {field.name for field in dataclasses.fields(tf.TrainingArguments)}
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in FIELDS else "gradient_checkpointing"


@pytest.mark.parametrize("settings", [dict(torch_compile_backend="eager"), {CHECKPOINTING: True}])
def test_the_same_with_compiled_and_checkpointed_models(tmp_path, settings, trained):
    """The same losses' gradients give the same zeros and the same weights."""
    plain, other = train(tmp_path, bert()), train(tmp_path, bert(), **settings)
    assert other.plan == plain.plan
    assert type(other.model).__name__ == "BertForSequenceClassification"
    for p, q in zip(plain.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)
    assert train(tmp_path, bert(), seed=1).plan != plain.plan  # control: other batches


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "rmsprop", "adagrad"])
def test_optim_keeps_its_meaning(tmp_path, optim):
    trainer = train(tmp_path, optim=optim, max_steps=20)
    assert trainer.report["group_sparsity"] == 0.5
    stock, _ = tf.Trainer.get_optimizer_cls_and_kwargs(trainer.args)
    again = OTOTrainer(bert(), trainer.args, train_dataset=sentences())
    assert type(again.create_optimizer().base) is stock


def test_own_optimizer_class_schedule_and_callbacks(tmp_path):
    steps = []

    class Counting(tf.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    class Mine(OTOMixin, tf.Trainer):
        def create_scheduler(self, num_training_steps, optimizer=None):
            self.lr_scheduler = torch.optim.lr_scheduler.StepLR(optimizer or self.optimizer, 10, 0.5)
            return self.lr_scheduler

    chosen = (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9})
    trainer = Mine(
        bert(), arguments(tmp_path), train_dataset=sentences(), callbacks=[Counting()], optimizer_cls_and_kwargs=chosen
    )
    made = trainer.create_optimizer()
    assert type(made.base) is torch.optim.SGD and made.defaults["momentum"] == 0.9
    trainer.train()
    assert len(steps) == 40
    assert trainer.report["group_sparsity"] == pytest.approx(0.5, abs=1e-3)


def test_an_optimizer_that_is_no_plain_one_is_refused(tmp_path):
    class Factory:  # as the Trainer takes them
        def __call__(self, model, lr):
            return {"lr": lr}

    trainer = OTOTrainer(
        bert(), arguments(tmp_path), train_dataset=sentences(), optimizer_cls_and_kwargs=(Factory, {"lr": 1e-3})
    )
    with pytest.raises(OTOError, match="dict is no torch optimizer"):
        trainer.train()


# bad input --------------------------------------------------------------------------------


def test_a_second_train_is_refused(trained):
    with pytest.raises(OTOError, match=r"has compacted its model.*OTOTrainer\(trainer.model"):
        trained.train()


@pytest.mark.parametrize(
    ("settings", "target"),
    [
        (dict(target_params=0.8), 0.8),
        (dict(target_macs=0.6), 0.6),
        (dict(target_per_axis='{"intermediate": 0.5}'), None),
    ],
)
def test_other_targets(tmp_path, settings, target):
    trainer = train(tmp_path, target_group_sparsity=None, min_keep=0.0, **settings)
    before, after = trainer.report["before"], trainer.report["after"]
    for what in ("params", "macs"):
        if f"target_{what}" in settings:
            smallest = max(vars(axis)[what] for axis in trainer.partition.axes if axis.kind == "units") / before[what]
            assert 0 <= target - after[what] / before[what] <= max(0.01, smallest)
    if target is None:
        kept = {axis.name: len(trainer.plan.kept.get(axis.name, range(axis.size))) for axis in trainer.partition.axes}
        assert [n for name, n in kept.items() if "intermediate" in name] == [24, 24]
        assert all(kept[axis.name] == axis.size for axis in trainer.partition.axes if "intermediate" not in axis.name)


def test_one_target_at_a_time(tmp_path):
    with pytest.raises(ValueError, match="target_group_sparsity and target_macs are both given"):
        arguments(tmp_path, target_group_sparsity=0.5, target_macs=0.5)
    assert arguments(tmp_path, target_group_sparsity=None, target_macs=0.5).target_macs == 0.5


def test_arguments_from_a_command_line(tmp_path):
    line = ["--output_dir", str(tmp_path), "--target_per_axis", '{"mlp": 0.5}', "--group_divisible", "8"]
    line += ["--pruning_window", "0.2", "0.5"]
    (args,) = tf.HfArgumentParser(OTOTrainingArguments).parse_args_into_dataclasses(line)
    assert (args.target_per_axis, args.group_divisible, args.target_group_sparsity) == ({"mlp": 0.5}, 8, None)
    assert args.pruning_window == [0.2, 0.5]


@pytest.mark.parametrize("target", [-0.1, 1.0, 7])
def test_target_outside_its_range(tmp_path, target):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
        arguments(tmp_path, target_group_sparsity=target)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(target_macs="0.5"), "target_macs is '0.5': '0.5' is no number"),
        (dict(target_per_axis=[0.5]), r"target_per_axis is \[0.5\]: it must be a dict"),
        (dict(pruning_window=0.5), "pruning_window is 0.5: it must be two fractions"),
        (dict(group_divisible=7.5), "group_divisible is 7.5: it must be a whole number"),
        (dict(pruning_mode="paper", target_macs=0.5), "target_macs is given: pruning_mode='paper' knows target_group"),
    ],
)
def test_arguments_of_other_types_say_what_they_must_be(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(target_group_sparsity=0.95), r"at most 0\.\d+"),
        (dict(max_steps=8), "fewer training steps than the pruning window"),
        (dict(protect=["no such layer"]), "matches no parameter"),
    ],
)
def test_settings_that_cannot_work_say_so_before_training(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, **settings)


def test_protected_layers_stay_whole(tmp_path):
    trainer = train(tmp_path, protect=[r"layer\.0\."])
    assert trainer.model.bert.encoder.layer[0].intermediate.dense.out_features == 48
    assert trainer.model.bert.encoder.layer[1].intermediate.dense.out_features < 48


class Unprunable(tf.PreTrainedModel):
    config_class = tf.PreTrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.head = nn.Linear(4, 2)
        self.post_init()

    def forward(self, x, labels=None):
        return {"loss": self.head(x).sum(), "logits": self.head(x)}


def test_a_model_without_zigs_shows_its_pins(tmp_path):
    data = [{"x": torch.randn(4), "labels": 0}] * 16
    trainer = OTOTrainer(Unprunable(tf.PreTrainedConfig()), arguments(tmp_path), train_dataset=data)
    with pytest.raises(OTOError, match=r"(?s)no prunable ZIG.*part of the model's output.*head.weight\[0\]"):
        trainer.train()


def test_a_batch_the_model_cannot_take(tmp_path):
    data = Dataset.from_dict({"input_ids": [[99999] * 8] * 16, "labels": [0] * 16})
    with pytest.raises(OTOError, match=r"compute_loss of OTOTrainer fails on its first batch: IndexError"):
        train(tmp_path, data=data)
    wrong = [{"pixel_values": torch.zeros(3, 4, 4)}] * 16
    trainer = OTOTrainer(bert(), arguments(tmp_path, remove_unused_columns=False), train_dataset=wrong)
    with pytest.raises(OTOError, match=r"fails on its first batch: ValueError: You must specify exactly one"):
        trainer.train()


def test_sharded_training_is_refused(tmp_path, monkeypatch):
    args = arguments(tmp_path)
    args.deepspeed, args.hf_deepspeed_config = True, SimpleNamespace(config={"zero_optimization": {"stage": 0}})
    with pytest.raises(OTOError, match=r"ZeRO stage 0 is not supported.*DDP"):
        OTOTrainer(bert(), args)
    args = arguments(tmp_path)
    args.fsdp, args.fsdp_config = True, {"version": 1}
    with pytest.raises(OTOError, match=r"FSDP1 is not supported.*FSDP2.*DDP"):
        OTOTrainer(bert(), args)
    with monkeypatch.context() as patch:  # what `accelerate launch` asked for, the arguments don't know of
        args = arguments(tmp_path)
        patch.setattr(accelerate.Accelerator, "distributed_type", DistributedType.MEGATRON_LM)
        with pytest.raises(OTOError, match=r"Megatron-LM is not supported.*FSDP2"):
            OTOTrainer(bert(), args)
        patch.setattr(accelerate.Accelerator, "distributed_type", DistributedType.FSDP)
        plugin = FullyShardedDataParallelPlugin(fsdp_version=1)
        patch.setattr(accelerate.state.AcceleratorState, "fsdp_plugin", plugin, raising=False)
        with pytest.raises(OTOError, match=r"FSDP1 is not supported.*FSDP2.*DDP"):
            OTOTrainer(bert(), args)
    with monkeypatch.context() as patch:
        patch.setattr(ranks, "DTensor", nn.Parameter)  # as if from_pretrained had sharded the model
        with pytest.raises(OTOError, match=r"has sharded this model already.*fsdp=True"):
            OTOTrainer(bert(), arguments(tmp_path))
    monkeypatch.setattr(tf.Trainer, "get_tp_size", lambda self: 2)
    with pytest.raises(OTOError, match=r"tensor parallel.*FSDP2 or DDP"):
        OTOTrainer(bert(), arguments(tmp_path))


@pytest.mark.parametrize("half", ["cut", "invariance"])
def test_a_failed_certificate_saves_the_full_model_first(tmp_path, monkeypatch, half):
    right = whole.certify
    monkeypatch.setattr(whole, "certify", lambda *given: right(*given)._replace(**{half: 0.5}))
    trainer = OTOTrainer(bert(), arguments(tmp_path, shrink=False), train_dataset=sentences())
    with pytest.raises(OTOError, match=r"certificate failed.*5.0e-01.*saved in .*trained"):
        trainer.train()
    saved = tf.BertForSequenceClassification.from_pretrained(tmp_path / "trained")
    assert saved.bert.encoder.layer[0].intermediate.dense.out_features == 48
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), trainer.model.parameters(), strict=True))
    zeros = hf_oto.PruningPlan.from_zeros(saved, trainer.partition)
    assert zeros.removed(trainer.partition).any()  # what was trained is there
