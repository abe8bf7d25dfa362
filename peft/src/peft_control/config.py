"""The configuration of a control adapter."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from typing import Any, Literal, Optional, Union

from peft import LoraConfig
from peft.utils import PeftType

from .architectures import INITS, Architecture
from .model_card import write_card


@dataclass
class ControlConfig(LoraConfig):
    """Parallel Control, alone or mixed with LoRA/DoRA, as one adapter.

    A control adds ``control_alpha * B(A(state))`` to the output state of each chosen block, in parallel to the
    whole frozen block (paper, section 4). With ``target_modules`` the same adapter also holds LoRA or, with
    ``use_dora=True``, DoRA on those linear layers; all of `LoraConfig`'s fields keep their meaning for that
    part, and without ``target_modules`` there is no such part. ``layers_pattern`` names the lists of layers that the
    adapter is put into, such as "language_model.layers" in a model of several parts; it also stands without
    ``layers_to_transform``.

    Raises:
        ValueError: a field has no meaning (rank 0, no block, unknown initialisation, ...).
    """

    control_blocks: Optional[Union[list[str], str]] = field(
        default_factory=lambda: ["mlp"],
        metadata={"help": "Blocks that get a control: 'mlp', 'attention' or both ('double control')."},
    )
    control_rank: int = field(default=16, metadata={"help": "Rank r of the control B·A."})
    control_alpha: float = field(
        default=1.0, metadata={"help": "Plain multiplier of the control; it is not divided by the rank."}
    )
    control_dropout: float = field(default=0.0, metadata={"help": "Dropout between A and B."})
    control_bias: bool = field(default=False, metadata={"help": "Whether A and B have biases."})
    control_init: Optional[Literal["kaiming", "normal"]] = field(
        default=None,
        metadata={
            "help": "Initialisation of A: 'kaiming' (uniform, a=√5) or 'normal' (the model's initializer_range); "
            "None takes the architecture's own. B and the biases start at zero."
        },
    )
    control_rank_pattern: dict = field(
        default_factory=dict, metadata={"help": "Other ranks by block name or regular expression, e.g. {'layers.0.mlp': 8}."}
    )
    control_alpha_pattern: dict = field(
        default_factory=dict, metadata={"help": "Other alphas, matched as in control_rank_pattern."}
    )
    control_architecture: Optional[dict] = field(
        default=None,
        metadata={
            "help": "A row for a model that peft_control.architectures lacks, e.g. {'layer': 'MyLayer', "
            "'norm': 'norm1', 'blocks': {'mlp': {'read': 'norm2', 'write': 'mlp'}}}."
        },
    )
    init_weights: bool = field(
        default=True, metadata={"help": "False draws B like A, so that the adapter is no identity at first (for tests)."}
    )

    def __post_init__(self):
        pattern = self.layers_pattern
        if self.layers_to_transform is None:
            self.layers_pattern = None  # upstream asks for both
        super().__post_init__()
        self.layers_pattern = pattern
        for one in [pattern] if isinstance(pattern, str) else pattern or ():
            _compile("layers_pattern", one)
        self.peft_type = PeftType["CONTROL"]
        if isinstance(self.control_blocks, str):
            self.control_blocks = [self.control_blocks]
        if not self.control_blocks:
            raise ValueError("control_blocks is empty: name at least one block, e.g. ['mlp']")
        if not isinstance(self.control_blocks, (list, tuple, set)) or not all(
            isinstance(block, str) and block for block in self.control_blocks
        ):
            raise ValueError(f"control_blocks must be a list of block names, got {self.control_blocks!r}")
        self.control_blocks = list(dict.fromkeys(self.control_blocks))
        for name, rank in self._values("control_rank"):
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {rank!r}")
        for name, alpha in self._values("control_alpha"):
            if not _is_number(alpha) or not abs(alpha) <= sys.float_info.max:  # so large are integers that no float holds
                raise ValueError(f"{name} must be a finite number, got {alpha!r}")
        if not _is_number(self.control_dropout) or not 0.0 <= self.control_dropout < 1.0:
            raise ValueError(f"control_dropout must lie in [0, 1), got {self.control_dropout!r}")
        if self.control_init not in (None, *INITS):
            raise ValueError(f"control_init must be 'kaiming', 'normal' or None, got {self.control_init!r}")
        if self.layer_replication:
            raise ValueError("layer_replication makes new layers, which a control cannot follow: replicate them first")
        if self.control_architecture is not None:
            Architecture.from_dict(self.control_architecture)

    def save_pretrained(self, save_directory, **kwargs):
        """Write adapter_config.json as upstream does, and the adapter's card beside it."""
        super().save_pretrained(save_directory, **kwargs)
        write_card(save_directory, self)

    def _values(self, name: str) -> list[tuple[str, Any]]:
        """The field ``name`` and every entry of its pattern, each with the words an error names it by."""
        pattern = getattr(self, f"{name}_pattern")
        if not isinstance(pattern, dict):
            raise ValueError(f"{name}_pattern must be a dict of block names to values, got {pattern!r}")
        for key in pattern:
            _compile(f"{name}_pattern", key)
        return [(name, getattr(self, name)), *((f"{name}_pattern[{k!r}]", v) for k, v in pattern.items())]


def _compile(field_name: str, expression) -> None:
    try:
        re.compile(expression)
    except (re.error, TypeError) as error:
        raise ValueError(f"{field_name}: {expression!r} is no regular expression: {error}") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
