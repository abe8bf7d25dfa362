"""Pictures of finished runs: accuracy against peak memory, training curves, and test images with their labels.

    python -m ViT.figures --runs results/vit/*_seed1 results/vit/*_seed2 --output_dir results/vit/figures
    python -m ViT.figures --runs results/vit/RUN --data DATA --output_dir results/vit/figures     also the image grid

Everything but the grid is made from records alone; the grid reads the run's predictions.csv and shows the images of
--data, the test images of the run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from transformers.hf_argparser import HfArg

from control_experiments.errors import UserError, run_main
from control_experiments.record import RunRecord, read_record
from control_experiments.reporting import pictures
from control_experiments.training.arguments import parse_arguments


@dataclass
class Options:
    runs: list[str] = HfArg(help="Run folders, each with a record.json.")
    output_dir: str = HfArg(default="figures", help="Where the PNG files go.")
    data: Optional[str] = HfArg(default=None, help="Data of the first run, for the image grid.")
    data_root: str = HfArg(default="data", help="Where torchvision keeps its downloads.")
    show: Literal["mixed", "wrong"] = HfArg(default="mixed", help="Grid: images spread over the test set, or only wrong ones.")
    images: int = HfArg(default=24, help="Images in the grid.")


def accuracy_against_memory(records: list[RunRecord]) -> Figure:
    """A mark for each run, a panel for each task: last test accuracy and peak memory (the process's on a CPU)."""
    rows = pd.DataFrame(
        {"row": r.method, "seed": r.seed, "task": r.task, "last": r.metrics["last"]["test_accuracy"],
         "peak": r.memory.get("peak_allocated_bytes") or r.memory.get("peak_resident_bytes")} for r in records
    )  # fmt: skip
    tasks = list(dict.fromkeys(rows.task))
    figure = Figure(figsize=(5 * len(tasks), 4), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks):
        pictures.scores_against_memory(rows[rows.task == task], f"{task} ({records[0].memory['kind']})", axes)
    return figure


def curves(records: list[RunRecord]) -> Figure:
    """Training loss above test accuracy by epoch, a line for each run, a column for each task."""
    tasks = list(dict.fromkeys(record.task for record in records))
    figure = Figure(figsize=(5 * len(tasks), 7), layout="constrained")
    panels = figure.subplots(2, len(tasks), squeeze=False)
    for row, (key, label) in zip(panels, (("train_loss", "training loss"), ("test_accuracy", "test accuracy, %"))):
        for axes, task in zip(row, tasks):
            mine = [record for record in records if record.task == task]
            lines = [(r.method, r.seed, [(entry["epoch"], entry[key]) for entry in r.history]) for r in mine]
            pictures.curves(lines, task, label, axes=axes)
    return figure


def grid(run: Path, record: RunRecord, options: Options) -> Figure:
    """Test images with predicted and true labels: green where they agree, red where not.

    Raises:
        UserError: no predictions, or other data than the run's.
    """
    from ViT.images import Decoded, load_data  # with torch, which no other picture needs

    data = load_data(options.data, root=options.data_root)
    if data.identity != {key: value for key, value in record.data.items() if key != "sizes"}:
        raise UserError(f"{options.data} is not the data of {run.name} ({record.data.get('id')})")
    try:
        rows = pd.read_csv(run / "predictions.csv", dtype=str, keep_default_na=False)
    except OSError as error:
        raise UserError(f"{run} has no predictions.csv: only finished runs have one") from error
    if not isinstance(data.test, Decoded) or len(rows) != len(data.test):
        raise UserError(f"predictions.csv of {run} does not fit the {len(data.test)} test images of {options.data}")
    rows = rows.assign(right=rows.predicted == rows.true)
    if options.show == "wrong":
        rows = rows[~rows.right]
        if rows.empty:
            raise UserError(f"{run.name} has no wrong prediction to show")
    chosen = rows.iloc[np.linspace(0, len(rows) - 1, min(options.images, len(rows))).astype(int)]
    columns = min(8, len(chosen))
    lines = -(-len(chosen) // columns)
    figure = Figure(figsize=(1.7 * columns, 2.1 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, subplot_kw={"frame_on": False, "xticks": [], "yticks": []})
    for axes, row in zip(panels.flat, chosen.itertuples(index=False)):
        axes.imshow(data.test.images[int(row.index)].permute(1, 2, 0).numpy())
        text = f"{row.predicted} {float(row.probability):.2f}" + ("" if row.right else f"\ntrue: {row.true}")
        axes.set_title(text, fontsize=7, color="tab:green" if row.right else "tab:red")
    accuracy = record.metrics["last"]["test_accuracy"]
    figure.suptitle(f"{record.method} on {record.task}: test accuracy {accuracy:.1f} %", fontsize=10)
    return figure


def main() -> None:
    (options,) = parse_arguments(Options, description=__doc__)
    runs = [Path(run) for run in options.runs]
    records = [read_record(run / "record.json") for run in runs]
    if others := [record.name for record in records if record.domain != "vit" or not record.history]:
        raise UserError(f"{others[0]} is no training run of ViT.finetune: give folders of those")
    drawn = {"accuracy_memory": accuracy_against_memory(records), "curves": curves(records)}
    if options.data:
        drawn[f"{records[0].name}_images"] = grid(runs[0], records[0], options)
    for name, figure in drawn.items():
        print(pictures.save(figure, Path(options.output_dir) / f"{name}.png"))


if __name__ == "__main__":
    run_main(main)
