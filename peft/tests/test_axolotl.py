"""The plug-in for axolotl, called as axolotl 0.19's loaders call it; on axolotl's own classes where it is installed."""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml
from peft import PeftModel
from tiny_models import FAMILIES, build, logits

INPUTS = FAMILIES["llama"].inputs()
LABELLED = {**INPUTS, "labels": INPUTS["input_ids"]}
EXAMPLE = yaml.safe_load((Path(__file__).parent.parent / "axolotl_example.yml").read_text())


@pytest.fixture(scope="module")
def plugin_module():
    """The plug-in's module; without axolotl over a stand-in with the names and signatures of its ``integrations/base.py``."""
    patch = pytest.MonkeyPatch()
    if importlib.util.find_spec("axolotl") is None:
        base = ModuleType("axolotl.integrations.base")

        @dataclass(frozen=True)
        class AdapterCapabilities:
            name: str
            lora_like: bool = False
            relora: bool = False

        class BasePlugin:
            def get_input_args(self): ...
            def get_adapter_capabilities(self): ...
            def load_adapter(self, model, cfg, inference=False, config_only=False): ...
            def post_trainer_create(self, cfg, trainer): ...

        base.AdapterCapabilities, base.BasePlugin = AdapterCapabilities, BasePlugin
        for name in ("axolotl", "axolotl.integrations"):
            patch.setitem(sys.modules, name, ModuleType(name))
        patch.setitem(sys.modules, base.__name__, base)
    yield importlib.import_module("peft_control.axolotl_plugin")
    patch.undo()
    sys.modules.pop("peft_control.axolotl_plugin")


def trained(plugin, cfg, base=None):
    """What axolotl's ``load_adapter`` and ``setup_trainer`` do, and the gradients of a step."""
    torch.manual_seed(0)
    model, config = plugin.load_adapter(base or build("llama"), cfg, inference=False, config_only=False)
    plugin.post_trainer_create(cfg, SimpleNamespace(model=model))
    model.train()
    model(**LABELLED).loss.backward()
    return model, config, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def test_the_example_trains_as_plain_autograd_does(plugin_module, tmp_path):
    (name,) = EXAMPLE["plugins"]
    plugin = getattr(importlib.import_module(name.rpartition(".")[0]), name.rpartition(".")[2])()
    assert [capability.name for capability in plugin.get_adapter_capabilities()] == [EXAMPLE["adapter"]]
    module, _, arguments = plugin.get_input_args().rpartition(".")
    validated = getattr(importlib.import_module(module), arguments)(**EXAMPLE)
    cfg = {**EXAMPLE, "control": {**validated.control, "init_weights": False}}

    model, config, found = trained(plugin, cfg)
    assert (config.control_blocks, config.control_rank) == (["attention", "mlp"], 64)
    assert config.task_type == "CAUSAL_LM"
    assert model(**LABELLED).logits is None  # mode lean
    plain = {**cfg, "control": {**cfg["control"], "memory_mode": "plain"}}
    _, _, expected = trained(plugin, plain)
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)

    model.save_pretrained(tmp_path)
    cfg["lora_model_dir"] = str(tmp_path)
    again, config = plugin.load_adapter(build("llama"), cfg, inference=True)
    assert isinstance(again, PeftModel) and config.control_rank == 64
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert torch.equal(logits(again.eval(), INPUTS), logits(model.eval(), INPUTS))


def test_what_trainers_ask_for_and_what_is_not_ours(plugin_module):
    plugin = plugin_module.ControlPlugin()
    lora = {"lora_target_modules": ["q_proj"], "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
    model, config = plugin.load_adapter(build("llama"), {**EXAMPLE, **lora}, config_only=True)
    assert model is None and (config.r, config.lora_alpha, config.target_modules) == (4, 8, {"q_proj"})
    _, config = plugin.load_adapter(build("llama"), {**EXAMPLE, "lora_dropout": 0.0}, config_only=True)
    assert config.target_modules is None
    assert plugin.load_adapter(build("llama"), {"adapter": "lora"}) is None
    options = {"lora_target_linear": True, "lora_rank_pattern": {"q_proj": 2}, "peft_trainable_token_indices": [4]}
    model, config = plugin.load_adapter(build("llama"), {**EXAMPLE, **options, "peft_layers_pattern": ["layers"]})
    layer = model.base_model.model.model.layers[0]
    assert layer.self_attn.q_proj.r == {"default": 2} and layer.mlp.down_proj.r == {"default": 8}
    assert (config.trainable_token_indices, config.layers_pattern) == ([4], ["layers"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"control": {"control_rnak": 4}}, "control has no control_rnak"),
        ({"control": {"control_rank": 0}}, "control_rank must be an integer of at least 1"),
        ({"control": {"memory_mode": "leaner"}}, "memory_mode 'leaner' is none of plain, fast"),
        ({"gradient_checkpointing": True}, "set gradient_checkpointing: false"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(plugin_module, change, message):
    class Whole(plugin_module.ControlArgs):  # axolotl makes such a class of all plug-ins' arguments and its own
        gradient_checkpointing: bool | None = None

    with pytest.raises(ValueError, match=message):
        Whole(**{**EXAMPLE, **change})
