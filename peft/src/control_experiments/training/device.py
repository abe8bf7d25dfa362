"""Choosing a device and seeding every generator."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from transformers import set_seed as seed_everything  # noqa: F401  the scripts take it from here

from ..errors import UserError
from .options import processes


def select_device(name: str) -> torch.device:
    """The device that a launcher's GPU argument names: a GPU index ("0", "1", ...), "cuda" for the first, or "cpu".

    With several GPUs the others are hidden (CUDA_VISIBLE_DEVICES), because the Trainer would otherwise spread
    over all of them; the chosen one is then `cuda:0`. Call it once, before anything touches CUDA. Under
    torchrun or accelerate each process takes the GPU of its local rank. Raises UserError: the name is no index,
    or there is no such GPU.
    """
    name = {"cuda": "0"}.get(name, str(name).strip().lower())
    if name == "cpu":
        return torch.device("cpu")
    if not name.isdecimal():
        raise UserError(f"GPU must be an index such as 0, or cpu; got {name!r}")
    index, count = int(os.environ.get("LOCAL_RANK", name)), torch.cuda.device_count()
    if index >= count:
        why = f" ({count} visible): choose a smaller index, or cpu" if count else ": no GPU is visible, choose cpu"
        raise UserError(f"there is no GPU {index} here{why}")
    if "LOCAL_RANK" in os.environ or count == 1:
        return torch.device("cuda", index)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[index] if visible else str(index)
    if torch.accelerator.device_count() != 1:  # the driver read the variable before we set it
        instead = f"start with CUDA_VISIBLE_DEVICES={index} and GPU 0"
        raise UserError(f"GPU {index} can no longer be chosen: {instead}")
    return torch.device("cuda", 0)


#: The floating-point types of `--precision` and `--dtype`.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(asked: str, device: torch.device, on_gpu: str, option: str) -> str:
    """What "auto" means on this device: fp32 on a CPU; `on_gpu` on a GPU, or fp16 where it has no bf16. Raises
    UserError: fp16 on a CPU, or bf16 on a GPU without it."""
    on_cpu = device.type == "cpu"
    has_bf16 = on_cpu or torch.cuda.is_bf16_supported()
    if asked == "auto":
        asked = "fp32" if on_cpu else on_gpu if has_bf16 else "fp16"
    if asked == "fp16" and on_cpu:
        raise UserError(f"--{option} fp16 needs a GPU: choose fp32 or bf16 on a CPU")
    if asked == "bf16" and not has_bf16:
        raise UserError(f"this GPU has no bf16: choose --{option} fp16")
    return asked


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """`tensor` on `device`; from the host to a GPU through pinned memory, so that nobody waits for queued work."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def make_deterministic() -> None:
    """Let torch use deterministic kernels alone, so that a seed gives the same bits on the same kind of GPU.

    Call it before anything touches CUDA (cuBLAS reads its workspace's setting once). A kernel that has no deterministic
    form raises a RuntimeError that names it.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


#: How a lack of memory is told where it has no class of its own: by the host's allocator, by CUDA, and by its libraries.
_LACKING = re.compile(r"DefaultCPUAllocator|CUDA error: out of memory|CU\w+_STATUS_ALLOC_FAILED")


@contextmanager
def explain_out_of_memory(device: torch.device, switches: str) -> Iterator[None]:
    """Raises UserError: in the place of errors for too little memory, the GPU's or the host's; it says which `switches` need less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, (torch.OutOfMemoryError, MemoryError)) or _LACKING.search(str(error))):
            raise
        reason = str(error).partition(" If reserved but unallocated")[0] or "the host's memory is used up"
        raise UserError(
            f"this run on {device.type} needs more memory than there is: {reason}; what lowers it: {switches}; "
            "finished work and the last checkpoint are kept"
        ) from error


def describe_device(device: torch.device) -> dict:
    """The record's `device`: kind, name, count (GPUs in use, or cores open to this process) and total memory in bytes."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory, count = properties.name, properties.total_memory, processes()
    else:
        has_affinity = hasattr(psutil.Process, "cpu_affinity")
        count = len(psutil.Process().cpu_affinity()) if has_affinity else os.cpu_count()
        name, memory = _processor_name(), psutil.virtual_memory().total
    return {"kind": device.type, "name": name, "count": count, "total_memory_bytes": memory}


def _processor_name() -> str:
    information = Path("/proc/cpuinfo")
    found = information.is_file() and re.search(r"^model name\s*: *(.+)", information.read_text(), re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()
