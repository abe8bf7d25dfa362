"""quickstart_table.py on records made by hand."""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest

from scripts.tests.faults import a_record


def record(method: str, /, **changes) -> dict:
    scores = {"control": (0.61, 0.72, 0.70), "lora": (0.5, 0.6, 0.65), "dora": (0.4, 0.5, 0.55)}[method]
    history = [{"step": 10 * i, "epoch": float(i), "matthews": score} for i, score in enumerate(scores, start=1)]
    fields = dict(
        name=method, method=method, task="demo", seed=42, versions={"python": "3.12.1"}, model={"id": "minilm"},
        device={"kind": "cpu", "name": "Some CPU", "count": 2}, adapter={"trainable_parameters": 223_106},
        data={"id": "demo", "sha256": "ab" * 32, "sizes": {"train": 800, "validation": 100}}, history=history,
        hyperparameters={"epochs": 3.0, "lr": 1e-3}, time={"train_seconds": 60.4, "steps": 30},
        metrics={"best": max(history, key=lambda entry: entry["matthews"]), "last": history[-1]},
        memory={"kind": "resident set", "peak_resident_bytes": 900 * 2**20, "peak_allocated_bytes": None},
    )  # fmt: skip
    return asdict(a_record(**{**fields, **changes}))


def write(folder: Path, name: str, contents: str | dict) -> None:
    (folder / name).mkdir()
    (folder / name / "record.json").write_text(contents if isinstance(contents, str) else json.dumps(contents))


@pytest.fixture
def run(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    return partial(call, "scripts.quickstart_table")


def cells(folder: Path) -> list[list[str]]:
    lines = [line for line in (folder / "table.md").read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_table_says_what_the_records_say(run, tmp_path):
    for method in ("control", "dora"):
        write(tmp_path, method, record(method))
    out = run(tmp_path, "control", "lora", "dora").finished().out
    control, lora, dora, majority = cells(tmp_path)
    assert control == ["[control](control/record.json)", "0.720", "0.700", "223,106", "60 s", "900 MiB CPU resident"]
    assert (lora[:2], majority[:2]) == (["lora", "not run"], ["majority class", "0.000"])
    assert dora[1:3] == ["0.550", "0.550"]
    for shown in ("0.720", "223,106", "900 MiB CPU resident", "majority class", "not GLUE", "800 train + 100 validation"):
        assert shown in " ".join(out.split())
    assert "DIFFERENT" not in out
    assert (tmp_path / "score_against_time.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_gpu_memory_is_labelled_and_unequal_conditions_are_told(run, tmp_path):
    memory = {"kind": "cuda allocator", "peak_allocated_bytes": 2**30, "peak_resident_bytes": None}
    write(tmp_path, "control", record("control", memory=memory, device={"kind": "cuda", "name": "Some GPU", "count": 1}))
    write(tmp_path, "lora", record("lora"))
    out = run(tmp_path, "control", "lora").finished().out
    assert cells(tmp_path)[0][-1] == "1,024 MiB GPU allocator"
    assert "DIFFERENT device: 1 x Some GPU, 2 x Some CPU" in " ".join(out.split())


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (None, "holds no run of control: start scripts/quickstart.sh first"),
        ("{", "record.json is no readable run record"),
        (record("control", method="lora"), "is of lora on demo, expected control on demo"),
        (record("control", metrics={"best": {}, "last": {}}), "lacks 'matthews'"),
    ],
)
def test_a_broken_folder_is_one_line_and_writes_nothing(run, tmp_path, contents, message):
    if contents is not None:
        write(tmp_path, "control", contents)
    assert message in run(tmp_path, "control").refused()
    assert not list(tmp_path.glob("*.*"))
