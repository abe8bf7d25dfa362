"""Tables as pivots of the records: which rows, by what they are told apart, which figures. `TABLES` lists them all.

A figure is the mean ± sample standard deviation over the records of its row (seeds, or repeats of a benchmark). All figures of a row
come from the records that its last column links to. Memory is MiB (2**20 bytes) or GB (10**9), time seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from ..record import write_text_atomic
from .records import COMMONSENSE, GLUE, KERNELS, MEBI, Paper

NO_RECORD, NOT_PUBLISHED, NOT_MEASURED = "no record", "not published", "not measured"
METHODS = ("control", "double control", "control+lora", "control+dora", "lora", "dora")
WHOSE = ("ours", "yours", "paper")
#: Figures that not every row can have: of one process there is no efficiency.
_PARTLY = ("efficiency %", "losses apart", "time / fastest LoRA", "memory / leanest LoRA", "times published", "same as published %")


@dataclass
class Section:
    """A part of a table under its own heading, one model in one setting.

    Attributes:
        shown: for people, a row of texts each; `runs` holds (text, file) pairs.
        data: for CSV: figures with their deviations, and files.
        methods: of each row, for the page's filter.
        notes, remarks: numbered footnotes of `shown`, and lines below it.
    """

    title: str
    domain: str
    shown: pd.DataFrame
    data: pd.DataFrame
    methods: list[str]
    notes: list[str]
    remarks: list[str]


@dataclass
class Table:
    """One file of results/tables: which rows of the records it shows, and how.

    Attributes:
        select: the records' rows; may add columns to them.
        keys: header -> column that tells rows apart.
        figures: header -> (column, factor, format).
        command: what makes its records.
    """

    name: str
    title: str
    about: str
    select: Callable[[pd.DataFrame], pd.DataFrame]
    keys: dict[str, str]
    figures: dict[str, tuple[str, float, str]]
    command: str
    remarks: list[str] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)


# -- pivot ----------------------------------------------------------------------------------------------------


def fill(table: Table, frame: pd.DataFrame) -> Table:
    """The table with its sections: one for each `section` of the selected rows, those with records first."""
    rows = table.select(frame)
    measured = rows.groupby("section", sort=False).n.sum() if len(rows) else pd.Series(dtype=float)
    for title in sorted(measured.index, key=lambda title: measured[title] == 0):
        part = rows[rows.section == title]
        shown, data, methods, notes = [], [], [], []
        for _, group in part.groupby([*table.keys.values(), "whose"], sort=False, dropna=False):
            line, figures = _line(table, group, notes)
            shown.append(line)
            data.append({"section": title, **figures})
            methods.append(group.row.iloc[0])
        shown = pd.DataFrame(shown)
        if set(shown.whose) == {"ours"}:
            shown = shown.drop(columns="whose")
        table.sections.append(
            Section(title, part.domain.iloc[0], shown, pd.DataFrame(data), methods, notes, _conditions(part))
        )
    if not table.sections:
        table.remarks.append(f"No record yet: {table.command}")
    return table


def _line(table: Table, group: pd.DataFrame, notes: list[str]) -> tuple[dict, dict]:
    """A row's texts and its figures; notes that it needs are added to `notes`."""

    def marked(text: str, reasons) -> str:
        for reason in dict.fromkeys(reasons):
            notes.append(reason) if reason not in notes else None
            text += f" <sup>{notes.index(reason) + 1}</sup>"
        return text

    first, whose = group.iloc[0], group.whose.iloc[0]
    links = [(text or str(number), file) for number, part in enumerate(group.links, 1) for text, file in part]
    files = " ".join(dict.fromkeys(file for _, file in links))
    line = {header: str(first[column]) for header, column in table.keys.items()} | {"whose": whose}
    data, problems = dict(line), [problem for problem in group.problem if problem]
    measured = group[group.error.fillna("") == ""] if "error" in group else group
    count = 0 if problems or whose == "paper" or not files else len(measured)
    line["n"] = data["n"] = "" if whose == "paper" else count
    printed: list[str] = []
    for header, (column, factor, form) in table.figures.items():
        values = measured[column].dropna().astype(float) * factor if column in group else pd.Series(dtype=float)
        if whose == "paper":
            published = first.published.get(header)
            said = [f"{published.note[0].upper()}{published.note[1:]}."] if published and isinstance(published.note, str) else []
            line[header] = marked(published.text, said) if published else NOT_PUBLISHED
            data |= {header: published.value, f"{header} status": published.status} if published else {header: NOT_PUBLISHED}
            printed += said
        elif count and len(values) == count:
            constant = count == 1 or values.nunique() == 1
            line[header] = f"{values.mean():{form}}" + ("" if constant else f" ± {values.std():{form}}")
            data |= {header: values.mean()} | ({f"{header} sd": values.std()} if count > 1 else {})
        else:
            there = "" if header in _PARTLY else NOT_MEASURED if count else "failed" if files and not problems else NO_RECORD
            data[header] = line[header] = there
    line["runs"] = links if count or not problems else marked("left out", problems)
    if not files and whose != "paper":
        line["runs"] = NO_RECORD
    reasons = list(dict.fromkeys(note for part in group.notes for note in part))
    if not len(measured):
        reasons += [f"{first.row}: {error}." for error in group.error]
    noted = [header for header in ("peak MiB", "train s", "ms a step", "longest tokens", "tokens/s") if header in line]
    if reasons and noted:  # at the figure that is missing, else at the first that the note can be about
        at = next((header for header in noted if line[header] in (NOT_MEASURED, "failed")), noted[0])
        line[at] = marked(line[at], reasons)
    return line, data | {"runs": files or ("" if whose == "paper" else NO_RECORD), "notes": " ".join(dict.fromkeys([*problems, *reasons, *printed]))}


