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
    """How to build one family's tiny model; ``kind`` says what it takes: "decoder", "encoder", "seq2seq", "vision",
    "clip", "siglip2", "vision-language", "speech" (samples), "whisper" or "spectrogram"."""

    kind: str
    build: Callable[[], nn.Module]

    def inputs(self, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        """Two examples; of text, the second one is padded on the right."""
        generator = torch.Generator().manual_seed(1)
        shapes = {
            "vision": ("pixel_values", 3, 16, 16),
            "clip": ("pixel_values", 3, 16, 16),
            "speech": ("input_values", 400),
            "whisper": ("input_features", 8, 16),
            "spectrogram": ("input_values", 24, 16),
        }
        found = {}
        if self.kind in shapes:
            name, *shape = shapes[self.kind]
            found[name] = torch.randn(2, *shape, generator=generator, dtype=dtype)
        if self.kind in ("vision", "speech", "spectrogram"):
            return found
        ids = torch.randint(3, VOCAB, (2, LENGTH), generator=generator)
        if self.kind == "whisper":
            return {**found, "decoder_input_ids": ids}
        mask = torch.ones_like(ids)
        mask[1, 6:] = 0
        if self.kind == "siglip2":
            found = {
                "pixel_values": torch.randn(2, 4, 192, generator=generator, dtype=dtype),
                "pixel_attention_mask": torch.ones(2, 4, dtype=torch.long),
                "spatial_shapes": torch.tensor([[2, 2], [2, 2]]),
            }
        if self.kind == "vision-language":
            ids = ids.clamp(max=50)
            ids[:, 1:5] = 60
            found = {
                "pixel_values": torch.randn(32, 48, generator=generator, dtype=dtype),
                "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
                "mm_token_type_ids": (ids == 60).int(),
            }
        target = {"decoder_input_ids": ids.flip(1)} if self.kind == "seq2seq" else {}
        return {**found, "input_ids": ids, "attention_mask": mask, **target}


def _decoder(config: type, model: type, **fields) -> Family:
    return Family("decoder", lambda: model(config(**{**_DECODER, **fields})))


def _encoder(config: type, model: type, **fields) -> Family:
    return Family("encoder", lambda: model(config(**{**_ENCODER, **fields})))


def _model(kind: str, config: str, model: str, **fields) -> Family:
    """A family by the names of its classes in transformers."""
    common = {"decoder": _DECODER, "encoder": _ENCODER, "vision": _VISION}.get(kind, {})
    return Family(kind, lambda: getattr(hf, model)(getattr(hf, f"{config}Config")(**{**common, **fields})))


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


_HEADS = {"head_dim": 8}
_GEMMA = {**_HEADS, "query_pre_attn_scalar": 8}
_MOE = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
_LOCAL_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LINEAR = {
    **_HEADS,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_DEEPSEEK = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_MAMBA = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "state_size": 8, "residual_in_fp32": False}
_SEQ2SEQ = {
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
_SPEECH = {
    **{key: value for key, value in _ENCODER.items() if key not in ("pad_token_id", "max_position_embeddings")},
    "conv_dim": [8, 8],
    "conv_kernel": [8, 4],
    "conv_stride": [8, 4],
    "layerdrop": 0.0,
    "apply_spec_augment": False,
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
_SIDES = {
    "text_config": {**_ENCODER, "projection_dim": 16, "eos_token_id": 2},
    "vision_config": {**_VISION, "projection_dim": 16},
    "projection_dim": 16,
}


def _vision_language(prefix: str, sizes: dict, mrope_section: list, **vision) -> Family:
    """A model of two parts: 4 x 4 patches of an image become 4 of its language model's tokens."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": mrope_section}
    image = {"depth": 2, "patch_size": 4, "temporal_patch_size": 1, "spatial_merge_size": 2, "num_heads": 4}
    return _model(
        "vision-language",
        prefix,
        f"{prefix}ForConditionalGeneration",
        text_config={**_DECODER, "head_dim": 8, "rope_parameters": rope},
        vision_config={**image, **sizes, **vision},
        image_token_id=60,
        video_token_id=59,
        vision_start_token_id=58,
        vision_end_token_id=57,
    )


#: One model for each row of ARCHITECTURES; what one configuration leaves out of a row, a second name adds.
MODELS: dict[str, Family] = {
    **FAMILIES,
    "gemma": _model("decoder", "Gemma", "GemmaForCausalLM", **_HEADS),
    "ministral": _model("decoder", "Ministral", "MinistralForCausalLM", **_HEADS),
    "ministral3": _model("decoder", "Ministral3", "Ministral3ForCausalLM", **_HEADS),
    "smollm3": _model("decoder", "SmolLM3", "SmolLM3ForCausalLM"),
    "starcoder2": _model("decoder", "Starcoder2", "Starcoder2ForCausalLM"),
    "glm": _model("decoder", "Glm", "GlmForCausalLM", **_HEADS),
    "olmo": _model("decoder", "Olmo", "OlmoForCausalLM"),
    "ernie4_5": _model("decoder", "Ernie4_5", "Ernie4_5ForCausalLM", **_HEADS),
    "seed_oss": _model("decoder", "SeedOss", "SeedOssForCausalLM", **_HEADS),
    "nemotron": _model("decoder", "Nemotron", "NemotronForCausalLM"),
    "granite": _model("decoder", "Granite", "GraniteForCausalLM", residual_multiplier=0.3),
    "gemma4": _model(
        "decoder",
        "Gemma4Text",
        "Gemma4ForCausalLM",
        **_HEADS,
        global_head_dim=8,
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gemma3n": _model(
        "decoder",
        "Gemma3nText",
        "Gemma3nForCausalLM",
        **_HEADS,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCAB,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0, 0.0],
        intermediate_size=[48, 48],
    ),
    "glm4": _model("decoder", "Glm4", "Glm4ForCausalLM", **_HEADS),
    "olmo2": _model("decoder", "Olmo2", "Olmo2ForCausalLM"),
    "olmo3": _model("decoder", "Olmo3", "Olmo3ForCausalLM"),
    "exaone4": _model("decoder", "Exaone4", "Exaone4ForCausalLM"),
    "apertus": _model("decoder", "Apertus", "ApertusForCausalLM"),
    "cohere": _model("decoder", "Cohere", "CohereForCausalLM"),
    "cohere2": _model("decoder", "Cohere2", "Cohere2ForCausalLM"),
    "phi": _model("decoder", "Phi", "PhiForCausalLM", resid_pdrop=0.1),
    "gptj": _model(
        "decoder", "GPTJ", "GPTJForCausalLM", n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_positions=64, rotary_dim=4
    ),
    "gpt_neox": _model("decoder", "GPTNeoX", "GPTNeoXForCausalLM", hidden_dropout=0.1),
    "gpt_neox-sequential": _model("decoder", "GPTNeoX", "GPTNeoXForCausalLM", use_parallel_residual=False),
    "gpt_neo": _model(
        "decoder", "GPTNeo", "GPTNeoForCausalLM", num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    ),
    "stablelm": _model("decoder", "StableLm", "StableLmForCausalLM", hidden_dropout=0.1),
    "stablelm-parallel": _model("decoder", "StableLm", "StableLmForCausalLM", use_parallel_residual=True),
    "opt": _model("decoder", "OPT", "OPTForCausalLM", ffn_dim=48, word_embed_proj_dim=WIDTH),
    "mixtral": _model("decoder", "Mixtral", "MixtralForCausalLM", **_LOCAL_MOE),
    "qwen2_moe": _model(
        "decoder", "Qwen2Moe", "Qwen2MoeForCausalLM", **_MOE, shared_expert_intermediate_size=16
    ),
    "qwen3_moe": _model("decoder", "Qwen3Moe", "Qwen3MoeForCausalLM", **_MOE, **_HEADS),
    "gpt_oss": _model("decoder", "GptOss", "GptOssForCausalLM", **_LOCAL_MOE, **_HEADS),
    "glm4_moe": _model("decoder", "Glm4Moe", "Glm4MoeForCausalLM", **_HEADS, **{**_DEEPSEEK, "num_key_value_heads": 2}),
    "deepseek_v2": _model("decoder", "DeepseekV2", "DeepseekV2ForCausalLM", **_DEEPSEEK, norm_topk_prob=False),
    "deepseek_v3": _model("decoder", "DeepseekV3", "DeepseekV3ForCausalLM", **_DEEPSEEK),
    "olmoe": _model("decoder", "Olmoe", "OlmoeForCausalLM", **_MOE),
    "phimoe": _model("decoder", "Phimoe", "PhimoeForCausalLM", **_LOCAL_MOE),
    "llama4": _model(
        "decoder",
        "Llama4Text",
        "Llama4ForCausalLM",
        **_LOCAL_MOE,
        **_HEADS,
        intermediate_size_mlp=48,
        interleave_moe_layer_step=2,
    ),
    "granitemoe": _model(
        "decoder", "GraniteMoe", "GraniteMoeForCausalLM", **_LOCAL_MOE, residual_multiplier=0.3
    ),
    "qwen3_5": _model("decoder", "Qwen3_5Text", "Qwen3_5ForCausalLM", **_LINEAR),
    "qwen3_next": _model(
        "decoder", "Qwen3Next", "Qwen3NextForCausalLM", **_LINEAR, **_MOE, shared_expert_intermediate_size=16
    ),
    "granitemoehybrid": _model(
        "decoder",
        "GraniteMoeHybrid",
        "GraniteMoeHybridForCausalLM",
        **_LOCAL_MOE,
        residual_multiplier=0.3,
        shared_intermediate_size=16,
        layer_types=["mamba", "attention"],
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_chunk_size=4,
    ),
    "lfm2": _model("decoder", "Lfm2", "Lfm2ForCausalLM", layer_types=["conv", "full_attention"]),
    "falcon_h1": _model(
        "decoder",
        "FalconH1",
        "FalconH1ForCausalLM",
        attention_out_multiplier=0.3,
        mamba_d_ssm=64,
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_chunk_size=4,
    ),
    "mamba": Family("decoder", lambda: hf.MambaForCausalLM(hf.MambaConfig(**_MAMBA))),
    "mamba2": Family(
        "decoder",
        lambda: hf.Mamba2ForCausalLM(hf.Mamba2Config(**_MAMBA, num_heads=8, head_dim=8, n_groups=2, chunk_size=4)),
    ),
    "camembert": _model("encoder", "Camembert", "CamembertForSequenceClassification"),
    "ernie": _model("encoder", "Ernie", "ErnieForSequenceClassification"),
    "deberta-v2": _model(
        "encoder",
        "DebertaV2",
        "DebertaV2ForSequenceClassification",
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
    ),
    "distilbert": _model(
        "encoder", "DistilBert", "DistilBertForSequenceClassification", dim=WIDTH, n_layers=2, n_heads=4, hidden_dim=48
    ),
    "albert": _model("encoder", "Albert", "AlbertForSequenceClassification", embedding_size=16),
    "eurobert": _model("encoder", "EuroBert", "EuroBertForSequenceClassification"),
    "modernbert": _model(
        "encoder",
        "ModernBert",
        "ModernBertForSequenceClassification",
        cls_token_id=1,
        sep_token_id=2,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "t5": _model(
        "seq2seq",
        "T5",
        "T5ForConditionalGeneration",
        vocab_size=VOCAB,
        d_model=WIDTH,
        d_kv=8,
        d_ff=48,
        num_layers=LAYERS,
        num_heads=4,
        decoder_start_token_id=0,
    ),
    "bart": _model("seq2seq", "Bart", "BartForConditionalGeneration", **_SEQ2SEQ),
    "marian": _model("seq2seq", "Marian", "MarianMTModel", **_SEQ2SEQ),
    "mbart": _model("seq2seq", "MBart", "MBartForConditionalGeneration", **_SEQ2SEQ),
    "whisper": _model(
        "whisper",
        "Whisper",
        "WhisperForConditionalGeneration",
        **_SEQ2SEQ,
        num_mel_bins=8,
        max_source_positions=8,
        max_target_positions=64,
    ),
    "wav2vec2": _model("speech", "Wav2Vec2", "Wav2Vec2ForCTC", **_SPEECH),
    "wav2vec2-pre-norm": _model("speech", "Wav2Vec2", "Wav2Vec2ForCTC", **_SPEECH, do_stable_layer_norm=True),
    "hubert": _model("speech", "Hubert", "HubertForCTC", **_SPEECH),
    "hubert-pre-norm": _model("speech", "Hubert", "HubertForCTC", **_SPEECH, do_stable_layer_norm=True),
    "audio-spectrogram-transformer": _model(
        "spectrogram",
        "AST",
        "ASTForAudioClassification",
        **{**_VISION, "patch_size": 8},
        num_mel_bins=16,
        max_length=24,
        time_stride=8,
        frequency_stride=8,
    ),
    "deit": _model("vision", "DeiT", "DeiTForImageClassification"),
    "vit_mae": _model("vision", "ViTMAE", "ViTMAEModel", mask_ratio=0.0),
    "beit": _model("vision", "Beit", "BeitForImageClassification", layer_scale_init_value=0.5),
    "dinov2_with_registers": _model(
        "vision", "Dinov2WithRegisters", "Dinov2WithRegistersForImageClassification", mlp_ratio=2
    ),
    "dinov3_vit": _model("vision", "DINOv3ViT", "DINOv3ViTModel"),
    "swin": Family(
        "vision",
        lambda: hf.SwinForImageClassification(
            hf.SwinConfig(
                image_size=16, patch_size=2, embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=4, mlp_ratio=2
            )
        ),
    ),
    "clip": _model("clip", "CLIP", "CLIPModel", **_SIDES),
    "siglip": _model("clip", "Siglip", "SiglipModel", text_config=_ENCODER, vision_config=_VISION),
    "siglip2": _model(
        "siglip2", "Siglip2", "Siglip2Model", text_config=_ENCODER, vision_config={**_VISION, "num_patches": 4}
    ),
    "qwen2_vl": _vision_language(
        "Qwen2VL", {"embed_dim": WIDTH, "hidden_size": WIDTH, "mlp_ratio": 2}, [2, 1, 1], in_channels=3
    ),
    "qwen2_5_vl": _vision_language(
        "Qwen2_5_VL",
        {"hidden_size": WIDTH, "out_hidden_size": WIDTH, "intermediate_size": 48, "fullatt_block_indexes": [1]},
        [2, 1, 1],
        window_size=8,
    ),
    "qwen3_vl": _vision_language(
        "Qwen3VL",
        {"hidden_size": WIDTH, "out_hidden_size": WIDTH, "intermediate_size": 48},
        [2, 1, 1],
        num_position_embeddings=16,
        deepstack_visual_indexes=[0],
    ),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return the family's model in eval mode with every parameter away from its initial value.

    Norm scales of one and LayerScales of one constant would hide a control on the wrong side of them.
    """
    torch.manual_seed(0)
    model = MODELS[name].build().to(dtype).eval()
    if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # torch multiplies no groups of float64
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for key, buffer in model.named_buffers():
            if key.endswith("layer_scalar"):  # Gemma 4's, of a layer's output
                buffer.fill_(0.7)
    return model


def logits(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    output = model(**inputs)
    if isinstance(output, torch.Tensor):
        return output
    return output.logits if hasattr(output, "logits") else output[0]


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
