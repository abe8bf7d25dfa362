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
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, Optional

import control_experiments  # noqa: F401  # isort: skip  (first, see there)
import datasets
import numpy as np
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

import peft_control  # noqa: F401  registers CONTROL with peft
from control_experiments.errors import UserError, run_main
from control_experiments.paths import RESULTS, public_path
from control_experiments.record import RunRecord, git_state, package_versions, utc_now
from control_experiments.training.arguments import (
    LARGEST_SEED,
    check_max_steps,
    check_numbers,
    parse_arguments,
)
from control_experiments.training.checkpoints import check_adapter_files, discard, step_of, whole_folder
from control_experiments.training.checksums import local_fingerprint
from control_experiments.training.device import (
    describe_device,
    explain_out_of_memory,
    make_deterministic,
    seed_everything,
    select_device,
)
from control_experiments.training.metering import MemoryMeter
from control_experiments.training.methods import (
    ControlSettings,
    LoraSettings,
    adapter_config,
    check_method,
    load_adapter,
    set_memory,
)
from control_experiments.training.quantization import (
    QUANTIZATION_HELP,
    check_method_runs,
    check_not_quantized,
    loading_arguments,
    prepare,
    quantization_of,
)
from control_experiments.training.quiet import quieten
from control_experiments.training.runs import RunFolder
from control_experiments.training.sharding import SHARD_HELP, choose_shard, shard_frozen, shares_weights
from control_experiments.training.trainer import ExperimentTrainer
from RoBERTa.glue import HUB_ID, TASKS, Task, get_task, load_task, write_predictions

logger = logging.getLogger("finetune")
LOGGERS = ("finetune", "control_experiments")
LESS_MEMORY = (
    "--memory lean, a smaller --batch_size, --padding longest, --precision bf16, a smaller --max_length"
)

#: Folder of a run for the GLUE server's files.
PREDICTIONS = "predictions"

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

METHODS = ("control", "lora", "dora", "double control", "control+lora", "control+dora")

#: The names of the query and value projections, which LoRA adapts in the paper's recipe.
QUERY_VALUE = {
    "mpnet": ("q", "v"),
    "distilbert": ("q_lin", "v_lin"),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"),
}
DEFAULT_QUERY_VALUE = ("query", "value")  # BERT, RoBERTa, XLM-RoBERTa, ELECTRA, ...


