"""The scaling benchmark in two processes over gloo, on a tiny shape."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from control_experiments.errors import UserError

LAUNCHER = Path(__file__).resolve().parents[1] / "bench_scaling.sh"


def bench(*options):
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", LAUNCHER, "--device", "cpu", "--shape", "tiny", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=290, env=environment)


def test_two_processes_lose_what_one_loses(call, tmp_path):
    asked = (
        "--processes", 2, "--methods", "control:lean", "--batch", 2, "--tokens", 8, "--steps", 1, "--warmup", 1,
        "--output", tmp_path,
    )  # fmt: skip
    done = bench(*asked)
    assert done.returncode == 0, done.stderr
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
    code, stdout, stderr = call("bench_scaling", "--device", "cpu", "--shape", "tiny", *asked)
    assert code == 0 and "2 measured before" in stdout, stderr
    assert json.loads((tmp_path / "tiny_2x8.json").read_text())["results"] == record["results"]


def test_bad_input_is_one_line(tmp_path):
    done = bench("--output", tmp_path / "out", "--shards", "zero")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "unknown --shards 'zero': choose from ddp, fsdp2" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"methods": ["lora+compile"]}, "for one process"),
        ({"processes": [10_000]}, "this host has"),
        ({"longest": True}, "--longest needs GPUs"),
    ],
)
def test_what_cannot_be_is_said(options, message, monkeypatch):
    monkeypatch.syspath_prepend(LAUNCHER.parent)
    import bench_scaling

    with pytest.raises(UserError, match=message):
        bench_scaling.Options(device="cpu", shape="tiny", **options).check()
