"""Whether a module computes what its class says: the condition of every hand-written path around it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ..control_layer import ControlLayer
from .forward import Forward

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def kind_of(module: nn.Module) -> type:
    """The module's class, below the one that FSDP2 puts in front."""
    kind = type(module)
    return kind.__bases__[1] if issubclass(kind, FSDPModule) and kind is not FSDPModule else kind


def path_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def is_as_written(module: nn.Module, hooks: bool = True) -> bool:
    """Whether ``module`` has its class's forward and, if ``hooks`` count, nobody's hooks.

    A control's hooks, transformers' recorders of outputs and Liger's forwards, which compute the same, do not count, nor does
    a linear layer's hook with an attribute ``keeps_formula``.
    """
    own, kind = vars(module).get("forward"), type(module)
    ours = isinstance(own, Forward) and own.before is None
    if own is not None and not ours and not getattr(own, "__module__", "").startswith("liger_kernel."):
        return False
    if kind.forward.__module__ not in {base.__module__ for base in kind.__mro__}:  # patched for the whole class
        return False
    found = [hook for kind in _HOOKS for hook in getattr(module, kind).values()] if hooks else []
    return not any(_counts(hook, module) for hook in found)


def touches(module: nn.Module) -> tuple:
    """What tells quickly that somebody has put a forward or a hook on ``module``."""
    state = module.__dict__
    return "forward" in state, *(len(state[hooks]) for hooks in _HOOKS)


def _counts(hook, module) -> bool:
    mine = isinstance(getattr(hook, "__self__", None), ControlLayer)
    watches = isinstance(module, nn.Linear) and getattr(hook, "keeps_formula", False)
    return not (mine or watches or getattr(hook, "__module__", "") == "transformers.utils.output_capturing")


class Parameters:
    """The parameters of some modules, saved with a forward and in their places in its backward.

    So autograd notices what was changed in place in between, and a backward of ``torch.func.functional_call`` reads what its
    forward has read.
    """

    def __init__(self, modules: Iterable[nn.Module]):
        self._places: list[tuple[dict[str, Any], str]] = [
            (module._parameters, name)
            for module in modules
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]

    def now(self) -> list[torch.Tensor]:
        return [parameters[name] for parameters, name in self._places]

    @contextmanager
    def put_back(self, saved: Sequence[torch.Tensor]) -> Iterator[None]:
        """Within, the places hold ``saved``, what :meth:`now` gave before."""
        moved = [
            (parameters, name, parameters[name], tensor)
            for (parameters, name), tensor in zip(self._places, saved)
            if parameters[name] is not tensor
        ]
        for parameters, name, _, tensor in moved:
            parameters[name] = tensor
        try:
            yield
        finally:
            for parameters, name, current, _ in moved:
                parameters[name] = current