@dataclass
class Options:
    """Defaults are the paper's recipe for RoBERTa-base (the authors' RoBERTa README)."""

    method: str = field(metadata={"help": f"What to train beside the classifier: {', '.join(METHODS)}."})
    task: str = field(metadata={"help": f"One of {', '.join(TASKS)}."})
    model: str = field(default="roberta-base", metadata={"help": "Hub id or folder of an encoder."})
    data: Optional[str] = field(
        default=None,
        metadata={"help": "Folder with classic GLUE tsv folders or save_to_disk data; without it, the hub."},
    )
    epochs: float = field(default=80, metadata={"help": "Passes over the training set."})
    lr: float = field(default=3e-4, metadata={"help": "Peak learning rate."})
    seed: int = field(default=42, metadata={"help": "Seeds data order, dropout and the new parameters."})
    batch_size: int = field(default=64, metadata={"help": "Rows per step, over all processes."})
    eval_batch_size: int = field(
        default=128, metadata={"help": "Rows per step when evaluating; no effect on results."}
    )
    max_length: int = field(default=128, metadata={"help": "Longer inputs are cut to this many tokens."})
    padding: Literal["longest", "max_length"] = field(
        default="longest",
        metadata={
            "help": "longest: rows of like length together, padded to their longest; max_length: the authors'."
        },
    )
    random_order: bool = field(
        default=False,
        metadata={
            "help": "Do not bring rows of like length together: more padding, but batches whose lengths say nothing about "
            "their labels."
        },
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = field(
        default="auto", metadata={"help": "Autocast type; auto: bf16 or else fp16 on a GPU, fp32 on a CPU."}
    )
    memory: Literal["plain", "fast", "balanced", "lean"] = field(
        default="plain",
        metadata={"help": "How little the frozen blocks keep for the backward; same results."},
    )
    cuda_graphs: bool = field(
        default=False,
        metadata={
            "help": "Replay steps as CUDA graphs: faster where launching kernels takes the time, as with small models; "
            "rows are then padded to multiples of 16, so that there are few shapes."
        },
    )
    quantization: Literal["none", "nf4", "fp4", "int8"] = field(
        default="none", metadata={"help": QUANTIZATION_HELP}
    )
    control_rank: int = field(default=16, metadata={"help": "Rank of the control."})
    control_alpha: float = field(default=1.0, metadata={"help": "Plain multiplier of the control."})
    control_blocks: list[str] = field(
        default_factory=lambda: ["mlp"], metadata={"help": "Blocks that get a control: mlp, attention."}
    )
    lora_rank: int = field(default=8, metadata={"help": "Rank of LoRA and DoRA."})
    lora_alpha: float = field(default=16, metadata={"help": "LoRA's updates are scaled by alpha/rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before LoRA's A."})
    lora_targets: Optional[list[str]] = field(
        default=None,
        metadata={"help": "Module names for LoRA and DoRA; without it, the query and value projections."},
    )
    warmup_ratio: float = field(
        default=0.06, metadata={"help": "Share of the steps in which the rate rises."}
    )
    weight_decay: float = field(
        default=0.1, metadata={"help": "AdamW's, on every trained parameter, biases too."}
    )
    scheduler: str = field(
        default="linear", metadata={"help": "Name of a transformers learning-rate schedule."}
    )
    eval_steps: int = field(
        default=0, metadata={"help": "Evaluate every so many steps; 0: after each epoch."}
    )
    max_steps: int = field(default=-1, metadata={"help": "Stop after so many steps; -1: after --epochs."})
    save_steps: int = field(
        default=0, metadata={"help": "Checkpoint every so many steps; 0: after each epoch."}
    )
    workers: int = field(default=0, metadata={"help": "Processes that make batches; no effect on results."})
    deterministic: bool = field(
        default=False, metadata={"help": "Deterministic GPU kernels alone: the same bits again, slower."}
    )
    shard: Literal["ddp", "fsdp2"] = field(default="ddp", metadata={"help": SHARD_HELP})
    device: str = field(default="0", metadata={"help": "GPU index, or cpu."})
    output_dir: Optional[str] = field(
        default=None,
        metadata={
            "help": "Default: results/roberta/<model>_<task>_<method>_seed<seed>; quantized: results/qcontrol/..."
        },
    )
    resume: bool = field(default=False, metadata={"help": "Go on from the output folder's last checkpoint."})
    predict: bool = field(
        default=False, metadata={"help": "Write the GLUE server's files for the test sets."}
    )
    report_to: Literal["none", "tensorboard", "wandb"] = field(
        default="none", metadata={"help": "Also log there (WANDB_MODE=offline needs no account)."}
    )

    #: Options that do not change a run's outcome.
    _NEUTRAL = (
        "output_dir",
        "resume",
        "predict",
        "report_to",
        "device",
        "shard",
        "save_steps",
        "eval_batch_size",
        "workers",
        "data",
    )

    def check(self) -> None:
        """Raise a `UserError` for a value that cannot be, before anything is loaded or written."""
        check_method(self.method, METHODS)
        get_task(self.task)
        sizes = ("batch_size", "eval_batch_size", "max_length", "control_rank", "lora_rank")
        check_numbers(self, "epochs", "lr", *sizes, above=0)
        check_numbers(self, "eval_steps", "save_steps", "weight_decay", "workers", at_least=0)
        check_numbers(self, "warmup_ratio", "lora_dropout", at_least=0, below=1)
        check_numbers(self, "seed", at_least=0, at_most=LARGEST_SEED)
        check_numbers(self, "control_alpha", "lora_alpha")
        check_max_steps(self)
        if self.batch_size % (processes := int(os.environ.get("WORLD_SIZE", 1))):
            raise UserError(f"--batch_size {self.batch_size} must be a multiple of the {processes} processes")
        schedules = [kind.value for kind in transformers.SchedulerType]
        if self.scheduler not in schedules:
            raise UserError(f"unknown --scheduler {self.scheduler!r}: choose one of {', '.join(schedules)}")
        if self.predict and not get_task(self.task).test_splits:
            raise UserError(f"task {self.task} has no test set to --predict")

    @property
    def folder(self) -> Path:
        if self.output_dir is not None:
            return Path(self.output_dir)
        model = Path(self.model).name
        method = self.method.replace(" ", "_")
        if self.quantization != "none":
            method += f"_{self.quantization}"
        return RESULTS / self.domain / f"{model}_{self.task}_{method}_seed{self.seed}"

    @property
    def domain(self) -> str:
        """Which folder of results the run belongs to."""
        return "roberta" if self.quantization == "none" else "qcontrol"

    @property
    def data_folder(self) -> Path:
        """The part of --data that holds the task."""
        folders = [Path(self.data) / name for name in (self.task, TASKS[self.task].folder)]
        return next((folder for folder in folders if folder.is_dir()), Path(self.data))

    def hyperparameters(self) -> dict:
        """Everything that decides the outcome, besides the data."""
        return {name: value for name, value in asdict(self).items() if name not in self._NEUTRAL}

    def identity(self) -> dict:
        """What a run in the same folder must share to be this run: paths by their public names, and what they hold."""
        return {
            **self.hyperparameters(),
            "model": public_id(self.model),
            "model_sha256": local_fingerprint(self.model),
            "data": public_id(self.data) if self.data else None,
            "data_sha256": local_fingerprint(self.data_folder) if self.data else None,
        }


def public_id(name: str) -> str:
    """A hub id as it is, a folder without what it tells about the machine."""
    return public_path(name) if Path(name).exists() else name


def load_tokenizer_and_model(
    name: str,
    task: Task,
    quantization: str = "none",
    device: torch.device = torch.device("cpu"),  # noqa: B008  immutable
    precision: str = "fp32",
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """The encoder in float32 with a new head for the task, or with its linear layers quantized, then on `device`.

    Raises:
        UserError: there is no such model, it is no sequence classifier, or it cannot be quantized.
    """
    folder = Path(name).expanduser()
    if folder.exists() and not (folder / "config.json").is_file():
        raise UserError(f"{name} is no model folder: it has no config.json")
    labels = {"num_labels": 1, "problem_type": "regression"}
    if not task.regression:
        names = dict(enumerate(task.classes))
        labels = {"id2label": names, "label2id": {label: index for index, label in names.items()}}
    quantized = loading_arguments(quantization, device, DTYPES[precision])
    try:
        config = AutoConfig.from_pretrained(name, **labels)
        check_not_quantized(quantization, config, name)
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForSequenceClassification.from_pretrained(
            name, config=config, dtype=torch.float32, **quantized
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"cannot load a model from {name!r}: {reason}") from error
    return tokenizer, prepare(model)


def check_length(options: Options, model: PreTrainedModel) -> None:
    """Raise UserError for a `max_length` of more tokens than the model has positions for.

    RoBERTa and its kin (XLM-RoBERTa, MPNet, ...) count positions from behind that of the padding token, so that they read
    that many fewer; their table of positions is known by its `padding_idx`.
    """
    longest = getattr(model.config, "max_position_embeddings", options.max_length)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            longest = min(longest, module.num_embeddings - module.padding_idx - 1)
    if options.max_length > longest:
        raise UserError(
            f"--max_length {options.max_length} is more than {options.model} can read ({longest} tokens)"
        )


def add_adapter(model: PreTrainedModel, options: Options) -> PeftModel:
    """The model with the method's adapter; the adapter and the classifier are what trains.

    Raises:
        UserError: the architecture has no such blocks or target modules.
    """
    targets = options.lora_targets or QUERY_VALUE.get(model.config.model_type, DEFAULT_QUERY_VALUE)
    config = adapter_config(
        options.method,
        task_type="SEQ_CLS",
        control=ControlSettings(options.control_rank, options.control_alpha, tuple(options.control_blocks)),
        lora=LoraSettings(options.lora_rank, options.lora_alpha, options.lora_dropout, tuple(targets)),
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        asked = (
            f" (target modules asked for: {', '.join(targets)})"
            if getattr(config, "target_modules", None)
            else ""
        )
        raise UserError(f"{options.method} on {options.model}: {error}{asked}") from error


def tokenize(
    splits: datasets.DatasetDict, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> datasets.DatasetDict:
    """Token ids of each row and their `length`; dev and test sets also get their `row` and are sorted by length, so
    that batches padded to their longest row waste little. Padding itself is the collator's."""

    def encode(rows: dict, indices: list[int]) -> dict:
        pair = rows["second"] if "second" in texts else None
        encoded = tokenizer(rows["first"], pair, truncation=True, max_length=max_length)
        return {**encoded, "length": [len(ids) for ids in encoded["input_ids"]], "row": indices}

    texts = [column for column in next(iter(splits.values())).column_names if column != "label"]
    encoded = splits.map(encode, batched=True, with_indices=True, remove_columns=texts, keep_in_memory=True)
    for name in encoded:
        if name != "train":
            encoded[name] = encoded[name].sort("length", reverse=True, keep_in_memory=True)
    return encoded


def resolve_precision(precision: str, device: torch.device) -> str:
    """What "auto" means on this device.

    Raises:
        UserError: fp16 on a CPU, or bf16 on a GPU without it.
    """
    has_bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported()
    if precision == "auto":
        return "fp32" if device.type == "cpu" else "bf16" if has_bf16 else "fp16"
    if precision == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs a GPU: choose fp32 or bf16 on a CPU")
    if precision == "bf16" and not has_bf16:
        raise UserError("this GPU has no bf16: choose --precision fp16")
    return precision


def training_arguments(
    options: Options, folder: RunFolder, device: torch.device, precision: str
) -> TrainingArguments:
    """The options in the Trainer's terms."""
    grouped = options.padding == "longest" and not options.random_order
    evaluation = "steps" if options.eval_steps else "epoch"
    return TrainingArguments(
        output_dir=str(folder.checkpoints),
        num_train_epochs=options.epochs,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size // int(os.environ.get("WORLD_SIZE", 1)),
        per_device_eval_batch_size=options.eval_batch_size,
        learning_rate=options.lr,
        lr_scheduler_type=options.scheduler,
        warmup_steps=options.warmup_ratio,  # below 1 it is a share of all steps
        weight_decay=options.weight_decay,
        optim="adamw_torch",
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        seed=options.seed,
        train_sampling_strategy="group_by_length" if grouped else "random",
        eval_strategy=evaluation,
        eval_steps=options.eval_steps or None,
        logging_strategy=evaluation,
        logging_steps=options.eval_steps or 500,
        logging_nan_inf_filter=False,  # the ExperimentTrainer stops at such a loss
        save_strategy="steps" if options.save_steps else "epoch",
        save_steps=options.save_steps or 500,
        save_total_limit=2,
        label_names=["labels"],
        report_to=options.report_to,
        run_name=folder.path.name,
        use_cpu=device.type == "cpu",
        dataloader_num_workers=options.workers,
        dataloader_pin_memory=device.type == "cuda",
        disable_tqdm=True,  # the ExperimentTrainer has its own bar
        ddp_find_unused_parameters=False,
    )


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


def count_parameters(model: PeftModel) -> dict:
    """Trained parameters: all, the adapter's, and the classifier's (kept by peft as modules_to_save)."""
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    head = sum(count for name, count in trained.items() if "modules_to_save" in name)
    total = sum(trained.values())
    return {"trainable_parameters": total, "adapter_parameters": total - head, "head_parameters": head}


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


def predict_finished(options: Options, folder: RunFolder, device: torch.device, precision: str) -> None:
    """Write the server's files with the adapter of a finished run.

    Raises:
        UserError: its adapter is not there, or does not fit the model.
    """
    if not (folder.adapter / "adapter_config.json").is_file():
        raise UserError(
            f"{folder.path} is finished but holds no adapter to --predict with: train again with another --output_dir"
        )
    check_adapter_files(folder.adapter)
    task = get_task(options.task)
    splits = load_task(options.task, options.data, tests=True)
    tokenizer, model = load_tokenizer_and_model(options.model, task, options.quantization, device, precision)
    model = load_adapter(model, folder.adapter, options.model)
    tests = datasets.DatasetDict({split: splits[split] for split in task.test_splits})
    encoded = tokenize(tests, tokenizer, options.max_length)
    trainer = ExperimentTrainer(
        model=model.to(device),
        args=training_arguments(options, folder, device, precision),
        eval_dataset=encoded[task.test_splits[0]],
        data_collator=collator(options, tokenizer),
        processing_class=tokenizer,
        memory=MemoryMeter(device),
    )
    predict_tests(trainer, encoded, task, folder.path / PREDICTIONS)
    if trainer.is_world_process_zero():
        discard(folder.checkpoints)
        print(f"predictions of the finished run in {folder.path / PREDICTIONS}")


def collator(options: Options, tokenizer: PreTrainedTokenizerBase) -> DataCollatorWithPadding:
    return DataCollatorWithPadding(
        tokenizer,
        padding=options.padding,
        max_length=options.max_length,
        pad_to_multiple_of=16 if options.cuda_graphs else None,
    )


def data_description(options: Options, splits: datasets.DatasetDict) -> dict:
    """The record's `data`: where it came from, which version, how many rows."""
    description = {"sizes": {name: len(split) for name, split in splits.items()}}
    if options.data is not None:
        root = options.data_folder
        return {"id": public_path(root), "sha256": local_fingerprint(root), **description}
    if options.task == "demo":
        from RoBERTa.demo_task import demo_checksum, make_demo

        return {"id": "pydoc_data.topics (demo_task.py)", "sha256": demo_checksum(make_demo()), **description}
    sources = " ".join(splits["train"].info.download_checksums or {})
    revision = re.search(r"@([0-9a-f]{40})/", sources)
    return {
        "id": f"{HUB_ID}/{options.task}",
        "revision": revision.group(1) if revision else None,
        **description,
    }


def model_description(options: Options, model: PeftModel, total: int) -> dict:
    """The record's `model`; `total` counts the encoder and its head without the adapter."""
    version = (
        {"sha256": local_fingerprint(options.model)}
        if Path(options.model).is_dir()
        else {"revision": getattr(model.config, "_commit_hash", None)}
    )
    base = model.get_base_model()
    return {
        "id": public_id(options.model),
        **version,
        "class": type(base).__name__,
        "quantization": quantization_of(base.config),
        "total_parameters": total,
    }


def train(
    options: Options,
    folder: RunFolder,
    device: torch.device,
    precision: str,
    checkpoint: Path | None,
    command: Sequence[str],
) -> RunRecord:
    """Load, train, evaluate, save the adapter and write the record, all in `folder`."""
    created = utc_now()
    task = get_task(options.task)
    splits = load_task(options.task, options.data, tests=options.predict)
    seed_everything(options.seed)
    memory = MemoryMeter(device)
    tokenizer, model = load_tokenizer_and_model(options.model, task, options.quantization, device, precision)
    check_length(options, model)
    arguments = training_arguments(options, folder, device, precision)
    shared = shares_weights(options.shard)
    if not shared:
        model.to(device)
        memory.after_load()
    total_parameters = model.num_parameters()
    model = add_adapter(model, options)
    set_memory(model, options.memory, options.cuda_graphs)
    if shared:  # asking for the device starts the process group
        shard_frozen(model, arguments.device, memory)
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
        parameters = count_parameters(model)
        logger.info("%s", options.identity())
        if trainer.is_world_process_zero():
            print(
                f"{options.method} on {options.task}: {len(encoded['train'])} training rows, "
                f"{parameters['trainable_parameters']:,} of {total_parameters:,} parameters trained, "
                f"{precision}{'' if options.quantization == 'none' else ' over ' + options.quantization} on {device}"
                + (f", resumed from {checkpoint.name}" if checkpoint else "")
            )
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        history, metrics = summarise_history(trainer.state.log_history, task)
        if options.predict:
            predict_tests(trainer, encoded, task, folder.path / PREDICTIONS)

    adapter = {
        "config": model.peft_config["default"].to_dict(),
        "dtype": str(next(p.dtype for p in model.parameters() if p.requires_grad)).removeprefix("torch."),
        **parameters,
    }
    record = RunRecord(
        domain=options.domain,
        name=folder.path.name,
        method=options.method,
        task=options.task,
        seed=options.seed,
        command=["python", "-m", "RoBERTa.finetune", *command],
        created=created,
        finished=utc_now(),
        git=git_state(),
        versions=package_versions(),
        device=describe_device(device),
        model=model_description(options, model, total_parameters),
        data=data_description(options, splits),
        adapter=adapter,
        hyperparameters={
            **options.hyperparameters(),
            **({"shard": options.shard} if shared else {}),
            "precision": precision,
            "optimizer": "AdamW",
        },
        metrics=metrics,
        memory=memory.summary(),
        time={
            **trainer.throughput.summary(),
            "resumed_from_step": step_of(checkpoint) if checkpoint else None,
        },
        history=history,
    )
    if trainer.is_world_process_zero():
        with whole_folder(folder.adapter, sealed=False) as place:
            model.save_pretrained(place)
        record.write(folder.record)
        discard(folder.checkpoints)
        print(
            f"last {_figures(metrics['last'])}; best {_figures(metrics['best'])}; record in {folder.record}"
        )
    return record


def _figures(row: dict) -> str:
    shown = {
        name: value for name, value in row.items() if name not in ("step", "epoch", "loss", "train_loss")
    }
    return ", ".join(f"{name} {value:.4f}" for name, value in shown.items() if not name.endswith("loss"))


def main(argv: Sequence[str] | None = None) -> RunRecord | None:
    """Train as the command line says and write the run's record; None when the run was finished before."""
    command = list(sys.argv[1:] if argv is None else argv)
    (options,) = parse_arguments(Options, argv=command, description=__doc__)
    options.check()
    options.shard = choose_shard(
        options.shard, quantization=options.quantization, cuda_graphs=options.cuda_graphs
    )
    if options.deterministic:
        make_deterministic()
    device = select_device(options.device)
    precision = resolve_precision(options.precision, device)
    check_method_runs(options.method, options.quantization, device)
    quieten()
    datasets.disable_progress_bars()
    server_files = get_task(options.task).server_files.values()
    with RunFolder(options.folder) as folder, explain_out_of_memory(device, LESS_MEMORY):
        checkpoint = folder.claim({**options.identity(), "precision": precision}, resume=options.resume)
        if folder.finished:
            if options.predict and not all(
                (folder.path / PREDICTIONS / name).is_file() for name in server_files
            ):
                predict_finished(options, folder, device, precision)
                return None
            print(f"{folder.path} is finished: skipped (delete the folder to run it again)")
            return None
        if options.report_to != "none":
            os.environ.setdefault("WANDB_DIR", str(folder.path))
            os.environ.setdefault("WANDB_PROJECT", "parallel-control")
            os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder.path / "tensorboard"))
        return train(options, folder, device, precision, checkpoint, command)


if __name__ == "__main__":
    run_main(main)
