"""Frozen linear layers inside hand-written backward passes: dense, FP8, or bitsandbytes 4-bit and 8-bit."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..fp8 import FORMATS, Fp8Linear, gradient_of_rows
from ..fp8_kernels import compute_dtype, quantize_rows, transposed
from . import kernels
from .exact import is_as_written

#: Where transformers has the layers of bases that are stored in FP8 with a scale a block (`weight_scale_inv`).
_BLOCK_FP8 = "transformers.integrations.finegrained_fp8"


def is_frozen_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer of a kind known here, without trainable parameters or adapter."""
    return is_known_linear(module) and not any(parameter.requires_grad for parameter in module.parameters())


def is_known_linear(module: nn.Module | None) -> bool:
    """Whether ``module`` computes ``x @ weight.T`` with a weight as it is, in FP8, or as bitsandbytes or transformers pack
    it, and nothing else."""
    if not isinstance(module, nn.Linear) or isinstance(module, BaseTunerLayer):
        return False
    kind = type(module)
    known = kind.forward in (nn.Linear.forward, Fp8Linear.forward) or kind.__module__.startswith(("bitsandbytes", _BLOCK_FP8))
    return known and is_as_written(module)


def cast_once(linear: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    """``linear`` with its weights in ``dtype``, for many uses: autocast casts a frozen weight at each of them, and
    bitsandbytes dequantizes 4 bits. FP8 and 8 bits stay."""
    four_bits = getattr(linear.weight, "quant_state", None) is not None
    if not four_bits and (type(linear) is not nn.Linear or linear.weight.dtype == dtype):
        return linear
    bias = None if linear.bias is None else linear.bias.to(dtype)
    return _twin(linear, nn.Linear, weight=dense_weight(linear, dtype), bias=bias)


def rows_are_apart(linears: Sequence[nn.Linear]) -> bool:
    """Whether :func:`rows_of` takes ``linears``: bitsandbytes' products of 8 bits are its own."""
    kinds = {(isinstance(linear, Fp8Linear), linear.bias is None) for linear in linears}
    return len(kinds) == 1 and not any(linear.weight.dtype == torch.int8 for linear in linears)


class Joined:
    """Frozen linear layers of one input. Once they are :meth:`joined <join>`, one product computes them all.

    They stay parameters with storages of their own, which is how they are saved, loaded and moved.
    """

    def __init__(self, linears: Sequence[nn.Linear]):
        self.linears = [*linears]
        self._whole: nn.Linear | None = None

    def join(self, device: str) -> None:
        """Lay their parameters one behind the other in memory, if all are dense or all FP8 and on such a ``device``."""
        if not all(map(is_frozen_linear, self.linears)):
            return
        (kind, data, place, full, *_), *others = {
            (type(x), type(x.weight.data), x.weight.device.type, x.weight.numel() > 0, x.weight.dtype, x.bias is None)
            for x in self.linears
        }
        if not others and kind in (nn.Linear, Fp8Linear) and data is torch.Tensor and place == device and full:
            self._whole = rows_of(self.linears, [slice(None)] * len(self.linears))
            for parameter, part in self._parts(self._whole):
                parameter.data = torch.from_dlpack(part)

    def now(self) -> list[nn.Linear]:
        """One layer for all, while their parameters are where :meth:`join` has put them and nothing is hooked to them; else they
        themselves."""
        if self._whole is not None:
            hooked = any(x._forward_hooks or x._forward_pre_hooks or "forward" in vars(x) for x in self.linears)
            if not hooked and all(parameter.data_ptr() == part.data_ptr() for parameter, part in self._parts(self._whole)):
                return [self._whole]
            self._whole = None
        return self.linears

    def take_over(self, other: Joined) -> None:
        """What ``other`` has joined, if those are the same layers."""
        if other.linears == self.linears:
            self._whole = other._whole

    def _parts(self, whole: nn.Linear) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        """Pairs of a layer's parameter and its part of the ``whole``'s."""
        for name, joined in whole._parameters.items():
            if joined is not None:
                parts = joined.data.split([linear.out_features for linear in self.linears])
                yield from zip((linear.get_parameter(name) for linear in self.linears), parts)


def rows_of(linears: Sequence[nn.Linear], rows: Sequence[slice]) -> nn.Linear:
    """One layer that computes some outputs of each of ``linears``, which are dense or FP8, one behind the other."""
    named = {
        name: None if parameter is None else torch.cat([getattr(x, name)[part] for x, part in zip(linears, rows)])
        for name, parameter in linears[0]._parameters.items()
    }
    return _twin(linears[0], type(linears[0]), **named)


def _twin(linear, kind, **tensors):
    """A copy of ``linear`` of class ``kind`` with other parameters."""
    twin = copy.copy(linear)
    twin.__class__ = kind
    twin._parameters = {name: None if x is None else nn.Parameter(x, requires_grad=False) for name, x in tensors.items()}
    twin.out_features = len(tensors["weight"])
    return twin


def dense_weight(linear: Any, dtype: torch.dtype) -> torch.Tensor:
    """The weight ``(out, in)`` in ``dtype``, dequantized if need be."""
    weight = linear.weight
    if isinstance(linear, Fp8Linear):
        return linear.dequantize().to(dtype)
    if getattr(weight, "quant_state", None) is not None:  # Linear4bit
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).to(dtype)
    if weight.dtype == torch.int8:  # Linear8bitLt: row-wise absolute maxima
        scale = weight.SCB if getattr(weight, "SCB", None) is not None else linear.state.SCB
        return (weight.float() * (scale / 127.0)[:, None]).to(dtype)
    if hasattr(linear, "weight_scale_inv"):  # a float for the layer, or one for each block of the weight
        scale = linear.weight_scale_inv.float()
        for side, length in enumerate(linear.block_size or ()):
            scale = scale.repeat_interleave(length, side).narrow(side, 0, weight.shape[side])
        return (weight.float() * scale).to(dtype)
    return weight.to(dtype)


