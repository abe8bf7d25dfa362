"""Our elementwise kernels against torch's and Liger's: forward and backward of each, at LLaMA-3-8B's and ViT-B's widths.

    python -m scripts.bench_kernels                                             # needs a GPU and liger-kernel
    python -m scripts.bench_kernels --device cpu --tokens 64                    # to try it out, against torch alone

Each row is one operation with a frozen weight, forward and then the gradient of its input, median of --repeats; memory
is the peak over the inputs. Ratios below 1: ours is faster, or needs less. A Triton kernel of ours earns its place in
peft_control/memory/kernels.py only here.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter
from pathlib import Path

from transformers.hf_argparser import HfArg

from control_experiments.errors import run_main
from control_experiments.paths import RESULTS
from control_experiments.training.arguments import parse_arguments


@dataclass
class Options:
    tokens: int = HfArg(default=4096, help="Rows of every input.")
    vocabulary: int = HfArg(default=128256, help="Classes of the loss.")
    repeats: int = HfArg(default=20, help="Timed runs of each.")
    device: str = HfArg(default="cuda", help="cuda, or cpu to try the script out.")
    output: str = HfArg(default=str(RESULTS / "kernels" / "kernels.json"), help="Where the record goes.")


Step = Callable[[], object]  # one forward and backward


def operations(options: Options) -> dict[str, Iterator[tuple[str, Step]]]:
    """Each operation: whose, and a step, of ours, torch's and Liger's; Liger, which needs a GPU, is imported for the last alone."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    from peft_control.memory import kernels
    from peft_control.memory.loss import LinearCrossEntropy

    tokens, half = options.tokens, {"device": options.device, "dtype": torch.bfloat16}

    def by_autograd(function: Callable, *inputs: torch.Tensor) -> Step:
        """A step through autograd, as a peer's users run it."""
        inputs = [x.clone().requires_grad_() for x in inputs]

        def step() -> None:
            output = function(*inputs)
            torch.autograd.grad(output, inputs, torch.ones_like(output))

        return step

    def rms_norm():
        x, dy, weight = *(torch.randn(tokens, 4096, **half) for _ in range(2)), torch.ones(4096, **half)

        def ours() -> None:
            _, rstd = kernels.rms_norm(x, weight, 1e-5)
            kernels.rms_norm_backward(dy, x, weight, rstd)

        yield "ours", ours
        yield "torch", by_autograd(lambda x: F.rms_norm(x, (4096,), weight), x)
        from liger_kernel.transformers import LigerRMSNorm

        yield "liger", by_autograd(LigerRMSNorm(4096, eps=1e-5).to(**half).requires_grad_(False), x)

    def swiglu():
        gate, up, dact = (torch.randn(tokens, 14336, **half) for _ in range(3))
        yield "ours", lambda: (kernels.swiglu(gate, up), kernels.swiglu_backward_(gate, up, dact))
        yield "torch", by_autograd(lambda a, b: F.silu(a) * b, gate, up)
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        yield "liger", by_autograd(LigerSiLUMulFunction.apply, gate, up)

    def rope():
        query, key = (torch.randn(1, tokens, heads, 128, **half) for heads in (32, 8))
        angle = torch.rand(1, tokens, 64, device=options.device).repeat(1, 1, 2)
        cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()

        def through(function: Callable) -> Step:
            def both(q, k):
                q, k = function(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
                return torch.cat((q.flatten(), k.flatten()))

            return by_autograd(both, query, key)

        yield "ours", lambda: [kernels.rope(query, key, cos, sin, backward=backward) for backward in (False, True)]
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        yield "torch", through(apply_rotary_pos_emb)
        from liger_kernel.transformers.rope import liger_rotary_pos_emb

        yield "liger", through(liger_rotary_pos_emb)

    def layer_norm():
        x, dy = (torch.randn(tokens, 768, device=options.device) for _ in range(2))
        norm = nn.LayerNorm(768, device=options.device).requires_grad_(False)

        def ours() -> None:  # as under float16 autocast: the normal goes to a half-precision linear layer
            kernels.layer_norm(x, norm, torch.float16)
            kernels.layer_norm_backward(dy, x, norm, residual=dy)

        yield "ours", ours
        yield "torch", by_autograd(lambda x: norm(x).half() + x, x)
        from liger_kernel.transformers import LigerLayerNorm

        other = LigerLayerNorm(768, bias=True).to(options.device).requires_grad_(False)
        yield "liger", by_autograd(lambda x: other(x).half() + x, x)

    def linear_cross_entropy():
        hidden = torch.randn(tokens, 4096, **half)
        head = nn.Linear(4096, options.vocabulary, bias=False, **half).requires_grad_(False)
        labels = torch.randint(options.vocabulary, (tokens,), device=options.device)
        yield "ours", by_autograd(lambda hidden: LinearCrossEntropy.apply(hidden, labels, head, 512, None), hidden)
        yield "torch", by_autograd(lambda h: F.cross_entropy(head(h).float(), labels, reduction="sum"), hidden)
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        yield "liger", by_autograd(lambda hidden: loss(head.weight, hidden, labels), hidden)

    return {
        "RMSNorm, width 4096": rms_norm(),
        "SwiGLU, width 14336": swiglu(),
        "RoPE, 32 + 8 heads of 128": rope(),
        "LayerNorm to half, width 768": layer_norm(),
        "linear + cross entropy": linear_cross_entropy(),
    }


def main() -> None:
    (options,) = parse_arguments(Options, description=__doc__)
    import torch  # not before the options are known to be right

    from control_experiments.training import benchmarking
    from control_experiments.training.device import select_device

    options.device = select_device(options.device).type
    cuda, wait = options.device == "cuda", torch.get_device_module(options.device).synchronize
    compared, found = operations(options), benchmarking.machine(options.device)
    print(f"{options.tokens} tokens, {found['device']}; forward and backward")
    campaign = benchmarking.Campaign(Path(options.output), options, itemgetter("operation"), found)

    def measure(step: Step) -> dict:
        benchmarking.time_steps(step, 3, options.device)
        before = torch.cuda.memory_allocated() if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = benchmarking.time_steps(lambda: (step(), wait()), options.repeats, options.device)
        over = torch.cuda.max_memory_allocated() - before if cuda else 0
        return {"seconds": statistics.median(seconds), "over_inputs_bytes": over}

    def compare(names: list[str]) -> Iterator[dict]:
        for name in names:
            yield {"operation": name, **{who: measure(step) for who, step in islice(compared[name], 3 if cuda else 2)}}

    def say(row: dict) -> str:
        ours, told = row["ours"], [f"{row['operation']:30s}"]
        for who in [who for who in ("ours", "torch", "liger") if who in row]:
            milliseconds, size = row[who]["seconds"] * 1e3, row[who]["over_inputs_bytes"] / 1e6
            told.append(f"{who} {milliseconds:8.3f} ms {size:8.1f} MB (time x{ours['seconds'] / row[who]['seconds']:.2f})")
        return "   ".join(told)

    campaign.run([[name] for name in compared], compare, say)


if __name__ == "__main__":
    run_main(main)
