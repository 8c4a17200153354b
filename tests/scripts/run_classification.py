"""Text classification in the manner of Transformers' run_glue.py: arguments, local files, evaluate, predict, save."""

import logging
import os
import sys
from dataclasses import dataclass, field

import numpy as np
import transformers
from datasets import load_dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    TrainerCallback,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

# isort: split
from transformers import Trainer, TrainingArguments  # the import to change

logger = logging.getLogger(__name__)


@dataclass
class DataTrainingArguments:
    train_file: str | None = field(default=None, metadata={"help": "A json file with the training data."})
    validation_file: str | None = field(default=None, metadata={"help": "A json file with the validation data."})
    test_file: str | None = field(default=None, metadata={"help": "A json file with the test data."})
    max_seq_length: int = field(default=16, metadata={"help": "Longer sequences are truncated, shorter ones padded."})
    pad_to_max_length: bool = field(default=True, metadata={"help": "Pad all samples to `max_seq_length`."})
    stop_after: int | None = field(default=None, metadata={"help": "Stop in the middle, as a killed job does."})


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "Path to a pretrained model."})


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            sys.exit(0)


def main():
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    logging.basicConfig(handlers=[logging.StreamHandler(sys.stderr)], level=training_args.get_process_log_level())
    transformers.utils.logging.set_verbosity(training_args.get_process_log_level())
    logger.info(f"Training/evaluation parameters {training_args}")

    last_checkpoint = None
    if os.path.isdir(training_args.output_dir) and training_args.do_train:
        last_checkpoint = get_last_checkpoint(training_args.output_dir)
        if last_checkpoint is not None:
            print(f"resuming from {last_checkpoint}")
    set_seed(training_args.seed)

    files = {"train": data_args.train_file, "validation": data_args.validation_file, "test": data_args.test_file}
    raw_datasets = load_dataset("json", data_files=files)
    label_list = sorted(raw_datasets["train"].unique("label"))

    config = AutoConfig.from_pretrained(model_args.model_name_or_path, num_labels=len(label_list))
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    model = AutoModelForSequenceClassification.from_pretrained(model_args.model_name_or_path, config=config)
    model.config.label2id = {str(label): i for i, label in enumerate(label_list)}
    model.config.id2label = {i: str(label) for i, label in enumerate(label_list)}
    padding = "max_length" if data_args.pad_to_max_length else False

    def preprocess_function(examples):
        return tokenizer(examples["sentence"], padding=padding, max_length=data_args.max_seq_length, truncation=True)

    with training_args.main_process_first(desc="dataset map pre-processing"):
        raw_datasets = raw_datasets.map(preprocess_function, batched=True)

    def compute_metrics(p: EvalPrediction):
        preds = p.predictions[0] if isinstance(p.predictions, tuple) else p.predictions
        return {"accuracy": float((np.argmax(preds, axis=1) == p.label_ids).mean())}

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=raw_datasets["train"] if training_args.do_train else None,
        eval_dataset=raw_datasets["validation"] if training_args.do_eval else None,
        compute_metrics=compute_metrics,
        processing_class=tokenizer,
        data_collator=default_data_collator if data_args.pad_to_max_length else DataCollatorWithPadding(tokenizer),
        callbacks=[Stop(data_args.stop_after)] if data_args.stop_after else None,
    )
    if training_args.do_eval:
        metrics = trainer.evaluate(metric_key_prefix="before")
        trainer.log_metrics("before", metrics)
        trainer.save_metrics("before", metrics)
    if training_args.do_train:
        checkpoint = training_args.resume_from_checkpoint or last_checkpoint
        train_result = trainer.train(resume_from_checkpoint=checkpoint)
        metrics = train_result.metrics
        metrics["train_samples"] = len(raw_datasets["train"])
        trainer.save_model()
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()
    if training_args.do_eval:
        metrics = trainer.evaluate(eval_dataset=raw_datasets["validation"])
        metrics["eval_samples"] = len(raw_datasets["validation"])
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if training_args.do_predict:
        predict_dataset = raw_datasets["test"].remove_columns("label")
        predictions = np.argmax(trainer.predict(predict_dataset, metric_key_prefix="predict").predictions, axis=1)
        with open(f"{training_args.output_dir}/predictions.txt", "w") as writer:
            for index, item in enumerate(predictions):
                writer.write(f"{index}\t{label_list[item]}\n")

    kwargs = {"finetuned_from": model_args.model_name_or_path, "tasks": "text-classification"}
    kwargs |= {"language": "en", "dataset_tags": "local", "dataset": "local files"}
    if training_args.push_to_hub:
        trainer.push_to_hub(**kwargs)
    else:
        trainer.create_model_card(**kwargs)


if __name__ == "__main__":
    main()
