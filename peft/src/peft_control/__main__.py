"""``python -m peft_control``; command_line.py says what it takes."""

import importlib.util
import os
import runpy
import sys

from peft_control import architectures
from peft_control.command_line import answer, parse_architectures, refuse, refuse_module


def main() -> None:
    """Run what ``sys.argv`` names; exits with code 2 if that is nothing or does not exist."""
    answer(arguments := sys.argv[1:])
    if arguments[0] == "export":
        from peft_control.export import main as export

        export(arguments[1:])
    elif arguments[0] == "architectures":
        print(_architectures(parse_architectures(arguments[1:]).model))
    elif arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path.insert(0, os.getcwd())
        if not _exists(arguments[1]):
            refuse_module(arguments[1])
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
        runpy.run_path(arguments[0], run_name="__main__")


def _architectures(place: str | None = None) -> str:
    """The blocks of a model's layers, or the table of all rows."""
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
        refuse(str(error))
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


if __name__ == "__main__":
    main()
