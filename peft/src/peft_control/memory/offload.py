"""Layer states kept in pinned host memory between forward and backward, copied beside the computation."""

from __future__ import annotations

import weakref
from bisect import bisect_left

import torch

# public in the torch that is pinned here, not yet in 2.11
_empty_host_cache = getattr(torch.accelerator.memory, "empty_host_cache", None) or getattr(
    torch._C, "_host_emptyCache", None
)

#: Beside the states themselves, a host is given what saves computing only until so much waits there.
_SPARE_BYTES = 8 << 30


class HostStates:
    """Tensors pushed in the forward and popped in the backward, mostly in the opposite order.

    Copies run on a stream of their own. ``push`` starts the copies to the host, ``settle`` lets the computation wait for
    them, after which the tensors may go; ``pop`` waits for copies back that the pop before it has started. Memory on the
    device is taken and given back by the computing stream alone, so that the allocator reuses it at once, within
    CUDA graphs too. The pinned buffers are reused from step to step by tensors of any shape: there are as many as tensors
    at a time. On the CPU the tensors are simply kept.
    """

    def __init__(self):
        self._last = _nothing  # what was pushed last of what was not popped
        self._held = 0  # bytes
        # Buffers of bytes, those that CUDA graphs copy into apart: a replay writes to them at any time.
        self._free: dict[bool, list[torch.Tensor]] = {False: [], True: []}
        self._leaving: list[tuple] = []
        self._stream = None

    def __deepcopy__(self, memo):
        return HostStates()

    def __reduce__(self):
        return HostStates, ()

    def has_room(self, *tensors: torch.Tensor) -> bool:
        """Whether with ``tensors`` there would still be no more here than what a host surely has to spare."""
        return self._held + sum(_buffer_size(tensor) for tensor in tensors) <= _SPARE_BYTES

    def push(self, *tensors: torch.Tensor) -> Waiting:
        """Keep ``tensors``, which must not change before ``settle``, until they are popped or nobody holds what is
        returned."""
        waiting = Waiting(self._last)
        self._last = weakref.ref(waiting)
        device, captured, buffers = tensors[0].device, False, []
        if device.type == "cuda":
            if self._stream is None:
                self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))
            captured = torch.cuda.is_current_stream_capturing()
            buffers = [self._buffer(_buffer_size(tensor), captured) for tensor in tensors]
            waiting.device, waiting.places = (
                device,
                [
                    buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                    for buffer, tensor in zip(buffers, tensors)
                ],
            )
            with torch.cuda.stream(self._stream):
                for place, tensor in zip(waiting.places, tensors):
                    place.copy_(tensor, non_blocking=True)
            self._leaving.append((tensors, self._stream.record_event()))
        else:
            waiting.tensors = list(tensors)
        size = sum(map(_buffer_size, tensors))
        self._held += size
        waiting.release = weakref.finalize(waiting, self._release, size, buffers, captured, waiting.fetched)
        waiting.release.atexit = False
        return waiting

    def settle(self) -> None:
        """Let the computation wait for the copies that the pushes since the last time have started."""
        for tensors, copied in self._leaving:
            torch.cuda.current_stream(tensors[0].device).wait_event(copied)
        self._leaving.clear()

    def pop(self, waiting: Waiting) -> list[torch.Tensor]:
        """Return the tensors on their device and start fetching what was pushed before them."""
        tensors = self._fetch(waiting)
        if waiting.arrived is not None:
            torch.cuda.current_stream(waiting.device).wait_event(waiting.arrived)
        waiting.fetched.clear()
        waiting.release()
        below = waiting.below()
        if below is not None:
            self._fetch(below)
        if self._last() is waiting:
            self._last = waiting.below
        waiting.tensors = waiting.places = None
        return tensors

    def _fetch(self, waiting):
        if waiting.tensors is None and waiting.places is not None:
            waiting.tensors = [torch.empty_like(place, device=waiting.device) for place in waiting.places]
            # what used this memory before may still run
            self._stream.wait_stream(torch.cuda.current_stream(waiting.device))
            with torch.cuda.stream(self._stream):
                for tensor, place in zip(waiting.tensors, waiting.places):
                    tensor.copy_(place, non_blocking=True)
            waiting.arrived = self._stream.record_event()
            waiting.fetched.append(waiting.device)
        return waiting.tensors

    def _release(self, size, buffers, captured, fetched):
        self._held -= size
        self._free[captured] += buffers
        for device in fetched:  # and never popped: the memory that the copy writes to is about to be free
            torch.cuda.current_stream(device).wait_stream(self._stream)

    def _buffer(self, size, captured):
        """The smallest free buffer of at least ``size`` bytes, or a new one in the place of one that is too small."""
        # A buffer just given back may still be read by its copy; the copy into it runs on the same stream.
        for free in (self._free[True], self._free[False]) if captured else (self._free[False],):
            free.sort(key=torch.numel)
            at = bisect_left(free, size, key=torch.numel)
            if at < len(free):
                return free.pop(at)
        if self._free[False] and not captured:
            del self._free[False][0]
            _empty_host_cache()  # torch would keep it, and a search for the longest sequence fill the host
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def _buffer_size(tensor):
    """Bytes of a power of two, as torch allocates pinned memory."""
    return 1 << (max(tensor.nbytes, 1) - 1).bit_length()


def _nothing():
    """A weak reference's answer when what it referred to is gone."""


class Waiting:
    """Tensors on the host, to be popped."""

    def __init__(self, below):
        self.below = below
        self.tensors = self.places = self.device = self.arrived = self.release = None
        self.fetched = []  # the device, while a copy back to it is under way
