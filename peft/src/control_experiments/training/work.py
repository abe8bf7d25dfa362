"""Work shared out: runs, each of which one of several processes does, one process on each GPU.

Any number of processes may work on the same folder, with the same command: each takes the next run that no other one works on,
under a lock that a dying process lets go of. Finished runs are skipped and unfinished ones resumed, so the same command also
completes what was interrupted, or what --max_minutes ended. A run that fails stops no other.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from transformers.hf_argparser import HfArg

from ..errors import UserError
from .arguments import check_numbers

#: Folder for the locks of runs that are worked on.
LOCKS = ".lock"


@dataclass(kw_only=True)
class WorkOptions:
    gpus: Optional[list[str]] = HfArg(
        default=None, help="GPUs by index, with a process on each; or all that are visible, or cpu. Default: --device alone."
    )
    max_minutes: Optional[float] = HfArg(default=None, help="Begin no run that would end later.")
    max_hours: Optional[float] = HfArg(default=None, help="The same in hours.")
    dry_run: bool = HfArg(default=False, help="Print what would be run and run nothing.")

    def check_work(self) -> None:
        """Raise `UserError` for what cannot be."""
        check_numbers(self, "max_minutes", "max_hours", above=0)
        if wrong := [gpu for gpu in self.gpus or () if gpu not in ("all", "cpu") and not gpu.isdecimal()]:
            raise UserError(f"--gpus takes indices, cpu or all, got {wrong[0]!r}")

    @property
    def minutes(self) -> float | None:
        """The time that there is."""
        return 60 * self.max_hours if self.max_hours is not None else self.max_minutes


class TimeIsUp(Exception):
    """The next run would not end in time."""


class Work(ABC):
    """Does what is left to do; subclasses know what that is. A cell is one run.

    Args:
        output: the folder of all runs, or of their logs; the locks lie in it.
    """

    def __init__(self, options: WorkOptions, output: Path):
        self.options, self.output = options, output
        self.end = None if options.minutes is None else time.monotonic() + 60 * options.minutes
        self.longest = 0.0
        self.failed: dict[str, str] = {}

    @abstractmethod
    def left(self) -> list:
        """The cells to do next; none when all are done. Raises UserError: a finished one had other settings."""

    @abstractmethod
    def name(self, cell: Any) -> str:
        """The cell's name, in which it differs from all others."""

    @abstractmethod
    def is_done(self, cell: Any) -> bool:
        """Whether a cell is finished, or failed for good. Raises UserError: it had other settings."""

    @abstractmethod
    def work(self, cell: Any) -> None:
        """Do the cell. Raises UserError: it failed."""

    @abstractmethod
    def command(self, cell: Any) -> str:
        """The command that does the cell alone, as one would type it."""

    def lost(self) -> list[str]:
        """What cannot be finished, once nothing is left."""
        return []

    @abstractmethod
    def told(self) -> str:
        """What is finished, once nothing is left."""

    def show(self) -> None:
        """Print what the next runs are."""
        for cell in self.left():
            print(self.command(cell))

    def run(self) -> None:
        """Work until nothing is left, or the time is up. Raises UserError: runs failed, or a finished run has other
        settings."""
        lost, told = [], ""
        try:
            while left := [cell for cell in self.left() if self.name(cell) not in self.failed]:
                if not any(self.take(cell) for cell in left):  # other processes work on all that is left
                    self.check_time()
                    time.sleep(0.5)
            lost, told = self.lost(), self.told()
        except TimeIsUp:
            told = f"the next run does not fit into {self.options.minutes:g} minutes: the same command goes on"
        if lost := [*lost, *(f"{name} failed: {why}" for name, why in self.failed.items())]:
            raise UserError("; ".join(lost))
        print(told)

    def lock(self, cell: Any) -> Path:
        return self.output / LOCKS / self.name(cell)

    def take(self, cell: Any) -> bool:
        """Do the run unless another process holds its lock, or has finished it; whether it was tried here. Raises TimeIsUp."""
        self.lock(cell).parent.mkdir(parents=True, exist_ok=True)
        with self.lock(cell).open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            if self.is_done(cell):
                return False
            self.check_time()
            began = time.monotonic()
            try:
                self.work(cell)
            except UserError as error:
                self.failed[self.name(cell)] = str(error)
                print(f"warning: {self.name(cell)} failed: {error}", file=sys.stderr, flush=True)
            self.longest = max(self.longest, time.monotonic() - began)
            return True

    def check_time(self) -> None:
        """Raises TimeIsUp: a run that takes as long as the longest one so far would not end in time."""
        if self.end is not None and time.monotonic() + self.longest > self.end:
            raise TimeIsUp


def share_out(options: WorkOptions, device: str = "all") -> str | None:
    """Do what this process was started for, in a process on each of --gpus; or the one device to do it on here.

    Args:
        device: the GPU index, cpu or all, for lack of --gpus.

    Raises UserError: no GPU is visible, or one of the processes failed.
    """
    gpus = list(dict.fromkeys(options.gpus or [device]))
    if "all" in gpus:
        import torch  # which --help and a wrong option do not wait for

        gpus = [str(index) for index in range(torch.cuda.device_count())]
        if not gpus:
            raise UserError("no GPU is visible: add --gpus cpu to run on the CPU, or --dry_run to see the commands")
    if len(gpus) == 1:
        return gpus[0]
    codes = run_all([[sys.executable, *sys.orig_argv[1:], "--gpus", gpu] for gpu in gpus])
    if failed := [gpu for gpu, code in zip(gpus, codes, strict=True) if code]:
        raise UserError(f"not all could be done on GPU {', '.join(failed)} (reasons above)")
    return None


def run_all(commands: Sequence[Sequence[str]], **how: Any) -> list[int]:
    """The exit codes of commands that are run at once; `how` is for each `subprocess.Popen`.

    When this process is asked to end, each command is, with all that it started, and its end is waited for: it may save its state.
    """
    processes: list[subprocess.Popen] = []
    try:
        processes += (subprocess.Popen(command, start_new_session=True, **how) for command in commands)
        return [process.wait() for process in processes]
    except BaseException:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for process in processes:
            process.wait()
        raise
