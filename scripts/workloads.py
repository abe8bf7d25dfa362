"""What the benchmarks train: models of known shapes with random weights, and every method of bench_memory.py on them.

The adapters, memory modes, quantized layers and packed batches are those of the training scripts. A new peer is a name in
`NAMES` and its branch in `adapt`, a new way to store the frozen weights a name in `BASES` and its branch in `random_base`.
"""

from __future__ import annotations

import gc
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from peft import MissConfig, ShadowConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    RobertaConfig,
)

from control_experiments.errors import UserError
from control_experiments.training.device import DTYPES
from control_experiments.training.methods import adapter_config, set_memory
from control_experiments.training.options import QUANTIZATIONS, AdapterOptions, check_method_runs
from control_experiments.training.quantization import loading_arguments, prepare
from LlaMA.commonsense import TokenRow
from LlaMA.finetune import LORA_TARGETS, MIXED_TARGETS
from LlaMA.models import SHAPES, ready_to_train
from LlaMA.packing import IGNORE, VARLEN, batch_loss, fused_batch_loss, packed_step, varlen_available
from peft_control import quantize_fp8

LLAMA_SHAPES = {
    **SHAPES,
    "smollm2-135m": SHAPES["smollm2"],
    "llama3-70b": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
                       num_key_value_heads=8, vocab_size=128256),
}  # fmt: skip
#: Mixtures of experts, of class Qwen3Moe.
MOE_SHAPES = {
    "qwen3-30b-a3b": dict(hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=48,
                          num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
                          norm_topk_prob=True, vocab_size=151936),
    "tiny-moe": dict(hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=2,
                     num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
                     norm_topk_prob=True, vocab_size=2048),
}  # fmt: skip
CAUSAL_SHAPES = {**LLAMA_SHAPES, **MOE_SHAPES}
ENCODER_SHAPES = {
    "roberta-base": dict(vocab_size=50265, max_position_embeddings=514),
    "tiny-roberta": dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4),
}  # fmt: skip
#: timm's name, and the layers of each MLP: four as in the paper, or two.
VISION_SHAPES = {
    "vit-b16": ("vit_base_patch16_224", 4),
    "vit-b16-plain": ("vit_base_patch16_224", 2),
    "tiny-vit": ("test_vit", 4),
}
ALL_SHAPES = (*CAUSAL_SHAPES, *VISION_SHAPES, *ENCODER_SHAPES)
BASES = (*DTYPES, *QUANTIZATIONS[1:])
CLASSES = 100  # of the ViT's images


# -- methods ----------------------------------------------------------------------------------------------------

NAMES = ("lora", "lora-all", "lora-qkv", "lora-experts", "lora-fa", "dora", "miss", "shadow", "control", "control+lora", "control+dora")  # fmt: skip
SWITCHES = (
    "liger", "unsloth", "checkpointing", "compile", "graphs", "uncast", "eager", "packed", "streamed", "streamed3", "onboard",
    "fp8states",
)  # fmt: skip
MODES = ("plain", "fast", "balanced", "lean")
#: Switches and names that need a LLaMA shape.
OF_LLAMA = ("liger", "unsloth", "compile", "packed", "lora-qkv", "shadow")


