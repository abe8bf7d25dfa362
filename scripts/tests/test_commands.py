"""The shell commands, run for real in a copy of their folder, with an interpreter that only notes what it is asked."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from control_experiments.paths import REPOSITORY

#: Every Python program, as `python -m` names it.
PROGRAMS = sorted(
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
    for folder in ("scripts", "RoBERTa", "ViT", "LlaMA", "QControl")
    for path in (REPOSITORY / folder).glob("*.py")
    if "    run_main(main)" in path.read_text()
)

# Makes environments, installs and trains without doing any of it; CALLS gets one line a call.
INTERPRETER = """#!/usr/bin/env bash
echo "$*" >> "$CALLS"
case "$*" in
    --version) echo "Python $FAKE_VERSION" ;;
    *"sys.version_info < (3, 10)"*) [[ $FAKE_VERSION != 3.9* ]] ;;
    *"find_spec"*) [[ -z ${FAKE_LACKS:-} ]] ;;
    *"import ensurepip, venv"*) [[ -z ${FAKE_NO_VENV:-} ]] ;;
    "-m venv --clear "*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
    "-m pip install "*) echo "WARNING: pip warns"; exit "${FAKE_PIP_EXIT:-0}" ;;
    *scripts.download_models*) echo /models/minilm ;;
    *cuda.is_available*) echo cpu ;;
    "-m ruff check "*) exit "${FAKE_RUFF_EXIT:-0}" ;;
    "-m basedpyright "*) exit "${FAKE_TYPES_EXIT:-0}" ;;
    "-m pytest "*) echo "1 passed in 0.01s"; exit "${FAKE_PYTEST_EXIT:-0}" ;;
esac
"""
LAUNCHER = """echo "launcher $* MODEL=$MODEL PYTHON=$PYTHON" >> "$CALLS"; exit "${FAKE_TRAIN_EXIT:-0}"\n"""
#: Notes the variables of a trial and its arguments, but not where it writes, nor --resume.
TRIED = """echo "$0 MODEL=$MODEL DATA=$DATA $EPOCHS $LR $BATCH $MICRO_BATCH $HELD_OUT $WARMUP $MLP_LAYERS $LORA_RANK $BATCH_SIZE $*" |
    sed -E 's# --resume##; s# --output_dir [^ ]+##; s# /[^ ]+ # OUT #g' >> "$CALLS"
