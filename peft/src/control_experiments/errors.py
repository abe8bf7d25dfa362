"""How entry points fail: one line that says what to do, exit code 2."""

from __future__ import annotations

import argparse
import errno
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NoReturn


class UserError(Exception):
    """Something the user can put right; the message says how, in one line."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to end; the message, if any, says how to go on later."""

    def __init__(self, number: int = signal.SIGINT, message: str = ""):
        super().__init__(message or ("terminated" if number == signal.SIGTERM else "interrupted"))
        self.number = number


@contextmanager
def on_signals(handler: Callable[[int, object], None], *numbers: int) -> Iterator[None]:
    """Have `handler` called on these signals while in the block."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


class StopRequest(ExitStack):
    """Notes the first SIGINT or SIGTERM while in the block, for a loop that looks at `number` between its steps; the
    second one raises `Interrupted` on the spot, unless it is the first one again within a second."""

    number: int | None = None
    _noted: tuple[int, float] | None = None

    def __enter__(self) -> StopRequest:
        self.enter_context(on_signals(self._note, signal.SIGINT, signal.SIGTERM))
        return self

    def _note(self, number: int, _frame: object) -> None:
        if self._noted is None:
            self._noted = (number, time.monotonic())
            self.number = self.number or number  # another process of the run may have told of it
        elif not _is_repeated(number, self._noted):
            raise Interrupted(number)


def _is_repeated(number: int, noted: tuple[int, float]) -> bool:
    """Whether a signal that comes now is the one noted before (its number and when it came), delivered once more: a terminal and
    schedulers send one to every process of a job, and a launcher passes its own on."""
    return number == noted[0] and time.monotonic() - noted[1] < 1


#: What is wrong with the place that a user has named for a file, and not with a program.
_PLACES = (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)


def _refuse(_parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """In the place of argparse's own way, which prints its usage; HfArgumentParser is one too."""
    raise UserError(f"{message} (--help lists the options)")


def run_main(main: Callable[[], object]) -> NoReturn:
    """Run an entry point and exit: 0 when it returns, 2 after one line on stderr for a `UserError`, an option that does not
    parse, or a place that cannot be read or written. 130 after Ctrl-C and 143 after SIGTERM, with one line too. Any other exception
    is a bug and keeps its traceback. In a distributed run each process but the first puts its rank before its line.
    """
    rank = os.environ.get("RANK", "0")
    prefix = "" if rank == "0" else f"[rank {rank}] "
    ended, noted = False, None

    def end(number: int, _frame: object) -> None:
        nonlocal noted
        if ended or (noted and _is_repeated(number, noted)):
            return  # when a process dies, torchrun sends SIGTERM to those that are just saying so
        noted = (number, time.monotonic())
        raise Interrupted(number)

    heeded = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    with on_signals(end, *heeded):
        original, argparse.ArgumentParser.error = argparse.ArgumentParser.error, _refuse
        try:
            try:
                main()
            except RuntimeError as error:
                if "cannot be captured as a CUDA graph" not in str(error):  # as peft_control says of a model's own code
                    raise
                raise UserError(str(error)) from error
            except OSError as error:
                if error.errno not in _PLACES:
                    raise
                raise UserError(f"a file cannot be read or written: {error}") from error
            except pickle.UnpicklingError as error:  # of torch.load(weights_only=True)
                raise UserError(f"a file holds more than tensors and plain values, and was not read: {error}") from error
            finally:
                ended = True
                argparse.ArgumentParser.error = original
        except UserError as error:
            print(f"{prefix}error:", " ".join(str(error).split()), file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt as stop:
            print(prefix + (str(stop) or "interrupted"), file=sys.stderr)
            sys.exit(128 + getattr(stop, "number", signal.SIGINT))
        except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(128 + signal.SIGPIPE)
    sys.exit(0)
