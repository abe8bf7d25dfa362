"""Whatever a file holds, its reader takes it or refuses it with a `UserError`, in time, and writes nothing.

A file is a valid one with random edits (cut, flipped, removed, doubled or overwritten bytes), JSON in which one value is
another or is gone, or made from nothing. `faults.py` says how to have more of them.
"""

import contextlib
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from control_experiments.errors import UserError
from control_experiments.record import read_record
from control_experiments.training.checksums import fingerprint
from LlaMA.commonsense import read_rows
from LlaMA.evaluate import Options
from LlaMA.evaluation import check_adapter
from RoBERTa.glue import TASKS, read_tsv
from scripts.tests.faults import CASES, SEED, Bomb, a_record, vit
from ViT.classifier import read_description, restore
from ViT.images import Files, decode, load_data

# -- inputs -------------------------------------------------------------------------------------------------

#: Bytes that formats give a meaning, or that overflow what holds them.
TELLING = [
    b"\0" * 8, b"\xff" * 8, b"\x80" + b"\0" * 7, b"\x7f" + b"\xff" * 7, b"-1", b"99999999999", b"1e999", b"NaN", b"../",
    b"/etc/passwd", b"\t", b"\n", b"\r", b'"', b"{", b"[", b"]}", b"null", b"\xed\xa0\x80", b"\xef\xbb\xbf",
    b"\\ud800", b"\xe2\x80\xa8", b"|O", b"PK\x03\x04", b"ustar", b"\x1f\x8b", b"0" * 12, b"-0000000001\0",
]  # fmt: skip
TEXT = st.text(st.characters(exclude_categories=()), max_size=4) | st.sampled_from(["a", "step", "é\u2028", "\ud800"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**30) | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=8,
)  # fmt: skip


@st.composite
def edited(draw, contents: bytes) -> bytes:
    """The file with one to four random edits."""
    for _ in range(draw(st.integers(1, 4))):
        at, length = draw(st.integers(0, len(contents))), draw(st.integers(0, 64) | st.just(len(contents)))
        piece, chunk = contents[at : at + length], draw(st.sampled_from(TELLING) | st.binary(min_size=1, max_size=12))
        instead = draw(st.sampled_from((b"", piece + piece, chunk, chunk + piece, chunk + piece[len(chunk) :])))
        contents = contents[:at] + instead + contents[at + length :]
    return contents


@st.composite
def spoiled(draw, contents: bytes) -> bytes:
    """Valid JSON in which one value, anywhere, is another one, or is gone."""
    nodes, places = [json.loads(contents)], []
    for node in nodes:
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            places.append((node, key))
            nodes += [child] if isinstance(child, (dict, list)) else []
    node, key = draw(st.sampled_from(places))
    if draw(st.booleans()):
        node[key] = draw(VALUES)
    else:
        del node[key]
    return as_json(nodes[0])


class Reader(NamedTuple):
    """A file name, valid contents to start from, and what reads the file."""

    name: str
    valid: list[bytes]
    read: Callable[[Path], object]

    def inputs(self) -> st.SearchStrategy[bytes]:
        found = [st.sampled_from(self.valid).flatmap(edited), st.binary(max_size=120)]
        if self.name.endswith((".json", ".jsonl")):
            nested = st.integers(1, 300_000).map(lambda depth: b"[" * depth)
            documents = [line for contents in self.valid for line in contents.splitlines()]
            found += [st.sampled_from(documents).flatmap(spoiled), VALUES.map(as_json), nested]
        return st.one_of(found)


# -- readers ------------------------------------------------------------------------------------------------


def written(save: Callable[[io.BytesIO], object]) -> bytes:
    """What a function writes to a file."""
    save(buffer := io.BytesIO())
    return buffer.getvalue()


def as_json(value: object) -> bytes:
    return json.dumps(value).encode()


def archive(*members: tuple[str, bytes], form: int = tarfile.GNU_FORMAT, **fields) -> bytes:
    """A tar of (name, contents); `fields` replace what their headers say."""

    def save(buffer: io.BytesIO) -> None:
        with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
            for name, contents in members:
                found = tarfile.TarInfo(name)
                for field, value in {"size": len(contents), **fields}.items():
                    setattr(found, field, value)
                tar.addfile(found, io.BytesIO(contents) if contents else None)

    return written(save)


PICTURE = Image.fromarray(np.arange(12 * 10 * 3, dtype=np.uint8).reshape(12, 10, 3))
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
IMAGES = {form: written(lambda buffer, form=form: PICTURE.save(buffer, form)) for form in FORMATS}
NAMES = ("train/a/1", "train/b/2", "test/a/3", "test/b/4", "train/a/" + "x" * 120)
LINK = {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}
TARS = [
    archive(*[(f"s/{name}.png", IMAGES["PNG"]) for name in NAMES], form=form)
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
]
ARRAYS = {"x_train": np.zeros((4, 3, 3, 3), np.uint8), "x_test": np.zeros((2, 3, 3, 3), np.uint8), "y_train": np.arange(4) % 2,
          "y_test": np.arange(2), "classes": np.array(["a", "b"])}  # fmt: skip
