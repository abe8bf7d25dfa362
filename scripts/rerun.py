#!/usr/bin/env python3
"""Run a whole table of the paper: every task x method x seed as one call of the domain's launcher.

    bash scripts/rerun_glue.sh --tasks cola rte --methods control lora --seeds 42 41 40        and rerun_vit.sh,
    rerun_commonsense.sh, rerun_quantized.sh, rerun_memory.sh: their recipes are the variables at their top
    bash scripts/rerun_glue.sh --dry_run                                                       only prints the calls

Finished cells are skipped and unfinished ones resumed, so the same command completes an interrupted table. Cells are spread
over the GPUs, one on each. A failed cell does not stop the others; all of them are listed at the end and the exit code is
then 1. What a cell prints goes to results/logs/<table>/<cell>.log. The tables are made by scripts/make_tables.py.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from joblib import Parallel, delayed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from control_experiments.errors import UserError, run_main
from control_experiments.paths import REPOSITORY, RESULTS, public_path
from control_experiments.record import read_json, read_record
from control_experiments.reporting.benchmark_tables import tokens_of
from control_experiments.training.arguments import parse_arguments
from control_experiments.training.rates import SEARCH_FOLDER, SEARCH_SEED, choose_rates

#: What stands for the GPU in a command until one is free.
GPU = "{gpu}"
TABLES = ("glue", "vit", "commonsense", "quantized", "memory")
GLUE_TASKS = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")
IMAGES = ("cifar100", "flowers102", "svhn", "food101", "imagenet")
#: Base -> the launchers' prefix, or None for the base that only run_smollm2_table.sh knows.
LLAMAS = {"llama2_7b": "llama2_7B", "llama3_8b": "llama3_8B", "smollm2": None}
#: Task -> bench_memory.py's options and the name of the file it writes.
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
#: Methods of the benchmarks of something else than memory against time: which the question is about.
SUBSETS = {
    "llama3-8b-limit": (
        "control:lean",
        "lora+liger+checkpointing",
        "lora+checkpointing",
        "lora+liger",
        "lora",
        "control:plain",
    ),
    "llama3-8b-profile": ("lora+liger", "control:fast", "control:balanced", "control:lean"),
}


@dataclass
class Options:
    table: str = field(metadata={"help": f"One of {', '.join(TABLES)}."})
    tasks: Optional[list[str]] = field(
        default=None,
        metadata={
            "help": "GLUE tasks, image data sets, LLaMA bases or benchmarks; default: all of the table."
        },
    )
    methods: Optional[list[str]] = field(default=None, metadata={"help": "Default: all of the table."})
    seeds: Optional[list[int]] = field(
        default=None, metadata={"help": "Default: the paper's 42 41 40; repeats 1 2 3 for memory."}
    )
    max_hours: Optional[float] = field(
        default=None, metadata={"help": "Start no cell after so many hours; running ones are finished."}
    )
    gpus: Optional[list[str]] = field(
        default=None, metadata={"help": "GPU indices, or cpu; default: all that are visible."}
    )
    grid: Optional[list[str]] = field(
        default=None,
        metadata={
            "help": "glue only: learning rates from which each method gets its own, task by task, chosen on a tenth of "
            "the training data that is held out for it; the dev sets are not looked at."
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
        settings: what that file must say to be this cell's: method, task, seed, hyperparameters.
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
        for name, value in self.settings.items():
            if not alike(found.get(name), value):
                raise UserError(
                    f"{public_path(place)} has {name} {found.get(name)}, not {value}: delete its folder or choose "
                    "another one with --results"
                )
        return True


def said_by(path: Path) -> dict:
    """What a run's record, or a file of bench_memory.py, says of the run's settings.

    Raises:
        UserError: it cannot be read.
    """
    contents = read_json(path)
    if isinstance(contents, dict) and "domain" not in contents and isinstance(contents.get("options"), dict):
        try:
            methods = [result["method"] for result in contents["results"]]
            return {**contents["options"], "tokens": tokens_of(contents), "methods": shlex.join(methods)}
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} is a broken benchmark ({error}): delete it and measure again") from error
    record = read_record(path)
    of_run = {
        "method": record.method,
        "task": record.task,
        "seed": record.seed,
        "model": record.model.get("id"),
    }
    return {**record.hyperparameters, **of_run}


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
    values = dict(part.split("=", 1) for part in text.split() if "=" in part)
    if not values:
        return text
    if task not in values:
        raise UserError(
            f"{name}={text!r} says nothing about {task}: add {task}=... or give one value for all"
        )
    return values[task]


def number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{name} must be a number, got {text!r}") from None


def launcher_settings(
    launchers: Sequence[str], names: dict[str, str], own: dict[str, str] | None = None
) -> dict[str, str]:
    """The hyperparameters that launchers set by their variables, `names` (variable -> hyperparameter).

    A variable is what the cell gives it (`own`), else the caller's, else the default at the top of the first launcher
    that has one.
    """
    texts = [(REPOSITORY / launcher).read_text(encoding="utf-8") for launcher in launchers]
    found = {}
    for name, setting in names.items():
        defaults = [re.search(rf'^(?:export )?{name}=\$\{{{name}:-"?([^}}"]*)', text, re.M) for text in texts]
        default = next((match.group(1) for match in defaults if match), "")
        if value := (own or {}).get(name) or variable(name, default):
            found[setting] = value
    return found


def asked_model(default: str) -> str:
    """The model as records name it."""
    model = variable("MODEL", default)
    return public_path(model) if Path(model).exists() else model


def glue_cell(options: Options, task: str, method: str, seed: int, rate: str | None = None) -> Cell:
    """One run of RoBERTa/run_roberta.sh, or of its quantized sibling."""
    quantized = options.table == "quantized"
    launcher = "QControl/run_roberta_quantization.sh" if quantized else "RoBERTa/run_roberta.sh"
    model = Path(variable("MODEL", "roberta-base")).name
    base = f"{model}_{variable('QUANTIZATION', 'nf4')}" if quantized else model
    name = f"{base}_{task}_{method}_seed{seed}"
    out = Path(options.results) / ("qcontrol" if quantized else "roberta") / name
    epochs, rate = per_task("EPOCHS", task, "80"), rate or per_task("LR", task, "3e-4")
    command = [
        "bash",
        f"{REPOSITORY}/{launcher}",
        method,
        task,
        epochs,
        rate,
        GPU,
        "--output_dir",
        str(out),
        "--resume",
    ]
    number("EPOCHS", epochs)
    settings = {
        "method": method,
        "task": task,
        "seed": seed,
        "model": asked_model("roberta-base"),
        "epochs": epochs,
    }
    if rate != CHOSEN:
        number("LR", rate)
        settings["lr"] = rate
    if quantized:
        settings["quantization"] = variable("QUANTIZATION", "nf4")
    settings |= launcher_settings([launcher, "RoBERTa/run_roberta.sh"], GLUE_VARIABLES)
    return Cell(name, command, out / "record.json", {"SEED": str(seed)}, settings)


def vit_cell(options: Options, task: str, method: str, seed: int) -> Cell:
    name = vit_run_name(variable("MODEL", "vit_base_patch16_224.orig_in21k"), task, method, seed)
    out = Path(options.results) / "vit" / name
    command = [
        "bash",
        f"{REPOSITORY}/ViT/run_ViT.sh",
        method,
        GPU,
        "--seed",
        str(seed),
        "--output_dir",
        str(out),
        "--resume",
    ]
    settings = {"method": method, "task": Path(task).stem, "seed": seed}
    settings |= launcher_settings(["ViT/run_ViT.sh"], VIT_VARIABLES)
    return Cell(name, command, out / "record.json", {"DATA": task}, settings)


def vit_run_name(model: str, data: str, method: str, seed: int) -> str:
    """The folder's name that ViT/finetune.py itself gives a run."""
    from ViT.names import run_name

    return run_name(model, data, method, seed)


