"""LoRA, DoRA, double control and Control+LoRA on LLaMA's shapes, at the largest micro-batch that the recipes can meet.

    python -m LlaMA.benchmark_methods                                                   both shapes, four methods
    python -m LlaMA.benchmark_methods --shape llama3-8b --methods control:fast control:lean

All options are those of scripts/bench_memory.py, which this calls; its records go to results/memory.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from control_experiments.errors import run_main
from control_experiments.training.arguments import parse_arguments
from scripts import bench_memory
from scripts.bench_memory import Options

#: Rows of the launchers' micro-batches.
MICRO_BATCH = {"llama2-7b": 4, "llama3-8b": 3}
METHODS = ("lora+uncast", "dora", "control", "control+lora+uncast")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the shapes, or the one that the command line names."""
    given = list(sys.argv[1:] if argv is None else argv)
    (options,) = parse_arguments(Options, argv=given, description=__doc__)
    for shape in [options.shape] if "--shape" in given else MICRO_BATCH:
        size = ("--batch", str(MICRO_BATCH.get(shape, 4)), "--tokens", "256")
        bench_memory.main(["--shape", shape, *size, "--steps", "30", "--methods", *METHODS, *given])


if __name__ == "__main__":
    run_main(main)
