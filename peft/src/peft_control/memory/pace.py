"""Whether copies to the host hide behind the computation, as measured while training."""

from __future__ import annotations

import math
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

# Of so many measurements the lowest but one counts: copies of several GPUs that hold each other up do not start again as
# soon as they stop, and a single hindrance stops none.
_WINDOW = 8


class Pace:
    """How many bytes a token travel to the host during a layer's forward, from one layer at a time.

    The events that say so are read when the GPU has come to them; nothing waits for them.
    """

    def __init__(self):
        self._bytes_per_token = deque(maxlen=_WINDOW)
        self._timing: Sample | None = None
        self._timed: Sample | None = None

    def hides(self, size: int, tokens: int) -> bool:
        """Whether a layer of so many tokens computes for as long as ``size`` bytes travel; True until it is known.

        Where every run must give the same bits nothing may depend on what was measured.
        """
        known = len(self._bytes_per_token) > 1 and not torch.are_deterministic_algorithms_enabled()
        return not known or size <= sorted(self._bytes_per_token)[1] * tokens

    def interrupt(self) -> None:
        """Something else than one layer is computed between the calls before and after this one."""
        self._timing = None

    def starts_layer(self, stream: torch.cuda.Stream) -> None:
        """The computing stream starts on a layer."""
        if self._read():
            self._timing = Sample(stream, _event(stream))

    @contextmanager
    def copying(self, stream: torch.cuda.Stream, size: int, tokens: int):
        """Within, ``stream`` copies ``size`` bytes of that layer, which has so many tokens, to the host."""
        if self._timing is None:
            yield
            return
        started = _event(stream)
        yield
        self._timing.tokens = tokens
        self._timing.copies.append((size, started, _event(stream)))

    def ends_layer(self, stream: torch.cuda.Stream) -> None:
        """The computing stream has come to the end of the layer and has not waited for copies yet."""
        timing, self._timing = self._timing, None
        if timing is not None and timing.copies and timing.stream == stream:
            timing.ended, self._timed = _event(stream), timing

    def _read(self):
        """Whether the GPU has come to the end of what was timed last, which then counts."""
        timed = self._timed
        if timed is None:
            return True
        if not all(event.query() for event in (timed.ended, *(ended for *_, ended in timed.copies))):
            return False
        self._timed = None
        computed = timed.started.elapsed_time(timed.ended)
        copied = sum(started.elapsed_time(ended) for _, started, ended in timed.copies)
        size = sum(size for size, *_ in timed.copies)
        self._bytes_per_token.append(size * computed / copied / timed.tokens if copied > 0 else math.inf)
        return True


@dataclass
class Sample:
    """Events around a layer's forward on its stream, and around its copies."""

    stream: torch.cuda.Stream
    started: torch.cuda.Event
    ended: torch.cuda.Event | None = None
    tokens: int = 0
    copies: list[tuple] = field(default_factory=list)


def _event(stream):
    return stream.record_event(torch.cuda.Event(enable_timing=True))
