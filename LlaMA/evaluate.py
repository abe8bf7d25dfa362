"""Answer the 8 commonsense test sets with a base model, with or without an adapter, and write a run record.

    python -m LlaMA.evaluate --adapter OUT/adapter --data FOLDER_OF_TEST_SETS --output_dir OUT/evaluation
    python -m LlaMA.evaluate --model SmolLM2.gguf --data FOLDER --output_dir zero-shot          no adapter: zero-shot
    python -m LlaMA.evaluate ... --mode likelihood                    rank the answer words instead of generating
    python -m LlaMA.evaluate --model tiny --data demo --output_dir OUT --device cpu             a trial
    python -m LlaMA.evaluate ... --compare_batch_one 200              only measure batches against batch 1

Generation is as published (4 beams, 32 new tokens, no sampling), in left-padded batches of like length that end once
every answer is decided. Each raw answer goes to <task>.jsonl as soon as it is there; a run that was killed goes on with
the questions that are left when it is started again. See LlaMA/README.md.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

from transformers.hf_argparser import HfArg

from control_experiments.errors import UserError, run_main
from control_experiments.training import options as shared
from control_experiments.training.arguments import check_numbers, parse_arguments
from control_experiments.training.checksums import local_fingerprint
from LlaMA.commonsense import TASKS
from LlaMA.demo import place_of
from LlaMA.finetune import METHODS
from LlaMA.prompts import Style


@dataclass(kw_only=True)
class Options:
    data: str = HfArg(help="Folder with <task>/test.json for each task, or demo (made on the spot).")
    output_dir: str = HfArg(help="Folder for the raw answers and the record.")
    model: str = HfArg(default="meta-llama/Llama-2-7b-hf", help="Base: hub id, folder, GGUF file, or tiny.")
    adapter: Optional[str] = HfArg(default=None, help="Adapter folder; without it the base model answers.")
    device: str = HfArg(default="0", help="GPU index, or cpu.")
    tasks: list[str] = HfArg(default_factory=lambda: list(TASKS), help="Test sets to answer.", metadata={"choices": TASKS})
    limit: Optional[int] = HfArg(default=None, help="Only the first so many questions of each test set.")
    mode: Literal["generate", "likelihood"] = HfArg(
        default="generate", help="generate: as published; likelihood: the likeliest offered answer word."
    )
    batch_size: int = HfArg(default=64, help="Questions answered together.")
    beams: int = HfArg(default=4, help="Beams of the search.")
    max_new_tokens: int = HfArg(default=32, help="Longest response, in tokens.")
    prompt_style: Style = HfArg(
        default="matched", help="matched: prompts as in training; authors: the published, slightly different ones."
    )
    stop_when_decided: bool = HfArg(default=True, help="End a batch when no continuation changes an answer.")
    dtype: shared.Precision = HfArg(default="auto", help="Type of all weights.")
    quantization: shared.Quantization = HfArg(default="none", help=shared.QUANTIZATION_HELP)
    stream_weights: bool = HfArg(default=False, help=shared.STREAM_HELP)
    compare_batch_one: int = HfArg(default=0, help="Instead, answer so many questions in batches and singly.")
    method: Optional[str] = HfArg(default=None, help="What the adapter must be; then ranks are checked too.")
    control_rank: int = HfArg(default=64, help="Expected rank of the control.")
    lora_rank: int = HfArg(default=32, help="Expected rank of LoRA, DoRA, MiSS or SHADOW.")
    lora_alpha: float = HfArg(default=64, help="Expected LoRA alpha.")
    seed: int = HfArg(default=42, help="Only noted: nothing here is random.")

    def check(self) -> None:
        """Raise UserError for values that cannot be."""
        check_numbers(self, "batch_size", "beams", "max_new_tokens", "limit", at_least=1)
        check_numbers(self, "compare_batch_one", at_least=0)
        if self.method is not None:
            shared.check_method(self.method, METHODS)
        if self.stream_weights:
            shared.check_streaming(self)
        if self.adapter is not None and not (Path(self.adapter) / "adapter_config.json").is_file():
            raise UserError(f"{self.adapter} is no adapter folder: it has no adapter_config.json")

    def settings(self) -> dict:
        """What is to be answered, and how. Batches are left out: a run may go on with smaller ones."""
        names = ("mode", "beams", "max_new_tokens", "prompt_style", "limit", "tasks", "quantization")
        return {name: getattr(self, name) for name in names}

    def hyperparameters(self) -> dict:
        return {**self.settings(), "batch_size": self.batch_size, "stop_when_decided": self.stop_when_decided}

    def checksums(self) -> dict[str, str | None]:
        return {task: local_fingerprint(place_of(self.data) / task / "test.json") for task in self.tasks}


def main() -> None:
    (options,) = parse_arguments(Options, description=__doc__)
    options.check()
    from LlaMA.evaluation import run  # loads torch: help and a wrong option need not wait for it

    run(options, sys.argv[1:])


if __name__ == "__main__":
    run_main(main)
