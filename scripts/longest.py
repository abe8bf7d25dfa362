"""The longest sequence whose training step fits within a limit, found in few steps, for GPUs that are lent for minutes.

A step's peak memory is nearly linear in its tokens. So two short steps predict the longest sequence of a limit, and one or
two steps under the limit confirm it. What is reported always ran under its limit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Optional

#: Lengths are multiples of it.
GRAIN = 512
#: A found length is at most this share of itself below one that does not fit, or is predicted not to.
CLOSE = 1 / 32
#: Share of the room over the weights that the first attempt aims at: the rest is what an allocator cannot use.
AIM = 0.985


@dataclass
class Step:
    """A step that went through: its peak in bytes, its seconds, and those of its repeats."""

    peak: int
    seconds: float
    repeats: list[float] = field(default_factory=list)


@dataclass
class Search:
    """Steps of growing lengths, and what was learned of them.

    Attributes:
        run: a step of so many tokens under a limit in GiB (None: the device's own), or None if that is not enough.
        most: the longest sequence that is tried, in tokens.
        static: bytes that are taken before the first step.
    """

    run: Callable[[int, Optional[float]], Optional[Step]]
    most: int
    static: int
    points: dict[int, int] = field(default_factory=dict)

    def attempt(self, tokens: int, limit: float | None) -> Step | None:
        done = self.run(tokens, limit)
        if done:
            self.points[tokens] = done.peak
        return done

    def probe(self, room: int) -> None:
        """Two short steps on a device of so many bytes; the second four to sixteen times as long as the first, if it fits."""
        for tokens in (GRAIN, 2 * GRAIN):  # the optimizer's states exist from the second step on
            if not self.attempt(tokens, None):
                return
        longer = min(32 * GRAIN, self.predict(room) // 2, self.most) // GRAIN * GRAIN
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

    def longest(self, limit: float, good: int = 0) -> tuple[int, Step | None]:
        """The longest sequence within so many GiB, and its step.

        Args:
            good: a length that fits within less; returned, without a step, if nothing longer fits.
        """
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