def outputs(x: torch.Tensor, *linears: nn.Linear) -> tuple[torch.Tensor, ...]:
    """The outputs of frozen linear layers of one input ``(..., in)``, which is quantized once if all are FP8."""
    if not all(isinstance(linear, Fp8Linear) for linear in linears):
        return tuple(linear(x) for linear in linears)
    rows = ready(x.reshape(-1, x.shape[-1]), linears[0])
    return tuple(of_ready(rows, linear, compute_dtype(x)).view(*x.shape[:-1], linear.out_features) for linear in linears)


def outputs_of_normal(x: torch.Tensor, norm: Any, *linears: nn.Linear) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """The outputs of frozen linear layers of ``RMSNorm(x)``, for ``x`` ``(tokens, in)``, and the norm's factors."""
    if x.dtype == compute_dtype(x) and all(isinstance(linear, Fp8Linear) for linear in linears):
        rows, rstd = kernels.rms_norm_rows(x, norm.weight, norm.variance_epsilon)
        return tuple(of_ready(rows, linear, x.dtype) for linear in linears), rstd
    normal, rstd = kernels.rms_norm(x, norm.weight, norm.variance_epsilon)
    return outputs(normal, *linears), rstd


def ready(x: torch.Tensor, linear: nn.Linear) -> tuple[torch.Tensor, ...]:
    """What ``linear`` and others of its kind multiply of an input ``(tokens, in)``."""
    x = x.to(compute_dtype(x))
    return quantize_rows(x) if isinstance(linear, Fp8Linear) else (x,)


def of_ready(rows: tuple[torch.Tensor, ...], linear: nn.Linear, dtype: torch.dtype) -> torch.Tensor:
    """The output ``(tokens, out)`` for what :func:`ready` gave."""
    return linear.of_rows(rows[0], rows[1], dtype) if isinstance(linear, Fp8Linear) else linear(*rows)


def input_gradient(dy: torch.Tensor, linear: nn.Linear, add_to: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``dy @ weight``, the gradient of the linear layer's input; accumulated into ``add_to`` if given."""
    if isinstance(linear, Fp8Linear):
        dx = linear.input_gradient(dy)
        return dx if add_to is None else add_to.add_(dx)
    weight = dense_weight(linear, dy.dtype)
    return dy @ weight if add_to is None else add_to.addmm_(dy, weight)


def joint_format(linears: Sequence[nn.Linear]) -> tuple[torch.dtype, list[torch.Tensor]] | None:
    """If all ``linears`` are FP8, so that the gradient of an input that they share is one product: the format of their outputs'
    gradients, and what multiplies each before they are quantized as one row."""
    found = [linear for linear in linears if isinstance(linear, Fp8Linear)]
    if len(found) < len(linears):
        return None
    return FORMATS[found[0].gradients], [linear.weight_scale.float() for linear in found]


def joint_gradient(rows: torch.Tensor, linears: Sequence[nn.Linear]) -> torch.Tensor:
    """The shared input's gradient in bfloat16 for the quantized gradients of the outputs, side by side in ``rows``, as
    :func:`joint_format` says. The rows' scales are left for what reads it: wide products without them are faster."""
    return gradient_of_rows((rows, None), transposed(*(linear.weight for linear in linears)), torch.bfloat16)
