"""The one door through which a memory mode enters a model: what stands in the place of a module's ``forward``.

All that memory modes put on a module, and take off again:

    forward          :class:`Forward`
    memory_plan      what it runs: a LayerPlan, TokensPlan, TailPlan, NormPlan, DecoderPlan, LossPlan or StepPlan
    memory_weights   the layer's Weights (``streaming.py``); beside them ``_apply``, and what torch's DDP is to ignore
"""

from __future__ import annotations

import inspect
from functools import partial

from torch import nn


class Forward:
    """Runs what ``module.memory_plan`` says, and without one what stood here before, with ``module.memory_weights`` in place.

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
        plan, weights = (vars(self.module).get(name) for name in ("memory_plan", "memory_weights"))
        run = self.own if plan is None else partial(plan.run, self.module, self.own)
        return run(*arguments, **named) if weights is None else weights.run(run, *arguments, **named)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.own)


def enter(module: nn.Module, plan, name: str = "memory_plan") -> None:
    """Have ``plan.run(module, own, ...)`` called for ``module.forward(...)``; ``own`` is what ran before. With the name
    "memory_weights" it is ``plan.run(forward, ...)``, around the plan's."""
    if not isinstance(vars(module).get("forward"), Forward):
        module.forward = Forward(module)
    setattr(module, name, plan)


def leave(module: nn.Module, name: str = "memory_plan") -> None:
    """Undo :func:`enter`; a forward that somebody else has put on top since stays and finds the module's own below."""
    vars(module).pop(name, None)
    forward = vars(module).get("forward")
    if isinstance(forward, Forward) and not {"memory_plan", "memory_weights"} & vars(module).keys():
        del module.forward
        if forward.before is not None:
            module.forward = forward.before
