"""Kills runs at random moments and checks that nothing is lost: what ends is what would have ended undisturbed.

Half of the kills come after a random time, half at a random change to the file system (so that the short moments in
which checkpoints, adapters and records are written get their share). A run is killed up to three times, then goes on to
its end; after each kill everything that can be seen in its folder must be whole.
"""

from __future__ import annotations

import gc
import itertools
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from control_experiments.errors import run_main
from control_experiments.record import read_record
from control_experiments.training.checkpoints import checkpoints, find_damage

from .tiny import Run

KILLS_PER_RUN = 3
_CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink")


class Plan(NamedTuple):
    """When to kill: after `seconds`, or before the change to the file system of number `change` (from 1), or never."""

    seconds: float | None = None
    change: int | None = None

    @classmethod
    def random(cls, draw: random.Random, seconds: float, changes: int) -> Plan:
        """Some moment of a run that takes so long and makes so many changes."""
        by_time = draw.random() < 0.5
        return cls(seconds=draw.uniform(0, seconds)) if by_time else cls(change=draw.randint(1, changes))

    def at_change(self, number: int) -> None:
        """Die if it is time."""
        if number == self.change:
            os.kill(os.getpid(), signal.SIGKILL)


UNDISTURBED = Plan()


class Ended(NamedTuple):
    """How a process ended: its exit code (negative: the signal that killed it), its output, its time."""

    code: int
    output: str
    seconds: float


class Outcome(NamedTuple):
    """What a campaign came to; `differences` is empty when nothing was lost."""

    kills: int
    runs: int
    resumed: int
    differences: list[str]


def start(run: Run, output: Path, log: Path, *, resume: bool = False, on_change: Callable[[int], object] | None = None,
          environment: Mapping[str, str] | None = None) -> int:  # fmt: skip
    """Fork a process that does `run`; returns its id. The modules are imported once, here, which saves most time.

    Args:
        on_change: called in it before each change to its folder, with the change's number.
        environment: variables to set in it.
    """
    main = run.main
    if process := os.fork():
        return process
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        sys.argv = [run.program, *run.arguments, "--output_dir", str(output)]
        sys.argv += ["--resume"] if resume and run.resumes else []
        os.environ.update(environment or {})
        gc.freeze()  # or every collection goes through all that was imported, and copies its pages
        # torch renews a forked process's thread pool when it first wants it, and fails if two threads (gloo's, autograd's)
        # do so at once
        torch.set_num_threads(torch.get_num_threads())
        if on_change:
            _watch(str(output), on_change)
        run_main(main)
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def wait(process: int, log: Path, started: float) -> Ended:
    _, status = os.waitpid(process, 0)
    return Ended(os.waitstatus_to_exitcode(status), log.read_text(), time.perf_counter() - started)


def execute(run: Run, output: Path, plan: Plan = UNDISTURBED, *, resume: bool = False) -> Ended:
    """Do `run` in a process of its own, and kill it as planned."""
    log, started = output.with_name(output.name + ".log"), time.perf_counter()
    process = start(run, output, log, resume=resume, on_change=plan.at_change if plan.change else None)
    if plan.seconds is not None:
        time.sleep(plan.seconds)
        os.kill(process, signal.SIGKILL)  # it is not waited for yet, so its number is still its own
    return wait(process, log, started)


def _watch(folder: str, on_change: Callable[[int], object]) -> None:
    """Have Python say each change to files in a folder, before it is made."""
    numbers = itertools.count(1)

    def hook(event: str, arguments: tuple) -> None:
        changes = event in _CHANGES
        if event == "open":
            _, mode, flags = arguments
            changes = flags & (os.O_WRONLY | os.O_RDWR) and not str(mode or "").startswith("r")
        if changes and str(arguments[0]).startswith(folder):
            on_change(next(numbers))

    sys.addaudithook(hook)


def count_changes(run: Run, output: Path) -> int:
    """How many changes to its folder an undisturbed run makes."""
    tally, log, started = output.with_name("changes"), output.with_name("counted.log"), time.perf_counter()
    with tally.open("wb", buffering=0) as file:
        wait(start(run, output, log, on_change=lambda _: file.write(b".")), log, started)
    return max(1, tally.stat().st_size)


def undisturbed(run: Run, folder: Path) -> tuple[float, int]:
    """Do the run in `folder`/whole; how many seconds it takes and how many changes it makes.

    Raises:
        RuntimeError: it fails.
    """
    whole = execute(run, folder / "whole")
    if whole.code:
        raise RuntimeError(f"{run.program} fails undisturbed: {whole.output}")
    return whole.seconds, count_changes(run, folder / "counted")


# -- what must hold -----------------------------------------------------------------------------------------


def half_written(output: Path) -> list[str]:
    """What can be seen of a killed run and is not whole."""
    damages = [(checkpoint.name, find_damage(checkpoint)) for checkpoint in checkpoints(output / "checkpoints")]
    if (output / "record.json").exists():
        read_record(output / "record.json")
    if (output / "adapter").exists():
        load_file(output / "adapter" / "adapter_model.safetensors")
    return [f"{name}: {damage}" for name, damage in damages if damage]


def results(run: Run, output: Path) -> dict[str, object]:
    """What a run came to, less times."""

    def timeless(row: dict) -> dict:
        return {name: value for name, value in row.items() if "seconds" not in name}

    record = read_record(output / "record.json")
    metrics = {place: timeless(row) for place, row in record.metrics.items()}
    found = {"history": list(map(timeless, record.history)), "metrics": metrics, "hyperparameters": record.hyperparameters}
    for name in run.results:
        contents = (output / name).read_bytes()
        # answers are appended in batches: their order is that of the work
        found[name] = sorted(contents.splitlines()) if name.endswith(".jsonl") else contents
    return found


def campaign(run: Run, folder: Path, kills: int, seed: int = 0) -> Outcome:
    """Kill `run` `kills` times, in as many runs as that takes, and compare each run's end with an undisturbed one's."""
    draw, moments = random.Random(seed), undisturbed(run, folder)
    expected = results(run, folder / "whole")
    done = runs = resumed = 0
    differences: list[str] = []
    while done < kills:
        output, runs, killed, ended = folder / f"run{runs}", runs + 1, 0, None
        while ended is None or ended.code == -signal.SIGKILL:
            again = killed < KILLS_PER_RUN and done < kills
            plan = Plan.random(draw, *moments) if again else UNDISTURBED
            ended = execute(run, output, plan, resume=killed > 0)
            if ended.code == -signal.SIGKILL:
                killed, done = killed + 1, done + 1
                differences += [f"{output.name} after kill {killed}: {what}" for what in half_written(output)]
        if ended.code:
            differences.append(f"{output.name} ended with {ended.code} after {plan}: {ended.output[-2000:]}")
        else:
            resumed, found = resumed + (killed > 0), results(run, output)
            differences += [f"{output.name}: another {name}" for name in expected if found[name] != expected[name]]
        if not differences:
            shutil.rmtree(output, ignore_errors=True)
    return Outcome(done, runs, resumed, differences)
