"""rerun_*.sh with an interpreter that writes a record instead of training."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from control_experiments.paths import REPOSITORY

# Runs rerun.py for real; instead of a training it notes the call and writes a record with the learning rate's score.
INTERPRETER = """#!{python}
import json, os, sys, time
arguments = sys.argv[1:]
if arguments[:2] == ["-m", "scripts.rerun"]:
    os.execv({python!r}, [{python!r}, *arguments])
module, value = arguments[1], dict(zip(arguments[2:], arguments[3:]))
noted = {{name: os.environ.get(name) for name in ("SEED", "DATA", "CUDA_VISIBLE_DEVICES")}}
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps({{"pid": os.getpid(), "arguments": arguments, **noted}}) + "\\n")
time.sleep(float(os.environ.get("FAKE_SECONDS", 0)))
if os.environ.get("FAKE_FAIL") in arguments:
    print("error: out of everything", file=sys.stderr)
    sys.exit(2)
if module == "scripts.bench_memory":
    options = {{"shape": value["--shape"], "batch": int(value["--batch"])}}
    os.makedirs(value["--output"], exist_ok=True)
    place = os.path.join(value["--output"], f"{{options['shape']}}_{{options['batch']}}x{{value.get('--tokens', 197)}}.json")
    with open(place, "w") as file:
        json.dump({{"options": options, "results": [{{"method": "lora"}}]}}, file)
    sys.exit()
