"""Tiny random models of the real classes, built offline from their configurations, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import pytest
import timm
import tokenizers
import torch
import transformers as hf
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peft_control import ControlConfig
from peft_control.architectures import find_layers
from peft_control.memory import set_memory_mode

WIDTH, LAYERS, VOCAB, LENGTH = 32, 2, 61, 9

_SHAPE = dict(hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4)
_ENCODER = dict(**_SHAPE, vocab_size=VOCAB, max_position_embeddings=64, pad_token_id=1)
_DECODER = {**_ENCODER, **dict(num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)}
_GPT2 = dict(vocab_size=VOCAB, n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
_VISION = dict(**_SHAPE, image_size=16, patch_size=8)
_TIMM = dict(img_size=16, patch_size=8, embed_dim=WIDTH, depth=LAYERS, num_heads=4, num_classes=3, init_values=0.5)


def skip_before(package: str, release: str, why: str) -> None:
    """Skip a test of what the lowest supported releases cannot do by themselves."""
    if Version(version(package)) < Version(release):
        pytest.skip(f"{package} before {release} {why}")


@dataclass(frozen=True)
class Family:
    """How to build one family's tiny model; ``kind`` says what it takes: "decoder", "encoder", "seq2seq", "vision",
    "clip", "siglip2", "vision-language", "speech" (samples), "whisper" or "spectrogram"."""

    kind: str
    build: Callable[..., nn.Module]

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


class TimmImages(timm.models.VisionTransformer):
    """timm's own VisionTransformer with LayerScale, under the keyword that the vision inputs use here."""

    def __init__(self, drop_path_rate: float = 0.0):
        super().__init__(**_TIMM, drop_path_rate=drop_path_rate)

    def forward(self, pixel_values):
        return super().forward(pixel_values)


def _model(kind: str, name: str, common: dict, **fields) -> Family:
    """A family by its model's name in transformers."""

    def build(**more):
        model = getattr(hf, name)
        return model(model.config_class(**{**common, **fields, **more}))

    return Family(kind, build)


def _decoder(prefix: str, **fields) -> Family:
    return _model("decoder", f"{prefix}ForCausalLM", _DECODER, **fields)


def _encoder(prefix: str, **fields) -> Family:
    return _model("encoder", f"{prefix}ForSequenceClassification", _ENCODER, **fields)


FAMILIES: dict[str, Family] = {
    "llama": _decoder("Llama"),
    "mistral": _decoder("Mistral", sliding_window=4),
    "qwen2": _decoder("Qwen2"),
    "qwen3": _decoder("Qwen3", head_dim=8),
    "gemma2": _decoder("Gemma2", head_dim=8, query_pre_attn_scalar=8),
    "gemma3": _decoder("Gemma3", head_dim=8, query_pre_attn_scalar=8),
    "phi3": _decoder("Phi3", resid_pdrop=0.1),
    "gpt2": _model("decoder", "GPT2LMHeadModel", _GPT2, pad_token_id=0),
    "roberta": _encoder("Roberta"),
    "xlm-roberta": _encoder("XLMRoberta"),
    "bert": _encoder("Bert"),
    "mpnet": _encoder("MPNet"),
    "electra": _encoder("Electra", embedding_size=16),
    "vit": _model("vision", "ViTForImageClassification", _VISION),
    "dinov2": _model("vision", "Dinov2ForImageClassification", _VISION, mlp_ratio=2, layerscale_value=0.5, drop_path_rate=0.3),
    "timm-vit": Family("vision", lambda: TimmImages(0.3)),
}


