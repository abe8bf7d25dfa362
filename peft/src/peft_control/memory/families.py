"""The layer structures that have memory modes: one row for each architecture of ``architectures.py`` that does."""

from __future__ import annotations

from itertools import pairwise

from torch import nn
from transformers.activations import SiLUActivation

from ..architectures import ARCHITECTURES
from ..control_layer import ControlLayer
from .attention import decoder_attention, decoder_attention_gradients
from .layers import Halves
from .linear import is_frozen_linear
from .mlp import GatedMlp, PostNormMlp, PreNormMlp


def halves(layer: nn.Module) -> Halves | None:
    """The halves of ``layer``, or None if it has no memory modes.

    Raises:
        ValueError: its MLP is of a kind, or has trainable parameters, for which there are none, or a control is parallel
            to another block than its architecture's.
    """
    bases = [
        base for base in type(layer).__mro__ if base is not object
    ]  # FSDP2 puts a class of its own in front
    for architecture in ARCHITECTURES:
        if architecture.name in FAMILIES and any(map(architecture.matches_class, bases)):
            for name, child in layer.named_children():
                block = architecture.blocks.get(name.removesuffix("_control"))
                if isinstance(child, ControlLayer) and child.block != block:
                    known = ", ".join(architecture.blocks)
                    raise ValueError(
                        f"memory modes know the blocks of {architecture.name} ({known}), not {name}"
                    )
            return FAMILIES[architecture.name](layer)
    return None


def _decoder(layer):
    if any(parameter.requires_grad for parameter in layer.input_layernorm.parameters()):
        raise ValueError("memory modes need frozen norms; input_layernorm has trainable parameters")
    activation = getattr(layer.mlp, "act_fn", None)  # Liger's has none
    if not isinstance(activation, (nn.SiLU, SiLUActivation, type(None))):
        raise ValueError(f"memory modes know decoders with SwiGLU, not {type(activation).__name__}")
    mlp = GatedMlp(layer.post_attention_layernorm, layer.mlp)
    attention = layer.self_attn
    gradients = decoder_attention_gradients if is_frozen_linear(attention.o_proj) else None
    projections = attention.q_proj, attention.k_proj, attention.v_proj
    simple = all(map(is_frozen_linear, projections)) and not hasattr(attention, "q_norm")
    kept = sum(linear.out_features for linear in projections) if gradients and simple else 0
    return Halves(decoder_attention, mlp, True, gradients, attention_kept=kept)


# The attention halves below call the layer's own modules, whose hooks add the control.


def _vit_attention(layer, state, attention_mask=None, **named):
    change, _ = layer.attention(layer.layernorm_before(state), attention_mask, **named)
    return layer.dropout(change) + state


def _activation(mlp):
    return (
        mlp.activation_fn if hasattr(mlp, "activation_fn") else mlp.activation
    )  # its name before transformers 5.2x


def _vit(layer):
    linears = [layer.mlp.fc1, layer.mlp.fc2]
    mlp = PreNormMlp(layer.layernorm_after, linears, _activation(layer.mlp), dropouts=[layer.dropout])
    return Halves(_vit_attention, mlp)


def _dinov2_attention(layer, state, attention_mask=None, **named):
    if attention_mask is not None:  # before transformers 5.2x its attention takes none and returns no tuple
        named["attention_mask"] = attention_mask
    found = layer.attention(layer.norm1(state), **named)
    change = found[0] if isinstance(found, tuple) else found
    return layer.drop_path(layer.layer_scale1(change)) + state


def _dinov2(layer):
    if not hasattr(layer.mlp, "fc1"):
        raise ValueError("memory modes know DINOv2's plain MLP, not its SwiGLU one")
    linears = [layer.mlp.fc1, layer.mlp.fc2]
    scale = layer.layer_scale2.lambda1
    mlp = PreNormMlp(layer.norm2, linears, _activation(layer.mlp), scale, dropouts=[layer.drop_path])
    return Halves(_dinov2_attention, mlp)


def _timm_attention(layer, state, *arguments, **named):
    return state + layer.drop_path1(layer.ls1(layer.attn(layer.norm1(state), *arguments, **named)))


def _timm(layer):
    inner = layer.mlp
    linears = [getattr(inner, name) for name in ("fc1", "eye1", "eye2", "fc2") if hasattr(inner, name)]
    chained = all(a.out_features == b.in_features for a, b in pairwise(linears))
    if not isinstance(getattr(inner, "norm", None), nn.Identity) or not hasattr(inner, "fc1") or not chained:
        raise ValueError("memory modes know timm's Mlp without an inner norm or gate")
    if not isinstance(layer.norm2, nn.LayerNorm):
        raise ValueError(f"memory modes know timm's blocks with LayerNorm, not {type(layer.norm2).__name__}")
    scale = getattr(layer.ls2, "gamma", None)
    dropouts = [inner.drop1, inner.drop2, layer.drop_path2]
    return Halves(_timm_attention, PreNormMlp(layer.norm2, linears, inner.act, scale, dropouts))


def _post_norm_attention(layer, state, attention_mask=None, *cross_attention, past_key_values=None, **named):
    return layer.attention(state, attention_mask, **named)[0]


def _mpnet_attention(layer, state, attention_mask=None, position_bias=None, **named):
    return layer.attention(state, attention_mask, position_bias=position_bias, **named)[0]


def _post_norm(layer):
    if getattr(layer, "is_decoder", False):
        raise ValueError("memory modes know encoders of this architecture, not decoders")
    return Halves(_post_norm_attention, _post_norm_mlp(layer))


def _mpnet(layer):
    return Halves(_mpnet_attention, _post_norm_mlp(layer), returns_tuple=True)


def _post_norm_mlp(layer):
    first, last = layer.intermediate, layer.output
    return PostNormMlp(first.dense, first.intermediate_act_fn, last.dense, last.dropout, last.LayerNorm)


FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _decoder),
    "vit": _vit,
    "dinov2": _dinov2,
    "timm-vit": _timm,
    **dict.fromkeys(("roberta", "xlm-roberta", "bert", "electra"), _post_norm),
    "mpnet": _mpnet,
}
