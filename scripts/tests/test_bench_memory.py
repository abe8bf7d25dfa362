"""The memory benchmark on tiny shapes on the CPU: the workers, the record, what a killed run leaves, bad input."""

import importlib.util
import json
import os
import sys
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from control_experiments.paths import RESULTS
from control_experiments.reporting.records import load, read_paper
from control_experiments.reporting.tables import make_table
from control_experiments.training import benchmarking
from control_experiments.training import device as devices
from control_experiments.training.quantization import loading_arguments
from peft_control import Fp8Linear
from peft_control.memory import streaming
from scripts import bench_memory, measuring, workloads
from scripts.catalogue import LONGEST, Setting, parse_method
from scripts.workloads import build

BRIEFLY = ("--device", "cpu", "--steps", "2", "--warmup", "1")


@pytest.fixture
def measured(monkeypatch):
    """The methods that were measured; each in this process, which spares a start of Python."""
    done = []

    def here(command, environment):
        """What the worker prints."""
        (options,) = bench_memory.parse_arguments(bench_memory.Options, argv=command[3:])
        done.append(options.worker)
        method, options = parse_method(options.worker), options.with_defaults()
        yield from measuring.search(options, method) if options.limit else [measuring.measure(options, method)]

    monkeypatch.setattr(measuring, "stream_apart", here)
    monkeypatch.setattr(benchmarking, "git_state", lambda: {"commit": "0", "dirty": False})
    return done


def test_a_killed_run_goes_on_and_a_finished_one_is_kept(tmp_path, call, measured):
    asked = (*BRIEFLY, "--shape", "tiny", "--batch", 2, "--tokens", 8, "--output_dir", tmp_path / "memory")
    asked += ("--repeats", 2, "--base", "bf16", "nf4", "--methods", "lora", "control:fast")
    stdout = call("scripts.bench_memory", *asked).finished().out
    assert "tiny, 2 x 8 tokens, bfloat16, cpu" in stdout
    assert stdout.count("memory not measured") == 4 and "GB" not in stdout
    assert measured == ["lora+bf16", "control+bf16:fast", "lora+nf4", "control+nf4:fast"]
    path = tmp_path / "memory" / "tiny_2x8_bf16_nf4.json"
    record = json.loads(path.read_text())
    assert [result["method"] for result in record["results"]] == measured == record["options"]["methods"]
    for result in record["results"]:
        seconds = result["step_seconds_repeats"]
        assert len(result["step_seconds_all"]) == 4 and min(seconds) <= result["step_seconds"] <= max(seconds)
        assert result["tokens_per_second"] == pytest.approx(2 * 8 / result["step_seconds"])
        assert result["trained_parameters"] > 0 and result["memory"]["peak_resident_bytes"] > 0
    loras = {r["method"]: r["step_seconds"] for r in record["results"] if r["method"].startswith("lora")}
    assert f"time / {min(loras, key=loras.get)}" in stdout and " 1.00" in stdout

    call("scripts.bench_memory", *asked).finished()
    assert len(measured) == 4, "all was measured before"
    path.rename(f"{path}.partial").write_text(json.dumps({**record, "results": record["results"][1:]}))
    assert "3 measured before" in call("scripts.bench_memory", *asked).finished().out and measured[4:] == ["lora+bf16"]
    assert json.loads(path.read_text())["results"][1:] == record["results"][1:]
    call("scripts.bench_memory", *asked, "--steps", 1).finished()
    assert len(measured) == 9, "of another benchmark nothing counts"
    (section,) = make_table("quantized_memory", load(tmp_path)[0], read_paper(RESULTS / "paper.json")).sections
    assert {*section.shown.method} == {*measured} and (section.data["ms a step"] > 0).all()


@pytest.mark.parametrize(
    "program, found",
    [
        ("print('a line'); print('{\"loss\": 1}'); raise MemoryError('none')", [{"loss": 1}, {"error": "MemoryError: none"}]),
        ("import os; os._exit(9)", [{"error": "exit code 9"}]),
    ],
)
def test_a_method_says_what_it_found_and_why_it_failed(program, found):
    assert [*benchmarking.stream_apart([sys.executable, "-c", program], {})] == found


