"""The memory benchmark on tiny shapes on the CPU: the workers, the record, the picture, bad input."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from control_experiments.reporting.records import load, tokens_of

SCRIPT = Path(__file__).resolve().parents[1] / "bench_memory.py"
BRIEFLY = ("--device", "cpu", "--steps", "2", "--warmup", "1")


def bench(*options, **environment):
    command = [sys.executable, SCRIPT, *BRIEFLY, *map(str, options)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=200, env={**os.environ, **environment}
    )


@pytest.mark.parametrize(
    "shape, tokens, methods",
    [
        ("tiny", 8, ("lora", "control:fast")),
        ("tiny-vit", None, ("control:lean",)),
        ("tiny-roberta", 8, ("dora",)),
    ],
)
def test_measures_each_method_and_writes_a_record(shape, tokens, methods, tmp_path, call):
    """Each method in a process of its own; `bench` gives what starts them one too, for the shape that is measured twice."""
    asked = ["--shape", shape, "--batch", 2, "--output", tmp_path, "--methods", *methods]
    asked += ["--tokens", tokens] if tokens else []
    if shape == "tiny":
        done = bench(*asked)
        code, stdout, stderr = done.returncode, done.stdout, done.stderr
    else:
        code, stdout, stderr = call("bench_memory", *BRIEFLY, *asked)
    assert code == 0, stderr
    tokens = tokens or 101  # of timm's test_vit: 160 pixels in patches of 16, and the class token
    assert f"{shape}, 2 x {tokens} tokens" in stdout
    record = json.loads((tmp_path / f"{shape}_2x{tokens}.json").read_text())
    assert record["options"]["tokens"] == tokens == tokens_of(record)
    assert [result["method"] for result in record["results"]] == list(methods)
    for result in record["results"]:
        assert (
            result["trained_parameters"] > 0 and result["loss"] > 0 and len(result["step_seconds_all"]) == 2
        )
    assert (tmp_path / f"{shape}_2x{tokens}.png").stat().st_size > 1000
    if shape == "tiny":
        assert "control:fast" in stdout.split("against lora (fastest)")[1]
        # a run that was killed after the second of both
        path = tmp_path / f"{shape}_2x{tokens}.json"
        left = {**record, "results": record["results"][1:]}
        path.rename(f"{path}.partial").write_text(json.dumps(left))
        code, stdout, stderr = call("bench_memory", *BRIEFLY, *asked)
        assert code == 0 and "1 measured before" in stdout, stderr
        again = json.loads(path.read_text())["results"]
        assert (
            again[1] == record["results"][1]
            and again[0]["method"] == "lora"
            and again[0] != record["results"][0]
        )


def test_a_profile_is_a_record_of_its_own(tmp_path, call):
    asked = (
        *BRIEFLY,
        "--shape",
        "tiny",
        "--batch",
        2,
        "--tokens",
        8,
        "--methods",
        "control:fast",
        "--profile",
    )
    code, stdout, stderr = call("bench_memory", *asked, "--output", tmp_path / "memory")
    assert code == 0 and "ms" in stdout.splitlines()[2], stderr
    assert [path.name for path in tmp_path.rglob("*.*")] == ["tiny_2x8_profile.json"]
    (result,) = json.loads((tmp_path / "memory" / "tiny_2x8_profile.json").read_text())["results"]
    seconds = [kernel["seconds"] for kernel in result["kernels"]]
    assert seconds == sorted(seconds, reverse=True) and seconds[-1] > 0
    assert {"aten::mm", "aten::addmm"} <= {kernel["name"] for kernel in result["kernels"]}

    frame, _ = load(tmp_path)
    (line,) = frame[frame.section.str.startswith("tiny, 2 x 8 tokens, cpu, torch")].to_dict("records")
    assert (line["kind"], line["row"]) == ("profile", "control:fast")
    assert line["all"] == pytest.approx(sum(seconds)) and line["matmuls"] > 0


def test_what_a_killed_run_has_left_counts_for_the_same_run_alone(tmp_path):
    from scripts.bench_memory import finished_before

    failed, measured = {"method": "lora", "error": "no memory"}, {"method": "control:lean", "loss": 1.0}
    left = tmp_path / "tiny_1x8.json.partial"
    record = {"device": "cpu", "options": {"tokens": 8}, "created": "now", "results": [failed, measured]}
    left.write_text(json.dumps(record))
    assert finished_before(left, {**record, "created": "later"}) == [measured]
    assert finished_before(left, {**record, "device": "another"}) == []
    for broken in ("{", "[]", "{}", '{"results": 1}'):
        left.write_text(broken)
        assert finished_before(left, record) == []
    assert finished_before(tmp_path / "none", record) == []


@pytest.mark.parametrize(
    "shape, batch, tokens", [("llama3-8b", 4, 1024), ("vit-b16", 128, 197), ("roberta-base", 64, 128)]
)
def test_what_help_shows_runs_with_methods_that_the_shape_has(shape, batch, tokens):
    """Without --methods; workloads of the true size are for a GPU, so only what would run is looked at."""
    from scripts import bench_memory

    options = bench_memory.with_defaults(bench_memory.Options(shape=shape, batch=batch, device="cpu"))
    bench_memory.check(options)
    assert options.tokens == tokens and {"dora", "lora", "control:plain", "control:lean"} <= set(
        options.methods
    )
    assert ("lora+liger" in options.methods) == (shape == "llama3-8b")


@pytest.mark.parametrize(
    "options, message",
    [
        (("--shape", "huge"), "unknown --shape 'huge': choose from llama3-8b"),
        (("--methods", "lora:fast"), "no such memory mode"),
        (("--methods", "prefix"), "unknown method 'prefix'"),
        (("--shape", "vit-b16", "--methods", "lora+liger"), "no switches but checkpointing"),
        (
            ("--methods", "lora+unsloth+compile"),
            "unsloth is for lora and lora-all, with checkpointing or without",
        ),
        (("--methods", "control+unsloth"), "unsloth is for lora and lora-all"),
        (("--shape", "tiny-vit", "--tokens", 8), "tiny-vit has 101 tokens, not 8"),
        (("--limit", 3), "--limit needs a GPU"),
        (("--limit", 3, "--profile"), "two runs"),
    ],
)
def test_bad_input_is_one_line(options, message, tmp_path, call):
    code, _, stderr = call("bench_memory", *BRIEFLY, "--output", tmp_path / "out", *options)
    assert code == 2 and message in stderr and stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_bad_input_is_one_line_of_the_whole_process(tmp_path):
    """Of which importing libraries is a part too."""
    done = bench("--output", tmp_path / "out", "--batch", 0)
    assert done.returncode == 2 and "--batch must be at least 1" in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_unsloth_is_asked_for_by_name_or_where_it_is_installed(tmp_path, call, monkeypatch):
    found = importlib.util.find_spec

    def installed(there):
        unsloth = SimpleNamespace() if there else None
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: unsloth if name == "unsloth" else found(name)
        )

    installed(False)
    code, _, stderr = call(
        "bench_memory", *BRIEFLY, "--output", tmp_path / "out", "--methods", "lora+unsloth"
    )
    assert code == 2 and "unsloth is not installed" in stderr and stderr.count("\n") == 1
    from scripts import bench_memory

    options, unsloth = bench_memory.Options(), set(bench_memory.UNSLOTH_METHODS)
    assert not unsloth & set(bench_memory.with_defaults(options).methods)
    installed(True)
    assert unsloth < set(bench_memory.with_defaults(options).methods)
    # on a CPU for whoever asks for it
    assert not unsloth & set(bench_memory.with_defaults(replace(options, device="cpu")).methods)


def test_the_folder_for_unsloth_is_one_that_others_load(tmp_path):
    from scripts import bench_memory

    bench_memory.write_llama(bench_memory.LLAMA_SHAPES["tiny"], "cpu", str(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16 and len(tokenizer) == model.config.vocab_size == 512
    assert tokenizer("w7 w1").input_ids == [11, 5]


def test_unsloth_is_imported_first_and_given_a_folder(tmp_path):
    """By a stand-in with unsloth's names, made of transformers and peft."""
    (tmp_path / "unsloth.py").write_text(
        """
import sys

assert "transformers" not in sys.modules and "peft" not in sys.modules


class FastLanguageModel:
    def from_pretrained(folder, max_seq_length, dtype, load_in_4bit, local_files_only):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        assert max_seq_length == 8 and not load_in_4bit and local_files_only
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        return model, AutoTokenizer.from_pretrained(folder)

    def get_peft_model(model, use_gradient_checkpointing, **lora):
        from peft import LoraConfig, get_peft_model

        assert use_gradient_checkpointing == "unsloth"
        return get_peft_model(model, LoraConfig(**lora))

    def for_training(model):
        return model.train()
"""
    )
    asked = ["--shape", "tiny", "--batch", 2, "--tokens", 8, "--output", tmp_path]
    done = bench(*asked, "--methods", "lora-all+unsloth+checkpointing", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "tiny_2x8.json").read_text())["results"]
    rank, (width, inner, keys, layers) = 32, (64, 128, 32, 2)
    sides = 2 * (width + width) + 2 * (width + keys) + 3 * (width + inner)  # of q, o; k, v; gate, up, down
    assert result["trained_parameters"] == layers * rank * sides
    assert result["loss"] == pytest.approx(6.24, abs=0.1)  # near log(512)
