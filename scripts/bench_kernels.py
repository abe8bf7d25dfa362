#!/usr/bin/env python3
"""Our elementwise kernels against Liger's and torch's: forward and backward of each, at LLaMA-3-8B's and ViT-B's widths.

    python -m scripts.bench_kernels                      # needs a GPU and liger-kernel
    python -m scripts.bench_kernels --device cpu --tokens 64 --peers torch      # to try it out

Each row is one operation with a frozen weight, forward and then the gradient of its input, median of --repeats; memory
is the peak over the inputs. Ratios below 1: ours is faster, or needs less. A Triton kernel of ours earns its place in
peft_control/memory/kernels.py only here.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers.hf_argparser import HfArg

from control_experiments.errors import UserError, run_main
from control_experiments.paths import RESULTS
from control_experiments.training.arguments import check_choices, parse_arguments
from control_experiments.training.benchmarking import Campaign, choose_device, machine, synchronize, time_steps
from peft_control.memory import kernels
from peft_control.memory.loss import LinearCrossEntropy

PEERS = ("liger", "torch")


@dataclass
class Options:
    tokens: int = HfArg(default=4096, help="Rows of every input.")
    vocabulary: int = HfArg(default=128256, help="Classes of the loss.")
    peers: list[str] = HfArg(default_factory=lambda: [*PEERS], help="Whom to compare with: liger, torch.")
    repeats: int = HfArg(default=20, help="Timed runs of each.")
    device: str = HfArg(default="cuda", help="cuda, or cpu to try the script out.")
    output: str = HfArg(default=str(RESULTS / "kernels" / "kernels.json"), help="Where the record goes.")


Step = Callable[[], None]  # one forward and backward
Kernels = tuple[Step, Callable[[], Step], Callable[[], Step]]  # ours, and what makes Liger's and torch's


def by_autograd(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Step:
    """A peer's step, through autograd as its users run it."""
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    tracked = [x for x in inputs if x.requires_grad]

    def step() -> None:
        output = function(*inputs)
        torch.autograd.grad(output, tracked, torch.ones_like(output))

    return step


def rms_norm(tokens: int, device: str) -> Kernels:
    x, dy = (torch.randn(tokens, 4096, device=device, dtype=torch.bfloat16) for _ in range(2))
    weight = torch.ones(4096, device=device, dtype=torch.bfloat16)

    def ours() -> None:
        _, rstd = kernels.rms_norm(x, weight, 1e-5)
        kernels.rms_norm_backward(dy, x, weight, rstd)

    def liger() -> Step:
        from liger_kernel.transformers import LigerRMSNorm

        norm = LigerRMSNorm(4096, eps=1e-5).to(device, torch.bfloat16).requires_grad_(False)
        return by_autograd(norm, x)

    return ours, liger, lambda: by_autograd(lambda x: F.rms_norm(x, (4096,), weight), x)


def swiglu(tokens: int, device: str) -> Kernels:
    gate, up, dact = (torch.randn(tokens, 14336, device=device, dtype=torch.bfloat16) for _ in range(3))

    def ours() -> None:
        kernels.swiglu(gate, up)
        kernels.swiglu_backward_(gate, up, dact)

    def liger() -> Step:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return by_autograd(LigerSiLUMulFunction.apply, gate, up)

    return ours, liger, lambda: by_autograd(lambda a, b: F.silu(a) * b, gate, up)


def layer_norm(tokens: int, device: str) -> Kernels:
    x, dy = (torch.randn(tokens, 768, device=device) for _ in range(2))
    norm = nn.LayerNorm(768, device=device).requires_grad_(False)

    def ours() -> None:  # as under float16 autocast: the normal goes to a half-precision linear layer
        kernels.layer_norm(x, norm, torch.float16)
        kernels.layer_norm_backward(dy, x, norm, residual=dy)

    def liger() -> Step:
        from liger_kernel.transformers import LigerLayerNorm

        other = LigerLayerNorm(768, bias=True).to(device).requires_grad_(False)
        return by_autograd(lambda x: other(x).half() + x, x)

    return ours, liger, lambda: by_autograd(lambda x: norm(x).half() + x, x)


