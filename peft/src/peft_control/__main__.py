"""``python -m peft_control -m MODULE ...`` or ``python -m peft_control SCRIPT ...``

Or ``python -m peft_control export ADAPTER OUT``: one model for serving from an adapter and its base (export.py).

Or ``python -m peft_control architectures [MODEL]``: the table of architectures, or what a control would read and write in
a model, of which it needs the configuration alone.

Registers CONTROL with peft, then runs the module or script as ``python`` itself would: for tools that import
only peft, for example ``python -m peft_control -m lm_eval --model_args pretrained=BASE,peft=ADAPTER ...``.
"""

import importlib.util
import os
import runpy
import sys
from typing import NoReturn

from peft_control.registration import register

USAGE = "usage: python -m peft_control (-m MODULE | SCRIPT | export ADAPTER OUT | architectures [MODEL]) [ARGUMENT ...]"


def main() -> None:
    """Run what ``sys.argv`` names; exits with code 2 if that is nothing or does not exist."""
    register()
    arguments = sys.argv[1:]
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"{(__doc__ or '').strip()}\n\n{USAGE}")
    elif arguments and arguments[0] == "export":
        from .export import main as export

        export(arguments[1:])
    elif arguments and arguments[0] == "architectures":
        print(_architectures(*arguments[1:2]))
    elif len(arguments) > 1 and arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path.insert(0, os.getcwd())
        if not _exists(arguments[1]):
            _refuse(f"there is no module {arguments[1]!r} that can be run")
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif not arguments or arguments[0] == "-m":
        _refuse(USAGE)
    elif not os.path.exists(arguments[0]) or (
        os.path.isdir(arguments[0]) and not os.path.exists(os.path.join(arguments[0], "__main__.py"))
    ):
        _refuse(f"there is no script {arguments[0]!r}; {USAGE}")
    else:
        sys.argv = arguments
        sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
        runpy.run_path(arguments[0], run_name="__main__")


def _architectures(place: str = "") -> str:
    """The blocks of a model's layers, or the table of all rows as README.md has it."""
    from peft_control import architectures

    lines = ["| architecture | layer class | blocks | initialisation of A |", "| --- | --- | --- | --- |"]
    for row in () if place else architectures.ARCHITECTURES:
        layers = ", ".join(f"`{layer}`" for layer in row.layer.split("|"))
        lines.append(f"| `{row.name}` | {layers} | {', '.join(row.blocks)} | {row.init} |")
    if not place:
        return "\n".join(lines)
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(place)
        cls = getattr(transformers, (config.architectures or [""])[0], None)
        with torch.device("meta"):
            model = cls(config) if cls else transformers.AutoModel.from_config(config)
        found = architectures.find_layers(model)
    except (ValueError, OSError) as error:
        _refuse(str(error))
    lines = []
    for name, (layer, row) in found.items():
        lines.append(f"{name}: {type(layer).__name__}, row {row.name}, width {row.state_width(layer)}")
        blocks = [(block, rule.of(layer)) for block, rule in row.blocks.items()]
        lines += [f"  {block}: reads {paths.read}, writes {paths.write}" for block, paths in blocks]
    return "\n".join(lines)


def _exists(module: str) -> bool:
    try:
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.submodule_search_locations is not None:  # a package
            spec = importlib.util.find_spec(f"{module}.__main__")
        return spec is not None
    except (ImportError, ValueError):  # of a dotted name's parent; a relative name
        return False


def _refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
