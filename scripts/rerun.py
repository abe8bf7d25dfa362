#!/usr/bin/env python3
"""Run a whole table of the paper: every task x method x seed as one call of the domain's launcher.

    bash scripts/rerun_glue.sh --tasks cola rte --methods control lora --seeds 42 41 40        and rerun_vit.sh,
    rerun_commonsense.sh, rerun_quantized.sh, rerun_memory.sh: their recipes are the variables at their top
    bash scripts/rerun_glue.sh --dry_run                                                       only prints the calls

Finished cells are skipped and unfinished ones resumed. The same command therefore completes an interrupted table. Each GPU
runs one cell at a time. A failed cell stops no other; all of them are listed at the end, and the exit code is then 1. What a
cell prints goes to results/logs/<table>/<cell>.log. scripts/make_tables.py makes the tables.

A recipe stands in its launcher alone. Whether a finished run followed it is found by asking the launcher what it would run.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from transformers.hf_argparser import HfArg

from control_experiments.errors import UserError, run_main
from control_experiments.paths import REPOSITORY, RESULTS
from control_experiments.training.arguments import check_numbers, parse_arguments
from scripts.cells import GPU, Cell, Scheduler, choose_gpus, interpreter, print_calls, variable

GLUE_TASKS = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")
IMAGES = ("cifar100", "flowers102", "svhn", "food101", "imagenet")
#: Base -> the launchers' prefix, or None for the base that only run_smollm2_table.sh knows.
LLAMAS = {"llama2_7b": "llama2_7B", "llama3_8b": "llama3_8B", "smollm2": None}
#: Further bases, which are no hub's: MODEL= names their folders.
QWENS = ("qwen0.5b", "qwen1.5b")
#: Task -> bench_memory.py's options and the name of the file that it writes.
BENCHMARKS = {
    "llama3-8b": ("--shape llama3-8b --batch 4 --tokens 1024", "llama3-8b_4x1024.json"),
    "llama3-8b-short": ("--shape llama3-8b --batch 4 --tokens 256", "llama3-8b_4x256.json"),
    "llama2-7b": ("--shape llama2-7b --batch 4 --tokens 256", "llama2-7b_4x256.json"),
    "roberta-base": ("--shape roberta-base --batch 64 --tokens 128", "roberta-base_64x128.json"),
    "vit-b16": ("--shape vit-b16 --batch 128", "vit-b16_128x197.json"),
    "llama3-8b-limit": ("--shape llama3-8b --batch 1 --limit 23.5", "llama3-8b_1x1024_limit23.5.json"),
    "llama3-8b-profile": ("--shape llama3-8b --batch 4 --tokens 1024 --profile", "llama3-8b_4x1024_profile.json"),
}
#: The methods that a benchmark is about, where these are not all.
SUBSETS = {
    "llama3-8b-limit": "control:lean lora+liger+checkpointing lora+checkpointing lora+liger lora control:plain",
    "llama3-8b-profile": "lora+liger control:fast control:balanced control:lean",
}


@dataclass
class Options:
    table: str = HfArg(help="One of glue, vit, commonsense, quantized, memory.")
    tasks: Optional[list[str]] = HfArg(default=None, help="Tasks, images, bases or benchmarks; default: all.")
    methods: Optional[list[str]] = HfArg(default=None, help="Default: all of the table.")
    seeds: Optional[list[int]] = HfArg(default=None, help="Default: 42 41 40; repeats 1 2 3 for memory.")
    max_hours: Optional[float] = HfArg(default=None, help="Start no cell after so long; running ones end.")
    gpus: Optional[list[str]] = HfArg(default=None, help="Indices, or cpu; default: all that are visible.")
    results: str = HfArg(default=str(RESULTS), help="Folder for the runs.")
    extra: str = HfArg(default="", help="More options for every launcher, as one string.")
    dry_run: bool = HfArg(default=False, help="Print the calls and run nothing.")


# -- the tables' cells ------------------------------------------------------------------------------------------


def per_task(name: str, task: str, default: str) -> str:
    """The value of a variable such as "cola=80 mnli=30", or such as "80", which holds for every task."""
    text = variable(name, default)
    values = dict(part.split("=", 1) for part in text.split()) if "=" in text else {task: text}
    if task not in values:
        raise UserError(f"{name}={text!r} says nothing about {task}: add {task}=... or give one value for all")
    try:
        float(values[task])
    except ValueError:
        raise UserError(f"{name} must be a number, got {values[task]!r}") from None
    return values[task]


def glue_cell(options: Options, task: str, method: str, seed: int) -> Cell:
    """One run of RoBERTa/run_roberta.sh, or of its quantized sibling."""
    quantized = options.table == "quantized"
    launcher = "QControl/run_roberta_quantization.sh" if quantized else "RoBERTa/run_roberta.sh"
    model = Path(variable("MODEL", "roberta-base")).name
    base = f"{model}_{variable('QUANTIZATION', 'nf4')}" if quantized else model
    name = f"{base}_{task}_{method}_seed{seed}"
    out = Path(options.results) / ("qcontrol" if quantized else "roberta") / name
    epochs, rate = per_task("EPOCHS", task, "80"), per_task("LR", task, "3e-4")
    command = [f"{REPOSITORY}/{launcher}", method, task, epochs, rate, GPU, "--output_dir", str(out)]
    return Cell(name, ["bash", *command, "--resume"], out / "record.json", {"SEED": str(seed)})


def vit_cell(options: Options, task: str, method: str, seed: int) -> Cell:
    from ViT.names import run_name  # as ViT/finetune.py itself names the folder

    name = run_name(variable("MODEL", "vit_base_patch16_224.orig_in21k"), task, method, seed)
    out = Path(options.results) / "vit" / name
    command = [f"{REPOSITORY}/ViT/run_ViT.sh", method, GPU, "--seed", str(seed), "--output_dir", str(out)]
    settings = {"task": Path(task).stem}
    return Cell(name, ["bash", *command, "--resume"], out / "record.json", {"DATA": task}, settings)


def commonsense_cell(options: Options, base: str, method: str, seed: int) -> Cell:
    """A training with its evaluation, or the base alone (zero-shot)."""
    place = Path(options.results) / "llama" / base
    zero_shot, prefix = method == "zero-shot", LLAMAS.get(base)
    if base in QWENS and not variable("MODEL"):
        raise UserError(f"{base} needs MODEL=FOLDER (python -m LlaMA.convert makes one of a GGUF file)")
    likelihood = "likelihood" in variable("EVALUATE_ARGS")
    out = place / ("zero-shot" if zero_shot else f"{method.replace(' ', '-')}-seed{seed}")
    name = f"{base}_{out.name}"
    ranks = [variable("CONTROL_RANK", "64"), variable("LORA_RANK", "32"), variable("LORA_ALPHA", "64")]
    if prefix is None:
        command = ["bash", f"{REPOSITORY}/LlaMA/run_smollm2_table.sh", str(place), GPU]
        environment = {"METHODS": method} if zero_shot else {"METHODS": method, "SEEDS": str(seed)}
    elif zero_shot:
        command = ["bash", f"{REPOSITORY}/LlaMA/{prefix}_Evaluate.sh", *ranks, str(out), GPU, method]
        environment = {}
    else:
        own = "Control+LoRA" if method == "control+lora" else "DoubleControl"
        command = ["bash", f"{REPOSITORY}/LlaMA/{prefix}_{own}.sh", *ranks, str(out), GPU, "--resume"]
        environment = {"SEED": str(seed)}
        if method not in ("control+lora", "double control"):
            environment["METHOD"] = method
    if zero_shot:
        record = out.with_name("zero-shot-likelihood" if likelihood else out.name) / "record.json"
        return Cell(name, command, record, environment, {"method": method})
    answers = out / variable("EVALUATION", "likelihood" if likelihood else "evaluation")
    return Cell(name, command, answers / "record.json", environment, trained=out / "record.json")


def memory_cell(options: Options, task: str, method: str, repeat: int) -> Cell:
    """A whole benchmark, which measures all its methods; `method` is the list of them, or empty for its own."""
    folder = Path(options.results) / "memory" / ("" if repeat == 1 else f"repeat{repeat}")
    name = f"{task}_repeat{repeat}"
    if task == "vit":
        folder /= "published_vit"
        command = ["bash", f"{REPOSITORY}/scripts/table_vit_memory.sh", GPU, "--output", str(folder)]
        settings = {"shape": "vit-b16", "batch": 128}
        return Cell(name, command, folder / "vit-b16_128x197.json", settings=settings)
    arguments, file = BENCHMARKS[task]
    methods = shlex.split(method or SUBSETS.get(task, ""))
    command = [interpreter(), "-m", "scripts.bench_memory", *arguments.split(), "--output", str(folder)]
    command += ["--methods", *methods] if methods else []
    return Cell(name, command, folder / file, {"CUDA_VISIBLE_DEVICES": GPU})


@dataclass(frozen=True)
class Plan:
    """A table's axes and how a cell of it is run; `more_tasks` and `more_methods` are run only when they are named."""

    tasks: Sequence[str]
    methods: Sequence[str]
    seeds: Sequence[int]
    cell: Callable[..., Cell]
    more_tasks: Sequence[str] = ()
    more_methods: Sequence[str] = ()


