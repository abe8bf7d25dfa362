#!/usr/bin/env python3
"""Memory and speed of one training step: LoRA and DoRA as people run them, and control in every memory mode.

    python scripts/bench_memory.py                                        # LLaMA-3-8B shape, 4 x 1024 tokens
    python scripts/bench_memory.py --tokens 256 --methods lora control:fast control:lean
    python scripts/bench_memory.py --limit 23.5 --batch 1 --methods lora+liger+checkpointing control:lean
    python scripts/bench_memory.py --methods control:fast --profile       # where the time goes

Random weights of the true shape: memory and time do not depend on their values. Every method runs in a process
of its own, on the same data, and a line is printed as it ends; ratios are to the fastest and to the leanest LoRA
of the same run. A record per run goes to --output, with a picture of memory against time.

A method is NAME[+liger][+checkpointing][+compile][:MODE] with
  NAME  lora (q,k,v,up,down), lora-all (every linear layer), dora, control (attention and mlp), control+lora
  MODE  plain, fast, balanced or lean, for control and control+lora (see peft_control.memory)
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser

ROOT = Path(__file__).resolve().parents[1]

SHAPES = {
    "llama3-8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                      num_key_value_heads=8, vocab_size=128256, rope_theta=500000.0),
    "llama2-7b": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
                      num_key_value_heads=32, vocab_size=32000),
    "smollm2-135m": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                         num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True),
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=512),
}  # fmt: skip

DEFAULT_METHODS = [
    "dora", "lora", "lora-all", "lora+compile", "lora+liger", "lora+checkpointing", "lora+liger+checkpointing",
    "control:plain", "control+liger:plain", "control:fast", "control:balanced", "control:lean",
    "control+lora:plain", "control+lora:fast", "control+lora:balanced", "control+lora:lean",
]  # fmt: skip


@dataclass
class Options:
    shape: str = field(default="llama3-8b", metadata={"help": f"Model shape: {', '.join(SHAPES)}."})
    methods: list[str] = field(
        default_factory=lambda: DEFAULT_METHODS, metadata={"help": "Methods to run, in order."}
    )
    batch: int = field(default=4, metadata={"help": "Sequences per step."})
    tokens: int = field(default=1024, metadata={"help": "Tokens per sequence."})
    steps: int = field(default=8, metadata={"help": "Timed steps; the median is reported."})
    warmup: int = field(default=3, metadata={"help": "Steps before the timed ones."})
    device: str = field(default="cuda", metadata={"help": "cuda, or cpu to try the script out."})
    limit: float | None = field(
        default=None, metadata={"help": "Instead: the longest sequence that trains within this many GiB."}
    )
    profile: bool = field(default=False, metadata={"help": "Instead: print the kernels that take the time."})
    output: str = field(default=str(ROOT / "results" / "memory"), metadata={"help": "Folder of the records."})
    worker: str | None = field(
        default=None, metadata={"help": "Used by the script itself: run this one method."}
    )


def parse_method(text: str) -> tuple[str, set[str], str]:
    """``"control+lora:fast"`` -> ``("control+lora", set(), "fast")``; raises ValueError."""
    head, _, mode = text.partition(":")
    parts = head.split("+")
    switches = {part for part in parts if part in ("liger", "checkpointing", "compile")}
    name = "+".join(part for part in parts if part not in switches)
    if name not in ("lora", "lora-all", "dora", "control", "control+lora"):
        raise ValueError(f"unknown method {text!r}: see --help")
    if mode not in ("", "plain", "fast", "balanced", "lean") or (
        mode not in ("", "plain") and "control" not in name
    ):
        raise ValueError(f"method {text!r}: no such memory mode")
    return name, switches, mode or "plain"


def build(options: Options, method: str):
    """The model of the method, ready to train, and the bytes of its weights."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    from peft_control import ControlConfig
    from peft_control.memory import set_memory_mode

    name, switches, mode = parse_method(method)
    if "liger" in switches:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[options.shape], max_position_embeddings=1 << 20, use_cache=False)
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")

    per_weight = dict(r=32, lora_alpha=64, lora_dropout=0.0)
    adapters = {
        "lora": lambda: LoraConfig(
            target_modules=["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"], **per_weight
        ),
        "lora-all": lambda: LoraConfig(target_modules="all-linear", **per_weight),
        "dora": lambda: LoraConfig(
            target_modules=["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"], use_dora=True, **per_weight
        ),
        "control": lambda: ControlConfig(control_blocks=["attention", "mlp"], control_rank=64),
        "control+lora": lambda: ControlConfig(
            control_blocks=["mlp"],
            control_rank=64,
            target_modules=["q_proj", "k_proj", "v_proj"],
            **per_weight,
        ),
    }
    config = adapters[name]()
    config.task_type = "CAUSAL_LM"
    model = get_peft_model(model, config)
    if "checkpointing" in switches:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    set_memory_mode(model, mode)
    model.train()
    if "compile" in switches:
        model = torch.compile(model)
    return model


