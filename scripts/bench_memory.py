#!/usr/bin/env python3
"""Memory and speed of one training step: LoRA and DoRA as people run them, and control in every memory mode.

    python -m scripts.bench_memory                                        # LLaMA-3-8B shape, 4 x 1024 tokens
    python -m scripts.bench_memory --tokens 256 --methods lora control:fast control+graphs:fast control:lean
    python -m scripts.bench_memory --shape vit-b16 --batch 128            # 4-layer MLP, 197 tokens, fp16 autocast
    python -m scripts.bench_memory --shape roberta-base --batch 64 --tokens 128
    python -m scripts.bench_memory --limit 23.5 --batch 1 --methods lora+liger+checkpointing control:lean
    python -m scripts.bench_memory --methods control:fast --profile       # where the time goes

Random weights of the true shape: memory and time do not depend on their values. Every method runs in a process
of its own, on the same data, and a line is printed as it ends; ratios are to the fastest and to the leanest LoRA
of the same run. A record per run goes to --output, with a picture of memory against time. A killed run goes on after
what it has measured.

A method is NAME[+liger|+unsloth][+checkpointing][+compile][+graphs][:MODE] with
  NAME  lora, lora-all (every linear layer), dora, control, control+lora, each with the ranks and targets of the
        paper's recipe for the shape (LLaMA: LoRA r 32 on q,k,v,up,down, control r 64 on attention and mlp;
        ViT: LoRA r 1 on the MLP's linears, control r 16; RoBERTa: LoRA r 8 on query and value, control r 16)
  MODE  plain, fast, balanced or lean, for control and control+lora (see peft_control.memory)
By default those run that suit the shape; liger, unsloth and compile are for the LLaMA shapes. Unsloth, for lora and lora-all,
only loads models from folders, so one is written for it (16 GB for LLaMA-3-8B, in TMPDIR); by default it runs on a GPU where
it is installed, for which results/README.md has a command. With graphs (CUDA graphs of the step, see peft_control.memory) memory
is what the allocator reserves, in expandable segments, because a graph keeps its memory between the steps. --limit uses
expandable segments for every method, as the LLaMA launchers do.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Optional

import control_experiments  # noqa: F401  # isort: skip  (first, see there)
import torch
from torch import nn

from control_experiments.errors import UserError, run_main
from control_experiments.paths import RESULTS
from control_experiments.record import git_state, package_versions, utc_now, write_json_atomic
from control_experiments.training.arguments import parse_arguments

ROOT = Path(__file__).resolve().parents[1]

LLAMA_SHAPES = {
    "llama3-8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                      num_key_value_heads=8, vocab_size=128256, rope_theta=500000.0),
    "llama2-7b": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
                      num_key_value_heads=32, vocab_size=32000),
    "smollm2-135m": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                         num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True),
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=512),
}  # fmt: skip
LLAMA_RANKS = dict(r=32, lora_alpha=64, lora_dropout=0.0)
LLAMA_TARGETS = {
    "lora": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
    "lora-all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
ENCODER_SHAPES = {
    "roberta-base": dict(vocab_size=50265, max_position_embeddings=514),
    "tiny-roberta": dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4),
}  # fmt: skip
VISION_SHAPES = {"vit-b16": "vit_base_patch16_224", "tiny-vit": "test_vit"}  # timm's names
SWITCHES = ("liger", "unsloth", "checkpointing", "compile", "graphs")
LONGEST = 1 << 17  # tokens: where the search of --limit ends
#: The environment of a process whose tensors change their sizes.
EXPANDABLE = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
SHAPES = (*LLAMA_SHAPES, *VISION_SHAPES, *ENCODER_SHAPES)

#: The methods of a LLaMA shape; other models have none of the switches liger, unsloth and compile.
DEFAULT_METHODS = [
    "dora", "lora", "lora-all", "lora+compile", "lora+liger", "lora+checkpointing", "lora+liger+checkpointing", "lora+graphs",
    "control:plain", "control+liger:plain", "control:fast", "control:balanced", "control:lean",
    "control+graphs:fast", "control+graphs:balanced", "control+graphs:lean",
    "control+lora:plain", "control+lora:fast", "control+lora:balanced", "control+lora:lean",
]  # fmt: skip
OTHER_METHODS = [
    method for method in DEFAULT_METHODS if not {"liger", "compile"} & set(re.split("[+:]", method))
]
UNSLOTH_METHODS = [
    "lora+unsloth",
    "lora-all+unsloth",
    "lora+unsloth+checkpointing",
    "lora-all+unsloth+checkpointing",
]


#: `python -c` this ... runs this module.
UNSLOTH_FIRST = (
    "import runpy, unsloth; runpy.run_module('scripts.bench_memory', run_name='__main__', alter_sys=True)"
)


@dataclass
class Options:
    shape: str = field(default="llama3-8b", metadata={"help": f"Model shape: {', '.join(SHAPES)}."})
    methods: Optional[list[str]] = field(
        default=None, metadata={"help": "Methods to run, in order; default: all that the shape has."}
    )
    batch: int = field(default=4, metadata={"help": "Sequences per step."})
    tokens: Optional[int] = field(
        default=None,
        metadata={
            "help": "Tokens per sequence; default: 1024 for a LLaMA, 128 for a RoBERTa. A ViT has as many as it has."
        },
    )
    steps: int = field(default=8, metadata={"help": "Timed steps; the median is reported."})
    warmup: int = field(default=3, metadata={"help": "Steps before the timed ones."})
    device: str = field(default="cuda", metadata={"help": "cuda, or cpu to try the script out."})
    limit: float | None = field(
        default=None, metadata={"help": "Instead: the longest sequence that trains within this many GiB."}
    )
    profile: bool = field(
        default=False,
        metadata={
            "help": "Instead: the kernels of a step and their times, printed and in a record of their own."
        },
    )
    output: str = field(default=str(RESULTS / "memory"), metadata={"help": "Folder of the records."})
    worker: str | None = field(
        default=None, metadata={"help": "Used by the script itself: run this one method."}
    )


def parse_method(text: str) -> tuple[str, set[str], str]:
    """``"control+lora:fast"`` -> ``("control+lora", set(), "fast")``; raises ValueError."""
    head, _, mode = text.partition(":")
    parts = head.split("+")
    switches = {part for part in parts if part in SWITCHES}
    name = "+".join(part for part in parts if part not in switches)
    if name not in ("lora", "lora-all", "dora", "control", "control+lora"):
        raise ValueError(f"unknown method {text!r}: see --help")
    if mode not in ("", "plain", "fast", "balanced", "lean") or (
        mode not in ("", "plain") and "control" not in name
    ):
        raise ValueError(f"method {text!r}: no such memory mode")
    if "unsloth" in switches and (
        name not in ("lora", "lora-all") or switches - {"unsloth", "checkpointing"}
    ):
        raise ValueError(f"method {text!r}: unsloth is for lora and lora-all, with checkpointing or without")
    return name, switches, mode or "plain"


@dataclass
class Workload:
    """A model ready to train and one step's loss on fixed data; ``batch`` and ``tokens`` as measured."""

    model: nn.Module
    loss: Callable[[], torch.Tensor]
    batch: int
    tokens: int
    autocast: torch.dtype  # float16: float32 weights, and a loss scaler


