"""A bounded part of the campaign of scripts/inject_faults.py: kills, signals, full disks and broken checkpoints, by run."""

import os
import signal
import subprocess
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from control_experiments.record import read_record
from control_experiments.training.checkpoints import checkpoints, find_damage
from scripts.faults import kills, tiny
from scripts.faults.inputs import a_record

pytestmark = pytest.mark.slow
TRAINING = ("roberta", "vit", "llama")


def error_line(stderr: str) -> str:
    """The last line of stderr, the only one that is neither a progress bar's nor a library's."""
    assert "Traceback" not in stderr, stderr
    return stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("domain", tiny.RUNS)
def test_killed_runs_end_bit_for_bit_as_undisturbed_ones(domain, tmp_path):
    killed = kills.campaign(tiny.RUNS[domain](tmp_path), tmp_path, 2, seed=1)
    assert killed.kills == 2 and killed.resumed >= 1 and killed.differences == []


def test_the_campaign_sees_what_is_lost(tmp_path):
    # one weight of the adapter, one figure of the record: what the campaign compares
    run = tiny.Run("x", [], ("adapter/adapter_model.safetensors",))
    for name, loss in (("one", 0.5), ("other", 0.25)):
        (tmp_path / name / "adapter").mkdir(parents=True)
        (tmp_path / name / "adapter" / "adapter_model.safetensors").write_text(f"weights of {name}")
        history = [{"step": 1, "loss": loss, "train_seconds": loss}]
        a_record(metrics={"last": {"loss": loss}}, history=history).write(tmp_path / name / "record.json")
    one, other = (kills.results(run, tmp_path / name) for name in ("one", "other"))
    assert [name for name in one if one[name] != other[name]] == ["history", "metrics", run.results[0]]
    assert one["history"] == [{"step": 1, "loss": 0.5}]


@pytest.mark.parametrize("domain", TRAINING)
def test_a_signal_checkpoints_and_the_run_goes_on_to_the_same_end(domain, tmp_path):
    more = {"vit": {"epochs": 40}, "roberta": {"epochs": 30, "save_steps": 0}, "llama": {"max_steps": 60}}
    run, whole = tiny.RUNS[domain](tmp_path, **more[domain]), tmp_path / "whole"
    kills.execute(run, whole).finished()
    for number in (signal.SIGINT, signal.SIGTERM):
        cut = tmp_path / number.name
        process = kills.start(run, cut)
        while not (cut / "checkpoints").exists():  # it trains
            time.sleep(0.01)
        time.sleep(0.2)
        os.kill(process.id, number)
        ended = process.ended()
        assert ended.code == 128 + number, ended.output
        line = error_line(ended.output)
        (newest, *_) = checkpoints(cut / "checkpoints")
        assert f"{newest.name} is kept" in line and "--resume" in line
        assert find_damage(newest) is None and not (cut / "record.json").exists()
        kills.execute(run, cut, resume=True).finished()
        assert kills.results(run, cut) == kills.results(run, whole)


