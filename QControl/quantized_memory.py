"""Measure memory and time per step of the methods over 16-bit and quantized bases with random weights of a known shape.

    python -m QControl.quantized_memory --shape roberta-base              the encoder's: batches 64 and 256 of 128 tokens
    python -m QControl.quantized_memory --shape llama3-8b                 LLaMA's: 1 row of 256 and of 2048 tokens
    python -m QControl.quantized_memory --shape tiny-roberta --device cpu --steps 2 --output_dir OUT     to try it out: 4 cells

Every cell runs in a process of its own and leaves one record under results/qcontrol/memory; finished cells are skipped.
`fp32` is what RoBERTa/finetune.py keeps without --quantization; every cell computes under --dtype autocast.
"""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, Optional

import control_experiments  # noqa: F401  # isort: skip  (first, see there)
import torch
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedModel, RobertaConfig, RobertaForSequenceClassification

from control_experiments.errors import UserError, run_main
from control_experiments.paths import RESULTS
from control_experiments.record import RunRecord, git_state, package_versions, read_record, utc_now
from control_experiments.training.arguments import parse_arguments
from control_experiments.training.device import (
    describe_device,
    explain_out_of_memory,
    seed_everything,
    select_device,
)
from control_experiments.training.metering import MemoryMeter
from control_experiments.training.methods import adapter_config, set_memory
from control_experiments.training.options import AdapterOptions
from control_experiments.training.quantization import QUANTIZATIONS, loading_arguments, prepare
from control_experiments.training.quiet import quieten
from control_experiments.training.runs import RunFolder
from LlaMA.measuring import run_steps
from LlaMA.models import SHAPES as LLAMA_SHAPES
from LlaMA.models import random_model, ready_to_train, resolve_dtype
from LlaMA.packing import Batch, batch_loss, fused_batch_loss

ENCODER_SHAPES: dict[str, dict] = {
    "roberta-base": {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1},
    "tiny-roberta": {
        "vocab_size": 101, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 140,
    },
}  # fmt: skip
WEIGHTS = ("fp32", "16bit", *QUANTIZATIONS[1:])
MODES = ("plain", "fast", "balanced", "lean", "checkpointing")


@dataclass(frozen=True)
class Cell:
    """One measurement."""

    method: str
    weights: str
    mode: str
    batch: int
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.method.replace(' ', '-')}_{self.weights}_{self.mode}_{self.batch}x{self.tokens}"


