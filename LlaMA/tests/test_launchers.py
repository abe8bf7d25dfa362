"""The launchers as users type them, from another folder."""

import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import psutil
import pytest

from control_experiments.record import read_record
from control_experiments.training.checkpoints import checkpoints
from LlaMA import demo
from LlaMA.commonsense import TASKS, offered_words, read_tests

FOLDER = Path(__file__).resolve().parents[1]
KINDS = ("Control+LoRA", "DoubleControl", "Evaluate")
ALL = [f"llama{base}_{kind}.sh" for base in ("2_7B", "3_8B") for kind in KINDS]
ALL += ["run_smollm2_table.sh", "compare_memory_modes.sh"]


def called(name, *arguments, **variables) -> dict:
    """What to give to subprocess for a launcher's call."""
    environment = {**os.environ, "PYTHON": sys.executable}
    environment |= {key: str(value) for key, value in variables.items()}
    return {"args": ["bash", str(FOLDER / name), *map(str, arguments)], "env": environment, "text": True}


def launch(name, *arguments, cwd, **variables):
    return subprocess.run(**called(name, *arguments, **variables), cwd=cwd, capture_output=True, timeout=280)


@pytest.fixture
def launch_here(call, noting, monkeypatch, tmp_path):
    """Call a launcher and run the programs that it starts in this process: (exit code, stdout, stderr) of each."""

    def run(name, *arguments, **variables):
        done = launch(name, *arguments, cwd=tmp_path, PYTHON=noting.interpreter, **variables)
        assert done.returncode == 0, done.stderr
        ended = []
        for command in noting.calls:
            module, *words = command[1:]
            monkeypatch.setattr(sys, "argv", [module, *words])
            program = import_module(module)
            ended.append(call(lambda _, main=program.main: main()))
        return ended

    return run


