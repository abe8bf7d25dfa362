"""Transformer layers whose training forward keeps only what the memory mode says.

A layer is two halves: attention (run by the model's own attention code, so that every mask, position encoding,
attention kernel and LoRA works as before) and MLP (hand-written, see ``mlp.py``). Autograd sees one or two nodes,
each a :class:`Node`. A :class:`Call` is the node's policy: what its forward keeps, where, and how its backward recomputes
the rest.

    mode       attention                                      MLP
    fast       autograd's own graph                           MlpCall
    balanced   SwiGLU decoders: AttentionCall; others: fast   MlpCall
    lean       AttentionCall, where the state between the halves waits on the host too               MlpCall
               else LeanCall: both halves in one node. LongCall (``long.py``): the same from 8,192 tokens a step on.

Other layers are recomputed by torch's checkpointing: :func:`recomputed`, in mode lean with what ``generic.py`` adds. The
table on top of ``__init__.py`` says which tensors a SwiGLU decoder keeps. In the other families mode balanced keeps the
attention half as it is, and recomputes one matmul of the MLP, in token chunks where nothing of it is kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache
from transformers.utils import output_capturing

from ..control_layer import ControlLayer
from .control import (
    SWITCHED,
    Active,
    active,
    control_backward,
    control_draws,
    control_hidden,
    control_parameters,
    tuner_setting,
)
from .exact import Parameters, touches
from .linear import Joined
from .mlp import Mlp, probabilities, tokens
from .offload import HostStates, Waiting
from .replay import Still, draw

#: The gradient of a node's state, and pairs of a tensor and its gradient.
Gradients = tuple[torch.Tensor | None, Iterable[tuple[torch.Tensor, torch.Tensor | None]]]


@dataclass
class Halves:
    """The two halves of one layer, see ``families.py``.

    Attributes:
        attention: ``(state, **arguments)`` -> the attention block's output state, control included.
        mlp: the frozen MLP block (``mlp.py``).
        mlp_modules: the modules that it consists of.
        by_hand: what else is not called as a module.
        joined: layers of one input.
        recompute_attention: whether mode "balanced" recomputes the attention half.
        attention_gradients: :meth:`.attention.DecoderAttention.gradients`, for a backward that need not compute the attention
            block's output, or None.
        attention_kept: how many numbers a token spare it the projections.
        of_many_tokens: how mode "lean" works layers of many tokens (``long.py``), or None.
        returns_tuple: whether the layer's own forward returns its state in a tuple.
    """

    attention: Callable
    mlp: Mlp
    mlp_modules: Sequence[nn.Module]
    by_hand: Sequence[nn.Module] = ()
    joined: Sequence[Joined] = ()
    recompute_attention: bool = False
    attention_gradients: Callable | None = None
    attention_kept: int = 0
    of_many_tokens: Any = None
    returns_tuple: bool = False


class LayerPlan:
    """How one layer trains; stands on the layer as ``layer.memory_plan``.

    Attributes:
        mode: the memory mode.
        halves: what is written by hand for the layer, or None: it then runs its own forward.
        reason: why nothing is written by hand for it, or None.
        alone: what runs it so in mode lean (``generic.py``), or None: :func:`recomputed` does.
        adds, tokens: what ``generic.py`` has found out about the layer.
        chunk: tokens of an MLP's chunk, or None for the MLP's own.
        host: where states wait in modes lean and balanced, or None.
        attention_on_host: whether the tensors that let attention's backward skip its projections wait there too.
    """

    def __init__(self, layer: nn.Module, mode: str, find: Callable, generic: Callable, chunk: int | None):
        self.mode, self.find, self.generic, self.chosen_chunk = mode, find, generic, chunk
        self.halves: Halves | None = None
        self.reason: str | None = None
        self.adds: tuple[Any, bool] | None = None
        self.tokens: list = []
        self.host: HostStates | None = None
        self.attention_on_host = False
        self.look_at(layer)

    def look_at(self, layer: nn.Module) -> None:
        """Find out what ``layer`` is, and remember by what one sees that it has changed."""
        before = self.halves
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
        for old, new in zip(before.joined if before is not None else (), self.halves.joined):
            new.take_over(old)
        self.chunk = self.chosen_chunk or max(self.mlp.CHUNK_ELEMENTS // self.mlp.width, 1)
        self.keep = self.mlp.KEEP[self.mode]
        of_mlp = {module for part in self.halves.mlp_modules for module in part.modules()}
        self.parts = [(part, touches(part)) for part in (*of_mlp, *self.halves.by_hand)]
        self.frozen = [part._parameters for part, _ in self.parts]
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
            or any(p is not None and p.requires_grad for parameters in self.frozen for p in parameters.values())
        ):
            self.look_at(layer)

    def setting(self, layer: nn.Module) -> list:
        """What must be the same in a forward and its backward."""
        return [layer.training, *map(tuner_setting, self.tuners)]

    def draws(self) -> bool:
        """Whether the layer's forward draws random numbers."""
        return any(state["training"] and state[name] > 0.0 for state, name in self.dropouts) or any(
            any(control.dropout.values()) and control_draws(active(control)) for control in self.controls
        )

    @torch.compiler.disable  # its kernels are written by hand; what lies between the layers is compiled
    def run(self, layer: nn.Module, own: Callable, hidden_states: torch.Tensor, *arguments, **named):
        """Replaces ``layer.forward``; without gradients, or with a cache, the layer runs as it always did."""
        given = (*arguments, *named.values())
        cached = any(isinstance(value, Cache) for value in given)
        chosen = any(control.adapter_names is not None for control in self.controls)
        recorded = output_capturing._active_collector.get() or {}  # asked for by the call or by the configuration
        if not torch.is_grad_enabled() or cached or chosen or named.get("output_attentions") or "attentions" in recorded:
            return own(hidden_states, *arguments, **named)
        self.renew(layer)
        halves = self.halves
        # dropout in the middle of an MLP and trained masks are rare: recompute the layer as a whole
        trained_input = any(isinstance(x, torch.Tensor) and x.requires_grad for x in given)
        if halves is None or self.mlp.draws() or trained_input:
            if self.mode == "fast":
                return own(hidden_states, *arguments, **named)
            again = self.alone or recomputed
            return again(self, layer, own, hidden_states, *arguments, **named)
        whole = self.whole(halves, hidden_states, *arguments, **named)
        if whole is not None:
            output = whole(self, layer, self.all, hidden_states, arguments, named).run(hidden_states)
        else:
            if self.mode == "fast" or not halves.recompute_attention:
                middle = halves.attention(hidden_states, *arguments, **named)
            elif self.mode == "lean" or (halves.attention_gradients and not self.draws()):
                call = AttentionCall(self, layer, self.of_attention, hidden_states, arguments, named)
                middle = call.run(hidden_states)
            else:
                middle = recomputed(self, layer, halves.attention, hidden_states, *arguments, **named)
            output = MlpCall(self, layer, self.of_mlp, middle).run(middle)
        if self.host is not None:
            self.host.settle()
        return (output,) if halves.returns_tuple else output

    def whole(self, halves: Halves, state: torch.Tensor, *arguments, **named) -> type[Call] | None:
        """What runs the layer as one node, or None: its halves are two, so that autograd lets go of the output's gradient before
        attention's backward."""
        if self.mode != "lean":
            return None
        long = halves.of_many_tokens
        if long is not None and long.suits(self, state, *arguments, **named):
            return long
        apart = self.host is not None and self.host.room_for(state) == 2 and halves.attention_gradients and not self.draws()
        return None if apart else LeanCall


