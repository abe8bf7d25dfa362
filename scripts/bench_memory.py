#!/usr/bin/env python3
"""Memory and speed of one training step: LoRA and its kin as people run them, and control in every memory mode.

    python -m scripts.bench_memory                                        # LLaMA-3-8B's shape, 4 x 1024 tokens
    python -m scripts.bench_memory --tokens 256 --methods lora control:fast control+graphs:fast control:lean
    python -m scripts.bench_memory --batch 1 --base bf16 nf4 --methods lora lora+checkpointing control:lean
    python -m scripts.bench_memory --lengths 200 1024 --methods lora lora+packed control:lean control+packed:lean
    python -m scripts.bench_memory --shape vit-b16 --batch 128            # 4-layer MLP, 197 tokens, fp16 autocast
    python -m scripts.bench_memory --shape roberta-base --batch 64 --tokens 128
    python -m scripts.bench_memory --shape qwen3-30b-a3b                  # 128 experts, 8 active; 61 GB of weights
    python -m scripts.bench_memory --limit 23.5 --batch 1 --methods lora+liger+checkpointing control:lean
    python -m scripts.bench_memory --limit 15.5 23.5 --speed_at 8192 --batch 1 --base nf4 --methods control:lean
    python -m scripts.bench_memory --methods control:fast --profile       # where the time goes

Random weights of the true shape: memory and time do not depend on their values. Every method runs in a process of its
own, on the same data. A line is printed as it ends, a table at the end. Ratios are to the fastest and to the leanest
LoRA of the same run. Times are medians of --repeats repeats in that process; their spread is given beside them. A record
goes to --output, with a picture of memory against time. The same command goes on after what a killed run has measured.

A method is NAME[+SWITCH...][+BASE][:MODE], with the ranks and targets of the paper's recipe for the shape.
  NAME    lora, lora-all (every linear layer), lora-qkv, lora-fa (A is frozen), dora, miss, shadow (peft's), control,
          control+lora, control+dora
          LLaMA: LoRA r 32 on q,k,v,up,down, control r 64 on attention and mlp; ViT: LoRA r 1 on the MLP's linear layers,
          control r 16; RoBERTa: LoRA r 8 on query and value, control r 16; Qwen3-MoE: LoRA r 16 on attention, and with
          lora-experts on the experts' tensors too (peft's target_parameters), control as for LLaMA
  SWITCH  liger, unsloth, checkpointing, compile, graphs (CUDA graphs of the step), eager (attention), packed (rows laid
          end to end, with the losses of LlaMA/finetune.py), uncast (without peft's float32 copies of LoRA's inputs, as
          LlaMA/finetune.py trains), streamed (the layers' frozen weights wait on the host, two layers lie on the GPU; a
          LLaMA's are made layer by layer and never all lie there), streamed3 (three layers), onboard (lean's states stay on
          the GPU), fp8states (they wait on the host in FP8)
  BASE    fp32, bf16, fp16, nf4, fp4, int8 or fp8: how the frozen weights are stored; else LLaMA bf16, the others fp32
  MODE    plain, fast, balanced or lean, for methods with a control (see peft_control.memory)
By default those run that suit the shape. Unsloth, for lora and lora-all, only loads models from folders, so one is
written for it (16 GB for LLaMA-3-8B, in TMPDIR); by default it runs on a GPU where it is installed, for which
results/README.md has a command. With graphs memory is what the allocator reserves, in expandable segments, because a
graph keeps its memory between the steps. --limit and --within use expandable segments for every method, as the LLaMA
launchers do. --limit limits what torch's allocator takes; a card keeps about half a GiB for itself besides. A found length ran
within its limit; one longer by a thirtieth does not fit, or is predicted not to.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Optional

import torch
from transformers.hf_argparser import HfArg

from control_experiments.errors import UserError, run_main
from control_experiments.paths import RESULTS
from control_experiments.training.arguments import check_choices, check_numbers, parse_arguments
from control_experiments.training.benchmarking import (
    EXPANDABLE,
    Campaign,
    choose_device,
    machine,
    run_apart,
    stream_apart,
    summarise_repeats,
    synchronize,
    time_steps,
)
from control_experiments.training.device import DTYPES
from control_experiments.training.metering import MemoryMeter
from peft_control.memory import streaming
from scripts.longest import Search, Step
from scripts.workloads import (
    ALL_SHAPES,
    BASES,
    CAUSAL_SHAPES,
    MOE_SHAPES,
    VISION_SHAPES,
    Method,
    Setting,
    Workload,
    build,
    default_methods,
    parse_method,
    step_loss,
    vision_size,
)

LONGEST = 1 << 20  # tokens: where the search of --limit ends
REPEATED = 120  # seconds: a step that takes longer is timed as it ran first
#: `python -c` this ... runs this module; unsloth wants to be imported before transformers.
UNSLOTH_FIRST = "import runpy, unsloth; runpy.run_module('scripts.bench_memory', run_name='__main__', alter_sys=True)"


@dataclass
class Options:
    shape: str = HfArg(default="llama3-8b", help=f"Model shape: {', '.join(ALL_SHAPES)}.")
    methods: Optional[list[str]] = HfArg(default=None, help="In order; default: all that the shape has.")
    base: Optional[list[str]] = HfArg(default=None, help=f"For methods that name none: {', '.join(BASES)}.")
    batch: int = HfArg(default=4, help="Sequences per step.")
    tokens: Optional[int] = HfArg(
        default=None, help="Tokens per sequence; default: 1024 for a decoder, 128 for a RoBERTa. A ViT has as many as it has."
    )
    lengths: Optional[list[int]] = HfArg(default=None, help="Real tokens of the rows, in turn; the rest is padding.")
    precision: Optional[str] = HfArg(
        default=None, help=f"Autocast: {', '.join(DTYPES)}; default: bf16 for a decoder, else fp16 on a GPU."
    )
    control_rank: Optional[int] = HfArg(default=None, help="Rank of the control; default: the recipe's.")
    lora_rank: Optional[int] = HfArg(default=None, help="Rank of LoRA and its kin; default: the recipe's.")
    steps: int = HfArg(default=8, help="Timed steps of each repeat; their median counts.")
    warmup: int = HfArg(default=3, help="Steps before the timed ones.")
    repeats: Optional[int] = HfArg(default=None, help="Their median counts; default: 3 on a GPU, 1 on a CPU.")
    device: str = HfArg(default="cuda", help="cuda, a GPU's index, or cpu to try the script out.")
    limit: Optional[list[float]] = HfArg(default=None, help="Instead: the longest sequence within each so many GiB.")
    within: Optional[float] = HfArg(default=None, help="GiB that the allocator may take: a method that needs more fails.")
    longest: bool = HfArg(default=False, help="Instead: the longest sequence that trains on the whole GPU.")
    speed_at: Optional[list[int]] = HfArg(default=None, help="With --limit or --longest: tokens/s at these lengths too.")
    up_to: int = HfArg(default=LONGEST, help="With --limit or --longest: no longer sequences are tried.")
    max_minutes: Optional[float] = HfArg(default=None, help="With --limit or --longest: begin nothing after so long.")
    profile: bool = HfArg(default=False, help="Instead: the kernels of a step, in a record of their own.")
    output: str = HfArg(default=str(RESULTS / "memory"), help="Folder of records.", aliases=["--output_dir"])
    worker: Optional[str] = HfArg(default=None, help="Used by the script itself: run this one method.")
    left: Optional[list[str]] = HfArg(default=None, help="Used by the script itself: what is to be searched for.")

    def with_defaults(self) -> Options:
        """The options with what was left out as the shape and the device have it.

        Raises:
            UserError: what cannot be, before a minute is spent.
        """
        check_choices(self, shape=ALL_SHAPES, precision=DTYPES, base=BASES)
        check_numbers(self, "batch", "tokens", "steps", "repeats", "control_rank", "lora_rank", at_least=1)
        check_numbers(self, "warmup", at_least=0)
        check_numbers(self, "within", "max_minutes", above=0)
        check_numbers(self, "up_to", at_least=512)
        for name, least in (("lengths", 1), ("speed_at", 1), ("limit", None)):
            for value in getattr(self, name) or []:
                if not (value >= least if least else 0 < value < float("inf")):
                    raise UserError(f"--{name} must be {f'at least {least}' if least else 'greater than 0'}, got {value}")
        tokens = max(self.lengths) if self.lengths else 1024 if self.shape in CAUSAL_SHAPES else 128
        if self.shape in VISION_SHAPES:
            tokens = vision_size(self.shape)[1]
            if self.lengths or self.tokens not in (None, tokens):
                raise UserError(f"{self.shape} has {tokens} tokens: leave --tokens and --lengths out")
        if self.lengths and (self.tokens or tokens) < tokens:
            raise UserError(f"--lengths has {tokens}, which is more than --tokens {self.tokens}")
        device, searches = choose_device(self.device), self.longest or self.limit is not None
        if not searches and (self.speed_at or self.max_minutes or self.up_to != LONGEST):
            raise UserError("--speed_at, --up_to and --max_minutes go with --limit or --longest")
        if searches and (device == "cpu" or self.shape not in CAUSAL_SHAPES or self.lengths):
            raise UserError("--limit and --longest need a GPU and a decoder's shape, without --lengths")
        if self.within is not None and (device == "cpu" or searches):
            raise UserError("--within needs a GPU, and no search (--limit, --longest)")
        if searches and self.profile:
            raise UserError("--limit, --longest and --profile are runs of their own: leave one out")
        unsloth = importlib.util.find_spec("unsloth")
        methods = self.methods or default_methods(self.shape, device, device == "cuda" and bool(unsloth))
        if self.base:
            methods = [parse_method(text).over(base) for base in self.base for text in methods]
        methods = list(dict.fromkeys(methods))
        for method in map(parse_method, methods):
            method.check(self.shape, device)
            if "packed" in method.switches and searches:
                raise UserError(f"method {method.text!r}: --limit and --longest work on unpacked rows")
            if "unsloth" in method.switches and not unsloth:
                told = "unsloth is not installed (pip install unsloth, in an environment of its own)"
                raise UserError(f"method {method.text!r}: {told}")
        return replace(
            self, device=device, methods=methods, tokens=self.tokens or tokens,
            repeats=self.repeats or (3 if device == "cuda" else 1),
        )  # fmt: skip

    def cells(self, method: str) -> list[tuple]:
        """What --limit and --longest find for a method, shortest first: (method, "speed_at", tokens) and (method, "limit", GiB)."""
        found = [(method, "speed_at", tokens) for tokens in sorted({*(self.speed_at or [])})]
        return found + [(method, "limit", limit) for limit in sorted({*(self.limit or [])})]

    def setting(self) -> Setting:
        names = ("shape", "device", "batch", "tokens", "lengths", "precision", "control_rank", "lora_rank")
        return Setting(**{name: getattr(self, name) for name in names})

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
        words += [f"within{self.within:g}"] if self.within else []
        words += [f"limit{'-'.join(f'{limit:g}' for limit in self.limit)}"] if self.limit else []
        words += ["profile"] if self.profile else []
        return "_".join(words) + ".json"


# -- in each method's process -----------------------------------------------------------------------------------


def measure(options: Options, method: Method) -> dict:
    """Train a few steps; memory in bytes, seconds per step and the loss after them."""
    device = torch.device(options.device)
    if options.within:
        allow(options.within)
    memory = MemoryMeter(device)
    work = build(options.setting(), method, memory.after_load)
    graphs, cuda = "graphs" in method.switches, device.type == "cuda"
    if graphs:
        torch.cuda.empty_cache()
    static = torch.cuda.memory_allocated() if cuda else 0
    loss = torch.zeros(())

    def step() -> None:
        nonlocal loss
        loss = work.step()
        memory.after_optimizer()

    for _ in range(options.warmup):
        step()
    synchronize(options.device)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times = summarise_repeats([time_steps(step, options.steps, options.device) for _ in range(options.repeats)])
    summary = memory.summary()
    peak = summary["peak_reserved_bytes" if graphs else "peak_allocated_bytes"] or 0
    rates = {"tokens_per_second": options.batch * options.tokens / times["step_seconds"]}
    rates["real_tokens_per_second"] = sum(options.setting().rows) / times["step_seconds"]
    result = {
        "method": method.text, "trained_parameters": sum(parameter.numel() for parameter in work.trained),
        "static_bytes": static, "peak_bytes": peak, "peak_is": "reserved" if graphs else "allocated",
        "over_static_bytes": peak - static, **times, **rates, "loss": loss.item(), "memory": summary,
    }  # fmt: skip
    if options.shape in MOE_SHAPES:
        result["experts_implementation"] = work.model.config._experts_implementation
    if method.resident:
        result["streaming"] = streamed(options, work)
    return {**result, "kernels": profiled(options, work)} if options.profile else result


def streamed(options: Options, work: Workload) -> dict:
    """What waits on the host, and the seconds in which all of it comes to the GPU once with nothing beside it. Of a step's two
    passes each leaves out the resident layers."""
    (stream,) = streaming.streams(work.model)
    seconds = min(time_steps(stream.copy_all, 3, options.device))
    layers = len(stream.layers)
    floor = 2 * seconds * (layers - stream.resident) / layers
    return {
        "bytes": stream.nbytes,
        "layers": layers,
        "resident": stream.resident,
        "copy_seconds": seconds,
        "floor_seconds": floor,
    }


def allow(limit: float) -> None:
    """Let torch's allocator take so many GiB of the GPU at most."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit * 2**30 / total))


