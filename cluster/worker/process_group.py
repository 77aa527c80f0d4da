"""The workers' torch process group, joined by each of them on its own.

Ray Train's own way has its controller, which starts before them, load PyTorch for that: a second of every start.
Nothing of PyTorch is imported here until a worker joins.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta

import ray.train
from ray.train.backend import Backend, BackendConfig
from ray.train.collective import broadcast_from_rank_zero

TIMEOUT = timedelta(minutes=30)
"""For a collective, as Ray Train has it."""


class _SharedDevices(Backend):
    """A worker sees all GPUs of its node, as NCCL wants it; ray.train.torch.get_device knows the worker's own."""

    share_cuda_visible_devices = True


@dataclass
class Joined(BackendConfig):
    """For Ray Train: the workers see to their process group (``backend``: gloo or nccl) themselves.

    TorchTrainer asks for the name, though it makes nothing of it here.
    """

    backend: str

    @property
    def backend_cls(self) -> type[Backend]:
        """What Ray Train does about devices."""
        return _SharedDevices


@contextmanager
def process_group(backend: str) -> Iterator[None]:
    """Within, torch.distributed joins all workers of this Ray Train run by ``backend`` (gloo or nccl).

    It is left as it is where an error ends the worker: others may be gone, and Ray Train ends the process.
    """
    import torch.distributed
    from ray.train.torch import get_device

    if backend == "nccl":
        # Every worker sees all GPUs of its node, and "cuda" is the first of them until it names its own: sums before
        # DeepSpeed does so would meet there, which NCCL refuses.
        torch.cuda.set_device(get_device())
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "NODE_RANK": str(context.get_node_rank()),
    }
    place = broadcast_from_rank_zero(_free_port() if rank == 0 else None)
    torch.distributed.init_process_group(
        backend, init_method=f"tcp://{place}", rank=rank, world_size=size, timeout=TIMEOUT
    )
    yield
    torch.distributed.destroy_process_group()


def _free_port() -> str:
    """host:port of this node, where the workers can meet."""
    host = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with closing(socket.socket(family)) as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    return f"[{host}]:{port}" if family == socket.AF_INET6 else f"{host}:{port}"
