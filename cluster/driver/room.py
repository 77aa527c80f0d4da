"""Room on the nodes of a cluster: a worker lies on one node, so what several nodes have left over makes no worker.

All of it is reckoned in ten-thousandths of a CPU, as Ray does: 0.3 CPUs are a third of 0.9.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import ray
from ray.autoscaler.v2.utils import is_autoscaler_v2

from cluster.errors import UserError
from cluster.log import say
from cluster.session import autoscaled
from cluster.settings.sections import ScaleConfig

Found = TypeVar("Found")

NODES_SECONDS = 2.0
"""Nodes that are waited for are counted this often."""

_PARTS = 10_000
"""Of a CPU."""


class Node(NamedTuple):
    """What a node has for workers, whoever uses it now."""

    cpus: float
    gpus: float = 0.0


def alive_nodes() -> list[Node]:
    """The nodes of the cluster that this process is connected to."""
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(float(found.get("CPU", 0.0)), float(found.get("GPU", 0.0))) for found in resources]


def grows() -> bool:
    """Whether an autoscaler adds nodes for what waits: told to this process, or, on other nodes, by the cluster."""
    return autoscaled() or (ray.is_initialized() and bool(is_autoscaler_v2()))


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerResources:
    """What a worker has: torch threads, what Ray reserves for it ("CPU", and "GPU" where it has one), and whether."""

    threads: int
    resources: dict[str, float]
    gpu: bool

    @property
    def cpus(self) -> float:
        """Those that are reserved."""
        return self.resources["CPU"]


def awaited(find: Callable[[], Found], minutes: float) -> Found:
    """What ``find`` gives once it raises UserError, for want of nodes, no longer; the error after so many minutes."""
    deadline = time.monotonic() + 60 * minutes
    told = False
    while True:
        try:
            return find()
        except UserError as problem:
            if time.monotonic() >= deadline:
                raise
            if not told:
                say(f"waiting up to {minutes:g} min for nodes: {problem}")
            told = True
        time.sleep(NODES_SECONDS)


def worker_share(scale: ScaleConfig, nodes: Sequence[Node], at_most: float = math.inf) -> WorkerResources:
    """What each worker is to have: CPUs as the settings say, else the most that all workers can, up to ``at_most``.

    These are 0 where there is no room at any number; nor is it checked that there are as many GPUs as workers.
    UserError where the backend asked for is not for the device that ``auto`` is on these nodes.
    """
    workers, gpus = scale.num_workers, sum(node.gpus for node in nodes)
    gpu = scale.device == "cuda" or (scale.device == "auto" and gpus >= workers.fewest)
    if scale.backend == ("numba" if gpu else "triton"):
        found = f"device {scale.device} is {'a GPU' if gpu else 'the CPU'} on the cluster's {described(nodes)}"
        raise UserError(f"backend {scale.backend} is not for it: {found}; allowed are auto, torch and reference")
    cpus = scale.cpus_per_worker
    if cpus is None:
        cpus = min(at_most, cpus_that_fit(nodes, min(workers.most, int(gpus)) if gpu else workers.most, gpu=gpu))
    return WorkerResources(
        threads=scale.threads_per_worker or max(1, int(cpus)),
        resources={"CPU": cpus} | ({"GPU": 1.0} if gpu else {}),
        gpu=gpu,
    )


def workers_that_fit(nodes: Sequence[Node], cpus: float, *, gpu: bool) -> int:
    """How many workers of ``cpus`` CPUs each, above 0, and of a GPU each where ``gpu``, the nodes have room for."""
    return _fit(nodes, max(1, round(cpus * _PARTS)), gpu=gpu)


def cpus_that_fit(nodes: Sequence[Node], workers: int, *, gpu: bool) -> float:
    """The most CPUs that each of ``workers`` workers can have: a whole number, or part of one where one is too many.

    0.0 where there is no room for them at any number of CPUs.
    """
    most = round(max((node.cpus for node in nodes), default=0.0) * _PARTS)
    # The more CPUs a worker has, the fewer workers fit: what fits is found by halving, and every number below fits.
    parts = bisect_right(range(1, most + 1), -workers, key=lambda tried: -_fit(nodes, tried, gpu=gpu))
    return float(parts // _PARTS) if parts >= _PARTS else parts / _PARTS


def _fit(nodes: Sequence[Node], parts: int, *, gpu: bool) -> int:
    by_cpus = [(round(node.cpus * _PARTS) // parts, int(node.gpus)) for node in nodes]
    return sum(min(fitting, gpus) if gpu else fitting for fitting, gpus in by_cpus)


def described(nodes: Sequence[Node]) -> str:
    """Such as "1 node of 16 CPUs, 2 nodes of 64 CPUs and 8 GPUs"; nodes that take no work are left out."""
    kinds = Counter(node for node in nodes if node.cpus or node.gpus)
    texts = [
        f"{count} {'node' if count == 1 else 'nodes'} of {counted(node.cpus, 'CPU')}"
        + (f" and {counted(node.gpus, 'GPU')}" if node.gpus else "")
        for node, count in sorted(kinds.items())
    ]
    return ", ".join(texts) or "no node with CPUs"


def share_of(cpus: float, *, gpu: bool) -> str:
    """What a worker has: "48 CPUs", "9 CPUs and 1 GPU"."""
    return counted(cpus, "CPU") + (" and 1 GPU" if gpu else "")


def counted(number: float, noun: str) -> str:
    """Such as "1 CPU" and "64 CPUs"."""
    return f"{number:g} {noun}{'' if number == 1 else 's'}"
