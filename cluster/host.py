"""What a worker lives in: who keeps its checkpoints, hears its messages and may want it to stop.

In a run of ``crystalformer train`` that is Ray Train; a trial of a search offers the same (tune/worker.py), so that
one Worker (loop.py) does the epochs of both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import ray
import ray.train

from cluster.monitor import Message


class Host(Protocol):
    """All that a worker asks of the world around it."""

    def checkpoints(self) -> Sequence[ray.train.Checkpoint]:
        """The checkpoints kept so far, the newest first."""

    def keep(self, metrics: Mapping[str, Any], checkpoint: ray.train.Checkpoint | None) -> None:
        """Keep a checkpoint. Every worker calls it, the first one with the checkpoint; returns when it is stored."""

    def send(self, message: Message) -> None:
        """Pass a message on without waiting."""

    def stopping(self) -> bool:
        """Whether the worker should write a checkpoint and end; asked about once a second."""


class RayTrainHost:
    """A worker of Ray Train; messages go through the run's Monitor."""

    def __init__(self, monitor: Any) -> None:  # noqa: ANN401 - a Ray actor handle
        self._monitor = monitor
        self._asked: Any = None

    def checkpoints(self) -> Sequence[ray.train.Checkpoint]:
        """Those reported to Ray Train."""
        latest = ray.train.get_checkpoint()
        if latest is None:
            return []
        reported = [item.checkpoint for item in ray.train.get_all_reported_checkpoints()]
        return [latest, *(c for c in reversed(reported) if c.path != latest.path)]

    def keep(self, metrics: Mapping[str, Any], checkpoint: ray.train.Checkpoint | None) -> None:
        """Report to Ray Train."""
        ray.train.report(dict(metrics), checkpoint=checkpoint)

    def send(self, message: Message) -> None:
        """Leave the message with the Monitor."""
        self._monitor.send.remote(message)

    def stopping(self) -> bool:
        """The driver's wish as of a moment ago: the answer to the last question, without waiting for a new one."""
        if self._asked is None:
            self._asked = self._monitor.stopping.remote()
        ready, _ = ray.wait([self._asked], timeout=0)
        if not ready:
            return False
        wanted = bool(ray.get(self._asked))
        self._asked = None
        return wanted
