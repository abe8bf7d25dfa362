"""One checksum for a file or a whole folder."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from huggingface_hub.utils.sha import sha_fileobj

from ..errors import UserError


def fingerprint(path: str | Path) -> str:
    """SHA-256 of a file's bytes, or, for a folder, of its files' relative names and checksums in sorted order.

    Hidden files and folders (`.git`, `.lock`, caches) do not count. Raises UserError: nothing is there.
    """
    path = Path(path)
    if path.is_file():
        with path.open("rb") as file:
            return sha_fileobj(file).hex()
    if not path.is_dir():
        raise UserError(f"{path} does not exist")
    names = (file.relative_to(path) for file in sorted(path.rglob("*")) if file.is_file())
    shown = (name for name in names if not any(part.startswith(".") for part in name.parts))
    lines = [f"{name.as_posix()}\t{fingerprint(path / name)}\n" for name in shown]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def local_fingerprint(name: str | Path) -> str | None:
    """The fingerprint of a file or folder that a command line names, or None if nothing is there, as for a hub id.

    It is read once per process, unless a size or a time of change there is another.
    """
    path = Path(name).expanduser()
    if not path.exists():
        return None
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    states = tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return _read_once(path.resolve(), states)


@lru_cache
def _read_once(path: Path, _states: tuple) -> str:
    return fingerprint(path)