def commonsense_cell(options: Options, base: str, method: str, seed: int) -> Cell:
    """A training with its evaluation; methods and bases without a launcher of their own go through run_smollm2_table.sh."""
    place = Path(options.results) / "llama" / base
    out = place / ("zero-shot" if method == "zero-shot" else f"{method.replace(' ', '-')}-seed{seed}")
    record = out / "record.json" if method == "zero-shot" else out / "evaluation" / "record.json"
    ranks = [variable("CONTROL_RANK", "64"), variable("LORA_RANK", "32"), variable("LORA_ALPHA", "64")]
    own = {"control+lora": "Control+LoRA", "double control": "DoubleControl"}.get(method)
    prefix = LLAMAS[base]
    if prefix and own:
        command = ["bash", f"{REPOSITORY}/LlaMA/{prefix}_{own}.sh", *ranks, str(out), GPU, "--resume"]
        environment = {"SEED": str(seed)}
    else:
        command = ["bash", f"{REPOSITORY}/LlaMA/run_smollm2_table.sh", str(place), GPU]
        seeds = {} if method == "zero-shot" else {"SEEDS": str(seed)}
        environment = {"METHODS": method, **seeds, **_COMMON_RECIPE.get(base, {})}
    settings = {"method": method}
    if variable("MODEL"):
        settings["model"] = asked_model("")
    if method == "zero-shot":
        return Cell(f"{base}_{out.name}", command, record, environment, settings)
    launcher = Path(command[1]).relative_to(REPOSITORY)
    settings |= {"seed": seed, "control_rank": ranks[0], "lora_rank": ranks[1], "lora_alpha": ranks[2]}
    settings |= launcher_settings([str(launcher)], LLAMA_VARIABLES, environment)
    return Cell(f"{base}_{out.name}", command, record, environment, settings, out / "record.json")


