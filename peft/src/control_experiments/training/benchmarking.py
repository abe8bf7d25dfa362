"""What benchmarks share: timing on a device, processes of their own, and a record that a killed run goes on with."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from ..errors import UserError
from ..record import git_state, package_versions, utc_now, write_json_atomic
from .device import describe_device

#: The environment of a process whose tensors change their sizes.
EXPANDABLE = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
#: Options that say how a benchmark is run, not what it measures.
_HOW = ("output", "worker", "left", "max_minutes")


# -- timing -----------------------------------------------------------------------------------------------------


def time_steps(step: Callable[[], object], count: int, device: str) -> list[float]:
    """Seconds of each of `count` steps; the host waits for the device at the end only, as training loops do."""

    def mark():
        if device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    marks = [mark()]
    for _ in range(count):
        step()
        marks.append(mark())
    torch.get_device_module(device).synchronize()
    if device == "cuda":
        return [start.elapsed_time(end) / 1000 for start, end in itertools.pairwise(marks)]
    return [end - start for start, end in itertools.pairwise(marks)]


# -- devices and processes --------------------------------------------------------------------------------------


def machine(device: str) -> dict:
    """What a record says of the machine: the device's name, how it is described, and a GPU's own bf16 matmul rate on random
    data, for the arithmetic floor.

    A process of its own asks the GPU, for whoever did so would keep some of its memory and look like another user.
    """
    if device == "cuda":
        program = f"import json; from {__name__} import _gpu; print(json.dumps(_gpu()))"
        *_, found = stream_apart([sys.executable, "-c", program], {})
        if "error" in found:
            raise UserError(f"the GPU cannot be asked what it is: {found['error']}")
        return found
    return {"device": device, "machine": describe_device(torch.device(device)), "matmul_tflops": None}


def _gpu() -> dict:
    found = describe_device(torch.device("cuda"))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    time_steps(lambda: a @ b, 3, "cuda")
    rate = 10 * 2 * 8192**3 / sum(time_steps(lambda: a @ b, 10, "cuda"))
    return {"device": found["name"], "machine": found, "matmul_tflops": rate / 1e12}


def limit_memory(gib: float) -> None:
    """Let torch's allocator take so many GiB of this process's GPU at most."""
    total = torch.cuda.get_device_properties("cuda").total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total))


def stream_apart(command: Sequence[str], environment: dict[str, str]) -> Iterator[dict]:
    """Each JSON object that a process prints on a line of its own, at once; ``{"error": its last line on stderr}`` if it fails."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            for line in process.stdout:
                if line.startswith("{"):
                    yield json.loads(line)
            code = process.wait()
        finally:
            process.kill()
            process.wait()
        if code:
            errors.seek(0)
            yield {"error": (errors.read().strip().splitlines()[-1:] or [f"exit code {code}"])[0][:300]}


# -- records ----------------------------------------------------------------------------------------------------


class Campaign:
    """Results of one benchmark, written after each of them; a killed run's are kept for the next.

    They lie in ``PATH.partial`` until all are there, which no table reads. A result counts for another run if options, device,
    versions and code are the same. So does a whole record, unless the code has changes that no commit holds.

    Attributes:
        record: what is written, with the `results` so far.
        key: what tells a result from the others.
    """

    def __init__(self, path: Path, options: object, key: Callable[[dict], Hashable], machine: dict, **more: object):
        self.path, self.key = path, key
        given = {name: value for name, value in asdict(options).items() if name not in _HOW}
        head = {"versions": package_versions(), "git": git_state(), "created": utc_now()}
        self.results: list[dict] = []
        self.record = {"schema": 1, **machine, **more, **head, "options": given, "results": self.results}
        self._partial = path.with_suffix(".json.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        places = [self._partial, *([] if self.record["git"]["dirty"] else [path])]
        for place in places:
            if kept := self._kept(place):
                print(f"{len(kept)} measured before, in {place} (delete it to measure again)", flush=True)
                self.results.extend(kept)
                break

    def _kept(self, place: Path) -> list[dict]:
        """Results in a file of the same benchmark, without its failures."""
        try:
            found = json.loads(place.read_text())
            wanted = json.loads(json.dumps(self.record))
            anew = ("created", "matmul_tflops", "results")  # each run says these for itself
            if any(found[name] != value for name, value in wanted.items() if name not in anew):
                return []
            return [result for result in found["results"] if "error" not in result]
        except (OSError, ValueError, KeyError, TypeError):
            return []  # there is none, or it is no such file

    def run(
        self, groups: Sequence[Sequence[Hashable]], measure: Callable[[list], Iterable[dict]], say: Callable[[dict], str]
    ) -> None:
        """Measure what is not finished, group by group, and say each result of a group's keys as soon as it is there. Then put
        them in order and the record in its place, or end with 1 if something is left. Raises UserError: all failed."""
        order = [key for keys in groups for key in keys]
        for number, keys in enumerate(groups, 1):
            started, finished = time.time(), set(map(self.key, self.results))
            if left := [key for key in keys if key not in finished]:
                for result in measure(left):
                    self.results.append(result)
                    write_json_atomic(self._partial, self.record)
                    print(f"[{number}/{len(groups)}, {time.time() - started:.0f} s] {say(result)}", flush=True)
        if missing := len(order) - len(set(map(self.key, self.results))):
            print(f"time is up, {missing} of {len(order)} are left: the same command goes on", file=sys.stderr)
            sys.exit(1)
        self.results.sort(key=lambda result: order.index(self.key(result)))
        write_json_atomic(self._partial, self.record)
        self._partial.replace(self.path)
        print(f"record in {self.path}")
        if all("error" in result for result in self.results):
            raise UserError("nothing could be measured (reasons above)")
