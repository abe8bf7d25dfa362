"""The work of bench_memory.py: what each method's own process measures, and the process that starts them."""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from operator import attrgetter
from pathlib import Path

import torch

from control_experiments.training.benchmarking import EXPANDABLE, Campaign, limit_memory, machine, stream_apart, time_steps
from control_experiments.training.device import DTYPES
from control_experiments.training.metering import MemoryMeter
from peft_control.memory import streaming
from scripts.bench_memory import Options
from scripts.catalogue import MOE_SHAPES, Method, parse_method
from scripts.workloads import Workload, build, step_loss

REPEATED = 120  # seconds: a step that takes longer is timed as it ran first
LASTING = 10  # seconds: one that takes longer is timed as it ran second, when the host's memory is there
GRAIN = 512  # lengths that are searched are multiples of it
CLOSE = 1 / 32  # a found length is at most this share of itself below one that does not fit, or is predicted not to
AIM = 0.985  # share of the room over the weights that the first attempt aims at: the rest is what an allocator cannot use
#: `python -c` this ... runs the benchmark; unsloth wants to be imported before transformers.
UNSLOTH_FIRST = "import runpy, unsloth; runpy.run_module('scripts.bench_memory', run_name='__main__', alter_sys=True)"

# -- in each method's process -----------------------------------------------------------------------------------


def measure(options: Options, method: Method) -> dict:
    """Train a few steps; memory in bytes, seconds per step and the loss after them."""
    device = torch.device(options.device)
    memory = MemoryMeter(device)
    work = build(options, method, memory.after_load)
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
    torch.get_device_module(device).synchronize()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    repeats = [time_steps(step, options.steps, options.device) for _ in range(options.repeats)]
    medians = [statistics.median(seconds) for seconds in repeats]
    times = {
        "step_seconds": statistics.median(medians), "step_seconds_all": [second for seconds in repeats for second in seconds],
        "step_seconds_repeats": medians, "step_seconds_spread": max(medians) - min(medians),
    }  # fmt: skip
    summary = memory.summary()
    peak = summary["peak_reserved_bytes" if graphs else "peak_allocated_bytes"] or 0
    rates = {"tokens_per_second": options.batch * options.tokens / times["step_seconds"]}
    rates["real_tokens_per_second"] = sum(options.rows) / times["step_seconds"]
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
    layers, resident = len(stream.layers), stream.resident
    floor = 2 * seconds * (layers - resident) / layers
    return {"bytes": stream.nbytes, "layers": layers, "resident": resident, "copy_seconds": seconds, "floor_seconds": floor}


def profiled(options: Options, work: Workload) -> list[dict]:
    """Seconds of one step by kernel (on the CPU: by operation), the longest first."""
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        work.step()
        torch.get_device_module(options.device).synchronize()
    seconds = attrgetter(f"self_{'device' if options.device == 'cuda' else 'cpu'}_time_total")
    found = [
        {"name": event.key[:200], "calls": event.count, "seconds": seconds(event) / 1e6}
        for event in profile.key_averages()
        if event.device_type.name.lower() == options.device and seconds(event) > 0
    ]
    return sorted(found, key=lambda kernel: -kernel["seconds"])


