"""Names of data, models and runs; without torch, for what is only planned or refused."""

from __future__ import annotations

from pathlib import Path

from control_experiments.errors import UserError

#: torchvision's data sets, by the names that `--data` takes.
HUB = ("cifar100", "flowers102", "svhn", "food101", "imagenet")
#: The architecture of the CPU demonstration (tiny_model.py), beside timm's own.
TINY = "tiny"


def model_name(model: str) -> str:
    """A --model in names of runs."""
    path = Path(model)
    path = path.parent if path.stem == "model" else path
    return path.stem if path.suffix in (".npz", ".safetensors") else path.name


def run_name(model: str, data: str, method: str, seed: int) -> str:
    """The name of a run's folder, below results/vit."""
    return f"{model_name(model)}_{Path(data).stem}_{method.replace(' ', '_')}_seed{seed}"


def check_data(name: str) -> None:
    """Raises UserError: `--data` is neither a known name nor a path that exists."""
    if name not in (*HUB, "digits") and not Path(name).expanduser().exists():
        known = f"{', '.join(HUB)}, digits, an .npz, a tar or a folder of class folders"
        raise UserError(f"no data {name!r}: give one of {known}")


def check_model(name: str) -> None:
    """Raises UserError: `--model` is a path, and nothing is there."""
    path = Path(name).expanduser()
    is_path = path.suffix in (".safetensors", ".npz", ".pth", ".pt") or len(path.parts) > 2
    if is_path and not path.exists():
        raise UserError(f"there is no model {name!r}")