#: Variables of the launchers -> hyperparameters in the records of the runs that they start.
GLUE_VARIABLES = {"BATCH_SIZE": "batch_size", "MAX_LENGTH": "max_length", "WARMUP_RATIO": "warmup_ratio",
                  "WEIGHT_DECAY": "weight_decay", "CONTROL_RANK": "control_rank", "CONTROL_ALPHA": "control_alpha",
                  "LORA_RANK": "lora_rank", "LORA_ALPHA": "lora_alpha", "LORA_DROPOUT": "lora_dropout"}  # fmt: skip
VIT_VARIABLES = {"EPOCHS": "epochs", "LR": "lr", "LR_DECAY": "lr_decay", "BATCH": "batch_size", "MLP_LAYERS": "mlp_layers",
                 "ATTENTION": "attention", "CONTROL_RANK": "control_rank", "LORA_RANK": "lora_rank",
                 "LORA_ALPHA": "lora_alpha"}  # fmt: skip
LLAMA_VARIABLES = {"EPOCHS": "epochs", "LR": "lr", "BATCH": "batch_size", "MICRO_BATCH": "micro_batch_size",
                   "CUTOFF": "cutoff", "WARMUP": "warmup_steps", "LORA_DROPOUT": "lora_dropout", "MEMORY": "memory"}  # fmt: skip
