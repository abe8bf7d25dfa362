"""Folders that are whole or not there: written aside, flushed to the disk, renamed into place, sealed with checksums.

A checkpoint `checkpoint-STEP` holds a `manifest.json` with the SHA-256 of each of its files. Whatever a kill, a full
disk or a bad disk leaves behind is either invisible (a hidden folder, removed by `sweep`) or found by `find_damage`.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError
from ..record import read_json, write_json_atomic
from .checksums import fingerprint

MANIFEST = "manifest.json"
_SCHEMA = 1
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def begin(place: Path) -> Path:
    """An empty hidden folder beside `place`, to be filled and then `publish`ed."""
    aside = place.with_name(f".{place.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def publish(aside: Path, place: Path, *, sealed: bool = True) -> None:
    """Flush everything in `aside` to the disk and rename it to `place`, in whose stead it is from then on.

    `sealed` adds the manifest that `find_damage` asks for.
    """
    if sealed:
        checksums = {name: fingerprint(aside / name) for name in _files(aside)}
        write_json_atomic(aside / MANIFEST, {"schema": _SCHEMA, "sha256": checksums})
    for path in (*aside.rglob("*"), aside):
        _flush(path)
    discard(place)
    os.rename(aside, place)
    _flush(place.parent)


def last_good(parent: Path) -> str:
    """What there is to go on from, in words."""
    found = checkpoints(parent)
    return f"{found[0].name} is kept" if found else "nothing was saved yet"


@contextmanager
def whole_folder(place: Path, *, sealed: bool = True) -> Iterator[Path]:
    """Yields a folder to write to, which becomes `place` if the block ends well and leaves no trace if not. Raises UserError: the
    disk is full."""
    aside = begin(place)
    try:
        yield aside
        publish(aside, place, sealed=sealed)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if is_full_disk(error):
            raise UserError(f"the disk of {place} is full: make room, or choose another folder") from error
        raise


def discard(folder: Path) -> None:
    """Remove a folder so that no half of it is ever seen under its name; does nothing when it is not there."""
    if not folder.exists():
        return
    doomed = folder.with_name(f".{folder.name}.discarded")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def sweep(parent: Path) -> None:
    """Remove what processes that died were writing to, or removing from, `parent`."""
    for pattern in (".*.partial", ".*.discarded"):
        for leftover in parent.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)


def keep_newest(parent: Path, count: int, also: Path | None = None) -> None:
    """Discard all checkpoints but the newest `count`, and `also`."""
    for folder in checkpoints(parent)[count:]:
        if folder != also:
            discard(folder)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> list[str]:
    """Relative names of all that is no folder, the manifest aside."""
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())
    return sorted(name for name in names if name != MANIFEST)


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was written, from its name."""
    return int(_CHECKPOINT.fullmatch(checkpoint.name).group(1))


def checkpoints(parent: Path) -> list[Path]:
    """The folders `checkpoint-STEP` in `parent`, newest first, whole or not."""
    if not parent.is_dir():
        return []
    return sorted((p for p in parent.iterdir() if _CHECKPOINT.fullmatch(p.name)), key=step_of, reverse=True)


def find_damage(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be used, in a few words; None when it is whole.

    Checked are the names and checksums of its files; torch reads them without running what a pickle asks for. A checkpoint
    that names an earlier one as the best so far (`best_global_step`) is worth as much as that one. Raises UserError: a file
    cannot be read just now, which says nothing about what it holds.
    """
    if not (checkpoint / MANIFEST).is_file():
        return f"it has no {MANIFEST}"
    try:
        manifest, found = read_json(checkpoint / MANIFEST), _files(checkpoint)
        if not isinstance(manifest, dict) or manifest.get("schema") != _SCHEMA or not isinstance(manifest.get("sha256"), dict):
            return f"its {MANIFEST} is of another schema"
        expected = manifest["sha256"]
        for name in [*expected, *found]:
            if name not in expected or name not in found:
                return f"{name} is {'missing' if name in expected else f'not in its {MANIFEST}'}"
            if fingerprint(checkpoint / name) != expected[name]:
                return f"{name} is not what was written"
        best = read_json(checkpoint / "trainer_state.json").get("best_global_step")
        if best not in (None, step_of(checkpoint)):
            damage = find_damage(checkpoint.with_name(f"checkpoint-{best}"))
            return damage and f"the best one so far, checkpoint-{best}, is broken: {damage}"
    except UserError as error:
        if isinstance(error.__cause__, OSError):
            raise UserError(f"{error}: nothing was changed; try again later") from error
        return str(error)
    except OSError as error:
        raise UserError(f"cannot read {checkpoint}: {error.strerror}: nothing was changed; try again later") from error
    return None


def check_adapter_files(folder: str | os.PathLike) -> None:
    """Raise UserError for an adapter folder whose weights are no safetensors: peft would fall back to a pickle."""
    folder = Path(folder).expanduser()
    if folder.is_dir() and not (folder / "adapter_model.safetensors").is_file():
        why = "adapters are read from safetensors alone, never from a pickle (.bin)"
        raise UserError(f"{folder} has no adapter_model.safetensors: {why}")


#: What full disks are called by the system, by safetensors, and by torch.save, which does not say why it failed.
_FULL_DISK = ("No space left", f"os error {errno.ENOSPC}", "iostream error", "PytorchStreamWriter failed")


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, is that the disk or the quota is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(words in str(error) for words in _FULL_DISK):
            return True
        error = error.__cause__ or error.__context__
    return False
