"""A training run of finetune.py, from its options to its record."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from peft import PeftModel

from control_experiments.errors import UserError
from control_experiments.paths import public_path
from control_experiments.training.checksums import local_fingerprint
from control_experiments.training.device import DTYPES, seed_everything
from control_experiments.training.metering import MemoryMeter
from control_experiments.training.methods import adapter_config, count_unquantized, describe_adapter, describe_model
from control_experiments.training.quantization import check_paging
from control_experiments.training.setup import Run, start
from control_experiments.training.sharding import shard_frozen, shares_weights
from control_experiments.training.trainer import ExperimentTrainer, training_arguments
from LlaMA import packing
from LlaMA.commonsense import Row, TokenRow, split_rows
from LlaMA.demo import place_of_model
from LlaMA.finetune import Options
from LlaMA.models import add_adapter, choose_pad_token, load_model, load_tokenizer, ready_to_train
from LlaMA.packing import Batch
from LlaMA.texts import read_data, tokenize_data
from peft_control.memory import streaming

logger = logging.getLogger("finetune")
LESS_MEMORY = (
    "--memory lean, --stream_weights True, a smaller --token_budget or --micro_batch_size, --dtype bf16, a smaller --cutoff"
)

#: How the adapter's card says that it is loaded.
LOAD = """
import peft_control
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

