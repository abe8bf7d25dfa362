"""quickstart_table.py on records made by hand."""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest

from scripts.tests.faults import a_record

METHODS = ("control", "lora", "dora")
PNG = b"\x89PNG\r\n\x1a\n"


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


def write(folder: Path, *records: dict) -> None:
    for contents in records:
        path = folder / contents["name"] / "record.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(contents))


@pytest.fixture
def run(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    return partial(call, "scripts.quickstart_table")


def cells(folder: Path) -> list[list[str]]:
    lines = [line for line in (folder / "table.md").read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_says_what_the_records_say(run, tmp_path):
    write(tmp_path, *map(record, METHODS))
    out = run(tmp_path, *METHODS).finished().out
    _, _, control, lora, _, majority = cells(tmp_path)
    memory = "900 MiB CPU resident"
    assert control == ["[control](control/record.json)", "0.720", "0.700", "223,106", "60 s", memory]
    assert lora[1:3] == ["0.650", "0.650"]
    assert majority[:2] == ["majority class", "0.000"]
    for shown in ("0.720", "223,106", memory, "majority class", "not GLUE", "800 train + 100 validation"):
        assert shown in " ".join(out.split())
    assert "DIFFERENT" not in out
    assert (tmp_path / "score_against_time.png").read_bytes().startswith(PNG)


def test_a_missing_record_keeps_its_row(run, tmp_path):
    write(tmp_path, record("control"), record("dora"))
    run(tmp_path, *METHODS).finished()
    assert [row[:2] for row in cells(tmp_path)[2:5]] == [
        ["[control](control/record.json)", "0.720"],
        ["lora", "not run"],
        ["[dora](dora/record.json)", "0.550"],
    ]


def test_gpu_memory_is_labelled_and_unequal_conditions_are_told(run, tmp_path):
    gpu = {
        "memory": {"kind": "cuda allocator", "peak_allocated_bytes": 2**30, "peak_resident_bytes": None},
        "device": {"kind": "cuda", "name": "Some GPU", "count": 1},
    }
    write(tmp_path, record("control", **gpu), record("lora"))
    out = run(tmp_path, "control", "lora").finished().out
    assert cells(tmp_path)[2][-1] == "1,024 MiB GPU allocator"
    assert "DIFFERENT device: 1 x Some GPU, 2 x Some CPU" in " ".join(out.split())


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (None, "holds no run of control: start scripts/quickstart.sh first"),
        ("{", "record.json is no readable run record"),
        (json.dumps(record("control", method="lora")), "is of lora on demo, expected control on demo"),
        (json.dumps(record("control", metrics={"best": {}, "last": {}})), "lacks 'matthews'"),
        (json.dumps(record("control", time={})), "lacks 'train_seconds'"),
    ],
)
def test_a_broken_folder_is_one_line_and_writes_nothing(run, tmp_path, contents, message):
    if contents is not None:
        (tmp_path / "control").mkdir()
        (tmp_path / "control" / "record.json").write_text(contents)
    assert message in run(tmp_path, "control").refused()
    assert not list(tmp_path.glob("*.*"))