class Search:
    """The longest sequence whose step fits within a limit, found in few steps, for GPUs that are lent for minutes.

    A step's peak memory is nearly linear in its tokens. So two short steps predict the longest sequence of a limit, and one or
    two steps under the limit confirm it. What is reported ran under its limit, or under a smaller one.
    """

    def __init__(self, options: Options, work: Workload):
        self.options, self.work, self.most = options, work, options.up_to
        self.total, self.static = torch.cuda.get_device_properties(0).total_memory, torch.cuda.memory_allocated()
        self.points: dict[int, int] = {}  # tokens of a step -> its peak in bytes

    def attempt(self, tokens: int, limit: float | None, repeats: int = 0) -> list[float] | None:
        """Seconds of a step of so many tokens, or of its repeats, within a limit in GiB (None: the device's own); None if that is
        not enough."""
        limit_memory(limit or self.total / 2**30)
        torch.cuda.reset_peak_memory_stats()
        try:
            self.work.loss = step_loss(replace(self.options, tokens=tokens), self.work.model)
            ends = [time.perf_counter()]
            for _ in range(1 + repeats):
                self.work.step()
                torch.cuda.synchronize()
                ends.append(time.perf_counter())
        except RuntimeError as error:  # torch's own, or CUDA's when pinned memory runs out
            if "out of memory" not in str(error):
                raise
            return None
        finally:
            self.work.optimizer.zero_grad()
            torch.cuda.empty_cache()
        self.points[tokens] = torch.cuda.max_memory_allocated()
        seconds = [end - begin for begin, end in pairwise(ends)]
        return seconds[1:] or seconds  # the first of a length also allocates memory, on the host too

    def probe(self) -> None:
        """Two short steps on the whole device; the second four to sixteen times as long as the first, if it fits."""
        for tokens in (GRAIN, 2 * GRAIN):  # the optimizer's states exist from the second step on
            if not self.attempt(tokens, None):
                return
        longer = min(32 * GRAIN, self.predict(self.total) // 2, self.most) // GRAIN * GRAIN
        if longer > 2 * GRAIN:
            self.attempt(longer, None)

    def predict(self, room: float) -> int:
        """Tokens whose step should take so many bytes, on the line through the two longest steps."""
        if not self.points:
            return 0
        *_, last = ends = sorted(self.points)[-2:]
        slope = (self.points[last] - self.static) / last
        if len(ends) == 2 and self.points[last] > self.points[ends[0]]:
            slope = (self.points[last] - self.points[ends[0]]) / (last - ends[0])
        return max(0, int(last + (room - self.points[last]) / max(slope, 1)))

    def longest(self, limit: float, good: int) -> tuple[int, list[float] | None]:
        """The longest sequence within so many GiB, and its step's seconds; `good` fits within less, and is returned, without
        seconds, if nothing longer fits."""
        found, bad, aim, failures = None, self.most // GRAIN * GRAIN + GRAIN, AIM, 0
        while bad - good > max(GRAIN, CLOSE * good):
            target = self.predict(self.static + aim * (limit * 2**30 - self.static))
            if failures:
                target = min(target, int(bad * (1 - CLOSE)))
            if failures > 1:  # not so linear after all
                target = min(target, (good + bad) // 2)
            target = min(target, bad - GRAIN) // GRAIN * GRAIN
            if good and target <= (1 + CLOSE) * good:
                break
            target = max(target, GRAIN)
            if done := self.attempt(target, limit):
                good, found = target, done
            else:
                bad, aim, failures = target, aim - 0.02, failures + 1
        return good, found


def search(options: Options, method: Method) -> Iterator[dict]:
    """Each of `options.left` as it is found: tokens/s at a length, or the longest sequence within a limit."""
    begun = time.monotonic()
    work = build(replace(options, tokens=GRAIN), method, longest=options.up_to)
    torch.cuda.empty_cache()
    steps, good, fitted = Search(options, work), 0, None
    steps.probe()
    waits = {"streaming": streamed(options, work)} if method.resident else {}
    for _, what, value in options.cells(method.text):
        if f"{what}={value}" not in options.left:
            continue
        if options.max_minutes is not None and time.monotonic() - begun > 60 * options.max_minutes:
            return
        limit = value if what == "limit_gib" else None
        tokens, seconds = steps.longest(value, good) if limit else (value, steps.attempt(value, None))
        if seconds and seconds[0] < REPEATED:
            repeats = 0 if seconds[0] > LASTING else 1 if limit else 3
            seconds = steps.attempt(tokens, limit, repeats) or seconds
        if limit:  # what ran within less runs within more
            good, fitted = tokens, seconds or fitted
            seconds = fitted
        found = {"limit_gib": limit, "longest_tokens": tokens} if limit else {"tokens": tokens, "fits": bool(seconds)}
        found |= {"ended_by": "--up_to"} if limit and tokens + GRAIN > options.up_to else {}
        if seconds:
            median = statistics.median(seconds)
            found |= {"step_seconds": median, "tokens_per_second": options.batch * tokens / median}
            found |= {"peak_bytes": steps.points[tokens], "step_seconds_repeats": seconds}
        yield {"method": method.text, **found, **waits}


def work(options: Options) -> None:
    """What a method's own process does: print each result as a line of JSON, and all else to stderr."""
    printed, method = sys.stdout, parse_method(options.worker)
    with contextlib.redirect_stdout(sys.stderr):
        for result in search(options, method) if options.limit else [measure(options, method)]:
            print(json.dumps(result), file=printed, flush=True)


# -- in the process that starts them ----------------------------------------------------------------------------


def run_method(options: Options, command: Sequence[str], begun: float, left: list[tuple]) -> Iterator[dict]:
    """The cells of a method that are left, as they are found in a process of its own; none begins when --max_minutes are over."""
    minutes = options.max_minutes and options.max_minutes - (time.monotonic() - begun) / 60
    if minutes is not None and minutes <= 0:
        return
    method, start, environment = parse_method(left[0][0]), ["-m", "scripts.bench_memory"], {}
    if options.limit or "graphs" in method.switches:
        environment |= EXPANDABLE
    if "unsloth" in method.switches:  # which also writes what it compiles
        compiled = str(Path(tempfile.gettempdir()) / "unsloth_compiled_cache")
        start, unsloth = ["-c", UNSLOTH_FIRST], {"UNSLOTH_DISABLE_STATISTICS": "1", "UNSLOTH_COMPILE_LOCATION": compiled}
        environment |= unsloth
    words = [*command, "--device", options.device, "--worker", method.text]
    words += ["--left", *(f"{what}={value}" for _, what, value in left)]
    words += ["--max_minutes", str(minutes)] if minutes else []
    for result in stream_apart([sys.executable, *start, *words], environment):
        if "error" not in result:
            left.remove(cell(result))
            yield result
        else:
            yield from ({"method": method.text, **({what: value} if value else {}), **result} for _, what, value in left)


def cell(result: dict) -> tuple:
    """What tells a result from the others; see `Options.cells`."""
    what = next((name for name in ("limit_gib", "tokens") if name in result), "step")
    return (result["method"], what, result.get(what))


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
    memory = "memory not measured"  # on a CPU
    if result["peak_bytes"]:
        memory = f"{result['over_static_bytes'] / 1e9:7.2f} GB over {result['static_bytes'] / 1e9:6.2f}"
    return (
        f"{result['method']:32s} {memory}"
        f"  {result['step_seconds'] * 1e3:7.1f} ms, spread {spread:4.1f} %  {result['tokens_per_second']:9.0f} tokens/s"
        f"  loss {result['loss']:.4f}{copies}{shared}{''.join(kernels)}"
    )


def table(results: list[dict]) -> str:
    """The results, the fastest first, with their ratios to the fastest and to the leanest LoRA, if there is one."""
    import pandas as pd  # which no method's process needs

    measured = pd.DataFrame([result for result in results if "step_seconds" in result]).set_index("method")
    loras = measured[measured.index.str.startswith("lora")]
    memory = measured.over_static_bytes.where(measured.peak_bytes > 0)
    shown = pd.DataFrame({"GB over weights": memory / 1e9, "ms a step": 1000 * measured.step_seconds})
    for peer in dict.fromkeys([loras.step_seconds.idxmin(), loras.over_static_bytes.idxmin()] if len(loras) else []):
        shown[f"time / {peer}"] = measured.step_seconds / loras.step_seconds[peer]
        shown[f"memory / {peer}"] = memory / memory[peer]
    return shown.dropna(axis="columns").sort_values("ms a step").rename_axis(None).to_string(float_format="{:.2f}".format)


def run(options: Options, command: list[str]) -> None:
    """Measure each method in a process of its own that is started by the same `command`; write the record."""
    begun, found = time.monotonic(), machine(options.device)
    words = [options.shape, f"{options.batch} x {options.tokens} tokens", *options.particulars().values()]
    setting, dtype, rate = ", ".join(words), str(DTYPES[options.autocast])[6:], found["matmul_tflops"]
    print(f"{setting}, {dtype}, {found['device']}" + (f", bf16 matmul {rate:.0f} TFLOP/s" if rate else ""), flush=True)
    campaign = Campaign(
        Path(options.output) / options.file_name(), options, cell, found, setting=setting, dtype=dtype, weights="random"
    )
    campaign.run([options.cells(text) for text in options.methods], partial(run_method, options, command, begun), line)
    if not options.limit and any("step_seconds" in result for result in campaign.results):
        print(table(campaign.results))
