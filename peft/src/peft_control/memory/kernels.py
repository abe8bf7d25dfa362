"""Elementwise and row-wise pieces of a frozen block, forward and backward, each in one pass over memory.

Every function has a pure torch path (CPU, and the reference for tests; in float64 for float64 input) and, for CUDA
tensors where Triton is installed, a kernel with the same arithmetic: both compute in float32 and round once at the end.
All but ``rope`` take two-dimensional tensors ``(tokens, width)``. Functions whose name ends in ``_`` overwrite an argument,
because a backward can reuse the buffers it has just consumed.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from ..fp8_kernels import empty_rows, exponent_of, power_of_2, quantize_rows, row_launch, uses_kernels

try:
    import triton
    import triton.language as tl

    from ..fp8_kernels import factor_of, larger
except ImportError:  # CPU-only and Windows builds of torch
    triton = None


def _use_triton(x: torch.Tensor) -> bool:
    return triton is not None and x.is_cuda


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


# -- RMSNorm: y = x * rstd * w --------------------------------------------------------------------------------


def rms_norm(x, weight, eps):
    """Return ``(y, rstd)``; ``rstd`` has shape ``(tokens,)``."""
    if _use_triton(x):
        x = x.contiguous()
        y = torch.empty_like(x)
        rstd = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
        _rms_norm_kernel[(x.shape[0],)](x, weight, y, None, rstd, x.shape[1], eps, EXPONENT=None, **_row_launch(x.shape[1]))
        return y, rstd
    wide = _wide(x)
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    return (wide * rstd[:, None] * _wide(weight)).to(x.dtype), rstd


def rms_norm_rows(x, weight, eps):
    """The rows of :func:`rms_norm`, quantized as :func:`quantize_rows` does without being rounded before, and ``rstd``."""
    if not uses_kernels(x):
        y, rstd = rms_norm(_wide(x), weight, eps)
        return quantize_rows(y), rstd
    x, (tokens, width) = x.contiguous(), x.shape
    q, scale = empty_rows(x, width, torch.float8_e4m3fn)
    rstd = torch.empty(tokens, dtype=torch.float32, device=x.device)
    _rms_norm_kernel[(tokens,)](x, weight, q, scale, rstd, width, eps, EXPONENT=exponent_of(q.dtype), **_row_launch(width))
    return (q, scale), rstd


def rms_norm_backward(dy, x, weight, rstd, residual=None, out=None, scales=None):
    """Return ``dx`` of :func:`rms_norm` for a frozen weight, plus ``residual`` if given; in ``out`` if given. ``scales``
    ``(tokens, 1)`` are factors of the rows of ``dy``."""
    if _use_triton(x):
        dy, x = dy.contiguous(), x.contiguous()
        residual = None if residual is None else residual.contiguous()
        dx = torch.empty_like(x) if out is None else out
        _rms_norm_backward_kernel[(x.shape[0],)](
            dy, x, weight, rstd, scales, residual, dx, x.shape[1],
            HAS_RESIDUAL=residual is not None, **_row_launch(x.shape[1]),
        )  # fmt: skip
        return dx
    wide, dn = _wide(x), _wide(dy) * _wide(weight) * (1 if scales is None else scales)
    rstd = rstd[:, None]
    dx = rstd * dn - rstd**3 * wide * (dn * wide).mean(-1, keepdim=True)
    return _into(out, (dx if residual is None else dx + residual).to(x.dtype))


# -- LayerNorm ---------------------------------------------------------------------------------------------------


def layer_norm(x, norm, dtype):
    """Return ``norm(x)`` of an ``nn.LayerNorm``; where a kernel makes it, in ``dtype`` at once."""
    if not _use_triton(x) or norm.weight is None or norm.bias is None:
        return norm.forward(x)  # not its hooks: one of them catches the control's state
    x = x.contiguous()
    y = torch.empty_like(x, dtype=dtype)
    _layer_norm_kernel[(x.shape[0],)](x, norm.weight, norm.bias, y, x.shape[1], norm.eps, **_row_launch(x.shape[1]))
    return y


def layer_norm_backward(dy, x, norm, residual=None, out=None):
    """Return the gradient of the input ``x`` of a frozen ``nn.LayerNorm``, plus ``residual``; in ``x``'s dtype, in
    ``out`` if given."""
    if _use_triton(x) and norm.weight is not None:
        dy, x = dy.contiguous(), x.contiguous()
        residual = None if residual is None else residual.contiguous()
        dx = torch.empty_like(x) if out is None else out
        _layer_norm_backward_kernel[(x.shape[0],)](
            dy, x, norm.weight, residual, dx, x.shape[1], norm.eps,
            HAS_RESIDUAL=residual is not None, **_row_launch(x.shape[1]),
        )  # fmt: skip
        return dx
    # under autocast the norm's own parameters are the wider ones
    wide = x if norm.weight is None else x.to(norm.weight.dtype)
    shape, frozen = (x.shape[-1],), (norm.weight, norm.bias)
    _, mean, rstd = torch.native_layer_norm(wide, shape, *frozen, norm.eps)
    dx, _, _ = torch.ops.aten.native_layer_norm_backward(
        dy.to(wide.dtype), wide, shape, mean, rstd, *frozen, [True, False, False]
    )
    return _into(out, (dx if residual is None else dx.add_(residual)).to(x.dtype))


# -- the control: y = base + scale * (hidden W + bias) + residual, for a W of few rows ---------------------------


def add_low_rank(base, hidden, weight, scale=1.0, bias=None, residual=None, out=None):
    """Return ``base + scale * (hidden @ weight + bias) + residual``, in ``out`` (which may be ``base``) if given.

    Args:
        base: ``(tokens, width)``.
        hidden: ``(tokens, rank)``.
        weight: ``(rank, width)`` of any strides and dtype, rounded to ``hidden``'s.
        bias: ``(width,)`` or None.
        residual: ``(tokens, width)`` or None; the result has the wider dtype of it and ``base``.
    """
    dtype = base.dtype if residual is None else torch.promote_types(base.dtype, residual.dtype)
    small = hidden.dtype in (torch.float16, torch.bfloat16)
    if small and _use_triton(base) and (out is None or out.is_contiguous()):
        base, hidden = base.contiguous(), hidden.contiguous()
        residual = None if residual is None else residual.contiguous()
        out = torch.empty_like(base, dtype=dtype) if out is None else out
        (tokens, width), rank = base.shape, hidden.shape[1]
        block_tokens, block_width = _LOW_RANK_TILE if weight.dtype == hidden.dtype else _LOW_RANK_CAST_TILE
        block_rank = min(max(power_of_2(rank), 16), 64)
        _add_low_rank_kernel[(-(-width // block_width), -(-tokens // block_tokens))](
            base, hidden, weight, bias, residual, out, tokens, width, rank, weight.stride(0), weight.stride(1), scale,
            HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
            WHOLE=tokens % block_tokens == width % block_width == 0 and rank == block_rank, RANK_BLOCK=block_rank,
            BLOCK_TOKENS=block_tokens, BLOCK_WIDTH=block_width, num_warps=4, num_stages=2,
        )  # fmt: skip
        return out
    y = torch.addmm(_wide(base), _wide(hidden), _wide(weight.to(hidden.dtype)), alpha=scale)
    if bias is not None:
        y.add_(bias, alpha=scale)
    if residual is not None:
        y.add_(residual)
    return _into(out, y.to(dtype))


def _into(out, y):
    return y if out is None or out is y else out.copy_(y)


# -- gated and plain activations --------------------------------------------------------------------------------


def swiglu(gate, up):
    """Return ``silu(gate) * up``; both may be parts of wider rows."""
    if _use_triton(gate):
        act = torch.empty_like(gate, memory_format=torch.contiguous_format)
        _swiglu_kernel[_grid(gate)](gate, up, act, gate.stride(0), up.stride(0), gate.shape[1], BLOCK=_BLOCK)
        return act
    return (F.silu(_wide(gate)) * _wide(up)).to(gate.dtype)


def swiglu_backward_(gate, up, dact):
    """Overwrite ``gate`` with the gradient of gate and ``up`` with that of up."""
    if _use_triton(gate):
        dact = dact.contiguous()
        _swiglu_backward_kernel[_grid(gate)](gate, up, dact, gate.stride(0), up.stride(0), gate.shape[1], BLOCK=_BLOCK)
        return gate, up
    g, u, d = _wide(gate), _wide(up), _wide(dact)
    s = torch.sigmoid(g)
    dgate, dup = d * u * s * (1 + g * (1 - s)), d * g * s  # both before either is overwritten
    return gate.copy_(dgate), up.copy_(dup)


def swiglu_rows(gate, up):
    """The rows of :func:`swiglu`, quantized as :func:`quantize_rows` does without being rounded before."""
    if not uses_kernels(gate):
        return quantize_rows(swiglu(_wide(gate), _wide(up)))
    width = gate.shape[1]
    q, scale = empty_rows(gate, width, torch.float8_e4m3fn)
    _swiglu_rows_kernel[(len(gate),)](gate, up, q, scale, gate.stride(0), up.stride(0), width, **row_launch(width, q.dtype))
    return q, scale


def swiglu_backward_rows(gate, up, dact, dtype, columns):
    """The rows of gate's and up's gradients side by side, multiplied by the two ``columns`` and quantized to ``dtype``."""
    if not uses_kernels(gate):
        gradients = _wide(torch.cat([gate, up], dim=1))
        swiglu_backward_(*gradients.chunk(2, dim=1), dact)
        return quantize_rows(gradients, dtype, torch.cat(columns))
    width, dact = gate.shape[1], dact.contiguous()
    q, scale = empty_rows(gate, 2 * width, dtype)
    launch = row_launch(width, dtype)
    # as many registers as there are for so many threads: the compiler takes fewer, and a tenth more time
    registers = {"maxnreg": 64} if launch["num_warps"] == 32 else {}
    _swiglu_backward_rows_kernel[(len(gate),)](
        gate, up, dact, *columns, q, scale, gate.stride(0), up.stride(0), width, **launch, **registers
    )
    return q, scale


# -- rotary position embedding ----------------------------------------------------------------------------------


def rope(query, key, cos, sin, backward=False, in_place=False):
    """Rotate ``query`` and ``key`` of shape ``(batch, tokens, heads, head_dim)``, of keys perhaps fewer heads, as Hugging
    Face's half-split RoPE does.

    ``cos`` and ``sin`` have shape ``(1 or batch, tokens, head_dim)``, both halves equal. The backward is the
    rotation by the opposite angle. What is rotated ``in_place`` must have its numbers of a head side by side.
    """
    if _use_triton(query) and query.shape[-1] == cos.shape[-1]:
        # as gradients, attention may give any strides
        query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
        turned = [x if in_place else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key)]
        batch, tokens, heads, dim = query.shape
        cos, sin = cos.contiguous(), sin.contiguous()
        _rope_kernel[(batch * tokens, 2)](
            query, key, *turned, cos, sin, *(stride for x in (query, key, *turned) for stride in x.stride()[:3]), tokens,
            0 if cos.shape[0] == 1 else tokens * dim, heads, key.shape[2],
            HEADS_BLOCK=power_of_2(heads), HALF=dim // 2, HALF_BLOCK=power_of_2(dim // 2), SIGN=-1.0 if backward else 1.0,
        )  # fmt: skip
        return turned
    half = query.shape[-1] // 2
    cos, sin = _wide(cos)[:, :, None], _wide(sin)[:, :, None]
    if backward:
        sin = -sin

    def turn(x):
        wide = _wide(x)
        rotated = torch.cat((-wide[..., half:], wide[..., :half]), dim=-1)
        return (wide * cos + rotated * sin).to(x.dtype)

    return [_into(x if in_place else None, turn(x)) for x in (query, key)]


def rope_backward_rows(query, key, value, cos, sin, dtype, columns):
    """The rows ``(batch * tokens, all widths)`` of what goes back through :func:`rope` for the gradients of queries and keys,
    and of the values' gradient, side by side; multiplied by the three ``columns`` and quantized to ``dtype``."""
    if not uses_kernels(query) or query.shape[-1] != cos.shape[-1]:
        parts = [*rope(_wide(query), _wide(key), cos, sin, backward=True), _wide(value)]
        return quantize_rows(torch.cat([part.flatten(2).flatten(0, 1) for part in parts], dim=1), dtype, torch.cat(columns))
    parts = query, key, value = [x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value)]
    (batch, tokens, heads, dim), few, cos, sin = query.shape, key.shape[2], cos.contiguous(), sin.contiguous()
    q = torch.empty(batch * tokens, (heads + 2 * few) * dim, dtype=dtype, device=query.device)
    scale = torch.empty(batch * tokens, 1, dtype=torch.float32, device=query.device)
    _rope_rows_kernel[(batch * tokens,)](
        *parts, *columns, q, scale, cos, sin, *(stride for x in parts for stride in x.stride()[:3]), tokens,
        0 if cos.shape[0] == 1 else tokens * dim, heads, few, EXPONENT=exponent_of(dtype), QUERY_BLOCK=power_of_2(heads),
        KEY_BLOCK=power_of_2(few), HALF=dim // 2, HALF_BLOCK=power_of_2(dim // 2), num_warps=8,
    )  # fmt: skip
    return q, scale


