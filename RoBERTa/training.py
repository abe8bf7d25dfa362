"""One GLUE run: training, evaluation, the GLUE server's files and the record."""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import EvalPrediction, PreTrainedTokenizerBase, TrainingArguments

from control_experiments.errors import UserError
from control_experiments.outcomes import write_outcomes
from control_experiments.paths import public_path
from control_experiments.training.checkpoints import check_adapter_files, discard
from control_experiments.training.checksums import local_fingerprint
from control_experiments.training.device import seed_everything
from control_experiments.training.metering import MemoryMeter
from control_experiments.training.methods import count_unquantized, describe_adapter, describe_model, load_adapter, set_memory
from control_experiments.training.setup import Run, start
from control_experiments.training.sharding import shard_frozen, shares_weights
from control_experiments.training.trainer import ExperimentTrainer, training_arguments
from RoBERTa.demo_task import demo_checksum, make_demo
from RoBERTa.encoder import add_adapter, check_length, collator, load_model, load_tokenizer, predict_mean, save, tokenize
from RoBERTa.finetune import Options
from RoBERTa.glue import HUB_ID, TASKS, Task, get_task, hold_out, load_task, write_predictions

logger = logging.getLogger("finetune")
LESS_MEMORY = "--memory lean, a smaller --batch_size, --padding longest, --precision bf16, a smaller --max_length"
#: Folder of a run for the GLUE server's files.
PREDICTIONS = "predictions"
#: How the card of an adapter says that it is loaded.
LOAD = """
import peft_control
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoConfig, AutoTokenizer

folder = "results/roberta/RUN/adapter"  # where this file is
labels = AutoConfig.from_pretrained(folder).id2label
model = AutoPeftModelForSequenceClassification.from_pretrained(folder, id2label=labels)
tokenizer = AutoTokenizer.from_pretrained(folder)
"""


def finetune(options: Options, argv: Sequence[str] | None = None) -> None:
    """Train as the options say and write the run's record, or add predictions to a finished run. `argv` stands in the record's
    command, by default the process's own."""
    with start(options, "RoBERTa.finetune", argv, less_memory=LESS_MEMORY) as run:
        files = get_task(options.task).server_files.values()
        if not run.folder.finished:
            train(options, run)
        elif options.predict and not all((run.folder.path / PREDICTIONS / name).is_file() for name in files):
            predict_finished(options, run)
        else:
            print(f"{run.folder.path} is finished: skipped (delete the folder to run it again)")


