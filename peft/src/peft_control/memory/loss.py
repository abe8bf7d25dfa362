"""Linear layer and cross entropy in one, a few rows at a time: the logits of a batch never exist at once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..fp8 import FORMATS, Fp8Linear, gradient_of_rows
from ..fp8_kernels import compute_dtype, quantize_rows, transposed
from . import kernels
from .exact import is_as_written
from .graphs import StepGraphs
from .layers import replays_random_numbers
from .linear import dense_weight, is_known_linear

#: The label of what counts nothing.
_IGNORED = -100


class LinearCrossEntropy(torch.autograd.Function):
    """Sum over tokens of the cross entropy of ``head(hidden)``, for a frozen head, which may be in FP8.

    The gradient of ``hidden`` is made along with the loss, chunk by chunk, and only scaled in the backward.

    Args:
        hidden: ``(tokens, width)``.
        labels: ``(tokens,)`` class numbers.
        head: frozen linear layer ``width -> classes``.
        chunk: rows worked on at a time.
        softcap: Gemma-2's ``cap * tanh(logits / cap)``, or None.
        weights: ``(tokens,)`` factors of the tokens' losses, or None.
        rows: ``(n,)`` numbers of the tokens that count, each once, and perhaps of others; None: all.
    """

    @staticmethod
    def forward(ctx, hidden, labels, head: nn.Linear, chunk: int, softcap: float | None, weights=None, rows=None):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        dtype = compute_dtype(hidden)  # under autocast narrower than the states
        in_fp8 = isinstance(head, Fp8Linear)
        weight = head.weight if in_fp8 else dense_weight(head, dtype)
        bias = None if head.bias is None else head.bias.to(dtype)
        gradient = None
        if ctx.needs_input_grad[0]:
            gradient = torch.empty_like(hidden) if rows is None else torch.zeros_like(hidden)
            turned = transposed(weight) if in_fp8 else None  # once for all chunks
        for start in range(0, len(hidden if rows is None else rows), chunk):
            part = slice(start, start + chunk)
            part = part if rows is None else rows[part]
            state = hidden[part].to(dtype)
            logits = head.of_rows(*quantize_rows(state), dtype) if in_fp8 else F.linear(state, weight, bias)
            if softcap is not None:
                logits = torch.tanh(logits / softcap)
                slope = (1 - logits.square()).masked_fill_(labels[part, None] < 0, 0.0)
                logits = logits * softcap
            if in_fp8 and softcap is None:
                losses, dlogits = kernels.cross_entropy_rows(logits, labels[part], FORMATS[head.gradients], head.weight_scale)
            else:
                losses = kernels.cross_entropy_(logits, labels[part])
                logits = logits if softcap is None else logits.mul_(slope)
                dlogits = quantize_rows(logits, FORMATS[head.gradients], head.weight_scale) if in_fp8 else (logits,)
            total += losses.sum() if weights is None else (losses * weights[part]).sum()
            if gradient is not None:
                found = gradient_of_rows(dlogits, turned, dtype) if in_fp8 else logits @ weight
                found = found if weights is None else found * weights[part, None]
                gradient[part] = found.to(gradient.dtype)  # by numbers torch converts nothing
            del logits, dlogits  # before the next chunk's are made
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        (gradient,) = ctx.saved_tensors
        return gradient * dloss.to(gradient.dtype), None, None, None, None, None, None


def causal_lm_loss(hidden, labels, head, *, chunk, num_items_in_batch=None, softcap=None, weights=None, rows=None):
    """Next-token loss of a causal language model, averaged as transformers' ``ForCausalLMLoss`` does.

    Args:
        hidden: ``(batch, tokens, width)`` final states.
        labels: ``(batch, tokens)``; position t is predicted from t-1; -100 counts nothing.
        num_items_in_batch: divisor; None divides by the number of labels that count.
        weights: ``(batch, tokens)``, the factor of each label's loss; None: 1.
        rows: numbers of the flattened states whose next label counts, and perhaps others; None: all.
    """
    return _total(hidden, labels, head, chunk, softcap, weights, rows) / _items(labels, num_items_in_batch)


def _total(hidden, labels, head, chunk, softcap=None, weights=None, rows=None):
    # the last state predicts nothing; leaving it out would copy all the others
    targets = F.pad(labels[:, 1:], (0, 1), value=_IGNORED).reshape(-1).to(hidden.device)
    _check_labels(targets, head.out_features)
    targets = targets.masked_fill(targets == _IGNORED, -1)
    if weights is not None:
        weights = F.pad(weights[:, 1:], (0, 1)).reshape(-1)
    rows = None if rows is None else rows.to(hidden.device)
    with _gathered(head):
        return LinearCrossEntropy.apply(hidden.reshape(-1, hidden.shape[-1]), targets, head, chunk, softcap, weights, rows)


def _rows_that_count(labels) -> Callable[[], torch.Tensor | None]:
    """A function that gives the numbers of the states whose next label counts, or None where at least half do.

    Called after the decoder was launched, it waits for what the device was given before, not for the decoder: prompts and
    padding then cost no logits, and the device no pause.
    """
    counts = F.pad(labels[:, 1:] != _IGNORED, (0, 1)).reshape(-1)
    if counts.is_cuda and torch.cuda.is_current_stream_capturing():
        return lambda: None
    number = counts.sum().to("cpu", non_blocking=counts.is_cuda)
    looked = torch.cuda.current_stream(counts.device).record_event() if counts.is_cuda else None

    def rows():
        if looked is not None:
            looked.synchronize()
        if 2 * int(number) >= len(counts):
            return None
        return counts.byte().argsort(descending=True, stable=True)[: int(number)]

    return rows


def _check_labels(targets, classes):
    """Refuse labels that are no classes, as torch's cross entropy does; on a GPU nothing waits for the answer."""
    wrong = ((targets < 0) | (targets >= classes)) & (targets != _IGNORED)
    if targets.is_cuda:
        torch.ops.aten._assert_async.msg(~wrong.any(), "a label is out of bounds")
    elif wrong.any():
        raise IndexError(f"Target {targets[wrong][0].item()} is out of bounds.")


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


