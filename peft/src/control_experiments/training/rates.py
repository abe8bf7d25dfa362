"""Each method's own learning rate, chosen from one grid by runs that are scored on held-out training data."""

from __future__ import annotations

import fcntl
from pathlib import Path

from ..errors import UserError
from ..record import read_json, write_json_atomic

#: Folder below a domain's results for the runs that choose; tables leave it out.
SEARCH_FOLDER = "learning_rate_search"
#: Seed of these runs, which no table has.
SEARCH_SEED = 0


def choose_rates(scores: dict[tuple[str, str], dict[str, float | None]], file: Path, model: str) -> dict[tuple[str, str], str]:
    """(task, method) -> the learning rate with the best score, the smallest of equals.

    Scores and choices are also noted in `file`, where what is noted of other tasks and methods stays. Several processes may
    do so at once.

    Args:
        scores: (task, method) -> learning rate -> score, or None if the training diverged; of finished runs alone.

    Raises UserError: `file` is broken.
    """
    chosen, entries = {}, {}
    for key, tried in scores.items():
        found = {rate: score for rate, score in tried.items() if score is not None}
        if found:
            chosen[key] = max(found, key=lambda rate: (found[rate], -float(rate)))
        entries[key] = {"task": key[0], "method": key[1], "chosen": chosen.get(key), "scores": tried}
    file.parent.mkdir(parents=True, exist_ok=True)
    with (file.parent / ".lock").open("w") as lock:
        # else another process's entry could be lost between reading and writing
        fcntl.flock(lock, fcntl.LOCK_EX)
        entries = {**_noted(file), **entries}
        contents = {"model": model, "held out of": "the training data", "rates": [entries[key] for key in sorted(entries)]}
        write_json_atomic(file, contents)
    return chosen


def _noted(file: Path) -> dict[tuple[str, str], dict]:
    if not file.is_file():
        return {}
    try:
        return {(entry["task"], entry["method"]): entry for entry in read_json(file)["rates"]}
    except (UserError, LookupError, TypeError) as error:
        again = "delete it and run again; the finished runs beside it are not repeated"
        raise UserError(f"{file} is broken ({error}): {again}") from error
