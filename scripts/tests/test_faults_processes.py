"""Runs of several processes on the CPU (gloo): the same losses as one process, one adapter, and a lost process.

The processes are forked, so that what is patched here is patched in them.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from control_experiments.record import read_record
from control_experiments.training import sharding
from control_experiments.training.checkpoints import checkpoints
from control_experiments.training.trainer import ExperimentTrainer, SharedBatches
from scripts.tests import faults
from scripts.tests.faults import ADAPTER, SEED, Attempt, Run, assert_nothing_half_written, execute, losses, together

pytestmark = pytest.mark.slow
GOES_ON_WITH = (1, 2, 4)
SHARDED = "--shard fsdp2 --memory lean"


def roberta(folder: Path) -> Run:
    """A run that 4 processes can share: without dropout, whose masks would differ, with a short last batch in each epoch."""
    run = faults.roberta(folder)
    config, table = folder / "bert" / "config.json", folder / "glue" / "CoLA" / "train.tsv"
    config.write_text(config.read_text().replace('dropout_prob": 0.1', 'dropout_prob": 0.0'))
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:22]))
    return run


def llama(folder: Path) -> Run:
    return faults.llama(folder).adding("--lora_dropout 0 --micro_batch_size 2 --held_out 2")


SHARED = {"roberta": roberta, "llama": llama}


def run_all(run: Run, output: Path, count: int = 2, **more) -> list[Attempt]:
    """Do the run in so many processes, all of which must come to their end."""
    return [attempt.finished() for attempt in together(run, output, count, **more)]


def assert_goes_on(run: Run, cut: Path, expected: list[float], counts=GOES_ON_WITH) -> None:
    """A copy of the run goes on with each of these numbers of processes, to the losses of one, which sums in another order."""
    unfinished = not (cut / "record.json").exists() and checkpoints(cut / "checkpoints")
    for count in counts:
        again = cut.with_name(f"{cut.name} on {count}")
        if cut.exists():
            shutil.copytree(cut, again)
        first, *_ = run_all(run, again, count, resume=True)
        assert ("resumed from checkpoint-" in first.said) == bool(unfinished)
        assert losses(again) == pytest.approx(expected, rel=0, abs=1e-5)
        shutil.rmtree(again)


@pytest.mark.parametrize("rows", [8, 12, 13, 15, 17])
@pytest.mark.parametrize("unit", [1, 2])
def test_processes_share_out_every_row_once_and_weigh_it_as_one_process_does(rows, unit):
    def loss(part):
        """The mean over its micro-batches of their means."""
        units = [part[start : start + unit] for start in range(0, len(part), unit)]
        return sum(sum(rows) / len(rows) for rows in units) / len(units)

    batches = SharedBatches(range(rows), 8, processes=4, unit=unit)
    parts = list(batches)
    assert len(parts) == len(batches) == 4 * -(-rows // 8) and all(parts)
    for step in range(len(parts) // 4):
        mean = sum(batches.share(step, process) * loss(parts[4 * step + process]) / 4 for process in range(4))
        assert mean == pytest.approx(loss(list(range(8 * step, min(rows, 8 * step + 8)))))


# -- a lost process ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("domain", "options"), [("roberta", ""), ("roberta", SHARDED), ("llama", SHARDED)])
def test_a_process_lost_in_a_step_ends_the_run_which_goes_on_with_any_number(domain, options, tmp_path, monkeypatch):
    run, cut, lost = SHARED[domain](tmp_path).adding(options), tmp_path / "cut", SEED % 2
    whole, share = execute(run, tmp_path / "whole").finished(), ExperimentTrainer.loss_share

    def die(trainer):  # while the other waits for shards or gradients
        if trainer.args.process_index == lost and trainer.state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return share(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(ExperimentTrainer, "loss_share", die)
        attempts = together(run, cut, 2, alone=60)
    other = attempts[1 - lost]
    assert attempts[lost].killed and "another process of this run died" in other.refused() and "--resume" in other.said
    assert_nothing_half_written(cut)
    assert_goes_on(run, cut, losses(whole.output))
    if options:
        assert_goes_on(run.adding("--shard ddp"), cut, losses(whole.output), counts=(2,))


def test_torchrun_is_terminated_and_the_run_goes_on(tmp_path):
    run, cut, log = llama(tmp_path).adding("--max_steps 60 --eval_steps 5"), tmp_path / "cut", tmp_path / "log"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    with log.open("w") as file:
        words = [*launcher, "-m", run.program, *run.arguments, "--output_dir", str(cut)]
        process = subprocess.Popen(words, stdout=file, stderr=file)
    while not checkpoints(cut / "checkpoints"):
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
    process.terminate()
    assert process.wait(60) != 0
    (newest, *_), told = checkpoints(cut / "checkpoints"), log.read_text()
    assert f"{newest.name} is kept" in told and "--resume" in told, told
    execute(run, tmp_path / "one").finished()
    assert_goes_on(run, cut, losses(tmp_path / "one"), counts=(1, 2))


# -- shards -----------------------------------------------------------------------------------------------------


def check_shards(monkeypatch) -> None:
    """Have each process look at what it holds, and say so."""
    split = sharding.split_into_units

    def split_and_look(model, *arguments):
        trained = split(model, *arguments)
        frozen = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
        assert all(isinstance(parameter, DTensor) != parameter.requires_grad for parameter in model.parameters())
        assert sum(p.to_local().numel() for p in frozen) < 0.6 * sum(p.numel() for p in frozen)
        print("looked at the shards")
        return trained

    monkeypatch.setattr(sharding, "split_into_units", split_and_look)


@pytest.mark.parametrize(
    ("domain", "shard", "options"),
    [
        ("roberta", "", ""),
        ("llama", "", ""),
        ("roberta", "--shard fsdp2", "--memory lean"),
        ("roberta", "--shard fsdp2", "--memory balanced"),
        # padded, of an epoch's short last step one process has two micro-batches and the other has one
        ("llama", "accelerate launch", "--memory lean --batching padded"),
        ("llama", "accelerate launch", "--memory fast"),
    ],
)
def test_two_processes_have_the_losses_of_one_and_save_one_adapter(domain, shard, options, tmp_path, monkeypatch):
    run = SHARED[domain](tmp_path).adding(options)
    execute(run, tmp_path / "one").finished()
    if shard:
        check_shards(monkeypatch)
    if shard == "accelerate launch":  # which asks for it by these
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", "2")
    else:
        run = run.adding(shard)
    told = "".join(attempt.said for attempt in run_all(run, tmp_path / "two"))
    assert told.count("record in") == 1 and told.count("looked at the shards") == 2 * bool(shard)
    assert (read_record(tmp_path / "two" / "record.json").hyperparameters.get("shard") == "fsdp2") == bool(shard)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) >= 8 and two == pytest.approx(one, abs=1e-5)
    one, two = (load_file(tmp_path / name / ADAPTER) for name in ("one", "two"))
    assert one.keys() == two.keys() and all((value - two[name]).abs().max() < 1e-4 for name, value in one.items())


def test_a_sharded_half_precision_base_trains_float32_adapters_as_ddp_does(tmp_path, monkeypatch):
    run = llama(tmp_path).adding("--dtype bf16")
    run_all(run, tmp_path / "ddp")
    check_shards(monkeypatch)
    run_all(run.adding("--shard fsdp2"), tmp_path / "fsdp2")
    # the same computations on the same rows in the same processes
    assert losses(tmp_path / "fsdp2") == pytest.approx(losses(tmp_path / "ddp"), abs=1e-6)


@pytest.mark.parametrize(
    ("domain", "environment", "options", "told"),
    [
        ("roberta", "ACCELERATE_USE_FSDP", "", "FSDP1 is not supported: add --fsdp_version 2"),
        ("llama", "ACCELERATE_USE_FSDP FSDP_OFFLOAD_PARAMS", "", "--fsdp_offload_params true is not supported"),
        *((domain, "", "--shard fsdp2 --quantization nf4", "--quantization nf4 cannot be sharded") for domain in SHARED),
    ],
)
def test_what_cannot_be_sharded_is_refused(domain, environment, options, told, tmp_path, monkeypatch):
    for name in environment.split():
        monkeypatch.setenv(name, "true")
    monkeypatch.setenv("FSDP_VERSION", "2" if "OFFLOAD" in environment else "1")
    assert told in execute(SHARED[domain](tmp_path).adding(options), tmp_path / "run").refused()
    assert not (tmp_path / "run" / "record.json").exists()
