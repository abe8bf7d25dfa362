"""Measure peak memory and seconds per step of the methods on full-size LLaMA shapes with random weights.

    python -m LlaMA.benchmark_methods --output_dir results/llama/shapes                       both shapes, four methods
    python -m LlaMA.benchmark_methods --output_dir OUT --shapes llama3-8b --methods "double control" --memories plain fast lean

Each measurement is one folder with one record. Every step trains on one micro-batch in which all rows are `--cutoff`
tokens long, the largest that the launchers' recipes can meet; micro-batches are theirs (4 for LLaMA-2-7B, 3 for LLaMA-3-8B).
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, Optional

import control_experiments  # noqa: F401  # isort: skip  (first, see there)
import torch

from control_experiments.errors import UserError, run_main
from control_experiments.record import RunRecord, git_state, package_versions, utc_now
from control_experiments.training.arguments import parse_arguments
from control_experiments.training.device import (
    describe_device,
    explain_out_of_memory,
    seed_everything,
    select_device,
)
from control_experiments.training.metering import MemoryMeter
from control_experiments.training.methods import count_parameters
from control_experiments.training.quiet import quieten
from control_experiments.training.runs import RunFolder
from LlaMA.commonsense import TokenRow
from LlaMA.finetune import LORA_TARGETS, MIXED_TARGETS
from LlaMA.measuring import run_steps
from LlaMA.models import (
    SHAPES,
    add_adapter,
    expected_config,
    random_model,
    ready_to_train,
    resolve_dtype,
)
from LlaMA.packing import batch_loss, fused_batch_loss, padded_step

MICRO_BATCH = {"llama3-8b": 3}  # the others: 4


@dataclass
class Options:
    output_dir: str = field(metadata={"help": "Folder that gets one folder per measurement."})
    shapes: list[str] = field(
        default_factory=lambda: ["llama2-7b", "llama3-8b"], metadata={"help": f"Of {', '.join(SHAPES)}."}
    )
    methods: list[str] = field(
        default_factory=lambda: ["lora", "dora", "double control", "control+lora"],
        metadata={"help": "Methods."},
    )
    memories: list[str] = field(
        default_factory=lambda: ["plain"], metadata={"help": "Memory modes: plain, fast, balanced, lean."}
    )
    steps: int = field(default=30, metadata={"help": "Timed optimizer steps."})
    warmup: int = field(default=3, metadata={"help": "Optimizer steps before the timed ones."})
    micro_batch_size: Optional[int] = field(
        default=None, metadata={"help": "Rows per step; by default the recipes'."}
    )
    cutoff: int = field(default=256, metadata={"help": "Tokens of every row."})
    control_rank: int = field(default=64, metadata={"help": "Rank of the control."})
    lora_rank: int = field(default=32, metadata={"help": "Rank of LoRA and DoRA; alpha is twice that."})
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = field(
        default="auto", metadata={"help": "Frozen weights and autocast."}
    )
    device: str = field(default="0", metadata={"help": "GPU index, or cpu."})
    seed: int = field(default=42, metadata={"help": "Seeds weights and tokens."})

    def check(self) -> None:
        """Raise UserError for values that cannot be."""
        if unknown := [shape for shape in self.shapes if shape not in SHAPES]:
            raise UserError(f"unknown shape {unknown[0]!r}: choose from {', '.join(SHAPES)}")
        if unknown := [mode for mode in self.memories if mode not in ("plain", "fast", "balanced", "lean")]:
            raise UserError(f"unknown memory mode {unknown[0]!r}: choose from plain, fast, balanced, lean")
        if self.steps < 1:
            raise UserError(f"--steps must be at least 1, got {self.steps}")
        for method in self.methods:
            self.config(method)

    def config(self, method: str):
        targets = MIXED_TARGETS if "control" in method else LORA_TARGETS
        return expected_config(
            method, self.control_rank, 1.0, 0.0, self.lora_rank, 2 * self.lora_rank, 0.05, targets
        )


def measure(
    options: Options, shape: str, method: str, mode: str, folder: RunFolder, device: torch.device, dtype: torch.dtype,
    command: Sequence[str],
) -> RunRecord:  # fmt: skip
    """One measurement in its folder.

    Raises:
        UserError: the memory mode does not support the method.
    """
    created = utc_now()
    seed_everything(options.seed)
    memory = MemoryMeter(device)
    base = random_model(shape, dtype, device)
    memory.after_load()
    total = base.num_parameters()
    model = add_adapter(base, options.config(method))
    ready_to_train(model, mode, half=dtype != torch.float32)
    size = options.micro_batch_size or MICRO_BATCH.get(shape, 4)
    ids = torch.randint(SHAPES[shape]["vocab_size"], (size, options.cutoff)).tolist()
    batches = padded_step([TokenRow(row, 1, cut=False) for row in ids], size, pad_token_id=0)
    loss = batch_loss if mode == "plain" else fused_batch_loss
    steps = [batches] * (options.warmup + options.steps)
    throughput = run_steps(model, steps, loss, device, dtype, warmup=options.warmup, memory=memory).summary()
    record = RunRecord(
        domain="llama",
        name=folder.path.name,
        method=method,
        task="shape benchmark",
        seed=options.seed,
        command=["python", "-m", "LlaMA.benchmark_methods", *command],
        created=created,
        finished=utc_now(),
        git=git_state(),
        versions=package_versions(),
        device=describe_device(device),
        model={
            "id": f"random {shape}",
            "revision": None,
            "class": type(base).__name__,
            "total_parameters": total,
        },
        data={
            "id": "random tokens",
            "revision": None,
            "sizes": {"rows": size, "tokens": size * options.cutoff},
        },
        adapter={
            "config": model.peft_config["default"].to_dict(),
            "dtype": "float32",
            **count_parameters(model),
        },
        hyperparameters={
            **asdict(options),
            "memory": mode,
            "micro_batch_size": size,
            "dtype": str(dtype).removeprefix("torch."),
        },
        metrics={"best": {}, "last": {"seconds_per_step": throughput["train_seconds"] / throughput["steps"]}},
        memory=memory.summary(),
        time=throughput,
    )
    record.write(folder.record)
    return record


def line(record: RunRecord) -> str:
    """One measurement for the terminal."""
    peak = record.memory["peak_allocated_bytes"] or record.memory["peak_resident_bytes"]
    return (
        f"{record.name:40} {record.adapter['trainable_parameters']:>12,} trained  {peak / 1e9:7.2f} GB peak  "
        f"{1e3 * record.metrics['last']['seconds_per_step']:8.1f} ms/step"
    )


def main(argv: Sequence[str] | None = None) -> list[RunRecord]:
    """Measure as the command line says; finished measurements are skipped, impossible ones are named."""
    command = list(sys.argv[1:] if argv is None else argv)
    (options,) = parse_arguments(Options, argv=command, description=__doc__)
    options.check()
    device = select_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    quieten()
    records, failed = [], []
    for shape in options.shapes:
        for method in options.methods:
            for mode in options.memories:
                name = f"{shape}-{method.replace(' ', '-')}-{mode}"
                with RunFolder(Path(options.output_dir) / name) as folder:
                    folder.claim({**asdict(options), "shape": shape, "method": method, "memory": mode})
                    if folder.finished:
                        print(f"{name} is finished: skipped (delete its folder to run it again)")
                        continue
                    try:
                        with explain_out_of_memory(
                            device, "--memories lean, a smaller --micro_batch_size or --cutoff"
                        ):
                            records.append(
                                measure(options, shape, method, mode, folder, device, dtype, command)
                            )
                        print(line(records[-1]), flush=True)
                    except UserError as error:
                        failed.append(name)
                        print(f"{name}: {error}", file=sys.stderr, flush=True)
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
    if failed:
        raise UserError(f"not measured: {', '.join(failed)} (reasons above)")
    return records


if __name__ == "__main__":
    run_main(main)
