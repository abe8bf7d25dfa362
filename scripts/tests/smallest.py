"""The smallest form of every script's command: the arguments to add so that it runs here, on tiny models and data.

What a command asks for stays where it costs nothing (method, task, memory mode); sizes, models, data and devices are
replaced, because the last value of an option counts.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

#: Scripts whose commands are only parsed here; their own tests run them (or they need a network).
ONLY_PARSED = (
    "scripts/bench_kernels.py", "scripts/bench_memory.py", "scripts/bench_scaling.py", "scripts/make_tables.py", "scripts/rerun.py",
    "scripts/quickstart_table.py", "scripts/download_models.py", "LlaMA/convert.py", "RoBERTa/download_glue.py",
)  # fmt: skip
CPU = ("--device", "cpu")
#: Scripts that have no --device.
NO_DEVICE = ("ViT/figures.py", "RoBERTa/demo_task.py", "LlaMA/python_sources.py")
#: Scripts -> arguments that make their commands small; {name} stands for an input, {out} for a folder of the test's own.
SMALL = {
    "RoBERTa/finetune.py": "--model {encoder} --max_steps 1 --epochs 1 --batch_size 4 --precision fp32 --output_dir {out}",
    "RoBERTa/benchmark_padding.py": "--model {encoder} --data {glue} --batch_size 4 --steps 1 --output {out}/padding.json",
    "RoBERTa/study.py": "--model {encoder} --data {glue} --tasks cola --methods control --seeds 1 --grid 1e-3 --growth 0 --max_steps 1 "
    "--epochs 1 --batch_size 4 --precision fp32 --gpus cpu --output_dir {out}",
    "ViT/finetune.py": "{vit} --epochs 1 --batch_size 16",
    "ViT/small_table.py": "{vit} --methods control --seeds 1 --grid 1e-3 --growth 0 --epochs 1 --batch_size 16 --gpus cpu "
    "--output_dir {out}",
    "ViT/benchmark_pipeline.py": "--data {images} --architecture test_vit --image_size 32 --batch_size 4 --steps 1 --rounds 1 "
    "--workers 1 --output_dir {out}",
    "LlaMA/finetune.py": "--model {llama} --data {questions}/train.json --max_steps 1 --epochs 1 --eval_steps 1 --warmup_steps 0 "
    "--held_out 8 --batch_size 4 --micro_batch_size 2 --cutoff 64 --token_budget 128 --control_rank 4 --lora_rank 2 "
    "--optimizer adamw --output_dir {out}",
    "LlaMA/python_sources.py": "--output_dir {out}/texts",
    "LlaMA/evaluate.py": "--model {llama} --data {questions} --tasks boolq --limit 2 --beams 1 --max_new_tokens 2 "
    "--control_rank 4 --lora_rank 2",
    "LlaMA/study.py": "--model {llama} --data {questions}/train.json --tests {questions} --methods lora --seeds 1 --grid 1e-3 --growth 0 "
    "--search_steps 1 --max_steps 1 --epochs 1 --eval_steps 1 --warmup_steps 0 --held_out 8 --batch_size 4 --micro_batch_size 2 --cutoff 64 --token_budget 128 --lora_rank 2 "
    "--limit 2 --output_dir {out}",
    "LlaMA/benchmark_throughput.py": "--data {questions}/train.json --steps 1 --warmup 0 --batch_size 4 --large_batch 8 "
    "--micro_batch_size 2 --cutoff 64 --control_rank 4 --lora_rank 2 --output_dir {out}",
    "QControl/gradient_error.py": "--model {llama} --data {questions}/train.json --rows 2 --bases bf16 --output_dir {out}",
    "ViT/figures.py": "",
    "RoBERTa/demo_task.py": "",
}  # fmt: skip


class Runner:
    """Runs calls of scripts in this process, on tiny models and data (`inputs` of SMALL); the same call is run once."""

    def __init__(self, root: Path, **inputs: object):
        self.inputs, self.root, self.done = inputs, root, set()

    def run(self, name: str, arguments: list[str], monkeypatch) -> None:
        """Run the script of this name in its smallest form; an error of it is raised."""
        out = self.root / f"out{len(list(self.root.iterdir()))}"
        out.mkdir()
        arguments = [*arguments, *self._small(name, out)]
        place = name.removesuffix(".py").replace("/", "_")
        arguments = getattr(self, f"_{place}", lambda given, out: given)(arguments, out)
        monkeypatch.chdir(out)
        self._call(name, arguments, monkeypatch)

    def _small(self, name: str, out: Path) -> list[str]:
        return [*SMALL[name].format(**self.inputs, out=out).split(), *(() if name in NO_DEVICE else CPU)]

    def _call(self, name: str, arguments: list[str], monkeypatch) -> None:
        key = (name, *(word for word in arguments if not word.startswith(str(self.root / "out"))))
        if key not in self.done:
            self.done.add(key)
            monkeypatch.setattr(sys, "argv", [name, *arguments])
            importlib.import_module(name.removesuffix(".py").replace("/", ".")).main()

    def _trained(self, domain: str, *method: str) -> Path:
        """The folder of a run of the domain's finetune.py."""
        folder, script = self.root / "_".join(["trained", domain, *method]).replace(" ", "_"), f"{domain}/finetune.py"
        if not folder.exists():
            words = [*self._small(script, folder), "--output_dir", str(folder), *(["--method", *method] if method else [])]
            with pytest.MonkeyPatch.context() as patch:
                self._call(script, words, patch)
        return folder

    # -- what depends on the call

    def _RoBERTa_finetune(self, given: list[str], out: Path) -> list[str]:
        demo = given[given.index("--task") + 1] == "demo"
        return given if demo else [*given, "--data", str(self.inputs["glue"])]

    def _ViT_finetune(self, given: list[str], out: Path) -> list[str]:
        for option in ("--evaluate", "--adapter"):
            if option in given:
                given[given.index(option) + 1] = str(self._trained("ViT") / "adapter")
        if "--predict" in given:
            from PIL import Image

            Image.new("RGB", (20, 20), (200, 0, 0)).save(out / "photo.png")
            given[given.index("--predict") + 1] = str(out)
            given += ["--output", str(out / "classes.csv")]
        return [*given, "--output_dir", str(out / "run")]

    def _ViT_figures(self, given: list[str], out: Path) -> list[str]:
        data = ["--data", str(self.inputs["images"])] if "--data" in given else []
        return ["--runs", str(self._trained("ViT")), "--output_dir", str(out), *data]

    def _LlaMA_finetune(self, given: list[str], out: Path) -> list[str]:
        return [*given, *(["--validation", f"{self.inputs['questions']}/train.json"] if "--validation" in given else [])]

    def _LlaMA_evaluate(self, given: list[str], out: Path) -> list[str]:
        """Over an adapter of the method; LlaMA/tests/test_launchers.py evaluates what a launcher has trained."""
        if "--adapter" in given:
            method = given[given.index("--method") + 1] if "--method" in given else "lora"
            given[given.index("--adapter") + 1] = str(self._trained("LlaMA", method) / "adapter")
        return [*given, "--output_dir", str(out / "evaluation")]

    def _LlaMA_benchmark_throughput(self, given: list[str], out: Path) -> list[str]:
        return [*given, *(["--model", str(self.inputs["llama"])] if "--model" in given else ["--shape", "tiny"])]
