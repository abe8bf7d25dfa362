"""Run a table: data sets x methods x seeds, each a run of finetune.py with its own folder and record.

    python -m ViT.small_table --data DATA --model MODEL --grid 5e-4 1e-3 2e-3 5e-3 2e-2        each method's own learning rate
    python -m ViT.small_table --data DATA --model MODEL --grid 5e-4 1e-3 2e-3 5e-3 2e-2 --methods lora --search_only

`run_small_table.sh` calls it with the recipe. Every option of finetune.py that decides a run's outcome is one here. Images and
frozen models stay in memory from run to run. The same command on several GPUs shares the runs out, and goes on where one was
interrupted (`control_experiments.training.study`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from transformers.hf_argparser import HfArg

from control_experiments.errors import run_main
from control_experiments.paths import RESULTS
from control_experiments.training.study import Cell, Study, StudyOptions, command_of, make_run, run_study
from ViT.finetune import Options as RunOptions
from ViT.finetune import RecipeOptions, model_name


@dataclass(kw_only=True)
class Options(StudyOptions, RecipeOptions):
    """What the runs share, and what they differ in."""

    data: list[str] = HfArg(help="Data sets, as in finetune.py.", aliases=["--tasks"])
    methods: list[str] = HfArg(
        default_factory=lambda: ["control", "lora", "dora", "probe"],
        help="Methods, as in finetune.py, each perhaps with options of its own: 'control:control_rank=8'.",
    )
    epochs: int = HfArg(default=10, help="Passes over the training images.")
    lora_rank: int = HfArg(default=0, help="As in finetune.py; 0: parameters as the control's.")
    device: str = HfArg(default="0", help="GPU index, or cpu.")
    workers: int = HfArg(default=8, help="Threads or processes that decode images.")
    deterministic: bool = HfArg(default=False, help="Deterministic GPU kernels alone.")
    output_dir: Optional[str] = HfArg(default=None, help="Default: results/vit.")


class ImageStudy(Study):
    """Runs of finetune.py, on images and frozen models that stay in memory."""

    metric = "test_accuracy"

    def __init__(self, options: Options):
        super().__init__(options, model_name(options.model), options.data, Path(options.output_dir or RESULTS / "vit"))

    def plan(self, cell: Cell) -> RunOptions:
        share = self.options.search_share if cell.searching else None
        own = {"data": cell.task, "seed": cell.seed, "lr": cell.lr, "validation_share": share}
        return make_run(RunOptions, self.options, cell.arm, **own, resume=True, output_dir=str(self.folder(cell)))

    def train(self, cell: Cell, run: RunOptions) -> None:
        from ViT import recipe  # with torch and timm, for which --help and a wrong option do not wait

        recipe.train(run, command_of(run))


def main() -> None:
    run_study(ImageStudy, Options, __doc__)


if __name__ == "__main__":
    run_main(main)
