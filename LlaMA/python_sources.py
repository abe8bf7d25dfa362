"""Long texts that every machine has: the sources of Python's own standard library, to try finetune.py on long rows.

    python -m LlaMA.python_sources --output_dir long_texts
    python -m LlaMA.finetune --data long_texts/train --validation long_texts/validation --cutoff 32768 ...

A text is all modules of one package, or all single modules with one first letter, in the order of their names. About a
tenth of the texts are for validation, chosen by a checksum of their names; no module is in both. The same Python release
makes the same files.
"""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from control_experiments.errors import UserError, run_main
from control_experiments.training.arguments import parse_arguments

#: What is no part of the release, depends on the machine, repeats other parts, or is tables and no text.
LEFT_OUT = (
    "site-packages", "dist-packages", "lib-dynload", "__pycache__", "test", "tests", "idlelib", "pydoc_data", "encodings",
)  # fmt: skip


@dataclass(kw_only=True)
class Options:
    output_dir: str = HfArg(help="The folder to make.")
    sources: str = HfArg(default=sysconfig.get_path("stdlib"), help="Folder of Python's own modules.")


def texts(library: Path) -> dict[str, str]:
    """Name -> text, in the order of the names."""
    found: dict[str, list[str]] = {}
    for file in sorted(library.rglob("*.py"), key=lambda file: file.relative_to(library).as_posix()):
        place = file.relative_to(library)
        if set(place.parts) & set(LEFT_OUT) or place.name.startswith(("_sysconfigdata", "_sysconfig_vars")):
            continue
        name = place.parts[0] if len(place.parts) > 1 else f"modules_{place.name.strip('_')[0].lower()}"
        source = file.read_text(encoding="utf-8", errors="replace")
        found.setdefault(name, []).append(f"# {place.as_posix()}\n\n{source}")
    return {name: "\n\n".join(parts) for name, parts in sorted(found.items())}


def held_out(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] % 10 == 0


def main(argv: Sequence[str] | None = None) -> None:
    """Write `train/` and `validation/` with a file for each text."""
    (options,) = parse_arguments(Options, argv=argv, description=__doc__)
    from control_experiments.training.checkpoints import whole_folder

    folder, library = Path(options.output_dir), Path(options.sources)
    if folder.exists():
        raise UserError(f"{folder} is there already: delete it or name another folder")
    found = texts(library)
    if len({held_out(name) for name in found}) < 2:
        raise UserError(f"{library} holds too few modules: name Python's own with --sources")
    sizes = {"train": 0, "validation": 0}
    with whole_folder(folder, sealed=False) as place:
        for name, text in found.items():
            part = "validation" if held_out(name) else "train"
            (place / part).mkdir(exist_ok=True)
            (place / part / f"{name}.txt").write_text(text, encoding="utf-8")
            sizes[part] += len(text)
    counted = ", ".join(f"{size / 1e6:.1f} M characters for {part}" for part, size in sizes.items())
    print(f"{folder}: {counted}, of Python {sys.version.split()[0]}")


if __name__ == "__main__":
    run_main(main)
