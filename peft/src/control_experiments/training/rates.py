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


def choose_rate(scores: dict[float, float | None], file: Path, model: str, task: str, method: str) -> float | None:
    """The learning rate with the best score, the smallest of equals; None if all diverged.

    Scores and choice are also noted in `file`, where what is noted of other tasks and methods stays. Several processes may
    do so at once.

    Args:
        scores: learning rate -> score, or None if the training diverged; of finished runs alone.

    Raises UserError: `file` is broken.
    """
    found = {rate: score for rate, score in scores.items() if score is not None}
    chosen = max(found, key=lambda rate: (found[rate], -rate), default=None)
    file.parent.mkdir(parents=True, exist_ok=True)
    with (file.parent / ".lock").open("w") as lock:
        # else another process's entry could be lost between reading and writing
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            noted = {(entry["task"], entry["method"]): entry for entry in (read_json(file)["rates"] if file.is_file() else ())}
        except (UserError, LookupError, TypeError) as error:
            again = "delete it and run again; the finished runs beside it are not repeated"
            raise UserError(f"{file} is broken ({error}): {again}") from error
        tried = {str(rate): score for rate, score in scores.items()}
        noted[task, method] = {"task": task, "method": method, "chosen": chosen and str(chosen), "scores": tried}
        contents = {"model": model, "held out of": "the training data", "rates": [noted[key] for key in sorted(noted)]}
        write_json_atomic(file, contents)
    return chosen
