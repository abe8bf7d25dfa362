"""Where each architecture has its residual blocks: the one table behind ``control_blocks``.

A *block* is a frozen residual function from an input state to an output state of the residual stream. Its row
names two submodules of a transformer layer:

- ``read``: the module whose first input is the block's **input state** (for a pre-norm block its norm),
- ``write``: the module whose output the control is added to: the last frozen module before the residual sum,
  because ``x + (f(x) + control) = (x + f(x)) + control``.

So a frozen LayerScale, DropPath, dropout or post-block norm never touches the control. Where a layer multiplies
the write's output by a constant, the row names that and the control is divided by it. Neither module is the
layer itself: gradient checkpointing may recompute a layer's ``forward`` without the hooks on the layer.
Adding a family is one row; for a model of your own pass a row as ``ControlConfig(control_architecture=...)``.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

INITS = ("kaiming", "normal")  # of A; see ControlConfig.control_init


@dataclass(frozen=True)
class Block:
    """One controlled block of a layer.

    Attributes:
        read, write: paths relative to the layer; ``-1`` is a list's last module. Of alternatives, ``"self_attn|conv"``,
            a layer's is the first that it has.
        multiplier: the attribute of the layer that multiplies the output of ``write``, if one does.
        shared: whether the layer also calls ``write`` before ``read``, for something else.
    """

    read: str
    write: str
    multiplier: str = ""
    shared: bool = False

    def of(self, layer: nn.Module) -> Block:
        """The block with the paths that ``layer`` has; raises AttributeError where it has none."""
        return replace(self, read=_path(layer, self.read), write=_path(layer, self.write))


def _path(layer: nn.Module, alternatives: str) -> str:
    for path in alternatives.split("|"):
        parts: list[str] = []
        for part in path.split("."):
            siblings = list(layer.get_submodule(".".join(parts)).children()) if part == "-1" else []
            parts.append(str(len(siblings) - 1) if part == "-1" else part)
        try:
            layer.get_submodule(".".join(parts))
            return ".".join(parts)
        except AttributeError:
            continue
    raise AttributeError(alternatives)


@dataclass(frozen=True)
class Architecture:
    """Where the blocks of one architecture are.

    Attributes:
        name: the family, as in ``config.model_type`` where transformers has one.
        layer: class name of the transformer layer; a dotted prefix narrows it to a module, ``|`` separates several.
        norm: path in the layer of a norm whose one-dimensional weight (or ``normalized_shape``) has the state's width.
        blocks: the blocks by name.
        init: the family's own initialisation, "kaiming" or "normal" (see ``ControlConfig.control_init``).
    """

    name: str
    layer: str
    norm: str
    blocks: dict[str, Block]
    init: str = "kaiming"

    def matches(self, cls: type) -> bool:
        """Whether ``cls`` is the class of such a layer."""
        path = f".{cls.__module__}.{cls.__qualname__}"
        return any(path.endswith(f".{layer}") for layer in self.layer.split("|"))

    def check(self, layer: nn.Module) -> None:
        """Raise ValueError if a path of the row does not lead to a module of ``layer``."""
        try:
            _path(layer, self.norm)
            for block in self.blocks.values():
                block.of(layer)
        except AttributeError as error:
            raise ValueError(
                f"{type(layer).__name__} has no module {str(error)!r}, which the row {self.name!r} names"
            ) from error

    def state_width(self, layer: nn.Module) -> int:
        norm: Any = layer.get_submodule(_path(layer, self.norm))
        weight = next(norm.parameters(), None)
        return norm.normalized_shape[-1] if weight is None else weight.shape[0]  # OLMo's has no weight

    def as_dict(self) -> dict:
        """The row as :meth:`from_dict` takes it, without what has its default."""
        blocks = {name: {key: value for key, value in asdict(block).items() if value} for name, block in self.blocks.items()}
        init = {} if self.init == INITS[0] else {"init": self.init}
        return {"layer": self.layer, "norm": self.norm, "blocks": blocks, **init}

    @classmethod
    def from_dict(cls, row: dict) -> Architecture:
        """Build a row from plain JSON types: ``{"layer", "norm", "blocks": {name: {"read", "write"}}, ...}``.

        Raises:
            ValueError: a key is missing, unknown or of the wrong type.
        """
        example = '{"layer": "MyLayer", "norm": "norm1", "blocks": {"mlp": {"read": "norm2", "write": "mlp"}}}'
        try:
            blocks = {name: Block(**block) for name, block in row["blocks"].items()}
            architecture = cls(**{"name": row["layer"], **row, "blocks": blocks})
            paths = [path for block in blocks.values() for path in (block.read, block.write)]
            names = [architecture.layer, architecture.norm, *blocks, *paths]
            if not (blocks and architecture.init in INITS and all(isinstance(name, str) and name for name in names)):
                raise TypeError("a field is empty or of the wrong type")
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"control_architecture must look like {example}, got {row!r}") from error
        return architecture


# Families as name:class, then = and the structure that they share: each block as read>write. What the layer multiplies the
# output of `write` by follows a *, and ! says that it calls `write` before `read` too. The norm is what the last block reads
# if nothing else is said.
_TABLE = """
# decoders and mixtures of experts, their encoders of text and images
llama:LlamaDecoderLayer mistral:MistralDecoderLayer ministral:MinistralDecoderLayer ministral3:Ministral3DecoderLayer
qwen2:Qwen2DecoderLayer qwen3:Qwen3DecoderLayer qwen2_moe:Qwen2MoeDecoderLayer qwen3_moe:Qwen3MoeDecoderLayer
qwen2_vl:Qwen2VLDecoderLayer qwen2_5_vl:Qwen2_5_VLDecoderLayer qwen3_vl:Qwen3VLTextDecoderLayer
gemma:GemmaDecoderLayer smollm3:SmolLM3DecoderLayer starcoder2:Starcoder2DecoderLayer nemotron:NemotronDecoderLayer
glm:GlmDecoderLayer glm4_moe:Glm4MoeDecoderLayer olmo:OlmoDecoderLayer olmoe:OlmoeDecoderLayer
ernie4_5:Ernie4_5DecoderLayer seed_oss:SeedOssDecoderLayer gpt_oss:GptOssDecoderLayer
mixtral:MixtralDecoderLayer phimoe:PhimoeDecoderLayer eurobert:EuroBertDecoderLayer
deepseek_v2:DeepseekV2DecoderLayer deepseek_v3:DeepseekV3DecoderLayer
    = attention:input_layernorm>self_attn mlp:post_attention_layernorm>mlp
