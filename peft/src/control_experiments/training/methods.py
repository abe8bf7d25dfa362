"""The methods that the experiments compare, as peft configurations."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from torch import nn

from ..errors import UserError

#: Every method by the name that launchers take, and what it is.
METHODS = {
    "control": "a low-rank path parallel to each chosen frozen block (the paper's method)",
    "lora": "low-rank updates of chosen weights",
    "dora": "LoRA with the weights' magnitudes trained apart from their directions",
    "double control": "control parallel to both the attention and the mlp block",
    "control+lora": "control on the mlp block and LoRA on chosen weights, in one adapter",
    "control+dora": "control on the mlp block and DoRA on chosen weights, in one adapter",
    "probe": "no adapter: only the task's head is trained",
}


@dataclass
class ControlSettings:
    """The control part of an adapter; alpha is a plain multiplier (not divided by the rank)."""

    rank: int = 16
    alpha: float = 1.0
    blocks: Sequence[str] = ("mlp",)
    bias: bool = False
    dropout: float = 0.0


@dataclass
class LoraSettings:
    """The LoRA or DoRA part of an adapter; updates are scaled by alpha/rank."""

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    targets: Sequence[str] = field(default_factory=tuple)


def check_method(method: str, known: Sequence[str] = tuple(METHODS)) -> str:
    """Return `method` if it is one of `known`.

    Raises:
        UserError: it is not; the message lists those that are.
    """
    if method not in known:
        raise UserError(f"unknown method {method!r}: choose one of {', '.join(known)}")
    return method


def adapter_config(
    method: str,
    *,
    task_type: str | None,
    control: ControlSettings,
    lora: LoraSettings,
    modules_to_save: Sequence[str] | None = None,
) -> PeftConfig | None:
    """The peft configuration of a method, or None for "probe", which has no adapter.

    "double control" takes attention and mlp whatever `control.blocks` says; all others take `control.blocks`.

    Raises:
        UserError: unknown method, or a rank, dropout, block or target list that cannot be.
    """
    check_method(method)
    if method == "probe":
        return None
    has_control, has_lora = "control" in method, "lora" in method or "dora" in method
    common = {"task_type": task_type, "modules_to_save": list(modules_to_save) if modules_to_save else None}
    per_weight = {}
    if has_lora:
        if lora.rank < 1:
            raise UserError(f"the LoRA rank must be at least 1, got {lora.rank}")
        if not 0 <= lora.dropout < 1:
            raise UserError(f"the LoRA dropout must lie in [0, 1), got {lora.dropout}")
        if not lora.targets:
            raise UserError(f"{method} needs the names of its target modules, such as query and value")
        per_weight = {
            "r": lora.rank,
            "lora_alpha": lora.alpha,
            "lora_dropout": lora.dropout,
            "target_modules": list(lora.targets),
            "use_dora": "dora" in method,
        }
    if not has_control:
        return LoraConfig(**common, **per_weight)

    from peft_control import ControlConfig

    try:
        return ControlConfig(
            **common,
            **per_weight,
            control_blocks=["attention", "mlp"] if method == "double control" else list(control.blocks),
            control_rank=control.rank,
            control_alpha=control.alpha,
            control_bias=control.bias,
            control_dropout=control.dropout,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def load_adapter(model: nn.Module, folder: str | os.PathLike, base: str, **options) -> PeftModel:
    """`model`, which is the one called `base`, with the adapter in `folder`; `options` are peft's.

    Raises:
        UserError: the adapter cannot be read, is another model's, lacks tensors, or holds numbers that are not finite.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            model = PeftModel.from_pretrained(model, str(folder), **options)
        stored = load_peft_weights(str(folder), device="cpu")
    except (RuntimeError, ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        lacks = isinstance(error, KeyError)  # a tensor of a module that is trained whole
        reason = f"it has no {error.args[0]}" if lacks else str(error).strip().split("\n")[0]
        raise UserError(f"the adapter in {folder} does not fit {base}: {reason}") from error
    # peft passes over what is missing or left over; beside some adapters it stores the base's embeddings
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    known = {name for name in stored if name in wanted or "embed" not in name}
    for name in sorted({*wanted} ^ known):
        what = f"it has no {name}" if name in wanted else f"{name} has no place in it"
        raise UserError(f"the adapter in {folder} does not fit {base}: {what}")
    for name, tensor in stored.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"the adapter in {folder} is broken: {name} has numbers that are not finite")
    return model


def set_memory(model: nn.Module, mode: str, cuda_graphs: bool = False) -> None:
    """Set how `model` trains (`peft_control.memory`); "plain" without graphs changes nothing.

    Raises:
        UserError: the model or its adapter does not support the mode.
    """
    if mode == "plain" and not cuda_graphs:
        return
    from peft_control.memory import set_memory_mode

    try:
        set_memory_mode(model, mode, cuda_graphs=cuda_graphs)
    except ValueError as error:
        raise UserError(f"--memory {mode}: {error}; use --memory plain") from error
