"""The control itself: a rank-r linear path from a block's input state to its output state."""

from __future__ import annotations

import math
import threading
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .architectures import Architecture


class ControlLayer(nn.Module, BaseTunerLayer):
    """Adds ``alpha * B(A(state))`` to the output state of one frozen block.

    It is a child of the transformer layer and reaches the block through two forward hooks: one catches the
    input state where the block reads it, one adds the control where the block writes. Nothing is wrapped or
    renamed, so the base model's parameter names, LoRA inside the block and patched ``forward`` methods
    (Liger) stay as they are. The hooks are bound methods: they survive ``deepcopy`` and ``pickle``.

    Shapes: state and output ``(..., width)``; A ``(rank, width)``; B ``(width, rank)``.
    """

    adapter_layer_names = ("control_A", "control_B")
    other_param_names = ("rank", "alpha", "dropout")
    weight: Any = None  # peft's properties look for both in a wrapped layer, and here is none
    bias: Any = None

    def __init__(self, layer: nn.Module, architecture: Architecture, block: str):
        super().__init__()
        self.block = architecture.blocks[block].of(layer)
        writes = [other.write for other in architecture.blocks.values()]
        self.write_is_shared = self.block.shared or writes.count(architecture.blocks[block].write) > 1
        # what the layer multiplies the output of ``write`` by
        self.multiplier = float(getattr(layer, self.block.multiplier)) if self.block.multiplier else 1.0
        self.width = architecture.state_width(layer)
        self.control_A = nn.ModuleDict()
        self.control_B = nn.ModuleDict()
        self.rank: dict[str, int] = {}
        self.alpha: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.merged_adapters = []
        self._layer = (layer,)  # in a tuple, lest the layer become a submodule of its own child
        self._hooks = []
        self._states = {}  # by thread: servers run one model in several
        self._cast_weights = {}  # by adapter, while decoding
        self.adapter_names: list[str] | None = None  # of a batch's rows, while each has its own

    # -- the computation ------------------------------------------------------------------------------------

    def control(self, output: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """Return ``output + sum of alpha * B(A(state))`` over the active adapters.

        The products run in the state's dtype (as they would under autocast) whatever the dtype of A and B, so
        that nothing is kept for the backward but the state, which the frozen block keeps anyway, and A(state).
        """
        if self.disable_adapters:
            return output
        if self.adapter_names is not None:
            return self._control_rows(self.adapter_names, output, state)
        for name in self.active_adapters:
            if name in self.control_A:
                output = self._add(name, output, state)
        return output

    def _add(self, name, output, state):
        A, B = self.linears(name)
        drop = partial(F.dropout, p=self.dropout[name], training=self.training)
        if A.weight.is_meta:  # offloaded by accelerate, whose hooks fetch the weights of a module that is called
            change = B(drop(A(state.to(A.weight.dtype))))
        else:
            down, down_bias, up, up_bias = self._weights(name, state)
            change = F.linear(drop(F.linear(state, down, down_bias)), up, up_bias)
        change = change.to(output.dtype)
        return torch.add(output, change, alpha=self.alpha[name] / self.multiplier)

    def _control_rows(self, names, output, state):
        """The same with each row's own adapter."""
        output = output.clone()
        for name in {*names} & {*self.control_A}:
            rows = [row for row, wanted in enumerate(names) if wanted == name]
            output[rows] = self._add(name, output[rows], state[rows])
        return output

    def _weights(self, name: str, state: torch.Tensor) -> list:
        """Weight and bias of A, then of B, in the state's dtype.

        A decoding step takes what the step before has cast, while the parameters are the same objects in the same
        version. Every other forward casts anew and forgets: so the next prompt sees what no version tells, such as
        ``parameter.data`` that somebody wrote to.
        """
        down, up = self.linears(name)
        parameters = [down.weight, down.bias, up.weight, up.bias]
        dtype = state.dtype
        if parameters[0].dtype == dtype:
            return parameters
        if not self._decodes(state) or parameters[0].is_inference():
            return _cast(parameters, dtype)
        key = [dtype, *(None if p is None else (id(p), p._version) for p in parameters)]
        kept = self._cast_weights.get(name)
        if kept is None or kept[0] != key:
            self._cast_weights[name] = kept = key, _cast(parameters, dtype)
        return kept[1]

    def _decodes(self, state: torch.Tensor) -> bool:
        """Whether this is one token of a generation; if not, forget what was cast for the last one."""
        if torch.compiler.is_compiling():
            return False
        if not torch.is_grad_enabled() and state.dim() == 3 and state.shape[1] == 1:
            return not (state.is_cuda and torch.cuda.is_current_stream_capturing())
        self._cast_weights.clear()
        return False

    def _apply(self, *args, **kwargs):
        self._cast_weights.clear()  # to(), cuda(), half(): parameters change without a new version
        return super()._apply(*args, **kwargs)

    def _forget_state(self, module, args):
        # of a forward that an exception or an early-stopped recomputation cut short
        self._states.pop(_thread(), None)

    def _catch_state(self, module, args, kwargs):
        given = [*args, *kwargs.values()]
        self._states[_thread()] = next(x for x in given if isinstance(x, torch.Tensor))

    def _add_control(self, module, args, output):
        state = self._states.pop(_thread(), None)
        if state is None:
            off = self.disable_adapters or not any(name in self.control_A for name in self.active_adapters)
            if self.write_is_shared or off:  # if shared, this call is the other block's
                return output
            raise RuntimeError(
                f"{type(self.layer).__name__} wrote to {self.block.write!r} without calling {self.block.read!r}: "
                "its forward was replaced by one that a control cannot follow, or it calls that module for something else "
                "too, which the row must say ('shared': true)"
            )
        change, *rest = output if isinstance(output, tuple) else (output,)
        if self.adapter_names is not None and len(state) != len(self.adapter_names):
            raise ValueError(
                f"adapter_names has {len(self.adapter_names)} names, but {type(self.layer).__name__} works on {len(state)} rows"
            )
        if state.shape != change.shape:
            if state.numel() != change.numel():
                raise RuntimeError(
                    f"{type(self.layer).__name__} wrote {tuple(change.shape)} to {self.block.write!r}, having read "
                    f"{tuple(state.shape)}: it works on a part of the state"
                )
            # a mixture of experts may write its tokens in one row
            change = self.control(change.reshape(state.shape), state).reshape(change.shape)
        else:
            change = self.control(change, state)
        return (change, *rest) if isinstance(output, tuple) else change

    def _replicate_for_data_parallel(self):
        """torch asks it of each module at the first forward; the hooks of a copy would be the first GPU's.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(NO_REPLICAS)

    # -- attachment -----------------------------------------------------------------------------------------

    @property
    def layer(self) -> nn.Module:
        return self._layer[0]

    def attach(self) -> None:
        """Place the hooks on the modules that now stand at the block's two paths."""
        self.detach()
        read = self.layer.get_submodule(self.block.read)
        write = self.layer.get_submodule(self.block.write)
        self._hooks = [
            self.layer.register_forward_pre_hook(self._forget_state),
            read.register_forward_pre_hook(self._catch_state, with_kwargs=True),
            write.register_forward_hook(self._add_control),
        ]

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    # -- what peft's tuner asks of its layers ---------------------------------------------------------------

    def update_layer(self, adapter_name, rank, alpha, dropout, bias, init, std, identity, inference_mode):
        """Add an adapter. ``std`` is the deviation of the normal initialisation; see ``ControlConfig``."""
        self._cast_weights.clear()
        self.rank[adapter_name] = rank
        self.alpha[adapter_name] = float(alpha)
        self.dropout[adapter_name] = dropout
        down = nn.Linear(self.width, rank, bias=bias)
        up = nn.Linear(rank, self.width, bias=bias)
        for linear, zero in ((down, False), (up, identity)):
            if zero:
                nn.init.zeros_(linear.weight)
            elif init == "normal":
                nn.init.normal_(linear.weight, std=std)
            else:
                nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
            if bias:
                nn.init.zeros_(linear.bias)
        self.control_A[adapter_name] = down.to(self._reference().dtype)
        self.control_B[adapter_name] = up.to(self._reference().dtype)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    @torch.no_grad()
    def combine(self, adapters, weights, adapter_name, combination_type) -> None:
        """Set an adapter of alpha 1 to the weighted sum of others.

        "cat" is exact: ranks are concatenated. "svd" is exact up to its rank. "linear" adds A's and B's, each times the root
        of its factor, as LoRA's does: a rough approximation.
        """
        down, up = self.linears(adapter_name)
        for parameter in (*down.parameters(), *up.parameters()):
            parameter.zero_()
        exact = torch.promote_types(up.weight.dtype, torch.float32)
        start, product = 0, torch.zeros(self.width, self.width, device=up.weight.device, dtype=exact)
        for name, weight in zip(adapters, weights, strict=True):
            if name not in self.rank:
                continue
            A, B = self.linears(name)
            factor = weight * self.alpha[name]
            root = math.sqrt(abs(factor)) if combination_type == "linear" else 1.0
            if up.bias is not None and B.bias is not None:
                up.bias += factor * B.bias
            if combination_type == "svd":
                product += factor * (B.weight.to(exact) @ A.weight.to(exact))
                if up.bias is not None and A.bias is not None:
                    up.bias += factor * (B.weight @ A.bias)
                continue
            rows = slice(start, start + self.rank[name])
            start += self.rank[name] if combination_type == "cat" else 0
            down.weight[rows] += root * A.weight
            up.weight[:, rows] += factor / (root or 1.0) * B.weight
            if down.bias is not None and A.bias is not None:
                down.bias[rows] += root * A.bias
        if combination_type == "svd":
            U, S, Vh = torch.linalg.svd(product, full_matrices=False)
            rank = min(self.rank[adapter_name], self.width)
            up.weight[:, :rank], down.weight[:rank] = U[:, :rank] * S[:rank], Vh[:rank]

    def _move_adapter_to_device_of_base_layer(self, adapter_name, device=None):
        for linear in self.linears(adapter_name):
            if not any(parameter.is_meta for parameter in linear.parameters()):
                linear.to(device or self._reference().device)

    def linears(self, adapter_name) -> list:
        return [d[adapter_name] for d in (self.control_A, self.control_B) if adapter_name in d]

    def _reference(self) -> torch.Tensor:
        """A parameter of the frozen layer that shows its device and floating dtype (quantized ones do not, FP8 among them)."""
        own = {id(parameter) for parameter in self.parameters()}
        wide = (p for p in self.layer.parameters() if p.is_floating_point() and p.element_size() > 1)
        return next(p for p in wide if id(p) not in own)

    def merge(self, *args, **kwargs):
        """Does nothing: beside it the LoRA part is merged, and the control stays (see ``ControlModel``)."""

    unmerge = merge

    def extra_repr(self) -> str:
        return f"width={self.width}, rank={self.rank}, alpha={self.alpha}, read={self.block.read!r}, write={self.block.write!r}"


NO_REPLICAS = (
    "a control does not run in nn.DataParallel, whose copies share the hooks of the first GPU: start one process for each GPU "
    "(torchrun, accelerate launch) or show one GPU only (CUDA_VISIBLE_DEVICES=0)"
)

COMBINATIONS = ("cat", "linear", "svd")  # of ControlLayer.combine

STAYS = (
    "the LoRA part is merged into the weights; the control stays a path of its own: save the adapter and the merged base, or "
    "use `python -m peft_control export` for one model"
)

CANNOT_MERGE = (
    "a control runs parallel to a nonlinear block and cannot be merged into its weights; "
    "keep the adapter loaded, or call unload() to get the base model back"
)


def _cast(tensors: list, dtype: torch.dtype) -> list:
    return [tensor if tensor is None else tensor.to(dtype) for tensor in tensors]


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