qwen2_vl-vision:Qwen2VLVisionBlock qwen2_5_vl-vision:Qwen2_5_VLVisionBlock qwen3_vl-vision:Qwen3VLVisionBlock = attention:norm1>attn mlp:norm2>mlp
llama4:Llama4TextDecoderLayer = attention:input_layernorm>self_attn mlp:post_attention_layernorm>feed_forward
gemma2:Gemma2DecoderLayer gemma3:Gemma3DecoderLayer gemma4:Gemma4TextDecoderLayer
    = attention:input_layernorm>post_attention_layernorm mlp:pre_feedforward_layernorm>post_feedforward_layernorm
gemma3n:Gemma3nTextDecoderLayer = mlp:pre_feedforward_layernorm>post_feedforward_layernorm
phi3:Phi3DecoderLayer = attention:input_layernorm>resid_attn_dropout mlp:post_attention_layernorm>resid_mlp_dropout
gpt2:GPT2Block gpt_neo:GPTNeoBlock = attention:ln_1>attn mlp:ln_2>mlp
granite:GraniteDecoderLayer = attention:input_layernorm>self_attn*residual_multiplier mlp:post_attention_layernorm>mlp*residual_multiplier
granitemoe:GraniteMoeDecoderLayer = attention:input_layernorm>self_attn*residual_multiplier mlp:post_attention_layernorm>block_sparse_moe*residual_multiplier
glm4:Glm4DecoderLayer = attention:input_layernorm>post_self_attn_layernorm mlp:post_attention_layernorm>post_mlp_layernorm
olmo2:Olmo2DecoderLayer olmo3:Olmo3DecoderLayer exaone4:Exaone4DecoderLayer
    = attention:self_attn>post_attention_layernorm mlp:mlp>post_feedforward_layernorm norm:post_feedforward_layernorm
apertus:ApertusDecoderLayer = attention:attention_layernorm>self_attn mlp:feedforward_layernorm>mlp
# blocks in parallel, or one after the other
cohere:CohereDecoderLayer cohere2:Cohere2DecoderLayer = attention:input_layernorm>self_attn mlp:input_layernorm>mlp
phi:PhiDecoderLayer = attention:input_layernorm>resid_dropout mlp:input_layernorm>resid_dropout
gptj:GPTJBlock = attention:ln_1>attn mlp:ln_1>mlp
gpt_neox:GPTNeoXLayer = attention:input_layernorm>post_attention_dropout mlp:post_attention_layernorm>post_mlp_dropout
stablelm:StableLmDecoderLayer = attention:input_layernorm>self_attn mlp:post_attention_layernorm|input_layernorm>dropout
# functional dropout behind `write` drops the control with the block; opt-350m, whose norms come last, is refused by its first
# forward
opt:OPTDecoderLayer mbart:MBartEncoderLayer|MBartDecoderLayer whisper:WhisperEncoderLayer|WhisperDecoderLayer
    = attention:self_attn_layer_norm>self_attn mlp:final_layer_norm>fc2
