"""Command lines made from dataclasses by transformers' HfArgumentParser."""

from __future__ import annotations

import argparse
import math
import operator
import os
import re
import sys
from collections.abc import Sequence

from transformers import HfArgumentParser

from ..errors import UserError


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it was written, and each option's default where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if isinstance(action, argparse._StoreFalseAction):  # HfArgumentParser's --no_X has the text of --X
            return f"The same as --{action.dest} False."
        return action.help if action.default in (None, "", argparse.SUPPRESS) else super()._get_help_string(action)


def parse_arguments(*types: type, argv: Sequence[str] | None = None, description: str | None = None) -> tuple:
    """Parse `argv` (default: the process's own) into one instance of each dataclass.

    An option that does not exist or does not parse ends as argparse's error does, which
    `control_experiments.errors.run_main` reports in one line.
    """
    module = getattr(sys.modules["__main__"], "__spec__", None)  # argparse names the file, which nobody types
    look = {"prog": module and f"python -m {module.name}", "description": description, "formatter_class": _HelpFormatter}
    parser = HfArgumentParser(types, **look, allow_abbrev=False)
    # argparse takes -1e-3 for an option, and --lr for one without a value
    parser._negative_number_matcher = re.compile(r"-(\d+\.?|\.\d)\d*(e[-+]?\d+)?$", re.IGNORECASE)
    how = {"return_remaining_strings": True, "look_for_args_file": False}
    words = [_at_home(word) for word in (sys.argv[1:] if argv is None else argv)]
    *instances, unknown = parser.parse_args_into_dataclasses(words, **how)
    if unknown:
        parser.error(f"unknown argument {unknown[0]!r}")
    return tuple(instances)


def _at_home(word: str) -> str:
    """A word with ~ for what it stands for; a shell leaves --model=~/folder as it is, and a quoted ~ too."""
    option, equals, place = word.partition("=") if word.startswith("--") else ("", "", word)
    return f"{option}{equals}{os.path.expanduser(place)}"


#: Bound -> how a number keeps it, and what it is called.
_BOUNDS = {
    "above": (operator.gt, "greater than"),
    "at_least": (operator.ge, "at least"),
    "below": (operator.lt, "less than"),
    "at_most": (operator.le, "at most"),
}


def check_numbers(options: object, *names: str, **bounds: float) -> None:
    """Check that options, or each of several values, are finite numbers within bounds (`_BOUNDS`); None was left out
    and passes. Raises UserError: one is not; the message names it, its bound and what was given."""
    for name in names:
        given = getattr(options, name)
        values = given if isinstance(given, list) else [] if given is None else [given]
        for value in values:
            if not math.isfinite(value):
                raise UserError(f"--{name} must be a finite number, got {value}")
            for kind, bound in bounds.items():
                holds, words = _BOUNDS[kind]
                if not holds(value, bound):
                    raise UserError(f"--{name} must be {words} {bound}, got {value}")
