"""The folder of one run: who may write to it, and whether what is in it belongs to this run."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import Interrupted, UserError
from ..record import read_json, write_json_atomic
from . import checkpoints
from .options import processes

#: How gloo, NCCL and torch's store say that another process is gone. Their other errors (two processes on one GPU, a tensor
#: that is not contiguous) are ours, and keep their traceback.
_GONE = re.compile(
    r"connection (was likely )?(closed|reset|refused)|broken pipe|remote process exited|ncclRemoteError"
    r"|timed out (waiting|after|in)|wait timeout|communicator was aborted",
    re.IGNORECASE,
)
#: What an option says that is not used; None is left out of `run.json`'s comparison by itself.
_NOT_USED = (False, "none", "plain")


class RunFolder:
    """A run's output folder, held by an exclusive lock for as long as the object is open.

    Layout: `record.json` (written last), `run.json` (what the run is), `adapter/`, `checkpoints/`, `run.log`, `.lock`.
    A process that dies lets go of the lock by itself. In a distributed run the process of rank 0 holds it for all.
    As a context it also says what an interruption, a full disk or the loss of another process left behind, and how to go on
    (`go_on`).
    Raises UserError: another process holds the folder, or the path is no folder that can be written.
    """

    def __init__(self, path: str | os.PathLike, go_on: str = "add --resume to the same command"):
        if not os.fspath(path):
            raise UserError("the output folder's name is empty: give one")
        self.path, self.go_on = Path(path), go_on
        self.record, self.log = self.path / "record.json", self.path / "run.log"
        self.adapter, self.checkpoints = self.path / "adapter", self.path / "checkpoints"
        self._lock: int | None = None
        self._made = [place for place in (self.path, *self.path.parents) if not place.exists()]
        if os.environ.get("RANK", "0") != "0":
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"{self.path} cannot be an output folder: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise UserError(f"{self.path} is in use by another run: wait or choose another folder") from error

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, _kind, error: BaseException | None, _trace) -> None:
        answered = any(self.path.glob("*.jsonl"))
        kept = "what was answered is kept" if answered else checkpoints.last_good(self.checkpoints)
        self.close()
        if isinstance(error, KeyboardInterrupt):
            told = f"{str(error) or 'interrupted'}; {kept}: {self.go_on} to go on"
            raise Interrupted(getattr(error, "number", Interrupted().number), told) from error
        if checkpoints.is_full_disk(error):
            raise UserError(
                f"the disk of {self.path} is full ({shutil.disk_usage(self.path.parent).free / 2**20:.0f} MiB free); "
                f"{kept}: make room, then {self.go_on} to go on"
            ) from error
        if processes() > 1 and isinstance(error, RuntimeError) and _GONE.search(str(error)):
            gone = "another process of this run died or cannot be reached (see above)"
            raise UserError(f"{gone}; {kept}: {self.go_on} to go on") from error

    def close(self) -> None:
        """Let go of the lock; a folder in which nothing was written but its claim goes away, and those above it that it made."""
        if self._lock is None:
            return
        contents = list(self.path.iterdir())
        if {entry.name for entry in contents} <= {".lock", "run.json"}:
            for entry in contents:
                entry.unlink()
            self.path.rmdir()
            with suppress(OSError):  # another run has begun beside this one
                for place in self._made[1:]:
                    place.rmdir()
        os.close(self._lock)
        self._lock = None

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.record.is_file()

    @contextmanager
    def logging_from(self, *names: str, terminal: bool = False) -> Iterator[None]:
        """Write what the loggers of these names say to the run's log (and, if asked, to stderr) while in the block.

        In a distributed run the process of rank 0 does so for all: the folder may not be there yet for the others.
        """
        if self._lock is None:
            yield
            return
        file = _LogFile(self.log, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        handlers = [file, logging.StreamHandler()] if terminal else [file]
        pairs = [(logging.getLogger(name), handler) for name in names for handler in handlers]
        for logger, handler in pairs:
            logger.setLevel(logging.INFO)
            logger.addHandler(handler)
        try:
            yield
        finally:
            for logger, handler in pairs:
                logger.removeHandler(handler)
            file.close()

    def claim(self, identity: dict, *, resume: bool = False, defaults: dict | None = None) -> Path | None:
        """Make the folder this run's, and say which checkpoint to go on from (None: from the start).

        On `resume` that is the newest whole one; newer ones that are broken are set aside, each with a line on
        stderr. `identity` (JSON values) is everything that decides the run's outcome: method, task, model,
        ranks, ...; `defaults` says what an option meant before there was one (see `check_same`). Raises
        UserError: the folder holds another run that is finished, or whose checkpoints would be resumed or lost;
        or none of the checkpoints to resume from is whole (nothing was changed then).
        """
        found = checkpoints.checkpoints(self.checkpoints)
        if self.finished or found:
            self.check_same(identity, defaults)
        if self.finished:
            if self._lock is not None:  # it may have died between its record and its last act
                checkpoints.discard(self.checkpoints)
            return None
        if found and not resume:
            raise UserError(
                f"{self.path} holds an unfinished run ({found[0].name}): add --resume to go on with it, "
                "or delete the folder to start over"
            )
        checkpoint = self._newest_whole(found)
        if self._lock is not None:
            for folder in (self.path, self.checkpoints):
                checkpoints.sweep(folder)
            write_json_atomic(self.path / "run.json", identity)
        return checkpoint

    def _newest_whole(self, found: list[Path]) -> Path | None:
        """The first of `found` that is whole; those before it are set aside."""
        damage = {}
        for checkpoint in found:
            reason = checkpoints.find_damage(checkpoint)
            if reason is None:
                break
            damage[checkpoint] = reason
        if damage and len(damage) == len(found):
            reasons = "; ".join(f"{checkpoint.name}: {reason}" for checkpoint, reason in damage.items())
            raise UserError(
                f"no checkpoint in {self.checkpoints} is whole ({reasons}): nothing was changed; delete {self.path} to "
                "start over, or put back a copy of a checkpoint"
            )
        for broken, reason in damage.items() if self._lock is not None else ():
            place = broken.with_name(f"{broken.name}.broken")  # where nothing looks for one
            checkpoints.discard(place)
            broken.rename(place)
            print(f"warning: {broken.name} is broken ({reason}): set aside as {place.name}", file=sys.stderr)
        return found[len(damage)] if found else None

    def check_same(self, identity: dict, defaults: dict | None = None) -> None:
        """Check that the folder's `run.json` says what `identity` says.

        An option that is newer than the run is missing there, which says the same as its default or as not used
        (`_NOT_USED`). Nor is a checksum (`..._sha256`) compared that was not noted there yet. Raises UserError:
        it does not; the message names every difference.
        """
        identity, defaults = json.loads(json.dumps([identity, defaults or {}]))

        def is_unused(name: str) -> bool:
            value = identity[name]
            return value in _NOT_USED or name.endswith("_sha256") or (name in defaults and value == defaults[name])

        file = self.path / "run.json"
        try:
            there = {name: identity[name] for name in identity if is_unused(name)} | read_json(file)
        except (UserError, TypeError) as error:
            raise UserError(f"{file} is missing or broken: delete {self.path} or choose another") from error
        differences = [
            f"{name} {there.get(name)!r} there, {identity.get(name)!r} asked for"
            for name in {**identity, **there}
            if there.get(name) != identity.get(name)
        ]
        if differences:
            raise UserError(
                f"{self.path} belongs to another run ({'; '.join(differences)}): name another folder with --output_dir, or "
                "delete that one"
            )


class _LogFile(logging.FileHandler):
    """A log file whose write errors (a full disk) end the run instead of filling the terminal with tracebacks."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise
