"""A study of quality in one process on one GPU: data sets x methods x seeds, each method with its own learning rate.

    python -m ViT.small_table --data DATA --model MODEL --grid 5e-4 1e-3 2e-3 5e-3 2e-2        each method's own learning rate
    python -m ViT.small_table --data DATA --model MODEL --grid 5e-4 1e-3 2e-3 5e-3 2e-2 --methods lora --search_only

`run_small_table.sh` calls it with the recipe. Every option of finetune.py that decides a run's outcome is one here. Finished
runs are skipped and unfinished ones are resumed, so the same command completes an interrupted table; with --max_minutes it
ends by itself before a run that would take longer. With --grid a search comes first: runs for each data set, method and
learning rate, scored on a part of the training images that is held out for it; no test image is looked at. Several processes
may share one output folder when --data or --methods differ.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import count, product
from pathlib import Path
from typing import Optional

from transformers.hf_argparser import HfArg

from control_experiments.errors import UserError, run_main
from control_experiments.paths import RESULTS
from control_experiments.record import read_record
from control_experiments.training.arguments import check_numbers, parse_arguments
from control_experiments.training.rates import SEARCH_FOLDER, SEARCH_SEED, choose_rates
from ViT.options import Options as RunOptions
from ViT.options import RecipeOptions


@dataclass(kw_only=True)
class Options(RecipeOptions):
    """What the runs share, and what they differ in."""

    data: list[str] = HfArg(help="Data sets, as in finetune.py.")
    method: str = field(init=False, default="control")
    methods: list[str] = HfArg(default_factory=lambda: ["control", "lora", "dora", "probe"], help="Methods, as in finetune.py.")
    seeds: list[int] = HfArg(default_factory=lambda: [1, 2, 3], help="Seeds.")
    epochs: int = HfArg(default=10, help="Passes over the training images.")
    lora_rank: int = HfArg(default=0, help="As in finetune.py; 0: parameters as the control's.")
    grid: Optional[list[float]] = HfArg(
        default=None,
        help="Learning rates from which each method gets its own for each data set, chosen on held-out training images; "
        "default: --lr for all, no search.",
    )
    held_out: float = HfArg(default=0.1, help="Share of the training images on which the search scores.")
    search_seeds: list[int] = HfArg(default_factory=lambda: [SEARCH_SEED], help="Of the search.")
    search_only: bool = HfArg(default=False, help="Choose the learning rates and stop there.")
    max_minutes: Optional[float] = HfArg(default=None, help="Begin no run that would end later.")
    device: str = HfArg(default="0", help="GPU index, or cpu.")
    workers: int = HfArg(default=8, help="Threads or processes that decode images.")
    deterministic: bool = HfArg(default=False, help="Deterministic GPU kernels alone.")
    output_dir: Optional[str] = HfArg(default=None, help="Default: results/vit.")

    def check(self) -> None:
        """Raise `UserError` for what the runs themselves do not check."""
        if self.search_only and not self.grid:
            raise UserError("--search_only needs --grid with the learning rates to choose from")
        check_numbers(self, "max_minutes", above=0)

    @property
    def output(self) -> Path:
        return Path(self.output_dir) if self.output_dir else RESULTS / "vit"


def plan_run(
    options: Options, data: str, method: str, seed: int, lr: float, validation_share: float | None = None
) -> RunOptions:
    """One run of finetune.py, checked."""
    shared = {entry.name: getattr(options, entry.name) for entry in fields(RecipeOptions)}
    shared |= {name: getattr(options, name) for name in ("device", "workers", "deterministic")}
    own = {"data": data, "method": method, "seed": seed, "lr": lr, "validation_share": validation_share}
    run = RunOptions(**{**shared, **own}, resume=True)
    run.output_dir = str(options.output / run.folder.relative_to(RESULTS / "vit"))
    run.check()
    return run


def command_of(run: RunOptions) -> list[str]:
    """The arguments with which finetune.py makes the same run."""
    words = []
    for name, default in run.defaults().items():
        if (value := getattr(run, name)) != default:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


class TimeIsUp(Exception):
    """The next run would not end within --max_minutes."""


class Runner:
    """Trains runs that are not finished, one after the other, on images and frozen models that stay in memory."""

    def __init__(self, max_minutes: float | None):
        from ViT import recipe  # with torch and timm, for which --help and a wrong option do not wait

        self.recipe, self.loader = recipe, recipe.Loader()
        gc.freeze()  # what is imported is no garbage: the collection after each run need not look at it
        self.end = time.monotonic() + 60 * max_minutes if max_minutes else None
        self.longest = 0.0

    def train(self, run: RunOptions, number: str) -> None:
        """Train unless the run is finished. Raises TimeIsUp: it would not end in time, if it takes as long as
        the longest run so far; Diverged: its loss is not finite."""
        finished = (run.folder / "record.json").is_file()
        began = time.monotonic()
        if self.end and not finished and began + self.longest > self.end:
            raise TimeIsUp
        print(f"[{number}] {run.method} on {Path(run.data).stem}, lr {run.lr}, seed {run.seed}", flush=True)
        try:
            self.recipe.train(run, self.loader, command_of(run))
        finally:
            self.recipe.free_memory()
        self.longest = max(self.longest, time.monotonic() - began)


def search(options: Options, runner: Runner) -> dict[tuple[str, str], float]:
    """(data, method) -> the learning rate with the best mean last score on held-out training images. Raises
    UserError: a method diverged with every learning rate."""
    from control_experiments.training.losses import Diverged

    cells = list(product(options.data, options.methods))
    grid = list(dict.fromkeys(options.grid))
    total, numbers = len(cells) * len(grid) * len(options.search_seeds), count(1)
    print(f"{total} runs to choose learning rates, scored on held-out training images", flush=True)
    chosen = {}
    for data, method in cells:
        scores = {}
        for lr in grid:
            found = []
            for seed in options.search_seeds:
                run = plan_run(options, data, method, seed, lr, options.held_out)
                number = next(numbers)
                if None in found:  # it diverged with another seed
                    continue
                try:
                    runner.train(run, f"{number}/{total}")
                except Diverged as error:
                    print(f"warning: lr {run.lr} is not chosen: {error}", file=sys.stderr)
                    found.append(None)
                else:
                    found.append(read_record(run.folder / "record.json").metrics["last"]["test_accuracy"])
            scores[str(lr)] = None if None in found else statistics.fmean(found)
        key = (Path(data).stem, method)
        notes = options.output / SEARCH_FOLDER / f"{run.model_name}.json"
        rates = choose_rates({key: scores}, notes, run.model_name)
        if not rates:
            raise UserError(f"{method} on {key[0]} diverges with every learning rate of --grid: add lower")
        chosen[data, method] = float(rates[key])
        print(f"{method} on {key[0]}: lr {rates[key]} is chosen", flush=True)
    return chosen


def check_rates(runs: Sequence[RunOptions]) -> None:
    """Raises UserError: a finished run has another learning rate than the table's."""
    finished = [(run, run.folder / "record.json") for run in runs if (run.folder / "record.json").is_file()]
    other = [
        f"{run.folder} has lr {lr}, not {run.lr}"
        for run, record in finished
        if (lr := read_record(record).hyperparameters.get("lr")) != run.lr
    ]
    if other:
        more = f" (and {len(other) - 1} more finished runs are like it)" if len(other) > 1 else ""
        raise UserError(f"{other[0]}{more}: delete such folders or choose another --output_dir")


