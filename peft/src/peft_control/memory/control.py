"""The control's own forward and backward, for use inside hand-written backward passes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from ..control_layer import ControlLayer
from ..fp8_kernels import compute_dtype
from . import kernels
from .exact import Parameters


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
    """An active adapter of a control: A, B, alpha, and the probability of its dropout, or 0 while none is drawn."""

    down: nn.Linear
    up: nn.Linear
    alpha: float
    drop: float


def _active(control: ControlLayer | None) -> list[Active]:
    if control is None or control.disable_adapters:
        return []
    drop = control.dropout if control.training else dict.fromkeys(control.dropout, 0.0)
    names = [name for name in control.active_adapters if name in control.control_A]
    pairs = [control.linears(name) for name in names]
    return [Active(down, up, control.alpha[name], drop[name]) for name, (down, up) in zip(names, pairs)]


def control_parameters(control: ControlLayer | None) -> list[torch.Tensor]:
    """Weights and biases of the active adapters, in the order in which :func:`control_backward` returns
    their gradients."""
    linears = [linear for adapter in _active(control) for linear in (adapter.down, adapter.up)]
    return [parameter for linear in linears for parameter in (linear.weight, linear.bias) if parameter is not None]


def control_draws(control: ControlLayer | None) -> bool:
    """Whether the control's dropout draws random numbers now."""
    return any(adapter.drop > 0.0 for adapter in _active(control))


def control_hidden(control: ControlLayer | None, state) -> list[torch.Tensor]:
    """What the control's backward needs beside the state ``(tokens, width)``: for each active adapter A(state)
    after dropout ``(tokens, rank)`` and, with dropout, the mask."""
    kept = []
    for down, _, _, drop in _active(control):
        dtype = compute_dtype(state)
        hidden = F.linear(state.to(dtype), down.weight.to(dtype), None if down.bias is None else down.bias.to(dtype))
        kept += torch.native_dropout(hidden, drop, True) if drop > 0.0 else [hidden]
    return kept


def add_control(control: ControlLayer | None, kept, change, state=None, out=None):
    """``change + sum of alpha * B(A(state))`` and, for a pre-norm block, ``+ state``; ``(tokens, width)``, in ``out`` if
    given.

    ``change`` is what the frozen block adds to the state. All of it is summed before it is rounded once: a control that is
    small against the other two would else be rounded away in half precision, each time and not on average.
    """
    kept, adapters = list(kept), _active(control)
    for adapter in adapters:
        hidden, up = kept.pop(0), adapter.up
        if adapter.drop > 0.0:
            kept.pop(0)
        last = {"residual": state, "out": out} if adapter is adapters[-1] else {}
        change = kernels.add_low_rank(change, hidden, up.weight.t(), scale=adapter.alpha, bias=up.bias, **last)
    if adapters:
        return change
    if state is not None:
        change = change.add_(state) if change.dtype == state.dtype else state + change
    return change if out is None else out.copy_(change)


def control_backward(control: ControlLayer | None, state, kept, dy, dstate, in_place=True):
    """Add the control's part of the state's gradient to ``dstate``, which may be ``dy`` itself, unless that is None;
    return the sum, and the gradients of :func:`control_parameters` in the parameters' dtypes."""
    gradients, through, kept = [], [], list(kept)
    for down, up, alpha, drop in _active(control):
        hidden = kept.pop(0)
        dtype = hidden.dtype
        dy_c, state_c = dy.to(dtype), state.to(dtype)
        dhidden = _scaled(dy_c @ up.weight.to(dtype), alpha)
        d_up = _scaled(_product(dy_c.t(), hidden, up.weight.dtype), alpha)
        if drop > 0.0:
            dhidden = dhidden * kept.pop(0) / (1.0 - drop)
        gradients.append(_product(dhidden.t(), state_c, down.weight.dtype))
        if down.bias is not None:
            gradients.append(dhidden.sum(0, dtype=down.bias.dtype))
        gradients.append(d_up)
        if up.bias is not None:
            gradients.append(dy.sum(0, dtype=up.bias.dtype).mul_(alpha))
        through.append((dhidden, down.weight))
    for dhidden, weight in through if dstate is not None else ():
        dstate = kernels.add_low_rank(dstate, dhidden, weight, out=dstate if in_place else None)
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

    Keeps the state, which the block's norm keeps anyway, and A(state).
    """

    @classmethod
    def add(cls, state, change, control: ControlLayer | None):
        if not _active(control):
            return state + change  # keeps nothing
        return cls.apply(state, change, control, *control_parameters(control))

    @staticmethod
    def forward(ctx, state, change, control, *parameters):
        width = state.shape[-1]
        flat = state.reshape(-1, width)
        kept = control_hidden(control, flat)
        output = add_control(control, kept, change.reshape(-1, width), flat)
        ctx.control, ctx.change_dtype, ctx.kept = control, change.dtype, len(kept)
        ctx.parameters, ctx.setting = Parameters(control.modules()), tuner_setting(control)
        ctx.save_for_backward(state, *kept, *ctx.parameters.now())
        return output.view(state.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        if ctx.setting != tuner_setting(ctx.control):
            raise RuntimeError(SWITCHED)
        state, *rest = ctx.saved_tensors
        kept, parameters = rest[: ctx.kept], rest[ctx.kept :]
        flat = dy.reshape(-1, dy.shape[-1])
        dstate = flat if ctx.needs_input_grad[0] else None
        with ctx.parameters.put_back(parameters):
            dstate, gradients = control_backward(ctx.control, state.reshape(flat.shape), kept, flat, dstate, in_place=False)
        dstate = None if dstate is None else dstate.view(dy.shape)
        return dstate, dy.to(ctx.change_dtype), None, *gradients
