"""Lean's work on layers of many tokens: attention by groups of heads, all else by chunks of tokens.

What exists at the peak of a backward, in states (8 KB a token of a LLaMA-3-8B in bfloat16):

    1     dy, the gradient of the layer's output, which autograd holds
    1     the gradient of the state between the halves; in its place that of the layer's state
    1     the layer's state
    1     the gradient of attention's output, group by group; in its place that of queries
    1     attention's output, group by group; it makes room for the gradients of keys and values, which are half as large
    1     of one group: queries, keys, values, their gradients and what attention works in; after the last group
          what comes next from the host has its place

So five to six, and half a state more over FP8, whose projections take the normalised state quantized once. In a forward there
are three: state, normalised state or output, attention's output. The state between the halves exists in chunks.

Attention's node of autograd lives from the forward to the backward. Of what it has saved its output waits on the host where
there is room: attention then is computed once, and only queries, keys and values are computed again. Where there is none the
backward begins with the whole attention.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from ..fp8 import Fp8Linear
from ..fp8_kernels import compute_dtype
from . import kernels
from .attention import attend, norm_of_heads
from .control import active, add_control, control_backward, control_hidden, control_parameters
from .layers import Call, LayerPlan
from .linear import cast_once, input_gradient, of_ready, ready, rows_of
from .mlp import tokens

#: From so many tokens on. With fewer, larger matmuls count for more than memory does.
FROM_TOKENS = 8192

#: So many groups at most: each has a whole number of keys' and values' heads, and the queries' heads that read them. Of
#: FROM_TOKENS tokens there are two, and more as the tokens do: what is small is launch-bound, and needs less memory anyway.
_GROUPS = 8

#: Chunks of projections are so many of the MLP's, whose intermediate tensors are larger.
_WIDER = 4

#: Numbers. Attention saves its generator's state too.
_SMALL = 8


class Group:
    """Attention of a group of heads between its forward and its backward: autograd's node of it, and in ``memory`` what
    that has saved. Its inputs are left out, and are to be put back before :meth:`backward`.

    ``elsewhere``: tensors that are kept anyway. ``graph``: whether there will be a backward.
    """

    def __init__(self, function: Callable, inputs: list[torch.Tensor], elsewhere: list[torch.Tensor], graph: bool):
        memory: list[Any] = list(inputs)  # held by the node, so it must not hold the node
        known = {x.untyped_storage().data_ptr() for x in elsewhere}

        def pack(tensor):
            start = tensor.untyped_storage().data_ptr()
            if tensor.numel() <= _SMALL or start in known:
                return tensor
            starts = [other.untyped_storage().data_ptr() for other in memory]
            if start not in starts:
                numbers = tensor.untyped_storage().nbytes() // tensor.element_size()
                memory.append(tensor.detach().as_strided((numbers,), (1,), 0))
                starts.append(start)
            return starts.index(start), tensor.shape, tensor.stride(), tensor.storage_offset()

        def unpack(packed):
            return packed if isinstance(packed, torch.Tensor) else memory[packed[0]].as_strided(*packed[1:])

        with torch.set_grad_enabled(graph), saved_tensors_hooks(pack, unpack):
            inputs = _Start.apply(torch.empty(0, requires_grad=True), *inputs)
            output = function(*inputs)
        if graph:
            self._starts, self._end = [get_gradient_edge(x) for x in inputs], get_gradient_edge(output)
        self._output, self._unpack, self._memory = pack(output.detach()), unpack, memory
        memory[:3] = [None] * 3
        self._saved = len(memory) - 3

    def kept(self) -> list[torch.Tensor]:
        """What was saved, of one dimension each."""
        return self._memory[3:]

    def is_small(self) -> bool:
        """Whether that is little more than the output, and not, say, all its weights or keys repeated for a mask."""
        return sum(x.nbytes for x in self.kept()) < 1.5 * self.output().nbytes

    def forget(self) -> None:
        """Let go of what was saved, until it is put back with :meth:`remember`."""
        del self._memory[3:]

    def remember(self, kept: list[torch.Tensor]) -> None:
        """Take what :meth:`kept` gave, from the front of a list."""
        self._memory += kept[: self._saved]
        del kept[: self._saved]

    def output(self) -> torch.Tensor:
        """``(batch, tokens, heads * head_dim)``."""
        return self._unpack(self._output)

    def backward(self, inputs: list[torch.Tensor], dy: torch.Tensor) -> list[torch.Tensor]:
        """The gradients of the ``inputs``, which leave the list. Nothing is left afterwards."""
        self._memory[:3] = inputs
        inputs.clear()
        gradients = torch.autograd.grad([self._end], self._starts, [dy])
        self._memory.clear()
        return list(gradients)


class _Start(torch.autograd.Function):
    """Where autograd's graph of tensors starts: a node that holds nothing of them."""

    @staticmethod
    def forward(ctx, start, *tensors):
        return tensors

    @staticmethod
    def backward(ctx, *gradients):
        return None, *gradients


