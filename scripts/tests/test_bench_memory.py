"""The memory benchmark on tiny shapes on the CPU: the workers, the record, what a killed run leaves, bad input."""

import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from control_experiments.paths import RESULTS
from control_experiments.reporting.records import load
from control_experiments.training import benchmarking
from control_experiments.training.quantization import loading_arguments
from scripts import bench_memory, workloads
from scripts.workloads import Setting, build, parse_method

BRIEFLY = ("--device", "cpu", "--steps", "2", "--warmup", "1")


@pytest.fixture
def measured(monkeypatch):
    """The methods that were measured; each in this process, which spares a start of Python."""
    done = []

    def run_here(options, method, command):
        done.append(method.text)
        return json.loads(json.dumps(bench_memory.measure(options, method)))

    monkeypatch.setattr(bench_memory, "run_method", run_here)
    monkeypatch.setattr(benchmarking, "git_state", lambda: {"commit": "0", "dirty": False})
    return done


def test_a_killed_run_goes_on_and_a_finished_one_is_kept(tmp_path, call, measured):
    asked = (*BRIEFLY, "--shape", "tiny", "--batch", 2, "--tokens", 8, "--output_dir", tmp_path)
    asked += ("--repeats", 2, "--base", "bf16", "nf4", "--methods", "lora", "control:fast")
    stdout = call("scripts.bench_memory", *asked).finished().out
    assert "tiny, 2 x 8 tokens, bfloat16, cpu" in stdout
    assert measured == ["lora+bf16", "control+bf16:fast", "lora+nf4", "control+nf4:fast"]
    path = tmp_path / "tiny_2x8_bf16_nf4.json"
    record = json.loads(path.read_text())
    assert [result["method"] for result in record["results"]] == measured == record["options"]["methods"]
    assert path.with_suffix(".png").stat().st_size > 1000
    for result in record["results"]:
        seconds = result["step_seconds_repeats"]
        assert len(result["step_seconds_all"]) == 4 and min(seconds) <= result["step_seconds"] <= max(seconds)
        assert result["step_seconds_spread"] == max(seconds) - min(seconds)
        assert result["tokens_per_second"] == pytest.approx(2 * 8 / result["step_seconds"])
        assert result["trained_parameters"] > 0 and result["memory"]["peak_resident_bytes"] > 0
    loras = {r["method"]: r["step_seconds"] for r in record["results"] if r["method"].startswith("lora")}
    assert f"against {min(loras, key=loras.get)} (fastest)" in stdout and "time x1.00" in stdout

    call("scripts.bench_memory", *asked).finished()
    assert len(measured) == 4, "all was measured before"
    left = {**record, "results": record["results"][1:]}
    path.rename(f"{path}.partial").write_text(json.dumps(left))
    assert "3 measured before" in call("scripts.bench_memory", *asked).finished().out and measured[4:] == ["lora+bf16"]
    results = zip(record["results"], json.loads(path.read_text())["results"])
    assert [one["step_seconds_all"] == other["step_seconds_all"] for one, other in results] == [False, True, True, True]


def test_only_the_same_benchmark_counts_as_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarking, "git_state", lambda: {"commit": "0", "dirty": True})
    path, failed, done = tmp_path / "a.json", {"method": "lora", "error": "no memory"}, {"method": "dora"}

    def campaign(**options):
        asked = bench_memory.Options(**options)
        return benchmarking.Campaign(path, asked, lambda result: result["method"], benchmarking.machine("cpu"))

    first = campaign(tokens=8)
    first.add(failed)
    first.add(done)
    assert campaign(tokens=8).results == [done]
    assert campaign(tokens=9).results == []
    first.finish(["dora", "lora"])
    assert json.loads(path.read_text())["results"] == [done, failed]
    assert campaign(tokens=8).results == [], "the code has changed in a way that nobody noted"
    for broken in ("{", "[]", "{}", '{"results": 1}'):
        path.with_suffix(".json.partial").write_text(broken)
        assert campaign(tokens=8).results == []


@pytest.mark.parametrize(
    "program, result",
    [
        ("print('a line'); print('{\"loss\": 1}')", {"loss": 1}),
        ("raise MemoryError('none left')", {"error": "MemoryError: none left"}),
        ("import os; os._exit(9)", {"error": "exit code 9"}),
    ],
)
def test_a_method_says_why_it_failed(program, result):
    assert benchmarking.run_apart([sys.executable, "-c", program], {}) == result


