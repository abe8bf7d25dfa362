"""Frozen MLP blocks with hand-written backward passes.

Each class computes one frozen block, residual sum included, on ``(tokens, width)`` tensors. Frozen weights need no
gradients, so a backward needs the block's input and at most some intermediate tensors. How many of them a memory mode keeps
says the class's ``KEEP``; ``backward`` recomputes the others. Where nothing is kept, tokens are worked in chunks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers.activations import GELUActivation, GELUTanh

from ..fp8 import Fp8Linear
from ..fp8_kernels import compute_dtype
from . import kernels
from .control import Active, add_control, control_hidden
from .linear import Joined, cast_once, input_gradient, is_frozen_linear, joint_format, joint_gradient, outputs_of_normal


class Mlp:
    """One frozen block.

    Attributes:
        KEEP: how much each memory mode keeps.
        CHUNK_ELEMENTS: of the intermediate tensor of a chunk. Larger chunks are no faster on an H100, smaller ones are
            launch-bound.
        norm, linears: its modules.
        width: of its intermediate tensor.
    """

    KEEP: dict[str, int]
    CHUNK_ELEMENTS: int

    def __init__(self, norm: Any, linears: Sequence[nn.Linear], others: Sequence[nn.Module] = (), parameters=()):
        trained = [*parameters, *(p for module in (norm, *others) for p in module.parameters())]
        if not all(map(is_frozen_linear, linears)) or any(p.requires_grad for p in trained):
            raise ValueError(
                "memory modes need a frozen MLP; inside are trainable parameters, an adapter or a forward or hook of "
                "somebody else"
            )
        self.norm, self.linears, self.width = norm, [*linears], linears[0].out_features

    def draws(self) -> bool:
        """Whether dropout inside draws numbers that ``backward`` could not draw again: then the layer runs its own forward."""
        return False

    def for_chunks(self, state: torch.Tensor) -> Mlp:
        """The same block with weights that are cast once for all chunks of ``state``."""
        twin = copy.copy(self)
        twin.linears = [cast_once(linear, compute_dtype(state)) for linear in self.linears]
        return twin

    def forward(
        self, state, keep, adapters: Sequence[Active] = (), out=None
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor], list[torch.Tensor]]:
        """The block's output with its control's ``adapters``, in ``out`` if given; what ``keep`` asks it to keep; and what the
        control's backward needs."""
        raise NotImplementedError

    def backward(self, state, kept, dy, out=None) -> torch.Tensor:
        """The state's gradient, the control's part excluded, for what ``forward`` has ``kept``; in ``out`` if given."""
        raise NotImplementedError