def recomputed(plan: LayerPlan, layer: nn.Module, function: Callable, *arguments, **named):
    """torch's checkpointing of ``function``, whose second run reads the parameters that the first has read.

    Raises:
        RuntimeError: (in the backward) a parameter was changed in place in between, or adapters were switched.
    """
    parameters, setting = plan.all.now(), plan.setting(layer)
    versions: list[int] | None = None

    def run(*arguments, **named):
        nonlocal versions
        if versions is None:
            output = function(*arguments, **named)
            versions = [parameter._version for parameter in parameters]  # peft's LoRA on experts counts them up
            return output
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


# -- a node of autograd, and what it keeps ----------------------------------------------------------------------


class Node(torch.autograd.Function):
    """A layer or a half of one, as its :class:`Call` runs it."""

    @staticmethod
    def forward(ctx, state, call: Call, *tensors):
        ctx.call, call.needs_dstate = call, ctx.needs_input_grad[0]
        output, kept = call.forward(state)
        ctx.save_for_backward(*kept, *call.read)
        ctx.kept, call.read = len(kept), []
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        call, ctx.call = ctx.call, None
        if call is None:
            raise RuntimeError("a memory mode frees what it kept: backward runs once per forward")
        if call.setting != call.plan.setting(call.layer):
            raise RuntimeError(SWITCHED)
        saved = ctx.saved_tensors  # by which autograd notices that a parameter was changed in place
        parameters = saved[ctx.kept :]
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        with call.parameters.put_back(parameters):
            dstate, gradients = call.backward(saved[: ctx.kept], dy, trained)
        by_id = {id(tensor): gradient for tensor, gradient in gradients}
        return dstate, None, *(by_id.get(id(parameter)) for parameter in trained)


