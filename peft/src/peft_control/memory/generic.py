"""Layers that nobody wrote by hand, in mode lean: their state is kept, and they run their own forward again in the backward.

The recomputation runs what a layer has, with input gradients only. Its token-wise MLPs and mixtures of experts wait until
their own backward, where they run once, in chunks of tokens: :class:`Tokens`. Forward and backward take the same chunks, so
that a router sees the same numbers twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves, tree_structure
from transformers.utils import output_capturing

from ..architectures import ARCHITECTURES, Architecture
from ..fp8 import Fp8Linear
from ..fp8_experts import dequantized_once
from .exact import is_as_written, kind_of, path_of
from .forward import enter
from .layers import LayerPlan, autocast_state, recomputed
from .mlp import draws

#: Whose modules compute nothing but their outputs, and leave nothing behind.
_LIBRARIES = (
    "torch.nn.modules.",
    "transformers.",
    "timm.",
    "bitsandbytes.nn.",
    "peft.tuners.lora.",
    "peft_control.",
    "liger_kernel.",
)

#: How the tested rows call an MLP or a mixture of experts that works on each token for itself.
_TOKENWISE = ("mlp", "feed_forward", "block_sparse_moe", "shared_mlp", "ffn", "DenseReluDense")

#: Their routers look at other tokens, or draw random numbers that no attribute tells of.
_NOT_TOKENWISE = ("PhimoeSparseMoeBlock",)

#: Numbers that the linear layers of a chunk put out: 4,096 tokens of Qwen3-30B-A3B, 235 MB in bfloat16.
_CHUNK_ELEMENTS = 4096 * 8 * (2 * 768 + 2048)

#: So much faster FP8 multiplies, its quantizing counted in.
_FP8_SPEED = 1.7

#: Nodes of autograd that pass a gradient on without the values of their inputs.
_LINEAR = {
    *("AddBackward0", "SubBackward0", "MulBackward0", "DivBackward0", "NativeDropoutBackward0", "ToCopyBackward0"),
    *("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "AliasBackward0", "CloneBackward0"),
    *("SqueezeBackward0", "SqueezeBackward1", "UnsqueezeBackward0", "TransposeBackward0"),
}


def look_at(layer: nn.Module, plan: LayerPlan) -> Callable | None:
    """:func:`run_alone`, if ``layer`` is of a tested row and all in it is as its library has it: its forward then has no
    results but those that it returns. Else None."""
    plan.adds, plan.tokens = None, []
    row = next((row for row in ARCHITECTURES if row.matches(kind_of(layer))), None)
    written = all(
        path_of(kind_of(module)).startswith(_LIBRARIES) and is_as_written(module, hooks=module is not layer)
        for module in layer.modules()
    )
    if row is None or not written:
        return None
    if plan.halves is None:
        plan.tokens = plan_mlps(layer, plan.chosen_chunk)
        plan_tails(layer, row)
    return run_alone


def plan_mlps(layer: nn.Module, chunk: int | None) -> list[TokensPlan]:
    """Have the token-wise MLPs of ``layer`` work in chunks of ``chunk`` tokens, or by their size."""
    inside: set[nn.Module] = set()
    plans = []
    for name, module in layer.named_modules():
        is_mlp = name.rpartition(".")[2] in _TOKENWISE and not isinstance(module, nn.Linear)
        if is_mlp and type(module).__name__ not in _NOT_TOKENWISE and module not in inside:
            inside.update(module.modules())
            outputs = sum(outputs for _, outputs in _matrices(module))  # of a token
            plans.append(TokensPlan(chunk or max(_CHUNK_ELEMENTS // max(outputs, 1), 1)))
            enter(module, plans[-1])
    return plans


def plan_tails(layer: nn.Module, row: Architecture) -> None:
    """Let the norm that follows an MLP (Gemma's, OLMo's) run in the MLP's backward."""
    for path in [path for block in row.blocks.values() for path in block.write.split("|")]:
        tail = dict(layer.named_modules()).get(path)
        if type(tail).__name__.endswith("Norm") and tail is not None:
            enter(tail, TailPlan())


def parameters_per_token(module: nn.Module) -> float:
    """How many parameters of matrices one token is multiplied by; those in FP8 count for less time."""
    in_16_bits = sum(inputs * outputs for inputs, outputs in _matrices(module))
    in_fp8 = sum(part.in_features * part.out_features for part in module.modules() if isinstance(part, Fp8Linear))
    return in_16_bits - in_fp8 * (1 - 1 / _FP8_SPEED)


def _matrices(module):
    """Inputs and outputs of the matrices that multiply one token; of experts, those of as many as it asks."""
    experts = next((found for part in module.modules() if (found := _experts_per_token(part))), 1)
    for part in module.modules():
        if isinstance(part, nn.Linear):
            yield part.in_features, part.out_features
        for stack in part._parameters.values():
            if stack is not None and stack.dim() == 3:
                # which of the two comes first differs: the width of the state goes in or comes out
                for _ in range(experts):
                    yield stack.shape[2], stack.shape[1]


