"""Seconds of one CoLA epoch padded to 128, as the authors pad, and to each batch's longest row, as we do.

    python -m RoBERTa.benchmark_padding --model FOLDER --data GLUE_FOLDER --device cpu

Both are timed in one process on the same rows and model, a step of one in turn with a step of the other, so that whatever else
slows the machine meets both alike. With --steps that many batches, spread evenly over the epoch's lengths, stand for all of it.
Writes results/roberta/benchmark_padding_<model>_<device>.json.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from control_experiments.errors import run_main
from control_experiments.paths import RESULTS
from control_experiments.record import git_state, package_versions, public_command, utc_now, write_json_atomic
from control_experiments.training.arguments import check_numbers, parse_arguments
from control_experiments.training.options import public_id
from RoBERTa import finetune
from RoBERTa.glue import get_task, load_task


@dataclass
class Options:
    model: str = HfArg(default="roberta-base", help="Hub id or folder of an encoder.")
    data: str | None = HfArg(default=None, help="GLUE folder, as for finetune.py; else the hub.")
    method: str = HfArg(default="control", help="What is trained while the clock runs.")
    batch_size: int = HfArg(default=64, help="Rows per step.")
    max_length: int = HfArg(default=128, help="Length that the authors pad to, in tokens.")
    precision: str = HfArg(default="auto", help="As for finetune.py.")
    device: str = HfArg(default="0", help="GPU index, or cpu.")
    steps: int = HfArg(default=0, help="Time this many batches only; 0: all.")
    output: str | None = HfArg(default=None, help="Where to write the figures.")


def main() -> None:
    (options,) = parse_arguments(Options, description=__doc__)
    check_numbers(options, "steps", at_least=0)
    given = {name: value for name, value in vars(options).items() if name not in ("steps", "output")}
    training = finetune.Options(task="cola", **given)
    training.check()
    training.check_places()
    import torch
    from torch.utils.data import BatchSampler, RandomSampler
    from transformers import DataCollatorWithPadding

    from control_experiments.training.device import DTYPES, describe_device, seed_everything
    from control_experiments.training.setup import choose
    from control_experiments.training.trainer import ResumableLengthSampler
    from RoBERTa import encoder

    device, precision = choose(training)
    seed_everything(training.seed)
    tokenizer, model = encoder.load_tokenizer(options.model), encoder.load_model(options.model, get_task("cola"))
    model = encoder.add_adapter(model.to(device), training).train()
    rows = encoder.tokenize(load_task("cola", options.data), tokenizer, options.max_length)["train"]
    lengths, inputs = list(rows["length"]), rows.remove_columns(["length", "row"])
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-4, weight_decay=0.1)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def batches(sampler: Iterable[int]) -> list[list[int]]:
        """The epoch's batches, or `--steps` of them at even distances in order of their longest row."""
        found = sorted(BatchSampler(sampler, options.batch_size, False), key=lambda batch: max(lengths[row] for row in batch))
        chosen = min(options.steps or len(found), len(found))
        return [found[place * len(found) // chosen] for place in range(chosen)]

    def step(padding: str, batch: list[int]) -> tuple[float, int, int]:
        """Its seconds, and its real and all tokens."""
        begun = time.perf_counter()
        collate = DataCollatorWithPadding(tokenizer, padding, options.max_length)
        batch = collate([inputs[index] for index in batch])
        with torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32"):
            loss = model(**batch.to(device)).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        torch.get_device_module(device).synchronize()
        mask = batch["attention_mask"]
        return time.perf_counter() - begun, int(mask.sum()), mask.numel()

    epochs = {
        "max_length": batches(RandomSampler(rows, generator=torch.Generator().manual_seed(training.seed))),
        "longest": batches(ResumableLengthSampler(options.batch_size, lengths=lengths, seed=training.seed)),
    }
    for padding, epoch in epochs.items():
        for batch in (epoch[0], epoch[-1]):  # to warm up
            step(padding, batch)
    measured = [[step(padding, batch) for padding, batch in zip(epochs, pair)] for pair in zip(*epochs.values(), strict=True)]
    figures = {}
    for padding, steps in zip(epochs, zip(*measured)):
        seconds, real, tokens = (sum(column) for column in zip(*steps))
        per_epoch = seconds / len(steps) * -(-len(rows) // options.batch_size)
        figures[padding] = {"seconds_per_epoch": per_epoch, "padding_share": 1 - real / tokens}
        print(f"{padding:>10}: {per_epoch:8.1f} s per CoLA epoch, {1 - real / tokens:.0%} of the tokens are padding")
    ratio = figures["longest"]["seconds_per_epoch"] / figures["max_length"]["seconds_per_epoch"]
    print(f"     ratio: {ratio:8.3f}")
    settings = {name: value for name, value in vars(options).items() if name not in ("output", "data")}
    result = {
        "created": utc_now(),
        "command": public_command(["python", "-m", "RoBERTa.benchmark_padding", *sys.argv[1:]]),
        "git": git_state(),
        "versions": package_versions(),
        "device": describe_device(device),
        "settings": {**settings, "model": public_id(options.model), "precision": precision, "rows": len(rows)},
        **figures,
        "ratio": ratio,
    }
    name = f"benchmark_padding_{Path(options.model).name}_{device.type}.json"
    print(f"figures in {write_json_atomic(options.output or RESULTS / 'roberta' / name, result)}")


if __name__ == "__main__":
    run_main(main)
