"""``python -m peft_control -m MODULE ...`` or ``python -m peft_control SCRIPT ...``

Or ``python -m peft_control export ADAPTER OUT``: one model for serving from an adapter and its base (export.py).

Or ``python -m peft_control architectures [MODEL]``: the table of architectures, or what a control would read and write in
a model, of which it needs the configuration alone.

Registers CONTROL with peft, then runs the module or script as ``python`` itself would: for tools that import
only peft, for example ``python -m peft_control -m lm_eval --model_args pretrained=BASE,peft=ADAPTER ...``.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

USAGE = "usage: python -m peft_control (-m MODULE | SCRIPT | export ADAPTER OUT | architectures [MODEL]) [ARGUMENT ...]"


def answer(arguments: list[str]) -> None:
    """Answer help and what cannot run, and exit: with code 2 and one line on stderr if something is wrong.

    The package calls this before it imports torch, transformers and peft, which takes seconds.
    """
    first, *rest = arguments or [""]
    if first in ("-h", "--help"):
        print(f"{(__doc__ or '').strip()}\n\n{USAGE}")
        raise SystemExit
    if first == "export":
        parse_export(rest)
    elif not first or arguments == ["-m"]:
        refuse(USAGE)
    elif first == "-m":
        package = rest[0].partition(".")[0]
        if not package or find_spec(package) is None:
            refuse_module(rest[0])
    elif first == "architectures":
        parse_architectures(rest)
    else:
        script = Path(first, "__main__.py") if Path(first).is_dir() else Path(first)
        if not script.exists():
            refuse(f"there is no script {first!r}; {USAGE}")


def parse_export(arguments: list[str]) -> argparse.Namespace:
    """The arguments of ``export.export``."""
    parser = argparse.ArgumentParser("python -m peft_control export", description="Write an adapter and its base as one model.")
    parser.add_argument("adapter", help="folder or hub id of a control adapter")
    parser.add_argument("out", help="new folder")
    parser.add_argument("--base", help="folder or hub id of the base; default: the one that the adapter names")
    types = ["auto", "float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", default="auto", choices=types, help="of the weights; default: the base's")
    return parser.parse_args(arguments)


def parse_architectures(arguments: list[str]) -> argparse.Namespace:
    """The arguments of ``architectures``."""
    about = "Print the table of architectures, or what a control would read and write in a model."
    parser = argparse.ArgumentParser("python -m peft_control architectures", description=about)
    parser.add_argument("model", nargs="?", help="folder or hub id, of which the configuration alone is read")
    return parser.parse_args(arguments)


def refuse_module(name: str) -> NoReturn:
    refuse(f"there is no module {name!r} that can be run")


def refuse(message: str) -> NoReturn:
    """Exit with code 2 and the message in one line."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    raise SystemExit(2)
