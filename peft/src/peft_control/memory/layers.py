"""Transformer layers whose training forward keeps only what the memory mode says.

A layer is two halves: attention (run by the model's own attention code, so that every mask, position encoding,
attention kernel and LoRA works as before) and MLP (hand-written, see ``mlp.py``).

What a SwiGLU decoder's layer keeps in each mode stands in ``__init__.py``. In the other families mode balanced keeps the
attention half, and recomputes one matmul of the MLP, in token chunks where nothing of it is kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache

from ..control_layer import ControlLayer
from .control import SWITCHED, control_backward, control_draws, control_hidden, control_parameters, tuner_setting
from .exact import Parameters, touches
from .mlp import probabilities, tokens
from .offload import HostStates
from .replay import draw


@dataclass
class Halves:
    """The two halves of one layer, see ``families.py``.

    Attributes:
        attention: ``(layer, state, **arguments)`` -> the attention block's output state, control included.
        mlp: the frozen MLP block (``mlp.py``).
        mlp_modules: the modules that it consists of.
        by_hand: what else is not called as a module.
        recompute_attention: whether mode "balanced" recomputes the attention half, whose ``recompute`` then says how.
        attention_gradients: ``(layer, state, dy, inputs, kept=..., **arguments)`` -> the gradients of ``inputs`` and of
            the block's control's parameters, for a backward that need not compute the attention block's output; ``dy``
            is overwritten, ``kept`` is what ``attention`` gave to its argument ``keep``. Or None.
        attention_kept: how many numbers a token that is.
        of_many_tokens: how mode "lean" works layers of many tokens (``long.py``), or None.
        returns_tuple: whether the layer's own forward returns its state in a tuple.
    """

    attention: Callable
    mlp: object
    mlp_modules: Sequence[nn.Module]
    by_hand: Sequence[nn.Module] = ()
    recompute_attention: bool = False
    attention_gradients: Callable | None = None
    attention_kept: int = 0
    of_many_tokens: type | None = None
    returns_tuple: bool = False


class LayerPlan:
    """How one layer trains; stands on the layer as ``layer.memory_plan``.

    Attributes:
        mode: the memory mode.
        halves: what is written by hand for the layer, or None: it then runs its own forward.
        alone: what runs it so in mode lean (``generic.py``), or None: torch's checkpointing does.
        chunk: tokens of an MLP's chunk, or None for the MLP's own.
        host: where states wait in modes lean and balanced, or None.
        attention_on_host: whether the tensors that let attention's backward skip its projections wait there too.
    """

    def __init__(self, layer: nn.Module, mode: str, find: Callable, generic: Callable, chunk: int | None):
        self.mode, self.find, self.generic, self.chosen_chunk = mode, find, generic, chunk
        self.host: HostStates | None = None
        self.attention_on_host = False
        self.look_at(layer)

    def look_at(self, layer: nn.Module) -> None:
        """Find out what ``layer`` is, and remember by what one sees that it has changed.

        ``reason`` says why nothing is written by hand for it.
        """
        before = getattr(self, "halves", None)
        stacked = getattr(before and before.mlp, "stacked", None)
        try:
            self.halves, self.reason = self.find(layer), None
        except ValueError as error:
            self.halves, self.reason = None, str(error)
        self.alone = self.generic(layer, self) if self.mode == "lean" else None
        modules = list(layer.modules())
        self.children = [
            (module._modules, list(module._modules.values()))
            for module in modules
            if module._modules or isinstance(module, (nn.ModuleDict, nn.ModuleList))
        ]
        self.tuners = [module for module in modules if isinstance(module, BaseTunerLayer)]
        self.controls = [module for module in self.tuners if isinstance(module, ControlLayer)]
        self.dropouts = [place for module in modules for place in probabilities(module)]
        self.all = Parameters(modules)
        if self.halves is None:
            self.parts, self.frozen = [(part, touches(part)) for part in modules if part is not layer], []
            if before is not None:
                warnings.warn(f"{self.reason}: {type(layer).__name__} runs its own forward from here on", stacklevel=4)
            return
        self.mlp = self.halves.mlp
        if stacked is not None:  # the weights still lie where they were put
            self.mlp.stacked = stacked
        self.chunk = self.chosen_chunk or max(self.mlp.CHUNK_ELEMENTS // self.mlp.width, 1)
        self.keep = self.mlp.KEEP[self.mode]
        of_mlp = {module for part in self.halves.mlp_modules for module in part.modules()}
        self.parts = [(part, touches(part)) for part in (*of_mlp, *self.halves.by_hand)]
        self.frozen = [p for part, _ in self.parts for p in part._parameters.values() if p is not None]
        control = getattr(layer, "mlp_control", None)
        of_mlp.update(control.modules() if control is not None else ())
        self.of_mlp = Parameters(module for module in modules if module in of_mlp)
        self.of_attention = Parameters(module for module in modules if module not in of_mlp)
        self.attention_on_host = self.attention_on_host and self.halves.attention_kept > 0

    def renew(self, layer: nn.Module) -> None:
        """Look again where an adapter, a hook or a forward has come or gone, or a parameter is trained since."""
        if (
            any(list(modules.values()) != children for modules, children in self.children)
            or any(touches(part) != before for part, before in self.parts)
            or any(parameter.requires_grad for parameter in self.frozen)
        ):
            self.look_at(layer)

    def setting(self, layer: nn.Module) -> list:
        """What must be the same in a forward and its backward."""
        return [layer.training, *map(tuner_setting, self.tuners)]

    @torch.compiler.disable  # its kernels are written by hand; what lies between the layers is compiled
    def run(self, layer: nn.Module, own: Callable, hidden_states: torch.Tensor, *arguments, **named):
        """Replaces ``layer.forward``; without gradients, or with a cache, the layer runs as it always did."""
        given = (*arguments, *named.values())
        cached = any(isinstance(value, Cache) for value in given)
        if not torch.is_grad_enabled() or cached or named.get("output_attentions"):
            return own(hidden_states, *arguments, **named)
        self.renew(layer)
        # dropout in the middle of an MLP and trained masks are rare: recompute the layer as a whole
        trained_input = any(isinstance(x, torch.Tensor) and x.requires_grad for x in given)
        if self.halves is None or self.mlp.draws() or trained_input:
            if self.mode == "fast":
                return own(hidden_states, *arguments, **named)
            again = self.alone or recomputed
            return again(self, layer, own, hidden_states, *arguments, **named)
        if self.mode == "lean":
            long = self.halves.of_many_tokens
            node = LongLayer if long is not None and long.suits(hidden_states, *arguments, **named) else LeanLayer
            output = node.apply(hidden_states, layer, arguments, named, *_trained(self.all))
        else:
            if self.mode != "balanced" or not self.halves.recompute_attention:
                middle = self.halves.attention(layer, hidden_states, *arguments, **named)
            elif self.halves.attention_gradients and not draws_random_numbers(layer):
                trained = _trained(self.of_attention)
                middle = AttentionHalf.apply(hidden_states, layer, arguments, named, *trained)
            else:
                again = partial(recomputed, self, layer)
                middle = self.halves.attention(layer, hidden_states, *arguments, recompute=again, **named)
            output = MlpHalf.apply(middle, layer, *_trained(self.of_mlp))
            if self.host is not None:
                self.host.settle()
        return (output,) if self.halves.returns_tuple else output


def recomputed(plan: LayerPlan, layer: nn.Module, function: Callable, *arguments, **named):
    """torch's checkpointing of ``function``, whose second run reads the parameters that the first has read.

    Raises:
        RuntimeError: (in the backward) a parameter was changed in place in between, or adapters were switched.
    """
    parameters, setting = plan.all.now(), plan.setting(layer)
    versions, runs = [parameter._version for parameter in parameters], 0

    def run(*arguments, **named):
        nonlocal runs
        runs += 1
        if runs == 1:
            return function(*arguments, **named)
        if versions != [parameter._version for parameter in parameters]:
            raise RuntimeError("a parameter was modified by an inplace operation between a forward and its backward")
        if setting != plan.setting(layer):
            raise RuntimeError(SWITCHED)
        with plan.all.put_back(parameters):
            return function(*arguments, **named)

    # no CUDA graph can draw again, nor is one captured where that would be needed (see ``replays_random_numbers``)
    on_gpu = any(isinstance(x, torch.Tensor) and x.is_cuda for x in arguments)
    capturing = on_gpu and torch.cuda.is_current_stream_capturing()
    return checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=not capturing, **named)


class AttentionHalf(torch.autograd.Function):
    """The attention block with its control, as one autograd node whose backward does not compute the block's output (mode
    balanced)."""

    @staticmethod
    def forward(ctx, state, layer, arguments, named, *trained):
        plan = _remember(ctx, layer, layer.memory_plan.of_attention, arguments, named)
        ctx.autocast, ctx.ticket = _autocast_state(state), None

        def keep(*more):
            if _may_wait(ctx, plan, state, more):
                # the state does anyway, so that a slow host costs time and no memory of the GPU's
                more = more if plan.host.hides(state, *more) else ()
                ctx.ticket = _wait_on_host(plan, state, *more)

        middle = plan.halves.attention(layer, state, *arguments, keep=keep, **named)
        _save(ctx, *([] if ctx.ticket else [state]))
        return middle

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        with _as_in_forward(ctx) as (layer, saved, trained):
            state, *kept = ctx.plan.host.pop(ctx.ticket) if ctx.ticket else saved
            state = state.detach().requires_grad_(ctx.needs_input_grad[0])
            with ctx.autocast():
                # nothing but this node uses the state between the halves, so its gradient may be overwritten
                dstate, gradients = _attention_backward(ctx, layer, trained, state, kept, dy.contiguous())
        return dstate, None, None, None, *_in_order(trained, gradients)


class MlpHalf(torch.autograd.Function):
    """The MLP block with its control, as one autograd node (modes fast and balanced)."""

    @staticmethod
    def forward(ctx, state, layer, *trained):
        plan = _remember(ctx, layer, layer.memory_plan.of_mlp)
        control = getattr(layer, "mlp_control", None)
        ctx.autocast = _autocast_state(state)
        ctx.in_chunks = plan.keep == 0 and not control_draws(control)
        if ctx.in_chunks:
            _save(ctx, state)
            return forward_in_chunks(plan, state, control)
        keep = plan.keep if ctx.needs_input_grad[0] else 0  # the first layer's state may need no gradient
        output = torch.empty_like(state, memory_format=torch.contiguous_format)
        _, kept, control_kept = plan.mlp.forward(tokens(state), keep, control, out=tokens(output))
        ctx.split = len(kept)
        _save(ctx, state, *kept, *control_kept)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        with _as_in_forward(ctx) as (layer, (state, *kept), trained):
            plan, control = ctx.plan, getattr(layer, "mlp_control", None)
            flat, dflat, needed = tokens(state), tokens(dy), ctx.needs_input_grad[0]
            with ctx.autocast():
                if ctx.in_chunks:
                    dstate, sums = backward_in_chunks(plan, flat, dflat, control, needed)
                else:
                    dstate = plan.mlp.backward(flat, kept[: ctx.split], dflat) if needed else None
                    dstate, sums = control_backward(control, flat, kept[ctx.split :], dflat, dstate)
            gradients = zip(control_parameters(control), sums)
        return None if dstate is None else dstate.view(state.shape), None, *_in_order(trained, gradients)


class LeanLayer(torch.autograd.Function):
    """A whole layer that keeps its input state alone and works the MLP in token chunks.

    Where states wait on the host, the one between the halves does too if the attention block's output then need not be
    computed again, and queries, keys and values, both while there is room. Where there is none at all the state stays.
    """

    @staticmethod
    def forward(ctx, state, layer, arguments, named, *trained):
        plan = _remember(ctx, layer, layer.memory_plan.all, arguments, named)
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
        if from_the_middle:
            named = {**named, "keep": keep}
        elif room:
            ctx.tickets.append(_wait_on_host(plan, state))
        _save(ctx, *([] if room else [state]))
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
        with _as_in_forward(ctx) as (layer, saved, trained):
            backward = _backward_from_the_middle if len(ctx.tickets) > 1 else _backward_from_the_start
            dstate, gradients = backward(ctx, layer, saved, trained, dy)
        return dstate, None, None, None, *_in_order(trained, gradients)


class LongLayer(torch.autograd.Function):
    """:class:`LeanLayer` for many tokens, see ``long.py``: with the state attention's output waits on the host, while there is
    room for both."""

    @staticmethod
    def forward(ctx, state, layer, arguments, named, *trained):
        plan = _remember(ctx, layer, layer.memory_plan.all, arguments, named)
        ctx.autocast, ctx.tickets, host = _autocast_state(state), [], plan.host
        ctx.random = draw(layer, state.device) if draws_random_numbers(layer) else None
        if host is not None and host.room_for(state):
            ctx.tickets.append(_wait_on_host(plan, state))
        _save(ctx, *([] if ctx.tickets else [state]))
        with nullcontext() if ctx.random is None else ctx.random.first():
            work = plan.halves.of_many_tokens(layer, plan, state.detach(), *arguments, **named)
            groups = work.attend()
            kept = [tensor for group in groups for tensor in group.kept()]
            ctx.groups = None
            if ctx.tickets and ctx.random is None and host.has_room_beside(state, *kept):
                ctx.tickets.append(host.push(*kept, own=0))
                ctx.groups = groups
            del kept
            output = work.output(groups)
        for group in groups:
            group.forget()
        if host is not None:
            host.settle()
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        with _as_in_forward(ctx) as (layer, saved, trained):
            host, groups, then, ctx.groups = ctx.plan.host, ctx.groups, None, None
            kept = host.pop(ctx.tickets[1]) if groups else []
            for group in groups or ():
                group.remember(kept)
            if ctx.tickets:
                (state,), then = host.pop(ctx.tickets[0], fetch_next=False), partial(host.fetch_below, ctx.tickets[0])
            else:
                (state,) = saved
            replayed = nullcontext() if ctx.random is None else ctx.random.again()
            with ctx.autocast(), replayed:
                work = ctx.plan.halves.of_many_tokens(layer, ctx.plan, state, *ctx.arguments, **ctx.named)
                groups = groups or work.attend()
                dstate, gradients = work.backward(groups, dy, ctx.needs_input_grad[0], then)
        return dstate, None, None, None, *_in_order(trained, gradients)


def _backward_from_the_start(ctx, layer, saved, trained, dy):
    """The gradient of the layer's state, if that needs one, and pairs of a parameter and its gradient."""
    plan, control = ctx.plan, getattr(layer, "mlp_control", None)
    (state,) = plan.host.pop(ctx.tickets[0]) if ctx.tickets else saved
    state = state.detach().requires_grad_(ctx.needs_input_grad[0])
    own = control_parameters(control)
    others = _besides(trained, own)
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


