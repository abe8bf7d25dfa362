"""Make every table, the judged claims, the pictures and the report from the run records below a results folder.

    python -m scripts.make_tables                         results/tables, results/pictures, results/claims.md, results/report.html
    python -m scripts.make_tables --results OTHER_FOLDER --strict

Nothing is trained or measured here and no figure is typed in: ours come from records, the published ones from
results/paper.json. The shipped records lie in results/published, and what is made of them never depends on other runs. Where
there are such runs, results/mine holds the same again: tables with both, rows of your runs marked "yours", and claims judged by
your runs alone. A record that is broken or must not be compared with the others is left out and named on stderr; with
--strict the exit code is then 1.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.hf_argparser import HfArg

from control_experiments.errors import run_main
from control_experiments.paths import RESULTS
from control_experiments.record import write_text_atomic

if TYPE_CHECKING:  # --help does not wait for pandas and matplotlib
    import pandas as pd

    from control_experiments.reporting import records


@dataclass
class Options:
    results: Path = HfArg(default=RESULTS, help="Folder with the runs.")
    strict: bool = HfArg(default=False, help="Exit with 1 if a record had to be left out.")


def publish(frame: pd.DataFrame, judged: pd.DataFrame, paper: records.Paper, problems: list[str], folder: Path, up: str) -> int:
    """Write tables of `frame`, claims judged by `judged`, pictures and page into `folder`, from which `up` leads to the results
    folder; return the number of files."""
    from control_experiments.reporting import claims, page, tables

    filled, found = [tables.make_table(name, frame, paper) for name in tables.SPECIFICATIONS], claims.judge(judged, paper)
    drawn = list(page.draw(frame, paper, found))
    written = tables.write_tables(filled, folder / "tables", f"../{up}")
    written += page.write_pictures(drawn, folder / "pictures")
    written.append(write_text_atomic(folder / "claims.md", claims.markdown(found, paper, up)))
    written.append(page.write_page(frame, filled, found, drawn, problems, folder / "report.html", up))
    return len(written)


def main() -> None:
    from control_experiments.training.arguments import parse_arguments

    (options,) = parse_arguments(Options, description=__doc__)
    from control_experiments.reporting import records

    paper = records.read_paper(RESULTS / "paper.json")
    frame, problems = records.load(options.results)
    ours, yours = frame[frame.whose == "ours"], frame[frame.whose == "yours"]
    prefix = "published/" if (options.results / "published").is_dir() else ""
    shipped = [problem for problem in problems if problem.startswith(prefix)]
    files = publish(ours, ours, paper, shipped, options.results, "")
    if len(yours):
        files += publish(frame, yours, paper, problems, options.results / "mine", "../")
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    of_yours = f" and {len(yours)} of yours" if len(yours) else ""
    print(f"{len(ours)} records{of_yours}; {files} files written to {options.results}")
    if options.strict and problems:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
