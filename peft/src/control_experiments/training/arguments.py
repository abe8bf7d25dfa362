"""Command lines made from dataclasses by transformers' HfArgumentParser."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence

from transformers import HfArgumentParser

from ..errors import UserError

#: The largest seed that NumPy takes.
LARGEST_SEED = 2**32 - 1


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults beside every option, and the description as it was written."""


def parse_arguments(*types: type, argv: Sequence[str] | None = None, description: str | None = None) -> tuple:
    """Parse `argv` (default: the process's own) into one instance of each dataclass.

    An option that does not exist or does not parse ends as argparse's error does, which
    `control_experiments.errors.run_main` reports in one line.
    """
    parser = HfArgumentParser(
        types, description=description, formatter_class=_HelpFormatter, allow_abbrev=False
    )
    arguments = list(sys.argv[1:] if argv is None else argv)
    *instances, unknown = parser.parse_args_into_dataclasses(
        arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        parser.error(f"unknown argument {unknown[0]!r}")
    return tuple(instances)


def check_numbers(
    options: object,
    *names: str,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> None:
    """Check that options are finite numbers within bounds; one that is None was left out and passes.

    Raises:
        UserError: one is not; the message names it, its bound and what was given.
    """
    for name in names:
        value = getattr(options, name)
        if value is None:
            continue
        if not math.isfinite(value):
            raise UserError(f"--{name} must be a finite number, got {value}")
        for bound, holds, words in (
            (above, lambda value, bound: value > bound, "greater than"),
            (at_least, lambda value, bound: value >= bound, "at least"),
            (below, lambda value, bound: value < bound, "less than"),
            (at_most, lambda value, bound: value <= bound, "at most"),
        ):
            if bound is not None and not holds(value, bound):
                raise UserError(f"--{name} must be {words} {bound}, got {value}")


def check_max_steps(options: object) -> None:
    """Raise UserError for a `max_steps` of 0 or less, other than -1, which the Trainer takes for no limit."""
    if options.max_steps != -1 and options.max_steps < 1:
        raise UserError(f"--max_steps must be at least 1, or -1 for no limit, got {options.max_steps}")