@dataclass
class Options:
    shape: str = field(
        default="roberta-base",
        metadata={"help": f"Model shape: {', '.join((*ENCODER_SHAPES, *LLAMA_SHAPES))}."},
    )
    methods: Optional[list[str]] = field(
        default=None, metadata={"help": "Methods; by default those of the shape's table."}
    )
    weights: Optional[list[str]] = field(
        default=None, metadata={"help": f"How the frozen weights are stored: {', '.join(WEIGHTS)}."}
    )
    modes: Optional[list[str]] = field(
        default=None,
        metadata={
            "help": f"Of {', '.join(MODES)}; checkpointing is gradient checkpointing. A pair that cannot be is left out."
        },
    )
    batches: Optional[list[int]] = field(default=None, metadata={"help": "Rows per step."})
    tokens: Optional[list[int]] = field(default=None, metadata={"help": "Tokens of every row."})
    control_rank: Optional[int] = field(default=None, metadata={"help": "Rank of the control."})
    lora_rank: Optional[int] = field(default=None, metadata={"help": "Rank of LoRA and DoRA."})
    steps: int = field(default=20, metadata={"help": "Timed optimizer steps."})
    warmup: int = field(default=3, metadata={"help": "Optimizer steps before the timed ones."})
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = field(
        default="auto", metadata={"help": "Autocast, compute type and what 16bit means."}
    )
    device: str = field(default="0", metadata={"help": "GPU index, or cpu."})
    seed: int = field(default=42, metadata={"help": "Seeds weights and tokens."})
    output_dir: str = field(
        default=str(RESULTS / "qcontrol" / "memory"), metadata={"help": "Folder of the records."}
    )
    worker: bool = field(
        default=False, metadata={"help": "Used by the script itself: measure one cell in this process."}
    )

    @property
    def encoder(self) -> bool:
        return self.shape in ENCODER_SHAPES

    @property
    def tiny(self) -> bool:
        """Whether the shape is there to try the script out, so that its table is small too."""
        return self.shape.startswith("tiny")

    def with_defaults(self) -> Options:
        """The same with every option that was left out as the shape's table has it.

        Raises:
            UserError: a value that cannot be.
        """
        if self.shape not in (*ENCODER_SHAPES, *LLAMA_SHAPES):
            raise UserError(
                f"unknown shape {self.shape!r}: choose from {', '.join((*ENCODER_SHAPES, *LLAMA_SHAPES))}"
            )
        table = {
            "methods": ["control", "lora", "dora"] if self.encoder else ["double control", "lora"],
            "weights": ["fp32", "16bit", "nf4", "int8"] if self.encoder else ["nf4"],
            "modes": ["plain"] if self.encoder else ["plain", "lean", "checkpointing"],
            "batches": [64, 256] if self.encoder else [1],
            "tokens": [128] if self.encoder else [256, 2048],
            "control_rank": 16 if self.encoder else 64,
            "lora_rank": 8 if self.encoder else 32,
        }
        if self.tiny:
            small = {"methods": ["control", "lora"], "weights": ["fp32", "nf4"]} if self.encoder else {}
            table |= {**small, "batches": [2], "tokens": [16]}
        given = asdict(self)
        options = Options(**{**given, **{key: table[key] for key in table if given[key] is None}})
        for name, known in (("weights", WEIGHTS), ("modes", MODES)):
            if unknown := [value for value in getattr(options, name) if value not in known]:
                raise UserError(f"unknown --{name} {unknown[0]!r}: choose from {', '.join(known)}")
        for name in ("steps", "control_rank", "lora_rank"):
            if getattr(options, name) < 1:
                raise UserError(f"--{name} must be at least 1, got {getattr(options, name)}")
        for name in ("batches", "tokens"):
            if min(getattr(options, name)) < 1:
                raise UserError(f"--{name} must be at least 1, got {min(getattr(options, name))}")
        for method in options.methods:
            options.config(method)
        return options

    def cells(self) -> Iterator[Cell]:
        """The table's cells; memory modes are the control's, checkpointing is there to compare LoRA with them."""
        for batch in self.batches:
            for tokens in self.tokens:
                for method in self.methods:
                    for weights in self.weights:
                        for mode in self.modes:
                            if mode == "plain" or ("control" in method) == (mode != "checkpointing"):
                                yield Cell(method, weights, mode, batch, tokens)

    def config(self, method: str):
        """The adapter of a method: the recipes' targets."""
        targets = ("query", "value") if self.encoder else ("q_proj", "k_proj", "v_proj")
        options = AdapterOptions(
            method=method, control_rank=self.control_rank, lora_rank=self.lora_rank, lora_alpha=2 * self.lora_rank
        )
        return adapter_config(
            options, task_type="SEQ_CLS" if self.encoder else "CAUSAL_LM", targets=targets
        )


