"""The control's own forward and backward, for use inside hand-written backward passes."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..layer import ControlLayer
from .linear import compute_dtype


def control_parameters(control: ControlLayer | None) -> list[torch.Tensor]:
    """Weights and biases of the active adapters, in the order in which :func:`control_backward` returns
    their gradients."""
    return [
        parameter
        for name in _active(control)
        for linear in (control.control_A[name], control.control_B[name])
        for parameter in (linear.weight, linear.bias)
        if parameter is not None
    ]


def control_hidden(control: ControlLayer | None, state) -> list[torch.Tensor]:
    """What the control's backward needs beside the state ``(tokens, width)``: for each active adapter A(state)
    after dropout ``(tokens, rank)`` and, with dropout, the mask."""
    kept = []
    for name in _active(control):
        dtype = compute_dtype(state)
        hidden = F.linear(state.to(dtype), *_cast(control.control_A[name], dtype))
        if _drops(control, name):
            kept += torch.native_dropout(hidden, control.dropout[name], True)
        else:
            kept += [hidden]
    return kept


def add_control(control: ControlLayer | None, kept, change):
    """``change + sum of alpha * B(A(state))``, ``(tokens, width)``.

    ``change`` is what the frozen block adds to the state. The control goes there, and not into the residual sum: a
    control that is small against the state would be rounded away in half precision, each time and not on average.
    """
    kept = list(kept)
    for name in _active(control):
        hidden, alpha = kept.pop(0), control.alpha[name]
        if _drops(control, name):
            kept.pop(0)
        weight, bias = _cast(control.control_B[name], hidden.dtype)
        if change.dtype == hidden.dtype:
            change = torch.addmm(change, hidden, weight.t(), alpha=alpha)
        else:
            change = torch.add(change, hidden @ weight.t(), alpha=alpha)
        if bias is not None:
            change.add_(bias, alpha=alpha)
    return change


def add_residual_(change, state):
    """``state + change``, in ``change``'s memory where the dtypes allow it."""
    return change.add_(state) if change.dtype == state.dtype else state + change


def control_backward(control: ControlLayer | None, state, kept, dy, dstate) -> list[torch.Tensor]:
    """Add the control's part of the state's gradient to ``dstate`` in place, unless that is None; return the
    gradients of :func:`control_parameters` in the parameters' dtypes."""
    gradients, kept = [], list(kept)
    for name in _active(control):
        down, up = control.control_A[name], control.control_B[name]
        hidden = kept.pop(0)
        dtype = hidden.dtype
        dy_c, state_c = dy.to(dtype), state.to(dtype)
        dhidden = (dy_c @ up.weight.to(dtype)).mul_(control.alpha[name])
        d_up = (dy_c.t() @ hidden).to(up.weight.dtype).mul_(control.alpha[name])
        if _drops(control, name):
            dhidden = dhidden * kept.pop(0) / (1.0 - control.dropout[name])
        gradients.append((dhidden.t() @ state_c).to(down.weight.dtype))
        if down.bias is not None:
            gradients.append(dhidden.sum(0, dtype=down.bias.dtype))
        gradients.append(d_up)
        if up.bias is not None:
            gradients.append(dy.sum(0, dtype=up.bias.dtype).mul_(control.alpha[name]))
        if dstate is not None and dstate.dtype == dtype:
            dstate.addmm_(dhidden, down.weight.to(dtype))
        elif dstate is not None:
            dstate.add_(dhidden @ down.weight.to(dtype))
    return gradients


def control_draws(control: ControlLayer | None) -> bool:
    """Whether the control's dropout draws random numbers now."""
    return any(_drops(control, name) for name in _active(control))


def _active(control: ControlLayer | None) -> list[str]:
    if control is None or control.disable_adapters:
        return []
    return [name for name in control.active_adapters if name in control.control_A]


def _drops(control: ControlLayer, name: str) -> bool:
    return control.training and control.dropout[name] > 0.0


def _cast(linear, dtype):
    return linear.weight.to(dtype), None if linear.bias is None else linear.bias.to(dtype)


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
        flat = state.view(-1, width)
        kept = control_hidden(control, flat)
        output = add_residual_(add_control(control, kept, change.reshape(-1, width)), flat)
        ctx.control, ctx.change_dtype = control, change.dtype
        ctx.save_for_backward(state, *kept)
        return output.view(state.shape)

    @staticmethod
    def backward(ctx, dy):
        state, *kept = ctx.saved_tensors
        width = state.shape[-1]
        dstate = dy.clone(memory_format=torch.contiguous_format) if ctx.needs_input_grad[0] else None
        gradients = control_backward(
            ctx.control,
            state.view(-1, width),
            kept,
            dy.reshape(-1, width),
            None if dstate is None else dstate.view(-1, width),
        )
        return dstate, dy.to(ctx.change_dtype), None, *gradients
