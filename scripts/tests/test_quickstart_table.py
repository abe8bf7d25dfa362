"""quickstart_table.py on records made by hand."""

from functools import partial

from scripts.tests.conftest import ResultsFolder


def test_the_table_says_what_the_records_say(call, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown, results = partial(call, "scripts.quickstart_table", tmp_path / "roberta"), ResultsFolder(tmp_path)
    (tmp_path / "roberta").mkdir()
    assert "holds no run of the demonstration: start scripts/quickstart.sh first" in shown().refused()
    results.roberta("control", 42, 0.70, 0.72, task="demo", folder="control")
    results.roberta("lora", 42, 0.65, task="demo", folder="lora", seconds=60.4)
    out = " ".join(shown().finished().out.split())
    assert "(not GLUE)" in out and "left out" not in out
    assert "control 0.001 1 1,234 70.00 72.00 100 10.0 100 " in out and "lora 0.001 1 1,234 65.00 65.00 100 60.4 17 " in out
    assert "dora" in out and "no record" in out  # a method that has not run keeps its row
    text = (tmp_path / "roberta" / "table.md").read_text()
    assert "| control | 0.001 | 1 | 1,234 | 70.00 | 72.00 |" in text and "(control/record.json)" in text
    assert (tmp_path / "roberta" / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    results.roberta("lora", 42, 0.65, task="demo", folder="lora").write_text("{")
    assert "record.json is no readable run record" in shown().finished().err
