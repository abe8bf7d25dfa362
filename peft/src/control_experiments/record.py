"""The run record: one JSON file that says what was run, on what, and what came out."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from .errors import UserError
from .paths import REPOSITORY, public_path

SCHEMA = 1
_PACKAGES = (
    "torch", "transformers", "peft", "peft-control", "accelerate", "datasets",
    "timm", "torchvision", "bitsandbytes", "trl", "numpy", "liger-kernel", "unsloth",
)  # fmt: skip
_ABSOLUTE_PATH = re.compile(r"(?<![\w.:/])(?:~|\.\.)?/[^\s'\",;:=]*|^\.\.(?:/[^\s]*)?$")


@dataclass(kw_only=True)
class RunRecord:
    """Everything a table, a picture or a reader needs to know about one finished run (schema 1).

    Times are UTC in ISO 8601, memory is in bytes, durations in seconds. A value that could not be measured is None.
    """

    domain: str
    name: str
    method: str
    task: str
    seed: int
    command: list[str]
    created: str
    finished: str = ""
    git: dict
    versions: dict
    device: dict
    model: dict = field(default_factory=dict)
    data: dict = field(default_factory=dict)
    adapter: dict = field(default_factory=dict)
    hyperparameters: dict
    metrics: dict = field(default_factory=dict)
    memory: dict = field(default_factory=dict)
    time: dict = field(default_factory=dict)
    history: list[dict] = field(default_factory=list)
    status: str = "finished"
    schema: int = SCHEMA

    @classmethod
    def begin(cls, options, *, method: str | None = None, command: Sequence[str], name: str,
              domain: str, task: str, device: dict, **settled: object) -> RunRecord:  # fmt: skip
        """The record of a run that begins: everything that is known before it has results.

        Args:
            options: `training.options.RunOptions`; gives seed, method and hyperparameters.
            method: where the options do not name it.
            settled: hyperparameters as they came out, such as the precision that "auto" stands for.
        """
        said = {"domain": domain, "name": name, "task": task, "device": device, "command": list(command), "seed": options.seed}
        here = {"created": utc_now(), "git": git_state(), "versions": package_versions(), "status": "running"}
        return cls(**said, **here, method=method or options.method, hyperparameters={**options.hyperparameters(), **settled})

    def finish(self, path: str | os.PathLike | None = None, **results: object) -> None:
        """Add what came out (fields by name) and, where there is a `path`, write the record to it."""
        for name, value in results.items():
            if not hasattr(self, name):
                raise TypeError(f"a run record has no {name!r}")
            setattr(self, name, value)
        self.finished, self.status = utc_now(), "finished"
        if path is not None:
            self.write(path)

    def write(self, path: str | os.PathLike) -> Path:
        """Write the record atomically, stripped of private paths; return where it is."""
        return write_json_atomic(path, _mapped(asdict(self), _public))


def read_record(path: str | os.PathLike) -> RunRecord:
    """Read a record back. Raises UserError: the file is missing, broken, of another schema or lacks a field;
    the message names it."""
    path = Path(path)
    try:
        contents = read_json(path)
    except UserError as error:
        raise UserError(f"{path} is no readable run record ({error}): delete it and run again") from error
    found = contents.get("schema") if isinstance(contents, dict) else None
    if found != SCHEMA:
        raise UserError(f"{path} is no run record of schema {SCHEMA} (found {found!r})")
    for entry in fields(RunRecord):
        expected = {"dict": dict, "list[dict]": list, "list[str]": list, "str": str, "int": int}[entry.type]
        if not isinstance(contents.get(entry.name), expected):
            what = f"{entry.name!r} is missing or no {expected.__name__}"
            raise UserError(f"{path} is a broken run record: {what}")
    return RunRecord(**{entry.name: contents[entry.name] for entry in fields(RunRecord)})


def read_json(path: str | os.PathLike) -> object:
    """What a JSON file holds. Raises UserError: it is missing, unreadable, no UTF-8 or no JSON, or nested too
    deeply; the message names it."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON file: {error}") from error


def write_json_atomic(path: str | os.PathLike, contents: object) -> Path:
    """Write JSON so that `path` holds either what it held before or all of `contents`, even if the machine stops."""
    text = json.dumps(_mapped(contents, _finite), indent=2, ensure_ascii=False, allow_nan=False)
    return write_text_atomic(path, text + "\n")


def write_text_atomic(path: str | os.PathLike, text: str) -> Path:
    """Write a file so that `path` holds either what it held before or all of `text`, even if the machine stops."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def utc_now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def git_state() -> dict:
    """The checkout's commit and whether tracked files differ from it; both None outside of git."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(REPOSITORY), *arguments]
        try:
            return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def package_versions() -> dict:
    """Versions of Python and of those of our packages that are installed."""
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package.replace("-", "_")] = metadata.version(package)
    return versions


def public_command(command: Sequence[str]) -> list[str]:
    """A command line without private paths."""
    return [_public(str(argument)) for argument in command]


def _mapped(value: object, leaf: Callable) -> object:
    """The same value with `leaf` of whatever is no container, and sets, which peft has, as lists."""
    if isinstance(value, dict):
        return {str(key): _mapped(entry, leaf) for key, entry in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(_mapped(list(value), leaf))
    if isinstance(value, (list, tuple)):
        return [_mapped(entry, leaf) for entry in value]
    return leaf(value)


def _public(value: object) -> object:
    """Without what an absolute path tells about the machine."""
    if isinstance(value, os.PathLike):
        return public_path(value)
    if isinstance(value, str):
        return _ABSOLUTE_PATH.sub(lambda match: public_path(match.group()), value)
    return value


def _finite(value: object) -> object:
    """None for NaN and infinities, which JSON lacks."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
