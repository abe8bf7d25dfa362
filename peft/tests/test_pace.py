"""Whether copies hide behind the computation, as streams with a clock of their own say."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from streams import Event, Stream

from peft_control.memory.pace import Pace

TOKENS = 100


@pytest.fixture(autouse=True, scope="module")
def events():
    with patch.object(torch.cuda, "Event", Event):
        yield


class Layers(Pace):
    """A pace with the streams that it watches."""

    def __init__(self):
        super().__init__()
        self.computing, self.copies = Stream(), Stream()
        self.starts_layer(self.computing)

    def run(self, *layers):
        """Each is milliseconds of computation, and bytes and milliseconds of a copy beside it; the last is read by one more."""
        for computed, size, copied in layers:
            self.copies.wait_stream(self.computing)
            with self.copying(self.copies, size, TOKENS):
                self.copies.time += copied
            self.computing.time += computed
            self.ends_layer(self.computing)
            self.computing.wait_stream(self.copies)
            self.starts_layer(self.computing)
        return self


@given(st.floats(0.01, 100), st.integers(1, 10**9), st.integers(0, 7))
def test_the_second_eight_layers_decide_once(computed, size, place):
    """A single slow one of them stops nothing, and what comes before or after neither."""
    slow, fast = (computed, size, computed * 1.1), (computed, size, computed * 0.9)
    pace = Layers()
    for layer in [slow] * 8 + [fast] * 8:
        assert pace.run(layer).hides(size, TOKENS)
    pace.run(*[slow] * 20)
    assert pace.hides(size, TOKENS) and not pace.hides(2 * size, TOKENS)
    with patch.object(torch, "are_deterministic_algorithms_enabled", lambda: True):  # nothing may depend on what was measured
        assert pace.hides(2 * size, TOKENS)
    one = [fast] * 8
    one[place] = slow
    assert Layers().run(*[slow] * 8, *one, fast).hides(size, TOKENS)
    one[place - 1] = slow
    assert not Layers().run(*[fast] * 8, *one, fast).hides(size, TOKENS)


def test_what_the_gpu_has_not_done_yet_is_not_read():
    pace, slow = Layers(), (1.0, 1000, 2.0)
    with patch.object(Event, "finished", False):
        pace.run(*[slow] * 40)
    for _ in range(16):  # the first reads the only one that was waiting
        assert pace.hides(1000, TOKENS)
        pace.run(slow)
    assert not pace.hides(1000, TOKENS)
