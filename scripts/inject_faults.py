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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Optional

import torch
from transformers.hf_argparser import HfArg

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

from control_experiments.errors import run_main
from control_experiments.record import git_state, package_versions, utc_now, write_json_atomic
from control_experiments.training.arguments import check_choices, parse_arguments
from scripts.faults import kills, processes
from scripts.faults.inputs import READERS, fast_folder, feed
from scripts.faults.tiny import RUNS

SHARDS = ("ddp", "fsdp2")


@dataclass
class Options:
    kills: int = HfArg(default=40, help="Kills per domain; 0: none.")
    lost: int = HfArg(default=40, help="Lost processes per domain that trains with several; 0: none.")
    inputs: int = HfArg(default=100_000, help="Generated inputs per reader; 0: none.")
    domains: list[str] = HfArg(default_factory=lambda: list(RUNS), help=f"Of {', '.join(RUNS)}.")
    shards: list[str] = HfArg(default_factory=lambda: list(SHARDS), help="What processes that are lost share.")
    readers: list[str] = HfArg(default_factory=lambda: list(READERS), help=f"Of {', '.join(READERS)}.")
    seed: int = HfArg(default=0, help="Seeds moments and inputs.")
    jobs: int = HfArg(default=2, help="Domains or readers worked on at a time.")
    output: Optional[str] = HfArg(default=None, help="JSON file for the result.")

    def tasks(self) -> list[tuple[str, str, int]]:
        """(kind, domain or reader, how many) of everything that is asked for."""
        lost = [name for name in processes.RUNS if name.partition("-")[0] in self.domains and (name.partition("-")[2] or "ddp") in self.shards]  # fmt: skip
        asked = {"kills": self.domains, "lost": lost, "inputs": self.readers}
        return [(kind, name, getattr(self, kind)) for kind in asked for name in asked[kind] if getattr(self, kind)]


def work(kind: str, name: str, count: int, seed: int) -> dict:
    """One domain's or reader's part of the campaign, in words and numbers."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="faults-", dir=fast_folder() if kind == "inputs" else None) as place:
        folder = Path(place)
        if kind == "inputs":
            outcome = feed(name, folder, count, seed)
        else:
            module = kills if kind == "kills" else processes
            runs = RUNS if kind == "kills" else processes.RUNS
            outcome = module.campaign(runs[name](folder), folder, count, seed)
    return {**outcome._asdict(), "seconds": round(time.perf_counter() - started)}


def main() -> None:
    (options,) = parse_arguments(Options, description=__doc__)
    check_choices(options, domains=RUNS, shards=SHARDS, readers=READERS)
    result: dict = {"kills": {}, "lost": {}, "inputs": {}}
    problems = []
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = {task: pool.submit(work, *task, options.seed) for task in options.tasks()}
        for (kind, name, _), future in futures.items():
            found = result[kind][name] = future.result()
            print(f"{kind:7} {name:15} {json.dumps(found)}", flush=True)
            problems += [f"{kind} {name}: {what}" for what in found.get("differences", found.get("failures", []))]
    if options.output:
        head = {"created": utc_now(), "git": git_state(), "versions": package_versions()}
        write_json_atomic(options.output, {**head, **result})
    if problems:
        print(*problems, sep="\n", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
