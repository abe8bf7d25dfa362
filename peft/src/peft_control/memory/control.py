"""The control's own forward and backward, for use inside hand-written backward passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from ..control_layer import ControlLayer
from ..fp8_kernels import compute_dtype
from . import kernels


def tuner_setting(tuner: Any) -> tuple:
    """What an adapter's layer computes besides its parameters."""
    scales = getattr(tuner, "alpha", None) or getattr(tuner, "scaling", {})
    if isinstance(tuner, ControlLayer):
        drops = dict(tuner.dropout)
    else:
        drops = {name: getattr(drop, "p", 0.0) for name, drop in getattr(tuner, "lora_dropout", {}).items()}
    return tuner.training, tuner.disable_adapters, list(tuner.active_adapters), dict(scales), drops


SWITCHED = (
    "between a forward and its backward adapters were switched, or training and evaluation: that takes memory mode 'plain'"
)


class Active(NamedTuple):
    """An active adapter of a control: A and B, alpha, and the probability of its dropout, or 0 while none is drawn; the weights
    in the type of the computation too, where a cast is worth a launch."""

    down: nn.Linear
    up: nn.Linear
    alpha: float
    drop: float
    A: torch.Tensor
    B: torch.Tensor


#: With fewer tokens casting a weight takes longer than reading it as it is.
_CAST_FROM = 2048


def active(control: ControlLayer | None, state: torch.Tensor | None = None) -> list[Active]:
    """The active adapters of a control; their weights are cast once for all chunks of a ``state``, if that is given."""
    if control is None or control.disable_adapters:
        return []
    cast = None
    if state is not None and state.numel() >= _CAST_FROM * state.shape[-1]:
        cast = compute_dtype(state)
    found = []
    for name in control.active_adapters:
        if name in control.control_A:
            down, up = control.linears(name)
            weights = (down.weight.to(cast), up.weight.to(cast)) if cast else (down.weight, up.weight)
            drop = control.dropout[name] if control.training else 0.0
            found.append(Active(down, up, control.alpha[name], drop, *weights))
    return found


def control_parameters(adapters: Sequence[Active]) -> list[torch.Tensor]:
    """Their weights and biases, in the order in which :func:`control_backward` returns their gradients."""
    linears = [linear for adapter in adapters for linear in (adapter.down, adapter.up)]
    return [parameter for linear in linears for parameter in (linear.weight, linear.bias) if parameter is not None]


def control_draws(adapters: Sequence[Active]) -> bool:
    """Whether dropout draws random numbers now."""
    return any(adapter.drop > 0.0 for adapter in adapters)


def control_hidden(adapters: Sequence[Active], state) -> list[torch.Tensor]:
    """What the control's backward needs beside the state ``(tokens, width)``: for each adapter A(state) after dropout
    ``(tokens, rank)`` and, with dropout, the mask."""
    kept = []
    dtype = compute_dtype(state) if adapters else None
    for down, _, _, drop, A, _ in adapters:
        hidden = F.linear(state.to(dtype), A.to(dtype), None if down.bias is None else down.bias.to(dtype))
        kept += torch.native_dropout(hidden, drop, True) if drop > 0.0 else [hidden]
    return kept


def add_control(adapters: Sequence[Active], kept, change, state=None, out=None):
    """``change + sum of alpha * B(A(state))`` and, for a pre-norm block, ``+ state``; ``(tokens, width)``, in ``out`` if
    given.

    ``change`` is what the frozen block adds to the state. All of it is summed before it is rounded once: a control that is
    small against the other two would else be rounded away in half precision, each time and not on average.
    """
    kept = list(kept)
    for adapter in adapters:
        hidden = kept.pop(0)
        if adapter.drop > 0.0:
            kept.pop(0)
        last = {"residual": state, "out": out} if adapter is adapters[-1] else {}
        change = kernels.add_low_rank(change, hidden, adapter.B.t(), scale=adapter.alpha, bias=adapter.up.bias, **last)
    if adapters:
        return change
    if state is not None:
        change = change.add_(state) if change.dtype == state.dtype else state + change
    return change if out is None else out.copy_(change)


def control_backward(adapters: Sequence[Active], state, kept, dy, dstate, in_place=True):
    """Add the control's part of the state's gradient to ``dstate``, which may be ``dy`` itself, unless that is None;
    return the sum, and the gradients of :func:`control_parameters` in the parameters' dtypes."""
    gradients, through, kept = [], [], list(kept)
    for down, up, alpha, drop, A, B in adapters:
        hidden = kept.pop(0)
        dtype = hidden.dtype
        dy_c, state_c = dy.to(dtype), state.to(dtype)
        dhidden = _scaled(dy_c @ B.to(dtype), alpha)
        d_up = _scaled(_product(dy_c.t(), hidden, up.weight.dtype), alpha)
        if drop > 0.0:
            dhidden = dhidden * kept.pop(0) / (1.0 - drop)
        gradients.append(_product(dhidden.t(), state_c, down.weight.dtype))
        if down.bias is not None:
            gradients.append(dhidden.sum(0, dtype=down.bias.dtype))
        gradients.append(d_up)
        if up.bias is not None:
            gradients.append(dy.sum(0, dtype=up.bias.dtype).mul_(alpha))
        through.append((dhidden, A))
    for dhidden, A in through if dstate is not None else ():
        dstate = kernels.add_low_rank(dstate, dhidden, A, out=dstate if in_place else None)
        in_place = True  # it is ours from here on
    return dstate, gradients


def _product(a, b, dtype):
    """``a @ b`` in ``dtype``, not rounded to a narrower one first where cuBLAS can do that, which saves a kernel too."""
    if a.is_cuda and dtype == torch.float32 and a.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def _scaled(x, alpha):
    return x if alpha == 1 else x.mul_(alpha)


class AddControl(torch.autograd.Function):
    """``state + change + alpha * B(A(state))``: a pre-norm block's residual sum and its control in one node.

    Keeps the state, which the block's norm keeps anyway, A(state), and the adapters' weights as they were cast.
    """

    @classmethod
    def add(cls, state, change, control: ControlLayer | None):
        adapters = active(control)
        if not adapters:
            return state + change  # keeps nothing
        if not torch.is_grad_enabled():
            return _controlled(control, state, change)[0]
        return cls.apply(state, change, control, *control_parameters(adapters))

    @staticmethod
    def forward(ctx, state, change, control, *parameters):
        output, kept, ctx.adapters = _controlled(control, state, change)
        ctx.control, ctx.change_dtype, ctx.setting = control, change.dtype, tuner_setting(control)
        ctx.save_for_backward(state, *parameters, *kept)  # parameters, so that autograd notices what was changed in place
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        if ctx.setting != tuner_setting(ctx.control):
            raise RuntimeError(SWITCHED)
        state, *rest = ctx.saved_tensors
        kept = rest[len(control_parameters(ctx.adapters)) :]
        flat = dy.reshape(-1, dy.shape[-1])
        dstate = flat if ctx.needs_input_grad[0] else None
        dstate, gradients = control_backward(ctx.adapters, state.reshape(flat.shape), kept, flat, dstate, in_place=False)
        dstate = None if dstate is None else dstate.view(dy.shape)
        return dstate, dy.to(ctx.change_dtype), None, *gradients


def _controlled(control, state, change):
    width = state.shape[-1]
    flat, adapters = state.reshape(-1, width), active(control, state)
    kept = control_hidden(adapters, flat)
    return add_control(adapters, kept, change.reshape(-1, width), flat).view(state.shape), kept, adapters