@pytest.mark.parametrize(
    "shape, size, methods",
    [
        ("tiny", (2, 16, [5, 16]), "control control:fast control:lean control+packed control+packed:fast lora+packed "
         "lora+checkpointing lora+eager lora+uncast lora-all lora-qkv dora miss lora-fa control+lora:lean"),
        ("tiny-roberta", (2, 16, [5, 16]), "control control:fast lora-all+checkpointing dora miss control+lora:balanced"),
        ("tiny-vit", (2, 101, None), "control control:lean control+eager lora+checkpointing miss control+lora:fast"),
    ],
)  # fmt: skip
def test_every_method_is_the_same_model_at_first(shape, size, methods):
    """Adapters begin as the identity: so switches, modes and padding change nothing in the first loss, but for dropout."""
    losses, dropout = {}, shape == "tiny-roberta"
    for text in methods.split():
        method = parse_method(text)
        method.check(shape, "cpu")
        work = build(Setting(shape, "cpu", *size, precision="fp32"), parse_method(method.over("fp32")))
        assert {parameter.dtype for parameter in work.trained} == {torch.float32}
        losses[text] = work.step().item()
        assert dropout or work.step().item() < losses[text]
    assert losses == dict.fromkeys(losses, pytest.approx(losses["control"], abs=0.2 if dropout else 1e-4))


def test_peers_train_what_their_papers_say():
    def trained(text, **ranks):
        work = build(Setting("tiny", "cpu", 1, 8, **ranks), parse_method(text))
        return sum(parameter.numel() for parameter in work.trained)

    width, inner, keys, layers = 64, 128, 32, 2
    sides = (width + width) + 2 * (width + keys) + 2 * (width + inner)  # of q; k, v; up, down
    assert trained("lora") == layers * 32 * sides
    assert trained("lora", lora_rank=4) == layers * 4 * sides
    assert trained("lora-fa") == layers * 32 * (width + 2 * keys + inner + width), "B alone"
    assert trained("miss") == layers * 64 * (width + 2 * keys + inner + width), "one matrix"
    assert trained("control") == layers * 2 * 64 * 2 * width
    assert trained("control", control_rank=3) == layers * 2 * 3 * 2 * width
    assert trained("shadow") > layers * width * width, "a small model beside the base"


def test_methods_are_those_of_the_shipped_records():
    """At their true shapes, without memory for the weights: as many trained parameters under the same names."""
    shipped = {}
    for path in (RESULTS / "published" / "memory").rglob("*.json"):
        record = json.loads(path.read_text())
        for result in record["results"]:
            if "trained_parameters" in result:
                key = (record["options"]["shape"], parse_method(result["method"]).name)
                shipped.setdefault(key, set()).add(result["trained_parameters"])
    assert len(shipped) >= 15

    def trained(shape, method):
        model = workloads.adapt(workloads.random_base(shape, method, "meta", torch.bfloat16), shape, method)
        return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    assert {(shape, name): {trained(shape, parse_method(name))} for shape, name in shipped} == shipped


@pytest.mark.parametrize("shape", ["tiny-roberta", "tiny"])
def test_random_bases_are_quantized_as_loaded_ones(shape, tmp_path):
    """Same layers, same kind of quantized state as from_pretrained makes."""

    def base(kind):
        return workloads.random_base(shape, parse_method(f"lora+{kind}"), "cpu", torch.float32)

    plain = base("fp32")
    plain.save_pretrained(tmp_path)
    for kind in ("nf4", "int8", "fp8"):
        ours = base(kind)
        arguments = loading_arguments(kind, torch.device("cpu"), torch.float32)
        loaded = type(plain).from_pretrained(tmp_path, **arguments)
        kinds = [
            {name: str(module) for name, module in model.named_modules() if not [*module.children()]}
            for model in (ours, loaded)
        ]
        assert kinds[0] == kinds[1] and ours.num_parameters() == loaded.num_parameters()


def test_a_profile_is_a_record_of_its_own(tmp_path, call, measured):
    asked = ("--shape", "tiny", "--batch", 2, "--tokens", 8, "--methods", "control:fast", "--profile")
    folder = tmp_path / "memory"
    stdout = call("scripts.bench_memory", *BRIEFLY, *asked, "--output", folder).finished().out
    assert "ms" in stdout.splitlines()[2]
    assert [path.name for path in folder.iterdir()] == ["tiny_2x8_profile.json"]
    (result,) = json.loads((folder / "tiny_2x8_profile.json").read_text())["results"]
    seconds = [kernel["seconds"] for kernel in result["kernels"]]
    assert seconds == sorted(seconds, reverse=True) and seconds[-1] > 0
    assert {"aten::mm", "aten::addmm"} <= {kernel["name"] for kernel in result["kernels"]}

    frame, _ = load(tmp_path)
    (line,) = frame[frame.section.str.startswith("tiny, 2 x 8 tokens, cpu, torch")].to_dict("records")
    assert (line["kind"], line["row"]) == ("profile", "control:fast")
    assert line["all"] == pytest.approx(sum(seconds)) and line["matmuls"] > 0


LONGEST = bench_memory.LONGEST


