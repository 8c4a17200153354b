"""Summarization in the manner of Transformers' run_summarization.py: generates while it evaluates and predicts."""

import logging
import os
import sys
from dataclasses import dataclass, field

import numpy as np
from datasets import load_dataset
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

# isort: split
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments  # the import to change

logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "Path to a pretrained model."})


@dataclass
class DataTrainingArguments:
    train_file: str | None = field(default=None, metadata={"help": "A csv file with the training data."})
    validation_file: str | None = field(default=None, metadata={"help": "A csv file with the validation data."})
    test_file: str | None = field(default=None, metadata={"help": "A csv file with the test data."})
    max_source_length: int = field(default=16, metadata={"help": "Longer texts are truncated."})
    max_target_length: int = field(default=6, metadata={"help": "Longer summaries are truncated."})
    num_beams: int | None = field(default=2, metadata={"help": "Beams of the evaluation."})
    stop_after: int | None = field(default=None, metadata={"help": "Stop in the middle, as a killed job does."})


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            sys.exit(0)


def main():
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, Seq2SeqTrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    last_checkpoint = None
    if os.path.isdir(training_args.output_dir) and training_args.do_train:
        last_checkpoint = get_last_checkpoint(training_args.output_dir)
    if last_checkpoint is not None:
        print(f"resuming from {last_checkpoint}")
    set_seed(training_args.seed)

    files = {"train": data_args.train_file, "validation": data_args.validation_file, "test": data_args.test_file}
    raw_datasets = load_dataset("csv", data_files=files)
    config = AutoConfig.from_pretrained(model_args.model_name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    model = AutoModelForSeq2SeqLM.from_pretrained(model_args.model_name_or_path, config=config)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))

    def preprocess_function(examples):
        model_inputs = tokenizer(examples["text"], max_length=data_args.max_source_length, truncation=True)
        labels = tokenizer(text_target=examples["summary"], max_length=data_args.max_target_length, truncation=True)
        model_inputs["labels"] = labels["input_ids"]
        return model_inputs

    columns = raw_datasets["train"].column_names
    datasets = {
        split: data.map(preprocess_function, batched=True, remove_columns=columns)
        for split, data in raw_datasets.items()
    }

    def compute_metrics(eval_preds):
        preds, _ = eval_preds
        preds = np.where(preds != -100, preds, tokenizer.pad_token_id)
        return {"gen_len": float(np.mean([np.count_nonzero(pred != tokenizer.pad_token_id) for pred in preds]))}

    training_args.generation_num_beams = data_args.num_beams or training_args.generation_num_beams
    trainer = Seq2SeqTrainer(
        model=model,
        args=training_args,
        train_dataset=datasets["train"],
        eval_dataset=datasets["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=-100),
        compute_metrics=compute_metrics if training_args.predict_with_generate else None,
        callbacks=[Stop(data_args.stop_after)] if data_args.stop_after else None,
    )
    if training_args.do_eval:
        trainer.log_metrics("before", trainer.evaluate(metric_key_prefix="before"))
    if training_args.do_train:
        train_result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint or last_checkpoint)
        trainer.save_model()
        metrics = train_result.metrics
        metrics["train_samples"] = len(datasets["train"])
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()
    if training_args.do_eval:
        metrics = trainer.evaluate(metric_key_prefix="eval")
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if training_args.do_predict:
        results = trainer.predict(datasets["test"], metric_key_prefix="predict")
        trainer.log_metrics("predict", results.metrics)
        trainer.save_metrics("predict", results.metrics)
        if trainer.is_world_process_zero() and training_args.predict_with_generate:
            tokens = np.where(results.predictions != -100, results.predictions, tokenizer.pad_token_id)
            lines = tokenizer.batch_decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=True)
            with open(f"{training_args.output_dir}/predictions.txt", "w") as writer:
                writer.write("\n".join(line.strip() for line in lines) + "\n")

    kwargs = {"finetuned_from": model_args.model_name_or_path, "tasks": "summarization", "dataset": "local files"}
    if training_args.push_to_hub:
        trainer.push_to_hub(**kwargs)
    else:
        trainer.create_model_card(**kwargs)


if __name__ == "__main__":
    main()