def profiled(options: Options, work: Workload) -> list[dict]:
    """Seconds of one step by kernel (on the CPU: by operation), the longest first."""
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        work.step()
        synchronize(options.device)
    seconds = attrgetter(f"self_{'device' if options.device == 'cuda' else 'cpu'}_time_total")
    found = [
        {"name": event.key[:200], "calls": event.count, "seconds": seconds(event) / 1e6}
        for event in profile.key_averages()
        if event.device_type.name.lower() == options.device and seconds(event) > 0
    ]
    return sorted(found, key=lambda kernel: -kernel["seconds"])


def search(options: Options, method: Method) -> Iterator[dict]:
    """Each of `options.left` as it is found: tokens/s at a length, or the longest sequence within a limit."""
    total = torch.cuda.get_device_properties(0).total_memory
    setting, begun = replace(options.setting(), tokens=512), time.monotonic()
    work = build(setting, method, longest=options.up_to)
    torch.cuda.empty_cache()

    def run(tokens: int, limit: float | None) -> Step | None:
        allow(limit or total / 2**30)
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        try:
            work.loss = step_loss(replace(setting, tokens=tokens), method, work.model)
            work.step()
            torch.cuda.synchronize()
            return Step(torch.cuda.max_memory_allocated(), time.perf_counter() - started)
        except RuntimeError as error:  # torch's own, or CUDA's when pinned memory runs out
            if "out of memory" not in str(error):
                raise
            return None
        finally:
            work.optimizer.zero_grad()
            torch.cuda.empty_cache()

    steps, good = Search(run, options.up_to, torch.cuda.memory_allocated()), 0
    steps.probe(total)
    waits = {"streaming": streamed(options, work)} if method.resident else {}
    for _, what, value in options.cells(method.text):
        if f"{what}={value}" not in options.left:
            continue
        if options.max_minutes is not None and time.monotonic() - begun > 60 * options.max_minutes:
            return
        limit = value if what == "limit" else None
        tokens, step = steps.longest(value, good) if limit else (value, steps.attempt(value, None))
        good = tokens if limit else good
        # A second step is timed: the first of its length also allocates host memory.
        if tokens and ((not step and limit) or (step and step.seconds < REPEATED)):
            step = run(tokens, limit) or step
        found = {"limit_gib": limit, "longest_tokens": tokens} if limit else {"tokens": tokens, "fits": bool(step)}
        found |= {"ended_by": "--up_to"} if limit and tokens + 512 > options.up_to else {}
        if step:
            found |= {"step_seconds": step.seconds, "tokens_per_second": setting.batch * tokens / step.seconds}
            found |= {"peak_bytes": step.peak}
        yield {"method": method.text, **found, **waits}