@dataclass(frozen=True)
class Method:
    """A method as the benchmarks name it, ``NAME[+SWITCH...][+BASE][:MODE]``; `base` is None for the shape's own type."""

    text: str
    name: str
    switches: frozenset[str]
    base: str | None
    mode: str

    @property
    def resident(self) -> int:
        """How many layers' weights lie on the GPU while the others wait on the host; 0: all, and none waits."""
        return 2 if "streamed" in self.switches else 3 if "streamed3" in self.switches else 0

    def over(self, base: str) -> str:
        """The same over a base, unless it names one."""
        head, colon, mode = self.text.partition(":")
        return self.text if self.base else f"{head}+{base}{colon}{mode}"

    def check(self, shape: str, device: str) -> None:
        """Raise a `UserError` if a shape or a device cannot run it."""
        if shape not in LLAMA_SHAPES and ({*self.switches, self.name} & {*OF_LLAMA}):
            raise UserError(
                f"method {self.text!r}: {shape} has no switches but checkpointing, graphs and eager, and no method "
                "that reads causal tokens"
            )
        if self.name == "lora-experts" and shape not in MOE_SHAPES:
            raise UserError(f"method {self.text!r}: {shape} has no experts")
        if shape in MOE_SHAPES and self.base in QUANTIZATIONS and self.base != "fp8":
            raise UserError(f"method {self.text!r}: bitsandbytes leaves experts, 3-D tensors, in 16 bits: take fp8")
        if self.name == "lora-experts" and self.base == "fp8":
            raise UserError(f"method {self.text!r}: experts in FP8 take no LoRA on their weights")
        if shape in VISION_SHAPES and self.base in QUANTIZATIONS and self.base != "fp8":
            raise UserError(f"method {self.text!r}: bitsandbytes' bases are for text models")
        if "graphs" in self.switches and device == "cpu":
            raise UserError(f"method {self.text!r}: CUDA graphs need a GPU")
        check_method_runs(self.name, self.base or "none", device)


def parse_method(text: str) -> Method:
    """``"control+lora+nf4:fast"`` -> name ``control+lora``, base ``nf4``, mode ``fast``.

    Raises:
        UserError: it is no method, or a mode or switch is not the method's.
    """
    head, _, mode = text.partition(":")
    parts = head.split("+")
    switches = frozenset(part for part in parts if part in SWITCHES)
    bases = [part for part in parts if part in BASES]
    name = "+".join(part for part in parts if part not in (*SWITCHES, *BASES))
    if name not in NAMES or len(bases) > 1:
        raise UserError(f"unknown method {text!r}: see --help")
    if mode not in ("", *MODES) or (mode not in ("", "plain") and "control" not in name):
        raise UserError(f"method {text!r}: no such memory mode")
    plain_lora = name in ("lora", "lora-all") and switches <= {"unsloth", "checkpointing"} and {*bases} <= {"bf16", "nf4"}
    if "unsloth" in switches and not plain_lora:
        told = "unsloth is for lora and lora-all over bf16 or nf4, with checkpointing or without"
        raise UserError(f"method {text!r}: {told}")
    if {"streamed", "streamed3"} & switches and (
        {"graphs", "unsloth"} & switches or mode == "fast" or "int8" in bases or name == "shadow"
    ):
        raise UserError(f"method {text!r}: weights are not streamed with graphs, unsloth, shadow, int8 or mode fast")
    if "fp8states" in switches and mode != "lean":
        raise UserError(f"method {text!r}: fp8states is for mode lean")
    if {"packed", "graphs"} <= switches:
        raise UserError(f"method {text!r}: packed rows are not measured as CUDA graphs")
    return Method(text, name, switches, bases[0] if bases else None, mode or "plain")


@dataclass(frozen=True)
class Recipe:
    """The paper's adapters for a family of shapes.

    Attributes:
        control, lora: what "control" and LoRA stand for, with their ranks.
        targets: the linear layers of LoRA's variants; "mixed" are those beside a control.
        base, precision: type of the frozen weights and of autocast; on a CPU bf16 stands for fp16.
    """

    task: str | None
    control: tuple[str, int]
    lora: tuple[int, float]
    targets: dict[str, Sequence[str]]
    base: str = "fp32"
    precision: str = "fp16"
    head: list[str] | None = None


VIT_MLP = ("fc1", "fc2", "eye1", "eye2")  # a plain MLP has the first two
RECIPES = {
    "llama": Recipe(
        "CAUSAL_LM", ("double control", 64), (32, 64),
        {"lora": LORA_TARGETS, "mixed": MIXED_TARGETS, "lora-qkv": MIXED_TARGETS,
         "lora-all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")},
        base="bf16", precision="bf16",
    ),
    "moe": Recipe(  # not the paper's: attention's linear layers, as people adapt mixtures of experts
        "CAUSAL_LM", ("double control", 64), (16, 32),
        dict.fromkeys(("lora", "lora-all", "lora-experts"), ("q_proj", "k_proj", "v_proj", "o_proj"))
        | {"mixed": MIXED_TARGETS},
        base="bf16", precision="bf16",
    ),
    "encoder": Recipe(
        "SEQ_CLS", ("control", 16), (8, 16),
        {"lora": ("query", "value"), "mixed": ("query", "value"), "lora-all": ("query", "key", "value", "dense")},
    ),
    "vit": Recipe(
        None, ("control", 16), (1, 1),
        {"lora": VIT_MLP, "mixed": ("qkv",), "lora-all": (*VIT_MLP, "qkv", "proj")}, head=["head"],
    ),
}  # fmt: skip