def _backward_from_the_middle(ctx, layer, saved, trained, dy):
    """The same where the state between the halves waits on the host too. What waits is popped when it is needed: the copy
    of what comes next travels meanwhile."""
    plan, control = ctx.plan, getattr(layer, "mlp_control", None)
    own = control_parameters(control)
    others = _besides(trained, own)
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


def _trained(parameters: Parameters) -> list[torch.Tensor]:
    return [parameter for parameter in parameters.now() if parameter.requires_grad]


def _in_order(trained, gradients):
    by_id = {id(parameter): gradient for parameter, gradient in gradients}
    return [by_id.get(id(parameter)) for parameter in trained]


def _besides(parameters, *others):
    known = {id(parameter) for some in others for parameter in some}
    return [parameter for parameter in parameters if id(parameter) not in known]


def forward_in_chunks(plan: LayerPlan, state: torch.Tensor, control: ControlLayer | None) -> torch.Tensor:
    """The MLP block's output with its control, ``plan.chunk`` tokens at a time; nothing is kept."""
    output, mlp = torch.empty_like(state, memory_format=torch.contiguous_format), plan.mlp.for_chunks(state)
    for piece, into in zip(tokens(state).split(plan.chunk), tokens(output).split(plan.chunk)):
        mlp.forward(piece, 0, control, out=into)
    return output


