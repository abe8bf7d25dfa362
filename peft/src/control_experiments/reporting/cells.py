"""Tables as data, and how they become files: Markdown, CSV and LaTeX.

`tables` and `benchmark_tables` make them; `write_tables` writes them.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..record import write_text_atomic
from .collection import Summary

NO_RECORD = "no record"
MEBI = 2**20


@dataclass
class Cell:
    """What one place of a table shows.

    Attributes:
        text: for people.
        value, deviation: for CSV; None where there is no figure.
        status: of a published figure, exact or inferred.
        links: (text, file relative to the results folder) of the records behind it.
        notes: footnotes, which say why the cell is empty or not what one would expect.
    """

    text: str
    value: float | int | None = None
    deviation: float | None = None
    links: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    status: str | None = None


@dataclass
class Section:
    """A part of a table under its own heading: one model in one setting.

    `domain` and `methods` (one a row) are what the report filters by; `remarks` are printed below the rows.
    """

    title: str
    header: list[str]
    rows: list[list[Cell]]
    domain: str
    methods: list[str]
    remarks: list[str] = field(default_factory=list)

    def notes(self) -> list[str]:
        """All footnotes in the order in which cells refer to them, each once."""
        return list(dict.fromkeys(note for row in self.rows for cell in row for note in cell.notes))


@dataclass
class Table:
    """One file of results/tables."""

    name: str
    title: str
    about: str
    sections: list[Section]
    remarks: list[str] = field(default_factory=list)


def summary_cell(summary: Summary | None, digits: int, empty: str = NO_RECORD) -> Cell:
    """Mean ± sample standard deviation; a single run has no deviation and shows none."""
    if summary is None:
        return Cell(empty)
    text = f"{summary.mean:,.{digits}f}"
    if summary.deviation is not None:
        text += f" ± {summary.deviation:,.{digits}f}"
    return Cell(text, summary.mean, summary.deviation)


# -- files ----------------------------------------------------------------------------------------------------


def write_tables(tables: Sequence[Table], folder: Path) -> list[Path]:
    """Write each table as .md, .csv and .tex into `folder`, which lies directly in the results folder."""
    written = []
    for table in tables:
        for suffix, render in (("md", markdown), ("csv", comma_separated), ("tex", latex)):
            written.append(write_text_atomic(folder / f"{table.name}.{suffix}", render(table)))
    return written


def markdown(table: Table, up: str = "../") -> str:
    """The table for GitHub; `up` leads from its folder to the results folder, where links start."""
    lines = [f"# {table.title}", "", table.about, *(f"\n{remark}" for remark in table.remarks), ""]
    lines += ["All figures in a row come from the runs (by seed) that its last column links to.", ""]
    for section in table.sections:
        notes = section.notes()
        lines += [f"## {section.title}", ""]
        lines.append("| " + " | ".join(section.header) + " |")
        numeric = [any(row[n].value is not None for row in section.rows) for n in range(len(section.header))]
        lines.append("|" + "|".join("--:" if right else "---" for right in numeric) + "|")
        for row in section.rows:
            lines.append("| " + " | ".join(_markdown_cell(cell, notes, up) for cell in row) + " |")
        lines += ["", *(f"{number}. {_escape_bar(note)}" for number, note in enumerate(notes, 1))]
        lines += (
            [""] * bool(notes) + [f"- {remark}" for remark in section.remarks] + [""] * bool(section.remarks)
        )
    return "\n".join(lines).rstrip() + "\n"


def _markdown_cell(cell: Cell, notes: list[str], up: str) -> str:
    links = ", ".join(f"[{text}]({(up + link).replace(' ', '%20')})" for text, link in cell.links)
    marks = "".join(f" <sup>{notes.index(note) + 1}</sup>" for note in cell.notes)
    return _escape_bar(" ".join(part for part in (cell.text, links) if part)) + marks


def _escape_bar(text: str) -> str:
    return text.replace("|", "\\|")


def comma_separated(table: Table) -> str:
    """One line a row; a figure's deviation and a published figure's status have columns of their own, notes come last."""
    columns = {"section": None}
    for section in table.sections:
        for number, name in enumerate(section.header):
            cells = [row[number] for row in section.rows]
            columns[name] = None
            columns |= {f"{name} sd": None} if any(cell.deviation is not None for cell in cells) else {}
            columns |= {f"{name} status": None} if any(cell.status for cell in cells) else {}
    output = io.StringIO()
    writer = csv.DictWriter(output, [*columns, "notes"], lineterminator="\n")
    writer.writeheader()
    for section in table.sections:
        for row in section.rows:
            line = {"section": section.title, "notes": " ".join(note for cell in row for note in cell.notes)}
            for name, cell in zip(section.header, row, strict=True):
                line[name] = " ".join(link for _, link in cell.links) or (
                    cell.text if cell.value is None else cell.value
                )
                line |= {} if cell.deviation is None else {f"{name} sd": cell.deviation}
                line |= {f"{name} status": cell.status} if cell.status else {}
            writer.writerow(line)
    return output.getvalue()


_LATEX = str.maketrans({
    "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "±": r"$\pm$", "×": r"$\times$", "α": r"$\alpha$",
})  # fmt: skip


def latex(table: Table) -> str:
    """Plain tabulars, one a section, to be included in a document that loads hyperref."""
    parts = [f"% {table.title}; made by scripts/make_tables.py, needs \\usepackage{{hyperref}}"]
    for section in table.sections:
        notes = section.notes()
        numeric = [any(row[n].value is not None for row in section.rows) for n in range(len(section.header))]
        parts.append(f"\n\\paragraph{{{section.title.translate(_LATEX)}}}\\mbox{{}}\\\\")
        parts.append(f"\\begin{{tabular}}{{{''.join('r' if right else 'l' for right in numeric)}}}\n\\hline")
        parts.append(" & ".join(name.translate(_LATEX) for name in section.header) + r" \\ \hline")
        parts += [" & ".join(_latex_cell(cell, notes) for cell in row) + r" \\" for row in section.rows]
        parts.append("\\hline\n\\end{tabular}")
        parts += [f"\n\\noindent {number}. {note.translate(_LATEX)}" for number, note in enumerate(notes, 1)]
        parts += [f"\n\\noindent {remark.translate(_LATEX)}" for remark in section.remarks]
    return "\n".join(parts) + "\n"


def _latex_cell(cell: Cell, notes: list[str]) -> str:
    links = ", ".join(
        f"\\href{{../{link.replace('#', chr(92) + '#').replace('%', chr(92) + '%')}}}{{{text.translate(_LATEX)}}}"
        for text, link in cell.links
    )
    marks = "".join(f"$^{{{notes.index(note) + 1}}}$" for note in cell.notes)
    return " ".join(part for part in (cell.text.translate(_LATEX), links) if part) + marks
