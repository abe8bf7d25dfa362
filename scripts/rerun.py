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

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from tqdm import tqdm

from control_experiments.errors import UserError, run_main
from control_experiments.paths import REPOSITORY, RESULTS, public_path
from control_experiments.record import read_json, read_record
from control_experiments.training.arguments import check_numbers, parse_arguments
from control_experiments.training.rates import SEARCH_FOLDER, SEARCH_SEED, choose_rates

GPU = "{gpu}"  # stands for the GPU in a command until one is free
CHOSEN = "CHOSEN"  # stands in a dry run for a learning rate that is not chosen yet
GLUE_TASKS = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")
IMAGES = ("cifar100", "flowers102", "svhn", "food101", "imagenet")
#: Base -> the launchers' prefix, or None for the base that only run_smollm2_table.sh knows.
LLAMAS = {"llama2_7b": "llama2_7B", "llama3_8b": "llama3_8B", "smollm2": None}
#: Task -> bench_memory.py's options and the name of the file that it writes.
BENCHMARKS = {
    "llama3-8b": ("--shape llama3-8b --batch 4 --tokens 1024", "llama3-8b_4x1024.json"),
    "llama3-8b-short": ("--shape llama3-8b --batch 4 --tokens 256", "llama3-8b_4x256.json"),
    "llama2-7b": ("--shape llama2-7b --batch 4 --tokens 256", "llama2-7b_4x256.json"),
    "roberta-base": ("--shape roberta-base --batch 64 --tokens 128", "roberta-base_64x128.json"),
    "vit-b16": ("--shape vit-b16 --batch 128", "vit-b16_128x197.json"),
    "llama3-8b-limit": ("--shape llama3-8b --batch 1 --limit 23.5", "llama3-8b_1x1024_limit23.5.json"),
    "llama3-8b-profile": (
        "--shape llama3-8b --batch 4 --tokens 1024 --profile True",
        "llama3-8b_4x1024_profile.json",
    ),
}
#: The methods that a benchmark is about, where these are not all.
SUBSETS = {
    "llama3-8b-limit": "control:lean lora+liger+checkpointing lora+checkpointing lora+liger lora control:plain",
    "llama3-8b-profile": "lora+liger control:fast control:balanced control:lean",
}


@dataclass
class Options:
    table: str = field(metadata={"help": "One of glue, vit, commonsense, quantized, memory."})
    tasks: Optional[list[str]] = field(
        default=None, metadata={"help": "GLUE tasks, images, LLaMA bases or benchmarks; default: all."}
    )
    methods: Optional[list[str]] = field(default=None, metadata={"help": "Default: all of the table."})
    seeds: Optional[list[int]] = field(
        default=None, metadata={"help": "Default: the paper's 42 41 40; repeats 1 2 3 for memory."}
    )
    max_hours: Optional[float] = field(
        default=None, metadata={"help": "Start no cell after so many hours; running ones are finished."}
    )
    gpus: Optional[list[str]] = field(default=None, metadata={"help": "Indices, or cpu; default: all."})
    grid: Optional[list[str]] = field(
        default=None,
        metadata={
            "help": "glue only: learning rates from which each method gets its own, task by task, chosen on a "
            "held-out tenth of the training data; dev sets are not looked at."
        },
    )
    results: str = field(default=str(RESULTS), metadata={"help": "Folder for the runs."})
    extra: str = field(default="", metadata={"help": "More options for every launcher, as one string."})
    dry_run: bool = field(default=False, metadata={"help": "Print the calls and run nothing."})


