"""Layer states kept in pinned host memory between forward and backward, copied beside the computation."""

from __future__ import annotations

import torch


class HostStates:
    """A stack of tensors: pushed in the forward, popped in the backward in the opposite order.

    Copies run on a stream of their own: a push starts the copy to the host and returns, a pop waits for a copy
    back that the pop before it has started. The pinned buffers are reused from step to step.
    On the CPU the tensors are simply kept.
    """

    def __init__(self):
        self._entries: list[_Entry | None] = []
        self._free: dict[tuple, list[torch.Tensor]] = {}
        self._stream = None

    def push(self, tensor: torch.Tensor) -> int:
        """Keep ``tensor``; return the ticket with which to pop it."""
        if not tensor.is_cuda:
            self._entries.append(_Entry(None, tensor, None))
            return len(self._entries) - 1
        if self._stream is None:
            self._stream = torch.cuda.Stream(tensor.device)
        self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        buffer = self._buffer(tensor)
        with torch.cuda.stream(self._stream):
            buffer.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)
        self._entries.append(_Entry(buffer, None, tensor.device))
        return len(self._entries) - 1

    def pop(self, ticket: int) -> torch.Tensor:
        """Return the tensor of ``ticket`` on its device and start fetching the one below it."""
        entry = self._fetch(ticket)
        if ticket > 0:
            self._fetch(ticket - 1)
        if entry.buffer is not None:
            current = torch.cuda.current_stream(entry.device)
            current.wait_event(entry.arrived)
            entry.tensor.record_stream(current)
            self._free.setdefault(_key(entry.buffer), []).append(entry.buffer)
        tensor = entry.tensor
        self._entries[ticket] = None
        while self._entries and self._entries[-1] is None:
            self._entries.pop()
        return tensor

    def clear(self) -> None:
        """Forget what a forward without a backward has left."""
        for entry in self._entries:
            if entry is not None and entry.buffer is not None:
                self._free.setdefault(_key(entry.buffer), []).append(entry.buffer)
        self._entries.clear()

    def _fetch(self, ticket):
        entry = self._entries[ticket]
        if entry is not None and entry.tensor is None:
            with torch.cuda.stream(self._stream):
                entry.tensor = entry.buffer.to(entry.device, non_blocking=True)
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