def _experts_per_token(part):
    return next((n for name in ("top_k", "num_experts_per_tok") if isinstance(n := getattr(part, name, None), int)), 0)


# -- MLPs -------------------------------------------------------------------------------------------------------


class MlpCalls:
    """The calls of token-wise MLPs in a layer's forward and in its recomputation.

    Attributes:
        again: whether this is the recomputation.
        skips: whether the recomputation may leave the MLPs' outputs at zero.
        shapes: of the outputs of the MLPs, in the order of their calls.
        nodes: their nodes of autograd.
        last: the plan and the output of the last of them.
        tailed: the plans of those that run together with the norm behind them.
        waiting: of such a one what stands for its output, and how both run.
    """

    def __init__(self, tailed: set[TokensPlan]):
        self.again, self.skips, self.calls = False, False, 0
        self.shapes: list = []
        self.nodes: list = []
        self.tailed = tailed
        self.last: tuple | None = None
        self.waiting: tuple | None = None

    @contextmanager
    def active(self):
        before = _running.set(self)
        self.calls = 0
        try:
            yield
        finally:
            _running.reset(before)
            self.last = None  # what waits for the backward is the layer's state alone


_running: ContextVar[MlpCalls | None] = ContextVar("running", default=None)


class TokensPlan:
    """How a token-wise MLP runs within a recomputed layer: ``chunk`` tokens at a time.

    ``tailed``: whether a frozen norm takes its output, as the layer's first forward has shown.
    """

    tailed = False

    def __init__(self, chunk: int):
        self.chunk = chunk

    def run(self, module, own, *arguments, **named):
        """Replaces ``module.forward``; outside of such a layer, with dropout or trained parameters, the module's own runs."""
        run, given = _running.get(), [*arguments, *named.values()]
        x = given[0] if len(given) == 1 and isinstance(given[0], torch.Tensor) else None
        if run is None or x is None or x.dim() not in (2, 3) or _needs_autograd(module):
            return own(*arguments, **named)
        if self in run.tailed:
            run.waiting = object(), partial(self.node, x, run), own
            return run.waiting[0]
        outputs = self.node(x, run, own)
        run.last = self, outputs
        return outputs

    def node(self, x, run, own):
        """The outputs for ``x``, as a node of autograd if one is needed."""
        if not x.requires_grad:
            return self.outputs(own, x)
        number, run.calls = run.calls, run.calls + 1
        outputs = Tokens.apply(x, self, own, run.shapes[number] if run.again and run.skips else None)
        if not run.again:
            several = isinstance(outputs, tuple)
            tensors = outputs if several else (outputs,)
            run.shapes.append((several, [(y.shape, y.dtype) for y in tensors]))
            run.nodes += [y.grad_fn for y in tensors if y.requires_grad][:1]
        return outputs

    def pieces(self, x):
        """``x`` in chunks of tokens, with as many dimensions."""
        if x[..., 0].numel() <= self.chunk:
            return (x,)
        rows = x.reshape(-1, x.shape[-1]).split(self.chunk)
        return rows if x.dim() == 2 else [piece.unsqueeze(0) for piece in rows]

    @torch.no_grad()
    @dequantized_once()
    def outputs(self, own, x):
        pieces = self.pieces(x)
        found = [own(piece) for piece in pieces]
        if len(pieces) == 1:
            return found[0]
        if not isinstance(found[0], tuple):
            return _joined(found, x)
        return tuple(_joined(parts, x) for parts in zip(*found, strict=True))


class TailPlan:
    """A frozen norm behind a token-wise MLP, with which it runs: recomputed alone, it would need the MLP's output."""

    def run(self, module, own, y):
        """Replaces ``module.forward``."""
        run, trained = _running.get(), any(parameter.requires_grad for parameter in module.parameters())
        if run is not None and run.waiting is not None and y is run.waiting[0]:
            (_, node, mlp), run.waiting = run.waiting, None
            return own(node(mlp)) if trained else node(lambda piece: own(mlp(piece)))
        if run is not None and run.last is not None and y is run.last[1] and not trained:
            run.last[0].tailed = True  # from the next forward on
        return own(y)


def _no_leaf(x):
    """``x`` as autocast saw it in the forward: of a leaf it would keep one cast for all that read it, and their gradients would
    be summed in the narrow type."""
    return x.view_as(x)


def _needs_autograd(module):
    return any(parameter.requires_grad for parameter in module.parameters()) or any(map(draws, module.modules()))


def _joined(parts, x):
    """The outputs of pieces of ``x`` as its own; a mixture of experts may write its tokens in one row."""
    joined = torch.cat(list(parts), dim=-2)
    return joined.view(*x.shape[:-1], -1) if joined.dim() == 3 else joined


