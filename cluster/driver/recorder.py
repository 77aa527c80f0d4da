"""What the workers tell, written down and shown by the driver."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import ray

from cluster.errors import UserError
from cluster.run.progress import Progress
from cluster.run.report import MetricsLog, read_metrics
from cluster.run.storage import RunStore
from cluster.settings.config import TrainConfig
from cluster.worker.monitor import Message


class Recorder:
    """Rows and notes of the workers: into metrics.jsonl and TensorBoard, and onto the terminal."""

    def __init__(
        self, store: RunStore, config: TrainConfig, units: dict[str, str], track: Callable[[Message], None]
    ) -> None:
        """Go on after the epochs that are in metrics.jsonl already, where the run is resumed."""
        self._store, self._track = store, track
        self._push_failed = False
        self.failure = ""
        """Why the run cannot go on, where a worker said so."""
        self.begun = False
        """Whether a worker has begun its work."""
        done = read_metrics(store.folder)[-1:] if config.run.resume else []
        done_epochs = done[0]["epoch"] if done else 0
        self._progress = Progress(config.optim.epochs, units, done_epochs=done_epochs)
        self._log = MetricsLog(store.folder, done_epochs + 1 if config.run.resume else None)
        self._last = done_epochs

    def __enter__(self) -> Self:
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._log.close()
        self._progress.__exit__(kind, error, trace)

    def take(self, monitor: Any) -> list[Message]:  # noqa: ANN401 - a Ray actor handle
        """Fetch and record what has come in; gives the metrics rows among it."""
        messages: list[Message] = ray.get(monitor.drain.remote())
        for message in messages:
            self._record(message)
        self.push()
        return [message["row"] for message in messages if message["kind"] == "row"]

    def push(self) -> None:
        """Send what is new to an object store. One that does not answer is told of once, and the run goes on."""
        try:
            self._store.push()
            self._push_failed = False
        except UserError as error:
            if not self._push_failed:
                self.note(f"warning: the run folder is behind, sending is tried again: {error}")
            self._push_failed = True

    def note(self, text: str) -> None:
        """Show a line that stays."""
        self._progress.note(text)

    def _record(self, message: Message) -> None:
        """Take up a message. ValueError where it is of no ``monitor.Kind``."""
        match message["kind"]:
            case "begun":
                self.begun = True
            case "row":
                self._row(message["row"])
            case "history":
                self._catch_up(message["rows"])
            case "step":
                self._progress.step(message["epoch"], message["done"], message["total"])
            case "note":
                self.note(message["text"])
            case "failed":
                self.failure = message["text"]
            case other:
                raise ValueError(f"a message of the unknown kind {other!r}")

    def _catch_up(self, rows: list[dict[str, Any]]) -> None:
        """Write the rows of a checkpoint that a driver before this one could not write any more."""
        for row in rows:
            if row["epoch"] > self._last:
                self._log.append(row)
                self._track(row)
                self._last = row["epoch"]

    def _row(self, row: dict[str, Any]) -> None:
        if row["epoch"] <= self._last:  # workers went back to a checkpoint: its epochs are run again
            self._log.close()
            self._log = MetricsLog(self._store.folder, row["epoch"])
        self._last = row["epoch"]
        self._log.append(row)
        self._track(row)
        self._progress.update(row)