# layers that differ among themselves: attention, or a linear attention, a convolution, a state space
qwen3_5:Qwen3_5DecoderLayer qwen3_next:Qwen3NextDecoderLayer = attention:input_layernorm>self_attn|linear_attn mlp:post_attention_layernorm>mlp
granitemoehybrid:GraniteMoeHybridDecoderLayer
    = attention:input_layernorm>self_attn|mamba*residual_multiplier mlp:post_attention_layernorm>shared_mlp*residual_multiplier
lfm2:Lfm2DecoderLayer = attention:operator_norm>self_attn|conv mlp:ffn_norm>feed_forward
falcon_h1:FalconH1DecoderLayer = attention:input_layernorm>self_attn*attn_out_multiplier mlp:pre_ff_layernorm>feed_forward
mamba:MambaBlock mamba2:Mamba2Block = mixer:norm>mixer
# encoders of text; all layers of ALBERT are one, and share its control
roberta:RobertaLayer xlm-roberta:XLMRobertaLayer bert:BertLayer mpnet:MPNetLayer electra:ElectraLayer
camembert:CamembertLayer ernie:ErnieLayer deberta-v2:DebertaV2Layer
    = attention:attention>attention mlp:intermediate>output norm:output.LayerNorm init:normal
distilbert:modeling_distilbert.TransformerBlock = attention:attention>sa_layer_norm mlp:ffn>output_layer_norm norm:sa_layer_norm init:normal
albert:AlbertLayer = attention:attention>attention mlp:ffn>full_layer_layer_norm norm:full_layer_layer_norm init:normal
modernbert:ModernBertEncoderLayer = attention:attn_norm>attn mlp:mlp_norm>mlp
# encoder and decoder, whose cross-attention belongs to neither block
t5:T5Block = attention:layer.0.layer_norm>layer.0.dropout mlp:layer.-1.layer_norm>layer.-1.dropout
bart:BartEncoderLayer|BartDecoderLayer marian:MarianEncoderLayer|MarianDecoderLayer
    = attention:self_attn>self_attn_layer_norm mlp:fc1>final_layer_norm norm:final_layer_norm
# speech
wav2vec2:Wav2Vec2EncoderLayer hubert:HubertEncoderLayer = attention:attention>layer_norm mlp:feed_forward>final_layer_norm norm:layer_norm
wav2vec2-pre-norm:Wav2Vec2EncoderLayerStableLayerNorm hubert-pre-norm:HubertEncoderLayerStableLayerNorm
    = attention:layer_norm>dropout mlp:final_layer_norm>feed_forward
