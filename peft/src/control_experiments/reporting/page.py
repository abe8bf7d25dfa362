"""One self-contained page with claims, pictures and tables; it needs no network and no server. `page.html` is its Jinja2 template.

Pictures are matplotlib's SVG, whose marks carry their method and figures in their ids (`pictures.mark`): the page's script filters by
domain and method and shows figures on hover or tap. Without scripts everything is shown.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
from markupsafe import Markup, escape

from ..record import write_text_atomic
from . import pictures
from .claims import Claim, against_lora, overview
from .records import Paper
from .statistics import MARGIN
from .tables import Table, environment, linked, step_means

#: Kinds of pictures that READMEs show, which are written as PNG too.
SHOWN = ("quality", "memory", "longest", "streaming", "scaling", "rates")
Drawn = tuple[str, str, str, pictures.Figure]


def draw(frame: pd.DataFrame, paper: Paper, claims: Sequence[Claim] = ()) -> Iterator[Drawn]:
    """(kind, domain, title, picture) of all that there is something to draw of; a picture of all domains has none."""
    if pools := against_lora(claims):
        judged = pd.DataFrame([(*pool.interval, pool.mean, pool.statistic, pool.verdict) for pool in pools])
        judged.columns = ["low", "high", "mean", "statistic", "verdict"]
        named = [re.split(", all tasks: | against ", pool.what) for pool in pools]
        judged["label"] = [
            f"{model}\n{method}, {told.rpartition('], ')[2]}" for (model, method, _), told in zip(named, judged.statistic)
        ]
        yield "quality", "", "Control minus LoRA", pictures.intervals(judged, MARGIN, "Quality: control minus LoRA")

    steps = frame[frame.kind == "step"]
    modes = steps[steps.row.str.endswith(":fast").groupby(steps.section).transform("any")]
    domains = modes.groupby("section").domain.first()
    for (whose, section), part in step_means(modes).groupby(["whose", "section"], sort=False):
        points = {row: (means.step_seconds, means.over_static_bytes) for (*_, row), means in part.iterrows()}
        for row in [row for row in points if "+bf16" in row and row.replace("+bf16", "") in points]:
            del points[row]  # the same, named for a table of bases
        title = _title(section, whose)
        if len(points) > 2:
            yield "memory", domains[section], title, pictures.memory_against_time(points, title)

    figures = paper.figures[paper.figures.table == "longest"]
    published = {int(figure.column): figure.value for figure in figures.itertuples()}
    longest = frame[(frame.kind == "longest") & (frame.longest_tokens > 0)]
    for (whose, section), part in longest.groupby(["whose", "section"], sort=False):
        if part.limit_gib.nunique() > 2:
            known, title = published if part.task.iloc[0] == "llama3-8b" else {}, _title(section, whose)
            yield "longest", "llama", title, pictures.longest_sequences(part, known, title)

    waiting = frame[frame.floor.notna() & frame.step_seconds.notna()]
    for (whose, place, batch, task), part in waiting.groupby(["whose", "place", "sequences", "task"], sort=False):
        if part.tokens.nunique() > 1:
            title = _title(f"{task}, batch {batch:.0f}{place.removeprefix(task)}", whose)
            yield "streaming", "llama", title, pictures.streaming(part, title)

    scaled = frame[(frame.kind == "scaling") & frame.tokens_per_second.notna()]
    for section, part in scaled.groupby("section"):
        yield "scaling", "llama", section, pictures.scaling(part, section)

    runs = frame[(frame.kind == "run") & frame.usable]
    for (domain, section, task), part in runs.groupby(["domain", "section", "task"]):
        title = f"{task}, {section}"
        if part.peak.notna().any():
            yield "score-memory", domain, title, pictures.scores_against_memory(part[part.peak.notna()], title)
        if lines := [(run.row, run.seed, line) for run in part.itertuples() if len(line := curve(run.record)) > 1]:
            what = "held-out loss" if domain == "llama" else "score, %"
            yield "curves", domain, title, pictures.curves(lines, title, what)

    for (domain, section), part in frame[frame.kind == "search"].groupby(["domain", "section"]):
        yield "rates", domain, section, pictures.scores_against_rate(part, section)


def _title(section: str, whose: str) -> str:
    return section if whose == "ours" else f"{section} ({whose})"


def curve(record) -> list[tuple[float, float]]:
    """(epoch, score in percent or held-out loss) of each evaluation of a run."""
    for name, scale in (("score", 100), ("test_accuracy", 1), ("eval_loss", 1)):
        points = [(e["epoch"], scale * e[name]) for e in record.history if isinstance(e.get(name), float)]
        if points:
            return points
    return []


def write_page(frame: pd.DataFrame, tables: Sequence[Table], claims: Sequence[Claim], drawn: Sequence[Drawn],
               problems: Sequence[str], path: Path, up: str) -> Path:  # fmt: skip
    """Write the page; `up` leads from its folder to the results folder."""
    made = environment(autoescape=True)
    made.filters |= dict(inline=inline, family=pictures.family, linked=lambda links: linked(links, up))
    rows = [row for table in tables for section in table.sections for row in section.methods]  # the published ones too
    families = [name for name in pictures.FAMILIES if name in {*map(pictures.family, [*frame.row, *rows])}]
    runs = ((frame.kind == "run") & frame.usable).sum()
    drawings, classes = with_classes([pictures.svg(figure) for *_, figure in drawn])
    figures = [(*about, Markup(drawing)) for (*about, _), drawing in zip(drawn, drawings)]
    known = {"families": families, "colours": pictures.FAMILIES, "figures": figures, "classes": classes}
    known |= {"tables": tables, "problems": problems}
    found = {"overview": overview(claims), "claims": claims, "runs": runs, "measurements": len(frame) - runs}
    return write_text_atomic(path, made.get_template("page.html").render(**known, **found) + "\n")


def with_classes(drawings: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """SVGs whose repeated styles, a third of the page, are classes, and style -> class."""
    style = r' style="([^"]*)"'
    counted = Counter(found for drawing in drawings for found in re.findall(style, drawing))
    classes = {found: f"s{number}" for number, (found, count) in enumerate(counted.most_common()) if count > 2}

    def short(found: re.Match) -> str:
        return f' class="{classes[found[1]]}"' if found[1] in classes else found[0]

    return [re.sub(style, short, drawing) for drawing in drawings], classes


def inline(text: object) -> Markup:
    """A cell's Markdown (links, bold) and footnote marks as HTML."""

    def link(found: re.Match) -> str:
        return f'<a href="{"claims.md" * found[2].startswith("#")}{found[2]}">{found[1]}</a>'

    def bold(found: re.Match) -> str:
        return f'<b class="{re.sub("<.*?>", "", found[1]).replace(" ", "-")}">{found[1]}</b>'

    html = re.sub(r"\[([^\]]+)\]\(([^)]+)\)", link, str(escape(text)))
    html = re.sub(r"\*\*([a-z ]+|<a.*?</a>)\*\*", bold, html)
    return Markup(re.sub(r"&lt;sup&gt;(\d+)&lt;/sup&gt;", r"<sup>\1</sup>", html))


def write_pictures(drawn: Sequence[Drawn], folder: Path) -> list[Path]:
    """Write the pictures that READMEs show as PNG, and remove earlier ones whose records are gone."""
    written: dict[str, Path] = {}
    for kind, _, title, figure in drawn:
        if kind in SHOWN:
            # llama3-8b, 4 x 1024 tokens, NVIDIA H100 80GB HBM3, torch 2.11 -> llama3-8b_4x1024_h100
            short = re.sub(r"(\d+) x (\d+) tokens( a process)?", r"\1x\2", title.lower()).partition(", torch")[0]
            name = f"{kind}_" + re.sub(r"[^a-z0-9.-]+", "_", re.sub(r"nvidia (\w+)[^,]*", r"\1", short))
            if name in written:  # of another torch, or another's
                name = f"{kind}_" + re.sub(r"[^a-z0-9.]+", "_", title.lower())
            written[name] = pictures.save(figure, folder / f"{name}.png")
    for path in {path for kind in SHOWN for path in folder.glob(f"{kind}_*.png")} - {*written.values()}:
        path.unlink()
    return list(written.values())
