"""Runs of several processes on the CPU (gloo): the same losses as one process, one adapter, and a lost process."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from control_experiments.errors import UserError
from control_experiments.record import read_record
from control_experiments.training import sharding
from control_experiments.training.checkpoints import checkpoints
from control_experiments.training.metering import MemoryMeter
from control_experiments.training.options import choose_shard
from control_experiments.training.sharding import shard_frozen
from control_experiments.training.trainer import ExperimentTrainer, SharedBatches
from scripts.faults import kills, processes, tiny
from scripts.faults.processes import losses

pytestmark = pytest.mark.slow


def torchrun(run: tiny.Run, output: Path, *more: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return [*launcher, "-m", run.program, *run.arguments, "--output_dir", str(output), *more]


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


def test_a_lost_process_of_the_campaigns_command(tmp_path):
    result = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, "-m", "scripts.inject_faults", "--kills", "0", "--lost", "1", "--shards", "ddp",
         "--inputs", "0", "--domains", "roberta", "--seed", "1", "--output", result],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(result.read_text())
    assert found["lost"].keys() == {"roberta"} and not found["kills"] and not found["inputs"]
    lost = found["lost"]["roberta"]
    assert (lost["kills"], lost["resumed"], lost["differences"]) == (1, 3, [])


def test_torchrun_is_terminated_then_loses_a_process_and_the_run_goes_on_with_any_number(tmp_path):
    run, cut = processes.RUNS["llama"](tmp_path), tmp_path / "cut"
    run.arguments += ("--max_steps", "60", "--eval_steps", "5")
    log = tmp_path / "log"

    def step_of(checkpoint: Path) -> int:
        return int(checkpoint.name.partition("-")[2])

    def start(*more: str, until: int) -> subprocess.Popen:
        """Up to a checkpoint of a step."""
        with log.open("w") as file:
            process = subprocess.Popen(torchrun(run, cut, *more), stdout=file, stderr=file)
        while not any(step_of(found) >= until for found in checkpoints(cut / "checkpoints")):
            assert process.poll() is None, log.read_text()
            time.sleep(0.02)
        return process

    process = start(until=5)
    process.terminate()
    assert process.wait(60) != 0
    told = log.read_text()
    (newest, *_) = checkpoints(cut / "checkpoints")
    assert f"{newest.name} is kept" in told and "--resume" in told, told

    process = start("--resume", until=step_of(newest) + 1)
    workers = [child for child in psutil.Process(process.pid).children() if "RANK" in child.environ()]
    next(child for child in workers if child.environ()["RANK"] == "1").send_signal(signal.SIGKILL)
    assert process.wait(60) != 0
    told = log.read_text()
    assert f"resumed from {newest.name}" in told
    assert "SIGKILL" in told  # torchrun's own summary
    assert "error: another process of this run died" in told and "--resume" in told

    kills.execute(run, tmp_path / "one").finished()
    for count in (1, 2, 4):
        again = shutil.copytree(cut, tmp_path / f"on{count}")
        first, *_ = run_all(run, again, count, resume=True)
        assert "resumed from checkpoint-" in first.output
        assert losses(again) == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


# -- FSDP2: the processes are forked, so what is patched here is patched in them -----------------------------


def check_shards(monkeypatch) -> None:
    """Have each process look at what it holds, and say so."""
    split = sharding.split_into_units

    def split_and_look(model, *arguments):
        trained = split(model, *arguments)
        frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        assert all(isinstance(parameter, DTensor) for parameter in frozen)
        assert not any(isinstance(p, DTensor) for p in model.parameters() if p.requires_grad)
        assert sum(p.to_local().numel() for p in frozen) < 0.6 * sum(p.numel() for p in frozen)
        print("looked at the shards")
        return trained

    monkeypatch.setattr(sharding, "split_into_units", split_and_look)


def run_all(run: tiny.Run, output: Path, count: int = 2, **more) -> list[kills.Ended]:
    """Do the run in so many processes, all of which must come to its end."""
    return [process.finished() for process in kills.together(run, output, count, **more)]


@pytest.mark.parametrize(
    ("domain", "sharded", "options"),
    [
        ("roberta", False, ()),
        ("llama", False, ()),
        ("roberta", True, ("--memory", "lean")),
        ("roberta", True, ("--memory", "balanced")),
        # padded, of an epoch's short last step one process has two micro-batches and the other has one
        ("llama", True, ("--memory", "lean", "--batching", "padded")),
        ("llama", True, ("--memory", "fast")),
    ],
)
def test_two_processes_have_the_losses_of_one_and_save_one_adapter(domain, sharded, options, tmp_path, monkeypatch):
    run = processes.with_options(processes.RUNS[domain](tmp_path), *options)
    kills.execute(run, tmp_path / "one").finished()
    if sharded:
        check_shards(monkeypatch)
    if sharded and domain == "roberta":
        run = processes.with_options(run, "--shard", "fsdp2")
    elif sharded:  # as accelerate launch asks for it
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", "2")
    if domain == "roberta" and not sharded:  # LlaMA goes through torchrun below
        done = subprocess.run(torchrun(run, tmp_path / "two"), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        told = done.stdout
    else:
        told = "".join(process.output for process in run_all(run, tmp_path / "two"))
    assert told.count("record in") == 1 and told.count("looked at the shards") == 2 * sharded
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) >= 8 and two == pytest.approx(one, abs=1e-5)
    shard = read_record(tmp_path / "two" / "record.json").hyperparameters.get("shard")
    assert (shard == "fsdp2") == sharded
    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all((value - two[name]).abs().max() < 1e-4 for name, value in one.items())


def test_a_sharded_half_precision_base_trains_float32_adapters_as_ddp_does(tmp_path, monkeypatch):
    run = processes.with_options(processes.RUNS["llama"](tmp_path), "--dtype", "bf16")
    run_all(run, tmp_path / "ddp")
    check_shards(monkeypatch)
    run_all(processes.with_options(run, "--shard", "fsdp2"), tmp_path / "fsdp2")
    # the same computations on the same rows in the same processes
    assert losses(tmp_path / "fsdp2") == pytest.approx(losses(tmp_path / "ddp"), abs=1e-6)


@pytest.mark.parametrize("domain", ["roberta", "llama"])
def test_a_lost_process_ends_a_sharded_run_which_goes_on_with_any_number(domain, tmp_path, monkeypatch):
    run, cut = processes.RUNS[f"{domain}-fsdp2"](tmp_path), tmp_path / "cut"
    kills.execute(run, tmp_path / "one").finished()
    share = ExperimentTrainer.loss_share

    def die(trainer):  # within a step, in which the other waits for shards or gradients
        if trainer.args.process_index == 1 and trainer.state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return share(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(ExperimentTrainer, "loss_share", die)
        ended = kills.together(run, cut, 2, alone=60)
    assert ended[1].code == -signal.SIGKILL and ended[0].code == 2
    assert "error: another process of this run died" in ended[0].output and "--resume" in ended[0].output
    for count, shard in ((1, "fsdp2"), (2, "fsdp2"), (4, "fsdp2"), (2, "ddp")):
        again = shutil.copytree(cut, tmp_path / f"{shard} on {count}")
        first, *_ = run_all(processes.with_options(run, "--shard", shard), again, count, resume=True)
        assert "resumed from checkpoint-" in first.output
        assert losses(again) == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


@pytest.mark.parametrize(
    ("environment", "options", "told"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, (), "FSDP1 is not supported: add --fsdp_version 2"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
            (),
            "--fsdp_offload_params true is not supported",
        ),
        ({}, ("--shard", "fsdp2", "--quantization", "nf4"), "--quantization nf4 cannot be sharded"),
    ],
)
@pytest.mark.parametrize("domain", ["roberta", "llama"])
def test_what_cannot_be_sharded_is_refused(domain, environment, options, told, tmp_path, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    run = processes.with_options(processes.RUNS[domain](tmp_path), *options)
    ended = kills.execute(run, tmp_path / "run")
    assert ended.code == 2 and told in ended.output
    assert not (tmp_path / "run" / "record.json").exists()


def test_models_that_cannot_be_sharded_are_refused():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    cpu = torch.device("cpu")
    for layer, told in (
        (bitsandbytes.nn.Linear4bit(4, 4), "quantized"),
        (torch.nn.Linear(4, 4), "no layer that Control knows"),
    ):
        with pytest.raises(UserError, match=told):
            shard_frozen(torch.nn.Sequential(layer), cpu, MemoryMeter(cpu))
    with pytest.raises(UserError, match="cuda_graphs"):
        choose_shard("fsdp2", cuda_graphs=True)
