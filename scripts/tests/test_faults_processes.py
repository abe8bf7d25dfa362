"""Runs of several processes on the CPU (gloo): the same losses as one process, one adapter, and a lost process."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from control_experiments.checkpoints import checkpoints
from control_experiments.trainer import SharedBatches
from scripts.faults import kills, processes, tiny
from scripts.faults.processes import losses

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


def command(run: tiny.Run, output: Path, count: int, *more: str) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    return [
        sys.executable,
        *launcher,
        str(ROOT / run.script),
        *run.arguments,
        "--output_dir",
        str(output),
        *more,
    ]


@pytest.mark.parametrize("rows", [8, 12, 13, 14, 15, 17])
@pytest.mark.parametrize("unit", [1, 2])
def test_processes_share_out_every_row_once_and_weigh_it_as_one_process_does(rows, unit):
    batches = SharedBatches(range(rows), 8, processes=4, unit=unit)
    parts = list(batches)
    assert len(parts) == len(batches) == 4 * -(-rows // 8)
    for step in range(len(parts) // 4):
        own = list(range(8 * step, min(rows, 8 * step + 8)))
        units = [own[start : start + unit] for start in range(0, len(own), unit)]
        expected = sum(sum(part) / len(part) for part in units) / len(units)
        mean = 0.0
        for process, part in enumerate(parts[4 * step : 4 * step + 4]):
            assert part
            theirs = [part[start : start + unit] for start in range(0, len(part), unit)]
            loss = sum(sum(part) / len(part) for part in theirs) / len(theirs)
            mean += batches.share(step, process) * loss / 4
        assert mean == pytest.approx(expected)


@pytest.mark.parametrize("domain", ["roberta", "llama"])
def test_two_processes_have_the_losses_of_one_and_save_one_adapter(domain, tmp_path):
    run = processes.RUNS[domain](tmp_path)
    assert kills.execute(run, tmp_path / "one").code == 0
    done = subprocess.run(command(run, tmp_path / "two", 2), capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) >= 8 and two == pytest.approx(one, abs=1e-5)
    weights = [
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two")
    ]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert (value - weights[1][name]).abs().max() < 1e-4
    assert done.stdout.count("record in") == 1


@pytest.mark.parametrize("domain", ["roberta", "llama"])
def test_a_lost_process_ends_the_run_which_goes_on_with_any_number(domain, tmp_path):
    run, cut = processes.RUNS[domain](tmp_path), tmp_path / "cut"
    longer = {"roberta": ("--epochs", "20"), "llama": ("--max_steps", "40")}[domain]
    run.arguments += longer
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command(run, cut, 2), stdout=log, stderr=log, env=ENVIRONMENT)
        while len(checkpoints(cut / "checkpoints")) < 2:
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.02)
        workers = [child for child in psutil.Process(process.pid).children() if "RANK" in child.environ()]
        next(child for child in workers if child.environ()["RANK"] == "1").send_signal(signal.SIGKILL)
        assert process.wait(60) != 0
    told = (tmp_path / "log").read_text()
    assert "SIGKILL" in told  # torchrun's own summary
    assert "error: another process of this run died" in told and "--resume" in told
    assert kills.execute(run, tmp_path / "one").code == 0
    for count in (1, 2, 4):
        again = shutil.copytree(cut, tmp_path / f"on{count}")
        first, *others = processes.execute(run, again, count, resume=True)
        assert first.code == 0 and "resumed from checkpoint-" in first.output, first.output
        assert [other.code for other in others] == [0] * (count - 1)
        assert losses(again) == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


@pytest.mark.parametrize("domain", ["roberta", "llama"])
def test_fsdp_is_refused_rather_than_quietly_left_out(domain, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    ended = kills.execute(processes.RUNS[domain](tmp_path), tmp_path / "run")
    assert ended.code == 2 and "FSDP is not supported here" in ended.output
    assert not (tmp_path / "run" / "record.json").exists()


def test_sigterm_to_torchrun_checkpoints_and_the_run_goes_on(tmp_path):
    run, cut = processes.RUNS["llama"](tmp_path), tmp_path / "cut"
    run.arguments += ["--max_steps", "120", "--eval_steps", "60"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command(run, cut, 2), stdout=log, stderr=log, env=ENVIRONMENT)
        while not (cut / "run.log").exists() or "step 10:" not in (cut / "run.log").read_text():
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.02)
        process.terminate()
        assert process.wait(60) != 0
    told = (tmp_path / "log").read_text()
    (newest, *_) = checkpoints(cut / "checkpoints")
    assert f"{newest.name} is kept" in told and "--resume" in told, told
    done = subprocess.run(command(run, cut, 2, "--resume"), capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert kills.execute(run, tmp_path / "one").code == 0
    assert losses(cut) == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