def rope(tokens: int, device: str) -> Kernels:
    query = torch.randn(1, tokens, 32, 128, device=device, dtype=torch.bfloat16)
    key = torch.randn(1, tokens, 8, 128, device=device, dtype=torch.bfloat16)
    angle = torch.rand(1, tokens, 64, device=device).repeat(1, 1, 2)
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()

    def ours() -> None:
        kernels.rope(query, key, cos, sin)
        kernels.rope(query, key, cos, sin, backward=True)

    def through(function) -> Step:
        def both(q, k):
            q, k = function(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
            return torch.cat((q.flatten(), k.flatten()))

        return by_autograd(both, query, key)

    def liger() -> Step:
        from liger_kernel.transformers.rope import liger_rotary_pos_emb

        return through(liger_rotary_pos_emb)

    def plain() -> Step:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        return through(apply_rotary_pos_emb)

    return ours, liger, plain


def linear_cross_entropy(tokens: int, device: str, vocabulary: int) -> Kernels:
    hidden = torch.randn(tokens, 4096, device=device, dtype=torch.bfloat16)
    head = nn.Linear(4096, vocabulary, bias=False, device=device, dtype=torch.bfloat16).requires_grad_(False)
    labels = torch.randint(vocabulary, (tokens,), device=device)

    def liger() -> Step:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        return by_autograd(lambda hidden: loss(head.weight, hidden, labels), hidden)

    ours = by_autograd(lambda hidden: LinearCrossEntropy.apply(hidden, labels, head, 512, None), hidden)
    return (ours, liger, lambda: by_autograd(lambda h: F.cross_entropy(head(h).float(), labels, reduction="sum"), hidden))


def measure(step: Step, options: Options) -> dict:
    cuda = options.device == "cuda"
    time_steps(step, 3, options.device)
    if cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()

    def alone() -> None:
        step()
        synchronize(options.device)

    seconds = time_steps(alone, options.repeats, options.device)
    over = torch.cuda.max_memory_allocated() - before if cuda else 0
    return {"seconds": statistics.median(seconds), "over_inputs_bytes": over}


def main() -> None:
    (options,) = parse_arguments(Options, description=__doc__)
    check_choices(options, peers=PEERS)
    options.device = choose_device(options.device)
    if options.device == "cpu" and "liger" in options.peers:
        raise UserError("liger's kernels need a GPU: --peers torch")
    operations: dict[str, Kernels] = {
        "RMSNorm, width 4096": rms_norm(options.tokens, options.device),
        "SwiGLU, width 14336": swiglu(options.tokens, options.device),
        "RoPE, 32 + 8 heads of 128": rope(options.tokens, options.device),
        "LayerNorm to half, width 768": layer_norm(options.tokens, options.device),
        "linear + cross entropy": linear_cross_entropy(options.tokens, options.device, options.vocabulary),
    }
    found = machine(options.device)
    print(f"{options.tokens} tokens, {found['device']}; forward and backward")
    campaign = Campaign(Path(options.output), options, itemgetter("operation"), found)

    def compare(name: str) -> dict:
        ours, *makers = operations[name]
        row = {"operation": name, "ours": measure(ours, options)}
        return row | {peer: measure(make(), options) for peer, make in zip(PEERS, makers) if peer in options.peers}

    def say(row: dict) -> str:
        times = {peer: row["ours"]["seconds"] / row[peer]["seconds"] for peer in PEERS if peer in row}
        told = [f"{peer} {shown(row[peer])} (time x{ratio:.2f})" for peer, ratio in times.items()]
        return "   ".join([f"{row['operation']:30s} ours {shown(row['ours'])}", *told])

    campaign.run(list(operations), compare, say)
    campaign.finish(list(operations))


def shown(measured: dict) -> str:
    return f"{measured['seconds'] * 1e3:8.3f} ms {measured['over_inputs_bytes'] / 1e6:8.1f} MB"


if __name__ == "__main__":
    run_main(main)