def test_a_trial_needs_no_model_and_no_data(launch_here, tmp_path, monkeypatch):
    """The README's, with less reading, training and asking."""
    monkeypatch.setenv("PARALLEL_CONTROL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "STEPS", 4)
    ended = launch_here(
        "llama3_8B_DoubleControl.sh", 8, 2, 4, tmp_path / "out", "cpu", "--max_steps", 2, "--eval_steps", 1,
        MODEL="tiny", DATA="demo", HELD_OUT=8, BATCH=4, MICRO_BATCH=4, EVALUATE_ARGS="--limit 2 --mode likelihood",
    )  # fmt: skip
    assert [code for code, _, _ in ended] == [0, 0], ended
    record = read_record(tmp_path / "out" / "record.json")
    assert (record.method, record.hyperparameters["lr"]) == ("double control", 1e-4)
    assert (record.model["id"], record.data["id"]) == ("tiny", "demo") and record.data["sha256"]
    evaluated = read_record(tmp_path / "out" / "likelihood" / "record.json")
    assert evaluated.data["sizes"] == dict.fromkeys(TASKS, 2)
    rows = read_tests(demo.demo_folder(), list(TASKS))
    assert all(row.answer in offered_words(row, TASKS[task]) for task, part in rows.items() for row in part)


@pytest.mark.parametrize("name", [*ALL, "../QControl/run_llama_quantization.sh"])
def test_help_and_too_few_arguments_print_the_usage(name, tmp_path):
    done = launch(name, cwd=tmp_path)
    assert done.returncode == 2 and ("usage: bash" if name in ALL else "are needed") in done.stderr
    done = launch(name, "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"bash {Path('LlaMA', name) if '..' not in name else name[3:]} " in done.stdout
    assert "  MODEL=" in done.stdout and "  DATA=" in done.stdout


def test_data_is_looked_for_where_it_is(tmp_path):
    """In what PARALLEL_CONTROL_SHARED names, else in ../shared if that is there, else in the checkout's own data/."""

    def answered(**variables):
        words = (4, 2, 4, "out", "cpu", "control")
        done = launch("llama3_8B_Evaluate.sh", *words, cwd=tmp_path, PYTHON="echo", **variables)
        return done.stdout.splitlines()[-1].partition("--data ")[2].partition(" --output_dir")[0]

    root = FOLDER.parent
    shared = (root.parent / "shared" / "data" / "commonsense").resolve()
    assert answered(PARALLEL_CONTROL_SHARED="/srv/shared") == "/srv/shared/data/commonsense"
    assert answered(DATA="/srv/my data") == "/srv/my data"
    own = answered(PARALLEL_CONTROL_SHARED="")
    assert Path(own).resolve() == (shared if shared.is_dir() else root / "data" / "commonsense")


def test_missing_data_says_where_it_comes_from(model_folder, tmp_path):
    done = launch("llama3_8B_DoubleControl.sh", 4, 2, 4, "out", "cpu", cwd=tmp_path, MODEL=model_folder, DATA="nowhere")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: cannot read nowhere/commonsense_170k.json")
    assert "AGI-Edgerunners/LLM-Adapters" in line and "TRAIN_DATA=" in line and "DATA=" in line
    assert not (tmp_path / "out").exists()


def test_answers_ranked_by_likelihood_have_a_folder_of_their_own(tmp_path):
    def folder(*more, name="llama3_8B_Evaluate.sh", first=(4, 2, 4, "out", "cpu", "control"), **variables):
        done = launch(name, *first, *more, cwd=tmp_path, PYTHON="echo", **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1].partition("--output_dir ")[2].split()[0]

    assert folder() == folder("--mode", "generate") == "out/evaluation"
    assert folder("--mode", "likelihood") == "out/likelihood"
    assert folder(EVALUATE_ARGS="--limit 3 --mode=likelihood") == "out/likelihood"
    assert folder("--mode", "likelihood", EVALUATION="other") == "out/other"
    table = {"name": "run_smollm2_table.sh", "first": ("out", "cpu"), "METHODS": "zero-shot"}
    assert folder(**table) == "out/zero-shot"
    assert folder(**table, EVALUATE_ARGS="--mode likelihood") == "out/zero-shot-likelihood"


def test_the_table_script_runs_all_methods(tmp_path):
    done = launch("run_smollm2_table.sh", "out", "0", "--max_steps", "3", cwd=tmp_path, PYTHON="echo", QUESTIONS=5)
    assert done.returncode == 0, done.stderr
    printed = [line for line in done.stdout.splitlines() if not line.startswith("+")]
    assert len(printed) == 1 + 2 * 4
    assert all("--max_steps 3" in line for line in printed if "LlaMA.finetune" in line)
    assert all("--limit 5" in line for line in printed if "LlaMA.evaluate" in line)
    assert "out/double-control-seed42/adapter" in done.stdout


def test_memory_modes_are_compared(launch_here, model_folder, data, tmp_path):
    ended = launch_here(
        "compare_memory_modes.sh", tmp_path / "out", "cpu", "--held_out", 4, "--control_rank", 4, "--warmup_steps", 0,
        MODEL=model_folder, TRAIN_DATA=data / "train.json", STEPS=4, EVAL_STEPS=2, BATCH=4, MICRO_BATCH=4, LR=0.03,
        MODES="lean",
    )  # fmt: skip
    assert [code for code, _, _ in ended] == [0, 0, 0, 0], ended
    lines = (tmp_path / "out" / "curves.md").read_text().splitlines()
    rows = [line.split(" | ") for line in lines if "record.json" in line]
    distances = {row[0].split("]")[0].strip("| ["): float(row[2]) for row in rows}
    assert list(distances) == ["plain", "lean", "other-seed"]
    assert max(distances["plain"], distances["lean"]) <= 1e-3 < distances["other-seed"]
    assert (tmp_path / "out" / "curves.png").stat().st_size > 1000


#: In the place of the interpreter: says that it runs, and upon a signal which one, a moment later.
STUB = """#!{python}
import signal, sys, time
def end(number, _):
    time.sleep(0.3)
    print("saved", number, flush=True)
    sys.exit(128 + number)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, end)
print("running", flush=True)
time.sleep(60)
"""
LAUNCHERS = {
    "llama2_7B_Control+LoRA.sh": (4, 2, 4, "out", "cpu"),
    "llama3_8B_Evaluate.sh": (4, 2, 4, "out", "cpu", "control+lora"),
    "run_smollm2_table.sh": ("out", "cpu"),
    "compare_memory_modes.sh": ("out", "cpu"),
    "../QControl/run_llama_quantization.sh": ("control", 4, 2, 4, "out", "cpu"),
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_signal_reaches_the_program_whose_end_is_waited_for(name, number, tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with it ignored
    stub = tmp_path / "python"
    stub.write_text(STUB.format(python=sys.executable))
    stub.chmod(0o755)
    call = called(name, *LAUNCHERS[name], PYTHON=stub)
    with subprocess.Popen(**call, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as launcher:
        command, program = (launcher.stdout.readline() for _ in range(2))
        assert command.startswith("+ ") and program == "running\n"
        launcher.send_signal(number)
        said = launcher.stdout.read()
    assert launcher.returncode == 128 + number
    assert said == f"saved {number}\n"  # and nothing was started after it


def test_a_terminated_launcher_leaves_a_checkpoint_and_no_process(model_folder, data, tmp_path):
    call = called(
        "llama3_8B_DoubleControl.sh", 4, 2, 4, tmp_path / "out", "cpu", "--max_steps", 2000, "--held_out", 4,
        MODEL=model_folder, DATA=data, TRAIN_DATA=data / "train.json", EVAL_STEPS=5,
    )  # fmt: skip
    with subprocess.Popen(**call, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as launcher:
        while not checkpoints(tmp_path / "out" / "checkpoints"):
            assert launcher.poll() is None, launcher.stderr.read()
            time.sleep(0.05)
        (program,) = psutil.Process(launcher.pid).children()
        # as a scheduler does that signals every process of a job: with what the launcher passes on it comes twice
        program.send_signal(signal.SIGTERM)
        launcher.send_signal(signal.SIGTERM)
        _, said = launcher.communicate(timeout=60)
    assert launcher.returncode == 143
    (newest, *_) = checkpoints(tmp_path / "out" / "checkpoints")
    assert f"terminated; {newest.name} is kept: add --resume" in said
    assert not program.is_running()
    assert not (tmp_path / "out" / "evaluation").exists()
