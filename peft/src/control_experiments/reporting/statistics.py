"""Paired comparisons of control with a baseline: difference, 95 % interval, verdict, and how many more seeds would decide.

The interval of a difference of scores takes two kinds of chance into account:

- Seeds: runs of both methods are paired by seed. The variance of the mean difference over n seeds is s²/n, with n - 1
  degrees of freedom.
- Test examples: where `outcomes.npz` (or a ViT's predictions.csv) lies beside every record, both methods are paired example by example,
  and scipy's bootstrap over examples, seeds kept, gives the variance of the mean difference.

The variances add up, and the interval is Student's with Welch's and Satterthwaite's degrees of freedom. With seeds alone it is the
paired t interval. A bootstrap that resampled seeds too would be too narrow: for three seeds its standard error is √(2/3) of the true
one, and its quantiles are the normal distribution's. Several tasks are pooled as the mean of their differences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from ..errors import UserError
from ..outcomes import FILE, METRICS

SUPPORTED, CONTRADICTED, NOT_DECIDED, NOT_TESTED = "supported", "contradicted", "not decided", "not tested"
CONFIDENCE = 0.95
MARGIN = 1.0  # points: control "loses no quality" if its score is at most this much below the baseline's
REPEATS = 3  # of a time, before it decides anything
RESAMPLES = 1000
_DRAWN = 1 << 21  # examples at once, so that memory is small
MOST_SEEDS = 100  # more than anybody will run


@dataclass
class Test:
    """One comparison.

    Attributes:
        pairs: seed or repeat -> (control, baseline or bound).
        rule: "quality" (non-inferiority), "peak" (deterministic: the worst measurement decides), "time" (an interval of
            at least `REPEATS` repeats) or "share" (`known` is the exact interval).
        unit: of the differences; "%" makes them percent of the baseline.
        sign: +1 if the claim wants a positive difference, -1 if a negative one.
        examples: variance of the mean difference that the choice of test examples causes; None without outcomes.
        floor: score of always answering the most frequent class; None if unknown.
        size: parameters of the model.
        trained: trained parameters of control over the baseline's.
    """

    what: str
    pairs: dict[object, tuple[float, float]]
    rule: str
    unit: str = "%"
    sign: int = -1
    links: list[tuple[str, str]] = field(default_factory=list)
    known: tuple[float, float] | None = None
    examples: float | None = None
    floor: float | None = None
    size: int = 0
    trained: float = 1.0

    @property
    def differences(self) -> np.ndarray:
        one, other = np.array(list(self.pairs.values()), float).T
        return 100 * (one / other - 1) if self.unit == "%" else one - other

    @property
    def below_majority(self) -> bool:
        """Whether not even the better method's mean is above the most frequent class: such a test does not count."""
        means = np.mean(list(self.pairs.values()), axis=0)
        return self.floor is not None and max(means) <= self.floor + 0.005

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of the mean difference; None for fewer than two pairs that have no other."""
        if self.rule == "peak":
            return (self.sign * min(self.sign * self.differences),) * 2
        return self.known or interval([self])

    @property
    def verdict(self) -> str:
        too_few = self.rule == "time" and len(self.pairs) < REPEATS
        return verdict(None if too_few else self.interval, self.sign, MARGIN if self.rule == "quality" else 0)

    @property
    def statistic(self) -> str:
        """Mean difference, its interval and n, for people."""
        n, ends = len(self.pairs), self.interval
        if self.rule == "peak":
            return f"{ends[0]:+,.2f} {self.unit}" + (f" at worst, n = {n}" if n > 1 else "")
        repeats = f"n = {n}" + (f" of {REPEATS} repeats" if self.rule == "time" and n < REPEATS else "")
        text = f"{self.differences.mean():+.2f} {self.unit}"
        if ends is None:
            return f"{text}, {repeats}: no interval"
        return f"{text} [{ends[0]:+.2f}, {ends[1]:+.2f}], {repeats}{'' if self.examples is None else ', by example too'}"


def verdict(ends: tuple[float, float] | None, sign: int = 1, margin: float = MARGIN) -> str:
    """What an interval decides; with a margin it is non-inferiority that is asked for."""
    if ends is None:
        return NOT_DECIDED
    low, high = sorted(sign * end for end in ends)
    return SUPPORTED if low > -margin else CONTRADICTED if high < 0 else NOT_DECIDED


def interval(tests: Sequence[Test], more: int = 0) -> tuple[float, float] | None:
    """The interval of the mean of the tests' differences, as if each had `more` seeds; None if one has a single seed."""
    if not tests or any(len(test.pairs) < 2 for test in tests):
        return None
    parts = []  # variance, degrees of freedom
    for test in tests:
        n = len(test.pairs) + more
        parts.append((test.differences.var(ddof=1) / n / len(tests) ** 2, n - 1))
        if test.examples:
            parts.append((test.examples / len(tests) ** 2, math.inf))
    mean, variance = np.mean([test.differences.mean() for test in tests]), sum(part for part, _ in parts)
    squares = sum(part**2 / degrees for part, degrees in parts)
    degrees = variance**2 / squares if squares else math.inf
    half = stats.t.ppf((1 + CONFIDENCE) / 2, degrees) * math.sqrt(variance)
    return (float(mean - half), float(mean + half))


