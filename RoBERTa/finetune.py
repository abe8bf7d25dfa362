"""Fine-tune an encoder on a GLUE task with control, LoRA or DoRA, and write a run record.

    python -m RoBERTa.finetune --method control --task cola                      the paper's recipe, GPU 0, from the hub
    python -m RoBERTa.finetune --method lora --task demo --model FOLDER --device cpu --epochs 2 --lr 1e-3
    torchrun --nproc_per_node 2 -m RoBERTa.finetune --method control --task mnli     each step's rows are shared out
    torchrun --nproc_per_node 2 -m RoBERTa.finetune --method control --task mnli --shard fsdp2        the frozen weights too

What the options trade: `--padding longest` (default) computes only on real tokens and gives the same results as
`max_length`, which is there to reproduce the authors' timing. `--precision` defaults to bf16 where the GPU has it
(else fp16, with float32 trained parameters and a loss scaler). `--eval_steps 0` evaluates once an epoch; the paper's 50
looks at the dev set more often, so its best-of-all is more optimistic. See RoBERTa/README.md.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from transformers.hf_argparser import HfArg

from control_experiments.errors import UserError, run_main
from control_experiments.paths import RESULTS, public_path
from control_experiments.record import RunRecord
from control_experiments.training.arguments import check_numbers, parse_arguments
from control_experiments.training.checksums import local_fingerprint
from control_experiments.training.options import (
    AdapterOptions,
    BaseOptions,
    MemoryOptions,
    RunOptions,
    TrainerOptions,
)
from RoBERTa.glue import HUB_ID, TASKS, Task, get_task, load_task, write_predictions

if TYPE_CHECKING:
    import datasets
    from transformers import TrainingArguments

    from control_experiments.training.setup import Run
    from control_experiments.training.trainer import ExperimentTrainer

logger = logging.getLogger("finetune")
LOGGERS = ("finetune", "control_experiments")
LESS_MEMORY = (
    "--memory lean, a smaller --batch_size, --padding longest, --precision bf16, a smaller --max_length"
)
#: Folder of a run for the GLUE server's files.
PREDICTIONS = "predictions"


# -- options ------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Options(RunOptions, AdapterOptions, MemoryOptions, BaseOptions, TrainerOptions):
    """Defaults are the paper's recipe for RoBERTa-base (the authors' RoBERTa README)."""

    task: str = HfArg(help=f"One of {', '.join(TASKS)}.")
    model: str = HfArg(default="roberta-base", help="Hub id or folder of an encoder.")
    data: str | None = HfArg(
        default=None, help="Folder with classic GLUE tsv folders or save_to_disk data; without it, the hub."
    )
    epochs: float = HfArg(default=80, help="Passes over the training set.")
    weight_decay: float = HfArg(default=0.1, help="AdamW's, on every trained parameter, biases too.")
    warmup_ratio: float = HfArg(default=0.06, help="Share of the steps in which the rate rises.")
    eval_batch_size: int = HfArg(default=128, help="Rows per step when evaluating; no effect on results.")
    save_steps: int = HfArg(default=0, help="Checkpoint every so many steps; 0: after each epoch.")
    max_length: int = HfArg(default=128, help="Longer inputs are cut to this many tokens.")
    padding: Literal["longest", "max_length"] = HfArg(
        default="longest",
        help="longest: rows of like length together, padded to their longest; max_length: the authors'.",
    )
    random_order: bool = HfArg(
        default=False,
        help="Do not bring rows of like length together: more padding, but batches whose lengths say nothing about "
        "their labels.",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = HfArg(
        default="auto", help="Autocast type; auto: bf16 or else fp16 on a GPU, fp32 on a CPU."
    )
    predict: bool = HfArg(default=False, help="Write the GLUE server's files for the test sets.")

    methods: ClassVar = ("control", "lora", "dora", "double control", "control+lora", "control+dora")
    neutral: ClassVar = ("predict", "save_steps", "eval_batch_size")

    def check(self) -> None:
        super().check()
        check_numbers(self, "eval_batch_size", "max_length", at_least=1)
        check_numbers(self, "save_steps", at_least=0)
        check_numbers(self, "warmup_ratio", at_least=0, below=1)
        if self.predict and not get_task(self.task).test_splits:
            raise UserError(f"task {self.task} has no test set to --predict")
        get_task(self.task)

    @property
    def domain(self) -> str:
        """Which folder of results the run belongs to."""
        return "roberta" if self.quantization == "none" else "qcontrol"

    @property
    def folder(self) -> Path:
        if self.output_dir is not None:
            return Path(self.output_dir)
        method = self.method.replace(" ", "_")
        if self.quantization != "none":
            method += f"_{self.quantization}"
        return RESULTS / self.domain / f"{Path(self.model).name}_{self.task}_{method}_seed{self.seed}"

    def contents(self, name: str) -> Path:
        """The part of `--data` that holds the task; `--model` as it is."""
        place = super().contents(name)
        parts = [place / self.task, place / TASKS[self.task].folder] if name == "data" else []
        return next((part for part in parts if part.is_dir()), place)


# -- training -----------------------------------------------------------------------------------------------


def train(options: Options, run: Run) -> RunRecord:
    """Load, train, evaluate, save the adapter and write the record, all in the run's folder."""
    from control_experiments.training.checkpoints import discard, whole_folder
    from control_experiments.training.device import seed_everything
    from control_experiments.training.metering import MemoryMeter
    from control_experiments.training.methods import describe_adapter, describe_model, set_memory
    from control_experiments.training.sharding import shard_frozen, shares_weights
    from control_experiments.training.trainer import ExperimentTrainer
    from RoBERTa.encoder import add_adapter, check_length, collator, load_tokenizer_and_model, tokenize

    folder, device, task = run.folder, run.device, get_task(options.task)
    shared = shares_weights(options.shard)
    settled = {
        "precision": run.precision,
        "optimizer": "AdamW",
        **({"shard": options.shard} if shared else {}),
    }
    record = run.begin_record(domain=options.domain, task=options.task, **settled)

    splits = load_task(options.task, options.data, tests=options.predict)
    seed_everything(options.seed)
    memory = MemoryMeter(device)
    tokenizer, model = load_tokenizer_and_model(
        options.model, task, options.quantization, device, run.precision
    )
    check_length(options, model)
    arguments = trainer_arguments(options, run)
    if not shared:
        model.to(device)
        memory.after_load()
    base = describe_model(options.model, model, model.num_parameters())
    model = add_adapter(model, options)
    set_memory(
        model, options.memory, options.cuda_graphs, chunk_tokens=options.chunk_tokens, offload=options.offload
    )
    if shared:  # asking for the device starts the process group
        shard_frozen(model, arguments.device, memory)
    adapter = describe_adapter(model)
    encoded = tokenize(splits, tokenizer, options.max_length)
    dev = {suffix: encoded[split] for suffix, split in zip(task.evaluations, task.dev_splits, strict=True)}

    with folder.logging_from(*LOGGERS):
        trainer = ExperimentTrainer(
            model=model,
            args=arguments,
            train_dataset=encoded["train"],
            eval_dataset=dev if len(dev) > 1 else next(iter(dev.values())),
            data_collator=collator(options, tokenizer),
            processing_class=tokenizer,
            compute_metrics=lambda result: task.metrics(result.predictions, result.label_ids),
            memory=memory,
        )
        logger.info("%s", options.identity())
        if trainer.is_world_process_zero():
            print(
                f"{options.method} on {options.task}: {len(encoded['train'])} training rows, "
                f"{adapter['trainable_parameters']:,} of {base['total_parameters']:,} parameters trained, "
                f"{run.described}"
            )
        trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
        history, metrics = summarise_history(trainer.state.log_history, task)
        if options.predict:
            predict_tests(trainer, encoded, task, folder.path / PREDICTIONS)

    if trainer.is_world_process_zero():
        with whole_folder(folder.adapter, sealed=False) as place:
            model.save_pretrained(place)
        record.finish(
            folder.record,
            model=base,
            data=data_description(options, splits),
            adapter=adapter,
            metrics=metrics,
            memory=memory.summary(),
            time=run.time(trainer.throughput),
            history=history,
        )
        discard(folder.checkpoints)
        print(
            f"last {_figures(metrics['last'])}; best {_figures(metrics['best'])}; record in {folder.record}"
        )
    return record


