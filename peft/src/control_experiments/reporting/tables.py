"""The paper's tables made from run records, with the published figures beside ours, in Markdown, CSV and LaTeX.

`all_tables(collection, paper)` builds them as data; `cells.write_tables` writes the files. Scores are percent, as mean ± sample
standard deviation over seeds; memory is MiB (2**20 bytes) and time seconds, from the same runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .benchmark_tables import benchmark_tables
from .cells import MEBI, NO_RECORD, Cell, Section, Table, summary_cell
from .collection import COMMONSENSE, Collection, Comparison, Row, Summary
from .published import NOT_PUBLISHED, Paper

#: Published figures that belong to no cell.
_IN_TEXT = ("score stated in the text", "memory less than dora", "fits on a GPU of")
GLUE = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")
METHODS = ("control", "lora", "dora")


def all_tables(collection: Collection, paper: Paper) -> list[Table]:
    """Every table, whether or not there are records for it yet."""
    return [
        glue_table(collection, paper),
        vit_table(collection, paper),
        vit_memory_table(collection, paper),
        commonsense_table(collection, paper),
        quantized_table(collection, paper),
        *benchmark_tables(collection),
    ]


# -- cells ----------------------------------------------------------------------------------------------------


def published_cell(paper: Paper, *where: str) -> Cell:
    figure = paper.find(*where)
    if figure is None:
        return Cell(NOT_PUBLISHED)
    notes = [f"{figure.note[0].upper()}{figure.note[1:]}."] if figure.note else []
    return Cell(str(figure), figure.value, figure.spread_as_printed, notes=notes, status=figure.status)


def cost_cells(row: Row, rate: str = "examples") -> list[Cell]:
    """Peak memory (MiB), training time (s) and examples, or tokens, a second of a row's runs."""
    runs = list(row.runs.values())
    if not runs:
        return [Cell(NO_RECORD) for _ in range(3)]
    memory = summary_cell(
        row.over_seeds(lambda run: run.peak_bytes and run.peak_bytes / MEBI), 0, "not measured"
    )
    if memory.value is not None and runs[0].record.memory.get("kind") == "resident set":
        memory.notes.append("Resident memory of the whole process on a CPU, not comparable with a GPU's.")
    seconds = summary_cell(row.over_seeds(lambda run: run.seconds), 1, "not measured")
    speed = summary_cell(row.over_seeds(lambda run: run.per_second(rate)), 0, "not measured")
    resumed = [run.links[0] for run in runs if run.resumed]
    if resumed:
        note = f"{', '.join(resumed)} was resumed, so its record covers only a part of the memory and time."
        memory.notes.append(note)
        seconds.notes.append(note)
    if any(run.shared_gpu for run in runs):
        seconds.notes.append("Not shown: other processes used the GPU at the same time.")
    return [memory, seconds, speed]


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
        "As the GLUE table, with the frozen encoder in 4 or 8 bits, and in 16 under the same recipe.",
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

    Sections with records come first. The paper's own model (or `model`) in its `setting` names the `tasks` without one.
    """
    header = ["task", "method", "trained parameters", "learning rate", "n", "last", "best", "paper, best",
              "peak MiB", "paper, peak", "train s", "paper, time", "examples/s", "runs"]  # fmt: skip
    found = {(c.model, c.setting, c.task): c for c in comparisons if not skip(c)}
    at_scale = [(name, setting) for name in paper.models(table) or [model]]
    domain = {"glue": "roberta", "vit": "vit", "quantized": "qcontrol"}[table]
    measured, empty = [], []
    for key in dict.fromkeys([*((m, s) for m, s, _ in found), *at_scale]):
        name, its_setting = key
        mine = {task: comparison for (*place, task), comparison in found.items() if tuple(place) == key}
        shown, missing = set(mine), []
        if key in at_scale:  # tasks without records have rows only for what was published of them
            shown |= {task for task in tasks if any(paper.of_task(table, name, task))}
            missing = [task for task in tasks if task not in mine]
        rows, methods = [], []
        for task in sorted(
            shown, key=lambda task: (tasks.index(task) if task in tasks else len(tasks), task)
        ):
            comparison = mine.get(task, Comparison("", *key, task, {}, {}))
            for label in _labels(comparison, always=key in at_scale):
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
        remarks = conditions_remark(mine.values())
        remarks += [f"No record yet: {', '.join(missing)}."] if missing else []
        section = _without_empty_columns(Section(title, header, rows, domain, methods, remarks))
        (measured if mine else empty).append(section)
    return [*measured, *empty]


def _labels(comparison: Comparison, always: bool) -> list[str]:
    """The rows of a comparison: the table's methods, each with its variants, then others.

    A method of which there are only rows with something added (other ranks, a memory mode) has no empty row beside them,
    unless `always`: beside the published figures.
    """
    there = {label for label, row in comparison.rows.items() if row.runs or row.problems}

    def method_of(label: str) -> str:
        return label.split(",")[0].split(" ")[0]

    of_method = {method_of(label) for label in there}
    usual = {method for method in METHODS if always or method in there or method not in of_method}
    order = {method: number for number, method in enumerate(METHODS)}
    return sorted(
        {*usual, *comparison.rows}, key=lambda label: (order.get(method_of(label), len(order)), label)
    )


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
        "tokens/s",
        "runs",
    ]
    found = {(c.model, c.setting): c for c in collection.of("llama")}
    always = [(model, "") for model in paper.models("commonsense")]
    sections = []
    for key in dict.fromkeys([*found, *always]):
        model, setting = key
        comparison = found.get(key, Comparison("llama", model, setting, "commonsense", {}, {}))
        published = [label for label in paper.rows("commonsense", model) if not setting]
        rows, methods, missing = [], [], []
        for label in dict.fromkeys([*published, *sorted(comparison.rows)]):
            if label not in comparison.rows:
                missing.append(label)
            row = comparison.rows.get(label, Row())
            scores = [summary_cell(row.summary(column), 2) for column in COMMONSENSE]
            no_match = summary_cell(row.over_seeds(lambda run: run.scored.metrics["last"].get("no_match")), 2)
            ours = [
                Cell(label),
                Cell("ours"),
                trained_cell(row),
                count_cell(row),
                *scores,
                no_match,
                *cost_cells(row, "tokens"),
                runs_cell(row),
            ]
            if label in comparison.rows:
                rows.append(ours)
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
        remarks += [f"No record of ours yet: {', '.join(missing)}."] if missing else []
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
