"""The actors of this process's job that others have made for it, as Ray Train and Ray Tune do."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import ray
from ray._private.state import actors  # the public ray.util.state asks the dashboard, which a local Ray has not
from ray.exceptions import ActorHandleNotFoundError


def actors_of(class_name: str) -> list[dict[str, Any]]:
    """Ray's entries of this job's actors of a class that have not ended."""
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    found = actors(job_id=job).values()
    return [actor for actor in found if actor["ActorClassName"] == class_name and actor["State"] != "DEAD"]


def kill_actors(class_name: str) -> None:
    """Kill those of a class that this process has started, though it was not given their handles."""
    core = ray._private.worker.global_worker.core_worker
    for actor in actors_of(class_name):
        # Another process of this job, such as another trial, started it, or whoever did lets go of it now.
        with suppress(ActorHandleNotFoundError):
            core.kill_actor(ray.ActorID.from_hex(actor["ActorID"]), True)  # noqa: FBT003 - not to be restarted