class Clock:
    """Seconds on the device between two reads."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"

    def read(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start, end) -> float:
        return start.elapsed_time(end) / 1000 if self.cuda else end - start


def allocated(options: Options) -> int:
    return torch.cuda.memory_allocated() if options.device == "cuda" else 0


def measure(options: Options, method: str) -> dict:
    """Train a few steps; return memory in bytes, seconds per step and the loss after them."""
    model = build(options, method)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=options.device == "cuda")
    generator = torch.Generator(device=options.device).manual_seed(1)
    vocabulary = SHAPES[options.shape]["vocab_size"]
    ids = torch.randint(
        vocabulary, (options.batch, options.tokens), generator=generator, device=options.device
    )
    static, clock, seconds = allocated(options), Clock(options.device), []

    def step():
        start = clock.read()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach(), start, clock.read()

    for number in range(options.warmup + options.steps):
        if number == options.warmup and options.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        loss, start, end = step()
        if options.device == "cuda":
            torch.cuda.synchronize()
        if number >= options.warmup:
            seconds.append(clock.seconds(start, end))
    if options.profile:
        with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
            step()
            if options.device == "cuda":
                torch.cuda.synchronize()
        key = f"self_{options.device}_time_total"
        print(
            profile.key_averages().table(sort_by=key, row_limit=30, max_name_column_width=70), file=sys.stderr
        )
    peak = torch.cuda.max_memory_allocated() if options.device == "cuda" else 0
    median = statistics.median(seconds)
    return {
        "method": method,
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "static_bytes": static,
        "peak_bytes": peak,
        "over_static_bytes": peak - static,
        "step_seconds": median,
        "step_seconds_all": seconds,
        "tokens_per_second": options.batch * options.tokens / median,
        "loss": loss.item(),
    }


def longest(options: Options, method: str) -> dict:
    """The longest sequence, in steps of 512 tokens, whose training step fits ``options.limit`` GiB."""
    model = build(options, method)
    torch.cuda.set_per_process_memory_fraction(
        options.limit * 2**30 / torch.cuda.get_device_properties(0).total_memory
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    vocabulary = SHAPES[options.shape]["vocab_size"]

    def fits(tokens: int) -> bool:
        ids = torch.randint(vocabulary, (options.batch, tokens), device="cuda")
        try:
            for _ in range(2):
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            torch.cuda.synchronize()
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            optimizer.zero_grad()
            torch.cuda.empty_cache()

    good, bad = 0, 512
    while fits(bad):
        good, bad = bad, bad * 2
        if bad > 1 << 18:
            break
    while bad - good > max(512, good // 16):
        middle = (good + bad) // 2 // 512 * 512
        if middle in (good, bad):
            break
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return {"method": method, "limit_gib": options.limit, "longest_tokens": good}


def matmul_tflops() -> float:
    """The device's own bf16 matmul rate on random data, for the arithmetic floor."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(10):
        a @ b
    end.record()
    torch.cuda.synchronize()
    return 10 * 2 * 8192**3 / (start.elapsed_time(end) / 1000) / 1e12


def run_all(options: Options) -> list[dict]:
    results = []
    passed_on = list(sys.argv[1:])
    for number, method in enumerate(options.methods, 1):
        started = time.time()
        command = [sys.executable, __file__, *passed_on, "--worker", method]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=None if options.profile else subprocess.PIPE, text=True
        )
        if done.returncode:
            reason = (done.stderr or "").strip().splitlines()[-1:] or ["see above"]
            result = {"method": method, "error": reason[0][:300]}
        else:
            result = json.loads(done.stdout.strip().splitlines()[-1])
        results.append(result)
        print(f"[{number}/{len(options.methods)}, {time.time() - started:.0f} s] {line(result)}", flush=True)
    return results