@dataclass
class Pool:
    """The mean quality of several tests, such as a model's on all tasks; those below the majority class do not count."""

    what: str
    tests: list[Test]

    @property
    def counting(self) -> list[Test]:
        return [test for test in self.tests if not test.below_majority]

    @property
    def interval(self) -> tuple[float, float] | None:
        return interval(self.counting)

    @property
    def verdict(self) -> str:
        return verdict(self.interval)

    @property
    def mean(self) -> float:
        return float(np.mean([test.differences.mean() for test in self.counting]))

    @property
    def statistic(self) -> str:
        if not self.counting:
            return "no test above the majority class"
        ends = self.interval
        n = sorted({len(test.pairs) for test in self.counting})
        over = f"{len(self.counting)} task{'s' * (len(self.counting) > 1)} x {' or '.join(map(str, n))} seed{'s' * (n != [1])}"
        between = f"[{ends[0]:+.2f}, {ends[1]:+.2f}]" if ends else "no interval"
        return f"{self.mean:+.2f} {self.tests[0].unit} {between}, {over}"


def more_seeds(tests: Sequence[Test]) -> str:
    """How many seeds more would decide on quality if differences and spread stayed as they are, for people."""
    counting = [test for test in tests if not test.below_majority]
    if not counting:
        return "no number: below the majority class"
    if any(len(test.pairs) < 2 for test in counting):
        return "two seeds first"
    for more in range(MOST_SEEDS + 1):
        if verdict(interval(counting, more)) != NOT_DECIDED:
            return str(more or "")
    return f"more than {MOST_SEEDS}, or more test examples"


def share_interval(asked: Sequence[int], percent: Sequence[float], bound: float) -> tuple[float, float]:
    """The exact binomial interval of a share, in points above `bound` percent. Repeats ask the same again, so no more of it."""
    agreeing = np.mean(np.multiply(asked, percent)) / 100
    share = stats.binomtest(round(agreeing), round(np.mean(asked))).proportion_ci(CONFIDENCE)
    return (100 * share.low - bound, 100 * share.high - bound)


# -- outcomes of single examples ------------------------------------------------------------------------------


def read_outcomes(folder: Path) -> pd.DataFrame | None:
    """A run's outcomes by test set and example, or None where there are none. Raises UserError: the file is broken."""
    try:
        if (folder / FILE).is_file():
            with np.load(folder / FILE, allow_pickle=False) as file:
                found = pd.DataFrame(dict(file))
        elif (folder / "predictions.csv").is_file():  # of a ViT
            found = pd.read_csv(folder / "predictions.csv", dtype=str, keep_default_na=False).rename(
                columns={"index": "example"}
            )
            found = found[["example"]].assign(group="", correct=(found.predicted == found.true).astype(float))
        else:
            return None
        return found.set_index(["group", "example"]).sort_index()
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"outcomes in {folder} cannot be read ({error}): delete them, or run again") from error


def example_variance(pairs: Sequence[tuple[Path, Path]]) -> float | None:
    """Variance of the mean difference in percent points over test examples, from the folders of (control, baseline) of each
    seed, by scipy's bootstrap within each test set; None unless all have outcomes of the same examples."""
    found = [read_outcomes(folder) for pair in pairs for folder in pair]
    if not found or any(one is None or not one.index.equals(found[0].index) for one in found):
        return None
    names = ["correct"] if "correct" in found[0] else ["prediction", "label"]
    metric = None if "correct" in found[0] else METRICS[found[0].metric.iloc[0]]

    def score(*arrays: np.ndarray, axis: int) -> np.ndarray:
        """Control minus baseline; runs take turns, each with one array for each name."""
        scores = [metric(*arrays[at : at + 2]) for at in range(0, len(arrays), 2)]
        return np.mean(scores[0::2], axis=0) - np.mean(scores[1::2], axis=0)

    variances = []
    for group in found[0].index.unique("group"):
        columns = [one.loc[group][name].to_numpy() for one in found for name in names]
        if not metric:  # a difference of means is the mean of differences
            columns = [np.mean(columns[0::2], axis=0) - np.mean(columns[1::2], axis=0)]
        drawn = stats.bootstrap(
            columns, score if metric else np.mean, paired=True, n_resamples=RESAMPLES, batch=max(1, _DRAWN // len(columns[0])),
            method="percentile", rng=np.random.default_rng(0),
        )  # fmt: skip
        variances.append((100 * drawn.standard_error) ** 2)
    return float(np.sum(variances) / len(variances) ** 2)
