"""Transformer layers whose training forward keeps only what the memory mode says.

A layer is two halves: attention (run by the model's own attention code, so that every mask, position encoding,
attention kernel and LoRA works as before) and MLP (hand-written, see ``mlp.py``).

| mode     | attention half            | MLP half                                                            |
|----------|---------------------------|---------------------------------------------------------------------|
| fast     | kept                      | no matmul is recomputed                                             |
| balanced | kept, or where the MLP keeps much (SwiGLU) recomputed up to the output projection; or its state, queries, keys and values wait on the host | one matmul is recomputed, in token chunks where nothing is kept |
| lean     | one state per layer kept, or two on the host if offloaded, where there is room with queries, keys and values; the rest recomputed, the MLP in token chunks |
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ..control_layer import ControlLayer
from .control import control_backward, control_draws, control_hidden, control_parameters
from .mlp import draws, tokens
from .offload import HostStates
from .replay import draw


@dataclass
class Halves:
    """The two halves of one layer, see ``families.py``.

    Attributes:
        attention: ``(layer, state, **arguments)`` -> the attention block's output state, control included.
        mlp: the frozen MLP block (``mlp.py``).
        recompute_attention: whether mode "balanced" recomputes the attention half, whose ``recompute`` then says how.
        attention_gradients: ``(layer, state, dy, inputs, kept=..., **arguments)`` -> the gradients of ``inputs`` and of
            the block's control's parameters, for a backward that need not compute the attention block's output; ``dy``
            is overwritten, ``kept`` is what ``attention`` gave to its argument ``keep``. Or None.
        attention_kept: how many numbers a token that is.
        returns_tuple: whether the layer's own forward returns its state in a tuple.
    """

    attention: Callable
    mlp: object
    recompute_attention: bool = False
    attention_gradients: Callable | None = None
    attention_kept: int = 0
    returns_tuple: bool = False


@dataclass
class Plan:
    """How one layer trains; stands on the layer as ``layer.memory_plan``.

    ``host``: where states wait in modes lean and balanced, or None; ``attention_on_host``: whether what spares attention's
    backward the projections does too.
    """

    mode: str
    halves: Halves
    chunk: int
    host: HostStates | None = None
    attention_on_host: bool = False

    def watch(self, layer: nn.Module, find: Callable) -> None:
        """Remember of what ``layer`` consists; ``find`` is what has found its halves."""
        self.find = find
        self.modules = [
            (parent._modules, name, child)
            for parent in layer.modules()
            if not isinstance(parent, BaseTunerLayer)
            for name, child in parent._modules.items()
            if child is not None
        ]
        self.tuners = [module for module in layer.modules() if isinstance(module, BaseTunerLayer)]
        self.frozen = [parameter for parameter in layer.parameters() if not parameter.requires_grad]

    def renew(self, layer: nn.Module) -> None:
        """Find the halves again where an adapter has come or a parameter is trained since.

        Raises:
            ValueError: the memory mode does not know what ``layer`` is now.
        """
        same = all(modules.get(name) is child for modules, name, child in self.modules)
        if not same or any(parameter.requires_grad for parameter in self.frozen):
            self.halves = self.find(layer)
            self.attention_on_host = self.attention_on_host and self.halves.attention_kept > 0
            self.watch(layer, self.find)

    def adapters(self, layer: nn.Module) -> list:
        """What must be the same in a forward and its backward."""
        return [
            layer.training,
            *((x.training, x.disable_adapters, list(x.active_adapters)) for x in self.tuners),
        ]

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
    cache = named.get("past_key_values")
    cached = cache is not None and (not layer.training or cache.get_seq_length() > 0)
    if not torch.is_grad_enabled() or named.get("output_attentions") or cached:
        return own(hidden_states, *arguments, **named)
    plan.renew(layer)
    differentiable = any(
        isinstance(x, torch.Tensor) and x.requires_grad for x in (*arguments, *named.values())
    )
    # dropout in the middle of an MLP and trained masks are rare: recompute the layer as a whole
    if plan.mlp.draws() or differentiable:
        if plan.mode == "fast":
            return own(hidden_states, *arguments, **named)
        return checkpoint(own, hidden_states, *arguments, use_reentrant=False, **named)
    if plan.mode == "lean":
        output = LeanLayer.apply(hidden_states, layer, arguments, named, *_trained(layer))
    else:
        control = getattr(layer, "mlp_control", None)
        if plan.mode != "balanced" or not plan.halves.recompute_attention:
            middle = plan.halves.attention(layer, hidden_states, *arguments, **named)
        elif plan.halves.attention_gradients and not draws_random_numbers(layer):
            trained = _besides(_trained(layer), control_parameters(control))
            middle = AttentionHalf.apply(hidden_states, layer, arguments, named, *trained)
        else:
            replay = draws_random_numbers(layer)
            again = partial(checkpoint, use_reentrant=False, preserve_rng_state=replay)
            middle = plan.halves.attention(layer, hidden_states, *arguments, recompute=again, **named)
        output = MlpHalf.apply(middle, layer, *control_parameters(control))
        if plan.host is not None:
            plan.host.settle()
    return (output,) if plan.halves.returns_tuple else output


class AttentionHalf(torch.autograd.Function):
    """The attention block with its control, as one autograd node whose backward does not compute the block's output (mode
    balanced)."""

    @staticmethod
    def forward(ctx, state, layer, arguments, named, *parameters):
        _keep_layer(ctx, layer)
        plan, ctx.arguments, ctx.named, ctx.trained = ctx.plan, arguments, named, parameters
        ctx.autocast, ctx.ticket = _autocast_state(state), None

        def keep(*more):
            if _may_wait(ctx, plan, state, more):
                # the state does anyway, so that a slow host costs time and no memory of the GPU's
                more = more if plan.host.hides(state, *more) else ()
                ctx.ticket = _wait_on_host(plan, state, *more)

        middle = plan.halves.attention(layer, state, *arguments, keep=keep, **named)
        if ctx.ticket is None:
            ctx.save_for_backward(state)
        return middle

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        layer = _take_layer(ctx)
        state, *kept = ctx.plan.host.pop(ctx.ticket) if ctx.ticket else ctx.saved_tensors
        state = state.detach().requires_grad_(ctx.needs_input_grad[0])
        with ctx.autocast():
            # nothing but this node uses the state between the halves, so its gradient may be overwritten
            dstate, gradients = _attention_backward(ctx, layer, ctx.trained, state, kept, dy.contiguous())
        return dstate, None, None, None, *_in_order(ctx, gradients)


class MlpHalf(torch.autograd.Function):
    """The MLP block with its control, as one autograd node (modes fast and balanced)."""

    @staticmethod
    def forward(ctx, state, layer, *parameters):
        _keep_layer(ctx, layer)
        plan, control = ctx.plan, getattr(layer, "mlp_control", None)
        ctx.autocast = _autocast_state(state)
        ctx.in_chunks = plan.keep == 0 and not control_draws(control)
        if ctx.in_chunks:
            ctx.save_for_backward(state)
            return forward_in_chunks(plan, state, control)
        keep = plan.keep if ctx.needs_input_grad[0] else 0  # the first layer's state may need no gradient
        output = torch.empty_like(state, memory_format=torch.contiguous_format)
        _, kept, control_kept = plan.mlp.forward(tokens(state), keep, control, out=tokens(output))
        ctx.split = len(kept)
        ctx.save_for_backward(state, *kept, *control_kept)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        layer = _take_layer(ctx)
        plan, control = ctx.plan, getattr(layer, "mlp_control", None)
        state, *kept = ctx.saved_tensors
        flat, dflat = tokens(state), tokens(dy)
        with ctx.autocast():
            if ctx.in_chunks:
                dstate, gradients = backward_in_chunks(plan, flat, dflat, control, ctx.needs_input_grad[0])
            else:
                needed = ctx.needs_input_grad[0]
                dstate = plan.mlp.backward(flat, kept[: ctx.split], dflat) if needed else None
                dstate, gradients = control_backward(control, flat, kept[ctx.split :], dflat, dstate)
        return None if dstate is None else dstate.view(state.shape), None, *gradients


class LeanLayer(torch.autograd.Function):
    """A whole layer that keeps its input state alone and works the MLP in token chunks.

    Where states wait on the host, the one between the halves does too if the attention block's output then need not be
    computed again, and queries, keys and values, both while there is room. Where there is none at all the state stays.
    """

    @staticmethod
    def forward(ctx, state, layer, arguments, named, *parameters):
        _keep_layer(ctx, layer)
        plan, ctx.arguments, ctx.named, ctx.trained = ctx.plan, arguments, named, parameters
        ctx.autocast = _autocast_state(state)
        ctx.random = draw(layer, state.device) if draws_random_numbers(layer) else None
        ctx.tickets = []

        def keep(*more):
            # the state between the halves comes too
            may_wait = _may_wait(ctx, plan, state, more, state) and plan.host.hides(state, *more, state)
            more = more if may_wait else ()
            ctx.tickets.append(_wait_on_host(plan, state, *more))

        room = plan.host.room_for(state) if plan.host is not None else 0
        from_the_middle = room == 2 and plan.halves.attention_gradients and ctx.random is None
        if room == 0:
            ctx.save_for_backward(state)
        elif from_the_middle:
            named = {**named, "keep": keep}
        else:
            ctx.tickets.append(_wait_on_host(plan, state))
        with nullcontext() if ctx.random is None else ctx.random.first():
            middle = plan.halves.attention(layer, state, *arguments, **named)
            if from_the_middle:
                ctx.tickets.append(_wait_on_host(plan, middle, own=0))
            output = forward_in_chunks(plan, middle, getattr(layer, "mlp_control", None))
        if plan.host is not None:
            plan.host.settle()
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        layer = _take_layer(ctx)
        backward = _backward_from_the_middle if len(ctx.tickets) > 1 else _backward_from_the_start
        dstate, gradients = backward(ctx, layer, dy)
        return dstate, None, None, None, *_in_order(ctx, gradients)


def _backward_from_the_start(ctx, layer, dy):
    """The gradient of the layer's state, if that needs one, and pairs of a parameter and its gradient."""
    plan, control = ctx.plan, getattr(layer, "mlp_control", None)
    (state,) = plan.host.pop(ctx.tickets[0]) if ctx.tickets else ctx.saved_tensors
    state = state.detach().requires_grad_(ctx.needs_input_grad[0])
    own = control_parameters(control)
    others = _besides(ctx.trained, own)
    inputs = [*([state] if state.requires_grad else []), *others]
    replayed = nullcontext() if ctx.random is None else ctx.random.again()
    with ctx.autocast(), replayed, torch.enable_grad():
        middle = plan.halves.attention(layer, state, *ctx.arguments, **ctx.named)
        # what the MLP drew must be drawn again even where its gradient is not wanted
        needed = bool(inputs) or ctx.random is not None
        dmiddle, sums = backward_in_chunks(plan, tokens(middle.detach()), tokens(dy), control, needed)
    found = [None] * len(inputs)
    if inputs and middle.requires_grad:  # else they are an inactive adapter's
        found = list(torch.autograd.grad(middle, inputs, dmiddle.view(middle.shape), allow_unused=True))
    dstate = found.pop(0) if state.requires_grad else None
    return dstate, [*zip(own, sums), *zip(others, found)]


