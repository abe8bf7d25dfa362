#!/usr/bin/env python3
"""Make every table, the judged claims and the report from the run records below a results folder.

    python -m scripts.make_tables                         results/tables/*.md|csv|tex, results/claims.md, results/report.html
    python -m scripts.make_tables --results OTHER_FOLDER --strict

Nothing is trained or measured here and no figure is typed in: ours come from records, the published ones from
results/paper.json. A record that is broken or must not be compared with the others leaves its cell empty with a footnote
and is named on stderr; with --strict the exit code is then 1.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from control_experiments.errors import run_main
from control_experiments.paths import RESULTS
from control_experiments.reporting.cells import write_tables
from control_experiments.reporting.claims import judge, write_claims
from control_experiments.reporting.collection import collect
from control_experiments.reporting.published import read_paper
from control_experiments.reporting.report import write_report
from control_experiments.reporting.tables import all_tables
from control_experiments.training.arguments import parse_arguments


@dataclass
class Options:
    results: str = field(default=str(RESULTS), metadata={"help": "Folder with the runs."})
    paper: Optional[str] = field(
        default=None, metadata={"help": "Published figures; default: the paper.json of this project."}
    )
    strict: bool = field(default=False, metadata={"help": "Exit with 1 if a record had to be left out."})


def main() -> None:
    (options,) = parse_arguments(Options, description=__doc__)
    results = Path(options.results)
    paper = read_paper(Path(options.paper) if options.paper else RESULTS / "paper.json")
    collection = collect(results)
    tables, claims = all_tables(collection, paper), judge(collection, paper)
    written = write_tables(tables, results / "tables")
    written.append(write_claims(claims, paper, results / "claims.md"))
    written.append(write_report(collection, tables, claims, results / "report.html"))
    for problem in collection.problems:
        print(f"left out: {problem.message}", file=sys.stderr)
    runs = sum(1 for comparison in collection.comparisons for _ in comparison.runs())
    print(
        f"{runs} runs in {len(collection.comparisons)} comparisons; {len(written)} files written to {results}"
    )
    if options.strict and collection.problems:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
