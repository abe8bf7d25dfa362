"""Generated inputs for every reader, a bounded number of those of scripts/inject_faults.py, and some by hand."""

import io
import json
import tarfile
import zipfile

import numpy as np
import pytest
import torch

from control_experiments.errors import UserError
from control_experiments.training.checksums import fingerprint
from LlaMA.evaluate import Options
from LlaMA.evaluation import check_adapter
from scripts.faults import tiny
from scripts.faults.inputs import READERS, feed, offer
from ViT.classifier import restore


@pytest.mark.parametrize("name", READERS)
def test_whatever_a_file_holds_is_taken_or_refused_in_words(name, tmp_path):
    assert all(offer(READERS[name], tmp_path, seed) for seed in READERS[name].seeds())
    outcome = feed(name, tmp_path, 300)
    assert outcome.failures == [] and outcome.inputs == outcome.taken + outcome.refused == 300
    assert outcome.refused


def test_the_campaign_counts_and_describes_what_goes_wrong(tmp_path, monkeypatch):
    def careless(path):
        if path.read_bytes().startswith(b"["):
            raise ValueError("unforeseen")
        if b"\0" in path.read_bytes():
            (path.parent / "stray").write_text("x")

    monkeypatch.setitem(READERS, "record", READERS["record"]._replace(read=careless))
    outcome = feed("record", tmp_path, 400)
    assert outcome.inputs == 400 and outcome.taken
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
    assert offer(READERS[name], tmp_path, data) is False
    with pytest.raises(UserError, match=message):
        READERS[name].read(tmp_path / "checkpoint-3" / READERS[name].name)


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


def test_a_pickle_does_not_run(tmp_path):
    bomb, adapter = Bomb(tmp_path / "mark"), tmp_path / "adapter"
    np.savez(tmp_path / "x.npz", x_train=np.array([bomb], dtype=object))
    with pytest.raises(UserError, match="lacks|no readable"):
        READERS["npz"].read(tmp_path / "x.npz")
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    torch.save({"weight": bomb}, adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="never from a pickle"):
        check_adapter(Options(data="x", output_dir="y", adapter=str(adapter)))
    tiny.vit(tmp_path)
    weights = tmp_path / "vit.safetensors"
    description = json.loads(READERS["classifier"].seeds()[0]) | {"architecture": "test_vit", "model": str(weights)}
    (adapter / "classifier.json").write_text(json.dumps(description | {"sha256": fingerprint(weights)}))
    with pytest.raises(UserError, match="never from a pickle"):
        restore(adapter, attention="sdpa")
    assert not (tmp_path / "mark").exists()
