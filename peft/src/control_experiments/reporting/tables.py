"""Tables as pivots of the records, as tables.yaml describes them, in Markdown and CSV.

A figure is the mean ± sample standard deviation over the records of its row (seeds, or repeats of a benchmark). All figures of
a row come from the records that its last column links to.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jinja2
import pandas as pd
import yaml

from ..record import write_text_atomic
from .records import GLUE, Paper, beside_published

NO_RECORD, NOT_PUBLISHED, NOT_MEASURED = "no record", "not published", "not measured"
#: Order of rows where the records' own says nothing.
_ORDER = (*GLUE, "control", "double control", "control+lora", "control+dora", "lora", "dora", "ours", "yours", "paper")
_UNITS = {"MiB": 2**-20, "GB": 1e-9, "MB": 1e-6, "ms": 1e3}
#: Figures that not every row can have: of one process there is no efficiency.
_PARTLY = ("efficiency", "lost at", "losses apart", "time /", "memory /", "times ", "same as published")
#: Quantity of a published figure -> the header that it belongs under.
_HEADERS = {"best score": "best", "peak memory": "peak MiB", "training time": "train s", "longest sequence": "longest tokens"}
_HEADERS |= {"trained parameters": "trained parameters"}
#: Figures that a footnote can be about.
_NOTED = ("peak MiB", "train s", "ms a step", "longest tokens", "tokens/s")


@dataclass
class Section:
    """A part of a table under its own heading, one model in one setting.

    `shown` has a row of texts each for people, whose column `runs` holds (text, file) pairs; `data` the figures for CSV.
    `methods` are the rows', for the page's filter; `notes` are numbered footnotes of `shown`, `remarks` lines below it.
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
    """One file of results/tables."""

    name: str
    title: str
    about: str
    remarks: list[str]
    sections: list[Section]


SPECIFICATIONS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


# -- rows -----------------------------------------------------------------------------------------------------


def make_table(name: str, frame: pd.DataFrame, paper: Paper) -> Table:
    """The table of that name in tables.yaml."""
    specification = SPECIFICATIONS[name]
    rows = beside_published(frame, paper).query(specification["where"], engine="python")
    rows = rows.assign(section=rows[specification.get("section", "section")])
    rows = {"memory_speed": _with_frontier, "learning_rates": _best_rates}.get(name, pd.DataFrame)(rows)
    rows = _with_printed(rows, paper, specification)
    keys, quoted = specification["rows"], paper.figures[paper.figures.quantity.isin(specification.get("published", []))]
    quoted = quoted[quoted.table == specification.get("quoted", specification.get("paper"))]
    remarks = [f"Published: {f.model}, {f.row}: {f.quantity} {f.text}." for f in quoted.itertuples()]
    rows = _sorted(rows, [*keys.values(), "whose"]) if len(rows) else rows
    counts = rows.groupby("section", sort=False).n.sum()
    sections = [
        _section(title, rows[rows.section == title], keys, specification["figures"])
        for title in sorted(counts.index, key=lambda title: counts[title] == 0)  # those with records first
    ]
    remarks += [] if sections else [f"No record yet: {specification['command']}"]
    return Table(name, specification["title"], specification["about"], remarks, sections)