folder = "OUT/adapter"  # where this file is
model = AutoPeftModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
"""


def run(options: Options, argv: Sequence[str] | None = None) -> None:
    """Train, unless the run is finished; `argv` stands in the record's command, by default the process's own."""
    options.model = place_of_model(options.model)
    types = {name: str(dtype).removeprefix("torch.") for name, dtype in DTYPES.items()}
    with start(options, "LlaMA.finetune", argv, less_memory=LESS_MEMORY, option="dtype", written=types) as begun:
        if begun.folder.finished:
            print(f"{begun.folder.path} is finished: skipped (delete the folder to run it again)")
        else:
            train(options, begun)


def train(options: Options, run: Run) -> None:
    """Load, train, save the adapter and write the record, all in the run's folder."""
    folder, dtype = run.folder, DTYPES[run.precision]
    check_paging(options.optimizer, run.device)
    how = (options.model, options.cutoff, options.loss_on == "response")
    training, questions = tokenized(options.contents("data"), local_fingerprint(options.contents("data")), *how)
    if options.validation:
        held_out, _ = tokenized(Path(options.validation), local_fingerprint(options.validation), *how)
    else:
        training, held_out = split_rows(training, options.held_out, options.split_seed)
    for name, part in (("training", training), ("held-out", held_out)):
        if not any(row.targets for row in part):
            raise UserError(f"no {name} row has a token to learn within --cutoff {options.cutoff}: raise it")
    cut = sum(row.cut for row in [*training, *held_out])
    record = run.begin_record(
        domain="llama" if options.quantization == "none" else "qcontrol",
        task="commonsense" if questions else "texts",
        dtype=str(dtype).removeprefix("torch."),
    )
    if options.model.endswith(".gguf") and os.environ.get("RANK", "0") == "0":
        first = f"first make a folder of it (python -m LlaMA.convert --model {options.model} --output_dir FOLDER)"
        told = f"other tools cannot load {options.model} as the adapter's base: to serve the adapter, {first}"
        print(f"note: {told} and train over that", file=sys.stderr)
    tokenizer = load_tokenizer(options.model)
    seed_everything(options.seed)
    memory = MemoryMeter(run.device)
    arguments = training_arguments(
        run,
        optim={"adamw": "adamw_torch"}.get(options.optimizer, options.optimizer),
        warmup_steps=options.warmup_steps,
        eval_strategy="steps", save_strategy="steps", save_steps=options.eval_steps, save_total_limit=3,
        eval_steps=options.eval_steps, logging_strategy="steps", logging_steps=min(10, options.eval_steps),
        load_best_model_at_end=options.save == "best", metric_for_best_model="eval_loss", greater_is_better=False,
        eval_on_start=not (questions or run.checkpoint),
        remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip
    # asking for its device starts the process group, if there are several processes
    model, total_parameters = prepare_model(options, arguments.device, dtype, memory)
    choose_pad_token(tokenizer, model.get_input_embeddings().weight.shape[0])
    check_positions(model, max(len(row.ids) for row in [*training, *held_out]), options)
    if options.batching == "packed":
        packing.check_packing(model, held_out)
    loss = packing.batch_loss if options.memory == "plain" else packing.fused_batch_loss
    if options.method == "shadow":
        loss = packing.shadow_batch_loss
    pad = tokenizer.pad_token_id
    with folder.logging_from("finetune", "control_experiments", "peft_control"):
        trainer = CommonsenseTrainer(
            model,
            arguments,
            train_dataset=training,
            eval_dataset=held_out,
            memory=memory,
            unit=options.micro_batch_size,
            data_collator=partial(collate, options=options, pad_token_id=pad),
            loss=packing.GraphedLoss(loss) if options.cuda_graphs else loss,
            held_out=held_out_batches(held_out, options, pad),
        )
        adapter = describe_adapter(model)
        counts = f"{adapter['trainable_parameters']:,} of {total_parameters:,} parameters trained"
        counted = f"{len(training)} training and {len(held_out)} held-out rows, {cut} cut at {options.cutoff} tokens"
        line = f"{options.method} on {public_path(options.model)}: {counted}; {counts}, {run.described}"
        said = [line, *filter(None, [streaming.describe(model)])]
        for told in said:
            logger.info("%s", told)
        if trainer.is_world_process_zero():
            print(*said, sep="\n", flush=True)
        trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)

    history, metrics = summarise(trainer.state.log_history)
    if not trainer.is_world_process_zero():
        return
    saved = metrics[options.save]
    record.hyperparameters |= {
        **({"shard": options.shard} if shares_weights(options.shard) else {}),
        **({"stream_weights": True} if options.stream_weights else {}),
        "attention": model.config._attn_implementation,
        "pad_token": tokenizer.pad_token,
    }

    data = {"id": public_path(options.data), "sha256": local_fingerprint(options.contents("data"))}
    data["sizes"] = {"train": len(training), "held_out": len(held_out), "cut": cut}
    if options.validation:
        data["validation_sha256"] = local_fingerprint(options.validation)

    def save(place: Path) -> None:
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)

    run.finish(
        record,
        save,
        LOAD,
        model=describe_model(options.model, model.get_base_model(), total_parameters),
        data=data,
        adapter={**adapter, "step": saved.get("step")},
        metrics=metrics,
        memory=memory.summary(),
        time=run.time(trainer.throughput),
        history=history,
    )
    rate = record.time["tokens_per_second"]
    speed = f", {rate:,.0f} tokens/s" if rate else ""
    loss = f"{metrics['before']['eval_loss']:.4f} before, " if "before" in metrics else ""
    loss += f"{saved.get('eval_loss', math.nan):.4f} at step {saved.get('step')}"
    print(f"held-out loss {loss}{speed}; record in {folder.record}")


@lru_cache(maxsize=4)  # the runs of a study read and tokenize their data once
def tokenized(place: Path, _checksum: str, model: str, cutoff: int, response_only: bool) -> tuple[list[TokenRow], bool]:
    """The rows of a file or a folder, and whether all are commonsense questions."""
    data = read_data(place)
    questions = all(isinstance(row, Row) and row.answer for row in data)
    return tokenize_data(data, load_tokenizer(model), cutoff, response_only=response_only), questions


