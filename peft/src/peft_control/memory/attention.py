"""The attention block of SwiGLU decoders, from its input state to its output state, control included."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..fp8_kernels import compute_dtype
from . import kernels
from .control import AddControl, control_backward, control_hidden
from .exact import Parameters, is_as_written, kind_of
from .linear import Joined, input_gradient, is_frozen_linear, joint_format, joint_gradient, outputs_of_normal
from .mlp import tokens

#: With so many tokens attention's backward fills a GPU. Its kernels need several states of memory of their own.
_TOGETHER = 2048


class RmsNorm(torch.autograd.Function):
    """RMSNorm with a frozen weight, and its state handed on: keeps the state, which is kept anyway, and one number per
    token. What uses the state besides takes it from here, so that the backward adds up their gradients in one pass."""

    @staticmethod
    def forward(ctx, state, norm):
        normal, rstd = kernels.rms_norm(tokens(state), norm.weight, norm.variance_epsilon)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(state, rstd, norm.weight)
        return normal.view(state.shape), state

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dstate):
        if dy is None:
            return dstate, None
        state, rstd, weight = ctx.saved_tensors
        others = None if dstate is None else tokens(dstate)
        dstate = kernels.rms_norm_backward(tokens(dy), tokens(state), weight, rstd, residual=others)
        return dstate.view(state.shape), None


class Rope(torch.autograd.Function):
    """Rotary embedding of queries and keys ``(batch, tokens, heads, head_dim)``: keeps only the tables."""

    @staticmethod
    def forward(ctx, query, key, cos, sin):
        ctx.save_for_backward(cos, sin)
        return tuple(kernels.rope(query, key, cos, sin))

    @staticmethod
    @once_differentiable
    def backward(ctx, dquery, dkey):
        return *kernels.rope(dquery, dkey, *ctx.saved_tensors, backward=True), None, None


class Heads(torch.autograd.Function):
    """Queries, keys and values of a frozen attention, and its state handed on as :class:`RmsNorm` hands it on: keeps the state,
    one number per token, the tables, and what norms of queries and keys take."""

    @staticmethod
    def forward(ctx, state, block, cos, sin):
        heads, *kept = block.heads(state, cos, sin)
        ctx.block, ctx.parameters = block, Parameters([block.norm, *block.projections, *block.norms])
        ctx.set_materialize_grads(False)
        ctx.kept = len(kept)
        ctx.save_for_backward(state, cos, sin, *kept, *ctx.parameters.now())
        return *heads, state

    @staticmethod
    @once_differentiable
    def backward(ctx, dquery, dkey, dvalue, dstate):
        if dvalue is not None:
            state, cos, sin, *saved = ctx.saved_tensors
            kept, parameters = saved[: ctx.kept], saved[ctx.kept :]
            with ctx.parameters.put_back(parameters):
                dstate = ctx.block.through_projections(state, dstate, [dquery, dkey, dvalue], kept, cos, sin)
        return dstate, None, None, None


class NormPlan:
    """The frozen RMSNorm behind the last layer, which else keeps its state in float32."""

    @torch.compiler.disable
    def run(self, norm, own, state):
        """Replaces ``norm.forward``."""
        if not torch.is_grad_enabled() or norm.weight.requires_grad:
            return own(state)
        return RmsNorm.apply(state, norm)[0]


class DecoderAttention:
    """``state + self_attn(input_layernorm(state)) + control`` of LLaMA, Mistral, Qwen2 and Qwen3, without a cache.

    Attributes:
        norms: of queries and keys, of Qwen3's heads.
        frozen: whether these and the projections to queries, keys and values are.
    """

    def __init__(self, layer):
        self.layer, self.norm, self.attention = layer, layer.input_layernorm, layer.self_attn
        self.projections = [self.attention.q_proj, self.attention.k_proj, self.attention.v_proj]
        self.joined = Joined(self.projections)
        self.norms = [getattr(self.attention, name) for name in ("q_norm", "k_norm") if hasattr(self.attention, name)]
        alike = all(kind_of(x) is kind_of(self.norm) and is_as_written(x) for x in self.norms)
        trained = any(parameter.requires_grad for x in self.norms for parameter in x.parameters())
        self.frozen = alike and not trained and all(map(is_frozen_linear, self.projections))

    def __call__(self, state, *arguments, **named):
        """The block's output state. ``keep`` is called with what spares :meth:`gradients` the projections: with queries, keys
        and values, or with nothing."""
        mixed, state = self._mixed_values(state, *arguments, **named)
        return AddControl.add(state, self.attention.o_proj(mixed), getattr(self.layer, "attention_control", None))

    def gradients(self, state, dy, inputs, adapters, *arguments, kept=(), **named):
        """The gradients of the ``inputs`` for the output's gradient ``dy``, without the output.

        Returns ``(gradients, control_gradients)``: of the ``inputs``, among them ``state`` if that needs one, and of the
        block's control's ``adapters``. ``dy`` is overwritten: long sequences need its memory. ``kept`` is what ``keep`` got.
        """
        flat, dflat = tokens(state), tokens(dy)
        with torch.no_grad():
            dmixed: Any = input_gradient(dflat.to(compute_dtype(state)), self.attention.o_proj) if inputs else None
            dstate = dflat if state.requires_grad else None
            _, of_control = control_backward(adapters, flat, control_hidden(adapters, flat), dflat, dstate)
        if not inputs:
            return [], of_control
        if state.requires_grad and self.frozen:
            tables = named.pop("position_embeddings")
            heads, *more = (kept,) if kept else self.heads(state, *tables)
            gradients = self._attend_gradients(heads, dmixed, *arguments, **named)
            del dmixed
            dstate = self.through_projections(state, dy, gradients, more, *tables, in_place=True)
            return [dstate, *[None] * (len(inputs) - 1)], of_control  # the others take no part
        mixed, through = self._mixed_values(state, *arguments, **named)
        if not mixed.requires_grad:  # the inputs are an inactive adapter's
            return [None] * len(inputs), of_control
        outputs, gradients = [mixed], [dmixed.view(mixed.shape)]
        del dmixed
        if state.requires_grad:
            outputs.append(through)
            gradients.append(dy)
        return list(torch.autograd.grad(outputs, inputs, gradients, allow_unused=True)), of_control

    @torch.no_grad()
    def heads(self, state, cos, sin):
        """Queries, keys and values ``(batch, tokens, heads, head_dim)`` of a frozen attention; its norm's factors; queries and
        keys before their norms, if there are."""
        projected, rstd = outputs_of_normal(tokens(state), self.norm, *self.joined.now())
        if len(projected) == 1:
            projected = projected[0].split([linear.out_features for linear in self.projections], dim=-1)
        query, key, value = (x.view(*state.shape[:-1], -1, self.attention.head_dim) for x in projected)
        del projected
        before = [query, key] if self.norms else []
        if before:
            query, key = (norm_of_heads(x, norm)[0].view_as(x) for x, norm in zip(before, self.norms))
        return [*kernels.rope(query, key, cos, sin, in_place=True), value], rstd, *before

    def _attend_gradients(self, heads, dmixed, attention_mask=None, **named):
        """The gradients of queries, keys and values, which leave the list ``heads``. Where a few sequences have tokens enough,
        they take the place of queries, keys and values, sequences by sequences."""
        batch, length = heads[0].shape[:2]
        few = max(1, _TOGETHER // length)
        if few < batch and (attention_mask is None or isinstance(attention_mask, torch.Tensor)):
            dmixed = dmixed.view(batch, length, -1)
            for rows in (slice(start, start + few) for start in range(0, batch, few)):
                mask, *more = (_rows(x, rows, batch) for x in (attention_mask, *named.values()))
                part = [x[rows].detach() for x in heads]
                for x, gradient in zip(heads, self._attend_gradients(part, dmixed[rows], mask, **dict(zip(named, more)))):
                    x[rows] = gradient
            return heads
        query, key, value = leaves = [tensor.requires_grad_() for tensor in heads]
        heads.clear()
        mixed = attend(self.attention, query, key, value, attention_mask, **named)
        return list(torch.autograd.grad(mixed, leaves, dmixed.view(mixed.shape)))

    @torch.no_grad()
    def through_projections(self, state, dy, gradients, kept, cos, sin, in_place=False):
        """The state's gradient for those of queries, keys and values of a frozen attention, which leave the list ``gradients``;
        added up with ``dy`` if that is given, in its memory if ``in_place``. ``kept`` is what :meth:`heads` gives besides, or
        nothing where there are no norms of heads."""
        norm, dnormal, scales, joint = self.norm, None, None, joint_format(self.projections)
        rstd, before = (kept[0], kept[1:]) if kept else (None, [])
        query, key, value = gradients
        gradients.clear()
        if joint is not None and not before:
            rows, scales = kernels.rope_backward_rows(query, key, value, cos, sin, *joint)
            del query, key, value
            dnormal = joint_gradient(rows, self.joined.now())
            del rows
        else:
            gradients += [*kernels.rope(query, key, cos, sin, backward=True), value]
            del query, key, value
            for place, (x, of_heads) in enumerate(zip(before, self.norms)):
                factors = norm_of_heads(x, of_heads)[1]
                gradients[place] = kernels.rms_norm_backward(tokens(gradients[place]), tokens(x), of_heads.weight, factors)
            for linear in self.projections:
                gradient = gradients.pop(0).reshape(-1, linear.out_features)
                dnormal = input_gradient(gradient, linear, add_to=dnormal)
        flat, dflat = tokens(state), None if dy is None else tokens(dy)
        if rstd is None:
            _, rstd = kernels.rms_norm(flat, norm.weight, norm.variance_epsilon)
        out = dflat if in_place else None
        return kernels.rms_norm_backward(dnormal, flat, norm.weight, rstd, dflat, out, scales).view(state.shape)

    def _mixed_values(self, state, attention_mask=None, *, position_embeddings, keep=None, **named):
        """What the output projection takes, ``(batch, tokens, heads * head_dim)``, and the state for what is added to it."""
        attention = self.attention
        if self.frozen:
            query, key, value, state = Heads.apply(state, self, *position_embeddings)
        else:
            normal, state = RmsNorm.apply(state, self.norm)
            projected = [linear(normal) for linear in self.projections]
            query, key, value = (x.view(*normal.shape[:-1], -1, attention.head_dim) for x in projected)
            del normal, projected
            if self.norms:
                query, key = (norm(x) for norm, x in zip(self.norms, (query, key)))
            query, key = Rope.apply(query, key, *position_embeddings)
        if keep is not None:
            keep(*((query, key, value) if self.frozen and not self.norms else ()))
        return attend(attention, query, key, value, attention_mask, **named), state


def norm_of_heads(x, norm):
    """RMSNorm of each head ``(..., heads, head_dim)``, as rows, and its factors."""
    return kernels.rms_norm(tokens(x), norm.weight, norm.variance_epsilon)


def _rows(x, rows, batch):
    """Some rows of what has one for each sequence."""
    return x[rows] if isinstance(x, torch.Tensor) and x.ndim > 1 and len(x) == batch else x


def attend(attention, query, key, value, attention_mask, **named):
    """Attention of ``(batch, tokens, heads, head_dim)`` by the model's own code, as ``(batch, tokens, heads * head_dim)``."""
    for unused in ("past_key_values", "use_cache"):  # position_ids tell flash attention of packed sequences
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
    return mixed.reshape(*query.shape[:2], -1)
