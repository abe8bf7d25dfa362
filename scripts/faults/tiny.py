"""Runs of every domain that take a second, on the tiny random models and data of the domains' tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

ADAPTER = "adapter/adapter_model.safetensors"


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
    results: tuple[str, ...] = (ADAPTER,)
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
    from RoBERTa.tests.conftest import save_encoder, write_glue

    if not (folder / "bert").exists():
        save_encoder(folder / "bert")
        write_glue(folder / "glue", "CoLA")
    options = {
        "method": "control", "task": "cola", "model": folder / "bert", "data": folder / "glue", "device": "cpu", "epochs": 4,
        "lr": 1e-2, "batch_size": 8, "save_steps": 2, **changes,
    }  # fmt: skip
    return Run("RoBERTa.finetune", words(**options), heavy=("RoBERTa.training",))


def vit(folder: Path, **changes: object) -> Run:
    """Control on timm's test ViT and 40 images of three colors: 15 steps in 3 epochs."""
    from ViT.tests.conftest import ARCHITECTURE, save_base, save_colors

    model, data = folder / "vit.safetensors", folder / "colors.npz"
    if not model.exists():
        save_base(model)
        save_colors(data)
    options = {
        "method": "control", "model": model, "architecture": ARCHITECTURE, "data": data, "image_size": 32, "epochs": 3,
        "batch_size": 8, "lr": 0.05, "device": "cpu", **changes,
    }  # fmt: skip
    return Run("ViT.finetune", words(**options), (ADAPTER, "adapter/classifier.json", "predictions.csv"))


def _llama_files(folder: Path) -> tuple[Path, Path]:
    from LlaMA.commonsense import read_rows
    from LlaMA.models import train_tokenizer
    from LlaMA.tests.conftest import save_data, save_model

    model, data = folder / "llama", folder / "commonsense"
    if not model.exists():
        save_model(model, train_tokenizer(read_rows(save_data(data) / "train.json"), vocabulary=500))
    return model, data


def llama(folder: Path, **changes: object) -> Run:
    """Control and LoRA with dropout on a tiny LLaMA: 8 steps, a checkpoint after every second one."""
    model, data = _llama_files(folder)
    options = {
        "method": "control+lora", "model": model, "data": data / "train.json", "device": "cpu", "max_steps": 8,
        "eval_steps": 2, "held_out": 6, "warmup_steps": 1, "lr": 1e-2, "control_rank": 4, "lora_rank": 2,
        "lora_alpha": 4, **changes,
    }  # fmt: skip
    return Run("LlaMA.finetune", words(**options))


def llama_evaluate(folder: Path, **changes: object) -> Run:
    """14 questions to the tiny LLaMA, in batches of 3."""
    model, data = _llama_files(folder)
    options = {
        "model": model, "data": data, "device": "cpu", "tasks": ("boolq", "piqa"), "batch_size": 3,
        "max_new_tokens": 8, **changes,
    }  # fmt: skip
    return Run("LlaMA.evaluate", words(**options), ("boolq.jsonl", "piqa.jsonl"), resumes=False)


#: "qcontrol" is the same as "roberta" over 4-bit weights.
RUNS: dict[str, Callable[..., Run]] = {
    "roberta": roberta, "qcontrol": partial(roberta, quantization="nf4"), "vit": vit, "llama": llama,
    "llama-evaluate": llama_evaluate,
}  # fmt: skip