class Call:
    """One call of a layer or of a half of it, from its forward to its backward.

    Attributes:
        read: its parameters as they are now, until autograd has saved them.
        needs_dstate: whether the state needs a gradient.
        tickets: of what waits on the host, in the order in which it was pushed.
    """

    needs_dstate = False

    def __init__(
        self, plan: LayerPlan, layer: nn.Module, parameters: Parameters, state: torch.Tensor, arguments=(), named=None
    ):
        self.plan, self.layer, self.parameters = plan, layer, parameters
        self.halves: Any = plan.halves
        self.arguments, self.named = arguments, named or {}
        self.setting, self.read = plan.setting(layer), parameters.now()
        self.autocast = autocast_state(state)
        self.tickets: list[Waiting] = []

    def run(self, state: torch.Tensor) -> torch.Tensor:
        """The output, with this as its node of autograd."""
        return Node.apply(state, self, *(x for x in self.read if x.requires_grad))

    def forward(self, state: torch.Tensor) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """The output, and what autograd is to keep."""
        raise NotImplementedError

    def backward(self, saved: Sequence[torch.Tensor], dy: torch.Tensor, trained: list[torch.Tensor]) -> Gradients:
        """The gradients of the state, if that needs one, and of what is ``trained``, for the output's and what was
        ``saved``; the layer has the parameters of the forward."""
        raise NotImplementedError

    def start_drawing(self, device: torch.device) -> None:
        """From here on the forward's random numbers count: ``random.again()`` draws them once more."""
        self.draws = self.plan.draws()
        self.random = draw(self.layer, device) if self.draws else Still()

    def wait_on_host(self, *tensors: torch.Tensor, own: int = 1) -> None:
        self.tickets.append(self.host.push(*(tensor.detach() for tensor in tensors), own=own))

    @property
    def host(self) -> HostStates:
        assert self.plan.host is not None
        return self.plan.host

    def adapters(self, block: str, state: torch.Tensor) -> list[Active]:
        """The active adapters of a block's control, for a state."""
        return active(getattr(self.layer, f"{block}_control", None), state)


