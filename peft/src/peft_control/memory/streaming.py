"""Frozen weights that wait in host memory and come to the GPU layer by layer, before the layer runs.

Frozen weights are only read, so nothing ever travels back. While one layer computes, the next one's weights are copied into
a slot of the GPU's on a stream of their own: in a forward those of the layer behind it, in a backward of the layer before
it. At the turn from forward to backward, and from a step to the next, the slots hold what is needed first.

A layer always uses the same slot: what autograd or a library keeps of a weight in a forward (a transposed view, say) is right
again in the backward, once the layer is back in its slot. So every memory mode, and torch's checkpointing, works as it is.
Between a layer's runs its parameters lie on the host, where ``state_dict`` finds them.
"""

from __future__ import annotations

import logging
import mmap
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.utils._pytree import tree_leaves
from transformers.cache_utils import Cache

from ..control_layer import ControlLayer
from .forward import enter, leave
from .offload import _free_memory, _local_processes

logger = logging.getLogger(__name__)

#: Layers whose weights the GPU holds at a time: the one that runs and the next, whose copy starts as the one before ends. That
#: keeps the way busy where copies take longer than layers; more than two even out layers of unequal times.
RESIDENT = 2

# Where each tensor begins in a buffer, in bytes, as CUDA's allocator has it.
_ALIGNED = 256

# A layer is copied in pieces of so many bytes, so that states on their way back need not wait for the whole of it.
_PIECE = 32 << 20

# Where copies run beside the computation.
_COPIED_TO = "cuda"

# What torch's DistributedDataParallel asks a module for.
_IGNORED_BY_DDP = "_ddp_params_and_buffers_to_ignore"


class Place(NamedTuple):
    """Where a tensor hangs: a parameter's ``data``, or an attribute of the state that belongs to a 4-bit one."""

    holder: Any
    name: str

    def get(self) -> torch.Tensor:
        return getattr(self.holder, self.name)

    def set(self, tensor: torch.Tensor) -> None:
        setattr(self.holder, self.name, tensor)


class Span(NamedTuple):
    """A tensor's part of a flat buffer of bytes."""

    start: int
    end: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]

    def of(self, piece: torch.Tensor) -> torch.Tensor:
        return piece.view(self.dtype).as_strided(self.shape, self.stride)


