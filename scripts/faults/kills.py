"""Kills runs at random moments and checks that nothing is lost: what ends is what would have ended undisturbed.

Half of the kills come after a random time, half at a random change to the file system (so that the short moments in
which checkpoints, adapters and records are written get their share). A run is killed up to three times, then goes on to
its end; after each kill everything that can be seen in its folder must be whole.
"""

from __future__ import annotations

import gc
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
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
    """When to kill: after `seconds`, or before the change to the file system of number `change` (from 1)."""

    seconds: float | None = None
    change: int | None = None


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


def start(
    run: Run,
    output: Path,
    log: Path,
    *,
    resume: bool = False,
    change: int | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> int:
    """Fork a process that does `run`; returns its id. The modules are imported once, here, which saves most time.

    Args:
        change: it dies before the change to its folder of this number.
        environment: variables to set in it.
    """
    main = run.main
    arguments = [
        *run.arguments,
        "--output_dir",
        str(output),
        *(["--resume"] if resume and run.resumes else []),
    ]
    process = os.fork()
    if process:
        return process
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        sys.argv = [run.program, *arguments]
        os.environ.update(environment)
        gc.freeze()  # or every collection goes through all that was imported, and copies its pages
        # torch renews a forked process's thread pool when it first wants it, and fails if two threads (gloo's, autograd's)
        # do so at once
        torch.set_num_threads(torch.get_num_threads())
        if change is not None:
            _die_at_change(output, change)
        run_main(main)
    except SystemExit as stop:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def wait(process: int, log: Path, started: float) -> Ended:
    _, status = os.waitpid(process, 0)
    return Ended(os.waitstatus_to_exitcode(status), log.read_text(), time.perf_counter() - started)


def execute(run: Run, output: Path, plan: Plan = UNDISTURBED, *, resume: bool = False) -> Ended:
    """Do `run` in a process of its own, and kill it as planned."""
    log, started = output.with_name(output.name + ".log"), time.perf_counter()
    process = start(run, output, log, resume=resume, change=plan.change)
    if plan.seconds is not None:
        time.sleep(plan.seconds)
        os.kill(process, signal.SIGKILL)  # it is not waited for yet, so its number is still its own
    return wait(process, log, started)


def _changes(folder: Path, count: Iterator[int]):
    """An audit hook that counts the changes to files in a folder."""
    inside = str(folder)

    def hook(event: str, arguments: tuple) -> int | None:
        if event == "open":
            path, mode, flags = arguments
            changes = flags & (os.O_WRONLY | os.O_RDWR) and not str(mode or "").startswith("r")
        else:
            path, changes = (arguments[0] if arguments else None), event in _CHANGES
        return next(count) if changes and str(path).startswith(inside) else None

    return hook


def _die_at_change(folder: Path, number: int) -> None:
    hook = _changes(folder, iter(range(1, 1 << 30)))

    def die(event: str, arguments: tuple) -> None:
        if hook(event, arguments) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die)


# -- what must hold -----------------------------------------------------------------------------------------


def half_written(output: Path) -> list[str]:
    """What can be seen of a killed run and is not whole."""
    problems = [
        f"{checkpoint.name}: {damage}"
        for checkpoint in checkpoints(output / "checkpoints")
        if (damage := find_damage(checkpoint))
    ]
    if (output / "record.json").exists():
        read_record(output / "record.json")
    if (output / "adapter").exists():
        load_file(output / "adapter" / "adapter_model.safetensors")
    return problems


def results(run: Run, output: Path) -> dict[str, object]:
    """What a run came to, less times."""
    record = read_record(output / "record.json")
    history = [
        {name: value for name, value in row.items() if "seconds" not in name} for row in record.history
    ]
    timeless = {
        place: {name: value for name, value in row.items() if "seconds" not in name}
        for place, row in record.metrics.items()
    }
    found: dict[str, object] = {
        "history": history,
        "metrics": timeless,
        "hyperparameters": record.hyperparameters,
    }
    for name in run.results:
        contents = (output / name).read_bytes()
        # answers are appended in batches: their order is that of the work
        found[name] = sorted(contents.splitlines()) if name.endswith(".jsonl") else contents
    return found


def campaign(run: Run, folder: Path, kills: int, seed: int = 0) -> Outcome:
    """Kill `run` `kills` times, in as many runs as that takes, and compare each run's end with an undisturbed one's."""
    draw = random.Random(seed)
    whole = folder / "whole"
    undisturbed = execute(run, whole)
    if undisturbed.code:
        raise RuntimeError(f"{run.program} fails undisturbed: {undisturbed.output}")
    expected = results(run, whole)
    changes = count_changes(run, folder / "counted")
    done = runs = resumed = 0
    differences: list[str] = []
    while done < kills:
        output, runs = folder / f"run{runs}", runs + 1
        killed = 0
        while True:
            plan = UNDISTURBED
            if killed < KILLS_PER_RUN and done < kills:
                by_time = draw.random() < 0.5
                plan = (
                    Plan(seconds=draw.uniform(0, undisturbed.seconds))
                    if by_time
                    else Plan(change=draw.randint(1, changes))
                )
            ended = execute(run, output, plan, resume=killed > 0)
            if ended.code == -signal.SIGKILL:
                killed, done = killed + 1, done + 1
                differences += [f"{output.name} after kill {killed}: {what}" for what in half_written(output)]
            elif ended.code:
                differences.append(
                    f"{output.name} ended with {ended.code} after {plan}: {ended.output[-2000:]}"
                )
                break
            else:
                resumed += killed > 0
                found = results(run, output)
                differences += [
                    f"{output.name}: another {name}" for name in expected if found[name] != expected[name]
                ]
                break
        if output.exists() and not differences:
            shutil.rmtree(output)
    return Outcome(done, runs, resumed, differences)


def count_changes(run: Run, output: Path) -> int:
    """How many changes to its folder an undisturbed run makes."""
    tally = output.with_name("changes")
    log, started = output.with_name("counted.log"), time.perf_counter()
    process = os.fork()
    if not process:
        seen = iter(range(1, 1 << 30))
        hook = _changes(output, seen)
        descriptor = os.open(tally, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        sys.addaudithook(lambda event, arguments: hook(event, arguments) and os.write(descriptor, b"."))
        inner = start(run, output, log)  # hooks are inherited
        os.waitpid(inner, 0)
        os._exit(0)
    wait(process, tally, started)
    return max(1, tally.stat().st_size)