"""
TRIALS = ("RoBERTa/run_roberta.sh", "ViT/run_ViT.sh", "LlaMA/llama3_8B_DoubleControl.sh", "QControl/run_llama_quantization.sh")


class Checkout:
    """A copy of the commands beside a fake interpreter."""

    def __init__(self, root: Path):
        self.root, self.calls_file = root / "checkout", root / "calls"
        shutil.copytree(REPOSITORY / "scripts", self.root / "scripts", ignore=shutil.ignore_patterns("tests"))
        shutil.copytree(REPOSITORY / ".ci", self.root / ".ci")
        for folder in ("peft", "RoBERTa", "ViT", "LlaMA", "QControl"):
            (self.root / folder).mkdir()
        (self.root / "requirements.txt").write_text("torch\n")
        (self.root / "peft" / "pyproject.toml").write_text("[project]\n")
        (self.root / "RoBERTa" / "run_roberta.sh").write_text(LAUNCHER)
        self.interpreter = root / "fake-python"
        self.interpreter.write_text(INTERPRETER)
        self.interpreter.chmod(0o755)

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess:
        self.calls_file.write_text("")
        variables = dict(PATH="/usr/bin:/bin", CALLS=str(self.calls_file), PYTHON=str(self.interpreter), FAKE_VERSION="3.12.1")
        piped = dict(cwd=self.root.parent, env=variables | environment, capture_output=True, text=True, timeout=60)
        return subprocess.run(["bash", *command], **piped)

    @property
    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines()

    def called(self, start: str) -> list[str]:
        return [call for call in self.calls if call.startswith(start)]


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def test_the_environment_is_made_once_and_installed_again_only_when_something_changed(checkout):
    first = checkout.run("checkout/scripts/test.sh")
    assert first.returncode == 0, first.stderr
    assert "Making .venv with Python 3.12.1" in first.stdout
    assert "Installing requirements.txt" in first.stdout
    assert "pip warns" not in first.stdout + first.stderr
    assert len(checkout.called("-m venv")) == len(checkout.called("-m pip install")) == 1

    second = checkout.run("checkout/scripts/test.sh")
    assert "nstall" not in second.stdout
    assert not checkout.called("-m venv") and not checkout.called("-m pip")

    for changed in ("requirements.txt", "peft/pyproject.toml"):
        with (checkout.root / changed).open("a") as file:
            file.write("# changed\n")
        assert "Installed in" in checkout.run("checkout/scripts/test.sh").stdout
        assert len(checkout.called("-m pip install")) == 1 and not checkout.called("-m venv")
    # a moved checkout
    checkout.root.rename(checkout.root.parent / "moved")
    checkout.run("moved/scripts/test.sh")
    assert len(checkout.called("-m pip install")) == 1


def test_a_failed_installation_says_where_its_log_is_and_is_tried_again(checkout):
    failed = checkout.run("checkout/scripts/quickstart.sh", FAKE_PIP_EXIT="1")
    assert failed.returncode == 2
    assert "error: the installation failed" in failed.stderr and "install.log" in failed.stderr
    assert not checkout.called("launcher")
    assert checkout.run("checkout/scripts/quickstart.sh").returncode == 0
    assert len(checkout.called("-m pip install")) == 1


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FAKE_VERSION": "3.9.18"}, "Python 3.9.18 is too old: Python 3.10 or newer is needed"),
        ({"FAKE_NO_VENV": "1"}, "has no venv module"),
        ({"PYTHON": "no-such-python"}, "no-such-python not found"),
    ],
)
def test_an_unusable_interpreter_is_one_line_and_leaves_nothing(checkout, environment, message):
    done = checkout.run("checkout/scripts/quickstart.sh", **environment)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert not (checkout.root / ".venv").exists()


def test_arguments_reach_pytest_and_its_exit_code_and_last_line_come_back(checkout):
    done = checkout.run("checkout/scripts/test.sh", "RoBERTa/tests", "-k", "stsb", FAKE_PYTEST_EXIT="5")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (5, "1 passed in 0.01s")
    assert checkout.called("-m pytest") == ["-m pytest -n 2 --dist worksteal RoBERTa/tests -k stsb"]
    assert all(map(checkout.called, ("-m ruff check", "-m ruff format --check", "-m basedpyright")))
    # --quick leaves out types and slow tests
    assert checkout.run("checkout/scripts/test.sh", "--quick", "ViT/tests").returncode == 0
    assert checkout.called("-m pytest") == ["-m pytest -n 2 --dist worksteal -m not slow ViT/tests"]
    assert checkout.called("-m ruff check") and not checkout.called("-m basedpyright")
    # continuous integration: all of it
    assert checkout.run("checkout/.ci/run").returncode == 0
    assert checkout.called("-m pytest") == ["-m pytest -n 2 --dist worksteal"] and checkout.called("-m basedpyright")
    for fake in ("FAKE_RUFF_EXIT", "FAKE_TYPES_EXIT"):
        assert checkout.run("checkout/scripts/test.sh", **{fake: "1"}).returncode == 1 and not checkout.called("-m pytest")


@pytest.mark.parametrize("range_end, releases", [("lowest", "torch==2.11 peft==0.21"), ("newest", "")])
def test_the_range_of_releases_is_tested_in_an_environment_of_its_own(checkout, range_end, releases):
    dependencies = 'dependencies = [\n    "torch>=2.11",\n    "peft>=0.21,<0.22",\n]\n'
    (checkout.root / "peft" / "pyproject.toml").write_text(dependencies)
    assert checkout.run("checkout/scripts/test.sh", f"--{range_end}", "-x").returncode == 0
    (install,) = checkout.called("-m pip install")
    assert f"-e ./peft {releases} accelerate".replace("  ", " ") in install
    (tests,) = checkout.called("-m pytest")
    assert tests.startswith("-m pytest peft/tests ") and tests.endswith(" -x")
    assert not (checkout.root / ".venv").exists()


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_help_installs_nothing(checkout, script, option):
    done = checkout.run(f"checkout/scripts/{script}", option)
    assert done.returncode == 0 and f"bash scripts/{script}" in done.stdout and not done.stderr
    assert not checkout.calls and not (checkout.root / ".venv").exists()


def test_the_quickstart_trains_three_methods_alike_and_then_makes_the_table(checkout):
    done = checkout.run("checkout/scripts/quickstart.sh", EPOCHS="2", LR="1e-3")
    assert done.returncode == 0, done.stderr
    out, python = checkout.root / "results" / "quickstart" / "demo", checkout.root / ".venv" / "bin" / "python"
    assert checkout.called("launcher") == [
        f"launcher {method} demo 2 1e-3 cpu --output_dir {out}/{method} --resume MODEL=/models/minilm PYTHON={python}"
        for method in ("control", "lora", "dora")
    ]
    assert [line[:3] for line in done.stdout.splitlines() if "epochs" in line] == ["1/3", "2/3", "3/3"]
    assert checkout.calls[-1] == f"-m scripts.quickstart_table {out}"
    # with a device, and a run that fails
    assert checkout.run("checkout/scripts/quickstart.sh", "1", EPOCHS="2", LR="1e-3", FAKE_TRAIN_EXIT="2").returncode == 2
    (call,) = checkout.called("launcher")
    assert call.startswith("launcher control demo 2 1e-3 1 ") and "quickstart_table" not in checkout.calls[-1]


def test_the_quickstarts_trials_are_those_of_the_readmes(checkout):
    for launcher in TRIALS:
        (checkout.root / launcher).write_text(TRIED)
    assert checkout.run("checkout/scripts/quickstart.sh", "all").returncode == 0
    tried = [call for call in checkout.calls if ".sh MODEL=" in call]
    assert len(tried) == 4 and not any("-m scripts.quickstart_table" in call for call in checkout.calls)
    for launcher, call in zip(TRIALS, tried):
        readme = (REPOSITORY / launcher).parent.joinpath("README.md").read_text()
        (command,) = re.search(r"## A trial of two minutes\n.*?```bash\n(.*?)\n```", readme, re.S).group(1).splitlines()
        script = f"cd checkout; {command.replace('.venv/bin/python', '$PYTHON')}"
        assert checkout.run("-c", script, BATCH_SIZE="32").returncode == 0
        assert checkout.calls[-1] == call


def test_launchers_take_only_a_complete_environment(checkout, tmp_path):
    """A cut-off installation leaves a .venv without the project; the active environment's python3 then runs."""
    venv, active = checkout.root / ".venv", tmp_path / "active" / "python3"
    for path in (venv / "bin" / "python", active):
        path.parent.mkdir(parents=True)
        path.symlink_to(checkout.interpreter)

    def source(**environment):
        show = 'source checkout/scripts/interpreter.sh; "$PYTHON" --version >/dev/null; echo "$PYTHON"'
        return checkout.run("-c", show, **{"PATH": f"{active.parent}:/usr/bin:/bin", "PYTHON": "", **environment})

    assert source().stdout.strip() == "python3"
    lacking = source(FAKE_LACKS="1")
    assert lacking.returncode == 2 and "error: python3 lacks what" in lacking.stderr and lacking.stderr.count("\n") == 1
    (venv / "lib/python3.12/site-packages/peft_control-0.1.0.dist-info").mkdir(parents=True)
    assert source().stdout.strip() == str(venv / "bin" / "python")
    assert source(PYTHON=str(checkout.interpreter)).stdout.strip() == str(checkout.interpreter)


