"""The paper's tables made from run records, with the published figures beside ours, in Markdown, CSV and LaTeX.

`all_tables(collection, paper)` builds them as data; `write_tables` writes the files. Scores are percent, as mean ± sample
standard deviation over seeds; memory is MiB (2**20 bytes) and time seconds, from the same runs.
"""

from __future__ import annotations

import csv
import io
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .collection import COMMONSENSE, Collection, Comparison, Row, Summary
from .published import NOT_PUBLISHED, Paper

NO_RECORD = "no record"
#: Published figures that belong to no cell.
_IN_TEXT = ("score stated in the text", "memory less than dora", "fits on a GPU of")
#: Rows of a commonsense table without any record.
_COMMONSENSE_ROWS = ("control+lora r64+r32", "double control r64", "lora r32", "dora r32")
GLUE = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")
METHODS = ("control", "lora", "dora")
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


def all_tables(collection: Collection, paper: Paper) -> list[Table]:
    """Every table, whether or not there are records for it yet."""
    return [
        glue_table(collection, paper),
        vit_table(collection, paper),
        vit_memory_table(collection, paper),
        commonsense_table(collection, paper),
        quantized_table(collection, paper),
        memory_speed_table(collection),
    ]


# -- cells ----------------------------------------------------------------------------------------------------


def summary_cell(summary: Summary | None, digits: int, empty: str = NO_RECORD) -> Cell:
    """Mean ± sample standard deviation; a single run has no deviation and shows none."""
    if summary is None:
        return Cell(empty)
    text = f"{summary.mean:,.{digits}f}"
    if summary.deviation is not None:
        text += f" ± {summary.deviation:,.{digits}f}"
    return Cell(text, summary.mean, summary.deviation)


def published_cell(paper: Paper, *where: str) -> Cell:
    figure = paper.find(*where)
    if figure is None:
        return Cell(NOT_PUBLISHED)
    notes = [f"{figure.note[0].upper()}{figure.note[1:]}."] if figure.note else []
    return Cell(str(figure), figure.value, figure.spread_as_printed, notes=notes, status=figure.status)


def cost_cells(row: Row) -> list[Cell]:
    """Peak memory (MiB), training time (s) and examples a second of a row's runs."""
    runs = list(row.runs.values())
    if not runs:
        return [Cell(NO_RECORD) for _ in range(3)]
    memory = summary_cell(
        row.over_seeds(lambda run: run.peak_bytes and run.peak_bytes / MEBI), 0, "not measured"
    )
    if memory.value is not None and runs[0].record.memory.get("kind") == "resident set":
        memory.notes.append("Resident memory of the whole process on a CPU, not comparable with a GPU's.")
    seconds = summary_cell(row.over_seeds(lambda run: run.seconds), 1, "not measured")
    rate = summary_cell(row.over_seeds(lambda run: run.examples_per_second), 0, "not measured")
    resumed = [run.links[0] for run in runs if run.resumed]
    if resumed:
        note = f"{', '.join(resumed)} was resumed, so its record covers only a part of the memory and time."
        memory.notes.append(note)
        seconds.notes.append(note)
    if any(run.shared_gpu for run in runs):
        seconds.notes.append("Not shown: other processes used the GPU at the same time.")
    return [memory, seconds, rate]


def trained_cell(row: Row) -> Cell:
    counts = {run.trained_parameters for run in row.runs.values()}
    if not counts:
        return Cell(NO_RECORD)
    return Cell(
        " / ".join(f"{count:,}" for count in sorted(counts, key=str)),
        counts.pop() if len(counts) == 1 else None,
    )


def count_cell(row: Row) -> Cell:
    return Cell(str(len(row.runs)), len(row.runs))


def rate_cell(row: Row) -> Cell:
    rates = {run.record.hyperparameters.get("lr") for run in row.runs.values()}
    return Cell(f"{rates.pop():g}") if len(rates) == 1 and None not in rates else Cell("")


def runs_cell(row: Row) -> Cell:
    """The records of a row, or why there is none to show."""
    if row.runs:
        return Cell("", links=row.links)
    return Cell(
        "left out" if row.problems else NO_RECORD, notes=[problem.message for problem in row.problems]
    )