class Weights:
    """The frozen weights of one layer; stands on the layer as ``layer.memory_weights``."""

    def __init__(self, stream: WeightStream, index: int, layer: nn.Module, places: Sequence[Place]):
        self.stream, self.index, self.layer, self.places = stream, index, layer, places
        self.tuners = [module for module in layer.modules() if isinstance(module, BaseTunerLayer)]
        tensors = [place.get() for place in places]
        self.origins = [tensor.device for tensor in tensors]
        self.spans = _spans(tensors)
        self.nbytes = self.spans[-1].end
        self.buffer = _in_own_pages(self.nbytes)
        # each with a storage of its own, as files of weights are written
        pieces = [torch.from_dlpack(self.buffer[span.start : span.end]) for span in self.spans]
        self.on_host = [span.of(piece) for span, piece in zip(self.spans, pieces)]
        self.in_slot: list[torch.Tensor] = []
        for place, tensor in zip(places, self.on_host):
            tensor.copy_(place.get())
            place.set(tensor)
        self.versions = self._versions()

    @torch.compiler.disable
    def run(self, forward: Callable, *arguments, **named):
        """``forward`` with the weights where its input is; before the backward of what it returns they come again."""
        given = tree_leaves((arguments, named))
        tensors = [x for x in given if isinstance(x, torch.Tensor)]
        # gradients of what an earlier call has put into a cache do not pass through that call's output
        caches = [x for x in given if isinstance(x, Cache)] if torch.is_grad_enabled() else ()
        cached = bool(caches) and self.stream.goes_on(self, caches)
        with self.stream.holding(self, tensors[0].device if tensors else None):
            output = forward(*arguments, **named)
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.grad_fn is not None and not any(tensor is x for x in tensors):
                tensor.register_hook(self._refuse if cached else self._before_backward)
        return output

    def _before_backward(self, gradient):
        self.stream.bring(self)

    def _refuse(self, gradient):
        raise RuntimeError("while weights are streamed there is no backward through a cache that was filled before the forward")

    def hang(self, tensors: Iterable[torch.Tensor]) -> None:
        for place, tensor in zip(self.places, tensors):
            place.set(tensor)

    def changed(self) -> bool:
        """Whether somebody has written to the weights on the host, or put others in their places, which are then taken over.

        Raises:
            RuntimeError: they are trained, or of another shape or type.
        """
        for place, tensor in zip(self.places, self.on_host):
            if getattr(place.holder, "requires_grad", False):
                raise RuntimeError("a weight that is streamed is trained since: call set_memory_mode again")
            found = place.get()
            if found.data_ptr() == tensor.data_ptr():
                continue
            if (found.shape, found.dtype) != (tensor.shape, tensor.dtype):
                raise RuntimeError("a weight that is streamed has another shape or type since: call set_memory_mode again")
            self.stream.synchronize()
            tensor.copy_(found)
            place.set(tensor)
            self.versions = []
        versions = self._versions()
        if versions == self.versions:
            return False
        self.versions = versions
        return True

    def _versions(self):
        holders = [place.holder for place in self.places if isinstance(place.holder, torch.Tensor)]
        versions = [0 if holder.is_inference() else holder._version for holder in holders]
        return [*versions, *(list(tuner.merged_adapters) for tuner in self.tuners)]  # merging writes past all versions

    def apply(self, function: Callable, recurse: bool = True) -> nn.Module:
        """Stands for the layer's ``_apply`` (``to``, ``cuda``), and leaves what is streamed where it is.

        Raises:
            RuntimeError: it would change the weights' type.
        """
        for dtype in {tensor.dtype for tensor in self.on_host}:
            if function(torch.empty(0, dtype=dtype)).dtype != dtype:
                raise RuntimeError("weights that are streamed keep their type: set_memory_mode(model, 'plain') first")
        streamed = {id(place.holder) for place in self.places}
        hidden = [
            (m._parameters, name, p) for m in self.layer.modules() for name, p in m._parameters.items() if id(p) in streamed
        ]
        for parameters, name, _ in hidden:
            parameters[name] = None
        try:
            return type(self.layer)._apply(self.layer, function)
        finally:
            for parameters, name, parameter in hidden:
                parameters[name] = parameter

    def start(self) -> None:
        enter(self.layer, self, "memory_weights")
        vars(self.layer)["_apply"] = self.apply

    def stop(self) -> None:
        """Put the weights where they were before, or leave them on the host if they were there."""
        for place, tensor, origin in zip(self.places, self.on_host, self.origins):
            place.set(tensor.to(origin))
        self.in_slot = []
        vars(self.layer).pop("_apply", None)
        leave(self.layer, "memory_weights")


class Slot:
    """Memory for one layer's weights at a time.

    Attributes:
        holds: whose they are.
        arrived: the event of their copy, or None.
    """

    def __init__(self, size: int, device: torch.device):
        self.buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self.holds: Weights | None = None
        self.arrived: torch.cuda.Event | torch.Event | None = None