class Tokens(torch.autograd.Function):
    """A frozen token-wise module as one node that keeps its input, and runs once more in its backward, chunk by chunk. With
    ``shapes`` its outputs are zeros: only their gradients are wanted."""

    @staticmethod
    def forward(ctx, x, plan, own, shapes):
        ctx.plan, ctx.own, ctx.autocast = plan, own, autocast_state(x)
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        if shapes is None:
            outputs = plan.outputs(own, x)
        else:
            zeros = tuple(x.new_zeros(shape, dtype=dtype) for shape, dtype in shapes[1])
            outputs = zeros if shapes[0] else zeros[0]
        if isinstance(outputs, tuple):
            ctx.mark_non_differentiable(*(y for y in outputs if not y.is_floating_point()))
        return outputs

    @staticmethod
    @once_differentiable
    @dequantized_once()
    def backward(ctx, *gradients):
        (x,), plan = ctx.saved_tensors, ctx.plan
        dx, start = torch.empty_like(x, memory_format=torch.contiguous_format), 0
        into = dx.view(-1, dx.shape[-1])
        for piece in plan.pieces(x):
            piece = piece.detach().requires_grad_()
            rows = slice(start, start + piece[..., 0].numel())
            start = rows.stop
            with ctx.autocast(), torch.enable_grad():
                outputs = ctx.own(_no_leaf(piece))
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            pairs = [
                (y, dy.reshape(-1, dy.shape[-1])[rows].reshape(y.shape))
                for y, dy in zip(outputs, gradients, strict=True)
                if dy is not None and y.requires_grad
            ]
            outputs, dys = zip(*pairs)  # an output that needs this node needs one of them
            (found,) = torch.autograd.grad(outputs, piece, dys)
            into[rows] = found.view(-1, found.shape[-1])
        return dx, None, None, None


# -- layers -----------------------------------------------------------------------------------------------------


def run_alone(plan: LayerPlan, layer: nn.Module, own: Callable, state: torch.Tensor, *arguments, **named):
    """What ``layer`` returns, by torch's checkpointing: the layer keeps its state alone, on the device or on the host. (Only
    bitsandbytes' int8 layers hide what they keep from torch: their inputs stay.)"""
    shared = any(isinstance(value, Mapping) and value for value in (*arguments, *named.values()))
    if shared or output_capturing._active_collector.get():  # what is recorded inside, or left for others, may need gradients
        return recomputed(plan, layer, own, state, *arguments, **named)
    calls = MlpCalls({mlp for mlp in plan.tokens if mlp.tailed})
    # what stands between an MLP and the layer's output is looked at once for each way in which the layer runs
    trained = [parameter.requires_grad for parameter in plan.all.now()]
    way = plan.setting(layer), trained, tree_structure((arguments, named)), calls.tailed
    calls.skips = plan.adds == (way, True)

    def run(state, *arguments, **named):
        with calls.active(), _without_checkpointing(layer):
            return own(state, *arguments, **named)

    host, start = plan.host, state.grad_fn
    if host is None or not host.room_for(state):
        output = recomputed(plan, layer, run, state, *arguments, **named)
    else:
        given, needed, ticket = [state], state.requires_grad, host.push(state.detach())  # travels while the layer computes

        def run_from_host(_, *arguments, **named):
            if not given and ticket.tensors is None and not ticket.buffers:
                raise RuntimeError("a memory mode frees what it kept: backward runs once per forward")
            state = given.pop() if given else _no_leaf(host.pop(ticket)[0].requires_grad_(needed))
            return run(state, *arguments, **named)

        # torch asks its arguments for the devices whose random numbers count
        output = recomputed(plan, layer, run_from_host, state.new_empty(0), *arguments, **named)
        host.settle()
    calls.again = True
    ends = [x.grad_fn for x in tree_leaves(output) if isinstance(x, torch.Tensor) and x.grad_fn is not None]
    if calls.nodes and (plan.adds is None or plan.adds[0] != way):
        plan.adds = way, all(only_adds(end, calls.nodes, start) for end in ends)
        calls.skips = plan.adds[1]
    calls.nodes.clear()
    return output


@contextmanager
def _without_checkpointing(layer):
    """Within, ``layer`` does none of its own, which a trainer may have turned on since: its MLPs would run outside of their calls."""
    on = getattr(layer, "gradient_checkpointing", False)
    if on:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        if on:
            layer.gradient_checkpointing = True


def only_adds(output, nodes, start) -> bool:
    """Whether no node of autograd between ``nodes`` and the node ``output`` needs the values that ``nodes`` gave; the graph below
    ``start`` is left out."""
    reaches, ends, stack = {start: False}, {*nodes}, [output]
    while stack:
        node = stack[-1]
        below = [next_node for next_node, _ in node.next_functions if next_node is not None]
        if node not in reaches:
            reaches[node] = False
            stack += [other for other in below if other not in reaches]
            continue
        stack.pop()
        on_the_way = any(other in ends or reaches[other] for other in below)
        reaches[node] = on_the_way
        factors = node.name() in ("MulBackward0", "DivBackward0") and len(below) > 1
        if on_the_way and (factors or node in ends or node.name() not in _LINEAR):
            return False
    return True