class LongCall(Call):
    """:class:`LeanCall` for many tokens: with the state attention's output waits on the host, while there is room for both."""

    groups: list[Group] | None = None

    @staticmethod
    def suits(plan: LayerPlan, state: torch.Tensor, attention_mask: Any = None, *arguments, **named) -> bool:
        """Whether a layer's call is one: it has the tokens, no dropout, and no mask that tells heads apart."""
        by_head = getattr(attention_mask, "ndim", 0) == 4 and attention_mask.shape[1] > 1
        many = state.ndim == 3 and state.shape[0] * state.shape[1] >= FROM_TOKENS
        return many and not by_head and not plan.draws()

    def forward(self, state):
        host = self.plan.host
        if host is not None and host.room_for(state):
            self.wait_on_host(state)
        work = LongRows(self.layer, self.plan, state.detach(), *self.arguments, **self.named)
        groups = work.attend(graph=bool(self.tickets))
        kept = [tensor for group in groups for tensor in group.kept()]
        if self.tickets and groups[0].is_small() and self.host.has_room_beside(state, *kept):
            self.tickets.append(self.host.push(*kept, own=0))
            self.groups = groups
        del kept
        output = work.output(groups)
        for group in groups:
            group.forget()
        return output, [] if self.tickets else [state]

    def backward(self, saved, dy, trained):
        groups, self.groups, then = self.groups, None, None
        kept = self.host.pop(self.tickets[1]) if groups else []
        for group in groups or ():
            group.remember(kept)
        if self.tickets:
            (state,) = self.host.pop(self.tickets[0], fetch_next=False)
            then = partial(self.host.fetch_below, self.tickets[0])
        else:
            (state,) = saved
        with self.autocast():
            work = LongRows(self.layer, self.plan, state, *self.arguments, **self.named)
            return work.backward(groups or work.attend(), dy, self.needs_dstate, then)