def line(result: dict) -> str:
    if "error" in result:
        return f"{result['method']:32s} failed: {result['error']}"
    if "longest_tokens" in result:
        return f"{result['method']:32s} {result['longest_tokens']:7d} tokens within {result['limit_gib']} GiB"
    return (
        f"{result['method']:32s} {result['over_static_bytes'] / 1e9:7.2f} GB over {result['static_bytes'] / 1e9:.2f}"
        f"  {result['step_seconds'] * 1e3:7.1f} ms  {result['tokens_per_second']:9.0f} tokens/s  loss {result['loss']:.4f}"
    )


def ratios(results: list[dict]) -> str:
    """Control against the fastest and the leanest LoRA of the run."""
    measured = [result for result in results if "step_seconds" in result]
    peers = [result for result in measured if result["method"].startswith("lora")]
    if not peers:
        return ""
    fastest = min(peers, key=lambda result: result["step_seconds"])
    leanest = min(peers, key=lambda result: result["over_static_bytes"])
    lines = [f"{'':32s} against {fastest['method']} (fastest)   against {leanest['method']} (leanest)"]
    for result in measured:
        if result["method"].startswith("control"):
            times = [result["step_seconds"] / peer["step_seconds"] for peer in (fastest, leanest)]
            memory = [
                result["over_static_bytes"] / max(peer["over_static_bytes"], 1) for peer in (fastest, leanest)
            ]
            lines.append(
                f"{result['method']:32s} time x{times[0]:.2f} memory x{memory[0]:.2f}"
                f"            time x{times[1]:.2f} memory x{memory[1]:.2f}"
            )
    return "\n".join(lines)


def draw(results: list[dict], title: str, path: Path) -> None:
    """Memory against time with the frontier: the methods that no other beats in both."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = sorted(
        (result["step_seconds"] * 1e3, result["over_static_bytes"] / 1e9, result["method"])
        for result in results
        if "step_seconds" in result
    )
    frontier, best = [], float("inf")
    for point in points:
        if point[1] < best:
            frontier.append(point)
            best = point[1]
    figure, axes = plt.subplots(figsize=(9, 6))
    for ms, gigabytes, method in points:
        colour = "tab:blue" if method.startswith("control") else "tab:orange"
        axes.scatter(ms, gigabytes, color=colour)
        axes.annotate(method, (ms, gigabytes), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.step([p[0] for p in frontier], [p[1] for p in frontier], where="post", color="grey", linewidth=0.8)
    axes.set(xlabel="ms per step", ylabel="GB over the weights", title=title, yscale="log")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    (options,) = HfArgumentParser(Options, description=__doc__).parse_args_into_dataclasses()
    with contextlib.redirect_stdout(sys.stderr) if options.worker else contextlib.nullcontext():
        result = None
        if options.worker:
            result = (longest if options.limit else measure)(options, options.worker)
    if options.worker:
        print(json.dumps(result))
        return
    for method in options.methods:
        parse_method(method)
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    rate = matmul_tflops() if options.device == "cuda" else None
    torch.cuda.empty_cache() if rate else None
    print(f"{options.shape}, {options.batch} x {options.tokens} tokens, bf16, {device}"
          + (f", bf16 matmul {rate:.0f} TFLOP/s" if rate else ""), flush=True)  # fmt: skip
    results = run_all(options)
    print(ratios(results))
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{options.shape}_{options.batch}x{options.tokens}" + (
        f"_limit{options.limit:g}" if options.limit else ""
    )
    record = {
        "schema": 1,
        "device": device,
        "matmul_tflops": rate,
        "versions": {"torch": torch.__version__},
        "weights": "random",
        "options": {key: value for key, value in asdict(options).items() if key != "output"},
        "results": results,
    }
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    if not options.limit:
        draw(
            results,
            f"{options.shape}, {options.batch} x {options.tokens} tokens, {device}",
            folder / f"{name}.png",
        )


if __name__ == "__main__":
    main()
