"""Transformer layers whose training forward keeps only what the memory mode says.

A layer is two halves: attention (run by the model's own attention code, so that every mask, position encoding,
attention kernel and LoRA works as before) and MLP (hand-written, see ``mlp.py``).

| mode     | attention half            | MLP half                                                            |
|----------|---------------------------|---------------------------------------------------------------------|
| fast     | kept                      | state and pre-activations kept                                      |
| balanced | recomputed from its state | state and one pre-activation kept                                   |
| lean     | one state per layer kept, on the host if offloaded; the rest recomputed, the MLP in token chunks |
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..layer import ControlLayer
from .control import AddControl, add_control_, control_backward, control_hidden, control_parameters
from .mlp import tokens
from .offload import HostStates

KEEP = {"fast": 2, "balanced": 1, "lean": 0}


@dataclass
class Plan:
    """How one layer trains; stands on the layer as ``layer.memory_plan``."""

    mode: str
    attention: object  # (layer, state, **arguments) -> what the attention block adds to the state
    mlp: object  # the frozen MLP block, see mlp.py
    chunk: int
    host: HostStates | None
    after: object = field(default=lambda output: output)  # what the family's layer returns


def training_forward(layer: nn.Module, hidden_states: torch.Tensor, *arguments, **named):
    """Replaces ``layer.forward``; without gradients the layer runs as it always did."""
    plan = layer.memory_plan
    if not torch.is_grad_enabled():
        return type(layer).forward(layer, hidden_states, *arguments, **named)
    if plan.mode == "lean":
        parameters = [p for p in layer.parameters() if p.requires_grad]
        return plan.after(LeanLayer.apply(hidden_states, layer, arguments, named, *parameters))
    if plan.mode == "balanced":
        change = checkpoint(plan.attention, layer, hidden_states, *arguments, use_reentrant=False, **named)
    else:
        change = plan.attention(layer, hidden_states, *arguments, **named)
    middle = _add(layer, hidden_states, change)
    control = getattr(layer, "mlp_control", None)
    return plan.after(MlpHalf.apply(middle, layer, *control_parameters(control)))


def _add(layer, state, change):
    """The attention block's output state, its control included."""
    control = getattr(layer, "attention_control", None)
    return AddControl.apply(state, change, control, *control_parameters(control))


class MlpHalf(torch.autograd.Function):
    """The MLP block with its control, as one autograd node (modes fast and balanced)."""

    @staticmethod
    def forward(ctx, state, layer, *parameters):
        plan, control = layer.memory_plan, getattr(layer, "mlp_control", None)
        flat = tokens(state)
        output, kept = plan.mlp.forward(flat, KEEP[plan.mode])
        control_kept = control_hidden(control, flat)
        add_control_(control, control_kept, output)
        ctx.layer, ctx.split, ctx.autocast = layer, len(kept), _autocast_state(state)
        ctx.save_for_backward(state, *kept, *control_kept)
        return output.view(state.shape)

    @staticmethod
    def backward(ctx, dy):
        if ctx.layer is None:
            raise RuntimeError("a memory mode frees what it kept: backward runs once per forward")
        layer, ctx.layer = ctx.layer, None
        plan, control = layer.memory_plan, getattr(layer, "mlp_control", None)
        state, *kept = ctx.saved_tensors
        flat, dflat = tokens(state), tokens(dy)
        with ctx.autocast():
            dstate = plan.mlp.backward(flat, kept[: ctx.split], dflat)
            gradients = control_backward(control, flat, kept[ctx.split :], dflat, dstate)
        return dstate.view(state.shape), None, *gradients


class LeanLayer(torch.autograd.Function):
    """A whole layer that keeps its input state alone and works the MLP in token chunks."""

    @staticmethod
    def forward(ctx, state, layer, arguments, named, *parameters):
        plan = layer.memory_plan
        ctx.layer, ctx.arguments, ctx.named = layer, arguments, named
        ctx.autocast = _autocast_state(state)
        ctx.random = _random_state(state) if _draws(layer) else None
        middle = _add(layer, state, plan.attention(layer, state, *arguments, **named))
        output = torch.empty_like(middle)
        control = getattr(layer, "mlp_control", None)
        for piece, into in zip(
            tokens(middle).split(plan.chunk), output.view(-1, output.shape[-1]).split(plan.chunk)
        ):
            part, _ = plan.mlp.forward(piece, 0)
            add_control_(control, control_hidden(control, piece), part)
            into.copy_(part)
        if plan.host is None:
            ctx.save_for_backward(state)
        else:
            ctx.ticket = plan.host.push(state.detach())
        return output

    @staticmethod
    def backward(ctx, dy):
        layer, plan = ctx.layer, ctx.layer.memory_plan
        state = ctx.saved_tensors[0] if plan.host is None else plan.host.pop(ctx.ticket)
        control = getattr(layer, "mlp_control", None)
        own = {id(p) for p in control_parameters(control)}
        parameters = [p for p in layer.parameters() if p.requires_grad]
        others = [p for p in parameters if id(p) not in own]

        state = state.detach().requires_grad_(ctx.needs_input_grad[0])
        with ctx.autocast(), _replayed(ctx.random, state), torch.enable_grad():
            middle = _add(layer, state, plan.attention(layer, state, *ctx.arguments, **ctx.named))
            flat, dflat = tokens(middle.detach()), tokens(dy)
            dmiddle = torch.empty_like(flat)
            sums = None
            with torch.no_grad():
                for piece, dpiece, into in zip(
                    flat.split(plan.chunk), dflat.split(plan.chunk), dmiddle.split(plan.chunk)
                ):
                    # in the forward's order, so that dropout draws the same numbers
                    kept = control_hidden(control, piece)
                    part = plan.mlp.backward(piece, (), dpiece)
                    gradients = control_backward(control, piece, kept, dpiece, part)
                    into.copy_(part)
                    sums = gradients if sums is None else [a.add_(b) for a, b in zip(sums, gradients)]
        inputs = ([state] if state.requires_grad else []) + others
        found = (
            torch.autograd.grad(middle, inputs, dmiddle.view(middle.shape), allow_unused=True)
            if inputs
            else ()
        )
        found = list(found)
        dstate = found.pop(0) if state.requires_grad else None
        by_id = dict(zip(map(id, control_parameters(control)), sums)) | dict(zip(map(id, others), found))
        return dstate, None, None, None, *(by_id[id(p)] for p in parameters)


def _autocast_state(tensor):
    """A factory of contexts that bring back the autocast state of now."""
    device = tensor.device.type
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return partial(torch.autocast, device, dtype=dtype, enabled=enabled)


def _draws(layer) -> bool:
    """Whether the layer's forward draws random numbers."""
    return any(
        (isinstance(module, nn.Dropout) and module.p > 0.0 and module.training)
        or (isinstance(module, ControlLayer) and any(module.dropout.values()))
        or getattr(module, "attention_dropout", 0.0)
        for module in layer.modules()
    )


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