def conditions_remark(comparisons: Iterable[Comparison]) -> list[str]:
    """One line on what the runs of each comparison have in common."""
    lines = []
    for comparison in comparisons:
        runs = list(comparison.runs())
        if not runs:
            continue
        facts = dict(comparison.conditions)
        first = runs[0].record
        torch = sorted({run.record.versions.get("torch", "?") for run in runs})
        sizes = " + ".join(
            f"{size:,} {split}"
            for split, size in first.data.get("sizes", {}).items()
            if isinstance(size, int)
        )
        named = ("epochs", "batch_size", "precision", "autocast", "dtype", "augment")
        settings = ", ".join(f"{name.replace('_', ' ')} {facts[name]}" for name in named if name in facts)
        lines.append(
            f"{comparison.task}: {sizes}; {settings}; {facts.get('device', first.device['name'])}, torch {', '.join(torch)}."
        )
    return lines


# -- the tables -----------------------------------------------------------------------------------------------


def glue_table(collection: Collection, paper: Paper) -> Table:
    return Table(
        "glue",
        "GLUE",
        "Dev-set scores of encoders whose classifier is trained with an adapter: Matthews correlation (cola), accuracy, "
        "or the mean of a task's two official metrics, in percent.",
        _long_sections(
            "glue",
            collection.of("roberta"),
            paper,
            tasks=GLUE,
            skip=lambda comparison: comparison.task not in GLUE,
        ),
        remarks=_published_memory(paper),
    )


def vit_table(collection: Collection, paper: Paper) -> Table:
    return Table(
        "vit_accuracy",
        "ViT: accuracy",
        "Test accuracy in percent; after each epoch the test images are looked at, so best is optimistic.",
        _long_sections("vit", collection.of("vit"), paper, tasks=("cifar100",), setting="4-layer MLP"),
    )


def quantized_table(collection: Collection, paper: Paper) -> Table:
    return Table(
        "quantized",
        "GLUE on quantized bases",
        "As the GLUE table, with the frozen encoder in 4 or 8 bits.",
        _long_sections(
            "quantized", collection.of("qcontrol"), paper, tasks=("rte",), model="roberta-base", setting="nf4"
        ),
        remarks=["The paper's repository has the scripts of this comparison; its results are not published."],
    )


def _long_sections(
    table: str,
    comparisons: Sequence[Comparison],
    paper: Paper,
    *,
    tasks: Sequence[str],
    model: str | None = None,
    setting: str = "",
    skip=lambda comparison: False,
) -> list[Section]:
    """One section for each model and setting, one row for each task and method.

    The paper's own model (or `model`) in its `setting` has all `tasks`, with or without records; other models have those
    with a record.
    """
    header = ["task", "method", "trained parameters", "learning rate", "n", "last", "best", "paper, best",
              "peak MiB", "paper, peak", "train s", "paper, time", "examples/s", "runs"]  # fmt: skip
    found = {(c.model, c.setting, c.task): c for c in comparisons if not skip(c)}
    at_scale = [(name, setting) for name in paper.models(table) or [model]]
    sections = []
    for key in dict.fromkeys([*at_scale, *((m, s) for m, s, _ in found)]):
        name, its_setting = key
        shown = list(tasks) if key in at_scale else []
        shown += [task for m, s, task in found if (m, s) == key and task not in shown]
        shown.sort(key=lambda task: (tasks.index(task) if task in tasks else len(tasks), task))
        rows, methods = [], []
        for task in shown:
            comparison = found.get((*key, task), Comparison("", *key, task, {}, {}))
            labels = [*METHODS, *(label for label in sorted(comparison.rows) if label not in METHODS)]
            for label in labels:
                row = comparison.rows.get(label, Row())
                memory, seconds, rate = cost_cells(row)
                where = (table, name, label, task)
                rows.append([
                    Cell(task), Cell(label), trained_cell(row), rate_cell(row), count_cell(row),
                    summary_cell(row.summary(task, "last"), 2), summary_cell(row.summary(task, "best"), 2),
                    published_cell(paper, *where, "best score"),
                    memory, published_cell(paper, *where, "peak memory"),
                    seconds, published_cell(paper, *where, "training time"), rate, runs_cell(row),
                ])  # fmt: skip
                methods.append(label)
        title = f"{name}, {its_setting}" if its_setting else name
        mine = [found[m, s, t] for m, s, t in found if (m, s) == key]
        domain = {"glue": "roberta", "vit": "vit", "quantized": "qcontrol"}[table]
        sections.append(Section(title, header, rows, domain, methods, conditions_remark(mine)))
    return [_without_empty_columns(section) for section in sections]