class WeightStream:
    """The frozen weights of a model's layers, ``resident`` of which lie on the device at a time.

    On a CPU the same happens with plain copies.
    """

    def __init__(self, layers: dict[nn.Module, list[Place]], resident: int):
        self.resident = min(resident, len(layers))
        self.device: torch.device | None = None
        self.layers: list[Weights] = []
        self._held: Weights | None = None
        self._cached_to, self._goes_on = len(layers), False
        self._slots: list[Slot] = []
        self._copies: torch.cuda.Stream | None = None
        self._used_on: torch.cuda.Stream | None = None
        self._registered: Callable | None = None
        try:
            for index, (layer, places) in enumerate(layers.items()):
                self.layers.append(Weights(self, index, layer, places))
        except BaseException:
            self.stop()
            raise
        for weights in self.layers:
            weights.start()

    def __reduce__(self):
        raise TypeError("a model whose weights are streamed cannot be copied: set_memory_mode(model, 'plain') first")

    @property
    def nbytes(self) -> int:
        return sum(weights.nbytes for weights in self.layers)

    @property
    def holders(self) -> set[int]:
        """The ids of the parameters."""
        return {id(place.holder) for weights in self.layers for place in weights.places}

    def slot_bytes(self) -> list[int]:
        return [max(weights.nbytes for weights in self.layers[slot :: self.resident]) for slot in range(self.resident)]

    def goes_on(self, weights: Weights, caches: Sequence[Cache]) -> bool:
        """Whether this pass over the layers has begun with caches that an earlier one has filled."""
        if weights.index <= self._cached_to:
            self._goes_on = any(map(_is_filled, caches))
        self._cached_to = weights.index
        return self._goes_on

    @contextmanager
    def holding(self, weights: Weights, device: torch.device | None) -> Iterator[None]:
        """Within, the layer's parameters are on the device; afterwards as before."""
        before = self._held
        if device is not None and device != self.device:
            self._move_to(device)
        self.bring(weights)
        try:
            yield
        finally:
            if before is not weights:
                self._let_go()

    def bring(self, weights: Weights) -> None:
        """Put the layer's parameters into its slot, once its weights are there, and start the copies of what comes next."""
        if self._held is weights:
            return
        self._let_go()
        backward = torch._C._current_graph_task_id() != -1
        if backward:
            torch.autograd.Variable._execution_engine.queue_callback(self._let_go)
        slot = self._fetch(weights)
        self._wait_for(slot)
        weights.hang(weights.in_slot)
        self._held = weights
        taken = {weights.index % self.resident}
        for index in self._upcoming(weights.index, backward):
            if index % self.resident in taken:  # a nearer layer's
                break
            taken.add(index % self.resident)
            self._fetch(self.layers[index])
        if self._copies is not None:
            self._used_on = torch.cuda.current_stream(self.device)

    def _upcoming(self, index, backward):
        """The other layers in the order in which they will run, as far as one can tell."""
        behind, ahead = range(index - 1, -1, -1), range(index + 1, len(self.layers))
        if backward:
            return chain(behind, ahead)
        return chain(ahead, behind if torch.is_grad_enabled() else range(index))

    def _fetch(self, weights):
        slot = self._slots[weights.index % self.resident]
        if weights.changed() or slot.holds is not weights:
            there, here = slot.buffer[: weights.nbytes], weights.buffer
            slot.holds = None  # should the copy fail
            if self._copies is None:
                there.copy_(here)
            else:
                # what was computed so far may read the slot
                for stream in {torch.cuda.current_stream(self.device), self._used_on} - {None}:
                    self._copies.wait_stream(stream)
                with torch.cuda.stream(self._copies):
                    for into, piece in zip(there.split(_PIECE), here.split(_PIECE)):
                        into.copy_(piece, non_blocking=True)
                slot.arrived = self._copies.record_event()
            slot.holds = weights
        return slot

    def _wait_for(self, slot):
        """Let the computation wait for the copy into a slot."""
        if slot.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.arrived)

    def _let_go(self):
        held, self._held = self._held, None
        if held is not None:
            held.hang(held.on_host)

    @torch.inference_mode(False)
    def _move_to(self, device):
        """Make the slots on the device where the states are."""
        self._let_go()
        self.synchronize()
        self._slots.clear()
        self._copies = self._used_on = None
        for weights in self.layers:
            weights.in_slot = []
        if device.type == _COPIED_TO and self._registered is None:
            self._registered = _page_lock([weights.buffer for weights in self.layers], self)
        self.device = None  # should there be no room
        self._slots = [Slot(size, device) for size in self.slot_bytes()]
        self.device = device
        if device.type == _COPIED_TO:
            self._copies = torch.cuda.Stream(device)
            for slot in self._slots:  # nobody else gets its memory while a copy into it is under way
                slot.buffer.record_stream(self._copies)
        for weights in self.layers:
            buffer = self._slots[weights.index % self.resident].buffer
            weights.in_slot = [span.of(buffer[span.start : span.end]) for span in weights.spans]

    def copy_all(self) -> None:
        """Fetch every layer's weights once, for measurements; what is computed next waits for it."""
        for weights in self.layers:
            slot = self._slots[weights.index % self.resident]
            slot.holds = None
            self._fetch(weights)
            self._wait_for(slot)

    def synchronize(self) -> None:
        """Wait for all copies."""
        if self._copies is not None:
            self._copies.synchronize()

    def stop(self) -> None:
        """Put all weights back where they came from."""
        self._let_go()
        if self._copies is not None:
            torch.cuda.synchronize(self.device)
        self._slots.clear()
        for weights in self.layers:
            weights.stop()
        self.layers.clear()  # they hold this object, and gigabytes that should not wait for a garbage collection
        if self._registered is not None:
            self._registered()


