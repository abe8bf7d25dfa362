"""The commonsense study: what is trained on, what is asked, and by whom."""

import json

from control_experiments.record import read_record
from control_experiments.reporting.records import load
from LlaMA.commonsense import TASKS


def test_a_study_searches_on_training_questions_and_asks_the_test_sets(call, data, model_folder, tmp_path):
    output = tmp_path / "published" / "llama" / "tiny"
    words = (
        "--model", model_folder, "--data", data / "train.json", "--device", "cpu", "--output_dir", output, "--generate", "first",
        "--methods", "zero-shot", "lora", "double control:control_rank=8", "shadow:lora_rank=4", "--seeds", 1,
        "--grid", "1e-3", "1e-2", "--search_steps", 1, "--search_share", 0.25, "--epochs", 1, "--held_out", 4,
        "--warmup_steps", 1, "--batch_size", 16, "--micro_batch_size", 16, "--limit", 1,
    )  # fmt: skip
    assert call("LlaMA.study", *words).finished().out.endswith("all 4 runs are finished\n")
    records = {path.parent.relative_to(output).as_posix(): read_record(path) for path in output.rglob("record.json")}
    name = "tiny-llama_train"
    generated = {
        f"{name}_{arm}/evaluation" for arm in ("lora_seed1", "double_control_control_rank8_seed1", "shadow_lora_rank4_seed1")
    }
    found = {place for place, record in records.items() if record.hyperparameters.get("mode") == "generate"}
    assert found == {*generated, f"{name}_zero-shot_generated"}

    # training rows are held out: none is lost, none is on both sides, and the tests are the test sets' questions
    rows = json.loads((data / "train.json").read_text())
    held_out = output / ".lock" / "held_out_train"
    held = {path.parent.name: json.loads(path.read_text()) for path in held_out.glob("*/test.json")}
    kept = json.loads((held_out / "train.json").read_text())
    assert len(kept) == 48 and sum(map(len, held.values())) == 16
    assert sorted(map(json.dumps, [*kept, *(row for part in held.values() for row in part)])) == sorted(map(json.dumps, rows))
    assert all(row["answer"] in TASKS[task] for task, part in held.items() for row in part)
    for place, record in records.items():
        searching = place.startswith("learning_rate_search")
        if record.history:
            assert record.data["sizes"]["train"] == (44 if searching else 60)
            assert record.history[-1]["step"] == (1 if searching else 4)
        else:
            assert set(record.data["sizes"]) == (set(held) if searching else set(TASKS))

    frame, problems = load(tmp_path)
    assert not problems
    likelihood = frame[(frame.kind == "run") & frame.section.str.contains("likelihood")]
    assert sorted(likelihood.row) == ["double control r8", "lora r32", "shadow", "zero-shot"]
    assert (frame.kind == "search").sum() == 6


def test_searches_on_two_files_in_one_folder_each_have_their_own_rows(call, data, model_folder, tmp_path):
    (tmp_path / "fewer.json").write_text(json.dumps(json.loads((data / "train.json").read_text())[:32]))
    for file, count in ((data / "train.json", 48), (tmp_path / "fewer.json", 24)):
        words = (
            "--model", model_folder, "--data", file, "--tests", data, "--device", "cpu", "--output_dir", tmp_path / "study",
            "--methods", "lora", "--grid", "1e-3", "--search_only", "--search_steps", 1, "--search_share", 0.25,
            "--held_out", 4, "--limit", 1,
        )  # fmt: skip
        call("LlaMA.study", *words).finished()
        (place,) = (tmp_path / "study" / "learning_rate_search").glob(f"*_{file.stem}_*/record.json")
        assert sum(read_record(place).data["sizes"].values()) == count
