"""The scaling benchmark in two processes over gloo, on a tiny shape."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from control_experiments.errors import UserError
from scripts import bench_scaling, scaling


def test_two_processes_lose_what_one_loses(call, tmp_path):
    asked = (
        "--device", "cpu", "--shape", "tiny", "--processes", 2, "--methods", "control:lean", "--batch", 2, "--tokens", 8,
        "--steps", 1, "--warmup", 1, "--output", tmp_path,
    )  # fmt: skip
    call("scripts.bench_scaling", *asked).finished()
    record = json.loads((tmp_path / "tiny_2x8.json").read_text())
    cells = {(cell["shard"], cell["processes"]): cell for cell in record["results"]}
    assert set(cells) == {("ddp", 2), ("fsdp2", 2)}
    for cell in cells.values():
        assert cell["tokens_per_second"] > 0 and len(cell["losses"]) == 3
        assert cell["loss_distance"] <= 1e-5  # from those of one process
    adapters = 2 * 2 * 2 * 64 * 64  # two layers, two blocks, A and B of rank 64 and width 64
    assert cells["ddp", 2]["sent_bytes_per_process"] == pytest.approx(4 * adapters, abs=200)
    assert cells["fsdp2", 2]["sent_bytes_per_process"] > 2 * 4 * adapters
    assert (tmp_path / "tiny_2x8.png").stat().st_size > 1000

    # a run that was killed after both measurements
    (tmp_path / "tiny_2x8.json").rename(tmp_path / "tiny_2x8.json.partial")
    assert "2 measured before" in call("scripts.bench_scaling", *asked).finished().out
    assert json.loads((tmp_path / "tiny_2x8.json").read_text())["results"] == record["results"]


def test_the_launcher_refuses_in_one_line(launch, tmp_path):
    words = ("--device", "cpu", "--shape", "tiny", "--output", tmp_path / "out", "--shards", "zero")
    assert "unknown --shards 'zero': choose from ddp, fsdp2" in launch("scripts/bench_scaling.sh", *words).refused()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"methods": ["lora+nf4"]}, "over several processes bf16 bases"),
        ({"methods": ["lora+compile"]}, "over several processes bf16 bases"),
        ({"processes": [10_000]}, "this host has"),
        ({"longest": True}, "--longest needs GPUs"),
        ({"limit": 23.5}, "--limit goes with --longest"),
        ({"limit": 0}, "--limit must be greater than 0"),
    ],
)
def test_what_cannot_be_is_said(options, message):
    with pytest.raises(UserError, match=message):
        bench_scaling.Options(device="cpu", shape="tiny", **options).check()


def test_the_longest_sequence_outlives_the_attempt_that_does_not_fit(monkeypatch, tmp_path, capfd):
    """Of the worker, which runs out of memory or is killed, and of what its parent makes of that."""
    options = bench_scaling.Options(shape="tiny", longest=True, tokens=512, worker="lora")

    def step_within(limit):
        def step(number, tokens):
            if tokens > limit:
                raise MemoryError(f"{tokens} tokens")

        return step

    def torchrun(command, **_):
        result = Path(command[command.index("--result") + 1])
        with pytest.raises(MemoryError) as error:
            scaling.longest(options, step_within(limit), result)
        return subprocess.CompletedProcess(command, 1, stderr=f"Traceback:\n{error.type.__name__}: {error.value}\n")

    monkeypatch.setattr(scaling.subprocess, "run", torchrun)
    limit = 5000
    cell = scaling.run_cell(options, "lora", "fsdp2", 2)
    assert (cell["longest_tokens"], cell["ended_by"]) == (4096, "MemoryError: 6144 tokens")
    assert "4096 tokens, then MemoryError: 6144 tokens" in scaling.line(cell, None)
    said = capfd.readouterr().out
    assert "lora: 4096 tokens, 0 s" in said and "6144" not in said
    limit = 100
    cell = scaling.run_cell(options, "lora", "fsdp2", 2)
    assert cell["error"] == "MemoryError: 512 tokens" and "longest_tokens" not in cell

    monkeypatch.setattr(scaling, "LONGEST", 2048)
    scaling.longest(options, step_within(10_000), tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text()) == {"longest_tokens": 2048}


@pytest.mark.parametrize(
    "ends, said",
    [
        ("print('MildError: a line of a log', file=sys.stderr); os.kill(os.getpid(), signal.SIGKILL)", "Signal 9 (SIGKILL)"),
        ("raise RuntimeError('out of memory')", "RuntimeError: out of memory"),
    ],
)
def test_a_cell_says_why_the_first_process_ended(ends, said, tmp_path):
    """The other one waits for it, and is ended by torchrun."""
    script = tmp_path / "ends.py"
    script.write_text(f"import os, signal, sys, time\nif os.environ['RANK'] == '0':\n    time.sleep(60)\n{ends}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode and said in scaling.cause(done.stderr), done.stderr
    assert scaling.cause("") == "no result"
