"""Whether copies hide behind the computation, as streams with a clock of their own say."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from streams import Event, Stream

from peft_control.memory.pace import Pace


@pytest.fixture(autouse=True, scope="module")
def events():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(torch.cuda, "Event", Event)
        yield


@given(st.lists(st.tuples(st.integers(1, 10**9), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3)), min_size=1))
def test_a_single_hindrance_stops_no_copies_and_the_slowest_but_one_counts(samples):
    found = Pace()
    assert found.hides(1 << 60, 1)
    for size, layer, copy in samples:
        computing, copying = Stream(), Stream()
        computing.step, copying.step = layer, copy
        found.starts_layer(computing)
        with found.copying(copying, size, 7):
            pass
        found.ends_layer(computing)
    found.starts_layer(Stream())
    speeds, layers = zip(*((size / copy, layer / 7) for size, layer, copy in samples[-8:]))
    most = 1.1 * sorted(speeds)[:2][-1] * sorted(layers)[:2][-1] * 100
    assert found.hides(int(most * 0.999), 100) and not found.hides(int(most * 1.001) + 1, 100)


def test_only_whole_layers_are_timed():
    found, computing, copying = Pace(), Stream(), Stream()
    with found.copying(copying, 1, 1):  # of a first layer, whose start nobody has seen
        pass
    for cut in (lambda: None, found.interrupt, lambda: found.ends_layer(Stream())):
        found.ends_layer(computing)
        found.starts_layer(computing)
        cut()
        found.ends_layer(computing)
        found.starts_layer(computing)
    assert found.hides(1 << 60, 1)
