"""Lean control: how much of a frozen block training keeps, and how much it recomputes.

A controlled block's frozen interior has no weight gradients, so a backward needs far less of it than plain
autograd keeps. :func:`set_memory_mode` chooses the trade; gradients are exact in every mode.
"""

from __future__ import annotations

import warnings
from functools import partial
from types import MethodType

from torch import nn
from transformers import PreTrainedModel

from .attention import last_norm
from .families import FAMILIES, halves
from .graphs import StepGraphs, graphed_forward
from .layers import Plan, training_forward
from .linear import is_known_linear
from .loss import causal_lm_forward
from .mlp import GatedMlp
from .offload import HostStates

MODES = ("plain", "fast", "balanced", "lean")

# By default a chunk's logits have about so many elements: 512 rows of LLaMA-3-8B's (131 MB in bfloat16). Larger chunks
# are no faster there, smaller ones are launch-bound. ``mlp.py`` has the same for intermediate tensors.
_LOGITS_ELEMENTS = 512 * 128256

# Host memory is slow: 50 GB/s over PCIe 5, against 700 TFLOP/s in bfloat16. So a layer's forward takes as long as what is
# copied travels if it has 7,000 parameters for each byte a token.
_PARAMETERS_PER_BYTE = 7000

# Where one matmul for gate and up is faster than two.
_STACKED_ON = "cuda"


def set_memory_mode(
    model: nn.Module,
    mode: str,
    *,
    chunk_tokens: int | None = None,
    offload: bool | None = None,
    fused_loss: bool = True,
    cuda_graphs: bool = False,
    on_unsupported: str = "error",
) -> nn.Module:
    """Set how ``model`` trains; reversible, and no part of the adapter that is saved.

    Args:
        model: a model with a control adapter (LoRA on q, k, v may be in it), or its base model.
        mode: "plain" (autograd as it is), "fast" (no matmul recomputed), "balanced" (one MLP matmul recomputed,
            in SwiGLU decoders attention too, or what that needs waits on the host) or "lean" (one state per layer
            kept, the MLP worked in chunks). On a GPU "fast" moves the frozen weights of a SwiGLU's gate and up into one
            piece of memory, layer by layer; they stay the parameters that they are.
        chunk_tokens: tokens per chunk of an MLP of which nothing is kept; the loss works on a quarter of it at a
            time. None: by the layer's width.
        offload: lean keeps its states in pinned host memory (on a GPU), in SwiGLU decoders two of each layer instead
            of one. None: where the layers are so large that the copies take less time than the computation, as in a
            LLaMA of 7 or 8 billion parameters. Where copies of queries, keys and values do too (LLaMA-3, whose keys and
            values are few), lean and balanced have them wait there as well, until a process has 8 GiB there; not if False.
            At first an H100's speeds are assumed. Then what spares computing waits there only while copies are measured
            to take no longer than a layer's forward: those of several GPUs of one host may. Nothing is measured with
            ``cuda_graphs``, nor used under ``torch.use_deterministic_algorithms``.
            All processes of a host together use at most three quarters of its free memory: if that is less than two states
            of each layer, some layers keep one there, and if it is less than one, some on the GPU.
        fused_loss: causal language models compute their training loss without a batch's logits, so that
            ``outputs.logits`` is None while training with labels, and their last norm by the layers' kernel. Not where the
            output layer is trained.
        cuda_graphs: the training step is replayed as CUDA graphs when its shapes were seen before: for small
            batches of few shapes, whose time goes into kernel launches; in every mode, "plain" too. What cannot be
            replayed runs without a graph: more than sixteen shapes, a causal language model's batch with padding,
            dropout in a layer that torch's checkpointing recomputes (decoders in "balanced", ViTs with dropout).
        on_unsupported: "error", or "warn" to stay plain.

    Adapters may come or go later; between a forward and its backward they may not be switched, nor training and evaluation. A
    loss of one's own, ``shift_labels`` or ``ignore_index``, and what needs a cache or attention's weights, run the model's own
    code. Forward hooks on a decoder layer's attention, norms and MLP do not run; those on its linear layers see values but must
    not change them.

    Returns:
        The model.

    Raises:
        ValueError: unknown mode, an unsupported architecture, gradient checkpointing is on, or trainable
            parameters inside an MLP. The model is then in mode "plain".
    """
    if mode not in MODES:
        raise ValueError(f"unknown memory mode {mode!r}: choose from {', '.join(MODES)}")
    _restore(model)
    if mode != "plain":
        # graphs are replayed with what they were captured with
        paced = offload is None and not cuda_graphs
        _replace_layers(model, mode, chunk_tokens, offload, paced, on_unsupported)
        if fused_loss:
            _fuse_loss(model, chunk_tokens)
    if cuda_graphs:
        _replay_steps(model)
    return model


