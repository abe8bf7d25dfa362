"""The demonstration's base model: a tiny ViT (0.2 M parameters) trained in seconds on the digits 0 to 4."""

from __future__ import annotations

import hashlib

import torch
from timm.models import VisionTransformer
from torch.nn.functional import cross_entropy

from ViT import augment
from ViT.finetune import TINY
from ViT.images import load_digits_data
from ViT.vision_models import Base, create

SEED, STEPS, BATCH, LEARNING_RATE = 0, 300, 32, 2e-3


def build_tiny(*, num_classes: int, image_size: int) -> tuple[VisionTransformer, Base]:
    """A tiny ViT with a new head whose body can tell scikit-learn's digits 0 to 4 apart.

    The tuning task is 5 to 9, which the body has never seen, or any other data. The body is the same in every run on one
    machine and at one image size; training it leaves the global generator as it was.
    """
    data = load_digits_data(0, 4).train
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        body = create(TINY, num_classes=5, image_size=image_size)
        views = augment.central_views(augment.sizes_of(data.images), image_size, crop=1.0)
        inputs = augment.normalise(augment.render(data.images, views, image_size, "cpu"))
        optimizer = torch.optim.AdamW(body.parameters(), LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS)
        for _ in range(STEPS):
            chosen = torch.randint(len(data), (BATCH,))
            cross_entropy(body(inputs[chosen]), data.labels[chosen]).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model = create(TINY, num_classes=num_classes, image_size=image_size)
    state = {name: value for name, value in body.state_dict().items() if not name.startswith("head.")}
    model.load_state_dict(state, strict=False)
    digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in state.values())).hexdigest()
    return model, Base(TINY, TINY, digest)
