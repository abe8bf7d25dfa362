"""Lean control: how much of a frozen block training keeps, and how much it recomputes.

A controlled block's frozen interior has no weight gradients, so a backward needs far fewer activations than plain
autograd keeps. :func:`set_memory_mode` chooses the trade; gradients are exact in every mode. (Over FP8 all but plain quantize
the gradients of gate and up as one row, and where neither norms nor LoRA follow the projections those of queries, keys and
values: another rounding, no rougher one.) What a layer of a SwiGLU decoder keeps from its forward to its backward (pinned: in
pinned host memory; A and B are the control's):

    activation                   plain   fast    balanced               lean
    input state x                GPU     GPU     GPU, pinned *          GPU, pinned *
    normalised x, twice more     GPU     -       -                      -
    queries, keys, values        GPU     GPU     recomputed, pinned *   recomputed, pinned *
    attention's output           GPU     GPU     recomputed             recomputed
    state between the halves     GPU     GPU     GPU                    recomputed, pinned *
    gate                         GPU     GPU     GPU                    recomputed in chunks
    up                           GPU     GPU     recomputed             recomputed in chunks
    silu(gate), its product      GPU     -       -                      -
    A(x), A(h)                   GPU     GPU     recomputed, GPU        recomputed

    -: never needed again    *: where the copies overlap with the computation and the host has room (``offload.py``)

From 8,192 tokens a step on, and without dropout, lean works a SwiGLU decoder's attention by groups of heads and all else by
chunks of tokens. A backward then needs half the memory a token. Attention's output waits in pinned memory instead of the
other tensors (``long.py``).

Who calls whom in a training step:

    model.forward             loss.py         LossPlan: the loss in chunks; graphs.py replays whole steps
      layer.forward           forward.py      Forward: the layer's weights arrive (streaming.py), then its plan runs
        LayerPlan.run         layers.py       is the layer still what families.py knows (exact.py)?
          Node, with a Call   layers.py       one or two nodes of autograd: what is kept, where, and what is recomputed
            the two halves    attention.py, mlp.py, control.py, made of linear.py and kernels.py
            HostStates        offload.py      copies to and from pinned memory; pace.py measures whether they overlap
            Drawn, Twins      replay.py       dropout's numbers, drawn again in the backward
          run_alone           generic.py      any other layer in mode lean: its own forward, once more in the backward
"""

from __future__ import annotations

import inspect
import math

from torch import nn
from transformers import PreTrainedModel

from ..architectures import ARCHITECTURES
from ..control_layer import ControlLayer
from .attention import NormPlan
from .exact import is_as_written, kind_of
from .families import FAMILIES, halves, has_plain_head, is_known_model
from .forward import enter, leave
from .generic import look_at, parameters_per_token
from .graphs import StepGraphs, StepPlan
from .layers import LayerPlan
from .loss import DecoderPlan, LossPlan
from .offload import HostStates
from .streaming import RESIDENT, start, stop

MODES = ("plain", "fast", "balanced", "lean")

# By default a chunk's logits have about so many elements: 512 rows of LLaMA-3-8B's (131 MB in bfloat16). Larger chunks
# are no faster there, smaller ones are launch-bound. ``mlp.py`` has the same for intermediate tensors.
_LOGITS_ELEMENTS = 512 * 128256

# Host memory is slow: 50 GB/s over PCIe 5, against 700 TFLOP/s in bfloat16. So a layer's forward takes as long as what is
# copied travels if it has 7,000 parameters for each byte a token.
_PARAMETERS_PER_BYTE = 7000

# Forwards that take as long as a layer's backward, attention and what is computed again included.
_BACKWARD = 3

# Where one matmul for several layers of an input is faster than one for each.
_JOINED_ON = "cuda"


