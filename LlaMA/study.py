"""Run a table: methods x seeds, each trained by finetune.py, then asked the eight test sets by evaluate.py.

    python -m LlaMA.study --model MODEL --data commonsense_51k.json --tests FOLDER_OF_TEST_SETS --grid 3e-4 1e-3

`run_study.sh` calls it with the recipe. Every option of finetune.py that decides an outcome is one here. A search's runs are scored
by likelihood. The same command on several GPUs shares the runs out, and goes on where one was interrupted
(`control_experiments.training.study`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

from transformers.hf_argparser import HfArg

from control_experiments.errors import run_main
from control_experiments.paths import RESULTS
from control_experiments.record import write_json_atomic
from control_experiments.training.arguments import check_numbers
from control_experiments.training.study import (
    LOCKS,
    Arm,
    Cell,
    Study,
    StudyOptions,
    command_of,
    free_memory,
    make_run,
    run_study,
)
from LlaMA import evaluate, finetune
from LlaMA.commonsense import TASKS, read_rows, read_tests, split_rows
from LlaMA.demo import FILE, place_of

#: Held-out questions are at most so many: their accuracy is then known to about a point.
MOST_HELD_OUT = 2000
ZERO_SHOT = "zero-shot"


@dataclass(kw_only=True)
class Options(StudyOptions, finetune.Options):
    """What the runs share, and what they differ in."""

    methods: list[str] = HfArg(
        default_factory=lambda: [ZERO_SHOT, "lora", "double control"],
        help="Methods, as in finetune.py, or zero-shot, each perhaps with options of its own: 'double control:control_rank=137'.",
    )
    output_dir: Optional[str] = HfArg(default=None, help="Folder of the runs. Default: results/llama/MODEL.")
    tests: Optional[str] = HfArg(default=None, help="Folder of the test sets, or demo; default: the one of --data.")
    limit: Optional[int] = HfArg(default=None, help="Only the first so many questions of each test set.")
    questions: int = HfArg(default=256, help="Questions answered together.")
    generate: Literal["none", "first", "all"] = HfArg(
        default="none", help="Whose answers are also generated, as published: each method's first seed's, or all seeds'."
    )
    search_steps: int = HfArg(default=-1, help="Steps of the search's runs; -1: as many as of the others.")


class CommonsenseStudy(Study):
    untrained = (ZERO_SHOT,)
    metric = "average"

    def __init__(self, options: Options):
        output = Path(options.output_dir) if options.output_dir else RESULTS / "llama" / Path(options.model).name
        super().__init__(options, Path(options.model).name.removesuffix(".gguf"), [options.data], output)
        self.test_sets = place_of(options.tests) if options.tests else place_of(options.data, FILE).parent

    def check(self) -> None:
        check_numbers(self.options, "limit", "questions", at_least=1)
        read_tests(self.test_sets, list(TASKS), 1)
        super().check()

    def plan(self, cell: Cell) -> finetune.Options:
        arm = Arm("control") if cell.arm.method == ZERO_SHOT else cell.arm
        own = {"seed": cell.seed, "lr": cell.lr, "output_dir": str(self.folder(cell))}
        if cell.searching:
            own |= {"data": str(self.held_out / "train.json"), "max_steps": self.options.search_steps}
        return make_run(finetune.Options, self.options, arm, **own)

    def train(self, cell: Cell, run: finetune.Options) -> None:
        from LlaMA import evaluation, training  # with torch, for which --help and a wrong option do not wait

        if cell.searching:
            self.hold_out()
        if cell.arm.method != ZERO_SHOT:
            training.run(run, command_of(run))
            free_memory()  # the answers' model comes now
        for answers in self.answers(cell):
            asked = self.questions(cell, run, answers)
            evaluation.run(asked, command_of(asked))

    def command(self, cell: Cell) -> str:
        return f"# {cell}" if cell.arm.method == ZERO_SHOT else super().command(cell)

    def questions(self, cell: Cell, run: finetune.Options, folder: Path) -> evaluate.Options:
        """The options with which the run's model answers into `folder`."""
        tests, alone = self.held_out if cell.searching else self.test_sets, cell.arm.method == ZERO_SHOT
        asked = evaluate.Options(
            data=str(tests), output_dir=str(folder), model=run.model, device=run.device, dtype=run.dtype, seed=cell.seed,
            quantization=run.quantization, limit=self.options.limit, batch_size=self.options.questions,
            tasks=[task for task in TASKS if (tests / task / "test.json").is_file()],
            mode="likelihood" if folder in self.answers(cell)[:1] else "generate",
            adapter=None if alone else str(self.folder(cell) / "adapter"), method=None if alone else run.method,
            control_rank=run.control_rank, lora_rank=run.lora_rank, lora_alpha=run.lora_alpha,
        )  # fmt: skip
        asked.check()
        return asked

    def answers(self, cell: Cell) -> list[Path]:
        """The folders of a run's answers: by likelihood, and perhaps generated."""
        folder, alone = self.folder(cell), cell.arm.method == ZERO_SHOT
        found = [folder if alone else folder / "likelihood"]
        seeds = {"none": [], "first": self.options.seeds[:1], "all": self.options.seeds}[self.options.generate]
        if not cell.searching and cell.seed in seeds:
            found.append(folder.with_name(f"{folder.name}_generated") if alone else folder / "evaluation")
        return found

    def records(self, cell: Cell) -> list[Path]:
        trained = [] if cell.arm.method == ZERO_SHOT else super().records(cell)
        return [*trained, *(folder / "record.json" for folder in reversed(self.answers(cell)))]

    @property
    def held_out(self) -> Path:
        return self.output / LOCKS / f"held_out_{Path(self.options.data).stem}"

    def hold_out(self) -> None:
        """Write the training rows without those held out, and these as test sets, each named after a task of their form."""
        if (self.held_out / "train.json").is_file():
            return
        rows = read_rows(place_of(self.options.data, FILE))
        count = max(1, min(int(len(rows) * self.options.search_share), MOST_HELD_OUT))
        training, held_out = split_rows(rows, count, seed=0)
        sets: dict[str, list[dict]] = {}
        for row in held_out:
            task = next(task for task, words in TASKS.items() if row.answer in words)
            sets.setdefault(task, []).append(row._asdict())
        for task, found in sets.items():
            write_json_atomic(self.held_out / task / "test.json", found)
        write_json_atomic(self.held_out / "train.json", [row._asdict() for row in training])  # last: now it is whole


def main() -> None:
    run_study(CommonsenseStudy, Options, __doc__)


if __name__ == "__main__":
    run_main(main)
