"""The actors of this process's job that others have made for it, as Ray Train and Ray Tune do."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import ray
from ray._private.state import (  # the public ray.util.state asks the dashboard, which a local Ray has not
    actors,
    state,
)
from ray.core.generated.gcs_pb2 import ActorTableData, PlacementGroupTableData, WorkerTableData
from ray.exceptions import ActorHandleNotFoundError
from ray.util.placement_group import PlacementGroup, remove_placement_group

GONE_SECONDS = 10.0
"""For the processes of killed actors to end."""


def actors_of(class_name: str) -> list[dict[str, Any]]:
    """Ray's entries of this job's actors of a class that have not ended."""
    found = actors(job_id=_job()).values()
    return [actor for actor in found if actor["ActorClassName"] == class_name and actor["State"] != "DEAD"]


def kill_actors(class_name: str) -> None:
    """Kill those of a class that this process has started, though it was not given their handles."""
    core = ray._private.worker.global_worker.core_worker
    for actor in actors_of(class_name):
        # Another process of this job, such as another trial, started it, or whoever did lets go of it now.
        with suppress(ActorHandleNotFoundError):
            core.kill_actor(ray.ActorID.from_hex(actor["ActorID"]), True)  # noqa: FBT003 - not to be restarted


def give_back_reservations() -> None:
    """Remove the placement groups that killed actors of this job have made, once their processes have ended.

    Ray removes a group when its creator and its job die, but not one that the creator's process makes after it was
    booked as dead: that one keeps its CPUs and GPUs for as long as the cluster lives.
    """
    deadline = time.monotonic() + GONE_SECONDS
    while _processes_of_dead_actors() and time.monotonic() < deadline:
        time.sleep(0.05)
    dead = {actor.actor_id for actor in _dead_actors()}
    for data in map(PlacementGroupTableData.FromString, _tables().get_placement_group_table()):
        if data.creator_actor_id in dead and data.state != PlacementGroupTableData.REMOVED:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(data.placement_group_id)))


def _processes_of_dead_actors() -> set[bytes]:
    """Ray's worker ids of those that still run; of those on a lost node it keeps to itself that they do not."""
    nodes = {bytes.fromhex(node["NodeID"]) for node in ray.nodes() if node["Alive"]}
    theirs = {actor.address.worker_id for actor in _dead_actors() if actor.address.node_id in nodes}
    workers = map(WorkerTableData.FromString, _tables().get_worker_table())
    return theirs & {worker.worker_address.worker_id for worker in workers if worker.is_alive}


def _dead_actors() -> list[ActorTableData]:
    found = map(ActorTableData.FromString, _tables().get_actor_table(_job(), None))
    return [actor for actor in found if actor.state == ActorTableData.DEAD]


def _job() -> ray.JobID:
    return ray.JobID.from_hex(ray.get_runtime_context().get_job_id())


def _tables() -> Any:  # noqa: ANN401 - Ray's GlobalStateAccessor
    return state._connect_and_get_accessor()
