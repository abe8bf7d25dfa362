"""Fine-tune a causal language model on commonsense questions with control, LoRA, DoRA or both, and write a run record.

    python -m LlaMA.finetune --method "control+lora" --data commonsense_170k.json --output_dir OUT
    python -m LlaMA.finetune --method "double control" --model SmolLM2.gguf --data commonsense_51k.json --output_dir OUT
    torchrun --nproc_per_node 4 -m LlaMA.finetune ...        the batch is shared out over the processes
    torchrun --nproc_per_node 4 -m LlaMA.finetune ... --shard fsdp2                  the frozen weights too

Defaults are the paper's recipe for LLaMA-2-7B. What the options trade: rows are packed end to end without padding, with
the gradients of the published micro-batches; `--batching padded` computes on padding too, as published. A larger
`--token_budget` is faster and takes more memory, results stay. `--memory fast|balanced|lean` keeps less of the frozen
blocks for the backward, with exact gradients. See LlaMA/README.md.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, Optional

import control_experiments  # noqa: F401  # isort: skip  (first, see there)
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import TrainingArguments

from control_experiments.errors import UserError, run_main
from control_experiments.paths import public_path
from control_experiments.record import RunRecord, git_state, package_versions, utc_now
from control_experiments.training.arguments import (
    LARGEST_SEED,
    check_max_steps,
    check_numbers,
    parse_arguments,
)
from control_experiments.training.checkpoints import discard, step_of, whole_folder
from control_experiments.training.checksums import local_fingerprint
from control_experiments.training.device import (
    describe_device,
    explain_out_of_memory,
    make_deterministic,
    seed_everything,
    select_device,
)
from control_experiments.training.metering import MemoryMeter
from control_experiments.training.methods import set_memory
from control_experiments.training.quantization import QUANTIZATION_HELP, check_method_runs, check_paging
from control_experiments.training.quiet import quieten
from control_experiments.training.runs import RunFolder
from control_experiments.training.sharding import SHARD_HELP, choose_shard, shard_frozen, shares_weights
from control_experiments.training.trainer import ExperimentTrainer
from LlaMA.commonsense import TokenRow, read_rows, split_rows, tokenize_rows
from LlaMA.models import (
    METHODS,
    add_adapter,
    choose_pad_token,
    count_parameters,
    describe_model,
    expected_config,
    load_model,
    load_tokenizer,
    resolve_dtype,
)
from LlaMA.packing import (
    VARLEN,
    Batch,
    GraphedLoss,
    batch_loss,
    check_packing,
    fixed_shape,
    fused_batch_loss,
    packed_step,
    padded_step,
    varlen_available,
)

logger = logging.getLogger("finetune")
LOGGERS = ("finetune", "control_experiments")
LESS_MEMORY = (
    "--memory lean, a smaller --token_budget or --micro_batch_size, --dtype bf16, a smaller --cutoff"
)

#: LLM-Adapters' targets for the per-weight methods; beside a control the paper adapts the attention alone.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
MIXED_TARGETS = ("q_proj", "k_proj", "v_proj")


@dataclass
class Options:
    method: str = field(metadata={"help": f"What to train: {', '.join(METHODS)}."})
    data: str = field(metadata={"help": "JSON file in the format of commonsense_170k.json."})
    output_dir: str = field(metadata={"help": "Folder for adapter, record, log and checkpoints."})
    model: str = field(
        default="meta-llama/Llama-2-7b-hf",
        metadata={"help": "Hub id, folder or GGUF file of the base model."},
    )
    device: str = field(default="0", metadata={"help": "GPU index, or cpu."})
    shard: Literal["ddp", "fsdp2"] = field(default="ddp", metadata={"help": SHARD_HELP})
    workers: int = field(default=0, metadata={"help": "Processes that make batches; no effect on results."})
    deterministic: bool = field(
        default=False, metadata={"help": "Deterministic GPU kernels alone: the same bits again, slower."}
    )
    seed: int = field(default=42, metadata={"help": "Seeds row order, dropout and the new parameters."})
    epochs: float = field(default=3, metadata={"help": "Passes over the training rows."})
    max_steps: int = field(
        default=-1, metadata={"help": "Stop after so many optimizer steps; -1: by --epochs."}
    )
    lr: float = field(default=2e-4, metadata={"help": "Peak learning rate; linear decay after the warm-up."})
    warmup_steps: int = field(default=100, metadata={"help": "Optimizer steps in which the rate rises."})
    batch_size: int = field(default=8, metadata={"help": "Rows per optimizer step, over all processes."})
    micro_batch_size: int = field(
        default=4,
        metadata={
            "help": "Rows whose loss is averaged over their tokens before rows of a step are averaged."
        },
    )
    cutoff: int = field(default=256, metadata={"help": "Longer rows are cut to this many tokens."})
    batching: Literal["packed", "padded"] = field(
        default="packed",
        metadata={"help": "packed: no padding; padded: micro-batches padded to their longest row."},
    )
    token_budget: Optional[int] = field(
        default=None,
        metadata={"help": "Tokens in one forward; by default --micro_batch_size times --cutoff."},
    )
    attention: Literal["auto", "varlen", "sdpa"] = field(
        default="auto",
        metadata={
            "help": "Attention over packed rows: varlen computes within rows only (GPU, half precision)."
        },
    )
    loss_on: Literal["all", "response"] = field(
        default="all",
        metadata={"help": "Tokens that are learned: prompt and response as published, or the response."},
    )
    held_out: int = field(
        default=120, metadata={"help": "Rows kept out of training that choose the checkpoint."}
    )
    split_seed: int = field(default=42, metadata={"help": "Seeds which rows are held out."})
    eval_steps: int = field(
        default=80, metadata={"help": "Optimizer steps between checkpoints, each evaluated."}
    )
    control_rank: int = field(default=64, metadata={"help": "Rank of the control."})
    control_alpha: float = field(default=1.0, metadata={"help": "Plain multiplier of the control."})
    control_dropout: float = field(default=0.0, metadata={"help": "Dropout inside the control."})
    lora_rank: int = field(default=32, metadata={"help": "Rank of LoRA and DoRA."})
    lora_alpha: float = field(default=64, metadata={"help": "LoRA's updates are scaled by alpha/rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before LoRA's A."})
    lora_targets: Optional[list[str]] = field(
        default=None,
        metadata={
            "help": "Module names for LoRA and DoRA; by default q,k,v, and without a control up,down too."
        },
    )
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = field(
        default="auto", metadata={"help": "The frozen weights and autocast; the adapter is always float32."}
    )
    quantization: Literal["none", "nf4", "fp4", "int8"] = field(
        default="none", metadata={"help": QUANTIZATION_HELP}
    )
    optimizer: Literal["adamw", "paged_adamw_8bit"] = field(
        default="adamw",
        metadata={"help": "paged_adamw_8bit: states in 8 bits, in host memory when the GPU's runs out."},
    )
    memory: Literal["plain", "fast", "balanced", "lean"] = field(
        default="plain",
        metadata={"help": "How much of the frozen blocks is kept for the backward (control methods)."},
    )
    cuda_graphs: bool = field(
        default=False,
        metadata={
            "help": "Replay steps as CUDA graphs, on packs filled up to one of 16 lengths: for small models, whose steps "
            "are bound by kernel launches. One process, packed rows."
        },
    )
    gradient_checkpointing: bool = field(
        default=False,
        metadata={"help": "Recompute every layer in the backward (any method, with --memory plain)."},
    )
    resume: bool = field(
        default=False, metadata={"help": "Go on with an unfinished run, with the same batches."}
    )
    report_to: Literal["none", "wandb", "tensorboard"] = field(
        default="none", metadata={"help": "Live logging."}
    )

    @property
    def targets(self) -> Sequence[str]:
        return self.lora_targets or (MIXED_TARGETS if "control" in self.method else LORA_TARGETS)

    @property
    def budget(self) -> int:
        return self.token_budget or self.micro_batch_size * self.cutoff

    def check(self) -> None:
        """Raise UserError for values that cannot be."""
        sizes = ("batch_size", "micro_batch_size", "cutoff", "token_budget", "eval_steps", "held_out")
        check_numbers(self, *sizes, at_least=1)
        check_numbers(self, "epochs", "lr", above=0)
        check_numbers(self, "workers", "warmup_steps", at_least=0)
        check_numbers(self, "seed", at_least=0, at_most=LARGEST_SEED)
        check_numbers(self, "control_dropout", "lora_dropout", at_least=0, below=1)
        check_numbers(self, "control_alpha", "lora_alpha")
        check_max_steps(self)
        processes = int(os.environ.get("WORLD_SIZE", 1))
        if self.batch_size % (self.micro_batch_size * processes):
            raise UserError(
                f"--batch_size {self.batch_size} must be a multiple of --micro_batch_size {self.micro_batch_size}"
                + (f" times {processes} processes" if processes > 1 else "")
            )
        if self.batching == "packed" and self.budget < self.cutoff:
            raise UserError(f"--token_budget {self.budget} must be at least --cutoff {self.cutoff}")
        if self.memory != "plain" and self.gradient_checkpointing:
            raise UserError("--gradient_checkpointing needs --memory plain: choose one of the two")
        if self.cuda_graphs and self.batching == "padded":
            raise UserError("--cuda_graphs needs packed rows: leave out --batching padded")
        if self.cuda_graphs and self.gradient_checkpointing:
            raise UserError("--cuda_graphs cannot replay --gradient_checkpointing: choose one of the two")
        if self.cuda_graphs and processes > 1:
            raise UserError("--cuda_graphs is for one process: leave it out")
        self.config()

    def config(self):
        """The adapter's peft configuration."""
        return expected_config(
            self.method, self.control_rank, self.control_alpha, self.control_dropout,
            self.lora_rank, self.lora_alpha, self.lora_dropout, self.targets,
        )  # fmt: skip

    def hyperparameters(self) -> dict:
        """Every option that can move the result, as it took effect."""
        elsewhere = (
            "method", "data", "output_dir", "model", "device", "shard", "workers", "seed", "resume", "report_to",
        )  # fmt: skip
        chosen = {name: value for name, value in asdict(self).items() if name not in elsewhere}
        return {
            **chosen,
            "lora_targets": list(self.targets),
            "token_budget": self.budget,
        }


