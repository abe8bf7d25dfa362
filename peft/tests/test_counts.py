"""The parameter counts that the paper and its authors' code report, on models without memory."""

import timm
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_control import ControlConfig

LLAMA2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA3_8B = {**LLAMA2_7B, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}


def trained_parameters(model, config: ControlConfig) -> dict[str, int]:
    return {
        name: p.numel()
        for name, p in get_peft_model(model, config, low_cpu_mem_usage=True).named_parameters()
        if p.requires_grad
    }


def meta_llama(config: dict) -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**config))


def test_vit_base_cifar100():
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=100)
    config = ControlConfig(control_rank=16, control_bias=True, modules_to_save=["head"])
    counts = trained_parameters(model, config)
    control = sum(count for name, count in counts.items() if "control" in name)
    assert (control, sum(counts.values()) - control) == (304_320, 76_900)
    assert sum(counts.values()) == 381_220


def test_llama2_7b_control_and_lora():
    config = ControlConfig(control_rank=64, target_modules=["q_proj", "k_proj", "v_proj"], r=32, lora_alpha=64)
    assert sum(trained_parameters(meta_llama(LLAMA2_7B), config).values()) == 41_943_040


def test_llama3_8b_double_control():
    config = ControlConfig(control_blocks=["attention", "mlp"], control_rank=64)
    assert sum(trained_parameters(meta_llama(LLAMA3_8B), config).values()) == 33_554_432
