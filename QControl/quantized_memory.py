"""Memory and time of a step over 16-bit and quantized bases with random weights of a known shape.

    python -m QControl.quantized_memory --shape roberta-base              the encoder's: batches 64 and 256 of 128 tokens
    python -m QControl.quantized_memory --shape llama3-8b                 LLaMA's: 1 row of 256 and of 2048 tokens
    python -m QControl.quantized_memory --shape tiny-roberta --device cpu --steps 2 --output OUT        to try it out

All options are those of scripts/bench_memory.py, which this calls; its records go to results/memory. `fp32` is what
RoBERTa/finetune.py keeps without --quantization.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from control_experiments.errors import run_main
from control_experiments.training.arguments import parse_arguments
from scripts import bench_memory
from scripts.bench_memory import Options

ENCODER = "--precision bf16 --methods control lora dora --base fp32 bf16 nf4 int8"
DECODER = "--methods control:plain control:lean lora-qkv+uncast lora-qkv+uncast+checkpointing --base nf4"
#: Shape -> bench_memory.py's options of each table; tiny ones are there to try the script out.
TABLES = {
    "roberta-base": [f"--batch {batch} --tokens 128 {ENCODER}" for batch in (64, 256)],
    "tiny-roberta": ["--batch 2 --tokens 16 --methods control lora --base fp32 nf4"],
    "tiny": [f"--batch 2 --tokens 16 {DECODER}"],
}
LLAMA = [f"--batch 1 --tokens {tokens} {DECODER}" for tokens in (256, 2048)]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the tables of the shape that the command line names."""
    given = list(sys.argv[1:] if argv is None else argv)
    (options,) = parse_arguments(Options, argv=given, description=__doc__)
    shape = options.shape if "--shape" in given else "roberta-base"
    for words in TABLES.get(shape, LLAMA):
        bench_memory.main(["--shape", shape, "--steps", "20", *words.split(), *given])


if __name__ == "__main__":
    run_main(main)