def _conditions(part: pd.DataFrame) -> list[str]:
    """One line on what the runs of each task have in common."""
    lines = []
    runs = part[(part.kind == "run") & part.record.notna() & (part.problem == "")]
    for (task, whose), group in runs.groupby(["task", "whose"], sort=False):
        record, facts = group.record.iloc[0], group["shared"].iloc[0]
        torch = sorted({record.versions.get("torch", "?") for record in group.record})
        sizes = " + ".join(f"{n:,} {split}" for split, n in record.data.get("sizes", {}).items() if isinstance(n, int))
        named = ("epochs", "batch_size", "precision", "autocast", "dtype", "augment", "optimizer")
        settings = ", ".join(f"{name.replace('_', ' ')} {facts[name]}" for name in named if name in facts)
        mark = "" if whose == "ours" else f" ({whose})"
        lines.append(f"{task}{mark}: {sizes}; {settings}; {record.device['name']}, torch {', '.join(torch)}.")
    return lines


# -- selections -----------------------------------------------------------------------------------------------


def _runs(frame: pd.DataFrame, paper: Paper, domain: str, published: str, always: tuple[str, ...] = ()) -> pd.DataFrame:
    """A domain's runs, empty rows for methods of `always` that lack one, and the paper's rows below ours."""
    runs = frame[(frame.kind == "run") & (frame.domain == domain)]
    printed = _printed(paper, published)
    keys = ["domain", "section", "task"]
    missing = [
        dict(zip(keys, place)) | {"whose": "ours", "row": method, "n": 0}
        for place, group in pd.concat([runs, printed]).groupby(keys)
        for method in always if not (group.row[group.whose != "paper"].str.split(r",| r\d| matched", regex=True).str[0] == method).any()
    ]  # fmt: skip
    rows = pd.concat([part for part in (runs, printed, pd.DataFrame(missing)) if len(part)], ignore_index=True) if len(runs) or len(printed) else runs
    for column in ("links", "notes"):
        rows[column] = [value if isinstance(value, (list, tuple)) else () for value in rows[column]]
    rows["problem"] = rows.problem.fillna("")
    order = {name: number for number, name in enumerate([*GLUE, *METHODS, *WHOSE])}
    bare = rows.row.str.split(r",| r\d| matched", regex=True).str[0]
    rows["_order"] = list(zip(rows.task.map(order).fillna(99), rows.task, bare.map(order).fillna(99), rows.row, rows.whose.map(order), rows.seed.fillna(0)))
    rows["rate of learning"] = rows.lr.map(lambda lr: "" if pd.isna(lr) else f"{lr:g}")
    usual = rows.groupby([*keys, "row", "whose"])["rate of learning"].transform(lambda rates: " / ".join(sorted(set(rates))))
    rows["rate of learning"] = usual
    return rows.sort_values("_order")


