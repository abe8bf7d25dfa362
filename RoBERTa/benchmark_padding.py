"""Seconds of one CoLA epoch padded to 128, as the authors pad, and to each batch's longest row, as we do.

    python -m RoBERTa.benchmark_padding --model FOLDER --data GLUE_FOLDER --device cpu

Both are timed in one process on the same rows, model, batch size and precision, step by step in turn, after warm-up
steps. Without --steps
each epoch is whole; with it, that many batches spread evenly over the epoch are timed and scaled to all of it.
Writes results/roberta/benchmark_padding_<model>_<device>.json.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Optional

import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import RandomSampler, Sampler
from transformers import BatchEncoding, DataCollatorWithPadding

from control_experiments.errors import UserError, run_main
from control_experiments.paths import RESULTS
from control_experiments.record import git_state, package_versions, public_command, utc_now, write_json_atomic
from control_experiments.training.arguments import parse_arguments
from control_experiments.training.device import (
    choose_precision,
    describe_device,
    seed_everything,
    select_device,
)
from control_experiments.training.options import public_id
from control_experiments.training.quiet import quieten
from control_experiments.training.trainer import ResumableLengthSampler
from RoBERTa import encoder, finetune
from RoBERTa.glue import get_task, load_task

WARM_UP_STEPS = 2


@dataclass
class Options:
    model: str = field(default="roberta-base", metadata={"help": "Hub id or folder of an encoder."})
    data: Optional[str] = field(
        default=None, metadata={"help": "GLUE folder, as for finetune.py; else the hub."}
    )
    method: str = field(default="control", metadata={"help": "What is trained while the clock runs."})
    batch_size: int = field(default=64, metadata={"help": "Rows per step."})
    max_length: int = field(default=128, metadata={"help": "Length that the authors pad to, in tokens."})
    precision: str = field(default="auto", metadata={"help": "As for finetune.py."})
    device: str = field(default="0", metadata={"help": "GPU index, or cpu."})
    steps: int = field(default=0, metadata={"help": "Time this many batches only; 0: all."})
    output: Optional[str] = field(default=None, metadata={"help": "Where to write the figures."})


def spread(batches: list[list[int]], steps: int) -> list[list[int]]:
    """`steps` of the batches at even distances in order of their place (all of them when `steps` is 0)."""
    if not steps or steps >= len(batches):
        return batches
    return [batches[place * len(batches) // steps] for place in range(steps)]


class Epoch:
    """One way to pad: its batches, and the seconds and tokens counted so far."""

    def __init__(self, rows: Dataset, sampler: Sampler, collate: DataCollatorWithPadding, options: Options):
        order = list(sampler)
        batches = [
            order[start : start + options.batch_size] for start in range(0, len(order), options.batch_size)
        ]
        lengths = list(rows["length"])
        batches.sort(
            key=lambda batch: max(lengths[index] for index in batch)
        )  # spread() then meets every length
        self.rows = rows.remove_columns(["length", "row"])
        self.collate = collate
        self.count = len(batches)
        self.batches = spread(batches, options.steps)
        self.seconds, self.real, self.processed = 0.0, 0, 0

    def collated(self, place: int) -> BatchEncoding:
        rows = self.rows[self.batches[place]]
        return self.collate([dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)])

    def figures(self) -> dict:
        return {
            "seconds_per_epoch": self.seconds * self.count / len(self.batches),
            "padding_share": 1 - self.real / self.processed,
        }


def time_epochs(model: PeftModel, epochs: Sequence[Epoch], precision: str) -> None:
    """Train on the epochs' batches and add up the time of each.

    A step of one alternates with a step of the other, so that whatever else slows the machine meets both alike.
    """
    device = model.device
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=3e-4, weight_decay=0.1
    )
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[precision]

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def step(epoch: Epoch, place: int) -> tuple[float, torch.Tensor]:
        start = now()
        batch = epoch.collated(place)
        with torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32"):
            loss = model(**batch.to(device)).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return now() - start, batch["attention_mask"]

    model.train()
    for place in range(WARM_UP_STEPS):
        for epoch in epochs:
            step(epoch, place % len(epoch.batches))
    for place in range(max(len(epoch.batches) for epoch in epochs)):
        for epoch in epochs:
            seconds, mask = step(epoch, place)
            epoch.seconds += seconds
            epoch.real += int(mask.sum())
            epoch.processed += mask.numel()


def main(argv: Sequence[str] | None = None) -> dict:
    """Time both, print one line each and the ratio, write the figures."""
    command = list(sys.argv[1:] if argv is None else argv)
    (options,) = parse_arguments(Options, argv=command, description=__doc__)
    training = finetune.Options(
        method=options.method, task="cola", model=options.model, max_length=options.max_length,
        batch_size=options.batch_size,
    )  # fmt: skip
    training.check()
    if options.steps < 0:
        raise UserError(f"--steps must be at least 0, got {options.steps}")
    device = select_device(options.device)
    precision = choose_precision(options.precision, device)
    quieten()
    splits = load_task("cola", options.data)
    seed_everything(training.seed)
    tokenizer, model = encoder.load_tokenizer_and_model(options.model, get_task("cola"))
    model = encoder.add_adapter(model.to(device), training)
    rows = encoder.tokenize(splits, tokenizer, options.max_length)["train"]
    samplers = {
        "max_length": RandomSampler(rows, generator=torch.Generator().manual_seed(training.seed)),
        "longest": ResumableLengthSampler(
            options.batch_size, lengths=list(rows["length"]), seed=training.seed
        ),
    }
    epochs = {
        padding: Epoch(
            rows, sampler, DataCollatorWithPadding(tokenizer, padding, options.max_length), options
        )
        for padding, sampler in samplers.items()
    }
    time_epochs(model, list(epochs.values()), precision)
    figures = {padding: epoch.figures() for padding, epoch in epochs.items()}
    for padding, result in figures.items():
        print(
            f"{padding:>10}: {result['seconds_per_epoch']:8.1f} s per CoLA epoch, "
            f"{result['padding_share']:.0%} of the tokens are padding"
        )
    ratio = figures["longest"]["seconds_per_epoch"] / figures["max_length"]["seconds_per_epoch"]
    print(f"     ratio: {ratio:8.3f}")
    result = {
        "created": utc_now(),
        "command": public_command(["python", "-m", "RoBERTa.benchmark_padding", *command]),
        "git": git_state(),
        "versions": package_versions(),
        "device": describe_device(device),
        "settings": {
            **{
                name: value
                for name, value in asdict(options).items()
                if name not in ("output", "data", "model")
            },
            "model": public_id(options.model),
            "precision": precision,
            "rows": len(rows),
        },
        **figures,
        "ratio": ratio,
    }
    name = f"benchmark_padding_{Path(options.model).name}_{device.type}.json"
    path = write_json_atomic(options.output or RESULTS / "roberta" / name, result)
    print(f"figures in {path}")
    return result


if __name__ == "__main__":
    run_main(main)
