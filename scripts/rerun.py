#!/usr/bin/env python3
"""Run a whole table of the paper: every task x method x seed as one call of a launcher or a benchmark.

    bash scripts/rerun_commonsense.sh --tasks llama3_8b --methods lora "double control" --seeds 42 43 44
    bash scripts/rerun_memory.sh --dry_run                                                     only prints the calls

Finished cells are skipped and unfinished ones resumed. The same command therefore completes an interrupted table. Each GPU
runs one cell at a time. A failed cell stops no other; all of them are listed at the end. What a cell prints goes to
results/logs/<table>/<cell>.log. scripts/make_tables.py makes the tables. GLUE, images and quantized encoders are studies:
rerun_glue.sh, rerun_vit.sh and rerun_quantized.sh call RoBERTa/study.py and ViT/small_table.py.

A recipe stands in its launcher alone, which also finds out whether a finished run followed it.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Optional

from transformers.hf_argparser import HfArg

from control_experiments.errors import UserError, run_main
from control_experiments.paths import REPOSITORY, RESULTS, public_path
from control_experiments.record import read_json
from control_experiments.training.arguments import parse_arguments
from control_experiments.training.work import Work, WorkOptions, run_all, share_out

#: Base -> its launchers' prefix.
LLAMAS = {"llama2_7b": "llama2_7B", "llama3_8b": "llama3_8B"}
METHODS = ("control+lora", "double control", "lora", "dora", "zero-shot")
RECIPE = "--tokens 256 --steps 30 --methods lora+uncast dora control control+lora+uncast"
BASES = [f"{method}+{base}" for base in ("fp32", "bf16", "nf4", "int8") for method in ("control", "lora", "dora")]
ENCODER = f"--tokens 128 --steps 20 --precision bf16 --methods {' '.join(BASES)}"
DECODER = "--steps 20 --methods control+nf4 control+nf4:lean lora-qkv+uncast+nf4 lora-qkv+uncast+checkpointing+nf4"
#: Task -> bench_memory.py's options and, in results/memory, the file that it writes.
BENCHMARKS = {
    "llama3-8b": ("--shape llama3-8b --batch 4 --tokens 1024", "llama3-8b_4x1024.json"),
    "llama3-8b-short": ("--shape llama3-8b --batch 4 --tokens 256", "llama3-8b_4x256.json"),
    "llama2-7b": ("--shape llama2-7b --batch 4 --tokens 256", "llama2-7b_4x256.json"),
    "roberta-base": ("--shape roberta-base --batch 64 --tokens 128", "roberta-base_64x128.json"),
    "vit-b16": ("--shape vit-b16 --batch 128", "vit-b16_128x197.json"),
    "llama3-8b-limit": (
        "--shape llama3-8b --batch 1 --limit 23.5 --methods control:lean lora+liger+checkpointing lora+checkpointing lora+liger lora "
        "control:plain",
        "llama3-8b_1x1024_limit23.5.json",
    ),
    "llama3-8b-profile": (
        "--shape llama3-8b --batch 4 --tokens 1024 --profile --methods lora+liger control:fast control:balanced control:lean",
        "llama3-8b_4x1024_profile.json",
    ),
    "vit": (
        "--shape vit-b16 --batch 128 --steps 30 --warmup 5 --methods lora+eager control+eager dora+eager lora control dora",
        "published_vit/vit-b16_128x197.json",
    ),
    # the largest micro-batches of the launchers
    "llama2-7b-recipe": (f"--shape llama2-7b --batch 4 {RECIPE}", "recipes/llama2-7b_4x256.json"),
    "llama3-8b-recipe": (f"--shape llama3-8b --batch 3 {RECIPE}", "recipes/llama3-8b_3x256.json"),
    # 16-bit and quantized bases; fp32 is what RoBERTa/finetune.py keeps without --quantization
    "roberta-base-quantized": (f"--shape roberta-base --batch 64 {ENCODER}", "quantized/roberta-base_64x128_bf16.json"),
    "roberta-base-quantized-256": (f"--shape roberta-base --batch 256 {ENCODER}", "quantized/roberta-base_256x128_bf16.json"),
    "llama3-8b-quantized": (f"--shape llama3-8b --batch 1 --tokens 256 {DECODER}", "quantized/llama3-8b_1x256.json"),
    "llama3-8b-quantized-2048": (f"--shape llama3-8b --batch 1 --tokens 2048 {DECODER}", "quantized/llama3-8b_1x2048.json"),
}
GPU = "{gpu}"  # stands for the GPU in a command


@dataclass(kw_only=True)
class Options(WorkOptions):
    table: str = HfArg(help="commonsense or memory.")
    tasks: Optional[list[str]] = HfArg(default=None, help="Bases or benchmarks; default: all.")
    methods: Optional[list[str]] = HfArg(default=None, help="Default: all of the table.")
    seeds: Optional[list[int]] = HfArg(default=None, help="Default: 42 43 44; repeats 1 2 3 for memory.")
    results: str = HfArg(default=str(RESULTS), help="Folder for the runs.")
    extra: str = HfArg(default="", help="More options for every launcher, as one string.")


@dataclass
class Cell:
    """One call of a launcher.

    Attributes:
        record: the file that is there once the cell is finished.
        methods: what a benchmark measures, empty for all that its shape has; None: it is a training.
    """

    name: str
    command: list[str]
    record: Path
    environment: dict[str, str] = field(default_factory=dict)
    methods: Optional[list[str]] = None


def variable(name: str, default: str = "") -> str:
    return os.environ.get(name) or default


def commonsense_cell(options: Options, base: str, method: str, seed: int) -> Cell:
    """A training with its evaluation, or the base alone (zero-shot)."""
    likelihood = "likelihood" in variable("EVALUATE_ARGS")
    ranks = [variable("CONTROL_RANK", "64"), variable("LORA_RANK", "32"), variable("LORA_ALPHA", "64")]
    launcher, environment = f"{REPOSITORY}/LlaMA/{LLAMAS[base]}", {"SEED": str(seed)}
    place = Path(options.results) / "llama" / base
    if method == "zero-shot":
        command = ["bash", f"{launcher}_Evaluate.sh", *ranks, str(place / method), GPU, method]
        return Cell(f"{base}_zero-shot", command, place / (f"{method}-likelihood" if likelihood else method) / "record.json")
    own = {"control+lora": "Control+LoRA"}.get(method, "DoubleControl")
    if method not in ("control+lora", "double control"):
        environment["METHOD"] = method
    out = place / f"{method.replace(' ', '-')}-seed{seed}"
    answers = out / variable("EVALUATION", "likelihood" if likelihood else "evaluation")
    command = ["bash", f"{launcher}_{own}.sh", *ranks, str(out), GPU, "--resume"]
    return Cell(f"{base}_{out.name}", command, answers / "record.json", environment)


def memory_cell(options: Options, task: str, repeat: int) -> Cell:
    """A whole benchmark, which measures all its methods."""
    arguments, file = BENCHMARKS[task]
    arguments, _, methods = arguments.partition(" --methods ")
    methods = options.methods or methods.split()
    record = Path(options.results) / "memory" / ("" if repeat == 1 else f"repeat{repeat}") / file
    command = [variable("PYTHON", sys.executable), "-m", "scripts.bench_memory", *arguments.split(), "--device", GPU]
    command += ["--output", str(record.parent), *(["--methods", *methods] if methods else [])]
    return Cell(f"{task}_repeat{repeat}", command, record, methods=methods)


def plan_cells(options: Options) -> list[Cell]:
    """All cells that the options ask for, in order.

    Raises:
        UserError: a table that there is not, a task or method that it has not, or MODEL for several bases at once.
    """
    known = {"memory": BENCHMARKS, "commonsense": LLAMAS}.get(options.table)
    if known is None:
        raise UserError(f"there is no table {options.table!r} here: choose commonsense or memory")
    tasks = options.tasks or list(known)
    if unknown := [task for task in tasks if task not in known]:
        raise UserError(f"the {options.table} table has no {unknown[0]!r}: choose from {', '.join(known)}")
    if options.table == "memory":
        cells = [memory_cell(options, task, repeat) for repeat, task in product(options.seeds or (1, 2, 3), tasks)]
    elif variable("MODEL") and len(tasks) > 1:
        raise UserError("MODEL stands for one base: say for which with --tasks, such as --tasks llama3_8b")
    else:
        keys = product(options.seeds or (42, 43, 44), tasks, options.methods or METHODS)
        cells = [commonsense_cell(options, task, method, seed) for seed, task, method in keys]
    for cell in cells:
        cell.command += shlex.split(options.extra)
    return list({cell.name: cell for cell in cells}.values())  # zero-shot has no seeds


def check_methods(record: Path, wanted: list[str]) -> None:
    """Raises UserError: the benchmark's file is broken, or of other methods than those wanted, if any are."""
    try:
        found = [result["method"] for result in read_json(record)["results"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{record} is a broken benchmark ({error}): delete it and measure again") from error
    if wanted and {*found} != {*wanted}:
        told = f"{public_path(record)} has methods {shlex.join(found)}, not {shlex.join(wanted)}"
        raise UserError(f"{told}: delete it or choose another folder with --results")


class Rerun(Work):
    """Runs the cells of a table on the device."""

    def __init__(self, options: Options):
        super().__init__(options, Path(options.results, "logs", options.table))
        self.cells, self.device, self.begun = plan_cells(options), "", time.time()
        self.seen: set[str] = set()

    def left(self) -> list[Cell]:
        return [cell for cell in self.cells if not self.is_done(cell)]

    def name(self, cell: Cell) -> str:
        return cell.name

    def is_done(self, cell: Cell) -> bool:
        """Whether the cell is finished, as this process has seen, or was since it began."""
        return cell.name in self.seen or (cell.record.is_file() and cell.record.stat().st_mtime > self.begun)

    def command(self, cell: Cell) -> str:
        variables = [f"{name}={shlex.quote(value)}" for name, value in cell.environment.items()]
        text = " ".join([*variables, *map(shlex.quote, cell.command)])
        text = text.replace(f"{REPOSITORY}/", "").replace(shlex.quote(GPU), GPU)
        return "# finished: " * cell.record.is_file() + text

    def work(self, cell: Cell) -> None:
        """Call the launcher, which skips what is finished and refuses what is of another recipe."""
        if cell.methods is not None and cell.record.is_file():  # it would measure again after any change of the code
            check_methods(cell.record, cell.methods)
            self.seen.add(cell.name)
            return
        log = self.output / f"{cell.name}.log"
        words = [self.device if word == GPU else word for word in cell.command]
        variables = {**os.environ, "PYTHON": variable("PYTHON", sys.executable), **cell.environment}
        print(f"{cell.name} on {self.device}, log: {public_path(log)}", flush=True)
        with log.open("a", encoding="utf-8") as output:
            begin = output.tell()
            how = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
            (code,) = run_all([words], env=variables, **how)
        if code or not cell.record.is_file():
            lines = [line for line in log.read_bytes()[begin:].decode(errors="replace").splitlines() if line.strip()]
            errors = [line for line in lines if line.startswith("error:")]
            told = (errors or lines or ["it printed nothing"])[-1][:300]
            raise UserError(f"{told} (exit code {code}, log: {public_path(log)})")
        self.seen.add(cell.name)

    def told(self) -> str:
        return f"all {len(self.cells)} cells are finished; next: python -m scripts.make_tables"


def main() -> None:
    (options,) = parse_arguments(Options, description=__doc__)
    options.check_work()
    rerun = Rerun(options)
    if options.dry_run:
        rerun.show()
    elif device := share_out(options):
        rerun.device = device
        rerun.run()


if __name__ == "__main__":
    run_main(main)
