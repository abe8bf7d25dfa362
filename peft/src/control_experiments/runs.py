"""The folder of one run: who may write to it, and whether what is in it belongs to this run."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

from .errors import UserError
from .record import write_json_atomic


class RunFolder:
    """A run's output folder, held by an exclusive lock for as long as the object is open.

    Layout: `record.json` (written last), `run.json` (what the run is), `adapter/`, `checkpoints/`, `run.log`, `.lock`.
    A process that dies lets go of the lock by itself. In a distributed run the process of rank 0 holds it for all.

    Raises:
        UserError: another process holds the folder, or the path is no folder that can be written.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._lock: int | None = None
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
            raise UserError(
                f"{self.path} is in use by another run: wait for it or choose another folder"
            ) from error

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the lock; a folder in which nothing was written but its claim goes away."""
        if self._lock is None:
            return
        contents = list(self.path.iterdir())
        if {entry.name for entry in contents} <= {".lock", "run.json"}:
            for entry in contents:
                entry.unlink()
            self.path.rmdir()
        self._release()

    def _release(self) -> None:
        os.close(self._lock)
        self._lock = None

    @property
    def record(self) -> Path:
        return self.path / "record.json"

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.record.is_file()

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def log(self) -> Path:
        return self.path / "run.log"

    @property
    def last_checkpoint(self) -> Path | None:
        """The newest complete Trainer checkpoint; one that a kill cut short has no trainer_state.json."""
        complete = [state.parent for state in self.checkpoints.glob("checkpoint-*/trainer_state.json")]
        return max(complete, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)

    def claim(self, identity: dict, *, resume: bool = False) -> Path | None:
        """Make the folder this run's, and say which checkpoint to go on from (None: from the start).

        `identity` (JSON values) is everything that decides the run's outcome: method, task, model, ranks, ...

        Raises:
            UserError: the folder holds another run that is finished, or whose checkpoints would be resumed or lost.
        """
        identity = json.loads(json.dumps(identity))
        checkpoint = self.last_checkpoint
        if self.finished or checkpoint:
            self._check_same(identity)
        if checkpoint and not self.finished and not resume:
            raise UserError(
                f"{self.path} holds an unfinished run ({checkpoint.name}): add --resume to go on with it, "
                "or delete the folder to start over"
            )
        if not self.finished and self._lock is not None:
            write_json_atomic(self.path / "run.json", identity)
        return checkpoint

    def _check_same(self, identity: dict) -> None:
        file = self.path / "run.json"
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            names = dict.fromkeys([*identity, *found])
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{file} is missing or broken: delete {self.path} or choose another folder"
            ) from error
        differences = [
            f"{name} {found.get(name)!r} there, {identity.get(name)!r} asked for"
            for name in names
            if found.get(name) != identity.get(name)
        ]
        if differences:
            raise UserError(
                f"{self.path} belongs to another run ({'; '.join(differences)}): choose another output folder"
            )
