"""Generated inputs for every reader, a bounded number of those of scripts/inject_faults.py, and some by hand."""

import io
import json
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from control_experiments.errors import UserError
from scripts.faults.inputs import READERS, contents, feed, offer

SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)


@pytest.mark.parametrize("name", READERS)
def test_valid_files_are_taken(name, tmp_path):
    reader = READERS[name]
    assert all(offer(reader, tmp_path, seed) for seed in reader.seeds())


@pytest.mark.parametrize("name", READERS)
def test_whatever_a_file_holds_is_taken_or_refused_in_words(name, tmp_path):
    reader = READERS[name]

    @SETTINGS
    @given(contents(reader))
    def give(data):
        offer(reader, tmp_path, data)

    give()


def test_the_campaign_counts_and_describes_what_goes_wrong(tmp_path, monkeypatch):
    def careless(path):
        if path.read_bytes().startswith(b"["):
            raise ValueError("unforeseen")
        if b"\0" in path.read_bytes():
            (path.parent / "stray").write_text("x")

    monkeypatch.setitem(READERS, "record", READERS["record"]._replace(read=careless))
    outcome = feed("record", tmp_path, 400)
    assert outcome.inputs >= 400 and outcome.taken
    assert any("ValueError: unforeseen" in failure for failure in outcome.failures)
    assert any("it left" in failure for failure in outcome.failures)


def archive(*members: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(b"x" * member.size))
    return buffer.getvalue()


def npz_of_bytes() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for key in ("x_train", "y_train", "x_test", "y_test", "classes"):
            file.writestr(f"{key}.npy", b"no array")
    return buffer.getvalue()


def member(name: str, **fields) -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(found, field, value)
    return found


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("tar", archive(member("../../evil.png", size=3)), "outside of itself"),
        ("tar", archive(member("/etc/evil.png", size=3)), "outside of itself"),
        # a negative size, which sends Python's tarfile round in circles
        ("tar", archive(member("a.png"))[:124] + b"\xff" * 12 + archive(member("a.png"))[136:], "no tar that can be read"),
        ("tar", archive(member("a.png", size=600))[:700], "no tar that can be read"),
        ("tar", archive(member("s/train/a/1.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")), "no train images"),
        ("tar", archive(member("", size=3)), "no train images"),
        ("npz", READERS["npz"].seeds()[0].replace(b"\x93NUMPY", b"\x93NUMPX", 1), "no readable|is no array"),
        ("npz", npz_of_bytes(), "x_train of .* is no array"),
        ("record", b"[" * 200_000, "no JSON file"),
        ("commonsense", b'[{"instruction": "\\ud800", "input": "", "output": "x", "answer": "true"}]', "surrogate"),
        ("answers", b'{"row": -1, "label": "true", "answer": "true", "correct": true}\n', "line 1 is no answer"),
        ("answers", b'{"row": 0, "label": "true", "answer": "true", "correct": false}\n', "line 1 is no answer"),
        ("classifier", json.dumps({"classes": 3}).encode(), "no adapter folder"),
    ],
)  # fmt: skip
def test_known_attacks_are_refused(name, data, message, tmp_path):
    with pytest.raises(UserError, match=message):
        READERS[name].read(write(tmp_path, READERS[name].name, data))
    assert offer(READERS[name], tmp_path, data) is False


def write(folder, name, data):
    path = folder / "checkpoint-3" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


def test_a_pickle_in_an_npz_does_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "mark"), "w"))

    np.savez(tmp_path / "x.npz", x_train=np.array([Bomb()], dtype=object))
    with pytest.raises(UserError, match="lacks|no readable"):
        READERS["npz"].read(tmp_path / "x.npz")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("domain", ["LlaMA", "ViT"])
def test_an_adapter_in_a_pickle_is_refused_and_does_not_run(domain, tmp_path):
    from importlib import import_module

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "mark"), "w"))

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    torch.save({"weight": Bomb()}, adapter / "adapter_model.bin")
    if domain == "LlaMA":
        evaluation = import_module("LlaMA.evaluation")
        options = import_module("LlaMA.evaluate").Options(data="x", output_dir="y", adapter=str(adapter))
        with pytest.raises(UserError, match="never from a pickle"):
            evaluation.check_adapter(options)
    else:
        from scripts.faults import tiny

        run = tiny.vit(tmp_path)
        data = READERS["classifier"].seeds()[0]
        description = {
            **json.loads(data),
            "architecture": "test_vit",
            "model": str(tmp_path / "vit.safetensors"),
        }
        from control_experiments.training.checksums import fingerprint

        description["sha256"] = fingerprint(tmp_path / "vit.safetensors")
        (adapter / "classifier.json").write_text(json.dumps(description))
        assert run.program == "ViT.finetune"
        with pytest.raises(UserError, match="never from a pickle"):
            import_module("ViT.classifier").restore(adapter, attention="sdpa")
    assert not (tmp_path / "mark").exists()