@dataclass
class Cell:
    """One call of a launcher.

    Attributes:
        record: the file that is there once the cell is finished.
        settings: what that file must say beside the options of the program that the launcher starts first.
        trained: the file that says it, where `record` is an evaluation's.
    """

    name: str
    command: list[str]
    record: Path
    environment: dict[str, str] = field(default_factory=dict)
    settings: dict[str, object] = field(default_factory=dict)
    trained: Optional[Path] = None

    def shown(self) -> str:
        """The call as one would type it in the repository."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        words = map(shlex.quote, self.command)
        return " ".join([*variables, *words]).replace(f"{REPOSITORY}/", "").replace(shlex.quote(GPU), GPU)

    def finished(self) -> bool:
        """Whether there is a record of this cell.

        Raises:
            UserError: the record is broken, or of a run with other settings.
        """
        if not self.record.is_file():
            return False
        place = self.trained or self.record
        found = said_by(place)
        wanted = {name: value for name, value in self._options().items() if name in found}
        for name, value in {**wanted, **self.settings}.items():
            if value != CHOSEN and not alike(found.get(name), value):
                raise UserError(
                    f"{public_path(place)} has {name} {found.get(name)}, not {value}: delete its folder or choose "
                    "another one with --results"
                )
        return True

    def _options(self) -> dict[str, str]:
        """The options of the program that the call starts first, by name; a launcher is asked, with an interpreter that
        only notes them."""
        words = self.command
        if words[0] == "bash":
            with tempfile.TemporaryDirectory() as folder:
                stub, notes = Path(folder, "python"), Path(folder, "notes")
                stub.write_text(f"#!/bin/sh\n[ -e '{notes}' ] || printf '%s\\0' \"$@\" >'{notes}'\n")
                stub.chmod(0o755)
                variables = {**environment(self, "0"), "PYTHON": str(stub)}
                done = subprocess.run(fill_in(words, "0"), env=variables, capture_output=True, text=True)
                if not notes.is_file():
                    raise UserError(
                        f"{self.shown()} starts nothing: {done.stderr.strip() or 'no reason given'}"
                    )
                words = notes.read_text().split("\0")[:-1]
        options: dict[str, list[str]] = {}
        for word in words:
            if word.startswith("--"):
                name, equals, value = word.removeprefix("--").partition("=")
                values = options[name] = [value] if equals else []
            elif options:
                values.append(word)
        # where a run reads and writes is no setting; the model is one if the caller names it
        for name in ("data", "output_dir", "output", "device", "resume", "" if variable("MODEL") else "model"):
            options.pop(name, None)
        found = {
            name: shlex.join(values) if len(values) > 1 else "".join(values)
            for name, values in options.items()
        }
        return {name: as_recorded(name, value) for name, value in found.items()}


def as_recorded(name: str, value: str) -> str:
    """An option's value as records have it."""
    return public_path(value) if name == "model" and Path(value).exists() else value or "True"


def said_by(path: Path) -> dict:
    """What a run's record, or a file of bench_memory.py, says of the run's settings.

    Raises:
        UserError: it cannot be read.
    """
    contents = read_json(path)
    if isinstance(contents, dict) and "domain" not in contents and isinstance(contents.get("options"), dict):
        try:
            methods = [result["method"] for result in contents["results"]]
            return {**contents["options"], "methods": shlex.join(methods)}
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} is a broken benchmark ({error}): delete it and measure again") from error
    record = read_record(path)
    of_run = {"method": record.method, "task": record.task, "seed": record.seed}
    return {**record.hyperparameters, **of_run, "model": record.model.get("id")}


def alike(found: object, wanted: object) -> bool:
    """Whether two settings are the same, be they numbers or their spelling on a command line."""
    try:
        return float(found) == float(wanted)
    except (TypeError, ValueError):
        return str(found) == str(wanted)


# -- the tables' cells ------------------------------------------------------------------------------------------


def variable(name: str, default: str = "") -> str:
    return os.environ.get(name) or default


def per_task(name: str, task: str, default: str) -> str:
    """The value of a variable such as "cola=80 mnli=30", or such as "80", which holds for every task."""
    text = variable(name, default)
    values = dict(part.split("=", 1) for part in text.split()) if "=" in text else {task: text}
    if task not in values:
        raise UserError(
            f"{name}={text!r} says nothing about {task}: add {task}=... or give one value for all"
        )
    return number(name, values[task])


def number(name: str, text: str) -> str:
    """`text`, if it is a number."""
    try:
        float(text)
    except ValueError:
        raise UserError(f"{name} must be a number, got {text!r}") from None
    return text


