"""The one door through which a memory mode enters a model: what stands in the place of a module's ``forward``."""

from __future__ import annotations

import inspect
from functools import partial

from torch import nn


class Forward:
    """Runs what ``module.memory_plan`` says, and without one what stood here before.

    Others may wrap it, keep it and put it back at any time (accelerate does): it never outlives its plan. It is an object, not
    a closure, for deep copies and pickles, and has the signature of the forward that it stands for.

    Attributes:
        before: the forward that somebody else had put on the module, or None for its class's.
    """

    def __init__(self, module: nn.Module):
        self.module, self.before = module, vars(module).get("forward")

    @property
    def own(self):
        return self.before or partial(type(self.module).forward, self.module)

    def __call__(self, *arguments, **named):
        plan = vars(self.module).get("memory_plan")
        if plan is None:
            return self.own(*arguments, **named)
        return plan.run(self.module, self.own, *arguments, **named)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.own)


def enter(module: nn.Module, plan) -> None:
    """Have ``plan.run(module, own, ...)`` called for ``module.forward(...)``; ``own`` is what ran before."""
    if not isinstance(vars(module).get("forward"), Forward):
        module.forward = Forward(module)
    module.memory_plan = plan


def leave(module: nn.Module) -> None:
    """Undo :func:`enter`; a forward that somebody else has put on top since stays and finds the module's own below."""
    vars(module).pop("memory_plan", None)
    forward = vars(module).get("forward")
    if isinstance(forward, Forward):
        del module.forward
        if forward.before is not None:
            module.forward = forward.before
