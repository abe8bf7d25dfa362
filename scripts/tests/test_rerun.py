"""rerun_commonsense.sh and rerun_memory.sh as users type them, and signals to launchers; the interpreter notes how it is called, or fails."""

import os
import signal
import subprocess
import sys

import pytest

from scripts.tests.test_readmes import parsed

#: In the place of the interpreter: says what it measures, and fails or takes long if asked to; a signal ends it a moment later.
STUB = """#!{python}
import os, signal, sys, time
def end(number, _):
    time.sleep(0.3)
    os.write(1, b"saved %d\\n" % number)  # not print, which the signal may have interrupted
    sys.exit(128 + number)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, end)
print("measuring", *sys.argv[1:], flush=True)
if os.environ.get("FAIL") in sys.argv:
    sys.exit(2)
time.sleep(float(os.environ.get("TAKES", 0)))
"""
MEMORY = ("scripts/rerun_memory.sh", "--tasks", "llama3-8b", "vit", "llama2-7b-recipe", "--seeds", 1, 2)


@pytest.fixture
def stub(tmp_path):
    path = tmp_path / "python"
    path.write_text(STUB.format(python=sys.executable))
    path.chmod(0o755)
    return path


def test_each_repeat_of_a_benchmark_has_a_folder_of_its_own(noted):
    command = " ".join(map(str, MEMORY)) + " --results out --gpus 1 --warmup 4"
    found = [parsed(call) for call in noted(f"bash {command}")]
    folders = ("out/memory", "out/memory/published_vit", "out/memory/recipes")
    repeats = ("out/memory/repeat2", "out/memory/repeat2/published_vit", "out/memory/repeat2/recipes")
    assert [options.output.removesuffix("/.") for options in found] == [*folders, *repeats]
    assert {(options.device, options.warmup) for options in found} == {("1", 4)}
    assert found[:3] == [type(options)(**{**vars(options), "output": found[n].output}) for n, options in enumerate(found[3:])]


def test_a_failed_benchmark_is_listed_at_the_end_and_stops_no_other(launch, stub):
    done = launch(*MEMORY, PYTHON=stub, FAIL="vit-b16")
    assert done.code == 2 and done.out.count("measuring") == 6
    assert done.err.splitlines()[-1] == "error: not measured, for the reasons above: vit (repeat 1),vit (repeat 2)"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("rerun_memory.sh", "--tasks", "nope"), "error: the memory table has no 'nope': choose from llama3-8b "),
        (("rerun_memory.sh", "--gpus", "0", "1"), "error: --gpus takes one GPU here"),
        (("rerun_commonsense.sh", "--tasks", "nope"), "error: the commonsense table has no 'nope': choose from llama2_7b"),
        (("rerun_commonsense.sh", "--gpus", "x"), "error: --gpus takes indices, cpu or all, got 'x'"),
        (("rerun_glue.sh", "--tasks", "colla"), "error: unknown task 'colla': choose one of cola, "),
        (("bench_scaling.sh", "--device", "cpu", "--shards", "zero"), "error: argument --shards: invalid choice: 'zero'"),
    ],
)
def test_bad_arguments_are_one_line_and_leave_nothing(launch, words, message, tmp_path):
    done = launch(f"scripts/{words[0]}", *words[1:])
    assert done.code == 2 and done.err.startswith(message) and not [*tmp_path.iterdir()]


def test_an_open_quote_is_one_line(launch):
    done = launch("RoBERTa/run_study.sh", "cpu", METHODS="'control")
    assert (done.code, done.err) == (2, "error: a quote in METHODS is not closed: 'control\n")


LAUNCHERS = [
    MEMORY,
    ("scripts/rerun_commonsense.sh", "--gpus", "cpu"),
    ("LlaMA/llama2_7B_Control+LoRA.sh", 4, 2, 4, "out", "cpu"),
    ("LlaMA/run_study.sh", "cpu"),
    ("QControl/run_llama_quantization.sh", "control", 4, 2, 4, "out", "cpu"),
]


@pytest.mark.parametrize(  # a terminal sends Ctrl-C to all processes of a command
    ("send", "number"), [(os.kill, signal.SIGINT), (os.kill, signal.SIGTERM), (os.killpg, signal.SIGINT)]
)
@pytest.mark.parametrize("call", LAUNCHERS, ids=[call[0] for call in LAUNCHERS])
def test_a_signal_reaches_the_program_whose_end_is_waited_for_and_nothing_begins_after_it(launching, stub, call, send, number):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with it ignored
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
    with subprocess.Popen(**launching(*call, PYTHON=stub, TAKES=60), **how) as launcher:
        command, measuring = (launcher.stdout.readline() for _ in range(2))
        assert command.startswith("+ ") and measuring.startswith("measuring")
        send(launcher.pid, number)
        said = launcher.stdout.read()
        assert said.startswith(f"saved {number:d}\n") and "measuring" not in said
    assert launcher.returncode == 128 + number