def glue_cell(options: Options, task: str, method: str, seed: int, rate: str | None = None) -> Cell:
    """One run of RoBERTa/run_roberta.sh, or of its quantized sibling."""
    quantized = options.table == "quantized"
    launcher = "QControl/run_roberta_quantization.sh" if quantized else "RoBERTa/run_roberta.sh"
    model = Path(variable("MODEL", "roberta-base")).name
    base = f"{model}_{variable('QUANTIZATION', 'nf4')}" if quantized else model
    name = f"{base}_{task}_{method}_seed{seed}"
    out = Path(options.results) / ("qcontrol" if quantized else "roberta") / name
    epochs, rate = per_task("EPOCHS", task, "80"), rate or per_task("LR", task, "3e-4")
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
    zero_shot, prefix = method == "zero-shot", LLAMAS[base]
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
        return Cell(name, command, out / "record.json", environment, {"method": method})
    return Cell(name, command, out / "evaluation" / "record.json", environment, trained=out / "record.json")


def memory_cell(options: Options, task: str, method: str, repeat: int) -> Cell:
    """A whole benchmark, which measures all its methods; `method` is the list of them, or empty for its own."""
    folder = Path(options.results) / "memory" / ("" if repeat == 1 else f"repeat{repeat}")
    name = f"{task}_repeat{repeat}"
    if task == "vit":
        folder /= "published_vit"
        command = ["bash", f"{REPOSITORY}/scripts/table_vit_memory.sh", GPU, "--output", str(folder)]
        return Cell(
            name, command, folder / "vit-b16_128x197.json", settings={"shape": "vit-b16", "batch": 128}
        )
    arguments, file = BENCHMARKS[task]
    methods = shlex.split(method or SUBSETS.get(task, ""))
    command = [interpreter(), "-m", "scripts.bench_memory", *arguments.split(), "--output", str(folder)]
    command += ["--methods", *methods] if methods else []
    return Cell(name, command, folder / file, {"CUDA_VISIBLE_DEVICES": GPU})


def interpreter() -> str:
    return os.environ.get("PYTHON") or sys.executable


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
        commonsense_cell, more_methods=("control", "control+dora", "miss", "shadow"),
    ),
    "quantized": Plan(("rte",), THREE, (42, 41, 40), glue_cell, tuple(t for t in GLUE_TASKS if t != "rte")),
    "memory": Plan((*BENCHMARKS, "vit"), ("",), (1, 2, 3), memory_cell),
}  # fmt: skip


def plan_cells(options: Options, rates: dict[tuple[str, str], str] | None = None) -> list[Cell]:
    """All cells that the options ask for, in order; with `rates`, each method's own by (task, method), those alone.

    Raises:
        UserError: a task or method that the table has not, or MODEL for several bases at once.
    """
    plan = PLANS[options.table]
    tasks, methods = options.tasks or plan.tasks, options.methods or plan.methods
    known = {
        "": (tasks, (*plan.tasks, *plan.more_tasks)),
        "method ": (methods, (*plan.methods, *plan.more_methods)),
    }
    if options.table == "vit" and variable("DATA"):
        tasks = [variable("DATA")]
        del known[""]
    if options.table == "memory":  # bench_memory.py knows its methods
        methods = [shlex.join(options.methods or [])]
        del known["method "]
    for kind, (asked, names) in known.items():
        for name in asked:
            if name not in names:
                raise UserError(
                    f"the {options.table} table has no {kind}{name!r}: choose from {', '.join(names)}"
                )
    if options.table == "commonsense" and variable("MODEL") and len(tasks) > 1:
        raise UserError("MODEL stands for one base: say for which with --tasks, such as --tasks llama3_8b")
    axes = [
        (seed, task, method) for seed in options.seeds or plan.seeds for task in tasks for method in methods
    ]
    if rates is None:
        cells = [plan.cell(options, task, method, seed) for seed, task, method in axes]
    else:
        cells = [glue_cell(options, t, m, seed, rates[t, m]) for seed, t, m in axes if (t, m) in rates]
    for cell in cells:
        cell.command += shlex.split(options.extra)
    return list({cell.name: cell for cell in cells}.values())  # zero-shot has no seeds


# -- learning rates ---------------------------------------------------------------------------------------------


