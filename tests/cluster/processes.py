"""Real worker processes joined by gloo, kept over a test session: what Ray Train gives a worker, without Ray."""

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from cluster.worker.machine import Place


class Workers:
    """``size`` processes of one torch thread each. ``run`` calls a function in all of them at once.

    Everything travels as plain bytes: multiprocessing's own way with tensors shares file handles and can deadlock.
    """

    def __init__(self, size: int, folder: str) -> None:
        """``folder`` is where they meet."""
        self.size = size
        context = multiprocessing.get_context("spawn")
        ends = [context.Pipe() for _ in range(size)]
        self._pipes = [ours for ours, _ in ends]
        self._processes = [
            context.Process(target=_serve, args=(rank, size, folder, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(ends)
        ]
        for process in self._processes:
            process.start()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """``function(place, *arguments)`` in every process; the results by rank. An error is raised here."""
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((function, arguments)))
        replies: dict[int, tuple[bool, Any]] = {}
        while len(replies) < self.size and all(good for good, _ in replies.values()):
            for pipe in wait([pipe for rank, pipe in enumerate(self._pipes) if rank not in replies]):
                replies[self._pipes.index(pipe)] = pickle.loads(pipe.recv_bytes())
        for rank, (good, text) in replies.items():
            if not good:  # the others may wait for this one for ever
                self.close()
                raise RuntimeError(f"rank {rank}:\n{text}")
        return [replies[rank][1] for rank in range(self.size)]

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


def _serve(rank: int, size: int, folder: str, pipe: Connection) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    place = Place(rank=rank, world_size=size, device=torch.device("cpu"))
    while True:
        function, arguments = pickle.loads(pipe.recv_bytes())
        try:
            reply = (True, function(place, *arguments))
        except Exception:  # noqa: BLE001 - carried to the test
            reply = (False, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(reply))
