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
import socket
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
#: Longer than any of these tiny runs takes; torchrun gives processes 30 s from SIGTERM to SIGKILL.
_LIMIT, _GRACE = 300, 30
_CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink")


class Plan(NamedTuple):
    """When to kill which process: after `seconds`, or before the change to the file system of number `change` (from 1), or
    never."""

    seconds: float | None = None
    change: int | None = None
    rank: int = 0

    @classmethod
    def random(cls, draw: random.Random, seconds: float, changes: int, processes: int = 1) -> Plan:
        """Some moment of a run that takes so long and makes so many changes, which its process 0 makes."""
        by_time = draw.random() < 0.5
        return (
            cls(draw.uniform(0, seconds), None, draw.randrange(processes)) if by_time else cls(None, draw.randint(1, changes))
        )

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

    def finished(self) -> Ended:
        """Itself.

        Raises:
            RuntimeError: the process failed.
        """
        if self.code:
            raise RuntimeError(f"ended with {self.code}: {self.output[-2000:]}")
        return self


class Started(NamedTuple):
    """A process that does a run."""

    id: int
    log: Path
    since: float

    def ended(self, *, wait: bool = True) -> Ended | None:
        """How it ended; None if it is still running and is not waited for."""
        found, status = os.waitpid(self.id, 0 if wait else os.WNOHANG)
        if found:
            return Ended(os.waitstatus_to_exitcode(status), self.log.read_text(), time.perf_counter() - self.since)


class Outcome(NamedTuple):
    """What a campaign came to; `differences` is empty when nothing was lost."""

    kills: int
    runs: int
    resumed: int
    differences: list[str]


def start(run: Run, output: Path, *, resume: bool = False, on_change: Callable[[int], object] | None = None,
          environment: Mapping[str, str] | None = None) -> Started:  # fmt: skip
    """Fork a process that does `run`. The modules are imported once, here, which saves most time.

    Args:
        on_change: called in it before each change to its folder, with the change's number.
        environment: variables to set in it.
    """
    main, environment = run.main, environment or {}
    log, since = output.with_name(f"{output.name}.rank{environment.get('RANK', 0)}.log"), time.perf_counter()
    if process := os.fork():
        return Started(process, log, since)
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        sys.argv = [run.program, *run.arguments, "--output_dir", str(output)]
        sys.argv += ["--resume"] if resume and run.resumes else []
        os.environ.update(environment)
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


def together(
    run: Run, output: Path, processes: int, plan: Plan = UNDISTURBED, *, resume: bool = False, alone: float = 0.0
) -> list[Ended]:
    """Do `run` in so many processes, one of which is killed as planned; how each of them ended, by rank.

    As torchrun does, the others are sent SIGTERM when one has died, and several get the environment that it would give them.

    Args:
        alone: seconds from the first failure to the others' SIGTERM, in which they should end by themselves.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    shared |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
    running = {
        rank: start(
            run, output, resume=resume, on_change=plan.at_change if plan.change and rank == plan.rank else None,
            environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else None,
        )
        for rank in range(processes)
    }  # fmt: skip
    started, ended = time.perf_counter(), {}
    # what happens to whom when, in seconds from the start
    signals = [(_LIMIT, signal.SIGKILL, list(running))]
    if plan.seconds is not None:
        signals.append((plan.seconds, signal.SIGKILL, [plan.rank]))
    while running:
        now = time.perf_counter() - started
        for rank, process in list(running.items()):
            if found := process.ended(wait=False):
                del running[rank]
                ended[rank] = found
                if found.code and sum(bool(other.code) for other in ended.values()) == 1:  # the first that failed
                    signals.append((now + alone, signal.SIGTERM, list(running)))
                    signals.append((now + alone + _GRACE, signal.SIGKILL, list(running)))
        for due in [entry for entry in signals if entry[0] <= now]:
            signals.remove(due)
            for rank in due[2]:
                if rank in running:  # not waited for yet, so that its number is still its own
                    os.kill(running[rank].id, due[1])
        time.sleep(0.005)
    return [ended[rank] for rank in range(processes)]


def execute(run: Run, output: Path, plan: Plan = UNDISTURBED, *, resume: bool = False) -> Ended:
    """Do `run` in one process, which is killed as planned."""
    return together(run, output, 1, plan, resume=resume)[0]


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
    tally = output.with_name("changes")
    with tally.open("wb", buffering=0) as file:
        start(run, output, on_change=lambda _: file.write(b".")).ended()
    return max(1, tally.stat().st_size)


def undisturbed(run: Run, folder: Path) -> tuple[float, int]:
    """Do the run in `folder`/whole; how many seconds it takes and how many changes it makes."""
    return execute(run, folder / "whole").finished().seconds, count_changes(run, folder / "counted")


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
