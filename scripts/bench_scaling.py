"""How control and LoRA scale over the GPUs of one host: tokens/s, memory per GPU, bytes sent, and the same losses.

    bash scripts/bench_scaling.sh                                           # 1, 2, 4, ... of this host's GPUs
    bash scripts/bench_scaling.sh --processes 1 8 --shards fsdp2 --methods control:lean lora+checkpointing
    bash scripts/bench_scaling.sh --shape llama3-70b --processes 8 --shards fsdp2 --longest --batch 1
    bash scripts/bench_scaling.sh --processes 1 2 --shards fsdp2 --longest --limit 23.5 --batch 1 --tokens 32768
    bash scripts/bench_scaling.sh --device cpu --shape tiny --tokens 16 --processes 1 2      # to try it out

Weak scaling: each process trains on --batch sequences of --tokens tokens, so the work per GPU stays the same. "ddp"
keeps the frozen weights on every GPU (through accelerate) and sends the adapter's gradients alone; "fsdp2" shards the frozen
weights, layer by layer, as --shard fsdp2 of the training scripts does. Each parameter is drawn from a seed of its own, so it
is the same for every number of processes and every sharding. Therefore the losses must be those of one process that
accumulates the same global batch, which is run for comparison. The methods are those of bench_memory.py. Each cell has
processes of its own. A record goes to --output, from which scripts.make_tables draws. A killed run goes on after what it
has measured.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal, Optional

from transformers.hf_argparser import HfArg

from control_experiments.errors import UserError, run_main
from control_experiments.paths import RESULTS
from control_experiments.training.arguments import check_numbers, parse_arguments
from scripts.catalogue import LLAMA_SHAPES, parse_method

SHARDS = ("ddp", "fsdp2")


@dataclass
class Options:
    shape: str = HfArg(default="llama3-8b", help="Model shape.", metadata={"choices": [*LLAMA_SHAPES]})
    methods: list[str] = HfArg(default_factory=lambda: ["lora", "control:fast", "control:lean"], help="See bench_memory.py.")
    shards: list[str] = HfArg(default_factory=lambda: list(SHARDS), help="ddp, fsdp2 or both.", metadata={"choices": SHARDS})
    processes: Optional[list[int]] = HfArg(default=None, help="Numbers of GPUs; default: powers of two, up to all.")
    batch: int = HfArg(default=4, help="Sequences per process and step.")
    tokens: int = HfArg(default=1024, help="Tokens per sequence.")
    steps: int = HfArg(default=6, help="Timed steps; the median is reported.")
    warmup: int = HfArg(default=2, help="Steps before the timed ones.")
    device: Literal["cuda", "cpu"] = HfArg(default="cuda", help="cuda, or cpu (over gloo) to try the script out.")
    longest: bool = HfArg(default=False, help="Instead: the longest sequence that trains, from --tokens on.")
    limit: Optional[float] = HfArg(default=None, help="With --longest: GiB that torch's allocator may take of each GPU.")
    output: str = HfArg(default=str(RESULTS / "scaling"), help="Folder of the record.")

    def check(self) -> None:
        """Raise a `UserError` for what cannot be."""
        for method in map(parse_method, self.methods):
            if method.base or method.switches - {"liger", "checkpointing", "uncast"}:
                raise UserError(
                    f"method {method.text!r}: over several processes bf16 bases are measured, with the switches liger, "
                    "checkpointing and uncast"
                )
        check_numbers(self, "limit", above=0)
        if self.limit and not self.longest:
            raise UserError("--limit goes with --longest")
        if self.longest and self.device == "cpu":
            raise UserError("--longest needs GPUs")
        check_numbers(self, "batch", "tokens", "steps", "processes", at_least=1)
        check_numbers(self, "warmup", at_least=0)
        there = self.processors()
        if not there:
            raise UserError("no GPU here: --device cpu tries the script out")
        if self.processes and max(self.processes) > there:
            raise UserError(f"--processes {max(self.processes)}: this host has {there}")

    def processors(self) -> int:
        """How many GPUs, or cores, this host has."""
        if self.device == "cpu":
            return os.cpu_count() or 1
        import torch

        return torch.cuda.device_count()

    def counts(self) -> list[int]:
        there = 2 if self.device == "cpu" else self.processors()
        return self.processes or [1 << power for power in range(there.bit_length())]


def main() -> None:
    (options,) = parse_arguments(Options, description=__doc__)
    options.check()
    from scripts import scaling  # and torch with it: not before the options are known to be right

    scaling.run(options)


if __name__ == "__main__":
    run_main(main)