class GatedMlp(Mlp):
    """``state + down(silu(gate(n)) * up(n))`` with ``n = RMSNorm(state)``: LLaMA, Mistral, Qwen.

    ``keep``: 2 keeps gate, up and the norm's factors (no matmul is recomputed), 1 keeps gate, 0 nothing.
    """

    KEEP = {"fast": 2, "balanced": 1, "lean": 0}
    CHUNK_ELEMENTS = 2048 * 14336  # tokens of LLaMA-3-8B; 57 MB in bfloat16
    DENSE_FROM = 16  # chunks: weights of four bits are dequantized once for so many; 336 MiB, and then little beside the states

    def __init__(self, norm: nn.Module, mlp):
        super().__init__(norm, [mlp.gate_proj, mlp.up_proj, mlp.down_proj])
        self.joined = Joined(self.linears[:2])

    def for_chunks(self, state):
        # such models hold their weights in the dtype in which they work, or in four bits
        few = state.numel() // state.shape[-1] * self.width < self.DENSE_FROM * self.CHUNK_ELEMENTS
        if few:
            return self
        twin: Any = super().for_chunks(state)
        twin.joined = Joined(twin.linears[:2])
        return twin

    def forward(self, state, keep, adapters=(), out=None):
        *inner, down = self.linears
        # what is kept alone must not be a part of something larger, and chunks are no faster
        found, rstd = outputs_of_normal(state, self.norm, *(self.joined.now() if keep == 2 else inner))
        gate, up = found if len(found) == 2 else found[0].chunk(2, dim=-1)
        del found
        if isinstance(down, Fp8Linear):
            change = down.of_rows(*kernels.swiglu_rows(gate, up), gate.dtype)
        else:
            change = down(kernels.swiglu(gate, up))
        hidden = control_hidden(adapters, state)
        kept = (gate, up, rstd) if keep == 2 else (gate,)[:keep]
        return add_control(adapters, hidden, change, state, out), kept, hidden

    def backward(self, state, kept, dy, out=None):
        if len(kept) == 3:
            *inner, rstd = kept
        else:
            found, rstd = outputs_of_normal(state, self.norm, *self.linears[len(kept) : 2])
            inner = [*kept, *found]
            del found
        dnormal, scales = self._normals_gradient(inner, dy.to(inner[0].dtype))
        return kernels.rms_norm_backward(dnormal, state, self.norm.weight, rstd, dy, out, scales)

    def _normals_gradient(self, inner, dchange):
        """The gradient of the normalised state, and scales of its rows or None; gate and up, which leave the list ``inner``, are
        overwritten."""
        gate_proj, up_proj, down_proj = self.linears
        dact = input_gradient(dchange, down_proj)
        gate, up = inner
        inner.clear()
        joint = joint_format(self.linears[:2])
        if joint is not None:
            rows, scales = kernels.swiglu_backward_rows(gate, up, dact, *joint)
            del gate, up, dact  # the product needs as much memory
            return joint_gradient(rows, self.joined.now()), scales
        dgate, dup = kernels.swiglu_backward_(gate, up, dact)
        del dact
        both, joined = _as_one(dgate, dup), self.joined.now()
        if both is not None and len(joined) == 1:
            return input_gradient(both, joined[0]), None
        return input_gradient(dup, up_proj, add_to=input_gradient(dgate, gate_proj)), None


class PreNormMlp(Mlp):
    """``state + scale * last(... activation(first(n)))`` with ``n = LayerNorm(state)``: ViT, DINOv2.

    ``scale`` is LayerScale's vector or None; between ``first`` and ``last`` there may be more linear layers.
    ``keep``: 1 keeps the pre-activation, 0 nothing. ``dropouts`` are the modules that must not draw.
    """

    KEEP = {"fast": 1, "balanced": 0, "lean": 0}
    CHUNK_ELEMENTS = 4096 * 3072  # tokens of ViT-B

    def __init__(
        self,
        norm: nn.LayerNorm,
        linears: Sequence[nn.Linear],
        activation: nn.Module,
        scale: nn.Parameter | None = None,
        dropouts: Sequence[nn.Module] = (),
    ):
        super().__init__(norm, linears, [activation], [] if scale is None else [scale])
        self.activation, self.scale, self.dropouts = activation, scale, dropouts

    def draws(self) -> bool:
        return any(draws(module) for module in self.dropouts)

    def forward(self, state, keep, adapters=(), out=None):
        first, *rest = self.linears
        inner = first(self._normalise(state))
        change = self.activation(inner)
        for linear in rest:
            change = linear(change)
        if self.scale is not None:
            change = change * self.scale
        hidden = control_hidden(adapters, state)
        return add_control(adapters, hidden, change, state, out), (inner,)[:keep], hidden

    def backward(self, state, kept, dy, out=None):
        first, *rest = self.linears
        inner = kept[0] if kept else first(self._normalise(state))
        dchange = (dy if self.scale is None else dy * self.scale).to(inner.dtype)
        for linear in reversed(rest):
            dchange = input_gradient(dchange, linear)
        dinner = _activation_backward(self.activation, inner, dchange)
        del inner, dchange
        dnormal = input_gradient(dinner, first)
        return kernels.layer_norm_backward(dnormal, state, self.norm, residual=dy, out=out)

    def _normalise(self, state):
        return kernels.layer_norm(state, self.norm, compute_dtype(state))