# -- a model ----------------------------------------------------------------------------------------------------


def start(model: nn.Module, is_layer: Callable[[nn.Module], bool], resident: int) -> None:
    """Have the frozen weights of the layers wait on the host.

    Raises:
        ValueError: no layer is known, something else moves or shards the weights, their kind cannot be streamed, or the host
            cannot hold them. The model is as it was.
    """
    layers = _frozen_places(model, is_layer)
    stop(model)
    free = _check_room(list(layers.values()))
    stream = WeightStream(layers, resident)
    # DDP refuses parameters on two kinds of devices, and would send these around
    ignored = [name for name, parameter in model.named_parameters() if id(parameter) in stream.holders]
    setattr(model, _IGNORED_BY_DDP, [*getattr(model, _IGNORED_BY_DDP, []), *ignored])
    logger.info("%s; %s of the host's memory were free", describe(model), _gib(free))


def stop(model: nn.Module) -> None:
    """Undo :func:`start`: the weights return to where they were."""
    for stream in streams(model):
        holders = stream.holders
        stream.stop()
        for module in model.modules():
            if (ignored := vars(module).get(_IGNORED_BY_DDP)) is not None:
                names = {name for name, parameter in module.named_parameters() if id(parameter) in holders}
                setattr(module, _IGNORED_BY_DDP, [name for name in ignored if name not in names])


def describe(model: nn.Module) -> str | None:
    """What host and device hold of a model whose weights are streamed, in one line; None for any other."""
    running = streams(model)
    if not running:
        return None
    (stream,) = running
    others = sum(parameter.nbytes for parameter in model.parameters() if id(parameter) not in stream.holders)
    host, slots = _gib(stream.nbytes), _gib(sum(stream.slot_bytes()))
    return (
        f"frozen weights of {len(stream.layers)} layers wait on the host ({host}); the device holds {stream.resident} of them "
        f"at a time ({slots}) and the model's other parameters ({_gib(others)})"
    )


def streams(model: nn.Module) -> list[WeightStream]:
    """What streams weights of the model: nothing, or one."""
    found = [weights.stream for module in model.modules() if (weights := vars(module).get("memory_weights")) is not None]
    return list(dict.fromkeys(found))


def _frozen_places(model, is_layer):
    """The places of each layer's frozen tensors, but of those that other modules share."""
    layers = [module for module in model.modules() if is_layer(module)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layer that Control knows and no control: its weights cannot be streamed"
        )
    if any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules()):
        raise ValueError("weights that are sharded (FSDP) cannot be streamed: use one of the two")
    if any(hasattr(module, "_hf_hook") for layer in layers for module in layer.modules()):
        raise ValueError(
            "accelerate moves this model's weights (device_map, CPU offload): load it on one device to stream them"
        )
    inside = {module for layer in layers for module in layer.modules()}
    owners = Counter(id(parameter) for layer in layers for parameter in layer.parameters())
    owners.update({id(p) for module in model.modules() if module not in inside for p in module._parameters.values()})
    found = {}
    for layer in layers:
        parameters = [p for p in _frozen_parameters(layer) if owners[id(p)] == 1 and p.numel()]
        if places := [place for parameter in dict.fromkeys(parameters) for place in _places(parameter)]:
            found[layer] = places
    if not found:
        raise ValueError("no layer has frozen weights that could be streamed")
    return found