def recipe_of(shape: str) -> Recipe:
    kinds = {"llama": LLAMA_SHAPES, "moe": MOE_SHAPES, "vit": VISION_SHAPES, "encoder": ENCODER_SHAPES}
    return next(RECIPES[kind] for kind, shapes in kinds.items() if shape in shapes)


def default_methods(shape: str, device: str, unsloth: bool) -> list[str]:
    """The methods that a shape's benchmark runs when none are named."""
    if shape in MOE_SHAPES:
        loras = ["lora+checkpointing", "lora+uncast+checkpointing", "lora-experts+checkpointing"]
        return [*loras, "control+checkpointing:plain", "control:lean"]
    methods = [
        "dora", "lora", "lora-all", "lora-fa", "lora+uncast", "lora+compile", "lora+liger", "lora+checkpointing",
        "lora+liger+checkpointing", "lora+graphs", "miss", "shadow", "control:plain", "control+liger:plain", "control:fast",
        "control:balanced", "control:lean", "control+graphs:fast", "control+graphs:balanced", "control+graphs:lean",
        "control+lora:plain", "control+lora:fast", "control+lora:balanced", "control+lora:lean",
    ]  # fmt: skip
    more = [f"{name}+unsloth{more}" for more in ("", "+checkpointing") for name in ("lora", "lora-all")]
    methods += more if unsloth else []
    left_out = {"graphs"} if device == "cpu" else set()
    if shape not in LLAMA_SHAPES:
        left_out |= {*OF_LLAMA, "uncast"}
    return [method for method in methods if not left_out & {*re.split("[+:]", method)}]


# -- models -----------------------------------------------------------------------------------------------------


def random_llama(
    shape: str, device: str | torch.device, dtype: torch.dtype = torch.bfloat16, attention: str = "sdpa", **more
) -> PreTrainedModel:
    """A LLaMA or mixture of experts of random weights, made on the device, which may be "meta"; `more` changes its
    configuration. Experts run in transformers' own choice of kernels (grouped matmuls where the device has them)."""
    kind = Qwen3MoeConfig if shape in MOE_SHAPES else LlamaConfig
    config = kind(**{**CAUSAL_SHAPES[shape], "max_position_embeddings": 1 << 20, "use_cache": False, **more})
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


def random_llama_in_parts(
    shape: str, device: str, dtype: torch.dtype, attention: str, store: Callable[[nn.Module], None], place: str
) -> PreTrainedModel:
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
    own = DTYPES[recipe_of(shape).base]
    stored = DTYPES.get(method.base, own)
    attention = "eager" if "eager" in method.switches else "sdpa"
    quantized = method.base in QUANTIZATIONS
    settings = loading_arguments(method.base, torch.device(device), compute) if quantized else {}

    def store(model: nn.Module) -> None:
        if method.base == "fp8":
            quantize_fp8(model)
        elif quantized:
            quantize(model, method.base, settings["quantization_config"], torch.device(device))

    if shape in VISION_SHAPES:
        from ViT.vision_models import create, set_attention, set_mlp_layers

        name, layers = VISION_SHAPES[shape]
        with torch.device(device):
            model = create(name, num_classes=CLASSES, image_size=vision_size(shape)[0])
            set_mlp_layers(model, layers)
        set_attention(model, attention)
        model = model.to(stored)
        return quantize_fp8(model) if quantized else model
    if "packed" in method.switches and varlen_available(torch.device(device), compute):
        attention = VARLEN
    if shape in CAUSAL_SHAPES:
        if method.resident:
            model = random_llama_in_parts(shape, device, stored, attention, store, "cpu")
        elif method.base == "fp8":
            model = random_llama_in_parts(shape, device, stored, attention, store, device)
        else:
            model = random_llama(shape, device, stored, attention)
    else:
        config = RobertaConfig(**ENCODER_SHAPES[shape], type_vocab_size=1)
        with torch.device(device):
            model = AutoModelForSequenceClassification.from_config(config, dtype=stored, attn_implementation=attention)
    store(model)
    if quantized:
        model.config.quantization_config = settings["quantization_config"]
    return prepare(model)


