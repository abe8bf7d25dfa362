"""Runs of several processes that lose one: the others must end in a line, and the run must go on with 1, 2 or 4.

The processes are forked, which spares them the imports.
"""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from control_experiments.record import read_record

from . import kills, tiny
from .kills import Ended, Outcome, Plan
from .tiny import Run

PROCESSES = 2
GOES_ON_WITH = (1, 2, 4)
#: How far losses may be from those of one process, which sums in another order.
TOLERANCE = 1e-5


def _roberta(folder: Path) -> Run:
    run = tiny.roberta(folder)
    config, table = folder / "bert" / "config.json", folder / "glue" / "CoLA" / "train.tsv"
    config.write_text(config.read_text().replace('dropout_prob": 0.1', 'dropout_prob": 0.0'))
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:22]))
    return run


def _llama(folder: Path) -> Run:
    return tiny.llama(folder, lora_dropout=0, micro_batch_size=2, held_out=2)


def with_options(run: Run, *words: str) -> Run:
    """The run with more options, which count instead of those of the same name before them."""
    return replace(run, arguments=[*run.arguments, *words])


def _sharded(make_run: Callable[[Path], Run], folder: Path) -> Run:
    return with_options(make_run(folder), "--shard", "fsdp2", "--memory", "lean")


#: Runs that 4 processes can share, without dropout, whose masks would differ, and with a short last batch in each epoch.
RUNS: dict[str, Callable[[Path], Run]] = {
    "roberta": _roberta,
    "llama": _llama,
    "roberta-fsdp2": partial(_sharded, _roberta),
    "llama-fsdp2": partial(_sharded, _llama),
}


def losses(output: Path) -> list[float]:
    """All losses in a run's record, in order."""
    history = read_record(output / "record.json").history
    return [row[name] for row in history for name in ("train_loss", "loss", "eval_loss") if name in row]


def not_told(output: Path, ended: list[Ended], lost: int) -> list[str]:
    """Survivors that did not end by themselves, in a line."""
    log = output / "run.log"
    # before that they look for each other inside of torch, which only SIGKILL may end
    began = log.exists() and log.stat().st_size > 0
    problems = []
    for rank, (code, told, _) in enumerate(ended):
        said = code in (0, 2, 128 + signal.SIGTERM) or "--resume" in told
        if rank != lost and ("Traceback" in told or (began and not said)):
            problems.append(f"process {rank} ended with {code}: {told[-2000:]}")
    return problems


def campaign(run: Run, folder: Path, count: int, seed: int = 0) -> Outcome:
    """Kill one process of `run` `count` times, each in a run of its own, let each run go on with 1, 2 and 4 processes, and
    compare its losses with those of one undisturbed process."""
    draw = random.Random(seed)
    _, changes = kills.undisturbed(run, folder)
    expected = losses(folder / "whole")
    shared = kills.together(run, folder / "shared", PROCESSES)
    seconds = max(process.seconds for process in shared)
    done = runs = 0
    differences = _differences(run, folder / "shared", shared, expected)
    while done < count and not differences:
        output, runs = folder / f"run{runs}", runs + 1
        plan = Plan.random(draw, seconds, changes, PROCESSES)
        ended = kills.together(run, output, PROCESSES, plan)
        if ended[plan.rank].code != -signal.SIGKILL:
            differences += _differences(run, output, ended, expected)  # it came to its end before
            continue
        done += 1
        found = [*not_told(output, ended, plan.rank), *kills.half_written(output)]
        for processes in GOES_ON_WITH:
            again = folder / f"{output.name}-on{processes}"
            if output.exists():
                shutil.copytree(output, again)
            found += _differences(run, again, kills.together(run, again, processes, resume=True), expected)
            shutil.rmtree(again, ignore_errors=True)
        differences += [f"{output.name} after {plan}: {what}" for what in found]
        shutil.rmtree(output, ignore_errors=True)
    return Outcome(done, runs, len(GOES_ON_WITH) * done, differences)


def _differences(run: Run, output: Path, ended: list[Ended], expected: list[float]) -> list[str]:
    """In what a run that should have come to its end differs from the losses of one process."""
    if bad := [process for process in ended if process.code]:
        return [f"{output.name} ended with {bad[0].code}: {bad[0].output[-2000:]}"]
    found = losses(output)
    if len(found) != len(expected) or not np.allclose(found, expected, rtol=0, atol=TOLERANCE):
        return [f"{output.name} has the losses {found} instead of {expected}"]
    return []