class AttentionCall(Call):
    """The attention block with its control; the backward does not compute the block's output (modes balanced and lean)."""

    def forward(self, state):
        keep = partial(self.keep, state)
        middle = self.halves.attention(state, *self.arguments, keep=keep, **self.named)
        return middle, [] if self.tickets else [state]

    def keep(self, state, *more):
        """``more``, which spares the projections, waits on the host where it is wanted and there is room."""
        lean = self.plan.mode == "lean"  # there the state waits anyway, and so will the one between the halves
        wanted = bool(more) and self.plan.attention_on_host and self.needs_dstate
        fits = wanted and self.host.has_room(state, *more, *([state] if lean else []))
        if fits or lean:
            # the state does too, so that a slow host costs time and no memory of the GPU's
            self.wait_on_host(state, *(more if fits and self.host.hides(state) else ()))

    def backward(self, saved, dy, trained):
        state, *kept = self.host.pop(self.tickets[0]) if self.tickets else saved
        state = state.detach().requires_grad_(self.needs_dstate)
        with self.autocast():
            # nothing but this node uses the state between the halves, so its gradient may be overwritten
            return self.attention_backward(state, kept, dy.contiguous(), trained)

    def attention_backward(self, state, kept, dy, trained):
        """The gradient of the attention half's state, if that needs one, and pairs of what is trained there and its gradient.
        ``dy`` is overwritten."""
        adapters = self.adapters("attention", state)
        own = control_parameters(adapters)
        others = _besides(trained, own)
        inputs = [*([state] if state.requires_grad else []), *others]
        with torch.enable_grad():
            found, of_control = self.halves.attention_gradients(
                state, dy, inputs, adapters, *self.arguments, kept=kept, **self.named
            )
        dstate = found.pop(0) if state.requires_grad else None
        return dstate, [*zip(own, of_control), *zip(others, found)]


class MlpCall(Call):
    """The MLP block with its control."""

    def forward(self, state):
        plan, adapters = self.plan, self.adapters("mlp", state)
        self.in_chunks = plan.keep == 0 and not control_draws(adapters)
        if self.in_chunks:
            if plan.mode == "lean":
                self.wait_on_host(state, own=0)
            return forward_in_chunks(plan, state, adapters), [] if self.tickets else [state]
        self.adapters_kept = adapters  # with their weights as they were cast
        keep = plan.keep if self.needs_dstate else 0  # the first layer's state may need no gradient
        output = torch.empty_like(state, memory_format=torch.contiguous_format)
        _, kept, control_kept = plan.mlp.forward(tokens(state), keep, adapters, out=tokens(output))
        self.split = len(kept)
        return output, [state, *kept, *control_kept]

    def backward(self, saved, dy, trained):
        plan, (state, *kept) = self.plan, self.host.pop(self.tickets[0]) if self.tickets else saved
        flat, dflat, needed = tokens(state), tokens(dy), self.needs_dstate
        with self.autocast():
            if self.in_chunks:
                adapters = self.adapters("mlp", state)
                dstate, sums = backward_in_chunks(plan, flat, dflat, adapters, needed)
            else:
                adapters = self.adapters_kept
                dstate = plan.mlp.backward(flat, kept[: self.split], dflat) if needed else None
                dstate, sums = control_backward(adapters, flat, kept[self.split :], dflat, dstate)
        return None if dstate is None else dstate.view(state.shape), zip(control_parameters(adapters), sums)


