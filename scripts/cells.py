"""The cells of a table, each one call of a launcher, and how they are spread over the GPUs of a host."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from tqdm import tqdm

from control_experiments.errors import UserError
from control_experiments.paths import REPOSITORY, public_path
from control_experiments.record import read_json, read_record

GPU = "{gpu}"  # stands for the GPU in a command until one is free


def variable(name: str, default: str = "") -> str:
    return os.environ.get(name) or default


def interpreter() -> str:
    return os.environ.get("PYTHON") or sys.executable


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
            if not alike(found.get(name), value):
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
                    reason = done.stderr.strip() or "no reason given"
                    raise UserError(f"{self.shown()} starts nothing: {reason}")
                words = notes.read_text().split("\0")[:-1]
        options: dict[str, list[str]] = {}
        for word in words:
            if word.startswith("--"):
                name, equals, value = word.removeprefix("--").partition("=")
                values = options[name] = [value] if equals else []
            elif options:
                values.append(word)
        # where a run reads and writes is no setting; the model is one if the caller names it
        ignored = {"data", "output_dir", "output", "device", "resume", "" if variable("MODEL") else "model"}
        found = {name: shlex.join(values) for name, values in options.items() if name not in ignored}
        found |= {name: "".join(options[name]) for name in found if len(options[name]) < 2}
        if (model := found.get("model")) and Path(model).exists():
            found["model"] = public_path(model)
        return {name: value or "True" for name, value in found.items()}


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


def print_calls(cells: Sequence[Cell]) -> None:
    for cell in cells:
        try:
            print("# finished: " * cell.finished() + cell.shown())
        except UserError as error:
            print(f"# {error}")


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
        with ThreadPoolExecutor(len(self.gpus)) as pool:
            try:
                for future in as_completed([pool.submit(self._run_one, cell) for cell in waiting]):
                    cell, seconds = future.result()
                    if seconds is None:
                        continue
                    done += 1
                    left = (time.monotonic() - started) / done * (len(waiting) - done - len(self.left))
                    taken, left = map(tqdm.format_interval, (seconds, left))
                    outcome = f"failed: {self.failed[cell.name]}" if cell.name in self.failed else "finished"
                    told = f"{cell.name} {outcome} in {taken}, about {left} left"
                    print(f"[{skipped + done}/{count}] {told}", flush=True)
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
