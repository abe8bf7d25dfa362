"""A part of the training images in the place of the test images: for choosing hyperparameters."""

from __future__ import annotations

from dataclasses import replace

import torch

from control_experiments.errors import UserError
from ViT.images import Decoded, ImageData

#: Not a run's own seed: runs that are compared must hold out the same images.
SEED = 0


def hold_out(data: ImageData, share: float) -> ImageData:
    """The data with `share` of each class's training images, at least one and not all, in the place of its test
    images. Raises UserError: the training images are decoded on demand, or no class has two of them."""
    train = data.train
    if not isinstance(train, Decoded):
        needed = (
            "training images that are decoded once: leave out --keep files, or take data that fit in memory"
        )
        raise UserError(f"--validation_share needs {needed}")
    generator = torch.Generator().manual_seed(SEED)
    held = torch.zeros(len(train), dtype=torch.bool)
    for label in train.labels.unique():
        members = (train.labels == label).nonzero().flatten()
        count = min(max(1, round(share * len(members))), len(members) - 1)
        held[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    if not held.any():
        raise UserError(f"{data.name} has one training image for each class: there is none to hold out")
    split = f"{share:g} of the training images of each class, drawn with seed {SEED}, in the place of the test images"
    return replace(
        data, train=_part(train, ~held), test=_part(train, held), identity={**data.identity, "split": split}
    )


def _part(decoded: Decoded, chosen: torch.Tensor) -> Decoded:
    ((images, labels),) = decoded.batches([chosen.nonzero().flatten()])
    return Decoded(images, labels)