class CommonsenseTrainer(ExperimentTrainer):
    """A Trainer whose batch is a whole optimizer step, worked on in packs (or padded micro-batches).

    Args:
        loss: `batch_loss` or its fused variant.
        held_out: batches whose losses sum to the held-out loss, the mean over all their predicted tokens.
        All others are the ExperimentTrainer's.
    """

    def __init__(self, *args, loss: Callable, held_out: list[Batch], **kwargs):
        super().__init__(*args, **kwargs)
        self.loss, self.held_out = loss, held_out

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        total = torch.zeros((), device=self.args.device)
        batches, share = inputs["batches"], self.loss_share()
        rounds = self.greatest(len(batches)) if self.sharded else len(batches)
        for number, batch in enumerate(batches, start=1):
            # processes may have unequal numbers of packs, so they meet once a step, at the last one
            with nullcontext() if number == len(batches) else self.accelerator.no_sync(model):
                total += self._learn(model, batch, share)
            self.throughput.add(batch.rows, batch.tokens)
        for _ in range(rounds - len(batches)):
            # sharded, they meet in every layer: who has fewer packs keeps the others company with one that weighs nothing
            self._learn(model, min(batches, key=lambda batch: batch.tokens), 0.0)
        self.average_gradients()
        self.losses.add(total, self.state.global_step + 1)
        return total

    def _learn(self, model, batch: Batch, share: float) -> torch.Tensor:
        """Add `share` times the batch's gradients to those of the step; returns its part of the step's loss."""
        with self.compute_loss_context_manager():
            loss = self.loss(model, batch) * share
        self.accelerator.backward(loss)
        return loss.detach()

    def evaluate(self, *_, **__) -> dict:
        self.model.eval()
        with self.throughput.left_out(), torch.no_grad(), self.compute_loss_context_manager():
            loss = float(sum(self.loss(self.model, batch.to(self.args.device)) for batch in self.held_out))
        if not math.isfinite(loss):
            raise UserError(
                f"the held-out loss is NaN or infinite after step {self.state.global_step}; {self.kept()}; try a lower --lr, or "
                "--dtype bf16 instead of fp16"
            )
        metrics = {"eval_loss": loss}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def floating_point_ops(self, inputs) -> int:
        return 0  # the Trainer would guess it from an input that our batches do not have


