"""Pictures drawn from records: memory against time, scaling, training curves, scores. All return a matplotlib Figure.

scripts/make_tables.py draws those of results/pictures and report.html, scripts/quickstart_table.py its own.
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
from matplotlib.path import Path as Line
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import Bbox

#: Method families: colour and marker, for those who see no colours.
FAMILIES = {
    "control": ("#1668c7", "o"), "double control": ("#6b3fc4", "o"), "control+lora": ("#0b7f86", "D"), "control+dora": ("#0b7f86", "v"),
    "lora": ("#c25a00", "s"), "lora-fa": ("#c25a00", "d"), "dora": ("#2e7d32", "^"), "miss": ("#a3186f", "P"), "shadow": ("#8a6d00", "*"),
    "probe": ("#6b7280", "X"), "other": ("#9aa1ab", "."),
}  # fmt: skip
_NAMES = {"lora": "LoRA", "lora-fa": "LoRA-FA", "dora": "DoRA", "miss": "MiSS", "shadow": "SHADOW"}
_NAMES |= {"control+lora": "control + LoRA", "control+dora": "control + DoRA"}
#: GB of graphics cards as they are sold.
CARDS = (8, 12, 16, 24, 40, 48, 80)
_DASHES = ("-", "--", "-.", ":", (0, (8, 2, 1, 2, 1, 2)), (0, (3, 4)))
#: Verdicts' colours and markers.
_VERDICTS = {"supported": ("#2e7d32", "o"), "contradicted": ("#b3261e", "X"), "not decided": ("#6b7280", "s")}
_FAR = 5.5  # points beyond which an interval is an arrow


def family(label: str) -> str:
    """The family of a row or benchmark label: "control r64, lean" and "control+liger:plain" are control."""
    methods = re.split(r"[,:]| r\d| matched| on ", label)[0].split("+")
    name = "+".join(part for part in (m.removesuffix("-all") for m in methods) if part in FAMILIES)
    return name if name in FAMILIES else "other"


def mark(name: str, tip: str) -> str:
    """The id by which the page's filter finds a mark in an SVG, and what it shows when touched."""
    return f"mark|{name}|{tip}"


def _look(label: str, tip: str | None = None) -> dict:
    """A family's colour and marker, and the mark of what is drawn with them."""
    colour, marker = FAMILIES[family(label)]
    return {"color": colour, "marker": marker, "gid": mark(family(label), label if tip is None else tip)}


def _legend(axes, families: Iterable[str], *more: Line2D) -> None:
    """One entry for each family there is, whatever was drawn."""
    there = set(families)
    handles = [Line2D([], [], color=colour, marker=marker, linestyle="", label=_NAMES.get(name, name))
               for name, (colour, marker) in FAMILIES.items() if name in there]  # fmt: skip
    axes.legend(handles=[*handles, *more], fontsize=9)


def _axes(title: str, width: float = 8.3, height: float = 5.2, axes=None, **look):
    axes = axes or Figure(figsize=(width, height), layout="constrained").add_subplot()
    axes.set_title(title, **{"fontsize": 11, **look})
    axes.grid(alpha=0.25)
    return axes


