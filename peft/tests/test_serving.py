"""What serves an adapter: one of several for each row of a batch, merged LoRA, swapped weights, exported graphs."""

import importlib.util

import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import load_peft_weights
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from test_adapters import config_of, llama, outputs
from tiny_models import FAMILIES, MODELS, build, logits, randomize_adapters, skip_before
from torch import nn

INPUTS = FAMILIES["llama"].inputs()
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def several(family, first, second):
    """A model with two random adapters in eval mode."""
    model = get_peft_model(build(family), first, adapter_name="one")
    model.add_adapter("two", second)
    return randomize_adapters(model).eval()


def rows_alone(model, names, run):
    """``run()`` with every row's adapter active for the whole batch, row by row."""
    found = []
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                found.append(run()[row])
        else:
            model.set_adapter(name)
            found.append(run()[row])
    model.set_adapter("one")
    return torch.stack(found)


# -- an adapter for each row --------------------------------------------------------------------------------


TASKS = {"bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}


@pytest.mark.parametrize(
    "family, methods",
    [
        ("llama", ("control", "double control")),
        ("llama", ("control", "control+lora")),
        ("llama", ("control+lora", "control+lora")),
        ("gpt2", ("control", "double control")),
        ("qwen3_moe", ("double control", "control")),
        ("llama4", ("double control", "control")),
        ("t5", ("double control", "control")),
        ("bert", ("control", "double control")),  # and a trained head
    ],
)
@pytest.mark.parametrize("names", [["one", "two"], ["two", "__base__"], ["__base__", "__base__"]])
@torch.no_grad()
def test_each_row_has_its_own_adapter(family, methods, names):
    model = several(family, *[config_of(method, task_type=TASKS.get(family, "CAUSAL_LM")) for method in methods])
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.add_(torch.randn_like(parameter))
    inputs = MODELS[family].inputs()
    alone = logits(model, inputs)
    mixed = logits(model, {**inputs, "adapter_names": names})
    assert torch.equal(logits(model, inputs), alone), "nothing is left behind"
    torch.testing.assert_close(mixed, rows_alone(model, names, lambda: logits(model, inputs)), **CLOSE)
    assert names[0] == names[1] or not torch.allclose(mixed, alone, **CLOSE)
    for beams in (1, 3) if family in ("llama", "t5") and names[0] != names[1] else ():
        steps = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": beams}
        prompt = {"input_ids": inputs["input_ids"], **steps}
        text = model.generate(**prompt, adapter_names=names)
        assert torch.equal(text, rows_alone(model, names, lambda prompt=prompt: model.generate(**prompt)))
    model.set_adapter("two")
    torch.testing.assert_close(logits(model, {**inputs, "adapter_names": names}), mixed, **CLOSE)


def test_names_that_cannot_be_are_one_line():
    model = several("llama", config_of(), config_of())
    with pytest.raises(ValueError, match="adapter_names has 'three': there are one, two, __base__"):
        model(**INPUTS, adapter_names=["one", "three"])
    with pytest.raises(ValueError, match="adapter_names has 3 names, but LlamaDecoderLayer works on 2 rows"):
        model(**INPUTS, adapter_names=["one"] * 3)
    with pytest.raises(ValueError, match="for inference: call model.eval"):
        model.train()(**INPUTS, adapter_names=["one", "two"])
    model.eval()
    expected = outputs(model)
    model.set_adapter("two")
    assert not torch.equal(outputs(model), expected), "the failed calls have left nothing behind"


# -- merging ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, method, fields",
    [
        *(("llama", method, {"target_modules": ["q_proj", "k_proj", "v_proj"]}) for method in ("control+lora", "control+dora")),
        ("llama", "control+lora", {"trainable_token_indices": [4, 5]}),
        ("opt", "control+lora", {"target_modules": ["fc2"]}),  # which the control writes to
    ],
)
def test_the_lora_part_is_merged_and_the_control_stays(family, method, fields, tmp_path):
    model = randomize_adapters(get_peft_model(build(family), config_of(method, **fields))).eval()
    expected = outputs(model)
    with pytest.warns(UserWarning, match="the LoRA part is merged into the weights; the control stays"):
        model.merge_adapter()
    torch.testing.assert_close(outputs(model), expected, **CLOSE)
    model.unmerge_adapter()
    torch.testing.assert_close(outputs(model), expected, **CLOSE)
    with pytest.warns(UserWarning, match="the control stays a path of its own"):
        merged = model.merge_and_unload()
    assert not any("lora_" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(outputs(merged), expected, **CLOSE)
    torch.testing.assert_close(outputs(model), expected, **CLOSE)
    # what is left is an adapter of controls on the merged base
    model.save_pretrained(tmp_path / "adapter")
    base = model.unload()
    assert not torch.allclose(outputs(base), expected, **CLOSE)
    again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert again.peft_config["default"].target_modules is None
    torch.testing.assert_close(outputs(again), expected, **CLOSE)
    assert not any("lora_" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))


# -- swapped weights ----------------------------------------------------------------------------------------


def test_weights_are_swapped_in_place(tmp_path):
    """peft's hotswap_adapter knows LoRA alone and says so; its two calls below it swap what has the same shapes."""
    model, other = llama("control+lora"), randomize_adapters(llama("control+lora"), seed=8)
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but CONTROL was passed"):
        hotswap_adapter(model, str(tmp_path), adapter_name="default")
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    set_peft_model_state_dict(model, load_peft_weights(str(tmp_path)))
    assert torch.equal(outputs(model), outputs(other))
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before


# -- graphs -------------------------------------------------------------------------------------------------


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits


def test_torch_export():
    skip_before("torch", "2.14", "exports no batch of any length here")
    model, ids = Logits(llama("double control+lora")).eval(), INPUTS["input_ids"]
    batch, length = torch.export.Dim("batch", min=2, max=16), torch.export.Dim("length", min=2, max=32)
    program = torch.export.export(model, (ids,), dynamic_shapes={"input_ids": {0: batch, 1: length}}, strict=False)
    for given in (ids, torch.cat([ids, ids])[:3, :7]):
        torch.testing.assert_close(program.module()(given), model(given), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="onnx, onnxscript or onnxruntime is not installed",
)
def test_onnx(tmp_path):
    import onnxruntime

    model, ids = Logits(llama("double control")).eval(), INPUTS["input_ids"]
    torch.onnx.export(model, (ids,), tmp_path / "model.onnx", dynamo=True, input_names=["input_ids"])
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input_ids": ids.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(ids).detach(), rtol=1e-4, atol=1e-4)


# -- bases --------------------------------------------------------------------------------------------------


def test_experts_in_mxfp4_are_not_trained_through():
    """As transformers loads gpt-oss on a GPU; here only the class stands in the model."""
    from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

    base = build("gpt_oss")
    base.model.layers[0].mlp.experts = Mxfp4GptOssExperts(base.config)
    with pytest.raises(ValueError, match=r"experts in MXFP4 pass no gradient on.*Mxfp4Config\(dequantize=True\)"):
        get_peft_model(base, config_of())
    get_peft_model(base, config_of(inference_mode=True))