def build(options: Options, method: str) -> Workload:
    name, switches, mode = parse_method(method)
    torch.manual_seed(0)
    if options.shape in LLAMA_SHAPES:
        return build_llama(options, name, switches, mode)
    return (build_vit if options.shape in VISION_SHAPES else build_roberta)(options, name, switches, mode)


def random_tokens(options: Options, vocabulary: int) -> torch.Tensor:
    generator = torch.Generator(device=options.device).manual_seed(1)
    shape = (options.batch, options.tokens)
    return torch.randint(3, vocabulary, shape, generator=generator, device=options.device)


def adapt(
    model: nn.Module,
    name: str,
    mode: str,
    *,
    lora: dict,
    every: object,
    mixed: dict,
    control: dict,
    **mode_options,
):
    """Add the adapter `name`: LoRA's fields, all its targets, its fields beside a control, and the control's."""
    from peft import LoraConfig, get_peft_model

    from peft_control import ControlConfig
    from peft_control.memory import set_memory_mode

    task = {} if "task_type" not in control else {"task_type": control["task_type"]}
    config = {
        "lora": lambda: LoraConfig(**lora, **task),
        "lora-all": lambda: LoraConfig(**{**lora, "target_modules": every}, **task),
        "dora": lambda: LoraConfig(**lora, use_dora=True, **task),
        "control": lambda: ControlConfig(**control),
        "control+lora": lambda: ControlConfig(**{**control, "control_blocks": ["mlp"]}, **mixed),
    }[name]()
    return set_memory_mode(get_peft_model(model, config), mode, **mode_options).train()


