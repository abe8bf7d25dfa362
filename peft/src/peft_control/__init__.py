"""Parallel Control: state-based fine-tuning as a Hugging Face peft method.

Importing this package registers the method with an unmodified upstream ``peft``, so that
``get_peft_model``, ``PeftModel.from_pretrained`` and everything built on them accept :class:`ControlConfig`.

Source: Zhang, Ren, Cheng and Li, "From Weight-Based to State-Based Fine-Tuning: Further Memory Reduction on
LoRA with Parallel Control", ICML 2025.
"""

import sys

from .command_line import answer

if sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)] == __name__:  # python -m peft_control
    answer(sys.argv[1:])  # help and what is wrong need not wait for torch

from .architectures import ARCHITECTURES, Architecture, Block
from .config import ControlConfig
from .control_layer import ControlLayer
from .fp8 import Fp8Config, Fp8Linear, quantize_fp8
from .fp8_experts import Fp8Experts
from .model import ControlModel
from .registration import register

register()

__all__ = [
    "ARCHITECTURES", "Architecture", "Block", "ControlConfig", "ControlLayer", "ControlModel", "Fp8Config", "Fp8Experts",
    "Fp8Linear", "quantize_fp8",
]  # fmt: skip
__version__ = "0.1.0"
