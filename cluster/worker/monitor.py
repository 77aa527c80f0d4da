"""The actor between a run's workers and its driver: rows and notes one way, what is wished of them the other."""

from __future__ import annotations

from typing import Any, Literal

import ray

Kind = Literal["begun", "row", "history", "step", "note", "failed"]
"""What a message tells, and what it holds beside its ``kind``:

begun: a worker has begun its work. row: the metrics ``row`` of an epoch that has ended. history: the ``rows`` of the
checkpoint that is taken up. step: ``done`` of the ``total`` steps of an ``epoch``. note: a ``text`` to be shown.
failed: a failure that a restart cannot mend, and its ``text``.
"""

Message = dict[str, Any]
"""``kind``, one of ``Kind``, and what belongs to it."""


@ray.remote(num_cpus=0)
class Monitor:
    """Keeps messages until the driver fetches them; sending one never holds up a worker."""

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._stopping = False
        self._saves = 0
        self._failed = False

    def send(self, message: Message) -> None:
        """Keep a message of a worker."""
        self._failed = self._failed or message["kind"] == "failed"
        self._messages.append(message)

    def failed(self) -> bool:
        """Whether a worker told of a failure that a restart cannot mend."""
        return self._failed

    def drain(self) -> list[Message]:
        """All messages since the last call, oldest first."""
        messages, self._messages = self._messages, []
        return messages

    def stop(self) -> None:
        """Wish that the workers write a checkpoint and end."""
        self._stopping = True

    def save(self) -> None:
        """Wish that the workers write a checkpoint soon."""
        self._saves += 1

    def wishes(self) -> tuple[bool, int]:
        """Whether ``stop`` was called, and how often ``save`` was."""
        return self._stopping, self._saves
