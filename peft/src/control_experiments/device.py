"""Choosing a device and seeding every generator."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil
import torch
from transformers import set_seed

from .errors import UserError


def select_device(name: str) -> torch.device:
    """The device that a launcher's GPU argument names: a GPU index ("0", "1", ...) or "cpu".

    With several GPUs the others are hidden (CUDA_VISIBLE_DEVICES), because the Trainer would otherwise spread over
    all of them; the chosen one is then `cuda:0`. Call it once, before anything touches CUDA. Under torchrun or
    accelerate each process takes the GPU of its local rank.

    Raises:
        UserError: the name is no index, or there is no such GPU.
    """
    name = str(name).strip().lower()
    if name == "cpu":
        return torch.device("cpu")
    if not name.isdecimal():
        raise UserError(f"GPU must be an index such as 0, or cpu; got {name!r}")
    index, count = int(os.environ.get("LOCAL_RANK", name)), torch.cuda.device_count()
    if index >= count:
        raise UserError(f"there is no GPU {index} here ({count} visible): choose a smaller index, or cpu")
    if "LOCAL_RANK" in os.environ or count == 1:
        return torch.device("cuda", index)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[index] if visible else str(index)
    if torch.accelerator.device_count() != 1:  # the driver read the variable before we set it
        raise UserError(
            f"GPU {index} can no longer be chosen: start with CUDA_VISIBLE_DEVICES={index} and GPU 0"
        )
    return torch.device("cuda", 0)


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators (all devices)."""
    set_seed(seed)


def describe_device(device: torch.device) -> dict:
    """The record's `device`: kind, name, count (GPUs in use, or cores open to this process) and total memory in bytes."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        count = int(os.environ.get("WORLD_SIZE", 1))
        return {
            "kind": "cuda",
            "name": properties.name,
            "count": count,
            "total_memory_bytes": properties.total_memory,
        }
    return {
        "kind": device.type,
        "name": _processor_name(),
        "count": len(psutil.Process().cpu_affinity())
        if hasattr(psutil.Process, "cpu_affinity")
        else os.cpu_count(),
        "total_memory_bytes": psutil.virtual_memory().total,
    }


def _processor_name() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