def build_llama(options, name, switches, mode) -> Workload:
    shape = LLAMA_SHAPES[options.shape]
    if "unsloth" in switches:
        tokens = LONGEST if options.limit else options.tokens
        model = unsloth_llama(shape, options.device, name, tokens, "checkpointing" in switches)
    else:
        model = llama(shape, options.device, name, switches, mode)
    if "compile" in switches:
        model = torch.compile(model)
    ids = random_tokens(options, shape["vocab_size"])
    # as the Trainer runs it with bf16=True; without autocast peft would keep a float32 copy of each of LoRA's inputs
    return Workload(model, lambda: model(input_ids=ids, labels=ids).loss, *ids.shape, torch.bfloat16)


def llama(shape: dict, device: str, name: str, switches: set[str], mode: str) -> nn.Module:
    """A LLaMA of random weights with the adapter, ready to train."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    if "liger" in switches:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    config = LlamaConfig(**shape, max_position_embeddings=1 << 20, use_cache=False)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model = adapt(
        model, name, mode, cuda_graphs="graphs" in switches,
        lora=dict(target_modules=LLAMA_TARGETS["lora"], **LLAMA_RANKS),
        every=LLAMA_TARGETS["lora-all"],
        mixed=dict(target_modules=["q_proj", "k_proj", "v_proj"], **LLAMA_RANKS),
        control=dict(task_type="CAUSAL_LM", control_blocks=["attention", "mlp"], control_rank=64),
    )  # fmt: skip
    if "checkpointing" in switches:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def unsloth_llama(shape: dict, device: str, name: str, tokens: int, checkpointing: bool) -> nn.Module:
    """The same with LoRA as unsloth makes and trains it, for sequences of up to so many ``tokens``."""
    from unsloth import FastLanguageModel  # imported before this script, see run_all

    with tempfile.TemporaryDirectory() as folder:
        write_llama(shape, device, folder)
        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=tokens, dtype=torch.bfloat16, load_in_4bit=False, local_files_only=True
        )
    model = FastLanguageModel.get_peft_model(
        model,
        **LLAMA_RANKS,
        target_modules=LLAMA_TARGETS[name],
        use_gradient_checkpointing="unsloth" if checkpointing else False,
    )
    gc.collect()
    return FastLanguageModel.for_training(model)


def write_llama(shape: dict, device: str, folder: str) -> None:
    """A LLaMA of random weights, and a tokenizer of as many words, as people have them in a folder."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    special = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    words = [*special.values(), *(f"w{number}" for number in range(shape["vocab_size"] - len(special)))]
    tokenizer = Tokenizer(WordLevel(dict(zip(words, range(len(words)))), unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    config = LlamaConfig(
        **shape, max_position_embeddings=LONGEST, bos_token_id=1, eos_token_id=2, pad_token_id=3
    )
    with torch.device(device):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def build_roberta(options, name, switches, mode) -> Workload:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(**ENCODER_SHAPES[options.shape], type_vocab_size=1)
    with torch.device(options.device):
        model = RobertaForSequenceClassification(config)
    ranks = dict(r=8, lora_alpha=16, target_modules=["query", "value"])
    model = adapt(
        model, name, mode, cuda_graphs="graphs" in switches,
        lora=ranks, mixed=ranks, every=["query", "key", "value", "dense"],
        control=dict(task_type="SEQ_CLS", control_rank=16),
    )  # fmt: skip
    if "checkpointing" in switches:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = random_tokens(options, config.vocab_size)
    labels = ids[:, 0] % 2
    mask = torch.ones_like(ids)  # a tokenizer's collator always gives one

    def loss():
        return model(input_ids=ids, attention_mask=mask, labels=labels).loss

    return Workload(model, loss, *ids.shape, autocast_dtype(options))


def build_vit(options, name, switches, mode) -> Workload:
    import timm

    from ViT.vision_models import mlp_linears, set_mlp_layers

    with torch.device(options.device):
        model = timm.create_model(VISION_SHAPES[options.shape], num_classes=100)
        set_mlp_layers(model, 4)
    model.set_grad_checkpointing("checkpointing" in switches)
    ranks = dict(r=1, lora_alpha=1, target_modules=list(mlp_linears(4)))
    every = [*mlp_linears(4), "qkv", "proj"]
    model = adapt(
        model, name, mode, cuda_graphs="graphs" in switches,
        lora=dict(**ranks, modules_to_save=["head"]), every=every,
        mixed=dict(r=1, lora_alpha=1, target_modules=["qkv"]),
        control=dict(control_rank=16, control_bias=True, modules_to_save=["head"]),
    )  # fmt: skip
    generator = torch.Generator(device=options.device).manual_seed(1)
    size = model.get_submodule("base_model.model.patch_embed").img_size
    images = torch.randn(options.batch, 3, *size, generator=generator, device=options.device)
    labels = torch.arange(options.batch, device=options.device) % 100
    tokens = model.get_base_model().pos_embed.shape[1]
    loss = nn.CrossEntropyLoss()
    return Workload(
        model, lambda: loss(model(images), labels), options.batch, tokens, autocast_dtype(options)
    )


def autocast_dtype(options: Options) -> torch.dtype:
    return torch.float16 if options.device == "cuda" else torch.bfloat16


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


class Step:
    """One optimizer step of a workload, as a training script takes it."""

    def __init__(self, options: Options, work: Workload):
        self.work, self.device = work, options.device
        self.trained = [parameter for parameter in work.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=options.device == "cuda")
        scaled = work.autocast == torch.float16
        self.scaler = torch.amp.GradScaler(options.device, enabled=scaled)

    def __call__(self) -> torch.Tensor:
        with torch.autocast(self.device, self.work.autocast):
            loss = self.work.loss()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss.detach()


def measure(options: Options, method: str) -> dict:
    """Train a few steps; return memory in bytes, seconds per step and the loss after them."""
    work = build(options, method)
    step = Step(options, work)
    graphs = "graphs" in parse_method(method)[1]
    if graphs:
        torch.cuda.empty_cache()
    static, clock, marks = allocated(options), Clock(options.device), []
    for number in range(options.warmup + options.steps):
        if number == options.warmup and options.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        if number >= options.warmup:
            marks.append(clock.read())
        loss = step()
    marks.append(clock.read())
    if options.device == "cuda":  # only here: training loops do not wait for each step either
        torch.cuda.synchronize()
    seconds = [clock.seconds(start, end) for start, end in itertools.pairwise(marks)]
    peak = 0
    if options.device == "cuda":
        peak = torch.cuda.max_memory_reserved() if graphs else torch.cuda.max_memory_allocated()
    median = statistics.median(seconds)
    return {
        "method": method,
        "trained_parameters": sum(parameter.numel() for parameter in step.trained),
        "static_bytes": static,
        "peak_bytes": peak,
        "peak_is": "reserved" if graphs else "allocated",
        "over_static_bytes": peak - static,
        "step_seconds": median,
        "step_seconds_all": seconds,
        "tokens_per_second": work.batch * work.tokens / median,
        "loss": loss.item(),
        **({"kernels": profiled(options, step)} if options.profile else {}),
    }


def profiled(options: Options, step: Step) -> list[dict]:
    """Seconds of one step by kernel (on the CPU: by operation), the longest first."""
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        step()
        if options.device == "cuda":
            torch.cuda.synchronize()
    seconds = attrgetter(f"self_{'device' if options.device == 'cuda' else 'cpu'}_time_total")
    found = [
        {"name": event.key[:200], "calls": event.count, "seconds": seconds(event) / 1e6}
        for event in profile.key_averages()
        if event.device_type.name.lower() == options.device and seconds(event) > 0
    ]
    return sorted(found, key=lambda kernel: -kernel["seconds"])


def longest(options: Options, method: str) -> dict:
    """The longest sequence, in steps of 512 tokens and up to LONGEST, whose training step fits ``options.limit`` GiB.

    The optimizer's states are there from the second length on, which is what the others are measured with.
    """
    torch.cuda.set_per_process_memory_fraction(
        options.limit * 2**30 / torch.cuda.get_device_properties(0).total_memory
    )
    work = build(replace(options, tokens=512), method)
    step = Step(options, work)

    def fits(tokens: int) -> bool:
        ids = random_tokens(replace(options, tokens=tokens), work.model.config.vocab_size)
        work.loss = lambda: work.model(input_ids=ids, labels=ids).loss
        try:
            step()
            torch.cuda.synchronize()
            return True
        except RuntimeError as error:  # torch's own, or CUDA's when pinned memory runs out
            if "out of memory" not in str(error):
                raise
            return False
        finally:
            step.optimizer.zero_grad()
            torch.cuda.empty_cache()

    good, bad = 0, 512
    while good < LONGEST and fits(bad):
        good, bad = bad, bad * 2
    while good < LONGEST and bad - good > max(512, good // 16):
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


def finished_before(unfinished: Path, record: dict) -> list[dict]:
    """The results that a killed run of the same benchmark has left, without its failures; no table reads that file.

    The same are options, device, versions and code: everything in ``record`` but what each run says anew.
    """
    try:
        found = json.loads(unfinished.read_text())
        anew = ("created", "matmul_tflops", "results")
        if any(found[key] != value for key, value in record.items() if key not in anew):
            return []
        kept = [result for result in found["results"] if "error" not in result]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # there is none, or it is no such file
    if kept:
        print(f"{len(kept)} measured before, in {unfinished} (delete it to start again)", flush=True)
    return kept


def run_all(options: Options, finished: Collection[str] = ()) -> Iterator[dict]:
    """Measure each method that is not ``finished`` in a process of its own."""
    passed_on = list(sys.argv[1:])
    for number, method in enumerate(options.methods, 1):
        if method in finished:
            continue
        started = time.time()
        command = [sys.executable, "-m", "scripts.bench_memory", *passed_on, "--worker", method]
        switches = parse_method(method)[1]
        environment = {**os.environ, **(EXPANDABLE if options.limit or "graphs" in switches else {})}
        if (
            "unsloth" in switches
        ):  # which wants to be imported before transformers, and writes what it compiles
            command[1:3] = ["-c", UNSLOTH_FIRST]
            environment |= {
                "UNSLOTH_DISABLE_STATISTICS": "1",
                "UNSLOTH_COMPILE_LOCATION": str(Path(tempfile.gettempdir()) / "unsloth_compiled_cache"),
            }
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            result = {"method": method, "error": reason[0][:300]}
        else:
            result = json.loads(done.stdout.strip().splitlines()[-1])
        print(f"[{number}/{len(options.methods)}, {time.time() - started:.0f} s] {line(result)}", flush=True)
        for kernel in result.get("kernels", [])[:20]:
            print(
                f"    {kernel['seconds'] * 1e3:8.2f} ms {kernel['calls']:5d} x {kernel['name'][:90]}",
                flush=True,
            )
        yield result


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
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
    from matplotlib.transforms import Bbox

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
    axes.set(xlabel="ms per step", ylabel="GB over the weights", title=title)
    axes.margins(x=0.2, y=0.08)  # room for labels
    if all(gigabytes > 0 for _, gigabytes, _ in points):  # on a CPU they are not measured
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.step([p[0] for p in frontier], [p[1] for p in frontier], where="post", color="grey", linewidth=0.8)
    for ms, gigabytes, method in points:
        axes.scatter(ms, gigabytes, color="tab:blue" if method.startswith("control") else "tab:orange")
    figure.tight_layout()
    figure.canvas.draw()
    taken = [
        Bbox.from_extents(x - 4, y - 4, x + 4, y + 4)
        for x, y in axes.transData.transform([p[:2] for p in points])
    ]
    for ms, gigabytes, method in points:
        label = axes.annotate(method, (ms, gigabytes), xytext=(0, 0), textcoords="offset points", fontsize=8)
        for down, side in itertools.product((4, -11, 14, -21), ("left", "right")):
            label.xyann = (6 if side == "left" else -6, down)
            label.set_horizontalalignment(side)
            place = label.get_window_extent()
            inside = axes.bbox.x0 < place.x0 and place.x1 < axes.bbox.x1
            if inside and not any(place.overlaps(other) for other in taken):
                break
        taken.append(label.get_window_extent())
    figure.savefig(path, dpi=150)


def vision_tokens(shape: str) -> int:
    """How many tokens a ViT makes of an image: its patches and the class token."""
    import timm

    with torch.device("meta"):
        return timm.create_model(VISION_SHAPES[shape]).pos_embed.shape[1]


def with_defaults(options: Options) -> Options:
    """The options with what was left out as the shape has it.

    Raises:
        UserError: there is no such shape, or a ViT was to have another number of tokens than it has.
    """
    if options.shape not in SHAPES:
        raise UserError(f"unknown --shape {options.shape!r}: choose from {', '.join(SHAPES)}")
    tokens = 1024 if options.shape in LLAMA_SHAPES else 128
    if options.shape in VISION_SHAPES:
        tokens = vision_tokens(options.shape)
        if options.tokens not in (None, tokens):
            raise UserError(f"{options.shape} has {tokens} tokens, not {options.tokens}: leave --tokens out")
    with_unsloth = options.device == "cuda" and importlib.util.find_spec("unsloth")
    llama_methods = DEFAULT_METHODS + (UNSLOTH_METHODS if with_unsloth else [])
    methods = options.methods or (llama_methods if options.shape in LLAMA_SHAPES else OTHER_METHODS)
    if not options.methods and options.device == "cpu":
        methods = [method for method in methods if "graphs" not in method]
    return replace(options, methods=methods, tokens=tokens if options.tokens is None else options.tokens)


def check(options: Options) -> None:
    """Raise a `UserError` for what cannot be, before a minute is spent."""
    for name in ("batch", "tokens", "steps"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.device not in ("cuda", "cpu"):
        raise UserError(f"--device is cuda or cpu, got {options.device!r}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("no GPU here: --device cpu tries the script out")
    if options.limit and options.profile:
        raise UserError("--limit and --profile are two runs: leave one out")
    if options.limit and (options.device == "cpu" or options.shape not in LLAMA_SHAPES):
        raise UserError("--limit needs a GPU and a LLaMA shape")
    for method in options.methods:
        try:
            _, switches, _ = parse_method(method)
        except ValueError as error:
            raise UserError(str(error)) from None
        if switches & {"liger", "unsloth", "compile"} and options.shape not in LLAMA_SHAPES:
            raise UserError(
                f"method {method!r}: {options.shape} has no switches but checkpointing and graphs"
            )
        if "unsloth" in switches and not importlib.util.find_spec("unsloth"):
            raise UserError(
                f"method {method!r}: unsloth is not installed (pip install unsloth, in an environment of its own)"
            )
        if "graphs" in switches and options.device == "cpu":
            raise UserError(f"method {method!r}: CUDA graphs need a GPU")


def main() -> None:
    (options,) = parse_arguments(Options, description=__doc__)
    options = with_defaults(options)
    check(options)
    if options.worker:
        with contextlib.redirect_stdout(sys.stderr):
            result = (longest if options.limit else measure)(options, options.worker)
        print(json.dumps(result))
        return
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    rate = matmul_tflops() if options.device == "cuda" else None
    if rate:
        torch.cuda.empty_cache()
    dtype = torch.bfloat16 if options.shape in LLAMA_SHAPES else autocast_dtype(options)
    title = f"{options.shape}, {options.batch} x {options.tokens} tokens, {str(dtype)[6:]}, {device}"
    print(title + (f", bf16 matmul {rate:.0f} TFLOP/s" if rate else ""), flush=True)
    name = f"{options.shape}_{options.batch}x{options.tokens}"
    name += f"_limit{options.limit:g}" if options.limit else "_profile" if options.profile else ""
    path = Path(options.output) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "schema": 1,
        "device": device,
        "matmul_tflops": rate,
        "dtype": str(dtype)[6:],
        "versions": package_versions(),
        "git": git_state(),
        "created": utc_now(),
        "weights": "random",
        "options": {key: value for key, value in asdict(options).items() if key not in ("output", "worker")},
        "results": (results := []),
    }
    unfinished = path.with_suffix(".json.partial")
    results += finished_before(unfinished, record)
    for result in run_all(options, {result["method"] for result in results}):
        results.append(result)
        write_json_atomic(unfinished, record)
    results.sort(key=lambda result: options.methods.index(result["method"]))
    write_json_atomic(unfinished, record)
    unfinished.replace(path)
    print(ratios(results))
    if not options.limit and not options.profile:
        draw(results, title, path.with_suffix(".png"))
    print(f"record in {path}")
    if all("error" in result for result in results):
        raise UserError("no method could be measured")


if __name__ == "__main__":
    run_main(main)
