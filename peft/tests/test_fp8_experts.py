"""Mixtures of experts in FP8: storage, equality to the bit with dequantized weights in every mode, and what a backward keeps."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import assert_equal, build, distance, randomize_adapters, step_on
from torch.multiprocessing.reductions import StorageWeakRef

from peft_control import ControlConfig, Fp8Experts, Fp8Linear, fp8_experts, quantize_fp8
from peft_control.fp8_kernels import has_fp8
from peft_control.memory import set_memory_mode

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


def gradients(model, mode="plain", **settings):
    set_memory_mode(model, mode, chunk_tokens=8, **settings)
    ids = torch.randint(3, 61, (3, 11), generator=torch.Generator().manual_seed(1))
    return step_on(model.train(), {"input_ids": ids.to(next(model.parameters()).device)})[1]


def experts_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Fp8Experts)}


def controlled(base):
    config = ControlConfig(control_blocks=["attention", "mlp"], control_rank=4)
    return randomize_adapters(get_peft_model(base, config), std=0.1)


def with_experts(name, implementation="grouped_mm", dtype=torch.float32):
    """The family's model in FP8, and the same with experts as they were that hold what is stored."""
    original = build(name, dtype)
    original.set_experts_implementation(implementation)
    stored = quantize_fp8(copy.deepcopy(original))
    wide = copy.deepcopy(stored)
    for place, module in experts_of(stored).items():
        experts = original.get_submodule(place)
        for weight, values in module.dequantize(dtype).items():
            x, scale = experts._parameters[weight].double(), module._parameters[f"{weight}_scale"]
            # half a unit of 3 bits of fraction, or half the least number
            least = torch.maximum(x.abs() * 2**-4, scale.double().unsqueeze(-1) * 2**-10)
            assert ((values.double() - x).abs() <= least).all()
            assert torch.equal(values, values.bfloat16().to(dtype)) and not torch.equal(values.double(), x)
            experts._parameters[weight].data = values
        wide.set_submodule(place, experts)
    return stored, wide


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        *((name, implementation) for name in ("qwen3_moe", "mixtral", "gpt_oss") for implementation in IMPLEMENTATIONS),
        *((name, "eager") for name in ("llama4", "deepseek_v3", "glm4_moe", "granitemoehybrid")),
    ],
)
def test_experts_compute_as_those_that_hold_what_is_stored(name, implementation):
    models = [controlled(base) for base in with_experts(name, implementation)]
    stored = {key: value.clone() for key, value in models[0].state_dict().items()}
    assert experts_of(models[0]) and torch.equal(*(model(input_ids=torch.arange(3, 12)[None])[0] for model in models))
    for mode in ("plain", "lean"):  # in three chunks of tokens, and a part of one
        expected = gradients(models[1], mode)
        assert_equal(gradients(models[0], mode), expected)
        assert_equal(gradients(models[0], mode, stream_weights=2), expected)
    assert distance(expected, gradients(models[1])) < 1e-5
    set_memory_mode(models[0], "plain")
    assert_equal(models[0].state_dict(), stored)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", ["plain", "lean"])
def test_no_dequantized_weight_is_kept_for_the_backward(mode, implementation, monkeypatch):
    made, own = [], fp8_experts.dequantize_rows

    def noted(*arguments):
        made.append(StorageWeakRef((found := own(*arguments)).untyped_storage()))
        return found

    monkeypatch.setattr(fp8_experts, "dequantize_rows", noted)
    model = set_memory_mode(controlled(with_experts("qwen3_moe", implementation)[0]).train(), mode, chunk_tokens=8)
    for _ in range(2):  # in the second step lean computes no expert without need
        made.clear()
        result = model(input_ids=torch.arange(3, 36).view(3, 11)).logits.square().mean()
        forward = len(made)
        assert all(ref.expired() for ref in made)
        result.backward()
        assert all(ref.expired() for ref in made)
    assert forward == 4 and (mode == "plain" or len(made) == 8)  # once for a layer, not for a chunk


def test_experts_beside_adapters_and_of_the_last_layers():
    ids, lora = torch.arange(3, 12)[None], LoraConfig(target_parameters=["mlp.experts.gate_up_proj"], r=2)
    adapted = quantize_fp8(get_peft_model(build("qwen3_moe"), lora))
    assert not experts_of(adapted) and any(isinstance(module, Fp8Linear) for module in adapted.modules())
    adapted(input_ids=ids)
    with pytest.raises(ValueError, match="experts in FP8 take no LoRA"):
        get_peft_model(quantize_fp8(build("qwen3_moe")), lora)(input_ids=ids)
    assert list(experts_of(quantize_fp8(build("qwen3_moe"), keep_last=0.5))) == ["model.layers.0.mlp.experts"]


@pytest.mark.skipif(not torch.cuda.is_available() or not has_fp8(torch.device("cuda", 0)), reason="needs a GPU with FP8")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_experts_on_a_gpu(implementation):
    models = [controlled(base).cuda() for base in with_experts("qwen3_moe", implementation, torch.bfloat16)]
    for mode in ("plain", "lean"):
        found, expected = (gradients(model, mode) for model in models)
        assert all(gradient.isfinite().all() for gradient in expected.values())
        assert distance(found, expected) < 1e-2, mode
