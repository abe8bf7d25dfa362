"""Runs of every domain that take a second: tiny random models and tiny data, made on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass
class Run:
    """An entry point and the options of a tiny run of it, all but `--output_dir`.

    Attributes:
        program: the entry point's module; `heavy` are those that it imports once its options are parsed.
        results: files of its output folder that must not depend on what happened on the way.
        resumes: whether it takes `--resume` (else it goes on when started again).
    """

    program: str
    arguments: list[str]
    results: tuple[str, ...]
    resumes: bool = True
    heavy: tuple[str, ...] = ()

    @property
    def main(self) -> Callable[[], object]:
        """Its function; everything that it will import is imported now, once for all the processes that are forked."""
        for name in self.heavy:
            import_module(name)
        return import_module(self.program).main


def words(**options: object) -> list[str]:
    """Options as they stand on a command line; a tuple is several words."""
    flat = []
    for name, value in options.items():
        flat += [f"--{name}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return flat


def roberta(folder: Path, **changes: object) -> Run:
    """Control on a tiny BERT and a CoLA of 24 rows: 12 steps in 4 epochs, with checkpoints within epochs."""
    from transformers import BertConfig, BertModel

    from RoBERTa.tests.conftest import WORDS, save_tokenizer, write_glue

    model = folder / "bert"
    if not model.exists():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=4 + len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32, pad_token_id=1, initializer_range=0.3, max_position_embeddings=130,
        )  # fmt: skip
        BertModel(config).save_pretrained(model)
        save_tokenizer(model)
        write_glue(folder / "glue", "CoLA")
    options = {
        "method": "control", "task": "cola", "model": model, "data": folder / "glue", "device": "cpu", "epochs": 4,
        "lr": 1e-2, "batch_size": 8, "save_steps": 2, **changes,
    }  # fmt: skip
    adapter = ("adapter/adapter_model.safetensors",)
    return Run("RoBERTa.finetune", words(**options), adapter, heavy=("RoBERTa.training",))


def qcontrol(folder: Path, **changes: object) -> Run:
    """The same over 4-bit weights."""
    return roberta(folder, quantization="nf4", **changes)


def vit(folder: Path, **changes: object) -> Run:
    """Control on timm's test ViT and 40 images of three colors: 15 steps in 3 epochs."""
    import timm
    from safetensors.torch import save_file

    model, data = folder / "vit.safetensors", folder / "colors.npz"
    if not model.exists():
        torch.manual_seed(0)
        save_file(timm.create_model("test_vit", img_size=32, num_classes=0).state_dict(), model)
        generator = np.random.default_rng(0)
        arrays = {}
        for split, count in (("train", 40), ("test", 12)):
            labels = np.arange(count) % 3
            pixels = generator.integers(0, 60, (count, 20, 20, 3), dtype=np.uint8)
            pixels[np.arange(count), :, :, labels] += 150
            arrays |= {f"x_{split}": pixels, f"y_{split}": labels}
        np.savez(data, **arrays, classes=["red", "green", "blue"])
    options = {
        "method": "control", "model": model, "architecture": "test_vit", "data": data, "image_size": 32, "epochs": 3,
        "batch_size": 8, "lr": 0.05, "device": "cpu", **changes,
    }  # fmt: skip
    results = ("adapter/adapter_model.safetensors", "adapter/classifier.json", "predictions.csv")
    return Run("ViT.finetune", words(**options), results)


def _llama_files(folder: Path) -> tuple[Path, Path]:
    from LlaMA.commonsense import TASKS, Row
    from LlaMA.models import train_tokenizer
    from LlaMA.tests.conftest import make_row, tiny_model

    model, data = folder / "llama", folder / "commonsense"
    if not model.exists():
        rows = [make_row(task, number) for number in range(6) for task in TASKS]
        tokenizer = train_tokenizer([Row(**row) for row in rows], vocabulary=500)
        tiny_model(len(tokenizer) + 4).save_pretrained(model)
        tokenizer.save_pretrained(model)
        for task in TASKS:
            (data / task).mkdir(parents=True)
            (data / task / "test.json").write_text(json.dumps([make_row(task, 100 + n) for n in range(7)]))
        (data / "train.json").write_text(json.dumps(rows))
    return model, data


def llama(folder: Path, **changes: object) -> Run:
    """Control and LoRA with dropout on a tiny LLaMA: 8 steps, a checkpoint after every second one."""
    model, data = _llama_files(folder)
    options = {
        "method": "control+lora", "model": model, "data": data / "train.json", "device": "cpu", "max_steps": 8,
        "eval_steps": 2, "held_out": 6, "warmup_steps": 1, "lr": 1e-2, "control_rank": 4, "lora_rank": 2,
        "lora_alpha": 4, **changes,
    }  # fmt: skip
    return Run("LlaMA.finetune", words(**options), ("adapter/adapter_model.safetensors",))


def llama_evaluate(folder: Path, **changes: object) -> Run:
    """14 questions to the tiny LLaMA, in batches of 3."""
    model, data = _llama_files(folder)
    options = {
        "model": model, "data": data, "device": "cpu", "tasks": ("boolq", "piqa"), "batch_size": 3,
        "max_new_tokens": 8, **changes,
    }  # fmt: skip
    return Run("LlaMA.evaluate", words(**options), ("boolq.jsonl", "piqa.jsonl"), resumes=False)


RUNS: dict[str, Callable[..., Run]] = {
    "roberta": roberta, "qcontrol": qcontrol, "vit": vit, "llama": llama, "llama-evaluate": llama_evaluate,
}  # fmt: skip
