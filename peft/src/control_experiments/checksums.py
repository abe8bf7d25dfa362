"""One checksum for a file or a whole folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

from .errors import UserError


def fingerprint(path: str | Path) -> str:
    """SHA-256 of a file's bytes, or, for a folder, of its files' relative names and checksums in sorted order.

    Hidden files and folders (`.git`, `.lock`, caches) do not count.

    Raises:
        UserError: nothing is there.
    """
    path = Path(path)
    if path.is_file():
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
            return digest.hexdigest()
    if not path.is_dir():
        raise UserError(f"{path} does not exist")
    lines = [
        f"{file.relative_to(path).as_posix()}\t{fingerprint(file)}\n"
        for file in sorted(path.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