def _without_empty_columns(section: Section) -> Section:
    """Leave out columns of published figures in which nothing was published for this model."""
    keep = [
        number
        for number, name in enumerate(section.header)
        if name in ("paper, best",)
        or not name.startswith("paper")
        or any(r[number].value is not None for r in section.rows)
    ]
    section.header = [section.header[number] for number in keep]
    section.rows = [[row[number] for number in keep] for row in section.rows]
    return section


def _published_memory(paper: Paper) -> list[str]:
    figures = [f for f in paper.figures if (f.table, f.column, f.quantity) == ("glue", "all", "peak memory")]
    listed = "; ".join(f"{figure.row} {figure}" for figure in figures)
    return [
        f"Published peak memory of RoBERTa-base on GLUE, without the task, batch or length it was measured at: {listed}."
    ]


def commonsense_table(collection: Collection, paper: Paper) -> Table:
    """One row for each method, one column for each test set; the paper's row below ours."""
    header = [
        "method",
        "whose",
        "trained parameters",
        "n",
        *COMMONSENSE,
        "no match",
        "peak MiB",
        "train s",
        "examples/s",
        "runs",
    ]
    found = {(c.model, c.setting): c for c in collection.of("llama")}
    always = [(model, "") for model in paper.models("commonsense")]
    if not any(model.startswith("smollm2") for model, _ in found):
        always.append(("smollm2-135m-instruct", ""))
    sections = []
    for key in dict.fromkeys([*always, *found]):
        model, setting = key
        comparison = found.get(key, Comparison("llama", model, setting, "commonsense", {}, {}))
        published = [label for label in paper.rows("commonsense", model) if not setting]
        rows, methods = [], []
        for label in dict.fromkeys([*published, *sorted(comparison.rows)] or _COMMONSENSE_ROWS):
            row = comparison.rows.get(label, Row())
            scores = [summary_cell(row.summary(column), 2) for column in COMMONSENSE]
            no_match = summary_cell(row.over_seeds(lambda run: run.scored.metrics["last"].get("no_match")), 2)
            rows.append(
                [
                    Cell(label),
                    Cell("ours"),
                    trained_cell(row),
                    count_cell(row),
                    *scores,
                    no_match,
                    *cost_cells(row),
                    runs_cell(row),
                ]
            )
            methods.append(label)
            if label in published:
                scores = [
                    published_cell(paper, "commonsense", model, label, column, "score")
                    for column in COMMONSENSE
                ]
                trained = published_cell(paper, "commonsense", model, label, "all", "trained parameters")
                seconds = published_cell(paper, "commonsense", model, label, "all", "training time")
                unknown = Cell(NOT_PUBLISHED)
                rows.append(
                    [
                        Cell(label),
                        Cell("paper"),
                        trained,
                        Cell(""),
                        *scores,
                        unknown,
                        unknown,
                        seconds,
                        unknown,
                        Cell(""),
                    ]
                )
                methods.append(label)
        title = f"{model}, {setting}" if setting else model
        remarks = conditions_remark([comparison])
        remarks += [
            f"{figure.row}: {figure.quantity} {figure}."
            for figure in paper.figures
            if (figure.table, figure.model) == ("commonsense", model)
            and figure.quantity in _IN_TEXT
            and not setting
        ]
        sections.append(Section(title, header, rows, "llama", methods, remarks))
    return Table(
        "commonsense",
        "Commonsense reasoning",
        "Accuracy in percent on eight test sets after training on commonsense data. One checkpoint of a run is answered "
        "with, the best by held-out loss, so there is no separate best and last. No match: answers without an answer word, "
        "which count as wrong.",
        sections,
        remarks=["Rows named lora and dora of the paper are those that it compares with, from DoRA's repository."],
    )  # fmt: skip