def set_memory_mode(
    model: nn.Module,
    mode: str,
    *,
    chunk_tokens: int | None = None,
    offload: bool | str | None = None,
    fused_loss: bool = True,
    cuda_graphs: bool = False,
    stream_weights: bool | int = False,
) -> nn.Module:
    """Set how ``model`` trains; reversible, and no part of the adapter that is saved. The table above says what each mode keeps.

    Args:
        model: a model with a control adapter (LoRA on q, k, v may be in it), or its base model.
        mode: "plain" (autograd as it is), "fast" (no matmul recomputed), "balanced" (one MLP matmul recomputed,
            in SwiGLU decoders attention too) or "lean" (one state per layer kept, the MLP recomputed in chunks). On a GPU
            "fast" moves the frozen weights of a SwiGLU's gate and up, and those of a decoder's q, k and v, into one piece of memory.
        chunk_tokens: tokens per chunk of an MLP of which nothing is kept; the loss works on a quarter of it at a
            time. None: by the layer's width.
        offload: whether lean keeps states in pinned host memory (on a GPU). None: where the copies overlap with the
            computation, which is measured in the first steps, but not with ``cuda_graphs`` or
            ``torch.use_deterministic_algorithms``. Unless it is False, lean and balanced also keep queries, keys and values there
            where their copies overlap too, until a process has 8 GiB there. All processes of a host use at most three quarters of
            its free memory; a line of the log says what waits where. "fp8" (lean alone) is for the longest sequences: one state a
            layer, in e4m3 with a power of two for each token. The loss is the same; rounded states move the gradients of small
            random models by 3 %.
        fused_loss: causal language models compute their training loss without a batch's logits, so that
            ``outputs.logits`` is None while training with labels, and their last norm by the layers' kernel. Not where the
            output layer is trained.
        cuda_graphs: replay training steps as CUDA graphs, in every mode: for small batches of few shapes, which are
            launch-bound. What cannot be replayed runs without a graph: more than sixteen shapes, a causal language model's
            batch with padding, dropout in a layer that torch's checkpointing recomputes (decoders in "balanced", ViTs).
        stream_weights: the layers' frozen weights wait in host memory, and come to the device that the states are on while the
            layers before compute: see ``streaming.py``. Two layers lie there at a time, or as many as a larger number says. Where a
            step's tokens are few, states stay on the device, which leaves the way to the weights. Give a
            model that lies on the host, then ``model.to(device)`` takes the rest of it there. A call without this brings the
            weights back to where they were.

    "fast" and "balanced" refuse a layer that ``families.py`` does not know exactly (another class, a trained norm or MLP), which
    in mode "lean" trains through its own forward (``generic.py``). One that becomes so later does that too, with a warning. A loss
    of one's own, ``shift_labels`` or ``ignore_index``, and what needs a cache or attention's weights, run the model's own code.
    Decoders make no cache while they train unless ``use_cache=True`` is given with the call. Between a forward and its backward
    adapters may not be switched, nor training and evaluation, nor parameters be changed in place.

    Returns:
        The model.

    Raises:
        ValueError: unknown mode or size, gradient checkpointing is on, no layer to be found, or ("fast" and "balanced") a layer
            for which nothing is written by hand, or weights that cannot be streamed: with ``cuda_graphs``, in mode "fast",
            sharded, moved by accelerate, in int8, or too large for the host. The model is then in mode "plain".
    """
    if mode not in MODES:
        raise ValueError(f"unknown memory mode {mode!r}: choose from {', '.join(MODES)}")
    if chunk_tokens is not None and (type(chunk_tokens) is not int or chunk_tokens < 1):
        raise ValueError(f"chunk_tokens must be an integer of at least 1, got {chunk_tokens!r}")
    resident = RESIDENT if stream_weights is True else stream_weights
    if type(stream_weights) is not bool and (type(stream_weights) is not int or stream_weights < 2):
        raise ValueError(f"stream_weights must be True, False or a number of layers from 2 on, got {stream_weights!r}")
    if resident and (cuda_graphs or mode == "fast"):
        raise ValueError(f"weights are not streamed {'with CUDA graphs' if cuda_graphs else 'in memory mode fast'}")
    if offload not in (None, True, False, "fp8") or (offload == "fp8" and mode != "lean"):
        raise ValueError(f"offload must be None, True, False or, in mode 'lean', 'fp8', got {offload!r} in mode {mode!r}")
    for module in model.modules():
        leave(module)
    if resident:
        start(model, _is_layer, resident)
    else:
        stop(model)
    if mode != "plain":
        # graphs are replayed with what they were captured with
        paced = offload is None and not cuda_graphs
        plans = _plan_layers(model, mode, chunk_tokens, offload, paced)
        _plan_models(model, plans, chunk_tokens, fused_loss)
    if cuda_graphs:
        _replay_steps(model)
    return model