#: Fields of whatever kind of decoder: each configuration takes its own of them.
_ANY_DECODER = {
    **_DECODER,
    **dict(head_dim=8, global_head_dim=8, hidden_dropout=0.1, residual_multiplier=0.3, attention_out_multiplier=0.3),
    **dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, n_shared_experts=1, ffn_dim=48, rotary_dim=4),
    **dict(moe_intermediate_size=16, shared_expert_intermediate_size=16, shared_intermediate_size=16),
    **dict(n_group=2, topk_group=1, first_k_dense_replace=1, norm_topk_prob=False, interleave_moe_layer_step=2),
    **dict(intermediate_size_mlp=48, num_kv_shared_layers=0, hidden_size_per_layer_input=0, laurel_rank=4),
    **dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8),
    **dict(mamba_d_ssm=64, mamba_n_heads=8, mamba_d_state=8, mamba_chunk_size=4),
}
_MLA = {
    **dict(kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, head_dim=4),
    "num_key_value_heads": 4,
}
_MAMBA = dict(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2, state_size=8, residual_in_fp32=False)
_SEQ2SEQ = {
    **dict(vocab_size=VOCAB, d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS, max_position_embeddings=64),
    **dict(encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48),
    **dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, forced_eos_token_id=None),
    **dict(num_mel_bins=8, max_source_positions=8, max_target_positions=64),
}
_SPEECH = {
    **dict(**_SHAPE, vocab_size=VOCAB, conv_dim=[8, 8], conv_kernel=[8, 4], conv_stride=[8, 4], layerdrop=0.0),
    **dict(num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, apply_spec_augment=False),
}
_SWIN = dict(image_size=16, patch_size=2, embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=4, mlp_ratio=2)
_AST = dict(num_mel_bins=16, max_length=24, time_stride=8, frequency_stride=8)


def any_decoder(prefix: str, **fields) -> Family:
    return _model("decoder", f"{prefix}ForCausalLM", _ANY_DECODER, **fields)


def _seq2seq_of(prefix: str, kind: str = "seq2seq", **fields) -> Family:
    return _model(kind, prefix, _SEQ2SEQ, **fields)


def _sides(prefix: str, kind: str = "clip", **vision) -> Family:
    text = {**_ENCODER, "projection_dim": 16, "eos_token_id": 2}
    return _model(kind, f"{prefix}Model", {}, text_config=text, vision_config={**_VISION, **vision}, projection_dim=512)


