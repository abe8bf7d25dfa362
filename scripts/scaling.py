"""The work of bench_scaling.py: what each process of a run does, and the process that starts the runs."""

from __future__ import annotations

import itertools
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from operator import itemgetter
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from control_experiments.errors import Interrupted
from control_experiments.record import write_json_atomic
from control_experiments.training.benchmarking import EXPANDABLE, Campaign, limit_memory, machine
from control_experiments.training.sharding import average_gradients, split_into_units
from scripts.bench_scaling import Options
from scripts.catalogue import LLAMA_SHAPES, LONGEST, parse_method
from scripts.workloads import adapt, random_llama

# -- in each process ------------------------------------------------------------------------------------------------


class SentBytes(TorchDispatchMode):
    """Counts the bytes of this process's tensors that collective operations take in."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            name = function.overloadpacket.__name__
            # gather and scatter have (output, input); the reductions work in place
            given = args[1] if "gather" in name or "scatter" in name else args[0]
            self.bytes += sum(t.nbytes for t in tree_leaves(given) if isinstance(t, torch.Tensor))
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Draw every parameter from a seed of its own, so that it is the same whatever part of it is here."""
    for number, (name, parameter) in enumerate(model.named_parameters()):
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        if name.endswith("norm.weight"):
            whole.fill_(1)
        elif "control_B" in name or "lora_B" in name:
            whole.zero_()
        else:  # with the deviation that these models start with
            whole.normal_(std=0.02, generator=torch.Generator(whole.device).manual_seed(number))
        if isinstance(parameter, DTensor):
            whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(whole)


def build(options: Options, method: str, shard: str, device: torch.device) -> nn.Module:
    """The adapted model, sharded or not, with the same weights in every run."""
    # untied, because to_empty would part the output layer from the embeddings, sharded or not
    model = random_llama(options.shape, "meta", tie_word_embeddings=False)
    model = adapt(model, options.shape, parse_method(method))
    if shard == "fsdp2":
        split_into_units(model, options.device)
    model.to_empty(device=device)
    fill(model)
    for module in model.modules():
        if hasattr(module, "inv_freq"):  # a buffer that to_empty emptied too
            with torch.device(device):
                module.inv_freq = type(module)(model.get_base_model().config).inv_freq
    return model


