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


@given(st.floats(0.01, 100), st.integers(1, 10**9))
def test_a_single_slow_copy_of_eight_stops_none(computed, size):
    layers, slow, fast = Layers(), (size, computed * 1.1), (size, computed * 0.9)

    def hides(*copies):
        for copy in copies:
            layers.run(computed, copy)
        return layers.pace.hides(size, TOKENS)

    assert hides() and hides(slow)
    assert hides(fast) and hides(*[fast] * 5)
    assert not hides(slow)  # two of eight
    assert hides(fast)  # the first of them is forgotten
    assert not hides(*[slow] * 20)
    assert not hides(*[fast] * 6) and hides(fast)


def test_a_layers_copies_count_together_and_pauses_between_them_do_not():
    layers = Layers()
    for _ in range(2):
        layers.run(10.0, (700, 1.0), (500, 5.0))  # 200 bytes a millisecond, so 2,000 in the layer
    assert layers.pace.hides(2000, TOKENS) and not layers.pace.hides(2001, TOKENS)
    assert layers.pace.hides(3900, 2 * TOKENS) and not layers.pace.hides(1100, TOKENS // 2)


def test_only_whole_layers_are_timed():
    for cut in (True, False):
        layers, slow = Layers(), (1000, 2.0)
        layers.pace.interrupt()  # of a first layer nobody has seen the start
        layers.run(1.0, slow)
        for _ in range(3):
            if cut:
                layers.pace.interrupt()
            layers.run(1.0, slow)
            layers.run(1.0, slow, ends_on=Stream() if cut else None)
            layers.pace.interrupt()
            layers.pace.starts_layer(layers.computing)
            layers.run(1.0)  # no copies
        assert layers.pace.hides(1000, TOKENS) == cut


def test_what_the_gpu_has_not_done_yet_is_not_read(monkeypatch):
    layers, slow = Layers(), (1000, 2.0)
    monkeypatch.setattr(Event, "finished", False)
    for _ in range(5):
        layers.run(1.0, slow)
    assert layers.pace.hides(1000, TOKENS)
    monkeypatch.setattr(Event, "finished", True)
    layers.run(1.0, slow)  # reads the only one that was waiting
    assert layers.pace.hides(1000, TOKENS)
    layers.run(1.0, slow)
    assert not layers.pace.hides(1000, TOKENS)


def test_where_every_run_must_give_the_same_bits_all_copies_hide(monkeypatch):
    layers = Layers()
    for _ in range(4):
        layers.run(1.0, (1000, 2.0))
    assert not layers.pace.hides(1000, TOKENS)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert layers.pace.hides(1000, TOKENS)