def main() -> None:
    (options,) = parse_arguments(Options, description=__doc__)
    options.check()
    # every method gets its first seed before any gets its second one
    cells = [(data, method, seed) for data, seed, method in product(options.data, options.seeds, options.methods)]
    runs = [plan_run(options, *cell, options.lr) for cell in cells]
    for lr in options.grid or ():
        plan_run(options, *cells[0], lr, options.held_out)
    runner = Runner(options.max_minutes)
    from control_experiments.training.device import select_device
    from control_experiments.training.losses import Diverged

    device = select_device(options.device)
    for run in runs:  # the GPU's index among those that this process still sees
        run.device = options.device = "cpu" if device.type == "cpu" else str(device.index)
    diverged = []
    try:
        if options.grid:
            rates = search(options, runner)
            for run in runs:
                run.lr = rates[run.data, run.method]
        if options.search_only:
            return
        check_rates(runs)
        for number, run in enumerate(runs, 1):
            try:
                runner.train(run, f"{number}/{len(runs)}")
            except Diverged as error:
                print(f"warning: {run.folder.name}: {error}", file=sys.stderr)
                diverged.append(run.folder.name)
    except TimeIsUp:
        print(f"the next run does not fit into {options.max_minutes:g} minutes: the same command goes on")
        return
    if diverged:
        raise UserError(f"{len(diverged)} of {len(runs)} runs diverged: {', '.join(diverged)}")
    print(f"all {len(runs)} runs are finished")


if __name__ == "__main__":
    run_main(main)
