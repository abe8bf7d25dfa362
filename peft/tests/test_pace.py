"""Whether the computation waits for copies, as streams with a clock of their own say."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from streams import Event, Stream

from peft_control.memory.pace import Pace

SLOW, FAST = (1.0, 1.3), (1.0, 1.2)  # milliseconds of a layer, and of its copies: a quarter may be waited for


@pytest.fixture(autouse=True, scope="module")
def events():
    with patch.object(torch.cuda, "Event", Event):
        yield


class Layers:
    """A pace and the stream that it watches."""

    def __init__(self, *layers):
        self.pace, self.stream = Pace(), Stream()
        self.run((0.0, 0.0), *layers)  # when a layer begins is known from the end of the one before

    def run(self, *layers):
        for computed, copied in layers:
            self.stream.time += computed
            with self.pace.waiting(self.stream):
                self.stream.time += max(copied - computed, 0)
        return self.pace.hides


@given(st.integers(0, 7), st.integers(1, 7))
def test_the_second_eight_layers_decide_once(place, apart):
    """A single slow one of them stops nothing, and what comes before or after neither."""
    layers = Layers(*[SLOW] * 8, *[FAST] * 8)
    assert layers.pace.hides and layers.run(*[SLOW] * 20)
    one = [FAST] * 8
    one[place] = SLOW
    assert Layers(*[SLOW] * 8, *one).pace.hides
    one[(place + apart) % 8] = SLOW
    layers = Layers(*[FAST] * 8, *one[:7])
    assert layers.pace.hides
    assert not layers.run(one[7]) and not layers.run(*[FAST] * 20)


def test_what_the_gpu_has_not_done_yet_is_not_read(monkeypatch):
    monkeypatch.setattr(Event, "finished", False)
    layers = Layers(*[SLOW] * 40)
    assert layers.pace.hides
    monkeypatch.setattr(Event, "finished", True)
    assert not layers.run(FAST)


def test_layers_on_different_streams_are_not_timed_together():
    layers = Layers()
    for _ in range(40):
        layers.stream = Stream()
        assert layers.run(SLOW)


def test_where_every_run_must_give_the_same_bits_all_copies_hide(monkeypatch):
    pace = Layers(*[SLOW] * 16).pace
    assert not pace.hides
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert pace.hides
