"""Frozen MLP blocks with hand-written backward passes.

Each class computes one frozen block, residual sum included, on ``(tokens, width)`` tensors. ``forward`` returns the
block's output with its control, what its ``keep`` asks it to keep, and what the control's backward needs;
``backward`` takes the former, recomputes what is missing, and returns the state's gradient, the control's part
excluded; both write into ``out`` if given. Frozen weights need no gradients, so nothing else is ever kept. ``keep`` comes from the class's ``KEEP``:
how much each memory mode keeps. Where that is nothing, tokens are worked in chunks whose intermediate tensor has about
``CHUNK_ELEMENTS`` elements (larger chunks are no faster on an H100, smaller ones are launch-bound) by the block that
``for_chunks`` returns, whose weights are cast once for all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import GELUActivation, GELUTanh

from ..fp8 import FORMATS, Fp8Linear
from . import kernels
from .control import add_control, control_hidden
from .linear import cast_once, compute_dtype, input_gradient, is_frozen_linear, outputs


class GatedMlp:
    """``state + down(silu(gate(n)) * up(n))`` with ``n = RMSNorm(state)``: LLaMA, Mistral, Qwen.

    ``keep``: 2 keeps gate, up and the norm's factors (no matmul is recomputed), 1 keeps gate, 0 nothing.
    """

    KEEP = {"fast": 2, "balanced": 1, "lean": 0}
    CHUNK_ELEMENTS = 2048 * 14336  # tokens of LLaMA-3-8B; 57 MB in bfloat16

    def __init__(self, norm: nn.Module, mlp: nn.Module):
        self.norm, self.mlp, self.stacked = norm, mlp, None
        _check_frozen([norm], [mlp.gate_proj, mlp.up_proj, mlp.down_proj])

    @property
    def width(self) -> int:
        return self.mlp.gate_proj.out_features

    def draws(self) -> bool:
        return False

    def for_chunks(self, state):
        return self  # such models hold their weights in the dtype in which they work

    def stack(self) -> None:
        """Store the weights of gate and up one behind the other, so that each pair of matmuls is one where gate and up are
        both kept. They stay two parameters with storages of their own, which is how they are saved, loaded and moved."""
        weights = [linear.weight for linear in self._plain_linears()]
        if len({(weight.shape, weight.dtype) for weight in weights}) == 1 and weights[0].numel():
            self.stacked = torch.cat([weight.data for weight in weights])
            for weight, half in zip(weights, self.stacked.chunk(2)):
                weight.data = torch.from_dlpack(half)

    def _stacked(self) -> torch.Tensor | None:
        """The weights of gate and up as one, while they are where ``stack`` has put them."""
        if self.stacked is not None:
            ends = [weight.data_ptr() for weight in self.stacked.chunk(2)]
            if [linear.weight.data_ptr() for linear in self._plain_linears()] == ends:
                return self.stacked
            self.stacked = None
        return None

    def _plain_linears(self) -> list[nn.Linear]:
        """gate_proj and up_proj, where they do nothing but multiply by their weights."""
        linears = [self.mlp.gate_proj, self.mlp.up_proj]
        plain = all(
            type(linear) is nn.Linear
            and type(linear.weight.data) is torch.Tensor
            and linear.bias is None
            and not (linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear))
            for linear in linears
        )
        return linears if plain else []

    def forward(self, state, keep, control=None, out=None):
        normal, rstd = self._normalise(state)
        # what is kept alone must not be a part of something larger, and chunks are no faster
        weight = self._stacked() if keep == 2 else None
        if weight is None:
            gate, up = outputs(normal, self.mlp.gate_proj, self.mlp.up_proj)
        else:
            gate, up = F.linear(normal, weight).chunk(2, dim=-1)
        del normal
        down = self.mlp.down_proj
        if isinstance(down, Fp8Linear):
            change = down.of_rows(*kernels.swiglu_rows(gate, up), gate.dtype)
        else:
            change = down(kernels.swiglu(gate, up))
        hidden = control_hidden(control, state)
        kept = (gate, up, rstd) if keep == 2 else (gate,)[:keep]
        return add_control(control, hidden, change, state, out), kept, hidden

    def backward(self, state, kept, dy, out=None):
        mlp = self.mlp
        if len(kept) == 3:
            gate, up, rstd = kept
        else:
            normal, rstd = self._normalise(state)
            if kept:
                gate, up = kept[0], mlp.up_proj(normal)
            else:
                gate, up = outputs(normal, mlp.gate_proj, mlp.up_proj)
            del normal
        dnormal = self._normals_gradient(gate, up, dy.to(gate.dtype))
        return kernels.rms_norm_backward(dnormal, state, self.norm.weight, rstd, residual=dy, out=out)

    def _normals_gradient(self, gate, up, dchange):
        """The gradient of the normalised state; gate and up are overwritten."""
        mlp = self.mlp
        linears, dact = (mlp.gate_proj, mlp.up_proj), input_gradient(dchange, mlp.down_proj)
        if all(isinstance(linear, Fp8Linear) for linear in linears):
            dtype, scales = FORMATS[mlp.gate_proj.gradients], [linear.weight_scale.float() for linear in linears]
            rows = kernels.swiglu_backward_rows(gate, up, dact, dtype, *scales)
            dnormal, more = (linear.gradient_of_rows(*pair, dact.dtype) for linear, pair in zip(linears, rows))
            return dnormal.add_(more)
        dgate, dup = kernels.swiglu_backward_(gate, up, dact)
        del dact
        both = _as_one(dgate, dup)
        weight = None if both is None else self._stacked()
        if weight is not None:
            return both @ weight.to(both.dtype)
        return input_gradient(dup, mlp.up_proj, add_to=input_gradient(dgate, mlp.gate_proj))

    def _normalise(self, state):
        return kernels.rms_norm(state, self.norm.weight, self.norm.variance_epsilon)


class PreNormMlp:
    """``state + scale * last(... activation(first(n)))`` with ``n = LayerNorm(state)``: ViT, DINOv2.

    ``scale`` is LayerScale's vector or None; between ``first`` and ``last`` there may be more linear layers.
    ``keep``: 1 keeps the pre-activation, 0 nothing. ``dropouts`` are the modules that must not draw: while one
    does, the layer runs its own forward (see ``layers.py``).
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
        self.norm, self.activation, self.scale, self.dropouts = norm, activation, scale, dropouts
        self.first, *self.rest = linears
        _check_frozen([norm, activation], linears, [] if scale is None else [scale])

    @property
    def width(self) -> int:
        return self.first.out_features

    def draws(self) -> bool:
        return any(draws(module) for module in self.dropouts)

    def for_chunks(self, state):
        twin = copy.copy(self)
        twin.first, *twin.rest = (cast_once(x, compute_dtype(state)) for x in (self.first, *self.rest))
        return twin

    def forward(self, state, keep, control=None, out=None):
        inner = self.first(self._normalise(state))
        change = self.activation(inner)
        for linear in self.rest:
            change = linear(change)
        if self.scale is not None:
            change = change * self.scale
        hidden = control_hidden(control, state)
        return add_control(control, hidden, change, state, out), (inner,)[:keep], hidden

    def backward(self, state, kept, dy, out=None):
        inner = kept[0] if kept else self.first(self._normalise(state))
        dchange = (dy if self.scale is None else dy * self.scale).to(inner.dtype)
        for linear in reversed(self.rest):
            dchange = input_gradient(dchange, linear)
        dinner = _activation_backward(self.activation, inner, dchange)
        del inner, dchange
        dnormal = input_gradient(dinner, self.first)
        return kernels.layer_norm_backward(dnormal, state, self.norm, residual=dy, out=out)

    def _normalise(self, state):
        return kernels.layer_norm(state, self.norm, compute_dtype(state))


