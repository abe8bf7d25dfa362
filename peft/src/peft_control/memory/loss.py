"""Linear layer and cross entropy in one, a few rows at a time: the logits of a batch never exist at once."""

from __future__ import annotations

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from . import kernels
from .layers import replays_random_numbers
from .linear import compute_dtype, dense_weight


class LinearCrossEntropy(torch.autograd.Function):
    """Sum over tokens of the cross entropy of ``head(hidden)``, for a frozen head.

    The gradient of ``hidden`` is made along with the loss, chunk by chunk, and only scaled in the backward.

    Args:
        hidden: ``(tokens, width)``.
        labels: ``(tokens,)`` class numbers.
        head: frozen linear layer ``width -> classes``.
        chunk: rows worked on at a time.
        softcap: Gemma-2's ``cap * tanh(logits / cap)``, or None.
        weights: ``(tokens,)`` factors of the tokens' losses, or None.
    """

    @staticmethod
    def forward(ctx, hidden, labels, head: nn.Linear, chunk: int, softcap: float | None, weights=None):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        dtype = compute_dtype(hidden)  # under autocast narrower than the states
        weight, bias = dense_weight(head, dtype), None if head.bias is None else head.bias.to(dtype)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = F.linear(hidden[rows].to(dtype), weight, bias)
            if softcap is not None:
                logits = torch.tanh(logits / softcap)
                slope = (1 - logits.square()).masked_fill_(labels[rows, None] < 0, 0.0)
                logits = logits * softcap
            losses = kernels.cross_entropy_(logits, labels[rows])
            total += losses.sum() if weights is None else losses @ weights[rows].to(losses.dtype)
            if softcap is not None:
                logits *= slope
            if gradient is not None:
                part = logits @ weight
                gradient[rows] = part if weights is None else part * weights[rows, None]
            del logits  # before the next chunk's are made
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        (gradient,) = ctx.saved_tensors
        return gradient * dloss.to(gradient.dtype), None, None, None, None, None


def causal_lm_loss(
    hidden, labels, head, *, chunk, num_items_in_batch=None, ignore_index=-100, softcap=None, weights=None
):
    """Next-token loss of a causal language model, averaged as transformers' ``ForCausalLMLoss`` does.

    Args:
        hidden: ``(batch, tokens, width)`` final states.
        labels: ``(batch, tokens)``; position t is predicted from t-1; ``ignore_index`` counts nothing.
        num_items_in_batch: divisor; None divides by the number of labels that count.
        weights: ``(batch, tokens)``, the factor of each label's loss; None: 1.
    """
    total = _total(hidden, labels, head, chunk, ignore_index, softcap, weights)
    return total / _items(labels, num_items_in_batch, ignore_index)


def _total(hidden, labels, head, chunk, ignore_index=-100, softcap=None, weights=None):
    # the last state predicts nothing; leaving it out would copy all the others
    targets = F.pad(labels[:, 1:], (0, 1), value=ignore_index).reshape(-1).to(hidden.device)
    targets = targets.masked_fill(targets == ignore_index, -1)
    if weights is not None:
        weights = F.pad(weights[:, 1:], (0, 1)).reshape(-1)
    with _gathered(head):
        return LinearCrossEntropy.apply(
            hidden.reshape(-1, hidden.shape[-1]), targets, head, chunk, softcap, weights
        )


@contextmanager
def _gathered(head):
    """The weights of an output layer that is an FSDP2 unit, which gathers them by itself only for its own forward."""
    if not hasattr(head, "unshard"):
        yield
        return
    head.unshard()
    try:
        yield
    finally:
        head.reshard()


def _items(labels, num_items_in_batch, ignore_index=-100):
    if num_items_in_batch is not None:
        return num_items_in_batch
    return (labels[:, 1:] != ignore_index).sum().clamp(min=1)


def causal_lm_forward(model, input_ids=None, attention_mask=None, *arguments, labels=None, **named):
    """Replaces a causal language model's ``forward`` while it trains; otherwise the model's own runs."""
    trained = any(parameter.requires_grad for parameter in model.lm_head.parameters())
    other_loss = model.loss_function is not ForCausalLMLoss or any(
        isinstance(named.get(name), torch.Tensor) or named.get(name)
        for name in ("shift_labels", "ignore_index", "logits_to_keep")
    )
    training = model.training and torch.is_grad_enabled() and labels is not None
    if not training or trained or other_loss or named.get("return_dict") is False:
        return type(model).forward(model, input_ids, attention_mask, *arguments, labels=labels, **named)
    named.pop("use_cache", None)
    items = _items(labels, named.pop("num_items_in_batch", None))
    softcap = getattr(model.config, "final_logit_softcapping", None)
    base = getattr(model, model.base_model_prefix)
    others = [value for value in (*arguments, *named.values()) if value is not None]
    if "step_graphs" in vars(model) and not others and _fits_a_graph(base, input_ids, attention_mask):
        total = model.step_graphs(
            lambda ids, labels: _total(
                _states(base, ids), labels, model.lm_head, model.loss_chunk, softcap=softcap
            ),
            (input_ids, labels),
            model,
        )
        return CausalLMOutputWithPast(loss=total / items)
    outputs = base(input_ids, attention_mask, *arguments, use_cache=False, **named)
    total = _total(outputs.last_hidden_state, labels, model.lm_head, model.loss_chunk, softcap=softcap)
    return CausalLMOutputWithPast(
        loss=total / items, hidden_states=outputs.hidden_states, attentions=outputs.attentions
    )


def _fits_a_graph(base, ids, mask) -> bool:
    if ids is None or not ids.is_cuda or replays_random_numbers(base):
        return False
    windows = [getattr(layer.self_attn, "sliding_window", None) for layer in base.layers]
    windows.append(getattr(base.config, "sliding_window", None))
    return all(window is None or window >= ids.shape[1] for window in windows) and (
        mask is None or bool(mask.all())
    )


def _states(base, ids):
    """The decoder's final states, causal and without padding: its own forward reads the device to find that out."""
    state = base.embed_tokens(ids)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    rotary = base.rotary_emb(state, positions)
    for layer in base.layers:
        state = layer(state, attention_mask=None, position_embeddings=rotary)
    return base.norm(state)
