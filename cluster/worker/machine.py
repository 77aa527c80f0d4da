"""Where a worker runs and what it takes there."""

from __future__ import annotations

import platform
import resource
import sys
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a worker stands among the others, and what it computes on."""

    rank: int
    world_size: int
    device: torch.device


def device_name(device: torch.device) -> str:
    """The GPU's name, or cpu and the processor's."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return f"cpu: {platform.machine()}"


def peak_memory_mb(device: torch.device) -> float:
    """Largest memory so far in MB (10^6 bytes): allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