def _replace_layers(model, mode, chunk_tokens, offload, paced, on_unsupported):
    plans, message = {}, None
    try:
        for layer in model.modules():
            found = halves(layer)
            if found is not None:
                chunk = chunk_tokens or max(found.mlp.CHUNK_ELEMENTS // found.mlp.width, 1)
                plans[layer] = Plan(mode, found, chunk)
    except ValueError as error:
        message = str(error)
    if not plans and message is None:
        message = (
            f"memory mode {mode!r} supports {', '.join(FAMILIES)}; {_class_name(model)} has no such layer"
        )
    if message is not None:
        if on_unsupported == "warn":
            warnings.warn(f"{message}; it trains in mode 'plain'", stacklevel=3)
            return
        raise ValueError(message)
    if any(
        getattr(m, "gradient_checkpointing", getattr(m, "grad_checkpointing", False)) for m in model.modules()
    ):
        raise ValueError(f"memory mode {mode!r} replaces gradient checkpointing: switch that off first")
    host = HostStates(len(plans) if mode == "lean" else 0, paced)
    for layer, plan in plans.items():
        plan.watch(layer, halves)
        kept, hides_copies = plan.halves.attention_kept, partial(_hides_copies, layer, plan)
        plan.attention_on_host = mode != "fast" and offload is not False and kept > 0 and hides_copies(kept)
        states_on_host = mode == "lean" and (hides_copies() if offload is None else offload)
        if plan.attention_on_host or states_on_host:
            plan.host = host
        layer.memory_plan = plan
        _replace_forward(layer, training_forward)
    for plan in plans.values() if mode == "fast" else ():
        if isinstance(plan.mlp, GatedMlp) and plan.mlp.norm.weight.device.type == _STACKED_ON:
            plan.mlp.stack()


def _hides_copies(layer, plan, more=0):
    """Whether the layer computes for as long as two states of each token and ``more`` numbers travel."""
    weight = plan.mlp.norm.weight
    if weight is None:
        return False
    token_bytes = (2 * weight.numel() + more) * weight.element_size()
    # not their numel: 4-bit weights are packed
    linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    parameters = sum(linear.in_features * linear.out_features for linear in linears)
    return _PARAMETERS_PER_BYTE * token_bytes <= parameters


def _fuse_loss(model, chunk_tokens):
    trained_in_pieces = any("memory_plan" in vars(module) for module in model.modules())
    for module in model.modules() if trained_in_pieces else ():
        if not isinstance(module, PreTrainedModel):
            continue
        base, head = getattr(module, module.base_model_prefix, None), getattr(module, "lm_head", None)
        decodes = any("memory_plan" in vars(layer) for layer in getattr(base, "layers", ()))
        if decodes and is_known_linear(head):
            rows = chunk_tokens // 4 if chunk_tokens else _LOGITS_ELEMENTS // module.lm_head.out_features
            module.loss_chunk = max(rows, 1)
            _replace_forward(module, causal_lm_forward)
            _replace_last_norm(base)


def _replace_last_norm(decoder):
    norm, layers = getattr(decoder, "norm", None), getattr(decoder, "layers", ())
    kinds = {type(getattr(layer, "input_layernorm", None)) for layer in layers}
    if norm is not None and type(norm) in kinds and "forward" not in vars(norm):
        norm.is_last_norm = True
        _replace_forward(norm, last_norm)


def _replay_steps(model):
    fused = [module for module in model.modules() if "loss_chunk" in vars(module)]
    for module in fused:
        module.step_graphs = StepGraphs()
    if not fused:
        whole = model.get_base_model() if hasattr(model, "get_base_model") else model
        whole.step_graphs = StepGraphs()
        _replace_forward(whole, graphed_forward)


def _restore(model):
    for module in model.modules():
        for name in ("memory_plan", "loss_chunk", "is_last_norm", "step_graphs"):
            vars(module).pop(name, None)
        if "forward_before" in vars(module):
            del module.forward
            if module.forward_before is not None:
                module.forward = module.forward_before
            del module.forward_before


def _replace_forward(module, forward):
    """Have ``forward(module, ...)`` called instead, and remember a forward that others have put in its place."""
    if "forward_before" not in vars(module):
        module.forward_before = vars(module).get("forward")
    module.forward = MethodType(forward, module)


def _class_name(module):
    return type(module).__name__.removeprefix("FSDP")
