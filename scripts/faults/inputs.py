"""Feeds generated files to every reader: each must be taken or refused with a `UserError`, in time, writing nothing.

A file is a valid one with random edits (cut, bytes flipped, removed, doubled, overwritten by telling values), JSON in which one
value is another or is gone, or made from nothing.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import random
import signal
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import cache
from importlib import import_module as module
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from control_experiments.errors import UserError
from control_experiments.record import RunRecord, read_record, utc_now
from control_experiments.training.checkpoints import find_damage, whole_folder
from control_experiments.training.runs import RunFolder

#: Longer than any of these tiny inputs may take to read.
SECONDS = 20
#: Bytes that formats give a meaning, or that overflow what holds them.
_TELLING = [
    b"\0" * 8, b"\xff" * 8, b"\x80" + b"\0" * 7, b"\x7f" + b"\xff" * 7, b"-1", b"99999999999", b"1e999", b"NaN", b"../",
    b"/etc/passwd", b"\t", b"\n", b"\r", b'"', b"{", b"[", b"]}", b"null", b"\xed\xa0\x80", b"\xef\xbb\xbf",
    b"\\ud800", b"\xe2\x80\xa8", b"|O", b"PK\x03\x04", b"ustar", b"\x1f\x8b", b"0" * 12, b"-0000000001\0",
]  # fmt: skip


class Outcome(NamedTuple):
    """How many inputs were given, taken and refused, and what should not have happened."""

    inputs: int
    taken: int
    refused: int
    failures: list[str]


class Reader(NamedTuple):
    """A file name, valid contents to start from, and what reads the file."""

    name: str
    seeds: Callable[[], list[bytes]]
    read: Callable[[Path], object]


# -- inputs -------------------------------------------------------------------------------------------------


def edited(data: bytes, draw: random.Random) -> bytes:
    """The file with one to four random edits."""
    for _ in range(draw.choice((1, 1, 2, 4))):
        chunk = draw.choice(_TELLING) if draw.random() < 0.5 else draw.randbytes(draw.randint(1, 12))
        at, length = int(draw.random() * len(data)), draw.randint(1, 64)
        head, piece, tail = data[:at], data[at : at + length], data[at + length :]
        flipped = bytes(byte ^ (1 << length % 8) for byte in piece[:1]) + piece[1:]
        data = draw.choice((
            head + flipped + tail, head + chunk + data[at + len(chunk) :], head + chunk + piece + tail, head + tail,
            head + piece + piece + tail, head,
        ))  # fmt: skip
    return data


def _value(draw: random.Random, depth: int = 2) -> object:
    """Some JSON value."""
    kind = draw.random() if depth else 0
    if kind > 0.85:
        return [_value(draw, depth - 1) for _ in range(draw.randint(0, 4))]
    if kind > 0.7:
        return {draw.choice(("", "a", "step", "é")): _value(draw, depth - 1) for _ in range(draw.randint(0, 4))}
    return draw.choice((None, True, False, 0, -1, 10**30, 0.5, 1e308, math.nan, math.inf, "", "é\u2028", "\ud800"))


def _spoiled(contents: bytes, draw: random.Random) -> bytes:
    """Valid JSON in which one value, anywhere, is another one, or is gone."""
    document = json.loads(contents)
    nodes, places = [document], []
    for node in nodes:
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            places.append((node, key))
            nodes += [child] if isinstance(child, (dict, list)) else []
    node, key = draw.choice(places)
    if draw.random() < 0.3:
        del node[key]
    else:
        node[key] = _value(draw)
    return json.dumps(document).encode()


def make(reader: Reader, seeds: list[bytes], draw: random.Random) -> bytes:
    """A file for a reader; `seeds` are its valid ones."""
    way = draw.random()
    if reader.name.endswith(".json") and way < 0.4:
        if way < 0.01:
            return b"[" * draw.randint(1, 300_000)
        return json.dumps(_value(draw)).encode() if way < 0.1 else _spoiled(draw.choice(seeds), draw)
    return draw.randbytes(draw.randint(0, 200)) if way > 0.9 else edited(draw.choice(seeds), draw)


# -- readers ------------------------------------------------------------------------------------------------


@cache
def _images() -> dict[str, bytes]:
    found = {}
    for form in ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP"):
        buffer = io.BytesIO()
        Image.fromarray(np.arange(12 * 10 * 3, dtype=np.uint8).reshape(12, 10, 3)).save(buffer, form)
        found[form] = buffer.getvalue()
    return found


def _tars() -> list[bytes]:
    archives, png = [], _images()["PNG"]
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
            long = "train/a/" + "x" * (60 if form == tarfile.USTAR_FORMAT else 120)
            for name in ("train/a/1", "train/b/2", "test/a/3", "test/b/4", long):
                member = tarfile.TarInfo(f"s/{name}.png")
                member.size = len(png)
                tar.addfile(member, io.BytesIO(png))
            for kind, target in (("SYM", "/etc/passwd"), ("LNK", "../../../etc/passwd"), ("FIFO", "")):
                member = tarfile.TarInfo(f"s/train/a/{kind}.png")
                member.type, member.linkname = getattr(tarfile, f"{kind}TYPE"), target
                tar.addfile(member)
        archives.append(buffer.getvalue())
    return archives


def _npzs() -> list[bytes]:
    images = {"x_train": np.zeros((4, 3, 3, 3), np.uint8), "x_test": np.zeros((2, 3, 3, 3), np.uint8)}
    labels = {"y_train": np.arange(4) % 2, "y_test": np.arange(2), "classes": np.array(["a", "b"])}
    found = []
    for save in (np.savez, np.savez_compressed):
        buffer = io.BytesIO()
        save(buffer, **images, **labels)
        found.append(buffer.getvalue())
    return found


def a_record(**fields: object) -> RunRecord:
    """A record with nothing in it but the fields given."""
    empty = ("git", "versions", "device", "model", "data", "adapter", "hyperparameters", "metrics", "memory", "time")
    named = {"domain": "vit", "name": "a", "method": "lora", "task": "cola", "seed": 1, "command": []}
    times = {"created": utc_now(), "finished": utc_now()}
    return RunRecord(**{**{name: {} for name in empty}, **named, **times, **fields})


def _records() -> list[bytes]:
    metrics = {"best": {"x": 1.5}, "last": {"x": 1.0}}
    return [json.dumps(vars(a_record(metrics=metrics, history=[{"step": 1, "loss": 0.5}]))).encode()]


def _rows() -> list[bytes]:
    row = {"instruction": "Choose: é?", "input": "", "output": "the correct answer is true", "answer": "true"}
    return [json.dumps([row, row]).encode(), json.dumps([row], ensure_ascii=False).encode()]


def _answers() -> list[bytes]:
    entry = {"row": 0, "label": "true", "answer": "true", "correct": True, "text": "é\u2028true"}
    other = {"row": 1, "label": "true", "answer": None, "correct": False, "text": ""}
    return ["".join(json.dumps(e, ensure_ascii=False) + "\n" for e in (entry, other)).encode()]


def _read_answers(path: Path) -> None:
    evaluation = module("LlaMA.evaluation")
    if answers := evaluation.read_answers(path, [module("LlaMA.commonsense").Row("x", "", "true", "true")] * 2):
        evaluation.score(answers)


def _glue(task: str) -> Callable[[Path], object]:
    return lambda path: module("RoBERTa.glue").read_tsv(path, module("RoBERTa.glue").TASKS[task])


def _read_image(path: Path) -> None:
    images = module("ViT.images")
    images.decode(images.Files([images.Entry(path, path)], [0]), 0, "stop")


def _read_run(path: Path) -> None:
    folder = RunFolder.__new__(RunFolder)
    folder.path = path.parent
    folder.check_same({"method": "lora", "ranks": [1, 2]})


def _read_manifest(path: Path) -> None:
    (path.parent / "trainer_state.json").write_text('{"step": 3}')
    if damage := find_damage(path.parent):
        raise UserError(damage)


def _manifests() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        with whole_folder(Path(folder) / "checkpoint-3") as place:
            (place / "trainer_state.json").write_text('{"step": 3}')
        return [(Path(folder) / "checkpoint-3" / "manifest.json").read_bytes()]


_COLA = "g\t1\t\tThe cat é.\ng\t0\t*\tCat the.\n"
_STSB = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
_CLASSIFIER = {"method": "lora", "model": "m", "architecture": "a", "sha256": None, "image_size": 32, "mlp_layers": 2,
               "crop": 1.0, "classes": ["a", "b"]}  # fmt: skip
READERS = {
    "record": Reader("record.json", _records, read_record),
    "run": Reader("run.json", lambda: [b'{"method": "lora", "ranks": [1, 2]}'], _read_run),
    "manifest": Reader("manifest.json", _manifests, _read_manifest),
    "classifier": Reader("classifier.json", lambda: [json.dumps(_CLASSIFIER).encode()],
                         lambda path: module("ViT.classifier").read_description(path.parent)),
    "commonsense": Reader("rows.json", _rows, lambda path: module("LlaMA.commonsense").read_rows(path)),
    "answers": Reader("boolq.jsonl", _answers, _read_answers),
    "tsv": Reader("train.tsv", lambda: [_COLA.encode()], _glue("cola")),
    "tsv-header": Reader("train.tsv", lambda: [f"{_STSB}0\tg\tf\t2012\t1\ts\ts\tA b.\tC d.\t2.500\n".encode()], _glue("stsb")),
    "npz": Reader("images.npz", _npzs, lambda path: module("ViT.images").load_data(str(path), workers=1)),
    "tar": Reader("images.tar", _tars, lambda path: module("ViT.images").load_data(str(path), workers=1)),
    "image": Reader("x.png", lambda: list(_images().values()), _read_image),
}  # fmt: skip


# -- feeding ------------------------------------------------------------------------------------------------


def fast_folder() -> str | None:
    """A folder in memory, if there is one: 100,000 files wear a disk out."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@contextlib.contextmanager
