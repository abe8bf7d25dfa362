"""``adapter: control`` in axolotl's YAML; nothing else imports this module.

    plugins: [peft_control.axolotl_plugin.ControlPlugin]
    adapter: control
    control: {control_blocks: [attention, mlp], control_rank: 64, memory_mode: lean}

``control`` takes the fields of `ControlConfig` and ``memory_mode``. With axolotl's own ``lora_target_modules`` or
``lora_target_linear``, ``lora_r``, ``lora_alpha``, ``lora_dropout`` and ``peft_use_dora`` the same adapter holds LoRA or DoRA too.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftModel, get_peft_model
from pydantic import BaseModel, Field, field_validator, model_validator

from .config import ControlConfig
from .memory import MODES, set_memory_mode

#: What axolotl's keys of LoRA are called in LoraConfig.
_LORA = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_fan_in_fan_out": "fan_in_fan_out",
    "lora_rank_pattern": "rank_pattern",
    "lora_alpha_pattern": "alpha_pattern",
    "lora_target_parameters": "target_parameters",
    "peft_init_lora_weights": "init_lora_weights",
    "peft_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora",
}
_WHOLE = {
    "lora_modules_to_save": "modules_to_save",
    "lora_exclude_modules": "exclude_modules",
    "peft_layers_to_transform": "layers_to_transform",
    "peft_layers_pattern": "layers_pattern",
    "peft_layer_replication": "layer_replication",  # which is refused
    "peft_trainable_token_indices": "trainable_token_indices",
    "peft_ensure_weight_tying": "ensure_weight_tying",
}


class ControlArgs(BaseModel):
    """What the plug-in adds to axolotl's configuration."""

    control: dict[str, Any] = Field(default_factory=dict)

    @field_validator("control")
    @classmethod
    def _known(cls, control: dict) -> dict:
        unknown = control.keys() - {field.name for field in fields(ControlConfig)} - {"memory_mode"}
        if unknown:
            raise ValueError(f"control has no {', '.join(sorted(unknown))}; see the fields of ControlConfig")
        if (mode := control.get("memory_mode", "plain")) not in MODES:
            raise ValueError(f"memory_mode {mode!r} is none of {', '.join(MODES)}")
        _config({"control": control})
        return control

    @model_validator(mode="after")
    def _no_checkpointing(self):
        mode = self.control.get("memory_mode", "plain")
        if mode != "plain" and getattr(self, "gradient_checkpointing", None):
            raise ValueError(f"memory_mode {mode} replaces gradient checkpointing: set gradient_checkpointing: false")
        return self


class ControlPlugin(BasePlugin):
    """Gives axolotl the adapter "control"."""

    def get_input_args(self) -> str:
        return f"{__name__}.ControlArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name="control")]

    def load_adapter(self, model, cfg, inference: bool = False, config_only: bool = False):
        """The model with a new adapter, or with the one in ``lora_model_dir``; other adapters are left to others.

        Returns:
            ``(model, config)``; with ``config_only`` ``(None, config)``, for trainers that make the adapter; or None.
        """
        if cfg.get("adapter") != "control":
            return None
        heads = {"SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS"}
        kind = next((task for head, task in heads.items() if head in type(model).__name__), "CAUSAL_LM")
        config = _config(cfg, task_type=kind)
        if config_only:
            return None, config
        if cfg.get("lora_model_dir"):
            adapted = PeftModel.from_pretrained(model, cfg["lora_model_dir"], is_trainable=not inference)
            return adapted, adapted.peft_config["default"]
        adapted = get_peft_model(model, config)
        adapted.print_trainable_parameters()
        return adapted, config

    def post_trainer_create(self, cfg, trainer) -> None:
        """Set the memory mode last, over whatever the trainer has put on the model."""
        if cfg.get("adapter") == "control":
            set_memory_mode(trainer.model, (cfg.get("control") or {}).get("memory_mode", "plain"))


def _config(cfg, **more) -> ControlConfig:
    own = {name: value for name, value in (cfg.get("control") or {}).items() if name != "memory_mode"}
    given = {ours: cfg[theirs] for theirs, ours in _WHOLE.items() if cfg.get(theirs)}
    targets = "all-linear" if cfg.get("lora_target_linear") else cfg.get("lora_target_modules")
    if targets or cfg.get("lora_target_parameters"):
        given["target_modules"] = targets
        given |= {ours: cfg[theirs] for theirs, ours in _LORA.items() if cfg.get(theirs) is not None}
    return ControlConfig(**{**more, **given, **own})
