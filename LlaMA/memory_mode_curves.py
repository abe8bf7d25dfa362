#!/usr/bin/env python3
"""Table and picture of compare_memory_modes.sh's runs, from their records alone.

python -m LlaMA.memory_mode_curves --folder OUT
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import control_experiments  # noqa: F401  # isort: skip  (first, see there)
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from control_experiments.errors import run_main
from control_experiments.record import RunRecord, read_record
from control_experiments.training.arguments import parse_arguments

MODES = ("plain", "fast", "balanced", "lean")
OTHER = "other-seed"  # plain with another seed: how far apart two equally good runs lie


@dataclass
class Options:
    folder: str = field(metadata={"help": "The OUT of compare_memory_modes.sh."})


def curve(record: RunRecord) -> dict[int, float]:
    return {row["step"]: row["eval_loss"] for row in record.history}


def distances(record: RunRecord, plain: RunRecord) -> list[float]:
    """Differences of the held-out losses at the steps that both have."""
    ours, reference = curve(record), curve(plain)
    return [abs(ours[step] - reference[step]) for step in ours.keys() & reference.keys()]


def peak_bytes(record: RunRecord) -> int:
    return record.memory.get("peak_allocated_bytes") or record.memory["peak_resident_bytes"]


def table(records: dict[str, RunRecord]) -> str:
    plain = records["plain"]
    memory = "peak resident memory" if plain.device["kind"] == "cpu" else "peak allocated memory"
    lines = [
        f"| run | last held-out loss | distance from plain: median | largest | {memory} | seconds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, record in records.items():
        apart = distances(record, plain)
        lines.append(
            f"| [{name}]({name}/record.json) | {record.history[-1]['eval_loss']:.4f} | {median(apart):.4f} | "
            f"{max(apart):.4f} | {peak_bytes(record) / 2**20:,.0f} MiB | {record.time['train_seconds']:.0f} |"
        )
    return "\n".join(lines)


def draw(records: dict[str, RunRecord], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 5))
    styles = dict(zip((*MODES, OTHER), ("-", "--", "-.", ":", "-")))
    for name, record in records.items():
        points = curve(record)
        axes.plot(
            list(points), list(points.values()), styles[name], label=name,
            color="lightgrey" if name == OTHER else None, zorder=0 if name == OTHER else 1,
        )  # fmt: skip
    axes.set(xlabel="step", ylabel="held-out loss", title="One training in every memory mode")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    (options,) = parse_arguments(Options, description=__doc__)
    folder = Path(options.folder)
    places = {name: folder / name / "record.json" for name in (*MODES, OTHER)}
    needed = (MODES[0], OTHER)
    records = {name: read_record(path) for name, path in places.items() if path.is_file() or name in needed}
    used = records["plain"]
    text = (
        "# One training in every memory mode\n\n"
        f"Double control of {used.model['id']} on {used.data['id']}, {used.history[-1]['step']} steps, "
        f"{used.device['name']}, seed {used.seed}; {OTHER} is plain with another seed, for scale.\n\n"
        f"{table(records)}\n\n![Held-out loss in every mode](curves.png)\n"
    )
    draw(records, folder / "curves.png")
    (folder / "curves.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    run_main(main)
