"""The smallest form of every script's command: the arguments to add so that it runs here, on tiny models and data.

What a command asks for stays where it costs nothing (method, task, memory mode); sizes, models, data and devices are
replaced, because the last value of an option counts.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from control_experiments.paths import REPOSITORY

#: Scripts whose commands are only parsed here, and why.
ONLY_PARSED = {
    "scripts/download_models.py": "needs a package index; scripts/tests/test_download_models.py has one of its own",
    "LlaMA/convert.py": "needs a GGUF file; LlaMA/tests/test_finetune.py converts one where there is one",
    "RoBERTa/download_glue.py": "needs a network",
    "scripts/bench_scaling.py": "starts several processes for each cell; scripts/tests/test_bench_scaling.py runs it",
}
CPU = ("--device", "cpu")
#: Scripts that have no --device.
NO_DEVICE = ("scripts/make_tables.py", "ViT/figures.py")
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
    "LlaMA/evaluate.py": "--model {llama} --data {questions} --tasks boolq --limit 2 --beams 1 --max_new_tokens 2 "
    "--control_rank 4 --lora_rank 2",
    "LlaMA/study.py": "--model {llama} --data {questions}/train.json --tests {questions} --methods lora --seeds 1 --grid 1e-3 --growth 0 "
    "--search_steps 1 --max_steps 1 --epochs 1 --eval_steps 1 --warmup_steps 0 --held_out 8 --batch_size 4 --micro_batch_size 2 --cutoff 64 --token_budget 128 --lora_rank 2 "
    "--limit 2 --gpus cpu --output_dir {out}",
    "LlaMA/benchmark_throughput.py": "--data {questions}/train.json --steps 1 --warmup 0 --batch_size 4 --large_batch 8 "
    "--micro_batch_size 2 --cutoff 64 --control_rank 4 --lora_rank 2 --output_dir {out}",
    "QControl/gradient_error.py": "--model {llama} --data {questions}/train.json --rows 2 --bases bf16 --output_dir {out}",
    "scripts/bench_memory.py": "--batch 1 --steps 1 --warmup 0",
    "scripts/bench_kernels.py": "--tokens 8 --vocabulary 99 --repeats 2 --output {out}/kernels.json",
    "scripts/make_tables.py": "--results {out}",
    "ViT/figures.py": "",
}  # fmt: skip


def import_script(path: Path):
    """The module of a script."""
    return importlib.import_module(f"{path.parent.name}.{path.stem}")


class Runner:
    """Runs calls of scripts in this process, on tiny models and data (`inputs` of SMALL); the same call is run once."""

    def __init__(self, root: Path, **inputs: object):
        self.inputs, self.root, self.done, self.count = inputs, root, set(), 0

    def run(self, path: Path, arguments: list[str], monkeypatch) -> None:
        """Run the script at `path` in its smallest form; an error of it is raised."""
        name = path.relative_to(REPOSITORY).as_posix()
        self.count += 1
        out = self.root / f"out{self.count}"
        out.mkdir()
        arguments = [*arguments, *self._small(name, out), *(() if name in NO_DEVICE else CPU)]
        arguments = getattr(self, f"_{path.parent.name}_{path.stem}", lambda given, out: given)(arguments, out)
        monkeypatch.chdir(out)
        self._call(path, arguments, monkeypatch)

    def _small(self, name: str, out: Path) -> list[str]:
        return SMALL[name].format(**self.inputs, out=out).split()

    def _call(self, path: Path, arguments: list[str], monkeypatch) -> None:
        key = (path, *(word for word in arguments if not word.startswith(str(self.root / "out"))))
        if key not in self.done:
            self.done.add(key)
            monkeypatch.setattr(sys, "argv", [str(path), *arguments])
            import_script(path).main()

    def _trained(self, domain: str, *method: str) -> Path:
        """The folder of a run of the domain's finetune.py."""
        folder = self.root / "_".join(["trained", domain, *method]).replace(" ", "_")
        if not folder.exists():
            words = [*self._small(f"{domain}/finetune.py", folder), *CPU, "--output_dir", str(folder)]
            with pytest.MonkeyPatch.context() as patch:
                self._call(REPOSITORY / domain / "finetune.py", [*words, *(["--method", *method] if method else [])], patch)
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

    def _scripts_bench_memory(self, given: list[str], out: Path) -> list[str]:
        """One method, in this process."""
        shape = given[given.index("--shape") + 1] if "--shape" in given else "llama3-8b"
        tiny = {"vit-b16": "tiny-vit", "roberta-base": "tiny-roberta"}.get(shape, "tiny")
        method = given[given.index("--methods") + 1] if "--methods" in given else "control:lean"
        method = method.replace("+liger", "").replace("+graphs", "")
        unwanted = ("--limit", "--speed_at", "--lengths", *(["--tokens"] if tiny == "tiny-vit" else []))
        for option in unwanted:  # of a GPU's memory; a tiny model's are few
            if option in given:
                first = given.index(option)
                last = next((n for n, word in enumerate(given) if n > first and word.startswith("--")), len(given))
                del given[first:last]
        given = [*given, "--shape", tiny, "--methods", method, "--worker", method]
        return given if tiny == "tiny-vit" else [*given, "--tokens", "8"]
