"""Command lines made from dataclasses by transformers' HfArgumentParser."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from transformers import HfArgumentParser


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