def within(seconds: int):
    """Raise TimeoutError in the main thread when the block takes longer."""

    def late(*_) -> None:
        raise TimeoutError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def offer(reader: Reader, folder: Path, data: bytes) -> bool:
    """Give a reader one input; whether it was taken.

    Raises:
        Exception: whatever the reader raises that is no `UserError`; AssertionError: it wrote or removed files.
    """
    inside = folder / "checkpoint-3"  # a name that every reader takes
    inside.mkdir(exist_ok=True)
    (inside / reader.name).write_bytes(data)
    taken = True
    try:
        with within(SECONDS), contextlib.redirect_stderr(io.StringIO()):
            reader.read(inside / reader.name)
    except UserError as error:
        assert str(error).strip(), "it says nothing"
        taken = False
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    left -= {"checkpoint-3", f"checkpoint-3/{reader.name}", "checkpoint-3/trainer_state.json"}
    assert not left, f"it left {left}"
    return taken


def feed(name: str, folder: Path, count: int, seed: int = 0) -> Outcome:
    """Give a reader `count` generated inputs and count what it did with them; one failure of each kind is described."""
    reader, tally, failures, draw = READERS[name], Counter(), {}, random.Random(seed)
    seeds = reader.seeds()
    for _ in range(count):
        data = make(reader, seeds, draw)
        try:
            tally[offer(reader, folder, data)] += 1
        except Exception as error:  # the campaign goes on: each kind of failure is to be seen once
            kind = f"{type(error).__name__}: {str(error)[:200]}"
            failures.setdefault(kind[:40], f"{kind} for {data[:300]!r}")
    return Outcome(count, tally[True], tally[False], list(failures.values())[:10])