def _items(labels, num_items_in_batch):
    return (labels[:, 1:] != _IGNORED).sum() if num_items_in_batch is None else num_items_in_batch


class DecoderPlan:
    """A stack of decoder layers, which asks for no cache while it trains unless its caller does."""

    def run(self, model, own, *arguments, **named):
        """Replaces ``model.forward``.

        Without a cache packed ``position_ids`` alone tell documents apart, with one they do not: what the model would do
        with them is left as it is.
        """
        if model.training and torch.is_grad_enabled():
            arguments, named = (), _by_name(own, arguments, named)
            packed = named.get("position_ids") is not None and named.get("attention_mask") is None
            if named.get("use_cache") is None and named.get("past_key_values") is None and not packed:
                named["use_cache"] = False
        return own(*arguments, **named)


@dataclass
class LossPlan:
    """A causal language model's training loss without a batch's logits.

    Attributes:
        chunk: rows of logits that exist at once.
        graphs: CUDA graphs of the step, or None.
    """

    chunk: int
    graphs: StepGraphs | None = None

    def run(self, model, own, *arguments, **named):
        """Replaces ``model.forward`` while it trains; otherwise the model's own runs."""
        given = _by_name(own, arguments, named)
        labels = given.get("labels")
        usual = model.loss_function is ForCausalLMLoss and not any(
            isinstance(given.get(name), torch.Tensor) or given.get(name)
            for name in ("shift_labels", "ignore_index", "logits_to_keep", "use_cache")
        )
        asked = given.get("output_router_logits")
        if asked or (asked is None and getattr(model.config, "output_router_logits", False)):
            usual = False  # the routers have a loss of their own
        frozen = is_known_linear(model.lm_head) and not model.lm_head.weight.requires_grad
        if (
            not (model.training and torch.is_grad_enabled() and usual and frozen)
            or not isinstance(labels, torch.Tensor)
            or labels.dtype != torch.long
            or given.get("return_dict") is False
        ):
            return own(*arguments, **named)
        named = {name: value for name, value in given.items() if name not in ("labels", "num_items_in_batch")}
        items = _items(labels, given.get("num_items_in_batch"))
        ids, mask = named.get("input_ids"), named.get("attention_mask")
        others = [name for name, value in named.items() if value is not None]
        known = {*others} <= {"input_ids", "attention_mask"}
        if self.graphs and known and ids is not None and _fits_a_graph(model.model, ids):
            seen = self.graphs.look_at((ids, labels), model)
            if mask is None or mask.all():  # here the GPU is waited for
                total = self.graphs(
                    lambda ids, labels: _total(_states(model.model, ids), labels, model.lm_head, self.chunk),
                    (ids, labels), model, seen,
                )  # fmt: skip
                return CausalLMOutputWithPast(loss=total / items)
        rows = _rows_that_count(labels)
        outputs = model.model(**{name: named[name] for name in others})
        softcap = getattr(model.config, "final_logit_softcapping", None)
        total = _total(outputs.last_hidden_state, labels, model.lm_head, self.chunk, softcap=softcap, rows=rows())
        return CausalLMOutputWithPast(loss=total / items, hidden_states=outputs.hidden_states, attentions=outputs.attentions)


def _by_name(forward, arguments, named) -> dict:
    """What a call gives to ``forward``, by the names of its parameters."""
    if not arguments:
        return named
    names = [*inspect.signature(forward).parameters]
    return {**dict(zip(names, arguments)), **named}


def _fits_a_graph(base, ids) -> bool:
    if not ids.is_cuda or replays_random_numbers(base) or not is_as_written(base):
        return False
    windows = [getattr(layer.self_attn, "sliding_window", None) for layer in base.layers]
    windows.append(getattr(base.config, "sliding_window", None))
    return all(window is None or window >= ids.shape[1] for window in windows)


def _states(base, ids):
    """The decoder's final states, causal and without padding: its own forward reads the device to find that out."""
    state = base.embed_tokens(ids)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    rotary = base.rotary_emb(state, positions)
    for layer in base.layers:
        state = layer(state, attention_mask=None, position_embeddings=rotary)
    return base.norm(state)
