"""Experts of a mixture stored in 8-bit floating point: half the weights' memory, dequantized while their layer runs.

Experts are 3-D parameters, which each of transformers' implementations multiplies in its own way. So what is quantized here
is their storage alone: for a forward the matrices come back in the type of the computation, which holds them exactly, and
the experts' own forward runs on them. Autograd keeps the bytes' places instead, and the backward dequantizes once more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from .fp8_kernels import compute_dtype, dequantize_rows, quantize_rows


class InFp8(nn.Module):
    """A module with frozen weights in e4m3.

    Attributes:
        stored: the names of the weights ``(..., rows, columns)``, e4m3's bytes as uint8: whoever casts a model's
            floating-point parameters leaves them alone. Beside each lies ``NAME_scale``, float32 powers of two, one a row.
    """

    stored: tuple[str, ...] = ("weight",)

    def _apply(self, fn, recurse=True):
        places = [f"{name}_scale" for name in self.stored if self._parameters[f"{name}_scale"] is not None]
        scales = {name: self._parameters[name].data for name in places}
        super()._apply(fn, recurse)
        for name, scale in scales.items():
            parameter = self._parameters[name]
            if parameter.dtype != torch.float32:  # it was cast, and float16 does not hold small ones
                parameter.data = scale.to(parameter.device)
        return self


def frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def quantized(weight: torch.Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    """What stores ``weight``: bytes of its shape and the scales ``(rows, 1)``, of a stack of matrices ``(experts, rows)``."""
    q, scale = quantize_rows(weight.detach().flatten(0, -2))
    return frozen(q.view(torch.uint8).view(weight.shape)), frozen(scale if weight.dim() == 2 else scale.view(weight.shape[:-1]))


def is_experts(module: nn.Module) -> bool:
    """Whether ``module`` holds the matrices of experts, in 16 bits or more."""
    return not type(module).__module__.startswith("torch.") and any(map(_is_stack, module._parameters.values()))


def _is_stack(parameter):
    return parameter is not None and parameter.dim() == 3 and parameter.is_floating_point() and parameter.element_size() > 1


class Fp8Experts(InFp8):
    """Frozen experts with e4m3 weights: the parameters, modules and attributes of those that it stands for, by their names.

    A row of a matrix, along its last dimension, has one scale: that is an output channel, or an input channel of experts that
    are stored transposed (gpt-oss, Llama 4).

    Attributes:
        kind: the experts' own class, whose forward runs.
    """

    @classmethod
    def of(cls, experts: nn.Module) -> Fp8Experts:
        """What stands for ``experts``, on their device; of those on the meta device without values."""
        new = cls()
        stored = tuple(name for name, parameter in experts._parameters.items() if _is_stack(parameter))
        vars(new).update(vars(experts), _parameters=dict(experts._parameters), kind=type(experts), stored=stored)
        for name in stored:
            new._parameters[name], new._parameters[f"{name}_scale"] = quantized(experts._parameters[name])
        return new.requires_grad_(False)

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
        """The weights by their names, which bfloat16 and float32 hold exactly."""
        return {name: dequantize_rows(*self._bytes(name), dtype) for name in self.stored}

    def _bytes(self, name):
        return self._parameters[name], self._parameters[f"{name}_scale"]

    @torch.compiler.disable
    def forward(self, *arguments, **named):
        if not self._parameters.keys() >= {*self.stored}:  # parametrized
            raise ValueError("experts in FP8 take no LoRA on their weights (target_parameters): leave one of the two out")
        x = next(value for value in (*arguments, *named.values()) if isinstance(value, torch.Tensor))
        dtype, held = compute_dtype(x), _held.get()
        if held is None:
            weights = self.dequantize(dtype)
            saving = _places_saved({weights[name].untyped_storage().data_ptr(): self._bytes(name) for name in self.stored})
        else:
            if (self, dtype) not in held:
                held[self, dtype] = self.dequantize(dtype)
            weights, saving = held[self, dtype], nullcontext()
        experts = object.__new__(self.kind)
        vars(experts).update(vars(self), _parameters={**self._parameters, **weights})
        with saving:
            return self.kind.forward(experts, *arguments, **named)

    def extra_repr(self) -> str:
        return f"{self.kind.__name__}, {', '.join(f'{name}={tuple(self._parameters[name].shape)}' for name in self.stored)}"


_held: ContextVar[dict | None] = ContextVar("held", default=None)


@contextmanager
def dequantized_once() -> Iterator[None]:
    """Within, experts that run several times are dequantized once, and their weights are kept."""
    before = _held.set({})
    try:
        yield
    finally:
        _held.reset(before)


class _Place(NamedTuple):
    """Where a tensor lay in a dequantized weight."""

    weight: torch.Tensor
    scale: torch.Tensor
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]

    def tensor(self):
        size = self.weight[0].numel()
        first, last = self.offset // size, self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.stride))
        experts = slice(first, last // size + 1)  # in a loop over experts it is one
        part = dequantize_rows(self.weight[experts], self.scale[experts], self.dtype)
        return part.as_strided(self.shape, self.stride, self.offset - first * size)


def _places_saved(weights):
    """Within, autograd saves places for what lies in the storages of dequantized ``weights``, by their addresses, and all else
    as it would, which may be torch's checkpointing."""
    others = torch._C._autograd._top_saved_tensors_default_hooks(False) or (_same, _same)

    def pack(x):
        found = weights.get(x.untyped_storage().data_ptr())
        return others[0](x) if found is None else _Place(*found, x.dtype, x.storage_offset(), x.shape, x.stride())

    return saved_tensors_hooks(pack, lambda kept: kept.tensor() if isinstance(kept, _Place) else others[1](kept))


def _same(kept):
    return kept