def random_base(options: Options, weights: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A model of the shape with random weights, stored as asked."""
    stored = torch.float32 if weights == "fp32" or (options.encoder and weights != "16bit") else dtype
    if options.encoder:
        with torch.device(device):
            config = RobertaConfig(**ENCODER_SHAPES[options.shape], pad_token_id=1)
            base = RobertaForSequenceClassification(config).to(stored)
    else:
        base = random_model(options.shape, stored, device)
    if weights in QUANTIZATIONS:
        quantize_in_place(base, weights, dtype, device)
    return prepare(base)


def quantize_in_place(
    model: PreTrainedModel, quantization: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Quantize the linear layers of every transformer layer, as `from_pretrained` would a stored model's."""
    settings = loading_arguments(quantization, device, dtype)["quantization_config"]
    from bitsandbytes import nn as quantized

    layers = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for parent in {inner for stack in layers for layer in stack for inner in layer.modules()}:
        for name, linear in list(parent.named_children()):
            if type(linear) is not nn.Linear:
                continue
            sizes = (linear.in_features, linear.out_features, linear.bias is not None)
            if quantization == "int8":
                new = quantized.Linear8bitLt(
                    *sizes, has_fp16_weights=False, threshold=settings.llm_int8_threshold, device="meta"
                )
                new.weight = quantized.Int8Params(linear.weight.data.cpu(), requires_grad=False).to(device)
            else:
                new = quantized.Linear4bit(
                    *sizes,
                    compute_dtype=dtype,
                    compress_statistics=True,
                    quant_type=quantization,
                    device="meta",
                )
                new.weight = quantized.Params4bit(
                    linear.weight.data,
                    requires_grad=False,
                    quant_type=quantization,
                    compress_statistics=True,
                    module=new,
                ).to(device)
            new.bias = linear.bias
            setattr(parent, name, new)
    model.config.quantization_config = settings
    model.is_loaded_in_4bit = quantization != "int8"  # for num_parameters: two weights lie in one byte


def make_trainable(base: PreTrainedModel, options: Options, cell: Cell, dtype: torch.dtype):
    """The base with its adapter (float32) in the cell's memory mode."""
    model = get_peft_model(base, options.config(cell.method))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # the classifier too
    if cell.mode == "checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    mode = "plain" if cell.mode == "checkpointing" else cell.mode
    if options.encoder:
        set_memory(model, mode)
    else:
        ready_to_train(model, mode, half=dtype != torch.float32)
    return model


def random_batch(options: Options, cell: Cell, vocabulary: int) -> Batch:
    """Rows of real tokens only."""
    ids = torch.randint(3, vocabulary, (cell.batch, cell.tokens))
    labels = torch.randint(2, (cell.batch,)) if options.encoder else ids
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Batch.uniform(inputs, labels, ids.numel(), cell.batch, ids.numel())


def classifier_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    return model(**batch.inputs, labels=batch.labels).loss


def measure(
    options: Options, cell: Cell, folder: RunFolder, device: torch.device, dtype: torch.dtype,
    command: Sequence[str],
) -> RunRecord:  # fmt: skip
    """One cell in its folder."""
    created = utc_now()
    seed_everything(options.seed)
    memory = MemoryMeter(device)
    base = random_base(options, cell.weights, dtype, device)
    gc.collect()
    if device.type == "cuda":  # what making the weights took for a moment is no part of training
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    memory.after_load()
    total = base.num_parameters()
    model = make_trainable(base, options, cell, dtype)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    head = sum(count for name, count in trained.items() if "modules_to_save" in name)
    loss = classifier_loss if options.encoder else batch_loss if cell.mode == "plain" else fused_batch_loss
    steps = [[random_batch(options, cell, base.config.vocab_size)]] * (options.warmup + options.steps)
    time = run_steps(model, steps, loss, device, dtype, warmup=options.warmup, memory=memory).summary()
    record = RunRecord(
        domain="qcontrol",
        name=folder.path.name,
        method=cell.method,
        task="memory benchmark",
        seed=options.seed,
        command=["python", "-m", "QControl.quantized_memory", *command],
        created=created,
        finished=utc_now(),
        git=git_state(),
        versions=package_versions(),
        device=describe_device(device),
        model={
            "id": f"random {options.shape}",
            "revision": None,
            "class": type(base).__name__,
            "quantization": cell.weights if cell.weights in QUANTIZATIONS else "none",
            "total_parameters": total,
        },
        data={
            "id": "random tokens",
            "revision": None,
            "sizes": {"rows": cell.batch, "tokens": cell.batch * cell.tokens},
        },
        adapter={
            "config": model.peft_config["default"].to_dict(),
            "dtype": "float32",
            "trainable_parameters": sum(trained.values()),
            "adapter_parameters": sum(trained.values()) - head,
            "head_parameters": head,
        },
        hyperparameters={
            **asdict(cell),
            "shape": options.shape,
            "control_rank": options.control_rank,
            "lora_rank": options.lora_rank,
            "steps": options.steps,
            "warmup": options.warmup,
            "dtype": str(dtype).removeprefix("torch."),
            "optimizer": "AdamW",
        },
        metrics={"best": {}, "last": {"seconds_per_step": time["train_seconds"] / time["steps"]}},
        memory=memory.summary(),
        time=time,
    )
    record.write(folder.record)
    return record


def line(record: RunRecord) -> str:
    """One cell for the terminal; memory in MiB."""
    parts = ("weights_bytes", "adapter_and_optimizer_bytes", "activations_bytes", "peak_allocated_bytes")
    if record.memory["kind"] == "resident set":
        shown = f"{record.memory['peak_resident_bytes'] / 2**20:9,.0f} MiB resident"
    else:
        named = zip(("weights", "adapter+optimizer", "activations", "peak"), parts, strict=True)
        shown = "  ".join(f"{name} {record.memory[part] / 2**20:9,.0f}" for name, part in named) + " MiB"
        shown += f"  reserved {record.memory['peak_reserved_bytes'] / 2**20:9,.0f}"
    return f"{record.name:44} {shown}  {1e3 * record.metrics['last']['seconds_per_step']:9.1f} ms/step"


@contextmanager
def claimed(options: Options, cell: Cell) -> Iterator[RunFolder]:
    """The cell's folder; raises UserError if it holds another measurement, or is in use."""
    ranks = {"control_rank": options.control_rank, "lora_rank": options.lora_rank}
    with RunFolder(Path(options.output_dir) / f"{options.shape}_{cell.name}") as folder:
        folder.claim({**asdict(cell), **ranks, "shape": options.shape, "seed": options.seed})
        yield folder


def measure_here(options: Options, cell: Cell, command: Sequence[str]) -> RunRecord:
    """Measure one cell in this process."""
    device = select_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    quieten()
    with (
        claimed(options, cell) as folder,
        explain_out_of_memory(device, "--modes lean, smaller --batches or --tokens"),
    ):
        return measure(options, cell, folder, device, dtype, command)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every cell of the table, each in a fresh process; cells that fail are named at the end."""
    command = list(sys.argv[1:] if argv is None else argv)
    (options,) = parse_arguments(Options, argv=command, description=__doc__)
    options = options.with_defaults()
    cells = list(options.cells())
    if not cells:
        raise UserError("no such cell: memory modes are for control methods, checkpointing for the others")
    if options.worker:
        print(line(measure_here(options, cells[0], command)), flush=True)
        return
    select_device(options.device)
    failed = []
    for cell in cells:
        try:
            with claimed(options, cell) as folder:
                record = read_record(folder.record) if folder.finished else None
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            failed.append(cell.name)
            continue
        if record:
            print(line(record), flush=True)
            continue
        chosen = {
            "methods": cell.method, "weights": cell.weights, "modes": cell.mode, "batches": cell.batch,
            "tokens": cell.tokens,
        }  # fmt: skip
        shared = (
            "shape",
            "control_rank",
            "lora_rank",
            "steps",
            "warmup",
            "dtype",
            "device",
            "seed",
            "output_dir",
        )
        arguments = {name: getattr(options, name) for name in shared} | chosen
        flags = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
        if subprocess.run([sys.executable, "-m", "QControl.quantized_memory", *flags, "--worker"]).returncode:
            failed.append(cell.name)
    if failed:
        raise UserError(f"not measured: {', '.join(failed)} (reasons above)")


if __name__ == "__main__":
    run_main(main)