def search_cells(options: Options, data: Path) -> dict[tuple[str, str], dict[str, Cell]]:
    """(task, method) -> learning rate -> the run that tries it; all on `data`, with a seed of their own."""
    plan, found = PLANS["glue"], {}
    for task in options.tasks or plan.tasks:
        for method in options.methods or plan.methods:
            for rate in options.grid:
                cell = glue_cell(options, task, method, SEARCH_SEED, rate)
                cell.name = f"{cell.name}_lr{rate}"
                out = Path(options.results) / "roberta" / SEARCH_FOLDER / cell.name
                cell.command[cell.command.index("--output_dir") + 1] = str(out)
                cell.command += shlex.split(options.extra)
                cell.record = out / "record.json"
                cell.environment["DATA"] = str(data)
                found.setdefault((task, method), {})[rate] = cell
    return found


def write_training_splits(tasks: Sequence[str], folder: Path) -> None:
    """Save each task with a tenth of its training rows (at most 5,000) in the place of its dev sets."""
    from datasets import DatasetDict, disable_progress_bars

    from RoBERTa.glue import get_task, load_task

    disable_progress_bars()
    for name in tasks:
        task = get_task(name)
        rows = load_task(name, variable("DATA") or None)["train"]
        rows = rows.rename_columns(dict(zip(("first", "second"), task.texts, strict=False)))
        parts = rows.train_test_split(test_size=max(1, min(len(rows) // 10, 5000)), seed=0)
        splits = {"train": parts["train"], **dict.fromkeys(task.dev_splits, parts["test"])}
        DatasetDict(splits).save_to_disk(str(folder / name))


def search_rates(options: Options, scheduler: Scheduler) -> dict[tuple[str, str], str]:
    """Run the search and choose; a method of which a run is missing is left out and noted as failed."""
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "held_out_of_training"
        write_training_splits(options.tasks or GLUE_TASKS, data)
        search = search_cells(options, data)
        scheduler.run([cell for tried in search.values() for cell in tried.values()])
    scores = {
        key: {rate: read_record(cell.record).metrics["last"]["score"] for rate, cell in cells.items()}
        for key, cells in search.items()
        if all(cell.record.is_file() for cell in cells.values())
    }
    model = Path(variable("MODEL", "roberta-base")).name
    rates = choose_rates(scores, Path(options.results) / "roberta" / SEARCH_FOLDER / f"{model}.json", model)
    for task, method in search.keys() - rates.keys():
        reason = "no learning rate was chosen: a run of its search is missing"
        scheduler.failed.setdefault(f"{task} {method}", reason)
    return rates


# -- running ----------------------------------------------------------------------------------------------------


class Scheduler:
    """Runs cells, one at a time on each GPU; keeps what failed.

    Attributes:
        failed: cell name -> why, in one line.
        left: names of cells that were not started because time was up.
    """

    def __init__(self, gpus: Sequence[str], logs: Path, deadline: float | None):
        self.gpus, self.logs, self.deadline = list(gpus), logs, deadline
        self.failed: dict[str, str] = {}
        self.left: list[str] = []
        self._running: list[subprocess.Popen] = []
        self._stopped = False

    def run(self, cells: Sequence[Cell]) -> None:
        """Run all cells that are not finished yet."""
        waiting = []
        for cell in cells:
            try:
                if not cell.finished():
                    waiting.append(cell)
            except UserError as error:
                self.failed[cell.name] = str(error)
        count, skipped = len(cells), len(cells) - len(waiting)
        print(f"{count} cells, {skipped} of them need no run; {len(self.gpus)} at a time", flush=True)
        started, done = time.monotonic(), 0
        with (
            ThreadPoolExecutor(len(self.gpus)) as pool,
            tqdm(total=count, initial=skipped, unit="cell", disable=None) as bar,
        ):
            try:
                for future in as_completed([pool.submit(self._run_one, cell) for cell in waiting]):
                    cell, seconds = future.result()
                    if seconds is None:
                        continue
                    done += 1
                    left = (time.monotonic() - started) / done * (len(waiting) - done - len(self.left))
                    outcome = f"failed: {self.failed[cell.name]}" if cell.name in self.failed else "finished"
                    bar.update()
                    tqdm.write(
                        f"[{skipped + done}/{count}] {cell.name} {outcome} in {_duration(seconds)}, about "
                        f"{_duration(left)} left"
                    )
                    sys.stdout.flush()
            except BaseException:
                self._stop()
                raise

    def _run_one(self, cell: Cell) -> tuple[Cell, float | None]:
        """Run a cell on a free GPU; with its seconds, or None when it was not started."""
        if self._stopped or (self.deadline is not None and time.monotonic() > self.deadline):
            self.left.append(cell.name)
            return cell, None
        gpu, started, log = self.gpus.pop(), time.monotonic(), self.logs / f"{cell.name}.log"
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("w", encoding="utf-8") as output:
                process = subprocess.Popen(
                    fill_in(cell.command, gpu), env=environment(cell, gpu), stdin=subprocess.DEVNULL,
                    stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
                self._running.append(process)
                if self._stopped:
                    self._stop()
                code = process.wait()
            if code or not cell.record.is_file():
                self.failed[cell.name] = f"{_last_line(log)} (exit code {code}, log: {public_path(log)})"
        except OSError as error:
            self.failed[cell.name] = str(error)
        finally:
            self.gpus.append(gpu)
        return cell, time.monotonic() - started

    def _stop(self) -> None:
        """Start no more cells and ask the running ones, with what they started, to end; their checkpoints stay."""
        self._stopped = True
        for process in list(self._running):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)


def fill_in(command: Sequence[str], gpu: str) -> list[str]:
    words = [gpu if word == GPU else word for word in command]
    return [*words, "--device", "cpu"] if gpu == "cpu" and "scripts.bench_memory" in words else words


def environment(cell: Cell, gpu: str) -> dict[str, str]:
    """The process's environment with the cell's variables; a GPU index counts within those that are visible."""
    visible = variable("CUDA_VISIBLE_DEVICES").split(",") if variable("CUDA_VISIBLE_DEVICES") else None
    device = "" if gpu == "cpu" else visible[int(gpu)] if visible else gpu
    own = {name: device if value == GPU else value for name, value in cell.environment.items()}
    return {**os.environ, "PYTHON": interpreter(), **own}


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or ["it printed nothing"])[-1][:300]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def choose_gpus(asked: Sequence[str] | None) -> list[str]:
    """The GPUs asked for, or all that are visible.

    Raises:
        UserError: none is visible and cpu was not asked for, or one is neither an index nor cpu.
    """
    for gpu in asked or ():
        if gpu != "cpu" and not gpu.isdigit():
            raise UserError(f"--gpus takes indices or cpu, got {gpu!r}")
    if asked:
        return list(asked)
    import torch

    if not (count := torch.cuda.device_count()):
        raise UserError("no GPU is visible: add --gpus cpu to run on the CPU, or --dry_run to see the calls")
    return [str(index) for index in range(count)]


def print_calls(cells: Sequence[Cell]) -> None:
    for cell in cells:
        try:
            print("# finished: " * cell.finished() + cell.shown())
        except UserError as error:
            print(f"# {error}")


def main() -> None:
    (options,) = parse_arguments(Options, description=__doc__)
    if options.table not in PLANS:
        raise UserError(f"there is no table {options.table!r}: choose one of {', '.join(PLANS)}")
    if options.grid and options.table != "glue":
        raise UserError("--grid is for the glue table")
    for rate in options.grid or []:
        number("--grid", rate)
    check_numbers(options, "max_hours", above=0)
    cells = plan_cells(options)
    if options.dry_run:
        if options.grid:
            search = search_cells(options, Path("HELD_OUT_OF_TRAINING"))
            print_calls([cell for tried in search.values() for cell in tried.values()])
            cells = plan_cells(options, dict.fromkeys(search, CHOSEN))
        print_calls(cells)
        return
    deadline = None if options.max_hours is None else time.monotonic() + 3600 * options.max_hours
    scheduler = Scheduler(choose_gpus(options.gpus), Path(options.results, "logs", options.table), deadline)
    if options.grid:
        cells = plan_cells(options, search_rates(options, scheduler))
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
