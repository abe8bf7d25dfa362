"""Measure real (non-padding) tokens per second of the published batching and of ours, in one run.

    python -m LlaMA.benchmark_throughput --shape llama3-8b --data commonsense_51k.json --output_dir OUT
    python -m LlaMA.benchmark_throughput --model SmolLM2.gguf --data commonsense_51k.json --output_dir OUT --memory fast

Three ways to train on the same rows of the data:
    published   micro-batches of 4 padded to their longest row, autograd as it is
    packed      the same optimizer steps with the same gradients, packed (and with --memory)
    large       packed too, with --large_batch rows per optimizer step (another recipe: fewer, larger steps)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, Optional

import control_experiments  # noqa: F401  # isort: skip  (first, see there)
import torch

from control_experiments.errors import UserError, run_main
from control_experiments.paths import public_path
from control_experiments.record import RunRecord, git_state, package_versions, utc_now
from control_experiments.training.arguments import check_numbers, parse_arguments
from control_experiments.training.checksums import fingerprint
from control_experiments.training.device import (
    describe_device,
    explain_out_of_memory,
    seed_everything,
    select_device,
)
from control_experiments.training.metering import MemoryMeter
from control_experiments.training.methods import count_parameters, describe_model
from control_experiments.training.quiet import quieten
from control_experiments.training.runs import RunFolder
from LlaMA.commonsense import read_rows, split_rows, tokenize_rows
from LlaMA.finetune import LORA_TARGETS, MIXED_TARGETS
from LlaMA.measuring import run_steps, train_tokenizer
from LlaMA.models import (
    SHAPES,
    add_adapter,
    choose_pad_token,
    expected_config,
    load_model,
    load_tokenizer,
    random_model,
    ready_to_train,
    resolve_dtype,
)
from LlaMA.packing import (
    VARLEN,
    GraphedLoss,
    batch_loss,
    fixed_shape,
    fused_batch_loss,
    packed_step,
    padded_step,
    varlen_available,
)


@dataclass
class Options:
    data: str = field(metadata={"help": "JSON file in the format of commonsense_170k.json."})
    output_dir: str = field(metadata={"help": "Folder for the record."})
    model: Optional[str] = field(
        default=None, metadata={"help": "Hub id, folder or GGUF file of a base model."}
    )
    shape: Optional[str] = field(
        default=None,
        metadata={"help": f"Instead of --model, random weights of a shape: {', '.join(SHAPES)}."},
    )
    method: str = field(default="control+lora", metadata={"help": "Method that is trained."})
    memory: Literal["plain", "fast", "balanced", "lean"] = field(
        default="plain", metadata={"help": "Memory mode of our two ways; the published one is always plain."}
    )
    cuda_graphs: bool = field(
        default=False,
        metadata={"help": "Replay our two ways as CUDA graphs, as finetune.py's --cuda_graphs."},
    )
    attention: Literal["auto", "sdpa"] = field(
        default="auto", metadata={"help": "auto: variable-length flash attention over packs where it runs."}
    )
    steps: int = field(default=30, metadata={"help": "Timed optimizer steps of each way."})
    warmup: int = field(default=5, metadata={"help": "Optimizer steps before the timed ones."})
    batch_size: int = field(default=8, metadata={"help": "Rows per optimizer step."})
    large_batch: int = field(default=64, metadata={"help": "Rows per optimizer step of `large`."})
    micro_batch_size: int = field(default=4, metadata={"help": "Rows per padded micro-batch."})
    token_budget: int = field(default=8192, metadata={"help": "Most tokens in a pack."})
    cutoff: int = field(default=256, metadata={"help": "Longer rows are cut to this many tokens."})
    control_rank: int = field(default=64, metadata={"help": "Rank of the control."})
    lora_rank: int = field(default=32, metadata={"help": "Rank of LoRA and DoRA."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout of LoRA and DoRA."})
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = field(
        default="auto", metadata={"help": "Frozen weights and autocast."}
    )
    device: str = field(default="0", metadata={"help": "GPU index, or cpu."})
    seed: int = field(default=42, metadata={"help": "Seeds row order and random weights."})

    def check(self) -> None:
        """Raise UserError for values that cannot be."""
        if (self.model is None) == (self.shape is None):
            raise UserError("give either --model or --shape")
        if self.shape is not None and self.shape not in SHAPES:
            raise UserError(f"unknown shape {self.shape!r}: choose from {', '.join(SHAPES)}")
        for name in ("steps", "batch_size", "large_batch", "micro_batch_size", "cutoff"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, got {getattr(self, name)}")
        check_numbers(self, "lora_dropout", at_least=0, below=1)


def measure(
    options: Options, folder: RunFolder, device: torch.device, dtype: torch.dtype, command: Sequence[str]
) -> RunRecord:
    """Time all three ways on one model and write the record."""
    created = utc_now()
    seed_everything(options.seed)
    rows = read_rows(options.data)
    order, _ = split_rows(rows, 1, options.seed)
    memory = MemoryMeter(device)
    if options.model is None:
        tokenizer = train_tokenizer(order, min(16384, SHAPES[options.shape]["vocab_size"]))
        base = random_model(options.shape, dtype, device)
    else:
        tokenizer = load_tokenizer(options.model)
        base = load_model(options.model, dtype, device)
    memory.after_load()
    choose_pad_token(tokenizer, base.get_input_embeddings().weight.shape[0])
    total = base.num_parameters()
    targets = MIXED_TARGETS if "control" in options.method else LORA_TARGETS
    config = expected_config(
        options.method,
        options.control_rank,
        1.0,
        0.0,
        options.lora_rank,
        2 * options.lora_rank,
        options.lora_dropout,
        targets,
    )
    model = add_adapter(base, config)

    def steps_of(size: int, make) -> list:
        count = options.steps + options.warmup
        wanted = [order[index % len(order)] for index in range(count * size)]
        tokens = tokenize_rows(wanted, tokenizer, options.cutoff)
        return [make(tokens[start : start + size]) for start in range(0, len(tokens), size)]

    def packed(step):
        packs = packed_step(step, options.micro_batch_size, options.token_budget)
        if not options.cuda_graphs:
            return packs
        quantum = -(-options.token_budget // 16)
        pad = tokenizer.pad_token_id
        return [fixed_shape(pack, quantum, len(step), options.cutoff, pad) for pack in packs]

    def padded(step):
        return padded_step(step, options.micro_batch_size, tokenizer.pad_token_id)

    ways = {
        "published": (options.batch_size, padded, "plain"),
        "packed": (options.batch_size, packed, options.memory),
        "large": (options.large_batch, packed, options.memory),
    }
    results: dict[str, dict] = {}
    for name, (size, make, mode) in ways.items():
        varlen = options.attention == "auto" and make is packed and varlen_available(device, dtype)
        base.set_attn_implementation(VARLEN if varlen else "sdpa")
        ready_to_train(model, mode, half=dtype != torch.float32)
        steps = steps_of(size, make)
        loss = batch_loss if mode == "plain" else fused_batch_loss
        if options.cuda_graphs and make is packed:
            loss = GraphedLoss(loss)
        summary = run_steps(model, steps, loss, device, dtype, warmup=options.warmup, memory=memory).summary()
        results[name] = {
            "real_tokens_per_second": summary["tokens_per_second"],
            "seconds_per_step": summary["train_seconds"] / summary["steps"],
            "rows_per_step": size,
            "forwards_per_step": sum(map(len, steps)) / len(steps),
            "memory_mode": mode,
            "attention": VARLEN if varlen else "sdpa",
        }
        speedup = results[name]["real_tokens_per_second"] / results["published"]["real_tokens_per_second"]
        results[name]["speedup"] = speedup
        print(
            f"{name:10} {summary['tokens_per_second']:10,.0f} real tokens/s   {speedup:5.2f} times published",
            flush=True,
        )

    record = RunRecord(
        domain="llama",
        name=folder.path.name,
        method=options.method,
        task="throughput",
        seed=options.seed,
        command=["python", "-m", "LlaMA.benchmark_throughput", *command],
        created=created,
        finished=utc_now(),
        git=git_state(),
        versions=package_versions(),
        device=describe_device(device),
        model=describe_model(options.model, base, total)
        if options.model
        else {
            "id": f"random {options.shape}",
            "revision": None,
            "class": type(base).__name__,
            "total_parameters": total,
        },
        data={
            "id": public_path(options.data),
            "sha256": fingerprint(options.data),
            "sizes": {"rows": len(rows)},
        },
        adapter={
            "config": model.peft_config["default"].to_dict(),
            "dtype": "float32",
            **count_parameters(model),
        },
        hyperparameters={**asdict(options), "dtype": str(dtype).removeprefix("torch.")},
        metrics={"best": {}, "last": results},
        memory=memory.summary(),
        time={name: result["real_tokens_per_second"] for name, result in results.items()},
    )
    record.write(folder.record)
    return record


def main(argv: Sequence[str] | None = None) -> RunRecord | None:
    """Measure as the command line says; None when the folder holds the finished measurement."""
    command = list(sys.argv[1:] if argv is None else argv)
    (options,) = parse_arguments(Options, argv=command, description=__doc__)
    options.check()
    device = select_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    quieten()
    with RunFolder(options.output_dir) as folder:
        named = {
            name: value and public_path(value)
            for name, value in (("data", options.data), ("model", options.model))
        }
        folder.claim({**asdict(options), **named, "output_dir": folder.path.name})
        if folder.finished:
            print(f"{folder.path} is finished: skipped (delete the folder to run it again)")
            return None
        with explain_out_of_memory(
            device, "a smaller --token_budget, --large_batch or --micro_batch_size, --memory lean"
        ):
            return measure(options, folder, device, dtype, command)


if __name__ == "__main__":
    run_main(main)
