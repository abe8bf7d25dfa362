"""The layer structures that are written by hand, and which architectures of ``architectures.py`` have them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.activations import SiLUActivation

from ..architectures import ARCHITECTURES
from ..control_layer import ControlLayer
from .attention import DecoderAttention
from .exact import is_as_written, kind_of, path_of
from .layers import Halves
from .linear import is_frozen_linear, rows_are_apart
from .long import LongCall
from .mlp import GatedMlp, PostNormMlp, PreNormMlp

#: Whose modules a layer may consist of, besides those of its own module.
_LIBRARIES = (
    "torch.nn.modules.",
    "transformers.activations.",
    "timm.layers.",
    "bitsandbytes.nn.",
    "transformers.integrations.finegrained_fp8.",
    "peft_control.fp8.",
    "liger_kernel.",
)


def halves(layer: nn.Module) -> Halves | None:
    """The halves of ``layer``, or None if it is of no family.

    Raises:
        ValueError: the layer, or a part of it that is not called as a module, is not exactly what the family has: another
            class, a forward or hook of somebody else's, trainable parameters, a control parallel to another block.
    """
    path = path_of(kind_of(layer))
    if path not in _NAMES:
        return None
    name, home = _NAMES[path], path.rpartition(".")[0]
    blocks = next(row.blocks for row in ARCHITECTURES if row.name == name)
    for child_name, child in layer.named_children():
        if isinstance(child, ControlLayer) and child.block != blocks.get(child_name.removesuffix("_control")):
            raise ValueError(f"memory modes know the blocks of {name} ({', '.join(blocks)}), not {child_name}")
    found = FAMILIES[name](layer)
    parts = {module for part in found.mlp_modules for module in part.modules()} | set(found.by_hand)
    for part in parts:
        known = path_of(type(part)).startswith((*_LIBRARIES, f"{home}."))
        # an MLP's own class may name its linear layers, in order: the activation follows the first
        if not ((known or "linear_chain" in vars(type(part))) and is_as_written(part)):
            raise ValueError(f"memory modes run no {type(part).__name__} with a forward or hook of somebody else's")
    if not is_as_written(layer, hooks=False):
        raise ValueError(f"memory modes run no {kind_of(layer).__name__} with a forward of somebody else's")
    return found


def is_known_model(model: nn.Module) -> bool:
    """Whether ``model`` is exactly a causal language model of a family."""
    decoder = path_of(type(model)).replace("ForCausalLM", "DecoderLayer")
    return type(model).__name__.endswith("ForCausalLM") and FAMILIES.get(_NAMES.get(decoder, "")) is _decoder


#: Causal language models of transformers besides those of FAMILIES whose loss is that of ``lm_head(model(...))``, softcapped
#: where the configuration says so.
_PLAIN_HEADS = """
    Phi3 Gemma Ministral Ministral3 SmolLM3 Starcoder2 Glm Glm4 Olmo Olmo2 Olmo3 Ernie4_5 SeedOss Exaone4 Apertus Nemotron Phi
    StableLm Qwen3_5 Lfm2 Gemma2 Gemma3 Mixtral Qwen2Moe Qwen3Moe GptOss Olmoe Phimoe Qwen3Next Glm4Moe DeepseekV2 DeepseekV3
    Llama4
