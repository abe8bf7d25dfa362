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
from dataclasses import asdict, dataclass, replace

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
            parent = layer.get_submodule(".".join(parts)) if part == "-1" else ()
            parts.append(str(len(parent) - 1) if part == "-1" else part)
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

    def matches(self, module: nn.Module) -> bool:
        return self.matches_class(type(module))

    def matches_class(self, cls: type) -> bool:
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
        norm = layer.get_submodule(_path(layer, self.norm))
        weight = next(norm.parameters(), None)
        return norm.normalized_shape[-1] if weight is None else weight.shape[0]  # OLMo's has no weight

    def as_dict(self) -> dict:
        """The row as :meth:`from_dict` takes it, without what has its default."""
        blocks = {
            name: {key: value for key, value in asdict(block).items() if value}
            for name, block in self.blocks.items()
        }
        init = {} if self.init == INITS[0] else {"init": self.init}
        return {"layer": self.layer, "norm": self.norm, "blocks": blocks, **init}

    @classmethod
    def from_dict(cls, row: dict) -> Architecture:
        """Build a row from plain JSON types: ``{"layer", "norm", "blocks": {name: {"read", "write"}}, ...}``.

        Raises:
            ValueError: a key is missing, unknown or of the wrong type.
        """
        example = (
            '{"layer": "MyLayer", "norm": "norm1", "blocks": {"mlp": {"read": "norm2", "write": "mlp"}}}'
        )
        try:
            blocks = {name: Block(**block) for name, block in row["blocks"].items()}
            architecture = cls(**{"name": row["layer"], **row, "blocks": blocks})
            paths = [path for block in blocks.values() for path in (block.read, block.write)]
            strings = [architecture.name, architecture.layer, architecture.norm, *blocks, *paths]
            known = all(isinstance(b.multiplier, str) and isinstance(b.shared, bool) for b in blocks.values())
            strings_are = all(isinstance(s, str) and s for s in strings)
            if not (blocks and known and strings_are and architecture.init in INITS):
                raise TypeError("a field is empty or of the wrong type")
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"control_architecture must look like {example}, got {row!r}") from error
        return architecture


def _row(name, layer, attention, mlp, norm=None, init="kaiming"):
    """A row from (read, write) of its two blocks; ``norm`` is what its MLP reads if nothing else is said."""
    blocks = {
        key: block if isinstance(block, Block) else Block(*block)
        for key, block in (("attention", attention), ("mlp", mlp))
        if block
    }
    return Architecture(name, layer, norm or blocks["mlp"].read, blocks, init)


def _llama_like(name, layer, attention="self_attn", mlp="mlp", **block):
    # h = x + self_attn(norm(x)); y = h + mlp(norm(h))
    return _row(
        name,
        layer,
        Block("input_layernorm", attention, **block),
        Block("post_attention_layernorm", mlp, **block),
    )


def _gemma_like(name, layer):
    # h = x + norm(self_attn(norm(x))): the control joins after the post-block norm; so for mlp
    return _row(
        name,
        layer,
        ("input_layernorm", "post_attention_layernorm"),
        ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    )


def _olmo_like(name, layer):
    # h = x + norm(self_attn(x)); y = h + norm(mlp(h))
    blocks = (("self_attn", "post_attention_layernorm"), ("mlp", "post_feedforward_layernorm"))
    return _row(name, layer, *blocks, norm="post_feedforward_layernorm")


def _parallel(name, layer, norm, attention, mlp):
    # y = x + attention(norm(x)) + mlp(norm(x)): both blocks go from x to y
    return _row(name, layer, (norm, attention), (norm, mlp))


def _post_norm(name, layer):
    # a = norm(attention(x) + x) is the output of `attention`; y = norm(ffn(a) + a) that of `output`
    blocks = (("attention", "attention"), ("intermediate", "output"))
    return _row(name, layer, *blocks, norm="output.LayerNorm", init="normal")


def _vit_like(name, layer, norms="layernorm_before", second="layernorm_after", write="dropout"):
    # both blocks' outputs go through one dropout or DropPath module: its first call after a block's `read` is that block's
    return _row(name, layer, (norms, write), (second, write))


def _clip_like(name, layer):
    return _row(name, layer, ("layer_norm1", "self_attn"), ("layer_norm2", "mlp"))


def _speech(name, prefix):
    post, pre = f"{prefix}EncoderLayer", f"{prefix}EncoderLayerStableLayerNorm"
    return (
        _row(name, post, ("attention", "layer_norm"), ("feed_forward", "final_layer_norm"), "layer_norm"),
        _row(f"{name}-pre-norm", pre, ("layer_norm", "dropout"), ("final_layer_norm", "feed_forward")),
    )


def _both_sides(name, prefix, pre_norm):
    # The decoder's cross-attention belongs to neither block. A pre-norm layer's functional dropout comes after `write`:
    # while training it drops the control with the block.
    pre = ("self_attn_layer_norm", "self_attn"), ("final_layer_norm", "fc2")
    post = ("self_attn", "self_attn_layer_norm"), ("fc1", "final_layer_norm")
    layers = f"{prefix}EncoderLayer|{prefix}DecoderLayer"
    return _row(name, layers, *(pre if pre_norm else post), norm="final_layer_norm")


