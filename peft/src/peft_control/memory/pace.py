"""Whether copies to the host hide behind the computation, as measured in the first steps."""

from __future__ import annotations

import logging
from contextlib import contextmanager

import torch

logger = logging.getLogger(__name__)

#: Layers that are timed and do not count: kernels are still compiled, and the first memory is taken.
_SKIPPED = 8

#: A computation that waits for copies for less than this share of a layer's forward would lose more time by computing again
#: what they bring back: attention's half of a layer is about a third.
_WORTH = 0.25

#: Of so many layers after them the longest wait but one counts: a single hindrance does not.
_COUNTED = 8


class Pace:
    """Whether the computing stream waits too long for the copies of a layer, decided once.

    The events that say so are read when the GPU has come to them; nothing waits for them.
    """

    def __init__(self):
        self._hides, self._decided = True, False
        self._began: tuple[torch.cuda.Stream, torch.cuda.Event] | None = None  # where and when the layer that runs did
        self._layers: list[tuple[torch.cuda.Event, torch.cuda.Event, torch.cuda.Event]] = []

    @property
    def hides(self) -> bool:
        """Whether copies hide; True until it is decided, and where every run must give the same bits."""
        return self._hides or torch.are_deterministic_algorithms_enabled()

    def interrupt(self) -> None:
        """Something else than one layer is done between two calls of :meth:`waiting`."""
        self._began = None

    @contextmanager
    def waiting(self, stream: torch.cuda.Stream):
        """Within, the computing ``stream``, which has come to the end of a layer, waits for the copies of that layer."""
        if self._decided:
            yield
            return
        computed = _event(stream)
        yield
        copied = _event(stream)
        if self._began is not None and self._began[0] == stream and len(self._layers) < _SKIPPED + _COUNTED:
            self._layers.append((self._began[1], computed, copied))
        self._began = stream, copied
        if len(self._layers) == _SKIPPED + _COUNTED and self._layers[-1][-1].query():
            self._decide()

    def _decide(self):
        times = [(began.elapsed_time(computed), computed.elapsed_time(copied)) for began, computed, copied in self._layers]
        waits = sorted(copied / max(computed, 1e-3) for computed, copied in times[_SKIPPED:])
        self._hides, self._decided = waits[-2] <= _WORTH, True
        self._layers.clear()
        logger.info(
            "a layer waits for its copies to the host for %.0f %% of its time: %s", 100 * waits[-2],
            "what spares computing waits on the host" if self._hides else "what spares computing is not copied from here on",
        )  # fmt: skip


def _event(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    stream.record_event(event)
    return event