#: The bases' recipes as variables of run_smollm2_table.sh; see llama2_7B_*.sh and llama3_8B_*.sh.
_COMMON_RECIPE = {
    "llama2_7b": {"MODEL": "meta-llama/Llama-2-7b-hf", "EPOCHS": "3", "LR": "2e-4", "MICRO_BATCH": "4", "BATCH": "8",
                  "TOKEN_BUDGET": "1024", "EVAL_STEPS": "80"},
    "llama3_8b": {"MODEL": "meta-llama/Meta-Llama-3-8B", "EPOCHS": "3", "LR": "1e-4", "MICRO_BATCH": "3", "BATCH": "6",
                  "TOKEN_BUDGET": "768", "EVAL_STEPS": "80"},
}  # fmt: skip


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
    methods = shlex.split(method) or (SUBSETS.get(task, ()))
    command = [
        interpreter(),
        "-m",
        "scripts.bench_memory",
        *arguments.split(),
        "--output",
        str(folder),
    ]
    words = arguments.split()
    settings = {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}
    if methods:
        command += ["--methods", *methods]
        settings["methods"] = shlex.join(methods)
    return Cell(name, command, folder / file, {"CUDA_VISIBLE_DEVICES": GPU}, settings)


def interpreter() -> str:
    return os.environ.get("PYTHON") or sys.executable


@dataclass(frozen=True)
class Plan:
    """A table's axes and how a cell of it is run; `more_tasks` and `more_methods` are run only when they are named."""

    tasks: Sequence[str]
    methods: Sequence[str]
    seeds: Sequence[int]
    cell: Callable[[Options, str, str, int], Cell]
    more_tasks: Sequence[str] = ()
    more_methods: Sequence[str] = ()


PLANS = {
    "glue": Plan(GLUE_TASKS, ("control", "lora", "dora"), (42, 41, 40), glue_cell),
    "vit": Plan(("cifar100",), ("control", "lora", "dora"), (42, 41, 40), vit_cell, IMAGES[1:], ("probe",)),
    "commonsense": Plan(
        tuple(LLAMAS),
        ("control+lora", "double control", "lora", "dora", "zero-shot"),
        (42, 43, 44),
        commonsense_cell,
        more_methods=("control", "control+dora"),
    ),
    "quantized": Plan(
        ("rte",),
        ("control", "lora", "dora"),
        (42, 41, 40),
        glue_cell,
        tuple(task for task in GLUE_TASKS if task != "rte"),
    ),
    "memory": Plan((*BENCHMARKS, "vit"), ("",), (1, 2, 3), memory_cell),
}


def plan_cells(options: Options) -> list[Cell]:
    """All cells that the options ask for, in order.

    Raises:
        UserError: a task or method that the table has not, or MODEL for several bases at once.
    """
    plan = PLANS[options.table]
    tasks = options.tasks or plan.tasks
    known = {"": (*plan.tasks, *plan.more_tasks), "method ": (*plan.methods, *plan.more_methods)}
    methods = options.methods or plan.methods
    if options.table == "vit" and variable("DATA"):
        tasks = [variable("DATA")]
        del known[""]
    if options.table == "memory":  # bench_memory.py knows its methods
        methods = [shlex.join(options.methods or [])]
        del known["method "]
    for kind, names in known.items():
        for name in methods if kind else tasks:
            if name not in names:
                raise UserError(
                    f"the {options.table} table has no {kind}{name!r}: choose from {', '.join(names)}"
                )
    if options.table == "commonsense" and variable("MODEL") and len(tasks) > 1:
        raise UserError("MODEL stands for one base: say for which with --tasks, such as --tasks llama3_8b")
    seeds = options.seeds or plan.seeds
    cells = [plan.cell(options, task, method, seed) for seed in seeds for task in tasks for method in methods]
    for cell in cells:
        cell.environment = {
            name: value
            for name, value in cell.environment.items()
            if name != "MODEL" or not variable("MODEL")
        }
        add_extra(cell, options)
    return list({cell.name: cell for cell in cells}.values())  # zero-shot has no seeds


def add_extra(cell: Cell, options: Options) -> None:
    """Give the cell's launcher the --extra options, and its record what they change."""
    words = shlex.split(options.extra)
    cell.command += words
    for word, value in itertools.pairwise(words):
        name, equals, given = word.removeprefix("--").partition("=")
        if word.startswith("--") and name in cell.settings:
            cell.settings[name] = given if equals else value


