"""A frozen ViT with an adapter and a head: made for training, saved, and loaded again.

The adapter folder holds what peft saves (adapter and head; for "probe" `head.safetensors`) and `classifier.json`,
which says what base model to rebuild around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models import VisionTransformer
from torch import nn

import peft_control  # noqa: F401  makes peft know the method when it loads an adapter
from control_experiments.errors import UserError
from control_experiments.record import read_json, write_json_atomic
from control_experiments.training.checkpoints import check_adapter_files
from control_experiments.training.methods import ControlSettings, adapter_config, load_adapter
from control_experiments.training.options import AdapterOptions
from ViT.vision_models import Base, create, load, load_weights, mlp_linears, set_attention, set_mlp_layers

METHODS = ("control", "lora", "dora", "probe")
HEAD = "head"


@dataclass
class Description:
    """What `classifier.json` says: the base model, the classes, and how images are shown to it.

    `model` is what `--model` was; `sha256` its file's checksum, or None for a hub model.
    """

    method: str
    model: str
    architecture: str
    sha256: str | None
    image_size: int
    mlp_layers: int
    crop: float
    classes: list[str]

    def check(self) -> None:
        """Raises TypeError: a value read from a file is none that `save` writes."""
        words = [self.method, self.model, self.architecture, *([] if self.sha256 is None else [self.sha256])]
        words += self.classes if isinstance(self.classes, list) else [None]
        numbers = [self.image_size, self.mlp_layers, self.crop]
        if not all(isinstance(word, str) for word in words) or not all(
            type(number) in (int, float) and 0 < number < 1e6 for number in numbers
        ):
            raise TypeError("classifier.json is not as it was written")


@dataclass
class AdapterSettings:
    """Ranks and scales of the adapter; see the options of finetune.py."""

    control: ControlSettings = field(default_factory=lambda: ControlSettings(bias=True))
    lora_rank: int = 1
    lora_alpha: float = 2.0
    lora_dropout: float = 0.0


def add_adapter(
    model: VisionTransformer, method: str, settings: AdapterSettings, mlp_layers: int = 2
) -> nn.Module:
    """Freeze the model and give it the method's adapter; the adapter and the head are what trains.

    `lora_rank` 0 means ranks that give LoRA or DoRA as many parameters as the control has, at the scale alpha/r = 2
    of the published recipe.

    Raises:
        UserError: the architecture has no such blocks or layers.
    """
    if method == "probe":
        model.requires_grad_(False)
        model.get_submodule(HEAD).requires_grad_(True)
        return model
    targets = mlp_linears(mlp_layers)
    control = settings.control
    options = AdapterOptions(
        method=method, control_rank=control.rank, control_alpha=control.alpha, lora_rank=settings.lora_rank or 1,
        lora_alpha=settings.lora_alpha, lora_dropout=settings.lora_dropout,
    )  # fmt: skip
    config = adapter_config(
        options, task_type=None, targets=targets, bias=control.bias, modules_to_save=[HEAD]
    )
    if method != "control" and settings.lora_rank == 0:
        match_ranks(config, model, settings.control, targets)
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"{method} on {type(model).__name__}: {error}") from error


def match_ranks(
    config: PeftConfig,
    model: VisionTransformer,
    control: ControlSettings,
    targets: Sequence[str],
    scale: float = 2.0,
) -> None:
    """Set ranks in a LoRA configuration so that it trains as many parameters as the control, or just fewer.

    All target layers get the same rank, and the first ones one more as long as the budget lasts: a rank of a
    linear layer costs inputs + outputs, and DoRA's magnitudes cost the outputs. Every layer keeps alpha/r = scale.

    Raises:
        UserError: the budget does not suffice for rank 1.
    """
    width = model.embed_dim
    budget = len(model.blocks) * (2 * width * control.rank + (width + control.rank) * control.bias)
    linears = {
        f"blocks.{index}.mlp.{name}": getattr(block.mlp, name)
        for index, block in enumerate(model.blocks)
        for name in targets
    }
    if config.use_dora:
        budget -= sum(linear.out_features for linear in linears.values())
    cost = {name: linear.in_features + linear.out_features for name, linear in linears.items()}
    rank, budget = divmod(budget, sum(cost.values()))
    if rank < 1:
        raise UserError(
            "the control has too few parameters for LoRA of rank 1: choose a larger --control_rank"
        )
    ranks = dict.fromkeys(linears, rank)
    for name in linears:
        if cost[name] <= budget:
            budget -= cost[name]
            ranks[name] += 1
    config.r, config.lora_alpha = rank, scale * rank
    config.rank_pattern = {name: r for name, r in ranks.items() if r != rank}
    config.alpha_pattern = {name: scale * r for name, r in config.rank_pattern.items()}


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Trained parameters: all, the adapter's and the head's."""
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    head = sum(count for name, count in trained.items() if HEAD in name.split("."))
    total = sum(trained.values())
    return {"trainable_parameters": total, "adapter_parameters": total - head, "head_parameters": head}


def build_base(
    model: str,
    architecture: str | None,
    *,
    num_classes: int,
    image_size: int,
    mlp_layers: int,
    attention: str,
) -> tuple[VisionTransformer, Base]:
    """The base model with a new head, its MLP layers and its kind of attention."""
    vit, base = load(model, architecture, num_classes=num_classes, image_size=image_size)
    set_mlp_layers(vit, mlp_layers)
    set_attention(vit, attention)
    return vit, base


def save(model: nn.Module, folder: Path, description: Description, base_weights: dict | None = None) -> None:
    """Write the adapter folder; `base_weights` are kept beside it when the base model exists nowhere else."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        model.save_pretrained(folder)
    else:
        save_file(model.get_submodule(HEAD).state_dict(), folder / "head.safetensors")
    if base_weights is not None:
        save_file(base_weights, folder / "base.safetensors")
    write_json_atomic(folder / "classifier.json", asdict(description))


def read_description(folder: str | Path) -> Description:
    """Raises UserError: no adapter of finetune.py is there."""
    try:
        description = Description(**read_json(Path(folder).expanduser() / "classifier.json"))
        description.check()
    except (UserError, TypeError) as error:
        raise UserError(f"{folder} is no adapter folder of ViT/finetune.py ({error})") from error
    return description


def restore(
    folder: str | Path, *, attention: str, model: str | None = None
) -> tuple[nn.Module, Description, Base]:
    """The trained classifier in `folder`; `model` says where its base model is now, if it moved.

    Raises:
        UserError: broken adapter, missing base model, or another base model than it was trained on.
    """
    folder, description = Path(folder).expanduser(), read_description(folder)
    shape = {"num_classes": len(description.classes), "image_size": description.image_size}
    if (folder / "base.safetensors").is_file():
        vit = create(description.architecture, **shape)
        load_weights(vit, folder / "base.safetensors", description.architecture)
        base = Base(description.model, description.architecture, description.sha256)
    else:
        vit, base = load(model or description.model, description.architecture, **shape)
    if base.sha256 != description.sha256:
        raise UserError(
            f"{model or description.model} is not the base model that {folder} was trained on (checksums differ)"
        )
    set_mlp_layers(vit, description.mlp_layers)
    set_attention(vit, attention)
    if description.method != "probe":
        check_adapter_files(folder)
        return load_adapter(vit, folder, base.id), description, base
    try:
        vit.get_submodule(HEAD).load_state_dict(load_file(folder / "head.safetensors"))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} is no readable adapter ({error})") from error
    return vit, description, base


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every trained parameter by its name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