"""


def has_plain_head(model: nn.Module) -> bool:
    """Whether ``model`` is exactly a causal language model whose loss ``loss.py`` can compute."""
    module, name = type(model).__module__, type(model).__name__
    listed = name.endswith("ForCausalLM") and name.removesuffix("ForCausalLM") in _PLAIN_HEADS.split()
    return is_known_model(model) or (listed and module.startswith("transformers.models."))


def _decoder(layer):
    attention, inner = layer.self_attn, layer.mlp
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    if not all(type(norm).__name__.endswith("RMSNorm") and hasattr(norm, "variance_epsilon") for norm in norms):
        raise ValueError("memory modes know decoders with RMSNorm")
    if any(parameter.requires_grad for parameter in layer.input_layernorm.parameters()):
        raise ValueError("memory modes need frozen norms; input_layernorm has trainable parameters")
    activation = getattr(inner, "act_fn", None)  # Liger's has none
    if not isinstance(activation, (nn.SiLU, SiLUActivation, type(None))):
        raise ValueError(f"memory modes know decoders with SwiGLU, not {type(activation).__name__}")
    block = DecoderAttention(layer)
    gradients = block.gradients if is_frozen_linear(attention.o_proj) else None
    by_hand = [linear for linear in (*block.projections, attention.o_proj) if not isinstance(linear, BaseTunerLayer)]
    by_hand += [layer.input_layernorm, attention, *(block.norms if block.frozen else ())]
    keeps = gradients and block.frozen and not block.norms
    mlp = GatedMlp(layer.post_attention_layernorm, inner)
    return Halves(
        block,
        mlp,
        [layer.post_attention_layernorm, inner],
        by_hand=by_hand,
        joined=[block.joined, mlp.joined],
        recompute_attention=True,
        attention_gradients=gradients,
        attention_kept=sum(linear.out_features for linear in block.projections) if keeps else 0,
        of_many_tokens=LongCall if gradients and block.frozen and rows_are_apart(block.projections) else None,
    )


# The attention halves below call the layer's own modules, whose hooks add the control.


def _vit_attention(layer, state, attention_mask=None, **named):
    change, _ = layer.attention(layer.layernorm_before(state), attention_mask, **named)
    return layer.dropout(change) + state


def _activation(mlp):
    return mlp.activation_fn if hasattr(mlp, "activation_fn") else mlp.activation  # its name before transformers 5.2x


def _vit(layer):
    linears = [layer.mlp.fc1, layer.mlp.fc2]
    mlp = PreNormMlp(layer.layernorm_after, linears, _activation(layer.mlp), dropouts=[layer.dropout])
    return Halves(partial(_vit_attention, layer), mlp, [layer.layernorm_after, layer.mlp], [layer.dropout])


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
    modules = [layer.norm2, layer.mlp, layer.layer_scale2]
    return Halves(partial(_dinov2_attention, layer), mlp, modules, [layer.drop_path])


def _timm_attention(layer, state, *arguments, **named):
    return state + layer.drop_path1(layer.ls1(layer.attn(layer.norm1(state), *arguments, **named)))


def _timm(layer):
    inner = layer.mlp
    linears = [getattr(inner, name) for name in getattr(type(inner), "linear_chain", ("fc1", "fc2")) if hasattr(inner, name)]
    chained = all(a.out_features == b.in_features for a, b in pairwise(linears))
    if not isinstance(getattr(inner, "norm", None), nn.Identity) or not hasattr(inner, "fc1") or not chained:
        raise ValueError("memory modes know timm's Mlp without an inner norm or gate")
    if not isinstance(layer.norm2, nn.LayerNorm):
        raise ValueError(f"memory modes know timm's blocks with LayerNorm, not {type(layer.norm2).__name__}")
    scale = getattr(layer.ls2, "gamma", None)
    dropouts = [inner.drop1, inner.drop2, layer.drop_path2]
    mlp = PreNormMlp(layer.norm2, linears, inner.act, scale, dropouts)
    return Halves(partial(_timm_attention, layer), mlp, [layer.norm2, inner, layer.ls2], [layer.drop_path2])


def _post_norm_attention(layer, state, attention_mask=None, *cross_attention, past_key_values=None, **named):
    return layer.attention(state, attention_mask, **named)[0]


def _mpnet_attention(layer, state, attention_mask=None, position_bias=None, **named):
    return layer.attention(state, attention_mask, position_bias=position_bias, **named)[0]


def _post_norm(layer):
    if getattr(layer, "is_decoder", False):
        raise ValueError("memory modes know encoders of this architecture, not decoders")
    return Halves(partial(_post_norm_attention, layer), _post_norm_mlp(layer), [layer.intermediate, layer.output])


def _mpnet(layer):
    modules = [layer.intermediate, layer.output]
    return Halves(partial(_mpnet_attention, layer), _post_norm_mlp(layer), modules, returns_tuple=True)


def _post_norm_mlp(layer):
    first, last = layer.intermediate, layer.output
    return PostNormMlp(first.dense, first.intermediate_act_fn, last.dense, last.dropout, last.LayerNorm)


#: How the layers of an architecture are written by hand: ``(layer)`` -> its halves. Raises ValueError if it consists of something
#: else.
FAMILIES: dict[str, Callable[[nn.Module], Halves]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _decoder),
    "vit": _vit,
    "dinov2": _dinov2,
    "timm-vit": _timm,
    **dict.fromkeys(("roberta", "xlm-roberta", "bert", "electra"), _post_norm),
    "mpnet": _mpnet,
}


def _path(row):
    if row.name == "timm-vit":
        return f"timm.models.{row.layer}"
    module = row.name.replace("-", "_")
    return f"transformers.models.{module}.modeling_{module}.{row.layer}"


#: Their names by the class of their layers.
_NAMES = {_path(row): row.name for row in ARCHITECTURES if row.name in FAMILIES}
