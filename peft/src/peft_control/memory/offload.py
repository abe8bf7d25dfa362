"""Layer states kept in pinned host memory between forward and backward, copied beside the computation."""

from __future__ import annotations

import logging
import os
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from ..fp8_kernels import quantize_rows
from .pace import Pace

logger = logging.getLogger(__name__)

Event = torch.cuda.Event | torch.Event

#: Beside the states themselves, a host is given what saves computing only until so much waits there.
_SPARE_BYTES = 8 << 30

#: Of the memory that a host has to spare before the first state waits there, its processes take so much together at most.
_SHARE = 0.75

#: What waits together does so in pieces of so many bytes, which tensors of all lengths share. What is left takes a power of
#: two, as torch allocates pinned memory, which for a whole tensor would be up to twice its size.
_PIECE = 32 << 20

# Where tensors are copied from.
_COPIED_FROM = "cuda"


@dataclass(eq=False)
class Waiting:
    """Tensors on the host, to be popped.

    ``below()`` is what was pushed before them, if that is still there. ``release()`` gives back the buffers.
    """

    below: Callable[[], Waiting | None]
    device: torch.device
    release: Callable = lambda: None
    tensors: list[torch.Tensor] | None = None  # where they were never copied or are back
    buffers: list[torch.Tensor] = field(default_factory=list)
    kinds: list[tuple[torch.Size, torch.dtype]] = field(default_factory=list)
    dtype: torch.dtype | None = None  # of a state that waits in FP8
    arrived: Event | None = None  # of the copy back
    fetched: list[tuple[torch.device, torch.cuda.Stream]] = field(default_factory=list)  # device and stream of one under way