# -- learning rates ---------------------------------------------------------------------------------------------

#: Stands in a dry run for a learning rate that is not chosen yet.
CHOSEN = "CHOSEN"


def search_cells(options: Options, data: Path) -> dict[tuple[str, str], dict[str, Cell]]:
    """(task, method) -> learning rate -> the run that tries it; all on `data`, with a seed of their own."""
    plan = PLANS["glue"]
    found: dict[tuple[str, str], dict[str, Cell]] = {}
    for task in options.tasks or plan.tasks:
        for method in options.methods or plan.methods:
            for rate in options.grid:
                cell = glue_cell(options, task, method, SEARCH_SEED, rate)
                cell.name = f"{cell.name}_lr{rate}"
                out = Path(options.results) / "roberta" / SEARCH_FOLDER / cell.name
                cell.command[cell.command.index("--output_dir") + 1] = str(out)
                add_extra(cell, options)
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


def last_scores(
    search: dict[tuple[str, str], dict[str, Cell]],
) -> dict[tuple[str, str], dict[str, float]]:
    """(task, method) -> learning rate -> last score; a method of which a run is missing is left out."""
    return {
        key: {rate: read_record(cell.record).metrics["last"]["score"] for rate, cell in cells.items()}
        for key, cells in search.items()
        if all(cell.record.is_file() for cell in cells.values())
    }


def chosen_cells(options: Options, rates: dict[tuple[str, str], str]) -> list[Cell]:
    """The table's cells with the chosen learning rates."""
    seeds = options.seeds or PLANS["glue"].seeds
    cells = [glue_cell(options, *key, seed, rate) for seed in seeds for key, rate in rates.items()]
    for cell in cells:
        add_extra(cell, options)
    return cells


# -- running ----------------------------------------------------------------------------------------------------


class Scheduler:
    """Runs cells through joblib, one at a time on each GPU; keeps what failed.

    Attributes:
        failed: cell name -> why, in one line.
        left: names of cells that were not started because time was up.
    """

    def __init__(self, gpus: Sequence[str], logs: Path, deadline: float | None, console: Console):
        self.gpus = list(gpus)
        self.workers, self.logs, self.deadline, self.console = len(gpus), logs, deadline, console
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
        skipped = len(cells) - len(waiting)
        self.console.print(
            f"{len(cells)} cells, {skipped} of them need no run; {self.workers} at a time", highlight=False
        )
        started, durations = time.monotonic(), []
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        # as many at a time as there are GPUs; results come as cells end
        pool = Parallel(
            self.workers, backend="threading", pre_dispatch="n_jobs", return_as="generator_unordered"
        )
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as progress:
            bar = progress.add_task("cells", total=len(cells), completed=skipped, left="")
            try:
                for cell, seconds in pool(map(delayed(self._run_one), waiting)):
                    if seconds is None:
                        continue
                    durations.append(seconds)
                    remaining = len(waiting) - len(durations) - len(self.left)
                    left = _duration((time.monotonic() - started) / len(durations) * remaining)
                    outcome = f"failed: {self.failed[cell.name]}" if cell.name in self.failed else "finished"
                    progress.update(bar, advance=1, left=f"about {left} left")
                    self.console.print(
                        f"\\[{skipped + len(durations)}/{len(cells)}] {cell.name} {outcome} in {_duration(seconds)}, "
                        f"about {left} left", highlight=False, soft_wrap=True,
                    )  # fmt: skip
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
                    fill_in(cell.command, gpu), env=environment(cell, gpu), stdin=subprocess.DEVNULL, stdout=output,
                    stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
                self._running.append(process)
                if self._stopped:
                    self._stop()
                code = process.wait()
            if code or not cell.record.is_file():
                self.failed[cell.name] = _last_line(log) + f" (exit code {code}, log: {public_path(log)})"
        except OSError as error:
            self.failed[cell.name] = f"{error}"
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
    if gpu == "cpu" and "scripts.bench_memory" in words:
        words += ["--device", "cpu"]
    return words