THREE = ("control", "lora", "dora")
PLANS = {
    "glue": Plan(GLUE_TASKS, THREE, (42, 41, 40), glue_cell),
    "vit": Plan(IMAGES[:1], THREE, (42, 41, 40), vit_cell, IMAGES[1:], ("probe",)),
    "commonsense": Plan(
        tuple(LLAMAS), ("control+lora", "double control", "lora", "dora", "zero-shot"), (42, 43, 44),
        commonsense_cell, QWENS, ("control", "control+dora", "miss", "shadow"),
    ),
    "quantized": Plan(("rte",), THREE, (42, 41, 40), glue_cell, tuple(t for t in GLUE_TASKS if t != "rte")),
    "memory": Plan((*BENCHMARKS, "vit"), ("",), (1, 2, 3), memory_cell),
}  # fmt: skip


def plan_cells(options: Options) -> list[Cell]:
    """All cells that the options ask for, in order.

    Raises:
        UserError: a task or method that the table has not, or MODEL for several bases at once.
    """
    plan = PLANS[options.table]
    tasks, methods = options.tasks or plan.tasks, options.methods or plan.methods
    asked = {"": (tasks, plan.tasks, plan.more_tasks), "method ": (methods, plan.methods, plan.more_methods)}
    if options.table == "vit" and variable("DATA"):
        tasks = [variable("DATA")]
        del asked[""]
    if options.table == "memory":  # bench_memory.py knows its methods
        methods = [shlex.join(options.methods or [])]
        del asked["method "]
    for kind, (names, usual, more) in asked.items():
        if unknown := [name for name in names if name not in (*usual, *more)]:
            known = ", ".join((*usual, *more))
            raise UserError(f"the {options.table} table has no {kind}{unknown[0]!r}: choose from {known}")
    if options.table == "commonsense" and variable("MODEL") and len(tasks) > 1:
        raise UserError("MODEL stands for one base: say for which with --tasks, such as --tasks llama3_8b")
    seeds = options.seeds or plan.seeds
    cells = [plan.cell(options, task, method, seed) for seed in seeds for task in tasks for method in methods]
    for cell in cells:
        cell.command += shlex.split(options.extra)
    return list({cell.name: cell for cell in cells}.values())  # zero-shot has no seeds


def main() -> None:
    (options,) = parse_arguments(Options, description=__doc__)
    if options.table not in PLANS:
        raise UserError(f"there is no table {options.table!r}: choose one of {', '.join(PLANS)}")
    check_numbers(options, "max_hours", above=0)
    cells = plan_cells(options)
    if options.dry_run:
        print_calls(cells)
        return
    deadline = None if options.max_hours is None else time.monotonic() + 3600 * options.max_hours
    scheduler = Scheduler(choose_gpus(options.gpus), Path(options.results, "logs", options.table), deadline)
    scheduler.run(cells)
    if scheduler.left:
        print(f"not started, time is up: {', '.join(scheduler.left)}")
    for name, reason in scheduler.failed.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    print("next: python -m scripts.make_tables")
    if scheduler.failed or scheduler.left:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
