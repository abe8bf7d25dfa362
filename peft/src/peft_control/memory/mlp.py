"""Frozen MLP blocks with hand-written backward passes.

Each class computes ``output = block(state)`` of one frozen block, residual sum included and control excluded,
on ``(tokens, width)`` tensors. ``forward`` returns the output and the intermediates that its ``keep`` asks
for; ``backward`` takes those, recomputes what is missing, and returns the state's gradient. Frozen weights
need no gradients, so nothing else is ever kept.
"""

from __future__ import annotations

import torch
from torch import nn

from . import kernels
from .linear import input_gradient, is_frozen_linear


class GatedMlp:
    """``state + down(silu(gate(n)) * up(n))`` with ``n = RMSNorm(state)``: LLaMA, Mistral, Qwen.

    ``keep``: 2 keeps gate and up (no matmul is recomputed), 1 keeps gate, 0 nothing.
    """

    def __init__(self, norm: nn.Module, mlp: nn.Module):
        self.norm, self.mlp = norm, mlp

    def check(self) -> None:
        if not all(map(is_frozen_linear, (self.mlp.gate_proj, self.mlp.up_proj, self.mlp.down_proj))):
            raise ValueError(
                "memory modes need a frozen MLP; it has trainable parameters or an adapter inside"
            )

    def _normalise(self, state):
        return kernels.rms_norm(state, self.norm.weight, self.norm.variance_epsilon)

    def forward(self, state, keep):
        normal, _ = self._normalise(state)
        gate, up = self.mlp.gate_proj(normal), self.mlp.up_proj(normal)
        del normal
        output = state + self.mlp.down_proj(kernels.swiglu(gate, up))
        return output, (gate, up)[:keep]

    def backward(self, state, kept, dy):
        mlp = self.mlp
        normal, rstd = self._normalise(state)
        gate = kept[0] if len(kept) > 0 else mlp.gate_proj(normal)
        up = kept[1] if len(kept) > 1 else mlp.up_proj(normal)
        del normal
        dact = input_gradient(dy.to(gate.dtype), mlp.down_proj)
        dgate, dup = kernels.swiglu_backward_(gate, up, dact)
        del dact
        dnormal = input_gradient(dgate, mlp.gate_proj)
        dnormal = input_gradient(dup, mlp.up_proj, add_to=dnormal)
        return kernels.rms_norm_backward(dnormal, state, self.norm.weight, rstd, residual=dy)


def tokens(x: torch.Tensor) -> torch.Tensor:
    """``x`` as ``(tokens, width)``."""
    return x.reshape(-1, x.shape[-1])