# vision and spectrograms; where both blocks write to one module, its first call after a block's `read` is that block's
vit:ViTLayer deit:DeiTLayer vit_mae:ViTMAELayer audio-spectrogram-transformer:ASTLayer = attention:layernorm_before>dropout mlp:layernorm_after>dropout
beit:BeitLayer = attention:layernorm_before>drop_path mlp:layernorm_after>drop_path
dinov2:Dinov2Layer dinov2_with_registers:Dinov2WithRegistersLayer dinov3_vit:DINOv3ViTLayer = attention:norm1>drop_path mlp:norm2>drop_path
# its dropout is also called in the attention's windows
swin:SwinLayer = attention:layernorm_before>drop_path mlp:layernorm_after>dropout!
timm-vit:vision_transformer.Block = attention:norm1>drop_path1 mlp:norm2>drop_path2
# vision and text: `layers_pattern` chooses a side
clip:CLIPEncoderLayer siglip:SiglipEncoderLayer siglip2:Siglip2EncoderLayer = attention:layer_norm1>self_attn mlp:layer_norm2>mlp
"""


def _rows(table: str) -> Iterator[Architecture]:
    families: list[str] = []
    for line in table.splitlines():
        if line.startswith("#"):
            continue
        names, _, structure = line.partition("=")
        families += names.split()
        if not structure:
            continue
        fields = dict(part.split(":") for part in structure.split())
        norm, init, blocks = fields.pop("norm", ""), fields.pop("init", INITS[0]), {}
        for block, paths in fields.items():
            read, write = paths.rstrip("!").split(">")
            write, _, multiplier = write.partition("*")
            blocks[block] = Block(read, write, multiplier, paths.endswith("!"))
        for name, layer in (family.split(":") for family in families):
            yield Architecture(name, layer, norm or read, blocks, init)
        families.clear()


ARCHITECTURES: tuple[Architecture, ...] = tuple(_rows(_TABLE))


def find_layers(
    model: nn.Module, row: dict | None = None, pattern: str | list[str] | None = None
) -> dict[str, tuple[nn.Module, Architecture]]:
    """Return every transformer layer of ``model`` that has a row, by its name, with the row.

    Args:
        model: any module; layers are found by class name, so composite models work too.
        row: the user's own row (``ControlConfig.control_architecture``), which then is the only one used.
        pattern: ``ControlConfig.layers_pattern``: names of the lists of layers that count, all if None.

    Raises:
        ValueError: no layer has a row, or none of those is in a list of that name.
    """
    rows = ARCHITECTURES if row is None else (Architecture.from_dict(row),)
    layers = {
        name: (module, architecture)
        for name, module in model.named_modules()
        for architecture in rows
        if architecture.matches(type(module))
    }
    if not layers and row is not None:
        raise ValueError(f"{type(model).__name__} has no layer of class {rows[0].layer!r} (control_architecture)")
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layer that Control knows (`python -m peft_control architectures` lists "
            f"{len(ARCHITECTURES)}); pass your own row as ControlConfig(control_architecture=...).{_proposals(model)}"
        )
    chosen = {name: layer for name, layer in layers.items() if layer_index(name, pattern) is not None}
    if pattern and not chosen:
        raise ValueError(f"layers_pattern {pattern!r} leaves none of {', '.join(layers)}")
    return chosen if pattern else layers


def layer_index(name: str, pattern: str | list[str] | None = None) -> int | None:
    """The number of the layer or of a module in it by its dotted name: the last one in it, or with a pattern the one after
    the list's name; None if it has none."""
    if not pattern:
        numbers = [part for part in name.split(".") if part.isdigit()]
        return int(numbers[-1]) if numbers else None
    for one in [pattern] if isinstance(pattern, str) else pattern:
        if found := re.match(rf"(?:^|.*?\.){one}\.(\d+)(?:\.|$)", name):  # as upstream peft does
            return int(found[1])
    return None


def propose(layer: nn.Module) -> Architecture | None:
    """A row for a layer that has none, after the known row of which it has most norms and dropouts in the order of its
    forward; nobody has tested it."""
    try:
        lines = inspect.getsource(type(layer).forward).splitlines()
    except (OSError, TypeError):
        lines = []
    best: tuple = ()
    for row in ARCHITECTURES:
        try:
            row.state_width(layer)
            blocks = {name: block.of(layer) for name, block in row.blocks.items()}
        except AttributeError:
            continue
        paths = {path for block in blocks.values() for path in (block.read, block.write)}
        where = {p: [n for n, line in enumerate(lines) if f"self.{p.split('.')[0]}" in line] or [0] for p in paths}
        if any(block.shared or where[block.read][0] > where[block.write][-1] for block in blocks.values()):
            continue
        for name, block in blocks.items():
            known = [m for m in (block.multiplier, "residual_multiplier") if m and hasattr(layer, m)]
            blocks[name] = replace(block, multiplier=known[0] if known else "")
        modules = [layer.get_submodule(path) for path in paths]
        light = sum(not any(p.dim() > 1 for p in module.parameters()) for module in modules)
        score = (light, len(blocks), len(paths), sum(where[block.write][-1] for block in blocks.values()))
        if not best or score > best[0]:
            best = score, Architecture(type(layer).__name__, type(layer).__name__, row.norm, blocks, row.init)
    return best[1] if best else None


def _proposals(model: nn.Module) -> str:
    """What the error about a model without a row says of its lists of layers of one class."""
    text = []
    for name, modules in model.named_modules():
        if not isinstance(modules, nn.ModuleList) or not len(modules):
            continue
        cls, count = Counter(map(type, modules)).most_common(1)[0]
        layer = next(module for module in modules if type(module) is cls)
        children = ", ".join(child for child, _ in layer.named_children())
        if count < len(modules) or not children:
            continue
        row = propose(layer)
        tail = f"candidate row, untested: {row.as_dict()}" if row else "no known pattern fits"
        text.append(f"\n{name}: {len(modules)} × {cls.__name__} ({children}); {tail}")
    return "".join(dict.fromkeys(text))
