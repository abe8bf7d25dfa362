"""Feeds generated files to every reader: each must be taken or refused with a `UserError`, in time, writing nothing.

An input is a valid file with random edits (cut, bytes flipped, removed, doubled, overwritten by telling values), or
bytes or JSON made from nothing. Hypothesis generates them and, in tests, shrinks what fails.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import tarfile
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from control_experiments.errors import UserError
from control_experiments.record import RunRecord, read_record, utc_now
from control_experiments.training.checkpoints import find_damage, whole_folder
from control_experiments.training.runs import RunFolder

#: How many further variants are made of each input that Hypothesis makes, which is what takes its time.
VARIANTS = 19
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
    text: bool = False


# -- inputs -------------------------------------------------------------------------------------------------


def edits() -> st.SearchStrategy:
    """Lists of (operation, where in the file as a share of it, length, bytes)."""
    share = st.floats(0, 1, allow_nan=False)
    chunk = st.sampled_from(_TELLING) | st.binary(min_size=1, max_size=12)
    kind = st.sampled_from(("flip", "overwrite", "insert", "remove", "double", "cut"))
    return st.lists(st.tuples(kind, share, st.integers(1, 64), chunk), min_size=0, max_size=6)


def apply(contents: bytes, changes: list[tuple[str, float, int, bytes]]) -> bytes:
    data = bytearray(contents)
    for kind, share, length, chunk in changes:
        at = int(share * len(data))
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << (length % 8)
        elif kind == "overwrite":
            data[at : at + len(chunk)] = chunk
        elif kind == "insert":
            data[at:at] = chunk
        elif kind == "remove":
            del data[at : at + length]
        elif kind == "double":
            data[at:at] = data[at : at + length]
        elif kind == "cut":
            del data[at:]
    return bytes(data)


def random_edits(draw: random.Random) -> list[tuple[str, float, int, bytes]]:
    """As `edits`, a hundred times faster."""
    kinds = ("flip", "overwrite", "insert", "remove", "double", "cut", "flip", "overwrite")
    return [
        (
            draw.choice(kinds),
            draw.random(),
            draw.randint(1, 64),
            draw.choice(_TELLING) if draw.random() < 0.5 else draw.randbytes(draw.randint(1, 12)),
        )
        for _ in range(draw.choice((1, 1, 2, 4)))
    ]


def _json_values() -> st.SearchStrategy:
    leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    return st.recursive(
        leaf,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    )


def _spoiled_json(seeds: list[bytes]) -> st.SearchStrategy:
    """Valid JSON in which one value, anywhere, is another one, or is gone."""

    def spoil(contents: bytes, where: int, value: object, gone: bool) -> bytes:
        document = json.loads(contents)
        places: list[tuple] = []

        def walk(node: object) -> None:
            entries = (
                node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
            )
            for key, child in entries:
                places.append((node, key))
                walk(child)

        walk(document)
        if places:
            node, key = places[where % len(places)]
            if gone:
                del node[key]
            else:
                node[key] = value
        return json.dumps(document).encode()

    return st.builds(spoil, st.sampled_from(seeds), st.integers(0, 10_000), _json_values(), st.booleans())


def contents(reader: Reader) -> st.SearchStrategy:
    """Files for a reader."""
    seeds = reader.seeds()
    made = [st.builds(apply, st.sampled_from(seeds), edits()), st.binary(max_size=200)]
    if reader.name.endswith(".json"):
        made += [_spoiled_json(seeds), _json_values().map(lambda value: json.dumps(value).encode())]
        made += [st.integers(1, 3000).map(lambda depth: b"[" * depth * 100)]
    if reader.text:
        made += [st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass"))]
    return st.one_of(made)


# -- readers ------------------------------------------------------------------------------------------------


@cache
def _image_bytes() -> dict[str, bytes]:
    pixels = np.arange(12 * 10 * 3, dtype=np.uint8).reshape(12, 10, 3)
    found = {}
    for form in ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP"):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, form)
        found[form] = buffer.getvalue()
    return found


def _tars() -> list[bytes]:
    archives = []
    png = _image_bytes()["PNG"]
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
            long = "x" * (60 if form == tarfile.USTAR_FORMAT else 120)
            for name in (
                "s/train/a/1.png",
                "s/train/b/2.png",
                "s/test/a/3.png",
                "s/test/b/4.png",
                f"s/train/a/{long}.png",
            ):
                member = tarfile.TarInfo(name)
                member.size = len(png)
                tar.addfile(member, io.BytesIO(png))
            for kind, name, target in (
                (tarfile.SYMTYPE, "s/train/a/link.png", "/etc/passwd"),
                (tarfile.LNKTYPE, "s/train/a/hard.png", "../../../etc/passwd"),
                (tarfile.FIFOTYPE, "s/train/a/fifo.png", ""),
            ):
                member = tarfile.TarInfo(name)
                member.type, member.linkname = kind, target
                tar.addfile(member)
        archives.append(buffer.getvalue())
    return archives


def _npzs() -> list[bytes]:
    arrays = {
        "x_train": np.zeros((4, 3, 3, 3), np.uint8), "y_train": np.arange(4) % 2,
        "x_test": np.zeros((2, 3, 3, 3), np.uint8), "y_test": np.arange(2), "classes": np.array(["a", "b"]),
    }  # fmt: skip
    found = []
    for save in (np.savez, np.savez_compressed):
        buffer = io.BytesIO()
        save(buffer, **arrays)
        found.append(buffer.getvalue())
    return found


def _record() -> list[bytes]:
    record = RunRecord(
        domain="vit", name="a", method="lora", task="cola", seed=1, command=["python"], created=utc_now(),
        finished=utc_now(), git={}, versions={}, device={}, model={}, data={}, adapter={}, hyperparameters={"lr": 1},
        metrics={"best": {"x": 1.5}, "last": {"x": 1.0}}, memory={}, time={}, history=[{"step": 1, "loss": 0.5}],
    )  # fmt: skip
    return [json.dumps(vars(record)).encode()]


def _rows() -> list[bytes]:
    row = {"instruction": "Choose: é?", "input": "", "output": "the correct answer is true", "answer": "true"}
    return [json.dumps([row, row]).encode(), json.dumps([row], ensure_ascii=False).encode()]


def _answers() -> list[bytes]:
    entry = {"row": 0, "label": "true", "answer": "true", "correct": True, "text": "é\u2028true"}
    other = {"row": 1, "label": "true", "answer": None, "correct": False, "text": ""}
    return ["".join(json.dumps(e, ensure_ascii=False) + "\n" for e in (entry, other)).encode()]


def _read_rows(path: Path) -> object:
    from LlaMA.commonsense import read_rows

    return read_rows(path)


def _read_answers(path: Path) -> object:
    from LlaMA.commonsense import Row
    from LlaMA.evaluation import read_answers, score

    answers = read_answers(path, [Row("x", "", "true", "true")] * 2)
    return score(answers) if answers else None


def _read_cola(path: Path) -> object:
    from RoBERTa.glue import TASKS, read_tsv

    return read_tsv(path, TASKS["cola"])


def _read_stsb(path: Path) -> object:
    from RoBERTa.glue import TASKS, read_tsv

    return read_tsv(path, TASKS["stsb"])


def _read_images(path: Path) -> object:
    from ViT.images import load_data

    return load_data(str(path), workers=1)


def _read_image(path: Path) -> object:
    from ViT.images import Files, decode

    return decode(Files([path], [0]), 0, "stop")


def _read_description(path: Path) -> object:
    from ViT.classifier import read_description

    return read_description(path.parent)


def _read_run(path: Path) -> object:
    """A run's folder whose `run.json` is the input."""
    folder = RunFolder.__new__(RunFolder)
    folder.path = path.parent
    return folder.check_same({"method": "lora", "ranks": [1, 2]})


