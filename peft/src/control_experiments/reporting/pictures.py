"""Pictures drawn from records: memory against time, scaling, training curves, scores. All return a matplotlib Figure.

scripts/make_tables.py draws those of results/pictures and report.html; benchmarks draw theirs with the same functions.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import Bbox

#: Method families: colour and marker, for those who see no colours.
FAMILIES = {
    "control": ("#1668c7", "o"), "double control": ("#6b3fc4", "o"), "control+lora": ("#0b7f86", "D"), "control+dora": ("#0b7f86", "v"),
    "lora": ("#c25a00", "s"), "dora": ("#2e7d32", "^"), "miss": ("#a3186f", "P"), "shadow": ("#8a6d00", "*"),
    "probe": ("#6b7280", "X"), "other": ("#9aa1ab", "."),
}  # fmt: skip
_NAMES = {"lora": "LoRA", "dora": "DoRA", "miss": "MiSS", "shadow": "SHADOW"}
_NAMES |= {"control+lora": "control + LoRA", "control+dora": "control + DoRA"}


def family(label: str) -> str:
    """The family of a row or benchmark label: "control r64, lean" and "control+liger:plain" are control."""
    methods = re.split(r"[,:]| r\d| matched| on ", label)[0].split("+")
    name = "+".join(part for part in (m.removesuffix("-all") for m in methods) if part in FAMILIES)
    return name if name in FAMILIES else "other"


def _variant(label: str) -> str:
    """What a benchmark's label says beyond the family, which the colour says: "control+graphs:fast" is "fast, graphs"."""
    name, _, mode = label.partition(":")
    parts = ["all layers" if part == "lora-all" else part for part in name.split("+") if part not in FAMILIES]
    return ", ".join(filter(None, [mode, *parts])) or _NAMES.get(label, label)


def _legend(axes, families: Iterable[str], *more: Line2D, **where) -> None:
    """One entry for each family there is, whatever was drawn."""
    there = set(families)
    handles = [Line2D([], [], color=colour, marker=marker, linestyle="", label=_NAMES.get(name, name))
               for name, (colour, marker) in FAMILIES.items() if name in there]  # fmt: skip
    axes.legend(handles=[*handles, *more], fontsize=9, **where)


def _axes(title: str, width: float = 8.3, height: float = 5.2):
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.25)
    return figure, axes


def memory_against_time(points: Mapping[str, tuple[float, float]], title: str) -> Figure:
    """Method -> (seconds a step, bytes over the weights), with the frontier: the methods that no other beats in both."""
    figure, axes = _axes(title)
    placed = {label: (1000 * seconds, size / 1e9) for label, (seconds, size) in points.items()}
    frontier, best = [], float("inf")
    for x, y in sorted(placed.values()):
        if y < best:
            frontier.append((x, y))
            best = y
    axes.step(*zip(*frontier), where="post", color="#444", linewidth=1, linestyle="--", zorder=1)
    axes.set(xlabel="milliseconds a step", ylabel="GB over the weights")
    axes.margins(x=0.18, y=0.1)  # room for names
    if all(y > 0 for _, y in placed.values()):  # on a CPU they are not measured
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    for label, (x, y) in placed.items():
        colour, marker = FAMILIES[family(label)]
        tip = f"{label}\n{x:.0f} ms a step\n{y:.2f} GB over the weights"
        axes.plot(x, y, marker, color=colour, markersize=6, gid=mark(family(label), tip), zorder=2)
    frontier_name = "frontier: no other beats these in both"
    step = Line2D([], [], color="#444", linewidth=1, linestyle="--", label=frontier_name)
    _legend(axes, map(family, placed), step, loc="best")
    FigureCanvasAgg(figure).draw()  # without a layout nobody knows where names collide
    _name(axes, placed, frontier)
    return figure


