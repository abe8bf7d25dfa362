"""The methods that the experiments compare, as peft configurations."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import LoraConfig, MissConfig, PeftConfig, PeftModel, ShadowConfig, get_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from peft_control import ControlConfig, Fp8Linear

from ..errors import UserError
from .checksums import local_fingerprint
from .options import AdapterOptions, public_id
from .quantization import quantization_of


def adapter_config(options: AdapterOptions, *, targets: Sequence[str] = (), bias: bool = False, **settings) -> PeftConfig:
    """The peft configuration of a method that has an adapter.

    "double control" takes attention and mlp whatever `control_blocks` says; all others take `control_blocks`.

    Args:
        targets: modules for LoRA and DoRA where `lora_targets` names none.
        bias: whether the control has biases.
        settings: what every configuration of peft has, such as `task_type` and `modules_to_save`.

    Raises UserError: a rank, dropout or block that cannot be.
    """
    method = options.method
    if method == "shadow":
        return ShadowConfig(**settings, r=options.lora_rank)
    if any(name in method for name in ("lora", "dora", "miss")):
        targets = list(options.lora_targets or targets)
        if method == "miss":
            rank, dropout = options.lora_rank, options.lora_dropout
            return MissConfig(**settings, r=rank, miss_dropout=dropout, target_modules=targets)
        settings |= {"r": options.lora_rank, "target_modules": targets, "use_dora": "dora" in method}
        settings |= {"lora_alpha": options.lora_alpha, "lora_dropout": options.lora_dropout}
    if "control" not in method:
        return LoraConfig(**settings)

    blocks = ["attention", "mlp"] if method == "double control" else list(options.control_blocks)
    named = ("control_rank", "control_alpha", "control_dropout")
    settings |= {name: getattr(options, name) for name in named}
    try:
        return ControlConfig(**settings, control_blocks=blocks, control_bias=bias)
    except ValueError as error:
        raise UserError(str(error)) from error


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Raises UserError: in the place of what transformers raises in the block, where it cannot load the model called `name`."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"cannot load a model from {name!r}: {reason}") from error


def load_adapter(model: nn.Module, folder: str | os.PathLike, base: str, **options) -> PeftModel:
    """`model`, which is the one called `base`, with the adapter in `folder`; `options` are peft's. Raises
    UserError: the adapter cannot be read, is another model's, lacks tensors, or holds numbers that are not
    finite."""
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
    if apart := sorted({*wanted} ^ known):
        what = f"it has no {apart[0]}" if apart[0] in wanted else f"{apart[0]} has no place in it"
        raise UserError(f"the adapter in {folder} does not fit {base}: {what}")
    if broken := [name for name, tensor in stored.items() if not tensor.isfinite().all()]:
        raise UserError(f"the adapter in {folder} is broken: {broken[0]} has numbers that are not finite")
    return model


def set_memory(
    model: nn.Module, mode: str, cuda_graphs: bool = False, *, offload: str = "auto", stream_weights: bool | int = False, **how
) -> None:
    """Set how `model` trains, in the words of `MemoryOptions` (`how`: `chunk_tokens`); "plain" alone changes nothing. Raises
    UserError: the model or its adapter does not support the mode, or the host cannot hold streamed weights."""
    if mode == "plain" and not cuda_graphs and not stream_weights:
        return
    from peft_control.memory import set_memory_mode

    waits = {"auto": None, "always": True, "never": False, "fp8": "fp8"}[offload]
    try:
        set_memory_mode(model, mode, offload=waits, cuda_graphs=cuda_graphs, stream_weights=stream_weights or False, **how)
    except ValueError as error:
        instead = "leave out --stream_weights" if stream_weights else "use --memory plain"
        raise UserError(f"--memory {mode}: {error}; {instead}") from error


def count_parameters(model: nn.Module) -> dict:
    """Trained parameters: all, the adapter's, and the head's (which peft keeps as modules_to_save)."""
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    total, has_adapter = sum(trained.values()), hasattr(model, "peft_config")
    head = sum(count for name, count in trained.items() if not has_adapter or "modules_to_save" in name)
    return {"trainable_parameters": total, "adapter_parameters": total - head, "head_parameters": head}


def describe_adapter(model: nn.Module) -> dict:
    """The record's `adapter`: its configuration, the type of its parameters, and how many there are."""
    configs = getattr(model, "peft_config", None)
    dtype = next(p.dtype for p in model.parameters() if p.requires_grad)
    return {
        "config": configs["default"].to_dict() if configs else None,
        "dtype": str(dtype).removeprefix("torch."),
        **count_parameters(model),
    }


def count_unquantized(model: PreTrainedModel) -> int:
    """How many parameters the model has before it is quantized: FP8's scales do not count."""
    scales = (m.weight_scale.numel() for m in model.modules() if isinstance(m, Fp8Linear))
    return model.num_parameters() - sum(scales)


def describe_model(name: str, model: PreTrainedModel, total_parameters: int) -> dict:
    """The record's `model`: what `--model` named, which version, what it is, and how large without the adapter."""
    checksum = local_fingerprint(name)
    version = {"sha256": checksum} if checksum else {"revision": getattr(model.config, "_commit_hash", None)}
    kind = {"class": type(model).__name__, "quantization": quantization_of(model.config)}
    return {"id": public_id(name), **version, **kind, "total_parameters": total_parameters}
