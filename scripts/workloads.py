"""What the benchmarks train: models of known shapes with random weights, and every method of bench_memory.py on them.

The adapters, memory modes and quantized layers are those of the training scripts.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable

import torch
from peft import ShadowConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, Qwen3MoeConfig, RobertaConfig

from control_experiments.training.device import DTYPES
from control_experiments.training.methods import adapter_config, set_memory
from control_experiments.training.options import QUANTIZATIONS, AdapterOptions
from control_experiments.training.quantization import loading_arguments, prepare
from LlaMA.models import ready_to_train
from LlaMA.packing import IGNORE
from peft_control import quantize_fp8
from scripts.catalogue import CAUSAL_SHAPES, ENCODER_SHAPES, MOE_SHAPES, VISION_SHAPES, Method, Setting, recipe_of

CLASSES = 100  # of the ViT's images

# -- models -----------------------------------------------------------------------------------------------------


def random_llama(
    shape: str, device: str | torch.device, dtype: torch.dtype = torch.bfloat16, attention: str = "sdpa", **more
) -> nn.Module:
    """A LLaMA or mixture of experts of random weights, made on the device, which may be "meta"; `more` changes its
    configuration. Experts run in transformers' own choice of kernels (grouped matmuls where the device has them)."""
    kind = Qwen3MoeConfig if shape in MOE_SHAPES else LlamaConfig
    config = kind(**{**CAUSAL_SHAPES[shape], "max_position_embeddings": 1 << 20, "use_cache": False, **more})
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


def random_llama_in_parts(
    shape: str, device: str, dtype: torch.dtype, attention: str, store: Callable[[nn.Module], None], place: str
) -> nn.Module:
    """The same, of which one layer at a time is made in `dtype`, given to `store` and put on the device `place`."""
    model = random_llama(shape, device, dtype, attention, num_hidden_layers=0)
    model.config.num_hidden_layers = CAUSAL_SHAPES[shape]["num_hidden_layers"]
    for index in range(model.config.num_hidden_layers):
        short = random_llama(shape, device, dtype, attention, num_hidden_layers=1, vocab_size=1)
        store(short)
        (layer,) = short.model.layers.to(place)
        layer.self_attn.layer_idx = index
        for module in layer.modules():
            if hasattr(module, "config"):
                module.config = model.config
        model.model.layers.append(layer)
    return model


def random_base(shape: str, method: Method, device: str, compute: torch.dtype) -> nn.Module:
    """A model of the shape with random weights, stored as the method says; 4-bit layers compute in `compute`."""
    stored = DTYPES.get(method.base, DTYPES[recipe_of(shape).base])
    attention = "eager" if "eager" in method.switches else "sdpa"
    quantized = method.base in QUANTIZATIONS
    settings = loading_arguments(method.base, torch.device(device), compute) if quantized else {}

    def store(model: nn.Module) -> None:
        if method.base == "fp8":
            quantize_fp8(model, output_layer="fp8head" in method.switches)
        elif quantized:
            quantize(model, method.base, settings["quantization_config"], torch.device(device))

    if shape in VISION_SHAPES:
        from ViT.vision_models import create, set_attention, set_mlp_layers

        vision = VISION_SHAPES[shape]
        with torch.device(device):
            model = create(vision.name, num_classes=CLASSES, image_size=vision.pixels)
            set_mlp_layers(model, vision.layers)
        set_attention(model, attention)
        model = model.to(stored)
        return quantize_fp8(model) if quantized else model
    if shape in CAUSAL_SHAPES:
        model = random_llama_in_parts(shape, device, stored, attention, store, "cpu" if method.resident else device)
    else:
        config = RobertaConfig(**ENCODER_SHAPES[shape], type_vocab_size=1)
        with torch.device(device):
            model = AutoModelForSequenceClassification.from_config(config, dtype=stored, attn_implementation=attention)
    store(model)
    if quantized:
        model.config.quantization_config = settings["quantization_config"]
    return prepare(model)


def quantize(model: nn.Module, kind: str, settings, device: torch.device) -> None:
    """Let bitsandbytes quantize the linear layers of every transformer layer, as `from_pretrained` would a stored model's."""
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    for stack in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        plain = {name: module for name, module in stack.named_modules() if type(module) is nn.Linear}
        if plain:
            replace_with_bnb_linear(stack, quantization_config=settings)  # without weights
        for name, linear in plain.items():
            new = stack.get_submodule(name)
            weight = linear.weight.data.cpu() if kind == "int8" else linear.weight.data
            new.weight = type(new.weight)(weight, requires_grad=False, **vars(new.weight)).to(device)
            new.bias = linear.bias
    model.is_loaded_in_4bit = kind != "int8"  # for num_parameters: two weights lie in one byte