@record
def work(options: Options, method: str, shard: str, accumulate: int, result: Path) -> None:
    """Train in this process as part of the run, in so many micro-batches a step; process 0 writes the result."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cuda = options.device == "cuda"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    accelerator = Accelerator(cpu=not cuda)  # starts the process group
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", **({"device_id": device} if cuda else {}))
    model = build(options, method, shard, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if shard == "ddp" and world > 1:
        model = accelerator.prepare_model(model)
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    vocabulary, losses, seconds = LLAMA_SHAPES[options.shape]["vocab_size"], [], []
    sent = SentBytes()

    def step(number: int, tokens: int) -> float:
        total = torch.zeros((), device=device)
        for part in range(accumulate):
            generator = torch.Generator(device).manual_seed(1000 * number + rank * accumulate + part)
            ids = torch.randint(3, vocabulary, (options.batch, tokens), generator=generator, device=device)
            with torch.autocast(device.type, torch.bfloat16):  # as bench_memory.py
                loss = model(input_ids=ids, labels=ids).loss / accumulate
            loss.backward()
            total += loss.detach()
        if shard == "fsdp2":
            average_gradients(trained)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total)
        return total.item() / world

    if options.longest:
        if options.limit:
            limit_memory(options.limit)
        longest(options.tokens, step, result if rank == 0 else None)
        return dist.destroy_process_group()
    for number in range(options.warmup + options.steps):
        if number == options.warmup and cuda:
            torch.cuda.reset_peak_memory_stats()
        dist.barrier()
        start = time.perf_counter()
        losses.append(step(number, options.tokens))  # reading the loss waits for the device
        if number >= options.warmup:
            seconds.append(time.perf_counter() - start)
    with sent:
        losses.append(step(len(losses), options.tokens))
    peak = torch.tensor(torch.cuda.max_memory_allocated() if cuda else 0, device=device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    median = statistics.median(seconds)
    if rank == 0:
        write_json_atomic(result, {
            "step_seconds": median,
            "tokens_per_second": world * accumulate * options.batch * options.tokens / median,
            "peak_bytes_per_process": peak.item(), "sent_bytes_per_process": sent.bytes, "losses": losses,
        })  # fmt: skip
    dist.destroy_process_group()


def longest(tokens: int, step: Callable, result: Path | None) -> None:
    """Train on sequences of so many tokens, then 3/2, 2, 3, 4, 6, ... times as many, and say and write down which went through.

    Ends with the error of the first that does not fit: torch then stops the processes that still wait for this one.
    """
    doublings = itertools.count()
    lengths = (tokens * part << doubling >> 1 for doubling in doublings for part in (2, 3))
    for length in itertools.takewhile(lambda length: length <= LONGEST, lengths):
        started = time.time()
        step(0, length)
        if result:
            write_json_atomic(result, {"longest_tokens": length})
            print(f"    {length} tokens, {time.time() - started:.0f} s", flush=True)


# -- in the process that starts them --------------------------------------------------------------------------------


def run_cell(options: Options, method: str, shard: str, processes: int, accumulate: int = 1) -> dict:
    cell = {"method": method, "shard": shard, "processes": processes, "accumulate": accumulate}
    with tempfile.TemporaryDirectory() as folder:
        result, why = Path(folder, "result.json"), "no result"
        logs = DefaultLogsSpecs(folder, redirects=Std.ERR if options.longest else Std.ALL)
        how = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": Path(folder).name, "max_restarts": 0}
        try:
            elastic_launch(LaunchConfig(1, 1, processes, logs, **how), work)(options, method, shard, accumulate, result)
        except ChildFailedError as error:
            said = error.get_first_failure()[1].message
            why = (said["message"] if isinstance(said, dict) else said)[:300]
        except SignalException as stop:
            raise Interrupted(stop.sigval) from stop
        found = json.loads(result.read_text()) if result.is_file() else {"error": why}
        if options.longest and "error" not in found and why != "no result":
            found["ended_by"] = why
        return {**cell, **found}


def line(cell: dict, results: list[dict]) -> str:
    text = f"{cell['method']:24s} {cell['shard']:5s} {cell['processes']} x"
    if "error" in cell:
        return f"{text} failed: {cell['error']}"
    if "longest_tokens" in cell:
        return f"{text} {cell['longest_tokens']:8d} tokens, then {cell.get('ended_by', 'no attempt')}"
    alone = {(one["method"], one["shard"]): one.get("step_seconds") for one in results if one["processes"] == 1}
    single = alone.get((cell["method"], cell["shard"])) if cell["processes"] > 1 else None
    efficiency = f"  efficiency {single / cell['step_seconds']:.1%}" if single else ""
    apart = f"  losses apart {cell['loss_distance']:.1e}" if "loss_distance" in cell else ""
    return (
        f"{text} {cell['tokens_per_second']:9.0f} tokens/s  {cell['peak_bytes_per_process'] / 1e9:6.2f} GB each  "
        f"{cell['sent_bytes_per_process'] / 1e6:9.1f} MB sent each{efficiency}{apart}"
    )


def run(options: Options) -> None:
    """Measure every cell that the options ask for; write the record."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does
    if options.longest:
        os.environ.update(EXPANDABLE)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # a cell says itself why it failed
    found = machine(options.device)
    name = f"{options.shape}_{options.batch}x{options.tokens}" + ("_longest" if options.longest else "")
    name += f"_limit{options.limit:g}" if options.limit else ""
    print(f"{options.shape}, {options.batch} x {options.tokens} tokens per process, {found['device']}", flush=True)
    campaign = Campaign(
        Path(options.output) / f"{name}.json", options, itemgetter("method", "shard", "processes"), found,
        devices=options.processors(), weights="random",
    )  # fmt: skip

    @cache
    def reference(method: str, processes: int) -> list[float]:
        """The losses of one process that does the work of all."""
        return run_cell(replace(options, warmup=0), method, "ddp", 1, accumulate=processes).get("losses", [])

    def measure(keys: list[tuple[str, str, int]]) -> Iterator[dict]:
        for method, shard, processes in keys:
            cell = run_cell(options, method, shard, processes)
            if processes > 1 and "losses" in cell and (losses := reference(method, processes)):
                apart = [abs(ours - theirs) / abs(theirs) for ours, theirs in zip(cell["losses"], losses)]
                cell["loss_distance"] = max(apart)
            yield cell

    planned = [[(m, s, n)] for m in options.methods for s in options.shards for n in options.counts()]
    campaign.run(planned, measure, lambda cell: line(cell, campaign.results))
