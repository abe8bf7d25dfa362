"""Watching a run's losses for NaN and infinity without waiting for the GPU at each step."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..errors import UserError

_ADVICE = "try a lower --lr, or bf16 instead of fp16"


class Diverged(UserError):
    """A training whose loss or parameters are NaN or infinite; it ends the same way when it is repeated."""


class LossWatch:
    """Remembers, on the device, the first step whose loss was not finite. It is due for a look every 50 steps, and on a CPU,
    where looking costs nothing, after each."""

    def __init__(self, device: torch.device):
        self.every = 1 if device.type == "cpu" else 50
        self._first = torch.full((), -1, dtype=torch.long, device=device)

    def add(self, loss: torch.Tensor, step: int) -> None:
        """Note the loss of optimizer step number `step` (from 1)."""
        bad = ~torch.isfinite(loss.detach()).all() & (self._first < 0)
        self._first = torch.where(bad, step, self._first)

    def due(self, step: int) -> bool:
        """Whether it is time for a look after this step."""
        return step % self.every == 0

    def check(self, steps_per_epoch: int, kept: str) -> None:
        """Look; this waits for the device. Raises Diverged, which names the batch within its epoch and what is `kept` to go
        on from, if a loss was NaN or infinite."""
        step = int(self._first)
        if step >= 0:
            epoch, batch = divmod(step - 1, max(1, steps_per_epoch))
            raise Diverged(
                f"the training loss is NaN or infinite at step {step} (epoch {epoch + 1}, batch {batch + 1} of "
                f"{steps_per_epoch}); {kept}; {_ADVICE}"
            )


def check_parameters(parameters: Iterable[torch.Tensor], step: int, kept: str) -> None:
    """Raise `Diverged` for a trained parameter that is NaN or infinite though the losses so far were not."""
    if not all(torch.isfinite(parameter).all() for parameter in parameters):
        raise Diverged(f"trained parameters are NaN or infinite after step {step}; {kept}; {_ADVICE}")