def vit_memory_table(collection: Collection, paper: Paper) -> Table:
    """Peak memory and step time of ViT-B/16 on one batch; one section for each device and batch."""
    header = [
        "attention",
        "method",
        "trained parameters",
        "n",
        "peak MiB",
        "paper, peak",
        "paper, as tabulated",
        "ms a step",
        "runs",
    ]
    groups: dict[tuple, dict[tuple, dict[str, object]]] = {}
    for link, record in collection.measurements.items():
        if record.domain != "vit" or record.task != "memory":
            continue
        options = record.hyperparameters
        key = (
            record.device["name"],
            record.model["class"],
            options["batch_size"],
            options["image_size"],
            options["autocast"],
        )
        groups.setdefault(key, {}).setdefault((options["attention"], record.method), {})[link] = record
    sections = []
    for key in sorted(groups) or [("no device yet", "vit_base_patch16_224", 128, 224, "fp16")]:
        device, model, batch, size, autocast = key
        rows, methods = [], []
        for attention in ("eager", "sdpa"):
            for method in ("lora", "control", "dora"):
                records = groups.get(key, {}).get((attention, method), {})
                peaks = [record.memory["peak_allocated_bytes"] for record in records.values()]
                times = [record.metrics["milliseconds_per_step"] for record in records.values()]
                trained = [record.adapter["trainable_parameters"] for record in records.values()]
                where = ("vit", model, method, "cifar100")
                same = attention == "eager" and batch == 128
                rows.append([
                    Cell(attention), Cell(method), Cell(f"{trained[0]:,}", trained[0]) if trained else Cell(NO_RECORD),
                    Cell(str(len(records)), len(records)),
                    summary_cell(Summary.of([peak / MEBI for peak in peaks]) if None not in peaks else None, 0,
                                 "not measured" if records else NO_RECORD),
                    published_cell(paper, *where, "peak memory") if same else Cell(NOT_PUBLISHED),
                    published_cell(paper, *where, "peak memory as tabulated") if same else Cell(NOT_PUBLISHED),
                    summary_cell(Summary.of(times), 1),
                    Cell("" if records else NO_RECORD, links=[(str(n), link) for n, link in enumerate(records, 1)]),
                ])  # fmt: skip
                methods.append(method)
        sections.append(
            Section(
                f"{model}, batch {batch}, {size} pixels, {autocast}, {device}", header, rows, "vit", methods
            )
        )
    return Table(
        "vit_memory",
        "ViT: memory",
        "Peak of the CUDA allocator over whole training steps of ViT-B/16 with four-layer MLPs and random weights. The "
        "published runs used eager attention.",
        sections,
    )


def memory_speed_table(collection: Collection) -> Table:
    """What scripts/bench_memory.py measured: memory over the weights against time, one section for each setting."""
    header = ["method", "trained parameters", "n", "weights GB", "over weights GB", "ms a step", "tokens/s",
              "time / fastest LoRA", "memory / leanest LoRA", "on the frontier", "runs"]  # fmt: skip
    sections = []
    for setting, measured in benchmark_settings(collection).items():
        points = {method: point for method, point in measured.items() if point.seconds}
        loras = [point for method, point in points.items() if method.startswith("lora")]
        fastest = min((point.seconds.mean for point in loras), default=None)
        leanest = min((point.over.mean for point in loras), default=None)
        frontier = frontier_of({method: (p.seconds.mean, p.over.mean) for method, p in points.items()})
        rows = []
        for method, point in measured.items():
            links = [(str(number), link) for number, link in enumerate(point.links, 1)]
            if not point.seconds:
                failed = Cell("failed", notes=[f"{method}: {point.error}."])
                rows.append(
                    [Cell(method), failed, Cell("0", 0), *[Cell("") for _ in range(7)], Cell("", links=links)]
                )
                continue
            rows.append([
                Cell(method), Cell(f"{point.trained:,}", point.trained), Cell(str(point.seconds.n), point.seconds.n),
                summary_cell(point.static, 2), summary_cell(point.over, 2),
                summary_cell(Summary.of([1000 * value for value in point.values["seconds"]]), 1),
                summary_cell(Summary.of(point.values["tokens"]), 0),
                _ratio(point.seconds.mean, fastest), _ratio(point.over.mean, leanest),
                Cell("yes" if method in frontier else "no"), Cell("", links=links),
            ])  # fmt: skip
        sections.append(Section(setting, header, rows, "llama", list(measured)))
    for link, benchmark in collection.benchmarks.items():
        if benchmark["options"].get("limit"):
            sections.append(_longest_section(link, benchmark))
    return Table(
        "memory_speed",
        "Memory against speed",
        "One training step on random weights of the true shape; every method in a process of its own. The frontier are "
        "the methods that no other beats in both memory and time. GB are 10^9 bytes.",
        sections,
        remarks=[] if sections else ["No record yet: bash scripts/rerun_memory.sh"],
    )


