"""The tuner: controls on blocks and, if asked for, LoRA/DoRA on linear layers, as one adapter."""

from __future__ import annotations

import re
import warnings
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import nn

from .architectures import find_layers, layer_index
from .config import ControlConfig
from .control_layer import CANNOT_MERGE, COMBINATIONS, STAYS, ControlLayer
from .fp8_experts import InFp8


class ControlModel(LoraModel):
    """Injects what a :class:`ControlConfig` describes into a model.

    A subclass of upstream's LoRA tuner: the LoRA part of a mixed adapter is upstream's own code, and peft
    saves, loads, activates and deletes both parts together. Each controlled layer gets a child
    ``<block>_control`` (:class:`ControlLayer`); the base model is otherwise unchanged.
    """

    prefix = "control_"
    tuner_layer_cls = BaseTunerLayer  # both LoraLayer and ControlLayer

    # -- injection ------------------------------------------------------------------------------------------

    def inject_adapter(self, model, adapter_name, *args, **kwargs):
        """As upstream's; raises ValueError for an unknown architecture, block or layer index."""
        self._layers = self._choose_layers(model, self.peft_config[adapter_name])
        # peft may now put modules_to_save wrappers around modules that carry hooks, and copy them, hooks
        # and all: so the hooks are off during injection and afterwards sit on what stands at their paths.
        for control in _controls(model):
            control.detach()
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            for control in _controls(model):
                control.attach()

    @staticmethod
    def _choose_layers(model: nn.Module, config: Any) -> dict:
        layers = find_layers(model, config.control_architecture, config.layers_pattern)
        for layer, architecture in layers.values():
            architecture.check(layer)
        if not config.inference_mode and any(type(module).__name__ == "Mxfp4GptOssExperts" for module in model.modules()):
            raise ValueError(NO_GRADIENT)
        device_map = getattr(model, "hf_device_map", {})
        if {"cpu", "disk"} & {*device_map.values()} and any(
            p.is_meta for layer, _ in layers.values() for p in layer.parameters()
        ):
            raise ValueError(OFFLOADED)
        for architecture in {row.name: row for _, row in layers.values()}.values():
            if unknown := [block for block in config.control_blocks if block not in architecture.blocks]:
                raise ValueError(
                    f"{architecture.name} has no block {unknown[0]!r}: choose from {', '.join(architecture.blocks)}"
                )
        if config.layers_to_transform is not None:
            wanted = config.layers_to_transform
            wanted = {wanted} if isinstance(wanted, int) else set(wanted)
            if not wanted:
                raise ValueError("layers_to_transform is empty: leave it out to control all layers")
            index = {name: layer_index(name, config.layers_pattern) for name in layers}
            layers = {name: entry for name, entry in layers.items() if index[name] in wanted}
            if missing := wanted - set(index.values()):
                raise ValueError(f"layers_to_transform names layers that do not exist: {sorted(missing)}")
        layers = {name: entry for name, entry in layers.items() if not _excluded(config, name)}
        if not layers:
            raise ValueError("exclude_modules and modules_to_save leave no layer to control")
        for name, (layer, architecture) in layers.items():
            for block in config.control_blocks:
                control = getattr(layer, f"{block}_control", None)
                if control is not None and control.block != architecture.blocks[block].of(layer):
                    raise ValueError(f"{name} has a control of {block!r} by another row: adapters of a model share rows")
        keys = [f"{name}.{block}" for name in layers for block in config.control_blocks]
        for name in ("control_rank_pattern", "control_alpha_pattern"):
            for pattern in () if config.inference_mode else getattr(config, name):
                if not any(_by_pattern({pattern: True}, key, False) for key in keys):
                    raise ValueError(f"{name} {pattern!r} matches no block; they are called as {keys[0]!r} is")
        targets = config.target_modules
        if targets and targets != "all-linear":  # upstream's own check is content with the controlled layers
            matches = LoraModel._check_target_module_exists
            if not any(matches(config, name) for name, _ in model.named_modules()):
                raise ValueError(f"target_modules {targets} not found in {type(model).__name__}")
        return layers

    def _prepare_adapter_config(self, peft_config, model_config):
        return peft_config  # without target_modules there is no LoRA part; upstream would choose a default

    def _check_target_module_exists(self, peft_config, key):
        if key in self._layers:
            return True
        if not peft_config.target_modules and not peft_config.target_parameters:
            return False
        pattern = peft_config.layers_pattern
        if pattern and layer_index(key, pattern) is None:
            return False  # upstream heeds it only beside layers_to_transform
        return LoraModel._check_target_module_exists(peft_config, key)

    def _create_and_replace(self, config, adapter_name, target, target_name, parent, current_key, **kwargs):
        if current_key not in self._layers:
            super()._create_and_replace(config, adapter_name, target, target_name, parent, current_key, **kwargs)
            return
        layer, architecture = self._layers[current_key]
        for block in config.control_blocks:
            child, key = f"{block}_control", f"{current_key}.{block}"
            if not hasattr(layer, child):
                layer.add_module(child, ControlLayer(layer, architecture, block))
            getattr(layer, child).update_layer(
                adapter_name,
                rank=_by_pattern(config.control_rank_pattern, key, config.control_rank),
                alpha=_by_pattern(config.control_alpha_pattern, key, config.control_alpha),
                dropout=config.control_dropout,
                bias=config.control_bias,
                init=config.control_init or architecture.init,
                std=getattr(getattr(self.model, "config", None), "initializer_range", 0.02),
                identity=config.init_weights,
                inference_mode=config.inference_mode,
            )

    def delete_adapter(self, adapter_name):
        """As upstream's; if it was the active one, the first of those that are left becomes so in all layers."""
        active = self.active_adapters
        super().delete_adapter(adapter_name)
        if adapter_name in active and self.peft_config:  # each layer has chosen among its own
            self.set_adapter([name for name in active if name != adapter_name] or [*self.peft_config][:1])

    def add_weighted_adapter(self, adapters, weights, adapter_name, combination_type="svd", svd_rank=None, **options):
        """Add the adapter whose control is the sum of ``weights[i]`` times that of ``adapters[i]``; see :meth:`ControlLayer.combine`.

        A LoRA part, which all of them or none must have, is combined by upstream, which says what ``options`` are.

        Raises:
            ValueError: an unknown adapter or combination, adapters on different layers, with modules_to_save or with
                trainable_token_indices, or (in "linear") of different ranks.
        """
        if adapter_name in self.peft_config:
            return  # as upstream
        if not adapters or len(adapters) != len(weights) or not set(adapters) <= self.peft_config.keys():
            raise ValueError(f"adapters {adapters} with weights {weights}: there are {list(self.peft_config)}")
        if combination_type not in COMBINATIONS:
            raise ValueError(f"controls are combined by {', '.join(COMBINATIONS)}, not {combination_type!r}")
        configs: list[Any] = [self.peft_config[name] for name in adapters]
        for field in ("layers_to_transform", "layers_pattern", "exclude_modules", "control_architecture"):
            if any(getattr(config, field) != getattr(configs[0], field) for config in configs):
                raise ValueError(f"adapters with different {field} cannot be combined")
        if any(config.modules_to_save or config.trainable_token_indices for config in configs):
            raise ValueError("adapters with modules_to_save or trainable_token_indices cannot be combined")
        ranks = [max([config.control_rank, *config.control_rank_pattern.values()]) for config in configs]
        owners = [[control.rank[name] for name in adapters if name in control.rank] for control in _controls(self.model)]
        if combination_type == "linear" and any(len(set(each)) > 1 for each in owners):
            raise ValueError('"linear" combines controls of equal ranks')
        first = configs[0]
        combined = replace(
            first,
            control_blocks=list(dict.fromkeys(block for config in configs for block in config.control_blocks)),
            control_rank=sum(ranks) if combination_type == "cat" else (svd_rank or max(ranks)),
            control_alpha=1.0,
            control_bias=any(config.control_bias for config in configs),
            control_rank_pattern={},
            control_alpha_pattern={},
        )
        if any(config.target_modules or config.target_parameters for config in configs):
            self.peft_config[adapters[0]] = combined
            try:
                super().add_weighted_adapter(adapters, weights, adapter_name, combination_type, svd_rank=svd_rank, **options)
            finally:
                self.peft_config[adapters[0]] = first
        else:
            self.peft_config[adapter_name] = combined
            self.inject_adapter(self.model, adapter_name)
        for control in _controls(self.model):
            if adapter_name in control.rank:
                control.combine(adapters, weights, adapter_name, combination_type)

    # -- an adapter for each row of a batch -----------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        names = kwargs.pop("adapter_names", None)
        with super()._enable_peft_forward_hooks(*args, **kwargs), self._rows_have(names, kwargs.get("num_beams") or 1):
            yield

    @contextmanager
    def _rows_have(self, names, beams):
        """Within, the rows of a batch have the adapters ``names``, or "__base__" for none.

        Raises:
            ValueError: while training, unknown names, or none for the rows.
        """
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names is for inference: call model.eval() first")
        if unknown := sorted({*names} - {*self.peft_config, "__base__"}):
            raise ValueError(f"adapter_names has {unknown[0]!r}: there are {', '.join([*self.peft_config, '__base__'])}")
        repeated = [name for name in names for _ in range(beams)]
        encoder = self.model.get_encoder() if hasattr(self.model, "get_encoder") else None
        # an encoder has run before its states are repeated for the beams
        once = set() if encoder in (None, self.model) else set(encoder.modules())
        hooks, controls = [], _controls(self.model)
        takers: list[Any] = [m for m in self.model.modules() if isinstance(m, (LoraLayer, AuxiliaryTrainingWrapper))]
        for module in takers:
            give = partial(_give_names, names=[*names] if module in once else repeated)
            hooks.append(module.register_forward_pre_hook(give, with_kwargs=True))
        try:
            for control in controls:
                control.adapter_names = [*names] if control in once else repeated
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for control in controls:
                control.adapter_names = None

    # -- what can be merged, and what not -------------------------------------------------------------------

    def _check_merge_allowed(self):
        adapted = [module.get_base_layer() for module in self.model.modules() if isinstance(module, LoraLayer)]
        if not adapted:
            raise ValueError(CANNOT_MERGE)
        if any(isinstance(module, InFp8) for module in adapted):
            raise ValueError(NOT_INTO_FP8)
        super()._check_merge_allowed()
        warnings.warn(STAYS, stacklevel=4)

    def _unload_and_optionally_merge(self, merge=True, **kwargs):
        """Merging leaves the controls where they are, and an adapter of each that is nothing else."""
        controls = _controls(self.model)
        if merge:
            try:
                model: Any = super()._unload_and_optionally_merge(merge=True, **kwargs)
                gone = ("target_modules", "target_parameters", "modules_to_save", "trainable_token_indices")
                for name, config in self.peft_config.items():
                    self.peft_config[name] = replace(config, **dict.fromkeys(gone), use_dora=False)
                model.peft_config = self.peft_config
            finally:
                for control in controls:  # LoRA layers were replaced, and may have carried hooks
                    control.attach()
            return model
        model = super()._unload_and_optionally_merge(merge=False, **kwargs)
        for name, control in [(n, m) for n, m in model.named_modules() if isinstance(m, ControlLayer)]:
            control.detach()
            delattr(control.layer, name.rpartition(".")[2])
        return model


NO_GRADIENT = (
    "experts in MXFP4 pass no gradient on, so nothing can be trained below them: load the model with "
    "quantization_config=Mxfp4Config(dequantize=True)"
)

OFFLOADED = (
    "accelerate has offloaded weights of layers that get a control: load the base without device_map and call "
    "set_memory_mode(model, 'lean', stream_weights=True)"
)

NOT_INTO_FP8 = "LoRA and DoRA are not merged into an FP8 base: load the base in 16 bits and merge there"


def _give_names(module, args, kwargs, names):
    return args, {**kwargs, "adapter_names": names}


def _controls(model: nn.Module) -> list[ControlLayer]:
    return [module for module in model.modules() if isinstance(module, ControlLayer)]


def _by_pattern(pattern: dict, key: str, default):
    return pattern.get(get_pattern_key(list(pattern), key), default)


def _excluded(config: ControlConfig, name: str) -> bool:
    if any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in config.modules_to_save or ()):
        return True  # trained as a whole: upstream puts no adapter into such modules either
    exclude = config.exclude_modules or []
    if isinstance(exclude, str):
        return re.fullmatch(exclude, name) is not None
    return any(name == module or name.endswith(f".{module}") for module in exclude)
