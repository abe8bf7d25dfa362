"""timm Vision Transformers with a new head, from the hub, a file or, for the demonstration, trained on the spot."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import Mlp
from timm.models import VisionTransformer, is_model_in_modules
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn

from control_experiments.errors import UserError
from control_experiments.training.checksums import fingerprint
from ViT.finetune import TINY, check_model


@dataclass
class Base:
    """A frozen model's origin.

    Attributes:
        id: name or file name, for the record.
        architecture: timm name of the architecture, or "tiny".
        sha256: of the weight file; None for a hub model or random weights.
    """

    id: str
    architecture: str
    sha256: str | None = None


def create(architecture: str, *, num_classes: int, image_size: int, pretrained: bool = False) -> VisionTransformer:
    """A timm VisionTransformer, with random weights or those of timm's hub, and a new head. Raises UserError:
    unknown or other kind of architecture, an image size that patches do not fill, no such weights."""
    if architecture == TINY:
        torch.set_num_threads(1)  # its tensors are too small to share, and threads that wait are slow
        # 4 x 4 patches at every size, so that larger images take no longer
        patch = -(-image_size // 4)
        model = VisionTransformer(image_size, patch, num_classes=num_classes, embed_dim=64, depth=4, num_heads=4)
    else:
        bare = architecture.rpartition("/")[2].partition(".")[0]
        if not is_model_in_modules(bare, ("vision_transformer", "deit")):
            raise UserError(f"{architecture} is no timm VisionTransformer, and there is no file of that name")
        try:
            model = timm.create_model(architecture, pretrained=pretrained, num_classes=num_classes, img_size=image_size)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"timm cannot get the weights of {architecture} ({error}): check the name and the network, "
                "or give --model the path of a weight file and --architecture its timm name"
            ) from error
    patch = model.patch_embed.patch_size
    if any(image_size % side for side in patch):
        raise UserError(
            f"image size {image_size} is not divisible by the patch size {patch[0]} of {architecture}: "
            f"choose {image_size // patch[0] * patch[0] or patch[0]} or {(image_size // patch[0] + 1) * patch[0]}"
        )
    new_head(model)
    return model


def new_head(model: VisionTransformer) -> None:
    """Give the model a new head from the global generator."""
    nn.init.trunc_normal_(model.head.weight, std=0.02)
    nn.init.zeros_(model.head.bias)


def load(model: str, architecture: str | None, *, num_classes: int, image_size: int) -> tuple[VisionTransformer, Base]:
    """The model that `--model` names: a timm name, a weight file or a folder with `model.safetensors`.

    Args:
        architecture: timm name, needed for files.

    Raises UserError: nothing there, or weights of another architecture.
    """
    path = Path(model).expanduser()
    check_model(model)
    if not path.exists():
        built = create(model, num_classes=num_classes, image_size=image_size, pretrained=True)
        return built, Base(model, model)
    if architecture is None:
        raise UserError(f"{path}: add --architecture with the timm name of these weights (for example vit_base_patch16_224)")
    if path.is_dir():
        path = path / "model.safetensors"
    built = create(architecture, num_classes=num_classes, image_size=image_size)
    load_weights(built, path, architecture)
    parent = path.resolve().parent.name
    name = f"{parent}/{path.name}" if path.stem in ("model", "base") else path.name
    return built, Base(name, architecture, fingerprint(path))


def load_weights(model: VisionTransformer, path: Path, architecture: str) -> None:
    """Load a `.safetensors` or an original JAX `.npz` file, except its head; position embeddings are resampled.
    Raises UserError: the file is broken, of another format or of another architecture."""
    if path.suffix not in (".safetensors", ".npz"):
        raise UserError(f"{path} is neither .safetensors nor .npz: convert it, for pickles can run code")
    head = {f"head.{name}": value.clone() for name, value in model.head.state_dict().items()}
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:  # timm would pass over layers that the model lacks
                layers = {part for name in file for part in name.split("/") if part.startswith("encoderblock_")}
            if len(layers) != len(model.blocks):
                raise ValueError(f"{len(layers)} layers, not {len(model.blocks)}")
            model.load_pretrained(str(path))
            state = model.state_dict()
        else:
            state = checkpoint_filter_fn(load_file(path), model)
        model.load_state_dict({**{name: value for name, value in state.items() if not name.startswith("head.")}, **head})
    except (SafetensorError, KeyError, ValueError, RuntimeError, AssertionError, OSError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} is broken or holds weights of another architecture than {architecture}: {reason:.250}"
        ) from error


class FourLayerMlp(nn.Module):
    """A frozen MLP with two more linears in it: fc1, GELU, eye1, eye2, fc2 (the published memory table).

    eye1 and eye2 are identities, so the function is the MLP's; they stand for deeper blocks, whose every linear
    LoRA must adapt while a control bridges them all. Shapes: `(..., width)` to `(..., width)`.
    """

    linear_chain = ("fc1", "eye1", "eye2", "fc2")  # what memory modes need to know

    def __init__(self, mlp: Mlp):
        super().__init__()
        self.fc1, self.act, self.drop1, self.norm = mlp.fc1, mlp.act, mlp.drop1, mlp.norm
        self.fc2, self.drop2 = mlp.fc2, mlp.drop2
        hidden, like = mlp.fc2.in_features, {"device": mlp.fc2.weight.device, "dtype": mlp.fc2.weight.dtype}
        self.eye1, self.eye2 = (nn.Linear(hidden, hidden, bias=False, **like) for _ in range(2))
        for linear in (self.eye1, self.eye2):
            nn.init.eye_(linear.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.drop1(self.act(self.fc1(x))))
        return self.drop2(self.fc2(self.eye2(self.eye1(x))))


def set_mlp_layers(model: VisionTransformer, layers: int) -> None:
    """2 leaves the ordinary MLPs, 4 puts a :class:`FourLayerMlp` in the place of each. Raises UserError: blocks whose
    `mlp` is no timm `Mlp`."""
    if layers == 4:
        for block in model.blocks:
            if not isinstance(getattr(block, "mlp", None), Mlp):
                raise UserError("--mlp_layers 4 needs blocks with timm's Mlp, which this model does not have")
            block.mlp = FourLayerMlp(block.mlp)


def set_attention(model: VisionTransformer, attention: str) -> None:
    """ "sdpa" lets attention run fused; "eager" keeps the attention matrix, as the published runs did. Raises
    UserError: a model whose attention has no such switch."""
    for block in model.blocks:
        if not hasattr(getattr(block, "attn", None), "fused_attn"):
            raise UserError("--attention needs timm's Attention in each block, which this model lacks")
        block.attn.fused_attn = attention == "sdpa"
