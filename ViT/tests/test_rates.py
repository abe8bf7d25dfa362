"""Learning rates chosen on held-out training images: the split, the search, and the table with what was chosen."""

import json
import subprocess
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from control_experiments.errors import UserError
from control_experiments.record import read_record
from control_experiments.reporting.records import load
from control_experiments.training.losses import Diverged
from ViT import recipe
from ViT.images import OnDemand, hold_out, load_data


def pixels(part):
    return [image.numpy().tobytes() for image in part.images]


def test_the_split_is_of_training_images_alone_and_leaves_none_out(npz):
    data = load_data(str(npz))
    split = hold_out(data, 0.25)
    assert (len(split.train), len(split.test)) == (30, 10)
    assert sorted(pixels(split.train) + pixels(split.test)) == sorted(pixels(data.train))
    assert not set(pixels(split.train)) & set(pixels(split.test))
    # 14, 13 and 13 images of a class
    assert Counter(split.test.labels.tolist()) == {0: 4, 1: 3, 2: 3}
    truth = dict(zip(pixels(data.train), data.train.labels.tolist(), strict=True))
    for part in (split.train, split.test):
        assert [truth[image] for image in pixels(part)] == part.labels.tolist()
    assert pixels(hold_out(data, 0.25).test) == pixels(split.test)

    with pytest.raises(UserError, match="decoded once"):
        hold_out(replace(data, train=OnDemand(None, "stop", 0)), 0.25)
    # images of unequal sizes too, and each class stays on both sides
    data.train.images = [image[:, : 10 + index % 3] for index, image in enumerate(data.train.images)]
    for share in (0.01, 0.99):
        split = hold_out(data, share)
        assert set(split.train.labels.tolist()) == set(split.test.labels.tolist()) == {0, 1, 2}
        assert sorted(pixels(split.train) + pixels(split.test)) == sorted(pixels(data.train))


def test_a_run_with_held_out_images_says_so_and_enters_no_table(train, npz, tmp_path):
    arrays, blind = dict(np.load(npz)), tmp_path / "blind.npz"
    np.savez(blind, **{**arrays, "y_test": (arrays["y_test"] + 1) % 3})  # would change every score
    results = tmp_path / "results"
    out = results / "vit" / "learning_rate_search" / "run"
    share = ("--validation_share", 0.25, "--seed", 3)
    _, stdout, stderr = train(*share, "--output_dir", out).finished()
    assert "held-out accuracy" in stdout and "test accuracy" not in stdout + stderr
    record = read_record(out / "record.json")
    assert record.data["sizes"] == {"train": 30, "held-out": 10}
    assert record.data["split"].startswith("0.25 of the training images of each class")
    assert record.hyperparameters["validation_share"] == 0.25
    assert len((out / "predictions.csv").read_text().splitlines()) == 11
    frame, _ = load(results)
    assert frame.kind.tolist() == ["search"]
    # the score does not depend on the test images
    other = results / "vit" / "learning_rate_search" / "blind"
    train(*share, "--data", blind, "--output_dir", other).finished()
    assert read_record(other / "record.json").history[-1]["test_loss"] == record.history[-1]["test_loss"]


def test_runs_from_before_the_option_are_still_this_run(train, tmp_path):
    claim, once = tmp_path / "run" / "run.json", ("--epochs", 1)
    train(*once).finished()
    identity = json.loads(claim.read_text())
    for newer in ("validation_share", "deterministic", "optimizer", "control_blocks"):
        del identity[newer]  # as their defaults say
    claim.write_text(json.dumps(identity))
    assert "is finished" in train(*once).finished().out
    assert "(deterministic None there, True asked for)" in train(*once, "--deterministic").refused()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--validation_share", 0), "--validation_share must lie between 0 and 1, both excluded, got 0.0"),
        (("--validation_share", "nan"), "must lie between 0 and 1"),
        (("--validation_share", 0.1), "--output_dir below a folder named learning_rate_search"),
        (("--validation_share", 0.1, "--evaluate", "x"), "is for training"),
    ],
)
def test_bad_shares_are_one_line_and_leave_nothing(train, tmp_path, arguments, message):
    assert message in train(*arguments).refused()
    assert not (tmp_path / "run").exists()


@pytest.fixture
def table(options, tmp_path):
    """Arguments of a small table; the second learning rate is far too small, the third is the first again."""
    return (
        *[value for value in options if value not in ("--lr", 0.05)],
        *("--methods", "control", "--seeds", 1, "--grid", 0.01, "1e-6", "1e-2", "--output_dir", tmp_path),
    )  # fmt: skip


def rates(folder):
    (notes,) = (folder / "learning_rate_search").glob("*.json")
    entries = json.loads(notes.read_text())["rates"]
    return {(entry["task"], entry["method"]): entry for entry in entries}


def records(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("record.json")}


