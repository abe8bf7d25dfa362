"""Whether copies hide behind the computation, as streams with a clock of their own say."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from streams import Event, Stream

from peft_control.memory.pace import Pace

TOKENS = 100


@pytest.fixture(autouse=True, scope="module")
def events():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(torch.cuda, "Event", Event)
        yield


class Layers:
    """A pace and the streams that it watches."""

    def __init__(self):
        self.pace, self.computing, self.copying = Pace(), Stream(), Stream()
        self.pace.starts_layer(self.computing)

    def run(self, computed, *copies, ends_on=None):
        """One layer: ``computed`` milliseconds, and copies of so many bytes and milliseconds."""
        for size, copied in copies:
            self.copying.wait_stream(self.computing)
            with self.pace.copying(self.copying, size, TOKENS):
                self.copying.time += copied
        self.computing.time += computed
        self.pace.ends_layer(ends_on or self.computing)
        self.computing.wait_stream(self.copying)
        self.pace.starts_layer(self.computing)


def measured(*layers):
    """A pace that has decided; each of ``layers`` is milliseconds and copies."""
    found = Layers()
    for computed, *copies in layers:
        found.run(computed, *copies)
    found.run(1.0, (1, 1.0))  # reads the last
    return found.pace


@given(st.floats(0.01, 100), st.integers(1, 10**9), st.integers(0, 7))
def test_the_second_eight_layers_decide_once(computed, size, place):
    """A single slow one of them stops nothing, and what comes before or after neither."""
    slow, fast = (computed, (size, computed * 1.1)), (computed, (size, computed * 0.9))
    layers = Layers()
    for layer in [slow] * 8 + [fast] * 8:
        layers.run(*layer)
        assert layers.pace.hides(size, TOKENS)
    for layer in [slow] * 20:
        layers.run(*layer)
    assert layers.pace.hides(size, TOKENS) and not layers.pace.hides(2 * size, TOKENS)
    one = [fast] * 8
    one[place] = slow
    assert measured(*[slow] * 8, *one).hides(size, TOKENS)
    one[place - 1] = slow
    assert not measured(*[fast] * 8, *one).hides(size, TOKENS)


def test_what_the_gpu_has_not_done_yet_is_not_read(monkeypatch):
    layers, slow = Layers(), (1000, 2.0)
    monkeypatch.setattr(Event, "finished", False)
    for _ in range(40):
        layers.run(1.0, slow)
    monkeypatch.setattr(Event, "finished", True)
    for _ in range(16):  # the first reads the only one that was waiting
        assert layers.pace.hides(1000, TOKENS)
        layers.run(1.0, slow)
    assert not layers.pace.hides(1000, TOKENS)


def test_where_every_run_must_give_the_same_bits_all_copies_hide(monkeypatch):
    pace = measured(*[(1.0, (1000, 2.0))] * 16)
    assert not pace.hides(1000, TOKENS)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert pace.hides(1000, TOKENS)
