"""quickstart_table.py on records made by hand."""

import pytest

from scripts.tests.conftest import ResultsFolder


@pytest.fixture
def demo(tmp_path):
    """Writes the demonstration's record of a method."""

    def write(method, last, best=None, **more):
        return ResultsFolder(tmp_path).roberta(method, 42, last, best, task="demo", folder=method, **more)

    return write


@pytest.fixture
def shown(call, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    return lambda: call("scripts.quickstart_table", tmp_path / "roberta")


def test_the_table_says_what_the_records_say(demo, shown, tmp_path):
    demo("control", 0.70, 0.72)
    demo("lora", 0.65, seconds=60.4)
    out = " ".join(shown().finished().out.split())
    assert "(not GLUE)" in out and "left out" not in out
    assert "control 0.001 1 1,234 70.00 72.00 100 10.0 100 " in out and "lora 0.001 1 1,234 65.00 65.00 100 60.4 17 " in out
    assert "dora" in out and "no record" in out  # a method that has not run keeps its row
    text = (tmp_path / "roberta" / "table.md").read_text()
    assert "| control | 0.001 | 1 | 1,234 | 70.00 | 72.00 |" in text and "(control/record.json)" in text
    assert (tmp_path / "roberta" / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_broken_folder_is_one_line_and_writes_nothing(demo, shown, tmp_path):
    (tmp_path / "roberta").mkdir()
    assert "holds no run of the demonstration: start scripts/quickstart.sh first" in shown().refused()
    demo("control", 0.7).write_text("{")
    first, last = shown().err.splitlines()
    assert "record.json is no readable run record" in first and last.startswith("error: ") and "holds no run" in last
    assert not list((tmp_path / "roberta").glob("*.*"))
