"""Layer states kept in pinned host memory between forward and backward, copied beside the computation."""

from __future__ import annotations

import weakref
from bisect import bisect_left

import torch

# public in the torch that is pinned here, not yet in 2.11
_empty_host_cache = getattr(torch.accelerator.memory, "empty_host_cache", None) or getattr(
    torch._C, "_host_emptyCache", None
)


class HostStates:
    """Tensors pushed in the forward and popped in the backward, mostly in the opposite order.

    Copies run on a stream of their own. ``push`` starts the copy to the host, ``settle`` lets the computation wait for
    it, after which the tensor may go; ``pop`` waits for a copy back that the pop before it has started. Memory on the
    device is taken and given back by the computing stream alone, so that the allocator reuses it at once, within
    CUDA graphs too. The pinned buffers are reused from step to step by tensors of any shape: there are as many as tensors
    at a time. On the CPU the tensors are simply kept.
    """

    def __init__(self):
        self._last = _nothing  # the tensor pushed last of those that were not popped
        self._free: list[torch.Tensor] = []  # buffers, of bytes
        self._captured: list[torch.Tensor] = []  # what CUDA graphs copy into lives as long as they may
        self._leaving: list[tuple] = []
        self._stream = None

    def __deepcopy__(self, memo):
        return HostStates()

    def __reduce__(self):
        return HostStates, ()

    def push(self, tensor: torch.Tensor) -> Waiting:
        """Keep ``tensor``, which must not change before ``settle``, until it is popped or nobody holds what is returned."""
        waiting = Waiting(self._last)
        self._last = weakref.ref(waiting)
        if not tensor.is_cuda:
            waiting.tensor = tensor
            return waiting
        if self._stream is None:
            self._stream = torch.cuda.Stream(tensor.device)
        self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        buffer = self._buffer(tensor.nbytes)
        if torch.cuda.is_current_stream_capturing():
            self._captured.append(buffer)
        waiting.place = buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        waiting.device, waiting.give_back = (
            tensor.device,
            weakref.finalize(waiting, self._free.append, buffer),
        )
        with torch.cuda.stream(self._stream):
            waiting.place.copy_(tensor, non_blocking=True)
        self._leaving.append((tensor, self._stream.record_event()))
        return waiting

    def settle(self) -> None:
        """Let the computation wait for the copies that the pushes since the last time have started."""
        for tensor, copied in self._leaving:
            torch.cuda.current_stream(tensor.device).wait_event(copied)
        self._leaving.clear()

    def pop(self, waiting: Waiting) -> torch.Tensor:
        """Return the tensor on its device and start fetching the one that was pushed before it."""
        tensor = self._fetch(waiting)
        if waiting.give_back is not None:
            torch.cuda.current_stream(waiting.device).wait_event(waiting.arrived)
            waiting.give_back()
        below = waiting.below()
        if below is not None:
            self._fetch(below)
        if self._last() is waiting:
            self._last = waiting.below
        waiting.tensor = waiting.place = None
        return tensor

    def _fetch(self, waiting):
        if waiting.tensor is None and waiting.place is not None:
            waiting.tensor = torch.empty_like(waiting.place, device=waiting.device)
            # what used this memory before may still run
            self._stream.wait_stream(torch.cuda.current_stream(waiting.device))
            with torch.cuda.stream(self._stream):
                waiting.tensor.copy_(waiting.place, non_blocking=True)
            waiting.arrived = self._stream.record_event()
        return waiting.tensor

    def _buffer(self, size):
        """The smallest free buffer of at least ``size`` bytes, or a new one in the place of one that is too small."""
        # A buffer just given back may still be read by its copy; the copy into it runs on the same stream.
        self._free.sort(key=torch.numel)
        at = bisect_left(self._free, size, key=torch.numel)
        if at < len(self._free):
            return self._free.pop(at)
        if self._free and not torch.cuda.is_current_stream_capturing():
            del self._free[0]
            _empty_host_cache()  # torch would keep it, and a search for the longest sequence fill the host
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def _nothing():
    """A weak reference's answer when what it referred to is gone."""


class Waiting:
    """A tensor on the host, to be popped."""

    def __init__(self, below):
        self.below = below
        self.tensor = self.place = self.device = self.arrived = self.give_back = None