def _logarithmic(axes, form: str) -> None:
    """A logarithmic y axis that is labelled at 1, 2 and 5."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(form)
    axes.yaxis.set_minor_formatter(NullFormatter())


def _at(axes, values: Sequence[float], **look) -> None:
    """A logarithmic x axis that is labelled at these values alone."""
    axes.set_xscale("log")
    axes.set_xticks(values, [f"{value:{',.0f' if value >= 1 else 'g'}}" for value in values], **look)
    axes.xaxis.set_minor_locator(NullLocator())


def memory_against_time(points: Mapping[str, tuple[float, float]], title: str) -> Figure:
    """Method -> (seconds a step, bytes over the weights), with the frontier: the methods that no other beats in both. A method in
    its simplest form has a name, and a variant that no other of the method over the same base beats."""
    axes = _axes(title)
    placed = {label: (1000 * seconds, size / 1e9) for label, (seconds, size) in points.items()}
    ordered = sorted(placed.values())
    leanest = itertools.accumulate((y for _, y in ordered), min, initial=float("inf"))
    frontier = [point for point, least in zip(ordered, leanest) if point[1] < least]
    line = dict(color="#444", linewidth=1, linestyle="--")
    axes.step(*zip(*frontier), where="post", zorder=1, **line)
    axes.set(xlabel="milliseconds a step", ylabel="GB over the weights")
    axes.margins(x=0.18, y=0.1)  # room for names
    if all(y > 0 for _, y in placed.values()):  # on a CPU they are not measured
        _logarithmic(axes, "{x:g}")
    kin = {label: (family(label), {"nf4", "fp4", "int8", "fp8"} & {*re.split("[+:]", label)}) for label in placed}
    beaten = {
        label
        for (label, (x, y)), (other, (quicker, leaner)) in itertools.permutations(placed.items(), 2)
        if kin[label] == kin[other] and quicker <= x and leaner <= y and _variant(label) not in ("plain", _NAMES.get(label))
    }
    for label, (x, y) in placed.items():
        tip = f"{label}\n{x:.0f} ms a step\n{y:.2f} GB over the weights"
        faint = dict(markersize=4, alpha=0.35) if label in beaten else dict(markersize=6)
        axes.plot(x, y, linestyle="", zorder=2, **faint, **_look(label, tip))
    axes.set_xlim(left=max(axes.get_xlim()[0], 0))  # no time is below it
    told = [Line2D([], [], label="frontier: no other beats these in both", **line)]
    if beaten:
        look = dict(color="#9aa1ab", marker="o", markersize=4, linestyle="")
        told.append(Line2D([], [], label="small: beaten in both by its own kind", **look))
    _legend(axes, map(family, placed), *told)
    FigureCanvasAgg(axes.figure).draw()  # without a layout nobody knows where names collide
    _name(axes, placed, [label for label in placed if label not in beaten], frontier)
    return axes.figure


def _name(axes, placed: Mapping[str, tuple[float, float]], named: list[str], frontier: list[tuple[float, float]]) -> None:
    """Write the points' names beside them where they cover nothing, further away with a thin line that crosses no other."""
    boxes, place = Bbox.from_extents, axes.transData.transform
    taken = [boxes(x - 5, y - 5, x + 5, y + 5) for x, y in place(list(placed.values()))]
    for (x, y), (right, below) in itertools.pairwise(map(tuple, place(frontier))):
        taken += [boxes(x, y - 1, right, y + 1), boxes(right - 1, below, right + 1, y)]
    taken.append(axes.get_legend().get_window_extent())
    lines = []
    offsets = itertools.product((7, 19, 31, 43, 55), (-3, 8, -14, 19, -25, 30, -36), (1, -1))
    offsets = sorted(((x * side, y) for x, y, side in offsets), key=lambda offset: abs(offset[0]) + abs(offset[1] + 3))
    for label in sorted(named, key=placed.__getitem__):
        point = placed[label]
        look = {key: value for key, value in _look(label, "").items() if key != "marker"}
        text = axes.annotate(_variant(label), point, (0, 0), textcoords="offset points", fontsize=8.5, **look)
        for offset in offsets:
            text.set(position=offset, horizontalalignment="left" if offset[0] > 0 else "right")
            box = text.get_window_extent().padded(1)
            inside = axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1 and axes.bbox.y0 < box.y0
            start, far = place(point), abs(offset[0]) + abs(offset[1] + 3) > 16
            line = Line([start, start + [length * axes.figure.dpi / 72 for length in offset]])
            crosses = far and any(map(line.intersects_path, lines))
            if inside and not crosses and not any(map(box.overlaps, taken)):
                break
        if far:
            look = dict(arrowstyle="-", color="#999", linewidth=0.6)
            axes.annotate("", point, xytext=offset, textcoords="offset points", arrowprops=look)
            lines.append(line)
        taken.append(text.get_window_extent())


