"""Pictures of finished runs: accuracy against peak memory, training curves, and test images with their labels.

    python -m ViT.figures --runs results/vit/*_seed1 results/vit/*_seed2 --output_dir results/vit/figures
    python -m ViT.figures --runs results/vit/RUN --data DATA --output_dir results/vit/figures     also the image grid

Everything but the grid is made from records alone; the grid reads the run's predictions.csv and shows the images of
--data, the test images of the run.
"""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional

import control_experiments  # noqa: F401  # isort: skip  (first, see there)
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from control_experiments.errors import UserError, run_main
from control_experiments.record import RunRecord, read_record
from control_experiments.training.arguments import parse_arguments
from ViT.images import Decoded, load_data

COLORS = {"control": "tab:blue", "lora": "tab:orange", "dora": "tab:green", "probe": "tab:gray"}


@dataclass
class Options:
    """Options of the program."""

    runs: list[str] = field(metadata={"help": "Run folders, each with a record.json."})
    output_dir: str = field(default="figures", metadata={"help": "Where the PNG files go."})
    data: Optional[str] = field(default=None, metadata={"help": "Data of the first run, for the image grid."})
    data_root: str = field(default="data", metadata={"help": "Where torchvision keeps its downloads."})
    show: Literal["mixed", "wrong"] = field(
        default="mixed", metadata={"help": "Grid: images spread over the test set, or only wrong ones."}
    )
    images: int = field(default=24, metadata={"help": "Images in the grid."})


def peak_mib(record: RunRecord) -> float | None:
    """Peak of the run in MiB: allocated on the GPU, or the process's resident set on a CPU."""
    peak = record.memory.get("peak_allocated_bytes") or record.memory.get("peak_resident_bytes")
    return peak / 2**20 if peak else None


def accuracy_against_memory(records: list[RunRecord], path: Path) -> None:
    """One point per method (mean over seeds, bars from the lowest to the highest), one panel per task. Memory starts at 0, so
    that distances are not larger than they are; a legend names the methods, whose points may lie close together."""
    by_task: dict[str, dict[str, list[RunRecord]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        by_task[record.task][record.method].append(record)
    figure, axes = plt.subplots(1, len(by_task), figsize=(5 * len(by_task), 4), squeeze=False)
    for axis, (task, methods) in zip(axes[0], by_task.items(), strict=True):
        for method, runs in methods.items():
            accuracy = [run.metrics["last"]["test_accuracy"] for run in runs]
            memory = [mib for run in runs if (mib := peak_mib(run))]
            if not memory:
                continue
            mean = statistics.fmean(accuracy)
            bars = [[mean - min(accuracy)], [max(accuracy) - mean]]
            trained = runs[0].adapter["trainable_parameters"]
            label = (
                f"{method} ({trained / 1000:.0f}k trained, {len(runs)} seed{'s' if len(runs) > 1 else ''})"
            )
            axis.errorbar(
                statistics.fmean(memory),
                mean,
                yerr=bars,
                fmt="o",
                capsize=4,
                color=COLORS.get(method),
                label=label,
            )
        axis.margins(0.1, 0.2)
        axis.set_xlim(left=0)
        if axis.get_legend_handles_labels()[0]:
            # below the axes, beside no point
            axis.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.17))
        axis.set(
            title=task,
            xlabel=f"peak memory, MiB ({runs[0].memory['kind']})",
            ylabel="test accuracy, last epoch, %",
        )
        axis.grid(alpha=0.3)
    save(figure, path)


def curves(records: list[RunRecord], path: Path) -> None:
    """Training loss and test accuracy by epoch; a line per run, a color per method, a row per task."""
    tasks = list(dict.fromkeys(record.task for record in records))
    figure, axes = plt.subplots(len(tasks), 2, figsize=(10, 3.6 * len(tasks)), squeeze=False)
    for row, task in zip(axes, tasks, strict=True):
        labelled = set()
        for record in (r for r in records if r.task == task):
            epochs = [entry["epoch"] for entry in record.history]
            for axis, key in zip(row, ("train_loss", "test_accuracy"), strict=True):
                label = None if (record.method, key) in labelled else record.method
                labelled.add((record.method, key))
                axis.plot(epochs, [entry[key] for entry in record.history], color=COLORS.get(record.method),
                          label=label, marker="." if len(epochs) < 3 else None)  # fmt: skip
        row[0].set(title=task, xlabel="epoch", ylabel="training loss")
        row[1].set(title=task, xlabel="epoch", ylabel="test accuracy, %")
        for axis in row:
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
    save(figure, path)


def grid(run: Path, record: RunRecord, options: Options, path: Path) -> None:
    """Test images with predicted and true labels: green where they agree, red where not.

    Raises:
        UserError: no predictions, or other data than the run's.
    """
    data = load_data(options.data, root=options.data_root)
    if data.identity != {key: value for key, value in record.data.items() if key != "sizes"}:
        raise UserError(f"{options.data} is not the data of {run.name} ({record.data.get('id')})")
    try:
        with (run / "predictions.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"{run} has no predictions.csv: only finished runs have one") from error
    if not isinstance(data.test, Decoded) or len(rows) != len(data.test):
        raise UserError(
            f"predictions.csv of {run} does not fit the {len(data.test)} test images of {options.data}"
        )
    if options.show == "wrong":
        rows = [row for row in rows if row["predicted"] != row["true"]]
        if not rows:
            raise UserError(f"{run.name} has no wrong prediction to show")
    chosen = torch.linspace(0, len(rows) - 1, min(options.images, len(rows))).long().tolist()
    columns = min(8, len(chosen))
    lines = -(-len(chosen) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(1.7 * columns, 2.1 * lines), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, position in zip(axes.flat, chosen, strict=False):
        row = rows[position]
        axis.imshow(data.test.images[int(row["index"])].permute(1, 2, 0).numpy())
        right = row["predicted"] == row["true"]
        text = f"{row['predicted']} {float(row['probability']):.2f}" + (
            "" if right else f"\ntrue: {row['true']}"
        )
        axis.set_title(text, fontsize=7, color="tab:green" if right else "tab:red")
    accuracy = record.metrics["last"]["test_accuracy"]
    figure.suptitle(f"{record.method} on {record.task}: test accuracy {accuracy:.1f} %", fontsize=10)
    save(figure, path)


def save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(path)


def main() -> None:
    (options,) = parse_arguments(Options, description=__doc__)
    folders = [Path(run) for run in options.runs]
    records = [read_record(folder / "record.json") for folder in folders]
    if empty := [record.name for record in records if not record.history]:
        raise UserError(f"{empty[0]} has no training history: give folders of training runs")
    output = Path(options.output_dir)
    accuracy_against_memory(records, output / "accuracy_memory.png")
    curves(records, output / "curves.png")
    if options.data:
        grid(folders[0], records[0], options, output / f"{records[0].name}_images.png")


if __name__ == "__main__":
    run_main(main)
