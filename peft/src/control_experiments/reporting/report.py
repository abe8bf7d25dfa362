"""One self-contained page with the claims, pictures and tables of a results folder; it needs no network and no server.

Pictures are SVG drawn here; the page's script (report_page.html) adds tips on hover or tap and a filter by domain and method.
Without scripts everything is shown and the browser's own tips remain.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template

from matplotlib.ticker import MaxNLocator

from ..record import write_text_atomic
from .benchmark_tables import benchmark_settings, frontier_of, shape_domain
from .cells import MEBI, Cell, Section, Table
from .claims import Claim
from .collection import Collection, Comparison, Run

PAGE = Path(__file__).with_name("report_page.html")
DOMAINS = {"roberta": "RoBERTa", "vit": "ViT", "llama": "LLaMA", "qcontrol": "quantized"}
#: Method families of the filter, each with a colour in report_page.html and a marker, for those who see no colours.
FAMILIES = ("control", "double control", "control+lora", "control+dora", "lora", "dora", "other")
#: Parts of a benchmark label that are no method.
_SWITCHES = ("liger", "unsloth", "checkpointing", "compile", "graphs")
_MARKERS = {"control": "circle", "double control": "circle", "lora": "square", "dora": "triangle"}
WIDTH, HEIGHT = 400, 290
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 40


def family(label: str) -> str:
    """The filter's family of a row or benchmark label: "control r64, lean" and "control+liger:plain" are control."""
    name = re.split(r"[,:]| r\d| matched", label)[0]
    name = "+".join(part for part in name.split("+") if part not in _SWITCHES)
    name = {"lora-all": "lora"}.get(name, name)
    return name if name in FAMILIES else "other"


def write_report(
    collection: Collection, tables: Sequence[Table], claims: Sequence[Claim], path: Path
) -> Path:
    """Write the page; links in it are relative to its folder, the results folder."""
    runs = [run for comparison in collection.comparisons for run in comparison.runs()]
    devices = sorted(
        {run.record.device["name"] for run in runs} | {b["device"] for b in collection.benchmarks.values()}
    )
    about = (
        f"{len(runs)} runs and {len(collection.benchmarks)} benchmarks on {', '.join(devices) or 'no device yet'}. Made by "
        "scripts/make_tables.py from run records; published figures stand beside ours with their status."
    )
    if collection.problems:
        about += f" {len(collection.problems)} records had to be left out; the tables' footnotes say which."
    labels = {label for table in tables for section in table.sections for label in section.methods}
    families = [name for name in FAMILIES if name in set(map(family, labels))]
    page = Template(PAGE.read_text(encoding="utf-8")).substitute(
        about=escape(about),
        domains="".join(_box("domain", name, title) for name, title in DOMAINS.items()),
        methods="".join(_box("method", name, name, _css(name)) for name in families),
        claims=_claims(claims),
        frontier=_figures(_frontiers(collection)),
        scores=_figures(_scores_against_memory(collection.comparisons)),
        curves=_figures(_training_curves(collection.comparisons)),
        tables="".join(_table(table) for table in tables),
    )
    return write_text_atomic(path, page)


def _box(kind: str, value: str, text: str, css: str = "") -> str:
    return f'<label class="{css}"><input type="checkbox" name="{kind}" value="{escape(value)}" checked> {escape(text)}</label>\n'


def _css(name: str) -> str:
    return re.sub(r"[ +]", "-", name)


# -- pictures ---------------------------------------------------------------------------------------------------


@dataclass
class Axis:
    """Maps values onto pixels; a logarithmic one takes positive values only."""

    label: str
    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    @classmethod
    def over(
        cls, values: Iterable[float], label: str, start: float, end: float, logarithmic: bool = False
    ) -> Axis:
        """An axis that covers the values with some room around them."""
        low, high = min(values := list(values)), max(values)
        if logarithmic:
            return cls(label, low / 1.3, high * 1.3, start, end, True)
        room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        return cls(label, low - room, high + room, start, end)

    def place(self, value: float) -> float:
        low, high = self.low, self.high
        if self.logarithmic:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.logarithmic:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            ticks = [factor * 10.0**decade for decade in decades for factor in (1, 2, 5)]
        else:
            ticks = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high)
        return [tick for tick in ticks if self.low <= tick <= self.high]


@dataclass
class Figure:
    """A picture: `marks` are SVG elements above the axes."""

    title: str
    domain: str
    x: Axis
    y: Axis
    marks: list[str] = field(default_factory=list)

    def svg(self) -> str:
        parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(self.title)}">']
        for tick in self.x.ticks():
            x = self.x.place(tick)
            parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
            parts.append(
                f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{tick:,.6g}</text>'
            )
        for tick in self.y.ticks():
            y = self.y.place(tick)
            parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{tick:,.6g}</text>')
        middle = (TOP + HEIGHT - BOTTOM) / 2
        parts.append(
            f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(self.x.label)}</text>'
        )
        parts.append(
            f'<text transform="translate(11 {middle}) rotate(-90)" text-anchor="middle">{escape(self.y.label)}</text>'
        )
        return "".join([*parts, *self.marks, "</svg>"])