class PostNormMlp:
    """``LayerNorm(dropout(second(activation(first(state)))) + state)``: BERT, RoBERTa, MPNet, ELECTRA.

    ``keep``: 2 keeps the pre-activation, what the second layer adds and its dropout mask, 1 all but the
    pre-activation, 0 nothing: ``backward`` then draws the mask anew, as ``forward`` drew it.
    """

    KEEP = {"fast": 2, "balanced": 1, "lean": 0}
    CHUNK_ELEMENTS = 8192 * 3072  # tokens of RoBERTa-base

    def __init__(self, first: nn.Linear, activation: nn.Module, second: nn.Linear, dropout, norm: nn.LayerNorm):
        self.first, self.activation, self.second = first, activation, second
        self.dropout, self.norm = dropout, norm
        _check_frozen([norm], [first, second])

    @property
    def width(self) -> int:
        return self.first.out_features

    def draws(self) -> bool:
        return False  # it draws its mask itself

    def for_chunks(self, state):
        twin = copy.copy(self)
        twin.first, twin.second = (cast_once(x, compute_dtype(state)) for x in (self.first, self.second))
        return twin

    def _change(self, inner):
        """What is added to the state and, while dropout draws, its mask."""
        change = self.second(self.activation(inner))
        return torch.native_dropout(change, self.dropout.p, True) if draws(self.dropout) else (change,)

    def forward(self, state, keep, control=None, out=None):
        inner = self.first(state)
        change = self._change(inner)
        kept = (*change, inner) if keep == 2 else tuple(change) if keep == 1 else ()
        total = change[0] + state
        hidden = control_hidden(control, state)
        normal = kernels.layer_norm(total, self.norm, total.dtype)
        return add_control(control, hidden, normal, out=out), kept, hidden

    def backward(self, state, kept, dy, out=None):
        kept, masked = list(kept), draws(self.dropout)
        if kept:
            change = [kept.pop(0) for _ in range(1 + masked)]
            inner = kept[0] if kept else self.first(state)
        else:
            inner = self.first(state)
            change = self._change(inner)
        dsum = kernels.layer_norm_backward(dy, change[0] + state, self.norm, out=out)
        dchange = dsum.to(change[0].dtype)
        if masked:
            dchange = torch.ops.aten.native_dropout_backward(dchange, change[1], 1 / (1 - self.dropout.p))
        del change
        dinner = _activation_backward(self.activation, inner, input_gradient(dchange, self.second))
        return dsum.add_(input_gradient(dinner, self.first))


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
    """Where ``module`` has the probability of its dropout: at ``p`` or a name with "drop" in it, as the version has it."""
    state = vars(module)
    return [(state, name) for name, value in state.items() if isinstance(value, float) and (name == "p" or "drop" in name)]


def _activation_backward(activation, inner, dy):
    """Gradient of an elementwise activation's input."""
    if type(activation) in (GELUActivation, GELUTanh) or isinstance(activation, nn.GELU):
        tanh = type(activation) is GELUTanh or getattr(activation, "approximate", "none") == "tanh"
        return torch.ops.aten.gelu_backward(dy, inner, approximate="tanh" if tanh else "none")
    with torch.enable_grad():
        inner = inner.detach().requires_grad_()
        return torch.autograd.grad(activation(inner), inner, dy)[0]


def _check_frozen(modules, linears, parameters=()):
    trained = [p for module in modules for p in module.parameters()] + list(parameters)
    if not all(map(is_frozen_linear, linears)) or any(p.requires_grad for p in trained):
        raise ValueError(
            "memory modes need a frozen MLP; inside are trainable parameters, an adapter or a forward or hook of somebody else"
        )
