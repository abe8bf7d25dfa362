"""The memory benchmark on tiny shapes on the CPU: the workers, the record, the picture, bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "bench_memory.py"


def bench(*options):
    command = [sys.executable, SCRIPT, "--device", "cpu", "--steps", "2", "--warmup", "1", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize(
    "shape, methods",
    [("tiny", ("lora", "control:fast")), ("tiny-vit", ("control:lean",)), ("tiny-roberta", ("dora",))],
)
def test_measures_each_method_and_writes_a_record(shape, methods, tmp_path):
    done = bench("--shape", shape, "--batch", 2, "--tokens", 8, "--output", tmp_path, "--methods", *methods)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / f"{shape}_2x8.json").read_text())
    assert [result["method"] for result in record["results"]] == list(methods)
    for result in record["results"]:
        assert (
            result["trained_parameters"] > 0 and result["loss"] > 0 and len(result["step_seconds_all"]) == 2
        )
    assert (tmp_path / f"{shape}_2x8.png").stat().st_size > 1000
    if shape == "tiny":
        assert "control:fast" in done.stdout.split("against lora (fastest)")[1]


@pytest.mark.parametrize(
    "options, message",
    [
        (("--shape", "huge"), "unknown --shape 'huge': choose from llama3-8b"),
        (("--methods", "lora:fast"), "no such memory mode"),
        (("--methods", "prefix"), "unknown method 'prefix'"),
        (("--shape", "vit-b16", "--methods", "lora+liger"), "no switches but checkpointing"),
        (("--limit", 3), "--limit needs a GPU"),
        (("--batch", 0), "--batch must be at least 1"),
    ],
)
def test_bad_input_is_one_line(options, message, tmp_path):
    done = bench("--output", tmp_path / "out", *options)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