class LeanCall(Call):
    """A whole layer that keeps its input state alone, on the host while there is room, and works the MLP in token chunks."""

    def forward(self, state):
        host = self.plan.host
        self.start_drawing(state.device)
        if host is not None and host.room_for(state):
            self.wait_on_host(state)
        with self.random.first():
            middle = self.halves.attention(state, *self.arguments, **self.named)
            output = forward_in_chunks(self.plan, middle, self.adapters("mlp", middle))
        return output, [] if self.tickets else [state]

    def backward(self, saved, dy, trained):
        (state,) = self.host.pop(self.tickets[0]) if self.tickets else saved
        with self.autocast():
            adapters = self.adapters("mlp", state)
        state = state.detach().requires_grad_(self.needs_dstate)
        own = control_parameters(adapters)
        others = _besides(trained, own)
        inputs = [*([state] if state.requires_grad else []), *others]
        with self.autocast(), self.random.again(), torch.enable_grad():
            middle = self.halves.attention(state, *self.arguments, **self.named)
            # what the MLP drew must be drawn again even where its gradient is not wanted
            needed = bool(inputs) or self.draws
            flat, end = tokens(middle.detach()), get_gradient_edge(middle) if middle.requires_grad else None
            del middle
            dmiddle, sums = backward_in_chunks(self.plan, flat, tokens(dy), adapters, needed)
            del flat  # attention's backward needs its memory
        found: list = [None] * len(inputs)
        if dmiddle is not None and inputs and end is not None:  # else they are an inactive adapter's
            found = list(torch.autograd.grad([end], inputs, [dmiddle.view(dy.shape)], allow_unused=True))
        dstate = found.pop(0) if state.requires_grad else None
        return dstate, [*zip(own, sums), *zip(others, found)]


def _besides(parameters, *others):
    known = {id(parameter) for some in others for parameter in some}
    return [parameter for parameter in parameters if id(parameter) not in known]


def forward_in_chunks(plan: LayerPlan, state: torch.Tensor, adapters: Sequence[Active]) -> torch.Tensor:
    """The MLP block's output with its control, ``plan.chunk`` tokens at a time; nothing is kept."""
    output, mlp = torch.empty_like(state, memory_format=torch.contiguous_format), plan.mlp.for_chunks(state)
    for piece, into in zip(tokens(state).split(plan.chunk), tokens(output).split(plan.chunk)):
        mlp.forward(piece, 0, adapters, out=into)
    return output


@torch.no_grad()
def backward_in_chunks(
    plan: LayerPlan, state: torch.Tensor, dy: torch.Tensor, adapters: Sequence[Active], needed: bool
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """The gradient of :func:`forward_in_chunks`'s state ``(tokens, width)``, if ``needed``, and of the control."""
    dstate = torch.empty_like(state, memory_format=torch.contiguous_format) if needed else None
    mlp, drawn, drawing = plan.mlp.for_chunks(state), [], control_draws(adapters)
    for rows in (slice(start, start + plan.chunk) for start in range(0, len(state), plan.chunk)):
        if dstate is not None:
            mlp.backward(state[rows], (), dy[rows], out=dstate[rows])
        if drawing:  # MLP, then control, as in the forward: so dropout draws the same numbers
            drawn.append(control_hidden(adapters, state[rows]))
    hidden = [*map(torch.cat, zip(*drawn))] if drawing else control_hidden(adapters, state)
    return control_backward(adapters, state, hidden, dy, dstate)


def autocast_state(tensor: torch.Tensor) -> Callable[[], torch.autocast]:
    """A factory of contexts that bring back the autocast state of now."""
    device = tensor.device.type
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return partial(torch.autocast, device, dtype=dtype, enabled=enabled)


# -- random numbers of a model's layers -------------------------------------------------------------------------


def drawing_layers(model: nn.Module) -> dict[nn.Module, LayerPlan]:
    """The layers whose backward may draw random numbers once more, and how they train."""
    plans = {module: vars(module).get("memory_plan") for module in model.modules()}
    return {x: plan for x, plan in plans.items() if isinstance(plan, LayerPlan) and plan.mode != "fast" and plan.draws()}


def replays_random_numbers(model: nn.Module) -> bool:
    """Whether a layer does so in torch's checkpointing, which no CUDA graph can."""
    return any(
        plan.halves is None or plan.mlp.draws() or (plan.mode == "balanced" and plan.halves.recompute_attention)
        for plan in drawing_layers(model).values()
    )
