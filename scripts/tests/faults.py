"""Tiny runs of every domain in processes that die when told: what the tests of faults share.

    FAULTS=20 bash scripts/test.sh scripts/tests -k test_faults     20 cases of each fault; the ordinary tests have 1
    FAULTS=20 FAULTS_SEED=1 bash scripts/test.sh ...                at other moments, with other inputs

A run is killed at a random time or before a random change to its folder, so that the short moments in which checkpoints,
adapters and records are written get their share.
"""

from __future__ import annotations

import gc
import os
import re
import signal
import socket
import sys
import time
from importlib import import_module
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess
from multiprocessing.sharedctypes import RawValue
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from control_experiments.errors import run_main
from control_experiments.record import RunRecord, read_record, utc_now
from control_experiments.training.checkpoints import checkpoints, find_damage

CASES, SEED = (int(os.environ.get(name, default)) for name, default in (("FAULTS", 1), ("FAULTS_SEED", 0)))
ADAPTER = "adapter/adapter_model.safetensors"
#: Seconds: longer than any of these runs takes, and what torchrun gives a process from SIGTERM to SIGKILL.
_LIMIT, _GRACE = 300, 30
_CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink")


def a_record(**fields: object) -> RunRecord:
    """A record with nothing in it but the fields given."""
    empty = {name: {} for name in ("git", "versions", "device", "hyperparameters")}
    named = {"domain": "vit", "name": "a", "method": "lora", "task": "cola", "seed": 1, "command": [], "created": utc_now()}
    return RunRecord(**{**empty, **named, "finished": utc_now(), **fields})


class Bomb:
    """A pickle that makes a file where it is read."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


# -- runs that take a second ------------------------------------------------------------------------------------


class Run(NamedTuple):
    """An entry point's module and the options of a run of it, all but `--output_dir`; files of its output folder that must not
    depend on what happened on the way; and how it is told to go on."""

    program: str
    arguments: list[str]
    results: tuple[str, ...] = (ADAPTER,)
    resume: tuple[str, ...] = ("--resume",)

    def adding(self, options: str) -> Run:
        """The run with more options, which count instead of those of the same name before them."""
        return self._replace(arguments=[*self.arguments, *options.split()])


def roberta(folder: Path) -> Run:
    """Control on a tiny BERT and a CoLA of 24 rows: 12 steps in 4 epochs, with checkpoints within epochs."""
    from RoBERTa.tests.conftest import save_encoder, write_glue

    import_module("RoBERTa.training")  # once, here, and not in every process when its options are parsed
    save_encoder(folder / "bert")
    write_glue(folder / "glue", "CoLA")
    options = f"--task cola --model {folder}/bert --data {folder}/glue --epochs 4 --lr 1e-2 --batch_size 8 --save_steps 2"
    return Run("RoBERTa.finetune", f"--method control --device cpu {options}".split())


def qcontrol(folder: Path) -> Run:
    """The same over 4-bit weights."""
    return roberta(folder).adding("--quantization nf4")


def vit(folder: Path) -> Run:
    """Control on timm's test ViT and 40 images of three colors: 15 steps in 3 epochs."""
    from ViT.tests.conftest import ARCHITECTURE, save_base, save_colors

    save_base(folder / "vit.safetensors")
    save_colors(folder / "colors.npz")
    model = f"--model {folder}/vit.safetensors --architecture {ARCHITECTURE} --data {folder}/colors.npz --image_size 32"
    options = f"--method control --device cpu {model} --epochs 3 --batch_size 8 --lr 0.05"
    return Run("ViT.finetune", options.split(), (ADAPTER, "adapter/classifier.json", "predictions.csv"))


def _llama_files(folder: Path) -> tuple[Path, Path]:
    from LlaMA.commonsense import read_rows
    from LlaMA.models import train_tokenizer
    from LlaMA.tests.conftest import save_data, save_model

    model, data = folder / "llama", folder / "commonsense"
    save_model(model, train_tokenizer(read_rows(save_data(data) / "train.json"), vocabulary=500))
    return model, data


def llama(folder: Path) -> Run:
    """Control and LoRA with dropout on a tiny LLaMA: 8 steps, a checkpoint after every second one."""
    model, data = _llama_files(folder)
    ranks = "--method control+lora --control_rank 4 --lora_rank 2 --lora_alpha 4"
    steps = "--max_steps 8 --eval_steps 2 --held_out 6 --warmup_steps 1 --lr 1e-2"
    return Run("LlaMA.finetune", f"--model {model} --data {data}/train.json --device cpu {ranks} {steps}".split())


def llama_evaluate(folder: Path) -> Run:
    """14 questions to the tiny LLaMA, in batches of 3; it goes on when it is started again."""
    model, data = _llama_files(folder)
    options = f"--model {model} --data {data} --device cpu --tasks boolq piqa --batch_size 3 --max_new_tokens 8"
    return Run("LlaMA.evaluate", options.split(), ("boolq.jsonl", "piqa.jsonl"), resume=())


TRAINING = {"roberta": roberta, "vit": vit, "llama": llama}
RUNS = {**TRAINING, "qcontrol": qcontrol, "llama-evaluate": llama_evaluate}


# -- processes --------------------------------------------------------------------------------------------------


