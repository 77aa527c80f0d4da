"""Room for trials on the nodes of a cluster: how many run at once, and what each reserves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray.tune import PlacementGroupFactory

from cluster.driver.room import alive_nodes, awaited, worker_share, workers_that_fit
from cluster.errors import UserError
from cluster.session import autoscaled, require_told
from tune.folder import Search

OUTER_CPUS = 0.0001
"""What a trial takes beside its workers, where they are processes of their own: enough to keep it off nodes that take
no work."""

SHARE = 0.99
"""What such workers reserve of their CPUs; the rest has room for the processes beside them, on whichever node."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """What a trial takes, and how many fit."""

    resources: PlacementGroupFactory
    config: Mapping[str, Any]
    """Settings of the workers that follow from it."""
    threads: int
    trials: int


def awaited_capacity(plan: Search) -> Capacity:
    """``capacity_of``, waiting up to ``wait_minutes`` for nodes; those that come after that are not reckoned with."""
    return awaited(lambda: capacity_of(plan), plan.config.scale.wait_minutes)


def capacity_of(plan: Search) -> Capacity:
    """How many trials run at once: as many as have room for all their workers, so that none waits for another's.

    Whether workers have GPUs and how many CPUs is reckoned as for a run (cluster/driver/room.py); trials are told.
    UserError where there is no room for one.
    """
    scale, nodes = plan.config.scale, alive_nodes()
    workers, fit = scale.num_workers, plan.options.concurrent or 0
    share = worker_share(scale, nodes, at_most=1.0)
    cpus = share.cpus
    if autoscaled():
        told = plan.options.concurrent
        require_told(device=scale.device, cpus_per_worker=scale.cpus_per_worker, concurrent=told)
    else:
        gpus = sum(node.gpus for node in nodes)
        if share.gpu and gpus < workers.fewest:
            raise UserError(f"device cuda: a trial's {workers} workers need a GPU each, the cluster has {gpus:g}")
        room = workers_that_fit(nodes, cpus, gpu=share.gpu) if cpus else 0
        if room < workers.fewest:
            total = sum(node.cpus for node in nodes)
            raise UserError(
                f"cpus_per_worker {cpus:g}: a trial of {workers} workers does not fit the cluster's {total:g} CPUs"
            )
        fit = max(1, room // workers.most)
    reserved = cpus if workers.most == 1 else max(int(1e4 * SHARE * cpus), 1) / 1e4
    return Capacity(
        resources=PlacementGroupFactory([share.resources if workers.most == 1 else {"CPU": OUTER_CPUS}]),
        config={
            "cpus_per_worker": reserved,
            "threads_per_worker": share.threads,
            "device": "cuda" if share.gpu else "cpu",
        },
        threads=share.threads,
        trials=min(fit, plan.options.concurrent or fit),
    )
