"""What a model answered for each test example, kept beside the record whose score it explains.

`outcomes.npz` holds arrays of one length N, in any order:

- `example`: ids as text, the same for every method, seed and machine (a row's number in its test file will do).
- `group`: the test set of each example, where a score is the mean over several; else one empty text.
- `correct`: 1 or 0, or a score between; the record's score is 100 times its mean (within each group, then over groups).
- or, for metrics that are no mean over examples, `prediction` and `label` with `metric`, a name in `METRICS`.

With them `reporting.statistics` pairs methods example by example. Without them it pairs seeds alone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.stats import rankdata

FILE = "outcomes.npz"


def _f1(prediction: np.ndarray, label: np.ndarray) -> np.ndarray:
    found = np.sum(prediction, axis=-1) + np.sum(label, axis=-1)
    return 2 * np.sum(prediction * label, axis=-1) / np.maximum(found, 1)


def _correlation(prediction: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Pearson's, and 0 where one of the two is constant."""
    p, y = (x - np.mean(x, axis=-1, keepdims=True) for x in (prediction, label))
    varies = (np.ptp(prediction, axis=-1) > 0) & (np.ptp(label, axis=-1) > 0)
    size = np.sqrt(np.sum(p * p, axis=-1) * np.sum(y * y, axis=-1))
    return np.where(varies, np.sum(p * y, axis=-1) / np.where(varies, size, 1.0), 0.0)


#: Metric -> (predictions, labels), along the last axis -> score, 1 at best. Matthews correlation of two classes is Pearson's of
#: their numbers.
METRICS = {
    "matthews": _correlation,
    "accuracy and F1": lambda p, y: (np.mean(p == y, axis=-1) + _f1(p, y)) / 2,
    "Pearson and Spearman": lambda p, y: (_correlation(p, y) + _correlation(rankdata(p, axis=-1), rankdata(y, axis=-1))) / 2,
}


def write_outcomes(folder: str | os.PathLike, example: Sequence, correct: Sequence | None = None, *,
                   group: Sequence | str = "", **scored: Sequence | str) -> None:  # fmt: skip
    """Write `outcomes.npz` into a run's folder, atomically; give `correct`, or `prediction`, `label` and `metric`."""
    columns = scored if correct is None else {"correct": np.asarray(correct, np.float32)}
    groups = np.broadcast_to(np.asarray(group, str), len(example))
    path, unfinished = Path(folder) / FILE, Path(folder) / f".{FILE}.partial"
    with unfinished.open("wb") as file:
        np.savez_compressed(file, example=np.asarray(example, str), group=groups, **columns)
    unfinished.replace(path)
