"""Layer states kept in pinned host memory between forward and backward, copied beside the computation."""

from __future__ import annotations

import os
import weakref
from bisect import bisect_left, insort
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from .pace import Pace

# public in the torch that is pinned here, not yet in 2.11
_empty_host_cache = getattr(torch.accelerator.memory, "empty_host_cache", None) or getattr(torch._C, "_host_emptyCache", None)

#: Beside the states themselves, a host is given what saves computing only until so much waits there.
_SPARE_BYTES = 8 << 30

#: Of the memory that a host has to spare before the first state waits there, its processes take so much together at most.
_SHARE = 0.75

#: Tensors wait in pieces of so many bytes, which tensors of all lengths share. What is left of each takes a power of two, as
#: torch allocates pinned memory, which for a whole tensor would be up to twice its size.
_PIECE = 32 << 20

# Where tensors are copied from.
_COPIED_FROM = "cuda"


class HostStates:
    """Tensors pushed in the forward and popped in the backward, mostly in the opposite order.

    Copies run on a stream of their own. ``push`` starts the copies to the host, ``settle`` lets the computation wait for
    them, after which the tensors may go; ``pop`` waits for copies back that the pop before it has started. Memory on the
    device is taken and given back by the computing stream alone, so that the allocator reuses it at once, within
    CUDA graphs too. The pinned buffers are reused from step to step by tensors of any shape: there are as many as pieces of
    tensors at a time. On the CPU the tensors are simply kept.

    ``layers``: how many have a state that is to wait here before anything else may. ``paced``: whether what spares computing
    may wait only where its copies hide behind the computation, as measured, see ``pace.py``.
    """

    def __init__(self, layers: int = 0, paced: bool = False):
        self._layers, self._pace = layers, Pace() if paced else None
        self._last = _nothing  # what was pushed last of what was not popped
        self._held = self._extra = 0  # bytes: all, and those that are no layer's own state
        self._limit = None
        # Buffers of bytes, those that CUDA graphs copy into apart: a replay writes to them at any time.
        self._free: dict[bool, list[torch.Tensor]] = {False: [], True: []}
        self._returned: dict[bool, list[torch.Tensor]] = {False: [], True: []}
        self._leaving: list[tuple] = []
        self._stream = None

    def __deepcopy__(self, memo):
        return HostStates(self._layers, self._pace is not None)

    def __reduce__(self):
        return HostStates, (self._layers, self._pace is not None)

    def has_room(self, state: torch.Tensor, *more: torch.Tensor) -> bool:
        """Whether with these of one layer there would still be no more here than what a host surely has to spare."""
        extra = sum(map(_buffer_size, more))
        small = self._held + _buffer_size(state) + extra <= _SPARE_BYTES
        return small and self._fits(_buffer_size(state), extra)

    def room_for(self, state: torch.Tensor) -> int:
        """How many tensors like a layer's ``state`` may wait here for that layer: 2, 1 or, where the host is full, 0.

        One always may, so that a slow host costs time and no memory of the GPU's."""
        size = _buffer_size(state)
        two = self._fits(size, size) and self.hides(state, state)
        return 2 if two else int(self._fits(size, 0, layers=0))

    def has_room_beside(self, state: torch.Tensor, *more: torch.Tensor) -> bool:
        """Whether ``more`` may wait here for a layer whose ``state`` does already."""
        extra = sum(map(_buffer_size, more))
        return self._fits(0, extra, state=_buffer_size(state)) and self.hides(state, *more)

    def hides(self, *tensors: torch.Tensor) -> bool:
        """Whether a layer's forward takes as long as the copies of these, of which the first is its state."""
        return self._pace is None or self._pace.hides(sum(t.nbytes for t in tensors), _tokens(tensors[0]))

    def _fits(self, size, extra, layers=None, state=None):
        """Whether ``extra`` bytes leave room for a state of ``size`` bytes, now and (or of ``state``) in each of
        ``layers``."""
        if self._limit is None:
            self._limit = _SHARE * _free_memory() / _local_processes()
        layers, state = self._layers if layers is None else layers, size if state is None else state
        return max(self._held + size, self._extra + layers * state) + extra <= self._limit

    def push(self, *tensors: torch.Tensor, own: int = 1) -> Waiting:
        """Keep ``tensors``, which must not change before ``settle``, until they are popped or nobody holds what is
        returned. The first ``own`` of them are a layer's own state."""
        waiting = Waiting(self._last)
        self._last = weakref.ref(waiting)
        device, captured, buffers = tensors[0].device, False, []
        if device.type == _COPIED_FROM:
            tensors = [tensor.contiguous() for tensor in tensors]
            if self._stream is None:
                self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))
            captured = torch.cuda.is_current_stream_capturing()
            waiting.device, waiting.places = device, [self._place(tensor, captured) for tensor in tensors]
            with torch.cuda.stream(self._stream), self._timed(tensors, waiting.below() is None):
                for tensor, place in zip(tensors, waiting.places):
                    for piece, buffer in zip(_pieces(tensor), place.buffers):
                        buffer[: len(piece)].copy_(piece, non_blocking=True)
            self._leaving.append((tensors, self._stream.record_event()))
            buffers = [buffer for place in waiting.places for buffer in place.buffers]
        else:
            waiting.tensors = list(tensors)
        sizes = sum(map(_buffer_size, tensors)), sum(map(_buffer_size, tensors[own:]))
        self._held, self._extra = self._held + sizes[0], self._extra + sizes[1]
        waiting.release = weakref.finalize(waiting, self._release, sizes, buffers, captured, waiting.fetched)
        waiting.release.atexit = False
        return waiting

    def _timed(self, tensors, first):
        """A context of the copies of these to the host, ``first`` of all."""
        if self._pace is None:
            return nullcontext()
        if first:
            self._pace.interrupt()  # the loss and the backward were computed before
        return self._pace.copying(self._stream, sum(t.nbytes for t in tensors), _tokens(tensors[0]))

    def settle(self) -> None:
        """At the end of a layer, let the computation wait for the copies that it has started."""
        if not self._leaving:
            if self._pace is not None:
                self._pace.interrupt()
            return
        timed = self._pace is not None and not torch.cuda.is_current_stream_capturing()
        stream = torch.cuda.current_stream(self._leaving[-1][0][0].device)
        if timed:
            self._pace.ends_layer(stream)
        for tensors, copied in self._leaving:
            torch.cuda.current_stream(tensors[0].device).wait_event(copied)
        self._leaving.clear()
        if timed:
            self._pace.starts_layer(stream)

    def pop(self, waiting: Waiting, fetch_next: bool = True) -> list[torch.Tensor]:
        """Return the tensors on their device and start fetching what was pushed before them, now or by ``fetch_below``."""
        tensors = self._fetch(waiting)
        if waiting.arrived is not None:
            torch.cuda.current_stream(waiting.device).wait_event(waiting.arrived)
        waiting.fetched.clear()
        waiting.release()
        if fetch_next:
            self.fetch_below(waiting)
        if self._last() is waiting:
            self._last = waiting.below
        waiting.tensors = waiting.places = None
        return tensors

    def fetch_below(self, waiting: Waiting) -> None:
        below = waiting.below()
        if below is not None:
            self._fetch(below)

    def _fetch(self, waiting):
        if waiting.tensors is None and waiting.places is not None:
            waiting.tensors = [torch.empty(place.shape, dtype=place.dtype, device=waiting.device) for place in waiting.places]
            # what used this memory before may still run
            self._stream.wait_stream(torch.cuda.current_stream(waiting.device))
            with torch.cuda.stream(self._stream):
                for tensor, place in zip(waiting.tensors, waiting.places):
                    for piece, buffer in zip(_pieces(tensor), place.buffers):
                        piece.copy_(buffer[: len(piece)], non_blocking=True)
            waiting.arrived = self._stream.record_event()
            waiting.fetched.append(waiting.device)
        return waiting.tensors

    def _release(self, sizes, buffers, captured, fetched):
        self._held, self._extra = self._held - sizes[0], self._extra - sizes[1]
        self._returned[captured] += buffers  # not sorted in here: the collector may call this at any time
        for device in fetched:  # and never popped: the memory that the copy writes to is about to be free
            torch.cuda.current_stream(device).wait_stream(self._stream)

    def _place(self, tensor, captured):
        return Place(tensor.shape, tensor.dtype, [self._buffer(size, captured) for size in _sizes(tensor)])

    def _buffer(self, size, captured):
        """The smallest free buffer of at least ``size`` bytes, or a new one in the place of one that is too small."""
        # A buffer just given back may still be read by its copy; the copy into it runs on the same stream.
        for kind, returned in self._returned.items():
            while returned:
                insort(self._free[kind], returned.pop(0), key=torch.numel)
        for free in (self._free[True], self._free[False]) if captured else (self._free[False],):
            at = bisect_left(free, size, key=torch.numel)
            if at < len(free):
                return free.pop(at)
        if self._free[False] and not captured:
            del self._free[False][0]
            _empty_host_cache()  # torch would keep it, and a search for the longest sequence fill the host
        return _pinned(size)