def environment(cell: Cell, gpu: str) -> dict[str, str]:
    """The process's environment with the cell's variables; a GPU index counts within those that are visible."""
    visible = variable("CUDA_VISIBLE_DEVICES").split(",") if variable("CUDA_VISIBLE_DEVICES") else None
    device = "" if gpu == "cpu" else visible[int(gpu)] if visible else gpu
    own = {name: device if value == GPU else value for name, value in cell.environment.items()}
    return {**os.environ, "PYTHON": interpreter(), **own}


def _last_line(log: Path) -> str:
    lines = [
        line.strip()
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip()
    ]
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or ["it printed nothing"])[-1][:300].replace("[", "\\[")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def choose_gpus(asked: Sequence[str] | None) -> list[str]:
    """The GPUs asked for, or all that are visible.

    Raises:
        UserError: none is visible and cpu was not asked for, or one is neither an index nor cpu.
    """
    if asked:
        for gpu in asked:
            if gpu != "cpu" and not gpu.isdigit():
                raise UserError(f"--gpus takes indices or cpu, got {gpu!r}")
        return list(asked)
    import torch

    count = torch.cuda.device_count()
    if not count:
        raise UserError("no GPU is visible: add --gpus cpu to run on the CPU, or --dry_run to see the calls")
    return [str(index) for index in range(count)]


def print_calls(cells: Sequence[Cell]) -> None:
    for cell in cells:
        try:
            print("# finished: " * cell.finished() + cell.shown())
        except UserError as error:
            print(f"# {error}")


def run(options: Options, scheduler: Scheduler) -> None:
    """Run the table; with a grid, first the search for each method's learning rate."""
    cells = plan_cells(options)
    if options.grid:
        tasks = options.tasks or PLANS["glue"].tasks
        with tempfile.TemporaryDirectory() as temporary:
            data = Path(temporary) / "held_out_of_training"
            write_training_splits(tasks, data)
            search = search_cells(options, data)
            scheduler.run([cell for tried in search.values() for cell in tried.values()])
        model = Path(variable("MODEL", "roberta-base")).name
        rates = choose_rates(
            last_scores(search), Path(options.results) / "roberta" / SEARCH_FOLDER / f"{model}.json", model
        )
        cells = chosen_cells(options, rates)
        for task, method in search.keys() - rates.keys():
            scheduler.failed.setdefault(
                f"{task} {method}", "no learning rate was chosen: a run of its search is missing"
            )
    scheduler.run(cells)


def main() -> None:
    (options,) = parse_arguments(Options, description=__doc__)
    if options.table not in PLANS:
        raise UserError(f"there is no table {options.table!r}: choose one of {', '.join(TABLES)}")
    if options.grid and options.table != "glue":
        raise UserError("--grid is for the glue table")
    for rate in options.grid or []:
        number("--grid", rate)
    cells = plan_cells(options)
    if options.dry_run:
        if options.grid:
            search = search_cells(options, Path("HELD_OUT_OF_TRAINING"))
            print_calls([cell for tried in search.values() for cell in tried.values()])
            cells = chosen_cells(options, dict.fromkeys(search, CHOSEN))
        print_calls(cells)
        return
    gpus = choose_gpus(options.gpus)
    deadline = None if options.max_hours is None else time.monotonic() + 3600 * options.max_hours
    scheduler = Scheduler(
        gpus, Path(options.results) / "logs" / options.table, deadline, Console(soft_wrap=True)
    )
    run(options, scheduler)
    if scheduler.left:
        print(f"not started, time is up: {', '.join(scheduler.left)}")
    for name, reason in scheduler.failed.items():
        print(f"failed: {name}: {reason}".replace("\\[", "["), file=sys.stderr)
    print("next: python -m scripts.make_tables")
    if scheduler.failed or scheduler.left:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
