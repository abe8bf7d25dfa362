"""All real runs of results/vit in one process: data sets x methods x seeds, at equal trained parameters.

    python -m ViT.small_table --data DATA --model MODEL --grid 5e-4 1e-3 2e-3 5e-3 2e-2        each method's own learning rate
    python -m ViT.small_table --data DATA --model MODEL --grid 5e-4 1e-3 2e-3 5e-3 2e-2 --methods lora --search_only

`run_small_table.sh` calls it with the recipe. Finished runs are skipped and unfinished ones are resumed, so the same
command completes an interrupted table. With --grid a search comes first: one run for each data set, method and learning
rate, scored on a tenth of the training images that is held out for it; no test image is looked at. Several processes may
share one output folder when --data or --methods differ.
"""

from __future__ import annotations

import gc
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import control_experiments  # noqa: F401  # isort: skip  (first, see there)
import torch

from control_experiments.errors import UserError, run_main
from control_experiments.paths import RESULTS
from control_experiments.record import read_record
from control_experiments.training.arguments import parse_arguments
from control_experiments.training.device import explain_out_of_memory, select_device
from control_experiments.training.losses import Diverged
from control_experiments.training.quiet import quieten
from control_experiments.training.rates import SEARCH_FOLDER, SEARCH_SEED, choose_rates
from ViT import finetune

#: Share of the training images on which the search scores learning rates.
HELD_OUT = 0.1


@dataclass
class Options:
    """What the runs differ in, and what they share; everything else is finetune.py's default."""

    data: list[str] = field(metadata={"help": "Data sets, as in finetune.py."})
    model: str = field(metadata={"help": "As in finetune.py."})
    architecture: Optional[str] = field(
        default=None, metadata={"help": "timm name, for weights from a file."}
    )
    methods: list[str] = field(
        default_factory=lambda: ["control", "lora", "dora", "probe"], metadata={"help": "Methods."}
    )
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3], metadata={"help": "Seeds."})
    epochs: int = field(default=10, metadata={"help": "Passes over the training images."})
    lr: float = field(
        default=5e-3, metadata={"help": "Learning rate of all methods when there is no --grid."}
    )
    grid: Optional[list[float]] = field(
        default=None,
        metadata={
            "help": "Learning rates from which each method gets its own for each data set, chosen on a tenth of the "
            "training images; default: no search."
        },
    )
    search_only: bool = field(default=False, metadata={"help": "Choose the learning rates and stop there."})
    batch_size: int = field(default=128, metadata={"help": "Images per step."})
    image_size: int = field(default=224, metadata={"help": "Pixels."})
    attention: str = field(default="sdpa", metadata={"help": "sdpa or eager."})
    device: str = field(default="0", metadata={"help": "GPU index, or cpu."})
    output_dir: Optional[str] = field(default=None, metadata={"help": "Default: results/vit."})

    @property
    def output(self) -> Path:
        return Path(self.output_dir) if self.output_dir else RESULTS / "vit"


def plan_run(
    options: Options, data: str, method: str, seed: int, lr: float, validation_share: float | None = None
) -> finetune.Options:
    """One run of finetune.py, checked."""
    run = finetune.Options(
        method=method, data=data, model=options.model, architecture=options.architecture, seed=seed,
        epochs=options.epochs, lr=lr, batch_size=options.batch_size, image_size=options.image_size,
        attention=options.attention, lora_rank=0, mlp_layers=2, resume=True, validation_share=validation_share,
    )  # fmt: skip
    run.output_dir = str(options.output / run.folder.relative_to(RESULTS / "vit"))
    run.complete()
    return run


def train(run: finetune.Options, number: str, device: torch.device) -> None:
    """Train unless the run is finished."""
    print(f"[{number}] {run.method} on {Path(run.data).stem}, lr {run.lr}, seed {run.seed}", flush=True)
    try:
        with explain_out_of_memory(device, finetune.LESS_MEMORY):
            finetune.train(run, device)
    finally:
        gc.collect()  # the model's parts refer to each other; the next run's memory must not hold this one's
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def search(options: Options, device: torch.device) -> dict[tuple[str, str], float]:
    """(data, method) -> the learning rate whose run has the best last score on held-out training images.

    Raises:
        UserError: a method diverged with every learning rate.
    """
    tried = {
        key: [plan_run(options, *key, SEARCH_SEED, lr, HELD_OUT) for lr in dict.fromkeys(options.grid)]
        for key in itertools.product(options.data, options.methods)
    }
    total, numbers = sum(map(len, tried.values())), itertools.count(1)
    print(f"{total} runs to choose learning rates, scored on held-out training images", flush=True)
    chosen = {}
    for (data, method), runs in tried.items():
        scores = {}
        for run in runs:
            try:
                train(run, f"{next(numbers)}/{total}", device)
            except Diverged as error:
                print(f"warning: lr {run.lr} is not chosen: {error}", file=sys.stderr)
                scores[str(run.lr)] = None
            else:
                scores[str(run.lr)] = read_record(run.folder / "record.json").metrics["last"]["test_accuracy"]
        key = (Path(data).stem, method)
        rates = choose_rates(
            {key: scores}, options.output / SEARCH_FOLDER / f"{runs[0].model_name}.json", runs[0].model_name
        )
        if not rates:
            raise UserError(
                f"{method} on {key[0]} diverges with every learning rate of --grid: add lower ones"
            )
        chosen[data, method] = float(rates[key])
        print(f"{method} on {key[0]}: lr {rates[key]} is chosen", flush=True)
    return chosen


def check_rates(runs: Sequence[finetune.Options]) -> None:
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
    if options.search_only and not options.grid:
        raise UserError("--search_only needs --grid with the learning rates to choose from")
    axes = (options.data, options.methods, options.seeds)
    runs = [plan_run(options, *cell, options.lr) for cell in itertools.product(*axes)]
    quieten()
    device = select_device(options.device)
    if options.grid:
        rates = search(options, device)
        for run in runs:
            run.lr = rates[run.data, run.method]
    if options.search_only:
        return
    check_rates(runs)
    for number, run in enumerate(runs, 1):
        train(run, f"{number}/{len(runs)}", device)


if __name__ == "__main__":
    run_main(main)
