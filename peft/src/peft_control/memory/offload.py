"""Layer states kept in pinned host memory between forward and backward, copied beside the computation."""

from __future__ import annotations

import torch


class HostStates:
    """A stack of tensors: pushed in the forward, popped in the backward in the opposite order.

    Copies run on a stream of their own. ``push`` starts the copy to the host, ``settle`` lets the computation wait for
    it, after which the tensor may go; ``pop`` waits for a copy back that the pop before it has started. Memory on the
    device is taken and given back by the computing stream alone, so that the allocator reuses it at once, within
    CUDA graphs too. The pinned buffers are reused from step to step. On the CPU the tensors are simply kept.
    """

    def __init__(self):
        self._entries: list[_Entry | None] = []
        self._free: dict[tuple, list[torch.Tensor]] = {}
        self._leaving: list[tuple] = []
        self._stream = None

    def __deepcopy__(self, memo):
        return HostStates()

    def __reduce__(self):
        return HostStates, ()

    def push(self, tensor: torch.Tensor) -> int:
        """Keep ``tensor``, which must not change before ``settle``; return the ticket with which to pop it."""
        if not tensor.is_cuda:
            self._entries.append(_Entry(None, tensor, None))
            return len(self._entries) - 1
        if self._stream is None:
            self._stream = torch.cuda.Stream(tensor.device)
        self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        buffer = self._buffer(tensor)
        with torch.cuda.stream(self._stream):
            buffer.copy_(tensor, non_blocking=True)
        self._leaving.append((tensor, self._stream.record_event()))
        self._entries.append(_Entry(buffer, None, tensor.device))
        return len(self._entries) - 1

    def settle(self) -> None:
        """Let the computation wait for the copies that the pushes since the last time have started."""
        for tensor, copied in self._leaving:
            torch.cuda.current_stream(tensor.device).wait_event(copied)
        self._leaving.clear()

    def pop(self, ticket: int) -> torch.Tensor:
        """Return the tensor of ``ticket`` on its device and start fetching the one below it."""
        entry = self._fetch(ticket)
        if entry.buffer is not None:
            torch.cuda.current_stream(entry.device).wait_event(entry.arrived)
            self._free.setdefault(_key(entry.buffer), []).append(entry.buffer)
        if ticket > 0:
            self._fetch(ticket - 1)
        self._entries[ticket] = None
        while self._entries and self._entries[-1] is None:
            self._entries.pop()
        return entry.tensor

    def _fetch(self, ticket):
        entry = self._entries[ticket]
        if entry is not None and entry.tensor is None:
            entry.tensor = torch.empty(entry.buffer.shape, dtype=entry.buffer.dtype, device=entry.device)
            # what used this memory before may still run
            self._stream.wait_stream(torch.cuda.current_stream(entry.device))
            with torch.cuda.stream(self._stream):
                entry.tensor.copy_(entry.buffer, non_blocking=True)
            entry.arrived = self._stream.record_event()
        return entry

    def _buffer(self, tensor):
        free = self._free.get(_key(tensor))
        # A buffer freed by a pop may still be read by its copy; the copy into it runs on the same stream.
        return free.pop() if free else torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


class _Entry:
    def __init__(self, buffer, tensor, device):
        self.buffer, self.tensor, self.device, self.arrived = buffer, tensor, device, None


def _key(tensor: torch.Tensor) -> tuple:
    return tensor.shape, tensor.dtype
