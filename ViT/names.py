"""How runs are named; without torch, for programs that only plan them."""

from __future__ import annotations

from pathlib import Path

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
