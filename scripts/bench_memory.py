"""Memory and speed of one training step: LoRA and its kin as people run them, and control in every memory mode.

    python -m scripts.bench_memory                                        # LLaMA-3-8B's shape, 4 x 1024 tokens
    python -m scripts.bench_memory --tokens 256 --methods lora control:fast control+graphs:fast control:lean
    python -m scripts.bench_memory --batch 1 --base bf16 nf4 --methods lora lora+checkpointing control:lean
    python -m scripts.bench_memory --shape vit-b16 --batch 128            # 4-layer MLP, 197 tokens, fp16 autocast
    python -m scripts.bench_memory --shape roberta-base --batch 64 --tokens 128
    python -m scripts.bench_memory --shape qwen3-30b-a3b                  # 128 experts, 8 active; 61 GB of weights (fp8: 31)
    python -m scripts.bench_memory --limit 23.5 --batch 1 --methods lora+liger+checkpointing control:lean
    python -m scripts.bench_memory --limit 15.5 23.5 --speed_at 8192 --batch 1 --base nf4 --methods control:lean
    python -m scripts.bench_memory --methods control:fast --profile       # where the time goes

Random weights of the true shape: memory and time do not depend on their values. Every method runs in a process of its
own, on the same data. A line is printed as it ends, a table at the end. Ratios are to the fastest and to the leanest
LoRA of the same run. Times are medians of --repeats repeats in that process; their spread is given beside them. A record
goes to --output, from which scripts.make_tables draws. The same command goes on after what a killed run has measured.

A method is NAME[+SWITCH...][+BASE][:MODE], with the ranks and targets of the paper's recipe for the shape.
  NAME    lora, lora-all (every linear layer), lora-qkv, lora-fa (A is frozen), dora, miss, shadow (peft's), control,
          control+lora, control+dora
          LLaMA: LoRA r 32 on q,k,v,up,down, control r 64 on attention and mlp; ViT: LoRA r 1 on the MLP's linear layers,
          control r 16; RoBERTa: LoRA r 8 on query and value, control r 16; Qwen3-MoE: LoRA r 16 on attention, and with
          lora-experts on the experts' tensors too (peft's target_parameters), control as for LLaMA
  SWITCH  liger, unsloth, checkpointing, compile, graphs (CUDA graphs of the step), eager (attention), uncast (without
          peft's float32 copies of LoRA's inputs, as LlaMA/finetune.py trains), streamed (the layers' frozen weights wait
          on the host, two layers lie on the GPU), streamed3 (three layers), onboard (lean's states stay on the GPU),
          fp8states (they wait on the host in FP8), fp8head (the output layer is in FP8 too)
  BASE    fp32, bf16, fp16, nf4, fp4, int8 or fp8: how the frozen weights are stored; else LLaMA bf16, the others fp32
  MODE    plain, fast, balanced or lean, for methods with a control (see peft_control.memory)
By default those run that suit the shape. Unsloth, for lora and lora-all, only loads models from folders, so one is
written for it (16 GB for LLaMA-3-8B, in TMPDIR); by default it runs on a GPU where it is installed, for which
results/README.md has a command. With graphs memory is what the allocator reserves, in expandable segments, because a
graph keeps its memory between the steps. --limit uses expandable segments too, and limits what torch's allocator takes;
a card keeps about half a GiB for itself besides. A found length ran within its limit; one longer by a thirtieth does not
fit, or is predicted not to.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, replace
from typing import Optional

from transformers.hf_argparser import HfArg

from control_experiments.errors import UserError, run_main
from control_experiments.paths import RESULTS
from control_experiments.training.arguments import check_numbers, parse_arguments
from scripts.catalogue import BASES, CAUSAL_SHAPES, LONGEST, VISION_SHAPES, Setting, default_methods, parse_method


@dataclass
class Options(Setting):
    methods: Optional[list[str]] = HfArg(default=None, help="In order; default: all that the shape has.")
    base: Optional[list[str]] = HfArg(default=None, help="For methods that name none.", metadata={"choices": BASES})
    steps: int = HfArg(default=8, help="Timed steps of each repeat; their median counts.")
    warmup: int = HfArg(default=3, help="Steps before the timed ones.")
    repeats: Optional[int] = HfArg(default=None, help="Their median counts; default: 3 on a GPU, 1 on a CPU.")
    limit: Optional[list[float]] = HfArg(default=None, help="Instead: the longest sequence within each so many GiB.")
    speed_at: Optional[list[int]] = HfArg(default=None, help="With --limit: tokens/s at these lengths too.")
    up_to: int = HfArg(default=LONGEST, help="With --limit: no longer sequences are tried.")
    max_minutes: Optional[float] = HfArg(default=None, help="With --limit: begin nothing after so long.")
    profile: bool = HfArg(default=False, help="Instead: the kernels of a step, in a record of their own.")
    output: str = HfArg(default=str(RESULTS / "memory"), help="Folder of records.", aliases=["--output_dir"])
    worker: Optional[str] = HfArg(default=None, help="Used by the script itself: run this one method.")
    left: Optional[list[str]] = HfArg(default=None, help="Used by the script itself: what is to be measured.")

    def with_defaults(self) -> Options:
        """The options with what was left out as the shape and the device have it. Raises UserError: what cannot be, before
        a minute is spent."""
        sizes = ("batch", "tokens", "lengths", "control_rank", "lora_rank")
        check_numbers(self, *sizes, "speed_at", "steps", "repeats", at_least=1)
        check_numbers(self, "warmup", at_least=0)
        check_numbers(self, "limit", "max_minutes", above=0)
        check_numbers(self, "up_to", at_least=512)
        tokens = max(self.lengths) if self.lengths else 1024 if self.shape in CAUSAL_SHAPES else 128
        if self.shape in VISION_SHAPES:
            tokens = VISION_SHAPES[self.shape].tokens
            if self.lengths or self.tokens not in (None, tokens):
                raise UserError(f"{self.shape} has {tokens} tokens: leave --tokens and --lengths out")
        if self.lengths and (self.tokens or tokens) < tokens:
            raise UserError(f"--lengths has {tokens}, which is more than --tokens {self.tokens}")
        device = "cpu" if self.device == "cpu" else "cuda"
        if not self.limit and (self.speed_at or self.max_minutes or self.up_to != LONGEST):
            raise UserError("--speed_at, --up_to and --max_minutes go with --limit")
        if self.limit and (device == "cpu" or self.shape not in CAUSAL_SHAPES or self.lengths or self.profile):
            raise UserError("--limit needs a GPU and a decoder's shape, without --lengths and --profile")
        unsloth = importlib.util.find_spec("unsloth")
        methods = self.methods or default_methods(self.shape, device, device == "cuda" and bool(unsloth))
        if self.base:
            methods = [parse_method(text).over(base) for base in self.base for text in methods]
        methods = list(dict.fromkeys(methods))
        for method in map(parse_method, methods):
            method.check(self.shape, device)
            if "unsloth" in method.switches and not unsloth:
                told = "unsloth is not installed (pip install unsloth, in an environment of its own)"
                raise UserError(f"method {method.text!r}: {told}")
        from control_experiments.training.device import select_device  # loads torch

        return replace(
            self, device=select_device(self.device).type, methods=methods, tokens=self.tokens or tokens,
            repeats=self.repeats or (3 if device == "cuda" else 1),
        )  # fmt: skip

    def cells(self, method: str) -> list[tuple]:
        """What is measured of a method: (method, "step", None), or what --limit finds, shortest first: (method, "tokens", tokens)
        and (method, "limit_gib", GiB)."""
        if not self.limit:
            return [(method, "step", None)]
        found = [(method, "tokens", tokens) for tokens in sorted({*(self.speed_at or [])})]
        return found + [(method, "limit_gib", limit) for limit in sorted({*self.limit})]

    def particulars(self) -> dict[str, str]:
        """How the step differs from the recipe's: what people read, by what a file's name says."""
        found = {}
        if self.lengths:
            lengths = [str(length) for length in self.lengths]
            found["lengths" + "-".join(lengths)] = f"rows of {', '.join(lengths)}"
        found |= {self.precision: f"{self.precision} autocast"} if self.precision else {}
        ranks = (("control", self.control_rank), ("lora", self.lora_rank))
        return found | {f"{name}{rank}": f"{name} rank {rank}" for name, rank in ranks if rank}

    def file_name(self) -> str:
        words = [self.shape, f"{self.batch}x{self.tokens}", *(self.base or []), *self.particulars()]
        words += [f"limit{'-'.join(f'{limit:g}' for limit in self.limit)}"] if self.limit else []
        words += ["profile"] if self.profile else []
        return "_".join(words) + ".json"


def main() -> None:
    """Measure as the command line says."""
    (options,) = parse_arguments(Options, description=__doc__)
    options = options.with_defaults()
    from scripts import measuring  # and torch with it: not before the options are known to be right

    measuring.work(options) if options.worker else measuring.run(options, sys.argv[1:])


if __name__ == "__main__":
    run_main(main)