def _frozen_parameters(module):
    """The base model's own: an adapter may be switched on and trained at any time."""
    if isinstance(module, (ControlLayer, AuxiliaryTrainingWrapper)):
        return
    adapts = isinstance(module, BaseTunerLayer)
    for parameter in () if adapts else module._parameters.values():
        if parameter is not None and not parameter.requires_grad:
            yield parameter
    for name, child in module.named_children():
        if not adapts or name == "base_layer":
            yield from _frozen_parameters(child)


def _places(parameter):
    if parameter.is_meta or parameter.is_sparse or type(parameter.data) is not torch.Tensor:
        raise ValueError("weights without values, or of a tensor's subclass, cannot be streamed")
    if type(parameter).__name__ == "Int8Params":
        raise ValueError("bitsandbytes' int8 layers keep weights of their own and cannot be streamed: use nf4 or FP8")
    yield Place(parameter, "data")
    state = getattr(parameter, "quant_state", None)
    for owner in (state, getattr(state, "state2", None)):
        for name in ("absmax", "code", "offset"):
            if isinstance(getattr(owner, name, None), torch.Tensor):
                yield Place(owner, name)


def _check_room(layers):
    """The bytes that the host has free. What lies in ordinary memory is freed as it goes, a file's pages are not counted."""
    sizes, more = [], 0
    for places in layers:
        tensors = [place.get() for place in places]
        sizes.append(_spans(tensors)[-1].end)
        more += sum(t.nbytes for t in tensors if t.device.type != "cpu" or t.untyped_storage().filename is not None)
    free = _free_memory() // _local_processes()
    needed = max(more, max(sizes))
    if needed > free:
        raise ValueError(
            f"streaming the frozen weights takes {_gib(sum(sizes))} of the host's memory for each process, {_gib(needed)} more "
            f"than now, and {_gib(free)} are free"
        )
    return free


def _is_filled(cache):
    try:
        return bool(cache.get_seq_length())
    except ValueError:  # it has states of recurrences alone
        states = [getattr(layer, "has_previous_state", False) for layer in cache.layers]
        return any(any(state.values()) if isinstance(state, dict) else state for state in states)


# -- memory -----------------------------------------------------------------------------------------------------


def _spans(tensors):
    spans, start = [], 0
    for tensor in tensors:
        stride = tensor.stride()
        if sum((size - 1) * step for size, step in zip(tensor.shape, stride)) + 1 != tensor.numel():
            stride = torch.empty(tensor.shape, device="meta").stride()
        spans.append(Span(start, start + tensor.nbytes, tensor.dtype, tensor.shape, stride))
        start = -(-spans[-1].end // _ALIGNED) * _ALIGNED
    return spans


def _in_own_pages(size):
    """A buffer of bytes in pages that nothing else is in: whole pages are locked."""
    memory = torch.empty(size + 2 * mmap.PAGESIZE, dtype=torch.uint8)
    start = -memory.data_ptr() % mmap.PAGESIZE
    return memory[start : start + size]


def _page_lock(buffers, owner):
    """Lock buffers in memory, from where copies run beside the computation; what is returned, a finalizer of ``owner``, unlocks
    them. (torch's own pinned memory comes in powers of two.)"""
    cudart: Any = torch.cuda.cudart()
    locked: list[torch.Tensor] = []
    unlock = weakref.finalize(owner, _unlock, locked)
    unlock.atexit = False
    for buffer in buffers:
        size = -(-buffer.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        torch.cuda.check_error(cudart.cudaHostRegister(buffer.data_ptr(), size, 0))
        locked.append(buffer)
    return unlock


def _unlock(buffers):
    cudart: Any = torch.cuda.cudart()
    torch.cuda.synchronize()  # copies may still read them
    for buffer in buffers:
        cudart.cudaHostUnregister(buffer.data_ptr())


def _gib(count):
    return f"{count / 2**30:.1f} GiB"
