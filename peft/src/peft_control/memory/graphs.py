"""A training step of fixed shape as CUDA graphs: small steps are bound by kernel launches, not by arithmetic."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .control import tuner_setting
from .exact import Parameters
from .layers import drawing_layers, replays_random_numbers
from .mlp import probabilities
from .replay import Twins, capturing


class StepGraphs:
    """CUDA graphs of a forward and its backward, a pair for each shape of the inputs.

    The first call with a new shape runs the step a few times, captures it, and keeps the memory that it needs;
    all shapes share that memory. Later calls copy their inputs in and replay; dropout draws new numbers each time.
    After sixteen shapes new ones run without a graph. A copy of the object starts without graphs.
    """

    def __init__(self):
        self._graphs: dict[tuple, _Graph] = {}
        self._stream: torch.cuda.Stream | None = None
        self._twins: dict[nn.Module, Twins] = {}
        self._places: list[int] = []
        self._modules: list[nn.Module] = []
        self._settings: list[list] = []

    def __reduce__(self):
        return StepGraphs, ()

    def __call__(self, compute: Callable, inputs: Sequence[torch.Tensor], model: nn.Module, seen: tuple[list, tuple]):
        """Return ``compute(*inputs)``, a tensor or a structure of tensors, with gradients for ``model``'s trained
        parameters.

        ``compute`` must do the same work for what :meth:`look_at` has ``seen``, and read nothing from the device.

        Raises:
            RuntimeError: ``compute`` cannot be captured.
        """
        parameters, key = seen
        if key not in self._graphs:
            if len(self._graphs) == 16:
                return compute(*inputs)
            for number, (layer, plan) in enumerate(drawing_layers(model).items()):
                if plan.mode == "lean" and layer not in self._twins:
                    self._twins[layer] = Twins(inputs[0].device, number)
            first = next(iter(self._graphs.values()), None)
            self._stream = self._stream or torch.cuda.Stream()
            with _own_leaves(model, parameters) as leaves:
                self._graphs[key] = _Graph(compute, inputs, parameters, leaves, self._twins, first, self._stream)
        graph = self._graphs[key]
        return tree_unflatten(list(_Replay.apply(graph, inputs, *parameters)), graph.structure)

    def look_at(self, inputs, model, setting: object = None) -> tuple[list[nn.Parameter], tuple]:
        """The trained parameters, and what a graph must have been captured with.

        It takes half a millisecond: whoever waits for the GPU looks before, while the step before computes.
        """
        modules = list(model.modules())
        if modules != self._modules:
            self._modules = modules
            self._tuners = [module for module in modules if isinstance(module, BaseTunerLayer)]
            self._drops = [place for module in modules for place in probabilities(module)]
        tensors = [x for module in modules for x in (*module._parameters.values(), *module._buffers.values())]
        parameters = list({id(x): x for x in tensors if x is not None and x.requires_grad}.values())
        # a replay reads and writes where the tensors lay at its capture
        places = [x.data_ptr() for x in tensors if x is not None]
        if places != self._places:
            self._graphs.clear()
            self._places = places
        settings = [list(map(tuner_setting, self._tuners)), [state[name] for state, name in self._drops]]
        if settings not in self._settings:  # faster than a hash
            self._settings.append(settings)
        return parameters, (
            *((x.shape, x.dtype) for x in inputs),
            *map(id, parameters),
            torch.is_autocast_enabled("cuda"),
            torch.get_autocast_dtype("cuda"),
            self._settings.index(settings),
            setting,
        )


class StepPlan:
    """A whole model whose training step is replayed; ``inner`` is the plan that it has besides, or None."""

    def __init__(self, inner=None):
        self.inner, self.graphs = inner, StepGraphs()

    def run(self, model, own, *arguments, **named):
        """Replaces ``model.forward``: replays graphs while training on a GPU, and runs the model's own otherwise."""
        run = own if self.inner is None else partial(self.inner.run, model, own)
        values, structure = tree_flatten((arguments, named))
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        if (
            not (model.training and torch.is_grad_enabled() and tensors)
            or any(not x.is_cuda or x.requires_grad for x in tensors)
            or replays_random_numbers(model)
        ):
            return run(*arguments, **named)

        def compute(*tensors):
            fresh = iter(tensors)
            filled = [next(fresh) if isinstance(value, torch.Tensor) else value for value in values]
            arguments, named = tree_unflatten(filled, structure)
            return run(*arguments, **named)

        others = [value for value in values if not isinstance(value, torch.Tensor)]
        return self.graphs(compute, tensors, model, self.graphs.look_at(tensors, model, f"{structure} {others}"))