def vision_size(shape: str) -> tuple[int, int]:
    """Pixels of an image's side, and how many tokens a ViT makes of it: its patches and the class token."""
    import timm

    with torch.device("meta"):
        model = timm.create_model(VISION_SHAPES[shape][0])
    return model.patch_embed.img_size[0], model.pos_embed.shape[1]


def quantize(model: PreTrainedModel, kind: str, settings, device: torch.device) -> None:
    """Let bitsandbytes quantize the linear layers of every transformer layer, as `from_pretrained` would a stored model's."""
    import bitsandbytes as bnb

    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for parent in {inner for stack in stacks for layer in stack for inner in layer.modules()}:
        for name, linear in list(parent.named_children()):
            if type(linear) is not nn.Linear:
                continue
            sizes = (linear.in_features, linear.out_features, linear.bias is not None)
            if kind == "int8":
                new = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=settings.llm_int8_threshold, device="meta")
                new.weight = bnb.nn.Int8Params(linear.weight.data.cpu(), requires_grad=False).to(device)
            else:
                new = bnb.nn.Linear4bit(
                    *sizes,
                    compute_dtype=settings.bnb_4bit_compute_dtype,
                    compress_statistics=True,
                    quant_type=kind,
                    device="meta",
                )
                new.weight = bnb.nn.Params4bit(
                    linear.weight.data, requires_grad=False, quant_type=kind, compress_statistics=True, module=new
                ).to(device)  # fmt: skip
            new.bias = linear.bias
            setattr(parent, name, new)
    model.is_loaded_in_4bit = kind != "int8"  # for num_parameters: two weights lie in one byte


def adapt(model: nn.Module, shape: str, method: Method, control_rank: int | None = None, lora_rank: int | None = None) -> nn.Module:  # fmt: skip
    """The model with the method's adapter, float32, in its memory mode; ranks of None are the recipe's.

    lora-fa is LoRA whose A stays as it is drawn (arXiv 2308.03303), with the same AdamW as the others: peft's own optimizer
    for it, a loop over the layers, would be slower. miss has twice LoRA's rank, which is as many parameters in a square
    layer; shadow is as peft configures it.

    Raises:
        UserError: the memory mode does not support the model or method, or a rank cannot be.
    """
    recipe, name = recipe_of(shape), method.name
    rank = lora_rank or recipe.lora[0]
    targets = list(recipe.targets.get(name) or recipe.targets["mixed" if "control" in name else "lora"])
    head, task = recipe.head, recipe.task
    if name == "miss":
        config = MissConfig(task_type=task, r=2 * rank, target_modules=targets, modules_to_save=head)
    elif name == "shadow":
        config = ShadowConfig(task_type=task)
    else:
        known = "lora" if name.startswith("lora-") else recipe.control[0] if name == "control" else name
        ranks = {"control_rank": control_rank or recipe.control[1], "lora_rank": rank}
        options = AdapterOptions(method=known, **ranks, lora_alpha=rank * recipe.lora[1] / recipe.lora[0])
        bias = shape in VISION_SHAPES
        config = adapter_config(options, task_type=task, targets=targets, bias=bias, modules_to_save=head)
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


