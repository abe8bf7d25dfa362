"""How entry points fail: one line that says what to do, exit code 2."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    """Have `handler` called on these signals while in the block (in the main thread, the only one that can)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


class StopRequest:
    """Notes the first SIGINT or SIGTERM while in the block, for a loop that looks at `number` between its steps; the
    second one raises `Interrupted` on the spot."""

    def __init__(self) -> None:
        self.number: int | None = None

    def __enter__(self) -> StopRequest:
        self._handling = on_signals(self._note, signal.SIGINT, signal.SIGTERM)
        self._handling.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._handling.__exit__(*error)

    def _note(self, number: int, _frame: object) -> None:
        if self.number is not None:
            raise Interrupted(number)
        self.number = number


@contextmanager
def _argparse_raises_user_errors() -> Iterator[None]:
    """Let argparse report through `UserError` instead of printing its usage; HfArgumentParser is one too."""

    def error(parser: argparse.ArgumentParser, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the options)")

    original = argparse.ArgumentParser.error
    argparse.ArgumentParser.error = error
    try:
        yield
    finally:
        argparse.ArgumentParser.error = original


def run_main(main: Callable[[], object]) -> NoReturn:
    """Run an entry point and exit: 0 when it returns, 2 after one line on stderr for a `UserError` or an option that
    does not parse, 130 after Ctrl-C and 143 after SIGTERM, with one line too. Any other exception is a bug and keeps
    its traceback. In a distributed run each process but the first puts its rank before its line.
    """
    rank = os.environ.get("RANK", "0")
    prefix = "" if rank == "0" else f"[rank {rank}] "
    ended = False

    def end(number: int, _frame: object) -> None:
        if not ended:  # when a process dies, torchrun sends SIGTERM to those that are just saying so
            raise Interrupted(number)

    with on_signals(end, signal.SIGTERM):
        try:
            try:
                with _argparse_raises_user_errors():
                    main()
            finally:
                ended = True
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