ARCHITECTURES: tuple[Architecture, ...] = (
    # decoders
    _llama_like("llama", "LlamaDecoderLayer"),
    _llama_like("mistral", "MistralDecoderLayer"),
    _llama_like("qwen2", "Qwen2DecoderLayer"),
    _llama_like("qwen3", "Qwen3DecoderLayer"),
    _gemma_like("gemma2", "Gemma2DecoderLayer"),
    _gemma_like("gemma3", "Gemma3DecoderLayer"),
    _llama_like("phi3", "Phi3DecoderLayer", "resid_attn_dropout", "resid_mlp_dropout"),
    _row("gpt2", "GPT2Block", ("ln_1", "attn"), ("ln_2", "mlp")),
    _llama_like("gemma", "GemmaDecoderLayer"),
    _llama_like("ministral", "MinistralDecoderLayer"),
    _llama_like("ministral3", "Ministral3DecoderLayer"),
    _llama_like("smollm3", "SmolLM3DecoderLayer"),
    _llama_like("starcoder2", "Starcoder2DecoderLayer"),
    _llama_like("glm", "GlmDecoderLayer"),
    _llama_like("olmo", "OlmoDecoderLayer"),
    _llama_like("ernie4_5", "Ernie4_5DecoderLayer"),
    _llama_like("seed_oss", "SeedOssDecoderLayer"),
    _llama_like("nemotron", "NemotronDecoderLayer"),
    _llama_like("granite", "GraniteDecoderLayer", multiplier="residual_multiplier"),
    _gemma_like("gemma4", "Gemma4TextDecoderLayer"),
    _row(
        "gemma3n",
        "Gemma3nTextDecoderLayer",
        None,
        ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
    _row(
        "glm4",
        "Glm4DecoderLayer",
        ("input_layernorm", "post_self_attn_layernorm"),
        ("post_attention_layernorm", "post_mlp_layernorm"),
    ),
    _olmo_like("olmo2", "Olmo2DecoderLayer"),
    _olmo_like("olmo3", "Olmo3DecoderLayer"),
    _olmo_like("exaone4", "Exaone4DecoderLayer"),
    _row(
        "apertus",
        "ApertusDecoderLayer",
        ("attention_layernorm", "self_attn"),
        ("feedforward_layernorm", "mlp"),
    ),
    _parallel("cohere", "CohereDecoderLayer", "input_layernorm", "self_attn", "mlp"),
    _parallel("cohere2", "Cohere2DecoderLayer", "input_layernorm", "self_attn", "mlp"),
    _parallel("phi", "PhiDecoderLayer", "input_layernorm", "resid_dropout", "resid_dropout"),
    _parallel("gptj", "GPTJBlock", "ln_1", "attn", "mlp"),
    _llama_like("gpt_neox", "GPTNeoXLayer", "post_attention_dropout", "post_mlp_dropout"),  # parallel or not
    _row("gpt_neo", "GPTNeoBlock", ("ln_1", "attn"), ("ln_2", "mlp")),
    _row(
        "stablelm",
        "StableLmDecoderLayer",
        ("input_layernorm", "self_attn"),
        ("post_attention_layernorm|input_layernorm", "dropout"),
    ),
    # its functional dropout comes after `write`; opt-350m, which has its norms behind, is refused by its first forward
    _row("opt", "OPTDecoderLayer", ("self_attn_layer_norm", "self_attn"), ("final_layer_norm", "fc2")),
    # mixtures of experts
    _llama_like("mixtral", "MixtralDecoderLayer"),
    _llama_like("qwen2_moe", "Qwen2MoeDecoderLayer"),
    _llama_like("qwen3_moe", "Qwen3MoeDecoderLayer"),
    _llama_like("gpt_oss", "GptOssDecoderLayer"),
    _llama_like("glm4_moe", "Glm4MoeDecoderLayer"),
    _llama_like("deepseek_v2", "DeepseekV2DecoderLayer"),
    _llama_like("deepseek_v3", "DeepseekV3DecoderLayer"),
    _llama_like("olmoe", "OlmoeDecoderLayer"),
    _llama_like("phimoe", "PhimoeDecoderLayer"),
    _llama_like("llama4", "Llama4TextDecoderLayer", mlp="feed_forward"),
    _llama_like(
        "granitemoe", "GraniteMoeDecoderLayer", mlp="block_sparse_moe", multiplier="residual_multiplier"
    ),
    # layers that differ among themselves: attention, or a linear attention, convolution or state space
    _llama_like("qwen3_5", "Qwen3_5DecoderLayer", "self_attn|linear_attn"),
    _llama_like("qwen3_next", "Qwen3NextDecoderLayer", "self_attn|linear_attn"),
    _llama_like(
        "granitemoehybrid",
        "GraniteMoeHybridDecoderLayer",
        "self_attn|mamba",
        "shared_mlp",
        multiplier="residual_multiplier",
    ),
    _row("lfm2", "Lfm2DecoderLayer", ("operator_norm", "self_attn|conv"), ("ffn_norm", "feed_forward")),
    _row(
        "falcon_h1",
        "FalconH1DecoderLayer",
        Block("input_layernorm", "self_attn", multiplier="attn_out_multiplier"),
        ("pre_ff_layernorm", "feed_forward"),
    ),
    Architecture("mamba", "MambaBlock", "norm", {"mixer": Block("norm", "mixer")}),
    Architecture("mamba2", "Mamba2Block", "norm", {"mixer": Block("norm", "mixer")}),
    # encoders of text
    _post_norm("roberta", "RobertaLayer"),
    _post_norm("xlm-roberta", "XLMRobertaLayer"),
    _post_norm("bert", "BertLayer"),
    _post_norm("mpnet", "MPNetLayer"),
    _post_norm("electra", "ElectraLayer"),
    _post_norm("camembert", "CamembertLayer"),
    _post_norm("ernie", "ErnieLayer"),
    _post_norm("deberta-v2", "DebertaV2Layer"),
    _row(
        "distilbert",
        "modeling_distilbert.TransformerBlock",
        ("attention", "sa_layer_norm"),
        ("ffn", "output_layer_norm"),
        norm="sa_layer_norm",
        init="normal",
    ),
    # one layer that stands for all: they share its control
    _row(
        "albert",
        "AlbertLayer",
        ("attention", "attention"),
        ("ffn", "full_layer_layer_norm"),
        norm="full_layer_layer_norm",
        init="normal",
    ),
    _llama_like("eurobert", "EuroBertDecoderLayer"),
    _row("modernbert", "ModernBertEncoderLayer", ("attn_norm", "attn"), ("mlp_norm", "mlp")),
    # encoder and decoder
    _row(
        "t5",
        "T5Block",
        ("layer.0.layer_norm", "layer.0.dropout"),
        ("layer.-1.layer_norm", "layer.-1.dropout"),
    ),
    _both_sides("bart", "Bart", pre_norm=False),
    _both_sides("marian", "Marian", pre_norm=False),
    _both_sides("mbart", "MBart", pre_norm=True),
    # speech
    _both_sides("whisper", "Whisper", pre_norm=True),
    *_speech("wav2vec2", "Wav2Vec2"),
    *_speech("hubert", "Hubert"),
    _vit_like("audio-spectrogram-transformer", "ASTLayer"),
    # vision
    _vit_like("vit", "ViTLayer"),
    _vit_like("deit", "DeiTLayer"),
    _vit_like("vit_mae", "ViTMAELayer"),
    _vit_like("beit", "BeitLayer", write="drop_path"),
    _vit_like("dinov2", "Dinov2Layer", "norm1", "norm2", "drop_path"),
    _vit_like("dinov2_with_registers", "Dinov2WithRegistersLayer", "norm1", "norm2", "drop_path"),
    _vit_like("dinov3_vit", "DINOv3ViTLayer", "norm1", "norm2", "drop_path"),
    # its dropout is also called in the attention's windows
    _row(
        "swin",
        "SwinLayer",
        ("layernorm_before", "drop_path"),
        Block("layernorm_after", "dropout", shared=True),
    ),
    _row("timm-vit", "vision_transformer.Block", ("norm1", "drop_path1"), ("norm2", "drop_path2")),
    # vision and text: rows of each side; `layers_pattern` chooses one
    _clip_like("clip", "CLIPEncoderLayer"),
    _clip_like("siglip", "SiglipEncoderLayer"),
    _clip_like("siglip2", "Siglip2EncoderLayer"),
    _llama_like("qwen2_vl", "Qwen2VLDecoderLayer"),
    _row("qwen2_vl-vision", "Qwen2VLVisionBlock", ("norm1", "attn"), ("norm2", "mlp")),
    _llama_like("qwen2_5_vl", "Qwen2_5_VLDecoderLayer"),
    _row("qwen2_5_vl-vision", "Qwen2_5_VLVisionBlock", ("norm1", "attn"), ("norm2", "mlp")),
    _llama_like("qwen3_vl", "Qwen3VLTextDecoderLayer"),
    _row("qwen3_vl-vision", "Qwen3VLVisionBlock", ("norm1", "attn"), ("norm2", "mlp")),
)


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
        if architecture.matches(module)
    }
    if not layers and row is not None:
        raise ValueError(
            f"{type(model).__name__} has no layer of class {rows[0].layer!r} (control_architecture)"
        )
    if not layers:
        known = ", ".join(architecture.name for architecture in ARCHITECTURES)
        raise ValueError(
            f"{type(model).__name__} has no layer that Control knows (known architectures: {known}); "
            f"pass your own row as ControlConfig(control_architecture=...){_proposals(model)}"
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
        where = {
            p: [n for n, line in enumerate(lines) if f"self.{p.split('.')[0]}" in line] or [0] for p in paths
        }
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