def train(options: Options, run: Run) -> None:
    """Load, train, evaluate, save the adapter and write the record, all in the run's folder."""
    folder, device, task = run.folder, run.device, get_task(options.task)
    shared = shares_weights(options.shard)
    settled = {"precision": run.precision, "optimizer": "AdamW", **({"shard": options.shard} if shared else {})}
    record = run.begin_record(domain=options.domain, task=options.task, **settled)

    checksum = local_fingerprint(options.contents("data")) if options.data else None
    which = (options.task, options.data, checksum, options.predict, options.validation_share)
    splits, tokenizer, encoded = read(*which, options.model, options.max_length)
    seed_everything(options.seed)
    memory = MemoryMeter(device)
    model = load_model(options.model, task, options.quantization, device, run.precision)
    check_length(options, model)
    if task.regression:
        predict_mean(model, splits["train"]["label"])
    arguments = trainer_arguments(options, run)
    if not shared:
        model.to(device)
        memory.after_load()
    base = describe_model(options.model, model, count_unquantized(model))
    model = add_adapter(model, options)
    set_memory(model, options.memory, options.cuda_graphs, chunk_tokens=options.chunk_tokens, offload=options.offload)
    if shared:  # asking for the device starts the process group
        shard_frozen(model, arguments.device, memory)
    adapter = describe_adapter(model)
    dev = {suffix: encoded[split] for suffix, split in zip(task.evaluations, task.dev_splits, strict=True)}
    evaluated: deque[EvalPrediction] = deque(maxlen=len(dev))

    def score(result: EvalPrediction) -> dict[str, float]:
        evaluated.append(result)
        return task.metrics(result.predictions, result.label_ids)

    with folder.logging_from("finetune", "control_experiments", "peft_control"):
        sets = {"train_dataset": encoded["train"], "eval_dataset": dev if len(dev) > 1 else dev[task.evaluations[0]]}
        words = {"data_collator": collator(options, tokenizer), "processing_class": tokenizer}
        trainer = ExperimentTrainer(model, arguments, **sets, **words, compute_metrics=score, memory=memory)
        logger.info("%s", options.identity())
        if trainer.is_world_process_zero():
            counts = f"{adapter['trainable_parameters']:,} of {base['total_parameters']:,} parameters trained"
            rows = f"{len(encoded['train'])} training rows"
            print(f"{options.method} on {options.task}: {rows}, {counts}, {run.described}")
        trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
        history, metrics = summarise_history(trainer.state.log_history, task)
        if options.predict:
            predict_tests(trainer, encoded, task, folder.path / PREDICTIONS)

    if trainer.is_world_process_zero():
        if len(evaluated) == len(dev):  # else it was resumed after its last evaluation
            keep_outcomes(folder.path, task, dev, evaluated)
        run.finish(
            record,
            partial(save, model, tokenizer),
            LOAD,
            model=base,
            data=data_description(options, splits),
            adapter=adapter,
            metrics=metrics,
            memory=memory.summary(),
            time=run.time(trainer.throughput),
            history=history,
        )
        print(f"last {_figures(metrics['last'])}; best {_figures(metrics['best'])}; record in {folder.record}")


@lru_cache(maxsize=2 * len(TASKS))  # the runs of a study read and tokenize a task once, and its search
def read(
    task: str, data: str | None, _checksum: str | None, tests: bool, share: float | None, model: str, max_length: int
) -> tuple[DatasetDict, PreTrainedTokenizerBase, DatasetDict]:
    """A task's splits, of which a `share` of the training rows may stand in for the dev sets, a tokenizer, and their tokens."""
    splits = load_task(task, data, tests=tests)
    if share is not None:
        splits = hold_out(splits, get_task(task), share)
    tokenizer = load_tokenizer(model)
    return splits, tokenizer, tokenize(splits, tokenizer, max_length)


def trainer_arguments(options: Options, run: Run) -> TrainingArguments:
    """The options in the Trainer's terms."""
    grouped = options.padding == "longest" and not options.random_order
    evaluation = "steps" if options.eval_steps else "epoch"
    return training_arguments(
        run,
        eval_strategy=evaluation, eval_steps=options.eval_steps or None,
        logging_strategy=evaluation, logging_steps=options.eval_steps or 500,
        save_strategy="steps" if options.save_steps else "epoch", save_steps=options.save_steps or 500, save_total_limit=2,
        warmup_steps=options.warmup_ratio,  # below 1 it is a share of all steps
        train_sampling_strategy="group_by_length" if grouped else "random",
        per_device_eval_batch_size=options.eval_batch_size, dataloader_pin_memory=run.device.type == "cuda",
    )  # fmt: skip


def summarise_history(log_history: list[dict], task: Task) -> tuple[list[dict], dict]:
    """The Trainer's log -> one entry per evaluation, and the best and the last of them.

    Each entry has step, epoch, train_loss (the mean since the entry before) and the dev metrics; with two dev sets
    each metric carries its set's name, and `score` is the mean over both.
    """
    by_step: dict[int, dict] = {}
    for entry in log_history:
        row = by_step.setdefault(entry["step"], {"step": entry["step"], "epoch": entry["epoch"]})
        if "loss" in entry:
            row["train_loss"] = entry["loss"]
        for name, value in entry.items():
            if name.startswith("eval_") and not name.endswith(("runtime", "per_second", "preparation_time")):
                row[name.removeprefix("eval_")] = value
    history = []
    for row in by_step.values():
        scores = [row.get(f"{suffix}_score" if suffix else "score") for suffix in task.evaluations]
        if None not in scores:
            history.append({**row, "score": float(np.mean(scores))})
    best = max(history, key=lambda row: row["score"], default={})
    return history, {"best": best, "last": history[-1] if history else {}}


