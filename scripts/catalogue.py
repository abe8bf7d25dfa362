"""What the benchmarks know by name: shapes, methods and the paper's recipes. Without torch, for help and what is refused.

A new peer is a name in `NAMES` and its branch in `workloads.adapt`, a new way to store the frozen weights a name in `BASES`
and its branch in `workloads.random_base`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Optional, get_args

from transformers.hf_argparser import HfArg

from control_experiments.errors import UserError
from control_experiments.training.options import QUANTIZATIONS, Precision, check_method_runs
from LlaMA.finetune import LORA_TARGETS, MIXED_TARGETS


def _llama(width: int, inner: int, layers: int, heads: int, shared_heads: int, words: int, **more) -> dict:
    return {
        "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": shared_heads, "vocab_size": words, **more,
    }  # fmt: skip


LLAMA_SHAPES = {
    "smollm2": _llama(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True),
    "llama2-7b": _llama(4096, 11008, 32, 32, 32, 32000),
    "llama3-8b": _llama(4096, 14336, 32, 32, 8, 128256),
    "tiny": _llama(64, 128, 2, 4, 2, 2048),
    "llama3-70b": _llama(8192, 28672, 80, 64, 8, 128256),
}
#: Mixtures of experts, of class Qwen3Moe.
MOE_SHAPES = {
    "qwen3-30b-a3b": _llama(2048, 6144, 48, 32, 4, 151936, head_dim=128, moe_intermediate_size=768, num_experts=128,
                            num_experts_per_tok=8, norm_topk_prob=True),
    "tiny-moe": _llama(64, 128, 2, 4, 2, 2048, head_dim=16, moe_intermediate_size=32, num_experts=4,
                       num_experts_per_tok=2, norm_topk_prob=True),
}  # fmt: skip
CAUSAL_SHAPES = {**LLAMA_SHAPES, **MOE_SHAPES}
ENCODER_SHAPES = {
    "roberta-base": dict(vocab_size=50265, max_position_embeddings=514),
    "tiny-roberta": dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4),
}  # fmt: skip


class Vision(NamedTuple):
    """timm's name, the layers of each MLP (four as in the paper, or two), pixels of a side, tokens with the class token."""

    name: str
    layers: int
    pixels: int
    tokens: int


VISION_SHAPES = {
    "vit-b16": Vision("vit_base_patch16_224", 4, 224, 197),
    "vit-b16-plain": Vision("vit_base_patch16_224", 2, 224, 197),
    "tiny-vit": Vision("test_vit", 4, 160, 101),
}
ALL_SHAPES = (*CAUSAL_SHAPES, *VISION_SHAPES, *ENCODER_SHAPES)
PRECISIONS: tuple[str, ...] = get_args(Precision)[1:]  # without "auto"
BASES = (*PRECISIONS, *QUANTIZATIONS[1:])
LONGEST = 1 << 20  # tokens: where searches for the longest sequence end


# -- methods ----------------------------------------------------------------------------------------------------

NAMES = ("lora", "lora-all", "lora-qkv", "lora-experts", "lora-fa", "dora", "miss", "shadow", "control", "control+lora", "control+dora")  # fmt: skip
SWITCHES = (
    "liger", "unsloth", "checkpointing", "compile", "graphs", "uncast", "eager", "streamed", "streamed3", "onboard",
    "fp8states", "fp8head",
)  # fmt: skip
MODES = ("plain", "fast", "balanced", "lean")
#: Switches and names that need a LLaMA shape.
OF_LLAMA = ("liger", "unsloth", "compile", "fp8head", "lora-qkv", "shadow")


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
        by_bitsandbytes = self.base in QUANTIZATIONS and self.base != "fp8"
        self.refuse({
            f"{shape} has no switches but checkpointing, graphs and eager, and no method that reads causal tokens":
                shape not in LLAMA_SHAPES and {*self.switches, self.name} & {*OF_LLAMA},
            f"{shape} has no experts": self.name == "lora-experts" and shape not in MOE_SHAPES,
            "bitsandbytes leaves experts, 3-D tensors, in 16 bits: take fp8": shape in MOE_SHAPES and by_bitsandbytes,
            "experts in FP8 take no LoRA on their weights": self.name == "lora-experts" and self.base == "fp8",
            "bitsandbytes' bases are for text models": shape in VISION_SHAPES and by_bitsandbytes,
            "fp8head is for base fp8": "fp8head" in self.switches and self.base != "fp8",
            f"{shape}'s output layer is its embedding, which FP8 leaves as it is":
                "fp8head" in self.switches and "tie_word_embeddings" in LLAMA_SHAPES.get(shape, {}),
            "CUDA graphs need a GPU": "graphs" in self.switches and device == "cpu",
        })  # fmt: skip
        check_method_runs(self.name, self.base or "none", device)

    def refuse(self, reasons: dict[str, object]) -> None:
        """Raise a `UserError` with the first reason that holds."""
        for reason, holds in reasons.items():
            if holds:
                raise UserError(f"method {self.text!r}: {reason}")


