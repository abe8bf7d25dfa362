"""Several processes that share out the frozen weights (FSDP2, torch's `fully_shard`), beside DDP.

The frozen base is sharded layer by layer, embeddings and output layer by themselves unless they share their weight.
What is trained stays whole in every process, as under DDP, and its gradients are averaged once a step
(`average_gradients`). An adapter is below one percent of its base, so sharding it too would save next to nothing, while
whole it costs no gathering: checkpoints, optimizer states and the final adapter are plain tensors that one process
writes and any number of processes, sharded or not, reads. A unit of FSDP is then of one dtype and without gradients
too, whatever the dtypes of base and adapter.

accelerate is not asked to shard: it leaves FSDP out on CPUs without a word (1.15), and on GPUs its checkpoints are pickles.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from ..errors import UserError
from .metering import MemoryMeter
from .options import processes
from .quantization import quantized_linears


def shares_weights(shard: str) -> bool:
    """Whether a model is to be given to `shard_frozen`: load it into the host's memory then, since the whole of it may
    not fit on one GPU. A single process has nobody to share with."""
    return shard == "fsdp2" and processes() > 1


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard_frozen` was here."""
    return isinstance(model, FSDPModule)


def shard_frozen(model: nn.Module, device: torch.device, memory: MemoryMeter) -> None:
    """Shard the frozen parameters of a model over all processes, and put its trained ones whole on each one's device.

    Call it in every process, with the process group running and memory modes set; each layer is moved as it is sharded.
    `memory` gets its mark for the weights, which are this process's shards. Raises UserError: bitsandbytes has quantized the
    base, or it has no transformer layers that are known.
    """
    trained = split_into_units(model, device.type)
    memory.after_load()
    for parameter in trained:
        parameter.data = parameter.data.to(device)
        dist.broadcast(parameter.data, src=0)  # as DDP does: the processes start from one adapter


def split_into_units(model: nn.Module, device_type: str) -> list[nn.Parameter]:
    """Make FSDP units of the frozen parameters, which may be on the meta device; return the trained ones, left alone."""
    from peft_control.architectures import find_layers

    if quantized_linears(model):
        raise UserError("a base model that bitsandbytes has quantized cannot be sharded: choose --shard ddp")
    try:
        layers = [layer for layer, _ in find_layers(model).values()]
    except ValueError as error:
        raise UserError(f"--shard fsdp2: {error}; or choose --shard ddp") from error
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    for unit in (*layers, *_ends(model)):
        fully_shard(unit, mesh=mesh, ignored_params=set(trained))
    fully_shard(model, mesh=mesh, ignored_params=set(trained), reshard_after_forward=False)
    return trained


def _ends(model):
    """Embeddings and output layer, if they do not share their weight: they are large where vocabularies are."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    ends = [end for end in (base.get_input_embeddings(), base.get_output_embeddings()) if end is not None]
    weights = {id(end.weight) for end in ends}
    return ends if len(weights) == len(ends) else []


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace the gradients of parameters that every process holds by their mean over the processes."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    together = torch.cat([gradient.flatten() for gradient in gradients])  # one message instead of hundreds
    dist.all_reduce(together.div_(dist.get_world_size()))
    for gradient, mean in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