class HostStates:
    """Tensors pushed in the forward and popped in the backward, mostly in the opposite order.

    Copies run on a stream of their own. ``push`` starts the copies to the host, ``settle`` lets the computation wait for
    them, after which the tensors may go; ``pop`` waits for copies back that the pop before it has started. Memory on the
    device is taken and given back by the computing stream alone, so that the allocator reuses it at once, within
    CUDA graphs too. The pinned buffers are reused from step to step by tensors of any shape: there are as many as pieces of
    tensors at a time. On the CPU the tensors are simply kept.

    ``layers``: how many have a state that is to wait here before anything else may. ``paced``: whether what spares computing
    may wait only where its copies hide behind the computation, as measured, see ``pace.py``. ``narrow``: states wait in FP8,
    and nothing else waits: computed from other states, it would not fit to them. ``from_tokens``: of layers with fewer tokens
    nothing waits, because streamed weights need the way back.
    """

    from_tokens = 0.0

    def __init__(self, layers: int = 0, paced: bool = False, narrow: bool = False):
        self._layers, self._pace, self._narrow = layers, Pace() if paced else None, narrow
        self._told = 0  # bytes of the largest state of which the log tells
        self._last: Callable[[], Waiting | None] = lambda: None  # what was pushed last of what was not popped
        self._held = self._extra = 0  # bytes: all, and those that are no layer's own state
        self._limit: float | None = None
        # Free buffers by their bytes, those that CUDA graphs copy into apart: a replay writes to them at any time.
        self._free: dict[bool, dict[int, list[torch.Tensor]]] = {False: defaultdict(list), True: defaultdict(list)}
        self._leaving: list[tuple[Sequence[torch.Tensor], Event]] = []
        self._copies: torch.cuda.Stream | None = None

    def __reduce__(self):
        return HostStates, (self._layers, self._pace is not None, self._narrow)

    # -- what may wait here ----------------------------------------------------------------------------------

    def has_room(self, state: torch.Tensor, *more: torch.Tensor) -> bool:
        """Whether with these of one layer there would still be no more here than what a host surely has to spare."""
        size, extra = _buffer_size(state), sum(map(_buffer_size, more))
        fits = self._is_beside_weights(state) and self._held + size + extra <= _SPARE_BYTES and self._fits(size, extra)
        return fits and not self._narrow

    def room_for(self, state: torch.Tensor) -> int:
        """How many tensors like a layer's ``state`` may wait here for that layer: 2, 1 or, where the host is full, 0.

        A slow host never costs memory of the GPU's: one always may, unless streamed weights need the way."""
        size = sum(_sizes(_tokens(state) * (state.shape[-1] + 4) if self._narrow else state.nbytes))
        if state.nbytes > self._told:
            self._tell(state, size)
        if not self._is_beside_weights(state):
            return 0
        two = not self._narrow and self._fits(size, size) and self.hides(state)
        return 2 if two else int(self._fits(size, 0, layers=0))

    def has_room_beside(self, state: torch.Tensor, *more: torch.Tensor) -> bool:
        """Whether ``more`` may wait here for a layer whose ``state`` does already."""
        size, extra = _buffer_size(state), _buffer_size(*more)
        return not self._narrow and self._fits(0, extra, state=size) and self.hides(state)

    def hides(self, state: torch.Tensor) -> bool:
        """Whether copies of more than a layer's own state hide behind what it computes."""
        return self._is_beside_weights(state) and (self._pace is None or self._pace.hides)

    def _is_beside_weights(self, state):
        return _tokens(state) >= self.from_tokens

    def _fits(self, size, extra, layers=None, state=None):
        """Whether ``extra`` bytes leave room for a state of ``size`` bytes, now and (or of ``state``) in each of
        ``layers``."""
        layers, state = self._layers if layers is None else layers, size if state is None else state
        return max(self._held + size, self._extra + layers * state) + extra <= self._most()

    def _most(self) -> float:
        """The most bytes that may be here."""
        if self._limit is None:
            self._limit = _SHARE * _free_memory() / _local_processes()
        return self._limit

    def _tell(self, state, size):
        """Log what will wait where, before the first step and where a later one has twice the tokens."""
        self._told, limit = 2 * state.nbytes, self._most()
        if not self._is_beside_weights(state):
            told = "%d tokens: %d layers' states (%.1f GiB) stay on the GPU, for streamed weights fill the way to it"
            logger.info(told, _tokens(state), self._layers, self._layers * state.nbytes / 2**30)
            return
        here = min(int(limit // size), self._layers)
        twice = 0 if self._narrow else min(int((limit - here * size) // size), here)
        logger.info(
            "%d tokens: %d of %d layers' states (%.1f GiB%s) wait in host memory, which has %.1f GiB to spare; for up to %d of "
            "them so does as much again that spares computing; %.1f GiB of states stay on the GPU",
            _tokens(state), here, self._layers, here * size / 2**30, " in FP8" if self._narrow else "", limit / 2**30, twice,
            (self._layers - here) * state.nbytes / 2**30,
        )  # fmt: skip

    # -- there and back --------------------------------------------------------------------------------------

    def push(self, *tensors: torch.Tensor, own: int = 1) -> Waiting:
        """Keep ``tensors``, which must not change before ``settle``, until they are popped or nobody holds what is
        returned. The first ``own`` of them are a layer's own state."""
        waiting = Waiting(self._last, tensors[0].device)
        self._last = weakref.ref(waiting)
        captured = False
        if self._narrow:
            (state,) = tensors
            waiting.dtype = state.dtype
            rows, scales = quantize_rows(state.reshape(-1, state.shape[-1]))
            tensors = rows.view(state.shape), scales.view(*state.shape[:-1], 1)
        if waiting.device.type == _COPIED_FROM:
            captured = torch.cuda.is_current_stream_capturing()
            waiting.buffers = self._buffers(_sizes(_bytes(tensors)), captured)
        if waiting.buffers:
            if self._pace is not None and waiting.below() is None:
                self._pace.interrupt()  # the loss and the backward were computed before
            tensors = tuple(tensor.contiguous() for tensor in tensors)
            waiting.kinds = [(tensor.shape, tensor.dtype) for tensor in tensors]
            with self._copying(waiting.device) as copies:
                for piece, place in _pieces(tensors, waiting.buffers):
                    place.copy_(piece, non_blocking=True)
            self._leaving.append((tensors, copies.record_event()))
        else:
            waiting.tensors = list(tensors)
        size = sum(map(len, waiting.buffers)) or _buffer_size(*tensors)
        extra = size - _buffer_size(*tensors[:own])
        self._held, self._extra = self._held + size, self._extra + extra
        release = weakref.finalize(waiting, self._release, size, extra, waiting.buffers, captured, waiting.fetched)
        release.atexit = False
        waiting.release = release
        return waiting

    @contextmanager
    def _copying(self, device) -> Iterator[torch.cuda.Stream]:
        """Within, work goes to the copies' stream, after what the computation has done so far."""
        if self._copies is None:
            self._copies = torch.cuda.Stream(device)
        self._copies.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._copies):
            yield self._copies

    def settle(self) -> None:
        """At the end of a layer, let the computation wait for the copies that it has started."""
        if not self._leaving:
            if self._pace is not None:
                self._pace.interrupt()
            return
        stream = torch.cuda.current_stream(self._leaving[-1][0][0].device)
        pace = None if torch.cuda.is_current_stream_capturing() else self._pace
        with nullcontext() if pace is None else pace.waiting(stream):
            for tensors, copied in self._leaving:
                torch.cuda.current_stream(tensors[0].device).wait_event(copied)
        self._leaving.clear()

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
        waiting.tensors, waiting.buffers = None, []
        if waiting.dtype is not None:
            rows, scales = tensors
            return [rows.to(waiting.dtype).mul_(scales.to(waiting.dtype))]
        return tensors

    def fetch_below(self, waiting: Waiting) -> None:
        below = waiting.below()
        if below is not None and below.buffers:
            self._fetch(below)

    def _fetch(self, waiting) -> list[torch.Tensor]:
        if waiting.tensors is None:
            waiting.tensors = [torch.empty(shape, dtype=dtype, device=waiting.device) for shape, dtype in waiting.kinds]
            with self._copying(waiting.device) as copies:  # what used this memory before may still run
                for piece, place in _pieces(waiting.tensors, waiting.buffers):
                    piece.copy_(place, non_blocking=True)
            waiting.arrived = copies.record_event()
            waiting.fetched.append((waiting.device, copies))
        return waiting.tensors

    def _release(self, size, extra, buffers, captured, fetched):
        self._held, self._extra = self._held - size, self._extra - extra
        self._give_back(buffers, captured)
        for device, copies in fetched:  # and never popped: the memory that the copy writes to is about to be free
            torch.cuda.current_stream(device).wait_stream(copies)

    def _buffers(self, sizes, captured):
        """Buffers of such sizes, or none where the system refuses them, whatever it said was free."""
        found = []
        try:
            for size in sizes:
                found.append(self._buffer(size, captured))
        except RuntimeError as error:
            self._give_back(found, captured)
            self._limit = self._held
            reason = str(error).strip().partition("\n")[0]
            logger.warning("the host gives no pinned memory beyond %.1f GiB (%s): what would wait there stays on the GPU",
                           self._held / 2**30, reason)  # fmt: skip
            return []
        return found

    def _buffer(self, size, captured):
        """A free buffer of ``size`` bytes, or a new one."""
        # One just given back may still be read by its copy; the copy into it runs on the same stream.
        for free in (self._free[True], self._free[False]) if captured else (self._free[False],):
            if free[size]:
                return free[size].pop()
        if self._pace is not None:
            self._pace.interrupt()  # by what takes far longer than a layer
        return _pinned(size)

    def _give_back(self, buffers, captured):
        for buffer in buffers:
            self._free[captured][len(buffer)].append(buffer)


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


def _pieces(tensors, buffers):
    """The bytes of contiguous tensors, and their places in the buffers, which are filled one after the other."""
    at = 0
    for tensor in tensors:
        rest = tensor.view(-1).view(torch.uint8)
        while len(rest):
            number, start = divmod(at, _PIECE)
            piece, rest = rest[: _PIECE - start], rest[_PIECE - start :]
            yield piece, buffers[number][start : start + len(piece)]
            at += len(piece)


def _sizes(size):
    """The bytes of the buffers for so many."""
    pieces, rest = divmod(size, _PIECE)
    return [_PIECE] * pieces + ([1 << (rest - 1).bit_length()] if rest else [])


def _tokens(state):
    return state.numel() // state.shape[-1]


def _bytes(tensors):
    return sum(tensor.nbytes for tensor in tensors)


def _buffer_size(*tensors):
    return sum(_sizes(_bytes(tensors)))
