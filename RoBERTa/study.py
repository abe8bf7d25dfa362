"""Run a table: GLUE tasks x methods x seeds, each a run of finetune.py with its own folder and record.

    python -m RoBERTa.study --tasks cola rte --epochs cola=10 rte=20 --model MODEL --data GLUE --grid 3e-4 1e-3 3e-3

`run_study.sh` calls it with the recipe. Every option of finetune.py that decides an outcome is one here. The same command on
several GPUs shares the runs out, and goes on where one was interrupted (`control_experiments.training.study`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from transformers.hf_argparser import HfArg

from control_experiments.errors import UserError, run_main
from control_experiments.paths import RESULTS
from control_experiments.training.study import Cell, Study, StudyOptions, command_of, make_run, run_study
from RoBERTa import finetune
from RoBERTa.glue import get_task


@dataclass(kw_only=True)
class Options(StudyOptions, finetune.Options):
    """What the runs share, and what they differ in."""

    tasks: list[str] = HfArg(default_factory=lambda: ["cola", "rte", "mrpc", "stsb"], help="Tasks, as in finetune.py.")
    epochs: list[str] = HfArg(
        default_factory=lambda: ["10"], help="Passes over the training set: one number, or TASK=NUMBER ..."
    )
    output_dir: str | None = HfArg(
        default=None, help="Folder of the runs. Default: results/roberta, quantized results/qcontrol."
    )
    task: str = field(init=False, default="cola")
    validation_share: None = field(init=False, default=None)
    predict: bool = field(init=False, default=False)

    def epochs_of(self, task: str) -> float:
        """Raises UserError: there is no such task, or --epochs says nothing about it, or no number."""
        get_task(task)
        values = dict(part.split("=", 1) if "=" in part else (task, part) for part in self.epochs)
        if task not in values:
            raise UserError(f"--epochs says nothing about {task}: add {task}=... or give one value for all")
        try:
            return float(values[task])
        except ValueError:
            raise UserError(f"--epochs must be numbers, got {values[task]!r}") from None


class GlueStudy(Study):
    def __init__(self, options: Options):
        model = Path(options.model).name
        if options.quantization != "none":
            model = f"{model}_{options.quantization}"
        super().__init__(options, model, options.tasks, Path(options.output_dir or RESULTS / options.domain))

    def plan(self, cell: Cell) -> finetune.Options:
        own = {"task": cell.task, "seed": cell.seed, "lr": cell.lr, "epochs": self.options.epochs_of(cell.task)}
        own |= {"validation_share": self.options.search_share if cell.searching else None}
        run = make_run(finetune.Options, self.options, cell.arm, **own, output_dir=str(self.folder(cell)))
        run.check_places()
        return run

    def train(self, cell: Cell, run: finetune.Options) -> None:
        from RoBERTa.training import finetune  # with torch, for which --help and a wrong option do not wait

        finetune(run, command_of(run))


def main() -> None:
    run_study(GlueStudy, Options, __doc__)


if __name__ == "__main__":
    run_main(main)