def _read_manifest(path: Path) -> object:
    """A checkpoint whose manifest is the input."""
    (path.parent / "trainer_state.json").write_text('{"step": 3}')
    if damage := find_damage(path.parent):
        raise UserError(damage)
    return None


def _manifests() -> list[bytes]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        with whole_folder(Path(folder) / "checkpoint-3") as place:
            (place / "trainer_state.json").write_text('{"step": 3}')
        return [(Path(folder) / "checkpoint-3" / "manifest.json").read_bytes()]


_STSB = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
READERS: dict[str, Reader] = {
    "record": Reader("record.json", _record, read_record),
    "run": Reader("run.json", lambda: [b'{"method": "lora", "ranks": [1, 2]}'], _read_run),
    "manifest": Reader("manifest.json", _manifests, _read_manifest),
    "classifier": Reader(
        "classifier.json",
        lambda: [
            json.dumps(
                {
                    "method": "lora", "model": "m", "architecture": "a", "sha256": None, "image_size": 32, "mlp_layers": 2,
                    "crop": 1.0, "classes": ["a", "b"],
                }
            ).encode()
        ],
        _read_description,
    ),
    "commonsense": Reader("rows.json", _rows, _read_rows),
    "answers": Reader("boolq.jsonl", _answers, _read_answers, text=True),
    "tsv": Reader("train.tsv", lambda: ["g\t1\t\tThe cat é.\ng\t0\t*\tCat the.\n".encode()], _read_cola, text=True),
    "tsv-header": Reader(
        "train.tsv", lambda: [(_STSB + "0\tg\tf\t2012\t1\ts\ts\tA b.\tC d.\t2.500\n").encode()], _read_stsb, text=True
    ),
    "npz": Reader("images.npz", _npzs, _read_images),
    "tar": Reader("images.tar", _tars, _read_images),
    "image": Reader("x.png", lambda: list(_image_bytes().values()), _read_image),
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
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def offer(reader: Reader, folder: Path, data: bytes) -> bool:
    """Give a reader one input; whether it was taken.

    Raises:
        Exception: whatever the reader raises that is no `UserError`; AssertionError: it wrote or removed files.
    """
    inside = folder / "checkpoint-3"  # a name that every reader takes
    inside.mkdir(exist_ok=True)
    path = inside / reader.name
    path.write_bytes(data)
    try:
        with within(SECONDS), contextlib.redirect_stderr(io.StringIO()):
            reader.read(path)
        taken = True
    except UserError as error:
        assert str(error).strip(), "it says nothing"
        taken = False
    found = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))
    allowed = {"checkpoint-3", f"checkpoint-3/{reader.name}", "checkpoint-3/trainer_state.json"}
    assert set(found) <= allowed, f"it left {found}"
    return taken