def _sorted(rows: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Rows with one first key together, then those with one second key, …: by number, or `_ORDER`, or appearance."""
    ranks = {}
    for key in keys:
        first = {value: len(_ORDER) + number for number, value in enumerate(dict.fromkeys(rows[key]))}
        known = {value: _ORDER.index(bare(value)) for value in first if bare(value) in _ORDER}
        ranks[f"_{key}"] = rows[key] if pd.api.types.is_numeric_dtype(rows[key]) else rows[key].map(first | known)
    return rows.assign(**ranks).sort_values([*ranks, "row", "seed"], kind="stable")


def bare(label: object) -> str:
    """A row's label without ranks and modes: "control r64, lean" is "control"."""
    return re.split(r",| r\d| matched", str(label))[0]


def _with_printed(rows: pd.DataFrame, paper: Paper, specification: dict) -> pd.DataFrame:
    """The published figures as rows of their own beside the records', and empty rows for methods that must have one."""
    made: dict[tuple, dict] = {}
    table, domain = specification.get("paper"), specification.get("domain", "llama")
    for figure in paper.figures[paper.figures.table == table].itertuples():
        header = figure.column if figure.quantity == "score" else _HEADERS.get(figure.quantity)
        if not header or figure.quantity in specification.get("published", ()):
            continue
        section = f"{figure.model}, 4-layer MLP" if table == "vit" else figure.model
        place = {"whose": "paper", "section": section, "row": figure.row}
        places = [place | {"task": "commonsense" if table == "commonsense" else figure.column}]
        if table == "longest":  # beside each of our own for such a card
            place |= {"whose": "Unsloth", "row": figure.row.removeprefix("unsloth ").partition(" on")[0]}
            ours = rows[rows.times_published.notna() & (rows.card == float(figure.column))]
            ours = ours.drop_duplicates(["section", "limit_gib"])
            places = [place | one for one in ours[["section", "card", "limit_gib"]].to_dict("records")]
        for place in places:
            row = made.setdefault(tuple(place.values()), place | {"n": 0, "domain": domain, "published": {}})
            row["published"][header] = figure
    rows = pd.concat([rows, pd.DataFrame(made.values())]) if made else rows
    missing = []
    for (section, task), group in rows.groupby(["section", "task"]):
        there = set(group.row[group.whose != "paper"].map(bare))
        empty = {"whose": "ours", "n": 0, "domain": domain, "section": section, "task": task}
        missing += [empty | {"row": method} for method in specification.get("always", ()) if method not in there]
    rows = pd.concat([rows, pd.DataFrame(missing)]) if missing else rows
    rows = rows.reset_index(drop=True)
    for column, nothing in (("links", ()), ("notes", ()), ("problem", ""), ("error", "")):
        rows[column] = rows[column].where(rows[column].notna(), pd.Series([nothing] * len(rows)))
    rates = rows.lr.map("{:g}".format, na_action="ignore").groupby([rows[key] for key in ("section", "task", "row", "whose")])
    return rows.assign(rates=rates.transform(lambda each: " / ".join(sorted(set(each.dropna())))))


def step_means(steps: pd.DataFrame) -> pd.DataFrame:
    """Mean seconds and bytes over the weights by whose, setting and method, and whether no other beats it in both."""
    setting, figures = ["whose", "section"], ["step_seconds", "over_static_bytes"]
    means = steps[steps.step_seconds.notna()].groupby([*setting, "row"], sort=False)[figures].mean()
    ordered = means.sort_values(figures).over_static_bytes
    leanest = ordered.groupby(setting).cummin().groupby(setting).shift(fill_value=float("inf"))
    return means.assign(frontier=ordered < leanest)


def _with_frontier(steps: pd.DataFrame) -> pd.DataFrame:
    """Steps with their distances from the best LoRA of their setting; a failure only where nothing was measured."""
    setting = ["whose", "section"]
    steps = steps[steps.step_seconds.notna() | ~steps.duplicated([*setting, "row"], keep=False)]
    means = step_means(steps)
    best = means[means.index.get_level_values("row").str.startswith("lora")].groupby(setting).min()
    ratios = means.drop(columns="frontier").div(best.drop(columns="frontier"))
    ratios = ratios.set_axis(["time_ratio", "memory_ratio"], axis=1).assign(
        frontier=means.frontier.map({True: "yes", False: "no"})
    )
    return steps.join(ratios, on=[*setting, "row"]).fillna({"frontier": ""})


def _best_rates(searched: pd.DataFrame) -> pd.DataFrame:
    """The runs with each method's best rate (of equals the smallest), the rates next to it whose score is at most a point lower,
    and how much lower the score is with LoRA's best rate."""
    kept, best_of_lora = [], {}
    ranked = searched.assign(_lora=searched.method != "lora").sort_values("_lora", kind="stable")
    for (section, task, _), runs in ranked.groupby(["section", "task", "row"], sort=False):
        means = runs.groupby("lr")["last"].mean()
        best, good = means.idxmax(), means >= means.max() - 1
        apart = (~good).cumsum()  # rates between which none is worse have one number
        inside = good[good & (apart == apart[best])].index
        if runs.method.iloc[0] == "lora":
            best_of_lora.setdefault((section, task), best)
        lost = means.max() - means.get(best_of_lora.get((section, task)), float("nan"))
        kept.append(runs[runs.lr == best].assign(low=inside.min(), high=inside.max(), lost=lost))
    return pd.concat(kept).sort_index() if kept else searched


# -- cells ----------------------------------------------------------------------------------------------------


def _section(title: str, part: pd.DataFrame, keys: dict[str, str], figures: dict[str, str]) -> Section:
    shown, data, methods, notes = [], [], [], []
    for _, group in part.groupby([*keys.values(), "whose"], sort=False, dropna=False):
        line, numbers = _line(group, keys, figures, notes)
        shown.append(line)
        data.append({"section": title, **numbers})
        methods.append(group.row.iloc[0])
    shown = pd.DataFrame(shown)
    shown = shown.drop(columns="whose") if set(shown.whose) == {"ours"} else shown
    return Section(title, part.domain.iloc[0], shown, pd.DataFrame(data), methods, notes, _conditions(part))


def _line(group: pd.DataFrame, keys: dict[str, str], figures: dict[str, str], notes: list[str]) -> tuple[dict, dict]:
    """A row's texts and its figures; footnotes that it needs are added to `notes`."""

    def marked(text: str, reasons: list[str]) -> str:
        notes.extend(reason for reason in reasons if reason not in notes)
        return text + "".join(f" <sup>{notes.index(reason) + 1}</sup>" for reason in reasons)

    first = group.iloc[0]
    printed = first.published if first.whose not in ("ours", "yours") else None
    links = dict.fromkeys((text, file) for part in group.links for text, file in part)
    links = list(dict.fromkeys((text or str(number), file) for number, (text, file) in enumerate(links, 1)))
    problems = list(dict.fromkeys(filter(None, group.problem)))
    measured = group[group.error == ""]
    count = len(measured) if links and not problems else 0
    reasons = list(dict.fromkeys(note for part in group.notes for note in part))
    reasons += [] if len(measured) else [f"{first.row}: {error}." for error in group.error]
    lacking = NOT_PUBLISHED if printed else NOT_MEASURED if count else "failed" if links and not problems else NO_RECORD
    line = {header: first[column] for header, column in keys.items()} | {"whose": first.whose, "n": "" if printed else count}
    data = {header: f"{key:.10g}" if isinstance(key, float) else key for header, key in line.items()}
    line = {header: f"{key:,.10g}" if isinstance(key, float) else key for header, key in line.items()}
    said = [*problems, *reasons]
    for header, specification in figures.items():
        column, _, form = specification.rpartition(" ")
        factor = next((_UNITS[word] for word in header.split() if word in _UNITS), 1)
        values = measured[column].dropna().astype(float) * factor if column in group else ()
        if printed and (figure := printed.get(header)):
            note = [f"{figure.note[0].upper()}{figure.note[1:]}."] if isinstance(figure.note, str) else []
            said += note
            line[header] = marked(figure.text, note)
            data |= {header: figure.value * (1e6 if figure.unit == "M" else 1), f"{header} status": figure.status}
        elif count and len(values) == count:
            spread = "" if values.nunique() == 1 else f" ± {values.std():{form}}"
            line[header] = f"{values.mean():{form}}{spread}"
            data |= {header: values.mean()} | ({f"{header} sd": values.std()} if count > 1 else {})
        else:
            data[header] = line[header] = "" if header.startswith(_PARTLY) else lacking
    left_out = marked("left out", problems) if problems else links or NO_RECORD
    line["runs"] = links if count or printed else left_out
    noted = [name for name in _NOTED if name in line]
    if reasons and noted:  # at the figure that is missing, else at the first that the note can be about
        at = next((header for header in noted if line[header] in (NOT_MEASURED, "failed")), noted[0])
        line[at] = marked(line[at], reasons)
    files = " ".join(dict.fromkeys(file for _, file in links)) or ("" if printed else NO_RECORD)
    return line, data | {"runs": files, "notes": " ".join(dict.fromkeys(said))}


def _conditions(part: pd.DataFrame) -> list[str]:
    """One line on what the runs of each task have in common."""
    lines, runs = [], part[(part.kind == "run") & (part.problem == "")]
    named = ("epochs", "batch_size", "precision", "autocast", "dtype", "augment", "optimizer")
    for (task, whose), group in runs.groupby(["task", "whose"], sort=False):
        record, facts = group.record.iloc[0], group["shared"].iloc[0]
        torch = ", ".join(sorted({record.versions.get("torch", "?") for record in group.record}))
        sizes = " + ".join(f"{n:,} {split}" for split, n in record.data.get("sizes", {}).items() if isinstance(n, int))
        settings = ", ".join(f"{name.replace('_', ' ')} {facts[name]}" for name in named if name in facts)
        mark = "" if whose == "ours" else f" ({whose})"
        lines.append(f"{task}{mark}: {sizes}; {settings}; {record.device['name']}, torch {torch}.")
    return lines


# -- files ----------------------------------------------------------------------------------------------------


def linked(links: list[tuple[str, str]] | str, up: str) -> str:
    """A cell of links for Markdown; `up` leads from the page to the results folder."""
    if isinstance(links, str):
        return links
    return ", ".join(f"[{text}]({(up + file).replace(' ', '%20')})" for text, file in links)


def markdown_rows(frame: pd.DataFrame) -> str:
    """A frame of texts as a Markdown table."""
    cells = [list(frame.columns), ["---"] * len(frame.columns), *frame.values.tolist()]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in cells)


def environment(**options: object) -> jinja2.Environment:
    """Where the templates of this folder are filled in; filter `table` makes Markdown of a frame."""
    blocks = {"trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    made = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), **blocks, **options)
    made.filters["table"] = markdown_rows
    return made


def write_tables(tables: list[Table], folder: Path, up: str) -> list[Path]:
    """Write each table as .md and .csv."""
    written, template = [], environment(keep_trailing_newline=True).get_template("table.md.jinja")
    for table in tables:
        data = pd.concat([section.data for section in table.sections] or [pd.DataFrame(columns=["section"])])
        text = template.render(table=table, linked=partial(linked, up=up))
        written.append(write_text_atomic(folder / f"{table.name}.md", text))
        written.append(write_text_atomic(folder / f"{table.name}.csv", data.to_csv(index=False, lineterminator="\n")))
    return written