def prepare_model(options: Options, device: torch.device, dtype: torch.dtype, memory: MemoryMeter) -> tuple[PeftModel, int]:
    """The base with its adapter, ready to train, and the base's number of parameters."""
    packed = options.batching == "packed" and options.attention != "sdpa"
    # SHADOW's own backbone is not told where rows end but by their positions
    varlen = packed and options.method != "shadow" and packing.varlen_available(device, dtype)
    if options.attention == "varlen" and not varlen:
        raise UserError("--attention varlen needs packed rows in half precision on an Ampere or newer GPU")
    shared = shares_weights(options.shard)
    place = torch.device("cpu") if shared else device
    attention = packing.VARLEN if varlen else "sdpa"
    base = load_model(options.model, dtype, place, attention, options.quantization, on_host=options.stream_weights)
    memory.after_load()
    total = count_unquantized(base)
    model = add_adapter(base, adapter_config(options, task_type="CAUSAL_LM", targets=options.targets))
    how = {"half": dtype != torch.float32, "chunk_tokens": options.chunk_tokens, "offload": options.offload}
    ready_to_train(model, options.memory, stream_to=device if options.stream_weights else None, **how)
    if options.stream_weights:
        memory.after_load()
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if shared:
        shard_frozen(model, device, memory)
    return model, total


def check_positions(model: PeftModel, tokens: int, options: Options) -> None:
    """Say so if a row has more tokens than the model's positions; positions are scaled as its configuration says, and not
    changed. Raises UserError: its positions are a table that ends there."""
    config = model.get_base_model().config.get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    if most is None or tokens <= most:
        return
    told = f"rows have up to {tokens} tokens, {public_path(options.model)} was made for {most} (max_position_embeddings)"
    if getattr(config, "rope_parameters", None) is None:
        raise UserError(f"{told} and has no more positions: choose --cutoff {most} or less")
    if os.environ.get("RANK", "0") == "0":
        kind = config.rope_parameters.get("rope_type", "default")
        print(f"note: {told}; its positions stay as its config.json scales them ({kind})", file=sys.stderr)


def collate(rows: Sequence[TokenRow], *, options: Options, pad_token_id: int) -> dict:
    """One optimizer step's rows (of one process) as the batches to work on."""
    if options.batching == "padded":
        return {"batches": packing.padded_step(rows, options.micro_batch_size, pad_token_id)}
    packs = packing.packed_step(rows, options.micro_batch_size, options.budget)
    if options.cuda_graphs:
        # a sixteenth of the budget: at most as many shapes as graphs are kept of
        shape = (-(-options.budget // 16), options.batch_size, options.cutoff, pad_token_id)
        packs = [packing.fixed_shape(pack, *shape) for pack in packs]
    return {"batches": packs}


def held_out_batches(rows: Sequence[TokenRow], options: Options, pad_token_id: int) -> list[Batch]:
    """The held-out rows in batches whose losses sum to the mean over all their predicted tokens."""
    if options.batching == "packed":
        return packing.packed_step(rows, len(rows), options.budget)
    batches = packing.padded_step(rows, options.micro_batch_size, pad_token_id)
    divisor = torch.tensor(float(sum(row.targets for row in rows)))
    return [replace(batch, divisor=divisor) for batch in batches]


class CommonsenseTrainer(ExperimentTrainer):
    """A Trainer whose batch is a whole optimizer step, worked on in packs (or padded micro-batches).
    The losses of the `held_out` batches sum to the held-out loss, the mean over all their predicted tokens.
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


def summarise(log_history: list[dict]) -> tuple[list[dict], dict]:
    """The Trainer's log -> one entry per evaluation (step, epoch, train_loss, eval_loss), and the best and the last, and the one
    before the first step if there is one."""
    history, train_loss = [], None
    for entry in log_history:
        train_loss = entry.get("loss", train_loss)
        if "eval_loss" in entry:
            seen = {name: entry.get(name, 0) for name in ("step", "epoch", "eval_loss")}
            history.append({**seen, "train_loss": train_loss})
    before = {"before": history[0]} if history and history[0]["step"] == 0 else {}
    trained = history[len(before) :]
    best = min(trained, key=lambda entry: entry["eval_loss"], default={})
    return history, {**before, "best": best, "last": trained[-1] if trained else {}}