class Attempt(ForkProcess):
    """A process that does a run and is forked: what is imported and patched here is so there.

    Attributes:
        moment: when it is killed: after so many seconds (a float), before its change of this number to its folder (an int,
            from 1), or never.
        changes: how many changes to its folder it has made.
        seconds: how long it took, once it has ended.
    """

    seconds = 0.0

    def __init__(self, run: Run, output: Path, moment: float | None = None, *, resume: bool = False, **environment: str):
        super().__init__()
        self.main, self.output, self.moment, self.environment = import_module(run.program).main, output, moment, environment
        self.words = [run.program, *run.arguments, "--output_dir", str(output), *(run.resume if resume else ())]
        self.log = output.with_name(f"{output.name}.rank{environment.get('RANK', 0)}.log")
        self.changes = RawValue("i", 0)
        self.log.unlink(missing_ok=True)
        self.start()

    @property
    def killed(self) -> bool:
        """At its moment."""
        return self.exitcode in (-signal.SIGKILL, -signal.SIGALRM)

    @property
    def said(self) -> str:
        """What it printed."""
        return self.log.read_text() if self.log.exists() else ""

    def finished(self) -> Attempt:
        """Itself, when it has come to a good end."""
        self.join(_LIMIT)
        assert self.exitcode == 0, f"ended with {self.exitcode}: {self.said[-2000:]}"
        return self

    def refused(self) -> str:
        """The line in which it said why not: stderr's last, the only one that is no progress bar's or library's."""
        assert self.exitcode == 2 and "Traceback" not in self.said, self.said
        line = self.said.strip().splitlines()[-1]
        assert re.match(r"(\[rank \d] )?error: ", line), line
        return line

    def run(self) -> None:
        """In the new process."""
        descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT)
        for number in (1, 2):
            os.dup2(descriptor, number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        sys.argv = self.words
        os.environ.update(self.environment)
        gc.freeze()  # or every collection goes through all that was imported, and copies its pages
        # torch renews a forked process's thread pool when it first wants it, and fails if two threads (gloo's, autograd's)
        # do so at once
        torch.set_num_threads(torch.get_num_threads())
        if isinstance(self.moment, float):
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends a process as SIGKILL does
            signal.setitimer(signal.ITIMER_REAL, self.moment)
        sys.addaudithook(self._count)  # Python calls it before each change
        run_main(self.main)

    def _count(self, event: str, arguments: tuple) -> None:
        changes = event in _CHANGES
        if event == "open":
            _, mode, flags = arguments
            changes = flags & (os.O_WRONLY | os.O_RDWR) and not str(mode or "").startswith("r")
        if changes and str(arguments[0]).startswith(str(self.output)):
            if self.changes.value + 1 == self.moment:
                os.kill(os.getpid(), signal.SIGKILL)
            self.changes.value += 1


def together(
    run: Run, output: Path, processes: int, moment: float | None = None, *, resume: bool = False, alone: float = 0.0
) -> list[Attempt]:
    """Do `run` in so many processes, which are killed at `moment`.

    As torchrun does, the others are sent SIGTERM `alone` seconds after one has failed, and several get the environment that
    it would give them.
    """
    started, shared = time.perf_counter(), {}
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        shared |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
    attempts = []
    for rank in range(processes):
        environment = shared and {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        attempts.append(Attempt(run, output, moment, resume=resume, **environment))
    while (running := [attempt.sentinel for attempt in attempts if attempt.is_alive()]) and wait(running, _LIMIT):
        if any(attempt.exitcode for attempt in attempts):
            break
    attempts[0].seconds = time.perf_counter() - started
    for patience, end in ((alone, Attempt.terminate), (_GRACE, Attempt.kill), (None, Attempt.kill)):
        for attempt in attempts:
            attempt.join(patience)
            if attempt.is_alive():
                end(attempt)
    return attempts


def execute(run: Run, output: Path, moment: float | None = None, *, resume: bool = False) -> Attempt:
    """Do `run` in one process, which is killed at `moment`."""
    return together(run, output, 1, moment, resume=resume)[0]


# -- what must hold ---------------------------------------------------------------------------------------------


def assert_nothing_half_written(output: Path) -> None:
    """What can be seen of a run that was killed is whole."""
    damaged = {checkpoint.name: find_damage(checkpoint) for checkpoint in checkpoints(output / "checkpoints")}
    assert not any(damaged.values()), damaged
    if (output / "record.json").exists():
        read_record(output / "record.json")
    if (output / "adapter").exists():
        load_file(output / ADAPTER)


def results(run: Run, output: Path) -> dict[str, object]:
    """What a run came to, less times."""

    def timeless(row: dict) -> dict:
        return {name: value for name, value in row.items() if "seconds" not in name}

    record = read_record(output / "record.json")
    metrics = {place: timeless(row) for place, row in record.metrics.items()}
    found = {"history": list(map(timeless, record.history)), "metrics": metrics, "hyperparameters": record.hyperparameters}
    for name in run.results:
        contents = (output / name).read_bytes()
        # answers are appended in batches: their order is that of the work
        found[name] = sorted(contents.splitlines()) if name.endswith(".jsonl") else contents
    return found


def losses(output: Path) -> list[float]:
    """All losses in a run's record, in order."""
    history = read_record(output / "record.json").history
    return [row[name] for row in history for name in ("train_loss", "loss", "eval_loss") if name in row]