def _variant(label: str) -> str:
    """What a benchmark's label says beyond the family, which the colour says: "control+graphs:fast" is "fast, graphs"."""
    name, _, mode = label.partition(":")
    parts = ["all layers" if part == "lora-all" else part for part in name.split("+") if part not in FAMILIES]
    return ", ".join(filter(None, [mode, *parts])) or _NAMES.get(label, label)


def intervals(judged: pd.DataFrame, margin: float, title: str) -> Figure:
    """A mark and its interval for each difference in points (columns label, verdict, mean, low, high, and statistic for the tip),
    beside the margin that may be lost. Arrows stand for what lies further away."""
    axes = _axes(title, 8.3, 1.3 + 0.5 * len(judged))
    axes.axvspan(-margin, 0, color="#f3e3c3", zorder=0)
    axes.axvline(0, color="black", linewidth=0.8)
    for place, row in enumerate(judged.itertuples()):
        colour, marker = _VERDICTS[row.verdict]
        ends, mean = (min(max(end, -_FAR), _FAR) for end in (row.low, row.high)), min(max(row.mean, -_FAR), _FAR)
        tip = mark("control", f"{row.label}\n{row.statistic}: {row.verdict}")
        axes.plot([*ends], [place] * 2, color=colour, linewidth=2, gid=tip)
        for far, side, arrow in ((row.low < -_FAR, -_FAR, "<"), (row.high > _FAR, _FAR, ">")):
            if far:
                axes.plot(side, place, color=colour, marker=arrow)
        if mean == row.mean:
            axes.plot(mean, place, color=colour, marker=marker, markersize=8)
        beside = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 9, "color": colour}
        axes.annotate(f" {row.mean:+.2f}", (1, place), **beside)
    axes.set_yticks(range(len(judged)), judged.label, fontsize=9)
    axes.set(xlabel="points, with 95 % intervals", xlim=(-1.05 * _FAR, 1.05 * _FAR), ylim=(len(judged) - 0.5, -0.5))
    handles = [Line2D([], [], color=colour, marker=marker, label=verdict) for verdict, (colour, marker) in _VERDICTS.items()]
    axes.figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9)
    return axes.figure


def scaling(measured: pd.DataFrame, title: str) -> Figure:
    """Bars for each method, sharding and number of processes (columns as the records'): tokens/s of each GPU, with the share of
    one GPU's speed that is kept, and peak memory of each GPU."""
    counts = sorted(map(int, measured.processes.unique()))
    measured = measured.assign(
        speed=measured.tokens_per_second / measured.processes, size=measured.peak_bytes_per_process / 1e9,
        kept=measured.efficiency.fillna(0),
    )  # fmt: skip
    means = measured.pivot_table(["speed", "size", "kept"], ["method", "shard"], "processes", sort=False)
    means = means[::-1].sort_index(axis=1)
    figure = Figure(figsize=(8.3, 1.4 + 0.24 * len(means) * (len(counts) + 1)), layout="constrained")
    shades = [matplotlib.colormaps["Blues"](0.35 + 0.6 * number / len(counts)) for number in range(len(counts))]
    axes = figure.subplots(1, 2, sharey=True)
    titles = {"speed": "tokens/s of each GPU (and share of one GPU's)", "size": "peak GB of each GPU"}
    for side, (what, label) in zip(axes, titles.items()):
        means[what][counts[::-1]].plot.barh(ax=side, color=shades[::-1], width=0.8, edgecolor="white", legend=False)
        for bars, count in zip(side.containers, counts[::-1]):
            kept = [f"{share:.0f} %" if count > 1 and share > 0 else "" for share in means["kept", count]]
            side.bar_label(bars, **({"labels": kept} if what == "speed" else {"fmt": "%.1f"}), padding=2, fontsize=8)
        side.margins(x=0.15)
        side.grid(axis="x", alpha=0.25)
        side.set(xlabel=label, ylabel="", axisbelow=True)
    axes[0].set_yticklabels([f"{method}\n{shard}" for method, shard in means.index], fontsize=9)
    labels = [f"{count} GPU{'s' * (count > 1)}" for count in counts]
    figure.legend(axes[0].containers[::-1], labels, loc="outside upper right", ncols=len(counts), fontsize=9)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    return figure


