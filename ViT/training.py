"""Learning rate, training step and evaluation: what a training, an evaluation and the benchmark share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from control_experiments.training.device import DTYPES, to_device
from ViT import augment
from ViT.images import Decoded, OnDemand


def rate_factor(optimizer: str, step: int, *, per_epoch: int, total: int, decay: float, warmup: int) -> float:
    """What the learning rate of optimizer step `step` (from 0) is multiplied with.

    "sgd": `decay` after each epoch of `per_epoch` steps. "adamw": linear warm-up from 0 over `warmup` steps, then a half
    cosine that reaches 0 after `total` steps, as `transformers.get_cosine_schedule_with_warmup`.
    """
    if optimizer == "sgd":
        return decay ** (step // per_epoch)
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


class Step:
    """A training step under autocast, with a loss scaler for fp16; the weights stay float32.

    It comes in two halves, because `update` waits for the device (the scaler must know whether gradients are
    finite): the next batch is prepared between them, while the device is busy with the backward.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None, device: torch.device, precision: str):
        self.model, self.optimizer, self.device, self.precision = model, optimizer, device, precision
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, DTYPES[self.precision], enabled=self.precision != "fp32")

    def backward(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of a batch, detached; its gradients are left in the parameters."""
        with self.autocast():
            loss = cross_entropy(self.model(inputs), labels)
        self.scaler.scale(loss).backward()
        return loss.detach()

    def update(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)


def index_batches(count: int, batch: int, generator: torch.Generator | None = None) -> Sequence[torch.Tensor]:
    """All indices below `count`, shuffled if there is a generator, in batches; the last one may be smaller."""
    order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
    return order.split(batch)


def prepared(
    data: Decoded | OnDemand,
    indices: Sequence[torch.Tensor],
    views: Callable[[torch.Tensor], augment.Views],
    size: int,
    device: torch.device,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Normalised inputs `(B, 3, size, size)` and labels `(B,)` on `device`; `views` chooses crops from sizes."""
    for pixels, labels in data.batches(indices):
        chosen = views(augment.sizes_of(pixels))
        yield augment.normalise(augment.render(pixels, chosen, size, device)), to_device(labels, device)


def train_steps(
    step: Step, batches: Iterator[tuple[torch.Tensor, torch.Tensor]], before_step: Callable[[], None] = lambda: None
) -> Iterator[tuple[torch.Tensor, int]]:
    """Train on batch after batch; yields each one's mean loss, on the device, and its size. `before_step` is called
    before each forward."""
    step.model.train()
    batch = next(batches, None)
    while batch is not None:
        inputs, labels = batch
        before_step()
        loss = step.backward(inputs, labels)
        batch = next(batches, None)
        step.update()
        yield loss, len(labels)


@torch.inference_mode()
def predict(step: Step, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `(N, classes)` float32 and labels `(N,)` of all batches, on the CPU."""
    step.model.eval()
    logits, labels = [], []
    for inputs, target in batches:
        with step.autocast():
            logits.append(step.model(inputs).float())
        labels.append(target)
    return torch.cat(logits).cpu(), torch.cat(labels).cpu()


def score(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Accuracy (in percent) and mean cross-entropy."""
    return {
        "test_accuracy": 100 * (logits.argmax(1) == labels).double().mean().item(),
        "test_loss": cross_entropy(logits, labels).item(),
    }