def _ratio(value: float, reference: float | None) -> Cell:
    return Cell(f"{value / reference:.2f}", value / reference) if reference else Cell("")


def _longest_section(link: str, benchmark: dict) -> Section:
    options = benchmark["options"]
    title = f"{options['shape']}, batch {options['batch']}: longest sequence within {options['limit']:g} GiB, {benchmark['device']}"
    rows = [
        [Cell(r["method"]), Cell(f"{r['longest_tokens']:,}", r["longest_tokens"]) if "longest_tokens" in r else Cell("failed"),
         Cell("", links=[("1", link)])]
        for r in benchmark["results"]
    ]  # fmt: skip
    return Section(
        title, ["method", "tokens", "runs"], rows, "llama", [r["method"] for r in benchmark["results"]]
    )


@dataclass
class Measured:
    """One method of the benchmark over its repeats: seconds a step and GB.

    `links` are all files that name it, `measured_in` those in which it did not fail, one for each value.
    """

    links: list[str] = field(default_factory=list)
    measured_in: list[str] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=dict)
    trained: int = 0
    error: str = ""

    @property
    def seconds(self) -> Summary | None:
        return Summary.of(self.values.get("seconds", []))

    @property
    def over(self) -> Summary | None:
        return Summary.of(self.values.get("over", []))

    @property
    def static(self) -> Summary | None:
        return Summary.of(self.values.get("static", []))


def benchmark_settings(collection: Collection) -> dict[str, dict[str, Measured]]:
    """Setting -> method -> what was measured; files of one setting on one device are repeats of each other."""
    settings: dict[str, dict[str, Measured]] = {}
    for link, benchmark in collection.benchmarks.items():
        options = benchmark["options"]
        if options.get("limit"):
            continue
        setting = (
            f"{options['shape']}, {options['batch']} x {options['tokens']} tokens, {benchmark['device']}"
        )
        for result in benchmark["results"]:
            point = settings.setdefault(setting, {}).setdefault(result["method"], Measured())
            point.links.append(link)
            if "step_seconds" not in result:
                point.error = result.get("error", "no result")
                continue
            point.measured_in.append(link)
            point.trained = result["trained_parameters"]
            for name, value in (
                ("seconds", result["step_seconds"]),
                ("tokens", result["tokens_per_second"]),
                ("over", result["over_static_bytes"] / 1e9),
                ("static", result["static_bytes"] / 1e9),
            ):
                point.values.setdefault(name, []).append(value)
    return settings


def frontier_of(points: dict[str, tuple[float, float]]) -> list[str]:
    """Names of the points that no other equals or beats in both coordinates (smaller is better), by the first one."""
    chosen, best = [], float("inf")
    for name, (_, second) in sorted(points.items(), key=lambda item: item[1]):
        if second < best:
            chosen.append(name)
            best = second
    return chosen


# -- files ----------------------------------------------------------------------------------------------------


def write_tables(tables: Sequence[Table], folder: Path) -> list[Path]:
    """Write each table as .md, .csv and .tex into `folder`, which lies directly in the results folder."""
    written = []
    for table in tables:
        for suffix, render in (("md", markdown), ("csv", comma_separated), ("tex", latex)):
            written.append(write_text(folder / f"{table.name}.{suffix}", render(table)))
    return written


def write_text(path: Path, text: str) -> Path:
    """Write a file so that readers see the old or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


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