def test_the_table_is_run_with_the_chosen_rates_and_nothing_twice(call, table, base_model, tmp_path):
    searched = (*table, "--search_seeds", 0, 5)
    stdout = call("ViT.small_table", *searched, "--max_minutes", 1e-9).finished().out
    assert "the next run does not fit into 1e-09 minutes" in stdout and not records(tmp_path)

    stdout = call("ViT.small_table", *searched).finished().out
    lines = [line for line in stdout.splitlines() if line.startswith("[")]
    assert lines == [
        "[search] control on colors, lr 1e-06, seed 0",
        "[search] control on colors, lr 1e-06, seed 5",
        "[search] control on colors, lr 0.01, seed 0",
        "[search] control on colors, lr 0.01, seed 5",
        "[test] control on colors, lr 0.01, seed 1",
    ]
    found = rates(tmp_path)["colors", "control"]
    model, search = base_model.parent.name, tmp_path / "learning_rate_search"
    for lr in ("0.01", "1e-06"):
        folders = (search / f"{model}_colors_control_seed{seed}_lr{lr}" for seed in (0, 5))
        tried = [read_record(folder / "record.json") for folder in folders]
        assert all(record.data["sizes"]["held-out"] == 3 for record in tried)
        mean = sum(record.metrics["last"]["test_accuracy"] for record in tried) / 2
        assert found["scores"][lr] == pytest.approx(mean)
    assert found["chosen"] == "0.01" and found["scores"]["0.01"] > found["scores"]["1e-06"]
    record = read_record(tmp_path / f"{model}_colors_control_seed1" / "record.json")
    assert record.hyperparameters["lr"] == 0.01 and record.data["sizes"] == {"train": 40, "test": 12}

    # the record's own command is the same run
    before, command = records(tmp_path), record.command
    assert command[:3] == ["python", "-m", "ViT.finetune"] and command[command.index("--lr") + 1] == "0.01"
    stdout = call("ViT.small_table", *searched, "--max_minutes", 1e-9).finished().out
    assert "[" not in stdout and records(tmp_path) == before
    assert stdout.endswith("all 1 runs are finished\n")

    # a table whose runs had another learning rate is not mixed with them
    wanted = f"{model}_colors_control_seed1 has lr 0.01, not 1e-06: delete such folders or choose another"
    assert wanted in call("ViT.small_table", *table, "--grid", "1e-6").refused() and records(tmp_path) == before
    refused = call("ViT.small_table", *searched, "--crop", 0.5).refused()
    assert "has crop 0.875, not 0.5" in refused and records(tmp_path) == before


def test_the_smallest_of_equal_rates_is_chosen_and_one_that_diverges_is_not(call, table, tmp_path, monkeypatch):
    train = recipe.train

    def diverging(run, *rest):
        if run.lr == 3.0:
            raise Diverged("the training loss is NaN")
        train(run, *rest)

    monkeypatch.setattr(recipe, "train", diverging)
    grid = ("--grid", "3", "2e-9", "1e-9", "--epochs", 1, "--search_only")
    assert "warning: lr 3.0 is not chosen: the training loss is NaN" in call("ViT.small_table", *table, *grid).finished().err
    again = call("ViT.small_table", *table, *grid).finished().err
    assert "warning" not in again, "a rate that diverged is not tried again"
    found = rates(tmp_path)["colors", "control"]
    assert found["scores"]["3.0"] is None and found["scores"]["1e-09"] == found["scores"]["2e-09"]
    assert found["chosen"] == "1e-09"
    assert not list(tmp_path.glob("*/record.json")), "only the search was asked for"
    refused = call("ViT.small_table", *table, "--methods", "probe", "--grid", 3, "--search_only").refused()
    assert "probe on colors diverges with every learning rate of --grid" in refused
    assert set(rates(tmp_path)) == {("colors", "control"), ("colors", "probe")}


def test_the_search_in_two_processes_then_the_table_in_one(call, base_model, npz, launching, started, tmp_path):
    settings = {"MODEL": base_model, "ARCHITECTURE": "test_vit", "DATA": npz, "SEEDS": 1, "EPOCHS": 1, "GRID": "1e-2 1e-4"}
    words = ("ViT/run_small_table.sh", "cpu", "--image_size", 32, "--output_dir", tmp_path)
    searches = [launching(*words, "--search_only", **settings, METHODS=method) for method in ("lora", "probe")]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    processes = [subprocess.Popen(**search, **output) for search in searches]
    for process in processes:
        printed, _ = process.communicate(timeout=240)
        assert process.returncode == 0, printed
    search = records(tmp_path)
    assert len(search) == 4 and set(rates(tmp_path)) == {("colors", "lora"), ("colors", "probe")}
    (command,) = started(*words, **settings, METHODS="lora probe")
    assert "[search]" not in call(*command).finished().out
    for method in ("lora", "probe"):
        record = read_record(tmp_path / f"{base_model.parent.name}_colors_{method}_seed1" / "record.json")
        assert record.hyperparameters["lr"] == float(rates(tmp_path)["colors", method]["chosen"])
    assert records(tmp_path).items() > search.items()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--grid", "fast"), "invalid float value: 'fast'"),
        (("--grid", 0.1, -1), "--lr must be greater than 0, got -1.0"),
        (("--methods", "magic"), "unknown method"),
    ],
)
def test_a_bad_table_is_one_line_and_leaves_nothing(call, table, tmp_path, arguments, message):
    assert message in call("ViT.small_table", *table, "--output_dir", tmp_path / "out", *arguments).refused()
    assert not (tmp_path / "out").exists()


def test_search_only_needs_a_grid_and_the_notes_of_a_search_must_be_whole(call, options, table, base_model, tmp_path):
    plain = [value for value in options if value not in ("--lr", 0.05)]
    refused = call("ViT.small_table", *plain, "--search_only", "--output_dir", tmp_path / "out").refused()
    assert "--search_only needs --grid" in refused and not (tmp_path / "out").exists()
    notes = tmp_path / "learning_rate_search" / f"{base_model.parent.name}.json"
    notes.parent.mkdir()
    notes.write_text('{"rates": ')
    refused = call("ViT.small_table", *table, "--grid", 0.01, "--epochs", 1, "--search_only").refused()
    assert f"{notes.name} is broken" in refused and notes.read_text() == '{"rates": '
