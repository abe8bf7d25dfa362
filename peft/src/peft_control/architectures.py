"""Where each architecture has its residual blocks: the one table behind ``control_blocks``.

A *block* is a frozen residual function from an input state to an output state of the residual stream. Its row
names two submodules of a transformer layer:

- ``read``: the module whose first input is the block's **input state** (for a pre-norm block its norm),
- ``write``: the module whose output the control is added to: the last frozen module before the residual sum,
  because ``x + (f(x) + control) = (x + f(x)) + control``.

So a frozen LayerScale, DropPath, dropout or post-block norm never touches the control. Neither module is the
layer itself: gradient checkpointing may recompute a layer's ``forward`` without the hooks on the layer.
Adding a family is one row; for a model of your own pass a row as ``ControlConfig(control_architecture=...)``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

INITS = ("kaiming", "normal")  # of A; see ControlConfig.control_init


@dataclass(frozen=True)
class Block:
    """One controlled block of a layer; both fields are paths relative to the layer."""

    read: str
    write: str


@dataclass(frozen=True)
class Architecture:
    """Where the blocks of one architecture are.

    Attributes:
        name: the family, as in ``config.model_type`` where transformers has one.
        layer: class name of the transformer layer; a dotted prefix narrows it to a module.
        norm: path in the layer of a norm whose one-dimensional weight has the state's width.
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
        return f".{cls.__module__}.{cls.__qualname__}".endswith(f".{self.layer}")

    def check(self, layer: nn.Module) -> None:
        """Raise ValueError if a path of the row does not lead to a module of ``layer``."""
        for path in [
            self.norm,
            *(path for block in self.blocks.values() for path in (block.read, block.write)),
        ]:
            try:
                layer.get_submodule(path)
            except AttributeError as error:
                raise ValueError(
                    f"{type(layer).__name__} has no module {path!r}, which the row {self.name!r} names"
                ) from error

    def state_width(self, layer: nn.Module) -> int:
        return next(layer.get_submodule(self.norm).parameters()).shape[0]

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
            if not (blocks and architecture.init in INITS and all(isinstance(s, str) and s for s in strings)):
                raise TypeError("a field is empty or of the wrong type")
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"control_architecture must look like {example}, got {row!r}") from error
        return architecture


def _pre_norm(name, layer, attention, mlp, norm="input_layernorm", init="kaiming"):
    return Architecture(name, layer, norm, {"attention": Block(*attention), "mlp": Block(*mlp)}, init)


def _llama_like(name, layer):
    # h = x + self_attn(norm(x)); y = h + mlp(norm(h))
    return _pre_norm(name, layer, ("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp"))


def _gemma_like(name, layer):
    # h = x + norm(self_attn(norm(x))): the control joins after the post-block norm; so for mlp
    return _pre_norm(
        name,
        layer,
        ("input_layernorm", "post_attention_layernorm"),
        ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    )


def _post_norm(name, layer):
    # a = norm(attention(x) + x) is the output of `attention`; y = norm(ffn(a) + a) that of `output`
    blocks = {"attention": Block("attention", "attention"), "mlp": Block("intermediate", "output")}
    return Architecture(name, layer, "output.LayerNorm", blocks, "normal")


ARCHITECTURES: tuple[Architecture, ...] = (
    _llama_like("llama", "LlamaDecoderLayer"),
    _llama_like("mistral", "MistralDecoderLayer"),
    _llama_like("qwen2", "Qwen2DecoderLayer"),
    _llama_like("qwen3", "Qwen3DecoderLayer"),
    _gemma_like("gemma2", "Gemma2DecoderLayer"),
    _gemma_like("gemma3", "Gemma3DecoderLayer"),
    _pre_norm(
        "phi3",
        "Phi3DecoderLayer",
        ("input_layernorm", "resid_attn_dropout"),
        ("post_attention_layernorm", "resid_mlp_dropout"),
    ),
    _pre_norm("gpt2", "GPT2Block", ("ln_1", "attn"), ("ln_2", "mlp"), norm="ln_1"),
    _post_norm("roberta", "RobertaLayer"),
    _post_norm("xlm-roberta", "XLMRobertaLayer"),
    _post_norm("bert", "BertLayer"),
    _post_norm("mpnet", "MPNetLayer"),
    _post_norm("electra", "ElectraLayer"),
    # HF's two vision families send both blocks' outputs through one dropout (ViT) or DropPath (DINOv2) module:
    # its first call after a block's `read` is that block's.
    _pre_norm(
        "vit",
        "ViTLayer",
        ("layernorm_before", "dropout"),
        ("layernorm_after", "dropout"),
        norm="layernorm_before",
    ),
    _pre_norm("dinov2", "Dinov2Layer", ("norm1", "drop_path"), ("norm2", "drop_path"), norm="norm1"),
    _pre_norm(
        "timm-vit", "vision_transformer.Block", ("norm1", "drop_path1"), ("norm2", "drop_path2"), norm="norm1"
    ),
)


def find_layers(model: nn.Module, row: dict | None = None) -> dict[str, tuple[nn.Module, Architecture]]:
    """Return every transformer layer of ``model`` that has a row, by its name, with the row.

    Args:
        model: any module; layers are found by class name, so composite models work too.
        row: the user's own row (``ControlConfig.control_architecture``), which then is the only one used.

    Raises:
        ValueError: no layer has a row.
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
            "pass your own row as ControlConfig(control_architecture=...)"
        )
    return layers
