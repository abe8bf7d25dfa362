"""Linear layer and cross entropy in one, a few rows at a time: the logits of a batch never exist at once."""

from __future__ import annotations

import torch
from torch import nn

from . import kernels
from .linear import dense_weight


class LinearCrossEntropy(torch.autograd.Function):
    """Sum over tokens of the cross entropy of ``head(hidden)``, for a frozen head.

    The gradient of ``hidden`` is made along with the loss, chunk by chunk, and only scaled in the backward.

    Args:
        hidden: ``(tokens, width)``.
        labels: ``(tokens,)`` class numbers.
        head: frozen linear layer ``width -> classes``.
        chunk: rows worked on at a time.
        softcap: Gemma-2's ``cap * tanh(logits / cap)``, or None.
    """

    @staticmethod
    def forward(ctx, hidden, labels, head: nn.Linear, chunk: int, softcap: float | None):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        weight = dense_weight(head, hidden.dtype)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = torch.nn.functional.linear(hidden[rows], weight, head.bias)
            if softcap is not None:
                logits = torch.tanh(logits / softcap)
                slope = 1 - logits.square()
                logits = logits * softcap
            total += kernels.cross_entropy_(logits, labels[rows]).sum()
            if softcap is not None:
                logits *= slope
            if gradient is not None:
                torch.mm(logits, weight, out=gradient[rows])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, dloss):
        (gradient,) = ctx.saved_tensors
        return gradient * dloss.to(gradient.dtype), None, None, None, None


def causal_lm_loss(hidden, labels, head, *, chunk, num_items_in_batch=None, ignore_index=-100, softcap=None):
    """Next-token loss of a causal language model, averaged as transformers' ``ForCausalLMLoss`` does.

    Args:
        hidden: ``(batch, tokens, width)`` final states.
        labels: ``(batch, tokens)``; position t is predicted from t-1; ``ignore_index`` counts nothing.
        num_items_in_batch: divisor; None divides by the number of labels that count.
    """
    targets = labels[:, 1:].reshape(-1).to(hidden.device)
    targets = targets.masked_fill(targets == ignore_index, -1)
    states = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    total = LinearCrossEntropy.apply(states, targets, head, chunk, softcap)
    if num_items_in_batch is None:
        num_items_in_batch = (targets >= 0).sum().clamp(min=1)
    return total / num_items_in_batch