def feed(name: str, folder: Path, count: int, seed_: int = 0) -> Outcome:
    """Give a reader `count` generated inputs and count what it did with them; at most ten failures are described."""
    reader, tally, failures, draw = READERS[name], Counter(), [], random.Random(seed_)
    valid = reader.seeds()

    @settings(
        max_examples=max(1, count // (1 + VARIANTS)), database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(contents(reader))
    def run(data: bytes) -> None:
        # half of the variants are of valid files: they get past the first checks
        bases = (data if draw.random() < 0.5 else draw.choice(valid) for _ in range(VARIANTS))
        for variant in (data, *(apply(base, random_edits(draw)) for base in bases)):
            tally["inputs"] += 1
            try:
                tally["taken" if offer(reader, folder, variant) else "refused"] += 1
            except Exception as error:  # the campaign goes on: each kind of failure is to be seen once
                kind = f"{type(error).__name__}: {str(error)[:200]}"
                if len(failures) < 10 and not any(kind[:40] == other[:40] for other in failures):
                    failures.append(f"{kind} for {variant[:300]!r}")

    while tally["inputs"] < count:  # Hypothesis may stop early, when it believes to have seen all there is
        seed(seed_)(run)()
        seed_ += 1
    return Outcome(tally["inputs"], tally["taken"], tally["refused"], failures)
