"""Small data and a small base model."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

ARCHITECTURE = "test_vit"  # timm's own test model: width 64, 6 blocks, patch 16


def save_base(path: Path) -> Path:
    """A weight file of random test_vit weights for images of 32 pixels."""
    torch.manual_seed(0)
    save_file(timm.create_model(ARCHITECTURE, img_size=32, num_classes=0).state_dict(), path)
    return path


def save_colors(path: Path) -> Path:
    """40 training and 12 test images of three classes that differ in color."""
    generator, arrays = np.random.default_rng(0), {}
    for split, count in (("train", 40), ("test", 12)):
        labels = np.arange(count) % 3
        pixels = generator.integers(0, 60, (count, 20, 20, 3), dtype=np.uint8)
        pixels[np.arange(count), :, :, labels] += 150
        arrays |= {f"x_{split}": pixels, f"y_{split}": labels}
    np.savez(path, **arrays, classes=["red", "green", "blue"])
    return path


@pytest.fixture(scope="session")
def base_model(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("model") / "model.safetensors")


@pytest.fixture(scope="session")
def npz(tmp_path_factory) -> Path:
    return save_colors(tmp_path_factory.mktemp("data") / "colors.npz")


@pytest.fixture
def train_vit(call, base_model, npz, tmp_path):
    """``train_vit("--lr", 1)``: a run that takes a second, into tmp_path/"run" or where the last --output_dir says."""
    words = (
        "--device", "cpu", "--model", base_model, "--architecture", ARCHITECTURE, "--data", npz, "--image_size", 32,
        "--epochs", 2, "--batch_size", 16, "--lr", 0.05, "--output_dir", tmp_path / "run",
    )  # fmt: skip
    return partial(call, "ViT.finetune", *words)
