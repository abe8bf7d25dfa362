"""A training step of fixed shape as one CUDA graph: small steps are bound by kernel launches, not by arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


class StepGraphs:
    """CUDA graphs of a loss and its gradients, one for each shape of its inputs.

    The first call with a new shape runs the step a few times, captures it, and keeps the memory that it needs;
    all shapes share that memory. Later calls copy their inputs in and replay. After ``limit`` shapes new ones run
    without a graph. A copy of the object starts without graphs.
    """

    def __init__(self, limit: int = 8):
        self.limit = limit
        self._graphs: dict[tuple, _Graph] = {}

    def __deepcopy__(self, memo):
        return StepGraphs(self.limit)

    def __reduce__(self):
        return StepGraphs, (self.limit,)

    def __call__(
        self,
        compute: Callable[..., torch.Tensor],
        inputs: Sequence[torch.Tensor],
        parameters: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """Return ``compute(*inputs)``, a scalar, with gradients for ``parameters``.

        ``compute`` must always do the same work for the same shapes: no random numbers, no reads of the device.
        """
        key = (
            *((x.shape, x.dtype) for x in inputs),
            *map(id, parameters),
            torch.is_autocast_enabled("cuda"),
            torch.get_autocast_dtype("cuda"),
        )
        if key not in self._graphs:
            if len(self._graphs) == self.limit:
                return compute(*inputs)
            pool = next(iter(self._graphs.values())).graph.pool() if self._graphs else None
            self._graphs[key] = _Graph(compute, inputs, parameters, pool)
        return _Replay.apply(self._graphs[key], inputs, *parameters)


class _Graph:
    def __init__(self, compute, inputs, parameters, pool):
        self.inputs = [x.clone() for x in inputs]

        def step():
            total = compute(*self.inputs)
            return total.detach(), torch.autograd.grad(total, parameters, allow_unused=True)

        dtype = torch.get_autocast_dtype("cuda")
        autocast = torch.autocast("cuda", dtype, torch.is_autocast_enabled("cuda"), cache_enabled=False)
        with torch.enable_grad(), autocast:
            stream = torch.cuda.Stream()  # capture wants work that has run before, on another stream
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    step()
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=pool):
                self.total, self.gradients = step()
        self.replays = 0


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, graph, inputs, *parameters):
        torch._foreach_copy_(graph.inputs, list(inputs))
        graph.graph.replay()
        graph.replays += 1
        ctx.graph, ctx.replay = graph, graph.replays
        return graph.total.clone()

    @staticmethod
    def backward(ctx, dtotal):
        if ctx.replay != ctx.graph.replays:
            raise RuntimeError("with cuda_graphs each forward needs its backward before the next forward")
        found = iter(torch._foreach_mul([g for g in ctx.graph.gradients if g is not None], dtotal))
        return None, None, *(None if g is None else next(found) for g in ctx.graph.gradients)
