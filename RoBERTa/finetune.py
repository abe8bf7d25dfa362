"""Fine-tune an encoder on a GLUE task with control, LoRA or DoRA, and write a run record.

    python -m RoBERTa.finetune --method control --task cola                      the paper's recipe, GPU 0, from the hub
    python -m RoBERTa.finetune --method lora --task demo --model FOLDER --device cpu --epochs 2 --lr 1e-3
    torchrun --nproc_per_node 2 -m RoBERTa.finetune --method control --task mnli     each step's rows are shared out
    torchrun --nproc_per_node 2 -m RoBERTa.finetune --method control --task mnli --shard fsdp2        the frozen weights too

What the options trade: `--padding longest` (default) computes only on real tokens and gives the same results as
`max_length`, which is there to reproduce the authors' timing. `--precision` defaults to bf16 where the GPU has it
(else fp16, with float32 trained parameters and a loss scaler). `--eval_steps 0` evaluates once an epoch; the paper's 50
looks at the dev set more often, so its best-of-all is more optimistic. See RoBERTa/README.md.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from transformers.hf_argparser import HfArg

from control_experiments.errors import UserError, run_main
from control_experiments.paths import RESULTS
from control_experiments.training import options as shared
from control_experiments.training.arguments import check_numbers, parse_arguments
from RoBERTa.glue import TASKS, find_folder, get_task

#: Of all methods those that encoders train with.
METHODS = ("control", "lora", "dora", "double control", "control+lora", "control+dora")


@dataclass(kw_only=True)
class Options(
    shared.RunOptions,
    shared.AdapterOptions,
    shared.MemoryOptions,
    shared.BaseOptions,
    shared.TrainerOptions,
    shared.SearchOptions,
):
    """Defaults are the paper's recipe for RoBERTa-base (the authors' RoBERTa README)."""

    method: str = HfArg(help=f"What to train: {', '.join(METHODS)}.")
    task: str = HfArg(help=f"One of {', '.join(TASKS)}.")
    model: str = HfArg(default="roberta-base", help="Hub id or folder of an encoder.")
    data: str | None = HfArg(default=None, help="Folder of GLUE tsv or save_to_disk folders; else the hub.")
    epochs: float = HfArg(default=80, help="Passes over the training set.")
    weight_decay: float = HfArg(default=0.1, help="AdamW's, on every trained parameter, biases too.")
    warmup_ratio: float = HfArg(default=0.06, help="Share of the steps in which the rate rises.")
    eval_batch_size: int = HfArg(default=128, help="Rows per step when evaluating; no effect on results.")
    save_steps: int = HfArg(default=0, help="Checkpoint every so many steps; 0: after each epoch.")
    max_length: int = HfArg(default=128, help="Longer inputs are cut to this many tokens.")
    padding: Literal["longest", "max_length"] = HfArg(
        default="longest", help="longest: rows of like length together, padded to their longest; max_length: the authors'."
    )
    random_order: bool = HfArg(default=False, help="Rows of all lengths in a batch, at more padding.")
    precision: shared.Precision = HfArg(default="auto", help="Autocast; auto: bf16 or fp16 on a GPU, else fp32.")
    output_dir: str | None = HfArg(
        default=None, help="Default: results/roberta/MODEL_TASK_METHOD_seedSEED, quantized below results/qcontrol."
    )
    predict: bool = HfArg(default=False, help="Write the GLUE server's files for the test sets.")

    methods: ClassVar[tuple[str, ...]] = METHODS
    neutral: ClassVar[tuple[str, ...]] = ("predict", "save_steps", "eval_batch_size")

    def check(self) -> None:
        super().check()
        check_numbers(self, "eval_batch_size", "max_length", at_least=1)
        check_numbers(self, "save_steps", at_least=0)
        check_numbers(self, "warmup_ratio", at_least=0, below=1)
        if not get_task(self.task).server_files and self.predict:
            raise UserError(f"task {self.task} has no test set to --predict")

    def check_places(self) -> None:
        """Raise `UserError` for folders that hold no model or data of the task; a finished run needs no data."""
        model = Path(self.model)
        if not model.exists() and (self.model.startswith((".", "/")) or len(model.parts) > 2):
            raise UserError(f"there is no model at {self.model}")
        if model.exists() and not (model / "config.json").is_file():
            raise UserError(f"{self.model} is no model folder: it has no config.json")
        if self.data is not None and not (self.folder / "record.json").is_file():
            find_folder(self.task, Path(self.data))

    @property
    def domain(self) -> str:
        """Which folder of results the run belongs to."""
        return "roberta" if self.quantization == "none" else "qcontrol"

    @property
    def folder(self) -> Path:
        if self.output_dir is not None:
            return Path(self.output_dir)
        method = self.method.replace(" ", "_")
        if self.quantization != "none":
            method += f"_{self.quantization}"
        return RESULTS / self.domain / f"{Path(self.model).name}_{self.task}_{method}_seed{self.seed}"

    def contents(self, name: str) -> Path:
        """The part of `--data` that holds the task; `--model` as it is."""
        if name == "data":
            with suppress(UserError):  # a finished run needs no data
                return find_folder(self.task, Path(self.data))
        return super().contents(name)


def main() -> None:
    (options,) = parse_arguments(Options, description=__doc__)
    options.check()
    options.check_places()
    from RoBERTa.training import finetune  # and torch with it: not before the options are known to be right

    finetune(options)


if __name__ == "__main__":
    run_main(main)
