"""The launchers as users type them, from another folder."""

from functools import partial
from pathlib import Path

import pytest

from control_experiments.paths import REPOSITORY
from control_experiments.record import read_record
from LlaMA import demo
from LlaMA.commonsense import TASKS, offered_words, read_tests


def test_a_trial_needs_no_model_and_no_data(call, started, tmp_path, monkeypatch):
    """The README's, with less reading, training and asking."""
    monkeypatch.setenv("PARALLEL_CONTROL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "STEPS", 4)
    programs = started(
        "LlaMA/llama3_8B_DoubleControl.sh", 8, 2, 4, tmp_path / "out", "cpu", "--max_steps", 2, "--eval_steps", 1,
        MODEL="tiny", DATA="demo", HELD_OUT=8, BATCH=4, MICRO_BATCH=4, EVALUATE_ARGS="--limit 2 --mode likelihood",
    )  # fmt: skip
    for program, *options in programs:
        call(program, *options).finished()
    record = read_record(tmp_path / "out" / "record.json")
    assert (record.method, record.hyperparameters["lr"]) == ("double control", 1e-4)
    assert (record.model["id"], record.data["id"]) == ("tiny", "demo") and record.data["sha256"]
    evaluated = read_record(tmp_path / "out" / "likelihood" / "record.json")
    assert evaluated.data["sizes"] == dict.fromkeys(TASKS, 2)
    rows = read_tests(demo.demo_folder(), list(TASKS))
    assert all(row.answer in offered_words(row, TASKS[task]) for task, part in rows.items() for row in part)


def test_processes_may_make_the_tiny_model_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("PARALLEL_CONTROL_CACHE", str(tmp_path))

    def make(place: Path, others: int = 1) -> None:
        place.mkdir(exist_ok=True)
        if others:
            monkeypatch.setattr(demo, "_make_tiny", partial(make, others=0))
            demo.place_of_model("tiny")  # another process begins later and ends first
        (place / "config.json").write_text("{}")

    monkeypatch.setattr(demo, "_make_tiny", make)
    made = Path(demo.place_of_model("tiny"))
    assert (made / "config.json").is_file() and [*made.parent.iterdir()] == [made]


@pytest.fixture
def chosen(started):
    """An option as the launcher of LLaMA-3's evaluation gives it."""

    def value(option, *more, first=(4, 2, 4, "out", "cpu", "control"), **variables):
        words = started("LlaMA/llama3_8B_Evaluate.sh", *first, *more, **variables)[-1]
        return words[words.index(option) + 1]

    return value


def test_data_is_looked_for_where_it_is(chosen):
    """In what PARALLEL_CONTROL_SHARED names, else in ../shared if that is there, else in the checkout's own data/."""
    shared = (REPOSITORY.parent / "shared" / "data" / "commonsense").resolve()
    assert chosen("--data", PARALLEL_CONTROL_SHARED="/srv/shared") == "/srv/shared/data/commonsense"
    assert chosen("--data", DATA="/srv/my data") == "/srv/my data"
    own = chosen("--data", PARALLEL_CONTROL_SHARED="")
    assert Path(own).resolve() == (shared if shared.is_dir() else REPOSITORY / "data" / "commonsense")


def test_missing_data_says_where_it_comes_from(call, started, model_folder):
    train, _ = started("LlaMA/llama3_8B_DoubleControl.sh", 4, 2, 4, "out", "cpu", MODEL=model_folder, DATA="nowhere")
    line = call(*train).refused()
    assert line.startswith("error: cannot read nowhere/commonsense_170k.json")
    assert "AGI-Edgerunners/LLM-Adapters" in line and "TRAIN_DATA=" in line and "DATA=" in line


def test_missing_test_sets_are_told_before_the_training(launch, tmp_path):
    (tmp_path / "train.json").write_text("[]")
    done = launch("LlaMA/llama3_8B_DoubleControl.sh", 4, 2, 4, "out", "cpu", TRAIN_DATA="train.json", DATA="nowhere")
    assert (done.code, done.out) == (2, "") and done.err.startswith("error: nowhere has no TASK/test.json")


def test_answers_ranked_by_likelihood_have_a_folder_of_their_own(chosen):
    folder = partial(chosen, "--output_dir")
    assert folder() == folder("--mode", "generate") == "out/evaluation"
    assert folder("--mode", "likelihood") == "out/likelihood"
    assert folder(EVALUATE_ARGS="--limit 3 --mode=likelihood") == "out/likelihood"
    assert folder("--mode", "likelihood", EVALUATION="other") == "out/other"
    alone = (4, 2, 4, "out", "cpu", "zero-shot")
    assert folder(first=alone) == "out"
    assert folder(first=alone, EVALUATE_ARGS="--mode likelihood") == "out-likelihood"