def _figures(figures: Iterable[Figure]) -> str:
    drawn = [
        f'<figure data-domain="{figure.domain}">{figure.svg()}<figcaption>{escape(figure.title)}</figcaption></figure>'
        for figure in figures
    ]
    return f'<div class="figures">{"".join(drawn)}</div>' if drawn else "<p>No record yet.</p>"


def _axes(
    xs: Iterable[float], x_label: str, ys: Iterable[float], y_label: str, logarithmic: bool = False
) -> tuple[Axis, Axis]:
    return (
        Axis.over(xs, x_label, LEFT, WIDTH - RIGHT),
        Axis.over(ys, y_label, HEIGHT - BOTTOM, TOP, logarithmic),
    )


def _marker(x: float, y: float, name: str, tip: str) -> str:
    shape = _MARKERS.get(name, "diamond")
    points = {
        "square": "-5,-5 5,-5 5,5 -5,5",
        "triangle": "0,-6 6,5 -6,5",
        "diamond": "0,-7 6,0 0,7 -6,0",
    }.get(shape)
    element = f'polygon points="{points}"' if points else 'circle r="5"'
    tag = element.split()[0]
    return (
        f'<{element} class="mark {_css(name)}" data-method="{escape(name)}" data-tip="{escape(tip)}" tabindex="0" '
        f'fill="currentColor" transform="translate({x:.1f} {y:.1f})"><title>{escape(tip)}</title></{tag}>'
    )


def _frontiers(collection: Collection) -> Iterable[Figure]:
    """Memory over the weights against milliseconds a step, one picture for each benchmark setting."""
    for setting, measured in benchmark_settings(collection).items():
        points = {
            name: (1000 * p.seconds.mean, p.over.mean)
            for name, p in measured.items()
            if p.seconds and p.over.mean > 0
        }
        if not points:
            continue
        xs, ys = zip(*points.values(), strict=True)
        x, y = _axes(xs, "milliseconds a step", ys, "GB over the weights", logarithmic=True)
        figure = Figure(setting, shape_domain(setting), x, y)
        steps = ""  # a step reaches as far as the next point that needs less memory
        for name in frontier_of(points):
            left, top = x.place(points[name][0]), y.place(points[name][1])
            steps += f"{'H' if steps else 'M'}{left:.1f} {'V' if steps else ''}{top:.1f}"
        figure.marks.append(f'<path class="frontier" d="{steps}"/>')
        for name, (milliseconds, gigabytes) in points.items():
            tip = f"{name}\n{milliseconds:.0f} ms a step\n{gigabytes:.2f} GB over the weights\n{measured[name].seconds.n} repeat(s)"
            figure.marks.append(_marker(x.place(milliseconds), y.place(gigabytes), family(name), tip))
        figure.marks += _names({name: (x.place(a), y.place(b)) for name, (a, b) in points.items()})
        yield figure


def _names(points: dict[str, tuple[float, float]]) -> Iterable[str]:
    """The points' names above or below them; one that would cover another or a point is left to the tip."""
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in points.values()]
    for name, (x, y) in points.items():
        width = 5.6 * len(name)  # of 11 px text
        above, below = y - 18, y + 7  # beside, a step of the frontier would run through them
        for anchor, at, top in (
            ("start", x + 5, above), ("end", x - 5, above), ("start", x + 5, below), ("end", x - 5, below)
        ):  # fmt: skip
            left = at - width * (anchor == "end")
            box = (left, top, left + width, top + 12)
            inside = left > LEFT and left + width < WIDTH and TOP - 6 < top < HEIGHT - BOTTOM - 10
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                kind = f'class="name {_css(family(name))}" data-method="{escape(family(name))}"'
                yield f'<text {kind} text-anchor="{anchor}" x="{at:.1f}" y="{top + 10:.1f}">{escape(name)}</text>'
                break


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether two boxes (left, top, right, bottom) share a point."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _column(comparison: Comparison) -> str:
    return "average" if comparison.domain == "llama" else comparison.task


def _title(comparison: Comparison) -> str:
    return ", ".join(part for part in (comparison.task, comparison.model, comparison.setting) if part)


