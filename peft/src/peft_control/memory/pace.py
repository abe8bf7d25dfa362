"""Whether copies to the host hide behind the computation, as measured in the first steps."""

from __future__ import annotations

import logging
import math
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

logger = logging.getLogger(__name__)

#: Layers that are timed and do not count: kernels are still compiled, and the first memory is taken.
_SKIPPED = 8

#: Of so many layers after them the lowest measurement but one counts: copies of several GPUs that hold each other up count,
#: and a single hindrance does not.
_COUNTED = 8


class Pace:
    """How many bytes a token travel to the host during a layer's forward, from one layer at a time, decided once.

    The events that say so are read when the GPU has come to them; nothing waits for them.
    """

    def __init__(self):
        self._measured: list[float] = []
        self._limit: float | None = None  # bytes a token
        self._timing: Sample | None = None
        self._timed: tuple[Sample, torch.cuda.Event] | None = None

    def hides(self, size: int, tokens: int) -> bool:
        """Whether a layer of so many tokens computes for as long as ``size`` bytes travel; True until it is decided.

        Where every run must give the same bits nothing may depend on what was measured.
        """
        if self._limit is None or torch.are_deterministic_algorithms_enabled():
            return True
        return size <= self._limit * tokens

    def interrupt(self) -> None:
        """Something else than one layer is computed between the calls before and after this one."""
        self._timing = None

    def starts_layer(self, stream: torch.cuda.Stream) -> None:
        """The computing stream starts on a layer."""
        if self._limit is None and self._read():
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
            self._timed = timing, _event(stream)

    def _read(self):
        """Whether another layer is to be timed: the GPU has come to the end of the last one, which then counts."""
        if self._timed is None:
            return True
        timing, ended = self._timed
        if not all(event.query() for event in (ended, *(ended for *_, ended in timing.copies))):
            return False
        self._timed = None
        computed = timing.started.elapsed_time(ended)
        copied = sum(started.elapsed_time(ended) for _, started, ended in timing.copies)
        size = sum(size for size, *_ in timing.copies)
        self._measured.append(size * computed / copied / timing.tokens if copied > 0 else math.inf)
        if len(self._measured) < _SKIPPED + _COUNTED:
            return True
        self._limit = sorted(self._measured[_SKIPPED:])[1]
        logger.info("behind a layer's forward the copies of %.0f bytes a token to the host hide", self._limit)
        return False


@dataclass
class Sample:
    """Events around a layer's forward on its stream, and around its copies."""

    stream: torch.cuda.Stream
    started: torch.cuda.Event
    tokens: int = 0
    copies: list[tuple[int, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)


def _event(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    stream.record_event(event)
    return event
