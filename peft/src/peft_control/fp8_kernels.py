"""What FP8 needs beside its matmuls, each in one pass over memory: rows quantized and dequantized, bytes transposed.

Every function has a pure torch path (CPU, and the reference for tests) and, on GPUs that have FP8 and where Triton is
installed, a kernel that gives the same bits.
"""

from __future__ import annotations

import functools
import math

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU-only and Windows builds of torch
    triton = None

_SMALLEST = 2.0**-100  # a row below it is quantized as if it reached it, so that scales stay normal numbers


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a linear layer works on ``x``: autocast's, if that is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


@functools.cache
def has_fp8(device: torch.device) -> bool:
    """Whether a device multiplies FP8: NVIDIA's GPUs from compute capability 8.9 on."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 9)


def uses_kernels(x: torch.Tensor) -> bool:
    return triton is not None and x.is_cuda and has_fp8(x.device)


def quantize_rows(
    x: torch.Tensor, dtype: torch.dtype = torch.float8_e4m3fn, columns: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each row of ``x`` ``(rows, width)`` to ``dtype``; before that multiply by ``columns``, ``width`` powers of two.

    Returns:
        ``(q, scale)`` with ``q * scale`` near ``x``; ``scale`` ``(rows, 1)`` is float32: the least power of two with
        which the row fits, so that no finite number overflows. A row with NaN or infinity becomes NaN as a whole: there is
        no infinity in e4m3, and a loss scaler must see it.
    """
    rows, width = x.shape  # no more dimensions, which the kernels would not see
    if uses_kernels(x):
        x = x.contiguous()
        q, scale = empty_rows(x, width, dtype)
        if rows:
            _quantize_rows_kernel[(rows,)](
                x, columns, q, scale, width, HAS_COLUMNS=columns is not None, **row_launch(width, dtype)
            )
        return q, scale
    wide = x if x.dtype == torch.bfloat16 and columns is None else x.float()
    if columns is not None:
        wide = wide * columns.view(1, -1)
    fraction, exponent = math.frexp(torch.finfo(dtype).max)
    low, high = torch.aminmax(wide, dim=-1, keepdim=True)
    largest = torch.maximum(-low, high).float().clamp(min=_SMALLEST)
    part, _ = torch.frexp(largest)
    # each step is exact, on every device; infinity / infinity is NaN
    scale = largest * 2.0**-exponent / part * (1.0 + (part > fraction))
    return (wide * scale.reciprocal().to(wide.dtype)).to(dtype), scale


def dequantize_rows(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """What e4m3's bytes ``(..., rows, width)`` stand for, with a scale for each row; bfloat16 and float32 hold it exactly."""
    if uses_kernels(weight):
        weight, scale = weight.contiguous(), scale.contiguous()
        wide, width = torch.empty_like(weight, dtype=dtype), weight.shape[-1]
        _dequantize_rows_kernel[(weight.numel() // width,)](weight, scale, wide, width, **row_launch(width, None))
        return wide
    wide = weight.view(torch.float8_e4m3fn).to(dtype)
    return wide.mul_(scale.view(*weight.shape[:-1], 1).to(torch.float32 if dtype == torch.float16 else dtype))


def transposed(*weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy ``(columns, rows)`` of bytes ``(rows, columns)``, of several weights side by side, and the scales
    ``(1, columns)`` of a product without any: ones, which the same kernel writes."""
    rows, columns = sum(map(len, weights)), weights[0].shape[1]
    if not uses_kernels(weights[0]):
        return torch.cat(weights).t().contiguous(), torch.ones(1, columns, device=weights[0].device)
    out, start = weights[0].new_empty(columns, rows), 0
    ones = torch.empty(1, columns, dtype=torch.float32, device=out.device)
    for weight in weights:
        grid, place = (-(-columns // _TILE), -(-len(weight) // _TILE)), out[:, start:] if start else out
        _transpose_kernel[grid](weight.contiguous(), place, ones, len(weight), columns, rows, TILE=_TILE, num_warps=8)
        start += len(weight)
    return out, ones


def empty_rows(x: torch.Tensor, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a kernel puts the quantized rows of something as long as ``x``."""
    q = torch.empty(len(x), width, dtype=dtype, device=x.device)
    return q, torch.empty(len(x), 1, dtype=torch.float32, device=x.device)


@functools.cache
def row_launch(width: int, dtype: torch.dtype | None = torch.float8_e4m3fn) -> dict[str, int]:
    """Settings of one program a row, which quantizes to ``dtype`` if that is given."""
    block = power_of_2(width)
    quantizes = {} if dtype is None else {"EXPONENT": exponent_of(dtype)}
    return {"BLOCK": block, **quantizes, "num_warps": min(max(block // 512, 1), 32)}


def power_of_2(number: int) -> int:
    """The least from ``number`` on; a call of triton's own takes as long as a launch."""
    return 1 << (number - 1).bit_length()


def exponent_of(dtype: torch.dtype) -> int:
    return math.frexp(torch.finfo(dtype).max)[1]


_TILE = 128

if triton is not None:

    @triton.jit
    def larger(one, other):
        """NaN if one is, for one instruction."""
        return tl.maximum(one, other, propagate_nan=tl.PropagateNan.ALL)

    @triton.jit
    def factor_of(magnitudes, scale, EXPONENT: tl.constexpr):
        """Store the scale of a row of such ``magnitudes``; return its reciprocal. Both formats' largest number is
        0.875 * 2 ** EXPONENT."""
        largest = tl.reduce(magnitudes, None, larger)
        clamped = tl.maximum(largest, 7.888609052210118e-31)  # 2 ** -100
        bits = clamped.to(tl.int32, bitcast=True)
        power = (bits >> 23) - 126 - EXPONENT + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
        finite = largest < float("inf")
        factor = tl.where(finite, ((127 - power) << 23).to(tl.float32, bitcast=True), float("nan"))
        tl.store(scale, tl.where(finite, ((127 + power) << 23).to(tl.float32, bitcast=True), float("nan")))
        return factor

    @triton.jit
    def _quantize_rows_kernel(
        x, columns, q, scale, width, HAS_COLUMNS: tl.constexpr, BLOCK: tl.constexpr, EXPONENT: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        mask = column < width
        value = tl.load(x + row * width + column, mask=mask, other=0.0).to(tl.float32)
        if HAS_COLUMNS:
            value *= tl.load(columns + column, mask=mask, other=0.0)
        factor = factor_of(tl.abs(value), scale + row, EXPONENT)
        tl.store(q + row * width + column, (value * factor).to(q.dtype.element_ty), mask=mask)

    @triton.jit
    def _dequantize_rows_kernel(q, scale, y, width, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        mask = column < width
        value = tl.load(q + row * width + column, mask=mask, other=0).to(tl.float8e4nv, bitcast=True).to(tl.float32)
        tl.store(y + row * width + column, (value * tl.load(scale + row)).to(y.dtype.element_ty), mask=mask)

    @triton.jit
    def _transpose_kernel(x, y, ones, rows, columns, stride, TILE: tl.constexpr):
        row = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
        column = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
        tile = tl.load(
            x + row[:, None] * columns + column[None, :], mask=(row < rows)[:, None] & (column < columns)[None, :], other=0
        )
        tl.store(
            y + column[:, None] * stride + row[None, :],
            tl.trans(tile),
            mask=(column < columns)[:, None] & (row < rows)[None, :],
        )
        tl.store(ones + column, tl.full((TILE,), 1.0, dtype=tl.float32), mask=(column < columns) & (tl.program_id(1) == 0))
