"""Where the repository is, and how a path is written down for others to read."""

from __future__ import annotations

import os
from pathlib import Path

#: Root of the checkout. The experiments run from a checkout (`pip install -e peft`), never from a wheel.
REPOSITORY = Path(__file__).resolve().parents[3]
RESULTS = REPOSITORY / "results"
#: Folder below a domain's results for the runs that choose learning rates; their scores are not of test sets.
SEARCH_FOLDER = "learning_rate_search"


def public_path(path: str | os.PathLike) -> str:
    """A path that tells nothing about the machine: relative to the repository when inside it, else its last part."""
    resolved = Path(path).expanduser().resolve()
    if resolved.is_relative_to(REPOSITORY):
        return resolved.relative_to(REPOSITORY).as_posix()
    return resolved.name or "/"


def cache_folder() -> Path:
    """What is fetched or made once for all runs: $PARALLEL_CONTROL_CACHE, else ~/.cache/parallel-control."""
    cache = os.environ.get("PARALLEL_CONTROL_CACHE") or Path.home() / ".cache" / "parallel-control"
    return Path(cache).expanduser().resolve()