def parse_method(text: str) -> Method:
    """``"control+lora+nf4:fast"`` -> name ``control+lora``, base ``nf4``, mode ``fast``. Raises UserError: it is no
    method, or a mode or switch is not the method's."""
    head, _, mode = text.partition(":")
    parts = head.split("+")
    switches = frozenset(part for part in parts if part in SWITCHES)
    bases = [part for part in parts if part in BASES]
    name = "+".join(part for part in parts if part not in (*SWITCHES, *BASES))
    if name not in NAMES or len(bases) > 1:
        raise UserError(f"unknown method {text!r}: see --help")
    method = Method(text, name, switches, bases[0] if bases else None, mode or "plain")
    plain_lora = name in ("lora", "lora-all") and switches <= {"unsloth", "checkpointing"} and {*bases} <= {"bf16", "nf4"}
    unstreamed = {"graphs", "unsloth"} & switches or mode == "fast" or "int8" in bases or name == "shadow"
    method.refuse({
        "no such memory mode": mode not in ("", *MODES) or (mode not in ("", "plain") and "control" not in name),
        "unsloth is for lora and lora-all over bf16 or nf4, with checkpointing or without":
            "unsloth" in switches and not plain_lora,
        "weights are not streamed with graphs, unsloth, shadow, int8 or mode fast": method.resident and unstreamed,
        "fp8states is for mode lean": "fp8states" in switches and mode != "lean",
    })  # fmt: skip
    return method


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


@dataclass
class Setting:
    """How large a step is, and where it runs: as options, which `bench_memory.Options` completes."""

    shape: str = HfArg(default="llama3-8b", help="Model shape.", metadata={"choices": ALL_SHAPES})
    device: str = HfArg(default="cuda", help="cuda, a GPU's index, or cpu to try the script out.")
    batch: int = HfArg(default=4, help="Sequences per step.")
    tokens: Optional[int] = HfArg(
        default=None, help="Tokens per sequence; default: 1024 for a decoder, 128 for a RoBERTa. A ViT has as many as it has."
    )
    lengths: Optional[list[int]] = HfArg(default=None, help="Real tokens of the rows, in turn; the rest is padding.")
    precision: Optional[str] = HfArg(
        default=None, help="Autocast; default: bf16 for a decoder, else fp16 on a GPU.", metadata={"choices": PRECISIONS}
    )
    control_rank: Optional[int] = HfArg(default=None, help="Rank of the control; default: the recipe's.")
    lora_rank: Optional[int] = HfArg(default=None, help="Rank of LoRA and its kin; default: the recipe's.")

    @property
    def autocast(self) -> str:
        """fp16 comes with a loss scaler, fp32 means none."""
        precision = self.precision or recipe_of(self.shape).precision
        return "bf16" if precision == "fp16" and self.device == "cpu" else precision

    @property
    def rows(self) -> list[int]:
        """Real tokens of each row."""
        lengths = self.lengths or [self.tokens]
        return [lengths[row % len(lengths)] for row in range(self.batch)]
