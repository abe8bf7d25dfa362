"""How entry points fail: one line that says what to do, exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn


class UserError(Exception):
    """Something the user can put right; the message says how, in one line."""


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
    """Run an entry point and exit: 0 when it returns, 2 after one line on stderr for a `UserError` or an
    option that does not parse, 130 when interrupted. Any other exception is a bug and keeps its traceback.
    """
    try:
        with _argparse_raises_user_errors():
            main()
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