# -- cross entropy ----------------------------------------------------------------------------------------------


def cross_entropy_(logits, labels):
    """Return each row's loss (float32 or wider); overwrite ``logits`` with its gradient, ``softmax - one_hot``.

    A row with a negative label counts nothing: loss and gradient are zero.
    """
    if _use_triton(logits):
        loss = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
        _cross_entropy_kernel[(logits.shape[0],)](
            logits, labels, loss, None, None, None, logits.stride(0), logits.shape[1], EXPONENT=None, BLOCK=16384,
            num_warps=16 if torch.version.hip else 32,
        )  # fmt: skip
        return loss
    wide, counts = _wide(logits), labels >= 0
    labels = labels.clamp(min=0)[:, None]
    log_sum = torch.logsumexp(wide, dim=-1)
    loss = log_sum - wide.gather(1, labels)[:, 0]
    gradient = torch.exp(wide - log_sum[:, None])
    gradient.scatter_add_(1, labels, gradient.new_full((len(labels), 1), -1.0))
    logits.copy_(gradient.masked_fill_(~counts[:, None], 0.0))
    return loss.masked_fill_(~counts, 0.0)


def cross_entropy_rows(logits, labels, dtype, columns):
    """Each row's loss, and the rows of :func:`cross_entropy_`'s gradient, multiplied by ``columns`` and quantized to ``dtype``.
    ``logits`` may be overwritten."""
    if not uses_kernels(logits):
        logits = _wide(logits)
        return cross_entropy_(logits, labels), quantize_rows(logits, dtype, columns)
    q, scale = empty_rows(logits, logits.shape[1], dtype)
    loss = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    _cross_entropy_kernel[(len(logits),)](
        logits, labels, loss, columns, q, scale, logits.stride(0), logits.shape[1], EXPONENT=exponent_of(dtype), BLOCK=16384,
        num_warps=32,
    )  # fmt: skip
    return loss, (q, scale)


