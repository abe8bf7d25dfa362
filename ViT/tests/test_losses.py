"""Training is a plain loop: the same losses, step for step, on the same rows in the same order."""

import copy

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from transformers import get_cosine_schedule_with_warmup

from ViT import recipe
from ViT.classifier import add_adapter
from ViT.finetune import Options

SEED, EPOCHS, BATCH, LR = 7, 3, 16, 0.02
NORMALISE = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])


@pytest.fixture
def square(npz, tmp_path):
    """The images of `npz` at the model's own size, so that nothing is resized."""
    arrays = dict(np.load(npz))
    for name in ("x_train", "x_test"):
        arrays[name] = np.pad(arrays[name], ((0, 0), (6, 6), (6, 6), (0, 0)))
    np.savez(tmp_path / "square.npz", **arrays)
    return tmp_path / "square.npz"


def plain_losses(model, npz, optimizer, lr_head):
    """Cross-entropy of each step: rows by a permutation seeded for each epoch."""
    data = np.load(npz)
    images = NORMALISE(torch.from_numpy(data["x_train"]).permute(0, 3, 1, 2))
    labels = torch.from_numpy(data["y_train"])
    head, trained = list(model.head.modules_to_save.parameters()), [p for p in model.parameters() if p.requires_grad]
    parameters = [{"params": list({*trained} - {*head})}, {"params": head, "lr": lr_head}]
    per_epoch = -(-len(labels) // BATCH)
    if optimizer == "sgd":
        updates = torch.optim.SGD(parameters, LR, momentum=0.9)
        schedule = torch.optim.lr_scheduler.StepLR(updates, per_epoch, gamma=0.8)
    else:
        updates = torch.optim.AdamW(parameters, LR, weight_decay=0.1)
        schedule = get_cosine_schedule_with_warmup(updates, 4, EPOCHS * per_epoch)
    losses = []
    for epoch in range(EPOCHS):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED * 100_003 + epoch))
        for rows in order.split(BATCH):
            loss = torch.nn.functional.cross_entropy(model(images[rows]), labels[rows])
            updates.zero_grad()
            loss.backward()
            updates.step()
            schedule.step()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("optimizer", "more"), [("sgd", ("--lr_decay", 0.8)), ("adamw", ("--warmup_steps", 4, "--weight_decay", 0.1))]
)
@pytest.mark.parametrize(("method", "lr_head"), [("control", None), ("control+lora", None), ("control", 0.3)])
def test_the_losses_are_a_plain_loops(train_vit, base_model, square, monkeypatch, optimizer, more, method, lr_head):
    seen = []

    class Watch(recipe.LossWatch):
        def add(self, loss, step):
            seen.append(loss.item())
            super().add(loss, step)

    monkeypatch.setattr(recipe, "LossWatch", Watch)
    train_vit(
        "--method", method, "--data", square, "--optimizer", optimizer, *more, "--augment", "none",
        "--crop", 1, "--seed", SEED, "--epochs", EPOCHS, "--batch_size", BATCH, "--lr", LR,
        *(("--lr_head", lr_head) if lr_head else ()),
    ).finished()  # fmt: skip
    shape = {"num_classes": 3, "image_size": 32, "mlp_layers": 2, "attention": "sdpa"}
    vit = copy.deepcopy(recipe.frozen_model(str(base_model), "test_vit", **shape)[0])
    torch.manual_seed(SEED)
    recipe.new_head(vit)
    model = add_adapter(vit, Options(method=method))
    torch.testing.assert_close(seen, plain_losses(model.train(), square, optimizer, lr_head or LR), rtol=1e-4, atol=1e-5)
