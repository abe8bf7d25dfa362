"""Compare the quickstart's runs: one table on the terminal and in table.md, and one picture, made as those of results/ are."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from control_experiments.errors import UserError, run_main
from control_experiments.paths import RESULTS
from control_experiments.reporting import pictures, records, tables
from control_experiments.reporting.page import curve

TITLE = "Demonstration task (not GLUE)"
ABOUT = """Matthews correlation in percent on a task that the project makes itself from text that Python carries. A constant
prediction has 0, whatever the classes' shares."""


def main() -> None:
    parser = argparse.ArgumentParser("python -m scripts.quickstart_table", description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="folder of the runs, one sub-folder a method")
    folder = parser.parse_args().folder
    frame, problems = records.load(folder)
    runs = frame[(frame.kind == "run") & (frame.task == "demo")]
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    if runs.empty:
        raise UserError(f"{folder} holds no run of the demonstration: start scripts/quickstart.sh first")
    paper = records.read_paper(RESULTS / "paper.json")
    table = tables.make_table("glue", runs, paper._replace(figures=paper.figures[:0]))
    table = replace(table, name="table", title=TITLE, about=ABOUT)
    lines = [(run.row, run.seed, curve(run.record)) for run in runs.itertuples()]
    picture = pictures.save(pictures.curves(lines, TITLE, "Matthews correlation, %"), folder / "curves.png")
    written = [*tables.write_tables([table], folder, ""), picture]
    (section,) = table.sections
    shown = section.shown.drop(columns=["task", "runs"]).replace({r"<sup>(\d+)</sup>": r"[\1]"}, regex=True)
    notes = [f"[{number}] {note}" for number, note in enumerate(section.notes, 1)]
    print(TITLE, ABOUT, shown.to_string(index=False), "\n".join([*notes, *section.remarks]), sep="\n\n")
    print(*(os.path.relpath(path) for path in written), sep="\n")


if __name__ == "__main__":
    run_main(main)
