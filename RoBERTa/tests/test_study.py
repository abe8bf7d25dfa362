"""The GLUE study and the rows that its search holds out."""

import pytest

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


def test_the_held_out_rows_are_training_rows_and_the_same_each_time(glue_folder):
    task, splits = get_task("mnli"), load_task("mnli", str(glue_folder))
    held = hold_out(splits, task, 0.25)
    assert (
        held["validation_matched"]["first"]
        == held["validation_mismatched"]["first"]
        == hold_out(splits, task, 0.25)["validation_matched"]["first"]
    )
    assert sorted([*held["train"]["first"], *held["validation_matched"]["first"]]) == sorted(splits["train"]["first"])
    assert len(held["validation_matched"]) == 6


@pytest.mark.parametrize(
    ("table", "launcher"), [("glue", "RoBERTa/run_roberta.sh"), ("quantized", "QControl/run_roberta_quantization.sh")]
)
def test_a_table_counts_the_launchers_runs(call, started, encoders, glue_folder, tmp_path, table, launcher):
    """The same recipe, variables and names, whoever started the run."""
    about = {"MODEL": encoders["roberta"], "DATA": glue_folder, "BATCH_SIZE": 8, "CONTROL_RANK": 4}
    base = "roberta" if table == "glue" else "roberta_nf4"
    (run,) = started(
        launcher, "control", "rte", 1, "1e-3", "cpu", "--output_dir", tmp_path / f"{base}_rte_control_seed5", **about
    )
    call(*run, "--seed", 5).finished()
    words = ("--tasks", "rte", "--methods", "control", "lora", "--seeds", 5, "--gpus", "cpu", "--output_dir", tmp_path)
    (study,) = started(f"scripts/rerun_{table}.sh", *words, **about, EPOCHS=1, LR="1e-3")
    (line,) = call(*study, "--dry_run").finished().out.splitlines()
    assert line.startswith("python -m RoBERTa.finetune ") and " --method lora " in line
    assert call(*study).finished().out.endswith("all 2 runs are finished\n")
    assert read_record(tmp_path / f"{base}_rte_lora_seed5" / "record.json").hyperparameters["batch_size"] == 8
    assert call(*study, "--dry_run").finished().out == ""
    assert "has epochs 1.0, not 7.0" in call(*study, "--epochs", 7).refused()
