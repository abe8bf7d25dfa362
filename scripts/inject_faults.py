"""Inject faults into every domain and say what was lost; the reliability page (scripts/RELIABILITY.md) reads its result.

    python -m scripts.inject_faults --kills 40 --lost 40 --inputs 100000        the whole campaign
    python -m scripts.inject_faults --kills 3 --lost 3 --domains roberta --inputs 0
    python -m scripts.inject_faults --kills 0 --lost 0 --inputs 2000 --readers npz tar

Kills are SIGKILLs at random moments of tiny training and evaluation runs, each of which must then end, bit for bit, as if
undisturbed. Lost are single processes of training runs of two, which must then go on with 1, 2 and 4 processes and have the
losses of one undisturbed process. Inputs are generated files, which every reader must take or refuse with a UserError.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Optional

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

from control_experiments.errors import UserError, run_main
from control_experiments.record import git_state, package_versions, utc_now, write_json_atomic
from control_experiments.training.arguments import parse_arguments
from scripts.faults import kills, processes
from scripts.faults.inputs import READERS, fast_folder, feed
from scripts.faults.tiny import RUNS


@dataclass
class Options:
    kills: int = field(default=40, metadata={"help": "Kills per domain; 0: none."})
    lost: int = field(
        default=40, metadata={"help": "Lost processes per domain that trains with several; 0: none."}
    )
    inputs: int = field(default=100_000, metadata={"help": "Generated inputs per reader; 0: none."})
    domains: list[str] = field(
        default_factory=lambda: list(RUNS), metadata={"help": f"Of {', '.join(RUNS)}."}
    )
    shards: list[str] = field(
        default_factory=lambda: ["ddp", "fsdp2"], metadata={"help": "What processes that are lost share."}
    )
    readers: list[str] = field(
        default_factory=lambda: list(READERS), metadata={"help": f"Of {', '.join(READERS)}."}
    )
    seed: int = field(default=0, metadata={"help": "Seeds moments and inputs."})
    jobs: int = field(default=2, metadata={"help": "Domains or readers worked on at a time."})
    output: Optional[str] = field(default=None, metadata={"help": "JSON file for the result."})

    def check(self) -> None:
        for kind, known in (("domains", RUNS), ("shards", ("ddp", "fsdp2")), ("readers", READERS)):
            if unknown := [name for name in getattr(self, kind) if name not in known]:
                raise UserError(f"unknown --{kind} {unknown[0]!r}: choose from {', '.join(known)}")


def kill_domain(name: str, count: int, seed: int) -> dict:
    """The kill campaign of one domain, in words and numbers."""
    return _campaign(kills.campaign, RUNS[name], count, seed)


def lose_processes(name: str, count: int, seed: int) -> dict:
    """The campaign of one domain against single processes of its runs, in words and numbers."""
    return _campaign(processes.campaign, processes.RUNS[name], count, seed)


def _campaign(campaign: Callable, make_run: Callable, count: int, seed: int) -> dict:
    import torch

    torch.set_num_threads(1)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        outcome = campaign(make_run(Path(folder)), Path(folder), count, seed)
    return {**outcome._asdict(), "seconds": round(time.perf_counter() - started)}


def feed_reader(name: str, count: int, seed: int) -> dict:
    """The inputs of one reader, in words and numbers."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="faults-", dir=fast_folder()) as folder:
        outcome = feed(name, Path(folder), count, seed)
    return {**outcome._asdict(), "seconds": round(time.perf_counter() - started)}


def main() -> None:
    (options,) = parse_arguments(Options, description=__doc__)
    options.check()
    tasks = []
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        if options.kills:
            tasks += [
                ("kills", name, pool.submit(kill_domain, name, options.kills, options.seed))
                for name in options.domains
            ]
        if options.lost:
            tasks += [
                ("lost", name, pool.submit(lose_processes, name, options.lost, options.seed))
                for name in processes.RUNS
                if name.removesuffix("-fsdp2") in options.domains
                and ("fsdp2" if name.endswith("-fsdp2") else "ddp") in options.shards
            ]
        if options.inputs:
            tasks += [
                ("inputs", name, pool.submit(feed_reader, name, options.inputs, options.seed))
                for name in options.readers
            ]
        result: dict = {"kills": {}, "lost": {}, "inputs": {}}
        for kind, name, future in tasks:
            result[kind][name] = future.result()
            print(f"{kind:7} {name:15} {json.dumps(result[kind][name])}", flush=True)
    if options.output:
        head = {"created": utc_now(), "git": git_state(), "versions": package_versions()}
        write_json_atomic(options.output, {**head, **result})
    lost = [
        f"{kind} {name}: {problem}"
        for kind, found in result.items()
        for name, entry in found.items()
        for problem in entry.get("differences", entry.get("failures", []))
    ]
    if lost:
        print(*lost, sep="\n", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
