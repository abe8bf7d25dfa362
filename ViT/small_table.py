"""All real runs of results/vit in one process: data sets x methods x seeds, at equal trained parameters.

`run_small_table.sh` calls it with the recipe. Finished runs are skipped and unfinished ones are resumed, so the same
command completes an interrupted table.
"""

from __future__ import annotations

import gc
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import finetune
import torch

from control_experiments.arguments import parse_arguments
from control_experiments.device import select_device
from control_experiments.errors import run_main


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
    lr: float = field(default=5e-3, metadata={"help": "Learning rate of SGD in the first epoch."})
    batch_size: int = field(default=128, metadata={"help": "Images per step."})
    image_size: int = field(default=224, metadata={"help": "Pixels."})
    attention: str = field(default="sdpa", metadata={"help": "sdpa or eager."})
    device: str = field(default="0", metadata={"help": "GPU index, or cpu."})
    output_dir: Optional[str] = field(default=None, metadata={"help": "Default: results/vit."})


def main() -> None:
    (options,) = parse_arguments(Options, description=__doc__)
    device = select_device(options.device)
    for data, method, seed in itertools.product(options.data, options.methods, options.seeds):
        run = finetune.Options(
            method=method, data=data, model=options.model, architecture=options.architecture, seed=seed,
            epochs=options.epochs, lr=options.lr, batch_size=options.batch_size, image_size=options.image_size,
            attention=options.attention, lora_rank=0, mlp_layers=2, resume=True,
        )  # fmt: skip
        if options.output_dir:
            run.output_dir = str(Path(options.output_dir) / run.folder.name)
        print(f"{method} on {Path(data).stem}, seed {seed}", flush=True)
        run.complete()
        finetune.train(run, device)
        gc.collect()  # the model's parts refer to each other; the next run's memory must not hold this one's
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    run_main(main)
