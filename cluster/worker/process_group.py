"""The workers' torch process group, joined by each of them on its own.

Ray Train's own way has its controller, which starts before them, load PyTorch for that: a second of every start.
Nothing of PyTorch is imported here until a worker joins.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import ray.train
from ray.train.backend import Backend, BackendConfig
from ray.train.collective import broadcast_from_rank_zero

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]  # of its C part

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
    host = ray.util.get_node_ip_address()
    if host.startswith("127."):
        _stay_on_loopback()
    store = _store(host, rank, size)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    yield
    torch.distributed.destroy_process_group()


def _stay_on_loopback() -> None:
    """Have gloo talk, and listen, on this machine alone, not at the address that goes by the machine's name."""
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if loopback is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)


def _store(host: str, rank: int, size: int) -> Store:
    """Where the workers find each other: kept by the first, which listens at ``host``, its node's address, alone.

    PyTorch would listen on all of the machine's, and ask nobody who comes for a password.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # of its C part

    if rank > 0:
        first, port = broadcast_from_rank_zero(None)
        return TCPStore(first, port, size, is_master=False, timeout=TIMEOUT)
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.bind((host, 0))
    listening.listen()
    port = listening.getsockname()[1]
    store = TCPStore(
        host, port, size, is_master=True, timeout=TIMEOUT, wait_for_workers=False, master_listen_fd=listening.detach()
    )
    broadcast_from_rank_zero((host, port))
    return store
