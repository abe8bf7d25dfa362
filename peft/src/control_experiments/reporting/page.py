"""One self-contained page with claims, pictures and tables; it needs no network and no server. `page.html` is its Jinja2 template.

Pictures are matplotlib's SVG, whose marks carry their method and figures in their ids (`pictures.mark`): the page's script filters by
domain and method and shows figures on hover or tap. Without scripts everything is shown.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd
from markupsafe import Markup, escape

from ..record import write_text_atomic
from . import pictures
from .claims import Claim, overview
from .records import Paper
from .tables import Table, environment, linked, step_means

NAMES = {"roberta": "RoBERTa", "vit": "ViT", "llama": "LLaMA", "qcontrol": "quantized"}
#: The page's groups of pictures: title and explanation.
PARTS = {
    "frontier": ("Memory against speed", "One training step on random weights of the true shape. Left and low is better."),
    "longest": ("Longest sequence", "The longest sequence that trains against the size of the card."),
    "streaming": ("Weights that wait on the host", "Time of a step against its tokens, and the floor: the longer of copying weights and the step without."),
    "score-memory": ("Score against memory", "Each mark is one run: its last score and the peak of its training memory. Left and high is better."),
    "curves": ("Training curves", "Score of each evaluation, one line a run; for LLaMA the held-out loss."),
    "rates": ("Score against learning rate", "On held-out training data."),
}  # fmt: skip


def write_page(
    frame: pd.DataFrame,
    tables: Sequence[Table],
    claims: Sequence[Claim],
    paper: Paper,
    problems: Sequence[str],
    path: Path,
    up: str,
) -> Path:
    """Write the page; `up` leads from its folder to the results folder."""
    made = environment(autoescape=True)
    made.filters |= dict(inline=inline, family=pictures.family, linked=lambda links: linked(links, up))
    families = [name for name in pictures.FAMILIES if name in set(frame.row.dropna().map(pictures.family))]
    runs = ((frame.kind == "run") & frame.usable).sum()
    drawn = {"frontier": frontiers(frame), "longest": longests(frame, paper), "streaming": streamings(frame)}
    drawn |= {"score-memory": scores(frame), "curves": training_curves(frame), "rates": rates(frame)}
    parts = [(anchor, *PARTS[anchor], _drawn(figures)) for anchor, figures in drawn.items()]
    known = {"names": NAMES, "families": families, "colours": pictures.FAMILIES, "parts": parts}
    found = {"overview": overview(claims), "claims": claims, "tables": tables, "problems": problems}
    page = made.get_template("page.html").render(runs=runs, measurements=len(frame) - runs, **known, **found)
    return write_text_atomic(path, page + "\n")


def inline(text: object) -> Markup:
    """A cell's Markdown (links, bold) and footnote marks as HTML."""

    def link(found: re.Match) -> str:
        return f'<a href="{"claims.md" * found[2].startswith("#")}{found[2]}">{found[1]}</a>'

    def bold(found: re.Match) -> str:
        return f'<b class="{re.sub("<.*?>", "", found[1]).replace(" ", "-")}">{found[1]}</b>'

    html = re.sub(r"\[([^\]]+)\]\(([^)]+)\)", link, str(escape(text)))
    html = re.sub(r"\*\*([a-z ]+|<a.*?</a>)\*\*", bold, html)
    return Markup(re.sub(r"&lt;sup&gt;(\d+)&lt;/sup&gt;", r"<sup>\1</sup>", html))


def _drawn(figures: Iterable[tuple[str, str, object]]) -> list[tuple[str, str, Markup]]:
    return [(domain, title, Markup(pictures.svg(figure))) for domain, title, figure in figures]


def _comparisons(frame: pd.DataFrame) -> Iterable[tuple[str, str, pd.DataFrame]]:
    """(domain, title, runs) of each model and task."""
    runs = frame[(frame.kind == "run") & frame.usable]
    for (domain, section, task), part in runs.groupby(["domain", "section", "task"]):
        yield domain, f"{task}, {section}", part


def scores(frame: pd.DataFrame) -> Iterable[tuple[str, str, object]]:
    """(domain, title, picture) of each comparison whose runs measured memory."""
    for domain, title, part in _comparisons(frame):
        if part.peak.notna().any():
            yield domain, title, pictures.scores_against_memory(part[part.peak.notna()], title)


def training_curves(frame: pd.DataFrame) -> Iterable[tuple[str, str, object]]:
    """(domain, title, picture) of each comparison whose runs were evaluated more than once."""
    for domain, title, part in _comparisons(frame):
        if lines := [(run.row, run.seed, line) for run in part.itertuples() if len(line := curve(run.record)) > 1]:
            yield domain, title, pictures.curves(lines, title, "held-out loss" if domain == "llama" else "score, %")


