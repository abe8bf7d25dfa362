"""Memory and time of a training run."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# What a process needs on a GPU beside its tensors (context, libraries, kernels) stays below this.
_OWN_OVERHEAD = 2**30


class MemoryMeter:
    """Splits a run's memory into weights, adapter + optimizer, and activations (all in bytes).

    On CUDA the numbers are the caching allocator's: `weights` is allocated once the frozen model lies on the device,
    `adapter_and_optimizer` what the first optimizer step left on top of that (adapter, optimizer states, kept
    gradients), `activations` the peak above both. `other_processes_bytes` is what others were seen to hold there at
    one of the marks: unless it is 0, the GPU was shared and the run's times say little. On a CPU no such split can be
    measured: the peak resident set of the whole process is given, labelled as such, and the rest is None.
    """

    def __init__(self, device: torch.device):
        self.device, self._cuda = device, device.type == "cuda"
        self._weights: int | None = None
        self._with_optimizer: int | None = None
        if self._cuda:
            torch.cuda.init()  # the first line that touches the device must not be the next
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
            self._others = 0
            self._look_for_others()

    def _look_for_others(self) -> None:
        free, total = torch.cuda.mem_get_info(self.device)
        others = total - free - torch.cuda.memory_reserved(self.device) - _OWN_OVERHEAD
        self._others = max(self._others, others)

    def after_load(self) -> None:
        """Call when the base model lies on the device, before the adapter is added."""
        if self._cuda:
            self._look_for_others()
            self._weights = torch.cuda.memory_allocated(self.device) - self._before

    def after_optimizer(self) -> None:
        """Call after the first optimizer step, when the optimizer's states exist; later calls do nothing."""
        if self._cuda and self._with_optimizer is None:
            self._with_optimizer = torch.cuda.memory_allocated(self.device) - self._before

    def summary(self) -> dict:
        """The record's `memory`; a mark that was never set leaves its part None."""
        parts = "weights adapter_and_optimizer activations peak_allocated peak_reserved peak_resident other_processes"
        summary = {f"{part}_bytes": None for part in parts.split()}
        if not self._cuda:
            # Linux counts kibibytes here, macOS bytes
            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
            return {"kind": "resident set", **summary, "peak_resident_bytes": peak}
        self._look_for_others()
        summary["other_processes_bytes"] = self._others
        peak = torch.cuda.max_memory_allocated(self.device)
        summary["peak_allocated_bytes"] = peak
        summary["peak_reserved_bytes"] = torch.cuda.max_memory_reserved(self.device)
        summary["weights_bytes"] = self._weights
        if self._weights is not None and self._with_optimizer is not None:
            summary["adapter_and_optimizer_bytes"] = self._with_optimizer - self._weights
            summary["activations_bytes"] = peak - self._before - self._with_optimizer
        return {"kind": "cuda allocator", **summary}


class Throughput:
    """Counts examples and real (non-padding) tokens over the time in which steps ran.

    Use `start()`, then `step(examples)` after each optimizer step, then `stop()`; wrap evaluations in
    `left_out()`. The device is synchronised only there, so metering does not slow the run.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.examples = 0
        self.seconds = 0.0
        self._tokens: int | torch.Tensor = 0
        self._steps: list[float] = []
        self._started: float | None = None
        self._last = 0.0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def start(self) -> None:
        self._started = self._last = self._now()

    def step(self, examples: int = 0) -> None:
        """Note the end of an optimizer step."""
        now = time.perf_counter()
        self._steps.append(now - self._last)
        self._last = now
        self.add(examples)

    def add(self, examples: int, tokens: int | torch.Tensor = 0) -> None:
        """Count a batch, which need not be a step of its own; `tokens` may be a tensor on the device, read only at the end."""
        self.examples += examples
        self._tokens = self._tokens + tokens

    def stop(self) -> None:
        if self._started is not None:
            self.seconds += self._now() - self._started
            self._started = None

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """What happens inside (an evaluation, a checkpoint) does not count, if the clock runs at all."""
        running = self._started is not None
        self.stop()
        yield
        if running:
            self.start()

    def summary(self) -> dict:
        """The record's `time`; rates are None when nothing was counted."""
        rate, tokens = 1 / self.seconds if self.seconds else None, int(self._tokens)
        return {
            "train_seconds": self.seconds,
            "steps": len(self._steps),
            "median_step_seconds": statistics.median(self._steps) if self._steps else None,
            "examples_per_second": self.examples * rate if rate and self.examples else None,
            "tokens_per_second": tokens * rate if rate and tokens else None,
            "examples": self.examples,
            "real_tokens": tokens,
        }