#: Quantity of a published figure -> the header that it belongs under.
_HEADERS = {"best score": "best", "peak memory": "peak MiB", "training time": "train s", "trained parameters": "trained parameters"}


def _printed(paper: Paper, table: str) -> pd.DataFrame:
    """The paper's figures of a table, a row for each model, task and method, with the figures in column `published`."""
    rows: dict[tuple, dict] = {}
    for figure in paper.figures[paper.figures.table == table].itertuples():
        header = figure.column if figure.quantity == "score" else _HEADERS.get(figure.quantity)
        if header is None or (table == "glue" and figure.column == "all"):
            continue
        task = "commonsense" if table == "commonsense" else figure.column
        domain = {"glue": "roberta", "vit": "vit", "commonsense": "llama"}[table]
        section = f"{figure.model}, 4-layer MLP" if table == "vit" else figure.model
        row = rows.setdefault((figure.model, task, figure.row), {
            "whose": "paper", "kind": "run", "n": 0, "domain": domain, "section": section, "task": task, "row": figure.row, "published": {}})  # fmt: skip
        row["published"][header] = figure
    return pd.DataFrame(rows.values())


def _in_text(paper: Paper, table: str, quantities: tuple[str, ...]) -> list[str]:
    """Published figures that belong to no row."""
    figures = paper.figures[(paper.figures.table == table) & paper.figures.quantity.isin(quantities)]
    if table == "glue":
        figures = figures[figures.column == "all"]
    return [f"Published: {f.model}, {f.row}: {f.quantity} {f.text}." for f in figures.itertuples()]


def _vit_steps(frame: pd.DataFrame, paper: Paper) -> pd.DataFrame:
    """Steps of ViT-B/16, with the published peaks below those in the paper's batch."""
    steps = frame[frame.kind == "vit step"]
    printed = _printed(paper, "vit").drop(columns=["section", "kind"]).assign(attention="eager", problem="")
    printed["links"] = printed["notes"] = [()] * len(printed)
    sections = steps.section[steps.section.str.startswith("vit_base_patch16_224, batch 128")].unique()
    rows = pd.concat([steps, *(printed.assign(section=section) for section in sections)], ignore_index=True)
    methods = {"lora": 0, "control": 1, "dora": 2}
    return rows.sort_values(["attention", "row", "whose"], key=lambda column: column.map(methods).fillna(9) if column.name == "row" else column)


def _kind(kind: str) -> Callable[[pd.DataFrame], pd.DataFrame]:
    return lambda frame: frame[frame.kind == kind]


def on_frontier(points: pd.DataFrame) -> pd.Series:
    """Whether no other row equals or beats a row in both columns (smaller is better)."""
    ordered = points.sort_values(list(points.columns))
    best = ordered.iloc[:, 1].cummin()
    return (ordered.iloc[:, 1] < best.shift(fill_value=float("inf"))).reindex(points.index)