@torch.no_grad()
def backward_in_chunks(
    plan: LayerPlan, state: torch.Tensor, dy: torch.Tensor, control: ControlLayer | None, needed: bool
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


def _remember(ctx, layer: nn.Module, parameters: Parameters, arguments=(), named=None) -> LayerPlan:
    """Put into ``ctx`` all that the backward must find as it is now; :func:`_save` the tensors among it."""
    ctx.layer, ctx.plan, ctx.parameters = layer, layer.memory_plan, parameters
    ctx.arguments, ctx.named = arguments, named
    ctx.setting, ctx.read = ctx.plan.setting(layer), parameters.now()
    return ctx.plan


def _save(ctx, *tensors: torch.Tensor) -> None:
    ctx.save_for_backward(*tensors, *ctx.read)
    ctx.kept = len(tensors)
    del ctx.read


@contextmanager
def _as_in_forward(ctx):
    """The layer with the parameters of the forward in their places, what was saved beside them, and those that are trained.

    Raises:
        RuntimeError: it is the second backward, adapters were switched, or (by autograd) a parameter was changed in place.
    """
    if ctx.layer is None:
        raise RuntimeError("a memory mode frees what it kept: backward runs once per forward")
    layer, ctx.layer = ctx.layer, None
    if ctx.setting != ctx.plan.setting(layer):
        raise RuntimeError(SWITCHED)
    saved = ctx.saved_tensors
    parameters = saved[ctx.kept :]
    with ctx.parameters.put_back(parameters):
        yield layer, saved[: ctx.kept], [p for p in parameters if p.requires_grad]
    ctx.arguments = ctx.named = None


def _autocast_state(tensor):
    """A factory of contexts that bring back the autocast state of now."""
    device = tensor.device.type
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return partial(torch.autocast, device, dtype=dtype, enabled=enabled)


def draws_random_numbers(layer: nn.Module) -> bool:
    """Whether the forward of a layer with a plan draws random numbers."""
    plan = layer.memory_plan
    return any(state["training"] and state[name] > 0.0 for state, name in plan.dropouts) or any(
        map(control_draws, plan.controls)
    )


def planned_layers(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if isinstance(vars(layer).get("memory_plan"), LayerPlan)]


def replays_random_numbers(model: nn.Module) -> bool:
    """Whether a layer's backward draws its forward's random numbers once more in a way that no CUDA graph can."""
    for layer in planned_layers(model):
        plan = layer.memory_plan
        checkpointed = plan.halves is None or plan.mlp.draws() or (plan.mode == "balanced" and plan.halves.recompute_attention)
        if plan.mode != "fast" and checkpointed and draws_random_numbers(layer):
            return True
    return False


def replaying_layers(model: nn.Module) -> list[nn.Module]:
    """The layers whose backward draws random numbers again through ``replay.py``."""
    return [layer for layer in planned_layers(model) if layer.memory_plan.mode == "lean" and draws_random_numbers(layer)]