def adapt(model: nn.Module, shape: str, method: Method, control_rank: int | None = None, lora_rank: int | None = None) -> nn.Module:  # fmt: skip
    """The model with the method's adapter, float32, in its memory mode; ranks of None are the recipe's.

    lora-fa is LoRA whose A stays as it is drawn (arXiv 2308.03303), with the same AdamW as the others: peft's own optimizer
    for it, a loop over the layers, would be slower. miss has twice LoRA's rank, which is as many parameters in a square
    layer; shadow is as peft configures it. Raises UserError: the memory mode does not support the model or method, or a
    rank cannot be.
    """
    recipe, name = recipe_of(shape), method.name
    rank = lora_rank or recipe.lora[0]
    targets = list(recipe.targets.get(name) or recipe.targets["mixed" if "control" in name else "lora"])
    known = "lora" if name.startswith("lora-") else recipe.control[0] if name == "control" else name
    ranks = {
        "control_rank": control_rank or recipe.control[1],
        "lora_rank": {"miss": 2 * rank, "shadow": ShadowConfig().r}.get(name, rank),
    }
    options = AdapterOptions(method=known, **ranks, lora_alpha=rank * recipe.lora[1] / recipe.lora[0])
    how = {"task_type": recipe.task, "targets": targets, "bias": shape in VISION_SHAPES, "modules_to_save": recipe.head}
    config = adapter_config(options, **how)
    if name == "lora-experts":
        config.target_parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = get_peft_model(model, config)
    for place, parameter in model.named_parameters():
        if "lora_A" in place and name == "lora-fa":
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # heads and SHADOW's layers too
    if "checkpointing" in method.switches:
        if shape in VISION_SHAPES:
            model.get_base_model().set_grad_checkpointing()
        else:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if "uncast" in method.switches:
        ready_to_train(model, "plain", half=True)
    offload = "never" if "onboard" in method.switches else "fp8" if "fp8states" in method.switches else "auto"
    set_memory(model, method.mode, cuda_graphs="graphs" in method.switches, offload=offload, stream_weights=method.resident)
    return model.train()


# -- a model at work --------------------------------------------------------------------------------------------


class Workload:
    """A model ready to train and one step's loss on fixed data."""

    def __init__(self, setting: Setting, model: nn.Module, loss: Callable[[], torch.Tensor]):
        self.setting, self.model, self.loss = setting, model, loss
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=setting.device == "cuda")
        self.scaler = torch.amp.GradScaler(setting.device, enabled=setting.autocast == "fp16")

    def step(self) -> torch.Tensor:
        """One optimizer step as the Trainer takes it with bf16 or fp16; returns the loss."""
        dtype = DTYPES[self.setting.autocast]
        with torch.autocast(self.setting.device, dtype, enabled=dtype != torch.float32):
            loss = self.loss()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss.detach()


def build(setting: Setting, method: Method, loaded: Callable[[], None] = lambda: None, longest: int | None = None) -> Workload:
    """The method at work; `loaded` is called once the frozen model lies on the device. `longest` are the most tokens of a row,
    which unsloth wants to know, if other rows than the setting's come later. Raises UserError: the shape has no such memory
    mode or quantization."""
    torch.manual_seed(0)
    if "liger" in method.switches:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    if "unsloth" in method.switches:
        model = unsloth_llama(setting, method, longest or setting.tokens)
        loaded()
    else:
        base = random_base(setting.shape, method, setting.device, DTYPES[setting.autocast])
        gc.collect()
        if setting.device == "cuda":  # what making the weights took for a moment is no part of training
            torch.cuda.empty_cache()
        loaded()
        model = adapt(base, setting.shape, method, setting.control_rank, setting.lora_rank)
        if method.resident:
            model.to(setting.device)
    if "compile" in method.switches:
        model = torch.compile(model)
    return Workload(setting, model, step_loss(setting, model))


def step_loss(setting: Setting, model: nn.Module) -> Callable[[], torch.Tensor]:
    """The loss of one batch of random data."""
    device = setting.device
    generator = torch.Generator(device).manual_seed(1)
    if setting.shape in VISION_SHAPES:
        size = VISION_SHAPES[setting.shape].pixels
        images = torch.randn(setting.batch, 3, size, size, generator=generator, device=device)
        labels = torch.arange(setting.batch, device=device) % CLASSES
        return lambda: nn.functional.cross_entropy(model(images), labels)
    vocabulary = {**CAUSAL_SHAPES, **ENCODER_SHAPES}[setting.shape]["vocab_size"]
    ids = torch.randint(3, vocabulary, (setting.batch, setting.tokens), generator=generator, device=device)
    real = torch.arange(setting.tokens, device=device) < torch.tensor(setting.rows, device=device)[:, None]
    inputs = {"input_ids": ids}
    if setting.lengths or setting.shape in ENCODER_SHAPES:  # a tokenizer's collator always gives a mask
        inputs["attention_mask"] = real.long()
    inputs["labels"] = ids.masked_fill(~real, IGNORE) if setting.shape in CAUSAL_SHAPES else ids[:, 0] % 2
    return lambda: model(**inputs).loss


# -- unsloth ----------------------------------------------------------------------------------------------------


def unsloth_llama(setting: Setting, method: Method, tokens: int) -> nn.Module:
    """A LLaMA with LoRA as unsloth makes and trains it, for sequences of up to so many ``tokens``."""
    from unsloth import FastLanguageModel  # imported before everything else, see bench_memory.py

    with tempfile.TemporaryDirectory() as folder:
        write_llama(setting.shape, setting.device, folder, tokens)
        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=tokens, dtype=torch.bfloat16, load_in_4bit=method.base == "nf4", local_files_only=True
        )
    recipe = recipe_of(setting.shape)
    rank = setting.lora_rank or recipe.lora[0]
    checkpointing = "unsloth" if "checkpointing" in method.switches else False
    lora = {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0, "target_modules": list(recipe.targets[method.name])}
    model = FastLanguageModel.get_peft_model(model, **lora, use_gradient_checkpointing=checkpointing)
    gc.collect()
    return FastLanguageModel.for_training(model)


def write_llama(shape: str, device: str, folder: str, tokens: int) -> None:
    """A LLaMA of random weights, and a tokenizer of as many words, as people have them in a folder."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    special = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    count = CAUSAL_SHAPES[shape]["vocab_size"] - len(special)
    words = [*special.values(), *(f"w{number}" for number in range(count))]
    tokenizer = Tokenizer(WordLevel(dict(zip(words, range(len(words)))), unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    ids = dict(bos_token_id=1, eos_token_id=2, pad_token_id=3)
    random_llama(shape, device, max_position_embeddings=tokens, use_cache=True, **ids).save_pretrained(folder)
