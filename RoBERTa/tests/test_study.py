"""The GLUE study and the rows that its search holds out."""

import shutil

from control_experiments.record import read_record
from RoBERTa.glue import get_task, hold_out, load_task


def test_a_study_scores_its_search_on_training_rows_and_its_tests_on_the_dev_set(call, encoders, glue_folder, tmp_path):
    words = (
        "--model", encoders["bert"], "--data", glue_folder, "--device", "cpu", "--output_dir", tmp_path, "--batch_size", 8,
        "--tasks", "cola", "stsb", "--epochs", "cola=1", "stsb=2", "--methods", "control", "double control:control_rank=8",
        "--seeds", 1, "--grid", "1e-3", "1e-2", "--search_share", 0.25,
    )  # fmt: skip
    assert call("RoBERTa.study", *words).finished().out.endswith("all 4 runs are finished\n")
    records = {path.parent.name: read_record(path) for path in tmp_path.rglob("record.json")}
    assert len(records) == 4 + 8
    for name, record in records.items():
        searching = "_lr" in name
        rows = {"train": 18, "validation": 6} if searching else {"train": 24, "validation": 10}
        assert record.data["sizes"] == rows and record.seed == (0 if searching else 1)
        assert record.hyperparameters["validation_share"] == (0.25 if searching else None)
        assert record.hyperparameters["epochs"] == {"cola": 1, "stsb": 2}[record.task]
    # two blocks of half the rank have as many parameters as one
    counts = {record.adapter["adapter_parameters"] for record in records.values()}
    assert counts == {2 * 2 * 16 * 16}
    assert "--epochs says nothing about stsb" in call("RoBERTa.study", *words, "--epochs", "cola=1").refused()


def test_finished_runs_of_other_data_do_not_count(call, encoders, glue_folder, tmp_path):
    glue = shutil.copytree(glue_folder, tmp_path / "glue")
    words = (
        "--model", encoders["bert"], "--data", glue, "--device", "cpu", "--output_dir", tmp_path / "study", "--tasks", "cola",
        "--methods", "lora", "--seeds", 1, "--max_steps", 1,
    )  # fmt: skip
    for _ in range(2):
        assert call("RoBERTa.study", *words).finished().out.endswith("all 1 runs are finished\n")
    lines = (glue / "CoLA" / "train.tsv").read_text().splitlines(keepends=True)
    (glue / "CoLA" / "train.tsv").write_text("".join(lines[:-1]))
    assert "had other contents of --data" in call("RoBERTa.study", *words).refused()


def test_the_held_out_rows_are_training_rows_and_the_same_each_time(glue_folder):
    task, splits = get_task("mnli"), load_task("mnli", str(glue_folder))
    held, again = (hold_out(splits, task, 0.25) for _ in range(2))
    rows = held["validation_matched"]["first"]
    assert len(rows) == 6 and held["validation_mismatched"]["first"] == again["validation_matched"]["first"] == rows
    assert sorted([*held["train"]["first"], *rows]) == sorted(splits["train"]["first"])