def trainer_arguments(options: Options, run: Run) -> TrainingArguments:
    """The options in the Trainer's terms."""
    from control_experiments.training.trainer import training_arguments

    grouped = options.padding == "longest" and not options.random_order
    evaluation = "steps" if options.eval_steps else "epoch"
    return training_arguments(
        options,
        run.folder,
        run.device,
        run.precision,
        per_device_eval_batch_size=options.eval_batch_size,
        warmup_steps=options.warmup_ratio,  # below 1 it is a share of all steps
        train_sampling_strategy="group_by_length" if grouped else "random",
        eval_strategy=evaluation,
        eval_steps=options.eval_steps or None,
        logging_strategy=evaluation,
        logging_steps=options.eval_steps or 500,
        save_strategy="steps" if options.save_steps else "epoch",
        save_steps=options.save_steps or 500,
        save_total_limit=2,
        dataloader_pin_memory=run.device.type == "cuda",
    )


# -- evaluation ---------------------------------------------------------------------------------------------


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
            name = name.removeprefix("eval_")
            if f"eval_{name}" in entry and not name.endswith(("runtime", "per_second", "preparation_time")):
                row[name] = value
    history = []
    for row in by_step.values():
        scores = [row.get(f"{suffix}_score" if suffix else "score") for suffix in task.evaluations]
        if None not in scores:
            history.append({**row, "score": float(np.mean(scores))})
    if not history:
        return [], {"best": {}, "last": {}}
    best = max(history, key=lambda row: row["score"])
    return history, {"best": best, "last": history[-1]}