def step_means(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean seconds and bytes over the weights by whose, setting and method of scripts/bench_memory.py, and `frontier`."""
    steps = frame[(frame.kind == "step") & frame.seconds.notna()]
    means = steps.groupby(["whose", "section", "row"], sort=False)[["seconds", "over"]].mean()
    means["frontier"] = means.groupby(["whose", "section"], group_keys=False)[["seconds", "over"]].apply(on_frontier) if len(means) else None
    return means


def _steps(frame: pd.DataFrame) -> pd.DataFrame:
    """Steps of scripts/bench_memory.py with their distances from the best LoRA; a failure only where nothing was measured."""
    steps = frame[(frame.kind == "step")]
    steps = steps[steps.seconds.notna() | ~steps.duplicated(["whose", "section", "row"], keep=False)]
    means = step_means(frame)
    loras = means[means.index.get_level_values("row").str.startswith("lora")].groupby(["whose", "section"])[["seconds", "over"]].min()
    joined = steps.join(means, on=["whose", "section", "row"], rsuffix="_mean").join(loras, on=["whose", "section"], rsuffix="_lora")
    joined["time ratio"] = joined.seconds_mean / joined.get("seconds_lora")
    joined["memory ratio"] = joined.over_mean / joined.get("over_lora")
    joined["frontier"] = joined.frontier.map({True: "yes", False: "no"}).fillna("")
    return joined


WAYS = {
    "published": "the published micro-batches, padded", "packed": "the same steps, packed", "large": "packed, more rows a step",
}  # fmt: skip


def _ways(frame: pd.DataFrame) -> pd.DataFrame:
    """A row for each way of batching of LlaMA/benchmark_throughput.py."""
    rows = frame[frame.kind == "throughput"]
    long = [{**row, **row["ways"][way], "way": f"{way}: {what}"} for row in rows.to_dict("records") for way, what in WAYS.items()]
    return pd.DataFrame(long) if long else rows


def _scaling(longest: bool) -> Callable[[pd.DataFrame], pd.DataFrame]:
    def select(frame: pd.DataFrame) -> pd.DataFrame:
        rows = frame[(frame.kind == "scaling") & (frame.section.str.contains("longest sequence") == longest)]
        rows = rows[(rows.error == "") | ~rows.duplicated(["whose", "section", "row", "shard", "processes"], keep=False)]
        first = {row: number for number, row in enumerate(dict.fromkeys(rows.row))}  # methods in the order of the files
        order = list(zip(rows.row.map(first), rows["shard"], rows.processes)) if len(rows) else []
        return rows.assign(order=order, processes=rows.processes.astype("Int64")).sort_values("order")

    return select


# -- the tables -----------------------------------------------------------------------------------------------

_COST = {"peak MiB": ("peak", 1 / MEBI, ",.0f"), "train s": ("seconds", 1, ",.1f")}
_TRAINED = {"trained parameters": ("trained", 1, ",.0f")}
_SCORES = {"last": ("last", 1, ".2f"), "best": ("best", 1, ".2f"), **_COST, "examples/s": ("rate", 1, ",.0f")}
_TASKS = {"task": "task", "method": "row", "learning rate": "rate of learning"}
_PARTS = {
    "weights MiB": ("weights", 1 / MEBI, ",.0f"), "adapter + optimizer MiB": ("state", 1 / MEBI, ",.0f"),
    "activations MiB": ("activations", 1 / MEBI, ",.0f"), "peak MiB": ("peak", 1 / MEBI, ",.0f"),
    "ms a step": ("seconds", 1000, ",.1f"), "tokens/s": ("rate", 1, ",.0f"),
}  # fmt: skip
_BASIC = ("control", "lora", "dora")


def all_tables(frame: pd.DataFrame, paper: Paper) -> list[Table]:
    """Every table, filled, whether or not there are records for it yet."""
    tables = [
        Table("glue", "GLUE", "Dev-set scores of encoders whose classifier is trained with an adapter: Matthews correlation (cola), accuracy, "
              "or the mean of a task's two official metrics, in percent.",
              lambda f: _runs(f, paper, "roberta", "glue", _BASIC), _TASKS, {**_TRAINED, **_SCORES}, "bash scripts/rerun_glue.sh",
              _in_text(paper, "glue", ("peak memory",))),
        Table("vit_accuracy", "ViT: accuracy", "Test accuracy in percent; after each epoch the test images are looked at, so best is optimistic.",
              lambda f: _runs(f, paper, "vit", "vit", _BASIC), _TASKS, {**_TRAINED, **_SCORES}, "bash scripts/rerun_vit.sh"),
        Table("vit_memory", "ViT: memory", "Peak of the CUDA allocator over whole training steps of ViT-B/16 with four-layer MLPs and random "
              "weights. The published runs used eager attention.", lambda f: _vit_steps(f, paper), {"attention": "attention", "method": "row"},
              {**_TRAINED, "peak MiB": ("peak", 1 / MEBI, ",.0f"), "ms a step": ("seconds", 1000, ",.1f")},
              "bash scripts/rerun_memory.sh --tasks vit", _in_text(paper, "vit", ("peak memory as tabulated",))),
        Table("commonsense", "Commonsense reasoning", "Accuracy in percent on eight test sets after training on commonsense data. One checkpoint of a "
              "run is answered with, the best by held-out loss, so there is no separate best and last. No match: answers without an answer "
              "word, which count as wrong.", lambda f: _runs(f, paper, "llama", "commonsense"), {"method": "row"},
              {**_TRAINED, **{name: (name, 1, ".2f") for name in COMMONSENSE}, "no match": ("no match", 1, ".2f"), **_COST,
               "tokens/s": ("rate", 1, ",.0f")}, "bash scripts/rerun_commonsense.sh",
              ["Rows named lora and dora of the paper are those that it compares with, from DoRA's repository.",
               *_in_text(paper, "commonsense", ("score stated in the text", "memory less than dora", "fits on a GPU of"))]),
        Table("quantized", "GLUE on quantized bases", "As the GLUE table, with the frozen encoder in 4 or 8 bits, and in 16 under the same recipe. The "
              "paper's repository has the scripts of this comparison; its results are not published.",
              lambda f: _runs(f, paper, "qcontrol", "quantized", _BASIC), _TASKS, {**_TRAINED, **_SCORES}, "bash scripts/rerun_quantized.sh"),
        Table("memory_speed", "Memory against speed", "One training step on random weights of the true shape; every method in a process of its own. The "
              "frontier are the methods that no other beats in both memory and time. GB are 10^9 bytes.", _steps,
              {"method": "row", "on the frontier": "frontier"},
              {**_TRAINED, "weights GB": ("weights", 1e-9, ",.2f"), "over weights GB": ("over", 1e-9, ",.2f"), "ms a step": ("seconds", 1000, ",.1f"),
               "tokens/s": ("rate", 1, ",.0f"), "time / fastest LoRA": ("time ratio", 1, ".2f"), "memory / leanest LoRA": ("memory ratio", 1, ".2f")},
              "bash scripts/rerun_memory.sh"),
        Table("longest", "Longest sequence", "The longest sequence of which a training step fits into a limit of GPU memory.", _kind("longest"),
              {"method": "row"}, {"tokens": ("longest", 1, ",.0f")}, "bash scripts/rerun_memory.sh --tasks llama3-8b-limit --seeds 1"),
        Table("step_profile", "Where a step's time goes", "Kernels of one step by what they do, in milliseconds. Copies from and to the host run beside "
              "the others. The step of the last column was timed among others, without the profiler: on a GPU at its power limit it takes "
              "longer than the kernels of a single one.", _kind("profile"), {"method": "row"},
              {**{f"{kind} ms": (kind, 1000, ",.1f") for kind in KERNELS}, "all ms": ("all", 1000, ",.1f"), "ms a step": ("seconds", 1000, ",.1f")},
              "bash scripts/rerun_memory.sh --tasks llama3-8b-profile --seeds 1"),
        Table("quantized_memory", "Memory over quantized bases", "One training step on random weights of the true shape, whose frozen linear layers are "
              "stored as the column weights says; checkpointing is gradient checkpointing, the other modes are the control's.",
              _kind("quantized step"), {"method": "row", "weights": "stored", "mode": "mode"}, {**_TRAINED, **_PARTS},
              "python -m QControl.quantized_memory --shape roberta-base, and --shape llama3-8b"),
        Table("llama_shapes", "LLaMA's shapes: the recipes' steps", "One training step on random weights of the true shape and the largest micro-batch "
              "that the launchers' recipes can meet: every row as long as the cutoff.", _kind("recipe step"),
              {"method": "row", "memory mode": "mode"}, {**_TRAINED, **_PARTS}, "python -m LlaMA.benchmark_methods --output_dir results/llama/shapes"),
        Table("throughput", "Throughput of batching", "Real (non-padding) tokens a second of three ways to train on the same rows, measured in one "
              "process. Packed gives the published steps' gradients; large is another recipe with fewer, larger steps.", _ways,
              {"batching": "way", "attention": "attention"},
              {"rows a step": ("rows_per_step", 1, ",.0f"), "forwards a step": ("forwards_per_step", 1, ",.1f"),
               "real tokens/s": ("real_tokens_per_second", 1, ",.0f"), "times published": ("speedup", 1, ".2f")},
              "python -m LlaMA.benchmark_throughput --shape llama3-8b --data commonsense_51k.json --output_dir results/llama/throughput-llama3-8b"),
        Table("batches", "Answers in batches", "The same commonsense questions answered in batches, one by one, and one by one without stopping early (as "
              "published), in one process. Same answers: in percent of the questions, against those of one by one.", _kind("batches"),
              {"method": "row", "batch": "batch", "mode": "mode"},
              {"questions": ("questions", 1, ",.0f"), "questions/s": ("questions_per_second", 1, ",.1f"),
               "questions/s, one by one": ("questions_per_second_batch_one", 1, ",.2f"), "times one by one": ("speedup", 1, ",.1f"),
               "times published": ("speedup_over_published", 1, ",.1f"), "same answers %": ("answers_agree", 1, ".2f"),
               "same as published %": ("answers_agree_with_published", 1, ".2f")},
              "python -m LlaMA.evaluate --compare_batch_one 1000 --model MODEL --data DATA --output_dir results/llama/batches-NAME"),
        Table("scaling", "Scaling over GPUs", "Weak scaling: every process has the same work. Efficiency is the step time of one process over that of so "
              "many; ddp keeps the frozen weights on every GPU, fsdp2 shards them. Losses apart: the largest relative distance from one "
              "process that accumulates the same global batch.", _scaling(False), {"method": "row", "sharding": "shard", "processes": "processes"},
              {"tokens/s": ("rate", 1, ",.0f"), "efficiency %": ("efficiency", 1, ".1f"), "peak GB each": ("peak", 1e-9, ".2f"),
               "sent MB each": ("sent", 1e-6, ",.1f"), "losses apart": ("apart", 1, ".1e")}, "bash scripts/bench_scaling.sh"),
        Table("scaling_longest", "Longest sequence over GPUs", "The longest sequence of which a training step fits.", _scaling(True),
              {"method": "row", "sharding": "shard", "processes": "processes"}, {"longest tokens": ("longest", 1, ",.0f")},
              "bash scripts/bench_scaling.sh --longest"),
    ]  # fmt: skip
    return [fill(table, frame) for table in tables]


# -- files ----------------------------------------------------------------------------------------------------


def linked(links: list[tuple[str, str]] | str, up: str) -> str:
    """A cell of links for Markdown; `up` leads from the page to the results folder."""
    return links if isinstance(links, str) else ", ".join(f"[{text}]({(up + file).replace(' ', '%20')})" for text, file in links)


def markdown_rows(frame: pd.DataFrame) -> list[str]:
    """A frame of texts as the lines of a Markdown table."""
    cells = [list(frame.columns), ["---"] * len(frame.columns), *frame.values.tolist()]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in cells]


def markdown(table: Table, up: str) -> str:
    """The table for GitHub."""
    lines = [f"# {table.title}", "", table.about, *(f"\n{remark}" for remark in table.remarks), ""]
    lines += ["All figures in a row come from the records (by seed) that its last column links to.", ""]
    for section in table.sections:
        shown = section.shown.assign(runs=[linked(links, up) for links in section.shown.runs])
        lines += [f"## {section.title}", "", *markdown_rows(shown), "", *(f"{n}. {note}" for n, note in enumerate(section.notes, 1))]
        lines += [""] * bool(section.notes) + [f"- {remark}" for remark in section.remarks] + [""] * bool(section.remarks)
    return "\n".join(lines).rstrip() + "\n"


def write_tables(tables: list[Table], folder: Path, up: str) -> list[Path]:
    """Write each table as .md and .csv."""
    written = []
    for table in tables:
        data = pd.concat([section.data for section in table.sections]) if table.sections else pd.DataFrame(columns=["section"])
        written += [
            write_text_atomic(folder / f"{table.name}.md", markdown(table, up)),
            write_text_atomic(folder / f"{table.name}.csv", data.to_csv(index=False, lineterminator="\n")),
        ]
    return written