def _name(axes, placed: Mapping[str, tuple[float, float]], frontier: list[tuple[float, float]]) -> None:
    """Write each point's name beside it where it covers nothing, further away with a thin line."""
    renderer = axes.figure.canvas.get_renderer()
    boxes, place = Bbox.from_extents, axes.transData.transform
    taken = [boxes(x - 5, y - 5, x + 5, y + 5) for x, y in place(list(placed.values()))]
    for (x, y), (right, below) in itertools.pairwise(map(tuple, place(frontier))):
        taken += [boxes(x, y - 1, right, y + 1), boxes(right - 1, below, right + 1, y)]
    taken.append(axes.get_legend().get_window_extent(renderer))
    heights = (-3, 8, -14, 19, -25, 30, -36)
    places = [(side * (7 + 12 * far), up) for far in range(5) for up in heights for side in (1, -1)]
    for label, point in sorted(placed.items(), key=lambda item: item[1]):
        text = axes.annotate(_variant(label), point, xytext=(0, 0), textcoords="offset points", fontsize=8.5, color=FAMILIES[family(label)][0],
                             gid=mark(family(label), ""))  # fmt: skip
        for right, up in sorted(places, key=lambda place: abs(place[0]) + abs(place[1] + 3)):
            text.xyann = (right, up)
            text.set_horizontalalignment("left" if right > 0 else "right")
            box = text.get_window_extent(renderer).padded(1)
            inside = axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1 and axes.bbox.y0 < box.y0
            if inside and not any(map(box.overlaps, taken)):
                break
        if abs(text.xyann[0]) + abs(text.xyann[1] + 3) > 16:
            line = dict(arrowstyle="-", color="#999", linewidth=0.6)
            axes.annotate("", point, xytext=text.xyann, textcoords="offset points", arrowprops=line)
        taken.append(text.get_window_extent(renderer))