def predict_tests(
    trainer: ExperimentTrainer, encoded: datasets.DatasetDict, task: Task, folder: Path
) -> None:
    """Write the server's file for each test set, rows in their original order."""
    for split, file in task.server_files.items():
        # without the hidden labels, which no loss can be computed from
        outputs = trainer.predict(encoded[split].remove_columns("label")).predictions
        ordered = np.empty_like(outputs)
        ordered[encoded[split]["row"]] = outputs
        if trainer.is_world_process_zero():
            write_predictions(folder / file, task, ordered)


def predict_finished(options: Options, run: Run) -> None:
    """Write the server's files with the adapter of a finished run.

    Raises:
        UserError: its adapter is not there, or does not fit the model.
    """
    from datasets import DatasetDict

    from control_experiments.training.checkpoints import check_adapter_files, discard
    from control_experiments.training.metering import MemoryMeter
    from control_experiments.training.methods import load_adapter
    from control_experiments.training.trainer import ExperimentTrainer
    from RoBERTa.encoder import collator, load_tokenizer_and_model, tokenize

    folder, task = run.folder, get_task(options.task)
    if not (folder.adapter / "adapter_config.json").is_file():
        raise UserError(
            f"{folder.path} is finished but holds no adapter to --predict with: train again with another --output_dir"
        )
    check_adapter_files(folder.adapter)
    splits = load_task(options.task, options.data, tests=True)
    tokenizer, model = load_tokenizer_and_model(
        options.model, task, options.quantization, run.device, run.precision
    )
    model = load_adapter(model, folder.adapter, options.model)
    tests = DatasetDict({split: splits[split] for split in task.test_splits})
    encoded = tokenize(tests, tokenizer, options.max_length)
    trainer = ExperimentTrainer(
        model=model.to(run.device),
        args=trainer_arguments(options, run),
        eval_dataset=encoded[task.test_splits[0]],
        data_collator=collator(options, tokenizer),
        processing_class=tokenizer,
        memory=MemoryMeter(run.device),
    )
    predict_tests(trainer, encoded, task, folder.path / PREDICTIONS)
    if trainer.is_world_process_zero():
        discard(folder.checkpoints)
        print(f"predictions of the finished run in {folder.path / PREDICTIONS}")


# -- record -------------------------------------------------------------------------------------------------


def data_description(options: Options, splits: datasets.DatasetDict) -> dict:
    """The record's `data`: where it came from, which version, how many rows."""
    sizes = {name: len(split) for name, split in splits.items()}
    if options.data is not None:
        root = options.contents("data")
        return {"id": public_path(root), "sha256": local_fingerprint(root), "sizes": sizes}
    if options.task == "demo":
        from RoBERTa.demo_task import demo_checksum, make_demo

        return {
            "id": "pydoc_data.topics (demo_task.py)",
            "sha256": demo_checksum(make_demo()),
            "sizes": sizes,
        }
    sources = " ".join(splits["train"].info.download_checksums or {})
    revision = re.search(r"@([0-9a-f]{40})/", sources)
    return {
        "id": f"{HUB_ID}/{options.task}",
        "revision": revision.group(1) if revision else None,
        "sizes": sizes,
    }


def _figures(row: dict) -> str:
    shown = {
        name: value for name, value in row.items() if name not in ("step", "epoch", "loss", "train_loss")
    }
    return ", ".join(f"{name} {value:.4f}" for name, value in shown.items() if not name.endswith("loss"))


def main(argv: Sequence[str] | None = None) -> RunRecord | None:
    """Train as the command line says and write the run's record; None when the run was finished before."""
    (options,) = parse_arguments(Options, argv=argv, description=__doc__)
    options.check()
    from control_experiments.training.setup import start  # torch and transformers' models, not before

    with start(options, "RoBERTa.finetune", argv, less_memory=LESS_MEMORY) as run:
        if not run.folder.finished:
            return train(options, run)
        predicted = [
            run.folder.path / PREDICTIONS / name for name in get_task(options.task).server_files.values()
        ]
        if options.predict and not all(file.is_file() for file in predicted):
            predict_finished(options, run)
        else:
            print(f"{run.folder.path} is finished: skipped (--overwrite runs it again)")
    return None


if __name__ == "__main__":
    run_main(main)