def _backward_from_the_middle(ctx, layer, dy):
    """The same where the state between the halves waits on the host too. What waits is popped when it is needed: the copy
    of what comes next travels meanwhile."""
    plan, control = ctx.plan, getattr(layer, "mlp_control", None)
    own = control_parameters(control)
    others = _besides(ctx.trained, own)
    (middle,) = plan.host.pop(ctx.tickets[1])
    needed = ctx.needs_input_grad[0] or bool(others)
    with ctx.autocast():
        dmiddle, sums = backward_in_chunks(plan, tokens(middle), tokens(dy), control, needed)
        del middle  # long sequences need its memory
        state, *kept = plan.host.pop(ctx.tickets[0])
        if not needed:
            return None, [*zip(own, sums)]
        state.requires_grad_(ctx.needs_input_grad[0])
        dmiddle = dmiddle.view(state.shape)
        dstate, found = _attention_backward(ctx, layer, others, state, kept, dmiddle)
    return dstate, [*zip(own, sums), *found]


def _attention_backward(ctx, layer, trained, state, kept, dy):
    """The gradient of the attention half's state, if that needs one, and pairs of what is trained there and its gradient.
    ``dy`` is overwritten."""
    own = control_parameters(getattr(layer, "attention_control", None))
    others = _besides(trained, own)
    inputs = [*([state] if state.requires_grad else []), *others]
    with torch.enable_grad():
        found, of_control = ctx.plan.halves.attention_gradients(
            layer, state, dy, inputs, *ctx.arguments, kept=kept, **ctx.named
        )
    dstate = found.pop(0) if state.requires_grad else None
    return dstate, [*zip(own, of_control), *zip(others, found)]