from control_experiments.record import RunRecord
task = value.get("--task") or os.path.basename(value.get("--data", "memory")).split(".")[0]
fields = dict.fromkeys(("data", "adapter", "memory", "time", "versions", "git", "device"), {{}})
RunRecord(
    domain="x", name="x", method=value.get("--method", "zero-shot"), task=task, seed=int(value.get("--seed", 0)), command=[],
    created="", finished="", model={{"id": value.get("--model")}},
    hyperparameters={{name[2:]: text for name, text in value.items() if name.startswith("--")}},
    metrics={{"last": {{"score": 1 - abs(float(value.get("--lr", 0)) - 1e-3)}}}}, **fields,
).write(os.path.join(value.get("--output_dir"), "record.json"))
"""


ONE = ("--seeds", "1", "--gpus", "cpu")


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


@pytest.fixture
def reruns(tmp_path):
    return Reruns(tmp_path)


def option(call, name):
    return call["arguments"][call["arguments"].index(name) + 1]


def test_a_table_is_run_cell_by_cell_and_then_skipped(reruns):
    glue = ("glue", "--tasks", "rte", "wnli", "--methods", "lora", "--seeds", "1", "2", "--gpus", "cpu")
    done = reruns.run(*glue)
    assert done.returncode == 0, done.stderr
    cells = [(option(c, "--task"), option(c, "--method"), c["SEED"]) for c in reruns.calls]
    assert sorted(cells) == [(task, "lora", seed) for task in ("rte", "wnli") for seed in "12"]
    assert {option(c, "--device") for c in reruns.calls} == {"cpu"}
    assert "[4/4]" in done.stdout and "left" in done.stdout
    again = reruns.run(*glue)
    assert again.returncode == 0 and not reruns.calls and "4 cells, 4 of them need no run" in again.stdout


def test_cells_go_to_all_gpus_one_at_a_time_on_each(reruns):
    reruns.run("glue", "--tasks", "rte", "--seeds", "1", "2", "--gpus", "0", "1", FAKE_SECONDS="0.5")
    assert sorted(option(c, "--device") for c in reruns.calls) == ["0", "0", "0", "1", "1", "1"]


def test_a_failed_cell_is_listed_at_the_end_and_stops_no_other(reruns):
    done = reruns.run("glue", "--tasks", "rte", "--seeds", "1", "--gpus", "cpu", FAKE_FAIL="lora")
    assert done.returncode == 1
    assert [option(c, "--method") for c in reruns.calls] == ["control", "lora", "dora"]
    (line,) = done.stderr.splitlines()
    assert line.startswith("failed: roberta-base_rte_lora_seed1: error: out of everything (exit code 2, log: ")
    assert (reruns.results / "logs" / "glue" / "roberta-base_rte_lora_seed1.log").is_file()
    assert reruns.run("glue", "--tasks", "rte", "--seeds", "1", "--gpus", "cpu").returncode == 0
    assert len(reruns.calls) == 1


def test_no_cell_starts_when_time_is_up(reruns):
    done = reruns.run("glue", "--tasks", "rte", *ONE, "--max-hours", "0.0001", FAKE_SECONDS="1")
    assert len(reruns.calls) == 1
    assert done.returncode == 1 and "not started, time is up: roberta-base_rte_lora_seed1" in done.stdout


GLUE = ("glue", "--tasks", "rte", "--methods", "lora", *ONE)
VIT = ("vit", "--methods", "control", *ONE)
LLAMA = ("commonsense", "--tasks", "llama3_8b", "--methods", "double control", *ONE)
SMOL = ("commonsense", "--tasks", "smollm2", "--methods", "lora", *ONE)


@pytest.mark.parametrize(
    ("table", "changed", "message"),
    [
        (GLUE, {"EPOCHS": "7"}, "has epochs 80, not 7"),
        (("quantized", *GLUE[1:]), {"BATCH_SIZE": "32"}, "has batch_size 256, not 32"),
        (VIT, {"CONTROL_RANK": "4"}, "has control_rank 16, not 4"),
        (LLAMA, {"LR": "3e-3"}, "has lr 1e-4, not 3e-3"),
        (SMOL, {"EPOCHS": "2"}, "has epochs 1, not 2"),
        (SMOL, {"EVALUATE_ARGS": "--mode likelihood", "EPOCHS": "2"}, "has epochs 1, not 2"),
        (("memory", "--tasks", "llama3-8b-short", "--methods", "lora", *ONE), {}, "has methods lora, not dora"),
    ],
)  # fmt: skip
def test_a_finished_run_with_other_settings_does_not_count(reruns, table, changed, message):
    first = reruns.run(*table)
    assert first.returncode == 0 and reruns.calls, first.stderr
    if not changed:
        assert reruns.run(*table).returncode == 0 and not reruns.calls
        table = [word.replace("lora", "dora") for word in table]
    if "EVALUATE_ARGS" in changed:
        reruns.run(*table, EVALUATE_ARGS=changed["EVALUATE_ARGS"])
    done = reruns.run(*table, **changed)
    assert done.returncode == 1 and message in done.stderr and not reruns.calls, done.stderr


@pytest.mark.parametrize(("table", "name", "value"), [(GLUE, "task", "cola"), (GLUE, "seed", 2), (LLAMA, "method", "lora")])
def test_another_runs_record_in_a_cells_folder_does_not_count(reruns, table, name, value):
    reruns.run(*table)
    (path,) = [path for path in reruns.results.rglob("record.json") if path.parent.name != "evaluation"]
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    done = reruns.run(*table)
    assert done.returncode == 1 and f"has {name} {value}, not" in done.stderr and not reruns.calls


def test_what_extra_options_change_is_expected_of_the_record(reruns):
    assert reruns.run(*GLUE, "--extra", "--batch_size 8").returncode == 0
    assert reruns.run(*GLUE, "--extra", "--batch_size 8").returncode == 0 and not reruns.calls
    assert "has batch_size 8, not 64" in reruns.run(*GLUE).stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupting_ends_the_running_cells_and_starts_no_other(reruns, number, code):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with it ignored
    command = reruns.command("glue", "--tasks", "rte", "--seeds", "1", "--gpus", "0", "1")
    process = subprocess.Popen(
        command, env={**reruns.environment, "FAKE_SECONDS": "60"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    deadline = time.time() + 30
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
    ("table", "arguments", "environment", "wanted"),
    [
        ("vit", ("--methods", "control", "--seeds", "1"), {},
         r"DATA=cifar100 bash ViT/run_ViT.sh control {gpu} --seed 1 --output_dir \S+/vit/vit_base_patch16_224.orig_in21k_cifar100_control_seed1 --resume"),
        ("vit", ("--methods", "lora", "--seeds", "1"), {"DATA": "x/flowers.tar", "MODEL": "x/small/model.safetensors"},  # as ViT/finetune.py names it: by the file's folder
         r"DATA=x/flowers.tar .*/vit/small_flowers_lora_seed1 --resume"),
        ("commonsense", ("--tasks", "llama3_8b", "--methods", "double control", "--seeds", "5"), {},
         r"SEED=5 bash LlaMA/llama3_8B_DoubleControl.sh 64 32 64 \S+/llama/llama3_8b/double-control-seed5 {gpu} --resume"),
        ("commonsense", ("--tasks", "smollm2", "--methods", "lora", "--seeds", "5"), {"MODEL": "x.gguf"},
         r"METHODS=lora SEEDS=5 bash LlaMA/run_smollm2_table.sh \S+/llama/smollm2 {gpu}"),
        ("quantized", ("--methods", "dora", "--seeds", "1"), {},
         r"SEED=1 bash QControl/run_roberta_quantization.sh dora rte 320 4e-4 {gpu} --output_dir \S+/qcontrol/\S+ --resume"),
        ("memory", ("--tasks", "vit", "--seeds", "2"), {}, r"bash scripts/table_vit_memory.sh {gpu} --output \S+/memory/repeat2/published_vit"),
        ("memory", ("--tasks", "llama3-8b-profile", "--seeds", "1"), {},
         r"\S+ \S+ -m scripts.bench_memory --shape llama3-8b .* --profile --output \S+ --methods lora\+liger control:fast .*"),
        ("memory", ("--tasks", "vit-b16", "--seeds", "2"), {},
         r"CUDA_VISIBLE_DEVICES={gpu} \S+ -m scripts.bench_memory --shape vit-b16 --batch 128 --output \S+/memory/repeat2"),
        ("commonsense", ("--tasks", "llama3_8b", "--methods", "control+dora", "--seeds", "5"), {},
         r"SEED=5 METHOD=control\+dora bash LlaMA/llama3_8B_DoubleControl.sh 64 32 64 \S+/llama/llama3_8b/control\+dora-seed5 {gpu} --resume"),
        ("commonsense", ("--tasks", "qwen0.5b", "--methods", "miss", "--seeds", "5"), {"MODEL": "q"},
         r"METHODS=miss SEEDS=5 bash LlaMA/run_smollm2_table.sh \S+/llama/qwen0.5b {gpu}"),
        ("commonsense", ("--tasks", "llama2_7b", "--methods", "zero-shot"), {},
         r"bash LlaMA/llama2_7B_Evaluate.sh 64 32 64 \S+/llama/llama2_7b/zero-shot {gpu} zero-shot"),
        ("memory", ("--tasks", "llama3-8b-short", "--methods", "lora", "control:lean", "--seeds", "1"), {},
         r"CUDA_VISIBLE_DEVICES={gpu} \S+ -m scripts.bench_memory --shape llama3-8b --batch 4 --tokens 256 --output \S+/memory --methods lora control:lean"),
    ],
)  # fmt: skip
def test_dry_runs_print_the_calls(reruns, table, arguments, environment, wanted):
    done = reruns.run(table, *arguments, "--dry_run", **environment)
    assert done.returncode == 0, done.stderr
    _, call = done.stdout.splitlines()
    assert re.fullmatch(wanted, call), call


@pytest.mark.parametrize(
    ("table", "arguments", "message"),
    [
        ("glue", ("--tasks", "nope"), "has no 'nope': choose from cola"),
        ("glue", ("--methods", "control+dora"), "has no method 'control+dora': choose from control, lora, dora"),
        ("commonsense", ("--tasks", "qwen0.5b"), "qwen0.5b needs MODEL=FOLDER"),
        ("glue", ("--gpus", "x"), "--gpus takes indices or cpu"),
        ("memory", ("--nonsense",), "--nonsense"),
    ],
)
def test_bad_arguments_are_one_line(reruns, table, arguments, message):
    done = reruns.run(table, *arguments)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not reruns.results.exists()