def collate(rows: Sequence[TokenRow], *, options: Options, pad_token_id: int) -> dict:
    """One optimizer step's rows (of one process) as the batches to work on."""
    if options.batching == "padded":
        return {"batches": padded_step(rows, options.micro_batch_size, pad_token_id)}
    packs = packed_step(rows, options.micro_batch_size, options.budget)
    if options.cuda_graphs:
        # a sixteenth of the budget: at most as many shapes as graphs are kept of
        quantum = -(-options.budget // 16)
        packs = [
            fixed_shape(pack, quantum, options.batch_size, options.cutoff, pad_token_id) for pack in packs
        ]
    return {"batches": packs}


def held_out_batches(rows: Sequence[TokenRow], options: Options, pad_token_id: int) -> list[Batch]:
    """The held-out rows in batches whose losses sum to the mean over all their predicted tokens."""
    if options.batching == "packed":
        return packed_step(rows, len(rows), options.budget)
    batches = padded_step(rows, options.micro_batch_size, pad_token_id)
    tokens = max(1, sum(row.targets for row in rows))
    return [replace(batch, divisor=torch.tensor(float(tokens))) for batch in batches]


def training_arguments(
    options: Options, folder: RunFolder, device: torch.device, dtype: torch.dtype
) -> TrainingArguments:
    """The options in the Trainer's terms; its batch is an optimizer step."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    return TrainingArguments(
        output_dir=str(folder.checkpoints),
        num_train_epochs=options.epochs,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size // processes,
        learning_rate=options.lr,
        warmup_steps=options.warmup_steps,
        weight_decay=0.0,
        optim={"adamw": "adamw_torch"}.get(options.optimizer, options.optimizer),
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        seed=options.seed,
        eval_strategy="steps",
        eval_steps=options.eval_steps,
        save_strategy="steps",
        save_steps=options.eval_steps,
        save_total_limit=3,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_strategy="steps",
        logging_steps=min(10, options.eval_steps),
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=options.report_to,
        run_name=folder.path.name,
        use_cpu=device.type == "cpu",
        dataloader_num_workers=options.workers,
        dataloader_pin_memory=False,
        disable_tqdm=True,  # the ExperimentTrainer has its own bar
        ddp_find_unused_parameters=False,
    )


def prepare_model(
    options: Options, device: torch.device, dtype: torch.dtype, memory: MemoryMeter
) -> tuple[PeftModel, int]:
    """The base with its adapter, ready to train, and the base's number of parameters."""
    varlen = options.batching == "packed" and options.attention != "sdpa" and varlen_available(device, dtype)
    if options.attention == "varlen" and not varlen:
        raise UserError("--attention varlen needs packed rows in half precision on an Ampere or newer GPU")
    shared = shares_weights(options.shard)
    place = torch.device("cpu") if shared else device
    base = load_model(options.model, dtype, place, VARLEN if varlen else "sdpa", options.quantization)
    memory.after_load()
    total = base.num_parameters()
    model = add_adapter(base, options.config())
    ready_to_train(model, options.memory, half=dtype != torch.float32)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if shared:
        shard_frozen(model, device, memory)
    return model, total


def ready_to_train(model: PeftModel, memory: str, *, half: bool) -> None:
    """Set the memory mode, and spare LoRA the float32 copies of its inputs that autocast makes needless.

    DoRA keeps its float32 inputs: it computes its weights' norms in their type.

    Raises:
        UserError: the memory mode does not support this model or method.
    """
    for module in model.modules():
        if half and isinstance(module, LoraLayer) and not any(module.use_dora.values()):
            module.cast_input_dtype_enabled = False
    set_memory(model, memory)


def summarise(log_history: list[dict]) -> tuple[list[dict], dict]:
    """The Trainer's log -> one entry per evaluation (step, epoch, train_loss, eval_loss), and the best and the last."""
    history, train_loss = [], None
    for entry in log_history:
        train_loss = entry.get("loss", train_loss)
        if "eval_loss" in entry:
            history.append(
                {
                    "step": entry["step"],
                    "epoch": entry["epoch"],
                    "train_loss": train_loss,
                    "eval_loss": entry["eval_loss"],
                }
            )
    best = min(history, key=lambda entry: entry["eval_loss"], default={})
    return history, {"best": best, "last": history[-1] if history else {}}


def train(
    options: Options,
    folder: RunFolder,
    device: torch.device,
    dtype: torch.dtype,
    checkpoint: Path | None,
    command: Sequence[str],
) -> RunRecord:
    """Load, train, save the best adapter and write the record, all in `folder`."""
    created = utc_now()
    training, held_out = split_rows(read_rows(options.data), options.held_out, options.split_seed)
    tokenizer = load_tokenizer(options.model)
    seed_everything(options.seed)
    memory = MemoryMeter(device)
    arguments = training_arguments(options, folder, device, dtype)
    # asking for its device starts the process group, if there are several processes
    model, total_parameters = prepare_model(options, arguments.device, dtype, memory)
    choose_pad_token(tokenizer, model.get_input_embeddings().weight.shape[0])

    on_response = options.loss_on == "response"
    training = tokenize_rows(training, tokenizer, options.cutoff, response_only=on_response)
    held_out = tokenize_rows(held_out, tokenizer, options.cutoff, response_only=on_response)
    for name, part in (("training", training), ("held-out", held_out)):
        if part and not any(row.targets for row in part):
            raise UserError(f"no {name} row has a token to learn within --cutoff {options.cutoff}: raise it")
    cut = sum(row.cut for row in [*training, *held_out])
    if options.batching == "packed":
        check_packing(model, held_out)

    loss = batch_loss if options.memory == "plain" else fused_batch_loss
    with folder.logging_from(*LOGGERS):
        trainer = CommonsenseTrainer(
            model=model,
            args=arguments,
            train_dataset=training,
            data_collator=partial(collate, options=options, pad_token_id=tokenizer.pad_token_id),
            eval_dataset=held_out,
            memory=memory,
            unit=options.micro_batch_size,
            loss=GraphedLoss(loss) if options.cuda_graphs else loss,
            held_out=held_out_batches(held_out, options, tokenizer.pad_token_id),
        )
        parameters = count_parameters(model)
        line = (
            f"{options.method} on {public_path(options.model)}: {len(training)} training and {len(held_out)} held-out rows, "
            f"{cut} cut at {options.cutoff} tokens; {parameters['trainable_parameters']:,} of {total_parameters:,} "
            f"parameters trained, {str(dtype).removeprefix('torch.')}"
            f"{'' if options.quantization == 'none' else ' over ' + options.quantization} on {device}"
        )
        logger.info("%s", line)
        if trainer.is_world_process_zero():
            print(line + (f", resumed from {checkpoint.name}" if checkpoint else ""), flush=True)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    history, metrics = summarise(trainer.state.log_history)
    record = RunRecord(
        domain="llama" if options.quantization == "none" else "qcontrol",
        name=folder.path.name,
        method=options.method,
        task="commonsense",
        seed=options.seed,
        command=["python", "-m", "LlaMA.finetune", *command],
        created=created,
        finished=utc_now(),
        git=git_state(),
        versions=package_versions(),
        device=describe_device(device),
        model=describe_model(options.model, model.get_base_model(), total_parameters),
        data={
            "id": public_path(options.data),
            "sha256": local_fingerprint(options.data),
            "sizes": {"train": len(training), "held_out": len(held_out), "cut": cut},
        },
        adapter={"config": model.peft_config["default"].to_dict(), "dtype": "float32", **parameters},
        hyperparameters={
            **options.hyperparameters(),
            **({"shard": options.shard} if shares_weights(options.shard) else {}),
            "dtype": str(dtype).removeprefix("torch."),
            "attention": model.config._attn_implementation,
            "pad_token": tokenizer.pad_token,
        },
        metrics=metrics,
        memory=memory.summary(),
        time={
            **trainer.throughput.summary(),
            "resumed_from_step": step_of(checkpoint) if checkpoint else None,
        },
        history=history,
    )
    if trainer.is_world_process_zero():
        with whole_folder(folder.adapter, sealed=False) as place:
            model.save_pretrained(place)
        record.write(folder.record)
        discard(folder.checkpoints)
        rate = record.time["tokens_per_second"]
        print(
            f"held-out loss {metrics['best'].get('eval_loss', float('nan')):.4f} at step {metrics['best'].get('step')}"
            + (f", {rate:,.0f} tokens/s" if rate else "")
            + f"; record in {folder.record}"
        )
    return record


def main(argv: Sequence[str] | None = None) -> RunRecord | None:
    """Train as the command line says and write the run's record; None when the run was finished before."""
    command = list(sys.argv[1:] if argv is None else argv)
    (options,) = parse_arguments(Options, argv=command, description=__doc__)
    options.check()
    options.shard = choose_shard(options.shard, quantization=options.quantization)
    if options.deterministic:
        make_deterministic()
    device = select_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    check_paging(options.optimizer, device)
    check_method_runs(options.method, options.quantization, device)
    quieten()
    with RunFolder(options.output_dir) as folder, explain_out_of_memory(device, LESS_MEMORY):
        identity = {
            "method": options.method,
            "model": public_path(options.model),
            "model_sha256": local_fingerprint(options.model),
            "data": public_path(options.data),
            "data_sha256": local_fingerprint(options.data),
            "seed": options.seed,
            **options.hyperparameters(),
            "dtype": str(dtype).removeprefix("torch."),
        }
        checkpoint = folder.claim(identity, resume=options.resume)
        if folder.finished:
            print(f"{folder.path} is finished: skipped (delete the folder to run it again)")
            return None
        return train(options, folder, device, dtype, checkpoint, command)


if __name__ == "__main__":
    run_main(main)