def _vision_language(prefix: str, **vision) -> Family:
    """A model of two parts: 4 x 4 patches of an image become 4 of its language model's tokens."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    image = dict(depth=2, patch_size=4, temporal_patch_size=1, spatial_merge_size=2, num_heads=4, hidden_size=WIDTH)
    return _model(
        "vision-language",
        f"{prefix}ForConditionalGeneration",
        dict(image_token_id=60, video_token_id=59, vision_start_token_id=58, vision_end_token_id=57),
        text_config={**_DECODER, "head_dim": 8, "rope_parameters": rope},
        vision_config={**image, "out_hidden_size": WIDTH, "intermediate_size": 48, **vision},
    )


_PLAIN = """Gemma Ministral Ministral3 SmolLM3 Starcoder2 Glm Olmo Ernie4_5 SeedOss Nemotron Granite Glm4 Olmo2 Olmo3 Exaone4
    Apertus Cohere Cohere2 Mixtral Qwen2Moe Qwen3Moe GptOss Olmoe Phimoe Glm4Moe GraniteMoe FalconH1 OPT GPTJ"""
_WINDOWS = {"layer_types": ["sliding_attention", "full_attention"]}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}

#: One model for each row of ARCHITECTURES; what one configuration leaves out of a row, a second name adds.
MODELS: dict[str, Family] = {
    **FAMILIES,
    **{getattr(hf, f"{p}ForCausalLM").config_class.model_type: any_decoder(p) for p in _PLAIN.split()},
    **{name.lower(): _encoder(name) for name in ("Camembert", "Ernie", "EuroBert")},
    "albert": _encoder("Albert", embedding_size=16),
    "distilbert": _encoder("DistilBert", dim=WIDTH, n_layers=2, n_heads=4, hidden_dim=48),
    "deberta-v2": _encoder("DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "modernbert": _encoder("ModernBert", **dict.fromkeys(["cls_token_id", "sep_token_id", "bos_token_id"], 1)),
    "gemma4": any_decoder("Gemma4", **_WINDOWS),
    "gemma3n": any_decoder(
        "Gemma3n",
        **_WINDOWS,
        **dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCAB, intermediate_size=[48, 48]),
        activation_sparsity_pattern=[0.0, 0.0],
    ),
    "phi": any_decoder("Phi", resid_pdrop=0.1),
    "gpt_neox": any_decoder("GPTNeoX"),
    "gpt_neox-sequential": any_decoder("GPTNeoX", use_parallel_residual=False),
    "gpt_neo": any_decoder("GPTNeo", attention_types=[[["global", "local"], 1]]),
    "stablelm": any_decoder("StableLm"),
    "stablelm-parallel": any_decoder("StableLm", use_parallel_residual=True),
    "deepseek_v2": any_decoder("DeepseekV2", **_MLA),
    "deepseek_v3": any_decoder("DeepseekV3", **_MLA),
    "llama4": any_decoder("Llama4"),
    "qwen3_5": any_decoder("Qwen3_5", **_LINEAR),
    "qwen3_next": any_decoder("Qwen3Next", **_LINEAR),
    "granitemoehybrid": any_decoder("GraniteMoeHybrid", layer_types=["mamba", "attention"]),
    "lfm2": any_decoder("Lfm2", layer_types=["conv", "full_attention"]),
    "mamba": _model("decoder", "MambaForCausalLM", _MAMBA),
    "mamba2": _model("decoder", "Mamba2ForCausalLM", _MAMBA, num_heads=8, head_dim=8, n_groups=2, chunk_size=4),
    "t5": _seq2seq_of("T5ForConditionalGeneration", d_kv=8, d_ff=48, num_layers=LAYERS, num_heads=4),
    "bart": _seq2seq_of("BartForConditionalGeneration"),
    "marian": _seq2seq_of("MarianMTModel"),
    "mbart": _seq2seq_of("MBartForConditionalGeneration"),
    "whisper": _seq2seq_of("WhisperForConditionalGeneration", "whisper"),
    "wav2vec2": _model("speech", "Wav2Vec2ForCTC", _SPEECH),
    "wav2vec2-pre-norm": _model("speech", "Wav2Vec2ForCTC", _SPEECH, do_stable_layer_norm=True),
    "hubert": _model("speech", "HubertForCTC", _SPEECH),
    "hubert-pre-norm": _model("speech", "HubertForCTC", _SPEECH, do_stable_layer_norm=True),
    "audio-spectrogram-transformer": _model("spectrogram", "ASTForAudioClassification", _VISION, **_AST),
    "deit": _model("vision", "DeiTForImageClassification", _VISION),
    "vit_mae": _model("vision", "ViTMAEModel", _VISION),
    "beit": _model("vision", "BeitForImageClassification", _VISION, layer_scale_init_value=0.5),
    "dinov2_with_registers": _model("vision", "Dinov2WithRegistersForImageClassification", _VISION, mlp_ratio=2),
    "dinov3_vit": _model("vision", "DINOv3ViTModel", _VISION),
    "swin": _model("vision", "SwinForImageClassification", _SWIN),
    "clip": _sides("CLIP", projection_dim=16),
    "siglip": _sides("Siglip"),
    "siglip2": _sides("Siglip2", "siglip2", num_patches=4),
    "qwen2_vl": _vision_language("Qwen2VL", embed_dim=WIDTH, mlp_ratio=2, in_channels=3),
    "qwen2_5_vl": _vision_language("Qwen2_5_VL", fullatt_block_indexes=[1], window_size=8),
    "qwen3_vl": _vision_language("Qwen3VL", num_position_embeddings=16, deepstack_visual_indexes=[0]),
}


def build(name: str, dtype: torch.dtype = torch.float32, **config) -> nn.Module:
    """Return the family's model in eval mode with every parameter away from its initial value; ``config`` are further fields.

    Norm scales of one and LayerScales of one constant would hide a control on the wrong side of them.
    """
    torch.manual_seed(0)
    model = MODELS[name].build(**config).to(dtype).eval()
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


def step_of(model: nn.Module, loss: Callable[[], torch.Tensor], seed: int = 2) -> tuple[torch.Tensor, dict]:
    """What ``loss`` gives after a seed, and its gradients by the parameters' names."""
    model.zero_grad()
    torch.manual_seed(seed)
    found = loss()
    found.backward()
    return found.detach().double(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def step_on(model: nn.Module, inputs: dict[str, torch.Tensor], seed: int = 2) -> tuple[torch.Tensor, dict]:
    """The same of the model's own loss where ``inputs`` have labels, else of its logits' mean square."""

    def loss():
        return model(**inputs).loss if "labels" in inputs else logits(model, inputs).double().square().mean()

    return step_of(model, loss, seed)


def assert_as_plain(model, inputs, *modes, tolerance=1e-9, steps=1, **options) -> tuple[torch.Tensor, dict]:
    """Assert that ``modes`` have the loss and the gradients of plain autograd, in every one of ``steps``; return those."""
    set_memory_mode(model, "plain")
    expected, reference = step_on(model, inputs)
    for mode in modes:
        set_memory_mode(model, mode, **options)
        for _ in range(steps):
            loss, found = step_on(model, inputs)
            torch.testing.assert_close(loss, expected, rtol=max(tolerance, 1e-6), atol=0)  # some are computed in float32
            assert distance(found, reference) <= tolerance, mode
    return expected, reference


def assert_equal(found: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> None:
    """Two models' tensors by name, to the bit."""
    assert found.keys() == reference.keys()
    for name, tensor in reference.items():
        assert torch.equal(found[name], tensor), name


def distance(found: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """The norm of the difference of two models' gradients, relative to that of the second."""
    assert found and found.keys() == reference.keys()
    one, other = (torch.cat([x.double().flatten().cpu() for x in tensors.values()]) for tensors in (found, reference))
    return ((one - other).norm() / other.norm()).item()


def adapted(base: str | nn.Module, blocks=(), dtype: torch.dtype = torch.float64, dropout=None, **fields) -> PeftModel:
    """A family's model with random controls on ``blocks``, or on all that it has, in training mode.

    ``dropout`` sets the probability of each dropout, drop path and attention of the base.
    """
    base = build(base, dtype) if isinstance(base, str) else base
    for module in base.modules() if dropout is not None else ():
        for name, value in vars(module).items():
            if isinstance(value, float) and (name in ("p", "drop_prob") or "dropout" in name):
                setattr(module, name, dropout)
    every = next(iter(find_layers(base).values()))[1].blocks
    config = ControlConfig(**{"control_blocks": list(blocks or every), "control_rank": 3, **fields})
    return randomize_adapters(get_peft_model(base, config, autocast_adapter_dtype=False)).train()


#: What a quantized base is adapted by.
METHODS = ("lora", "dora", "double control", "double control+lora", "double control+dora")
QKV = ("q_proj", "k_proj", "v_proj")


def config_of(method: str, targets=QKV, **fields) -> LoraConfig:
    """Of "lora" or "dora" on ``targets``, of "control" of the MLPs, of "double control" of both blocks, or of two as in
    "control+dora"."""
    if "lora" in method or "dora" in method:
        fields = {"target_modules": list(targets), "r": 4, "lora_alpha": 8, "use_dora": "dora" in method, **fields}
    if "control" not in method:
        return LoraConfig(**fields)
    blocks = ["attention", "mlp"] if "double" in method else ["mlp"]
    return ControlConfig(**{"control_blocks": blocks, "control_rank": 4, **fields})


def bits_of_four(layers: nn.ModuleList, device: str = "cpu") -> None:
    """Put bitsandbytes' NF4, made on ``device``, in the place of the linear layers of a LLaMA's ``layers``."""
    bnb = pytest.importorskip("bitsandbytes")
    for parent in [module for layer in layers for module in (layer.self_attn, layer.mlp)]:
        for name, linear in list(parent.named_children()):
            if type(linear) is nn.Linear:
                new = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4")
                new.load_state_dict(linear.state_dict())
                new.support_avx512bf16_for_cpu = False  # which would repack the weights
                setattr(parent, name, new.to(device).cpu())


class Live(TorchDispatchMode):
    """The bytes of the tensors that torch's functions have made within and that somebody still holds, ``peak`` at most."""

    def __init__(self):
        super().__init__()
        self.storages, self.peak = {}, 0

    def bytes(self) -> int:
        self.storages = {key: (ref, size) for key, (ref, size) in self.storages.items() if not ref.expired()}
        return sum(size for _, size in self.storages.values())

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((arguments, named)) if isinstance(x, torch.Tensor)}
        found = function(*arguments, **(named or {}))
        for storage in [x.untyped_storage() for x in tree_leaves(found) if isinstance(x, torch.Tensor)]:
            if storage._cdata not in given:  # no view
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.bytes())
        return found


def word_tokenizer() -> hf.PreTrainedTokenizerFast:
    """A tokenizer of the words w3, w4, … whose numbers they are."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{index}": index for index in range(3, VOCAB)}}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def is_adapter(name: str) -> bool:
    return "_control." in name or ".lora_" in name
