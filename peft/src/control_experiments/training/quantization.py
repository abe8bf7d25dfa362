"""Frozen base models in 4 or 8 bits, with any method on top: through bitsandbytes (QLoRA, arXiv 2305.14314), or in FP8
through `peft_control.fp8`.

Only the linear layers inside the transformer blocks are quantized. Embeddings, norms and the head stay as they are
loaded: float32 in encoders, the run's type in decoders, whose RMSNorms compute in float32 inside whatever type their
weight has. Adapters are float32.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from peft_control import fp8

from ..errors import UserError

#: Heads, which are new or small, by the names that transformers gives them.
_NOT_QUANTIZED = ("classifier", "pre_classifier", "score", "pooler", "lm_head")


def loading_arguments(quantization: str, device: torch.device, compute_dtype: torch.dtype) -> dict:
    """What `from_pretrained` needs beside the model's name to load it quantized onto `device`.

    4-bit weights are multiplied in `compute_dtype`, the run's precision. Raises UserError: a GPU has no FP8.
    """
    if quantization == "none":
        return {}
    if quantization == "fp8":
        check_fp8(device, instead="nf4 or int8")
        return {"quantization_config": fp8.Fp8Config(), "device_map": {"": device}}
    settings = {"llm_int8_skip_modules": list(_NOT_QUANTIZED), "load_in_8bit": quantization == "int8"}
    if quantization != "int8":
        settings |= {"load_in_4bit": True, "bnb_4bit_quant_type": quantization}
        settings |= {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": compute_dtype}
    config = BitsAndBytesConfig(**settings)
    return {"quantization_config": config, "device_map": {"": device}}


def check_fp8(device: torch.device, instead: str) -> None:
    """Raise UserError for a GPU without FP8; on a CPU it is emulated."""
    if device.type == "cuda" and not fp8.has_fp8(device):
        raise UserError(
            f"{torch.cuda.get_device_name(device)} has no FP8 (NVIDIA's have from compute capability 8.9 on): "
            f"choose --quantization {instead}"
        )


def check_not_quantized(quantization: str, config: PretrainedConfig, model: str) -> None:
    """Raise UserError when a model that is stored quantized is to be quantized again."""
    if quantization != "none" and (stored := quantization_of(config)) != "none":
        instead = "choose --quantization none to train it as it is, or give the model that it was made from"
        raise UserError(f"{model} is quantized already ({stored}): {instead}")


def quantization_of(config: PretrainedConfig) -> str:
    """How a model's weights are stored, by its configuration: one of `QUANTIZATIONS` or another method's name."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return "none"
    fields = found if isinstance(found, dict) else found.to_dict()
    if fields.get("load_in_4bit"):
        return fields.get("bnb_4bit_quant_type", "fp4")
    if fields.get("load_in_8bit"):
        return "int8"
    method = str(fields.get("quant_method", "unknown"))
    return "fp8" if method == fp8.METHOD else method


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """Make a quantized model fit for training; returns the model, and does nothing to one that is not quantized.

    Unlike peft's `prepare_model_for_kbit_training` it neither casts the embeddings and the language model's head to
    float32 (4 GB for LLaMA-3-8B) nor turns gradient checkpointing on.
    """
    # each 8-bit layer says at every step that it casts its input
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for linear in quantized_linears(model):
        linear.register_forward_pre_hook(_follow_autocast)
        # On CPUs with AVX512-BF16 bitsandbytes repacks 4-bit weights in place, with rounded scales, at the first
        # evaluation; a training step after that gets no gradient through the layer (bitsandbytes 0.50).
        linear.support_avx512bf16_for_cpu = False
    return model


def quantized_linears(model: nn.Module) -> list[nn.Linear]:
    """The layers that bitsandbytes has quantized."""
    return [module for module in model.modules() if type(module).__module__.startswith("bitsandbytes.")]


def _follow_autocast(linear: nn.Linear, inputs: tuple) -> tuple:
    """A forward pre-hook: bitsandbytes' layers return their input's type even under autocast. After a float32 norm
    that would keep every activation between two layers in float32, twice what a plain linear layer keeps."""
    (x,) = inputs
    if not torch.is_autocast_enabled(x.device.type):
        return inputs
    return (x.to(torch.get_autocast_dtype(x.device.type)),)


_follow_autocast.keeps_formula = True  # memory modes need not make way for it


def check_paging(optimizer: str, device: torch.device) -> None:
    """Raise UserError when a paged optimizer of bitsandbytes is asked for where it cannot page, or is not installed."""
    if not optimizer.startswith("paged"):
        return
    if device.type != "cuda":
        raise UserError(f"--optimizer {optimizer} needs a GPU (bitsandbytes cannot page on a {device.type}): choose adamw")
    if find_spec("bitsandbytes") is None:
        raise UserError(f"--optimizer {optimizer} needs bitsandbytes: pip install bitsandbytes, or choose adamw")