def frontiers(frame: pd.DataFrame) -> Iterable[tuple[str, str, object]]:
    """(domain, setting, picture) of each setting of scripts/bench_memory.py in which memory modes were measured."""
    steps = frame[frame.kind == "step"]
    steps = steps[steps.row.str.endswith(":fast").groupby(steps.section).transform("any")]
    domains = steps.groupby("section").domain.first()
    for (whose, section), part in step_means(steps).groupby(["whose", "section"], sort=False):
        points = {row: (means.step_seconds, means.over_static_bytes) for (*_, row), means in part.iterrows()}
        title = section if whose == "ours" else f"{section} ({whose})"
        yield domains[section], title, pictures.memory_against_time(points, title)


def scalings(frame: pd.DataFrame) -> Iterable[tuple[str, str, object]]:
    """(domain, setting, picture) of each setting of scripts/bench_scaling.py."""
    rows = frame[(frame.kind == "scaling") & frame.tokens_per_second.notna()]
    for section, part in rows.groupby("section"):
        yield "llama", section, pictures.scaling(part.to_dict("records"), section)


def longests(frame: pd.DataFrame, paper: Paper) -> Iterable[tuple[str, str, object]]:
    """(domain, setting, picture) of each setting whose longest sequences were searched for at three limits or more."""
    figures = paper.figures[paper.figures.table == "longest"]
    published = {int(figure.column): figure.value for figure in figures.itertuples()}
    for (whose, section), part in frame[(frame.kind == "longest") & (frame.longest_tokens > 0)].groupby(
        ["whose", "section"], sort=False
    ):
        if part.limit_gib.nunique() > 2:
            title = section if whose == "ours" else f"{section} ({whose})"
            known = published if part.task.iloc[0] == "llama3-8b" else {}
            yield "llama", title, pictures.longest_sequences(part, known, title)


def streamings(frame: pd.DataFrame) -> Iterable[tuple[str, str, object]]:
    """(domain, setting, picture) of each setting in which weights waited on the host at two lengths or more."""
    steps = frame[(frame.kind == "step") & frame.floor.notna() & frame.step_seconds.notna()]
    for (whose, place, sequences), part in steps.groupby(["whose", "place", "sequences"], sort=False):
        if part.tokens.nunique() > 1:
            title = f"{part.task.iloc[0]}, batch {sequences:.0f}{place.removeprefix(part.task.iloc[0])}"
            title += "" if whose == "ours" else f" ({whose})"
            yield "llama", title, pictures.streaming(part, title)


def rates(frame: pd.DataFrame) -> Iterable[tuple[str, str, object]]:
    """(domain, model, picture) of each search for a learning rate."""
    for (domain, section), part in frame[frame.kind == "search"].groupby(["domain", "section"]):
        yield domain, section, pictures.scores_against_rate(part, section)


def curve(record) -> list[tuple[float, float]]:
    """(epoch, score in percent or held-out loss) of each evaluation of a run."""
    for name, scale in (("score", 100), ("test_accuracy", 1), ("eval_loss", 1)):
        points = [(e["epoch"], scale * e[name]) for e in record.history if isinstance(e.get(name), float)]
        if points:
            return points
    return []


def write_pictures(frame: pd.DataFrame, paper: Paper, folder: Path) -> list[Path]:
    """The pictures that READMEs show, as PNG: memory against time, the longest sequences, weights that wait on the host, scaling,
    and scores against learning rates."""
    written = {}
    kinds = {"memory": frontiers(frame), "longest": longests(frame, paper), "streaming": streamings(frame)}
    kinds |= {"scaling": scalings(frame), "rates": rates(frame)}
    for kind, drawn in kinds.items():
        for _, title, figure in drawn:
            name = f"{kind}_{_slug(title)}"
            if name in written:  # of another torch, or another's
                name = f"{kind}_{re.sub(r'[^a-z0-9.]+', '_', title.lower())}"
            written[name] = pictures.save(figure, folder / f"{name}.png")
    return list(written.values())


def _slug(title: str) -> str:
    """llama3-8b, 4 x 1024 tokens, NVIDIA H100 80GB HBM3, torch 2.11 -> llama3-8b_4x1024_h100"""
    title = re.sub(r"(\d+) x (\d+) tokens( a process)?", r"\1x\2", title.lower()).partition(", torch")[0]
    return re.sub(r"[^a-z0-9.-]+", "_", re.sub(r"nvidia (\w+)[^,]*", r"\1", title))
