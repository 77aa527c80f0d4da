"""Workers that wait for room on the cluster: Ray Train waits for ever and in silence, so the driver says so."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import ray

from cluster.driver.actors import actors_of
from cluster.driver.room import alive_nodes, counted, grows, share_of, workers_that_fit
from cluster.settings.workers import WorkerRange

FIRST_SECONDS = 20.0
"""Without a worker before it is told of: a Ray process that has torch to load takes up to half of that."""

AGAIN_SECONDS = 300.0
LOOK_SECONDS = 2.0
"""Ray is asked for its actors this often."""

_WORKER_CLASS = "RayTrainWorker"


class Waiting:
    """Looks whether a run's workers have their place, at the start and after the loss of a node."""

    def __init__(
        self,
        workers: WorkerRange,
        resources: Mapping[str, float],
        note: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``resources`` are a worker's; ``note`` is given the lines for the user; ``clock`` counts seconds."""
        self.told = False
        """Whether the workers wait and the user knows."""
        self._workers, self._cpus, self._gpu = workers, resources["CPU"], bool(resources.get("GPU"))
        self._note, self._clock = note, clock
        self._next_look = self._next_line = clock()
        if not self._short():
            self._next_line += FIRST_SECONDS

    def look(self) -> None:
        """Say what the workers wait for where they have long enough; called as often as one likes."""
        now = self._clock()
        if now < self._next_look:
            return
        self._next_look = now + LOOK_SECONDS
        if workers_placed():
            self.told, self._next_line = False, now + FIRST_SECONDS
        elif now >= self._next_line:
            self.told, self._next_line = True, now + AGAIN_SECONDS
            self._note(self._line())

    def _short(self) -> bool:
        """Whether the nodes that are there cannot hold the workers, whatever else runs on them."""
        return workers_that_fit(alive_nodes(), self._cpus, gpu=self._gpu) < self._workers.fewest

    def _line(self) -> str:
        noun = "worker" if str(self._workers) == "1" else "workers"
        total, free = ray.cluster_resources(), ray.available_resources()
        names = ["CPU", "GPU"] if self._gpu else ["CPU"]
        parts = [f"{free.get(name, 0.0):g} of {counted(total.get(name, 0.0), name)}" for name in names]
        line = (
            f"waiting for {self._workers} {noun} x {share_of(self._cpus, gpu=self._gpu)}: {' and '.join(parts)} free"
        )
        if self._short():
            line += "; the autoscaler is to add nodes" if grows() else "; nodes of the cluster are missing"
        return line


def workers_placed() -> bool:
    """Whether Ray has found room for training workers of this job: it makes them once all have their place."""
    return bool(actors_of(_WORKER_CLASS))
