"""rerun_commonsense.sh and rerun_memory.sh with an interpreter that writes a record instead of training."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from control_experiments.paths import REPOSITORY
from control_experiments.training.arguments import parse_arguments
from scripts import bench_memory
from scripts.rerun import Options, plan_cells

# Runs rerun.py for real; instead of a training or a benchmark it notes the call and writes a record.
INTERPRETER = """#!{python}
import json, os, sys, time
arguments = sys.argv[1:]
if arguments[:2] == ["-m", "scripts.rerun"]:
    os.execv({python!r}, [{python!r}, *arguments])
module, value = arguments[1], dict(zip(arguments[2:], arguments[3:]))
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps({{"pid": os.getpid(), "arguments": arguments}}) + "\\n")
time.sleep(float(os.environ.get("FAKE_SECONDS", 0)))
if os.environ.get("FAKE_FAIL") in arguments:
    print("error: out of everything", file=sys.stderr)
    sys.exit(2)
if module == "scripts.bench_memory":
    folder, name = value["--output"], f"{{value['--shape']}}_{{value['--batch']}}x{{value.get('--tokens', 197)}}.json"
else:
    folder, name = value["--output_dir"], "record.json"
os.makedirs(folder, exist_ok=True)
with open(os.path.join(folder, name), "w") as file:
    json.dump({{"results": [{{"method": "lora"}}]}}, file)
