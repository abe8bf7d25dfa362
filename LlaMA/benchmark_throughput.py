"""Measure real (non-padding) tokens per second of the published batching and of ours, in one run.

    python -m LlaMA.benchmark_throughput --shape llama3-8b --data commonsense_51k.json --output_dir OUT
    python -m LlaMA.benchmark_throughput --model SmolLM2.gguf --data commonsense_51k.json --output_dir OUT --memory fast

Three ways to train on the same rows of the data:
    published   micro-batches padded to their longest row, autograd as it is
    packed      the same optimizer steps with the same gradients, packed (and with --memory)
    large       packed too, with --large_batch rows per optimizer step (another recipe: fewer, larger steps)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, ClassVar, Literal, Optional

from transformers.hf_argparser import HfArg

from control_experiments.errors import UserError, run_main
from control_experiments.paths import public_path
from control_experiments.training.arguments import check_numbers, parse_arguments
from control_experiments.training.options import MemoryOptions, RunOptions
from LlaMA.finetune import METHODS, RecipeOptions
from scripts.catalogue import LLAMA_SHAPES

if TYPE_CHECKING:
    from control_experiments.training.setup import Run
    from LlaMA.packing import Batch


@dataclass(kw_only=True)
class Options(RunOptions, RecipeOptions, MemoryOptions):
    data: str = HfArg(help="JSON file in the format of commonsense_170k.json.")
    model: Optional[str] = HfArg(default=None, help="Hub id, folder or GGUF file of a base model.")
    shape: Optional[str] = HfArg(default=None, help="Or random weights of a LLaMA.", metadata={"choices": [*LLAMA_SHAPES]})
    method: str = HfArg(default="control+lora", help="Method that is trained.")
    attention: Literal["auto", "sdpa"] = HfArg(default="auto", help="auto: flash attention over packs where it runs.")
    steps: int = HfArg(default=30, help="Timed optimizer steps of each way.")
    warmup: int = HfArg(default=5, help="Optimizer steps before the timed ones.")
    large_batch: int = HfArg(default=64, help="Rows per optimizer step of `large`.")
    token_budget: int = HfArg(default=8192, help="Most tokens in a pack.")

    methods: ClassVar[tuple[str, ...]] = tuple(name for name in METHODS if name != "shadow")  # it has a loss of its own

    def check(self) -> None:
        super().check()
        if (self.model is None) == (self.shape is None):
            raise UserError("give either --model or --shape")
        check_numbers(self, "steps", "large_batch", at_least=1)
        check_numbers(self, "warmup", at_least=0)


def measure(options: Options, run: Run) -> None:
    """Time all three ways on one model and write the record."""
    import torch

    from control_experiments.training.benchmarking import time_steps
    from control_experiments.training.checksums import fingerprint
    from control_experiments.training.device import DTYPES, seed_everything
    from control_experiments.training.metering import MemoryMeter
    from control_experiments.training.methods import adapter_config, count_unquantized, describe_adapter, describe_model
    from LlaMA import models, packing
    from LlaMA.commonsense import read_rows, split_rows, tokenize_rows
    from LlaMA.training import collate
    from scripts.workloads import random_llama

    dtype = DTYPES[run.precision]
    record = run.begin_record(domain="llama", task="throughput", dtype=str(dtype).removeprefix("torch."))
    seed_everything(options.seed)
    rows = read_rows(options.data)
    order, _ = split_rows(rows, 1, options.seed)
    memory = MemoryMeter(run.device)
    if options.model is None:
        tokenizer = models.train_tokenizer(order, min(16384, LLAMA_SHAPES[options.shape]["vocab_size"]))
        base = random_llama(options.shape, run.device, dtype)
    else:
        tokenizer = models.load_tokenizer(options.model)
        base = models.load_model(options.model, dtype, run.device)
    memory.after_load()
    models.choose_pad_token(tokenizer, base.get_input_embeddings().weight.shape[0])
    total = count_unquantized(base)
    model = models.add_adapter(base, adapter_config(options, task_type="CAUSAL_LM", targets=options.targets))

    def train(steps: Sequence[list[Batch]], loss: Callable) -> tuple[float, float]:
        """Real tokens a second and seconds a step of AdamW under autocast, over `steps` of batches whose gradients add up.

        The first ones, in which kernels are chosen and memory is first taken, do not count.
        """
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0)
        model.train()
        left = iter(steps)

        def step() -> None:
            for batch in next(left):
                with torch.autocast(run.device.type, dtype=dtype, enabled=dtype != torch.float32):
                    value = loss(model, batch.to(run.device))
                value.backward()
            optimizer.step()
            optimizer.zero_grad()
            memory.after_optimizer()

        seconds = sum(time_steps(step, len(steps), run.device.type)[options.warmup :])
        tokens = sum(batch.tokens for batches in steps[options.warmup :] for batch in batches)
        return tokens / seconds, seconds / options.steps

    results: dict[str, dict] = {}
    for name, batching, size, mode in (
        ("published", "padded", options.batch_size, "plain"),
        ("packed", "packed", options.batch_size, options.memory),
        ("large", "packed", options.large_batch, options.memory),
    ):
        packed = batching == "packed"
        way = SimpleNamespace(**{**vars(options), "batching": batching, "batch_size": size, "budget": options.token_budget})
        varlen = options.attention == "auto" and packed and packing.varlen_available(run.device, dtype)
        attention = packing.VARLEN if varlen else "sdpa"
        base.set_attn_implementation(attention)
        how = {"half": dtype != torch.float32, "chunk_tokens": options.chunk_tokens, "offload": options.offload}
        models.ready_to_train(model, mode, **how)
        loss = packing.batch_loss if mode == "plain" else packing.fused_batch_loss
        loss = packing.GraphedLoss(loss) if options.cuda_graphs and packed else loss
        count = (options.steps + options.warmup) * size
        tokens = tokenize_rows([order[index % len(order)] for index in range(count)], tokenizer, options.cutoff)
        parts = (tokens[start : start + size] for start in range(0, count, size))
        steps = [collate(part, options=way, pad_token_id=tokenizer.pad_token_id)["batches"] for part in parts]
        rate, seconds = train(steps, loss)
        results[name] = {
            "real_tokens_per_second": rate, "seconds_per_step": seconds, "rows_per_step": size, "memory_mode": mode,
            "forwards_per_step": sum(map(len, steps)) / len(steps), "attention": attention,
            "speedup": rate / results["published"]["real_tokens_per_second"] if results else 1.0,
        }  # fmt: skip
        print(f"{name:10} {rate:10,.0f} real tokens/s   {results[name]['speedup']:5.2f} times published", flush=True)
    record.finish(
        run.folder.record,
        model=describe_model(options.model or f"random {options.shape}", base, total),
        data={"id": public_path(options.data), "sha256": fingerprint(options.data), "sizes": {"rows": len(rows)}},
        adapter=describe_adapter(model),
        metrics={"best": {}, "last": results},
        memory=memory.summary(),
        time={name: result["real_tokens_per_second"] for name, result in results.items()},
    )


def main() -> None:
    (options,) = parse_arguments(Options, description=__doc__)
    options.check()
    from control_experiments.training.setup import start  # and torch with it: not before the options are known to be right

    less = "a smaller --token_budget, --large_batch or --micro_batch_size, --memory lean"
    with start(options, "LlaMA.benchmark_throughput", None, less_memory=less, option="dtype") as run:
        if run.folder.finished:
            print(f"{run.folder.path} is finished: skipped (delete the folder to run it again)")
        else:
            measure(options, run)


if __name__ == "__main__":
    run_main(main)