def _may_wait(ctx, plan, state, more, *besides):
    """Whether ``more``, which spares the projections, is wanted on the host with the state and what comes ``besides``, and
    there is room."""
    wanted = bool(more) and plan.attention_on_host and ctx.needs_input_grad[0]
    return wanted and plan.host.has_room(state, *more, *besides)


def _wait_on_host(plan, *tensors, own=1):
    return plan.host.push(*(tensor.detach() for tensor in tensors), own=own)


def _trained(layer):
    # layer.parameters() takes several times as long, and small steps are bound by what Python does
    found = (p for module in layer.modules() for p in module._parameters.values())
    return list({id(p): p for p in found if p is not None and p.requires_grad}.values())


def _in_order(ctx, gradients):
    """The gradients in the order of what is trained; the last use of what the forward was called with."""
    by_id = {id(parameter): gradient for parameter, gradient in gradients}
    trained, ctx.trained, ctx.arguments, ctx.named = ctx.trained, None, None, None
    return [by_id[id(parameter)] for parameter in trained]


def _besides(parameters, *others):
    known = {id(parameter) for some in others for parameter in some}
    return [parameter for parameter in parameters if id(parameter) not in known]


def forward_in_chunks(plan: Plan, state: torch.Tensor, control: ControlLayer | None) -> torch.Tensor:
    """The MLP block's output with its control, ``plan.chunk`` tokens at a time; nothing is kept."""
    output, mlp = torch.empty_like(state, memory_format=torch.contiguous_format), plan.mlp.for_chunks(state)
    for piece, into in zip(tokens(state).split(plan.chunk), tokens(output).split(plan.chunk)):
        mlp.forward(piece, 0, control, out=into)
    return output