@pytest.mark.parametrize(
    "shape, size, methods",
    [
        ("tiny", (2, 16, [5, 16]), "control control:fast control:lean "
         "lora+checkpointing lora+eager lora+uncast lora-all lora-qkv dora miss lora-fa control+lora:lean"),
        ("tiny-moe", (2, 16, None), "control control:lean control+checkpointing lora lora+uncast lora-experts+checkpointing "
         "lora-all dora miss control+lora:lean"),
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


def test_shadow_trains_a_small_model_beside_the_base():
    work = build(Setting("tiny", "cpu", 1, 8), parse_method("shadow"))
    assert work.step().item() > work.step().item()
    assert sum(parameter.numel() for parameter in work.trained) > 2 * 64 * 64


def test_fp8head_stores_the_output_layer_in_fp8():
    found = {
        text: build(Setting("tiny", "cpu", 2, 16), parse_method(text))
        for text in ("control+fp8:fast", "control+fp8head+fp8:fast")
    }
    kinds = [type(work.model.get_output_embeddings()) for work in found.values()]
    assert kinds == [torch.nn.Linear, Fp8Linear]
    one, two = (work.step().item() for work in found.values())
    assert one != two == pytest.approx(one, rel=1e-2)


@pytest.mark.parametrize("shape", ["tiny", "tiny-moe"])
def test_streamed_weights_take_the_same_steps(shape):
    found = {}
    for text in ("control+fp8:lean", "control+streamed+fp8:lean"):
        work = build(Setting(shape, "cpu", 2, 16), parse_method(text))
        found[streaming.describe(work.model)] = [work.step().item() for _ in range(3)]
    resident, streamed = found.items()
    assert resident[0] is None and "2 layers wait on the host" in streamed[0]
    assert resident[1] == streamed[1] and streamed[1][2] < streamed[1][0]


def test_methods_are_those_of_the_shipped_records():
    """At their true shapes, without memory for any parameter: as many trained ones under the same names."""
    shipped = {}
    for path in (RESULTS / "published" / "memory").rglob("*.json"):
        record = json.loads(path.read_text())
        for result in record["results"]:
            if "trained_parameters" in result:
                key = (record["options"]["shape"], parse_method(result["method"]).name)
                shipped.setdefault(key, set()).add(result["trained_parameters"])
    assert len(shipped) >= 15

    def trained(shape, method):
        with torch.device("meta"):
            model = workloads.adapt(workloads.random_base(shape, method, "meta", torch.bfloat16), shape, method)
        return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    assert {(shape, name): {trained(shape, parse_method(name))} for shape, name in shipped} == shipped


@pytest.mark.parametrize("shape", ["tiny-roberta", "tiny", "tiny-moe"])
def test_random_bases_are_quantized_as_loaded_ones(shape, tmp_path):
    """Same layers, same kind of quantized state as from_pretrained makes."""

    def base(kind):
        return workloads.random_base(shape, parse_method(f"lora+{kind}"), "cpu", torch.float32)

    def layers(model):
        return {name: str(module) for name, module in model.named_modules() if not [*module.children()]}

    plain = base("fp32")
    plain.save_pretrained(tmp_path)
    for kind in ("fp8",) if shape == "tiny-moe" else ("nf4", "int8", "fp8"):
        loaded = type(plain).from_pretrained(tmp_path, **loading_arguments(kind, torch.device("cpu"), torch.float32))
        ours = base(kind)
        assert layers(ours) == layers(loaded) and ours.num_parameters() == loaded.num_parameters()


@pytest.fixture
def gpu(monkeypatch, measured):
    """A GPU of 80 GiB that allocates nothing: a step of so many tokens has the peak in bytes that `gpu.peak` says."""
    found = SimpleNamespace(limit=80 * 2**30, ran=[], tokens=0, peak=lambda tokens: 2**33 + tokens * 2**17)

    class Work:
        model, optimizer = None, SimpleNamespace(zero_grad=lambda: None)

        def step(self):
            found.tokens = self.loss
            found.ran.append((self.loss, round(found.limit / 2**30, 3)))
            if found.peak(self.loss) > found.limit:
                raise RuntimeError("CUDA error: out of memory")

    memory = {
        "synchronize": lambda: None, "empty_cache": lambda: None, "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: found.peak(0), "max_memory_allocated": lambda: found.peak(found.tokens),
        "set_per_process_memory_fraction": lambda share: setattr(found, "limit", share * 80 * 2**30),
        "get_device_properties": lambda index: SimpleNamespace(total_memory=80 * 2**30),
    }  # fmt: skip
    for name, stand_in in memory.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(measuring, "build", lambda setting, method, longest: Work())
    monkeypatch.setattr(measuring, "step_loss", lambda setting, model: setting.tokens)
    monkeypatch.setattr(devices, "select_device", torch.device)
    machine = {"device": "GPU", "machine": {"total_memory_bytes": 80 * 2**30}, "matmul_tflops": None}
    monkeypatch.setattr(measuring, "machine", lambda device: machine)
    return found


@pytest.mark.parametrize(
    "peak, most_steps",
    [
        (lambda t: 2**33 + t * 2**17, 8),
        (lambda t: 2**33 + t * 2**17 + max(0, t - 100_000) * 2**18, 16),  # the host is full and states stay on the GPU
        (lambda t: 2**33 + t * 2**22, 8),  # a step of 16,384 tokens fits nowhere
        (lambda t: 100 * 2**30, 4),  # the weights alone are too large
        (lambda t: 2**33 + t, 8),
    ],
)
def test_the_longest_sequences_are_found_in_few_steps(gpu, peak, most_steps, tmp_path, call):
    gpu.peak, limits = peak, [8.5, 23.5, 80]
    asked = ("--batch", 1, "--methods", "lora", "--output", tmp_path, "--limit", *limits)
    stdout = call("scripts.bench_memory", *asked).finished().out
    results = json.loads((tmp_path / "llama3-8b_1x1024_limit8.5-23.5-80.json").read_text())["results"]
    assert [result["limit_gib"] for result in results] == limits
    for result in results:
        found, room = result["longest_tokens"], result["limit_gib"] * 2**30
        best = max((tokens for tokens in range(512, LONGEST + 1, 512) if peak(tokens) <= room), default=0)
        assert found % 512 == 0 and 0.95 * best - 512 <= found <= best
        assert f"{found:7d} tokens within {result['limit_gib']} GiB" in stdout
        if found:
            assert any((found, limit) in gpu.ran for limit in limits if limit <= result["limit_gib"])
            assert result["peak_bytes"] == peak(found)
            assert result["tokens_per_second"] == pytest.approx(found / result["step_seconds"])
        assert (result.get("ended_by") == "--up_to") == (found == LONGEST)
    assert len(gpu.ran) <= most_steps * len(limits)


def test_a_search_goes_on_after_a_kill_and_ends_in_time(gpu, tmp_path, call, monkeypatch):
    asked = ("scripts.bench_memory", "--batch", 1, "--base", "nf4", "--methods", "control:lean", "lora", "--output", tmp_path)
    asked += ("--speed_at", 1024, 10**6, "--limit", 9.5, 12)
    path, real = tmp_path / "llama3-8b_1x1024_nf4_limit9.5-12.json", measuring.stream_apart

    def dying(command, environment):
        yield from islice(real(command, environment), 3)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(measuring, "stream_apart", dying)
        assert call(*asked)[0] == 130 and not path.exists()
    found = json.loads(path.with_name(f"{path.name}.partial").read_text())["results"]
    measured = [(result.get("tokens"), result.get("limit_gib")) for result in found]
    assert measured == [(1024, None), (10**6, None), (None, 9.5)] and found[1]["fits"] is False

    clock = iter([0, *[61] * 99])
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "time", SimpleNamespace(monotonic=lambda: next(clock), time=lambda: 0))
        code, stdout, stderr = call(*asked, "--max_minutes", 1)
    assert code == 1 and "time is up, 5 of 8 are left: the same command goes on" in stderr and "3 measured before" in stdout
    for _ in range(2):  # the second time all was measured before
        call(*asked).finished()
        results = json.loads(path.read_text())["results"]
        assert results[:3] == found
        assert [result["method"] for result in results] == ["control+nf4:lean"] * 4 + ["lora+nf4"] * 4

    monkeypatch.setattr(measuring, "stream_apart", lambda *_: iter([{"error": "exit code -9"}]))
    done = call(*asked, "--methods", "lora-all")
    assert "nothing could be measured" in done.refused() and done.out.count("failed: exit code -9") == 4


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "shape, tokens", [("llama3-8b", 1024), ("vit-b16", 197), ("roberta-base", 128), ("qwen3-30b-a3b", 1024)]
)
def test_by_default_the_shapes_methods_run(shape, tokens, device, monkeypatch):
    """Without --methods; workloads of the true size are for a GPU, so only what would run is looked at."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace())  # unsloth is installed
    monkeypatch.setattr(devices, "select_device", torch.device)
    options = bench_memory.Options(shape=shape, device=device).with_defaults()
    assert (options.tokens, options.file_name()) == (tokens, f"{shape}_4x{tokens}.json")
    assert {"control:lean", "lora+checkpointing"} <= {*options.methods}
    assert ("lora+unsloth" in options.methods) == (shape == "llama3-8b" and device == "cuda")


@pytest.mark.parametrize(
    "options, message",
    [
        (("--shape", "huge"), "argument --shape: invalid choice: 'huge' (choose from"),
        (("--methods", "prefix"), "unknown method 'prefix'"),
        (("--methods", "lora+graphs"), "CUDA graphs need a GPU"),
        (("--methods", "dora+int8"), "dora over int8 needs a GPU"),
        (("--methods", "control+streamed:fast"), "weights are not streamed with"),
        (("--methods", "lora+unsloth"), "unsloth is not installed"),
        (("--methods", "control+fp8states:balanced"), "fp8states is for mode lean"),
        (("--methods", "control+fp8head+nf4"), "fp8head is for base fp8"),
        (("--shape", "smollm2", "--methods", "control+fp8head+fp8"), "smollm2's output layer is its embedding"),
        (("--shape", "vit-b16", "--methods", "lora+liger"), "no switches but checkpointing"),
        (("--shape", "vit-b16", "--methods", "lora+nf4"), "for text models"),
        (("--shape", "tiny-vit", "--tokens", 8), "tiny-vit has 101 tokens"),
        (("--shape", "tiny-moe", "--methods", "lora+nf4"), "bitsandbytes leaves experts, 3-D tensors, in 16 bits: take fp8"),
        (("--shape", "tiny-moe", "--methods", "lora-experts+fp8"), "experts in FP8 take no LoRA on their weights"),
        (("--lengths", 3, 9, "--tokens", 8), "--lengths has 9, which is more than --tokens 8"),
        (("--device", "gpu"), "GPU must be an index such as 0, or cpu"),
        (("--limit", 3), "--limit needs a GPU"),
        (("--speed_at", 64), "--speed_at, --up_to and --max_minutes go with --limit"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(options, message, tmp_path, call):
    assert message in call("scripts.bench_memory", *BRIEFLY, "--output", tmp_path / "out", *options).refused()
    assert not (tmp_path / "out").exists()


UNSLOTH = """
import sys

assert "transformers" not in sys.modules and "peft" not in sys.modules


class FastLanguageModel:
    def from_pretrained(folder, max_seq_length, dtype, load_in_4bit, local_files_only):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        assert max_seq_length == 8 and not load_in_4bit and local_files_only
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), AutoTokenizer.from_pretrained(folder)

    def get_peft_model(model, use_gradient_checkpointing, **lora):
        from peft import LoraConfig, get_peft_model

        assert use_gradient_checkpointing == "unsloth"
        return get_peft_model(model, LoraConfig(**lora))

    def for_training(model):
        return model.train()
"""


def test_unsloth_is_imported_first_and_given_a_folder(tmp_path, call, monkeypatch):
    """By a stand-in with unsloth's names, made of transformers and peft, in the method's own process."""
    (tmp_path / "unsloth.py").write_text(UNSLOTH)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    asked = f"--shape tiny --batch 2 --tokens 8 --methods lora-all+unsloth+checkpointing --output {tmp_path}".split()
    call("scripts.bench_memory", *BRIEFLY, *asked).finished()
    (result,) = json.loads((tmp_path / "tiny_2x8.json").read_text())["results"]
    assert result["loss"] == pytest.approx(7.62, abs=0.1)  # near log(2048)
