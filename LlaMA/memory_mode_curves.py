#!/usr/bin/env python3
"""Table and picture of compare_memory_modes.sh's runs, from their records alone.

python -m LlaMA.memory_mode_curves --folder OUT
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from transformers.hf_argparser import HfArg

from control_experiments.errors import run_main
from control_experiments.record import read_record, write_text_atomic
from control_experiments.training.arguments import parse_arguments

MODES = ("plain", "fast", "balanced", "lean")
OTHER = "other-seed"  # plain with another seed: how far apart two equally good runs lie


@dataclass
class Options:
    folder: str = HfArg(help="The OUT of compare_memory_modes.sh.")


def main(argv: Sequence[str] | None = None) -> None:
    (options,) = parse_arguments(Options, argv=argv, description=__doc__)
    import pandas as pd

    from control_experiments.reporting import pictures
    from control_experiments.reporting.tables import markdown_rows

    folder = Path(options.folder)
    places = {name: folder / name / "record.json" for name in (*MODES, OTHER)}
    needed = (MODES[0], OTHER)
    records = {name: read_record(path) for name, path in places.items() if path.is_file() or name in needed}
    used = records["plain"]
    losses = {}
    for name, record in records.items():
        losses[name] = {row["step"]: row["eval_loss"] for row in record.history}
    memory = "peak resident memory" if used.device["kind"] == "cpu" else "peak allocated memory"
    rows = []
    for name, record in records.items():
        shared = losses[name].keys() & losses["plain"].keys()
        apart = [abs(losses[name][step] - losses["plain"][step]) for step in shared]
        peak = record.memory.get("peak_allocated_bytes") or record.memory["peak_resident_bytes"]
        rows.append({
            "run": f"[{name}]({name}/record.json)", "last held-out loss": f"{record.history[-1]['eval_loss']:.4f}",
            "distance from plain: median": f"{median(apart):.4f}", "largest": f"{max(apart):.4f}",
            memory: f"{peak / 2**20:,.0f} MiB", "seconds": f"{record.time['train_seconds']:.0f}",
        })  # fmt: skip
    lines = [(name, record.seed, sorted(losses[name].items())) for name, record in records.items()]
    title = "One training in every memory mode"
    pictures.save(pictures.curves(lines, title, "held-out loss", "step"), folder / "curves.png")
    text = (
        f"# {title}\n\n"
        f"Double control of {used.model['id']} on {used.data['id']}, {used.history[-1]['step']} steps, "
        f"{used.device['name']}, seed {used.seed}; {OTHER} is plain with another seed, for scale.\n\n"
        + markdown_rows(pd.DataFrame(rows))
        + "\n\n![Held-out loss in every mode](curves.png)\n"
    )
    write_text_atomic(folder / "curves.md", text)
    print(text)


if __name__ == "__main__":
    run_main(main)