@pytest.mark.parametrize(
    "most, found, limit, gib",
    [(100, 0, 3, 3), (700, 512, None, 80), (5000, 4608, 3, 3), (100_000, 98_304, None, 80), (1 << 30, LONGEST, 3, 3)],
)
def test_the_longest_sequence_is_searched_for(most, found, limit, gib, monkeypatch):
    """With a GPU's calls noted instead of made: a step fits up to `most` tokens."""
    shares = []
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    properties = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)

    class Work:
        model, optimizer = None, SimpleNamespace(zero_grad=lambda: None)

        def step(self):
            if self.loss > most:
                raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(bench_memory, "build", lambda setting, method, longest: Work())
    monkeypatch.setattr(bench_memory, "step_loss", lambda setting, method, model: setting.tokens)
    options = bench_memory.Options(tokens=1024, limit=limit, longest=limit is None)
    result = bench_memory.longest(options, parse_method("lora"))
    assert result == {"method": "lora", "limit_gib": gib, "longest_tokens": found}
    assert shares == [pytest.approx(gib / 80)] and f"within {gib}" in bench_memory.line(result)


@pytest.mark.parametrize("shape, batch, tokens", [("llama3-8b", 4, 1024), ("vit-b16", 128, 197), ("roberta-base", 64, 128)])
def test_what_help_shows_runs_with_methods_that_the_shape_has(shape, batch, tokens, monkeypatch):
    """Without --methods; workloads of the true size are for a GPU, so only what would run is looked at."""
    options = bench_memory.Options(shape=shape, batch=batch, device="cpu").with_defaults()
    assert options.tokens == tokens and options.file_name() == f"{shape}_{batch}x{tokens}.json"
    assert {"dora", "lora", "miss", "control:plain", "control:lean"} <= set(options.methods)
    assert {"lora+liger" in options.methods, "shadow" in options.methods} == {shape == "llama3-8b"}
    # unsloth's by default on a GPU where it is installed
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setattr(bench_memory, "choose_device", lambda name: name)
    for device in ("cpu", "cuda"):
        chosen = bench_memory.Options(shape=shape, device=device).with_defaults().methods
        assert ("lora+unsloth" in chosen) == (device == "cuda" and shape == "llama3-8b")
        assert ("lora+graphs" in chosen) == (device == "cuda")


@pytest.mark.parametrize(
    "options, message",
    [
        (("--batch", 0), "--batch must be at least 1"),
        (("--shape", "huge"), "unknown --shape 'huge': choose from smollm2"),
        (("--methods", "lora:fast"), "no such memory mode"),
        (("--methods", "prefix"), "unknown method 'prefix'"),
        (("--methods", "lora+nf4+int8"), "unknown method"),
        (("--methods", "control+graphs+packed"), "packed rows are not measured as CUDA graphs"),
        (("--methods", "lora+graphs"), "CUDA graphs need a GPU"),
        (("--methods", "dora+int8"), "dora over int8 needs a GPU"),
        (("--methods", "lora+unsloth"), "unsloth is not installed"),
        (("--methods", "lora+unsloth+compile"), "unsloth is for lora and lora-all, with checkpointing or without"),
        (("--methods", "control+unsloth"), "unsloth is for lora and lora-all"),
        (("--shape", "vit-b16", "--methods", "lora+liger"), "no switches but checkpointing"),
        (("--shape", "vit-b16", "--methods", "lora+nf4"), "for text models"),
        (("--shape", "tiny-vit", "--tokens", 8), "tiny-vit has 101 tokens"),
        (("--base", "nf5"), "unknown --base 'nf5'"),
        (("--precision", "half"), "unknown --precision 'half'"),
        (("--lengths", 3, 9, "--tokens", 8), "--lengths has 9, which is more than --tokens 8"),
        (("--device", "gpu"), "--device is cuda, cpu or a GPU's index"),
        (("--limit", 0), "--limit must be greater than 0"),
        (("--limit", 3), "need a GPU"),
        (("--longest",), "need a GPU"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(options, message, tmp_path, call):
    assert message in call("scripts.bench_memory", *BRIEFLY, "--output", tmp_path / "out", *options).refused()
    assert not (tmp_path / "out").exists()


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
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert model.dtype == dtype and len(tokenizer) == model.config.vocab_size == 2048
        assert tokenizer("w7 w1").input_ids == [11, 5]
        return model, tokenizer

    def get_peft_model(model, use_gradient_checkpointing, **lora):
        from peft import LoraConfig, get_peft_model

        assert use_gradient_checkpointing == "unsloth"
        return get_peft_model(model, LoraConfig(**lora))

    def for_training(model):
        return model.train()
"""
    )
    asked = [
        "--shape",
        "tiny",
        "--batch",
        2,
        "--tokens",
        8,
        "--output",
        tmp_path,
        "--methods",
        "lora-all+unsloth+checkpointing",
    ]
    command = [sys.executable, "-m", "scripts.bench_memory", *BRIEFLY, *map(str, asked)]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ['PYTHONPATH']}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "tiny_2x8.json").read_text())["results"]
    rank, (width, inner, keys, layers) = 32, (64, 128, 32, 2)
    sides = 2 * (width + width) + 2 * (width + keys) + 3 * (width + inner)  # of q, o; k, v; gate, up, down
    assert result["trained_parameters"] == layers * rank * sides
    assert result["loss"] == pytest.approx(7.62, abs=0.1)  # near log(2048)