class PostNormMlp(Mlp):
    """``LayerNorm(dropout(second(activation(first(state)))) + state)``: BERT, RoBERTa, MPNet, ELECTRA.

    ``keep``: 2 keeps the pre-activation, what the second layer adds and its dropout mask, 1 all but the
    pre-activation, 0 nothing: ``backward`` then draws the mask anew, as ``forward`` drew it.
    """

    KEEP = {"fast": 2, "balanced": 1, "lean": 0}
    CHUNK_ELEMENTS = 8192 * 3072  # tokens of RoBERTa-base

    def __init__(self, first: nn.Linear, activation: nn.Module, second: nn.Linear, dropout, norm: nn.LayerNorm):
        super().__init__(norm, [first, second])
        self.activation, self.dropout = activation, dropout

    def _change(self, inner) -> Sequence[torch.Tensor]:
        """What is added to the state and, while dropout draws, its mask."""
        change = self.linears[1](self.activation(inner))
        return torch.native_dropout(change, self.dropout.p, True) if draws(self.dropout) else (change,)

    def forward(self, state, keep, adapters=(), out=None):
        inner = self.linears[0](state)
        change = self._change(inner)
        kept = (*change, inner) if keep == 2 else tuple(change) if keep == 1 else ()
        total = change[0] + state
        hidden = control_hidden(adapters, state)
        normal = kernels.layer_norm(total, self.norm, total.dtype)
        return add_control(adapters, hidden, normal, out=out), kept, hidden

    def backward(self, state, kept, dy, out=None):
        (first, second), kept, masked = self.linears, list(kept), draws(self.dropout)
        if kept:
            change = [kept.pop(0) for _ in range(1 + masked)]
            inner = kept[0] if kept else first(state)
        else:
            inner = first(state)
            change = self._change(inner)
        dsum = kernels.layer_norm_backward(dy, change[0] + state, self.norm, out=out)
        dchange = dsum.to(change[0].dtype)
        if masked:
            dchange = torch.ops.aten.native_dropout_backward(dchange, change[1], 1 / (1 - self.dropout.p))
        del change
        dinner = _activation_backward(self.activation, inner, input_gradient(dchange, second))
        return dsum.add_(input_gradient(dinner, first))


def _as_one(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor | None:
    """``(tokens, 2 * width)`` of two that are halves of the same rows, else None."""
    width = left.shape[1]
    if left.stride() != (2 * width, 1) or right.data_ptr() != left.data_ptr() + width * left.element_size():
        return None
    return left.as_strided((len(left), 2 * width), (2 * width, 1))


def tokens(x: torch.Tensor) -> torch.Tensor:
    """``x`` as ``(tokens, width)``."""
    return x.reshape(-1, x.shape[-1])


def draws(module: nn.Module) -> bool:
    """Whether a dropout or drop-path module, or an attention that calls such a function, draws random numbers now."""
    return module.training and any(state[name] > 0.0 for state, name in probabilities(module))


def probabilities(module: nn.Module) -> list[tuple[dict, str]]:
    """Where ``module`` has the probability of its dropout, or the size of a router's noise, as the version has it: at ``p`` or
    a name with "drop" or "jitter" in it."""
    state = vars(module)
    known = [name for name in state if name == "p" or "drop" in name or "jitter" in name]
    return [(state, name) for name in known if isinstance(state[name], float) or isinstance(module, _DropoutNd)]


def _activation_backward(activation, inner, dy):
    """Gradient of an elementwise activation's input."""
    if type(activation) in (GELUActivation, GELUTanh) or isinstance(activation, nn.GELU):
        tanh = type(activation) is GELUTanh or getattr(activation, "approximate", "none") == "tanh"
        return torch.ops.aten.gelu_backward(dy, inner, approximate="tanh" if tanh else "none")
    with torch.enable_grad():
        inner = inner.detach().requires_grad_()
        return torch.autograd.grad(activation(inner), inner, dy)[0]