def _scores_against_memory(comparisons: Iterable[Comparison]) -> Iterable[Figure]:
    for comparison in comparisons:
        column = _column(comparison)
        shown = [
            (label, seed, run.peak_bytes / MEBI, run.last[column])
            for label, row in comparison.rows.items()
            for seed, run in row.runs.items()
            if run.peak_bytes and column in run.last
        ]
        if not shown:
            continue
        x, y = _axes([s[2] for s in shown], "peak memory, MiB", [s[3] for s in shown], "last score, %")
        figure = Figure(_title(comparison), comparison.domain, x, y)
        for label, seed, peak, score in shown:
            tip = f"{label}, seed {seed}\nlast score {score:.2f} %\npeak {peak:,.0f} MiB"
            figure.marks.append(_marker(x.place(peak), y.place(score), family(label), tip))
        yield figure


def _training_curves(comparisons: Iterable[Comparison]) -> Iterable[Figure]:
    for comparison in comparisons:
        curves = [
            (label, seed, points)
            for label, row in comparison.rows.items()
            for seed, run in row.runs.items()
            if len(points := _curve(run)) > 1
        ]
        if not curves:
            continue
        y_label = "held-out loss" if comparison.domain == "llama" else "score, %"
        every = [point for _, _, points in curves for point in points]
        x, y = _axes([p[0] for p in every], "epoch", [p[1] for p in every], y_label)
        figure = Figure(_title(comparison), comparison.domain, x, y)
        for label, seed, points in curves:
            name = family(label)
            placed = " ".join(f"{x.place(a):.1f},{y.place(b):.1f}" for a, b in points)
            best = (min if comparison.domain == "llama" else max)(value for _, value in points)
            tip = (
                f"{label}, seed {seed}\nlast {points[-1][1]:.2f}, best {best:.2f}\n{len(points)} evaluations"
            )
            figure.marks.append(
                f'<polyline class="mark curve {_css(name)}" data-method="{escape(name)}" data-tip="{escape(tip)}" '
                f'points="{placed}"><title>{escape(tip)}</title></polyline>'
            )
        yield figure


def _curve(run: Run) -> list[tuple[float, float]]:
    """(epoch, score in percent or held-out loss) of each evaluation."""
    for name, scale in (("score", 100), ("test_accuracy", 1), ("eval_loss", 1)):
        points = [
            (entry["epoch"], scale * entry[name])
            for entry in run.record.history
            if isinstance(entry.get(name), float)
        ]
        if points:
            return points
    return []


# -- tables -----------------------------------------------------------------------------------------------------


def _claims(claims: Sequence[Claim]) -> str:
    rows = "".join(
        f'<tr{_of_domain(claim.domain)}><td class="wide">{escape(claim.statement)}</td><td class="whose">{claim.whose}</td>'
        f'<td class="{claim.verdict.replace(" ", "-")}">{claim.verdict}</td><td>{claim.tally}</td><td>{escape(claim.scope)}</td></tr>'
        for claim in claims
    )
    head = "<tr><th>claim</th><th>whose</th><th>verdict</th><th>tests</th><th>tested on</th></tr>"
    return (
        f'<div class="table"><table class="claims"><thead>{head}</thead><tbody>{rows}</tbody></table></div>'
    )


def _of_domain(domain: str) -> str:
    """The attribute that the filter looks at; what belongs to no single domain has none and stays."""
    return f' data-domain="{domain}"' if domain else ""


def _table(table: Table) -> str:
    remarks = "".join(f"<p>{escape(remark)}</p>" for remark in table.remarks)
    sections = "".join(_section(section) for section in table.sections)
    return f'<h2 id="{table.name}">{escape(table.title)}</h2><p>{escape(table.about)}</p>{remarks}{sections}'


def _section(section: Section) -> str:
    notes = section.notes()
    head = "".join(f"<th>{escape(name)}</th>" for name in section.header)
    rows = "".join(
        f'<tr data-method="{escape(family(method))}">{"".join(_cell(cell, notes) for cell in row)}</tr>'
        for method, row in zip(section.methods, section.rows, strict=True)
    )
    below = f"<ol>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ol>" if notes else ""
    below += "".join(f"<p><small>{escape(remark)}</small></p>" for remark in section.remarks)
    return (
        f'<section data-domain="{section.domain}"><h3>{escape(section.title)}</h3><div class="table"><table><thead><tr>{head}'
        f"</tr></thead><tbody>{rows}</tbody></table></div>{below}</section>"
    )


def _cell(cell: Cell, notes: list[str]) -> str:
    links = ", ".join(f'<a href="{escape(link)}">{escape(text)}</a>' for text, link in cell.links)
    marks = "".join(f"<sup>{notes.index(note) + 1}</sup>" for note in cell.notes)
    css = (
        "figure"
        if cell.value is not None
        else "links"
        if cell.links
        else "empty"
        if cell.text.startswith(("no", "left"))
        else ""
    )
    return f'<td class="{css}">{escape(cell.text)} {links}{marks}</td>'