@contextmanager
def _own_leaves(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """New leaves of autograd with the parameters' memory, in their places.

    A leaf's gradient node remembers the stream that it was made on, and lives as long as any graph of autograd (the last
    step's loss, a cast that autocast keeps); a capture must not wait for another stream.
    """
    leaves = {id(parameter): nn.Parameter(parameter.detach()) for parameter in parameters}
    places = Parameters(model.modules())
    with places.put_back([leaves.get(id(parameter), parameter) for parameter in places.now()]):
        yield list(leaves.values())


class _Graph:
    """Forward and backward of one shape.

    All graphs share the memory pool of the ``first``, and hand out gradients in its memory for them: what one keeps for
    longer than its own replay must not lie where an earlier one works. The runs before a capture are on its own ``stream``:
    there they make what cuBLAS works in, which would otherwise lie in the pool.
    """

    def __init__(self, compute, inputs, parameters, leaves, twins, first, stream):
        self.inputs = [x.clone() for x in inputs]
        self.parameters, self.replays = parameters, 0
        self.twins = list(twins.values())

        def forward():
            torch.clear_autocast_cache()  # a replay must not read casts that were made, and are kept, outside of it
            outputs, self.structure = tree_flatten(compute(*self.inputs))
            torch.clear_autocast_cache()
            return outputs

        def gradients_of(outputs, doutputs):
            found = torch.autograd.grad(outputs, leaves, doutputs, allow_unused=True)
            torch.clear_autocast_cache()
            return found

        random = torch.cuda.get_rng_state()  # what the runs below draw must not count
        dtype = torch.get_autocast_dtype("cuda")
        autocast = torch.autocast("cuda", dtype, torch.is_autocast_enabled("cuda"), cache_enabled=False)
        try:
            with torch.enable_grad(), autocast, _no_collection():
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    for _ in range(2):
                        ends = [x for x in forward() if x.requires_grad]
                        gradients_of(ends, [torch.zeros_like(x) for x in ends])
                        del ends
                torch.cuda.current_stream().wait_stream(stream)
                self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
                for pair in self.twins:
                    self.forward.register_generator_state(pair.forward)
                    self.backward.register_generator_state(pair.backward)
                with capturing(twins), torch.cuda.graph(self.forward, pool=first and first.forward.pool(), stream=stream):
                    outputs = forward()
                ends = [x for x in outputs if x.requires_grad]
                self.doutputs = [torch.zeros_like(x) for x in ends]
                with capturing(twins), torch.cuda.graph(self.backward, pool=self.forward.pool(), stream=stream):
                    self.gradients = gradients_of(ends, self.doutputs)
                    if first:
                        self.gradients = _copied(self.gradients, first.gradients)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = str(error).strip().splitlines()[0]
            raise RuntimeError(
                f"this model's training step cannot be captured as a CUDA graph ({reason}): train without cuda_graphs"
            ) from error
        self.outputs = [x.detach() for x in outputs]
        self.differentiable = [x.requires_grad for x in outputs]
        torch.cuda.set_rng_state(random)


@contextmanager
def _no_collection():
    """Collect garbage now and not while a graph is captured: what holds events or pinned memory would end the capture."""
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _copied(found: Sequence[torch.Tensor | None], into: Sequence[torch.Tensor | None]) -> list:
    """``found`` in the memory of ``into``; a gradient may be missing from ``found`` alone."""
    places = [None if gradient is None else place for gradient, place in zip(found, into)]
    if any(gradient is not None and place is None for gradient, place in zip(found, places)):
        raise RuntimeError("parameters take part in some steps only")
    torch._foreach_copy_([x for x in places if x is not None], [x for x in found if x is not None])
    return places


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, graph, inputs, *parameters):
        # Gradients are handed out in the graphs' own memory: one that is still there is being accumulated into.
        kept = [
            parameter
            for parameter, gradient in zip(graph.parameters, graph.gradients)
            if gradient is not None and parameter.grad is not None and parameter.grad.data_ptr() == gradient.data_ptr()
        ]
        if kept:
            before = [parameter.grad for parameter in kept]
            for parameter in kept:
                parameter.grad = torch.empty_like(parameter)
            torch._foreach_copy_([parameter.grad for parameter in kept], before)
        torch._foreach_copy_(graph.inputs, list(inputs))
        for pair in graph.twins:
            pair.align()
        graph.forward.replay()
        graph.replays += 1
        ctx.graph, ctx.replay = graph, graph.replays
        outputs = [x.clone() for x in graph.outputs]
        ctx.mark_non_differentiable(*(x for x, found in zip(outputs, graph.differentiable) if not found))
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *doutputs):
        graph = ctx.graph
        if ctx.replay != graph.replays:
            raise RuntimeError("with cuda_graphs each forward needs its backward before the next forward")
        wanted = [dy for dy, found in zip(doutputs, graph.differentiable) if found]
        torch._foreach_copy_(graph.doutputs, wanted)
        graph.backward.replay()
        return None, None, *(None if g is None else g.detach() for g in graph.gradients)
