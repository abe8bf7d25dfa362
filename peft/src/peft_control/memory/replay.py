"""Random numbers that a backward draws once more, eagerly and within CUDA graphs."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import torch
from torch import nn


class Still:
    """Nothing is drawn: ``first`` wraps a forward and ``again`` its backward."""

    first = again = staticmethod(nullcontext)


class Drawn(Still):
    """What a forward draws from here on, to be drawn ``again`` in its backward."""

    def __init__(self, device: torch.device):
        self.devices = [device] if device.type == "cuda" else []
        self.states = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self.devices)]

    @contextmanager
    def again(self):
        """Draw as the forward did, and leave the generators as they are."""
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.states[0])
            for state, device in zip(self.states[1:], self.devices):
                torch.cuda.set_rng_state(state, device)
            yield


class Twins(Still):
    """Two states of the GPU's generator in step: one for a layer's forward in a graph, one for the graph of its backward.

    A captured kernel draws from the state that its capture ran with, at an offset that each replay moves on. So both
    graphs draw the same numbers as long as their states take turns; ``align`` brings them back in step.
    """

    def __init__(self, device: torch.device, number: int):
        self.generator = torch.cuda.default_generators[device.index]
        self.forward, self.backward = self.generator.clone_state(), self.generator.clone_state()
        seed = (self.generator.initial_seed() + 0x9E3779B97F4A7C15 * (number + 1)) % (1 << 63)
        for state in (self.forward, self.backward):
            state.manual_seed(seed)  # layers must not draw each other's numbers

    def align(self) -> None:
        self.backward.set_offset(self.forward.get_offset())

    def first(self):
        return self._drawing_from(self.forward)

    def again(self):
        return self._drawing_from(self.backward)

    @contextmanager
    def _drawing_from(self, state):
        before = self.generator.graphsafe_get_state()
        self.generator.graphsafe_set_state(state)
        try:
            yield
        finally:
            self.generator.graphsafe_set_state(before)


_captured: dict[nn.Module, Twins] = {}  # not thread-local: autograd's own threads run the backward


@contextmanager
def capturing(twins: dict[nn.Module, Twins]):
    """While a graph is captured, layers draw from their twins."""
    global _captured
    _captured, before = twins, _captured
    try:
        yield
    finally:
        _captured = before


def draw(layer: nn.Module, device: torch.device) -> Still:
    """To be called at the start of a layer's forward that draws random numbers."""
    if device.type == "cuda" and layer in _captured and torch.cuda.is_current_stream_capturing():
        return _captured[layer]
    return Drawn(device)
