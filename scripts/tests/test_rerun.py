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

from control_experiments.training.arguments import parse_arguments
from scripts import bench_memory
from scripts.rerun import Options, plan_cells

# Runs rerun.py for real; instead of a training or a benchmark it notes the call and writes a record.
INTERPRETER = """#!{python}
import json, os, sys, time
arguments = sys.argv[1:]
if arguments[:2] == ["-m", "scripts.rerun"]:
    os.execv({python!r}, [{python!r}, *arguments])
value = dict(zip(arguments[2:], arguments[3:]))
with open({notes!r}, "a") as file:
    file.write(json.dumps({{"pid": os.getpid(), "module": arguments[1], **value}}) + "\\n")
time.sleep(float(os.environ.get("FAKE_SECONDS", 0)))
if os.environ.get("FAKE_FAIL") in arguments:
    print("error: out of everything", file=sys.stderr)
    sys.exit(2)
folder, name = value.get("--output_dir"), "record.json"
if "--shape" in value:
    folder, name = value["--output"], f"{{value['--shape']}}_{{value['--batch']}}x{{value['--tokens']}}.json"
os.makedirs(folder, exist_ok=True)
with open(os.path.join(folder, name), "w") as file:
    json.dump({{"results": [{{"method": "lora"}}]}}, file)
"""
MEMORY = ("memory", "--tasks", "llama3-8b", "llama3-8b-short", "llama2-7b", "--methods", "lora", "--seeds", "1")
CPU = ("--gpus", "cpu")


class Reruns:
    def __init__(self, launching, root):
        self.launching, self.root, self.results, self.notes = launching, root, root / "results", root / "notes"
        (root / "python").write_text(INTERPRETER.format(python=sys.executable, notes=str(self.notes)))
        (root / "python").chmod(0o755)

    def launcher(self, table, *words, **variables):
        self.notes.write_text("")
        more = {"PYTHON": self.root / "python", **variables}
        return self.launching(f"scripts/rerun_{table}.sh", "--results", self.results, *words, **more)

    def run(self, *words, code=0, **variables):
        done = subprocess.run(**self.launcher(*words, **variables), capture_output=True, timeout=100)
        assert done.returncode == code, done.stderr
        return done

    @property
    def calls(self):
        return [json.loads(line) for line in self.notes.read_text().splitlines()]


@pytest.fixture
def reruns(launching, tmp_path):
    return Reruns(launching, tmp_path)


def test_a_table_is_run_cell_by_cell_and_then_skipped(reruns):
    assert "all 6 cells are finished" in reruns.run(*MEMORY, "2", *CPU).stdout
    folder = str(reruns.results / "memory")
    assert [call["--output"] for call in reruns.calls] == [folder] * 3 + [f"{folder}/repeat2"] * 3
    assert {call["--device"] for call in reruns.calls} == {"cpu"}
    assert reruns.run(*MEMORY, "2", *CPU) and not reruns.calls
    other = reruns.run(*(word.replace("lora", "dora") for word in MEMORY), *CPU, code=2)
    assert "has methods lora, not dora" in other.stderr and not reruns.calls


def test_cells_go_to_all_gpus(reruns):
    reruns.run(*MEMORY, "2", "--gpus", "0", "1", FAKE_SECONDS=2)
    assert len(reruns.calls) == 6 and {call["--device"] for call in reruns.calls} == {"0", "1"}


def test_a_failed_cell_is_listed_at_the_end_and_stops_no_other(reruns):
    done = reruns.run(*MEMORY, *CPU, code=2, FAKE_FAIL="llama3-8b")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    for name in ("llama3-8b_repeat1", "llama3-8b-short_repeat1"):
        assert f"{name} failed: error: out of everything (exit code 2, log: " in line
        assert (reruns.results / "logs" / "memory" / f"{name}.log").is_file()
    assert len(reruns.calls) == 3 and reruns.run(*MEMORY, *CPU) and len(reruns.calls) == 2