NPZS = [written(lambda buffer, save=save: save(buffer, **ARRAYS)) for save in (np.savez, np.savez_compressed)]
RECORD = a_record(metrics={"best": {"x": 1.5}, "last": {"x": 1.0}}, history=[{"step": 1, "loss": 0.5}])
ROW = {"instruction": "Choose: é?", "input": "", "output": "the correct answer is true", "answer": "true"}
COLA = "g\t1\t\tThe cat é.\ng\t0\t*\tCat the.\n"
CLASSIFIER = {"method": "lora", "model": "m", "architecture": "a", "sha256": None, "image_size": 32, "mlp_layers": 2,
              "crop": 1.0, "classes": ["a", "b"]}  # fmt: skip


READERS = {
    "record": Reader("record.json", [as_json(vars(RECORD))], read_record),
    "classifier": Reader("classifier.json", [as_json(CLASSIFIER)], lambda path: read_description(path.parent)),
    "commonsense": Reader("rows.json", [as_json([ROW, ROW]), json.dumps([ROW], ensure_ascii=False).encode()], read_rows),
    "tsv": Reader("train.tsv", [COLA.encode()], lambda path: read_tsv(path, TASKS["cola"])),
    "npz": Reader("images.npz", NPZS, lambda path: load_data(str(path), workers=1)),
    "tar": Reader("images.tar", TARS, lambda path: load_data(str(path), workers=1)),
    "image": Reader("x.png", list(IMAGES.values()), lambda path: decode(Files([path], [0]), 0)),
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Where tars are unpacked."""
    monkeypatch.setenv("PARALLEL_CONTROL_CACHE", str(tmp_path_factory.mktemp("cache")))


def offer(reader: Reader, folder: Path, data: bytes) -> str | None:
    """Give a reader one input; None when it is taken, or why not. Whatever else than a `UserError` it raises is raised."""
    path, refusal = folder / reader.name, None
    path.write_bytes(data)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            reader.read(path)
    except UserError as error:
        refusal = str(error)
        assert refusal.strip(), "it says nothing"
    assert [*folder.rglob("*")] == [path]
    return refusal


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.timeout(300 * CASES)
@pytest.mark.parametrize("name", READERS)
def test_whatever_a_file_holds_is_taken_or_refused_in_words(name, tmp_path):
    reader, tally = READERS[name], Counter()
    assert all(offer(reader, tmp_path, data) is None for data in reader.valid)

    @seed(SEED)
    @settings(max_examples=300 * CASES, deadline=timedelta(seconds=20), database=None, suppress_health_check=list(HealthCheck))
    @given(reader.inputs())
    def feed(data: bytes) -> None:
        tally[offer(reader, tmp_path, data) is None] += 1

    feed()
    assert tally[False]


# -- known attacks ------------------------------------------------------------------------------------------


A_RECORD = READERS["record"].valid[0]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("tar", archive(("../../evil.png", b"xxx")), "no tar that can be unpacked .*outside the destination"),
        ("tar", archive(("s/train/a/1.png", b""), **LINK), "no tar that can be unpacked"),
        # after it Python's tarfile would go back to its start, for ever
        ("tar", archive(("a.png", b""), size=-512), "no tar that can be unpacked"),
        ("tar", archive(("a.png", b"x" * 600))[:700], "no tar that can be unpacked"),
        ("npz", NPZS[0].replace(b"\x93NUMPY", b"\x93NUMPX", 1), "no readable .npz"),
        ("record", b"[" * 200_000, "no readable run record .*record.json is no JSON file"),
        ("record", A_RECORD.replace(b'"metrics"', b'"other"'), "'metrics' is missing or no dict"),
        ("record", A_RECORD.replace(b'"seed": 1', b'"seed": "1"'), "'seed' is missing or no int"),
        ("commonsense", b'[{"instruction": "\\ud800", "input": "", "output": "x", "answer": "true"}]', "must be text"),
        ("classifier", as_json({"classes": 3}), "no adapter folder"),
        ("classifier", as_json(CLASSIFIER | {"image_size": 8.5}), "not as it was written"),
        ("classifier", as_json(CLASSIFIER | {"crop": "1"}), "not as it was written"),
        ("classifier", as_json(CLASSIFIER | {"mlp_layers": 9}), "not as it was written"),
        ("classifier", as_json(CLASSIFIER | {"method": 3}), "not as it was written"),
    ],
)  # fmt: skip
def test_known_attacks_are_refused(name, data, message, tmp_path):
    refusal = offer(READERS[name], tmp_path, data)
    assert refusal and re.search(message, refusal)


def test_a_pickle_does_not_run(tmp_path):
    bomb, adapter = Bomb(tmp_path / "mark"), tmp_path / "adapter"
    np.savez(tmp_path / "x.npz", x_train=np.array([bomb], dtype=object))
    with pytest.raises(UserError, match="no readable"):
        READERS["npz"].read(tmp_path / "x.npz")
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    torch.save({"weight": bomb}, adapter / "adapter_model.bin")
    vit(tmp_path)
    weights = tmp_path / "vit.safetensors"
    description = CLASSIFIER | {"architecture": "test_vit", "model": str(weights), "sha256": fingerprint(weights)}
    (adapter / "classifier.json").write_text(json.dumps(description))
    for load in (lambda: check_adapter(Options(data="x", output_dir="y", adapter=str(adapter))), lambda: restore(adapter)):
        with pytest.raises(UserError, match="never from a pickle"):
            load()
    assert not (tmp_path / "mark").exists()