@dataclass
class Setting:
    """How large a step is.

    Attributes:
        tokens: of a row, padding included.
        lengths: real tokens of the rows, in turn; None: `tokens`.
        precision: of autocast; None: the recipe's.
    """

    shape: str
    device: str
    batch: int
    tokens: int
    lengths: Sequence[int] | None = None
    precision: str | None = None
    control_rank: int | None = None
    lora_rank: int | None = None

    @property
    def autocast(self) -> torch.dtype:
        """float16 comes with a loss scaler, float32 means none."""
        dtype = DTYPES[self.precision or recipe_of(self.shape).precision]
        return torch.bfloat16 if dtype == torch.float16 and self.device == "cpu" else dtype

    @property
    def rows(self) -> list[int]:
        """Real tokens of each row."""
        lengths = self.lengths or [self.tokens]
        return [lengths[row % len(lengths)] for row in range(self.batch)]


@dataclass
class Workload:
    """A model ready to train and one step's loss on fixed data."""

    setting: Setting
    model: nn.Module
    loss: Callable[[], torch.Tensor]
    trained: list[nn.Parameter] = field(init=False)

    def __post_init__(self):
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        cuda = self.setting.device == "cuda"
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=cuda)
        scaled = self.setting.autocast == torch.float16
        self.scaler = torch.amp.GradScaler(self.setting.device, enabled=scaled)

    def step(self) -> torch.Tensor:
        """One optimizer step as the Trainer takes it with bf16 or fp16; returns the loss."""
        dtype = self.setting.autocast
        with torch.autocast(self.setting.device, dtype, enabled=dtype != torch.float32):
            loss = self.loss()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss.detach()


def build(setting: Setting, method: Method, loaded: Callable[[], None] = lambda: None, longest: int | None = None) -> Workload:
    """The method at work; `loaded` is called once the frozen model lies on the device.

    Args:
        longest: the most tokens of a row, which unsloth wants to know, if other rows than the setting's come later.

    Raises:
        UserError: the shape has no such memory mode or quantization.
    """
    torch.manual_seed(0)
    if "liger" in method.switches:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    if "unsloth" in method.switches:
        model = unsloth_llama(setting, method, longest or setting.tokens)
        loaded()
    else:
        base = random_base(setting.shape, method, setting.device, setting.autocast)
        gc.collect()
        if setting.device == "cuda":  # what making the weights took for a moment is no part of training
            torch.cuda.empty_cache()
        loaded()
        model = adapt(base, setting.shape, method, setting.control_rank, setting.lora_rank)
        if method.resident:
            model.to(setting.device)
    if "compile" in method.switches:
        model = torch.compile(model)
    return Workload(setting, model, step_loss(setting, method, model))


def step_loss(setting: Setting, method: Method, model: nn.Module) -> Callable[[], torch.Tensor]:
    """The loss of one batch of random data."""
    device = setting.device
    generator = torch.Generator(device).manual_seed(1)
    if setting.shape in VISION_SHAPES:
        size = vision_size(setting.shape)[0]
        images = torch.randn(setting.batch, 3, size, size, generator=generator, device=device)
        labels = torch.arange(setting.batch, device=device) % CLASSES
        return lambda: nn.functional.cross_entropy(model(images), labels)
    vocabulary = {**CAUSAL_SHAPES, **ENCODER_SHAPES}[setting.shape]["vocab_size"]
    ids = torch.randint(3, vocabulary, (setting.batch, setting.tokens), generator=generator, device=device)
    if "packed" in method.switches:
        rows = [TokenRow(row[:length].tolist(), 1, cut=False) for row, length in zip(ids, setting.rows)]
        (batch,) = (pack.to(device) for pack in packed_step(rows, len(rows), sum(setting.rows)))
        loss = batch_loss if method.mode == "plain" else fused_batch_loss
        return lambda: loss(model, batch)
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
    recipe = RECIPES["llama"]
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
    count = LLAMA_SHAPES[shape]["vocab_size"] - len(special)
    words = [*special.values(), *(f"w{number}" for number in range(count))]
    tokenizer = Tokenizer(WordLevel(dict(zip(words, range(len(words)))), unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    ids = dict(bos_token_id=1, eos_token_id=2, pad_token_id=3)
    random_llama(shape, device, max_position_embeddings=tokens, use_cache=True, **ids).save_pretrained(folder)
