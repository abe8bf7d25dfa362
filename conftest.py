"""Settings of all tests, and what those of several domains need."""

import gc
import json
import logging
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import settings

# The tests need no network and do not try any. Tiny models gain nothing from a second thread, and OpenMP's threads would not
# live on in the processes that tests fork.
os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

# Several domains have a script of the same name; tests say which they mean: `from RoBERTa import finetune`.
ROOT = str(Path(__file__).parent)
sys.path.append(ROOT)
os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]).rstrip(os.pathsep)

# On CPUs with AVX512-BF16 bitsandbytes warns at import that an optional kernel package is absent; pytest would print
# what conftest files logged below its own closing line.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# A machine that is busy is no error.
settings.register_profile("untimed", settings.default, deadline=None)
settings.load_profile("untimed")


def pytest_collection_modifyitems(items):
    """Slow tests first, lest one of them runs alone at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish():
    """The million objects of what is imported are no garbage: going through them takes a sixth of the tests' time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _deterministic_no_longer():
    """--deterministic holds for a whole process, in which torch then fills each new tensor first: 8B of them take a minute."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].use_deterministic_algorithms(False)


class Said(NamedTuple):
    """How a program ended and what it printed."""

    code: int
    out: str
    err: str

    def finished(self) -> "Said":
        assert self.code == 0, self.err
        return self

    def refused(self) -> str:
        """The one line in which it said why not."""
        lines = [line for line in self.err.splitlines() if line.startswith("error:")]
        assert (self.code, len(lines)) == (2, 1) and "Traceback" not in self.err, self.err
        return lines[0]

    @property
    def record(self):
        """The record that it wrote."""
        from control_experiments.record import read_record

        return read_record(re.findall(r"record in (.+)", self.finished().out)[-1])


@pytest.fixture
def call(monkeypatch, capfd):
    """``call("ViT.finetune", "--lr", 1)``: a program as its command line runs it, spared a process's start and imports."""

    def run(program: str, *words) -> Said:
        from control_experiments.errors import run_main

        monkeypatch.setattr(sys, "argv", [program, *map(str, words)])
        with pytest.raises(SystemExit) as exit_:
            run_main(import_module(program).main)
        return Said(exit_.value.code, *capfd.readouterr())

    return run


@pytest.fixture
def launching(tmp_path):
    """What to give to subprocess for a launcher's call from another folder; ``script`` is its path from the root."""

    def arguments(script: str, *words, **variables) -> dict:
        variables = {**os.environ, "PYTHON": sys.executable, **{name: str(value) for name, value in variables.items()}}
        return {"args": ["bash", f"{ROOT}/{script}", *map(str, words)], "env": variables, "cwd": tmp_path, "text": True}

    return arguments


@pytest.fixture
def launch(launching):
    """``launch("ViT/run_ViT.sh", "lora", EPOCHS=3)``: a launcher as users type it."""

    def run(script: str, *words, **variables) -> Said:
        done = subprocess.run(**launching(script, *words, **variables), capture_output=True, timeout=280)
        return Said(done.returncode, done.stdout, done.stderr)

    return run


_NOTING = """#!{python}
import json, os, sys
with open({notes!r}, "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
"""


@pytest.fixture
def noted(tmp_path):
    """``noted("bash ViT/run_ViT.sh lora", EPOCHS=3)``: how a command, typed at the root, calls python, torchrun and accelerate,
    whose stand-ins only note it."""
    stubs, notes = tmp_path / "stubs", tmp_path / "notes"
    stubs.mkdir()
    for name in ("python", "python3", "torchrun", "accelerate"):
        (stubs / name).write_text(_NOTING.format(python=sys.executable, notes=str(notes)))
        (stubs / name).chmod(0o755)

    def run(command: str, **variables) -> list[list[str]]:
        notes.write_text("")
        clean = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
        clean |= {"PATH": f"{stubs}:/usr/bin:/bin", "PYTHON": str(stubs / "python")}
        clean |= {name: str(value) for name, value in variables.items()}
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=clean, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in notes.read_text().splitlines()]

    return run


@pytest.fixture
def started(noted):
    """``started("ViT/run_ViT.sh", "lora")``: the module and options of each program that a launcher starts, to be called here."""
    return lambda script, *words, **variables: [
        call[2:] for call in noted(shlex.join(["bash", script, *map(str, words)]), **variables)
    ]


@pytest.fixture
def small_disk(tmp_path):
    """``small_disk("64k")``: the folder of a disk of this size."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(size: str) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True)
        if done.returncode:
            pytest.skip("mounting a small disk needs to be root")
        return place

    yield mount
    if place.is_mount():
        subprocess.run(["umount", "-l", place], check=True)