def keep_outcomes(folder: Path, task: Task, dev: dict[str, Dataset], evaluated: Iterable[EvalPrediction]) -> None:
    """Write each dev example's outcome of the last evaluation into the run's folder, by the row of its dev file."""
    results = list(evaluated)
    rows = np.concatenate([rows["row"] for rows in dev.values()])
    groups = np.repeat([*dev], [len(rows) for rows in dev.values()])
    predictions = np.concatenate([task.predictions(result.predictions) for result in results])
    labels = np.concatenate([result.label_ids for result in results])
    answers = {"prediction": predictions, "label": labels, "metric": task.metric}
    if task.metric == "accuracy":
        answers = {"correct": predictions == labels}
    write_outcomes(folder, rows, **answers, group=groups)


def predict_tests(trainer: ExperimentTrainer, encoded: DatasetDict, task: Task, folder: Path) -> None:
    """Write the server's file for each test set, rows in their original order."""
    for split, file in task.server_files.items():
        # without the hidden labels, which no loss can be computed from
        outputs = trainer.predict(encoded[split].remove_columns("label")).predictions
        ordered = np.empty_like(outputs)
        ordered[encoded[split]["row"]] = outputs
        if trainer.is_world_process_zero():
            write_predictions(folder / file, task, ordered)


def predict_finished(options: Options, run: Run) -> None:
    """Write the server's files with the adapter of a finished run. Raises UserError: its adapter is not there,
    or does not fit the model."""
    folder, task = run.folder, get_task(options.task)
    if not (folder.adapter / "adapter_config.json").is_file():
        raise UserError(
            f"{folder.path} is finished but holds no adapter to --predict with: train again with another --output_dir"
        )
    check_adapter_files(folder.adapter)
    splits, tokenizer = load_task(options.task, options.data, tests=True), load_tokenizer(options.model)
    model = load_model(options.model, task, options.quantization, run.device, run.precision)
    model = load_adapter(model, folder.adapter, options.model)
    tests = DatasetDict({split: splits[split] for split in task.server_files})
    encoded = tokenize(tests, tokenizer, options.max_length)
    words = {"data_collator": collator(options, tokenizer), "processing_class": tokenizer}
    words |= {"eval_dataset": next(iter(encoded.values())), "memory": MemoryMeter(run.device)}
    trainer = ExperimentTrainer(model.to(run.device), trainer_arguments(options, run), **words)
    predict_tests(trainer, encoded, task, folder.path / PREDICTIONS)
    if trainer.is_world_process_zero():
        discard(folder.checkpoints)
        print(f"predictions of the finished run in {folder.path / PREDICTIONS}")


def data_description(options: Options, splits: DatasetDict) -> dict:
    """The record's `data`: where it came from, which version, how many rows."""
    sizes = {name: len(split) for name, split in splits.items()}
    if options.data is not None:
        root = options.contents("data")
        return {"id": public_path(root), "sha256": local_fingerprint(root), "sizes": sizes}
    if options.task == "demo":
        return {"id": "pydoc_data.topics (demo_task.py)", "sha256": demo_checksum(make_demo()), "sizes": sizes}
    sources = " ".join(splits["train"].info.download_checksums or {})
    found = re.search(r"@([0-9a-f]{40})/", sources)
    revision = found.group(1) if found else None
    return {"id": f"{HUB_ID}/{options.task}", "revision": revision, "sizes": sizes}


def _figures(row: dict) -> str:
    shown = [name for name in row if name not in ("step", "epoch") and not name.endswith("loss")]
    return ", ".join(f"{name} {row[name]:.4f}" for name in shown)
