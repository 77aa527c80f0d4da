"""From the workers to whoever watches: rows and notes, handed over without holding up a step."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import ray

Message = dict[str, Any]
"""``kind`` ("row", "step", "note") and what belongs to it."""

POLL_SECONDS = 0.25


@ray.remote(num_cpus=0)
class Monitor:
    """An actor beside the driver that keeps messages until they are fetched."""

    def __init__(self) -> None:
        self._messages: list[Message] = []

    def send(self, message: Message) -> None:
        """Keep a message."""
        self._messages.append(message)

    def drain(self) -> list[Message]:
        """All messages since the last call, oldest first."""
        messages, self._messages = self._messages, []
        return messages


class Watcher:
    """A thread of the driver that passes every message to ``handle`` soon after it was sent."""

    def __init__(self, monitor: Any, handle: Callable[[Message], None]) -> None:  # noqa: ANN401 - a Ray actor handle
        self._monitor = monitor
        self._handle = handle
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="run-watcher", daemon=True)
        self._error: BaseException | None = None

    def start(self) -> None:
        """Begin watching."""
        self._thread.start()

    def finish(self) -> None:
        """Pass on what is left and end; an error of ``handle`` is raised here."""
        self._stop.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _watch(self) -> None:
        try:
            while not self._stop.wait(POLL_SECONDS):
                self._drain()
            self._drain()
        except Exception as error:  # noqa: BLE001 - carried to the driver's thread by finish()
            self._error = error

    def _drain(self) -> None:
        for message in ray.get(self._monitor.drain.remote()):
            self._handle(message)
