"""Learning rates chosen on held-out training images: the split, the search, and the table with what was chosen."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from control_experiments.errors import UserError
from control_experiments.record import read_record
from control_experiments.reporting.records import load
from ViT.images import OnDemand, hold_out, load_data


def pixels(part):
    return [image.numpy().tobytes() for image in part.images]


def test_the_split_is_of_training_images_alone_and_leaves_none_out(npz):
    data = load_data(str(npz))
    split = hold_out(data, 0.25)
    # 14, 13 and 13 images of a class
    assert len(split.train) == 30 and Counter(split.test.labels.tolist()) == {0: 4, 1: 3, 2: 3}
    assert sorted(pixels(split.train) + pixels(split.test)) == sorted(pixels(data.train))
    truth = dict(zip(pixels(data.train), data.train.labels.tolist(), strict=True))
    for part in (split.train, split.test):
        assert [truth[image] for image in pixels(part)] == part.labels.tolist()
    assert pixels(hold_out(data, 0.25).test) == pixels(split.test)

    with pytest.raises(UserError, match="decoded once"):
        hold_out(replace(data, train=OnDemand(None, 0)), 0.25)
    # images of unequal sizes too, and each class stays on both sides
    data.train.images = [image[:, : 10 + index % 3] for index, image in enumerate(data.train.images)]
    for share in (0.01, 0.99):
        split = hold_out(data, share)
        assert set(split.train.labels.tolist()) == set(split.test.labels.tolist()) == {0, 1, 2}
        assert sorted(pixels(split.train) + pixels(split.test)) == sorted(pixels(data.train))


def test_a_run_with_held_out_images_says_so_and_enters_no_table(train_vit, npz, tmp_path):
    arrays, blind = dict(np.load(npz)), tmp_path / "blind.npz"
    np.savez(blind, **{**arrays, "y_test": (arrays["y_test"] + 1) % 3})  # would change every score
    search = tmp_path / "results" / "vit" / "learning_rate_search"
    share, found = ("--validation_share", 0.25, "--seed", 3), []
    for data in (npz, blind):
        said = train_vit(*share, "--data", data, "--output_dir", search / data.stem)
        assert "held-out accuracy" in said.out and "test accuracy" not in said.out + said.err
        found.append(said.record)
        assert found[-1].history[-1]["test_loss"] == found[0].history[-1]["test_loss"]
    assert found[0].data["sizes"] == {"train": 30, "held-out": 10}
    assert found[0].data["split"].startswith("0.25 of the training images of each class")
    assert found[0].hyperparameters["validation_share"] == 0.25
    assert len((search / npz.stem / "predictions.csv").read_text().splitlines()) == 11
    frame, _ = load(tmp_path / "results")
    assert frame.kind.tolist() == ["search", "search"]


def test_the_launchers_table_searches_on_held_out_images(call, base_model, npz, started, tmp_path):
    settings = {"MODEL": base_model, "ARCHITECTURE": "test_vit", "DATA": npz, "METHODS": "'double control' probe",
                "SEEDS": "1 2", "EPOCHS": 1, "GRID": "1e-2 1e-6 0.01"}  # fmt: skip
    more = ("--image_size", 32, "--batch_size", 16, "--output_dir", tmp_path)
    (command,) = started("ViT/run_small_table.sh", "cpu", *more, **settings)
    assert call(*command).finished().out.endswith("all 4 runs are finished\n")
    found = {True: [], False: []}
    for path in tmp_path.rglob("record.json"):
        record, searching = read_record(path), "learning_rate_search" in path.parts
        assert record.data["sizes"] == ({"train": 37, "held-out": 3} if searching else {"train": 40, "test": 12})
        found[searching].append((record.method, record.seed, record.hyperparameters["lr"]))
    chosen = {method: lr for method, _, lr in found[False]}
    assert sorted(found[True]) == [(method, 0, lr) for method in ("double control", "probe") for lr in (1e-6, 1e-2)]
    assert sorted(found[False]) == [(method, seed, chosen[method]) for method in sorted(chosen) for seed in (1, 2)]
    assert "has crop 0.875, not 0.5" in call(*command, "--crop", 0.5).refused()


def test_a_search_needs_rates_and_leaves_nothing_without_them(call, npz, tmp_path):
    words = ("--model", "tiny", "--data", npz, "--device", "cpu", "--output_dir", tmp_path / "out", "--search_only")
    assert "--search_only needs --grid" in call("ViT.small_table", *words).refused()
    assert not (tmp_path / "out").exists()