def test_no_cell_starts_when_time_is_up(reruns):
    done = reruns.run(*MEMORY, *CPU, "--max-hours", "0.0001", FAKE_SECONDS=1)
    assert len(reruns.calls) == 1 and "does not fit into 0.006 minutes" in done.stdout


def test_a_training_is_left_to_its_launcher(reruns):
    """Which skips a finished run, and refuses one with other settings."""
    table = ("commonsense", "--tasks", "llama3_8b", "--methods", "double control", "zero-shot", "--seeds", "5", "6", *CPU)
    for _ in range(2):
        reruns.run(*table)
        modules = [call["module"].removeprefix("LlaMA.") for call in reruns.calls]
        assert modules == ["finetune", "evaluate", "evaluate", "finetune", "evaluate"]  # zero-shot has no seeds
    failed = reruns.run(*table, code=2, FAKE_FAIL="LlaMA.finetune")
    assert "llama3_8b_double-control-seed5 failed: error: out of everything" in failed.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupting_ends_the_running_cells_and_starts_no_other(reruns, number, code):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with it ignored
    command = reruns.launcher(*MEMORY, "--gpus", "0", "1", FAKE_SECONDS=60)
    process = subprocess.Popen(**command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.time() + 60
    while len(reruns.calls) < 2 and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == code and "Traceback" not in errors
    assert len(reruns.calls) == 2
    for call in reruns.calls:
        with pytest.raises(ProcessLookupError):
            os.kill(call["pid"], 0)


BENCH = r"\S+ -m scripts.bench_memory --shape"
LLAMA3 = r"bash LlaMA/llama3_8B_DoubleControl.sh 64 32 64 out/llama/llama3_8b"


@pytest.mark.parametrize(
    ("table", "words", "wanted"),
    [
        ("commonsense", ("llama3_8b", "--methods", "double control", "--seeds", 5), rf"SEED=5 {LLAMA3}/double-control-seed5 {{gpu}} --resume"),
        ("commonsense", ("llama3_8b", "--methods", "dora", "--seeds", 5), rf"SEED=5 METHOD=dora {LLAMA3}/dora-seed5 {{gpu}} --resume"),
        ("commonsense", ("llama2_7b", "--methods", "zero-shot"), r"bash LlaMA/llama2_7B_Evaluate.sh 64 32 64 out/llama/llama2_7b/zero-shot {gpu} zero-shot"),
        ("memory", ("llama3-8b-profile", "--seeds", 1), rf"{BENCH} .* --profile --device {{gpu}} --output out/memory --methods lora\+liger control:fast .*"),
        ("memory", ("vit-b16", "--seeds", 2, "--extra", "--steps 2"), rf"{BENCH} vit-b16 --batch 128 --device {{gpu}} --output out/memory/repeat2 --steps 2"),
    ],
)  # fmt: skip
def test_dry_runs_print_the_calls(call, started, table, words, wanted):
    (command,) = started(f"scripts/rerun_{table}.sh", "--results", "out", "--dry_run", "--tasks", *words)
    assert re.fullmatch(wanted, call(*command).finished().out.strip())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tasks", "nope"), "has no 'nope': choose from llama3-8b,"),
        (("--gpus", "x"), "--gpus takes indices, cpu or all, got 'x'"),
        (("--nonsense",), "--nonsense"),
    ],
)
def test_bad_arguments_are_one_line(call, words, message):
    assert message in call("scripts.rerun", "--table", "memory", *words).refused()


def test_each_benchmark_writes_the_file_that_is_looked_for(monkeypatch, tmp_path):
    monkeypatch.setattr("control_experiments.training.benchmarking.choose_device", lambda name: "cuda")
    for cell in plan_cells(Options(table="memory", results=str(tmp_path))):
        (options,) = parse_arguments(bench_memory.Options, argv=cell.command[3:])
        assert Path(options.output, options.with_defaults().file_name()) == cell.record