def longest_sequences(rows: pd.DataFrame, published: Mapping[int, float], title: str) -> Figure:
    """Longest sequence in tokens against the card in GB (columns as the records'), a line for each method, or a named point for
    a single card; `published` are Unsloth's, card in GB -> tokens."""
    axes = _axes(title)
    measured = rows[rows.longest_tokens > 0].groupby(["row", "base", "card"], sort=False).longest_tokens.min().reset_index()
    alone = ~measured.duplicated("row", keep=False)
    measured = measured[~(alone & measured.duplicated(["card", "longest_tokens"]))]
    dashes = dict(zip(measured.base.unique(), itertools.cycle(("-", "--", ":", "-."))))
    named: list[tuple[float, float]] = []
    for (row, base), part in measured.groupby(["row", "base"], sort=False):
        look = _look(row) | {"linestyle": dashes[base]} | ({"marker": "X"} if "unsloth" in row else {})
        if len(part) > 1:
            look["label"] = row
        else:
            card, length = part[["card", "longest_tokens"]].iloc[0]
            beside = any(where == card and 0.8 < length / other < 1.25 for where, other in named)
            side = {"xytext": (-7, -3), "ha": "right"} if beside else {"xytext": (7, -3)}
            named.append((card, length))
            axes.annotate(row, (card, length), textcoords="offset points", fontsize=8, color=look["color"], **side)
        axes.plot(part.sort_values("card").set_index("card").longest_tokens, markersize=5, linewidth=1.4, **look)
    if len(stopped := rows[rows.ended_by == "--up_to"]):
        axes.plot(stopped.card, 1.15 * stopped.longest_tokens, "^", color="#444", markersize=4, label="no longer one was tried")
    if published:
        look = dict(color="#444", linewidth=2, linestyle=(0, (1, 1)), zorder=1, label="published: Unsloth, QLoRA r32")
        axes.plot(*zip(*sorted(published.items())), **look)
    axes.set(xlabel="card, GB", ylabel="longest sequence, tokens")
    _at(axes, CARDS)
    _logarithmic(axes, "{x:,.0f}")
    axes.legend(fontsize=8.5)
    return axes.figure


def streaming(steps: pd.DataFrame, title: str) -> Figure:
    """Seconds a step against tokens (columns as the records'), a line for each method whose weights wait on the host, the same with
    resident weights, and the floor: the longer of that and copying the weights."""
    axes, labels = _axes(title), iter(("floor: the longer of copying and resident",))
    figures = ["step_seconds", "resident_step_seconds", "floor"]
    means = steps.groupby(["row", "tokens"], sort=False)[figures].mean().reset_index("row").sort_index()
    for (row, part), dash in zip(means.groupby("row", sort=False), itertools.cycle(_DASHES)):
        axes.plot(part.floor, color="#444", linewidth=5, alpha=0.25, label=next(labels, None), zorder=1)
        axes.plot(part.step_seconds, linestyle=dash, label=row, **_look(row))
    for row, part in means.groupby(means.row.str.replace(r"\+(streamed3?|onboard)\b", "", regex=True), sort=False):
        look = _look(row) | {"color": "#c25a00", "marker": "s", "linestyle": "--", "label": f"{row}, resident"}
        axes.plot(part.resident_step_seconds.dropna().groupby("tokens").mean(), markersize=4, linewidth=1.2, **look)
    axes.set(xlabel="tokens a step", ylabel="seconds a step")
    _at(axes, sorted(means.index.unique()))
    _logarithmic(axes, "{x:g}")
    axes.legend(fontsize=9)
    return axes.figure


