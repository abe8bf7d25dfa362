"""The kernel benchmark on the CPU, where ours is the torch path."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "bench_kernels.py"


def bench(*options):
    command = [sys.executable, SCRIPT, "--device", "cpu", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def test_compares_every_operation(tmp_path):
    done = bench("--peers", "torch", "--tokens", 8, "--vocabulary", 99, "--repeats", 2, "--output", tmp_path / "k.json")
    assert done.returncode == 0 and not done.stderr, done.stderr
    results = json.loads((tmp_path / "k.json").read_text())["results"]
    assert len(results) == 5 and done.stdout.count("(time x") == 5
    assert all(row["ours"]["seconds"] > 0 and row["torch"]["seconds"] > 0 for row in results)


def test_bad_input_is_one_line(call, tmp_path):
    code, _, stderr = call("bench_kernels", "--device", "cpu", "--output", tmp_path / "k.json")
    assert code == 2 and "--peers torch" in stderr and stderr.count("\n") == 1
    assert not (tmp_path / "k.json").exists()
