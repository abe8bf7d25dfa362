"""Runs of every domain under kills, signals and losses that are no number.

Whatever happens, the run then goes on to the end of one that nothing disturbed, bit for bit. `faults.py` says how to have
more cases of it.
"""

import os
import signal
import time
from functools import cache
from pathlib import Path
from random import Random

import pytest

from control_experiments.record import read_record
from control_experiments.training.checkpoints import checkpoints, find_damage
from scripts.tests import faults
from scripts.tests.faults import CASES, RUNS, SEED, TRAINING, Attempt, Run, assert_nothing_half_written, execute, results

pytestmark = pytest.mark.slow
LONGER = {"roberta": "--epochs 30", "vit": "--epochs 40", "llama": "--max_steps 60"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """``whole("vit")``: a domain's run, and the attempt at it that nothing disturbed, made once for all cases."""

    @cache
    def do(domain: str) -> tuple[Run, Attempt]:
        folder = tmp_path_factory.mktemp(domain)
        run = RUNS[domain](folder)
        return run, execute(run, folder / "whole").finished()

    return do


def assert_same(run: Run, output: Path, expected: Path) -> None:
    found, wanted = results(run, output), results(run, expected)
    assert [name for name in wanted if found[name] != wanted[name]] == []


@pytest.mark.parametrize("case", range(CASES))
@pytest.mark.parametrize("domain", RUNS)
def test_killed_runs_end_bit_for_bit_as_undisturbed_ones(domain, case, whole, tmp_path):
    (run, undisturbed), cut, killed = whole(domain), tmp_path / "cut", 0
    draw = Random(f"{SEED} {domain} {case}")
    while killed < 3:
        moment = draw.choice((draw.uniform(0.001, undisturbed.seconds), draw.randint(1, undisturbed.changes.value)))
        attempt = execute(run, cut, moment, resume=killed > 0)
        if not attempt.killed:  # it came to its end before
            break
        assert_nothing_half_written(cut)
        killed += 1
    else:
        attempt = execute(run, cut, resume=True)
    attempt.finished()
    assert_same(run, cut, undisturbed.output)


@pytest.mark.parametrize("domain", TRAINING)
def test_a_signal_checkpoints_and_the_run_goes_on_to_the_same_end(domain, tmp_path):
    run = RUNS[domain](tmp_path).adding(LONGER[domain] + " --save_steps 0" * (domain == "roberta"))
    execute(run, tmp_path / "whole").finished()
    for number in (signal.SIGINT, signal.SIGTERM):
        cut = tmp_path / number.name
        attempt = Attempt(run, cut)
        while not (cut / "checkpoints").exists():  # it trains
            time.sleep(0.01)
        time.sleep(0.2)
        os.kill(attempt.pid, number)
        attempt.join()
        assert attempt.exitcode == 128 + number and "Traceback" not in attempt.said, attempt.said
        line = attempt.said.strip().splitlines()[-1]
        (newest, *_) = checkpoints(cut / "checkpoints")
        assert f"{newest.name} is kept" in line and "--resume" in line
        assert find_damage(newest) is None and not (cut / "record.json").exists()
        execute(run, cut, resume=True).finished()
        assert_same(run, cut, tmp_path / "whole")


@pytest.mark.parametrize("domain", TRAINING)
def test_a_loss_that_is_no_number_stops_the_run(domain, tmp_path):
    line = execute(RUNS[domain](tmp_path).adding("--lr 1e30"), tmp_path / "run").refused()
    assert "NaN or infinite" in line and "step" in line
    assert "is kept" in line or "nothing was saved yet" in line
    assert_nothing_half_written(tmp_path / "run")
    assert not (tmp_path / "run" / "record.json").exists()


# -- the same seed ----------------------------------------------------------------------------------------------


#: By name: a run, what it is asked for beside, and two numbers of data workers.
SEEDED = {
    "roberta": (faults.roberta, "--deterministic", (0, 2)),
    "vit": (faults.vit, "--deterministic", (8, 1)),
    "llama": (faults.llama, "--deterministic", (0, 2)),
    "qcontrol, roberta": (faults.qcontrol, "", (0, 2)),
    "qcontrol, llama": (faults.llama, "--quantization nf4", (0, 2)),
}


@pytest.mark.parametrize("name", SEEDED)
def test_the_same_seed_gives_the_same_record_whatever_the_workers(name, tmp_path):
    make_run, options, (workers, others) = SEEDED[name]
    run = make_run(tmp_path).adding(options)
    places = [tmp_path / place for place in ("one", "same", "others")]
    for place, count in zip(places, (workers, workers, others)):
        execute(run.adding(f"--workers {count}"), place).finished()
        assert_same(run, place, places[0])
    one, same = (vars(read_record(place / "record.json")) for place in places[:2])
    assert one["hyperparameters"]["deterministic"] == ("deterministic" in options)
    for measured in ("name", "command", "created", "finished", "git", "memory", "time", "history", "metrics"):
        one.pop(measured), same.pop(measured)
    assert one == same
