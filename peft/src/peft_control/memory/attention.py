"""The attention block of SwiGLU decoders, from its input state to its output state, control included."""

from __future__ import annotations

import sys
from functools import partial

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import kernels
from .control import AddControl
from .linear import compute_dtype, is_frozen_linear
from .mlp import tokens


class RmsNorm(torch.autograd.Function):
    """RMSNorm with a frozen weight: keeps the state, which is kept anyway, and one number per token."""

    @staticmethod
    def forward(ctx, state, norm):
        normal, rstd = kernels.rms_norm(tokens(state), norm.weight, norm.variance_epsilon)
        ctx.norm = norm
        ctx.save_for_backward(state, rstd)
        return normal.view(state.shape)

    @staticmethod
    def backward(ctx, dy):
        state, rstd = ctx.saved_tensors
        dstate = kernels.rms_norm_backward(tokens(dy), tokens(state), ctx.norm.weight, rstd)
        return dstate.view(state.shape), None


class Rope(torch.autograd.Function):
    """Rotary embedding of ``(batch, tokens, heads, head_dim)``: keeps only the tables."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return kernels.rope(x, cos, sin)

    @staticmethod
    def backward(ctx, dy):
        return kernels.rope(dy, *ctx.saved_tensors, backward=True), None, None


def decoder_attention(layer, hidden_states, *arguments, recompute=None, **named):
    """``state + self_attn(input_layernorm(state)) + control`` of LLaMA, Mistral, Qwen2 and Qwen3, without a cache.

    What ``recompute`` (torch's ``checkpoint``) is given runs once more in the backward. The output projection is not, where
    it keeps nothing that would have to be computed.
    """
    project = layer.self_attn.o_proj
    if recompute and not (is_frozen_linear(project) and project.weight.dtype == compute_dtype(hidden_states)):
        return recompute(decoder_attention, layer, hidden_states, *arguments, **named)
    mix = partial(recompute, _mixed_values) if recompute else _mixed_values
    change = project(mix(layer, hidden_states, *arguments, **named))
    return AddControl.add(hidden_states, change, getattr(layer, "attention_control", None))


def _mixed_values(layer, hidden_states, attention_mask=None, position_embeddings=None, **named):
    """What the output projection takes: ``(batch, tokens, heads * head_dim)``."""
    attention = layer.self_attn
    normal = RmsNorm.apply(hidden_states, layer.input_layernorm)
    shape = (*normal.shape[:-1], -1, attention.head_dim)
    query, key, value = (
        projection(normal).view(shape)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    cos, sin = position_embeddings
    query, key = Rope.apply(query, cos, sin), Rope.apply(key, cos, sin)

    for unused in ("past_key_values", "use_cache", "position_ids"):
        named.pop(unused, None)
    window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
    eager = sys.modules[type(attention).__module__].eager_attention_forward
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager)
    mixed, _ = interface(
        attention,
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attention_mask,
        dropout=attention.attention_dropout if attention.training else 0.0,
        scaling=attention.scaling,
        sliding_window=window,
        **named,
    )
    return mixed.reshape(*normal.shape[:-1], -1)
