"""Fine-tune a causal language model on commonsense questions, texts or chats with control, LoRA, DoRA or both, and write a
run record.

    python -m LlaMA.finetune --method "control+lora" --data commonsense_170k.json --output_dir OUT
    python -m LlaMA.finetune --method "double control" --model SmolLM2.gguf --data commonsense_51k.json --output_dir OUT
    python -m LlaMA.finetune --method "double control" --model tiny --data demo --device cpu --output_dir OUT      a trial
    python -m LlaMA.finetune --method "double control" --data chats.jsonl --validation others.jsonl --output_dir OUT
    torchrun --nproc_per_node 4 -m LlaMA.finetune ...        the batch is shared out over the processes
    torchrun --nproc_per_node 4 -m LlaMA.finetune ... --shard fsdp2                  the frozen weights too

Defaults are the paper's recipe for LLaMA-2-7B. What the options trade: rows are packed end to end without padding, with
the gradients of the published micro-batches; `--batching padded` computes on padding too, as published. A larger
`--token_budget` is faster and takes more memory, results stay. `--memory fast|balanced|lean` keeps less of the frozen
blocks for the backward, with exact gradients. `--stream_weights True` keeps the frozen weights in the host's memory, for
models larger than the GPU. See LlaMA/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Optional

from transformers.hf_argparser import HfArg

from control_experiments.errors import UserError, run_main
from control_experiments.training import options as shared
from control_experiments.training.arguments import check_numbers, parse_arguments
from control_experiments.training.checksums import local_fingerprint
from LlaMA.demo import FILE, place_of

METHODS = ("lora", "dora", "control", "double control", "control+lora", "control+dora", "miss", "shadow")
#: LLM-Adapters' targets for the per-weight methods; beside a control the paper adapts the attention alone.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
MIXED_TARGETS = ("q_proj", "k_proj", "v_proj")


@dataclass(kw_only=True)
class RecipeOptions(shared.AdapterOptions):
    """What a training and the benchmark of its batching share."""

    method: str = HfArg(help=f"What to train: {', '.join(METHODS)}.")
    batch_size: int = HfArg(default=8, help="Rows per optimizer step, over all processes.")
    micro_batch_size: int = HfArg(default=4, help="Rows whose loss is averaged over their tokens.")
    cutoff: int = HfArg(default=256, help="Longer rows are cut to this many tokens, longer texts become several rows.")
    token_budget: Optional[int] = HfArg(default=None, help="Of a forward; else --micro_batch_size x --cutoff.")
    control_rank: int = HfArg(default=64, help="Rank of the control.")
    lora_rank: int = HfArg(default=32, help="Rank of LoRA, DoRA, MiSS and SHADOW.")
    lora_alpha: float = HfArg(default=64, help="LoRA's updates are scaled by alpha/rank.")
    lora_dropout: float = HfArg(default=0.05, help="Dropout before LoRA's A.")
    lora_targets: Optional[list[str]] = HfArg(default=None, help="Else q,k,v; without control up,down too.")
    dtype: shared.Precision = HfArg(default="auto", help="Frozen weights and autocast; adapters are float32.")

    methods: ClassVar[tuple[str, ...]] = METHODS

    @property
    def targets(self) -> Sequence[str]:
        return self.lora_targets or (MIXED_TARGETS if "control" in self.method else LORA_TARGETS)

    def check(self) -> None:
        super().check()
        check_numbers(self, "batch_size", "micro_batch_size", "cutoff", "token_budget", at_least=1)


@dataclass(kw_only=True)
class Options(shared.RunOptions, RecipeOptions, shared.MemoryOptions, shared.BaseOptions, shared.TrainerOptions):
    data: str = HfArg(
        help="JSON file in the format of commonsense_170k.json; JSON lines of messages, text or instructions; a text, or a folder of "
        ".txt files; or demo (made on the spot)."
    )
    validation: Optional[str] = HfArg(default=None, help="Held-out data of the same formats, instead of --held_out rows.")
    model: str = HfArg(default="meta-llama/Llama-2-7b-hf", help="Base: hub id, folder, GGUF file, or tiny.")
    epochs: float = HfArg(default=3, help="Passes over the training rows.")
    lr: float = HfArg(default=2e-4, help="Peak learning rate.")
    warmup_steps: int = HfArg(default=100, help="Optimizer steps in which the rate rises.")
    batching: Literal["packed", "padded"] = HfArg(
        default="packed", help="packed: no padding; padded: micro-batches padded to their longest row."
    )
    attention: Literal["auto", "varlen", "sdpa"] = HfArg(
        default="auto", help="Attention over packed rows: varlen computes within rows only (GPU, half precision)."
    )
    loss_on: Literal["all", "response"] = HfArg(
        default="all", help="all: as published, prompts too. Of a chat the assistant's turns count, whatever is given."
    )
    held_out: int = HfArg(default=120, help="Rows kept out of training, for a loss that may choose the checkpoint.")
    save: Literal["best", "last"] = HfArg(
        default="best",
        help="Which adapter: of the checkpoint with the lowest held-out loss, as published, or of the last step.",
    )
    split_seed: int = HfArg(default=42, help="Seeds which rows are held out.")
    eval_steps: int = HfArg(default=80, help="Optimizer steps between checkpoints, each evaluated.")
    optimizer: Literal["adamw", "paged_adamw_8bit"] = HfArg(
        default="adamw", help="paged_adamw_8bit: states in 8 bits, in host memory when the GPU's runs out."
    )
    gradient_checkpointing: bool = HfArg(default=False, help="Recompute every layer in the backward.")
    stream_weights: bool = HfArg(default=False, help=shared.STREAM_HELP)

    neutral: ClassVar[tuple[str, ...]] = ("stream_weights", "validation")

    @property
    def budget(self) -> int:
        return self.token_budget or self.micro_batch_size * self.cutoff

    def check(self) -> None:
        super().check()
        check_numbers(self, "eval_steps", "held_out", at_least=1)
        check_numbers(self, "warmup_steps", at_least=0)
        if self.batch_size % (self.micro_batch_size * shared.processes()):
            raise UserError(
                f"--batch_size {self.batch_size} must be a multiple of --micro_batch_size {self.micro_batch_size}"
                + (f" times {shared.processes()} processes" if shared.processes() > 1 else "")
            )
        if self.batching == "packed" and self.budget < self.cutoff:
            raise UserError(f"--token_budget {self.budget} must be at least --cutoff {self.cutoff}")
        if self.memory != "plain" and self.gradient_checkpointing:
            raise UserError("--gradient_checkpointing needs --memory plain: choose one of the two")
        if self.stream_weights:
            shared.check_streaming(self)
        if self.cuda_graphs and self.batching == "padded":
            raise UserError("--cuda_graphs needs packed rows: leave out --batching padded")
        if self.cuda_graphs and self.gradient_checkpointing:
            raise UserError("--cuda_graphs cannot replay --gradient_checkpointing: choose one of the two")
        if self.cuda_graphs and shared.processes() > 1:
            raise UserError("--cuda_graphs is for one process: leave it out")
        self.folder  # noqa: B018  there must be one

    def contents(self, name: str) -> Path:
        return place_of(self.data, FILE) if name == "data" else super().contents(name)

    def identity(self) -> dict:
        given = {"validation_sha256": local_fingerprint(self.validation)} if self.validation else {}
        return {**super().identity(), **given}

    def hyperparameters(self) -> dict:
        """Every option that can move the result, as it took effect."""
        return {**super().hyperparameters(), "lora_targets": list(self.targets), "token_budget": self.budget}


def main() -> None:
    (options,) = parse_arguments(Options, description=__doc__)
    options.check()
    from LlaMA.training import run  # loads torch: help and a wrong option need not wait for it

    run(options)


if __name__ == "__main__":
    run_main(main)