@torch.no_grad()
def backward_in_chunks(
    plan: Plan, state: torch.Tensor, dy: torch.Tensor, control: ControlLayer | None, needed: bool
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """The gradient of :func:`forward_in_chunks`'s state ``(tokens, width)``, if ``needed``, and of the control."""
    dstate = torch.empty_like(state, memory_format=torch.contiguous_format) if needed else None
    mlp, hidden = plan.mlp.for_chunks(state), []
    for rows in (slice(start, start + plan.chunk) for start in range(0, len(state), plan.chunk)):
        # MLP, then control, as in the forward: so dropout draws the same numbers
        if needed:
            mlp.backward(state[rows], (), dy[rows], out=dstate[rows])
        hidden.append(control_hidden(control, state[rows]))
    return control_backward(control, state, [*map(torch.cat, zip(*hidden))], dy, dstate)


def _keep_layer(ctx, layer):
    ctx.layer, ctx.plan = layer, layer.memory_plan
    ctx.adapters = ctx.plan.adapters(layer)


def _take_layer(ctx):
    if ctx.layer is None:
        raise RuntimeError("a memory mode frees what it kept: backward runs once per forward")
    layer, ctx.layer = ctx.layer, None
    if ctx.adapters != ctx.plan.adapters(layer):
        raise RuntimeError(
            "between a forward and its backward adapters were switched, or training and evaluation: that takes memory mode "
            "'plain'"
        )
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
    """Whether a layer's backward draws its forward's random numbers once more in a way that no CUDA graph can."""
    for layer in model.modules():
        plan = getattr(layer, "memory_plan", None)
        if plan is None or plan.mode == "fast":
            continue
        checkpointed = plan.mlp.draws() or (plan.mode == "balanced" and plan.halves.recompute_attention)
        if checkpointed and draws_random_numbers(layer):
            return True
    return False


def replaying_layers(model) -> list[nn.Module]:
    """The layers whose backward draws random numbers again through ``replay.py``."""
    return [
        layer
        for layer in model.modules()
        if getattr(layer, "memory_plan", None) is not None
        and layer.memory_plan.mode == "lean"
        and draws_random_numbers(layer)
    ]
