"""From parsed options to a run that may begin: what every training script does before its own first line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ..record import RunRecord
from .checkpoints import discard, step_of, whole_folder
from .device import choose_precision, describe_device, explain_out_of_memory, make_deterministic, select_device
from .metering import Throughput
from .model_card import write_card
from .options import RunOptions
from .quiet import quieten
from .runs import RunFolder


@dataclass
class Run:
    """A run that may begin.

    Attributes:
        folder: its folder, held for it; `folder.finished` says that there is nothing to do.
        device: where it computes.
        precision: what `--precision` or `--dtype` came to: "fp32", "bf16" or "fp16".
        checkpoint: what it goes on from, if anything.
        command: how to start it again.
    """

    options: RunOptions
    folder: RunFolder
    device: torch.device
    precision: str
    checkpoint: Path | None
    command: list[str]

    @property
    def described(self) -> str:
        """Precision, quantization, device and where it goes on, for people."""
        quantization = getattr(self.options, "quantization", "none")
        over = "" if quantization == "none" else f" over {quantization}"
        resumed = f", resumed from {self.checkpoint.name}" if self.checkpoint else ""
        return f"{self.precision}{over} on {self.device}{resumed}"

    def begin_record(self, *, domain: str, task: str, **settled: object) -> RunRecord:
        """The run's record without results; see `RunRecord.begin`."""
        run = {"name": self.folder.path.name, "device": describe_device(self.device), "command": self.command}
        return RunRecord.begin(self.options, domain=domain, task=task, **run, **settled)

    def time(self, throughput: Throughput) -> dict:
        """The record's `time`."""
        resumed = step_of(self.checkpoint) if self.checkpoint else None
        return {**throughput.summary(), "resumed_from_step": resumed}

    def finish(self, record: RunRecord, save: Callable[[Path], object], load: str, **results: object) -> None:
        """Save the adapter with its card, which says how to `load` it, complete the record with `results` and write it,
        discard the checkpoints; for the process of rank 0."""
        record.finish(**results)
        with whole_folder(self.folder.adapter, sealed=False) as place:
            save(place)
            write_card(place, record, load)
        record.write(self.folder.record)
        discard(self.folder.checkpoints)


def choose(options: RunOptions, option: str = "precision", on_gpu: str = "bf16") -> tuple[torch.device, str]:
    """A run's device and precision; from here on libraries are quiet and, if asked for, deterministic."""
    quieten()
    if getattr(options, "deterministic", False):
        make_deterministic()
    device = select_device(options.device)
    return device, choose_precision(getattr(options, option), device, on_gpu, option)


@contextmanager
def start(
    options: RunOptions,
    program: str,
    argv: Sequence[str] | None,
    *,
    less_memory: str,
    option: str = "precision",
    on_gpu: str = "bf16",
    written: Mapping[str, str] | None = None,
) -> Iterator[Run]:
    """Choose device and precision, hold the run's folder and make it this run's.

    Lacking memory, a full disk and an interruption end the block with one line that says how to go on.

    Args:
        program: the script's module, for the record's command.
        less_memory: which options need less memory, in words.
        option: name of the option that says the precision.
        on_gpu: what "auto" is on a GPU.
        written: how `run.json` writes a precision, where it has another name there.

    Raises UserError: the device, the precision or the folder cannot be used.
    """
    device, precision = choose(options, option, on_gpu)
    command = ["python", "-m", program, *(sys.argv[1:] if argv is None else argv)]
    with RunFolder(options.folder) as folder, explain_out_of_memory(device, less_memory):
        identity = {**options.identity(), option: (written or {}).get(precision, precision)}
        checkpoint = folder.claim(identity, resume=options.resume, defaults=options.defaults())
        if getattr(options, "report_to", "none") != "none":
            os.environ.setdefault("WANDB_DIR", str(folder.path))
            os.environ.setdefault("WANDB_PROJECT", "parallel-control")
            os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder.path / "tensorboard"))
        yield Run(options, folder, device, precision, checkpoint, command)