# -- Triton -----------------------------------------------------------------------------------------------------

_BLOCK = 2048
_LOW_RANK_TILE, _LOW_RANK_CAST_TILE = (64, 128), (64, 64)  # tokens, width; the second where each tile casts the weight


def _grid(x: torch.Tensor) -> tuple[int, int]:
    return x.shape[0], -(-x.shape[1] // _BLOCK)


@functools.cache
def _row_launch(width: int) -> dict[str, int]:
    """Settings of one program a row."""
    block = power_of_2(width)
    return {"BLOCK": block, "num_warps": max(min(block // 256, max(block // 1024, 4), 16), 1)}


if triton is not None:
    _LOG2_E = tl.constexpr(1.4426950408889634)  # a power of two is one instruction, one of e is five

    @triton.jit
    def _rms_norm_kernel(x, weight, y, y_scale, rstd, width, eps, EXPONENT: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        mask = column < width
        value = tl.load(x + row * width + column, mask=mask, other=0.0).to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(value * value) / width + eps)
        w = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(rstd + row, scale)
        normal = value * scale * w
        if EXPONENT is not None:
            normal *= factor_of(tl.abs(normal), y_scale + row, EXPONENT)
        tl.store(y + row * width + column, normal.to(y.dtype.element_ty), mask=mask)

    @triton.jit
    def _rms_norm_backward_kernel(
        dy, x, weight, rstd, scales, residual, dx, width, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        mask = column < width
        at = row * width + column
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        w = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
        dn = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32) * w
        if scales is not None:
            dn *= tl.load(scales + row)
        scale = tl.load(rstd + row)
        out = scale * dn - scale * scale * scale * value * (tl.sum(dn * value) / width)
        if HAS_RESIDUAL:
            out += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + at, out, mask=mask)

    @triton.jit
    def _layer_norm_kernel(x, weight, bias, y, width, eps, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        mask = column < width
        value = tl.load(x + row * width + column, mask=mask, other=0.0).to(tl.float32)
        value = tl.where(mask, value - tl.sum(value) / width, 0.0)
        scale = 1.0 / tl.sqrt(tl.sum(value * value) / width + eps)
        w = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(y + row * width + column, value * scale * w + b, mask=mask)

    @triton.jit
    def _layer_norm_backward_kernel(dy, x, weight, residual, dx, width, eps, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        mask = column < width
        at = row * width + column
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        value = tl.where(mask, value - tl.sum(value) / width, 0.0)
        scale = 1.0 / tl.sqrt(tl.sum(value * value) / width + eps)
        value *= scale
        w = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
        dn = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32) * w
        out = scale * (dn - tl.sum(dn) / width - value * (tl.sum(dn * value) / width))
        if HAS_RESIDUAL:
            out += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + at, out, mask=mask)

    @triton.jit
    def _add_low_rank_kernel(
        base, hidden, weight, bias, residual, out, tokens, width, rank, stride_rank, stride_width, scale,
        HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, WHOLE: tl.constexpr, RANK_BLOCK: tl.constexpr,
        BLOCK_TOKENS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    ):  # fmt: skip
        """``WHOLE``: no tile hangs over, and one block holds all ranks; without masks and loop it takes three quarters of the time."""
        row = tl.program_id(1).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)[:, None]
        column = tl.program_id(0) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)[None, :]
        at = row * width + column
        mask = None if WHOLE else (row < tokens) & (column < width)
        # what takes longest is asked for first, and stays narrow until it is added: registers are scarce
        wide = tl.load(base + at, mask=mask)
        if HAS_RESIDUAL:
            added = tl.load(residual + at, mask=mask)
        k = tl.arange(0, RANK_BLOCK)
        if WHOLE:
            h = tl.load(hidden + row * RANK_BLOCK + k[None, :])
            w = tl.load(weight + k[:, None] * stride_rank + column * stride_width)
            total = tl.dot(h, w.to(h.dtype))
        else:
            total = tl.zeros((BLOCK_TOKENS, BLOCK_WIDTH), dtype=tl.float32)
            for start in range(0, rank, RANK_BLOCK):
                inside = start + k < rank
                h = tl.load(hidden + row * rank + start + k[None, :], mask=(row < tokens) & inside[None, :], other=0.0)
                places = weight + (start + k)[:, None] * stride_rank + column * stride_width
                w = tl.load(places, mask=inside[:, None] & (column < width), other=0.0)
                total += tl.dot(h, w.to(h.dtype))
        if HAS_BIAS:
            total += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
        total = total * scale + wide.to(tl.float32)
        if HAS_RESIDUAL:
            total += added.to(tl.float32)
        tl.store(out + at, total, mask=mask)

    @triton.jit
    def _sigmoid(x):
        """A division costs more than all else that these kernels compute."""
        root = tl.rsqrt(1.0 + tl.exp2(x * -_LOG2_E))
        return root * root

    @triton.jit
    def _swiglu_kernel(gate, up, act, stride_gate, stride_up, width, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = column < width
        g = tl.load(gate + row * stride_gate + column, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(up + row * stride_up + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(act + row * width + column, g * _sigmoid(g) * u, mask=mask)

    @triton.jit
    def _swiglu_backward_kernel(gate, up, dact, stride_gate, stride_up, width, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = column < width
        gate += row * stride_gate
        up += row * stride_up
        g = tl.load(gate + column, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(up + column, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(dact + row * width + column, mask=mask, other=0.0).to(tl.float32)
        s = _sigmoid(g)
        tl.store(gate + column, d * u * s * (1 + g * (1 - s)), mask=mask)
        tl.store(up + column, d * g * s, mask=mask)

    @triton.jit
    def _swiglu_rows_kernel(gate, up, q, scale, stride_gate, stride_up, width, BLOCK: tl.constexpr, EXPONENT: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        mask = column < width
        g = tl.load(gate + row * stride_gate + column, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(up + row * stride_up + column, mask=mask, other=0.0)
        act = g * _sigmoid(g) * u.to(tl.float32)
        act *= factor_of(tl.abs(act), scale + row, EXPONENT)
        tl.store(q + row * width + column, act.to(q.dtype.element_ty), mask=mask)

    @triton.jit
    def _swiglu_backward_rows_kernel(
        gate, up, dact, gate_columns, up_columns, q, scale, stride_gate, stride_up, width,
        BLOCK: tl.constexpr, EXPONENT: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        mask = column < width
        g = tl.load(gate + row * stride_gate + column, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(up + row * stride_up + column, mask=mask, other=0.0)
        d = tl.load(dact + row * width + column, mask=mask, other=0.0).to(tl.float32)
        s = _sigmoid(g)
        d *= s
        dg = d * u.to(tl.float32) * (1 + g * (1 - s)) * tl.load(gate_columns + column, mask=mask, other=0.0)
        du = d * g * tl.load(up_columns + column, mask=mask, other=0.0)
        factor = factor_of(larger(tl.abs(dg), tl.abs(du)), scale + row, EXPONENT)
        q += row * 2 * width + column
        tl.store(q, (dg * factor).to(q.dtype.element_ty), mask=mask)
        tl.store(q + width, (du * factor).to(q.dtype.element_ty), mask=mask)

    @triton.jit
    def _rope_kernel(
        query, key, query_out, key_out, cos, sin, query_stride_batch, query_stride_token, query_stride_head,
        key_stride_batch, key_stride_token, key_stride_head, query_out_batch, query_out_token, query_out_head,
        key_out_batch, key_out_token, key_out_head, tokens, cos_stride_batch, query_heads, key_heads,
        HEADS_BLOCK: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, SIGN: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0).to(tl.int64)
        if tl.program_id(1) == 0:
            _turn(
                query, query_out, cos, sin, query_stride_batch, query_stride_token, query_stride_head, query_out_batch,
                query_out_token, query_out_head, program, tokens, cos_stride_batch, query_heads, HEADS_BLOCK, HALF, HALF_BLOCK,
                SIGN,
            )  # fmt: skip
        else:
            _turn(
                key, key_out, cos, sin, key_stride_batch, key_stride_token, key_stride_head, key_out_batch, key_out_token,
                key_out_head, program, tokens, cos_stride_batch, key_heads, HEADS_BLOCK, HALF, HALF_BLOCK, SIGN,
            )  # fmt: skip

    @triton.jit
    def _turn(
        x, y, cos, sin, stride_batch, stride_token, stride_head, y_batch, y_token, y_head, program, tokens,
        cos_stride_batch, heads, HEADS_BLOCK: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, SIGN: tl.constexpr,
    ):  # fmt: skip
        first, second, _, mask = _turned(
            x, cos, sin, stride_batch, stride_token, stride_head, program, tokens, cos_stride_batch, heads, HEADS_BLOCK,
            HALF, HALF_BLOCK, SIGN,
        )  # fmt: skip
        y += program // tokens * y_batch + program % tokens * y_token
        y += tl.arange(0, HEADS_BLOCK)[:, None] * y_head + tl.arange(0, HALF_BLOCK)[None, :]
        tl.store(y, first, mask=mask)
        tl.store(y + HALF, second, mask=mask)

    @triton.jit
    def _turned(
        x, cos, sin, stride_batch, stride_token, stride_head, program, tokens, cos_stride_batch, heads,
        HEADS_BLOCK: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, SIGN: tl.constexpr,
    ):  # fmt: skip
        """Both halves of a token's heads, rotated unless ``SIGN`` is 0; where the first half stands in a row, and its mask."""
        batch, token = program // tokens, program % tokens
        head, column = tl.arange(0, HEADS_BLOCK)[:, None], tl.arange(0, HALF_BLOCK)[None, :]
        mask = (head < heads) & (column < HALF)
        source = x + batch * stride_batch + token * stride_token + head * stride_head + column
        first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
        at = head * 2 * HALF + column
        if SIGN == 0.0:
            return first, second, at, mask
        else:
            angle = batch * cos_stride_batch + token * 2 * HALF + column
            c = tl.load(cos + angle, mask=column < HALF, other=0.0).to(tl.float32)
            s = tl.load(sin + angle, mask=column < HALF, other=0.0).to(tl.float32) * SIGN
            return first * c - second * s, second * c + first * s, at, mask

    @triton.jit
    def _rope_rows_kernel(
        query, key, value, query_columns, key_columns, value_columns, q, scale, cos, sin, query_stride_batch,
        query_stride_token, query_stride_head, key_stride_batch, key_stride_token, key_stride_head, value_stride_batch,
        value_stride_token, value_stride_head, tokens, cos_stride_batch, query_heads, key_heads, EXPONENT: tl.constexpr,
        QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0).to(tl.int64)
        q1, q2, at, mask = _turned(
            query, cos, sin, query_stride_batch, query_stride_token, query_stride_head, program, tokens, cos_stride_batch,
            query_heads, QUERY_BLOCK, HALF, HALF_BLOCK, -1.0,
        )  # fmt: skip
        q1, q2 = _times(q1, q2, query_columns, at, mask, HALF)
        k1, k2, key_at, key_mask = _turned(
            key, cos, sin, key_stride_batch, key_stride_token, key_stride_head, program, tokens, cos_stride_batch,
            key_heads, KEY_BLOCK, HALF, HALF_BLOCK, -1.0,
        )  # fmt: skip
        k1, k2 = _times(k1, k2, key_columns, key_at, key_mask, HALF)
        v1, v2, _, _ = _turned(
            value, cos, sin, value_stride_batch, value_stride_token, value_stride_head, program, tokens, cos_stride_batch,
            key_heads, KEY_BLOCK, HALF, HALF_BLOCK, 0.0,
        )  # fmt: skip
        v1, v2 = _times(v1, v2, value_columns, key_at, key_mask, HALF)
        of_query = tl.reduce(larger(tl.abs(q1), tl.abs(q2)), None, larger)
        of_others = larger(larger(tl.abs(k1), tl.abs(k2)), larger(tl.abs(v1), tl.abs(v2)))
        factor = factor_of(larger(of_others, of_query), scale + program, EXPONENT)
        q += program * (query_heads + 2 * key_heads) * 2 * HALF
        tl.store(q + at, (q1 * factor).to(q.dtype.element_ty), mask=mask)
        tl.store(q + at + HALF, (q2 * factor).to(q.dtype.element_ty), mask=mask)
        q += query_heads * 2 * HALF + key_at
        tl.store(q, (k1 * factor).to(q.dtype.element_ty), mask=key_mask)
        tl.store(q + HALF, (k2 * factor).to(q.dtype.element_ty), mask=key_mask)
        q += key_heads * 2 * HALF
        tl.store(q, (v1 * factor).to(q.dtype.element_ty), mask=key_mask)
        tl.store(q + HALF, (v2 * factor).to(q.dtype.element_ty), mask=key_mask)

    @triton.jit
    def _times(first, second, columns, at, mask, HALF: tl.constexpr):
        """Both halves times their ``columns``."""
        first *= tl.load(columns + at, mask=mask, other=0.0)
        return first, second * tl.load(columns + at + HALF, mask=mask, other=0.0)

    @triton.jit
    def _cross_entropy_kernel(
        logits, labels, loss, columns, q, scale, stride, classes, EXPONENT: tl.constexpr, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        label = tl.load(labels + row)
        logits += row * stride
        # each lane of the block sums for itself: no step waits for the others
        lanes = tl.full((BLOCK,), -3.4028234663852886e38, dtype=tl.float32)
        sums = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, classes, BLOCK):
            column = start + tl.arange(0, BLOCK)
            value = _LOG2_E * tl.load(logits + column, mask=column < classes, other=-float("inf")).to(tl.float32)
            less = tl.exp2(-tl.abs(lanes - value))
            sums = tl.where(value > lanes, sums * less + 1.0, sums + less)
            lanes = tl.maximum(lanes, value)
        largest = tl.max(lanes)
        log_sum = largest + tl.log2(tl.sum(sums * tl.exp2(lanes - largest)))
        counts = label >= 0
        of_label = tl.load(logits + tl.maximum(label, 0)).to(tl.float32)
        tl.store(loss + row, tl.where(counts, log_sum / _LOG2_E - of_label, 0.0))
        if EXPONENT is not None:  # to FP8: the row's largest first, then its numbers, which are computed again
            lanes = tl.zeros((BLOCK,), dtype=tl.float32)
            for start in range(0, classes, BLOCK):
                column = start + tl.arange(0, BLOCK)
                lanes = larger(lanes, tl.abs(_of_class(logits, columns, column, classes, label, log_sum)))
            factor = factor_of(lanes, scale + row, EXPONENT)
            for start in range(0, classes, BLOCK):
                column = start + tl.arange(0, BLOCK)
                value = _of_class(logits, columns, column, classes, label, log_sum) * factor
                tl.store(q + row * classes + column, value.to(q.dtype.element_ty), mask=column < classes)
        else:
            tl.debug_barrier()  # the label's logit is read before any thread overwrites it
            for start in range(0, classes, BLOCK):
                column = start + tl.arange(0, BLOCK)
                value = _of_class(logits, None, column, classes, label, log_sum)
                tl.store(logits + column, value, mask=column < classes)

    @triton.jit
    def _of_class(logits, columns, column, classes, label, log_sum):
        """The gradient of some classes' logits, multiplied by ``columns`` if it is to be quantized."""
        value = _LOG2_E * tl.load(logits + column, mask=column < classes, other=-float("inf")).to(tl.float32)
        value = tl.where(label >= 0, tl.exp2(value - log_sum) - tl.where(column == label, 1.0, 0.0), 0.0)
        if columns is not None:
            value *= tl.load(columns + column, mask=column < classes, other=0.0)
        return value