class LongRows:
    """One call of a SwiGLU decoder's layer on a ``state`` ``(batch, tokens, width)``, without a graph."""

    def __init__(self, layer, plan, state, attention_mask=None, *, position_embeddings, **named):
        self.plan, self.attention, self.shape = plan, layer.self_attn, state.shape
        self.state, self.norm, self.mlp = tokens(state), layer.input_layernorm, plan.mlp.for_chunks(state)
        self.controls = [active(getattr(layer, f"{block}_control", None), state) for block in ("attention", "mlp")]
        self.mask, self.angles, self.named = attention_mask, position_embeddings, named
        self.dtype, attention, self.norms = compute_dtype(state), self.attention, plan.halves.attention.norms
        self.normals: list | None = None
        self.projections = [cast_once(x, self.dtype) for x in (attention.q_proj, attention.k_proj, attention.v_proj)]
        self.project_back = cast_once(attention.o_proj, self.dtype)
        heads = attention.k_proj.out_features // attention.head_dim
        most = min(2 * len(self.state) // FROM_TOKENS, _GROUPS)
        self.groups = max(number for number in range(1, most + 1) if heads % number == 0)
        self.widths = [linear.out_features // self.groups for linear in self.projections]

    def attend(self, graph: bool = True) -> list[Group]:
        """The forward of attention, from the layer's state to what the output projection takes; with ``graph`` for a
        backward."""
        elsewhere = [x for x in (self.mask, *self.named.values()) if isinstance(x, torch.Tensor)]

        def function(query, key, value):
            return attend(self.attention, query, key, value, self.mask, **self.named)

        self.normals = []  # here is room for it
        groups = [Group(function, self._inputs(number)[0], elsewhere, graph) for number in range(self.groups)]
        self.normals = None
        return groups

    def output(self, groups: list[Group]) -> torch.Tensor:
        """The layer's output."""
        output = self.state.new_empty(self.shape)  # no view: hooks may change it in place
        mixed = [tokens(group.output()) for group in groups]
        for rows in self._chunks():
            _, middle = self._middle(rows, mixed)
            self.mlp.forward(middle, 0, self.controls[1], out=tokens(output)[rows])
        return output

    def backward(self, groups: list[Group], dy: torch.Tensor, needed: bool, then: Callable | None = None):
        """The gradient of the layer's state, if ``needed``, and pairs of the controls' parameters and their gradients.

        ``then`` is called where there is room for what comes next.
        """
        of_attention, of_mlp = map(control_parameters, self.controls)
        dstate, dmixed, sums = self._by_chunks(groups, tokens(dy), needed, bool(of_attention))
        gradients, through = [*zip((*of_attention, *of_mlp), sums)], []
        if needed:
            self.normals = [] if isinstance(self.projections[0], Fp8Linear) else None  # half a state, and slow to quantize
            through = [self._through_attention(number, groups, dmixed) for number in range(self.groups)]
        groups.clear()
        self.normals = None
        if then is not None:
            then()
        if dstate is None or not needed:
            return None, gradients
        self._through_projections([*zip(*through)], dstate)
        return dstate.view(self.shape), gradients

    def _chunks(self, times=1):
        size = times * self.plan.chunk
        return (slice(start, start + size) for start in range(0, len(self.state), size))

    def _middle(self, rows, mixed):
        """What the attention block's control's backward needs, and the state between the halves, of some tokens."""
        control, state = self.controls[0], self.state[rows]
        hidden = control_hidden(control, state)
        change = self.project_back(torch.cat([part[rows] for part in mixed], dim=1))
        return hidden, add_control(control, hidden, change, state)

    def _inputs(self, number):
        """Queries, keys and values ``(batch, tokens, heads, head_dim)`` of a group; and with norms the former two before
        these."""
        part = rows_of(self.projections, [slice(number * width, (number + 1) * width) for width in self.widths])
        found = torch.empty(len(self.state), sum(self.widths), dtype=self.dtype, device=self.state.device)
        for rows, normal in zip(self._chunks(_WIDER), self._normals()):
            found[rows] = of_ready(normal, part, self.dtype)
        shape = (*self.shape[:2], -1, self.attention.head_dim)
        query, key, value = (x.view(shape) for x in found.split(self.widths, dim=1))
        value, before = value.contiguous(), ()
        if self.norms:
            before = query, key = query.contiguous(), key.contiguous()
            query, key = (norm_of_heads(*pair)[0].view_as(pair[0]) for pair in zip(before, self.norms))
        del found
        return [*kernels.rope(query, key, *self.angles), value], before

    def _normals(self):
        """The normalised state, chunk by chunk, as projections take it: kept until ``normals`` is set anew if that is a list."""
        if self.normals:
            yield from self.normals
            return
        for rows in self._chunks(_WIDER):
            normal = ready(self._normalise(rows)[0], self.projections[0])
            if self.normals is not None:
                self.normals.append(normal)
            yield normal

    def _normalise(self, rows):
        return kernels.rms_norm(self.state[rows], self.norm.weight, self.norm.variance_epsilon)

    def _by_chunks(self, groups, dy, needed, controlled):
        """The gradients of the state between the halves, with what the block's control adds for the layer's state, and of
        attention's output, group by group, as far as they are needed; and those of the controls' parameters."""
        mixed = [tokens(group.output()) for group in groups]
        found: list = []
        sums: list = []
        dstate = _like(self.state) if needed or controlled else None
        dmixed = [_like(part) for part in mixed] if needed else []
        for rows in self._chunks():
            hidden, middle = self._middle(rows, mixed)
            dmiddle: Any = None if dstate is None else self.mlp.backward(middle, (), dy[rows], out=dstate[rows])
            of_mlp = control_hidden(self.controls[1], middle)
            _, found = control_backward(self.controls[1], middle, of_mlp, dy[rows], dmiddle)
            if needed:
                parts = input_gradient(dmiddle.to(self.dtype), self.project_back).split(self.widths[0], dim=1)
                for into, part in zip(dmixed, parts):
                    into[rows] = part
            if controlled:
                state, dinput = self.state[rows], dmiddle if needed else None
                found = control_backward(self.controls[0], state, hidden, dmiddle, dinput)[1] + found
            # many chunks' sums: added up in a narrow type they would lose what each of them adds
            wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in found]
            sums = wide if not sums else [total.add_(x) for total, x in zip(sums, wide)]
        return dstate, dmixed, [total.to(x.dtype) for total, x in zip(sums, found)]

    def _through_attention(self, number, groups, dmixed):
        """The gradients of a group's queries, keys and values as projected, ``(tokens, width)``."""
        inputs, before = self._inputs(number)
        dy = dmixed[number].view(*self.shape[:2], -1)
        dmixed[number] = None
        gradients = groups[number].backward(inputs, dy)
        del dy
        gradients[:2] = kernels.rope(*gradients[:2], *self.angles, backward=True)
        for place, (x, norm) in enumerate(zip(before, self.norms)):
            _, rstd = norm_of_heads(x, norm)
            gradients[place] = kernels.rms_norm_backward(tokens(gradients[place]), tokens(x), norm.weight, rstd)
        return [gradient.reshape(-1, width) for gradient, width in zip(gradients, self.widths)]

    def _through_projections(self, gradients, dstate):
        """Add to ``dstate`` what comes through the projections of the normalised state."""
        for rows in self._chunks(_WIDER):
            dnormal: Any = None
            for parts, linear in zip(gradients, self.projections):
                dnormal = input_gradient(torch.cat([part[rows] for part in parts], dim=1), linear, add_to=dnormal)
            _, rstd = self._normalise(rows)
            kernels.rms_norm_backward(
                dnormal, self.state[rows], self.norm.weight, rstd, residual=dstate[rows], out=dstate[rows]
            )


def _like(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)