"""
MEMORY = ("memory", "--tasks", "llama3-8b", "llama3-8b-short", "llama2-7b", "--methods", "lora", "--seeds", "1")


class Reruns:
    def __init__(self, root):
        self.results, self.calls_file, interpreter = root / "results", root / "calls", root / "fake-python"
        interpreter.write_text(INTERPRETER.format(python=sys.executable))
        interpreter.chmod(0o755)
        self.environment = {**os.environ, "PYTHON": str(interpreter), "CALLS": str(self.calls_file)}
        for name in ("MODEL", "DATA", "EPOCHS", "LR", "CUDA_VISIBLE_DEVICES"):
            self.environment.pop(name, None)

    def command(self, table, *arguments):
        launcher = REPOSITORY / "scripts" / f"rerun_{table}.sh"
        return ["bash", str(launcher), "--results", str(self.results), *arguments]

    def run(self, table, *arguments, **environment):
        self.calls_file.write_text("")
        piped = dict(env={**self.environment, **environment}, capture_output=True, text=True, timeout=100)
        return subprocess.run(self.command(table, *arguments), **piped)

    @property
    def calls(self):
        return [json.loads(line) for line in self.calls_file.read_text().splitlines()]

    def options(self, name):
        """What each call says of an option."""
        return [call["arguments"][call["arguments"].index(name) + 1] for call in self.calls]


@pytest.fixture
def reruns(tmp_path):
    return Reruns(tmp_path)


def test_a_table_is_run_cell_by_cell_and_then_skipped(reruns):
    memory = (*MEMORY, "2", "--gpus", "cpu")
    done = reruns.run(*memory)
    assert done.returncode == 0 and "all 6 cells are finished" in done.stdout, done.stderr
    folder = str(reruns.results / "memory")
    assert reruns.options("--output") == [folder] * 3 + [f"{folder}/repeat2"] * 3
    assert set(reruns.options("--device")) == {"cpu"}
    assert reruns.run(*memory).returncode == 0 and not reruns.calls
    other = reruns.run(*(word.replace("lora", "dora") for word in memory))
    assert other.returncode == 2 and "has methods lora, not dora" in other.stderr and not reruns.calls


def test_cells_go_to_all_gpus_one_at_a_time_on_each(reruns):
    assert reruns.run(*MEMORY, "2", "--gpus", "0", "1", FAKE_SECONDS="2").returncode == 0
    assert len(reruns.calls) == 6 and {*reruns.options("--device")} == {"0", "1"}


def test_a_failed_cell_is_listed_at_the_end_and_stops_no_other(reruns):
    done = reruns.run(*MEMORY, "--gpus", "cpu", FAKE_FAIL="llama3-8b")
    assert done.returncode == 2 and len(reruns.calls) == 3
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    for name in ("llama3-8b_repeat1", "llama3-8b-short_repeat1"):
        assert f"{name} failed: error: out of everything (exit code 2, log: " in line
        assert (reruns.results / "logs" / "memory" / f"{name}.log").is_file()
    assert reruns.run(*MEMORY, "--gpus", "cpu").returncode == 0 and len(reruns.calls) == 2


def test_no_cell_starts_when_time_is_up(reruns):
    done = reruns.run(*MEMORY, "--gpus", "cpu", "--max-hours", "0.0001", FAKE_SECONDS="1")
    assert done.returncode == 0 and len(reruns.calls) == 1 and "does not fit into 0.006 minutes" in done.stdout


def test_a_training_is_left_to_its_launcher(reruns):
    """Which skips a finished run, and refuses one with other settings: LlaMA/tests have both."""
    table = (
        "commonsense",
        "--tasks",
        "llama3_8b",
        "--methods",
        "double control",
        "zero-shot",
        "--seeds",
        "5",
        "6",
        "--gpus",
        "cpu",
    )
    for _ in range(2):
        assert reruns.run(*table).returncode == 0
        modules = [call["arguments"][1] for call in reruns.calls]
        assert modules == ["LlaMA.finetune", "LlaMA.evaluate", "LlaMA.evaluate", "LlaMA.finetune", "LlaMA.evaluate"]
        assert {"double-control-seed5", "double-control-seed6"} < {
            path.name for path in (reruns.results / "llama" / "llama3_8b").iterdir()
        }
    failed = reruns.run(*table, FAKE_FAIL="LlaMA.finetune")
    assert "llama3_8b_double-control-seed5 failed: error: out of everything" in failed.stderr and failed.returncode == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupting_ends_the_running_cells_and_starts_no_other(reruns, number, code):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with it ignored
    process = subprocess.Popen(
        reruns.command(*MEMORY, "--gpus", "0", "1"), env={**reruns.environment, "FAKE_SECONDS": "60"},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.time() + 60
    while not (reruns.calls_file.exists() and len(reruns.calls) == 2) and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == code and "Traceback" not in errors
    assert len(reruns.calls) == 2
    for call in reruns.calls:
        with pytest.raises(ProcessLookupError):
            os.kill(call["pid"], 0)


@pytest.mark.parametrize(
    ("table", "arguments", "wanted"),
    [
        ("commonsense", ("--tasks", "llama3_8b", "--methods", "double control", "--seeds", "5"),
         r"SEED=5 bash LlaMA/llama3_8B_DoubleControl.sh 64 32 64 \S+/llama/llama3_8b/double-control-seed5 {gpu} --resume"),
        ("commonsense", ("--tasks", "llama3_8b", "--methods", "control+dora", "--seeds", "5"),
         r"SEED=5 METHOD=control\+dora bash LlaMA/llama3_8B_DoubleControl.sh 64 32 64 \S+/llama/llama3_8b/control\+dora-seed5 {gpu} --resume"),
        ("commonsense", ("--tasks", "llama2_7b", "--methods", "zero-shot"),
         r"bash LlaMA/llama2_7B_Evaluate.sh 64 32 64 \S+/llama/llama2_7b/zero-shot {gpu} zero-shot"),
        ("memory", ("--tasks", "vit", "--seeds", "2"), r"\S+ -m scripts.bench_memory .* --output \S+/memory/repeat2/published_vit --methods lora\+eager .*"),
        ("memory", ("--tasks", "llama3-8b-profile", "--seeds", "1"),
         r"\S+ -m scripts.bench_memory --shape llama3-8b .* --profile --device {gpu} --output \S+ --methods lora\+liger control:fast .*"),
        ("memory", ("--tasks", "vit-b16", "--seeds", "2"),
         r"\S+ -m scripts.bench_memory --shape vit-b16 --batch 128 --device {gpu} --output \S+/memory/repeat2"),
    ],
)  # fmt: skip
def test_dry_runs_print_the_calls(reruns, table, arguments, wanted):
    done = reruns.run(table, *arguments, "--dry_run")
    assert done.returncode == 0, done.stderr
    _, call = done.stdout.splitlines()
    assert re.fullmatch(wanted, call), call


def test_each_benchmark_writes_the_file_that_is_looked_for(monkeypatch, tmp_path):
    monkeypatch.setattr("control_experiments.training.benchmarking.choose_device", lambda name: "cuda")
    for cell in plan_cells(Options(table="memory", results=str(tmp_path))):
        (options,) = parse_arguments(bench_memory.Options, argv=cell.command[3:])
        assert Path(options.output, options.with_defaults().file_name()) == cell.record


@pytest.mark.parametrize(
    ("table", "arguments", "message"),
    [
        ("memory", ("--tasks", "nope"), "has no 'nope': choose from llama3-8b,"),
        ("memory", ("--gpus", "x"), "--gpus takes indices, cpu or all, got 'x'"),
        ("memory", ("--nonsense",), "--nonsense"),
    ],
)
def test_bad_arguments_are_one_line(reruns, table, arguments, message):
    done = reruns.run(table, *arguments)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not reruns.results.exists()