#: What takes most of the seconds that a program takes to start.
HEAVY = {"torch", "peft", "datasets", "timm", "sklearn", "bitsandbytes"}
# Says how each program ends, in processes that have imported before what most programs share.
ANSWERS = f"""
import os, runpy, sys
import control_experiments.training.arguments

def answer(program, words):
    sys.argv = [program, *words.split()]
    try:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return 99 if {HEAVY} & sys.modules.keys() else end.code or 0

for program in sys.argv[1:]:
    for words in ("--help", "--method none --data no"):
        if not (child := os.fork()):
            os._exit(answer(program, words))
        print("answered:", program, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_options_name_the_types_of_their_class_variables():
    """Python 3.10 reads no hints of a class with a plain ClassVar."""
    for folder in ("scripts", "RoBERTa", "ViT", "LlaMA", "QControl", "peft/src"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            assert path == Path(__file__) or ": ClassVar =" not in path.read_text(encoding="utf-8"), path


@pytest.mark.slow
def test_help_and_wrong_options_are_answered_before_torch_is_imported():
    done = subprocess.run([sys.executable, "-c", ANSWERS, *PROGRAMS], capture_output=True, text=True, cwd=REPOSITORY)
    answers = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("answered: ")]
    assert answers == [[program, code] for program in PROGRAMS for code in ("0", "2")], done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize(("words", "code"), [("--help", 0), ("--method none --data no", 2)])
@pytest.mark.parametrize("program", ["peft_control", "peft_control export"])
def test_the_library_answers_before_torch_is_imported(program, words, code):
    """By what Python says of its own command line."""
    command = [sys.executable, "-X", "importtime", "-m", *program.split(), *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == code and "argparse" in imported, done.stderr[-500:]
    assert not imported & HEAVY