# -- in the process that starts them ----------------------------------------------------------------------------


def process_of(options: Options, method: Method, command: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Command and environment of the method's own process."""
    start = ["-m", "scripts.bench_memory"]
    grows = options.limit or options.within or options.longest or "graphs" in method.switches
    environment = dict(EXPANDABLE) if grows else {}
    if "unsloth" in method.switches:  # which also writes what it compiles
        start = ["-c", UNSLOTH_FIRST]
        environment |= {
            "UNSLOTH_DISABLE_STATISTICS": "1",
            "UNSLOTH_COMPILE_LOCATION": str(Path(tempfile.gettempdir()) / "unsloth_compiled_cache"),
        }
    words = [*command, "--device", options.device, "--worker", method.text]
    return [sys.executable, *start, *words], environment


def run_method(options: Options, method: Method, command: Sequence[str]) -> dict:
    """Measure the method in a process of its own."""
    result = run_apart(*process_of(options, method, command))
    return result if "error" not in result else {"method": method.text, **result}


def run_search(options: Options, method: Method, command: Sequence[str], left: list[tuple], minutes: float | None) -> Iterator[dict]:  # fmt: skip
    """The cells that are left, as they are found in a process of their own, which begins none after so many minutes."""
    words = [*command, "--left", *(f"{what}={value}" for _, what, value in left)]
    words += ["--max_minutes", str(minutes)] if minutes else []
    for result in stream_apart(*process_of(options, method, words)):
        if "error" not in result:
            left.remove(cell(result))
            yield result
        else:
            places = ({"limit_gib": value} if what == "limit" else {"tokens": value} for _, what, value in left)
            yield from ({"method": method.text, **place, **result} for place in places)


def cell(result: dict) -> tuple:
    """What tells a result of a search from the others; see `Options.cells`."""
    what = ("limit", result["limit_gib"]) if "limit_gib" in result else ("speed_at", result["tokens"])
    return (result["method"], *what)


def line(result: dict) -> str:
    if "error" in result:
        return f"{result['method']:32s} failed: {result['error']}"
    if "longest_tokens" in result or "fits" in result:
        longest = "longest_tokens" in result
        text = f"{result['longest_tokens' if longest else 'tokens']:7d} tokens"
        text += f" within {result['limit_gib']} GiB" if longest else "" if result["fits"] else " do not fit"
        rate = "step_seconds" in result
        text += f", {result['step_seconds']:.1f} s a step, {result['tokens_per_second']:.0f} tokens/s" if rate else ""
        return f"{result['method']:32s} {text}"
    spread = 100 * result["step_seconds_spread"] / result["step_seconds"]
    floor = result.get("streaming", {}).get("floor_seconds")
    copies = f"  copies {floor * 1e3:.1f} ms" if floor else ""
    shared = "  OTHERS USE THIS GPU" if result["memory"]["other_processes_bytes"] else ""
    kernels = [
        f"\n    {kernel['seconds'] * 1e3:8.2f} ms {kernel['calls']:5d} x {kernel['name'][:90]}"
        for kernel in result.get("kernels", [])[:20]
    ]
    return (
        f"{result['method']:32s} {result['over_static_bytes'] / 1e9:7.2f} GB over {result['static_bytes'] / 1e9:6.2f}"
        f"  {result['step_seconds'] * 1e3:7.1f} ms, spread {spread:4.1f} %  {result['tokens_per_second']:9.0f} tokens/s"
        f"  loss {result['loss']:.4f}{copies}{shared}{''.join(kernels)}"
    )


def table(results: list[dict]) -> str:
    """The results, the fastest first, with their ratios to the fastest and to the leanest LoRA, if there is one."""
    measured = sorted((result for result in results if "step_seconds" in result), key=itemgetter("step_seconds"))
    loras = [result for result in measured if result["method"].startswith("lora")]
    if not loras:
        return ""
    peers = {"fastest": loras[0], "leanest": min(loras, key=itemgetter("over_static_bytes"))}
    against = "   ".join(f"against {peer['method']} ({name})" for name, peer in peers.items())
    lines = [f"{'':32s} {'over weights':>12s} {'step':>9s}   {against}"]
    for result in measured:
        seconds, over = result["step_seconds"], result["over_static_bytes"]
        ratios = [(seconds / peer["step_seconds"], over / max(peer["over_static_bytes"], 1)) for peer in peers.values()]
        shown = "   ".join(f"time x{time:.2f} memory x{memory:.2f}" for time, memory in ratios)
        lines.append(f"{result['method']:32s} {over / 1e9:9.2f} GB {seconds * 1e3:6.1f} ms   {shown}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure as the command line says."""
    command = list(sys.argv[1:] if argv is None else argv)
    (options,) = parse_arguments(Options, argv=command, description=__doc__)
    options = options.with_defaults()
    searches = options.longest or options.limit is not None
    if options.worker:
        printed, method = sys.stdout, parse_method(options.worker)
        with contextlib.redirect_stdout(sys.stderr):
            for result in search(options, method) if searches else [measure(options, method)]:
                print(json.dumps(result), file=printed, flush=True)
        return
    begun, found = time.monotonic(), machine(options.device)
    if options.longest and not options.limit:
        options.limit = [round(found["machine"]["total_memory_bytes"] / 2**30, 2)]
        command += ["--limit", str(options.limit[0])]
    words = [options.shape, f"{options.batch} x {options.tokens} tokens", *options.particulars().values()]
    setting, dtype, rate = ", ".join(words), str(options.setting().autocast)[6:], found["matmul_tflops"]
    title = f"{setting}, {dtype}, {found['device']}"
    print(title + (f", bf16 matmul {rate:.0f} TFLOP/s" if rate else ""), flush=True)
    campaign = Campaign(
        Path(options.output) / options.file_name(), options, cell if searches else itemgetter("method"), found,
        setting=setting, dtype=dtype, weights="random",
    )  # fmt: skip
    planned = [place for text in options.methods for place in (options.cells(text) if searches else [text])]
    finished = campaign.finished
    for number, text in enumerate(options.methods, 1):
        left = [place for place in planned if place not in finished and text in (place, place[0])]
        minutes = options.max_minutes and options.max_minutes - (time.monotonic() - begun) / 60
        if not left or (minutes is not None and minutes <= 0):
            continue
        started, method = time.time(), parse_method(text)
        measured = run_search(options, method, command, left, minutes) if searches else [run_method(options, method, command)]
        for result in measured:
            campaign.add(result)
            print(f"[{number}/{len(options.methods)}, {time.time() - started:.0f} s] {line(result)}", flush=True)
    if not searches:
        print(table(campaign.results))
    measured = [result for result in campaign.results if "step_seconds" in result]
    if measured and not (searches or options.profile):
        from control_experiments.reporting import pictures  # with pandas, which no method's process needs

        points = {result["method"]: (result["step_seconds"], result["over_static_bytes"]) for result in measured}
        pictures.save(pictures.memory_against_time(points, title), campaign.path.with_suffix(".png"))
    if missing := len(planned) - len(campaign.finished):
        print(f"time is up, {missing} of {len(planned)} are left: the same command goes on", file=sys.stderr)
        sys.exit(1)
    campaign.finish(planned)


if __name__ == "__main__":
    run_main(main)
