"""A frozen ViT with an adapter and a head: made for training, saved, and loaded again.

The adapter folder holds what peft saves (adapter and head; for "probe" `head.safetensors`) and `classifier.json`,
which says what base model to rebuild around it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from peft import MissConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models import VisionTransformer
from torch import nn

from control_experiments.errors import UserError
from control_experiments.record import read_json, write_json_atomic
from control_experiments.training.checkpoints import check_adapter_files
from control_experiments.training.methods import adapter_config, load_adapter
from peft_control import quantize_fp8
from ViT.finetune import TINY, RecipeOptions
from ViT.vision_models import Base, create, load, load_weights, set_attention, set_mlp_layers

HEAD = "head"
#: alpha/r of LoRA and DoRA at ranks that match the control's parameters: the published recipe's.
MATCHED_SCALE = 2.0
#: How far MiSS's parameters may be from the control's.
MATCHED_WITHIN = 0.05


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
    quantization: str = "none"

    def check(self) -> None:
        """Raises TypeError: a value read from a file is none that `save` writes."""
        words = [self.method, self.model, self.architecture, self.sha256 or "", self.quantization]
        words += self.classes if isinstance(self.classes, list) else [None]
        sized = type(self.image_size) is int and 0 < self.image_size < 1e6
        cropped = type(self.crop) in (int, float) and 0 < self.crop <= 1
        if not (sized and cropped and self.mlp_layers in (2, 4) and all(isinstance(word, str) for word in words)):
            raise TypeError("classifier.json is not as it was written")


def add_adapter(model: VisionTransformer, options: RecipeOptions) -> nn.Module:
    """Freeze the model and give it the method's adapter; the adapter and the head are what trains.

    `--lora_rank 0` matches every method to the parameters of a control on the MLPs at `--control_rank`: see
    `matched`. Raises UserError: the architecture has no such blocks or layers.
    """
    if options.method == "probe":
        model.requires_grad_(False)
        model.get_submodule(HEAD).requires_grad_(True)
        return model
    config = configuration(options) if options.lora_rank else matched(options, model)
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"{options.method} on {type(model).__name__}: {error}") from error


def target_layers(options: RecipeOptions) -> list[str]:
    """Names of the linear layers that LoRA, DoRA or MiSS adapts: `--lora_targets`, where "all" stands for all of a block's.

    None takes the MLP's, as the published runs did, and beside a control on the MLP the fused query, key and value.
    """
    mlp = ["fc1", "fc2"] if options.mlp_layers == 2 else ["fc1", "fc2", "eye1", "eye2"]
    targets = options.lora_targets or (["qkv"] if options.method.startswith("control+") else mlp)
    if targets == ["all"]:
        targets = ["qkv", "proj", *mlp]
    # the patch embedding has a proj too
    return ["attn.proj" if name == "proj" else name for name in targets]


def configuration(options: RecipeOptions) -> PeftConfig:
    """The peft configuration of a method at the ranks of the options; controls have biases, as published."""
    options = replace(options, lora_targets=target_layers(options))
    return adapter_config(options, task_type=None, bias=True, modules_to_save=[HEAD])


def matched(options: RecipeOptions, model: VisionTransformer) -> PeftConfig:
    """The configuration that trains as many parameters as a control on the MLPs at `--control_rank`.

    Control beside both blocks, or beside the MLP with LoRA or DoRA, takes half of the rank; LoRA and DoRA take
    what then remains of the budget. All their layers get one rank, and the first ones one more as long as the
    budget lasts; each keeps alpha/r = 2. MiSS takes peft's form "mini", a trained r x mini_r matrix for each layer
    that is repeated along the outputs: as seldom as parameters within 5 % of the budget allow. Raises UserError:
    the budget does not suffice.
    """

    def control_cost(rank: int) -> int:
        return len(model.blocks) * (2 * model.embed_dim * rank + model.embed_dim + rank)

    method, budget = options.method, control_cost(options.control_rank)
    options = replace(options, lora_rank=1)
    if "control" in method and method != "control":
        options = replace(options, control_rank=max(1, options.control_rank // 2))
        budget -= control_cost(options.control_rank)
    config = configuration(options)
    if method in ("control", "double control"):
        return config
    endings = tuple(f".{name}" for name in target_layers(options))
    linears = {name: module for name, module in model.named_modules() if name.endswith(endings)}
    if method == "miss":
        return matched_miss(config, list(linears.values()), budget)
    budget -= config.use_dora * sum(linear.out_features for linear in linears.values())  # DoRA's magnitudes
    cost = {name: linear.in_features + linear.out_features for name, linear in linears.items()}
    rank, budget = divmod(budget, max(1, sum(cost.values())))
    if rank < 1:
        raise UserError(f"the control has too few parameters for {method}: choose a larger --control_rank")
    ranks = dict.fromkeys(linears, rank)
    for name in linears:
        if cost[name] <= budget:
            budget -= cost[name]
            ranks[name] += 1
    config.r, config.lora_alpha = rank, MATCHED_SCALE * rank
    config.rank_pattern = {name: r for name, r in ranks.items() if r != rank}
    config.alpha_pattern = {name: MATCHED_SCALE * r for name, r in config.rank_pattern.items()}
    return config


def matched_miss(config: MissConfig, linears: list[nn.Linear], budget: int) -> MissConfig:
    """MiSS of these layers at so many parameters: see `matched`."""
    if not linears:
        return config  # peft says that there is no such layer
    cost, largest = budget / len(linears), min(linear.in_features for linear in linears)
    outputs = math.gcd(*(linear.out_features for linear in linears))
    for columns in (count for count in range(outputs, 0, -1) if outputs % count == 0):
        rank = round(cost / columns)
        if 1 <= rank <= largest and abs(rank * columns / cost - 1) <= MATCHED_WITHIN:
            config.r, config.mini_r, config.init_weights = rank, columns, "mini"
            return config
    raise UserError("no rank of miss has the control's parameters: choose another --control_rank, or --lora_rank above 0")


def save(model: nn.Module, folder: Path, description: Description, base: VisionTransformer) -> None:
    """Fill the adapter folder; the tiny `base` model, which exists nowhere else, is kept beside it."""
    if isinstance(model, PeftModel):
        model.save_pretrained(folder)
    else:
        save_file(model.get_submodule(HEAD).state_dict(), folder / "head.safetensors")
    if description.model == TINY:
        # the head is the adapter's, and the identities of a deeper MLP are made anew
        weights = {n: v for n, v in base.state_dict().items() if not n.startswith("head.") and ".eye" not in n}
        save_file(weights, folder / "base.safetensors")
    write_json_atomic(folder / "classifier.json", asdict(description))


def read_description(folder: str | Path) -> Description:
    """Raises UserError: no adapter of finetune.py is there."""
    try:
        description = Description(**read_json(Path(folder).expanduser() / "classifier.json"))
        description.check()
    except (UserError, TypeError) as error:
        raise UserError(f"{folder} is no adapter folder of ViT/finetune.py ({error})") from error
    return description


def restore(folder: str | Path, *, attention: str = "sdpa", model: str | None = None) -> tuple[nn.Module, Description, Base]:
    """The trained classifier in `folder`; `model` says where its base model is now, if it moved. Raises
    UserError: broken adapter, missing base model, or another base model than it was trained on."""
    folder, description = Path(folder).expanduser(), read_description(folder)
    model, shape = model or description.model, {"num_classes": len(description.classes), "image_size": description.image_size}
    if (folder / "base.safetensors").is_file():
        if model != description.model:
            raise UserError(f"{model} is not the base model that {folder} was trained on, which lies there: leave --model out")
        vit, base = create(description.architecture, **shape), Base(TINY, description.architecture, description.sha256)
        load_weights(vit, folder / "base.safetensors", description.architecture)
    else:
        vit, base = load(model, description.architecture, **shape)
    if base.sha256 != description.sha256:
        raise UserError(f"{model} is not the base model that {folder} was trained on (checksums differ)")
    set_mlp_layers(vit, description.mlp_layers)
    set_attention(vit, attention)
    if description.quantization == "fp8":
        quantize_fp8(vit)
    if description.method != "probe":
        check_adapter_files(folder)
        return load_adapter(vit, folder, base.id), description, base
    try:
        vit.get_submodule(HEAD).load_state_dict(load_file(folder / "head.safetensors"))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} is no readable adapter ({error})") from error
    return vit, description, base