def _plan_layers(model, mode, chunk_tokens, offload, paced):
    plans = {layer: LayerPlan(layer, mode, halves, look_at, chunk_tokens) for layer in model.modules() if _is_layer(layer)}
    if not plans:
        raise ValueError(f"{type(model).__name__} has no layer that Control knows and no control")
    others = [(layer, plan.reason) for layer, plan in plans.items() if plan.halves is None]
    if others and mode != "lean":  # which recomputes whatever stands in a layer
        layer, reason = others[0]
        known = f"memory mode {mode!r} supports {', '.join(FAMILIES)}"
        raise ValueError(reason or f"{known}; {kind_of(layer).__name__} is no layer of theirs (lean takes any)")
    if any(getattr(m, "gradient_checkpointing", getattr(m, "grad_checkpointing", False)) for m in model.modules()):
        raise ValueError(f"memory mode {mode!r} replaces gradient checkpointing: switch that off first")
    host = HostStates(len(plans) if mode == "lean" else 0, paced, offload == "fp8")
    for layer, plan in plans.items():
        width, size = _state_of(layer, plan)
        kept = 0 if plan.halves is None else plan.halves.attention_kept
        if offload is None:
            host.from_tokens = max(host.from_tokens, _tokens_beside_weights(layer, (2 * width + kept) * size))
        if plan.halves is None:
            waits = plan.alone and (_overlaps(layer, width * size) if offload is None else offload)
        else:
            overlaps = mode != "fast" and offload is not False and _overlaps(layer, (2 * width + kept) * size)
            plan.attention_on_host = kept > 0 and overlaps
            states = mode == "lean" and (_overlaps(layer, 2 * width * size) if offload is None else offload)
            waits = plan.attention_on_host or states
            for joined in plan.halves.joined if mode == "fast" else ():
                joined.join(_JOINED_ON)
        plan.host = host if waits else None
        enter(layer, plan)
    return plans


def _is_layer(module):
    """Whether ``module`` is a transformer layer: one with a row of its own, or with a control."""
    controlled = any(isinstance(child, ControlLayer) for child in module.children())
    return controlled or any(row.matches(kind_of(module)) for row in ARCHITECTURES)


def _state_of(layer, plan):
    """The width of a layer's state, 0 if nothing tells it, and the bytes of one of its numbers."""
    weight = None if plan.halves is None else plan.mlp.norm.weight
    if weight is not None:
        return weight.numel(), weight.element_size()
    # a state's type is that of the frozen weights; not of bytes, nor of FP8's scales beside them
    sizes = [parameter.element_size() for parameter in layer.parameters() if parameter.is_floating_point()]
    widths = [child.width for child in layer.children() if isinstance(child, ControlLayer)]
    return next(iter(widths), 0), min((size for size in sizes if size > 1), default=4)


def _overlaps(layer, token_bytes):
    """Whether a layer computes a token for as long as so many bytes travel to the host."""
    return token_bytes > 0 and _PARAMETERS_PER_BYTE * token_bytes <= parameters_per_token(layer)


def _tokens_beside_weights(layer, token_bytes):
    """From how many tokens on a layer's backward takes as long as its streamed weights and so many bytes a token travel."""
    weights = vars(layer).get("memory_weights")
    if weights is None:
        return 0
    beside = _BACKWARD * parameters_per_token(layer) - _PARAMETERS_PER_BYTE * token_bytes
    return _PARAMETERS_PER_BYTE * weights.nbytes / beside if beside > 0 else math.inf


def _plan_models(model, plans, chunk_tokens, fused_loss):
    """What surrounds the layers: no cache while training, the last norm, the loss."""
    by_hand = {layer for layer, plan in plans.items() if plan.halves is not None}
    for module in model.modules():
        lists = [child for child in module.children() if isinstance(child, nn.ModuleList)]
        layers = next((found for found in lists if any(layer in plans for layer in found)), None)
        if not isinstance(module, PreTrainedModel) or layers is None:
            continue
        if "use_cache" in inspect.signature(type(module).forward).parameters:
            enter(module, DecoderPlan())
        norm = getattr(module, "norm", None)
        kinds = {type(layer.input_layernorm) for layer in layers if layer in by_hand and hasattr(layer, "input_layernorm")}
        if fused_loss and isinstance(norm, nn.Module) and type(norm) in kinds and is_as_written(norm):
            enter(norm, NormPlan())
    for module in model.modules() if fused_loss else ():
        if not has_plain_head(module) or not is_as_written(module, hooks=False):
            continue
        if any(layer in by_hand or plans[layer].alone for layer in module.model.layers if layer in plans):
            rows = chunk_tokens // 4 if chunk_tokens else _LOGITS_ELEMENTS // module.config.vocab_size
            enter(module, LossPlan(max(rows, 1)))


def _replay_steps(model):
    known = [vars(module).get("memory_plan") for module in model.modules() if is_known_model(module)]
    losses = [plan for plan in known if isinstance(plan, LossPlan)]
    for plan in losses:
        plan.graphs = StepGraphs()
    if not losses:
        whole = model.get_base_model() if hasattr(model, "get_base_model") else model
        enter(whole, StepPlan(vars(whole).get("memory_plan")))