def scaling(cells: Sequence[Mapping], title: str) -> Figure:
    """Bars for each method, sharding and number of processes (cells as scripts/bench_scaling.py writes them): tokens/s of each
    GPU, with the share of one GPU's speed that is kept, and peak memory of each GPU."""
    measured = pd.DataFrame(cells).dropna(subset="step_seconds")
    kind = ["method", "shard"]
    if "efficiency" not in measured:
        alone = measured[measured.processes == 1].set_index(kind).step_seconds.rename("alone")
        measured = measured.join(alone, on=kind).eval("efficiency = 100 * alone / step_seconds")
    numbers = ["tokens_per_second", "peak_bytes_per_process", "efficiency"]
    means = measured.groupby([*kind, "processes"], sort=False, as_index=False)[numbers].mean()  # of several files
    kinds, counts = list(dict.fromkeys(zip(means.method, means.shard))), sorted(map(int, means.processes.unique()))
    figure = Figure(figsize=(8.3, 1.4 + 0.24 * len(kinds) * (len(counts) + 1)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    thick = 0.8 / len(counts)
    shades = matplotlib.colormaps["Blues"]
    for number, count in enumerate(counts):
        mine = means[means.processes == count]
        rows = [kinds.index(pair) + number * thick for pair in zip(mine.method, mine.shard)]
        shade = shades(0.35 + 0.6 * number / len(counts))
        look = dict(height=0.9 * thick, color=shade, label=f"{count} GPU{'s' * (count > 1)}")
        speed = left.barh(rows, mine.tokens_per_second / count, **look)
        size = right.barh(rows, mine.peak_bytes_per_process / 1e9, **look)
        kept = [f"{share:.0f} %" if count > 1 and share > 0 else "" for share in mine.efficiency]
        left.bar_label(speed, kept, padding=2, fontsize=8)
        right.bar_label(size, fmt="%.1f", padding=2, fontsize=8)
    middle = thick * (len(counts) - 1) / 2
    ticks = [number + middle for number in range(len(kinds))]
    left.set_yticks(ticks, [f"{method}\n{shard}" for method, shard in kinds], fontsize=9)
    left.invert_yaxis()
    left.set(xlabel="tokens/s of each GPU (and share of one GPU's)")
    right.set(xlabel="peak GB of each GPU")
    for axes in (left, right):
        axes.margins(x=0.15)
        axes.grid(axis="x", alpha=0.25)
        axes.set_axisbelow(True)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper right", ncols=len(counts), fontsize=9)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    return figure


#: GB of graphics cards as they are sold. A limit in GiB is drawn at the card that gives an allocator so much.
CARDS = (8, 12, 16, 24, 40, 48, 80)


def longest_sequences(rows: pd.DataFrame, published: Mapping[int, float], title: str) -> Figure:
    """Longest sequence (columns row, limit in GiB, longest in tokens) against the card's size, a line for each method; `published`
    are Unsloth's, card in GB -> tokens."""
    figure, axes = _axes(title)
    measured = rows[rows.longest_tokens > 0].groupby(["row", "card"], sort=False).longest_tokens.min().reset_index()
    bases = dict.fromkeys(_base(row) for row in measured.row)
    dashes = dict(zip(bases, itertools.cycle(("-", "--", ":", "-."))))
    for row, part in measured.groupby("row", sort=False):
        part, (colour, marker) = part.sort_values("card"), FAMILIES[family(row)]
        look = dict(color=colour, marker="X" if "unsloth" in row else marker, linestyle=dashes[_base(row)], label=row)
        axes.plot(part.card, part.longest_tokens, markersize=5, linewidth=1.4, gid=mark(family(row), row), **look)
    if published:
        look = dict(color="#444", linewidth=2, linestyle=(0, (1, 1)), zorder=1)
        axes.plot(*zip(*sorted(published.items())), label="published: Unsloth, QLoRA r32", **look)
    axes.set(xscale="log", yscale="log", xlabel="card, GB", ylabel="longest sequence, tokens")
    axes.set_xticks(CARDS, [f"{card}" for card in CARDS])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(fontsize=8.5)
    return figure


def streaming(steps: pd.DataFrame, title: str) -> Figure:
    """Seconds a step against tokens (columns as the records'), a line for each method whose weights wait on the host, the same with
    resident weights, and the floor: the longer of that and copying the weights."""
    figure, axes = _axes(title)
    means = steps.groupby(["row", "tokens"], sort=False)[["step_seconds", "resident_step_seconds", "floor"]].mean().reset_index()
    labels = iter(("floor: the longer of copying and resident",))
    for (row, part), dash in zip(means.sort_values("tokens").groupby("row", sort=False), itertools.cycle(("-", "-.", ":"))):
        part, (colour, marker) = part.set_index("tokens"), FAMILIES[family(row)]
        axes.plot(part.floor, color="#444", linewidth=5, alpha=0.25, label=next(labels, None), zorder=1)
        axes.plot(part.step_seconds, color=colour, marker=marker, linestyle=dash, gid=mark(family(row), row), label=row)
    for row, part in means.assign(row=means.row.str.replace(r"\+streamed3?", "", regex=True)).groupby("row", sort=False):
        line = part.groupby("tokens").resident_step_seconds.mean().dropna()
        look = dict(color="#c25a00", marker="s", markersize=4, linestyle="--", linewidth=1.2)
        axes.plot(line, gid=mark(family(row), row), label=f"{row}, resident", **look)
    axes.set(xscale="log", yscale="log", xlabel="tokens a step", ylabel="seconds a step")
    axes.set_xticks(tokens := sorted(means.tokens.unique()), [f"{count:,.0f}" for count in tokens])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(fontsize=9)
    return figure


def _base(row: str) -> str:
    """How a benchmark's label says that the frozen weights are stored, which the line's dashes show."""
    return next((word for word in re.split("[+:]", row) if word in ("nf4", "fp4", "int8", "fp8")), "bf16")


def curves(runs: Sequence[tuple[str, object, Sequence[tuple[float, float]]]], title: str, y_label: str,
           x_label: str = "epoch", axes=None) -> Figure:  # fmt: skip
    """A line for each (label, seed, points), into `axes` if given; the legend names each label once."""
    axes = axes or _axes(title, 6, 4)[1]
    labels = list(dict.fromkeys(label for label, _, _ in runs))
    dashes = dict(zip(labels, itertools.cycle(("-", "--", "-.", ":"))))
    colours = {label: FAMILIES[family(label)][0] for label in labels}
    if len(set(colours.values())) < len(labels):  # one family: colours tell its members apart
        colours = dict(zip(labels, itertools.cycle(dict.fromkeys(colour for colour, _ in FAMILIES.values()))))
    for label, seed, points in runs:
        tip = f"{label}, seed {seed}\nlast {points[-1][1]:.2f}\n{len(points)} evaluations"
        look = dict(color=colours[label], linestyle=dashes[label], linewidth=1.4, alpha=0.85)
        look["marker"] = "." if len(points) < 3 else None
        axes.plot(*zip(*points), gid=mark(family(label), tip), **look)
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    axes.grid(alpha=0.25)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles = [
        Line2D([], [], color=colours[label], linestyle=dashes[label], label=_NAMES.get(label, label)) for label in labels
    ]
    axes.legend(handles=handles, fontsize=9)
    return axes.figure


def scores_against_memory(runs: pd.DataFrame, title: str, axes=None) -> Figure:
    """A mark for each run (columns row, seed, last, peak in bytes), into `axes` if given; memory starts at 0, lest
    distances look larger than they are."""
    axes = axes or _axes(title, 6, 4)[1]
    for run in runs.itertuples():
        colour, marker = FAMILIES[family(run.row)]
        tip = f"{run.row}, seed {run.seed:.0f}\nlast score {run.last:.2f} %\npeak {run.peak / 2**20:,.0f} MiB"
        axes.plot(run.peak / 2**20, run.last, marker, color=colour, alpha=0.85, gid=mark(family(run.row), tip))
    axes.set(xlabel="peak memory, MiB", ylabel="last score, %", title=title)
    axes.grid(alpha=0.25)
    axes.margins(0.1)
    axes.set_xlim(left=0)
    _legend(axes, runs.row.map(family))
    return axes.figure


def scores_against_rate(searched: pd.DataFrame, title: str) -> Figure:
    """Score on held-out training data against the learning rate, a panel for each task, a line for each method."""
    tasks = list(dict.fromkeys(searched.task))
    columns = min(len(tasks), 2)
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(8.3, 0.7 + 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, task in zip(panels, tasks):
        for label, part in searched[searched.task == task].groupby("row"):
            mean = part.groupby("lr")["last"].mean()
            colour, marker = FAMILIES[family(label)]
            axes.plot(mean.index, mean, marker=marker, color=colour, linewidth=1.2, gid=mark(family(label), label))
        rates = sorted(searched[searched.task == task].lr.unique())
        axes.set(title=task, xscale="log", xlabel="learning rate", ylabel="held-out score, %")
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates], fontsize=8)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.25)
    for axes in list(panels):
        axes.axis("off")
    _legend(figure, searched.row.map(family), loc="outside right upper")
    figure.suptitle(f"Score against learning rate: {title}", fontsize=11, x=0.01, ha="left")
    return figure


# -- files ----------------------------------------------------------------------------------------------------


def mark(name: str, tip: str) -> str:
    """The id by which the page's filter finds a mark in an SVG, and what it shows when touched."""
    return f"mark|{name}|{tip}"


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG that is the same for the same records and matplotlib."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def svg(figure: Figure) -> str:
    """The picture as an element of a page, the same for the same records and matplotlib."""
    output = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "results"}):
        figure.savefig(output, format="svg", metadata={"Date": None, "Creator": None})
    text = output.getvalue()
    unwanted = r' (?:width|height)="[\d.]+pt"|\s*<metadata>.*?</metadata>'
    return re.sub(unwanted, "", text[text.index("<svg") :], flags=re.DOTALL)
