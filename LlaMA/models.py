"""Loading causal language models: hub ids, folders and GGUF files."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path

import tokenizers
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    modeling_gguf_pytorch_utils,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from control_experiments.errors import UserError
from control_experiments.training.methods import loading, set_memory
from control_experiments.training.quantization import check_not_quantized, loading_arguments, prepare
from LlaMA.commonsense import Row
from LlaMA.prompts import prompt

# transformers shows a bar while it takes a GGUF file apart, whatever the switch of its other bars says
modeling_gguf_pytorch_utils.tqdm = partial(tqdm, disable=True)

#: Tokens that models of the LLaMA family reserve and never use.
_PAD_CANDIDATES = ("<|finetune_right_pad_id|>", "<|reserved_special_token_0|>", "<pad>", "[PAD]", "<|pad|>")


def _source(model: str) -> tuple[str, dict]:
    """Where from_pretrained finds a model, a folder from anywhere, and its further arguments. Raises UserError: a path that does
    not exist."""
    path = Path(model)
    if path.suffix == ".gguf" and path.is_file():
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        return str(path.resolve()), {}
    if path.is_absolute() or path.suffix == ".gguf" or model.startswith((".", "~")) or model.count("/") > 1:
        raise UserError(f"there is no model at {model}")
    return model, {}


@lru_cache(maxsize=1)  # of a GGUF file that takes seconds, which the runs of a study need not wait for each time
def load_tokenizer(model: str) -> Tokenizer:
    """The base model's tokenizer, the same object each time. Raises UserError: the model is no causal language model, or has no tokenizer,
    or one that cannot tell where its tokens stand in the text."""
    name, extra = _source(model)
    if not extra:
        with loading(model):
            config = AutoConfig.from_pretrained(name)
        # encoders such as BERT can be asked to be decoders, which says nothing about how they were trained
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "is_decoder", True) is False:
            kind = f"a {config.model_type} model, no causal language model"
            raise UserError(f"{model} is {kind}: give one such as LLaMA, Mistral or Qwen")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **extra)
    except (OSError, ValueError, LookupError, AttributeError, TypeError, ImportError, struct.error) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"no tokenizer can be loaded from {model!r}, whose folder must hold its files: {reason}") from error
    if not getattr(tokenizer, "is_fast", False) or len(tokenizer) == 0:
        raise UserError(f"{model!r} has no fast tokenizer (tokenizer.json): add one to its folder")
    return tokenizer


def train_tokenizer(rows: Sequence[Row], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer made from the data's own prompts, for models of random weights: rows get about as many tokens
    as a LLaMA tokenizer gives them."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    texts = [prompt(row.instruction, row.input) + row.output for row in rows[:4000]]
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    how = {"special_tokens": list(special.values()), "initial_alphabet": tokenizers.pre_tokenizers.ByteLevel.alphabet()}
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocabulary, show_progress=False, **how)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def load_model(
    model: str,
    dtype: torch.dtype,
    device: torch.device,
    attention: str = "sdpa",
    quantization: str = "none",
    on_host: bool = False,
) -> PreTrainedModel:
    """The base model in evaluation mode, its linear layers quantized if asked for; `on_host`: in the host's memory, to be
    given to `device` in parts. Raises UserError: there is no such model, it is no causal language model, or it cannot be
    quantized."""
    name, extra = _source(model)
    if quantization != "none" and "gguf_file" in extra:
        raise UserError(
            f"{model} is a GGUF file, which cannot be quantized on loading: make a folder of it first "
            f"(python -m LlaMA.convert --model {model} --output_dir FOLDER)"
        )
    quantized = loading_arguments(quantization, device, dtype)
    place = {"device_map": {"": torch.device("cpu") if on_host else device}}
    with loading(model):
        if quantization != "none":
            check_not_quantized(quantization, AutoConfig.from_pretrained(name), model)
        how = {"attn_implementation": attention, **quantized, **place, **extra}
        base = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **how)
    if "gguf_file" in extra:
        # its weights arrive dequantized, yet the model is called quantized still, and the Trainer would refuse to train it
        for owner, kept in ((base, "hf_quantizer"), (base, "quantization_method"), (base.config, "quantization_config")):
            if hasattr(owner, kept):
                delattr(owner, kept)
        base.is_quantized = False
    base.config._name_or_path = base.name_or_path = model if extra else name  # what the adapter notes as its base
    return prepare(base).eval()


def choose_pad_token(tokenizer: Tokenizer, embeddings: int) -> None:
    """Give the tokenizer a pad token that no text holds.

    Kept: a pad token of its own, when it is neither the unknown token nor plain text (LLaMA's recipes padded with id
    0, which is `<unk>` in LLaMA-2 and "!" in LLaMA-3). Else a reserved token, else a new one if the model's
    `embeddings` have a row to spare, else the end-of-sequence token, which is safe because every batch has a mask.
    """
    own, vocabulary = tokenizer.pad_token, tokenizer.get_vocab()
    if own not in (None, tokenizer.unk_token, tokenizer.eos_token, "!"):
        return
    reserved = next((token for token in _PAD_CANDIDATES if token in vocabulary), None)
    if reserved is not None:
        tokenizer.pad_token = reserved
    elif embeddings > len(tokenizer):
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    else:
        tokenizer.pad_token = tokenizer.eos_token


def add_adapter(base: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """The base with a new adapter, whose parameters are float32. Raises UserError: the architecture has no such
    blocks or target modules."""
    for target in config.target_modules or ():
        if not any(f".{name}".endswith(f".{target}") for name, _ in base.named_modules()):
            raise UserError(f"{type(base).__name__} has no module {target!r} for LoRA")
    try:
        model = get_peft_model(base, config)
    except ValueError as error:
        raise UserError(f"{type(base).__name__}: {error}") from error
    for parameter in model.parameters():  # peft leaves SHADOW's own backbone in the base's type
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def ready_to_train(model: PeftModel, memory: str, *, half: bool, stream_to: torch.device | None = None, **how) -> None:
    """Set the memory mode (`how` is `set_memory`'s), `stream` the weights if a device is given for that, and spare LoRA the
    float32 copies of its inputs that autocast makes needless.

    DoRA keeps its float32 inputs: it computes its weights' norms in their type. Raises UserError: the memory
    mode does not support this model or method.
    """
    for module in model.modules():
        if half and isinstance(module, LoraLayer) and not any(module.use_dora.values()):
            module.cast_input_dtype_enabled = False
    if stream_to is None:
        set_memory(model, memory, **how)
    else:
        stream(model, memory, stream_to, **how)


def stream(model: nn.Module, memory: str, device: torch.device, **how) -> None:
    """Have the frozen weights of the layers of a model on the host wait there, and put the rest on `device`; `how` is
    `set_memory`'s. Raises UserError: the host has no room, or something does not go together with it."""
    set_memory(model, memory, stream_weights=True, **how)
    nn.Module.to(model, device)  # transformers' own refuses quantized models
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    base.hf_device_map = {"": device}  # where it computes, for the Trainer