def curves(runs: Sequence[tuple[str, object, Sequence[tuple[float, float]]]], title: str, y_label: str,
           x_label: str = "epoch", axes=None) -> Figure:  # fmt: skip
    """A line for each (label, seed, points), into `axes` if given; the legend names each label once."""
    axes = _axes(title, 6, 4, axes, fontsize=10, wrap=True)
    labels = list(dict.fromkeys(label for label, _, _ in runs))
    colours = [FAMILIES[family(label)][0] for label in labels]
    if len(set(colours)) == 1 < len(labels):  # one family: colours tell its members apart
        colours = itertools.cycle(dict.fromkeys(colour for colour, _ in FAMILIES.values()))
    styles = zip(labels, colours, itertools.cycle(_DASHES))
    looks = {label: {"color": colour, "linestyle": dash} for label, colour, dash in styles}
    for label, seed, points in runs:
        tip = f"{label}, seed {seed}\nlast {points[-1][1]:.2f}\n{len(points)} evaluations"
        look = looks[label] | {"linewidth": 1.4, "alpha": 0.85, "marker": "." if len(points) < 3 else None}
        axes.plot(*zip(*points), gid=mark(family(label), tip), **look)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(handles=[Line2D([], [], label=_NAMES.get(label, label), **look) for label, look in looks.items()], fontsize=9)
    return axes.figure


def scores_against_memory(runs: pd.DataFrame, title: str, axes=None) -> Figure:
    """A mark for each run (columns row, seed, last, peak in bytes), into `axes` if given; memory starts at 0, lest
    distances look larger than they are."""
    axes = _axes(title, 6, 4, axes, fontsize=10, wrap=True)
    for run in runs.itertuples():
        tip = f"{run.row}, seed {run.seed:.0f}\nlast score {run.last:.2f} %\npeak {run.peak / 2**20:,.0f} MiB"
        axes.plot(run.peak / 2**20, run.last, linestyle="", alpha=0.85, **_look(run.row, tip))
    axes.set(xlabel="peak memory, MiB", ylabel="last score, %")
    axes.margins(0.1)
    axes.set_xlim(left=0)
    _legend(axes, runs.row.map(family))
    return axes.figure


def scores_against_rate(searched: pd.DataFrame, title: str) -> Figure:
    """Score on held-out training data against the learning rate, a panel for each task, a line for each method."""
    tasks = searched.task.unique()
    columns = min(len(tasks), 2)
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(8.3, 1 + 2.6 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    looks = {}
    for label in sorted(searched.row.unique()):  # dashes tell a family's members apart
        dash = _DASHES[sum(family(label) == family(other) for other in looks) % len(_DASHES)]
        looks[label] = _look(label) | {"linewidth": 1.2, "linestyle": dash}
    for axes, task in zip(panels, tasks):
        runs = searched[searched.task == task]
        for label, part in runs.groupby("row"):
            axes.plot(part.groupby("lr")["last"].mean(), **looks[label])
        axes.set(title=task, xlabel="learning rate", ylabel="held-out score, %")
        _at(axes, sorted(runs.lr.unique()), fontsize=8, rotation=30)
        axes.grid(alpha=0.25)
    for axes in panels[len(tasks) :]:
        axes.axis("off")
    names = {label: label.replace(family(label), _NAMES.get(family(label), family(label)), 1) for label in looks}
    handles = [
        Line2D([], [], label=names[label].removesuffix(", graphs"), **look | {"gid": None}) for label, look in looks.items()
    ]
    figure.legend(handles=handles, fontsize=9, loc="outside lower center", ncols=4)
    figure.suptitle(f"Score against learning rate: {title}", fontsize=11, x=0.01, ha="left")
    return figure


# -- files ----------------------------------------------------------------------------------------------------


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
    # the page gives sizes and fonts; ids other than marks' and those that others refer to say nothing
    unwanted = r' (?:width|height)="[\d.]+pt"|\s*<metadata>.*?</metadata>|(?<=\n) +| transform="rotate\(-0 .*?"'
    unwanted += r'|font-family: [^;"]*; | id="(?:line2d|text|[xy]tick|patch|matplotlib\.axis)_\d+"'
    text = re.sub(unwanted, "", text[text.index("<svg") :], flags=re.DOTALL)
    groups = 1
    while groups:  # from the inside out
        text, groups = re.subn(r"<g>\s*((?:(?!</?g\b).)*)</g>\n", r"\1", text, flags=re.DOTALL)
    # hundredths of a point do not show
    return re.sub(r' (?:d|[xy]|transform)="[^"]*"', lambda place: re.sub(r"(?<=\.\d)\d+", "", place[0]), text)