@pytest.mark.parametrize("domain", TRAINING)
def test_a_broken_checkpoint_costs_only_itself(domain, tmp_path):
    run, whole, cut = tiny.RUNS[domain](tmp_path), tmp_path / "whole", tmp_path / "cut"
    kills.execute(run, whole).finished()
    plan = kills.Plan(change=int(0.8 * kills.count_changes(run, tmp_path / "counted")))
    assert kills.execute(run, cut, plan).code == -signal.SIGKILL
    newest, before, *_ = checkpoints(cut / "checkpoints")
    weights = next(newest.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    ended = kills.execute(run, cut, resume=True).finished()
    assert f"warning: {newest.name} is broken ({weights.name} is not what was written)" in ended.output
    assert kills.results(run, cut) == kills.results(run, whole)


@pytest.mark.parametrize("domain", TRAINING)
def test_a_full_disk_ends_the_run_and_keeps_the_last_good_checkpoint(domain, tmp_path, small_disk):
    disk, folder = small_disk("64m"), tmp_path / "log"
    (disk / "run").mkdir()
    folder.symlink_to(disk / "run")  # beside which the log lies, on a disk that is not full
    run = tiny.RUNS[domain](tmp_path, **({"epochs": 30} if domain != "llama" else {"max_steps": 60}))
    process = kills.start(run, folder)
    while not checkpoints(disk / "run" / "checkpoints"):
        time.sleep(0.01)
    subprocess.run(["dd", "if=/dev/zero", f"of={disk / 'fill'}", "bs=64k"], capture_output=True)
    ended = process.ended()
    assert ended.code == 2, ended.output
    line = error_line(ended.output)
    assert line.startswith("error: ") and "is full" in line and "--resume" in line
    assert not any(map(find_damage, checkpoints(disk / "run" / "checkpoints")))
    (disk / "fill").unlink()
    kills.execute(run, folder, resume=True).finished()


def image_files(folder: Path) -> Path:
    """The images of `tiny.vit`, in unequal sizes, as a folder of class folders."""
    tiny.vit(folder)
    with np.load(folder / "colors.npz") as arrays:
        for split in ("train", "test"):
            for number, (pixels, label) in enumerate(zip(arrays[f"x_{split}"], arrays[f"y_{split}"])):
                place = folder / "images" / split / str(arrays["classes"][label]) / f"{number}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels[: 18 + number % 3]).save(place)
    return folder / "images"


def vit_from_files(folder: Path, **options) -> tiny.Run:
    run = tiny.vit(folder, data=image_files(folder), **options)
    # predictions are written beside images in memory alone
    return replace(run, results=run.results[:2]) if options.get("keep") == "files" else run


#: By domain: a run, and two numbers of data workers.
SEEDED = {
    "roberta": (tiny.roberta, (0, 2)),
    "vit": (tiny.vit, (8, 1)),
    "vit, decoded at the start": (vit_from_files, (8, 1)),
    "vit, decoded on demand": (partial(vit_from_files, keep="files"), (1, 2)),
    "llama": (tiny.llama, (0, 2)),
    "qcontrol, roberta": (partial(tiny.roberta, quantization="nf4"), (0, 2)),
    "qcontrol, llama": (partial(tiny.llama, quantization="nf4"), (0, 2)),
    **{f"{name}, deterministic": (partial(tiny.RUNS[name], deterministic=True), (1, 1)) for name in TRAINING},
}


@pytest.mark.parametrize("domain", SEEDED)
def test_the_same_seed_gives_the_same_record_whatever_the_workers(domain, tmp_path):
    make_run, (workers, others) = SEEDED[domain]
    found = []
    for number, count in enumerate((workers, workers, others)):
        run = make_run(tmp_path, workers=count)
        kills.execute(run, tmp_path / f"{number}").finished()
        found.append(kills.results(run, tmp_path / f"{number}"))
    assert found[0] == found[1] == found[2]
    one, other = (vars(read_record(tmp_path / name / "record.json")) for name in ("0", "1"))
    assert one["hyperparameters"]["deterministic"] == ("deterministic" in domain)
    for measured in ("name", "command", "created", "finished", "memory", "time", "history", "metrics"):
        one.pop(measured), other.pop(measured)
    assert one == other


@pytest.mark.parametrize("domain", TRAINING)
def test_a_loss_that_is_no_number_stops_the_run(domain, tmp_path):
    run = tiny.RUNS[domain](tmp_path, lr=1e30)
    ended = kills.execute(run, tmp_path / "run")
    assert ended.code == 2, ended.output
    line = error_line(ended.output)
    assert "NaN or infinite" in line and "step" in line
    assert "is the last good state" in line or "no checkpoint" in line
    assert not any(map(find_damage, checkpoints(tmp_path / "run" / "checkpoints")))
    assert not (tmp_path / "run" / "record.json").exists()
