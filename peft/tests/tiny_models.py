"""Tiny random models of the real classes, built offline from their configurations, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
import transformers as hf
from torch import nn

WIDTH, LAYERS, VOCAB, LENGTH = 32, 2, 61, 9

_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
}
_VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}


@dataclass(frozen=True)
class Family:
    """How to build one family's tiny model; ``kind`` is "decoder", "encoder" or "vision"."""

    kind: str
    build: Callable[[], nn.Module]

    def inputs(self, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        """Two examples; of text, the second one is padded on the right."""
        generator = torch.Generator().manual_seed(1)
        if self.kind == "vision":
            return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator, dtype=dtype)}
        ids = torch.randint(3, VOCAB, (2, LENGTH), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 6:] = 0
        return {"input_ids": ids, "attention_mask": mask}


def _decoder(config: type, model: type, **fields) -> Family:
    return Family("decoder", lambda: model(config(**{**_DECODER, **fields})))


def _encoder(config: type, model: type, **fields) -> Family:
    return Family("encoder", lambda: model(config(**{**_ENCODER, **fields})))


FAMILIES: dict[str, Family] = {
    "llama": _decoder(hf.LlamaConfig, hf.LlamaForCausalLM),
    "mistral": _decoder(hf.MistralConfig, hf.MistralForCausalLM, sliding_window=4),
    "qwen2": _decoder(hf.Qwen2Config, hf.Qwen2ForCausalLM),
    "qwen3": _decoder(hf.Qwen3Config, hf.Qwen3ForCausalLM, head_dim=8),
    "gemma2": _decoder(hf.Gemma2Config, hf.Gemma2ForCausalLM, head_dim=8, query_pre_attn_scalar=8),
    "gemma3": _decoder(hf.Gemma3TextConfig, hf.Gemma3ForCausalLM, head_dim=8, query_pre_attn_scalar=8),
    "phi3": _decoder(hf.Phi3Config, hf.Phi3ForCausalLM, resid_pdrop=0.1),
    "gpt2": Family(
        "decoder",
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(
                vocab_size=VOCAB,
                n_embd=WIDTH,
                n_layer=LAYERS,
                n_head=4,
                n_positions=64,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
            )
        ),
    ),
    "roberta": _encoder(hf.RobertaConfig, hf.RobertaForSequenceClassification),
    "xlm-roberta": _encoder(hf.XLMRobertaConfig, hf.XLMRobertaForSequenceClassification),
    "bert": _encoder(hf.BertConfig, hf.BertForSequenceClassification),
    "mpnet": _encoder(hf.MPNetConfig, hf.MPNetForSequenceClassification),
    "electra": _encoder(hf.ElectraConfig, hf.ElectraForSequenceClassification, embedding_size=16),
    "vit": Family("vision", lambda: hf.ViTForImageClassification(hf.ViTConfig(**_VISION))),
    "dinov2": Family(
        "vision",
        lambda: hf.Dinov2ForImageClassification(
            hf.Dinov2Config(**_VISION, mlp_ratio=2, layerscale_value=0.5, drop_path_rate=0.3)
        ),
    ),
    "timm-vit": Family("vision", lambda: TimmImages(0.3)),
}


class TimmImages(timm.models.VisionTransformer):
    """timm's own VisionTransformer with LayerScale, under the keyword that the vision inputs use here."""

    def __init__(self, drop_path_rate: float = 0.0):
        super().__init__(
            img_size=16,
            patch_size=8,
            embed_dim=WIDTH,
            depth=LAYERS,
            num_heads=4,
            num_classes=3,
            init_values=0.5,
            drop_path_rate=drop_path_rate,
        )

    def forward(self, pixel_values):
        return super().forward(pixel_values)


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return the family's model in eval mode with every parameter away from its initial value.

    Norm scales of one and LayerScales of one constant would hide a control on the wrong side of them.
    """
    torch.manual_seed(0)
    model = FAMILIES[name].build().to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def logits(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    output = model(**inputs)
    return output if isinstance(output, torch.Tensor) else output.logits


def randomize_adapters(model: nn.Module, std: float = 0.3, seed: int = 7) -> nn.Module:
    """Give every adapter parameter a random value, biases and B too; return ``model``."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if is_adapter(name):
                noise = torch.randn(parameter.shape, generator=generator)
                if "magnitude" in name:  # of DoRA: a column norm, so it stays positive
                    parameter.mul_((0.3 * noise).exp().to(parameter))
                else:
                    parameter.copy_(std * noise)
    return model


def is_adapter(name: str) -> bool:
    return "_control." in name or ".lora_" in name
