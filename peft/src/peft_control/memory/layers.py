"""Transformer layers whose training forward keeps only what the memory mode says.

A layer is two halves: attention (run by the model's own attention code, so that every mask, position encoding,
attention kernel and LoRA works as before) and MLP (hand-written, see ``mlp.py``).

| mode     | attention half            | MLP half                                                            |
|----------|---------------------------|---------------------------------------------------------------------|
| fast     | kept                      | no matmul is recomputed                                             |
| balanced | kept, or recomputed from its state where the MLP keeps much (SwiGLU) | one matmul is recomputed |
| lean     | one state per layer kept, on the host if offloaded; the rest recomputed, the MLP in token chunks |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..layer import ControlLayer
from .control import control_backward, control_hidden, control_parameters
from .mlp import draws, tokens
from .offload import HostStates


@dataclass
class Halves:
    """The two halves of one layer, see ``families.py``.

    Attributes:
        attention: ``(layer, state, **arguments)`` -> the attention block's output state, control included.
        mlp: the frozen MLP block (``mlp.py``).
        recompute_attention: whether mode "balanced" recomputes the attention half.
        returns_tuple: whether the layer's own forward returns its state in a tuple.
    """

    attention: Callable
    mlp: object
    recompute_attention: bool = False
    returns_tuple: bool = False


@dataclass
class Plan:
    """How one layer trains; stands on the layer as ``layer.memory_plan``."""

    mode: str
    halves: Halves
    chunk: int
    host: HostStates | None

    @property
    def mlp(self):
        return self.halves.mlp

    @property
    def keep(self) -> int:
        return self.mlp.KEEP[self.mode]


@torch.compiler.disable  # its kernels are written by hand; what lies between the layers is compiled
def training_forward(layer: nn.Module, hidden_states: torch.Tensor, *arguments, **named):
    """Replaces ``layer.forward``; without gradients the layer runs as it always did."""
    plan = layer.memory_plan
    own = partial(type(layer).forward, layer)
    if not torch.is_grad_enabled() or named.get("output_attentions"):
        return own(hidden_states, *arguments, **named)
    if plan.mlp.draws():  # dropout in the middle of an MLP is rare: recompute the layer as a whole
        if plan.mode == "fast":
            return own(hidden_states, *arguments, **named)
        return checkpoint(own, hidden_states, *arguments, use_reentrant=False, **named)
    if plan.mode == "lean":
        parameters = [p for p in layer.parameters() if p.requires_grad]
        output = LeanLayer.apply(hidden_states, layer, arguments, named, *parameters)
    else:
        attention = partial(plan.halves.attention, layer)
        if plan.mode == "balanced" and plan.halves.recompute_attention:
            replay = draws_random_numbers(layer)
            attention = partial(checkpoint, attention, use_reentrant=False, preserve_rng_state=replay)
        middle = attention(hidden_states, *arguments, **named)
        output = MlpHalf.apply(middle, layer, *control_parameters(getattr(layer, "mlp_control", None)))
    return (output,) if plan.halves.returns_tuple else output


class MlpHalf(torch.autograd.Function):
    """The MLP block with its control, as one autograd node (modes fast and balanced)."""

    @staticmethod
    def forward(ctx, state, layer, *parameters):
        plan, control = layer.memory_plan, getattr(layer, "mlp_control", None)
        flat = tokens(state)
        keep = plan.keep if ctx.needs_input_grad[0] else 0  # the first layer's state may need no gradient
        output, kept, control_kept = plan.mlp.forward(flat, keep, control)
        ctx.layer, ctx.split, ctx.autocast = layer, len(kept), _autocast_state(state)
        ctx.save_for_backward(state, *kept, *control_kept)
        return output.view(state.shape)

    @staticmethod
    def backward(ctx, dy):
        layer = _take_layer(ctx)
        plan, control = layer.memory_plan, getattr(layer, "mlp_control", None)
        state, *kept = ctx.saved_tensors
        flat, dflat = tokens(state), tokens(dy)
        with ctx.autocast():
            dstate = plan.mlp.backward(flat, kept[: ctx.split], dflat) if ctx.needs_input_grad[0] else None
            gradients = control_backward(control, flat, kept[ctx.split :], dflat, dstate)
        return None if dstate is None else dstate.view(state.shape), None, *gradients


class LeanLayer(torch.autograd.Function):
    """A whole layer that keeps its input state alone and works the MLP in token chunks."""

    @staticmethod
    def forward(ctx, state, layer, arguments, named, *parameters):
        plan = layer.memory_plan
        ctx.layer, ctx.arguments, ctx.named = layer, arguments, named
        ctx.autocast = _autocast_state(state)
        ctx.random = _random_state(state) if draws_random_numbers(layer) else None
        middle = plan.halves.attention(layer, state, *arguments, **named)
        output = torch.empty_like(middle)
        control = getattr(layer, "mlp_control", None)
        for piece, into in zip(
            tokens(middle).split(plan.chunk), output.view(-1, output.shape[-1]).split(plan.chunk)
        ):
            into.copy_(plan.mlp.forward(piece, 0, control)[0])
        if plan.host is None:
            ctx.save_for_backward(state)
        else:
            ctx.ticket = plan.host.push(state.detach())
        return output

    @staticmethod
    def backward(ctx, dy):
        layer = _take_layer(ctx)
        plan = layer.memory_plan
        state = ctx.saved_tensors[0] if plan.host is None else plan.host.pop(ctx.ticket)
        control = getattr(layer, "mlp_control", None)
        own = {id(p) for p in control_parameters(control)}
        parameters = [p for p in layer.parameters() if p.requires_grad]
        others = [p for p in parameters if id(p) not in own]

        state = state.detach().requires_grad_(ctx.needs_input_grad[0])
        inputs = ([state] if state.requires_grad else []) + others
        with ctx.autocast(), _replayed(ctx.random, state), torch.enable_grad():
            middle = plan.halves.attention(layer, state, *ctx.arguments, **ctx.named)
            flat, dflat = tokens(middle.detach()), tokens(dy)
            dmiddle = torch.empty_like(flat) if inputs else None
            sums = None
            with torch.no_grad():
                for rows in (slice(start, start + plan.chunk) for start in range(0, len(flat), plan.chunk)):
                    # MLP, then control, as in the forward: so dropout draws the same numbers
                    part = plan.mlp.backward(flat[rows], (), dflat[rows]) if inputs or ctx.random else None
                    kept = control_hidden(control, flat[rows])
                    gradients = control_backward(control, flat[rows], kept, dflat[rows], part)
                    if inputs:
                        dmiddle[rows] = part
                    sums = gradients if sums is None else [a.add_(b) for a, b in zip(sums, gradients)]
        found = []
        if inputs:
            found = list(torch.autograd.grad(middle, inputs, dmiddle.view(middle.shape), allow_unused=True))
        dstate = found.pop(0) if state.requires_grad else None
        by_id = dict(zip(map(id, control_parameters(control)), sums)) | dict(zip(map(id, others), found))
        return dstate, None, None, None, *(by_id[id(p)] for p in parameters)


def _take_layer(ctx):
    if ctx.layer is None:
        raise RuntimeError("a memory mode frees what it kept: backward runs once per forward")
    layer, ctx.layer = ctx.layer, None
    return layer


def _autocast_state(tensor):
    """A factory of contexts that bring back the autocast state of now."""
    device = tensor.device.type
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return partial(torch.autocast, device, dtype=dtype, enabled=enabled)


def draws_random_numbers(layer) -> bool:
    """Whether the layer's forward draws random numbers."""
    return any(
        draws(module)
        or (isinstance(module, ControlLayer) and module.training and any(module.dropout.values()))
        or (module.training and getattr(module, "attention_dropout", 0.0))
        for module in layer.modules()
    )


def replays_random_numbers(model) -> bool:
    """Whether a layer's backward draws its forward's random numbers once more, which no CUDA graph can do."""
    for layer in model.modules():
        plan = getattr(layer, "memory_plan", None)
        recomputes = plan is not None and (
            plan.mode == "lean"
            or plan.mlp.draws()
            or (plan.mode == "balanced" and plan.halves.recompute_attention)
        )
        if recomputes and draws_random_numbers(layer):
            return True
    return False


def _random_state(tensor):
    states = [torch.get_rng_state()]
    if tensor.is_cuda:
        states.append(torch.cuda.get_rng_state(tensor.device))
    return states


class _replayed:
    """Run with the generators as they were (None: as they are); leave them as they are."""

    def __init__(self, states, tensor):
        self.states, self.device = states, tensor.device

    def _set(self, states):
        torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.cuda.set_rng_state(states[1], self.device)

    def __enter__(self):
        if self.states is not None:
            self.now = _random_state(torch.empty(0, device=self.device))
            self._set(self.states)

    def __exit__(self, *_):
        if self.states is not None:
            self._set(self.now)
