#!/usr/bin/env python3
"""Compare the quickstart's runs: one table on the terminal and in table.md, and one picture.

    python -m scripts.quickstart_table FOLDER METHOD...

Every number comes from FOLDER/METHOD/record.json; a method without a record keeps its row, which says so.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from control_experiments.errors import UserError, run_main
from control_experiments.record import RunRecord, read_record
from control_experiments.reporting import pictures
from control_experiments.reporting.tables import markdown_rows

METRIC = "matthews"
TITLE = "Demonstration task (not GLUE)"
TABLE, PICTURE = "table.md", "score_against_time.png"
MEMORY = {"resident set": ("peak_resident_bytes", "CPU resident"), "cuda allocator": ("peak_allocated_bytes", "GPU allocator")}


def load_records(folder: Path, methods: Sequence[str]) -> dict[str, RunRecord | None]:
    """The record of each method, None where there is none yet.

    Raises:
        UserError: no method has a record, or one is broken or belongs to another method or task.
    """
    records: dict[str, RunRecord | None] = {}
    for method in methods:
        path = folder / method / "record.json"
        records[method] = read_record(path) if path.exists() else None
        if (record := records[method]) and (record.method, record.task) != (method, "demo"):
            raise UserError(
                f"{path} is of {record.method} on {record.task}, expected {method} on demo: delete {path.parent}"
                " and run scripts/quickstart.sh again"
            )
    if not any(records.values()):
        raise UserError(f"{folder} holds no run of {', '.join(methods)}: start scripts/quickstart.sh first")
    return records


def table(records: dict[str, RunRecord | None]) -> pd.DataFrame:
    """A row of texts for each method, and one for a constant prediction, whose Matthews correlation is 0 whatever the
    classes' shares."""
    rows = []
    for method, record in records.items():
        rows.append({"method": method, "Matthews best": "not run"})
        if record is not None:
            bytes_key, label = MEMORY[record.memory["kind"]]
            rows[-1] |= {
                "Matthews best": f"{record.metrics['best'][METRIC]:.3f}", "Matthews last": f"{record.metrics['last'][METRIC]:.3f}",
                "trained parameters": f"{record.adapter['trainable_parameters']:,}", "training time": f"{record.time['train_seconds']:.0f} s",
                "peak memory": f"{record.memory[bytes_key] / 2**20:,.0f} MiB {label}",
            }  # fmt: skip
    constant = {"method": "majority class", "Matthews best": "0.000", "Matthews last": "0.000", "trained parameters": "0"}
    return pd.DataFrame([*rows, constant]).fillna("")


def conditions(records: Sequence[RunRecord]) -> str:
    """What the runs have in common, in one line; where they differ, it says so instead of hiding it."""
    facts = {
        "model": lambda r: r.model["id"],
        "rows": lambda r: " + ".join(f"{size} {split}" for split, size in r.data["sizes"].items()),
        "data": lambda r: f"sha256 {r.data['sha256'][:12]}",
        "epochs": lambda r: r.hyperparameters["epochs"],
        "learning rate": lambda r: r.hyperparameters["lr"],
        "seed": lambda r: r.seed,
        "device": lambda r: f"{r.device['count']} x {r.device['name']}",
        "Python": lambda r: r.versions["python"],
    }
    parts = []
    for name, fact in facts.items():
        values = list(dict.fromkeys(str(fact(record)) for record in records))
        parts.append(f"{name} {values[0]}" if len(values) == 1 else f"DIFFERENT {name}: {', '.join(values)}")
    return "; ".join(parts)


def markdown(records: dict[str, RunRecord | None], rows: pd.DataFrame, caption: str) -> str:
    """The table as Markdown; each method's name links to its record."""
    names = [f"[{name}]({name}/record.json)" if records.get(name) else name for name in rows.method]
    return f"""# Quickstart

The demonstration task is made by the project itself from text that Python carries; it is not GLUE.

{markdown_rows(rows.assign(method=names))}

Equal conditions for all: {caption}.

![Matthews correlation on dev against training time]({PICTURE})
"""


def plot(records: dict[str, RunRecord | None], path: Path) -> None:
    """Dev metric of each evaluation against the training time up to it (evaluations themselves left out)."""
    lines = []
    for method, record in ((method, record) for method, record in records.items() if record):
        seconds_per_step = record.time["train_seconds"] / record.time["steps"]
        points = [(e["step"] * seconds_per_step, e[METRIC]) for e in record.history if METRIC in e]
        lines.append((method, record.seed, points))
    figure = pictures.curves(lines, TITLE, "Matthews correlation on dev", "training time (s)")
    (axes,) = figure.axes
    axes.axhline(0, color="grey", linestyle=":")
    axes.annotate("majority class", (0, 0), (2, 3), textcoords="offset points", fontsize=9, color="grey")
    axes.set_xlim(left=0)
    pictures.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", type=Path, help="folder of the runs, one sub-folder a method")
    parser.add_argument("methods", nargs="+", help="methods in the table's order")
    arguments = parser.parse_args()
    folder, records = arguments.folder, load_records(arguments.folder, arguments.methods)
    try:
        rows = table(records)
        caption = conditions([record for record in records.values() if record])
        plot(records, folder / PICTURE)
    except KeyError as missing:
        told = f"a record in {folder} lacks {missing}: delete that folder and run scripts/quickstart.sh again"
        raise UserError(told) from missing
    (folder / TABLE).write_text(markdown(records, rows, caption), encoding="utf-8")
    print(f"{TITLE}\n\n{rows.to_string(index=False)}\n\n{caption}")
    for name in (TABLE, PICTURE):
        print(os.path.relpath(folder / name))


if __name__ == "__main__":
    run_main(main)