#: Where Linux tells of control groups, and of those that this process is in.
_GROUPS, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def _free_memory() -> int:
    """Bytes that the host has to spare, or the tightest of the control groups (container, Slurm job) around this process."""
    free = psutil.virtual_memory().available
    for group, names in _memory_groups():
        most, used, cached = names
        try:
            limit, now = (int((group / name).read_text()) for name in (most, used))
            parts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            free = min(free, limit - now + sum(int(parts[f"{cached}{kind}_file"]) for kind in ("inactive", "active")))
        except (OSError, ValueError, KeyError):  # the group does not exist here, or has no limit
            continue
    return max(free, 0)


def _memory_groups():
    """The folder of each control group of memory around this process, and the names of its files (versions 2 and 1)."""
    two, one = (("memory.max", "memory.current", ""), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"))
    try:
        lines = [line.split(":", 2) for line in _OWN_GROUPS.read_text().splitlines()]
    except OSError:  # no Linux
        return
    for _, controllers, path in lines:
        if controllers and "memory" not in controllers.split(","):
            continue
        root, names = (_GROUPS / "memory", one) if controllers else (_GROUPS, two)
        inner = Path(path.strip("/"))
        for folder in (inner, *inner.parents) if inner.parts else (inner,):
            yield root / folder, names


def _local_processes():
    """How many processes of this run there are on the host, as torchrun, Slurm or MPI say."""
    for name in ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_NTASKS_PER_NODE"):
        if os.environ.get(name, "").isdigit():
            return max(int(os.environ[name]), 1)
    return 1


def _pinned(size):
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def _pieces(tensor):
    """The bytes of a contiguous tensor, piece by piece."""
    return tensor.view(-1).view(torch.uint8).split(_PIECE)


def _sizes(tensor):
    """The bytes of the buffers for a tensor's pieces."""
    pieces, rest = divmod(max(tensor.nbytes, 1), _PIECE)
    return [_PIECE] * pieces + ([1 << (rest - 1).bit_length()] if rest else [])


def _tokens(state):
    return state.numel() // state.shape[-1]


def _buffer_size(tensor):
    return sum(_sizes(tensor))


def _nothing():
    """A weak reference's answer when what it referred to is gone."""


class Place(NamedTuple):
    """Where a tensor waits, piece by piece."""

    shape: torch.Size
    dtype: torch.dtype
    buffers: list[torch.Tensor]


class Waiting:
    """Tensors on the host, to be popped."""

    def __init__(self, below):
        self.below = below
        self.tensors = self.places = self.device = self.arrived = self.release = None
        self.fetched = []  # the device, while a copy back to it is under way
