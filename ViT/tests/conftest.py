"""Small data, a small base model and the programs of ViT/, called as their users call them."""

import sys
from importlib import import_module

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

ARCHITECTURE = "test_vit"  # timm's own test model: width 64, 6 blocks, patch 16


@pytest.fixture(scope="session")
def programs():
    names = ("finetune", "figures", "benchmark_pipeline", "small_table")
    return {name: import_module(f"ViT.{name}") for name in names}


@pytest.fixture
def call(programs, monkeypatch, capsys):
    """call("finetune", "--method", ...) -> (exit code, stdout, stderr)."""

    def run(program, *arguments):
        from control_experiments.errors import run_main

        monkeypatch.setattr(sys, "argv", [f"{program}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            run_main(programs[program].main)
        captured = capsys.readouterr()
        return exit.value.code, captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def base_model(tmp_path_factory):
    """A weight file of random test_vit weights for images of 32 pixels."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_file(timm.create_model(ARCHITECTURE, img_size=32, num_classes=0).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def npz(tmp_path_factory):
    """40 training and 12 test images of three classes that differ in color."""
    generator = np.random.default_rng(0)

    def make(count):
        labels = np.arange(count) % 3
        pixels = generator.integers(0, 60, (count, 20, 20, 3), dtype=np.uint8)
        pixels[np.arange(count), :, :, labels] += 150
        return pixels, labels

    (x_train, y_train), (x_test, y_test) = make(40), make(12)
    path = tmp_path_factory.mktemp("data") / "colors.npz"
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test, classes=["red", "green", "blue"])
    return path


@pytest.fixture
def options(base_model, npz):
    """Options of a run that takes a second."""
    return (
        "--device", "cpu", "--model", base_model, "--architecture", ARCHITECTURE, "--data", npz,
        "--image_size", 32, "--epochs", 2, "--batch_size", 16, "--lr", 0.05,
    )  # fmt: skip
